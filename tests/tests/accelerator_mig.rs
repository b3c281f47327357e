//! MIG instances: how busy each is, what kind of part it is, and that one answer which fails neither
//! makes an instance go nor a divided device whole. The driver is a stand-in with the real C ABI.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use harness::dataplane::{container_row, until};
use harness::nvml::{StandIn, row_of};
use shared::observed::AcceleratorRow;

/// One device with performance monitoring, cut into three GPU instances of one compute instance and
/// one of two; and one without.
const DEVICES: &str = "\
device 0 uuid=GPU-0 name=Stand-in_H200 mem=150754820096 used=4096 util=77 pci=00000000:10:00.0 mig=1 gpm=1
part 0 0 uuid=MIG-a mem=17179869184 used=11 sms=16 slices=1 gi=9 ci=0 gr=41.5 smu=30 dram=12.25
part 0 1 uuid=MIG-b mem=74893492224 used=12 sms=60 slices=3 gi=2 ci=0 smu=20
part 0 2 uuid=MIG-c name=Stand-in_H200_MIG_1g.18gb+me mem=17179869184 used=13 sms=16 slices=1 gi=10 ci=0 gr=0 dram=0
part 0 3 uuid=MIG-d mem=74893492224 used=14 sms=20 slices=3 cslices=1 gi=1 ci=0 gr=90 dram=80
part 0 4 uuid=MIG-e mem=74893492224 used=15 sms=40 slices=3 cslices=2 gi=1 ci=1 gr=90 dram=80
device 1 uuid=GPU-1 name=Stand-in_A100 mem=42949672960 util=78 pci=00000000:11:00.0 mig=1
part 1 0 uuid=MIG-f mem=5100273664 used=16 sms=14 slices=1 gi=7 ci=0 gr=50 smu=51 dram=52
";

const ALL: [&str; 8] = [
    "GPU-0", "GPU-1", "MIG-a", "MIG-b", "MIG-c", "MIG-d", "MIG-e", "MIG-f",
];

/// Busy shares of the processors and of the memory's bandwidth.
fn load(rows: &[AcceleratorRow], id: &str) -> Option<(Option<u64>, Option<u64>)> {
    let counters = &row_of(rows, id).ok()?.counters;
    Some((
        counters.utilisation_permille,
        counters.memory_utilisation_permille,
    ))
}

fn ids(rows: &[AcceleratorRow]) -> Vec<&str> {
    let mut ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    ids.sort_unstable();
    ids
}

fn faulty(rows: &[AcceleratorRow]) -> Vec<&str> {
    let mut ids: Vec<&str> = rows
        .iter()
        .filter(|row| !row.healthy)
        .map(|row| row.id.as_str())
        .collect();
    ids.sort_unstable();
    ids
}

const UNKNOWN: Option<(Option<u64>, Option<u64>)> = Some((None, None));

