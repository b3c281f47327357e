//! The collector alone: CPU time of a pass over many containers by cached descriptors.
//!
//! `cargo run --release -p benches --bin collect-micro [containers]` (as root: it makes cgroups,
//! and removes them)
//!
//! The same pass without cached descriptors (open, read, close) stands beside it as baseline.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use dataplane::collect::disk::Disk;
use dataplane::collect::facts::Facts;
use dataplane::collect::{Means, Sampler};
use dataplane::forward::relay::port::Totals;
use dataplane::sys::rlimit;
use shared::desired::ContainerRow;
use shared::ids::{ContainerId, Generation};

const PASSES: u32 = 50;

/// Cgroups of this run; removed when dropped.
struct Groups(Vec<PathBuf>);

impl Groups {
    fn new(parent: &str, count: u16) -> Result<Self> {
        let facts = Facts::gather();
        let mut made = Self(Vec::new());
        let roots: std::collections::BTreeSet<PathBuf> = [
            facts.cpu,
            facts.cpu_quota,
            facts.memory,
            facts.pids,
            facts.io,
        ]
        .into_iter()
        .flatten()
        .map(|hierarchy| hierarchy.mount().to_owned())
        .collect();
        for root in roots {
            let top = root.join(parent);
            std::fs::create_dir(&top).with_context(|| top.display().to_string())?;
            made.0.push(top.clone());
            for number in 0..count {
                let path = top.join(number.to_string());
                std::fs::create_dir(&path)?;
                made.0.push(path);
            }
        }
        Ok(made)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for path in self.0.iter().rev() {
            let _ = std::fs::remove_dir(path);
        }
    }
}

fn main() -> Result<()> {
    let count: u16 = std::env::args()
        .nth(1)
        .map_or(Ok(200), |word| word.parse())?;
    let limit = rlimit::raise_descriptors();
    let parent = format!("bai-bench-{}", std::process::id());
    let _groups = Groups::new(&parent, count)?;
    let rows: Vec<ContainerRow> = (0..count)
        .map(|number| {
            let mut id = [0; 32];
            id[..2].copy_from_slice(&number.to_be_bytes());
            ContainerRow {
                container_id: ContainerId(id),
                cgroup_path: format!("{parent}/{number}"),
                link_indexes: vec![1],
                generation: Generation(1),
                ..ContainerRow::default()
            }
        })
        .collect();
    println!("{count} containers, {PASSES} passes, descriptors {limit}");
    for (name, descriptors, means) in [
        (
            "kernel program",
            u32::MAX,
            Means::Best {
                containers: u32::from(count),
            },
        ),
        ("cached descriptors", u32::MAX, Means::Files),
        ("open, read, close", 0, Means::Files),
    ] {
        let mut sampler = Sampler::new(
            Arc::new(Totals::default()),
            Disk::start()?,
            None,
            descriptors,
            means,
        );
        sampler.follow(&rows, true);
        sampler.pass();
        sampler.pass();
        let (mut cpu, mut worst, mut read) = (Duration::ZERO, Duration::ZERO, 0);
        let begin = Instant::now();
        for _ in 0..PASSES {
            let before = Instant::now();
            let pass = sampler.pass();
            worst = worst.max(before.elapsed());
            cpu += sampler.last_cpu();
            read = pass
                .samples
                .iter()
                .filter(|it| it.cpu.get().is_some() && it.memory.get().is_some())
                .count();
        }
        println!(
            "  {name:<20} {:>9.1} us CPU per pass, {:>6.2} us per container, {:>9.1} us elapsed, worst {:>9.1} us ({read} read)",
            cpu.as_secs_f64() * 1e6 / f64::from(PASSES),
            cpu.as_secs_f64() * 1e6 / f64::from(PASSES) / f64::from(count.max(1)),
            begin.elapsed().as_secs_f64() * 1e6 / f64::from(PASSES),
            worst.as_secs_f64() * 1e6,
        );
    }
    Ok(())
}
