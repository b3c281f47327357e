//! CDI in a real engine: what a specification says of a device is in the container of the kernel that
//! holds the device, and in no other. The driver is a stand-in; the device's node is another device's,
//! one that containers may not open by themselves.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::cdi_engine::CdiEngine;
use harness::device_plugin::DevicePlugin;
use harness::images::Image;
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::nvml::StandIn;
use harness::{python, wait};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::{Value as Json, json};

/// Two devices and a part of a third; the second is in no specification.
const DEVICES: &str = "\
device 0 uuid=GPU-a name=Stand-in mem=85899345920 pci=00000000:10:00.0 sms=132
device 1 uuid=GPU-b name=Stand-in mem=85899345920 pci=00000000:11:00.0 sms=132
device 2 uuid=GPU-c name=Stand-in mem=85899345920 pci=00000000:12:00.0 sms=132 mig=1
part 2 0 uuid=MIG-c-0 mem=10200547328 sms=16 slices=1
";
const PART: &str = "cuda.device:1g.10gb-mig";

/// As `nvidia-ctk cdi generate --device-name-strategy uuid` writes it, with other nodes and files.
fn specification(library: &Path, behind: &Path) -> Json {
    let device = |name: &str, node: &str| {
        json!({
            "name": name,
            "containerEdits": {
                "deviceNodes": [{"path": node, "hostPath": behind, "permissions": "rw"}],
                "env": [format!("DEVICE_OF_{}=1", name.replace('-', "_"))],
            },
        })
    };
    json!({
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            device("GPU-a", "/dev/nvidia0"),
            device("MIG-c-0", "/dev/nvidia-caps/nvidia-cap30"),
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void", "DRIVER_BY_CDI=1"],
            "mounts": [{
                "hostPath": library,
                "containerPath": "/usr/lib/libcuda.so.1",
                "options": ["ro", "nosuid", "nodev", "bind"],
            }],
        },
    })
}

/// What a kernel sees of it all.
const LOOK: &str = "env; for n in /dev/nvidia0 /dev/nvidia-caps/nvidia-cap30; do \
    if [ -e $n ]; then : <>$n && echo opened $n $(stat -c %t:%T $n); fi; done; cat /usr/lib/libcuda.so.1; \
    touch /usr/lib/libcuda.so.1";
/// The numbers of the node behind, as `stat` writes them: a device that opens without doing anything
/// and is not among those of every container.
const NUMBERS: &str = "a:ed";

/// What a kernel says to some commands of the shell.
async fn look(node: &Node, order: &Order, commands: &str) -> Result<Vec<String>> {
    kernels::create(node, order).await?;
    let said = kernels::run(node, order, commands).await?.output;
    Ok(said.lines().map(str::to_owned).collect())
}

