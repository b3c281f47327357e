//! Control killed at each step: what runs goes on, what was begun is finished, what belongs to
//! nobody is removed.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use control::rpc::{self, Value};
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::Image;
use harness::kernels::{self, Order, text};
use harness::node::{Node, NodeOptions};
use harness::wait;
use serde_json::{Value as Json, json};
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(30);

/// Sends `create_kernels` and does not wait for the answer.
async fn begin_creation(node: &Node, order: &Order) -> Result<()> {
    let (client, args) = (node.client().await?, order.arguments());
    tokio::spawn(async move {
        // The agent is killed under it.
        let _ = client
            .call("create_kernels", args, Vec::new(), Duration::from_secs(100))
            .await;
    });
    Ok(())
}

async fn container_of(node: &Node) -> Result<String> {
    wait::until("the container is there", SOON, || async {
        node.containers().ok()?.pop()
    })
    .await
}

async fn wait_state(node: &Node, kernel: Uuid, wanted: Option<&str>) -> Result<()> {
    wait::until(&format!("the kernel is {wanted:?}"), SOON, || async {
        (kernels::state(node, kernel).await.ok()?.as_deref() == wanted).then_some(())
    })
    .await
}

// The runner is connected again in the background.
async fn wait_usable(node: &Node, order: &Order) -> Result<()> {
    wait::until("the runner is connected", SOON, || async {
        let pinged = kernels::ask(node, "ping_kernel", vec![text(order.kernel)])
            .await
            .ok()?;
        pinged["started_at"].is_number().then_some(())
    })
    .await
}

