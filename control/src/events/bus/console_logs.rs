//! Logs of ended containers on their way to the manager.
//!
//! In: the kernel whose console has just been kept on disk. Out: the pieces in the list the manager
//! empties, and then, not before, the event that tells it to. Invariants: nobody who ends a kernel
//! waits for the bus; a list is whole when it is announced, also after a failed attempt; few
//! consoles wait, and those that wait when the agent ends stay on this node only.

use std::io::{self, Write};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use shared::ids::{ContainerId, KernelId};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::store::{Store, StoreError};
use crate::events::{Event, Events};
use crate::kernel::destroy::chain;
use crate::kernel::kept_logs::{KEEP, KeptLogs};
use crate::kernel::node::blocking;

/// How long a list waits for the manager.
const EXPIRES: Duration = Duration::from_secs(3600);
/// Plain bytes sent in one call: each call has the store's deadline.
const CALL: usize = 1 << 20;
/// Pauses between attempts: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Refusals by the server itself after which a console is given up.
const REFUSALS: u32 = 5;

/// A console that could not be brought to the bus.
#[derive(Debug, Error)]
pub enum ConsoleLogError {
    /// A piece could not be compressed.
    #[error("cannot compress a console")]
    Compress(#[source] io::Error),
    /// The bus did not take it.
    #[error("cannot put a console on the bus")]
    Store(#[from] StoreError),
}

/// Brings consoles to the bus, one after the other.
#[derive(Clone, Debug)]
pub struct ConsoleLogs {
    queue: mpsc::Sender<(KernelId, ContainerId)>,
}

impl ConsoleLogs {
    /// Starts the task. `chunk` is the size of the plain pieces.
    #[must_use]
    pub fn start(
        store: Store,
        logs: KeptLogs,
        events: Events,
        chunk: usize,
        tasks: &TaskTracker,
        stopping: CancellationToken,
    ) -> Self {
        // More than are kept on disk need not wait.
        let (queue, waiting) = mpsc::channel(KEEP);
        tasks.spawn(ship_all(
            store,
            logs,
            events,
            chunk.max(1024),
            waiting,
            stopping,
        ));
        Self { queue }
    }

    /// Takes a kernel whose console is on disk. Never waits; a full queue leaves it out.
    pub fn ship(&self, kernel: KernelId, container: ContainerId) {
        if self.queue.try_send((kernel, container)).is_err() {
            tracing::warn!(kernel_id = %kernel, "too many consoles wait for the bus; this one stays on the node");
        }
    }
}

async fn ship_all(
    store: Store,
    logs: KeptLogs,
    events: Events,
    chunk: usize,
    mut waiting: mpsc::Receiver<(KernelId, ContainerId)>,
    stopping: CancellationToken,
) {
    loop {
        let (kernel, container) = tokio::select! {
            next = waiting.recv() => match next {
                Some(next) => next,
                None => return,
            },
            () = stopping.cancelled() => return,
        };
        let kept = logs.clone();
        // The newest few hundred are kept: after a long outage it may be gone.
        let Some(text) = blocking(move || kept.load(kernel)).await else {
            continue;
        };
        let text = Bytes::from(text);
        let mut pause = PAUSES.0;
        let mut refusals = 0;
        loop {
            let shipped = tokio::select! {
                shipped = ship(&store, container, &text, chunk) => shipped,
                () = stopping.cancelled() => return,
            };
            let err = match shipped {
                Ok(()) => {
                    events.emit(Event::DoSyncKernelLogs { kernel, container });
                    break;
                }
                Err(err) => err,
            };
            if !matches!(
                err,
                ConsoleLogError::Store(
                    StoreError::Connection(_)
                        | StoreError::Resting
                        | StoreError::Busy
                        | StoreError::Deadline { .. }
                )
            ) {
                refusals += 1;
            }
            if refusals >= REFUSALS {
                tracing::warn!(kernel_id = %kernel, err = chain(&err), "a console is not sent to the manager; it stays on the node");
                break;
            }
            tracing::debug!(kernel_id = %kernel, err = chain(&err), "a console waits for the bus");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stopping.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

/// Makes the list of a container consist of the pieces of `text`.
async fn ship(
    store: &Store,
    container: ContainerId,
    text: &Bytes,
    chunk: usize,
) -> Result<(), ConsoleLogError> {
    let key = format!("containerlog.{container}");
    // What a failed attempt left.
    store.delete(key.clone()).await?;
    let per_call = (CALL / chunk).max(1) * chunk;
    for start in (0..text.len()).step_by(per_call) {
        let part = text.slice(start..(start + per_call).min(text.len()));
        let elements = blocking(move || elements(&part, chunk))
            .await
            .map_err(ConsoleLogError::Compress)?;
        store.append(key.clone(), elements, EXPIRES).await?;
    }
    Ok(())
}

/// The list's elements: each piece compressed by itself.
fn elements(text: &[u8], chunk: usize) -> io::Result<Vec<Bytes>> {
    text.chunks(chunk)
        .map(|piece| {
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
            encoder.write_all(piece)?;
            let content = STANDARD.encode(encoder.finish()?);
            let element = serde_json::json!({"compress_type": "zlib", "content": content});
            Ok(Bytes::from(element.to_string()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn pieces_are_exact_and_join_to_the_text() {
        let text: Vec<u8> = (0..10_000_u32).flat_map(u32::to_le_bytes).collect();
        let elements = elements(&text, 4096).unwrap();
        assert_eq!(elements.len(), text.len().div_ceil(4096));
        let mut joined = Vec::new();
        for (n, element) in elements.iter().enumerate() {
            let element: serde_json::Value = serde_json::from_slice(element).unwrap();
            assert_eq!(element["compress_type"], "zlib");
            let bytes = STANDARD
                .decode(element["content"].as_str().unwrap())
                .unwrap();
            let before = joined.len();
            flate2::read::ZlibDecoder::new(&bytes[..])
                .read_to_end(&mut joined)
                .unwrap();
            assert!(n + 1 == elements.len() || joined.len() - before == 4096);
        }
        assert_eq!(joined, text);
        assert!(super::elements(b"", 4096).unwrap().is_empty());
    }
}
