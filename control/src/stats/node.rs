//! The record of the node and its devices.
//!
//! In: what the host tells of itself (cores, memory); the network, disks and accelerators of the
//! observed region. Out: one record. Invariants: each disk and each byte of the network counts once;
//! a sample of the dataplane is taken in once; what could not be read keeps its last value, what the
//! dataplane tells for so long only as its numbers are told at all; a device that is gone leaves the
//! record, and so does what accelerators no longer tell.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use rust_decimal::{Decimal, RoundingStrategy};
use shared::monotonic_ns;
use shared::observed::{AcceleratorKind, AcceleratorRow, ObservedSnapshot};
use shared::procfs::{CpuTicks, meminfo_bytes, tick_ns};

use super::decimal::milliseconds;
use super::kernels::device_measurements;
use super::metric::{Current, Measurement, Metric, Metrics, MissingCapacity, Quantity, Statistic};
use super::record::{DeviceFigures, NodeRecord};
use crate::blocking::blocking;

const CPU_UTIL: Quantity = Quantity::new("cpu_util", "msec", Current::Difference, &[]);
const MEM: Quantity = Quantity::new("mem", "bytes", Current::Value, &[Statistic::Maximum]);
const DISK: Quantity = Quantity::new("disk", "bytes", Current::Value, &[]);
const NET_RX: Quantity = Quantity::new("net_rx", "bps", Current::Rate, &[]);
const NET_TX: Quantity = Quantity::new("net_tx", "bps", Current::Rate, &[]);

/// What is not of accelerators.
const NOT_OF_ACCELERATORS: [Quantity; 5] = [CPU_UTIL, MEM, DISK, NET_RX, NET_TX];

/// Whether this process reads it itself; the dataplane reads the rest.
fn is_own(key: &str) -> bool {
    [CPU_UTIL.key, MEM.key].iter().any(|own| own == key)
}

/// Some space, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// What cannot be used any more.
    pub used: u64,
    /// All of it.
    pub total: u64,
}

/// Bytes that passed the node's edge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes received.
    pub received: u64,
    /// Bytes sent.
    pub sent: u64,
}

/// What the host tells of itself at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostReading {
    /// When, ns of the monotonic clock.
    pub at_ns: u64,
    /// Busy time of all cores since boot ([`CpuTicks::busy`]), ns, those that have gone off line too;
    /// `None` when it can't be read.
    pub busy_ns: Option<u64>,
    /// Number and busy time since boot, ns, of each core that is on line.
    pub cores_ns: Vec<(u32, u64)>,
    /// Memory.
    pub memory: Option<Space>,
    /// When the dataplane took its last sample of the node, ns of the monotonic clock.
    pub sampled_ns: Option<u64>,
    /// Disks, by that sample.
    pub disks: Vec<(String, Space)>,
    /// The network, by that sample.
    pub network: Option<Traffic>,
}

impl HostReading {
    /// Reads cores and memory, off the async workers.
    pub async fn now() -> Self {
        blocking(|| Self::of_this_host(monotonic_ns())).await
    }

    /// Reads cores and memory.
    pub fn of_this_host(at_ns: u64) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let tick_ns = tick_ns();
        let (all, cores) = busy_ticks(&text("/proc/stat"));
        let ns = |ticks: u64| ticks.saturating_mul(tick_ns);
        Self {
            at_ns,
            busy_ns: all.map(ns),
            cores_ns: cores
                .into_iter()
                .map(|(core, ticks)| (core, ns(ticks)))
                .collect(),
            memory: memory(&text("/proc/meminfo")),
            ..Self::default()
        }
    }

    /// Adds what the dataplane finds: the network and the disks.
    #[must_use]
    pub fn with_observed(mut self, snapshot: Option<&ObservedSnapshot>) -> Self {
        if let Some(node) = snapshot.and_then(|snapshot| snapshot.node.as_ref()) {
            let counters = &node.counters;
            let bytes = counters.net_rx_bytes.zip(counters.net_tx_bytes);
            self.network = bytes.map(|(received, sent)| Traffic { received, sent });
            self.sampled_ns = Some(node.taken_monotonic_ns);
            let disks = node.disks.iter().map(|disk| {
                let space = Space {
                    used: disk.used_bytes,
                    total: disk.total_bytes,
                };
                (disk.device.clone(), space)
            });
            self.disks = disks.collect();
        }
        self
    }
}

