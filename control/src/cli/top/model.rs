//! From looks at the regions to what the screen shows: rates, histories, order.
//!
//! Invariant: a rate is between two samples of the same container; the first look has none. A
//! history ends with its kernel.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use shared::desired::PortKey;
use shared::ids::ContainerId;
use shared::observed::{AcceleratorRow, ContainerSample, NodeCounters, NodeSample, PortState};

use crate::cli::region::RegionsSnapshot;
use crate::stats::kernels::{memory_capacity, memory_used};

/// Points of a history.
pub const HISTORY: usize = 120;

/// One kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelLine {
    /// Kernel id.
    pub kernel: String,
    /// Services.
    pub services: String,
    /// Cores in use, percent of one.
    pub cpu: Option<f64>,
    /// Memory used, bytes.
    pub memory: Option<u64>,
    /// Memory limit, bytes.
    pub limit: Option<u64>,
    /// Bytes per second: read, written, received, sent.
    pub rates: [Option<f64>; 4],
    /// Tasks.
    pub tasks: Option<u64>,
    /// `cpu` over time, the latest last.
    pub history: VecDeque<u64>,
}

/// One service port.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PortLine {
    /// Number.
    pub port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Service.
    pub service: String,
    /// Kernel id.
    pub kernel: String,
    /// State.
    pub state: String,
    /// How bytes get to the container.
    pub path: String,
    /// Sessions open.
    pub open: u64,
    /// Sessions ever accepted.
    pub total: u64,
    /// Bytes per second to and from the container.
    pub rates: [Option<f64>; 2],
    /// Why it does not serve.
    pub reason: String,
}

/// The node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeLine {
    /// Busy share of all cores, percent.
    pub cpu: Option<f64>,
    /// Memory used and in all.
    pub memory: Option<(u64, u64)>,
    /// Disk used and in all.
    pub disk: Option<(u64, u64)>,
    /// Bytes per second received and sent.
    pub network: [Option<f64>; 2],
    /// `cpu` over time.
    pub history: VecDeque<u64>,
    /// Bytes per second, both ways, over time.
    pub traffic: VecDeque<u64>,
    /// Time the last pass took.
    pub pass: Option<Duration>,
}

/// What was last known of a kernel.
#[derive(Clone, Debug, Default)]
struct KernelPast {
    sample: ContainerSample,
    history: VecDeque<u64>,
    cpu: Option<f64>,
    rates: [Option<f64>; 4],
}

/// What was last known of a port.
#[derive(Clone, Copy, Debug, Default)]
struct PortPast {
    bytes: [u64; 2],
    rates: [Option<f64>; 2],
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Kernels.
    pub kernels: Vec<KernelLine>,
    /// Ports.
    pub ports: Vec<PortLine>,
    /// Devices.
    pub devices: Vec<AcceleratorRow>,
    /// The node.
    pub node: NodeLine,
    /// Whether the dataplane runs.
    pub alive: bool,
    /// Age of the samples.
    pub age: Option<Duration>,
    samples: HashMap<ContainerId, KernelPast>,
    /// Counters of the pass before, and its moment.
    last_node: Option<(NodeCounters, u64)>,
    /// Of the pass at `ports_at`, ns of the monotonic clock.
    ports_before: HashMap<PortKey, PortPast>,
    ports_at: u64,
}

/// What a counter grew per second.
fn rate(before: Option<u64>, now: Option<u64>, elapsed_ns: u64) -> Option<f64> {
    let grown = now?.checked_sub(before?)?;
    (elapsed_ns > 0).then(|| as_f64(grown) * 1e9 / as_f64(elapsed_ns))
}

/// Counters are far below what a float holds exactly, or need not be exact on a screen.
#[allow(clippy::cast_precision_loss)]
fn as_f64(value: u64) -> f64 {
    value as f64
}

/// A point of a history: whole numbers, never negative.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn point(value: f64) -> u64 {
    value.max(0.0).round() as u64
}

fn push(history: &mut VecDeque<u64>, value: u64) {
    if history.len() == HISTORY {
        history.pop_front();
    }
    history.push_back(value);
}

impl Model {
    /// Takes in a look.
    pub fn observe(&mut self, look: &RegionsSnapshot) {
        self.alive = look.is_alive();
        self.age = look.sample_age();
        self.devices.clone_from(&look.observed.accelerators);
        self.observe_node(look.observed.node.as_ref());
        self.observe_ports(look);
        self.observe_kernels(look);
    }

