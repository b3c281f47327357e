//! The records of kernels.
//!
//! In: the samples of a pass and what each kernel was given. Out: one record per kernel that has
//! been measured, or should have been. Invariants: a record waits for CPU and memory to be read, but
//! for `SILENT_INTERVALS` only, and has every key of the original's; the load of a device the kernel
//! holds is always in it; a load that has not been read for so long counts as busy, because an idle
//! checker would go on with the last one; the state of a kernel ends with the kernel.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rust_decimal::Decimal;
use shared::ids::{ContainerId, KernelId};
use shared::observed::{AcceleratorRow, ContainerSample, ObservedSnapshot, UNLIMITED};

use super::decimal::{milliseconds, percent_of_permille};
use super::metric::{Current, Measurement, Metrics, MissingCapacity, Quantity, Statistic};
use super::record::{Figures, Record as StatRecord};
use crate::accelerator::device::id_of;
use crate::kernel::record::Record;
use crate::kernel::request::SessionType;

const AVERAGE_AND_MAXIMUM: &[Statistic] = &[Statistic::Maximum, Statistic::Average];
const MAXIMUM: &[Statistic] = &[Statistic::Maximum];
const RATE: &[Statistic] = &[Statistic::Rate];

const CPU_UTIL: Quantity = Quantity::new("cpu_util", "percent", Current::Rate, AVERAGE_AND_MAXIMUM);
const CPU_USED: Quantity = Quantity::new("cpu_used", "msec", Current::Value, &[]);
const MEM: Quantity = Quantity::new("mem", "bytes", Current::Value, MAXIMUM);
const IO_READ: Quantity = Quantity::new("io_read", "bytes", Current::Value, RATE);
const IO_WRITE: Quantity = Quantity::new("io_write", "bytes", Current::Value, RATE);
const NET_RX: Quantity = Quantity::new("net_rx", "bps", Current::Rate, &[]);
const NET_TX: Quantity = Quantity::new("net_tx", "bps", Current::Rate, &[]);
const SCRATCH: Quantity = Quantity::new("io_scratch_size", "bytes", Current::Value, MAXIMUM);

/// Intervals after which a load that was not read again is no longer told.
const SILENT_INTERVALS: u32 = 3;
/// The least time for that: a pass of the dataplane may be late on a machine under load.
const LEAST_PATIENCE: Duration = Duration::from_secs(5);

/// Milliseconds of CPU time in a second of one core.
const CORE: Decimal = Decimal::ONE_THOUSAND;

/// Devices of one accelerator that a kernel holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldDevices {
    /// The plugin's device name, the prefix of its keys: `cuda`.
    pub name: String,
    /// Their ids.
    pub ids: Vec<String>,
    /// They are given out in shares: others may hold some of the same devices.
    pub shared: bool,
}

/// What the records and series of one kernel need to know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelFacts {
    /// The kernel.
    pub id: KernelId,
    /// The container it runs in now.
    pub container: ContainerId,
    /// It ran before this process did: its first sample is no beginning.
    pub adopted: bool,
    /// The accelerators it holds.
    pub devices: Vec<HeldDevices>,
    /// Of an inference session: no idle checker looks at it, but rules of the manager that add and
    /// remove replicas by its loads do, and skip one that is not there.
    pub scaled_by_load: bool,
}

impl KernelFacts {
    /// Of a kernel that has a container; one created before `born` (seconds since 1970) is adopted.
    pub fn of(record: &Record, born: f64) -> Option<Self> {
        let devices = record.allocation.iter().flat_map(|held| {
            let all = held.accelerators();
            all.map(|(name, ids)| (name, ids, held.in_shares(name)))
        });
        Some(Self {
            id: record.id(),
            container: record.container()?,
            adopted: record.created_at < born,
            scaled_by_load: record.session_type == SessionType::Inference,
            devices: devices
                .map(|(name, ids, shared)| HeldDevices {
                    name: name.to_owned(),
                    ids: ids.into_iter().map(str::to_owned).collect(),
                    shared,
                })
                .collect(),
        })
    }

