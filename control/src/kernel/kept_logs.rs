//! The consoles of kernels that have ended, kept for a while.
//!
//! In: the last log of a container before it is removed. Out: the text for `get_logs` and the
//! command line. Invariant: at most `keep` files, the newest; each whole (written aside, renamed)
//! and readable by the agent's user only.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use shared::ids::KernelId;
use thiserror::Error;

use super::journal::{plain_name, replace_file};

/// How many consoles are kept.
pub const KEEP: usize = 256;

/// A step on the kept logs failed.
#[derive(Debug, Error)]
#[error("cannot {step} {path}")]
pub struct KeptLogsError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The directory of kept consoles.
#[derive(Clone, Debug)]
pub struct KeptLogs {
    dir: PathBuf,
    keep: usize,
}

impl KeptLogs {
    /// Prepares `<var-base-path>/logs/<agent id>`.
    pub fn open(var_base: &Path, agent_id: &str) -> Result<KeptLogs, KeptLogsError> {
        let dir = var_base.join("logs").join(plain_name(agent_id));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|source| KeptLogsError {
                step: "create",
                path: dir.clone(),
                source,
            })?;
        Ok(KeptLogs { dir, keep: KEEP })
    }

    fn path(&self, kernel: KernelId) -> PathBuf {
        self.dir.join(format!("{kernel}.log"))
    }

    /// Keeps the console of a kernel and drops the oldest ones. Blocks.
    pub fn store(&self, kernel: KernelId, text: &str) -> Result<(), KeptLogsError> {
        let path = self.path(kernel);
        replace_file(&path, text.as_bytes()).map_err(|source| KeptLogsError {
            step: "write",
            path,
            source,
        })?;
        self.drop_oldest().map_err(|source| KeptLogsError {
            step: "clear out",
            path: self.dir.clone(),
            source,
        })
    }

    /// The console of a kernel, when it is still kept. Blocks.
    pub fn load(&self, kernel: KernelId) -> Option<String> {
        let bytes = fs::read(self.path(kernel)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn drop_oldest(&self) -> io::Result<()> {
        let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            // A file that vanishes meanwhile was dropped by another clean-up.
            if let Ok(modified) = entry.metadata().and_then(|metadata| metadata.modified()) {
                files.push((modified, entry.path()));
            }
        }
        if files.len() <= self.keep {
            return Ok(());
        }
        files.sort();
        let surplus = files.len() - self.keep;
        for (_, path) in files.into_iter().take(surplus) {
            match fs::remove_file(path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_consoles_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let mut logs = KeptLogs::open(dir.path(), "i-node").unwrap();
        logs.keep = 2;
        for n in 1..=3u8 {
            let path = logs.path(KernelId([n; 16]));
            logs.store(KernelId([n; 16]), &format!("console {n}"))
                .unwrap();
            // Distinct times, whatever the file system's resolution.
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(n));
            fs::File::options()
                .append(true)
                .open(path)
                .unwrap()
                .set_modified(at)
                .unwrap();
        }
        logs.store(KernelId([4; 16]), "console 4").unwrap();
        assert_eq!(logs.load(KernelId([1; 16])), None);
        assert_eq!(logs.load(KernelId([2; 16])), None);
        assert_eq!(logs.load(KernelId([3; 16])).as_deref(), Some("console 3"));
        assert_eq!(logs.load(KernelId([4; 16])).as_deref(), Some("console 4"));
    }
}
