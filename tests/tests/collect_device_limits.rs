//! dd fills what of a kernel has a limit, and what is said of it is what dd was given: /dev/shm, a scratch with a file
//! system of its own, and a block device that is slowed down. Each limit is another number, so that none stands for another.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::images::Image;
use harness::kernels::{self, Order, Ran};
use harness::node::{Node, NodeOptions};
use harness::{scrape, wait};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;

/// Within one per cent of what was done.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn near(found: f64, done: u64) -> bool {
    (found - done as f64).abs() <= done as f64 / 100.0
}

/// The kernel's value of a series on the page of metrics.
fn value(node: &Node, order: &Order, series: &str) -> Option<f64> {
    let page = scrape::page(node.http_address()).ok()?;
    scrape::value(&page, series, &format!("kernel_id=\"{}\"", order.kernel))
}

/// Waits until all series are as dd has left things; the last values are told otherwise.
async fn said(node: &Node, order: &Order, wanted: &[(&str, u64)]) -> Result<()> {
    let mut last = Vec::new();
    let found = wait::until("the samples say it", PATIENCE, || {
        last = wanted
            .iter()
            .map(|(series, _)| value(node, order, series))
            .collect();
        let all = last
            .iter()
            .zip(wanted)
            .all(|(found, (_, done))| found.is_some_and(|found| near(found, *done)));
        async move { all.then_some(()) }
    })
    .await;
    found.with_context(|| format!("wanted {wanted:?}, found {last:?}"))
}

/// Blocks of a MiB that dd says it has written, and the seconds it took by the shell's clock.
fn moved(ran: &Ran) -> Result<(u64, f64)> {
    let lines = || ran.output.lines();
    let blocks = lines().find_map(|line| line.strip_suffix("+0 records out")?.parse().ok());
    let time = lines().find_map(|line| line.strip_prefix("real"));
    let seconds = time.and_then(|time| {
        let (minutes, seconds) = time.trim().strip_suffix('s')?.split_once("m ")?;
        Some(minutes.parse::<f64>().ok()? * 60.0 + seconds.trim().parse::<f64>().ok()?)
    });
    let told = blocks.zip(seconds);
    told.with_context(|| format!("dd and time said {ran:?}"))
}

