//! NVIDIA devices through NVML, loaded at run time.
//!
//! In: the driver's library. Out: readings in the thread's `Slot`. Invariants: only this thread
//! calls the driver; devices are enumerated anew at every look, so one that falls off the bus or
//! comes back is seen; what a driver does not support is absent.
//!
//! Sources: NVIDIA's NVML API reference; which XIDs are an application's fault and not the
//! device's: NVIDIA's XID catalogue.

mod topology;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{
    Clock, EccCounter, MemoryError, PcieUtilCounter, TemperatureSensor,
};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::NVML_FI_DEV_REMAPPED_FAILURE;
use nvml_wrapper::{Device, EventSet, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use shared::observed::{
    AcceleratorCounters, AcceleratorKey, AcceleratorKind, AcceleratorRow, MigInstance,
};

use super::attribution::{by_container, container_of};
use super::{INTERVAL, ProcessUse, Reading, Slot, clip, files};
use crate::sys::nvml::{memory_v1, mig_instance};
use topology::{Node, Topology};

/// The library's name for the dynamic loader. The unversioned name belongs to development packages.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// Pause before another attempt at a driver that is installed and does not start.
const RETRY: Duration = Duration::from_secs(30);
/// Parts of device N are numbered from `(N + 1) * PARTS`.
const PARTS: u32 = 1000;
/// XIDs that an application causes: they say nothing about the device.
const OF_APPLICATIONS: [u64; 7] = [13, 31, 43, 45, 68, 94, 109];

/// What XID 64 says, for a device whose defective memory rows cannot be replaced any more.
const ROWS_NOT_REPLACED: u32 = 64;

/// The thread: until it is told to end, or there is no such library.
pub(super) fn run(library: &OsStr, root: &Path, slot: &Slot) {
    let mut told = false;
    let mut past = Past::default();
    loop {
        match Nvml::builder().lib_path(library).init() {
            Ok(nvml) => {
                tracing::info!(
                    driver = nvml.sys_driver_version().unwrap_or_default(),
                    nvml = nvml.sys_nvml_version().unwrap_or_default(),
                    "NVIDIA driver found"
                );
                told = false;
                past = Session::new(&nvml, root, past).run(slot);
                if slot.stopped() {
                    return;
                }
            }
            Err(NvmlError::LibloadingError(err)) => {
                tracing::debug!(%err, "no NVIDIA driver on this node");
                slot.put_none();
                return;
            }
            Err(err) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%err, retry_s = RETRY.as_secs(),
                        "the NVIDIA driver is installed and does not start: no CUDA devices until it does");
                }
                slot.put(past.lost());
            }
        }
        if !slot.pause(RETRY) {
            return;
        }
    }
}

/// What outlives a life of the library: opening it again repairs no device.
#[derive(Default)]
struct Past {
    /// Last fault per device, and whether it is the device's own.
    faults: HashMap<String, (u32, bool)>,
    /// Devices that did not answer at the last look.
    lost: HashSet<u32>,
    /// What was known of each device when it last answered.
    known: HashMap<u32, AcceleratorRow>,
}

impl Past {
    /// All that is known, none of which answers.
    fn lost(&self) -> Reading {
        Reading {
            devices: self.known.values().map(lost).collect(),
            ..Reading::default()
        }
    }
}

/// A device that does not answer: known, without numbers.
fn lost(row: &AcceleratorRow) -> AcceleratorRow {
    AcceleratorRow {
        healthy: false,
        users: Vec::new(),
        users_left_out: 0,
        counters: AcceleratorCounters {
            memory_total_bytes: row.counters.memory_total_bytes,
            ..AcceleratorCounters::default()
        },
        ..row.clone()
    }
}

/// One life of the library.
struct Session<'nvml> {
    nvml: &'nvml Nvml,
    root: &'nvml Path,
    /// Versions of the driver and of CUDA.
    versions: (String, String),
    events: Option<EventSet<'nvml>>,
    watched: HashSet<String>,
    /// Per device: up to when process samples were seen, microseconds of the driver's clock.
    seen: HashMap<u32, u64>,
    topology: Topology,
    past: Past,
}

