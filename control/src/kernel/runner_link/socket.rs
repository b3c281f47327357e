//! The two connections to one runner.
//!
//! In: the container's address. Out: two-frame messages. Each connection is opened anew by its task
//! when it ends. Invariant: one receiving connection per container at a time, since a second one would
//! take every other message.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use rustix::net::sockopt;
use tokio::io::{AsyncReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::frame::FRAME_LIMIT;
use crate::kernel::zmtp::{self, ReadLimits, ZmtpError};

/// A starting container's port may not exist yet, or a proxy in front of it may accept and say nothing.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// A message that the runner's host does not acknowledge for this long ends the connection.
const UNACKNOWLEDGED_MS: u32 = 30_000;
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Every kernel has one for as long as it lives. It is for heads and short frames: what is longer goes past
/// it, once it is empty.
const READ_BUFFER: usize = 8 * 1024;
/// Messages have exactly two frames; a third one is noticed, not stored. Media is JSON and may not be
/// cut in the middle, so more than the 10 MiB of console output is let through to be judged later.
const LIMITS: ReadLimits = ReadLimits {
    frame: FRAME_LIMIT,
    frames: 2,
    cut: true,
};

/// Why a connection could not be opened or ended.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The port cannot be reached.
    #[error("the runner's port {0} cannot be reached")]
    Connect(SocketAddr, #[source] io::Error),
    /// Nothing was answered in time.
    #[error("the runner's port {0} does not answer")]
    Silent(SocketAddr),
    /// The connection ended or the peer broke the protocol.
    #[error("the connection to the runner ended")]
    Broken(#[from] ZmtpError),
}

async fn open(ip: IpAddr, port: u16, ours: &str, theirs: &str) -> Result<TcpStream, SocketError> {
    let address = SocketAddr::new(ip, port);
    let connected = async {
        let mut stream = TcpStream::connect(address)
            .await
            .map_err(|err| SocketError::Connect(address, err))?;
        tune(&stream).map_err(|err| SocketError::Connect(address, err))?;
        zmtp::handshake(&mut stream, ours, &[theirs]).await?;
        Ok(stream)
    };
    tokio::time::timeout(OPEN_LIMIT, connected)
        .await
        .unwrap_or(Err(SocketError::Silent(address)))
}

/// A container that vanished without a word is noticed by the kernel's keep-alive.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE)?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, UNACKNOWLEDGED_MS)?;
    Ok(())
}

/// The sending connection.
#[derive(Debug)]
pub struct Sender {
    reader: OwnedReadHalf,
    writer: OwnedWriteHalf,
}

impl Sender {
    /// Connects to the runner's input port.
    pub async fn connect(ip: IpAddr, port: u16) -> Result<Self, SocketError> {
        let (reader, writer) = open(ip, port, "PUSH", "PULL").await?.into_split();
        Ok(Self { reader, writer })
    }

    /// Sends one message.
    pub async fn send(&mut self, kind: &str, payload: &[u8]) -> Result<(), SocketError> {
        Ok(zmtp::write_message(&mut self.writer, &[kind.as_bytes(), payload]).await?)
    }

    /// Returns when the peer closed the connection: nothing else is read from it. May be dropped.
    pub async fn ended(&mut self) {
        let mut ignored = [0u8; 256];
        while matches!(self.reader.read(&mut ignored).await, Ok(length) if length > 0) {}
    }
}

/// The receiving connection.
#[derive(Debug)]
pub struct Receiver {
    reader: BufReader<OwnedReadHalf>,
    /// Closing it would tell the runner that we are gone.
    _writer: OwnedWriteHalf,
}

impl Receiver {
    /// Connects to the runner's output port.
    pub async fn connect(ip: IpAddr, port: u16) -> Result<Self, SocketError> {
        let (reader, writer) = open(ip, port, "PULL", "PUSH").await?.into_split();
        Ok(Self {
            reader: BufReader::with_capacity(READ_BUFFER, reader),
            _writer: writer,
        })
    }

    /// The next message: its two frames, or `None` when it had another number of frames.
    pub async fn receive(&mut self) -> Result<Option<(Bytes, Bytes)>, SocketError> {
        let (frames, count) = zmtp::read_message(&mut self.reader, &LIMITS).await?;
        match <[Bytes; 2]>::try_from(frames) {
            Ok([kind, payload]) if count == 2 => Ok(Some((kind, payload))),
            _ => Ok(None),
        }
    }
}
