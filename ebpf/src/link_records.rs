//! `bpf/link_records.h` in Rust: what the reading of links tells.
//!
//! The header says what the fields hold. All are 64-bit words, read one by one from memory that the
//! kernel's side writes.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// `struct link_record`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
#[allow(missing_docs)]
pub struct LinkRecord {
    /// How often its device was found anew until this was read; 0 when it was not.
    pub filled: u64,
    pub rx_packets: u64,
    pub tx_packets: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_dropped: u64,
    pub tx_dropped: u64,
    /// 1 when the namespace has no such device.
    pub absent: u64,
}

impl LinkRecord {
    /// Words of a record.
    pub const WORDS: usize = 8;

    /// Reads record number `place`.
    pub fn read(words: &[AtomicU64], place: usize) -> Option<Self> {
        let start = place.checked_mul(Self::WORDS)?;
        let mut words = words.get(start..start.checked_add(Self::WORDS)?)?.iter();
        let mut next = || words.next().map_or(0, |word| word.load(Relaxed));
        Some(Self {
            filled: next(),
            rx_packets: next(),
            tx_packets: next(),
            rx_bytes: next(),
            tx_bytes: next(),
            rx_dropped: next(),
            tx_dropped: next(),
            absent: next(),
        })
    }
}

const _: () = assert!(size_of::<LinkRecord>() == 8 * LinkRecord::WORDS);

/// Words of `struct link_target`.
pub mod link_target {
    /// Index of the link, 0 none.
    pub const INDEX: usize = 0;
    /// How often its device was found anew, and flags.
    pub const FINDS: usize = 1;
    /// Flag of that word: only what it sends is counted.
    pub const SENT_ONLY: u64 = 1 << 63;
    /// Where it and its peer count, and their queues: four places that the program found.
    pub const COUNTS: usize = 4;
    /// All of them, the program's own included.
    pub const WORDS: usize = 16;
}

/// Words of `struct link_layout`.
pub mod link_layout {
    /// 1 when the others are filled.
    pub const KNOWN: usize = 0;
    /// Where a device says what it counts by, 0 nowhere.
    pub const KIND: usize = 1;
    /// 1 when links count what they sent only; for kernels where they don't say it.
    pub const SENT_ONLY: usize = 2;
    /// Where a veth has its peer, and ten more places.
    pub const PLACES: usize = 3;
    /// How many places there are.
    pub const PLACES_NUMBER: usize = 10;
    /// All of them, one of the program's own included.
    pub const WORDS: usize = PLACES + PLACES_NUMBER + 1;
}
