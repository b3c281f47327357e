//! A file system whose server never answers, like one on a network whose server is away.
//!
//! Invariant: whoever waits in it goes on, with an error, when it is dropped.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::os::fd::AsRawFd;

/// One such mount.
#[derive(Debug)]
pub struct SilentMount {
    directory: PathBuf,
    /// Nobody reads what is asked there.
    server: Option<File>,
}

impl SilentMount {
    /// Mounts it over a directory.
    pub fn over(directory: &Path) -> Result<SilentMount> {
        let server = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .context("/dev/fuse can't be opened")?;
        let fd = server.as_raw_fd();
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other");
        mount(
            Some("silent"),
            directory,
            Some("fuse"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )
        .context("the silent file system can't be mounted")?;
        Ok(SilentMount {
            directory: directory.to_owned(),
            server: Some(server),
        })
    }
}

impl Drop for SilentMount {
    fn drop(&mut self) {
        // Ends what waits there.
        drop(self.server.take());
        let _ = umount2(&self.directory, MntFlags::MNT_DETACH);
    }
}