impl<'nvml> Session<'nvml> {
    fn new(nvml: &'nvml Nvml, root: &'nvml Path, past: Past) -> Self {
        let events = nvml
            .create_event_set()
            .inspect_err(|err| tracing::debug!(%err, "the driver tells no faults"))
            .ok();
        let cuda = nvml.sys_cuda_driver_version().map(|version| {
            let (major, minor) = (
                cuda_driver_version_major(version),
                cuda_driver_version_minor(version),
            );
            format!("{major}.{minor}")
        });
        Self {
            nvml,
            root,
            versions: (
                nvml.sys_driver_version().unwrap_or_default(),
                cuda.unwrap_or_default(),
            ),
            events,
            watched: HashSet::new(),
            seen: HashMap::new(),
            topology: Topology::default(),
            past,
        }
    }

    /// Looks until told to end; returns earlier when the library has to be started again.
    fn run(mut self, slot: &Slot) -> Past {
        loop {
            self.take_events();
            match self.look() {
                Ok(reading) => slot.put(reading),
                Err(err) => {
                    tracing::warn!(%err, "the NVIDIA driver has to be opened again");
                    return self.past;
                }
            }
            if !slot.pause(INTERVAL) {
                return self.past;
            }
        }
    }

    fn look(&mut self) -> Result<Reading, NvmlError> {
        let mut reading = Reading::default();
        let count = self.nvml.device_count()?;
        let mut nodes = Vec::new();
        for index in 0..count {
            let device = match self.nvml.device_by_index(index) {
                Ok(device) => device,
                Err(err @ (NvmlError::Uninitialized | NvmlError::LibRmVersionMismatch)) => {
                    return Err(err);
                }
                Err(err) => {
                    self.miss(index, &err, &mut reading);
                    continue;
                }
            };
            match self.read_device(index, &device, &mut reading) {
                Ok((id, pci)) => nodes.push(Node {
                    index,
                    id,
                    pci,
                    device,
                }),
                Err(err) => self.miss(index, &err, &mut reading),
            }
        }
        // A device that fell off the bus is not counted any more, and was there.
        let gone: Vec<u32> = self
            .past
            .known
            .keys()
            .copied()
            .filter(|index| *index < PARTS && *index >= count)
            .collect();
        for index in gone {
            self.miss(index, &NvmlError::GpuLost, &mut reading);
        }
        self.topology.refresh(self.nvml, &nodes);
        for row in &mut reading.devices {
            row.near = self.topology.near(row.part_of.unwrap_or(row.key.index));
        }
        Ok(reading)
    }

    /// A device that does not answer stays known, without numbers.
    fn miss(&mut self, index: u32, err: &NvmlError, reading: &mut Reading) {
        if self.past.lost.insert(index) {
            tracing::warn!(device = index, %err, "an NVIDIA device does not answer");
        }
        let known = &self.past.known;
        let own = known
            .iter()
            .filter(|(number, _)| whole_of(**number) == index);
        reading.devices.extend(own.map(|(_, row)| lost(row)));
        self.watched
            .retain(|id| known.get(&index).is_none_or(|row| row.id != *id));
    }

    fn read_device(
        &mut self,
        index: u32,
        device: &Device<'nvml>,
        reading: &mut Reading,
    ) -> Result<(String, String), NvmlError> {
        let id = device.uuid()?;
        let memory = Memory::of(self.nvml, device)?;
        if self.past.lost.remove(&index) {
            // It was away: whatever it reported before, this is its new life.
            self.past.faults.remove(&id);
            tracing::info!(device = index, id, "an NVIDIA device answers again");
        }
        self.watch(device, &id);
        let (fault, own_fault) = match self.past.faults.get(&id) {
            _ if cannot_replace_rows(device) => (Some(ROWS_NOT_REPLACED), true),
            Some((code, own)) => (Some(*code), *own),
            None => (None, false),
        };
        let pci = device
            .pci_info()
            .map(|pci| bus_address(&pci.bus_id))
            .unwrap_or_default();
        let divided = device.mig_mode().is_ok_and(|mode| mode.current == 1);
        let mut row = AcceleratorRow {
            model: device.name().unwrap_or_default(),
            numa_node: numa_node(self.root, &pci),
            pci: pci.clone(),
            healthy: !own_fault,
            divided,
            driver: self.versions.0.clone(),
            runtime: self.versions.1.clone(),
            units: multiprocessors(device),
            fault,
            counters: counters(device, memory),
            ..AcceleratorRow::new(AcceleratorKind::Cuda, index, id.clone())
        };
        clip(&mut row);
        // Numbers may have moved, and parts may have been made anew.
        (self.past.known).retain(|number, known| whole_of(*number) != index && known.id != row.id);
        if divided {
            for part in 0..device.mig_device_count().unwrap_or(0).min(PARTS - 1) {
                // Numbers without an instance are gaps.
                if let Ok(instance) = device.mig_device_by_index(part)
                    && let Ok(part_row) = self.read_part(&row, device, part, &instance, reading)
                {
                    self.past.known.insert(part_row.key.index, part_row.clone());
                    reading.devices.push(part_row);
                }
            }
        } else {
            let processes = self.processes(index, device, listed(device).unwrap_or_default());
            row.users = by_container(processes.iter().map(|(k, v)| (*k, *v)), container_of);
            add_up(&mut reading.processes, processes);
        }
        self.past.known.insert(index, row.clone());
        reading.devices.push(row);
        Ok((id, pci))
    }

