//! SIGTERM, SIGINT and SIGHUP as a readable descriptor.
//!
//! Invariant: [`block`] runs in `main` before any thread exists, so that every thread inherits the
//! mask and the signals reach the descriptor only.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// What the process was asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM: let sessions end, then exit.
    Drain,
    /// SIGINT: exit at once.
    Stop,
    /// SIGHUP: a terminal was closed, or somebody wants the configuration read again. Nothing is done.
    Reload,
}

/// The descriptor that becomes readable when a signal has arrived.
#[derive(Debug)]
pub struct Signals(SignalFd);

/// Blocks SIGTERM, SIGINT and SIGHUP for this thread and those it starts, and returns their descriptor.
///
/// # Errors
/// The kernel's answer.
pub fn block() -> Result<Signals, Errno> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGINT);
    set.add(Signal::SIGHUP);
    set.thread_block()?;
    SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map(Signals)
}

impl Signals {
    /// The next waiting signal, if there is one.
    pub fn take(&mut self) -> Option<Request> {
        let info = self.0.read_signal().ok().flatten()?;
        match i32::try_from(info.ssi_signo) {
            Ok(number) if number == Signal::SIGINT as i32 => Some(Request::Stop),
            Ok(number) if number == Signal::SIGHUP as i32 => Some(Request::Reload),
            _ => Some(Request::Drain),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}
