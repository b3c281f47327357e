//! ZeroMQ over TCP: the only file that knows the `omq-tokio` crate.
//!
//! In: an address, keys and limits; out: messages with the peer they came from (ROUTER), or a
//! connection to a node (DEALER). The ROUTER lives on a runtime thread of its own, so nothing the
//! rest of the process does can keep it from accepting, reading or answering a probe.
//!
//! Invariants: with CURVE on, a message of anybody but the allow-listed key is never handed out;
//! a peer that has gone or does not read costs its own messages only.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use omq_tokio::endpoint::Host;
use omq_tokio::{
    Context, CurveKeypair, CurvePublicKey, CurveSecretKey, CurveServerOptions, Endpoint, Error,
    Identity, IdentitySocket, KeepAlive, Message, MonitorEvent, MonitorStream, Options,
    PeerPublicKey, ReconnectPolicy, Socket, SocketType, TrySendError,
};

use super::frame::Frames;
use super::keys::{KeyPair, PublicKey, SecretKey};
use super::service::Peer;

/// Messages that may wait in one connection's outgoing queue. Small, because it is counted in
/// messages and a reply can be large; replies beyond it wait in their own tasks.
const SEND_QUEUE: u32 = 16;
/// Messages read but not yet taken by the receive loop.
const RECEIVE_QUEUE: u32 = 256;
/// Half-open connections. The crate's 128 would let as many silent clients keep a manager out
/// for the length of the handshake timeout; a manager opens dozens at once.
const PENDING_HANDSHAKES: usize = 2048;
/// How long a client may take to greet and authenticate.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Like libzmq's option as both Python sides set it.
const LINGER: Duration = Duration::from_millis(100);
/// Idle time, interval and count of probes to a peer that is silent: the same numbers the manager
/// sets on its side. Without them a connection of a machine that lost power stays for ever.
const KEEPALIVE: KeepAlive = KeepAlive::Enabled {
    idle: Duration::from_secs(60),
    intvl: Duration::from_secs(20),
    cnt: 3,
};
/// A peer that acknowledges nothing for this long is gone (a powered-off manager sends no FIN).
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(120);

/// Why the transport could not be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransportError {
    #[error("the ZeroMQ library refused to bind or connect")]
    Setup(#[source] Error),
    #[error("the secret key of the pair does not belong to its public key")]
    KeyMismatch,
    #[error("nobody listens there")]
    Unreachable(#[source] std::io::Error),
}

/// What became of a message that was to be sent.
#[derive(Debug)]
pub(super) enum SendOutcome {
    Accepted,
    /// The connection is gone; the message is dropped, as ZeroMQ does.
    PeerGone,
    /// The connection's queue is full: the peer doesn't read.
    Full,
}

/// What the server needs to know about its socket.
#[derive(Debug)]
pub(super) struct RouterOptions<'a> {
    pub(super) address: SocketAddr,
    pub(super) curve: Option<(&'a KeyPair, PublicKey)>,
    pub(super) max_message_bytes: usize,
}

/// The address a reply goes to.
#[derive(Clone, Debug)]
pub(super) struct Return {
    identity: Identity,
}

/// The listening end.
#[derive(Debug)]
pub(super) struct Router {
    context: Context,
    socket: RouterHandle,
    address: SocketAddr,
}

/// A cheap handle of the listening end, for tasks.
#[derive(Clone, Debug)]
pub(super) struct RouterHandle {
    socket: IdentitySocket,
    allowed: Option<PublicKey>,
}

impl Router {
    pub(super) async fn bind(options: RouterOptions<'_>) -> Result<Self, TransportError> {
        let mut socket_options = Options::default()
            .send_hwm(SEND_QUEUE)
            .recv_hwm(RECEIVE_QUEUE)
            // Mandatory: a full queue is told to us instead of silently dropping replies.
            .router_mandatory(true)
            .max_pending_handshakes(PENDING_HANDSHAKES)
            .handshake_timeout(HANDSHAKE_TIMEOUT)
            .tcp_keepalive(KEEPALIVE)
            .tcp_user_timeout(UNACKNOWLEDGED_TIMEOUT)
            .max_message_size(options.max_message_bytes)
            .linger(LINGER);
        let mut allowed = None;
        if let Some((pair, manager)) = options.curve {
            let pair = checked_pair(pair)?;
            let server = CurveServerOptions::default()
                .authenticator(move |peer| peer.public_key == manager.0);
            socket_options = socket_options.curve_server_with_options(pair, server);
            allowed = Some(manager);
        }
        socket_options.validate().map_err(TransportError::Setup)?;
        let context = Context::with_name("bai-rpc");
        let socket = context.socket(SocketType::Router, socket_options);
        let endpoint = socket
            .bind(tcp(options.address))
            .await
            .map_err(TransportError::Setup)?;
        let Endpoint::Tcp { port, .. } = endpoint else {
            return Err(TransportError::Setup(Error::InvalidEndpoint(
                endpoint.to_string(),
            )));
        };
        let mut address = options.address;
        address.set_port(port);
        let socket = IdentitySocket::try_from(socket).map_err(TransportError::Setup)?;
        Ok(Self {
            context,
            socket: RouterHandle { socket, allowed },
            address,
        })
    }

    /// The bound address, with the port the system chose for port 0.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn handle(&self) -> RouterHandle {
        self.socket.clone()
    }

    /// Runs a future on the transport's own thread.
    pub(super) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        drop(self.context.handle().spawn(future));
    }

    /// Sends what is queued for at most the linger time, closes every connection and ends the
    /// thread.
    pub(super) async fn close(self) {
        let Self {
            context, socket, ..
        } = self;
        let closing = socket.socket.into_inner().close();
        if tokio::time::timeout(LINGER * 10, closing).await.is_err() {
            tracing::debug!("The RPC socket did not close in time.");
        }
        // Joins the thread.
        if tokio::task::spawn_blocking(move || context.term())
            .await
            .is_err()
        {
            tracing::debug!("The RPC thread ended badly.");
        }
    }
}

