//! The adaptive engine: sessions whose sockets are watched by epoll and moved by copy and splice.
//!
//! In: connected pairs of sockets, events of theirs. Out: forwarded bytes. Owns its sessions, their
//! timers, the buffer and the pipes. Invariant: every event does a bounded amount of work; who has
//! more to do waits in a list and gets its turn after all others.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::io::Errno;

use super::flow::Tools;
use super::session::{End, Session, Timed, Verdict};
use super::slab::Slab;
use super::wheel::{Entry, Wheel};

pub(super) const SESSION_BIT: usize = 1 << 61;

fn token(index: u32, end: End) -> Token {
    Token(SESSION_BIT | (index as usize) << 1 | usize::from(end == End::Container))
}

/// Where an event belongs.
fn place(token: Token) -> Option<(u32, End)> {
    let end = if token.0 & 1 == 0 {
        End::Client
    } else {
        End::Container
    };
    let index = u32::try_from((token.0 & !SESSION_BIT) >> 1).ok()?;
    Some((index, end))
}

fn watch(registry: &Registry, fd: &OwnedFd, token: Token) -> io::Result<()> {
    registry.register(
        &mut SourceFd(&fd.as_raw_fd()),
        token,
        Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY,
    )
}

/// Sessions on epoll.
#[derive(Debug)]
pub struct Adaptive {
    sessions: Slab<Session>,
    wheel: Wheel,
    /// Sessions with more to do.
    unfinished: VecDeque<u32>,
    /// What directions borrow.
    pub tools: Tools,
    /// Sessions of messages are wanted elsewhere: their positions go to `calm`.
    gives_away: bool,
    calm: Vec<u32>,
}

impl Adaptive {
    /// No sessions yet. With `gives_away` those that move messages only can be taken from it.
    pub fn new(splice: bool, gives_away: bool) -> Self {
        Self {
            sessions: Slab::default(),
            wheel: Wheel::default(),
            unfinished: VecDeque::new(),
            tools: Tools::new(splice),
            gives_away,
            calm: Vec::new(),
        }
    }

    /// Forwards for this session from now on.
    pub fn adopt(&mut self, registry: &Registry, session: Session, now: u32) {
        let (index, generation) = self.sessions.vacant();
        let (client, container) = session.descriptors();
        let watched = watch(registry, client, token(index, End::Client))
            .and_then(|()| watch(registry, container, token(index, End::Container)));
        if let Err(err) = watched {
            let port = session.permit.port();
            tracing::debug!(port = port.bind().port(), %err, "cannot watch a session");
            port.count_shed();
            session.abort();
            return;
        }
        let due = session.first_due(now);
        self.sessions.insert(session);
        self.wheel.insert(due, Entry { index, generation });
    }

    /// The same for one that was elsewhere and may have something to move at once.
    pub fn adopt_running(&mut self, registry: &Registry, session: Session, now: u32) {
        let (index, generation) = self.sessions.vacant();
        self.adopt(registry, session, now);
        if self.sessions.generation(index) == Some(generation) {
            self.queue(index);
        }
    }

    /// Takes in an event.
    pub fn event(&mut self, event: &Event, now: u32) {
        let Some((index, end)) = place(event.token()) else {
            return;
        };
        if let Some(session) = self.sessions.get_mut(index) {
            let verdict = session.event(end, event, &mut self.tools, now);
            self.obey(index, verdict, now);
        }
    }

    /// Whether sessions have more to do without an event.
    pub fn is_busy(&self) -> bool {
        !self.unfinished.is_empty()
    }

    /// Gives those with more to do their turn.
    pub fn serve_unfinished(&mut self, now: u32) {
        for _ in 0..self.unfinished.len() {
            let Some(index) = self.unfinished.pop_front() else {
                return;
            };
            if let Some(session) = self.sessions.get_mut(index)
                && session.queued
            {
                session.queued = false;
                let verdict = session.turn(&mut self.tools, now);
                self.obey(index, verdict, now);
            }
        }
    }

    fn obey(&mut self, index: u32, verdict: Verdict, now: u32) {
        match verdict {
            Verdict::Wait => {
                if self.gives_away && self.sessions.get_mut(index).is_some_and(|it| it.is_calm()) {
                    self.calm.push(index);
                }
            }
            Verdict::Again => self.queue(index),
            Verdict::Linger => {
                if let Some(generation) = self.sessions.generation(index)
                    && let Some(session) = self.sessions.get_mut(index)
                {
                    let due = session.first_due(now);
                    self.wheel.insert(due, Entry { index, generation });
                }
                self.queue(index);
            }
            Verdict::Close => {
                if let Some(session) = self.sessions.remove(index) {
                    session.close();
                }
            }
            Verdict::Unreachable(errno) => {
                if let Some(session) = self.sessions.get_mut(index) {
                    session.note_unreached(errno);
                }
                self.abort(index);
            }
            Verdict::Abort(errno) => {
                tracing::trace!(err = %errno, "session reset");
                self.abort(index);
            }
        }
    }

    fn queue(&mut self, index: u32) {
        if let Some(session) = self.sessions.get_mut(index)
            && !session.queued
        {
            session.queued = true;
            self.unfinished.push_back(index);
        }
    }

    /// Resets the sessions for which `wanted` holds.
    pub fn abort_where(&mut self, wanted: impl FnMut(&Session) -> bool) {
        for index in self.sessions.positions(wanted) {
            self.abort(index);
        }
    }

    /// The sessions that have moved messages only for a while, out of its hands.
    pub fn take_calm(&mut self, registry: &Registry) -> Vec<Session> {
        let mut taken = Vec::new();
        for index in std::mem::take(&mut self.calm) {
            if !self.sessions.get_mut(index).is_some_and(|it| it.is_calm()) {
                continue;
            }
            let Some(session) = self.sessions.remove(index) else {
                continue;
            };
            let (client, container) = session.descriptors();
            for fd in [client, container] {
                // It was registered, and nothing else can be wrong with an open descriptor.
                let _ = registry.deregister(&mut SourceFd(&fd.as_raw_fd()));
            }
            taken.push(session);
        }
        taken
    }

    /// Sessions.
    pub fn sessions(&self) -> usize {
        self.sessions.live()
    }

    /// Those of them that use splice in at least one direction.
    pub fn splicing(&self) -> usize {
        self.sessions.positions(Session::splices).len()
    }

    /// Entries of the wheel, stale ones included.
    pub fn timers(&self) -> usize {
        self.wheel.entries()
    }
}

impl Timed for Adaptive {
    fn wheel(&mut self) -> &mut Wheel {
        &mut self.wheel
    }

    fn timed(&mut self, entry: Entry) -> Option<&mut Session> {
        self.sessions.get_generation(entry.index, entry.generation)
    }

    fn abort(&mut self, index: u32) {
        if let Some(session) = self.sessions.remove(index) {
            session.abort();
        }
    }

    fn unreached(&mut self, index: u32, now: u32) {
        self.obey(index, Verdict::Unreachable(Errno::TIMEDOUT), now);
    }

    fn recycle(&mut self) {
        self.sessions.recycle();
    }
}
