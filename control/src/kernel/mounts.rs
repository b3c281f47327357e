//! What is mounted into a kernel's container, and from where.
//!
//! In: the scratch, the request's folders, the installed runner, and what this host has. Out: an
//! ordered list of [`Mount`]s. Invariant: every bind source was seen on the
//! host before anything of the kernel was created, so a missing folder is told in words instead
//! of failing `containers/create`.

use super::agent_socket::CONTAINER_DIRECTORY;
use super::request::{MountPermission, VfolderMount};
use super::scratch::beneath::LeadsOut;
use super::scratch::{ScratchPaths, Subpath};
use crate::storage_proxy::FolderId;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};
use thiserror::Error;

/// The user's directory in containers; images and the runner expect it there.
pub const WORK: &str = "/home/work";

/// How a source is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A host path.
    Bind,
    /// A Docker volume's name.
    Volume,
    Tmpfs,
}

/// One mount, in the form of the `create_kernels` result.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mount {
    #[serde(rename = "type")]
    pub kind: MountKind,
    pub source: String,
    pub target: String,
    pub permission: MountPermission,
    /// Always null; kept for the manager's decoder.
    #[serde(default)]
    pub opts: Option<()>,
    /// How many of the source's last components lie in a folder, whose user can replace them.
    #[serde(skip)]
    pub inner: usize,
}

impl Mount {
    /// A bind mount of a host path.
    pub fn bind(
        source: impl Into<String>,
        target: impl Into<String>,
        permission: MountPermission,
    ) -> Self {
        let (source, target) = (source.into(), target.into());
        Self {
            kind: MountKind::Bind,
            source,
            target,
            permission,
            opts: None,
            inner: 0,
        }
    }

    /// A mount of a Docker volume.
    pub fn volume(
        name: impl Into<String>,
        target: impl Into<String>,
        permission: MountPermission,
    ) -> Self {
        Self {
            kind: MountKind::Volume,
            ..Self::bind(name, target, permission)
        }
    }

    /// The source as a path within its folder, where it is one.
    pub fn part(&self) -> Option<Subpath> {
        part(Path::new(&self.source), self.inner)
    }

    /// Whether the container can't write there; `wd` is writable.
    pub fn is_read_only(&self) -> bool {
        self.permission == MountPermission::ReadOnly
    }
}

/// Why a kernel can't have its mounts. All are told before anything is created; a retry helps only
/// after the folder has appeared.
#[derive(Debug, Error)]
pub enum MountError {
    #[error(
        "the folder {name} cannot be mounted: {path} does not exist on this node; check that its volume is mounted here"
    )]
    Missing { name: String, path: PathBuf },
    #[error(
        "the folder {name} cannot be mounted: the agent may not go to {path}; let its user search the directories there (a file server that trusts no root refuses it, too)"
    )]
    Denied {
        name: String,
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("the folder {name} cannot be mounted: {path} cannot be read on this node")]
    Unreadable {
        name: String,
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error(
        "the folder {name} cannot be mounted: its host path {path:?} is not an absolute path without '..'"
    )]
    HostPath { name: String, path: String },
    #[error(
        "the folder {name} cannot be mounted at {path:?}: a path below the container's root is needed"
    )]
    KernelPath { name: String, path: String },
    #[error(
        "the folder {name} cannot be mounted: its subdirectory {subpath:?} leads out of it; replace the link there"
    )]
    Outside { name: String, subpath: String },
    #[error("two folders are to be mounted at {0}; give one of them another path")]
    Twice(String),
    #[error("the folder {name} cannot be mounted at {path}, which belongs to the runner")]
    RunnerPath { name: String, path: String },
    #[error(
        "the host socket {0:?} cannot be given: an absolute path without '..' is needed, outside of what belongs to the runner"
    )]
    HostSocketPath(String),
    #[error("the host socket {0} cannot be given: it is no socket on this node")]
    NoSocket(String),
    #[error("the host socket {path} cannot be given to a kernel")]
    HostSocket {
        path: String,
        #[source]
        cause: std::io::Error,
    },
    #[error(transparent)]
    AgentSocket(#[from] super::agent_socket::AgentSocketError),
}

/// Directories the original keeps on a host beside the agent's own; other values in tests.
#[derive(Debug, Clone)]
pub struct HostPaths {
    /// Where `localtime` and `timezone` are looked for.
    pub etc: PathBuf,
    /// The root of lxcfs.
    pub lxcfs: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            etc: "/etc".into(),
            lxcfs: "/var/lib/lxcfs".into(),
        }
    }
}

