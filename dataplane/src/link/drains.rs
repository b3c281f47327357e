//! The end of ports: listeners closed, sessions and flows that may finish, removals answered.
//!
//! In: rows that are no longer wanted. Out: "nothing is left of it", with what the port had counted
//! in the end. Invariant: a removal is answered when its last session and flow are gone, not
//! before.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::{Drain, PortKey};
use shared::ids::{Generation, KernelId, RegionId};
use shared::observed::{ForwardPath, PortState, PortStatus};

use super::guard::guard_of;
use super::{Link, engine_of, sum, without};
use crate::board::{Changes, Entry};
use crate::forward::kernel_path::KernelPort;
use crate::forward::relay::Relay;
use crate::forward::relay::port::{Counters, Port};

/// A port that is closed and whose sessions or flows may finish.
#[derive(Debug)]
pub(super) struct Draining {
    key: PortKey,
    kernel_id: KernelId,
    region: RegionId,
    /// The removal this acknowledges; `None` when another row has taken the port's place.
    removal: Option<Generation>,
    pub(super) link_index: Option<u32>,
    pub(super) port: Arc<Port>,
    /// Flows of the kernel path that may finish.
    pub(super) kernel_port: Option<Arc<KernelPort>>,
    base: Counters,
    until: Instant,
}

impl Draining {
    fn is_over(&self, now: Instant) -> bool {
        let flows = self
            .kernel_port
            .as_ref()
            .map_or(0, |it| it.counters().active);
        now >= self.until || (self.port.active() == 0 && flows == 0)
    }
}

impl Link {
    /// Sessions are draining: look again soon.
    pub fn is_draining(&self) -> bool {
        !self.draining.is_empty()
    }

    /// Closes the listeners of these rows; many at once cost no more than one.
    pub(super) fn close_listeners(&self, keys: impl Iterator<Item = PortKey>) {
        let ports: Vec<Arc<Port>> = keys
            .filter_map(|key| self.running.get(&key)?.port.clone())
            .collect();
        self.relay.close(&ports);
    }

    /// Ends a running row, whose listener is closed: lets its sessions drain or adds it to those to
    /// be cut. Answers what it had counted. With `removal`, the status waits for the sessions.
    pub(super) fn close(
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
        // What an earlier process has left, and this row could not claim yet, has counted, too.
        let unclaimed = self.kernel_path.as_ref().and_then(|it| it.counted(key));
        let base = unclaimed.map_or(running.base, |since| {
            sum(without(running.base, running.in_kernel_path, since), since)
        });
        let Some(port) = running.port else {
            self.withdraw(key);
            return base;
        };
        let drains = matches!(known.row.drain, Drain::Within { ms } if ms > 0);
        let kernel = if drains && removal.is_some() {
            self.drain_flows(key, running.kernel_port.clone())
        } else {
            self.withdraw(key);
            None
        };
        let flows = running.kernel_port.as_ref().map(|it| it.counters());
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
                    kernel_port: kernel,
                    base,
                    until: now + Duration::from_millis(u64::from(ms)),
                });
            }
            _ => cut.push(Arc::clone(&port)),
        }
        total
    }

    pub(super) fn retire(
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
            changes.put.push(draining_entry(&self.relay, draining));
            return;
        }
        let mut entry = removed(key, kernel_id, region, generation);
        entry.base = counted;
        self.ended.insert(key, (kernel_id, counted));
        changes.put.push(entry);
    }

    /// The removal that still drains under this key, if any.
    pub(super) fn draining_status(&self, key: PortKey) -> Option<&Draining> {
        self.draining
            .iter()
            .find(|it| it.key == key && it.removal.is_some())
    }

    /// Cuts what is left of these ports' flows.
    pub(super) fn cut_drained_flows(&mut self, of: impl Fn(&Draining) -> bool) {
        let of_these = self.draining.iter().filter(|it| of(it));
        let flows: Vec<(PortKey, Arc<KernelPort>)> = of_these
            .filter_map(|it| Some((it.key, it.kernel_port.clone()?)))
            .collect();
        for (key, port) in flows {
            self.finish_flows(key, &port);
        }
    }

    /// Ends what has drained, or has had its time.
    pub fn finish_drains(&mut self, now: Instant) {
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
        self.cut_drained_flows(|it| it.is_over(now));
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
                if let Some(kernel) = &it.kernel_port {
                    entry.base = sum(entry.base, kernel.counters());
                }
                changes.put.push(entry);
            }
            false
        });
        for entry in &changes.put {
            let status = &entry.status;
            self.ended
                .insert(status.key, (status.kernel_id, entry.base));
        }
        if !changes.put.is_empty() {
            self.publish(changes);
        }
    }
}

/// "This port is gone, nothing is left of it."
pub(super) fn removed(
    key: PortKey,
    kernel_id: KernelId,
    region: RegionId,
    generation: Generation,
) -> Entry {
    let mut status = PortStatus::new(key, kernel_id, region, PortState::Removed);
    status.acknowledged = generation;
    Entry {
        status,
        port: None,
        kernel_port: None,
        base: Counters::default(),
    }
}

fn draining_entry(relay: &Relay, it: &Draining) -> Entry {
    let mut status = PortStatus::new(it.key, it.kernel_id, it.region, PortState::Draining);
    status.acknowledged = it.removal.unwrap_or_default();
    // Where the clients are that the removal waits for.
    status.path = if it.kernel_port.is_some() && it.port.active() == 0 {
        ForwardPath::KernelPath
    } else {
        ForwardPath::Relay
    };
    status.engine = engine_of(relay, it.key);
    Entry {
        status,
        port: Some(Arc::clone(&it.port)),
        kernel_port: it.kernel_port.clone(),
        base: it.base,
    }
}
