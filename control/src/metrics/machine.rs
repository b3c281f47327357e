//! Series of the node: devices, accelerators, service ports, the dataplane and the agent.

use rust_decimal::Decimal;
use shared::observed::{AcceleratorRow, ForwardPath, ObservedSnapshot, PortStatus};

use super::page::{Number, families, labels, seconds, thousandths};
use super::{Family, NodeSnapshot, Page};
use crate::accelerator::device::AcceleratorDevice;
use crate::stats::node::{HostReading, measurements};

families! {
    DEVICE = Gauge "backendai_device_utilization" ["device_metric_name agent_id device_id value_type"]
        "Measured value (value_type current) and capacity of a device of the node: counters as they are.";
    INFO = Gauge "bai_agent_info" ["agent_id version mode"] "Always 1; what runs here.";
    ENGINE = Gauge "bai_docker_up" [] "Whether the engine answered the last time it was asked.";
    KERNELS = Gauge "bai_kernels" [] "Kernels in any state.";
    SLOTS = Gauge "bai_slot_total" ["slot"] "Amount of a slot the node offers.";
    SLOTS_USED = Gauge "bai_slot_used" ["slot"] "Amount of a slot held by kernels.";
    HOST_PORTS = Gauge "bai_host_ports" ["state"]
        "Host ports of the pool: total, free, and cooling (used a moment ago).";
    UP = Gauge "bai_dataplane_up" [] "Whether the dataplane shows signs of life.";
    HEARTBEAT = Gauge "bai_dataplane_heartbeat_age_seconds" [] "Since the dataplane's last sign of life.";
    EPOCH = Gauge "bai_dataplane_epoch" [] "Life of the dataplane: one more with each start.";
    SAMPLE_AGE = Gauge "bai_sample_age_seconds" [] "Since the last pass over all containers.";
    INTERVAL = Gauge "bai_sample_interval_seconds" [] "Between two passes, as configured.";
    TICKS = Counter "bai_dataplane_ticks_total" [] "Passes over all containers.";
    PASS = Gauge "bai_dataplane_pass_seconds" [] "Time the last pass took.";
    PASS_CPU = Gauge "bai_dataplane_pass_cpu_seconds" [] "CPU time the last pass took.";
    LATE = Gauge "bai_dataplane_tick_late_seconds" [] "How long after its beat the last pass began.";
    MISSED = Counter "bai_dataplane_ticks_missed_total" [] "Beats that went by while a pass was under way.";
    SAMPLED = Gauge "bai_dataplane_containers" [] "Containers of the last pass.";
    PROCESSES = Gauge "bai_processes" ["state"]
        "Processes of all containers: listed, and left_out (beyond 256 of a container, without room, or of one that hangs).";
    DESCRIPTORS = Gauge "bai_dataplane_open_fds" [] "Descriptors the dataplane has open.";
    INVALID = Gauge "bai_observed_invalid_rows" [] "Rows of the observed region that make no sense.";
    RELAY_SESSIONS = Gauge "bai_relay_sessions" [] "Relay sessions open on all ports.";
    RELAY_TOTAL = Counter "bai_relay_sessions_total" [] "Relay sessions ever accepted.";
    SHED = Counter "bai_relay_shed_total" []
        "Connections closed for lack of descriptors or by the limit on all sessions.";
    PORT_STATE = Gauge "bai_port_serving" ["port protocol kernel_id service path"]
        "1: clients of the service port reach the container.";
    PORT_SESSIONS = Gauge "bai_port_sessions" ["port protocol kernel_id service"] "Sessions open.";
    PORT_TOTAL = Counter "bai_port_sessions_total" ["port protocol kernel_id service"] "Sessions ever accepted.";
    PORT_REFUSED = Counter "bai_port_sessions_refused_total" ["port protocol kernel_id service"]
        "Sessions refused by a limit or a network list.";
    PORT_IN = Counter "bai_port_receive_bytes_total" ["port protocol kernel_id service"]
        "Bytes from clients to the container.";
    PORT_OUT = Counter "bai_port_transmit_bytes_total" ["port protocol kernel_id service"]
        "Bytes from the container to clients.";
    PORT_PACKETS_IN = Counter "bai_port_receive_packets_total" ["port protocol kernel_id service"]
        "Packets from clients on the kernel path; missing where only the relay has served.";
    PORT_PACKETS_OUT = Counter "bai_port_transmit_packets_total" ["port protocol kernel_id service"]
        "Packets to clients on the kernel path; missing where only the relay has served.";
    PORT_FAILURES = Counter "bai_port_connect_failures_total" ["port protocol kernel_id service"]
        "Connections to the container that failed.";
    CPU = Counter "bai_node_cpu_seconds_total" ["state"] "CPU time of all cores: total and idle.";
    MEMORY = Gauge "bai_node_memory_bytes" ["state"] "Memory: total and available without swapping.";
    OOM = Counter "bai_node_oom_kills_total" [] "Processes killed for want of memory since boot; read every 5 s.";
    PRESSURE = Counter "bai_node_pressure_seconds_total" ["resource kind"]
        "Time in which some or all (kind full) tasks waited for a resource.";
    DISK = Gauge "bai_node_disk_bytes" ["device state"]
        "Space of each disk: total and used; without loop devices, whose files lie on another.";
    DISK_AGE = Gauge "bai_node_disk_age_seconds" []
        "How old the oldest numbers of disks were when the node's sample was taken.";
    NET_IN = Counter "bai_node_network_receive_bytes_total" [] "Bytes received on physical interfaces.";
    NET_OUT = Counter "bai_node_network_transmit_bytes_total" [] "Bytes sent on physical interfaces.";
    ACCELERATOR_LOAD = Gauge "bai_accelerator_utilization_ratio" ["kind index id model"]
        "Busy share of the last interval.";
    ACCELERATOR_BANDWIDTH = Gauge "bai_accelerator_memory_utilization_ratio" ["kind index id model"]
        "Share of the memory's bandwidth used in the last interval.";
    ACCELERATOR_ENCODER = Gauge "bai_accelerator_encoder_utilization_ratio" ["kind index id model"]
        "Busy share of the video encoder.";
    ACCELERATOR_DECODER = Gauge "bai_accelerator_decoder_utilization_ratio" ["kind index id model"]
        "Busy share of the video decoder.";
    ACCELERATOR_MEMORY = Gauge "bai_accelerator_memory_bytes" ["kind index id model"] "Memory.";
    ACCELERATOR_MEMORY_USED = Gauge "bai_accelerator_memory_used_bytes" ["kind index id model"] "Memory used.";
    ACCELERATOR_POWER = Gauge "bai_accelerator_power_watts" ["kind index id model"] "Power drawn.";
    ACCELERATOR_POWER_LIMIT = Gauge "bai_accelerator_power_limit_watts" ["kind index id model"] "Power it may draw.";
    ACCELERATOR_CLOCK = Gauge "bai_accelerator_clock_hertz" ["kind index id model"] "Clock of the processing units.";
    ACCELERATOR_MEMORY_CLOCK = Gauge "bai_accelerator_memory_clock_hertz" ["kind index id model"] "Clock of the memory.";
    ACCELERATOR_PCIE_IN = Gauge "bai_accelerator_pcie_receive_bytes_per_second" ["kind index id model"]
        "Received over PCIe.";
    ACCELERATOR_PCIE_OUT = Gauge "bai_accelerator_pcie_transmit_bytes_per_second" ["kind index id model"]
        "Sent over PCIe.";
    ACCELERATOR_CORRECTED = Counter "bai_accelerator_ecc_corrected_total" ["kind index id model"]
        "Memory errors corrected since the driver was loaded.";
    ACCELERATOR_UNCORRECTED = Counter "bai_accelerator_ecc_uncorrected_total" ["kind index id model"]
        "Memory errors not corrected since the driver was loaded.";
    ACCELERATOR_FAULT = Gauge "bai_accelerator_fault_code" ["kind index id model"]
        "Last fault the driver reported (NVIDIA: XID); missing when none.";
    ACCELERATOR_HEAT = Gauge "bai_accelerator_temperature_celsius" ["kind index id model"] "Temperature.";
    ACCELERATOR_ENERGY = Counter "bai_accelerator_energy_joules_total" ["kind index id model"]
        "Energy used since the driver was loaded.";
    ACCELERATOR_HEALTHY = Gauge "bai_accelerator_healthy" ["kind index id model"]
        "0: the driver reports a fault, hangs or does not start.";
    ACCELERATOR_AGE = Gauge "bai_accelerator_sample_age_seconds" ["kind index id model"]
        "How old the device's numbers were at the last pass.";
}

