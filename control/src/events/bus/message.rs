//! Events in the form that lies in streams and channels.
//!
//! In: an event, or arguments made elsewhere (the heartbeat). Out: the commands that publish it,
//! byte for byte what the published manager reads. Invariant: a message is encoded once; however
//! often it is sent, its bytes are the same.

use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::json;
use thiserror::Error;

use super::connection::{Command, Reply};
use crate::events::{Delivery, Event};
use crate::rpc::msgpack::EncodeError;
use crate::rpc::{ConversionError, Value, to_value};

/// The stream that managers read.
pub const STREAM: &str = "events";
/// The group by which managers share the stream's entries among them.
pub const GROUP: &str = "manager";
/// The channel everybody may listen to.
pub const CHANNEL: &str = "events_all";
/// About how many entries the stream keeps.
pub const STREAM_LENGTH: u32 = 128;
/// How long a cached broadcast can be read by those who come late.
const CACHE_SECONDS: u32 = 300;
/// Agents act for no user and no request.
const METADATA: &str = r#"{"request_id":null,"user":null}"#;

/// Arguments that cannot be sent.
#[derive(Debug, Error)]
pub enum MessageError {
    /// They have no form on the wire.
    #[error("cannot turn the arguments of {name} into values")]
    Convert {
        /// Name of the event.
        name: &'static str,
        /// Why.
        #[source]
        source: ConversionError,
    },
    /// They are too large or too deep.
    #[error("cannot encode the arguments of {name}")]
    Encode {
        /// Name of the event.
        name: &'static str,
        /// Why.
        #[source]
        source: EncodeError,
    },
}

/// What becomes of a message while it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Retention {
    /// It is on disk until it has been sent.
    Journalled,
    /// The same, within bounds of its own: what a session is doing. When there is no room, those go
    /// first that a later one with the same arguments follows.
    JournalledDoing,
    /// It waits in memory.
    Queued,
    /// Only the newest of its key waits.
    Newest(String),
}

impl Retention {
    /// Whether it is on disk until it has been sent.
    #[must_use]
    pub fn is_journalled(&self) -> bool {
        matches!(self, Self::Journalled | Self::JournalledDoing)
    }
}

/// One event, encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Name on the bus.
    pub name: String,
    /// The arguments as a msgpack array.
    pub args: Bytes,
    /// Sent to the stream.
    pub anycast: bool,
    /// Sent to the channel.
    pub broadcast: bool,
    /// Key under which a broadcast is kept for late readers.
    pub cache: Option<String>,
    /// What becomes of it while it waits.
    pub keeping: Retention,
}

impl Message {
    /// The message of an event; `None` for events that stay on the node.
    ///
    /// # Errors
    /// Arguments that have no form on the wire.
    pub fn of(event: &Event, at: SystemTime) -> Result<Option<Self>, MessageError> {
        let name = event.name();
        let (anycast, broadcast) = match event.delivery() {
            Delivery::Local => return Ok(None),
            Delivery::Anycast => (true, false),
            Delivery::Broadcast => (false, true),
            Delivery::Both => (true, true),
        };
        let args =
            to_value(&event.args(at)).map_err(|source| MessageError::Convert { name, source })?;
        let task = match event {
            Event::BgtaskUpdated { task, .. }
            | Event::BgtaskDone { task, .. }
            | Event::BgtaskFailed { task, .. }
            | Event::BgtaskCancelled { task } => Some(task),
            _ => None,
        };
        Ok(Some(Self {
            name: name.to_owned(),
            args: encode(name, &args)?,
            anycast,
            broadcast,
            cache: task.map(|task| format!("bgtask.{task}")),
            keeping: keeping(event),
        }))
    }

    /// An anycast of which only the newest waits: a report of state.
    ///
    /// # Errors
    /// Arguments that have no form on the wire.
    pub fn report(name: &'static str, args: Vec<Value>) -> Result<Self, MessageError> {
        Ok(Self {
            name: name.to_owned(),
            args: encode(name, &Value::Array(args))?,
            anycast: true,
            broadcast: false,
            cache: None,
            keeping: Retention::Newest(name.to_owned()),
        })
    }

