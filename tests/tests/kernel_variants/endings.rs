//! Kernels that end by themselves, cannot start, or share the engine; what a kernel serves.

use super::*;

// Defects 3, 5 and 6 of the original: ends without a code, left scratches, leaked ports.
#[tokio::test(flavor = "multi_thread")]
async fn defect_a_container_that_ends_by_itself_leaves_things_behind() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    // How it ends, the exit code to be told, whether its console can still be read.
    type End = fn(&str) -> Result<String>;
    let ways: [(&str, End, Option<i64>, &str); 5] = [
        (
            "its runner is killed",
            |id| {
                nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(runner_pid(id)?),
                    nix::sys::signal::Signal::SIGKILL,
                )?;
                Ok(String::new())
            },
            Some(137),
            "self-terminated",
        ),
        (
            "it is killed",
            |id| kernels::docker(&["kill", id]),
            Some(137),
            "self-terminated",
        ),
        (
            "it is stopped",
            |id| kernels::docker(&["stop", id]),
            Some(0),
            "self-terminated",
        ),
        // A kernel's life is over when its container stops: it does not come back by a start.
        (
            "it is restarted",
            |id| {
                // It may be gone before it is started again.
                let _ = kernels::docker(&["restart", id]);
                Ok(String::new())
            },
            Some(0),
            "self-terminated",
        ),
        // Somebody else takes it away: nothing to read any more.
        (
            "it is removed",
            |id| kernels::docker(&["rm", "-f", id]),
            None,
            "self-terminated",
        ),
    ];
    let mut waiting = Vec::new();
    for (how, end, code, reason) in ways {
        let order = Order::of(Image::Runner)?;
        let result = kernels::create(&node, &order).await?;
        let id = container_of(&result).to_owned();
        output_of(&node, &order, "echo its last words").await?;
        tokio::task::spawn_blocking(move || end(&id)).await??;
        waiting.push((how, order, code, reason));
    }
    for (how, order, code, reason) in waiting {
        let end = kernels::wait_end(&node, order.kernel).await?;
        assert_eq!(end.0, reason, "{how}");
        if let Some(code) = code {
            assert_eq!(end.1, code, "{how}");
            let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)]).await?;
            assert!(
                logs["logs"].to_string().contains("its last words"),
                "{how}: {logs}"
            );
        }
        kernels::destroy(&node, &order).await?;
        let ends = kernels::ends(&node, order.kernel).await?;
        assert_eq!(ends, [end.clone(), end], "{how}");
    }
    kernels::assert_clean(&node).await
}

