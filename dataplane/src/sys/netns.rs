//! Network namespaces of containers (network_namespaces(7)).
//!
//! In: a process of a container. Out: its namespace, and what was done in it. Invariants: a process is
//! believed to be the container's only if it is in its control groups (process ids are used again); a
//! thread that has entered a namespace comes back before it does anything else, or the process ends.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use shared::ids::ContainerId;

/// Why a container's namespace is not known.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// The process is gone, or its namespace may not be looked at.
    #[error("the network namespace of process {pid} can't be opened")]
    Open {
        /// A process of the container.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process is another's.
    #[error("process {pid} is not in the control groups of the container; its id is used again")]
    Another {
        /// Which.
        pid: u32,
    },
}

/// The network namespace of a process of a container. All is asked of one directory, which is that
/// process's and no later one's.
///
/// # Errors
/// The process is gone or another's, or its namespace may not be looked at.
pub fn of_process(pid: u32, container: ContainerId) -> Result<File, NamespaceError> {
    let fails = |source| NamespaceError::Open { pid, source };
    let open = |place: &OwnedFd, name: &str| {
        let file = rustix::fs::openat(place, name, OFlags::CLOEXEC, Mode::empty());
        file.map(File::from).map_err(|errno| fails(errno.into()))
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let process = rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty());
    let process = process.map_err(|errno| fails(errno.into()))?;
    let mut groups = String::new();
    let mut file = open(&process, "cgroup")?;
    file.read_to_string(&mut groups).map_err(fails)?;
    if !groups.contains(&container.to_string()) {
        return Err(NamespaceError::Another { pid });
    }
    open(&process, "ns/net")
}

/// The namespace of this process.
///
/// # Errors
/// No /proc, or no descriptor.
pub fn own() -> io::Result<File> {
    File::open("/proc/self/ns/net")
}

/// Whether both are one namespace.
///
/// # Errors
/// The kernel does not tell.
pub fn is_same(a: &File, b: &File) -> io::Result<bool> {
    Ok(a.metadata()?.ino() == b.metadata()?.ino())
}

/// Moves this thread into a namespace for good.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` there and here.
pub fn enter(there: &File) -> Result<(), Errno> {
    move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))
}

/// Does something with this thread in the namespace `there`, and comes back to `here`. It must not be the
/// process's first thread: /proc/self/net, which others read, is that thread's.
///
/// # Errors
/// As [`enter`]; then nothing was done.
pub fn within<T>(there: &File, here: &File, run: impl FnOnce() -> T) -> Result<T, Errno> {
    enter(there)?;
    let done = run();
    if let Err(errno) = enter(here) {
        // Where this thread is now it would serve the wrong network. The kernel path goes on without us.
        tracing::error!(%errno, "cannot leave the network namespace of a container; the process ends");
        std::process::abort();
    }
    Ok(done)
}
