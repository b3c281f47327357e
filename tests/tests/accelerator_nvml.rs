//! What the dataplane says of NVIDIA devices is what the driver says: inventory, numbers, parts, and
//! which container uses what; and a driver that hangs, fails or loses devices harms nothing else.
//! The driver is a stand-in with the real C ABI (`tests/standin/nvml.c`).

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, container_row, until};
use harness::device_tree::DeviceTree;
use harness::nvml::{self, StandIn, row_of};
use shared::ids::ContainerId;
use shared::observed::{AcceleratorKind, AcceleratorRow};

/// Eight devices, two of them cut into parts.
fn eight() -> String {
    let mut text = String::new();
    for index in 0u64..8 {
        let mig = u8::from(index >= 6);
        text += &format!(
            "device {index} uuid=GPU-{index} name=Stand-in_H100 mem=85899345920 used={} reserved=4096 util={} power={} temp={} pci=00000000:{:02X}:00.0 sms=132 mig={mig}{}\n",
            (index + 1) << 30,
            10 * index,
            100_000 + index,
            40 + index,
            16 + index,
            if index == 5 {
                String::new()
            } else {
                format!(" enc={} dec={}", index + 1, 20 + index)
            },
        );
    }
    for device in [6, 7] {
        for part in [0, 1, 4] {
            text += &format!(
                "part {device} {part} uuid=MIG-{device}-{part} mem=10200547328 used={} sms=16 slices=1{}\n",
                (part + 1) << 20,
                // Of the last one the driver does not tell the ids.
                if part == 4 {
                    String::new()
                } else {
                    format!(" gi={} ci={part}", 7 + part)
                },
            );
        }
    }
    text
}

