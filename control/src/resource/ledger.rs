//! Who holds what. One lock guards the maps and the holders together, so a reservation is one step
//! and nothing is ever recounted from containers: the original clears its maps and scans Docker
//! after every failure, and forgets kernels that have no container yet (double allocation).

mod memory_nodes;
mod views;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use config::{AffinityPolicy, Config};
use rust_decimal::Decimal;
use serde::Serialize;
use shared::ids::KernelId;
use tokio::sync::watch;

pub use memory_nodes::Pinned;
pub use views::{AvailableSlot, Snapshot};

use super::affinity::{AffinityGraph, Hint};
use super::host::{HostError, HostInventory};
use super::intrinsic::{CpuPlugin, MemPlugin};
use super::map::MapRequest;
use super::{
    Allocation, AllocationMap, Amount, Device, DevicePlugin, PluginError, ResourceError, SlotType,
    Slots, belongs, device_of,
};

/// Why the ledger can not be set up.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The host does not tell what it has.
    #[error("the cores and the memory of this host can not be found out")]
    Host(#[source] HostError),
    /// A plugin does not tell its devices.
    #[error("the devices of {plugin} can not be listed")]
    Devices {
        /// Device name.
        plugin: String,
        /// The cause.
        #[source]
        source: PluginError,
    },
    /// Two plugins of one name.
    #[error("two plugins are called {0}; leave one out with agent.block-compute-plugins")]
    Twice(String),
    /// A plugin offers a slot outside its name.
    #[error(
        "the plugin {plugin} offers the slot {slot}, which does not start with {plugin}; leave it out with agent.block-compute-plugins"
    )]
    SlotName {
        /// Device name.
        plugin: String,
        /// Slot.
        slot: String,
    },
}

/// Why a recorded allocation can not be taken back into the ledger.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The kernel holds something else already.
    #[error("kernel {0} holds another allocation already")]
    Held(KernelId),
}

/// What was odd about a restored allocation; it is held all the same, because it is the truth.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restored {
    /// Slot and id of devices that are gone.
    pub missing: Vec<(String, String)>,
    /// Slot and id of devices now used beyond what they have.
    pub overused: Vec<(String, String)>,
}

/// A request for a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotRequest {
    /// Amounts.
    pub slots: Slots,
    /// Whether shares of a device may be split over several
    /// (`resource_opts.allow_fractional_resource_fragmentation`).
    pub allow_fragmentation: bool,
}

/// What a reservation gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reserved {
    /// All known slots with what was asked, zeroes included: `SLOTS` of `resource.txt`.
    pub slots: Slots,
    /// The devices.
    pub allocation: Allocation,
}

/// How far a holder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HeldState {
    /// Its container is being made.
    Reserved,
    /// Its container exists.
    Committed,
}

/// A kernel and what it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// How far it is.
    pub state: HeldState,
    /// Its devices.
    pub allocation: Allocation,
}

/// Settings of a ledger.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    /// Kinds of devices, in the order in which a kernel is given them.
    pub order: Vec<String>,
    pub affinity: AffinityPolicy,
    /// Cores that are the host's.
    pub reserved_cpu: u32,
    /// Bytes that are the host's.
    pub reserved_mem: u64,
    /// Bytes that announced memory is a multiple of.
    pub align_mem: u64,
    /// Whether memory is pinned to the cores' NUMA node.
    pub memory_nodes: bool,
}

/// The reservation ledger of a node.
#[derive(Debug)]
pub struct Ledger {
    policy: Policy,
    node_memory: BTreeMap<i32, u64>,
    state: Mutex<State>,
    /// Counts the releases that took something off what the node announces.
    shrunk: watch::Sender<u64>,
}

#[derive(Debug, Clone)]
struct Computer {
    plugin: Arc<dyn DevicePlugin>,
    devices: Vec<Device>,
}

/// What the node has; replaced as a whole when devices come, go, or change.
#[derive(Debug)]
struct Inventory {
    computers: Vec<Computer>,
    graph: AffinityGraph,
    /// Slot to its type, in the order of the plugins.
    known: Vec<(String, SlotType)>,
    /// Device names in the order they are allocated; every one is there.
    order: Vec<String>,
}

#[derive(Debug, Clone)]
struct State {
    inventory: Arc<Inventory>,
    /// One map per computer, in the same order.
    maps: Vec<AllocationMap>,
    holders: BTreeMap<KernelId, Holder>,
    pins: memory_nodes::Pins,
}

