//! The real agent in a cluster of a real etcd and a real Redis: it waits where it must and says so, registers, announces
//! itself, answers, goes on through outages, follows changes and says farewell.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use control::rpc::{Client, Value};
use harness::etcd::{EtcdOptions, EtcdServer};
use harness::node::{free_port, program};
use harness::redis::Redis;
use harness::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const LIMIT: Duration = Duration::from_secs(90);
const ID: &str = "i-cluster";

/// An agent without a dataplane, run as an operator would.
struct Agent {
    directory: tempfile::TempDir,
    run_directory: tempfile::TempDir,
    port: u16,
    child: Option<Child>,
}

impl Agent {
    fn new(etcd_section: &str) -> Result<Agent> {
        let directory = tempfile::tempdir()?;
        let run_directory = tempfile::tempdir_in("/dev/shm")?;
        let port = free_port()?;
        let first = harness::host_ports::adjacent(40)?;
        let place = directory.path().display();
        let text = format!(
            r#"{etcd_section}
[agent]
mode = "docker"
id = "{ID}"
scaling-group = "default" # ours
rpc-listen-addr = {{ host = "127.0.0.1", port = {port} }}
var-base-path = "{place}/state"
ipc-base-path = "{place}/ipc"
image-commit-path = "{place}/commit"
[container]
bind-host = "127.0.0.1"
port-range = [{first}, {last}]
scratch-type = "hostdir"
scratch-root = "{place}/scratches"
[resource]
reserved-cpu = 0
[debug]
heartbeat-interval = 0.5
[watcher]
service-addr = {{ host = "127.0.0.1", port = 6123 }}
[node]
run-dir = "{run}"
runner-dir = "{place}/no-runner"
"#,
            last = first + 39,
            run = run_directory.path().display(),
        );
        std::fs::write(directory.path().join("agent.toml"), text)?;
        Ok(Agent {
            directory,
            run_directory,
            port,
            child: None,
        })
    }

    fn file(&self) -> std::path::PathBuf {
        self.directory.path().join("agent.toml")
    }

