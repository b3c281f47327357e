//! The agent's HTTP server: `/metrics` and `/health`, for Prometheus and whoever watches the node.
//!
//! In: requests at `agent.service-addr`. Out: one page or one document per request. Invariants: the
//! node does not depend on it (an address in use is reported and tried again); connections (of each client,
//! too), pages being made or read and the time a client may take are bounded; neither the engine nor a disk is asked
//! while somebody waits.

mod connection_limit;
mod health;
mod pages;

use std::convert::Infallible;
use std::error::Error;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use shared::log_limit::LogLimit;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::TaskTracker;

use crate::blocking::blocking;
use crate::kernel::node::Node;
use crate::metrics::{NodeSnapshot, Recorder, count_request};
use crate::stats::node::HostReading;

use connection_limit::ConnectionLimit;
pub use health::{EngineWatch, Health};
use pages::{Pages, Withdrawn};

/// How long a client may take to send a request, may rest between two, and may take nothing of an
/// answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest a connection lives; Prometheus opens another.
const CONNECTION_LIFE: Duration = Duration::from_secs(3600);
/// Pause before an address in use is tried again.
const AGAIN: Duration = Duration::from_secs(10);
/// Between two rounds of folding observations.
const UPKEEP: Duration = Duration::from_secs(30);

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address means nothing here.
    #[error("cannot resolve agent.service-addr {address}")]
    Resolve {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It cannot be bound.
    #[error("cannot listen on agent.service-addr {address}; does another program listen there?")]
    Bind {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// What the handlers work with.
#[derive(Debug)]
pub struct Service {
    node: Arc<Node>,
    recorder: Recorder,
    engine: EngineWatch,
    pages: Pages,
}

impl Service {
    /// Everything the pages are made of.
    pub fn new(node: Arc<Node>, recorder: Recorder, engine: EngineWatch) -> Service {
        Service {
            node,
            recorder,
            engine,
            pages: Pages::default(),
        }
    }

    async fn node_snapshot(&self) -> NodeSnapshot {
        let reading = HostReading::now().await;
        NodeSnapshot::of(&self.node, reading, self.engine.state())
    }
}

/// Serves until the agent stops.
pub async fn serve(service: Arc<Service>) {
    let stopping = service.node.stopping.clone();
    let address = service.node.config.agent.service_addr.to_string();
    let upkeep = service.recorder.clone();
    let serving = async {
        let listener = listen(&address).await;
        accept(listener, router(service)).await;
    };
    let folding = async {
        let mut clock = tokio::time::interval(UPKEEP);
        loop {
            clock.tick().await;
            upkeep.upkeep();
        }
    };
    tokio::select! {
        () = serving => {}
        () = folding => {}
        () = stopping.cancelled() => {}
    }
}

/// Listens, sooner or later.
async fn listen(address: &str) -> TcpListener {
    let mut reported = false;
    loop {
        match bind(address).await {
            Ok(listener) => {
                tracing::info!(address, "serving /metrics and /health");
                return listener;
            }
            Err(err) if !std::mem::replace(&mut reported, true) => tracing::error!(
                err = &err as &dyn std::error::Error,
                "there is no /metrics and no /health until this address is free; kernels are not concerned"
            ),
            Err(err) => {
                tracing::debug!(err = &err as &dyn std::error::Error, "still not listening")
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

async fn bind(address: &str) -> Result<TcpListener, ListenError> {
    let resolved: Vec<SocketAddr> = tokio::net::lookup_host(address)
        .await
        .map_err(|source| ListenError::Resolve {
            address: address.to_owned(),
            source,
        })?
        .collect();
    TcpListener::bind(resolved.as_slice())
        .await
        .map_err(|source| ListenError::Bind {
            address: address.to_owned(),
            source,
        })
}

/// Serves connections, as many at once as there are permits for each client and for all; those beyond are
/// told so and closed.
pub(crate) async fn accept(listener: TcpListener, router: Router) {
    serve_clients(listener, router, PATIENCE).await;
}

async fn serve_clients(listener: TcpListener, router: Router, patience: Duration) {
    let limit = Arc::<ConnectionLimit>::default();
    let connections = TaskTracker::new();
    let mut told = LogLimit::new();
    let withdrawn = Arc::<Mutex<LogLimit>>::default();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => match limit.take(peer.ip()) {
                Ok(permit) => {
                    let (router, withdrawn) = (router.clone(), withdrawn.clone());
                    connections.spawn(async move {
                        if let Err(err) = connection(stream, router, patience).await
                            && let Some(suppressed) = pass(&withdrawn)
                        {
                            tracing::warn!(%peer, suppressed, %err, "a scrape was cut off");
                        }
                        drop(permit);
                    });
                }
                Err(refusal) => {
                    if let Some(suppressed) = told.pass() {
                        tracing::warn!(
                            %peer,
                            suppressed,
                            "a connection too many to the HTTP server was closed, and others are until some end"
                        );
                    }
                    // Nobody is waited for: this fits into the buffer of a new connection.
                    let _ = stream.try_write(refusal.answer().as_bytes());
                }
            },
            Err(err) => {
                tracing::debug!(%err, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

fn pass(limit: &Mutex<LogLimit>) -> Option<u64> {
    limit.lock().unwrap_or_else(PoisonError::into_inner).pass()
}

/// Serves one connection to its end.
///
/// # Errors
/// It ended because a page was withdrawn.
async fn connection(
    stream: TcpStream,
    router: Router,
    patience: Duration,
) -> Result<(), Withdrawn> {
    // The kernel counts also while the client's window stays shut, whatever it acknowledges.
    let millis = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    if let Err(err) = sockopt::set_tcp_user_timeout(&stream, millis) {
        tracing::debug!(%err, "a connection has no deadline for what it is sent; it is closed");
        return Ok(());
    }
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        // Whoever ends its side with the question, such as `printf ... | nc`, waits for the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let ended = tokio::time::timeout(CONNECTION_LIFE, served).await;
    let Ok(Err(err)) = ended else {
        return Ok(());
    };
    let mut cause: Option<&dyn Error> = Some(&err);
    while let Some(err) = cause {
        if err.is::<Withdrawn>() {
            return Err(Withdrawn);
        }
        cause = err.source();
    }
    // How a client ends its connection is its own affair.
    Ok(())
}

fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/metrics", get(page).options(preflight))
        .route("/health", get(health_document).options(preflight))
        .with_state(service)
        .layer(middleware::from_fn(finish))
}

/// Lets pages of any origin read ours, and counts.
async fn finish(request: Request, next: Next) -> Result<Response, Infallible> {
    let endpoint = match request.uri().path() {
        "/metrics" => "/metrics",
        "/health" => "/health",
        _ => "other",
    };
    let method = match *request.method() {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    };
    let begun = Instant::now();
    let mut response = next.run(request).await;
    count_request(
        method,
        endpoint,
        response.status().as_u16(),
        begun.elapsed(),
    );
    let headers = response.headers_mut();
    let any = HeaderValue::from_static("*");
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, any.clone());
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, any);
    Ok(response)
}

async fn preflight() -> impl IntoResponse {
    const ALLOWED: [(HeaderName, &str); 2] = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "*"),
    ];
    ALLOWED
}

async fn page(State(service): State<Arc<Service>>) -> Response {
    let made = async {
        let node_snapshot = service.node_snapshot().await;
        let tasks = tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks();
        let recorder = service.recorder.clone();
        // A page of a thousand containers is 14 MB: not on a thread that answers the manager.
        blocking(move || node_snapshot.render() + &recorder.render(tasks)).await
    };
    let page = service.pages.answer(made).await;
    let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    (kind, Body::new(page)).into_response()
}

async fn health_document(State(service): State<Arc<Service>>) -> Response {
    let node_snapshot = service.node_snapshot().await;
    let interval = service.node.config.node.dataplane.stats_interval;
    let health = Health::of(&node_snapshot, interval);
    let status = if health.is_healthy() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let kind = [(header::CONTENT_TYPE, "application/json; charset=utf-8")];
    (status, kind, health.document().to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// More than both sockets take in.
    const PAGE: usize = 64 << 20;

    #[tokio::test]
    async fn a_client_that_reads_nothing_loses_its_place() {
        let router = Router::new().route("/", get(|| async { vec![b'x'; PAGE] }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let mut client = TcpStream::connect(address).await.expect("connected");
        let (stream, _) = listener.accept().await.expect("accepted");
        let asked = client.write_all(b"GET / HTTP/1.1\r\nhost: node\r\n\r\n");
        asked.await.expect("sent");
        let served = connection(stream, router, Duration::from_secs(1));
        let limit = Duration::from_secs(60);
        let ended = tokio::time::timeout(limit, served).await;
        let told = ended.expect("it is still there");
        assert!(told.is_ok(), "no page was taken from it: {told:?}");
    }

    #[tokio::test]
    async fn a_scrape_that_is_cut_off_is_told_from_other_ends() {
        let pages = Arc::new(Pages::default());
        let page = {
            let pages = pages.clone();
            || async move { Body::new(pages.answer(async { "x".repeat(PAGE) }).await) }
        };
        let router = Router::new().route("/", get(page));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let mut client = TcpStream::connect(address).await.expect("connected");
        let (stream, _) = listener.accept().await.expect("accepted");
        let asked = client.write_all(b"GET / HTTP/1.1\r\nhost: node\r\n\r\n");
        asked.await.expect("sent");
        let served = tokio::spawn(connection(stream, router, PATIENCE));
        // It has begun to read; then newer pages come, and it goes on.
        client.read_u8().await.expect("the beginning");
        let _newer = pages.fill();
        let _ = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
        assert!(matches!(served.await.expect("no panic"), Err(Withdrawn)));
    }

    #[tokio::test]
    async fn a_client_that_ends_its_side_with_the_question_gets_the_whole_answer() {
        // Like a page, which waits for readings: the end of the client's side is seen before it.
        let page = || async {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            vec![b'x'; 1 << 20]
        };
        let router = Router::new().route("/", get(page));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let mut client = TcpStream::connect(address).await.expect("connected");
        let asked = client.write_all(b"GET / HTTP/1.1\r\nhost: node\r\n\r\n");
        asked.await.expect("sent");
        client.shutdown().await.expect("shut down");
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut answer = Vec::new();
        let served = connection(stream, router, PATIENCE);
        let (read, served) = tokio::join!(client.read_to_end(&mut answer), served);
        read.expect("an answer");
        assert!(served.is_ok(), "{served:?}");
        assert!(answer.starts_with(b"HTTP/1.1 200 OK\r\n"), "{answer:.40?}");
        let body = answer.iter().filter(|byte| **byte == b'x').count();
        assert_eq!(body, 1 << 20);
    }

    /// Opens a connection from one of this host's addresses.
    async fn from(client: &str, server: SocketAddr) -> TcpStream {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        let client = format!("{client}:0").parse().expect("an address");
        socket.bind(client).expect("bound");
        socket.connect(server).await.expect("connected")
    }

    /// What is answered to a request on a connection, until it is closed.
    async fn answer(mut stream: TcpStream) -> String {
        // Who is turned away may be gone already.
        let _ = stream
            .write_all(b"GET / HTTP/1.1\r\nhost: node\r\nconnection: close\r\n\r\n")
            .await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).expect("text")
    }

    #[tokio::test]
    async fn idle_connections_of_one_client_leave_places_to_others_and_end() {
        const FLOOD: usize = 160;
        // Longer than all that comes before they end, on a slow machine too.
        let patience = Duration::from_secs(6);
        let router = Router::new().route("/", get(|| async { "well" }));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let address = listener.local_addr().expect("bound");
        let server = tokio::spawn(serve_clients(listener, router, patience));
        let mut flood = Vec::new();
        for _ in 0..FLOOD {
            flood.push(from("127.0.0.1", address).await);
        }
        let served = answer(from("127.0.0.2", address).await).await;
        assert!(served.starts_with("HTTP/1.1 200 OK"), "{served}");
        let refused = answer(from("127.0.0.1", address).await).await;
        assert!(
            refused.starts_with("HTTP/1.1 503 ") && refused.contains("too many connections"),
            "{refused}"
        );
        // Those that have no permit are told at once, the others lose theirs when they say nothing.
        let limit = Duration::from_secs(60);
        let ended = tokio::time::timeout(limit, async {
            let mut told = 0;
            for mut stream in flood {
                let mut said = String::new();
                let _ = stream.read_to_string(&mut said).await;
                told += usize::from(said.contains("too many connections"));
            }
            told
        });
        let told = ended.await.expect("idle connections are closed");
        assert_eq!(told, FLOOD - connection_limit::OF_AN_ADDRESS);
        let served = answer(from("127.0.0.1", address).await).await;
        assert!(served.starts_with("HTTP/1.1 200 OK"), "{served}");
        server.abort();
    }
}
