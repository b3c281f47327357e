//! One sample as a map with plain values, one group per source, for the command line and its RPC.
//!
//! Invariants: what was not measured is not there; it is never shown as zero. A counter is named as in
//! the region (docs/shared-memory.md), with its unit at the end unless it is a plain count.

use serde_json::{Map, Value, json};
use shared::observed::{ContainerSample, Measured, NodeSample, UNLIMITED};

fn describe<T>(group: &mut Map<String, Value>, measured: &Measured<T>) {
    group.insert("source".to_owned(), json!(measured.source.name()));
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

/// Counters by their names.
pub fn counters(named: impl Iterator<Item = (&'static str, Option<u64>)>) -> Map<String, Value> {
    let mut map = Map::new();
    for (name, value) in named {
        put(&mut map, name, value);
    }
    map
}

/// One container's last sample.
pub fn container(sample: &ContainerSample) -> Value {
    let mut map = Map::new();
    macro_rules! group {
        ($($name:ident)*) => { $(
            if let Some(measured) = sample.$name.get() {
                let mut group = Map::new();
                describe(&mut group, &sample.$name);
                group.extend(counters(measured.named()));
                map.insert(stringify!($name).to_owned(), Value::Object(group));
            }
        )* };
    }
    group!(cpu memory pids io net disk);
    map.insert("tick".to_owned(), json!(sample.tick));
    map.insert("taken_at".to_owned(), json!(seconds(sample.taken_wall_ns)));
    Value::Object(map)
}

/// The node's last sample.
pub fn node(sample: &NodeSample) -> Value {
    let mut map = counters(sample.counters.named());
    map.insert("cores_busy_ns".to_owned(), json!(sample.cores_busy_ns));
    let disks = sample.disks.iter().map(|disk| {
        json!({
            "device": disk.device,
            "total_bytes": disk.total_bytes,
            "used_bytes": disk.used_bytes,
        })
    });
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
    use shared::observed::{CpuCounters, MemoryCounters, NodeCounters, Source};

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
                "memory": {"source": "file", "age_ms": 0, "current_bytes": 7},
                "tick": 3,
                "taken_at": 1.5,
            })
        );
    }

    /// The documents promise every counter, and a number alone does not tell what it is of.
    #[test]
    fn every_counter_is_there_and_says_its_unit() {
        // Numbers of things, and of happenings.
        const COUNTS: [&str; 10] = [
            "current", "limit", "periods", "found", "silent", "sampled", "open", "active", "total",
            "out",
        ];
        const HAPPENED: [&str; 8] = [
            "events",
            "operations",
            "packets",
            "errors",
            "drops",
            "files",
            "shed",
            "missed",
        ];
        const UNITS: [&str; 3] = ["ns", "ms", "bytes"];
        let mut sample = ContainerSample::default();
        let mut groups = 0;
        macro_rules! all {
            ($($name:ident)*) => { $(
                sample.$name.source = Source::File;
                groups += 1;
            )* };
        }
        all!(cpu memory pids io net disk);
        assert_eq!(container(&sample).as_object().unwrap().len(), groups + 2);
        let names = sample
            .cpu
            .counters
            .named()
            .chain(sample.memory.counters.named());
        let names = names.chain(sample.pids.counters.named());
        let names = names.chain(sample.io.counters.named());
        let names = names.chain(sample.net.counters.named());
        let names = names.chain(sample.disk.counters.named());
        let node_names: Vec<&str> = NodeCounters::default().named().map(|it| it.0).collect();
        for name in names
            .map(|(name, _)| name)
            .chain(node_names.iter().copied())
        {
            let last = name.rsplit('_').next().unwrap();
            let known = UNITS.contains(&last) || COUNTS.contains(&last) || HAPPENED.contains(&last);
            assert!(known, "{name} does not say what it is of");
        }
        let mut measured = NodeSample::default();
        measured.counters.cpu_pressure_some_ns = Some(5);
        measured.counters.disks_left_out = Some(0);
        let shown = node(&measured);
        assert_eq!(shown["cpu_pressure_some_ns"], 5);
        assert_eq!(shown["disks_left_out"], 0);
        assert!(shown.get("memory_total_bytes").is_none());
        assert!(node_names.contains(&"memory_total_bytes"));
    }
}
