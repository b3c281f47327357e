//! NVIDIA devices through NVML, loaded at run time.
//!
//! In: the driver's library. Out: readings in the thread's `Slot`. Invariants: only this thread
//! calls the driver; devices are enumerated anew at every look, so one that falls off the bus or
//! comes back is seen; what a driver does not support is absent; one answer that fails changes nothing
//! about what a device is (divided or not, there or not), and no part of a list is taken for all of it.
//!
//! Source: NVIDIA's NVML API reference.

mod constants;
mod counters;
mod faults;
mod instance_load;
mod instances;
mod processes;
mod profile;
mod topology;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use shared::observed::{
    AcceleratorCounters, AcceleratorKey, AcceleratorKind, AcceleratorRow, AcceleratorUse,
};

use super::attribution::{by_container, owner_of};
use super::{INTERVAL, ProcessUse, Reading, SLOW, Slot, clip};
use crate::sys::nvml::{Fabric, fabric};
use constants::Constants;
use counters::{Memory, cannot_replace_rows, counters};
use faults::Watch;
use instance_load::InstanceLoads;
use instances::{Instance, PARTS, whole_of};
use processes::{Listed, listed};
use topology::{Node, Topology};

/// The library's name for the dynamic loader. The unversioned name belongs to development packages.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// The longest pause before another attempt at a driver that is installed and does not start; the first
/// is [`INTERVAL`].
const RETRY: Duration = Duration::from_secs(30);

/// What XID 64 says, for a device whose defective memory rows cannot be replaced any more.
const ROWS_NOT_REPLACED: u32 = 64;

/// The thread: until it is told to end, or there is no such library.
pub(super) fn run(library: &OsStr, root: &Path, slot: &Slot) {
    let mut told = false;
    let mut history = History::default();
    let mut pause = INTERVAL;
    loop {
        match Nvml::builder().lib_path(library).init() {
            Ok(nvml) => {
                tracing::info!(
                    driver = nvml.sys_driver_version().unwrap_or_default(),
                    nvml = nvml.sys_nvml_version().unwrap_or_default(),
                    "NVIDIA driver found"
                );
                told = false;
                let worked;
                (history, worked) = Session::new(&nvml, root, history).run(slot);
                if slot.stopped() {
                    return;
                }
                if worked {
                    pause = INTERVAL;
                }
            }
            Err(NvmlError::LibloadingError(err)) => {
                tracing::debug!(%err, "no NVIDIA driver on this node");
                slot.put_none();
                return;
            }
            Err(err) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::warn!(%err,
                        "the NVIDIA driver is installed and does not start: no CUDA devices until it does");
                }
                slot.put_failed(history.lost());
            }
        }
        if !slot.pause(pause) {
            return;
        }
        pause = (pause * 2).min(RETRY);
    }
}

/// Whether a driver, a library or a device has no such call, as opposed to one that has failed.
fn is_not_offered(err: &NvmlError) -> bool {
    matches!(
        err,
        NvmlError::NotSupported | NvmlError::FunctionNotFound | NvmlError::FailedToLoadSymbol(_)
    )
}

/// Whether the library has to be opened again before it can answer.
fn has_lost_its_driver(err: &NvmlError) -> bool {
    matches!(
        err,
        NvmlError::Uninitialized | NvmlError::LibRmVersionMismatch | NvmlError::DriverNotLoaded
    )
}

/// Whether a device may answer the next time: what it told last is good for a while.
fn is_passing(err: &NvmlError) -> bool {
    matches!(
        err,
        NvmlError::Unknown
            | NvmlError::Timeout
            | NvmlError::InsufficientMemory
            | NvmlError::InsufficientSize(_)
            | NvmlError::InUse
            | NvmlError::NoData
    )
}

/// What outlives a life of the library: opening it again repairs no device.
#[derive(Default)]
struct History {
    /// Last fault per device, and whether it is the device's own.
    faults: HashMap<String, (u32, bool)>,
    /// Devices that were gone at the last look.
    lost: HashSet<u32>,
    /// What each device and instance told when it last answered, and when that was.
    known: HashMap<u32, (Instant, AcceleratorRow)>,
}

