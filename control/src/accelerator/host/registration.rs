//! The service `Registration` of a kubelet: one method, so as much of HTTP/2 and gRPC as it takes.
//!
//! Why not the library that calls plugins: it refuses requests whose `:authority` is a path, and that
//! is what gRPC's C core sends over a unix socket (percent-encoded), and plugins built on older Go
//! libraries (plain). With one method there is nothing in a request's headers that is needed, so they
//! are not even decoded.
//!
//! In: a connection. Out: requests to a handler and its answers. Invariants: nothing a peer sends
//! makes it wait longer or keep more than the constants say; what it cannot read ends the connection.
//!
//! Sources: RFC 9113 (frames), RFC 7541 (header fields as literals), gRPC over HTTP/2.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tonic::{Code, Status};

use super::wire::RegisterRequest;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The largest frame that the protocol allows without being asked.
const FRAME: usize = 16_384;
/// The largest request, far below the window that needs no updates.
const REQUEST: usize = 32_768;
/// Requests under way on one connection.
const STREAMS: usize = 8;
/// How long a plugin may keep a connection; it makes one to register.
pub const CONNECTION: Duration = Duration::from_secs(30);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACKNOWLEDGE: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Serves one connection to its end.
///
/// # Errors
/// It ends before its time, or sends what cannot be read.
pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    handler: impl Fn(RegisterRequest) -> Result<(), Status>,
) -> io::Result<()> {
    let mut preface = [0; PREFACE.len()];
    stream.read_exact(&mut preface).await?;
    if preface != PREFACE {
        return Err(refused("it does not speak HTTP/2"));
    }
    write(&mut stream, SETTINGS, 0, 0, &[]).await?;
    let mut requests: HashMap<u32, Vec<u8>> = HashMap::new();
    loop {
        let Some((kind, flags, id, payload)) = read(&mut stream).await? else {
            return Ok(());
        };
        match kind {
            SETTINGS if flags & ACKNOWLEDGE == 0 => {
                write(&mut stream, SETTINGS, ACKNOWLEDGE, 0, &[]).await?;
            }
            PING if flags & ACKNOWLEDGE == 0 => {
                write(&mut stream, PING, ACKNOWLEDGE, 0, &payload).await?;
            }
            HEADERS if requests.len() >= STREAMS => {
                return Err(refused("it asks too much at once"));
            }
            HEADERS => {
                requests.insert(id, Vec::new());
            }
            DATA => {
                let body = unpadded(&payload, flags)?;
                if let Some(request) = requests.get_mut(&id) {
                    if request.len() + body.len() > REQUEST {
                        return Err(refused("its request is too large"));
                    }
                    request.extend_from_slice(body);
                }
            }
            RESET => {
                requests.remove(&id);
            }
            GOAWAY => return Ok(()),
            _ => {}
        }
        if matches!(kind, DATA | HEADERS)
            && flags & END_STREAM != 0
            && let Some(request) = requests.remove(&id)
        {
            let answer = message(&request).and_then(&handler);
            respond(&mut stream, id, answer).await?;
        }
    }
}

/// The next frame; none at the end of the connection.
async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Option<(u8, u8, u32, Vec<u8>)>> {
    let mut head = [0; 9];
    match stream.read_exact(&mut head).await {
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > FRAME {
        return Err(refused("its frame is too large"));
    }
    let id = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload).await?;
    Ok(Some((head[3], head[4], id, payload)))
}

async fn write<S: AsyncWrite + Unpin>(
    stream: &mut S,
    kind: u8,
    flags: u8,
    id: u32,
    payload: &[u8],
) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .unwrap_or(u32::MAX)
        .to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(id.to_be_bytes());
    frame.extend_from_slice(payload);
    stream.write_all(&frame).await
}

fn unpadded(payload: &[u8], flags: u8) -> io::Result<&[u8]> {
    if flags & PADDED == 0 {
        return Ok(payload);
    }
    let wrong = || refused("its padding is longer than its frame");
    let (padding, body) = payload.split_first().ok_or_else(wrong)?;
    let length = body.len().checked_sub(usize::from(*padding));
    Ok(&body[..length.ok_or_else(wrong)?])
}

/// The one message of a request: a byte for compression, four for its length.
fn message(request: &[u8]) -> Result<RegisterRequest, Status> {
    let Some(([compressed, length @ ..], body)) = request.split_first_chunk::<5>() else {
        return Err(Status::invalid_argument("the request has no message"));
    };
    if *compressed != 0 {
        return Err(Status::unimplemented("compressed messages are not read"));
    }
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    let body = body
        .get(..length)
        .ok_or_else(|| Status::invalid_argument("the message is cut off"))?;
    RegisterRequest::decode(body)
        .map_err(|err| Status::invalid_argument(format!("this is no RegisterRequest: {err}")))
}

