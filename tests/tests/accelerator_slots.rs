//! Accelerators as slots of a whole node: what the driver tells is announced, given out, put into
//! containers, held over restarts, and taken out of service when it fails. The driver is a stand-in
//! with the real C ABI, its device nodes are clones of /dev/null; those of parts open nothing.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::device_tree::DeviceTree;
use harness::images::Image;
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::nvidia_nodes::{MAJOR, NvidiaNodes};
use harness::nvml::StandIn;
use harness::{scrape, wait};
use serde_json::{Value as Json, json};

const SOON: Duration = Duration::from_secs(60);

/// What all ids begin with. A device's number follows in four digits; in a part's, that of its device and
/// its own, in two each.
const UUID: &str = "8f0f9c8e-0000-4000-8000-00000000";

/// The digits at the end of an id, as in [`eight`].
fn digits<'a>(id: &'a str, kind: &str) -> Option<&'a str> {
    id.strip_prefix(kind)?.strip_prefix(UUID)
}

/// Eight devices with numbers of nodes from the first one on; the last two are divided into three parts
/// each.
fn eight(first_minor: u32) -> String {
    let mut text = String::new();
    for index in 0..8 {
        let mig = u8::from(index >= 6);
        text += &format!(
            "device {index} uuid=GPU-{UUID}{index:04} name=Stand-in_H100 mem=85899345920 pci=00000000:{:02X}:00.0 minor={} sms=132 mig={mig}\n",
            16 + index,
            first_minor + index
        );
    }
    for device in DIVIDED {
        for part in 0..PARTS {
            text += &format!(
                "part {device} {part} uuid=MIG-{UUID}{device:02}{part:02} mem=10200547328 sms=16 slices=1 gi={} ci=0\n",
                7 + part
            );
        }
    }
    text
}

/// A node with a driver of eight devices.
struct Machine {
    node: Node,
    driver: StandIn,
    tree: DeviceTree,
    _nodes: NvidiaNodes,
    first_minor: u32,
    /// Number of the first node of a part; each part has two.
    first_capability: u32,
}

/// The devices that have parts, and the parts of each.
const DIVIDED: [u32; 2] = [6, 7];
const PARTS: u32 = 3;

impl Machine {
    async fn start(settings: &str) -> Result<Option<Machine>> {
        // Numbers that no driver gives, apart for each test.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let started = STARTED.fetch_add(1, Ordering::Relaxed);
        let seat = std::process::id().wrapping_mul(4).wrapping_add(started);
        let first_minor = 100_000 + seat % 80_000 * 10;
        let first_capability = 200_000 + seat % 50_000 * 16;
        let Some(mut nodes) = NvidiaNodes::new()? else {
            return Ok(None);
        };
        let tree = DeviceTree::new()?;
        // The nodes are the host's own, as the engine sees them.
        std::os::unix::fs::symlink("/dev", tree.root().join("dev"))?;
        for index in 0..8 {
            nodes.device(first_minor + index)?;
            tree.nvidia_hangs(&format!("0000:{:02x}:00.0", 16 + index))?;
        }
        let mut minor = first_capability;
        tree.nvidia_capabilities(MAJOR)?;
        for device in DIVIDED {
            for part in 0..PARTS {
                for capability in 0..2 {
                    nodes.capability(minor + capability)?;
                }
                tree.nvidia_instance(first_minor + device, 7 + part, [minor, minor + 1])?;
                minor += 2;
            }
        }
        let driver = StandIn::new(&eight(first_minor))?;
        let mut environment = driver.environment();
        // More kernels than a small machine has cores.
        environment.push(("BACKEND_CPU_OVERCOMMIT_FACTOR".to_owned(), "4".to_owned()));
        let node = Node::start(NodeOptions {
            sections: format!(
                "[node.dataplane]\nstats-interval = 0.5\n[node.accelerators]\ncuda-injection = \"device-nodes\"\n\
                 device-root = \"{}\"\n{settings}\n",
                tree.root().display()
            ),
            environment,
            ..NodeOptions::default()
        })
        .await?;
        Ok(Some(Machine {
            node,
            driver,
            tree,
            _nodes: nodes,
            first_minor,
            first_capability,
        }))
    }

    async fn total(&self, slot: &str, amount: f64) -> Result<()> {
        announced(&self.node, slot, amount).await
    }
}

