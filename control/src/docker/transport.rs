//! The connection pool to the engine and the one way a request is made.
//!
//! In: method, path segments, query, body, deadline. Out: a decoded answer or a
//! [`DockerError`]. Invariants: every request has a deadline that also covers the wait for a
//! permit and the reading of the body; at most `limit` requests of a class are in flight; every
//! request but `/version` carries the API version negotiated with this engine.
//!
//! The request line is built here and not by the client library, because bollard 0.21 opens a
//! connection per call, sends no version prefix (its `Url::join` of an absolute path drops it) and
//! lets `..` in an image name escape its path.

use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyperlocal::UnixConnector;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::DockerOptions;
use super::error::DockerError;

/// Address used when neither the options nor `DOCKER_HOST` name one.
pub const DEFAULT_HOST: &str = "unix:///var/run/docker.sock";

/// A version of the engine's API, major and minor number.
pub(super) type ApiVersion = (u16, u16);

/// Newest engine API this code was written against; an older engine's own version is used.
const NEWEST_API: ApiVersion = (1, 47);

/// Largest JSON answer read into memory: a list of thousands of containers is a few MiB.
const ANSWER_LIMIT: usize = 64 << 20;

/// Idle connections are given up before dockerd's own limits or a NAT would drop them.
const POOL_IDLE: Duration = Duration::from_secs(10);

type Body = Full<Bytes>;

#[derive(Debug, Clone)]
enum Pool {
    Unix {
        client: Client<UnixConnector, Body>,
        /// Socket path in the hex form the connector wants as URI host.
        authority: String,
    },
    Tcp {
        client: Client<HttpConnector, Body>,
        authority: String,
    },
}

/// How heavy a call is for the engine; each class has its own bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// Answers from memory: inspect, list, ping.
    Query,
    /// Changes something: create, start, kill, exec, network.
    Change,
    /// Gives something back. It takes long, and comes in crowds when a session of many kernels ends:
    /// who waits for a new one must not stand in line behind it.
    Removal,
    /// Waits by design, and kernels start and end by it: stop with grace, wait, their last log, events.
    Slow,
    /// Asked by a user of one container, which may make it last: log, archive, list of files.
    Read,
    /// Moves an image, for minutes or hours: pull, push, commit, export.
    Transfer,
}

impl Class {
    /// Of what both users and the agent itself ask of a container.
    pub fn asked(for_user: bool) -> Self {
        match for_user {
            true => Self::Read,
            false => Self::Slow,
        }
    }
}

