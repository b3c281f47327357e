//! What a failed call tells its caller: the class, repr and traceback of a Python exception.
//!
//! The manager shows class and repr to people and never branches on them, so the
//! well-known class names are kept. Invariant: `repr` reads like Python's for that class.

use std::fmt::{self, Write as _};

use uuid::Uuid;

/// A failure reply: the shape the manager turns into its `AgentError`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{repr}")]
pub struct Failure {
    /// Class name without its module, for example `RuntimeError`.
    pub class: String,
    /// The exception as Python's `repr` prints it.
    pub repr: String,
    /// Free text for developers; may be empty.
    pub traceback: String,
}

impl Failure {
    /// An exception with one text argument: `Class('message')`.
    pub fn new(class: impl Into<String>, message: impl AsRef<str>) -> Self {
        let class = class.into();
        let repr = format!("{class}({})", PythonText(message.as_ref()));
        Self {
            class,
            repr,
            traceback: String::new(),
        }
    }

    /// An exception without arguments: `Class()`.
    pub fn bare(class: impl Into<String>) -> Self {
        let class = class.into();
        let repr = format!("{class}()");
        Self {
            class,
            repr,
            traceback: String::new(),
        }
    }

    /// An exception whose repr is given as it is.
    pub fn with_repr(class: impl Into<String>, repr: impl Into<String>) -> Self {
        Self {
            class: class.into(),
            repr: repr.into(),
            traceback: String::new(),
        }
    }

    /// Adds text for developers.
    #[must_use]
    pub fn with_traceback(mut self, traceback: impl Into<String>) -> Self {
        self.traceback = traceback.into();
        self
    }

    /// `KeyError(UUID('...'))`: what the original answers for a kernel it doesn't know.
    #[must_use]
    pub fn key_error_uuid(id: Uuid) -> Self {
        Self::with_repr("KeyError", format!("KeyError(UUID('{}'))", id.hyphenated()))
    }

    /// `ValueError('badly formed hexadecimal UUID string')`: an id text that is not a UUID.
    #[must_use]
    pub fn bad_uuid() -> Self {
        Self::new("ValueError", "badly formed hexadecimal UUID string")
    }

    /// A `TypeError` with a message.
    pub fn type_error(message: impl AsRef<str>) -> Self {
        Self::new("TypeError", message)
    }

    /// A `ValueError` with a message.
    pub fn value_error(message: impl AsRef<str>) -> Self {
        Self::new("ValueError", message)
    }

    /// A `RuntimeError` with a message.
    pub fn runtime_error(message: impl AsRef<str>) -> Self {
        Self::new("RuntimeError", message)
    }

    /// `TimeoutError()`.
    #[must_use]
    pub fn timeout() -> Self {
        Self::bare("TimeoutError")
    }

    /// Several failures as the original reports them: one `TaskGroupError` whose repr lists all.
    #[must_use]
    pub fn group(message: &str, failures: &[Failure]) -> Self {
        let list: Vec<&str> = failures
            .iter()
            .map(|failure| failure.repr.as_str())
            .collect();
        Self::with_repr(
            "TaskGroupError",
            format!(
                "TaskGroupError({}, [{}])",
                PythonText(message),
                list.join(", ")
            ),
        )
    }
}

/// Prints text like Python's `repr` of a str.
#[derive(Clone, Copy, Debug)]
pub struct PythonText<'a>(pub &'a str);

impl fmt::Display for PythonText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quote = if self.0.contains('\'') && !self.0.contains('"') {
            '"'
        } else {
            '\''
        };
        f.write_char(quote)?;
        for letter in self.0.chars() {
            match letter {
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                '\\' => f.write_str("\\\\")?,
                letter if letter == quote => write!(f, "\\{letter}")?,
                letter if letter.is_ascii_control() => write!(f, "\\x{:02x}", u32::from(letter))?,
                letter => f.write_char(letter)?,
            }
        }
        f.write_char(quote)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_quoted_like_python_does() {
        for (text, repr) in [
            ("plain", "'plain'"),
            ("it's", "\"it's\""),
            ("both ' and \"", "'both \\' and \"'"),
            ("a\nb\\\x01", "'a\\nb\\\\\\x01'"),
            ("한글", "'한글'"),
        ] {
            assert_eq!(PythonText(text).to_string(), repr);
        }
    }

    #[test]
    fn shapes_of_the_original() {
        assert_eq!(
            Failure::new("RuntimeError", "text").repr,
            "RuntimeError('text')"
        );
        assert_eq!(Failure::timeout().repr, "TimeoutError()");
        let id = Uuid::from_u128(0x5d5f_6a40_3d9c_4f0e_9a55_0b1c_2d3e_4f50);
        assert_eq!(
            Failure::key_error_uuid(id).repr,
            "KeyError(UUID('5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50'))"
        );
    }
}
