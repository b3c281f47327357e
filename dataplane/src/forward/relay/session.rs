//! One forwarded connection: two sockets, two directions, one verdict.
//!
//! In: events of its sockets, or what a ring has received from them. Out: what its owner must do with
//! it. Invariants: an end of stream on one side becomes a half-close of the other and leaves the other
//! direction flowing; a reset of one side becomes a reset of the other, never a clean end; what a peer
//! sent before it reset is passed on as far as the other side takes it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use mio::event::Event;
use rustix::io::Errno;

use super::flow::{Fault, Flow, SMALL_TURN, Side, Stage, Tools, TurnEnd};
use super::port::SessionPermit;
use super::wheel::{Entry, SLOT, Wheel};
use crate::sys::socket;

/// Which socket of a session an event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The accepted one.
    Client,
    /// The one connected to the container.
    Container,
}

/// What the worker must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Wait for events.
    Wait,
    /// Come back without an event: more can be moved.
    Again,
    /// One side is gone; what it had sent is still on its way to the other. Look again after
    /// five seconds and come back without an event.
    Linger,
    /// Both directions have ended: close.
    Close,
    /// The container could not be reached: reset the client.
    Unreachable(Errno),
    /// One side is gone: reset the other.
    Abort(Errno),
}

/// How long what a dead side had sent may still take to reach the other.
const LINGER: Duration = Duration::from_secs(5);
/// The same in slots of the wheel.
#[allow(clippy::cast_possible_truncation, reason = "a handful")]
const LINGER_SLOTS: u32 = (LINGER.as_millis() / SLOT.as_millis()) as u32;
/// So many turns in a row that moved little make a session one of messages.
const CALM_TURNS: u8 = 64;

/// A forwarded connection.
#[derive(Debug)]
pub struct Session {
    client: Side,
    container: Side,
    inbound: Flow,
    outbound: Flow,
    /// Its place in the count of its port.
    pub permit: SessionPermit,
    /// Wheel slot of the last transferred byte (or of the start).
    pub last_active: u32,
    connected: bool,
    broken_since: Option<u32>,
    /// Waiting in its worker's list of sessions to come back to.
    pub queued: bool,
    /// A ring reads for it.
    on_ring: bool,
    /// Turns in a row that moved little.
    small_turns: u8,
}

/// What the time says about a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimerVerdict {
    /// Ask again at this wheel slot.
    Later(u64),
    /// Another entry of the wheel is to come.
    Nothing,
    /// It was silent for too long.
    Idle,
    /// The container has not answered in time.
    Unreached,
    /// What a dead side had sent has had its time.
    Lingered,
}

/// An engine's sessions by the clock: what both engines do when a timer comes up.
pub trait Timed {
    /// The timers.
    fn wheel(&mut self) -> &mut Wheel;
    /// The session that set a timer; none when it has ended or is another engine's by now.
    fn timed(&mut self, entry: Entry) -> Option<&mut Session>;
    /// Resets a session.
    fn abort(&mut self, index: u32);
    /// Tells a client that the container has not answered.
    fn unreached(&mut self, index: u32, now: u32);
    /// Makes the positions of ended sessions available again.
    fn recycle(&mut self);

    /// The wheel slot of the next timer.
    fn earliest(&mut self) -> Option<u64> {
        self.wheel().earliest()
    }

    /// Does what is due by the clock, and makes freed positions available again.
    fn end_of_round(&mut self, now: u32, expired: &mut Vec<Entry>) {
        self.wheel().expire(u64::from(now), expired);
        for entry in expired.drain(..) {
            let Some(session) = self.timed(entry) else {
                continue;
            };
            match session.timer_verdict(now) {
                TimerVerdict::Later(due) => self.wheel().insert(due, entry),
                TimerVerdict::Nothing => {}
                TimerVerdict::Idle => {
                    session.permit.port().count_idle_timeout();
                    self.abort(entry.index);
                }
                TimerVerdict::Unreached => self.unreached(entry.index, now),
                TimerVerdict::Lingered => self.abort(entry.index),
            }
        }
        self.recycle();
    }
}

impl Session {
    /// Its port is cut, or shuts its client out.
    pub fn must_end(&self) -> bool {
        let port = self.permit.port();
        let shut_out = || {
            let local = || {
                socket::local_address(&self.client.fd)
                    .ok()
                    .map(|it| it.ip())
            };
            // One whose client is gone ends by itself.
            socket::peer_address(&self.client.fd)
                .is_ok_and(|client| port.lets_in(client.ip(), local).is_err())
        };
        port.is_cut() || (port.is_narrowed() && shut_out())
    }

