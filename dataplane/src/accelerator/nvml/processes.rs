//! Which processes compute or draw on a device, and how busy each is.
//!
//! In: the driver's lists and samples. Out: what each process uses. Invariants: a list that could not
//! be read is told as such, because a part of the processes would be taken for all of them; a process
//! of no list that the driver offers is not made up; a client of the Multi-Process Service of whom the
//! driver has no sample is not called idle, because its work may be told as the server's.
//!
//! Source: NVIDIA's NVML API reference, "Device Queries"; clients of the Multi-Process Service are in
//! a list of their own.

use std::collections::{HashMap, HashSet};

use nvml_wrapper::Device;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::{ProcessInfo, ProcessUtilizationSample};

use super::is_not_offered;
use crate::accelerator::ProcessUse;

/// How often a list is read that has grown between asking for its length and reading it.
const ATTEMPTS: u32 = 4;

/// The processes of a device.
pub(super) enum Listed {
    /// These.
    These(List),
    /// The driver offers no such list here.
    NotOffered,
    /// It has one, which could not be read.
    Failed(NvmlError),
}

/// Processes of a device.
pub(super) struct List {
    /// What the driver tells of each; one that computes and draws is there twice.
    pub(super) all: Vec<ProcessInfo>,
    /// Those that are clients of the Multi-Process Service.
    clients: HashSet<u32>,
    /// There are no others.
    pub(super) complete: bool,
}

/// Reads the lists of a device or an instance.
pub(super) fn listed(device: &Device<'_>) -> Listed {
    let compute = read(|| match device.running_compute_processes() {
        Err(NvmlError::FailedToLoadSymbol(_)) => device.running_compute_processes_v2(),
        told => told,
    });
    let graphics = read(|| match device.running_graphics_processes() {
        Err(NvmlError::FailedToLoadSymbol(_)) => device.running_graphics_processes_v2(),
        told => told,
    });
    let (mut all, graphics) = match (compute, graphics) {
        (Err(err), _) | (_, Err(err)) => return Listed::Failed(err),
        (Ok(None), _) => return Listed::NotOffered,
        (Ok(Some(compute)), Ok(graphics)) => (compute, graphics),
    };
    all.extend(graphics.unwrap_or_default());
    let clients = read(|| device.mps_running_compute_processes());
    let complete = clients.is_ok();
    let clients = clients.ok().flatten().unwrap_or_default();
    let pids = clients.iter().map(|client| client.pid).collect();
    all.extend(clients);
    Listed::These(List {
        all,
        clients: pids,
        complete,
    })
}

/// `None` where the driver has no such list.
fn read<T>(list: impl Fn() -> Result<Vec<T>, NvmlError>) -> Result<Option<Vec<T>>, NvmlError> {
    for _ in 0..ATTEMPTS {
        match list() {
            Err(NvmlError::InsufficientSize(_)) => {}
            Err(err) if is_not_offered(&err) => return Ok(None),
            told => return told.map(Some),
        }
    }
    Err(NvmlError::InsufficientSize(None))
}

/// What each of the processes listed uses. `seen` is up to when samples were read, in microseconds of
/// the driver's clock.
pub(super) fn used(
    device: &Device<'_>,
    listed: List,
    seen: &mut Option<u64>,
) -> HashMap<u32, ProcessUse> {
    let mut all: HashMap<u32, ProcessUse> = HashMap::new();
    for process in listed.all {
        let memory = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        // A process that computes and draws is listed twice with the same memory.
        let known = all.entry(process.pid).or_default();
        known.memory_bytes = known.memory_bytes.max(memory);
    }
    if all.is_empty() {
        return all;
    }
    let samples: Vec<ProcessUtilizationSample> =
        match read(|| device.process_utilization_stats(*seen)) {
            Ok(Some(samples)) => samples,
            // The driver has a sample of nobody: of what it samples, all are idle.
            Err(NvmlError::NotFound) => Vec::new(),
            Ok(None) | Err(_) => return all,
        };
    let mut latest: HashMap<u32, (u64, [u32; 3])> = HashMap::new();
    for sample in samples {
        *seen = (*seen).max(Some(sample.timestamp));
        let entry = latest.entry(sample.pid).or_default();
        let told = [sample.sm_util, sample.enc_util, sample.dec_util];
        *entry = (*entry).max((sample.timestamp, told));
    }
    for (pid, used) in &mut all {
        match latest.get(pid) {
            Some((_, told)) => used.busy(*told),
            None if listed.clients.contains(pid) => {}
            None => used.busy([0; 3]),
        }
    }
    all
}
