//! The dataplane's end of the `desired` region: makes the running ports what control wants.
//!
//! In: the desired region (a look at every ring of the doorbell and every second), links that go
//! away. Out: ports opened, changed and closed at the relay; a status per port and "looked at up
//! to here" on the [`Board`]; the containers to sample, for the collector. Invariants: each row's
//! status names the region and generation it answers; a missing, damaged or replaced region leaves
//! what runs as it is; a guarded row never forwards once its link is gone, whether or not control
//! is alive.

mod lift;
mod networks;
pub mod plan;

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::ReadError;
use shared::desired::{
    ClientNetwork, ContainerRow, DesiredReader, DesiredSnapshot, Drain, NodeRow, PortKey, PortRow,
    Protocol,
};
use shared::ids::{ContainerId, Generation, KernelId, RegionId};
use shared::observed::{Applied, ForwardPath, PortState, PortStatus, RelayEngine};

use self::plan::{Known, Step, plan};
use crate::board::{Board, Changes, Entry};
use crate::forward::kernel::{KernelPath, KernelPort};
use crate::forward::relay::port::{Counters, Port, Rules};
use crate::forward::relay::{OpenError, Relay};
use crate::log_limit::LogLimit;
use crate::sys::netlink::{LinkChanges, LinkLookup};

/// How long the ports of an earlier region are kept when a new one does not know them. Control
/// publishes what it adopts as soon as Docker has listed its containers once.
const ORPHAN_GRACE: Duration = Duration::from_secs(60);
/// Distance of the looks at every guarded link, beside the notifications.
const GUARD_INTERVAL: Duration = Duration::from_secs(10);
/// Distance of the attempts to serve a row that was refused.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// What holds when neither row nor region says otherwise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Client networks that may use ports at all; none means all.
    pub allowed: Vec<ClientNetwork>,
    /// Sessions of one port; 0 means no limit.
    pub max_sessions: u32,
    /// Sessions of all ports; 0 means no limit but that of descriptors.
    pub total_sessions: u32,
    /// Idle timeout; zero means none.
    pub idle_timeout: Duration,
    /// Connect timeout.
    pub connect_timeout: Duration,
    /// Time for sessions to end when the process stops; zero cuts them.
    pub drain: Duration,
    /// Distance of two passes of the collector.
    pub sample_interval: Duration,
}

fn or_ms(ms: u32, default: Duration) -> Duration {
    if ms == 0 {
        default
    } else {
        Duration::from_millis(u64::from(ms))
    }
}

fn or_count(count: u32, default: u32) -> u32 {
    if count == 0 { default } else { count }
}

impl Defaults {
    /// These, overridden by what the region says of the node.
    pub fn with(&self, node: Option<&NodeRow>) -> Self {
        let Some(node) = node else {
            return self.clone();
        };
        Self {
            allowed: self.allowed.clone(),
            max_sessions: or_count(node.default_max_sessions, self.max_sessions),
            total_sessions: or_count(node.total_max_sessions, self.total_sessions),
            idle_timeout: or_ms(node.idle_timeout_ms, self.idle_timeout),
            connect_timeout: or_ms(node.connect_timeout_ms, self.connect_timeout),
            drain: or_ms(node.drain_ms, self.drain),
            sample_interval: or_ms(node.sample_interval_ms, self.sample_interval),
        }
    }

    fn rules(&self, row: &PortRow) -> Rules {
        let idle = or_ms(row.idle_timeout_ms, self.idle_timeout);
        Rules {
            max_sessions: or_count(row.max_sessions, self.max_sessions),
            connect_timeout: or_ms(row.connect_timeout_ms, self.connect_timeout),
            idle_timeout: (!idle.is_zero()).then_some(idle),
            allowed: networks::both(&self.allowed, &row.networks),
            local_only: row.local_only,
            new_per_second: row.new_per_second,
        }
    }
}

/// Descriptors kept for other things than sessions: a quarter, half of which the collector may
/// hold, the rest for listeners, pipes and accidents.
pub fn kept_descriptors(descriptors: u64) -> u64 {
    (descriptors / 4).clamp(32, 65_536)
}

