//! Google's TPUs by the PCI bus: which chips there are. Nothing of the kernel tells their load; the
//! runtime of the process that holds them may.
//!
//! In: sysfs, and the runtime's metric service where there is one. Out: readings. Invariant: only chips on the list count, because
//! network and disk devices of Google's machines have the same vendor.
//!
//! Sources: the PCI ids by which published machine-learning frameworks recognise TPU machines;
//! Google's table of chips for their memory.

mod runtime;

use std::net::SocketAddr;
use std::path::Path;

use shared::observed::{AcceleratorCounters, AcceleratorKind, AcceleratorRow};

use super::Reading;
use super::files::{hex, names, numa_node};

const VENDOR: u64 = 0x1ae0;
/// PCI device, name, memory in GiB; of the first, two generations share the id.
const CHIPS: [(u64, &str, Option<u64>); 6] = [
    (0x0027, "TPU v2/v3", None),
    (0x005e, "TPU v4", Some(32)),
    (0x0062, "TPU v5p", Some(95)),
    (0x0063, "TPU v5e", Some(16)),
    (0x006f, "TPU v6e", Some(32)),
    (0x0076, "TPU 7x", Some(192)),
];
const DEVICES: &str = "sys/bus/pci/devices";

/// Whether this host has any.
pub(super) fn is_there(root: &Path) -> bool {
    !look(root).devices.is_empty()
}

/// One look, with what the runtime tells when it listens.
pub(super) fn look_and_ask(root: &Path, runtime: Option<SocketAddr>) -> Reading {
    let mut reading = look(root);
    let chips = runtime.and_then(|address| runtime::ask(address, reading.devices.len()));
    for (row, chip) in reading.devices.iter_mut().zip(chips.into_iter().flatten()) {
        let counters = &mut row.counters;
        counters.memory_total_bytes = chip.memory_total_bytes.or(counters.memory_total_bytes);
        counters.memory_used_bytes = chip.memory_used_bytes;
        counters.utilisation_permille = chip.utilisation_permille;
    }
    reading
}

/// One look at the bus.
pub fn look(root: &Path) -> Reading {
    let mut places: Vec<String> = names(&root.join(DEVICES)).collect();
    places.sort();
    let mut reading = Reading::default();
    for pci in places {
        let device = root.join(DEVICES).join(&pci);
        if hex(&device.join("vendor")) != Some(VENDOR) {
            continue;
        }
        let Some(number) = hex(&device.join("device")) else {
            continue;
        };
        let Some((_, model, memory)) = CHIPS.iter().find(|chip| chip.0 == number) else {
            continue;
        };
        // A driver has it, or a virtual machine monitor would.
        let healthy = device.join("accel").is_dir() || device.join("iommu_group").exists();
        let index = u32::try_from(reading.devices.len()).unwrap_or(u32::MAX);
        let id = format!("tpu-{}", pci.replace(':', "-"));
        reading.devices.push(AcceleratorRow {
            model: (*model).to_owned(),
            numa_node: numa_node(&device),
            pci,
            healthy,
            users_unknown: true,
            counters: AcceleratorCounters {
                memory_total_bytes: memory.map(|gib| gib << 30),
                ..AcceleratorCounters::default()
            },
            ..AcceleratorRow::new(AcceleratorKind::Tpu, index, id)
        });
    }
    reading
}
