//! The listening end: a thread that accepts, shakes hands and reads.
//!
//! In: an address, keys and limits; out: each message, handed to [`Receive`] on this thread, whose
//! runtime has nothing else to do: nothing in the rest of the process can keep it from accepting,
//! reading or answering a probe.
//!
//! Invariant: a connection is one task; what goes wrong on it ends it and nothing else.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use omq_proto::SocketType;
use omq_proto::proto::{ConnectionConfig, Role};
use rustix::net::sockopt;
use shared::log_limit::LogLimit;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::link::{self, Link, LinkError, Reader};
use super::{TransportError, server_mechanism};
use crate::rpc::keys::{KeyPair, PublicKey};

/// Connections the kernel may have made for us before they are accepted.
const BACKLOG: u32 = 4096;
/// Connections that have not shaken hands yet; silent clients cannot keep a manager out, which
/// opens dozens at once. At the bound the one that has taken longest gives way to the next.
const HANDSHAKES: usize = 2048;
/// Connections at once; one more is closed as it comes.
const CONNECTIONS: usize = 16 * 1024;
/// Pause after a connection could not be accepted, for want of descriptors for instance.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Like libzmq's option as both Python sides set it.
const LINGER: Duration = Duration::from_millis(100);
/// Idle time, interval and count of probes to a peer that is silent: the same numbers the manager
/// sets on its side. Without them a connection of a machine that lost power stays for ever.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(60), Duration::from_secs(20), 3);
/// A peer that acknowledges nothing for this long is gone (a powered-off manager sends no FIN).
const UNACKNOWLEDGED_TIMEOUT_MS: u32 = 120_000;

/// Takes the messages of all connections.
pub(in crate::rpc) trait Receive: Send + Sync + 'static {
    /// One message. Runs on the transport's thread and must not wait.
    fn receive(&self, from: &Arc<Link>, frames: &[Bytes]);
}

/// What the server needs to know about its socket.
#[derive(Debug)]
pub(in crate::rpc) struct RouterOptions<'a> {
    pub(in crate::rpc) address: SocketAddr,
    pub(in crate::rpc) curve: Option<(&'a KeyPair, Allowed)>,
    pub(in crate::rpc) max_message_bytes: usize,
    pub(in crate::rpc) handshake_deadline: Duration,
}

/// The listening end. Dropping it closes every connection.
#[derive(Debug)]
pub(in crate::rpc) struct Router {
    address: SocketAddr,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// What each connection needs.
struct Shared<R> {
    config: ConnectionConfig,
    allowed: Option<Allowed>,
    handshake_deadline: Duration,
    receiver: R,
    stop: CancellationToken,
}

/// Whose keys are let in.
#[derive(Clone, Copy, Debug)]
pub(in crate::rpc) struct Allowed {
    pub(in crate::rpc) manager: PublicKey,
    /// The agent's own, unless others may read its pair.
    pub(in crate::rpc) own: Option<PublicKey>,
}

impl Allowed {
    /// Whether there is a place that it is let in from.
    pub(super) fn knows(&self, key: PublicKey) -> bool {
        key == self.manager || Some(key) == self.own
    }

