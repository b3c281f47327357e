//! The messages exchanged with the in-container runner, and their meaning.
//!
//! In: a received (type, payload) pair. Out: what it is for us. Nothing here fails: a payload that
//! is not what its type promises degrades to text or to "nothing said" (a container may send
//! anything).

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Longest payload of one output message that is kept; the rest is cut off.
pub const OUTPUT_LIMIT: usize = 10 * 1024 * 1024;
/// Longer frames are cut by the socket; pictures may be as long, as half of one is none.
pub const FRAME_LIMIT: usize = 2 * OUTPUT_LIMIT;
/// Longest answer to a request; what is beyond is cut off, so that the answer cannot be read.
const ANSWER_LIMIT: usize = 1024 * 1024;
/// Longest JSON that is kept as such: in memory it takes up to a hundred times its text.
const DOCUMENT_LIMIT: usize = 64 * 1024;
/// Longest name of a model.
const NAME_LIMIT: usize = 255;

/// One message to the runner: ASCII type and payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// The message type, first frame.
    pub kind: &'static str,
    /// The payload, second frame.
    pub payload: Bytes,
}

impl Outgoing {
    /// A message whose payload is text (or nothing).
    pub fn text(kind: &'static str, payload: impl Into<String>) -> Self {
        Self {
            kind,
            payload: Bytes::from(payload.into()),
        }
    }

    /// A message whose payload is JSON.
    pub fn json(kind: &'static str, payload: &Value) -> Self {
        Self::text(kind, payload.to_string())
    }
}

/// A console stream of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// HTML text (reserved by the runner).
    Html,
    /// Log text (reserved by the runner).
    Log,
}

impl Stream {
    /// The name used on the wire and in results.
    pub fn name(self) -> &'static str {
        match self {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
            Stream::Html => "html",
            Stream::Log => "log",
        }
    }
}

/// A step of a run that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `clean-finished`.
    Clean,
    /// `build-finished`.
    Build,
    /// `finished`: the run is over.
    Run,
}

/// One thing a run produced, in the order it was produced.
#[derive(Clone, Debug, PartialEq)]
pub enum Record {
    /// Decoded console text.
    Text(Stream, String),
    /// Rich output: media type and text (images are `data:` URLs).
    Media {
        /// Media type.
        mime: String,
        /// Content.
        content: String,
    },
    /// The end of a step with its exit code, if the runner said one.
    StepEnd(Step, Option<i64>),
    /// The run wants a line of input; the map says how (`is_password`).
    WaitingInput(Map<String, Value>),
}

impl Record {
    /// Bytes this record holds in memory, approximately.
    pub fn weight(&self) -> usize {
        const OVERHEAD: usize = 64;
        OVERHEAD
            + match self {
                Record::Text(_, text) => text.len(),
                Record::Media { mime, content } => mime.len() + content.len(),
                Record::StepEnd(..) => 0,
                Record::WaitingInput(options) => map_weight(options),
            }
    }
}

fn map_weight(map: &Map<String, Value>) -> usize {
    /// A map's first node, which holds several entries.
    const NODE: usize = 640;
    let entries = map.iter();
    let entries = entries.map(|(name, value)| 64 + name.len() + value_weight(value));
    NODE + entries.sum::<usize>()
}

/// Deep values do not get this far: the parser's recursion is limited.
fn value_weight(value: &Value) -> usize {
    const VALUE: usize = 64;
    VALUE
        + match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
            Value::String(text) => text.len(),
            Value::Array(items) => items.iter().map(value_weight).sum(),
            Value::Object(map) => map_weight(map),
        }
}

/// Which pending request an answer belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AnswerKind {
    /// `status`.
    Status,
    /// `completion`.
    Completion,
    /// `service-result`.
    Service,
    /// `model-service-result`.
    ModelService,
    /// `apps-result`.
    Apps,
}

