//! Writing the observed region.

use std::path::Path;

use super::{
    AcceleratorKey, AcceleratorRow, Applied, ContainerSample, NodeSample, PortStatus, Processes,
    table,
};
use crate::desired::PortKey;
use crate::ids::{ContainerId, Generation, RegionId};
use crate::layout::{RawBank, RawProcess, RawRow, RegionKind, Sizes};
use crate::lock::WriterLock;
use crate::region::{OpenError, RegionWriter, Start};
use crate::table::{BatchError, Index, KeyedRow, Staged};

/// The writing end of the observed region: one per directory.
#[derive(Debug)]
pub struct ObservedWriter {
    region: RegionWriter,
    start: Start,
    ports: Index<PortKey>,
    containers: Index<ContainerId>,
    accelerators: Index<AcceleratorKey>,
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
    PutContainers(Vec<ContainerSample>),
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
        self.put_containers(vec![sample]);
    }

    /// Publishes samples of containers.
    pub fn put_containers(&mut self, samples: Vec<ContainerSample>) {
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
    pub fn open(directory: impl AsRef<Path>, sizes: Sizes) -> Result<Self, OpenError> {
        let lock = WriterLock::acquire(&directory).map_err(|source| OpenError::Lock {
            directory: directory.as_ref().to_owned(),
            source,
        })?;
        Self::open_locked(lock, sizes)
    }

    /// As [`ObservedWriter::open`], with a lock taken before.
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

    /// Leaves a sign of life; call it about once a second.
    pub fn heartbeat(&mut self) {
        self.region.beat();
    }

    /// Makes all changes of `fill` visible at once and answers their generation. A row that cannot
    /// be written refuses the whole batch. A batch without changes answers the generation
    /// committed last.
    pub fn batch(
        &mut self,
        fill: impl FnOnce(&mut ObservedBatch),
    ) -> Result<Generation, BatchError> {
        let mut batch = ObservedBatch::default();
        fill(&mut batch);
        if batch.is_empty() {
            return Ok(self.committed());
        }
        // The indexes change only together with the rows.
        let mut ports = self.ports.clone();
        let mut containers = self.containers.clone();
        let mut accelerators = self.accelerators.clone();
        let (region, staged) = (&mut self.region, &mut self.staged);
        staged.clear();
        for change in batch.changes {
            match change {
                Change::Applied(applied) => {
                    staged.raw(region.table(table::APPLIED), 0, &applied.to_raw());
                }
                Change::PutPort(status) => put(&mut ports, &status, staged)?,
                Change::RemovePort(key) => remove(&mut ports, &key, staged),
                Change::PutContainers(samples) => {
                    for sample in &samples {
                        put(&mut containers, sample, staged)?;
                    }
                }
                Change::RemoveContainer(id) => remove(&mut containers, &id, staged),
                Change::PutAccelerator(row) => put(&mut accelerators, &*row, staged)?,
                Change::RemoveAccelerator(key) => remove(&mut accelerators, &key, staged),
                Change::Node(sample) => {
                    staged.raw(region.table(table::NODE), 0, &sample.to_raw());
                }
                Change::Processes(processes) => stage_processes(region, staged, &processes),
            }
        }
        let generation = region.allocate();
        staged.commit(region, generation);
        self.ports = ports;
        self.containers = containers;
        self.accelerators = accelerators;
        Ok(generation)
    }
}

fn put<R: KeyedRow>(
    index: &mut Index<R::Key>,
    row: &R,
    staged: &mut Staged,
) -> Result<(), BatchError> {
    let raw = row.to_raw()?;
    let place = index.place(row.key())?;
    staged.raw(index.table, place, &raw);
    Ok(())
}

fn remove<K: Copy + Eq + std::hash::Hash>(index: &mut Index<K>, key: &K, staged: &mut Staged) {
    if let Some(row) = index.release(key) {
        staged.free(index.table, row);
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
