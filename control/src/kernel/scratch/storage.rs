//! Where a scratch's bytes are: plain directories, a file system in a file, or memory.

use super::beneath::remove_tree;
use super::subpaths;
use super::{ScratchError, ScratchKind, ScratchPaths};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::ffi::CString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use uuid::Uuid;

fn image_file(root: &Path, kernel_id: Uuid) -> PathBuf {
    root.join(format!("{kernel_id}.img"))
}

/// What follows the kernel's id in the name of the mark.
const OWNER_SUFFIX: &str = ".owner";
/// Bytes of a mark that are read.
const OWNER_LIMIT: u64 = 4096;

/// The mark of the agent that a scratch belongs to. Beside the scratch and not in it: there no container
/// sees it, and it is found also where a file system in a file or in memory is not mounted any more.
fn owner_file(root: &Path, kernel_id: Uuid) -> PathBuf {
    root.join(format!("{kernel_id}{OWNER_SUFFIX}"))
}

/// Writes the mark, so that a power cut leaves it.
fn mark(root: &Path, kernel_id: Uuid, owner: &str) -> Result<(), ScratchError> {
    let path = owner_file(root, kernel_id);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&path);
    file.and_then(|mut file| {
        file.write_all(owner.as_bytes())?;
        file.sync_data()?;
        // Its name, too. Not every file system can do that to a directory.
        let _ = File::open(root).and_then(|root| root.sync_all());
        Ok(())
    })
    .map_err(|cause| ScratchError::write(&path, cause))
}

/// Marks a scratch that is there and that nobody has marked.
pub(super) fn claim(root: &Path, kernel_id: Uuid, owner_id: &str) -> Result<(), ScratchError> {
    let is_there = root.join(kernel_id.to_string()).is_dir();
    match is_there && owner(root, kernel_id)?.is_none() {
        true => mark(root, kernel_id, owner_id),
        false => Ok(()),
    }
}

/// The agent that a scratch is marked as belonging to.
pub(super) fn owner(root: &Path, kernel_id: Uuid) -> Result<Option<String>, ScratchError> {
    let path = owner_file(root, kernel_id);
    let mut text = Vec::new();
    match File::open(&path).and_then(|file| file.take(OWNER_LIMIT).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => return Err(ScratchError::Read { path, cause }),
    }
    // Empty: its writer did not come to that.
    Ok(Some(String::from_utf8_lossy(&text).into_owned()).filter(|owner| !owner.is_empty()))
}

/// Makes the storage with empty `config` and `work`, its directory with the mode `mode`; on an error nothing of
/// it stays.
pub(super) fn make(
    root: &Path,
    kernel_id: Uuid,
    kind: ScratchKind,
    mode: u32,
    limit: Duration,
    owner: Option<&str>,
) -> Result<(), ScratchError> {
    fs::create_dir_all(root).map_err(|cause| ScratchError::make(root, cause))?;
    let paths = ScratchPaths::new(root, kernel_id, kind.in_memory());
    // The one step that must not be undone: somebody else's scratch.
    match fs::create_dir(&paths.root) {
        Ok(()) => {}
        Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
            return Err(ScratchError::Exists(paths.root));
        }
        Err(cause) => return Err(ScratchError::make(&paths.root, cause)),
    }
    let marked = owner.map_or(Ok(()), |owner| mark(root, kernel_id, owner));
    let made = marked.and_then(|()| fill(root, kernel_id, &paths, (kind, mode), limit));
    if made.is_err() {
        undo(root, kernel_id);
    }
    made
}

fn fill(
    root: &Path,
    kernel_id: Uuid,
    paths: &ScratchPaths,
    (kind, mode): (ScratchKind, u32),
    limit: Duration,
) -> Result<(), ScratchError> {
    match kind {
        ScratchKind::HostDir => {}
        ScratchKind::HostFile { size } => {
            let image = image_file(root, kernel_id);
            make_image(&image, size, limit)?;
            let mut command = Command::new("mount");
            command
                .args(["-o", "loop,nosuid,nodev"])
                .arg(&image)
                .arg(&paths.root);
            run(command, limit)?;
        }
        ScratchKind::Memory { size } => {
            mount_tmpfs(&paths.root, size, mode)?;
            if let Some(tmp) = &paths.tmp {
                fs::create_dir(tmp).map_err(|cause| ScratchError::make(tmp, cause))?;
                mount_tmpfs(tmp, size, 0o1777)?;
            }
        }
    }
    // Whatever the umask: the kernel's user goes into these two, where they are mounted in its container.
    let set_mode = |path: &PathBuf, mode| fs::set_permissions(path, Permissions::from_mode(mode));
    for path in [&paths.config, &paths.work] {
        fs::create_dir(path)
            .and_then(|()| set_mode(path, 0o755))
            .map_err(|cause| ScratchError::make(path, cause))?;
    }
    set_mode(&paths.root, mode).map_err(|cause| ScratchError::make(&paths.root, cause))
}

