//! The listening end of the RPC: probes, calls, replies and their limits.
//!
//! In: a [`Service`] and limits; out: one reply per accepted call. Messages are taken on the
//! transport's own thread, which never waits for a handler; every call is a task on the caller's
//! runtime. Calls run to their end whatever becomes of the caller (CANCEL and disconnects don't
//! stop them), but for those that only fetch something (a disconnect leaves it to the next call), and
//! replies go out in the order of completion.
//!
//! Invariants: a call that was accepted gets exactly one
//! reply, also when its handler panics or its result can't be packed; a connection that doesn't
//! read loses its own replies after [`Limits::reply_deadline`] and is cut.

mod admission;
mod answer;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::frame::{Kind, Message, pong};
use super::keys::{KeyPair, PublicKey};
use super::msgpack::DecodeLimits;
use super::service::Service;
use super::transport::{
    Allowed, Link, Receive, Router, RouterOptions, SendOutcome, TransportError, try_address,
};
use admission::Admission;
use answer::Answerer;

/// How long the name of the address may take.
const LOOKUP: Duration = Duration::from_secs(5);
/// Pause between two looks whether an address is free.
const ADDRESS_PAUSE: Duration = Duration::from_millis(50);

/// Bounds on what peers may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest message that is read, in bytes over all its frames; a larger one ends the
    /// connection. Files travel in pieces of about 1 MiB.
    pub message_bytes: usize,
    /// Calls in flight over all connections; one more is answered with a failure. Those that are
    /// answered at once are never in flight; a few of the command line are let in beyond.
    pub calls: usize,
    /// Calls in flight on one connection.
    pub calls_per_connection: usize,
    /// Bytes of request bodies in flight over all connections.
    pub request_bytes: usize,
    /// How long a client may take to greet and authenticate.
    pub handshake_deadline: Duration,
    /// How long a reply may wait for a connection that doesn't read.
    pub reply_deadline: Duration,
    /// Bounds of decoding one request body.
    pub decode: DecodeLimits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 256 << 20,
            calls: 512,
            calls_per_connection: 512,
            request_bytes: 256 << 20,
            handshake_deadline: Duration::from_secs(10),
            reply_deadline: Duration::from_secs(30),
            decode: DecodeLimits::default(),
        }
    }
}

/// Our key pair, and the one client key that is let in from everywhere; our own is from this host.
#[derive(Clone, Debug)]
pub struct CurveServer {
    /// The agent's pair.
    pub pair: KeyPair,
    /// The manager's public key.
    pub manager: PublicKey,
    /// Whether only root and the agent can have its pair, so that it is let in from this host.
    pub own_is_private: bool,
}

/// What a server needs.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// `host:port` to listen on; port 0 lets the system choose.
    pub address: String,
    /// Turns on CURVE; `None` is NULL, which lets anybody in.
    pub curve: Option<CurveServer>,
    /// Bounds.
    pub limits: Limits,
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The listen address has no meaning on this machine, or not now.
    #[error(
        "cannot resolve RPC listen address {address:?}; see that the name resolves on this host, or give its IP address"
    )]
    Resolve {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The listen address resolves to nothing.
    #[error("RPC listen address {0:?} has no IP address")]
    NoAddress(String),
    /// The address can't be bound.
    #[error("cannot listen for RPC on {address}; is another agent running there?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The key files don't belong together.
    #[error("the secret and public key of the agent's key file do not belong together")]
    KeyMismatch,
}

/// Running totals of a server.
#[derive(Debug, Default)]
struct Totals {
    probes: AtomicU64,
    calls: AtomicU64,
    replies: AtomicU64,
    failures: AtomicU64,
    refused: AtomicU64,
    ignored: AtomicU64,
    undecodable: AtomicU64,
    undeliverable: AtomicU64,
}

/// A reading of a server's totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// PING messages answered.
    pub probes: u64,
    /// Calls accepted.
    pub calls: u64,
    /// Replies handed to the transport, failures included.
    pub replies: u64,
    /// Failure replies among them.
    pub failures: u64,
    /// Calls refused because too much was in flight.
    pub refused: u64,
    /// Messages ignored by the protocol: CANCEL, other kinds and tags, too few frames.
    pub ignored: u64,
    /// RPC messages whose header could not be understood; nobody can be answered.
    pub undecodable: u64,
    /// Replies whose caller had gone or did not read.
    pub undeliverable: u64,
}

/// A listening RPC server. Dropping it closes the socket; calls in progress go on unanswered.
#[derive(Debug)]
pub struct Server {
    router: Option<Router>,
    shared: Arc<Shared>,
    address: SocketAddr,
}

