//! Series of containers: the original's, and those every cAdvisor dashboard knows.

use std::collections::HashMap;

use shared::ids::ContainerId;
use shared::observed::{
    AcceleratorRow, AcceleratorUse, ContainerSample, ObservedSnapshot, UNLIMITED,
};

use super::page::{Family, Number, families, labels, seconds, thousandths};
use super::{NodeSnapshot, Page, Subject};
use crate::stats::kernels::{self, memory_used};

families! {
    UTILIZATION = Gauge "backendai_container_utilization"
        ["container_metric_name agent_id kernel_id session_id user_id project_id value_type"]
        "Measured value (value_type current) and capacity of a kernel, as the manager's queries expect them: counters as they are.";
    INFO = Gauge "bai_container_info" ["id name image kernel_id session_id"]
        "Always 1; the session of a container.";
    CPU_USAGE = Counter "container_cpu_usage_seconds_total" ["id name image kernel_id cpu"]
        "CPU time used.";
    CPU_USER = Counter "container_cpu_user_seconds_total" ["id name image kernel_id"]
        "CPU time used in user mode.";
    CPU_SYSTEM = Counter "container_cpu_system_seconds_total" ["id name image kernel_id"]
        "CPU time used in kernel mode.";
    CPU_PERIODS = Counter "container_cpu_cfs_periods_total" ["id name image kernel_id"]
        "Enforcement periods of the CPU quota.";
    CPU_THROTTLED_PERIODS = Counter "container_cpu_cfs_throttled_periods_total"
        ["id name image kernel_id"] "Periods in which the container was throttled.";
    CPU_THROTTLED = Counter "container_cpu_cfs_throttled_seconds_total" ["id name image kernel_id"]
        "Time the container was throttled.";
    MEMORY_USAGE = Gauge "container_memory_usage_bytes" ["id name image kernel_id"]
        "Memory charged, cache included.";
    MEMORY_WORKING = Gauge "container_memory_working_set_bytes" ["id name image kernel_id"]
        "Memory charged without inactive file cache.";
    MEMORY_RSS = Gauge "container_memory_rss" ["id name image kernel_id"]
        "Anonymous memory, bytes.";
    MEMORY_CACHE = Gauge "container_memory_cache" ["id name image kernel_id"]
        "File cache, bytes.";
    MEMORY_SWAP = Gauge "container_memory_swap" ["id name image kernel_id"]
        "Swap used, bytes.";
    MEMORY_PEAK = Gauge "container_memory_max_usage_bytes" ["id name image kernel_id"]
        "Most memory ever charged.";
    MEMORY_LIMIT_HITS = Counter "container_memory_failcnt" ["id name image kernel_id"]
        "Times the memory limit was hit.";
    MEMORY_KERNEL = Gauge "container_memory_kernel_usage" ["id name image kernel_id"]
        "Kernel memory, bytes.";
    MEMORY_LIMIT = Gauge "container_spec_memory_limit_bytes" ["id name image kernel_id"]
        "Memory limit; 0 is none.";
    OOM = Counter "container_oom_events_total" ["id name image kernel_id"]
        "Processes killed for want of memory.";
    TASKS = Gauge "container_threads" ["id name image kernel_id"]
        "Tasks.";
    TASKS_LIMIT = Gauge "container_threads_max" ["id name image kernel_id"]
        "Most tasks allowed; 0 is no limit.";
    READ_BYTES = Counter "container_fs_reads_bytes_total" ["id name image kernel_id"]
        "Bytes read from block devices.";
    READS = Counter "container_fs_reads_total" ["id name image kernel_id"]
        "Read operations on block devices.";
    WRITTEN_BYTES = Counter "container_fs_writes_bytes_total" ["id name image kernel_id"]
        "Bytes written to block devices.";
    WRITES = Counter "container_fs_writes_total" ["id name image kernel_id"]
        "Write operations on block devices.";
    SCRATCH = Gauge "container_fs_usage_bytes" ["id name image kernel_id"]
        "Bytes in the scratch directory.";
    SCRATCH_FILES = Gauge "container_fs_inodes_used" ["id name image kernel_id"]
        "Files in the scratch directory.";
    RECEIVED = Counter "container_network_receive_bytes_total" ["id name image kernel_id"]
        "Bytes received by the container on all its links.";
    RECEIVED_PACKETS = Counter "container_network_receive_packets_total" ["id name image kernel_id"]
        "Packets received by the container.";
    RECEIVE_DROPS = Counter "container_network_receive_packets_dropped_total"
        ["id name image kernel_id"] "Received packets dropped.";
    RECEIVE_ERRORS = Counter "container_network_receive_errors_total" ["id name image kernel_id"]
        "Receive errors.";
    SENT = Counter "container_network_transmit_bytes_total" ["id name image kernel_id"]
        "Bytes sent by the container on all its links.";
    SENT_PACKETS = Counter "container_network_transmit_packets_total" ["id name image kernel_id"]
        "Packets sent by the container.";
    SEND_DROPS = Counter "container_network_transmit_packets_dropped_total"
        ["id name image kernel_id"] "Packets to be sent dropped.";
    SEND_ERRORS = Counter "container_network_transmit_errors_total" ["id name image kernel_id"]
        "Send errors.";
    SCRATCH_LIMIT = Gauge "container_fs_limit_bytes" ["id name image kernel_id"]
        "Most the scratch directory may take.";
    SCRATCH_AGE = Gauge "bai_container_fs_age_seconds" ["id name image kernel_id"]
        "How old the numbers of the scratch directory were when the sample was taken.";
    SHM = Gauge "bai_container_shm_bytes" ["id name image kernel_id"] "Bytes in /dev/shm.";
    SHM_LIMIT = Gauge "bai_container_shm_limit_bytes" ["id name image kernel_id"] "Size of /dev/shm.";
    SHM_AGE = Gauge "bai_container_shm_age_seconds" ["id name image kernel_id"]
        "How old the numbers of /dev/shm were when the sample was taken.";
    CPU_PRESSURE = Counter "container_pressure_cpu_waiting_seconds_total" ["id name image kernel_id"]
        "Time in which some task waited for a CPU.";
    MEMORY_PRESSURE = Counter "container_pressure_memory_waiting_seconds_total" ["id name image kernel_id"]
        "Time in which some task waited for memory.";
    MEMORY_STALLED = Counter "container_pressure_memory_stalled_seconds_total" ["id name image kernel_id"]
        "Time in which all tasks waited for memory.";
    IO_PRESSURE = Counter "container_pressure_io_waiting_seconds_total" ["id name image kernel_id"]
        "Time in which some task waited for a block device.";
    IO_STALLED = Counter "container_pressure_io_stalled_seconds_total" ["id name image kernel_id"]
        "Time in which all tasks waited for a block device.";
    TASKS_REFUSED = Counter "bai_container_tasks_refused_total" ["id name image kernel_id"]
        "Times the limit refused a task.";
    ACCELERATOR_MEMORY = Gauge "bai_container_accelerator_memory_used_bytes"
        ["id name image kernel_id kind device_id"]
        "Memory of a device that the container's own processes use; missing where the driver does not tell.";
    ACCELERATOR_LOAD = Gauge "bai_container_accelerator_utilization_ratio"
        ["id name image kernel_id kind device_id"]
        "Busy share of a device by the container's own processes; missing where the driver does not tell.";
    ACCELERATOR_ENCODER = Gauge "bai_container_accelerator_encoder_utilization_ratio"
        ["id name image kernel_id kind device_id"]
        "Share of a device's encoders that the container's own processes use; missing where the driver does not tell.";
    ACCELERATOR_DECODER = Gauge "bai_container_accelerator_decoder_utilization_ratio"
        ["id name image kernel_id kind device_id"]
        "Share of a device's decoders that the container's own processes use; missing where the driver does not tell.";
    START = Gauge "container_start_time_seconds" ["id name image kernel_id"]
        "When the kernel was accepted, seconds since 1970.";
    SEEN = Gauge "container_last_seen" ["id name image kernel_id"]
        "When the sample was taken, seconds since 1970.";
}

