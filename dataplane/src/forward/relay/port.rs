//! A forwarded port: where it listens, where it leads, its rules and its counters.
//!
//! In: rules from the desired row. Out: admission of clients, counters. Shared between the thread
//! that reconciles and the workers that forward. Invariant: every admitted session holds a
//! [`SessionPermit`]; the active counts of port and process fall exactly when permits are dropped.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use shared::desired::ClientNetwork;
use shared::ids::ContainerId;

use super::namespaces::{ContainerNamespace, ContainerNamespaces};
use super::wheel::SLOT;
use crate::sys::socket::Source;

/// What applies to sessions of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Most sessions at once; 0 means no limit of its own.
    pub max_sessions: u32,
    /// How long the container may take to accept.
    pub connect_timeout: Duration,
    /// How long a session may be silent; `None` means for ever.
    pub idle_timeout: Option<Duration>,
    /// Client ranges that are let in; empty means all.
    pub allowed: Vec<ClientNetwork>,
    /// Only clients on this host are let in.
    pub local_only: bool,
    /// Most new sessions in a second, in the long run; 0 means no limit. A second's worth may come
    /// at once.
    pub new_per_second: u32,
}

/// Connect timeout when the row names none. A local container answers in microseconds; ten seconds
/// cover several SYN retransmissions to one that is being unpaused.
pub const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

impl Default for Rules {
    fn default() -> Self {
        Self {
            max_sessions: 0,
            connect_timeout: DEFAULT_CONNECT_TIMEOUT,
            idle_timeout: None,
            allowed: Vec::new(),
            local_only: false,
            new_per_second: 0,
        }
    }
}

/// Why a client was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The port is disabled or going away.
    Disabled,
    /// Its address is in none of the allowed ranges.
    Network,
    /// It is not on this host.
    NotLocal,
    /// Too many have come just now.
    TooFast,
    /// The port's own limit is reached.
    PortLimit,
    /// The limit of the process is reached.
    TotalLimit,
}

/// Session counts of the whole process.
#[derive(Debug, Default)]
pub struct Totals {
    active: AtomicU32,
    limit: AtomicU32,
    admitted: AtomicU64,
    shed: AtomicU64,
}

impl Totals {
    /// Sets the limit of sessions of all ports; 0 means none.
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Relaxed);
    }

    /// The limit of sessions of all ports; 0 means none.
    pub fn limit(&self) -> u32 {
        self.limit.load(Relaxed)
    }

    /// What of the limit is open to a port that would have `own` sessions. A quarter is kept for ports
    /// with few, so that the clients of some ports, which sit there and say nothing, do not shut out
    /// those of all others: 64 ports can have their few at once.
    fn room(&self, own: u32) -> u32 {
        let limit = self.limit();
        let few = limit / 256;
        if few > 0 && own > few {
            limit - limit / 4
        } else {
            limit
        }
    }

    /// Sessions of all ports.
    pub fn active(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// Sessions ever admitted.
    pub fn admitted(&self) -> u64 {
        self.admitted.load(Relaxed)
    }

    /// Clients turned away for lack of descriptors or memory, or by the total limit.
    pub fn shed(&self) -> u64 {
        self.shed.load(Relaxed)
    }
}

const OPEN: u8 = 0;
const REFUSING: u8 = 1;
const CUT: u8 = 2;

/// What a port has counted since its listener was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sessions now.
    pub active: u32,
    /// Sessions admitted.
    pub total: u64,
    /// Clients turned away, for whatever reason.
    pub refused: u64,
    /// Bytes delivered from clients to the container.
    pub bytes_in: u64,
    /// Bytes delivered from the container to clients.
    pub bytes_out: u64,
    /// Sessions for which the container could not be reached.
    pub connect_failures: u64,
    /// Sessions ended because they were silent too long.
    pub idle_timeouts: u64,
    /// Packets from clients on the kernel path; the relay sees none.
    pub packets_in: u64,
    /// Packets to them.
    pub packets_out: u64,
}

/// When the next new session would be on time.
#[derive(Debug, Default)]
struct Pace(Option<Instant>);

impl Pace {
    const BURST: Duration = Duration::from_secs(1);