#[derive(Debug)]
struct Shared {
    totals: Totals,
    admission: Admission,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Server {
    /// Binds and starts answering on the current tokio runtime.
    ///
    /// # Errors
    /// The address cannot be listened on, or the halves of the key pair do not belong together.
    pub async fn bind(
        options: ServerOptions,
        service: Arc<dyn Service>,
    ) -> Result<Self, BindError> {
        let requested = resolve(&options.address).await?;
        let shared = Arc::new(Shared {
            totals: Totals::default(),
            admission: Admission::new(&options.limits),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let answerer = Answerer {
            service,
            shared: shared.clone(),
            limits: options.limits,
            runtime: Handle::current(),
        };
        let transport = RouterOptions {
            address: requested,
            curve: options.curve.as_ref().map(|curve| {
                let own = curve.own_is_private.then_some(curve.pair.public);
                let manager = curve.manager;
                (&curve.pair, Allowed { manager, own })
            }),
            max_message_bytes: options.limits.message_bytes,
            handshake_deadline: options.limits.handshake_deadline,
        };
        let router = Router::bind(&transport, answerer).map_err(|err| match err {
            TransportError::KeyMismatch => BindError::KeyMismatch,
            other => BindError::Bind {
                address: requested,
                source: other.into(),
            },
        })?;
        let address = router.address();
        tracing::info!(%address, curve = options.curve.is_some(), "listening for RPC");
        Ok(Self {
            router: Some(router),
            shared,
            address,
        })
    }

    /// The bound address.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Calls whose handlers have not finished.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.shared.tasks.len()
    }

    /// Totals since the start.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let totals = &self.shared.totals;
        let read = |total: &AtomicU64| total.load(Ordering::Relaxed);
        Counters {
            probes: read(&totals.probes),
            calls: read(&totals.calls),
            replies: read(&totals.replies),
            failures: read(&totals.failures),
            refused: read(&totals.refused),
            ignored: read(&totals.ignored),
            undecodable: read(&totals.undecodable),
            undeliverable: read(&totals.undeliverable),
        }
    }

    /// Takes no more calls, waits up to `grace` for those in flight and their replies, then
    /// closes. Calls that take longer go on unanswered.
    pub async fn shutdown(mut self, grace: Duration) {
        self.shared.stop.cancel();
        self.shared.tasks.close();
        if tokio::time::timeout(grace, self.shared.tasks.wait())
            .await
            .is_err()
        {
            let left = self.shared.tasks.len();
            tracing::warn!(left, "RPC calls were still running at shutdown");
        }
        if let Some(router) = self.router.take() {
            router.close().await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// Waits up to `grace` until `host:port` could be bound, and leaves it free. Who serves it now, another agent
/// for one, is told before anything of the node is touched.
///
/// # Errors
/// As those of [`Server::bind`].
pub async fn await_address(address: &str, grace: Duration) -> Result<(), BindError> {
    let requested = resolve(address).await?;
    let until = tokio::time::Instant::now() + grace;
    loop {
        match try_address(requested) {
            Ok(()) => return Ok(()),
            Err(_) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(ADDRESS_PAUSE).await;
            }
            Err(err) => {
                return Err(BindError::Bind {
                    address: requested,
                    source: err.into(),
                });
            }
        }
    }
}

async fn resolve(address: &str) -> Result<SocketAddr, BindError> {
    let addresses = tokio::time::timeout(LOOKUP, tokio::net::lookup_host(address))
        .await
        .unwrap_or_else(|late| Err(late.into()))
        .map_err(|source| BindError::Resolve {
            address: address.to_owned(),
            source,
        })?;
    preferred(addresses).ok_or_else(|| BindError::NoAddress(address.to_owned()))
}

/// The manager asks for IPv4 addresses alone.
fn preferred(addresses: impl Iterator<Item = SocketAddr>) -> Option<SocketAddr> {
    addresses.min_by_key(SocketAddr::is_ipv6)
}

impl Receive for Answerer {
    /// Tells messages apart and hands calls out; nothing here waits.
    fn receive(&self, from: &Arc<Link>, frames: &[Bytes]) {
        if self.shared.stop.is_cancelled() {
            return;
        }
        match Message::read(frames) {
            Message::Ping(first, second) => {
                probe(from, &self.shared, &pong(first, second));
            }
            Message::Upper(header, envelope) => self.accept(from, &header, envelope),
            Message::Pong(_) | Message::Other => {
                self.shared.totals.ignored.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

fn probe(from: &Arc<Link>, shared: &Shared, pong: &super::frame::Frames) {
    match from.try_send(pong) {
        SendOutcome::Accepted => {
            shared.totals.probes.fetch_add(1, Ordering::Relaxed);
        }
        SendOutcome::PeerGone | SendOutcome::Full => {
            // What waits is what the peer has not read: it will not read a PONG either.
            shared.totals.undeliverable.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(peer = %from.peer(), "a probe could not be answered");
        }
    }
}

/// Whether a message kind is a call; everything else is ignored without a reply.
fn is_call(kind: Kind) -> bool {
    kind == Kind::Function
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_both_families_is_listened_on_by_ipv4() {
        let [old, new]: [SocketAddr; 2] =
            ["10.0.0.1:6001", "[fd00::1]:6001"].map(|it| it.parse().unwrap());
        assert_eq!(preferred([new, old].into_iter()), Some(old));
        assert_eq!(preferred([new].into_iter()), Some(new));
    }
}
