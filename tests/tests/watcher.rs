//! The watcher as managers call it, with a systemctl that writes down what it is asked for.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::etcd::EtcdServer;
use harness::node::{free_port, program};
use harness::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TOKEN: &str = "the-token-of-the-watcher";
const PATIENCE: Duration = Duration::from_secs(60);

/// What `systemctl` and `shutdown` do here: note the call, then as `behaviour` says.
const STAND_IN: &str = r#"#!/bin/sh
here=$(dirname "$0")
echo "$(basename "$0") $*" >>"$here/calls"
[ ! -e "$here/behaviour" ] || . "$here/behaviour"
case $1 in is-active) echo active ;; esac
exit 0
"#;

/// A watcher without a cluster.
struct Watcher {
    directory: TempDir,
    port: u16,
    child: Child,
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Configuration, token and stand-ins in a directory.
fn prepare(port: u16, host: &str, token: &str, sections: &str) -> Result<TempDir> {
    let directory = tempfile::tempdir()?;
    let place = directory.path();
    let write = |name: &str, text: &str, mode: u32| -> Result<()> {
        let path = place.join(name);
        std::fs::write(&path, text)?;
        Ok(std::fs::set_permissions(
            path,
            std::fs::Permissions::from_mode(mode),
        )?)
    };
    std::fs::create_dir(place.join("bin"))?;
    write("bin/systemctl", STAND_IN, 0o755)?;
    write("bin/shutdown", STAND_IN, 0o755)?;
    write("token", token, 0o600)?;
    write("fstab", "# a comment\n", 0o644)?;
    write("source", "", 0o644)?;
    let here = place.display();
    let text = format!(
        "[agent]\nmode = \"docker\"\nvar-base-path = \"{here}/state\"\nipc-base-path = \"{here}/ipc\"\n\
         [container]\nscratch-type = \"hostdir\"\nscratch-root = \"{here}/scratches\"\n\
         [watcher]\nservice-addr = {{ host = \"{host}\", port = {port} }}\ntarget-service = \"bai-test@1.service\"\n\
         {sections}\n[node.watcher]\ntoken-file = \"{here}/token\"\ntimeout = \"2s\"\n"
    );
    write("agent.toml", &text, 0o600)?;
    Ok(directory)
}

fn command(directory: &Path) -> Result<Command> {
    let mut command = command_in_a_cluster(directory)?;
    command.arg("--standalone");
    Ok(command)
}

fn command_in_a_cluster(directory: &Path) -> Result<Command> {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program("bai-agent")?);
    command
        .args(["watcher", "--config"])
        .arg(directory.join("agent.toml"))
        .env(
            "PATH",
            format!("{}:{path}", directory.join("bin").display()),
        )
        .stdin(Stdio::null());
    Ok(command)
}

/// Status, head and body.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| self.body.clone())
    }
}

impl Watcher {
    async fn start(sections: &str, more: &str) -> Result<Watcher> {
        let port = free_port()?;
        let directory = prepare(port, "127.0.0.1", TOKEN, sections)?;
        let file = directory.path().join("agent.toml");
        let text = std::fs::read_to_string(&file)? + more;
        std::fs::write(&file, text)?;
        let command = command(directory.path())?;
        Watcher::run(command, directory, port).await
    }

    /// Runs a command that was made for `directory`, until it listens.
    async fn run(mut command: Command, directory: TempDir, port: u16) -> Result<Watcher> {
        let log = std::fs::File::create(directory.path().join("log"))?;
        let child = command
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("{command:?} can't be started"))?;
        let watcher = Watcher {
            directory,
            port,
            child,
        };
        wait::until("the watcher listens", PATIENCE, || async {
            TcpStream::connect(("127.0.0.1", port)).await.ok()
        })
        .await
        .with_context(|| watcher.log())?;
        Ok(watcher)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.file("log")).unwrap_or_default()
    }

    /// What was called since the last look.
    fn calls(&self) -> Vec<String> {
        let path = self.file("bin/calls");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let _ = std::fs::remove_file(path);
        text.lines().map(str::to_owned).collect()
    }

    fn behave(&self, script: &str) -> Result<()> {
        Ok(std::fs::write(self.file("bin/behaviour"), script)?)
    }

    async fn ask(&self, method: &str, path: &str, token: &str, body: &str) -> Result<Answer> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).await?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: node\r\nX-BackendAI-Watcher-Token: {token}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await?;
        let mut reply = Vec::new();
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut reply)).await??;
        let reply = String::from_utf8(reply)?;
        let (head, body) = reply.split_once("\r\n\r\n").context("no end of the head")?;
        let status = head.split(' ').nth(1).context("a status")?.parse()?;
        ensure!(
            head.to_lowercase()
                .contains("server: backendai-agentwatcher"),
            "{head}"
        );
        Ok(Answer {
            status,
            head: head.to_lowercase(),
            body: body.to_owned(),
        })
    }

    async fn get(&self, path: &str) -> Result<Answer> {
        self.ask("GET", path, TOKEN, "").await
    }

    async fn post(&self, path: &str) -> Result<Answer> {
        self.ask("POST", path, TOKEN, "").await
    }
}

