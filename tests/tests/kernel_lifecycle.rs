//! A kernel's whole life over the manager's RPC, on real Docker with the real runner.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use control::rpc::{self, Value};
use harness::images::Image;
use harness::kernels::{self, Order, text};
use harness::node::{Node, NodeOptions};
use harness::wait;
use serde_json::json;

/// For what comes at once.
const SOON: Duration = Duration::from_secs(20);

/// What the container was made with.
fn host_config(container: &str) -> Result<serde_json::Value> {
    let text = kernels::docker(&["inspect", "--format", "{{json .HostConfig}}", container])?;
    Ok(serde_json::from_str(&text)?)
}

/// What the clients of a run have got of it that came after one that went away before it was answered.
async fn leaving_in_between(node: &Node, order: &Order) -> Result<String> {
    let call = |mode: &str, flush: f64| -> Result<Vec<Value>> {
        Ok(vec![
            text(order.session),
            text(order.kernel),
            Value::Int(3),
            Value::from("left"),
            Value::from(mode),
            Value::from(""),
            rpc::to_value(&json!({ "exec": "echo one; sleep 8; echo two" }))?,
            Value::Float(flush),
        ])
    };
    for (mode, status) in [("batch", "clean-finished"), ("continue", "build-finished")] {
        let reply = kernels::ask(node, "execute", call(mode, 20.0)?).await?;
        assert_eq!(reply["status"], status);
    }
    let client = node.client().await?;
    let polls = client.call("execute", call("continue", 5.0)?, vec![], SOON);
    let answered = tokio::time::timeout(Duration::from_millis(300), polls).await;
    ensure!(answered.is_err(), "{answered:?}");
    drop(client);
    let mut output = String::new();
    loop {
        let reply = kernels::ask(node, "execute", call("continue", 20.0)?).await?;
        for item in reply["console"].as_array().into_iter().flatten() {
            output.push_str(item[1].as_str().unwrap_or_default());
        }
        if reply["status"] == "finished" {
            return Ok(output);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn create_execute_serve_destroy_and_nothing_is_left() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;

    assert_eq!(result["id"], order.kernel.to_string());
    assert_eq!(
        (&result["stdin_port"], &result["stdout_port"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(
        result["resource_spec"]["allocations"]["mem"]["mem"]["root"],
        "268435456"
    );
    assert_eq!(
        result["resource_spec"]["allocations"]["cpu"]["cpu"]
            .as_object()
            .map(|it| it.len()),
        Some(1)
    );
    assert_eq!(result["agent_addr"], "tcp://127.0.0.1:6001");
    let names: Vec<_> = result["service_ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["name"])
        .collect();
    assert_eq!(names, ["sshd", "ttyd", "web"]);
    let container = result["container_id"].as_str().unwrap().to_owned();

    // No engine binding: the ports are the dataplane's.
    let made = host_config(&container)?;
    assert!(
        made["PortBindings"]
            .as_object()
            .is_none_or(|it| it.is_empty()),
        "{}",
        made["PortBindings"]
    );
    assert_eq!(
        (&made["Memory"], &made["MemorySwap"]),
        (&json!(268_435_456), &json!(268_435_456))
    );
    assert_ne!(made["CpusetCpus"], "");

    let ran = kernels::run(&node, &order, "echo hello; exit 3").await?;
    assert_eq!((ran.output.as_str(), ran.exit_code), ("hello\n", Some(3)));
    assert_eq!(leaving_in_between(&node, &order).await?, "one\ntwo\n");

    let started = kernels::ask(
        &node,
        "start_service",
        vec![
            text(order.kernel),
            Value::from("web"),
            rpc::to_value(&json!({}))?,
        ],
    )
    .await?;
    assert_eq!(started["status"], "started");
    let port = kernels::host_ports(&result, "web")[0];
    let page = kernels::fetch(port, "/")?;
    assert!(page.contains("It works"), "{page}");

    let stats = wait::until(
        "a sample of the kernel",
        Duration::from_secs(20),
        || async {
            let stats = kernels::ask(&node, "bai.stats", Vec::new()).await.ok()?;
            let sample = stats["kernels"][order.kernel.to_string()].clone();
            (sample["memory"]["current_bytes"].as_u64()? > 0
                && sample["cpu"]["usage_ns"].as_u64()? > 0)
                .then_some(sample)
        },
    )
    .await?;
    assert_eq!(stats["memory"]["limit_bytes"], 268_435_456u64);

    let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)]).await?;
    assert!(logs["logs"].as_str().unwrap().contains("hello"), "{logs}");
    assert_eq!(
        kernels::ask(&node, "check_running", vec![text(order.kernel)]).await?,
        json!(true)
    );

    kernels::destroy(&node, &order).await?;
    assert_eq!(
        kernels::ends(&node, order.kernel).await?,
        [("user-requested".to_owned(), 0)]
    );
    kernels::assert_clean(&node).await?;
    // The console is kept for a while.
    let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)]).await?;
    assert!(logs["logs"].as_str().unwrap().contains("hello"), "{logs}");
    let names: Vec<String> = kernels::events(&node, order.kernel)
        .await?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| {
            name.starts_with("kernel_") && name != "kernel_progress" || name.starts_with("do_")
        })
        .collect();
    assert_eq!(
        names,
        [
            "kernel_preparing",
            "kernel_creating",
            "kernel_started",
            "do_sync_kernel_logs",
            "kernel_terminated"
        ]
    );
    // The whole list of mounts is what the journal and the event say of it, too.
    ensure!(
        result["resource_spec"]["mounts"]
            .as_array()
            .is_some_and(|it| it.len() > 10)
    );
    Ok(())
}

