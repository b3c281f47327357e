//! Writing the desired region.

use std::path::Path;

use super::{ContainerRow, DesiredSnapshot, NodeRow, PortKey, PortRow, table};
use crate::ids::{ContainerId, Generation, RegionId};
use crate::layout::{RawRow, RegionKind, Sizes};
use crate::lock::WriterLock;
use crate::observed::{ObservedSnapshot, PortState};
use crate::region::{OpenError, ReadError, RegionReader, RegionWriter, Start, copy_words};
use crate::table::{BatchError, Index, KeyedRow, Staged, state};

/// The writing end of the desired region: one per directory.
#[derive(Debug)]
pub struct DesiredWriter {
    region: RegionWriter,
    start: Start,
    ports: Index<PortKey>,
    containers: Index<ContainerId>,
    staged: Staged,
}

/// What a batch is to change. Nothing is visible before all of it is.
#[derive(Debug, Default)]
pub struct DesiredBatch {
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    PutPort(PortRow),
    RemovePort(PortKey),
    PutContainer(ContainerRow),
    RemoveContainer(ContainerId),
    Node(NodeRow),
}

impl DesiredBatch {
    /// Wants a port, new or changed.
    pub fn put_port(&mut self, row: PortRow) {
        self.changes.push(Change::PutPort(row));
    }

    /// Wants a port no longer. Removing what is not there is nothing.
    pub fn remove_port(&mut self, key: PortKey) {
        self.changes.push(Change::RemovePort(key));
    }

    /// Wants a container sampled, new or changed.
    pub fn put_container(&mut self, row: ContainerRow) {
        self.changes.push(Change::PutContainer(row));
    }

    /// Wants a container sampled no longer. Removing what is not there is nothing.
    pub fn remove_container(&mut self, id: ContainerId) {
        self.changes.push(Change::RemoveContainer(id));
    }

    /// Sets what holds for the node.
    pub fn set_node(&mut self, row: NodeRow) {
        self.changes.push(Change::Node(row));
    }

    /// Whether nothing was asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl DesiredWriter {
    /// Becomes the writer of `directory`: takes its lock, then takes over, grows or creates the
    /// region. `sizes.ports` and `sizes.containers` count, the others are the observed region's.
    ///
    /// # Errors
    /// [`OpenError`]: the lock is held or cannot be taken, the directory is not on tmpfs, the sizes are out
    /// of bounds, or a file operation failed.
    pub fn open(directory: impl AsRef<Path>, sizes: Sizes) -> Result<Self, OpenError> {
        let lock = WriterLock::acquire(&directory).map_err(|source| OpenError::Lock {
            directory: directory.as_ref().to_owned(),
            source,
        })?;
        Self::open_locked(lock, sizes)
    }

    /// As [`DesiredWriter::open`], with a lock taken before.
    ///
    /// # Errors
    /// [`OpenError`]: another process has become the writer, the directory is not on tmpfs, the sizes are out
    /// of bounds, or a file operation failed.
    pub fn open_locked(lock: WriterLock, sizes: Sizes) -> Result<Self, OpenError> {
        let (mut region, start) = RegionWriter::open(lock, RegionKind::Desired, sizes)?;
        let mut junk = Vec::new();
        let ports = Index::load::<PortRow>(&region, &mut junk);
        let containers = Index::load::<ContainerRow>(&region, &mut junk);
        let mut staged = Staged::default();
        for (table, row) in junk {
            staged.free(table, row);
        }
        if !staged.is_empty() {
            let generation = region.allocate();
            staged.commit(&mut region, generation);
        }
        Ok(Self {
            region,
            start,
            ports,
            containers,
            staged,
        })
    }

    /// How the region was found.
    #[must_use]
    pub fn start(&self) -> Start {
        self.start
    }

    /// The region's identity, which acknowledgements name.
    #[must_use]
    pub fn region_id(&self) -> RegionId {
        self.region.region_id()
    }

