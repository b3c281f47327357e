//! The bench programs work: tiny runs that measure nothing, so that they cannot rot.

#[path = "../../tests/src/skip.rs"]
mod skip;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::rpc::{BoxFuture, Call, Failure, Limits, Server, ServerOptions, Service, Value};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value as Json;

fn output(name: &str) -> PathBuf {
    let path =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).expect("a directory for results");
    path
}

/// Whether this host lets benches run at all.
fn possible() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip::needs("benches make namespaces and cgroups, which needs root");
    }
    root
}

fn start(program: &str, arguments: &[&str], output: &Path) -> Child {
    Command::new(program)
        .args(arguments)
        .arg("--output")
        .arg(output)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the bench starts")
}

fn left_behind(pid: u32) -> Vec<String> {
    let name = format!("bai-bench-{pid}");
    let mut found = Vec::new();
    for place in [
        "/run/netns",
        "/dev/shm",
        "/sys/fs/cgroup/cpuacct",
        "/sys/fs/cgroup",
    ] {
        let Ok(entries) = std::fs::read_dir(place) else {
            continue;
        };
        found.extend(
            entries
                .flatten()
                .map(|entry| entry.path().display().to_string())
                .filter(|path| path.contains(&name)),
        );
    }
    found
}

fn finished(bench: Child, output: &Path, file: &str) -> Json {
    let pid = bench.id();
    let ended = bench.wait_with_output().expect("the bench ends");
    let words = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{words}");
    assert_eq!(left_behind(pid), Vec::<String>::new());
    let text = std::fs::read_to_string(output.join(file)).expect("results");
    serde_json::from_str(&text).expect("results are JSON")
}

#[test]
fn ports_are_measured_against_every_peer() {
    if !possible() {
        return;
    }
    let output = output("ports");
    let arguments = [
        "--rounds",
        "1",
        "--seconds",
        "0.2",
        "--idle",
        "20",
        "--connections",
        "4",
        "--message-bytes",
        "4096",
        "--bulk-block-bytes",
        "65536",
        "--loads",
        "requests,latency,connections,bulk,host-requests,idle",
    ];
    let bench = start(env!("CARGO_BIN_EXE_bench-ports"), &arguments, &output);
    let found = finished(bench, &output, "ports.json");
    for name in [
        "remote_requests_vs_direct",
        "remote_requests_vs_dnat",
        "remote_requests_vs_nginx",
        "remote_requests_vs_haproxy",
        "remote_requests_vs_docker_proxy",
        "remote_cpu_per_request_vs_direct",
        "remote_cpu_per_gb_vs_direct",
        "remote_cpu_per_connection_vs_direct",
        "remote_bulk_vs_direct",
        "remote_bulk_vs_nginx",
        "remote_bulk_vs_haproxy",
        "remote_bulk_vs_docker_proxy",
        "remote_connections_vs_direct",
        "remote_connections_vs_best_proxy",
        "remote_p50_vs_direct",
        "host_requests_vs_direct",
        "host_cpu_per_request_vs_docker_proxy",
        "relay_cpu_s_per_gb",
        "relay_requests_vs_nginx",
        "relay_bytes_per_idle_connection",
    ] {
        let value = found["ratios"][name].as_f64();
        assert!(value.is_some_and(|it| it >= 0.0), "{name}: {value:?}");
    }
    for load in ["requests", "latency", "connections", "bulk"] {
        let name = format!("cable_{load}_vs_direct");
        let value = found["further"][&name].as_f64();
        assert!(value.is_some_and(|it| it > 0.0), "{name}: {value:?}");
    }
    assert_eq!(found["message_bytes"], 4096);
    let iperf3 = found["iperf3"].as_str().unwrap_or_default();
    assert!(iperf3.starts_with("iperf 3"), "{iperf3}");
    assert_eq!(
        found["peers"].as_object().map(serde_json::Map::len),
        Some(benches::peer::Peer::ALL.len())
    );
    let svg = std::fs::read_to_string(output.join("ports.svg")).expect("a plot");
    assert!(svg.contains("docker_proxy"));
    std::fs::remove_dir_all(output).expect("removed");
}