    /// Whoever holds the agent's own pair is its operator, but only on this host: where nodes share a pair, one
    /// of them must not drive the others.
    fn lets_in(&self, key: Option<PublicKey>, from: IpAddr, to: Option<IpAddr>) -> bool {
        let from = from.to_canonical();
        let near = from.is_loopback() || to.is_some_and(|to| to.to_canonical() == from);
        key.is_some_and(|key| key == self.manager || (near && self.knows(key)))
    }
}

/// The runtime of the RPC thread until that thread has it. A runtime that is dropped waits for its
/// blocking work and panics where a task drops it; this one ends without waiting, wherever it is.
struct OwnRuntime(Option<tokio::runtime::Runtime>);

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Router {
    pub(in crate::rpc) fn bind(
        options: &RouterOptions<'_>,
        receiver: impl Receive,
    ) -> Result<Self, TransportError> {
        let config = ConnectionConfig::new(Role::Server, SocketType::Router)
            .max_message_size(options.max_message_bytes)
            .mechanism(server_mechanism(options.curve)?);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_park(link::write_gathered)
            .build()
            .map_err(TransportError::Thread)?;
        let runtime = OwnRuntime(Some(runtime));
        let listener = {
            let _reactor = runtime.0.as_ref().map(tokio::runtime::Runtime::enter);
            listen(options.address).map_err(TransportError::Bind)?
        };
        let address = listener.local_addr().map_err(TransportError::Bind)?;
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            config,
            allowed: options.curve.map(|(_, allowed)| allowed),
            handshake_deadline: options.handshake_deadline,
            receiver,
            stop: stop.clone(),
        });
        let thread = std::thread::Builder::new()
            .name("bai-rpc".to_owned())
            .spawn(move || {
                link::gather();
                if let Some(runtime) = &runtime.0 {
                    runtime.block_on(accept(listener, shared));
                }
            })
            .map_err(TransportError::Thread)?;
        Ok(Self {
            address,
            stop,
            thread: Some(thread),
        })
    }

    /// The bound address, with the port the system chose for port 0.
    pub(in crate::rpc) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends what waits for at most the linger time, closes every connection and ends the thread.
    pub(in crate::rpc) async fn close(mut self) {
        self.stop.cancel();
        let Some(thread) = self.thread.take() else {
            return;
        };
        let joining = tokio::task::spawn_blocking(move || thread.join());
        match tokio::time::timeout(LINGER * 20, joining).await {
            Ok(Ok(Ok(()))) => {}
            Ok(_) => tracing::warn!("the RPC thread ended badly"),
            Err(_) => tracing::warn!("the RPC thread did not end in time"),
        }
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A socket as the listener's, before it is bound: connections of a predecessor that have not ended keep
/// nobody from the address.
fn socket_for(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    socket.set_reuseaddr(true)?;
    Ok(socket)
}

/// Whether the address can be bound now. Nobody can connect meanwhile.
pub(in crate::rpc) fn try_address(address: SocketAddr) -> Result<(), TransportError> {
    let bound = socket_for(address).and_then(|socket| socket.bind(address));
    bound.map_err(TransportError::Bind)
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket_for(address)?;
    // A connection begins with its listener's options, so these are set once.
    // A reply is written whole; waiting for more to send would only delay it.
    socket.set_nodelay(true)?;
    let (idle, interval, count) = KEEPALIVE;
    sockopt::set_socket_keepalive(&socket, true)?;
    sockopt::set_tcp_keepidle(&socket, idle)?;
    sockopt::set_tcp_keepintvl(&socket, interval)?;
    sockopt::set_tcp_keepcnt(&socket, count)?;
    sockopt::set_tcp_user_timeout(&socket, UNACKNOWLEDGED_TIMEOUT_MS)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn accept<R: Receive>(listener: TcpListener, shared: Arc<Shared<R>>) {
    let stop = shared.stop.clone();
    let mut handshakes = Handshakes::default();
    let tasks = TaskTracker::new();
    let mut number = 0u64;
    // Told once each time the bound is reached, not for each of those beyond it.
    let mut full = false;
    let mut trouble = LogLimit::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((_, address)) if tasks.len() >= CONNECTIONS => {
                if !std::mem::replace(&mut full, true) {
                    tracing::warn!(%address, limit = CONNECTIONS, "an RPC connection too many was closed, and others are until some end");
                }
            }
            Ok((stream, address)) => {
                full = false;
                number += 1;
                let shaking = handshakes.begin();
                tasks.spawn(serve(shared.clone(), stream, address, number, shaking));
            }
            Err(err) => {
                if let Some(suppressed) = trouble.pass() {
                    tracing::warn!(%err, suppressed, "an RPC connection could not be accepted; it is tried again");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(LINGER * 10, tasks.wait())
        .await
        .is_err()
    {
        tracing::debug!(left = tasks.len(), "RPC connections did not close in time");
    }
}

/// The connections that have not shaken hands, the oldest first, among some that have.
#[derive(Default)]
struct Handshakes(VecDeque<Weak<Notify>>);

impl Handshakes {
    /// One more; it is told when it has to give way, and is over when it drops what it got.
    fn begin(&mut self) -> Arc<Notify> {
        // Looked through rarely: most are over long before there are as many.
        if self.0.len() >= HANDSHAKES {
            self.0.retain(|shaking| shaking.strong_count() > 0);
        }
        if self.0.len() >= HANDSHAKES
            && let Some(oldest) = self.0.pop_front().and_then(|oldest| oldest.upgrade())
        {
            oldest.notify_one();
        }
        let shaking = Arc::new(Notify::new());
        self.0.push_back(Arc::downgrade(&shaking));
        shaking
    }
}

/// One connection, from the handshake to its end.
async fn serve<R: Receive>(
    shared: Arc<Shared<R>>,
    stream: TcpStream,
    address: SocketAddr,
    number: u64,
    shaking: Arc<Notify>,
) {
    let here = stream.local_addr().ok().map(|here| here.ip());
    let opening = link::open(stream, number, address, shared.config.clone());
    let opened = tokio::select! {
        () = shared.stop.cancelled() => return,
        () = shaking.notified() => Err(LinkError::Displaced),
        opened = tokio::time::timeout(shared.handshake_deadline, opening) => {
            opened.unwrap_or(Err(LinkError::HandshakeTimeout))
        }
    };
    drop(shaking);
    let mut reader = match opened {
        Ok(reader) => reader,
        Err(err) => {
            tracing::debug!(%address, %err, "an RPC handshake failed");
            return;
        }
    };
    // The handshake has refused strangers' keys already; it does not see where they come from.
    let key = reader.link().peer().key;
    if let Some(allowed) = &shared.allowed
        && !allowed.lets_in(key, address.ip(), here)
    {
        tracing::debug!(%address, "the agent's own key is let in from this host only");
        return;
    }
    let ended = tokio::select! {
        biased;
        ended = hand_out(&mut reader, &shared.receiver) => ended,
        () = shared.stop.cancelled() => {
            let drained = tokio::time::timeout(LINGER, reader.drain()).await;
            drained.unwrap_or(Err(LinkError::Ended)).err().unwrap_or(LinkError::Ended)
        }
    };
    tracing::trace!(%address, err = %ended, "an RPC connection ended");
}

async fn hand_out(reader: &mut Reader, receiver: &impl Receive) -> LinkError {
    let link = reader.link().clone();
    loop {
        match reader.receive().await {
            Ok(frames) => receiver.receive(&link, frames),
            Err(err) => return err,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes nothing out of what comes.
    struct Nobody;

    impl Receive for Nobody {
        fn receive(&self, _: &Arc<Link>, _: &[Bytes]) {}
    }

    #[test]
    fn the_own_key_is_let_in_from_this_host_only() {
        let keys = [1, 2, 3].map(|byte| PublicKey([byte; 32]));
        let [manager, own, stranger] = keys.map(Some);
        let allowed = Allowed {
            manager: keys[0],
            own: Some(keys[1]),
        };
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let lets_in = |key, from: &str, to: &str| allowed.lets_in(key, ip(from), Some(ip(to)));
        assert!(lets_in(manager, "10.0.0.9", "10.0.0.1"));
        assert!(!lets_in(own, "10.0.0.9", "10.0.0.1"));
        assert!(lets_in(own, "10.0.0.1", "10.0.0.1"));
        assert!(lets_in(own, "::ffff:10.0.0.1", "10.0.0.1"));
        assert!(lets_in(own, "127.0.0.1", "127.0.0.1"));
        assert!(lets_in(own, "::1", "::1"));
        assert!(!allowed.lets_in(own, ip("10.0.0.1"), None));
        for from in ["127.0.0.1", "10.0.0.1", "10.0.0.9"] {
            assert!(!lets_in(stranger, from, "10.0.0.1"));
            assert!(!lets_in(None, from, "10.0.0.1"));
        }
        // Others may read it.
        let allowed = Allowed {
            own: None,
            ..allowed
        };
        let here = ip("127.0.0.1");
        assert!(allowed.lets_in(manager, here, Some(here)));
        assert!(!allowed.lets_in(own, here, Some(here)));
        assert!(!allowed.lets_in(None, here, Some(here)));
        assert!(allowed.knows(keys[0]) && !allowed.knows(keys[1]));
    }

    #[tokio::test]
    async fn a_taken_address_is_an_error_also_within_a_runtime() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
        let options = RouterOptions {
            address: taken.local_addr().expect("bound"),
            curve: None,
            max_message_bytes: 1024,
            handshake_deadline: Duration::from_secs(10),
        };
        let refused = Router::bind(&options, Nobody).expect_err("the address is taken");
        assert!(
            matches!(&refused, TransportError::Bind(err) if err.kind() == std::io::ErrorKind::AddrInUse),
            "{refused:?}"
        );
    }

    #[tokio::test]
    async fn an_address_is_free_once_nobody_listens_there_whatever_has_not_ended() {
        let listener = listen("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let address = listener.local_addr().expect("bound");
        let (connected, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let _ends = (connected.expect("connected"), accepted.expect("accepted"));
        let taken = try_address(address).expect_err("the address is taken");
        assert!(
            matches!(&taken, TransportError::Bind(err) if err.kind() == std::io::ErrorKind::AddrInUse),
            "{taken:?}"
        );
        drop(listener);
        try_address(address).expect("nobody listens");
        listen(address).expect("the try has left nothing");
    }

    #[tokio::test]
    async fn a_connection_has_the_options_of_its_listener() {
        let listener = listen("127.0.0.1:0".parse().expect("an address")).expect("bound");
        let address = listener.local_addr().expect("bound");
        let (connected, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let _client = connected.expect("connected");
        let (socket, _) = accepted.expect("accepted");
        assert!(socket.nodelay().expect("read"));
        assert!(sockopt::socket_keepalive(&socket).expect("read"));
        let idle = sockopt::tcp_keepidle(&socket).expect("read");
        let interval = sockopt::tcp_keepintvl(&socket).expect("read");
        let count = sockopt::tcp_keepcnt(&socket).expect("read");
        assert_eq!((idle, interval, count), KEEPALIVE);
        assert_eq!(
            sockopt::tcp_user_timeout(&socket).expect("read"),
            UNACKNOWLEDGED_TIMEOUT_MS
        );
    }
}
