//! The file that names the running process to scripts (`agent.pid-file`).
//!
//! In: a path of the configuration. Out: a file with the process id while the agent runs. Invariant:
//! no file that holds anything else than a number is ever overwritten or removed.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// A process id and a line break are shorter.
const LONGEST: u64 = 32;

/// The file of this process; removed when dropped.
#[derive(Debug)]
pub struct PidFile(PathBuf);

impl PidFile {
    /// Writes it, unless the path is a device (`/dev/null` is the default). A failure is told in
    /// the log and keeps nobody from running. Blocks.
    pub fn write(path: &Path) -> Option<PidFile> {
        match fs::metadata(path) {
            Ok(facts) if !facts.is_file() => return None,
            _ => {}
        }
        match write(path) {
            Ok(()) => Some(PidFile(path.to_owned())),
            Err(err) => {
                tracing::warn!(path = %path.display(), %err,
                    "agent.pid-file cannot be written; correct the path or leave the key out");
                None
            }
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Another agent may have taken the file over.
        if matches!(number_in(&self.0), Ok(Some(pid)) if pid == std::process::id())
            && let Err(err) = fs::remove_file(&self.0)
        {
            tracing::warn!(path = %self.0.display(), %err, "agent.pid-file cannot be removed");
        }
    }
}

fn write(path: &Path) -> io::Result<()> {
    let holds_words = fs::metadata(path).is_ok_and(|facts| facts.len() > 0);
    if number_in(path)?.is_none() && holds_words {
        let text = "the file is there and holds no process id";
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    let mut beside = path.as_os_str().to_owned();
    beside.push(format!(".{}", std::process::id()));
    let beside = PathBuf::from(beside);
    let written = (|| {
        let mut file = fs::File::create_new(&beside)?;
        writeln!(file, "{}", std::process::id())?;
        fs::rename(&beside, path)
    })();
    written.inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

/// The number that a file holds and nothing else; none when there is no file, or another one.
fn number_in(path: &Path) -> io::Result<Option<u32>> {
    match fs::metadata(path) {
        Ok(facts) if facts.len() > LONGEST => Ok(None),
        Ok(_) => Ok(fs::read_to_string(path)?.trim().parse().ok()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_there_while_it_is_held() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.pid");
        let file = PidFile::write(&path).unwrap();
        let own = format!("{}\n", std::process::id());
        assert_eq!(fs::read_to_string(&path).unwrap(), own);
        drop(file);
        assert!(!path.exists());
        // One that a killed agent left is taken over; one that another has taken over stays.
        fs::write(&path, "1\n").unwrap();
        let file = PidFile::write(&path).unwrap();
        fs::write(&path, "1\n").unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_pid_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passwd");
        for content in ["root:x:0:0", &"1".repeat(40)] {
            fs::write(&path, content).unwrap();
            assert!(PidFile::write(&path).is_none());
            assert_eq!(fs::read_to_string(&path).unwrap(), content);
        }
        assert!(PidFile::write(Path::new("/dev/null")).is_none());
        assert!(PidFile::write(&directory.path().join("no/such/place")).is_none());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
