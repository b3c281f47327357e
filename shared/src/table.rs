//! Tables of rows with a key, as the writer of a region and its readers use them.
//!
//! In: raw rows and keys. Out: staged writes for a batch, and decoded rows. Invariants: a key has
//! at most one row; a table's index in the writer's memory says what the committed rows say.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;

use crate::cell::Look;
use crate::ids::Generation;
use crate::layout::{RawRow, Table};
use crate::lock::Ousted;
use crate::region::{Mapped, RegionWriter, copy_words, words_of};
use crate::sync::Ordering;

/// Row states every table shares.
pub(crate) mod state {
    pub(crate) const FREE: u32 = 0;
    pub(crate) const USED: u32 = 1;
    pub(crate) const REMOVED: u32 = 2;
}

/// A row could not be written. The whole batch is refused and nothing of it is visible.
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum BatchError {
    /// A table has no free row left.
    #[error("all {rows} rows of the table {table} are in use; make it larger in the configuration")]
    TableFull {
        /// The table.
        table: &'static str,
        /// How many rows it has.
        rows: u32,
    },
    /// A text is longer than its field.
    #[error("{field} has {length} bytes, at most {limit} fit")]
    TextTooLong {
        /// The field.
        field: &'static str,
        /// Bytes given.
        length: usize,
        /// Bytes that fit.
        limit: usize,
    },
    /// A list is longer than its field.
    #[error("{field} has {length} entries, at most {limit} fit")]
    ListTooLong {
        /// The field.
        field: &'static str,
        /// Entries given.
        length: usize,
        /// Entries that fit.
        limit: usize,
    },
    /// A value is impossible.
    #[error("{field} has a value that no row can have")]
    Impossible {
        /// The field.
        field: &'static str,
    },
    /// Another process has become the writer.
    #[error(transparent)]
    Ousted(#[from] Ousted),
    /// The key was removed a moment ago and the other side has not acknowledged that yet.
    #[error(
        "{key} was removed and the dataplane has not acknowledged that yet; wait or use another"
    )]
    RemovalPending {
        /// The key.
        key: String,
    },
}

/// A typed row with a key.
pub(crate) trait KeyedRow: Sized {
    type Key: Copy + Eq + Ord + Hash + Debug;
    type Raw: RawRow;
    /// Place of the table in its region.
    const TABLE: usize;

    fn key(&self) -> Self::Key;
    fn generation(&self) -> Generation;
    /// Checks and encodes, in state [`state::USED`].
    fn to_raw(&self) -> Result<Self::Raw, BatchError>;
    /// Decodes a row in a state other than free; `None` when it makes no sense.
    fn from_raw(raw: &Self::Raw, generation: Generation) -> Option<Self>;
}

/// Where a key's row is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) row: u32,
    /// Set when the row is removed but not yet acknowledged.
    pub(crate) removed: Option<Generation>,
}

/// The writer's index of one table.
#[derive(Debug, Clone)]
pub(crate) struct Index<K> {
    pub(crate) table: Table,
    pub(crate) entries: HashMap<K, Entry>,
    free: Vec<u32>,
}

impl<K: Copy + Eq + Hash> Index<K> {
    /// Reads the index from a region just opened. Rows that make no sense are added to `junk`, to
    /// be freed by the first batch.
    pub(crate) fn load<R: KeyedRow<Key = K>>(
        region: &RegionWriter,
        junk: &mut Vec<(Table, u32)>,
    ) -> Self {
        let table = region.table(R::TABLE);
        let committed = region.committed();
        let mut entries: HashMap<K, Entry> = HashMap::new();
        let mut free = Vec::new();
        let mut bytes = vec![0u8; R::Raw::INFO.size];
        let written = region.used_rows(&table);
        free.extend((written..table.rows).rev());
        for row in (0..written).rev() {
            let mut used = state::FREE;
            let look = region.cell(&table, row).look(committed.0, |slot| {
                used = first_state(slot);
                copy_words(slot, &mut bytes);
            });
            let Look::Whole(generation) = look else {
                free.push(row);
                continue;
            };
            if used == state::FREE {
                free.push(row);
                continue;
            }
            let generation = Generation(generation);
            match R::from_raw(&R::Raw::load(&bytes), generation) {
                Some(typed)
                    if matches!(used, state::USED | state::REMOVED)
                        && !entries.contains_key(&typed.key()) =>
                {
                    let removed = (used == state::REMOVED).then_some(generation);
                    entries.insert(typed.key(), Entry { row, removed });
                }
                _ => {
                    junk.push((table, row));
                    free.push(row);
                }
            }
        }
        Self {
            table,
            entries,
            free,
        }
    }