    /// The name of its accelerators, if it holds those of one kind: a driver's numbers of a process
    /// do not say of which.
    pub(super) fn accelerator(&self) -> Option<&str> {
        match &self.devices[..] {
            [held] => Some(&held.name),
            _ => None,
        }
    }
}

/// The rows of the devices a kernel holds; `None` when one of them is not there.
pub fn rows_of<'s>(
    held: &HeldDevices,
    accelerators: &'s [AcceleratorRow],
) -> Option<Vec<&'s AcceleratorRow>> {
    held.ids
        .iter()
        .map(|id| {
            accelerators
                .iter()
                .find(|row| is_named(row, &held.name) && has_id(row, id))
        })
        .collect()
}

fn is_named(row: &AcceleratorRow, name: &str) -> bool {
    row.key.kind.name() == name
}

fn has_id(row: &AcceleratorRow, id: &str) -> bool {
    id_of(row) == id || row.key.index.to_string() == id
}

fn device_key(name: &str, what: &str) -> Cow<'static, str> {
    // Slot names may have dashes, keys of records have none.
    Cow::Owned(format!("{}_{what}", name.replace('-', "_")))
}

/// `<name>_mem`.
pub(super) fn device_memory(name: &str) -> Quantity {
    Quantity {
        key: device_key(name, "mem"),
        unit: "bytes",
        current: Current::Value,
        statistics: MAXIMUM,
    }
}

/// `<name>_util`.
pub(super) fn device_load(name: &str) -> Quantity {
    Quantity {
        key: device_key(name, "util"),
        unit: "percent",
        current: Current::Value,
        statistics: AVERAGE_AND_MAXIMUM,
    }
}

/// The memory a container may use: its limit, or that of the machine.
pub fn memory_capacity(sample: &ContainerSample, machine: Option<u64>) -> Option<u64> {
    let limit = sample.memory.get()?.limit_bytes?;
    match machine {
        // cgroup v1 shows no limit as a number of pages below 2^63.
        Some(machine) if limit > machine => Some(machine),
        None if limit == UNLIMITED => None,
        _ => Some(limit),
    }
}

/// The memory a container uses and cannot give back at once.
pub fn memory_used(sample: &ContainerSample) -> Option<u64> {
    let memory = sample.memory.get()?;
    let current = memory.current_bytes?;
    Some(current.saturating_sub(memory.inactive_file_bytes.unwrap_or(0)))
}

/// What one sample measures, in the order of the original's records.
pub(crate) fn measurements(
    sample: &ContainerSample,
    facts: &KernelFacts,
    snapshot: &ObservedSnapshot,
) -> Vec<Measurement> {
    let mut list = Vec::with_capacity(8);
    if let Some(used) = sample.cpu.get().and_then(|cpu| cpu.usage_ns) {
        let used = milliseconds(used);
        list.push(Measurement::of(CPU_UTIL, used, Some(CORE)));
        list.push(Measurement::of(CPU_USED, used, None));
    }
    let machine = snapshot
        .node
        .as_ref()
        .and_then(|node| node.counters.memory_total_bytes);
    if let Some(used) = memory_used(sample) {
        let capacity = memory_capacity(sample, machine).map(Decimal::from);
        list.push(Measurement::of(MEM, used.into(), capacity));
    }
    let mut count = |quantity: Quantity, value: Option<u64>| {
        if let Some(value) = value {
            list.push(Measurement::of(quantity, value.into(), None));
        }
    };
    let io = sample.io.get();
    count(IO_READ, io.and_then(|io| io.read_bytes));
    count(IO_WRITE, io.and_then(|io| io.write_bytes));
    let net = sample.net.get();
    count(NET_RX, net.and_then(|net| net.rx_bytes));
    count(NET_TX, net.and_then(|net| net.tx_bytes));
    count(
        SCRATCH,
        sample.disk.get().and_then(|disk| disk.scratch_bytes),
    );
    for held in &facts.devices {
        let rows = rows_of(held, &snapshot.accelerators).unwrap_or_default();
        let own: Vec<AcceleratorRow> = rows
            .into_iter()
            .map(|row| used_by(row, facts.container, held.shared))
            .collect();
        let own: Vec<&AcceleratorRow> = own.iter().collect();
        list.extend(device_measurements(&held.name, &own));
    }
    list
}

