//! Values that must never be printed, files that hold them, and passwords inside addresses.

use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use thiserror::Error;

use super::Fault;

/// The longest secret in a file.
const LONGEST: u64 = 4096;

/// Why a secret cannot be had from its file.
#[derive(Debug, Error)]
pub enum SecretFileError {
    /// It cannot be opened or read.
    #[error("the file cannot be read")]
    Io(#[from] io::Error),
    /// Others may read it.
    #[error("the file {}; {}", .0.why, .0.remedy)]
    Open(Fault),
    /// Somebody else could change it.
    #[error("the file belongs to user {0}; it must be root's or the agent's own")]
    Foreign(u32),
    /// It is empty, too long or not of printable characters.
    #[error(
        "the file does not hold a secret: one line of printable characters, at most {LONGEST} bytes"
    )]
    Unusable,
}

/// Reads the secret in a file that is root's or the process's own, and for its owner only.
///
/// # Errors
/// The file is not safe, or holds no secret. What it holds is never told.
pub fn read_secret_file(path: &Path) -> Result<Secret, SecretFileError> {
    let file = File::open(path)?;
    let facts = file.metadata()?;
    only_for_its_owner(&facts).map_err(SecretFileError::Open)?;
    let own = nix::unistd::geteuid().as_raw();
    if facts.uid() != 0 && facts.uid() != own {
        return Err(SecretFileError::Foreign(facts.uid()));
    }
    let mut text = String::new();
    match file.take(LONGEST + 1).read_to_string(&mut text) {
        Ok(length) if length as u64 <= LONGEST => {}
        Ok(_) => return Err(SecretFileError::Unusable),
        Err(err) if err.kind() == io::ErrorKind::InvalidData => {
            return Err(SecretFileError::Unusable);
        }
        Err(err) => return Err(err.into()),
    }
    let secret = text.trim();
    if secret.is_empty() || !secret.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(SecretFileError::Unusable);
    }
    Ok(Secret::new(secret))
}

/// Whether a file of these facts keeps a secret: nobody but its owner may read or write it.
pub(crate) fn only_for_its_owner(file: &Metadata) -> Result<(), Fault> {
    const OTHERS: u32 = 0o077;
    let mode = file.mode() & 0o7777;
    if mode & OTHERS == 0 {
        return Ok(());
    }
    Err(Fault::new(
        format!("has mode {mode:04o}, so others than its owner may use it"),
        "run chmod 0600 on it, and change the secret if somebody may have read it",
    ))
}

/// A secret text. It shows as `***`; only [`Secret::reveal`] gives it away.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether the text is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Replaces the password of `user:password@host`, with or without a scheme before it. Errs on the
/// side of hiding: whatever stands between the first colon and the last `@` is hidden.
pub(crate) fn mask_password(text: &str) -> String {
    let start = text.find("://").map_or(0, |at| at + 3);
    let rest = &text[start..];
    match (rest.find(':'), rest.rfind('@')) {
        (Some(colon), Some(at)) if colon < at => {
            format!("{}{}:***{}", &text[..start], &rest[..colon], &rest[at..])
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_secret_never_shows_its_text() {
        let secret = Secret::new("hunter2");
        assert_eq!(
            format!("{secret} {secret:?} {:?}", Some(&secret)),
            "*** *** Some(***)"
        );
        assert_eq!(secret.reveal(), "hunter2");
    }

    #[test]
    fn a_password_in_an_address_is_hidden() {
        for (text, shown) in [
            ("http://me:hunter2@etcd:2379/x", "http://me:***@etcd:2379/x"),
            ("me:hunter2@etcd:2379", "me:***@etcd:2379"),
            ("redis://:hunt@er2@h", "redis://:***@h"),
            ("tcp://10.0.0.1:2375", "tcp://10.0.0.1:2375"),
            ("someone@example", "someone@example"),
        ] {
            assert_eq!(mask_password(text), shown);
        }
    }

    #[test]
    fn a_secret_is_read_from_a_safe_file_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        let write = |text: &[u8], mode: u32| {
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            read_secret_file(&path)
        };
        assert_eq!(write(b"hush-hush\n", 0o600).unwrap().reveal(), "hush-hush");
        assert_eq!(write(b"  a \n", 0o400).unwrap().reveal(), "a");
        for mode in [0o640, 0o604, 0o620] {
            let err = write(b"hush-hush", mode).unwrap_err();
            assert!(matches!(err, SecretFileError::Open(_)), "{err}");
            assert!(err.to_string().contains("chmod"), "{err}");
        }
        let long = vec![b'x'; usize::try_from(LONGEST).unwrap() + 1];
        for text in [
            b"" as &[u8],
            b" \n",
            b"two lines\nhere",
            &[0xff, 0xfe],
            &long,
        ] {
            assert!(matches!(
                write(text, 0o600).unwrap_err(),
                SecretFileError::Unusable
            ));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(
            read_secret_file(&path).unwrap_err(),
            SecretFileError::Io(_)
        ));
    }

    proptest! {
        #[test]
        fn masking_never_panics_and_never_shows_the_password(
            user in "[a-z]{0,5}", password in "[a-zA-Z0-9:/@]{8,20}", host in "[a-z]{1,8}",
        ) {
            let shown = mask_password(&format!("http://{user}:{password}@{host}"));
            prop_assert_eq!(shown, format!("http://{user}:***@{host}"));
            let _ = mask_password(&password);
        }
    }
}
