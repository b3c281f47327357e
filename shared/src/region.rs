//! One region file: created, opened, repaired and committed by its writer; found, checked and
//! re-found by its readers.
//!
//! In: a directory and table sizes. Out: cells, generations, the header's facts. Invariants:
//! the file is allocated in full before it gets its name, never changes length, and a different
//! layout or larger tables mean a new file under the same name, after the old one is marked
//! retired. Readers compute the places of all tables from the row counts in the header, after
//! checking these against [`Sizes::LIMIT`] and the file's real length; nothing else in the file is
//! used as an index.

mod reader;
mod writer;

pub(crate) use reader::{Mapped, RegionReader, Snapshotted};
pub(crate) use writer::RegionWriter;
pub use writer::Start;

use std::io;
use std::path::PathBuf;

use crate::cell::Cell;
use crate::ids::RegionId;
use crate::layout::{Header, RawRow, RegionKind, Sizes, Table};
use crate::lock::{LockError, LockLost};
use crate::sync::{AtomicU64, Ordering};

/// A writer could not open its region, or not keep it. Nothing was changed for readers.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The directory is already written to by another process, or its lock cannot be taken.
    #[error("cannot become the writer of {directory}", directory = .directory.display())]
    Lock {
        /// The writer's directory.
        directory: PathBuf,
        /// Why not.
        #[source]
        source: LockError,
    },
    /// Another process has become the writer.
    #[error(transparent)]
    LockLost(#[from] LockLost),
    /// A region must lie on tmpfs.
    #[error(transparent)]
    NotTmpfs(#[from] crate::run_dir::RunDirError),
    /// Table sizes of zero or beyond the limit.
    #[error("table sizes {sizes:?} are not within 1 and {limit:?}", limit = Sizes::LIMIT)]
    Sizes {
        /// What was asked for.
        sizes: Sizes,
    },
    /// A file operation failed.
    #[error("cannot {step} the region file {path}; if something else has that name, remove it", path = .path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// tmpfs has no room for the whole file.
    #[error(
        "no room for the {bytes} bytes of {path}; free space on that tmpfs or mount it larger",
        path = .path.display()
    )]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Bytes it needs.
        bytes: u64,
    },
}

/// A reader has no new snapshot; what it had before stays good.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The region is not there yet: its writer never ran here.
    #[error("there is no region at {path} yet", path = .path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// The file could not be opened or mapped.
    #[error("cannot {step} the region file {path}", path = .path.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The file is not a region of this build's layout.
    #[error("{path} is not a region this build can read: {why}", path = .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The writer committed faster than the rows could be copied, more often than is retried.
    #[error("{path} changed during every one of {attempts} attempts to copy it", path = .path.display())]
    Busy {
        /// The file.
        path: PathBuf,
        /// How often it was tried.
        attempts: u32,
    },
}

/// What a region's header says about its writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriterLife {
    /// The region file's identity.
    pub region_id: RegionId,
    /// One more with every life of the writer.
    pub epoch: u64,
    /// Process id of the writer of this epoch.
    pub pid: u64,
    /// Its last sign of life, CLOCK_MONOTONIC, ns.
    pub heartbeat_monotonic_ns: u64,
    /// The same instant, CLOCK_REALTIME, ns since 1970.
    pub heartbeat_wall_ns: u64,
}

/// Nanoseconds of CLOCK_MONOTONIC, the clock of heartbeats and samples.
#[must_use]
pub fn monotonic_ns() -> u64 {
    clock_ns(rustix::time::ClockId::Monotonic)
}

/// Nanoseconds of CLOCK_REALTIME since 1970.
#[must_use]
pub fn wall_ns() -> u64 {
    clock_ns(rustix::time::ClockId::Realtime)
}

fn clock_ns(clock: rustix::time::ClockId) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    u64::try_from(now.tv_sec)
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Indexes of the header's words.
pub(crate) mod word {
    use super::Header;
    use std::mem::offset_of;

    pub(crate) const RETIRED: usize = offset_of!(Header, retired) / 8;
    pub(crate) const EPOCH: usize = offset_of!(Header, epoch) / 8;
    pub(crate) const ALLOCATED: usize = offset_of!(Header, allocated) / 8;
    pub(crate) const COMMITTED: usize = offset_of!(Header, committed) / 8;
    pub(crate) const HEARTBEAT_MONOTONIC: usize = offset_of!(Header, heartbeat_monotonic_ns) / 8;
    pub(crate) const HEARTBEAT_WALL: usize = offset_of!(Header, heartbeat_wall_ns) / 8;
    pub(crate) const USED_ROWS: usize = offset_of!(Header, used_rows) / 8;
    pub(crate) const WRITER_PID: usize = offset_of!(Header, writer_pid) / 8;
}

/// Copies the header out of a region's first words; `None` when there are too few.
pub(crate) fn load_header(words: &[AtomicU64]) -> Option<Header> {
    let mut bytes = [0u8; Header::INFO.size];
    copy_words(words.get(..Header::INFO.size / 8)?, &mut bytes);
    Some(Header::load(&bytes))
}

/// Loads words into bytes; as many as both have.
pub(crate) fn copy_words(words: &[AtomicU64], bytes: &mut [u8]) {
    for (word, chunk) in words.iter().zip(bytes.chunks_exact_mut(8)) {
        chunk.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
    }
}

/// The words a row's bytes make.
pub(crate) fn words_of(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|chunk| {
        let mut word = [0u8; 8];
        word.copy_from_slice(chunk);
        u64::from_le_bytes(word)
    })
}

/// The cell of `row` in `table`; `None` when the words end before it.
pub(crate) fn cell_at<'a>(words: &'a [AtomicU64], table: &Table, row: u32) -> Option<Cell<'a>> {
    if row >= table.rows {
        return None;
    }
    let start = table.offset_words + row as usize * table.stride_words;
    let length = crate::cell::words_for(table.payload_words);
    Cell::over(words.get(start..start + length)?, table.payload_words)
}

/// How many of a table's rows may hold anything, as the header says; never more than it has.
pub(crate) fn used_rows(words: &[AtomicU64], table: &Table) -> u32 {
    let used = words
        .get(word::USED_ROWS + table.index)
        .map_or(u64::MAX, |word| word.load(Ordering::Relaxed));
    u32::try_from(used).map_or(table.rows, |used| used.min(table.rows))
}

/// The row counts a header claims, if a region of `kind` can have them.
pub(crate) fn claimed_sizes(header: &Header) -> Option<Sizes> {
    let sizes = Sizes {
        ports: header.port_rows,
        containers: header.container_rows,
        accelerators: header.accelerator_rows,
        processes: header.process_rows,
    };
    sizes.are_possible().then_some(sizes)
}

/// Words of a whole region.
pub(crate) fn total_words(kind: RegionKind, sizes: Sizes) -> usize {
    kind.tables(sizes).last().map_or(0, Table::end_words)
}

/// Why the header is not one of this build, if it is not.
pub(crate) fn refuse_header(header: &Header, kind: RegionKind) -> Option<&'static str> {
    if header.magic != crate::layout::MAGIC {
        Some("it does not start with the region magic")
    } else if header.layout_version != crate::layout::LAYOUT_VERSION {
        Some("its layout version is another one; both daemons must be of the same release")
    } else if header.layout_hash != crate::layout::LAYOUT_HASH {
        Some("its layout hash is another one; both daemons must be of the same release")
    } else if header.region != kind.code() {
        Some("it is the other region")
    } else {
        None
    }
}
