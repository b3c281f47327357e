//! What a ledger tells: to the manager, to statistics and to people. It changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use rust_decimal::Decimal;
use serde::Serialize;

use super::{Computer, Holder, Ledger, State};
use crate::resource::slots::text;
use crate::resource::{
    Allocation, AllocationMap, Amount, AttachedDevice, Hardware, PluginFacts, SlotMetadata,
    SlotType,
};

/// The ledger at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Slot, device id, used and total, as text.
    pub devices: Vec<(String, String, String, String)>,
    /// Holder by kernel id.
    pub holders: BTreeMap<String, Holder>,
}

/// What the node announces of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AvailableSlot {
    /// Slot name.
    pub name: String,
    /// What it counts.
    pub kind: SlotType,
    /// How much, without what is reserved for the host. Not reduced by what kernels hold; what they
    /// hold of accelerators that are not given out any more is in it.
    pub amount: Amount,
}

impl Ledger {
    /// Ids of the devices of a slot that kernels hold.
    pub fn ids_held(&self, device: &str, slot: &str) -> BTreeSet<String> {
        let state = self.state();
        let all = state.holders.values();
        all.flat_map(|holder| holder.allocation.ids(device, slot))
            .map(str::to_owned)
            .collect()
    }

    /// The whole ledger, for people and for tests.
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state();
        let rows = state.maps.iter().flat_map(AllocationMap::rows);
        let devices = rows.map(|(device, used)| {
            (
                device.slot.clone(),
                device.id.clone(),
                text(used),
                text(device.total),
            )
        });
        let holders = state
            .holders
            .iter()
            .map(|(id, holder)| (id.to_string(), holder.clone()));
        Snapshot {
            devices: devices.collect(),
            holders: holders.collect(),
        }
    }

    /// The devices of an allocation per device name, as shown with the kernel.
    pub fn attached_devices(&self, allocation: &Allocation) -> Vec<(String, Vec<AttachedDevice>)> {
        let inventory = self.inventory();
        let attached = |name: &str| {
            let computer = inventory.computers.iter().find(|c| c.plugin.key() == name);
            computer.map(|c| c.plugin.attached(&c.devices, allocation.of_device(name)))
        };
        let names = allocation.devices().map(|(name, _)| name);
        names
            .filter_map(|name| Some((name.to_owned(), attached(name)?)))
            .collect()
    }

    /// What the node announces: every declared slot, without what is reserved for the host, and every
    /// accelerator's slot that kernels hold. The manager subtracts what kernels hold, and gives a node
    /// on which any slot is below zero no session at all.
    pub fn available(&self) -> Vec<AvailableSlot> {
        let (inventory, mut beyond) = {
            let state = self.state();
            (state.inventory.clone(), state.held_beyond())
        };
        let mut totals: Vec<(String, Amount)> = Vec::new();
        for Computer { plugin, devices } in &inventory.computers {
            totals.extend(plugin.totals(devices));
        }
        let total = |slot: &str| {
            let found = totals.iter().find(|(name, _)| name == slot);
            found.map_or(Decimal::ZERO, |(_, amount)| *amount)
        };
        let mut slots: Vec<AvailableSlot> = inventory
            .known
            .iter()
            .map(|(name, kind)| {
                let amount = match name.as_str() {
                    "mem" => {
                        let bytes = u64::try_from(total(name)).unwrap_or(u64::MAX);
                        align_memory(bytes, self.policy.reserved_mem, self.policy.align_mem).into()
                    }
                    "cpu" => {
                        (total(name) - Decimal::from(self.policy.reserved_cpu)).max(Decimal::ZERO)
                    }
                    name => total(name) + beyond.remove(name).unwrap_or_default(),
                };
                AvailableSlot {
                    name: name.clone(),
                    kind: *kind,
                    amount,
                }
            })
            .collect();
        // Of plugins that are gone, or not there yet.
        slots.extend(beyond.into_iter().map(|(name, amount)| AvailableSlot {
            kind: SlotType::of_devices(&name),
            name,
            amount,
        }));
        slots
    }

    /// Device name, version and facts of every plugin, for the heartbeat's `compute_plugins`.
    pub fn compute_plugins(&self) -> Vec<(String, PluginFacts)> {
        let inventory = self.inventory();
        let all = inventory.computers.iter().map(|c| &c.plugin);
        all.map(|plugin| (plugin.key().to_owned(), plugin.facts()))
            .collect()
    }

    /// How the slots of every plugin are shown.
    pub fn metadata(&self) -> Vec<SlotMetadata> {
        let inventory = self.inventory();
        let all = inventory.computers.iter();
        all.flat_map(|computer| computer.plugin.metadata())
            .collect()
    }

    /// The state of the hardware behind every plugin that can tell it.
    pub fn hardware(&self) -> Vec<(String, Hardware)> {
        let inventory = self.inventory();
        let all = inventory.computers.iter().map(|c| &c.plugin);
        all.filter_map(|plugin| Some((plugin.key().to_owned(), plugin.hardware()?)))
            .collect()
    }

    /// Amount per device of all accelerators' slots that kernels hold, for billing and for people.
    pub fn accelerators_held(&self) -> BTreeMap<String, Amount> {
        let mut sums = BTreeMap::new();
        for holder in self.state().holders.values() {
            let all = holder.allocation.devices();
            let held = all.filter(|(name, _)| !matches!(*name, "cpu" | "mem"));
            for (id, amount) in held
                .flat_map(|(_, slots)| slots)
                .flat_map(|(_, shares)| shares)
            {
                *sums.entry(id.clone()).or_insert(Decimal::ZERO) += *amount;
            }
        }
        sums
    }

    /// Whether a slot counts bytes.
    pub fn is_bytes(&self, slot: &str) -> bool {
        self.inventory()
            .known
            .iter()
            .any(|(name, kind)| name == slot && *kind == SlotType::Bytes)
    }
}

impl State {
    /// By slot: what kernels hold of accelerators' devices beyond what the maps have of them. Devices
    /// that do not work, are gone, or have become another slot, are held with all that was given.
    pub(super) fn held_beyond(&self) -> BTreeMap<String, Amount> {
        let mut held: BTreeMap<(&str, &str, &str), Amount> = BTreeMap::new();
        let mut beyond = BTreeMap::new();
        let rows = |device: &str, slot: &str, id: &str| {
            let map = &self.maps[self.inventory.position(device)?];
            let row = map.row(slot, id)?;
            Some((row.id.as_str(), row.total))
        };
        let all = self.holders.values();
        let accelerators = all
            .flat_map(|holder| holder.allocation.devices())
            .filter(|(device, _)| !matches!(*device, "cpu" | "mem"));
        for (device, slots) in accelerators {
            for (slot, shares) in slots {
                for (id, amount) in shares {
                    let id = rows(device, slot, id).map_or(id.as_str(), |(id, _)| id);
                    *held.entry((device, slot, id)).or_default() += *amount;
                }
            }
        }
        for ((device, slot, id), amount) in held {
            let total = rows(device, slot, id).map_or(Decimal::ZERO, |(_, total)| total);
            if amount > total {
                *beyond.entry(slot.to_owned()).or_default() += amount - total;
            }
        }
        beyond
    }
}

/// The memory announced: the original's rule, bit by bit, because the manager compares values. Its
/// first step looks like rounding up and adds the remainder.
pub(super) fn align_memory(total: u64, reserved: u64, align: u64) -> u64 {
    let align = u128::from(align.max(1));
    let total = u128::from(total);
    let usable = (total + total % align).saturating_sub(u128::from(reserved));
    u64::try_from(usable - usable % align).unwrap_or(u64::MAX)
}