#[tokio::test]
async fn each_route_calls_systemctl_as_the_original_s_does() -> Result<()> {
    let watcher = Watcher::start("", "").await?;
    let state = watcher.get("/").await?;
    assert_eq!(state.status, 200);
    assert!(
        state.head.contains("content-type: application/json"),
        "{}",
        state.head
    );
    assert_eq!(
        state.json()?,
        json!({"agent-status": "active", "watcher-status": "active"})
    );
    assert_eq!(
        watcher.calls(),
        ["systemctl is-active -- bai-test@1.service"]
    );
    let call = |verb: &str, unit: &str| format!("systemctl --no-ask-password {verb} -- {unit}");
    let unit = "bai-test@1.service";
    for (path, calls) in [
        ("/agent/start", vec![call("start", unit)]),
        ("/agent/stop", vec![call("stop", unit)]),
        ("/agent/restart", vec![call("restart", unit)]),
        (
            "/hard-reset",
            vec![
                call("stop", unit),
                call("restart", "docker.service"),
                call("start", unit),
            ],
        ),
    ] {
        let answer = watcher.post(path).await?;
        assert_eq!(
            (answer.status, answer.json()?),
            (200, json!({"result": "ok"}))
        );
        assert_eq!(watcher.calls(), calls);
        assert_eq!(watcher.get(path).await?.status, 405);
    }
    // As when a terminal is closed: it goes on.
    let pid = Pid::from_raw(i32::try_from(watcher.child.id())?);
    kill(pid, Signal::SIGHUP)?;
    wait::until("it tells of SIGHUP", PATIENCE, || async {
        let told = "the configuration is read at start only";
        watcher.log().contains(told).then_some(())
    })
    .await?;
    // Off unless configured.
    for path in ["/soft-reset", "/shutdown", "/nothing"] {
        assert_eq!(watcher.post(path).await?.status, 404, "{path}");
    }
    // Nobody without the token learns what there is.
    for (path, token) in [
        ("/", ""),
        ("/", "the-token-of-the-watche"),
        ("/agent/stop", "insecure"),
        ("/nothing", "x"),
        ("/fstab", "x"),
    ] {
        let answer = watcher.ask("GET", path, token, "").await?;
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (403, "403: Forbidden")
        );
        assert_eq!(watcher.ask("POST", path, token, "").await?.status, 403);
    }
    assert_eq!(watcher.calls(), [""; 0]);
    let log = watcher.log();
    assert!(!log.contains(TOKEN), "{log}");
    Ok(())
}

