//! AMD devices by the kernel's own files: no library is needed.
//!
//! In: the KFD topology and the devices' directories in sysfs. Out: readings.
//! Invariants: a node is a device only when it has compute units; what a file does not tell is
//! absent; two devices never have one id; a device's id does not depend on which others there are;
//! what the files tell of a device that is divided into several nodes (partitions: DPX, QPX, CPX) is no
//! partition's own.
//!
//! Sources: the kernel's documentation of amdgpu (`mem_info_vram_*`, `gpu_busy_percent`, hwmon,
//! RAS) and of KFD's topology (`io_links`) and processes (`vram_<gpu id>`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use shared::observed::{AcceleratorCounters, AcceleratorKind, AcceleratorRow, Proximity};

use super::attribution::{by_container, owner_of};
use super::files::{hex, is_accelerator, names, numa_node, number, text};
use super::{ProcessUse, Reading, clip};

const VENDOR: u64 = 0x1002;
const TOPOLOGY: &str = "sys/class/kfd/kfd/topology/nodes";
/// KFD's type of a link by xGMI; to a processor it may lead too.
const XGMI: u64 = 11;
/// KFD's weight of a link by xGMI, per hop.
const WEIGHT_OF_HOP: u64 = 15;
const PROCESSES: &str = "sys/class/kfd/kfd/proc";

/// Whether this host has AMD's compute driver, or a device for which it may yet be loaded: late at
/// boot, or when it has been installed.
pub(super) fn is_there(root: &Path) -> bool {
    let bus = root.join("sys/bus/pci/devices");
    let is_amd = |name: String| {
        let device = bus.join(name);
        hex(&device.join("vendor")) == Some(VENDOR) && is_accelerator(&device)
    };
    root.join(TOPOLOGY).is_dir() || names(&bus).any(is_amd)
}

/// One look.
pub fn look(root: &Path) -> Reading {
    let mut nodes: Vec<u32> = names(&root.join(TOPOLOGY))
        .filter_map(|name| name.parse().ok())
        .collect();
    nodes.sort_unstable();
    let mut reading = Reading::default();
    let mut of_devices = Vec::new();
    let mut parts: HashMap<String, u32> = HashMap::new();
    for node in nodes {
        let index = u32::try_from(reading.devices.len()).unwrap_or(u32::MAX);
        let directory = root.join(TOPOLOGY).join(node.to_string());
        if let Some((mut row, processes)) = device(root, &directory, index) {
            // Parts of one device share its number. They are counted within it: kernels hold them by these
            // ids, which other devices that come and go may not change.
            let before = parts.entry(row.id.clone()).or_default();
            if *before > 0 {
                row.id = format!("{}-{before}", row.id);
            }
            *before += 1;
            clip(&mut row);
            for (pid, used) in processes {
                let sum: &mut ProcessUse = reading.processes.entry(pid).or_default();
                let (a, b) = (sum.memory_bytes, used.memory_bytes);
                sum.memory_bytes = Some(a.unwrap_or(0).saturating_add(b.unwrap_or(0)));
            }
            reading.devices.push(row);
            of_devices.push(node);
        }
    }
    let places: Vec<String> = reading.devices.iter().map(|row| row.pci.clone()).collect();
    for (row, node) in reading.devices.iter_mut().zip(&of_devices) {
        if places.iter().filter(|pci| **pci == row.pci).count() > 1 {
            row.counters = of_partition(&root.join(TOPOLOGY).join(node.to_string()));
        }
        let links = root.join(TOPOLOGY).join(node.to_string()).join("io_links");
        for (to, links) in xgmi(&links) {
            let place = of_devices.iter().position(|node| u64::from(*node) == to);
            if let Some(near) = place.and_then(|place| row.near.get_mut(place)) {
                *near = Proximity::links(links);
            }
        }
    }
    reading
}

