//! The manager's own checker of idle sessions judges by the records that are published here.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use control::stats::kernels::{HeldDevices, KernelFacts};
use control::stats::node::HostReading;
use control::stats::publish::{Pass, RecordStore, Records};
use harness::python;
use harness::redis::Redis;
use serde_json::json;
use shared::ids::{ContainerId, KernelId};
use shared::observed::{
    AcceleratorCounters, AcceleratorKind, AcceleratorRow, ContainerSample, CpuCounters, Measured,
    MemoryCounters, ObservedSnapshot, Processes, Source,
};

use super::{bus, settings};

const INTERVAL: Duration = Duration::from_secs(5);
const SECOND: u64 = 1_000_000_000;

fn kernel(n: u8) -> KernelFacts {
    KernelFacts {
        id: KernelId([n; 16]),
        container: ContainerId([n; 32]),
        adopted: false,
        devices: vec![HeldDevices {
            name: "cuda".to_owned(),
            ids: vec![format!("GPU-{n}")],
            shared: false,
        }],
        scaled_by_load: false,
    }
}

/// What is read of a container that does nothing.
fn resting(n: u8, second: u64) -> ContainerSample {
    ContainerSample {
        container_id: ContainerId([n; 32]),
        taken_monotonic_ns: second * SECOND,
        cpu: Measured::now(
            Source::File,
            CpuCounters {
                usage_ns: Some(0),
                ..CpuCounters::default()
            },
        ),
        memory: Measured::now(
            Source::File,
            MemoryCounters {
                current_bytes: Some(1 << 20),
                limit_bytes: Some(1 << 30),
                ..MemoryCounters::default()
            },
        ),
        ..ContainerSample::default()
    }
}

fn card(n: u8, load: Option<u64>) -> AcceleratorRow {
    AcceleratorRow {
        counters: AcceleratorCounters {
            memory_used_bytes: load.map(|_| 0),
            memory_total_bytes: Some(1 << 30),
            utilisation_permille: load,
            ..AcceleratorCounters::default()
        },
        ..AcceleratorRow::new(AcceleratorKind::Cuda, u32::from(n), format!("GPU-{n}"))
    }
}

/// Kernels that all rested when they were last read: one is still read (1), of one the samples
/// stopped (2), one's device tells nothing any more (3), one has never been read (4), and one was
/// read just before (5).
#[tokio::test]
async fn only_a_kernel_that_is_read_can_be_found_idle() -> Result<()> {
    let Some(python) = python::interpreter("event_bus")? else {
        return Ok(());
    };
    let redis = Redis::start()?;
    let (bus, _events) = bus(&settings(redis.port))?;
    let kernels = [1, 2, 3, 4, 5].map(kernel);
    let mut records = Records::default();
    for second in (0..=40).step_by(5) {
        let read: &[u8] = match second {
            0..=10 => &[1, 2, 3, 5],
            11..=30 => &[1, 3, 5],
            _ => &[1, 3],
        };
        let told = |n: u8| (n != 3 || second <= 10).then_some(0);
        let snapshot = ObservedSnapshot {
            containers: Arc::new(read.iter().map(|n| resting(*n, second)).collect()),
            accelerators: [1, 2, 3, 5].map(|n| card(n, told(n))).to_vec(),
            ..ObservedSnapshot::default()
        };
        let entries = records.observe(&Pass {
            agent_id: "i-evh",
            kernels: &kernels,
            away: &HashSet::new(),
            snapshot: Some(&snapshot),
            processes: Some(&Processes::default()),
            reading: &HostReading {
                at_ns: second * SECOND,
                ..HostReading::default()
            },
            interval: INTERVAL,
        });
        let entries = entries.into_iter().flatten().collect();
        RecordStore::put(bus.statistics(), entries).await?;
    }

    let case = |kernels: &[u8], operator: &str, thresholds: &[&str]| {
        let kernels: Vec<String> = kernels.iter().map(|n| kernel(*n).id.to_string()).collect();
        let thresholds: BTreeMap<&str, u8> = thresholds.iter().map(|name| (*name, 10)).collect();
        json!({
            "kernels": kernels, "operator": operator, "thresholds": thresholds,
            "slots": {"cpu": "1", "mem": (1 << 30).to_string(), "cuda.device": "1"},
        })
    };
    let all = ["cpu_util", "mem", "cuda_util", "cuda_mem"];
    let cases = json!({
        "read": case(&[1], "and", &all),
        "read, or": case(&[1], "or", &all),
        "read until just now": case(&[5], "and", &all),
        "silent": case(&[2], "and", &["cpu_util"]),
        "silent, or": case(&[2], "or", &all),
        "device silent": case(&[3], "and", &["cuda_util"]),
        "device silent, its memory": case(&[3], "and", &["cuda_mem"]),
        "device silent, not asked for": case(&[3], "and", &["cpu_util"]),
        "never read": case(&[4], "or", &all),
        "one of a cluster silent": case(&[1, 2], "or", &all),
        "one of a cluster never read": case(&[1, 4], "and", &["cuda_util"]),
        "none of a cluster silent": case(&[1, 5], "and", &all),
    });
    let (port, asked) = (redis.port.to_string(), cases.to_string());
    let said = tokio::task::spawn_blocking(move || {
        python::check(&python, "idle_checker.py", &[&port, &asked])
    })
    .await??;
    let lives_on: BTreeMap<String, bool> =
        serde_json::from_str(&said).context("JSON from the checker")?;
    let wanted = BTreeMap::from(
        [
            ("read", false),
            ("read, or", false),
            ("read until just now", false),
            ("silent", true),
            ("silent, or", true),
            ("device silent", true),
            ("device silent, its memory", true),
            ("device silent, not asked for", false),
            ("never read", true),
            ("one of a cluster silent", true),
            ("one of a cluster never read", true),
            ("none of a cluster silent", false),
        ]
        .map(|(name, lives)| (name.to_owned(), lives)),
    );
    assert_eq!(lives_on, wanted);
    Ok(())
}