fn session_room(descriptors: u64) -> u32 {
    u32::try_from(descriptors.saturating_sub(kept_descriptors(descriptors)) / 2)
        .unwrap_or(u32::MAX)
        .max(1)
}

#[derive(Debug)]
struct Running {
    port: Option<Arc<Port>>,
    /// While the kernel path serves it too.
    kernel: Option<Arc<KernelPort>>,
    /// What the board knows of the line above.
    kernel_told: bool,
    /// Keeps the port for the kernel path: nothing relays datagrams.
    datagrams: Option<UdpSocket>,
    state: PortState,
    path: ForwardPath,
    reason: String,
    base: Counters,
    /// Acknowledged so far; a removal under way counts.
    generation: Generation,
    retry_at: Option<Instant>,
    orphan_since: Option<Instant>,
}

#[derive(Debug)]
struct Draining {
    key: PortKey,
    kernel_id: KernelId,
    region: RegionId,
    /// The removal this acknowledges; `None` when another row has taken the port's place.
    removal: Option<Generation>,
    link_index: Option<u32>,
    port: Arc<Port>,
    /// Flows of the kernel path that may finish.
    kernel: Option<Arc<KernelPort>>,
    base: Counters,
    until: Instant,
}

impl Draining {
    fn is_over(&self, now: Instant) -> bool {
        let flows = self.kernel.as_ref().map_or(0, |it| it.counters().active);
        now >= self.until || (self.port.active() == 0 && flows == 0)
    }
}

/// The link. One thread owns it.
#[derive(Debug)]
pub struct Link {
    reader: DesiredReader,
    relay: Relay,
    board: Board,
    lookup: LinkLookup,
    defaults: Defaults,
    settings: Defaults,
    descriptors: u64,
    known: BTreeMap<PortKey, Known>,
    running: BTreeMap<PortKey, Running>,
    draining: Vec<Draining>,
    applied: Option<Applied>,
    guard_at: Instant,
    kernel: Option<KernelPath>,
    /// Why there is none though it is wanted.
    kernel_missing: Option<String>,
    containers: BTreeMap<ContainerId, ContainerRow>,
    unclaimed_at: Option<Instant>,
    drains_counted: Instant,
    read_log: LogLimit,
}

fn sum(a: Counters, b: Counters) -> Counters {
    Counters {
        active: 0,
        total: a.total + b.total,
        refused: a.refused + b.refused,
        bytes_in: a.bytes_in + b.bytes_in,
        bytes_out: a.bytes_out + b.bytes_out,
        connect_failures: a.connect_failures + b.connect_failures,
        idle_timeouts: a.idle_timeouts + b.idle_timeouts,
        packets_in: a.packets_in + b.packets_in,
        packets_out: a.packets_out + b.packets_out,
    }
}

/// The link index a row is guarded by.
fn guard_of(row: &PortRow) -> Option<u32> {
    (row.link_guard && row.link_index != 0).then_some(row.link_index)
}

fn gone_reason(index: u32) -> String {
    format!("the container's link (interface {index}) is gone")
}

fn refusal_text(err: &OpenError) -> String {
    match err {
        OpenError::Listen(listen) => format!("{listen}: {}", listen.errno()),
        OpenError::Address(errno) => format!("{err}: {errno}"),
    }
}

impl Link {
    /// A link that runs nothing yet. `descriptors` is the limit of open descriptors.
    pub fn new(
        reader: DesiredReader,
        relay: Relay,
        board: Board,
        lookup: LinkLookup,
        defaults: Defaults,
        descriptors: u64,
    ) -> Self {
        let mut link = Self {
            reader,
            relay,
            board,
            lookup,
            settings: defaults.clone(),
            defaults,
            descriptors,
            known: BTreeMap::new(),
            running: BTreeMap::new(),
            draining: Vec::new(),
            applied: None,
            guard_at: Instant::now() + GUARD_INTERVAL,
            kernel: None,
            kernel_missing: None,
            containers: BTreeMap::new(),
            unclaimed_at: None,
            drains_counted: Instant::now(),
            read_log: LogLimit::default(),
        };
        link.set_total_limit();
        link
    }

    /// What holds now.
    pub fn settings(&self) -> &Defaults {
        &self.settings
    }

    /// The relay, for its counts.
    pub fn relay(&self) -> &Relay {
        &self.relay
    }

