//! What of the host goes into every container, read once at the start, and the runner's seccomp profile.

use serde_json::{Value, json};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Facts of this host. `Default` is a host with nothing special and no limits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostFacts {
    /// The operator's parts of the body, in the order they are merged, with their files.
    pub overrides: Vec<(PathBuf, Value)>,
    /// This process's own hard limits; none is no limit.
    pub open_files: Option<u64>,
    pub locked_memory: Option<u64>,
    /// Tasks (processes and their threads) that one container may have.
    pub tasks: Option<u64>,
    /// There are RDMA devices, which every kernel gets.
    pub rdma: bool,
}

/// Why the facts can't be read: the operator's files, told by path.
#[derive(Debug, Error)]
pub enum HostFactsError {
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} is not JSON")]
    Json {
        path: PathBuf,
        #[source]
        cause: serde_json::Error,
    },
    #[error("{0} is not a JSON map of container options")]
    NotMap(PathBuf),
}

impl HostFacts {
    /// Reads the operator's files that exist. Blocks.
    ///
    /// # Errors
    /// A file is there and can't be used.
    pub fn read(overrides: &[PathBuf]) -> Result<Self, HostFactsError> {
        let mut parts = Vec::new();
        for path in overrides {
            if let Some(part) = read_json(path)? {
                if !part.is_object() {
                    return Err(HostFactsError::NotMap(path.clone()));
                }
                parts.push((path.clone(), part));
            }
        }
        let limit = |resource| rustix::process::getrlimit(resource).maximum;
        Ok(Self {
            overrides: parts,
            open_files: limit(rustix::process::Resource::Nofile),
            locked_memory: limit(rustix::process::Resource::Memlock),
            tasks: tasks(Path::new("/proc/sys/kernel")),
            rdma: Path::new("/dev/infiniband/uverbs0").exists(),
        })
    }
}

/// Half of the tasks this host can have, so that one container that forks without end leaves the engine, this agent and
/// other kernels theirs. Memory is no bound: a task takes about 150 KiB, and a host of few cores numbers 32,768.
fn tasks(limits: &Path) -> Option<u64> {
    let read = |name: &str| {
        let text = fs::read_to_string(limits.join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let most = [read("pid_max"), read("threads-max")];
    most.into_iter().flatten().min().map(|most| most / 2)
}

/// The profile that comes with the runner. Read for each creation, because a runner may be installed
/// while the agent runs. A missing one is not an error, as in the original. Blocks.
///
/// # Errors
/// It is there and can't be used.
pub fn seccomp_profile(path: &Path) -> Result<Option<Value>, HostFactsError> {
    read_json(path)
}

/// The profile's text with one more rule, for the accelerators' system calls.
pub(super) fn permitting(profile: &Value, syscalls: &[String]) -> String {
    let mut profile = profile.clone();
    let mut names = syscalls.to_vec();
    names.sort();
    names.dedup();
    let rules = profile.get_mut("syscalls").and_then(Value::as_array_mut);
    if let (Some(rules), false) = (rules, names.is_empty()) {
        rules.push(json!({
            "names": names,
            "action": "SCMP_ACT_ALLOW",
            "args": [],
            "comment": "System calls that the attached accelerators need",
        }));
    }
    profile.to_string()
}

fn read_json(path: &Path) -> Result<Option<Value>, HostFactsError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => {
            return Err(HostFactsError::Read {
                path: path.to_owned(),
                cause,
            });
        }
    };
    let value = serde_json::from_slice(&text).map_err(|cause| HostFactsError::Json {
        path: path.to_owned(),
        cause,
    })?;
    Ok(Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_may_have_half_of_the_hosts_tasks() {
        let limits = tempfile::tempdir().unwrap();
        assert_eq!(tasks(limits.path()), None);
        fs::write(limits.path().join("pid_max"), "4194304\n").unwrap();
        assert_eq!(tasks(limits.path()), Some(2_097_152));
        fs::write(limits.path().join("threads-max"), "192731\n").unwrap();
        assert_eq!(tasks(limits.path()), Some(96_365));
        // This host tells.
        assert!(HostFacts::read(&[]).unwrap().tasks >= Some(100));
    }
}
