//! What the agent's own extension methods answer, and how it is shown.

use std::net::IpAddr;
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
    /// Where its ports are served; unspecified is every address of the node.
    #[serde(default)]
    pub bind_host: Option<IpAddr>,
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

/// `bai.folders`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FoldersReply {
    pub folders: Vec<FolderRecord>,
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

/// A folder mounted in a kernel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct FolderRecord {
    pub kernel_id: String,
    pub name: String,
    pub target: String,
    pub volume: Option<String>,
    pub used_bytes: Option<u64>,
    pub files: Option<u64>,
    pub age_s: Option<f64>,
    pub error: Option<String>,
    pub quota: QuotaRecord,
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

/// What its owner may store.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct QuotaRecord {
    pub used_bytes: Option<u64>,
    pub limit_bytes: Option<u64>,
    #[serde(flatten)]
    pub more: serde_json::Map<String, Value>,
}

/// The folders as a table, and the volumes that are not well below it.
pub(super) fn folders_table(reply: &FoldersReply) -> String {
    let mut table = Table::new(&[
        "KERNEL", "FOLDER", "AT", "VOLUME", ">USED", ">FILES", ">QUOTA", ">AGE", "WHY",
    ]);
    let bytes = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), output::bytes);
    for folder in &reply.folders {
        let quota = match (folder.quota.used_bytes, folder.quota.limit_bytes) {
            (None, None) => "-".to_owned(),
            (used, limit) => format!("{} of {}", bytes(used), bytes(limit)),
        };
        table.row([
            folder.kernel_id.clone(),
            folder.name.clone(),
            folder.target.clone(),
            folder.volume.clone().unwrap_or_else(|| "-".to_owned()),
            bytes(folder.used_bytes),
            folder
                .files
                .map_or_else(|| "-".to_owned(), |files| files.to_string()),
            quota,
            folder
                .age_s
                .map_or_else(|| "-".to_owned(), output::duration),
            folder.error.clone().unwrap_or_default(),
        ]);
    }
    let mut text = table.render();
    let volumes = reply.more.get("volumes").and_then(Value::as_array);
    for volume in volumes.into_iter().flatten() {
        let word = |name: &str| volume.get(name).and_then(Value::as_str);
        let (Some(name), Some(health)) = (word("name"), word("health")) else {
            continue;
        };
        if health != "healthy" {
            let words = word("words").map(|words| format!(" ({words})"));
            let words = words.unwrap_or_default();
            text.push_str(&format!("\nvolume {name} is {health}{words}\n"));
        }
    }
    text
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
            bytes(number(sample, &["memory", "current_bytes"])),
            bytes(number(sample, &["memory", "limit_bytes"])),
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
    use crate::stats;
    use shared::observed::{ContainerSample, Source};

    #[test]
    fn folders_are_shown_with_what_is_not_known_left_open() {
        let reply: FoldersReply = serde_json::from_value(serde_json::json!({
            "storage_proxy": null,
            "folders": [
                {"kernel_id": "k", "name": "data", "target": "/home/work/data", "folder": "f", "volume": "v",
                    "used_bytes": 2048, "files": 3, "age_s": 60.0, "error": null,
                    "quota": {"scope": "user:x", "used_bytes": 1024, "limit_bytes": 4096}},
                {"kernel_id": "k", "name": "new", "target": "/mnt/new", "folder": null, "volume": null,
                    "used_bytes": null, "files": null, "age_s": null, "error": "no id",
                    "quota": {"scope": null, "used_bytes": null, "limit_bytes": null}},
            ],
            "volumes": [
                {"name": "v", "health": "degraded", "words": "a disk is lost"},
                {"name": "w", "health": "healthy", "words": null},
            ],
        }))
        .unwrap();
        let text = folders_table(&reply);
        let rows: Vec<Vec<&str>> = text
            .lines()
            .map(|line| {
                let cells = line.split("  ").map(str::trim);
                cells.filter(|cell| !cell.is_empty()).collect()
            })
            .collect();
        assert_eq!(
            rows[1],
            [
                "k",
                "data",
                "/home/work/data",
                "v",
                "2.00 KiB",
                "3",
                "1.00 KiB of 4.00 KiB",
                "1 min 0 s"
            ]
        );
        assert_eq!(
            rows[2],
            ["k", "new", "/mnt/new", "-", "-", "-", "-", "-", "no id"]
        );
        assert!(
            text.ends_with("\nvolume v is degraded (a disk is lost)\n"),
            "{text}"
        );
    }

    #[test]
    fn every_column_is_filled_by_what_a_sample_has_and_an_absent_group_is_not_a_zero() {
        let mut sample = ContainerSample::default();
        sample.cpu.source = Source::Bpf;
        sample.cpu.counters.usage_ns = Some(1_500_000_000);
        sample.memory.source = Source::Bpf;
        sample.memory.counters.current_bytes = Some(1 << 20);
        sample.memory.counters.limit_bytes = Some(2 << 20);
        let some = sample.clone();
        sample.pids.source = Source::Bpf;
        sample.pids.counters.current = Some(3);
        sample.io.source = Source::File;
        sample.io.counters.read_bytes = Some(4 << 20);
        sample.io.counters.write_bytes = Some(5 << 20);
        sample.net.source = Source::Netlink;
        sample.net.counters.rx_bytes = Some(6 << 20);
        sample.net.counters.tx_bytes = Some(7 << 20);
        let shown = |sample: &ContainerSample| -> Vec<String> {
            let reply = serde_json::json!({"kernels": {"k": stats::container(sample)}});
            let text = stats_table(&reply);
            let cells = text.lines().nth(1).unwrap().split("  ").map(str::trim);
            let cells = cells.filter(|cell| !cell.is_empty());
            cells.map(str::to_owned).collect()
        };
        let own = ["k", "1.5 s", "1.00 MiB", "2.00 MiB"];
        assert_eq!(shown(&some)[..4], own);
        assert_eq!(shown(&some)[4..], ["-"; 5]);
        let all = shown(&sample);
        assert_eq!(all[..4], own);
        assert_eq!(
            all[4..],
            ["3", "4.00 MiB", "5.00 MiB", "6.00 MiB", "7.00 MiB"]
        );
    }
}
