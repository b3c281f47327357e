//! The published runner packages, downloaded and installed once per checkout.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use control::runner::{InstallError, InstallOptions, WheelSource, install};

/// The directory of the four pinned wheels; `tests/scripts/runner-wheels` downloads what is missing.
pub fn wheels() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/runner-wheels");
    let run = Command::new(&script)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", script.display()))?;
    if !run.status.success() {
        bail!(
            "{} failed: {}; the package index must be reachable once",
            script.display(),
            run.status
        );
    }
    Ok(PathBuf::from(
        String::from_utf8(run.stdout)
            .context("wheel directory")?
            .trim(),
    ))
}

/// A runner directory with the pinned version installed, shared by all suites of a checkout.
pub fn installed() -> Result<PathBuf> {
    let wheels = wheels()?;
    let directory = wheels.with_file_name("runner-cache");
    let options = InstallOptions {
        source: WheelSource::Directory(wheels),
        ..InstallOptions::new(&directory)
    };
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        match install(&options, |_| ()) {
            Ok(_) => return Ok(directory),
            // Another test process is at it.
            Err(InstallError::Busy(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(err) => return Err(err).context("install the runner"),
        }
    }
}
