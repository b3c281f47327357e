//! What the BPF system call offers and `aya` does not: running a program once.
//!
//! In: a loaded program. Out: what it returned. Also the file system for pins.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use rustix::fs::{StatFs, statfs};
use rustix::mount::{MountFlags, mount};

/// linux/bpf.h.
const BPF_PROG_TEST_RUN: libc::c_long = 10;
/// linux/magic.h.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// The `test` member of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

const _: () = assert!(size_of::<TestRun>() == 80);

/// Runs a classifier once, on an empty Ethernet frame. Answers what it returned.
///
/// # Errors
/// The kernel's refusal.
pub fn run_once(program: impl AsFd) -> io::Result<u32> {
    let frame = [0_u8; 64];
    let mut attributes = TestRun {
        prog_fd: u32::try_from(program.as_fd().as_raw_fd()).map_err(io::Error::other)?,
        data_size_in: 64,
        data_in: frame.as_ptr().addr() as u64,
        repeat: 1,
        ..TestRun::default()
    };
    // SAFETY: `attributes` has the layout of the kernel's `test` member and lives through the call,
    // as does the frame it points to; the kernel writes into `attributes` only.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            &raw mut attributes,
            size_of::<TestRun>(),
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(attributes.retval)
}

/// Whether a directory lies on a file system for pins.
pub fn holds_pins(directory: &Path) -> bool {
    let of = |stat: StatFs| u32::try_from(stat.f_type).ok();
    statfs(directory).ok().and_then(of) == Some(BPF_FS_MAGIC)
}

/// Mounts a file system for pins.
///
/// # Errors
/// The kernel's refusal.
pub fn mount_pins(directory: &Path) -> io::Result<()> {
    mount(
        "bpf",
        directory,
        "bpf",
        MountFlags::empty(),
        Some(c"mode=0700"),
    )
    .map_err(Into::into)
}
