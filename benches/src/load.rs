//! The clients: requests over open connections, connections one after the other, idle ones.
//!
//! In: an address, how many at once, for how long. Out: one [`Outcome`]. One thread. Invariant: a
//! client gets ready, says so, and begins when it is told; what it reports began there.

use std::io::{BufRead, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde::{Deserialize, Serialize};

/// Bytes of a request and of its answer, unless another size is asked for.
pub const MESSAGE: usize = 64;
/// The largest message: a socket that has nothing to send takes so much at once.
pub const LARGEST_MESSAGE: usize = 16 * 1024;
const EVENTS: usize = 256;
/// How long one exchange may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that may fail before a run is given up.
const FAILURES: u64 = 100;

/// What a run came to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Requests answered or connections ended.
    pub units: f64,
    /// How long it took.
    pub seconds: f64,
    /// Percentiles of the time from request (or connect) to answer, in microseconds.
    pub latency_us: Latency,
    /// Connections that were refused or cut.
    pub failures: u64,
}

/// Percentiles of a latency, in microseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Latency {
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Latency {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1e3,
        }
    }
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Message and answer in turn, on connections that stay.
    Requests,
    /// Connect, one message, one answer, close.
    Connections,
    /// Connect, one message, one answer, stay.
    Idle,
}

/// Runs one load, of messages of so many bytes, and returns what came of it.
///
/// # Errors
/// The size is none that is sent, the address does not answer, or too many connections are lost.
pub fn run(
    kind: Kind,
    address: SocketAddr,
    at_once: usize,
    message: usize,
    span: Duration,
) -> Result<Outcome> {
    ensure!(
        (1..=LARGEST_MESSAGE).contains(&message),
        "a message has 1 to {LARGEST_MESSAGE} bytes"
    );
    let message = vec![7; message];
    match kind {
        Kind::Requests => requests(address, at_once, &message, span),
        Kind::Connections => connections(address, at_once, &message, span),
        Kind::Idle => idle(address, at_once),
    }
}

fn histogram() -> Result<Histogram<u64>> {
    // From a microsecond to a minute, to three digits, in nanoseconds.
    Ok(Histogram::new_with_bounds(1_000, 60_000_000_000, 3)?)
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Says that all is ready and waits for the word.
fn wait_for_start() -> Result<()> {
    println!("ready");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(())
}

/// A connection that has proved to reach an echo server.
///
/// # Errors
/// It does not.
pub fn proven(address: SocketAddr) -> std::io::Result<std::net::TcpStream> {
    let mut stream = std::net::TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(&[1; MESSAGE])?;
    stream.read_exact(&mut [0; MESSAGE])?;
    Ok(stream)
}

struct Asker {
    stream: TcpStream,
    asked: Instant,
    got: usize,
}

fn requests(
    address: SocketAddr,
    at_once: usize,
    message: &[u8],
    span: Duration,
) -> Result<Outcome> {
    let mut poll = Poll::new()?;
    let mut askers = Vec::new();
    for index in 0..at_once {
        let stream = proven(address).with_context(|| format!("{address} does not answer"))?;
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        poll.registry()
            .register(&mut stream, Token(index), Interest::READABLE)?;
        askers.push(Asker {
            stream,
            asked: Instant::now(),
            got: 0,
        });
    }
    let mut buffer = vec![0; message.len()];
    let mut times = histogram()?;
    let mut units = 0_u64;
    let mut events = Events::with_capacity(EVENTS);
    wait_for_start()?;
    let begin = Instant::now();
    for asker in &mut askers {
        asker.asked = Instant::now();
        asker.stream.write_all(message)?;
    }
    while begin.elapsed() < span {
        poll.poll(&mut events, Some(PATIENCE))?;
        ensure!(!events.is_empty(), "no answer within {PATIENCE:?}");
        for event in &events {
            let asker = &mut askers[event.token().0];
            loop {
                match asker.stream.read(&mut buffer[asker.got..]) {
                    Ok(0) => bail!("a connection was ended by the other side"),
                    Ok(read) => asker.got += read,
                    Err(err) if err.kind() == ErrorKind::WouldBlock => break,
                    Err(err) => return Err(err).context("a connection was lost"),
                }
                if asker.got == message.len() {
                    times.saturating_record(nanoseconds(asker.asked));
                    units += 1;
                    asker.got = 0;
                    asker.asked = Instant::now();
                    asker.stream.write_all(message)?;
                    // The answer can't be there yet: an event will tell.
                    break;
                }
            }
        }
    }
    Ok(Outcome {
        units: units as f64,
        seconds: begin.elapsed().as_secs_f64(),
        latency_us: Latency::of(&times),
        failures: 0,
    })
}

struct Caller {
    stream: TcpStream,
    began: Instant,
    sent: bool,
    got: usize,
}

fn call(poll: &Poll, address: SocketAddr, index: usize) -> Result<Caller> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).context("cannot connect")?;
    let interest = Interest::READABLE | Interest::WRITABLE;
    poll.registry()
        .register(&mut stream, Token(index), interest)?;
    Ok(Caller {
        stream,
        began,
        sent: false,
        got: 0,
    })
}