/// A received message, sorted.
#[derive(Debug, PartialEq)]
pub enum Incoming {
    /// Console bytes, not decoded yet.
    Output(Stream, Bytes),
    /// A finished record of the current run.
    Record(Record),
    /// An answer to a request of ours.
    Answer(AnswerKind, Bytes),
    /// `model-service-status`.
    ModelStatus {
        /// Name in the model definition.
        model_name: String,
        /// Whether the health check passed.
        is_healthy: bool,
    },
    /// A type we do not know.
    Unknown,
}

/// Sorts one received message.
pub fn sort(kind: &[u8], payload: Bytes) -> Incoming {
    match kind {
        b"stdout" => Incoming::Output(Stream::Stdout, cut(payload, OUTPUT_LIMIT)),
        b"stderr" => Incoming::Output(Stream::Stderr, cut(payload, OUTPUT_LIMIT)),
        b"html" => Incoming::Record(Record::Text(
            Stream::Html,
            lossy(&cut(payload, OUTPUT_LIMIT)),
        )),
        b"log" => Incoming::Record(Record::Text(
            Stream::Log,
            lossy(&cut(payload, OUTPUT_LIMIT)),
        )),
        b"media" => Incoming::Record(media(&payload)),
        b"clean-finished" => Incoming::Record(Record::StepEnd(Step::Clean, exit_code(&payload))),
        b"build-finished" => Incoming::Record(Record::StepEnd(Step::Build, exit_code(&payload))),
        b"finished" => Incoming::Record(Record::StepEnd(Step::Run, exit_code(&payload))),
        b"waiting-input" => Incoming::Record(Record::WaitingInput(object(&payload))),
        b"status" => Incoming::Answer(AnswerKind::Status, cut(payload, ANSWER_LIMIT)),
        b"completion" => Incoming::Answer(AnswerKind::Completion, cut(payload, ANSWER_LIMIT)),
        b"service-result" => Incoming::Answer(AnswerKind::Service, cut(payload, ANSWER_LIMIT)),
        b"model-service-result" => {
            Incoming::Answer(AnswerKind::ModelService, cut(payload, ANSWER_LIMIT))
        }
        // Kept with the kernel as JSON.
        b"apps-result" => Incoming::Answer(AnswerKind::Apps, cut(payload, DOCUMENT_LIMIT)),
        b"model-service-status" => {
            let fields = object(&payload);
            match (
                fields.get("model_name").and_then(Value::as_str),
                fields.get("is_healthy"),
            ) {
                (Some(model_name), Some(Value::Bool(is_healthy)))
                    if model_name.len() <= NAME_LIMIT =>
                {
                    Incoming::ModelStatus {
                        model_name: model_name.to_owned(),
                        is_healthy: *is_healthy,
                    }
                }
                _ => Incoming::Unknown,
            }
        }
        _ => Incoming::Unknown,
    }
}

/// A copy where something is cut off: a slice would hold all of what was received.
fn cut(payload: Bytes, limit: usize) -> Bytes {
    match payload.get(..limit) {
        Some(kept) if payload.len() > limit => Bytes::copy_from_slice(kept),
        _ => payload,
    }
}

fn lossy(payload: &[u8]) -> String {
    String::from_utf8_lossy(payload).into_owned()
}

