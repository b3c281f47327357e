//! The command line itself, without a node: exit codes, output that nobody reads, and how it is installed.

use std::fs::{DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use std::io::{Read as _, Write as _};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use control::rpc::service::unknown_method;
use control::rpc::{self, BoxFuture, Call, Failure, Limits, Server, ServerOptions, Service, Value};
use harness::fault_docker::{Fault, FaultDocker};
use harness::node::{Begun, program};
use harness::wait;
use harness::zmtp::Connection;
use serde_json::{Value as Json, json};
use shared::run_dir::RunDir;

/// A whole configuration of a cluster, as the original's agent needs it.
const CLUSTER: &str = r#"
[agent]
mode = "docker"
id = "i-command-line"
rpc-listen-addr = "127.0.0.1:6001"
scaling-group = "default"
[container]
port-range = [30000, 30010]
scratch-type = "hostdir"
stats-type = "docker"
[resource]
reserved-cpu = 1
reserved-mem = "1g"
[etcd]
namespace = "local"
addr = { host = "127.0.0.1", port = 2379 }
"#;

fn agent(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("bai-agent")?);
    command.args(arguments).stdin(Stdio::null());
    Ok(command)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_cluster_without_its_section_is_refused_in_words() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.toml");
    std::fs::write(&file, CLUSTER)?;
    let path = file.to_str().context("a plain path")?;
    let checked = agent(&["check-config", "--config", path])?.output()?;
    assert!(checked.status.success(), "{}", said(&checked));
    let shown = String::from_utf8_lossy(&checked.stdout);
    assert!(shown.contains("container.stats-type"), "{shown}");
    let without: String = CLUSTER.replace("[etcd]", "[elsewhere]");
    std::fs::write(&file, without)?;
    let refused = agent(&["run", "--config", path])?.output()?;
    assert_eq!(refused.status.code(), Some(78), "{}", said(&refused));
    assert!(
        said(&refused).contains("--standalone"),
        "{}",
        said(&refused)
    );
    Ok(())
}

#[test]
fn a_node_on_its_own_has_no_etcd_wherever_the_flag_stands() -> Result<()> {
    for words in [
        ["--standalone", "check-config", "--with-etcd"],
        ["check-config", "--standalone", "--with-etcd"],
        ["check-config", "--with-etcd", "--standalone"],
    ] {
        let refused = agent(&words)?.output()?;
        assert_eq!(
            refused.status.code(),
            Some(64),
            "{words:?}: {}",
            said(&refused)
        );
        let told = said(&refused);
        assert!(
            told.contains("--with-etcd") && told.contains("--standalone"),
            "{words:?}: {told}"
        );
    }
    Ok(())
}

#[test]
fn container_options_that_would_fail_each_creation_are_told() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let name = "agent-docker-container-opts.json";
    let own = directory.path().join(".config/backend.ai").join(name);
    std::fs::create_dir_all(own.parent().context("a directory")?)?;
    for (options, warned) in [("{", true), (r#"{"Tty": false}"#, false)] {
        std::fs::write(&own, options)?;
        let output = agent(&["check-config", "--standalone"])?
            .env("HOME", directory.path())
            .env_remove("BACKEND_CONFIG_FILE")
            .current_dir(directory.path())
            .output()?;
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        let told = shown.contains(&own.display().to_string());
        assert_eq!(told, warned, "{shown}");
    }
    Ok(())
}

/// Commands with much to say.
const TALKATIVE: [&[&str]; 5] = [
    &["check-config", "--standalone"],
    &["check-config", "--standalone", "--output", "json"],
    &["completions", "bash"],
    &["man"],
    &["--help"],
];

#[test]
fn output_that_nobody_reads_is_no_crash() -> Result<()> {
    for words in TALKATIVE {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let output = agent(words)?
            .env_remove("BACKEND_CONFIG_FILE")
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()?;
        assert_eq!(
            output.status.code(),
            Some(0),
            "{words:?}: {}",
            said(&output)
        );
        assert_eq!(said(&output), "", "{words:?}");
    }
    Ok(())
}

