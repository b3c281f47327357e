//! A timer wheel for session deadlines.
//!
//! In: (slot time, session index, generation). Out: entries whose time has come. Each session has
//! one entry at most; it is never moved when bytes flow: an entry that comes up early is put back
//! by its owner with the time that is left. Invariant: no entry comes up later than one slot after
//! its time, none is lost; times beyond the horizon come up early, which owners must expect.

use std::time::Duration;

/// Length of one slot. A quarter second is precise enough for timeouts counted in seconds.
pub const SLOT: Duration = Duration::from_millis(256);
/// Number of slots; the horizon is 131 s, so an idle session costs a look every two minutes.
const SLOTS: usize = 512;

/// A session that wants to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Position in the session table.
    pub index: u32,
    /// Generation of that position; a mismatch means that the session has ended since.
    pub generation: u32,
}

/// The wheel. Times are slot numbers since the worker started.
#[derive(Debug)]
pub struct Wheel {
    slots: Vec<Vec<Entry>>,
    /// The first slot number not expired yet.
    next: u64,
    entries: usize,
    earliest: Option<u64>,
}

impl Default for Wheel {
    fn default() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| Vec::new()).collect(),
            next: 0,
            entries: 0,
            earliest: None,
        }
    }
}

impl Wheel {
    fn position(slot: u64) -> usize {
        usize::try_from(slot % SLOTS as u64).expect("a slot position is below 512")
    }

    /// Adds an entry for slot number `due` (clamped into what the wheel can hold).
    pub fn insert(&mut self, due: u64, entry: Entry) {
        let due = due.clamp(self.next, self.next + SLOTS as u64 - 1);
        self.slots[Self::position(due)].push(entry);
        self.entries += 1;
        self.earliest = Some(self.earliest.map_or(due, |earliest| earliest.min(due)));
    }

    /// The slot number of the earliest entry.
    pub fn earliest(&self) -> Option<u64> {
        self.earliest
    }

    fn find_earliest(&self) -> Option<u64> {
        if self.entries == 0 {
            return None;
        }
        (self.next..self.next + SLOTS as u64)
            .find(|slot| !self.slots[Self::position(*slot)].is_empty())
    }

    /// Takes all entries of the slots up to and including `now`.
    pub fn expire(&mut self, now: u64, out: &mut Vec<Entry>) {
        if now < self.next {
            return;
        }
        if self.earliest.is_none_or(|earliest| earliest > now) {
            self.next = now + 1;
            return;
        }
        let last = now.min(self.next + SLOTS as u64 - 1);
        for slot in self.next..=last {
            let due = std::mem::take(&mut self.slots[Self::position(slot)]);
            self.entries -= due.len();
            out.extend(due);
        }
        self.next = now + 1;
        self.earliest = self.find_earliest();
    }

    /// Entries in the wheel, those of ended sessions included.
    pub fn entries(&self) -> usize {
        self.entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(index: u32) -> Entry {
        Entry {
            index,
            generation: 0,
        }
    }

    #[test]
    fn entries_come_up_at_their_slot() {
        let mut wheel = Wheel::default();
        wheel.insert(5, entry(1));
        wheel.insert(7, entry(2));
        assert_eq!(wheel.earliest(), Some(5));
        let mut out = Vec::new();
        wheel.expire(4, &mut out);
        assert!(out.is_empty());
        wheel.expire(6, &mut out);
        assert_eq!(out, [entry(1)]);
        out.clear();
        wheel.expire(100, &mut out);
        assert_eq!(out, [entry(2)]);
        assert_eq!((wheel.entries(), wheel.earliest()), (0, None));
    }

    #[test]
    fn a_time_in_the_past_comes_up_next() {
        let mut wheel = Wheel::default();
        let mut out = Vec::new();
        wheel.expire(1000, &mut out);
        wheel.insert(3, entry(9));
        wheel.expire(1001, &mut out);
        assert_eq!(out, [entry(9)]);
    }

    #[test]
    fn a_time_beyond_the_horizon_comes_up_early_and_not_at_once() {
        let mut wheel = Wheel::default();
        wheel.insert(10_000, entry(3));
        let mut out = Vec::new();
        wheel.expire(100, &mut out);
        assert!(out.is_empty());
        wheel.expire(511, &mut out);
        assert_eq!(out, [entry(3)]);
    }

    proptest! {
        #[test]
        fn no_entry_is_lost_or_late(dues in proptest::collection::vec(0u64..2000, 1..200),
                                    steps in proptest::collection::vec(1u64..700, 1..40)) {
            let mut wheel = Wheel::default();
            for (index, due) in dues.iter().enumerate() {
                wheel.insert(*due, entry(u32::try_from(index).unwrap()));
            }
            let mut seen = vec![false; dues.len()];
            let mut now = 0;
            for step in steps.iter().copied().chain([3000]) {
                now += step;
                let mut out = Vec::new();
                wheel.expire(now, &mut out);
                for e in out {
                    let due = dues[e.index as usize];
                    if due > now {
                        wheel.insert(due, e);
                    } else {
                        seen[e.index as usize] = true;
                    }
                }
                for (index, due) in dues.iter().enumerate() {
                    prop_assert!(*due > now || seen[index], "entry {index} due {due} not seen at {now}");
                }
            }
            prop_assert!(seen.iter().all(|s| *s));
        }
    }
}