// Defect 1 of the original: a restarted container had no limits.
#[tokio::test(flavor = "multi_thread")]
async fn defect_restart_loses_all_limits() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_opts"] = json!({"shmem": "33554432"});
    let volume = tempfile::tempdir()?;
    let (folder, away) = (volume.path().join("data"), volume.path().join("away"));
    std::fs::create_dir(&folder)?;
    order.config["mounts"] = json!([{
        "name": "data", "vfid": null, "vfsubpath": null, "host_path": folder.display().to_string(),
        "kernel_path": "/home/work/data", "mount_perm": "rw", "usage_mode": "general",
    }]);
    let before = kernels::create(&node, &order).await?;
    let old = host_config(before["container_id"].as_str().unwrap())?;
    kernels::run(&node, &order, "echo kept > /home/work/file").await?;

    // What can't be made again is not stopped, and whoever joins is told the same.
    std::fs::rename(&folder, &away)?;
    let (refused, joined) = tokio::join!(
        kernels::restart(&node, &order),
        kernels::restart(&node, &order)
    );
    for refused in [refused.unwrap_err(), joined.unwrap_err()] {
        for words in [
            "goes on and is not restarted",
            "the folder data",
            "does not exist",
        ] {
            ensure!(refused.to_string().contains(words), "{words}: {refused:?}");
        }
    }
    let ran = kernels::run(&node, &order, "cat /home/work/file").await?;
    assert_eq!(ran.output, "kept\n");
    assert_eq!(
        node.containers()?,
        [before["container_id"].as_str().unwrap()]
    );
    std::fs::rename(&away, &folder)?;

    // What can't be written down is not begun. A directory in the way stands for a full disk.
    let journal = node.state().join("kernels").join(node.agent_id());
    let (file, aside) = (format!("{}.json", order.kernel), journal.join("aside"));
    std::fs::rename(journal.join(&file), &aside)?;
    std::fs::create_dir(journal.join(&file))?;
    let refused = kernels::restart(&node, &order).await.unwrap_err();
    ensure!(refused.to_string().contains("free space"), "{refused:?}");
    assert_eq!(kernels::run(&node, &order, "echo on").await?.output, "on\n");
    std::fs::remove_dir(journal.join(&file))?;
    std::fs::rename(&aside, journal.join(&file))?;
    let after = kernels::restart(&node, &order).await?;
    assert_ne!(after["container_id"], before["container_id"]);
    let new = host_config(after["container_id"].as_str().unwrap())?;
    for limit in [
        "Memory",
        "MemorySwap",
        "CpusetCpus",
        "ShmSize",
        "Ulimits",
        "CapAdd",
        "SecurityOpt",
    ] {
        assert_eq!(new[limit], old[limit], "{limit}");
        assert!(!new[limit].is_null(), "{limit}");
    }
    assert_eq!(after["service_ports"], before["service_ports"]);
    for key in ["repl_in_port", "repl_out_port", "stdin_port", "stdout_port"] {
        assert!(after[key].is_u64(), "{key}");
    }
    let ran = kernels::run(&node, &order, "cat /home/work/file").await?;
    assert_eq!(ran.output, "kept\n");
    let text = std::fs::read_to_string(
        node.scratch(&order.kernel.to_string())
            .join("config/resource.txt"),
    )?;
    assert_eq!(
        text.lines().filter(|line| line.starts_with("CID=")).count(),
        1,
        "{text}"
    );
    kernels::destroy(&node, &order).await?;
    assert_eq!(kernels::ends(&node, order.kernel).await?.len(), 1);
    kernels::assert_clean(&node).await
}

