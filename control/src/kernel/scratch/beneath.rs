//! Writing into directories whose content a kernel's user controls.
//!
//! In: a trusted directory and relative names. Invariant: whatever links, mounts or special files
//! the user puts below the directory, and whenever, nothing outside it is opened, made or changed:
//! every path is resolved by the kernel with `RESOLVE_BENEATH` from the directory's descriptor
//! (openat2(2)), never checked first and used later.

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fstat, openat2};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// Who gets a file; `None` leaves the user or group as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Owner {
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}

/// A directory that paths can't leave.
#[derive(Debug)]
pub struct Beneath {
    directory: OwnedFd,
    /// Parts of it where nothing is read, written or made.
    shut: Vec<PathBuf>,
}

/// Why a path is not followed into a part that is shut: inside of the [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("the path leads into {}, which is not to be used", .0.display())]
pub struct Shut(pub PathBuf);

/// Why a path is not followed out of its directory: inside of the [`io::Error`], unlike a refusal of
/// the file system's (`EACCES`), which has the same kind.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct LeadsOut(&'static str);

impl LeadsOut {
    fn by(words: &'static str) -> io::Error {
        io::Error::new(io::ErrorKind::PermissionDenied, LeadsOut(words))
    }

    /// Whether this is why.
    pub fn is(err: &io::Error) -> bool {
        err.get_ref().is_some_and(|inner| inner.is::<LeadsOut>())
    }
}

impl Beneath {
    /// Opens a directory by a trusted path.
    ///
    /// # Errors
    /// It can't be opened, or is no directory.
    pub fn open(directory: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        Ok(Self::of(directory))
    }

    fn of(directory: OwnedFd) -> Self {
        let shut = Vec::new();
        Self { directory, shut }
    }

    /// The same directory without these parts (relative paths), by whatever links a path leads there.
    #[must_use]
    pub fn without(mut self, parts: Vec<PathBuf>) -> Self {
        self.shut = parts;
        self
    }

    /// The directory that a path below this one leads to.
    ///
    /// # Errors
    /// The path leaves the directory ([`LeadsOut`]), or leads to no directory.
    pub fn below(&self, path: &Path) -> io::Result<Self> {
        let directory = self.find(path)?;
        match FileType::from_raw_mode(fstat(&directory)?.st_mode) {
            FileType::Directory => Ok(Self::of(directory)),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// Whatever a path leads to, opened for its place only; mounts of the host are crossed.
    ///
    /// # Errors
    /// The path leaves the directory ([`LeadsOut`]), or leads to nothing.
    pub fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        open_beneath(&self.directory, path, OFlags::PATH, Mode::empty(), how)
    }

    /// The link by which a path leaves the directory, as a part of that path; none when it stays inside, or
    /// leaves it otherwise. For words alone: it may be another one by now.
    pub fn link_out(&self, path: &Path) -> Option<PathBuf> {
        let mut above = PathBuf::from(".");
        for part in path.components() {
            let here = above.join(part);
            if open_beneath(&self.directory, &here, OFlags::PATH, Mode::empty(), INSIDE)
                .is_err_and(|err| LeadsOut::is(&err))
            {
                let above = self.find(&above).ok()?;
                let name = Path::new(&part);
                rustix::fs::readlinkat(above, name, Vec::new()).ok()?;
                return Some(here.strip_prefix(".").map_or(here.clone(), Path::to_owned));
            }
            above = here;
        }
        None
    }

    /// What is there of this name, if it is in no part that is shut.
    fn resolve(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        let found = open_beneath(&self.directory, path, flags, Mode::empty(), INSIDE)?;
        self.see_not_shut(&found)?;
        Ok(found)
    }

    fn see_not_shut(&self, found: &OwnedFd) -> io::Result<()> {
        if self.shut.is_empty() {
            return Ok(());
        }
        let (whole, place) = (place_of(&self.directory)?, place_of(found)?);
        let Ok(relative) = place.strip_prefix(&whole) else {
            return Err(leads_out());
        };
        let mut shut = self.shut.iter();
        match shut.find(|part| relative.starts_with(part)) {
            Some(part) => Err(io::Error::other(Shut(part.clone()))),
            None => Ok(()),
        }
    }

    /// Makes a regular file where nothing is, in a directory that was looked at.
    fn make(&self, path: &Path, access: OFlags) -> io::Result<File> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let above = match path.parent() {
            Some(above) if !above.as_os_str().is_empty() => above,
            _ => Path::new("."),
        };
        let above = self.resolve(above, OFlags::PATH | OFlags::DIRECTORY)?;
        let flags = access | OFlags::CREATE | OFlags::EXCL;
        let mode = Mode::from_raw_mode(0o600);
        Ok(open_beneath(&above, Path::new(name), flags, mode, INSIDE)?.into())
    }

