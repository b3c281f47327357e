//! Reports of abusing kernels, left by the node's watchdogs in a directory.
//!
//! In: files `report.*.json` (`{"ID": kernel, "CID": container, "reason": ...}`), read under the
//! lock file that their writers hold. Out: the state of each reported kernel for those who publish
//! it, and, where the operator wants it, its end. Invariant: a report speaks of one container: a
//! kernel that was restarted since is not ended for what its old container did.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::Deserialize;
use shared::ids::KernelId;
use thiserror::Error;

use super::destroy;
use super::lifecycle::Reason;
use super::node::Node;
use crate::blocking::blocking;
use crate::rpc::arguments::parse_uuid;

/// How often the directory is looked at.
const PERIOD: Duration = Duration::from_secs(30);
/// Reports that are read in one look, the newest: those of kernels that have ended may lie for ever.
const MOST: usize = 1024;
/// Files that are looked at for that.
const MOST_FILES: usize = 65_536;
/// A report is some words.
const LARGEST: u64 = 64 << 10;
/// How long the writers may hold their lock before a look is left out.
const LOCK_WAIT: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// What is done about a reported kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbuseStatus {
    /// It is known, and left to people.
    Detected,
    /// It is being ended.
    Cleaning,
}

impl AbuseStatus {
    /// The original's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            AbuseStatus::Detected => "detected",
            AbuseStatus::Cleaning => "cleaning",
        }
    }
}

/// Why the reports could not be read.
#[derive(Debug, Error)]
pub enum AbuseError {
    /// The lock file cannot be opened, made or locked.
    #[error(
        "cannot use the lock file {path}; the agent must be able to make files in its directory"
    )]
    Lock {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A writer does not give the lock back.
    #[error(
        "another program has held the lock {path} for {} s; see with `lslocks` which one, and end it",
        LOCK_WAIT.as_secs()
    )]
    Held {
        /// Which.
        path: PathBuf,
    },
    /// The directory cannot be read.
    #[error("cannot read the abuse reports in {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The reported kernels of this node.
#[derive(Debug, Default)]
pub struct AbuseReports {
    statuses: Mutex<BTreeMap<KernelId, AbuseStatus>>,
}

impl AbuseReports {
    /// As of the last look.
    #[must_use]
    pub fn statuses(&self) -> BTreeMap<KernelId, AbuseStatus> {
        let statuses = self.statuses.lock();
        statuses.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, statuses: BTreeMap<KernelId, AbuseStatus>) {
        *self.statuses.lock().unwrap_or_else(PoisonError::into_inner) = statuses;
    }
}

/// One report, as it lies in its file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Report {
    #[serde(rename = "ID")]
    kernel: String,
    #[serde(rename = "CID", default)]
    container: String,
    #[serde(default)]
    reason: Option<String>,
}

/// Looks at the reports now and then, until the agent stops. Returns at once without a directory.
pub async fn watch(node: Arc<Node>) {
    let Some(directory) = node.config.agent.abuse_report_path.clone() else {
        return;
    };
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = node.stopping.cancelled() => return,
        }
        if let Err(err) = look(&node, &directory).await {
            tracing::warn!(
                err = &err as &dyn std::error::Error,
                "abuse reports were not looked at"
            );
        }
    }
}

/// One look at the directory.
async fn look(node: &Arc<Node>, directory: &Path) -> Result<(), AbuseError> {
    let end_them = node.config.agent.force_terminate_abusing_containers;
    let (of_node, place) = (node.clone(), directory.to_owned());
    let found = blocking(move || {
        // Closing the file gives the lock back.
        let _lock = lock(&place, LOCK_WAIT)?;
        let mut found = Vec::new();
        for (path, report) in read(&place)? {
            let Some(kernel) = judge(&of_node, &report) else {
                continue;
            };
            // Removed under the lock: whoever writes another one afterwards is heard.
            if end_them && let Err(err) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %err, "an abuse report cannot be removed");
            }
            found.push((kernel, report.reason));
        }
        Ok(found)
    })
    .await?;
    let mut statuses = BTreeMap::new();
    for (kernel, reason) in found {
        let status = if end_them {
            AbuseStatus::Cleaning
        } else {
            AbuseStatus::Detected
        };
        let first = statuses.insert(kernel, status).is_none();
        if end_them && first {
            end(node, kernel, reason);
        }
    }
    node.abuse.set(statuses);
    Ok(())
}

/// The kernel that a report speaks of, if its container is the one reported. Files of others stay.
fn judge(node: &Node, report: &Report) -> Option<KernelId> {
    let id = KernelId(parse_uuid(&report.kernel)?.into_bytes());
    let kernel = node.registry.get(id)?;
    let container = kernel.container()?.to_string();
    let same = report.container.len() >= 12 && container.starts_with(&report.container);
    // Some writers leave the container out.
    (report.container.is_empty() || same).then_some(id)
}

