//! The writing end of a region file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::rand::GetRandomFlags;

use super::{
    OpenError, cell_at, claimed_sizes, load_header, monotonic_ns, refuse_header, total_words,
    used_rows, wall_ns, word, words_of,
};
use crate::cell::{Cell, ReadOutcome};
use crate::ids::{Generation, RegionId};
use crate::layout::{Header, LAYOUT_HASH, LAYOUT_VERSION, MAGIC, RawRow, RegionKind, Sizes, Table};
use crate::lock::{LockError, LockLost, WriterLock};
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

/// Owns the file: the only process that stores to it. What the header says it knows itself and never
/// reads from there: whatever happens to the file, its next sign of life puts it right.
#[derive(Debug)]
pub(crate) struct RegionWriter {
    kind: RegionKind,
    path: PathBuf,
    sizes: Sizes,
    tables: Vec<Table>,
    region_id: RegionId,
    epoch: u64,
    allocated: u64,
    committed: u64,
    /// Per table, as in the header.
    used: Vec<AtomicU64>,
    place: Place,
    mapping: Mapping,
    /// Whose the directory is now, if it is no longer ours: nothing is stored then.
    lock_lost: Option<LockLost>,
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
                let tables = kind.tables(old.sizes);
                let used = tables
                    .iter()
                    .map(|table| u64::from(used_rows(old.mapping.words(), table)).into())
                    .collect();
                let mut writer = Self {
                    kind,
                    tables,
                    sizes: old.sizes,
                    region_id: old.region_id,
                    epoch: old.epoch,
                    allocated: old.allocated,
                    committed: old.committed,
                    used,
                    place: old.place,
                    mapping: old.mapping,
                    path,
                    lock_lost: None,
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
        let mut id = [0u8; 16];
        rustix::rand::getrandom(&mut id, GetRandomFlags::empty()).map_err(|err| {
            OpenError::File {
                step: "make an id for",
                path: path.clone(),
                source: err.into(),
            }
        })?;
        let (temporary, mapping, place) = make(&path, total_words(kind, sizes))?;
        let tables = kind.tables(sizes);
        let mut writer = Self {
            kind,
            used: tables.iter().map(|_| AtomicU64::new(0)).collect(),
            tables,
            sizes,
            region_id: RegionId(id),
            epoch: 0,
            allocated: 0,
            committed: 0,
            place,
            mapping,
            path,
            lock_lost: None,
            lock,
        };
        if let Some(old) = old {
            writer.carry_over(old);
        }
        writer.begin_life();
        retire(&writer.path);
        writer.put_in_place(&temporary)?;
        Ok(writer)
    }

    fn put_in_place(&self, temporary: &Path) -> Result<(), OpenError> {
        std::fs::rename(temporary, &self.path).map_err(|source| OpenError::File {
            step: "put in place",
            path: self.path.clone(),
            source,
        })
    }

    /// Leaves a sign of life, and keeps lock and file in their places. Answers whether the file was
    /// made again. Costs four `stat`s.
    pub(crate) fn heartbeat(&mut self) -> Result<bool, OpenError> {
        let locked = self.hold();
        // Without a lock file nobody else can write either.
        if !matches!(locked, Err(OpenError::LockLost(_))) {
            self.beat();
        }
        locked?;
        self.keep_in_place()
    }

    /// Whether this may still write; to be asked before each batch. Costs two `stat`s.
    pub(crate) fn may_write(&mut self) -> Result<(), LockLost> {
        match self.hold() {
            Err(OpenError::LockLost(lock_lost)) => Err(lock_lost),
            _ => Ok(()),
        }
    }

    /// Takes the lock again when its name is gone or somebody else's. Who has it meanwhile, or has had
    /// it and written, is the writer: the indexes here are of no use any more.
    fn hold(&mut self) -> Result<(), OpenError> {
        if let Some(lock_lost) = &self.lock_lost {
            return Err(lock_lost.clone().into());
        }
        if self.lock.is_in_place() {
            return Ok(());
        }
        let directory = self.lock.directory().to_owned();
        let pid = match WriterLock::acquire(&directory) {
            Ok(lock) if self.words()[word::EPOCH].load(Ordering::Acquire) == self.epoch => {
                self.lock = lock;
                return Ok(());
            }
            Ok(_) => None,
            Err(LockError::Held(holder)) => holder.pid,
            Err(source) => return Err(OpenError::Lock { directory, source }),
        };
        let lock_lost = LockLost { pid, directory };
        self.lock_lost = Some(lock_lost.clone());
        Err(lock_lost.into())
    }