impl History {
    /// All that is known, none of which answers.
    fn lost(&self) -> Reading {
        Reading {
            devices: self.known.values().map(|(_, row)| lost(row)).collect(),
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
        users_unknown: true,
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
    /// How each device tells its faults: a set each, because one that can't be had takes its set with it.
    events: HashMap<String, Watch<'nvml>>,
    /// Per device and instance: what is kept of its processes from look to look.
    processes: HashMap<u32, ProcessState>,
    loads: InstanceLoads<'nvml>,
    topology: Topology,
    /// Devices that have failed to answer, and did not fall off the bus, since they last did.
    failing: HashSet<u32>,
    /// Devices that take in no new programs.
    drained: HashSet<u32>,
    /// Devices that are not ready to use their NVSwitches.
    apart: HashSet<u32>,
    /// The log says that looks take long.
    slow: bool,
    history: History,
}

/// What is kept of the processes of a device.
#[derive(Debug, Default)]
struct ProcessState {
    /// Up to when samples were read, microseconds of the driver's clock.
    seen: Option<u64>,
    /// Those that were last listed.
    pids: Vec<u32>,
    /// The log says that the list cannot be read.
    failing: bool,
}

impl<'nvml> Session<'nvml> {
    fn new(nvml: &'nvml Nvml, root: &'nvml Path, history: History) -> Self {
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
            events: HashMap::new(),
            processes: HashMap::new(),
            loads: InstanceLoads::new(nvml),
            topology: Topology::default(),
            failing: HashSet::new(),
            drained: HashSet::new(),
            apart: HashSet::new(),
            slow: false,
            history,
        }
    }

    /// Looks until told to end; returns earlier when the library has to be started again. And whether a
    /// look has told anything.
    fn run(mut self, slot: &Slot) -> (History, bool) {
        let mut worked = false;
        loop {
            self.take_events();
            let began = Instant::now();
            match self.look(slot) {
                Ok(reading) => {
                    worked = true;
                    slot.put(reading);
                }
                Err(err) if has_lost_its_driver(&err) => {
                    tracing::warn!(%err, "the NVIDIA driver has to be opened again");
                    return (self.history, worked);
                }
                // The last answer grows old meanwhile.
                Err(err) => tracing::debug!(%err, "the NVIDIA driver does not tell its devices"),
            }
            let took = began.elapsed();
            if took > SLOW && !std::mem::replace(&mut self.slow, true) {
                tracing::warn!(
                    seconds = took.as_secs(),
                    "asking the NVIDIA driver takes long, so numbers are old: let nvidia-persistenced run (persistence mode)"
                );
            }
            if !slot.pause(INTERVAL) {
                return (self.history, worked);
            }
        }
    }

    fn look(&mut self, slot: &Slot) -> Result<Reading, NvmlError> {
        let mut reading = Reading::default();
        let count = self.nvml.device_count()?;
        let mut nodes = Vec::new();
        for index in 0..count {
            let device = self.nvml.device_by_index(index);
            let told = device.and_then(|device| {
                let (id, pci) = self.read_device(index, &device, &mut reading)?;
                Ok(Node {
                    index,
                    id,
                    pci,
                    device,
                })
            });
            match told {
                Ok(node) => nodes.push(node),
                Err(err) if has_lost_its_driver(&err) => return Err(err),
                Err(err) => self.miss(index, &err, &mut reading),
            }
            slot.heard();
        }
        // A device that fell off the bus is not counted any more, and was there.
        let gone = self.history.known.keys().copied();
        let gone: Vec<u32> = gone
            .filter(|index| *index < PARTS && *index >= count)
            .collect();
        for index in gone {
            self.miss(index, &NvmlError::GpuLost, &mut reading);
        }
        self.loads.end_look();
        self.topology.refresh(self.nvml, &nodes);
        for row in &mut reading.devices {
            row.near = self.topology.near(row.part_of.unwrap_or(row.key.index));
        }
        Ok(reading)
    }

    /// A device that does not answer stays known: with what it told last as long as that is not old,
    /// where it may answer the next time, and without numbers where it is gone.
    fn miss(&mut self, index: u32, err: &NvmlError, reading: &mut Reading) {
        let passing = is_passing(err);
        let new = match passing {
            true => self.failing.insert(index),
            false => self.history.lost.insert(index),
        };
        if new {
            tracing::warn!(device = index, %err, "an NVIDIA device does not answer");
        }
        let numbers = self.history.known.keys().copied();
        let own: Vec<u32> = numbers
            .filter(|number| whole_of(*number) == index)
            .collect();
        for number in own {
            if passing {
                self.keep(number, reading);
            } else if let Some((_, row)) = self.history.known.get(&number) {
                reading.devices.push(lost(row));
            }
        }
        if !passing {
            let known = self.history.known.get(&index);
            self.events
                .retain(|id, _| known.is_none_or(|(_, row)| row.id != *id));
        }
    }

    /// Tells again what a device told last, as old as that is.
    fn keep(&mut self, number: u32, reading: &mut Reading) {
        let Some((at, row)) = self.history.known.get(&number) else {
            return;
        };
        reading.devices.push(AcceleratorRow {
            age_ms: u32::try_from(at.elapsed().as_millis()).unwrap_or(u32::MAX),
            ..row.clone()
        });
        let pids = self.processes.get(&number).map(|kept| kept.pids.as_slice());
        add_unknown(&mut reading.processes, pids.unwrap_or_default());
    }

    fn read_device(
        &mut self,
        index: u32,
        device: &Device<'nvml>,
        reading: &mut Reading,
    ) -> Result<(String, String), NvmlError> {
        let id = device.uuid()?;
        let memory = Memory::of(self.nvml, device)?;
        // One that is divided is never given out whole because this question has failed once.
        let divided = match device.mig_mode() {
            Ok(mode) => mode.current == 1,
            Err(err) if is_not_offered(&err) => false,
            Err(err) => return Err(err),
        };
        let parts = match divided {
            true => self.parts(index, device)?,
            false => Vec::new(),
        };
        self.notice_return(index, &id);
        self.watch(device, &id);
        let (fault, own_fault) = match self.history.faults.get(&id) {
            _ if cannot_replace_rows(device) => (Some(ROWS_NOT_REPLACED), true),
            Some((code, own)) => (Some(*code), *own),
            None => (None, false),
        };
        let ready = divided || self.is_in_its_fabric(index, device, &id);
        let place = device.pci_info();
        let place_told = place.as_ref().ok().cloned();
        let known = self.history.known.get(&index).map(|(_, row)| row);
        let known = known.filter(|row| row.id == id);
        let constants = Constants::read(device, place, known)?;
        let drained = self.is_drained(index, device, place_told, &id);
        let pci = constants.pci;
        let mut row = AcceleratorRow {
            model: constants.model,
            numa_node: constants::numa_node(self.root, &pci),
            pci: pci.clone(),
            healthy: !own_fault && !drained && ready,
            divided,
            driver: self.versions.0.clone(),
            runtime: self.versions.1.clone(),
            minor: constants.minor,
            units: constants.units,
            fault,
            counters: counters(device, memory),
            ..AcceleratorRow::new(AcceleratorKind::Cuda, index, id.clone())
        };
        clip(&mut row);
        self.forget_others(index, &row.id, &parts);
        for part in parts {
            let number = part.number();
            match self.read_part(&row, (device, memory), part, reading) {
                Ok(part_row) => self.put(part_row, reading),
                Err(err) if has_lost_its_driver(&err) => return Err(err),
                Err(_) => self.keep(number, reading),
            }
        }
        if !divided {
            let all = listed(device);
            (row.users, row.users_unknown) = self.users(index, device, all, reading);
        }
        self.put(row, reading);
        Ok((id, pci))
    }

    /// A device that was away or has failed to answer answers.
    fn notice_return(&mut self, index: u32, id: &str) {
        let answers_again = self.failing.remove(&index);
        if self.history.lost.remove(&index) {
            // It was away: whatever it reported before, this is its new life.
            self.history.faults.remove(id);
            tracing::info!(device = index, id, "an NVIDIA device is back");
        } else if answers_again {
            tracing::info!(device = index, id, "an NVIDIA device answers again");
        }
    }

    /// Whether a device takes in no new programs. A question that fails changes nothing.
    fn is_drained(
        &mut self,
        index: u32,
        device: &Device<'nvml>,
        place: Option<PciInfo>,
        id: &str,
    ) -> bool {
        let before = self.drained.contains(&index);
        let drained = place.map_or(before, |place| {
            let told = device.is_drain_enabled(place);
            told.unwrap_or_else(|err| before && !is_not_offered(&err))
        });
        let news = match drained {
            true => self.drained.insert(index),
            false => self.drained.remove(&index),
        };
        if news {
            tracing::warn!(
                device = index,
                id,
                drained,
                "an NVIDIA device is drained (nvidia-smi drain), and not given out, or is no longer"
            );
        }
        drained
    }

    /// Forgets under which other numbers a device was known, and its parts that there are no more: numbers
    /// may have moved, and parts may have been made anew.
    fn forget_others(&mut self, index: u32, id: &str, parts: &[Instance<'nvml>]) {
        let still: HashSet<u32> = parts.iter().map(Instance::number).collect();
        (self.history.known).retain(|number, (_, known)| {
            let moved = known.id == id;
            let ended = whole_of(*number) == index && !still.contains(number);
            *number == index || !(moved || ended)
        });
    }

    fn put(&mut self, row: AcceleratorRow, reading: &mut Reading) {
        let known = (Instant::now(), row.clone());
        self.history.known.insert(row.key.index, known);
        reading.devices.push(row);
    }

    /// The containers whose processes use a device, and whether there may be others.
    fn users(
        &mut self,
        number: u32,
        device: &Device<'nvml>,
        listed: Listed,
        reading: &mut Reading,
    ) -> (Vec<AcceleratorUse>, bool) {
        let kept = self.processes.entry(number).or_default();
        let list = match listed {
            Listed::These(list) => list,
            Listed::NotOffered => return (Vec::new(), true),
            Listed::Failed(err) => {
                if !std::mem::replace(&mut kept.failing, true) {
                    tracing::warn!(device = number, %err,
                        "the processes of an NVIDIA device cannot be listed: until they can, who uses it is unknown");
                }
                add_unknown(&mut reading.processes, &kept.pids);
                return (Vec::new(), true);
            }
        };
        kept.failing = false;
        let complete = list.complete;
        let used = processes::used(device, list, &mut kept.seen);
        kept.pids = used.keys().copied().collect();
        let (users, all_found) = by_container(used.iter().map(|(k, v)| (*k, *v)), owner_of);
        for (pid, used) in used {
            add_up(&mut reading.processes, pid, used);
        }
        (users, !(complete && all_found))
    }

    /// False when the device belongs to a fabric of NVSwitches and is not registered there: then every
    /// program ends at its start, with CUDA's error 802. A question that fails changes nothing.
    fn is_in_its_fabric(&mut self, index: u32, device: &Device<'nvml>, id: &str) -> bool {
        let Ok(fabric) = fabric(self.nvml, device) else {
            return !self.apart.contains(&index);
        };
        match fabric {
            Fabric::None | Fabric::Joined => {
                if self.apart.remove(&index) {
                    tracing::info!(device = index, id, "an NVIDIA device has joined its fabric");
                }
                true
            }
            Fabric::NotJoined | Fabric::Failed(_) => {
                if self.apart.insert(index) {
                    let status = match fabric {
                        Fabric::Failed(status) => status,
                        _ => 0,
                    };
                    tracing::warn!(
                        device = index,
                        id,
                        status,
                        "an NVIDIA device is not registered with its NVSwitches, CUDA can't start on it and it is not given out: let nvidia-fabricmanager run, and look into its log"
                    );
                }
                false
            }
        }
    }
}

fn key(index: u32) -> AcceleratorKey {
    AcceleratorKey {
        kind: AcceleratorKind::Cuda,
        index,
    }
}

fn add_up(all: &mut HashMap<u32, ProcessUse>, pid: u32, used: ProcessUse) {
    all.entry(pid)
        .and_modify(|sum: &mut ProcessUse| sum.add(used))
        .or_insert(used);
}

/// These use something, and nobody knows how much.
fn add_unknown(all: &mut HashMap<u32, ProcessUse>, pids: &[u32]) {
    for pid in pids {
        add_up(all, *pid, ProcessUse::default());
    }
}
