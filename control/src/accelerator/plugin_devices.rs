//! What device plugins list, by slot: kept over restarts of plugins and of the agent.
//!
//! In: lists, and the news that whoever listed is gone. Out: a plugin in the ledger per device name,
//! whose slots may be served by several device plugins. Invariants: what was listed once stays known,
//! not healthy, until it is listed again or its plugin lists others; what a kernel holds stays known
//! as long as it holds it; no two devices of one device name have one id.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::device::AcceleratorDevice;
use super::plugin::AcceleratorPlugin;
use crate::resource::{InventoryError, Ledger, device_of};

/// Devices of device plugins.
#[derive(Debug, Default)]
pub(super) struct PluginDevices {
    devices: Mutex<BTreeMap<String, Vec<AcceleratorDevice>>>,
    /// Something has changed that is not on disk yet.
    pub(super) unsaved: Notify,
}

impl PluginDevices {
    /// Those of an earlier life: not healthy until they are listed again. What is of no slot that a
    /// plugin is to serve now is forgotten.
    pub(super) fn new(slots: &[String], kept: Vec<AcceleratorDevice>) -> Self {
        let mut devices: BTreeMap<String, Vec<AcceleratorDevice>> = BTreeMap::new();
        for device in kept {
            if let Some(slot) = device.slot.as_ref().filter(|slot| slots.contains(slot)) {
                devices
                    .entry(slot.clone())
                    .or_default()
                    .push(device.as_lost());
            }
        }
        Self {
            devices: Mutex::new(devices),
            unsaved: Notify::new(),
        }
    }

    fn devices(&self) -> MutexGuard<'_, BTreeMap<String, Vec<AcceleratorDevice>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them.
    pub(super) fn known(&self) -> Vec<AcceleratorDevice> {
        self.devices().values().flatten().cloned().collect()
    }

    /// The plugins to begin with.
    pub(super) fn plugins(&self) -> Vec<AcceleratorPlugin> {
        let devices = self.devices();
        let names: BTreeSet<&str> = devices.keys().map(|slot| device_of(slot)).collect();
        names.into_iter().map(|name| of(name, &devices)).collect()
    }

    /// Takes in what is listed of a slot; whether that is new. `counts` says whether whoever lists
    /// still has the word, and is asked when nobody else can take it any more.
    pub(super) fn put(
        &self,
        ledger: &Ledger,
        slot: &str,
        mut fresh: Vec<AcceleratorDevice>,
        counts: impl FnOnce() -> bool,
    ) -> Result<bool, InventoryError> {
        let mut devices = self.devices();
        if !counts() {
            return Ok(false);
        }
        let name = device_of(slot);
        let others = devices.iter().filter(|(of, _)| *of != slot);
        let others = others.filter(|(of, _)| device_of(of) == name);
        let taken: BTreeSet<&str> = others
            .flat_map(|(_, list)| list)
            .map(|device| device.id.as_str())
            .collect();
        let before = fresh.len();
        fresh.retain(|device| !taken.contains(device.id.as_str()));
        if fresh.len() < before {
            tracing::warn!(
                slot,
                devices = before - fresh.len(),
                "devices are left out: another slot of the same device name has such ids"
            );
        }
        let ids: BTreeSet<&str> = fresh.iter().map(|device| device.id.as_str()).collect();
        let held = ledger.ids_held(name, slot);
        let old = devices.get(slot).into_iter().flatten();
        let lost = old.filter(|old| held.contains(&old.id) && !ids.contains(old.id.as_str()));
        let lost: Vec<AcceleratorDevice> = lost.map(AcceleratorDevice::as_lost).collect();
        fresh.extend(lost);
        Self::change(&mut devices, ledger, slot, fresh).inspect(|changed| self.tell(*changed))
    }

    /// Whoever listed a slot is gone; whether that is new.
    pub(super) fn lose(
        &self,
        ledger: &Ledger,
        slot: &str,
        counts: impl FnOnce() -> bool,
    ) -> Result<bool, InventoryError> {
        let mut devices = self.devices();
        if !counts() {
            return Ok(false);
        }
        let lost = devices.get(slot).into_iter().flatten();
        let lost = lost.map(AcceleratorDevice::as_lost).collect();
        Self::change(&mut devices, ledger, slot, lost)
    }

    fn tell(&self, changed: bool) {
        if changed {
            self.unsaved.notify_one();
        }
    }

    fn change(
        devices: &mut BTreeMap<String, Vec<AcceleratorDevice>>,
        ledger: &Ledger,
        slot: &str,
        fresh: Vec<AcceleratorDevice>,
    ) -> Result<bool, InventoryError> {
        let old = devices.get(slot);
        if old.map_or(fresh.is_empty(), |old| *old == fresh) {
            return Ok(false);
        }
        let old = devices.insert(slot.to_owned(), fresh);
        let installed = ledger.install(Arc::new(of(device_of(slot), devices)));
        if let Err(err) = installed {
            // The ledger goes on with what it had, and so does this.
            match old {
                Some(old) => devices.insert(slot.to_owned(), old),
                None => devices.remove(slot),
            };
            return Err(err);
        }
        Ok(true)
    }
}

