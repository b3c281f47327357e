//! Rewriting `agent.scaling-group` in the file, keeping comments and layout.

use std::io;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf};

use toml_edit::{DocumentMut, Item, Value, value};

/// Which step of the rewrite failed.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// The new name can not be one.
    #[error("the resource group name is blank; give a name known to the manager")]
    BlankName,
    /// The file could not be read.
    #[error("{} can not be read", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// The file is not TOML, or has no `[agent]` table.
    #[error("{} has no usable [agent] section; correct it and try again", .0.display())]
    Document(PathBuf, #[source] Option<toml_edit::TomlError>),
    /// The copy could not be kept.
    #[error("the copy {} can not be written", .0.display())]
    Backup(PathBuf, #[source] io::Error),
    /// The new content could not be written.
    #[error("{} can not be written", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

/// Sets `agent.scaling-group` in the file, after copying the file to `<path>.bak`. The new content
/// replaces the old atomically and keeps its permissions and its owner; comments and layout stay.
///
/// # Errors
/// The failed step; the file is untouched then.
pub fn update_scaling_group(path: &Path, new: &str) -> Result<(), RewriteError> {
    if new.trim().is_empty() {
        return Err(RewriteError::BlankName);
    }
    // A symbolic link stays a link: the file it names is the one rewritten.
    let path = &path
        .canonicalize()
        .map_err(|e| RewriteError::Read(path.to_owned(), e))?;
    let text = std::fs::read_to_string(path).map_err(|e| RewriteError::Read(path.clone(), e))?;
    let mut document: DocumentMut = text
        .parse()
        .map_err(|e| RewriteError::Document(path.clone(), Some(e)))?;
    let agent = document
        .get_mut("agent")
        .and_then(Item::as_table_like_mut)
        .ok_or_else(|| RewriteError::Document(path.clone(), None))?;
    let key = if agent.contains_key("scaling_group") && !agent.contains_key("scaling-group") {
        "scaling_group"
    } else {
        "scaling-group"
    };
    match agent.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            let decor = old.decor().clone();
            *old = Value::from(new);
            *old.decor_mut() = decor;
        }
        None => {
            agent.insert(key, value(new));
        }
    }
    let backup = with_suffix(path, ".bak");
    copy(path, &backup).map_err(|e| RewriteError::Backup(backup, e))?;
    replace(path, &document.to_string()).map_err(|e| RewriteError::Write(path.clone(), e))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A copy with the permissions and, as far as this process may give it away, the owner of the file.
fn copy(path: &Path, to: &Path) -> io::Result<()> {
    std::fs::copy(path, to)?;
    let of = std::fs::metadata(path)?;
    match fchown(std::fs::File::open(to)?, Some(of.uid()), Some(of.gid())) {
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        done => done,
    }
}

fn replace(path: &Path, content: &str) -> io::Result<()> {
    let beside = with_suffix(path, ".new");
    let write = || {
        // Permissions first: a copy of a private file is never open to others.
        copy(path, &beside)?;
        std::fs::write(&beside, content)?;
        std::fs::File::open(&beside)?.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().inspect_err(|_| {
        let _ = std::fs::remove_file(&beside);
    })?;
    // The new file is in effect whether or not its name survives a loss of power from here on.
    if let Some(directory) = path.parent() {
        let _ = std::fs::File::open(directory).and_then(|directory| directory.sync_all());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_layout_stay_and_a_copy_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        let before = "# top\n[agent]\nmode = \"docker\"\nscaling-group   =  \"old\" # ours\n\n[etcd] # e\nnamespace='x'\n";
        std::fs::write(&path, before).unwrap();
        update_scaling_group(&path, "gpu \"a\"").unwrap();
        let after = std::fs::read_to_string(&path).unwrap();
        assert_eq!(after, before.replace("\"old\"", "'gpu \"a\"'"));
        assert_eq!(
            std::fs::read_to_string(dir.path().join("agent.toml.bak")).unwrap(),
            before
        );
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    /// Only root can give a file away.
    #[test]
    fn owner_and_permissions_stay() {
        use std::os::unix::fs::{PermissionsExt, chown};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "[agent]\n").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
        let root = nix::unistd::geteuid().is_root();
        if root {
            chown(&path, Some(1000), Some(1001)).unwrap();
        }
        update_scaling_group(&path, "a").unwrap();
        for file in [path, dir.path().join("agent.toml.bak")] {
            let of = std::fs::metadata(&file).unwrap();
            assert_eq!(of.mode() & 0o777, 0o640, "{}", file.display());
            let owned = (of.uid(), of.gid()) == (1000, 1001);
            assert!(owned || !root, "{}", file.display());
        }
    }

    #[test]
    fn a_missing_key_is_added_and_the_snake_form_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        std::fs::write(&path, "[agent]\nmode = \"docker\"\n").unwrap();
        update_scaling_group(&path, "a").unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "[agent]\nmode = \"docker\"\nscaling-group = \"a\"\n"
        );
        std::fs::write(&path, "[agent]\nscaling_group = \"x\"\n").unwrap();
        update_scaling_group(&path, "b").unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "[agent]\nscaling_group = \"b\"\n"
        );
    }

    #[test]
    fn a_broken_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.toml");
        for broken in ["[agent\n", "agent = 1\n", ""] {
            std::fs::write(&path, broken).unwrap();
            assert!(matches!(
                update_scaling_group(&path, "x"),
                Err(RewriteError::Document(..))
            ));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), broken);
        }
        assert!(matches!(
            update_scaling_group(&path, " "),
            Err(RewriteError::BlankName)
        ));
    }
}
