//! The messages that wait for the bus.
//!
//! In: messages in the order of emission. Out: the oldest ones, until they are said to be sent.
//! Invariants: count and bytes are bounded for each way of keeping; what is left out is counted;
//! of a `Newest` key one message waits, at the place of the first; other messages keep their order.

use std::collections::{HashSet, VecDeque};

use super::message::{Message, Retention};

/// A waiting message.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Rises with every message taken in, over the lives of the process.
    pub seq: u64,
    /// How often the server refused it.
    pub refusals: u32,
    /// The message.
    pub message: Message,
}

/// How much may wait of one kind.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// Messages.
    pub count: usize,
    /// Their sizes summed up.
    pub bytes: usize,
}

/// The bounds of a queue.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of lifecycle events.
    pub journalled: Bound,
    /// Of what sessions are doing.
    pub doing: Bound,
    /// Of other events.
    pub queued: Bound,
    /// Of reports.
    pub newest: Bound,
}

impl Default for Bounds {
    /// A stream keeps about 128 entries: more than this is of no use to a manager that comes back.
    fn default() -> Self {
        Self {
            journalled: Bound {
                count: 4096,
                bytes: 16 << 20,
            },
            doing: Bound {
                count: 1024,
                bytes: 1 << 20,
            },
            queued: Bound {
                count: 1024,
                bytes: 4 << 20,
            },
            newest: Bound {
                count: 256,
                bytes: 8 << 20,
            },
        }
    }
}

/// The class of what sessions are doing.
const DOING: usize = 3;

#[derive(Clone, Copy, Debug, Default)]
struct Held {
    count: usize,
    bytes: usize,
}

/// The queue; its owner does the locking.
#[derive(Debug)]
pub struct Queue {
    entries: VecDeque<Entry>,
    bounds: Bounds,
    held: [Held; 4],
    next: u64,
    left_out: u64,
}

impl Queue {
    /// An empty queue whose first message gets the number `next`.
    #[must_use]
    pub fn new(bounds: Bounds, next: u64) -> Self {
        Self {
            entries: VecDeque::new(),
            bounds,
            held: [Held::default(); 4],
            next,
            left_out: 0,
        }
    }

    /// Takes in a message. Answers its number and the journalled messages that had to go for it.
    pub fn push(&mut self, message: Message) -> (u64, Vec<u64>) {
        let seq = self.next;
        self.next += 1;
        self.insert(Entry {
            seq,
            refusals: 0,
            message,
        });
        (seq, self.shrink(seq))
    }

    /// Puts back a message of an earlier life; these come before all others.
    pub fn restore(&mut self, seq: u64, message: Message) -> Vec<u64> {
        self.next = self.next.max(seq + 1);
        self.insert(Entry {
            seq,
            refusals: 0,
            message,
        });
        self.shrink(seq)
    }

    fn insert(&mut self, entry: Entry) {
        let class = class(&entry.message);
        if let Retention::Newest(_) = entry.message.keeping
            && let Some(old) = self
                .entries
                .iter_mut()
                .find(|old| old.message.keeping == entry.message.keeping)
        {
            let held = &mut self.held[class];
            held.bytes = held.bytes - old.message.size() + entry.message.size();
            *old = entry;
            return;
        }
        self.held[class].count += 1;
        self.held[class].bytes += entry.message.size();
        self.entries.push_back(entry);
    }

    /// Drops the oldest of each kind that is over its bound, of what sessions are doing first what a
    /// later one replaces; never the newcomer itself.
    fn shrink(&mut self, newcomer: u64) -> Vec<u64> {
        let bounds = [
            self.bounds.journalled,
            self.bounds.queued,
            self.bounds.newest,
            self.bounds.doing,
        ];
        let mut dropped = Vec::new();
        for (class_of, bound) in bounds.into_iter().enumerate() {
            while self.held[class_of].count > bound.count || self.held[class_of].bytes > bound.bytes
            {
                let oldest = || {
                    let goes =
                        |entry: &Entry| class(&entry.message) == class_of && entry.seq != newcomer;
                    self.entries.iter().position(goes)
                };
                let replaced = match class_of {
                    DOING => self.oldest_replaced(),
                    _ => None,
                };
                let Some(at) = replaced.or_else(oldest) else {
                    break;
                };
                if let Some(entry) = self.take(at) {
                    self.left_out += 1;
                    if entry.message.keeping.is_journalled() {
                        dropped.push(entry.seq);
                    }
                }
            }
        }
        dropped
    }

