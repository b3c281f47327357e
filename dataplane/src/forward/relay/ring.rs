//! The engine on io_uring: sessions of messages.
//!
//! In: connected pairs of sockets. Out: forwarded bytes, and sessions that are no longer of messages.
//! Two receives stay armed per session; what arrives is written to the other side at once, from the
//! ring's buffer, so that a message costs one system call and its share of a wait. Nothing is kept
//! here: a session whose sink does not take all, that moves bulk, or one side of which has ended or is
//! dead, is taken off the ring and left to the [`adaptive`](super::adaptive) engine, which knows about
//! backpressure and moves bulk for a third of the CPU time. That engine gives back sessions of
//! messages.
//!
//! Invariants: a session leaves, and its sockets are closed, only when the kernel has answered all
//! requests for them; bytes go out in the order in which they were received. A session that leaves
//! takes along what the kernel has received for it, at most all buffers of the ring (2 MiB) and
//! usually far less.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::Registry;
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::flow::{SPLICE_FROM, Tools};
use super::session::{End, Session, Timed, Verdict};
use super::slab::Slab;
use super::wheel::{Entry, Wheel};
use crate::sys::socket;
use crate::sys::uring::{BUFFER_BYTES, Completion, Outcome, Ring, RingError};

/// So many full buffers in a row are bulk.
const BULK_BUFFERS: usize = SPLICE_FROM / BUFFER_BYTES;
/// How long the kernel may take to answer all requests when the thread ends.
const STOPPING: Duration = Duration::from_secs(1);

/// The key of the worker's epoll: a number that no request of a session has.
const BELL: u64 = 3;

/// What is asked of the ring for a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Receive(End),
    Connect,
}

const REQUESTS: [Request; 3] = [
    Request::Receive(End::Client),
    Request::Receive(End::Container),
    Request::Connect,
];

impl Request {
    fn number(self) -> u8 {
        match self {
            Self::Receive(End::Client) => 0,
            Self::Receive(End::Container) => 1,
            Self::Connect => 2,
        }
    }

    fn bit(self) -> u8 {
        1 << self.number()
    }

    fn key(self, index: u32) -> u64 {
        u64::from(index) << 2 | u64::from(self.number())
    }

    fn of(key: u64) -> Option<(u32, Self)> {
        let request = REQUESTS.get(usize::try_from(key & 3).ok()?)?;
        Some((u32::try_from(key >> 2).ok()?, *request))
    }
}

#[derive(Debug)]
struct RingSession {
    /// `None` when it is over.
    session: Option<Session>,
    /// The sockets of one that is over, until the kernel has answered all requests.
    kept: Option<(OwnedFd, OwnedFd)>,
    /// Bits of the requests under way.
    asked: u8,
    leaving: bool,
    /// Full buffers in a row, from client and container.
    full: [u8; 2],
}

/// Sessions on a ring.
#[derive(Debug)]
pub struct RingEngine {
    ring: Ring,
    sessions: Slab<RingSession>,
    ended: usize,
    wheel: Wheel,
    leavers: Vec<Session>,
    /// The ring waits for the worker's epoll, or has seen it become ready.
    bell_hung: bool,
    bell_rung: bool,
}

impl RingEngine {
    /// No sessions yet, for the calling thread.
    ///
    /// # Errors
    /// What of io_uring is missing or not allowed.
    pub fn new() -> Result<Self, RingError> {
        let mut ring = Ring::new()?;
        ring.try_out()?;
        Ok(Self {
            ring,
            sessions: Slab::default(),
            ended: 0,
            wheel: Wheel::default(),
            leavers: Vec::new(),
            bell_hung: false,
            bell_rung: false,
        })
    }

    /// Hands all requests over and waits for an answer, or for the worker's epoll.
    ///
    /// # Errors
    /// The ring does not work any more.
    pub fn enter(&mut self, epoll: &Registry, timeout: Option<Duration>) -> io::Result<()> {
        if !self.bell_hung {
            // Once and again, not for good: each time it looks whether anything was left.
            self.bell_hung = true;
            self.ring.poll(BELL, epoll.as_fd(), PollFlags::IN);
        }
        self.ring.enter(timeout)
    }

    /// Whether the worker's epoll has become ready.
    pub fn take_bell(&mut self) -> bool {
        std::mem::take(&mut self.bell_rung)
    }

    /// Sessions that must go on elsewhere.
    pub fn take_leavers(&mut self) -> Vec<Session> {
        std::mem::take(&mut self.leavers)
    }

    /// Forwards for a session whose connection to the container is under way.
    pub fn start(&mut self, session: Session, now: u32) {
        let index = self.insert(session, now);
        for request in REQUESTS {
            self.ask(index, request);
        }
    }

