//! The python environment: an xz-compressed tar file, unpacked in process.

use super::manifest::{FileEntry, LinkEntry, hex};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use thiserror::Error;

/// Most bytes unpacked; the real environment has 117 MB.
const BYTES_LIMIT: u64 = 4 << 30;
/// Most members; the real environment has 6,445.
const MEMBERS_LIMIT: usize = 500_000;
/// Memory of the decoder; `xz -9` needs 65 MB.
const DECODER_MEMORY: u64 = 256 << 20;

/// Why the environment can't be unpacked.
#[derive(Debug, Error)]
pub enum ArchiveError {
    #[error("the python environment's archive cannot be decompressed")]
    Decompress(#[source] io::Error),
    #[error("{path} of the python environment cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{0:?} of the python environment's archive would be written outside its directory")]
    Escapes(String),
    #[error("{0:?} of the python environment's archive is neither file, directory nor link")]
    Kind(String),
    #[error(
        "the python environment's archive unpacks to more than {BYTES_LIMIT} bytes or {MEMBERS_LIMIT} files"
    )]
    TooLarge,
}

/// What was unpacked, paths relative to `prefix`'s parent.
#[derive(Debug, Default)]
pub(super) struct Unpacked {
    pub files: Vec<FileEntry>,
    pub links: Vec<LinkEntry>,
}

/// Unpacks `compressed` into `target` (made here). Entries are named `<prefix>/...` in the result.
/// Owners are the caller's, modes 0755 or 0644.
pub(super) fn unpack(
    compressed: &[u8],
    target: &Path,
    prefix: &str,
) -> Result<Unpacked, ArchiveError> {
    let stream = liblzma::stream::Stream::new_stream_decoder(DECODER_MEMORY, 0)
        .map_err(|err| ArchiveError::Decompress(err.into()))?;
    let decoder = liblzma::read::XzDecoder::new_stream(compressed, stream);
    let mut archive = tar::Archive::new(decoder);
    make_directory(target)?;
    let mut unpacked = Unpacked::default();
    let mut links: HashSet<PathBuf> = HashSet::new();
    let (mut members, mut left) = (0, BYTES_LIMIT);
    for entry in archive.entries().map_err(ArchiveError::Decompress)? {
        let mut entry = entry.map_err(ArchiveError::Decompress)?;
        members += 1;
        let shown = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let Some(relative) = beneath(&shown) else {
            return Err(ArchiveError::Escapes(shown));
        };
        if members > MEMBERS_LIMIT || entry.size() > left {
            return Err(ArchiveError::TooLarge);
        }
        // Nothing is written through a link, wherever it points.
        if relative
            .ancestors()
            .skip(1)
            .any(|parent| links.contains(parent))
        {
            return Err(ArchiveError::Escapes(shown));
        }
        let path = target.join(&relative);
        let named = format!("{prefix}/{}", relative.display());
        match entry.header().entry_type() {
            tar::EntryType::Directory => make_directory(&path)?,
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                left -= entry.size();
                make_directory(path.parent().unwrap_or(target))?;
                let executable = entry.header().mode().is_ok_and(|mode| mode & 0o111 != 0);
                unpacked
                    .files
                    .push(write_file(&path, named, &mut entry, executable)?);
            }
            tar::EntryType::Symlink => {
                let link = entry.link_name_bytes().unwrap_or_default();
                let link = String::from_utf8_lossy(&link).into_owned();
                let parent = relative.parent().unwrap_or(Path::new(""));
                if !stays_inside(parent, &link) {
                    return Err(ArchiveError::Escapes(shown));
                }
                make_directory(path.parent().unwrap_or(target))?;
                symlink(&link, &path).map_err(|cause| ArchiveError::Write {
                    path: path.clone(),
                    cause,
                })?;
                links.insert(relative);
                unpacked.links.push(LinkEntry {
                    path: named,
                    target: link,
                });
            }
            _ => return Err(ArchiveError::Kind(shown)),
        }
    }
    Ok(unpacked)
}

/// The path without `.` parts, if it has no other special ones.
fn beneath(path: &str) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(plain)
}

/// Whether a link in `directory` to `target` stays in the archive's directory.
fn stays_inside(directory: &Path, target: &str) -> bool {
    let mut depth = directory.components().count();
    for part in Path::new(target).components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            _ => return false,
        }
    }
    !target.is_empty()
}

pub(super) fn make_directory(path: &Path) -> Result<(), ArchiveError> {
    let made = fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)));
    made.map_err(|cause| ArchiveError::Write {
        path: path.to_owned(),
        cause,
    })
}

/// Writes a new file and gives its entry; the mode is set whatever the umask.
pub(super) fn write_file(
    path: &Path,
    named: String,
    content: &mut dyn Read,
    executable: bool,
) -> Result<FileEntry, ArchiveError> {
    let failed = |cause| ArchiveError::Write {
        path: path.to_owned(),
        cause,
    };
    let mode = if executable { 0o755 } else { 0o644 };
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0_u64;
    loop {
        // What can't be read is the archive's fault, what can't be written the disk's.
        let count = content
            .read(&mut buffer)
            .map_err(ArchiveError::Decompress)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        file.write_all(&buffer[..count]).map_err(failed)?;
        size += count as u64;
    }
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(failed)?;
    Ok(FileEntry {
        path: named,
        size,
        mode,
        sha256: hex(&hasher.finalize()),
    })
}