#[test]
fn the_load_of_an_instance_is_its_own() -> Result<()> {
    // Room for a sample of each of the three and one more: none that is old is kept.
    let driver = StandIn::new(&format!("{DEVICES}samples 4\n"))?;
    let (_place, _process, mut control) = driver.sampling()?;
    let rows = control.accelerators("loads", |rows| {
        ["MIG-a", "MIG-b", "MIG-c"]
            .iter()
            .all(|id| load(rows, id).is_some_and(|load| load.0.is_some()))
    })?;
    ensure!(ids(&rows) == ALL, "{rows:?}");
    ensure!(load(&rows, "MIG-a") == Some((Some(415), Some(123))));
    // A driver that does not tell the first of the metrics, and none of the memory.
    ensure!(load(&rows, "MIG-b") == Some((Some(200), None)));
    ensure!(load(&rows, "MIG-c") == Some((Some(0), Some(0))), "idle");
    // Two share a GPU instance; of the device before Hopper none is told; of neither device the total.
    for unknown in ["MIG-d", "MIG-e", "MIG-f", "GPU-0", "GPU-1"] {
        ensure!(load(&rows, unknown) == UNKNOWN, "{unknown}: {rows:?}");
    }
    for (id, profile) in [
        ("MIG-a", "1g.18gb"),
        ("MIG-b", "3g.71gb"),
        ("MIG-c", "1g.18gb.me"),
        ("MIG-d", "1c.3g.71gb"),
        ("MIG-e", "2c.3g.71gb"),
        ("MIG-f", "1g.5gb"),
    ] {
        let found = &row_of(&rows, id)?.profile;
        ensure!(found == profile, "{id}: {found}");
    }
    // Look after look, each with a sample of its own. That a question about what a device is fails for a
    // while does not make it another device.
    let failing: String = [
        "nvmlDeviceGetName",
        "nvmlDeviceGetNumGpuCores",
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetPciInfo_v3",
        "nvmlDeviceGetMinorNumber",
    ]
    .map(|call| format!("fails {call} -1 999\n"))
    .concat();
    for (share, failing) in [(55, ""), (66, failing.as_str()), (77_u64, "")] {
        let changed = DEVICES.replace("gr=41.5", &format!("gr={share}"));
        driver.describe(&format!("{changed}samples 4\n{failing}"))?;
        let now = control.accelerators("another load", |rows| {
            load(rows, "MIG-a") == Some((Some(10 * share), Some(123)))
        })?;
        for row in &rows {
            let now = row_of(&now, &row.id)?;
            let of = |row: &AcceleratorRow| {
                let texts = [&row.model, &row.profile, &row.pci].map(String::clone);
                (texts, row.units, row.minor, row.instance)
            };
            ensure!(of(now) == of(row), "{row:?} has become {now:?}");
            ensure!(row.units.is_some() && row.minor.is_some() && !row.pci.is_empty());
        }
    }
    // Made anew under the ids of another one, which is another instance all the same.
    let anew = DEVICES.replace("uuid=MIG-a", "uuid=MIG-x");
    driver.describe(&format!("{anew}samples 4\n"))?;
    let rows = control.accelerators("the load of a new instance", |rows| {
        load(rows, "MIG-x") == Some((Some(415), Some(123)))
    })?;
    ensure!(row_of(&rows, "MIG-a").is_err(), "{rows:?}");
    ensure!(faulty(&rows).is_empty());
    Ok(())
}

#[test]
fn without_performance_monitoring_the_load_of_instances_is_unknown() -> Result<()> {
    // A library that has no such calls.
    let driver = StandIn::before_520(DEVICES)?;
    let (_place, process, mut control) = driver.sampling()?;
    let rows = control.accelerators("devices", |rows| rows.len() == ALL.len())?;
    let looked = row_of(&rows, "MIG-a")?.tick;
    let rows = control.accelerators("later looks", |rows| {
        row_of(rows, "MIG-a").is_ok_and(|row| row.tick > looked + 50)
    })?;
    for id in ALL {
        ensure!(load(&rows, id) == UNKNOWN, "{id}");
        ensure!(row_of(&rows, id)?.healthy);
    }
    ensure!(row_of(&rows, "MIG-a")?.counters.memory_used_bytes == Some(11));
    drop(process);
    // One that has them, and where they fail: of samples, of numbers, of the question whether there
    // are any. What does not fail is told.
    let driver = StandIn::new(DEVICES)?;
    let (_place, _process, mut control) = driver.sampling()?;
    let known = |rows: &[AcceleratorRow]| load(rows, "MIG-a") == Some((Some(415), Some(123)));
    for failure in [
        "fails nvmlGpmMigSampleGet 0 999",
        "fails nvmlGpmMetricsGet 0 999",
        "fails nvmlGpmSampleAlloc -1 20",
    ] {
        driver.describe(DEVICES)?;
        control.accelerators("loads", known)?;
        driver.describe(&format!("{DEVICES}{failure}\n"))?;
        let rows = control.accelerators(failure, |rows| load(rows, "MIG-a") == UNKNOWN)?;
        ensure!(ids(&rows) == ALL && faulty(&rows).is_empty(), "{rows:?}");
        ensure!(row_of(&rows, "MIG-a")?.counters.memory_used_bytes == Some(11));
    }
    driver.describe(DEVICES)?;
    control.accelerators("loads again", known)?;
    Ok(())
}

