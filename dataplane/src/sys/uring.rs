//! A ring of io_uring that receives from many sockets into one set of buffers.
//!
//! In: sockets to receive from, descriptors to wait for. Out: [`Completion`]s, one at a time, with the
//! bytes that came. A receive stays armed and takes a buffer of the ring only when bytes are there, so
//! an idle socket holds none. Invariants: a buffer belongs either to the kernel, from when it is
//! provided until a completion names it, or to this side, from then until the next completion is
//! asked for; the memory of the buffers is given back only when no request is under way.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use io_uring::types::{BufRingEntry, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Size of a buffer, and so the most one completion brings.
pub const BUFFER_BYTES: usize = BUFFER_LENGTH as usize;
const BUFFER_LENGTH: u32 = 8 * 1024;
/// Number of buffers, a power of two. They are lent for the time it takes to look at a completion,
/// so what counts is how much the kernel may receive between two looks.
const BUFFERS: u16 = 256;
const GROUP: u16 = 0;
/// Requests handed to the kernel at once; more wait on this side.
const SUBMISSIONS: u32 = 256;
/// Completions that fit at once; the kernel keeps what does not.
const COMPLETIONS: u32 = 4096;
/// The key of what nobody waits for.
const NOBODY: u64 = u64::MAX;
/// Marks the completion of taking a request back, in the request's key. Keys of users are below.
const TAKING_BACK: u64 = 1 << 63;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel refused it altogether.
    #[error("{}", setup_words(.0))]
    Setup(io::Error),
    /// It lacks a property or an operation.
    #[error("this kernel's io_uring has no {0} (Linux 6.1 has all that is needed)")]
    Lacks(&'static str),
    /// No memory for the buffers.
    #[error("no memory for the buffers of io_uring")]
    Memory(#[source] Errno),
    /// The buffers were refused.
    #[error("io_uring takes no buffers (Linux 6.1 does)")]
    Buffers(#[source] io::Error),
    /// The trial went wrong.
    #[error("io_uring was tried and {0}")]
    Trial(String),
}

fn setup_words(err: &io::Error) -> String {
    match Errno::from_io_error(err) {
        Some(Errno::PERM | Errno::ACCESS) => {
            "io_uring is not permitted (kernel.io_uring_disabled, a seccomp filter or a security module)"
                .to_owned()
        }
        Some(Errno::NOSYS) => "this kernel has no io_uring".to_owned(),
        Some(Errno::INVAL) => "this kernel's io_uring is older than Linux 6.1".to_owned(),
        _ => format!("io_uring can't be set up: {err}"),
    }
}

/// The buffers and the queue by which they are provided, one mapping: first the queue, a page, then
/// the bytes.
#[derive(Debug)]
struct Buffers {
    start: NonNull<u8>,
    tail: u16,
}

const QUEUE_BYTES: usize = BUFFERS as usize * size_of::<BufRingEntry>();
const MAPPED_BYTES: usize = QUEUE_BYTES + BUFFERS as usize * BUFFER_BYTES;
const _: () = assert!(QUEUE_BYTES == 4096 && BUFFERS.is_power_of_two());

impl Buffers {
    fn new() -> Result<Self, Errno> {
        // SAFETY: a null hint lets the kernel choose the place, so no existing mapping is touched.
        let start = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                MAPPED_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, tail: 0 })
    }

    fn offset(id: u16) -> usize {
        QUEUE_BYTES + usize::from(id % BUFFERS) * BUFFER_BYTES
    }

    /// Gives a buffer to the kernel.
    fn provide(&mut self, id: u16) {
        let place = usize::from(self.tail % BUFFERS);
        // SAFETY: below `BUFFERS`, so inside of the mapping's first page, aligned for the entry.
        let entry = unsafe { self.start.cast::<BufRingEntry>().add(place) };
        // SAFETY: inside of the mapping.
        let bytes = unsafe { self.start.add(Self::offset(id)) };
        // SAFETY: the kernel reads entries below the tail only, and of this one it has finished,
        // for there are never more provided than there are places. Nobody else has a reference
        // into the queue. Any bytes are a valid entry. The tail, which shares memory with the first
        // entry, is in a field that these setters leave alone.
        let entry = unsafe { &mut *entry.as_ptr() };
        entry.set_addr(bytes.as_ptr() as u64);
        entry.set_len(BUFFER_LENGTH);
        entry.set_bid(id);
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the start of the queue, which is mapped.
        let tail = unsafe { BufRingEntry::tail(self.start.cast().as_ptr()) };
        // SAFETY: aligned for a u16, mapped as long as `self`, and only used as an atomic.
        let tail = unsafe { AtomicU16::from_ptr(tail.cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// The first bytes of a buffer that was taken back from the kernel.
    fn bytes(&self, id: u16, length: usize) -> &[u8] {
        // SAFETY: inside of the mapping.
        let start = unsafe { self.start.add(Self::offset(id)) };
        // SAFETY: at most one buffer's length, which is mapped and was zeroed by the kernel at first.
        // Nobody writes there while the borrow lasts: the caller holds a buffer that a completion
        // has named, and providing it again needs `&mut self`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), length.min(BUFFER_BYTES)) }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped; borrows of it can't outlive `self`, and the ring that
        // might write there is gone or idle (`Ring` sees to that).
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), MAPPED_BYTES) };
        debug_assert!(unmapped.is_ok(), "the range was mapped by us");
    }
}