/// A device as one container uses it. What the driver does not tell per container is the whole
/// device's where nobody else uses it, because all users are known or others can't hold it, and
/// unknown otherwise, which counts as busy: an idle checker must not take a busy session for idle. For
/// the same reason the load of one who uses a device alone is the whole device's where that is greater:
/// drivers tell the work of some programs as another's, or nobody's.
/// Of a device that is `shared` nothing is a container's that is not among the users.
fn used_by(row: &AcceleratorRow, container: ContainerId, shared: bool) -> AcceleratorRow {
    let mut row = row.clone();
    let counters = &mut row.counters;
    let own = row.users.iter().find(|user| user.container_id == container);
    let listed = row.users.len() - usize::from(own.is_some()) > 0 || row.users_left_out > 0;
    if listed || (shared && (row.users_unknown || own.is_none())) {
        // No part of what all of them use together.
        let all = (
            counters.memory_used_bytes.take(),
            counters.utilisation_permille.take(),
        );
        if own.is_none() && row.users_left_out == 0 && !row.users_unknown {
            // All users are known, and this one is not among them.
            counters.memory_used_bytes = all.0.map(|_| 0);
            counters.utilisation_permille = all.1.map(|_| 0);
        }
    }
    if let Some(user) = own {
        counters.memory_used_bytes = user.memory_bytes.or(counters.memory_used_bytes);
        let load = user.utilisation_permille.map(u64::from);
        counters.utilisation_permille = load.max(counters.utilisation_permille);
    }
    row
}

/// Memory and load of a set of devices; each only when every device tells it.
pub(super) fn device_measurements(name: &str, rows: &[&AcceleratorRow]) -> Vec<Measurement> {
    let mut list = Vec::new();
    if rows.is_empty() {
        return list;
    }
    let sum = |read: fn(&AcceleratorRow) -> Option<u64>| -> Option<u64> {
        rows.iter()
            .map(|row| read(row))
            .try_fold(0_u64, |sum, value| Some(sum.saturating_add(value?)))
    };
    if let Some(used) = sum(|row| row.counters.memory_used_bytes) {
        let total = sum(|row| row.counters.memory_total_bytes).map(Decimal::from);
        list.push(Measurement::of(device_memory(name), used.into(), total));
    }
    if let Some(load) = sum(|row| row.counters.utilisation_permille) {
        let all = Decimal::from(rows.len()) * Decimal::ONE_HUNDRED;
        let load = percent_of_permille(load);
        list.push(Measurement::of(device_load(name), load, Some(all)));
    }
    list
}

#[derive(Debug)]
struct Tracked {
    metrics: Metrics,
    /// When the kernel was first asked for, or was last seen to start again.
    since_ns: u64,
    /// The moment of the last sample taken in.
    at_ns: Option<u64>,
}

/// When a pass happens, and how often they do.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Now, ns of the monotonic clock.
    pub now_ns: u64,
    /// The interval of passes, or of samples where that is longer.
    pub interval: Duration,
}

impl Moment {
    /// How old what was read last may be to be told.
    pub(super) fn patience(self) -> Duration {
        let intervals = self.interval.saturating_mul(SILENT_INTERVALS);
        intervals.max(LEAST_PATIENCE)
    }

    fn is_long_after(self, then_ns: u64) -> bool {
        Duration::from_nanos(self.now_ns.saturating_sub(then_ns)) > self.patience()
    }
}

/// The state of all kernels.
#[derive(Debug, Default)]
pub struct Kernels {
    tracked: HashMap<KernelId, Tracked>,
}

