//! Logs of ended containers on their way to the manager.
//!
//! In: the kernel whose console has just been kept on disk, and what an earlier life had not
//! brought. Out: the pieces in the list the manager empties, and then, not before, the event that
//! tells it to. Invariants: nobody who ends a kernel waits long for the bus; a list is whole when it
//! is announced, also after a failed attempt; it is announced once, because a manager that finds
//! the list of a second announcement empty stores an empty console over the one it has; what waits
//! when the agent ends is brought after the next start.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use shared::ids::{ContainerId, KernelId};
use thiserror::Error;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Bus;
use super::connection::{Command, Reply};
use super::message::{Message, MessageError, STREAM};
use super::readers::{self, Ask, Patience, Readers};
use super::store::{Store, StoreError};
use crate::blocking::blocking;
use crate::causes::chain;
use crate::events::{Event, Events};
use crate::kernel::kept_logs::{KEEP, KeptLogs, KeptLogsError, Shipping};

/// How long a list waits for the manager.
const EXPIRES: Duration = Duration::from_secs(3600);
/// Plain bytes sent in one call: each call has the store's deadline.
const CALL: usize = 1 << 20;
/// Pauses between attempts: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Refusals of this console, not of all writes, after which it is given up.
const REFUSALS: u32 = 5;
/// Entries looked through for an announcement whose fate is not known.
const LOOK_BACK: u32 = 1000;

/// A console that could not be brought to the bus.
#[derive(Debug, Error)]
pub enum ConsoleLogError {
    /// A piece could not be compressed.
    #[error("cannot compress a console")]
    Compress(#[source] io::Error),
    /// The bus did not take it.
    #[error("cannot put a console on the bus")]
    Store(#[from] StoreError),
    /// Its announcement has no form on the wire.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// How far it has come could not be noted.
    #[error(transparent)]
    Mark(#[from] KeptLogsError),
}

/// Brings consoles to the bus, one after the other.
#[derive(Clone, Debug)]
pub struct ConsoleLogs {
    line: watch::Sender<Line>,
}

/// The consoles that wait, the one under way first.
#[derive(Debug, Default)]
struct Line {
    waiting: VecDeque<(KernelId, ContainerId)>,
    /// The last attempt failed.
    failing: bool,
    /// Somebody has waited for room in vain, and nothing has gone since.
    stands: bool,
}

impl ConsoleLogs {
    /// Starts the task, with what an earlier life has left. `chunk` is the size of the plain
    /// pieces.
    #[must_use]
    pub fn start(
        bus: &Bus,
        logs: KeptLogs,
        events: Events,
        chunk: usize,
        tasks: &TaskTracker,
        stopping: CancellationToken,
    ) -> Self {
        let line = watch::Sender::default();
        let shipper = Shipper {
            lists: bus.container_logs().clone(),
            stream: bus.inner.stream.clone(),
            source: bus.inner.source.clone(),
            logs,
            events,
            chunk: chunk.max(1024),
            patience: Patience::default(),
        };
        let consoles = Self { line };
        let all = consoles.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = shipper.ship_all(&all) => {}
                () = stopping.cancelled() => {}
            }
        });
        consoles
    }

    /// Takes a kernel whose console is on disk and marked to be shipped. Never waits.
    pub fn ship(&self, kernel: KernelId, container: ContainerId) {
        let mut left_out = None;
        self.line.send_if_modified(|line| {
            if line.waiting.contains(&(kernel, container)) {
                return false;
            }
            // More than are kept on disk need not wait; the first one is under way.
            if line.waiting.len() >= KEEP {
                left_out = line.waiting.remove(1);
            }
            line.waiting.push_back((kernel, container));
            true
        });
        if let Some((kernel, _)) = left_out {
            tracing::warn!(kernel_id = %kernel, "too many consoles wait for the bus; the oldest stays on the node");
        }
    }

    /// Waits until fewer than `most` consoles are on their way, at most `limit`, and not at all while the
    /// bus does not take them, or once another has waited in vain.
    pub async fn room(&self, most: usize, limit: Duration) {
        let mut line = self.line.subscribe();
        let most = most.max(1);
        let room = line.wait_for(|line| line.failing || line.stands || line.waiting.len() < most);
        if tokio::time::timeout(limit, room).await.is_err() {
            self.line.send_modify(|line| line.stands = true);
        }
    }

    /// Waits until no console of a kernel is on its way, at most `limit`, and not at all while the
    /// bus does not take them.
    pub async fn settled(&self, kernel: KernelId, limit: Duration) {
        let mut line = self.line.subscribe();
        let settled = line.wait_for(|line| {
            line.failing || line.waiting.iter().all(|(waits, _)| *waits != kernel)
        });
        // Late is late: the end of a kernel is told all the same.
        let _ = tokio::time::timeout(limit, settled).await;
    }

