//! Where regions, locks and doorbells live: `<run-dir>/<agent id>/{control,dataplane}/`.
//!
//! In: the configured run directory, or none. Out: the two directories of one agent. Invariant: a
//! run directory is on tmpfs, so that a region's pages are the region and no disk is ever waited for;
//! nobody but root and who runs the agent can put anything in the place of its directories.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
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
    #[error(
        "cannot {step} the run directory {path}; see that the directory above it may be written and \
         that nothing else has that name",
        path = .path.display()
    )]
    Directory {
        /// What was tried.
        step: &'static str,
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Somebody else could put regions of his own there.
    #[error(
        "the run directory {path} {why}; see who has made it and what is in it, then remove it \
         (rm -r {path}) or set run-dir to another directory",
        path = .path.display()
    )]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Somebody else could change what is made below it.
    #[error(
        "{path} {why}: what is made below it could be changed; see who has made it, then let only root or this \
         user change it (chown, chmod go-w), or have the configuration name another directory",
        path = .path.display()
    )]
    Shared {
        /// The part of the way.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
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
    ///
    /// # Errors
    /// [`RunDirError`]: the name of the agent is none of a directory, or there is no tmpfs there.
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
    ///
    /// # Errors
    /// [`RunDirError`]: it cannot be made or looked at, is not on tmpfs, or could be changed by others.
    pub fn create_control(&self) -> Result<PathBuf, RunDirError> {
        self.create(self.control())
    }

    /// Creates [`RunDir::dataplane`] where it is missing, and answers it.
    ///
    /// # Errors
    /// [`RunDirError`]: it cannot be made or looked at, is not on tmpfs, or could be changed by others.
    pub fn create_dataplane(&self) -> Result<PathBuf, RunDirError> {
        self.create(self.dataplane())
    }

    fn create(&self, path: PathBuf) -> Result<PathBuf, RunDirError> {
        let failed = |step, path: &Path, source| RunDirError::Directory {
            step,
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(&path)
            .map_err(|source| failed("create", &path, source))?;
        require_tmpfs(&path)?;
        // The run directory itself may be reached by a link of the operator's.
        let base = self.root.parent().unwrap_or(&self.root);
        let base = std::fs::metadata(base).map(|found| (base, found));
        let own = [&*self.root, &*path]
            .map(|path| std::fs::symlink_metadata(path).map(|found| (path, found)));
        for looked_at in [base].into_iter().chain(own) {
            let (path, found) = looked_at.map_err(|source| failed("look at", &path, source))?;
            if let Some(why) = distrusted(&found) {
                let path = path.to_owned();
                return Err(RunDirError::Unsafe { path, why });
            }
        }
        Ok(path)
    }
}

/// Refuses, with words, a directory whose way or content somebody else than this user and root could
/// change: by its owner, its mode, or a link of his on the way to it.
///
/// # Errors
/// The first such part of the way, or what can't be looked at.
pub fn require_own(path: &Path) -> Result<(), RunDirError> {
    let failed = |path: &Path, source| RunDirError::Directory {
        step: "look at",
        path: path.to_owned(),
        source,
    };
    let real = std::fs::canonicalize(path).map_err(|source| failed(path, source))?;
    for place in path.ancestors().chain(real.ancestors()) {
        if place.as_os_str().is_empty() {
            continue;
        }
        let found = std::fs::symlink_metadata(place).map_err(|source| failed(place, source))?;
        let user = rustix::process::geteuid().as_raw();
        if found.is_symlink() && [0, user].contains(&found.uid()) {
            // Where it leads is looked at by itself.
            continue;
        }
        if let Some(why) = distrusted(&found) {
            let path = place.to_owned();
            return Err(RunDirError::Shared { path, why });
        }
    }
    Ok(())
}

/// Why what is in a directory may be anybody's.
fn distrusted(found: &std::fs::Metadata) -> Option<String> {
    let (user, group) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let mode = found.mode() & 0o7777;
    // In a sticky one, as /dev/shm, each can only take away what is his own.
    let open = mode & 0o002 != 0 || mode & 0o020 != 0 && ![0, group].contains(&found.gid());
    if !found.is_dir() {
        Some("is not a directory but a link, or a file".to_owned())
    } else if ![0, user].contains(&found.uid()) {
        Some(format!("belongs to the user {}", found.uid()))
    } else if open && mode & 0o1000 == 0 {
        Some(format!("can be changed by other users (mode {mode:o})"))
    } else {
        None
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
///
/// # Errors
/// [`RunDirError`]: it is on another file system, or cannot be looked at.
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
    fn directories_of_anybody_are_not_used() {
        use std::fs::{self, Permissions};
        use std::os::unix::fs::{PermissionsExt, chown, symlink};
        let top = tempfile::tempdir_in("/dev/shm").unwrap();
        let base = top.path().join("run");
        let run_dir = RunDir::choose(Some(&base), "i-node01").unwrap();
        let spoil = |words: &str, spoil: &dyn Fn(&Path)| {
            for place in [&base, run_dir.root(), &run_dir.control()] {
                let _ = fs::remove_dir_all(&base);
                run_dir.create_control().unwrap();
                spoil(place);
                let err = run_dir.create_control().unwrap_err().to_string();
                assert!(err.contains(words), "{err}");
                assert!(err.contains(&format!("rm -r {}", place.display())), "{err}");
            }
        };
        for mode in [0o757, 0o777] {
            spoil(&format!("mode {mode:o}"), &|place| {
                fs::set_permissions(place, Permissions::from_mode(mode)).unwrap();
            });
        }
        if rustix::process::geteuid().is_root() {
            spoil("belongs to the user 65534", &|place| {
                chown(place, Some(65534), None).unwrap()
            });
            spoil("mode 770", &|place| {
                chown(place, None, Some(65534)).unwrap();
                fs::set_permissions(place, Permissions::from_mode(0o770)).unwrap();
            });
        }
        // A link in the place of the run directory is the operator's, below it is nobody's.
        fs::remove_dir_all(&base).unwrap();
        fs::create_dir(top.path().join("real")).unwrap();
        symlink("real", &base).unwrap();
        run_dir.create_control().unwrap();
        fs::rename(run_dir.control(), base.join("elsewhere")).unwrap();
        symlink(base.join("elsewhere"), run_dir.control()).unwrap();
        let err = run_dir.create_control().unwrap_err().to_string();
        assert!(err.contains("a link"), "{err}");
        // Where each can only remove what is his.
        fs::remove_file(run_dir.control()).unwrap();
        fs::set_permissions(top.path().join("real"), Permissions::from_mode(0o1777)).unwrap();
        run_dir.create_control().unwrap();
    }

    #[test]
    fn a_way_that_others_could_change_is_not_used() {
        use std::fs::{self, Permissions};
        use std::os::unix::fs::{PermissionsExt, lchown, symlink};
        let top = tempfile::tempdir().unwrap();
        let place = top.path().join("a/b/c");
        fs::create_dir_all(&place).unwrap();
        require_own(&place).unwrap();
        let link = top.path().join("link");
        symlink("a/b", &link).unwrap();
        require_own(&link.join("c")).unwrap();
        fs::set_permissions(top.path().join("a"), Permissions::from_mode(0o777)).unwrap();
        for way in [&place, &link.join("c")] {
            let err = require_own(way).unwrap_err().to_string();
            assert!(err.contains("/a can be changed by other users"), "{err}");
            assert!(!err.contains("rm -r"), "{err}");
        }
        fs::set_permissions(top.path().join("a"), Permissions::from_mode(0o755)).unwrap();
        if rustix::process::geteuid().is_root() {
            lchown(&link, Some(65534), None).unwrap();
            let err = require_own(&link.join("c")).unwrap_err().to_string();
            assert!(err.contains("a link"), "{err}");
            lchown(top.path().join("a/b"), Some(65534), None).unwrap();
            let err = require_own(&place).unwrap_err().to_string();
            assert!(err.contains("belongs to the user 65534"), "{err}");
        }
        require_own(&top.path().join("none")).unwrap_err();
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