#[test]
fn publishing_is_measured_with_and_without_the_engine() {
    if !possible() {
        return;
    }
    let output = output("publish");
    let arguments = [
        "--rounds",
        "1",
        "--ports",
        "8",
        "--many",
        "16",
        "--container-ports",
        "0,2",
        "--rules",
        "4",
    ];
    let bench = start(env!("CARGO_BIN_EXE_bench-publish"), &arguments, &output);
    let found = finished(bench, &output, "publish.json");
    for name in [
        "publish_ms_8_ports",
        "withdraw_ms_8_ports",
        "bytes_16_ports",
    ] {
        let value = found["ratios"][name].as_f64();
        assert!(value.is_some_and(|it| it >= 0.0), "{name}: {value:?}");
    }
    assert_eq!(found["ratios"]["processes_16_ports"].as_u64(), Some(1));
    let name = "start_and_stop_vs_engine_2_ports_4_rules";
    let value = found["further"][name].as_f64();
    assert!(value.is_some_and(|it| it > 0.0), "{name}: {value:?}");
    std::fs::remove_dir_all(output).expect("removed");
}

#[test]
fn statistics_are_measured_against_other_ways() {
    if !possible() {
        return;
    }
    let output = output("stats");
    let arguments = [
        "--containers",
        "3,5",
        "--ticks",
        "3",
        "--engine-containers",
        "1",
        "--engine-rounds",
        "1",
        "--agent-seconds",
        "0",
    ];
    let bench = start(env!("CARGO_BIN_EXE_bench-stats"), &arguments, &output);
    let found = finished(bench, &output, "stats.json");
    for name in [
        "cpu_ms_per_sample_3",
        "cpu_ms_per_sample_5",
        "vs_pread_5",
        "vs_open_5",
        "vs_python_files_5",
        "vs_engine_api_per_container",
    ] {
        let value = found["ratios"][name].as_f64();
        assert!(value.is_some_and(|it| it >= 0.0), "{name}: {value:?}");
    }
    let ways = found["ways"].as_array().expect("samples");
    assert_eq!(ways.len(), 8, "four ways, two sizes");
    for way in ways {
        assert_eq!(way["ticks"].as_array().map(Vec::len), Some(3), "{way}");
        let reader = way["readers"]["memory"].as_str();
        let wanted = match way["way"].as_str() {
            Some("ours") => Some("bpf"),
            Some("python_files") => None,
            _ => Some("file"),
        };
        assert_eq!(reader, wanted, "{way}");
    }
    let meaning = found["meaning"]["vs_engine_api_per_container"].as_str();
    assert!(
        meaning.is_some_and(|it| it.contains("helpers")),
        "{meaning:?}"
    );
    for name in ["processes_ms_5", "disk_ms_5", "disk_count_ms_5"] {
        let value = found["further"][name].as_f64();
        assert!(value.is_some_and(|it| it > 0.0), "{name}: {value:?}");
    }
    let command = found["command"].as_array().expect("a command");
    assert!(command.iter().any(|it| it == "3,5"), "{command:?}");
    assert_eq!(found["options"]["ways"].as_array().map(Vec::len), Some(3));
    std::fs::remove_dir_all(output).expect("removed");
}

/// Ends when the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn said(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn calls_are_generated_and_the_floor_answers_them() {
    let program = env!("CARGO_BIN_EXE_rpc-load");
    let bare = Command::new(program)
        .args(["127.0.0.1:0", "bare"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the floor starts");
    let mut bare = Running(bare);
    let mut port = String::new();
    BufReader::new(bare.0.stdout.take().expect("piped"))
        .read_line(&mut port)
        .expect("a port");
    let floor = format!("127.0.0.1:{}", port.trim());
    generated(program, &floor);
    drop(bare);
    // Nobody there: that is said.
    let output = Command::new(program)
        .args([floor.as_str(), "ready", "0.05"])
        .output()
        .expect("the generator starts");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("never answered"));
    // The agent's own server understands it.
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let options = ServerOptions {
        address: "127.0.0.1:0".to_owned(),
        curve: None,
        limits: Limits::default(),
    };
    let server = runtime.block_on(Server::bind(options, Arc::new(Pings)));
    let server = server.expect("the server starts");
    generated(program, &server.local_addr().to_string());
}

/// Answers as the agent does, and nothing else.
#[derive(Debug)]
struct Pings;

