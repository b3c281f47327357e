//! The little of ZMTP 3.0 (NULL mechanism) that talking to containers needs.
//!
//! In: a connected byte stream. Out: whole messages both ways. Used towards the runner (PUSH, PULL) and
//! for the agent socket (REP); the RPC transport with its authentication uses a library instead. The
//! reason is control over what a container can make us hold: a frame longer than asked for is read
//! past, not stored (docs/adr/0004-zmtp-towards-containers.md).
//!
//! Invariant: whatever the peer sends, memory stays below `ReadLimits`, and no frame makes us panic.
//! Source: RFC 23/ZMTP (<https://rfc.zeromq.org/spec/23/>).

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const GREETING_SIZE: usize = 64;
const MECHANISM: &[u8; 4] = b"NULL";
const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;
/// A command longer than this is not one we know.
const COMMAND_LIMIT: u64 = 4096;
/// Read-ahead while skipping.
const SKIP_CHUNK: usize = 64 * 1024;

/// Why a connection cannot be used (any longer).
#[derive(Debug, thiserror::Error)]
pub enum ZmtpError {
    /// The stream ended or failed.
    #[error("the connection failed")]
    Stream(#[source] io::Error),
    /// The peer does not speak ZMTP 3 with the NULL mechanism.
    #[error("the peer does not speak ZMTP 3 without authentication")]
    Greeting,
    /// The peer's handshake is not one.
    #[error("the peer's handshake is malformed")]
    Handshake,
    /// The peer refused us.
    #[error("the peer refused the connection")]
    Refused,
    /// The peer's socket is of a type that does not fit ours.
    #[error("the peer's socket is of another type than expected")]
    SocketType,
    /// A frame breaks the protocol.
    #[error("the peer sent a malformed frame")]
    Frame,
    /// A message is larger than allowed and must not be cut.
    #[error("the peer sent a message that is too large")]
    TooLarge,
}

impl From<io::Error> for ZmtpError {
    fn from(err: io::Error) -> Self {
        ZmtpError::Stream(err)
    }
}

/// What one message may occupy.
#[derive(Clone, Copy, Debug)]
pub struct ReadLimits {
    /// Bytes kept of a frame.
    pub frame: usize,
    /// Frames kept of a message.
    pub frames: usize,
    /// Whether what is beyond is read past (true) or ends the connection (false).
    pub cut: bool,
}

/// Greets the peer and exchanges socket types; `ours` is a name like `PUSH`, `theirs` what it must say.
///
/// # Errors
/// The connection ends, or the peer speaks something else.
pub async fn handshake<S>(stream: &mut S, ours: &str, theirs: &[&str]) -> Result<(), ZmtpError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut greeting = [0u8; GREETING_SIZE];
    greeting[0] = 0xff;
    greeting[9] = 0x7f;
    greeting[10] = 3;
    greeting[12..12 + MECHANISM.len()].copy_from_slice(MECHANISM);
    stream.write_all(&greeting).await?;
    stream.flush().await?;
    let mut peer = [0u8; GREETING_SIZE];
    // Older peers wait after the first bytes, so these are judged first.
    stream.read_exact(&mut peer[..11]).await?;
    if peer[0] != 0xff || peer[9] & 1 == 0 || peer[10] < 3 {
        return Err(ZmtpError::Greeting);
    }
    stream.read_exact(&mut peer[11..]).await?;
    let mechanism = &peer[12..32];
    if !mechanism.starts_with(MECHANISM)
        || mechanism[MECHANISM.len()..].iter().any(|byte| *byte != 0)
    {
        return Err(ZmtpError::Greeting);
    }
    stream.write_all(&ready(ours)).await?;
    stream.flush().await?;
    let flags = stream.read_u8().await?;
    if flags & COMMAND == 0 || flags & MORE != 0 {
        return Err(ZmtpError::Handshake);
    }
    let size = frame_size(stream, flags).await?;
    if size > COMMAND_LIMIT {
        return Err(ZmtpError::Handshake);
    }
    let mut body = vec![0; usize::try_from(size).map_err(|_| ZmtpError::Handshake)?];
    stream.read_exact(&mut body).await?;
    if body.starts_with(b"\x05ERROR") {
        return Err(ZmtpError::Refused);
    }
    let properties = body
        .strip_prefix(b"\x05READY")
        .ok_or(ZmtpError::Handshake)?;
    let socket_type = socket_type(properties).ok_or(ZmtpError::Handshake)?;
    if theirs.iter().any(|name| name.as_bytes() == socket_type) {
        Ok(())
    } else {
        Err(ZmtpError::SocketType)
    }
}

