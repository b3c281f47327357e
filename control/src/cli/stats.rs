//! `bai-agent stats`: the last samples, straight from the region.

use config::Config;
use serde_json::{Map, Value, json};
use shared::observed::{AcceleratorRow, ContainerSample};

use super::exit::Problem;
use super::output::{self, Form, Table, say, say_part};
use super::region::{Regions, RegionsSnapshot};
use crate::stats;

/// Shows the last samples of the node, its kernels and its devices.
pub fn run(config: &Config, form: Form) -> Result<(), Problem> {
    let look = Regions::of(config)?.look()?;
    match form {
        Form::Json => output::json(&document(&look))?,
        Form::Text => table(&look),
    }
    Ok(())
}

fn document(look: &RegionsSnapshot) -> Value {
    let mut kernels = Map::new();
    for sample in look.observed.containers.iter() {
        let mut map = stats::container(sample);
        if let Some(map) = map.as_object_mut() {
            map.insert(
                "container_id".to_owned(),
                json!(sample.container_id.to_string()),
            );
        }
        kernels.insert(sample.kernel_id.to_string(), map);
    }
    let node = look.observed.node.as_ref();
    json!({
        "dataplane": {
            "alive": look.is_alive(),
            "heartbeat_age_s": look.heartbeat_age.map(|age| age.as_secs_f64()),
            "sample_age_s": look.sample_age().map(|age| age.as_secs_f64()),
            "epoch": look.observed.epoch,
        },
        "node": node.map_or_else(|| json!({}), stats::node_map),
        "processes": look.observed.processes.map(|counts| json!({
            "listed": counts.listed,
            "left_out": counts.left_out,
        })),
        "kernels": kernels,
        "devices": look.observed.accelerators.iter().map(device).collect::<Vec<_>>(),
        "ports": look.observed.ports.iter().map(|status| json!({
            "host_port": status.key.host_port,
            "protocol": status.key.protocol.to_string(),
            "kernel_id": status.kernel_id.to_string(),
            "service": look.service(status.key),
            "state": status.state.to_string(),
            "path": status.path.to_string(),
            "sessions_active": status.sessions_active,
            "sessions_total": status.sessions_total,
            "sessions_refused": status.sessions_refused,
            "bytes_in": status.bytes_in,
            "bytes_out": status.bytes_out,
            "packets_in": status.packets_in,
            "packets_out": status.packets_out,
            "connect_failures": status.connect_failures,
        })).collect::<Vec<_>>(),
    })
}

fn device(row: &AcceleratorRow) -> Value {
    let mut map = stats::counters(row.counters.named());
    for (key, value) in [
        ("kind", json!(row.key.kind.to_string())),
        ("index", json!(row.key.index)),
        ("id", json!(row.id)),
        ("model", json!(row.model)),
        ("healthy", json!(row.healthy)),
        ("fault", json!(row.fault)),
        ("age_ms", json!(row.age_ms)),
    ] {
        map.insert(key.to_owned(), value);
    }
    Value::Object(map)
}

fn bytes(value: Option<u64>) -> String {
    value.map_or_else(|| "-".to_owned(), output::bytes)
}

fn table(look: &RegionsSnapshot) {
    let mut table = Table::new(&[
        "KERNEL",
        ">CPU TIME",
        ">MEMORY",
        ">LIMIT",
        ">READ",
        ">WRITTEN",
        ">RECEIVED",
        ">SENT",
        ">TASKS",
    ]);
    for sample in look.observed.containers.iter() {
        table.row(row(sample));
    }
    say_part!("{}", table.render());
    if look.observed.containers.is_empty() {
        say!("no kernel is measured");
    }
    if let Some(hint) = hint(look) {
        say!("{hint}");
    }
    if !look.is_alive() {
        say!("bai-dataplane does not run: these are its last words");
    }
}

/// What the records of processes lack.
fn hint(look: &RegionsSnapshot) -> Option<String> {
    let counts = look.observed.processes?;
    let all = u64::from(counts.listed) + u64::from(counts.left_out);
    (counts.left_out > 0).then(|| {
        format!(
            "{} of {all} processes have no numbers of their own: 256 of a kernel have, and as many in \
             all as node.max-containers makes room for",
            counts.left_out
        )
    })
}

fn row(sample: &ContainerSample) -> [String; 9] {
    let limit = stats::kernels::memory_capacity(sample, None);
    let (io, net) = (sample.io.get(), sample.net.get());
    let used = sample.cpu.get().and_then(|cpu| cpu.usage_ns);
    [
        sample.kernel_id.to_string(),
        used.map_or_else(
            || "-".to_owned(),
            |ns| output::duration(std::time::Duration::from_nanos(ns).as_secs_f64()),
        ),
        bytes(stats::kernels::memory_used(sample)),
        bytes(limit),
        bytes(io.and_then(|io| io.read_bytes)),
        bytes(io.and_then(|io| io.write_bytes)),
        bytes(net.and_then(|net| net.rx_bytes)),
        bytes(net.and_then(|net| net.tx_bytes)),
        sample
            .pids
            .get()
            .and_then(|pids| pids.current)
            .map_or_else(|| "-".to_owned(), |tasks| tasks.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use shared::observed::{ObservedSnapshot, ProcessCounts};

    #[test]
    fn processes_that_are_left_out_are_told() {
        let look = |listed, left_out| RegionsSnapshot {
            observed: Arc::new(ObservedSnapshot {
                processes: Some(ProcessCounts { listed, left_out }),
                ..ObservedSnapshot::default()
            }),
            ..RegionsSnapshot::default()
        };
        let short = look(256, 44);
        assert!(hint(&short).unwrap().starts_with("44 of 300 processes"));
        assert_eq!(document(&short)["processes"]["left_out"], 44);
        assert_eq!(hint(&look(256, 0)), None);
        assert_eq!(hint(&RegionsSnapshot::default()), None);
        assert!(document(&RegionsSnapshot::default())["processes"].is_null());
    }
}