// Defect 2 of the original: a service with several ports could not start.
#[tokio::test(flavor = "multi_thread")]
async fn defect_multi_port_services_cannot_start() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Services)?;
    let result = kernels::create(&node, &order).await?;
    let ports = kernels::host_ports(&result, "pair");
    assert_eq!(ports.len(), 2, "{result}");
    let args = vec![
        text(order.kernel),
        Value::from("pair"),
        Value::Map(Vec::new()),
    ];
    assert_eq!(
        kernels::ask(&node, "start_service", args).await?["status"],
        "started"
    );
    for port in ports {
        // It may listen a moment after the answer.
        let fetched = || kernels::fetch(port, "/").ok();
        let page = wait::until_blocking("a page of the service", Duration::from_secs(30), fetched)?;
        assert!(page.starts_with("HTTP/1"), "{page}");
    }
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

// Defect 3 of the original: two ends announced, or none, and never the exit code.
#[tokio::test(flavor = "multi_thread")]
async fn defect_two_ends_and_no_exit_code() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    kernels::docker(&[
        "kill",
        "--signal",
        "KILL",
        result["container_id"].as_str().unwrap(),
    ])?;
    let end = kernels::wait_end(&node, order.kernel).await?;
    assert_eq!(end, ("self-terminated".to_owned(), 137));
    kernels::assert_clean(&node).await?;
    // A destroy afterwards is not an error, and tells the end again: the manager takes it only now.
    kernels::destroy(&node, &order).await?;
    let ends = kernels::ends(&node, order.kernel).await?;
    assert_eq!(ends, [end.clone(), end]);
    let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)]).await?;
    assert!(!logs["logs"].as_str().unwrap().is_empty());
    Ok(())
}

// Defect 14 of the original: a container that dies while it starts was waited for in vain.
#[tokio::test(flavor = "multi_thread")]
async fn defect_waits_for_a_dead_container() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    // The runner ends at once: it has no such language.
    order.config["image"]["labels"]["ai.backend.runtime-type"] = json!("cobol");
    let began = Instant::now();
    let failure = kernels::fail_to_create(&node, &order).await?;
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(failure.class, "AgentError");
    assert!(failure.repr.contains("exit code 2"), "{}", failure.repr);
    assert!(
        failure.repr.contains("cobol"),
        "the console's end is told: {}",
        failure.repr
    );
    assert_eq!(
        kernels::ends(&node, order.kernel).await?,
        [("failed-to-start".to_owned(), 2)]
    );
    kernels::assert_clean(&node).await
}