    /// The row for a key that is to be written: its own, or a free one (then `true`).
    pub(crate) fn place(&mut self, key: K) -> Result<(u32, bool), BatchError> {
        if let Some(entry) = self.entries.get(&key) {
            return Ok((entry.row, false));
        }
        let row = self.free.pop().ok_or(BatchError::TableFull {
            table: self.table.name,
            rows: self.table.rows,
        })?;
        self.entries.insert(key, Entry { row, removed: None });
        Ok((row, true))
    }

    /// Forgets a key; answers the row to be freed.
    pub(crate) fn release(&mut self, key: &K) -> Option<u32> {
        let entry = self.entries.remove(key)?;
        self.free.push(entry.row);
        Some(entry.row)
    }

    /// Takes back the last [`Index::release`] that was not taken back yet.
    pub(crate) fn restore(&mut self, key: K, row: u32) {
        let freed = self.free.pop();
        debug_assert_eq!(freed, Some(row));
        self.entries.insert(key, Entry { row, removed: None });
    }
}

/// The state in a slot's first four bytes.
fn first_state(slot: &[crate::sync::AtomicU64]) -> u32 {
    let word = slot.first().map_or(0, |word| word.load(Ordering::Relaxed));
    let bytes = word.to_le_bytes();
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Writes collected while a batch is checked, stored only when all of it is good.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    writes: Vec<(Table, u32, std::ops::Range<usize>)>,
    bytes: Vec<u8>,
}

impl Staged {
    pub(crate) fn raw<R: RawRow>(&mut self, table: Table, row: u32, raw: &R) {
        let start = self.bytes.len();
        self.bytes.resize(start + R::INFO.size, 0);
        raw.store(&mut self.bytes[start..]);
        self.writes.push((table, row, start..self.bytes.len()));
    }

    /// Frees a row: one word is enough, the state comes first.
    pub(crate) fn free(&mut self, table: Table, row: u32) {
        let start = self.bytes.len();
        self.bytes.resize(start + 8, 0);
        self.writes.push((table, row, start..self.bytes.len()));
    }

    /// Bytes to be filled by the caller, as one payload of `row`.
    pub(crate) fn space(&mut self, table: Table, row: u32, length: usize) -> &mut [u8] {
        let start = self.bytes.len();
        self.bytes.resize(start + length, 0);
        self.writes.push((table, row, start..self.bytes.len()));
        &mut self.bytes[start..]
    }