    /// Makes the file again when its name is gone or somebody else's: readers would look there in
    /// vain for ever.
    fn keep_in_place(&mut self) -> Result<bool, OpenError> {
        if std::fs::symlink_metadata(&self.path)
            .is_ok_and(|status| Place::of(&status) == self.place)
        {
            return Ok(false);
        }
        let (temporary, mapping, place) = make(&self.path, self.words().len())?;
        for (to, from) in mapping.words().iter().zip(self.words()) {
            to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.put_in_place(&temporary)?;
        self.mapping = mapping;
        self.place = place;
        Ok(true)
    }

    /// Copies the committed rows of a smaller region into this one, before anyone can see it.
    fn carry_over(&mut self, old: &Existing) {
        let words = self.mapping.words();
        for ((table, from), own) in (self.tables.iter())
            .zip(&self.kind.tables(old.sizes))
            .zip(&self.used)
        {
            if table.payload_words != from.payload_words {
                // The process pool: its bank has another length, and the next tick fills it.
                continue;
            }
            let mut payload = vec![0u64; from.payload_words];
            let used = used_rows(old.mapping.words(), from);
            own.store(u64::from(used), Ordering::Relaxed);
            for row in 0..used {
                let (Some(source), Some(target)) = (
                    cell_at(old.mapping.words(), from, row),
                    cell_at(words, table, row),
                ) else {
                    continue;
                };
                let outcome = source.read(old.committed, |slot| {
                    for (value, word) in payload.iter_mut().zip(slot) {
                        *value = word.load(Ordering::Relaxed);
                    }
                });
                if let ReadOutcome::Whole(generation) = outcome {
                    target.write(0, generation, payload.iter().copied());
                }
            }
        }
        self.allocated = old.allocated;
        self.committed = old.committed;
        self.epoch = old.epoch;
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
        self.begin_life();
        repaired
    }

    fn begin_life(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
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
        self.epoch
    }

    pub(crate) fn committed(&self) -> Generation {
        Generation(self.committed)
    }

    pub(crate) fn table(&self, index: usize) -> Table {
        self.tables[index]
    }

    /// Rows of a table from the first up to the last that was ever written.
    pub(crate) fn used_rows(&self, table: &Table) -> u32 {
        let used = self.used[table.index].load(Ordering::Relaxed);
        u32::try_from(used).map_or(table.rows, |used| used.min(table.rows))
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
            let used = u64::from(row) + 1;
            self.used[table.index].store(used, Ordering::Relaxed);
            self.words()[word::USED_ROWS + table.index].store(used, Ordering::Relaxed);
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
        self.allocated += 1;
        self.words()[word::ALLOCATED].store(self.allocated, Ordering::Relaxed);
        Generation(self.allocated)
    }

    /// Makes everything written under `generation` visible at once.
    pub(crate) fn commit(&mut self, generation: Generation) {
        self.committed = generation.0;
        self.words()[word::COMMITTED].store(generation.0, Ordering::Release);
    }

    /// Leaves a sign of life in the header, and puts right what else it says.
    fn beat(&mut self) {
        let mut header = Header {
            magic: MAGIC,
            layout_version: LAYOUT_VERSION,
            region: self.kind.code(),
            layout_hash: LAYOUT_HASH,
            region_id: self.region_id.0,
            epoch: self.epoch,
            allocated: self.allocated,
            committed: self.committed,
            heartbeat_monotonic_ns: monotonic_ns(),
            heartbeat_wall_ns: wall_ns(),
            writer_pid: u64::from(std::process::id()),
            file_bytes: (self.words().len() * size_of::<u64>()) as u64,
            port_rows: self.sizes.ports,
            container_rows: self.sizes.containers,
            accelerator_rows: self.sizes.accelerators,
            process_rows: self.sizes.processes,
            ..Header::default()
        };
        for (used, own) in header.used_rows.iter_mut().zip(&self.used) {
            *used = own.load(Ordering::Relaxed);
        }
        let mut raw = [0u8; Header::INFO.size];
        header.store(&mut raw);
        for (word, value) in self.words().iter().zip(words_of(&raw)) {
            // Release: who sees the generation or the epoch sees what came before them.
            word.store(value, Ordering::Release);
        }
    }
}

/// A region file found by its starting writer.
struct Existing {
    mapping: Mapping,
    place: Place,
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
        // A link is none of ours, and is replaced.
        Err(err) if err.kind() == io::ErrorKind::NotFound || is_link(&err) => return Ok(None),
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
        place: Place::of(&status),
        sizes,
        region_id: RegionId(header.region_id),
        retired: header.retired != 0,
        epoch: header.epoch,
        allocated: header.allocated.max(header.committed),
        committed: header.committed,
    }))
}

fn is_link(err: &io::Error) -> bool {
    err.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    device: u64,
    inode: u64,
}

impl Place {
    fn of(status: &std::fs::Metadata) -> Self {
        Self {
            device: status.dev(),
            inode: status.ino(),
        }
    }
}

/// Makes a file of `words` zeros beside `path`, under a name nobody reads.
fn make(path: &Path, words: usize) -> Result<(PathBuf, Mapping, Place), OpenError> {
    let fail = |step, source: io::Error| OpenError::File {
        step,
        path: path.to_owned(),
        source,
    };
    let bytes = (words * size_of::<u64>()) as u64;
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
                path: path.to_owned(),
                bytes,
            },
            other => fail("allocate", other.into()),
        });
    }
    let status = file.metadata().map_err(|err| fail("look at", err))?;
    let mapping = Mapping::writable(&file, words).map_err(|err| fail("map", err.into()))?;
    Ok((temporary, mapping, Place::of(&status)))
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
