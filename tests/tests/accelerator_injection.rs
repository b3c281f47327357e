//! What the engine is asked for so that a container gets its devices: the requests as its API has them,
//! chosen by what it can do. The engine is the real one behind a proxy that changes what it says of
//! itself, since the one of the tests knows neither NVIDIA's toolkit nor CDI.

use anyhow::{Context, Result, ensure};
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::Image;
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::nvml::StandIn;
use harness::wait;
use serde_json::{Value as Json, json};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

const UUID: &str = "GPU-8f0f9c8e-0000-4000-8000-000000000001";

/// A node whose engine says of itself what is in `changes`.
async fn start(settings: &str, changes: &Json) -> Result<(Node, FaultDocker, StandIn)> {
    let engine = FaultDocker::start()?;
    // It does not say it when it is asked first.
    let not_yet = Fault::json(500, r#"{"message": "not yet"}"#);
    engine.spoil("/info", not_yet, 1);
    let told = tokio::task::spawn_blocking(|| kernels::docker(&["info", "--format", "{{json .}}"]));
    let mut info: Json = serde_json::from_str(&told.await??)?;
    for (name, value) in changes.as_object().context("changes")? {
        info[name] = value.clone();
    }
    engine.spoil("/info", Fault::json(200, &info.to_string()), usize::MAX);
    let driver = StandIn::new(&format!(
        "device 0 uuid={UUID} name=Stand-in mem=85899345920 pci=00000000:10:00.0\n"
    ))?;
    let mut environment = driver.environment();
    environment.push(("DOCKER_HOST".to_owned(), engine.host()));
    let node = Node::start(NodeOptions {
        sections: format!("[node.accelerators]\n{settings}\n"),
        environment,
        ..NodeOptions::default()
    })
    .await?;
    wait::until("a device", Duration::from_secs(60), || async {
        let status = kernels::ask(&node, "bai.status", Vec::new()).await.ok()?;
        (status["slots"]["cuda.device"]["total"] == "1").then_some(())
    })
    .await?;
    wait::until("the engine's word", Duration::from_secs(60), || async {
        let told = node.log("bai-agent");
        told.contains("has said what it can do for devices")
            .then_some(())
    })
    .await?;
    Ok((node, engine, driver))
}

/// What the engine is asked for, and what the real one says to it.
async fn asked(settings: &str, changes: &Json) -> Result<(Json, String)> {
    let (node, engine, _driver) = start(settings, changes).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"]["cuda.device"] = json!("1");
    // Its users are the host's own, as it has said by now: nobody else gets into the scratch.
    let scratch = node.scratch(&order.kernel.to_string());
    let (seen, mode) = std::sync::mpsc::channel();
    engine.before("/containers/create", move || {
        let found = std::fs::metadata(&scratch).map(|it| it.permissions().mode() & 0o777);
        let _ = seen.send(found.ok());
    });
    let failure = kernels::fail_to_create(&node, &order).await?;
    assert_eq!(mode.try_recv()?, Some(0o700));
    let held = kernels::devices_held(&node).await?;
    ensure!(held == json!({}), "a failed creation holds {held}");
    kernels::assert_clean(&node).await?;
    let bodies = engine.bodies("/containers/create");
    let body: Json = serde_json::from_slice(bodies.last().context("a creation")?)?;
    Ok((body["HostConfig"]["DeviceRequests"].clone(), failure.repr))
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_requested_by_what_the_engine_has() -> Result<()> {
    let by_driver = json!([{
        "Driver": "nvidia",
        "DeviceIDs": [UUID],
        "Capabilities": [["utility", "compute", "video", "graphics", "display"]],
    }]);
    let by_cdi = json!([{"Driver": "cdi", "DeviceIDs": [format!("nvidia.com/gpu={UUID}")]}]);
    let cdi = json!({
        "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"],
        "DiscoveredDevices": [{"Source": "cdi", "ID": format!("nvidia.com/gpu={UUID}")}],
    });
    let explicit = "cuda-injection = \"cdi\"";
    for (settings, changes, wanted, driver) in [
        ("", json!({}), &by_driver, "nvidia"),
        ("", cdi, &by_cdi, "cdi"),
        (explicit, json!({}), &by_cdi, "cdi"),
    ] {
        let (requests, said) = asked(settings, &changes).await?;
        let found: Vec<Json> = serde_json::from_value(requests.clone())?;
        // The engine takes left-out and empty fields for the same.
        let plain: Vec<Json> = found
            .into_iter()
            .map(|mut request| {
                if let Some(fields) = request.as_object_mut() {
                    fields.retain(|_, value| !value.is_null());
                }
                request
            })
            .collect();
        ensure!(json!(plain) == *wanted, "{changes}: {requests}");
        // It has understood the request, and lacks the driver.
        let words = format!("could not select device driver \\\"{driver}\\\"");
        let plain = format!("could not select device driver \"{driver}\"");
        ensure!(said.contains(&words) || said.contains(&plain), "{said}");
    }
    Ok(())
}
