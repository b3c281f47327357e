//! What the node remembers of its kernels: one JSON file per kernel.
//!
//! In: a record at each transition. Out: the records found at start. Files live in
//! `<var-base-path>/kernels/<agent id>/<kernel id>.json`, mode 0600 (they hold the request, with the
//! session's private keys), in a directory of mode 0700; never in the scratch, which is mounted
//! into the container. The ends of kernels lie beside them in `ended/<agent id>`, in the same form, and
//! in `commits/<agent id>` what commits under way may leave behind, by the commit's own id.
//! What cannot be read is put aside as `*.damaged`; of those, a bounded number is kept.
//!
//! Invariant: a file is always whole. It is written under another name, its bytes are flushed to
//! the disk (`fdatasync`), then it is renamed over the old one. The directory itself is not
//! flushed: after a power loss the version before may come back, or none, and both are fine, since
//! no container survives a power loss running and Docker and the labels say the rest. A kill of
//! this process loses nothing: the rename is in the kernel's hands.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shared::ids::KernelId;
use thiserror::Error;

use crate::files::{plain_name, replace_file};

/// How many records that were put aside in earlier lives are kept.
pub(super) const DAMAGED_KEPT: usize = 256;

/// Layout of the records. A record of another layout counts as one that cannot be read: it is put aside
/// and reported, and its kernel, if it runs, is adopted from Docker's labels.
pub const VERSION: u32 = 1;

/// A step on the journal failed.
#[derive(Debug, Error)]
pub enum JournalError {
    /// The directory could not be made or read.
    #[error("cannot prepare the journal directory {path}")]
    Directory {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A record could not be written.
    #[error("cannot write the journal file {path}")]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A record could not be removed.
    #[error("cannot remove the journal file {path}")]
    Remove {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A record could not be turned into JSON.
    #[error("cannot encode the journal record of kernel {kernel_id}")]
    Encode {
        /// Which.
        kernel_id: KernelId,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A record that cannot be used. It is put aside, not deleted.
#[derive(Debug)]
pub struct Damaged {
    /// Where it lies now.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: Unusable,
}

/// What is wrong with a record.
#[derive(Debug, Error)]
pub enum Unusable {
    /// The disk does not give it.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// It is no JSON, or not of a record.
    #[error(transparent)]
    Decode(#[from] serde_json::Error),
    /// Another layout than [`VERSION`].
    #[error("layout version {0} is not {VERSION}")]
    Version(u64),
    /// It names no layout.
    #[error("no layout version")]
    NoVersion,
    /// It can be read, and not be of this place.
    #[error("{0}")]
    Senseless(&'static str),
}

/// How far the kernel had come when the record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Scratch is being filled; there may be no container.
    Files,
    /// The container was asked for; it has not been started.
    Container,
    /// The container was started; the runner has not answered.
    Started,
    /// In service.
    Running,
    /// The old container is being replaced.
    Restarting,
    /// Being stopped and removed.
    Ending,
}

/// The end that was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEnding {
    /// The reason for the manager.
    pub reason: String,
    /// No event.
    pub suppress: bool,
    /// The container's exit code, when known.
    pub exit_code: Option<i64>,
}

/// Writes, reads and removes records of type `R`.
#[derive(Clone, Debug)]
pub struct Journal {
    dir: PathBuf,
    /// Held while the assigned ports are read from the pool and written.
    assigned: Arc<Mutex<()>>,
}

impl Journal {
    /// Prepares the directory for one agent. `agent_id` must be a plain name.
    ///
    /// # Errors
    /// The directory cannot be prepared.
    pub fn open(var_base: &Path, agent_id: &str) -> Result<Journal, JournalError> {
        Self::open_dir(var_base.join("kernels").join(plain_name(agent_id)))
    }

    /// The same for the ends of kernels.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_ends(var_base: &Path, agent_id: &str) -> Result<Journal, JournalError> {
        Self::open_dir(var_base.join("ended").join(plain_name(agent_id)))
    }

    /// The same for what commits under way may leave behind.
    ///
    /// # Errors
    /// As for [`open`](Self::open).
    pub fn open_commits(var_base: &Path, agent_id: &str) -> Result<Journal, JournalError> {
        Self::open_dir(var_base.join("commits").join(plain_name(agent_id)))
    }

    fn open_dir(dir: PathBuf) -> Result<Journal, JournalError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|source| JournalError::Directory {
                path: dir.clone(),
                source,
            })?;
        Ok(Journal {
            dir,
            assigned: Arc::default(),
        })
    }

    /// Where the records lie.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, kernel_id: KernelId) -> PathBuf {
        self.dir.join(format!("{kernel_id}.json"))
    }