#[test]
fn performance_monitoring_that_hangs_makes_nothing_else_late() -> Result<()> {
    let driver = StandIn::new(DEVICES)?;
    let (_place, _process, mut control) = driver.sampling()?;
    let container = container_row(1);
    control.write(|batch| batch.put_container(container.clone()))?;
    control.accelerators("loads", |rows| {
        load(rows, "MIG-a") == Some((Some(415), Some(123)))
    })?;
    driver.describe(&format!("{DEVICES}hangs nvmlGpmMigSampleGet\n"))?;
    let hung = Instant::now();
    let (mut ticks, mut last) = (0u32, 0u64);
    let rows = until("faulty devices", || {
        let rows = control.observed.snapshot().ok()?.accelerators.clone();
        if rows.first().is_some_and(|row| row.tick != last) {
            last = rows[0].tick;
            ticks += 1;
        }
        (rows.len() == faulty(&rows).len()).then_some(rows)
    })?;
    ensure!(hung.elapsed() > Duration::from_secs(5));
    ensure!(ticks > 20, "{ticks} passes in {:?}", hung.elapsed());
    ensure!(ids(&rows) == ALL, "{rows:?}");
    ensure!(
        rows.iter()
            .all(|row| row.counters.memory_used_bytes.is_none())
    );
    ensure!(control.sample(container.container_id, |_| true)?.tick >= last);
    driver.describe(DEVICES)?;
    control.accelerators("devices that answer again", |rows| {
        faulty(rows).is_empty() && load(rows, "MIG-a") == Some((Some(415), Some(123)))
    })?;
    Ok(())
}

#[test]
fn an_answer_that_fails_makes_no_device_whole_and_no_instance_go() -> Result<()> {
    let driver = StandIn::new(DEVICES)?;
    let (_place, process, mut control) = driver.sampling()?;
    let at_rest = |rows: &[AcceleratorRow]| {
        ids(rows) == ALL && faulty(rows).is_empty() && rows.iter().all(|row| row.age_ms < 4_000)
    };
    let of_parts = &["MIG-a", "MIG-b", "MIG-c", "MIG-d", "MIG-e"][..];
    let of_whole = &["GPU-0", "MIG-a", "MIG-b", "MIG-c", "MIG-d", "MIG-e"][..];
    for (failure, silent) in [
        ("fails nvmlDeviceGetMigMode 0 999", of_whole),
        ("fails nvmlDeviceGetMaxMigDeviceCount 0 999", of_whole),
        ("fails nvmlDeviceGetMigDeviceHandleByIndex 0 999", of_parts),
        ("fails nvmlDeviceGetMemoryInfo_v2 0 10 1", &["MIG-b"]),
    ] {
        driver.describe(DEVICES)?;
        control.accelerators("all devices", at_rest)?;
        driver.describe(&format!("{DEVICES}{failure}\n"))?;
        // What does not answer is told as old as it is, for a while; then it is faulty.
        let failed = Instant::now();
        let rows = until("faulty devices", || {
            let rows = control.observed.snapshot().ok()?.accelerators.clone();
            let whole = rows.iter().find(|row| row.id == "GPU-0");
            let as_before = ids(&rows) == ALL && whole.is_some_and(|row| row.divided);
            (!as_before || faulty(&rows).len() >= silent.len()).then_some(rows)
        })?;
        ensure!(ids(&rows) == ALL, "{failure}: {rows:?}");
        ensure!(row_of(&rows, "GPU-0")?.divided, "{failure}: {rows:?}");
        ensure!(faulty(&rows) == silent, "{failure}: {:?}", faulty(&rows));
        ensure!(failed.elapsed() > Duration::from_secs(5), "{failure}");
        let part = row_of(&rows, "MIG-b")?;
        ensure!(part.age_ms >= 10_000 && part.counters.memory_used_bytes.is_none());
        ensure!(part.counters.memory_total_bytes == Some(74_893_492_224));
    }
    driver.describe(DEVICES)?;
    control.accelerators("all devices", at_rest)?;
    // Told once each time that the device itself did not answer.
    let log = process.log();
    let told = log.matches("an NVIDIA device does not answer").count();
    ensure!(told == 2, "told {told} times: {log}");
    Ok(())
}
