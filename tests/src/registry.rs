//! An image registry on loopback (Debian's `docker-registry`) with its own storage.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// User of a registry with credentials.
pub const USER: &str = "tester";
/// Its password.
pub const PASSWORD: &str = "U*U";
/// bcrypt of it (a published test vector of crypt_blowfish).
const PASSWORD_HASH: &str = "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW";

/// A running registry; ends with the value.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    _storage: tempfile::TempDir,
    /// `127.0.0.1:PORT`, the first part of image names.
    pub address: String,
}

impl Registry {
    /// Starts a registry, with credentials required or without.
    pub fn start(with_credentials: bool) -> Result<Self> {
        let storage = tempfile::tempdir().context("registry storage")?;
        // The registry can't be given a socket; between here and its bind the port could be taken,
        // so a start that fails is tried again on another one.
        for _ in 0..5 {
            let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
            let address = format!("127.0.0.1:{port}");
            let auth = if with_credentials {
                let file = storage.path().join("htpasswd");
                std::fs::write(&file, format!("{USER}:{PASSWORD_HASH}\n"))?;
                format!(
                    "auth:\n  htpasswd:\n    realm: test\n    path: {}\n",
                    file.display()
                )
            } else {
                String::new()
            };
            let config = storage.path().join("config.yml");
            std::fs::write(
                &config,
                format!(
                    "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
                     http:\n  addr: {address}\n{auth}",
                    storage.path().join("blobs").display()
                ),
            )?;
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .context("start docker-registry; try: apt-get install docker-registry")?;
            let until = Instant::now() + Duration::from_secs(10);
            while Instant::now() < until && child.try_wait()?.is_none() {
                if std::net::TcpStream::connect(&address).is_ok() {
                    return Ok(Self {
                        child,
                        _storage: storage,
                        address,
                    });
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        bail!("docker-registry does not listen")
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
