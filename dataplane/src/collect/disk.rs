//! Sizes of file systems, asked for by a thread that may hang.
//!
//! In: paths of interest. Out: the last answers with their age. A dead network mount blocks
//! statfs(2) for minutes; it must block this thread only, never a pass. Invariant: the collector
//! only ever reads answers that are already there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use shared::ids::ContainerId;

use super::container::is_own_file_system;

/// One file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Its size.
    pub total: u64,
    /// What an ordinary user may still take.
    pub available: u64,
    /// What is in use.
    pub used: u64,
    /// Files on it.
    pub files: u64,
    /// When it was asked.
    pub at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// Any path: the file system it lies on.
    Any,
    /// Only if the path is a mount of its own; else its usage is not the container's.
    Own,
    /// As `Own`, inside a container: only while its first process is still the container's.
    Inside(u32, ContainerId),
}

#[derive(Debug, Default)]
struct State {
    wanted: Vec<(PathBuf, Kind)>,
    answers: HashMap<PathBuf, Space>,
    round: u64,
    stop: bool,
}

/// The asking thread's handle.
#[derive(Debug, Clone)]
pub struct Disk(Arc<(Mutex<State>, Condvar)>);

impl Disk {
    /// Starts the thread. It ends when told to, or with the process when it hangs.
    ///
    /// # Errors
    /// No thread.
    pub fn start() -> std::io::Result<Self> {
        let disk = Self(Arc::default());
        let own = disk.clone();
        std::thread::Builder::new()
            .name("disk".to_owned())
            .spawn(move || own.serve())?;
        Ok(disk)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            let wanted = {
                let mut state = self.lock();
                while state.round == seen && !state.stop {
                    state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.stop {
                    return;
                }
                seen = state.round;
                state.wanted.clone()
            };
            for (path, kind) in &wanted {
                let answer = ask(path, *kind);
                let mut state = self.lock();
                match (answer, kind) {
                    (Some(space), _) => {
                        state.answers.insert(path.clone(), space);
                    }
                    // The last word about a container that has died tells why it did.
                    (None, Kind::Inside(..)) => {}
                    (None, _) => {
                        state.answers.remove(path);
                    }
                }
            }
            self.lock()
                .answers
                .retain(|path, _| wanted.iter().any(|(known, _)| known == path));
        }
    }

    /// Asks for another round over these paths; never waits.
    pub fn refresh<'a>(
        &self,
        any: Option<&Path>,
        own: impl Iterator<Item = &'a str>,
        inside: impl Iterator<Item = (u32, ContainerId)>,
    ) {
        let mut state = self.lock();
        state.wanted.clear();
        state
            .wanted
            .extend(any.map(|path| (path.to_owned(), Kind::Any)));
        state
            .wanted
            .extend(own.map(|path| (PathBuf::from(path), Kind::Own)));
        state.wanted.extend(
            inside.map(|(pid, container)| (shared_memory(pid), Kind::Inside(pid, container))),
        );
        state.round += 1;
        self.0.1.notify_one();
    }

    /// The last answer about a path.
    pub fn answer(&self, path: &Path) -> Option<Space> {
        self.lock().answers.get(path).copied()
    }

    /// Ends the thread, unless it hangs.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.0.1.notify_one();
    }
}

/// A container's /dev/shm, as the host reaches it through the container's first process.
pub fn shared_memory(pid: u32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root/dev/shm"))
}

fn ask(path: &Path, kind: Kind) -> Option<Space> {
    match kind {
        Kind::Any => {}
        Kind::Own if is_own_file_system(path) => {}
        // Process ids are used again; the cgroup's path names the container.
        Kind::Inside(pid, container)
            if std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .is_ok_and(|text| text.contains(&container.to_string()))
                && is_own_file_system(path) => {}
        _ => return None,
    }
    let found = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Some(Space {
        total: bytes(found.f_blocks),
        available: bytes(found.f_bavail),
        used: bytes(found.f_blocks.saturating_sub(found.f_bfree)),
        files: found.f_files.saturating_sub(found.f_ffree),
        at: Instant::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn sizes_come_by_themselves_and_a_plain_directory_has_no_usage_of_its_own() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let inside = directory.path().join("scratch");
        std::fs::create_dir(&inside).unwrap();
        let disk = Disk::start().unwrap();
        disk.refresh(
            Some(directory.path()),
            [inside.to_str().unwrap()].into_iter(),
            std::iter::once((std::process::id(), ContainerId([0xab; 32]))),
        );
        let deadline = Instant::now() + Duration::from_secs(10);
        let space = loop {
            if let Some(space) = disk.answer(directory.path()) {
                break space;
            }
            assert!(Instant::now() < deadline, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(space.total >= space.available && space.total > 0);
        assert_eq!(disk.answer(&inside), None);
        let not_ours = shared_memory(std::process::id());
        assert_eq!(disk.answer(&not_ours), None, "another container's process");
        assert!(is_own_file_system(Path::new("/dev/shm")));
        disk.stop();
    }
}
