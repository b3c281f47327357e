//! The manager's housekeeping calls, other ways to publish ports, and limits of the node.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use control::rpc::{self, Value};
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::Image;
use harness::kernels::{self, Order, commit, text};
use harness::node::{Node, NodeOptions};
use harness::registry::Registry;
use harness::silent_mount::SilentMount;
use harness::wait;
use serde_json::json;
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(40);

async fn wait_clean(node: &Node) -> Result<()> {
    wait::until("nothing is left", SOON, || async {
        kernels::remains(node).await.ok()?.is_empty().then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_are_compared_and_strangers_removed() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let pair = |a: String, b: String| Value::Array(vec![Value::Str(a), Value::Str(b)]);

    // A container that the kernel does not have any more is not its container.
    let stranger = pair("ab".repeat(32), order.kernel.to_string());
    assert_eq!(
        kernels::ask(
            &node,
            "purge_containers",
            vec![Value::Array(vec![stranger])]
        )
        .await?,
        json!({})
    );
    // Listed and known: nothing happens. Listed and unknown: its end is told.
    let (unknown, session) = (Uuid::new_v4(), Uuid::new_v4());
    let list = vec![
        pair(order.kernel.to_string(), order.session.to_string()),
        pair(unknown.to_string(), session.to_string()),
    ];
    assert_eq!(
        kernels::ask(&node, "sync_kernel_registry", vec![Value::Array(list)]).await?,
        json!(null)
    );
    assert_eq!(
        kernels::ends(&node, unknown).await?,
        [("already-terminated".to_owned(), -1)]
    );
    assert_eq!(
        kernels::state(&node, order.kernel).await?.as_deref(),
        Some("running")
    );

    let purged = pair(
        result["container_id"].as_str().unwrap().to_owned(),
        order.kernel.to_string(),
    );
    assert_eq!(
        kernels::ask(&node, "purge_containers", vec![Value::Array(vec![purged])]).await?,
        json!({})
    );
    wait_clean(&node).await?;
    assert!(
        kernels::ends(&node, order.kernel).await?.is_empty(),
        "the manager knows already"
    );
    // The destroy that it had begun comes after the purge.
    kernels::destroy(&node, &order).await?;
    let told = &kernels::ends(&node, order.kernel).await?[0];
    assert_eq!(told.0, "user-requested");

    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    let ids = Value::Array(vec![Value::Uuid(order.kernel), Value::Uuid(unknown)]);
    assert_eq!(
        kernels::ask(&node, "drop_kernel_registry", vec![ids]).await?,
        json!({})
    );
    wait_clean(&node).await?;

    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    kernels::ask(&node, "sync_kernel_registry", vec![Value::Array(vec![])]).await?;
    wait_clean(&node).await?;

    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    assert_eq!(
        kernels::ask(&node, "reset_agent", vec![]).await?,
        json!(null)
    );
    kernels::assert_clean(&node).await?;
    assert_eq!(
        kernels::ends(&node, order.kernel).await?[0].0,
        "agent-termination"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn assigned_ports_wait_for_their_kernel() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let port = kernels::ask(&node, "assign_port", vec![])
        .await?
        .as_u64()
        .unwrap();
    let other = kernels::ask(&node, "assign_port", vec![])
        .await?
        .as_u64()
        .unwrap();
    node.kill_control()?;
    node.start_control().await?;
    let status = kernels::ask(&node, "bai.status", vec![]).await?;
    assert_eq!(
        status["ports"]["free"],
        json!(38),
        "both are still held: {status}"
    );
    kernels::ask(
        &node,
        "release_port",
        vec![Value::Int(i64::try_from(other)?)],
    )
    .await?;

    let mut order = Order::of(Image::Runner)?;
    order.cluster["cluster_ssh_port_mapping"] = json!({"main1": ["127.0.0.1", port]});
    let result = kernels::create(&node, &order).await?;
    assert_eq!(kernels::host_ports(&result, "sshd"), [u16::try_from(port)?]);
    // A port of a kernel is freed by the kernel's end, whoever asks.
    kernels::ask(
        &node,
        "release_port",
        vec![Value::Int(i64::try_from(port)?)],
    )
    .await?;
    let second = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &second).await?;
    assert!(!kernels::host_ports(&result, "sshd").contains(&u16::try_from(port)?));
    kernels::destroy(&node, &order).await?;
    kernels::destroy(&node, &second).await?;
    kernels::assert_clean(&node).await
}

// Defect 10 of the original: the host's network could not be used.
#[tokio::test(flavor = "multi_thread")]
async fn defect_host_network_mode_broken() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.cluster["network_config"] = json!({"mode": "host"});
    let result = kernels::create(&node, &order).await?;
    let (first, last) = node.ports();
    for port in ["repl_in_port", "repl_out_port"] {
        let port = u16::try_from(result[port].as_u64().unwrap())?;
        assert!((first..=last).contains(&port), "{result}");
    }
    let ran = kernels::run(&node, &order, "echo on the host").await?;
    assert_eq!(ran.output, "on the host\n");
    let sshd = kernels::host_ports(&result, "sshd")[0];
    let banner = wait::until("sshd answers on its own port", SOON, || async {
        use std::io::Read;
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", sshd)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
        let mut banner = [0; 4];
        stream.read_exact(&mut banner).ok()?;
        Some(banner)
    })
    .await?;
    assert_eq!(&banner, b"SSH-");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

// Defect 16 of the original, where it can still happen: the engine finds a port in use at the start.
#[tokio::test(flavor = "multi_thread")]
async fn defect_busy_host_port_fails_the_creation() -> Result<()> {
    let engine = FaultDocker::start()?;
    let mut node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        node: "publish = \"engine\"".to_owned(),
        dataplane: false,
        ..NodeOptions::default()
    })
    .await?;
    let taken = r#"{"message": "driver failed programming external connectivity on endpoint x: Bind for 127.0.0.1:1 failed: port is already allocated"}"#;
    engine.spoil("/start", Fault::json(500, taken), 2);
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    assert_eq!(node.containers()?.len(), 1);
    let args = vec![text(order.kernel), Value::from("web"), Value::Map(vec![])];
    assert_eq!(
        kernels::ask(&node, "start_service", args).await?["status"],
        "started"
    );
    let port = kernels::host_ports(&result, "web")[0];
    assert!(kernels::fetch(port, "/")?.contains("It works"));

    // A kernel whose ports the engine holds is adopted with them.
    node.kill_control()?;
    std::fs::remove_dir_all(node.state().join("kernels"))?;
    node.start_control().await?;
    let shown = kernels::ask(&node, "bai.kernels", vec![Value::Bool(false)]).await?;
    assert_eq!(kernels::host_ports(&shown["kernels"][0], "web"), [port]);
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn creations_at_work_are_bounded_for_the_node() -> Result<()> {
    let node = Node::start(NodeOptions {
        agent: "kernel-creation-concurrency = 1".to_owned(),
        node: "folder-wait = 10.0".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let mut slow = Order::of(Image::Runner)?;
    // Until the test lets it go on; without the test it ends, too.
    slow.config["bootstrap_script"] =
        json!("for i in $(seq 600); do [ -e /home/work/go-on ] && break; sleep 0.1; done\n");
    let quick = Order::of(Image::Runner)?;
    let client = node.client().await?;
    let (arguments, limit) = (slow.arguments(), Duration::from_secs(120));
    let first = tokio::spawn(async move {
        let call = client.call("create_kernels", arguments, Vec::new(), limit);
        call.await
    });
    wait::until("the first kernel has begun", SOON, || async {
        has_begun(&node, &slow).await.then_some(())
    })
    .await?;
    // Of another call, and not kept by what the first one's user has it do first.
    kernels::create(&node, &quick).await?;
    ensure!(
        kernels::state(&node, slow.kernel).await?.as_deref() == Some("preparing"),
        "the first kernel is no longer in its bootstrap script"
    );
    // One at a time they were made, though.
    let (started, created) = (
        container_time(&slow, "State.StartedAt")?,
        container_time(&quick, "Created")?,
    );
    ensure!(started < created, "{started} before {created}");
    let work = node.scratch(&format!("{}/work", slow.kernel));
    std::fs::write(work.join("go-on"), "")?;
    first.await??;
    kernels::destroy(&node, &slow).await?;
    kernels::destroy(&node, &quick).await?;
    a_folder_that_hangs_keeps_no_turn(&node).await?;
    kernels::assert_clean(&node).await
}

async fn a_folder_that_hangs_keeps_no_turn(node: &Node) -> Result<()> {
    let place = tempfile::tempdir()?;
    let silent = SilentMount::over(place.path())?;
    let mut stuck = Order::of(Image::Runner)?;
    stuck.config["mounts"] = json!([folder("data", place.path())]);
    let mut other = Order::of(Image::Runner)?;
    let mine = tempfile::tempdir()?;
    other.config["mounts"] = json!([folder("mine", mine.path())]);
    let (failure, created) = tokio::join!(kernels::fail_to_create(node, &stuck), async {
        wait::until("it has begun", SOON, || async {
            has_begun(node, &stuck).await.then_some(())
        })
        .await?;
        one_that_waits_for_its_turn_is_destroyed(node).await?;
        kernels::create(node, &other).await
    });
    created.context("a kernel waits for the folder of another")?;
    let (failure, path) = (failure?, place.path().display().to_string());
    for words in ["the folder data", &path, "has not answered", "unmount"] {
        ensure!(failure.repr.contains(words), "{words}: {}", failure.repr);
    }
    drop(silent);
    // Nor is a kernel whose folder has begun to hang stopped for a restart, or kept from its end.
    let silent = SilentMount::over(mine.path())?;
    let refused = kernels::restart(node, &other).await.expect_err("it hangs");
    for words in ["goes on and is not restarted", "the folder mine", "unmount"] {
        ensure!(refused.to_string().contains(words), "{words}: {refused:?}");
    }
    assert_eq!(kernels::run(node, &other, "echo on").await?.output, "on\n");
    let (restarted, destroyed) = tokio::join!(
        kernels::restart(node, &other),
        kernels::destroy(node, &other)
    );
    ensure!(restarted.is_err());
    drop(silent);
    destroyed
}

/// It is destroyed at once, and the manager is told so.
async fn one_that_waits_for_its_turn_is_destroyed(node: &Node) -> Result<()> {
    let unwanted = Order::of(Image::Runner)?;
    let (refused, destroyed) = tokio::join!(kernels::fail_to_create(node, &unwanted), async {
        wait::until("the call is accepted", SOON, || async {
            kernels::state(node, unwanted.kernel).await.ok()??;
            Some(())
        })
        .await?;
        kernels::destroy(node, &unwanted).await
    });
    destroyed?;
    refused?;
    ensure!(!has_begun(node, &unwanted).await, "it did not wait");
    assert_eq!(
        kernels::ends(node, unwanted.kernel).await?,
        [("user-requested".to_owned(), -1)]
    );
    Ok(())
}

async fn has_begun(node: &Node, order: &Order) -> bool {
    let told = kernels::events(node, order.kernel).await;
    told.is_ok_and(|told| told.iter().any(|(name, _)| name == "kernel_preparing"))
}

/// A time of a kernel's container by the engine's clock; all have one form and one zone.
fn container_time(order: &Order, field: &str) -> Result<String> {
    let ids = kernels::docker(&["ps", "-aq", "--filter", &format!("name={}", order.kernel)])?;
    kernels::docker(&[
        "inspect",
        "--format",
        &format!("{{{{.{field}}}}}"),
        ids.trim(),
    ])
}

fn folder(name: &str, place: &Path) -> serde_json::Value {
    json!({"name": name, "vfid": null, "vfsubpath": null, "host_path": place.display().to_string(),
        "kernel_path": format!("/home/work/{name}"), "mount_perm": "rw", "usage_mode": "general"})
}

#[tokio::test(flavor = "multi_thread")]
async fn several_failures_come_as_one_group() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let orders = [Order::of(Image::Runner)?, Order::of(Image::Runner)?];
    let mut args = orders[0].arguments();
    args[1] = Value::Array(orders.iter().map(|order| text(order.kernel)).collect());
    let configs = orders.iter().map(|order| {
        let mut config = order.config.clone();
        config["resource_slots"] = json!({"cpu": "4096", "mem": "268435456"});
        rpc::to_value(&config).unwrap()
    });
    args[2] = Value::Array(configs.collect());
    let failure = kernels::call(&node, "create_kernels", args)
        .await?
        .unwrap_err();
    assert_eq!(failure.class, "TaskGroupError");
    assert_eq!(
        failure.repr.matches("InsufficientResource(").count(),
        2,
        "{}",
        failure.repr
    );
    // The manager is asked to compare its view.
    let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
    let told = kernels::ask(&node, "bai.events", args).await?;
    let checks = told["events"].as_array().into_iter().flatten();
    let checks: Vec<_> = checks
        .filter(|event| event["name"] == "do_agent_resource_check")
        .map(|event| &event["args"])
        .collect();
    assert_eq!(checks, [&json!([node.agent_id()]); 2]);
    kernels::assert_clean(&node).await
}

/// The manager waits 30 s, and hears nothing of an answer that comes later.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_does_not_answer_is_told_before_the_manager_gives_up() -> Result<()> {
    let engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    for hangs in ["/archive?", "/exec"] {
        engine.spoil(hangs, Fault::Hang, usize::MAX);
    }
    let work = node.scratch(&format!("{}/work", order.kernel));
    let silent = SilentMount::over(&work)?;
    let client = node.client().await?;
    let asked = async |method: &str, done: &str, with: Option<Value>| -> Result<()> {
        let mut args = vec![text(order.kernel), Value::from("some/file")];
        args.extend(with);
        let call = client.call(method, args, Vec::new(), Duration::from_secs(300));
        let said = format!("{:?}", call.await.err().context("an answer")?);
        for words in ["TimeoutError", "some/file", done] {
            ensure!(said.contains(words), "{method}: {words}: {said}");
        }
        Ok(())
    };
    let content = Value::Bin(b"x".as_slice().to_vec().into());
    tokio::try_join!(
        asked("download_file", "be read", None),
        asked("download_single", "be read", None),
        asked("list_files", "be listed", None),
        asked("upload_file", "be written", Some(content)),
    )?;
    drop(silent);
    engine.behave();
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_in_and_out() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Python)?;
    kernels::create(&node, &order).await?;
    let client = node.client().await?;
    let call = async |method: &str, args: Vec<Value>| {
        client
            .call(method, args, Vec::new(), Duration::from_secs(60))
            .await
    };
    let content = Value::Bin(b"some bytes \xff".as_slice().to_vec().into());
    let args = vec![
        text(order.kernel),
        Value::from("deep/er/file.bin"),
        content.clone(),
    ];
    assert_eq!(call("upload_file", args).await?, Value::Nil);
    let ran = kernels::run(&node, &order, "stat -c '%u:%g' deep/er/file.bin").await?;
    assert_eq!(ran.output, "1000:1000\n");
    let back = call(
        "download_single",
        vec![text(order.kernel), Value::from("deep/er/file.bin")],
    )
    .await?;
    assert_eq!(back, content);
    let archive = call(
        "download_file",
        vec![text(order.kernel), Value::from("deep")],
    )
    .await?;
    ensure!(
        archive.as_bin().is_some_and(|tar| tar.len() > 512),
        "{archive:?}"
    );
    let listing = call(
        "list_files",
        vec![text(order.kernel), Value::from("deep/er")],
    )
    .await?;
    let files = listing
        .get("files")
        .and_then(Value::as_str)
        .unwrap_or_default();
    assert!(files.contains("file.bin"), "{listing:?}");
    let failure = kernels::call(
        &node,
        "download_single",
        vec![text(order.kernel), Value::from("/etc/shadow")],
    )
    .await?;
    assert_eq!(failure.unwrap_err().class, "PermissionError");
    let query = vec![
        text(order.session),
        text(order.kernel),
        Value::Int(3),
        Value::Nil,
        Value::from("query"),
        Value::from("print(6 * 7)"),
        Value::Map(vec![]),
        Value::Float(20.0),
    ];
    let reply = kernels::ask(&node, "execute", query).await?;
    assert_eq!(
        (&reply["status"], &reply["console"]),
        (&json!("finished"), &json!([["stdout", "42\n"]]))
    );
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_not_here_is_pulled_and_told_of() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let registry = Registry::start(false)?;
    let local = harness::images::image(Image::Runner)?;
    let canonical = format!(
        "{}/stable/runner-{}:1",
        registry.address,
        Uuid::new_v4().simple()
    );
    let remove = || kernels::docker(&["rmi", "-f", &canonical]).map(drop);
    kernels::docker(&["tag", &local, &canonical])?;
    let mut order = Order::named(&canonical)?;
    order.config["image"]["is_local"] = json!(false);
    order.config["image"]["registry"] = json!({"name": registry.address, "url": ""});
    // Docker compares by digest: the tag is the only thing that is missing afterwards.
    order.config["image"]["auto_pull"] = json!("tag");
    order.config["auto_pull"] = json!("tag");
    let pushed = kernels::docker(&["push", &canonical]);
    remove()?;
    pushed?;

    let outcome = async {
        let configs = json!({ &canonical: order.config["image"] });
        kernels::ask(&node, "check_and_pull", vec![rpc::to_value(&configs)?]).await?;
        let pull_events = async || -> Option<Vec<String>> {
            let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
            let reply = kernels::ask(&node, "bai.events", args).await.ok()?;
            let events = reply["events"].as_array()?.iter();
            let of_image = events.filter(|event| event["args"][0] == canonical.as_str());
            Some(
                of_image
                    .filter_map(|event| Some(event["name"].as_str()?.to_owned()))
                    .collect(),
            )
        };
        let names = wait::until("the pull is told of", SOON, || async {
            pull_events().await.filter(|names| names.len() == 2)
        })
        .await?;
        assert_eq!(names, ["image_pull_started", "image_pull_finished"]);
        remove()?;

        kernels::create(&node, &order).await?;
        let names: Vec<String> = kernels::events(&node, order.kernel)
            .await?
            .into_iter()
            .map(|(name, _)| name)
            .filter(|name| name != "kernel_progress")
            .collect();
        assert_eq!(
            names,
            [
                "kernel_preparing",
                "kernel_pulling",
                "kernel_creating",
                "kernel_started"
            ]
        );
        kernels::destroy(&node, &order).await?;
        kernels::assert_clean(&node).await
    }
    .await;
    let _ = remove();
    outcome
}

