//! The main job on the real thing: both programs, Docker, the published runner, the published client.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::images;
use harness::node::{Begun, Node, NodeOptions};
use harness::wait;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Runs the command line and gives its standard output; its errors become ours.
fn cli(node: &Node, args: &[&str]) -> Result<String> {
    let output = node.command(args)?;
    ensure!(
        output.status.success(),
        "bai-agent {args:?} ended with {}: {}",
        output.status,
        said(&output)
    );
    Ok(String::from_utf8(output.stdout)
        .context("output is UTF-8")?
        .trim_end()
        .to_owned())
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(node: &Node, args: &[&str]) -> Result<Value> {
    let mut args = args.to_vec();
    args.extend(["--output", "json"]);
    Ok(serde_json::from_str(&cli(node, &args)?)?)
}

fn create(node: &Node, image: &str) -> Result<String> {
    cli(
        node,
        &[
            "kernel", "create", "--quiet", "--cpu", "0.1", "--mem", "128m", image,
        ],
    )
}

fn docker_lines(args: &[&str]) -> Result<BTreeSet<String>> {
    let output = Command::new("docker")
        .args(args)
        .output()
        .context("docker can't be started")?;
    ensure!(
        output.status.success(),
        "docker {args:?}: {}",
        said(&output)
    );
    Ok(String::from_utf8(output.stdout)?
        .lines()
        .map(str::to_owned)
        .collect())
}

fn options() -> NodeOptions {
    NodeOptions {
        node: harness::relay::setting_alone(module_path!()),
        ..NodeOptions::default()
    }
}

/// How many lives go on at the same time.
const AT_ONCE: usize = 4;

/// What a program holds at this moment.
fn held(pid: u32) -> Result<(usize, usize)> {
    let count = |what: &str| {
        Ok::<_, anyhow::Error>(std::fs::read_dir(format!("/proc/{pid}/{what}"))?.count())
    };
    Ok((count("fd")?, count("task")?))
}

/// Anonymous memory of a process in kB (`RssAnon` of `/proc/PID/status`).
fn own_memory(pid: u32) -> Result<u64> {
    std::fs::read_to_string(format!("/proc/{pid}/status"))?
        .lines()
        .find_map(|line| {
            line.strip_prefix("RssAnon:")?
                .trim()
                .split(' ')
                .next()?
                .parse()
                .ok()
        })
        .context("RssAnon in /proc/PID/status")
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_cycles_leave_nothing_behind() -> Result<()> {
    let image = images::image(images::Image::Runner)?;
    let node = Arc::new(Node::start(options()).await?);
    let cycle = |node: Arc<Node>, image: String, number: usize| {
        move || -> Result<()> {
            let kernel = create(&node, &image)?;
            let said = cli(
                &node,
                &[
                    "kernel",
                    "exec",
                    &kernel,
                    "--",
                    &format!("echo cycle {number}"),
                ],
            )?;
            ensure!(
                said == format!("cycle {number}"),
                "kernel {kernel} said {said:?}"
            );
            cli(&node, &["kernel", "destroy", &kernel])?;
            Ok(())
        }
    };
    let cycles = |numbers: std::ops::Range<usize>| {
        let limit = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
        let mut cycles = tokio::task::JoinSet::new();
        for number in numbers {
            let (limit, work) = (limit.clone(), cycle(node.clone(), image.clone(), number));
            cycles.spawn(async move {
                let _permit = limit.acquire_owned().await?;
                tokio::task::spawn_blocking(work).await?
            });
        }
        async move {
            while let Some(done) = cycles.join_next().await {
                done??;
            }
            Ok::<_, anyhow::Error>(())
        }
    };
    // The first ones open what stays open: pooled connections, groups of the parents, worker threads.
    cycles(0..AT_ONCE).await?;
    let soak = std::env::var("SOAK_SECONDS").ok();
    let soak = soak
        .map(|seconds| seconds.parse().map(Duration::from_secs))
        .transpose()?;
    let volumes = docker_lines(&["volume", "ls", "-q"])?;
    let networks = docker_lines(&["network", "ls", "-q"])?;
    let pids = [
        node.control_pid().context("control runs")?,
        node.dataplane_pid().context("the dataplane runs")?,
    ];
    let before = [held(pids[0])?, held(pids[1])?];

    match soak {
        None => cycles(AT_ONCE..AT_ONCE + 20).await?,
        Some(soak) => {
            let begun = std::time::Instant::now();
            let (mut done, mut filled) = (AT_ONCE, None);
            while begun.elapsed() < soak {
                cycles(done..done + 20).await?;
                done += 20;
                let own = [own_memory(pids[0])?, own_memory(pids[1])?];
                // What is remembered of kernels that have been is bounded: 256 of them, 1,024 events.
                if done > 300 {
                    let filled = filled.get_or_insert(own);
                    for (now, filled) in own.iter().zip(filled) {
                        ensure!(
                            now <= &(*filled + 4096),
                            "{filled} kB were enough, and now {now} kB"
                        );
                    }
                }
                println!(
                    "{:>5} s, {done:>5} lives: control {:?} kB and {:?} of its own, dataplane {:?} kB and {:?}",
                    begun.elapsed().as_secs(),
                    own_memory(pids[0])?,
                    held(pids[0])?,
                    own_memory(pids[1])?,
                    held(pids[1])?,
                );
            }
        }
    }

    ensure!(
        node.containers()?.is_empty(),
        "containers are left: {:?}",
        node.containers()?
    );
    let scratches: Vec<_> = std::fs::read_dir(node.scratch_root())?.collect::<Result<_, _>>()?;
    ensure!(
        scratches.is_empty(),
        "scratch directories are left: {scratches:?}"
    );
    let journal: Vec<_> = std::fs::read_dir(node.state().join("kernels").join(node.agent_id()))
        .context("the journal's directory")?
        .collect::<Result<_, _>>()?;
    ensure!(journal.is_empty(), "journal files are left: {journal:?}");
    ensure!(
        docker_lines(&["volume", "ls", "-q"])?.is_subset(&volumes),
        "volumes are left"
    );
    ensure!(
        docker_lines(&["network", "ls", "-q"])?.is_subset(&networks),
        "networks are left"
    );
    let status = json(&node, &["status"])?;
    for (slot, amounts) in status["slots"].as_object().context("slots")? {
        ensure!(amounts["used"] == "0", "{slot} is still in use: {amounts}");
    }
    let ports = &status["ports"];
    ensure!(
        ports["free"]
            .as_u64()
            .zip(ports["cooling"].as_u64())
            .map(|(f, c)| f + c)
            == ports["total"].as_u64(),
        "ports are left: {ports}"
    );
    ensure!(
        json(&node, &["ports"])?["ports"]
            .as_array()
            .is_some_and(Vec::is_empty),
        "port rows are left"
    );

    for (name, pid, before) in [
        ("control", pids[0], before[0]),
        ("dataplane", pids[1], before[1]),
    ] {
        // Worker threads are given back after a while, and a connection to the engine 10 to 20 s after it
        // was last used: the pool looks every 10 s for what has rested so long.
        wait::until(
            &format!("{name} holds no more descriptors and threads than before {before:?}"),
            Duration::from_secs(45),
            || async {
                held(pid)
                    .ok()
                    .filter(|(fds, threads)| *fds <= before.0 && *threads <= before.1)
            },
        )
        .await
        .with_context(|| format!("it holds {:?}", held(pid)))?;
    }
    Ok(())
}

/// A response body read from `stream`, handed to `see` piece by piece.
fn read_body(
    stream: &mut TcpStream,
    mut see: impl FnMut(usize) -> Result<()>,
) -> Result<(usize, String)> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream
            .read_exact(&mut byte)
            .context("the head of the response")?;
        head.push(byte[0]);
    }
    let (mut total, mut hash, mut buffer) = (0, Sha256::new(), vec![0; 64 << 10]);
    loop {
        let count = stream
            .read(&mut buffer)
            .context("the body of the response")?;
        if count == 0 {
            break;
        }
        total += count;
        hash.update(&buffer[..count]);
        see(total)?;
    }
    Ok((total, format!("{:x}", hash.finalize())))
}

