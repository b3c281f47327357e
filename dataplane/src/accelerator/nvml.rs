//! NVIDIA devices through NVML, loaded at run time.
//!
//! In: the driver's library. Out: readings in the thread's `Slot`. Invariants: only this thread
//! calls the driver; devices are enumerated anew at every look, so one that falls off the bus or
//! comes back is seen; what a driver does not support is absent; one answer that fails changes nothing
//! about what a device is (divided or not, there or not), and no part of a list is taken for all of it.
//!
//! Sources: NVIDIA's NVML API reference; which XIDs are an application's fault and not the
//! device's: NVIDIA's XID catalogue.

mod constants;
mod instance_load;
mod processes;
mod profile;
mod topology;

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::Path;
use std::time::{Duration, Instant};

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{
    Clock, EccCounter, MemoryError, PcieUtilCounter, TemperatureSensor,
};
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::{DeviceAttributes, PciInfo};
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id::NVML_FI_DEV_REMAPPED_FAILURE;
use nvml_wrapper::{Device, EventSet, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use shared::observed::{
    AcceleratorCounters, AcceleratorKey, AcceleratorKind, AcceleratorRow, AcceleratorUse,
    MigInstance,
};

use super::attribution::{by_container, owner_of};
use super::{INTERVAL, ProcessUse, Reading, SLOW, Slot, clip};
use crate::sys::nvml::{Fabric, fabric, memory_v1, mig_instance};
use constants::Constants;
use instance_load::InstanceLoads;
use processes::{Listed, listed};
use topology::{Node, Topology};

/// The library's name for the dynamic loader. The unversioned name belongs to development packages.
pub const LIBRARY: &str = "libnvidia-ml.so.1";

/// The longest pause before another attempt at a driver that is installed and does not start; the first
/// is [`INTERVAL`].
const RETRY: Duration = Duration::from_secs(30);
/// Parts of device N are numbered from `(N + 1) * PARTS`.
const PARTS: u32 = 1000;
/// XIDs that an application causes: they say nothing about the device.
const OF_APPLICATIONS: [u64; 7] = [13, 31, 43, 45, 68, 94, 109];

/// So often a device is asked to tell faults, with pauses that grow to [`RETRY`], before it is taken to
/// tell none.
const REGISTRATIONS: u32 = 16;

/// What XID 64 says, for a device whose defective memory rows cannot be replaced any more.
const ROWS_NOT_REPLACED: u32 = 64;

/// The thread: until it is told to end, or there is no such library.
pub(super) fn run(library: &OsStr, root: &Path, slot: &Slot) {
    let mut told = false;
    let mut past = Past::default();
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
                (past, worked) = Session::new(&nvml, root, past).run(slot);
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
                slot.put_failed(past.lost());
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
struct Past {
    /// Last fault per device, and whether it is the device's own.
    faults: HashMap<String, (u32, bool)>,
    /// Devices that were gone at the last look.
    lost: HashSet<u32>,
    /// What each device and instance told when it last answered, and when that was.
    known: HashMap<u32, (Instant, AcceleratorRow)>,
}

impl Past {
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
    processes: HashMap<u32, Kept>,
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
    past: Past,
}

/// How a device tells its faults.
enum Watch<'nvml> {
    By(EventSet<'nvml>),
    /// It could not be asked to, so often; it is asked again then.
    Failed {
        times: u32,
        again: Instant,
    },
    /// It has none to tell, or has failed too often.
    Silent,
}

/// What is kept of the processes of a device.
#[derive(Debug, Default)]
struct Kept {
    /// Up to when samples were read, microseconds of the driver's clock.
    seen: Option<u64>,
    /// Those that were last listed.
    pids: Vec<u32>,
    /// The log says that the list cannot be read.
    failing: bool,
}

impl<'nvml> Session<'nvml> {
    fn new(nvml: &'nvml Nvml, root: &'nvml Path, past: Past) -> Self {
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
            past,
        }
    }

    /// Looks until told to end; returns earlier when the library has to be started again. And whether a
    /// look has told anything.
    fn run(mut self, slot: &Slot) -> (Past, bool) {
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
                    return (self.past, worked);
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
                return (self.past, worked);
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
        let gone = self.past.known.keys().copied();
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
            false => self.past.lost.insert(index),
        };
        if new {
            tracing::warn!(device = index, %err, "an NVIDIA device does not answer");
        }
        let numbers = self.past.known.keys().copied();
        let own: Vec<u32> = numbers
            .filter(|number| whole_of(*number) == index)
            .collect();
        for number in own {
            if passing {
                self.keep(number, reading);
            } else if let Some((_, row)) = self.past.known.get(&number) {
                reading.devices.push(lost(row));
            }
        }
        if !passing {
            let known = self.past.known.get(&index);
            self.events
                .retain(|id, _| known.is_none_or(|(_, row)| row.id != *id));
        }
    }

    /// Tells again what a device told last, as old as that is.
    fn keep(&mut self, number: u32, reading: &mut Reading) {
        let Some((at, row)) = self.past.known.get(&number) else {
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
        let (fault, own_fault) = match self.past.faults.get(&id) {
            _ if cannot_replace_rows(device) => (Some(ROWS_NOT_REPLACED), true),
            Some((code, own)) => (Some(*code), *own),
            None => (None, false),
        };
        let ready = divided || self.is_in_its_fabric(index, device, &id);
        let place = device.pci_info();
        let place_told = place.as_ref().ok().cloned();
        let known = self.past.known.get(&index).map(|(_, row)| row);
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
        if self.past.lost.remove(&index) {
            // It was away: whatever it reported before, this is its new life.
            self.past.faults.remove(id);
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
    fn forget_others(&mut self, index: u32, id: &str, parts: &[Part<'nvml>]) {
        let still: HashSet<u32> = parts.iter().map(Part::number).collect();
        (self.past.known).retain(|number, (_, known)| {
            let moved = known.id == id;
            let ended = whole_of(*number) == index && !still.contains(number);
            *number == index || !(moved || ended)
        });
    }

    fn put(&mut self, row: AcceleratorRow, reading: &mut Reading) {
        let known = (Instant::now(), row.clone());
        self.past.known.insert(row.key.index, known);
        reading.devices.push(row);
    }

    /// The instances of a divided device, those too that do not answer now and did at the last look.
    fn parts(&self, index: u32, device: &Device<'nvml>) -> Result<Vec<Part<'nvml>>, NvmlError> {
        let mut parts = Vec::new();
        for place in 0..device.mig_device_count()?.min(PARTS - 1) {
            let number = (index + 1) * PARTS + place;
            match device.mig_device_by_index(place) {
                Ok(instance) => parts.push(Part::There {
                    number,
                    ids: mig_instance(self.nvml, &instance),
                    instance,
                }),
                Err(err) if has_lost_its_driver(&err) => return Err(err),
                Err(err) if is_passing(&err) && self.past.known.contains_key(&number) => {
                    parts.push(Part::Failed { number, err });
                }
                // Numbers without an instance are gaps.
                Err(_) => {}
            }
        }
        Ok(parts)
    }

    fn read_part(
        &mut self,
        whole: &AcceleratorRow,
        (device, of_whole): (&Device<'nvml>, Option<Memory>),
        part: Part<'nvml>,
        reading: &mut Reading,
    ) -> Result<AcceleratorRow, NvmlError> {
        let (number, instance, ids) = match part {
            Part::There {
                number,
                instance,
                ids,
            } => (number, instance, ids),
            Part::Failed { err, .. } => return Err(err),
        };
        let memory = Memory::of(self.nvml, &instance)?;
        let attributes = match instance.attributes() {
            Ok(attributes) => Some(attributes),
            Err(err) if is_passing(&err) => return Err(err),
            Err(_) => None,
        };
        let id = instance.uuid()?;
        let total = memory.map(|memory| memory.total);
        let known = self.past.known.get(&number).map(|(_, row)| row);
        let known = known.filter(|row| row.id == id);
        let profile = match instance.name() {
            Ok(name) => profile::of_name(&name),
            Err(err) if is_not_offered(&err) => None,
            Err(err) if has_lost_its_driver(&err) => return Err(err),
            // Its sizes do not tell all that its name does.
            Err(_) => known.map(|row| row.profile.clone()),
        };
        let known_ids = known.and_then(|row| row.instance);
        let profile = profile.or_else(|| {
            let of_whole = of_whole.map(|memory| memory.total);
            Some(profile::of_sizes(attributes.as_ref()?, total?, of_whole?))
        });
        // Its processors are told of the whole GPU instance, of which others may have a part.
        let has_all = |found: &DeviceAttributes| {
            found.compute_instance_slice_count == found.gpu_instance_slice_count
        };
        let alone = ids.filter(|_| attributes.as_ref().is_some_and(has_all));
        let load = alone.map(|ids| self.loads.read((device, &whole.id), (ids.gpu, &id)));
        let load = load.unwrap_or_default();
        let mut row = AcceleratorRow {
            key: key(number),
            instance: ids.or_else(|| instance_of_name(&id)).or(known_ids),
            id,
            part_of: Some(whole.key.index),
            divided: false,
            profile: profile.unwrap_or_default(),
            units: attributes.map(|found| found.multiprocessor_count),
            counters: AcceleratorCounters {
                memory_total_bytes: total,
                memory_used_bytes: memory.map(Memory::used),
                utilisation_permille: load.busy,
                memory_utilisation_permille: load.memory,
                ..AcceleratorCounters::default()
            },
            ..whole.clone()
        };
        let own = match (listed(&instance), row.instance) {
            // Then the whole device may list those of all instances, with the ids of these.
            (Listed::NotOffered | Listed::Failed(_), Some(ids)) => match listed(device) {
                Listed::These(mut list) => {
                    list.all.retain(|process| {
                        let of = (process.gpu_instance_id, process.compute_instance_id);
                        of == (Some(ids.gpu), Some(ids.compute))
                    });
                    Listed::These(list)
                }
                other => other,
            },
            (own, _) => own,
        };
        (row.users, row.users_unknown) = self.users(number, &instance, own, reading);
        clip(&mut row);
        Ok(row)
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

    /// Asks to be told of a device's faults, if that is not done; again later where it fails.
    fn watch(&mut self, device: &Device<'nvml>, id: &str) {
        let failed = match self.events.get(id) {
            Some(Watch::By(_) | Watch::Silent) => return,
            Some(Watch::Failed { again, .. }) if Instant::now() < *again => return,
            Some(Watch::Failed { times, .. }) => *times,
            None => 0,
        };
        let kinds = EventTypes::CRITICAL_XID_ERROR | EventTypes::DOUBLE_BIT_ECC_ERROR;
        // Asked for one that it does not have, a device tells none.
        let kinds = device
            .supported_event_types()
            .map_or(kinds, |its| kinds & its);
        let set = self.nvml.create_event_set();
        let set = set.and_then(|set| device.register_events(kinds, set).map_err(|err| err.error));
        let watch = match set {
            Ok(set) => {
                if failed > 0 {
                    tracing::info!(device = id, "the device tells faults now");
                }
                Watch::By(set)
            }
            Err(err) if is_not_offered(&err) => {
                tracing::debug!(device = id, %err, "the device tells no faults");
                Watch::Silent
            }
            Err(err) => {
                let times = failed + 1;
                if times == 1 {
                    tracing::warn!(device = id, %err,
                        "a device can't be asked to tell its faults, this is tried again");
                }
                if times < REGISTRATIONS {
                    let pause = INTERVAL * 2_u32.saturating_pow(failed);
                    let again = Instant::now() + pause.min(RETRY);
                    Watch::Failed { times, again }
                } else {
                    tracing::warn!(device = id, %err,
                        "a device could not be asked to tell its faults: restart bai-dataplane when the driver works");
                    Watch::Silent
                }
            }
        };
        self.events.insert(id.to_owned(), watch);
    }

    fn take_events(&mut self) {
        let mut all = Vec::new();
        for watch in self.events.values() {
            let Watch::By(set) = watch else {
                continue;
            };
            // As many as there may reasonably be: a storm of them must not keep the thread.
            all.extend((0..64).map_while(|_| set.wait(0).ok()));
        }
        for event in all {
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

/// An instance of a divided device.
enum Part<'nvml> {
    There {
        number: u32,
        instance: Device<'nvml>,
        ids: Option<MigInstance>,
    },
    Failed {
        number: u32,
        err: NvmlError,
    },
}

impl Part<'_> {
    fn number(&self) -> u32 {
        match self {
            Self::There { number, .. } | Self::Failed { number, .. } => *number,
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
    /// `None` where it is a part of the host's.
    fn of<'nvml>(nvml: &'nvml Nvml, device: &Device<'nvml>) -> Result<Option<Self>, NvmlError> {
        let told = match device.memory_info() {
            Ok(found) => Ok((found.total, found.free)),
            Err(NvmlError::FailedToLoadSymbol(_)) => memory_v1(nvml, device),
            Err(err) => Err(err),
        };
        match told {
            Ok((total, free)) => Ok(Some(Self { total, free })),
            Err(err) if is_not_offered(&err) => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// What is not free, as the original tells it: what the driver keeps for itself is used too.
    fn used(self) -> u64 {
        self.total.saturating_sub(self.free)
    }
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

fn counters(device: &Device<'_>, memory: Option<Memory>) -> AcceleratorCounters {
    let permille = |percent: u32| u64::from(percent.min(100)) * 10;
    let load = device.utilization_rates().ok();
    // Thousands of bytes per second, measured over 20 ms.
    let pcie = |counter| {
        let kilobytes = device.pcie_throughput(counter).ok()?;
        Some(u64::from(kilobytes) * 1000)
    };
    let errors = |kind| device.total_ecc_errors(kind, EccCounter::Volatile).ok();
    AcceleratorCounters {
        memory_total_bytes: memory.map(|memory| memory.total),
        memory_used_bytes: memory.map(Memory::used),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_tell_the_device_that_they_are_a_part_of() {
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
}
