//! The server in the container: gives back what it gets.
//!
//! In: an address. Out: every byte to whom it came from. One thread, one buffer, so that its own
//! cost per request is small and the same for every peer. Invariant: it reads nothing more from a
//! client while an answer to it waits for room.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;

use anyhow::{Context, Result};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

const LISTENER: Token = Token(usize::MAX);
const EVENTS: usize = 256;
const BUFFER_BYTES: usize = 64 * 1024;

struct Client {
    stream: TcpStream,
    waiting: Vec<u8>,
}

/// Serves until the process is ended.
///
/// # Errors
/// The address is taken, or epoll fails.
pub fn serve(address: SocketAddr) -> Result<()> {
    let mut listener =
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let mut poll = Poll::new()?;
    poll.registry()
        .register(&mut listener, LISTENER, Interest::READABLE)?;
    println!("ready");
    let mut events = Events::with_capacity(EVENTS);
    let mut clients: Vec<Option<Client>> = Vec::new();
    let mut free: Vec<usize> = Vec::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match poll.poll(&mut events, None) {
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            other => other?,
        }
        let mut ended = Vec::new();
        for event in &events {
            if event.token() == LISTENER {
                while let Ok((mut stream, _)) = listener.accept() {
                    let _ = stream.set_nodelay(true);
                    let index = free.pop().unwrap_or_else(|| {
                        clients.push(None);
                        clients.len() - 1
                    });
                    let interest = Interest::READABLE | Interest::WRITABLE;
                    if poll
                        .registry()
                        .register(&mut stream, Token(index), interest)
                        .is_err()
                    {
                        free.push(index);
                        continue;
                    }
                    clients[index] = Some(Client {
                        stream,
                        waiting: Vec::new(),
                    });
                }
            } else if let Some(Some(client)) = clients.get_mut(event.token().0)
                && !answer(client, &mut buffer)
            {
                clients[event.token().0] = None;
                ended.push(event.token().0);
            }
        }
        // Only now, so that an event of this batch can't meet a stranger.
        free.append(&mut ended);
    }
}

/// Answers as far as it goes. False when the client has ended.
fn answer(client: &mut Client, buffer: &mut [u8]) -> bool {
    loop {
        while !client.waiting.is_empty() {
            match client.stream.write(&client.waiting) {
                Ok(sent) => drop(client.waiting.drain(..sent)),
                Err(err) if err.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
        // An exchange of one message leaves no capacity behind.
        client.waiting = Vec::new();
        let read = match client.stream.read(buffer) {
            Ok(0) => return false,
            Ok(read) => read,
            Err(err) if err.kind() == ErrorKind::WouldBlock => return true,
            Err(err) if err.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return false,
        };
        let sent = match client.stream.write(&buffer[..read]) {
            Ok(sent) => sent,
            Err(err) if err.kind() == ErrorKind::WouldBlock => 0,
            Err(_) => return false,
        };
        client.waiting.extend_from_slice(&buffer[sent..read]);
        if read < buffer.len() && client.waiting.is_empty() {
            return true;
        }
    }
}