/// Waits until CUDA's devices are told to be in a state.
async fn hardware(node: &Node, status: &str) -> Result<()> {
    wait::until(&format!("{status} devices"), SOON, || async {
        let told = kernels::ask(node, "gather_hwinfo", Vec::new()).await.ok()?;
        (told["cuda"]["status"] == status).then_some(())
    })
    .await
}

/// Waits until a slot is announced with an amount.
async fn announced(node: &Node, slot: &str, amount: f64) -> Result<()> {
    let what = format!("{amount} of {slot}");
    wait::until(&what, SOON, || async {
        let status = kernels::ask(node, "bai.status", Vec::new()).await.ok()?;
        let total = status["slots"][slot]["total"]
            .as_str()?
            .parse::<f64>()
            .ok()?;
        ((total - amount).abs() < 1e-9).then_some(())
    })
    .await
}

fn order(slots: &[(&str, &str)]) -> Result<Order> {
    let mut order = Order::of(Image::Runner)?;
    for (slot, amount) in slots {
        order.config["resource_slots"][*slot] = json!(amount);
    }
    Ok(order)
}

/// As the manager is told: under plain UUIDs.
async fn held(node: &Node) -> Result<Json> {
    kernels::ask(node, "scan_gpu_alloc_map", Vec::new()).await
}

