//! Reading the observed region.

use std::path::Path;
use std::sync::Arc;

use super::{
    AcceleratorRow, Applied, ContainerSample, NodeSample, PortStatus, ProcessSample, table,
};
use crate::cell::ReadOutcome;
use crate::desired::PortKey;
use crate::ids::{ContainerId, Generation, RegionId};
use crate::layout::{RawApplied, RawBank, RawNodeSample, RawProcess, RawRow, RegionKind, Sizes};
use crate::region::{Mapped, ReadError, RegionReader, Snapshotted, WriterLife, copy_words};
use crate::table::{Kept, Moved, copy_table, copy_written, single};

/// Everything the observed region says at one committed generation, except processes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ObservedSnapshot {
    /// Which region.
    pub region_id: RegionId,
    /// Which life of its writer; rates must skip one tick when it changes.
    pub epoch: u64,
    /// The generation this is a copy of.
    pub committed: Generation,
    /// How far the desired region has been looked at.
    pub applied: Option<Applied>,
    /// What became of ports, sorted by key. The same list as in the snapshot before when none was written.
    pub ports: Arc<Vec<PortStatus>>,
    /// Samples of containers, sorted by id. The same list as in the snapshot before when none was written.
    pub containers: Arc<Vec<ContainerSample>>,
    /// Accelerators, sorted by key.
    pub accelerators: Vec<AcceleratorRow>,
    /// The node.
    pub node: Option<NodeSample>,
    /// How many processes were listed last, if any ever were.
    pub processes: Option<ProcessCounts>,
    /// Rows that made no sense and were left out. Not 0 means a damaged region.
    pub invalid_rows: u32,
}

impl ObservedSnapshot {
    /// What became of one port.
    #[must_use]
    pub fn port(&self, key: PortKey) -> Option<&PortStatus> {
        let place = self
            .ports
            .binary_search_by_key(&key, |status| status.key)
            .ok()?;
        self.ports.get(place)
    }

    /// One container's sample.
    #[must_use]
    pub fn container(&self, id: ContainerId) -> Option<&ContainerSample> {
        let place = self
            .containers
            .binary_search_by_key(&id, |sample| sample.container_id)
            .ok()?;
        self.containers.get(place)
    }

    fn copy(mapped: &Mapped, committed: Generation) -> Result<Self, Moved> {
        let ports = copy_table::<PortStatus>(mapped, committed)?;
        let containers = copy_table::<ContainerSample>(mapped, committed)?;
        let rest = Self::copy_rest(mapped, committed)?;
        Ok(Self {
            ports: Arc::new(ports.used),
            containers: Arc::new(containers.used),
            invalid_rows: rest
                .invalid_rows
                .saturating_add(ports.invalid)
                .saturating_add(containers.invalid),
            ..rest
        })
    }

    /// All but ports and containers.
    fn copy_rest(mapped: &Mapped, committed: Generation) -> Result<Self, Moved> {
        let epoch = mapped.epoch();
        let accelerators = copy_table::<AcceleratorRow>(mapped, committed)?;
        let applied = single::<RawApplied>(mapped, table::APPLIED, committed)?;
        let node = single::<RawNodeSample>(mapped, table::NODE, committed)?;
        Ok(Self {
            region_id: mapped.region_id(),
            epoch,
            committed,
            ports: Arc::default(),
            containers: Arc::default(),
            accelerators: accelerators.used,
            applied: applied.as_ref().map(Applied::from_raw),
            node: node.as_ref().map(NodeSample::from_raw),
            processes: copy_process_counts(mapped, committed)?,
            invalid_rows: accelerators.invalid,
        })
    }
}

/// The tables of the last snapshot.
#[derive(Debug, Default)]
struct Tables {
    ports: Kept<PortStatus>,
    containers: Kept<ContainerSample>,
}

/// Processes of containers in the last listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessCounts {
    /// Those that were listed.
    pub listed: u32,
    /// Those that were not: beyond what is listed of one container, without room, or of a container
    /// that hangs.
    pub left_out: u32,
}

/// The processes of one pass.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Processes {
    /// Pass they were published with.
    pub tick: u64,
    /// When they were listed, CLOCK_MONOTONIC, ns.
    pub taken_monotonic_ns: u64,
    /// The processes that had room.
    pub list: Vec<ProcessSample>,
    /// Those that had none.
    pub left_out: u32,
    /// Rows that made no sense and were left out.
    pub invalid_rows: u32,
}

/// The reading end of an observed region. Finds the file again when it is replaced.
#[derive(Debug)]
pub struct ObservedReader {
    region: RegionReader,
    last: Option<Arc<ObservedSnapshot>>,
    tables: Tables,
}

impl ObservedReader {
    /// A reader for the region in the dataplane's directory, whether or not it is there yet.
    #[must_use]
    pub fn at(directory: impl AsRef<Path>) -> Self {
        Self {
            region: RegionReader::at(directory.as_ref(), RegionKind::Observed),
            last: None,
            tables: Tables::default(),
        }
    }

    /// A reader for the region in the dataplane's directory, which must be there.
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, ReadError> {
        let mut reader = Self::at(directory);
        reader.region.refresh()?;
        Ok(reader)
    }