pub(super) fn render(node_snapshot: &NodeSnapshot, page: &mut Page) {
    let fresh = node_snapshot.fresh();
    let reading = node_snapshot.reading.clone().with_observed(fresh);
    devices(node_snapshot, fresh, &reading, page);
    agent(node_snapshot, page);
    dataplane(node_snapshot, node_snapshot.snapshot(), page);
    if let Some(fresh) = fresh {
        ports(node_snapshot, fresh, page);
    }
    node(fresh, &reading, page);
    if let Some(fresh) = fresh {
        accelerators(&fresh.accelerators, &node_snapshot.unheard, page);
    }
}

fn devices(
    node_snapshot: &NodeSnapshot,
    fresh: Option<&ObservedSnapshot>,
    reading: &HostReading,
    page: &mut Page,
) {
    let accelerators = fresh.map_or(&[][..], |snapshot| snapshot.accelerators.as_slice());
    // The time between samples is no capacity of a counter.
    for (_, list) in measurements(reading, Decimal::ZERO, accelerators) {
        for (id, measured) in list {
            let common = labels(&[
                ("device_metric_name", &measured.quantity.key),
                ("agent_id", &node_snapshot.agent_id),
                ("device_id", &id),
            ]);
            let capacity = measured.capacity.filter(|capacity| !capacity.is_zero());
            for (value, of) in [(Some(measured.value), "current"), (capacity, "capacity")] {
                page.measured(&DEVICE, &format!("{common},value_type=\"{of}\""), value);
            }
        }
    }
}