    /// A session whose connection to the container is under way.
    pub fn new(client: OwnedFd, container: OwnedFd, permit: SessionPermit, now: u32) -> Self {
        Self {
            client: Side::new(client),
            container: Side::new(container),
            inbound: Flow::default(),
            outbound: Flow::default(),
            permit,
            last_active: now,
            connected: false,
            broken_since: None,
            queued: false,
            on_ring: false,
            small_turns: 0,
        }
    }

    /// The connection to the container stands.
    pub fn connected(&self) -> bool {
        self.connected
    }

    /// Wheel slot of its first entry: the earlier of the two timeouts, whatever is left then is put
    /// back; or the end of the time a dead side has.
    pub fn first_due(&self, now: u32) -> u64 {
        let port = self.permit.port();
        let slots = match (self.broken_since, port.idle_slots()) {
            (Some(_), _) => LINGER_SLOTS,
            (None, 0) => port.connect_slots(),
            (None, idle) => idle.min(port.connect_slots()),
        };
        u64::from(now) + u64::from(slots) + 1
    }

    /// What is to be done about it when its entry of the wheel comes up.
    pub fn timer_verdict(&self, now: u32) -> TimerVerdict {
        if let Some(since) = self.broken_since {
            // Otherwise the entry made when it broke is still to come.
            return if now >= since.saturating_add(LINGER_SLOTS) {
                TimerVerdict::Lingered
            } else {
                TimerVerdict::Nothing
            };
        }
        let port = self.permit.port();
        let slots = if self.connected {
            port.idle_slots()
        } else {
            port.connect_slots()
        };
        // Without an idle timeout the entry stays in the wheel at its far end, so that a timeout
        // set later applies to sessions under way.
        let due = match slots {
            0 => u32::MAX,
            slots => self.last_active.saturating_add(slots).saturating_add(1),
        };
        if now < due {
            TimerVerdict::Later(u64::from(due))
        } else if self.connected {
            TimerVerdict::Idle
        } else {
            TimerVerdict::Unreached
        }
    }

    /// Counts and tells that the container was not reached.
    pub fn note_unreached(&self, errno: Errno) {
        let port = self.permit.port();
        port.count_connect_failure();
        tracing::debug!(
            port = port.bind().port(),
            target = %port.target(),
            err = %errno,
            "container not reached"
        );
    }

    /// The descriptors of client and container.
    pub fn descriptors(&self) -> (&OwnedFd, &OwnedFd) {
        (&self.client.fd, &self.container.fd)
    }

    /// Takes in one event and moves what can be moved.
    pub fn event(&mut self, end: End, event: &Event, tools: &mut Tools, now: u32) -> Verdict {
        let hung_up = event.is_read_closed() && event.is_write_closed();
        let dead = event.is_error();
        let side = match end {
            End::Client => &mut self.client,
            End::Container => &mut self.container,
        };
        let special = event.is_read_closed() || dead || event.is_priority();
        side.thorough |= special;
        side.readable |= special || event.is_readable();
        side.writable |= event.is_writable() || event.is_write_closed() || dead;
        if !self.connected {
            match end {
                End::Client if hung_up || dead => return Verdict::Abort(Errno::CONNRESET),
                End::Container if self.container.writable => {
                    if let Err(errno) = self.reach(now) {
                        return Verdict::Unreachable(errno);
                    }
                }
                _ => return Verdict::Wait,
            }
        } else if dead {
            // An error on a connected TCP socket means that it is closed (net/ipv4/tcp.c,
            // `tcp_poll`): nothing can be sent there, while what it sent may still wait.
            match end {
                End::Client => self.outbound.break_off(),
                End::Container => self.inbound.break_off(),
            }
        }
        self.turn(tools, now)
    }

    /// The container has answered: with its acceptance, or with an error.
    fn reach(&mut self, now: u32) -> Result<(), Errno> {
        socket::take_error(&self.container.fd)?;
        self.connected = true;
        self.last_active = now;
        Ok(())
    }

    /// From now on a ring reads and tells; nothing is read here.
    pub fn enter_ring(&mut self) {
        self.on_ring = true;
        self.small_turns = 0;
        for side in [&mut self.client, &mut self.container] {
            side.readable = false;
            side.writable = true;
        }
    }

    /// From now on events tell. Nothing is known of the sockets; trying tells.
    pub fn leave_ring(&mut self) {
        self.on_ring = false;
        for side in [&mut self.client, &mut self.container] {
            side.readable = true;
            side.writable = true;
            side.thorough = true;
        }
    }

