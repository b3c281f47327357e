//! What a directory takes, counted file by file.
//!
//! In: a directory on the host whose contents a container changes while it is counted. Out: bytes and
//! files. Invariants: no link is followed and no mount entered; a count uses a twentieth of a core at
//! most and ends after [`MOST`] entries, with what it has found: at least so much is taken; it is
//! repeated the more seldom the longer it takes.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use super::Space;
use crate::background_queries::QueryResult;

/// Entries after which a count ends. What is left out makes a size too small, but no size at all would
/// hide the largest directories, and the last one would be told for good.
const MOST: u64 = 500_000;
/// Directories within directories, each an open descriptor. What lies deeper is not counted.
const DEEPEST: usize = 128;
/// Shortest time from one count to the next.
const PAUSE: Duration = Duration::from_secs(30);
/// A count that takes time makes the next one wait so many times as long.
const SELDOM: u32 = 10;
/// Work done at a stretch, and how many times as long is rested then.
const STRETCH: (Duration, u32) = (Duration::from_millis(5), 19);

/// When each directory may be counted again.
#[derive(Debug, Default)]
pub(super) struct Trees(Mutex<HashMap<PathBuf, Instant>>);

impl Trees {
    /// Counts a directory, unless it was counted a short time ago.
    pub(super) fn ask(&self, path: &Path) -> QueryResult<Space> {
        let begin = Instant::now();
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut due = lock();
            if due.get(path).is_some_and(|due| begin < *due) {
                return QueryResult::Unknown;
            }
            // Those of containers that are gone.
            due.retain(|_, due| begin < *due + PAUSE * SELDOM);
        }
        let counted = count(path, MOST);
        let next = Instant::now() + PAUSE.max(begin.elapsed() * SELDOM);
        lock().insert(path.to_owned(), next);
        match counted {
            Ok((used, files)) => QueryResult::Is(Space {
                total: None,
                available: 0,
                used,
                files: Some(files),
                at: Instant::now(),
            }),
            Err(_) => QueryResult::Gone,
        }
    }
}

/// Bytes and files of a directory, at once.
#[cfg(test)]
pub(super) fn count_all(path: &Path) -> Result<(u64, u64), Errno> {
    count(path, MOST)
}

/// Bytes and files of a directory, or of its first `most` entries.
///
/// # Errors
/// The directory can't be opened.
fn count(path: &Path, most: u64) -> Result<(u64, u64), Errno> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty())?;
    let top = rustix::fs::fstat(&root)?;
    let (mut bytes, mut files, mut entries) = (taken(&top), 0, 0);
    // Files of several names, which count once.
    let mut several = HashSet::new();
    let mut open = vec![Dir::new(root)?];
    let mut since = Instant::now();
    loop {
        let depth = open.len();
        let Some(directory) = open.last_mut() else {
            break;
        };
        let Some(entry) = directory.read() else {
            open.pop();
            continue;
        };
        // One that goes away while it is looked at is no loss.
        let Ok(entry) = entry else {
            open.pop();
            continue;
        };
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        if entries == most {
            break;
        }
        entries += 1;
        let within = directory.fd()?;
        let Ok(found) = statat(within, name, AtFlags::SYMLINK_NOFOLLOW) else {
            continue;
        };
        if found.st_dev != top.st_dev {
            continue;
        }
        let is_directory = FileType::from_raw_mode(found.st_mode) == FileType::Directory;
        if is_directory || found.st_nlink < 2 || several.insert(found.st_ino) {
            bytes += taken(&found);
            files += u64::from(!is_directory);
        }
        let below = (is_directory && depth < DEEPEST)
            .then(|| openat(within, name, flags, Mode::empty()).ok())
            .flatten();
        if let Some(below) = below {
            open.push(Dir::new(below)?);
        }
        if since.elapsed() >= STRETCH.0 {
            std::thread::sleep(since.elapsed() * STRETCH.1);
            since = Instant::now();
        }
    }
    Ok((bytes, files))
}

/// Blocks of 512 bytes, whatever the file system's own are (stat(2)).
fn taken(found: &rustix::fs::Stat) -> u64 {
    u64::try_from(found.st_blocks)
        .unwrap_or(0)
        .saturating_mul(512)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Told as the size: the owner of half a million files is found by them.
    #[test]
    fn what_is_beyond_the_bounds_makes_a_size_smaller_and_not_unknown() {
        let tree = tempfile::tempdir_in("/dev/shm").unwrap();
        let empty = count(tree.path(), MOST).unwrap().0;
        let files = |below: &Path, count: u8| {
            for number in 0..count {
                std::fs::write(below.join(number.to_string()), vec![1; 4096]).unwrap();
            }
        };
        files(tree.path(), 20);
        assert_eq!(count(tree.path(), 20), Ok((empty + 20 * 4096, 20)));
        assert_eq!(count(tree.path(), 7), Ok((empty + 7 * 4096, 7)));
        // The deepest directory that is opened is counted, and what is beside those below it.
        let mut deep = tree.path().to_owned();
        for depth in 1..DEEPEST + 3 {
            deep.push("d");
            std::fs::create_dir(&deep).unwrap();
            if depth >= DEEPEST - 1 {
                files(&deep, 1);
            }
        }
        assert_eq!(count(tree.path(), MOST).unwrap().1, 21);
    }

    #[test]
    fn every_file_counts_once_and_links_lead_nowhere() {
        let outside = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::write(outside.path().join("large"), vec![1; 1 << 20]).unwrap();
        let tree = tempfile::tempdir_in("/dev/shm").unwrap();
        let deep = tree.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("file"), vec![1; 9000]).unwrap();
        std::fs::hard_link(deep.join("file"), tree.path().join("again")).unwrap();
        std::os::unix::fs::symlink(outside.path(), tree.path().join("link")).unwrap();
        let sparse = std::fs::File::create(tree.path().join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let (bytes, files) = count(tree.path(), MOST).unwrap();
        assert_eq!(
            (bytes, files),
            (3 * 4096, 3),
            "what is stored, not what it seems"
        );
        assert_eq!(count(&tree.path().join("link"), 9), Err(Errno::NOTDIR));
        let trees = Trees::default();
        assert!(
            matches!(trees.ask(outside.path()), QueryResult::Is(space) if space.files == Some(1))
        );
        assert!(
            matches!(trees.ask(outside.path()), QueryResult::Unknown),
            "just counted"
        );
    }
}
