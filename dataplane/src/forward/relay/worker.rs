//! The event loop of one relay thread.
//!
//! In: messages (listeners, accepted clients, sweeps) and events of its sockets. Out: admitted
//! clients with a connection to their container, given to an engine: to the [`ring`](super::ring)
//! when there is one, else to the [`adaptive`](super::adaptive) one. Owns its listeners and engines;
//! nothing of it is shared but the inbox. Invariants: every event does a bounded amount of work; who
//! has more to do waits in a list and gets its turn after all others; running out of descriptors or
//! memory turns new clients away and never ends the loop.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use rustix::io::Errno;
use shared::log_limit::LogLimit;

use super::adaptive::Adaptive;
use super::port::{Port, SessionPermit};
use super::ring::RingEngine;
use super::session::{Session, Timed};
use super::wheel::SLOT;
use crate::sys::socket;

/// Events taken from the kernel at once.
const EVENTS: usize = 256;
/// Clients accepted from one listener before others get their turn.
const ACCEPT_BURST: usize = 64;
/// Bursts that empty a full backlog.
const BACKLOG_BURSTS: usize = super::BACKLOG as usize / ACCEPT_BURST;
/// How long a listener rests when the kernel has no memory or descriptors even for shedding.
const REST: Duration = Duration::from_millis(100);

pub(super) const WAKE: Token = Token(0);
const LISTENER_BIT: usize = 1 << 62;

fn listener_token(index: usize) -> Token {
    Token(LISTENER_BIT | index)
}

/// What a worker can be asked.
#[derive(Debug)]
pub enum Message {
    /// Accept clients of this port.
    Listen(OwnedFd, Arc<Port>),
    /// Accept what waits, close the listeners, say so.
    Unlisten(Vec<Arc<Port>>, SyncSender<()>),
    /// Forward for this admitted client.
    Client(OwnedFd, SessionPermit),
    /// Reset the sessions of ports marked as cut, say so.
    Sweep(SyncSender<()>),
    /// Count sessions by what they do, for tests and reports.
    SessionCounts(SyncSender<SessionCounts>),
    /// Reset everything and end the thread.
    Stop,
}

/// What became of a client for whom there was no descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shed {
    /// It was reset, or there is one now.
    Done,
    /// There is none.
    Nobody,
    /// Not even the reserved descriptor is there.
    Impossible,
}

/// What the sessions of one worker are doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionCounts {
    /// Sessions.
    pub sessions: usize,
    /// Of these, those that use splice in at least one direction.
    pub splicing: usize,
    /// Of these, those that a ring reads for.
    pub on_ring: usize,
    /// Timer entries, stale ones included.
    pub timers: usize,
}

/// The mailbox of a worker.
#[derive(Debug)]
pub struct Inbox {
    messages: Mutex<Vec<Message>>,
    waker: Waker,
}

impl Inbox {
    /// Leaves a message and wakes the worker.
    pub fn send(&self, message: Message) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push(message);
        // Whoever has put in the first one has woken the worker, which takes all at once.
        if messages.len() == 1 {
            // A waker fails only when its counter is full, and then the worker is awake anyway.
            let _ = self.waker.wake();
        }
    }

    /// All messages, in order.
    pub(super) fn take(&self) -> Vec<Message> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    port: Arc<Port>,
    queued: bool,
}

/// One relay thread's world.
#[derive(Debug)]
pub struct Worker {
    poll: Poll,
    inbox: Arc<Inbox>,
    /// All workers' inboxes, this one's included; clients are dealt out in turn.
    peers: Vec<Arc<Inbox>>,
    own: usize,
    next_peer: usize,
    listeners: Vec<Option<Listener>>,
    /// Listeners with more to do.
    accepting: VecDeque<usize>,
    resting: Vec<usize>,
    rest_until: Option<Instant>,
    adaptive: Adaptive,
    ring: Option<RingEngine>,
    /// A descriptor kept for the moment when there are no more: closing it lets one client be
    /// accepted and turned away, so that the backlog moves and nobody waits in vain.
    reserve: Option<File>,
    started: Instant,
    now: u32,
    shed_log: LogLimit,
    stopping: bool,
}

