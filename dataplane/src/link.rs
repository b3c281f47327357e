//! The dataplane's end of the `desired` region: makes the running ports what control wants.
//!
//! In: the desired region (a look at every ring of the doorbell and every second), links that go
//! away. Out: ports opened, changed and closed at the relay; a status per port and "looked at up
//! to here" on the [`Board`]; the containers to sample, for the collector. Invariants: each row's
//! status names the region and generation it answers; a missing, damaged or replaced region leaves
//! what runs as it is; a guarded row never forwards once its link is gone, whether or not control
//! is alive.

mod drains;
mod guard;
mod lift;
mod networks;
pub mod plan;
mod rows;
mod settings;
mod stale_connections;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::{
    ContainerRow, DesiredChanges, DesiredReader, NodeRow, PortKey, PortRow, Protocol,
};
use shared::ids::{ContainerId, Generation, KernelId, RegionId};
use shared::log_limit::LogLimit;
use shared::observed::{
    Applied, ForwardPath, KernelPathCounters, PortState, PortStatus, RelayEngine,
};
use shared::{BatchError, ReadError};

use self::drains::{Draining, removed};
use self::guard::{gone_reason, guard_of};
use self::lift::{Due, cut};
use self::plan::{AppliedRow, Step, plan};
use self::rows::Rows;
use self::settings::session_room;
pub use self::settings::{Defaults, kept_descriptors};
use self::stale_connections::StaleConnections;
use crate::board::{Board, Changes, Entry};
use crate::forward::kernel_path::{KernelPath, KernelPort};
use crate::forward::relay::port::{Counters, Port};
use crate::forward::relay::{Engine, OpenError, Relay, Target};
use crate::sys::netlink::{LinkChanges, LinkLookup};

/// How long the ports of an earlier region are kept when a new one does not know them. It begins when
/// that region says anything at all, which control has it do once Docker has listed its containers:
/// what it adopts is published then.
const ORPHAN_GRACE: Duration = Duration::from_secs(60);
/// Distance of the looks at every guarded link, beside the notifications.
const GUARD_INTERVAL: Duration = Duration::from_secs(10);
/// Distance of the looks at every row and every port's path, beside those at what has changed.
const LIFT_ALL_INTERVAL: Duration = Duration::from_secs(30);
/// Distance of the attempts to serve a row that was refused.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Running {
    port: Option<Arc<Port>>,
    /// While the kernel path serves it too.
    kernel_port: Option<Arc<KernelPort>>,
    /// What the board knows of the line above.
    kernel_told: bool,
    /// Waits for sessions of the relay to end before it can take the kernel path.
    held_back: bool,
    state: PortState,
    path: ForwardPath,
    reason: String,
    base: Counters,
    /// What of `base` an earlier life had told of the kernel path's maps, until they are found.
    in_kernel_path: KernelPathCounters,
    /// Acknowledged so far; a removal under way counts.
    generation: Generation,
    retry_at: Option<Instant>,
    orphan_since: Option<Instant>,
}

/// When the heap has room to give back: rows have gone, as with many kernels that end at once.
#[derive(Debug, Default)]
struct Ebb {
    /// Most rows there were since.
    most: usize,
}

impl Ebb {
    /// What fewer rows leave is not worth it, bytes that a row takes being about a thousand.
    const LEAST: usize = 100;

