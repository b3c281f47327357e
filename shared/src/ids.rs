//! Identifiers both processes know: kernels, sessions, containers, regions, generations.
//!
//! All are plain bytes, `Copy`, and print the way the rest of the world writes them.

use std::fmt;
use std::str::FromStr;

/// A text is not the identifier it should be.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum ParseIdError {
    /// The number of hexadecimal digits is wrong.
    #[error("{kind} has {found} hexadecimal digits, expected {expected}")]
    Length {
        /// Which identifier was expected.
        kind: &'static str,
        /// Digits expected.
        expected: usize,
        /// Digits found.
        found: usize,
    },
    /// A character is neither a hexadecimal digit nor an allowed dash.
    #[error("{kind} contains a character that is not a hexadecimal digit")]
    Digit {
        /// Which identifier was expected.
        kind: &'static str,
    },
}

fn parse_hex<const N: usize>(
    kind: &'static str,
    text: &str,
    dashes: bool,
) -> Result<[u8; N], ParseIdError> {
    let mut bytes = [0u8; N];
    let mut digits = 0usize;
    for character in text.bytes() {
        if dashes && character == b'-' {
            continue;
        }
        let value = match character {
            b'0'..=b'9' => character - b'0',
            b'a'..=b'f' => character - b'a' + 10,
            b'A'..=b'F' => character - b'A' + 10,
            _ => return Err(ParseIdError::Digit { kind }),
        };
        if let Some(byte) = bytes.get_mut(digits / 2) {
            *byte = (*byte << 4) | value;
        }
        digits += 1;
    }
    if digits == 2 * N {
        Ok(bytes)
    } else {
        Err(ParseIdError::Length {
            kind,
            expected: 2 * N,
            found: digits,
        })
    }
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

fn write_dashed(f: &mut fmt::Formatter<'_>, bytes: &[u8; 16]) -> fmt::Result {
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            f.write_str("-")?;
        }
        write!(f, "{byte:02x}")?;
    }
    Ok(())
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $length:literal, $kind:literal, $dashes:literal, $write:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
        pub struct $name(pub [u8; $length]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                $write(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                parse_hex($kind, text, $dashes).map(Self)
            }
        }
    };
}

identifier!(
    /// A Backend.AI compute container, as the RPCs name it (a UUID).
    KernelId, 16, "a kernel id", true, write_dashed
);
identifier!(
    /// A Backend.AI session (a UUID).
    SessionId, 16, "a session id", true, write_dashed
);
identifier!(
    /// A Docker container, by its full id (64 hexadecimal characters).
    ContainerId, 32, "a container id", false, write_hex
);
identifier!(
    /// One region file's life, random, set when the file is created.
    RegionId, 16, "a region id", true, write_dashed
);

/// A point in a region's history: one counter per region, never reused. Zero is before the first batch.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_id_prints_as_it_parses() {
        let text = "0b5d9a2e-6f3c-4d7e-8a1b-2c3d4e5f6071";
        let id: KernelId = text.parse().unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(text.replace('-', "").parse::<KernelId>().unwrap(), id);
    }

    #[test]
    fn container_id_takes_no_dashes_and_no_short_form() {
        let full = "ab".repeat(32);
        assert_eq!(full.parse::<ContainerId>().unwrap().to_string(), full);
        assert_eq!(
            "abababababab".parse::<ContainerId>(),
            Err(ParseIdError::Length {
                kind: "a container id",
                expected: 64,
                found: 12
            })
        );
        assert_eq!(
            "ab-ab".parse::<ContainerId>(),
            Err(ParseIdError::Digit {
                kind: "a container id"
            })
        );
    }
}
