//! Sessions of every kind, and what becomes of them when the agent or a watchdog steps in.

use super::*;

/// Waits for an event that speaks of an id; its arguments.
async fn event_of(node: &Node, id: uuid::Uuid, name: &str) -> Result<Json> {
    wait::until(name, Duration::from_secs(90), || async {
        let events = kernels::events(node, id).await.ok()?;
        events
            .into_iter()
            .find(|(found, _)| found == name)
            .map(|(_, args)| args)
    })
    .await
}

/// What was told of the ends of a session and its kernel, in order.
async fn ends_of(node: &Node, order: &Order) -> Result<Vec<(String, Json)>> {
    let mut events = kernels::events(node, order.session).await?;
    events.retain(|(name, _)| name.starts_with("session_") || name == "kernel_terminated");
    Ok(events)
}

fn batch_order() -> Result<Order> {
    let mut order = Order::of(Image::Runner)?;
    order.config["session_type"] = json!("batch");
    Ok(order)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_job_outlives_the_agent_and_is_announced_once() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let at_work = async |order: &Order| -> Result<String> {
        let made = kernels::create(&node, order).await?;
        kernels::start_batch(&node, order, "sleep 1000", Value::Nil).await?;
        Ok(container_of(&made).to_owned())
    };
    let killed = |order: &Order| {
        let session = order.session.to_string();
        let failure = json!([session, "task-failed", 137]);
        let end = json!([order.kernel.to_string(), session, "self-terminated", 137]);
        [
            ("session_failure".to_owned(), failure),
            ("kernel_terminated".to_owned(), end),
        ]
    };
    // A kernel that dies with its job at work, and one that the manager wants to go.
    let (watched, unwanted) = (batch_order()?, batch_order()?);
    kernels::docker(&["kill", &at_work(&watched).await?])?;
    kernels::wait_end(&node, watched.kernel).await?;
    assert_eq!(ends_of(&node, &watched).await?, killed(&watched));
    at_work(&unwanted).await?;
    kernels::destroy(&node, &unwanted).await?;
    let ended = ends_of(&node, &unwanted).await?;
    ensure!(
        ended.len() == 1 && ended[0].0 == "kernel_terminated",
        "{ended:?}"
    );
    // An operator takes it away without the manager.
    let taken = batch_order()?;
    at_work(&taken).await?;
    let output = node.command(&["kernel", "destroy", &taken.kernel.to_string()])?;
    ensure!(output.status.success(), "{output:?}");
    let ended = ends_of(&node, &taken).await?;
    let [failure, end] = &ended[..] else {
        anyhow::bail!("{ended:?}");
    };
    assert_eq!(
        (&*failure.0, &*end.0),
        ("session_failure", "kernel_terminated")
    );
    let session = taken.session.to_string();
    assert_eq!(failure.1, json!([session, "task-failed", end.1[3]]));
    assert_eq!(end.1[2], "user-requested");

    let (order, unwatched) = (batch_order()?, batch_order()?);
    kernels::create(&node, &order).await?;
    let container = at_work(&unwatched).await?;
    let command = "echo begun > begun; until [ -e go ]; do sleep 0.1; done; exit 7";
    kernels::start_batch(&node, &order, command, Value::Nil).await?;
    let work = node.scratch(&order.kernel.to_string()).join("work");
    wait::until("the job has begun", SOON, || async {
        work.join("begun").exists().then_some(())
    })
    .await?;
    node.kill_control()?;
    kernels::docker(&["kill", &container])?;
    node.start_control().await?;
    std::fs::write(work.join("go"), "")?;
    let args = event_of(&node, order.session, "session_failure").await?;
    assert_eq!(args, json!([order.session.to_string(), "task-failed", 7]));
    kernels::wait_end(&node, unwatched.kernel).await?;
    assert_eq!(ends_of(&node, &unwatched).await?, killed(&unwatched));
    // The manager hears a session's failure and ends it: that brings no second one.
    kernels::destroy(&node, &unwatched).await?;
    let mut ended = ends_of(&node, &unwatched).await?;
    ended.retain(|(name, _)| name != "kernel_terminated");
    assert_eq!(ended, killed(&unwatched)[..1]);
    // A job that is to start in a kernel that is gone.
    let absent = batch_order()?;
    kernels::start_batch(&node, &absent, "exit 0", Value::Nil).await?;
    kernels::wait_end(&node, absent.kernel).await?;
    let session = absent.session.to_string();
    let (name, args) = ends_of(&node, &absent).await?.swap_remove(0);
    assert_eq!(
        (name.as_str(), args),
        ("session_failure", json!([session, "task-failed", -1]))
    );
    assert_eq!(output_of(&node, &order, "echo usable").await?, "usable\n");
    kernels::destroy(&node, &order).await?;
    let ends: Vec<String> = kernels::events(&node, order.session)
        .await?
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| name.starts_with("session_"))
        .collect();
    assert_eq!(ends, ["session_failure"]);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_limit_of_a_batch_job_outlives_the_agent() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let [endless, short] = [batch_order()?, batch_order()?];
    for order in [&endless, &short] {
        kernels::create(&node, order).await?;
    }
    let limit = Duration::from_secs(6);
    let seconds = || Value::from(limit.as_secs_f64());
    kernels::start_batch(&node, &endless, "touch begun; sleep 1000", seconds()).await?;
    kernels::start_batch(&node, &short, "touch begun; sleep 2; exit 5", seconds()).await?;
    let begun = std::time::Instant::now();
    for order in [&endless, &short] {
        let file = node
            .scratch(&order.kernel.to_string())
            .join("work")
            .join("begun");
        wait::until("the job has begun", SOON, || async {
            file.exists().then_some(())
        })
        .await?;
    }
    node.kill_control()?;
    // The limit passes while nobody watches.
    tokio::time::sleep(limit.saturating_sub(begun.elapsed())).await;
    node.start_control().await?;
    let args = event_of(&node, endless.session, "session_failure").await?;
    assert_eq!(
        args,
        json!([endless.session.to_string(), "task-timeout", -2])
    );
    // One that ended meanwhile is told as it ended.
    let args = event_of(&node, short.session, "session_failure").await?;
    assert_eq!(args, json!([short.session.to_string(), "task-failed", 5]));
    for order in [&endless, &short] {
        kernels::destroy(&node, order).await?;
    }
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_job_is_run_once_although_the_agent_is_killed_at_its_start() -> Result<()> {
    let engine = FaultDocker::start()?;
    let mut node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..NodeOptions::default()
    })
    .await?;
    let order = batch_order()?;
    let made = kernels::create(&node, &order).await?;
    let container = made["container_id"].as_str().context("no id")?.to_owned();
    let work = node.scratch(&order.kernel.to_string()).join("work");
    let runs = || {
        let text = std::fs::read_to_string(work.join("runs")).unwrap_or_default();
        text.lines().count()
    };
    let journal = node.state().join("kernels").join(node.agent_id());
    let record = journal.join(format!("{}.json", order.kernel));
    // The journal as a kill leaves it.
    let killed_while = |step: &str, command: &str, time_up: Json| -> Result<()> {
        let mut json: Json = serde_json::from_slice(&std::fs::read(&record)?)?;
        let kept = &mut json["record"];
        ensure!(kept["batch_running"].is_boolean(), "another format: {kept}");
        kept["batch_running"] = json!(true);
        kept["batch_job"] = json!({"step": step, "command": command, "time_up": time_up});
        std::fs::write(&record, json.to_string())?;
        Ok(())
    };

    // Killed before it is sent.
    engine.spoil(
        &format!("/containers/{container}/json"),
        Fault::Hang,
        usize::MAX,
    );
    kernels::start_batch(&node, &order, "echo run >> runs; exit 3", Value::Nil).await?;
    node.kill_control()?;
    assert_eq!(runs(), 0, "it was sent before the kill");
    engine.behave();
    node.start_control().await?;
    let args = event_of(&node, order.session, "session_failure").await?;
    assert_eq!(args, json!([order.session.to_string(), "task-failed", 3]));
    assert_eq!(runs(), 1);

    // Killed while it is sent, and the runner has it.
    let command = "echo run >> runs; until [ -e go ]; do sleep 0.1; done; exit 0";
    kernels::start_batch(&node, &order, command, Value::Nil).await?;
    wait::until("the job runs", SOON, || async {
        (runs() == 2).then_some(())
    })
    .await?;
    node.kill_control()?;
    killed_while("sending", command, Json::Null)?;
    node.start_control().await?;
    std::fs::write(work.join("go"), "")?;
    event_of(&node, order.session, "session_success").await?;
    assert_eq!(runs(), 2);

    // Killed while it is sent, and the runner never got it.
    node.kill_control()?;
    killed_while("sending", "echo run >> runs; exit 4", Json::Null)?;
    node.start_control().await?;
    let args = event_of(&node, order.session, "session_failure").await?;
    assert_eq!(args, json!([order.session.to_string(), "task-failed", 4]));
    assert_eq!(runs(), 3);

    // Killed before it is sent, and its time is up.
    node.kill_control()?;
    killed_while("waiting", "echo run >> runs", json!(0.0))?;
    node.start_control().await?;
    let args = event_of(&node, order.session, "session_failure").await?;
    assert_eq!(args, json!([order.session.to_string(), "task-timeout", -2]));
    assert_eq!(output_of(&node, &order, "cat runs | wc -l").await?, "3\n");

    // The journal cannot say that it is sent: a kill would have it sent again.
    let aside = journal.with_extension("aside");
    std::fs::rename(&journal, &aside)?;
    kernels::start_batch(&node, &order, "echo run >> runs", Value::Nil).await?;
    wait::until("the job waits for the journal", SOON, || async {
        let log = node.log("bai-agent");
        log.contains("not started before the journal can be written")
            .then_some(())
    })
    .await?;
    assert_eq!(runs(), 3);
    std::fs::rename(&aside, &journal)?;
    event_of(&node, order.session, "session_success").await?;
    assert_eq!(runs(), 4);
    assert_eq!(output_of(&node, &order, "echo usable").await?, "usable\n");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_serve_is_told_to_be_unhealthy() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let folder = tempfile::tempdir()?;
    let definition = "models:\n- name: mute\n  model_path: /models\n  service:\n    \
        start_command: [busybox, sleep, '1000']\n    shell: /bin/sh\n    port: 8600\n    \
        health_check:\n      path: /\n      interval: 0.2\n      max_retries: 2\n      max_wait_time: 1\n";
    let order = model_order(folder.path(), "model-definition.yml", definition)?;
    kernels::create(&node, &order).await?;
    let args = event_of(&node, order.session, "model_service_status_updated").await?;
    assert_eq!(args, json!([order.session.to_string(), "unhealthy"]));
    // The session is the manager's to end.
    assert_eq!(
        kernels::state(&node, order.kernel).await?.as_deref(),
        Some("running")
    );
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