#[test]
fn output_that_is_lost_is_no_success() -> Result<()> {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full");
    for words in TALKATIVE {
        let output = agent(words)?
            .env_remove("BACKEND_CONFIG_FILE")
            .stdout(full()?)
            .stderr(Stdio::piped())
            .output()?;
        let told = said(&output);
        assert_eq!(output.status.code(), Some(74), "{words:?}: {told}");
        assert_eq!(told.matches("cannot be written").count(), 1, "{told}");
    }
    // Nor does it change why something was refused.
    let output = agent(&["--nonsense"])?.stderr(full()?).output()?;
    assert_eq!(output.status.code(), Some(64));
    let output = agent(&["status", "--address", "nonsense"])?
        .stderr(full()?)
        .output()?;
    assert_eq!(output.status.code(), Some(69));
    Ok(())
}

#[test]
fn a_configuration_that_was_named_is_never_passed_over() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.toml");
    std::fs::write(&file, "[agent]\nrpc-listen-addr = 6001\n")?;
    let path = file.to_str().context("a plain path")?;
    let absent = directory.path().join("absent.toml");
    let absent = absent.to_str().context("a plain path")?;
    for named in [path, absent] {
        for command in [&["status"][..], &["ports"], &["kernel", "list"], &["stats"]] {
            let output = agent(command)?
                .args(["--config", named])
                .env_remove("BAI_AGENT_ADDRESS")
                .output()?;
            assert_eq!(output.status.code(), Some(78), "{}", said(&output));
            assert!(said(&output).contains(named), "{}", said(&output));
        }
    }
    Ok(())
}

#[test]
fn a_configuration_that_is_found_is_never_passed_over() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.toml");
    let asked = |text: &str| -> Result<Output> {
        std::fs::write(&file, text)?;
        Ok(agent(&["status", "--connect-timeout", "1"])?
            .env_remove("BAI_AGENT_ADDRESS")
            .env_remove("BACKEND_CONFIG_FILE")
            .current_dir(directory.path())
            .output()?)
    };
    // The usual address without a key would be another node's.
    let faulty = asked(&CLUSTER.replace("id = ", "id = = "))?;
    assert_eq!(faulty.status.code(), Some(78), "{}", said(&faulty));
    assert!(said(&faulty).contains("agent.toml"), "{}", said(&faulty));
    // Nobody listens there.
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let whole = asked(&CLUSTER.replace("127.0.0.1:6001", &address.to_string()))?;
    assert_eq!(whole.status.code(), Some(69), "{}", said(&whole));
    assert!(
        said(&whole).contains(&address.to_string()),
        "{}",
        said(&whole)
    );
    Ok(())
}

#[test]
fn whoever_finds_no_agent_is_told_once_what_to_look_at() -> Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    drop(taken);
    let output = agent(&["status", "--address", &address])?.output()?;
    assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    let text = said(&output);
    assert_eq!(text.matches('?').count(), 1, "{text}");
    assert!(text.contains("--keypair"), "{text}");
    let output = agent(&["status", "--address", "nonsense"])?.output()?;
    assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    assert!(
        said(&output).contains("give host:port"),
        "{}",
        said(&output)
    );
    Ok(())
}

#[test]
fn what_the_node_of_the_configuration_waits_for_is_not_told_of_another() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    drop(taken);
    let file = directory.path().join("agent.toml");
    let text = format!(
        "[agent]\nid = 'i-waiting'\nrpc-listen-addr = '{address}'\n[node]\nrun-dir = '{}'\n",
        directory.path().display()
    );
    std::fs::write(&file, text)?;
    let waiting = serde_json::json!({
        "pid": std::process::id(), "since": 0.0, "waiting_for": "etcd", "why": "no answer",
    });
    let told = directory.path().join("i-waiting.starting.json");
    std::fs::write(told, waiting.to_string())?;
    let asked = |words: &[&str]| -> Result<Output> {
        Ok(agent(&["status", "--standalone", "--config"])?
            .arg(&file)
            .args(words)
            .env_remove("BAI_AGENT_ADDRESS")
            .output()?)
    };
    let own = asked(&[])?;
    assert_eq!(own.status.code(), Some(1), "{}", said(&own));
    let shown = String::from_utf8_lossy(&own.stdout);
    assert!(shown.contains("waits for  etcd"), "{shown}");
    let other = asked(&["--address", &address])?;
    assert_eq!(other.status.code(), Some(69), "{}", said(&other));
    assert!(other.stdout.is_empty(), "{other:?}");
    assert!(
        said(&other).contains("no agent answers"),
        "{}",
        said(&other)
    );
    Ok(())
}

