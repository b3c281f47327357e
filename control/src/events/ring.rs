//! The last events, kept in the process for those who poll.
//!
//! Invariant: sequence numbers rise by one; the ring holds the newest `capacity` of them.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::{Event, EventRecord};

/// A bounded ring with a way to wait for the next entry.
#[derive(Debug)]
pub struct Ring {
    entries: Mutex<VecDeque<EventRecord>>,
    capacity: usize,
    newest: watch::Sender<u64>,
}

impl Ring {
    /// An empty ring for `capacity` entries (at least one).
    pub fn new(capacity: usize) -> Ring {
        Ring {
            entries: Mutex::new(VecDeque::with_capacity(capacity.max(1))),
            capacity: capacity.max(1),
            newest: watch::Sender::new(0),
        }
    }

    /// Adds an event and shows it to `deliver` while the order is held.
    pub(super) fn push(&self, event: Event, deliver: impl FnOnce(&EventRecord)) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let seq = *self.newest.borrow() + 1;
        let occurrence = EventRecord {
            seq,
            at: SystemTime::now(),
            event,
        };
        deliver(&occurrence);
        if entries.len() == self.capacity {
            entries.pop_front();
        }
        entries.push_back(occurrence);
        self.newest.send_replace(seq);
    }

    /// Up to `limit` entries after `seq`, oldest first, and the number to ask with next time.
    pub fn after(&self, seq: u64, limit: usize) -> (Vec<EventRecord>, u64) {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let found: Vec<EventRecord> = entries
            .iter()
            .filter(|occurrence| occurrence.seq > seq)
            .take(limit)
            .cloned()
            .collect();
        let next = found.last().map_or(seq, |last| last.seq);
        (found, next)
    }

    /// As `after`, but waits up to `wait` for the first entry.
    pub async fn wait_after(
        &self,
        seq: u64,
        limit: usize,
        wait: Duration,
    ) -> (Vec<EventRecord>, u64) {
        let mut newest = self.newest.subscribe();
        // The sender lives as long as the ring; a timeout simply answers with nothing.
        let _ = tokio::time::timeout(wait, newest.wait_for(|newest| *newest > seq)).await;
        self.after(seq, limit)
    }

    /// The newest sequence number.
    pub fn newest(&self) -> u64 {
        *self.newest.borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started() -> Event {
        Event::AgentStarted {
            reason: "self-started",
        }
    }

    #[tokio::test]
    async fn a_waiting_reader_gets_the_next_event() {
        let ring = std::sync::Arc::new(Ring::new(4));
        let waiting = {
            let ring = ring.clone();
            tokio::spawn(async move { ring.wait_after(0, 10, Duration::from_secs(30)).await })
        };
        ring.push(started(), |_| ());
        let (found, next) = waiting.await.unwrap();
        assert_eq!((found.len(), next), (1, 1));
    }

    #[tokio::test]
    async fn a_wait_without_events_answers_nothing() {
        let ring = Ring::new(4);
        let (found, next) = ring.wait_after(7, 10, Duration::from_millis(5)).await;
        assert!(found.is_empty());
        assert_eq!(next, 7);
    }

    #[test]
    fn old_entries_make_room() {
        let ring = Ring::new(3);
        for _ in 0..5 {
            ring.push(started(), |_| ());
        }
        let (found, next) = ring.after(0, 2);
        assert_eq!(found.iter().map(|o| o.seq).collect::<Vec<_>>(), vec![3, 4]);
        assert_eq!(next, 4);
        assert_eq!(ring.newest(), 5);
    }
}
