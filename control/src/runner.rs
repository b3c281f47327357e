//! The published in-container runner: installation and lookup.
//!
//! In: four wheels of the Backend.AI project (from a directory, or fetched by pip). Out: one
//! directory per version and architecture below `runner-dir`, and the paths in it that a kernel's
//! mounts name. Invariant: a directory whose name does not start with a dot is complete and never
//! changes again, since containers of running kernels have it mounted; it is made under another
//! name, checked against the hashes of the packages, and renamed.
//!
//! Layout of `<runner-dir>/<version>/`: `manifest.json` (the marker: every file with its hash),
//! `runner/` (entrypoint, tools, hook libraries), `kernel/` and `helpers/` (python packages),
//! `krunner/<key>/` (the python environment, mounted at `/opt/backend.ai`), `licenses/`.

mod archive;
mod files;
mod install;
mod manifest;
mod wheel;

pub use archive::ArchiveError;
pub use files::{LookupError, RunnerFiles};
pub use install::{InstallError, InstallOptions, Installed, WheelSource, install};
pub use manifest::{Installation, RunnerDirError, VerifyReport, list, prune, verify};
pub use wheel::WheelError;

/// Version of `backend.ai-kernel`, `-kernel-binary` and `-kernel-helper` that this agent drives.
pub const RUNNER_VERSION: &str = "25.15.8";
/// Version of `backend.ai-krunner-static-gnu`, the python environment for glibc images.
pub const ENVIRONMENT_VERSION: &str = "4.4.0";

/// Name of the directory that holds the pinned versions for an architecture
/// (`x86_64`, `aarch64`).
pub fn pinned_version(arch: &str) -> String {
    format!("{RUNNER_VERSION}-{ENVIRONMENT_VERSION}-{arch}")
}
