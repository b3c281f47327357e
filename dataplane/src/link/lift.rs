//! Taking ports up to the kernel path and down again, whatever the reason for either.
//!
//! In: rows that are served, interfaces that change. Out: a path and, where it is the relay though
//! the kernel path is wanted, the reason, in each port's status. Invariant: a port that is not
//! being served has no service in the kernel, but for one whose flows drain.

use std::collections::BTreeSet;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::{ContainerRow, DesiredChanges, DesiredSnapshot, PortKey, Protocol};
use shared::ids::{ContainerId, Generation};
use shared::observed::{ForwardPath, PortState};

use super::stale_connections::Changed;
use super::{Link, ORPHAN_GRACE, sum, without};
use crate::board::Changes;
use crate::forward::kernel_path::{KernelPath, KernelPort, Lift, Terms};
use crate::sys::bpf::CounterTable;

/// Bytes of a reason that fit in a status.
const REASON: usize = 119;
/// Distance of the counts of flows that drain.
const DRAIN_SWEEP: Duration = Duration::from_millis(200);

pub(super) fn cut(mut text: String) -> String {
    let mut end = text.len().min(REASON);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

/// The path of most of a port's clients, and who takes another one.
fn path_of(lift: &Lift, local_only: bool) -> (ForwardPath, String) {
    match (&lift.remote, &lift.host) {
        (None, None) => (ForwardPath::KernelPath, String::new()),
        (Some(_), None) if local_only => (ForwardPath::KernelPath, String::new()),
        (None, Some(why)) => (
            ForwardPath::KernelPath,
            format!("clients on this host by the relay: {why}"),
        ),
        (Some(why), None) => (
            ForwardPath::Relay,
            format!("by the relay, but clients on this host: {why}"),
        ),
        // Flows that there were go on.
        (Some(why), Some(_)) => (ForwardPath::Relay, format!("by the relay: {why}")),
    }
}

/// Ports to be lifted the next time.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// All of them.
    pub(super) all: bool,
    /// These ...
    pub(super) ports: BTreeSet<PortKey>,
    /// ... and those of these containers.
    pub(super) containers: BTreeSet<ContainerId>,
}

/// Whether nothing of a container has changed that its ports' paths depend on.
fn is_same(before: Option<&ContainerRow>, now: Option<&ContainerRow>) -> bool {
    let terms = |it: &ContainerRow| (it.init_pid, it.host_network, it.past_host);
    match (before, now) {
        (Some(before), Some(now)) => {
            terms(before) == terms(now) && before.link_indexes == now.link_indexes
        }
        (None, None) => true,
        _ => false,
    }
}

impl Link {
    /// Uses the kernel path from now on, or says with every port why not.
    pub fn use_kernel_path(&mut self, kernel: Result<KernelPath, String>) {
        match kernel {
            Ok(path) => self.kernel_path = Some(path),
            Err(why) => self.kernel_missing = Some(why),
        }
    }

    /// What the kernel path gives containers past the host's ends of their links, for who reads it.
    pub fn take_delivered(&mut self) -> Option<CounterTable> {
        self.kernel_path
            .as_mut()
            .and_then(KernelPath::take_delivered)
    }

    /// Readable when [`Self::kernel_turn`] has something to do.
    pub fn kernel_watch(&self) -> Option<RawFd> {
        self.kernel_path.as_ref().map(KernelPath::watch)
    }

    /// The kernel path waits to be given its turn.
    pub fn is_kernel_pending(&self) -> bool {
        self.kernel_path
            .as_ref()
            .is_some_and(KernelPath::is_pending)
    }

    /// False when the kernel path's thread has ended by itself.
    pub fn is_kernel_healthy(&self) -> bool {
        self.kernel_path.as_ref().is_none_or(KernelPath::healthy)
    }

