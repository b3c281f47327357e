//! The relay alone: memory per idle connection, CPU per byte and per message, against no relay at
//! all, and each engine against the others.
//!
//! `cargo run --release -p benches --bin relay-micro [connections] [megabytes] [rounds] [seconds]`
//!
//! The relay runs in a process of its own, so that its memory and CPU time are its own; client and
//! server share this one. Everything is on loopback: no network card, 64 KiB segments. On a machine
//! of few cores wall-clock figures tell who else is running; CPU time of the relay does not.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dataplane::forward::relay::port::Rules;
use dataplane::forward::relay::{Engine, Options, Relay};
use dataplane::sys::rlimit;

const PIECE: usize = 256 * 1024;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let limit = rlimit::raise_descriptors();
    if words.first().map(String::as_str) == Some("relay") {
        return serve(&words);
    }
    let connections: usize = words.first().map_or(Ok(4000), |word| word.parse())?;
    let megabytes: u64 = words.get(1).map_or(Ok(8000), |word| word.parse())?;
    let rounds: usize = words.get(2).map_or(Ok(1), |word| word.parse())?;
    let seconds: f64 = words.get(3).map_or(Ok(3.0), |word| word.parse())?;
    let span = Duration::try_from_secs_f64(seconds)?;
    // This process holds two sockets of each connection.
    let connections = connections.min(usize::try_from(limit / 2)?.saturating_sub(200));
    println!("descriptors {limit}, kernel {}", kernel());

    let refused = Way::Uring.refused()?;
    if let Some(why) = &refused {
        println!("{} is left out: {why}", Way::Uring.name());
    }
    let possible = |ways: &[Way]| {
        let ways = ways.iter().copied();
        ways.filter(|way| *way != Way::Uring || refused.is_none())
            .collect::<Vec<Way>>()
    };
    for way in possible(&[Way::Splice, Way::Uring]) {
        memory(way, connections)?;
    }
    for round in 1..=rounds {
        println!("\nround {round}: bulk, one stream of {megabytes} MB");
        for way in possible(&[Way::Direct, Way::Splice, Way::Copy, Way::Uring]) {
            bulk(way, megabytes)?;
        }
        for clients in [1, 32, 256] {
            println!("\nmessages of 64 bytes, {clients} connections, {seconds} s");
            for way in possible(&[Way::Direct, Way::Splice, Way::Uring]) {
                messages(way, clients, span)?;
            }
        }
        println!(
            "\nconnections, one after the other: connect, 64 bytes each way, close, {seconds} s"
        );
        for way in possible(&[Way::Direct, Way::Splice, Way::Uring]) {
            connections_per_second(way, span)?;
        }
    }
    Ok(())
}

fn memory(way: Way, connections: usize) -> Result<()> {
    println!("\nmemory, {connections} idle connections, {}", way.name());
    let server = TcpListener::bind("127.0.0.1:0")?;
    let relay = Process::start(server.local_addr()?, way)?;
    warm(&relay, &server)?;
    let before = relay.private_kib()?;
    let mut kept = Vec::new();
    for _ in 0..connections {
        let client = TcpStream::connect(relay.address)?;
        kept.push((client, server.accept()?.0));
    }
    let after = relay.private_kib()?;
    println!("  relay before     {before:>8} KiB private");
    println!("  relay after      {after:>8} KiB private");
    println!(
        "  per connection   {:>8.0} B",
        (after.saturating_sub(before) * 1024) as f64 / connections as f64
    );
    // Every connection moves a message; buffers must not stay behind.
    for (client, accepted) in &mut kept {
        client.write_all(&[1; 64])?;
        accepted.read_exact(&mut [0; 64])?;
    }
    let used = relay.private_kib()?;
    println!(
        "  after use        {:>8.0} B per connection",
        (used.saturating_sub(before) * 1024) as f64 / connections as f64
    );
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Direct,
    Splice,
    Copy,
    Uring,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Splice => "relay",
            Self::Copy => "relay, copy only",
            Self::Uring => "relay, io_uring",
        }
    }

    /// Why the kernel has no such relay, if so.
    fn refused(self) -> Result<Option<String>> {
        let relay = Relay::start(Options {
            engine: self.engine(),
            ..Options::default()
        })?;
        Ok(relay.refused().map(str::to_owned))
    }

    /// That of a relay.
    fn engine(self) -> Engine {
        match self {
            Self::Direct | Self::Splice => Engine::Splice,
            Self::Copy => Engine::Copy,
            Self::Uring => Engine::Uring,
        }
    }

    fn open(self, target: SocketAddr) -> Result<(SocketAddr, Option<Process>)> {
        if self == Self::Direct {
            return Ok((target, None));
        }
        let relay = Process::start(target, self)?;
        Ok((relay.address, Some(relay)))
    }
}