    /// This life of the writer.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.region.epoch()
    }

    /// The last generation made visible.
    #[must_use]
    pub fn committed(&self) -> Generation {
        self.region.committed()
    }

    /// The sizes the region really has (never smaller than asked for).
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.region.sizes()
    }

    /// The directory written to.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.region.lock().directory()
    }

    /// Leaves a sign of life; call it about once a second. Answers whether the file had to be made
    /// again, because somebody had taken its name away.
    ///
    /// # Errors
    /// [`OpenError::LockLost`]: the lock's name was taken away and another process has become the writer;
    /// nothing was or will be written, end. Others: a name is taken and the file cannot be made again.
    pub fn heartbeat(&mut self) -> Result<bool, OpenError> {
        self.region.heartbeat()
    }

    /// Makes all changes of `fill` visible at once and answers their generation. A row that cannot
    /// be written refuses the whole batch. Rows put get the answered generation, changed or not. A
    /// batch without changes answers the generation committed last.
    ///
    /// # Errors
    /// [`BatchError`]: a table is full, a row makes no sense or does not fit, a removal is not acknowledged
    /// yet, or another process has become the writer.
    pub fn batch(
        &mut self,
        fill: impl FnOnce(&mut DesiredBatch),
    ) -> Result<Generation, BatchError> {
        let mut batch = DesiredBatch::default();
        fill(&mut batch);
        if batch.is_empty() {
            return Ok(self.committed());
        }
        self.region.may_write()?;
        let generation = self.region.allocate();
        self.staged.clear();
        if let Err(err) = self.stage(batch.changes, generation) {
            self.ports.roll_back();
            self.containers.roll_back();
            return Err(err);
        }
        self.commit(generation);
        Ok(generation)
    }

    fn stage(&mut self, changes: Vec<Change>, generation: Generation) -> Result<(), BatchError> {
        let Self {
            region,
            ports,
            containers,
            staged,
            ..
        } = self;
        for change in changes {
            match change {
                Change::PutPort(row) => put(ports, &row, staged)?,
                Change::RemovePort(key) => {
                    bury::<PortRow>(region, ports, key, generation, staged);
                }
                Change::PutContainer(row) => put(containers, &row, staged)?,
                Change::RemoveContainer(id) => {
                    bury::<ContainerRow>(region, containers, id, generation, staged);
                }
                Change::Node(row) => {
                    staged.raw(region.table(table::NODE), 0, &row.to_raw());
                }
            }
        }
        Ok(())
    }

    /// Makes what is staged visible.
    fn commit(&mut self, generation: Generation) {
        self.staged.commit(&mut self.region, generation);
        self.ports.settle();
        self.containers.settle();
    }

    /// Frees the rows of removed ports and containers whose removal `observed` acknowledges.
    /// Answers how many. Call it after each look at the observed region.
    pub fn release_acknowledged(&mut self, observed: &ObservedSnapshot) -> usize {
        let Some(applied) = observed
            .applied
            .filter(|it| it.region_id == self.region_id())
        else {
            return 0;
        };
        let ports: Vec<PortKey> = removed(&self.ports, applied.generation)
            .filter(|(key, generation)| match observed.port(*key) {
                None => true,
                Some(status) => {
                    status.state == PortState::Removed
                        && status.region_id == applied.region_id
                        && status.acknowledged >= *generation
                }
            })
            .map(|(key, _)| key)
            .collect();
        let containers: Vec<ContainerId> = removed(&self.containers, applied.generation)
            .filter(|(id, _)| observed.container(*id).is_none())
            .map(|(id, _)| id)
            .collect();
        if ports.is_empty() && containers.is_empty() || self.region.may_write().is_err() {
            return 0;
        }
        let generation = self.region.allocate();
        self.staged.clear();
        for key in &ports {
            self.ports.remove(key, &mut self.staged);
        }
        for id in &containers {
            self.containers.remove(id, &mut self.staged);
        }
        self.commit(generation);
        ports.len() + containers.len()
    }

    /// What the region says now: how a restarted control finds what it wanted before.
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read.
    pub fn snapshot(&self) -> Result<DesiredSnapshot, ReadError> {
        let mut reader = RegionReader::at(self.directory(), RegionKind::Desired);
        let mapped = reader.refresh()?;
        // Nobody else writes, so the first attempt is whole.
        DesiredSnapshot::copy(mapped, mapped.committed()).map_err(|_| ReadError::Busy {
            path: self.region.path().to_owned(),
            attempts: 1,
        })
    }
}

fn put<R: KeyedRow>(
    index: &mut Index<R::Key>,
    row: &R,
    staged: &mut Staged,
) -> Result<(), BatchError> {
    let key = row.key();
    if index.removed.contains_key(&key) {
        return Err(BatchError::RemovalPending {
            key: format!("{key:?}"),
        });
    }
    index.put(row, staged)
}

/// Marks a row removed, keeping what it says, so that readers know what to take down.
fn bury<R: KeyedRow>(
    region: &RegionWriter,
    index: &mut Index<R::Key>,
    key: R::Key,
    generation: Generation,
    staged: &mut Staged,
) {
    let Some(row) = index.entries.get(&key).copied() else {
        return;
    };
    if index.removed.contains_key(&key) {
        return;
    }
    let table = index.table;
    let mut bytes = vec![0u8; R::Raw::INFO.size];
    region
        .cell(&table, row)
        .read(region.committed().0, |slot| copy_words(slot, &mut bytes));
    if bytes[..4] == state::USED.to_le_bytes() {
        bytes[..4].copy_from_slice(&state::REMOVED.to_le_bytes());
        staged
            .space(table, row, bytes.len())
            .copy_from_slice(&bytes);
        index.bury(key, generation);
    } else {
        // Put earlier in this very batch: nobody ever saw it.
        index.remove(&key, staged);
    }
}

fn removed<K: Copy>(
    index: &Index<K>,
    applied: Generation,
) -> impl Iterator<Item = (K, Generation)> + '_ {
    let removed = index.removed.iter();
    removed
        .map(|(key, generation)| (*key, *generation))
        .filter(move |(_, generation)| *generation <= applied)
}