/// Busy ticks of all cores together, those off line included, and of each one on line.
fn busy_ticks(stat: &str) -> (Option<u64>, Vec<(u32, u64)>) {
    let mut all = None;
    let mut cores = Vec::new();
    for (core, ticks) in stat.lines().filter_map(CpuTicks::parse) {
        match core.map(u32::try_from) {
            None => all = Some(ticks.busy()),
            Some(Ok(core)) => cores.push((core, ticks.busy())),
            Some(Err(_)) => {}
        }
    }
    (all, cores)
}

fn memory(meminfo: &str) -> Option<Space> {
    let total = meminfo_bytes(meminfo, "MemTotal:")?;
    let available = meminfo_bytes(meminfo, "MemAvailable:")?;
    Some(Space {
        used: total.saturating_sub(available),
        total,
    })
}

/// One quantity of the node and its devices.
pub(crate) type WithDevices = (Measurement, Vec<(String, Measurement)>);

/// The devices of one quantity.
type DeviceMetrics = Vec<(String, Metric)>;

/// The state of the node.
#[derive(Debug)]
pub struct NodeMetrics {
    node: Metrics,
    devices: Vec<(Cow<'static, str>, DeviceMetrics)>,
    last_ns: Option<u64>,
}

impl Default for NodeMetrics {
    fn default() -> Self {
        Self {
            node: Metrics::new(MissingCapacity::Absent),
            devices: Vec::new(),
            last_ns: None,
        }
    }
}

impl NodeMetrics {
    /// Takes in what was read, of accelerators nothing where the dataplane has not heard of their
    /// drivers; answers the record. What the dataplane tells leaves it after `patience`.
    pub fn observe(
        &mut self,
        reading: &HostReading,
        accelerators: Option<&[AcceleratorRow]>,
        patience: Duration,
    ) -> NodeRecord {
        let elapsed_ns = self
            .last_ns
            .map_or(0, |last| reading.at_ns.saturating_sub(last));
        self.last_ns = Some(reading.at_ns);
        let elapsed = milliseconds(elapsed_ns)
            .round_dp_with_strategy(3, RoundingStrategy::MidpointNearestEven);
        let list = measurements(reading, elapsed, accelerators.unwrap_or_default());
        if accelerators.is_some() {
            // The dataplane has repeated a driver's last answer for a while before this.
            let stays = |key: &str| {
                NOT_OF_ACCELERATORS.iter().any(|host| host.key == key)
                    || list
                        .iter()
                        .any(|(measured, _)| measured.quantity.key == key)
            };
            self.node.retain(|metric| stays(metric.key()));
            self.devices.retain(|(key, _)| stays(key));
        }
        let is_told = |taken_ns: u64| {
            Duration::from_nanos(reading.at_ns.saturating_sub(taken_ns)) <= patience
        };
        for (measurement, devices) in list {
            let key = &measurement.quantity.key;
            let taken_ns = match is_own(key) {
                true => reading.at_ns,
                false => reading.sampled_ns.unwrap_or(reading.at_ns),
            };
            // The traffic of a sample that is seen twice is not 0, and goes over the time between
            // samples, not between looks at them.
            let is_new = self.node.last_ns(key).is_none_or(|last| taken_ns > last);
            if is_new && is_told(taken_ns) {
                self.observe_devices(key, devices, taken_ns);
                self.node.observe([measurement], taken_ns);
            }
        }
        let node = &mut self.node;
        self.devices
            .retain(|(key, _)| is_own(key) || node.last_ns(key).is_some_and(is_told));
        node.retain(|metric| is_own(metric.key()) || is_told(metric.last_ns()));
        self.record()
    }

    fn observe_devices(&mut self, key: &str, devices: Vec<(String, Measurement)>, at_ns: u64) {
        let place = self.devices.iter().position(|(known, _)| known == key);
        let mut before = match place {
            Some(place) => std::mem::take(&mut self.devices[place].1),
            None => Vec::new(),
        };
        let after: DeviceMetrics = devices
            .into_iter()
            .map(|(id, measurement)| {
                let known = before.iter().position(|(known, _)| *known == id);
                let metric = match known.map(|place| before.swap_remove(place).1) {
                    Some(mut metric) => {
                        metric.observe(measurement, at_ns);
                        metric
                    }
                    None => Metric::begin(measurement, at_ns, MissingCapacity::Absent),
                };
                (id, metric)
            })
            .collect();
        match place {
            Some(place) => self.devices[place].1 = after,
            None => self.devices.push((Cow::Owned(key.to_owned()), after)),
        }
    }