impl Inventory {
    fn new(computers: Vec<Computer>, order: &[String]) -> Result<Self, InventoryError> {
        let mut known: Vec<(String, SlotType)> = Vec::new();
        for (index, computer) in computers.iter().enumerate() {
            let key = computer.plugin.key();
            if computers[..index].iter().any(|c| c.plugin.key() == key) {
                return Err(InventoryError::Twice(key.to_owned()));
            }
            for slot in computer.plugin.slots() {
                if !belongs(&slot.name, key) {
                    return Err(InventoryError::SlotName {
                        plugin: key.to_owned(),
                        slot: slot.name,
                    });
                }
                known.push((slot.name, slot.kind));
            }
        }
        let mut order = order.to_vec();
        complete_order(&mut order, &computers);
        let graph = AffinityGraph::of(computers.iter().flat_map(|c| &c.devices));
        Ok(Self {
            computers,
            graph,
            known,
            order,
        })
    }

    fn maps(&self) -> Vec<AllocationMap> {
        let all = self.computers.iter();
        all.map(|c| c.plugin.allocation_map(&c.devices)).collect()
    }

    fn position(&self, device: &str) -> Option<usize> {
        self.computers.iter().position(|c| c.plugin.key() == device)
    }
}

impl Computer {
    fn of(plugin: Arc<dyn DevicePlugin>) -> Result<Self, InventoryError> {
        let devices = plugin.devices().map_err(|source| InventoryError::Devices {
            plugin: plugin.key().to_owned(),
            source,
        })?;
        Ok(Self { plugin, devices })
    }
}

impl Ledger {
    /// Finds out what the host has and sets up an empty ledger; `plugins` are the accelerators.
    /// Blocking.
    ///
    /// # Errors
    /// When the host or a plugin does not tell its devices, or plugins are in conflict.
    pub fn discover(
        config: &Config,
        plugins: Vec<Box<dyn DevicePlugin>>,
    ) -> Result<Self, InventoryError> {
        let host = HostInventory::read().map_err(InventoryError::Host)?;
        let total = host.memory.saturating_mul(config.overcommit.mem.into());
        let node_memory = host.node_memory.clone();
        let mut all: Vec<Box<dyn DevicePlugin>> = vec![
            Box::new(CpuPlugin {
                host,
                overcommit: config.overcommit.cpu,
                quota: config.node.cpu_quota,
            }),
            Box::new(MemPlugin { total }),
        ];
        all.extend(plugins);
        let policy = Policy {
            order: config.resource.allocation_order.clone(),
            affinity: config.resource.affinity_policy,
            reserved_cpu: config.resource.reserved_cpu,
            reserved_mem: config.resource.reserved_mem.0,
            align_mem: config.resource.memory_align_size.0,
            memory_nodes: config.node.memory_nodes,
        };
        Self::with_plugins(all, policy, node_memory)
    }

    pub(super) fn with_plugins(
        plugins: Vec<Box<dyn DevicePlugin>>,
        policy: Policy,
        node_memory: BTreeMap<i32, u64>,
    ) -> Result<Self, InventoryError> {
        let computers = plugins
            .into_iter()
            .map(|plugin| Computer::of(plugin.into()));
        let inventory = Inventory::new(computers.collect::<Result<_, _>>()?, &policy.order)?;
        let state = Mutex::new(State {
            maps: inventory.maps(),
            inventory: Arc::new(inventory),
            holders: BTreeMap::new(),
            pins: memory_nodes::Pins::default(),
        });
        Ok(Self {
            policy,
            node_memory,
            state,
            shrunk: watch::Sender::default(),
        })
    }

    /// Puts a plugin in the place of the one of its name, or beside the others. What kernels hold
    /// stays theirs, also of devices that are gone. A plugin equal to the one there changes nothing.
    ///
    /// # Errors
    /// Its devices or slots cannot be used; nothing is changed then.
    pub fn install(&self, plugin: Arc<dyn DevicePlugin>) -> Result<(), InventoryError> {
        let fresh = Computer::of(plugin)?;
        let mut state = self.state();
        let mut computers = state.inventory.computers.clone();
        match state.inventory.position(fresh.plugin.key()) {
            Some(place) => computers[place] = fresh,
            None => computers.push(fresh),
        }
        let inventory = Inventory::new(computers, &self.policy.order)?;
        let mut maps = inventory.maps();
        for holder in state.holders.values() {
            for (computer, map) in inventory.computers.iter().zip(&mut maps) {
                map.apply(holder.allocation.of_device(computer.plugin.key()));
            }
        }
        state.maps = maps;
        state.inventory = Arc::new(inventory);
        Ok(())
    }