    fn read_part(
        &mut self,
        whole: &AcceleratorRow,
        device: &Device<'nvml>,
        part: u32,
        instance: &Device<'nvml>,
        reading: &mut Reading,
    ) -> Result<AcceleratorRow, NvmlError> {
        let memory = Memory::of(self.nvml, instance)?;
        let attributes = instance.attributes().ok();
        let id = instance.uuid()?;
        let number = (whole.key.index + 1) * PARTS + part;
        let mut row = AcceleratorRow {
            key: key(number),
            instance: mig_instance(self.nvml, instance).or_else(|| instance_of_name(&id)),
            id,
            part_of: Some(whole.key.index),
            divided: false,
            profile: attributes.as_ref().map_or_else(String::new, |found| {
                profile(found.gpu_instance_slice_count, memory.total)
            }),
            units: attributes.map(|found| found.multiprocessor_count),
            counters: AcceleratorCounters {
                memory_total_bytes: Some(memory.total),
                memory_used_bytes: Some(memory.used()),
                ..AcceleratorCounters::default()
            },
            ..whole.clone()
        };
        let own = listed(instance).or_else(|| {
            // Then the whole device may list those of all instances, with the ids of these.
            let ids = row.instance?;
            let mut all = listed(device)?;
            all.retain(|process| {
                let of = (process.gpu_instance_id, process.compute_instance_id);
                of == (Some(ids.gpu), Some(ids.compute))
            });
            Some(all)
        });
        let processes = self.processes(number, instance, own.unwrap_or_default());
        row.users = by_container(processes.iter().map(|(k, v)| (*k, *v)), container_of);
        add_up(&mut reading.processes, processes);
        clip(&mut row);
        Ok(row)
    }

    /// What each of the processes listed uses of one device.
    fn processes(
        &mut self,
        number: u32,
        device: &Device<'nvml>,
        listed: Vec<ProcessInfo>,
    ) -> HashMap<u32, ProcessUse> {
        let mut all: HashMap<u32, ProcessUse> = HashMap::new();
        for process in listed {
            let memory = match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            };
            // A process that computes and draws is listed twice with the same memory.
            let known = all.entry(process.pid).or_default();
            known.memory_bytes = known.memory_bytes.max(memory);
        }
        let since = self.seen.get(&number).copied();
        match device.process_utilization_stats(since) {
            Ok(samples) => {
                let mut latest: HashMap<u32, (u64, [u32; 3])> = HashMap::new();
                for sample in samples {
                    self.seen
                        .entry(number)
                        .and_modify(|seen| *seen = (*seen).max(sample.timestamp))
                        .or_insert(sample.timestamp);
                    let entry = latest.entry(sample.pid).or_default();
                    let told = [sample.sm_util, sample.enc_util, sample.dec_util];
                    *entry = (*entry).max((sample.timestamp, told));
                }
                for (pid, used) in &mut all {
                    used.busy(latest.get(pid).map_or([0; 3], |(_, told)| *told));
                }
            }
            // The driver has a sample of nobody: all are idle.
            Err(NvmlError::NotFound) => {
                for used in all.values_mut() {
                    used.busy([0; 3]);
                }
            }
            Err(_) => {}
        }
        all
    }

    /// Asks to be told of a device's faults.
    fn watch(&mut self, device: &Device<'nvml>, id: &str) {
        if self.watched.contains(id) {
            return;
        }
        let Some(set) = self.events.take() else {
            return;
        };
        self.watched.insert(id.to_owned());
        let kinds = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        match device.register_events(kinds, set) {
            Ok(set) => self.events = Some(set),
            Err(err) => {
                tracing::debug!(device = id, err = %err.error, "the device tells no faults");
                // The set went with the error: the others are registered with a new one.
                self.events = self.nvml.create_event_set().ok();
                self.watched.retain(|watched| watched == id);
            }
        }
    }

    fn take_events(&mut self) {
        let Some(set) = &self.events else {
            return;
        };
        // As many as there may reasonably be: a storm of them must not keep the thread.
        for _ in 0..64 {
            let Ok(event) = set.wait(0) else {
                return;
            };
            let Ok(id) = event.device.uuid() else {
                continue;
            };
            let (code, own) = match event.event_data {
                Some(XidError::Value(code)) => (code, !OF_APPLICATIONS.contains(&code)),
                _ => (48, true),
            };
            tracing::warn!(
                device = id,
                xid = code,
                of_device = own,
                "an NVIDIA device reports a fault"
            );
            let code = u32::try_from(code).unwrap_or(u32::MAX);
            let kept = self.past.faults.entry(id).or_insert((code, own));
            // An application's fault never hides one of the device.
            *kept = (if own || !kept.1 { code } else { kept.0 }, kept.1 || own);
        }
    }
}

