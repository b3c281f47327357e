//! A device plugin of Kubernetes in another language: Python on the published gRPC library.
//!
//! In: how it behaves, as `tests/python/device_plugin.py` says. Out: which calls it got. Invariant: it
//! ends with this value.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use serde_json::Value as Json;

/// A running plugin.
#[derive(Debug)]
pub struct DevicePlugin {
    child: Child,
    input: ChildStdin,
    told: Arc<Mutex<Vec<Json>>>,
}

impl DevicePlugin {
    /// Starts it with a behaviour; it registers at `kubelet.sock` beside its socket.
    pub fn start(python: &Path, socket: &Path, resource: &str, behaviour: &Json) -> Result<Self> {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/device_plugin.py");
        let mut child = Command::new(python)
            .arg(program)
            .arg(definition()?)
            .args(
                [socket.parent(), socket.file_name().map(Path::new)]
                    .into_iter()
                    .flatten(),
            )
            .arg(resource)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("its stdin")?;
        let output = child.stdout.take().context("its stdout")?;
        let told = Arc::new(Mutex::new(Vec::new()));
        let listener = told.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let (Ok(said), Ok(mut told)) = (serde_json::from_str(&line), listener.lock()) {
                    told.push(said);
                }
            }
        });
        let mut plugin = Self { child, input, told };
        plugin.behave(behaviour)?;
        Ok(plugin)
    }

    /// Replaces its behaviour.
    pub fn behave(&mut self, behaviour: &Json) -> Result<()> {
        writeln!(self.input, "{behaviour}")?;
        Ok(self.input.flush()?)
    }

    /// What it has said, a line of JSON each.
    pub fn told(&self) -> Vec<Json> {
        self.told
            .lock()
            .map(|told| told.clone())
            .unwrap_or_default()
    }

    /// What it was told of a call.
    pub fn calls(&self, name: &str) -> Vec<Json> {
        let all = self.told().into_iter();
        all.filter(|said| said["called"] == name).collect()
    }
}

/// The published definition of the API, as descriptors of its messages and methods.
pub fn definition() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/device-plugin-api");
    let output = Command::new(&script).output()?;
    let reason = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{} failed: {reason}",
        script.display()
    );
    let path = String::from_utf8(output.stdout).context("a path is UTF-8")?;
    Ok(PathBuf::from(path.trim()))
}

impl Drop for DevicePlugin {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
