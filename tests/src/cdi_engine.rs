//! A Docker engine that knows CDI, beside the machine's own, which may be too old for it.
//!
//! In: CDI specifications. Out: its address. Invariant: it ends with this value, and with the process
//! that holds it.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;
use tempfile::TempDir;

use crate::{images, wait};

/// What the script answers where no such engine is possible.
const UNAVAILABLE: i32 = 69;
/// Unpacking comes before the first start.
const STARTED: Duration = Duration::from_secs(300);

/// The running engine.
#[derive(Debug)]
pub struct CdiEngine {
    script: Child,
    /// After the script: the engine's files go when it has ended.
    directory: TempDir,
}

impl CdiEngine {
    /// Starts it; `None` (with the reason printed as a skip) where that is not possible.
    pub fn start() -> Result<Option<Self>> {
        Self::with(&[])
    }

    /// As [`CdiEngine::start`], with images in containerd's store.
    pub fn with_containerd_images() -> Result<Option<Self>> {
        Self::with(&["containerd-images"])
    }

    fn with(arguments: &[&str]) -> Result<Option<Self>> {
        let directory = tempfile::Builder::new().prefix("bai-cdi-").tempdir()?;
        let complaints = directory.path().join("complaints");
        let script = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/cdi-engine"))
            .arg(directory.path())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&complaints)?)
            .spawn()
            .context("cannot run tests/scripts/cdi-engine")?;
        let mut engine = Self { script, directory };
        let host = engine.host();
        let answered = wait::until_blocking("the engine with CDI answers", STARTED, || {
            if let Some(ended) = engine.script.try_wait().transpose() {
                return Some(Err(ended));
            }
            let mut ask = images::docker(Some(&host));
            let asked = ask.args(["version", "--format", "{{.Server.Version}}"]);
            let answer = asked.output().ok()?;
            answer.status.success().then_some(Ok(()))
        });
        let Err(ended) = answered? else {
            return Ok(Some(engine));
        };
        let reason = std::fs::read_to_string(&complaints)?;
        if ended?.code() == Some(UNAVAILABLE) {
            crate::skip::needs(reason.trim());
            return Ok(None);
        }
        bail!("tests/scripts/cdi-engine failed: {reason}");
    }

    /// Its address, as `DOCKER_HOST` has it.
    pub fn host(&self) -> String {
        format!(
            "unix://{}",
            self.directory.path().join("docker.sock").display()
        )
    }

    /// Where a file for its containers may lie.
    pub fn place(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// Writes a specification. In its place: Docker 26.1 does not see one that is renamed into the
    /// directory.
    pub fn specify(&self, name: &str, specification: &Json) -> Result<()> {
        let file = self.directory.path().join("cdi").join(name);
        Ok(std::fs::write(file, specification.to_string())?)
    }

    /// What it says of itself.
    pub fn info(&self) -> Result<Json> {
        let mut ask = images::docker(Some(&self.host()));
        let answer = ask.args(["info", "--format", "{{json .}}"]).output()?;
        ensure!(answer.status.success(), "docker info fails");
        Ok(serde_json::from_slice(&answer.stdout)?)
    }
}

impl Drop for CdiEngine {
    fn drop(&mut self) {
        // The end of its input tells it to stop; it stops its containers first.
        drop(self.script.stdin.take());
        let ended = wait::until_blocking("the engine ends", Duration::from_secs(60), || {
            self.script.try_wait().ok().flatten()
        });
        if ended.is_err() {
            eprintln!("the engine with CDI does not end");
        }
    }
}
