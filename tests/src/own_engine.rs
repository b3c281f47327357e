//! A Docker engine of a test's own, which it may stop, kill and suspend without anybody else noticing.
//!
//! Out: its address. Invariants: the machine's own engine and its bridge are not touched; the engine,
//! what runs in it and its bridge end with this value.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::{images, wait};

const STARTED: Duration = Duration::from_secs(90);

/// The engine.
#[derive(Debug)]
pub struct OwnEngine {
    directory: TempDir,
    bridge: String,
    daemon: Option<Child>,
}

impl OwnEngine {
    /// Starts it, with live-restore; `None` (with the reason printed as a skip) where that is not possible.
    pub fn start() -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            crate::skip::needs("an engine of its own needs root");
            return Ok(None);
        }
        let directory = tempfile::Builder::new().prefix("bai-engine-").tempdir()?;
        let name = uuid::Uuid::new_v4().simple().to_string();
        let bridge = format!("baie{}", &name[..8]);
        let mut engine = Self {
            directory,
            bridge,
            daemon: None,
        };
        ip(&["link", "add", &engine.bridge, "type", "bridge"])?;
        engine.take_network()?;
        engine.resume()?;
        Ok(Some(engine))
    }

    /// Gives the bridge a network that nobody else has, of the addresses for measurements between
    /// networks (RFC 2544): no engine takes them by itself.
    fn take_network(&self) -> Result<()> {
        let first = uuid::Uuid::new_v4().as_bytes()[0];
        for step in 0..=255 {
            let net = format!("198.19.{}.1/24", first.wrapping_add(step));
            ip(&["addr", "add", &net, "dev", &self.bridge])?;
            let taken = Command::new("ip").args(["-4", "-o", "addr"]).output()?;
            // Another test may have taken it just now, and leaves it then as this one does.
            if String::from_utf8_lossy(&taken.stdout).matches(&net).count() == 1 {
                return Ok(());
            }
            ip(&["addr", "delete", &net, "dev", &self.bridge])?;
        }
        bail!("no network is free")
    }

    fn place(&self) -> &Path {
        self.directory.path()
    }

    /// Its address, as `DOCKER_HOST` has it.
    pub fn host(&self) -> String {
        format!("unix://{}/docker.sock", self.place().display())
    }

    /// The docker client of this engine; its output.
    pub fn docker(&self, args: &[&str]) -> Result<String> {
        let output = images::docker(Some(&self.host())).args(args).output()?;
        ensure!(
            output.status.success(),
            "docker {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts it again; answers when it answers.
    pub fn resume(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "the engine runs already");
        let place = self.place();
        let log = File::options()
            .create(true)
            .append(true)
            .open(place.join("engine.log"))?;
        // One that was killed leaves it, and its number may be another's by now.
        let _ = std::fs::remove_file(place.join("docker.pid"));
        let daemon = Command::new("dockerd")
            .args(["--host", &self.host(), "--bridge", &self.bridge])
            .arg("--data-root")
            .arg(place.join("data"))
            .arg("--exec-root")
            .arg(place.join("exec"))
            .arg("--pidfile")
            .arg(place.join("docker.pid"))
            .args(["--live-restore", "--iptables=false", "--ip6tables=false"])
            .args(["--ip-masq=false", "--ip-forward=false"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("dockerd can't be started")?;
        self.daemon = Some(daemon);
        let answers = wait::until_blocking("the engine answers", STARTED, || {
            self.docker(&["version"]).ok().map(drop)
        });
        answers.with_context(|| {
            let log = std::fs::read_to_string(self.place().join("engine.log"));
            let log = log.unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(5).collect();
            format!("the engine's last words: {last:#?}")
        })
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let daemon = self.daemon.as_ref().context("the engine is down")?;
        let pid = i32::try_from(daemon.id()).context("a pid is an i32")?;
        Ok(kill(Pid::from_raw(pid), signal)?)
    }

    /// Ends the daemon; what runs in it goes on.
    pub fn end(&mut self, signal: Signal) -> Result<()> {
        self.signal(signal)?;
        let mut daemon = self.daemon.take().context("the engine is down")?;
        let ended = wait::until_blocking("the engine ends", Duration::from_secs(60), || {
            daemon.try_wait().ok().flatten()
        });
        if ended.is_err() {
            daemon.kill()?;
            daemon.wait()?;
        }
        self.end_containerd()?;
        ended.map(drop)
    }

    /// A killed daemon leaves its containerd, whose socket the next one would wait for.
    fn end_containerd(&self) -> Result<()> {
        let file = self.place().join("exec/containerd/containerd.pid");
        let Ok(text) = std::fs::read_to_string(&file) else {
            return Ok(());
        };
        let pid: i32 = text.trim().parse()?;
        let is_ours = || {
            let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
            command.contains(self.place().to_str()?).then_some(())
        };
        if is_ours().is_some() {
            // It may end meanwhile.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            wait::until_blocking("containerd ends", Duration::from_secs(30), || {
                is_ours().is_none().then_some(())
            })?;
        }
        let _ = std::fs::remove_file(file);
        Ok(())
    }

    /// Ends the daemon and starts it again, as an update of its package does.
    pub fn restart(&mut self) -> Result<()> {
        self.end(Signal::SIGTERM)?;
        self.resume()
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output()?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {args:?}: {words}");
    Ok(())
}

impl Drop for OwnEngine {
    fn drop(&mut self) {
        let _ = self.signal(Signal::SIGCONT);
        if self.daemon.is_none() {
            let _ = self.resume();
        }
        if let Ok(all) = self.docker(&["ps", "-aq"]) {
            for container in all.lines() {
                let _ = self.docker(&["rm", "-f", container]);
            }
        }
        if let Err(err) = self.end(Signal::SIGTERM) {
            eprintln!("the engine of the test does not end: {err}");
        }
        let _ = ip(&["link", "delete", &self.bridge]);
        // What a killed daemon has left mounted would keep its files.
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let points = mounts
            .lines()
            .rev()
            .filter_map(|line| line.split(' ').nth(1));
        for point in points.filter(|point| Path::new(point).starts_with(self.place())) {
            let _ = nix::mount::umount2(point, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