/// Nodes to which xGMI leads, and by how many links.
fn xgmi(links: &Path) -> Vec<(u64, u32)> {
    let all = names(links).map(|name| properties(&links.join(name)));
    let all = all.filter(|link| link.get("type") == Some(&XGMI));
    all.filter_map(|link| {
        let get = |name: &str| link.get(name).copied().unwrap_or(0);
        // The least is what one link carries, the most what all do.
        let side_by_side = get("max_bandwidth").checked_div(get("min_bandwidth"));
        // What goes by way of other devices is slower.
        let hops = (get("weight") / WEIGHT_OF_HOP).max(1);
        let links = side_by_side.unwrap_or(1) / hops;
        let links = u32::try_from(links).unwrap_or(u32::MAX).max(1);
        Some((*link.get("node_to")?, links))
    })
    .collect()
}

fn properties(directory: &Path) -> HashMap<String, u64> {
    let all = text(&directory.join("properties")).unwrap_or_default();
    let pairs = all.lines().filter_map(|line| line.split_once(' '));
    pairs
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect()
}

fn device(
    root: &Path,
    directory: &Path,
    index: u32,
) -> Option<(AcceleratorRow, HashMap<u32, ProcessUse>)> {
    let properties = properties(directory);
    let get = |name: &str| properties.get(name).copied();
    let simds = get("simd_count").filter(|count| *count > 0)?;
    let place = get("location_id").unwrap_or(0);
    let pci = format!(
        "{:04x}:{:02x}:{:02x}.{}",
        get("domain").unwrap_or(0),
        (place >> 8) & 0xff,
        (place >> 3) & 0x1f,
        place & 7
    );
    let of_pci = root.join("sys/bus/pci/devices").join(&pci);
    let gpu = number(&directory.join("gpu_id")).unwrap_or(0);
    let target = get("gfx_target_version").unwrap_or(0);
    let model = text(&of_pci.join("product_name")).filter(|name| !name.is_empty());
    let counters = counters(&of_pci);
    let processes = processes(root, gpu);
    let listed = processes.iter().map(|(pid, used)| (*pid, *used));
    let (users, all_found) = by_container(listed, owner_of);
    let id = match get("unique_id").filter(|id| *id != 0) {
        Some(id) => format!("{id:016x}"),
        None => pci.clone(),
    };
    let row = AcceleratorRow {
        model: model.unwrap_or_else(|| {
            let (major, minor, step) = (target / 10_000, target / 100 % 100, target % 100);
            format!("AMD gfx{major}{minor:x}{step:x}")
        }),
        numa_node: numa_node(&of_pci),
        // Its files go when it falls off the bus.
        healthy: counters.memory_total_bytes.is_some(),
        pci,
        units: u32::try_from(simds / get("simd_per_cu").unwrap_or(4).max(1)).ok(),
        users,
        users_unknown: !all_found,
        counters,
        ..AcceleratorRow::new(AcceleratorKind::Rocm, index, id)
    };
    Some((row, processes))
}

/// What is told of a partition alone: its memory, in the banks that are on the device.
fn of_partition(node: &Path) -> AcceleratorCounters {
    let banks = node.join("mem_banks");
    let banks = names(&banks).map(|name| properties(&banks.join(name)));
    let own = banks.filter(|bank| matches!(bank.get("heap_type"), Some(&(1 | 2))));
    let sizes = own.filter_map(|bank| bank.get("size_in_bytes").copied());
    AcceleratorCounters {
        memory_total_bytes: sizes.reduce(u64::saturating_add),
        ..AcceleratorCounters::default()
    }
}

