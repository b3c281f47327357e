//! Writing the observed region.

use std::path::Path;

use super::{
    AcceleratorKey, AcceleratorRow, Applied, ContainerSample, NodeSample, PortStatus, Processes,
    Samples, table,
};
use crate::desired::PortKey;
use crate::ids::{ContainerId, Generation, RegionId};
use crate::layout::{RawBank, RawProcess, RawRow, RegionKind, Sizes};
use crate::lock::{LockLost, WriterLock};
use crate::region::{OpenError, RegionWriter, Start, words_of};
use crate::table::{BatchError, Index, Staged};

/// The writing end of the observed region: one per directory.
#[derive(Debug)]
pub struct ObservedWriter {
    region: RegionWriter,
    start: Start,
    ports: Index<PortKey>,
    containers: Index<ContainerId>,
    accelerators: Index<AcceleratorKey>,
    /// Rows of the last list of samples, in its order: the next one is nearly always of the same
    /// containers, so none is looked up. Empty after a removal.
    rows: Vec<(ContainerId, u32)>,
    staged: Staged,
}

/// What a batch is to change. Nothing is visible before all of it is.
#[derive(Debug, Default)]
pub struct ObservedBatch {
    changes: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    Applied(Applied),
    PutPort(PortStatus),
    RemovePort(PortKey),
    PutContainers(Samples),
    RemoveContainer(ContainerId),
    PutAccelerator(Box<AcceleratorRow>),
    RemoveAccelerator(AcceleratorKey),
    Node(Box<NodeSample>),
    Processes(Processes),
}

impl ObservedBatch {
    /// Says how far the desired region has been looked at.
    pub fn set_applied(&mut self, applied: Applied) {
        self.changes.push(Change::Applied(applied));
    }

    /// Says what became of a port.
    pub fn put_port(&mut self, status: PortStatus) {
        self.changes.push(Change::PutPort(status));
    }

    /// Forgets a port; only after the desired region has forgotten it too.
    pub fn remove_port(&mut self, key: PortKey) {
        self.changes.push(Change::RemovePort(key));
    }

    /// Publishes a container's sample.
    pub fn put_container(&mut self, sample: ContainerSample) {
        self.put_containers([sample].into_iter().collect());
    }

    /// Publishes samples of containers.
    pub fn put_containers(&mut self, samples: Samples) {
        self.changes.push(Change::PutContainers(samples));
    }

    /// Forgets a container.
    pub fn remove_container(&mut self, id: ContainerId) {
        self.changes.push(Change::RemoveContainer(id));
    }

    /// Publishes an accelerator.
    pub fn put_accelerator(&mut self, row: AcceleratorRow) {
        self.changes.push(Change::PutAccelerator(Box::new(row)));
    }

    /// Forgets an accelerator.
    pub fn remove_accelerator(&mut self, key: AcceleratorKey) {
        self.changes.push(Change::RemoveAccelerator(key));
    }

    /// Publishes the node's sample.
    pub fn set_node(&mut self, sample: NodeSample) {
        self.changes.push(Change::Node(Box::new(sample)));
    }

    /// Publishes the processes as they were listed last. What does not fit the pool is left out
    /// and counted; `left_out` are those the caller left out itself.
    pub fn set_processes(&mut self, processes: Processes) {
        self.changes.push(Change::Processes(processes));
    }

    /// Whether nothing was asked for.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl ObservedWriter {
    /// Becomes the writer of `directory`: takes its lock, then takes over, grows or creates the
    /// region. Ports and containers should be the desired region's sizes.
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