/// Makes the mailbox of a worker and the poll it wakes.
///
/// # Errors
/// No descriptors for epoll or eventfd.
pub fn mailbox() -> io::Result<(Poll, Arc<Inbox>)> {
    let poll = Poll::new()?;
    let waker = Waker::new(poll.registry(), WAKE)?;
    Ok((
        poll,
        Arc::new(Inbox {
            messages: Mutex::new(Vec::new()),
            waker,
        }),
    ))
}

impl Worker {
    /// A worker at position `own` of `peers`. With a ring the sessions of messages are its.
    pub fn new(
        poll: Poll,
        peers: Vec<Arc<Inbox>>,
        own: usize,
        splice: bool,
        ring: Option<RingEngine>,
    ) -> Self {
        Self {
            poll,
            inbox: Arc::clone(&peers[own]),
            next_peer: own,
            peers,
            own,
            listeners: Vec::new(),
            accepting: VecDeque::new(),
            resting: Vec::new(),
            rest_until: None,
            adaptive: Adaptive::new(splice, ring.is_some()),
            ring,
            reserve: File::open("/dev/null").ok(),
            started: Instant::now(),
            now: 0,
            shed_log: LogLimit::default(),
            stopping: false,
        }
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// Only a failure of epoll or io_uring itself, which nothing can be done about.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(EVENTS);
        let mut expired = Vec::new();
        while !self.stopping {
            if !self.wait(&mut events)? {
                continue;
            }
            for event in &events {
                let token = event.token();
                if token == WAKE {
                    self.read_mail();
                } else if token.0 & LISTENER_BIT != 0 {
                    self.queue_listener(token.0 & !LISTENER_BIT);
                } else {
                    self.adaptive.event(event, self.now);
                }
            }
            self.adaptive.serve_unfinished(self.now);
            self.serve_listeners();
            self.adaptive.end_of_round(self.now, &mut expired);
            if let Some(ring) = &mut self.ring {
                for session in self.adaptive.take_calm(self.poll.registry()) {
                    ring.adopt(session, self.now);
                }
                ring.end_of_round(self.now, &mut expired);
            }
        }
        self.adaptive.abort_where(|_| true);
        if let Some(ring) = &mut self.ring {
            ring.stop(&mut self.adaptive.tools);
        }
        Ok(())
    }

    /// Waits for events, and lets the ring do what it has learned. False when a signal ended it.
    fn wait(&mut self, events: &mut Events) -> io::Result<bool> {
        let mut timeout = self.timeout();
        if let Some(ring) = &mut self.ring {
            ring.enter(self.poll.registry(), timeout)?;
            timeout = Some(Duration::ZERO);
        }
        self.now = self.slot_of(Instant::now());
        if let Some(ring) = &mut self.ring {
            ring.serve(&mut self.adaptive.tools, self.now);
            for session in ring.take_leavers() {
                self.adaptive
                    .adopt_running(self.poll.registry(), session, self.now);
            }
            if !ring.take_bell() {
                events.clear();
                return Ok(true);
            }
        }
        match self.poll.poll(events, timeout) {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::Interrupted => return Ok(false),
            Err(err) => return Err(err),
        }
        self.now = self.slot_of(Instant::now());
        Ok(true)
    }

    fn slot_of(&self, at: Instant) -> u32 {
        let slots = at.duration_since(self.started).as_millis() / SLOT.as_millis();
        u32::try_from(slots).unwrap_or(u32::MAX)
    }

    fn timeout(&mut self) -> Option<Duration> {
        if self.adaptive.is_busy() || !self.accepting.is_empty() {
            return Some(Duration::ZERO);
        }
        let now = Instant::now();
        let of_ring = self.ring.as_mut().and_then(RingEngine::earliest);
        let earliest = [self.adaptive.earliest(), of_ring];
        let timer = earliest.into_iter().flatten().min().map(|slot| {
            let due = self.started + SLOT * u32::try_from(slot).unwrap_or(u32::MAX);
            // A millisecond more, because epoll rounds down and would wake just before.
            due.saturating_duration_since(now) + Duration::from_millis(1)
        });
        let rest = self
            .rest_until
            .map(|until| until.saturating_duration_since(now));
        match (timer, rest) {
            (Some(timer), Some(rest)) => Some(timer.min(rest)),
            (timer, rest) => timer.or(rest),
        }
    }

