//! Files of the agent's own state: written whole or not at all, named by what may be in a configuration.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

/// Writes `bytes` beside `path`, flushes them, and renames.
///
/// # Errors
/// A step fails; the file at `path` is as it was then.
pub fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.to_owned().into_os_string();
    // Two writers never share a name: a record has one writer, but a crashed one may have left its.
    new.push(format!(".{}.new", Uuid::new_v4().simple()));
    let new = PathBuf::from(new);
    let written = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&new)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_data()
        })
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

/// An agent id as one path component: the id is from the configuration, so only its separators
/// are in the way.
pub fn plain_name(agent_id: &str) -> String {
    let name: String = agent_id
        .chars()
        .map(|c| match c {
            '/' | '\0' => '_',
            c => c,
        })
        .collect();
    match name.as_str() {
        "" | "." | ".." => format!("_{name}"),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_ids_become_one_path_component() {
        assert_eq!(plain_name("i-node"), "i-node");
        assert_eq!(plain_name("../x"), ".._x");
        assert_eq!(plain_name(".."), "_..");
        assert_eq!(plain_name(""), "_");
    }
}