    /// Whether one may come now; if so it is counted in.
    fn allows(&mut self, per_second: u32, now: Instant) -> bool {
        if per_second == 0 {
            return true;
        }
        let next = self.0.map_or(now, |next| next.max(now));
        if next > now + Self::BURST {
            return false;
        }
        self.0 = Some(next + Self::BURST / per_second);
        true
    }

    /// Counts in those that have come another way. More than two seconds' worth are not made up for:
    /// they may have come under another limit.
    fn charge(&mut self, count: u64, per_second: u32, now: Instant) {
        if per_second == 0 {
            return;
        }
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let next = self.0.map_or(now, |next| next.max(now));
        let most = (now + 2 * Self::BURST).max(next);
        let charged = next.checked_add((Self::BURST / per_second).saturating_mul(count));
        self.0 = Some(charged.map_or(most, |charged| charged.min(most)));
    }
}

/// A forwarded port.
#[derive(Debug)]
pub struct Port {
    bind: SocketAddr,
    datagrams: bool,
    target: SocketAddr,
    /// Whose namespace its sessions may begin in.
    home: Option<(ContainerId, Arc<ContainerNamespaces>)>,
    rules: Mutex<Arc<Rules>>,
    max_sessions: AtomicU32,
    idle_slots: AtomicU32,
    connect_slots: AtomicU32,
    state: AtomicU8,
    /// Its listener is closed again: nobody could watch it.
    unwatched: AtomicBool,
    /// Its rules let fewer clients in than they did: sessions of others may be there.
    narrowed: AtomicBool,
    active: AtomicU32,
    elsewhere: AtomicU32,
    /// How many had begun elsewhere when that was told last; [`UNTOLD`] before.
    begun_elsewhere: AtomicU64,
    pace: Mutex<Pace>,
    total: AtomicU64,
    refused: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    connect_failures: AtomicU64,
    idle_timeouts: AtomicU64,
    totals: Arc<Totals>,
}

/// No count of sessions.
const UNTOLD: u64 = u64::MAX;

fn slots(duration: Duration) -> u32 {
    let slots = duration.as_millis().div_ceil(SLOT.as_millis()).max(1);
    u32::try_from(slots)
        .unwrap_or(u32::MAX / 2)
        .min(u32::MAX / 2)
}

impl Port {
    /// A port bound at `bind` that leads to `target`.
    pub fn new(bind: SocketAddr, target: SocketAddr, rules: Rules, totals: Arc<Totals>) -> Self {
        let port = Self {
            bind,
            datagrams: false,
            target,
            home: None,
            rules: Mutex::new(Arc::new(Rules::default())),
            max_sessions: AtomicU32::new(0),
            idle_slots: AtomicU32::new(0),
            connect_slots: AtomicU32::new(0),
            state: AtomicU8::new(OPEN),
            unwatched: AtomicBool::new(false),
            narrowed: AtomicBool::new(false),
            active: AtomicU32::new(0),
            elsewhere: AtomicU32::new(0),
            begun_elsewhere: AtomicU64::new(UNTOLD),
            pace: Mutex::new(Pace::default()),
            total: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            connect_failures: AtomicU64::new(0),
            idle_timeouts: AtomicU64::new(0),
            totals,
        };
        port.set_rules(rules);
        port.settle_narrowed();
        port
    }

    /// The same for datagrams.
    pub fn of_datagrams(
        bind: SocketAddr,
        target: SocketAddr,
        rules: Rules,
        totals: Arc<Totals>,
    ) -> Self {
        Self {
            datagrams: true,
            ..Self::new(bind, target, rules, totals)
        }
    }

    /// The same for a container whose namespace may be among those.
    pub fn at_home(self, container: ContainerId, namespaces: &Arc<ContainerNamespaces>) -> Self {
        Self {
            home: Some((container, Arc::clone(namespaces))),
            ..self
        }
    }

    /// Its clients send datagrams.
    pub fn takes_datagrams(&self) -> bool {
        self.datagrams
    }

    /// Session counts of the process.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The address the listener really has.
    pub fn bind(&self) -> SocketAddr {
        self.bind
    }

    /// Where sessions are led.
    pub fn target(&self) -> SocketAddr {
        self.target
    }