    fn read_mail(&mut self) {
        for message in self.inbox.take() {
            match message {
                Message::Listen(fd, port) => self.adopt_listener(fd, port),
                Message::Unlisten(ports, done) => {
                    for port in &ports {
                        self.close_listener(port);
                    }
                    let _ = done.try_send(());
                }
                Message::Client(fd, permit) => self.start_session(fd, permit),
                Message::Sweep(done) => {
                    self.adaptive.abort_where(Session::must_end);
                    if let Some(ring) = &mut self.ring {
                        ring.abort_where(Session::must_end);
                    }
                    let _ = done.try_send(());
                }
                Message::SessionCounts(answer) => {
                    let ring = self.ring.as_ref();
                    let on_ring = ring.map_or(0, RingEngine::sessions);
                    let _ = answer.try_send(SessionCounts {
                        sessions: self.adaptive.sessions() + on_ring,
                        splicing: self.adaptive.splicing(),
                        on_ring,
                        timers: self.adaptive.timers() + ring.map_or(0, RingEngine::timers),
                    });
                }
                Message::Stop => self.stopping = true,
            }
        }
    }

    fn adopt_listener(&mut self, fd: OwnedFd, port: Arc<Port>) {
        let index = self
            .listeners
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.listeners.push(None);
                self.listeners.len() - 1
            });
        let registered = self.poll.registry().register(
            &mut SourceFd(&fd.as_raw_fd()),
            listener_token(index),
            Interest::READABLE,
        );
        if let Err(err) = registered {
            tracing::error!(port = port.bind().port(), %err, "cannot watch a listener");
            drop(fd);
            port.set_unwatched();
            return;
        }
        self.listeners[index] = Some(Listener {
            fd,
            port,
            queued: false,
        });
    }

    fn close_listener(&mut self, port: &Arc<Port>) {
        let found = self.listeners.iter().position(|listener| {
            listener
                .as_ref()
                .is_some_and(|listener| Arc::ptr_eq(&listener.port, port))
        });
        if let Some(index) = found {
            // Closing would reset those who have connected but were not accepted yet. More than
            // the backlog did not wait before: clients that keep coming must not hold the loop.
            for _ in 0..=BACKLOG_BURSTS {
                if !self.accept_some(index) {
                    break;
                }
            }
            self.listeners[index] = None;
        }
    }

    fn queue_listener(&mut self, index: usize) {
        if let Some(Some(listener)) = self.listeners.get_mut(index)
            && !listener.queued
        {
            listener.queued = true;
            self.accepting.push_back(index);
        }
    }

    fn serve_listeners(&mut self) {
        if self.rest_until.is_some_and(|until| Instant::now() >= until) {
            self.rest_until = None;
            for index in std::mem::take(&mut self.resting) {
                self.queue_listener(index);
            }
        }
        for _ in 0..self.accepting.len() {
            let Some(index) = self.accepting.pop_front() else {
                return;
            };
            if let Some(Some(listener)) = self.listeners.get_mut(index) {
                listener.queued = false;
            }
            if self.accept_some(index) {
                self.queue_listener(index);
            }
        }
    }

    /// Accepts a burst of clients. True when more may be waiting.
    fn accept_some(&mut self, index: usize) -> bool {
        for _ in 0..ACCEPT_BURST {
            let Some(Some(listener)) = self.listeners.get(index) else {
                return false;
            };
            match socket::accept(&listener.fd) {
                Ok((fd, peer)) => {
                    let port = Arc::clone(&listener.port);
                    self.admit(fd, peer, &port);
                }
                Err(Errno::AGAIN) => return false,
                Err(Errno::MFILE | Errno::NFILE) => match self.shed(index) {
                    Shed::Done => {}
                    Shed::Nobody => return false,
                    Shed::Impossible => {
                        self.turn_away(index);
                        self.rest(index);
                        return false;
                    }
                },
                Err(Errno::NOBUFS | Errno::NOMEM) => {
                    self.rest(index);
                    return false;
                }
                Err(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::OPNOTSUPP) => {
                    tracing::error!(port = listener.port.bind().port(), "a listener is broken");
                    return false;
                }
                // What is left are errors of the one connection that was waiting (accept(2)).
                Err(_) => {}
            }
        }
        true
    }

    /// Another thread has taken the last descriptor. Clients must not wait until one is free again,
    /// which may be as long as sessions last.
    fn turn_away(&mut self, index: usize) {
        let Some(Some(listener)) = self.listeners.get(index) else {
            return;
        };
        if !socket::is_readable(&listener.fd) {
            return;
        }
        let port = listener.port.bind().port();
        // One at least.
        listener.port.count_shed();
        if let Err(err) = socket::turn_away_waiting(&listener.fd, super::BACKLOG) {
            tracing::error!(port, %err, "a listener is broken");
        } else if let Some(suppressed) = self.shed_log.pass() {
            tracing::warn!(
                port,
                suppressed,
                "out of descriptors, even of the one kept for this; waiting clients are turned away: raise LimitNOFILE"
            );
        }
    }

    fn rest(&mut self, index: usize) {
        self.resting.push(index);
        self.rest_until.get_or_insert(Instant::now() + REST);
    }

    /// No descriptors: accepts one client with the reserved one and resets it.
    fn shed(&mut self, index: usize) -> Shed {
        if self.adaptive.tools.drop_pipes() > 0 {
            return Shed::Done;
        }
        let Some(Some(listener)) = self.listeners.get(index) else {
            return Shed::Nobody;
        };
        if self.reserve.is_none() {
            self.reserve = File::open("/dev/null").ok();
            return match self.reserve {
                Some(_) => Shed::Done,
                None => Shed::Impossible,
            };
        }
        self.reserve = None;
        let shed = match socket::accept(&listener.fd) {
            Ok((fd, _)) => {
                listener.port.count_shed();
                socket::abort(fd);
                if let Some(suppressed) = self.shed_log.pass() {
                    tracing::warn!(
                        port = listener.port.bind().port(),
                        suppressed,
                        "out of descriptors, new clients are turned away: raise LimitNOFILE"
                    );
                }
                Shed::Done
            }
            // Without a free descriptor the kernel had not looked whether anybody waits.
            Err(Errno::AGAIN) => Shed::Nobody,
            Err(_) => Shed::Impossible,
        };
        self.reserve = File::open("/dev/null").ok();
        shed
    }

    fn admit(&mut self, fd: OwnedFd, peer: SocketAddr, port: &Arc<Port>) {
        let local = || socket::local_address(&fd).ok().map(|address| address.ip());
        match port.admit(peer.ip(), local) {
            Ok(permit) => {
                let chosen = self.next_peer;
                self.next_peer = (self.next_peer + 1) % self.peers.len();
                if chosen == self.own {
                    self.start_session(fd, permit);
                } else {
                    self.peers[chosen].send(Message::Client(fd, permit));
                }
            }
            Err(refusal) => {
                tracing::debug!(port = port.bind().port(), %peer, ?refusal, "client refused");
                socket::abort(fd);
            }
        }
    }

    fn start_session(&mut self, client: OwnedFd, mut permit: SessionPermit) {
        let port = Arc::clone(permit.port());
        let container = match port.begin(&mut permit, socket::start_connect) {
            Ok(fd) => fd,
            Err(errno) => {
                if matches!(
                    errno,
                    Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM
                ) {
                    self.adaptive.tools.drop_pipes();
                    port.count_shed();
                } else {
                    port.count_connect_failure();
                }
                tracing::debug!(port = port.bind().port(), err = %errno, "cannot connect");
                socket::abort(client);
                return;
            }
        };
        let session = Session::new(client, container, permit, self.now);
        match &mut self.ring {
            Some(ring) => ring.start(session, self.now),
            None => {
                let registry = self.poll.registry();
                self.adaptive.adopt(registry, session, self.now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::port::{Rules, Totals};
    use super::*;

    #[test]
    fn a_listener_that_cannot_be_watched_is_told_of() {
        let (poll, inbox) = mailbox().unwrap();
        let mut worker = Worker::new(poll, vec![inbox], 0, false, None);
        let address = SocketAddr::from(([127, 0, 0, 1], 30_000));
        let port = || {
            let totals = Arc::new(Totals::default());
            Arc::new(Port::new(address, address, Rules::default(), totals))
        };
        // A file is always ready, so epoll takes none.
        let (file, unwatched) = (tempfile::tempfile().unwrap(), port());
        worker.adopt_listener(file.into(), Arc::clone(&unwatched));
        assert!(unwatched.is_unwatched());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let watched = port();
        worker.adopt_listener(listener.into(), Arc::clone(&watched));
        assert!(!watched.is_unwatched());
        assert_eq!(worker.listeners.iter().flatten().count(), 1);
    }
}
