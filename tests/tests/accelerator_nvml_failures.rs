//! NVIDIA's driver answers late, or fails to answer one thing of many: what is not known is told as
//! not known, what was known is as old as it is, and nothing of one container becomes another's. The
//! driver is a stand-in with the real C ABI.

use std::time::Instant;

use anyhow::{Result, ensure};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, container_row, until};
use harness::device_tree::DeviceTree;
use harness::nvml::{StandIn, row_of};
use shared::ids::ContainerId;
use shared::observed::{AcceleratorRow, AcceleratorUse};

fn device(number: u32, more: &str) -> String {
    format!(
        "device {number} uuid=GPU-{number} mem=85899345920 used={} util={} pci=00000000:{:02X}:00.0{more}\n",
        1000 + number,
        10 + number,
        16 + number
    )
}

fn devices(count: u32) -> String {
    (0..count).map(|number| device(number, "")).collect()
}

/// Containers with their memory, and whether others may use the device too.
type Users = (Vec<(ContainerId, Option<u64>)>, bool);

fn users(rows: &[AcceleratorRow], id: &str) -> Option<Users> {
    let row = row_of(rows, id).ok()?;
    let memory = |user: &AcceleratorUse| (user.container_id, user.memory_bytes);
    Some((row.users.iter().map(memory).collect(), row.users_unknown))
}