/// A limit in cAdvisor's words.
fn limit(value: Option<u64>) -> Option<u64> {
    value.map(|limit| if limit == UNLIMITED { 0 } else { limit })
}

struct Shown<'s> {
    sample: &'s ContainerSample,
    subject: &'s Subject,
    labels: String,
}

pub(super) fn render(node_snapshot: &NodeSnapshot, page: &mut Page) {
    let Some(snapshot) = node_snapshot.snapshot() else {
        return;
    };
    let shown: Vec<Shown<'_>> = node_snapshot
        .subjects
        .iter()
        .filter_map(|subject| {
            let sample = snapshot.container(subject.facts.container)?;
            let id = format!("/docker/{}", subject.facts.container);
            let kernel = subject.facts.id.to_string();
            let labels = labels(&[
                ("id", &id),
                ("name", &subject.name),
                ("image", &subject.image),
                ("kernel_id", &kernel),
            ]);
            Some(Shown {
                sample,
                subject,
                labels,
            })
        })
        .collect();
    let fresh: Vec<&Shown<'_>> = shown
        .iter()
        .filter(|container| node_snapshot.is_fresh(container.sample))
        .collect();
    utilization(node_snapshot, snapshot, &fresh, page);
    known_series(&shown, &fresh, page);
    let rows = node_snapshot
        .fresh()
        .map(|snapshot| &snapshot.accelerators[..]);
    accelerators(rows.unwrap_or_default(), &fresh, page);
}

