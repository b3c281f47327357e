//! The writing end of a region file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::rand::GetRandomFlags;

use super::{
    OpenError, cell_at, claimed_sizes, load_header, monotonic_ns, refuse_header, total_words,
    used_rows, wall_ns, word, words_of,
};
use crate::cell::{Cell, Look};
use crate::ids::{Generation, RegionId};
use crate::layout::{Header, LAYOUT_HASH, LAYOUT_VERSION, MAGIC, RawRow, RegionKind, Sizes, Table};
use crate::lock::WriterLock;
use crate::mapping::Mapping;
use crate::sync::{AtomicU64, Ordering};

/// Mode of region files: the writer writes, its group reads.
const FILE_MODE: u32 = 0o640;

/// How a region was found by its starting writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// There was none, or none that this build can read: a new, empty one was made.
    Fresh,
    /// The tables of an earlier life's region were too small: a new region was made and the rows
    /// were carried over.
    Grown,
    /// The region of an earlier life was taken over. `repaired` rows had a write that was begun
    /// but not committed; they keep their last committed value.
    Continued {
        /// Rows with an interrupted write.
        repaired: u32,
    },
}

/// Owns the file: the only process that stores to it.
#[derive(Debug)]
pub(crate) struct RegionWriter {
    kind: RegionKind,
    path: PathBuf,
    sizes: Sizes,
    tables: Vec<Table>,
    region_id: RegionId,
    mapping: Mapping,
    /// Last, so that the mapping is gone before another writer may start.
    lock: WriterLock,
}

impl RegionWriter {
    /// Takes over the region in `lock`'s directory when this build can read it and it is large
    /// enough, else puts a new, empty one in its place.
    pub(crate) fn open(
        lock: WriterLock,
        kind: RegionKind,
        sizes: Sizes,
    ) -> Result<(Self, Start), OpenError> {
        if !sizes.are_possible() {
            return Err(OpenError::Sizes { sizes });
        }
        crate::run_dir::require_tmpfs(lock.directory())?;
        let path = lock.directory().join(kind.file_name());
        match existing(&path, kind)? {
            Some(old) if !old.retired && old.sizes.grown_to(sizes) == old.sizes => {
                let mut writer = Self {
                    kind,
                    tables: kind.tables(old.sizes),
                    sizes: old.sizes,
                    region_id: old.region_id,
                    mapping: old.mapping,
                    path,
                    lock,
                };
                let repaired = writer.take_over();
                Ok((writer, Start::Continued { repaired }))
            }
            Some(old) => {
                let sizes = old.sizes.grown_to(sizes);
                Ok((
                    Self::create(lock, kind, sizes, path, Some(&old))?,
                    Start::Grown,
                ))
            }
            None => Ok((Self::create(lock, kind, sizes, path, None)?, Start::Fresh)),
        }
    }

