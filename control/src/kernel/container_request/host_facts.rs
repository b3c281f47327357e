//! What of the host goes into every container, and the runner's seccomp profile. All of it is read for each
//! creation: it may change while the agent runs.

use serde_json::{Value, json};
use std::fs;
use std::io;
use std::iter;
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

/// Why a file can't be used.
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
    #[error("{0} is not a JSON map")]
    NotMap(PathBuf),
    #[error(
        "wrong container options keep kernels from being created; correct their file or remove it"
    )]
    Options(#[source] Box<HostFactsError>),
}

impl HostFacts {
    /// Those that stand in no file of the operator. Blocks.
    pub fn read() -> Self {
        let limit = |resource| rustix::process::getrlimit(resource).maximum;
        Self {
            overrides: Vec::new(),
            open_files: limit(rustix::process::Resource::Nofile),
            locked_memory: limit(rustix::process::Resource::Memlock),
            tasks: tasks(Path::new("/proc/sys/kernel")),
            rdma: Path::new("/dev/infiniband/uverbs0").exists(),
        }
    }
}

/// Where an operator may add to every container request, in the order in which they are merged; each file
/// that exists counts.
pub fn override_files(home: Option<&Path>, working_directory: &Path) -> Vec<PathBuf> {
    let home = home.map(|home| home.join(".config/backend.ai"));
    iter::once(PathBuf::from("/etc/backend.ai"))
        .chain(home)
        .chain(iter::once(working_directory.to_owned()))
        .map(|place| place.join("agent-docker-container-opts.json"))
        .collect()
}

/// The operator's part of the body in one of these files; none when there is no such file. Blocks.
///
/// # Errors
/// The file is there and can't be used.
pub fn override_part(path: &Path) -> Result<Option<Value>, HostFactsError> {
    // A pipe would keep its reader waiting.
    if fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        return Ok(None);
    }
    let part = match read_json(path) {
        Ok(Some(part)) if !part.is_object() => Err(HostFactsError::NotMap(path.to_owned())),
        read => read,
    };
    part.map_err(|cause| HostFactsError::Options(Box::new(cause)))
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
        Err(err)
            if matches!(
                err.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
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
        assert!(HostFacts::read().tasks >= Some(100));
    }

    #[test]
    fn an_operators_file_counts_in_three_places() {
        let files = override_files(Some(Path::new("/root")), Path::new("/"));
        let expected = [
            "/etc/backend.ai/agent-docker-container-opts.json",
            "/root/.config/backend.ai/agent-docker-container-opts.json",
            "/agent-docker-container-opts.json",
        ];
        assert_eq!(files, expected.map(PathBuf::from));
        assert_eq!(override_files(None, Path::new("/")).len(), 2);
    }

    #[test]
    fn an_operators_file_is_a_map_or_is_told_by_its_path() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("a.json");
        assert_eq!(override_part(&file).unwrap(), None);
        assert_eq!(override_part(&file.join("below a file")).unwrap(), None);
        fs::write(&file, r#"{"Tty": false}"#).unwrap();
        assert_eq!(override_part(&file).unwrap(), Some(json!({"Tty": false})));
        assert_eq!(override_part(&file.join("below a file")).unwrap(), None);
        for broken in ["[]", "{"] {
            fs::write(&file, broken).unwrap();
            let told = crate::causes::chain(&override_part(&file).unwrap_err());
            assert!(told.contains("correct their file"), "{told}");
            assert_eq!(told.matches("a.json").count(), 1, "{told}");
        }
        // The original takes no notice of what is no file.
        assert_eq!(override_part(directory.path()).unwrap(), None);
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(override_part(&pipe).unwrap(), None);
    }
}
