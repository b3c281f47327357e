//! The consoles of kernels that have ended, kept for a while.
//!
//! In: the last log of a container before it is removed. Out: the text for `get_logs` and the
//! command line, and which of them the manager has not been given yet. Invariants: at most `keep`
//! consoles of `room` bytes together, the newest, and before others those the manager has not been given; each
//! whole (written aside, renamed) and readable by the agent's user only;
//! beside a console of a cluster lies one empty file for each container, whose name says how far it
//! has come on its way to the manager and which goes with the console.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use shared::ids::{ContainerId, KernelId};
use thiserror::Error;

use crate::files::{plain_name, replace_file};

/// How many consoles are kept.
pub const KEEP: usize = 256;

/// Bytes they may take together; the newest is kept whatever it takes. They lie beside the journal.
const ROOM: u64 = 1 << 30;

/// A step on the kept logs failed.
#[derive(Debug, Error)]
#[error("cannot {step} {path}")]
pub struct KeptLogsError {
    step: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// How far the console of a container has come on its way to the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shipping {
    /// The manager has not been told of it.
    Unsent,
    /// The manager is being told: when this is found at a start, it may have been.
    Announcing,
    /// The bus refuses it. The next life of the agent tries again.
    Refused,
    /// The manager was told.
    Sent,
}

impl Shipping {
    const ALL: [Shipping; 4] = [
        Shipping::Unsent,
        Shipping::Announcing,
        Shipping::Refused,
        Shipping::Sent,
    ];

    fn word(self) -> &'static str {
        match self {
            Shipping::Unsent => "unsent",
            Shipping::Announcing => "announcing",
            Shipping::Refused => "refused",
            Shipping::Sent => "sent",
        }
    }
}

/// The directory of kept consoles.
#[derive(Clone, Debug)]
pub struct KeptLogs {
    dir: PathBuf,
    keep: usize,
    room: u64,
    /// Shared by those that store, alone for who drops: a console is not seen without its mark.
    clearing: Arc<RwLock<()>>,
}

