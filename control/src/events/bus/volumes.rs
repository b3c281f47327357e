//! What this node takes from the channel: requests to mount and unmount volumes.
//!
//! In: every text on the channel. Out: the two requests meant for agents, to whoever does the
//! mounting. Invariants: nothing received is executed or unpickled; everything else is ignored
//! without a word; after an outage the subscription is made anew; a receiver that does not keep up
//! loses requests and the log says so.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::connection::{Connector, Subscription};
use super::message::CHANNEL;
use crate::causes::chain;
use crate::rpc::Value;
use crate::rpc::msgpack::{self, DecodeLimits};

/// Requests that wait for the one who mounts.
const WAITING: usize = 64;
/// Larger texts are not looked at.
const TEXT_LIMIT: usize = 1 << 20;
/// How long the channel may be silent before the server is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(10);
/// Pauses between attempts: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// A request to every agent of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeRequest {
    /// `do_volume_mount`.
    Mount {
        /// Name of the directory below the mount prefix.
        dir_name: String,
        /// Name of the volume's backend.
        backend: String,
        /// `user:<id>` or `project:<id>`; goes back in the answer.
        quota_scope: String,
        /// What is mounted, for one `10.0.0.1:/export`.
        location: String,
        /// Kind of file system; the manager sends `nfs`.
        fs_type: String,
        /// Options of mount(8).
        options: Option<String>,
        /// Resource group it is meant for; the original does not look at it.
        scaling_group: Option<String>,
        /// Whether it is to be written into the table of file systems.
        edit_fstab: bool,
        /// Where that table is.
        fstab_path: String,
    },
    /// `do_volume_unmount`.
    Unmount {
        /// Name of the directory below the mount prefix.
        dir_name: String,
        /// Name of the volume's backend.
        backend: String,
        /// `user:<id>` or `project:<id>`; goes back in the answer.
        quota_scope: String,
        /// Resource group it is meant for.
        scaling_group: Option<String>,
        /// Whether it is to be taken out of the table of file systems.
        edit_fstab: bool,
        /// Where that table is; none is the usual place.
        fstab_path: Option<String>,
    },
}

#[derive(Deserialize)]
struct Text {
    name: String,
    args: String,
}

/// Reads a text of the channel: `None` when it is no request to agents.
///
/// # Errors
/// Why a request to agents cannot be understood.
pub fn read_request(text: &[u8]) -> Result<Option<VolumeRequest>, String> {
    if text.len() > TEXT_LIMIT {
        return Ok(None);
    }
    let Ok(Text { name, args }) = serde_json::from_slice(text) else {
        return Ok(None);
    };
    let mount = match name.as_str() {
        "do_volume_mount" => true,
        "do_volume_unmount" => false,
        _ => return Ok(None),
    };
    let bytes = STANDARD
        .decode(args)
        .map_err(|_| format!("the arguments of {name} are not base64"))?;
    let args = msgpack::decode(&Bytes::from(bytes), &DecodeLimits::default())
        .map_err(|err| format!("the arguments of {name} cannot be decoded: {err}"))?;
    let args = Positions {
        name: &name,
        args: args.as_array().unwrap_or_default(),
    };
    let request = if mount {
        VolumeRequest::Mount {
            dir_name: args.text(0)?,
            backend: args.text(1)?,
            quota_scope: args.text(2)?,
            location: args.text(3)?,
            fs_type: args.optional(4)?.unwrap_or_else(|| "nfs".into()),
            options: args.optional(5)?,
            scaling_group: args.optional(6)?,
            edit_fstab: args.flag(7)?,
            fstab_path: args.optional(8)?.unwrap_or_else(|| "/etc/fstab".into()),
        }
    } else {
        VolumeRequest::Unmount {
            dir_name: args.text(0)?,
            backend: args.text(1)?,
            quota_scope: args.text(2)?,
            scaling_group: args.optional(3)?,
            edit_fstab: args.flag(4)?,
            fstab_path: args.optional(5)?,
        }
    };
    Ok(Some(request))
}

struct Positions<'a> {
    name: &'a str,
    args: &'a [Value],
}

