//! The device-plugin host against a plugin in another language, on the published gRPC library: it
//! registers, lists, is asked, dies, hangs, lies and comes back, and nothing but its own devices
//! notices.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::device_plugin::DevicePlugin;
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::Image;
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::{python, wait};
use serde_json::{Value as Json, json};
use tempfile::TempDir;

const SOON: Duration = Duration::from_secs(120);
/// A device that is not given out, by its plugin's own id.
const MASKED: &str = "0000:c9:00.0";
const SLOT: &str = "gaudi2.device";
const RESOURCE: &str = "habana.test/gaudi";

/// Four healthy devices and what a container gets.
fn usual(place: &Path) -> Json {
    json!({
        "devices": {"d0": "Healthy", "d1": "Healthy", "d2": "Healthy", "d3": "Healthy"},
        "options": {"pre_start_required": true, "get_preferred_allocation_available": true},
        "prefer": ["d3", "d1"],
        "allocate": {
            "envs": {"HABANA_VISIBLE_DEVICES": "3,1"},
            "mounts": [{"container_path": "/opt/gaudi", "host_path": place, "read_only": true}],
            "devices": [{"container_path": "/dev/gaudi0", "host_path": "/dev/null", "permissions": "rw"}],
        },
    })
}

struct Machine {
    node: Node,
    python: PathBuf,
    place: TempDir,
}

impl Machine {
    /// `None` where there is no Python for the plugin.
    async fn start() -> Result<Option<Machine>> {
        Machine::with(&format!("\"{RESOURCE}\" = \"{SLOT}\"")).await
    }

    /// With resources mapped to slots.
    async fn with(mapped: &str) -> Result<Option<Machine>> {
        let Some(python) = python::interpreter("accelerator_device_plugins")? else {
            return Ok(None);
        };
        Machine::behind(None, mapped, python).await.map(Some)
    }

    async fn behind(
        engine: Option<&FaultDocker>,
        mapped: &str,
        python: PathBuf,
    ) -> Result<Machine> {
        let place = tempfile::tempdir()?;
        std::fs::write(place.path().join("library"), "of the vendor")?;
        // More kernels than a small machine has cores.
        let overcommit = "BACKEND_CPU_OVERCOMMIT_FACTOR".to_owned();
        let mut environment = vec![(overcommit, "4".to_owned())];
        environment.extend(engine.map(|engine| ("DOCKER_HOST".to_owned(), engine.host())));
        let node = Node::start(NodeOptions {
            sections: format!(
                "[node.accelerators]\nplugin-dir = \"{}\"\ndevice-plugins = {{ {mapped} }}\ndevice-mask = [\"{MASKED}\"]\n",
                place.path().join("plugins").display()
            ),
            environment,
            ..NodeOptions::default()
        })
        .await?;
        Ok(Machine {
            node,
            python,
            place,
        })
    }

    fn plugin(&self, behaviour: &Json) -> Result<DevicePlugin> {
        self.plugin_of(RESOURCE, behaviour)
    }

    fn plugin_of(&self, resource: &str, behaviour: &Json) -> Result<DevicePlugin> {
        let socket = self.directory().join("plugin.sock");
        DevicePlugin::start(&self.python, &socket, resource, behaviour)
    }

    /// Where plugins look for a kubelet.
    fn directory(&self) -> PathBuf {
        self.place.path().join("plugins")
    }

    async fn total(&self, amount: f64) -> Result<()> {
        self.total_of(SLOT, amount).await
    }

    async fn total_of(&self, slot: &str, amount: f64) -> Result<()> {
        wait::until(&format!("{amount} of {slot}"), SOON, || async {
            let status = kernels::ask(&self.node, "bai.status", Vec::new())
                .await
                .ok()?;
            let total = status["slots"][slot]["total"]
                .as_str()?
                .parse::<f64>()
                .ok()?;
            ((total - amount).abs() < 1e-9).then_some(())
        })
        .await
    }

    async fn end(&self, order: &Order) -> Result<()> {
        kernels::destroy(&self.node, order).await?;
        kernels::wait_end(&self.node, order.kernel).await?;
        Ok(())
    }
}

fn order(amount: &str) -> Result<Order> {
    order_of(SLOT, amount)
}

fn order_of(slot: &str, amount: &str) -> Result<Order> {
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"][slot] = json!(amount);
    Ok(order)
}