    /// A socket that `begin` makes towards the target: inside its container where that is possible, else on
    /// the host. The bytes of its session are counted by `permit`.
    ///
    /// # Errors
    /// What `begin` answers.
    pub fn begin(
        &self,
        permit: &mut SessionPermit,
        begin: impl Fn(&SocketAddr, Source) -> Result<OwnedFd, Errno>,
    ) -> Result<OwnedFd, Errno> {
        let namespace = self.home.as_ref().and_then(|(id, all)| all.of(*id));
        if let Some(namespace) = namespace
            && let Some(begun) =
                namespace.begin(&self.target, || begin(&self.target, Source::Target))
        {
            permit.namespace = Some(namespace);
            return begun;
        }
        begin(&self.target, Source::Any)
    }

    /// Replaces the rules: admission at once, the idle timeout of sessions under way when their
    /// timer comes up the next time (within two minutes). Sessions of clients that are let in no more
    /// end with [`Relay::shut_out`](super::Relay::shut_out).
    pub fn set_rules(&self, rules: Rules) {
        self.max_sessions.store(rules.max_sessions, Relaxed);
        self.idle_slots
            .store(rules.idle_timeout.map_or(0, slots), Relaxed);
        self.connect_slots
            .store(slots(rules.connect_timeout), Relaxed);
        let mut known = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let fewer = (!rules.allowed.is_empty() && rules.allowed != known.allowed)
            || (rules.local_only && !known.local_only);
        *known = Arc::new(rules);
        drop(known);
        if fewer {
            self.narrowed.store(true, Relaxed);
        }
    }

    /// Sessions may be there whose clients are let in no more.
    pub fn is_narrowed(&self) -> bool {
        self.narrowed.load(Relaxed)
    }

    /// They have been looked for.
    pub(super) fn settle_narrowed(&self) {
        self.narrowed.store(false, Relaxed);
    }

    /// Idle timeout in wheel slots; 0 means none.
    pub fn idle_slots(&self) -> u32 {
        self.idle_slots.load(Relaxed)
    }

    /// Connect timeout in wheel slots.
    pub fn connect_slots(&self) -> u32 {
        self.connect_slots.load(Relaxed)
    }

    /// Turns new clients away from now on.
    pub fn refuse(&self) {
        self.state.fetch_max(REFUSING, Relaxed);
    }

    /// Says that its listener could not be watched and is closed.
    pub fn set_unwatched(&self) {
        self.unwatched.store(true, Relaxed);
    }

    /// Nobody accepts its clients, and it has to be opened anew.
    pub fn is_unwatched(&self) -> bool {
        self.unwatched.load(Relaxed)
    }

    /// Marks all sessions to be reset at the next sweep.
    pub fn cut(&self) {
        self.state.store(CUT, Relaxed);
    }

    /// A sweep must reset the sessions of this port.
    pub fn is_cut(&self) -> bool {
        self.state.load(Relaxed) == CUT
    }

    /// After a sweep of a port that is only disabled: back to refusing.
    pub fn settle_refusing(&self) {
        let _ = self.state.compare_exchange(CUT, REFUSING, Relaxed, Relaxed);
    }

    /// Judges a client and gives it a permit.
    ///
    /// # Errors
    /// Why it was turned away; this is counted here.
    pub fn admit(
        self: &Arc<Self>,
        peer: IpAddr,
        local: impl Fn() -> Option<IpAddr>,
    ) -> Result<SessionPermit, Refusal> {
        self.judge(peer, local)
            .and_then(|()| self.permit())
            .inspect_err(|refusal| match refusal {
                Refusal::TotalLimit => self.count_shed(),
                _ => self.count_refused(),
            })
    }

    /// Judges a client by all but the limits of sessions. A refusal is not counted here.
    ///
    /// # Errors
    /// Why it must be turned away.
    pub fn judge(&self, peer: IpAddr, local: impl Fn() -> Option<IpAddr>) -> Result<(), Refusal> {
        if self.state.load(Relaxed) != OPEN {
            return Err(Refusal::Disabled);
        }
        let rules = self.lets_in(peer, local)?;
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        if !pace.allows(rules.new_per_second, Instant::now()) {
            return Err(Refusal::TooFast);
        }
        Ok(())
    }