    fn set_total_limit(&mut self) {
        let room = session_room(self.descriptors);
        let wanted = self.settings.total_sessions;
        let limit = if wanted == 0 { room } else { wanted.min(room) };
        self.relay.totals().set_limit(limit);
    }

    /// Looks at the desired region and does what has changed. Answers the snapshot when it is a
    /// new one.
    pub fn look(&mut self, now: Instant) -> Option<Arc<DesiredSnapshot>> {
        let desired = match self.reader.snapshot() {
            Ok(desired) => desired,
            Err(err @ ReadError::Missing { .. }) => {
                tracing::trace!(%err, "no desired region yet");
                return None;
            }
            Err(err) => {
                if let Some(suppressed) = self.read_log.pass() {
                    tracing::warn!(
                        err = &err as &dyn std::error::Error,
                        suppressed,
                        "the desired region can't be read; what runs goes on as it is"
                    );
                }
                return None;
            }
        };
        let mark = Applied {
            region_id: desired.region_id,
            epoch: desired.epoch,
            generation: desired.committed,
        };
        if self.applied == Some(mark) {
            return None;
        }
        if desired.invalid_rows > 0
            && let Some(suppressed) = self.read_log.pass()
        {
            tracing::warn!(
                rows = desired.invalid_rows,
                suppressed,
                "the desired region holds rows that make no sense; they are left out"
            );
        }
        self.apply(&desired, mark, now);
        Some(desired)
    }

    fn apply(&mut self, desired: &DesiredSnapshot, mark: Applied, now: Instant) {
        let settings = self.defaults.with(desired.node.as_ref());
        if settings != self.settings {
            self.settings = settings;
            self.set_total_limit();
            for (key, running) in &self.running {
                if let (Some(port), Some(known)) = (&running.port, self.known.get(key)) {
                    port.set_rules(self.settings.rules(&known.row));
                }
            }
        }
        self.note_containers(desired, now);
        let mut changes = Changes::default();
        let mut cut = Vec::new();
        for step in plan(&self.known, desired) {
            match step {
                Step::Open(row) => {
                    let key = row.key();
                    self.serve(row, desired.region_id, Counters::default(), now);
                    changes.put.extend(self.entry(key));
                }
                Step::Replace(row) => {
                    let key = row.key();
                    let base = self.close(key, &mut cut, now, None);
                    self.serve(row, desired.region_id, base, now);
                    changes.put.extend(self.entry(key));
                }
                Step::Adjust(row) | Step::Acknowledge(row) => {
                    let key = row.key();
                    if let Some(running) = self.running.get_mut(&key) {
                        running.generation = row.generation;
                        running.orphan_since = None;
                        if let Some(port) = &running.port {
                            port.set_rules(self.settings.rules(&row));
                        }
                    }
                    self.note(row, desired.region_id);
                    changes.put.extend(self.entry(key));
                }
                Step::Retire { key, generation } => {
                    self.retire(
                        key,
                        desired.region_id,
                        generation,
                        &mut cut,
                        &mut changes,
                        now,
                    );
                }
                Step::Gone {
                    key,
                    kernel_id,
                    generation,
                } => {
                    if self.draining_status(key).is_none() {
                        self.withdraw(key);
                        changes
                            .put
                            .push(removed(key, kernel_id, desired.region_id, generation));
                    }
                }
                Step::Orphan(key) => {
                    if let Some(running) = self.running.get_mut(&key)
                        && running.orphan_since.is_none()
                    {
                        tracing::info!(
                            port = key.host_port,
                            "a new region does not know this port"
                        );
                        running.orphan_since = Some(now);
                    }
                }
            }
        }
        self.relay.cut(&cut);
        let lifted = self.lift_all();
        changes
            .put
            .retain(|entry| !lifted.contains(&entry.status.key));
        changes
            .put
            .extend(lifted.iter().filter_map(|key| self.entry(*key)));
        // Rows whose removal control has taken note of, and those of an earlier life.
        if desired.committed != Generation(0) {
            changes.forget = self
                .board
                .port_keys()
                .into_iter()
                .filter(|key| {
                    !self.running.contains_key(key)
                        && self.draining_status(*key).is_none()
                        && !desired.removed_ports.iter().any(|row| row.key == *key)
                        && !changes.put.iter().any(|entry| entry.status.key == *key)
                })
                .collect();
        }
        changes.applied = Some(mark);
        self.publish(changes);
        self.applied = Some(mark);
    }