    /// As [`ObservedWriter::open`], with a lock taken before.
    ///
    /// # Errors
    /// [`OpenError`]: another process has become the writer, the directory is not on tmpfs, the sizes are out
    /// of bounds, or a file operation failed.
    pub fn open_locked(lock: WriterLock, sizes: Sizes) -> Result<Self, OpenError> {
        let (mut region, start) = RegionWriter::open(lock, RegionKind::Observed, sizes)?;
        let mut junk = Vec::new();
        let ports = Index::load::<PortStatus>(&region, &mut junk);
        let containers = Index::load::<ContainerSample>(&region, &mut junk);
        let accelerators = Index::load::<AcceleratorRow>(&region, &mut junk);
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
            accelerators,
            rows: Vec::new(),
            staged,
        })
    }

    /// How the region was found.
    #[must_use]
    pub fn start(&self) -> Start {
        self.start
    }

    /// The region's identity.
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

    /// Keys of the port rows there are: an earlier life's too.
    pub fn port_keys(&self) -> impl Iterator<Item = PortKey> + '_ {
        self.ports.entries.keys().copied()
    }

    /// Ids of the container rows there are: an earlier life's too.
    pub fn container_ids(&self) -> impl Iterator<Item = ContainerId> + '_ {
        self.containers.entries.keys().copied()
    }

    /// Keys of the accelerator rows there are: an earlier life's too.
    pub fn accelerator_keys(&self) -> impl Iterator<Item = AcceleratorKey> + '_ {
        self.accelerators.entries.keys().copied()
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

    /// Whether this is still the writer; to be asked before anything is done that another would do. Costs
    /// two `stat`s.
    ///
    /// # Errors
    /// The lock's name was taken away and another process has become the writer: end.
    pub fn is_writer(&mut self) -> Result<(), LockLost> {
        self.region.may_write()
    }

    /// Makes all changes of `fill` visible at once and answers their generation. A row that cannot
    /// be written refuses the whole batch. A batch without changes answers the generation
    /// committed last.
    ///
    /// # Errors
    /// [`BatchError`]: a table is full, a row makes no sense or does not fit, or another process has become
    /// the writer.
    pub fn batch(
        &mut self,
        fill: impl FnOnce(&mut ObservedBatch),
    ) -> Result<Generation, BatchError> {
        let mut batch = ObservedBatch::default();
        fill(&mut batch);
        if batch.is_empty() {
            return Ok(self.committed());
        }
        self.region.may_write()?;
        self.staged.clear();
        if let Err(err) = self.stage(&batch.changes) {
            self.ports.roll_back();
            self.containers.roll_back();
            self.accelerators.roll_back();
            self.rows.clear();
            return Err(err);
        }
        let generation = self.region.allocate();
        self.staged.store(&self.region, generation);
        for change in &batch.changes {
            if let Change::PutContainers(samples) = change {
                self.store_samples(samples, generation);
            }
        }
        self.region.commit(generation);
        self.ports.settle();
        self.containers.settle();
        self.accelerators.settle();
        Ok(generation)
    }

    /// Finds room for all rows and encodes them, but for samples.
    fn stage(&mut self, changes: &[Change]) -> Result<(), BatchError> {
        let (region, staged) = (&self.region, &mut self.staged);
        for change in changes {
            match change {
                Change::Applied(applied) => {
                    staged.raw(region.table(table::APPLIED), 0, &applied.to_raw());
                }
                Change::PutPort(status) => self.ports.put(status, staged)?,
                Change::RemovePort(key) => self.ports.remove(key, staged),
                Change::PutContainers(samples) => {
                    for (at, id) in samples.ids().enumerate() {
                        if self.rows.get(at).is_none_or(|(known, _)| *known != id) {
                            let row = self.containers.place(id)?;
                            self.rows.truncate(at);
                            self.rows.push((id, row));
                        }
                    }
                }
                Change::RemoveContainer(id) => {
                    self.containers.remove(id, staged);
                    self.rows.clear();
                }
                Change::PutAccelerator(row) => self.accelerators.put(&**row, staged)?,
                Change::RemoveAccelerator(key) => self.accelerators.remove(key, staged),
                Change::Node(sample) => {
                    staged.raw(region.table(table::NODE), 0, &sample.to_raw());
                }
                Change::Processes(processes) => stage_processes(region, staged, processes),
            }
        }
        Ok(())
    }

    /// Samples go into their rows at once: there are many, and nothing of them can be refused.
    fn store_samples(&self, samples: &Samples, generation: Generation) {
        let Index { table, entries, .. } = &self.containers;
        for (at, (id, bytes)) in samples.raw().enumerate() {
            let known = self.rows.get(at).filter(|(known, _)| *known == id);
            let row = match known {
                Some((_, row)) => *row,
                // One that was removed later in the same batch has none.
                None => match entries.get(&id) {
                    Some(row) => *row,
                    None => continue,
                },
            };
            self.region.write(table, row, generation, words_of(bytes));
        }
    }
}

/// Stages a bank: its head, then as many processes as fit.
fn stage_processes(region: &RegionWriter, staged: &mut Staged, processes: &Processes) {
    let room = region.sizes().processes;
    let list = &processes.list;
    let fitting = &list[..list.len().min(room as usize)];
    let beyond = u32::try_from(list.len() - fitting.len()).unwrap_or(u32::MAX);
    let bank = RawBank {
        tick: processes.tick,
        count: u32::try_from(fitting.len()).unwrap_or(room),
        left_out: processes.left_out.saturating_add(beyond),
        taken_monotonic_ns: processes.taken_monotonic_ns,
        reserved: [0; 5],
    };
    let length = RawBank::INFO.size + fitting.len() * RawProcess::INFO.size;
    let bytes = staged.space(region.table(table::PROCESSES), 0, length);
    let (head, rest) = bytes.split_at_mut(RawBank::INFO.size);
    bank.store(head);
    for (process, row) in fitting
        .iter()
        .zip(rest.chunks_exact_mut(RawProcess::INFO.size))
    {
        process.to_raw().store(row);
    }
}