    /// Judges a client by where it is alone. Answers the rules. A refusal is not counted here.
    ///
    /// # Errors
    /// Why it must be turned away.
    pub fn lets_in(
        &self,
        peer: IpAddr,
        local: impl Fn() -> Option<IpAddr>,
    ) -> Result<Arc<Rules>, Refusal> {
        let rules = Arc::clone(&self.rules.lock().unwrap_or_else(PoisonError::into_inner));
        let peer = peer.to_canonical();
        if !rules.allowed.is_empty() && !rules.allowed.iter().any(|net| net.contains(peer)) {
            return Err(Refusal::Network);
        }
        // A client on this host reaches us from a loopback address, or, when it names another
        // address of the host, from that very address.
        if rules.local_only
            && !peer.is_loopback()
            && local().is_none_or(|local| local.to_canonical() != peer)
        {
            return Err(Refusal::NotLocal);
        }
        Ok(rules)
    }

    /// Gives a client that was judged a permit. A refusal is not counted here.
    ///
    /// # Errors
    /// The limit that is reached.
    pub fn permit(self: &Arc<Self>) -> Result<SessionPermit, Refusal> {
        self.permit_within(|own| self.totals.room(own))
    }

    /// The same in the place of a session of this port that has just ended for it, which leaves other
    /// ports no less.
    ///
    /// # Errors
    /// The limit that is reached.
    pub fn permit_again(self: &Arc<Self>) -> Result<SessionPermit, Refusal> {
        self.permit_within(|_| self.totals.limit())
    }

    fn permit_within(
        self: &Arc<Self>,
        room: impl Fn(u32) -> u32,
    ) -> Result<SessionPermit, Refusal> {
        let limit = self.max_sessions.load(Relaxed);
        let elsewhere = self.elsewhere.load(Relaxed);
        if limit != 0 && elsewhere >= limit {
            return Err(Refusal::PortLimit);
        }
        // 0 would be no limit, and that much is left of one.
        let own = take(&self.active, limit.saturating_sub(elsewhere)).ok_or(Refusal::PortLimit)?;
        if take(&self.totals.active, room(own)).is_none() {
            self.active.fetch_sub(1, Relaxed);
            return Err(Refusal::TotalLimit);
        }
        self.total.fetch_add(1, Relaxed);
        self.totals.admitted.fetch_add(1, Relaxed);
        Ok(SessionPermit {
            port: Arc::clone(self),
            namespace: None,
        })
    }

    /// Counts a client that was turned away.
    pub fn count_refused(&self) {
        self.refused.fetch_add(1, Relaxed);
    }

    /// Counts a client that was turned away for lack of descriptors or memory, or by the total limit.
    pub fn count_shed(&self) {
        self.count_refused();
        self.totals.shed.fetch_add(1, Relaxed);
    }

    /// Counts a session whose container could not be reached.
    pub fn count_connect_failure(&self) {
        self.connect_failures.fetch_add(1, Relaxed);
    }

    /// Counts a session that was silent too long.
    pub fn count_idle_timeout(&self) {
        self.idle_timeouts.fetch_add(1, Relaxed);
    }

    fn count_bytes(&self, inbound: u64, outbound: u64) {
        if inbound != 0 {
            self.bytes_in.fetch_add(inbound, Relaxed);
        }
        if outbound != 0 {
            self.bytes_out.fetch_add(outbound, Relaxed);
        }
    }

    /// Tells what was counted of clients of this port that are served past the relay, if that may be:
    /// the limits are for all. Those that have begun since the last time leave less of the rate to the
    /// relay's.
    pub fn note_elsewhere(&self, counted: Option<&Counters>) {
        self.elsewhere
            .store(counted.map_or(0, |it| it.active), Relaxed);
        let total = counted.map_or(UNTOLD, |it| it.total);
        let before = self.begun_elsewhere.swap(total, Relaxed);
        if before == UNTOLD || total == UNTOLD || total <= before {
            return;
        }
        let per_second = {
            let rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
            rules.new_per_second
        };
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        pace.charge(total - before, per_second, Instant::now());
    }

    /// Sessions now.
    pub fn active(&self) -> u32 {
        self.active.load(Relaxed)
    }