/// Begins a run that goes on. Once its steps have begun it says nothing any more.
async fn begin_silent_run(node: &Node, order: &Order) -> Result<()> {
    for (mode, status) in [("batch", "clean-finished"), ("continue", "build-finished")] {
        let silent = vec![
            text(order.session),
            text(order.kernel),
            Value::Int(3),
            Value::from("silent"),
            Value::from(mode),
            Value::from(""),
            rpc::to_value(&json!({ "exec": "sleep 1000" }))?,
            Value::Float(20.0),
        ];
        let reply = kernels::ask(node, "execute", silent).await?;
        assert_eq!(reply["status"], status);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_control_adopts_its_kernels() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let before = kernels::ask(&node, "bai.status", vec![]).await?;
    node.kill_control()?;
    // As the agent of an earlier version left its kernels.
    let mark = node.scratch_root().join(format!("{}.owner", order.kernel));
    std::fs::remove_file(&mark)?;
    // As a restart that was not begun leaves its journal: its ports are nobody's.
    let journal = node.state().join("kernels").join(node.agent_id());
    let journal = journal.join(format!("{}.json", order.kernel));
    let mut record: Json = serde_json::from_slice(&std::fs::read(&journal)?)?;
    record["record"]["ports_ahead"] = json!([node.ports().1]);
    std::fs::write(&journal, record.to_string())?;
    node.start_control().await?;
    assert_eq!(
        kernels::state(&node, order.kernel).await?.as_deref(),
        Some("running")
    );
    wait::until("its scratch is marked", SOON, || async {
        (std::fs::read_to_string(&mark).ok()? == node.agent_id()).then_some(())
    })
    .await?;
    // The first answer already knows what is held.
    let after = kernels::ask(&node, "bai.status", vec![]).await?;
    assert_eq!(after["slots"], before["slots"]);
    assert_eq!(after["ports"]["free"], before["ports"]["free"]);
    assert_eq!(
        kernels::create(&node, &order).await?,
        result,
        "a retry has the same answer"
    );
    wait_usable(&node, &order).await?;
    let ran = kernels::run(&node, &order, "echo still here").await?;
    assert_eq!(ran.output, "still here\n");
    // Another kernel gets other ports.
    let second = Order::of(Image::Runner)?;
    let other = kernels::create(&node, &second).await?;
    for service in ["sshd", "ttyd", "web"] {
        assert_ne!(
            kernels::host_ports(&result, service),
            kernels::host_ports(&other, service)
        );
    }
    kernels::destroy(&node, &order).await?;
    kernels::destroy(&node, &second).await?;
    assert_eq!(kernels::ends(&node, order.kernel).await?.len(), 1);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_control_leaves_its_kernels_alone() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    begin_silent_run(&node, &order).await?;
    node.stop_control()?;
    assert!(node.log("bai-agent").contains("kernels go on"));
    assert_eq!(
        node.containers()?,
        [result["container_id"].as_str().unwrap().to_owned()]
    );
    node.start_control().await?;
    wait_usable(&node, &order).await?;
    kernels::restart(&node, &order).await?;
    let told = kernels::events(&node, order.session).await?;
    let told: Vec<_> = told.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(told, ["execution_cancelled", "kernel_started"]);
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_found_out_of_an_image_is_kept() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Python)?;
    let labels = order.config["image"]["labels"].as_object_mut().unwrap();
    labels.remove("ai.backend.base-distro").expect("a label");
    kernels::create(&node, &order).await?;
    kernels::destroy(&node, &order).await?;
    node.stop_control()?;
    let file = node.state().join("distros.json");
    let kept: Json = serde_json::from_slice(&std::fs::read(&file)?)?;
    let id = order.config["image"]["digest"].as_str().unwrap();
    assert_eq!(kept, json!({id: "ubuntu22.04"}));
    // The next life believes it, without a look into the image: no such files are packaged.
    std::fs::write(&file, json!({id: "nosuch1.0"}).to_string())?;
    node.start_control().await?;
    let failure = kernels::fail_to_create(&node, &order).await?;
    assert!(failure.repr.contains("nosuch1.0"), "{}", failure.repr);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn defect_unregistered_live_containers_are_killed() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Services)?;
    let result = kernels::create(&node, &order).await?;
    let before = kernels::ask(&node, "bai.status", vec![]).await?;
    node.kill_control()?;
    std::fs::remove_dir_all(node.state().join("kernels"))?;
    node.start_control().await?;
    assert_eq!(
        kernels::state(&node, order.kernel).await?.as_deref(),
        Some("running")
    );
    wait_usable(&node, &order).await?;
    let ran = kernels::run(&node, &order, "echo adopted").await?;
    assert_eq!(ran.output, "adopted\n");
    // What a manager that believes it under creation is told; of the services once the runner has.
    let again = wait::until("the services are known", SOON, || async {
        let again = kernels::create(&node, &order).await.ok()?;
        (again["service_ports"] == result["service_ports"]).then_some(again)
    })
    .await?;
    for part in ["id", "container_id", "kernel_host", "repl_in_port"] {
        assert_eq!(again[part], result[part], "{part}");
    }
    let given = |result: &Json| result["resource_spec"]["allocations"].clone();
    assert_eq!(given(&again), given(&result));
    let after = kernels::ask(&node, "bai.status", vec![]).await?;
    assert_eq!(
        after["slots"], before["slots"],
        "devices are known from resource.txt"
    );
    assert_eq!(
        after["ports"]["free"], before["ports"]["free"],
        "ports are known from the label"
    );
    let args = vec![text(order.kernel), Value::from("pair"), Value::Map(vec![])];
    assert_eq!(
        kernels::ask(&node, "start_service", args).await?["status"],
        "started"
    );
    for port in kernels::host_ports(&result, "pair") {
        assert!(kernels::fetch(port, "/")?.starts_with("HTTP/1"));
    }
    // Its files lie elsewhere for an agent that is started in another directory, with a relative scratch-root.
    node.kill_control()?;
    std::fs::remove_dir_all(node.state().join("kernels"))?;
    let text = std::fs::read_to_string(node.config_file())?;
    std::fs::write(
        node.config_file(),
        text.replace("/scratches\"", "/elsewhere\""),
    )?;
    node.start_control().await?;
    let elsewhere = kernels::ask(&node, "bai.status", vec![]).await?;
    assert_eq!(elsewhere["slots"], before["slots"], "devices stay taken");
    let told = node.log("bai-agent");
    assert!(
        told.contains("lies outside container.scratch-root"),
        "{told}"
    );
    kernels::destroy(&node, &order).await?;
    let left = node.scratch(&order.kernel.to_string());
    std::fs::remove_dir_all(&left)?;
    std::fs::remove_file(left.with_extension("owner"))?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_died_meanwhile_is_finished() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    kernels::run(&node, &order, "echo last words").await?;
    begin_silent_run(&node, &order).await?;
    // Runs that go on are in the journal soon, and nobody else will know of this one.
    let journal = node.state().join("kernels").join(node.agent_id());
    let journal = journal.join(format!("{}.json", order.kernel));
    wait::until("the journal knows of the run", SOON, || async {
        let record: Json = serde_json::from_slice(&std::fs::read(&journal).ok()?).ok()?;
        (record["record"]["runs_owed"] == 1).then_some(())
    })
    .await?;
    node.kill_control()?;
    kernels::docker(&["kill", result["container_id"].as_str().unwrap()])?;
    node.start_control().await?;
    let end = kernels::wait_end(&node, order.kernel).await?;
    assert_eq!(end, ("self-terminated".to_owned(), 137));
    wait_state(&node, order.kernel, None).await?;
    let told = kernels::events(&node, order.session).await?;
    let told: Vec<_> = told.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(told, ["execution_cancelled", "kernel_terminated"]);
    let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)]).await?;
    assert!(
        logs["logs"].as_str().unwrap().contains("last words"),
        "{logs}"
    );
    kernels::assert_clean(&node).await
}