fn ready(socket_type: &str) -> Bytes {
    let mut body = BytesMut::new();
    body.put_slice(b"\x05READY\x0bSocket-Type");
    body.put_u32(u32::try_from(socket_type.len()).expect("a socket type has a few letters"));
    body.put_slice(socket_type.as_bytes());
    let mut frame = BytesMut::new();
    frame.put_u8(COMMAND);
    frame.put_u8(u8::try_from(body.len()).expect("one short property"));
    frame.put_slice(&body);
    frame.freeze()
}

fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    loop {
        let (&name_length, rest) = properties.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(name_length))?;
        let (value_length, rest) = rest.split_first_chunk::<4>()?;
        let (value, rest) =
            rest.split_at_checked(usize::try_from(u32::from_be_bytes(*value_length)).ok()?)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
}

async fn frame_size<R: AsyncRead + Unpin>(reader: &mut R, flags: u8) -> Result<u64, ZmtpError> {
    if flags & LONG != 0 {
        Ok(reader.read_u64().await?)
    } else {
        Ok(u64::from(reader.read_u8().await?))
    }
}

/// Reads one message: its frames, and how many it had. Not cancel safe: a dropped read loses its place.
///
/// # Errors
/// The connection ends, or the peer breaks the protocol or a bound.
pub async fn read_message<R>(
    reader: &mut R,
    limits: &ReadLimits,
) -> Result<(Vec<Bytes>, usize), ZmtpError>
where
    R: AsyncRead + Unpin,
{
    let mut frames = Vec::new();
    let mut count = 0usize;
    loop {
        let flags = reader.read_u8().await?;
        if flags & !(MORE | LONG | COMMAND) != 0 {
            return Err(ZmtpError::Frame);
        }
        let size = frame_size(reader, flags).await?;
        if flags & COMMAND != 0 {
            if flags & MORE != 0 || size > COMMAND_LIMIT || count > 0 {
                return Err(ZmtpError::Frame);
            }
            skip(reader, size).await?;
            continue;
        }
        let keep = usize::try_from(size)
            .unwrap_or(usize::MAX)
            .min(limits.frame);
        let beyond = size - keep as u64;
        let surplus = count >= limits.frames;
        if !limits.cut && (beyond > 0 || surplus) {
            return Err(ZmtpError::TooLarge);
        }
        if surplus {
            skip(reader, size).await?;
        } else {
            frames.push(take(reader, keep).await?);
            skip(reader, beyond).await?;
        }
        count = count.saturating_add(1);
        if flags & MORE == 0 {
            return Ok((frames, count));
        }
    }
}

/// Grows with what really arrives, not with what the peer announces.
async fn take<R: AsyncRead + Unpin>(reader: &mut R, length: usize) -> Result<Bytes, ZmtpError> {
    let mut kept = BytesMut::with_capacity(length.min(SKIP_CHUNK));
    let mut limited = reader.take(length as u64);
    while kept.len() < length {
        if limited.read_buf(&mut kept).await? == 0 {
            return Err(ZmtpError::Stream(io::ErrorKind::UnexpectedEof.into()));
        }
    }
    Ok(kept.freeze())
}

async fn skip<R: AsyncRead + Unpin>(reader: &mut R, length: u64) -> Result<(), ZmtpError> {
    if length == 0 {
        return Ok(());
    }
    let skipped = tokio::io::copy(&mut reader.take(length), &mut tokio::io::sink()).await?;
    if skipped == length {
        Ok(())
    } else {
        Err(ZmtpError::Stream(io::ErrorKind::UnexpectedEof.into()))
    }
}

/// Writes one message.
///
/// # Errors
/// The connection ends.
pub async fn write_message<W>(writer: &mut W, frames: &[&[u8]]) -> Result<(), ZmtpError>
where
    W: AsyncWrite + Unpin,
{
    let last = frames.len().saturating_sub(1);
    for (position, frame) in frames.iter().enumerate() {
        let mut piece = BytesMut::new();
        if frame.len() <= SKIP_CHUNK {
            put_frame(&mut piece, position < last, frame);
            writer.write_all(&piece).await?;
        } else {
            put_head(&mut piece, position < last, frame.len());
            writer.write_all(&piece).await?;
            writer.write_all(frame).await?;
        }
    }
    writer.flush().await?;
    Ok(())
}

