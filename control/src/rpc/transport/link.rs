//! One ZeroMQ connection: the codec between a TCP stream and messages.
//!
//! In: a connected stream and who we are; out: the peer's messages, one after the other, from the
//! [`Reader`]; anybody may send through the [`Link`], whose writes go to the socket at once, on the
//! sender's own thread. Only the transport's thread gathers them ([`gather`]): it answers all that has
//! come, then writes all answers, then waits. A peer woken once finds many answers; woken for each,
//! it costs both sides more than the answers do. What a socket does not take waits in the link and
//! is written by the reader's task.
//!
//! Invariants: no more than [`SEND_BOUND`] bytes and one message wait to be sent; frames of two
//! messages never mix; an ended link holds no descriptor, whoever still holds the link.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use omq_proto::proto::{Connection, ConnectionConfig, Event};
use omq_proto::{Message, PeerPublicKey};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio_util::io::poll_read_buf;

use crate::kernel::zmtp;
use crate::rpc::frame::Frames;
use crate::rpc::keys::PublicKey;
use crate::rpc::service::Peer;

/// Bytes that may wait for the socket before a reply has to wait with its sender. A message begun
/// below the bound is taken whole.
const SEND_BOUND: usize = 256 * 1024;
/// Messages up to this many bytes are written from one buffer; a larger one is not copied.
const FLAT_MESSAGE: usize = 16 * 1024;
/// Pieces of one gathering write.
const WRITE_PIECES: usize = 32;
/// Bytes of a read: of a connection's first, and of one that sends much.
const READ_SIZES: (usize, usize) = (4 * 1024, 128 * 1024);

/// Bytes a peer may send before it has shaken hands. What it needs is less than a kibibyte; the
/// codec would gather a quarter of a mebibyte of each stranger.
const HANDSHAKE_BYTES: usize = 16 * 1024;

/// Messages of one connection after which what was answered is written and others get their turn. One
/// read may hold tens of thousands, and a peer that sends without end keeps the thread from ever
/// waiting.
const TURN: usize = 64;

/// Links with something to write after which the transport's thread does not gather on.
const GATHERED: usize = 64;

thread_local! {
    /// Links of this thread that have something to write; `None` where nobody gathers.
    static GATHER: RefCell<Option<Vec<Arc<Link>>>> = const { RefCell::new(None) };
}

/// From now on what is sent on this thread waits for [`write_gathered`].
pub(super) fn gather() {
    GATHER.set(Some(Vec::with_capacity(GATHERED)));
}

