//! The pool of host ports.
//!
//! In: requests for ports by an owner, the end of an owner, ports found in use at start. Out: port
//! numbers. Invariants: a port has at most one owner; it is freed only by the end of its owner
//! (never because nobody seems to use it, as the original's observer did); ports are handed out
//! first in, first out, and rest for a while before they are handed out again, so that a late
//! client of a dead kernel does not meet a stranger. A rest is cut short, longest rested first,
//! when a creation would fail otherwise.
//!
//! `Pool` is pure (time and bind check are given); `PortPool` adds the clock, the check and the
//! lock. The lock is never held over an await; a bind check is one system call.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, TcpListener};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use shared::ids::KernelId;
use thiserror::Error;

/// How long a freed port rests. Long enough for a client's retries and for the dataplane to have
/// let go of the listener, short enough that a pool of 1,001 ports is never the bottleneck.
pub const DEFAULT_REST: Duration = Duration::from_secs(30);

/// How long a port given out by `assign_port` waits for a kernel before it is freed again.
pub const ASSIGNMENT_LIFETIME: Duration = Duration::from_secs(3600);

/// Who holds a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortOwner {
    /// A kernel: freed when the kernel has ended.
    Kernel(KernelId),
    /// Given out by `assign_port`, for a kernel of a host-network cluster that is yet to come.
    Assigned,
}

/// Why no port could be had.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PortError {
    /// Too few ports are free.
    #[error(
        "Container ports are not sufficiently available (requested: {wanted}, free: {free}, \
         in use by other programs: {busy}). \
         Widen container.port-range or end unused kernels"
    )]
    Exhausted {
        /// How many were asked for.
        wanted: usize,
        /// How many could be handed out now.
        free: usize,
        /// How many failed the bind check.
        busy: usize,
    },
    /// The named port belongs to somebody else.
    #[error("host port {port} is held by another kernel")]
    Taken {
        /// The port.
        port: u16,
    },
    /// The named port is outside the pool.
    #[error("host port {port} is outside container.port-range")]
    OutsideRange {
        /// The port.
        port: u16,
    },
}

/// How full the pool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// All ports of the range.
    pub total: usize,
    /// Ports that could be handed out now, as far as is known without a bind check.
    pub free: usize,
    /// Ports resting after use.
    pub resting: usize,
    /// Ports with an owner.
    pub owned: usize,
}

#[derive(Clone, Copy, Debug)]
struct FreePort {
    port: u16,
    ready_at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    owner: PortOwner,
    since: Instant,
}

/// The pure pool.
#[derive(Debug)]
struct Pool {
    first: u16,
    last: u16,
    rest: Duration,
    free: VecDeque<FreePort>,
    held: BTreeMap<u16, Held>,
}

impl Pool {
    fn new(first: u16, last: u16, rest: Duration, now: Instant) -> Pool {
        Pool {
            first,
            last,
            rest,
            free: (first..=last)
                .map(|port| FreePort {
                    port,
                    ready_at: now,
                })
                .collect(),
            held: BTreeMap::new(),
        }
    }

    fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    fn acquire(
        &mut self,
        owner: PortOwner,
        wanted: usize,
        now: Instant,
        mut bindable: impl FnMut(u16) -> bool,
    ) -> Result<Vec<u16>, PortError> {
        self.expire_assignments(now);
        let mut taken = Vec::with_capacity(wanted);
        let mut busy = Vec::new();
        // Rested ports first, in the order in which they were freed; then the others, longest
        // rested first. Each port is looked at once.
        let (ready, mut resting): (Vec<_>, Vec<_>) = std::mem::take(&mut self.free)
            .into_iter()
            .partition(|free| free.ready_at <= now);
        resting.sort_by_key(|free| free.ready_at);
        let mut candidates = ready.into_iter().chain(resting);
        while taken.len() < wanted {
            let Some(candidate) = candidates.next() else {
                break;
            };
            if bindable(candidate.port) {
                taken.push(candidate);
            } else {
                busy.push(candidate.port);
            }
        }
        let ready_at = now + self.rest;
        if taken.len() < wanted {
            let error = PortError::Exhausted {
                wanted,
                free: taken.len(),
                busy: busy.len(),
            };
            self.free = taken.into();
            self.rest_all(busy, ready_at);
            return Err(error);
        }
        self.free = candidates.collect();
        self.rest_all(busy, ready_at);
        let taken: Vec<u16> = taken.into_iter().map(|free| free.port).collect();
        for port in &taken {
            self.held.insert(*port, Held { owner, since: now });
        }
        Ok(taken)
    }

