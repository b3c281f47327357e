//! Files of the kernel that are read again and again.
//!
//! In: paths below a cgroup or /proc. Out: their text. A descriptor stays open between passes as
//! long as the budget lasts; beyond it a file is opened for each read. Invariant: "the file is not
//! there", "the cgroup is gone" and "there is no number in it" are three different answers, and
//! none of them is zero.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// Largest text believed. `io.stat` has a line of 100 to 250 bytes per device, `/proc/stat` one of 100 per
/// CPU and a number per interrupt line, of which a host of thousands of CPUs has 200,000.
const LARGEST: usize = 4 << 20;
/// First size of the buffer; what is larger on hosts of many disks or CPUs is found out once.
const USUAL: usize = 8 * 1024;

/// How many descriptors may be kept open between passes.
#[derive(Debug)]
pub struct Budget {
    left: AtomicU32,
}

impl Budget {
    /// A budget of so many descriptors.
    pub fn new(descriptors: u32) -> Arc<Self> {
        Arc::new(Self {
            left: AtomicU32::new(descriptors),
        })
    }

    fn take(&self) -> bool {
        self.left
            .fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1))
            .is_ok()
    }

    fn give(&self) {
        self.left.fetch_add(1, Relaxed);
    }

    /// Descriptors left.
    pub fn left(&self) -> u32 {
        self.left.load(Relaxed)
    }
}

/// Why there is no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// There is no such file: the kernel or this cgroup does not offer it.
    Missing,
    /// The cgroup was removed under an open descriptor.
    Gone,
    /// Anything else.
    Other(Errno),
}

/// One file.
#[derive(Debug)]
pub struct CachedFile {
    path: PathBuf,
    fd: Option<OwnedFd>,
    budget: Arc<Budget>,
    hopeless: bool,
}

impl CachedFile {
    /// A file that is opened at the first read.
    pub fn new(path: PathBuf, budget: &Arc<Budget>) -> Self {
        Self {
            path,
            fd: None,
            budget: Arc::clone(budget),
            hopeless: false,
        }
    }

    /// As [`CachedFile::read`], for what a kernel offers or does not for as long as the cgroup
    /// lives: a file found missing is not looked for again.
    pub fn read_if_offered<'a>(&mut self, buffer: &'a mut Vec<u8>) -> Option<&'a str> {
        if self.hopeless {
            return None;
        }
        match self.read(buffer) {
            Ok(text) => Some(text),
            Err(failure) => {
                // A pressure file of a kernel that was told to keep none answers so.
                self.hopeless =
                    matches!(failure, Failure::Missing | Failure::Other(Errno::OPNOTSUPP));
                None
            }
        }
    }

    /// Has the file not looked for again: the kernel does not offer it.
    pub fn give_up(&mut self) {
        self.hopeless = true;
    }

    /// Whether it was given up.
    pub fn is_hopeless(&self) -> bool {
        self.hopeless
    }

    /// Reads the text from its start.
    ///
    /// # Errors
    /// Why there is none.
    pub fn read<'a>(&mut self, buffer: &'a mut Vec<u8>) -> Result<&'a str, Failure> {
        if let Some(fd) = &self.fd {
            let read = read_all(fd, buffer);
            if matches!(read, Err(Failure::Gone)) {
                self.close();
            }
            return read.and_then(|length| text(buffer, length));
        }
        let fd = rustix::fs::open(&self.path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| match errno {
                Errno::NOENT | Errno::NOTDIR | Errno::NODEV => Failure::Missing,
                errno => Failure::Other(errno),
            })?;
        let length = read_all(&fd, buffer)?;
        if self.budget.take() {
            self.fd = Some(fd);
        }
        text(buffer, length)
    }

    fn close(&mut self) {
        if self.fd.take().is_some() {
            self.budget.give();
        }
    }
}

impl Drop for CachedFile {
    fn drop(&mut self) {
        self.close();
    }
}