// Defects 3 and 14 of the original: a container that cannot run was waited for.
#[tokio::test(flavor = "multi_thread")]
async fn defect_an_image_that_cannot_run_is_waited_for() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let labels = [
        "LABEL ai.backend.base-distro=ubuntu22.04",
        "LABEL ai.backend.kernelspec=1",
    ];
    // No shell at all; and a shell, but no C library for the runner.
    let mut no_shell = images::busybox_files(&[])?;
    no_shell.retain(|file| !file.path.ends_with("sh"));
    let no_shell = images::import(&format!("variants-noshell:{id}"), &no_shell, &labels)?;
    let no_libc = images::import(
        &format!("variants-nolibc:{id}"),
        &images::busybox_files(&["cat", "date", "chown", "cut", "tr", "ln"])?,
        &labels,
    )?;
    for image in [&no_shell, &no_libc] {
        let order = Order::named(&image.name)?;
        let began = Instant::now();
        let failure = kernels::fail_to_create(&node, &order).await?;
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(failure.class, "AgentError");
        assert!(
            failure.repr.contains("exit code 127") || failure.repr.contains("exit code 1"),
            "{}",
            failure.repr
        );
        assert!(
            failure.repr.contains("entrypoint.sh") || failure.repr.contains("not found"),
            "{}",
            failure.repr
        );
        let ends = kernels::ends(&node, order.kernel).await?;
        assert_eq!(ends.len(), 1, "{ends:?}");
        assert_eq!(ends[0].0, "failed-to-start");
        assert!(ends[0].1 > 0, "{ends:?}");
        kernels::assert_clean(&node).await?;
    }
    // What runs nothing lets nobody become root either: its end is told, not that.
    let mut no_use = images::busybox_files(&[])?;
    for file in no_use.iter_mut().filter(|file| file.path.ends_with("sh")) {
        file.mode = 0o755;
        file.content = FileContent::Bytes(b"#!/bin/busybox sh\nexit 3\n".to_vec());
    }
    let no_use = images::import(&format!("variants-nouse:{id}"), &no_use, &labels)?;
    let mut order = Order::named(&no_use.name)?;
    order.config["internal_data"] = json!({"sudo_session_enabled": true});
    let failure = kernels::fail_to_create(&node, &order).await?;
    assert!(failure.repr.contains("exit code 3 "), "{}", failure.repr);
    let ends = kernels::ends(&node, order.kernel).await?;
    assert_eq!(ends, [("failed-to-start".to_owned(), 3)]);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_on_one_engine_leave_each_other_alone() -> Result<()> {
    let quick = || NodeOptions {
        agent: "sync-container-lifecycles = { enabled = true, interval = 0.5 }\n".to_owned(),
        ..NodeOptions::default()
    };
    let (mut one, mut two) = (Node::start(quick()).await?, Node::start(quick()).await?);
    let (first, second) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    kernels::create(&one, &first).await?;
    let result = kernels::create(&two, &second).await?;
    // The other one's kernel is nobody's here.
    kernels::destroy(&two, &first).await?;
    assert_eq!(
        kernels::ends(&two, first.kernel).await?,
        [("already-terminated".to_owned(), -1)]
    );
    // A crash, a recovery and several comparisons on either side.
    one.kill_control()?;
    two.kill_control()?;
    one.start_control().await?;
    two.start_control().await?;
    for (node, order) in [(&one, &first), (&two, &second)] {
        assert_eq!(node.containers()?.len(), 1);
        assert_eq!(output_of(node, order, "echo here").await?, "here\n");
        assert_eq!(kernels::ends(node, order.kernel).await?, []);
    }
    kernels::destroy(&one, &first).await?;
    kernels::assert_clean(&one).await?;
    assert_eq!(inspect(container_of(&result))?["State"]["Running"], true);
    kernels::destroy(&two, &second).await?;
    kernels::assert_clean(&two).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_ends_the_command_and_not_the_kernel() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"]["mem"] = json!("134217728");
    let result = kernels::create(&node, &order).await?;
    let ran = kernels::run(&node, &order, "tail /dev/zero; exit $?").await?;
    assert_eq!(ran.exit_code, Some(137), "{ran:?}");
    // The runner was told, and says so on the console.
    wait::until("the runner's warning", SOON, || async {
        let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)])
            .await
            .ok()?;
        let logs = logs["logs"].as_str()?.to_lowercase();
        (logs.contains("oom") || logs.contains("out of memory")).then_some(())
    })
    .await?;
    count_of_kills(&node, &order).await?;
    let status = kernels::ask(&node, "bai.status", Vec::new()).await?;
    let short = &status["short_of_memory"][0];
    assert_eq!(short["kernel_id"], order.kernel.to_string(), "{status}");
    assert!(short["killed"].as_u64() > Some(0), "{status}");
    assert_eq!(short["memory_limit"], 134_217_728, "{status}");
    assert_eq!(output_of(&node, &order, "echo alive").await?, "alive\n");

    // At its end the engine calls the container one that was killed for memory, whatever it died of. An
    // agent that was not there yet does not take one kill for the other.
    node.kill_control()?;
    node.start_control().await?;
    count_of_kills(&node, &order).await?;
    let runner = nix::unistd::Pid::from_raw(runner_pid(container_of(&result))?);
    nix::sys::signal::kill(runner, nix::sys::signal::Signal::SIGKILL)?;
    assert_eq!(
        kernels::wait_end(&node, order.kernel).await?,
        ("self-terminated".to_owned(), 137)
    );
    kernels::assert_clean(&node).await
}