#[tokio::test]
async fn failures_of_systemctl_are_told() -> Result<()> {
    let watcher = Watcher::start("", "").await?;
    watcher.behave(
        "case $2 in start|stop) echo 'Unit bai-test@1.service not found.' >&2; exit 5 ;; esac",
    )?;
    let answer = watcher.post("/agent/start").await?;
    assert_eq!(answer.status, 500);
    assert_eq!(
        answer.body,
        "systemctl start bai-test@1.service failed (exit 5): Unit bai-test@1.service not found."
    );
    watcher.calls();
    // The agent is started again although the reset has failed, and the failure is told.
    let answer = watcher.post("/hard-reset").await?;
    assert_eq!(answer.status, 500);
    assert!(answer.body.contains("stop"), "{}", answer.body);
    assert_eq!(watcher.calls().len(), 2);
    // Inactive is an answer, although systemctl ends with 3.
    watcher.behave("echo inactive; exit 3")?;
    assert_eq!(watcher.get("/").await?.json()?["agent-status"], "inactive");
    // It hangs: killed in time; meanwhile nobody else may act, and the state is still told.
    watcher.behave("case $1 in is-active) ;; *) exec sleep 600 ;; esac")?;
    watcher.calls();
    let (slow, _) = tokio::join!(watcher.post("/agent/restart"), async {
        // Not before the first has begun, or this one hangs in its place.
        let begun = wait::until("it has begun", PATIENCE, || async {
            (!watcher.calls().is_empty()).then_some(())
        });
        assert!(begun.await.is_ok());
        let busy = watcher.post("/agent/stop").await;
        assert_eq!(busy.map(|it| it.status).ok(), Some(409));
        assert_eq!(watcher.get("/").await.map(|it| it.status).ok(), Some(200));
    });
    let slow = slow?;
    assert_eq!(slow.status, 500);
    assert!(
        slow.body.contains("did not end within 2 s"),
        "{}",
        slow.body
    );
    // There is none at all.
    std::fs::remove_file(watcher.file("bin/systemctl"))?;
    if Command::new("systemctl").arg("--version").output().is_err() {
        let message = json!({"message": "Agent is not loaded with systemctl."});
        let state = watcher.get("/").await?;
        assert_eq!((state.status, state.json()?), (200, message.clone()));
        let action = watcher.post("/agent/start").await?;
        assert_eq!((action.status, action.json()?), (503, message));
    }
    Ok(())
}

