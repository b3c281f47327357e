//! The kernel's interface lock (rtnl), held by the test as a driver holds it that resets its card.
//!
//! In: nothing. Out: a handle while which nobody on this machine, in whatever namespace, changes or
//! lists interfaces. Invariants: it ends with the handle, and after [`LIMIT_SECONDS`] in any case. As it
//! stops every engine's networks too, a test that holds it runs alone (.config/nextest.toml).

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The longest that a test can hold it.
pub const LIMIT_SECONDS: u32 = 20;

/// A question of ethtool(7)'s whose second word lies in a page that its owner never fills
/// (userfaultfd(2)): the kernel reads that word under the lock, and waits for it. The first one, which
/// it reads before, lies at the end of the page in front.
const HOLD: &str = "
import ctypes, errno, fcntl, mmap, os, platform, socket, struct, sys, threading
number = {'x86_64': 323, 'aarch64': 282}.get(platform.machine(), -1)
kernel = ctypes.CDLL(None, use_errno=True)
faults = kernel.syscall(number, os.O_CLOEXEC)
if faults < 0:
    print('no userfaultfd: ' + os.strerror(ctypes.get_errno()), file=sys.stderr)
    sys.exit(3 if ctypes.get_errno() == errno.ENOSYS else 1)
fcntl.ioctl(faults, 0xc018aa3f, bytearray(struct.pack('QQQ', 0xaa, 0, 0)))
page = mmap.PAGESIZE
memory = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
memory[page - 4:page] = struct.pack('I', 0x2c)
fcntl.ioctl(faults, 0xc020aa00, bytearray(struct.pack('QQQQ', start + page, page, 1, 0)))
asked = socket.socket()
request = struct.pack('16sP16x', b'lo', start + page - 4)
threading.Thread(target=fcntl.ioctl, args=(asked, 0x8946, request), daemon=True).start()
end = threading.Timer(float(sys.argv[1]), os._exit, (0,))
end.daemon = True
end.start()
os.read(faults, 32)
print('held', flush=True)
sys.stdin.read()
os._exit(0)
";

/// The lock, held.
#[derive(Debug)]
pub struct InterfaceLock {
    holder: Child,
    since: Instant,
}

impl InterfaceLock {
    /// Takes it. `None`, with a skip, where the kernel has no userfaultfd(2) or there is no Python.
    ///
    /// # Errors
    /// No right to hold a fault of the kernel's.
    pub fn hold() -> Result<Option<Self>> {
        let started = Command::new("python3")
            .args(["-c", HOLD, &LIMIT_SECONDS.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut holder = match started {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                crate::skip::needs("holding the interface lock needs python3");
                return Ok(None);
            }
            started => started.context("python3")?,
        };
        let mut word = [0; 4];
        let out = holder.stdout.as_mut().context("its standard output")?;
        if out.read_exact(&mut word).is_ok() && &word == b"held" {
            return Ok(Some(Self {
                holder,
                since: Instant::now(),
            }));
        }
        let output = holder.wait_with_output()?;
        let why = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(3) {
            crate::skip::here(why.trim(), false);
            return Ok(None);
        }
        bail!("the interface lock can't be held: {}", why.trim());
    }

    /// For how long it has been held; an error when it is not any more.
    pub fn held(&mut self) -> Result<Duration> {
        if let Some(status) = self.holder.try_wait()? {
            bail!("the interface lock was let go: {status}");
        }
        Ok(self.since.elapsed())
    }
}

impl Drop for InterfaceLock {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
