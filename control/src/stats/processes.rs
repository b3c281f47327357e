//! The records of the processes in containers.
//!
//! In: the processes of a pass, and by which name their container holds accelerators. Out: one record
//! per container, host pid by host pid. Invariants: a pid that was given to another process begins
//! anew; rates are over the time between two listings, not between two looks at them.

use std::collections::{BTreeMap, HashMap};

use rust_decimal::Decimal;
use shared::ids::ContainerId;
use shared::observed::{ProcessSample, Processes};

use super::decimal::{milliseconds, percent_of_permille};
use super::kernels::{device_load, device_memory};
use super::metric::{Current, Measurement, Metrics, MissingCapacity, Quantity, Statistic};
use super::record::ProcessRecord;

const CPU_UTIL: Quantity = Quantity::new(
    "cpu_util",
    "percent",
    Current::Rate,
    &[Statistic::Maximum, Statistic::Average],
);
const CPU_USED: Quantity = Quantity::new("cpu_used", "msec", Current::Value, &[]);
const MEM: Quantity = Quantity::new("mem", "bytes", Current::Value, &[Statistic::Maximum]);
const IO_READ: Quantity = Quantity::new("io_read", "bytes", Current::Value, &[Statistic::Rate]);
const IO_WRITE: Quantity = Quantity::new("io_write", "bytes", Current::Value, &[Statistic::Rate]);

/// What names a process for good: a pid is used again, with another start.
type Key = (ContainerId, u32, u64);

/// The state of all processes.
#[derive(Debug, Default)]
pub struct ProcessTable {
    /// When the last listing taken in was made, ns of the monotonic clock.
    taken_ns: u64,
    tracked: HashMap<Key, Metrics>,
}

impl ProcessTable {
    /// Takes in a listing; answers the record of each container. One that was taken in already
    /// answers nothing, nor does a region in which nothing was listed yet.
    pub fn observe(
        &mut self,
        processes: &Processes,
        accelerators: &HashMap<ContainerId, &str>,
    ) -> Vec<(ContainerId, ProcessRecord)> {
        let taken_ns = processes.taken_monotonic_ns;
        if taken_ns == self.taken_ns || taken_ns == 0 {
            return Vec::new();
        }
        self.taken_ns = taken_ns;
        let mut before = std::mem::take(&mut self.tracked);
        let mut containers: BTreeMap<ContainerId, BTreeMap<u32, Key>> = BTreeMap::new();
        for process in &processes.list {
            let key = (process.container_id, process.pid, process.start_ticks);
            let mut metrics = before
                .remove(&key)
                .unwrap_or_else(|| Metrics::new(MissingCapacity::FirstValue));
            let accelerator = accelerators.get(&process.container_id).copied();
            metrics.observe(measurements(process, accelerator), taken_ns);
            self.tracked.insert(key, metrics);
            containers
                .entry(process.container_id)
                .or_default()
                .insert(process.pid, key);
        }
        containers
            .into_iter()
            .map(|(container, pids)| {
                let records = pids
                    .into_iter()
                    .filter_map(|(pid, key)| Some((pid, self.tracked.get(&key)?.record())))
                    .collect();
                (container, ProcessRecord(records))
            })
            .collect()
    }
}

fn measurements(process: &ProcessSample, accelerator: Option<&str>) -> Vec<Measurement> {
    let counters = &process.counters;
    let mut list = Vec::with_capacity(7);
    if let (Some(user), Some(system)) = (counters.user_ns, counters.system_ns) {
        let used = milliseconds(user.saturating_add(system));
        list.push(Measurement::of(CPU_UTIL, used, Some(Decimal::ONE_THOUSAND)));
        list.push(Measurement::of(CPU_USED, used, None));
    }
    for (quantity, value) in [
        (MEM, counters.rss_bytes),
        (IO_READ, counters.read_bytes),
        (IO_WRITE, counters.write_bytes),
    ] {
        if let Some(value) = value {
            list.push(Measurement::of(quantity, value.into(), None));
        }
    }
    if let Some(name) = accelerator {
        if let Some(used) = counters.accelerator_memory_bytes {
            list.push(Measurement::of(device_memory(name), used.into(), None));
        }
        if let Some(load) = counters.accelerator_utilisation_permille {
            let (load, all) = (percent_of_permille(load), Some(Decimal::ONE_HUNDRED));
            list.push(Measurement::of(device_load(name), load, all));
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::record::pack;
    use super::*;
    use shared::observed::ProcessCounters;

    /// A process in the listing of this second.
    fn pass(taken_s: u64, pid: u32, start_ticks: u64, cpu_ms: u64) -> Processes {
        Processes {
            tick: taken_s,
            taken_monotonic_ns: taken_s * 1_000_000_000,
            list: vec![ProcessSample {
                container_id: ContainerId([0xcc; 32]),
                pid,
                start_ticks,
                counters: ProcessCounters {
                    user_ns: Some(cpu_ms * 600_000),
                    system_ns: Some(cpu_ms * 400_000),
                    rss_bytes: Some(52_428_800),
                    ..ProcessCounters::default()
                },
                ..ProcessSample::default()
            }],
            ..Processes::default()
        }
    }

    #[test]
    fn bytes_are_those_of_the_original() {
        let golden: serde_json::Value = serde_json::from_str(include_str!(
            "../../../tests/vectors/telemetry/process_stat.json"
        ))
        .unwrap();
        let mut table = ProcessTable::default();
        for (round, cpu_ms) in [10_u64, 510, 1010].into_iter().enumerate() {
            let taken_s = 1000 + 5 * u64::try_from(round).unwrap();
            let records = table.observe(&pass(taken_s, 4242, 9, cpu_ms), &HashMap::new());
            let bytes = pack(&records[0].1).unwrap();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, golden["rounds"][round]["value_hex"], "round {round}");
        }
    }

    #[test]
    fn a_pid_used_again_begins_anew() {
        let mut table = ProcessTable::default();
        let none = HashMap::new();
        table.observe(&pass(1, 5, 1, 1000), &none);
        let records = table.observe(&pass(2, 5, 2, 20), &none);
        let record = &records[0].1.0[0].1;
        assert_eq!(record.get("cpu_used").unwrap().current, "20");
        assert_eq!(table.tracked.len(), 1);
        assert!(table.observe(&pass(2, 5, 2, 20), &none).is_empty());
    }

    #[test]
    fn use_of_accelerators_has_the_name_the_kernel_holds_them_by() {
        let mut pass = pass(1, 5, 1, 1000);
        let counters = &mut pass.list[0].counters;
        counters.accelerator_memory_bytes = Some(1 << 30);
        counters.accelerator_utilisation_permille = Some(250);
        let record_of = |names: &[(ContainerId, &'static str)]| {
            let names = names.iter().copied().collect();
            let mut records = ProcessTable::default().observe(&pass, &names);
            records.remove(0).1.0.remove(0).1
        };
        let record = record_of(&[(ContainerId([0xcc; 32]), "cuda")]);
        assert_eq!(record.get("cuda_mem").unwrap().current, "1073741824");
        let load = record.get("cuda_util").unwrap();
        assert_eq!(
            (load.current.as_str(), load.percentage.as_str()),
            ("25", "25")
        );
        // A container that holds none, or several kinds, has no name to give it.
        assert!(record_of(&[]).get("cuda_mem").is_none());
    }
}
