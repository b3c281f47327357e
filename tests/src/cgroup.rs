//! Cgroups of a test's own, on every hierarchy of the host.
//!
//! In: a name. Out: directories, processes put into them, the kernel's own numbers as the oracle.
//! Invariant: whatever was made is removed with the handle, its processes killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A cgroup of one name in all mounted hierarchies.
#[derive(Debug)]
pub struct TestCgroup {
    /// Its path below each root.
    pub path: String,
    directories: Vec<(String, PathBuf)>,
    children: Vec<Child>,
}

/// The mounted hierarchies: controllers (`""` for the unified one) and place.
fn hierarchies() -> Result<Vec<(String, PathBuf)>> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let mut found = Vec::new();
    for line in mounts.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, place, kind, options, ..] = fields[..] else {
            continue;
        };
        match kind {
            "cgroup" => found.push((options.to_owned(), PathBuf::from(place))),
            "cgroup2" => found.push((String::new(), PathBuf::from(place))),
            _ => {}
        }
    }
    Ok(found)
}

/// Why nobody makes cgroups here; `None` where root can, so that failing to is a failure.
pub fn nobody_makes_them() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("this takes root".to_owned());
    }
    let mounted = match hierarchies() {
        Ok(mounted) => mounted,
        Err(err) => return Some(format!("mounts can't be read: {err:#}")),
    };
    let is_writable = |place: &Path| {
        let flags = nix::sys::statvfs::statvfs(place).map(|it| it.flags());
        flags.is_ok_and(|flags| !flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
    };
    let closed = mounted.iter().find(|(_, place)| !is_writable(place));
    match (mounted.is_empty(), closed) {
        (true, _) => Some("no cgroup hierarchy is mounted".to_owned()),
        (_, Some((_, place))) => Some(format!("{} is read-only", place.display())),
        (false, None) => None,
    }
}

impl TestCgroup {
    /// Makes it. `Ok(None)` when this host lets nobody make cgroups (not root, or read-only).
    pub fn new(name: &str) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            crate::skip::needs("making cgroups needs root");
            return Ok(None);
        }
        let path = format!("bai-test-{}/{name}", std::process::id());
        let mut made = Self {
            path: path.clone(),
            directories: Vec::new(),
            children: Vec::new(),
        };
        for (controllers, root) in hierarchies()? {
            let directory = root.join(&path);
            if controllers.split(',').any(|it| it == "cpuset") {
                continue;
            }
            if controllers.is_empty() {
                // Controllers reach a child only when every parent hands them down.
                let parent = root.join(path.split('/').next().unwrap_or_default());
                std::fs::create_dir_all(&parent)?;
                for place in [&root, &parent] {
                    for controller in ["cpu", "memory", "pids", "io"] {
                        let _ = std::fs::write(
                            place.join("cgroup.subtree_control"),
                            format!("+{controller}"),
                        );
                    }
                }
            }
            std::fs::create_dir_all(&directory)
                .with_context(|| format!("making {}", directory.display()))?;
            made.directories.push((controllers, directory));
        }
        if made.directories.is_empty() {
            bail!("no cgroup hierarchy is mounted");
        }
        Ok(Some(made))
    }

    /// The directory in which a file of this name is found.
    pub fn directory_with(&self, file: &str) -> Option<&Path> {
        self.directories
            .iter()
            .map(|(_, directory)| directory.as_path())
            .find(|directory| directory.join(file).exists())
    }

    /// Its directory in each hierarchy.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.directories
            .iter()
            .map(|(_, directory)| directory.as_path())
    }

    /// The text of the first file of these names that exists.
    pub fn read(&self, files: &[&str]) -> Option<String> {
        files
            .iter()
            .find_map(|file| std::fs::read_to_string(self.directory_with(file)?.join(file)).ok())
    }

    /// A number in a file: the whole text, or what follows `key`.
    pub fn number(&self, file: &str, key: Option<&str>) -> Option<u64> {
        let text = self.read(&[file])?;
        match key {
            None => text.trim().parse().ok(),
            Some(key) => text.lines().find_map(|line| {
                let (word, value) = line.split_once(' ')?;
                (word == key).then(|| value.trim().parse().ok()).flatten()
            }),
        }
    }

    /// CPU time in ns, by whichever version counts it.
    pub fn cpu_ns(&self) -> Option<u64> {
        self.number("cpuacct.usage", None).or_else(|| {
            self.number("cpu.stat", Some("usage_usec"))
                .map(|us| us * 1000)
        })
    }

    /// Runs a shell command inside. It starts working only after it was put in.
    pub fn run(&mut self, script: &str) -> Result<u32> {
        let enter: String = self
            .directories
            .iter()
            .map(|(_, directory)| format!("echo $$ > {}/cgroup.procs && ", directory.display()))
            .collect();
        let child = Command::new("sh")
            .args(["-c", &format!("{enter}{script}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()?;
        let pid = child.id();
        self.children.push(child);
        Ok(pid)
    }

    /// Waits for what was run last.
    pub fn finish(&mut self) -> Result<()> {
        if let Some(mut child) = self.children.pop() {
            let status = child.wait()?;
            if !status.success() {
                bail!("the command in the cgroup failed: {status}");
            }
        }
        Ok(())
    }

    /// Kills all processes inside, those too that were not run from here.
    pub fn kill_all(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let text = self.read(&["cgroup.procs"]).unwrap_or_default();
            let pids = text.lines().filter_map(|line| line.parse::<i32>().ok());
            // One that is being reaped is said to be 0, which kill(2) takes for our own group.
            let pids: Vec<i32> = pids.filter(|pid| *pid > 0).collect();
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} processes can't be killed", pids.len());
            }
            for pid in pids {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Removes the cgroups; they are gone when this returns.
    pub fn remove(&mut self) -> Result<()> {
        // What is frozen does not die.
        for (file, word) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            if let Some(directory) = self.directory_with(file) {
                let _ = std::fs::write(directory.join(file), word);
            }
        }
        let _ = self.kill_all();
        for mut child in self.children.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
        // What they had started.
        for (_, directory) in &self.directories {
            let left = std::fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            for pid in left
                .lines()
                .filter_map(|line| line.parse().ok())
                .filter(|pid| *pid > 0)
            {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        for (_, directory) in &self.directories {
            while directory.exists() {
                // Busy until the last process has been reaped.
                if std::fs::remove_dir(directory).is_err() && Instant::now() > deadline {
                    bail!("{} can't be removed", directory.display());
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = self.remove();
        for (_, directory) in &self.directories {
            if let Some(parent) = directory.parent() {
                let _ = std::fs::remove_dir(parent);
            }
        }
    }
}