/// Appends one frame of a message.
pub(crate) fn put_frame(out: &mut BytesMut, more: bool, frame: &[u8]) {
    put_head(out, more, frame.len());
    out.put_slice(frame);
}

fn put_head(out: &mut BytesMut, more: bool, length: usize) {
    let more = if more { MORE } else { 0 };
    match u8::try_from(length) {
        Ok(length) => {
            out.put_u8(more);
            out.put_u8(length);
        }
        Err(_) => {
            out.put_u8(more | LONG);
            out.put_u64(length as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: ReadLimits = ReadLimits {
        frame: 1000,
        frames: 2,
        cut: true,
    };

    async fn read(bytes: &[u8], limits: &ReadLimits) -> Result<(Vec<Bytes>, usize), ZmtpError> {
        read_message(&mut &bytes[..], limits).await
    }

    #[tokio::test]
    async fn both_ends_of_a_pipe_understand_each_other() {
        let (mut here, mut there) = tokio::io::duplex(256);
        let (ours, theirs) = tokio::join!(
            handshake(&mut here, "PUSH", &["PULL"]),
            handshake(&mut there, "PULL", &["PUSH"])
        );
        ours.expect("pushing end");
        theirs.expect("pulling end");
        let long = vec![b'x'; 700];
        let write = async {
            write_message(&mut here, &[b"stdout", &long])
                .await
                .expect("written");
            write_message(&mut here, &[b""]).await.expect("written");
        };
        let ((), first) = tokio::join!(write, read_message(&mut there, &LIMITS));
        let (frames, count) = first.expect("message");
        assert_eq!(
            (frames[0].as_ref(), frames[1].as_ref(), count),
            (&b"stdout"[..], &long[..], 2)
        );
        let (frames, count) = read_message(&mut there, &LIMITS).await.expect("message");
        assert_eq!((frames.len(), count), (1, 1));
    }

    #[tokio::test]
    async fn sockets_that_do_not_fit_are_refused() {
        let (mut here, mut there) = tokio::io::duplex(256);
        let (ours, _) = tokio::join!(
            handshake(&mut here, "REP", &["REQ", "DEALER"]),
            handshake(&mut there, "PUSH", &["PULL"])
        );
        assert!(matches!(ours, Err(ZmtpError::SocketType)));
        let (mut here, mut there) = tokio::io::duplex(256);
        there
            .write_all(b"GET / HTTP/1.1\r\n\r\n")
            .await
            .expect("written");
        assert!(matches!(
            handshake(&mut here, "REP", &["REQ"]).await,
            Err(ZmtpError::Greeting)
        ));
    }

    #[tokio::test]
    async fn what_is_beyond_the_limits_is_read_past_or_refused() {
        let mut wire = Vec::new();
        let big = vec![b'y'; 5000];
        write_message(&mut wire, &[b"a", &big, b"c", b"d"])
            .await
            .expect("written");
        write_message(&mut wire, &[b"next"]).await.expect("written");
        let mut rest = &wire[..];
        let (frames, count) = read_message(&mut rest, &LIMITS).await.expect("message");
        assert_eq!((frames.len(), frames[1].len(), count), (2, 1000, 4));
        let (frames, _) = read_message(&mut rest, &LIMITS).await.expect("message");
        assert_eq!(frames[0].as_ref(), b"next");
        let strict = ReadLimits {
            cut: false,
            ..LIMITS
        };
        assert!(matches!(
            read(&wire, &strict).await,
            Err(ZmtpError::TooLarge)
        ));
        // An announced size is not believed: nothing is reserved for it.
        let liar = [LONG, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        assert!(matches!(
            read(&liar, &LIMITS).await,
            Err(ZmtpError::Stream(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
            runtime.block_on(async {
                let mut rest = &bytes[..];
                while let Ok((frames, _)) = read_message(&mut rest, &LIMITS).await {
                    assert!(frames.iter().all(|frame| frame.len() <= LIMITS.frame));
                }
                let (mut here, mut there) = tokio::io::duplex(1024);
                there.write_all(&bytes).await.expect("room");
                there.shutdown().await.expect("closed");
                let _outcome = handshake(&mut here, "REP", &["REQ"]).await;
            });
        }
    }
}