#[test]
fn processes_that_cannot_be_listed_are_unknown_users_and_no_container_gets_their_share()
-> Result<()> {
    let id = |digit: &str| digit.repeat(64);
    let (Some(mut first), Some(mut second)) =
        (TestCgroup::new(&id("a"))?, TestCgroup::new(&id("b"))?)
    else {
        return Ok(());
    };
    let both = first.run("exec sleep 1000")?;
    let other = second.run("exec sleep 1000")?;
    let client = second.run("exec sleep 1000")?;
    until("the processes in their cgroups", || {
        let running = [both, other, client].iter().all(|pid| {
            let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline"));
            line.is_ok_and(|line| line.starts_with("sleep"))
        });
        running.then_some(())
    })?;
    let (a, b): (ContainerId, ContainerId) = (id("a").parse()?, id("b").parse()?);
    // The last one computes by way of the Multi-Process Service, whose server is the host's.
    let text = format!(
        "{}process 0 pid={both} mem=100 sm=10\nprocess 1 pid={both} mem=7 sm=1\nprocess 0 pid={other} mem=30 sm=20\n\
         process 0 pid={client} mem=5 sm=3 mps=1\nprocess 0 pid={} mem=999\n",
        devices(2),
        std::process::id(),
    );
    let driver = StandIn::new(&text)?;
    let (_place, process, mut control) = driver.sampling()?;
    let mut container = container_row(1);
    container.container_id = a;
    container.cgroup_path.clone_from(&first.path);
    control.write(|batch| batch.put_container(container.clone()))?;
    let all = || Some((vec![(a, Some(100)), (b, Some(35))], false));
    let none = || Some((Vec::new(), true));
    let memory_of_process = |control: &mut Control| -> Option<Option<u64>> {
        let listing = control.observed.processes().ok()?;
        let found = listing.list.iter().find(|process| process.pid == both)?;
        Some(found.counters.accelerator_memory_bytes)
    };
    let at_rest = |control: &mut Control| -> Result<()> {
        driver.describe(&text)?;
        control.accelerators("all users", |rows| users(rows, "GPU-0") == all())?;
        until("memory of a process", || {
            (memory_of_process(control)? == Some(107)).then_some(())
        })
    };
    const COMPUTE: &str = "nvmlDeviceGetComputeRunningProcesses_v3";
    for failure in [
        format!("fails {COMPUTE} 0 999"),
        "fails nvmlDeviceGetGraphicsRunningProcesses_v3 0 10".to_owned(),
        format!("grows {COMPUTE} 1000000"),
    ] {
        at_rest(&mut control)?;
        driver.describe(&format!("{text}{failure}\n"))?;
        let rows = control.accelerators(&failure, |rows| users(rows, "GPU-0") != all())?;
        ensure!(users(&rows, "GPU-0") == none(), "{failure}: {rows:?}");
        ensure!(row_of(&rows, "GPU-0")?.healthy && row_of(&rows, "GPU-0")?.age_ms < 10_000);
        if failure.starts_with("fails") {
            let other = Some((vec![(a, Some(7))], false));
            ensure!(users(&rows, "GPU-1") == other, "{rows:?}");
        }
        // Not what it uses of the other device alone.
        until("unknown memory of a process", || {
            let told = memory_of_process(&mut control)?;
            assert!(told.is_none() || told == Some(107), "{failure}: {told:?}");
            told.is_none().then_some(())
        })?;
    }
    at_rest(&mut control)?;
    // Told once per time, and not at each look.
    let told = process.log().matches("cannot be listed").count();
    ensure!(
        (3..=4).contains(&told),
        "told {told} times: {}",
        process.log()
    );
    // A list that has grown while it was read is read again.
    driver.describe(&format!(
        "{text}grows {COMPUTE} 2\nprocess 1 pid={other} mem=1\n"
    ))?;
    control.accelerators("a list that grows", |rows| {
        users(rows, "GPU-1") == Some((vec![(a, Some(7)), (b, Some(1))], false))
            && users(rows, "GPU-0") == all()
    })?;
    // What is told is told; whether it is all is not known: of clients of the service, of a process
    // that is not to be found, and where the driver lists none at all.
    for (line, known) in [
        (
            "fails nvmlDeviceGetMPSComputeRunningProcesses_v3 0 999",
            vec![(a, Some(100)), (b, Some(30))],
        ),
        (
            "process 0 pid=4194305 mem=64",
            vec![(a, Some(100)), (b, Some(35))],
        ),
        (
            "fails nvmlDeviceGetComputeRunningProcesses_v3 0 3",
            Vec::new(),
        ),
    ] {
        at_rest(&mut control)?;
        driver.describe(&format!("{text}{line}\n"))?;
        control.accelerators(line, |rows| {
            users(rows, "GPU-0") == Some((known.clone(), true))
        })?;
    }
    // A client of the service is not idle because the driver has no sample of it.
    at_rest(&mut control)?;
    driver.describe(&text.replace("sm=3 mps=1", "mps=2"))?;
    control.accelerators("an unknown share", |rows| {
        let shares = row_of(rows, "GPU-0").map(|row| {
            let users = row.users.iter();
            users.map(|user| user.utilisation_permille).collect()
        });
        users(rows, "GPU-0") == all() && shares.ok() == Some(vec![Some(100), None])
    })?;
    // Samples of who is busy fail: memory is told, shares are not.
    at_rest(&mut control)?;
    driver.describe(&format!(
        "{text}fails nvmlDeviceGetProcessUtilization 0 999\n"
    ))?;
    control.accelerators("unknown shares", |rows| {
        users(rows, "GPU-0") == all()
            && row_of(rows, "GPU-0").is_ok_and(|row| {
                let mut users = row.users.iter();
                users.all(|user| user.utilisation_permille.is_none())
            })
    })?;
    // A list that never comes: old numbers are not told, of nobody.
    at_rest(&mut control)?;
    driver.describe(&format!("{text}hangs {COMPUTE}\n"))?;
    let rows = control.accelerators("a list that hangs", |rows| {
        rows.iter().all(|row| !row.healthy)
    })?;
    ensure!(
        users(&rows, "GPU-0") == Some((vec![(a, None), (b, None)], true)),
        "{rows:?}"
    );
    at_rest(&mut control)
}