/// The Python agent's port: it echoes probes, and the first method that it lacks would end its receive loop.
#[test]
fn the_python_agent_is_told_apart_before_anything_is_asked() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?.to_string();
    let commands = [
        &["status"][..],
        &["ports"],
        &["kernel", "list"],
        &["kernel", "create", "an-image"],
        &["kernel", "exec", "abc", "--", "ls"],
        &["kernel", "logs", "abc"],
        &["kernel", "service", "abc", "sshd"],
        &["kernel", "stats"],
        &["kernel", "folders"],
        &["kernel", "destroy", "abc"],
    ];
    let echoing = std::thread::spawn(move || -> Result<usize> {
        let mut probes = 0;
        for command in commands {
            let mut peer = Connection::accepted(listener.accept()?.0)?;
            // Until the command hangs up.
            while let Ok(mut frames) = peer.receive() {
                let tag = frames.first().context("a tag")?;
                ensure!(tag == b"PING", "{command:?} sent {frames:?}");
                frames[0] = b"PONG".to_vec();
                peer.send(&frames.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
                probes += 1;
            }
        }
        Ok(probes)
    });
    for command in commands {
        let output = agent(command)?
            .env("BAI_AGENT_ADDRESS", &address)
            .output()?;
        let told = said(&output);
        assert_eq!(output.status.code(), Some(69), "{command:?}: {told}");
        assert!(
            told.contains("this is not bai-agent"),
            "{command:?}: {told}"
        );
    }
    let probes = echoing.join().ok().context("a peer that echoes")??;
    assert_eq!(probes, commands.len());
    Ok(())
}

/// The Python agent still runs: its kernels' containers, also those in state created, are not ours to remove.
#[test]
fn nothing_is_touched_while_another_agent_has_the_rpc_address() -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let place = directory.path();
    let rpc = std::net::TcpListener::bind("127.0.0.1:0")?;
    let etcd = std::net::TcpListener::bind("127.0.0.1:0")?;
    let engine = std::os::unix::net::UnixListener::bind(place.join("engine.sock"))?;
    etcd.set_nonblocking(true)?;
    engine.set_nonblocking(true)?;
    let taken = rpc.local_addr()?.to_string();
    let shown = place.display();
    let text = CLUSTER
        .replace("127.0.0.1:6001", &taken)
        .replace("2379", &etcd.local_addr()?.port().to_string())
        .replace(
            "[container]",
            &format!("var-base-path = '{shown}/state'\nipc-base-path = '{shown}/ipc'\n[container]\nscratch-root = '{shown}/scratches'"),
        )
        + &format!("[node]\nrun-dir = '{shown}/run'\nengine.host = 'unix://{shown}/engine.sock'\n");
    let file = place.join("agent.toml");
    std::fs::write(&file, text)?;
    for words in [&["run"][..], &["run", "--standalone"]] {
        // One that did not look would wait for etcd and the engine.
        let output = Command::new("timeout")
            .arg("60")
            .arg(program("bai-agent")?)
            .args(words)
            .arg("--config")
            .arg(&file)
            .env_remove("DOCKER_HOST")
            .stdin(Stdio::null())
            .output()?;
        let told = said(&output);
        assert_eq!(output.status.code(), Some(69), "{told}");
        assert!(
            told.contains(&format!("cannot listen for RPC on {taken}")),
            "{told}"
        );
        let asked = [etcd.accept().map(drop), engine.accept().map(drop)];
        for nobody in asked {
            let err = nobody.err().context("etcd or the engine was asked")?;
            assert_eq!(err.kind(), std::io::ErrorKind::WouldBlock);
        }
        let state = files_below(&place.join("state"))?;
        assert!(state.is_empty(), "{state:?}");
    }
    Ok(())
}

