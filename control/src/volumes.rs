//! Volumes that this node mounts and unmounts on request.
//!
//! In: orders (the manager's `do_volume_mount`, `do_volume_unmount`). Out: a mounted or unmounted
//! directory, its line in the table of file systems if wanted, and where that is or why not.
//! Invariants: no shell, every word of the order is checked before it is used; only what the
//! operator allows (`node.volumes.allow`) is ever mounted; nothing is unmounted under a running
//! kernel; one order at a time, each within its deadline; an order that failed leaves the node as it
//! was, and one that was cut short leaves no volume mounted without its line; where volumes belong is asked of the cluster at each order, and never guessed.

mod fstab;
pub(crate) mod mount;
mod requests;

use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use config::{Config, Volumes as Settings};
use thiserror::Error;
use tokio::sync::Mutex;

use crate::blocking::blocking;
use crate::etcd::{Etcd, EtcdError};

pub use self::fstab::FstabError;
pub use self::requests::serve;

/// A volume to be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOrder {
    /// Name of the directory below the mount path.
    pub dir_name: String,
    /// What is mounted: `host:/export`, a device, a directory.
    pub location: String,
    /// Type of its file system.
    pub fs_type: String,
    /// Mount options, with commas.
    pub options: Option<String>,
    /// The table of file systems to note it in; none leaves the table alone.
    pub fstab: Option<PathBuf>,
}

/// A volume to be unmounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnmountOrder {
    /// Name of the directory below the mount path.
    pub dir_name: String,
    /// The table of file systems to take it out of.
    pub fstab: Option<PathBuf>,
}