/// What the intrinsic mounts of one kernel depend on.
#[derive(Debug, Clone, Default)]
pub struct Intrinsic<'a> {
    /// The volume `deeplearning-samples` exists in Docker.
    pub samples_volume: bool,
    /// Short image name, compared with the frameworks that have samples.
    pub short_image_name: &'a str,
    /// Host directory of core dumps and the directory of the host's core pattern, if enabled.
    pub coredump: Option<(&'a Path, &'a Path)>,
    /// Directory that holds `agent.sock`, mounted read-only at `/opt/kernel`; a new agent's socket
    /// appears there by itself.
    pub agent_socket_dir: Option<&'a Path>,
}

/// Images with one of these in their name get the samples.
const SAMPLED: [&str; 6] = ["tensorflow", "caffe", "keras", "torch", "mxnet", "theano"];

/// Rows 1 to 9 of the list: scratch, time zone, lxcfs, samples, core dumps, agent socket.
///
/// Reads the host's directories; call it where blocking is allowed.
pub fn intrinsic(scratch: &ScratchPaths, wanted: &Intrinsic<'_>, host: &HostPaths) -> Vec<Mount> {
    use MountPermission::{ReadOnly, ReadWrite};
    let mut mounts = vec![
        Mount::bind(display(&scratch.config), "/home/config", ReadOnly),
        Mount::bind(display(&scratch.work), WORK, ReadWrite),
    ];
    if let Some(tmp) = &scratch.tmp {
        mounts.push(Mount::bind(display(tmp), "/tmp", ReadWrite));
    }
    for name in ["localtime", "timezone"] {
        let path = host.etc.join(name);
        if path.exists() {
            mounts.push(Mount::bind(
                display(&path),
                format!("/etc/{name}"),
                ReadOnly,
            ));
        }
    }
    mounts.extend(lxcfs(&host.lxcfs));
    if wanted.samples_volume
        && SAMPLED
            .iter()
            .any(|name| wanted.short_image_name.contains(name))
    {
        mounts.push(Mount::volume(
            "deeplearning-samples",
            "/home/work/samples",
            ReadOnly,
        ));
    }
    if let Some((source, target)) = wanted.coredump {
        mounts.push(Mount::bind(display(source), display(target), ReadWrite));
    }
    if let Some(directory) = wanted.agent_socket_dir {
        mounts.push(Mount::bind(
            display(directory),
            CONTAINER_DIRECTORY,
            ReadOnly,
        ));
    }
    mounts
}

/// The files of lxcfs that show a container its own CPU count, memory and uptime.
fn lxcfs(root: &Path) -> Vec<Mount> {
    let mut mounts = Vec::new();
    if let Ok(entries) = std::fs::read_dir(root.join("proc")) {
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            // lxcfs shows features it cannot serve as empty files.
            let served = path
                .metadata()
                .is_ok_and(|file| file.is_file() && file.len() > 0);
            if let (true, Some(name)) = (served, path.file_name()) {
                let target = format!("/proc/{}", name.to_string_lossy());
                mounts.push(Mount::bind(
                    display(&path),
                    target,
                    MountPermission::ReadWrite,
                ));
            }
        }
    }
    for name in ["sys/devices/system/cpu", "sys/devices/system/cpu/online"] {
        let path = root.join(name);
        if path.exists() {
            mounts.push(Mount::bind(
                display(&path),
                format!("/{name}"),
                MountPermission::ReadWrite,
            ));
        }
    }
    mounts
}

/// The folders of a request that are mounted; with `prevent` (`internal_data.prevent_vfolder_mounts`)
/// only those named `.logs`.
pub fn allowed(folders: &[VfolderMount], prevent: bool) -> impl Iterator<Item = &VfolderMount> {
    folders
        .iter()
        .filter(move |folder| !prevent || folder.name == ".logs")
}

