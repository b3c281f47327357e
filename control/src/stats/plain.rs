//! One sample as a map with plain values, one group per source, for the command line and its RPC.
//!
//! Invariant: what was not measured is not there; it is never shown as zero.

use serde_json::{Map, Value, json};
use shared::observed::{ContainerSample, Measured, NodeSample, Source, UNLIMITED};

macro_rules! group {
    ($map:ident, $name:literal, $measured:expr, { $($key:literal = $field:ident),* $(,)? }) => {
        if let Some(counters) = $measured.get() {
            let mut group = Map::new();
            describe(&mut group, &$measured);
            $( put(&mut group, $key, counters.$field); )*
            $map.insert($name.to_owned(), Value::Object(group));
        }
    };
}

fn describe<T>(group: &mut Map<String, Value>, measured: &Measured<T>) {
    let source = match measured.source {
        Source::Absent => "absent",
        Source::File => "file",
        Source::Bpf => "bpf",
        Source::Netlink => "netlink",
        Source::Engine => "engine",
        Source::Walk => "walk",
    };
    group.insert("source".to_owned(), json!(source));
    group.insert("age_ms".to_owned(), json!(measured.age_ms));
}

fn put(group: &mut Map<String, Value>, key: &str, value: Option<u64>) {
    match value {
        // No limit is said by leaving the limit out.
        None | Some(UNLIMITED) => {}
        Some(value) => {
            group.insert(key.to_owned(), json!(value));
        }
    }
}

/// One container's last sample.
pub fn container(sample: &ContainerSample) -> Value {
    let mut map = Map::new();
    group!(map, "cpu", sample.cpu, {
        "usage_ns" = usage_ns, "user_ns" = user_ns, "system_ns" = system_ns,
        "periods" = periods, "throttled_periods" = throttled_periods, "throttled_ns" = throttled_ns,
        "pressure_some_ns" = pressure_some_ns,
    });
    group!(map, "memory", sample.memory, {
        "current" = current_bytes, "limit" = limit_bytes, "inactive_file" = inactive_file_bytes,
        "anon" = anon_bytes, "file" = file_bytes, "shmem" = shmem_bytes, "swap" = swap_bytes,
        "peak" = peak_bytes, "oom" = oom_events, "oom_kill" = oom_kill_events, "max" = max_events,
        "kernel" = kernel_bytes, "swap_limit" = swap_limit_bytes,
        "pressure_some_ns" = pressure_some_ns, "pressure_full_ns" = pressure_full_ns,
    });
    group!(map, "pids", sample.pids, {
        "current" = current, "limit" = limit, "refused" = limit_events,
    });
    group!(map, "io", sample.io, {
        "read_bytes" = read_bytes, "write_bytes" = write_bytes,
        "read_operations" = read_operations, "write_operations" = write_operations,
        "pressure_some_ns" = pressure_some_ns, "pressure_full_ns" = pressure_full_ns,
    });
    group!(map, "net", sample.net, {
        "rx_bytes" = rx_bytes, "rx_packets" = rx_packets, "rx_errors" = rx_errors, "rx_drops" = rx_drops,
        "tx_bytes" = tx_bytes, "tx_packets" = tx_packets, "tx_errors" = tx_errors, "tx_drops" = tx_drops,
    });
    group!(map, "disk", sample.disk, {
        "scratch_bytes" = scratch_bytes, "scratch_files" = scratch_files,
        "scratch_limit" = scratch_limit_bytes, "shm_bytes" = shm_bytes, "shm_limit" = shm_limit_bytes,
        "shm_age_ms" = shm_age_ms,
    });
    map.insert("tick".to_owned(), json!(sample.tick));
    map.insert("taken_at".to_owned(), json!(seconds(sample.taken_wall_ns)));
    Value::Object(map)
}

/// The node's last sample.
pub fn node(sample: &NodeSample) -> Value {
    let counters = &sample.counters;
    let mut map = Map::new();
    for (key, value) in [
        ("cpu_total_ns", counters.cpu_total_ns),
        ("cpu_idle_ns", counters.cpu_idle_ns),
        ("memory_total", counters.memory_total_bytes),
        ("memory_available", counters.memory_available_bytes),
        ("disk_total", counters.disk_total_bytes),
        ("disk_available", counters.disk_available_bytes),
        ("net_rx_bytes", counters.net_rx_bytes),
        ("net_tx_bytes", counters.net_tx_bytes),
        ("sessions_active", counters.sessions_active),
        ("sessions_total", counters.sessions_total),
        ("accepts_shed", counters.accepts_shed),
        ("containers_sampled", counters.containers_sampled),
        ("disks_total", counters.disks_total_bytes),
        ("disks_used", counters.disks_used_bytes),
        ("disks_age_ms", counters.disks_age_ms),
        ("oom_kills", counters.oom_kill_events),
        ("pass_ns", counters.pass_ns),
        ("pass_cpu_ns", counters.pass_cpu_ns),
        ("tick_late_ns", counters.tick_late_ns),
        ("ticks_missed", counters.ticks_missed),
        ("descriptors_open", counters.descriptors_open),
    ] {
        put(&mut map, key, value);
    }
    let disks = sample.disks.iter().map(
        |disk| json!({"device": disk.device, "total": disk.total_bytes, "used": disk.used_bytes}),
    );
    map.insert("disks".to_owned(), disks.collect());
    map.insert("tick".to_owned(), json!(sample.tick));
    map.insert("taken_at".to_owned(), json!(seconds(sample.taken_wall_ns)));
    Value::Object(map)
}

fn seconds(wall_ns: u64) -> f64 {
    std::time::Duration::from_nanos(wall_ns).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::ids::{ContainerId, KernelId};
    use shared::observed::{CpuCounters, MemoryCounters};

    #[test]
    fn what_was_not_measured_is_not_there() {
        let mut sample = ContainerSample {
            container_id: ContainerId([1; 32]),
            kernel_id: KernelId([2; 16]),
            tick: 3,
            taken_monotonic_ns: 1,
            taken_wall_ns: 1_500_000_000,
            ..ContainerSample::default()
        };
        sample.cpu = Measured::now(
            Source::File,
            CpuCounters {
                usage_ns: Some(0),
                ..CpuCounters::default()
            },
        );
        sample.memory = Measured::now(
            Source::File,
            MemoryCounters {
                current_bytes: Some(7),
                limit_bytes: Some(UNLIMITED),
                ..MemoryCounters::default()
            },
        );
        assert_eq!(
            container(&sample),
            json!({
                "cpu": {"source": "file", "age_ms": 0, "usage_ns": 0},
                "memory": {"source": "file", "age_ms": 0, "current": 7},
                "tick": 3,
                "taken_at": 1.5,
            })
        );
    }
}