/// How one caller stands.
enum Standing {
    Waiting,
    Answered,
    Lost,
}

fn advance(caller: &mut Caller, message: &[u8], buffer: &mut [u8]) -> Standing {
    if !caller.sent {
        match caller.stream.write(message) {
            Ok(sent) if sent == message.len() => caller.sent = true,
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected) => {
                return Standing::Waiting;
            }
            _ => return Standing::Lost,
        }
    }
    match caller.stream.read(&mut buffer[caller.got..]) {
        Ok(0) => Standing::Lost,
        Ok(read) => {
            caller.got += read;
            if caller.got == message.len() {
                Standing::Answered
            } else {
                Standing::Waiting
            }
        }
        Err(err) if err.kind() == ErrorKind::WouldBlock => Standing::Waiting,
        Err(_) => Standing::Lost,
    }
}

fn connections(
    address: SocketAddr,
    at_once: usize,
    message: &[u8],
    span: Duration,
) -> Result<Outcome> {
    drop(proven(address).with_context(|| format!("{address} does not answer"))?);
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(EVENTS);
    let mut times = histogram()?;
    let mut buffer = vec![0; message.len()];
    let (mut units, mut failures) = (0_u64, 0);
    wait_for_start()?;
    let begin = Instant::now();
    let mut callers = (0..at_once)
        .map(|index| call(&poll, address, index))
        .collect::<Result<Vec<_>>>()?;
    while begin.elapsed() < span {
        poll.poll(&mut events, Some(PATIENCE))?;
        ensure!(!events.is_empty(), "no answer within {PATIENCE:?}");
        for event in &events {
            let index = event.token().0;
            match advance(&mut callers[index], message, &mut buffer) {
                Standing::Waiting => continue,
                Standing::Answered => {
                    times.saturating_record(nanoseconds(callers[index].began));
                    units += 1;
                }
                Standing::Lost => {
                    failures += 1;
                    ensure!(failures < FAILURES, "{failures} connections were lost");
                }
            }
            callers[index] = call(&poll, address, index)?;
        }
    }
    Ok(Outcome {
        units: units as f64,
        seconds: begin.elapsed().as_secs_f64(),
        latency_us: Latency::of(&times),
        failures,
    })
}

fn idle(address: SocketAddr, at_once: usize) -> Result<Outcome> {
    let mut kept = Vec::new();
    for number in 0..at_once {
        kept.push(proven(address).with_context(|| format!("connection {number} of {address}"))?);
    }
    wait_for_start()?;
    // Those that were opened first are still served.
    for stream in kept.iter_mut().take(10) {
        stream.write_all(&[2; MESSAGE])?;
        stream.read_exact(&mut [0; MESSAGE])?;
    }
    Ok(Outcome {
        units: kept.len() as f64,
        ..Outcome::default()
    })
}