/// The machine's own has nothing of theirs mounted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_s_own_engine_says_which_runners_are_in_use() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let runners = directory.path().join("runner");
    let (used, unused) = (runners.join("0.0.1-used"), runners.join("0.0.2-unused"));
    for version in [&used, &unused] {
        std::fs::create_dir_all(version)?;
        std::fs::write(version.join("manifest.json"), "{}")?;
    }
    let engine = FaultDocker::start()?;
    let containers = serde_json::json!([{ "Mounts": [{ "Source": used.join("krunner") }] }]);
    let version = r#"{"Version":"1","ApiVersion":"1.41"}"#;
    for (needle, answer) in [
        ("/version", version.to_owned()),
        ("/containers/json", containers.to_string()),
    ] {
        engine.spoil(needle, Fault::json(200, &answer), 1);
    }
    let file = directory.path().join("agent.toml");
    let text = format!(
        "[agent]\nid = 'i-prune'\n[node]\nrunner-dir = '{}'\nengine.host = '{}'\n",
        runners.display(),
        engine.host()
    );
    std::fs::write(&file, text)?;
    let output = agent(&["runner", "prune", "--config"])?
        .arg(&file)
        .env_remove("DOCKER_HOST")
        .output()?;
    assert!(output.status.success(), "{}", said(&output));
    assert!(used.exists());
    assert!(!unused.exists());
    Ok(())
}

#[test]
fn doctor_says_which_configuration_it_goes_by() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("agent.toml");
    let path = file.to_str().context("a plain path")?;
    std::fs::write(
        &file,
        "[agent]\nid = 'i-doctor'\n[container]\nkernel-uid = 1000\nkernel-gid = 1000\n",
    )?;
    let finding = |words: &[&str]| -> Result<serde_json::Value> {
        let output = agent(&["doctor", "--output", "json", "--config", path])?
            .args(words)
            .env("DOCKER_HOST", "unix:///nonexistent.sock")
            .output()?;
        let told: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let findings = told["findings"].as_array().context("findings")?;
        let engine = findings.iter().find(|it| it["check"] == "engine");
        let engine = engine.context("engine")?;
        assert_eq!(engine["level"], "failure");
        let remedy = engine["remedy"].as_str().context("words")?;
        assert!(remedy.contains("systemctl status docker"), "{remedy}");
        assert_eq!(output.status.code(), Some(1), "{}", said(&output));
        let found = findings.iter().find(|it| it["check"] == "configuration");
        found.cloned().context("configuration")
    };
    let of_its_own = finding(&["--standalone"])?;
    assert_eq!(of_its_own["level"], "good", "{of_its_own}");
    // It lacks what a cluster's node needs, so it can only be the other kind.
    let unsaid = finding(&[])?;
    assert_eq!(unsaid["level"], "warning", "{unsaid}");
    let remedy = unsaid["remedy"].as_str().context("words")?;
    assert!(
        remedy.contains(&format!("--standalone --config {path}")),
        "{remedy}"
    );
    std::fs::write(&file, "[agent]\nid = 'i-doctor'\nregoin = 'here'\n")?;
    let slip = finding(&["--standalone"])?;
    assert_eq!(slip["level"], "warning", "{slip}");
    Ok(())
}

#[test]
fn both_programs_end_with_64_after_a_wrong_command_line() -> Result<()> {
    for (name, wrong) in [("bai-agent", "--nonsense"), ("bai-dataplane", "--nonsense")] {
        let ended = |argument: &str| {
            Command::new(program(name)?)
                .arg(argument)
                .output()
                .context(name)
        };
        assert_eq!(ended(wrong)?.status.code(), Some(64), "{name}");
        assert_eq!(ended("--help")?.status.code(), Some(0), "{name}");
    }
    Ok(())
}

#[test]
fn a_log_that_cannot_be_had_is_a_wrong_command_line_for_both() -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let file = directory.path().join("agent.toml");
    let text = format!(
        "[agent]\nid = 'i-log'\n[node]\nrun-dir = '{}'\n",
        directory.path().display()
    );
    std::fs::write(&file, text)?;
    for (name, first) in [("bai-agent", &["run"][..]), ("bai-dataplane", &[])] {
        let output = Command::new(program(name)?)
            .args(first)
            .args(["--standalone", "--config"])
            .arg(&file)
            .env("RUST_LOG", "dataplane=loud")
            .output()?;
        let told = said(&output);
        assert_eq!(output.status.code(), Some(64), "{name}: {told}");
        assert!(told.contains("RUST_LOG can not be used"), "{name}: {told}");
    }
    Ok(())
}