    fn record(&self) -> NodeRecord {
        NodeRecord {
            node: self.node.record(),
            devices: self
                .devices
                .iter()
                .map(|(key, devices)| {
                    let figures = devices
                        .iter()
                        .map(|(id, metric)| (id.clone(), metric.figures()))
                        .collect();
                    (key.clone(), DeviceFigures(figures))
                })
                .collect(),
        }
    }
}

/// What one reading measures, in the order of the original's records; `elapsed` is the time since the
/// reading before, ms.
pub(crate) fn measurements(
    reading: &HostReading,
    elapsed: Decimal,
    accelerators: &[AcceleratorRow],
) -> Vec<WithDevices> {
    let mut list: Vec<WithDevices> = Vec::new();
    list.extend(cores(reading, elapsed));

    list.extend(reading.memory.map(|space| {
        let of = |space: Space| Measurement::of(MEM, space.used.into(), Some(space.total.into()));
        (of(space), vec![("root".to_owned(), of(space))])
    }));
    list.extend(disks(&reading.disks));
    if let Some(traffic) = reading.network {
        for (quantity, bytes) in [(NET_RX, traffic.received), (NET_TX, traffic.sent)] {
            let measurement = Measurement::of(quantity, bytes.into(), None);
            let device = ("node".to_owned(), measurement.clone());
            list.push((measurement, vec![device]));
        }
    }
    list.extend(of_accelerators(accelerators));
    list
}

fn cores(reading: &HostReading, elapsed: Decimal) -> Option<WithDevices> {
    let of = |busy_ns: u64| Measurement::of(CPU_UTIL, milliseconds(busy_ns), Some(elapsed));
    let devices: Vec<(String, Measurement)> = reading
        .cores_ns
        .iter()
        .map(|(core, busy_ns)| (core.to_string(), of(*busy_ns)))
        .collect();
    reading.busy_ns.map(|all| (of(all), devices))
}

fn disks(disks: &[(String, Space)]) -> Option<WithDevices> {
    let of = |space: Space| Measurement::of(DISK, space.used.into(), Some(space.total.into()));
    let all = disks
        .iter()
        .fold(Space::default(), |sum, (_, space)| Space {
            used: sum.used.saturating_add(space.used),
            total: sum.total.saturating_add(space.total),
        });
    let devices = disks
        .iter()
        .map(|(device, space)| (device.clone(), of(*space)))
        .collect();
    (!disks.is_empty()).then(|| (of(all), devices))
}

/// What a device is called in records: CUDA's are numbered, as the manager knows them.
fn device_id(row: &AcceleratorRow) -> String {
    match row.key.kind {
        AcceleratorKind::Cuda => row.key.index.to_string(),
        _ if row.id.is_empty() => row.key.index.to_string(),
        _ => row.id.clone(),
    }
}

/// Power and temperature of one device.
fn power_and_heat(name: &str, row: &AcceleratorRow) -> Vec<Measurement> {
    let quantity = |what: &str, unit: &'static str| Quantity {
        key: Cow::Owned(format!("{name}_{what}")),
        unit,
        current: Current::Value,
        statistics: &[Statistic::Maximum, Statistic::Average],
    };
    let thousandths = |value: u64| Decimal::from(value) / Decimal::ONE_THOUSAND;
    let counters = &row.counters;
    let power = counters.power_mw.map(|power| {
        let limit = counters.power_limit_mw.map(thousandths);
        Measurement::of(quantity("power", "Watts"), thousandths(power), limit)
    });
    let heat = counters.temperature_mc.map(|heat| {
        let most = Some(Decimal::from(120));
        Measurement::of(quantity("temperature", "Celsius"), thousandths(heat), most)
    });
    power.into_iter().chain(heat).collect()
}

