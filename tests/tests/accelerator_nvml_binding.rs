//! The stand-in for NVML has the interface that NVIDIA publishes: NVIDIA's own binding for Python, whose
//! structures and constants are those of its headers, reads it, and what the dataplane tells is what it
//! reads. So neither the stand-in nor the dataplane's reading of it can be wrong in a way of its own.

use anyhow::{Context, Result, ensure};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Options, Place};
use harness::nvml::StandIn;
use serde_json::{Value as Json, json};
use shared::ids::ContainerId;
use shared::observed::{AcceleratorRow, AcceleratorUse, MigInstance, Proximity};

/// Three devices that tell all there is, one of them with an encoder only; one that is divided. No two
/// numbers are alike.
const DEVICES: &str = "\
driver 570.86.15
device 0 uuid=GPU-0a name=Stand-in_H200 mem=150323855360 used=7516192768 reserved=637534208 util=31 power=412345 temp=61 pci=00000001:1B:00.0 sms=132 enc=7 dec=9
device 1 uuid=GPU-1b name=Stand-in_H200 mem=150323855361 used=3 reserved=637534209 util=32 power=412346 temp=62 pci=00000000:CA:02.0 sms=131 enc=0 norows=1 noecc=1 fabric=3 fabric_status=999
device 2 uuid=GPU-2c name=Stand-in_H100 mem=85899345920 used=1073741824 reserved=5 util=33 power=412347 temp=63 pci=00000000:DA:00.0 sms=114 noutil=1
device 3 uuid=GPU-3d name=Stand-in_H100 mem=42949672960 used=31457280 reserved=7 util=34 power=412348 temp=64 pci=00000000:0E:00.0 sms=108 mig=1 gpm=1 drained=1 fabric=2
part 3 0 uuid=MIG-3-0 mem=20937965568 used=10485760 reserved=3 sms=42 slices=3 gi=2 ci=0 gr=41.5 smu=37.25 dram=12.75
part 3 5 uuid=MIG-3-5 mem=5100273664 used=20971520 reserved=2 sms=14 slices=1 gi=9 ci=1 smu=99
path 0 1 20
path 0 2 10
path 1 2 30
path 2 3 40
link 0 0 00000000:CA:02.0
link 0 4 00000000:CA:02.0
link 0 5 -
link 1 2 00000001:1B:00.0
link 1 3 00000001:1B:00.0
xid 0 79 1
ecc 2 2
";

/// Fields of a reading by their names; `null` is absent.
struct Told<'j>(&'j Json);

impl<'j> Told<'j> {
    fn of(&self, path: &str) -> Result<&'j Json> {
        let found = self.0.pointer(path);
        found.with_context(|| format!("the binding tells no {path}: {}", self.0))
    }

    fn number(&self, path: &str) -> Result<Option<u64>> {
        Ok(self.of(path)?.as_u64())
    }

    fn text(&self, path: &str) -> Result<&'j str> {
        self.of(path)?.as_str().context("a text")
    }

    fn list(&self, path: &str) -> Result<&'j Vec<Json>> {
        self.of(path)?.as_array().context("a list")
    }

    /// Total memory and what is not free, which both forms of the call have to tell alike.
    fn memory(&self) -> Result<[Option<u64>; 2]> {
        let form = |name: &str| -> Result<Option<[u64; 2]>> {
            let total = self.number(&format!("/memory/{name}/total")).ok().flatten();
            let free = self.number(&format!("/memory/{name}/free")).ok().flatten();
            Ok(total.zip(free).map(|(total, free)| [total, total - free]))
        };
        let (first, second) = (form("v1")?, form("v2")?);
        ensure!(second.is_none() || first == second, "{first:?}, {second:?}");
        Ok(first.context("memory")?.map(Some))
    }

    /// PCI address out of the numbers, not the text.
    fn pci(&self) -> Result<String> {
        let number = |name: &str| -> Result<u64> {
            let found = self.number(&format!("/pci/{name}"))?;
            found.with_context(|| format!("no {name}"))
        };
        let (domain, bus, device) = (number("domain")?, number("bus")?, number("device")?);
        let address = format!("{domain:04x}:{bus:02x}:{device:02x}.0");
        let legacy = self.text("/pci/busIdLegacy")?.to_lowercase();
        ensure!(legacy == address, "{legacy}, {address}");
        Ok(address)
    }
}

