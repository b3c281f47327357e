//! Connections that begin inside their container: from a socket in its network namespace, so that they
//! pass its loopback device and neither the bridge nor the link between.
//!
//! In: rows of containers, and their namespaces as a thread that may wait has found them. Out: sockets
//! there, and the bytes that went that way, which the links of the containers have not counted. Invariants:
//! a connection begins at the address it leads to, so it stays in the container; namespaces are entered by
//! threads of the relay alone; one is kept for no longer than its container's row. Who can't be reached so
//! is reached from the host.

use std::collections::HashMap;
use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use shared::desired::ContainerRow;
use shared::ids::ContainerId;

use crate::causes::chain;
use crate::sys::netns;

/// Bytes that were sent to and received from a container past its links.
#[derive(Debug, Default)]
pub struct CarriedBytes {
    received: AtomicU64,
    sent: AtomicU64,
}

impl CarriedBytes {
    /// Counts bytes the container has received and sent.
    pub fn count(&self, received: u64, sent: u64) {
        self.received.fetch_add(received, Relaxed);
        self.sent.fetch_add(sent, Relaxed);
    }

    fn told(&self) -> [u64; 2] {
        [self.received.load(Relaxed), self.sent.load(Relaxed)]
    }
}

/// A container's network namespace.
#[derive(Debug)]
pub struct ContainerNamespace {
    here: Arc<File>,
    there: File,
    /// The kernel does not let us.
    shut: AtomicBool,
    carried: Arc<CarriedBytes>,
}

impl ContainerNamespace {
    /// A socket that `begin` makes towards `target` in the namespace; `None` where that is not the way.
    /// `begin` must refuse (`EADDRNOTAVAIL`) a target that is not of this namespace.
    ///
    /// # Errors
    /// What else `begin` answers.
    pub fn begin(
        &self,
        target: &SocketAddr,
        begin: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Option<Result<OwnedFd, Errno>> {
        let ip = target.ip();
        // Every namespace has a loopback of its own: that of the container is nobody's business.
        if self.shut.load(Relaxed) || ip.is_loopback() || ip.is_unspecified() {
            return None;
        }
        match netns::within(&self.there, &self.here, begin) {
            Ok(Err(Errno::ADDRNOTAVAIL)) => None,
            Ok(begun) => Some(begun),
            Err(errno) => {
                if errno == Errno::PERM && !self.shut.swap(true, Relaxed) {
                    tracing::warn!(
                        "the network namespace of a container can't be entered, the relay reaches it from the host: CAP_SYS_ADMIN is needed"
                    );
                }
                None
            }
        }
    }

    /// What was carried past the container's links.
    pub fn carried(&self) -> &CarriedBytes {
        &self.carried
    }
}

/// A container there is a row of.
#[derive(Debug, Default)]
struct Container {
    /// Its first process; 0 where it has no namespace that could be entered.
    pid: u32,
    carried: Arc<CarriedBytes>,
    namespace: Option<Arc<ContainerNamespace>>,
}

/// The namespaces of all containers.
#[derive(Debug, Default)]
pub struct ContainerNamespaces {
    /// Our own; none where the relay reaches all from the host.
    here: Option<Arc<File>>,
    known: Mutex<HashMap<ContainerId, Container>>,
}

impl ContainerNamespaces {
    /// None are known yet.
    pub fn new() -> Self {
        let here = netns::own().inspect_err(|err| {
            tracing::warn!(%err, "the own network namespace is not known, the relay reaches containers from the host");
        });
        Self {
            here: here.ok().map(Arc::new),
            known: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Container>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a container's row. One that was started again has another namespace, which has to be found.
    pub fn note(&self, row: &ContainerRow) {
        if self.here.is_none() {
            return;
        }
        let pid = if row.host_network { 0 } else { row.init_pid };
        let mut known = self.lock();
        let known = known.entry(row.container_id).or_default();
        if known.pid != pid {
            known.pid = pid;
            known.namespace = None;
        }
    }

    /// A container's row is gone.
    pub fn forget(&self, container: ContainerId) {
        self.lock().remove(&container);
    }

    /// Forgets all others.
    pub fn keep(&self, is_there: impl Fn(&ContainerId) -> bool) {
        self.lock().retain(|id, _| is_there(id));
    }

    /// Looks for the namespace of a container, unless it is known. The kernel may take its time.
    pub fn find(&self, container: ContainerId, pid: u32) {
        let Some(here) = &self.here else {
            return;
        };
        let is_missing = |known: &Container| known.pid == pid && known.namespace.is_none();
        if !self.lock().get(&container).is_some_and(is_missing) {
            return;
        }
        match netns::of_process(pid, container) {
            Ok(there) => {
                if let Some(known) = self.lock().get_mut(&container)
                    && is_missing(known)
                {
                    known.namespace = Some(Arc::new(ContainerNamespace {
                        here: Arc::clone(here),
                        there,
                        shut: AtomicBool::new(false),
                        carried: Arc::clone(&known.carried),
                    }));
                }
            }
            Err(err) => tracing::debug!(
                container_id = %container,
                err = chain(&err),
                "the relay reaches this container from the host"
            ),
        }
    }

    /// That of a container, if it is known.
    pub fn of(&self, container: ContainerId) -> Option<Arc<ContainerNamespace>> {
        self.lock().get(&container)?.namespace.clone()
    }

    /// Bytes that containers have received and sent past their links, of those that have.
    pub fn carried(&self) -> HashMap<ContainerId, [u64; 2]> {
        let known = self.lock();
        let told = known.iter().map(|(id, known)| (*id, known.carried.told()));
        told.filter(|(_, bytes)| *bytes != [0, 0]).collect()
    }
}