#[test]
fn the_dataplane_s_log_has_colours_where_the_configuration_says_so() -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let file = directory.path().join("agent.toml");
    let run_dir = RunDir::choose(Some(directory.path()), "i-log")?;
    // It can't be bound, so that the program ends, and has logged a line before.
    std::fs::create_dir(run_dir.create_dataplane()?.join("doorbell"))?;
    for (coloured, console) in [(false, ""), (true, "[logging.console]\ncolored = true\n")] {
        let text = format!(
            "[agent]\nid = 'i-log'\n[node]\nrun-dir = '{}'\n{console}",
            directory.path().display()
        );
        std::fs::write(&file, text)?;
        let output = Command::new(program("bai-dataplane")?)
            .args(["--standalone", "--config"])
            .arg(&file)
            .env("RUST_LOG", "info")
            .output()?;
        let told = said(&output);
        assert_eq!(output.status.code(), Some(70), "{told}");
        assert!(told.contains("observed region opened"), "{told}");
        assert_eq!(told.contains('\x1b'), coloured, "{told}");
    }
    Ok(())
}

#[test]
fn an_installation_is_whole_and_goes_without_a_trace() -> Result<()> {
    let root = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/install");
    let programs = program("bai-agent")?;
    let programs = programs.parent().context("a directory")?;
    // What systemd is told; asked whether it has read the units, it answers what is in a file.
    let stub = tempfile::tempdir()?;
    let systemctl = stub.path().join("systemctl");
    let text = "#!/bin/sh\necho \"$@\" >>\"$0.log\"\n[ \"$1\" != show ] || cat \"$0.stale\"\n";
    std::fs::write(&systemctl, text)?;
    std::fs::set_permissions(&systemctl, Permissions::from_mode(0o755))?;
    let stale = |answer: &str| std::fs::write(stub.path().join("systemctl.stale"), answer);
    let reloads = || -> Result<usize> {
        let told = std::fs::read_to_string(stub.path().join("systemctl.log"))?;
        Ok(told.lines().filter(|it| *it == "daemon-reload").count())
    };
    stale("no\n\nno\n")?;
    let run = |arguments: &[&str]| -> Result<()> {
        let output = Command::new(&script)
            .args(arguments)
            .env("BAI_SYSTEMCTL", &systemctl)
            .env("DESTDIR", root.path())
            .env("BAI_BIN", programs)
            .stdin(Stdio::null())
            .output()?;
        ensure!(output.status.success(), "{arguments:?}: {}", said(&output));
        Ok(())
    };
    // An upgrade installs over what is there.
    run(&[])?;
    ensure!(reloads()? == 1, "new units are read");
    run(&[])?;
    ensure!(reloads()? == 1, "the same units are not read again");
    let place = root.path().join("usr");
    std::fs::write(place.join("lib/systemd/system/bai-agent.service"), "")?;
    run(&[])?;
    ensure!(reloads()? == 2, "a unit that has changed is read");
    stale("no\n\nyes\n")?;
    run(&[])?;
    ensure!(reloads()? == 3, "what was installed and not read is read");
    for name in ["bai-agent", "bai-dataplane", "bai-agent-watcher"] {
        let unit = place.join(format!("lib/systemd/system/{name}.service"));
        let unit = std::fs::read_to_string(&unit).with_context(|| unit.display().to_string())?;
        let lines = unit.lines();
        for line in
            lines.filter(|line| line.starts_with("ExecStart") || line.starts_with("Documentation"))
        {
            let (_, path) = line.split_once('=').context("a value")?;
            let path = path.trim_start_matches("file://").trim_start_matches('/');
            let path = path.split(' ').next().context("a path")?;
            assert!(root.path().join(path).is_file(), "{name}: {line}");
        }
    }
    // Where the documents say that these are.
    for file in [
        "prometheus/alerts.yml",
        "prometheus/prometheus.yml",
        "grafana/node.json",
    ] {
        let file = place.join("share/doc/bai-agent/deploy").join(file);
        assert!(file.is_file(), "{}", file.display());
    }
    for file in [
        "share/man/man1/bai-agent.1",
        "share/man/man1/bai-agent-kernel-create.1",
    ] {
        assert!(
            std::fs::metadata(place.join(file)).is_ok_and(|it| it.len() > 100),
            "{file}"
        );
    }
    let version = Command::new(place.join("bin/bai-agent"))
        .arg("--version")
        .output()?;
    assert!(version.status.success());
    run(&["--remove"])?;
    let left = files_below(root.path())?;
    assert!(left.is_empty(), "{left:?}");
    Ok(())
}

