//! The kubelet's side of the device-plugin API of Kubernetes, v1beta1, so that every vendor's
//! published plugin serves this node unchanged.
//!
//! In: registrations on `kubelet.sock`, and the devices each plugin lists. Out: a plugin in the
//! ledger per resource the configuration maps to a slot, and what a plugin answers for a container.
//! Invariants: one session per resource, the last to register; a plugin that dies, hangs or lies
//! makes its own devices unhealthy and nothing else, until it lists them again; every call has a
//! deadline and every answer a bound.

mod answer;
mod registration;
mod session;
pub mod wire;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use config::Config;
use thiserror::Error;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;
use tonic::Status;

use super::plugin::held;
use crate::kernel::node::Node;
use crate::kernel::registry::Kernel;
use crate::resource::{Allocation, device_of};
use answer::Granted;
use session::Session;
use wire::{RegisterRequest, VERSION};

/// The socket plugins look for.
const SOCKET: &str = "kubelet.sock";
/// Connections at a time; a plugin needs one for a moment.
const CONNECTIONS: usize = 32;
/// Before the next try when a connection cannot be received.
const PAUSE: Duration = Duration::from_secs(1);

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
    /// Resource name to slot name.
    slots: BTreeMap<String, String>,
    /// By device name.
    sessions: Mutex<HashMap<String, Session>>,
}

impl PluginHost {
    /// The host of the configuration; without mapped resources it does nothing.
    pub fn new(config: &Config) -> Self {
        let settings = &config.node.accelerators;
        Self {
            directory: settings.plugin_dir.clone(),
            slots: settings.device_plugins.clone(),
            sessions: Mutex::default(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self, device: &str) -> Option<Session> {
        self.sessions().get(device).cloned()
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
        for (device, slots) in by_device(&allocation) {
            let Some(session) = self.session(&device) else {
                continue;
            };
            let ids: Vec<String> = held(&slots)
                .iter()
                .map(|(id, _)| (*id).to_owned())
                .collect();
            let mut available = node.ledger.free_devices(session.slot());
            available.extend(ids.iter().cloned());
            let Some(preferred) = session.prefer(available, &ids).await else {
                continue;
            };
            if let Some(exchanged) =
                node.ledger
                    .exchange(kernel.id, &device, session.slot(), &preferred)
            {
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
        for (device, slots) in by_device(allocation) {
            let Some((resource, _)) = self
                .slots
                .iter()
                .find(|(_, slot)| device_of(slot) == device)
            else {
                continue;
            };
            let ids: Vec<String> = held(&slots)
                .iter()
                .map(|(id, _)| (*id).to_owned())
                .collect();
            if ids.is_empty() {
                continue;
            }
            let session = self.session(&device).ok_or_else(|| GrantError::Gone {
                resource: resource.clone(),
            })?;
            granted.merge(session.grant(ids).await?);
        }
        Ok(granted)
    }
}

fn by_device(allocation: &Allocation) -> Vec<(String, Vec<(String, crate::resource::Shares)>)> {
    let all = allocation.devices();
    all.map(|(device, slots)| (device.to_owned(), slots.to_vec()))
        .collect()
}

/// Serves plugins until the agent stops; returns at once where none are mapped.
pub async fn serve(node: Arc<Node>) {
    let host = &node.plugin_host;
    if host.slots.is_empty() {
        return;
    }
    let listener = match open(host) {
        Ok(listener) => listener,
        Err(err) => {
            tracing::error!(%err, directory = %host.directory.display(),
                "device plugins cannot be served; see that node.accelerators.plugin-dir is writable and no kubelet uses it");
            return;
        }
    };
    tracing::info!(directory = %host.directory.display(), "waiting for device plugins");
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = node.stopping.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(err) => {
                tracing::warn!(%err, "a device plugin cannot be received");
                tokio::time::sleep(PAUSE).await;
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

/// Plugins see the socket come and register again.
fn open(host: &PluginHost) -> io::Result<UnixListener> {
    std::fs::create_dir_all(&host.directory)?;
    let socket = host.directory.join(SOCKET);
    match std::os::unix::net::UnixStream::connect(&socket) {
        Ok(_) => return Err(io::Error::from(io::ErrorKind::AddrInUse)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {}
        Err(_) => std::fs::remove_file(&socket)?,
    }
    UnixListener::bind(socket)
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
    let device = device_of(&slot).to_owned();
    tracing::info!(
        resource = request.resource_name,
        slot,
        "a device plugin has registered"
    );
    let session = Session::new(
        request.resource_name,
        slot,
        host.directory.join(request.endpoint),
        request.options.unwrap_or_default(),
    );
    // The last to register is the plugin; whoever was before is not listened to any more.
    if let Some(old) = host.sessions().insert(device, session.clone()) {
        session.replace(&old);
    }
    node.tasks.spawn(session.follow(node.clone()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registrations_are_checked() {
        let host = PluginHost {
            directory: PathBuf::new(),
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
