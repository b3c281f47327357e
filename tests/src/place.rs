//! Directories on tmpfs for what a test starts, and the removal of those that killed tests have left.
//!
//! Invariant: a directory is held by a lock as long as its test's process lives, however that ends; what
//! nobody holds is removed before the next one is made. The pins of a dataplane whose run directory is
//! gone go with the next start of one.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

const PARENT: &str = "/dev/shm";
const PREFIX: &str = "bai-place-";

/// A directory, removed when dropped.
#[derive(Debug)]
pub struct HeldDirectory {
    directory: TempDir,
    _lock: File,
}

impl HeldDirectory {
    /// A fresh one.
    pub fn new() -> Result<Self> {
        Self::within(Path::new(PARENT))
    }

    fn within(parent: &Path) -> Result<Self> {
        // Nobody takes a directory for left between its making and its lock.
        let lock = parent.join("bai-places.lock");
        let guard = match File::create(&lock) {
            // Another user's; to be locked it need not be written.
            Err(err) if err.kind() == std::io::ErrorKind::PermissionDenied => File::open(&lock),
            made => made,
        };
        let guard = guard.context("no place on tmpfs")?;
        guard.lock()?;
        for entry in std::fs::read_dir(parent)?.flatten() {
            let is_left = entry.file_name().to_string_lossy().starts_with(PREFIX)
                && File::open(entry.path()).is_ok_and(|it| it.try_lock().is_ok());
            if is_left {
                // Another's, or with mounts in it: not ours to mend.
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        let directory = tempfile::Builder::new()
            .prefix(PREFIX)
            .tempdir_in(parent)
            .context("no place on tmpfs")?;
        let lock = File::open(directory.path())?;
        lock.lock_shared()?;
        Ok(Self {
            directory,
            _lock: lock,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_test_has_left_is_removed_and_nothing_else() {
        let top = tempfile::tempdir().unwrap();
        let left = top.path().join("bai-place-left");
        let others = top.path().join("somebody-elses");
        std::fs::create_dir_all(left.join("deep")).unwrap();
        std::fs::create_dir(&others).unwrap();
        let first = HeldDirectory::within(top.path()).unwrap();
        assert!(!left.exists() && others.exists());
        let second = HeldDirectory::within(top.path()).unwrap();
        assert!(first.path().exists() && second.path().exists());
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());
    }
}
