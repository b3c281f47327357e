//! The latched cell: two slots, of which one is always whole.
//!
//! A cell owns two slots. A slot is one generation word followed by the payload words. The writer
//! only ever overwrites the slot that readers do not need, stamping it with a generation above the
//! region's committed one; storing that generation into the region's `committed` word is what makes
//! it, and every other cell stamped with it, visible. Hence:
//!
//! * a writer killed between any two stores leaves every cell readable at the old generation;
//! * the value of a cell *at* generation `c` is the slot with the largest generation not above `c`;
//! * a reader proves its copy whole by reading the slot's generation again after the copy.
//!
//! In: words of a region and payloads. Out: payloads and the generation they were written with.
//! Invariant: a slot whose generation is not above `committed` and is the larger of the two such is
//! never written.
//!
//! The words are atomics, read and written relaxed between fences, so a torn copy is possible (and
//! detected) but never a data race. The pairing is the one of the kernel's `seqcount_latch`
//! (Documentation/locking/seqlock.rst), with the sequence replaced by generations.

use crate::sync::{AtomicU64, Ordering, fence};

/// Words in front of each slot's payload: its generation.
pub(crate) const SLOT_HEADER_WORDS: usize = 1;

/// The words two slots of `payload_words` take.
pub(crate) const fn words_for(payload_words: usize) -> usize {
    2 * (SLOT_HEADER_WORDS + payload_words)
}

/// What a single read of a cell found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReadOutcome {
    /// Never written, or nothing of it is committed yet.
    Empty,
    /// A whole payload, written with this generation, was handed to the closure.
    Whole(u64),
    /// Overwritten while it was copied: newer generations were committed meanwhile. Read again.
    Moved,
}

/// One latched cell inside a region's words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cell<'a> {
    words: &'a [AtomicU64],
    slot_words: usize,
}

impl<'a> Cell<'a> {
    /// A cell over exactly [`words_for`]`(payload_words)` words; `None` when the length differs.
    pub(crate) fn over(words: &'a [AtomicU64], payload_words: usize) -> Option<Self> {
        (words.len() == words_for(payload_words)).then_some(Self {
            words,
            slot_words: SLOT_HEADER_WORDS + payload_words,
        })
    }

    fn stamp(&self, slot: usize) -> &'a AtomicU64 {
        &self.words[slot * self.slot_words]
    }

    fn payload(&self, slot: usize) -> &'a [AtomicU64] {
        let start = slot * self.slot_words + SLOT_HEADER_WORDS;
        &self.words[start..start + self.slot_words - SLOT_HEADER_WORDS]
    }

    /// Reads the cell's value at generation `committed`, which the caller has loaded with
    /// acquire ordering. `copy` gets the payload words of the right slot and must only load from
    /// them; what it made of them counts only when the answer is [`ReadOutcome::Whole`].
    pub(crate) fn read(&self, committed: u64, copy: impl FnOnce(&[AtomicU64])) -> ReadOutcome {
        // Relaxed: the acquire load of `committed` already orders every stamp up to it before us.
        let stamps = [
            self.stamp(0).load(Ordering::Relaxed),
            self.stamp(1).load(Ordering::Relaxed),
        ];
        let slot = match (stamps[0] <= committed, stamps[1] <= committed) {
            (true, true) => usize::from(stamps[1] > stamps[0]),
            (true, false) => 0,
            (false, true) => 1,
            (false, false) => return ReadOutcome::Moved,
        };
        let stamp = stamps[slot];
        if stamp != 0 {
            copy(self.payload(slot));
        }
        // Pairs with the release fence in `write`: if the copy saw a word of a newer payload, the
        // load below sees the newer stamp. Also for who copies nothing: the two stamps were not loaded
        // at once, and may belong to different moments.
        fence(Ordering::Acquire);
        if self.stamp(slot).load(Ordering::Relaxed) != stamp {
            return ReadOutcome::Moved;
        }
        if stamp == 0 {
            ReadOutcome::Empty
        } else {
            ReadOutcome::Whole(stamp)
        }
    }

    /// The generation of the cell's value at `committed`, loaded as for [`Cell::read`]; 0 where that is
    /// [`ReadOutcome::Empty`]. Who has copied a payload of this generation needs no other copy. `None` is
    /// [`ReadOutcome::Moved`].
    pub(crate) fn generation(&self, committed: u64) -> Option<u64> {
        match self.read(committed, |_| ()) {
            ReadOutcome::Whole(generation) => Some(generation),
            ReadOutcome::Empty => Some(0),
            ReadOutcome::Moved => None,
        }
    }

    /// Writes `payload` under `generation`, which must be above `committed` and not yet committed.
    /// A payload shorter than the cell leaves the rest of the slot as it is. Writer only.
    pub(crate) fn write(
        &self,
        committed: u64,
        generation: u64,
        payload: impl Iterator<Item = u64>,
    ) {
        debug_assert!(generation > committed);
        let slot = self.spare(committed);
        self.stamp(slot).store(generation, Ordering::Relaxed);
        // The stamp must be seen by whoever sees one of the words stored below.
        fence(Ordering::Release);
        for (word, value) in self.payload(slot).iter().zip(payload) {
            word.store(value, Ordering::Relaxed);
        }
        // Publication is the release store of `committed`, once for the whole batch.
    }

    /// The slot no reader at `committed` or later needs.
    fn spare(&self, committed: u64) -> usize {
        let stamps = [
            self.stamp(0).load(Ordering::Relaxed),
            self.stamp(1).load(Ordering::Relaxed),
        ];
        match (stamps[0] > committed, stamps[1] > committed) {
            // Written before in the same batch: that slot is still invisible.
            (true, _) => 0,
            (_, true) => 1,
            _ => usize::from(stamps[1] < stamps[0]),
        }
    }

    /// Empties a slot that an earlier writer stamped above `committed` and died before committing.
    /// Answers whether there was one. Writer only, before its first batch.
    pub(crate) fn repair(&self, committed: u64) -> bool {
        let mut found = false;
        for slot in 0..2 {
            if self.stamp(slot).load(Ordering::Relaxed) > committed {
                self.stamp(slot).store(0, Ordering::Relaxed);
                found = true;
            }
        }
        found
    }
}