/// One request.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub step: String,
    pub class: Class,
    pub deadline: Duration,
    pub method: Method,
    /// Path after the version, each segment already safe (see [`segment`] and [`image_path`]).
    pub path: String,
    pub query: Vec<(&'a str, String)>,
    pub body: Option<Bytes>,
    pub headers: Vec<(&'static str, String)>,
    /// Newest API version that the call may be made with.
    pub newest: ApiVersion,
}

impl<'a> Call<'a> {
    pub fn new(
        step: String,
        class: Class,
        deadline: Duration,
        method: Method,
        path: String,
    ) -> Self {
        Self {
            step,
            class,
            deadline,
            method,
            path,
            query: Vec::new(),
            body: None,
            headers: Vec::new(),
            newest: NEWEST_API,
        }
    }

    pub fn query(mut self, key: &'a str, value: impl Into<String>) -> Self {
        self.query.push((key, value.into()));
        self
    }

    pub fn header(mut self, name: &'static str, value: String) -> Self {
        self.headers.push((name, value));
        self
    }

    pub fn json(mut self, body: &impl Serialize) -> Result<Self, DockerError> {
        let bytes = serde_json::to_vec(body).map_err(|source| DockerError::Undecodable {
            step: self.step.clone(),
            source: source.into(),
        })?;
        self.body = Some(Bytes::from(bytes));
        Ok(self)
    }
}

/// The pool, the negotiated version and the bounds.
#[derive(Debug)]
pub(super) struct Transport {
    host: String,
    pool: Pool,
    /// What the engine offers, once it has said so.
    offered: Mutex<Option<Offered>>,
    query: Bound,
    change: Bound,
    removal: Bound,
    slow: Bound,
    read: Bound,
    transfer: Bound,
    negotiate_within: Duration,
}

/// Versions of the API that an engine takes.
#[derive(Debug, Clone, Copy)]
struct Offered {
    newest: ApiVersion,
    oldest: ApiVersion,
}

impl Offered {
    /// The version for a call that knows them up to `known`. An engine that takes only newer ones is
    /// asked in its oldest: most of what we ask stays the same.
    fn used(self, known: ApiVersion) -> ApiVersion {
        known.min(self.newest).max(self.oldest)
    }
}

/// Calls of one class that may be in flight.
#[derive(Debug)]
struct Bound {
    permits: Arc<Semaphore>,
    limit: usize,
}

impl Bound {
    fn new(limit: usize) -> Self {
        let limit = limit.max(1);
        Self {
            permits: Arc::new(Semaphore::new(limit)),
            limit,
        }
    }
}

/// An answer whose body is still to be read; holds its place in the class until dropped.
#[derive(Debug)]
pub(super) struct Streaming {
    pub response: Response<Incoming>,
    pub permit: OwnedSemaphorePermit,
    /// When the call began: before it waited for its place.
    pub begun: Instant,
}

impl Transport {
    /// For the engine at `host`, whatever the options say of it.
    pub fn new(host: &str, options: &DockerOptions) -> Result<Self, DockerError> {
        Ok(Self {
            host: host.to_owned(),
            pool: pool(host)?,
            offered: Mutex::new(None),
            query: Bound::new(options.query_limit),
            change: Bound::new(options.change_limit),
            removal: Bound::new(options.removal_limit),
            slow: Bound::new(options.slow_limit),
            read: Bound::new(options.read_limit),
            transfer: Bound::new(options.transfer_limit),
            negotiate_within: options.deadlines.query,
        })
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    fn offered(&self) -> MutexGuard<'_, Option<Offered>> {
        self.offered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets the negotiated version: after a reconnect the engine may be another release.
    pub fn forget_version(&self) {
        *self.offered() = None;
    }

    /// Finds out which version of the API to use.
    pub async fn negotiate(&self, step: &str) -> Result<(), DockerError> {
        self.offer(step).await.map(drop)
    }

    /// What the engine offers; asks it on first use.
    async fn offer(&self, step: &str) -> Result<Offered, DockerError> {
        if let Some(offered) = *self.offered() {
            return Ok(offered);
        }
        #[derive(serde::Deserialize)]
        struct Version {
            #[serde(rename = "ApiVersion")]
            api: String,
            #[serde(rename = "MinAPIVersion", default)]
            oldest: String,
        }
        let call = Call::new(
            step.to_owned(),
            Class::Query,
            self.negotiate_within,
            Method::GET,
            "/version".into(),
        );
        let bytes = within(&call.step, call.deadline, async {
            let response = self.send(&call, None).await?;
            let response = self.accepted(&call.step, response).await?;
            collect(&call.step, response.into_body(), ANSWER_LIMIT).await
        })
        .await?;
        let theirs: Version = decode(&call.step, &bytes)?;
        let Some(newest) = api_version(&theirs.api) else {
            return Err(DockerError::Undecodable {
                step: step.to_owned(),
                source: format!("API version `{}`", theirs.api).into(),
            });
        };
        // Before Docker 1.13 engines did not say it.
        let oldest = api_version(&theirs.oldest).unwrap_or_default();
        if oldest > NEWEST_API {
            let oldest = &theirs.oldest;
            tracing::warn!(oldest, "this agent is older than the engine's API");
        }
        let offered = Offered { newest, oldest };
        *self.offered() = Some(offered);
        Ok(offered)
    }

    /// Makes the call and decodes its JSON answer.
    pub async fn json<T: DeserializeOwned>(&self, call: Call<'_>) -> Result<T, DockerError> {
        let bytes = self.bytes(&call).await?;
        decode(&call.step, &bytes)
    }

    /// Makes the call, ignoring the body of a success (304 included).
    pub async fn unit(&self, call: Call<'_>) -> Result<(), DockerError> {
        self.bytes(&call).await.map(drop)
    }

    /// Makes the call and reads its whole answer within the deadline.
    pub async fn bytes(&self, call: &Call<'_>) -> Result<Bytes, DockerError> {
        let answered = self.permitted(call, Instant::now(), async {
            match self.exchange(call).await {
                // A pooled connection may have died with an engine restart; asking again is
                // harmless when the request changes nothing.
                Err(DockerError::Broken { .. }) if call.method == Method::GET => {
                    self.exchange(call).await
                }
                Err(DockerError::Engine {
                    status: 400,
                    message,
                    ..
                }) if message.contains("client version") => {
                    self.forget_version();
                    self.exchange(call).await
                }
                other => other,
            }
        });
        let (bytes, _permit) = answered.await?;
        Ok(bytes)
    }

    /// Makes the call and returns once the head of the answer is there; the deadline covers the wait
    /// for a place and that. Who reads the body says how long it may take, from `begun` or from then.
    pub async fn stream(&self, call: &Call<'_>) -> Result<Streaming, DockerError> {
        let begun = Instant::now();
        let answered = self.permitted(call, begun, async {
            match self.head(call).await {
                Err(DockerError::Broken { .. }) if call.method == Method::GET => {
                    self.head(call).await
                }
                other => other,
            }
        });
        let (response, permit) = answered.await?;
        Ok(Streaming {
            response,
            permit,
            begun,
        })
    }

    async fn head(&self, call: &Call<'_>) -> Result<Response<Incoming>, DockerError> {
        let version = self.offer(&call.step).await?.used(call.newest);
        let response = self.send(call, Some(version)).await?;
        self.accepted(&call.step, response).await
    }

    async fn exchange(&self, call: &Call<'_>) -> Result<Bytes, DockerError> {
        let response = self.head(call).await?;
        collect(&call.step, response.into_body(), ANSWER_LIMIT).await
    }

    /// Passes a success, turns a refusal into its error.
    async fn accepted(
        &self,
        step: &str,
        response: Response<Incoming>,
    ) -> Result<Response<Incoming>, DockerError> {
        let status = response.status();
        if status.is_success() || status.as_u16() == 304 || status.as_u16() == 101 {
            return Ok(response);
        }
        // A refusal is one sentence; a page of HTML from a proxy is cut.
        let body = collect(step, response.into_body(), 64 << 10)
            .await
            .unwrap_or_default();
        #[derive(serde::Deserialize)]
        struct Refusal {
            message: String,
        }
        let message = match serde_json::from_slice::<Refusal>(&body) {
            Ok(refusal) => refusal.message,
            Err(_) => String::from_utf8_lossy(&body).trim().to_owned(),
        };
        Err(DockerError::from_status(
            step.to_owned(),
            status.as_u16(),
            message,
        ))
    }

    async fn permit(&self, call: &Call<'_>) -> Result<OwnedSemaphorePermit, DockerError> {
        let bound = match call.class {
            Class::Query => &self.query,
            Class::Change => &self.change,
            Class::Removal => &self.removal,
            Class::Slow => &self.slow,
            Class::Read => &self.read,
            Class::Transfer => &self.transfer,
        };
        match tokio::time::timeout(call.deadline, bound.permits.clone().acquire_owned()).await {
            Ok(permit) => Ok(permit.expect("the semaphore is never closed")),
            Err(_) => Err(DockerError::Busy {
                step: call.step.clone(),
                in_flight: bound.limit,
                after: call.deadline,
            }),
        }
    }

    /// Does the work in a place of the call's class; one deadline for the wait and the work.
    async fn permitted<T>(
        &self,
        call: &Call<'_>,
        begun: Instant,
        work: impl Future<Output = Result<T, DockerError>>,
    ) -> Result<(T, OwnedSemaphorePermit), DockerError> {
        let permit = self.permit(call).await?;
        let done = within_since(&call.step, begun, call.deadline, work).await?;
        Ok((done, permit))
    }

    async fn send(
        &self,
        call: &Call<'_>,
        version: Option<(u16, u16)>,
    ) -> Result<Response<Incoming>, DockerError> {
        let mut target = match version {
            Some((major, minor)) => format!("/v{major}.{minor}{}", call.path),
            None => call.path.clone(),
        };
        for (index, (key, value)) in call.query.iter().enumerate() {
            target.push(if index == 0 { '?' } else { '&' });
            target.push_str(key);
            target.push('=');
            percent_encode(value, &mut target);
        }
        let (scheme, authority) = match &self.pool {
            Pool::Unix { authority, .. } => ("unix", authority),
            Pool::Tcp { authority, .. } => ("http", authority),
        };
        let mut request = Request::builder()
            .method(call.method.clone())
            .uri(format!("{scheme}://{authority}{target}"))
            .header(HOST, "docker");
        if call.body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        for (name, value) in &call.headers {
            request = request.header(*name, value);
        }
        let request = request
            .body(Full::new(call.body.clone().unwrap_or_default()))
            .map_err(|source| DockerError::Undecodable {
                step: call.step.clone(),
                source: source.into(),
            })?;
        let answer = match &self.pool {
            Pool::Unix { client, .. } => client.request(request).await,
            Pool::Tcp { client, .. } => client.request(request).await,
        };
        answer.map_err(|source| {
            if source.is_connect() {
                DockerError::Unreachable {
                    step: call.step.clone(),
                    host: self.host.clone(),
                    source: source.into(),
                }
            } else {
                DockerError::Broken {
                    step: call.step.clone(),
                    source: source.into(),
                }
            }
        })
    }
}

fn api_version(text: &str) -> Option<ApiVersion> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Runs `work` under a deadline.
pub(super) fn within<T>(
    step: &str,
    deadline: Duration,
    work: impl Future<Output = Result<T, DockerError>>,
) -> impl Future<Output = Result<T, DockerError>> {
    within_since(step, Instant::now(), deadline, work)
}

/// Runs `work` under what is left of a deadline.
pub(super) async fn within_since<T>(
    step: &str,
    begun: Instant,
    deadline: Duration,
    work: impl Future<Output = Result<T, DockerError>>,
) -> Result<T, DockerError> {
    let left = deadline.saturating_sub(begun.elapsed());
    // On the heap: it is handed on through several futures, each of which would have room for it.
    match tokio::time::timeout(left, Box::pin(work)).await {
        Ok(result) => result,
        Err(_) => Err(DockerError::Timeout {
            step: step.to_owned(),
            after: deadline,
        }),
    }
}

/// Reads a whole body of at most `limit` bytes.
pub(super) async fn collect(
    step: &str,
    body: Incoming,
    limit: usize,
) -> Result<Bytes, DockerError> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(source) if source.is::<LengthLimitError>() => Err(DockerError::TooLarge {
            step: step.to_owned(),
            limit: limit as u64,
        }),
        Err(source) => Err(DockerError::Broken {
            step: step.to_owned(),
            source,
        }),
    }
}

