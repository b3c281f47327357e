//! One writer per directory: an open-file-description lock on `<directory>/lock`.
//!
//! In: the directory. Out: a guard, or who holds it. Invariants: the lock is taken before anything
//! in the directory is mapped or bound; it goes when its holder dies, however it dies (fcntl_locking(2),
//! "Open file description locks"); the lock file itself is never removed, so two processes never
//! lock different files of one name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Name of the lock file.
const FILE_NAME: &str = "lock";

/// A holder writes its pid right after it gets the lock; a reader in between waits no longer than this.
const NAMING: Duration = Duration::from_millis(200);

/// Another process is the writer of this directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{directory} is in use by process {holder}; stop that process first, or give this one another \
     agent id or run-dir",
    directory = .directory.display(),
    holder = .pid.map_or_else(|| "(unknown pid)".to_owned(), |pid| pid.to_string())
)]
pub struct HeldBy {
    /// Process id the holder left in the lock file (as its own pid namespace numbers it).
    pub pid: Option<u32>,
    /// The directory.
    pub directory: PathBuf,
}

/// Why a lock was not taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Someone else holds it. A retry makes sense only after that process is gone.
    #[error(transparent)]
    Held(#[from] HeldBy),
    /// The lock file cannot be used.
    #[error("cannot {step} the lock file {path}", path = .path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The lock file's name was taken away, and another process has become the writer since. Final: what
/// this one knows of the region is no longer what the region says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "somebody has taken the lock file of {directory} away, and {by} writes there since; this process \
     writes nothing more and ends. See that only one of the two is started, and leave that directory's \
     files alone",
    directory = .directory.display(),
    by = .pid.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
)]
pub struct LockLost {
    /// Process id of the new writer, where it is known.
    pub pid: Option<u32>,
    /// The directory.
    pub directory: PathBuf,
}

/// Being the writer of a directory, for as long as this value (and every copy of its descriptor,
/// such as a forked child's) lives.
#[derive(Debug)]
pub struct WriterLock {
    /// Holds the lock.
    file: File,
    directory: PathBuf,
}

impl WriterLock {
    /// Takes the lock of `directory` at once, or says who has it.
    ///
    /// # Errors
    /// [`LockError`]: somebody has it, or the lock file cannot be used.
    pub fn acquire(directory: impl AsRef<Path>) -> Result<Self, LockError> {
        let directory = directory.as_ref();
        let path = directory.join(FILE_NAME);
        let fail = |step, source: io::Error| LockError::File {
            step,
            path: path.clone(),
            source,
        };
        let flags = rustix::fs::OFlags::NOFOLLOW.bits();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o640)
            .custom_flags(i32::try_from(flags).unwrap_or(0))
            .open(&path)
            .map_err(|err| fail("open", err))?;
        let deadline = Instant::now() + NAMING;
        loop {
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file())) {
                Ok(_) => break,
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    let pid = holder(&file).filter(|pid| alive(*pid));
                    if pid.is_some() || Instant::now() > deadline {
                        return Err(HeldBy {
                            pid,
                            directory: directory.to_owned(),
                        }
                        .into());
                    }
                    // The holder is between getting the lock and writing its name.
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(err) => return Err(fail("lock", err.into())),
            }
        }
        // One write of fixed length: a reader sees this pid or the one before, never a mixture.
        let name = format!("{:<11}\n", std::process::id());
        file.write_all_at(name.as_bytes(), 0)
            .map_err(|err| fail("write", err))?;
        Ok(Self {
            file,
            directory: directory.to_owned(),
        })
    }

    /// Whether the lock is still on the file that others would lock: somebody may have taken its name away.
    pub(crate) fn is_in_place(&self) -> bool {
        let place = |of: std::fs::Metadata| (of.dev(), of.ino());
        let named = std::fs::symlink_metadata(self.directory.join(FILE_NAME));
        match (self.file.metadata(), named) {
            (Ok(own), Ok(named)) => place(own) == place(named),
            _ => false,
        }
    }

    /// The directory this lock is for.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Who is the writer of `directory`, if anybody is. Looks only: nothing is made, locked or written.
///
/// # Errors
/// [`LockError::File`]: the lock file cannot be opened or asked.
pub fn writer_of(directory: impl AsRef<Path>) -> Result<Option<HeldBy>, LockError> {
    let directory = directory.as_ref();
    let path = directory.join(FILE_NAME);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(LockError::File {
                step: "open",
                path,
                source,
            });
        }
    };
    let mut asked = whole_file();
    fcntl(&file, FcntlArg::F_OFD_GETLK(&mut asked)).map_err(|err| LockError::File {
        step: "look at",
        path,
        source: err.into(),
    })?;
    let held = i32::from(asked.l_type) != libc::F_UNLCK;
    Ok(held.then(|| HeldBy {
        pid: holder(&file).filter(|pid| alive(*pid)),
        directory: directory.to_owned(),
    }))
}

fn whole_file() -> libc::flock {
    libc::flock {
        // Small constants of the C library, narrowed to the field's type.
        l_type: i16::try_from(libc::F_WRLCK).unwrap_or(1),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// The pid in the lock file, if there is one.
fn holder(file: &File) -> Option<u32> {
    let mut text = [0u8; 12];
    let length = file.read_at(&mut text, 0).ok()?;
    std::str::from_utf8(&text[..length])
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// Whether a process of this pid exists. A holder in another pid namespace may look dead; then it
/// is reported without a pid.
fn alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_the_first_one_and_gets_it_after_that() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let first = WriterLock::acquire(directory.path()).unwrap();
        let LockError::Held(held) = WriterLock::acquire(directory.path()).unwrap_err() else {
            panic!("expected the holder to be named")
        };
        assert_eq!(held.pid, Some(std::process::id()));
        assert!(held.to_string().contains(&std::process::id().to_string()));
        assert_eq!(writer_of(directory.path()).unwrap(), Some(held));
        drop(first);
        WriterLock::acquire(directory.path()).unwrap();
    }

    #[test]
    fn looking_for_the_writer_leaves_no_trace() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        assert_eq!(writer_of(directory.path()).unwrap(), None);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let file = directory.path().join("lock");
        std::fs::write(&file, "1          \n").unwrap();
        assert_eq!(writer_of(directory.path()).unwrap(), None);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "1          \n");
    }

    #[test]
    fn a_name_left_by_a_dead_holder_does_not_matter() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(directory.path().join("lock"), "1234567    \n").unwrap();
        WriterLock::acquire(directory.path()).unwrap();
    }
}