fn key(index: u32) -> AcceleratorKey {
    AcceleratorKey {
        kind: AcceleratorKind::Cuda,
        index,
    }
}

/// The device that a number is, or is a part of.
fn whole_of(number: u32) -> u32 {
    match number / PARTS {
        0 => number,
        beyond => beyond - 1,
    }
}

/// Memory of a device or an instance, bytes.
#[derive(Debug, Clone, Copy)]
struct Memory {
    total: u64,
    free: u64,
}

impl Memory {
    fn of<'nvml>(nvml: &'nvml Nvml, device: &Device<'nvml>) -> Result<Self, NvmlError> {
        let (total, free) = match device.memory_info() {
            Ok(found) => (found.total, found.free),
            Err(NvmlError::FailedToLoadSymbol(_)) => memory_v1(nvml, device)?,
            Err(err) => return Err(err),
        };
        Ok(Self { total, free })
    }

    /// What is not free, as the original tells it: what the driver keeps for itself is used too.
    fn used(self) -> u64 {
        self.total.saturating_sub(self.free)
    }
}

/// Processes that compute or draw; `None` when the driver tells neither.
fn listed(device: &Device<'_>) -> Option<Vec<ProcessInfo>> {
    let compute = match device.running_compute_processes() {
        Err(NvmlError::FailedToLoadSymbol(_)) => device.running_compute_processes_v2(),
        told => told,
    };
    let graphics = match device.running_graphics_processes() {
        Err(NvmlError::FailedToLoadSymbol(_)) => device.running_graphics_processes_v2(),
        told => told,
    };
    if compute.is_err() && graphics.is_err() {
        return None;
    }
    let all = [compute, graphics].into_iter().flatten().flatten();
    Some(all.collect())
}

/// `MIG-GPU-<UUID>/<GPU instance>/<compute instance>`, as drivers before 470 name instances.
fn instance_of_name(id: &str) -> Option<MigInstance> {
    let mut fields = id.strip_prefix("MIG-GPU-")?.split('/').skip(1);
    let mut next = || fields.next()?.parse().ok();
    let (gpu, compute) = (next()?, next()?);
    next().is_none().then_some(MigInstance { gpu, compute })
}

/// Whether the driver has failed to replace a defective row of its memory.
fn cannot_replace_rows(device: &Device<'_>) -> bool {
    let told = device.field_values_for(&[FieldId(NVML_FI_DEV_REMAPPED_FAILURE)]);
    let told = told.ok().and_then(|values| values.into_iter().next()?.ok());
    match told.and_then(|sample| sample.value.ok()) {
        Some(SampleValue::U32(failed)) => failed != 0,
        Some(SampleValue::U64(failed)) => failed != 0,
        _ => false,
    }
}