    /// What the kernel path has to do now: interfaces that changed, sweeps, leftovers.
    pub fn kernel_turn(&mut self, now: Instant) {
        let Some(kernel) = &mut self.kernel_path else {
            return;
        };
        let changed = kernel.turn(now);
        if !kernel.is_listed() && self.unclaimed_at.is_some() {
            // Rows can't claim anything before; they have the whole time from then on.
            self.unclaimed_at = Some(now + ORPHAN_GRACE);
        }
        if changed || kernel.is_guard_due(now) {
            kernel.guard_waiting(now);
        }
        if changed {
            self.lift_and_publish();
        }
        if self.unclaimed_at.is_some_and(|at| now >= at)
            && let Some(kernel) = &mut self.kernel_path
        {
            self.unclaimed_at = None;
            kernel.forget_unclaimed();
        }
    }

    /// Notes what lift decisions depend on besides the rows themselves. A region that says nothing yet
    /// tells nothing of containers either: control may wait for the cluster for hours before it does. One that
    /// has begun anew names them one after the other.
    pub(super) fn note_containers(&mut self, news: &DesiredChanges, now: Instant) {
        let desired = &news.rows;
        if desired.committed == Generation(0) {
            return;
        }
        // One that is not listed may be among the rows that make no sense: it keeps its guard.
        let gone: Vec<ContainerId> = if news.whole && desired.invalid_rows == 0 {
            let listed = |id: &ContainerId| {
                let rows = &desired.containers;
                rows.binary_search_by_key(id, |row| row.container_id)
                    .is_ok()
            };
            let known = self.containers.keys().copied();
            let unlisted: Vec<ContainerId> = known.filter(|id| !listed(id)).collect();
            let region = self.listed_by.replace(desired.region_id);
            let anew = region.is_some_and(|region| region != desired.region_id);
            let (kept, gone) = unlisted.into_iter().partition(|id| {
                (anew || self.unnamed.contains_key(id)) && self.serves_on(*id, desired)
            });
            for id in kept {
                self.unnamed.entry(id).or_insert(now);
            }
            gone
        } else {
            let removed = desired.removed_containers.iter().map(|it| it.key);
            removed
                .chain(news.freed_containers.iter().copied())
                .collect()
        };
        let mut changed = self.remove_containers(gone);
        for row in &desired.containers {
            self.unnamed.remove(&row.container_id);
            let before = self.containers.insert(row.container_id, row.clone());
            changed.push((row.container_id, before));
        }
        self.containers_changed(&changed);
        if news.whole && desired.invalid_rows == 0 {
            self.relay
                .namespaces()
                .keep(|id| self.containers.contains_key(id));
        }
        if !std::mem::replace(&mut self.has_heard, true) {
            // What an earlier process has left has as long to be claimed as ports of a lost region.
            self.unclaimed_at = Some(now + ORPHAN_GRACE);
        }
        if let Some(kernel) = &mut self.kernel_path {
            kernel.guard_waiting(now);
        }
    }

    /// Whether a region that does not name a container leaves it a port.
    fn serves_on(&self, id: ContainerId, desired: &DesiredSnapshot) -> bool {
        let removed = &desired.removed_containers;
        removed.binary_search_by_key(&id, |it| it.key).is_err()
            && self
                .known
                .of_container(id)
                .any(|port| !desired.is_removed(port))
    }

    fn remove_containers(
        &mut self,
        ids: Vec<ContainerId>,
    ) -> Vec<(ContainerId, Option<ContainerRow>)> {
        let removed = ids.into_iter().filter_map(|id| {
            self.unnamed.remove(&id);
            let before = self.containers.remove(&id)?;
            Some((id, Some(before)))
        });
        removed.collect()
    }

    /// Gives up containers that a region begun anew has not named in time, or that no port leads to any more.
    pub(super) fn forget_unnamed(&mut self, now: Instant) {
        let unnamed = self.unnamed.iter();
        let over = unnamed.filter(|(id, since)| {
            now >= **since + ORPHAN_GRACE || self.known.of_container(**id).next().is_none()
        });
        let over: Vec<ContainerId> = over.map(|(id, _)| *id).collect();
        if over.is_empty() {
            return;
        }
        let changed = self.remove_containers(over);
        self.containers_changed(&changed);
        self.lift_and_publish();
    }

