//! What the agent's own extension methods answer, and how it is shown.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cli::output::{self, Table};

#[derive(Debug, Deserialize)]
pub(super) struct KernelsReply {
    pub kernels: Vec<KernelRecord>,
}

/// A kernel as `bai.kernels` tells it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KernelRecord {
    pub kernel_id: String,
    pub session_id: String,
    pub container_id: Option<String>,
    pub image: String,
    pub state: String,
    pub reason: Option<String>,
    pub exit_code: Option<i64>,
    /// Seconds since 1970.
    pub created_at: Option<f64>,
    #[serde(default)]
    pub service_ports: Vec<ServicePortRecord>,
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

impl KernelRecord {
    pub(super) fn age(&self) -> String {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64());
        self.created_at.map_or_else(
            || "-".to_owned(),
            |created| output::duration((now - created).max(0.0)),
        )
    }
}

/// A service and its ports.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ServicePortRecord {
    pub name: String,
    pub protocol: String,
    pub container_ports: Vec<u16>,
    pub host_ports: Vec<u16>,
}

impl ServicePortRecord {
    pub(super) fn summary(&self) -> String {
        let ports: Vec<String> = self.host_ports.iter().map(u16::to_string).collect();
        format!("{}:{}", self.name, ports.join("+"))
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct LogsReply {
    pub logs: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct ServiceReply {
    pub status: String,
    pub error: Option<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct EventsReply {
    pub events: Vec<EventRecord>,
    pub next: u64,
}

/// A lifecycle event of the agent's own stream.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct EventRecord {
    pub name: String,
    /// Positional, the kernel's id first in events of kernels.
    #[serde(default)]
    pub args: Vec<Value>,
}

/// `bai.image`.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct ImageReply {
    pub canonical: String,
    pub digest: String,
    pub architecture: String,
    #[serde(default)]
    pub labels: serde_json::Map<String, Value>,
}

fn number(value: &Value, path: &[&str]) -> Option<u64> {
    let mut value = value;
    for step in path {
        value = value.get(step)?;
    }
    value.as_u64()
}

/// The statistics as a table: what a source did not give is shown as `-`, never as zero.
pub(super) fn stats_table(reply: &Value) -> String {
    let mut table = Table::new(&[
        "KERNEL",
        ">CPU TIME",
        ">MEMORY",
        ">LIMIT",
        ">PIDS",
        ">READ",
        ">WRITTEN",
        ">NET IN",
        ">NET OUT",
    ]);
    let bytes = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), output::bytes);
    for (id, sample) in reply
        .get("kernels")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a duration to be read by a person"
        )]
        let cpu = number(sample, &["cpu", "usage_ns"])
            .map_or_else(|| "-".to_owned(), |ns| output::duration(ns as f64 / 1e9));
        table.row([
            id.clone(),
            cpu,
            bytes(number(sample, &["memory", "current"])),
            bytes(number(sample, &["memory", "limit"])),
            number(sample, &["pids", "current"])
                .map_or_else(|| "-".to_owned(), |pids| pids.to_string()),
            bytes(number(sample, &["io", "read_bytes"])),
            bytes(number(sample, &["io", "write_bytes"])),
            bytes(number(sample, &["net", "rx_bytes"])),
            bytes(number(sample, &["net", "tx_bytes"])),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_group_is_not_a_zero() {
        let reply = serde_json::json!({"kernels": {"k": {"cpu": {"usage_ns": 1_500_000_000u64}, "memory": {"current": 1048576, "limit": 2097152}}}});
        let text = stats_table(&reply);
        let row: Vec<&str> = text
            .lines()
            .nth(1)
            .unwrap()
            .split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .collect();
        assert_eq!(
            row,
            [
                "k", "1.5 s", "1.00 MiB", "2.00 MiB", "-", "-", "-", "-", "-"
            ]
        );
    }
}