impl Service for Pings {
    fn call(&self, call: Call) -> BoxFuture<'static, Result<Value, Failure>> {
        Box::pin(async move {
            let (method, mut arguments) = call.bind()?;
            match method.name {
                "ping" => Ok(arguments.take("msg")),
                other => Err(Failure::new("NotImplementedError", other)),
            }
        })
    }
}

/// Every kind of load on a server, and what the generator says of it.
fn generated(program: &str, address: &str) {
    for (words, wanted) in [
        (&["ready", "5"][..], Some(1)),
        (&["connects", "3"], Some(3)),
        (&["calls", "1", "0.3"], None),
        (&["calls", "16", "0.3"], None),
    ] {
        let text = said(Command::new(program).arg(address).args(words));
        let found: Json = serde_json::from_str(&text).expect("JSON");
        let count = found["count"].as_u64().expect("a count");
        let samples = found["samples_us"].as_array().expect("samples");
        assert_eq!(samples.len() as u64, count, "{words:?}");
        match wanted {
            Some(wanted) => assert_eq!(count, wanted, "{words:?}"),
            None => assert!(count > 0, "{words:?}"),
        }
        let mut all = samples.iter();
        assert!(all.all(|it| it.as_u64().is_some()), "{words:?}: {text}");
        let seconds = found["seconds"].as_f64().expect("seconds");
        assert!(seconds > 0.0, "{words:?}: {seconds}");
    }
}

#[test]
fn the_relay_alone_is_measured_by_each_engine() {
    let found =
        said(Command::new(env!("CARGO_BIN_EXE_relay-micro")).args(["20", "10", "1", "0.02"]));
    let mut wanted = vec!["direct", "relay", "relay, copy only"];
    if !found.contains("relay, io_uring is left out") {
        wanted.push("relay, io_uring");
    }
    for unit in ["GB/s", "messages/s", "connections/s"] {
        for name in &wanted {
            if unit != "GB/s" && *name == "relay, copy only" {
                continue;
            }
            let mut lines = found.lines().filter(|line| line.contains(unit));
            let named = |line: &str| {
                line.trim_start()
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with("  "))
            };
            let line = lines
                .find(|line| named(line))
                .unwrap_or_else(|| panic!("{name} {unit}: {found}"));
            let number = line
                .trim_start()
                .strip_prefix(name)
                .and_then(|rest| rest.split_whitespace().next());
            let rate: f64 = number.and_then(|it| it.parse().ok()).expect("a number");
            assert!(rate > 0.0, "{line}");
            assert_eq!(line.contains("relay CPU"), *name != "direct", "{line}");
        }
    }
    assert!(found.contains("per connection"), "{found}");
}

#[test]
fn a_way_that_is_none_is_a_usage_error() {
    let output = Command::new(env!("CARGO_BIN_EXE_bench-stats"))
        .args(["--ways", "ours,nobodys"])
        .output()
        .expect("the bench starts");
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{words}");
    assert!(
        words.contains("nobodys") && words.contains("cached_pread"),
        "{words}"
    );
}

/// What the benches in Python make of their numbers, how they measure, and that they clean up.
#[test]
fn the_benches_in_python_count_right_and_clean_up() {
    if !possible() {
        return;
    }
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/python/bench_test.py");
    let output = Command::new("python3")
        .arg(program)
        .stdin(Stdio::null())
        .output()
        .expect("python3 (run deploy/setup test)");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    assert!(words.contains("Ran 8 tests"), "{words}");
}

#[test]
fn an_interrupted_bench_leaves_nothing() {
    if !possible() {
        return;
    }
    let output = output("interrupted");
    let arguments = ["--seconds", "60", "--peers", "tokio", "--loads", "requests"];
    let bench = start(env!("CARGO_BIN_EXE_bench-ports"), &arguments, &output);
    let pid = bench.id();
    let proxy = PathBuf::from(format!("/run/netns/bai-bench-{pid}-container"));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !proxy.exists() {
        assert!(Instant::now() < deadline, "the bench makes its namespaces");
        std::thread::sleep(Duration::from_millis(5));
    }
    let number = i32::try_from(pid).expect("a pid");
    kill(Pid::from_raw(number), Signal::SIGTERM).expect("signalled");
    let ended = bench.wait_with_output().expect("the bench ends");
    assert_eq!(ended.status.code(), Some(130));
    assert_eq!(left_behind(pid), Vec::<String>::new());
    std::fs::remove_dir_all(output).expect("removed");
}
