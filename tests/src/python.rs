//! Python programs with the published Backend.AI packages, for suites that talk to the real thing.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};

/// What the environment script answers where no suitable Python exists.
const UNAVAILABLE: i32 = 69;

/// The interpreter with the published packages; `None` (with the reason printed as a skip) on a
/// machine without Python 3.13.
pub fn interpreter(suite: &str) -> Result<Option<PathBuf>> {
    let output = Command::new(root().join("scripts/python-env"))
        .output()
        .context("cannot run tests/scripts/python-env")?;
    let reason = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(UNAVAILABLE) {
        crate::skip::needs(format!("{suite}: {}", reason.trim()));
        return Ok(None);
    }
    if !output.status.success() {
        bail!("tests/scripts/python-env failed: {reason}");
    }
    let path = String::from_utf8(output.stdout).context("a path is UTF-8")?;
    Ok(Some(PathBuf::from(path.trim())))
}

/// Runs a program of `tests/python` to its end.
pub fn run(interpreter: &Path, program: &str, arguments: &[&str]) -> Result<Output> {
    Command::new(interpreter)
        .arg(root().join("python").join(program))
        .args(arguments)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .with_context(|| format!("cannot run {program}"))
}

/// Runs a program of `tests/python` and fails with its output when it fails; returns its stdout.
pub fn check(interpreter: &Path, program: &str, arguments: &[&str]) -> Result<String> {
    let output = run(interpreter, program, arguments)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{program} {arguments:?} failed: {}\n{stdout}\n{stderr}",
            output.status
        );
    }
    Ok(stdout)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