fn counters(device: &Device<'_>, memory: Memory) -> AcceleratorCounters {
    let permille = |percent: u32| u64::from(percent.min(100)) * 10;
    let load = device.utilization_rates().ok();
    // Thousands of bytes per second, measured over 20 ms.
    let pcie = |counter| {
        let kilobytes = device.pcie_throughput(counter).ok()?;
        Some(u64::from(kilobytes) * 1000)
    };
    let errors = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
    AcceleratorCounters {
        memory_total_bytes: Some(memory.total),
        memory_used_bytes: Some(memory.used()),
        utilisation_permille: load.as_ref().map(|load| permille(load.gpu)),
        memory_utilisation_permille: load.as_ref().map(|load| permille(load.memory)),
        power_mw: device.power_usage().ok().map(u64::from),
        power_limit_mw: device.enforced_power_limit().ok().map(u64::from),
        temperature_mc: device
            .temperature(TemperatureSensor::Gpu)
            .ok()
            .map(|degrees| u64::from(degrees) * 1000),
        energy_mj: device.total_energy_consumption().ok(),
        clock_mhz: device.clock_info(Clock::SM).ok().map(u64::from),
        memory_clock_mhz: device.clock_info(Clock::Memory).ok().map(u64::from),
        pcie_rx_bytes_per_s: pcie(PcieUtilCounter::Receive),
        pcie_tx_bytes_per_s: pcie(PcieUtilCounter::Send),
        encoder_permille: device
            .encoder_utilization()
            .ok()
            .map(|found| permille(found.utilization)),
        decoder_permille: device
            .decoder_utilization()
            .ok()
            .map(|found| permille(found.utilization)),
        ecc_corrected: errors(MemoryError::Corrected),
        ecc_uncorrected: errors(MemoryError::Uncorrected),
    }
}

fn add_up(all: &mut HashMap<u32, ProcessUse>, processes: HashMap<u32, ProcessUse>) {
    for (pid, used) in processes {
        all.entry(pid)
            .and_modify(|sum: &mut ProcessUse| sum.add(used))
            .or_insert(used);
    }
}

/// `00000000:3B:00.0` as sysfs writes it, `0000:3b:00.0`.
fn bus_address(bus_id: &str) -> String {
    let lower = bus_id.to_ascii_lowercase();
    match lower.split_once(':') {
        Some((domain, rest)) if domain.len() > 4 && domain.is_ascii() => {
            format!("{}:{rest}", &domain[domain.len() - 4..])
        }
        _ => lower,
    }
}

fn numa_node(root: &Path, pci: &str) -> Option<u16> {
    if pci.is_empty() || pci.contains('/') {
        return None;
    }
    files::numa_node(&root.join("sys/bus/pci/devices").join(pci))
}

/// `1g.5gb`: slices of the chip and memory in GiB, rounded up, as NVIDIA names MIG profiles.
fn profile(slices: u32, memory_bytes: u64) -> String {
    format!("{slices}g.{}gb", memory_bytes.div_ceil(1 << 30))
}

/// Multiprocessors of a whole device: the driver tells cores, and how many of them make one is known
/// by the generation (CUDA's programming guide, "Compute Capabilities").
fn multiprocessors(device: &Device<'_>) -> Option<u32> {
    let of_generation = device.cuda_compute_capability().ok()?;
    let cores = match (of_generation.major, of_generation.minor) {
        (6, 0) | (7, _) | (8, 0) => 64,
        (5 | 6 | 8.., _) => 128,
        _ => return None,
    };
    Some(device.num_cores().ok()? / cores)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_sysfs() {
        assert_eq!(bus_address("00000000:3B:00.0"), "0000:3b:00.0");
        assert_eq!(bus_address("0000:AF:00.0"), "0000:af:00.0");
        assert_eq!(numa_node(Path::new("/"), "../../etc"), None);
        assert_eq!([0, 999, 1000, 1999, 8004].map(whole_of), [0, 999, 0, 0, 7]);
    }

    #[test]
    fn old_names_of_instances_tell_their_ids() {
        let of = |id: &str| instance_of_name(id).map(|ids| (ids.gpu, ids.compute));
        assert_eq!(of("MIG-GPU-8f0f9c8e-0000-4000/7/0"), Some((7, 0)));
        for other in [
            "MIG-8f0f9c8e",
            "MIG-GPU-8f0f",
            "MIG-GPU-8f0f/7",
            "MIG-GPU-8f0f/7/x",
            "MIG-GPU-8f0f/7/0/1",
            "GPU-8f0f/7/0",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn profiles_are_named_as_nvidia_names_them() {
        assert_eq!(profile(1, 4_864 << 20), "1g.5gb");
        assert_eq!(profile(3, 19_968 << 20), "3g.20gb");
        assert_eq!(profile(7, 40_192 << 20), "7g.40gb");
    }
}
