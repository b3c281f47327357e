//! The table of file systems, fstab(5).
//!
//! Invariant: the table is replaced as a whole by a rename, with its owner and mode; every line that
//! is not ours stays as it is, byte for byte.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::MountOrder;

/// A table larger than this is none.
const LARGEST: u64 = 1 << 20;

/// Why a table could not be changed.
#[derive(Debug, Error)]
pub enum FstabError {
    /// It could not be read.
    #[error("cannot read the table of file systems {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be replaced.
    #[error("cannot replace the table of file systems {path}")]
    Replace {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another volume is noted for the same place.
    #[error("{path} notes another volume at {point}: {line}; take it out first")]
    Other {
        /// Which table.
        path: PathBuf,
        /// Where.
        point: String,
        /// The line.
        line: String,
    },
}

/// A line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    source: String,
    point: String,
    fs_type: String,
    options: String,
}

impl Entry {
    pub fn of(path: &Path, order: &MountOrder) -> Entry {
        let options = order.options.as_deref().filter(|text| !text.is_empty());
        Entry {
            source: order.location.clone(),
            point: path.to_string_lossy().into_owned(),
            fs_type: order.fs_type.clone(),
            options: options.unwrap_or("defaults").to_owned(),
        }
    }

    fn line(&self) -> String {
        let field = |text: &str| {
            text.replace('\\', "\\134")
                .replace(' ', "\\040")
                .replace('\t', "\\011")
        };
        format!(
            "{} {} {} {} 0 0\n",
            field(&self.source),
            field(&self.point),
            field(&self.fs_type),
            field(&self.options)
        )
    }
}

/// Source and mount point of a line, as they are written; `None` for comments and blank lines.
fn fields(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_start();
    if line.starts_with('#') {
        return None;
    }
    let mut fields = line.split_ascii_whitespace();
    Some((fields.next()?, fields.next()?))
}

/// Notes a volume, unless it is noted already. Blocks.
pub(super) fn add(table: &Path, entry: &Entry) -> Result<(), FstabError> {
    let text = read(table)?;
    let ours = entry.line();
    let (source, point) = fields(&ours).unwrap_or_default();
    for line in text.lines() {
        match fields(line) {
            Some((other, at)) if at == point && other == source => return Ok(()),
            Some((_, at)) if at == point => {
                return Err(FstabError::Other {
                    path: table.to_owned(),
                    point: entry.point.clone(),
                    line: line.to_owned(),
                });
            }
            _ => {}
        }
    }
    let separator = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    replace(table, &format!("{text}{separator}{ours}"))
}

/// What was taken out of a table.
#[derive(Debug)]
pub(super) struct Removed {
    before: String,
    after: String,
    /// As they were written.
    pub lines: String,
}

/// Takes out what is noted for a mount point; `None` when nothing is. Blocks.
pub(super) fn remove(table: &Path, path: &Path) -> Result<Option<Removed>, FstabError> {
    let before = read(table)?;
    let point = Entry {
        source: "-".to_owned(),
        point: path.to_string_lossy().into_owned(),
        fs_type: "-".to_owned(),
        options: "-".to_owned(),
    }
    .line();
    let point = fields(&point).map(|(_, point)| point);
    let (lines, after): (Vec<&str>, Vec<&str>) = before
        .split_inclusive('\n')
        .partition(|line| fields(line).is_some_and(|(_, at)| Some(at) == point));
    if lines.is_empty() {
        return Ok(None);
    }
    let (lines, after) = (lines.concat(), after.concat());
    replace(table, &after)?;
    Ok(Some(Removed {
        before,
        after,
        lines,
    }))
}

/// Puts back what was taken out: where it was, or at the end of a table that somebody has changed
/// since. Blocks.
pub(super) fn put_back(table: &Path, removed: &Removed) -> Result<(), FstabError> {
    let text = read(table)?;
    if text == removed.after {
        return replace(table, &removed.before);
    }
    let separator = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    replace(table, &format!("{text}{separator}{}", removed.lines))
}