    fn note(&mut self, row: PortRow, region: RegionId) {
        self.known.insert(row.key(), Known { row, region });
    }

    /// Starts to serve a row; whatever comes of it is noted.
    fn serve(&mut self, row: PortRow, region: RegionId, base: Counters, now: Instant) {
        let key = row.key();
        let mut running = Running {
            port: None,
            kernel: None,
            kernel_told: false,
            datagrams: None,
            state: PortState::Refused,
            path: ForwardPath::None,
            reason: String::new(),
            base,
            generation: row.generation,
            retry_at: None,
            orphan_since: None,
        };
        if row.observe_only {
            running.state = PortState::Serving;
            running.path = ForwardPath::Engine;
        } else if row.protocol == Protocol::Udp {
            self.reserve_datagrams(&row, &mut running, now);
        } else {
            let bind = SocketAddr::new(row.bind, row.host_port);
            let target = SocketAddr::new(row.target, row.target_port);
            match self.relay.open(bind, target, self.settings.rules(&row)) {
                Ok(port) => {
                    // Looked up after the watch was opened, so a link that goes away later is told.
                    match guard_of(&row) {
                        Some(index) if !self.lookup.exists(index) => {
                            port.refuse();
                            running.state = PortState::Disabled;
                            running.reason = gone_reason(index);
                        }
                        _ => {
                            running.state = PortState::Serving;
                            running.path = ForwardPath::Relay;
                        }
                    }
                    running.port = Some(port);
                }
                Err(err) => {
                    running.reason = refusal_text(&err);
                    running.retry_at = Some(now + RETRY_INTERVAL);
                }
            }
        }
        tracing::debug!(
            port = key.host_port,
            kernel_id = %row.kernel_id,
            state = %running.state,
            reason = running.reason,
            "port row applied"
        );
        self.running.insert(key, running);
        self.note(row, region);
    }

    /// Datagrams go by the kernel path or not at all; the port is held while it may take them.
    fn reserve_datagrams(&self, row: &PortRow, running: &mut Running, now: Instant) {
        if self.kernel.is_none() {
            running.reason = "UDP is forwarded by the kernel path only".to_owned();
            return;
        }
        let bound = UdpSocket::bind((row.bind, row.host_port)).and_then(|socket| {
            socket.set_nonblocking(true)?;
            Ok(socket)
        });
        match bound {
            Ok(socket) => running.datagrams = Some(socket),
            Err(err) => {
                running.reason = format!("cannot bind {}:{}: {err}", row.bind, row.host_port);
                running.retry_at = Some(now + RETRY_INTERVAL);
            }
        }
    }

    /// Closes the listener of a running row and lets its sessions drain or adds it to those to be
    /// cut. Answers what it had counted. With `removal`, the status waits for the sessions.
    fn close(
        &mut self,
        key: PortKey,
        cut: &mut Vec<Arc<Port>>,
        now: Instant,
        removal: Option<Generation>,
    ) -> Counters {
        let (Some(running), Some(known)) = (self.running.remove(&key), self.known.remove(&key))
        else {
            return Counters::default();
        };
        let base = running.base;
        let Some(port) = running.port else {
            self.withdraw(key);
            return base;
        };
        self.relay.close(&port);
        let drains = matches!(known.row.drain, Drain::Within { ms } if ms > 0);
        let kernel = if drains && removal.is_some() {
            self.drain_flows(key, running.kernel.clone())
        } else {
            self.withdraw(key);
            None
        };
        let flows = running.kernel.as_ref().map(|it| it.counters());
        let total = sum(sum(base, port.counters()), flows.unwrap_or_default());
        match known.row.drain {
            Drain::Within { ms } if ms > 0 && (port.active() > 0 || kernel.is_some()) => {
                // Flows that do not drain have counted their last.
                let base = match (&kernel, flows) {
                    (None, Some(flows)) => sum(base, flows),
                    _ => base,
                };
                self.draining.push(Draining {
                    key,
                    kernel_id: known.row.kernel_id,
                    region: known.region,
                    removal,
                    link_index: guard_of(&known.row),
                    port: Arc::clone(&port),
                    kernel,
                    base,
                    until: now + Duration::from_millis(u64::from(ms)),
                });
            }
            _ => cut.push(Arc::clone(&port)),
        }
        total
    }