fn agent(node_snapshot: &NodeSnapshot, page: &mut Page) {
    let info = labels(&[
        ("agent_id", &node_snapshot.agent_id),
        ("version", env!("CARGO_PKG_VERSION")),
        ("mode", node_snapshot.mode),
    ]);
    page.sample(&INFO, &info, 1_u64);
    page.sample(&ENGINE, "", node_snapshot.engine.answers);
    page.sample(&KERNELS, "", count(node_snapshot.kernels));
    for (slot, total, _) in &node_snapshot.slots {
        page.sample(&SLOTS, &labels(&[("slot", slot)]), *total);
    }
    for (slot, _, used) in &node_snapshot.slots {
        page.sample(&SLOTS_USED, &labels(&[("slot", slot)]), *used);
    }
    if let Some(ports) = &node_snapshot.occupancy {
        for (state, value) in [
            ("total", ports.total),
            ("free", ports.free),
            ("cooling", ports.resting),
        ] {
            page.sample(&HOST_PORTS, &labels(&[("state", state)]), count(value));
        }
    }
}

fn count(value: impl TryInto<u64>) -> u64 {
    value.try_into().unwrap_or(u64::MAX)
}

fn dataplane(node_snapshot: &NodeSnapshot, snapshot: Option<&ObservedSnapshot>, page: &mut Page) {
    page.sample(&UP, "", node_snapshot.observed.is_alive());
    let age = node_snapshot
        .observed
        .heartbeat_age
        .map(|age| age.as_secs_f64());
    page.measured(&HEARTBEAT, "", age);
    page.sample(&EPOCH, "", node_snapshot.observed.epoch);
    page.measured(
        &SAMPLE_AGE,
        "",
        node_snapshot.sample_age().map(|age| age.as_secs_f64()),
    );
    page.sample(&INTERVAL, "", node_snapshot.interval.as_secs_f64());
    let Some(snapshot) = snapshot else {
        return;
    };
    // These are of the last pass, however long ago that is.
    if let Some(node) = &snapshot.node {
        page.sample(&TICKS, "", node.tick);
        page.measured(&PASS, "", node.counters.pass_ns.map(seconds));
        page.measured(&PASS_CPU, "", node.counters.pass_cpu_ns.map(seconds));
        page.measured(&LATE, "", node.counters.tick_late_ns.map(seconds));
        page.measured(&MISSED, "", node.counters.ticks_missed);
        page.measured(&SAMPLED, "", node.counters.containers_sampled);
    }
    let processes = node_snapshot.fresh().and_then(|fresh| fresh.processes);
    for (state, count) in [
        ("listed", processes.map(|counts| counts.listed)),
        ("left_out", processes.map(|counts| counts.left_out)),
    ] {
        page.measured(
            &PROCESSES,
            &labels(&[("state", state)]),
            count.map(u64::from),
        );
    }
    page.sample(&INVALID, "", u64::from(snapshot.invalid_rows));
    if let Some(node) = node_snapshot.fresh().and_then(|fresh| fresh.node.as_ref()) {
        page.measured(&DESCRIPTORS, "", node.counters.descriptors_open);
        page.measured(&RELAY_SESSIONS, "", node.counters.sessions_active);
        page.measured(&RELAY_TOTAL, "", node.counters.sessions_total);
        page.measured(&SHED, "", node.counters.accepts_shed);
    }
}

