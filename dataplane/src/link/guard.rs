//! Ports that end with their container's link.
//!
//! In: links that are gone. Out: their ports disabled, sessions cut. Invariant: a guarded row never
//! forwards once its link is gone, whether or not control is alive.

use std::sync::Arc;

use shared::desired::{PortKey, PortRow};
use shared::observed::{ForwardPath, PortState};

use super::Link;
use crate::board::Changes;
use crate::forward::relay::port::Port;
use crate::sys::netlink::LinkChanges;

/// The link index a row is guarded by.
pub(super) fn guard_of(row: &PortRow) -> Option<u32> {
    (row.link_guard && row.link_index != 0).then_some(row.link_index)
}

pub(super) fn gone_reason(index: u32) -> String {
    format!("the container's link (interface {index}) is gone")
}

impl Link {
    /// Disables guarded rows whose link is gone: sessions are cut, new clients turned away.
    pub fn links_changed(&mut self, found: &LinkChanges) {
        if found.gone.is_empty() && !found.overflow {
            return;
        }
        let mut guarded: Vec<u32> = if found.overflow {
            let rows = self.known.values();
            let rows = rows.filter_map(|it| Some((it.row.key(), guard_of(&it.row)?)));
            let serving = rows.filter(|(key, _)| self.may_serve(*key));
            let serving = serving.map(|(_, link)| link);
            let draining = self.draining.iter().filter_map(|it| it.link_index);
            serving.chain(draining).collect()
        } else {
            let guards = |link: &u32| {
                self.guarded_by(*link).any(|key| self.may_serve(key))
                    || self.draining.iter().any(|it| it.link_index == Some(*link))
            };
            found.gone.iter().copied().filter(guards).collect()
        };
        guarded.sort_unstable();
        guarded.dedup();
        guarded.retain(|index| found.gone.contains(index) || !self.lookup.exists(*index));
        if !guarded.is_empty() {
            self.disable(&guarded);
        }
    }

    /// Ports that are to end with a link.
    fn guarded_by(&self, link: u32) -> impl Iterator<Item = PortKey> + '_ {
        self.known.at_link(link).filter(move |key| {
            let known = self.known.get(key);
            known.and_then(|it| guard_of(&it.row)) == Some(link)
        })
    }

    fn may_serve(&self, key: PortKey) -> bool {
        let running = self.running.get(&key);
        running.is_some_and(|it| it.state != PortState::Disabled)
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
        for link in gone {
            let ended: Vec<PortKey> = self.guarded_by(*link).collect();
            for key in ended {
                let Some(running) = self.running.get_mut(&key) else {
                    continue;
                };
                if running.state == PortState::Disabled {
                    continue;
                }
                running.state = PortState::Disabled;
                running.path = ForwardPath::None;
                running.reason = gone_reason(*link);
                running.retry_at = None;
                ports.extend(running.port.clone());
                keys.push(key);
            }
        }
        // First the deed, then the word.
        self.relay.disable(&ports);
        self.cut_drained_flows(|it| is_gone(it.link_index).is_some());
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
}
