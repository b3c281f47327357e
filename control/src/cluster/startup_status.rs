//! What a node that is not ready yet waits for, where people look: a small file on tmpfs that
//! `bai-agent status` reads, and the service manager's status line. The file goes when the node is
//! ready or ends; a file whose process is gone says nothing.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use config::Config;
use serde::{Deserialize, Serialize};

use crate::files::{plain_name, replace_file};

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waiting {
    /// The process that waits.
    pub pid: u32,
    /// Seconds since the epoch since when it waits for this.
    pub since: f64,
    /// What for.
    pub waiting_for: String,
    /// Why it is not there.
    pub why: String,
}

/// The place where it is said.
#[derive(Debug)]
pub struct Starting {
    file: PathBuf,
}

fn file_of(config: &Config) -> PathBuf {
    let name = format!("{}.starting.json", plain_name(&config.agent.id));
    config.node.run_dir.join(name)
}

impl Starting {
    /// For the node of a configuration. Only the holder of the node's lock may have one.
    pub fn new(config: &Config) -> Starting {
        Starting {
            file: file_of(config),
        }
    }

    /// Says what is waited for. Files on tmpfs are written at once, so no task is spent on it.
    pub fn waiting(&self, what: &str, why: &str) {
        let since = match self.known() {
            Some(known) if known.waiting_for == what => known.since,
            _ => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0.0, |passed| passed.as_secs_f64()),
        };
        let waiting = Waiting {
            pid: std::process::id(),
            since,
            waiting_for: what.to_owned(),
            why: why.to_owned(),
        };
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(&format!(
            "waiting for {what}: {why}"
        ))]);
        let written = serde_json::to_vec(&waiting)
            .map_err(std::io::Error::other)
            .and_then(|bytes| replace_file(&self.file, &bytes));
        if let Err(err) = written {
            tracing::debug!(%err, "cannot say what is waited for");
        }
    }

    /// Says that nothing is waited for, and what is done.
    pub fn step(&self, doing: &str) {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Status(doing)]);
        let _ = std::fs::remove_file(&self.file);
    }

    fn known(&self) -> Option<Waiting> {
        read_file(&self.file)
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// What the node of a configuration waits for, if it does.
pub fn read_waiting(config: &Config) -> Option<Waiting> {
    let waiting = read_file(&file_of(config))?;
    Path::new("/proc")
        .join(waiting.pid.to_string())
        .exists()
        .then_some(waiting)
}

fn read_file(file: &Path) -> Option<Waiting> {
    serde_json::from_slice(&std::fs::read(file).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_tells_what_is_waited_for_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let starting = Starting {
            file: directory.path().join("x.json"),
        };
        starting.waiting("etcd", "no answer");
        let first = starting.known().unwrap();
        starting.waiting("etcd", "still none");
        let second = starting.known().unwrap();
        assert_eq!(
            (first.since, second.why.as_str()),
            (second.since, "still none")
        );
        starting.step("starting");
        assert!(starting.known().is_none());
        starting.waiting("a manager", "none");
        let file = starting.file.clone();
        drop(starting);
        assert!(!file.exists());
    }
}