    /// Where the oldest word on a session lies that a later one follows.
    fn oldest_replaced(&self) -> Option<usize> {
        let mut later = HashSet::new();
        let mut found = None;
        for (at, entry) in self.entries.iter().enumerate().rev() {
            if class(&entry.message) == DOING && !later.insert(&entry.message.args) {
                found = Some(at);
            }
        }
        found
    }

    fn take(&mut self, at: usize) -> Option<Entry> {
        let entry = self.entries.remove(at)?;
        let held = &mut self.held[class(&entry.message)];
        held.count -= 1;
        held.bytes -= entry.message.size();
        Some(entry)
    }

    /// Copies of the oldest messages: at most `count`, and few enough to stay within `bytes`.
    #[must_use]
    pub fn oldest(&self, count: usize, bytes: usize) -> Vec<Entry> {
        copies(self.entries.iter().take(count), bytes)
    }

    /// The same of reports alone: of each the newest waits.
    #[must_use]
    pub fn reports(&self, count: usize, bytes: usize) -> Vec<Entry> {
        let is_report = |entry: &&Entry| matches!(entry.message.keeping, Retention::Newest(_));
        copies(self.entries.iter().filter(is_report).take(count), bytes)
    }

    /// Copies of those of these messages that wait.
    #[must_use]
    pub fn of(&self, seqs: &[u64]) -> Vec<Entry> {
        let is_one = |entry: &&Entry| seqs.contains(&entry.seq);
        self.entries.iter().filter(is_one).cloned().collect()
    }

    /// Forgets messages that were sent, or are given up.
    pub fn remove(&mut self, seqs: &[u64]) {
        // They are the oldest ones, in order, but for those replaced or dropped meanwhile.
        for seq in seqs {
            if let Some(at) = self.entries.iter().position(|entry| entry.seq == *seq) {
                self.take(at);
            }
        }
    }

    /// Notes a refusal; answers how often that message was refused.
    pub fn refuse(&mut self, seq: u64) -> u32 {
        match self.entries.iter_mut().find(|entry| entry.seq == seq) {
            Some(entry) => {
                entry.refusals += 1;
                entry.refusals
            }
            None => 0,
        }
    }

    /// How many wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many messages were left out for want of room.
    #[must_use]
    pub fn left_out(&self) -> u64 {
        self.left_out
    }
}

/// Copies of the first of these, few enough to stay within `bytes`; of one at least.
fn copies<'a>(entries: impl Iterator<Item = &'a Entry>, bytes: usize) -> Vec<Entry> {
    let mut sum = 0;
    let mut taken = Vec::new();
    for entry in entries {
        sum += entry.message.size();
        if sum > bytes && !taken.is_empty() {
            break;
        }
        taken.push(entry.clone());
    }
    taken
}