#[test]
fn a_device_that_fails_to_answer_is_as_old_as_it_is_and_keeps_its_fault() -> Result<()> {
    let text = devices(3);
    // At first it can't be asked to tell its faults.
    let driver = StandIn::new(&format!("{text}fails nvmlDeviceRegisterEvents 1 999\n"))?;
    let (_place, process, mut control) = driver.sampling()?;
    let fault = |rows: &[AcceleratorRow], id: &str| {
        row_of(rows, id).map_or((true, None), |row| (row.healthy, row.fault))
    };
    control.accelerators("devices", |rows| rows.len() == 3)?;
    ensure!(process.log().contains("can't be asked to tell its faults"));
    driver.describe(&format!("{text}xid 1 79 1\n"))?;
    control.accelerators("a fault", |rows| fault(rows, "GPU-1") == (false, Some(79)))?;
    // Two of them do not answer one question for a while.
    let failing = "fails nvmlDeviceGetUUID 1 999\nfails nvmlDeviceGetMemoryInfo_v2 2 10\n";
    driver.describe(&format!("{text}{failing}"))?;
    let rows = control.accelerators("old numbers", |rows| {
        row_of(rows, "GPU-2").is_ok_and(|row| row.age_ms > 5_000)
    })?;
    let kept = row_of(&rows, "GPU-2")?;
    ensure!(kept.healthy && kept.counters.memory_used_bytes == Some(1002));
    ensure!(kept.counters.utilisation_permille == Some(120));
    ensure!(row_of(&rows, "GPU-0")?.age_ms < 5_000, "{rows:?}");
    let rows = control.accelerators("a faulty device", |rows| {
        row_of(rows, "GPU-2").is_ok_and(|row| !row.healthy)
    })?;
    ensure!(row_of(&rows, "GPU-2")?.age_ms >= 10_000 && row_of(&rows, "GPU-0")?.healthy);
    // It was not away, so it is not a new one.
    driver.describe(&text)?;
    let rows = control.accelerators("devices that answer", |rows| {
        rows.iter().all(|row| row.age_ms < 4_000)
    })?;
    ensure!(fault(&rows, "GPU-1") == (false, Some(79)), "{rows:?}");
    ensure!(fault(&rows, "GPU-2") == (true, None), "{rows:?}");
    // Off the bus at once, and back after a reset, as good as new.
    driver.describe(&text.replace("uuid=GPU-1", "uuid=GPU-1 lost=1"))?;
    control.accelerators("a device off the bus", |rows| {
        row_of(rows, "GPU-1").is_ok_and(|row| row.counters.memory_used_bytes.is_none())
    })?;
    driver.describe(&text)?;
    control.accelerators("a device after its reset", |rows| {
        fault(rows, "GPU-1") == (true, None)
    })?;
    // How many there are is not told for a while, then the driver is another one: it is opened anew,
    // and nobody waits long for it.
    driver.describe(&format!("{text}fails nvmlDeviceGetCount_v2 -1 999\n"))?;
    let rows = control.accelerators("old devices", |rows| {
        rows.iter().all(|row| row.age_ms > 4_000)
    })?;
    ensure!(rows.len() == 3 && rows.iter().all(|row| row.healthy));
    driver.describe(&text)?;
    control.accelerators("devices", |rows| rows.iter().all(|row| row.age_ms < 4_000))?;
    ensure!(!process.log().contains("has to be opened again"));
    Ok(())
}

#[test]
fn devices_without_error_correction_tell_faults_and_those_that_are_not_ready_are_not_given_out()
-> Result<()> {
    let text = device(0, " noecc=1") + &device(1, "");
    let driver = StandIn::new(&text)?;
    let (_place, process, mut control) = driver.sampling()?;
    control.accelerators("devices", |rows| rows.len() == 2)?;
    driver.describe(&format!("{text}xid 0 48 1\n"))?;
    let rows = control.accelerators("a fault", |rows| {
        row_of(rows, "GPU-0").is_ok_and(|row| !row.healthy)
    })?;
    ensure!(row_of(&rows, "GPU-0")?.fault == Some(48) && row_of(&rows, "GPU-1")?.healthy);
    let drained = device(0, " noecc=1") + &device(1, " drained=1");
    driver.describe(&drained)?;
    let rows = control.accelerators("a drained device", |rows| {
        row_of(rows, "GPU-1").is_ok_and(|row| !row.healthy)
    })?;
    let found = row_of(&rows, "GPU-1")?;
    ensure!(found.fault.is_none() && found.counters.memory_used_bytes == Some(1001));
    // A question that fails is no answer, and a driver that has none drains no device.
    driver.describe(&format!("{drained}fails nvmlDeviceQueryDrainState 1 999\n"))?;
    let tick = found.tick;
    let rows = control.accelerators("later looks", |rows| {
        row_of(rows, "GPU-1").is_ok_and(|row| row.tick > tick + 50)
    })?;
    ensure!(!row_of(&rows, "GPU-1")?.healthy);
    driver.describe(&format!("{drained}fails nvmlDeviceQueryDrainState 1 3\n"))?;
    control.accelerators("a device given out again", |rows| {
        row_of(rows, "GPU-1").is_ok_and(|row| row.healthy)
    })?;
    ensure!(process.log().matches("is drained").count() == 2);
    // Wired to NVSwitches: given out when it has joined them.
    let steps = [
        (" fabric=2", "", false),
        (" fabric=3", "", true),
        // By the call of older drivers.
        (
            " fabric=3 fabric_status=999",
            "fails nvmlDeviceGetGpuFabricInfoV 1 25\n",
            false,
        ),
        (" fabric=0", "", true),
    ];
    for (state, more, joined) in steps {
        let text = device(0, " noecc=1") + &device(1, state) + more;
        driver.describe(&text)?;
        control.accelerators(state, |rows| {
            row_of(rows, "GPU-1").is_ok_and(|row| row.healthy == joined)
        })?;
    }
    ensure!(
        process
            .log()
            .matches("not registered with its NVSwitches")
            .count()
            == 2
    );
    Ok(())
}

