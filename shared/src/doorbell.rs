//! Doorbells: one empty datagram on a unix socket says "look at my region".
//!
//! In: a directory. Out: a descriptor to wait on, or a way to ring it. Invariant: nothing is said
//! but that something may have changed; truth is in the region, so a ring that is lost, doubled or
//! forged costs one look. Neither side ever blocks.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

/// Name of the socket in its owner's directory.
const FILE_NAME: &str = "doorbell";

/// The writer's group may ring.
const SOCKET_MODE: u32 = 0o660;

/// Rings taken off the socket at one look; more are left for the next.
const DRAIN_LIMIT: usize = 1_024;

/// A doorbell could not be put up or rung. The host is at fault.
#[derive(Debug, thiserror::Error)]
pub enum DoorbellError {
    /// The socket could not be made.
    #[error("cannot {step} the doorbell {path}", path = .path.display())]
    Bind {
        /// What was tried.
        step: &'static str,
        /// The socket.
        path: PathBuf,
        /// The cause (a path beyond 107 bytes is InvalidInput: use a shorter run-dir).
        #[source]
        source: io::Error,
    },
    /// The socket could not be rung for another reason than nobody being there.
    #[error("cannot ring the doorbell {path}", path = .path.display())]
    Ring {
        /// The socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The receiving end, one per directory; bind it only while holding the directory's lock.
#[derive(Debug)]
pub struct Doorbell {
    socket: UnixDatagram,
}

impl Doorbell {
    /// Binds the doorbell of `directory`, taking the place of one left by a dead process.
    ///
    /// # Errors
    /// A leftover cannot be removed, or the socket cannot be bound there.
    pub fn bind(directory: impl AsRef<Path>) -> Result<Self, DoorbellError> {
        let path = directory.as_ref().join(FILE_NAME);
        let fail = |step, source| DoorbellError::Bind {
            step,
            path: path.clone(),
            source,
        };
        match std::fs::remove_file(&path) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                return Err(fail("remove the leftover of", err));
            }
            _ => {}
        }
        let socket = UnixDatagram::bind(&path).map_err(|err| fail("bind", err))?;
        socket
            .set_nonblocking(true)
            .map_err(|err| fail("set up", err))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(SOCKET_MODE))
            .map_err(|err| fail("set the mode of", err))?;
        Ok(Self { socket })
    }

    /// Takes all rings off the socket; whether there was one. Never blocks. With an edge-triggered
    /// poll, call it until it answers `false`.
    pub fn drain(&self) -> bool {
        let mut rung = false;
        let mut byte = [0u8; 1];
        for _ in 0..DRAIN_LIMIT {
            match self.socket.recv(&mut byte) {
                Ok(_) => rung = true,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        rung
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Doorbell {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// What a ring came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingOutcome {
    /// The other side will be woken.
    Heard,
    /// Rings are already waiting to be heard: the other side will look anyway.
    Pending,
    /// Nobody has put up that doorbell, or its owner is dead. It looks at the region when it starts.
    Nobody,
}

/// The ringing end. Cheap; finds the doorbell by name each time, so a restarted owner is found.
#[derive(Debug)]
pub struct Ringer {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Ringer {
    /// A ringer for the doorbell in `directory`, whether or not it is there yet.
    ///
    /// # Errors
    /// The process can have no socket.
    pub fn of(directory: impl AsRef<Path>) -> Result<Self, DoorbellError> {
        let path = directory.as_ref().join(FILE_NAME);
        let fail = |step, source| DoorbellError::Bind {
            step,
            path: path.clone(),
            source,
        };
        let socket = UnixDatagram::unbound().map_err(|err| fail("make a socket for", err))?;
        socket
            .set_nonblocking(true)
            .map_err(|err| fail("set up a socket for", err))?;
        Ok(Self { socket, path })
    }

    /// Rings. Never blocks.
    ///
    /// # Errors
    /// The socket refuses to send.
    pub fn ring(&self) -> Result<RingOutcome, DoorbellError> {
        loop {
            return match self.socket.send_to(&[], &self.path) {
                Ok(_) => Ok(RingOutcome::Heard),
                Err(err) => match err.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => Ok(RingOutcome::Pending),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                        Ok(RingOutcome::Nobody)
                    }
                    _ => Err(DoorbellError::Ring {
                        path: self.path.clone(),
                        source: err,
                    }),
                },
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_heard_once_and_nobody_is_no_error() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let ringer = Ringer::of(directory.path()).unwrap();
        assert_eq!(ringer.ring().unwrap(), RingOutcome::Nobody);
        let doorbell = Doorbell::bind(directory.path()).unwrap();
        assert!(!doorbell.drain());
        assert_eq!(ringer.ring().unwrap(), RingOutcome::Heard);
        assert_eq!(ringer.ring().unwrap(), RingOutcome::Heard);
        assert!(doorbell.drain());
        assert!(!doorbell.drain());
        drop(doorbell);
        assert_eq!(ringer.ring().unwrap(), RingOutcome::Nobody);
        let doorbell = Doorbell::bind(directory.path()).unwrap();
        assert_eq!(ringer.ring().unwrap(), RingOutcome::Heard);
        assert!(doorbell.drain());
    }

    #[test]
    fn a_full_socket_never_blocks_the_ringer() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let doorbell = Doorbell::bind(directory.path()).unwrap();
        let ringer = Ringer::of(directory.path()).unwrap();
        let filled = (0..100_000).any(|_| ringer.ring().unwrap() == RingOutcome::Pending);
        assert!(filled, "the socket has a bounded queue");
        assert!(doorbell.drain());
    }
}
