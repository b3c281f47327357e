//! The journalled outbox: lifecycle events on disk until they have been sent.
//!
//! In: messages with their numbers, the numbers of a batch that is about to be sent, and later those
//! that were sent. Out: after a restart, the messages that were not, and the batch of them that may
//! have been. One file of JSON lines, appended by its own thread and replaced by a
//! shorter one when most of it is done. Invariants: the file is private; a line is written before
//! the line that says it was sent; what a kill cut short is skipped; after a write that failed the
//! file is written anew before anything is added to it, and until then nobody is told that it holds
//! what it should; a full disk keeps no agent from starting. Nothing is flushed to the disk
//! device: after a power loss no kernel runs, and the next start tells that of each of them.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::message::{Message, Retention};
use crate::files::replace_file;

/// Lines waiting for the disk; more than the queue can hold.
const LINES: usize = 8192;
/// Below this size the file is not shortened.
const SMALL: u64 = 256 << 10;
/// Pause after a failed write: writing all of it again is dear.
const MEND_PAUSE: Duration = Duration::from_secs(5);

/// The outbox could not be opened.
#[derive(Debug, Error)]
pub enum OutboxError {
    /// Its file, or the directory of that.
    #[error("cannot use {path}, which holds the events that wait for the bus; see that it is a file this user may write, or move it away", path = path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its thread.
    #[error("cannot start the writer of the events that wait for the bus")]
    Thread(#[source] io::Error),
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// A message that has to be sent.
    Send {
        seq: u64,
        name: String,
        args: String,
        anycast: bool,
        broadcast: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cache: Option<String>,
        /// It tells what a session is doing.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        doing: bool,
    },
    /// A batch that is sent now; it is in the stream after this entry, or not at all.
    Trying { seqs: Vec<u64>, after: String },
    /// Messages that are done.
    Done { seqs: Vec<u64> },
}

enum Order {
    Append(u64, String),
    InDoubtBatch(InDoubtBatch),
    Done(Vec<u64>),
    Settle(SyncSender<bool>),
}

/// A batch whose fate is not known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InDoubtBatch {
    /// Its messages that are kept here.
    pub seqs: Vec<u64>,
    /// The newest entry of the stream before it was sent.
    pub after: String,
}

/// The outbox of one agent.
#[derive(Debug)]
pub struct Outbox {
    orders: Mutex<Option<SyncSender<Order>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    left_out: AtomicU64,
}

/// What an earlier life left.
#[derive(Debug, Default)]
pub struct RecoveredOutbox {
    /// Messages to send, oldest first.
    pub messages: Vec<(u64, Message)>,
    /// The batch that was sent last, with what of it was not done. It was carried out as a whole or
    /// not at all.
    pub trying: Option<InDoubtBatch>,
    /// The number after the highest one seen.
    pub next: u64,
    /// Lines that could not be read.
    pub damaged: usize,
}

impl Outbox {
    /// Opens `outbox.jsonl` in `dir` and reads what waits there. On a full disk the file stays as
    /// it is until there is room. Blocks.
    ///
    /// # Errors
    /// A directory or file that cannot be used.
    pub fn open(dir: &Path) -> Result<(Self, RecoveredOutbox), OutboxError> {
        Self::open_with(dir, SMALL)
    }

    fn open_with(dir: &Path, small: u64) -> Result<(Self, RecoveredOutbox), OutboxError> {
        let path = dir.join("outbox.jsonl");
        let failed = |source| OutboxError::File {
            path: path.clone(),
            source,
        };
        let StoredLines {
            pending,
            trying,
            next,
            damaged,
        } = read(&path).map_err(failed)?;
        let messages = pending
            .iter()
            .filter_map(|(seq, line)| Some((*seq, message_of(line)?)))
            .collect();
        let left = trying.clone();
        let (orders, receiver) = sync_channel(LINES);
        let mut writer = Writer {
            size: 0,
            file: None,
            path: path.clone(),
            pending,
            trying,
            small,
            failures: 0,
            broken: None,
        };
        // A fresh file at each start: what is done, and a line cut short, go.
        match writer.try_rewrite() {
            Err(err) if is_want_of_room(&err) => writer.failed(&err),
            written => written.map_err(failed)?,
        }
        let writer = std::thread::Builder::new()
            .name("outbox".into())
            .spawn(move || writer.run(&receiver))
            .map_err(OutboxError::Thread)?;
        Ok((
            Self {
                orders: Mutex::new(Some(orders)),
                writer: Mutex::new(Some(writer)),
                left_out: AtomicU64::new(0),
            },
            RecoveredOutbox {
                messages,
                trying: left,
                next,
                damaged,
            },
        ))
    }

