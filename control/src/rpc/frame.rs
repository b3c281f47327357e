//! Callosum's framing: tags, header and envelope.
//!
//! In: the frames of one ZeroMQ message without the peer identity; out: what the message is, and
//! the frames of replies. Invariant: order key and sequence go back exactly as they came, because
//! the caller compares them by kind and value.

use bytes::Bytes;

use super::failure::Failure;
use super::msgpack::{self, DecodeError, DecodeLimits, EncodeError, Writer};
use super::value::Value;
use crate::causes::chain;

/// Tag of a connection probe.
pub const PING: &[u8] = b"PING";
/// Tag of the answer to a probe.
pub const PONG: &[u8] = b"PONG";
/// Last frame of a probe that asks whether bai-agent answers. The Python agent echoes it, like any other.
pub const WHO_ANSWERS: &[u8] = b"bai-agent?";
/// Last frame of the answer to that probe alone.
pub const BAI_AGENT: &[u8] = b"bai-agent!";
/// Tag of an RPC message.
pub const UPPER: &[u8] = b"UPPER";

/// Longest header frame that is looked at, in bytes. Real ones are about 60.
pub const MAX_HEADER_BYTES: usize = 4096;

/// Bytes of header and envelope beside method, meta and body, with room for order keys.
const FRAMES_OVERHEAD: usize = 128;

const HEADER_LIMITS: DecodeLimits = DecodeLimits {
    depth: 4,
    values: 64,
};
/// The envelope is a map of two; extra keys are tolerated.
const ENVELOPE_LIMITS: DecodeLimits = DecodeLimits {
    depth: 4,
    values: 64,
};

/// The three frames of one message.
pub type Frames = [Bytes; 3];

/// What a message is, by its tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A probe with two frames to be echoed.
    Ping(Bytes, Bytes),
    /// The answer to a probe, with its last frame.
    Pong(Bytes),
    /// An RPC message: header and envelope, undecoded.
    Upper(Bytes, Bytes),
    /// Anything else, and messages of fewer than three frames.
    Other,
}

impl Message {
    /// Tells the message by its last three frames; what stands before them is dropped, like the
    /// original does.
    #[must_use]
    pub fn read(frames: &[Bytes]) -> Self {
        let [.., tag, second, third] = frames else {
            return match frames {
                [.., tag] if tag.as_ref() == PONG => Self::Pong(Bytes::new()),
                _ => Self::Other,
            };
        };
        let (second, third) = (second.clone(), third.clone());
        match tag.as_ref() {
            PING => Self::Ping(second, third),
            PONG => Self::Pong(third),
            UPPER => Self::Upper(second, third),
            _ => Self::Other,
        }
    }
}

/// Kind of an RPC message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never used on the wire.
    Null,
    /// A call.
    Function,
    /// Its value.
    Result,
    /// The handler raised an exception.
    Failure,
    /// The RPC layer itself failed.
    Error,
    /// The caller no longer waits.
    Cancel,
    /// The handler was cancelled.
    Cancelled,
}

const KINDS: [Kind; 7] = [
    Kind::Null,
    Kind::Function,
    Kind::Result,
    Kind::Failure,
    Kind::Error,
    Kind::Cancel,
    Kind::Cancelled,
];

impl Kind {
    fn code(self) -> i64 {
        match self {
            Self::Null => 0,
            Self::Function => 1,
            Self::Result => 2,
            Self::Failure => 3,
            Self::Error => 4,
            Self::Cancel => 5,
            Self::Cancelled => 6,
        }
    }
}

/// Header of an RPC message.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// Kind of the message.
    pub kind: Kind,
    /// Method name.
    pub method: String,
    /// Order key, kept as it came: str, bin or nil.
    pub order_key: Value,
    /// Client sequence number, kept as it came.
    pub sequence: Value,
    /// Whether the envelope is compressed; nobody compresses.
    pub zipped: bool,
}