    fn start(&mut self) -> Result<()> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.path().join("log"))?;
        let child = Command::new(program("bai-agent")?)
            .arg("run")
            .arg("--config")
            .arg(self.file())
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        Ok(())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    fn command(&self, args: &[&str]) -> Result<(Option<i32>, String)> {
        let output = Command::new(program("bai-agent")?)
            .args(args)
            .arg("--config")
            .arg(self.file())
            .output()?;
        let text =
            String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code(), text.into_owned()))
    }

    /// Waits until `status` says something.
    async fn says(&self, words: &[&str]) -> Result<String> {
        let mut last = String::new();
        let found = wait::until("the status says it", LIMIT, || {
            let said = self
                .command(&["status"])
                .map(|(_, text)| text)
                .unwrap_or_default();
            let all = words.iter().all(|word| said.contains(word));
            last.clone_from(&said);
            async move { all.then_some(said) }
        })
        .await;
        found.with_context(|| {
            format!(
                "wanted {words:?}; the status is\n{last}\nand the log\n{}",
                self.log()
            )
        })
    }

    async fn call(&self, method: &str, args: Vec<Value>) -> Result<Value> {
        let limit = Duration::from_secs(10);
        let client = Client::connect(&format!("127.0.0.1:{}", self.port), None, limit).await?;
        Ok(client
            .call(method, args, Vec::new(), Duration::from_secs(30))
            .await?)
    }

    async fn answers(&self) -> Result<()> {
        let text = || Value::Str("up".to_owned());
        wait::until("the agent answers", LIMIT, || async {
            self.call("ping", vec![text()]).await.ok()
        })
        .await
        .map(drop)
        .with_context(|| self.log())
    }

    fn stop(&mut self) -> Result<i32> {
        let mut child = self.child.take().context("it does not run")?;
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
        let ended =
            wait::until_blocking("the agent ends", LIMIT, || child.try_wait().ok().flatten());
        if ended.is_err() {
            let _ = child.kill();
        }
        ended?.code().context("it was killed")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Names on the stream, in order.
fn events(redis: &Redis) -> Vec<String> {
    let entries = redis.stream().unwrap_or_default();
    entries.iter().map(|entry| entry.text("name")).collect()
}

async fn put(etcd: &EtcdServer, key: &str, value: &str) -> Result<()> {
    let key = format!("/sorna/local/{key}");
    etcd.client().await?.put(key, value, None).await?;
    Ok(())
}

async fn own_keys(etcd: &EtcdServer) -> Vec<(String, String)> {
    let all = etcd.dump().await.unwrap_or_default();
    all.into_iter()
        .filter_map(|(key, value)| {
            let own = key.strip_prefix("/sorna/local/nodes/agents/")?;
            Some((own.to_owned(), value))
        })
        .collect()
}

async fn registered(etcd: &EtcdServer) -> Result<()> {
    let wanted = [
        ("", "running"),
        ("ip", "127.0.0.1"),
        ("watcher_port", "6123"),
    ]
    .map(|(key, value)| (format!("{ID}/{key}"), value.to_owned()));
    let last = std::cell::RefCell::new(Vec::new());
    wait::until("the keys stand", LIMIT, || async {
        let keys = own_keys(etcd).await;
        let stand = keys == wanted;
        last.replace(keys);
        stand.then_some(())
    })
    .await
    .with_context(|| format!("{:?}", last.borrow()))
}

fn docker() -> bool {
    Path::new("/var/run/docker.sock").exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_waits_joins_goes_on_and_leaves() -> Result<()> {
    ensure!(docker(), "Docker does not run; try tests/scripts/docker-up");
    let redis = Redis::start()?;
    let mut etcd = EtcdServer::start_with(EtcdOptions::default()).await?;
    etcd.stop(0);
    let mut agent = Agent::new(&etcd.section("local"))?;
    agent.start()?;

    // Nothing is there, and it says so; then one thing after the other comes.
    // Whoever stops it meanwhile has a stop, not a failure.
    agent.says(&["is starting", "waits for  etcd"]).await?;
    assert_eq!(agent.stop()?, 0, "{}", agent.log());
    agent.start()?;
    etcd.restart(0).await?;
    agent.says(&["waits for  a manager"]).await?;
    assert_eq!(agent.stop()?, 0, "{}", agent.log());
    agent.start()?;
    agent.says(&["waits for  a manager"]).await?;
    assert_eq!(
        own_keys(&etcd).await,
        [(format!("{ID}/"), "starting".to_owned())]
    );
    assert!(agent.call("ping", vec![Value::Nil]).await.is_err());
    put(&etcd, "nodes/manager/m1", "up").await?;
    agent
        .says(&["waits for  settings in etcd", "config/redis"])
        .await?;
    put(&etcd, "config/container/kernel-uid", "1234").await?;
    put(
        &etcd,
        "sgroup/default/config/agent/api/pull-timeout",
        "77.0",
    )
    .await?;
    put(
        &etcd,
        "config/redis/addr",
        &format!("127.0.0.1:{}", redis.port),
    )
    .await?;
    agent.answers().await?;
    registered(&etcd).await?;
    let said = agent
        .says(&[
            "(manager)",
            "etcd       answers",
            "registered in default, 1 managers",
            "bus        connected",
        ])
        .await?;
    assert!(!said.contains("settings "), "{said}");
    wait::until("it is announced", LIMIT, || async {
        (events(&redis)
            .iter()
            .filter(|name| *name == "agent_heartbeat")
            .count()
            > 2)
        .then_some(())
    })
    .await?;
    let order = events(&redis);
    assert_eq!(order[0], "agent_started", "{order:?}");
    assert!(
        order[..3].contains(&"agent_heartbeat".to_owned()),
        "{order:?}"
    );
    assert!(
        order[..3].contains(&"agent_status_heartbeat".to_owned()),
        "{order:?}"
    );

    // What etcd sets counts, and its origin is shown.
    let (code, shown) = agent.command(&["check-config", "--with-etcd"])?;
    assert_eq!(code, Some(0), "{shown}");
    for words in [
        "etcd config/container/kernel-uid (global)",
        "etcd config/agent/api/pull-timeout (scaling group)",
    ] {
        assert!(shown.contains(words), "{shown}");
    }

    // The manager moves the node to another resource group: file, etcd scope and heartbeat follow.
    agent
        .call("update_scaling_group", vec![Value::Str("gpu".to_owned())])
        .await?;
    let text = std::fs::read_to_string(agent.file())?;
    assert!(text.contains("scaling-group = \"gpu\" # ours"), "{text}");
    wait::until("a heartbeat tells the group", LIMIT, || async {
        let entries = redis.stream().ok()?;
        let last = entries
            .iter()
            .rev()
            .find(|entry| entry.text("name") == "agent_heartbeat")?;
        let args = last.bytes("args");
        args.windows(4)
            .any(|bytes| bytes == b"\xa3gpu")
            .then_some(())
    })
    .await?;
    agent
        .says(&[
            "registered in gpu",
            "settings   config/agent changed in etcd",
        ])
        .await?;

    // Without etcd the node goes on.
    etcd.stop(0);
    let said = agent.says(&["etcd       away for"]).await?;
    assert!(said.contains("bus        connected"), "{said}");
    agent.answers().await?;
    let newest = || {
        let mut client = redis.client().ok()?;
        client.ask(&["SELECT", "4"]).ok()?;
        let entries = client
            .ask(&["XREVRANGE", "events", "+", "-", "COUNT", "1"])
            .ok()?;
        entries.item(0).ok()?.item(0).ok()?.text().ok()
    };
    let before = newest();
    wait::until("heartbeats go on", LIMIT, || async {
        (newest() != before).then_some(())
    })
    .await?;
    // It comes back with nothing of what it had: the node registers again.
    etcd.wipe(0)?;
    etcd.restart(0).await?;
    registered(&etcd).await?;
    agent
        .says(&["etcd       answers", "registered in gpu, 0 managers"])
        .await?;

    // Farewell: the last word is the farewell, and the keys stay as the original leaves them.
    assert_eq!(agent.stop()?, 0, "{}", agent.log());
    let order = events(&redis);
    assert_eq!(
        order.last().map(String::as_str),
        Some("agent_terminated"),
        "{order:?}"
    );
    registered(&etcd).await?;
    drop(agent.run_directory.path().read_dir()?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_log_in_ends_the_start_with_what_to_do() -> Result<()> {
    let etcd = EtcdServer::start().await?;
    let mut admin = etcd.client().await?;
    admin.user_add("root", "right", None).await?;
    admin.role_add("root").await?;
    admin.user_grant_role("root", "root").await?;
    admin.auth_enable().await?;
    let section = format!(
        "{}user = \"root\"\npassword = \"hunter2\"\n",
        etcd.section("local")
    );
    let mut agent = Agent::new(&section)?;
    agent.start()?;
    let mut child = agent.child.take().unwrap();
    let ended = wait::until_blocking("the agent ends", LIMIT, || child.try_wait().ok().flatten())?;
    let log = agent.log();
    assert_eq!(ended.code(), Some(78), "{log}");
    assert!(
        log.contains("etcd.password") && !log.contains("hunter2"),
        "{log}"
    );
    Ok(())
}
