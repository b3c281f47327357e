//! Wheels: zip files whose `RECORD` lists a hash for each member.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Largest member accepted; the largest real one is 25 MB.
const MEMBER_LIMIT: u64 = 512 << 20;
/// Largest `RECORD` accepted; the largest real one is 6 KB.
const RECORD_LIMIT: u64 = 4 << 20;

/// Why a wheel can't be used.
#[derive(Debug, Error)]
pub enum WheelError {
    #[error("the wheel {path} cannot be opened")]
    Open {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("the wheel {path} is not a readable zip file")]
    Zip {
        path: PathBuf,
        #[source]
        cause: zip::result::ZipError,
    },
    #[error("the wheel {path} has no RECORD, so its files cannot be checked")]
    NoRecord { path: PathBuf },
    #[error("a line of RECORD in the wheel {path} cannot be read: {line:?}")]
    Record { path: PathBuf, line: String },
    #[error("{member} of the wheel {path} cannot be read")]
    Member {
        path: PathBuf,
        member: String,
        #[source]
        cause: io::Error,
    },
    #[error("{member} of the wheel {path} is larger than {MEMBER_LIMIT} bytes")]
    TooLarge { path: PathBuf, member: String },
    #[error("{member} of the wheel {path} is not listed in its RECORD")]
    Unlisted { path: PathBuf, member: String },
    #[error("{member} of the wheel {path} is not what its RECORD says; download the wheel again")]
    Mismatch { path: PathBuf, member: String },
    #[error("{member} of the wheel {path} would be written outside the target directory")]
    Escapes { path: PathBuf, member: String },
}

/// An opened wheel.
#[derive(Debug)]
pub(super) struct Wheel {
    path: PathBuf,
    zip: zip::ZipArchive<File>,
    /// Member to its hash and size.
    record: HashMap<String, (Vec<u8>, u64)>,
}

/// One checked file of a wheel.
#[derive(Debug)]
pub(super) struct Member {
    pub name: String,
    pub content: Vec<u8>,
    pub executable: bool,
}

impl Wheel {
    pub(super) fn open(path: &Path) -> Result<Self, WheelError> {
        let own = || path.to_owned();
        let file = File::open(path).map_err(|cause| WheelError::Open { path: own(), cause })?;
        let mut zip =
            zip::ZipArchive::new(file).map_err(|cause| WheelError::Zip { path: own(), cause })?;
        let name = zip
            .file_names()
            .find(|name| name.ends_with(".dist-info/RECORD") && name.matches('/').count() == 1)
            .map(str::to_owned)
            .ok_or_else(|| WheelError::NoRecord { path: own() })?;
        let member = zip
            .by_name(&name)
            .map_err(|cause| WheelError::Zip { path: own(), cause })?;
        let mut text = String::new();
        member
            .take(RECORD_LIMIT)
            .read_to_string(&mut text)
            .map_err(|cause| WheelError::Member {
                path: own(),
                member: name.clone(),
                cause,
            })?;
        let mut record = HashMap::new();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let refused = || WheelError::Record {
                path: own(),
                line: line.to_owned(),
            };
            // A name may hold a comma and is then quoted; hash and size can't.
            let mut fields = line.rsplitn(3, ',');
            let (Some(size), Some(hash), Some(name)) =
                (fields.next(), fields.next(), fields.next())
            else {
                return Err(refused());
            };
            let name = name.trim_matches('"').replace("\"\"", "\"");
            // RECORD itself has neither hash nor size.
            if hash.is_empty() && size.is_empty() {
                continue;
            }
            let hash = hash.strip_prefix("sha256=").ok_or_else(refused)?;
            let hash = URL_SAFE_NO_PAD.decode(hash).map_err(|_| refused())?;
            let size = size.trim().parse().map_err(|_| refused())?;
            record.insert(name, (hash, size));
        }
        Ok(Self {
            path: own(),
            zip,
            record,
        })
    }

    /// Reads every file, checked, in the archive's order. `take` gets only what `RECORD` vouches
    /// for.
    pub(super) fn read_all<E: From<WheelError>>(
        &mut self,
        mut take: impl FnMut(Member) -> Result<(), E>,
    ) -> Result<(), E> {
        for index in 0..self.zip.len() {
            if let Some(member) = self.read(index)? {
                take(member)?;
            }
        }
        Ok(())
    }

    fn read(&mut self, index: usize) -> Result<Option<Member>, WheelError> {
        let path = self.path.clone();
        let mut file = self.zip.by_index(index).map_err(|cause| WheelError::Zip {
            path: path.clone(),
            cause,
        })?;
        let member = file.name().to_owned();
        if file.is_dir() || member.ends_with(".dist-info/RECORD") {
            return Ok(None);
        }
        if file.enclosed_name().is_none() {
            return Err(WheelError::Escapes { path, member });
        }
        let Some((hash, size)) = self.record.get(&member) else {
            return Err(WheelError::Unlisted { path, member });
        };
        if *size > MEMBER_LIMIT {
            return Err(WheelError::TooLarge { path, member });
        }
        let mut content = Vec::new();
        let executable = file.unix_mode().is_some_and(|mode| mode & 0o111 != 0);
        // One byte more than promised is enough to see that there is more.
        if let Err(cause) = file.by_ref().take(*size + 1).read_to_end(&mut content) {
            return Err(WheelError::Member {
                path,
                member,
                cause,
            });
        }
        if content.len() as u64 != *size || Sha256::digest(&content).as_slice() != hash.as_slice() {
            return Err(WheelError::Mismatch { path, member });
        }
        Ok(Some(Member {
            name: member,
            content,
            executable,
        }))
    }
}
