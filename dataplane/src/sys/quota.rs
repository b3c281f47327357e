//! Project quotas: which project a directory is for, and what the project takes.
//!
//! In: an open directory. Out: what its file system has counted, without a walk. Source: ioctl_xfs_fsgetxattr(2),
//! quotactl(2). Invariant: what the kernel does not tell is no answer, never zero.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// linux/fs.h.
const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const FS_XFLAG_PROJINHERIT: u32 = 0x200;
/// linux/quota.h: `QCMD(Q_GETQUOTA, PRJQUOTA)`.
const GET_OF_PROJECT: libc::c_uint = (0x80_0007 << 8) | 2;
/// `dqb_valid`: what is there is told.
const HAS_LIMITS_AND_USE: u32 = 1 | 2 | 4 | 8;
/// Limits are in blocks of this many bytes.
const LIMIT_BLOCK: u64 = 1024;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    zero: [u8; 8],
}

const _: () = assert!(size_of::<Attributes>() == 28);

/// `struct if_dqblk`.
#[repr(C)]
#[derive(Default)]
struct Block {
    hard_limit: u64,
    soft_limit: u64,
    bytes: u64,
    files_hard_limit: u64,
    files_soft_limit: u64,
    files: u64,
    grace: u64,
    files_grace: u64,
    valid: u32,
}

const _: () = assert!(size_of::<Block>() == 72);

/// What a project takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes, those too that are only reserved yet.
    pub bytes: u64,
    /// Files and directories.
    pub files: u64,
    /// The lower of its two limits, in bytes.
    pub limit: Option<u64>,
}

/// The project of what is made in a directory; `None` when its file system knows none or it is that of everything
/// else, 0.
///
/// # Errors
/// The kernel's answer.
pub fn project(directory: impl AsFd) -> io::Result<Option<u32>> {
    let found = attributes(directory)?;
    let inherited = found.flags & FS_XFLAG_PROJINHERIT != 0;
    Ok(Some(found.project).filter(|project| inherited && *project != 0))
}

fn attributes(directory: impl AsFd) -> io::Result<Attributes> {
    let mut found = Attributes::default();
    // SAFETY: the kernel writes one `struct fsxattr`, whose layout this has, into memory that lives through the call.
    let answer = unsafe {
        libc::ioctl(
            directory.as_fd().as_raw_fd(),
            FS_IOC_FSGETXATTR,
            &raw mut found,
        )
    };
    match answer {
        0 => Ok(found),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What a project takes of the file system of an open directory.
///
/// # Errors
/// The kernel's answer: quotas of projects are not counted, the right is missing, the call is not known (before 5.14).
pub fn usage(directory: impl AsFd, project: u32) -> io::Result<Usage> {
    let mut found = Block::default();
    call(directory, GET_OF_PROJECT, project, &mut found)?;
    if found.valid & HAS_LIMITS_AND_USE != HAS_LIMITS_AND_USE {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let limits = [found.hard_limit, found.soft_limit].into_iter();
    let limit = limits.filter(|limit| *limit > 0).min();
    Ok(Usage {
        bytes: found.bytes,
        files: found.files,
        limit: limit.map(|limit| limit.saturating_mul(LIMIT_BLOCK)),
    })
}

fn call(
    directory: impl AsFd,
    command: libc::c_uint,
    project: u32,
    block: &mut Block,
) -> io::Result<()> {
    // SAFETY: the kernel reads or writes one `struct if_dqblk`, whose layout this has, in memory that is borrowed
    // through the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            directory.as_fd().as_raw_fd(),
            command,
            project,
            &raw mut *block,
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What only tests change.
#[cfg(test)]
pub mod change {
    use super::*;

    const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
    const SET_OF_PROJECT: libc::c_uint = (0x80_0008 << 8) | 2;
    const LIMITS: u32 = 1;

    /// Has what is made in a directory belong to a project.
    ///
    /// # Errors
    /// The file system refuses, or has no quotas of projects.
    pub fn project(directory: impl AsFd, project: u32) -> io::Result<()> {
        let mut wanted = attributes(&directory)?;
        wanted.flags |= FS_XFLAG_PROJINHERIT;
        wanted.project = project;
        // SAFETY: the kernel reads one `struct fsxattr`, whose layout this has.
        let answer = unsafe {
            libc::ioctl(
                directory.as_fd().as_raw_fd(),
                FS_IOC_FSSETXATTR,
                &raw mut wanted,
            )
        };
        match answer {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Limits what a project takes, in bytes.
    ///
    /// # Errors
    /// The file system refuses, or has no quotas of projects.
    pub fn limit(directory: impl AsFd, project: u32, bytes: u64) -> io::Result<()> {
        let mut wanted = Block {
            hard_limit: bytes / LIMIT_BLOCK,
            valid: LIMITS,
            ..Block::default()
        };
        call(directory, SET_OF_PROJECT, project, &mut wanted)
    }
}
