//! What loading reports: faults, notes, and where each effective value came from.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::load::Loaded;

/// Where an effective value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A line of the configuration file.
    File {
        /// Line, counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(&'static str),
    /// The built-in default.
    Default,
    /// The default of standalone mode.
    Standalone,
    /// Found out from the host; the text says how.
    Detected(&'static str),
    /// The cluster's etcd.
    Etcd {
        /// The key it stands under; its own name is the last part.
        under: &'static str,
        /// The scope it was found in.
        scope: &'static str,
    },
}

/// One effective value as shown by `check-config`. Secrets are already hidden.
#[derive(Debug, Clone, PartialEq)]
pub struct Effective {
    /// Section, such as `agent` or `debug.coredump`.
    pub section: String,
    /// Key in kebab case.
    pub key: &'static str,
    /// The value as text, empty when there is none.
    pub text: String,
    /// The value as JSON.
    pub json: serde_json::Value,
    /// Where it came from.
    pub origin: Origin,
}

/// What kind of remark a [`Note`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteKind {
    /// A key of the original that has no effect here.
    NotUsed,
    /// A key nobody knows.
    Unknown,
    /// Something that works but probably is not what was meant.
    Warning,
}

/// A remark that does not stop the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// What kind of remark.
    pub kind: NoteKind,
    /// Line of the file, when it is about one.
    pub line: Option<usize>,
    /// Section and key, such as `container.port-rnage`.
    pub key: String,
    /// One sentence.
    pub text: String,
}

impl Note {
    /// Writes the place, the key and the sentence on one line.
    pub(crate) fn write(&self, f: &mut impl fmt::Write, file: Option<&Path>) -> fmt::Result {
        if let (Some(file), Some(line)) = (file, self.line) {
            write!(f, "{}:{line}: ", file.display())?;
        }
        write!(f, "{} {}", self.key, self.text)
    }
}

/// One fault of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line of the file, counted from 1, when the value stands there.
    pub line: Option<usize>,
    /// The environment variable the value came from, if it did.
    pub variable: Option<&'static str>,
    /// The key of etcd and its scope the value came from, if it did.
    pub etcd: Option<(String, &'static str)>,
    /// Section and key; empty when the file is not TOML.
    pub key: String,
    /// The value as written, hidden when secret; none when it is missing.
    pub value: Option<String>,
    /// What is wrong.
    pub why: String,
    /// What would do.
    pub remedy: String,
}

impl Problem {
    fn write(&self, f: &mut fmt::Formatter<'_>, file: Option<&Path>) -> fmt::Result {
        if let Some((key, scope)) = &self.etcd {
            write!(f, "etcd {key} ({scope}): ")?;
        }
        match (self.variable, file, self.line) {
            _ if self.etcd.is_some() => {}
            (Some(variable), ..) => write!(f, "environment {variable}: ")?,
            (None, Some(file), Some(line)) => write!(f, "{}:{line}: ", file.display())?,
            (None, Some(file), None) => write!(f, "{}: ", file.display())?,
            (None, None, _) => {}
        }
        if !self.key.is_empty() {
            write!(f, "{}", self.key)?;
            if let Some(value) = &self.value {
                write!(f, " = {value}")?;
            }
            f.write_str(": ")?;
        }
        write!(f, "{}; {}", self.why, self.remedy)
    }
}

/// Why no configuration could be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Errors {
    /// None of the searched places holds a file.
    #[error(
        "no configuration file found; looked for {}; write one there, name one with --config, or run with --standalone",
        list(searched)
    )]
    NotFound {
        /// The places, in order.
        searched: Vec<PathBuf>,
    },
    /// The file is there and can not be read.
    #[error("{} can not be read; {}", path.display(), way_out(source))]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The configuration has faults; all of them are listed.
    #[error("{}", Listed { file: file.as_deref(), problems, unknown, passing: false })]
    Invalid {
        /// The file, if one was read.
        file: Option<PathBuf>,
        /// Every fault, in the order of the sections.
        problems: Vec<Problem>,
        /// What nobody knows: a slip there is the likeliest cause of something that is missing.
        unknown: Vec<Note>,
    },
    /// Nothing is wrong but names that do not resolve, which may pass: another try may succeed.
    #[error("{}", Listed { file: file.as_deref(), problems, unknown: &[], passing: true })]
    Unresolved {
        /// The file, if one was read.
        file: Option<PathBuf>,
        /// The names, as faults of what they are needed for.
        problems: Vec<Problem>,
        /// The configuration with the loopback address in their place, for who does not need them.
        loaded: Box<Loaded>,
    },
}

impl Errors {
    /// Whether another try may succeed without anybody changing the configuration.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Errors::Unresolved { .. })
    }
}

/// What to do about a file that can't be read.
fn way_out(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind;
    match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => "it is not there: correct the path",
        ErrorKind::PermissionDenied => "this user may not: run this as root",
        ErrorKind::IsADirectory => "it is a directory: name the file in it",
        ErrorKind::InvalidData => "it is not text in UTF-8: is it a configuration file?",
        _ => "see the log of the kernel (dmesg) for errors of its file system",
    }
}

fn list(paths: &[PathBuf]) -> String {
    let shown: Vec<String> = paths.iter().map(|p| p.display().to_string()).collect();
    shown.join(", ")
}

struct Listed<'a> {
    file: Option<&'a Path>,
    problems: &'a [Problem],
    unknown: &'a [Note],
    passing: bool,
}

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            _ if self.passing => {
                f.write_str("a name of the configuration does not resolve now:")?
            }
            1 => f.write_str("the configuration has 1 error:")?,
            n => write!(f, "the configuration has {n} errors:")?,
        }
        for problem in self.problems {
            f.write_str("\n  ")?;
            problem.write(f, self.file)?;
        }
        for note in self.unknown {
            f.write_str("\n  ")?;
            note.write(f, self.file)?;
        }
        Ok(())
    }
}