/// Waits for a sample with kills for memory.
async fn count_of_kills(node: &Node, order: &Order) -> Result<u64> {
    let counted = wait::until("the kill is counted", SOON, || async {
        let stats = kernels::ask(node, "bai.stats", Vec::new()).await.ok()?;
        stats["kernels"][order.kernel.to_string()]["memory"]["oom_kill_events"]
            .as_u64()
            .filter(|count| *count > 0)
    });
    match counted.await {
        Ok(count) => Ok(count),
        Err(err) => {
            let stats = kernels::ask(node, "bai.stats", Vec::new()).await?;
            Err(err.context(stats))
        }
    }
}

/// The host's pid of a kernel's runner.
fn runner_pid(container: &str) -> Result<i32> {
    let shown = kernels::docker(&["top", container, "-eo", "pid,args"])?;
    let line = shown
        .lines()
        .find(|line| line.contains("bai-krunner"))
        .context(shown.clone())?;
    Ok(line.split_whitespace().next().context("a pid")?.parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_dies_at_its_memory_limit_says_so() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"]["mem"] = json!("134217728");
    let result = kernels::create(&node, &order).await?;
    // Linux takes the runner first. What eats is no child of it, which would inherit the score.
    let container = container_of(&result).to_owned();
    let runner = runner_pid(&container)?;
    std::fs::write(format!("/proc/{runner}/oom_score_adj"), "1000")?;
    let eater = tokio::task::spawn_blocking(move || {
        kernels::docker(&["exec", &container, "tail", "/dev/zero"])
    });
    let end = kernels::wait_end(&node, order.kernel).await?;
    assert_eq!(end, ("out-of-memory".to_owned(), 137));
    // It went with the container: whatever Docker says of that is right.
    let _ = eater.await?;
    let status = kernels::ask(&node, "bai.status", Vec::new()).await?;
    let died = &status["died"][0];
    assert_eq!(died["kernel_id"], order.kernel.to_string(), "{status}");
    let cause = died["cause"].as_str().context("a cause")?;
    assert!(cause.contains("memory limit"), "{cause}");
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exceeded_shm_is_told_apart_from_a_kill() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_opts"] = json!({"shmem": "8388608"});
    let result = kernels::create(&node, &order).await?;
    // A map larger than the file system it is of, filled until there is nothing left.
    let exceed = "cat > /tmp/exceed.py <<'END'\nimport mmap\n\
        file = open('/dev/shm/big', 'w+b')\nfile.truncate(16 << 20)\n\
        area = mmap.mmap(file.fileno(), 16 << 20)\n\
        for at in range(0, 16 << 20, 4096): area[at] = 1\nEND\n\
        /opt/backend.ai/bin/python3 /tmp/exceed.py; exit $?";
    let ran = kernels::run(&node, &order, exceed).await?;
    assert_eq!(ran.exit_code, Some(135), "{ran:?}");
    wait::until("the full shm is seen", SOON, || async {
        let status = kernels::ask(&node, "bai.status", Vec::new()).await.ok()?;
        let short = &status["short_of_memory"][0];
        (short["shm"]["size"] == 8_388_608 && short["killed"] == 0).then_some(())
    })
    .await?;
    let runner = nix::unistd::Pid::from_raw(runner_pid(container_of(&result))?);
    nix::sys::signal::kill(runner, nix::sys::signal::Signal::SIGBUS)?;
    assert_eq!(
        kernels::wait_end(&node, order.kernel).await?,
        ("shared-memory-full".to_owned(), 135)
    );
    // The same signal with room in /dev/shm.
    let other = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &other).await?;
    let runner = nix::unistd::Pid::from_raw(runner_pid(container_of(&result))?);
    nix::sys::signal::kill(runner, nix::sys::signal::Signal::SIGBUS)?;
    assert_eq!(
        kernels::wait_end(&node, other.kernel).await?,
        ("self-terminated".to_owned(), 135)
    );
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_container_is_no_hindrance() -> Result<()> {
    let node = Node::start(NodeOptions {
        agent: "sync-container-lifecycles = { enabled = true, interval = 0.5 }\n".to_owned(),
        sections: "[debug]\nskip-container-deletion = true\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    let after = restart(&node, &order).await?;
    assert_eq!(output_of(&node, &order, "echo again").await?, "again\n");
    kernels::destroy(&node, &order).await?;
    // Kept for the person who debugs, stopped, and nobody's kernel.
    assert_eq!(node.containers()?, [container_of(&after)]);
    assert_eq!(inspect(container_of(&after))?["State"]["Running"], false);
    kernels::docker(&["rm", container_of(&after)])?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inference_kernel_serves_its_model() -> Result<()> {
    let node = Node::start(NodeOptions {
        // Four of the kernel, and one.
        ports: 5,
        ..NodeOptions::default()
    })
    .await?;
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("index.html"), "the model\n")?;
    let serving = |name: &str, port: u16| {
        format!(
            "- name: {name}\n  model_path: /models\n  service:\n    \
            start_command: [busybox, httpd, -f, -p, '{port}', -h, /models]\n    shell: /bin/sh\n    \
            port: {port}\n    health_check:\n      path: /index.html\n      interval: 0.5\n      \
            max_retries: 20\n"
        )
    };
    let file = folder.path().join("model-definition.yaml");
    let definition = format!("models:\n{}", serving("echo", 8600));
    let order = model_order(folder.path(), "model-definition.yaml", &definition)?;
    let result = kernels::create(&node, &order).await?;
    let ports = kernels::host_ports(&result, "echo-8600");
    assert_eq!(ports.len(), 1, "{result}");
    let answers = async |port: u16| {
        wait::until("the model answers", SOON, || async {
            kernels::fetch(port, "/index.html")
                .ok()
                .filter(|page| page.contains("the model"))
        })
        .await
    };
    let page = answers(ports[0]).await?;
    assert!(page.starts_with("HTTP/1"), "{page}");
    wait::until("the model is told to be healthy", SOON, || async {
        let events = kernels::events(&node, order.session).await.ok()?;
        let told = json!([order.session.to_string(), "healthy"]);
        let healthy =
            |(name, args): &(String, Json)| name == "model_service_status_updated" && *args == told;
        events.iter().any(healthy).then_some(())
    })
    .await?;
    let model = kernels::run(
        &node,
        &order,
        "echo $BACKEND_MODEL_NAME $BACKEND_MODEL_PATH",
    )
    .await?;
    assert_eq!(model.output, "echo /models\n");

    // The definition names another port by the time of a restart.
    let held = async || -> Result<_> {
        let ports = kernels::ask(&node, "bai.status", Vec::new()).await?["ports"].clone();
        let number = |name: &str| ports[name].as_u64().context("a number");
        Ok(number("total")? - number("free")? - number("cooling")?)
    };
    let before = held().await?;
    std::fs::write(&file, format!("models:\n{}", serving("echo", 8601)))?;
    let result = restart(&node, &order).await?;
    let moved = kernels::host_ports(&result, "echo-8601");
    assert_eq!(moved.len(), 1, "{result}");
    assert_ne!(moved, ports);
    assert_eq!(held().await?, before, "the old port is back");
    answers(moved[0]).await?;
    // More of them than there are ports for: it goes on as it is.
    let two = serving("echo", 8602) + &serving("other", 8603);
    std::fs::write(&file, format!("models:\n{two}"))?;
    let refused = restart(&node, &order).await.expect_err("too few ports");
    let refused = format!("{refused:#}");
    assert!(
        refused.contains("goes on and is not restarted"),
        "{refused}"
    );
    assert!(refused.contains("container.port-range"), "{refused}");
    assert_eq!(held().await?, before, "nothing stays taken");
    answers(moved[0]).await?;
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await?;

    // A definition that is none is told before anything is made.
    std::fs::write(
        folder.path().join("model-definition.yaml"),
        "models: nonsense\n",
    )?;
    let mut broken = order.clone();
    broken.kernel = uuid::Uuid::new_v4();
    broken.config["kernel_id"] = json!(broken.kernel.to_string());
    let failure = kernels::fail_to_create(&node, &broken).await?;
    assert!(
        failure.repr.contains("model-definition.yaml"),
        "{}",
        failure.repr
    );
    kernels::assert_clean(&node).await
}
