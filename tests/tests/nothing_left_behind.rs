//! Many lives at once, then a count of everything that could be left of them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::images::Image;
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::wait;

const CYCLES: usize = 20;
const AT_ONCE: usize = 4;

/// What a process holds, by kind.
fn held(pid: u32) -> Result<BTreeMap<String, usize>> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let mut kinds = BTreeMap::new();
    for entry in std::fs::read_dir(proc.join("fd"))? {
        // A descriptor may be closed while we look.
        let Ok(target) = std::fs::read_link(entry?.path()) else {
            continue;
        };
        let target = target.to_string_lossy();
        let kind = target.split([':', '[']).next().unwrap_or_default();
        *kinds.entry(format!("descriptors {kind}")).or_insert(0) += 1;
    }
    kinds.insert(
        "threads".into(),
        std::fs::read_dir(proc.join("task"))?.count(),
    );
    Ok(kinds)
}

/// Names that only grow when something leaks: what the engine has in all.
fn engine_has() -> Result<BTreeMap<&'static str, usize>> {
    let count = |args: &[&str]| kernels::docker(args).map(|text| text.lines().count());
    Ok(BTreeMap::from([
        ("volumes", count(&["volume", "ls", "-q"])?),
        ("networks", count(&["network", "ls", "-q"])?),
    ]))
}

async fn life(node: &Node, image: Image) -> Result<()> {
    let order = Order::of(image)?;
    kernels::create(node, &order).await?;
    let ran = kernels::run(node, &order, "echo $BACKENDAI_KERNEL_ID").await?;
    ensure!(ran.output.trim() == order.kernel.to_string(), "{ran:?}");
    kernels::destroy(node, &order).await
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_lives_four_at_a_time_leave_nothing() -> Result<()> {
    let node = Arc::new(
        Node::start(NodeOptions {
            ports: 100,
            // Four small kernels at once on any machine.
            environment: vec![("BACKEND_CPU_OVERCOMMIT_FACTOR".to_owned(), "4".to_owned())],
            ..NodeOptions::default()
        })
        .await?,
    );
    // The first one warms up pools and threads that stay for good.
    life(&node, Image::Runner).await?;
    let pids = [node.control_pid(), node.dataplane_pid()].map(|pid| pid.context("it runs"));
    let [control, dataplane] = pids;
    let (control, dataplane) = (control?, dataplane?);
    let before = (held(control)?, held(dataplane)?, engine_has()?);

    let places = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let mut lives = tokio::task::JoinSet::new();
    for _ in 0..CYCLES {
        let (node, places) = (node.clone(), places.clone());
        lives.spawn(async move {
            let _place = places.acquire().await?;
            life(&node, Image::Runner).await
        });
    }
    while let Some(life) = lives.join_next().await {
        life??;
    }
    kernels::assert_clean(&node).await?;
    // Idle threads of the runtime and pooled connections end by and by.
    let settled = wait::until(
        "nothing is held that was not held before",
        Duration::from_secs(90),
        || async {
            let after = (
                held(control).ok()?,
                held(dataplane).ok()?,
                engine_has().ok()?,
            );
            let grown =
                grown(&before.0, &after.0) || grown(&before.1, &after.1) || after.2 != before.2;
            (!grown).then_some(())
        },
    )
    .await;
    settled.with_context(|| {
        format!(
            "before: {before:#?}\nafter: {:#?}",
            (held(control), held(dataplane), engine_has())
        )
    })
}

/// Whether any kind is more than before. Two are allowed for calls that are just being answered.
fn grown(before: &BTreeMap<String, usize>, after: &BTreeMap<String, usize>) -> bool {
    after
        .iter()
        .any(|(kind, count)| *count > before.get(kind).copied().unwrap_or(0) + 2)
}