impl KeptLogs {
    /// Prepares `<var-base-path>/logs/<agent id>`.
    ///
    /// # Errors
    /// The directory cannot be made or read.
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
        Ok(KeptLogs {
            dir,
            keep: KEEP,
            room: ROOM,
            clearing: Arc::default(),
        })
    }

    fn path(&self, kernel: KernelId) -> PathBuf {
        self.dir.join(format!("{kernel}.log"))
    }

    /// Keeps the console of a kernel and drops the oldest ones, those that were shipped first. Blocks.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self, kernel: KernelId, text: &str) -> Result<(), KeptLogsError> {
        self.store_marked(kernel, None, text).map(|_| ())
    }

    /// The same, marked to be shipped as the console of a container; answers as [`KeptLogs::to_ship`].
    /// Blocks.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store_to_ship(
        &self,
        kernel: KernelId,
        container: ContainerId,
        text: &str,
    ) -> Result<Shipping, KeptLogsError> {
        let shipping = self.store_marked(kernel, Some(container), text)?;
        Ok(shipping.unwrap_or(Shipping::Unsent))
    }

    fn store_marked(
        &self,
        kernel: KernelId,
        container: Option<ContainerId>,
        text: &str,
    ) -> Result<Option<Shipping>, KeptLogsError> {
        let path = self.path(kernel);
        let storing = self.clearing.read().unwrap_or_else(PoisonError::into_inner);
        replace_file(&path, text.as_bytes()).map_err(|source| KeptLogsError {
            step: "write",
            path,
            source,
        })?;
        // Not before: a mark found at the next start is of what is there.
        let shipping = container
            .map(|container| self.to_ship(kernel, container))
            .transpose()?;
        drop(storing);
        let _clearing = self
            .clearing
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        self.drop_oldest(kernel).map_err(|source| KeptLogsError {
            step: "clear out",
            path: self.dir.clone(),
            source,
        })?;
        Ok(shipping)
    }

    /// How many consoles of `size` bytes each may wait to be shipped with none of them dropped.
    #[must_use]
    pub fn waiting_room(&self, size: u64) -> usize {
        let by_size = self.room.checked_div(size).unwrap_or(u64::MAX);
        self.keep
            .min(usize::try_from(by_size).unwrap_or(usize::MAX))
    }

    /// The console of a kernel, when it is still kept. Blocks.
    pub fn load(&self, kernel: KernelId) -> Option<String> {
        let bytes = fs::read(self.path(kernel)).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Notes that the console of a container has to be shipped; how far it has come already is
    /// kept, for an ending may be tried several times. Blocks.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn to_ship(
        &self,
        kernel: KernelId,
        container: ContainerId,
    ) -> Result<Shipping, KeptLogsError> {
        if let Some(shipping) = self.shipping(kernel, container) {
            return Ok(shipping);
        }
        let path = self.mark(kernel, container, Shipping::Unsent);
        fs::OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| KeptLogsError {
                step: "write",
                path,
                source,
            })?;
        Ok(Shipping::Unsent)
    }

    /// How far a console has come; `None` when it is not to be shipped. Blocks.
    pub fn shipping(&self, kernel: KernelId, container: ContainerId) -> Option<Shipping> {
        Shipping::ALL
            .into_iter()
            .find(|shipping| self.mark(kernel, container, *shipping).exists())
    }

    /// Notes a step on the way. Blocks.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set_shipping(
        &self,
        kernel: KernelId,
        container: ContainerId,
        shipping: Shipping,
    ) -> Result<(), KeptLogsError> {
        let to = self.mark(kernel, container, shipping);
        let failed = |source| KeptLogsError {
            step: "rename a mark to",
            path: to.clone(),
            source,
        };
        match self.shipping(kernel, container) {
            Some(now) if now != shipping => {
                fs::rename(self.mark(kernel, container, now), &to).map_err(failed)
            }
            // Without a mark the console is gone, and the mark with it.
            _ => Ok(()),
        }
    }

    /// What is still to be shipped, oldest first. Blocks.
    pub fn unshipped(&self) -> Vec<(KernelId, ContainerId)> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(mark) = name.to_str().and_then(mark_of) else {
                continue;
            };
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            if let (mark, Shipping::Unsent | Shipping::Announcing | Shipping::Refused) = mark
                && let Ok(modified) = modified
            {
                found.push((modified, mark));
            }
        }
        found.sort_by_key(|(modified, _)| *modified);
        found.into_iter().map(|(_, mark)| mark).collect()
    }

    fn mark(&self, kernel: KernelId, container: ContainerId, shipping: Shipping) -> PathBuf {
        self.dir
            .join(format!("{kernel}.{container}.{}", shipping.word()))
    }

    /// `newest` stays, whether it has a mark or not.
    fn drop_oldest(&self, newest: KernelId) -> io::Result<()> {
        let mut consoles: Vec<(SystemTime, u64, String)> = Vec::new();
        let mut others = Vec::new();
        let mut waiting = HashSet::from([newest.to_string()]);
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((kernel, rest)) = name.to_str().and_then(|name| name.split_once('.')) else {
                continue;
            };
            if rest != "log" {
                if name
                    .to_str()
                    .and_then(mark_of)
                    .is_some_and(|(_, it)| matches!(it, Shipping::Unsent | Shipping::Announcing))
                {
                    waiting.insert(kernel.to_owned());
                }
                others.push((kernel.to_owned(), entry.path()));
                continue;
            }
            // A file that vanishes meanwhile was dropped by another clean-up.
            if let Ok(metadata) = entry.metadata()
                && let Ok(modified) = metadata.modified()
            {
                consoles.push((modified, metadata.len(), kernel.to_owned()));
            }
        }
        let newest = newest.to_string();
        consoles.sort_by_cached_key(|(modified, _, kernel)| {
            (*kernel == newest, waiting.contains(kernel), *modified)
        });
        let mut taken = 0;
        let kept = |(number, (_, size, _)): &(usize, &(SystemTime, u64, String))| {
            taken += size;
            *number == 0 || (*number < self.keep && taken <= self.room)
        };
        let kept = consoles.iter().rev().enumerate().take_while(kept).count();
        consoles.truncate(consoles.len() - kept);
        if consoles.is_empty() {
            return Ok(());
        }
        let gone: HashSet<String> = consoles.into_iter().map(|(_, _, kernel)| kernel).collect();
        let others = others
            .into_iter()
            .filter(|(kernel, _)| gone.contains(kernel))
            .map(|(_, path)| path);
        let logs = gone
            .iter()
            .map(|kernel| self.dir.join(format!("{kernel}.log")));
        for path in logs.chain(others) {
            match fs::remove_file(path) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                _ => {}
            }
        }
        Ok(())
    }
}

