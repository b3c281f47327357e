//! The reading end of a region file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{
    ReadError, WriterLife, cell_at, claimed_sizes, load_header, refuse_header, total_words,
    used_rows, word,
};
use crate::cell::Cell;
use crate::ids::{Generation, RegionId};
use crate::layout::{RegionKind, Sizes, Table};
use crate::mapping::Mapping;
use crate::sync::{AtomicU64, Ordering};

/// Attempts at one consistent copy of a region before [`ReadError::Busy`]. The writer commits a few
/// times a second and a copy takes well under a millisecond, so more than two are already unusual.
const ATTEMPTS: u32 = 16;

/// Finds the region by name and keeps it mapped.
#[derive(Debug)]
pub(crate) struct RegionReader {
    kind: RegionKind,
    path: PathBuf,
    mapped: Option<Mapped>,
}

/// A region file mapped for reading and checked.
#[derive(Debug)]
pub(crate) struct Mapped {
    mapping: Mapping,
    tables: Vec<Table>,
    sizes: Sizes,
    region_id: RegionId,
    device: u64,
    inode: u64,
}

/// What one attempt at a consistent copy came to.
#[derive(Debug)]
pub(crate) enum Snapshotted<T> {
    /// A copy at exactly the committed generation asked for.
    Whole(T),
    /// The writer was faster; try again.
    Moved,
}

impl RegionReader {
    /// Remembers where the region should be; nothing is opened yet.
    pub(crate) fn at(directory: &Path, kind: RegionKind) -> Self {
        Self {
            kind,
            path: directory.join(kind.file_name()),
            mapped: None,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The region as last mapped, without a look at the file system.
    pub(crate) fn current(&self) -> Option<&Mapped> {
        self.mapped.as_ref()
    }

    /// Makes sure that what is mapped is what has the name now. Costs one `stat`.
    pub(crate) fn refresh(&mut self) -> Result<&Mapped, ReadError> {
        let still = match std::fs::symlink_metadata(&self.path) {
            Ok(status) => self.mapped.as_ref().is_some_and(|mapped| {
                mapped.device == status.dev()
                    && mapped.inode == status.ino()
                    && status.len() >= mapped.bytes()
                    && !mapped.is_beheaded()
            }),
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                return Err(ReadError::Missing {
                    path: self.path.clone(),
                });
            }
            Err(err) => return Err(self.failed("look at", err)),
        };
        if !still {
            self.mapped = Some(self.map()?);
        }
        self.mapped.as_ref().ok_or_else(|| ReadError::Missing {
            path: self.path.clone(),
        })
    }

    fn failed(&self, step: &'static str, source: io::Error) -> ReadError {
        ReadError::File {
            step,
            path: self.path.clone(),
            source,
        }
    }

    fn unreadable(&self, why: &'static str) -> ReadError {
        ReadError::Unreadable {
            path: self.path.clone(),
            why,
        }
    }

    fn map(&self) -> Result<Mapped, ReadError> {
        let file = self.open()?;
        let status = file.metadata().map_err(|err| self.failed("look at", err))?;
        if !status.is_file() {
            return Err(self.unreadable("it is not a regular file"));
        }
        let length = usize::try_from(status.len()).unwrap_or(usize::MAX);
        let header_words = crate::layout::HEADER_BYTES / 8;
        if length < crate::layout::HEADER_BYTES {
            return Err(self.unreadable("it is shorter than a header"));
        }
        let head = Mapping::read_only(&file, header_words)
            .map_err(|err| self.failed("map", err.into()))?;
        let header = load_header(head.words())
            .ok_or_else(|| self.unreadable("it is shorter than a header"))?;
        if let Some(why) = refuse_header(&header, self.kind) {
            return Err(self.unreadable(why));
        }
        let sizes = claimed_sizes(&header)
            .ok_or_else(|| self.unreadable("its table sizes are out of bounds"))?;
        let words = total_words(self.kind, sizes);
        if length < words * 8 {
            return Err(self.unreadable("it is shorter than its tables"));
        }
        let mapping =
            Mapping::read_only(&file, words).map_err(|err| self.failed("map", err.into()))?;
        Ok(Mapped {
            mapping,
            tables: self.kind.tables(sizes),
            sizes,
            region_id: RegionId(header.region_id),
            device: status.dev(),
            inode: status.ino(),
        })
    }

    fn open(&self) -> Result<File, ReadError> {
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        OpenOptions::new()
            .read(true)
            .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
            .open(&self.path)
            .map_err(|err| match err.kind() {
                io::ErrorKind::NotFound => ReadError::Missing {
                    path: self.path.clone(),
                },
                _ => self.failed("open", err),
            })
    }

    /// Runs `copy` for the committed generation until it gets a whole copy or gives up.
    pub(crate) fn consistent<T>(
        &self,
        mut copy: impl FnMut(&Mapped, Generation) -> Snapshotted<T>,
    ) -> Result<T, ReadError> {
        let mapped = self.mapped.as_ref().ok_or_else(|| ReadError::Missing {
            path: self.path.clone(),
        })?;
        for _ in 0..ATTEMPTS {
            let copied = copy(mapped, mapped.committed());
            if mapped.is_beheaded() {
                return Err(self.unreadable("it was damaged or made shorter while it was read"));
            }
            if let Snapshotted::Whole(value) = copied {
                return Ok(value);
            }
        }
        Err(ReadError::Busy {
            path: self.path.clone(),
            attempts: ATTEMPTS,
        })
    }
}

impl Mapped {
    fn words(&self) -> &[AtomicU64] {
        self.mapping.words()
    }

    fn word(&self, index: usize) -> u64 {
        self.words()[index].load(Ordering::Relaxed)
    }

    fn bytes(&self) -> u64 {
        (self.words().len() * size_of::<u64>()) as u64
    }

    /// Whether the file no longer begins like a region: it was overwritten, or made shorter and what
    /// is read are zeros. A copy is good only if it still has its head after it was made.
    fn is_beheaded(&self) -> bool {
        self.words()[0].load(Ordering::Relaxed) != crate::layout::MAGIC
    }

    pub(crate) fn region_id(&self) -> RegionId {
        self.region_id
    }

    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The generation readers may see; orders every cell up to it before the caller.
    pub(crate) fn committed(&self) -> Generation {
        Generation(self.words()[word::COMMITTED].load(Ordering::Acquire))
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.words()[word::EPOCH].load(Ordering::Acquire)
    }

    pub(crate) fn life(&self) -> WriterLife {
        WriterLife {
            region_id: self.region_id,
            epoch: self.epoch(),
            pid: self.word(word::WRITER_PID),
            heartbeat_monotonic_ns: self.word(word::HEARTBEAT_MONOTONIC),
            heartbeat_wall_ns: self.word(word::HEARTBEAT_WALL),
        }
    }

    pub(crate) fn table(&self, index: usize) -> Table {
        self.tables[index]
    }

    /// Rows of a table that may hold anything at a generation that was found committed before.
    pub(crate) fn used_rows(&self, table: &Table) -> u32 {
        used_rows(self.words(), table)
    }

    pub(crate) fn cell(&self, table: &Table, row: u32) -> Cell<'_> {
        cell_at(self.words(), table, row).expect("table sizes were checked against the mapping")
    }
}