/// Why an order was not carried out.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// The name is not one of a directory.
    #[error("the volume name {0:?} is not usable: letters, digits and . _ - : @ + are")]
    Name(String),
    /// The cluster does not say where volumes belong.
    #[error("cannot read where the cluster mounts volumes (volumes/_mount); see that etcd answers")]
    Prefix(#[source] EtcdError),
    /// The cluster says nonsense of where volumes belong.
    #[error(transparent)]
    PrefixPath(#[from] PrefixError),
    /// The options hold something that is not an option.
    #[error(
        "the mount options {0:?} cannot be used: up to 4096 letters, digits and =,._:/@%+-[] are, without - at the start"
    )]
    Options(String),
    /// The operator did not allow it.
    #[error(
        "{fs_type} volumes from {location:?} may not be mounted on this node; allow them with node.volumes.allow"
    )]
    NotAllowed {
        /// Type of file system.
        fs_type: String,
        /// What was to be mounted.
        location: String,
    },
    /// The operator did not allow that table to be looked at or changed.
    #[error("{0} may not be used on this node; allow it with node.volumes.fstab")]
    FstabNotAllowed(PathBuf),
    /// Something else is mounted there.
    #[error("{path} holds another volume already: {found}")]
    Taken {
        /// Where.
        path: PathBuf,
        /// What.
        found: String,
    },
    /// A kernel uses it.
    #[error("the volume at {path} is used by kernel {kernel}; end its session first")]
    InUse {
        /// Where.
        path: PathBuf,
        /// Who.
        kernel: String,
    },
    /// The directory could not be made, looked at or removed.
    #[error("cannot use the mount point {path}")]
    Point {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is mounted could not be read.
    #[error("cannot read what is mounted")]
    Table(#[source] io::Error),
    /// mount(8) or umount(8) could not be started.
    #[error("cannot start {program}; see that it is installed")]
    Program {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// mount(8) or umount(8) failed.
    #[error("{program} failed: {words}")]
    Refused {
        /// Which.
        program: &'static str,
        /// What it said.
        words: String,
    },
    /// It took too long.
    #[error("{program} did not end within {} s; see whether the server of the volume answers", after.as_secs())]
    Timeout {
        /// Which.
        program: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// It said it was done, and it is not.
    #[error("{command} has said that it was done at {path}, and it is not; see: findmnt {path}", path = path.display())]
    NotDone {
        /// Which.
        command: &'static str,
        /// Where.
        path: PathBuf,
    },
    /// The table of file systems could not be changed.
    #[error(transparent)]
    Fstab(#[from] FstabError),
}

/// `volumes/_mount` of the cluster names no directory.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "volumes/_mount of etcd is {0:?}; write an absolute path without '..', such as \"/mnt\", or remove the key"
)]
pub struct PrefixError(String);

/// The directory that `volumes/_mount` names; an empty text is none, as an operator clears it.
///
/// # Errors
/// It is no absolute path, or not plain.
fn mount_prefix(text: &str) -> Result<Option<PathBuf>, PrefixError> {
    let path = Path::new(text.trim());
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if path.as_os_str().is_empty() {
        Ok(None)
    } else if path.is_absolute()
        && path.components().all(plain)
        && !text.trim().contains(char::is_control)
    {
        Ok(Some(path.to_owned()))
    } else {
        Err(PrefixError(text.to_owned()))
    }
}

/// What an order came to: the mount point, and why it failed if it did.
#[derive(Debug)]
pub struct VolumeOutcome {
    /// The mount point; empty when the name of the volume was not usable, there is nothing to do, or
    /// the cluster did not say where.
    pub path: PathBuf,
    /// Why it failed.
    pub error: Option<VolumeError>,
}

impl VolumeOutcome {
    fn nowhere(error: Option<VolumeError>) -> Self {
        let path = PathBuf::new();
        Self { path, error }
    }
}

/// The directory that volumes are mounted in.
#[derive(Debug)]
enum Base {
    Fixed(PathBuf),
    /// Below the cluster's `volumes/_mount`.
    OfCluster {
        etcd: Etcd,
        /// Where that is not set.
        usual: PathBuf,
        below: PathBuf,
    },
}

/// The volumes of this node.
#[derive(Debug)]
pub struct Volumes {
    base: Base,
    /// A storage proxy on this host does it all.
    left_to_proxy: bool,
    settings: Settings,
    /// Orders are carried out one by one: they share mount points and the table.
    turn: Mutex<()>,
}

/// A directory of this host, as it was named, and the kernel that uses it, in words.
pub type UsedFolder = (PathBuf, String);

/// What of this host the kernels of this node use.
pub trait UsedFolders: Send + Sync {
    /// All of it, by now.
    fn used_folders(&self) -> Vec<UsedFolder>;
}

impl<F: Fn() -> Vec<UsedFolder> + Send + Sync> UsedFolders for F {
    fn used_folders(&self) -> Vec<UsedFolder> {
        self()
    }
}

impl Volumes {
    /// As configured: a path that is not absolute lies below what the cluster says, or the root.
    #[must_use]
    pub fn new(config: &Config, cluster: Option<&Etcd>) -> Volumes {
        let path = config.agent.mount_path.clone().unwrap_or_default();
        let base = match cluster {
            Some(etcd) if !path.is_absolute() => Base::OfCluster {
                etcd: etcd.clone(),
                usual: "/".into(),
                below: path,
            },
            _ => Base::Fixed(Path::new("/").join(path)),
        };
        Volumes {
            base,
            left_to_proxy: config.agent.cohabiting_storage_proxy,
            settings: config.node.volumes.clone(),
            turn: Mutex::default(),
        }
    }

    /// Whoever mounts otherwise: right below what the cluster says, or else `usual`.
    #[must_use]
    pub fn right_below(usual: &Path, cluster: Option<Etcd>, settings: Settings) -> Volumes {
        let usual = usual.to_owned();
        let base = match cluster {
            Some(etcd) => Base::OfCluster {
                etcd,
                usual,
                below: PathBuf::new(),
            },
            None => Base::Fixed(usual),
        };
        Volumes {
            base,
            left_to_proxy: false,
            settings,
            turn: Mutex::default(),
        }
    }

    /// What is mounted directly below the base, sorted.
    ///
    /// # Errors
    /// The kernel's list cannot be read, or the cluster's key.
    pub async fn mounted(&self) -> Result<Vec<PathBuf>, VolumeError> {
        mount::below(&self.base().await?).await
    }

    async fn base(&self) -> Result<PathBuf, VolumeError> {
        match &self.base {
            Base::Fixed(path) => Ok(path.clone()),
            Base::OfCluster { etcd, usual, below } => {
                let prefix = etcd.get("volumes/_mount").await;
                let prefix = prefix.map_err(VolumeError::Prefix)?;
                let prefix = mount_prefix(prefix.as_deref().unwrap_or_default())?;
                let prefix = prefix.as_deref().unwrap_or(usual);
                // Joined with nothing a path would end with a slash.
                Ok(prefix.components().chain(below.components()).collect())
            }
        }
    }

    /// A table of file systems as it is, if it may be changed too. Blocks.
    ///
    /// # Errors
    /// It may not be looked at, or cannot be read.
    pub fn table(&self, path: &Path) -> Result<String, VolumeError> {
        self.fstab_allowed(Some(path))?;
        Ok(fstab::read(path)?)
    }

    /// Mounts a volume; one that is mounted already is a success.
    pub async fn mount(&self, order: &MountOrder) -> VolumeOutcome {
        if let Some(outcome) = self.nothing_to_do(&order.dir_name) {
            return outcome;
        }
        let _turn = self.turn.lock().await;
        let path = match self.base().await {
            Ok(base) => base.join(&order.dir_name),
            Err(err) => return VolumeOutcome::nowhere(Some(err)),
        };
        let error = self.mount_at(&path, order).await.err();
        VolumeOutcome { path, error }
    }

    /// Unmounts a volume; one that is not mounted is a success.
    pub async fn unmount(&self, order: &UnmountOrder, used: &dyn UsedFolders) -> VolumeOutcome {
        if let Some(outcome) = self.nothing_to_do(&order.dir_name) {
            return outcome;
        }
        let _turn = self.turn.lock().await;
        let path = match self.base().await {
            Ok(base) => base.join(&order.dir_name),
            Err(err) => return VolumeOutcome::nowhere(Some(err)),
        };
        let used = used.used_folders();
        let error = self.unmount_at(&path, order, used).await.err();
        VolumeOutcome { path, error }
    }

    /// A volume that is somebody else's, or that cannot be one.
    fn nothing_to_do(&self, name: &str) -> Option<VolumeOutcome> {
        let error = match self.left_to_proxy {
            true => None,
            false if is_name(name) => return None,
            false => Some(VolumeError::Name(name.to_owned())),
        };
        Some(VolumeOutcome::nowhere(error))
    }

    async fn mount_at(&self, path: &Path, order: &MountOrder) -> Result<(), VolumeError> {
        self.allowed(order)?;
        self.fstab_allowed(order.fstab.as_deref())?;
        match mount::at(path).await? {
            Some(found) if is_another(&found, &order.location) => {
                return Err(VolumeError::Taken {
                    path: path.to_owned(),
                    found,
                });
            }
            Some(_) => tracing::info!(path = %path.display(), "a volume is mounted already"),
            None => {
                let made = make_point(path).await?;
                let mut unfinished = Unfinished::new(path, made, order);
                let done = self.mount_and_note(path, order).await;
                let made = unfinished.end();
                if done.is_err() {
                    remove_made(made).await;
                }
                return done;
            }
        }
        note(path, order).await
    }

    async fn mount_and_note(&self, path: &Path, order: &MountOrder) -> Result<(), VolumeError> {
        mount::mount(path, order, self.settings.timeout).await?;
        let noted = note(path, order).await;
        match &noted {
            Ok(()) => {
                tracing::info!(path = %path.display(), source = order.location, fs_type = order.fs_type, "mounted a volume");
            }
            // All or nothing: the next start of the host would not mount it.
            Err(_) => mount::undo(path, self.settings.timeout).await,
        }
        noted
    }

    async fn unmount_at(
        &self,
        path: &Path,
        order: &UnmountOrder,
        used: Vec<UsedFolder>,
    ) -> Result<(), VolumeError> {
        self.fstab_allowed(order.fstab.as_deref())?;
        if let Some(kernel) = mount::user_of(path, used).await? {
            return Err(VolumeError::InUse {
                path: path.to_owned(),
                kernel,
            });
        }
        let Some(table) = order.fstab.clone() else {
            return self.let_go(path).await;
        };
        // First, as a line can be put back and a mount cannot: not as it was mounted.
        let point = path.to_owned();
        // All in one: whoever waits for it may be gone when the line is out.
        let removed_lines = blocking(move || RemovedLines::take_out(table, point)).await?;
        let done = self.let_go(path).await;
        match removed_lines {
            Some(removed_lines) if done.is_err() => blocking(move || drop(removed_lines)).await,
            Some(removed_lines) => removed_lines.settle(),
            None => {}
        }
        done
    }

    async fn let_go(&self, path: &Path) -> Result<(), VolumeError> {
        if mount::at(path).await?.is_some() {
            mount::unmount(path, self.settings.timeout).await?;
            tracing::info!(path = %path.display(), "unmounted a volume");
        }
        remove_point(path).await;
        Ok(())
    }

    fn allowed(&self, order: &MountOrder) -> Result<(), VolumeError> {
        let MountOrder {
            fs_type,
            location,
            options,
            ..
        } = order;
        let known = |rule: &String| match rule.split_once(' ') {
            Some((kind, source)) => kind == fs_type && covers(source.trim(), location),
            None => false,
        };
        if !is_word(fs_type) || !is_source(location) || !self.settings.allow.iter().any(known) {
            return Err(VolumeError::NotAllowed {
                fs_type: fs_type.clone(),
                location: location.clone(),
            });
        }
        match options {
            Some(options) if !is_options(options) => Err(VolumeError::Options(options.clone())),
            _ => Ok(()),
        }
    }

    fn fstab_allowed(&self, table: Option<&Path>) -> Result<(), VolumeError> {
        match table {
            Some(table)
                if !self
                    .settings
                    .fstab
                    .iter()
                    .any(|path| Path::new(path) == table) =>
            {
                Err(VolumeError::FstabNotAllowed(table.to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// Notes a volume in the table of its order, if it names one.
async fn note(path: &Path, order: &MountOrder) -> Result<(), VolumeError> {
    let Some(table) = order.fstab.clone() else {
        return Ok(());
    };
    let entry = fstab::Entry::of(path, order);
    Ok(blocking(move || fstab::add(&table, &entry)).await?)
}

/// Lines that were taken out for an unmount that has not succeeded. Dropped they are put back, so that they
/// are after an order that was cut short (a stop of the agent), too. That blocks, for a small file's time.
#[derive(Debug)]
struct RemovedLines {
    table: PathBuf,
    path: PathBuf,
    removed: Option<fstab::Removed>,
}

impl RemovedLines {
    /// Takes out what is noted for a mount point; `None` when nothing is. Blocks.
    fn take_out(table: PathBuf, path: PathBuf) -> Result<Option<RemovedLines>, FstabError> {
        let removed = fstab::remove(&table, &path)?;
        Ok(removed.is_some().then_some(RemovedLines {
            table,
            path,
            removed,
        }))
    }

    /// The volume is not mounted any more.
    fn settle(mut self) {
        self.removed = None;
    }
}

impl Drop for RemovedLines {
    fn drop(&mut self) {
        let Some(removed) = self.removed.take() else {
            return;
        };
        // Cut short when it was done already.
        if matches!(mount::at_now(&self.path), Ok(None)) {
            return;
        }
        if let Err(err) = fstab::put_back(&self.table, &removed) {
            tracing::error!(
                table = %self.table.display(),
                lines = removed.lines,
                err = &err as &dyn std::error::Error,
                "a volume that stays mounted is not noted any more; write its line back"
            );
        }
    }
}

/// A mount that has not come to an end. Dropped it was cut short (a stop of the agent): what it has mounted
/// already is noted, else the directories it has made go. That blocks, for a small file's time.
#[derive(Debug)]
struct Unfinished {
    path: PathBuf,
    /// The deepest first.
    made: Vec<PathBuf>,
    note: Option<(PathBuf, fstab::Entry)>,
    ended: bool,
}

impl Unfinished {
    fn new(path: &Path, made: Vec<PathBuf>, order: &MountOrder) -> Unfinished {
        let note = |table| (table, fstab::Entry::of(path, order));
        Unfinished {
            path: path.to_owned(),
            made,
            note: order.fstab.clone().map(note),
            ended: false,
        }
    }

    /// It has come to an end, good or bad; the directories it has made.
    fn end(&mut self) -> Vec<PathBuf> {
        self.ended = true;
        std::mem::take(&mut self.made)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if matches!(mount::at_now(&self.path), Ok(None)) {
            for directory in &self.made {
                // One with something in it stays.
                let _ = std::fs::remove_dir(directory);
            }
        } else if let Some((table, entry)) = &self.note
            && let Err(err) = fstab::add(table, entry)
        {
            tracing::error!(
                path = %self.path.display(),
                table = %table.display(),
                err = &err as &dyn std::error::Error,
                "a volume whose mount was cut short is mounted and not noted; ask for it again"
            );
        }
    }
}

/// Makes the directory, and those above it: the ones that were not there, the deepest first.
async fn make_point(path: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let point = path.to_owned();
    let (made, outcome) = blocking(move || {
        let absent = |directory: &&Path| !directory.exists();
        let absent: Vec<PathBuf> = (point.ancestors().take_while(absent))
            .map(Path::to_owned)
            .collect();
        let make = || {
            std::fs::create_dir_all(&point)?;
            // mount(8) would follow a link to wherever it leads.
            match std::fs::symlink_metadata(&point)?.is_dir() {
                true => Ok(()),
                false => Err(io::Error::from(io::ErrorKind::NotADirectory)),
            }
        };
        let outcome = make();
        (absent, outcome)
    })
    .await;
    match outcome {
        Ok(()) => Ok(made),
        Err(source) => {
            remove_made(made).await;
            Err(VolumeError::Point {
                path: path.to_owned(),
                source,
            })
        }
    }
}

/// Removes directories that a failed order has made, the deepest first; one with something in it
/// stays, and so does one where something is mounted.
async fn remove_made(made: Vec<PathBuf>) {
    for directory in &made {
        remove_point(directory).await;
    }
}

/// Removes the directory if it is empty; files that someone put there stay.
async fn remove_point(path: &Path) {
    let point = path.to_owned();
    if let Err(err) = blocking(move || std::fs::remove_dir(&point)).await
        && !matches!(err.kind(), io::ErrorKind::NotFound)
    {
        tracing::debug!(path = %path.display(), %err, "a mount point stays");
    }
}

/// Whether what is mounted is certainly not what is wanted. Of a directory or a file the kernel
/// names the device, so only names of servers tell.
fn is_another(found: &str, wanted: &str) -> bool {
    let plain = |source: &str| source.trim_end_matches('/').to_owned();
    wanted.contains(':') && plain(found) != plain(wanted)
}

/// A rule covers a source that is the same, or that begins as the rule does before its `*`. A rule
/// for a directory does not reach out of it.
fn covers(rule: &str, source: &str) -> bool {
    match rule.strip_suffix('*') {
        Some(prefix) => {
            source.starts_with(prefix)
                && Path::new(source)
                    .components()
                    .all(|part| part != Component::ParentDir)
        }
        None => rule == source,
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:@+".contains(&byte);
    (1..=255).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with(['.', '-'])
}

fn is_word(word: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&word.len()) && word.bytes().all(plain) && !word.starts_with('-')
}

fn is_source(source: &str) -> bool {
    (1..=4096).contains(&source.len())
        && !source.starts_with('-')
        && !source
            .chars()
            .any(|letter| letter.is_control() || letter.is_whitespace())
}

fn is_options(options: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"=,._:/@%+-[]\"".contains(&byte);
    options.len() <= 4096 && options.bytes().all(plain) && !options.starts_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes(base: &Path, allow: &[&str]) -> Volumes {
        Volumes {
            base: Base::Fixed(base.to_owned()),
            left_to_proxy: false,
            settings: Settings {
                allow: allow.iter().map(|rule| (*rule).to_owned()).collect(),
                fstab: ["/etc/fstab".to_owned()].into(),
                timeout: Duration::from_secs(10),
            },
            turn: Mutex::default(),
        }
    }

    fn order(name: &str, fs_type: &str, location: &str) -> MountOrder {
        MountOrder {
            dir_name: name.to_owned(),
            location: location.to_owned(),
            fs_type: fs_type.to_owned(),
            options: None,
            fstab: None,
        }
    }

    #[test]
    fn a_cluster_that_says_nonsense_of_where_volumes_belong_is_not_followed() {
        let named = |text| mount_prefix(text).expect(text);
        assert_eq!(named("/mnt/volumes"), Some("/mnt/volumes".into()));
        assert_eq!(named(" /mnt/\n"), Some("/mnt".into()));
        assert_eq!((named(""), named("  ")), (None, None));
        for text in [
            "mnt",
            "./mnt",
            "~/mnt",
            "/mnt/../etc",
            "..",
            "/mnt\n/etc",
            "/mnt\0",
            "\u{fffd}",
        ] {
            let words = mount_prefix(text).expect_err(text).to_string();
            assert!(words.contains("volumes/_mount of etcd"), "{words}");
        }
    }

    #[tokio::test]
    async fn only_what_is_allowed_gets_as_far_as_a_command() {
        let base = tempfile::tempdir().unwrap();
        let volumes = volumes(
            base.path(),
            &["nfs 10.0.0.1:/a/*", "tmpfs tmpfs", "nonsense"],
        );
        for (name, fs_type, location) in [
            ("v", "nfs", "10.0.0.2:/a/b"),
            ("v", "nfs", "10.0.0.1:/a/../b"),
            ("v", "nfs4", "10.0.0.1:/a/b"),
            ("v", "nfs", "-o 10.0.0.1:/a/b"),
            ("v", "nfs", "10.0.0.1:/a/b\n/dev/sda / ext4"),
            ("v", "tmpfs", "tmpfs2"),
            ("v", "nonsense", ""),
            ("v", "", ""),
        ] {
            let outcome = volumes.mount(&order(name, fs_type, location)).await;
            assert!(
                matches!(outcome.error, Some(VolumeError::NotAllowed { .. })),
                "{fs_type} {location}"
            );
        }
        for name in ["", ".", "..", "a/b", "/a", "-a", ".a", "a b", "a\n", "a\0"] {
            let outcome = volumes.mount(&order(name, "tmpfs", "tmpfs")).await;
            assert!(
                matches!(outcome.error, Some(VolumeError::Name(_))),
                "{name:?}"
            );
        }
        let mut odd = order("v", "tmpfs", "tmpfs");
        odd.options = Some("size=1m;reboot".into());
        let outcome = volumes.mount(&odd).await;
        assert!(matches!(outcome.error, Some(VolumeError::Options(_))));
        odd.options = None;
        odd.fstab = Some("/etc/passwd".into());
        let outcome = volumes.mount(&odd).await;
        assert!(matches!(
            outcome.error,
            Some(VolumeError::FstabNotAllowed(_))
        ));
        assert_eq!(std::fs::read_dir(base.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_cohabiting_proxy_does_it_all() {
        let mut volumes = volumes(Path::new("/nowhere"), &[]);
        volumes.left_to_proxy = true;
        let outcome = volumes.mount(&order("v", "nfs", "x")).await;
        assert!(outcome.error.is_none() && outcome.path.as_os_str().is_empty());
    }
}