    /// The ring has seen the container answer.
    pub fn answered(&mut self, tools: &mut Tools, now: u32) -> Verdict {
        match self.reach(now) {
            Ok(()) => self.turn(tools, now),
            Err(errno) => Verdict::Unreachable(errno),
        }
    }

    /// The ring has received bytes from one side.
    pub fn feed(&mut self, from: End, bytes: &[u8], tools: &mut Tools, now: u32) -> Verdict {
        let reached = from == End::Container && !self.connected;
        if reached && let Err(errno) = self.reach(now) {
            return Verdict::Unreachable(errno);
        }
        let (flow, sink) = match from {
            End::Client => (&mut self.inbound, &self.container),
            End::Container => (&mut self.outbound, &self.client),
        };
        if !self.connected {
            flow.hold(bytes);
            return Verdict::Wait;
        }
        let mut moved = 0;
        let put = flow.put(bytes, sink, &mut moved);
        if moved > 0 {
            self.last_active = now;
            let (inbound, outbound) = match from {
                End::Client => (moved, 0),
                End::Container => (0, moved),
            };
            self.permit.count_bytes(inbound, outbound);
        }
        match put {
            // What the client has sent before, and its end, may have waited for the container.
            Ok(()) if reached => {}
            Ok(()) => return Verdict::Wait,
            Err(_) => flow.break_off(),
        }
        self.turn(tools, now)
    }

    /// The ring has found the end of one side's stream.
    pub fn source_ended(&mut self, from: End, tools: &mut Tools, now: u32) -> Verdict {
        if from == End::Container
            && !self.connected
            && let Err(errno) = self.reach(now)
        {
            return Verdict::Unreachable(errno);
        }
        let flow = match from {
            End::Client => &mut self.inbound,
            End::Container => &mut self.outbound,
        };
        if flow.stage == Stage::Open {
            flow.stage = Stage::Ending;
        }
        self.turn(tools, now)
    }

    /// The ring could not go on receiving from one side: it was reset or has timed out.
    pub fn source_failed(
        &mut self,
        from: End,
        errno: Errno,
        tools: &mut Tools,
        now: u32,
    ) -> Verdict {
        let (flow, back) = match from {
            End::Client => (&mut self.inbound, &mut self.outbound),
            End::Container => (&mut self.outbound, &mut self.inbound),
        };
        match (self.connected, from) {
            (false, End::Container) => Verdict::Unreachable(errno),
            (true, _) if flow.holds() => {
                // What it had sent may still go out; the other side then sees a reset, no end.
                flow.stage = Stage::Ending;
                back.break_off();
                self.turn(tools, now)
            }
            _ => Verdict::Abort(errno),
        }
    }

    /// Whether bytes of one side wait for the other.
    pub fn holds(&self) -> bool {
        self.inbound.holds() || self.outbound.holds()
    }

    /// How many.
    pub fn held_bytes(&self) -> usize {
        self.inbound.held_bytes() + self.outbound.held_bytes()
    }

    /// Whether the stream of one side goes on.
    pub fn flows_from(&self, from: End) -> bool {
        let flow = match from {
            End::Client => &self.inbound,
            End::Container => &self.outbound,
        };
        flow.stage == Stage::Open
    }

    /// Only messages have gone through for a while, and nothing is on its way.
    pub fn is_calm(&self) -> bool {
        self.small_turns >= CALM_TURNS
            && !self.queued
            && !self.holds()
            && !self.splices()
            && self.flows_from(End::Client)
            && self.flows_from(End::Container)
    }

    /// Gives both directions a turn.
    pub fn turn(&mut self, tools: &mut Tools, now: u32) -> Verdict {
        if !self.connected {
            return Verdict::Wait;
        }
        let (mut moved_in, mut moved_out) = (0, 0);
        let outcome = self.pump_both(tools, &mut moved_in, &mut moved_out);
        if moved_in | moved_out != 0 {
            self.last_active = now;
            self.permit.count_bytes(moved_in, moved_out);
            self.small_turns = if moved_in.max(moved_out) < SMALL_TURN as u64 {
                self.small_turns.saturating_add(1)
            } else {
                0
            };
        }
        let again = match outcome {
            Ok(again) => again,
            Err(errno) => return Verdict::Abort(errno),
        };
        let over = |flow: &Flow| matches!(flow.stage, Stage::Done | Stage::Broken);
        let ended = over(&self.inbound) && over(&self.outbound);
        let broken = self.inbound.stage == Stage::Broken || self.outbound.stage == Stage::Broken;
        match (ended, broken) {
            (true, true) => Verdict::Abort(Errno::CONNRESET),
            (true, false) => Verdict::Close,
            (false, true) if self.broken_since.is_none() => {
                self.broken_since = Some(now);
                Verdict::Linger
            }
            _ if again => Verdict::Again,
            _ => Verdict::Wait,
        }
    }