    fn rest_all(&mut self, ports: Vec<u16>, ready_at: Instant) {
        self.free
            .extend(ports.into_iter().map(|port| FreePort { port, ready_at }));
    }

    /// Takes one given port: a port assigned before, or one found in use at start.
    fn claim(&mut self, owner: PortOwner, port: u16, now: Instant) -> Result<(), PortError> {
        if !self.contains(port) {
            return Err(PortError::OutsideRange { port });
        }
        match self.held.get(&port) {
            Some(held) if held.owner == owner || held.owner == PortOwner::Assigned => {}
            Some(_) => return Err(PortError::Taken { port }),
            None => self.free.retain(|free| free.port != port),
        }
        self.held.insert(port, Held { owner, since: now });
        Ok(())
    }

    fn release_owner(&mut self, owner: PortOwner, now: Instant) -> Vec<u16> {
        let ports: Vec<u16> = self
            .held
            .iter()
            .filter(|(_, held)| held.owner == owner)
            .map(|(port, _)| *port)
            .collect();
        for port in &ports {
            self.held.remove(port);
        }
        self.rest_all(ports.clone(), now + self.rest);
        ports
    }

    fn release_port(&mut self, owner: PortOwner, port: u16, now: Instant) -> bool {
        match self.held.get(&port) {
            Some(held) if held.owner == owner => {
                self.held.remove(&port);
                self.rest_all(vec![port], now + self.rest);
                true
            }
            _ => false,
        }
    }

    /// Frees what nobody has come for.
    fn expire_assignments(&mut self, now: Instant) -> Vec<u16> {
        let expired: Vec<u16> = self
            .held
            .iter()
            .filter(|(_, held)| {
                held.owner == PortOwner::Assigned
                    && now.saturating_duration_since(held.since) >= ASSIGNMENT_LIFETIME
            })
            .map(|(port, _)| *port)
            .collect();
        for port in &expired {
            self.release_port(PortOwner::Assigned, *port, now);
        }
        expired
    }

    fn owned_by(&self, owner: PortOwner) -> Vec<u16> {
        self.held
            .iter()
            .filter(|(_, held)| held.owner == owner)
            .map(|(port, _)| *port)
            .collect()
    }

    fn occupancy(&self, now: Instant) -> Occupancy {
        let resting = self.free.iter().filter(|free| free.ready_at > now).count();
        Occupancy {
            total: usize::from(self.last - self.first) + 1,
            free: self.free.len() - resting,
            resting,
            owned: self.held.len(),
        }
    }
}

/// The pool of the node: shared by all creations.
#[derive(Debug)]
pub struct PortPool {
    pool: Mutex<Pool>,
}

impl PortPool {
    /// All ports from `first` to `last`, both included.
    pub fn new(first: u16, last: u16, rest: Duration) -> PortPool {
        PortPool {
            pool: Mutex::new(Pool::new(first, last, rest, Instant::now())),
        }
    }