    fn retire(
        &mut self,
        key: PortKey,
        region: RegionId,
        generation: Generation,
        cut: &mut Vec<Arc<Port>>,
        changes: &mut Changes,
        now: Instant,
    ) {
        let Some(kernel_id) = self.known.get(&key).map(|known| known.row.kernel_id) else {
            return;
        };
        let counted = self.close(key, cut, now, Some(generation));
        tracing::debug!(port = key.host_port, %kernel_id, "port row retired");
        if let Some(draining) = self.draining.iter_mut().rev().find(|it| it.key == key)
            && draining.removal == Some(generation)
        {
            draining.region = region;
            changes.put.push(draining_entry(draining));
            return;
        }
        let mut entry = removed(key, kernel_id, region, generation);
        entry.base = counted;
        changes.put.push(entry);
    }

    /// The removal that still drains under this key, if any.
    fn draining_status(&self, key: PortKey) -> Option<&Draining> {
        self.draining
            .iter()
            .find(|it| it.key == key && it.removal.is_some())
    }

    fn entry(&self, key: PortKey) -> Option<Entry> {
        let (running, known) = (self.running.get(&key)?, self.known.get(&key)?);
        let mut status = PortStatus::new(key, known.row.kernel_id, known.region, running.state);
        status.acknowledged = running.generation;
        status.path = running.path;
        if running.path == ForwardPath::Relay {
            status.engine = RelayEngine::Splice;
        }
        status.reason.clone_from(&running.reason);
        Some(Entry {
            status,
            port: running.port.clone(),
            kernel: running.kernel.clone(),
            base: running.base,
        })
    }

    /// Disables guarded rows whose link is gone: sessions are cut, new clients turned away.
    pub fn links_changed(&mut self, found: &LinkChanges) {
        if found.gone.is_empty() && !found.overflow {
            return;
        }
        let mut guarded: Vec<u32> = self
            .running
            .iter()
            .filter(|(_, running)| running.state != PortState::Disabled)
            .filter_map(|(key, _)| guard_of(&self.known.get(key)?.row))
            .chain(self.draining.iter().filter_map(|it| it.link_index))
            .collect();
        guarded.sort_unstable();
        guarded.dedup();
        guarded.retain(|index| {
            found.gone.contains(index) || (found.overflow && !self.lookup.exists(*index))
        });
        if !guarded.is_empty() {
            self.disable(&guarded);
        }
    }

    fn disable(&mut self, gone: &[u32]) {
        let is_gone = |index: Option<u32>| index.filter(|index| gone.contains(index));
        let mut ports: Vec<Arc<Port>> = self
            .draining
            .iter()
            .filter(|it| is_gone(it.link_index).is_some())
            .map(|it| Arc::clone(&it.port))
            .collect();
        let mut keys = Vec::new();
        for (key, running) in &mut self.running {
            let guard = self.known.get(key).and_then(|known| guard_of(&known.row));
            let Some(index) = is_gone(guard) else {
                continue;
            };
            if running.state == PortState::Disabled {
                continue;
            }
            running.state = PortState::Disabled;
            running.path = ForwardPath::None;
            running.reason = gone_reason(index);
            running.retry_at = None;
            ports.extend(running.port.clone());
            keys.push(*key);
        }
        // First the deed, then the word.
        self.relay.disable(&ports);
        for key in &keys {
            self.withdraw(*key);
        }
        for key in &keys {
            tracing::info!(
                port = key.host_port,
                "port disabled, the container's link is gone"
            );
        }
        let put = keys.iter().filter_map(|key| self.entry(*key)).collect();
        self.publish(Changes {
            put,
            ..Changes::default()
        });
    }