/// Ids of the devices of one slot in a creation's result.
fn ids(result: &Json, slot: &str) -> Vec<String> {
    let shares = &result["resource_spec"]["allocations"]["cuda"][slot];
    shares
        .as_object()
        .map(|shares| shares.keys().cloned().collect())
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_announced_given_out_and_held_over_restarts() -> Result<()> {
    let Some(mut machine) = Machine::start("").await? else {
        return Ok(());
    };
    machine.total("cuda.device", 6.0).await?;
    machine.total("cuda.device:1g.10gb-mig", 6.0).await?;
    let order_of_two = order(&[("cuda.device", "2")])?;
    let result = kernels::create(&machine.node, &order_of_two).await?;
    let given = ids(&result, "cuda.device");
    ensure!(
        given.len() == 2 && given.iter().all(|id| digits(id, "GPU-").is_some()),
        "{result}"
    );
    let attached = &result["attached_devices"]["cuda"];
    ensure!(attached[0]["model_name"] == "Stand-in H100", "{attached}");
    ensure!(
        attached[0]["data"] == json!({"mem": 85_899_345_920_u64, "smp": 132}),
        "{attached}"
    );

    // What the kernel sees: its own two devices.
    let said = kernels::run(&machine.node, &order_of_two, "env; ls -1 /dev")
        .await?
        .output;
    let mut nodes: Vec<String> = given
        .iter()
        .filter_map(|id| digits(id, "GPU-")?.parse::<u32>().ok())
        .map(|index| format!("nvidia{}", machine.first_minor + index))
        .collect();
    nodes.sort();
    let mut seen: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("nvidia") && !line.contains("ctl") && !line.contains('-'))
        .collect();
    seen.sort_unstable();
    ensure!(seen == nodes, "{said}");
    for variable in [
        "GPU_COUNT=2".to_owned(),
        "N_GPUS=2".to_owned(),
        "GPU_TYPE=cuda".to_owned(),
        "GPU_MODEL_NAME=Stand-in H100".to_owned(),
        "GPU_CONFIG=0:80g,1:80g".to_owned(),
        "TF_GPU_MEMORY_ALLOC=0:81920,1:81920".to_owned(),
        "CUDA_VISIBLE_DEVICES=0,1".to_owned(),
    ] {
        ensure!(
            said.lines().any(|line| line.trim() == variable),
            "{variable} in {said}"
        );
    }
    ensure!(said.contains("NVIDIA_VISIBLE_DEVICES=GPU-"), "{said}");
    let text = std::fs::read_to_string(
        machine
            .node
            .scratch(&order_of_two.kernel.to_string())
            .join("config/resource.txt"),
    )?;
    ensure!(text.contains("CUDA_GLOBAL_DEVICE_IDS=0:GPU-"), "{text}");

    // A part: the node of its device, and the two of its own. Who has none sees none.
    let before = held(&machine.node).await?;
    let part = order(&[("cuda.device:1g.10gb-mig", "1")])?;
    let result = kernels::create(&machine.node, &part).await?;
    let given = ids(&result, "cuda.device:1g.10gb-mig");
    let (device, number) = given
        .first()
        .and_then(|id| digits(id, "MIG-")?.split_at_checked(2))
        .context("a part")?;
    let (device, number): (u32, u32) = (device.parse()?, number.parse()?);
    let place = (device - DIVIDED[0]) * PARTS + number;
    let own = machine.first_capability + 2 * place;
    let said = kernels::run(
        &machine.node,
        &part,
        "ls -1d /dev/nvidia*[0-9]; cd /dev/nvidia-caps; for n in *; do echo $n; cat $n 2>&1; done",
    )
    .await?
    .output;
    let lines: Vec<&str> = said.lines().map(str::trim).collect();
    let devices = lines.iter().filter(|line| line.starts_with("/dev/"));
    ensure!(
        devices.eq([&format!("/dev/nvidia{}", machine.first_minor + device)]),
        "{said}"
    );
    let nodes: Vec<String> = (own..own + 2).map(|n| format!("nvidia-cap{n}")).collect();
    let seen = lines.iter().filter(|line| line.starts_with("nvidia-cap"));
    ensure!(seen.eq(&nodes), "{nodes:?} in {said}");
    // The container may open them, and there is no driver behind.
    let opened = lines
        .iter()
        .filter(|line| line.ends_with("No such device or address"));
    ensure!(opened.count() == 2, "{said}");
    kernels::destroy(&machine.node, &part).await?;
    kernels::wait_end(&machine.node, part.kernel).await?;
    // What the driver does not publish is told, and nothing is held for it.
    machine.tree.remove("proc/driver/nvidia-caps")?;
    machine.tree.remove("proc/driver/nvidia/capabilities")?;
    let part = order(&[("cuda.device:1g.10gb-mig", "1")])?;
    let failure = kernels::fail_to_create(&machine.node, &part).await?;
    ensure!(
        failure
            .repr
            .contains("mig-minors tells the node of MIG instance"),
        "{}",
        failure.repr
    );
    ensure!(held(&machine.node).await? == before);
    let none = order(&[])?;
    kernels::create(&machine.node, &none).await?;
    let said = kernels::run(&machine.node, &none, "env; ls -1 /dev")
        .await?
        .output;
    ensure!(
        said.contains("NVIDIA_VISIBLE_DEVICES=void") && said.contains("GPU_COUNT=0"),
        "{said}"
    );
    ensure!(
        !said.contains(&format!("nvidia{}", machine.first_minor / 10)),
        "{said}"
    );
    let two = order(&[("cuda.device", "1"), ("cuda.device:1g.10gb-mig", "1")])?;
    let failure = kernels::fail_to_create(&machine.node, &two).await?;
    ensure!(
        failure.repr.contains("InvalidResourceCombination"),
        "{}",
        failure.repr
    );

    // Another life of control, without a dataplane: absent is not zero, and what is held stays held.
    let before = held(&machine.node).await?;
    ensure!(
        before.as_object().is_some_and(|map| map.len() == 2),
        "{before}"
    );
    machine.node.kill_control()?;
    machine.node.kill_dataplane()?;
    machine.node.start_control().await?;
    machine.total("cuda.device", 6.0).await?;
    ensure!(held(&machine.node).await? == before);
    driver_that_does_not_start(&mut machine).await?;
    for order in [&order_of_two, &none] {
        kernels::destroy(&machine.node, order).await?;
        kernels::wait_end(&machine.node, order.kernel).await?;
    }
    ensure!(held(&machine.node).await? == json!({}));
    kernels::assert_clean(&machine.node).await
}

