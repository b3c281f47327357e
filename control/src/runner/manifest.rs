//! The marker of a complete installation: which files it has, and whether they are still so.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Name of the marker file.
pub(super) const FILE: &str = "manifest.json";
const FORMAT: u32 = 1;

/// One regular file of an installation, path relative to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileEntry {
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// One symbolic link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LinkEntry {
    pub path: String,
    pub target: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub format: u32,
    pub version: String,
    pub arch: String,
    /// Key of the python environment, such as `static-gnu`.
    pub environment_key: String,
    /// `14` in `backendai-krunner.v14`.
    pub environment_revision: String,
    /// `3.13`: part of mount targets.
    pub python: String,
    pub files: Vec<FileEntry>,
    pub links: Vec<LinkEntry>,
}

impl Manifest {
    pub(super) fn new(version: &str, arch: &str) -> Self {
        Self {
            format: FORMAT,
            version: version.to_owned(),
            arch: arch.to_owned(),
            environment_key: String::new(),
            environment_revision: String::new(),
            python: String::new(),
            files: Vec::new(),
            links: Vec::new(),
        }
    }

    /// Reads the marker of a version's directory.
    pub(super) fn read(directory: &Path) -> Result<Self, RunnerDirError> {
        let path = directory.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                return Err(RunnerDirError::Incomplete {
                    path: directory.to_owned(),
                });
            }
            Err(cause) => return Err(RunnerDirError::Read { path, cause }),
        };
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|cause| RunnerDirError::Manifest {
                path: path.clone(),
                cause,
            })?;
        if manifest.format != FORMAT {
            return Err(RunnerDirError::Format {
                path,
                format: manifest.format,
            });
        }
        Ok(manifest)
    }
}

/// Why the runner directory can't be used. All are the host's state; the message says what helps.
#[derive(Debug, Error)]
pub enum RunnerDirError {
    #[error("no runner is (completely) installed at {path}; run `bai-agent runner install`")]
    Incomplete { path: PathBuf },
    #[error("{path} cannot be read")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path} is damaged; run `bai-agent runner install --force` while no kernel runs")]
    Manifest {
        path: PathBuf,
        #[source]
        cause: serde_json::Error,
    },
    #[error(
        "{path} has format {format}, which another version of this agent has written; run `bai-agent runner install --force` while no kernel runs"
    )]
    Format { path: PathBuf, format: u32 },
    #[error("the runner directory {path} has no version {version}")]
    Unknown { path: PathBuf, version: String },
    #[error("{path} cannot be removed")]
    Remove {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

/// A version that is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Installation {
    /// Of the published packages.
    pub version: String,
    /// Processor architecture, as the packages name it.
    pub arch: String,
    /// Where it is.
    pub path: PathBuf,
    /// Regular files in it.
    pub files: usize,
    /// Their sizes summed up.
    pub bytes: u64,
}

/// The complete versions below `runner_dir`, by name. A directory that does not exist has none;
/// one that is not complete is passed over.
///
/// # Errors
/// The directory or a marker can't be read.
pub fn list(runner_dir: &Path) -> Result<Vec<Installation>, RunnerDirError> {
    let mut found = Vec::new();
    for path in version_directories(runner_dir)? {
        let manifest = match Manifest::read(&path) {
            Ok(manifest) => manifest,
            Err(RunnerDirError::Incomplete { .. }) => continue,
            Err(err) => return Err(err),
        };
        found.push(Installation {
            version: manifest.version,
            arch: manifest.arch,
            path,
            files: manifest.files.len(),
            bytes: manifest.files.iter().map(|file| file.size).sum(),
        });
    }
    Ok(found)
}

fn version_directories(runner_dir: &Path) -> Result<Vec<PathBuf>, RunnerDirError> {
    let read = |cause| RunnerDirError::Read {
        path: runner_dir.to_owned(),
        cause,
    };
    let entries = match fs::read_dir(runner_dir) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(read(err)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(read)?;
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if !hidden && entry.file_type().map_err(read)?.is_dir() {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

/// What `verify` found; empty means unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Files and links that were looked at.
    pub checked: usize,
    /// One sentence per file that is not as installed.
    pub problems: Vec<String>,
}

/// Compares every file of an installed version with its marker.
///
/// # Errors
/// The version is not there, or its marker can't be read.
pub fn verify(runner_dir: &Path, version: &str) -> Result<VerifyReport, RunnerDirError> {
    let directory = runner_dir.join(version);
    if version.starts_with('.') || version.contains('/') || !directory.is_dir() {
        let (path, version) = (runner_dir.to_owned(), version.to_owned());
        return Err(RunnerDirError::Unknown { path, version });
    }
    let manifest = Manifest::read(&directory)?;
    let mut report = VerifyReport::default();
    for file in &manifest.files {
        report.checked += 1;
        if let Some(problem) = file_problem(&directory, file) {
            report.problems.push(problem);
        }
    }
    for link in &manifest.links {
        report.checked += 1;
        match fs::read_link(directory.join(&link.path)) {
            Ok(target) if target == Path::new(&link.target) => {}
            Ok(_) => report
                .problems
                .push(format!("{} points elsewhere", link.path)),
            Err(err) => report
                .problems
                .push(format!("{} cannot be read: {err}", link.path)),
        }
    }
    Ok(report)
}

fn file_problem(directory: &Path, entry: &FileEntry) -> Option<String> {
    let path = directory.join(&entry.path);
    let name = &entry.path;
    let status = match fs::symlink_metadata(&path) {
        Ok(status) => status,
        Err(err) => return Some(format!("{name} cannot be read: {err}")),
    };
    if !status.is_file() {
        return Some(format!("{name} is not a regular file"));
    }
    let mode = status.permissions().mode() & 0o7777;
    if mode != entry.mode {
        return Some(format!(
            "{name} has the mode {mode:o} instead of {:o}",
            entry.mode
        ));
    }
    match hash_file(&path) {
        Ok((size, sha256)) if size == entry.size && sha256 == entry.sha256 => None,
        Ok(_) => Some(format!("{name} has other content")),
        Err(err) => Some(format!("{name} cannot be read: {err}")),
    }
}

fn hash_file(path: &Path) -> io::Result<(u64, String)> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut size = 0;
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok((size, hex(&hasher.finalize())));
        }
        size += count as u64;
        hasher.update(&buffer[..count]);
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes the versions other than `keep` whose directory is not in use, and what broken installs
/// left. `in_use` is asked with the version's path; the caller compares it with the mount sources
/// of all containers (also stopped ones) and of the journal. Returns the names removed.
///
/// # Errors
/// A directory that can't be listed or removed.
pub fn prune(
    runner_dir: &Path,
    keep: &[&str],
    in_use: impl Fn(&Path) -> bool,
) -> Result<Vec<String>, RunnerDirError> {
    let mut removed = Vec::new();
    for path in version_directories(runner_dir)? {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if keep.contains(&name.as_str()) || in_use(&path) {
            continue;
        }
        // Only what this module made: a stranger's directory has no marker.
        if matches!(
            Manifest::read(&path),
            Err(RunnerDirError::Incomplete { .. })
        ) {
            continue;
        }
        // Renamed first, so that a removal cut short leaves nothing that looks complete.
        let doomed = runner_dir.join(format!(".removed-{name}"));
        fs::rename(&path, &doomed)
            .and_then(|()| fs::remove_dir_all(&doomed))
            .map_err(|cause| RunnerDirError::Remove {
                path: path.clone(),
                cause,
            })?;
        removed.push(name);
    }
    Ok(removed)
}
