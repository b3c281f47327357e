//! The two plugins every node has: `cpu` and `mem`.

use std::collections::BTreeSet;

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;
use serde_json::{Map, json};

use super::allocation::Shares;
use super::host::HostInventory;
use super::{
    AllocationMap, Amount, AttachedDevice, ContainerLimits, Device, DevicePlugin, MapDevice,
    NumberFormat, PluginError, SlotDeclaration, SlotMetadata, SlotType, Strategy,
};

/// Cores: one device each.
#[derive(Debug)]
pub(super) struct CpuPlugin {
    pub host: HostInventory,
    /// Slots a core offers.
    pub overcommit: u32,
    /// Whether containers get a CPU quota.
    pub quota: bool,
}

/// Memory: one device for all of it.
#[derive(Debug)]
pub(super) struct MemPlugin {
    /// Bytes, with overcommit.
    pub total: u64,
}

fn shares_of<'a>(allocation: &'a [(String, Shares)], slot: &str) -> &'a [(String, Amount)] {
    allocation
        .iter()
        .find(|(name, _)| name == slot)
        .map_or(&[], |(_, shares)| shares)
}

/// A slot as the original shows it; its icon has the slot's name.
fn shown(slot: &str, description: &str, name: &str, unit: &str, binary: bool) -> Vec<SlotMetadata> {
    vec![SlotMetadata {
        slot_name: slot.to_owned(),
        description: description.to_owned(),
        human_readable_name: name.to_owned(),
        display_unit: unit.to_owned(),
        number_format: NumberFormat {
            binary,
            round_length: 0,
        },
        display_icon: slot.to_owned(),
    }]
}

impl CpuPlugin {
    fn node_of(&self, id: &str) -> Option<i32> {
        self.host.node_of_core.get(&id.parse().ok()?).copied()
    }

    /// Nodes that have both memory and usable cores.
    fn nodes_with_cores(&self) -> usize {
        let nodes: BTreeSet<&i32> = self.host.node_of_core.values().collect();
        let with_memory = |node: &&&i32| self.host.node_memory.contains_key(node);
        nodes.iter().filter(with_memory).count()
    }
}

impl DevicePlugin for CpuPlugin {
    fn key(&self) -> &str {
        "cpu"
    }

    fn slots(&self) -> Vec<SlotDeclaration> {
        vec![SlotDeclaration {
            name: "cpu".to_owned(),
            kind: SlotType::Count,
        }]
    }

    fn devices(&self) -> Result<Vec<Device>, PluginError> {
        let device = |core: &u32| Device {
            id: core.to_string(),
            device_name: "cpu".to_owned(),
            hw_location: "root".to_owned(),
            memory_size: 0,
            processing_units: u64::from(self.overcommit),
            numa_node: self.host.node_of_core.get(core).copied(),
            near: Vec::new(),
        };
        Ok(self.host.cores.iter().map(device).collect())
    }

    fn allocation_map(&self, devices: &[Device]) -> AllocationMap {
        let rows = devices.iter().map(|device| MapDevice {
            id: device.id.clone(),
            alias: None,
            slot: "cpu".to_owned(),
            kind: SlotType::Count,
            total: device.processing_units.into(),
        });
        AllocationMap::discrete(Strategy::Evenly, rows.collect(), Vec::new())
    }

    fn totals(&self, devices: &[Device]) -> Vec<(String, Amount)> {
        let units = devices
            .iter()
            .map(|device| device.processing_units)
            .sum::<u64>();
        vec![("cpu".to_owned(), units.into())]
    }

    fn limit(&self, _: &[Device], allocation: &[(String, Shares)], limits: &mut ContainerLimits) {
        let shares = shares_of(allocation, "cpu");
        let mut cores: Vec<u32> = shares
            .iter()
            .filter_map(|(id, _)| id.parse().ok())
            .collect();
        cores.sort_unstable();
        cores.dedup();
        if cores.is_empty() {
            return;
        }
        limits.cpu_count = u32::try_from(cores.len()).unwrap_or(u32::MAX);
        let listed: Vec<String> = cores.iter().map(u32::to_string).collect();
        limits.cpuset_cpus = Some(listed.join(","));
        if self.quota {
            let slots: Amount = shares.iter().map(|(_, amount)| *amount).sum();
            let nano = slots * Decimal::from(1_000_000_000) / Decimal::from(self.overcommit.max(1));
            limits.nano_cpus = nano.to_i64();
        }
        // One node says nothing on a host that has only one with cores: memory without cores (CXL)
        // is for all.
        if self.nodes_with_cores() > 1 {
            let mut nodes = cores.iter().map(|core| self.node_of(&core.to_string()));
            if let Some(Some(first)) = nodes.next()
                && nodes.all(|node| node == Some(first))
            {
                limits.cpuset_mems = Some(first.to_string());
            }
        }
    }

    fn metadata(&self) -> Vec<SlotMetadata> {
        shown("cpu", "CPU", "CPU", "Core", false)
    }

    fn attached(&self, _: &[Device], allocation: &[(String, Shares)]) -> Vec<AttachedDevice> {
        let shares = shares_of(allocation, "cpu");
        let device = |(id, _): &(String, Amount)| AttachedDevice {
            device_id: id.clone(),
            model_name: String::new(),
            data: Map::from_iter([("cores".to_owned(), json!(shares.len()))]),
        };
        shares.iter().map(device).collect()
    }
}

impl DevicePlugin for MemPlugin {
    fn key(&self) -> &str {
        "mem"
    }

    fn slots(&self) -> Vec<SlotDeclaration> {
        vec![SlotDeclaration {
            name: "mem".to_owned(),
            kind: SlotType::Bytes,
        }]
    }

    fn devices(&self) -> Result<Vec<Device>, PluginError> {
        Ok(vec![Device {
            id: "root".to_owned(),
            device_name: "mem".to_owned(),
            hw_location: "root".to_owned(),
            memory_size: self.total,
            processing_units: 0,
            numa_node: Some(0),
            near: Vec::new(),
        }])
    }

    fn allocation_map(&self, devices: &[Device]) -> AllocationMap {
        let rows = devices.iter().map(|device| MapDevice {
            id: device.id.clone(),
            alias: None,
            slot: "mem".to_owned(),
            kind: SlotType::Bytes,
            total: device.memory_size.into(),
        });
        AllocationMap::discrete(Strategy::Fill, rows.collect(), Vec::new())
    }

    fn totals(&self, devices: &[Device]) -> Vec<(String, Amount)> {
        let bytes = devices.iter().map(|device| device.memory_size).sum::<u64>();
        vec![("mem".to_owned(), bytes.into())]
    }

    fn limit(&self, _: &[Device], allocation: &[(String, Shares)], limits: &mut ContainerLimits) {
        let bytes: Amount = shares_of(allocation, "mem")
            .iter()
            .map(|(_, amount)| *amount)
            .sum();
        // Whole bytes; more than the engine can count is as good as its largest number.
        let bytes = bytes.trunc().to_i64().unwrap_or(i64::MAX);
        if bytes > 0 {
            limits.memory = Some(bytes);
            limits.memory_swap = Some(bytes);
        }
    }

    fn metadata(&self) -> Vec<SlotMetadata> {
        shown("ram", "Memory", "RAM", "GiB", true)
    }

    fn attached(&self, _: &[Device], allocation: &[(String, Shares)]) -> Vec<AttachedDevice> {
        let device = |(id, _): &(String, Amount)| AttachedDevice {
            device_id: id.clone(),
            model_name: String::new(),
            data: Map::new(),
        };
        shares_of(allocation, "mem").iter().map(device).collect()
    }
}
