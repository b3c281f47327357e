//! Where regions, locks and doorbells live: `<run-dir>/<agent id>/{control,dataplane}/`.
//!
//! In: the configured run directory, or none. Out: the two directories of one agent. Invariant: a
//! run directory is on tmpfs, so that a region's pages are the region and no disk is ever waited for.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// `f_type` of tmpfs (statfs(2), linux/magic.h).
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Mode of the directories: the writer writes, its group looks.
const DIRECTORY_MODE: u32 = 0o750;

/// Tried in this order when nothing is configured; `/run` is not tmpfs everywhere.
const FALLBACKS: [&str; 2] = ["/run/bai-agent", "/dev/shm/bai-agent"];

/// A run directory that cannot be used. The host or its configuration is at fault; a retry needs a change.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// The directory is on another kind of file system.
    #[error(
        "{path} is not on tmpfs; set run-dir to a directory on tmpfs, such as /dev/shm/bai-agent, \
         or mount one there (mount -t tmpfs tmpfs {path})",
        path = .path.display()
    )]
    NotTmpfs {
        /// The directory.
        path: PathBuf,
    },
    /// None of the usual places is on tmpfs.
    #[error(
        "neither /run nor /dev/shm is on tmpfs; mount one and set run-dir to a directory on it"
    )]
    NoTmpfs,
    /// A directory cannot be made or looked at.
    #[error("cannot {step} the run directory {path}", path = .path.display())]
    Directory {
        /// What was tried.
        step: &'static str,
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The agent id cannot be a directory's name.
    #[error(
        "the agent id {agent:?} cannot name a directory; use 1 to 64 letters, digits, dots, dashes \
         or underscores, not starting with a dot"
    )]
    AgentId {
        /// The id.
        agent: String,
    },
}

/// The two directories of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDir {
    root: PathBuf,
}

impl RunDir {
    /// The run directory of `agent`: under `configured`, else under the first of `/run/bai-agent`
    /// and `/dev/shm/bai-agent` that is on tmpfs. Creates nothing.
    pub fn choose(configured: Option<&Path>, agent: &str) -> Result<Self, RunDirError> {
        if !names_a_directory(agent) {
            return Err(RunDirError::AgentId {
                agent: agent.to_owned(),
            });
        }
        let base = match configured {
            Some(path) => {
                require_tmpfs(path)?;
                path.to_owned()
            }
            None => FALLBACKS
                .iter()
                .map(PathBuf::from)
                .find(|path| require_tmpfs(path).is_ok())
                .ok_or(RunDirError::NoTmpfs)?,
        };
        Ok(Self {
            root: base.join(agent),
        })
    }

    /// The agent's own directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory control writes to: region `desired`, control's doorbell and lock.
    #[must_use]
    pub fn control(&self) -> PathBuf {
        self.root.join("control")
    }

    /// The directory the dataplane writes to: region `observed`, its doorbell and lock.
    #[must_use]
    pub fn dataplane(&self) -> PathBuf {
        self.root.join("dataplane")
    }

    /// Creates [`RunDir::control`] where it is missing, and answers it.
    pub fn create_control(&self) -> Result<PathBuf, RunDirError> {
        create(self.control())
    }

    /// Creates [`RunDir::dataplane`] where it is missing, and answers it.
    pub fn create_dataplane(&self) -> Result<PathBuf, RunDirError> {
        create(self.dataplane())
    }
}

fn create(path: PathBuf) -> Result<PathBuf, RunDirError> {
    match DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(&path)
    {
        Ok(()) => require_tmpfs(&path).map(|()| path),
        Err(source) => Err(RunDirError::Directory {
            step: "create",
            path,
            source,
        }),
    }
}

fn names_a_directory(agent: &str) -> bool {
    (1..=64).contains(&agent.len())
        && !agent.starts_with('.')
        && agent
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
}

/// Refuses, with words, a path that is not (or would not be) on tmpfs. Of a path that does not
/// exist yet, its nearest existing parent is looked at.
pub fn require_tmpfs(path: &Path) -> Result<(), RunDirError> {
    let mut place = path;
    loop {
        match rustix::fs::statfs(place) {
            Ok(found) if u64::try_from(found.f_type).is_ok_and(|kind| kind == TMPFS_MAGIC) => {
                return Ok(());
            }
            Ok(_) => {
                return Err(RunDirError::NotTmpfs {
                    path: path.to_owned(),
                });
            }
            Err(rustix::io::Errno::NOENT) => match place.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => place = parent,
                _ => {
                    return Err(RunDirError::NotTmpfs {
                        path: path.to_owned(),
                    });
                }
            },
            Err(err) => {
                return Err(RunDirError::Directory {
                    step: "look at",
                    path: path.to_owned(),
                    source: err.into(),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_on_disk_is_refused_with_the_remedy() {
        let err = RunDir::choose(Some(Path::new("/proc")), "i-node01").unwrap_err();
        assert!(err.to_string().contains("not on tmpfs"), "{err}");
        assert!(err.to_string().contains("/dev/shm/bai-agent"), "{err}");
    }

    #[test]
    fn agent_ids_that_leave_the_directory_are_refused() {
        for agent in [
            "",
            ".",
            "..",
            "a/b",
            "../x",
            ".hidden",
            "a b",
            &"x".repeat(65),
        ] {
            let err = RunDir::choose(Some(Path::new("/dev/shm")), agent).unwrap_err();
            assert!(
                matches!(err, RunDirError::AgentId { .. }),
                "{agent:?}: {err}"
            );
        }
    }

    #[test]
    fn the_nearest_existing_parent_decides() {
        let run_dir =
            RunDir::choose(Some(Path::new("/dev/shm/bai-not-there/deeper")), "i-node01").unwrap();
        assert_eq!(
            run_dir.control(),
            Path::new("/dev/shm/bai-not-there/deeper/i-node01/control")
        );
    }
}
