//! AMD's and Google's devices are told as the kernel's files tell them, and are nobody's business on
//! a machine without. The machine is a tree of files (`harness::device_tree`).

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, until};
use harness::device_tree::DeviceTree;
use harness::{nvml, python};
use serde_json::json;
use shared::ids::ContainerId;
use shared::observed::AcceleratorKind;

fn start(tree: &DeviceTree) -> Result<(Place, Process, Control)> {
    start_with(tree, "tpu-metrics-port = 0")
}

/// With a line of `[node.accelerators]`.
fn start_with(tree: &DeviceTree, line: &str) -> Result<(Place, Process, Control)> {
    Place::sampling(Options {
        node: tree.settings() + line,
        environment: nvml::none(),
        ..Options::default()
    })
}

#[test]
fn amd_devices_are_what_the_kernel_tells() -> Result<()> {
    let tree = DeviceTree::new()?;
    tree.amd()?;
    let (_place, _process, mut control) = start(&tree)?;
    let rows = control.accelerators("two devices", |rows| rows.len() == 2)?;
    for (index, row) in (0_u64..).zip(&rows) {
        ensure!(
            row.key.kind == AcceleratorKind::Rocm && row.healthy,
            "{row:?}"
        );
        ensure!(
            row.id == format!("{:016x}", 0xabc0_u64 + index),
            "{}",
            row.id
        );
        ensure!(row.model == "AMD gfx942", "{}", row.model);
        ensure!(row.numa_node == Some(u16::try_from(index)?) && row.units == Some(304));
        ensure!(row.pci == format!("0000:{:02x}:00.0", 0x10 + 0x20 * index));
        let found = &row.counters;
        ensure!(found.memory_total_bytes == Some(206_141_652_992));
        ensure!(found.memory_used_bytes == Some((index + 1) << 30));
        ensure!(found.utilisation_permille == Some(10 * (30 + index)));
        ensure!(found.memory_utilisation_permille == Some(70));
        ensure!(found.power_mw == Some(250_000) && found.power_limit_mw == Some(750_000));
        ensure!(found.temperature_mc == Some(51_000));
        ensure!(found.clock_mhz == Some(2100) && found.memory_clock_mhz == Some(1300));
        ensure!(found.ecc_corrected == Some(3) && found.ecc_uncorrected == Some(0));
        ensure!(found.encoder_permille.is_none(), "not told, so absent");
    }
    // It falls off the bus: known, without numbers. And comes back.
    tree.remove(&tree.amd_pci(1))?;
    let rows = control.accelerators("a lost device", |rows| rows.iter().any(|row| !row.healthy))?;
    ensure!(
        rows.len() == 2 && rows[0].healthy && !rows[1].healthy,
        "{rows:?}"
    );
    tree.amd()?;
    control.accelerators("all devices", |rows| {
        rows.len() == 2 && rows.iter().all(|row| row.healthy)
    })?;
    Ok(())
}

#[test]
fn amd_partitions_are_devices_of_their_own_and_none_has_the_numbers_of_all() -> Result<()> {
    let tree = DeviceTree::new()?;
    tree.amd()?;
    tree.amd_partitions()?;
    tree.write("sys/class/kfd/kfd/proc/4194304/vram_6002", "4096\n")?;
    let (_place, _process, mut control) = start(&tree)?;
    let rows = control.accelerators("two devices and four parts", |rows| rows.len() == 6)?;
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    let (whole, parts) = ids.split_at(2);
    ensure!(whole == ["000000000000abc0", "000000000000abc1"], "{ids:?}");
    ensure!(
        parts
            == [
                "000000000000abcd",
                "000000000000abcd-1",
                "000000000000abcd-2",
                "000000000000abcd-3"
            ],
        "{ids:?}"
    );
    for row in &rows[2..] {
        ensure!(row.healthy && row.units == Some(76) && row.pci == "0000:90:00.0");
        let found = &row.counters;
        ensure!(found.memory_total_bytes == Some(48 << 30), "{row:?}");
        let of_all = [
            found.memory_used_bytes,
            found.utilisation_permille,
            found.power_mw,
        ];
        ensure!(of_all == [None; 3], "{row:?}");
    }
    ensure!(rows[0].counters.utilisation_permille == Some(300));
    // A process that is not to be found may be anybody's, of that partition alone.
    let unknown = rows.iter().map(|row| row.users_unknown);
    ensure!(unknown.eq([false, false, false, false, true, false]));
    Ok(())
}

