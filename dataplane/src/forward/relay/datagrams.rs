//! The relay of datagrams: one thread for the UDP ports of all containers.
//!
//! In: the messages of a [`Worker`](super::worker::Worker), datagrams of clients and containers.
//! Out: the same datagrams on the other side. A session is a client's address, the address of this
//! host it has sent to, and a socket of its own towards the container, so that the container tells
//! clients apart. It is *young* until its client has sent again after an answer, which a sender of
//! forged addresses can't know to do. Invariants: the table of sessions is bounded, silent ones leave
//! it, and at a limit the oldest young one makes room, so that a flood costs those who speak nothing;
//! an answer leaves by the address that was asked; a datagram that finds no room is dropped, never kept.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::io::Errno;

use super::port::{Port, SessionPermit};
use super::slab::Slab;
use super::wheel::SLOT;
use super::worker::{Inbox, Message, SessionCounts, WAKE};
use crate::sys::datagram;
use crate::sys::socket;

/// Sessions of all ports, of which one has half at most. Each is a descriptor, and a sender of forged
/// addresses makes one per datagram. Connections keep half of the process's sessions in any case.
const MOST_SESSIONS: u32 = 4096;
/// A silent session is forgotten after this, like a flow of the kernel path ...
const IDLE: Duration = Duration::from_secs(180);
/// ... and before an answer after this.
const OPENING: Duration = Duration::from_secs(30);
/// Distance of the looks for silent sessions.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Datagrams taken from one socket before others get their turn.
const BURST: usize = 64;
/// No datagram is larger.
const LARGEST: usize = 65_536;

const LISTENER_BIT: usize = 1 << 62;

#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    port: Arc<Port>,
    /// Its young sessions, oldest first.
    young: BTreeMap<u64, u32>,
    /// Is among those that may hold more.
    queued: bool,
}

/// Who speaks to whom: the position of the listener, the client, the address it has sent to.
type Key = (usize, SocketAddr, IpAddr);

#[derive(Debug)]
struct Session {
    key: Key,
    fd: OwnedFd,
    permit: SessionPermit,
    last_active: Instant,
    answered: bool,
    /// Its place among the young ones.
    birth: u64,
    /// Is among those that may hold more.
    queued: bool,
}

impl Session {
    /// Its port is cut, or shuts its client out.
    fn must_end(&self) -> bool {
        let (port, (_, client, local)) = (self.permit.port(), self.key);
        let shut_out = || port.lets_in(client.ip(), || Some(local)).is_err();
        port.is_cut() || (port.is_narrowed() && shut_out())
    }

    fn is_over(&self, now: Instant) -> bool {
        let most = if self.answered { IDLE } else { OPENING };
        let own = match self.permit.port().idle_slots() {
            0 => most,
            slots => SLOT * slots,
        };
        now.saturating_duration_since(self.last_active) >= most.min(own)
    }
}

/// The thread's world.
#[derive(Debug)]
pub struct Datagrams {
    poll: Poll,
    inbox: Arc<Inbox>,
    listeners: Vec<Option<Listener>>,
    sessions: Slab<Session>,
    index: HashMap<Key, u32>,
    /// Sockets that may hold more.
    ready: VecDeque<Token>,
    buffer: Vec<u8>,
    births: u64,
    looked_at: Instant,
    stopping: bool,
}

impl Datagrams {
    /// The thread's world, woken by `inbox`.
    pub fn new(poll: Poll, inbox: Arc<Inbox>) -> Self {
        Self {
            poll,
            inbox,
            listeners: Vec::new(),
            sessions: Slab::default(),
            index: HashMap::new(),
            ready: VecDeque::new(),
            buffer: vec![0; LARGEST],
            births: 0,
            looked_at: Instant::now(),
            stopping: false,
        }
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// Only a failure of epoll itself, which nothing can be done about.
    pub fn run(mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(256);
        while !self.stopping {
            let wait = match (self.ready.is_empty(), self.index.is_empty()) {
                (false, _) => Some(Duration::ZERO),
                (true, false) => Some(LOOK_INTERVAL),
                (true, true) => None,
            };
            match self.poll.poll(&mut events, wait) {
                Ok(()) => {}
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) => return Err(err),
            }
            for event in &events {
                match event.token() {
                    WAKE => self.read_mail(),
                    token => self.queue(token),
                }
            }
            for _ in 0..self.ready.len() {
                let Some(token) = self.ready.pop_front() else {
                    break;
                };
                if let Some(queued) = self.queued(token) {
                    *queued = false;
                }
                let more = match token.0 {
                    it if it & LISTENER_BIT != 0 => self.take_from_clients(it & !LISTENER_BIT),
                    it => u32::try_from(it - 1).is_ok_and(|it| self.take_from_container(it)),
                };
                if more {
                    self.queue(token);
                }
            }
            self.end_silent(Instant::now());
            self.sessions.recycle();
        }
        Ok(())
    }

