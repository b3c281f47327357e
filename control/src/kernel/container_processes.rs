//! Which container a process of this host is in, and which processes a container has.
//!
//! In: process ids and container ids. Out: memberships and the ids inside. Reads `/proc` and the cgroup
//! file systems (v1, v2, hybrid; cgroupfs and systemd drivers); blocking, call it where that is allowed.
//! Invariant: an answer is about the moment of reading; whoever signals a process holds a pidfd first.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use shared::ids::ContainerId;

/// Cgroups below a container's own that are looked into (a container may make some).
const NESTED_LIMIT: usize = 1024;

/// Where the kernel's files are; other values in tests.
#[derive(Clone, Debug)]
pub struct KernelFiles {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys/fs/cgroup`.
    pub cgroup: PathBuf,
}

impl Default for KernelFiles {
    fn default() -> Self {
        Self {
            proc: PathBuf::from("/proc"),
            cgroup: PathBuf::from("/sys/fs/cgroup"),
        }
    }
}

/// A container as seen through the cgroups of one of its processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerCgroup {
    /// The container.
    pub id: ContainerId,
    /// Directories that may list its processes, best first.
    directories: Vec<PathBuf>,
}

/// `<id>`, or `docker-<id>.scope` with the systemd driver.
fn container_id(component: &str) -> Option<ContainerId> {
    let id = component
        .strip_prefix("docker-")
        .and_then(|rest| rest.strip_suffix(".scope"))
        .unwrap_or(component);
    (id.len() == 64).then(|| id.parse().ok()).flatten()
}

fn read_cgroups(text: &str, root: &Path) -> Option<ContainerCgroup> {
    let mut found: Option<ContainerCgroup> = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let mut own = PathBuf::new();
        for component in path
            .split('/')
            .filter(|part| !part.is_empty() && *part != "..")
        {
            own.push(component);
            let Some(id) = container_id(component) else {
                continue;
            };
            let container = found.get_or_insert_with(|| ContainerCgroup {
                id,
                directories: Vec::new(),
            });
            if container.id != id {
                break;
            }
            if controllers.is_empty() {
                container.directories.push(root.join("unified").join(&own));
                container.directories.push(root.join(&own));
            } else {
                let hierarchy = controllers.strip_prefix("name=").unwrap_or(controllers);
                let directory = root.join(hierarchy).join(&own);
                // `pids` is the one the engine always fills.
                if hierarchy == "pids" {
                    container.directories.insert(0, directory);
                } else {
                    container.directories.push(directory);
                }
            }
            break;
        }
    }
    found
}

impl KernelFiles {
    fn status(&self, pid: i32) -> io::Result<String> {
        std::fs::read_to_string(self.proc.join(pid.to_string()).join("status"))
    }

    /// The container a process is in; `None` when it is in none or gone.
    pub fn container_of(&self, pid: i32) -> Option<ContainerCgroup> {
        if pid <= 0 {
            return None;
        }
        let text = std::fs::read_to_string(self.proc.join(pid.to_string()).join("cgroup")).ok()?;
        read_cgroups(&text, &self.cgroup)
    }

    /// The process's id inside its container.
    pub fn inner_pid(&self, pid: i32) -> Option<i32> {
        let status = self.status(pid).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("NSpid:"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    }

    /// The processes of a container, by the host's ids.
    pub fn processes(&self, container: &ContainerCgroup) -> BTreeSet<i32> {
        for directory in &container.directories {
            let mut pids = BTreeSet::new();
            let mut directories = vec![directory.clone()];
            let mut visited = 0;
            while let Some(directory) = directories.pop() {
                visited += 1;
                if visited > NESTED_LIMIT {
                    break;
                }
                if let Ok(text) = std::fs::read_to_string(directory.join("cgroup.procs")) {
                    pids.extend(
                        text.lines()
                            .filter_map(|line| line.parse::<i32>().ok())
                            .filter(|pid| *pid > 0),
                    );
                }
                let Ok(entries) = std::fs::read_dir(&directory) else {
                    continue;
                };
                directories.extend(
                    entries
                        .flatten()
                        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                        .map(|entry| entry.path()),
                );
            }
            if !pids.is_empty() {
                return pids;
            }
        }
        BTreeSet::new()
    }

    /// The host's id of a container's process.
    pub fn outer_pid(&self, container: &ContainerCgroup, inner: i32) -> Option<i32> {
        self.processes(container)
            .into_iter()
            .find(|pid| self.inner_pid(*pid) == Some(inner))
    }

    /// Whether the environment of a process of the container has this entry.
    pub fn has_environment(&self, container: &ContainerCgroup, entry: &str) -> bool {
        self.processes(container)
            .into_iter()
            .any(|pid| self.process_has(pid, entry))
    }

    fn process_has(&self, pid: i32, entry: &str) -> bool {
        let environment = std::fs::read(self.proc.join(pid.to_string()).join("environ"));
        environment.is_ok_and(|bytes| {
            bytes
                .split(|byte| *byte == 0)
                .any(|found| found == entry.as_bytes())
        })
    }

    /// Kills the processes of a container whose environment has this entry; says how many.
    ///
    /// # Errors
    /// A process could not be killed.
    pub fn kill_with_environment(
        &self,
        container: &ContainerCgroup,
        entry: &str,
    ) -> io::Result<usize> {
        let mut killed = 0;
        let mut refused = None;
        for pid in self.processes(container) {
            let Some(process) = Pid::from_raw(pid) else {
                continue;
            };
            // Held first: what is read and signalled from here on is one and the same process.
            let Ok(held) = pidfd_open(process, PidfdFlags::empty()) else {
                continue;
            };
            let has_entry = self.process_has(pid, entry);
            let inside = self
                .container_of(pid)
                .is_some_and(|found| found.id == container.id);
            if has_entry && inside {
                match pidfd_send_signal(&held, Signal::KILL) {
                    Ok(()) => killed += 1,
                    Err(rustix::io::Errno::SRCH) => {}
                    Err(err) => refused = Some(err),
                }
            }
        }
        match refused {
            Some(err) if killed == 0 => Err(err.into()),
            _ => Ok(killed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "7baa8d979384b2736ae6e9ad41a9ae02912117e0765da6481dd4ed6044a05955";

    #[test]
    fn containers_are_found_with_both_drivers_and_cgroup_versions() {
        let root = Path::new("/cg");
        let v1 = format!("9:name=systemd:/docker/{ID}\n8:pids:/docker/{ID}\n0::/docker/{ID}\n");
        let found = read_cgroups(&v1, root).expect("container");
        assert_eq!(found.id.to_string(), ID);
        assert_eq!(found.directories[0], root.join("pids/docker").join(ID));
        let systemd = format!("0::/system.slice/docker-{ID}.scope/init\n");
        let found = read_cgroups(&systemd, root).expect("container");
        assert_eq!(
            found.directories[1],
            root.join(format!("system.slice/docker-{ID}.scope"))
        );
        for nothing in [
            "0::/user.slice/session-1.scope\n",
            "",
            "0::/docker/short",
            "nonsense",
            "1:a",
        ] {
            assert_eq!(read_cgroups(nothing, root), None);
        }
    }

    #[test]
    fn processes_are_translated_both_ways() {
        let host = tempfile::tempdir().expect("directory");
        let files = KernelFiles {
            proc: host.path().join("proc"),
            cgroup: host.path().join("cgroup"),
        };
        let group = files.cgroup.join("docker").join(ID);
        std::fs::create_dir_all(group.join("nested")).expect("directory");
        std::fs::write(group.join("cgroup.procs"), "100\n").expect("file");
        std::fs::write(group.join("nested/cgroup.procs"), "101\n").expect("file");
        for (pid, inner) in [(100, "100\t1"), (101, "101\t164"), (102, "102")] {
            let directory = files.proc.join(pid.to_string());
            std::fs::create_dir_all(&directory).expect("directory");
            let path = if pid == 102 {
                "/user.slice".to_owned()
            } else {
                format!("/docker/{ID}")
            };
            std::fs::write(directory.join("cgroup"), format!("0::{path}\n")).expect("file");
            std::fs::write(
                directory.join("status"),
                format!("Name:\tx\nNSpid:\t{inner}\n"),
            )
            .expect("file");
        }
        let container = files.container_of(100).expect("container");
        assert_eq!(files.processes(&container), BTreeSet::from([100, 101]));
        assert_eq!(files.inner_pid(101), Some(164));
        assert_eq!(files.outer_pid(&container, 164), Some(101));
        assert_eq!(files.outer_pid(&container, 9), None);
        assert_eq!(files.container_of(102), None);
        assert_eq!(files.inner_pid(102), None);
        assert_eq!(files.container_of(-5), None);
    }
}