    /// Bytes it occupies, about.
    #[must_use]
    pub fn size(&self) -> usize {
        self.args.len() + self.name.len() + self.cache.as_ref().map_or(0, String::len) + 128
    }

    /// The commands that publish it, the stream first.
    #[must_use]
    pub fn commands(&self, source: &str) -> Vec<Command> {
        let mut commands = Vec::with_capacity(3);
        if self.anycast {
            commands.push(
                Command::new("XADD")
                    .arg(STREAM)
                    .arg("MAXLEN")
                    .arg("~")
                    .number(STREAM_LENGTH)
                    .arg("*")
                    .arg("name")
                    .arg(self.name.clone())
                    .arg("source")
                    .arg(source.to_owned())
                    .arg("args")
                    .arg(self.args.clone())
                    .arg("metadata")
                    .arg(METADATA),
            );
        }
        if self.broadcast {
            let text = self.channel_text(source);
            if let Some(key) = &self.cache {
                commands.push(
                    Command::new("SET")
                        .arg(key.clone())
                        .arg(text.clone())
                        .arg("EX")
                        .number(CACHE_SECONDS),
                );
            }
            commands.push(Command::new("PUBLISH").arg(CHANNEL).arg(text));
        }
        commands
    }

    /// Whether an entry of the stream is this message from `source`.
    #[must_use]
    pub fn is_entry(&self, source: &str, entry: &Reply) -> bool {
        let Some(fields) = entry
            .array()
            .and_then(|parts| parts.get(1))
            .and_then(Reply::array)
        else {
            return false;
        };
        let field = |name: &[u8]| {
            fields
                .chunks_exact(2)
                .find(|pair| pair[0].bytes().is_some_and(|key| key.as_ref() == name))
                .and_then(|pair| pair[1].bytes())
        };
        field(b"source").is_some_and(|found| found.as_ref() == source.as_bytes())
            && field(b"name").is_some_and(|name| name.as_ref() == self.name.as_bytes())
            && field(b"args").is_some_and(|args| args == self.args)
    }

    /// The text published on the channel.
    #[must_use]
    pub fn channel_text(&self, source: &str) -> String {
        json!({
            "name": self.name,
            "source": source,
            "args": STANDARD.encode(&self.args),
            "metadata": METADATA,
        })
        .to_string()
    }
}

fn encode(name: &'static str, args: &Value) -> Result<Bytes, MessageError> {
    args.encode()
        .map(Bytes::from)
        .map_err(|source| MessageError::Encode { name, source })
}

/// What the manager's records depend on is journalled; what the next one replaces waits alone.
fn keeping(event: &Event) -> Retention {
    match event {
        Event::KernelPreparing { .. }
        | Event::KernelPulling { .. }
        | Event::KernelCreating { .. }
        | Event::KernelStarted { .. }
        | Event::KernelTerminated { .. }
        | Event::SessionSuccess { .. }
        | Event::SessionFailure { .. }
        | Event::ModelServiceStatusUpdated { .. }
        | Event::ImagePullStarted { .. }
        | Event::ImagePullFinished { .. }
        | Event::ImagePullFailed { .. } => Retention::Journalled,
        // The manager knows from the last one whether a session idles. They may be many.
        Event::ExecutionStarted { .. }
        | Event::ExecutionFinished { .. }
        | Event::ExecutionCancelled { .. } => Retention::JournalledDoing,
        Event::BgtaskUpdated { task, .. } => Retention::Newest(format!("bgtask.{task}")),
        Event::AgentStarted { .. }
        | Event::AgentTerminated { .. }
        | Event::AgentImagesRemove { .. }
        | Event::AgentError { .. }
        | Event::DoAgentResourceCheck { .. }
        // Sent by `console_logs`, beside the queue.
        | Event::DoSyncKernelLogs { .. }
        | Event::KernelProgress { .. }
        | Event::BgtaskDone { .. }
        | Event::BgtaskFailed { .. }
        | Event::BgtaskCancelled { .. }
        | Event::VolumeMounted(_)
        | Event::VolumeUnmounted(_) => Retention::Queued,
    }
}
