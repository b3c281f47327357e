//! Sockets of this host that a kernel was given (`internal_data.domain_socket_proxies`): each
//! through a socket of ours, mounted where the host's own lies.
//!
//! In: paths of the manager. Out: mounts, and bytes carried both ways while the kernel lives. A
//! socket of ours is open to everybody in the container, whoever owns the host's. Invariants: only
//! a path that is a socket is ever connected to; connections are bounded for each socket; the end
//! of the kernel ends them and removes the file.
//!
//! The container holds on to the file it was started with, so its sockets end with the agent that
//! served them; a restart of the kernel gives it new ones.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shared::ids::KernelId;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::mounts::{self, Mount, MountError};
use super::request::MountPermission;

/// Connections through one socket at a time; more wait.
const CONNECTIONS: usize = 64;
/// How long the host's side may take to accept one.
const CONNECT: Duration = Duration::from_secs(10);
/// A pause when connections cannot be accepted, for want of descriptors.
const TROUBLE_PAUSE: Duration = Duration::from_millis(200);

/// The sockets of all kernels of this agent.
#[derive(Debug)]
pub struct HostSockets {
    directory: PathBuf,
    open: Mutex<HashMap<KernelId, Opened>>,
}

/// The sockets of one kernel; dropping it closes them.
#[derive(Debug)]
struct Opened {
    files: Vec<PathBuf>,
    closing: CancellationToken,
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.closing.cancel();
        for file in &self.files {
            // Somebody else may have cleared the directory.
            let _ = fs::remove_file(file);
        }
    }
}

/// Checks that the paths are sockets of this host that can be given to a kernel. Blocks.
///
/// # Errors
/// The first that is not.
pub fn check(paths: &[String]) -> Result<(), MountError> {
    for path in paths {
        let plain = Path::new(path);
        if !mounts::is_plain_absolute(plain) || mounts::belongs_to_runner(plain) {
            return Err(MountError::HostSocketPath(path.clone()));
        }
        match fs::metadata(plain) {
            Ok(found) if found.file_type().is_socket() => {}
            Ok(_) => return Err(MountError::NoSocket(path.clone())),
            Err(cause) => {
                return Err(MountError::HostSocket {
                    path: path.clone(),
                    cause,
                });
            }
        }
    }
    Ok(())
}

impl HostSockets {
    /// Sockets in a directory of this agent alone; what an earlier life left there goes. Blocks.
    ///
    /// # Errors
    /// The directory cannot be made or cleared.
    pub fn new(directory: PathBuf) -> io::Result<HostSockets> {
        fs::create_dir_all(&directory)?;
        shared::run_dir::require_own(&directory).map_err(io::Error::other)?;
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if fs::symlink_metadata(&path)?.file_type().is_socket() {
                fs::remove_file(&path)?;
            }
        }
        Ok(HostSockets {
            directory,
            open: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KernelId, Opened>> {
        // The map is whole after every statement.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves the paths for a kernel, in place of what it had. Must be called within a runtime. Blocks.
    ///
    /// # Errors
    /// A socket cannot be made.
    pub fn open(&self, kernel: KernelId, paths: &[String]) -> Result<Vec<Mount>, MountError> {
        self.close(kernel);
        if paths.is_empty() {
            return Ok(Vec::new());
        }
        let mut opened = Opened {
            files: Vec::new(),
            closing: CancellationToken::new(),
        };
        let mut mounts = Vec::with_capacity(paths.len());
        for path in paths {
            let name = &uuid::Uuid::new_v4().simple().to_string()[..24];
            let file = self.directory.join(format!("{name}.sock"));
            let failed = |cause| MountError::HostSocket {
                path: path.clone(),
                cause,
            };
            let listener = UnixListener::bind(&file).map_err(failed)?;
            opened.files.push(file.clone());
            fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).map_err(failed)?;
            let (target, closing) = (PathBuf::from(path), opened.closing.clone());
            tokio::spawn(async move { serve(&listener, &target, &closing).await });
            mounts.push(Mount::bind(
                mounts::display(&file),
                path,
                MountPermission::ReadWrite,
            ));
        }
        self.lock().insert(kernel, opened);
        Ok(mounts)
    }

    /// Ends a kernel's sockets. Blocks.
    pub fn close(&self, kernel: KernelId) {
        let closed = self.lock().remove(&kernel);
        drop(closed);
    }
}

async fn serve(listener: &UnixListener, target: &Path, closing: &CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place,
            () = closing.cancelled() => return,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = closing.cancelled() => return,
        };
        match accepted {
            Ok((inside, _)) => {
                let (target, closing) = (target.to_owned(), closing.clone());
                tokio::spawn(async move {
                    let _place = place;
                    tokio::select! {
                        () = carry(inside, &target) => {}
                        () = closing.cancelled() => {}
                    }
                });
            }
            Err(err) => {
                tracing::debug!(path = %target.display(), %err, "cannot accept a connection to a host socket");
                tokio::time::sleep(TROUBLE_PAUSE).await;
            }
        }
    }
}

