//! A unix socket in front of the real engine that misbehaves on demand.
//!
//! Each exchange is one connection: the request is read whole, compared with the rules, and then
//! passed on or spoiled. For faults only; what the engine says is always the real engine's word,
//! except where a rule answers itself.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

/// What happens to a request that matches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Taken and never answered.
    Hang,
    /// The connection closes without an answer.
    Close,
    /// Passed on; the answer ends after this many bytes.
    CutAfter(usize),
    /// Passed on; the answer stops after this many bytes, the connection stays open.
    StallAfter(usize),
    /// Passed on; the answer is kept until all kept ones are let go.
    Keep,
    /// Answered with these bytes, nothing is passed on.
    Answer(Vec<u8>),
    /// The same in two pieces, and this long between them.
    Slow(Vec<u8>, Duration, Vec<u8>),
}

impl Fault {
    /// A complete answer with a status and a JSON body.
    pub fn json(status: u16, body: &str) -> Self {
        Self::Answer(
            format!(
                "HTTP/1.1 {status} Fault\r\nContent-Type: application/json\r\nConnection: close\r\n\
                 Content-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .into_bytes(),
        )
    }
}

#[derive(Debug)]
struct Rule {
    needle: String,
    fault: Fault,
    /// Exchanges it is still good for.
    left: usize,
}

/// Something done when a request has come, before it is passed on.
struct Hook {
    needle: String,
    action: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hook({})", self.needle)
    }
}

#[derive(Debug, Default)]
struct State {
    rules: Vec<Rule>,
    hooks: Vec<Hook>,
    requests: Vec<String>,
    /// Line and body of what changes something.
    bodies: Vec<(String, Vec<u8>)>,
    open: usize,
    most_open: usize,
    kept: usize,
    let_go: watch::Sender<()>,
}

/// The misbehaving engine.
#[derive(Debug)]
pub struct FaultDocker {
    directory: tempfile::TempDir,
    upstream: PathBuf,
    state: Arc<Mutex<State>>,
    cut: broadcast::Sender<()>,
    accepting: Option<JoinHandle<()>>,
}

impl FaultDocker {
    /// Listens on a socket of its own in front of the engine's.
    pub fn start() -> Result<Self> {
        let host = std::env::var("DOCKER_HOST").unwrap_or_default();
        let upstream = match host.strip_prefix("unix://") {
            Some(path) => PathBuf::from(path),
            None => PathBuf::from("/var/run/docker.sock"),
        };
        let mut proxy = Self {
            directory: tempfile::tempdir().context("directory of the fault socket")?,
            upstream,
            state: Arc::default(),
            cut: broadcast::channel(4).0,
            accepting: None,
        };
        proxy.bring_up()?;
        Ok(proxy)
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("docker.sock")
    }

    /// Address for the client under test.
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Spoils the next `times` requests whose line (`GET /v1.41/containers/json?all=true`) contains
    /// `needle`.
    pub fn spoil(&self, needle: &str, fault: Fault, times: usize) {
        self.state().rules.push(Rule {
            needle: needle.to_owned(),
            fault,
            left: times,
        });
    }

    /// Answers that were kept so far.
    pub fn kept(&self) -> usize {
        self.state().kept
    }

    /// Hands on what is kept.
    pub fn let_go(&self) {
        self.state().let_go.send_replace(());
    }

    /// Does something when the next request whose line contains `needle` has come, before the engine
    /// hears of it.
    pub fn before(&self, needle: &str, action: impl FnOnce() + Send + 'static) {
        self.state().hooks.push(Hook {
            needle: needle.to_owned(),
            action: Box::new(action),
        });
    }

    /// Ends all rules.
    pub fn behave(&self) {
        self.state().rules.clear();
    }

    /// Cuts every open connection.
    pub fn cut_all(&self) {
        // No receiver only means no connection.
        let _ = self.cut.send(());
    }

    /// The engine is down: connections are cut and new ones refused.
    pub fn go_down(&mut self) {
        if let Some(task) = self.accepting.take() {
            task.abort();
        }
        let _ = std::fs::remove_file(self.socket());
        self.cut_all();
    }