    /// Passes on which rows of containers have come, gone or changed, with what they were before.
    fn containers_changed(&mut self, changed: &[(ContainerId, Option<ContainerRow>)]) {
        for (id, before) in changed {
            let (before, now) = (before.as_ref(), self.containers.get(id));
            if !is_same(before, now) {
                self.due.containers.insert(*id);
            }
            match now {
                Some(row) => self.relay.namespaces().note(row),
                None => self.relay.namespaces().forget(*id),
            }
            if let Some(kernel) = &mut self.kernel_path {
                kernel.guard(before, now);
            }
        }
        let changed = changed.iter().map(|(id, before)| Changed {
            id: *id,
            before: before.as_ref(),
            now: self.containers.get(id),
        });
        self.stale_connections.note(changed);
    }

    /// Gives every running port that something has changed for the best path there is. Answers those whose
    /// status has changed.
    pub(super) fn lift(&mut self) -> BTreeSet<PortKey> {
        let due = self.due();
        let mut changed = BTreeSet::new();
        if let Some(kernel) = &mut self.kernel_path {
            kernel.begin_offers();
        }
        // Programs of all links are asked for before the first is waited for.
        let waiting = self.offer(&due, false, &mut changed);
        if !waiting.is_empty() {
            if let Some(kernel) = &mut self.kernel_path {
                kernel.catch_up();
            }
            self.offer(&waiting, true, &mut changed);
        }
        if let Some(kernel) = &mut self.kernel_path {
            kernel.end_offers();
            kernel.settle();
            if self.unclaimed_at.is_some() {
                kernel.lifted();
            }
        }
        changed
    }

    /// The ports to be lifted now. What their paths depend on tells of its changes, but for a few things: ports
    /// that wait for such are among them every time.
    pub(super) fn due(&mut self) -> BTreeSet<PortKey> {
        let due = std::mem::take(&mut self.due);
        let affected = self.kernel_path.as_mut().map(KernelPath::affected);
        let affected = affected.unwrap_or_default();
        let all = due.all || affected.all;
        let ports = if all {
            self.known.keys().copied().collect()
        } else {
            let mut ports = due.ports;
            ports.extend(&self.untold);
            for id in due.containers {
                ports.extend(self.known.of_container(id));
            }
            for link in affected.links {
                ports.extend(self.known.at_link(link));
            }
            ports
        };
        tracing::debug!(ports = ports.len(), all, "paths of ports are looked at");
        ports
    }

    /// Offers some of the running ports to the kernel path, and adds those whose status has changed to
    /// `changed`. Answers those that wait for their link's program; with `at_last`, the relay has them
    /// until it comes.
    fn offer(
        &mut self,
        due: &BTreeSet<PortKey>,
        at_last: bool,
        changed: &mut BTreeSet<PortKey>,
    ) -> BTreeSet<PortKey> {
        let mut waiting = BTreeSet::new();
        for key in due {
            self.untold.remove(key);
            let Some(running) = self.running.get_mut(key) else {
                continue;
            };
            let Some(known) = self.known.get(key) else {
                continue;
            };
            let forwarded = running.state == PortState::Serving
                && matches!(running.path, ForwardPath::Relay | ForwardPath::KernelPath);
            let Some(kernel) = &mut self.kernel_path else {
                if let Some(why) = &self.kernel_missing
                    && forwarded
                    && running.reason.is_empty()
                {
                    running.reason = cut(format!("by the relay: {why}"));
                    changed.insert(*key);
                }
                continue;
            };
            if !forwarded {
                kernel.withdraw(*key);
                running.lower();
                continue;
            }
            let rules = self.settings.rules(&known.row);
            let relayed = running.port.as_ref().map_or(0, |port| port.active());
            let terms = Terms {
                container: self.containers.get(&known.row.container_id),
                max_flows: rules.max_sessions,
                new_per_second: rules.new_per_second,
                idle_timeout: rules.idle_timeout.is_some(),
                allowed: &rules.allowed,
                relayed,
            };
            let offered = kernel.offer(&known.row, &terms);
            let untold = match &offered {
                Ok(lift) => lift.untold,
                Err(refusal) => refusal.untold,
            };
            if untold {
                self.untold.insert(*key);
            }
            let (path, reason) = match offered {
                Ok(lift) => {
                    let same = running
                        .kernel_port
                        .as_ref()
                        .is_some_and(|it| Arc::ptr_eq(it, &lift.port));
                    if !same {
                        running.lower();
                        // Maps that an earlier life of this process has left count on, and are
                        // in what that life had told.
                        let in_kernel_path = std::mem::take(&mut running.in_kernel_path);
                        running.base = without(running.base, in_kernel_path, lift.port.counters());
                        running.kernel_port = Some(Arc::clone(&lift.port));
                    }
                    path_of(&lift, known.row.local_only || known.row.bind.is_loopback())
                }
                Err(refusal) if refusal.waits && !at_last => {
                    waiting.insert(*key);
                    continue;
                }
                Err(refusal) => {
                    if refusal.waits {
                        kernel.put_off(&known.row);
                    }
                    running.lower();
                    (ForwardPath::Relay, format!("by the relay: {}", refusal.why))
                }
            };
            let reason = cut(reason);
            running.held_back =
                known.row.protocol == Protocol::Udp && relayed > 0 && running.kernel_port.is_none();
            if running.path != path || running.reason != reason {
                running.path = path;
                running.reason = reason;
                changed.insert(*key);
            } else if running.kernel_told != running.kernel_port.is_some() {
                changed.insert(*key);
            }
            running.kernel_told = running.kernel_port.is_some();
        }
        waiting
    }