/// Sums over the devices of each kind; the temperature is their mean.
fn of_accelerators(rows: &[AcceleratorRow]) -> Vec<WithDevices> {
    let mut kinds: BTreeMap<AcceleratorKind, Vec<&AcceleratorRow>> = BTreeMap::new();
    for row in rows {
        kinds.entry(row.key.kind).or_default().push(row);
    }
    let mut list = Vec::new();
    for (kind, rows) in kinds {
        let name = kind.to_string();
        let telling = |read: fn(&AcceleratorRow) -> Option<u64>| -> Vec<&AcceleratorRow> {
            // Of a divided device its parts are used, and counted; power and heat are the whole one's.
            rows.iter()
                .copied()
                .filter(|row| !row.divided && read(row).is_some())
                .collect()
        };
        let (memory, load) = (
            telling(|row| row.counters.memory_used_bytes),
            telling(|row| row.counters.utilisation_permille),
        );
        let memory = device_measurements(&name, &memory).into_iter().take(1);
        let load = device_measurements(&name, &load).into_iter().last();
        for whole in memory.chain(load) {
            let devices = rows
                .iter()
                .filter(|row| !row.divided)
                .filter_map(|row| {
                    let of_device = device_measurements(&name, &[row])
                        .into_iter()
                        .find(|one| one.quantity.key == whole.quantity.key)?;
                    Some((device_id(row), of_device))
                })
                .collect();
            list.push((whole, devices));
        }
        let mut further: Vec<WithDevices> = Vec::new();
        for row in &rows {
            for one in power_and_heat(&name, row) {
                let device = (device_id(row), one.clone());
                let known = further
                    .iter_mut()
                    .find(|(whole, _)| whole.quantity.key == one.quantity.key);
                match known {
                    Some((whole, devices)) => {
                        whole.value += one.value;
                        whole.capacity = whole.capacity.zip(one.capacity).map(|(a, b)| a + b);
                        devices.push(device);
                    }
                    None => further.push((one, vec![device])),
                }
            }
        }
        for (whole, devices) in &mut further {
            if whole.quantity.unit == "Celsius" {
                whole.value /= Decimal::from(devices.len());
                whole.capacity = Some(Decimal::from(120));
            }
        }
        list.extend(further);
    }
    list
}

#[cfg(test)]
mod tests {
    use super::super::fixture::card;
    use super::super::record::pack;
    use super::*;
    use serde_json::Value;
    use shared::observed::{AcceleratorCounters, DiskSpace, NodeCounters, NodeSample};

    #[test]
    fn bytes_are_those_of_the_original() {
        let golden: Value = serde_json::from_str(include_str!(
            "../../../tests/vectors/telemetry/node_stat.json"
        ))
        .unwrap();
        let inputs = &golden["inputs"];
        let mut metrics = NodeMetrics::default();
        for (round, wanted) in golden["rounds"].as_array().unwrap().iter().enumerate() {
            let number = |key: &str| -> Decimal {
                inputs[key]["per_node"][round]
                    .as_str()
                    .unwrap()
                    .parse()
                    .unwrap()
            };
            let whole = |key: &str| u64::try_from(number(key)).unwrap();
            let capacity = |key: &str| inputs[key]["capacity"].as_str().unwrap().parse().unwrap();
            let half = u64::try_from(number("cpu_util") * Decimal::from(500_000)).unwrap();
            let space = |key: &str| Space {
                used: whole(key),
                total: capacity(key),
            };
            let at_ns = (1000 + 5 * u64::try_from(round).unwrap()) * 1_000_000_000;
            let reading = HostReading {
                at_ns,
                busy_ns: Some(2 * half),
                cores_ns: vec![(0, half), (1, half)],
                memory: Some(space("mem")),
                sampled_ns: Some(at_ns),
                disks: vec![("/dev/vda1".to_owned(), space("disk"))],
                network: Some(Traffic {
                    received: whole("net_rx"),
                    sent: whole("net_tx"),
                }),
            };
            let record = metrics.observe(&reading, None, PATIENCE);
            let bytes = pack(&record).unwrap();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(
                hex,
                wanted["value_hex"].as_str().unwrap(),
                "round {round}: {}",
                serde_json::to_string_pretty(&record).unwrap()
            );
        }
    }

    const PATIENCE: Duration = Duration::from_secs(30);

    /// What the dataplane has found at some second: bytes received, half of them sent, and a disk.
    fn found(taken_s: u64, bytes: u64, accelerators: Vec<AcceleratorRow>) -> ObservedSnapshot {
        let node = NodeSample {
            taken_monotonic_ns: taken_s * 1_000_000_000,
            counters: NodeCounters {
                net_rx_bytes: Some(bytes),
                net_tx_bytes: Some(bytes / 2),
                ..NodeCounters::default()
            },
            disks: vec![DiskSpace {
                device: "/dev/vda1".to_owned(),
                total_bytes: 100,
                used_bytes: 40,
            }],
            ..NodeSample::default()
        };
        ObservedSnapshot {
            node: Some(node),
            accelerators,
            ..ObservedSnapshot::default()
        }
    }