    /// Keeps a message until it is done. Never waits.
    pub fn append(&self, seq: u64, message: &Message) {
        let line = Line::Send {
            seq,
            name: message.name.clone(),
            args: STANDARD.encode(&message.args),
            anycast: message.anycast,
            broadcast: message.broadcast,
            cache: message.cache.clone(),
            doing: message.keeping == Retention::JournalledDoing,
        };
        // A struct of texts and numbers always has a JSON form.
        if let Ok(line) = serde_json::to_string(&line) {
            self.order(Order::Append(seq, line));
        }
    }

    /// Says that a batch is sent now, so that the next life does not send it again unseen. The
    /// messages of the batch before are done, or certain not to have been carried out. Never waits.
    pub fn trying(&self, batch: InDoubtBatch) {
        if !batch.seqs.is_empty() {
            self.order(Order::InDoubtBatch(batch));
        }
    }

    /// Says that messages were sent, or given up. Never waits.
    pub fn done(&self, seqs: Vec<u64>) {
        if !seqs.is_empty() {
            self.order(Order::Done(seqs));
        }
    }

    /// Waits until everything so far is in the file, at most `limit`; `false` also when the disk
    /// did not take it. Blocks.
    pub fn settle(&self, limit: Duration) -> bool {
        let (written, wait) = sync_channel(1);
        self.order(Order::Settle(written));
        wait.recv_timeout(limit).unwrap_or(false)
    }

    fn order(&self, order: Order) {
        let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = orders
            .as_ref()
            .is_some_and(|orders| orders.try_send(order).is_ok());
        if !taken {
            let count = self.left_out.fetch_add(1, Ordering::Relaxed) + 1;
            if count.is_power_of_two() {
                tracing::warn!(
                    count,
                    "the disk cannot keep up with the outbox; a kill now could lose or repeat events"
                );
            }
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        // Without its queue the writer ends.
        let orders = self
            .orders
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(orders);
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer
            && writer.join().is_err()
        {
            tracing::error!("the writer of the outbox panicked");
        }
    }
}

struct Writer {
    path: PathBuf,
    /// `None` before the first write that succeeds.
    file: Option<File>,
    size: u64,
    pending: BTreeMap<u64, Arc<str>>,
    /// With messages that are pending, or nothing.
    trying: Option<InDoubtBatch>,
    small: u64,
    failures: u64,
    /// When a write failed last: the file lacks lines, and its last one may be cut short.
    broken: Option<Instant>,
}

impl Writer {
    fn run(&mut self, orders: &Receiver<Order>) {
        loop {
            let order = match self.broken {
                None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(_) => orders.recv_timeout(MEND_PAUSE),
            };
            match order {
                Ok(Order::Append(seq, line)) => {
                    self.pending.insert(seq, line.clone().into());
                    self.add(&line);
                }
                Ok(Order::InDoubtBatch(batch)) => {
                    let line = line_of(&batch);
                    self.trying = Some(batch);
                    self.add(&line);
                }
                Ok(Order::Done(seqs)) => self.finish(&seqs),
                Ok(Order::Settle(written)) => {
                    self.mend(true);
                    // The one who asked may have stopped waiting.
                    let _ = written.try_send(self.broken.is_none());
                }
                Err(RecvTimeoutError::Timeout) => self.mend(true),
                Err(RecvTimeoutError::Disconnected) => return self.mend(true),
            }
        }
    }

    /// Adds a line; what it says is in `pending` already, which goes into a file that is written
    /// anew.
    fn add(&mut self, line: &str) {
        if self.broken.is_some() {
            return self.mend(false);
        }
        let mut bytes = Vec::with_capacity(line.len() + 1);
        bytes.extend_from_slice(line.as_bytes());
        bytes.push(b'\n');
        let written = match &mut self.file {
            Some(file) => file.write_all(&bytes),
            None => return self.rewrite(),
        };
        match written {
            Ok(()) => self.size += bytes.len() as u64,
            Err(err) => self.failed(&err),
        }
    }

