//! Scratch: the directories of a kernel on the host.
//!
//! In: a kernel id, the rules for owners, the files the request brings. Out:
//! `<root>/<kernel id>/{config,work}`, mounted at `/home/config` (read-only) and `/home/work`, and
//! beside it the parts of folders that are held for the engine and the mark of the agent it belongs
//! to. Invariants: no other user of the host reaches what is in a scratch, where secrets of requests lie, unless the
//! engine is such a user itself; a scratch that bears another agent's mark is never removed; a creation that fails
//! leaves nothing behind; a removal works from any partial state and never enters a mount; nothing is written through what the kernel's user
//! put into `work`; no call blocks an async worker, and each has a deadline; the work on one kernel's
//! scratch is done by one thread at a time, also when nobody waits for it any more: a disk that hangs
//! keeps no more threads than kernels, and what comes late meets nothing that was made after it.

pub mod beneath;
mod contents;
mod storage;
mod subpaths;

pub use contents::{ClusterFiles, ConfigFiles, NewScratch, validate_dotfiles};
pub use subpaths::Subpath;

use crate::kernel::environment::Identity;
use config::ScratchType;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// Where one kernel's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScratchPaths {
    /// `<scratch-root>/<kernel id>`.
    pub root: PathBuf,
    /// Mounted read-only at `/home/config`.
    pub config: PathBuf,
    /// Mounted at `/home/work`.
    pub work: PathBuf,
    /// Mounted at `/tmp`, for memory scratches.
    pub tmp: Option<PathBuf>,
}

impl ScratchPaths {
    /// The paths of a kernel below a scratch root.
    pub fn new(scratch_root: &Path, kernel_id: Uuid, in_memory: bool) -> Self {
        let root = scratch_root.join(kernel_id.to_string());
        Self {
            config: root.join("config"),
            work: root.join("work"),
            tmp: in_memory.then(|| scratch_root.join(format!("{kernel_id}_tmp"))),
            root,
        }
    }
}

/// What a scratch is made of (`container.scratch-type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScratchKind {
    /// Plain directories; the disk has no limit per kernel.
    HostDir,
    /// A file system of this many bytes in a sparse file.
    HostFile { size: u64 },
    /// A tmpfs of this many bytes, and another one for `/tmp`.
    Memory { size: u64 },
}

impl ScratchKind {
    /// Size of each tmpfs in the original.
    pub const MEMORY_SIZE: u64 = 64 << 20;

    /// From `container.scratch-type`; `size` is `container.scratch-size` in bytes, for `hostfile`.
    pub fn of(kind: ScratchType, size: u64) -> Self {
        match kind {
            // No configuration with `k8s-nfs` is accepted.
            ScratchType::Hostdir | ScratchType::K8sNfs => Self::HostDir,
            ScratchType::Hostfile => Self::HostFile { size },
            ScratchType::Memory => Self::Memory {
                size: Self::MEMORY_SIZE,
            },
        }
    }

    fn in_memory(self) -> bool {
        matches!(self, Self::Memory { .. })
    }
}

/// Why a scratch can't be made, written or removed.
#[derive(Debug, Error)]
pub enum ScratchError {
    #[error(
        "{0} exists already and may hold what a user has made; remove it when no container has this kernel, then create the kernel again"
    )]
    Exists(PathBuf),
    #[error(
        "the scratch disk is full: {path} cannot be written; free space below the scratch root or enlarge it"
    )]
    Full {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} in the scratch cannot be made")]
    Make {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} in the scratch cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} in the scratch cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path}, which comes with the runner, cannot be read; run `bai-agent runner verify`")]
    Skeleton {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} cannot be mounted; a memory or file scratch needs root on the host")]
    Mount {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "{path}, a part of a folder, cannot be held for the engine; the agent must be root on this host, and no link in it may lead out of its folder"
    )]
    Hold {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("`{command}` cannot be started; install its package on this node")]
    StartTool {
        command: String,
        #[source]
        cause: io::Error,
    },
    #[error("`{command}` failed: {told}")]
    Tool { command: String, told: String },
    #[error("{path} cannot be unmounted")]
    Unmount {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} cannot be removed")]
    Remove {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "the dotfile {0:?} cannot be placed: use a path below /home/work, or one relative to it"
    )]
    DotfilePath(String),
    #[error("the dotfile {path:?} has the mode {mode:?}, which is not an octal number up to 777")]
    DotfileMode { path: String, mode: String },
    #[error(
        "the work on the scratch of kernel {kernel_id} took longer than {limit:?}; the disk of the scratch root may hang"
    )]
    Timeout { kernel_id: Uuid, limit: Duration },
    #[error("the scratch work of kernel {0} was given up")]
    Abandoned(Uuid),
}