    async fn first(&self) -> (KernelId, ContainerId) {
        let mut line = self.line.subscribe();
        loop {
            if let Some(first) = line.borrow_and_update().waiting.front() {
                return *first;
            }
            // The sender lives in `self`; this cannot fail while we are borrowed.
            if line.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    fn attempted(&self, failing: bool) {
        self.line.send_if_modified(|line| {
            let changed = line.failing != failing;
            line.failing = failing;
            changed
        });
    }

    fn finish(&self, done: (KernelId, ContainerId)) {
        self.line.send_modify(|line| {
            line.waiting.retain(|waits| *waits != done);
            line.stands = false;
        });
    }
}

/// Counts what ends the attempts to bring one console.
#[derive(Debug, Default)]
struct Refusals(u32);

impl Refusals {
    /// Whether this failure is the last one. A bus that is away, or takes no writes at all (out of
    /// memory, a replica, still loading), takes the console later.
    fn is_last(&mut self, err: &ConsoleLogError) -> bool {
        let counts = match err {
            ConsoleLogError::Store(err) => err.is_final(),
            _ => true,
        };
        self.0 += u32::from(counts);
        self.0 >= REFUSALS
    }
}

struct Shipper {
    lists: Store,
    stream: Store,
    source: String,
    logs: KeptLogs,
    events: Events,
    chunk: usize,
    patience: Patience,
}

impl Shipper {
    async fn ship_all(&self, consoles: &ConsoleLogs) {
        let logs = self.logs.clone();
        for (kernel, container) in blocking(move || logs.unshipped()).await {
            consoles.ship(kernel, container);
        }
        loop {
            let (kernel, container) = consoles.first().await;
            self.ship_one(kernel, container, consoles).await;
            consoles.finish((kernel, container));
        }
    }

    async fn ship_one(&self, kernel: KernelId, container: ContainerId, consoles: &ConsoleLogs) {
        let mut pause = PAUSES.0;
        let mut refusals = Refusals::default();
        loop {
            let err = match self.attempt(kernel, container).await {
                Ok(()) => return consoles.attempted(false),
                Err(err) => err,
            };
            consoles.attempted(true);
            if refusals.is_last(&err) {
                tracing::warn!(kernel_id = %kernel, err = chain(&err), "a console is not sent to the manager; it stays on the node");
                // It gives way to those that are taken.
                if let Err(err) = self.mark(kernel, container, Shipping::Refused).await {
                    tracing::debug!(kernel_id = %kernel, err = chain(&err), "cannot note that a console is refused");
                }
                return;
            }
            tracing::debug!(kernel_id = %kernel, err = chain(&err), "a console waits for the bus");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }

    /// Goes on from where the console's mark says it is.
    async fn attempt(
        &self,
        kernel: KernelId,
        container: ContainerId,
    ) -> Result<(), ConsoleLogError> {
        let logs = self.logs.clone();
        let found =
            blocking(move || Some((logs.shipping(kernel, container)?, logs.load(kernel)?))).await;
        // The newest few hundred are kept: after a long outage it may be gone.
        let Some((shipping, text)) = found else {
            return Ok(());
        };
        let event = Event::DoSyncKernelLogs { kernel, container };
        let Some(message) = Message::of(&event, SystemTime::now())? else {
            return Ok(());
        };
        match shipping {
            Shipping::Sent => return Ok(()),
            Shipping::Announcing => {
                if self.is_told(container, text.is_empty(), &message).await? {
                    return self.mark(kernel, container, Shipping::Sent).await;
                }
                // Nothing is on its way: should managers be waited for in vain, the list may lapse.
                self.mark(kernel, container, Shipping::Unsent).await?;
            }
            Shipping::Unsent | Shipping::Refused => {
                let text = Bytes::from(text);
                if let Err(err) = put(&self.lists, container, &text, self.chunk).await {
                    self.clear(container, &err).await;
                    return Err(err);
                }
            }
        }
        self.let_read().await?;
        // Not before: a list that is gone would be taken for one that a manager has taken.
        self.mark(kernel, container, Shipping::Announcing).await?;
        let commands = message.commands(&self.source);
        if let Err(err) = self.stream.run("announce a console", commands).await {
            if err.is_certain() {
                // Nobody was told, and the list may be gone before anybody is.
                self.mark(kernel, container, Shipping::Unsent).await?;
                let err = err.into();
                self.clear(container, &err).await;
                return Err(err);
            }
            return Err(err.into());
        }
        self.events.emit(event);
        self.mark(kernel, container, Shipping::Sent).await
    }

    /// Leaves nothing of a console in a server that refuses the rest: it may be short of memory for that.
    async fn clear(&self, container: ContainerId, err: &ConsoleLogError) {
        if let ConsoleLogError::Store(StoreError::Refused { .. }) = err
            && let Err(err) = self.lists.delete(key(container)).await
        {
            tracing::debug!(container_id = %container, err = chain(&err), "a part of a console stays on the bus until it lapses");
        }
    }

    /// Leaves managers time to read: after an outage more may wait than the stream keeps.
    async fn let_read(&self) -> Result<(), StoreError> {
        let began = Instant::now();
        let mut readers = Readers::default();
        loop {
            let unread = readers.unread(&mut &self.stream).await?;
            if self.patience.lets_go(unread, began.elapsed()) {
                return Ok(());
            }
            tokio::time::sleep(readers::look_pause()).await;
        }
    }

    async fn mark(
        &self,
        kernel: KernelId,
        container: ContainerId,
        shipping: Shipping,
    ) -> Result<(), ConsoleLogError> {
        let logs = self.logs.clone();
        let marked = blocking(move || logs.set_shipping(kernel, container, shipping)).await;
        marked.map_err(ConsoleLogError::from)
    }

    /// Whether an announcement that was tried has reached the manager or will: its list was taken,
    /// or it lies in the stream. A list that is there without an announcement is whole.
    async fn is_told(
        &self,
        container: ContainerId,
        is_empty: bool,
        message: &Message,
    ) -> Result<bool, ConsoleLogError> {
        let look = Command::new("XREVRANGE")
            .arg(STREAM)
            .arg("+")
            .arg("-")
            .arg("COUNT")
            .number(LOOK_BACK);
        // The stream first: the list goes after the announcement is read.
        let replies = self
            .stream
            .run("look for an announcement", vec![look])
            .await?;
        let entries = replies.first().and_then(Reply::array).unwrap_or_default();
        if entries
            .iter()
            .any(|entry| message.is_entry(&self.source, entry))
        {
            return Ok(true);
        }
        let exists = Command::new("EXISTS").arg(key(container));
        let replies = self.lists.run("look for a console", vec![exists]).await?;
        let taken = matches!(replies.first(), Some(Reply::Int(0)));
        // An empty console has no list, and nothing that a second announcement could erase.
        Ok(taken && !is_empty)
    }
}

impl Ask for &Store {
    type Error = StoreError;

    async fn ask_one(&mut self, command: Command) -> Result<Reply, StoreError> {
        match self.run("look for readers", vec![command]).await {
            Ok(replies) => Ok(replies.into_iter().next().unwrap_or(Reply::Nil)),
            Err(StoreError::Refused { message, .. }) => Ok(Reply::Error(message)),
            Err(err) => Err(err),
        }
    }
}

fn key(container: ContainerId) -> String {
    format!("containerlog.{container}")
}

/// Makes the list of a container consist of the pieces of `text`.
async fn put(
    store: &Store,
    container: ContainerId,
    text: &Bytes,
    chunk: usize,
) -> Result<(), ConsoleLogError> {
    let key = key(container);
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

    #[tokio::test]
    async fn a_crowd_of_ends_finds_room_in_the_line() {
        const HOUR: Duration = Duration::from_secs(3600);
        let consoles = ConsoleLogs {
            line: watch::Sender::default(),
        };
        let slow = consoles.clone();
        let shipper = tokio::spawn(async move {
            let mut shipped = Vec::new();
            while shipped.len() < 300 {
                let first = slow.first().await;
                // Whoever can goes on first.
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
                slow.finish(first);
                shipped.push(first.0);
            }
            shipped
        });
        let all: Vec<_> = (0..300u128).map(|n| KernelId(n.to_be_bytes())).collect();
        for kernel in &all {
            consoles.room(KEEP, HOUR).await;
            consoles.ship(*kernel, ContainerId([0; 32]));
        }
        let shipped = tokio::time::timeout(HOUR, shipper).await.unwrap();
        assert_eq!(shipped.unwrap(), all);
        // Nobody waits for ever, one for all, and for a bus that takes nothing nobody.
        let at_once = async || {
            let room = consoles.room(1, HOUR);
            tokio::time::timeout(Duration::from_millis(100), room).await
        };
        let first = (all[0], ContainerId([0; 32]));
        consoles.ship(first.0, first.1);
        assert!(at_once().await.is_err());
        consoles.room(1, Duration::from_millis(1)).await;
        at_once().await.unwrap();
        consoles.finish(first);
        consoles.ship(first.0, first.1);
        assert!(at_once().await.is_err());
        consoles.attempted(true);
        at_once().await.unwrap();
    }

    #[test]
    fn only_refusals_of_the_console_itself_end_the_attempts() {
        let refused = |words: &str| {
            ConsoleLogError::Store(StoreError::Refused {
                step: "append to a list",
                message: words.to_owned(),
            })
        };
        let mut refusals = Refusals::default();
        let passing = [
            refused("OOM command not allowed when used memory > 'maxmemory'."),
            refused("MISCONF Redis is configured to save RDB snapshots"),
            refused("NOREPLICAS Not enough good replicas to write."),
            refused("READONLY You can't write against a read only replica."),
            refused("LOADING Redis is loading the dataset in memory"),
            refused("BUSY Redis is busy running a script."),
            ConsoleLogError::Store(StoreError::Resting),
            ConsoleLogError::Store(StoreError::Busy),
        ];
        for err in passing.iter().cycle().take(100) {
            assert!(!refusals.is_last(err), "{err:?}");
        }
        let lasting = [
            "WRONGTYPE Operation against a key holding the wrong kind of value",
            "NOPERM this user has no permissions to run the 'rpush' command",
            "ERR unknown command",
        ];
        for words in lasting {
            let mut refusals = Refusals::default();
            let given_up = (1..=10).find(|_| refusals.is_last(&refused(words)));
            assert_eq!(given_up, Some(REFUSALS), "{words}");
        }
    }

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