#[test]
fn amd_devices_are_found_when_their_driver_is_loaded_late() -> Result<()> {
    let tree = DeviceTree::new()?;
    let place = "sys/bus/pci/devices/0000:10:00.0";
    tree.write(&format!("{place}/vendor"), "0x1002\n")?;
    tree.write(&format!("{place}/class"), "0x038000\n")?;
    let (_place, _process, mut control) = start(&tree)?;
    control.no_accelerators()?;
    tree.amd()?;
    control.accelerators("devices of a driver that came", |rows| rows.len() == 2)?;
    Ok(())
}

#[test]
fn amd_devices_know_who_is_near_by_xgmi() -> Result<()> {
    let tree = DeviceTree::new()?;
    tree.amd()?;
    // To the processor by PCIe, to each other by xGMI: two links side by side there, and two hops
    // back. A link to nowhere, and one that says nothing.
    tree.amd_link(
        0,
        0,
        "type 2\nnode_to 0\nweight 20\nmin_bandwidth 312\nmax_bandwidth 32000\n",
    )?;
    tree.amd_link(
        0,
        1,
        "type 11\nnode_to 2\nweight 15\nmin_bandwidth 50000\nmax_bandwidth 100000\n",
    )?;
    tree.amd_link(0, 2, "type 11\nnode_to 77\nweight 15\n")?;
    tree.amd_link(0, 3, "type 11\nnode_to \n")?;
    tree.amd_link(1, 0, "type 11\nnode_to 0\nweight 13\n")?;
    tree.amd_link(
        1,
        1,
        "type 11\nnode_to 1\nweight 30\nmin_bandwidth 0\nmax_bandwidth 50000\n",
    )?;
    let (_place, _process, mut control) = start(&tree)?;
    let rows = control.accelerators("two devices", |rows| rows.len() == 2)?;
    let known = |row: usize| -> Vec<(usize, String)> {
        let near = rows[row].near.iter().enumerate();
        near.filter(|(_, near)| near.is_known())
            .map(|(place, near)| (place, near.to_string()))
            .collect()
    };
    ensure!(known(0) == [(1, "NV2".to_owned())], "{:?}", known(0));
    ensure!(known(1) == [(0, "NV1".to_owned())], "{:?}", known(1));
    // A link fails.
    tree.remove("sys/class/kfd/kfd/topology/nodes/1/io_links/1")?;
    control.accelerators("a lost link", |rows| {
        rows.len() == 2 && rows[0].near.iter().all(|near| !near.is_known())
    })?;
    Ok(())
}

#[test]
fn amd_memory_is_attributed_to_containers() -> Result<()> {
    let id = "c".repeat(64);
    let Some(mut group) = TestCgroup::new(&id)? else {
        return Ok(());
    };
    let pid = group.run("exec sleep 1000")?;
    let tree = DeviceTree::new()?;
    tree.amd()?;
    tree.amd_process(pid, 0, 4096)?;
    tree.amd_process(std::process::id(), 0, 77)?;
    let (_place, _process, mut control) = start(&tree)?;
    let rows = control.accelerators("a user", |rows| {
        rows.iter().any(|row| !row.users.is_empty())
    })?;
    let users = &rows[0].users;
    ensure!(
        users.len() == 1,
        "the host's own process is nobody's: {users:?}"
    );
    ensure!(users[0].container_id == id.parse::<ContainerId>()?);
    ensure!(users[0].memory_bytes == Some(4096));
    ensure!(
        users[0].utilisation_permille.is_none(),
        "the kernel does not tell it"
    );
    ensure!(rows[1].users.is_empty());
    Ok(())
}

