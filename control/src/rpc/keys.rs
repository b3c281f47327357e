//! CURVE keys and the certificate files of pyzmq.
//!
//! In: key files; out: 32-byte keys. Invariant: a secret key never appears in text unless
//! [`KeyPair::secret_file_text`] is asked for it.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey(pub [u8; 32]);

/// A secret key; its `Debug` says nothing.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey(pub [u8; 32]);

/// A key pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyPair {
    /// The half to give away.
    pub public: PublicKey,
    /// The half to keep.
    pub secret: SecretKey,
}

/// Why a key could not be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file can't be read.
    #[error("cannot read key file {path}; check that it exists and that the agent may read it")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file has no such line.
    #[error("key file {path} has no {line:?} line; expected a ZeroMQ certificate")]
    Missing {
        /// The file.
        path: PathBuf,
        /// `public-key` or `secret-key`.
        line: &'static str,
    },
    /// The value is no key.
    #[error("{line:?} in key file {path} is not a key")]
    Value {
        /// The file.
        path: PathBuf,
        /// `public-key` or `secret-key`.
        line: &'static str,
        /// Why.
        #[source]
        source: Z85Error,
    },
}

/// Why text is not the Z85 form of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a key is 40 characters of Z85")]
pub struct Z85Error;

const ALPHABET: &[u8; 85] =
    b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#";

fn z85_decode(text: &str) -> Result<[u8; 32], Z85Error> {
    let (groups, rest) = text.as_bytes().as_chunks::<5>();
    if groups.len() != 8 || !rest.is_empty() {
        return Err(Z85Error);
    }
    let mut key = [0; 32];
    for (group, bytes) in groups.iter().zip(key.as_chunks_mut::<4>().0) {
        let word = group.iter().try_fold(0_u64, |word, letter| {
            let digit = ALPHABET.iter().position(|candidate| candidate == letter)?;
            Some(word * 85 + u64::try_from(digit).ok()?)
        });
        *bytes = word
            .and_then(|word| u32::try_from(word).ok())
            .ok_or(Z85Error)?
            .to_be_bytes();
    }
    Ok(key)
}

fn z85_encode(key: &[u8; 32]) -> String {
    let mut text = String::with_capacity(40);
    for bytes in key.as_chunks::<4>().0 {
        let word = u32::from_be_bytes(*bytes);
        for power in [85_u32.pow(4), 85_u32.pow(3), 85_u32.pow(2), 85, 1] {
            let digit = usize::try_from(word / power % 85).unwrap_or(0);
            text.push(char::from(ALPHABET[digit]));
        }
    }
    text
}

impl PublicKey {
    /// Reads the `public-key` line of a certificate file; a secret file has one as well.
    ///
    /// # Errors
    /// The file cannot be read, or holds no such line or no key in it.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        public_key(&read(path)?, path)
    }

    /// The 40 characters people and the manager exchange.
    #[must_use]
    pub fn to_z85(&self) -> String {
        z85_encode(&self.0)
    }
}

impl FromStr for PublicKey {
    type Err = Z85Error;

    fn from_str(text: &str) -> Result<Self, Z85Error> {
        z85_decode(text).map(Self)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_z85())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for SecretKey {
    type Err = Z85Error;

    fn from_str(text: &str) -> Result<Self, Z85Error> {
        z85_decode(text).map(Self)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(***)")
    }
}

impl KeyPair {
    /// Reads both lines of a secret certificate file (`NAME.key_secret`).
    ///
    /// # Errors
    /// The file cannot be read, or holds no such line or no key in it.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let text = read(path)?;
        let line = "secret-key";
        let secret = field(&text, line)
            .ok_or_else(|| KeyError::Missing {
                path: path.to_owned(),
                line,
            })?
            .parse()
            .map_err(|source| KeyError::Value {
                path: path.to_owned(),
                line,
                source,
            })?;
        Ok(Self {
            public: public_key(&text, path)?,
            secret,
        })
    }