    /// Pumps inbound, outbound, and inbound once more when outbound just broke. True when a
    /// direction has used up its share. The error is that of a source: nothing is left to move.
    fn pump_both(
        &mut self,
        tools: &mut Tools,
        moved_in: &mut u64,
        moved_out: &mut u64,
    ) -> Result<bool, Errno> {
        let mut again = false;
        for _ in 0..2 {
            let clean = self.outbound.stage != Stage::Broken;
            match self.inbound.pump(
                &mut self.client,
                &mut self.container,
                tools,
                moved_in,
                clean,
            ) {
                Ok(turn) => again |= turn == TurnEnd::Again,
                Err(Fault::Source(errno)) => return Err(errno),
                Err(Fault::Sink(_)) => {
                    self.inbound.break_off();
                    // A ring that reads for it goes on reading.
                    self.container.readable = !self.on_ring;
                    self.container.thorough = true;
                }
            }
            let clean = self.inbound.stage != Stage::Broken;
            match self.outbound.pump(
                &mut self.container,
                &mut self.client,
                tools,
                moved_out,
                clean,
            ) {
                Ok(turn) => again |= turn == TurnEnd::Again,
                Err(Fault::Source(errno)) => return Err(errno),
                Err(Fault::Sink(_)) => {
                    self.outbound.break_off();
                    // A ring that reads for it goes on reading.
                    self.client.readable = !self.on_ring;
                    self.client.thorough = true;
                    continue;
                }
            }
            break;
        }
        Ok(again)
    }

    /// Closes both sockets in good order; the kernel sends what it still holds.
    pub fn close(self) -> SessionPermit {
        self.permit
    }

    /// Gives its permit back; what is left are the sockets of client and container.
    pub fn into_descriptors(self) -> (OwnedFd, OwnedFd) {
        (self.client.fd, self.container.fd)
    }

    /// Resets both sockets.
    pub fn abort(self) -> SessionPermit {
        socket::abort(self.client.fd);
        socket::abort(self.container.fd);
        self.permit
    }

    /// Whether either direction uses splice now.
    pub fn splices(&self) -> bool {
        self.inbound.splices() || self.outbound.splices()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::super::port::{Port, Rules, Totals};
    use super::*;

    /// Our end and the peer's.
    fn ends() -> (OwnedFd, OwnedFd) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap()
    }

    fn permit() -> SessionPermit {
        let address = SocketAddr::from(([127, 0, 0, 1], 30_000));
        let totals = Arc::new(Totals::default());
        let port = Arc::new(Port::new(address, address, Rules::default(), totals));
        port.admit(address.ip(), || None).unwrap()
    }

    /// A ring tells of the container's greeting before it tells of the connection.
    #[test]
    fn a_container_that_greets_at_once_is_told_that_the_client_had_ended() {
        let ((ours, client), (theirs, container)) = (ends(), ends());
        let mut session = Session::new(ours, theirs, permit(), 0);
        let mut tools = Tools::new(true);
        session.enter_ring();
        let ended = session.source_ended(End::Client, &mut tools, 1);
        assert_eq!(ended, Verdict::Wait);
        let mut buffer = [0; 16];
        assert_eq!(socket::read(&container, &mut buffer), Err(Errno::AGAIN));
        let greeted = session.feed(End::Container, b"220 hello", &mut tools, 2);
        assert_eq!((greeted, session.connected()), (Verdict::Wait, true));
        assert_eq!(socket::read(&client, &mut buffer), Ok(9));
        assert_eq!(socket::read(&container, &mut buffer), Ok(0), "the end");
        let ended = session.source_ended(End::Container, &mut tools, 3);
        assert_eq!(ended, Verdict::Close);
    }

    /// An idle connection costs this and its two sockets in the kernel, 24 bytes of table and
    /// timer, nothing else. The lower bound asks for this number to be tightened when it can be.
    #[test]
    fn the_memory_of_an_idle_session_is_bounded() {
        let size = size_of::<Session>();
        assert!((64..=112).contains(&size), "a session takes {size} bytes");
    }
}