    /// Opens a regular file, and nothing else: already the opening of a device does things (it starts
    /// a watchdog, rewinds a tape), and a container's root can make nodes of devices it cannot open.
    /// Says whether it was made for it.
    fn regular(&self, path: &Path, access: OFlags, create: bool) -> io::Result<(File, bool)> {
        // A file that comes or goes meanwhile is looked for again, but not for ever.
        for _ in 0..16 {
            match self.resolve(path, OFlags::PATH) {
                Ok(found) => {
                    if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::RegularFile {
                        return Err(io::Error::new(
                            io::ErrorKind::InvalidInput,
                            "the path names something that is not a regular file",
                        ));
                    }
                    // The very file that was looked at, whatever has its name by now.
                    let place = link_to(&found);
                    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                    let file = rustix::fs::open(place, flags, Mode::empty())?;
                    return Ok((file.into(), false));
                }
                Err(err) if err.kind() == io::ErrorKind::NotFound && create => {}
                Err(err) => return Err(err),
            }
            match self.make(path, access) {
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {}
                made => return Ok((made?, true)),
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Writes a whole regular file, over one that is there; either gets `mode` and `owner`.
    ///
    /// # Errors
    /// The path leaves the directory ([`LeadsOut`]), its parent is missing, or it names
    /// something else than a regular file (`InvalidInput`).
    pub fn write(&self, path: &Path, content: &[u8], mode: u32, owner: Owner) -> io::Result<()> {
        let (mut file, _) = self.regular(&plain(path)?, OFlags::WRONLY, true)?;
        fill(&mut file, content)?;
        change(&file, mode, owner)
    }

    /// The same for a file of the user's: one that is there keeps its mode and owner.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn write_users(
        &self,
        path: &Path,
        content: &[u8],
        mode: u32,
        owner: Owner,
    ) -> io::Result<()> {
        let (mut file, made) = self.regular(&plain(path)?, OFlags::WRONLY, true)?;
        // First: one that could not be filled (a full disk) is the user's at the next try.
        if made {
            change(&file, mode, owner)?;
        }
        fill(&mut file, content)
    }

    /// Reads a whole regular file of at most `limit` bytes.
    ///
    /// # Errors
    /// The path leaves the directory, names no regular file (`InvalidInput`), or the file is larger
    /// (`FileTooLarge`).
    pub fn read(&self, path: &Path, limit: u64) -> io::Result<Vec<u8>> {
        use std::io::Read;
        let (file, _) = self.regular(&plain(path)?, OFlags::RDONLY, false)?;
        let mut content = Vec::new();
        file.take(limit + 1).read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("the file is larger than {limit} bytes"),
            ));
        }
        Ok(content)
    }

    /// Whether the path names anything inside the directory.
    ///
    /// # Errors
    /// Other failures than that nothing is there.
    pub fn exists(&self, path: &Path) -> io::Result<bool> {
        match self.resolve(&plain(path)?, OFlags::PATH) {
            Ok(_) => Ok(true),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(err) => Err(err),
        }
    }

    /// Gives a regular file that is there this mode and owner.
    ///
    /// # Errors
    /// The path leaves the directory, or names no regular file (`InvalidInput`).
    pub fn set_file(&self, path: &Path, mode: u32, owner: Owner) -> io::Result<()> {
        let (file, _) = self.regular(&plain(path)?, OFlags::RDONLY, false)?;
        change(&file, mode, owner)
    }

    /// Gives a directory that is there this mode and owner.
    ///
    /// # Errors
    /// The path leaves the directory, or names no directory.
    pub fn set_directory(&self, path: &Path, mode: u32, owner: Owner) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        change(&self.resolve(&plain(path)?, flags)?, mode, owner)
    }

    /// Makes the directories of a path that are not there; those made get `mode` and `owner`.
    ///
    /// # Errors
    /// The path leaves the directory, or a part of it is not a directory.
    pub fn make_directories(&self, path: &Path, mode: u32, owner: Owner) -> io::Result<()> {
        let path = plain(path)?;
        let mut parent = self.resolve(Path::new("."), OFlags::PATH)?;
        let mut reached = PathBuf::new();
        for part in path.components() {
            let Component::Normal(name) = part else {
                continue;
            };
            reached.push(name);
            let made = match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
                Ok(()) => true,
                Err(Errno::EXIST) => false,
                Err(err) => return Err(err.into()),
            };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let directory = self.resolve(&reached, flags)?;
            if made {
                change(&directory, mode, owner)?;
            }
            parent = directory;
        }
        Ok(())
    }
}