    /// Whether only root and this process's user have any rights in a secret file: whoever can read it is the agent
    /// to all who ask for its key, and whoever can write it chooses that key.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn is_private(path: &Path) -> Result<bool, KeyError> {
        let found = std::fs::metadata(path).map_err(|source| KeyError::Read {
            path: path.to_owned(),
            source,
        })?;
        let user = rustix::process::geteuid().as_raw();
        Ok(only_for(user, found.uid(), found.mode()))
    }

    /// Makes a new pair from the system's randomness.
    #[must_use]
    pub fn generate() -> Self {
        super::transport::generate_pair()
    }

    /// Text of a secret certificate file, as pyzmq writes it. Store it with mode 0600.
    #[must_use]
    pub fn secret_file_text(&self) -> String {
        format!(
            "#   ZeroMQ CURVE **Secret** Certificate\n\
             #   DO NOT PROVIDE THIS FILE TO OTHER USERS nor change its permissions.\n\n\
             metadata\ncurve\n    public-key = \"{}\"\n    secret-key = \"{}\"\n",
            self.public,
            z85_encode(&self.secret.0)
        )
    }
}

fn only_for(user: u32, owner: u32, mode: u32) -> bool {
    mode & 0o077 == 0 && [0, user].contains(&owner)
}

fn read(path: &Path) -> Result<String, KeyError> {
    std::fs::read_to_string(path).map_err(|source| KeyError::Read {
        path: path.to_owned(),
        source,
    })
}

fn public_key(text: &str, path: &Path) -> Result<PublicKey, KeyError> {
    let line = "public-key";
    field(text, line)
        .ok_or_else(|| KeyError::Missing {
            path: path.to_owned(),
            line,
        })?
        .parse()
        .map_err(|source| KeyError::Value {
            path: path.to_owned(),
            line,
            source,
        })
}

/// The value of the last line that begins with `name`, as pyzmq finds it: sections and
/// indentation don't matter, `#` begins a comment line.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.starts_with('#') && line.starts_with(name))
        .filter_map(|line| line.split_once('='))
        .map(|(_, value)| value.trim_matches([' ', '\t', '\'', '"']))
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example keys of the libzmq manual.
    const PUBLIC: &str = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID";
    const SECRET: &str = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs";

    #[test]
    fn z85_both_ways() {
        let public: PublicKey = PUBLIC.parse().unwrap();
        assert_eq!(public.0[..4], [0xbb, 0x88, 0x47, 0x1d]);
        assert_eq!(public.to_z85(), PUBLIC);
        for bad in [
            "",
            "short",
            &PUBLIC.replace('Y', " "),
            &"#".repeat(40),
            &"€".repeat(40),
        ] {
            assert_eq!(bad.parse::<PublicKey>(), Err(Z85Error), "{bad}");
        }
    }

    #[test]
    fn a_secret_file_is_for_root_and_its_user_only() {
        assert!(only_for(0, 0, 0o100_600) && only_for(1000, 1000, 0o100_600));
        assert!(only_for(1000, 0, 0o100_400));
        assert!(!only_for(0, 1000, 0o100_600) && !only_for(1000, 1001, 0o100_600));
        for bit in 0..6 {
            assert!(!only_for(0, 0, 0o100_600 | 1 << bit));
        }
    }

    #[test]
    fn certificate_files_read_like_pyzmq_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.key_secret");
        let text = format!(
            "#   ****  comment ****\n# public-key = \"no\"\n\nmetadata\ncurve\n    \
             public-key = \"{PUBLIC}\"\n  secret-key='{SECRET}'\n"
        );
        std::fs::write(&path, text).unwrap();
        let pair = KeyPair::from_file(&path).unwrap();
        assert_eq!(pair.public.to_z85(), PUBLIC);
        assert_eq!(z85_encode(&pair.secret.0), SECRET);
        assert_eq!(PublicKey::from_file(&path).unwrap(), pair.public);
        assert!(!format!("{pair:?}").contains(SECRET));
        std::fs::write(&path, pair.secret_file_text()).unwrap();
        assert_eq!(KeyPair::from_file(&path).unwrap(), pair);

        std::fs::write(&path, format!("public-key = \"{PUBLIC}\"\n")).unwrap();
        let err = KeyPair::from_file(&path).unwrap_err();
        assert!(
            matches!(
                err,
                KeyError::Missing {
                    line: "secret-key",
                    ..
                }
            ),
            "{err}"
        );
        std::fs::write(&path, "public-key = \"xyz\"\n").unwrap();
        assert!(matches!(
            PublicKey::from_file(&path),
            Err(KeyError::Value { .. })
        ));
        assert!(matches!(
            PublicKey::from_file(&dir.path().join("none")),
            Err(KeyError::Read { .. })
        ));
    }
}
