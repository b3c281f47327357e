//! A Docker engine of the bench's own, in the site's host namespace: its rules, bridge and
//! containers are nobody else's.
//!
//! In: a site. Out: containers started and removed, with engine bindings or without. Invariant:
//! the engine ends with its handle or with its site, and takes its containers along.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::site::{Group, Place, Site, done, until};

const IMAGE: &str = "bai-bench";

/// A running engine.
#[derive(Debug)]
pub struct Engine {
    socket: String,
    version: String,
}

fn directory(site: &Site) -> PathBuf {
    // Not on tmpfs: the engine keeps layers there.
    Path::new("/var/tmp").join(site.id())
}

fn pid_file(site: &Site) -> PathBuf {
    site.directory().join("dockerd.pid")
}

impl Engine {
    /// Starts it and gives it a tiny image.
    ///
    /// # Errors
    /// There is no dockerd, or it does not come up.
    pub fn start(site: &Site) -> Result<Self> {
        let top = directory(site);
        std::fs::create_dir_all(&top)?;
        let socket = format!("unix://{}/dockerd.sock", site.directory().display());
        let log = std::fs::File::create(top.join("log"))?;
        site.command(Some(Place::Host), Group::Server, "dockerd".as_ref())
            .args(["--host", &socket])
            .arg("--data-root")
            .arg(top.join("data"))
            .arg("--exec-root")
            .arg(site.directory().join("exec"))
            .arg("--pidfile")
            .arg(pid_file(site))
            // No mounts of layers: a bench that is killed leaves files only.
            .args(["--storage-driver", "vfs", "--shutdown-timeout", "1"])
            .args(["--bip", "10.78.9.1/24"])
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("dockerd cannot be started (run deploy/setup bench)")?;
        let mut engine = Self {
            socket,
            version: String::new(),
        };
        engine.version = until("an answer of the bench's dockerd", || {
            engine
                .docker(&["version", "--format", "{{.Server.Version}}"])
                .ok()
        })
        .with_context(|| {
            let log = std::fs::read_to_string(top.join("log")).unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(5).collect();
            format!("the last words of dockerd: {lines:?}")
        })?;
        engine.import()?;
        Ok(engine)
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// An image of one file, a static busybox.
    fn import(&self) -> Result<()> {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists())
            .context("busybox is missing: run deploy/setup bench")?;
        let mut tar = Command::new("tar")
            .args(["-c", "-h", "--transform", "s,.*,busybox,", "-P", busybox])
            .stdout(Stdio::piped())
            .spawn()?;
        let piped = tar.stdout.take().context("piped")?;
        let output = self
            .command(&["import", "-", IMAGE])
            .stdin(piped)
            .output()?;
        tar.wait()?;
        anyhow::ensure!(
            output.status.success(),
            "docker import: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(["--host", &self.socket]).args(words);
        command
    }

    fn docker(&self, words: &[&str]) -> Result<String> {
        done(&mut self.command(words)).map(|text| text.trim().to_owned())
    }

    /// Starts a container with these ports bound by the engine. Returns its id.
    ///
    /// # Errors
    /// The engine refuses.
    pub fn run(&self, ports: &[u16]) -> Result<String> {
        let bindings: Vec<String> = ports
            .iter()
            .map(|port| format!("0.0.0.0:{port}:80"))
            .collect();
        let mut words = vec!["run", "--detach"];
        for binding in &bindings {
            words.extend(["--publish", binding]);
        }
        words.extend([IMAGE, "/busybox", "httpd", "-f", "-p", "80"]);
        self.docker(&words)
    }

    /// The address of a container.
    ///
    /// # Errors
    /// It is gone.
    pub fn address(&self, id: &str) -> Result<IpAddr> {
        let format = "{{.NetworkSettings.IPAddress}}";
        Ok(self.docker(&["inspect", "--format", format, id])?.parse()?)
    }

    /// Kills and removes a container.
    ///
    /// # Errors
    /// The engine refuses.
    pub fn remove(&self, id: &str) -> Result<()> {
        self.docker(&["rm", "--force", "--volumes", id]).map(|_| ())
    }
}

/// Ends the engine of a site, if it has one, and removes what it kept.
pub fn end(site: &Site) {
    let pid = std::fs::read_to_string(pid_file(site))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    // The number may be another program's by now.
    let pid = pid.filter(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it.trim() == "dockerd")
    });
    if let Some(pid) = pid {
        // It kills its containers and their shims before it goes.
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(15);
        while pid_file(site).exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let Some(at) = line.split_whitespace().nth(1) else {
            continue;
        };
        let at = Path::new(at);
        if at.starts_with(directory(site)) || at.starts_with(site.directory()) {
            let _ = nix::mount::umount2(at, nix::mount::MntFlags::MNT_DETACH);
        }
    }
    let _ = std::fs::remove_dir_all(directory(site));
}