    fn observe_node(&mut self, sample: Option<&NodeSample>) {
        let Some(sample) = sample else {
            return;
        };
        let now = sample.counters;
        let node = &mut self.node;
        let space = |total: Option<u64>, free: Option<u64>| {
            let total = total?;
            Some((total.saturating_sub(free?), total))
        };
        node.memory = space(now.memory_total_bytes, now.memory_available_bytes);
        node.disk = space(now.disk_total_bytes, now.disk_available_bytes);
        node.pass = now.pass_ns.map(Duration::from_nanos);
        let taken = sample.taken_monotonic_ns;
        if let Some((before, at)) = self.last_node
            && at != taken
        {
            let elapsed = taken.saturating_sub(at);
            let total = rate(before.cpu_total_ns, now.cpu_total_ns, elapsed);
            let idle = rate(before.cpu_idle_ns, now.cpu_idle_ns, elapsed);
            node.cpu = total
                .zip(idle)
                .filter(|(total, _)| *total > 0.0)
                .map(|(total, idle)| (100.0 * (total - idle) / total).clamp(0.0, 100.0));
            node.network = [
                rate(before.net_rx_bytes, now.net_rx_bytes, elapsed),
                rate(before.net_tx_bytes, now.net_tx_bytes, elapsed),
            ];
            push(&mut node.history, point(node.cpu.unwrap_or(0.0)));
            let traffic = node.network.iter().flatten().sum::<f64>();
            push(&mut node.traffic, point(traffic));
        }
        self.last_node = Some((now, taken));
    }

    fn observe_ports(&mut self, look: &RegionsSnapshot) {
        // Counters of ports are refreshed with each pass.
        let pass = look
            .observed
            .node
            .as_ref()
            .map_or(0, |node| node.taken_monotonic_ns);
        let elapsed = pass.saturating_sub(self.ports_at);
        let before = std::mem::take(&mut self.ports_before);
        self.ports_at = pass;
        self.ports.clear();
        let wanted = look.desired.iter().flat_map(|desired| &desired.ports);
        let services: HashMap<PortKey, &str> = wanted
            .filter(|row| !row.service.is_empty())
            .map(|row| (row.key(), row.service.as_str()))
            .collect();
        for status in look.observed.ports.iter() {
            if status.state == PortState::Removed {
                continue;
            }
            let bytes = [status.bytes_in, status.bytes_out];
            let rates = match before.get(&status.key) {
                Some(past) if elapsed == 0 => past.rates,
                Some(past) => {
                    [0, 1].map(|way| rate(Some(past.bytes[way]), Some(bytes[way]), elapsed))
                }
                None => [None; 2],
            };
            self.ports_before
                .insert(status.key, PortPast { bytes, rates });
            self.ports.push(PortLine {
                port: status.key.host_port,
                protocol: status.key.protocol.to_string(),
                service: services.get(&status.key).unwrap_or(&"-").to_string(),
                kernel: status.kernel_id.to_string(),
                state: status.state.to_string(),
                path: status.path.to_string(),
                open: status.sessions_active,
                total: status.sessions_total,
                rates,
                reason: status.reason.clone(),
            });
        }
    }

    fn observe_kernels(&mut self, look: &RegionsSnapshot) {
        let mut before = std::mem::take(&mut self.samples);
        self.kernels.clear();
        let named = self.ports.iter().filter(|port| port.service != "-");
        let mut services: HashMap<&str, Vec<&str>> = HashMap::new();
        for port in named {
            let of = services.entry(&port.kernel).or_default();
            if !of.contains(&port.service.as_str()) {
                of.push(&port.service);
            }
        }
        for sample in look.observed.containers.iter() {
            let mut past = before.remove(&sample.container_id).unwrap_or_default();
            // A new one has no sample before.
            if past.sample.taken_monotonic_ns > 0 {
                let elapsed = sample
                    .taken_monotonic_ns
                    .saturating_sub(past.sample.taken_monotonic_ns);
                if elapsed > 0 {
                    (past.cpu, past.rates) = between(&past.sample, sample, elapsed);
                    push(&mut past.history, point(past.cpu.unwrap_or(0.0)));
                }
            }
            past.sample = sample.clone();
            let kernel = sample.kernel_id.to_string();
            self.kernels.push(KernelLine {
                services: services
                    .get(kernel.as_str())
                    .map_or_else(String::new, |of| of.join(",")),
                kernel,
                cpu: past.cpu,
                memory: memory_used(sample),
                limit: memory_capacity(sample, self.node.memory.map(|(_, total)| total)),
                rates: past.rates,
                tasks: sample.pids.get().and_then(|pids| pids.current),
                history: past.history.clone(),
            });
            self.samples.insert(sample.container_id, past);
        }
    }
}

fn between(
    last: &ContainerSample,
    now: &ContainerSample,
    elapsed: u64,
) -> (Option<f64>, [Option<f64>; 4]) {
    let grown = |read: fn(&ContainerSample) -> Option<u64>| rate(read(last), read(now), elapsed);
    let cpu = grown(|sample| sample.cpu.get()?.usage_ns).map(|ns| ns / 1e7);
    let rates = [
        grown(|sample| sample.io.get()?.read_bytes),
        grown(|sample| sample.io.get()?.write_bytes),
        grown(|sample| sample.net.get()?.rx_bytes),
        grown(|sample| sample.net.get()?.tx_bytes),
    ];
    (cpu, rates)
}