impl Kernels {
    /// Takes in a pass; answers the record of each running kernel about which there is news, be it
    /// that nothing is known any more. Of those that are `away` (they start again) what was measured is
    /// kept and nothing is told.
    pub fn observe(
        &mut self,
        kernels: &[KernelFacts],
        away: &HashSet<KernelId>,
        snapshot: &ObservedSnapshot,
        moment: Moment,
    ) -> Vec<(KernelId, StatRecord)> {
        let running: HashSet<KernelId> = kernels.iter().map(|facts| facts.id).collect();
        self.tracked.retain(|kernel, tracked| {
            let runs = running.contains(kernel);
            if !runs {
                tracked.since_ns = moment.now_ns;
            }
            runs || away.contains(kernel)
        });
        kernels
            .iter()
            .filter_map(|facts| Some((facts.id, self.observe_kernel(facts, snapshot, moment)?)))
            .collect()
    }

    fn observe_kernel(
        &mut self,
        facts: &KernelFacts,
        snapshot: &ObservedSnapshot,
        moment: Moment,
    ) -> Option<StatRecord> {
        let tracked = self.tracked.entry(facts.id).or_insert_with(|| Tracked {
            metrics: Metrics::new(MissingCapacity::FirstValue),
            since_ns: moment.now_ns,
            at_ns: None,
        });
        let sample = snapshot
            .container(facts.container)
            .filter(|sample| tracked.at_ns != Some(sample.taken_monotonic_ns));
        if let Some(sample) = sample {
            let taken = sample.taken_monotonic_ns;
            let measured = measurements(sample, facts, snapshot);
            tracked.metrics.observe(measured, taken);
            tracked.at_ns = Some(taken);
        } else if !moment.is_long_after(tracked.at_ns.unwrap_or(0).max(tracked.since_ns)) {
            // Nothing new: the manager keeps what it was told last.
            return None;
        }
        let metrics = &tracked.metrics;
        let read = metrics.has(&CPU_UTIL.key) && metrics.has(&MEM.key);
        // Of an earlier life of this process only the beginning was seen.
        let unripe = facts.adopted && !metrics.has_rate(&CPU_UTIL.key);
        if (unripe || !read) && !moment.is_long_after(tracked.since_ns) {
            return None;
        }
        let mut record = metrics.record();
        if unripe {
            // All CPU time of the kernel's past, and no rate.
            record.0.retain(|(key, _)| *key != CPU_UTIL.key);
        }
        complete_record(&mut record, facts);
        for quantity in loads(facts) {
            let last = metrics.last_ns(&quantity.key);
            let last = last.map(|last| last.max(tracked.since_ns));
            if last.is_some_and(|last| moment.is_long_after(last)) {
                match facts.scaled_by_load {
                    true => record.0.retain(|(key, _)| *key != quantity.key),
                    false => record.count_as_busy(&quantity.key),
                }
            }
        }
        Some(record)
    }
}

/// What tells whether a kernel is in use.
fn loads(facts: &KernelFacts) -> impl Iterator<Item = Quantity> + '_ {
    let devices = facts.devices.iter().filter(|held| !held.ids.is_empty());
    let devices = devices.flat_map(|held| [device_memory(&held.name), device_load(&held.name)]);
    [CPU_UTIL, MEM].into_iter().chain(devices)
}

/// Adds what was never measured, so that every reader finds every key that it may take for idle.
fn complete_record(record: &mut StatRecord, facts: &KernelFacts) {
    for quantity in [CPU_USED, IO_READ, IO_WRITE, NET_RX, NET_TX, SCRATCH] {
        if record.get(&quantity.key).is_none() {
            let zero = Measurement::of(quantity.clone(), Decimal::ZERO, None);
            let mut metrics = Metrics::new(MissingCapacity::FirstValue);
            metrics.observe([zero], 0);
            record.0.extend(metrics.record().0);
        }
    }
    for quantity in loads(facts) {
        if record.get(&quantity.key).is_none() && !facts.scaled_by_load {
            record
                .0
                .push((quantity.key, Figures::unread(quantity.unit)));
        }
    }
}

#[cfg(test)]
mod tests;
