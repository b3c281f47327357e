//! NVIDIA's device nodes on a host without them: clones of `/dev/null` and nodes that open nothing.
//!
//! In: numbers that no driver gives. Out: nodes below `/dev`. Invariant: nodes of a test end with this
//! value, those that all tests share (`nvidiactl`, `nvidia-uvm`) with the last one; a driver's own nodes
//! are left alone.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// What every process of CUDA opens.
const SHARED: [&str; 2] = ["/dev/nvidiactl", "/dev/nvidia-uvm"];
/// Where nodes of parts are.
const CAPABILITIES: &str = "/dev/nvidia-caps";
/// A major number that no driver of Linux has.
pub const MAJOR: u64 = 4000;

/// Nodes of one test.
#[derive(Debug)]
pub struct NvidiaNodes {
    own: Vec<String>,
    /// Shared by all who have nodes.
    lock: File,
}

impl NvidiaNodes {
    /// `None`, and why, where a test may not make device nodes.
    pub fn new() -> Result<Option<Self>> {
        let path = std::env::temp_dir().join("bai-test-nvidia-nodes.lock");
        let lock = File::options().create(true).append(true).open(path)?;
        lock.lock_shared()?;
        let nodes = Self {
            own: Vec::new(),
            lock,
        };
        std::fs::create_dir_all(CAPABILITIES)?;
        for node in SHARED {
            match null(node) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(err) => {
                    crate::skip::needs(format!("device nodes cannot be made here: {err}"));
                    return Ok(None);
                }
            }
        }
        Ok(Some(nodes))
    }

    /// `/dev/nvidia<minor>`.
    pub fn device(&mut self, minor: u32) -> Result<()> {
        let path = format!("/dev/nvidia{minor}");
        null(&path)?;
        self.own.push(path);
        Ok(())
    }

    /// `/dev/nvidia-caps/nvidia-cap<minor>`, with that number.
    pub fn capability(&mut self, minor: u32) -> Result<()> {
        let path = format!("{CAPABILITIES}/nvidia-cap{minor}");
        let mode = Mode::S_IRUSR | Mode::S_IRGRP | Mode::S_IROTH;
        mknod(
            path.as_str(),
            SFlag::S_IFCHR,
            mode,
            makedev(MAJOR, minor.into()),
        )?;
        self.own.push(path);
        Ok(())
    }
}

fn null(path: &str) -> Result<(), Errno> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IROTH | Mode::S_IWOTH;
    mknod(path, SFlag::S_IFCHR, mode, makedev(1, 3))
}

impl Drop for NvidiaNodes {
    fn drop(&mut self) {
        for path in &self.own {
            let _ = std::fs::remove_file(path);
        }
        // Of the last one: nobody else has the lock.
        if self.lock.try_lock().is_ok() {
            for node in SHARED {
                let ours = |found: std::fs::Metadata| found.rdev() == makedev(1, 3);
                if Path::new(node).metadata().is_ok_and(ours) {
                    let _ = std::fs::remove_file(node);
                }
            }
            let _ = std::fs::remove_dir(CAPABILITIES);
        }
    }
}