#[tokio::test]
async fn resets_and_shutdowns_are_there_when_they_are_configured() -> Result<()> {
    let mut watcher = Watcher::start("soft-reset-available = true", "shutdown = true\n").await?;
    assert_eq!(watcher.post("/soft-reset").await?.status, 200);
    assert_eq!(
        watcher.calls(),
        ["systemctl --no-ask-password restart -- bai-test@1.service"]
    );
    assert_eq!(
        watcher.post("/shutdown").await?.json()?,
        json!({"result": "ok"})
    );
    let ended = wait::until("the watcher ends", PATIENCE, || {
        let ended = watcher.child.try_wait().ok().flatten();
        async move { ended }
    })
    .await?;
    assert!(ended.success(), "{}", watcher.log());
    assert_eq!(
        watcher.calls(),
        [
            "systemctl --no-ask-password stop -- bai-test@1.service",
            "shutdown -h now"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn tables_are_read_and_volumes_mounted_only_as_allowed() -> Result<()> {
    let watcher = Watcher::start("", "").await?;
    let here = watcher.directory.path().display().to_string();
    // Neither is in the configuration.
    for path in [format!("{here}/fstab"), "/etc/shadow".to_owned()] {
        let answer = watcher
            .get(&format!("/fstab?fstab_path={path}&agent_id=x"))
            .await?;
        assert_eq!(answer.status, 500);
        assert!(
            answer.body.contains("node.volumes.fstab"),
            "{}",
            answer.body
        );
    }
    assert_eq!(watcher.get("/mounts").await?.status, 200);
    for (method, body, status, words) in [
        ("POST", "{}", 400, "missing field"),
        ("POST", "nonsense", 400, "cannot be read"),
        (
            "POST",
            r#"{"name": "../etc", "fs_type": "nfs", "fs_location": "h:/x", "options": null, "edit_fstab": false, "fstab_path": null}"#,
            500,
            "volume name",
        ),
        (
            "POST",
            r#"{"name": "x", "fs_type": "nfs", "fs_location": "h:/x", "options": null, "edit_fstab": false, "fstab_path": null, "scaling_group": "default"}"#,
            500,
            "node.volumes.allow",
        ),
        ("DELETE", "{}", 400, "missing field"),
    ] {
        let answer = watcher.ask(method, "/mounts", TOKEN, body).await?;
        assert_eq!(answer.status, status, "{method} {body}: {}", answer.body);
        assert!(answer.body.contains(words), "{}", answer.body);
    }
    let long = format!("{{\"name\": \"{}\"}}", "x".repeat(100_000));
    assert_eq!(
        watcher.ask("POST", "/mounts", TOKEN, &long).await?.status,
        413
    );
    Ok(())
}

#[tokio::test]
async fn a_volume_is_mounted_listed_noted_and_unmounted() -> Result<()> {
    let port = free_port()?;
    let directory = prepare(port, "127.0.0.1", TOKEN, "")?;
    let plain = command(directory.path())?;
    mount_list_and_unmount(directory, port, plain, "/mnt").await
}

#[tokio::test]
async fn etcd_tells_the_token_and_where_volumes_are_mounted() -> Result<()> {
    let etcd = EtcdServer::start().await?;
    let mut client = etcd.client().await?;
    for (key, value) in [
        ("config/watcher/token", TOKEN),
        ("volumes/_mount", "/mnt/of-the-cluster"),
    ] {
        client
            .put(format!("/sorna/local/{key}"), value, None)
            .await?;
    }
    let port = free_port()?;
    let directory = prepare(port, "127.0.0.1", "", "")?;
    let file = directory.path().join("agent.toml");
    let text = std::fs::read_to_string(&file)?;
    let own = format!("token-file = \"{}/token\"\n", directory.path().display());
    ensure!(text.contains(&own), "{text}");
    std::fs::write(&file, etcd.section("local") + &text.replace(&own, ""))?;
    let plain = command_in_a_cluster(directory.path())?;
    mount_list_and_unmount(directory, port, plain, "/mnt/of-the-cluster").await
}

#[tokio::test]
async fn a_cluster_that_says_nonsense_of_where_volumes_belong_keeps_mounts_only() -> Result<()> {
    let etcd = EtcdServer::start().await?;
    let mut client = etcd.client().await?;
    const KEY: &str = "/sorna/local/volumes/_mount";
    client.put(KEY, "mnt/../volumes", None).await?;
    let port = free_port()?;
    let directory = prepare(port, "127.0.0.1", TOKEN, "")?;
    let file = directory.path().join("agent.toml");
    let text = std::fs::read_to_string(&file)?;
    std::fs::write(
        &file,
        etcd.section("local") + &text + "[node.volumes]\nallow = [\"tmpfs bai-test\"]\n",
    )?;
    let command = command_in_a_cluster(directory.path())?;
    let watcher = Watcher::run(command, directory, port).await?;
    assert_eq!(watcher.get("/").await?.status, 200);
    assert_eq!(watcher.post("/agent/restart").await?.status, 200);
    let body = json!({"name": "vol", "fs_type": "tmpfs", "fs_location": "bai-test"}).to_string();
    for (method, body) in [("GET", ""), ("POST", &*body), ("DELETE", &*body)] {
        let answer = watcher.ask(method, "/mounts", TOKEN, body).await?;
        assert_eq!(answer.status, 500, "{method}: {}", answer.body);
        assert_eq!(
            answer.body,
            "volumes/_mount of etcd is \"mnt/../volumes\"; write an absolute path without '..', such as \"/mnt\", or remove the key",
            "{method}"
        );
    }
    // Put right, it holds from the next request on.
    let here = watcher.directory.path().display().to_string();
    client.put(KEY, here, None).await?;
    assert_eq!(watcher.get("/mounts").await?.json()?, json!([]));
    Ok(())
}

/// As after an installation while etcd is away: nobody should wait for the unit.
#[tokio::test]
async fn with_a_token_of_its_own_it_is_ready_without_etcd() -> Result<()> {
    let port = free_port()?;
    let directory = prepare(port, "127.0.0.1", TOKEN, "")?;
    let file = directory.path().join("agent.toml");
    let etcd = format!(
        "[etcd]\nnamespace = \"local\"\naddr = {{ host = \"127.0.0.1\", port = {} }}\n",
        free_port()?
    );
    std::fs::write(&file, etcd + &std::fs::read_to_string(&file)?)?;
    let command = command_in_a_cluster(directory.path())?;
    let watcher = Watcher::run(command, directory, port).await?;
    assert_eq!(watcher.get("/").await?.status, 200);
    assert_eq!(watcher.post("/agent/restart").await?.status, 200);
    Ok(())
}

/// Below `/mnt` of a mount name space of its own, so that nothing of the machine changes.
async fn mount_list_and_unmount(
    directory: TempDir,
    port: u16,
    plain: Command,
    prefix: &str,
) -> Result<()> {
    let here = directory.path();
    let table = here.join("fstab");
    let file = here.join("agent.toml");
    let text = std::fs::read_to_string(&file)?
        + &format!(
            "[node.volumes]\nallow = [\"tmpfs bai-test\"]\nfstab = [\"{}\"]\n",
            table.display()
        );
    std::fs::write(&file, text)?;
    let mut inside = Command::new("unshare");
    inside
        .args([
            "--mount",
            "--",
            "sh",
            "-c",
            "mount -t tmpfs none /mnt && exec \"$@\"",
            "sh",
        ])
        .arg(plain.get_program())
        .args(plain.get_args())
        .envs(
            plain
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .stdin(Stdio::null());
    let watcher = Watcher::run(inside, directory, port).await?;
    let body = json!({"name": "vol", "fs_type": "tmpfs", "fs_location": "bai-test", "options": "size=1m", "edit_fstab": true,
        "fstab_path": table, "scaling_group": "default"});
    let mounted = watcher
        .ask("POST", "/mounts", TOKEN, &body.to_string())
        .await?;
    assert_eq!((mounted.status, mounted.body.as_str()), (200, ""));
    assert_eq!(
        watcher.get("/mounts").await?.json()?,
        json!([format!("{prefix}/vol")])
    );
    let noted = watcher
        .get(&format!("/fstab?fstab_path={}", table.display()))
        .await?;
    assert_eq!(
        noted.body,
        format!("# a comment\nbai-test {prefix}/vol tmpfs size=1m 0 0\n")
    );
    assert!(
        noted.head.contains("content-type: text/plain"),
        "{}",
        noted.head
    );
    let gone = watcher
        .ask("DELETE", "/mounts", TOKEN, &body.to_string())
        .await?;
    assert_eq!((gone.status, gone.body.as_str()), (200, ""));
    assert_eq!(watcher.get("/mounts").await?.json()?, json!([]));
    assert_eq!(std::fs::read_to_string(&table)?, "# a comment\n");
    Ok(())
}

/// The file of a node that ran the Python agent has the name of its unit.
#[tokio::test]
async fn it_does_not_drive_the_python_agent() -> Result<()> {
    let port = free_port()?;
    let directory = prepare(port, "127.0.0.1", TOKEN, "")?;
    let place = directory.path();
    let file = place.join("agent.toml");
    let text = std::fs::read_to_string(&file)?;
    std::fs::write(
        &file,
        text.replace("bai-test@1.service", "backendai-agent.service"),
    )?;
    let starts = |program: &str| {
        let behaviour = format!("case $1 in show) echo '{program}' ;; esac\n");
        std::fs::write(place.join("bin/behaviour"), behaviour)
    };
    starts("{ path=/opt/venv/bin/python ; argv[]=python -m ai.backend.cli ag start-server ; }")?;
    let refused = command(place)?.output()?;
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{told}");
    assert!(
        told.contains("target-service = \"bai-agent.service\""),
        "{told}"
    );
    // Whoever calls this agent's unit so.
    starts("{ path=/usr/bin/bai-agent ; argv[]=/usr/bin/bai-agent run ; }")?;
    let command = command(place)?;
    let watcher = Watcher::run(command, directory, port).await?;
    assert_eq!(watcher.get("/").await?.status, 200);
    Ok(())
}

#[test]
fn it_does_not_obey_everybody() -> Result<()> {
    // The token everybody knows, on an address others reach.
    let directory = prepare(free_port()?, "0.0.0.0", "insecure", "")?;
    let refused = command(directory.path())?.output()?;
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(78), "{told}");
    assert!(told.contains("config/watcher/token"), "{told}");
    // A token that others may read.
    let token = directory.path().join("token");
    std::fs::set_permissions(token, std::fs::Permissions::from_mode(0o644))?;
    let refused = command(directory.path())?.output()?;
    assert_eq!(refused.status.code(), Some(78));
    // On the loopback address, or when it is asked for, it runs.
    for (host, more) in [("127.0.0.1", ""), ("0.0.0.0", "insecure-token = true\n")] {
        let port = free_port()?;
        let directory = prepare(port, host, "insecure", "")?;
        let file = directory.path().join("agent.toml");
        std::fs::write(&file, std::fs::read_to_string(&file)? + more)?;
        let mut child = command(directory.path())?.stderr(Stdio::null()).spawn()?;
        let listens = wait::until_blocking("it listens", PATIENCE, || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGTERM)?;
        let ended = child.wait()?;
        listens?;
        assert!(ended.success());
    }
    Ok(())
}
