//! Programs of other layouts, which another version of this one has left attached.
//!
//! In: their pins. Out: no flow is lost while ours take over. Ours are put before theirs, and meet every
//! client's packet first. A port is taken from them when it is ours: from then on its clients' packets
//! pass ours alone, which make an entry for each flow whose client speaks. The answers of those whose
//! clients have not spoken yet go on being translated by theirs, until they are removed. Invariant:
//! their records are not read, as another layout means other records; only the key of a port is known.

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::SchedClassifierLink;
use ebpf::map;
use ebpf::records::ServiceKey;

use super::pins::{Pins, Side};
use super::rtnl::RtnlThread;
use crate::causes::chain;
use crate::sys::bpf;

/// What is left of other layouts.
#[derive(Debug)]
pub(super) struct Predecessors {
    pins: Vec<Pins>,
    lead: bool,
}

impl Predecessors {
    /// Those beside these pins.
    pub(super) fn beside(pins: &Pins) -> Self {
        let pins = pins.other_layouts();
        for predecessor in &pins {
            tracing::info!(
                pins = %predecessor.directory().display(),
                "another version's programs are attached; they go when ours have taken over"
            );
        }
        Self { pins, lead: true }
    }

    /// Where theirs is pinned.
    pub(super) fn pins(&self) -> &[Pins] {
        &self.pins
    }

    /// Takes a port from them. Where that can't be done they are removed at once, flows or not: a row
    /// would not be the last word about its port.
    pub(super) fn withdraw(&mut self, key: ServiceKey, rtnl: &mut RtnlThread) {
        let failed = self.pins.iter().any(|it| {
            let services = it.directory().join(map::SERVICES);
            let removed = bpf::remove_entry(&services, &key.bytes());
            if let Err(err) = &removed {
                tracing::warn!(
                    port = u16::from_be(key.port),
                    err = chain(err),
                    "another version's programs keep a port, so they go at once"
                );
            }
            removed.is_err()
        });
        if failed {
            self.remove(rtnl);
        }
    }

    /// Their hooks lead no more sockets of this host; ours do. Those that remember go on: they tell
    /// whom led sockets speak to.
    pub(super) fn stop_leading(&mut self) {
        if !std::mem::take(&mut self.lead) {
            return;
        }
        for pins in &self.pins {
            if let Err(err) = pins.remove_leading_hooks() {
                tracing::warn!(err = chain(&err), "a hook stays attached");
            }
        }
    }

    /// The end of them. What can't be removed is not tried again before the next start.
    pub(super) fn remove(&mut self, rtnl: &mut RtnlThread) {
        for predecessor in std::mem::take(&mut self.pins) {
            rtnl.remove(predecessor);
        }
    }
}

/// The link of one of these at a side of an interface.
pub(super) fn link(predecessors: &[Pins], side: Side, index: u32) -> Option<SchedClassifierLink> {
    predecessors.iter().find_map(|it| {
        let pinned = PinnedLink::from_pin(it.link(side, index)).ok()?;
        SchedClassifierLink::try_from(FdLink::from(pinned)).ok()
    })
}
