//! Whose pins lie in the BPF file system.
//!
//! In: directories of pins and the run directories of their agents. Out: those that nobody will
//! take over. Invariant: pins of an agent that runs, or that has only stopped, are somebody's; in
//! doubt they are, too.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Where agents pin, a directory each.
pub const HOME: &str = "/sys/fs/bpf/bai-agent";
/// A link in such a directory, to the agent's run directory.
const OWNER: &str = "owner";

/// The mark of a running agent at its directory of pins; it dies with its process.
#[derive(Debug)]
pub struct Claim {
    _lock: File,
}

/// Claims `directory` for the agent with this run directory.
///
/// # Errors
/// It can't be opened, or the link can't be made.
pub fn claim(directory: &Path, run_dir: &Path) -> io::Result<Claim> {
    let lock = File::open(directory)?;
    // Somebody may be asking just now whether it is held.
    lock.lock_shared()?;
    let owner = directory.join(OWNER);
    if std::fs::read_link(&owner).ok().as_deref() != Some(run_dir) {
        match std::fs::remove_file(&owner) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
            _ => std::os::unix::fs::symlink(run_dir, &owner)?,
        }
    }
    Ok(Claim { _lock: lock })
}

/// Directories in `home` whose agent does not run and has no run directory any more.
pub fn abandoned(home: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(home).into_iter().flatten().flatten();
    let is_abandoned = |directory: &PathBuf| {
        let gone = std::fs::read_link(directory.join(OWNER))
            .is_ok_and(|run_dir| matches!(run_dir.try_exists(), Ok(false)));
        gone && File::open(directory).is_ok_and(|it| it.try_lock().is_ok())
    };
    entries.map(|it| it.path()).filter(is_abandoned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_nobody_holds_and_nobody_can_come_back_to_is_abandoned() {
        let top = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = top.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let home = make("home");
        let (running, stopped, gone) = (make("home/a"), make("home/b"), make("home/c"));
        make("home/of-an-earlier-version");
        let run_dirs = ["run/a", "run/b", "run/c"].map(make);
        let held = claim(&running, &run_dirs[0]).unwrap();
        drop(claim(&stopped, &run_dirs[1]).unwrap());
        // The same directory may be claimed again, by another agent too.
        drop(claim(&gone, &run_dirs[1]).unwrap());
        drop(claim(&gone, &run_dirs[2]).unwrap());
        assert_eq!(abandoned(&home), Vec::<PathBuf>::new());
        std::fs::remove_dir(&run_dirs[0]).unwrap();
        std::fs::remove_dir(&run_dirs[2]).unwrap();
        assert_eq!(abandoned(&home), std::slice::from_ref(&gone));
        drop(held);
        let mut left = abandoned(&home);
        left.sort();
        assert_eq!(left, [running, gone]);
        assert_eq!(abandoned(&home.join("nothing")), Vec::<PathBuf>::new());
    }
}