fn decode<T: DeserializeOwned>(step: &str, bytes: &[u8]) -> Result<T, DockerError> {
    serde_json::from_slice(bytes).map_err(|source| DockerError::Undecodable {
        step: step.to_owned(),
        source: source.into(),
    })
}

fn pool(host: &str) -> Result<Pool, DockerError> {
    let bad = |reason| DockerError::BadHost {
        host: host.to_owned(),
        reason,
    };
    let mut builder = Client::builder(TokioExecutor::new());
    builder
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(POOL_IDLE)
        .pool_max_idle_per_host(16)
        .set_host(false);
    if let Some(path) = host.strip_prefix("unix://") {
        if path.is_empty() {
            return Err(bad(
                "the socket path is missing, e.g. unix:///var/run/docker.sock",
            ));
        }
        let mut authority = String::with_capacity(path.len() * 2);
        for byte in path.bytes() {
            use std::fmt::Write;
            write!(authority, "{byte:02x}").expect("writing to a string can't fail");
        }
        return Ok(Pool::Unix {
            client: builder.build(UnixConnector),
            authority,
        });
    }
    if let Some(authority) = host
        .strip_prefix("tcp://")
        .or_else(|| host.strip_prefix("http://"))
    {
        let authority = authority.trim_end_matches('/');
        let port = authority
            .rsplit_once(':')
            .and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none() || authority.contains(['/', '@', '?', '#']) {
            return Err(bad("write tcp://HOST:PORT"));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_keepalive(Some(Duration::from_secs(30)));
        return Ok(Pool::Tcp {
            client: builder.build(connector),
            authority: authority.to_owned(),
        });
    }
    Err(bad(
        "only unix:///PATH and tcp://HOST:PORT are understood; for TLS or ssh, tunnel to one of these",
    ))
}

/// Checks a container, network, volume or exec name for use as one path segment.
pub(super) fn segment<'n>(step: &str, name: &'n str) -> Result<&'n str, DockerError> {
    let fits = !name.is_empty()
        && name.len() <= 255
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if fits {
        Ok(name)
    } else {
        Err(DockerError::BadName {
            step: step.to_owned(),
            name: name.chars().take(80).collect(),
        })
    }
}