/// Inside of a directory: a mount below could be a stranger's file system, so it is not crossed either.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

fn open_beneath(
    directory: &OwnedFd,
    path: &Path,
    flags: OFlags,
    mode: Mode,
    how: ResolveFlags,
) -> io::Result<OwnedFd> {
    // EAGAIN: a rename elsewhere made the check inconclusive (openat2(2)).
    for _ in 0..16 {
        match openat2(directory, path, flags | OFlags::CLOEXEC, mode, how) {
            Err(Errno::AGAIN) => {}
            Err(Errno::XDEV) => return Err(leads_out()),
            other => return Ok(other?),
        }
    }
    Err(Errno::AGAIN.into())
}

fn leads_out() -> io::Error {
    LeadsOut::by("the path leads out of its directory")
}

/// A path to an open file, whatever has its name.
fn link_to(open: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", open.as_raw_fd())
}

/// Where an open file is by now, without links.
fn place_of(open: &OwnedFd) -> io::Result<PathBuf> {
    std::fs::read_link(link_to(open))
}

/// Puts this content, and nothing else, into a file.
fn fill(file: &mut File, content: &[u8]) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all(content)
}

/// Owner, then mode (a change of owner clears mode bits). As in the original, an owner that can't
/// be set is only logged: an agent without root runs kernels of its own user.
fn change(file: impl AsFd, mode: u32, owner: Owner) -> io::Result<()> {
    if rustix::process::geteuid().is_root() && owner != Owner::default() {
        let uid = owner.uid.map(Uid::from_raw);
        let gid = owner.gid.map(Gid::from_raw);
        if let Err(err) = rustix::fs::fchown(&file, uid, gid) {
            tracing::warn!(%err, "the owner of a scratch file cannot be set");
        }
    }
    Ok(rustix::fs::fchmod(
        &file,
        Mode::from_raw_mode(mode & 0o7777),
    )?)
}

/// Changes owner and mode of something the agent made itself, by a trusted path.
pub(super) fn change_at(path: &Path, mode: u32, owner: Owner) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    change(rustix::fs::open(path, flags, Mode::empty())?, mode, owner)
}