/// Checks one folder of a request and gives its mount.
///
/// Call it before anything is created, and only by way of [`GuardedIo`](super::guarded_io::GuardedIo): a folder may
/// lie on a network file system that hangs.
///
/// # Errors
/// It is not on this node, or its target is not possible.
pub fn vfolder(folder: &VfolderMount) -> Result<Mount, MountError> {
    let name = || folder.name.clone();
    let source = Path::new(&folder.host_path);
    if !is_plain_absolute(source) {
        return Err(MountError::HostPath {
            name: name(),
            path: folder.host_path.clone(),
        });
    }
    let target = Path::new(&folder.kernel_path);
    if !is_plain_absolute(target) || target == Path::new("/") {
        return Err(MountError::KernelPath {
            name: name(),
            path: folder.kernel_path.clone(),
        });
    }
    if belongs_to_runner(target) || target == Path::new(WORK) {
        return Err(MountError::RunnerPath {
            name: name(),
            path: folder.kernel_path.clone(),
        });
    }
    let inner = inner(folder)?;
    // lstat would accept a dangling link, which Docker refuses later.
    let seen = match part(source, inner) {
        Some(part) => part.resolve().map(drop),
        None => std::fs::metadata(source).map(drop),
    };
    seen.map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => MountError::Missing {
            name: name(),
            path: source.to_owned(),
        },
        _ if LeadsOut::is(&cause) => outside(folder),
        std::io::ErrorKind::PermissionDenied => MountError::Denied {
            name: name(),
            path: source.to_owned(),
            cause,
        },
        _ => MountError::Unreadable {
            name: name(),
            path: source.to_owned(),
            cause,
        },
    })?;
    let mount = Mount::bind(&folder.host_path, &folder.kernel_path, folder.mount_perm);
    Ok(Mount { inner, ..mount })
}

/// Adds the mount of a folder to those before it.
///
/// # Errors
/// There is one at its target.
pub fn add(mounts: &mut Vec<Mount>, mount: Mount) -> Result<(), MountError> {
    let target = Path::new(&mount.target);
    if mounts
        .iter()
        .any(|other| Path::new(&other.target) == target)
    {
        return Err(MountError::Twice(mount.target));
    }
    mounts.push(mount);
    Ok(())
}

/// The mounts of a request's folders, without a limit of time.
#[cfg(test)]
pub(crate) fn vfolders(folders: &[VfolderMount], prevent: bool) -> Result<Vec<Mount>, MountError> {
    let mut mounts = Vec::new();
    for folder in allowed(folders, prevent) {
        add(&mut mounts, vfolder(folder)?)?;
    }
    Ok(mounts)
}

/// How many components at the end of a folder's host path lie in the folder. They may be links that
/// its user has made, or makes before the engine goes there; it would follow them anywhere.
///
/// # Errors
/// The subpath of the request is none.
pub(super) fn inner(folder: &VfolderMount) -> Result<usize, MountError> {
    let subpath = Path::new(folder.vfsubpath.as_deref().unwrap_or_default());
    let asked = names(subpath);
    // As good as none: the folder itself.
    if !is_plain(subpath) && subpath != Path::new("/") {
        return Err(outside(folder));
    }
    let source = names(Path::new(&folder.host_path));
    // The storage proxy names a folder's directories after its id, and has followed the links below
    // them: those may have been replaced since, and what is left need not end as what was asked for.
    let id = folder.vfid.as_deref().and_then(FolderId::parse);
    if let Some(end) = id.and_then(|id| end_of(&id, &source)) {
        return Ok(source.len() - end);
    }
    match source.ends_with(&asked) {
        true => Ok(asked.len()),
        // A directory of the operator's, outside of the volumes' order.
        false => Ok(0),
    }
}

/// Where the directories of a folder's id end: `ab/cd/ef...`, the digits of a UUID. The first ones
/// are the volume's; a user can make others like them.
fn end_of(id: &FolderId, names: &[&OsStr]) -> Option<usize> {
    let digits = id.digits();
    let spelled = [digits.get(..2)?, digits.get(2..4)?, digits.get(4..)?];
    let at = names.windows(3).position(|three| three == spelled)?;
    Some(at + 3)
}

/// A path whose last components lie in a folder.
pub(super) fn part(source: &Path, inner: usize) -> Option<Subpath> {
    let folder = source.ancestors().nth(inner).filter(|_| inner > 0)?;
    let below = source.strip_prefix(folder).ok()?.to_owned();
    Some(Subpath {
        folder: folder.to_owned(),
        below,
    })
}

fn outside(folder: &VfolderMount) -> MountError {
    let subpath = folder.vfsubpath.as_ref().unwrap_or(&folder.host_path);
    MountError::Outside {
        name: folder.name.clone(),
        subpath: subpath.clone(),
    }
}

fn names(path: &Path) -> Vec<&OsStr> {
    let named = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name),
        _ => None,
    });
    named.collect()
}

fn is_plain(path: &Path) -> bool {
    path.components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

/// Whether a path of the container is the runner's own.
pub(super) fn belongs_to_runner(target: &Path) -> bool {
    let owned = [CONTAINER_DIRECTORY, "/opt/backend.ai", "/home/config"];
    owned.iter().any(|path| target.starts_with(path))
}

pub(super) fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute()
        && path
            .components()
            .all(|part| !matches!(part, Component::ParentDir))
}