/// The table; empty when there is none. Blocks.
pub(super) fn read(table: &Path) -> Result<String, FstabError> {
    let failed = |source| FstabError::Read {
        path: table.to_owned(),
        source,
    };
    let size = match fs::metadata(table) {
        Ok(found) => found.len(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(err) => return Err(failed(err)),
    };
    if size > LARGEST {
        return Err(failed(io::Error::from(io::ErrorKind::FileTooLarge)));
    }
    fs::read_to_string(table).map_err(failed)
}

fn replace(table: &Path, text: &str) -> Result<(), FstabError> {
    write_whole(table, text).map_err(|source| FstabError::Replace {
        path: table.to_owned(),
        source,
    })
}

fn write_whole(table: &Path, text: &str) -> io::Result<()> {
    // A link stays a link: what it leads to is replaced.
    let target = match fs::canonicalize(table) {
        Ok(target) => target,
        Err(err) if err.kind() == io::ErrorKind::NotFound => table.to_owned(),
        Err(err) => return Err(err),
    };
    let before = fs::metadata(&target).ok();
    let directory = target.parent().unwrap_or(Path::new("/"));
    let beside = directory.join(format!(".fstab.{}.new", uuid::Uuid::new_v4().simple()));
    let written = (|| {
        let mode = before.as_ref().map_or(0o644, |found| found.mode() & 0o7777);
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&beside)?;
        // The mask of the process does not count for a file that is replaced.
        fs::set_permissions(&beside, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        if let Some(before) = &before {
            std::os::unix::fs::fchown(&file, Some(before.uid()), Some(before.gid()))?;
        }
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&beside, &target)?;
        fs::File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        // Gone already when only the last step failed.
        let _ = fs::remove_file(&beside);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn entry(source: &str, point: &str) -> Entry {
        Entry {
            source: source.to_owned(),
            point: point.to_owned(),
            fs_type: "nfs".to_owned(),
            options: "defaults".to_owned(),
        }
    }

    #[test]
    fn only_our_lines_come_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let table = directory.path().join("fstab");
        let before = "# by hand\n\n/dev/sda1\t/\text4 errors=remount-ro 0 1\n  # /mnt/v1 x";
        fs::write(&table, before).unwrap();
        fs::set_permissions(&table, fs::Permissions::from_mode(0o640)).unwrap();
        add(&table, &entry("10.0.0.1:/e", "/mnt/v1")).unwrap();
        add(&table, &entry("10.0.0.1:/e", "/mnt/v1")).unwrap();
        add(&table, &entry("10.0.0.1:/f", "/mnt/a b")).unwrap();
        let after = format!(
            "{before}\n10.0.0.1:/e /mnt/v1 nfs defaults 0 0\n10.0.0.1:/f /mnt/a\\040b nfs defaults 0 0\n"
        );
        assert_eq!(fs::read_to_string(&table).unwrap(), after);
        assert_eq!(fs::metadata(&table).unwrap().mode() & 0o777, 0o640);
        let other = add(&table, &entry("10.0.0.1:/other", "/mnt/v1")).unwrap_err();
        assert!(matches!(other, FstabError::Other { .. }), "{other}");
        remove(&table, Path::new("/mnt/a b")).unwrap();
        remove(&table, Path::new("/mnt/v1")).unwrap();
        remove(&table, Path::new("/mnt/v1")).unwrap();
        assert_eq!(fs::read_to_string(&table).unwrap(), format!("{before}\n"));
        // Nothing is left beside it.
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_was_taken_out_is_put_back_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let table = directory.path().join("fstab");
        let text = || fs::read_to_string(&table).unwrap();
        let before = "# first\na:/b  /mnt/v\tnfs ro 0 0\n# second\na:/c /mnt/v nfs defaults 0 0";
        fs::write(&table, before).unwrap();
        let removed = remove(&table, Path::new("/mnt/v")).unwrap().unwrap();
        assert_eq!(text(), "# first\n# second\n");
        put_back(&table, &removed).unwrap();
        assert_eq!(text(), before);
        assert!(remove(&table, Path::new("/mnt/w")).unwrap().is_none());
        // Somebody else writes in between.
        let removed = remove(&table, Path::new("/mnt/v")).unwrap().unwrap();
        fs::write(&table, "# other").unwrap();
        put_back(&table, &removed).unwrap();
        assert_eq!(text(), format!("# other\n{}", removed.lines));
        assert_eq!(removed.lines.lines().count(), 2);
    }

    #[test]
    fn a_link_stays_a_link_and_a_missing_table_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let (real, link) = (directory.path().join("real"), directory.path().join("link"));
        fs::write(&real, "").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        add(&link, &entry("a:/b", "/mnt/v")).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::read_to_string(&real).unwrap().contains("/mnt/v"));
        let new = directory.path().join("new");
        add(&new, &entry("a:/b", "/mnt/v")).unwrap();
        assert_eq!(
            fs::read_to_string(&new).unwrap(),
            "a:/b /mnt/v nfs defaults 0 0\n"
        );
    }
}
