//! The task that brings waiting messages to the bus.
//!
//! In: the queue. Out: entries in the stream and texts on the channel, in the queue's order, but
//! for reports (the node's heartbeat), which no backlog holds up.
//! Invariants: a batch is carried out as a whole or not at all; a batch whose fate is not known is
//! looked up in the stream before it is sent again, by the next life too, so that an outage neither
//! loses nor doubles a lifecycle event; nothing is added before there is a group of managers that will read it; a backlog
//! leaves them a bounded time to do so; a message the server itself refuses again and again is given
//! up, with a line in the log, and does not hold up the others.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::Rng;
use tokio_util::sync::CancellationToken;

use super::backlog::Backlog;
use super::connection::{Command, Connection, ConnectionError, Connector, Reply};
use super::message::STREAM;
use super::queue::Entry;
use super::readers::{self, Patience, Readers};

/// Messages of one batch: the stream keeps about 128 entries, and a manager takes 64 at a time.
const BATCH: usize = 32;
/// The same while managers are behind.
const SMALL_BATCH: usize = 8;
/// Reports that go with a batch of a backlog.
const REPORTS: usize = 16;
/// Their sizes summed up.
const BATCH_BYTES: usize = 256 << 10;
/// Pause between batches of a long backlog, so that it leaves the server to others too.
const BACKLOG_PAUSE: Duration = Duration::from_millis(50);
/// Pauses between attempts: doubled up to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Entries looked through for a batch whose fate is not known.
const LOOK_BACK: u32 = 1000;
/// Refusals after which a message is given up.
const REFUSALS: u32 = 5;
/// Pause after a refusal.
const REFUSED_PAUSE: Duration = Duration::from_secs(1);

/// Brings messages to the bus until it is told to stop.
pub(super) struct Sender {
    pub(super) connector: Connector,
    pub(super) source: String,
    pub(super) waiting: Arc<Backlog>,
    pub(super) stopping: CancellationToken,
}

/// A connection and what is known of the stream.
struct Link {
    connection: Connection,
    /// The newest entry before ours.
    newest: Bytes,
    readers: Readers,
    patience: Patience,
    /// There may be more than managers have room for: it is new, or more waits than a batch takes. Until
    /// a batch has taken all that waits.
    backlog: bool,
    /// Since when managers are waited for.
    held: Option<Instant>,
}

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stepped {
    /// A batch was sent, or there was none.
    Sent,
    /// The server refused a message.
    Refused,
    /// Managers are waited for.
    Held,
}