    /// Forwards for one that has been elsewhere.
    pub fn adopt(&mut self, session: Session, now: u32) {
        let index = self.insert(session, now);
        self.ask(index, Request::Receive(End::Client));
        self.ask(index, Request::Receive(End::Container));
    }

    fn insert(&mut self, mut session: Session, now: u32) -> u32 {
        session.enter_ring();
        let (index, generation) = self.sessions.vacant();
        let due = session.first_due(now);
        self.wheel.insert(due, Entry { index, generation });
        self.sessions.insert(RingSession {
            session: Some(session),
            kept: None,
            asked: 0,
            leaving: false,
            full: [0; 2],
        })
    }

    fn ask(&mut self, index: u32, request: Request) {
        let Some(place) = self.sessions.get_mut(index) else {
            return;
        };
        let Some(session) = &place.session else {
            return;
        };
        place.asked |= request.bit();
        let (client, container) = session.descriptors();
        let key = request.key(index);
        match request {
            Request::Receive(End::Client) => self.ring.receive(key, client.as_fd()),
            Request::Receive(End::Container) => self.ring.receive(key, container.as_fd()),
            Request::Connect => self.ring.poll(key, container.as_fd(), PollFlags::OUT),
        }
    }

    /// Takes in all answers.
    pub fn serve(&mut self, tools: &mut Tools, now: u32) {
        while let Some(answer) = self.ring.pop() {
            if answer.key == BELL {
                if answer.outcome != Outcome::Missed {
                    self.bell_hung = false;
                    self.bell_rung = true;
                }
            } else if let Some((index, request)) = Request::of(answer.key) {
                self.answered(index, request, answer, tools, now);
            }
        }
    }

    fn answered(
        &mut self,
        index: u32,
        request: Request,
        answer: Completion,
        tools: &mut Tools,
        now: u32,
    ) {
        let Some(place) = self.sessions.get_mut(index) else {
            return;
        };
        if answer.over {
            place.asked &= !request.bit();
        }
        if answer.outcome == Outcome::Missed {
            // Its place may have been given to another session since.
            let unwanted = place.leaving || place.session.is_none();
            if unwanted && place.asked & request.bit() != 0 {
                self.ring.cancel(answer.key);
            }
            return;
        }
        if let Some(session) = &mut place.session {
            let verdict = match (request, answer.outcome) {
                (Request::Receive(from), Outcome::Received) => {
                    let bytes = self.ring.bytes();
                    let full = &mut place.full[usize::from(from == End::Container)];
                    *full = match bytes.len() < BUFFER_BYTES {
                        true => 0,
                        false => full.saturating_add(1),
                    };
                    session.feed(from, bytes, tools, now)
                }
                (Request::Receive(from), Outcome::Ended) => session.source_ended(from, tools, now),
                // No buffer was left, or the request was taken back: none of the peer's doing.
                (_, Outcome::Failed(Errno::NOBUFS | Errno::CANCELED | Errno::INTR))
                | (Request::Receive(_), Outcome::Failed(Errno::AGAIN) | Outcome::Ready) => {
                    Verdict::Wait
                }
                (_, Outcome::Missed) => Verdict::Wait,
                (Request::Receive(from), Outcome::Failed(errno)) => {
                    session.source_failed(from, errno, tools, now)
                }
                (Request::Connect, Outcome::Failed(errno)) => Verdict::Abort(errno),
                (Request::Connect, _) if session.connected() => Verdict::Wait,
                (Request::Connect, _) => session.answered(tools, now),
            };
            self.obey(index, verdict);
        }
        self.settle(index);
        if answer.over
            && let Request::Receive(from) = request
        {
            self.go_on(index, from);
        }
    }

    /// Receives again when a receive is over and the stream is not.
    fn go_on(&mut self, index: u32, from: End) {
        if let Some(place) = self.sessions.get_mut(index)
            && let Some(session) = &place.session
            && !place.leaving
            && session.flows_from(from)
        {
            self.ask(index, Request::Receive(from));
        }
    }

    fn obey(&mut self, index: u32, verdict: Verdict) {
        let Some(place) = self.sessions.get_mut(index) else {
            return;
        };
        let Some(session) = &place.session else {
            return;
        };
        match verdict {
            Verdict::Wait => {
                let bulk = place
                    .full
                    .iter()
                    .any(|full| usize::from(*full) >= BULK_BUFFERS);
                // Before the container answers a little may wait for it.
                let room = if session.connected() { 0 } else { SPLICE_FROM };
                // A ring that does not receive from a socket hears nothing of its death.
                let deaf = session.connected()
                    && !(session.flows_from(End::Client) && session.flows_from(End::Container));
                if bulk || deaf || session.held_bytes() > room {
                    self.leave(index);
                }
            }
            Verdict::Again | Verdict::Linger => self.leave(index),
            Verdict::Close => self.end(index, false),
            Verdict::Unreachable(errno) => {
                session.note_unreached(errno);
                self.end(index, true);
            }
            Verdict::Abort(errno) => {
                tracing::trace!(err = %errno, "session reset");
                self.end(index, true);
            }
        }
    }

