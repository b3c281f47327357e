//! The kubelet's side of the device-plugin API of Kubernetes, v1beta1, so that every vendor's
//! published plugin serves this node unchanged.
//!
//! In: registrations on `kubelet.sock`, and the devices each plugin lists. Out: a plugin in the
//! ledger per resource the configuration maps to a slot, and what a plugin answers for a container.
//! Invariants: one session per slot, the last to register; a plugin that dies, hangs or lies
//! makes its own devices unhealthy and nothing else, until it lists them again; every call has a
//! deadline and every answer a bound.

mod answer;
pub mod registration;
mod session;
pub mod wire;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use config::Config;
use shared::log_limit::LogLimit;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tonic::Status;

use super::engine::EngineFacts;
use crate::kernel::node::Node;
use crate::kernel::registry::Kernel;
use crate::resource::Allocation;
pub use answer::Granted;
use session::Session;
pub(super) use session::own_id;
use wire::{RegisterRequest, VERSION};

/// The socket plugins look for.
const SOCKET: &str = "kubelet.sock";
/// Connections at a time; a plugin needs one for a moment.
const CONNECTIONS: usize = 32;
/// Before the next try when the socket cannot be opened: the first, doubled up to the last.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// Whether the socket is still there is looked at this often.
const CHECK: Duration = Duration::from_secs(10);

/// Why a plugin's devices could not be given to a container.
#[derive(Debug, Error)]
pub enum GrantError {
    /// Nobody serves them at the moment.
    #[error(
        "the device plugin of {resource} is not running; its devices can be given out when it has registered again"
    )]
    Gone {
        /// Resource name.
        resource: String,
    },
    /// It refused, failed, or did not answer.
    #[error("the device plugin of {resource} did not {step}: {status}")]
    Call {
        /// Resource name.
        resource: String,
        /// What it was asked.
        step: &'static str,
        /// What it said.
        status: Box<Status>,
    },
    /// Its answer makes no sense.
    #[error("the device plugin of {resource} answers what no container can have: {why}")]
    Answer {
        /// Resource name.
        resource: String,
        /// What.
        why: String,
    },
}

/// All plugins of a node.
#[derive(Debug, Default)]
pub struct PluginHost {
    directory: PathBuf,
    /// Whether the engine knows CDI names, if it has said so.
    engine: EngineFacts,
    /// Resource name to slot name.
    slots: BTreeMap<String, String>,
    /// By slot.
    sessions: Mutex<HashMap<String, Session>>,
}