/// What each container's own processes use of each device.
fn accelerators(rows: &[AcceleratorRow], shown: &[&Shown<'_>], page: &mut Page) {
    if rows.iter().all(|row| row.users.is_empty()) {
        return;
    }
    let containers: HashMap<ContainerId, &str> = shown
        .iter()
        .map(|container| (container.sample.container_id, container.labels.as_str()))
        .collect();
    let mut each = |family, read: &dyn Fn(&AcceleratorUse) -> Option<Number>| {
        for row in rows {
            let kind = row.key.kind.to_string();
            let device = labels(&[("kind", &kind), ("device_id", &row.id)]);
            for user in &row.users {
                if let Some(container) = containers.get(&user.container_id) {
                    page.measured(family, &format!("{container},{device}"), read(user));
                }
            }
        }
    };
    each(&ACCELERATOR_MEMORY, &|user| {
        user.memory_bytes.map(Number::Whole)
    });
    let share = |permille: u32| thousandths(permille.into());
    each(&ACCELERATOR_LOAD, &|user| {
        user.utilisation_permille.map(share)
    });
    each(&ACCELERATOR_ENCODER, &|user| {
        user.encoder_permille.map(share)
    });
    each(&ACCELERATOR_DECODER, &|user| {
        user.decoder_permille.map(share)
    });
}

/// The original's family: measured values as they are, so that the manager's rates work.
fn utilization(
    node_snapshot: &NodeSnapshot,
    snapshot: &ObservedSnapshot,
    shown: &[&Shown<'_>],
    page: &mut Page,
) {
    for Shown {
        sample, subject, ..
    } in shown
    {
        let undefined =
            |text: &Option<String>| text.clone().unwrap_or_else(|| "undefined".to_owned());
        let (user, project) = (undefined(&subject.user), undefined(&subject.project));
        let kernel = subject.facts.id.to_string();
        let common = labels(&[
            ("agent_id", &node_snapshot.agent_id),
            ("kernel_id", &kernel),
            ("session_id", &subject.session),
            ("user_id", &user),
            ("project_id", &project),
        ]);
        for measured in kernels::measurements(sample, &subject.facts, snapshot) {
            let name = labels(&[("container_metric_name", &measured.quantity.key)]);
            for (value, of) in [
                (Some(measured.value), "current"),
                (measured.capacity, "capacity"),
            ] {
                page.measured(
                    &UTILIZATION,
                    &format!("{name},{common},value_type=\"{of}\""),
                    value,
                );
            }
        }
    }
}

type Read = fn(&ContainerSample) -> Option<Number>;

macro_rules! read {
    ($group:ident.$field:ident) => {
        |sample| sample.$group.get()?.$field.map(Number::Whole)
    };
    ($group:ident.$field:ident seconds) => {
        |sample| sample.$group.get()?.$field.map(seconds)
    };
    ($group:ident.$field:ident limit) => {
        |sample| limit(sample.$group.get()?.$field).map(Number::Whole)
    };
}

const SERIES: &[(&Family, Read)] = &[
    (&CPU_USER, read!(cpu.user_ns seconds)),
    (&CPU_SYSTEM, read!(cpu.system_ns seconds)),
    (&CPU_PERIODS, read!(cpu.periods)),
    (&CPU_THROTTLED_PERIODS, read!(cpu.throttled_periods)),
    (&CPU_THROTTLED, read!(cpu.throttled_ns seconds)),
    (&MEMORY_USAGE, read!(memory.current_bytes)),
    (&MEMORY_WORKING, |sample| {
        memory_used(sample).map(Number::Whole)
    }),
    (&MEMORY_RSS, read!(memory.anon_bytes)),
    (&MEMORY_CACHE, read!(memory.file_bytes)),
    (&MEMORY_SWAP, read!(memory.swap_bytes)),
    (&MEMORY_PEAK, read!(memory.peak_bytes)),
    (&MEMORY_LIMIT_HITS, read!(memory.max_events)),
    (&MEMORY_KERNEL, read!(memory.kernel_bytes)),
    (&MEMORY_LIMIT, read!(memory.limit_bytes limit)),
    (&OOM, read!(memory.oom_kill_events)),
    (&TASKS, read!(pids.current)),
    (&TASKS_LIMIT, read!(pids.limit limit)),
    (&READ_BYTES, read!(io.read_bytes)),
    (&READS, read!(io.read_operations)),
    (&WRITTEN_BYTES, read!(io.write_bytes)),
    (&WRITES, read!(io.write_operations)),
    (&SCRATCH, read!(disk.scratch_bytes)),
    (&SCRATCH_FILES, read!(disk.scratch_files)),
    (&SCRATCH_LIMIT, read!(disk.scratch_limit_bytes)),
    (&SCRATCH_AGE, |sample| {
        sample.disk.get()?.scratch_bytes?;
        Some(thousandths(sample.disk.age_ms.into()))
    }),
    (&SHM, read!(disk.shm_bytes)),
    (&SHM_LIMIT, read!(disk.shm_limit_bytes)),
    (&SHM_AGE, |sample| {
        sample.disk.get()?.shm_age_ms.map(thousandths)
    }),
    (&CPU_PRESSURE, read!(cpu.pressure_some_ns seconds)),
    (&MEMORY_PRESSURE, read!(memory.pressure_some_ns seconds)),
    (&MEMORY_STALLED, read!(memory.pressure_full_ns seconds)),
    (&IO_PRESSURE, read!(io.pressure_some_ns seconds)),
    (&IO_STALLED, read!(io.pressure_full_ns seconds)),
    (&TASKS_REFUSED, read!(pids.limit_events)),
    (&RECEIVED, read!(net.rx_bytes)),
    (&RECEIVED_PACKETS, read!(net.rx_packets)),
    (&RECEIVE_DROPS, read!(net.rx_drops)),
    (&RECEIVE_ERRORS, read!(net.rx_errors)),
    (&SENT, read!(net.tx_bytes)),
    (&SENT_PACKETS, read!(net.tx_packets)),
    (&SEND_DROPS, read!(net.tx_drops)),
    (&SEND_ERRORS, read!(net.tx_errors)),
];

/// Of a sample that is too old only its moment is told, and what no sample says.
fn known_series(shown: &[Shown<'_>], fresh: &[&Shown<'_>], page: &mut Page) {
    for container in shown {
        let session = labels(&[("session_id", &container.subject.session)]);
        page.sample(&INFO, &format!("{},{session}", container.labels), 1_u64);
    }
    for container in fresh {
        // The label that tells the sum from single cores there.
        let with_cpu = format!("{},cpu=\"total\"", container.labels);
        let used = container.sample.cpu.get().and_then(|cpu| cpu.usage_ns);
        page.measured(&CPU_USAGE, &with_cpu, used.map(seconds));
    }
    for (family, read) in SERIES {
        for container in fresh {
            page.measured(family, &container.labels, read(container.sample));
        }
    }
    for container in shown {
        page.sample(&START, &container.labels, container.subject.created_at);
    }
    for container in shown {
        page.sample(
            &SEEN,
            &container.labels,
            seconds(container.sample.taken_wall_ns),
        );
    }
}