    fn create(
        lock: WriterLock,
        kind: RegionKind,
        sizes: Sizes,
        path: PathBuf,
        old: Option<&Existing>,
    ) -> Result<Self, OpenError> {
        let fail = |step, source: io::Error| OpenError::File {
            step,
            path: path.clone(),
            source,
        };
        let words = total_words(kind, sizes);
        let bytes = (words * 8) as u64;
        // One fixed name: the lock makes us the only one, and a leftover of a killed start goes.
        let temporary = path.with_extension("new");
        match std::fs::remove_file(&temporary) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                return Err(fail("remove the leftover of", err));
            }
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(FILE_MODE)
            .open(&temporary)
            .map_err(|err| fail("create", err))?;
        // The umask must not decide who can read.
        file.set_permissions(std::fs::Permissions::from_mode(FILE_MODE))
            .map_err(|err| fail("set the mode of", err))?;
        if let Err(err) = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            // Best effort: the space is needed, and the next start removes it anyway.
            let _ = std::fs::remove_file(&temporary);
            return Err(match err {
                rustix::io::Errno::NOSPC => OpenError::NoRoom {
                    path: path.clone(),
                    bytes,
                },
                other => fail("allocate", other.into()),
            });
        }
        let mapping = Mapping::writable(&file, words).map_err(|err| fail("map", err.into()))?;

        let mut id = [0u8; 16];
        rustix::rand::getrandom(&mut id, GetRandomFlags::empty())
            .map_err(|err| fail("make an id for", err.into()))?;
        let header = Header {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            region: kind.code(),
            layout_hash: LAYOUT_HASH,
            region_id: id,
            file_bytes: bytes,
            port_rows: sizes.ports,
            container_rows: sizes.containers,
            accelerator_rows: sizes.accelerators,
            process_rows: sizes.processes,
            ..Header::default()
        };
        let mut raw = [0u8; Header::INFO.size];
        header.store(&mut raw);
        for (word, value) in mapping.words().iter().zip(words_of(&raw)) {
            word.store(value, Ordering::Relaxed);
        }
        let mut writer = Self {
            kind,
            tables: kind.tables(sizes),
            sizes,
            region_id: RegionId(id),
            mapping,
            path: path.clone(),
            lock,
        };
        if let Some(old) = old {
            writer.carry_over(old);
        }
        writer.begin_life();
        retire(&path);
        std::fs::rename(&temporary, &path).map_err(|err| fail("put in place", err))?;
        Ok(writer)
    }

    /// Copies the committed rows of a smaller region into this one, before anyone can see it.
    fn carry_over(&mut self, old: &Existing) {
        let words = self.mapping.words();
        for (table, from) in self.tables.iter().zip(&self.kind.tables(old.sizes)) {
            if table.payload_words != from.payload_words {
                // The process pool: its bank has another length, and the next tick fills it.
                continue;
            }
            let mut payload = vec![0u64; from.payload_words];
            let used = used_rows(old.mapping.words(), from);
            words[word::USED_ROWS + table.index].store(u64::from(used), Ordering::Relaxed);
            for row in 0..used {
                let (Some(source), Some(target)) = (
                    cell_at(old.mapping.words(), from, row),
                    cell_at(words, table, row),
                ) else {
                    continue;
                };
                let look = source.look(old.committed, |slot| {
                    for (value, word) in payload.iter_mut().zip(slot) {
                        *value = word.load(Ordering::Relaxed);
                    }
                });
                if let Look::Whole(generation) = look {
                    target.write(0, generation, payload.iter().copied());
                }
            }
        }
        words[word::ALLOCATED].store(old.allocated, Ordering::Relaxed);
        words[word::COMMITTED].store(old.committed, Ordering::Relaxed);
        words[word::EPOCH].store(old.epoch, Ordering::Relaxed);
    }

    /// Repairs what an earlier writer left half done. Answers how many rows that were.
    fn take_over(&mut self) -> u32 {
        let committed = self.committed().0;
        let mut repaired = 0;
        for table in &self.tables {
            // A table of one row is read whether or not that was ever written.
            for row in 0..self.used_rows(table).max(1).min(table.rows) {
                let cell = self.cell(table, row);
                repaired += u32::from(cell.repair(committed));
            }
        }
        // A header from a writer killed between the two stores of a batch, or from a damaged one.
        let allocated = &self.words()[word::ALLOCATED];
        allocated.store(
            allocated.load(Ordering::Relaxed).max(committed),
            Ordering::Relaxed,
        );
        self.begin_life();
        repaired
    }

    fn begin_life(&mut self) {
        let words = self.words();
        words[word::WRITER_PID].store(u64::from(std::process::id()), Ordering::Relaxed);
        let epoch = &words[word::EPOCH];
        epoch.store(
            epoch.load(Ordering::Relaxed).wrapping_add(1),
            Ordering::Release,
        );
        self.beat();
    }

    fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    pub(crate) fn region_id(&self) -> RegionId {
        self.region_id
    }

    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn lock(&self) -> &WriterLock {
        &self.lock
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.words()[word::EPOCH].load(Ordering::Relaxed)
    }

    pub(crate) fn committed(&self) -> Generation {
        Generation(self.words()[word::COMMITTED].load(Ordering::Relaxed))
    }

    pub(crate) fn table(&self, index: usize) -> Table {
        self.tables[index]
    }

    /// Rows of a table from the first up to the last that was ever written.
    pub(crate) fn used_rows(&self, table: &Table) -> u32 {
        used_rows(self.words(), table)
    }

    /// Writes a row under `generation`, to be seen once that is committed. It is counted as used
    /// before: a reader that finds the generation committed finds the row among the used ones too.
    pub(crate) fn write(
        &self,
        table: &Table,
        row: u32,
        generation: Generation,
        payload: impl Iterator<Item = u64>,
    ) {
        if row >= self.used_rows(table) {
            let used = &self.words()[word::USED_ROWS + table.index];
            used.store(u64::from(row) + 1, Ordering::Relaxed);
        }
        self.cell(table, row)
            .write(self.committed().0, generation.0, payload);
    }

    /// The cell of a row of ours.
    pub(crate) fn cell(&self, table: &Table, row: u32) -> Cell<'_> {
        cell_at(self.words(), table, row).expect("tables were laid out within the mapping")
    }

    /// Starts a batch: a generation nobody ever had.
    pub(crate) fn allocate(&mut self) -> Generation {
        let allocated = &self.words()[word::ALLOCATED];
        let generation = allocated.load(Ordering::Relaxed) + 1;
        allocated.store(generation, Ordering::Relaxed);
        Generation(generation)
    }

    /// Makes everything written under `generation` visible at once.
    pub(crate) fn commit(&mut self, generation: Generation) {
        self.words()[word::COMMITTED].store(generation.0, Ordering::Release);
    }

    /// Leaves a sign of life in the header.
    pub(crate) fn beat(&mut self) {
        let words = self.words();
        words[word::HEARTBEAT_WALL].store(wall_ns(), Ordering::Relaxed);
        words[word::HEARTBEAT_MONOTONIC].store(monotonic_ns(), Ordering::Relaxed);
    }
}

