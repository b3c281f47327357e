//! What waits for the bus, shared by those who emit and the task that sends.
//!
//! In: messages; what the sender has learned. Out: the oldest messages; the bus's state for people.
//! Invariants: taking a message in never waits; the queue and the outbox agree on what is pending.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::{Notify, watch};

use super::connection::ConnectionError;
use super::message::Message;
use super::outbox::{InDoubtBatch, Outbox, RecoveredOutbox};
use super::queue::{Bounds, Entry, Queue};
use super::settings::Endpoint;
use crate::causes::chain;

/// The bus as seen from this node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BusState {
    /// Whether the last attempt worked; `None` before the first one.
    pub connected: Option<bool>,
    /// When that became so.
    pub since: Option<SystemTime>,
    /// Why the last attempt did not work.
    pub trouble: Option<String>,
    /// Messages sent by this process.
    pub sent: u64,
    /// Messages left out for want of room, or refused too often.
    pub left_out: u64,
}

#[derive(Debug)]
pub(super) struct Backlog {
    queue: Mutex<Queue>,
    outbox: Option<Outbox>,
    /// What an earlier life was sending when it ended.
    left_trying: Mutex<Option<InDoubtBatch>>,
    filled: Notify,
    drained: Notify,
    state: watch::Sender<BusState>,
}

impl Backlog {
    pub(super) fn new(bounds: Bounds, outbox: Option<(Outbox, RecoveredOutbox)>) -> Self {
        let (outbox, left) = match outbox {
            Some((outbox, left)) => (Some(outbox), left),
            None => (None, RecoveredOutbox::default()),
        };
        let mut queue = Queue::new(bounds, left.next.max(1));
        let mut dropped = Vec::new();
        for (seq, message) in left.messages {
            dropped.extend(queue.restore(seq, message));
        }
        if let Some(outbox) = &outbox {
            outbox.done(dropped);
        }
        Self {
            queue: Mutex::new(queue),
            outbox,
            left_trying: Mutex::new(left.trying),
            filled: Notify::new(),
            drained: Notify::new(),
            state: watch::Sender::default(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message in.
    pub(super) fn push(&self, message: Message) {
        let kept = message.keeping.is_journalled().then(|| message.clone());
        let left_out = {
            let mut queue = self.queue();
            let before = queue.left_out();
            let (seq, dropped) = queue.push(message);
            if let Some(outbox) = &self.outbox {
                // Under the lock: the file has the queue's order.
                if let Some(message) = &kept {
                    outbox.append(seq, message);
                }
                outbox.done(dropped);
            }
            queue.left_out() - before
        };
        if left_out > 0 {
            self.leave_out(left_out);
        }
        self.filled.notify_one();
    }

    fn leave_out(&self, count: u64) {
        let mut total = 0;
        self.state.send_modify(|state| {
            state.left_out += count;
            total = state.left_out;
        });
        // One line per power of two: an outage cannot flood the log.
        if total.is_power_of_two() {
            tracing::warn!(
                count = total,
                "the bus cannot be reached for so long that the oldest waiting events are left out"
            );
        }
    }

    /// Waits until something waits.
    pub(super) async fn filled(&self) {
        loop {
            let notified = self.filled.notified();
            if !self.queue().is_empty() {
                return;
            }
            notified.await;
        }
    }

    /// Waits until nothing waits.
    pub(super) async fn drained(&self) {
        loop {
            let notified = self.drained.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.queue().is_empty() {
                return;
            }
            notified.await;
        }
    }

    pub(super) fn len(&self) -> usize {
        self.queue().len()
    }

    pub(super) fn oldest(&self, count: usize, bytes: usize) -> Vec<Entry> {
        self.queue().oldest(count, bytes)
    }

    pub(super) fn reports(&self, count: usize, bytes: usize) -> Vec<Entry> {
        self.queue().reports(count, bytes)
    }

    /// The batch that an earlier life was sending when it ended, and the newest entry before it; once.
    pub(super) fn take_doubtful(&self) -> Option<(Vec<Entry>, Bytes)> {
        let mut left = self
            .left_trying
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let trying = left.take()?;
        let batch = self.queue().of(&trying.seqs);
        (!batch.is_empty()).then(|| (batch, trying.after.into()))
    }

    /// Notes that a batch is sent now, after the stream's entry `after`.
    pub(super) fn trying(&self, batch: &[Entry], after: &Bytes) {
        let kept = |entry: &&Entry| entry.message.keeping.is_journalled();
        if let Some(outbox) = &self.outbox {
            outbox.trying(InDoubtBatch {
                seqs: batch.iter().filter(kept).map(|entry| entry.seq).collect(),
                after: String::from_utf8_lossy(after).into_owned(),
            });
        }
    }

    pub(super) fn refuse(&self, seq: u64) -> u32 {
        self.queue().refuse(seq)
    }

    /// Forgets messages: they were sent, or given up.
    pub(super) fn done(&self, seqs: &[u64], sent: bool) {
        if seqs.is_empty() {
            return;
        }
        let empty = {
            let mut queue = self.queue();
            queue.remove(seqs);
            queue.is_empty()
        };
        if let Some(outbox) = &self.outbox {
            outbox.done(seqs.to_vec());
        }
        let count = seqs.len() as u64;
        self.state.send_modify(|state| match sent {
            true => state.sent += count,
            false => state.left_out += count,
        });
        if empty {
            self.drained.notify_waiters();
        }
    }

    /// Notes that an attempt worked.
    pub(super) fn connected(&self) {
        let changed = self.state.send_if_modified(|state| {
            let changed = state.connected != Some(true);
            if changed {
                state.connected = Some(true);
                state.since = Some(SystemTime::now());
                state.trouble = None;
            }
            changed
        });
        if changed {
            tracing::info!(waiting = self.len(), "the event bus answers");
        }
    }

    /// Notes that an attempt failed; the first one of a row is told loudly.
    pub(super) fn failed(&self, err: &ConnectionError, endpoint: &Endpoint) {
        let words = chain(err);
        let changed = self.state.send_if_modified(|state| {
            let changed = state.connected != Some(false);
            if changed {
                state.connected = Some(false);
                state.since = Some(SystemTime::now());
            }
            state.trouble = Some(words.clone());
            changed
        });
        if changed {
            tracing::error!(
                peer = %endpoint, err = words, waiting = self.len(),
                "the event bus does not answer; events wait and the manager will count this node as lost"
            );
        } else {
            tracing::debug!(peer = %endpoint, err = words, "the event bus still does not answer");
        }
    }

    pub(super) fn state(&self) -> watch::Receiver<BusState> {
        self.state.subscribe()
    }

    pub(super) fn outbox(&self) -> Option<&Outbox> {
        self.outbox.as_ref()
    }
}
