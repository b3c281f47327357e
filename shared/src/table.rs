//! Tables of rows with a key, as the writer of a region and its readers use them.
//!
//! In: raw rows and keys. Out: staged writes for a batch, and decoded rows. Invariants: a key has
//! at most one row; a table's index in the writer's memory says what the committed rows say.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use crate::cell::{Cell, ReadOutcome};
use crate::ids::Generation;
use crate::layout::{RawRow, Table};
use crate::lock::LockLost;
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
    LockLost(#[from] LockLost),
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

/// The writer's index of one table, and what the batch under way has done to it.
#[derive(Debug)]
pub(crate) struct Index<K> {
    pub(crate) table: Table,
    /// Where each key's row is.
    pub(crate) entries: HashMap<K, u32>,
    /// Rows among them that are removed but not yet acknowledged.
    pub(crate) removed: HashMap<K, Generation>,
    free: Vec<u32>,
    steps: Vec<Step<K>>,
}

#[derive(Debug)]
enum Step<K> {
    Placed(K),
    Released(K, u32, Option<Generation>),
    Buried(K),
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
        let mut entries: HashMap<K, u32> = HashMap::new();
        let mut removed = HashMap::new();
        let mut free = Vec::new();
        let mut bytes = vec![0u8; R::Raw::INFO.size];
        let written = region.used_rows(&table);
        free.extend((written..table.rows).rev());
        for row in (0..written).rev() {
            let mut used = state::FREE;
            let outcome = region.cell(&table, row).read(committed.0, |slot| {
                used = first_state(slot);
                copy_words(slot, &mut bytes);
            });
            let ReadOutcome::Whole(generation) = outcome else {
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
                    if used == state::REMOVED {
                        removed.insert(typed.key(), generation);
                    }
                    entries.insert(typed.key(), row);
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
            removed,
            free,
            steps: Vec::new(),
        }
    }

    /// The row for a key that is to be written: its own, or a free one.
    pub(crate) fn place(&mut self, key: K) -> Result<u32, BatchError> {
        if let Some(row) = self.entries.get(&key) {
            return Ok(*row);
        }
        let row = self.free.pop().ok_or(BatchError::TableFull {
            table: self.table.name,
            rows: self.table.rows,
        })?;
        self.entries.insert(key, row);
        self.steps.push(Step::Placed(key));
        Ok(row)
    }

    /// Stages a row.
    pub(crate) fn put<R: KeyedRow<Key = K>>(
        &mut self,
        row: &R,
        staged: &mut Staged,
    ) -> Result<(), BatchError> {
        let raw = row.to_raw()?;
        let place = self.place(row.key())?;
        staged.raw(self.table, place, &raw);
        Ok(())
    }

    /// Notes that a row is removed, to be freed when that is acknowledged.
    pub(crate) fn bury(&mut self, key: K, generation: Generation) {
        self.removed.insert(key, generation);
        self.steps.push(Step::Buried(key));
    }

    /// Forgets a key and frees its row.
    pub(crate) fn remove(&mut self, key: &K, staged: &mut Staged) {
        if let Some(row) = self.entries.remove(key) {
            self.free.push(row);
            let removed = self.removed.remove(key);
            self.steps.push(Step::Released(*key, row, removed));
            staged.free(self.table, row);
        }
    }

    /// The batch is visible.
    pub(crate) fn settle(&mut self) {
        self.steps.clear();
    }

    /// The batch was refused: the index changes only together with the rows.
    pub(crate) fn roll_back(&mut self) {
        while let Some(step) = self.steps.pop() {
            match step {
                Step::Placed(key) => self.free.extend(self.entries.remove(&key)),
                Step::Released(key, row, removed) => {
                    let freed = self.free.pop();
                    debug_assert_eq!(freed, Some(row));
                    self.entries.insert(key, row);
                    self.removed.extend(removed.map(|removed| (key, removed)));
                }
                Step::Buried(key) => {
                    self.removed.remove(&key);
                }
            }
        }
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
    let written = copy_written(mapped, committed, &Seen::default())?;
    Ok(Rows::of(written))
}

impl<R: KeyedRow> Rows<R> {
    fn of(written: Vec<Written<R>>) -> Self {
        let mut rows = Self {
            used: Vec::new(),
            removed: Vec::new(),
            invalid: 0,
        };
        for (found, typed) in written.into_iter().filter_map(|it| it.found) {
            match (found, typed) {
                (state::USED, Some(typed)) => rows.used.push(typed),
                (state::REMOVED, Some(typed)) => rows.removed.push(typed),
                _ => rows.invalid += 1,
            }
        }
        for list in [&mut rows.used, &mut rows.removed] {
            list.sort_by_key(|row| (row.key(), std::cmp::Reverse(row.generation())));
            let before = list.len();
            list.dedup_by_key(|row| row.key());
            rows.invalid += u32::try_from(before - list.len()).unwrap_or(u32::MAX);
        }
        rows
    }
}

/// What a reader has seen of a table: the generation of each row, and whose row it was.
#[derive(Debug)]
pub(crate) struct Seen<K> {
    rows: Vec<(u64, Option<K>)>,
    keys: HashMap<K, usize>,
}

impl<K> Default for Seen<K> {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            keys: HashMap::new(),
        }
    }
}

