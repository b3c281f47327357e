//! NVIDIA devices where there are none: stand-ins for the driver's libraries, with the real C ABI, and
//! for `nvidia-smi`.
//!
//! In: a description of devices and processes (`tests/standin/devices.h` says how). Out: what a program
//! needs to find them. Invariant: the description changes as one, never half-written.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value as Json;
use shared::observed::AcceleratorRow;
use tempfile::TempDir;

use crate::dataplane::{Control, Options, Place, Process};
use crate::smi_comparison::Machine;
use crate::wait;

const LIBRARY: &str = "libnvidia-ml.so.1";

/// The row of a device or instance.
///
/// # Errors
/// It is not told of.
pub fn row_of<'a>(rows: &'a [AcceleratorRow], id: &str) -> Result<&'a AcceleratorRow> {
    let row = rows.iter().find(|row| row.id == id);
    row.with_context(|| format!("{id} is not told: {rows:?}"))
}

/// A driver whose devices the test makes up.
#[derive(Debug)]
pub struct StandIn {
    directory: TempDir,
}

impl StandIn {
    /// Compiles the library and describes the first devices.
    pub fn new(devices: &str) -> Result<Self> {
        Self::with(devices, &[])
    }

    /// The same with the library of a driver before 510, which has older forms of some calls only.
    pub fn before_510(devices: &str) -> Result<Self> {
        Self::with(devices, &["-DBEFORE_510"])
    }

    /// The same with the library of a driver that has no performance monitoring yet.
    pub fn before_520(devices: &str) -> Result<Self> {
        Self::with(devices, &["-DBEFORE_520"])
    }

    fn with(devices: &str, flags: &[&str]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let library = directory.path().join(LIBRARY);
        compile("nvml.c", &library, &[&["-shared", "-fPIC"], flags].concat())?;
        let stand_in = Self { directory };
        stand_in.describe(devices)?;
        Ok(stand_in)
    }

    /// Replaces devices, processes, faults and behaviour.
    pub fn describe(&self, devices: &str) -> Result<()> {
        let fresh = self.directory.path().join("devices.new");
        std::fs::write(&fresh, devices)?;
        Ok(std::fs::rename(&fresh, self.state())?)
    }

    /// Where they lie.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("devices")
    }

    /// A dataplane that samples and finds the stand-in, and its control.
    ///
    /// # Errors
    /// It does not start.
    pub fn sampling(&self) -> Result<(Place, Process, Control)> {
        Place::sampling(Options {
            environment: self.environment(),
            ..Options::default()
        })
    }

    /// Environment of a dataplane that finds the stand-in.
    pub fn environment(&self) -> Vec<(String, String)> {
        let library = self.directory.path().join(LIBRARY);
        vec![
            ("BAI_NVML_LIBRARY".to_owned(), library.display().to_string()),
            (
                "NVML_STANDIN".to_owned(),
                self.state().display().to_string(),
            ),
        ]
    }

    /// What NVIDIA's own binding for Python reads of it (`tests/python/nvml_binding.py`).
    pub fn by_binding(&self) -> Result<Json> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/nvml-binding");
        let made = Command::new(&script).output()?;
        let reason = String::from_utf8_lossy(&made.stderr);
        ensure!(
            made.status.success(),
            "{} failed: {reason}",
            script.display()
        );
        let interpreter = String::from_utf8(made.stdout).context("a path is UTF-8")?;
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/nvml_binding.py");
        let told = Command::new(interpreter.trim())
            .arg(program)
            .envs(self.environment())
            .env("LD_LIBRARY_PATH", self.directory())
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .output()?;
        let reason = String::from_utf8_lossy(&told.stderr);
        ensure!(
            told.status.success(),
            "NVIDIA's binding cannot read the stand-in: {reason}"
        );
        Ok(serde_json::from_slice(&told.stdout)?)
    }

    /// A machine on which programs compute on these devices, and `nvidia-smi` tells of them.
    pub fn machine(&self) -> Result<Machine> {
        let place = self.directory.path();
        compile("cuda.c", &place.join("libcuda.so.1"), &["-shared", "-fPIC"])?;
        compile("nvidia-smi.c", &place.join("nvidia-smi"), &[])?;
        let path = std::env::var("PATH").unwrap_or_default();
        let place = place.display();
        let mut environment = self.environment();
        environment.push(("PATH".to_owned(), format!("{place}:{path}")));
        environment.push(("LD_LIBRARY_PATH".to_owned(), place.to_string()));
        let patience = wait::here(Duration::from_secs(60));
        Ok(Machine {
            environment,
            patience,
        })
    }
}

fn compile(source: &str, to: &Path, flags: &[&str]) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("standin")
        .join(source);
    let mut compiler = Command::new("cc");
    // Each uses a part of what they have in common.
    compiler.args(["-O1", "-Wall", "-Werror", "-Wno-unused"]);
    compiler.args(flags);
    let compiled = compiler.arg("-o").arg(to).arg(&source).status();
    ensure!(
        compiled.context("no C compiler")?.success(),
        "{} does not compile",
        source.display()
    );
    Ok(())
}

/// Environment of a dataplane on a node without the driver.
pub fn none() -> Vec<(String, String)> {
    let name = "BAI_NVML_LIBRARY".to_owned();
    vec![(name, "/nowhere/libnvidia-ml.so.1".to_owned())]
}
