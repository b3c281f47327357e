//! One forwarded connection: two sockets, two directions, one verdict.
//!
//! In: events of its sockets. Out: what its worker must do with it. Invariants: an end of stream
//! on one side becomes a half-close of the other and leaves the other direction flowing; a reset
//! of one side becomes a reset of the other, never a clean end; what a peer sent before it reset
//! is passed on as far as the other side takes it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use mio::event::Event;
use rustix::io::Errno;

use super::flow::{Fault, Flow, Side, Stage, Tools, Turn};
use super::port::Seat;
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
    /// [`LINGER`] and come back without an event.
    Linger,
    /// Both directions have ended: close.
    Close,
    /// The container could not be reached: reset the client.
    Unreachable(Errno),
    /// One side is gone: reset the other.
    Abort(Errno),
}

/// How long what a dead side had sent may still take to reach the other.
pub const LINGER: Duration = Duration::from_secs(5);

/// A forwarded connection.
#[derive(Debug)]
pub struct Session {
    client: Side,
    container: Side,
    inbound: Flow,
    outbound: Flow,
    /// Its place in the count of its port.
    pub seat: Seat,
    /// Wheel slot of the last transferred byte (or of the start).
    pub last_active: u32,
    connected: bool,
    broken_since: Option<u32>,
    /// Waiting in its worker's list of sessions to come back to.
    pub queued: bool,
}

impl Session {
    /// A session whose connection to the container is under way.
    pub fn new(client: OwnedFd, container: OwnedFd, seat: Seat, now: u32) -> Self {
        Self {
            client: Side::new(client),
            container: Side::new(container),
            inbound: Flow::default(),
            outbound: Flow::default(),
            seat,
            last_active: now,
            connected: false,
            broken_since: None,
            queued: false,
        }
    }

    /// The connection to the container stands.
    pub fn connected(&self) -> bool {
        self.connected
    }

    /// Wheel slot at which one side was found dead.
    pub fn broken_since(&self) -> Option<u32> {
        self.broken_since
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
                    if let Err(errno) = socket::take_error(&self.container.fd) {
                        return Verdict::Unreachable(errno);
                    }
                    self.connected = true;
                    self.last_active = now;
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

    /// Gives both directions a turn.
    pub fn turn(&mut self, tools: &mut Tools, now: u32) -> Verdict {
        if !self.connected {
            return Verdict::Wait;
        }
        let (mut moved_in, mut moved_out) = (0, 0);
        let outcome = self.pump_both(tools, &mut moved_in, &mut moved_out);
        if moved_in | moved_out != 0 {
            self.last_active = now;
            self.seat.port().count_bytes(moved_in, moved_out);
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
                Ok(turn) => again |= turn == Turn::Again,
                Err(Fault::Source(errno)) => return Err(errno),
                Err(Fault::Sink(_)) => {
                    self.inbound.break_off();
                    self.container.readable = true;
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
                Ok(turn) => again |= turn == Turn::Again,
                Err(Fault::Source(errno)) => return Err(errno),
                Err(Fault::Sink(_)) => {
                    self.outbound.break_off();
                    self.client.readable = true;
                    self.client.thorough = true;
                    continue;
                }
            }
            break;
        }
        Ok(again)
    }

    /// Closes both sockets in good order; the kernel sends what it still holds.
    pub fn close(self) -> Seat {
        self.seat
    }

    /// Resets both sockets.
    pub fn abort(self) -> Seat {
        socket::abort(self.client.fd);
        socket::abort(self.container.fd);
        self.seat
    }

    /// Whether either direction uses splice now.
    pub fn splices(&self) -> bool {
        self.inbound.splices() || self.outbound.splices()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An idle connection costs this and its two sockets in the kernel, 24 bytes of table and
    /// timer, nothing else. The lower bound asks for this number to be tightened when it can be.
    #[test]
    fn the_memory_of_an_idle_session_is_bounded() {
        let size = size_of::<Session>();
        assert!((64..=112).contains(&size), "a session takes {size} bytes");
    }
}