impl PluginHost {
    /// The host of the configuration; without mapped resources it does nothing.
    pub fn new(config: &Config, engine: EngineFacts) -> Self {
        let settings = &config.node.accelerators;
        Self {
            engine,
            directory: settings.plugin_dir.clone(),
            slots: settings.device_plugins.clone(),
            sessions: Mutex::default(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self, slot: &str) -> Option<Session> {
        self.sessions().get(slot).cloned()
    }

    /// Whether a registration can be taken; the slot, if its resource is used, or what to tell the
    /// plugin. One that is not used is no error to tell: programs that serve several resources give
    /// all of them up when one is refused.
    fn accept(&self, request: &RegisterRequest) -> Result<Option<String>, Status> {
        if request.version != VERSION {
            return Err(Status::invalid_argument(format!(
                "this host speaks {VERSION}, not {:?}",
                request.version
            )));
        }
        // It becomes the path of a URI.
        let odd = |c: char| !c.is_ascii_graphic() || "/?#%\\".contains(c);
        let plain = |name: &str| !name.is_empty() && !name.contains(odd) && !name.starts_with('.');
        if !plain(&request.endpoint) || request.endpoint == SOCKET || request.endpoint.len() > 100 {
            return Err(Status::invalid_argument(format!(
                "the endpoint {:?} is no name of a socket beside this one",
                request.endpoint
            )));
        }
        Ok(self.slots.get(&request.resource_name).cloned())
    }

    /// Replaces what the ledger chose by what the plugins prefer, where the ledger can still give it.
    pub async fn prefer(&self, node: &Node, kernel: &Kernel, allocation: Allocation) -> Allocation {
        let mut allocation = allocation;
        for (slot, ids) in of_slots(&allocation) {
            let Some(session) = self.session(&slot) else {
                continue;
            };
            let mut available = node.ledger.free_devices(&slot);
            available.extend(ids.iter().cloned());
            let Some(preferred) = session.prefer(available, &ids).await else {
                continue;
            };
            if let Some(exchanged) = node.ledger.exchange(kernel.id, &slot, &preferred) {
                allocation = exchanged;
            }
        }
        allocation
    }

    /// What the plugins answer for a container with these devices.
    ///
    /// # Errors
    /// A plugin is gone, refuses, is late, or answers nonsense.
    pub async fn grant(&self, allocation: &Allocation) -> Result<Granted, GrantError> {
        let mut granted = Granted::default();
        for (slot, ids) in of_slots(allocation) {
            let Some((resource, _)) = self.slots.iter().find(|(_, of)| **of == slot) else {
                continue;
            };
            let session = self.session(&slot).ok_or_else(|| GrantError::Gone {
                resource: resource.clone(),
            })?;
            let answer = session.grant(ids).await?;
            if answer.by_cdi && !self.engine.get().cdi {
                return Err(GrantError::Answer {
                    resource: resource.clone(),
                    why: "CDI names, which this engine does not know (Docker 25 or newer with CDI switched on does; the agent asks until it is told)".to_owned(),
                });
            }
            granted.merge(answer);
        }
        Ok(granted)
    }
}

/// Slots of an allocation with the ids of the devices held.
fn of_slots(allocation: &Allocation) -> Vec<(String, Vec<String>)> {
    let all = allocation.devices().flat_map(|(_, slots)| slots);
    let held = all.map(|(slot, shares)| {
        let held = shares.iter().filter(|(_, amount)| !amount.is_zero());
        (slot.clone(), held.map(|(id, _)| id.clone()).collect())
    });
    held.filter(|(_, ids): &(_, Vec<_>)| !ids.is_empty())
        .collect()
}

/// Serves plugins until the agent stops; returns at once where none are mapped.
pub async fn serve(node: Arc<Node>) {
    if node.plugin_host.slots.is_empty() {
        return;
    }
    let stopping = node.stopping.clone();
    tokio::select! {
        () = keep_open(node) => {}
        () = stopping.cancelled() => {}
    }
}

/// Opens the socket, again and again where it has to be: another one may use the directory, or clean
/// it up.
async fn keep_open(node: Arc<Node>) {
    let host = &node.plugin_host;
    let directory = host.directory.display();
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let mut pause = PAUSES.0;
    let mut told = false;
    loop {
        match open(&host.directory).await {
            Ok((listener, ours)) => {
                tracing::info!(%directory, "waiting for device plugins");
                (pause, told) = (PAUSES.0, false);
                let gone = async {
                    while identity(&host.directory).await == Some(ours) {
                        tokio::time::sleep(CHECK).await;
                    }
                };
                tokio::select! {
                    () = receive(&node, &listener, &connections) => {}
                    () = gone => {}
                }
                tracing::warn!(%directory, "the socket for device plugins is gone; making it anew");
            }
            Err(err) => {
                if !std::mem::replace(&mut told, true) {
                    tracing::error!(%err, %directory,
                        "device plugins cannot be served for now, and this is tried again; see that node.accelerators.plugin-dir is writable and no kubelet uses it");
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSES.1);
            }
        }
    }
}

async fn receive(node: &Arc<Node>, listener: &UnixListener, connections: &Arc<Semaphore>) {
    let mut trouble = LogLimit::new();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(err) => {
                if let Some(suppressed) = trouble.pass() {
                    tracing::warn!(%err, suppressed, "a device plugin cannot be received; it is tried again");
                }
                tokio::time::sleep(PAUSES.0).await;
                continue;
            }
        };
        // Closed at once when there are too many: the plugin tries again.
        let Ok(place) = connections.clone().try_acquire_owned() else {
            continue;
        };
        let node = node.clone();
        tokio::spawn(async move {
            let served = registration::serve(stream, |request| register(&node, request));
            if let Ok(Err(err)) = tokio::time::timeout(registration::CONNECTION, served).await {
                tracing::debug!(%err, "a connection of a device plugin has ended");
            }
            drop(place);
        });
    }
}

