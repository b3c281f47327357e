//! Scratch: the directories of a kernel on the host.

use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where one kernel's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScratchPaths {
    /// `<scratch-root>/<kernel id>`.
    pub root: PathBuf,
    /// Mounted read-only at `/home/config`.
    pub config: PathBuf,
    /// Mounted at `/home/work`.
    pub work: PathBuf,
    /// Mounted at `/tmp`, for memory scratches.
    pub tmp: Option<PathBuf>,
}

impl ScratchPaths {
    /// The paths of a kernel below a scratch root.
    pub fn new(scratch_root: &Path, kernel_id: Uuid, in_memory: bool) -> Self {
        let root = scratch_root.join(kernel_id.to_string());
        Self {
            config: root.join("config"),
            work: root.join("work"),
            tmp: in_memory.then(|| scratch_root.join(format!("{kernel_id}_tmp"))),
            root,
        }
    }
}