/// The child: a relay with one port. Ends with its input.
fn serve(words: &[String]) -> Result<()> {
    let [_, target, way] = words else {
        bail!("relay TARGET WAY");
    };
    let ways = [Way::Splice, Way::Copy, Way::Uring];
    let Some(engine) = ways.into_iter().find(|it| it.name() == way) else {
        bail!("{way:?} is no engine");
    };
    let relay = Relay::start(Options {
        engine: engine.engine(),
        ..Options::default()
    })?;
    if let Some(why) = relay.refused() {
        bail!("{way} can't be measured: {why}");
    }
    let port = relay.open(
        "127.0.0.1:0".parse()?,
        target.parse::<std::net::SocketAddr>()?,
        Rules::default(),
    )?;
    println!("{}", port.bind());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

struct Process {
    child: Child,
    address: SocketAddr,
}

impl Process {
    fn start(target: SocketAddr, way: Way) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["relay", &target.to_string(), way.name()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        Ok(Self {
            child,
            address: line.trim().parse().context("the relay's address")?,
        })
    }

    fn private_kib(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id()))?;
        Ok(text
            .lines()
            .filter(|line| line.starts_with("Private_"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum())
    }

    fn cpu(&self) -> Result<Duration> {
        // schedstat counts in ns; its first number is the time on a CPU of the main thread only,
        // so the threads are summed.
        let mut sum = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            sum += text
                .split_whitespace()
                .next()
                .and_then(|ns| ns.parse::<u64>().ok())
                .unwrap_or(0);
        }
        Ok(Duration::from_nanos(sum))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// Uses all of a ring's buffers once: they are the thread's, not the connections'.
fn warm(relay: &Process, server: &TcpListener) -> Result<()> {
    let mut client = TcpStream::connect(relay.address)?;
    let (mut accepted, _) = server.accept()?;
    for _ in 0..300 {
        client.write_all(b"x")?;
        accepted.read_exact(&mut [0])?;
    }
    Ok(())
}

fn report(
    way: Way,
    relay: Option<&Process>,
    before: Duration,
    unit: &str,
    units: f64,
    took: f64,
) -> Result<()> {
    let digits = if unit == "GB" { 4 } else { 1 };
    let rate = units / took;
    print!("  {:<18} {rate:>12.digits$} {unit}/s", way.name());
    if let Some(relay) = relay {
        let cpu = (relay.cpu()? - before).as_secs_f64();
        print!(
            ", relay CPU {:.3} s per {}{unit}",
            cpu / units * scale(unit).0,
            scale(unit).1
        );
    }
    println!();
    Ok(())
}

fn scale(unit: &str) -> (f64, &'static str) {
    if unit == "GB" {
        (1.0, "")
    } else {
        (100_000.0, "100k ")
    }
}

fn cpu_of(relay: Option<&Process>) -> Result<Duration> {
    relay.map_or(Ok(Duration::ZERO), Process::cpu)
}

fn bulk(way: Way, megabytes: u64) -> Result<()> {
    let server = TcpListener::bind("127.0.0.1:0")?;
    let (address, relay) = way.open(server.local_addr()?)?;
    let mut client = TcpStream::connect(address)?;
    let (mut accepted, _) = server.accept()?;
    let total = megabytes * 1_000_000;
    let before = cpu_of(relay.as_ref())?;
    let begin = Instant::now();
    let writer = std::thread::spawn(move || {
        let piece = vec![7; PIECE];
        let mut left = total;
        while left > 0 {
            let now = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
            client.write_all(&piece[..now])?;
            left -= now as u64;
        }
        std::io::Result::Ok(())
    });
    let mut buffer = vec![0; PIECE];
    let mut got = 0;
    loop {
        match accepted.read(&mut buffer)? {
            0 => break,
            read => got += read as u64,
        }
    }
    let took = begin.elapsed().as_secs_f64();
    writer
        .join()
        .map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    if got != total {
        bail!("{got} of {total} bytes arrived");
    }
    report(way, relay.as_ref(), before, "GB", total as f64 / 1e9, took)
}

fn echo_server() -> Result<SocketAddr> {
    let server = TcpListener::bind("127.0.0.1:0")?;
    let address = server.local_addr()?;
    std::thread::spawn(move || {
        for stream in server.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.set_nodelay(true);
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
            });
        }
    });
    Ok(address)
}

fn messages(way: Way, clients: usize, span: Duration) -> Result<()> {
    let (address, relay) = way.open(echo_server()?)?;
    let before = cpu_of(relay.as_ref())?;
    let begin = Instant::now();
    let threads: Vec<_> = (0..clients)
        .map(|_| {
            std::thread::spawn(move || -> std::io::Result<u64> {
                let mut stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                let mut done = 0;
                let mut buffer = [3; 64];
                // One at least, also where the span is over before a thread has begun.
                loop {
                    stream.write_all(&buffer)?;
                    stream.read_exact(&mut buffer)?;
                    done += 1;
                    if begin.elapsed() >= span {
                        return Ok(done);
                    }
                }
            })
        })
        .collect();
    let mut done = 0;
    for thread in threads {
        done += thread
            .join()
            .map_err(|_| anyhow::anyhow!("a client panicked"))??;
    }
    let took = begin.elapsed().as_secs_f64();
    report(way, relay.as_ref(), before, "messages", done as f64, took)
}

fn connections_per_second(way: Way, span: Duration) -> Result<()> {
    let (address, relay) = way.open(echo_server()?)?;
    let before = cpu_of(relay.as_ref())?;
    let begin = Instant::now();
    let mut done = 0_u64;
    while done == 0 || begin.elapsed() < span {
        let mut stream = TcpStream::connect(address)?;
        let mut buffer = [3; 64];
        stream.write_all(&buffer)?;
        stream.read_exact(&mut buffer)?;
        done += 1;
    }
    let took = begin.elapsed().as_secs_f64();
    report(
        way,
        relay.as_ref(),
        before,
        "connections",
        done as f64,
        took,
    )
}