fn row<'r>(rows: &'r [AcceleratorRow], id: &str) -> Result<&'r AcceleratorRow> {
    let found = rows.iter().find(|row| row.id == id);
    found.with_context(|| format!("{id} is not told: {rows:?}"))
}

fn permille(percent: Option<u64>) -> Option<u64> {
    percent.map(|percent| percent * 10)
}

/// A device and its parts against what the binding has read; the numbers that are compared differ.
fn compare(told: &Json, all: &Json, rows: &[AcceleratorRow], older: bool) -> Result<()> {
    let told = Told(told);
    let id = told.text("/uuid")?;
    let row = row(rows, id)?;
    let counters = &row.counters;
    ensure!(row.model == told.text("/name")?, "{row:?}");
    ensure!(row.minor.map(u64::from) == told.number("/minor")?);
    ensure!(row.pci == told.pci()?, "{row:?}");
    ensure!(row.divided == (*told.of("/mig")? == json!([1, 1])));
    ensure!(*told.of("/capability")? == json!([9, 0]));
    ensure!(row.units.map(|units| u64::from(units) * 128) == told.number("/cores")?);
    ensure!(
        [counters.memory_total_bytes, counters.memory_used_bytes] == told.memory()?,
        "{row:?}"
    );
    ensure!(told.of("/memory/v2")?.is_null() == older);
    for (ours, path, factor) in [
        (counters.power_mw, "/power_mw", 1),
        (counters.power_limit_mw, "/power_limit_mw", 1),
        (counters.energy_mj, "/energy_mj", 1),
        (counters.temperature_mc, "/temperature_c", 1000),
        (counters.clock_mhz, "/clock_mhz", 1),
        (counters.memory_clock_mhz, "/memory_clock_mhz", 1),
        (counters.pcie_rx_bytes_per_s, "/pcie_rx_kb_per_s", 1000),
        (counters.pcie_tx_bytes_per_s, "/pcie_tx_kb_per_s", 1000),
        (counters.ecc_corrected, "/ecc_corrected", 1),
        (counters.ecc_uncorrected, "/ecc_uncorrected", 1),
    ] {
        let theirs = told.number(path)?.context("a number")?;
        ensure!(
            ours == Some(theirs * factor),
            "{id}{path}: {ours:?}, {theirs}"
        );
    }
    for (ours, path) in [
        (counters.utilisation_permille, "/utilization/gpu"),
        (counters.memory_utilisation_permille, "/utilization/memory"),
        (counters.encoder_permille, "/encoder/0"),
        (counters.decoder_permille, "/decoder/0"),
    ] {
        // What is not supported has no fields at all.
        let theirs = told.0.pointer(path).and_then(Json::as_u64);
        ensure!(ours == permille(theirs), "{id}{path}: {ours:?}, {theirs:?}");
    }
    // Faults: of the event set, and of rows that cannot be replaced, which two calls tell.
    let failed = told.number("/remapped_failure")?;
    ensure!(failed == told.number("/remapped_rows/3")?);
    let events = all["events"].as_array().context("events")?;
    let event = events.iter().find(|event| event[0] == id);
    let fault = match (failed, event) {
        (Some(1), _) => Some(64),
        (_, Some(event)) if event[1] == "ecc" => Some(48),
        (_, Some(event)) => event[2].as_u64(),
        _ => None,
    };
    ensure!(row.fault.map(u64::from) == fault, "{row:?}, {event:?}");
    let drained = told.of("/drained")?.as_u64() == Some(1);
    ensure!(row.healthy == (fault.is_none() && !drained), "{row:?}");
    // Ways: links by the addresses at their ends, else what the driver says of the bus.
    let devices = all["devices"].as_array().context("devices")?;
    for (place, other) in devices.iter().enumerate() {
        let address = Told(other).pci()?;
        let leads = |link: &&Json| {
            let to = link["busId"].as_str().unwrap_or_default().to_lowercase();
            to.ends_with(&address)
        };
        let links = told.list("/links")?.iter().filter(leads).count();
        let near = match (links, told.list("/ways")?[place].as_u64()) {
            (_, None) => Proximity::default(),
            (0, Some(10)) => Proximity::SWITCH,
            (0, Some(20)) => Proximity::SWITCHES,
            (0, Some(30)) => Proximity::HOST_BRIDGE,
            (0, Some(40)) => Proximity::NUMA_NODE,
            (0, _) => Proximity::SYSTEM,
            (links, _) => Proximity::links(u32::try_from(links)?),
        };
        ensure!(
            row.near[place] == near,
            "{id} to {place}: {:?}",
            row.near[place]
        );
    }
    for part in told.list("/parts")? {
        compare_part(&Told(part), row, rows, older)?;
    }
    Ok(())
}