fn class(message: &Message) -> usize {
    match message.keeping {
        Retention::Journalled => 0,
        Retention::Queued => 1,
        Retention::Newest(_) => 2,
        Retention::JournalledDoing => DOING,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn message(name: &str, keeping: Retention) -> Message {
        Message {
            name: name.into(),
            args: Bytes::from_static(b"\x90"),
            anycast: true,
            broadcast: false,
            cache: None,
            keeping,
        }
    }

    fn names(queue: &Queue) -> Vec<String> {
        queue
            .oldest(usize::MAX, usize::MAX)
            .into_iter()
            .map(|entry| entry.message.name)
            .collect()
    }

    fn small() -> Queue {
        let bound = |count| Bound {
            count,
            bytes: 1 << 20,
        };
        let bounds = Bounds {
            journalled: bound(2),
            doing: bound(3),
            queued: bound(2),
            newest: bound(2),
        };
        Queue::new(bounds, 7)
    }

    #[test]
    fn each_kind_overflows_alone_and_the_oldest_goes() {
        let mut queue = small();
        queue.push(message("j1", Retention::Journalled));
        for n in 1..=3 {
            queue.push(message(&format!("q{n}"), Retention::Queued));
        }
        assert_eq!(names(&queue), ["j1", "q2", "q3"]);
        queue.push(message("j2", Retention::Journalled));
        let (seq, dropped) = queue.push(message("j3", Retention::Journalled));
        assert_eq!((seq, dropped), (12, vec![7]));
        assert_eq!(names(&queue), ["q2", "q3", "j2", "j3"]);
        assert_eq!(queue.left_out(), 2);
    }

    #[test]
    fn the_last_word_on_a_session_stays_longest() {
        let mut queue = small();
        let doing = |name: &str, session: &'static str| Message {
            args: Bytes::from_static(session.as_bytes()),
            ..message(name, Retention::JournalledDoing)
        };
        queue.push(message("j1", Retention::Journalled));
        queue.push(doing("a started", "a"));
        queue.push(doing("a finished", "a"));
        queue.push(doing("b started", "b"));
        assert_eq!(queue.left_out(), 0);
        let (_, dropped) = queue.push(doing("b finished", "b"));
        assert_eq!(dropped, [8], "the start of a");
        let (_, dropped) = queue.push(doing("c started", "c"));
        assert_eq!(
            dropped,
            [10],
            "the start of b, although the end of a is older"
        );
        assert_eq!(
            names(&queue),
            ["j1", "a finished", "b finished", "c started"]
        );
        let (_, dropped) = queue.push(doing("d started", "d"));
        assert_eq!(dropped, [9], "none is replaced: the oldest");
        assert_eq!(queue.left_out(), 3);
    }

    #[test]
    fn the_newest_report_takes_the_place_of_the_first() {
        let mut queue = small();
        let beat = || message("beat", Retention::Newest("beat".into()));
        let (first, _) = queue.push(beat());
        queue.push(message("q", Retention::Queued));
        let sent = queue.oldest(1, usize::MAX);
        let (second, _) = queue.push(beat());
        assert_eq!(names(&queue), ["beat", "q"]);
        // The first one was sent meanwhile: the second still waits.
        assert_eq!(sent[0].seq, first);
        queue.remove(&[first]);
        assert_eq!(names(&queue), ["beat", "q"]);
        queue.remove(&[second]);
        assert_eq!(names(&queue), ["q"]);
        assert_eq!(queue.left_out(), 0);
    }

    #[test]
    fn reports_are_found_behind_others() {
        let mut queue = small();
        queue.push(message("j", Retention::Journalled));
        queue.push(message("beat", Retention::Newest("beat".into())));
        queue.push(message("q", Retention::Queued));
        queue.push(message("task", Retention::Newest("task".into())));
        let names = |count| {
            let reports = queue.reports(count, usize::MAX);
            reports
                .into_iter()
                .map(|it| it.message.name)
                .collect::<Vec<_>>()
        };
        assert_eq!(names(9), ["beat", "task"]);
        assert_eq!(names(1), ["beat"]);
    }

    #[test]
    fn bytes_are_bounded_and_counted_back() {
        let mut queue = small();
        queue.bounds.queued.bytes = 1000;
        let large = |name: &str| Message {
            args: Bytes::from(vec![0; 600]),
            ..message(name, Retention::Queued)
        };
        queue.push(large("a"));
        queue.push(large("b"));
        assert_eq!(names(&queue), ["b"]);
        // One that is over the bound alone is still taken in.
        queue.push(Message {
            args: Bytes::from(vec![0; 5000]),
            ..message("c", Retention::Queued)
        });
        assert_eq!(names(&queue), ["c"]);
        let seq = queue.oldest(1, 1)[0].seq;
        queue.remove(&[seq]);
        assert!(queue.is_empty());
        assert_eq!(queue.held[1].bytes, 0);
    }

    #[test]
    fn a_batch_stays_within_its_bytes() {
        let mut queue = small();
        queue.bounds.queued.count = 10;
        for n in 0..5 {
            queue.push(message(&format!("q{n}"), Retention::Queued));
        }
        assert_eq!(queue.oldest(3, usize::MAX).len(), 3);
        assert_eq!(queue.oldest(5, 300).len(), 2);
        assert_eq!(queue.oldest(5, 1).len(), 1);
    }
}