/// A row that is not what was seen.
#[derive(Debug)]
pub(crate) struct Written<R> {
    row: usize,
    generation: u64,
    found: Found<R>,
}

/// Rows that were written since a table was seen.
#[derive(Debug)]
pub(crate) struct News<R: KeyedRow> {
    pub(crate) rows: Rows<R>,
    /// Keys that have no row any more.
    pub(crate) freed: Vec<R::Key>,
}

/// Copies the rows of a table that are not as they were seen.
pub(crate) fn copy_written<R: KeyedRow>(
    mapped: &Mapped,
    committed: Generation,
    seen: &Seen<R::Key>,
) -> Result<Vec<Written<R>>, Moved> {
    let table = mapped.table(R::TABLE);
    let mut written = Vec::new();
    let mut bytes = vec![0u8; R::Raw::INFO.size];
    for row in 0..mapped.used_rows(&table) {
        let cell = mapped.cell(&table, row);
        let generation = cell.generation(committed.0).ok_or(Moved)?;
        let place = row as usize;
        let known = seen.rows.get(place).map_or(0, |(known, _)| *known);
        if generation != known {
            written.push(Written {
                row: place,
                generation,
                found: copy_row::<R>(&cell, committed, &mut bytes)?,
            });
        }
    }
    Ok(written)
}

impl<K: Copy + Eq + Hash> Seen<K> {
    /// Takes note of all that was written since. A key that two rows have counts as an invalid row; the
    /// table has to be read anew where there is any.
    pub(crate) fn take<R: KeyedRow<Key = K>>(&mut self, written: Vec<Written<R>>) -> News<R> {
        let mut freed = Vec::new();
        for it in &written {
            if self.rows.len() <= it.row {
                self.rows.resize(it.row + 1, (0, None));
            }
            let known = std::mem::replace(&mut self.rows[it.row], (it.generation, None));
            if let (_, Some(key)) = known {
                self.keys.remove(&key);
                freed.push(key);
            }
        }
        let mut doubled = 0;
        for it in &written {
            if let Some((_, Some(row))) = &it.found {
                let key = row.key();
                self.rows[it.row].1 = Some(key);
                let other = self.keys.insert(key, it.row);
                doubled += u32::from(other.is_some());
            }
        }
        freed.retain(|key| !self.keys.contains_key(key));
        let mut rows = Rows::of(written);
        rows.invalid = rows.invalid.max(doubled);
        News { rows, freed }
    }
}

/// A table as it was read last, and what of it was seen.
#[derive(Debug)]
pub(crate) struct Kept<R: KeyedRow> {
    pub(crate) seen: Seen<R::Key>,
    /// Sorted by key. Shared with who was given them, and made anew when any was written.
    pub(crate) rows: Arc<Vec<R>>,
}

impl<R: KeyedRow> Default for Kept<R> {
    fn default() -> Self {
        Self {
            seen: Seen::default(),
            rows: Arc::default(),
        }
    }
}

impl<R: KeyedRow + Clone> Kept<R> {
    /// Takes in all that was written since. Answers how many rows make no sense; the table has to be read
    /// anew where there are any.
    pub(crate) fn take(&mut self, written: Vec<Written<R>>) -> u32 {
        let News { rows, mut freed } = self.seen.take(written);
        if rows.used.is_empty() && freed.is_empty() {
            return rows.invalid;
        }
        freed.sort_unstable();
        let mut all = Vec::with_capacity(self.rows.len() + rows.used.len());
        let mut fresh = rows.used.into_iter().peekable();
        for row in self.rows.iter() {
            let key = row.key();
            while let Some(earlier) = fresh.next_if(|it| it.key() < key) {
                all.push(earlier);
            }
            match fresh.next_if(|it| it.key() == key) {
                Some(now) => all.push(now),
                None if freed.binary_search(&key).is_ok() => {}
                None => all.push(row.clone()),
            }
        }
        all.extend(fresh);
        self.rows = Arc::new(all);
        rows.invalid
    }
}

type Found<R> = Option<(u32, Option<R>)>;

/// One row: `None` when free, else its state and what it decodes to.
fn copy_row<R: KeyedRow>(
    cell: &Cell<'_>,
    committed: Generation,
    bytes: &mut [u8],
) -> Result<Found<R>, Moved> {
    let mut found = state::FREE;
    let outcome = cell.read(committed.0, |slot| {
        found = first_state(slot);
        if found != state::FREE {
            copy_words(slot, bytes);
        }
    });
    match outcome {
        ReadOutcome::Moved => Err(Moved),
        ReadOutcome::Empty => Ok(None),
        ReadOutcome::Whole(_) if found == state::FREE => Ok(None),
        ReadOutcome::Whole(generation) => Ok(Some((
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
    let outcome = mapped.cell(&table, 0).read(committed.0, |slot| {
        found = first_state(slot);
        copy_words(slot, &mut bytes);
    });
    match outcome {
        ReadOutcome::Moved => Err(Moved),
        ReadOutcome::Whole(_) if found == state::USED => Ok(Some(R::load(&bytes))),
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