/// A region file found by its starting writer.
struct Existing {
    mapping: Mapping,
    sizes: Sizes,
    region_id: RegionId,
    retired: bool,
    epoch: u64,
    allocated: u64,
    committed: u64,
}

/// Opens what is at `path`. `None`: nothing, or nothing this build can use.
fn existing(path: &Path, kind: RegionKind) -> Result<Option<Existing>, OpenError> {
    let fail = |step, source: io::Error| OpenError::File {
        step,
        path: path.to_owned(),
        source,
    };
    let file = match open_for_writing(path) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(fail("open", err)),
    };
    let status = file.metadata().map_err(|err| fail("look at", err))?;
    let length = usize::try_from(status.len()).unwrap_or(usize::MAX);
    if !status.is_file() || length < Header::INFO.size {
        return Ok(None);
    }
    let head =
        Mapping::writable(&file, Header::INFO.size / 8).map_err(|err| fail("map", err.into()))?;
    let Some(header) = load_header(head.words()) else {
        return Ok(None);
    };
    if refuse_header(&header, kind).is_some() {
        return Ok(None);
    }
    // Damaged: no counter gets there by counting.
    if header.allocated.max(header.committed) > u64::MAX / 2 {
        return Ok(None);
    }
    let Some(sizes) = claimed_sizes(&header) else {
        return Ok(None);
    };
    let words = total_words(kind, sizes);
    if length < words * 8 {
        return Ok(None);
    }
    let mapping = Mapping::writable(&file, words).map_err(|err| fail("map", err.into()))?;
    Ok(Some(Existing {
        mapping,
        sizes,
        region_id: RegionId(header.region_id),
        retired: header.retired != 0,
        epoch: header.epoch,
        allocated: header.allocated.max(header.committed),
        committed: header.committed,
    }))
}

/// Opens without following a link: the name is ours, whatever someone put there is not.
fn open_for_writing(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0))
        .open(path)
}

/// Marks the file at `path`, of whatever layout, as replaced. Only files that start with our magic:
/// the first four fields of the header never move.
fn retire(path: &Path) {
    let Ok(file) = open_for_writing(path) else {
        return;
    };
    let length = file.metadata().map_or(0, |status| status.len());
    if length < Header::INFO.size as u64 {
        return;
    }
    if let Ok(head) = Mapping::writable(&file, Header::INFO.size / 8)
        && head.words()[0].load(Ordering::Relaxed) == MAGIC
    {
        head.words()[word::RETIRED].store(1, Ordering::Release);
    }
}