    fn publish(&mut self, changes: Changes) {
        // First the deed, then the word.
        if let Some(kernel) = &mut self.kernel {
            kernel.settle();
        }
        let (put, forget, applied) = (changes.put.clone(), changes.forget.clone(), changes.applied);
        let Err(err) = self.board.publish_changes(changes) else {
            return;
        };
        tracing::error!(
            %err,
            "not all statuses of ports fit the observed region: restart the dataplane, it takes \
             the desired region's sizes at its start"
        );
        // One by one, so that those that fit are answered.
        let alone = |change: Changes| {
            if let Err(err) = self.board.publish_changes(change) {
                tracing::debug!(%err, "a status is left out");
            }
        };
        alone(Changes {
            forget,
            ..Changes::default()
        });
        for entry in put {
            alone(Changes {
                put: vec![entry],
                ..Changes::default()
            });
        }
        alone(Changes {
            applied,
            ..Changes::default()
        });
    }

    /// Sessions are draining: look again soon.
    pub fn is_draining(&self) -> bool {
        !self.draining.is_empty()
    }

    /// What is due by the clock: the end of drains, another try for refused rows, a look at every
    /// guarded link, the end of orphans.
    pub fn tick(&mut self, now: Instant) {
        self.finish_drains(now);
        self.retry(now);
        self.kernel_turn(now);
        for running in self.running.values() {
            if let (Some(port), kernel) = (&running.port, &running.kernel) {
                port.note_elsewhere(kernel.as_ref().map_or(0, |it| it.counters().active));
            }
        }
        self.retire_orphans(now);
        if now >= self.guard_at {
            self.guard_at = now + GUARD_INTERVAL;
            self.links_changed(&LinkChanges {
                gone: Vec::new(),
                overflow: true,
            });
        }
    }

    fn finish_drains(&mut self, now: Instant) {
        if self.draining.is_empty() {
            return;
        }
        self.count_drains(now);
        let overdue: Vec<Arc<Port>> = self
            .draining
            .iter()
            .filter(|it| now >= it.until)
            .map(|it| Arc::clone(&it.port))
            .collect();
        self.relay.cut(&overdue);
        // Flows first: their last counts belong to the last status.
        let flows: Vec<(PortKey, Arc<KernelPort>)> = self
            .draining
            .iter()
            .filter(|it| it.is_over(now))
            .filter_map(|it| Some((it.key, it.kernel.clone()?)))
            .collect();
        for (key, port) in flows {
            self.finish_flows(key, &port);
        }
        let mut changes = Changes::default();
        let running = &self.running;
        self.draining.retain(|it| {
            if !it.is_over(now) {
                return true;
            }
            if let Some(generation) = it.removal
                && !running.contains_key(&it.key)
            {
                let mut entry = removed(it.key, it.kernel_id, it.region, generation);
                entry.base = sum(it.base, it.port.counters());
                if let Some(kernel) = &it.kernel {
                    entry.base = sum(entry.base, kernel.counters());
                }
                changes.put.push(entry);
            }
            false
        });
        if !changes.put.is_empty() {
            self.publish(changes);
        }
    }

    fn retry(&mut self, now: Instant) {
        let due: Vec<PortKey> = self
            .running
            .iter()
            .filter(|(_, running)| running.retry_at.is_some_and(|at| now >= at))
            .map(|(key, _)| *key)
            .collect();
        let mut put = Vec::new();
        for key in due {
            let (Some(known), Some(running)) = (self.known.get(&key), self.running.get(&key))
            else {
                continue;
            };
            let (row, region, base) = (known.row.clone(), known.region, running.base);
            let before = (running.state, running.reason.clone());
            let orphan_since = running.orphan_since;
            self.serve(row, region, base, now);
            let after = self.running.get_mut(&key).map(|running| {
                running.orphan_since = orphan_since;
                (running.state, running.reason.clone())
            });
            if after != Some(before) {
                put.extend(self.entry(key));
            }
        }
        if !put.is_empty() {
            self.publish(Changes {
                put,
                ..Changes::default()
            });
            self.lift_and_publish();
        }
    }

    fn retire_orphans(&mut self, now: Instant) {
        let due: Vec<PortKey> = self
            .running
            .iter()
            .filter(|(_, running)| {
                running
                    .orphan_since
                    .is_some_and(|since| now >= since + ORPHAN_GRACE)
            })
            .map(|(key, _)| *key)
            .collect();
        if due.is_empty() {
            return;
        }
        let mut cut = Vec::new();
        for key in &due {
            tracing::info!(port = key.host_port, "port closed, no region wants it");
            self.close(*key, &mut cut, now, None);
        }
        self.relay.cut(&cut);
        self.publish(Changes {
            forget: due,
            ..Changes::default()
        });
    }