impl Positions<'_> {
    fn text(&self, at: usize) -> Result<String, String> {
        self.optional(at)?
            .ok_or_else(|| format!("argument {at} of {} is missing", self.name))
    }

    fn optional(&self, at: usize) -> Result<Option<String>, String> {
        match self.args.get(at) {
            None | Some(Value::Nil) => Ok(None),
            Some(Value::Str(text)) => Ok(Some(text.clone())),
            Some(other) => Err(format!(
                "argument {at} of {} is {} instead of text",
                self.name,
                other.kind()
            )),
        }
    }

    fn flag(&self, at: usize) -> Result<bool, String> {
        match self.args.get(at) {
            None | Some(Value::Nil) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(format!(
                "argument {at} of {} is {} instead of a truth value",
                self.name,
                other.kind()
            )),
        }
    }
}

/// Listens until it is told to stop or nobody takes requests any more.
pub(super) async fn listen(
    connector: Connector,
    requests: mpsc::Sender<VolumeRequest>,
    stopping: CancellationToken,
) {
    let mut pause = PAUSES.0;
    let mut silent = false;
    loop {
        let ended = tokio::select! {
            ended = follow(&connector, &requests, &mut pause) => ended,
            () = stopping.cancelled() => return,
        };
        let Err(trouble) = ended else { return };
        // The sender of events says loudly that the bus is away.
        if silent {
            tracing::debug!(err = trouble, "cannot listen to the bus yet");
        } else {
            tracing::warn!(err = trouble, "listening to the bus ended; trying again");
        }
        silent = pause > PAUSES.0;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return,
        }
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Follows one subscription. `Ok` when nobody takes requests any more.
async fn follow(
    connector: &Connector,
    requests: &mpsc::Sender<VolumeRequest>,
    pause: &mut Duration,
) -> Result<(), String> {
    let mut subscription: Subscription = connector
        .subscribe(CHANNEL)
        .await
        .map_err(|err| chain(&err))?;
    *pause = PAUSES.0;
    tracing::debug!(peer = %connector.endpoint(), "listening to the bus");
    let mut left_out = 0_u64;
    loop {
        let text = match subscription.next(SILENCE).await {
            Ok(Some(text)) => text,
            Ok(None) if requests.is_closed() => return Ok(()),
            Ok(None) => continue,
            Err(err) => return Err(chain(&err)),
        };
        match read_request(&text) {
            Ok(None) => {}
            Ok(Some(request)) => match requests.try_send(request) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Closed(_)) => return Ok(()),
                Err(mpsc::error::TrySendError::Full(_)) => {
                    left_out += 1;
                    if left_out.is_power_of_two() {
                        tracing::warn!(
                            count = left_out,
                            "volume requests come faster than they are done; some are left out"
                        );
                    }
                }
            },
            Err(trouble) => {
                left_out += 1;
                if left_out.is_power_of_two() {
                    tracing::warn!(
                        err = trouble,
                        count = left_out,
                        "a request of the manager cannot be understood"
                    );
                }
            }
        }
    }
}

/// The two ends of the queue of requests.
pub(super) fn requests() -> (mpsc::Sender<VolumeRequest>, mpsc::Receiver<VolumeRequest>) {
    mpsc::channel(WAITING)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str, args: &Value) -> Vec<u8> {
        serde_json::json!({
            "name": name,
            "source": "manager",
            "args": STANDARD.encode(args.encode().unwrap()),
        })
        .to_string()
        .into_bytes()
    }

    #[test]
    fn other_events_and_noise_are_ignored() {
        for noise in [&b""[..], b"{", b"[]", b"\xff\xff", b"{\"name\":\"x\"}"] {
            assert_eq!(read_request(noise), Ok(None));
        }
        let other = text("kernel_started", &Value::Array(vec![]));
        assert_eq!(read_request(&other), Ok(None));
    }

    #[test]
    fn requests_that_make_no_sense_are_told() {
        let empty = text("do_volume_mount", &Value::Array(vec![]));
        let wrong = text("do_volume_unmount", &Value::Array(vec![Value::Int(1)]));
        let map = text("do_volume_unmount", &Value::Map(vec![]));
        for text in [empty, wrong, map] {
            assert!(read_request(&text).is_err());
        }
        let raw = br#"{"name":"do_volume_mount","args":"!"}"#;
        assert!(read_request(raw).is_err());
        let raw = br#"{"name":"do_volume_mount","args":"wQ=="}"#;
        assert!(read_request(raw).is_err());
    }
}