/// Fills a place until there is no more, and says how many bytes went in.
async fn fill(node: &Node, order: &Order, file: &str) -> Result<u64> {
    let ran = kernels::run(
        node,
        order,
        &format!("dd if=/dev/zero of={file} bs=64k; ls -l {file}"),
    )
    .await?;
    ensure!(ran.output.contains("No space left"), "{ran:?}");
    // The last write may have been cut; what lies there counts.
    let size = ran
        .output
        .lines()
        .last()
        .and_then(|line| line.split_whitespace().nth(4));
    size.and_then(|size| size.parse().ok())
        .with_context(|| format!("{ran:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_and_scratch_are_full_when_dd_says_so() -> Result<()> {
    // A scratch in memory has 64 MiB, whatever is configured.
    for (kind, shared, scratch) in [("memory", 24, 64), ("hostfile", 17, 72)] {
        let node = Node::start(NodeOptions {
            scratch_type: kind.to_owned(),
            container: format!("scratch-size = \"{scratch}m\"\n"),
            sections: "[node.dataplane]\nstats-interval = \"200ms\"\n".to_owned(),
            ..NodeOptions::default()
        })
        .await?;
        let (shared, scratch) = (shared * MIB, scratch * MIB);
        let mut order = Order::of(Image::Runner)?;
        order.config["resource_opts"] = json!({"shmem": shared.to_string()});
        kernels::create(&node, &order).await?;
        // What the file system itself says inside; that in a file has less room than the file has bytes.
        let shown = kernels::run(&node, &order, "stat -f -c '%S %b %f' /home/work").await?;
        let numbers: Vec<u64> = shown
            .output
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        let &[block, blocks, free] = numbers.as_slice() else {
            anyhow::bail!("stat said {shown:?}");
        };
        let room = block * blocks;
        ensure!(
            room <= scratch && room > scratch * 8 / 10,
            "{kind}: {room} of {scratch}"
        );
        let before = block * (blocks - free);
        said(
            &node,
            &order,
            &[
                ("bai_container_shm_limit_bytes", shared),
                ("container_fs_limit_bytes", room),
            ],
        )
        .await?;

        let in_memory = fill(&node, &order, "/dev/shm/full").await?;
        ensure!(near(in_memory as f64, shared), "{in_memory} of {shared}");
        said(&node, &order, &[("bai_container_shm_bytes", in_memory)]).await?;
        let elsewhere = value(&node, &order, "container_fs_usage_bytes");
        ensure!(
            elsewhere.is_some_and(|bytes| bytes < in_memory as f64 / 2.0),
            "the scratch is not what was filled: {elsewhere:?}"
        );

        let in_scratch = fill(&node, &order, "/home/work/full").await?;
        said(
            &node,
            &order,
            &[
                ("container_fs_usage_bytes", before + in_scratch),
                ("container_fs_limit_bytes", room),
                ("bai_container_shm_bytes", in_memory),
                ("bai_container_shm_limit_bytes", shared),
            ],
        )
        .await?;
        println!(
            "{kind}: {in_memory} of {shared} in /dev/shm, {in_scratch} of {room} in the scratch"
        );

        // What is taken back is no longer counted.
        kernels::run(&node, &order, "rm /dev/shm/full /home/work/full").await?;
        wait::until("both are empty again", PATIENCE, || async {
            let shm = value(&node, &order, "bai_container_shm_bytes")?;
            let fs = value(&node, &order, "container_fs_usage_bytes")?;
            (shm < MIB as f64 && fs < (before + MIB) as f64).then_some(())
        })
        .await?;
        kernels::destroy(&node, &order).await?;
        kernels::assert_clean(&node).await?;
    }
    Ok(())
}

/// A block device whose bytes lie in memory, so that nothing below it is counted too.
struct Device {
    path: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Device {
    fn new(size: u64) -> Result<Device> {
        let file = tempfile::NamedTempFile::new_in("/dev/shm")?;
        file.as_file().set_len(size)?;
        let path = tool("losetup", &["--find", "--show"], file.path())?;
        let device = Device {
            path: PathBuf::from(path.trim()),
            _file: file,
        };
        tool("mkfs.ext4", &["-q", "-F"], &device.path)?;
        Ok(device)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // It goes away with its last user.
        let _ = tool("losetup", &["--detach"], &self.path);
    }
}

fn tool(name: &str, arguments: &[&str], path: &Path) -> Result<String> {
    let output = Command::new(name)
        .args(arguments)
        .arg(path)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .output()
        .with_context(|| format!("{name} can't be started"))?;
    ensure!(output.status.success(), "{name}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slowed_device_moves_what_dd_says_at_its_limit() -> Result<()> {
    let device = Device::new(96 * MIB)?;
    let (write_limit, read_limit) = (4 * MIB, 9 * MIB);
    let node = Node::start(NodeOptions {
        node: format!(
            "device-limits = [{{ device = \"{}\", read-bps = {read_limit}, write-bps = {write_limit} }}]\n",
            device.path.display()
        ),
        sections: "[node.dataplane]\nstats-interval = \"200ms\"\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    // Unmounted with the node.
    let root = node.scratch_root();
    std::fs::create_dir_all(&root)?;
    let place = root.to_str().context("a path in UTF-8")?;
    tool(
        "mount",
        &[&device.path.display().to_string()],
        Path::new(place),
    )?;
    // Else it would be something left behind.
    std::fs::remove_dir(root.join("lost+found"))?;
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    let counters = [
        "container_fs_writes_bytes_total",
        "container_fs_reads_bytes_total",
    ];
    let now = async || -> Result<[f64; 2]> {
        wait::until("block devices are counted", PATIENCE, || async {
            let page = scrape::page(node.http_address()).ok()?;
            let kernel = order.kernel.to_string();
            let [writes, reads] = counters.map(|series| scrape::value(&page, series, &kernel));
            Some([writes?, reads?])
        })
        .await
    };
    for (words, limit, moves) in [
        (
            "if=/dev/zero of=/home/work/file oflag=direct count=24",
            write_limit,
            0,
        ),
        (
            "if=/home/work/file of=/dev/null iflag=direct count=24",
            read_limit,
            1,
        ),
    ] {
        let before = now().await?;
        let ran = kernels::run(&node, &order, &format!("time dd bs=1M {words}")).await?;
        let (blocks, seconds) = moved(&ran)?;
        ensure!(blocks == 24, "{ran:?}");
        let bytes = blocks * MIB;
        let last = Cell::new([0.0; 2]);
        let found = wait::until("the sample says it", PATIENCE, || async {
            let after = now().await.ok()?;
            last.set([after[0] - before[0], after[1] - before[1]]);
            near(last.get()[moves], bytes).then_some(())
        })
        .await;
        let last = last.get();
        found.with_context(|| format!("dd moved {bytes}, the samples have {last:?}"))?;
        let other = last[1 - moves];
        ensure!(other < MIB as f64, "{words}: the other way went {other}");
        let rate = bytes as f64 / seconds;
        println!(
            "{words}: {} bytes counted of {bytes}, {rate:.0} of {limit} bytes/s",
            last[moves]
        );
        ensure!(
            (0.8..1.05).contains(&(rate / limit as f64)),
            "{rate} of {limit} bytes/s"
        );
    }
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}
