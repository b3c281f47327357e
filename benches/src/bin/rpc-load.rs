//! Calls an agent's `ping` as the manager does, with as little of its own as possible, and prints one JSON object.
//!
//! `rpc-load ADDRESS calls CONNECTIONS SECONDS`: each connection calls again as soon as it is answered;
//! `rpc-load ADDRESS connects COUNT`: a new connection, its handshake and one call, again and again;
//! `rpc-load ADDRESS ready SECONDS`: tries until a first call is answered;
//! `rpc-load ADDRESS bare`: answers such calls itself, always with the same bytes, until it is killed: what the
//! machine's sockets cost by themselves, and no agent can be below.
//!
//! One thread and bytes put together by hand (ZMTP 3.1, NULL): a client library, in Python above all, would
//! measure itself. All times are in microseconds.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

/// No answer takes longer, or the agent is taken for dead.
const DEADLINE: Duration = Duration::from_secs(30);
/// More than an answer has.
const PIECE: usize = 4096;
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
const RESULT: u8 = 2;

/// One connection after its handshake.
struct Connection {
    stream: TcpStream,
    /// What has arrived and was not taken yet.
    arrived: Vec<u8>,
}

impl Connection {
    fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, DEADLINE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        let mut connection = Self {
            stream,
            arrived: Vec::with_capacity(PIECE),
        };
        let ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00";
        connection.stream.write_all(&hello(ready))?;
        while connection.arrived.len() < 64 {
            connection.receive()?;
        }
        ensure!(connection.arrived[0] == 0xff, "that is no ZeroMQ peer");
        connection.arrived.drain(..64);
        let mut probe = Vec::new();
        frame(&mut probe, MORE, b"PING");
        frame(&mut probe, MORE, b"");
        frame(&mut probe, 0, b"");
        connection.stream.write_all(&probe)?;
        let is_pong = |frames: &[&[u8]]| frames.first() == Some(&&b"PONG"[..]);
        while !connection.take(is_pong)? {
            connection.receive()?;
        }
        Ok(connection)
    }

    /// Takes in a piece; false when there is none just now.
    fn receive(&mut self) -> Result<bool> {
        let mut piece = [0_u8; PIECE];
        match self.stream.read(&mut piece) {
            Ok(0) => bail!("the agent closed the connection"),
            Ok(length) => {
                self.arrived.extend_from_slice(&piece[..length]);
                Ok(true)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the next message, which must be as `expected`; false when it is not whole yet.
    fn take(&mut self, expected: impl Fn(&[&[u8]]) -> bool) -> Result<bool> {
        let mut frames = Vec::with_capacity(4);
        let Some(end) = message(&self.arrived, &mut frames) else {
            return Ok(false);
        };
        ensure!(expected(&frames), "the agent's answer is another one");
        self.arrived.drain(..end);
        Ok(true)
    }

    /// Calls `ping("pong")`.
    fn ask(&mut self, sequence: u32) -> Result<()> {
        let mut header = b"\x85\xa4type\x01\xa4meth\xa4ping\xa4okey\xa0\xa3seq\xce".to_vec();
        header.extend_from_slice(&sequence.to_be_bytes());
        header.extend_from_slice(b"\xa3zip\xc2");
        let envelope =
            b"\x82\xa4meta\xc4\x00\xa4body\xc4\x14\x82\xa4args\x91\xa4pong\xa6kwargs\x80";
        let mut request = Vec::with_capacity(128);
        frame(&mut request, MORE, b"UPPER");
        frame(&mut request, MORE, &header);
        frame(&mut request, 0, envelope);
        Ok(self.stream.write_all(&request)?)
    }

    /// Calls and waits for the answer.
    fn call(&mut self, sequence: u32) -> Result<()> {
        self.ask(sequence)?;
        while !self.take(is_result)? {
            ensure!(self.receive()?, "no answer came in time");
        }
        Ok(())
    }
}

/// The result of a `ping("pong")`.
fn is_result(frames: &[&[u8]]) -> bool {
    let [tag, header, body] = frames else {
        return false;
    };
    let kind = position(header, b"\xa4type").and_then(|at| header.get(at));
    *tag == b"UPPER" && kind == Some(&RESULT) && position(body, b"\xa4pong").is_some()
}

/// The frames of the first message, and where it ends; nothing before it is whole. Commands are
/// passed over.
fn message<'b>(bytes: &'b [u8], frames: &mut Vec<&'b [u8]>) -> Option<usize> {
    let mut at = 0;
    loop {
        let (flags, size) = (*bytes.get(at)?, *bytes.get(at + 1)?);
        let (from, length) = match flags & LONG {
            0 => (at + 2, usize::from(size)),
            _ => {
                let size = bytes.get(at + 1..at + 9)?.try_into().ok()?;
                (at + 9, usize::try_from(u64::from_be_bytes(size)).ok()?)
            }
        };
        at = from.checked_add(length)?;
        let content = bytes.get(from..at)?;
        if flags & COMMAND == 0 {
            frames.push(content);
            if flags & MORE == 0 {
                return Some(at);
            }
        }
    }
}

/// Where `haystack` goes on behind the first `needle`.
fn position(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
        .map(|at| at + needle.len())
}

/// The greeting, and the command that ends the handshake.
fn hello(ready: &[u8]) -> Vec<u8> {
    let mut hello = vec![0_u8; 64];
    hello[0] = 0xff;
    hello[8] = 1;
    hello[9] = 0x7f;
    hello[10] = 3;
    hello[11] = 1;
    hello[12..16].copy_from_slice(b"NULL");
    frame(&mut hello, COMMAND, ready);
    hello
}

/// Answers what a [`Connection`] says, by the first bytes of each piece that arrives: it waits for
/// every answer, so a piece is a whole message.
fn bare(address: SocketAddr) -> Result<()> {
    let hello = hello(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER");
    let mut pong = Vec::new();
    frame(&mut pong, MORE, b"PONG");
    frame(&mut pong, MORE, b"");
    frame(&mut pong, 0, b"");
    let mut answer = Vec::new();
    frame(&mut answer, MORE, b"UPPER");
    frame(
        &mut answer,
        MORE,
        b"\x85\xa4type\x02\xa4meth\xa4ping\xa4okey\xa0\xa3seq\x00\xa3zip\xc2",
    );
    frame(
        &mut answer,
        0,
        b"\x82\xa4meta\xc4\x00\xa4body\xc4\x05\xa4pong",
    );
    const LISTENER: Token = Token(0);
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(64);
    let mut listener = mio::net::TcpListener::bind(address)?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    println!("{}", listener.local_addr()?.port());
    let mut peers: HashMap<Token, mio::net::TcpStream> = HashMap::new();
    let mut next = 1;
    loop {
        poll.poll(&mut events, None)?;
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    stream.set_nodelay(true)?;
                    let token = Token(next);
                    next += 1;
                    poll.registry()
                        .register(&mut stream, token, Interest::READABLE)?;
                    peers.insert(token, stream);
                }
                continue;
            }
            let Some(peer) = peers.get_mut(&event.token()) else {
                continue;
            };
            let mut piece = [0_u8; 4096];
            let said = match peer.read(&mut piece) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Ok(length) => piece.get(..length).unwrap_or_default(),
                Err(_) => &[],
            };
            let words: &[u8] = match said {
                [] => &[],
                [0xff, ..] => &hello,
                [_, 4, ..] => &pong,
                _ => &answer,
            };
            if words.is_empty() || peer.write_all(words).is_err() {
                peers.remove(&event.token());
            }
        }
    }
}