async fn respond<S: AsyncWrite + Unpin>(
    stream: &mut S,
    id: u32,
    answer: Result<(), Status>,
) -> io::Result<()> {
    // `:status: 200` is entry 8 of the static table.
    let mut headers = vec![0x88];
    field(&mut headers, "content-type", "application/grpc");
    match answer {
        Ok(()) => {
            write(stream, HEADERS, END_HEADERS, id, &headers).await?;
            // `Empty` is a message without bytes.
            write(stream, DATA, 0, id, &[0; 5]).await?;
            let mut trailers = Vec::new();
            field(&mut trailers, "grpc-status", "0");
            write(stream, HEADERS, END_HEADERS | END_STREAM, id, &trailers).await
        }
        Err(status) => {
            let code: Code = status.code();
            field(&mut headers, "grpc-status", &i32::from(code).to_string());
            field(&mut headers, "grpc-message", &escaped(status.message()));
            write(stream, HEADERS, END_HEADERS | END_STREAM, id, &headers).await
        }
    }
}

/// A field as a literal that is not remembered (RFC 7541, 6.2.2).
fn field(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0);
    for text in [name, value] {
        let mut rest = text.len();
        // An integer with a prefix of seven bits (RFC 7541, 5.1).
        if rest < 127 {
            block.push(u8::try_from(rest).unwrap_or(0));
        } else {
            block.push(127);
            rest -= 127;
            while rest >= 128 {
                block.push(u8::try_from(rest % 128).unwrap_or(0) | 128);
                rest /= 128;
            }
            block.push(u8::try_from(rest).unwrap_or(0));
        }
        block.extend(text.bytes());
    }
}

/// A message as gRPC puts it into a header: percent-encoded but for plain characters.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes().take(1000) {
        match byte {
            b' '..=b'~' if byte != b'%' => escaped.push(char::from(byte)),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What is answered to these bytes, and how the connection ended.
    fn answered(sent: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let (mut client, server) = tokio::io::duplex(1 << 20);
            client.write_all(sent).await.unwrap();
            client.shutdown().await.unwrap();
            let ended = serve(server, |request| match request.version.as_str() {
                "v1beta1" => Ok(()),
                _ => Err(Status::invalid_argument("100 % wrong")),
            })
            .await;
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            (answer, ended)
        })
    }

    fn frame(kind: u8, flags: u8, id: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, id];
        frame.extend(payload);
        frame
    }

    fn request(version: &str) -> Vec<u8> {
        let message = RegisterRequest {
            version: version.to_owned(),
            ..RegisterRequest::default()
        }
        .encode_to_vec();
        let mut body = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
        body.extend(message);
        body
    }

    fn has(answer: &[u8], words: &str) -> bool {
        answer
            .windows(words.len())
            .any(|part| part == words.as_bytes())
    }

    #[test]
    fn a_registration_is_answered_whatever_its_headers_are() {
        for (version, told) in [("v1beta1", "grpc-status\x010"), ("v0", "grpc-status\x013")] {
            let mut sent = PREFACE.to_vec();
            sent.extend(frame(SETTINGS, 0, 0, &[]));
            sent.extend(frame(PING, 0, 0, b"12345678"));
            sent.extend(frame(HEADERS, 0, 1, b"\xff\xff not decoded"));
            sent.extend(frame(9, END_HEADERS, 1, b"nor is this"));
            // In two parts, the second with padding.
            let body = request(version);
            sent.extend(frame(DATA, 0, 1, &body[..3]));
            let mut padded = vec![2];
            padded.extend(&body[3..]);
            padded.extend([0, 0]);
            sent.extend(frame(DATA, PADDED | END_STREAM, 1, &padded));
            let (answer, ended) = answered(&sent);
            ended.unwrap();
            assert!(has(&answer, told) && has(&answer, "12345678"), "{answer:?}");
            assert_eq!(has(&answer, "100 %25 wrong"), version == "v0");
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let with = |frames: &[u8]| [PREFACE, frames].concat();
        for wrong in [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
            with(&frame(DATA, PADDED, 1, &[9, 0])),
            with(&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]),
            with(
                &(0..9)
                    .flat_map(|id| frame(HEADERS, 0, id, &[]))
                    .collect::<Vec<_>>(),
            ),
        ] {
            assert!(answered(&wrong).1.is_err());
        }
        let mut sent = with(&frame(HEADERS, END_HEADERS, 1, &[]));
        sent.extend(frame(DATA, END_STREAM, 1, &[0, 0, 0, 0, 9, 1]));
        let (answer, ended) = answered(&sent);
        ended.unwrap();
        assert!(has(&answer, "the message is cut off"));
    }

    proptest! {
        #[test]
        fn bytes_never_panic(sent in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = answered(&sent);
            let _ = answered(&[PREFACE, &sent[..]].concat());
        }
    }
}