/// A path as text; the agent's own directories and the manager's texts are UTF-8.
pub(crate) fn display(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::scratch::beneath::without_rights;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn folder(name: &str, host: &Path, kernel: &str) -> VfolderMount {
        VfolderMount {
            name: name.to_owned(),
            vfid: None,
            vfsubpath: None,
            host_path: display(host),
            kernel_path: kernel.to_owned(),
            mount_perm: MountPermission::WriteDelete,
            usage_mode: crate::kernel::request::VfolderUsage::General,
        }
    }

    fn scratch(tmp: Option<PathBuf>) -> ScratchPaths {
        ScratchPaths {
            root: "/s/k".into(),
            config: "/s/k/config".into(),
            work: "/s/k/work".into(),
            tmp,
        }
    }

    #[test]
    fn intrinsic_mounts_follow_the_host() {
        let host = tempfile::tempdir().unwrap();
        let (etc, lxcfs) = (host.path().join("etc"), host.path().join("lxcfs"));
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(lxcfs.join("proc")).unwrap();
        fs::create_dir_all(lxcfs.join("sys/devices/system/cpu")).unwrap();
        fs::write(etc.join("localtime"), "x").unwrap();
        fs::write(lxcfs.join("proc/uptime"), "1").unwrap();
        fs::write(lxcfs.join("proc/swaps"), "").unwrap();
        let host = HostPaths { etc, lxcfs };
        let wanted = Intrinsic {
            samples_volume: true,
            short_image_name: "ngc-pytorch",
            coredump: Some((Path::new("/cores"), Path::new("/var/crash"))),
            agent_socket_dir: Some(Path::new("/run/a")),
        };
        let mounts = intrinsic(&scratch(Some("/s/k_tmp".into())), &wanted, &host);
        let rows: Vec<_> = mounts
            .iter()
            .map(|m| (m.target.as_str(), m.permission.as_str()))
            .collect();
        assert_eq!(
            rows,
            [
                ("/home/config", "ro"),
                ("/home/work", "rw"),
                ("/tmp", "rw"),
                ("/etc/localtime", "ro"),
                ("/proc/uptime", "rw"),
                ("/sys/devices/system/cpu", "rw"),
                ("/home/work/samples", "ro"),
                ("/var/crash", "rw"),
                ("/opt/kernel", "ro"),
            ]
        );
        let plain = intrinsic(&scratch(None), &Intrinsic::default(), &host);
        assert!(
            plain
                .iter()
                .all(|m| m.target != "/tmp" && m.target != "/home/work/samples")
        );
    }

    #[test]
    fn a_missing_folder_is_told_before_anything_is_created() {
        let host = tempfile::tempdir().unwrap();
        let here = folder("a", host.path(), "/home/work/a");
        let gone = folder("b", &host.path().join("gone"), "/home/work/b");
        let told = vfolders(&[here.clone(), gone.clone()], false)
            .unwrap_err()
            .to_string();
        assert!(
            told.contains("folder b") && told.contains("does not exist on this node"),
            "{told}"
        );
        assert!(vfolders(&[gone], true).unwrap().is_empty());
        let mounts = vfolders(&[here], false).unwrap();
        assert!(!mounts[0].is_read_only());
        assert_eq!(mounts[0].permission.as_str(), "wd");
    }

    #[test]
    fn only_logs_folders_are_mounted_when_prevented() {
        let host = tempfile::tempdir().unwrap();
        let folders = [
            folder("a", host.path(), "/home/work/a"),
            folder(".logs", host.path(), "/home/work/.logs"),
        ];
        let mounts = vfolders(&folders, true).unwrap();
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].target, "/home/work/.logs");
    }

    #[test]
    fn impossible_targets_and_sources_are_refused() {
        let host = tempfile::tempdir().unwrap();
        for target in [
            "relative",
            "/",
            "/home/work/../x",
            "/opt/kernel/su-exec",
            "/home/config",
            "/home/work",
        ] {
            assert!(
                vfolders(&[folder("a", host.path(), target)], false).is_err(),
                "{target}"
            );
        }
        assert!(vfolders(&[folder("a", Path::new("x"), "/home/work/a")], false).is_err());
        let twice = [
            folder("a", host.path(), "/d"),
            folder("b", host.path(), "/d/"),
        ];
        assert!(matches!(vfolders(&twice, false), Err(MountError::Twice(_))));
    }

    #[test]
    fn a_part_of_a_folder_does_not_lead_out_of_it() {
        let host = tempfile::tempdir().unwrap();
        let mine = host.path().join("volume/mine");
        let others = host.path().join("volume/others");
        fs::create_dir_all(mine.join("real/deep")).unwrap();
        fs::create_dir_all(&others).unwrap();
        std::os::unix::fs::symlink(&others, mine.join("absolute")).unwrap();
        std::os::unix::fs::symlink("../../others", mine.join("real/relative")).unwrap();
        std::os::unix::fs::symlink("real", mine.join("inside")).unwrap();
        // The volume itself may be reached by a link.
        std::os::unix::fs::symlink(host.path().join("volume"), host.path().join("mnt")).unwrap();
        let ask = |root: &Path, below: &str, subpath: &str| {
            let mut asked = folder("a", &root.join(below), "/home/work/a");
            asked.vfsubpath = Some(subpath.to_owned());
            vfolders(&[asked], false)
        };
        let linked = host.path().join("mnt/mine");
        for root in [&mine, &linked] {
            for subpath in ["real", "real/deep", "./real/", "inside/deep", ".", ""] {
                let asked = ask(root, subpath, subpath);
                assert_eq!(asked.unwrap().len(), 1, "{subpath}");
            }
            for subpath in ["absolute", "real/relative"] {
                let err = ask(root, subpath, subpath).unwrap_err();
                assert!(
                    matches!(err, MountError::Outside { .. }),
                    "{subpath}: {err}"
                );
            }
        }
        for subpath in ["../real", "/real", "real/../../others", ".."] {
            assert!(ask(&mine, "real", subpath).is_err(), "{subpath}");
        }
        assert!(
            ask(&mine, "real/deep", "inside/deep").is_ok(),
            "a link that was followed"
        );
    }

    #[test]
    fn a_folder_that_the_agent_may_not_search_is_told_as_such() {
        let host = tempfile::tempdir().unwrap();
        let locked = host.path().join("locked");
        fs::create_dir_all(locked.join("part")).unwrap();
        fs::set_permissions(&locked, Permissions::from_mode(0o000)).unwrap();
        for subpath in [None, Some("part"), Some("locked/part")] {
            let mut asked = folder("data", &locked.join("part"), "/home/work/a");
            asked.vfsubpath = subpath.map(str::to_owned);
            let err = without_rights(|| vfolders(&[asked], false)).unwrap_err();
            assert!(
                matches!(err, MountError::Denied { .. }),
                "{subpath:?}: {err}"
            );
            let told = shared::causes::chain(&err);
            for words in ["data", "locked/part", "may not", "Permission denied"] {
                assert_eq!(told.matches(words).count(), 1, "{words}: {told}");
            }
        }
        fs::set_permissions(&locked, Permissions::from_mode(0o700)).unwrap();
    }

    #[test]
    fn a_folders_id_tells_where_it_begins() {
        let id = "5fe58a85-4fb3-4f61-94a5-b1a2c6d0f6a7";
        let below = "5f/e5/8a854fb34f6194a5b1a2c6d0f6a7";
        let ask = |vfid: &str, host: &str, subpath: &str| {
            let mut asked = folder("a", Path::new(host), "/home/work/a");
            asked.vfid = Some(vfid.to_owned());
            asked.vfsubpath = Some(subpath.to_owned());
            let depth = inner(&asked).unwrap();
            part(Path::new(host), depth).map(|it| (display(&it.folder), display(&it.below)))
        };
        let scoped = format!("user:{id}/{}", id.replace('-', ""));
        let root = format!("/mnt/v/user:{id}/{below}");
        for vfid in [id, &scoped] {
            assert_eq!(ask(vfid, &root, "."), None);
            // The proxy has followed a link `asked`, whose target a user may have changed since.
            let real = format!("{root}/x/y/asked");
            let expected = Some((root.clone(), "x/y/asked".to_owned()));
            assert_eq!(ask(vfid, &real, "asked"), expected);
            let copied = format!("{root}/x/{below}/asked");
            let expected = Some((root.clone(), format!("x/{below}/asked")));
            assert_eq!(ask(vfid, &copied, "asked"), expected);
        }
        // No directories of the id: a path of the operator's.
        let expected = Some(("/data".to_owned(), "set/one".to_owned()));
        assert_eq!(ask(id, "/data/set/one", "./set/one"), expected);
        assert_eq!(ask(id, "/data/set/one", "two"), None);
    }

    #[test]
    fn mounts_have_the_managers_shape() {
        let mount = Mount::bind("/a", "/b", MountPermission::ReadOnly);
        assert_eq!(
            serde_json::to_value(mount).unwrap(),
            serde_json::json!({"type": "bind", "source": "/a", "target": "/b", "permission": "ro", "opts": null})
        );
    }
}
