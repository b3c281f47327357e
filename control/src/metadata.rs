//! The metadata service: what a kernel may ask about itself, as at
//! `http://169.254.169.254/latest/meta-data/envs`.
//!
//! In: requests from containers of this node. Out: the original's answers. Invariants: who asks is
//! known by the address of the connection and a link that is there, and gets its own answers only;
//! the engine is not asked; strangers cannot keep kernels from being answered, nor one kernel the
//! others: connections and answers of each are bounded.

mod answer;
pub mod redirect;

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use shared::ids::KernelId;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use self::answer::{Answer, Asker, answer, plain};
use crate::kernel::Node;
use crate::kernel::environment;
use crate::network::is_link_here;

/// Connections of one kernel at once (its processes may all ask as they start), and of all that is
/// no kernel.
const OF_A_KERNEL: usize = 32;
const OF_STRANGERS: usize = 32;
/// How long a client may take to send a request, and may rest between two.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest a connection lives.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);
/// The first answers on a connection are given at once, later ones at this distance ...
const AT_ONCE: u32 = 2;
const DISTANCE: Duration = Duration::from_millis(40);
/// ... and its permit is free so long after its end: a kernel gets less than a thousand a second.
const REST: Duration = Duration::from_millis(100);
/// The longest head of a request; the least that hyper takes.
const HEAD: usize = 8192;
/// Pause before an address in use is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// Serves until the agent stops.
pub async fn serve(node: Arc<Node>) {
    let stopping = node.stopping.clone();
    let serving = async {
        let listener = listen(&node.config.agent.metadata_server.to_string()).await;
        let service = Arc::new(Service {
            sandbox: node.config.container.sandbox_type.to_string(),
            connections: Arc::default(),
            node,
        });
        accept(listener, service).await;
    };
    tokio::select! {
        () = serving => {}
        () = stopping.cancelled() => {}
    }
}

/// Listens, sooner or later.
async fn listen(address: &str) -> TcpListener {
    let mut reported = false;
    loop {
        let bound = async {
            let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address).await?.collect();
            TcpListener::bind(resolved.as_slice()).await
        };
        match bound.await {
            Ok(listener) => {
                tracing::info!(address, "serving metadata to kernels");
                return listener;
            }
            Err(err) if !std::mem::replace(&mut reported, true) => tracing::warn!(
                address,
                %err,
                "kernels cannot ask for metadata, as this address cannot be listened on; free it, or correct agent.metadata-server-bind-host and -port; it is tried again, and nothing else is concerned"
            ),
            Err(err) => tracing::debug!(%err, "still not listening"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Whose connection it is; none is a stranger's.
type Owner = Option<KernelId>;

/// Connections at once.
#[derive(Debug, Default)]
struct ConnectionLimit(Mutex<HashMap<Owner, usize>>);

impl ConnectionLimit {
    fn taken(&self) -> MutexGuard<'_, HashMap<Owner, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A permit for one more connection, if there is one.
    fn take(self: &Arc<Self>, owner: Owner) -> Option<ConnectionPermit> {
        let most = if owner.is_some() {
            OF_A_KERNEL
        } else {
            OF_STRANGERS
        };
        let mut taken = self.taken();
        let count = taken.entry(owner).or_default();
        (*count < most).then(|| {
            *count += 1;
            ConnectionPermit(self.clone(), owner)
        })
    }
}

#[derive(Debug)]
struct ConnectionPermit(Arc<ConnectionLimit>, Owner);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut taken = self.0.taken();
        if let Some(count) = taken.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.1);
            }
        }
    }
}

#[derive(Debug)]
struct Service {
    node: Arc<Node>,
    sandbox: String,
    connections: Arc<ConnectionLimit>,
}

impl Service {
    fn who(&self, address: IpAddr) -> Owner {
        self.node.registry.callers().who(address, is_link_here)
    }

    /// The kernel at an address, with what it may know.
    async fn asker(&self, address: IpAddr, path: &str) -> Option<Asker> {
        let kernel = self.node.registry.get(self.who(address)?)?;
        let address = match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        };
        let mut environment = None;
        if path.ends_with("/envs") {
            environment = kernel.with_record(|record| record.environ.clone());
            if environment.is_none() {
                // Of a kernel whose journal was lost, or is one of an earlier release.
                let id = uuid::Uuid::from_bytes(kernel.id.0);
                let file = self.node.scratch.read_config(id, "environ.txt").await;
                environment = file.ok().flatten().map(|text| environment::parse(&text));
            }
        }
        Some(Asker {
            address,
            environment,
        })
    }

    async fn respond(&self, peer: IpAddr, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let path = plain(request.uri().path());
        let asker = self.asker(peer, &path).await;
        response(answer(
            request.method().as_str(),
            &path,
            asker.as_ref(),
            &self.sandbox,
        ))
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(answer.body));
    *response.status_mut() =
        StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    if let Some(kind) = answer.kind {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    if let Some(server) = answer.server {
        headers.insert(SERVER, HeaderValue::from_static(server));
    }
    if answer.status == 405 {
        headers.insert(ALLOW, HeaderValue::from_static("GET"));
    }
    response
}

async fn accept(listener: TcpListener, service: Arc<Service>) {
    let connections = TaskTracker::new();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let peer = peer.ip().to_canonical();
                // Those beyond the bound are closed: whoever asks in turn never gets there.
                let Some(permit) = service.connections.take(service.who(peer)) else {
                    continue;
                };
                let service = service.clone();
                connections.spawn(async move {
                    connection(&service, stream, peer).await;
                    tokio::time::sleep(REST).await;
                    drop(permit);
                });
            }
            Err(err) => {
                tracing::debug!(%err, "a connection was not accepted");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

async fn connection(service: &Arc<Service>, stream: TcpStream, peer: IpAddr) {
    let answered = AtomicU32::new(0);
    let answering = service_fn(|request| {
        let (service, before) = (service.clone(), answered.fetch_add(1, Relaxed));
        async move {
            if before >= AT_ONCE {
                tokio::time::sleep(DISTANCE).await;
            }
            Ok::<_, Infallible>(service.respond(peer, &request).await)
        }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(HEAD)
        // Whoever ends its side with the question, such as `printf ... | nc`, waits for the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), answering);
    // How a client ends its connection is its own affair.
    let _ = tokio::time::timeout(CONNECTION_LIFE, served).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_strangers_nor_a_kernel_take_the_places_of_others() {
        let connections = Arc::<ConnectionLimit>::default();
        let (one, two) = (Some(KernelId([1; 16])), Some(KernelId([2; 16])));
        let strangers: Vec<ConnectionPermit> = (0..OF_STRANGERS)
            .map(|_| connections.take(None).unwrap())
            .collect();
        assert!(connections.take(None).is_none());
        let mut own: Vec<ConnectionPermit> = (0..OF_A_KERNEL)
            .map(|_| connections.take(one).unwrap())
            .collect();
        assert!(connections.take(one).is_none());
        assert!(connections.take(two).is_some());
        own.pop();
        assert!(connections.take(one).is_some());
        drop((strangers, own));
        assert!(connections.taken().is_empty());
    }
}