/// Checks an image reference for use inside a path: slashes stay, but no segment may be empty or
/// made of dots.
pub(super) fn image_path<'n>(step: &str, name: &'n str) -> Result<&'n str, DockerError> {
    let fits = !name.is_empty()
        && name.len() <= 512
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-/:@".contains(&byte))
        && name
            .split('/')
            .all(|part| part.starts_with(|first: char| first.is_ascii_alphanumeric()));
    if fits {
        Ok(name)
    } else {
        Err(DockerError::BadName {
            step: step.to_owned(),
            name: name.chars().take(80).collect(),
        })
    }
}

fn percent_encode(value: &str, into: &mut String) {
    use std::fmt::Write;
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            into.push(char::from(byte));
        } else {
            write!(into, "%{byte:02X}").expect("writing to a string can't fail");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_change_the_path_are_refused() {
        for good in ["abc", "kernel.lcpy.44843cf7-aaaa", "bai-singlenode-1", "0a"] {
            assert_eq!(segment("x", good).unwrap(), good);
        }
        for bad in [
            "", ".", "..", "a/b", "a?b", "a#b", "a%2e", "-a", "a b", "\u{e9}",
        ] {
            assert!(segment("x", bad).is_err(), "{bad}");
        }
        for good in [
            "busybox",
            "127.0.0.1:5000/stable/python:3.9-ubuntu20.04",
            "sha256:0123abcd",
            "a/b@sha256:0123",
        ] {
            assert_eq!(image_path("x", good).unwrap(), good);
        }
        for bad in [
            "",
            "../containers/x",
            "a/../b",
            "a//b",
            "a/./b",
            "a?x=1",
            "/a",
            "a/",
        ] {
            assert!(image_path("x", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_that_can_not_work_are_refused_with_words() {
        for good in [
            "unix:///var/run/docker.sock",
            "tcp://10.0.0.1:2375",
            "http://[::1]:2375/",
        ] {
            assert!(pool(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "unix://",
            "tcp://host",
            "https://host:1",
            "ssh://host",
            "tcp://u@h:1",
        ] {
            let error = pool(bad).unwrap_err().to_string();
            assert!(error.contains("can't be used"), "{error}");
        }
    }

    #[test]
    fn an_engine_is_asked_in_a_version_that_it_takes() {
        for (newest, oldest, used) in [
            ("1.41", "1.12", (1, 41)),
            ("1.52", "1.44", (1, 47)),
            ("1.60", "1.48", (1, 48)),
            ("1.47", "", (1, 47)),
        ] {
            let offered = Offered {
                newest: api_version(newest).unwrap(),
                oldest: api_version(oldest).unwrap_or_default(),
            };
            assert_eq!(offered.used(NEWEST_API), used, "{newest} {oldest}");
        }
        for odd in ["", "1", "1.", "1.x", "x.1", "1.47.1", "1.65536"] {
            assert_eq!(api_version(odd), None, "{odd}");
        }
    }

    #[test]
    fn query_values_are_encoded() {
        let mut out = String::new();
        percent_encode("{\"a b\":[\"é&\"]}", &mut out);
        assert_eq!(out, "%7B%22a%20b%22%3A%5B%22%C3%A9%26%22%5D%7D");
    }
}