fn make_image(image: &Path, size: u64, limit: Duration) -> Result<(), ScratchError> {
    let write = |cause| ScratchError::write(image, cause);
    // Not readable for others, unlike the original's: private keys lie in it.
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(image);
    file.and_then(|file| file.set_len(size)).map_err(write)?;
    let mut command = Command::new("mkfs.ext4");
    command.args(["-q", "-F"]).arg(image);
    run(command, limit)
}

pub(super) fn mount_tmpfs(path: &Path, size: u64, mode: u32) -> Result<(), ScratchError> {
    let data = CString::new(format!("size={size},mode={mode:o}")).expect("digits have no NUL");
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    mount("bai-scratch", path, "tmpfs", flags, data.as_c_str()).map_err(|err| ScratchError::Mount {
        path: path.to_owned(),
        cause: err.into(),
    })
}

/// Runs a tool of the host; its words go into the error.
fn run(mut command: Command, limit: Duration) -> Result<(), ScratchError> {
    let shown = command.get_program().to_string_lossy().into_owned();
    let start = |cause| ScratchError::StartTool {
        command: shown.clone(),
        cause,
    };
    let failed = |told: String| ScratchError::Tool {
        command: shown.clone(),
        told,
    };
    let output = rustix::fs::memfd_create("tool-output", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|err| start(err.into()))?;
    let mut output = File::from(output);
    let (stdout, stderr) = (
        output.try_clone().map_err(start)?,
        output.try_clone().map_err(start)?,
    );
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .spawn()
        .map_err(start)?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().map_err(start)? {
            break status;
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Err(failed(format!("it took longer than {limit:?}")));
        }
        // Not a synchronisation: std has no wait with a deadline.
        std::thread::sleep(Duration::from_millis(10));
    };
    if status.success() {
        return Ok(());
    }
    let mut told = String::new();
    let _ = output
        .rewind()
        .and_then(|()| output.take(2000).read_to_string(&mut told));
    Err(failed(format!("{status}: {}", told.trim())))
}

/// Removes what a failed creation made; the failure that matters is already on its way.
pub(super) fn undo(root: &Path, kernel_id: Uuid) {
    if let Err(err) = remove(root, kernel_id) {
        tracing::warn!(%kernel_id, %err, "a failed scratch cannot be removed");
    }
}

/// Removes all of a kernel's storage, of every kind: the configured one may have changed since.
pub(super) fn remove(root: &Path, kernel_id: Uuid) -> Result<(), ScratchError> {
    subpaths::release(root, kernel_id)?;
    let main = kernel_id.to_string();
    let tmp = format!("{kernel_id}_tmp");
    for name in [&main, &tmp] {
        let path = root.join(name);
        unmount_all(&path)?;
        remove_tree(root, name).map_err(|cause| removal(path, cause))?;
    }
    // The mark goes last: until then it is known whose the rest is.
    for file in [image_file(root, kernel_id), owner_file(root, kernel_id)] {
        match fs::remove_file(&file) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(removal(file, err)),
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn removal(path: PathBuf, cause: io::Error) -> ScratchError {
    ScratchError::Remove { path, cause }
}

/// Unmounts what is mounted at a path, however often; a busy one is detached and goes when its
/// last user does.
pub(super) fn unmount_all(path: &Path) -> Result<(), ScratchError> {
    // More mounts than this at one place are nobody's accident.
    for _ in 0..16 {
        let unmounted = match unmount(path, UnmountFlags::NOFOLLOW) {
            Err(Errno::BUSY) => unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
            other => other,
        };
        match unmounted {
            Ok(()) => {}
            // Nothing is mounted there, or nothing is there; without root nothing of ours can be.
            Err(Errno::INVAL | Errno::NOENT | Errno::PERM | Errno::NOTDIR) => return Ok(()),
            Err(err) => {
                return Err(ScratchError::Unmount {
                    path: path.to_owned(),
                    cause: err.into(),
                });
            }
        }
    }
    Ok(())
}

/// Every kernel id that has a directory, an image file or a mark.
pub(super) fn list(root: &Path) -> Result<Vec<Uuid>, ScratchError> {
    let failed = |cause| ScratchError::Read {
        path: root.to_owned(),
        cause,
    };
    let entries = match fs::read_dir(root) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        let name = name.to_string_lossy();
        let id = name
            .strip_suffix("_tmp")
            .or(name.strip_suffix(subpaths::SUFFIX))
            .or(name.strip_suffix(".img"))
            .or(name.strip_suffix(OWNER_SUFFIX))
            .unwrap_or(&name);
        // Only the spelling that this module writes.
        found.extend(
            Uuid::parse_str(id)
                .ok()
                .filter(|kernel_id| kernel_id.to_string() == id),
        );
    }
    found.sort();
    found.dedup();
    Ok(found)
}