/// Ctrl-C at `kernel exec` interrupts the run in the kernel, once more leaves it there.
async fn interrupt_runs(node: &Node, kernel: &str) -> Result<()> {
    let home = node.scratch(kernel).join("work");
    let soon = Duration::from_secs(60);
    // The runner passes no interrupt on before it reads what a command says.
    let begin = |command: &str| -> Result<Begun> {
        let mut run = node.begin_command(&["kernel", "exec", kernel, "--", command])?;
        let output = run.0.stdout.as_mut().context("an output")?;
        let mut said = [0; 6];
        tokio::task::block_in_place(|| output.read_exact(&mut said))?;
        ensure!(&said == b"begun\n", "{said:?}");
        Ok(run)
    };
    let obeys = "trap 'echo told; exit 7' INT; echo begun; while :; do sleep 0.1; done";
    let ignores = "trap '' INT; echo begun; until [ -e go ]; do sleep 0.1; done";
    for (command, times, code) in [(obeys, 1, 7), (ignores, 2, 130)] {
        let mut run = begin(command)?;
        let mut sent = 0;
        let status = wait::until_blocking("the command ends", soon, || {
            let ended = run.ended();
            // Two that come together count as one.
            if ended.is_none() && (times > 1 || sent < times) {
                run.interrupt().ok()?;
                sent += 1;
            }
            ended
        })?;
        ensure!(status.code() == Some(code), "{command}: {status:?}");
    }
    std::fs::write(home.join("go"), "")?;
    ensure!(cli(node, &["kernel", "exec", kernel, "--", "echo next"])? == "next");

    // One that waits for another's is not started, and that other one goes on.
    let mut works =
        begin("trap 'exit 9' INT; echo begun; until [ -e over ]; do sleep 0.1; done; exit 3")?;
    let mut waits = node.begin_command(&["kernel", "exec", kernel, "--", "echo begun > waits"])?;
    let journal = node.state().join("kernels").join(node.agent_id());
    let journal = journal.join(format!("{kernel}.json"));
    let waiting = || async {
        let text = std::fs::read(&journal).ok()?;
        let kept: Value = serde_json::from_slice(&text).ok()?;
        let waiting = kept["record"]["run_ids"]["waiting"].as_array()?;
        (!waiting.is_empty()).then_some(())
    };
    wait::until("the other one waits", soon, waiting).await?;
    waits.interrupt()?;
    let status = wait::until_blocking("the command ends", soon, || waits.ended())?;
    ensure!(status.code() == Some(130), "{status:?}");
    std::fs::write(home.join("over"), "")?;
    let status = wait::until_blocking("the command ends", soon, || works.ended())?;
    ensure!(status.code() == Some(3), "{status:?}");
    ensure!(
        cli(
            node,
            &["kernel", "exec", kernel, "--", "ls waits || echo none"]
        )? == "none"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_control_during_a_transfer_loses_no_byte() -> Result<()> {
    const SIZE: usize = 64 << 20;
    let image = images::image(images::Image::Runner)?;
    let mut node = Node::start(options()).await?;
    let kernel = create(&node, &image)?;
    let sum = cli(
        &node,
        &[
            "kernel",
            "exec",
            &kernel,
            "--",
            "dd if=/dev/urandom of=big bs=1048576 count=64 2>/dev/null; sha256sum < big",
        ],
    )?;
    let sum = sum.split(' ').next().context("a hash")?.to_owned();
    let service = json(&node, &["kernel", "service", &kernel, "web"])?;
    let port = service["host_ports"][0]
        .as_u64()
        .and_then(|port| u16::try_from(port).ok())
        .context("a host port")?;

    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET /work/big HTTP/1.0\r\n\r\n")?;
    let (mut killed, mut restarted) = (false, false);
    // Killed after a quarter; started again after a half, so that part of the transfer runs without any control.
    let (total, hash) = {
        let runtime = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| {
            read_body(&mut stream, |total| {
                if !killed && total >= SIZE / 4 {
                    node.kill_control()?;
                    killed = true;
                }
                if !restarted && total >= SIZE / 2 {
                    runtime.block_on(node.start_control())?;
                    restarted = true;
                }
                Ok(())
            })
        })?
    };
    ensure!(
        killed && restarted,
        "the transfer ended before control was killed and started again"
    );
    ensure!(
        (total, hash.as_str()) == (SIZE, sum.as_str()),
        "{total} of {SIZE} bytes came, hash {hash}, expected {sum}"
    );

    // The new control has adopted the kernel: the same container answers, and its port still serves.
    let kernels = json(&node, &["kernel", "list"])?;
    ensure!(
        kernels["kernels"][0]["kernel_id"] == kernel.as_str()
            && kernels["kernels"][0]["state"] == "running",
        "not adopted: {kernels}"
    );
    ensure!(cli(&node, &["kernel", "exec", &kernel, "--", "ls big"])? == "big");
    // Whoever closes the output (`| head`) stops the run, which might never end: the next one has its turn.
    let endless = "echo begun > unseen; exec yes";
    for words in [
        &["kernel", "exec", &kernel, "--", endless][..],
        &["kernel", "logs", &kernel],
    ] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let output = node.command_to(words, writer)?;
        ensure!(output.status.code() == Some(0), "{words:?}: {output:?}");
    }
    ensure!(cli(&node, &["kernel", "exec", &kernel, "--", "cat unseen"])? == "begun");
    interrupt_runs(&node, &kernel).await?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.write_all(b"GET /work/big HTTP/1.0\r\n\r\n")?;
    let (total, _) = tokio::task::block_in_place(|| read_body(&mut stream, |_| Ok(())))?;
    ensure!(
        total == SIZE,
        "after the restart {total} of {SIZE} bytes came"
    );
    cli(&node, &["kernel", "destroy", &kernel])?;
    Ok(())
}