impl ScratchError {
    /// Whether the disk had no space or quota left.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// A failed write, told as a full disk where it is one.
    pub(self) fn write(path: &Path, cause: io::Error) -> Self {
        Self::full_or(path, cause, |path, cause| Self::Write { path, cause })
    }

    pub(self) fn make(path: &Path, cause: io::Error) -> Self {
        Self::full_or(path, cause, |path, cause| Self::Make { path, cause })
    }

    fn full_or(path: &Path, cause: io::Error, other: fn(PathBuf, io::Error) -> Self) -> Self {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        let path = path.to_owned();
        match cause.kind() {
            StorageFull | QuotaExceeded => Self::Full { path, cause },
            _ => other(path, cause),
        }
    }
}

/// The scratches of a node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Scratch {
    root: Arc<Path>,
    kind: ScratchKind,
    limit: Duration,
    owner: Option<Arc<str>>,
    /// Whether everybody on the host may walk through a kernel's directory, as who starts its container does.
    open: Arc<AtomicBool>,
    turns: Arc<Mutex<KernelLocks>>,
}

/// Whose turn it is at each kernel's scratch; nothing of those nobody works on.
type KernelLocks = HashMap<Uuid, Weak<tokio::sync::Mutex<()>>>;

impl Scratch {
    /// Scratches below `root` (`container.scratch-root`, made when needed); `limit` is the deadline
    /// of each call.
    pub fn new(root: impl Into<PathBuf>, kind: ScratchKind, limit: Duration) -> Self {
        Self {
            root: Arc::from(root.into()),
            kind,
            limit,
            owner: None,
            open: Arc::default(),
            turns: Arc::default(),
        }
    }

    /// Lets what is made be walked through by everybody on the host while that is so, for an engine that is
    /// not root there.
    #[must_use]
    pub fn open_to_engine(mut self, open: Arc<AtomicBool>) -> Self {
        self.open = open;
        self
    }

    /// Of a kernel's directory that is made now.
    fn mode(&self) -> u32 {
        match self.open.load(Ordering::Relaxed) {
            true => 0o711,
            false => 0o700,
        }
    }

    /// Marks what is made from now on as this agent's, and leaves alone what is another one's.
    #[must_use]
    pub fn of_agent(mut self, agent_id: &str) -> Self {
        self.owner = Some(agent_id.into());
        self
    }

