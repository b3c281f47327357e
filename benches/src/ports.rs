//! The bench of service ports: which loads, in which order, and what is measured.
//!
//! In: [`Options`]. Out: samples, handed to [`report`]. Invariant: a sample's CPU time begins when
//! its clients are ready and ends when they are done, and holds all that client, server and proxy
//! used in between.

pub mod report;

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use crate::Stage;
use crate::load::{Kind, LARGEST_MESSAGE, Latency, MESSAGE, Outcome};
use crate::node::program;
use crate::peer::Peer;
use crate::site::{BULK_PORT, CONTAINER, Cpu, ECHO_PORT, Group, Memory, Place, Site, until};

/// What to measure and for how long.
#[derive(Debug, Clone, clap::Parser)]
#[command(about = "Service ports against peers, in namespaces")]
pub struct Options {
    /// Rounds; each runs every load over every peer.
    #[arg(long, default_value_t = 7)]
    pub rounds: u32,
    /// Seconds of one load.
    #[arg(long, default_value_t = 1.5)]
    pub seconds: f64,
    /// Peers, all by default.
    #[arg(long, value_delimiter = ',')]
    pub peers: Vec<Peer>,
    /// Loads, all by default.
    #[arg(long, value_delimiter = ',')]
    pub loads: Vec<Load>,
    /// Connections at once of the loads with many.
    #[arg(long, default_value_t = 32)]
    pub connections: usize,
    /// Bytes of a request and of its answer, up to 16 KiB.
    #[arg(long, default_value_t = MESSAGE)]
    pub message_bytes: usize,
    /// Bytes that iperf3 hands to the kernel at once.
    #[arg(long, default_value_t = 256 * 1024)]
    pub bulk_block_bytes: usize,
    /// Idle connections per proxy, once per run.
    #[arg(long, default_value_t = 2000)]
    pub idle: usize,
    /// Where the results go.
    #[arg(long, default_value = "target/bench")]
    pub output: PathBuf,
}

/// A load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Load {
    /// Messages over many connections from the remote client.
    Requests,
    /// The same over one connection.
    Latency,
    /// Connect, message, answer, close.
    Connections,
    /// One stream of iperf3 to the container.
    Bulk,
    /// [`Load::Requests`] from the host itself.
    HostRequests,
    /// [`Load::Connections`] from the host itself.
    HostConnections,
    /// [`Load::Bulk`] from the host itself.
    HostBulk,
    /// Memory of idle connections.
    Idle,
}

impl Load {
    /// All, in the order of tables.
    pub const ALL: [Self; 8] = [
        Self::Requests,
        Self::Latency,
        Self::Connections,
        Self::Bulk,
        Self::HostRequests,
        Self::HostConnections,
        Self::HostBulk,
        Self::Idle,
    ];

    /// Its name in tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Latency => "latency",
            Self::Connections => "connections",
            Self::Bulk => "bulk",
            Self::HostRequests => "host_requests",
            Self::HostConnections => "host_connections",
            Self::HostBulk => "host_bulk",
            Self::Idle => "idle",
        }
    }

    fn from(self) -> Place {
        match self {
            Self::HostRequests | Self::HostConnections | Self::HostBulk => Place::Host,
            _ => Place::Client,
        }
    }

    fn is_bulk(self) -> bool {
        matches!(self, Self::Bulk | Self::HostBulk)
    }

    fn is_wanted(self, peer: Peer) -> bool {
        match self {
            Self::Idle => peer.has_process() && peer != Peer::Kernel,
            _ => peer.addresses(self.from()).is_some(),
        }
    }
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// Which load.
    pub load: Load,
    /// Over which peer.
    #[serde(serialize_with = "name_of")]
    pub peer: Peer,
    /// In which round.
    pub round: u32,
    /// Requests, connections or gigabytes.
    pub units: f64,
    /// How long it took.
    pub seconds: f64,
    /// What it cost.
    pub cpu: Cpu,
    /// Percentiles; zeros for bulk.
    pub latency_us: Latency,
    /// Connections lost on the way.
    pub failures: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn name_of<S: serde::Serializer>(peer: &Peer, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(peer.name())
}

impl Sample {
    /// Units per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.units / self.seconds
    }

    /// CPU seconds of all three per unit.
    #[must_use]
    pub fn cpu_per_unit(&self) -> f64 {
        self.cpu.total() / self.units
    }

    /// CPU seconds of the proxy per unit.
    #[must_use]
    pub fn own_per_unit(&self) -> f64 {
        self.cpu.proxy / self.units
    }
}