fn ports(node_snapshot: &NodeSnapshot, snapshot: &ObservedSnapshot, page: &mut Page) {
    let services: std::collections::HashMap<(shared::ids::KernelId, u16), &str> = node_snapshot
        .subjects
        .iter()
        .flat_map(|subject| {
            let id = subject.facts.id;
            let services = subject.services.iter();
            services.map(move |(port, name)| ((id, *port), name.as_str()))
        })
        .collect();
    let shown: Vec<(&PortStatus, String)> = snapshot
        .ports
        .iter()
        .filter(|status| status.state != shared::observed::PortState::Removed)
        .map(|status| {
            let port = status.key.host_port.to_string();
            let kernel = status.kernel_id.to_string();
            let protocol = status.key.protocol.to_string();
            let service = services.get(&(status.kernel_id, status.key.host_port));
            let labels = labels(&[
                ("port", &port),
                ("protocol", &protocol),
                ("kernel_id", &kernel),
                ("service", service.unwrap_or(&"")),
            ]);
            (status, labels)
        })
        .collect();
    for (status, labels) in &shown {
        let serving = status.state == shared::observed::PortState::Serving;
        let labels = format!("{labels},path=\"{}\"", status.path);
        page.sample(&PORT_STATE, &labels, serving);
    }
    type Read = fn(&PortStatus) -> u64;
    let series: [(&super::Family, Read); 6] = [
        (&PORT_SESSIONS, |status| status.sessions_active),
        (&PORT_TOTAL, |status| status.sessions_total),
        (&PORT_REFUSED, |status| status.sessions_refused),
        (&PORT_IN, |status| status.bytes_in),
        (&PORT_OUT, |status| status.bytes_out),
        (&PORT_FAILURES, |status| status.connect_failures),
    ];
    for (family, read) in series {
        for (status, labels) in &shown {
            page.sample(family, labels, read(status));
        }
    }
    // The relay sees bytes, not packets.
    let series: [(&super::Family, Read); 2] = [
        (&PORT_PACKETS_IN, |status| status.packets_in),
        (&PORT_PACKETS_OUT, |status| status.packets_out),
    ];
    for (family, read) in series {
        for (status, labels) in &shown {
            let seen = status.path == ForwardPath::KernelPath
                || status.packets_in > 0
                || status.packets_out > 0;
            page.measured(family, labels, seen.then(|| read(status)));
        }
    }
}

fn node(fresh: Option<&ObservedSnapshot>, reading: &HostReading, page: &mut Page) {
    let counters = fresh
        .and_then(|snapshot| snapshot.node.as_ref())
        .map(|node| node.counters)
        .unwrap_or_default();
    for (state, value) in [
        ("total", counters.cpu_total_ns),
        ("idle", counters.cpu_idle_ns),
    ] {
        page.measured(&CPU, &labels(&[("state", state)]), value.map(seconds));
    }
    for (state, value) in [
        ("total", counters.memory_total_bytes),
        ("available", counters.memory_available_bytes),
    ] {
        page.measured(&MEMORY, &labels(&[("state", state)]), value);
    }
    page.measured(&OOM, "", counters.oom_kill_events);
    for (resource, kind, value) in [
        ("cpu", "some", counters.cpu_pressure_some_ns),
        ("memory", "some", counters.memory_pressure_some_ns),
        ("memory", "full", counters.memory_pressure_full_ns),
        ("io", "some", counters.io_pressure_some_ns),
        ("io", "full", counters.io_pressure_full_ns),
    ] {
        let labels = labels(&[("resource", resource), ("kind", kind)]);
        page.measured(&PRESSURE, &labels, value.map(seconds));
    }
    let disks = reading.disks.iter();
    for (device, space) in disks.filter(|(device, _)| !is_loop(device)) {
        for (state, value) in [("total", space.total), ("used", space.used)] {
            let labels = labels(&[("device", device), ("state", state)]);
            page.sample(&DISK, &labels, value);
        }
    }
    page.measured(&DISK_AGE, "", counters.disks_age_ms.map(thousandths));
    page.measured(&NET_IN, "", counters.net_rx_bytes);
    page.measured(&NET_OUT, "", counters.net_tx_bytes);
}

