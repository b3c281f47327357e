//! One direction of a session: the adaptive copy/splice engine.
//!
//! In: two sockets with what is known of their readiness. Out: bytes moved from source to sink,
//! the end of the stream passed on as a half-close. Invariants, on which integrity rests:
//!
//! 1. Nothing is read while something is held. So at most one buffer (64 KiB) or one pipe
//!    (256 KiB) is held per direction, and `EAGAIN` from filling a pipe never means that the pipe is
//!    full: it is empty, so it is the source that has nothing, or nothing but urgent bytes, to
//!    splice. (A prototype took "pipe full" for "no bytes", and hung: with edge-triggered events the
//!    bytes are not announced twice.)
//! 2. Readiness is cleared only by proof: `EAGAIN` to a read; or, from a socket for which nothing but
//!    plain bytes has been announced, `EAGAIN` to a splice or a short read (epoll(7)). An urgent byte
//!    that nobody has read yet is announced with every event, so one that comes after such a proof
//!    is, too.
//! 3. The end of a stream is believed only from a read. In front of urgent bytes splice answers
//!    `EAGAIN`, or 0 when the stream ends behind them.
//! 4. A pipe returns to the pool only when it is empty.
//!
//! A direction can also be fed: while its session is on a [`ring`](super::ring), bytes are read there
//! and put in here, and its source is never readable to this file.

use std::os::fd::OwnedFd;

use rustix::io::Errno;

use crate::sys::pipe::Pipe;
use crate::sys::socket;

/// Size of the shared buffer of a worker, and so the most one read moves by copying. 64 KiB is
/// the largest burst a veth delivers at once (one GSO packet).
pub const BUFFER_BYTES: usize = 64 * 1024;
/// A read of this size or more means bulk: the direction goes over to splice. Below it two more
/// system calls cost more than copying does (measured with the prototype at 32 KiB).
pub(super) const SPLICE_FROM: usize = 32 * 1024;
/// A splicing turn that moved less than this counts as small ...
pub(super) const SMALL_TURN: usize = 16 * 1024;
/// ... and this many small turns in a row send the direction back to copying.
const SMALL_TURNS: u8 = 3;
/// Bytes one direction may move before other sessions get their turn.
const TURN_BYTES: usize = 512 * 1024;
/// Empty pipes kept by a worker for the next session in need.
const POOLED_PIPES: usize = 32;

/// One socket of a session and what is known of it.
#[derive(Debug)]
pub struct Side {
    /// The socket.
    pub fd: OwnedFd,
    /// A read may find something.
    pub readable: bool,
    /// A write may find room.
    pub writable: bool,
    /// An end, an error or urgent bytes were announced: only `EAGAIN` to a read proves that it is
    /// empty.
    pub thorough: bool,
}

impl Side {
    /// A socket of which nothing is known yet.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            readable: false,
            writable: false,
            thorough: false,
        }
    }
}

/// What a direction is up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Bytes flow.
    Open,
    /// The source has ended; what is held goes out, then the sink is told.
    Ending,
    /// The sink was told; nothing more happens here.
    Done,
    /// The sink takes nothing any more.
    Broken,
}

#[derive(Debug)]
struct Chunk {
    bytes: Vec<u8>,
    start: usize,
}

#[derive(Debug)]
enum Held {
    Chunk(Box<Chunk>),
    Pipe(Pipe),
}

/// One direction of a session.
#[derive(Debug)]
pub struct Flow {
    held: Option<Held>,
    /// What the direction is up to.
    pub stage: Stage,
    splice: bool,
    no_splice: bool,
    small_turns: u8,
}

/// What a worker lends to whichever direction it is serving.
#[derive(Debug)]
pub struct Tools {
    buffer: Box<[u8]>,
    pipes: Vec<Pipe>,
    splice: bool,
}

impl Tools {
    /// Tools with splice, or without for comparison.
    pub fn new(splice: bool) -> Self {
        Self {
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            pipes: Vec::new(),
            splice,
        }
    }

    fn take_pipe(&mut self) -> Option<Pipe> {
        self.pipes.pop().or_else(|| Pipe::new().ok())
    }

    fn give_pipe(&mut self, pipe: Pipe) {
        if pipe.held() == 0 && self.pipes.len() < POOLED_PIPES {
            self.pipes.push(pipe);
        }
    }