fn counters(device: &Path) -> AcceleratorCounters {
    let of = |name: &str| number(&device.join(name));
    let monitor: Option<PathBuf> = {
        let all = device.join("hwmon");
        names(&all).next().map(|name| all.join(name))
    };
    let monitored = |name: &str| number(&monitor.as_ref()?.join(name));
    let permille = |percent: u64| percent.min(100) * 10;
    let errors = text(&device.join("ras/umc_err_count")).unwrap_or_default();
    let errors = |kind: &str| {
        let line = errors.lines().find_map(|line| line.strip_prefix(kind));
        line?.trim_start_matches(':').trim().parse().ok()
    };
    AcceleratorCounters {
        memory_total_bytes: of("mem_info_vram_total"),
        memory_used_bytes: of("mem_info_vram_used"),
        utilisation_permille: of("gpu_busy_percent").map(permille),
        memory_utilisation_permille: of("mem_busy_percent").map(permille),
        // Millionths of a watt.
        power_mw: monitored("power1_average")
            .or_else(|| monitored("power1_input"))
            .map(|power| power / 1000),
        power_limit_mw: monitored("power1_cap").map(|power| power / 1000),
        temperature_mc: monitored("temp1_input"),
        clock_mhz: monitored("freq1_input").map(|hertz| hertz / 1_000_000),
        memory_clock_mhz: monitored("freq2_input").map(|hertz| hertz / 1_000_000),
        ecc_corrected: errors("ce"),
        ecc_uncorrected: errors("ue"),
        ..AcceleratorCounters::default()
    }
}

/// Memory of each process on the device; the kernel tells no busy share of a process.
fn processes(root: &Path, gpu: u64) -> HashMap<u32, ProcessUse> {
    let all = root.join(PROCESSES);
    let file = format!("vram_{gpu}");
    let pids = names(&all).filter_map(|name| name.parse::<u32>().ok());
    pids.filter_map(|pid| {
        let bytes = number(&all.join(pid.to_string()).join(&file))?;
        let used = ProcessUse {
            memory_bytes: Some(bytes),
            ..ProcessUse::default()
        };
        (bytes > 0).then_some((pid, used))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: u64 = 0xa1;
    const DIVIDED: u64 = 0xb2;

    fn node(root: &Path, number: u32, unique_id: u64, minor: u32) {
        let node = root.join(TOPOLOGY).join(number.to_string());
        std::fs::create_dir_all(&node).unwrap();
        // The only thing in a row that differs from part to part of one device here.
        let units = format!("simd_count {minor}\nsimd_per_cu 1\n");
        let text = format!(
            "{units}location_id {}\nunique_id {unique_id}\n",
            unique_id << 8
        );
        std::fs::write(node.join("properties"), text).unwrap();
    }

    /// A host with a card before a divided one, each in so many parts.
    fn ids(whole: u32, divided: u32) -> Vec<(String, Option<u32>)> {
        let tree = tempfile::tempdir().unwrap();
        for part in 0..whole {
            node(tree.path(), 1 + part, WHOLE, 200 + part);
        }
        for part in 0..divided {
            node(tree.path(), 1 + whole + part, DIVIDED, 100 + part);
        }
        let rows = look(tree.path()).devices.into_iter();
        rows.map(|row| (row.id, row.units)).collect()
    }

    #[test]
    fn a_part_keeps_its_id_whatever_becomes_of_other_devices() {
        let of_divided = |all: Vec<(String, Option<u32>)>| -> Vec<_> {
            let ours = format!("{DIVIDED:016x}");
            all.into_iter()
                .filter(|(id, _)| id.starts_with(&ours))
                .collect()
        };
        let alone = of_divided(ids(0, 8));
        let expected = (0..8).map(|part| {
            let suffix = if part == 0 {
                String::new()
            } else {
                format!("-{part}")
            };
            (format!("{DIVIDED:016x}{suffix}"), Some(100 + part))
        });
        assert_eq!(alone, expected.collect::<Vec<_>>());
        assert_eq!(of_divided(ids(1, 8)), alone);
        let both = ids(8, 8);
        let mut unlike: Vec<&String> = both.iter().map(|(id, _)| id).collect();
        unlike.sort();
        unlike.dedup();
        assert_eq!(unlike.len(), 16);
        assert_eq!(of_divided(both), alone);
    }
}