#[cfg(all(test, loom))]
mod loom_tests;

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn words() -> Vec<AtomicU64> {
        (0..words_for(2)).map(|_| AtomicU64::new(0)).collect()
    }

    fn read(cell: &Cell<'_>, committed: u64) -> (ReadOutcome, Vec<u64>) {
        let mut copy = Vec::new();
        let outcome = cell.read(committed, |slot| {
            copy = slot
                .iter()
                .map(|word| word.load(Ordering::Relaxed))
                .collect();
        });
        (outcome, copy)
    }

    #[test]
    fn the_value_is_the_one_at_the_generation_asked_for() {
        let words = words();
        let cell = Cell::over(&words, 2).unwrap();
        assert_eq!(read(&cell, 0), (ReadOutcome::Empty, vec![]));
        cell.write(0, 1, [1, 1].into_iter());
        assert_eq!(read(&cell, 0), (ReadOutcome::Empty, vec![]));
        assert_eq!(read(&cell, 1), (ReadOutcome::Whole(1), vec![1, 1]));
        cell.write(1, 4, [4, 4].into_iter());
        assert_eq!(read(&cell, 3), (ReadOutcome::Whole(1), vec![1, 1]));
        // Written again in the same batch: the committed value stays.
        cell.write(1, 4, [5, 5].into_iter());
        assert_eq!(read(&cell, 3), (ReadOutcome::Whole(1), vec![1, 1]));
        assert_eq!(read(&cell, 4), (ReadOutcome::Whole(4), vec![5, 5]));
        cell.write(4, 9, [9, 9].into_iter());
        assert_eq!(read(&cell, 3), (ReadOutcome::Moved, vec![]));
        assert_eq!(read(&cell, 9), (ReadOutcome::Whole(9), vec![9, 9]));
        let generations = [3, 4, 9].map(|committed| cell.generation(committed));
        assert_eq!(generations, [None, Some(4), Some(9)]);
    }

    #[test]
    fn repair_empties_only_what_was_never_committed() {
        let words = words();
        let cell = Cell::over(&words, 2).unwrap();
        cell.write(0, 1, [1, 1].into_iter());
        cell.write(1, 2, [2].into_iter());
        assert!(cell.repair(1));
        assert!(!cell.repair(1));
        // Had the stamp stayed, a later commit would have shown half a row.
        assert_eq!(read(&cell, 3), (ReadOutcome::Whole(1), vec![1, 1]));
    }
}