// Defect 8 of the original: one lock for all clean-ups.
#[tokio::test(flavor = "multi_thread")]
async fn defect_one_lock_for_all_clean_ups() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let (slow, quick) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    kernels::create(&node, &slow).await?;
    kernels::create(&node, &quick).await?;
    // Paused: the stop signal is not seen, the whole grace period passes.
    let container = kernels::docker(&[
        "ps",
        "-q",
        "--no-trunc",
        "--filter",
        &format!("name={}", slow.kernel),
    ])?;
    kernels::docker(&[
        "exec",
        "-d",
        "-u",
        "root",
        &container,
        "sh",
        "-c",
        "kill -STOP $(pidof bai-krunner)",
    ])?;
    let client = node.client().await?;
    let args = vec![text(slow.kernel), text(slow.session)];
    let slow_end = tokio::spawn(async move {
        client
            .call("destroy_kernel", args, Vec::new(), Duration::from_secs(100))
            .await
    });
    wait::until(
        "the slow kernel is being destroyed",
        Duration::from_secs(10),
        || async {
            (kernels::state(&node, slow.kernel).await.ok()??.as_str() == "terminating")
                .then_some(())
        },
    )
    .await?;
    kernels::destroy(&node, &quick).await?;
    assert!(
        !slow_end.is_finished(),
        "the quick destroy waited for the slow one"
    );
    slow_end.await??;
    assert_eq!(kernels::ends(&node, slow.kernel).await?.len(), 1);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_are_recognised_by_their_content() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    // While the creation is at work, the same call is an error and ping is not delayed.
    let first = {
        let (client, args) = (node.client().await?, order.arguments());
        tokio::spawn(async move {
            client
                .call("create_kernels", args, Vec::new(), Duration::from_secs(120))
                .await
        })
    };
    wait::until(
        "the creation is at work",
        Duration::from_secs(10),
        || async {
            (kernels::ask(&node, "check_creating", vec![text(order.kernel)])
                .await
                .ok()?
                == json!(true))
            .then_some(())
        },
    )
    .await?;
    let again = kernels::fail_to_create(&node, &order).await?;
    assert_eq!(again.class, "ResourceError");
    assert!(again.repr.contains("already in progress"), "{}", again.repr);
    let result = serde_json::to_value(first.await??)?[0].clone();

    // Once it is done, the same call has the same answer.
    assert_eq!(kernels::create(&node, &order).await?, result);
    let mut other = order.clone();
    other.config["session_id"] = json!(uuid::Uuid::new_v4().to_string());
    assert_eq!(
        kernels::fail_to_create(&node, &other).await?.class,
        "ResourceError"
    );
    assert_eq!(node.containers()?.len(), 1);

    // Destroys join; each is answered, one end is announced.
    let mut ends = Vec::new();
    for _ in 0..3 {
        let client = node.client().await?;
        let args = vec![text(order.kernel), text(order.session)];
        ends.push(tokio::spawn(async move {
            client
                .call("destroy_kernel", args, Vec::new(), Duration::from_secs(100))
                .await
        }));
    }
    for end in ends {
        end.await??;
    }
    let announced = kernels::ends(&node, order.kernel).await?;
    assert_eq!(
        announced
            .iter()
            .filter(|(reason, _)| reason == "user-requested")
            .count(),
        1,
        "{announced:?}"
    );
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroy_during_the_creation_ends_it() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["bootstrap_script"] = json!("sleep 60\n");
    let creation = {
        let (client, args) = (node.client().await?, order.arguments());
        tokio::spawn(async move {
            client
                .call("create_kernels", args, Vec::new(), Duration::from_secs(120))
                .await
        })
    };
    wait::until("the container runs", Duration::from_secs(30), || async {
        (node.containers().ok()?.len() == 1).then_some(())
    })
    .await?;
    let began = Instant::now();
    kernels::destroy(&node, &order).await?;
    assert!(
        began.elapsed() < Duration::from_secs(40),
        "{:?}",
        began.elapsed()
    );
    let failure = creation.await?.expect_err("the creation was ended");
    assert!(
        failure.to_string().contains("Cancelled waiting"),
        "{failure}"
    );
    let ends = kernels::ends(&node, order.kernel).await?;
    assert_eq!(ends.len(), 1, "{ends:?}");
    assert_eq!(ends[0].0, "user-requested");
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_job_is_announced_with_its_exit_code() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["session_type"] = json!("batch");
    kernels::create(&node, &order).await?;
    // A restart of the kernel ends it; the manager starts it again.
    kernels::start_batch(&node, &order, "sleep 1000", Value::Nil).await?;
    kernels::restart(&node, &order).await?;
    let answer = kernels::start_batch(&node, &order, "exit 5", Value::Nil).await?;
    assert_eq!(answer, json!(null));
    let session = order.session;
    let args = wait::until("the job's end", Duration::from_secs(30), || async {
        let events = kernels::events(&node, session).await.ok()?;
        events
            .into_iter()
            .find(|(name, _)| name == "session_failure")
            .map(|(_, args)| args)
    })
    .await?;
    assert_eq!(args, json!([session.to_string(), "task-failed", 5]));
    // Idle checkers are told as of other executions.
    let told: Vec<String> = kernels::events(&node, session)
        .await?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !name.starts_with("kernel_"))
        .collect();
    assert_eq!(
        told,
        [
            "execution_started",
            "execution_cancelled",
            "execution_started",
            "execution_finished",
            "session_failure"
        ]
    );
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_kernels_of_a_cluster_find_each_other_by_name() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let network = format!("core-test-{}", uuid::Uuid::new_v4().simple());
    kernels::ask(
        &node,
        "create_local_network",
        vec![Value::from(network.as_str())],
    )
    .await?;
    let (mut main, mut sub) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    for (order, role, hostname) in [(&mut main, "main", "main1"), (&mut sub, "sub", "sub1")] {
        order.cluster["network_config"] = json!({"mode": "bridge", "network_name": network});
        order.cluster["size"] = json!(2);
        order.config["cluster_role"] = json!(role);
        order.config["cluster_hostname"] = json!(hostname);
    }
    let result = kernels::create(&node, &main).await?;
    let other = kernels::create(&node, &sub).await?;
    // Only the main kernel carries the image's services.
    assert_eq!(kernels::host_ports(&result, "web").len(), 1);
    assert!(kernels::host_ports(&other, "web").is_empty());
    let ran = kernels::run(
        &node,
        &sub,
        "ping -c1 -W3 main1 || nslookup main1 || getent hosts main1",
    )
    .await?;
    assert!(
        ran.output.contains("172.") || ran.output.contains("192.168."),
        "{ran:?}"
    );
    kernels::destroy(&node, &main).await?;
    kernels::destroy(&node, &sub).await?;
    kernels::ask(
        &node,
        "destroy_local_network",
        vec![Value::from(network.as_str())],
    )
    .await?;
    kernels::ask(
        &node,
        "destroy_local_network",
        vec![Value::from(network.as_str())],
    )
    .await?;
    kernels::assert_clean(&node).await
}