/// What has come of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// That many bytes were received; [`Ring::bytes`] has them until the next completion is asked for.
    Received,
    /// The peer has ended its stream.
    Ended,
    /// The descriptor waited for is ready.
    Ready,
    /// It failed.
    Failed(Errno),
    /// It was to be taken back, and was just being worked at: it goes on unless that is asked for
    /// again.
    Missed,
}

/// An answer of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The key of the request.
    pub key: u64,
    /// What has come of it.
    pub outcome: Outcome,
    /// The request is over; there will be no other completion of it.
    pub over: bool,
}

/// A ring, used by the thread that has made it. When a ring goes, the kernel interrupts what its thread
/// waits for just then.
pub struct Ring {
    ring: IoUring,
    /// After the ring, so that it outlives it. `None` only while dropping.
    buffers: Option<Buffers>,
    /// Requests that did not fit the queue.
    waiting: VecDeque<squeue::Entry>,
    /// Completions taken from the kernel and not asked for yet.
    taken: VecDeque<cqueue::Entry>,
    /// The buffer of the last completion and how much is in it.
    current: Option<(u16, usize)>,
    /// Requests that will have a completion.
    under_way: usize,
}

impl Ring {
    /// A ring for the calling thread.
    ///
    /// # Errors
    /// What the kernel does not allow or lacks.
    pub fn new() -> Result<Self, RingError> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)
            .map_err(RingError::Setup)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(RingError::Lacks("wait with a deadline"));
        }
        let mut probe = Probe::new();
        ring.submitter()
            .register_probe(&mut probe)
            .map_err(RingError::Setup)?;
        for (code, name) in [
            (opcode::RecvMulti::CODE, "receive"),
            (opcode::PollAdd::CODE, "poll"),
            (opcode::AsyncCancel::CODE, "cancel"),
        ] {
            if !probe.is_supported(code) {
                return Err(RingError::Lacks(name));
            }
        }
        let mut buffers = Buffers::new().map_err(RingError::Memory)?;
        // SAFETY: page-aligned, mapped, and kept until the ring is gone or no request is under way.
        let registered = unsafe {
            ring.submitter().register_buf_ring_with_flags(
                buffers.start.as_ptr() as u64,
                BUFFERS,
                GROUP,
                0,
            )
        };
        registered.map_err(RingError::Buffers)?;
        for id in 0..BUFFERS {
            buffers.provide(id);
        }
        Ok(Self {
            ring,
            buffers: Some(buffers),
            waiting: VecDeque::new(),
            taken: VecDeque::new(),
            current: None,
            under_way: 0,
        })
    }

    /// Tries all that is needed: kernels of distributions have parts of io_uring that their version
    /// does not promise, and lack others.
    ///
    /// # Errors
    /// What is missing, in words.
    pub fn try_out(&mut self) -> Result<(), RingError> {
        let trial = |what: &str| RingError::Trial(what.to_owned());
        let failed = |errno: Errno| RingError::Trial(format!("failed: {errno}"));
        let (near, far) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(failed)?;
        let next = |ring: &mut Self| {
            for _ in 0..10 {
                if let Some(completion) = ring.pop() {
                    return Ok(completion);
                }
                ring.enter(Some(Duration::from_millis(100)))
                    .map_err(|err| RingError::Trial(format!("failed: {err}")))?;
            }
            Err(trial("does not answer"))
        };
        self.receive(1, near.as_fd());
        // Armed before there is anything, as it will be.
        self.enter(Some(Duration::ZERO))
            .map_err(|err| RingError::Trial(format!("failed: {err}")))?;
        for word in [b"one", b"two"] {
            rustix::io::write(&far, word).map_err(failed)?;
            let came = next(self)?;
            if came.outcome != Outcome::Received || came.over || self.bytes() != word {
                return Err(trial("does not receive more than once by one request"));
            }
        }
        self.cancel(1);
        let end = next(self)?;
        if end.outcome != Outcome::Failed(Errno::CANCELED) || !end.over {
            return Err(trial("does not take a request back"));
        }
        self.poll(2, near.as_fd(), PollFlags::IN);
        drop(far);
        let ready = next(self)?;
        if ready.outcome != Outcome::Ready || !ready.over {
            return Err(trial("does not tell of a ready descriptor"));
        }
        self.receive(3, near.as_fd());
        let end = next(self)?;
        if end.outcome != Outcome::Ended || !end.over {
            return Err(trial("does not tell of the end of a stream"));
        }
        Ok(())
    }

    fn push(&mut self, entry: squeue::Entry) {
        self.under_way += 1;
        self.waiting.push_back(entry);
        self.queue();
    }

    /// Moves requests to the kernel's queue as far as they fit.
    fn queue(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(entry) = self.waiting.front() {
            // SAFETY: no request points to memory of this side; buffers are the ring's own, and a
            // descriptor that was closed too early is an error or another file, never memory.
            if unsafe { queue.push(entry) }.is_err() {
                return;
            }
            self.waiting.pop_front();
        }
    }

    /// Receives from a stream until it ends, fails or is cancelled. The descriptor must stay open
    /// until the completion that is `over`, or what is received is another file's.
    pub fn receive(&mut self, key: u64, stream: BorrowedFd<'_>) {
        let entry = opcode::RecvMulti::new(Fd(stream.as_raw_fd()), GROUP).build();
        self.push(entry.user_data(key));
    }

    /// Tells once when a descriptor is ready, which must stay open until then.
    pub fn poll(&mut self, key: u64, descriptor: BorrowedFd<'_>, events: PollFlags) {
        let entry =
            opcode::PollAdd::new(Fd(descriptor.as_raw_fd()), u32::from(events.bits())).build();
        self.push(entry.user_data(key));
    }

    /// Takes a request back. It is over when its own completion says so; [`Outcome::Missed`] may
    /// come before.
    pub fn cancel(&mut self, key: u64) {
        let cancel = opcode::AsyncCancel::new(key).build();
        self.push(cancel.user_data(key | TAKING_BACK));
    }

    /// Hands over what was asked for and waits for a completion; without a deadline until there is one.
    /// With more requests than can be handed over at once it does not wait: call it again.
    ///
    /// # Errors
    /// The ring does not work any more.
    pub fn enter(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.queue();
        // What does not fit is handed over next; only then may the thread sleep.
        let timeout = match self.waiting.is_empty() {
            true => timeout,
            false => Some(Duration::ZERO),
        };
        let timeout = timeout.map(|it| Timespec::new().sec(it.as_secs()).nsec(it.subsec_nanos()));
        let arguments = match &timeout {
            Some(timeout) => SubmitArgs::new().timespec(timeout),
            None => SubmitArgs::new(),
        };
        let want = usize::from(self.taken.is_empty());
        let answer = self.ring.submitter().submit_with_args(want, &arguments);
        let answer = answer.map_err(|err| (Errno::from_io_error(&err), err));
        match answer {
            // Busy: there are completions to take first.
            Ok(_) | Err((Some(Errno::TIME | Errno::INTR | Errno::BUSY), _)) => {}
            Err((Some(Errno::AGAIN | Errno::NOMEM), _)) => {
                // No memory for requests just now: what was handed over stays in the queue.
                std::thread::sleep(Duration::from_millis(1));
            }
            Err((_, err)) => return Err(err),
        }
        self.taken.extend(self.ring.completion());
        Ok(())
    }

    /// The next completion of what was waited for. The buffer of the one before goes back.
    pub fn pop(&mut self) -> Option<Completion> {
        self.give_back();
        while let Some(entry) = self.taken.pop_front() {
            let over = !cqueue::more(entry.flags());
            self.under_way -= usize::from(over);
            let buffer = cqueue::buffer_select(entry.flags());
            let length = usize::try_from(entry.result()).unwrap_or(0);
            self.current = buffer.map(|id| (id, length));
            let key = entry.user_data();
            let marked = key & TAKING_BACK != 0;
            if key == NOBODY || marked && entry.result() >= 0 {
                self.give_back();
                continue;
            }
            if marked {
                return Some(Completion {
                    key: key & !TAKING_BACK,
                    outcome: Outcome::Missed,
                    over: false,
                });
            }
            let outcome = match entry.result() {
                failed @ ..0 => Outcome::Failed(Errno::from_raw_os_error(-failed)),
                0 => Outcome::Ended,
                _ if buffer.is_some() => Outcome::Received,
                _ => Outcome::Ready,
            };
            return Some(Completion { key, outcome, over });
        }
        None
    }

    fn give_back(&mut self) {
        if let (Some((id, _)), Some(buffers)) = (self.current.take(), &mut self.buffers) {
            buffers.provide(id);
        }
    }

    /// What the last completion has brought.
    pub fn bytes(&self) -> &[u8] {
        match (&self.buffers, self.current) {
            (Some(buffers), Some((id, length))) => buffers.bytes(id, length),
            _ => &[],
        }
    }

    /// Requests that will have a completion yet.
    pub fn under_way(&self) -> usize {
        self.under_way
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.under_way > 0 {
            // The kernel takes them back some time after the ring is closed. Until then it may write
            // to their buffers, so the memory is left to it.
            std::mem::forget(self.buffers.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn pair() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    /// None where io_uring is not to be had; the words of it are tested with the relay.
    fn ring() -> Option<Ring> {
        Ring::new().ok()
    }

    fn next(ring: &mut Ring) -> Completion {
        for _ in 0..100 {
            if let Some(completion) = ring.pop() {
                return completion;
            }
            ring.enter(Some(Duration::from_millis(100))).unwrap();
        }
        panic!("no completion");
    }

    #[test]
    fn what_new_gives_stands_the_trial() {
        let Some(mut ring) = ring() else { return };
        ring.try_out().unwrap();
        ring.try_out().unwrap();
    }

    #[test]
    fn a_deadline_ends_a_wait_for_nothing() {
        let Some(mut ring) = ring() else { return };
        let start = std::time::Instant::now();
        ring.enter(Some(Duration::from_millis(20))).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20));
        assert_eq!(ring.pop(), None);
    }

    #[test]
    fn more_than_all_buffers_hold_arrives_whole_and_in_order() {
        let Some(mut ring) = ring() else { return };
        let (near, far) = pair();
        let total = 3 * usize::from(BUFFERS) * BUFFER_BYTES + 5;
        let writer = std::thread::spawn(move || {
            let bytes: Vec<u8> = (0..total)
                .map(|at| u8::try_from(at % 251).unwrap())
                .collect();
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                match rustix::io::write(&far, rest) {
                    Ok(taken) => rest = &rest[taken..],
                    Err(Errno::AGAIN) => std::thread::sleep(Duration::from_micros(200)),
                    Err(errno) => panic!("{errno}"),
                }
            }
        });
        ring.receive(7, near.as_fd());
        let mut got = 0;
        loop {
            let came = next(&mut ring);
            assert_eq!(came.key, 7);
            match came.outcome {
                Outcome::Received => {
                    for byte in ring.bytes() {
                        assert_eq!(usize::from(*byte), got % 251, "at {got}");
                        got += 1;
                    }
                }
                Outcome::Ended => break,
                Outcome::Failed(Errno::NOBUFS) => {}
                other => panic!("{other:?}"),
            }
            if came.over {
                ring.receive(7, near.as_fd());
            }
        }
        writer.join().unwrap();
        assert_eq!((got, ring.under_way()), (total, 0));
    }

    #[test]
    fn more_requests_than_the_queue_holds_are_all_answered() {
        let Some(mut ring) = ring() else { return };
        let pairs: Vec<_> = (0..SUBMISSIONS as u64 * 3).map(|_| pair()).collect();
        for (key, (near, _)) in pairs.iter().enumerate() {
            ring.receive(key as u64, near.as_fd());
        }
        for (_, far) in &pairs {
            rustix::io::write(far, b"x").unwrap();
        }
        let mut seen = vec![false; pairs.len()];
        for _ in 0..pairs.len() {
            let came = next(&mut ring);
            assert_eq!((came.outcome, ring.bytes()), (Outcome::Received, &b"x"[..]));
            seen[usize::try_from(came.key).unwrap()] = true;
        }
        assert!(seen.iter().all(|it| *it));
        assert_eq!(ring.under_way(), pairs.len());
        for key in 0..pairs.len() {
            ring.cancel(key as u64);
        }
        for _ in 0..pairs.len() {
            let end = next(&mut ring);
            assert_eq!(
                (end.outcome, end.over),
                (Outcome::Failed(Errno::CANCELED), true)
            );
        }
        while ring.under_way() > 0 {
            ring.enter(Some(Duration::from_millis(100))).unwrap();
            assert_eq!(ring.pop(), None);
        }
    }

    #[test]
    fn requests_that_do_not_fit_at_once_are_handed_over_before_anything_is_waited_for() {
        let Some(mut ring) = ring() else { return };
        let silent: Vec<_> = (0..SUBMISSIONS as u64 * 3).map(|_| pair()).collect();
        for (key, (near, _)) in silent.iter().enumerate() {
            ring.poll(key as u64, near.as_fd(), PollFlags::IN);
        }
        let (ready, far) = pair();
        rustix::io::write(&far, b"x").unwrap();
        ring.poll(99_999, ready.as_fd(), PollFlags::IN);
        let wait = Duration::from_secs(10);
        let start = std::time::Instant::now();
        let came = loop {
            if let Some(came) = ring.pop() {
                break came;
            }
            ring.enter(Some(wait)).unwrap();
        };
        assert_eq!((came.key, came.outcome), (99_999, Outcome::Ready));
        // Not even one wait for those that have nothing to tell has come to its end.
        assert!(start.elapsed() < wait, "{:?}", start.elapsed());
    }

    #[test]
    fn a_ring_with_requests_under_way_can_be_dropped() {
        let Some(mut ring) = ring() else { return };
        let (near, _far) = pair();
        ring.receive(1, near.as_fd());
        ring.enter(Some(Duration::ZERO)).unwrap();
        drop(ring);
    }
}
