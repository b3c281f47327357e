//! Removing what a dataplane leaves behind on a host.
//!
//! In: the run directory and the agent's id. Out: the kernel path's programs are detached and its
//! pins gone, and so is the dataplane's own directory: region, lock, doorbell. Invariant: nothing
//! is removed under a running dataplane, and nothing of control's.

use std::io;
use std::path::{Path, PathBuf};

use crate::forward::kernel_path;
use crate::forward::kernel_path::pins::PinsError;
use shared::lock::{LockError, WriterLock};
use shared::run_dir::{RunDir, RunDirError};

/// Why something was left in place.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// The run directory can't be used.
    #[error("the run directory can't be used")]
    RunDir(#[source] RunDirError),
    /// A dataplane is running: stop it first.
    #[error("bai-dataplane is running for this agent; stop it first: systemctl stop bai-dataplane")]
    Running(#[source] LockError),
    /// The kernel path's pins could not be removed.
    #[error("the kernel path stays attached")]
    Pins(#[source] PinsError),
    /// A file or directory could not be removed.
    #[error("cannot remove {path}", path = path.display())]
    Remove {
        /// What is in the way.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Removes the dataplane's directory of this agent and the pins of its kernel path. Answers what
/// was removed; nothing when nothing was there.
///
/// # Errors
/// A dataplane is running, or the directory can't be removed.
pub fn detach(run_dir: Option<&Path>, agent_id: &str) -> Result<Vec<PathBuf>, DetachError> {
    let run_dir = RunDir::choose(run_dir, agent_id).map_err(DetachError::RunDir)?;
    let directory = run_dir.dataplane();
    if !directory.exists() {
        return kernel_path::detach(agent_id, run_dir.root()).map_err(DetachError::Pins);
    }
    let lock = WriterLock::acquire(&directory).map_err(DetachError::Running)?;
    let mut removed = kernel_path::detach(agent_id, run_dir.root()).map_err(DetachError::Pins)?;
    std::fs::remove_dir_all(&directory).map_err(|source| DetachError::Remove {
        path: directory.clone(),
        source,
    })?;
    drop(lock);
    // The agent's directory goes when control has left it too.
    let _ = std::fs::remove_dir(run_dir.root());
    removed.push(directory);
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_and_nothing_there_is_fine() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-detach").unwrap();
        let directory = run_dir.create_dataplane().unwrap();
        std::fs::write(directory.join("observed"), b"x").unwrap();
        let gone = detach(Some(base.path()), "i-detach").unwrap();
        assert_eq!(gone, [directory]);
        assert!(!run_dir.root().exists());
        assert_eq!(
            detach(Some(base.path()), "i-detach").unwrap(),
            Vec::<PathBuf>::new()
        );
    }

    #[test]
    fn a_running_dataplane_is_left_alone() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-detach").unwrap();
        let directory = run_dir.create_dataplane().unwrap();
        let lock = WriterLock::acquire(&directory).unwrap();
        let err = detach(Some(base.path()), "i-detach").unwrap_err();
        assert!(matches!(err, DetachError::Running(_)), "{err}");
        assert!(directory.exists());
        drop(lock);
    }
}