    /// Whether it has come since the last time, now that there are so many.
    fn has_come(&mut self, rows: usize) -> bool {
        self.most = self.most.max(rows);
        let gone = self.most - rows;
        let come = gone >= Self::LEAST && gone >= self.most / 2;
        if come {
            self.most = rows;
        }
        come
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
    known: Rows,
    running: BTreeMap<PortKey, Running>,
    draining: Vec<Draining>,
    /// Ports that may still have a status though no region names them.
    settling: BTreeSet<PortKey>,
    /// Rules of these have become narrower in this look.
    narrowed: Vec<Arc<Port>>,
    guard_at: Instant,
    kernel_path: Option<KernelPath>,
    /// Why there is none though it is wanted.
    kernel_missing: Option<String>,
    containers: BTreeMap<ContainerId, ContainerRow>,
    /// The region whose whole list of them was taken up last.
    listed_by: Option<RegionId>,
    /// Those of an earlier region that the one of now has not named so far, since when.
    unnamed: BTreeMap<ContainerId, Instant>,
    /// What to lift the next time ...
    due: Due,
    /// ... and each time: nobody tells when what keeps these from their best path is gone.
    untold: BTreeSet<PortKey>,
    /// When all are looked at, whatever was told.
    lift_all_at: Instant,
    stale_connections: StaleConnections,
    ebb: Ebb,
    /// What ports had counted in an earlier life of this process.
    earlier: BTreeMap<PortKey, PortStatus>,
    /// What removed ports had counted in the end, until control has taken note.
    ended: BTreeMap<PortKey, (KernelId, Counters)>,
    unclaimed_at: Option<Instant>,
    /// A region has said something in this life of the process.
    has_heard: bool,
    drains_counted: Instant,
    read_log: LogLimit,
    /// Listeners may be opened: the process is not about to end.
    accepting: bool,
}

fn sum(a: Counters, b: Counters) -> Counters {
    Counters {
        active: 0,
        total: a.total.saturating_add(b.total),
        refused: a.refused.saturating_add(b.refused),
        bytes_in: a.bytes_in.saturating_add(b.bytes_in),
        bytes_out: a.bytes_out.saturating_add(b.bytes_out),
        connect_failures: a.connect_failures.saturating_add(b.connect_failures),
        idle_timeouts: a.idle_timeouts.saturating_add(b.idle_timeouts),
        packets_in: a.packets_in.saturating_add(b.packets_in),
        packets_out: a.packets_out.saturating_add(b.packets_out),
    }
}

/// What is left of what an earlier life had told without what the kernel path's maps held of it then:
/// they have counted on, up to `now`. All of it, where they have begun anew since.
fn without(told: Counters, in_kernel_path: KernelPathCounters, now: Counters) -> Counters {
    let pairs = [
        (in_kernel_path.sessions_total, now.total),
        (in_kernel_path.sessions_refused, now.refused),
        (in_kernel_path.bytes_in, now.bytes_in),
        (in_kernel_path.bytes_out, now.bytes_out),
        (in_kernel_path.packets_in, now.packets_in),
        (in_kernel_path.packets_out, now.packets_out),
    ];
    if pairs.iter().any(|(then, now)| now < then) {
        return told;
    }
    Counters {
        total: told.total.saturating_sub(in_kernel_path.sessions_total),
        refused: told.refused.saturating_sub(in_kernel_path.sessions_refused),
        bytes_in: told.bytes_in.saturating_sub(in_kernel_path.bytes_in),
        bytes_out: told.bytes_out.saturating_sub(in_kernel_path.bytes_out),
        packets_in: told.packets_in.saturating_sub(in_kernel_path.packets_in),
        packets_out: told.packets_out.saturating_sub(in_kernel_path.packets_out),
        ..told
    }
}

/// What a status says of counters.
fn told(status: &PortStatus) -> Counters {
    Counters {
        total: status.sessions_total,
        refused: status.sessions_refused,
        bytes_in: status.bytes_in,
        bytes_out: status.bytes_out,
        connect_failures: status.connect_failures,
        packets_in: status.packets_in,
        packets_out: status.packets_out,
        ..Counters::default()
    }
}

/// How the relay moves the bytes of a port: datagrams are copied in any case.
fn engine_of(relay: &Relay, key: PortKey) -> RelayEngine {
    match (key.protocol, relay.engine()) {
        (Protocol::Udp, _) | (_, Engine::Copy) => RelayEngine::Copy,
        (Protocol::Tcp, Engine::Splice) => RelayEngine::Splice,
        (Protocol::Tcp, Engine::Uring) => RelayEngine::Uring,
    }
}

fn refusal_text(err: &OpenError) -> String {
    match err {
        OpenError::Listen(listen) => format!("{listen}: {}", listen.errno()),
        OpenError::Address(errno) => format!("{err}: {errno}"),
    }
}

impl Link {
    /// A link that runs nothing yet. `descriptors` is the limit of open descriptors, `earlier` what
    /// an earlier life has told of ports.
    pub fn new(
        reader: DesiredReader,
        relay: Relay,
        board: Board,
        lookup: LinkLookup,
        defaults: Defaults,
        descriptors: u64,
        earlier: Vec<PortStatus>,
    ) -> Self {
        let stale_connections = StaleConnections::start(Arc::clone(relay.namespaces()));
        let mut link = Self {
            reader,
            relay,
            board,
            lookup,
            settings: defaults.clone(),
            defaults,
            descriptors,
            known: Rows::default(),
            running: BTreeMap::new(),
            draining: Vec::new(),
            settling: BTreeSet::new(),
            narrowed: Vec::new(),
            guard_at: Instant::now() + GUARD_INTERVAL,
            kernel_path: None,
            kernel_missing: None,
            containers: BTreeMap::new(),
            listed_by: None,
            unnamed: BTreeMap::new(),
            due: Due::default(),
            untold: BTreeSet::new(),
            lift_all_at: Instant::now() + LIFT_ALL_INTERVAL,
            stale_connections,
            ebb: Ebb::default(),
            earlier: earlier.into_iter().map(|it| (it.key, it)).collect(),
            ended: BTreeMap::new(),
            unclaimed_at: None,
            has_heard: false,
            drains_counted: Instant::now(),
            read_log: LogLimit::default(),
            accepting: true,
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
        let kept = self.running.len() + self.containers.len();
        let room = session_room(self.descriptors, kept, self.kernel_path.is_some());
        let wanted = self.settings.total_sessions;
        let limit = if wanted == 0 { room } else { wanted.min(room) };
        self.relay.totals().set_limit(limit);
    }

    /// Looks at the desired region and does what has changed. Answers that when there is anything, a whole list with
    /// the containers that are kept though it does not name them.
    pub fn look(&mut self, now: Instant) -> Option<DesiredChanges> {
        let mut news = match self.reader.changes() {
            Ok(news) => news?,
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
        if self.board.is_writer().is_err() {
            // What there is to do is another process's.
            self.reader.forget_changes();
            return None;
        }
        if news.rows.invalid_rows > 0
            && let Some(suppressed) = self.read_log.pass()
        {
            tracing::warn!(
                rows = news.rows.invalid_rows,
                suppressed,
                "the desired region holds rows that make no sense; they are left out"
            );
        }
        self.apply(&news, now);
        if news.whole && !self.unnamed.is_empty() {
            let containers = &mut news.rows.containers;
            let kept = self.unnamed.keys().filter_map(|id| self.containers.get(id));
            containers.extend(kept.cloned());
            containers.sort_unstable_by_key(|row| row.container_id);
        }
        Some(news)
    }

    fn apply(&mut self, news: &DesiredChanges, now: Instant) {
        let desired = &news.rows;
        self.take_settings(desired.node.as_ref());
        self.note_containers(news, now);
        let mut changes = Changes::default();
        let mut cut = Vec::new();
        let steps = plan(&self.known, news);
        tracing::debug!(
            ports = desired.ports.len() + desired.removed_ports.len(),
            containers = desired.containers.len() + desired.removed_containers.len(),
            steps = steps.len(),
            whole = news.whole,
            "rows of the desired region are read"
        );
        self.close_listeners(steps.iter().filter_map(Step::ends));
        for step in steps {
            self.carry_out(step, desired.region_id, &mut cut, &mut changes, now);
        }
        self.relay.cut(&cut);
        self.relay.shut_out(&std::mem::take(&mut self.narrowed));
        self.set_total_limit();
        let lifted = self.lift();
        changes
            .put
            .retain(|entry| !lifted.contains(&entry.status.key));
        changes
            .put
            .extend(lifted.iter().filter_map(|key| self.entry(*key)));
        changes.forget = self.settled(news, &changes.put);
        for key in &changes.forget {
            self.ended.remove(key);
        }
        changes.applied = Some(Applied {
            region_id: desired.region_id,
            epoch: desired.epoch,
            generation: desired.committed,
        });
        self.publish(changes);
    }

    fn take_settings(&mut self, node: Option<&NodeRow>) {
        let settings = self.defaults.with(node);
        if settings == self.settings {
            return;
        }
        self.settings = settings;
        self.due.all = true;
        self.set_total_limit();
        for (key, running) in &self.running {
            if let (Some(port), Some(known)) = (&running.port, self.known.get(key)) {
                port.set_rules(self.settings.rules(&known.row));
                self.narrowed
                    .extend(port.is_narrowed().then(|| Arc::clone(port)));
            }
        }
    }

    /// One step of the plan. What is to be told of it is added to `changes`, what is to be cut to
    /// `cut`.
    fn carry_out(
        &mut self,
        step: Step,
        region: RegionId,
        cut: &mut Vec<Arc<Port>>,
        changes: &mut Changes,
        now: Instant,
    ) {
        match step {
            Step::Open(row) => {
                let key = row.key();
                let (base, in_kernel_path) = self.counted_before(&row);
                self.serve(row, region, base, now);
                if let Some(running) = self.running.get_mut(&key) {
                    running.in_kernel_path = in_kernel_path;
                }
                changes.put.extend(self.entry(key));
            }
            Step::Replace(row) => {
                let key = row.key();
                let base = self.close(key, cut, now, None);
                self.serve(row, region, base, now);
                changes.put.extend(self.entry(key));
            }
            Step::Adjust(row) | Step::Acknowledge(row) => {
                let key = row.key();
                if let Some(running) = self.running.get_mut(&key) {
                    running.generation = row.generation;
                    running.orphan_since = None;
                    if let Some(port) = &running.port {
                        port.set_rules(self.settings.rules(&row));
                        self.narrowed
                            .extend(port.is_narrowed().then(|| Arc::clone(port)));
                    }
                }
                self.due.ports.insert(key);
                self.note(row, region);
                changes.put.extend(self.entry(key));
            }
            Step::Retire { key, generation } => {
                self.retire(key, region, generation, cut, changes, now);
            }
            Step::Gone {
                key,
                kernel_id,
                generation,
            } => {
                if self.draining_status(key).is_none() {
                    let mut entry = removed(key, kernel_id, region, generation);
                    entry.base = self.last_words(key, kernel_id);
                    self.withdraw(key);
                    changes.put.push(entry);
                }
            }
            Step::Orphan(key) => {
                if let Some(running) = self.running.get_mut(&key)
                    && running.orphan_since.is_none()
                {
                    tracing::info!(port = key.host_port, "a new region does not know this port");
                    running.orphan_since = Some(now);
                }
            }
        }
    }

    /// Ports that need no status any more: control has taken note of their removal, or they are of
    /// an earlier life. `put` is what is about to be told.
    fn settled(&mut self, news: &DesiredChanges, put: &[Entry]) -> Vec<PortKey> {
        let desired = &news.rows;
        if desired.committed == Generation(0) {
            return Vec::new();
        }
        if news.whole {
            self.settling = self.board.port_keys().into_iter().collect();
        }
        for row in &desired.removed_ports {
            self.settling.remove(&row.key);
        }
        self.settling.extend(&news.freed_ports);
        let mut settled = std::mem::take(&mut self.settling);
        settled.retain(|key| !self.running.contains_key(key));
        let told: BTreeSet<PortKey> = put.iter().map(|entry| entry.status.key).collect();
        let waits = |key: &PortKey| told.contains(key) || self.draining_status(*key).is_some();
        let waiting = settled.iter().copied().filter(|key| waits(key)).collect();
        settled.retain(|key| !waits(key));
        self.settling = waiting;
        settled.into_iter().collect()
    }

    fn note(&mut self, row: PortRow, region: RegionId) {
        self.known.insert(AppliedRow { row, region });
    }

    /// What the same kernel's port had counted in an earlier life. One that was removed then begins
    /// anew.
    fn counted_before(&mut self, row: &PortRow) -> (Counters, KernelPathCounters) {
        let found = self.earlier.remove(&row.key());
        found
            .filter(|it| it.kernel_id == row.kernel_id && it.state != PortState::Removed)
            .map(|it| (told(&it), it.in_kernel_path))
            .unwrap_or_default()
    }

    /// What a port that is removed had counted in the end, maybe in an earlier life.
    fn last_words(&mut self, key: PortKey, kernel_id: KernelId) -> Counters {
        if let Some((kernel, counted)) = self.ended.get(&key)
            && *kernel == kernel_id
        {
            return *counted;
        }
        let (earlier, in_kernel_path) = self
            .earlier
            .remove(&key)
            .filter(|it| it.kernel_id == kernel_id)
            .map(|it| (told(&it), it.in_kernel_path))
            .unwrap_or_default();
        let since = self.kernel_path.as_ref().and_then(|it| it.counted(key));
        let counted = since.map_or(earlier, |since| {
            sum(without(earlier, in_kernel_path, since), since)
        });
        self.ended.insert(key, (kernel_id, counted));
        counted
    }

    /// Starts to serve a row; whatever comes of it is noted.
    fn serve(&mut self, row: PortRow, region: RegionId, base: Counters, now: Instant) {
        let key = row.key();
        self.ended.remove(&key);
        let mut running = Running {
            port: None,
            kernel_port: None,
            kernel_told: false,
            held_back: false,
            state: PortState::Refused,
            path: ForwardPath::None,
            reason: String::new(),
            base,
            in_kernel_path: KernelPathCounters::default(),
            generation: row.generation,
            retry_at: None,
            orphan_since: None,
        };
        if row.observe_only {
            running.state = PortState::Serving;
            running.path = ForwardPath::Engine;
        } else {
            let bind = SocketAddr::new(row.bind, row.host_port);
            let target = Target {
                address: SocketAddr::new(row.target, row.target_port),
                container: row.container_id,
            };
            let rules = self.settings.rules(&row);
            let opened = match row.protocol {
                Protocol::Tcp => self.relay.open(bind, target, rules),
                Protocol::Udp => self.relay.open_datagrams(bind, target, rules),
            };
            match opened {
                Ok(port) => {
                    // Inspection up after the watch was opened, so a link that goes away later is told.
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
        self.due.ports.insert(key);
        self.note(row, region);
    }

    fn entry(&self, key: PortKey) -> Option<Entry> {
        let (running, known) = (self.running.get(&key)?, self.known.get(&key)?);
        let mut status = PortStatus::new(key, known.row.kernel_id, known.region, running.state);
        status.acknowledged = running.generation;
        status.path = running.path;
        if running.path == ForwardPath::Relay {
            status.engine = engine_of(&self.relay, key);
        }
        status.reason.clone_from(&running.reason);
        if let Some(why) = self.relay.refused()
            && running.path == ForwardPath::Relay
            && key.protocol == Protocol::Tcp
            && status.reason.is_empty()
        {
            status.reason = cut(format!("by splice: {why}"));
        }
        Some(Entry {
            status,
            port: running.port.clone(),
            kernel_port: running.kernel_port.clone(),
            base: running.base,
        })
    }

    fn publish(&mut self, changes: Changes) {
        // First the deed, then the word.
        if let Some(kernel) = &mut self.kernel_path {
            kernel.settle();
        }
        let (put, forget, applied) = (changes.put.clone(), changes.forget.clone(), changes.applied);
        let Err(err) = self.board.publish_changes(changes) else {
            return;
        };
        if matches!(err, BatchError::LockLost(_)) {
            // The next turn says so, and ends the process.
            return;
        }
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

    /// What is due by the clock: the end of drains, another try for refused rows, a look at every
    /// guarded link, the end of orphans.
    pub fn tick(&mut self, now: Instant) {
        self.finish_drains(now);
        if self.accepting {
            self.retry(now);
            self.close_unwatched(now);
        }
        self.kernel_turn(now);
        self.lift_held_back();
        for running in self.running.values() {
            if let (Some(port), kernel) = (&running.port, &running.kernel_port) {
                port.note_elsewhere(kernel.as_ref().map(|it| it.counters()).as_ref());
            }
        }
        self.retire_orphans(now);
        self.forget_unnamed(now);
        if now >= self.lift_all_at {
            self.lift_all_at = now + LIFT_ALL_INTERVAL;
            self.reader.forget_changes();
            self.due.all = true;
            self.lift_and_publish();
        }
        if self.ebb.has_come(self.known.len() + self.containers.len()) {
            shared::heap::trim();
        }
        if now >= self.guard_at {
            self.guard_at = now + GUARD_INTERVAL;
            self.links_changed(&LinkChanges {
                gone: Vec::new(),
                overflow: true,
            });
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
            let (orphan_since, in_kernel_path) = (running.orphan_since, running.in_kernel_path);
            self.serve(row, region, base, now);
            let after = self.running.get_mut(&key).map(|running| {
                running.orphan_since = orphan_since;
                running.in_kernel_path = in_kernel_path;
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

    /// Ports whose listeners could not be watched are refused, and tried again like others.
    fn close_unwatched(&mut self, now: Instant) {
        let mut closed = Vec::new();
        for (key, running) in &mut self.running {
            if running.port.take_if(|port| port.is_unwatched()).is_some() {
                running.state = PortState::Refused;
                running.path = ForwardPath::None;
                running.reason =
                    "the listener cannot be watched; the dataplane's log says why".into();
                running.retry_at = Some(now + RETRY_INTERVAL);
                closed.push(*key);
            }
        }
        if !closed.is_empty() {
            self.due.ports.extend(&closed);
            let put = closed.iter().filter_map(|key| self.entry(*key)).collect();
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
        self.close_listeners(due.iter().copied());
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
        self.accepting = false;
        let keys: Vec<PortKey> = self.running.keys().copied().collect();
        self.close_listeners(keys.iter().copied());
        for running in self.running.values_mut() {
            if running.path == ForwardPath::KernelPath {
                // Pinned: it needs no process.
                running.reason = "the dataplane has stopped, the kernel goes on".to_owned();
                continue;
            }
            running.state = PortState::Pending;
            running.path = ForwardPath::None;
            running.reason = "the dataplane has stopped".to_owned();
        }
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

#[cfg(test)]
mod tests;