    pub(crate) fn clear(&mut self) {
        self.writes.clear();
        self.bytes.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Stores everything under `generation`, which is not visible yet.
    pub(crate) fn store(&mut self, region: &RegionWriter, generation: Generation) {
        for (table, row, range) in &self.writes {
            let payload = words_of(&self.bytes[range.clone()]);
            region.write(table, *row, generation, payload);
        }
        self.clear();
    }

    /// Stores everything under `generation` and makes it visible.
    pub(crate) fn commit(&mut self, region: &mut RegionWriter, generation: Generation) {
        self.store(region, generation);
        region.commit(generation);
    }
}

/// The writer moved on while a table was copied.
pub(crate) struct Moved;

/// Rows of one table at one generation, sorted by key.
#[derive(Debug)]
pub(crate) struct Rows<R> {
    pub(crate) used: Vec<R>,
    pub(crate) removed: Vec<R>,
    /// Rows that make no sense, or whose key another row has too.
    pub(crate) invalid: u32,
}

/// Copies a whole table at `committed`.
pub(crate) fn copy_table<R: KeyedRow>(
    mapped: &Mapped,
    committed: Generation,
) -> Result<Rows<R>, Moved> {
    let table = mapped.table(R::TABLE);
    let mut rows = Rows {
        used: Vec::new(),
        removed: Vec::new(),
        invalid: 0,
    };
    let mut bytes = vec![0u8; R::Raw::INFO.size];
    for row in 0..mapped.used_rows(&table) {
        match copy_row::<R>(mapped, &table, row, committed, &mut bytes)? {
            None => {}
            Some((found, typed)) => match (found, typed) {
                (state::USED, Some(typed)) => rows.used.push(typed),
                (state::REMOVED, Some(typed)) => rows.removed.push(typed),
                _ => rows.invalid += 1,
            },
        }
    }
    for list in [&mut rows.used, &mut rows.removed] {
        list.sort_by_key(|row| (row.key(), std::cmp::Reverse(row.generation())));
        let before = list.len();
        list.dedup_by_key(|row| row.key());
        rows.invalid += u32::try_from(before - list.len()).unwrap_or(u32::MAX);
    }
    Ok(rows)
}

type Found<R> = Option<(u32, Option<R>)>;

/// One row: `None` when free, else its state and what it decodes to.
fn copy_row<R: KeyedRow>(
    mapped: &Mapped,
    table: &Table,
    row: u32,
    committed: Generation,
    bytes: &mut [u8],
) -> Result<Found<R>, Moved> {
    let mut found = state::FREE;
    let look = mapped.cell(table, row).look(committed.0, |slot| {
        found = first_state(slot);
        if found != state::FREE {
            copy_words(slot, bytes);
        }
    });
    match look {
        Look::Moved => Err(Moved),
        Look::Empty => Ok(None),
        Look::Whole(_) if found == state::FREE => Ok(None),
        Look::Whole(generation) => Ok(Some((
            found,
            R::from_raw(&R::Raw::load(bytes), Generation(generation)),
        ))),
    }
}

/// The one row of a table with a single row; `None` when it is not set.
pub(crate) fn single<R: RawRow>(
    mapped: &Mapped,
    table: usize,
    committed: Generation,
) -> Result<Option<R>, Moved> {
    let table = mapped.table(table);
    let mut bytes = vec![0u8; R::INFO.size];
    let mut found = state::FREE;
    let look = mapped.cell(&table, 0).look(committed.0, |slot| {
        found = first_state(slot);
        copy_words(slot, &mut bytes);
    });
    match look {
        Look::Moved => Err(Moved),
        Look::Whole(_) if found == state::USED => Ok(Some(R::load(&bytes))),
        _ => Ok(None),
    }
}

/// Puts a text into a field of fixed size.
pub(crate) fn store_text<const N: usize>(
    field: &'static str,
    text: &str,
    into: &mut [u8; N],
) -> Result<u8, BatchError> {
    let refused = BatchError::TextTooLong {
        field,
        length: text.len(),
        limit: N,
    };
    let length = u8::try_from(text.len()).map_err(|_| refused.clone())?;
    into.get_mut(..text.len())
        .ok_or(refused)?
        .copy_from_slice(text.as_bytes());
    Ok(length)
}

/// Takes a text out of a field; `None` when the length or the UTF-8 is wrong.
pub(crate) fn load_text(length: u8, bytes: &[u8]) -> Option<String> {
    let text = bytes.get(..usize::from(length))?;
    std::str::from_utf8(text).ok().map(str::to_owned)
}