/// Writes what was sent on this thread since the last time. To be called before the thread waits.
pub(super) fn write_gathered() {
    // Nothing is sent while it is written: a write runs nobody's code.
    GATHER.with_borrow_mut(|links| {
        for link in links.iter_mut().flat_map(|links| links.drain(..)) {
            link.write();
        }
    });
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub(in crate::rpc) enum LinkError {
    #[error("closed by the other end")]
    Closed,
    #[error("closed by this end")]
    Ended,
    #[error("silent for longer than it had announced")]
    Silent,
    #[error("no greeting in time")]
    HandshakeTimeout,
    #[error("more than {HANDSHAKE_BYTES} bytes and no end of the handshake")]
    HandshakeTooLong,
    #[error("gave way to others that shake hands")]
    Displaced,
    #[error("{0}")]
    Socket(#[source] io::Error),
    #[error("{0}")]
    Protocol(#[source] omq_proto::Error),
}

/// What became of a message that was to be sent.
#[derive(Debug)]
pub(in crate::rpc) enum SendOutcome {
    Accepted,
    /// The connection is gone; the message is dropped, as ZeroMQ does.
    PeerGone,
    /// Too much is waiting already: the peer doesn't read.
    Full,
}

/// The sending end of a connection, shared by all who answer.
#[derive(Debug)]
pub(in crate::rpc) struct Link {
    peer: Peer,
    /// `None` once the connection has ended.
    outgoing: Mutex<Option<Outgoing>>,
    /// The reader's task.
    reader: AtomicWaker,
    /// Told when there is room again for what waits to be sent, and at the end.
    room: Notify,
}

#[derive(Debug)]
struct Outgoing {
    socket: OwnedWriteHalf,
    codec: Connection,
    /// Encoded messages in front of the codec's own output.
    flat: BytesMut,
    /// Whether the socket takes no more: the reader's task waits until it does.
    blocked: bool,
}

/// The receiving end of a connection; there is one. Dropping it ends the connection.
#[derive(Debug)]
pub(in crate::rpc) struct Reader {
    link: Arc<Link>,
    socket: ReadSide,
    messages: VecDeque<Message>,
    frames: Vec<Bytes>,
    /// Whether the codec takes no input before its own output has gone.
    choked: bool,
    /// Messages since others had their turn.
    turn: usize,
    /// How long the peer has said it may be silent.
    silence: Option<Duration>,
}

#[derive(Debug)]
struct ReadSide {
    socket: OwnedReadHalf,
    buffer: BytesMut,
    size: usize,
}

/// What the codec goes on with.
enum Wake {
    Input(Bytes),
    /// The output it waited for has gone.
    Unchoked,
}

/// Shakes hands on a connected stream. Wants a deadline around it.
pub(super) async fn open(
    stream: TcpStream,
    connection: u64,
    address: SocketAddr,
    config: ConnectionConfig,
) -> Result<Reader, LinkError> {
    let (read_half, write_half) = stream.into_split();
    let mut outgoing = Outgoing {
        socket: write_half,
        codec: Connection::new(config),
        flat: BytesMut::new(),
        blocked: false,
    };
    let mut socket = ReadSide {
        socket: read_half,
        buffer: BytesMut::new(),
        size: READ_SIZES.0,
    };
    let mut taken = 0;
    let properties = loop {
        if !outgoing.flush()? {
            let writable = outgoing.socket.writable().await;
            writable.map_err(LinkError::Socket)?;
            continue;
        }
        let shaken = outgoing.codec.poll_event();
        if let Some(Event::HandshakeSucceeded {
            peer_properties, ..
        }) = shaken
        {
            break peer_properties;
        }
        if taken > HANDSHAKE_BYTES {
            return Err(LinkError::HandshakeTooLong);
        }
        let input = poll_fn(|context| socket.poll_read(context)).await?;
        taken += input.len();
        if let Err(err) = outgoing.codec.handle_input(input) {
            // What it says to the peer, for instance that the key is refused, still goes out.
            outgoing.flush()?;
            return Err(LinkError::Protocol(err));
        }
    };
    let key = match properties.authentication.public_key {
        Some(PeerPublicKey::Curve(key)) => Some(PublicKey(key)),
        _ => None,
    };
    // The handshake's last bytes may have had a first message behind them.
    let mut messages = VecDeque::new();
    outgoing.codec.swap_messages(&mut messages);
    let choked = !outgoing.codec.accepts_input();
    let link = Link {
        peer: Peer {
            connection,
            address: Some(address),
            key,
        },
        outgoing: Mutex::new(Some(outgoing)),
        reader: AtomicWaker::new(),
        room: Notify::new(),
    };
    Ok(Reader {
        link: Arc::new(link),
        socket,
        messages,
        frames: Vec::new(),
        choked,
        turn: 0,
        silence: None,
    })
}

impl ReadSide {
    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<Result<Bytes, LinkError>> {
        self.buffer.reserve(self.size);
        let reading = poll_read_buf(Pin::new(&mut self.socket), context, &mut self.buffer);
        let count = ready!(reading).map_err(LinkError::Socket)?;
        if count == 0 {
            return Poll::Ready(Err(LinkError::Closed));
        }
        let (least, most) = READ_SIZES;
        if count >= self.size {
            self.size = most.min(self.size * 2);
        } else if count < self.size / 4 {
            self.size = least.max(self.size / 2);
        }
        Poll::Ready(Ok(self.buffer.split().freeze()))
    }
}

impl Reader {
    /// The sending end.
    pub(super) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// The frames of the next message. Writes what waits to be written meanwhile.
    pub(super) async fn receive(&mut self) -> Result<&[Bytes], LinkError> {
        // An idle connection keeps nothing of its last message.
        self.frames.clear();
        loop {
            if self.turn >= TURN {
                self.turn = 0;
                write_gathered();
                tokio::task::yield_now().await;
            }
            if let Some(message) = self.messages.pop_front() {
                let parts = (0..message.len()).filter_map(|index| message.part_bytes(index));
                self.frames.extend(parts);
                self.turn += 1;
                return Ok(&self.frames);
            }
            let silence = self.silence;
            let waking = poll_fn(|context| self.poll_wake(context));
            let wake = match silence {
                None => waking.await?,
                Some(silence) => tokio::time::timeout(silence, waking)
                    .await
                    .map_err(|_| LinkError::Silent)??,
            };
            self.go_on(wake)?;
        }
    }

    /// Waits until nothing waits to be written.
    pub(super) async fn drain(&mut self) -> Result<(), LinkError> {
        self.link.write();
        poll_fn(|context| match self.link.poll_flush(context) {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(err) => Poll::Ready(Err(err)),
        })
        .await
    }

    fn poll_wake(&mut self, context: &mut Context<'_>) -> Poll<Result<Wake, LinkError>> {
        self.link.reader.register(context.waker());
        let clear = self.link.poll_flush(context)?;
        if !self.choked {
            return self.socket.poll_read(context).map_ok(Wake::Input);
        }
        if clear {
            return Poll::Ready(Ok(Wake::Unchoked));
        }
        Poll::Pending
    }

    fn go_on(&mut self, wake: Wake) -> Result<(), LinkError> {
        let mut guard = self.link.lock();
        let outgoing = guard.as_mut().ok_or(LinkError::Ended)?;
        let codec = &mut outgoing.codec;
        let outcome = match wake {
            Wake::Input(bytes) => codec.handle_input(bytes),
            Wake::Unchoked => codec.resume_input(),
        };
        codec.swap_messages(&mut self.messages);
        // Commands that no ROUTER or DEALER has a use for.
        while codec.poll_event().is_some() {}
        self.choked = !codec.accepts_input();
        self.silence = codec.peer_heartbeat_ttl();
        // Answers to heartbeats, or the reason of the end.
        self.link.flush(outgoing)?;
        outcome.map_err(LinkError::Protocol)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.link.end();
    }
}

impl Link {
    /// Who is at the other end.
    pub(in crate::rpc) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Waits for the connection's end.
    pub(in crate::rpc) async fn ended(&self) {
        loop {
            // Before the look: an end in between is not missed.
            let told = self.room.notified();
            if self.lock().is_none() {
                return;
            }
            told.await;
        }
    }

    /// Sends a message without waiting.
    pub(in crate::rpc) fn try_send(self: &Arc<Self>, frames: &Frames) -> SendOutcome {
        let first = {
            let mut guard = self.lock();
            let Some(outgoing) = guard.as_mut() else {
                return SendOutcome::PeerGone;
            };
            let waiting = outgoing.waiting();
            if waiting > SEND_BOUND {
                return SendOutcome::Full;
            }
            if let Err(err) = outgoing.push(frames) {
                drop(guard);
                self.broken(&err);
                return SendOutcome::PeerGone;
            }
            waiting == 0
        };
        let gathered = GATHER.with_borrow_mut(|links| {
            let Some(links) = links else {
                return None;
            };
            // What waits already is on this list, or has a socket that takes no more.
            if first {
                links.push(self.clone());
            }
            Some(links.len())
        });
        match gathered {
            None => return self.write(),
            Some(GATHERED..) => write_gathered(),
            Some(_) => {}
        }
        SendOutcome::Accepted
    }

    /// Writes what waits, as far as the socket takes it.
    fn write(&self) -> SendOutcome {
        let written = match self.lock().as_mut() {
            Some(outgoing) => self.flush(outgoing),
            None => return SendOutcome::PeerGone,
        };
        match written {
            Ok(true) => {}
            // The reader's task writes the rest.
            Ok(false) => self.reader.wake(),
            Err(err) => {
                self.broken(&err);
                return SendOutcome::PeerGone;
            }
        }
        SendOutcome::Accepted
    }

    fn broken(&self, err: &LinkError) {
        tracing::trace!(peer = %self.peer, %err, "a connection ended while it was written to");
        self.end();
    }

    /// Sends a message, waiting until there is room for it.
    pub(in crate::rpc) async fn send(
        self: &Arc<Self>,
        frames: &Frames,
        deadline: Duration,
    ) -> SendOutcome {
        let sending = async {
            loop {
                let mut room = pin!(self.room.notified());
                // From here on no notice is missed.
                room.as_mut().enable();
                match self.try_send(frames) {
                    SendOutcome::Full => room.await,
                    sent => return sent,
                }
            }
        };
        tokio::time::timeout(deadline, sending)
            .await
            .unwrap_or(SendOutcome::Full)
    }

    /// Ends the connection; what still waits to be written is lost.
    pub(in crate::rpc) fn end(&self) {
        if let Some(outgoing) = self.lock().take() {
            // The descriptor is closed with the reader's half, without a word to the peer before.
            outgoing.socket.forget();
            self.reader.wake();
            self.room.notify_waiters();
        }
    }

    /// Goes on writing where the socket took no more, and tells whether it took all; else the
    /// reader's task is woken when it takes more.
    fn poll_flush(&self, context: &mut Context<'_>) -> Result<bool, LinkError> {
        let mut guard = self.lock();
        let outgoing = guard.as_mut().ok_or(LinkError::Ended)?;
        if !outgoing.blocked {
            return Ok(true);
        }
        loop {
            if self.flush(outgoing)? {
                return Ok(true);
            }
            match outgoing.socket.as_ref().poll_write_ready(context) {
                Poll::Ready(ready) => ready.map_err(LinkError::Socket)?,
                Poll::Pending => return Ok(false),
            }
        }
    }

    /// [`Outgoing::flush`], and tells those who wait for room when there is some again.
    fn flush(&self, outgoing: &mut Outgoing) -> Result<bool, LinkError> {
        let full = outgoing.waiting() > SEND_BOUND;
        let clear = outgoing.flush()?;
        if full && outgoing.waiting() <= SEND_BOUND {
            self.room.notify_waiters();
        }
        Ok(clear)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Outgoing>> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outgoing {
    /// Bytes that wait to be written.
    fn waiting(&self) -> usize {
        self.flat.len() + self.codec.pending_transmit_size()
    }

    fn push(&mut self, frames: &Frames) -> Result<(), LinkError> {
        // What is in the codec already goes first.
        let flat = frames.iter().map(Bytes::len).sum::<usize>() <= FLAT_MESSAGE
            && !self.codec.has_frame_transform()
            && !self.codec.has_pending_transmit();
        if !flat {
            let message = Message::multipart(frames.clone());
            return self
                .codec
                .send_message(&message)
                .map_err(LinkError::Protocol);
        }
        for (place, frame) in frames.iter().enumerate() {
            zmtp::put_frame(&mut self.flat, place + 1 < frames.len(), frame);
        }
        Ok(())
    }

    /// Writes until nothing waits (true) or the socket takes no more.
    fn flush(&mut self) -> Result<bool, LinkError> {
        while self.waiting() > 0 {
            let written = if self.flat.has_remaining() {
                self.socket.try_write(&self.flat)
            } else {
                let pieces = self.codec.transmit_chunks_capped(WRITE_PIECES);
                self.socket.try_write_vectored(&pieces)
            };
            match written {
                Ok(0) => return Err(LinkError::Closed),
                Ok(count) if self.flat.has_remaining() => self.flat.advance(count),
                Ok(count) => self.codec.advance_transmit(count),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    self.blocked = true;
                    return Ok(false);
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(LinkError::Socket(err)),
            }
        }
        self.blocked = false;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use omq_proto::SocketType;
    use omq_proto::proto::Role;
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (Reader, Reader) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let end = async |stream: TcpStream, role, kind| {
            let config = ConnectionConfig::new(role, kind);
            open(stream, 0, address, config).await.unwrap()
        };
        let accepted = async {
            let (stream, _) = listener.accept().await.unwrap();
            end(stream, Role::Server, SocketType::Router).await
        };
        let connected = async {
            let stream = TcpStream::connect(address).await.unwrap();
            end(stream, Role::Client, SocketType::Dealer).await
        };
        tokio::join!(accepted, connected)
    }

    /// Nobody but who empties the queue knows that there is room in it again.
    #[tokio::test]
    async fn who_waits_for_room_is_told_when_a_socket_takes_all_at_once() {
        let (own, mut peer) = pair().await;
        let frames = |size: usize| -> Frames { [0, 0, size].map(|size| vec![0; size].into()) };
        gather();
        let outcome = own.link().try_send(&frames(SEND_BOUND + 1));
        assert!(matches!(outcome, SendOutcome::Accepted), "{outcome:?}");
        let small = frames(1);
        let mut waits = pin!(own.link().send(&small, Duration::from_secs(30)));
        assert!(futures_util::poll!(&mut waits).is_pending());
        // The reader's task, which writes the rest of what a socket does not take at once, sleeps.
        let written = async {
            own.link().write();
            while own.link().lock().as_ref().unwrap().waiting() > 0 {
                tokio::task::yield_now().await;
                own.link().write();
            }
        };
        let (read, ()) = tokio::join!(async { peer.receive().await.map(<[Bytes]>::len) }, written);
        assert_eq!(read.unwrap(), 3);
        let sent = futures_util::poll!(&mut waits);
        assert!(
            matches!(sent, Poll::Ready(SendOutcome::Accepted)),
            "{sent:?}"
        );
    }
}
