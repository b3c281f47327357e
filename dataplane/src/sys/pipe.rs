//! Pipes as kernel-side buffers, filled and emptied by splice(2).
//!
//! In: sockets. Out: moved bytes. Invariant: a [`Pipe`] knows how many bytes it holds; both ends
//! close with it.
//!
//! SIGPIPE stays ignored (the Rust runtime does that before `main`), so splicing into a closed
//! socket answers `EPIPE`.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::pipe::{self, PipeFlags, SpliceFlags};

/// Asked size of a pipe, in bytes. 256 KiB are 64 slots; a slot takes one fragment of a socket
/// buffer whatever its length, so the default of 16 slots moves as little as 23 KiB of
/// MTU-sized fragments per call.
pub const PIPE_BYTES: usize = 256 * 1024;

/// One pipe and the number of bytes in it.
#[derive(Debug)]
pub struct Pipe {
    reader: OwnedFd,
    writer: OwnedFd,
    held: u32,
}

impl Pipe {
    /// Makes an empty pipe. The kernel may give less room than asked (pipe(7):
    /// `pipe-user-pages-soft`); that costs speed, never correctness.
    ///
    /// # Errors
    /// The kernel's answer (`EMFILE`, `ENFILE`).
    pub fn new() -> Result<Self, Errno> {
        let (reader, writer) = pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let _ = pipe::fcntl_setpipe_size(&writer, PIPE_BYTES);
        Ok(Self {
            reader,
            writer,
            held: 0,
        })
    }

    /// Bytes inside.
    pub fn held(&self) -> usize {
        self.held as usize
    }

    /// Moves bytes from a socket into this pipe, at most [`PIPE_BYTES`].
    ///
    /// `EAGAIN` may mean that there is no room unless the pipe is empty: call it only then. It does
    /// not mean that nothing waits, for the kernel stops at an urgent byte, and answers with `EAGAIN`
    /// when that is the next. 0 is no proof of the end either: that is the answer when the stream
    /// ends somewhere behind the urgent byte (net/ipv4/tcp.c, `tcp_splice_read`). Only a read may be
    /// believed about both.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn fill(&mut self, source: impl AsFd) -> Result<usize, Errno> {
        let moved = pipe::splice(
            source,
            None,
            &self.writer,
            None,
            PIPE_BYTES,
            SpliceFlags::NONBLOCK | SpliceFlags::MOVE,
        )?;
        self.held += u32::try_from(moved).unwrap_or(u32::MAX);
        Ok(moved)
    }

    /// Moves bytes from this pipe into a socket.
    ///
    /// # Errors
    /// The kernel's answer; `EAGAIN` means that the socket is full, because the pipe is not empty.
    pub fn drain(&mut self, sink: impl AsFd) -> Result<usize, Errno> {
        let moved = pipe::splice(
            &self.reader,
            None,
            sink,
            None,
            self.held as usize,
            SpliceFlags::NONBLOCK | SpliceFlags::MOVE,
        )?;
        let moved_out = u32::try_from(moved).unwrap_or(u32::MAX);
        self.held = self.held.saturating_sub(moved_out);
        Ok(moved)
    }
}