// The manager takes the end of a kernel that died by itself only once it destroys the session.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_is_told_after_restarts_of_the_agent() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    kernels::docker(&["kill", result["container_id"].as_str().unwrap()])?;
    let end = kernels::wait_end(&node, order.kernel).await?;
    wait_state(&node, order.kernel, None).await?;
    assert_eq!(end, ("self-terminated".to_owned(), 137));
    let shown = async |node: &Node| -> Result<(Json, Json)> {
        let status = kernels::ask(node, "bai.status", vec![]).await?;
        let known = kernels::ask(node, "bai.kernels", vec![Value::Bool(true)]).await?;
        Ok((status["died"].clone(), known["kernels"].clone()))
    };
    let before = shown(&node).await?;
    assert_eq!(before.0[0]["kernel_id"], json!(order.kernel), "{before:?}");
    // Killed, and stopped in good order.
    for kill in [true, false] {
        if kill {
            node.kill_control()?;
        } else {
            node.stop_control()?;
        }
        node.start_control().await?;
        assert_eq!(shown(&node).await?, before, "cause and time stay");
        kernels::destroy(&node, &order).await?;
        // The events of this life of the agent.
        assert_eq!(kernels::ends(&node, order.kernel).await?, vec![end.clone()]);
    }
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_cut_short_goes_on() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["bootstrap_script"] = json!("sleep 6\n");
    begin_creation(&node, &order).await?;
    let container = container_of(&node).await?;
    wait::until("the container runs", SOON, || async {
        let state =
            kernels::docker(&["inspect", "--format", "{{.State.Running}}", &container]).ok()?;
        (state == "true").then_some(())
    })
    .await?;
    node.kill_control()?;
    node.start_control().await?;
    assert_eq!(
        kernels::ask(&node, "check_creating", vec![text(order.kernel)]).await?,
        json!(true)
    );
    wait_state(&node, order.kernel, Some("running")).await?;
    let names: Vec<String> = kernels::events(&node, order.kernel)
        .await?
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.contains(&"kernel_started".to_owned()), "{names:?}");
    let ran = kernels::run(&node, &order, "echo ready").await?;
    assert_eq!(ran.output, "ready\n");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_up_cut_short_is_finished_with_its_reason() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let container = result["container_id"].as_str().unwrap();
    kernels::docker(&[
        "exec",
        "-d",
        "-u",
        "root",
        container,
        "sh",
        "-c",
        "kill -STOP $(pidof bai-krunner)",
    ])?;
    let client = node.client().await?;
    let args = vec![
        text(order.kernel),
        text(order.session),
        Value::from("idle-timeout"),
    ];
    tokio::spawn(async move {
        let _ = client
            .call("destroy_kernel", args, Vec::new(), Duration::from_secs(100))
            .await;
    });
    // Once the journal says so, the end is certain; before that the destroy was never answered.
    let journal = node.state().join("kernels").join(node.agent_id());
    let journal = journal.join(format!("{}.json", order.kernel));
    wait::until("the journal says that the kernel ends", SOON, || async {
        let text = std::fs::read_to_string(&journal).ok()?;
        text.contains("idle-timeout").then_some(())
    })
    .await?;
    node.kill_control()?;
    node.start_control().await?;
    let (reason, _) = kernels::wait_end(&node, order.kernel).await?;
    assert_eq!(reason, "idle-timeout");
    wait_state(&node, order.kernel, None).await?;
    assert_eq!(kernels::ends(&node, order.kernel).await?.len(), 1);
    kernels::assert_clean(&node).await
}