/// The registry takes the engine's connections and says nothing, until it goes away.
#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_pull_that_a_creation_began_is_told_to_who_joins() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let registry = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let canonical = format!("{}/stable/silent:1", registry.local_addr()?);
    let mut order = Order::of(Image::Runner)?;
    order.config["image"]["canonical"] = json!(canonical);
    order.config["image"]["is_local"] = json!(false);
    order.config["image"]["registry"] =
        json!({"name": registry.local_addr()?.to_string(), "url": ""});
    order.config["image"]["auto_pull"] = json!("tag");
    order.config["auto_pull"] = json!("tag");
    let configs = json!({ &canonical: order.config["image"] });
    let told = async || -> Result<Vec<String>> {
        let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
        let reply = kernels::ask(&node, "bai.events", args).await?;
        let events = reply["events"].as_array().context("no events")?.iter();
        let names = events.filter_map(|event| event["name"].as_str().map(str::to_owned));
        Ok(names
            .filter(|name| name.starts_with("image_pull_"))
            .collect())
    };
    let ask_for_it = async {
        wait::until("the creation pulls", SOON, || async {
            let asked = vec![Value::from(canonical.as_str())];
            let pulling = kernels::ask(&node, "check_pulling", asked).await.ok()?;
            (pulling == json!(true)).then_some(())
        })
        .await?;
        for _ in 0..2 {
            kernels::ask(&node, "check_and_pull", vec![rpc::to_value(&configs)?]).await?;
        }
        // What is asked of the engine afterwards is answered after what the tasks have asked.
        for _ in 0..20 {
            kernels::docker(&["version"])?;
        }
        let before = told().await?;
        drop(registry);
        let after = wait::until("the end of the pull", SOON, || async {
            told().await.ok().filter(|names| names.len() >= 2)
        })
        .await?;
        anyhow::Ok((before, after))
    };
    let (created, asked) = tokio::join!(kernels::create(&node, &order), ask_for_it);
    let (before, after) = asked?;
    assert!(created.is_err());
    assert!(before.is_empty(), "{before:?}");
    assert_eq!(after, ["image_pull_failed", "image_pull_failed"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_checked_for_the_manager() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let image = order.config["image"].clone();
    let canonical = image["canonical"].as_str().unwrap().to_owned();
    let mut missing = image.clone();
    missing["canonical"] = json!("bai-test/there-is-no-such-image:1");
    let configs = json!({ &canonical: image, "bai-test/there-is-no-such-image:1": missing });
    let answer = kernels::ask(&node, "check_and_pull", vec![rpc::to_value(&configs)?]).await?;
    for task in answer.as_object().unwrap().values() {
        let task = task.as_str().unwrap();
        assert!(
            task.len() == 32 && task.bytes().all(|byte| byte.is_ascii_hexdigit()),
            "{task}"
        );
    }
    assert_eq!(answer.as_object().unwrap().len(), 2);
    let events = wait::until("both are told of", SOON, || async {
        let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
        let reply = kernels::ask(&node, "bai.events", args).await.ok()?;
        let events: Vec<(String, serde_json::Value)> = reply["events"]
            .as_array()?
            .iter()
            .filter(|event| {
                event["name"]
                    .as_str()
                    .is_some_and(|name| name.starts_with("image_pull_"))
            })
            .map(|event| {
                (
                    event["name"].as_str().unwrap_or_default().to_owned(),
                    event["args"].clone(),
                )
            })
            .collect();
        (events.len() == 2).then_some(events)
    })
    .await?;
    let args = |name: &str| {
        events
            .iter()
            .find(|(found, _)| found == name)
            .map(|(_, args)| args.clone())
    };
    let finished = args("image_pull_finished").unwrap();
    assert_eq!(
        (&finished[0], &finished[3]),
        (&json!(canonical), &json!("Image already exists"))
    );
    assert_eq!(
        args("image_pull_failed").unwrap()[0],
        "bai-test/there-is-no-such-image:1"
    );
    assert_eq!(
        kernels::ask(
            &node,
            "check_pulling",
            vec![Value::from(canonical.as_str())]
        )
        .await?,
        json!(false)
    );

    let gone = vec![Value::from("bai-test/there-is-no-such-image:1")];
    let purged = kernels::ask(
        &node,
        "purge_images",
        vec![Value::Array(gone), Value::Bool(false), Value::Bool(false)],
    )
    .await?;
    assert!(purged["responses"][0]["error"].is_string(), "{purged}");
    assert_eq!(
        kernels::ask(&node, "gather_hwinfo", vec![]).await?,
        json!({})
    );
    assert_eq!(
        kernels::ask(&node, "get_local_config", vec![]).await?,
        json!({"agent": {"abuse-report-path": ""}, "watcher": {}})
    );
    kernels::ask(
        &node,
        "update_scaling_group",
        vec![Value::from("night-shift")],
    )
    .await?;
    let file = std::fs::read_to_string(node.config_file())?;
    assert!(file.contains("scaling-group = \"night-shift\""), "{file}");

    // Whatever comes last, the file and the node agree on it.
    for round in 0..8 {
        let calls = (0..8).map(|caller| {
            let name = vec![Value::Str(format!("group-{round}-{caller}"))];
            kernels::ask(&node, "update_scaling_group", name)
        });
        for outcome in futures_util::future::join_all(calls).await {
            outcome?;
        }
        let status = kernels::ask(&node, "bai.status", vec![]).await?;
        let group = status["scaling_group"].as_str().context("no group")?;
        let file = std::fs::read_to_string(node.config_file())?;
        assert!(
            file.contains(&format!("scaling-group = \"{group}\"")),
            "{group} is not in {file}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_ends_does_not_let_its_kernel_go_on_under_another_one() -> Result<()> {
    let engine = FaultDocker::start()?;
    let archives = tempfile::tempdir()?;
    let node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        agent: format!("image-commit-path = {:?}", archives.path()),
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    let container = node.containers()?.pop().context("its container")?;
    // The engine takes as long as it is let; under the second one the kernel is paused.
    let (first, second) = (std::sync::mpsc::channel(), std::sync::mpsc::channel());
    let (first, may_first): (std::sync::mpsc::Sender<()>, _) = first;
    let (second, may_second): (std::sync::mpsc::Sender<()>, _) = second;
    engine.before("/commit?", move || {
        let _ = tokio::task::block_in_place(|| may_first.recv());
    });
    let paused = container.clone();
    engine.before("/commit?", move || {
        tokio::task::block_in_place(|| {
            let _ = kernels::docker(&["pause", &paused]);
            let _ = may_second.recv();
        });
    });
    let asked = |what: &str| {
        let requests = engine.requests();
        requests.iter().filter(|line| line.contains(what)).count()
    };
    let is_paused = || {
        let state = ["inspect", "-f", "{{.State.Paused}}", &container];
        kernels::docker(&state).is_ok_and(|word| word == "true")
    };
    commit(&node, &order, "first.tar.gz").await?;
    wait::until("the first one is with the engine", SOON, || async {
        (asked("/commit?") == 1).then_some(())
    })
    .await?;
    commit(&node, &order, "second.tar.gz").await?;
    let notes = node.state().join("commits").join(node.agent_id());
    wait::until("the second one has begun", SOON, || async {
        (std::fs::read_dir(&notes).ok()?.count() == 2).then_some(())
    })
    .await?;
    // It has time to be at the engine beside the first, if nothing holds it back.
    let both = wait::until("both are", Duration::from_secs(3), || async {
        (asked("/commit?") == 2).then_some(())
    });
    let _ = both.await;
    first.send(())?;
    wait::until("only the second one is", SOON, || async {
        let ended = archives.path().join("user_example.com/first.tar.gz");
        (ended.exists() && asked("/commit?") == 2 && is_paused()).then_some(())
    })
    .await?;
    assert_eq!(asked("/unpause"), 0);
    second.send(())?;
    wait::until("the kernel goes on", SOON, || async {
        let ended = archives.path().join("user_example.com/second.tar.gz");
        (ended.exists() && !is_paused()).then_some(())
    })
    .await?;
    assert_eq!(asked("/unpause"), 1);
    // While the engine removes the container, which no longer has a console for it, the kept one is given.
    let text = vec![text(order.kernel)];
    let before = kernels::ask(&node, "get_logs", text.clone()).await?;
    let before = before["logs"].as_str().context("a console")?;
    assert!(!before.is_empty());
    let (go_on, may_go_on): (std::sync::mpsc::Sender<()>, _) = std::sync::mpsc::channel();
    let removal = format!("/containers/{container}?");
    engine.before(&removal, move || {
        let _ = tokio::task::block_in_place(|| may_go_on.recv());
    });
    let meanwhile = async {
        let _go_on = go_on;
        wait::until("the container is being removed", SOON, || async {
            (asked(&removal) == 1).then_some(())
        })
        .await?;
        let dead =
            r#"{"message": "can not get logs from container which is dead or marked for removal"}"#;
        engine.spoil("/logs", Fault::json(409, dead), 1);
        let kept = kernels::ask(&node, "get_logs", text).await?;
        let kept = kept["logs"].as_str().context("a console")?;
        ensure!(kept.starts_with(before), "{kept:?}");
        anyhow::Ok(())
    };
    tokio::try_join!(kernels::destroy(&node, &order), meanwhile)?;
    wait_clean(&node).await
}
