//! Exit codes of the commands, and the errors they come from.

use std::process::ExitCode;

use super::output::{self, aside};

/// The exit code of a command that has done its work, and wanted to end with `code`: 74 (EX_IOERR) where it was a
/// success that nobody has seen.
pub fn told(code: u8) -> ExitCode {
    ExitCode::from(match code {
        0 if output::is_lost() => 74,
        code => code,
    })
}

/// Why a command could not do its work. The text is for a person; the code is for a script.
#[derive(Debug)]
pub enum Problem {
    /// The command line is wrong (64, EX_USAGE).
    Usage(anyhow::Error),
    /// Nobody answers, or not in time (69, EX_UNAVAILABLE).
    Unavailable(anyhow::Error),
    /// The configuration is wrong (78, EX_CONFIG).
    Config(anyhow::Error),
    /// The agent answered that it will not or can not (1).
    Refused {
        method: String,
        class: String,
        repr: String,
    },
    /// A check found something wrong; the findings have been printed (1).
    Findings,
    /// Anything else (70, EX_SOFTWARE).
    Other(anyhow::Error),
}

impl Problem {
    /// The code of `sysexits.h`, or 1 where the work itself failed.
    pub fn code(&self) -> u8 {
        match self {
            Problem::Usage(_) => 64,
            Problem::Unavailable(_) => 69,
            Problem::Config(_) => 78,
            Problem::Refused { .. } | Problem::Findings => 1,
            Problem::Other(_) => 70,
        }
    }

    /// Prints the problem to standard error and gives the exit code.
    pub fn report(self) -> ExitCode {
        let code = self.code();
        match self {
            Problem::Usage(error)
            | Problem::Unavailable(error)
            | Problem::Config(error)
            | Problem::Other(error) => aside!("bai-agent: {error:#}"),
            Problem::Refused {
                method,
                class,
                repr,
            } => aside!(
                "bai-agent: {method} was refused ({class}): {}",
                message_of(&repr)
            ),
            Problem::Findings => {}
        }
        ExitCode::from(code)
    }
}

impl From<config::Errors> for Problem {
    fn from(errors: config::Errors) -> Problem {
        match errors.is_passing() {
            true => Problem::Unavailable(errors.into()),
            false => Problem::Config(errors.into()),
        }
    }
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Self {
        Problem::Other(error)
    }
}

impl From<std::io::Error> for Problem {
    fn from(error: std::io::Error) -> Self {
        Problem::Other(error.into())
    }
}

/// The message inside a Python-style `Class('message')`, else the text as it is.
fn message_of(repr: &str) -> &str {
    let inner = repr
        .split_once('(')
        .and_then(|(_, rest)| rest.strip_suffix(')'))
        .unwrap_or(repr);
    ['\'', '"']
        .iter()
        .find_map(|quote| inner.strip_prefix(*quote)?.strip_suffix(*quote))
        .unwrap_or(inner)
}

#[cfg(test)]
mod tests {
    use super::message_of;

    #[test]
    fn the_message_is_taken_out_of_a_python_repr() {
        assert_eq!(message_of("RuntimeError('no such thing')"), "no such thing");
        assert_eq!(message_of("KeyError(UUID('x'))"), "UUID('x')");
        assert_eq!(message_of("plain"), "plain");
        assert_eq!(message_of(""), "");
    }
}
