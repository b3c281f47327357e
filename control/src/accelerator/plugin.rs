//! One kind of accelerator as the ledger sees it.
//!
//! In: its devices as they are known. Out: slots, an allocation map, and what a kernel's devices mean
//! for its container. Invariants: a plugin never changes, it is replaced; what does not work is in
//! no map and in no total, and is still told of kernels that hold it (the ledger announces it for them).

use std::collections::BTreeMap;

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;
use serde_json::{Map, json};

use super::device::{AcceleratorDevice, Versions};
use super::inject::Injection;
use super::settings::{Settings, ShareUnits};
use crate::resource::{
    AllocationMap, Amount, AttachedDevice, ContainerLimits, Device, DevicePlugin, Hardware,
    HardwareStatus, MapDevice, NumberFormat, PluginError, PluginFacts, Shares, SlotDeclaration,
    SlotMetadata, SlotType, Strategy,
};

/// The least multiprocessors a share of a device comes with, as in the original.
const LEAST_PROCESSORS: u64 = 4;

/// A kind of accelerator.
#[derive(Debug, Clone)]
pub struct AcceleratorPlugin {
    /// Device name.
    pub key: String,
    /// Its devices.
    pub devices: Vec<AcceleratorDevice>,
    /// Slots that are declared whether a device has them or not.
    pub declared: Vec<SlotDeclaration>,
    /// How slots are shown; what is left out is made of the slot's name.
    pub shown: Vec<SlotMetadata>,
    /// None gives devices out as a whole.
    pub shares: Option<ShareUnits>,
    /// What containers get.
    pub injection: Injection,
    /// What the heartbeat tells.
    pub facts: PluginFacts,
}

impl AcceleratorPlugin {
    /// The plugin of a kind of the drivers' devices.
    pub fn of_kind(kind: &str, devices: &[AcceleratorDevice], settings: &Settings) -> Self {
        let devices: Vec<AcceleratorDevice> =
            devices.iter().filter(|d| d.kind == kind).cloned().collect();
        let shares = settings.shares.filter(|_| kind == "cuda");
        let mut facts = PluginFacts::default();
        if kind == "cuda" {
            facts.flags.push(("cuda_support".into(), true));
            let told = |version: fn(&Versions) -> &String| {
                let mut all = devices.iter().map(|device| version(&device.versions));
                all.find(|version| !version.is_empty()).cloned()
            };
            let driver = told(|versions| &versions.driver);
            let runtime = told(|versions| &versions.runtime);
            (facts.texts).extend(driver.map(|version| ("nvidia_version".into(), version)));
            (facts.texts).extend(runtime.map(|version| ("cuda_version".into(), version)));
        }
        let mut plugin = Self {
            key: kind.to_owned(),
            injection: Injection::of_kind(kind, settings),
            declared: Vec::new(),
            shown: Vec::new(),
            devices,
            shares,
            facts,
        };
        plugin.declared = vec![SlotDeclaration {
            name: plugin.whole_slot(),
            kind: SlotType::Count,
        }];
        plugin
    }

    /// The plugin of what device plugins list as slots of one device name.
    pub fn of_slots(key: &str, slots: &[String], devices: Vec<AcceleratorDevice>) -> Self {
        let declared = slots.iter().map(|name| SlotDeclaration {
            name: name.clone(),
            kind: SlotType::of_devices(name),
        });
        Self {
            key: key.to_owned(),
            devices,
            declared: declared.collect(),
            shown: Vec::new(),
            shares: None,
            injection: Injection::Answered {
                nvidia: key == "cuda",
            },
            facts: PluginFacts::default(),
        }
    }

    /// The slot of whole devices, or of their shares.
    fn whole_slot(&self) -> String {
        let what = if self.shares.is_some() {
            "shares"
        } else {
            "device"
        };
        format!("{}.{what}", self.key)
    }

    fn slot_of(&self, device: &AcceleratorDevice) -> String {
        if let Some(slot) = &device.slot {
            return slot.clone();
        }
        match &device.profile {
            Some(profile) => format!("{}.device:{profile}-mig", self.key),
            None => self
                .declared
                .first()
                .map_or_else(|| self.whole_slot(), |declared| declared.name.clone()),
        }
    }

    /// How much of its slot a device has.
    fn total_of(&self, device: &AcceleratorDevice) -> Amount {
        let Some(units) = self.shares.filter(|_| device.profile.is_none()) else {
            return Amount::ONE;
        };
        let memory = Decimal::from(device.memory) / Decimal::from(units.memory.max(1));
        let processors = Decimal::from(device.units) / Decimal::from(units.processors.max(1));
        // What is unknown does not limit: memory is where it is a part of the host's.
        let least = match (device.memory, device.units) {
            (_, 0) => memory,
            (0, _) => processors,
            _ => memory.min(processors),
        };
        least.trunc_with_scale(2)
    }

