//! Parts of folders, held for the engine.
//!
//! In: a folder's root on the host and a path below it, where the folder's user may put links and
//! rename at any time. Out: `<scratch root>/<kernel id>_folders/<n>`, a mount of the very directory
//! (or file) that the path led to. Invariants: the path is resolved once, by the kernel, and can't
//! leave the root; what the engine is given has no component that a user can replace, neither when
//! the container starts nor whenever the engine looks again (its archives, a start by hand); where
//! the engine does not see this host's mounts the path is missing for it, and nothing empty is
//! mounted instead; to release them unmounts nothing else.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, fstat};
use rustix::mount::{
    MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree,
};
use uuid::Uuid;

use super::ScratchError;
use super::beneath::{Beneath, remove_tree};
use super::storage;

/// What follows the kernel's id in the name of the directory.
pub(super) const SUFFIX: &str = "_folders";
/// They hold mount points only.
const SIZE: u64 = 1 << 20;

/// A part of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subpath {
    /// The folder: a path that only the operator can change.
    pub folder: PathBuf,
    /// What is meant, from there.
    pub below: PathBuf,
}

impl Subpath {
    /// Resolves the path; nothing that happens to its names later changes what was found.
    ///
    /// # Errors
    /// It leads out of the folder ([`LeadsOut`](super::beneath::LeadsOut)), or something of it is not there.
    pub fn resolve(&self) -> io::Result<std::os::fd::OwnedFd> {
        Beneath::open(&self.folder)?.find(&self.below)
    }
}

fn directory(root: &Path, kernel_id: Uuid) -> PathBuf {
    root.join(format!("{kernel_id}{SUFFIX}"))
}

/// Mounts each part, in place of what a former container of the kernel had, in a directory with the mode `mode`;
/// their paths in order.
pub(super) fn hold(
    root: &Path,
    kernel_id: Uuid,
    mode: u32,
    parts: &[Subpath],
) -> Result<Vec<PathBuf>, ScratchError> {
    release(root, kernel_id)?;
    let held = try_hold(root, kernel_id, mode, parts);
    if held.is_err()
        && let Err(err) = release(root, kernel_id)
    {
        tracing::warn!(%kernel_id, %err, "folders that are held for a failed creation cannot be released");
    }
    held
}

fn try_hold(
    root: &Path,
    kernel_id: Uuid,
    mode: u32,
    parts: &[Subpath],
) -> Result<Vec<PathBuf>, ScratchError> {
    let place = directory(root, kernel_id);
    fs::create_dir(&place).map_err(|cause| ScratchError::make(&place, cause))?;
    // The points are in it, so that they are not there where it is not seen.
    storage::mount_tmpfs(&place, SIZE, mode)?;
    let mut paths = Vec::with_capacity(parts.len());
    for (number, part) in parts.iter().enumerate() {
        let point = place.join(number.to_string());
        hold_one(part, &point).map_err(|cause| ScratchError::Hold {
            path: part.folder.join(&part.below),
            cause,
        })?;
        paths.push(point);
    }
    Ok(paths)
}

fn hold_one(part: &Subpath, point: &Path) -> io::Result<()> {
    let found = part.resolve()?;
    match FileType::from_raw_mode(fstat(&found)?.st_mode) {
        FileType::Directory => fs::create_dir(point)?,
        _ => drop(File::create_new(point)?),
    }
    // With the mounts below it, as the engine binds.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(found.as_fd(), "", flags)?;
    let whole = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(tree.as_fd(), "", CWD, point, whole)?;
    Ok(make_private(point)?)
}

/// From then on nothing that is unmounted here goes away where it came from, too.
fn make_private(point: &Path) -> rustix::io::Result<()> {
    let flags = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change(point, flags)
}

/// Lets go of what is held for a kernel. Nothing held is success.
pub(super) fn release(root: &Path, kernel_id: Uuid) -> Result<(), ScratchError> {
    let place = directory(root, kernel_id);
    if let Ok(points) = fs::read_dir(&place) {
        for point in points.flatten() {
            // Left over from an agent that ended between the mount and this; fails for mere points.
            let _ = make_private(&point.path());
        }
    }
    storage::unmount_all(&place)?;
    remove_tree(root, &format!("{kernel_id}{SUFFIX}"))
        .map_err(|cause| storage::removal(place, cause))
}