/// Why a header can't be understood; without one there is nobody to answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Longer than [`MAX_HEADER_BYTES`].
    #[error("the header frame is too long")]
    TooLong,
    /// Not a document of the dialect.
    #[error("the header is not msgpack")]
    Decode(#[source] DecodeError),
    /// Not a map.
    #[error("the header is not a map")]
    NotAMap,
    /// A key is absent or of the wrong kind.
    #[error("header key {0:?} is missing or of the wrong kind")]
    Field(&'static str),
    /// A kind that doesn't exist.
    #[error("message kind {0} does not exist")]
    Kind(i64),
}

impl Header {
    /// Reads a header frame. Extra keys are ignored; a missing `zip` counts as false.
    ///
    /// # Errors
    /// It cannot be understood.
    pub fn decode(frame: &Bytes) -> Result<Self, HeaderError> {
        if frame.len() > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLong);
        }
        let names = ["type", "meth", "okey", "seq", "zip"];
        let [code, method, order_key, sequence, zip] =
            msgpack::decode_fields(frame, &HEADER_LIMITS, names)
                .map_err(HeaderError::Decode)?
                .ok_or(HeaderError::NotAMap)?;
        let code = code
            .and_then(|code| code.as_i64())
            .ok_or(HeaderError::Field("type"))?;
        let kind = usize::try_from(code)
            .ok()
            .and_then(|code| KINDS.get(code))
            .ok_or(HeaderError::Kind(code))?;
        let Some(Value::Str(method)) = method else {
            return Err(HeaderError::Field("meth"));
        };
        let order_key = order_key.ok_or(HeaderError::Field("okey"))?;
        let sequence = match sequence {
            Some(sequence @ (Value::Int(_) | Value::UInt(_) | Value::Float(_))) => sequence,
            _ => return Err(HeaderError::Field("seq")),
        };
        let zipped = !matches!(
            zip,
            None | Some(Value::Nil | Value::Bool(false) | Value::Int(0))
        );
        Ok(Self {
            kind: *kind,
            method,
            order_key,
            sequence,
            zipped,
        })
    }

    /// Writes a header frame in the original's key order, never compressed.
    ///
    /// # Errors
    /// A part of it is too long to be sent.
    pub fn encode(&self) -> Result<Bytes, EncodeError> {
        let mut out = Vec::new();
        self.write(&mut out, self.kind)?;
        Ok(out.into())
    }

    fn write(&self, out: &mut Vec<u8>, kind: Kind) -> Result<(), EncodeError> {
        let mut writer = Writer(out);
        writer.map(5)?;
        writer.text("type")?;
        writer.value(&kind.code().into())?;
        writer.text("meth")?;
        writer.text(&self.method)?;
        writer.text("okey")?;
        writer.value(&self.order_key)?;
        writer.text("seq")?;
        writer.value(&self.sequence)?;
        writer.text("zip")?;
        writer.value(&Value::Bool(false))
    }

    /// The frames of a message with this header turned to `kind`; a body of `None` is nil.
    fn frames(&self, kind: Kind, meta: &[u8], body: Option<&[u8]>) -> Result<Frames, EncodeError> {
        let length = self.method.len() + meta.len() + body.map_or(0, <[u8]>::len);
        let mut out = Vec::with_capacity(FRAMES_OVERHEAD + length);
        self.write(&mut out, kind)?;
        let header = out.len();
        let mut writer = Writer(&mut out);
        writer.map(2)?;
        writer.text("meta")?;
        writer.bin(meta)?;
        writer.text("body")?;
        match body {
            Some(body) => writer.bin(body)?,
            None => writer.value(&Value::Nil)?,
        }
        let mut header_frame = Bytes::from(out);
        let envelope = header_frame.split_off(header);
        Ok([Bytes::from_static(UPPER), header_frame, envelope])
    }

    /// The reply that carries a value.
    ///
    /// # Errors
    /// The value cannot be packed.
    pub fn result(&self, value: &Value) -> Result<Frames, EncodeError> {
        // meta is a packed empty array, like the original's.
        self.frames(Kind::Result, &[0x90], Some(&value.encode()?))
    }

    /// The reply that carries a failure.
    ///
    /// # Errors
    /// A text is too long to be packed.
    pub fn failure(&self, failure: &Failure) -> Result<Frames, EncodeError> {
        let meta = Value::array([
            failure.class.as_str(),
            failure.repr.as_str(),
            failure.traceback.as_str(),
        ]);
        self.frames(Kind::Failure, &meta.encode()?, None)
    }

    /// The frames of a call with this header's method and sequence.
    ///
    /// # Errors
    /// An argument cannot be packed.
    pub fn function(
        &self,
        args: Vec<Value>,
        kwargs: Vec<(String, Value)>,
    ) -> Result<Frames, EncodeError> {
        let kwargs = kwargs
            .into_iter()
            .map(|(name, value)| (Value::Str(name), value))
            .collect();
        let body = Value::map([("args", Value::Array(args)), ("kwargs", Value::Map(kwargs))]);
        self.frames(Kind::Function, &[], Some(&body.encode()?))
    }
}

