//! What a container has open by addresses that it has lost.
//!
//! In: a process of the container, the addresses the container had. Out: those it has; its connections
//! from those it has lost are reset: their peers can say nothing to it, not even that they have ended.
//! Invariants: what is bound to an address that was never an interface's is not touched (routes
//! may make whole networks local, sockets may be bound to anything); a namespace is entered by a thread
//! that ends there.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::thread;

use shared::ids::ContainerId;

use super::interfaces::Interfaces;
use super::{NetlinkError, sockets};
use crate::sys::netns::{self, NamespaceError};

/// Why a container's addresses or connections are not known.
#[derive(Debug, thiserror::Error)]
pub enum StaleConnectionsError {
    /// Its network namespace is not known.
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    /// Its network namespace can't be entered.
    #[error("cannot enter the network namespace of process {pid}")]
    Enter {
        /// A process of the container.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel's answer.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
}

/// What was found at a container, and done.
#[derive(Debug, Default)]
pub struct Inspection {
    /// Addresses of its interfaces.
    pub addresses: HashSet<IpAddr>,
    /// Connections that were reset.
    pub cut: usize,
}

/// Looks at the addresses of a container, and resets what it has open by those of `before` that it has
/// no more. `pid` is a process of it. May take as long as the kernel likes.
///
/// # Errors
/// The step that failed.
pub fn reset(
    pid: u32,
    container: ContainerId,
    before: &HashSet<IpAddr>,
) -> Result<Inspection, StaleConnectionsError> {
    let fails = |source| StaleConnectionsError::Enter { pid, source };
    let there = netns::of_process(pid, container)?;
    let here = netns::own().map_err(fails)?;
    if netns::is_same(&there, &here).map_err(fails)? {
        return Ok(Inspection::default());
    }
    let work = move || {
        netns::enter(&there).map_err(|errno| fails(errno.into()))?;
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
        Ok(Inspection { addresses, cut })
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("stale-conns-ns".into());
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
        let another = reset(std::process::id(), ContainerId([7; 32]), &HashSet::new());
        assert!(
            matches!(
                another,
                Err(StaleConnectionsError::Namespace(
                    NamespaceError::Another { .. }
                ))
            ),
            "{another:?}"
        );
        let nobody = reset(u32::MAX, ContainerId([7; 32]), &HashSet::new());
        assert!(
            matches!(
                nobody,
                Err(StaleConnectionsError::Namespace(
                    NamespaceError::Open { .. }
                ))
            ),
            "{nobody:?}"
        );
    }
}