/// A small JSON map; anything else says nothing.
fn object(payload: &[u8]) -> Map<String, Value> {
    if payload.len() > DOCUMENT_LIMIT {
        return Map::new();
    }
    match serde_json::from_slice(payload) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

fn exit_code(payload: &[u8]) -> Option<i64> {
    object(payload).get("exitCode").and_then(Value::as_i64)
}

/// Jupyter's HTML output comes as bare text, everything else as `{"type", "data"}`.
fn media(payload: &[u8]) -> Record {
    /// Read without building the JSON, which may be as long as a message.
    #[derive(Deserialize)]
    struct Fields {
        #[serde(rename = "type")]
        mime: String,
        data: String,
    }
    let is_map = payload.trim_ascii_start().first() == Some(&b'{');
    let fields = is_map.then(|| serde_json::from_slice::<Fields>(payload));
    match fields {
        Some(Ok(Fields { mime, data })) => Record::Media {
            mime,
            content: data,
        },
        // The socket has cut it.
        Some(Err(_)) if payload.len() >= FRAME_LIMIT => Record::Text(
            Stream::Stderr,
            format!(
                "[output of more than {} MiB at once was left out]\n",
                FRAME_LIMIT >> 20
            ),
        ),
        _ => Record::Media {
            mime: "text/html".to_owned(),
            content: lossy(payload),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn html_media_wedges_the_kernel_in_the_original() {
        let html = "<b>bold</b>";
        assert_eq!(
            sort(b"media", Bytes::from_static(html.as_bytes())),
            Incoming::Record(Record::Media {
                mime: "text/html".into(),
                content: html.into()
            })
        );
        // HTML that happens to be JSON of another shape stays HTML.
        assert_eq!(
            sort(b"media", Bytes::from_static(b"[1]")),
            Incoming::Record(Record::Media {
                mime: "text/html".into(),
                content: "[1]".into()
            })
        );
    }

    #[test]
    fn an_output_message_is_cut_at_ten_mebibytes() {
        let Incoming::Output(Stream::Stdout, kept) =
            sort(b"stdout", Bytes::from(vec![b'x'; OUTPUT_LIMIT + 1]))
        else {
            panic!("stdout is console output");
        };
        assert_eq!(kept.len(), OUTPUT_LIMIT);
    }

    #[test]
    fn a_picture_is_whole_or_left_out() {
        let picture = |length: usize| {
            let data = "A".repeat(length);
            Bytes::from(format!(r#"{{"type": "image/png", "data": "{data}"}}"#))
        };
        let whole = OUTPUT_LIMIT + 1;
        let Incoming::Record(Record::Media { mime, content }) = sort(b"media", picture(whole))
        else {
            panic!("a picture");
        };
        assert_eq!((mime.as_str(), content.len()), ("image/png", whole));
        let cut = picture(FRAME_LIMIT).slice(..FRAME_LIMIT);
        let left_out = sort(b"media", cut);
        let told = matches!(left_out, Incoming::Record(Record::Text(Stream::Stderr, _)));
        assert!(told, "{left_out:?}");
    }

    #[test]
    fn no_message_is_kept_as_json_of_any_size() {
        let long = format!("{{\"a\": [{}0]}}", "0,".repeat(DOCUMENT_LIMIT));
        let long = Bytes::from(long);
        assert_eq!(
            sort(b"waiting-input", long.clone()),
            Incoming::Record(Record::WaitingInput(Map::new()))
        );
        let Incoming::Answer(AnswerKind::Apps, kept) = sort(b"apps-result", long) else {
            panic!("an answer");
        };
        assert_eq!(kept.len(), DOCUMENT_LIMIT);
        let name = "n".repeat(NAME_LIMIT + 1);
        let status = format!("{{\"model_name\": \"{name}\", \"is_healthy\": true}}");
        assert_eq!(
            sort(b"model-service-status", Bytes::from(status)),
            Incoming::Unknown
        );
        // Lists of two texts are not the map that media is.
        assert_eq!(
            sort(b"media", Bytes::from_static(br#"["a", "b"]"#)),
            Incoming::Record(Record::Media {
                mime: "text/html".into(),
                content: r#"["a", "b"]"#.into()
            })
        );
    }

    #[test]
    fn payloads_that_break_their_promise_are_tolerated() {
        assert_eq!(
            sort(b"finished", Bytes::from_static(b"{}")),
            Incoming::Record(Record::StepEnd(Step::Run, None))
        );
        assert_eq!(
            sort(b"finished", Bytes::from_static(b"\xff\xfe")),
            Incoming::Record(Record::StepEnd(Step::Run, None))
        );
        assert_eq!(
            sort(b"waiting-input", Bytes::new()),
            Incoming::Record(Record::WaitingInput(Map::new()))
        );
        assert_eq!(
            sort(b"model-service-status", Bytes::from_static(b"{}")),
            Incoming::Unknown
        );
        assert_eq!(sort(b"\xff", Bytes::new()), Incoming::Unknown);
    }
}