    /// The record of a look at some second.
    fn look(metrics: &mut NodeMetrics, at_s: u64, snapshot: &ObservedSnapshot) -> Value {
        let reading = HostReading {
            at_ns: at_s * 1_000_000_000,
            memory: Some(Space { used: 1, total: 2 }),
            ..HostReading::default()
        };
        let reading = reading.with_observed(Some(snapshot));
        let record = metrics.observe(&reading, Some(&snapshot.accelerators), PATIENCE);
        serde_json::to_value(record).unwrap()
    }

    /// Samples are 10 s apart and looked at every 5 s, a little after they are taken.
    #[test]
    fn traffic_is_that_between_samples_however_often_they_are_looked_at() {
        let mut metrics = NodeMetrics::default();
        let mut look = |at_s: u64, taken_s: u64, bytes: u64| {
            let record = look(&mut metrics, at_s, &found(taken_s, bytes, Vec::new()));
            let text = |of: &Value| of["current"].as_str().unwrap().to_owned();
            let device = text(&record["devices"]["net_rx"]["node"]);
            assert_eq!(text(&record["node"]["net_rx"]), device, "{record}");
            (device, text(&record["node"]["net_tx"]))
        };
        let pair = |received: &str, sent: &str| (received.to_owned(), sent.to_owned());
        assert_eq!(look(101, 100, 2000), pair("2000", "1000"));
        assert_eq!(look(113, 110, 12_000), pair("1000", "500"));
        assert_eq!(look(118, 110, 12_000), pair("1000", "500"));
        assert_eq!(look(123, 120, 16_000), pair("400", "200"));
    }

    #[test]
    fn what_a_dead_dataplane_told_leaves_the_record() {
        let mut metrics = NodeMetrics::default();
        let mut last = found(100, 2000, vec![gpu(0, 970, 60_000)]);
        let keys = |record: &Value| {
            let all = [
                "mem",
                "disk",
                "net_rx",
                "net_tx",
                "cuda_mem",
                "cuda_util",
                "cuda_power",
            ];
            all.map(|key| record["node"][key].is_object() && record["devices"][key].is_object())
        };
        let average = |record: &Value| record["node"]["cuda_util"]["stats.avg"].clone();
        assert_eq!(keys(&look(&mut metrics, 100, &last)), [true; 7]);
        // Its region stays as it is. Control goes on looking at it.
        last.accelerators = vec![gpu(0, 10, 60_000)];
        let record = look(&mut metrics, 130, &last);
        assert_eq!((keys(&record), average(&record)), ([true; 7], "97".into()));
        let ended = [true, false, false, false, false, false, false];
        for at_s in [131, 136] {
            assert_eq!(keys(&look(&mut metrics, at_s, &last)), ended, "{at_s}");
        }
        let back = found(200, 2000, vec![gpu(0, 10, 60_000)]);
        let record = look(&mut metrics, 200, &back);
        assert_eq!((keys(&record), average(&record)), ([true; 7], "1".into()));
    }

    fn gpu(index: u32, permille: u64, heat_mc: u64) -> AcceleratorRow {
        card(
            index,
            AcceleratorCounters {
                memory_total_bytes: Some(100),
                memory_used_bytes: Some(10),
                utilisation_permille: Some(permille),
                temperature_mc: Some(heat_mc),
                power_mw: Some(50_500),
                power_limit_mw: Some(300_000),
                ..AcceleratorCounters::default()
            },
        )
    }

    #[test]
    fn accelerators_are_summed_and_shown_one_by_one() {
        let rows = [gpu(0, 1000, 40_000), gpu(1, 505, 61_000)];
        let record = NodeMetrics::default().observe(&HostReading::default(), Some(&rows), PATIENCE);
        let shown = serde_json::to_value(&record).unwrap();
        let node = &shown["node"];
        assert_eq!(node["cuda_util"]["current"], "150.5");
        assert_eq!(node["cuda_util"]["capacity"], "200");
        assert_eq!(node["cuda_mem"]["pct"], "10");
        assert_eq!(node["cuda_power"]["current"], "101");
        assert_eq!(node["cuda_temperature"]["current"], "50.5");
        assert_eq!(shown["devices"]["cuda_util"]["1"]["pct"], "50.5");
        assert_eq!(shown["devices"]["cuda_temperature"]["0"]["current"], "40");
    }

