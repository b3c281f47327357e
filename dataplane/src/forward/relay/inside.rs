//! Connections that begin inside their container: from a socket in its network namespace, so that they
//! pass its loopback device and neither the bridge nor the link between.
//!
//! In: rows of containers. Out: sockets in their namespaces, and the bytes that went that way, which the
//! links of the containers have not counted. Invariants: an address is led to inside only if it is the
//! container's own, so nothing sent there leaves it; namespaces are entered by threads of the relay alone;
//! one is kept for no longer than its container's row. Who can't be reached so is reached from the host.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use shared::desired::ContainerRow;
use shared::ids::{ContainerId, Generation};

use crate::causes::words;
use crate::sys::{datagram, netns};

/// So many addresses of a container are remembered as its own; it is asked about others each time.
const ADDRESSES: usize = 16;

/// Bytes that were sent to and received from a container past its links.
#[derive(Debug, Default)]
pub struct Carried {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Carried {
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
pub struct Inside {
    gate: Arc<Gate>,
    there: File,
    pid: u32,
    own: Mutex<Own>,
    carried: Arc<Carried>,
}

/// Addresses that were found to be the container's, as its row is.
#[derive(Debug, Default)]
struct Own {
    generation: Generation,
    addresses: Vec<IpAddr>,
}

/// What all share.
#[derive(Debug)]
struct Gate {
    here: File,
    /// The kernel does not let us.
    shut: AtomicBool,
}

impl Inside {
    /// A socket that `begin` makes towards `target` in the namespace; `None` where that is not the way.
    ///
    /// # Errors
    /// What `begin` answers.
    pub fn begin(
        &self,
        target: &SocketAddr,
        begin: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Option<Result<OwnedFd, Errno>> {
        let ip = target.ip();
        // Every namespace has a loopback of its own: that of the container is nobody's business.
        if self.gate.shut.load(Relaxed) || ip.is_loopback() || ip.is_unspecified() {
            return None;
        }
        let begun = netns::within(&self.there, &self.gate.here, || self.is_own(ip).then(begin));
        begun.unwrap_or_else(|errno| {
            if !self.gate.shut.swap(true, Relaxed) {
                tracing::warn!(
                    %errno,
                    "network namespaces of containers can't be entered, the relay connects from the host: it needs CAP_SYS_ADMIN"
                );
            }
            None
        })
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an address is the container's, asked in its namespace.
    fn is_own(&self, address: IpAddr) -> bool {
        let mut own = self.own();
        if own.addresses.contains(&address) {
            return true;
        }
        let is_own = datagram::is_own(address);
        if is_own && own.addresses.len() < ADDRESSES {
            own.addresses.push(address);
        }
        is_own
    }

    /// The container may have left a network when its row changes.
    fn ask_again(&self, generation: Generation) {
        let mut own = self.own();
        if own.generation != generation {
            *own = Own {
                generation,
                addresses: Vec::new(),
            };
        }
    }

    /// What was carried past the container's links.
    pub fn carried(&self) -> &Carried {
        &self.carried
    }
}

/// The namespaces of all containers.
#[derive(Debug, Default)]
pub struct Insides {
    gate: Option<Arc<Gate>>,
    known: Mutex<HashMap<ContainerId, Arc<Inside>>>,
}

impl Insides {
    /// None are known yet.
    pub fn new() -> Self {
        let gate = match netns::own() {
            Ok(here) => Some(Arc::new(Gate {
                here,
                shut: AtomicBool::new(false),
            })),
            Err(err) => {
                tracing::warn!(%err, "the own network namespace is not known, the relay connects from the host");
                None
            }
        };
        Self {
            gate,
            known: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ContainerId, Arc<Inside>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes which containers there are now, instead of those before. A container that was started again
    /// has another namespace.
    pub fn note(&self, rows: &BTreeMap<ContainerId, ContainerRow>) {
        let Some(gate) = &self.gate else {
            return;
        };
        let mut missing = Vec::new();
        {
            let mut known = self.lock();
            known.retain(|id, _| rows.contains_key(id));
            for (id, row) in rows {
                let same = known.get(id).filter(|it| it.pid == row.init_pid);
                if let Some(inside) = same {
                    inside.ask_again(row.generation);
                    continue;
                }
                let carried = known.remove(id).map(|it| Arc::clone(&it.carried));
                if row.init_pid != 0 && !row.host_network {
                    missing.push((*id, row.init_pid, carried.unwrap_or_default()));
                }
            }
        }
        for (id, pid, carried) in missing {
            match netns::of_process(pid, id) {
                Ok(there) => {
                    let inside = Inside {
                        gate: Arc::clone(gate),
                        there,
                        pid,
                        own: Mutex::default(),
                        carried,
                    };
                    self.lock().insert(id, Arc::new(inside));
                }
                Err(err) => tracing::debug!(
                    container_id = %id,
                    err = words(&err),
                    "the relay reaches this container from the host"
                ),
            }
        }
    }

    /// That of a container, if it is known.
    pub fn of(&self, container: ContainerId) -> Option<Arc<Inside>> {
        self.lock().get(&container).cloned()
    }

    /// Bytes that containers have received and sent past their links, of those that have.
    pub fn carried(&self) -> HashMap<ContainerId, [u64; 2]> {
        let known = self.lock();
        let told = known
            .iter()
            .map(|(id, inside)| (*id, inside.carried.told()));
        told.filter(|(_, bytes)| *bytes != [0, 0]).collect()
    }
}