    fn working(&self) -> impl Iterator<Item = &AcceleratorDevice> {
        self.devices.iter().filter(|device| device.healthy)
    }

    /// Memory and processors of an amount of a device.
    fn part_of(&self, device: &AcceleratorDevice, amount: Amount) -> (u64, u64) {
        let Some(units) = self.shares.filter(|_| device.profile.is_none()) else {
            return (device.memory, device.units);
        };
        let of = |unit: u64| (Decimal::from(unit) * amount).trunc().to_u64().unwrap_or(0);
        let processors = of(units.processors.into()).max(LEAST_PROCESSORS);
        (of(units.memory), processors)
    }

    fn known(&self, id: &str) -> Option<&AcceleratorDevice> {
        self.devices.iter().find(|device| device.is_called(id))
    }

    /// Ids and amounts of an allocation in the order of the devices, whatever the order of choice: so
    /// a container numbers the devices it sees, and what is told by number has to be of that device.
    fn held<'a>(&'a self, allocation: &'a [(String, Shares)]) -> Vec<(&'a str, Amount)> {
        let all = allocation.iter().flat_map(|(_, shares)| shares);
        let mut held: Vec<(usize, &str, Amount)> = all
            .filter(|(_, amount)| !amount.is_zero())
            .map(|(id, amount)| {
                let mut known = self.devices.iter().enumerate();
                match known.find(|(_, device)| device.is_called(id)) {
                    Some((place, device)) => (place, device.id.as_str(), *amount),
                    None => (usize::MAX, id.as_str(), *amount),
                }
            })
            .collect();
        held.sort_by_key(|(place, ..)| *place);
        held.into_iter()
            .map(|(_, id, amount)| (id, amount))
            .collect()
    }
}

/// What a slot of whole devices counts, or one of parts.
fn slot_type(of_parts: bool) -> SlotType {
    match of_parts {
        true => SlotType::Unique,
        false => SlotType::Count,
    }
}

/// `1g.10gb` of `cuda.device:1g.10gb-mig`: the kind of part that a slot gives out.
pub(super) fn profile_of(slot: &str) -> Option<&str> {
    let (_, part) = slot.split_once(".device:")?;
    part.strip_suffix("-mig")
}

impl DevicePlugin for AcceleratorPlugin {
    fn key(&self) -> &str {
        &self.key
    }

    fn slots(&self) -> Vec<SlotDeclaration> {
        let mut slots = self.declared.clone();
        for device in &self.devices {
            let name = self.slot_of(device);
            if slots.iter().all(|slot| slot.name != name) {
                let kind = slot_type(device.profile.is_some());
                slots.push(SlotDeclaration { name, kind });
            }
        }
        slots
    }

    fn devices(&self) -> Result<Vec<Device>, PluginError> {
        let device = |known: &AcceleratorDevice| Device {
            id: known.id.clone(),
            device_name: self.key.clone(),
            hw_location: known.pci.clone(),
            memory_size: known.memory,
            processing_units: known.units,
            numa_node: known.numa_node,
            near: known.near.clone(),
        };
        Ok(self.devices.iter().map(device).collect())
    }

    fn allocation_map(&self, _: &[Device]) -> AllocationMap {
        let rows = self.working().map(|device| MapDevice {
            id: device.id.clone(),
            alias: device.number.map(|number| number.to_string()),
            slot: self.slot_of(device),
            kind: slot_type(device.profile.is_some()),
            total: self.total_of(device),
        });
        let rows = rows.collect();
        let exclusive = ["device:*-mig", "device", "shares"]
            .map(|what| format!("{}.{what}", self.key))
            .to_vec();
        match self.shares {
            Some(units) => {
                AllocationMap::fraction(Strategy::Evenly, units.quantum, rows, exclusive)
            }
            None => AllocationMap::discrete(Strategy::Evenly, rows, exclusive),
        }
    }

    fn totals(&self, _: &[Device]) -> Vec<(String, Amount)> {
        let mut totals: BTreeMap<String, Amount> = BTreeMap::new();
        for device in self.working() {
            *totals.entry(self.slot_of(device)).or_default() += self.total_of(device);
        }
        totals.into_iter().collect()
    }