// Journals as a killed control leaves them between two steps.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_without_a_container_is_undone() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let journal = node.state().join("kernels").join(node.agent_id());
    let mut expected = Vec::new();
    for (phase, reason) in [
        ("files", "failed-to-create"),
        ("container", "failed-to-create"),
        ("running", "container-not-found"),
        ("restarting", "restart-timeout"),
    ] {
        let order = Order::of(Image::Runner)?;
        kernels::create(&node, &order).await?;
        let file = journal.join(format!("{}.json", order.kernel));
        let text = std::fs::read_to_string(&file)?;
        kernels::destroy(&node, &order).await?;
        let mut record: serde_json::Value = serde_json::from_str(&text)?;
        record["record"]["phase"] = json!(phase);
        if phase == "restarting" {
            // Nobody knows what it was made from, so it can't be made again.
            record["record"]["request"] = json!(null);
        }
        expected.push((order.kernel, file, record, reason));
    }
    node.kill_control()?;
    for (kernel, file, record, _) in &expected {
        std::fs::write(file, record.to_string())?;
        std::fs::create_dir_all(node.scratch(&kernel.to_string()).join("config"))?;
    }
    node.start_control().await?;
    for (kernel, _, _, reason) in &expected {
        assert_eq!(
            kernels::wait_end(&node, *kernel).await?,
            ((*reason).to_owned(), -1)
        );
    }
    wait::until("nothing is left", SOON, || async {
        kernels::remains(&node).await.ok()?.is_empty().then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_cut_short_goes_on() -> Result<()> {
    let engine = FaultDocker::start()?;
    let mut node = Node::start(NodeOptions {
        engine: Some(engine.host()),
        // Four of the kernel, and one.
        ports: 5,
        ..NodeOptions::default()
    })
    .await?;
    let volume = tempfile::tempdir()?;
    let (folder, away) = (volume.path().join("data"), volume.path().join("away"));
    std::fs::create_dir(&folder)?;
    let serve_on = |port: u16| {
        let definition = format!(
            "models:\n- name: idle\n  model_path: /home/work/data\n  service:\n    \
            start_command: [sleep, '1000']\n    port: {port}\n"
        );
        std::fs::write(folder.join("model-definition.yaml"), definition)
    };
    serve_on(8600)?;
    let mut order = Order::of(Image::Runner)?;
    order.config["session_type"] = json!("inference");
    order.config["internal_data"] =
        json!({"runtime_variant": "custom", "model_definition_path": null});
    order.config["mounts"] = json!([{
        "name": "data", "vfid": null, "vfsubpath": null, "host_path": folder.display().to_string(),
        "kernel_path": "/home/work/data", "mount_perm": "rw", "usage_mode": "model",
    }]);
    let before = kernels::create(&node, &order).await?;
    let limits = async |container: &str| -> Result<Json> {
        let format = "[{{json .HostConfig.Memory}}, {{json .HostConfig.CpusetCpus}}]";
        let told = kernels::docker(&["inspect", "--format", format, container])?;
        Ok(serde_json::from_str(&told)?)
    };
    let of_before = limits(before["container_id"].as_str().unwrap()).await?;
    kernels::run(&node, &order, "echo kept > /home/work/file").await?;

    // An engine that is at it already is asked again.
    let removing = r#"{"message": "removal of container x is already in progress"}"#;
    engine.spoil("DELETE ", Fault::json(409, removing), 1);
    kernels::restart(&node, &order).await?;

    // From here on with another port for its model.
    serve_on(8601)?;
    let stops = |line: &String| line.contains("/stop");
    let stopped = engine.requests().into_iter().filter(stops).count();
    engine.spoil("/stop", Fault::Hang, 1);
    let mut environ = order.config["environ"].clone();
    environ["CHANGED"] = json!("by the restart");
    let changes = rpc::to_value(&json!({ "environ": environ }))?;
    let (client, args) = (
        node.client().await?,
        vec![text(order.session), text(order.kernel), Value::Nil, changes],
    );
    tokio::spawn(async move {
        // The agent is killed under it.
        let _ = client
            .call("restart_kernel", args, Vec::new(), Duration::from_secs(100))
            .await;
    });
    wait::until("the old container is to stop", SOON, || async {
        let asked = engine.requests().into_iter().filter(stops).count();
        (asked > stopped).then_some(())
    })
    .await?;
    let poll = vec![
        text(order.session),
        text(order.kernel),
        Value::Int(3),
        Value::from("poll"),
        Value::from("continue"),
        Value::from(""),
        Value::Map(vec![]),
        Value::Float(0.1),
    ];
    let polled = kernels::ask(&node, "execute", poll).await?;
    assert_eq!(polled["status"], "continued", "no poll waits for a restart");
    node.kill_control()?;

    // The old container still runs. It goes when the engine is well again, perhaps under another agent.
    engine.spoil(
        "DELETE ",
        Fault::json(500, r#"{"message": "not now"}"#),
        usize::MAX,
    );
    node.start_control().await?;
    wait::until("the removal fails", SOON, || async {
        let words = "cannot remove the old container";
        (node.log("bai-agent").matches(words).count() >= 2).then_some(())
    })
    .await?;
    // Nobody else gets the port that was taken for the new one.
    let none = kernels::call(&node, "assign_port", Vec::new()).await?;
    let none = none.expect_err("no port is left").repr;
    assert!(none.contains("container.port-range"), "{none}");
    node.stop_control()?;
    engine.behave();
    engine.spoil("/containers/create", Fault::Hang, 1);
    node.start_control().await?;
    wait::until("the new container is asked for", SOON, || async {
        let asked = engine.requests().into_iter();
        let creations = asked.filter(|line| line.contains("/containers/create"));
        (creations.count() == 3).then_some(())
    })
    .await?;
    assert!(node.containers()?.is_empty(), "the old one is gone");
    node.kill_control()?;

    // What is not there at the start may come, whatever becomes of the agent meanwhile.
    std::fs::rename(&folder, &away)?;
    for start in ["first", "second"] {
        node.start_control().await?;
        wait::until("it is tried", SOON, || async {
            let words = "cannot be made again yet";
            let tries = node.log("bai-agent").matches(words).count();
            (tries >= if start == "first" { 1 } else { 2 }).then_some(())
        })
        .await?;
        wait_state(&node, order.kernel, Some("restarting")).await?;
        if start == "first" {
            node.stop_control()?;
        }
    }
    std::fs::rename(&away, &folder)?;
    wait_state(&node, order.kernel, Some("running")).await?;
    let ran = kernels::run(&node, &order, "cat /home/work/file; echo $CHANGED").await?;
    assert_eq!(ran.output, "kept\nby the restart\n");
    let containers = node.containers()?;
    assert_eq!(containers.len(), 1);
    assert_eq!(limits(&containers[0]).await?, of_before);
    let shown = kernels::ask(&node, "bai.kernels", vec![Value::Bool(false)]).await?;
    let ports = |shown: &Json| kernels::host_ports(shown, "web");
    assert_eq!(ports(&shown["kernels"][0]), ports(&before));
    let moved = kernels::host_ports(&shown["kernels"][0], "idle-8601");
    assert_eq!(moved.len(), 1, "{shown}");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

// Defect 5 of the original: exited and unstarted containers, and scratch directories, stayed.
#[tokio::test(flavor = "multi_thread")]
async fn defect_remains_are_never_collected() -> Result<()> {
    let engine = Arc::new(FaultDocker::start()?);
    let mut node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..NodeOptions::default()
    })
    .await?;
    let image = harness::images::image(Image::Bare)?;
    let owner = format!("ai.backend.owner={}", node.agent_id());
    let (unstarted, exited, session) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let (old, young) = (Uuid::new_v4(), Uuid::new_v4());
    // Of another agent that is in the middle of a restart, and of one that leaves no mark.
    let (theirs, unmarked) = (Uuid::new_v4(), Uuid::new_v4());
    node.kill_control()?;
    let session = format!("ai.backend.session-id={session}");
    let name = |id: Uuid| format!("kernel.bare.{id}");
    let created = kernels::docker(&[
        "create",
        "--name",
        &name(unstarted),
        "--label",
        &owner,
        "--label",
        &session,
        &image,
        "sleep",
        "1",
    ])?;
    kernels::docker(&[
        "run",
        "-d",
        "--name",
        &name(exited),
        "--label",
        &owner,
        "--label",
        &session,
        &image,
        "sh",
        "-c",
        "echo bye; exit 4",
    ])?;
    let root = node.scratch_root();
    let mark = |id: Uuid| root.join(format!("{id}.owner"));
    for (id, owner) in [
        (old, Some(node.agent_id())),
        (young, Some(node.agent_id())),
        (theirs, Some("i-another-agent")),
        (unmarked, None),
    ] {
        let scratch = node.scratch(&id.to_string());
        std::fs::create_dir_all(scratch.join("config"))?;
        if let Some(owner) = owner {
            std::fs::write(mark(id), owner)?;
        }
        if id != young {
            let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
            std::fs::File::open(scratch)?.set_modified(hour_ago)?;
        }
    }
    // A commit that was cut short, and one that is not this agent's.
    let (cut, foreign) = (Uuid::new_v4(), Uuid::new_v4());
    let image_of = |commit: Uuid| {
        let label = format!("LABEL ai.backend.internal.commit={commit}");
        let comment = commit.to_string();
        kernels::docker(&["commit", "-m", &comment, "-c", &label, &name(unstarted)])
    };
    let (left, others) = (image_of(cut)?, image_of(foreign)?);
    // One that somebody has made from it bears its label, and is theirs.
    let label = format!("LABEL ai.backend.internal.commit={cut}");
    let derived = kernels::docker(&["commit", "-c", &label, &name(unstarted)])?;
    let notes = node.state().join("commits").join(node.agent_id());
    let part = node.state().join(".kept.tar.gz.part");
    std::fs::write(&part, "half")?;
    let note = json!({"version": 1, "record": {"part": part}}).to_string();
    std::fs::write(notes.join(format!("{cut}.json")), note)?;
    // The second list, which remains of nobody are looked for by, keeps the managers waiting for nothing.
    let slow = engine.clone();
    engine.before("ai.backend.owner%3D", move || {
        slow.spoil("/containers/json?all=true", Fault::Keep, 1);
    });
    // Nor do they wait for an engine that takes long to remove what nobody wants.
    let removal = format!("/containers/{}?force", created.trim());
    engine.spoil(&removal, Fault::Keep, 1);
    node.start_control().await?;
    wait::until("the second list is asked for", SOON, || async {
        (engine.kept() == 2).then_some(())
    })
    .await?;
    engine.let_go();
    wait::until("no container is left", SOON, || async {
        node.containers().ok()?.is_empty().then_some(())
    })
    .await?;
    assert_eq!(
        kernels::wait_end(&node, exited).await?,
        ("self-terminated".to_owned(), 4)
    );
    assert!(kernels::ends(&node, unstarted).await?.is_empty());
    wait::until("nothing is left of the commit", SOON, || async {
        let noted = std::fs::read_dir(&notes).ok()?.next().is_some();
        (!noted && !part.exists()).then_some(())
    })
    .await?;
    let is_there = |image: &str| kernels::docker(&["image", "inspect", image]).is_ok();
    assert!(!is_there(&left) && is_there(&others) && is_there(&derived));
    kernels::docker(&["rmi", &others, &derived])?;
    wait::until("all scratch directories are looked at", SOON, || async {
        let looked = node.log("bai-agent").contains("that bear no agent's mark");
        looked.then_some(())
    })
    .await?;
    assert!(!node.scratch(&old.to_string()).exists() && !mark(old).exists());
    for (id, why) in [
        (young, "it is as young as one that is just being made"),
        (theirs, "it is another agent's"),
        (unmarked, "nobody says whose it is"),
    ] {
        assert!(node.scratch(&id.to_string()).exists(), "{why}");
        std::fs::remove_dir_all(node.scratch(&id.to_string()))?;
    }
    std::fs::remove_file(mark(young))?;
    std::fs::remove_file(mark(theirs))?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_found_while_running_are_taken_care_of() -> Result<()> {
    let engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        agent: "sync-container-lifecycles = { enabled = true, interval = 0.5 }".to_owned(),
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..NodeOptions::default()
    })
    .await?;
    let image = harness::images::image(Image::Bare)?;
    let owner = format!("ai.backend.owner={}", node.agent_id());
    let mut ids = [Uuid::new_v4(), Uuid::new_v4()];
    ids.sort();
    let mut containers = Vec::new();
    // Between its creation and its start one is taken for remains.
    engine.spoil("/containers/json", Fault::Close, usize::MAX);
    for id in ids {
        let session = format!("ai.backend.session-id={}", Uuid::new_v4());
        let name = format!("kernel.bare.{id}");
        // Somebody's work that this agent was not told of.
        containers.push(kernels::docker(&[
            "run", "-d", "--name", &name, "--label", &owner, "--label", &session, &image, "sleep",
            "600",
        ])?);
    }
    engine.behave();
    for id in ids {
        wait_state(&node, id, Some("running")).await?;
    }
    // Nobody tells of their ends, and the engine stumbles over one of them.
    let broken = r#"{"message": "cannot read the container's state"}"#;
    let look = format!("{}/json", containers[0].trim());
    engine.spoil("/events", Fault::Close, usize::MAX);
    engine.spoil(&look, Fault::json(500, broken), usize::MAX);
    engine.cut_all();
    for container in &containers {
        kernels::docker(&["kill", container])?;
    }
    let killed = ("self-terminated".to_owned(), 137);
    assert_eq!(kernels::wait_end(&node, ids[1]).await?, killed);
    wait_state(&node, ids[1], None).await?;
    engine.behave();
    assert_eq!(kernels::wait_end(&node, ids[0]).await?, killed);
    wait_state(&node, ids[0], None).await?;
    kernels::assert_clean(&node).await
}