fn frame(out: &mut Vec<u8>, flags: u8, content: &[u8]) {
    // Everything sent here is short.
    let length = u8::try_from(content.len()).unwrap_or(u8::MAX);
    out.push(flags);
    out.push(length);
    out.extend_from_slice(content);
}

/// Calls over so many connections until the time is over; the duration of each call. One thread that
/// looks after all of them: one each would cost more than what they wait for.
fn calls(address: SocketAddr, connections: usize, until: Instant) -> Result<Vec<u128>> {
    let mut samples = Vec::new();
    let mut open = (0..connections)
        .map(|_| Connection::open(address))
        .collect::<Result<Vec<_>>>()?;
    if let [only] = open.as_mut_slice() {
        let mut sequence = 0;
        while Instant::now() < until {
            let from = Instant::now();
            only.call(sequence)?;
            samples.push(from.elapsed().as_micros());
            sequence = sequence.wrapping_add(1);
        }
        return Ok(samples);
    }
    let mut poll = Poll::new()?;
    let mut events = Events::with_capacity(connections.max(1));
    let mut asked = vec![Instant::now(); connections];
    for (place, connection) in open.iter_mut().enumerate() {
        connection.stream.set_nonblocking(true)?;
        let mut source = SourceFd(&connection.stream.as_raw_fd());
        poll.registry()
            .register(&mut source, Token(place), Interest::READABLE)?;
    }
    for (connection, asked) in open.iter_mut().zip(&mut asked) {
        *asked = Instant::now();
        connection.ask(0)?;
    }
    let mut sequence = 1;
    while Instant::now() < until {
        poll.poll(&mut events, Some(DEADLINE))?;
        ensure!(!events.is_empty(), "no answer came in time");
        for event in &events {
            let place = event.token().0;
            let (connection, asked) = (&mut open[place], &mut asked[place]);
            // A short read has emptied the socket, and an answer is short.
            if connection.receive()? && connection.take(is_result)? {
                samples.push(asked.elapsed().as_micros());
                *asked = Instant::now();
                connection.ask(sequence)?;
                sequence = sequence.wrapping_add(1);
            }
        }
    }
    Ok(samples)
}

fn report(samples: &[u128], took: Duration) {
    let listed: Vec<String> = samples.iter().map(u128::to_string).collect();
    println!(
        "{{\"count\": {}, \"seconds\": {:.6}, \"samples_us\": [{}]}}",
        samples.len(),
        took.as_secs_f64(),
        listed.join(", ")
    );
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let address = |text: &str| text.parse::<SocketAddr>().context("ADDRESS is host:port");
    let from = Instant::now();
    match words.as_slice() {
        [place, "calls", connections, seconds] => {
            let (place, until) = (
                address(place)?,
                from + Duration::from_secs_f64(seconds.parse()?),
            );
            let samples = calls(place, connections.parse()?, until)?;
            report(&samples, from.elapsed());
        }
        [place, "connects", count] => {
            let place = address(place)?;
            let mut samples = Vec::new();
            for _ in 0..count.parse::<u32>()? {
                let from = Instant::now();
                Connection::open(place)?.call(0)?;
                samples.push(from.elapsed().as_micros());
            }
            report(&samples, from.elapsed());
        }
        [place, "ready", seconds] => {
            let (place, until) = (
                address(place)?,
                from + Duration::from_secs_f64(seconds.parse()?),
            );
            while let Err(error) =
                Connection::open(place).and_then(|mut connection| connection.call(0))
            {
                ensure!(Instant::now() < until, "never answered: {error:#}");
                thread::sleep(Duration::from_millis(5));
            }
            report(&[from.elapsed().as_micros()], from.elapsed());
        }
        [place, "bare"] => bare(address(place)?)?,
        _ => bail!(
            "usage: rpc-load ADDRESS calls CONNECTIONS SECONDS | connects COUNT | ready SECONDS | bare"
        ),
    }
    Ok(())
}