    /// The mark of the socket that a token stands for.
    fn queued(&mut self, token: Token) -> Option<&mut bool> {
        if token.0 & LISTENER_BIT != 0 {
            let listener = self.listeners.get_mut(token.0 & !LISTENER_BIT)?.as_mut()?;
            return Some(&mut listener.queued);
        }
        let index = u32::try_from(token.0.checked_sub(1)?).ok()?;
        Some(&mut self.sessions.get_mut(index)?.queued)
    }

    fn queue(&mut self, token: Token) {
        if let Some(queued) = self.queued(token)
            && !std::mem::replace(queued, true)
        {
            self.ready.push_back(token);
        }
    }

    fn read_mail(&mut self) {
        for message in self.inbox.take() {
            match message {
                Message::Listen(fd, port) => self.adopt(fd, port),
                Message::Unlisten(ports, done) => {
                    self.close(&ports);
                    let _ = done.try_send(());
                }
                Message::Sweep(done) => {
                    for index in self.sessions.positions(Session::must_end) {
                        self.end(index);
                    }
                    let _ = done.try_send(());
                }
                Message::SessionCounts(answer) => {
                    let _ = answer.try_send(SessionCounts {
                        sessions: self.sessions.live(),
                        ..SessionCounts::default()
                    });
                }
                // Nobody sends a connection here.
                Message::Client(..) => {}
                Message::Stop => self.stopping = true,
            }
        }
    }

    fn adopt(&mut self, fd: OwnedFd, port: Arc<Port>) {
        let vacant = self.listeners.iter().position(Option::is_none);
        let position = vacant.unwrap_or_else(|| {
            self.listeners.push(None);
            self.listeners.len() - 1
        });
        let token = Token(LISTENER_BIT | position);
        if let Err(err) = self.watch(&fd, token) {
            tracing::error!(port = port.bind().port(), %err, "cannot watch a port of datagrams");
            drop(fd);
            port.set_unwatched();
            return;
        }
        self.listeners[position] = Some(Listener {
            fd,
            port,
            young: BTreeMap::new(),
            queued: false,
        });
    }