    fn finish(&mut self, seqs: &[u64]) {
        for seq in seqs {
            self.pending.remove(seq);
        }
        self.trying = unfinished(self.trying.take(), &self.pending);
        let left: usize = self.pending.values().map(|line| line.len() + 1).sum();
        if self.size > self.small && (left as u64) < self.size / 4 {
            return self.rewrite();
        }
        // A struct of numbers always has a JSON form.
        if let Ok(line) = serde_json::to_string(&Line::Done {
            seqs: seqs.to_vec(),
        }) {
            self.add(&line);
        }
    }

    /// Writes a broken file anew; not again and again while that fails, unless `now`.
    fn mend(&mut self, now: bool) {
        if let Some(since) = self.broken
            && (now || since.elapsed() >= MEND_PAUSE)
        {
            self.rewrite();
        }
    }

    fn rewrite(&mut self) {
        match self.try_rewrite() {
            Ok(()) => {
                if self.broken.take().is_some() {
                    tracing::info!(path = %self.path.display(), "the outbox is whole again");
                }
            }
            Err(err) => self.failed(&err),
        }
    }

    fn try_rewrite(&mut self) -> io::Result<()> {
        if let Some(dir) = self.path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let content = joined(&self.pending, self.trying.as_ref());
        replace_file(&self.path, &content)?;
        self.file = Some(append_to(&self.path)?);
        self.size = content.len() as u64;
        Ok(())
    }

    fn failed(&mut self, err: &io::Error) {
        self.broken = Some(Instant::now());
        self.failures += 1;
        if self.failures.is_power_of_two() {
            tracing::warn!(%err, path = %self.path.display(), count = self.failures,
                "cannot write the outbox; a kill now could lose or repeat events, see whether its disk is full");
        }
    }
}

/// Room comes back without anybody touching the file.
fn is_want_of_room(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

fn append_to(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
}

type Pending = BTreeMap<u64, Arc<str>>;

fn joined(pending: &Pending, trying: Option<&InDoubtBatch>) -> Vec<u8> {
    let mut content = Vec::new();
    let trying = trying.map(line_of);
    for line in pending.values().map(AsRef::as_ref).chain(trying.as_deref()) {
        content.extend_from_slice(line.as_bytes());
        content.push(b'\n');
    }
    content
}

fn line_of(batch: &InDoubtBatch) -> String {
    let line = Line::Trying {
        seqs: batch.seqs.clone(),
        after: batch.after.clone(),
    };
    // A struct of texts and numbers always has a JSON form.
    serde_json::to_string(&line).unwrap_or_default()
}

/// What of a batch is pending.
fn unfinished(batch: Option<InDoubtBatch>, pending: &Pending) -> Option<InDoubtBatch> {
    let mut batch = batch?;
    batch.seqs.retain(|seq| pending.contains_key(seq));
    (!batch.seqs.is_empty()).then_some(batch)
}

struct StoredLines {
    pending: Pending,
    trying: Option<InDoubtBatch>,
    next: u64,
    damaged: usize,
}

fn read(path: &Path) -> io::Result<StoredLines> {
    let mut pending = Pending::new();
    let mut trying = None;
    let mut next = 1;
    let mut damaged = 0;
    let file = match File::open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            return Ok(StoredLines {
                pending,
                trying,
                next,
                damaged,
            });
        }
        Err(err) => return Err(err),
    };
    for line in BufReader::new(file).split(b'\n') {
        let line = line?;
        match serde_json::from_slice(&line) {
            Ok(Line::Send { seq, .. }) => {
                next = next.max(seq.saturating_add(1));
                pending.insert(seq, String::from_utf8_lossy(&line).into());
            }
            Ok(Line::Trying { seqs, after }) => trying = Some(InDoubtBatch { seqs, after }),
            Ok(Line::Done { seqs }) => {
                for seq in seqs {
                    next = next.max(seq.saturating_add(1));
                    pending.remove(&seq);
                }
            }
            Err(_) => damaged += 1,
        }
    }
    Ok(StoredLines {
        trying: unfinished(trying, &pending),
        pending,
        next,
        damaged,
    })
}