/// What the name of a mark tells.
fn mark_of(name: &str) -> Option<((KernelId, ContainerId), Shipping)> {
    let mut parts = name.split('.');
    let kernel = parts.next()?.parse().ok()?;
    let container = parts.next()?.parse().ok()?;
    let word = parts.next()?;
    let shipping = Shipping::ALL
        .into_iter()
        .find(|shipping| shipping.word() == word)?;
    parts
        .next()
        .is_none()
        .then_some(((kernel, container), shipping))
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

    #[test]
    fn big_consoles_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut logs = KeptLogs::open(dir.path(), "i-node").unwrap();
        logs.room = 25;
        let store = |n: u8, text: &str| {
            logs.store(KernelId([n; 16]), text).unwrap();
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(n));
            let file = fs::File::options()
                .append(true)
                .open(logs.path(KernelId([n; 16])));
            file.unwrap().set_modified(at).unwrap();
        };
        let kept = |n: u8| logs.load(KernelId([n; 16])).is_some();
        for n in 1..=3 {
            store(n, "0123456789");
        }
        assert_eq!([1, 2, 3].map(kept), [false, true, true]);
        store(4, "012");
        assert_eq!([2, 3, 4].map(kept), [true, true, true]);
        store(5, &"0".repeat(99));
        assert_eq!([2, 3, 4, 5].map(kept), [false, false, false, true]);
    }

    #[test]
    fn a_console_that_was_shipped_goes_before_one_that_was_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut logs = KeptLogs::open(dir.path(), "i-node").unwrap();
        logs.keep = 2;
        let store = |n: u8, shipping: Shipping| {
            let (kernel, container) = (KernelId([n; 16]), ContainerId([n; 32]));
            logs.store(kernel, "0123456789").unwrap();
            logs.to_ship(kernel, container).unwrap();
            logs.set_shipping(kernel, container, shipping).unwrap();
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(n));
            let file = fs::File::options().append(true).open(logs.path(kernel));
            file.unwrap().set_modified(at).unwrap();
        };
        let kept = |n: u8| logs.load(KernelId([n; 16])).is_some();
        store(1, Shipping::Unsent);
        store(2, Shipping::Sent);
        store(3, Shipping::Announcing);
        assert_eq!([1, 2, 3].map(kept), [true, false, true]);
        // What has to be dropped is the oldest, and never the one that is being kept.
        store(4, Shipping::Sent);
        assert_eq!([1, 3, 4].map(kept), [false, true, true]);
        assert_eq!(logs.waiting_room(1 << 29), 2);
        assert_eq!(logs.waiting_room(1 << 30), 1);
        assert_eq!(logs.waiting_room(0), 2);
    }

    #[test]
    fn marks_say_what_is_to_be_shipped_and_go_with_the_console() {
        let dir = tempfile::tempdir().unwrap();
        let mut logs = KeptLogs::open(dir.path(), "i-node").unwrap();
        logs.keep = 2;
        let (kernel, container) = (|n| KernelId([n; 16]), |n| ContainerId([n; 32]));
        for n in 1..=2u8 {
            logs.store(kernel(n), "console").unwrap();
            let shipping = logs.to_ship(kernel(n), container(n)).unwrap();
            assert_eq!(shipping, Shipping::Unsent);
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(u64::from(n));
            for path in [
                logs.path(kernel(n)),
                logs.mark(kernel(n), container(n), Shipping::Unsent),
            ] {
                let file = fs::File::options().append(true).open(path).unwrap();
                file.set_modified(at).unwrap();
            }
        }
        // A restarted kernel has one more container.
        logs.to_ship(kernel(2), container(9)).unwrap();
        logs.set_shipping(kernel(2), container(9), Shipping::Sent)
            .unwrap();
        logs.set_shipping(kernel(2), container(2), Shipping::Announcing)
            .unwrap();
        let both = [(kernel(1), container(1)), (kernel(2), container(2))];
        assert_eq!(logs.unshipped(), both);
        // An ending that is tried again sends nothing twice.
        let again = logs.to_ship(kernel(2), container(9)).unwrap();
        assert_eq!(again, Shipping::Sent);
        let again = logs.to_ship(kernel(2), container(2)).unwrap();
        assert_eq!(again, Shipping::Announcing);
        logs.store(kernel(3), "console").unwrap();
        assert_eq!(logs.unshipped(), both[1..]);
        assert_eq!(logs.shipping(kernel(1), container(1)), None);
        logs.set_shipping(kernel(1), container(1), Shipping::Sent)
            .unwrap();
        assert_eq!(logs.shipping(kernel(1), container(1)), None, "came back");
        assert_eq!(logs.load(kernel(1)), None);
    }

    /// A mark without its console would be of another one, found at the next start.
    #[test]
    fn what_could_not_be_stored_is_not_marked() {
        let dir = tempfile::tempdir().unwrap();
        let logs = KeptLogs::open(dir.path(), "i-node").unwrap();
        let (kernel, container) = (KernelId([1; 16]), ContainerId([1; 32]));
        std::fs::create_dir_all(logs.path(kernel).join("in the way")).unwrap();
        assert!(logs.store_to_ship(kernel, container, "console").is_err());
        assert!(logs.unshipped().is_empty());
        std::fs::remove_dir_all(logs.path(kernel)).unwrap();
        let shipping = logs.store_to_ship(kernel, container, "console").unwrap();
        assert_eq!(shipping, Shipping::Unsent);
        assert_eq!(logs.unshipped(), [(kernel, container)]);
        assert_eq!(logs.load(kernel).as_deref(), Some("console"));
    }
}