    /// As NVML tells a GPU under MIG: no load, no memory of its own to give out, but power and heat.
    #[test]
    fn a_divided_device_tells_its_power_and_heat_and_its_parts_the_rest() {
        let mut whole = gpu(0, 900, 40_000);
        whole.divided = true;
        let mut part = gpu(1000, 500, 0);
        part.part_of = Some(0);
        (part.counters.power_mw, part.counters.temperature_mc) = (None, None);
        let rows = [whole, part];
        let record = NodeMetrics::default().observe(&HostReading::default(), Some(&rows), PATIENCE);
        let shown = serde_json::to_value(&record).unwrap();
        assert_eq!(shown["node"]["cuda_util"]["current"], "50");
        assert!(shown["devices"]["cuda_util"]["0"].is_null(), "{shown}");
        assert!(shown["devices"]["cuda_mem"]["0"].is_null(), "{shown}");
        for (key, value) in [("cuda_power", "50.5"), ("cuda_temperature", "40")] {
            assert_eq!(shown["node"][key]["current"], value, "{key}");
            assert_eq!(shown["devices"][key]["0"]["current"], value, "{key}");
        }
    }

    #[test]
    fn a_device_that_is_gone_leaves_and_an_unread_host_stays() {
        let mut metrics = NodeMetrics::default();
        let space = Space { used: 1, total: 2 };
        let mut see = |at_ns: u64, disks: &[&str]| {
            let reading = HostReading {
                at_ns,
                disks: disks
                    .iter()
                    .map(|name| ((*name).to_owned(), space))
                    .collect(),
                ..HostReading::default()
            };
            serde_json::to_value(metrics.observe(&reading, Some(&[]), PATIENCE)).unwrap()
        };
        see(1, &["a", "b"]);
        let record = see(2, &["b"]);
        assert!(record["devices"]["disk"]["a"].is_null(), "{record}");
        assert_eq!(record["devices"]["disk"]["b"]["pct"], "50");
        assert_eq!(see(3, &[])["node"]["disk"]["current"], "1");
    }

    #[test]
    fn what_accelerators_no_longer_tell_leaves_the_record() {
        let mut metrics = NodeMetrics::default();
        let mut at_ns = 0;
        let mut keys = |rows: Option<&[AcceleratorRow]>| {
            at_ns += 1;
            let reading = HostReading {
                at_ns,
                ..HostReading::default()
            };
            let record = metrics.observe(&reading, rows, PATIENCE);
            let record = serde_json::to_value(record).unwrap();
            ["node", "devices"].map(|part| {
                let list = record[part].as_object().unwrap().keys();
                list.map(|key| key.trim_start_matches("cuda_").to_owned())
                    .collect::<Vec<_>>()
            })
        };
        let all = ["mem", "util", "power", "temperature"];
        assert_eq!(keys(Some(&[gpu(0, 970, 60_000)])), [all, all]);
        assert_eq!(keys(None), [all, all], "the dataplane does not speak");
        // Its memory is all that the driver still tells.
        let counters = AcceleratorCounters {
            memory_total_bytes: Some(100),
            memory_used_bytes: Some(10),
            ..AcceleratorCounters::default()
        };
        assert_eq!(keys(Some(&[card(0, counters)])), [["mem"], ["mem"]]);
        assert!(keys(Some(&[])).iter().all(Vec::is_empty), "it is gone");
    }

    #[test]
    fn this_host_tells_its_cores_and_its_memory() {
        let reading = HostReading::of_this_host(1);
        assert!(reading.busy_ns.is_some() && !reading.cores_ns.is_empty());
        let memory = reading.memory.unwrap();
        assert!(memory.used > 0 && memory.used < memory.total);
    }

    /// The list of /proc/stat has no line for it then, and its time stays in the first line.
    #[test]
    fn a_core_that_goes_off_line_changes_no_other_ones_number() {
        let stat = |cores: &[(u32, u64)]| {
            let mut text = "cpu  6000 0 0 0 0 0 0 0\n".to_owned();
            for (core, user) in cores {
                text += &format!("cpu{core} {user} 0 0 0 0 0 0 0\n");
            }
            text + "intr 1\n"
        };
        let all = [(0, 1000), (1, 2000), (2, 3000)];
        assert_eq!(busy_ticks(&stat(&all)), (Some(6000), all.to_vec()));
        let fewer = [(0, 1000), (2, 3000)];
        assert_eq!(busy_ticks(&stat(&fewer)), (Some(6000), fewer.to_vec()));
    }
}