    /// All counters.
    pub fn counters(&self) -> Counters {
        Counters {
            active: self.active.load(Relaxed),
            total: self.total.load(Relaxed),
            refused: self.refused.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            connect_failures: self.connect_failures.load(Relaxed),
            idle_timeouts: self.idle_timeouts.load(Relaxed),
            ..Counters::default()
        }
    }
}

/// Raises a count unless that would pass the limit (0 = no limit), and answers the new one.
fn take(count: &AtomicU32, limit: u32) -> Option<u32> {
    count
        .fetch_update(Relaxed, Relaxed, |now| {
            (limit == 0 || now < limit).then(|| now.saturating_add(1))
        })
        .ok()
        .map(|before| before.saturating_add(1))
}

/// The place of one session in the counts of its port and of the process.
#[derive(Debug)]
pub struct SessionPermit {
    port: Arc<Port>,
    /// Where it goes past its container's links.
    namespace: Option<Arc<ContainerNamespace>>,
}

impl SessionPermit {
    /// The port it belongs to.
    pub fn port(&self) -> &Arc<Port> {
        &self.port
    }

    /// Counts delivered bytes.
    pub fn count_bytes(&self, inbound: u64, outbound: u64) {
        self.port.count_bytes(inbound, outbound);
        if let Some(namespace) = &self.namespace {
            namespace.carried().count(inbound, outbound);
        }
    }
}