fn of(name: &str, devices: &BTreeMap<String, Vec<AcceleratorDevice>>) -> AcceleratorPlugin {
    let own = devices.iter().filter(|(slot, _)| device_of(slot) == name);
    let slots: Vec<String> = own.clone().map(|(slot, _)| slot.clone()).collect();
    let listed = own.flat_map(|(_, list)| list).cloned();
    AcceleratorPlugin::of_slots(name, &slots, listed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::{SlotRequest, SlotType, Slots};
    use shared::ids::KernelId;

    const WHOLE: &str = "cuda.device";
    const PART: &str = "cuda.device:1g.10gb-mig";

    fn device(slot: &str, id: &str) -> AcceleratorDevice {
        AcceleratorDevice {
            kind: device_of(slot).to_owned(),
            id: id.to_owned(),
            model: "nvidia.com/gpu".to_owned(),
            pci: String::new(),
            numa_node: None,
            healthy: true,
            fault: None,
            instance: None,
            profile: crate::accelerator::plugin::profile_of(slot).map(str::to_owned),
            memory: 0,
            units: 0,
            nodes: Vec::new(),
            slot: Some(slot.to_owned()),
            versions: Default::default(),
            near: Vec::new(),
            number: None,
        }
    }

    fn ledger(listed: &PluginDevices) -> Ledger {
        let mut options = config::LoadOptions::of_this_process(None, true);
        options.environment = Box::new(|_| None);
        let config = config::load(&options).unwrap().config;
        let plugins = listed.plugins().into_iter();
        let plugins =
            plugins.map(|plugin| Box::new(plugin) as Box<dyn crate::resource::DevicePlugin>);
        Ledger::discover(&config, plugins.collect()).unwrap()
    }

    fn amount(ledger: &Ledger, slot: &str) -> Option<String> {
        let all = ledger.available().into_iter();
        let found = all.into_iter().find(|found| found.name == slot)?;
        Some(found.amount.to_string())
    }

    fn request(slot: &str, amount: &str) -> SlotRequest {
        let mut slots = Slots::new();
        for (name, amount) in [("cpu", "1"), ("mem", "1048576"), (slot, amount)] {
            slots.set(name, amount.parse().unwrap());
        }
        SlotRequest {
            slots,
            allow_fragmentation: false,
        }
    }

    #[test]
    fn slots_of_one_device_name_are_served_by_several_plugins() {
        let listed = PluginDevices::default();
        let ledger = ledger(&listed);
        let put = |slot: &str, ids: &[&str]| {
            let devices = ids.iter().map(|id| device(slot, id)).collect();
            listed.put(&ledger, slot, devices, || true).unwrap()
        };
        assert!(put(WHOLE, &["GPU-0", "GPU-1"]) && put(PART, &["MIG-0", "GPU-1"]));
        assert!(!put(WHOLE, &["GPU-0", "GPU-1"]), "nothing new");
        assert_eq!(amount(&ledger, WHOLE).as_deref(), Some("2"));
        assert_eq!(
            amount(&ledger, PART).as_deref(),
            Some("1"),
            "an id of another slot is not taken"
        );
        let all = ledger.available();
        let kind = |slot: &str| all.iter().find(|found| found.name == slot).unwrap().kind;
        assert_eq!(
            (kind(WHOLE), kind(PART)),
            (SlotType::Count, SlotType::Unique)
        );
        // One of them goes: the other one's devices are given out as before.
        assert!(listed.lose(&ledger, PART, || true).unwrap());
        assert!(
            !listed.lose(&ledger, PART, || true).unwrap(),
            "gone already"
        );
        assert_eq!(amount(&ledger, PART).as_deref(), Some("0"));
        let kernel = KernelId([7; 16]);
        let given = ledger.reserve(kernel, &request(WHOLE, "2")).unwrap();
        assert_eq!(given.allocation.ids("cuda", WHOLE), ["GPU-0", "GPU-1"]);
        // Whoever has lost the word changes nothing.
        assert!(!listed.put(&ledger, WHOLE, Vec::new(), || false).unwrap());
        // What is held is known for as long as it is.
        assert!(put(WHOLE, &["GPU-0"]));
        let known = |id: &str| listed.known().into_iter().find(|device| device.id == id);
        assert!(!known("GPU-1").unwrap().healthy);
        assert_eq!(amount(&ledger, WHOLE).as_deref(), Some("2"), "both held");
        ledger.release(kernel);
        assert_eq!(amount(&ledger, WHOLE).as_deref(), Some("1"));
        put(WHOLE, &["GPU-0", "GPU-2"]);
        assert_eq!(known("GPU-1"), None);
    }

    #[test]
    fn an_earlier_lifes_devices_are_known_and_not_given_out() {
        let kept = vec![device(WHOLE, "GPU-0"), device("old.device", "x")];
        let listed = PluginDevices::new(&[WHOLE.to_owned()], kept);
        let ledger = ledger(&listed);
        assert_eq!(amount(&ledger, WHOLE).as_deref(), Some("0"));
        assert_eq!(amount(&ledger, "old.device"), None);
        // A kernel that has one holds it as before, and it is not given to another one later.
        let holder = KernelId([1; 16]);
        let held = {
            let other = super::tests::ledger(&PluginDevices::default());
            let before = PluginDevices::default();
            before
                .put(&other, WHOLE, vec![device(WHOLE, "GPU-0")], || true)
                .unwrap();
            other
                .reserve(holder, &request(WHOLE, "1"))
                .unwrap()
                .allocation
        };
        ledger.restore(holder, &held, true).unwrap();
        assert!(ledger.allocation(holder).unwrap().same_as(&held));
        let back = vec![device(WHOLE, "GPU-0"), device(WHOLE, "GPU-1")];
        assert!(listed.put(&ledger, WHOLE, back, || true).unwrap());
        let next = ledger
            .reserve(KernelId([2; 16]), &request(WHOLE, "1"))
            .unwrap();
        assert_eq!(next.allocation.ids("cuda", WHOLE), ["GPU-1"]);
        assert!(
            ledger
                .reserve(KernelId([3; 16]), &request(WHOLE, "1"))
                .is_err()
        );
    }
}