    /// Closes the pooled pipes, to give their descriptors back when these are short.
    pub fn drop_pipes(&mut self) -> usize {
        std::mem::take(&mut self.pipes).len()
    }
}

/// How a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TurnEnd {
    /// Waiting for an event of either socket.
    Blocked,
    /// Its share is used up; there may be more.
    Again,
    /// This direction is over.
    Over,
}

/// Which socket failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Reading failed: the source was reset or timed out.
    Source(Errno),
    /// Writing failed: the sink was reset or closed.
    Sink(Errno),
}

impl Default for Flow {
    fn default() -> Self {
        Self {
            held: None,
            stage: Stage::Open,
            splice: false,
            no_splice: false,
            small_turns: 0,
        }
    }
}

impl Flow {
    /// The sink is gone: what is held is dropped with it.
    pub fn break_off(&mut self) {
        self.held = None;
        self.stage = Stage::Broken;
    }

    /// Moves bytes until a socket blocks, the share of this turn is used up or the stream ends.
    /// `moved` grows by the bytes the sink took. When the session is not `clean` any more (the
    /// opposite direction broke), the end of the source breaks this direction too: the sink is to
    /// see a reset, not an end.
    ///
    /// # Errors
    /// Which of the two sockets failed and how.
    pub fn pump(
        &mut self,
        source: &mut Side,
        sink: &mut Side,
        tools: &mut Tools,
        moved: &mut u64,
        clean: bool,
    ) -> Result<TurnEnd, Fault> {
        let mut taken = 0;
        loop {
            if self.held.is_some() && !self.flush(sink, tools, moved)? {
                return Ok(TurnEnd::Blocked);
            }
            match self.stage {
                Stage::Open => {}
                Stage::Ending if !clean => {
                    self.stage = Stage::Broken;
                    return Ok(TurnEnd::Over);
                }
                Stage::Ending => {
                    socket::finish_sending(&sink.fd).map_err(Fault::Sink)?;
                    self.stage = Stage::Done;
                    return Ok(TurnEnd::Over);
                }
                Stage::Done | Stage::Broken => return Ok(TurnEnd::Over),
            }
            if !source.readable || !sink.writable {
                return Ok(TurnEnd::Blocked);
            }
            if taken >= TURN_BYTES {
                self.small_turns = 0;
                return Ok(TurnEnd::Again);
            }
            taken += if self.splice {
                self.fill(source, tools, taken)?
            } else {
                self.copy(source, sink, tools, moved)?
            };
        }
    }