/// What a proxy's memory was.
#[derive(Debug, Clone, Serialize)]
pub struct Idle {
    /// Which proxy.
    #[serde(serialize_with = "name_of")]
    pub peer: Peer,
    /// With one connection served before.
    pub before: Memory,
    /// With the idle ones.
    pub after: Memory,
    /// How many these are.
    pub connections: usize,
}

impl Idle {
    /// Private bytes per idle connection.
    #[must_use]
    pub fn bytes_per_connection(&self) -> f64 {
        self.after.private.saturating_sub(self.before.private) as f64 / self.connections as f64
    }
}

/// All that was measured.
#[derive(Debug, Default)]
pub struct Findings {
    /// In the order of time.
    pub samples: Vec<Sample>,
    /// Per proxy.
    pub idle: Vec<Idle>,
    /// Name, version, configuration.
    pub peers: Vec<(Peer, String, String)>,
}

/// Runs the bench.
///
/// # Errors
/// A peer is missing or does not serve, or a figure lies outside the sane band.
pub fn run(options: &Options, stage: &Stage) -> Result<()> {
    let all_or = |chosen: &[Peer]| {
        if chosen.is_empty() {
            Peer::ALL.to_vec()
        } else {
            chosen.to_vec()
        }
    };
    let peers = all_or(&options.peers);
    let loads = if options.loads.is_empty() {
        Load::ALL.to_vec()
    } else {
        options.loads.clone()
    };
    ensure!(options.rounds > 0, "--rounds 0 measures nothing");
    ensure!(
        (1..=LARGEST_MESSAGE).contains(&options.message_bytes),
        "--message-bytes is 1 to {LARGEST_MESSAGE}"
    );
    std::fs::create_dir_all(&options.output)
        .with_context(|| options.output.display().to_string())?;
    let machine = report::Machine::now();
    let site = stage.set(Site::new()?);
    site.make()?;
    let mut findings = Findings::default();
    for peer in &peers {
        let (version, configuration) = peer.description(&site)?;
        findings.peers.push((*peer, version, configuration));
    }
    let bench = Bench {
        site: &site,
        options,
        init_pid: serve(&site)?,
    };
    let begin = Instant::now();
    for round in 0..options.rounds {
        for load in &loads {
            // Who comes first changes with the round.
            for turn in 0..peers.len() {
                let peer = peers[(turn + round as usize) % peers.len()];
                if !load.is_wanted(peer) {
                    continue;
                }
                let what = || format!("{} over {}", load.name(), peer.name());
                if *load == Load::Idle {
                    if round == 0 {
                        findings.idle.push(bench.idle(peer).with_context(what)?);
                    }
                    continue;
                }
                let sample = bench.measure(*load, peer, round).with_context(what)?;
                findings.samples.push(sample);
            }
        }
        eprintln!(
            "round {} of {} after {:.0} s",
            round + 1,
            options.rounds,
            begin.elapsed().as_secs_f64()
        );
    }
    site.clean();
    report::write(options, &machine, &findings)
}