    /// Looks again at rows of datagrams whose last session of the relay has ended.
    pub(super) fn lift_held_back(&mut self) {
        let free = self.running.iter().filter(|(_, it)| {
            it.held_back && it.port.as_ref().is_some_and(|port| port.active() == 0)
        });
        let free: Vec<PortKey> = free.map(|(key, _)| *key).collect();
        if !free.is_empty() {
            self.due.ports.extend(free);
            self.lift_and_publish();
        }
    }

    /// [`Self::lift`], and says so.
    pub(super) fn lift_and_publish(&mut self) {
        if !self.accepting {
            // Who stops leaves the kernel path as it is.
            return;
        }
        let changed = self.lift();
        if changed.is_empty() {
            return;
        }
        let put = changed.iter().filter_map(|key| self.entry(*key)).collect();
        self.publish(Changes {
            put,
            ..Changes::default()
        });
    }

    /// Takes a port off the kernel path: its flows are cut.
    pub(super) fn withdraw(&mut self, key: PortKey) {
        if let Some(kernel) = &mut self.kernel_path {
            // Its flows are cut before anything is said about it.
            kernel.withdraw(key);
        }
        if let Some(running) = self.running.get_mut(&key) {
            running.lower();
        }
    }

    /// Lets the flows of a port that was closed go on for a while. `None` when there are none; those that
    /// an earlier process has left, and no row could claim yet, are cut.
    pub(super) fn drain_flows(
        &mut self,
        key: PortKey,
        port: Option<Arc<KernelPort>>,
    ) -> Option<Arc<KernelPort>> {
        let kernel = self.kernel_path.as_mut()?;
        if let Some(port) = port
            && kernel.drain(key)
        {
            kernel.sweep(Instant::now());
            if port.counters().active > 0 {
                return Some(port);
            }
        }
        kernel.withdraw(key);
        None
    }

    /// Counts draining flows, now and then.
    pub(super) fn count_drains(&mut self, now: Instant) {
        if self.draining.iter().all(|it| it.kernel_port.is_none()) {
            return;
        }
        if let Some(kernel) = &mut self.kernel_path
            && now.saturating_duration_since(self.drains_counted) >= DRAIN_SWEEP
        {
            self.drains_counted = now;
            kernel.sweep(now);
        }
    }

    /// Cuts what is left of drained flows, unless another row has taken the port.
    pub(super) fn finish_flows(&mut self, key: PortKey, port: &Arc<KernelPort>) {
        if let Some(kernel) = &mut self.kernel_path
            && !self.running.contains_key(&key)
            && kernel.is_served_by(key, port)
        {
            kernel.withdraw(key);
        }
    }
}

impl super::Running {
    /// Keeps what the kernel path had counted when it no longer serves this port.
    fn lower(&mut self) {
        if let Some(port) = self.kernel_port.take() {
            self.base = sum(self.base, port.counters());
        }
    }
}