    /// Sends what is held. True when nothing is held afterwards.
    fn flush(
        &mut self,
        sink: &mut Side,
        tools: &mut Tools,
        moved: &mut u64,
    ) -> Result<bool, Fault> {
        while sink.writable {
            let sent = match self.held.as_mut() {
                None => return Ok(true),
                Some(Held::Chunk(chunk)) => {
                    socket::write(&sink.fd, chunk.bytes.get(chunk.start..).unwrap_or_default())
                }
                Some(Held::Pipe(pipe)) => pipe.drain(&sink.fd),
            };
            let sent = match sent {
                Ok(sent) => sent,
                Err(Errno::AGAIN) => {
                    sink.writable = false;
                    break;
                }
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Fault::Sink(errno)),
            };
            *moved += sent as u64;
            match self.held.take() {
                Some(Held::Chunk(mut chunk)) => {
                    chunk.start += sent;
                    if chunk.start < chunk.bytes.len() {
                        self.held = Some(Held::Chunk(chunk));
                    }
                }
                Some(Held::Pipe(pipe)) if pipe.held() > 0 => {
                    if sent == 0 {
                        // The pipe's end is open, so this can't be; fail rather than spin.
                        return Err(Fault::Sink(Errno::IO));
                    }
                    self.held = Some(Held::Pipe(pipe));
                }
                Some(Held::Pipe(pipe)) => tools.give_pipe(pipe),
                None => {}
            }
        }
        Ok(self.held.is_none())
    }

    /// Reads once and writes at once; what the sink does not take is held.
    fn copy(
        &mut self,
        source: &mut Side,
        sink: &Side,
        tools: &mut Tools,
        moved: &mut u64,
    ) -> Result<usize, Fault> {
        let read = match socket::read(&source.fd, &mut tools.buffer) {
            Ok(0) => {
                self.stage = Stage::Ending;
                return Ok(0);
            }
            Ok(read) => read,
            Err(Errno::AGAIN) => {
                // Whatever was announced has been read, and what comes now is announced anew. Were
                // this kept, each time the source has nothing would end the use of splice.
                source.readable = false;
                source.thorough = false;
                return Ok(0);
            }
            Err(Errno::INTR) => return Ok(0),
            Err(errno) => return Err(Fault::Source(errno)),
        };
        if read < BUFFER_BYTES && !source.thorough {
            source.readable = false;
        }
        if read >= SPLICE_FROM && tools.splice && !self.no_splice {
            self.splice = true;
            self.small_turns = 0;
        }
        // A short write is no proof that the sink is full (a signal may have cut it), so `writable`
        // stays for the flush to clear.
        self.put(tools.buffer.get(..read).unwrap_or_default(), sink, moved)?;
        Ok(read)
    }

    /// Moves bytes from the source into a pipe, which the next round flushes.
    fn fill(&mut self, source: &mut Side, tools: &mut Tools, taken: usize) -> Result<usize, Fault> {
        let Some(mut pipe) = tools.take_pipe() else {
            // No descriptors: copying needs none.
            self.splice = false;
            return Ok(0);
        };
        match pipe.fill(&source.fd) {
            Ok(0) => {
                // The end of the stream, or urgent bytes before it: reading tells which.
                self.splice = false;
                source.thorough = true;
                tools.give_pipe(pipe);
                Ok(0)
            }
            Ok(filled) => {
                self.held = Some(Held::Pipe(pipe));
                Ok(filled)
            }
            Err(Errno::AGAIN) if source.thorough => {
                // No bytes or urgent ones: reading tells which.
                self.splice = false;
                tools.give_pipe(pipe);
                Ok(0)
            }
            Err(Errno::AGAIN) => {
                source.readable = false;
                tools.give_pipe(pipe);
                if taken < SMALL_TURN {
                    self.small_turns += 1;
                    self.splice = self.small_turns < SMALL_TURNS;
                } else {
                    self.small_turns = 0;
                }
                Ok(0)
            }
            Err(Errno::INTR) => {
                tools.give_pipe(pipe);
                Ok(0)
            }
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                self.splice = false;
                self.no_splice = true;
                tools.give_pipe(pipe);
                Ok(0)
            }
            Err(errno) => Err(Fault::Source(errno)),
        }
    }

    /// Whether this direction uses splice at the moment.
    pub fn splices(&self) -> bool {
        self.splice
    }

    /// Whether bytes wait for the sink.
    pub fn holds(&self) -> bool {
        self.held.is_some()
    }

    /// How many.
    pub fn held_bytes(&self) -> usize {
        match &self.held {
            None => 0,
            Some(Held::Chunk(chunk)) => chunk.bytes.len() - chunk.start,
            Some(Held::Pipe(pipe)) => pipe.held(),
        }
    }

    /// Writes bytes at once that were read elsewhere; what the sink does not take is held, behind
    /// what is held already. A sink that is gone takes nothing and bytes for it are dropped.
    ///
    /// # Errors
    /// The sink failed.
    pub fn put(&mut self, bytes: &[u8], sink: &Side, moved: &mut u64) -> Result<(), Fault> {
        if self.stage != Stage::Open {
            return Ok(());
        }
        if self.held.is_some() {
            self.hold(bytes);
            return Ok(());
        }
        let sent = match socket::write(&sink.fd, bytes) {
            Ok(sent) => sent,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(Fault::Sink(errno)),
        };
        *moved += sent as u64;
        self.hold(bytes.get(sent..).unwrap_or_default());
        Ok(())
    }

    /// Holds bytes for the sink, behind what is held already.
    pub fn hold(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match &mut self.held {
            Some(Held::Chunk(chunk)) => chunk.bytes.extend_from_slice(bytes),
            // Nothing is read elsewhere while a pipe holds bytes (invariant 1).
            Some(Held::Pipe(_)) => self.break_off(),
            None => {
                self.held = Some(Held::Chunk(Box::new(Chunk {
                    bytes: bytes.to_vec(),
                    start: 0,
                })));
            }
        }
    }
}