/// Starts what answers in the container. Returns a process that lives there.
///
/// # Errors
/// A program is missing.
pub fn serve(site: &Site) -> Result<u32> {
    let mut echo = site
        .command(
            Some(Place::Container),
            Group::Server,
            &program("bench-load")?,
        )
        .args(["serve", &format!("0.0.0.0:{ECHO_PORT}")])
        .stdout(Stdio::piped())
        .spawn()
        .context("the echo server cannot be started")?;
    let mut line = String::new();
    BufReader::new(echo.stdout.take().context("piped")?).read_line(&mut line)?;
    ensure!(line.trim() == "ready", "the echo server did not start");
    site.command(Some(Place::Container), Group::Server, "iperf3".as_ref())
        .args(["-s", "-p", &BULK_PORT.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("iperf3 cannot be started")?;
    let address = format!("{CONTAINER}:{BULK_PORT}").parse()?;
    site.within(Place::Container, || {
        until("iperf3 listening (run deploy/setup bench)", || {
            std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()
        })
    })??;
    // The site ends both by their group.
    Ok(echo.id())
}

struct Bench<'a> {
    site: &'a Site,
    options: &'a Options,
    init_pid: u32,
}

impl Bench<'_> {
    fn measure(&self, load: Load, peer: Peer, round: u32) -> Result<Sample> {
        let _running = peer.start(self.site, self.init_pid)?;
        let [echo, bulk] = peer
            .addresses(load.from())
            .context("this peer does not serve such clients")?;
        let before;
        let after;
        let outcome = if load.is_bulk() {
            before = self.site.cpu()?;
            let outcome = self.iperf(load.from(), bulk)?;
            after = self.site.cpu()?;
            outcome
        } else {
            let (kind, at_once) = match load {
                Load::Latency => (Kind::Requests, 1),
                Load::Connections | Load::HostConnections => {
                    (Kind::Connections, self.options.connections)
                }
                _ => (Kind::Requests, self.options.connections),
            };
            let mut client =
                Client::start(self.site, load.from(), kind, echo, at_once, self.options)?;
            before = self.site.cpu()?;
            let outcome = client.go()?;
            after = self.site.cpu()?;
            outcome
        };
        Ok(Sample {
            load,
            peer,
            round,
            units: outcome.units,
            seconds: outcome.seconds,
            cpu: after.since(&before),
            latency_us: outcome.latency_us,
            failures: outcome.failures,
        })
    }

    fn iperf(&self, from: Place, address: std::net::SocketAddr) -> Result<Outcome> {
        let limit = Duration::from_secs_f64(self.options.seconds) + Duration::from_secs(30);
        let child = self
            .site
            .command(Some(from), Group::Client, "iperf3".as_ref())
            .args(["-J", "-c", &address.ip().to_string()])
            .args(["-p", &address.port().to_string()])
            .args(["-t", &self.options.seconds.ceil().to_string()])
            .args(["-l", &self.options.bulk_block_bytes.to_string()])
            .args(["--connect-timeout", "5000"])
            .stdout(Stdio::piped())
            .spawn()?;
        let _watchdog = Watchdog::new(child.id(), limit);
        let output = child.wait_with_output()?;
        let text: serde_json::Value = serde_json::from_slice(&output.stdout)
            .context("iperf3 ended without a report (or took too long)")?;
        if let Some(error) = text.get("error") {
            bail!("iperf3: {error}");
        }
        let number = |name: &str| {
            text.pointer(&format!("/end/sum_received/{name}"))
                .and_then(serde_json::Value::as_f64)
                .with_context(|| format!("iperf3 does not tell {name}"))
        };
        Ok(Outcome {
            units: number("bytes")? / 1e9,
            seconds: number("seconds")?,
            ..Outcome::default()
        })
    }

    fn idle(&self, peer: Peer) -> Result<Idle> {
        let _running = peer.start(self.site, self.init_pid)?;
        let [echo, _] = peer
            .addresses(Place::Client)
            .context("every peer serves remote clients")?;
        let before = self.site.memory(Group::Proxy);
        let count = self.options.idle;
        let mut client = Client::start(
            self.site,
            Place::Client,
            Kind::Idle,
            echo,
            count,
            self.options,
        )?;
        let after = self.site.memory(Group::Proxy);
        client.go()?;
        Ok(Idle {
            peer,
            before,
            after,
            connections: count,
        })
    }
}

/// Kills a process that takes too long, so that its reader sees an end.
struct Watchdog {
    done: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn new(pid: u32, limit: Duration) -> Self {
        let (done, waiting) = std::sync::mpsc::channel();
        thread::spawn(move || {
            if waiting.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                && let Ok(pid) = i32::try_from(pid)
            {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
        });
        Self { done }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.done.send(());
    }
}

/// A load generator that is ready.
struct Client {
    child: Child,
    output: BufReader<ChildStdout>,
    _watchdog: Watchdog,
}

impl Client {
    fn start(
        site: &Site,
        from: Place,
        kind: Kind,
        address: std::net::SocketAddr,
        at_once: usize,
        options: &Options,
    ) -> Result<Self> {
        let kind = match kind {
            Kind::Requests => "requests",
            Kind::Connections => "connections",
            Kind::Idle => "idle",
        };
        let mut child = site
            .command(Some(from), Group::Client, &program("bench-load")?)
            .args(["run", kind, &address.to_string()])
            .args(["--at-once", &at_once.to_string()])
            .args(["--message", &options.message_bytes.to_string()])
            .args(["--seconds", &options.seconds.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let watchdog = Watchdog::new(
            child.id(),
            Duration::from_secs_f64(options.seconds) + Duration::from_secs(60),
        );
        let mut output = BufReader::new(child.stdout.take().context("piped")?);
        let mut line = String::new();
        output.read_line(&mut line)?;
        if line.trim() != "ready" {
            let _ = child.wait();
            bail!("the load generator did not get ready");
        }
        Ok(Self {
            child,
            output,
            _watchdog: watchdog,
        })
    }

    fn go(&mut self) -> Result<Outcome> {
        if let Some(mut stdin) = self.child.stdin.take() {
            stdin.write_all(b"go\n")?;
        }
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(self.child.wait()?.success(), "the load generator failed");
        serde_json::from_str(&line).context("the load generator's report")
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