    /// The region file.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.region.path()
    }

    /// The committed generation of the region as last found: one load, no system call. `None`
    /// before the first success of another call.
    #[must_use]
    pub fn committed(&self) -> Option<Generation> {
        self.region.current().map(Mapped::committed)
    }

    /// The region's sizes as last found.
    #[must_use]
    pub fn sizes(&self) -> Option<Sizes> {
        self.region.current().map(Mapped::sizes)
    }

    /// Who writes the region and when it last showed a sign of life.
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read.
    pub fn writer(&mut self) -> Result<WriterLife, ReadError> {
        Ok(self.region.refresh()?.life())
    }

    /// A consistent copy of everything but processes; the last one again when nothing was committed
    /// since (one `stat` then). Of ports and containers only rows that were written since are copied. On an
    /// error the last good copy is still [`ObservedReader::last`].
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read, or it changed during every attempt to copy
    /// it.
    pub fn snapshot(&mut self) -> Result<Arc<ObservedSnapshot>, ReadError> {
        let mapped = self.region.refresh()?;
        if let Some(last) = &self.last
            && last.region_id == mapped.region_id()
            && last.committed == mapped.committed()
            && last.epoch == mapped.epoch()
        {
            return Ok(Arc::clone(last));
        }
        let known = self.last.as_ref().filter(|it| it.invalid_rows == 0);
        if known.is_none_or(|it| it.region_id != mapped.region_id()) {
            self.tables = Tables::default();
        }
        let Tables { ports, containers } = &self.tables;
        let (ports, containers, mut fresh) = self.region.consistent(|mapped, committed| {
            let copied = ObservedSnapshot::copy_rest(mapped, committed).and_then(|rest| {
                let ports = copy_written::<PortStatus>(mapped, committed, &ports.seen)?;
                let containers =
                    copy_written::<ContainerSample>(mapped, committed, &containers.seen)?;
                Ok((ports, containers, rest))
            });
            match copied {
                Ok(copied) => Snapshotted::Whole(copied),
                Err(Moved) => Snapshotted::Moved,
            }
        })?;
        let invalid = self.tables.ports.take(ports) + self.tables.containers.take(containers);
        if invalid == 0 {
            fresh.ports = Arc::clone(&self.tables.ports.rows);
            fresh.containers = Arc::clone(&self.tables.containers.rows);
        } else {
            self.tables = Tables::default();
            fresh = self.read(ObservedSnapshot::copy)?;
        }
        let fresh = Arc::new(fresh);
        self.last = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    /// The last good copy, however old.
    #[must_use]
    pub fn last(&self) -> Option<&Arc<ObservedSnapshot>> {
        self.last.as_ref()
    }

    /// How far the desired region has been looked at.
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read, or it changed during every attempt to copy
    /// it.
    pub fn applied(&mut self) -> Result<Option<Applied>, ReadError> {
        self.read(|mapped, committed| single::<RawApplied>(mapped, table::APPLIED, committed))
            .map(|raw| raw.as_ref().map(Applied::from_raw))
    }

    /// The processes of the last pass that published any.
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read, or it changed during every attempt to copy
    /// it.
    pub fn processes(&mut self) -> Result<Processes, ReadError> {
        self.read(copy_processes)
    }

    fn read<T>(
        &mut self,
        mut copy: impl FnMut(&Mapped, Generation) -> Result<T, Moved>,
    ) -> Result<T, ReadError> {
        self.region.refresh()?;
        self.region
            .consistent(|mapped, committed| match copy(mapped, committed) {
                Ok(value) => Snapshotted::Whole(value),
                Err(Moved) => Snapshotted::Moved,
            })
    }
}

/// The head of the bank alone.
fn copy_process_counts(
    mapped: &Mapped,
    committed: Generation,
) -> Result<Option<ProcessCounts>, Moved> {
    let table = mapped.table(table::PROCESSES);
    let mut counts = ProcessCounts::default();
    let outcome = mapped.cell(&table, 0).read(committed.0, |slot| {
        let (first, rows) = slot.split_at(RawBank::INFO.size / 8);
        let mut raw = [0u8; RawBank::INFO.size];
        copy_words(first, &mut raw);
        let head = RawBank::load(&raw);
        // As for the rows themselves: no more than there is room for.
        let room = u32::try_from(rows.len() * 8 / RawProcess::INFO.size).unwrap_or(u32::MAX);
        counts = ProcessCounts {
            listed: head.count.min(room),
            left_out: head.left_out,
        };
    });
    match outcome {
        ReadOutcome::Moved => Err(Moved),
        ReadOutcome::Empty => Ok(None),
        ReadOutcome::Whole(_) => Ok(Some(counts)),
    }
}

fn copy_processes(mapped: &Mapped, committed: Generation) -> Result<Processes, Moved> {
    let table = mapped.table(table::PROCESSES);
    let mut bytes = Vec::new();
    let mut head = RawBank::default();
    let outcome = mapped.cell(&table, 0).read(committed.0, |slot| {
        let (first, rows) = slot.split_at(RawBank::INFO.size / 8);
        let mut raw = [0u8; RawBank::INFO.size];
        copy_words(first, &mut raw);
        head = RawBank::load(&raw);
        // The count is the writer's word; the slot's end is ours.
        let length = (head.count as usize).saturating_mul(RawProcess::INFO.size);
        bytes.resize(length.min(rows.len() * 8), 0);
        copy_words(rows, &mut bytes);
    });
    match outcome {
        ReadOutcome::Moved => Err(Moved),
        ReadOutcome::Empty => Ok(Processes::default()),
        ReadOutcome::Whole(_) => {
            let rows = bytes.chunks_exact(RawProcess::INFO.size);
            let total = rows.len();
            let list: Vec<ProcessSample> = rows
                .filter_map(|row| ProcessSample::from_raw(&RawProcess::load(row)))
                .collect();
            let invalid_rows = u32::try_from(total - list.len()).unwrap_or(u32::MAX);
            Ok(Processes {
                tick: head.tick,
                taken_monotonic_ns: head.taken_monotonic_ns,
                list,
                left_out: head.left_out,
                invalid_rows,
            })
        }
    }
}