fn end(node: &Arc<Node>, id: KernelId, reason: Option<String>) {
    let Some(kernel) = node.registry.get(id) else {
        return;
    };
    let reason = reason
        .as_deref()
        .and_then(Reason::known)
        .unwrap_or(Reason::ANOMALY_DETECTED);
    tracing::warn!(kernel_id = %id, %reason, "ending a kernel that was reported for abuse");
    let node = node.clone();
    node.clone().tasks.spawn(async move {
        // Any reason may be a manager's too.
        kernel.update_record(|record| record.condemned = true);
        if let Err(err) = destroy::destroy(&node, id, kernel.session, reason, false).await {
            tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error, "cannot destroy a kernel");
        }
    });
}

/// Waits for the writers' lock. Blocks.
fn lock(directory: &Path, wait: Duration) -> Result<fs::File, AbuseError> {
    let path = directory.join("report.lock");
    let failed = |source| AbuseError::Lock {
        path: path.clone(),
        source,
    };
    let file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .map_err(failed)?;
    let until = std::time::Instant::now() + wait;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if std::time::Instant::now() < until => {
                std::thread::sleep(LOCK_PAUSE);
            }
            Err(Errno::WOULDBLOCK) => return Err(AbuseError::Held { path: path.clone() }),
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// The reports that can be read, by file. Blocks.
fn read(directory: &Path) -> Result<Vec<(PathBuf, Report)>, AbuseError> {
    let failed = |source| AbuseError::Directory {
        path: directory.to_owned(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)?.take(MOST_FILES) {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let named = name
            .to_str()
            .is_some_and(|name| name.starts_with("report.") && name.ends_with(".json"));
        if named {
            // One that is gone meanwhile is said so below.
            let written = entry.metadata().and_then(|facts| facts.modified()).ok();
            files.push((written, entry.path()));
        }
    }
    if files.len() > MOST {
        tracing::warn!(path = %directory.display(), reports = files.len(), read = MOST,
            "there are more abuse reports than are read; remove old ones");
        files.sort_by(|one, other| other.cmp(one));
        files.truncate(MOST);
    }
    let mut reports = Vec::new();
    for (_, path) in files {
        match read_one(&path) {
            Ok(report) => reports.push((path, report)),
            Err(err) => {
                tracing::warn!(path = %path.display(), %err, "an abuse report cannot be read");
            }
        }
    }
    reports.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(reports)
}

fn read_one(path: &Path) -> io::Result<Report> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let mut text = String::new();
    fs::File::open(path)?
        .take(LARGEST)
        .read_to_string(&mut text)?;
    serde_json::from_str(&text).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read_and_noise_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("report.2.json"), r#"{"ID": "k2", "CID": "c2"}"#).unwrap();
        fs::write(
            at("report.1.json"),
            r#"{"ID": "k1", "CID": "c1", "reason": "self-terminated"}"#,
        )
        .unwrap();
        fs::write(at("report.3.json"), "{").unwrap();
        fs::write(at("other.json"), "{}").unwrap();
        std::os::unix::fs::symlink(at("report.1.json"), at("report.4.json")).unwrap();
        let found = read(directory.path()).unwrap();
        let kernels: Vec<_> = found.iter().map(|(_, it)| it.kernel.as_str()).collect();
        assert_eq!(kernels, ["k1", "k2"]);
        assert_eq!(found[0].1.reason.as_deref(), Some("self-terminated"));
    }

    #[test]
    fn old_reports_do_not_hide_a_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: String| directory.path().join(name);
        let old = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        for number in 0..MOST {
            let file = fs::File::create(at(format!("report.{number:04}.json"))).unwrap();
            io::Write::write_all(&mut &file, br#"{"ID": "old", "CID": "c"}"#).unwrap();
            file.set_modified(old).unwrap();
            fs::write(at(format!("{number}.log")), "").unwrap();
        }
        fs::write(
            at("report.new.json".to_owned()),
            r#"{"ID": "new", "CID": "c"}"#,
        )
        .unwrap();
        let found = read(directory.path()).unwrap();
        assert_eq!(found.len(), MOST);
        assert!(found.iter().any(|(_, report)| report.kernel == "new"));
    }

    #[test]
    fn the_lock_of_the_writers_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let held = lock(directory.path(), Duration::ZERO).unwrap();
        let busy = lock(directory.path(), Duration::ZERO).unwrap_err();
        assert!(matches!(busy, AbuseError::Held { .. }), "{busy}");
        assert!(busy.to_string().contains("held the lock"), "{busy}");
        let place = directory.path().to_owned();
        let waiting = std::thread::spawn(move || lock(&place, Duration::from_secs(60)).is_ok());
        drop(held);
        assert!(waiting.join().unwrap());
    }

    #[test]
    fn a_directory_that_is_gone_is_not_told_as_a_lock_that_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let gone = directory.path().join("gone");
        let told = lock(&gone, Duration::from_secs(60)).unwrap_err();
        assert!(matches!(told, AbuseError::Lock { .. }), "{told}");
        let told = crate::causes::chain(&told);
        assert!(
            told.contains("No such file") && !told.contains("held"),
            "{told}"
        );
    }
}