async fn carry(mut inside: UnixStream, target: &Path) {
    let outside = tokio::time::timeout(CONNECT, UnixStream::connect(target)).await;
    let mut outside = match outside {
        Ok(Ok(outside)) => outside,
        Ok(Err(err)) => {
            tracing::debug!(path = %target.display(), %err, "cannot connect to a host socket");
            return;
        }
        Err(_) => {
            tracing::debug!(path = %target.display(), "a host socket does not accept");
            return;
        }
    };
    // Either side may go away at any time.
    let _ = tokio::io::copy_bidirectional(&mut inside, &mut outside).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const KERNEL: KernelId = KernelId([7; 16]);

    #[tokio::test]
    async fn bytes_go_both_ways_until_the_kernel_ends() {
        let place = tempfile::tempdir().unwrap();
        let host = place.path().join("host.sock");
        let listener = UnixListener::bind(&host).unwrap();
        fs::set_permissions(&host, fs::Permissions::from_mode(0o600)).unwrap();
        let paths = [host.to_string_lossy().into_owned()];
        check(&paths).unwrap();
        let sockets = HostSockets::new(place.path().join("proxy")).unwrap();
        let mounts = sockets.open(KERNEL, &paths).unwrap();
        assert_eq!(mounts[0].target, paths[0]);
        let ours = PathBuf::from(&mounts[0].source);
        assert_eq!(
            fs::metadata(&ours).unwrap().permissions().mode() & 0o777,
            0o666
        );
        let mut inside = UnixStream::connect(&ours).await.unwrap();
        let (mut outside, _) = listener.accept().await.unwrap();
        inside.write_all(b"question").await.unwrap();
        let mut heard = [0; 8];
        outside.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"question");
        outside.write_all(b"answer").await.unwrap();
        outside.shutdown().await.unwrap();
        let mut text = String::new();
        inside.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "answer");

        let mut second = UnixStream::connect(&ours).await.unwrap();
        let (_held, _) = listener.accept().await.unwrap();
        sockets.close(KERNEL);
        assert!(!ours.exists());
        let mut rest = Vec::new();
        let _ = second.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
    }

    #[test]
    fn what_is_no_socket_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        fs::write(&file, "x").unwrap();
        for (path, words) in [
            (file.to_string_lossy().into_owned(), "no socket"),
            (
                place.path().join("gone").to_string_lossy().into_owned(),
                "cannot be given",
            ),
            ("relative.sock".to_owned(), "absolute"),
            ("/opt/kernel/agent.sock".to_owned(), "absolute"),
        ] {
            let told = check(std::slice::from_ref(&path)).unwrap_err().to_string();
            assert!(told.contains(words) && told.contains(&path), "{told}");
        }
    }

    #[tokio::test]
    async fn leftovers_go_at_the_start() {
        let place = tempfile::tempdir().unwrap();
        let stale = place.path().join("stale.sock");
        drop(UnixListener::bind(&stale).unwrap());
        let kept = place.path().join("note");
        fs::write(&kept, "x").unwrap();
        HostSockets::new(place.path().to_owned()).unwrap();
        assert!(!stale.exists() && kept.exists());
    }
}
