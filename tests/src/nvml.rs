//! NVIDIA devices where there are none: a stand-in for the driver's library, with the real C ABI.
//!
//! In: a description of devices and processes (`tests/standin/nvml.c` says how). Out: what a program
//! needs to load it. Invariant: the description changes as one, never half-written.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// A driver whose devices the test makes up.
#[derive(Debug)]
pub struct StandIn {
    directory: TempDir,
}

impl StandIn {
    /// Compiles the library and describes the first devices.
    pub fn new(devices: &str) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("standin/nvml.c");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"])
            .arg(directory.path().join("libnvidia-ml.so.1"))
            .arg(&source)
            .status()
            .context("no C compiler")?;
        ensure!(compiled.success(), "{} does not compile", source.display());
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

    fn state(&self) -> PathBuf {
        self.directory.path().join("devices")
    }

    /// Environment of a dataplane that finds the stand-in.
    pub fn environment(&self) -> Vec<(String, String)> {
        let library = self.directory.path().join("libnvidia-ml.so.1");
        vec![
            ("BAI_NVML_LIBRARY".to_owned(), library.display().to_string()),
            (
                "NVML_STANDIN".to_owned(),
                self.state().display().to_string(),
            ),
        ]
    }
}

/// Environment of a dataplane on a node without the driver.
pub fn none() -> Vec<(String, String)> {
    let name = "BAI_NVML_LIBRARY".to_owned();
    vec![(name, "/nowhere/libnvidia-ml.so.1".to_owned())]
}