fn compare_part(
    told: &Told<'_>,
    whole: &AcceleratorRow,
    rows: &[AcceleratorRow],
    older: bool,
) -> Result<()> {
    let row = row(rows, told.text("/uuid")?)?;
    ensure!(row.part_of == Some(whole.key.index) && !row.divided);
    let counters = &row.counters;
    ensure!([counters.memory_total_bytes, counters.memory_used_bytes] == told.memory()?);
    let number =
        |path: &str| -> Result<u32> { Ok(u32::try_from(told.number(path)?.context("a number")?)?) };
    let ids = MigInstance {
        gpu: number("/ids/0")?,
        compute: number("/ids/1")?,
    };
    ensure!(row.instance == Some(ids), "{row:?}");
    ensure!(row.units == Some(number("/attributes/multiprocessorCount")?));
    let (slices, mib) = (
        number("/attributes/gpuInstanceSliceCount")?,
        number("/attributes/memorySizeMB")?,
    );
    ensure!(
        row.profile == format!("{slices}g.{}gb", mib.div_ceil(1024)),
        "{row:?}"
    );
    ensure!(counters.power_mw.is_none());
    // Drivers without performance monitoring tell no load of instances.
    let share = |name: &str| -> Option<f64> { told.0.pointer(&format!("/load/{name}"))?.as_f64() };
    let near = |ours: Option<u64>, theirs: Option<f64>| match (ours, theirs) {
        (Some(ours), Some(theirs)) => {
            u32::try_from(ours).is_ok_and(|ours| (f64::from(ours) / 10.0 - theirs).abs() < 0.06)
        }
        (ours, theirs) => ours.is_none() && theirs.is_none(),
    };
    let busy = share("graphics").or(share("processors"));
    ensure!(busy.is_none() == older, "{busy:?}");
    ensure!(near(counters.utilisation_permille, busy), "{row:?}");
    ensure!(
        near(counters.memory_utilisation_permille, share("memory")),
        "{row:?}"
    );
    ensure!(
        share("fp64").is_none(),
        "what the stand-in does not tell has an error of its own"
    );
    // Its processes have its ids, also in the list of the whole device.
    for process in told.list("/processes/compute_v2")? {
        let theirs = (&process["gpuInstanceId"], &process["computeInstanceId"]);
        ensure!(
            theirs == (&json!(ids.gpu), &json!(ids.compute)),
            "{process}"
        );
    }
    Ok(())
}

/// What the binding reads of one container's processes on a device.
fn expected(
    told: &Json,
    container_id: ContainerId,
    pids: &[u32],
) -> Result<Option<AcceleratorUse>> {
    let told = Told(told);
    let mut memory = 0;
    let mut any = false;
    for pid in pids {
        let mut most = None;
        for form in [
            "compute_v2",
            "compute_v3",
            "graphics_v2",
            "graphics_v3",
            "mps_v3",
        ] {
            let listed = told.of(&format!("/processes/{form}"))?.as_array();
            let own = listed
                .into_iter()
                .flatten()
                .filter(|one| one["pid"] == *pid);
            most = most.max(own.filter_map(|one| one["usedGpuMemory"].as_u64()).max());
        }
        any |= most.is_some();
        memory += most.unwrap_or(0);
    }
    let samples = told.0["samples"].as_array();
    let sum = |name: &str| -> Result<Option<u32>> {
        let Some(samples) = samples else {
            return Ok(None);
        };
        let own = samples
            .iter()
            .filter(|one| pids.iter().any(|pid| one["pid"] == *pid));
        let sum: u64 = own.filter_map(|one| one[name].as_u64()).sum();
        Ok(Some(u32::try_from(sum * 10)?))
    };
    let used = AcceleratorUse {
        container_id,
        memory_bytes: Some(memory),
        utilisation_permille: sum("smUtil")?,
        encoder_permille: sum("encUtil")?,
        decoder_permille: sum("decUtil")?,
    };
    Ok(any.then_some(used))
}