    fn limit(&self, _: &[Device], allocation: &[(String, Shares)], limits: &mut ContainerLimits) {
        let held = self.held(allocation);
        let devices: Vec<Option<&AcceleratorDevice>> =
            held.iter().map(|(id, _)| self.known(id)).collect();
        let ids: Vec<&str> = held.iter().map(|(id, _)| *id).collect();
        self.injection.inject(&ids, &devices, limits);
        if held.is_empty() {
            return;
        }
        let upper = self.key.to_uppercase().replace('-', "_");
        let mut line = |name: &str, value: String| {
            limits
                .resource_lines
                .push((format!("{upper}_{name}"), value));
        };
        let listed = ids.iter().enumerate();
        let listed: Vec<String> = listed.map(|(place, id)| format!("{place}:{id}")).collect();
        line("GLOBAL_DEVICE_IDS", listed.join(","));
        if self.key != "cuda" {
            return;
        }
        let shared = held.iter().filter_map(|(id, amount)| {
            let device = self.known(id)?;
            (self.shares.is_some() && device.profile.is_none())
                .then(|| (*id, self.part_of(device, *amount)))
        });
        let parts: Vec<(&str, (u64, u64))> = shared.collect();
        let virtualized = u8::from(!parts.is_empty());
        if let Some(units) = self.shares.filter(|_| !parts.is_empty()) {
            let list = |text: &dyn Fn(&(u64, u64)) -> String| {
                let all = parts
                    .iter()
                    .map(|(id, part)| format!("{id}:{}", text(part)));
                all.collect::<Vec<_>>().join(",")
            };
            line("MEMORY_LIMITS", list(&|part| part.0.to_string()));
            line("PROCESSOR_LIMITS", list(&|part| part.1.to_string()));
            line("RESERVED_MEMORY", units.reserved.to_string());
        }
        line("RESOURCE_VIRTUALIZED", virtualized.to_string());
    }

    fn attached(&self, _: &[Device], allocation: &[(String, Shares)]) -> Vec<AttachedDevice> {
        let attached = |(id, amount): (&str, Amount)| {
            let device = self.known(id);
            let (memory, units) = device.map_or((0, 0), |device| self.part_of(device, amount));
            AttachedDevice {
                device_id: id.to_owned(),
                model_name: device.map_or_else(String::new, |device| device.model.clone()),
                data: Map::from_iter([
                    ("mem".to_owned(), json!(memory)),
                    ("smp".to_owned(), json!(units)),
                ]),
            }
        };
        self.held(allocation).into_iter().map(attached).collect()
    }

    fn metadata(&self) -> Vec<SlotMetadata> {
        let shown = |slot: SlotDeclaration| {
            let given = self.shown.iter().find(|shown| shown.slot_name == slot.name);
            given
                .cloned()
                .unwrap_or_else(|| metadata(&self.key, &slot.name))
        };
        self.slots().into_iter().map(shown).collect()
    }

    fn facts(&self) -> PluginFacts {
        self.facts.clone()
    }

    fn hardware(&self) -> Option<Hardware> {
        let faulty: Vec<&AcceleratorDevice> = self.devices.iter().filter(|d| !d.healthy).collect();
        let status = match (self.devices.len(), faulty.len()) {
            (0, _) => HardwareStatus::Unavailable,
            (_, 0) => HardwareStatus::Healthy,
            (all, bad) if all == bad => HardwareStatus::Offline,
            _ => HardwareStatus::Degraded,
        };
        let words = |device: &AcceleratorDevice| match device.fault {
            Some(code) => format!("fault {code}"),
            None if device.healthy => "works".to_owned(),
            None if device.slot.is_some() => "not healthy, or its plugin is gone".to_owned(),
            None => "does not answer, or is drained".to_owned(),
        };
        let ids: Vec<&str> = faulty.iter().map(|device| device.id.as_str()).collect();
        let status_info = match (status, ids.is_empty()) {
            (HardwareStatus::Unavailable, _) => Some("no device is listed".to_owned()),
            (_, true) => None,
            _ => Some(format!("not given out: {}", ids.join(", "))),
        };
        let told = self.devices.iter();
        let mut metadata: BTreeMap<String, String> =
            told.map(|d| (d.id.clone(), words(d))).collect();
        let ways = self.devices.iter();
        metadata.extend(ways.filter_map(|d| Some((format!("{} near", d.id), d.ways()?))));
        Some(Hardware {
            status,
            status_info,
            metadata,
        })
    }
}

/// How a slot is shown whose plugin says nothing else.
fn metadata(key: &str, slot: &str) -> SlotMetadata {
    let upper = key.to_uppercase();
    let part = slot.strip_prefix(&format!("{key}.device:"));
    let (name, description) = match (part, slot.ends_with(".shares"), key) {
        (Some(profile), _, _) => (profile.to_owned(), format!("{upper} instance {profile}")),
        (None, true, _) => (
            "fGPU".to_owned(),
            format!("{upper}-capable GPU (fractional)"),
        ),
        (None, _, "cuda" | "rocm") => ("GPU".to_owned(), format!("{upper}-capable GPU")),
        _ => (upper.clone(), format!("{upper} device")),
    };
    SlotMetadata {
        slot_name: slot.to_owned(),
        description,
        display_unit: name.clone(),
        human_readable_name: name,
        number_format: NumberFormat {
            binary: false,
            round_length: if slot.ends_with(".shares") { 2 } else { 0 },
        },
        display_icon: match key {
            "cuda" => "gpu1".to_owned(),
            key => key.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests;