#[test]
fn a_driver_that_takes_long_makes_numbers_old_and_no_device_faulty() -> Result<()> {
    // Each look takes longer than a silent driver is given.
    let driver = StandIn::new(&format!("{}slow 150\n", devices(4)))?;
    let (_place, process, mut control) = driver.sampling()?;
    control.accelerators("devices", |rows| rows.len() == 4)?;
    let began = Instant::now();
    let mut oldest = 0;
    let rows = until("an old look, and the next one", || {
        let rows = control.observed.snapshot().ok()?.accelerators.clone();
        let bad = rows
            .iter()
            .any(|row| !row.healthy || row.counters.memory_used_bytes.is_none());
        let age = rows.first().map_or(0, |row| row.age_ms);
        let next = age < oldest && oldest > 10_000;
        oldest = oldest.max(age);
        (bad || next || rows.len() != 4).then_some(rows)
    })?;
    ensure!(rows.len() == 4 && rows.iter().all(|row| row.healthy));
    ensure!(oldest > 10_000, "{oldest} ms in {:?}", began.elapsed());
    ensure!(
        rows.iter()
            .all(|row| row.counters.memory_used_bytes.is_some())
    );
    let told = process.log().matches("takes long").count();
    ensure!(told == 1, "{}", process.log());
    Ok(())
}

#[test]
fn devices_of_every_kind_of_node_are_told() -> Result<()> {
    // More of them than know their distance to each other; one whose memory is the host's.
    let text = devices(79) + &device(79, " nomem=1");
    let driver = StandIn::new(&text)?;
    let tree = DeviceTree::new()?;
    for number in 0..80 {
        tree.pci_class(&format!("0000:{:02x}:00.0", 16 + number), "0x030200\n")?;
    }
    let (_place, _process, mut control) = Place::sampling(Options {
        node: tree.settings(),
        environment: driver.environment(),
        ..Options::default()
    })?;
    let rows = control.accelerators("80 devices", |rows| rows.len() == 80)?;
    ensure!(rows.iter().all(|row| row.healthy), "{rows:?}");
    let last = row_of(&rows, "GPU-79")?;
    ensure!(
        last.counters.memory_total_bytes.is_none() && last.counters.memory_used_bytes.is_none()
    );
    ensure!(last.counters.utilisation_permille == Some(890));
    let before = row_of(&rows, "GPU-78")?;
    ensure!(before.counters.memory_used_bytes == Some(1078));
    ensure!(before.near[0].is_known() && before.near[63].is_known());
    // The driver is loaded anew under a running agent.
    driver.describe(&format!("{text}uninitialized\n"))?;
    control.accelerators("a driver that is away", |rows| {
        rows.iter().any(|row| row.age_ms > 3_000)
    })?;
    driver.describe(&text)?;
    control.accelerators("80 devices again", |rows| {
        rows.len() == 80 && rows.iter().all(|row| row.healthy && row.age_ms < 3_000)
    })?;
    Ok(())
}