fn check(older: bool) -> Result<()> {
    let id = "5".repeat(64);
    let Some(mut group) = TestCgroup::new(&id)? else {
        return Ok(());
    };
    let id: ContainerId = id.parse()?;
    let pids = [(); 3].map(|()| group.run("exec sleep 1000"));
    let pids = pids.into_iter().collect::<Result<Vec<u32>>>()?;
    let [a, b, c] = pids[..] else {
        unreachable!("three were started");
    };
    let devices = format!(
        "{DEVICES}process 0 pid={a} mem=536870912 sm=11 enc=2 dec=1\nprocess 0 pid={b} mem=1048576 sm=12 enc=3 draws=2\n\
         process 1 pid={b} mem=4096 sm=1 draws=1\nprocess 2 pid={a} mem=8192 sm=50\n\
         process 3 pid={a} mem=1234 part=0\nprocess 3 pid={b} mem=4321 part=5\nprocess 2 pid={c} mem=65536 sm=3 mps=1\n"
    );
    let driver = match older {
        true => StandIn::before_510(&devices)?,
        false => StandIn::new(&devices)?,
    };
    let told = driver.by_binding()?;
    ensure!(
        told["driver"] == "570.86.15" && told["cuda"] == 12040,
        "{told}"
    );
    ensure!(told["error"] == "GPU is lost");
    let (_place, _process, mut control) = Place::sampling(Options {
        environment: driver.environment(),
        ..Options::default()
    })?;
    let rows = control.accelerators("devices with their users, loads and faults", |rows| {
        let loads = rows.iter().filter(|row| row.part_of.is_some());
        rows.len() == 6
            && rows.iter().filter(|row| !row.users.is_empty()).count() == 5
            // Told from the look after the one that asks for them.
            && rows.iter().filter(|row| row.fault.is_some()).count() == 3
            && (older
                || loads
                    .clone()
                    .all(|row| row.counters.utilisation_permille.is_some()))
    })?;
    ensure!(rows.iter().all(|row| !row.users_unknown || row.divided));
    let found = told["devices"].as_array().context("devices")?;
    ensure!(found.len() == 4, "{told}");
    ensure!(
        rows.iter()
            .all(|row| row.driver == "570.86.15" && row.runtime == "12.4")
    );
    for (device, state, status) in [(0, 0, 0), (1, 3, 999), (3, 2, 0)] {
        let expected = match older {
            true => Json::Null,
            false => json!({"state": state, "status": status}),
        };
        let fabric = &found[device]["fabric"];
        ensure!(
            fabric["v1"] == expected && fabric["v2"] == expected,
            "{fabric}"
        );
    }
    for device in found {
        compare(device, &told, &rows, older)?;
        ensure!(
            matches!(&device["samples_of_the_future"], Json::Null)
                || device["samples_of_the_future"] == json!([])
        );
        let parts = device["parts"].as_array().context("parts")?;
        let divided = !parts.is_empty();
        let whole = std::iter::once(device).filter(|_| !divided);
        for one in whole.chain(parts) {
            let uuid = Told(one).text("/uuid")?;
            let users = &row(&rows, uuid)?.users;
            let expected = expected(one, id, &pids)?.context("a user")?;
            ensure!(*users == [expected], "{uuid}: {users:?}, {expected:?}");
        }
        if divided {
            ensure!(row(&rows, Told(device).text("/uuid")?)?.users.is_empty());
            // The whole device lists what its parts do.
            let whole = Told(device).list("/processes/compute_v2")?;
            let parts = parts.iter().map(|part| &part["processes"]["compute_v2"]);
            let of_parts: Vec<&Json> = parts.filter_map(Json::as_array).flatten().collect();
            ensure!(whole.iter().collect::<Vec<_>>() == of_parts, "{device}");
        } else {
            let own = Told(device).list("/processes/compute_v2")?;
            ensure!(
                own.iter().all(|one| one["gpuInstanceId"] == u32::MAX),
                "{device}"
            );
        }
    }
    Ok(())
}

#[test]
fn nvidias_own_binding_reads_what_the_dataplane_tells() -> Result<()> {
    check(false)
}

#[test]
fn a_driver_before_510_is_read_by_its_older_calls() -> Result<()> {
    check(true)
}