    fn watch(&self, fd: &OwnedFd, token: Token) -> io::Result<()> {
        self.poll
            .registry()
            .register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)
    }

    /// Closes ports. Their sessions end with them: answers could no longer leave by them.
    fn close(&mut self, ports: &[Arc<Port>]) {
        for position in 0..self.listeners.len() {
            let closes = |it: &Listener| ports.iter().any(|port| Arc::ptr_eq(port, &it.port));
            if !self.listeners[position].as_ref().is_some_and(closes) {
                continue;
            }
            for index in self.sessions.positions(|it| it.key.0 == position) {
                self.end(index);
            }
            self.listeners[position] = None;
        }
    }

    fn end(&mut self, index: u32) {
        if let Some(session) = self.sessions.remove(index) {
            self.index.remove(&session.key);
            if let Some(Some(listener)) = self.listeners.get_mut(session.key.0) {
                listener.young.remove(&session.birth);
            }
        }
    }

    /// Takes what clients have sent to a port. True when more may be waiting.
    fn take_from_clients(&mut self, position: usize) -> bool {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut more = true;
        for _ in 0..BURST {
            let Some(Some(listener)) = self.listeners.get(position) else {
                more = false;
                break;
            };
            match datagram::receive(&listener.fd, &mut buffer) {
                Ok(it) => {
                    let key = (position, it.peer, it.local);
                    self.hand_to_container(key, buffer.get(..it.length).unwrap_or_default());
                }
                Err(Errno::AGAIN) => {
                    more = false;
                    break;
                }
                // An error that an earlier answer has met: a client that is gone.
                Err(_) => {}
            }
        }
        self.buffer = buffer;
        more
    }

    fn hand_to_container(&mut self, key: Key, bytes: &[u8]) {
        let known = self.index.get(&key).copied();
        let Some(index) = known.or_else(|| self.start(key)) else {
            return;
        };
        let Some(session) = self.sessions.get_mut(index) else {
            return;
        };
        session.last_active = Instant::now();
        if session.answered
            && let Some(Some(listener)) = self.listeners.get_mut(session.key.0)
        {
            listener.young.remove(&session.birth);
        }
        let port = session.permit.port();
        let written = match socket::write(&session.fd, bytes) {
            // The answer to an earlier datagram, and told but once: nobody was there. This one asks
            // again.
            Err(Errno::CONNREFUSED) => {
                port.count_connect_failure();
                socket::write(&session.fd, bytes)
            }
            other => other,
        };
        if written.is_ok() {
            session.permit.count_bytes(bytes.len() as u64, 0);
        }
    }

    fn refused(&mut self, index: u32) {
        if let Some(session) = self.sessions.get_mut(index) {
            session.permit.port().count_connect_failure();
        }
        self.end(index);
    }

    /// A session for a client that is let in.
    fn start(&mut self, key: Key) -> Option<u32> {
        let (position, client, local) = key;
        let port = Arc::clone(&self.listeners.get(position)?.as_ref()?.port);
        let judged = port.judge(client.ip(), || Some(local));
        let Some(mut permit) = judged.ok().and_then(|()| self.permit(position, &port)) else {
            port.count_refused();
            return None;
        };
        let fd = match port.begin(&mut permit, datagram::connect) {
            Ok(fd) => fd,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                port.count_shed();
                return None;
            }
            Err(_) => {
                port.count_connect_failure();
                return None;
            }
        };
        let (index, _) = self.sessions.vacant();
        // 0 is the waker's.
        if self.watch(&fd, Token(index as usize + 1)).is_err() {
            port.count_shed();
            return None;
        }
        self.index.insert(key, index);
        self.births += 1;
        if let Some(Some(listener)) = self.listeners.get_mut(position) {
            listener.young.insert(self.births, index);
        }
        Some(self.sessions.insert(Session {
            key,
            fd,
            permit,
            last_active: Instant::now(),
            answered: false,
            birth: self.births,
            queued: false,
        }))
    }

    /// A permit, at the cost of the oldest young session where there is no other: one of the same port,
    /// or, when all ports together have too many, of the port with most of them.
    fn permit(&mut self, position: usize, port: &Arc<Port>) -> Option<SessionPermit> {
        let most = match port.totals().limit() {
            0 => MOST_SESSIONS,
            limit => (limit / 2).clamp(1, MOST_SESSIONS),
        };
        if port.active() >= (most / 2).max(1) {
            self.displace(position)?;
            if let Ok(permit) = port.permit_again() {
                return Some(permit);
            }
        } else if self.sessions.live() >= most as usize {
            let young = |at: &usize| self.listeners[*at].as_ref().map_or(0, |it| it.young.len());
            let flooded = (0..self.listeners.len()).max_by_key(young)?;
            self.displace(flooded)?;
        }
        if let Ok(permit) = port.permit() {
            return Some(permit);
        }
        self.displace(position)?;
        port.permit_again().ok()
    }

    fn displace(&mut self, position: usize) -> Option<()> {
        let listener = self.listeners.get(position)?.as_ref()?;
        let (_, oldest) = listener.young.first_key_value()?;
        self.end(*oldest);
        Some(())
    }

    /// Takes what a container has answered to a client. True when more may be waiting.
    fn take_from_container(&mut self, index: u32) -> bool {
        for _ in 0..BURST {
            let Some(session) = self.sessions.get_mut(index) else {
                return false;
            };
            match socket::read(&session.fd, &mut self.buffer) {
                Ok(length) => {
                    session.last_active = Instant::now();
                    session.answered = true;
                    let (position, client, local) = session.key;
                    let Some(Some(listener)) = self.listeners.get(position) else {
                        return false;
                    };
                    let bytes = self.buffer.get(..length).unwrap_or_default();
                    if datagram::send(&listener.fd, bytes, client, local).is_ok() {
                        session.permit.count_bytes(0, length as u64);
                    }
                }
                Err(Errno::AGAIN) => return false,
                Err(Errno::CONNREFUSED) => {
                    self.refused(index);
                    return false;
                }
                Err(_) => {}
            }
        }
        true
    }

    fn end_silent(&mut self, now: Instant) {
        if now.saturating_duration_since(self.looked_at) < LOOK_INTERVAL {
            return;
        }
        self.looked_at = now;
        for index in self.sessions.positions(|it| it.is_over(now)) {
            if let Some(session) = self.sessions.get_mut(index)
                && session.permit.port().idle_slots() != 0
            {
                session.permit.port().count_idle_timeout();
            }
            self.end(index);
        }
    }
}