    /// Takes back all requests; the session goes when they are answered.
    fn leave(&mut self, index: u32) {
        if let Some(place) = self.sessions.get_mut(index)
            && !std::mem::replace(&mut place.leaving, true)
        {
            let asked = place.asked;
            self.take_back(index, asked);
        }
    }

    fn take_back(&mut self, index: u32, asked: u8) {
        for request in REQUESTS {
            if asked & request.bit() != 0 {
                self.ring.cancel(request.key(index));
            }
        }
    }

    /// Ends a session, by resets or in good order. Its permit is free at once.
    fn end(&mut self, index: u32, reset: bool) {
        let Some(place) = self.sessions.get_mut(index) else {
            return;
        };
        let Some(session) = place.session.take() else {
            return;
        };
        if reset {
            // Closing would send nothing as long as the kernel has requests for the sockets.
            let (client, container) = session.descriptors();
            socket::reset(client);
            socket::reset(container);
        }
        place.kept = Some(session.into_descriptors());
        let asked = place.asked;
        self.ended += 1;
        self.take_back(index, asked);
        self.settle(index);
    }

    /// Lets go of a session that is over or leaving when nothing is under way for it.
    fn settle(&mut self, index: u32) {
        let Some(place) = self.sessions.get_mut(index) else {
            return;
        };
        if place.asked != 0 || place.session.is_some() && !place.leaving {
            return;
        }
        match self.sessions.remove(index).and_then(|it| it.session) {
            Some(mut session) => {
                session.leave_ring();
                self.leavers.push(session);
            }
            None => self.ended -= 1,
        }
    }

    /// Resets the sessions for which `wanted` holds.
    pub fn abort_where(&mut self, mut wanted: impl FnMut(&Session) -> bool) {
        for index in self
            .sessions
            .positions(|it| it.session.as_ref().is_some_and(&mut wanted))
        {
            self.end(index, true);
        }
    }

    /// Resets everything and waits for the kernel's answers.
    pub fn stop(&mut self, tools: &mut Tools) {
        self.abort_where(|_| true);
        self.leavers.drain(..).for_each(|it| drop(it.abort()));
        if self.bell_hung {
            self.ring.cancel(BELL);
        }
        let until = Instant::now() + STOPPING;
        while self.ring.under_way() > 0 && Instant::now() < until {
            if self.ring.enter(Some(STOPPING / 10)).is_err() {
                return;
            }
            self.serve(tools, 0);
        }
        if self.ring.under_way() > 0 {
            tracing::warn!(
                requests = self.ring.under_way(),
                "the kernel has not answered all requests of a relay's ring"
            );
        }
    }

    /// Sessions.
    pub fn sessions(&self) -> usize {
        self.sessions.live() - self.ended
    }

    /// Entries of the wheel, stale ones included.
    pub fn timers(&self) -> usize {
        self.wheel.entries()
    }
}

impl Timed for RingEngine {
    fn wheel(&mut self) -> &mut Wheel {
        &mut self.wheel
    }

    fn timed(&mut self, entry: Entry) -> Option<&mut Session> {
        let place = self
            .sessions
            .get_generation(entry.index, entry.generation)?;
        place.session.as_mut()
    }

    fn abort(&mut self, index: u32) {
        self.end(index, true);
    }

    fn unreached(&mut self, index: u32, _now: u32) {
        self.obey(index, Verdict::Unreachable(Errno::TIMEDOUT));
    }

    fn recycle(&mut self) {
        self.sessions.recycle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An idle connection costs this and its two sockets in the kernel, 24 bytes of table and timer,
    /// nothing else on this side.
    #[test]
    fn the_memory_of_an_idle_session_is_bounded() {
        let size = size_of::<RingSession>();
        assert!((64..=136).contains(&size), "a session takes {size} bytes");
    }

    #[test]
    fn keys_tell_session_and_request() {
        for request in REQUESTS {
            for index in [0, 1, 77, u32::MAX] {
                assert_eq!(Request::of(request.key(index)), Some((index, request)));
                assert_ne!(request.key(index), BELL);
            }
        }
        assert_eq!(Request::of(BELL), None);
    }
}
