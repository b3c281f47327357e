//! Creating the directories a configuration names: the only step of this crate that changes the
//! host, taken by the daemons at start and never by a check.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::sections::Config;

/// A directory the configuration names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedDirectory {
    /// Section and key it comes from.
    pub key: &'static str,
    /// Absolute path.
    pub path: PathBuf,
    /// Mode it gets when it is created here; an existing directory keeps its own.
    pub mode: u32,
}

/// Why a directory is not usable.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It could not be created.
    #[error("{key}: the directory {} can not be created; create it for this user or name another", path.display())]
    Create {
        /// Section and key.
        key: &'static str,
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Something else has its name.
    #[error("{key}: {} is not a directory; remove it or name another", path.display())]
    NotADirectory {
        /// Section and key.
        key: &'static str,
        /// The path.
        path: PathBuf,
    },
}

impl Config {
    /// The directories the daemons need, in the order they are made.
    pub fn directories(&self) -> Vec<PreparedDirectory> {
        let mut found = Vec::new();
        let mut add = |key, path: &Path, mode| {
            found.push(PreparedDirectory {
                key,
                path: path.to_owned(),
                mode,
            });
        };
        add("node.run-dir", &self.node.run_dir, 0o755);
        // Standalone keeps scratches below it, and containers' users pass through.
        if self.node.state_dir != self.agent.var_base_path {
            add("node.state-dir", &self.node.state_dir, 0o755);
        }
        add("node.runner-dir", &self.node.runner_dir, 0o755);
        add("agent.ipc-base-path", &self.agent.ipc_base_path, 0o755);
        // Journals, with the environment of kernels in them.
        add("agent.var-base-path", &self.agent.var_base_path, 0o700);
        add(
            "agent.image-commit-path",
            &self.agent.image_commit_path,
            0o755,
        );
        add(
            "container.scratch-root",
            &self.container.scratch_root,
            0o755,
        );
        if let Some(path) = &self.agent.mount_path {
            add("agent.mount-path", path, 0o755);
        }
        if let Some(path) = &self.agent.abuse_report_path {
            add("agent.abuse-report-path", path, 0o755);
        }
        if let Some(coredump) = &self.debug.coredump {
            add("debug.coredump.path", &coredump.path, 0o755);
        }
        found
    }

    /// Creates what is missing. Existing directories are left as they are.
    ///
    /// # Errors
    /// The first directory that can not be made.
    pub fn prepare_directories(&self) -> Result<(), DirectoryError> {
        for PreparedDirectory { key, path, mode } in self.directories() {
            if path.is_dir() {
                continue;
            }
            if path.exists() {
                return Err(DirectoryError::NotADirectory { key, path });
            }
            // Parents get the ordinary mode, only the directory itself its own.
            let parents = path.parent().map_or(Ok(()), std::fs::create_dir_all);
            let made = parents.and_then(|()| std::fs::DirBuilder::new().mode(mode).create(&path));
            match made {
                Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(DirectoryError::Create { key, path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