    fn turn(&self, kernel_id: Uuid) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turn) = turns.get(&kernel_id).and_then(Weak::upgrade) {
            return turn;
        }
        turns.retain(|_, turn| turn.strong_count() > 0);
        let turn = Arc::default();
        turns.insert(kernel_id, Arc::downgrade(&turn));
        turn
    }

    /// Where a kernel's files are or will be.
    pub fn paths(&self, kernel_id: Uuid) -> ScratchPaths {
        ScratchPaths::new(&self.root, kernel_id, self.kind.in_memory())
    }

    /// Makes a kernel's scratch with everything in it that does not depend on the allocation.
    ///
    /// # Errors
    /// Anything; whatever was made is removed again, also when the deadline has passed or the
    /// caller gave up. [`ScratchError::Exists`] leaves what is there alone.
    pub async fn create(
        &self,
        kernel_id: Uuid,
        new: NewScratch,
    ) -> Result<ScratchPaths, ScratchError> {
        let (root, kind, limit) = (self.root.clone(), self.kind, self.limit);
        let (owner, mode) = (self.owner.clone(), self.mode());
        let paths = self.paths(kernel_id);
        self.blocking(kernel_id, move |state| {
            storage::make(&root, kernel_id, kind, mode, limit, owner.as_deref())?;
            let filled = contents::fill(&paths, &new).and_then(|()| match state.finish() {
                true => Ok(paths),
                false => Err(ScratchError::Abandoned(kernel_id)),
            });
            if filled.is_err() {
                storage::undo(&root, kernel_id);
            }
            filled
        })
        .await
    }

    /// Puts the user's keys and dotfiles, the registry's credentials and the cluster's files back as the
    /// request has them, where they were changed or are gone, with the modes of the keys and of `.ssh`, which
    /// sshd looks at; a key `.ssh/id_rsa` that is there stays. What
    /// can't be written (the user may have put anything there) is told in the log only.
    ///
    /// # Errors
    /// The scratch is not there, or the deadline has passed.
    pub async fn renew(&self, kernel_id: Uuid, new: NewScratch) -> Result<(), ScratchError> {
        let paths = self.paths(kernel_id);
        let failed = self.blocking(kernel_id, move |_| contents::renew(&paths, &new));
        for err in failed.await? {
            tracing::warn!(%kernel_id, err = &err as &dyn std::error::Error,
                "a file that the request brings is not put back at the restart of a kernel");
        }
        Ok(())
    }

    /// Writes what depends on the allocation: `environ.txt`, `resource.txt`, their `_base` copies,
    /// the directories of device plugins, the ports of a host-network kernel.
    ///
    /// # Errors
    /// A file can't be written, or the deadline has passed.
    pub async fn write_config(
        &self,
        kernel_id: Uuid,
        files: ConfigFiles,
    ) -> Result<(), ScratchError> {
        let paths = self.paths(kernel_id);
        self.blocking(kernel_id, move |_| {
            contents::write_config(&paths.config, &files)
        })
        .await
    }

    /// Mounts parts of folders where no user can replace them; their paths, in order. They stay until
    /// the scratch is removed, or the next call.
    ///
    /// # Errors
    /// One of them is not there, leads out of its folder or can't be mounted, or the deadline has
    /// passed; none is held then.
    pub async fn hold(
        &self,
        kernel_id: Uuid,
        parts: Vec<Subpath>,
    ) -> Result<Vec<PathBuf>, ScratchError> {
        let (root, mode) = (self.root.clone(), self.mode());
        self.blocking(kernel_id, move |state| {
            let paths = subpaths::hold(&root, kernel_id, mode, &parts)?;
            match state.finish() {
                true => Ok(paths),
                false => {
                    subpaths::release(&root, kernel_id)?;
                    Err(ScratchError::Abandoned(kernel_id))
                }
            }
        })
        .await
    }

    /// Notes the container's id in `resource.txt`, as its only `CID` line.
    ///
    /// # Errors
    /// The file can't be read or written, or the deadline has passed.
    pub async fn record_container(
        &self,
        kernel_id: Uuid,
        container_id: String,
    ) -> Result<(), ScratchError> {
        let paths = self.paths(kernel_id);
        self.blocking(kernel_id, move |_| {
            contents::record_container(&paths.config, &container_id)
        })
        .await
    }

    /// Reads a file of the config directory, such as `resource.txt`; nothing if it is not there.
    ///
    /// # Errors
    /// It can't be read, or the deadline has passed.
    pub async fn read_config(
        &self,
        kernel_id: Uuid,
        name: &'static str,
    ) -> Result<Option<String>, ScratchError> {
        let directory = self.paths(kernel_id).config;
        self.read_config_of(kernel_id, directory, name).await
    }

    /// The same of a config directory in another place.
    ///
    /// # Errors
    /// As [`Scratch::read_config`].
    pub async fn read_config_of(
        &self,
        kernel_id: Uuid,
        directory: PathBuf,
        name: &'static str,
    ) -> Result<Option<String>, ScratchError> {
        let path = directory.join(name);
        self.blocking(kernel_id, move |_| match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(ScratchError::Read { path, cause }),
        })
        .await
    }

    /// Reads such a file whole, if it is there, as long as `limit` at most and nobody else can have
    /// written it.
    ///
    /// # Errors
    /// It can't be read, is longer or open to others, or the deadline has passed.
    pub async fn read_own_config(
        &self,
        kernel_id: Uuid,
        name: &'static str,
        limit: u64,
    ) -> Result<Option<Vec<u8>>, ScratchError> {
        let path = self.paths(kernel_id).config.join(name);
        self.blocking(kernel_id, move |_| match contents::read_own(&path, limit) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(ScratchError::Read { path, cause }),
        })
        .await
    }

    /// Removes a kernel's scratch, whatever state and kind it has. Removing nothing is success, and so
    /// is to leave another agent's alone (whose kernel of this id was asked of this one, too).
    ///
    /// # Errors
    /// Something can't be unmounted or removed, or the deadline has passed; the removal then goes
    /// on in the background, and another call waits for it and finds what is left.
    pub async fn remove(&self, kernel_id: Uuid) -> Result<(), ScratchError> {
        let (root, ours) = (self.root.clone(), self.owner.clone());
        self.blocking(kernel_id, move |_| {
            if let (Some(ours), Some(owner)) = (ours, storage::owner(&root, kernel_id)?)
                && *ours != *owner
            {
                tracing::warn!(%kernel_id, owner, "the scratch of a kernel is another agent's and stays");
                return Ok(());
            }
            storage::remove(&root, kernel_id)
        })
        .await
    }

    /// Marks the scratch of a kernel of this agent, if it has one that nobody has marked.
    ///
    /// # Errors
    /// The mark can't be read or written, or the deadline has passed.
    pub async fn claim(&self, kernel_id: Uuid) -> Result<(), ScratchError> {
        let (root, owner) = (self.root.clone(), self.owner.clone());
        self.blocking(kernel_id, move |_| match owner {
            Some(owner) => storage::claim(&root, kernel_id, &owner),
            None => Ok(()),
        })
        .await
    }

    /// The id of the agent that made a kernel's scratch. `None` when nobody says: the Python agent and
    /// releases before this one left no mark.
    ///
    /// # Errors
    /// The mark can't be read, or the deadline has passed.
    pub async fn owner(&self, kernel_id: Uuid) -> Result<Option<String>, ScratchError> {
        let root = self.root.clone();
        self.blocking(kernel_id, move |_| storage::owner(&root, kernel_id))
            .await
    }

    /// The kernels that have anything in the scratch root, also partial scratches.
    ///
    /// # Errors
    /// The root can't be listed, or the deadline has passed.
    pub async fn list(&self) -> Result<Vec<Uuid>, ScratchError> {
        let root = self.root.clone();
        self.blocking(Uuid::nil(), move |_| storage::list(&root))
            .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        kernel_id: Uuid,
        work: impl FnOnce(&WorkState) -> Result<T, ScratchError> + Send + 'static,
    ) -> Result<T, ScratchError> {
        let state = Arc::new(WorkState::default());
        // Dropped when the caller gives up, too.
        let waiter = Waiter(state.clone());
        let turn = self.turn(kernel_id);
        let task = async move {
            let turn = turn.lock_owned().await;
            let done = tokio::task::spawn_blocking(move || {
                let result = work(&state);
                state.finish();
                drop(turn);
                result
            });
            done.await
        };
        match tokio::time::timeout(self.limit, task).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ScratchError::Abandoned(kernel_id)),
            Err(_) => {
                drop(waiter);
                Err(ScratchError::Timeout {
                    kernel_id,
                    limit: self.limit,
                })
            }
        }
    }
}

/// Whether somebody still waits for a piece of blocking work: the first of the two sides to say
/// so decides, so that a scratch made too late is removed by the one who made it.
#[derive(Debug, Default)]
struct WorkState(AtomicU8);

const RUNNING: u8 = 0;
const FINISHED: u8 = 1;
const ABANDONED: u8 = 2;

impl WorkState {
    /// Called by the worker; false if nobody waits any more.
    fn finish(&self) -> bool {
        let swap = self
            .0
            .compare_exchange(RUNNING, FINISHED, Ordering::AcqRel, Ordering::Acquire);
        swap.unwrap_or_else(|now| now) != ABANDONED
    }
}

struct Waiter(Arc<WorkState>);

impl Drop for Waiter {
    fn drop(&mut self) {
        let state = &self.0.0;
        let _ = state.compare_exchange(RUNNING, ABANDONED, Ordering::AcqRel, Ordering::Acquire);
    }
}

impl From<Identity> for beneath::Owner {
    fn from(identity: Identity) -> Self {
        Self {
            uid: identity.uid,
            gid: identity.gid,
        }
    }
}

#[cfg(test)]
mod tests;