/// Whether a disk is a file's: a scratch directory of type `hostfile`, a mounted image.
fn is_loop(device: &str) -> bool {
    device.starts_with("/dev/loop")
}

fn whole(value: Option<u64>) -> Option<Number> {
    value.map(Number::Whole)
}

fn hertz(megahertz: Option<u64>) -> Option<Number> {
    whole(megahertz.map(|value| value.saturating_mul(1_000_000)))
}

/// What is told of an accelerator as its driver measures it.
type Measured = (&'static Family, fn(&AcceleratorRow) -> Option<Number>);

const MEASURED: [Measured; 17] = [
    (&ACCELERATOR_LOAD, |row| {
        row.counters.utilisation_permille.map(thousandths)
    }),
    (&ACCELERATOR_BANDWIDTH, |row| {
        row.counters.memory_utilisation_permille.map(thousandths)
    }),
    (&ACCELERATOR_ENCODER, |row| {
        row.counters.encoder_permille.map(thousandths)
    }),
    (&ACCELERATOR_DECODER, |row| {
        row.counters.decoder_permille.map(thousandths)
    }),
    (&ACCELERATOR_MEMORY, |row| {
        whole(row.counters.memory_total_bytes)
    }),
    (&ACCELERATOR_MEMORY_USED, |row| {
        whole(row.counters.memory_used_bytes)
    }),
    (&ACCELERATOR_POWER, |row| {
        row.counters.power_mw.map(thousandths)
    }),
    (&ACCELERATOR_POWER_LIMIT, |row| {
        row.counters.power_limit_mw.map(thousandths)
    }),
    (&ACCELERATOR_CLOCK, |row| hertz(row.counters.clock_mhz)),
    (&ACCELERATOR_MEMORY_CLOCK, |row| {
        hertz(row.counters.memory_clock_mhz)
    }),
    (&ACCELERATOR_PCIE_IN, |row| {
        whole(row.counters.pcie_rx_bytes_per_s)
    }),
    (&ACCELERATOR_PCIE_OUT, |row| {
        whole(row.counters.pcie_tx_bytes_per_s)
    }),
    (&ACCELERATOR_CORRECTED, |row| {
        whole(row.counters.ecc_corrected)
    }),
    (&ACCELERATOR_UNCORRECTED, |row| {
        whole(row.counters.ecc_uncorrected)
    }),
    (&ACCELERATOR_FAULT, |row| {
        row.fault.map(|code| Number::Whole(code.into()))
    }),
    (&ACCELERATOR_HEAT, |row| {
        row.counters.temperature_mc.map(thousandths)
    }),
    (&ACCELERATOR_ENERGY, |row| {
        row.counters.energy_mj.map(thousandths)
    }),
];

fn accelerators(rows: &[AcceleratorRow], unheard: &[AcceleratorDevice], page: &mut Page) {
    let labelled: Vec<(&AcceleratorRow, String)> = rows
        .iter()
        .map(|row| {
            let labels = labels(&[
                ("kind", &row.key.kind.to_string()),
                ("index", &row.key.index.to_string()),
                ("id", &row.id),
                ("model", &row.model),
            ]);
            (row, labels)
        })
        .collect();
    for (family, read) in MEASURED {
        for (row, labels) in &labelled {
            page.measured(family, labels, read(row));
        }
    }
    for (row, labels) in &labelled {
        page.sample(&ACCELERATOR_HEALTHY, labels, row.healthy);
    }
    for device in unheard {
        let index = device.number.map(|number| number.to_string());
        let labels = labels(&[
            ("kind", &device.kind),
            ("index", &index.unwrap_or_default()),
            ("id", &device.id),
            ("model", &device.model),
        ]);
        page.sample(&ACCELERATOR_HEALTHY, &labels, 0_u64);
    }
    for (row, labels) in &labelled {
        page.measured(
            &ACCELERATOR_AGE,
            labels,
            Some(thousandths(row.age_ms.into())),
        );
    }
}