async fn held(node: &Node) -> Result<Json> {
    kernels::devices_held(node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugins_devices_are_given_to_containers() -> Result<()> {
    let Some(mut machine) = Machine::start().await? else {
        return Ok(());
    };
    let mut plugin = machine.plugin(&usual(machine.place.path()))?;
    machine.total(4.0).await?;

    // Its preference, its variables, its mounts, its device nodes; and it is told before the start.
    let two = order("2")?;
    let result = kernels::create(&machine.node, &two).await?;
    ensure!(
        held(&machine.node).await? == json!({"d1": "1", "d3": "1"}),
        "{result}"
    );
    let preferred = plugin.calls("GetPreferredAllocation");
    ensure!(
        preferred[0]["available"] == json!(["d0", "d1", "d2", "d3"]) && preferred[0]["size"] == 2,
        "{preferred:?}"
    );
    let allocated = &plugin.calls("Allocate")[0]["ids"];
    ensure!(
        *allocated == json!([["d3", "d1"]]) || *allocated == json!([["d1", "d3"]]),
        "{allocated}"
    );
    ensure!(plugin.calls("PreStartContainer").len() == 1);
    let said = kernels::run(
        &machine.node,
        &two,
        "env; cat /opt/gaudi/library; ls -l /dev/gaudi0; touch /opt/gaudi/x 2>&1",
    )
    .await?
    .output;
    for words in [
        "HABANA_VISIBLE_DEVICES=3,1",
        "of the vendor",
        "/dev/gaudi0",
        "Read-only file system",
        "GPU_COUNT=2",
        "GPU_TYPE=gaudi2",
    ] {
        ensure!(said.contains(words), "{words} in {said}");
    }

    // A device turns unhealthy, and back.
    let mut behaviour = usual(machine.place.path());
    behaviour["devices"]["d0"] = json!("Unhealthy");
    plugin.behave(&behaviour)?;
    machine.total(3.0).await?;
    let state = kernels::ask(&machine.node, "gather_hwinfo", Vec::new()).await?;
    ensure!(state["gaudi2"]["status"] == "degraded", "{state}");
    plugin.behave(&usual(machine.place.path()))?;
    machine.total(4.0).await?;

    // It dies: nothing is given out, what is held stays held, and is announced for its kernel's sake.
    // It comes back and registers.
    drop(plugin);
    machine.total(2.0).await?;
    let failure = kernels::fail_to_create(&machine.node, &order("1")?).await?;
    ensure!(
        failure.repr.contains("InsufficientResource"),
        "{}",
        failure.repr
    );
    ensure!(kernels::state(&machine.node, two.kernel).await?.as_deref() == Some("running"));
    ensure!(held(&machine.node).await? == json!({"d1": "1", "d3": "1"}));
    let plugin = machine.plugin(&usual(machine.place.path()))?;
    machine.total(4.0).await?;
    let failure = kernels::fail_to_create(&machine.node, &order("3")?).await?;
    ensure!(
        failure.repr.contains("InsufficientResource"),
        "{}",
        failure.repr
    );

    // Another life of the agent: the plugin sees the socket and registers again, as with a kubelet.
    machine.node.stop_control()?;
    machine.node.start_control().await?;
    machine.total(4.0).await?;
    ensure!(held(&machine.node).await? == json!({"d1": "1", "d3": "1"}));

    // And one in which no plugin is there at first: what it had is known, held as before, and not
    // given out until it has registered.
    machine.node.stop_control()?;
    drop(plugin);
    machine.node.start_control().await?;
    machine.total(2.0).await?;
    ensure!(held(&machine.node).await? == json!({"d1": "1", "d3": "1"}));
    ensure!(kernels::state(&machine.node, two.kernel).await?.as_deref() == Some("running"));
    let state = kernels::ask(&machine.node, "gather_hwinfo", Vec::new()).await?;
    ensure!(state["gaudi2"]["status"] == "offline", "{state}");
    let all: BTreeSet<&String> = state["gaudi2"]["metadata"]
        .as_object()
        .context("devices")?
        .keys()
        .collect();
    ensure!(all.into_iter().eq(["d0", "d1", "d2", "d3"]), "{state}");
    let mut plugin = machine.plugin(&usual(machine.place.path()))?;
    machine.total(4.0).await?;
    ensure!(held(&machine.node).await? == json!({"d1": "1", "d3": "1"}));
    let failure = kernels::fail_to_create(&machine.node, &order("3")?).await?;
    ensure!(
        failure.repr.contains("InsufficientResource"),
        "{}",
        failure.repr
    );

    // What it answers before the start counts: one that cannot prepare its devices fails the creation.
    let mut behaviour = usual(machine.place.path());
    behaviour["fail"] = json!(["PreStartContainer"]);
    plugin.behave(&behaviour)?;
    let failure = kernels::fail_to_create(&machine.node, &order("1")?).await?;
    ensure!(
        failure
            .repr
            .contains("did not prepare the start of a container"),
        "{}",
        failure.repr
    );
    ensure!(held(&machine.node).await? == json!({"d1": "1", "d3": "1"}));

    // A plugin that hangs fails its own creation, in time and in words; one that lies too.
    let mut behaviour = usual(machine.place.path());
    behaviour["prefer"] = json!(["d9"]);
    behaviour["hang"] = json!(["Allocate"]);
    let lists = plugin.calls("ListAndWatch").len();
    plugin.behave(&behaviour)?;
    let failure = kernels::fail_to_create(&machine.node, &order("1")?).await?;
    ensure!(
        failure.repr.contains("no answer within"),
        "{}",
        failure.repr
    );
    let plain = Order::of(Image::Runner)?;
    kernels::create(&machine.node, &plain).await?;
    // It is trusted again when it has listed its devices anew.
    wait::until("another list", SOON, || async {
        (plugin.calls("ListAndWatch").len() > lists).then_some(())
    })
    .await?;
    machine.total(4.0).await?;
    behaviour["hang"] = json!([]);
    behaviour["allocate"] = json!({"devices": [{"container_path": "/dev/x", "host_path": "../null", "permissions": "rw"}]});
    plugin.behave(&behaviour)?;
    let failure = kernels::fail_to_create(&machine.node, &order("1")?).await?;
    ensure!(
        failure.repr.contains("no absolute path"),
        "{}",
        failure.repr
    );
    machine.end(&plain).await?;
    machine.end(&two).await?;
    ensure!(held(&machine.node).await? == json!({}));
    kernels::assert_clean(&machine.node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_published_plugins_do_is_taken_as_a_kubelet_takes_it() -> Result<()> {
    let Some(mut machine) = Machine::start().await? else {
        return Ok(());
    };
    // AMD's and network cards' have PCI addresses for ids, NVIDIA's numbered replicas of a device; one
    // registers before its socket is there; one prepares its devices for longer than other calls may
    // take, and prefers fewer than are wanted; NUMA nodes that sysfs does not know come as -1.
    let plugin = machine.plugin(&json!({
        "devices": {"0000:c1:00.0": "Healthy", "0000:c5:00.0": "Healthy", "GPU-1::0": "Healthy"},
        "options": {"pre_start_required": true, "get_preferred_allocation_available": true},
        "prefer": ["GPU-1::0", "another"],
        "slow": {"PreStartContainer": 12},
        "late": 2,
        "numa": -1,
    }))?;
    machine.total(3.0).await?;
    let two = order("2")?;
    let result = kernels::create(&machine.node, &two).await?;
    let given = held(&machine.node).await?;
    let given = given.as_object().context("devices")?;
    ensure!(given.len() == 2, "{given:?}");
    ensure!(given["GPU-1%3A%3A0"] == "1", "{given:?}");
    let preferred = &plugin.calls("GetPreferredAllocation")[0]["available"];
    ensure!(
        *preferred == json!(["0000:c1:00.0", "0000:c5:00.0", "GPU-1::0"]),
        "{preferred}"
    );
    // It is asked by its own ids, in both calls.
    let allocated = &plugin.calls("Allocate")[0]["ids"][0];
    let own: BTreeSet<String> = given.keys().map(|id| id.replace("%3A", ":")).collect();
    let asked: BTreeSet<String> = serde_json::from_value(allocated.clone())?;
    ensure!(asked == own, "{asked:?}, {result}");
    ensure!(plugin.calls("PreStartContainer")[0]["ids"] == *allocated);
    let attached = &result["attached_devices"]["gaudi2"];
    ensure!(attached.as_array().map(Vec::len) == Some(2), "{result}");
    // The file of its resources is read again by another life.
    let before = held(&machine.node).await?;
    machine.node.stop_control()?;
    machine.node.start_control().await?;
    machine.total(3.0).await?;
    ensure!(held(&machine.node).await? == before);
    machine.end(&two).await?;
    ensure!(held(&machine.node).await? == json!({}));
    kernels::assert_clean(&machine.node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_hangs_or_lies_loses_its_devices_until_it_does_no_more() -> Result<()> {
    let Some(machine) = Machine::start().await? else {
        return Ok(());
    };
    let usual = usual(machine.place.path());
    let mut plugin = machine.plugin(&usual)?;
    machine.total(4.0).await?;
    let absurd = "d".repeat(5 << 20);
    for (key, value) in [
        ("close", json!(true)),
        ("flood", json!(true)),
        ("devices", json!({ absurd: "Healthy" })),
        ("hang", json!(["GetDevicePluginOptions"])),
    ] {
        let mut behaviour = usual.clone();
        behaviour[key] = value;
        plugin.behave(&behaviour)?;
        machine.total(0.0).await.context(key)?;
        plugin.behave(&usual)?;
        machine.total(4.0).await.context(key)?;
    }
    // All that without registering again, and without the agent's doing so for it.
    let mut told = plugin.told();
    told.retain(|said| said["registered"] == true);
    ensure!(told.len() == 1, "{told:?}");
    ensure!(plugin.calls("Allocate").is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_that_make_no_sense_are_refused_with_words() -> Result<()> {
    let Some(machine) = Machine::start().await? else {
        return Ok(());
    };
    let refused = async |resource: &str, behaviour: Json, words: &str| -> Result<()> {
        let plugin = machine.plugin_of(resource, &behaviour)?;
        let told = wait::until("a refusal", SOON, || async {
            plugin
                .told()
                .into_iter()
                .find(|said| !said["refused"].is_null())
        })
        .await?;
        ensure!(
            told["refused"]
                .as_str()
                .is_some_and(|text| text.contains(words)),
            "{told}"
        );
        Ok(())
    };
    refused(RESOURCE, json!({"version": "v1alpha1"}), "v1beta1").await?;
    // What is mapped to no slot is not used, and not refused: its program may serve others too.
    let unused = machine.plugin_of("other.test/thing", &json!({"devices": {"z": "Healthy"}}))?;
    wait::until("a registration", SOON, || async {
        let mut told = unused.told().into_iter();
        told.any(|said| said["registered"] == true).then_some(())
    })
    .await?;
    drop(unused);

    // One that lists nonsense gives out what makes sense of it.
    let plugin =
        machine.plugin(&json!({"devices": {"a\nb": "Healthy", "": "Healthy", "ok": "Healthy"}}))?;
    machine.total(1.0).await?;
    // The last to register is the plugin, whatever becomes of the one before.
    let other = machine.plugin(&json!({"devices": {"x": "Healthy", "y": "Healthy"}}))?;
    machine.total(2.0).await?;
    drop(plugin);
    wait::until("the second plugin is asked", SOON, || async {
        (!other.calls("ListAndWatch").is_empty()).then_some(())
    })
    .await?;
    machine.total(2.0).await
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_divided_devices_are_slots_of_their_own() -> Result<()> {
    // NVIDIA's plugin, strategy "mixed": a program that registers a resource per kind of part.
    let part = "cuda.device:1g.10gb-mig";
    let mapped =
        format!("\"nvidia.com/gpu\" = \"cuda.device\", \"nvidia.com/mig-1g.10gb\" = \"{part}\"");
    let Some(machine) = Machine::with(&mapped).await? else {
        return Ok(());
    };
    let lists = |ids: [&str; 2], variable: &str| {
        json!({
            "devices": {ids[0]: "Healthy", MASKED: "Healthy", ids[1]: "Healthy"},
            "allocate": {"envs": {"NVIDIA_VISIBLE_DEVICES": variable}},
        })
    };
    let start = |socket: &str, resource: &str, behaviour: Json| {
        let socket = machine.directory().join(socket);
        DevicePlugin::start(&machine.python, &socket, resource, &behaviour)
    };
    let whole = start(
        "nvidia-gpu.sock",
        "nvidia.com/gpu",
        lists(["GPU-0", "GPU-1"], "GPU-x"),
    )?;
    let parts = start(
        "nvidia-mig-1g.10gb.sock",
        "nvidia.com/mig-1g.10gb",
        lists(["MIG-0", "MIG-1"], "MIG-x"),
    )?;
    machine.total_of("cuda.device", 2.0).await?;
    machine.total_of(part, 2.0).await?;
    let order = order_of(part, "1")?;
    let result = kernels::create(&machine.node, &order).await?;
    let given = &result["resource_spec"]["allocations"]["cuda"][part];
    let given = given.as_object().context("a part")?;
    let id = given.keys().next().context("a part")?;
    ensure!(id.starts_with("MIG-"), "{result}");
    ensure!(parts.calls("Allocate")[0]["ids"] == json!([[id]]));
    ensure!(
        whole.calls("Allocate").is_empty(),
        "the other plugin was asked"
    );
    let said = kernels::run(&machine.node, &order, "env").await?.output;
    ensure!(said.contains("NVIDIA_VISIBLE_DEVICES=MIG-x"), "{said}");
    // A kernel without a device sees none, whatever its image says.
    let none = Order::of(Image::Runner)?;
    kernels::create(&machine.node, &none).await?;
    let said = kernels::run(&machine.node, &none, "env").await?.output;
    ensure!(said.contains("NVIDIA_VISIBLE_DEVICES=void"), "{said}");
    // Two parts are two kernels' business, and a part and a whole device nobody's.
    let mut both = order_of(part, "1")?;
    both.config["resource_slots"]["cuda.device"] = json!("1");
    let failure = kernels::fail_to_create(&machine.node, &both).await?;
    ensure!(
        failure.repr.contains("InvalidResourceCombination"),
        "{}",
        failure.repr
    );
    // One of the resources goes, the other one stays.
    drop(whole);
    machine.total_of("cuda.device", 0.0).await?;
    machine.total_of(part, 2.0).await?;
    machine.end(&none).await?;
    machine.end(&order).await?;
    kernels::assert_clean(&machine.node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_made_when_it_can_be_and_again_when_it_is_gone() -> Result<()> {
    let Some(mut machine) = Machine::start().await? else {
        return Ok(());
    };
    let socket = machine.directory().join("kubelet.sock");
    machine.node.stop_control()?;
    let _ = std::fs::remove_file(&socket);
    // Another one serves the directory, as a kubelet would.
    let other = std::os::unix::net::UnixListener::bind(&socket)?;
    machine.node.start_control().await?;
    wait::until("words about it", SOON, || async {
        let log = machine.node.log("bai-agent");
        log.contains("device plugins cannot be served for now")
            .then_some(())
    })
    .await?;
    drop(other);
    let plugin = machine.plugin(&json!({"devices": {"a": "Healthy"}}))?;
    machine.total(1.0).await?;
    // Somebody cleans up the directory.
    std::fs::remove_file(&socket)?;
    wait::until("another registration", SOON, || async {
        let told = plugin.told().into_iter();
        let times = told.filter(|said| said["registered"] == true).count();
        (times == 2).then_some(())
    })
    .await?;
    machine.total(1.0).await
}

#[tokio::test(flavor = "multi_thread")]
async fn names_of_cdi_go_to_engines_that_know_them() -> Result<()> {
    let Some(python) = python::interpreter("accelerator_device_plugins")? else {
        return Ok(());
    };
    let answer = json!({
        "devices": {"d0": "Healthy"},
        "allocate": {"cdi_devices": [{"name": "habana.test/gaudi=d0"}]},
    });
    let told = tokio::task::spawn_blocking(|| kernels::docker(&["info", "--format", "{{json .}}"]));
    let mut info: Json = serde_json::from_str(&told.await??)?;
    for knows in [false, true] {
        let engine = FaultDocker::start()?;
        info["CDISpecDirs"] = if knows {
            json!(["/etc/cdi"])
        } else {
            json!([])
        };
        engine.spoil("/info", Fault::json(200, &info.to_string()), usize::MAX);
        let mapped = format!("\"{RESOURCE}\" = \"{SLOT}\"");
        let machine = Machine::behind(Some(&engine), &mapped, python.clone()).await?;
        let _plugin = machine.plugin(&answer)?;
        machine.total(1.0).await?;
        let failure = kernels::fail_to_create(&machine.node, &order("1")?).await?;
        let bodies = engine.bodies("/containers/create");
        if knows {
            let body: Json = serde_json::from_slice(bodies.last().context("a creation")?)?;
            let request = &body["HostConfig"]["DeviceRequests"][0];
            ensure!(request["Driver"] == "cdi", "{request}");
            ensure!(
                request["DeviceIDs"] == json!(["habana.test/gaudi=d0"]),
                "{request}"
            );
        } else {
            let mut texts = bodies.iter().map(|body| String::from_utf8_lossy(body));
            ensure!(
                texts.all(|text| !text.contains("\"cdi\"")),
                "the engine was asked for what it does not know"
            );
            ensure!(failure.repr.contains("does not know"), "{}", failure.repr);
        }
        kernels::assert_clean(&machine.node).await?;
    }
    Ok(())
}