impl Sender {
    pub(super) async fn run(self) {
        let mut link: Option<Link> = None;
        // The batch that may or may not have arrived, and the newest entry before it.
        let mut doubtful = self.waiting.take_doubtful();
        let mut pause = PAUSES.0;
        loop {
            tokio::select! {
                () = self.waiting.filled() => {}
                () = self.stopping.cancelled() => return,
            }
            let worked = tokio::select! {
                worked = self.step(&mut link, &mut doubtful) => worked,
                () = self.stopping.cancelled() => return,
            };
            let wait = match worked {
                Ok(stepped) => {
                    self.waiting.connected();
                    pause = PAUSES.0;
                    match stepped {
                        Stepped::Refused => REFUSED_PAUSE,
                        Stepped::Held => readers::look_pause(),
                        Stepped::Sent if !self.has_backlog(link.as_ref()) => continue,
                        Stepped::Sent => readers::out_of_step(BACKLOG_PAUSE),
                    }
                }
                Err(err) => {
                    link = None;
                    self.waiting.failed(&err, self.connector.endpoint());
                    let wait = pause.mul_f64(rand::rng().random_range(0.8..1.2));
                    pause = (pause * 2).min(PAUSES.1);
                    wait
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.stopping.cancelled() => return,
            }
        }
    }

    fn has_backlog(&self, link: Option<&Link>) -> bool {
        let waiting = self.waiting.len();
        waiting > BATCH || waiting > 0 && link.is_some_and(|link| link.backlog)
    }

    /// Connects if need be, clears up a doubtful batch, sends one batch. Never waits for managers:
    /// what they hold up is tried again with the next step.
    async fn step(
        &self,
        link: &mut Option<Link>,
        doubtful: &mut Option<(Vec<Entry>, Bytes)>,
    ) -> Result<Stepped, ConnectionError> {
        let link = match link {
            Some(link) => link,
            None => {
                let mut connection = self.connector.connect().await?;
                // Before anything is added: a server that comes back empty has no group.
                readers::make_group(&mut connection).await?;
                let newest = newest_entry(&mut connection).await?;
                link.insert(Link {
                    connection,
                    newest,
                    readers: Readers::default(),
                    patience: Patience::default(),
                    backlog: true,
                    held: None,
                })
            }
        };
        if let Some((batch, before)) = doubtful {
            let arrived = self.arrived(&mut link.connection, batch, before).await?;
            if arrived {
                let seqs: Vec<u64> = batch.iter().map(|entry| entry.seq).collect();
                self.waiting.done(&seqs, true);
            }
            *doubtful = None;
        }
        let mut batch = Vec::new();
        let mut stepped = Stepped::Sent;
        let mut room = BATCH;
        // All agents come back at once after an outage, each with a little.
        let waiting = self.waiting.len();
        link.backlog |= waiting > BATCH;
        if link.backlog {
            let reports = self.waiting.reports(REPORTS, BATCH_BYTES);
            if reports.len() < waiting {
                room = room_for(link).await?;
                link.backlog = room < waiting;
                if room == 0 {
                    // A node that is well is not to be taken for lost meanwhile.
                    batch = reports;
                    stepped = Stepped::Held;
                }
            } else {
                link.held = None;
            }
        }
        if room > 0 {
            batch = self.waiting.oldest(room, BATCH_BYTES);
        }
        if batch.is_empty() {
            return Ok(stepped);
        }
        let mut commands = Vec::new();
        let mut owners = Vec::new();
        for (n, entry) in batch.iter().enumerate() {
            for command in entry.message.commands(&self.source) {
                commands.push(command);
                owners.push(n);
            }
        }
        self.waiting.trying(&batch, &link.newest);
        match link.connection.run_atomically(&commands).await {
            Ok(replies) => match self.settle(&batch, &owners, replies, link) {
                true => Ok(Stepped::Refused),
                false => Ok(stepped),
            },
            Err(err) => {
                if err.is_ambiguous() {
                    *doubtful = Some((batch, link.newest.clone()));
                }
                Err(err)
            }
        }
    }

    /// Marks what was carried out; notes what the server refused one by one. Answers whether it
    /// refused any.
    fn settle(
        &self,
        batch: &[Entry],
        owners: &[usize],
        replies: Vec<Reply>,
        link: &mut Link,
    ) -> bool {
        let mut refused: Vec<Option<String>> = vec![None; batch.len()];
        for (owner, reply) in owners.iter().zip(replies) {
            match reply {
                Reply::Error(message) => refused[*owner] = Some(message),
                // Only XADD answers with bytes: the id of the new entry.
                Reply::Bytes(id) => link.newest = id,
                _ => {}
            }
        }
        let mut sent = Vec::with_capacity(batch.len());
        let mut given_up = Vec::new();
        for (entry, refusal) in batch.iter().zip(refused) {
            let Some(message) = refusal else {
                sent.push(entry.seq);
                continue;
            };
            let count = self.waiting.refuse(entry.seq);
            tracing::warn!(
                event = entry.message.name,
                err = message,
                count,
                "the bus refuses an event"
            );
            if count >= REFUSALS {
                given_up.push(entry.seq);
            }
        }
        self.waiting.done(&sent, true);
        if !given_up.is_empty() {
            tracing::error!(
                count = given_up.len(),
                "events were given up: the bus refused each of them {REFUSALS} times; look at the key \"events\" of database 4"
            );
            self.waiting.done(&given_up, false);
        }
        sent.len() < batch.len()
    }

    /// Whether a batch lies in the stream after `before`. A batch is atomic: one entry tells all.
    async fn arrived(
        &self,
        connection: &mut Connection,
        batch: &[Entry],
        before: &Bytes,
    ) -> Result<bool, ConnectionError> {
        let ours = |entry: &&Entry| entry.message.anycast && entry.message.keeping.is_journalled();
        let Some(mark) = batch
            .iter()
            .find(ours)
            .or_else(|| batch.iter().find(|entry| entry.message.anycast))
        else {
            // Broadcasts are not stored: there is nothing to find, and hearing one twice is harmless.
            return Ok(false);
        };
        let mut after = b"(".to_vec();
        after.extend_from_slice(before);
        let entries = connection
            .ask(
                Command::new("XRANGE")
                    .arg(STREAM)
                    .arg(after)
                    .arg("+")
                    .arg("COUNT")
                    .number(LOOK_BACK),
            )
            .await?;
        let found = entries
            .array()
            .unwrap_or_default()
            .iter()
            .any(|entry| mark.message.is_entry(&self.source, entry));
        Ok(found)
    }
}

/// How many events of a backlog may be added now; none while managers are left time to read.
async fn room_for(link: &mut Link) -> Result<usize, ConnectionError> {
    let unread = link.readers.unread(&mut link.connection).await?;
    let since = *link.held.get_or_insert_with(Instant::now);
    if !link.patience.lets_go(unread, since.elapsed()) {
        return Ok(0);
    }
    link.held = None;
    Ok(match readers::are_behind(unread) {
        true => SMALL_BATCH,
        false => BATCH,
    })
}

/// The newest entry of the stream; the start of time when there is none.
async fn newest_entry(connection: &mut Connection) -> Result<Bytes, ConnectionError> {
    let newest = connection
        .ask(
            Command::new("XREVRANGE")
                .arg(STREAM)
                .arg("+")
                .arg("-")
                .arg("COUNT")
                .number(1),
        )
        .await?;
    let id = newest
        .array()
        .and_then(|entries| entries.first())
        .and_then(Reply::array)
        .and_then(|parts| parts.first())
        .and_then(Reply::bytes);
    Ok(id.unwrap_or_else(|| Bytes::from_static(b"0-0")))
}
