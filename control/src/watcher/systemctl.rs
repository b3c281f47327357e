//! The few calls of systemctl(1) and shutdown(8) that the watcher makes.
//!
//! In: a verb and a unit. Out: what the program said, or why it failed. Invariants: no shell; the
//! unit's name is checked by the configuration and stands after `--`; nothing of our environment but
//! `PATH` is handed on; each call has a deadline, and a program that misses it is killed.

use std::io;
use std::process::{Output, Stdio};
use std::time::Duration;

use thiserror::Error;
use tokio::process::Command;

/// How much of what a program said is told.
const WORDS: usize = 1024;

/// Why a call failed.
#[derive(Debug, Error)]
pub enum CallError {
    /// The program is not there.
    #[error("{0} is not on this host")]
    Missing(&'static str),
    /// It could not be started.
    #[error("cannot start {program}")]
    Start {
        /// Which.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It took too long and was killed.
    #[error("{call} did not end within {} s", after.as_secs_f64())]
    Timeout {
        /// Program and arguments.
        call: String,
        /// How long was waited.
        after: Duration,
    },
    /// It failed.
    #[error("{call} failed ({status}): {words}")]
    Failed {
        /// Program and arguments.
        call: String,
        /// Exit code or signal.
        status: String,
        /// What it said.
        words: String,
    },
}

/// Calls `systemctl VERB -- UNIT`.
///
/// # Errors
/// It did not end with success in time.
pub async fn systemctl(verb: &'static str, unit: &str, limit: Duration) -> Result<(), CallError> {
    let arguments = ["--no-ask-password", verb, "--", unit];
    let output = call("systemctl", &arguments, limit).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(format!("systemctl {verb} {unit}"), &output)),
    }
}

/// The word of `systemctl is-active`; its exit code only repeats it.
///
/// # Errors
/// It said nothing, or not in time.
pub async fn is_active(unit: &str, limit: Duration) -> Result<String, CallError> {
    let output = call("systemctl", &["is-active", "--", unit], limit).await?;
    let word = words(&output.stdout);
    match word.is_empty() {
        false => Ok(word),
        true => Err(failed(format!("systemctl is-active {unit}"), &output)),
    }
}

/// What systemd starts for a unit, as it shows it; nothing for a unit that it does not know.
///
/// # Errors
/// It did not end with success in time.
pub async fn program_of(unit: &str, limit: Duration) -> Result<String, CallError> {
    let arguments = ["show", "--property=ExecStart", "--value", "--", unit];
    let output = call("systemctl", &arguments, limit).await?;
    match output.status.success() {
        true => Ok(words(&output.stdout)),
        false => Err(failed(format!("systemctl show {unit}"), &output)),
    }
}

/// Switches the host off.
///
/// # Errors
/// It did not end with success in time.
pub async fn power_off(limit: Duration) -> Result<(), CallError> {
    let output = call("shutdown", &["-h", "now"], limit).await?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed("shutdown -h now".to_owned(), &output)),
    }
}

async fn call(
    program: &'static str,
    arguments: &[&str],
    limit: Duration,
) -> Result<Output, CallError> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    match tokio::time::timeout(limit, command.output()).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(err)) if err.kind() == io::ErrorKind::NotFound => Err(CallError::Missing(program)),
        Ok(Err(source)) => Err(CallError::Start { program, source }),
        Err(_) => Err(CallError::Timeout {
            call: format!("{program} {}", arguments.join(" ")),
            after: limit,
        }),
    }
}

fn failed(call: String, output: &Output) -> CallError {
    CallError::Failed {
        call,
        status: match output.status.code() {
            Some(code) => format!("exit {code}"),
            None => output.status.to_string(),
        },
        words: words(&output.stderr),
    }
}

fn words(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    text.trim().chars().take(WORDS).collect()
}