impl RouterHandle {
    /// The next message, or nothing when the socket is closed.
    pub(super) async fn receive(&self) -> Option<(Peer, Return, Vec<Bytes>)> {
        loop {
            match self.socket.recv_from().await {
                Ok((identity, message)) => {
                    let info = identity.peer_info();
                    let key = match info.authentication.public_key {
                        Some(PeerPublicKey::Curve(key)) => Some(PublicKey(key)),
                        _ => None,
                    };
                    if self.allowed.is_some() && key != self.allowed {
                        // The handshake has refused such peers already; this is the second lock.
                        self.disconnect(info.connection_id).await;
                        continue;
                    }
                    let peer = Peer {
                        connection: info.connection_id,
                        address: info.peer_address,
                        key,
                    };
                    let frames = frames_of(&message);
                    return Some((peer, Return { identity }, frames));
                }
                Err(Error::Closed) => return None,
                Err(err) => {
                    tracing::debug!(%err, "Receiving an RPC message failed.");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    /// Queues a message without waiting.
    pub(super) fn try_send(&self, to: &Return, frames: &Frames) -> SendOutcome {
        match self
            .socket
            .try_send_to(&to.identity, Message::multipart(frames.clone()))
        {
            Ok(()) => SendOutcome::Accepted,
            Err(TrySendError::Full(_)) => SendOutcome::Full,
            Err(_) => SendOutcome::PeerGone,
        }
    }

    /// Queues a message, waiting until the connection has room.
    pub(super) async fn send(
        &self,
        to: &Return,
        frames: Frames,
        deadline: Duration,
    ) -> SendOutcome {
        let sending = self
            .socket
            .send_to(&to.identity, Message::multipart(frames));
        match tokio::time::timeout(deadline, sending).await {
            Ok(Ok(())) => SendOutcome::Accepted,
            Ok(Err(_)) => SendOutcome::PeerGone,
            Err(_) => SendOutcome::Full,
        }
    }

    /// Ends a connection.
    pub(super) async fn disconnect(&self, connection: u64) {
        if let Err(err) = self.socket.disconnect_peer(connection).await {
            tracing::trace!(%err, connection, "The connection was gone already.");
        }
    }
}

/// The connecting end. Dropping it closes the connection.
#[derive(Debug)]
pub(super) struct Dealer {
    socket: Socket,
    events: MonitorStream,
}

/// What happens on a connecting end.
#[derive(Debug)]
pub(super) enum DealerEvent {
    Message(Vec<Bytes>),
    /// The node refused or closed the connection, or could not be reached; with the words of the
    /// transport.
    Lost(String),
}

impl Dealer {
    pub(super) async fn connect(
        address: SocketAddr,
        curve: Option<(&KeyPair, PublicKey)>,
        max_message_bytes: usize,
        deadline: Duration,
    ) -> Result<Self, TransportError> {
        let mut options = Options::default()
            .handshake_timeout(deadline)
            .reconnect(ReconnectPolicy::Disabled)
            .max_message_size(max_message_bytes)
            .linger(LINGER);
        if let Some((pair, node)) = curve {
            options = options.curve_client(checked_pair(pair)?, CurvePublicKey(node.0));
        }
        // The crate tells nobody about a refused connection, and a person should not wait for the
        // deadline to learn that the agent is not running.
        let knock = tokio::net::TcpStream::connect(address);
        match tokio::time::timeout(deadline, knock).await {
            Ok(knocked) => drop(knocked.map_err(TransportError::Unreachable)?),
            Err(elapsed) => return Err(TransportError::Unreachable(elapsed.into())),
        }
        let socket = Socket::try_new(SocketType::Dealer, options).map_err(TransportError::Setup)?;
        let events = socket.monitor();
        socket
            .connect(tcp(address))
            .await
            .map_err(TransportError::Setup)?;
        Ok(Self { socket, events })
    }

    pub(super) fn sender(&self) -> DealerSender {
        DealerSender {
            socket: self.socket.clone(),
        }
    }

    /// The next message, or the end of the connection.
    pub(super) async fn next(&mut self) -> DealerEvent {
        loop {
            tokio::select! {
                received = self.socket.recv() => return match received {
                    Ok(message) => DealerEvent::Message(frames_of(&message)),
                    Err(err) => DealerEvent::Lost(err.to_string()),
                },
                event = self.events.recv() => match event {
                    Ok(MonitorEvent::HandshakeFailed { reason, .. }) => {
                        return DealerEvent::Lost(reason);
                    }
                    Ok(MonitorEvent::Disconnected { reason, .. }) => {
                        return DealerEvent::Lost(format!("{reason:?}"));
                    }
                    Ok(MonitorEvent::ConnectStopped { reason, .. }) => {
                        return DealerEvent::Lost(format!("{reason:?}"));
                    }
                    Ok(MonitorEvent::Closed) => return DealerEvent::Lost("closed".to_owned()),
                    Ok(_) => {}
                    Err(err) => return DealerEvent::Lost(err.to_string()),
                },
            }
        }
    }
}

/// Sends on a connecting end.
#[derive(Clone, Debug)]
pub(super) struct DealerSender {
    socket: Socket,
}

impl DealerSender {
    pub(super) async fn send(&self, frames: Frames) -> Result<(), String> {
        let message = Message::multipart(frames);
        self.socket
            .send(message)
            .await
            .map_err(|err| err.to_string())
    }
}

/// Makes a key pair from the system's randomness.
pub(super) fn generate_pair() -> KeyPair {
    let pair = CurveKeypair::generate();
    KeyPair {
        public: PublicKey(pair.public.0),
        secret: SecretKey(pair.secret.0),
    }
}

fn checked_pair(pair: &KeyPair) -> Result<CurveKeypair, TransportError> {
    let secret = CurveSecretKey(pair.secret.0);
    let public = CurvePublicKey(pair.public.0);
    if secret.derive_public() == public {
        Ok(CurveKeypair { public, secret })
    } else {
        Err(TransportError::KeyMismatch)
    }
}

fn tcp(address: SocketAddr) -> Endpoint {
    Endpoint::Tcp {
        host: Host::Ip(address.ip()),
        port: address.port(),
    }
}

fn frames_of(message: &Message) -> Vec<Bytes> {
    (0..message.len())
        .filter_map(|index| message.part_bytes(index))
        .collect()
}