    fn pool(&self) -> std::sync::MutexGuard<'_, Pool> {
        // Every method leaves the pool whole at each step that can panic (none allocates midway).
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes `wanted` ports on which a listener can be bound at `bind`.
    ///
    /// # Errors
    /// Fewer are free.
    pub fn acquire(
        &self,
        kernel: KernelId,
        wanted: usize,
        bind: IpAddr,
    ) -> Result<Vec<u16>, PortError> {
        self.pool()
            .acquire(PortOwner::Kernel(kernel), wanted, Instant::now(), |port| {
                bindable(bind, port)
            })
    }

    /// Takes one port for a kernel that is yet to come (`assign_port`).
    ///
    /// # Errors
    /// None is free.
    pub fn assign(&self, bind: IpAddr) -> Result<u16, PortError> {
        self.pool()
            .acquire(PortOwner::Assigned, 1, Instant::now(), |port| {
                bindable(bind, port)
            })
            .map(|ports| ports[0])
    }

    /// Takes a given port: one that `assign` gave out, or one found in use at start.
    ///
    /// # Errors
    /// Another kernel holds it, or it is outside of the range.
    pub fn claim(&self, kernel: KernelId, port: u16) -> Result<(), PortError> {
        self.pool()
            .claim(PortOwner::Kernel(kernel), port, Instant::now())
    }

    /// Takes a given port that nobody was promised.
    ///
    /// # Errors
    /// Another kernel holds it, it is promised, or outside of the range.
    pub fn claim_unpromised(&self, kernel: KernelId, port: u16) -> Result<(), PortError> {
        let mut pool = self.pool();
        pool.expire_assignments(Instant::now());
        let promised = pool.held.get(&port);
        if promised.is_some_and(|held| held.owner == PortOwner::Assigned) {
            return Err(PortError::Taken { port });
        }
        pool.claim(PortOwner::Kernel(kernel), port, Instant::now())
    }

    /// Restores a port that `assign` gave out before a restart.
    ///
    /// # Errors
    /// It is held, or outside of the range.
    pub fn claim_assigned(&self, port: u16) -> Result<(), PortError> {
        self.pool().claim(PortOwner::Assigned, port, Instant::now())
    }

    /// Frees all ports of a kernel that has ended; returns them.
    pub fn release_kernel(&self, kernel: KernelId) -> Vec<u16> {
        self.pool()
            .release_owner(PortOwner::Kernel(kernel), Instant::now())
    }

    /// Frees one port of a kernel: it turned out to be busy. It rests like any other.
    pub fn give_up(&self, kernel: KernelId, port: u16) -> bool {
        self.pool()
            .release_port(PortOwner::Kernel(kernel), port, Instant::now())
    }

    /// Frees a port given out by `assign` (`release_port`). A port of a kernel is left alone.
    pub fn release_assigned(&self, port: u16) -> bool {
        self.pool()
            .release_port(PortOwner::Assigned, port, Instant::now())
    }

    /// The ports of a kernel, ascending.
    pub fn of_kernel(&self, kernel: KernelId) -> Vec<u16> {
        self.pool().owned_by(PortOwner::Kernel(kernel))
    }

    /// The ports waiting for a kernel, ascending.
    pub fn assigned(&self) -> Vec<u16> {
        self.pool().owned_by(PortOwner::Assigned)
    }

    /// How full the pool is.
    pub fn occupancy(&self) -> Occupancy {
        self.pool().occupancy(Instant::now())
    }
}