    /// Changes when a kernel has given back devices that were announced because it held them. What the
    /// node announces is less then, and the manager has to know before it gives them out.
    pub fn shrinks(&self) -> watch::Receiver<u64> {
        self.shrunk.subscribe()
    }

    fn inventory(&self) -> Arc<Inventory> {
        self.state().inventory.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change replaces whole values, so a panic elsewhere leaves nothing half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes a request: known slots that are missing get zero, unknown zero ones are dropped.
    ///
    /// # Errors
    /// An unknown slot with an amount, or no `cpu` or `mem`.
    pub fn normalise(&self, requested: &Slots) -> Result<Slots, ResourceError> {
        for slot in ["cpu", "mem"] {
            if requested.get(slot).is_none() {
                return Err(ResourceError::argument(format!(
                    "the request names no {slot}; every kernel needs cpu and mem"
                )));
            }
        }
        let inventory = self.inventory();
        let mut slots = Slots::new();
        for (name, amount) in requested.iter() {
            if inventory.known.iter().any(|(known, _)| known == name) {
                slots.set(name, amount);
            } else if !amount.is_zero() {
                let known: Vec<&str> = inventory
                    .known
                    .iter()
                    .map(|(name, _)| name.as_str())
                    .collect();
                return Err(ResourceError::Unsupported {
                    slot: name.to_owned(),
                    known: known.join(", "),
                });
            }
        }
        for (name, _) in &inventory.known {
            if slots.get(name).is_none() {
                slots.set(name, Decimal::ZERO);
            }
        }
        Ok(slots)
    }

    /// Gives a kernel devices, all or none.
    ///
    /// # Errors
    /// As the original's classes; `ResourceError` when the kernel holds something already.
    pub fn reserve(
        &self,
        kernel_id: KernelId,
        request: &SlotRequest,
    ) -> Result<Reserved, ResourceError> {
        let slots = self.normalise(&request.slots)?;
        let mut state = self.state();
        if state.holders.contains_key(&kernel_id) {
            return Err(ResourceError::General(
                "Kernel creation already in progress".to_owned(),
            ));
        }
        // Tried on a copy: a refusal leaves no trace.
        let mut maps = state.maps.clone();
        let inventory = state.inventory.clone();
        let allocation = self.place(&inventory, &mut maps, &slots, request.allow_fragmentation)?;
        state.maps = maps;
        let holder = Holder {
            state: HeldState::Reserved,
            allocation: allocation.clone(),
        };
        state.holders.insert(kernel_id, holder);
        Ok(Reserved { slots, allocation })
    }

    fn place(
        &self,
        inventory: &Inventory,
        maps: &mut [AllocationMap],
        slots: &Slots,
        allow_fragmentation: bool,
    ) -> Result<Allocation, ResourceError> {
        let mut hint = Hint::first(&inventory.graph, self.policy.affinity);
        let mut allocation = Allocation::default();
        for name in &inventory.order {
            let Some(index) = inventory.position(name) else {
                continue;
            };
            let wanted: Vec<(String, Amount)> = slots
                .iter()
                .filter(|(slot, _)| belongs(slot, name))
                .map(|(slot, amount)| (slot.to_owned(), amount))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let request = MapRequest {
                context: Some(name),
                hint: Some(&hint),
                allow_fragmentation,
            };
            let given = maps[index].allocate(&wanted, request)?;
            let ids = given.iter().flat_map(|(_, shares)| shares);
            hint.given = ids.map(|(id, _)| (name.clone(), id.clone())).collect();
            allocation.insert(name, given);
        }
        Ok(allocation)
    }

    /// Ids of the devices of a slot that nobody holds any of.
    pub fn free_devices(&self, slot: &str) -> Vec<String> {
        let state = self.state();
        let rows = state.maps.iter().flat_map(AllocationMap::rows);
        rows.filter(|(device, used)| device.slot == slot && used.is_zero())
            .map(|(device, _)| device.id.clone())
            .collect()
    }

    /// Gives a kernel other devices of a slot than it holds, one of each. `None`, with nothing changed,
    /// when they are not as many or not all free.
    pub fn exchange(&self, kernel_id: KernelId, slot: &str, ids: &[String]) -> Option<Allocation> {
        let device = device_of(slot);
        let mut state = self.state();
        let index = state.inventory.position(device)?;
        let mut holder = state.holders.get(&kernel_id)?.clone();
        let distinct: BTreeSet<&String> = ids.iter().collect();
        let amount = holder.allocation.total(device, slot);
        if distinct.len() != ids.len() || amount != Amount::from(ids.len()) {
            return None;
        }
        let mut slots = holder.allocation.of_device(device).to_vec();
        let mut map = state.maps[index].clone();
        map.free(&slots);
        for (name, shares) in &mut slots {
            if name == slot {
                *shares = ids.iter().map(|id| (id.clone(), Amount::ONE)).collect();
            }
        }
        let known = map.apply(&slots).is_empty();
        let fits = map
            .rows()
            .filter(|(row, _)| row.slot == slot && distinct.contains(&row.id))
            .all(|(row, used)| used <= row.total);
        if !known || !fits {
            return None;
        }
        holder.allocation.insert(device, slots);
        let allocation = holder.allocation.clone();
        state.maps[index] = map;
        state.holders.insert(kernel_id, holder);
        Some(allocation)
    }

    /// Marks that the kernel's container exists. False when it holds nothing.
    pub fn commit(&self, kernel_id: KernelId) -> bool {
        match self.state().holders.get_mut(&kernel_id) {
            Some(holder) => {
                holder.state = HeldState::Committed;
                true
            }
            None => false,
        }
    }

    /// Takes back what a kernel holds; none when it holds nothing, so twice does no harm.
    pub fn release(&self, kernel_id: KernelId) -> Option<Allocation> {
        let mut state = self.state();
        let beyond = state.held_beyond();
        let holder = state.holders.remove(&kernel_id)?;
        state.pins.remove(kernel_id);
        let inventory = state.inventory.clone();
        for (computer, map) in inventory.computers.iter().zip(&mut state.maps) {
            map.free(holder.allocation.of_device(computer.plugin.key()));
        }
        if state.held_beyond() != beyond {
            self.shrunk.send_modify(|count| *count += 1);
        }
        Some(holder.allocation)
    }

    /// Takes a recorded allocation into the ledger as it was, also when devices are gone or
    /// overused: a running kernel is the truth. The same again changes nothing. `pinned`: the memory of its
    /// container may be pinned by this agent.
    ///
    /// # Errors
    /// When the kernel holds something else.
    pub fn restore(
        &self,
        kernel_id: KernelId,
        allocation: &Allocation,
        pinned: bool,
    ) -> Result<Restored, RestoreError> {
        let mut state = self.state();
        if let Some(holder) = state.holders.get_mut(&kernel_id) {
            if !holder.allocation.same_as(allocation) {
                return Err(RestoreError::Held(kernel_id));
            }
            holder.state = HeldState::Committed;
            return Ok(Restored::default());
        }
        let mut restored = Restored::default();
        for (device, slots) in allocation.devices() {
            match state.inventory.position(device) {
                Some(index) => {
                    let map = &mut state.maps[index];
                    let before = map.clone();
                    restored.missing.extend(map.apply(slots));
                    restored.overused.extend(map.overused_since(&before));
                }
                None => {
                    let all = slots
                        .iter()
                        .flat_map(|(slot, shares)| shares.iter().map(move |s| (slot, &s.0)));
                    restored
                        .missing
                        .extend(all.map(|(slot, id)| (slot.clone(), id.clone())));
                }
            }
        }
        let holder = Holder {
            state: HeldState::Committed,
            allocation: allocation.clone(),
        };
        state.holders.insert(kernel_id, holder);
        if pinned {
            Self::suppose_pinned(&mut state, kernel_id, allocation);
        }
        Ok(restored)
    }

    /// What a kernel holds.
    pub fn allocation(&self, kernel_id: KernelId) -> Option<Allocation> {
        self.state()
            .holders
            .get(&kernel_id)
            .map(|holder| holder.allocation.clone())
    }
}

/// Devices the order does not name come before `cpu`, else last: the original fails every creation
/// then.
fn complete_order(order: &mut Vec<String>, computers: &[Computer]) {
    for name in computers.iter().map(|c| c.plugin.key()) {
        if order.iter().any(|known| known == name) {
            continue;
        }
        tracing::warn!(
            device = name,
            "device is missing from resource.allocation-order"
        );
        let place = order
            .iter()
            .position(|known| known == "cpu")
            .unwrap_or(order.len());
        order.insert(place, name.to_owned());
    }
}

#[cfg(test)]
mod tests;
