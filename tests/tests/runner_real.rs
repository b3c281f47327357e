//! The published in-container runner, in real containers: what `runner_replay` checks with a fake one.
//!
//! Needs Docker and the installed runner packages (`bai-agent runner install`; directory by
//! `BAI_RUNNER_DIR`). Containers are named `runner-real-*` and removed at the end of each test.

use std::net::IpAddr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use control::docker::{Docker, DockerOptions};
use control::kernel::agent_socket::{self, AgentSocketOptions};
use control::kernel::batch::{self, BatchOutcome, CommandKiller, ContainerCommands};
use control::kernel::container_processes::KernelFiles;
use control::kernel::execution::{self, BatchSteps, ExecuteReply, ExecuteRequest, Mode, Status};
use control::kernel::file_access::{self, SessionUser, UploadTarget};
use control::kernel::runner_link::{
    AppRecord, InitError, InitPolling, LinkOptions, RunnerAddress, RunnerLink,
};
use control::kernel::services::{self, ServiceStart};
use harness::images::{Image, image};
use harness::kernels::{docker, request};
use harness::node::runner_directory;
use serde_json::{Map, Value, json};
use shared::ids::KernelId;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

const UID: u32 = 1000;
const ID: KernelId = KernelId([0x42; 16]);

/// The one installed version of the runner packages.
fn installed_runner() -> Result<PathBuf> {
    let directory = runner_directory();
    let missing = || {
        format!(
            "no runner in {}; run `bai-agent runner install` or set BAI_RUNNER_DIR",
            directory.display()
        )
    };
    let mut versions: Vec<PathBuf> = std::fs::read_dir(&directory)
        .with_context(missing)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("krunner/static-gnu").is_dir())
        .collect();
    versions.sort();
    versions.pop().with_context(missing)
}

/// A container with the runner, made by hand.
struct RealKernel {
    name: String,
    directory: TempDir,
}

impl Drop for RealKernel {
    fn drop(&mut self) {
        let _removed = docker(&["rm", "-f", "-v", &self.name]);
    }
}

