//! A runner without a container: binds the two REPL sockets and does what a test tells it. (The suite
//! `runner_real` runs the same against the real runner with its own ZeroMQ library.)

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use control::kernel::runner_link::RunnerAddress;
use control::kernel::zmtp::{self, ReadLimits};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::task::JoinHandle;

/// How long anything expected may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// `{"started_at": 1612.3...}` as the real runner packs it.
const STATUS_ANSWER: &[u8] = b"\x81\xaastarted_at\xcb\x40\x99\x11\xbf\xaf\x83\xb3\x20";

/// One message of a captured log.
#[derive(Clone, Debug)]
pub struct LoggedFrame {
    /// Seconds since the log's begin.
    pub at: f64,
    /// Whether the runner sent it.
    pub from_runner: bool,
    /// Type.
    pub kind: String,
    /// Payload.
    pub payload: Vec<u8>,
}

/// A runner under a test's control.
#[derive(Debug)]
pub struct FakeRunner {
    /// Where it listens.
    pub address: RunnerAddress,
    /// Whether `status` is answered by itself.
    pub answers_status: Arc<AtomicBool>,
    /// Whether it is idle: it answers probes by itself, and hears nothing of them otherwise.
    pub is_idle: Arc<AtomicBool>,
    /// Whether it takes messages; they stay in the connection otherwise.
    pub takes: watch::Sender<bool>,
    outgoing: mpsc::UnboundedSender<(String, Bytes)>,
    incoming: Mutex<mpsc::UnboundedReceiver<(String, Bytes)>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for FakeRunner {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// The peers connected to the runner's output port, each with whether it is still there.
type Peers = Arc<Mutex<VecDeque<(OwnedWriteHalf, Arc<AtomicBool>)>>>;

async fn accept_output(listener: TcpListener, peers: Peers) {
    while let Ok((mut stream, _)) = listener.accept().await {
        if zmtp::handshake(&mut stream, "PUSH", &["PULL"])
            .await
            .is_err()
        {
            continue;
        }
        let (mut reader, writer) = stream.into_split();
        let gone = Arc::new(AtomicBool::new(false));
        peers.lock().await.push_back((writer, Arc::clone(&gone)));
        tokio::spawn(async move {
            let mut ignored = [0u8; 64];
            while matches!(reader.read(&mut ignored).await, Ok(length) if length > 0) {}
            gone.store(true, Ordering::SeqCst);
        });
    }
}

/// Each message goes to the next peer in turn, as ZeroMQ's PUSH does; without peers it waits.
async fn send_output(mut messages: mpsc::UnboundedReceiver<(String, Bytes)>, peers: Peers) {
    while let Some((kind, payload)) = messages.recv().await {
        loop {
            let next = peers.lock().await.pop_front();
            match next {
                Some((mut writer, gone)) if !gone.load(Ordering::SeqCst) => {
                    if zmtp::write_message(&mut writer, &[kind.as_bytes(), &payload])
                        .await
                        .is_ok()
                    {
                        peers.lock().await.push_back((writer, gone));
                        break;
                    }
                }
                Some(_) => {}
                None => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        }
    }
}

type Received = mpsc::UnboundedSender<(String, Bytes)>;

async fn accept_input(
    listener: TcpListener,
    received: Received,
    answering: (Arc<AtomicBool>, Arc<AtomicBool>, Received),
    takes: watch::Receiver<bool>,
) {
    const LIMITS: ReadLimits = ReadLimits {
        frame: 1 << 26,
        frames: 8,
        cut: false,
    };
    while let Ok((mut stream, _)) = listener.accept().await {
        let (received, (status, is_idle, answers)) = (received.clone(), answering.clone());
        let mut takes = takes.clone();
        tokio::spawn(async move {
            if zmtp::handshake(&mut stream, "PULL", &["PUSH"])
                .await
                .is_err()
            {
                return;
            }
            let mut last = (String::new(), Bytes::new());
            while takes.wait_for(|takes| *takes).await.is_ok()
                && let Ok((frames, _)) = zmtp::read_message(&mut stream, &LIMITS).await
            {
                let [kind, payload] = frames.as_slice() else {
                    continue;
                };
                let kind = String::from_utf8_lossy(kind).into_owned();
                let before = std::mem::replace(&mut last, (kind.clone(), payload.clone()));
                // A run begins with `clean`.
                let probes = payload.is_empty()
                    && match kind.as_str() {
                        "build" => before.0 != "clean",
                        "clean" => before.0 == "build" && before.1.is_empty(),
                        _ => false,
                    };
                if kind == "status" && status.load(Ordering::Relaxed) {
                    let _sent = answers.send((kind, Bytes::from_static(STATUS_ANSWER)));
                } else if probes {
                    if is_idle.load(Ordering::Relaxed) {
                        let end = Bytes::from_static(br#"{"exitCode": 0}"#);
                        let _sent = answers.send((format!("{kind}-finished"), end));
                    }
                } else if received.send((kind, payload.clone())).is_err() {
                    return;
                }
            }
        });
    }
}

impl FakeRunner {
    /// Binds both sockets on free ports.
    pub async fn start() -> Result<Self> {
        let input = TcpListener::bind("127.0.0.1:0").await?;
        let output = TcpListener::bind("127.0.0.1:0").await?;
        let (repl_in, repl_out) = (input.local_addr()?.port(), output.local_addr()?.port());
        let (outgoing, to_send) = mpsc::unbounded_channel();
        let (received, incoming) = mpsc::unbounded_channel();
        let answers_status = Arc::new(AtomicBool::new(true));
        let is_idle = Arc::new(AtomicBool::new(true));
        let takes = watch::channel(true).0;
        let peers = Peers::default();
        let tasks = vec![
            tokio::spawn(accept_output(output, Arc::clone(&peers))),
            tokio::spawn(send_output(to_send, peers)),
            tokio::spawn(accept_input(
                input,
                received,
                (
                    Arc::clone(&answers_status),
                    Arc::clone(&is_idle),
                    outgoing.clone(),
                ),
                takes.subscribe(),
            )),
        ];
        Ok(Self {
            address: RunnerAddress {
                ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
                repl_in,
                repl_out,
            },
            answers_status,
            is_idle,
            takes,
            outgoing,
            incoming: Mutex::new(incoming),
            tasks,
        })
    }

    /// Sends a message to the agent, in order.
    pub fn send(&self, kind: &str, payload: impl Into<Bytes>) {
        let _sent = self.outgoing.send((kind.to_owned(), payload.into()));
    }

    /// The next message from the agent (apart from status pings, when these are answered).
    pub async fn receive(&self) -> Result<(String, Bytes)> {
        let mut incoming = self.incoming.lock().await;
        tokio::time::timeout(PATIENCE, incoming.recv())
            .await
            .context("the agent sent nothing in time")?
            .context("the fake runner's receiver ended")
    }

    /// Whether the agent has sent something that was not received yet.
    pub async fn nothing_waits(&self) -> bool {
        self.incoming.lock().await.is_empty()
    }

    /// Receives a message and checks what it is.
    pub async fn expect(&self, kind: &str, payload: &str) -> Result<()> {
        let (found, content) = self.receive().await?;
        ensure!(found == kind, "expected a {kind} message, got {found}");
        ensure!(
            same_payload(&content, payload.as_bytes()),
            "{kind} carries {content:?}, expected {payload:?}"
        );
        Ok(())
    }

    /// Plays the runner's side of a log: waits for each message of the agent, sends each of the runner
    /// at its distance from the message before.
    pub async fn replay(&self, log: &[LoggedFrame]) -> Result<()> {
        let mut begun: Option<(f64, Instant)> = None;
        for frame in log.iter().filter(|frame| frame.kind != "status") {
            if frame.from_runner {
                if let Some((at, instant)) = begun {
                    let offset = Duration::try_from_secs_f64(frame.at - at).unwrap_or_default();
                    tokio::time::sleep_until(tokio::time::Instant::from_std(instant + offset))
                        .await;
                }
                self.send(&frame.kind, frame.payload.clone());
            } else {
                self.expect(&frame.kind, &String::from_utf8_lossy(&frame.payload))
                    .await?;
                begun = Some((frame.at, Instant::now()));
            }
        }
        Ok(())
    }
}

/// JSON is compared as JSON: blanks and order do not matter.
fn same_payload(found: &[u8], expected: &[u8]) -> bool {
    found == expected
        || match (
            serde_json::from_slice::<Value>(found),
            serde_json::from_slice::<Value>(expected),
        ) {
            (Ok(found), Ok(expected)) => found == expected,
            _ => false,
        }
}

/// Reads one vector file of `tests/vectors/runner`: its `data`.
pub fn vector(name: &str) -> Result<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("vectors/runner")
        .join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let mut vector: Value =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    Ok(vector["data"].take())
}

/// A frame's bytes: `{"utf8": ..}` or `{"b64": ..}`.
pub fn frame_bytes(frame: &Value) -> Result<Vec<u8>> {
    match (frame["utf8"].as_str(), frame["b64"].as_str()) {
        (Some(text), _) => Ok(text.as_bytes().to_vec()),
        (_, Some(text)) => Ok(STANDARD.decode(text)?),
        _ => bail!("not a frame: {frame}"),
    }
}

/// The messages of a captured log.
pub fn logged_frames(log: &Value) -> Result<Vec<LoggedFrame>> {
    let entries = log.as_array().context("a log is an array")?;
    entries
        .iter()
        .map(|entry| {
            Ok(LoggedFrame {
                at: entry["t"].as_f64().context("t")?,
                from_runner: entry["dir"] == "runner->agent",
                kind: String::from_utf8(frame_bytes(&entry["parts"][0])?)?,
                payload: frame_bytes(&entry["parts"][1])?,
            })
        })
        .collect()
}