    /// The engine is back.
    pub fn bring_up(&mut self) -> Result<()> {
        let listener = UnixListener::bind(self.socket()).context("bind the fault socket")?;
        let (state, cut, upstream) = (self.state.clone(), self.cut.clone(), self.upstream.clone());
        self.accepting = Some(tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (state, mut cut, upstream) = (state.clone(), cut.subscribe(), upstream.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        _ = exchange(client, &state, &upstream) => {}
                        _ = cut.recv() => {}
                    }
                });
            }
        }));
        Ok(())
    }

    /// Request lines seen so far, oldest first.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.clone()
    }

    /// Bodies of the `POST` requests seen so far whose line contains `needle`, oldest first.
    pub fn bodies(&self, needle: &str) -> Vec<Vec<u8>> {
        let state = self.state();
        let all = state
            .bodies
            .iter()
            .filter(|(line, _)| line.contains(needle));
        all.map(|(_, body)| body.clone()).collect()
    }

    /// Most exchanges that were open at one time.
    pub fn most_open(&self) -> usize {
        self.state().most_open
    }
}

impl Drop for FaultDocker {
    fn drop(&mut self) {
        self.go_down();
    }
}

/// Counts an exchange while it lives.
struct Open<'s>(&'s Mutex<State>);

impl<'s> Open<'s> {
    fn new(state: &'s Mutex<State>) -> Self {
        let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
        held.open += 1;
        held.most_open = held.most_open.max(held.open);
        Self(state)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).open -= 1;
    }
}

async fn exchange(mut client: UnixStream, state: &Mutex<State>, upstream: &Path) -> Result<()> {
    let mut request = Vec::new();
    let head = loop {
        if let Some(at) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            break at;
        }
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    };
    let text = String::from_utf8_lossy(&request[..head]).into_owned();
    let mut lines = text.split("\r\n");
    let line = lines.next().unwrap_or_default();
    let line = line.strip_suffix(" HTTP/1.1").unwrap_or(line).to_owned();
    let length: usize = lines
        .filter_map(|header| header.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0);
    while request.len() < head + 4 + length {
        if client.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let _open = Open::new(state);
    let fault = {
        let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
        held.requests.push(line.clone());
        if line.starts_with("POST ") {
            let body = request[head + 4..].to_vec();
            held.bodies.push((line.clone(), body));
        }
        held.rules
            .iter_mut()
            .find(|rule| rule.left > 0 && line.contains(&rule.needle))
            .map(|rule| {
                rule.left -= 1;
                rule.fault.clone()
            })
    };
    let hook = {
        let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
        let at = held.hooks.iter().position(|it| line.contains(&it.needle));
        at.map(|at| held.hooks.remove(at))
    };
    if let Some(hook) = hook {
        (hook.action)();
    }
    let budget = match fault {
        Some(Fault::Hang) => return std::future::pending().await,
        Some(Fault::Close) => return Ok(()),
        Some(Fault::Answer(bytes)) => {
            client.write_all(&bytes).await?;
            client.shutdown().await?;
            return Ok(());
        }
        Some(Fault::Slow(first, pause, second)) => {
            client.write_all(&first).await?;
            tokio::time::sleep(pause).await;
            client.write_all(&second).await?;
            client.shutdown().await?;
            return Ok(());
        }
        Some(Fault::CutAfter(bytes) | Fault::StallAfter(bytes)) => bytes,
        Some(Fault::Keep) | None => usize::MAX,
    };
    let mut engine = UnixStream::connect(upstream).await?;
    // One exchange per connection keeps the two sides in step.
    engine.write_all(&request[..head]).await?;
    engine.write_all(b"\r\nConnection: close\r\n\r\n").await?;
    engine.write_all(&request[head + 4..]).await?;
    if fault == Some(Fault::Keep) {
        let mut answer = Vec::new();
        engine.read_to_end(&mut answer).await?;
        let mut let_go = {
            let mut held = state.lock().unwrap_or_else(PoisonError::into_inner);
            held.kept += 1;
            held.let_go.subscribe()
        };
        let_go.changed().await?;
        client.write_all(&answer).await?;
        return Ok(());
    }
    let mut left = budget;
    let mut buffer = vec![0; 16 << 10];
    while left > 0 {
        let want = left.min(buffer.len());
        let mut gone = [0; 1];
        let read = tokio::select! {
            read = engine.read(&mut buffer[..want]) => read?,
            // The client gave up.
            _ = client.read(&mut gone) => return Ok(()),
        };
        if read == 0 {
            return Ok(());
        }
        client.write_all(&buffer[..read]).await?;
        left -= read;
    }
    if matches!(fault, Some(Fault::StallAfter(_))) {
        return std::future::pending().await;
    }
    Ok(())
}