#[test]
fn tpu_chips_are_told_apart_from_other_devices_of_their_vendor() -> Result<()> {
    let tree = DeviceTree::new()?;
    tree.tpu()?;
    let (_place, _process, mut control) = start(&tree)?;
    let rows = control.accelerators("two chips", |rows| !rows.is_empty())?;
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    ensure!(ids == ["tpu-0000-00-04.0", "tpu-0000-00-05.0"], "{ids:?}");
    for row in &rows {
        ensure!(
            row.key.kind == AcceleratorKind::Tpu && row.healthy,
            "{row:?}"
        );
        ensure!(row.model == "TPU v4" && row.numa_node.is_none());
        ensure!(row.counters.memory_total_bytes == Some(32 << 30));
        ensure!(row.counters.utilisation_permille.is_none());
    }
    Ok(())
}

/// libtpu's metric service on the published gRPC library.
struct Runtime {
    child: Child,
    port: u16,
}

impl Runtime {
    fn start(python: &Path) -> Result<Runtime> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/tpu_runtime.py");
        let mut child = Command::new(python)
            .arg(program)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let output = child.stdout.take().context("its stdout")?;
        BufReader::new(output).read_line(&mut line)?;
        let port = line.trim().parse().context(line)?;
        Ok(Runtime { child, port })
    }

    fn tell(&mut self, what: &serde_json::Value) -> Result<()> {
        let input = self.child.stdin.as_mut().context("its stdin")?;
        writeln!(input, "{what}")?;
        Ok(input.flush()?)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn tpu_load_is_what_the_runtime_tells_as_long_as_it_does() -> Result<()> {
    let Some(python) = python::interpreter("accelerator_trees")? else {
        return Ok(());
    };
    let mut runtime = Runtime::start(&python)?;
    let tree = DeviceTree::new()?;
    tree.tpu()?;
    let port = format!("tpu-metrics-port = {}", runtime.port);
    let (_place, _process, mut control) = start_with(&tree, &port)?;
    // It serves and has nothing to tell yet.
    let rows = control.accelerators("two chips", |rows| rows.len() == 2)?;
    ensure!(
        rows.iter()
            .all(|row| row.healthy && row.counters.utilisation_permille.is_none())
    );
    // Memory by core, of which a chip has two here; load by chip.
    runtime.tell(&json!({
        "tpu.runtime.hbm.memory.total.bytes": {"0": 100, "1": 200, "2": 1000, "3": 2000},
        "tpu.runtime.hbm.memory.usage.bytes": {"3": 40, "1": 20, "2": 30, "0": 10},
        "tpu.runtime.tensorcore.dutycycle.percent": {"0": 12.5, "1": 100.0},
    }))?;
    let rows = control.accelerators("load", |rows| {
        rows.iter()
            .all(|row| row.counters.utilisation_permille.is_some())
    })?;
    let told: Vec<_> = rows
        .iter()
        .map(|row| {
            let found = &row.counters;
            (
                found.memory_total_bytes,
                found.memory_used_bytes,
                found.utilisation_permille,
            )
        })
        .collect();
    ensure!(
        told == [
            (Some(300), Some(30), Some(125)),
            (Some(3000), Some(70), Some(1000))
        ],
        "{told:?}"
    );
    // The process that holds the chips ends: they are as they were, without load.
    drop(runtime);
    let rows = control.accelerators("no load", |rows| {
        rows.iter()
            .all(|row| row.counters.utilisation_permille.is_none())
    })?;
    ensure!(
        rows.iter()
            .all(|row| row.healthy && row.counters.memory_total_bytes == Some(32 << 30))
    );
    Ok(())
}

#[test]
fn without_devices_there_is_no_thread_of_theirs() -> Result<()> {
    let tree = DeviceTree::new()?;
    let (_place, process, mut control) = start(&tree)?;
    control.no_accelerators()?;
    let running = process.threads();
    ensure!(!running.is_empty(), "the process has threads");
    ensure!(
        !running.iter().any(|name| name == "rocm" || name == "tpu"),
        "{running:?}"
    );
    // And with some there is one, so that this test can fail.
    let tree = DeviceTree::new()?;
    tree.amd()?;
    tree.tpu()?;
    let (_other, process, _control) = start(&tree)?;
    until("their threads", || {
        let running = process.threads();
        ["rocm", "tpu"]
            .iter()
            .all(|name| running.iter().any(|found| found == name))
            .then_some(())
    })
    .context("threads of devices that are there")
}