/// A model whose start waits for a file `go` in the kernel's home and then fails.
#[tokio::test(flavor = "multi_thread")]
async fn the_start_of_a_model_outlives_the_agent() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let folder = tempfile::tempdir()?;
    let definition = "models:\n- name: late\n  model_path: /models\n  service:\n    \
        pre_start_actions:\n    - action: run_command\n      args:\n        command: [busybox, sh, -c, \
        'cd /home/work; echo asked >> asked; until [ -e go ]; do sleep 0.1; done']\n    \
        start_command: [/no/such/program]\n    port: 8600\n";
    let order = model_order(folder.path(), "model-definition.yml", definition)?;
    kernels::create(&node, &order).await?;
    let work = node.scratch(&order.kernel.to_string()).join("work");
    let asked = || {
        let text = std::fs::read_to_string(work.join("asked")).unwrap_or_default();
        text.lines().count()
    };
    wait::until("the model is being started", SOON, || async {
        (asked() == 1).then_some(())
    })
    .await?;
    // An agent that stops meanwhile says nothing of the model: it is not known yet.
    node.stop_control()?;
    let log = node.log("bai-agent");
    ensure!(!log.contains("a model service did not start"), "{log}");
    // Nobody hears the runner's answer.
    std::fs::write(work.join("go"), "")?;
    node.start_control().await?;
    let args = event_of(&node, order.session, "model_service_status_updated").await?;
    assert_eq!(args, json!([order.session.to_string(), "unhealthy"]));
    // What was told is not asked again. The runner may have answered the first of two requests only.
    assert_eq!(output_of(&node, &order, "echo next").await?, "next\n");
    let told = asked();
    let record = node
        .state()
        .join("kernels")
        .join(node.agent_id())
        .join(format!("{}.json", order.kernel));
    wait::until("the journal knows", SOON, || async {
        let json: Json = serde_json::from_slice(&std::fs::read(&record).ok()?).ok()?;
        (json["record"]["models_pending"] == json!(false)).then_some(())
    })
    .await?;
    node.kill_control()?;
    node.start_control().await?;
    assert_eq!(output_of(&node, &order, "echo usable").await?, "usable\n");
    assert_eq!(asked(), told);
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_system_session_uses_a_socket_of_the_host() -> Result<()> {
    use std::io::{Read, Write};
    let node = Node::start(NodeOptions::default()).await?;
    let place = tempfile::tempdir()?;
    let path = place.path().join("service.sock");
    let mut order = Order::of(Image::Runner)?;
    order.config["session_type"] = json!("system");
    order.config["internal_data"] = json!({"domain_socket_proxies": [path.display().to_string()]});
    // Not there yet: told before anything is made.
    let failure = kernels::fail_to_create(&node, &order).await?;
    assert!(
        failure.repr.contains(&path.display().to_string()),
        "{}",
        failure.repr
    );
    kernels::assert_clean(&node).await?;

    let listener = std::os::unix::net::UnixListener::bind(&path)?;
    // Only its owner may connect; the kernel's user is another.
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let service = std::thread::spawn(move || -> Result<()> {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept()?;
            let mut question = [0; 4];
            stream.read_exact(&mut question)?;
            stream.write_all(b"answer to ")?;
            stream.write_all(&question)?;
        }
        Ok(())
    });
    let result = kernels::create(&node, &order).await?;
    for service in ["sshd", "ttyd"] {
        assert_eq!(kernels::host_ports(&result, service).len(), 1, "{result}");
    }
    let ask = format!(
        "/opt/backend.ai/bin/python -c 'import socket; s = socket.socket(socket.AF_UNIX); s.connect({:?}); \
         s.sendall(b\"this\"); print(s.makefile().read())'",
        path.display().to_string()
    );
    assert_eq!(output_of(&node, &order, &ask).await?, "answer to this\n");
    restart(&node, &order).await?;
    assert_eq!(output_of(&node, &order, &ask).await?, "answer to this\n");
    service
        .join()
        .map_err(|_| anyhow::anyhow!("the service panicked"))??;
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reported_kernel_is_ended_where_the_operator_wants_it() -> Result<()> {
    let reports = tempfile::tempdir()?;
    let mut node = Node::start(NodeOptions {
        agent: format!(
            "abuse-report-path = \"{0}\"\nforce-terminate-abusing-containers = true\npid-file = \"{0}/agent.pid\"\n",
            reports.path().display()
        ),
        ..NodeOptions::default()
    })
    .await?;
    let local = kernels::ask(&node, "get_local_config", Vec::new()).await?;
    assert_eq!(
        local["agent"]["abuse-report-path"],
        reports.path().display().to_string()
    );
    let (abusing, restarted) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    let container = container_of(&kernels::create(&node, &abusing).await?).to_owned();
    kernels::create(&node, &restarted).await?;
    let report = |name: &str, kernel: &str, container: &str| {
        let text = json!({"ID": kernel, "CID": container, "reason": "hang-timeout"}).to_string();
        std::fs::write(reports.path().join(name), text)
    };
    report("report.1.json", &abusing.kernel.to_string(), &container)?;
    // Of a container that the kernel has no more, and of a kernel of nobody: both stay.
    report(
        "report.2.json",
        &restarted.kernel.to_string(),
        &"0".repeat(64),
    )?;
    report(
        "report.3.json",
        &uuid::Uuid::new_v4().to_string(),
        &container,
    )?;
    // The directory is looked at when the agent starts, and every half minute.
    let pid_file = reports.path().join("agent.pid");
    assert!(pid_file.exists());
    node.stop_control()?;
    assert!(!pid_file.exists());
    node.start_control().await?;
    assert!(pid_file.exists());
    std::fs::remove_file(&pid_file)?;
    let (reason, _) = kernels::wait_end(&node, abusing.kernel).await?;
    assert_eq!(reason, "hang-timeout");
    let mut left: Vec<String> = std::fs::read_dir(reports.path())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    left.sort();
    assert_eq!(left, ["report.2.json", "report.3.json", "report.lock"]);
    assert_eq!(output_of(&node, &restarted, "echo alive").await?, "alive\n");
    kernels::destroy(&node, &restarted).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn defect_a_request_of_no_cores_is_a_key_error() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"]["cpu"] = json!("0");
    let result = kernels::create(&node, &order).await?;
    assert_eq!(result["resource_spec"]["slots"]["cpu"], "0", "{result}");
    assert_eq!(output_of(&node, &order, "echo runs").await?, "runs\n");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn defect_a_kernel_that_starts_during_a_comparison_is_ended() -> Result<()> {
    // Compared all the time, so that every step of a life meets a comparison.
    let node = Node::start(NodeOptions {
        agent: "sync-container-lifecycles = { enabled = true, interval = 0.1 }\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let mut orders = Vec::new();
    for _ in 0..3 {
        let mut order = Order::of(Image::Runner)?;
        order.config["resource_slots"]["cpu"] = json!("0.1");
        orders.push(order);
    }
    let lives = orders.iter().map(|order| async {
        kernels::create(&node, order).await?;
        restart(&node, order).await?;
        ensure!(output_of(&node, order, "echo alive").await? == "alive\n");
        kernels::destroy(&node, order).await?;
        kernels::ends(&node, order.kernel).await
    });
    for ends in futures_util::future::join_all(lives).await {
        assert_eq!(ends?, [("user-requested".to_owned(), 0)]);
    }
    kernels::assert_clean(&node).await
}
