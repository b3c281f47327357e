//! What a container has open by addresses that it has lost.
//!
//! In: a process of the container, the addresses the container had. Out: those it has; its connections
//! from those it has lost are reset: their peers can say nothing to it, not even that they have ended.
//! Invariants: a process is believed to be the container's only if it is in its control groups (process
//! ids are used again); what is bound to an address that was never an interface's is not touched (routes
//! may make whole networks local, sockets may be bound to anything); a namespace is entered by a thread
//! that ends there.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::thread;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use shared::ids::ContainerId;

use super::interfaces::Interfaces;
use super::{NetlinkError, sockets};

/// Why a container's addresses or connections are not known.
#[derive(Debug, thiserror::Error)]
pub enum StraysError {
    /// Its network namespace can't be entered.
    #[error("cannot enter the network namespace of process {pid}")]
    Enter {
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
    /// The kernel's answer.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// What a look at a container has shown.
#[derive(Debug, Default)]
pub struct Looked {
    /// Addresses of its interfaces.
    pub addresses: HashSet<IpAddr>,
    /// Connections that were reset.
    pub cut: usize,
}

/// The network namespace of a process of the container. All is asked of one directory, which is that
/// process's and no later one's.
fn namespace(pid: u32, container: ContainerId) -> Result<File, StraysError> {
    let fails = |source| StraysError::Enter { pid, source };
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
        return Err(StraysError::Another { pid });
    }
    open(&process, "ns/net")
}

/// Looks at the addresses of a container, and resets what it has open by those of `before` that it has
/// no more. `pid` is a process of it. May take as long as the kernel likes.
///
/// # Errors
/// The step that failed.
pub fn look(
    pid: u32,
    container: ContainerId,
    before: &HashSet<IpAddr>,
) -> Result<Looked, StraysError> {
    let fails = |source| StraysError::Enter { pid, source };
    let there = namespace(pid, container)?;
    let here = fs::metadata("/proc/self/ns/net").map_err(fails)?;
    if there.metadata().map_err(fails)?.ino() == here.ino() {
        return Ok(Looked::default());
    }
    let work = move || {
        move_into_link_name_space(there.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|errno| fails(errno.into()))?;
        let interfaces = Interfaces::open()?.list()?;
        let addresses: HashSet<IpAddr> = interfaces
            .into_values()
            .flat_map(|it| it.addresses)
            .collect();
        let lost: HashSet<IpAddr> = before.difference(&addresses).copied().collect();
        let cut = match lost.is_empty() {
            true => 0,
            false => sockets::cut_from(&lost)?,
        };
        Ok(Looked { addresses, cut })
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("strays-inside".into());
        let thread = thread.spawn_scoped(scope, work).map_err(fails)?;
        let panicked = || io::Error::other("the thread that entered it has panicked");
        thread.join().unwrap_or_else(|_| Err(fails(panicked())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_the_containers_is_not_believed() {
        let another = look(std::process::id(), ContainerId([7; 32]), &HashSet::new());
        assert!(
            matches!(another, Err(StraysError::Another { .. })),
            "{another:?}"
        );
        let nobody = look(u32::MAX, ContainerId([7; 32]), &HashSet::new());
        assert!(
            matches!(nobody, Err(StraysError::Enter { .. })),
            "{nobody:?}"
        );
    }
}