/// A relative path without `..`; `.` parts go.
fn plain(path: &Path) -> io::Result<PathBuf> {
    let mut result = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => result.push(name),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => {
                return Err(LeadsOut::by("a relative path without '..' is needed"));
            }
        }
    }
    if result.as_os_str().is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the path names no file",
        ));
    }
    Ok(result)
}

/// How deep a tree is removed in place; deeper parts are moved up first, so that a tree of any
/// depth needs a bounded number of descriptors.
const DEPTH: usize = 48;

/// Removes a directory tree that a user may have filled, or anything else of that name. Nothing
/// outside is touched: links are removed, not followed, and mounts are not entered.
///
/// # Errors
/// A mount below (`ResourceBusy`), or a name that can't be removed.
pub(super) fn remove_tree(parent: &Path, name: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = rustix::fs::open(parent, flags, Mode::empty())?;
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(err) => return Err(err.into()),
    }
    let Some(root) = enter(&parent, name.as_ref())? else {
        return Ok(());
    };
    let mut moved = 0;
    // A tree deeper than DEPTH takes a pass per DEPTH levels; a user's process that still writes
    // is not raced for ever.
    for _ in 0..4096 {
        empty(&root, &root, 0, &mut moved)?;
        match rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTEMPTY) => {}
            Err(err) => return Err(err.into()),
        }
    }
    Err(Errno::NOTEMPTY.into())
}

/// Opens a subdirectory for listing, unless it is a link, a mount, or gone.
fn enter(parent: &OwnedFd, name: &std::ffi::OsStr) -> io::Result<Option<OwnedFd>> {
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat2(parent, name, flags, Mode::empty(), how) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::XDEV) => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{} is a mount point; unmount it", name.to_string_lossy()),
        )),
        Err(err) => Err(err.into()),
    }
}

/// Names taken from a directory at a time: a user can put more into one than this node has memory for.
const BATCH: usize = 1024;

fn empty(root: &OwnedFd, directory: &OwnedFd, depth: usize, moved: &mut u64) -> io::Result<()> {
    // As above: many, but not for ever.
    for _ in 0..65_536 {
        // Read anew each time: what a directory yields while it changes is up to the file system.
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
            if names.len() == BATCH {
                break;
            }
        }
        let mut gone = false;
        for name in &names {
            use std::os::unix::ffi::OsStrExt;
            gone |= remove(
                root,
                directory,
                std::ffi::OsStr::from_bytes(name),
                depth,
                moved,
            )?;
        }
        // Where nothing goes the next pass goes on.
        if names.len() < BATCH || !gone {
            break;
        }
    }
    Ok(())
}

/// Removes one name, or moves it away; whether it is gone.
fn remove(
    root: &OwnedFd,
    directory: &OwnedFd,
    name: &std::ffi::OsStr,
    depth: usize,
    moved: &mut u64,
) -> io::Result<bool> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(true),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(err) => return Err(err.into()),
    }
    let Some(inner) = enter(directory, name)? else {
        return Ok(true);
    };
    if depth >= DEPTH {
        let aside = format!(".removing-{moved}");
        *moved += 1;
        return match rustix::fs::renameat(directory, name, root, &aside) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            // A name of the user's own in the way: the next number.
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => Ok(false),
            Err(err) => Err(err.into()),
        };
    }
    empty(root, &inner, depth + 1, moved)?;
    match rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        // Something was moved in or written meanwhile; the next pass gets it.
        Err(Errno::NOTEMPTY) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

/// Has this thread refused what a file's mode refuses, also where it is root's.
#[cfg(test)]
pub(crate) fn forgo_rights() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let mut sets = capabilities(None).unwrap();
    sets.effective = CapabilitySet::empty();
    set_capabilities(None, sets).unwrap();
}

/// Does the work in a thread that has [forgone its rights](forgo_rights).
#[cfg(test)]
pub(crate) fn without_rights<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            forgo_rights();
            work()
        });
        work.join().unwrap()
    })
}

#[cfg(test)]
mod tests;
