//! AMD's and Google's devices are told as the kernel's files tell them, and are nobody's business on
//! a machine without. The machine is a tree of files (`harness::device_tree`).

use anyhow::{Context, Result, ensure};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, until};
use harness::device_tree::DeviceTree;
use harness::nvml;
use shared::ids::ContainerId;
use shared::observed::AcceleratorKind;

fn start(tree: &DeviceTree) -> Result<(Place, Process, Control)> {
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        node: tree.settings(),
        environment: nvml::none(),
        ..Options::default()
    })?;
    let control = place.control()?;
    let process = place.start()?;
    Ok((place, process, control))
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