/// Makes the node behind, and a file, for containers of this engine.
fn behind(engine: &CdiEngine) -> Result<(PathBuf, PathBuf)> {
    let library = engine.place().join("library");
    std::fs::write(&library, "of the driver\n")?;
    let behind = engine.place().join("node");
    let everybody = Mode::from_bits_truncate(0o666);
    mknod(&behind, SFlag::S_IFCHR, everybody, makedev(0xa, 0xed))?;
    // Whatever the umask is.
    std::fs::set_permissions(&behind, Permissions::from_mode(0o666))?;
    Ok((library, behind))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_gets_what_the_specification_says_of_its_device() -> Result<()> {
    let Some(engine) = CdiEngine::start()? else {
        return Ok(());
    };
    let (library, behind) = behind(&engine)?;
    engine.specify("nvidia.json", &specification(&library, &behind))?;
    let info = engine.info()?;
    ensure!(
        info["CDISpecDirs"] == json!([engine.place().join("cdi")]),
        "{info}"
    );

    let driver = StandIn::new(DEVICES)?;
    let node = Node::start(NodeOptions {
        environment: driver.environment(),
        engine: Some(engine.host()),
        ..NodeOptions::default()
    })
    .await?;
    wait::until("devices and parts", Duration::from_secs(60), || async {
        let status = kernels::ask(&node, "bai.status", Vec::new()).await.ok()?;
        let slots = &status["slots"];
        (slots["cuda.device"]["total"] == "2" && slots[PART]["total"] == "1").then_some(())
    })
    .await?;
    let of_slot = |slot: Option<&str>| -> Result<Order> {
        let mut order = Order::of_engine(Image::Runner, &engine.host())?;
        if let Some(slot) = slot {
            order.config["resource_slots"][slot] = json!("1");
        }
        Ok(order)
    };

    // One device, one part, and no device at all: each sees its own.
    for (slot, own, id) in [
        (Some("cuda.device"), Some("/dev/nvidia0"), "GPU-a"),
        (Some(PART), Some("/dev/nvidia-caps/nvidia-cap30"), "MIG-c-0"),
        (None, None, ""),
    ] {
        let order = of_slot(slot)?;
        let lines = look(&node, &order, LOOK).await?;
        let has = |line: &str| lines.iter().any(|found| found == line);
        let opened: Vec<&String> = lines
            .iter()
            .filter(|line| line.starts_with("opened"))
            .collect();
        let wanted: Vec<String> = own
            .iter()
            .map(|node| format!("opened {node} {NUMBERS}"))
            .collect();
        ensure!(opened.into_iter().eq(&wanted), "{lines:#?}");
        for (device, variable) in [
            ("GPU-a", "DEVICE_OF_GPU_a=1"),
            ("MIG-c-0", "DEVICE_OF_MIG_c_0=1"),
        ] {
            ensure!(has(variable) == (device == id), "{lines:#?}");
        }
        let some = own.is_some();
        ensure!(has("DRIVER_BY_CDI=1") == some, "{lines:#?}");
        ensure!(has("of the driver") == some, "{lines:#?}");
        ensure!(
            !some
                || lines
                    .iter()
                    .any(|line| line.ends_with("Read-only file system")),
            "{lines:#?}"
        );
        let count = format!("GPU_COUNT={}", u8::from(some));
        ensure!(has(&count), "{lines:#?}");
        if slot == Some("cuda.device") {
            // The second device is left, and the engine does not know it.
            let another = of_slot(slot)?;
            let failure = kernels::fail_to_create(&node, &another).await?;
            ensure!(
                failure
                    .repr
                    .contains("unresolvable CDI devices nvidia.com/gpu=GPU-b"),
                "{}",
                failure.repr
            );
            let held = kernels::devices_held(&node).await?;
            ensure!(held == json!({"GPU-a": "1"}), "{held}");
        }
        kernels::destroy(&node, &order).await?;
        kernels::wait_end(&node, order.kernel).await?;
    }
    kernels::assert_clean(&node).await
}

const RESOURCE: &str = "habana.test/gaudi";
const SLOT: &str = "gaudi2.device";

/// Names of CDI that a device plugin answers with: the device's own edits are in the container, those
/// of the whole specification, and what else the plugin answers.
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_gets_what_its_device_plugin_names() -> Result<()> {
    let Some(python) = python::interpreter("accelerator_cdi")? else {
        return Ok(());
    };
    let Some(engine) = CdiEngine::start()? else {
        return Ok(());
    };
    let (library, behind) = behind(&engine)?;
    let device = |name: &str| {
        json!({
            "name": name,
            "containerEdits": {
                "deviceNodes": [{"path": format!("/dev/gaudi-{name}"), "hostPath": behind, "permissions": "rw"}],
                "env": [format!("DEVICE_OF_{name}=1")],
            },
        })
    };
    let specification = json!({
        "cdiVersion": "0.5.0",
        "kind": RESOURCE,
        "devices": [device("d0"), device("d1"), device("d2")],
        "containerEdits": {
            "env": ["DRIVER_BY_CDI=1"],
            "mounts": [{
                "hostPath": library,
                "containerPath": "/usr/lib/libgaudi.so.1",
                "options": ["ro", "nosuid", "nodev", "bind"],
            }],
        },
    });
    engine.specify("gaudi.json", &specification)?;
    let plugins = engine.place().join("plugins");
    let node = Node::start(NodeOptions {
        sections: format!(
            "[node.accelerators]\nplugin-dir = \"{}\"\ndevice-plugins = {{ \"{RESOURCE}\" = \"{SLOT}\" }}\n",
            plugins.display()
        ),
        environment: vec![("BACKEND_CPU_OVERCOMMIT_FACTOR".to_owned(), "4".to_owned())],
        engine: Some(engine.host()),
        ..NodeOptions::default()
    })
    .await?;
    let behaviour = json!({
        "devices": {"d0": "Healthy", "d1": "Healthy", "d2": "Healthy", "d3": "Healthy"},
        "allocate": {"envs": {"ANSWERED_TOO": "1"}},
        "cdi": RESOURCE,
    });
    let socket = plugins.join("plugin.sock");
    let _plugin = DevicePlugin::start(&python, &socket, RESOURCE, &behaviour)?;
    wait::until("the plugin's devices", Duration::from_secs(120), || async {
        let status = kernels::ask(&node, "bai.status", Vec::new()).await.ok()?;
        (status["slots"][SLOT]["total"] == "4").then_some(())
    })
    .await?;

    // Two devices, one, and none: each kernel sees its own.
    let mut held = json!({});
    let mut orders = Vec::new();
    for ids in [&["d0", "d1"][..], &["d2"], &[]] {
        let mut order = Order::of_engine(Image::Runner, &engine.host())?;
        if !ids.is_empty() {
            order.config["resource_slots"][SLOT] = json!(ids.len().to_string());
        }
        let lines = look(
            &node,
            &order,
            "env; for n in /dev/gaudi-*; do [ -e $n ] && : <>$n && echo opened $n $(stat -c %t:%T $n); done; \
             cat /usr/lib/libgaudi.so.1; touch /usr/lib/libgaudi.so.1",
        )
        .await?;
        let has = |line: &str| lines.iter().any(|found| found == line);
        let opened = lines.iter().filter(|line| line.starts_with("opened"));
        let wanted = ids
            .iter()
            .map(|id| format!("opened /dev/gaudi-{id} {NUMBERS}"));
        ensure!(opened.cloned().eq(wanted), "{ids:?}: {lines:#?}");
        for id in ["d0", "d1", "d2"] {
            ensure!(
                has(&format!("DEVICE_OF_{id}=1")) == ids.contains(&id),
                "{lines:#?}"
            );
        }
        let some = !ids.is_empty();
        for line in ["DRIVER_BY_CDI=1", "of the driver", "ANSWERED_TOO=1"] {
            ensure!(has(line) == some, "{line}: {lines:#?}");
        }
        let kept = lines
            .iter()
            .any(|line| line.ends_with("Read-only file system"));
        ensure!(kept == some, "{lines:#?}");
        ensure!(has(&format!("GPU_COUNT={}", ids.len())), "{lines:#?}");
        for id in ids {
            held[*id] = json!("1");
        }
        let told = kernels::devices_held(&node).await?;
        ensure!(told == held, "{told} and not {held}");
        orders.push(order);
    }
    // One that its specification does not name: the engine's words are the failure, and it is free again.
    let mut order = Order::of_engine(Image::Runner, &engine.host())?;
    order.config["resource_slots"][SLOT] = json!("1");
    let failure = kernels::fail_to_create(&node, &order).await?;
    let words = format!("unresolvable CDI devices {RESOURCE}=d3");
    ensure!(failure.repr.contains(&words), "{}", failure.repr);
    let told = kernels::devices_held(&node).await?;
    ensure!(told == held, "{told}");
    for order in &orders {
        kernels::destroy(&node, order).await?;
        kernels::wait_end(&node, order.kernel).await?;
    }
    kernels::assert_clean(&node).await
}