impl Drop for SessionPermit {
    fn drop(&mut self) {
        self.port.active.fetch_sub(1, Relaxed);
        self.port.totals.active.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(rules: Rules, limit: u32) -> Arc<Port> {
        let totals = Arc::new(Totals::default());
        totals.set_limit(limit);
        let address = "127.0.0.1:1".parse().unwrap();
        Arc::new(Port::new(address, address, rules, totals))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn seats_bound_the_sessions_of_a_port_and_are_given_back() {
        let rules = Rules {
            max_sessions: 2,
            ..Rules::default()
        };
        let port = port(rules, 0);
        let a = port.admit(ip("10.0.0.1"), || None).unwrap();
        let _b = port.admit(ip("10.0.0.1"), || None).unwrap();
        assert_eq!(
            port.admit(ip("10.0.0.1"), || None).unwrap_err(),
            Refusal::PortLimit
        );
        drop(a);
        let _c = port.admit(ip("10.0.0.1"), || None).unwrap();
        let counters = port.counters();
        assert_eq!(
            (counters.active, counters.total, counters.refused),
            (2, 3, 1)
        );
    }

    #[test]
    fn a_seconds_worth_may_come_at_once_and_the_rest_in_time() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let at_once = (0..50).filter(|_| pace.allows(10, start)).count();
        assert_eq!(at_once, 11);
        let later = start + Duration::from_millis(500);
        assert_eq!((0..50).filter(|_| pace.allows(10, later)).count(), 5);
        assert!((0..50).all(|_| pace.allows(0, later)), "no limit");
    }

    #[test]
    fn clients_served_elsewhere_take_their_seats() {
        let port = port(
            Rules {
                max_sessions: 2,
                ..Rules::default()
            },
            0,
        );
        let counted = |active| Counters {
            active,
            ..Counters::default()
        };
        port.note_elsewhere(Some(&counted(1)));
        let permit = port.admit(ip("10.0.0.1"), || None).unwrap();
        assert_eq!(
            port.admit(ip("10.0.0.1"), || None).unwrap_err(),
            Refusal::PortLimit
        );
        drop(permit);
        port.note_elsewhere(Some(&counted(2)));
        assert_eq!(
            port.admit(ip("10.0.0.1"), || None).unwrap_err(),
            Refusal::PortLimit
        );
        port.note_elsewhere(None);
        assert!(port.admit(ip("10.0.0.1"), || None).is_ok());
    }

    #[test]
    fn clients_served_elsewhere_use_up_the_rate_of_the_port() {
        let rules = Rules {
            new_per_second: 10,
            ..Rules::default()
        };
        let port = port(rules, 0);
        let begun = |total| Counters {
            total,
            ..Counters::default()
        };
        // What had begun before is no word on the rate of now.
        for counted in [Some(1000), None, Some(5000), Some(4000), Some(4000)] {
            port.note_elsewhere(counted.map(begun).as_ref());
        }
        assert!(port.admit(ip("10.0.0.1"), || None).is_ok());
        port.note_elsewhere(Some(&begun(4100)));
        assert_eq!(
            port.admit(ip("10.0.0.1"), || None).unwrap_err(),
            Refusal::TooFast
        );

        let (mut pace, start) = (Pace::default(), Instant::now());
        pace.charge(4, 10, start);
        assert_eq!((0..50).filter(|_| pace.allows(10, start)).count(), 7);
        // As many as may come, by the second: nothing is left, and no debt grows.
        for second in 1..100 {
            let now = start + Duration::from_secs(second);
            pace.charge(10, 10, now);
            assert!(!pace.allows(10, now));
        }
        pace.charge(u64::MAX, 10, start + Duration::from_secs(100));
        let later = start + Duration::from_secs(103);
        assert_eq!((0..50).filter(|_| pace.allows(10, later)).count(), 11);
        pace.charge(u64::MAX, 0, later);
        assert!(pace.allows(0, later));
    }

    #[test]
    fn the_total_limit_leaves_the_count_of_the_port_right() {
        let port = port(Rules::default(), 1);
        let permit = port.admit(ip("10.0.0.1"), || None).unwrap();
        assert_eq!(
            port.admit(ip("10.0.0.1"), || None).unwrap_err(),
            Refusal::TotalLimit
        );
        assert_eq!(port.active(), 1);
        drop(permit);
        assert_eq!(port.active(), 0);
        assert_eq!(port.totals.active(), 0);
    }

    #[test]
    fn full_ports_leave_the_others_their_few() {
        let flooded = port(Rules::default(), 1024);
        let totals = Arc::clone(&flooded.totals);
        let admit = |port: &Arc<Port>| port.admit(ip("10.0.0.1"), || None);
        let mut silent: Vec<SessionPermit> =
            (0..2000).filter_map(|_| admit(&flooded).ok()).collect();
        assert_eq!(silent.len(), 768, "three quarters");
        let address = "127.0.0.1:2".parse().unwrap();
        let mut permits = Vec::new();
        for _ in 0..64 {
            let other = Arc::new(Port::new(
                address,
                address,
                Rules::default(),
                Arc::clone(&totals),
            ));
            permits.extend((0..5).filter_map(|_| admit(&other).ok()));
        }
        assert_eq!(permits.len(), 64 * 4);
        assert_eq!(totals.active(), 1024);
        // What one gives up is free for those with few alone.
        permits.pop();
        assert_eq!(admit(&flooded).unwrap_err(), Refusal::TotalLimit);
        assert_eq!(flooded.active(), 768);
        // A client may take another's place.
        silent.pop();
        assert_eq!(admit(&flooded).unwrap_err(), Refusal::TotalLimit);
        assert!(flooded.permit_again().is_ok());
    }

    #[test]
    fn allowed_networks_and_locality_are_kept() {
        let rules = Rules {
            allowed: vec![ClientNetwork {
                address: ip("10.0.0.0"),
                prefix: 8,
            }],
            ..Rules::default()
        };
        let ranged = port(rules, 0);
        assert!(ranged.admit(ip("10.9.9.9"), || None).is_ok());
        assert!(ranged.admit(ip("::ffff:10.9.9.9"), || None).is_ok());
        assert_eq!(
            ranged.admit(ip("11.0.0.1"), || None).unwrap_err(),
            Refusal::Network
        );
        let local = port(
            Rules {
                local_only: true,
                ..Rules::default()
            },
            0,
        );
        assert!(local.admit(ip("127.0.0.1"), || None).is_ok());
        assert!(local.admit(ip("10.0.0.5"), || Some(ip("10.0.0.5"))).is_ok());
        assert_eq!(
            local
                .admit(ip("10.0.0.6"), || Some(ip("10.0.0.5")))
                .unwrap_err(),
            Refusal::NotLocal
        );
    }

    #[test]
    fn a_disabled_port_admits_nobody() {
        let port = port(Rules::default(), 0);
        port.refuse();
        assert_eq!(
            port.admit(ip("10.0.0.1"), || None).unwrap_err(),
            Refusal::Disabled
        );
        port.cut();
        assert!(port.is_cut());
    }
}