    /// Closes all listeners; sessions go on. What the region says afterwards is that nothing is
    /// served, so that control need not wait for the heartbeat to grow old.
    pub fn stop_accepting(&mut self) {
        for (key, running) in &mut self.running {
            if let Some(port) = &running.port {
                self.relay.close(port);
            }
            tracing::trace!(port = key.host_port, "listener closed");
            if running.path == ForwardPath::KernelPath {
                // Pinned: it needs no process.
                running.reason = "the dataplane has stopped, the kernel goes on".to_owned();
                continue;
            }
            running.state = PortState::Pending;
            running.path = ForwardPath::None;
            running.reason = "the dataplane has stopped".to_owned();
        }
        let keys: Vec<PortKey> = self.running.keys().copied().collect();
        let put = keys.iter().filter_map(|key| self.entry(*key)).collect();
        self.publish(Changes {
            put,
            ..Changes::default()
        });
    }

    /// Resets whatever still runs.
    pub fn cut_all(&mut self) {
        let ports: Vec<Arc<Port>> = self
            .running
            .values()
            .filter_map(|running| running.port.clone())
            .chain(self.draining.iter().map(|it| Arc::clone(&it.port)))
            .collect();
        self.relay.cut(&ports);
    }
}

/// "This port is gone, nothing is left of it."
fn removed(key: PortKey, kernel_id: KernelId, region: RegionId, generation: Generation) -> Entry {
    let mut status = PortStatus::new(key, kernel_id, region, PortState::Removed);
    status.acknowledged = generation;
    Entry {
        status,
        port: None,
        kernel: None,
        base: Counters::default(),
    }
}

fn draining_entry(it: &Draining) -> Entry {
    let mut status = PortStatus::new(it.key, it.kernel_id, it.region, PortState::Draining);
    status.acknowledged = it.removal.unwrap_or_default();
    status.path = ForwardPath::Relay;
    status.engine = RelayEngine::Splice;
    Entry {
        status,
        port: Some(Arc::clone(&it.port)),
        kernel: it.kernel.clone(),
        base: it.base,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_override_the_region_and_the_region_overrides_the_defaults() {
        let defaults = Defaults {
            allowed: Vec::new(),
            max_sessions: 10,
            total_sessions: 100,
            idle_timeout: Duration::from_secs(60),
            connect_timeout: Duration::from_secs(5),
            drain: Duration::from_secs(1),
            sample_interval: Duration::from_secs(5),
        };
        let node = NodeRow {
            default_max_sessions: 20,
            sample_interval_ms: 250,
            ..NodeRow::default()
        };
        let settings = defaults.with(Some(&node));
        assert_eq!(settings.max_sessions, 20);
        assert_eq!(settings.total_sessions, 100);
        assert_eq!(settings.sample_interval, Duration::from_millis(250));
        let mut row = PortRow::new(
            PortKey {
                protocol: Protocol::Tcp,
                host_port: 1,
            },
            KernelId::default(),
            shared::ids::ContainerId::default(),
            "127.0.0.1".parse().unwrap(),
            80,
        );
        assert_eq!(settings.rules(&row).max_sessions, 20);
        assert_eq!(
            settings.rules(&row).idle_timeout,
            Some(Duration::from_secs(60))
        );
        row.max_sessions = 3;
        row.idle_timeout_ms = 1500;
        assert_eq!(settings.rules(&row).max_sessions, 3);
        assert_eq!(
            settings.rules(&row).idle_timeout,
            Some(Duration::from_millis(1500))
        );
    }

    #[test]
    fn sessions_never_take_all_descriptors() {
        for descriptors in [64, 256, 1024, 20_000, 1 << 20] {
            let sessions = u64::from(session_room(descriptors));
            assert!(
                sessions * 2 + 16 <= descriptors,
                "{descriptors}: {sessions}"
            );
            assert!(sessions >= 1);
        }
        assert!(session_room(u64::MAX) > 1_000_000);
    }
}