impl RealKernel {
    fn start(which: Image, runtime: &[&str]) -> Result<Self> {
        let image = image(which)?;
        let root = installed_runner()?;
        let directory = tempfile::tempdir()?;
        let kernel = Self {
            name: format!("runner-real-{}", uuid::Uuid::new_v4().simple()),
            directory,
        };
        for name in ["config", "work"] {
            std::fs::create_dir(kernel.path(name))?;
        }
        std::fs::write(
            kernel.path("config").join("environ.txt"),
            "GREETING=hello\n",
        )?;
        chown(kernel.path("work"), Some(UID), Some(UID))?;
        // As an agent before it serves: containers may start first.
        agent_socket::ensure_mount_points(&kernel.sockets(), agent_socket::MOUNT_POINTS)?;
        let mount = |source: &Path, target: &str, read_only: bool| {
            let mode = if read_only { ",readonly" } else { "" };
            format!(
                "--mount=type=bind,src={},dst={target}{mode}",
                source.display()
            )
        };
        let packages = "/opt/backend.ai/lib/python3.13/site-packages/ai/backend";
        let mut arguments = vec![
            mount(&kernel.path("config"), "/home/config", true),
            mount(&kernel.path("work"), "/home/work", false),
            mount(&kernel.sockets(), agent_socket::CONTAINER_DIRECTORY, true),
            mount(&root.join("krunner/static-gnu"), "/opt/backend.ai", true),
            mount(&root.join("kernel"), &format!("{packages}/kernel"), true),
            mount(&root.join("helpers"), &format!("{packages}/helpers"), true),
        ];
        for (file, target) in [
            ("su-exec.x86_64.bin", "su-exec"),
            ("libbaihook.ubuntu22.04.x86_64.so", "libbaihook.so"),
            ("dropbearmulti.x86_64.bin", "dropbearmulti"),
            ("ttyd_linux.x86_64.bin", "ttyd"),
            ("tmux.x86_64.bin", "tmux"),
            ("entrypoint.sh", "entrypoint.sh"),
            ("extract_dotfiles.py", "extract_dotfiles.py"),
            ("fantompass.py", "fantompass.py"),
            ("hash_phrase.py", "hash_phrase.py"),
            ("words.json", "words.json"),
        ] {
            arguments.push(mount(
                &root.join("runner").join(file),
                &format!("/opt/kernel/{target}"),
                true,
            ));
        }
        let environment = [
            format!("LOCAL_USER_ID={UID}"),
            format!("LOCAL_GROUP_ID={UID}"),
            "LD_PRELOAD=/opt/kernel/libbaihook.so".to_owned(),
            format!("BACKENDAI_KERNEL_ID={ID}"),
        ];
        arguments.extend(environment.iter().map(|entry| format!("--env={entry}")));
        let fixed = [
            "run",
            "-d",
            "-t",
            "--init",
            "--stop-signal=SIGINT",
            "--workdir=/home/work",
            "--name",
            &kernel.name,
        ];
        let mut all: Vec<&str> = fixed.to_vec();
        all.extend(arguments.iter().map(String::as_str));
        all.extend(["--entrypoint=/opt/kernel/entrypoint.sh", &image]);
        all.extend([
            "/opt/backend.ai/bin/python",
            "-s",
            "-m",
            "ai.backend.kernel",
        ]);
        all.extend(runtime);
        docker(&all)?;
        Ok(kernel)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn sockets(&self) -> PathBuf {
        self.path("sockets")
    }

    fn inspect(&self, format: &str) -> Result<String> {
        docker(&["inspect", "-f", format, &self.name])
    }

    fn ip(&self) -> Result<IpAddr> {
        Ok(self.inspect("{{.NetworkSettings.IPAddress}}")?.parse()?)
    }

    fn address(&self) -> Result<RunnerAddress> {
        Ok(RunnerAddress::container(self.ip()?))
    }

    async fn ready(&self) -> Result<(RunnerLink, Vec<AppRecord>)> {
        let link = RunnerLink::open(ID, self.address()?, LinkOptions::default());
        match link
            .wait_ready(&InitPolling::default(), &CancellationToken::new())
            .await
        {
            Ok(apps) => Ok((link, apps)),
            Err(err) => bail!(
                "{err}; the container says: {}",
                docker(&["logs", "--tail", "40", &self.name])?
            ),
        }
    }
}

/// One run to its end: its console joined, its exit code, and the statuses on the way.
async fn finish(
    link: &RunnerLink,
    first: ExecuteRequest,
) -> Result<(String, Option<i64>, Vec<Status>)> {
    let run_id = first.run_id.clone().context("run id")?;
    let begun = Instant::now();
    let (mut console, mut statuses) = (String::new(), Vec::new());
    let mut reply = execution::execute(link, first).await?;
    loop {
        console.push_str(&text(&reply)?);
        if reply.status != Status::Continued {
            statuses.push(reply.status);
        }
        if reply.status == Status::Finished {
            return Ok((console, reply.exit_code, statuses));
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(60),
            "run {run_id} does not end: {statuses:?} {console}"
        );
        reply = execution::execute(link, request(&run_id, Mode::Continue, "")).await?;
    }
}

async fn batch_run(
    link: &RunnerLink,
    run_id: &str,
    build: Option<&str>,
    exec: &str,
) -> Result<(String, Option<i64>, Vec<Status>)> {
    let opts = BatchSteps {
        clean: None,
        build: build.map(str::to_owned),
        exec: Some(exec.to_owned()),
    };
    finish(
        link,
        ExecuteRequest {
            opts,
            ..request(run_id, Mode::Batch, "")
        },
    )
    .await
}

/// The end of a run whose program says `ready` when it can be interrupted, and is interrupted then.
async fn interrupted(
    link: &RunnerLink,
    first: ExecuteRequest,
) -> Result<(String, Option<i64>, Vec<Status>)> {
    let run_id = first.run_id.clone().context("run id")?;
    let soon = async |request| {
        let flush_timeout = Some(0.1);
        let request = ExecuteRequest {
            flush_timeout,
            ..request
        };
        execution::execute(link, request).await
    };
    let begun = Instant::now();
    let mut reply = soon(first).await?;
    let mut console = text(&reply)?;
    while console != "ready\n" {
        ensure!(
            reply.status != Status::Finished && begun.elapsed() < Duration::from_secs(60),
            "run {run_id} is not ready: {reply:?} {console}"
        );
        reply = soon(request(&run_id, Mode::Continue, "")).await?;
        console.push_str(&text(&reply)?);
    }
    execution::interrupt(link)?;
    finish(link, request(&run_id, Mode::Continue, "")).await
}

/// A command as the job of a batch session.
async fn job(
    link: &RunnerLink,
    code: &str,
    timeout: Option<Duration>,
    killer: Option<&dyn CommandKiller>,
    gone: &CancellationToken,
) -> BatchOutcome {
    let deadline = timeout.map(|timeout| tokio::time::Instant::now() + timeout);
    if let Err(outcome) = batch::submit(link, code.to_owned(), deadline, gone).await {
        return outcome;
    }
    let sent = async {
        batch::turn(link).await;
        batch::send(link);
        std::future::pending().await
    };
    tokio::select! {
        never = sent => never,
        outcome = batch::attend(link, deadline, killer, gone) => outcome,
    }
}

fn items(reply: &ExecuteReply) -> Result<Value> {
    Ok(serde_json::to_value(reply)?["console"].take())
}

fn text(reply: &ExecuteReply) -> Result<String> {
    Ok(items(reply)?
        .as_array()
        .context("console")?
        .iter()
        .filter_map(|item| item[1].as_str())
        .collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_runs_streams_exit_codes_and_interrupts() -> Result<()> {
    let kernel = RealKernel::start(Image::Runner, &["app"])?;
    let (link, _) = kernel.ready().await?;
    let (console, code, statuses) = batch_run(
        &link,
        "b1",
        Some("echo building; echo e 1>&2"),
        "echo $PWD $GREETING; id -u; exit 3",
    )
    .await?;
    ensure!(
        console == "building\ne\n/home/work hello\n1000\n",
        "{console:?}"
    );
    ensure!(
        code == Some(3)
            && statuses
                == [
                    Status::CleanFinished,
                    Status::BuildFinished,
                    Status::Finished
                ],
        "{statuses:?}"
    );
    let (console, code, _) = batch_run(&link, "b2", Some("false"), "echo never").await?;
    ensure!(
        (console.as_str(), code) == ("", Some(127)),
        "a failed build skips the next step"
    );
    let (console, code, _) =
        batch_run(&link, "b3", None, "head -c 2000000 /dev/zero | tr '\\0' x").await?;
    ensure!(
        console.len() == 2_000_000 && code == Some(0),
        "{} bytes",
        console.len()
    );
    // A character cut by the runner's pieces of 4096 bytes.
    let (console, ..) = batch_run(
        &link,
        "b4",
        None,
        "i=0; while [ $i -lt 3000 ]; do printf '한'; i=$((i+1)); done",
    )
    .await?;
    ensure!(console.chars().count() == 3000 && !console.contains('\u{fffd}'));
    // No Jupyter kernel in this image.
    let (_, code, _) = finish(&link, request("q", Mode::Query, "print(1)")).await?;
    ensure!(code == Some(127));
    // Nobody reads while a run prints; pings go through and nothing stalls.
    let opts = BatchSteps {
        exec: Some("yes | head -n 200000; echo end".to_owned()),
        ..BatchSteps::default()
    };
    execution::execute(
        &link,
        ExecuteRequest {
            opts,
            flush_timeout: Some(0.0),
            ..request("b5", Mode::Batch, "")
        },
    )
    .await?;
    ensure!(execution::ping_kernel(&link).await.is_some());
    let (console, ..) = finish(&link, request("b5", Mode::Continue, "")).await?;
    ensure!(
        console.ends_with("end\n") && console.len() == 400_004,
        "{} bytes",
        console.len()
    );
    // Interrupt.
    let trap = "trap 'echo got int; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let opts = BatchSteps {
        exec: Some(trap.to_owned()),
        ..BatchSteps::default()
    };
    let first = ExecuteRequest {
        opts,
        ..request("b6", Mode::Batch, "")
    };
    let outcome = interrupted(&link, first).await?;
    ensure!(
        (outcome.0.as_str(), outcome.1) == ("got int\n", Some(9)),
        "{outcome:?}"
    );
    link.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_and_a_batch_job() -> Result<()> {
    let kernel = RealKernel::start(Image::Runner, &["app"])?;
    let (link, _) = kernel.ready().await?;
    let alive = CancellationToken::new();
    let slow = "i=0; while [ $i -lt 30 ]; do echo line $i; i=$((i+1)); sleep 0.1; done; exit 4";
    let opts = BatchSteps {
        exec: Some(slow.to_owned()),
        ..BatchSteps::default()
    };
    execution::execute(
        &link,
        ExecuteRequest {
            opts,
            flush_timeout: Some(0.5),
            ..request("r", Mode::Batch, "")
        },
    )
    .await?;
    link.close().await;
    let resumed = LinkOptions {
        resumed: true,
        ..LinkOptions::default()
    };
    let link = RunnerLink::open(ID, kernel.address()?, resumed.clone());
    let (console, code, _) = finish(&link, request("r", Mode::Continue, "")).await?;
    ensure!(
        code == Some(4) && console.ends_with("line 29\n"),
        "{console:?}"
    );

    ensure!(job(&link, "exit 0", None, None, &alive).await == BatchOutcome::Succeeded);
    ensure!(
        job(&link, "exit 7", None, None, &alive).await == BatchOutcome::Failed { exit_code: 7 }
    );
    // The batch job of before a restart is watched on.
    let watching = CancellationToken::new();
    let (outcome, ()) = tokio::join!(
        job(&link, "sleep 3; exit 6", None, None, &watching),
        async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            watching.cancel();
        }
    );
    ensure!(outcome == BatchOutcome::KernelGone);
    link.close().await;
    let link = RunnerLink::open(ID, kernel.address()?, resumed);
    let killer = ContainerCommands {
        init_pid: kernel.inspect("{{.State.Pid}}")?.parse()?,
        files: KernelFiles::default(),
    };
    ensure!(batch::shows(&link, Some(&killer)).await);
    batch::adopt(&link);
    let outcome = batch::attend(&link, None, None, &alive).await;
    ensure!(
        outcome == BatchOutcome::Failed { exit_code: 6 },
        "{outcome:?}"
    );

    // A command that ignores interrupts is killed at its time limit; the kernel lives on.
    let begun = Instant::now();
    let stubborn = "trap '' INT TERM; sleep 1000; sleep 1000";
    let limit = Some(Duration::from_secs(1));
    let outcome = job(&link, stubborn, limit, Some(&killer), &alive).await;
    ensure!(outcome == BatchOutcome::TimedOut && begun.elapsed() < Duration::from_secs(15));
    let processes = docker(&["top", &kernel.name, "-eo", "pid,args"])?;
    ensure!(!processes.contains("sleep 1000"), "{processes}");
    let (console, ..) = batch_run(&link, "after", None, "echo alive").await?;
    ensure!(console == "alive\n");
    link.close().await;
    Ok(())
}

async fn page(ip: IpAddr, port: u16) -> Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let fetch = async {
        let mut stream = tokio::net::TcpStream::connect((ip, port)).await?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    };
    tokio::time::timeout(Duration::from_secs(5), fetch)
        .await
        .context("no page in time")?
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_the_image_and_of_the_runner() -> Result<()> {
    let kernel = RealKernel::start(Image::Services, &["app"])?;
    let (link, apps) = kernel.ready().await?;
    let names: Vec<&str> = apps.iter().map(|app| app.name.as_str()).collect();
    ensure!(
        ["web", "pair", "echo", "broken"]
            .iter()
            .all(|name| names.contains(name)),
        "{names:?}"
    );
    let start = |name: &str, ports: &[u16], protocol: &str| ServiceStart {
        name: name.to_owned(),
        ports: ports.to_vec(),
        protocol: protocol.to_owned(),
        options: Map::new(),
    };
    let web = services::start_service(&link, start("web", &[8080], "http")).await;
    ensure!(web.status == "started", "{web:?}");
    let again = services::start_service(&link, start("web", &[8080], "http")).await;
    ensure!(again.status == "running", "{again:?}");
    ensure!(page(kernel.ip()?, 8080).await?.starts_with("HTTP/1."));
    let pair = services::start_service(&link, start("pair", &[9001, 9002], "http")).await;
    ensure!(pair.is_up(), "a service with two ports: {pair:?}");
    ensure!(
        page(kernel.ip()?, 9001).await?.starts_with("HTTP/1.")
            && page(kernel.ip()?, 9002).await?.starts_with("HTTP/1.")
    );
    let sshd = services::start_service(&link, start("sshd", &[2200], "tcp")).await;
    ensure!(sshd.status == "running", "{sshd:?}");
    let broken = services::start_service(&link, start("broken", &[9003], "http")).await;
    ensure!(
        broken.status == "failed" && broken.error.is_some(),
        "{broken:?}"
    );
    let unknown = services::start_service(&link, start("nosuch", &[9], "http")).await;
    ensure!(
        unknown
            .error
            .as_deref()
            .is_some_and(|error| error.contains("nosuch")),
        "{unknown:?}"
    );
    let preopen = services::start_service(&link, start("free", &[9999], "preopen")).await;
    ensure!(preopen.status == "started", "{preopen:?}");
    services::shutdown_service(&link, "web");
    let begun = Instant::now();
    while page(kernel.ip()?, 8080).await.is_ok() {
        ensure!(
            begun.elapsed() < Duration::from_secs(10),
            "the service goes on after its shutdown"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    link.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_dies_at_start_ends_the_wait() -> Result<()> {
    let kernel = RealKernel::start(Image::Runner, &["no-such-runtime"])?;
    // Its address may be gone already; then there is nobody to talk to either way.
    let address = kernel
        .address()
        .unwrap_or(RunnerAddress::container("127.0.0.1".parse()?));
    let link = RunnerLink::open(ID, address, LinkOptions::default());
    let dead = CancellationToken::new();
    let begun = Instant::now();
    let died = async {
        let mut wait = tokio::process::Command::new("docker")
            .args(["wait", &kernel.name])
            .spawn()?;
        wait.wait().await?;
        dead.cancel();
        Ok(())
    };
    let wait =
        async { Ok::<_, anyhow::Error>(link.wait_ready(&InitPolling::default(), &dead).await) };
    let (outcome, ()) = tokio::try_join!(wait, died)?;
    ensure!(matches!(outcome, Err(InitError::Died)), "{outcome:?}");
    ensure!(begun.elapsed() < Duration::from_secs(30));
    link.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn query_mode_with_a_jupyter_kernel() -> Result<()> {
    let kernel = RealKernel::start(Image::Python, &["python", "/usr/bin/python3"])?;
    let (link, _) = kernel.ready().await?;
    let run = async |run_id: &str, code: &str| -> Result<ExecuteReply> {
        let first = ExecuteRequest {
            flush_timeout: Some(20.0),
            ..request(run_id, Mode::Query, code)
        };
        Ok(execution::execute(&link, first).await?)
    };
    let sum = run("q1", "print(1+1)").await?;
    ensure!(
        items(&sum)? == json!([["stdout", "2\n"]]) && sum.exit_code == Some(0),
        "{sum:?}"
    );
    let failing = run("q2", "1/0").await?;
    ensure!(
        failing.exit_code == Some(1) && text(&failing)?.contains("ZeroDivisionError"),
        "{failing:?}"
    );
    let asking = run("q3", "x=input('name? ');print('hi',x)").await?;
    ensure!(
        asking.status == Status::WaitingInput && text(&asking)? == "name? ",
        "{asking:?}"
    );
    ensure!(
        asking
            .options
            .as_ref()
            .is_some_and(|options| options["is_password"] == json!(false))
    );
    let answered = execution::execute(
        &link,
        ExecuteRequest {
            flush_timeout: Some(20.0),
            ..request("q3", Mode::Input, "bob")
        },
    )
    .await?;
    ensure!(
        text(&answered)? == "hi bob\n" && answered.status == Status::Finished,
        "{answered:?}"
    );
    let html = run(
        "q4",
        "from IPython.display import HTML, display; display(HTML('<b>x</b>'))",
    )
    .await?;
    ensure!(
        items(&html)? == json!([["media", ["text/html", "<b>x</b>"]]]),
        "{html:?}"
    );
    let split = ExecuteRequest {
        api_version: 1,
        flush_timeout: Some(20.0),
        ..request("q5", Mode::Query, "print('v1')")
    };
    let split = serde_json::to_value(execution::execute(&link, split).await?)?;
    ensure!(
        split["stdout"] == "v1\n" && split["media"] == json!([]),
        "{split}"
    );
    let code = "import time\ntry:\n  print('ready', flush=True)\n  time.sleep(60)\n\
        except KeyboardInterrupt:\n  print('KI')";
    let stopped = interrupted(&link, request("q6", Mode::Query, code)).await?;
    ensure!(
        (stopped.0.as_str(), stopped.1) == ("KI\n", Some(0)),
        "{stopped:?}"
    );
    let completion =
        execution::completions(&link, "pri", Map::new(), execution::COMPLETION_LIMIT).await;
    ensure!(completion.error.is_none(), "{completion:?}");
    link.close().await;
    Ok(())
}

/// Asks the agent socket with the runner's own ZeroMQ library, as the hook library does.
const ASK: &str = r#"
import struct, sys, zmq
socket = zmq.Context().socket(zmq.REQ)
socket.setsockopt(zmq.RCVTIMEO, 5000)
socket.connect("ipc:///opt/kernel/agent.sock")
def ask(*parts):
    socket.send_multipart(parts)
    return [struct.unpack("i", part)[0] for part in socket.recv_multipart()]
own = sys.argv[1].encode()
print(ask(b"is-jail-enabled"))
print(ask(b"container-pid-to-host-pid", own, struct.pack("i", 1)))
print(ask(b"host-pid-to-container-pid", own, struct.pack("i", int(sys.argv[2]))))
print(ask(b"host-pid-to-container-pid", own, struct.pack("i", 1)))
print(ask(b"container-pid-to-host-pid", sys.argv[3].encode(), struct.pack("i", 1)))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn containers_ask_the_agent_socket_also_after_a_restart() -> Result<()> {
    let kernel = RealKernel::start(Image::Runner, &["app"])?;
    let (link, _) = kernel.ready().await?;
    let (id, init) = (
        kernel.inspect("{{.Id}}")?,
        kernel.inspect("{{.State.Pid}}")?,
    );
    let other = "0".repeat(63) + "1";
    for jail in [false, true] {
        let stop = CancellationToken::new();
        let options = AgentSocketOptions {
            directory: kernel.sockets(),
            jail,
            files: KernelFiles::default(),
        };
        agent_socket::serve(options, stop.clone())?;
        let arguments = [
            "exec",
            "-u",
            "1000:1000",
            &kernel.name,
            "/opt/backend.ai/bin/python",
            "-c",
            ASK,
            &id,
            &init,
            &other,
        ]
        .map(str::to_owned);
        let answers =
            tokio::task::spawn_blocking(move || docker(&arguments.each_ref().map(String::as_str)))
                .await??;
        let expected = format!(
            "[0, {}]\n[0, {init}]\n[0, 1]\n[0, -1]\n[0, -1]",
            i32::from(jail)
        );
        ensure!(answers == expected, "{answers}");
        stop.cancel();
    }
    link.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_in_and_come_out() -> Result<()> {
    let kernel = RealKernel::start(Image::Runner, &["app"])?;
    let (link, _) = kernel.ready().await?;
    let engine = Docker::connect(&DockerOptions::default()).await?;
    let place = UploadTarget {
        work_dir: kernel.path("work"),
        uid: UID,
        gid: UID,
        mounts: Vec::new(),
    };
    file_access::upload_file(
        place.clone(),
        "in/put.txt".to_owned(),
        Bytes::from_static(b"from outside\n"),
    )
    .await?;
    let (console, ..) = batch_run(
        &link,
        "f",
        None,
        "cat in/put.txt; stat -c %u in/put.txt in; echo more >> in/put.txt; ln -s /etc/passwd way-out; head -c 2000000 /dev/zero > big",
    )
    .await?;
    ensure!(console == "from outside\n1000\n1000\n", "{console:?}");
    let content = file_access::download_single(&engine, &kernel.name, "in/put.txt").await?;
    ensure!(content.as_ref() == b"from outside\nmore\n");
    let archive = file_access::download_file(&engine, &kernel.name, "in").await?;
    ensure!(archive.len() % 512 == 0 && archive.len() > 1024);
    for (path, class) in [
        ("in", "ValueError"),
        ("big", "ValueError"),
        ("missing", "RuntimeError"),
        ("../../etc/passwd", "PermissionError"),
    ] {
        let err = file_access::download_single(&engine, &kernel.name, path)
            .await
            .err()
            .context(path)?;
        ensure!(err.python_class() == class, "{path}: {err}");
    }
    let user = SessionUser {
        uid: UID,
        gid: UID,
        groups: Vec::new(),
    };
    let listed = file_access::list_files(&engine, &kernel.name, "in", &user).await?;
    let items: Value = serde_json::from_str(&listed.files)?;
    ensure!(
        items.as_array().context("items")?.len() == 1
            && listed.abspath == "in"
            && listed.errors.is_empty()
    );
    ensure!(
        items[0]["filename"] == "put.txt"
            && items[0]["mode"] == "-rw-r--r--"
            && items[0]["size"] == 18,
        "{items}"
    );
    ensure!(items[0]["mtime"].is_f64() && items[0]["ctime"].is_f64() && items[0]["atime"].is_f64());
    let missing = file_access::list_files(&engine, &kernel.name, "nowhere", &user).await?;
    ensure!(
        missing.files == "[]" && missing.errors.contains("No such file"),
        "{missing:?}"
    );
    link.close().await;
    Ok(())
}