/// The dataplane starts on a driver that hangs, then fails to start: what was known stays known and is not
/// given out, but for the two devices that a kernel holds.
async fn driver_that_does_not_start(machine: &mut Machine) -> Result<()> {
    let devices = eight(machine.first_minor);
    machine.driver.describe(&format!("{devices}hang\n"))?;
    machine.node.start_dataplane()?;
    machine.total("cuda.device", 2.0).await?;
    machine.total("cuda.device:1g.10gb-mig", 0.0).await?;
    hardware(&machine.node, "offline").await?;
    let series = "bai_accelerator_healthy";
    let address = machine.node.http_address().to_owned();
    let healthy = |device: u32| {
        let page = scrape::page(&address)?;
        let label = format!("id=\"GPU-{UUID}{device:04}\"");
        Ok::<_, anyhow::Error>(scrape::value(&page, series, &label))
    };
    ensure!(healthy(0)? == Some(0.0) && healthy(5)? == Some(0.0));
    machine.node.kill_dataplane()?;
    machine.driver.describe(&format!("{devices}init 18\n"))?;
    machine.node.start_dataplane()?;
    let told = || machine.node.log("bai-dataplane");
    wait::until("a driver that does not start", SOON, || async {
        let told = told();
        told.contains("is installed and does not start")
            .then_some(())
    })
    .await?;
    machine.total("cuda.device", 2.0).await?;
    hardware(&machine.node, "offline").await?;
    ensure!(healthy(0)? == Some(0.0));
    let file = format!("accelerators.{}.json", machine.node.agent_id());
    let file = std::fs::read(machine.node.state().join(file))?;
    let kept: Vec<Json> = serde_json::from_slice(&file)?;
    ensure!(kept.len() == 12 && kept.iter().all(|device| device["healthy"] == false));
    machine.driver.describe(&devices)?;
    machine.total("cuda.device", 6.0).await?;
    ensure!(healthy(0)? == Some(1.0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_device_is_not_given_out_until_it_works_again() -> Result<()> {
    let masked = format!("GPU-{UUID}0000");
    let settings = format!("device-mask = [\"{masked}\", \"cuda:1\"]");
    let Some(machine) = Machine::start(&settings).await? else {
        return Ok(());
    };
    machine.total("cuda.device", 4.0).await?;
    let order = order(&[("cuda.device", "1")])?;
    let result = kernels::create(&machine.node, &order).await?;
    let id = ids(&result, "cuda.device").pop().context("a device")?;
    ensure!(
        id != masked && id != format!("GPU-{UUID}0001"),
        "a masked device was given: {id}"
    );
    let index = digits(&id, "GPU-").context("an id")?.parse::<u32>()?;
    // The container's own process uses the device it was given, and one of the host does not count.
    let pid = kernels::docker(&[
        "inspect",
        "--format",
        "{{.State.Pid}}",
        result["container_id"].as_str().context("a container")?,
    ])?;
    machine.driver.describe(&format!(
        "{}process {index} pid={pid} mem=4096 sm=20\nprocess {index} pid={} mem=77 sm=5\nxid {index} 79 1\n",
        eight(machine.first_minor),
        std::process::id()
    ))?;
    hardware(&machine.node, "degraded").await?;
    let state = kernels::ask(&machine.node, "gather_hwinfo", Vec::new()).await?;
    ensure!(state["cuda"]["metadata"][&id] == "fault 79", "{state}");
    // The manager takes it off what is announced, because its kernel holds it.
    machine.total("cuda.device", 4.0).await?;
    ensure!(held(&machine.node).await?[id.trim_start_matches("GPU-")] == "1");
    let container: shared::ids::ContainerId = result["container_id"]
        .as_str()
        .unwrap_or_default()
        .parse()?;
    let mut reader = shared::observed::ObservedReader::at(machine.node.regions().join("dataplane"));
    let users = wait::until_blocking("the device's user", SOON, || {
        let snapshot = reader.snapshot().ok()?;
        let row = snapshot.accelerators.iter().find(|row| row.id == id)?;
        (!row.users.is_empty()).then(|| row.users.clone())
    })?;
    ensure!(
        users.len() == 1 && users[0].container_id == container,
        "{users:?}"
    );
    ensure!(users[0].memory_bytes == Some(4096), "{users:?}");

    // Reset: it goes away and comes back as good as new, and is still the kernel's.
    let gone = eight(machine.first_minor).replace(
        &format!("device {index} uuid={id}"),
        &format!("device {index} uuid={id} lost=1"),
    );
    machine.driver.describe(&gone)?;
    wait::until("the device is being reset", SOON, || async {
        let state = kernels::ask(&machine.node, "gather_hwinfo", Vec::new())
            .await
            .ok()?;
        let snapshot = state["cuda"]["status"] == "degraded";
        let rows = reader_rows(&machine.node)?;
        let lost = rows
            .iter()
            .any(|row| row.id == id && row.counters.memory_used_bytes.is_none());
        (snapshot && lost).then_some(())
    })
    .await?;
    machine.driver.describe(&eight(machine.first_minor))?;
    hardware(&machine.node, "healthy").await?;
    machine.total("cuda.device", 4.0).await?;
    ensure!(held(&machine.node).await?[id.trim_start_matches("GPU-")] == "1");
    kernels::destroy(&machine.node, &order).await?;
    kernels::wait_end(&machine.node, order.kernel).await?;
    kernels::assert_clean(&machine.node).await
}

fn reader_rows(node: &Node) -> Option<Vec<shared::observed::AcceleratorRow>> {
    let mut reader = shared::observed::ObservedReader::at(node.regions().join("dataplane"));
    Some(reader.snapshot().ok()?.accelerators.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_of_a_device_are_given_to_several_kernels() -> Result<()> {
    let settings = "allocation-mode = \"fractional\"\nunit-mem = \"80g\"\nunit-proc = 132";
    let Some(machine) = Machine::start(settings).await? else {
        return Ok(());
    };
    machine.total("cuda.shares", 6.0).await?;
    let small = order(&[("cuda.shares", "0.05")])?;
    let failure = kernels::fail_to_create(&machine.node, &small).await?;
    ensure!(
        failure.repr.contains("NotMultipleOfQuantum"),
        "{}",
        failure.repr
    );
    let (first, second) = (
        order(&[("cuda.shares", "0.3")])?,
        order(&[("cuda.shares", "0.6")])?,
    );
    let one = kernels::create(&machine.node, &first).await?;
    let two = kernels::create(&machine.node, &second).await?;
    // The best fit is the device that is used already.
    let shared = ids(&one, "cuda.shares");
    ensure!(
        shared.len() == 1 && ids(&two, "cuda.shares") == shared,
        "{one} {two}"
    );
    let map = held(&machine.node).await?;
    ensure!(
        map[shared[0].trim_start_matches("GPU-")]
            .as_str()
            .and_then(|text| text.parse().ok())
            == Some(0.9),
        "{map}"
    );
    let said = kernels::run(&machine.node, &first, "env").await?.output;
    ensure!(
        said.contains("GPU_CONFIG=0:24g") && said.contains("GPU_COUNT=1"),
        "{said}"
    );
    for order in [&first, &second] {
        kernels::destroy(&machine.node, order).await?;
        kernels::wait_end(&machine.node, order.kernel).await?;
    }
    kernels::assert_clean(&machine.node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn made_up_devices_are_scheduled_without_any_driver() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("mock-accelerator.toml");
    let device = |number: u32, model: &str, mig: bool| {
        format!(
            "{{ mother_uuid = \"aa-{number}\", model_name = \"{model}\", numa_node = 0, subproc_count = 108, memory_size = \"40G\", is_mig_device = {mig} }},\n"
        )
    };
    let devices = device(1, "CUDA GPU", false)
        + &device(2, "CUDA GPU", false)
        + &device(3, "MIG-10g", true).repeat(2);
    std::fs::write(
        &file,
        format!(
            "slot_name = \"cuda\"\ndevice_plugin_name = \"CUDADevice\"\ndevices = [\n{devices}]\n"
        ),
    )?;
    let node = Node::start(NodeOptions {
        sections: format!(
            "[node.accelerators]\nmock = \"{}\"\nplugin-dir = \"{}\"\n",
            file.display(),
            directory.path().join("plugins").display(),
        ),
        ..NodeOptions::default()
    })
    .await?;
    announced(&node, "cuda.device", 2.0).await?;
    announced(&node, "cuda.device:10g-mig", 2.0).await?;
    let order = order(&[("cuda.device", "2")])?;
    let result = kernels::create(&node, &order).await?;
    ensure!(ids(&result, "cuda.device") == ["aa-1", "aa-2"], "{result}");
    let said = kernels::run(&node, &order, "env").await?.output;
    for variable in ["GPU_COUNT=2", "BACKENDAI_MOCK_CUDA_DEVICES=aa-1,aa-2"] {
        ensure!(said.lines().any(|line| line.trim() == variable), "{said}");
    }
    let state = kernels::ask(&node, "gather_hwinfo", Vec::new()).await?;
    ensure!(state["cuda"]["status"] == "healthy", "{state}");
    ensure!(
        !directory.path().join("plugins").exists(),
        "device plugins are waited for, and none is mapped to a slot"
    );
    kernels::destroy(&node, &order).await?;
    kernels::wait_end(&node, order.kernel).await?;
    kernels::assert_clean(&node).await
}