/// Plugins see the socket come and register again. With it, what tells it from another one.
async fn open(directory: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    tokio::fs::create_dir_all(directory).await?;
    let socket = directory.join(SOCKET);
    match UnixStream::connect(&socket).await {
        Err(err) if err.kind() == io::ErrorKind::NotFound => {}
        // An earlier life's: nobody listens.
        Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => {
            tokio::fs::remove_file(&socket).await?;
        }
        Err(err) if err.kind() == io::ErrorKind::PermissionDenied => return Err(err),
        // Also when so many wait to be received that there is no room for this one.
        Ok(_) | Err(_) => return Err(io::Error::from(io::ErrorKind::AddrInUse)),
    }
    let listener = UnixListener::bind(&socket)?;
    let ours = identity(directory).await;
    let ours = ours.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok((listener, ours))
}

/// Device and inode of the socket.
async fn identity(directory: &Path) -> Option<(u64, u64)> {
    let found = tokio::fs::symlink_metadata(directory.join(SOCKET)).await;
    found.ok().map(|found| (found.dev(), found.ino()))
}

fn register(node: &Arc<Node>, request: RegisterRequest) -> Result<(), Status> {
    let host = &node.plugin_host;
    let slot = host.accept(&request).inspect_err(|status| {
        tracing::warn!(
            resource = request.resource_name,
            why = status.message(),
            "a device plugin was refused"
        );
    })?;
    let Some(slot) = slot else {
        tracing::warn!(
            resource = request.resource_name,
            "the devices of a plugin are not used; map its resource to a slot in node.accelerators.device-plugins"
        );
        return Ok(());
    };
    tracing::info!(
        resource = request.resource_name,
        slot,
        "a device plugin has registered"
    );
    let session = Session::new(
        request.resource_name,
        slot.clone(),
        host.directory.join(request.endpoint),
        request.options.unwrap_or_default(),
    );
    // The last to register is the plugin; whoever was before is not listened to any more.
    if let Some(old) = host.sessions().insert(slot, session.clone()) {
        old.end();
    }
    node.tasks.spawn(session.follow(node.clone()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_opened_only_where_nobody_listens() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("plugins");
        let (first, ours) = open(&directory).await.unwrap();
        assert_eq!(identity(&directory).await, Some(ours));
        let err = open(&directory).await.unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AddrInUse);
        // Its file stays when it dies, and is no hindrance.
        drop(first);
        assert!(directory.join(SOCKET).exists());
        let (_second, theirs) = open(&directory).await.unwrap();
        assert_eq!(identity(&directory).await, Some(theirs));
        std::fs::remove_file(directory.join(SOCKET)).unwrap();
        assert_eq!(identity(&directory).await, None);
        let (_third, _) = open(&directory).await.unwrap();
    }

    #[test]
    fn registrations_are_checked() {
        let host = PluginHost {
            directory: PathBuf::new(),
            engine: EngineFacts::default(),
            slots: BTreeMap::from([("a.b/c".to_owned(), "c.device".to_owned())]),
            sessions: Mutex::default(),
        };
        let ask = |version: &str, endpoint: &str, resource: &str| {
            host.accept(&RegisterRequest {
                version: version.to_owned(),
                endpoint: endpoint.to_owned(),
                resource_name: resource.to_owned(),
                options: None,
            })
        };
        let slot = ask("v1beta1", "c.sock", "a.b/c").unwrap();
        assert_eq!(slot.as_deref(), Some("c.device"));
        assert_eq!(ask("v1beta1", "c.sock", "a.b/d").unwrap(), None);
        for (version, endpoint, resource, word) in [
            ("v1alpha", "c.sock", "a.b/c", "v1beta1"),
            ("v1beta1", "../c.sock", "a.b/c", "socket"),
            ("v1beta1", "kubelet.sock", "a.b/c", "socket"),
            ("v1beta1", "", "a.b/c", "socket"),
            ("v1beta1", "c.sock?x", "a.b/c", "socket"),
        ] {
            let status = ask(version, endpoint, resource).unwrap_err();
            assert!(status.message().contains(word), "{status}");
        }
    }
}