#[test]
fn inventory_and_numbers_are_the_drivers() -> Result<()> {
    let driver = StandIn::new(&eight())?;
    let (_place, _process, mut control) = driver.sampling()?;
    let rows = control.accelerators("devices", |rows| !rows.is_empty())?;
    ensure!(rows.len() == 14, "8 devices and 6 parts: {rows:?}");
    let snapshot = control.observed.snapshot()?;
    let node = snapshot.node.as_ref().context("a node")?;
    ensure!(node.counters.accelerators_found == Some(14));
    for index in 0..6u64 {
        let row = row_of(&rows, &format!("GPU-{index}"))?;
        ensure!(row.key.kind == AcceleratorKind::Cuda && u64::from(row.key.index) == index);
        ensure!(
            row.model == "Stand-in H100" && row.healthy && !row.divided,
            "{row:?}"
        );
        ensure!(row.units == Some(132), "multiprocessors: {row:?}");
        ensure!(
            row.pci == format!("0000:{:02x}:00.0", 16 + index),
            "{}",
            row.pci
        );
        let found = &row.counters;
        ensure!(found.memory_total_bytes == Some(85_899_345_920));
        // What the driver keeps for itself is used too.
        ensure!(found.memory_used_bytes == Some(((index + 1) << 30) + 4096));
        ensure!(found.utilisation_permille == Some(100 * index));
        ensure!(found.memory_utilisation_permille == Some(50 * index));
        ensure!(found.power_mw == Some(100_000 + index) && found.power_limit_mw == Some(400_000));
        ensure!(found.temperature_mc == Some(1000 * (40 + index)));
        ensure!(found.energy_mj == Some(123_456_789));
        // Values that differ, so that two fields that were swapped are seen.
        ensure!(found.clock_mhz == Some(1980) && found.memory_clock_mhz == Some(2619));
        ensure!(found.pcie_rx_bytes_per_s == Some(200_000), "{found:?}");
        ensure!(found.pcie_tx_bytes_per_s == Some(100_000), "{found:?}");
        ensure!(found.ecc_corrected == Some(2) && found.ecc_uncorrected == Some(1));
        // One has neither encoder nor decoder: absent, not zero.
        let (encoder, decoder) = (found.encoder_permille, found.decoder_permille);
        let told = (index != 5).then_some(());
        ensure!(encoder == told.map(|()| 10 * (index + 1)), "{found:?}");
        ensure!(decoder == told.map(|()| 10 * (20 + index)), "{found:?}");
    }
    for whole in [6u32, 7] {
        let row = row_of(&rows, &format!("GPU-{whole}"))?;
        ensure!(row.divided && row.part_of.is_none());
        ensure!(
            row.counters.utilisation_permille.is_none(),
            "no utilisation with MIG"
        );
        for part in [0u64, 1, 4] {
            let row = row_of(&rows, &format!("MIG-{whole}-{part}"))?;
            ensure!(
                row.part_of == Some(whole) && row.profile == "1g.10gb",
                "{row:?}"
            );
            ensure!(
                row.units == Some(16) && row.counters.memory_used_bytes == Some((part + 1) << 20)
            );
            let ids = row.instance.map(|ids| (ids.gpu, ids.compute));
            let told = u32::try_from(part)?;
            ensure!(
                ids == (part != 4).then_some((7 + told, told)),
                "{part}: {ids:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn devices_know_their_ways_to_each_other() -> Result<()> {
    // Two switches of PCIe with two devices each; 0 and 2 have links to each other, 3 and 4 to a
    // switch of links, one of which is down.
    let text = eight()
        + "path 0 1 10\npath 2 3 10\npath 0 2 20\npath 4 5 40\n"
        + "link 0 0 00000000:12:00.0\nlink 0 1 00000000:12:00.0\nlink 2 5 00000000:10:00.0\nlink 2 6 00000000:10:00.0\n"
        + "link 3 0 00000000:86:00.0\nlink 3 1 00000000:86:00.0\nlink 4 0 00000000:86:00.0\nlink 4 1 -\n";
    let driver = StandIn::new(&text)?;
    let (place, mut control) = numa_place(&driver)?;
    let rows = control.accelerators("devices", |rows| rows.len() == 14)?;
    let near = |one: &str, other: usize| -> Result<String> {
        Ok(row_of(&rows, one)?.near[other].to_string())
    };
    for (one, other, way) in [
        (0, 1, "PIX"),
        (1, 0, "PIX"),
        (0, 2, "NV2"),
        (2, 0, "NV2"),
        (1, 2, "SYS"),
        (3, 4, "NV1"),
        (4, 5, "NODE"),
        (0, 0, "unknown"),
        (0, 63, "unknown"),
    ] {
        let found = near(&format!("GPU-{one}"), other)?;
        ensure!(found == way, "{one} to {other}: {found}, not {way}");
    }
    ensure!(
        near("MIG-6-0", 0)? == "SYS",
        "a part is where its device is"
    );
    ensure!(row_of(&rows, "GPU-0")?.numa_node == Some(1));
    ensure!(row_of(&rows, "GPU-1")?.numa_node.is_none(), "-1 is none");
    // A device goes, and comes back without a link.
    driver.describe(&text.replace("device 2 uuid=GPU-2", "device 2 uuid=GPU-2 lost=1"))?;
    control.accelerators("a lost device", |rows| rows.iter().any(|row| !row.healthy))?;
    driver.describe(&text.replace("link 0 1 00000000:12:00.0", "link 0 1 -"))?;
    control.accelerators("one link less", |rows| {
        row_of(rows, "GPU-0").is_ok_and(|row| row.near[2].to_string() == "NV1")
    })?;
    drop(place);
    Ok(())
}

/// A dataplane that finds NUMA nodes of two devices.
fn numa_place(driver: &StandIn) -> Result<((Place, Process, DeviceTree), Control)> {
    let tree = DeviceTree::new()?;
    tree.write("sys/bus/pci/devices/0000:10:00.0/numa_node", "1\n")?;
    tree.write("sys/bus/pci/devices/0000:11:00.0/numa_node", "-1\n")?;
    let (place, process, control) = Place::sampling(Options {
        node: tree.settings(),
        environment: driver.environment(),
        ..Options::default()
    })?;
    Ok(((place, process, tree), control))
}

#[test]
fn parts_are_those_of_now_and_a_driver_that_starts_anew_loses_no_device() -> Result<()> {
    let driver = StandIn::new(&eight())?;
    let (_place, _process, mut control) = driver.sampling()?;
    control.accelerators("devices", |rows| rows.len() == 14)?;
    // Number 7 is divided otherwise; then it does not answer: its parts of now are known, no others.
    let parts = |lost: &str| -> String {
        let lines = eight();
        let lines = lines.lines().filter(|line| !line.starts_with("part 7"));
        let lines = lines
            .map(|line| format!("{line}\n").replace("uuid=GPU-7", &format!("uuid=GPU-7{lost}")));
        lines.collect::<String>() + "part 7 2 uuid=MIG-new mem=42949672960 sms=60 slices=3\n"
    };
    driver.describe(&parts(""))?;
    let rows = control.accelerators("another part", |rows| row_of(rows, "MIG-new").is_ok())?;
    ensure!(rows.len() == 12 && row_of(&rows, "MIG-new")?.profile == "3g.40gb");
    driver.describe(&parts(" lost=1"))?;
    let rows = control.accelerators("a lost device", |rows| rows.iter().any(|row| !row.healthy))?;
    let mut lost: Vec<&str> = rows
        .iter()
        .filter(|row| !row.healthy)
        .map(|row| row.id.as_str())
        .collect();
    lost.sort_unstable();
    ensure!(lost == ["GPU-7", "MIG-new"], "{lost:?}");
    // Its memory can no longer be repaired: not a fault that is forgotten.
    driver.describe(&eight().replace("uuid=GPU-3", "uuid=GPU-3 norows=1"))?;
    let rows = control.accelerators("memory beyond repair", |rows| {
        row_of(rows, "GPU-3").is_ok_and(|row| !row.healthy)
    })?;
    ensure!(row_of(&rows, "GPU-3")?.fault == Some(64));
    ensure!(rows.iter().filter(|row| !row.healthy).count() == 1);
    // The driver is unloaded under our feet, and does not start again: all devices are known.
    driver.describe(&format!("{}uninitialized\ninit 9\n", eight()))?;
    let rows = control.accelerators("no device that works", |rows| {
        rows.iter().all(|row| !row.healthy)
    })?;
    ensure!(rows.len() == 14, "{rows:?}");
    ensure!(
        rows.iter()
            .all(|row| row.counters.memory_used_bytes.is_none())
    );
    Ok(())
}

/// Sixteen devices, in seven parts each from one on.
fn sixteen(divided_from: u32) -> String {
    let mut text = String::new();
    for device in 0..16 {
        text += &format!(
            "device {device} uuid=GPU-{device} name=Stand-in mem=85899345920 pci=00000000:{:02X}:00.0 mig={}\n",
            16 + device,
            u8::from(device >= divided_from),
        );
        for part in (0..7).filter(|_| device >= divided_from) {
            text += &format!("part {device} {part} uuid=MIG-{device}-{part} mem=10200547328\n");
        }
    }
    text
}

fn options(tree: &DeviceTree, driver: &StandIn) -> Options {
    Options {
        node: tree.settings(),
        environment: driver.environment(),
        ..Options::default()
    }
}

#[test]
fn where_there_is_no_room_parts_are_left_out_and_nothing_else() -> Result<()> {
    // No such devices on the bus, so room for 64 rows.
    let driver = StandIn::new(&sixteen(0))?;
    let tree = DeviceTree::new()?;
    let (_place, process, mut control) = Place::sampling(options(&tree, &driver))?;
    let rows = control.accelerators("devices", |rows| !rows.is_empty())?;
    ensure!(rows.len() == 64, "{}", rows.len());
    let whole = rows.iter().filter(|row| row.part_of.is_none());
    ensure!(whole.count() == 16, "{rows:?}");
    let tick = |control: &mut Control| -> Option<u64> {
        let snapshot = control.observed.snapshot().ok()?;
        let node = snapshot.node.as_ref()?;
        (node.counters.accelerators_found == Some(128)).then_some(node.tick)
    };
    // Passes go on, with the same rows, and the log says it once.
    let before = until("a pass", || tick(&mut control))?;
    until("later passes", || {
        tick(&mut control).filter(|now| *now > before + 5)
    })?;
    let again = control.accelerators("devices", |rows| !rows.is_empty())?;
    ensure!(
        again
            .iter()
            .map(|row| row.key)
            .eq(rows.iter().map(|row| row.key))
    );
    let told = process.log().matches("more accelerators than").count();
    ensure!(told == 1, "told {told} times: {}", process.log());
    // What was left out comes when there is room.
    driver.describe(&sixteen(10))?;
    control.accelerators("all parts of the last six", |rows| {
        let parts = rows
            .iter()
            .filter(|row| row.part_of.is_some_and(|whole| whole >= 10));
        rows.len() == 16 + 6 * 7 && parts.count() == 6 * 7
    })?;
    Ok(())
}

#[test]
fn there_is_room_for_all_parts_of_what_the_bus_has() -> Result<()> {
    let driver = StandIn::new(&sixteen(0))?;
    let tree = DeviceTree::new()?;
    for device in 0..16 {
        tree.pci_class(&format!("0000:{:02x}:00.0", 16 + device), "0x030200\n")?;
    }
    let (_place, process, mut control) = Place::sampling(options(&tree, &driver))?;
    let rows = control.accelerators("devices", |rows| !rows.is_empty())?;
    ensure!(rows.len() == 128, "{}", rows.len());
    ensure!(!process.log().contains("more accelerators than"));
    Ok(())
}

#[test]
fn use_is_attributed_to_containers() -> Result<()> {
    let id = |digit: &str| digit.repeat(64);
    let (Some(mut first), Some(mut second)) =
        (TestCgroup::new(&id("a"))?, TestCgroup::new(&id("b"))?)
    else {
        return Ok(());
    };
    let pids = [
        first.run("exec sleep 1000")?,
        first.run("exec sleep 1000")?,
        second.run("exec sleep 1000")?,
    ];
    until("the processes in their cgroups", || {
        pids.iter()
            .all(|pid| {
                std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line.starts_with("sleep"))
            })
            .then_some(())
    })?;
    let own = std::process::id();
    let [a, b, c] = pids;
    let driver = StandIn::new(&format!(
        "{}process 0 pid={a} mem=1000 sm=20 enc=4 dec=1\nprocess 0 pid={b} mem=500 sm=30 enc=3 draws=2\n\
         process 0 pid={c} mem=77 sm=5\nprocess 0 pid={own} mem=123456 sm=40 enc=90\n\
         process 1 pid={c} mem=9 sm=1 draws=1\nprocess 3 pid={c} mem=5 sm=2 enc=9\nprocess 6 pid={a} part=1 mem=4096\n\
         process 7 pid={c} part=0 mem=11\nprocess 7 pid={b} part=1 mem=12\nprocess 7 pid={a} part=4 mem=13\n",
        eight()
            .replace("uuid=GPU-3 ", "uuid=GPU-3 noutil=1 ")
            .replace("uuid=GPU-7 ", "uuid=GPU-7 nolist=1 ")
    ))?;
    let (_place, _process, mut control) = driver.sampling()?;
    let mut row = container_row(1);
    row.container_id = id("a").parse()?;
    row.cgroup_path.clone_from(&first.path);
    control.write(|batch| batch.put_container(row.clone()))?;
    let rows =
        control.accelerators("users", |rows| rows.iter().any(|row| !row.users.is_empty()))?;
    let (a, b): (ContainerId, ContainerId) = (id("a").parse()?, id("b").parse()?);
    let uses = |name: &str| -> Result<Vec<_>> {
        Ok(row_of(&rows, name)?
            .users
            .iter()
            .map(|user| {
                (
                    user.container_id,
                    user.memory_bytes,
                    user.utilisation_permille,
                )
            })
            .collect())
    };
    // Two processes of one container are one use; the host's own process is nobody's.
    ensure!(
        uses("GPU-0")? == [(a, Some(1500), Some(500)), (b, Some(77), Some(50))],
        "{:?}",
        uses("GPU-0")
    );
    ensure!(uses("GPU-1")? == [(b, Some(9), Some(10))]);
    ensure!(uses("GPU-2")?.is_empty());
    // Under MIG the driver tells memory by instance and no utilisation: unknown, not zero.
    ensure!(uses("MIG-6-1")? == [(a, Some(4096), None)]);
    ensure!(uses("GPU-6")?.is_empty());
    // Instances that do not tell their processes: the whole device does, with the ids of the instance.
    // Of the last one the ids are unknown, and so is who uses it.
    ensure!(uses("MIG-7-0")? == [(b, Some(11), None)]);
    ensure!(uses("MIG-7-1")? == [(a, Some(12), None)]);
    ensure!(uses("MIG-7-4")?.is_empty() && uses("GPU-7")?.is_empty());
    // Encoders and decoders by process too; the device's own (10 and 200) are no container's.
    let coders = |name: &str| -> Result<Vec<_>> {
        let users = &row_of(&rows, name)?.users;
        let coders = users.iter();
        Ok(coders
            .map(|user| (user.encoder_permille, user.decoder_permille))
            .collect())
    };
    ensure!(coders("GPU-0")? == [(Some(70), Some(10)), (Some(0), Some(0))]);
    ensure!(coders("GPU-3")? == [(None, None)] && coders("MIG-6-1")? == [(None, None)]);
    // A driver that samples no processes: unknown too, and no copy of the device's own load.
    ensure!(uses("GPU-3")? == [(b, Some(5), None)]);
    // Per process what it uses on all its devices; unknown is the sum of something and an unknown.
    let told = until("use of processes", || {
        let listing = control.observed.processes().ok()?;
        let used = [pids[0], pids[1]].map(|pid| {
            let process = listing.list.iter().find(|process| process.pid == pid)?;
            let found = &process.counters;
            found.accelerator_memory_bytes?;
            Some((
                found.accelerator_memory_bytes,
                found.accelerator_utilisation_permille,
            ))
        });
        Some([used[0]?, used[1]?])
    })?;
    ensure!(told == [(Some(5096), None), (Some(512), None)], "{told:?}");
    Ok(())
}

#[test]
fn a_call_that_never_returns_makes_nothing_else_late() -> Result<()> {
    let driver = StandIn::new(&eight())?;
    let (_place, _process, mut control) = driver.sampling()?;
    let row = container_row(1);
    control.write(|batch| batch.put_container(row.clone()))?;
    control.accelerators("devices", |rows| rows.len() == 14)?;
    driver.describe(&format!("{}hang\n", eight()))?;
    let hung = Instant::now();
    let (mut ticks, mut last) = (0u32, 0u64);
    // The devices turn faulty, and meanwhile the passes of everything else go on.
    let rows = until("faulty devices", || {
        let rows = control.observed.snapshot().ok()?.accelerators.clone();
        if rows.first().is_some_and(|row| row.tick != last) {
            last = rows[0].tick;
            ticks += 1;
        }
        rows.iter().all(|row| !row.healthy).then_some(rows)
    })?;
    ensure!(hung.elapsed() > Duration::from_secs(5));
    ensure!(rows.len() == 14, "known devices stay known");
    ensure!(
        rows.iter()
            .all(|row| row.counters.utilisation_permille.is_none())
    );
    ensure!(rows[0].counters.memory_total_bytes == Some(85_899_345_920));
    ensure!(ticks > 20, "{ticks} passes in {:?}", hung.elapsed());
    let sample = control.sample(row.container_id, |_| true)?;
    ensure!(sample.tick >= last);
    driver.describe(&eight())?;
    control.accelerators("devices that answer again", |rows| {
        rows.iter().all(|row| row.healthy)
    })?;
    Ok(())
}

#[test]
fn lost_devices_and_faults_are_told_and_recover() -> Result<()> {
    let driver = StandIn::new(&eight())?;
    let (_place, process, mut control) = driver.sampling()?;
    control.accelerators("devices", |rows| rows.len() == 14)?;
    // Number 7 falls off the bus in the middle of its life, number 1 stops answering.
    let gone: String = eight()
        .lines()
        .filter(|line| !line.contains("device 7") && !line.contains("part 7"))
        .map(|line| match line.strip_prefix("device 1 ") {
            Some(rest) => format!("device 1 {rest} lost=1\n"),
            None => format!("{line}\n"),
        })
        .collect();
    driver.describe(&gone)?;
    let faulty = |rows: &[AcceleratorRow]| -> Vec<String> {
        let mut ids: Vec<String> = rows
            .iter()
            .filter(|row| !row.healthy)
            .map(|row| row.id.clone())
            .collect();
        ids.sort();
        ids
    };
    let rows = control.accelerators("lost devices", |rows| {
        faulty(rows) == ["GPU-1", "GPU-7", "MIG-7-0", "MIG-7-1", "MIG-7-4"]
    })?;
    ensure!(rows.len() == 14);
    ensure!(row_of(&rows, "GPU-1")?.counters.memory_used_bytes.is_none());
    driver.describe(&eight())?;
    control.accelerators("all devices", |rows| faulty(rows).is_empty())?;
    // A fault that an application causes is told; one of the device makes it unusable.
    driver.describe(&format!("{}xid 2 31 1\n", eight()))?;
    let rows = control.accelerators("an application's fault", |rows| {
        row_of(rows, "GPU-2").is_ok_and(|row| row.fault == Some(31))
    })?;
    ensure!(faulty(&rows).is_empty());
    driver.describe(&format!("{}xid 2 79 2\n", eight()))?;
    let rows = control.accelerators("a device's fault", |rows| {
        row_of(rows, "GPU-2").is_ok_and(|row| row.fault == Some(79))
    })?;
    ensure!(faulty(&rows) == ["GPU-2"]);
    ensure!(process.log().contains("reports a fault"));
    // An error of two bits in a device's memory is one of the device, and counts as XID 48.
    driver.describe(&format!("{}ecc 3 3\n", eight()))?;
    let rows = control.accelerators("an error of memory", |rows| {
        row_of(rows, "GPU-3").is_ok_and(|row| row.fault == Some(48))
    })?;
    ensure!(faulty(&rows) == ["GPU-2", "GPU-3"]);
    // Reset: it goes away, and comes back as good as new.
    let reset = eight()
        .replace("device 2 uuid=GPU-2", "device 2 uuid=GPU-2 lost=1")
        .replace("device 3 uuid=GPU-3", "device 3 uuid=GPU-3 lost=1");
    driver.describe(&reset)?;
    control.accelerators("devices being reset", |rows| {
        ["GPU-2", "GPU-3"]
            .iter()
            .all(|id| row_of(rows, id).is_ok_and(|row| row.counters.memory_used_bytes.is_none()))
    })?;
    driver.describe(&eight())?;
    control.accelerators("a device after its reset", |rows| faulty(rows).is_empty())?;
    Ok(())
}

#[test]
fn without_a_driver_there_are_no_devices_and_no_thread() -> Result<()> {
    let place = Place::new(Options {
        environment: nvml::none(),
        ..Options::default()
    })?;
    let mut control = place.control()?;
    let process = place.start()?;
    control.no_accelerators()?;
    until("the end of the thread", || {
        let names = process.threads();
        (!names.is_empty()
            && names
                .iter()
                .all(|name| !["nvml", "rocm", "tpu"].contains(&name.as_str())))
        .then_some(())
    })
}
