//! The least ZeroMQ peer that can misbehave: raw ZMTP 3.0 with NULL over a blocking socket.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
}

/// How long any one read or write may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The 64 bytes each side begins with, for the NULL mechanism.
#[must_use]
pub fn greeting() -> [u8; 64] {
    let mut greeting = [0; 64];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

impl Connection {
    /// Connects, greets and exchanges READY as a DEALER.
    pub fn open(address: SocketAddr) -> io::Result<Self> {
        let ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00";
        Self::greet(TcpStream::connect(address)?, ready)
    }

    /// The same as a ROUTER, on a connection that was accepted.
    pub fn accepted(stream: TcpStream) -> io::Result<Self> {
        Self::greet(stream, b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER")
    }

    fn greet(stream: TcpStream, ready: &[u8]) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut connection = Self { stream };
        connection.stream.write_all(&greeting())?;
        connection.stream.read_exact(&mut [0; 64])?;
        connection.write_frame(0x04, ready)?;
        let (flags, _) = connection.read_frame()?;
        if flags & 0x04 == 0 {
            return Err(io::Error::other("the peer did not send READY"));
        }
        Ok(connection)
    }

    /// Sends one message.
    pub fn send(&mut self, frames: &[&[u8]]) -> io::Result<()> {
        for (index, frame) in frames.iter().enumerate() {
            self.write_frame(u8::from(index + 1 < frames.len()), frame)?;
        }
        Ok(())
    }

    /// Receives one message.
    pub fn receive(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let (flags, body) = self.read_frame()?;
            if flags & 0x04 != 0 {
                continue;
            }
            frames.push(body);
            if flags & 0x01 == 0 {
                return Ok(frames);
            }
        }
    }

    /// A probe, and the check that it was answered.
    pub fn ping(&mut self) -> io::Result<()> {
        self.send(&[b"PING", b"", b""])?;
        let reply = self.receive()?;
        if reply.first().map(Vec::as_slice) == Some(b"PONG") {
            Ok(())
        } else {
            Err(io::Error::other(format!("not a PONG: {reply:?}")))
        }
    }

    /// The socket underneath.
    pub fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    fn write_frame(&mut self, flags: u8, body: &[u8]) -> io::Result<()> {
        let mut head = Vec::with_capacity(9);
        if let Ok(short) = u8::try_from(body.len()) {
            head.extend([flags, short]);
        } else {
            head.push(flags | 0x02);
            head.extend(
                u64::try_from(body.len())
                    .map_err(io::Error::other)?
                    .to_be_bytes(),
            );
        }
        self.stream.write_all(&head)?;
        self.stream.write_all(body)
    }

    fn read_frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut flags = [0];
        self.stream.read_exact(&mut flags)?;
        let length = if flags[0] & 0x02 == 0 {
            let mut length = [0];
            self.stream.read_exact(&mut length)?;
            u64::from(length[0])
        } else {
            let mut length = [0; 8];
            self.stream.read_exact(&mut length)?;
            u64::from_be_bytes(length)
        };
        let mut body = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.stream.read_exact(&mut body)?;
        Ok((flags[0], body))
    }
}