fn message_of(line: &str) -> Option<Message> {
    match serde_json::from_str(line).ok()? {
        Line::Send {
            name,
            args,
            anycast,
            broadcast,
            cache,
            doing,
            ..
        } => Some(Message {
            name,
            args: STANDARD.decode(args).ok()?.into(),
            anycast,
            broadcast,
            cache,
            keeping: match doing {
                true => Retention::JournalledDoing,
                false => Retention::Journalled,
            },
        }),
        Line::Trying { .. } | Line::Done { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use bytes::Bytes;

    use super::*;

    fn message(n: u8) -> Message {
        Message {
            name: format!("kernel_{n}"),
            args: Bytes::from(vec![n; 40]),
            anycast: true,
            broadcast: n.is_multiple_of(2),
            cache: None,
            keeping: match n {
                4 => Retention::JournalledDoing,
                _ => Retention::Journalled,
            },
        }
    }

    const LIMIT: Duration = Duration::from_secs(30);

    #[test]
    fn what_is_not_done_comes_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("outbox");
        let (outbox, found) = Outbox::open(&place).unwrap();
        assert_eq!((found.messages.len(), found.next), (0, 1));
        for n in 1..=5 {
            outbox.append(u64::from(n), &message(n));
        }
        outbox.done(vec![1, 3]);
        assert!(outbox.settle(LIMIT));
        let file = place.join("outbox.jsonl");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&place)), (0o600, 0o700));
        // As after a kill: the file is read while the old writer is still there.
        let (again, found) = Outbox::open(&place).unwrap();
        assert_eq!(found.next, 6);
        let expected: Vec<_> = [2, 4, 5]
            .map(|n| (u64::from(n), message(n)))
            .into_iter()
            .collect();
        assert_eq!(found.messages, expected);
        again.done(vec![2, 4, 5]);
        drop(again);
        let (_, found) = Outbox::open(&place).unwrap();
        assert_eq!((found.messages.len(), found.next), (0, 6));
    }

    #[test]
    fn the_batch_that_was_being_sent_is_known_to_the_next_life() {
        let dir = tempfile::tempdir().unwrap();
        let trying = |seqs: &[u64], after: &str| InDoubtBatch {
            seqs: seqs.to_vec(),
            after: after.into(),
        };
        let (outbox, found) = Outbox::open(dir.path()).unwrap();
        assert_eq!(found.trying, None);
        for n in 1..=4 {
            outbox.append(u64::from(n), &message(n));
        }
        outbox.trying(trying(&[1, 2], "5-0"));
        outbox.done(vec![1, 2]);
        drop(outbox);
        let (outbox, found) = Outbox::open(dir.path()).unwrap();
        assert_eq!(found.trying, None, "all of it is done");
        outbox.trying(trying(&[3], "7-0"));
        outbox.trying(trying(&[3, 4], "7-1"));
        outbox.done(vec![3]);
        drop(outbox);
        // The file is written anew at each start.
        for _ in 0..2 {
            let (_, found) = Outbox::open(dir.path()).unwrap();
            assert_eq!(found.trying, Some(trying(&[4], "7-1")));
            assert_eq!(found.messages, vec![(4, message(4))]);
        }
    }

    #[test]
    fn a_line_cut_short_is_skipped_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (outbox, _) = Outbox::open(dir.path()).unwrap();
        outbox.append(1, &message(1));
        outbox.append(2, &message(2));
        drop(outbox);
        let file = dir.path().join("outbox.jsonl");
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 10]).unwrap();
        let (outbox, found) = Outbox::open(dir.path()).unwrap();
        assert_eq!(found.damaged, 1);
        assert_eq!(found.messages, vec![(1, message(1))]);
        // The remains of the cut line do not swallow the next one.
        outbox.append(2, &message(3));
        drop(outbox);
        let (_, found) = Outbox::open(dir.path()).unwrap();
        assert_eq!((found.damaged, found.messages.len()), (0, 2));
    }

    #[test]
    fn the_file_stays_short() {
        let dir = tempfile::tempdir().unwrap();
        let (outbox, _) = Outbox::open_with(dir.path(), 2000).unwrap();
        outbox.append(1, &message(1));
        for seq in 2..2000 {
            outbox.append(seq, &message(2));
            outbox.done(vec![seq]);
            if seq % 500 == 0 {
                assert!(outbox.settle(LIMIT));
            }
        }
        assert!(outbox.settle(LIMIT));
        let size = std::fs::metadata(dir.path().join("outbox.jsonl"))
            .unwrap()
            .len();
        assert!(size < 3000, "{size}");
        drop(outbox);
        let (_, found) = Outbox::open(dir.path()).unwrap();
        assert_eq!(found.messages, vec![(1, message(1))]);
    }
}