/// Whether a listener can be bound. The standard library sets SO_REUSEADDR, so old connections in
/// TIME_WAIT do not make a port look busy; a listener of anybody else does.
fn bindable(bind: IpAddr, port: u16) -> bool {
    TcpListener::bind((bind, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;

    fn kernel(n: u8) -> PortOwner {
        PortOwner::Kernel(KernelId([n; 16]))
    }

    fn pool(last: u16, now: Instant) -> Pool {
        Pool::new(100, last, Duration::from_secs(30), now)
    }

    #[test]
    fn first_in_first_out_with_a_rest() {
        let now = Instant::now();
        let mut pool = pool(104, now);
        assert_eq!(
            pool.acquire(kernel(1), 2, now, |_| true),
            Ok(vec![100, 101])
        );
        assert_eq!(pool.release_owner(kernel(1), now), vec![100, 101]);
        // The freed ports rest, the others come first.
        assert_eq!(
            pool.acquire(kernel(2), 2, now, |_| true),
            Ok(vec![102, 103])
        );
        assert_eq!(pool.occupancy(now).resting, 2);
        let later = now + Duration::from_secs(30);
        assert_eq!(pool.occupancy(later).resting, 0);
        assert_eq!(
            pool.acquire(kernel(3), 3, later, |_| true),
            Ok(vec![104, 100, 101])
        );
    }

    #[test]
    fn a_rest_is_cut_short_before_a_request_fails() {
        let now = Instant::now();
        let mut pool = pool(103, now);
        assert!(pool.acquire(kernel(1), 2, now, |_| true).is_ok());
        pool.release_owner(kernel(1), now);
        let soon = now + Duration::from_secs(1);
        assert!(pool.acquire(kernel(2), 1, soon, |_| true).is_ok());
        pool.release_owner(kernel(2), soon);
        // One has never been used, two have rested longer than the third.
        assert_eq!(
            pool.acquire(kernel(3), 3, soon, |_| true),
            Ok(vec![103, 100, 101])
        );
        assert_eq!(
            pool.acquire(kernel(4), 2, soon, |_| true),
            Err(PortError::Exhausted {
                wanted: 2,
                free: 1,
                busy: 0
            })
        );
        assert_eq!(pool.occupancy(soon).resting, 1);
    }

    #[test]
    fn a_failed_request_takes_nothing() {
        let now = Instant::now();
        let mut pool = pool(102, now);
        assert!(pool.acquire(kernel(1), 4, now, |_| true).is_err());
        assert_eq!(
            pool.occupancy(now),
            Occupancy {
                total: 3,
                free: 3,
                resting: 0,
                owned: 0
            }
        );
        assert_eq!(
            pool.acquire(kernel(1), 3, now, |_| true),
            Ok(vec![100, 101, 102])
        );
    }

    #[test]
    fn busy_ports_are_passed_over_and_tried_again_later() {
        let now = Instant::now();
        let mut pool = pool(102, now);
        assert_eq!(
            pool.acquire(kernel(1), 1, now, |port| port != 100),
            Ok(vec![101])
        );
        assert_eq!(
            pool.acquire(kernel(2), 2, now, |port| port != 100),
            Err(PortError::Exhausted {
                wanted: 2,
                free: 1,
                busy: 1
            })
        );
        assert_eq!(
            pool.acquire(kernel(2), 2, now, |_| true),
            Ok(vec![102, 100])
        );
    }

    #[test]
    fn an_assigned_port_is_claimed_by_one_kernel_only() {
        let now = Instant::now();
        let mut pool = pool(102, now);
        let ports = pool.acquire(PortOwner::Assigned, 1, now, |_| true).unwrap();
        assert_eq!(pool.claim(kernel(1), ports[0], now), Ok(()));
        assert_eq!(pool.claim(kernel(1), ports[0], now), Ok(()));
        assert_eq!(
            pool.claim(kernel(2), ports[0], now),
            Err(PortError::Taken { port: 100 })
        );
        assert!(!pool.release_port(PortOwner::Assigned, 100, now));
        assert_eq!(
            pool.claim(kernel(2), 99, now),
            Err(PortError::OutsideRange { port: 99 })
        );
    }

    // Defect 6 of the original: its observer freed ports whose container was not up yet.
    #[test]
    fn defect_observer_frees_reserved_ports() {
        let now = Instant::now();
        let mut pool = pool(101, now);
        pool.acquire(kernel(1), 1, now, |_| true).unwrap();
        pool.acquire(PortOwner::Assigned, 1, now, |_| true).unwrap();
        let later = now + Duration::from_secs(600);
        assert!(pool.expire_assignments(later).is_empty());
        assert!(pool.acquire(kernel(2), 1, later, |_| true).is_err());
        // Only an assignment nobody came for is freed in the end.
        let much_later = now + ASSIGNMENT_LIFETIME;
        assert_eq!(pool.expire_assignments(much_later), vec![101]);
        assert_eq!(pool.owned_by(kernel(1)), vec![100]);
    }

    #[test]
    fn ports_that_nobody_has_come_for_are_free_for_any_kernel() {
        let now = Instant::now();
        let mut pool = pool(101, now);
        pool.acquire(PortOwner::Assigned, 2, now, |_| true).unwrap();
        assert!(pool.acquire(kernel(1), 1, now, |_| true).is_err());
        let later = now + ASSIGNMENT_LIFETIME;
        assert_eq!(
            pool.acquire(kernel(1), 2, later, |_| true),
            Ok(vec![100, 101])
        );
    }

    // Defect 16 of the original: one busy host port made the creation fail.
    #[test]
    fn defect_busy_port_fails_creation() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let busy = listener.local_addr().unwrap().port();
        let (first, last) = if busy > 60_000 {
            (busy - 20, busy)
        } else {
            (busy, busy + 20)
        };
        let pool = PortPool::new(first, last, DEFAULT_REST);
        let id = KernelId([1; 16]);
        let ports = pool.acquire(id, 3, Ipv4Addr::LOCALHOST.into()).unwrap();
        assert!(
            !ports.contains(&busy),
            "{ports:?} contains the busy port {busy}"
        );
    }

    #[derive(Clone, Debug)]
    enum Op {
        Acquire(u8, usize),
        Release(u8),
        Claim(u8, u16),
        Wait(u64),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        proptest::collection::vec(
            prop_oneof![
                (0u8..4, 1usize..5).prop_map(|(k, n)| Op::Acquire(k, n)),
                (0u8..4).prop_map(Op::Release),
                (0u8..4, 100u16..112).prop_map(|(k, p)| Op::Claim(k, p)),
                (0u64..40).prop_map(Op::Wait),
            ],
            0..60,
        )
    }

    proptest! {
        /// No port is lost, none has two owners, none is handed out while it rests.
        #[test]
        fn every_port_is_in_one_place(ops in ops()) {
            let mut now = Instant::now();
            let mut pool = pool(111, now);
            let mut freed: BTreeMap<u16, Instant> = BTreeMap::new();
            for op in ops {
                match op {
                    Op::Acquire(k, n) => {
                        if let Ok(ports) = pool.acquire(kernel(k), n, now, |port| port % 5 != 0) {
                            prop_assert_eq!(ports.len(), n);
                            for port in ports {
                                prop_assert!(port % 5 != 0);
                                // A rest is cut short only when nothing has rested longer.
                                if let Some(at) = freed.get(&port)
                                    && now.duration_since(*at) < Duration::from_secs(30)
                                {
                                    let mut left = pool.free.iter().filter(|free| free.port % 5 != 0);
                                    prop_assert!(left.all(|free| freed.get(&free.port) >= Some(at)));
                                }
                            }
                        }
                    }
                    Op::Release(k) => {
                        for port in pool.release_owner(kernel(k), now) {
                            freed.insert(port, now);
                        }
                    }
                    Op::Claim(k, port) => {
                        if pool.claim(kernel(k), port, now).is_ok() {
                            freed.remove(&port);
                        }
                    }
                    Op::Wait(seconds) => now += Duration::from_secs(seconds),
                }
                let free: BTreeSet<u16> = pool.free.iter().map(|free| free.port).collect();
                prop_assert_eq!(free.len(), pool.free.len());
                let held: BTreeSet<u16> = pool.held.keys().copied().collect();
                prop_assert!(free.is_disjoint(&held));
                prop_assert_eq!(free.len() + held.len(), 12);
            }
        }
    }
}