    /// Replaces the record of a kernel. Blocks for one flush of a small file.
    ///
    /// # Errors
    /// The file cannot be written; the one before stays.
    pub fn store<R: Serialize>(&self, kernel_id: KernelId, record: &R) -> Result<(), JournalError> {
        let bytes = serde_json::to_vec_pretty(&Versioned {
            version: VERSION,
            record,
        })
        .map_err(|source| JournalError::Encode { kernel_id, source })?;
        let path = self.path(kernel_id);
        replace_file(&path, &bytes).map_err(|source| JournalError::Write { path, source })
    }

    /// Removes the record of a kernel that holds nothing any more.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&self, kernel_id: KernelId) -> Result<(), JournalError> {
        let path = self.path(kernel_id);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Remove { path, source })
            }
            _ => Ok(()),
        }
    }

    /// Reads all records. What cannot be read is renamed to `*.damaged` and returned by name:
    /// one bad file must not keep the node from starting, and its kernel is still adopted from
    /// Docker's labels. Of those of earlier starts only the youngest stay.
    ///
    /// # Errors
    /// The directory cannot be read. Single files that cannot are told of.
    pub fn load<R: DeserializeOwned>(
        &self,
    ) -> Result<(BTreeMap<KernelId, R>, Vec<Damaged>), JournalError> {
        let failed = |source| JournalError::Directory {
            path: self.dir.clone(),
            source,
        };
        let mut records = BTreeMap::new();
        let mut damaged = Vec::new();
        let mut earlier = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            if name.ends_with(".new") {
                // A write that was cut short before its rename: the old record is still there.
                let _ = fs::remove_file(&path);
                continue;
            }
            if name.ends_with(".damaged") {
                earlier.push(path);
                continue;
            }
            let Some(kernel_id) = name
                .strip_suffix(".json")
                .and_then(|stem| stem.parse::<KernelId>().ok())
            else {
                continue;
            };
            match read_record(&path) {
                Ok(record) => {
                    records.insert(kernel_id, record);
                }
                Err(reason) => damaged.push(put_aside(path, reason)),
            }
        }
        // One that is damaged again has taken the place of the earlier one.
        earlier.retain(|path| damaged.iter().all(|new| new.path != *path));
        remove_oldest(earlier, DAMAGED_KEPT);
        Ok((records, damaged))
    }

    /// Puts a record aside that can be read and makes no sense.
    pub(super) fn put_aside(&self, kernel_id: KernelId, reason: &'static str) -> Damaged {
        put_aside(self.path(kernel_id), Unusable::Senseless(reason))
    }

    /// Remembers the ports that `assign_port` gave out, as they are at this writer's turn. Blocks.
    ///
    /// # Errors
    /// The file cannot be written; the one before stays.
    pub fn store_assigned_ports(
        &self,
        ports: impl FnOnce() -> Vec<u16>,
    ) -> Result<(), JournalError> {
        let _turn = self.assigned.lock().unwrap_or_else(PoisonError::into_inner);
        let ports = ports();
        let path = self.dir.join("assigned-ports");
        let text: String = ports.iter().map(|port| format!("{port}\n")).collect();
        replace_file(&path, text.as_bytes()).map_err(|source| JournalError::Write { path, source })
    }

    /// The ports that `assign_port` had given out; unreadable lines are skipped.
    pub fn load_assigned_ports(&self) -> Vec<u16> {
        fs::read_to_string(self.dir.join("assigned-ports"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect()
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<R> {
    version: u32,
    record: R,
}

fn read_record<R: DeserializeOwned>(path: &Path) -> Result<R, Unusable> {
    let value: serde_json::Value = serde_json::from_slice(&fs::read(path)?)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => return Err(Unusable::Version(version)),
        None => return Err(Unusable::NoVersion),
    }
    let Versioned { record, .. } = serde_json::from_value(value)?;
    Ok(record)
}

fn put_aside(path: PathBuf, reason: Unusable) -> Damaged {
    let aside = path.with_extension("damaged");
    let path = match fs::rename(&path, &aside) {
        Ok(()) => aside,
        Err(_) => path,
    };
    Damaged { path, reason }
}

/// Removes all but the `kept` files that were written last.
fn remove_oldest(files: Vec<PathBuf>, kept: usize) {
    let surplus = files.len().saturating_sub(kept);
    if surplus == 0 {
        return;
    }
    let written = |path: &PathBuf| fs::metadata(path).and_then(|found| found.modified()).ok();
    let mut files: Vec<_> = files
        .into_iter()
        .map(|path| (written(&path), path))
        .collect();
    files.sort();
    for (_, path) in files.drain(..surplus) {
        // The next start tries again.
        let _ = fs::remove_file(&path);
    }
}

/// Seconds since the epoch, for records.
pub fn now_unix() -> f64 {
    crate::events::unix_seconds(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    type Journaled = BTreeMap<String, u32>;

    #[test]
    fn times_come_back_as_they_were() {
        for n in 0..1000_u32 {
            let at = 1_700_000_000.0 + f64::from(n) * 12_345.678_901_7;
            let text = serde_json::to_string(&at).unwrap();
            assert_eq!(serde_json::from_str::<f64>(&text).unwrap(), at, "{text}");
        }
    }

    fn record(n: u32) -> Journaled {
        BTreeMap::from([("n".to_owned(), n)])
    }

    fn id(n: u8) -> KernelId {
        KernelId([n; 16])
    }

    #[test]
    fn records_come_back_and_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "i-node").unwrap();
        journal.store(id(1), &record(1)).unwrap();
        journal.store(id(1), &record(2)).unwrap();
        journal.store(id(2), &record(3)).unwrap();
        journal.remove(id(2)).unwrap();
        journal.remove(id(2)).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&journal.path(id(1))), 0o600);
        assert_eq!(mode(journal.dir()), 0o700);
        let (records, damaged) = journal.load::<Journaled>().unwrap();
        assert_eq!(records, BTreeMap::from([(id(1), record(2))]));
        assert!(damaged.is_empty());
        assert_eq!(fs::read_dir(journal.dir()).unwrap().count(), 1);
    }

    #[test]
    fn damaged_and_foreign_files_do_not_stop_the_load() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "i-node").unwrap();
        journal.store(id(1), &record(1)).unwrap();
        fs::write(journal.path(id(2)), b"{\"version\":1,\"rec").unwrap();
        fs::write(journal.path(id(3)), b"{\"version\":2,\"record\":{}}").unwrap();
        fs::write(
            journal.path(id(4)),
            b"{\"version\":1,\"record\":{\"n\":\"x\"}}",
        )
        .unwrap();
        fs::write(journal.dir().join("notes.txt"), b"").unwrap();
        fs::write(journal.dir().join(format!("{}.json.1.new", id(1))), b"{").unwrap();
        let (records, mut damaged) = journal.load::<Journaled>().unwrap();
        assert_eq!(records.len(), 1);
        damaged.sort_by(|a, b| a.path.cmp(&b.path));
        assert_eq!(damaged.len(), 3);
        assert!(damaged.iter().all(|damaged| damaged.path.exists()));
        assert!(
            matches!(damaged[1].reason, Unusable::Version(2)),
            "{:?}",
            damaged[1].reason
        );
        // The second load is silent: they were put aside.
        let (records, damaged) = journal.load::<Journaled>().unwrap();
        assert_eq!((records.len(), damaged.len()), (1, 0));
        assert!(!journal.dir().join(format!("{}.json.1.new", id(1))).exists());
    }

    #[test]
    fn of_the_damaged_ones_of_earlier_starts_the_youngest_stay() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open_ends(dir.path(), "i-node").unwrap();
        let aside = |n: u64| journal.dir().join(format!("{n}.damaged"));
        let count = u64::try_from(DAMAGED_KEPT).unwrap() + 3;
        // Written in another order than they are listed or named.
        for n in (0..count).rev() {
            let file = fs::File::create(aside(n)).unwrap();
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + n);
            file.set_modified(at).unwrap();
        }
        fs::write(journal.path(id(1)), b"{").unwrap();
        let (_, damaged) = journal.load::<Journaled>().unwrap();
        assert!(damaged[0].path.exists(), "one that is reported can be seen");
        let left = || fs::read_dir(journal.dir()).unwrap().count();
        assert_eq!(left(), DAMAGED_KEPT + 1);
        let gone = (0..count).filter(|n| !aside(*n).exists());
        assert_eq!(gone.collect::<Vec<_>>(), [0, 1, 2]);
        // The next start has one more of earlier ones.
        journal.load::<Journaled>().unwrap();
        assert_eq!(left(), DAMAGED_KEPT);
        assert!(damaged[0].path.exists() && !aside(3).exists());
    }

    #[test]
    fn a_failed_write_leaves_the_old_record_and_no_remains() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "i-node").unwrap();
        // A directory in the way makes the rename fail after the bytes were written.
        fs::create_dir(journal.path(id(1))).unwrap();
        assert!(journal.store(id(1), &record(1)).is_err());
        assert_eq!(fs::read_dir(journal.dir()).unwrap().count(), 1);
    }

    #[test]
    fn assigned_ports_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path(), "i-node").unwrap();
        assert!(journal.load_assigned_ports().is_empty());
        journal.store_assigned_ports(|| vec![30000, 30007]).unwrap();
        assert_eq!(journal.load_assigned_ports(), vec![30000, 30007]);
        let (records, damaged) = journal.load::<Journaled>().unwrap();
        assert!(records.is_empty() && damaged.is_empty());
    }
}