fn read_all(fd: &OwnedFd, buffer: &mut Vec<u8>) -> Result<usize, Failure> {
    if buffer.len() < USUAL {
        buffer.resize(USUAL, 0);
    }
    let mut length = 0;
    loop {
        let rest = buffer.get_mut(length..).unwrap_or_default();
        let room = rest.len();
        match rustix::io::pread(fd, rest, length as u64) {
            Ok(read) if read < room => return Ok(length + read),
            Ok(read) => {
                length += read;
                if buffer.len() >= LARGEST {
                    return Err(Failure::Other(Errno::FBIG));
                }
                buffer.resize(buffer.len() * 2, 0);
            }
            Err(Errno::INTR) => {}
            Err(Errno::NODEV) => return Err(Failure::Gone),
            Err(errno) => return Err(Failure::Other(errno)),
        }
    }
}

fn text(buffer: &[u8], length: usize) -> Result<&str, Failure> {
    std::str::from_utf8(buffer.get(..length).unwrap_or_default())
        .map_err(|_| Failure::Other(Errno::ILSEQ))
}

/// A file that holds one number.
pub fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number behind a word at the start of a line, as in `memory.stat`.
pub fn keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(key)?;
        rest.strip_prefix([' ', '\t'])?.trim().parse().ok()
    })
}

/// The times of a pressure file (Documentation/accounting/psi.rst), ns: some, full.
pub fn pressure(text: &str) -> [Option<u64>; 2] {
    ["some", "full"].map(|kind| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let total = line
            .split_whitespace()
            .find_map(|word| word.strip_prefix("total="))?;
        Some(total.parse::<u64>().ok()?.saturating_mul(1000))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_their_whole_word() {
        let text = "usage_usec 12\nuser_usec 7\nuser 9\nempty\n";
        assert_eq!(keyed(text, "usage_usec"), Some(12));
        assert_eq!(keyed(text, "user"), Some(9));
        assert_eq!(keyed(text, "usage"), None);
        assert_eq!(keyed(text, "empty"), None);
        assert_eq!(number(" 42\n"), Some(42));
        assert_eq!(number("max\n"), None);
    }

    #[test]
    fn a_missing_file_is_missing_and_appears_when_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let budget = Budget::new(1);
        let path = directory.path().join("value");
        let mut file = CachedFile::new(path.clone(), &budget);
        let mut buffer = Vec::new();
        assert_eq!(file.read(&mut buffer), Err(Failure::Missing));
        std::fs::write(&path, "7\n").unwrap();
        assert_eq!(file.read(&mut buffer), Ok("7\n"));
        assert_eq!(budget.left(), 0);
        std::fs::write(&path, "8\n").unwrap();
        assert_eq!(file.read(&mut buffer), Ok("8\n"));
        drop(file);
        assert_eq!(budget.left(), 1);
    }

    #[test]
    fn pressure_is_in_nanoseconds() {
        let text = "some avg10=0.00 avg60=0.00 avg300=0.00 total=12\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=3\n";
        assert_eq!(pressure(text), [Some(12_000), Some(3_000)]);
        assert_eq!(pressure("some total=x\n"), [None, None]);
    }

    #[test]
    fn what_is_not_offered_is_not_looked_for_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("value");
        let mut file = CachedFile::new(path.clone(), &Budget::new(1));
        assert_eq!(file.read_if_offered(&mut Vec::new()), None);
        std::fs::write(&path, "1\n").unwrap();
        assert_eq!(file.read_if_offered(&mut Vec::new()), None);
    }

    #[test]
    fn beyond_the_budget_files_are_read_all_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let budget = Budget::new(0);
        let path = directory.path().join("value");
        std::fs::write(&path, "1\n").unwrap();
        let mut file = CachedFile::new(path, &budget);
        let mut buffer = Vec::new();
        assert_eq!(file.read(&mut buffer), Ok("1\n"));
        assert_eq!(file.read(&mut buffer), Ok("1\n"));
        assert!(file.fd.is_none());
    }

    #[test]
    fn long_texts_are_read_whole_and_endless_ones_refused() {
        let directory = tempfile::tempdir().unwrap();
        let budget = Budget::new(9);
        let path = directory.path().join("value");
        let long = "x".repeat(USUAL * 3 + 5);
        std::fs::write(&path, &long).unwrap();
        let mut file = CachedFile::new(path, &budget);
        let mut buffer = Vec::new();
        assert_eq!(file.read(&mut buffer).map(str::len), Ok(long.len()));
        let mut endless = CachedFile::new("/dev/zero".into(), &budget);
        assert_eq!(endless.read(&mut buffer), Err(Failure::Other(Errno::FBIG)));
    }
}
