//! Bad requests and broken surroundings: each gives a clear error, soon, and leaves nothing behind.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use control::rpc::{self, Failure, Value};
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::Image;
use harness::kernels::{self, Order, text};
use harness::node::{Node, NodeOptions, program};
use harness::wait;
use serde_json::json;
use shared::lock::WriterLock;
use uuid::Uuid;

/// Creates, expects the failure, and that nothing is left of it.
async fn refused(node: &Node, order: &Order) -> Result<Failure> {
    let failure = kernels::fail_to_create(node, order).await?;
    kernels::assert_clean(node)
        .await
        .with_context(|| failure.repr.clone())?;
    ensure!(
        kernels::ask(node, "check_creating", vec![text(order.kernel)]).await? == json!(false),
        "the kernel is still registered"
    );
    Ok(failure)
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let unknown = Uuid::new_v4();
    for method in ["get_logs", "interrupt_kernel", "ping_kernel"] {
        let failure = kernels::call(&node, method, vec![text(unknown)])
            .await?
            .unwrap_err();
        assert_eq!(
            failure.repr,
            format!("KeyError(UUID('{unknown}'))"),
            "{method}"
        );
        let failure = kernels::call(&node, method, vec![Value::from("no-uuid")])
            .await?
            .unwrap_err();
        assert_eq!(
            failure.repr, "ValueError('badly formed hexadecimal UUID string')",
            "{method}"
        );
    }
    let args = [
        text(unknown),
        text(unknown),
        Value::Int(3),
        Value::from("r"),
        Value::from("query"),
    ];
    let args = args
        .into_iter()
        .chain([Value::from("1"), Value::Map(vec![]), Value::Float(0.1)])
        .collect();
    let failure = kernels::call(&node, "execute", args).await?.unwrap_err();
    assert_eq!(failure.class, "RuntimeError");
    assert!(
        failure.repr.contains(&unknown.to_string()),
        "{}",
        failure.repr
    );
    for method in ["check_creating", "check_running"] {
        assert_eq!(
            kernels::ask(&node, method, vec![text(unknown)]).await?,
            json!(false)
        );
    }
    let failure = kernels::call(&node, "commit", vec![text(unknown), Value::from("x")])
        .await?
        .unwrap_err();
    assert_eq!(
        failure.repr,
        format!("KeyError(UUID('{unknown}'))"),
        "commit"
    );
    let failure = kernels::call(&node, "no_such_method", Vec::new())
        .await?
        .unwrap_err();
    assert_eq!(failure.class, "NotImplementedError");

    let order = Order::of(Image::Runner)?;
    let mut args = order.arguments();
    let twice = Value::Array(vec![text(order.kernel), text(order.kernel)]);
    let Value::Array(configs) = args[2].clone() else {
        unreachable!()
    };
    args[1] = twice.clone();
    let failure = kernels::call(&node, "create_kernels", args.clone())
        .await?
        .unwrap_err();
    assert!(
        failure
            .repr
            .contains("2 kernel ids and 1 kernel configurations"),
        "{}",
        failure.repr
    );
    args[2] = Value::Array(vec![configs[0].clone(), configs[0].clone()]);
    let failure = kernels::call(&node, "create_kernels", args)
        .await?
        .unwrap_err();
    assert!(failure.repr.contains("named twice"), "{}", failure.repr);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_cannot_be_used() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["image"]["canonical"] = json!("bai-test/there-is-no-such-image:1");
    let failure = refused(&node, &order).await?;
    assert_eq!(failure.class, "ImageNotAvailable", "{}", failure.repr);
    assert!(
        failure.repr.contains("there-is-no-such-image"),
        "{}",
        failure.repr
    );

    // No label tells the C library, and the image has no ldd to ask.
    let mut order = Order::of(Image::Bare)?;
    order.config["image"]["labels"] = json!({});
    let failure = refused(&node, &order).await?;
    assert!(failure.repr.contains("C library"), "{}", failure.repr);

    let mut order = Order::of(Image::Runner)?;
    order.config["image"]["architecture"] = json!("riscv64");
    let failure = refused(&node, &order).await?;
    assert!(failure.repr.contains("riscv64"), "{}", failure.repr);

    // It has no C library at all: the container ends at once, with words.
    let mut order = Order::of(Image::Bare)?;
    order.config["image"]["labels"] = json!({"ai.backend.base-distro": "ubuntu22.04"});
    let began = Instant::now();
    let failure = refused(&node, &order).await?;
    assert!(failure.repr.contains("exit code"), "{}", failure.repr);
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );

    let mut order = Order::of(Image::Runner)?;
    order.config["image"]["labels"]["ai.backend.service-ports"] = json!("web:http:80");
    let failure = refused(&node, &order).await?;
    assert_eq!(failure.class, "ValueError", "{}", failure.repr);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_the_node_has() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    for (slots, word) in [
        (json!({"cpu": "4096", "mem": "268435456"}), "cpu"),
        (json!({"cpu": "1", "mem": "1099511627776000"}), "mem"),
    ] {
        let mut order = Order::of(Image::Runner)?;
        order.config["resource_slots"] = slots;
        let failure = refused(&node, &order).await?;
        assert_eq!(failure.class, "InsufficientResource", "{}", failure.repr);
        assert!(failure.repr.contains(word), "{}", failure.repr);
    }
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"] = json!({"cpu": "1", "mem": "268435456", "cuda.device": "1"});
    assert_eq!(refused(&node, &order).await?.class, "UnsupportedResource");
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"] = json!({"cpu": "1"});
    refused(&node, &order).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_opts"] = json!({"shmem": "a lot"});
    let failure = refused(&node, &order).await?;
    assert!(failure.repr.contains("shmem"), "{}", failure.repr);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_and_networks_that_are_not_there() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["mounts"] = json!([{
        "name": "data", "vfid": "x", "vfsubpath": ".", "host_path": "/there/is/no/such/folder",
        "kernel_path": "/home/work/data", "mount_perm": "rw", "usage_mode": "general",
    }]);
    let failure = refused(&node, &order).await?;
    assert!(
        failure.repr.contains("/there/is/no/such/folder"),
        "{}",
        failure.repr
    );

    let mut order = Order::of(Image::Runner)?;
    order.config["internal_data"] =
        json!({"dotfiles": [{"path": "/etc/passwd", "data": "x", "perm": "644"}]});
    let failure = refused(&node, &order).await?;
    assert!(failure.repr.contains("/etc/passwd"), "{}", failure.repr);

    let mut order = Order::of(Image::Runner)?;
    order.cluster["network_config"] = json!({"mode": "carrier-pigeon"});
    let failure = refused(&node, &order).await?;
    assert!(
        failure
            .repr
            .contains("Network plugin carrier-pigeon not loaded!"),
        "{}",
        failure.repr
    );

    let mut order = Order::of(Image::Runner)?;
    order.cluster["network_config"] =
        json!({"mode": "bridge", "network_name": "core-test-no-such-network"});
    let failure = refused(&node, &order).await?;
    assert!(
        failure.repr.contains("core-test-no-such-network"),
        "{}",
        failure.repr
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_dataplane_is_said_after_a_short_wait() -> Result<()> {
    let node = Node::start(NodeOptions {
        dataplane: false,
        node: "dataplane-wait = 1.0".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let began = Instant::now();
    let failure = refused(&node, &Order::of(Image::Runner)?).await?;
    assert!(
        failure.repr.contains("no dataplane is running"),
        "{}",
        failure.repr
    );
    assert!(
        failure.repr.contains("bai-dataplane"),
        "what would do: {}",
        failure.repr
    );
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_pool_is_exhausted() -> Result<()> {
    // The image wants three: sshd, ttyd and web.
    let node = Node::start(NodeOptions {
        ports: 2,
        ..NodeOptions::default()
    })
    .await?;
    let failure = refused(&node, &Order::of(Image::Runner)?).await?;
    assert_eq!(failure.class, "RuntimeError");
    assert!(
        failure
            .repr
            .contains("Container ports are not sufficiently available"),
        "{}",
        failure.repr
    );
    assert!(
        failure.repr.contains("port-range"),
        "what would do: {}",
        failure.repr
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runner_is_never_ready() -> Result<()> {
    let node = Node::start(NodeOptions {
        sections: "[kernel-lifecycles]\ninit-polling-timeout-sec = 4.0\ninit-timeout-sec = 4.0\n"
            .to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["bootstrap_script"] = json!("echo still busy; sleep 300\n");
    let began = Instant::now();
    let failure = refused(&node, &order).await?;
    assert_eq!(failure.class, "AgentError");
    assert!(
        failure.repr.contains("Timeout during container startup"),
        "{}",
        failure.repr
    );
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "{:?}",
        began.elapsed()
    );
    let ends = kernels::ends(&node, order.kernel).await?;
    assert_eq!(ends.len(), 1, "{ends:?}");
    assert_eq!(ends[0].0, "failed-to-start");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scratch_disk_is_full() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let root = node.scratch_root();
    std::fs::create_dir_all(&root)?;
    nix::mount::mount(
        Some("tmpfs"),
        &root,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=64k"),
    )
    .context("a small file system can't be mounted")?;
    let failure = refused(&node, &Order::of(Image::Runner)?).await?;
    assert!(
        failure.repr.contains("scratch disk is full"),
        "{}",
        failure.repr
    );
    nix::mount::umount(&root)?;
    // With room again, the node works.
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_fails_or_hangs_in_the_middle() -> Result<()> {
    let engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        sections: "[node.engine]\ncreate-timeout = 8.0\nstart-timeout = 7.0\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    for (request, fault) in [
        (
            "/containers/create",
            Fault::json(500, r#"{"message": "no space left on device"}"#),
        ),
        ("/containers/create", Fault::Hang),
        (
            "/start",
            Fault::json(500, r#"{"message": "oci runtime error"}"#),
        ),
        ("/start", Fault::Hang),
        ("/start", Fault::Close),
    ] {
        engine.spoil(request, fault.clone(), 1);
        let order = Order::of(Image::Runner)?;
        let began = Instant::now();
        let failure = refused(&node, &order)
            .await
            .with_context(|| format!("{request} {fault:?}"))?;
        assert_eq!(
            failure.class, "AgentError",
            "{request} {fault:?}: {}",
            failure.repr
        );
        let own_deadline = !(request == "/start" && matches!(fault, Fault::Hang))
            || failure.repr.contains("no answer in 7 s");
        assert!(own_deadline, "{}", failure.repr);
        assert!(
            began.elapsed() < Duration::from_secs(120),
            "{request} {fault:?}: {:?}",
            began.elapsed()
        );
        let ends = kernels::ends(&node, order.kernel).await?;
        assert_eq!(ends.len(), 1, "{request} {fault:?}: {ends:?}");
    }
    let order = Order::of(Image::Runner)?;
    an_image_nobody_can_look_up_is_not_told_to_have_failed(&node, &order, &engine).await?;
    kernels::create(&node, &order).await?;
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

/// `image_pull_failed` cancels the sessions that wait for an image, while the manager asks again after a
/// task that failed.
async fn an_image_nobody_can_look_up_is_not_told_to_have_failed(
    node: &Node,
    order: &Order,
    engine: &FaultDocker,
) -> Result<()> {
    let image = &order.config["image"];
    let name = image["canonical"].as_str().context("a name")?;
    let configs = json!({ name: image });
    engine.spoil(&format!("/images/{name}/json"), Fault::json(500, "{}"), 1);
    for _ in 0..2 {
        kernels::ask(node, "check_and_pull", vec![rpc::to_value(&configs)?]).await?;
    }
    let names = wait::until("the tasks end", Duration::from_secs(30), || async {
        let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
        let reply = kernels::ask(node, "bai.events", args).await.ok()?;
        let names = reply["events"].as_array()?.iter();
        let names: Vec<String> = names
            .filter_map(|event| Some(event["name"].as_str()?.to_owned()))
            .filter(|name| name.starts_with("image_pull_") || name.starts_with("bgtask_"))
            .filter(|name| name != "bgtask_updated")
            .collect();
        (names.len() >= 3).then_some(names)
    })
    .await?;
    let of = |name: &str| names.iter().filter(|it| *it == name).count();
    ensure!(
        (of("bgtask_failed"), of("bgtask_done")) == (1, 1)
            && (of("image_pull_finished"), of("image_pull_failed")) == (1, 0),
        "{names:?}"
    );
    Ok(())
}

/// What the agent says when it cannot start.
fn output_of_start(config: &std::path::Path) -> Result<(Option<i32>, String)> {
    let output = Command::new(program("bai-agent")?)
        .args(["run", "--standalone", "--config"])
        .arg(config)
        .output()?;
    Ok((
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_typing_error_in_the_configuration() -> Result<()> {
    let place = tempfile::tempdir()?;
    let file = place.path().join("agent.toml");
    std::fs::write(
        &file,
        "[agent]\nmode = \"docker\"\n[container]\nscratch-type = \"hostdri\"\nport-range = [30000, \"x\"]\n[resource]\n",
    )?;
    let (code, said) = output_of_start(&file)?;
    assert_eq!(code, Some(78), "{said}");
    // All errors at once, each with its place.
    for word in ["scratch-type", "hostdri", "port-range"] {
        assert!(said.contains(word), "{word} in {said}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_of_the_same_id_names_the_first() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let (code, said) = output_of_start(&node.config_file())?;
    assert_eq!(code, Some(69), "{said}");
    let first = node.control_pid().context("control runs")?;
    assert!(
        said.contains(&first.to_string()),
        "process {first} in {said}"
    );
    // The first one is not disturbed.
    kernels::ask(&node, "ping", vec![Value::from("x")]).await?;
    // But it leaves the node to one that comes after somebody has taken its lock away; so its dataplane.
    let mut others = Vec::new();
    for name in ["control", "dataplane"] {
        let directory = node.regions().join(name);
        std::fs::remove_file(directory.join("lock"))?;
        others.push(WriterLock::acquire(&directory)?);
    }
    assert_eq!(node.ended()?, [Some(69), Some(75)]);
    for name in ["bai-agent", "bai-dataplane"] {
        let log = node.log(name);
        let own = format!("process {} writes there since", std::process::id());
        assert!(log.contains(&own), "{own} in {log}");
        assert!(!log.contains("agent_terminated"), "{log}");
    }
    Ok(())
}

/// The configuration of a node that has all it needs in these two directories.
fn own_node(place: &Path, run: &Path) -> Result<String> {
    let path = place.display();
    Ok(format!(
        "[agent]\nmode = \"docker\"\nid = \"i-core-down\"\nvar-base-path = \"{path}/state\"\nipc-base-path = \"{path}/ipc\"\n\
         rpc-listen-addr = {{ host = \"127.0.0.1\", port = {port} }}\n\
         [container]\nscratch-type = \"hostdir\"\nscratch-root = \"{path}/scratches\"\n[resource]\n\
         [node]\nrun-dir = \"{run}\"\nrunner-dir = \"{path}/runner\"\n",
        port = harness::node::free_port()?,
        run = run.display(),
    ))
}

/// Trying again would not help: it is told as wrong configuration, and found before the start.
#[tokio::test(flavor = "multi_thread")]
async fn sockets_in_a_directory_that_others_may_change() -> Result<()> {
    let place = tempfile::tempdir()?;
    let run = tempfile::tempdir_in("/dev/shm")?;
    let file = place.path().join("agent.toml");
    std::fs::write(&file, own_node(place.path(), run.path())?)?;
    let doctor = || -> Result<String> {
        let output = Command::new(program("bai-agent")?)
            .args(["doctor", "--standalone", "--config"])
            .arg(&file)
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = said.lines().find(|line| line.contains("socket directory"));
        Ok(line.context(said.clone())?.to_owned())
    };
    let before = doctor()?;
    assert!(before.trim_start().starts_with("ok "), "{before}");
    let ipc = place.path().join("ipc");
    std::fs::create_dir(&ipc)?;
    std::fs::set_permissions(&ipc, std::fs::Permissions::from_mode(0o777))?;
    let found = doctor()?;
    let ipc = ipc.display().to_string();
    assert!(
        found.trim_start().starts_with("FAILURE ") && found.contains(&ipc),
        "{found}"
    );
    let (code, said) = output_of_start(&file)?;
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains(&ipc), "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn docker_is_down_at_the_start() -> Result<()> {
    let place = tempfile::tempdir()?;
    let run = tempfile::tempdir_in("/dev/shm")?;
    let file = place.path().join("agent.toml");
    let path = place.path().display();
    std::fs::write(&file, own_node(place.path(), run.path())?)?;
    let log = place.path().join("log");
    let mut agent = Command::new("prlimit")
        .arg("--nofile=256:4096")
        .arg(program("bai-agent")?)
        .args(["run", "--standalone", "--config"])
        .arg(&file)
        .env("DOCKER_HOST", format!("unix://{path}/no-docker.sock"))
        .stderr(std::fs::File::create(&log)?)
        .spawn()?;
    let said = harness::wait::until_blocking(
        "the agent says what is wrong",
        Duration::from_secs(20),
        || {
            let text = std::fs::read_to_string(&log).ok()?;
            text.contains("Docker does not answer").then_some(text)
        },
    );
    let running = agent.try_wait()?.is_none();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.id()))?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(agent.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let ended = agent.wait()?;
    let said = said?;
    assert!(said.contains("no-docker.sock"), "{said}");
    assert!(running, "it goes on trying");
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let files: Vec<_> = files
        .unwrap_or_default()
        .split_whitespace()
        .skip(3)
        .collect();
    assert_eq!(files[..2], ["4096", "4096"], "it takes what it may have");
    assert_eq!(ended.code(), Some(0), "told to stop, it stops");
    Ok(())
}