/// What an operator types who has put the file where both programs find it, and names it nowhere.
#[test]
fn detach_goes_by_the_file_it_finds() -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let place = directory.path();
    let file = place.join(".config/backend.ai/agent.toml");
    std::fs::create_dir_all(file.parent().context("a directory")?)?;
    let run_dir = place.join("run");
    let regions = run_dir.join("worker-17");
    let detached = |text: &str| -> Result<Output> {
        for program in ["control", "dataplane"] {
            std::fs::create_dir_all(regions.join(program))?;
        }
        std::fs::write(&file, text)?;
        Ok(agent(&["detach"])?
            .env("HOME", place)
            .env_remove("BACKEND_CONFIG_FILE")
            .current_dir(place)
            .output()?)
    };
    let own = format!(
        "[agent]\nid = 'worker-17'\n[node]\nrun-dir = '{}'\n",
        run_dir.display()
    );
    // Ours would be those of another node.
    let faulty = detached(&format!("{own}max-containers = 0\n"))?;
    assert_eq!(faulty.status.code(), Some(78), "{}", said(&faulty));
    let told = said(&faulty);
    assert!(told.contains("node.max-containers"), "{told}");
    assert!(regions.join("dataplane").exists());
    let of_a_cluster = CLUSTER.replace("i-command-line", "worker-17")
        + &format!("[node]\nrun-dir = '{}'\n", run_dir.display());
    for text in [own, of_a_cluster] {
        let output = detached(&text)?;
        assert!(output.status.success(), "{}", said(&output));
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(told.contains("worker-17"), "{told}");
        assert!(!regions.exists());
    }
    Ok(())
}

/// Without root the regions of the units' node can't be seen, which must not look as if there were none.
#[test]
fn whoever_may_not_look_is_told_to_be_root() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        harness::skip::needs("commands as another user need root");
        return Ok(());
    }
    let id = format!("i-look-{}", std::process::id());
    let run_dir = RunDir::choose(None, &id)?;
    let own = run_dir.root();
    let base = own.parent().context("a directory")?;
    // As the units make it.
    let made = DirBuilder::new().mode(0o750).create(base).is_ok();
    let place = tempfile::tempdir()?;
    std::fs::set_permissions(place.path(), PermissionsExt::from_mode(0o755))?;
    // The directory of the programs built may be closed to others.
    let programs = ["bai-agent", "bai-dataplane"].map(|name| (name, place.path().join(name)));
    for (name, copy) in &programs {
        std::fs::copy(program(name)?, copy)?;
    }
    let file = place.path().join("agent.toml");
    std::fs::write(&file, format!("[agent]\nid = '{id}'\n"))?;
    let outcome = (|| -> Result<()> {
        DirBuilder::new().mode(0o750).create(own)?;
        DirBuilder::new().mode(0o750).create(run_dir.dataplane())?;
        let [(_, agent), (_, dataplane)] = &programs;
        for (program, words) in [
            (agent, &["detach"][..]),
            (agent, &["stats"]),
            (dataplane, &["--standalone", "detach"]),
        ] {
            let output = Command::new(program)
                .args(words)
                .arg("--config")
                .arg(&file)
                .stdin(Stdio::null())
                .uid(65534)
                .gid(65534)
                .output()?;
            let told = said(&output);
            ensure!(
                output.status.code().is_some_and(|code| code != 0),
                "{words:?}: {told}"
            );
            ensure!(told.contains("as root"), "{words:?}: {told}");
        }
        ensure!(run_dir.dataplane().exists());
        Ok(())
    })();
    let _ = std::fs::remove_dir_all(own);
    if made {
        // Another test, or a node, may use it by now.
        let _ = std::fs::remove_dir(base);
    }
    outcome
}