/// Why an envelope or a body can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The envelope is not a document of the dialect.
    #[error("the envelope is not msgpack")]
    Envelope(#[source] DecodeError),
    /// The envelope is not a map with `meta` and `body`.
    #[error("the envelope lacks {0:?}")]
    EnvelopeField(&'static str),
    /// The body is not a byte string.
    #[error("the body is not a byte string")]
    NotBin,
    /// The body is not a document of the dialect.
    #[error("the body is not msgpack of the known dialect")]
    Decode(#[source] DecodeError),
    /// The request body is not a map.
    #[error("the request body is not a map")]
    NotAMap,
    /// The request body lacks a key.
    #[error("the request body lacks {0:?}")]
    Missing(&'static str),
    /// A part of the request body is of the wrong kind.
    #[error("{0:?} of the request body is of the wrong kind")]
    Kind(&'static str),
    /// The failure meta is not three texts.
    #[error("the failure is not class, repr and traceback")]
    FailureMeta,
}

impl From<&BodyError> for Failure {
    fn from(err: &BodyError) -> Self {
        let text = chain(err);
        match err {
            BodyError::Missing(key) => Self::new("KeyError", key),
            BodyError::NotAMap | BodyError::Kind(_) => Self::type_error(text),
            _ => Self::value_error(text),
        }
    }
}

/// Meta and body of an envelope.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// Bin, or something a sloppy peer sent.
    pub meta: Value,
    /// Bin, or nil.
    pub body: Value,
}

impl Envelope {
    /// Reads an envelope frame; the parts stay undecoded.
    ///
    /// # Errors
    /// It cannot be understood.
    pub fn decode(frame: &Bytes) -> Result<Self, BodyError> {
        let [meta, body] = msgpack::decode_fields(frame, &ENVELOPE_LIMITS, ["meta", "body"])
            .map_err(BodyError::Envelope)?
            .unwrap_or_default();
        Ok(Self {
            meta: meta.ok_or(BodyError::EnvelopeField("meta"))?,
            body: body.ok_or(BodyError::EnvelopeField("body"))?,
        })
    }

    /// The value in the body.
    ///
    /// # Errors
    /// It is no msgpack, or beyond the limits.
    pub fn body_value(&self, limits: &DecodeLimits) -> Result<Value, BodyError> {
        let body = self.body.as_bin().ok_or(BodyError::NotBin)?;
        msgpack::decode(body, limits).map_err(BodyError::Decode)
    }

    /// The failure in the meta.
    ///
    /// # Errors
    /// [`BodyError`]: the meta is no binary, cannot be decoded, or is not three texts.
    pub fn failure(&self) -> Result<Failure, BodyError> {
        let meta = self.meta.as_bin().ok_or(BodyError::FailureMeta)?;
        let meta = Value::decode(meta).map_err(BodyError::Decode)?;
        let text = |value: &Value| match value {
            Value::Str(text) => Ok(text.clone()),
            Value::Nil => Ok(String::new()),
            _ => Err(BodyError::FailureMeta),
        };
        match meta.as_array() {
            Some([class, repr, traceback]) => Ok(Failure {
                class: text(class)?,
                repr: text(repr)?,
                traceback: text(traceback)?,
            }),
            _ => Err(BodyError::FailureMeta),
        }
    }
}

/// The answer to a probe: its two frames as they came, so that callers of the original find what they
/// expect, or who answers where that was asked.
#[must_use]
pub fn pong(second: Bytes, third: Bytes) -> Frames {
    let third = match third.as_ref() {
        WHO_ANSWERS => Bytes::from_static(BAI_AGENT),
        _ => third,
    };
    [Bytes::from_static(PONG), second, third]
}

/// A body that is nothing but nil.
const PACKED_NIL: [u8; 1] = [0xc0];

/// Positional and keyword arguments.
pub type RequestBody = (Vec<Value>, Vec<(String, Value)>);

/// Reads the arguments out of an envelope frame. A packed nil body means no arguments.
///
/// # Errors
/// It is no msgpack, beyond the limits, or no arguments.
pub fn read_request(envelope: &Bytes, limits: &DecodeLimits) -> Result<RequestBody, BodyError> {
    let envelope = Envelope::decode(envelope)?;
    let body = envelope.body.as_bin().ok_or(BodyError::NotBin)?;
    if body[..] == PACKED_NIL {
        return Ok((Vec::new(), Vec::new()));
    }
    let [args, kwargs] = msgpack::decode_fields(body, limits, ["args", "kwargs"])
        .map_err(BodyError::Decode)?
        .ok_or(BodyError::NotAMap)?;
    let Value::Array(args) = args.ok_or(BodyError::Missing("args"))? else {
        return Err(BodyError::Kind("args"));
    };
    let Value::Map(pairs) = kwargs.ok_or(BodyError::Missing("kwargs"))? else {
        return Err(BodyError::Kind("kwargs"));
    };
    let named = pairs.into_iter().map(|(name, value)| match name {
        Value::Str(name) => Ok((name, value)),
        _ => Err(BodyError::Kind("kwargs")),
    });
    Ok((args, named.collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header_with(key: &str, value: Option<Value>) -> Result<Header, HeaderError> {
        let mut pairs = vec![
            ("type", Value::Int(1)),
            ("meth", "ping".into()),
            ("okey", "".into()),
            ("seq", 0.into()),
            ("zip", false.into()),
        ];
        pairs.retain(|(name, _)| *name != key);
        pairs.extend(value.map(|value| (key, value)));
        Header::decode(&Value::map(pairs).encode().unwrap().into())
    }

    #[test]
    fn order_key_and_sequence_go_back_as_they_came() {
        for order_key in [
            Value::from(""),
            Value::Bin(Bytes::new()),
            Value::Nil,
            "k".into(),
        ] {
            let header = header_with("okey", Some(order_key.clone())).unwrap();
            let reply = Header::decode(&header.result(&Value::Nil).unwrap()[1]).unwrap();
            assert_eq!(reply.order_key, order_key);
        }
        for sequence in [Value::Int(0), u64::from(u32::MAX).into(), Value::Float(0.0)] {
            let header = header_with("seq", Some(sequence.clone())).unwrap();
            assert_eq!(header.sequence, sequence);
        }
    }

    #[test]
    fn probes_are_echoed_but_the_one_that_asks_who_answers() {
        for [second, third] in [
            [&b""[..], b""],
            [b"after", b""],
            [b"a", b"b"],
            [WHO_ANSWERS, b""],
        ] {
            let frames = [PING, second, third].map(Bytes::from_static);
            let Message::Ping(second, third) = Message::read(&frames) else {
                panic!("{frames:?}")
            };
            let answer = pong(second, third);
            assert_eq!(answer[0], PONG);
            assert_eq!(answer[1..], frames[1..]);
        }
        let answer = pong(Bytes::new(), Bytes::from_static(WHO_ANSWERS));
        assert_eq!(
            Message::read(&answer),
            Message::Pong(Bytes::from_static(BAI_AGENT))
        );
    }

    #[test]
    fn headers_nobody_can_answer_are_told_apart() {
        for key in ["type", "meth", "okey", "seq"] {
            let Err(HeaderError::Field(named)) = header_with(key, None) else {
                panic!("{key}")
            };
            assert_eq!(named, key);
        }
        assert_eq!(
            header_with("type", Some(7.into())),
            Err(HeaderError::Kind(7))
        );
        assert_eq!(
            header_with("type", Some((-1).into())),
            Err(HeaderError::Kind(-1))
        );
        assert_eq!(
            header_with("seq", Some("0".into())),
            Err(HeaderError::Field("seq"))
        );
        assert!(matches!(
            Header::decode(&Bytes::from_static(b"\xff\xff")),
            Err(HeaderError::Decode(_))
        ));
        assert_eq!(
            Header::decode(&Bytes::from_static(b"\x01")),
            Err(HeaderError::NotAMap)
        );
        assert_eq!(
            Header::decode(&vec![0; 5000].into()),
            Err(HeaderError::TooLong)
        );
    }

    #[test]
    fn zip_may_be_absent_or_a_number() {
        assert!(!header_with("zip", None).unwrap().zipped);
        assert!(!header_with("zip", Some(0.into())).unwrap().zipped);
        assert!(header_with("zip", Some(true.into())).unwrap().zipped);
        assert!(header_with("zip", Some(1.into())).unwrap().zipped);
    }

    #[test]
    fn broken_bodies_become_the_failures_python_would_raise() {
        let read = |body: Value| {
            let envelope = Value::map([("meta", Value::Bin(Bytes::new())), ("body", body)]);
            read_request(&envelope.encode().unwrap().into(), &DecodeLimits::default())
        };
        let packed = |value: &Value| Value::Bin(value.encode().unwrap().into());
        let failure = |body: Value| Failure::from(&read(body).unwrap_err());
        assert_eq!(read(packed(&Value::Nil)), Ok((vec![], vec![])));
        let only_args = Value::map([("args", Value::Array(vec![]))]);
        assert_eq!(failure(packed(&only_args)).repr, "KeyError('kwargs')");
        assert_eq!(
            failure(packed(&Value::Map(vec![]))).repr,
            "KeyError('args')"
        );
        assert_eq!(failure(packed(&1.into())).class, "TypeError");
        assert_eq!(failure(Value::Nil).class, "ValueError");
        assert_eq!(
            failure(Value::Bin(Bytes::from_static(b"\xc1"))).class,
            "ValueError"
        );
        let odd_name = Value::map([
            ("args", Value::Array(vec![])),
            ("kwargs", Value::Map(vec![(1.into(), 1.into())])),
        ]);
        assert_eq!(failure(packed(&odd_name)).class, "TypeError");
        let pickle = Value::Bin(Bytes::from_static(b"\xd4\x06\x2e"));
        let text = failure(pickle).repr;
        assert!(text.contains("pickle"), "the cause is told: {text}");
    }

    proptest! {
        #[test]
        fn frames_of_noise_never_panic(
            frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..5),
        ) {
            let frames: Vec<Bytes> = frames.into_iter().map(Bytes::from).collect();
            let _ = Message::read(&frames);
            for frame in &frames {
                let _ = Header::decode(frame);
                let _ = read_request(frame, &DecodeLimits::default());
                let _ = Envelope::decode(frame).map(|envelope| envelope.failure());
            }
        }

        #[test]
        fn headers_survive(method in "\\PC{0,60}", order_key in "\\PC{0,40}", sequence: u32) {
            let header = Header {
                kind: Kind::Function,
                method,
                order_key: order_key.into(),
                sequence: sequence.into(),
                zipped: false,
            };
            prop_assert_eq!(Header::decode(&header.encode().unwrap()), Ok(header));
        }
    }
}
