//! Memory pinned to a NUMA node. A container that is pinned can use no other node: where its node is
//! full it loses a process to the OOM killer, with memory free elsewhere. So it is pinned only while
//! everything that may come to lie on the node fits it: all of each kernel that has a core there
//! (who touches memory gets it from his core's node), what others do not find on theirs, and what is
//! reserved for the host. What comes later may break that: then the container is to be given all nodes.

use std::collections::{BTreeMap, BTreeSet};

use rust_decimal::Decimal;
use shared::ids::KernelId;

use super::{Computer, Ledger, State};
use crate::resource::{Allocation, Amount, ContainerLimits};

/// A kernel whose container has to get all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// Which.
    pub kernel_id: KernelId,
    /// `CpusetMems` that its container may have: the node of its cores.
    pub node: String,
    /// `CpusetMems` that it is to have: all nodes, joined by commas.
    pub all: String,
    /// Tells this container's pinning from a later one's.
    turn: u64,
}

/// The kernels that are pinned, or may be: node, and which pinning it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Pins {
    by_kernel: BTreeMap<KernelId, (i32, u64)>,
    turns: u64,
}

impl Pins {
    fn insert(&mut self, kernel_id: KernelId, node: i32) {
        self.turns += 1;
        self.by_kernel.insert(kernel_id, (node, self.turns));
    }

    pub(super) fn remove(&mut self, kernel_id: KernelId) {
        self.by_kernel.remove(&kernel_id);
    }
}

impl Ledger {
    /// What the container of a kernel may use that has this allocation. One that is pinned by it is
    /// looked after from now on ([`Ledger::to_widen`]).
    pub fn container_limits(
        &self,
        kernel_id: KernelId,
        allocation: &Allocation,
    ) -> ContainerLimits {
        let mut limits = ContainerLimits::default();
        for Computer { plugin, devices } in &self.inventory().computers {
            plugin.limit(devices, allocation.of_device(plugin.key()), &mut limits);
        }
        let mut state = self.state();
        // Its own reservation is among the holders, except when someone only asks.
        let held = state.holders.contains_key(&kernel_id);
        let asking = (!held).then_some(allocation);
        match node_of(&limits).filter(|node| self.has_room(&state, *node, asking)) {
            Some(node) if held => state.pins.insert(kernel_id, node),
            Some(_) => {}
            None => {
                limits.cpuset_mems = None;
                state.pins.remove(kernel_id);
            }
        }
        limits
    }

    /// The kernels whose containers are pinned to a node that may have too little for all by now. After
    /// a restart of the agent those are taken for pinned that the life before has pinned, also where this one pins none.
    pub fn to_widen(&self) -> Vec<Pinned> {
        let state = self.state();
        let nodes: BTreeSet<i32> = state.pins.by_kernel.values().map(|pin| pin.0).collect();
        let full: BTreeSet<i32> = nodes
            .into_iter()
            .filter(|node| !self.has_room(&state, *node, None))
            .collect();
        let all: Vec<String> = self.node_memory.keys().map(i32::to_string).collect();
        let all = all.join(",");
        let pins = state.pins.by_kernel.iter();
        pins.filter(|(_, (node, _))| full.contains(node))
            .map(|(kernel_id, (node, turn))| Pinned {
                kernel_id: *kernel_id,
                node: node.to_string(),
                all: all.clone(),
                turn: *turn,
            })
            .collect()
    }

    /// The container has all nodes, or is not pinned by this agent.
    pub fn widened(&self, pinned: &Pinned) {
        let mut state = self.state();
        let now = state.pins.by_kernel.get(&pinned.kernel_id);
        if now.is_some_and(|(_, turn)| *turn == pinned.turn) {
            state.pins.remove(pinned.kernel_id);
        }
    }

    /// Takes a kernel that was found for pinned where it may be.
    pub(super) fn suppose_pinned(state: &mut State, kernel_id: KernelId, allocation: &Allocation) {
        let inventory = state.inventory.clone();
        let mut limits = ContainerLimits::default();
        for Computer { plugin, devices } in &inventory.computers {
            if plugin.key() == "cpu" {
                plugin.limit(devices, allocation.of_device("cpu"), &mut limits);
            }
        }
        if let Some(node) = node_of(&limits) {
            state.pins.insert(kernel_id, node);
        }
    }

    /// Whether a node has memory for all that may come to lie there; `asking` holds nothing yet. No node has
    /// where nothing is to be pinned.
    fn has_room(&self, state: &State, node: i32, asking: Option<&Allocation>) -> bool {
        let memory = self.node_memory.get(&node);
        let Some(memory) = memory.filter(|_| self.policy.memory_nodes) else {
            return false;
        };
        let computers = state.inventory.computers.iter();
        let cores = computers.filter(|computer| computer.plugin.key() == "cpu");
        let node_of: BTreeMap<&str, i32> = cores
            .flat_map(|computer| &computer.devices)
            .filter_map(|core| Some((core.id.as_str(), core.numa_node?)))
            .collect();
        let (mut here, mut elsewhere) = (Amount::ZERO, BTreeMap::<i32, Amount>::new());
        let held = state.holders.values().map(|holder| &holder.allocation);
        for allocation in held.chain(asking) {
            let bytes = allocation.total("mem", "mem");
            let cores = allocation.ids("cpu", "cpu").into_iter();
            let nodes: Option<BTreeSet<i32>> =
                cores.map(|core| node_of.get(core).copied()).collect();
            match nodes {
                Some(nodes) if !nodes.is_empty() && !nodes.contains(&node) => {
                    for other in nodes {
                        *elsewhere.entry(other).or_default() += bytes;
                    }
                }
                // Also one whose cores are not known, or not there any more.
                _ => here += bytes,
            }
        }
        let spilt = elsewhere.into_iter().map(|(other, bytes)| {
            let memory = self.node_memory.get(&other).copied().unwrap_or_default();
            (bytes - Decimal::from(memory)).max(Amount::ZERO)
        });
        let host = Decimal::from(self.policy.reserved_mem);
        // Not the last byte: also where nothing is reserved, the host has some of it.
        here + spilt.sum::<Amount>() + host < Decimal::from(*memory)
    }
}

fn node_of(limits: &ContainerLimits) -> Option<i32> {
    limits.cpuset_mems.as_deref()?.parse().ok()
}