/// A name server that is away for a moment must not stop a unit for good, as 78 does.
#[test]
fn a_name_that_does_not_resolve_ends_neither_program_for_good() -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let file = directory.path().join("agent.toml");
    let run_dir = directory.path().join("run");
    let text = format!(
        "[agent]\nid = 'nowhere'\nrpc-listen-addr = 'nowhere.invalid:6001'\n[node]\nrun-dir = '{}'\n",
        run_dir.display()
    );
    std::fs::write(&file, text)?;
    let path = file.to_str().context("a plain path")?;
    let output = agent(&["run", "--standalone", "--config", path])?.output()?;
    assert_eq!(output.status.code(), Some(69), "{}", said(&output));
    let told = said(&output);
    assert!(told.contains("nowhere.invalid"), "{told}");
    // The dataplane has no use for it.
    let output = Command::new(program("bai-dataplane")?)
        .args(["--standalone", "--config", path, "detach"])
        .output()?;
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    Ok(())
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.append(&mut files_below(&entry.path())?);
        } else {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// An agent with one kernel, whose program asks for a name, ignores interrupts and waits for the answer.
#[derive(Debug, Default)]
struct Asking(Arc<Mutex<Vec<String>>>);

impl Service for Asking {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Value, Failure>> {
        let calls = self.0.clone();
        Box::pin(async move {
            let text = |index: usize| call.args.get(index).and_then(Value::as_str);
            let mode = text(4).unwrap_or_default();
            let (status, console) = match (call.method.as_str(), mode) {
                ("bai.kernels", _) => {
                    let kernel = json!({"kernel_id": "k", "session_id": "s", "image": "i", "state": "running"});
                    return rpc::to_value(&json!({ "kernels": [kernel] }))
                        .map_err(|err| Failure::type_error(err.to_string()));
                }
                ("bai.interrupt", _) => ("", json!([])),
                ("execute", "query") => ("waiting-input", json!([["stdout", "name? "]])),
                ("execute", "continue") => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    ("continued", json!([]))
                }
                ("execute", "input") => {
                    let said = format!("hi {}", text(5).unwrap_or_default());
                    ("finished", json!([["stdout", said]]))
                }
                _ => return Err(unknown_method(&call.method)),
            };
            let reply = match call.method.as_str() {
                "execute" => {
                    json!({"status": status, "exitCode": 0, "options": {"is_password": true}, "console": console})
                }
                _ => json!({"met": "at-work"}),
            };
            let called = format!("{} {mode}", call.method);
            // Polls without end say nothing new.
            let mut calls = calls
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            if calls.last() != Some(&called) {
                calls.push(called);
            }
            rpc::to_value(&reply).map_err(|err| Failure::type_error(err.to_string()))
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_ignores_ctrl_c_gets_its_input_and_its_output_is_told() -> Result<()> {
    let soon = Duration::from_secs(60);
    for leaves in [false, true] {
        let calls = Arc::<Mutex<Vec<String>>>::default();
        let options = ServerOptions {
            address: "127.0.0.1:0".to_owned(),
            curve: None,
            limits: Limits::default(),
        };
        let server = Server::bind(options, Arc::new(Asking(calls.clone()))).await?;
        let words = [
            "kernel", "exec", "--output", "json", "--mode", "query", "k", "input()",
        ];
        let mut command = agent(&words)?;
        command
            .env("BAI_AGENT_ADDRESS", server.local_addr().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut run = Begun::spawn(&mut command)?;
        let last = |wanted: &'static str| {
            let calls = calls.clone();
            wait::until(wanted, soon, move || {
                let last = calls.lock().ok().and_then(|calls| calls.last().cloned());
                std::future::ready((last.as_deref() == Some(wanted)).then_some(()))
            })
        };
        let mut errors = run.0.stderr.take().context("an error output")?;
        let mut prompt = *b"(password, shown as typed) ";
        tokio::task::block_in_place(|| errors.read_exact(&mut prompt))?;
        ensure!(prompt.starts_with(b"(password"), "{prompt:?}");
        run.interrupt()?;
        last("execute continue").await?;
        if leaves {
            run.interrupt()?;
        } else {
            let mut input = run.0.stdin.take().context("an input")?;
            input.write_all(b"bob\n")?;
        }
        let status =
            wait::until("the command ends", soon, || std::future::ready(run.ended())).await?;
        let mut told = String::new();
        let output = run.0.stdout.take().context("an output")?;
        { output }.read_to_string(&mut told)?;
        let told: Json = serde_json::from_str(&told)?;
        let (code, exit_code, console) = match leaves {
            false => (
                0,
                json!(0),
                json!([["stdout", "name? "], ["stdout", "hi bob"]]),
            ),
            true => (130, Json::Null, json!([["stdout", "name? "]])),
        };
        ensure!(status.code() == Some(code), "{status:?}");
        ensure!(
            told["exit_code"] == exit_code && told["console"] == console,
            "{told}"
        );
        server.shutdown(Duration::ZERO).await;
    }
    Ok(())
}
