//! Reading the desired region.

use std::path::Path;
use std::sync::Arc;

use super::{ContainerRow, NodeRow, PortKey, PortRow, Removed, table};
use crate::ids::{ContainerId, Generation, RegionId};
use crate::layout::{RawNode, RegionKind, Sizes};
use crate::region::{Mapped, ReadError, RegionReader, Snapshotted, WriterLife};
use crate::table::{Moved, Rows, Seen, copy_table, copy_written, single};

/// Everything the desired region says at one committed generation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredSnapshot {
    /// Which region.
    pub region_id: RegionId,
    /// Which life of its writer.
    pub epoch: u64,
    /// The generation this is a copy of. 0: nothing was said yet, keep what runs.
    pub committed: Generation,
    /// Ports wanted, sorted by key.
    pub ports: Vec<PortRow>,
    /// Ports removed and not yet acknowledged, sorted by key.
    pub removed_ports: Vec<Removed<PortKey>>,
    /// Containers to sample, sorted by id.
    pub containers: Vec<ContainerRow>,
    /// Containers removed and not yet acknowledged, sorted by id.
    pub removed_containers: Vec<Removed<ContainerId>>,
    /// Node settings, if any were written.
    pub node: Option<NodeRow>,
    /// Rows that made no sense and were left out. Not 0 means a damaged region.
    pub invalid_rows: u32,
}

impl DesiredSnapshot {
    /// Whether a port was removed and that is not acknowledged yet.
    #[must_use]
    pub fn is_removed(&self, port: PortKey) -> bool {
        let found = self.removed_ports.binary_search_by_key(&port, |it| it.key);
        found.is_ok()
    }

    pub(super) fn copy(mapped: &Mapped, committed: Generation) -> Result<Self, Moved> {
        Ok(Self::of(
            Head::copy(mapped, committed)?,
            copy_table::<PortRow>(mapped, committed)?,
            copy_table::<ContainerRow>(mapped, committed)?,
        ))
    }

    fn of(head: Head, ports: Rows<PortRow>, containers: Rows<ContainerRow>) -> Self {
        Self {
            region_id: head.region_id,
            epoch: head.epoch,
            committed: head.committed,
            ports: ports.used,
            removed_ports: ports
                .removed
                .iter()
                .map(|row| Removed {
                    key: row.key(),
                    kernel_id: row.kernel_id,
                    generation: row.generation,
                })
                .collect(),
            containers: containers.used,
            removed_containers: containers
                .removed
                .iter()
                .map(|row| Removed {
                    key: row.container_id,
                    kernel_id: row.kernel_id,
                    generation: row.generation,
                })
                .collect(),
            node: head.node,
            invalid_rows: ports.invalid.saturating_add(containers.invalid),
        }
    }
}

/// What a region says beside its tables.
struct Head {
    region_id: RegionId,
    epoch: u64,
    committed: Generation,
    node: Option<NodeRow>,
}

impl Head {
    fn copy(mapped: &Mapped, committed: Generation) -> Result<Self, Moved> {
        let node = single::<RawNode>(mapped, table::NODE, committed)?;
        Ok(Self {
            region_id: mapped.region_id(),
            epoch: mapped.epoch(),
            committed,
            node: node.as_ref().map(NodeRow::from_raw),
        })
    }
}

/// What was written into the desired region since the changes before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DesiredChanges {
    /// The region as now, with no other rows than those that were written.
    pub rows: DesiredSnapshot,
    /// All rows there are are among these: what the reader knew before says nothing of this region, or
    /// some rows make no sense.
    pub whole: bool,
    /// Ports that have no row any more, not even a removed one. None when all rows are told.
    pub freed_ports: Vec<PortKey>,
    /// The same of containers.
    pub freed_containers: Vec<ContainerId>,
}

/// What the changes so far were read from.
#[derive(Debug, Default)]
struct Followed {
    /// Region, life of its writer, generation.
    mark: Option<(RegionId, u64, Generation)>,
    /// The tables below say what the region said then.
    known: bool,
    ports: Seen<PortKey>,
    containers: Seen<ContainerId>,
}

/// The reading end of a desired region. Finds the file again when it is replaced.
#[derive(Debug)]
pub struct DesiredReader {
    region: RegionReader,
    last: Option<Arc<DesiredSnapshot>>,
    followed: Followed,
}

impl DesiredReader {
    /// A reader for the region in control's directory, whether or not it is there yet.
    #[must_use]
    pub fn at(directory: impl AsRef<Path>) -> Self {
        Self {
            region: RegionReader::at(directory.as_ref(), RegionKind::Desired),
            last: None,
            followed: Followed::default(),
        }
    }

    /// A reader for the region in control's directory, which must be there.
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
    /// before the first successful [`DesiredReader::snapshot`] or [`DesiredReader::open`].
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

    /// A consistent copy of everything; the last one again when nothing was committed since (one
    /// `stat` then). On an error the last good copy is still [`DesiredReader::last`].
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read, or it changed during every attempt to copy
    /// it.
    pub fn snapshot(&mut self) -> Result<Arc<DesiredSnapshot>, ReadError> {
        let mapped = self.region.refresh()?;
        if let Some(last) = &self.last
            && last.region_id == mapped.region_id()
            && last.committed == mapped.committed()
            && last.epoch == mapped.epoch()
        {
            return Ok(Arc::clone(last));
        }
        let fresh = self.region.consistent(|mapped, committed| {
            match DesiredSnapshot::copy(mapped, committed) {
                Ok(snapshot) => Snapshotted::Whole(snapshot),
                Err(Moved) => Snapshotted::Moved,
            }
        })?;
        let fresh = Arc::new(fresh);
        self.last = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    /// What was written since the last call; `None` when nothing was (one `stat` then). Of a row that was
    /// not written only its generation is read. On an error the next call tells of all that this one would
    /// have.
    ///
    /// # Errors
    /// [`ReadError`]: there is no region that this build can read, or it changed during every attempt to copy
    /// it.
    pub fn changes(&mut self) -> Result<Option<DesiredChanges>, ReadError> {
        let mapped = self.region.refresh()?;
        let now = (mapped.region_id(), mapped.epoch(), mapped.committed());
        if self.followed.mark == Some(now) {
            return Ok(None);
        }
        // One that says nothing yet tells all when it does.
        let goes_on = |(region, _, committed)| region == now.0 && committed != Generation(0);
        if !self.followed.known || !self.followed.mark.is_some_and(goes_on) {
            self.followed = Followed::default();
        }
        let Followed {
            known,
            ports,
            containers,
            ..
        } = &self.followed;
        let whole = !known;
        let (head, ports, containers) = self.region.consistent(|mapped, committed| {
            let copied = Head::copy(mapped, committed).and_then(|head| {
                Ok((
                    head,
                    copy_written::<PortRow>(mapped, committed, ports)?,
                    copy_written::<ContainerRow>(mapped, committed, containers)?,
                ))
            });
            match copied {
                Ok(copied) => Snapshotted::Whole(copied),
                Err(Moved) => Snapshotted::Moved,
            }
        })?;
        let ports = self.followed.ports.take(ports);
        let containers = self.followed.containers.take(containers);
        let rows = DesiredSnapshot::of(head, ports.rows, containers.rows);
        self.followed.known = rows.invalid_rows == 0;
        if !self.followed.known && !whole {
            self.forget_changes();
            return self.changes();
        }
        self.followed.mark = Some((rows.region_id, rows.epoch, rows.committed));
        Ok(Some(DesiredChanges {
            rows,
            whole,
            freed_ports: ports.freed,
            freed_containers: containers.freed,
        }))
    }

    /// Has the next [`DesiredReader::changes`] tell all rows.
    pub fn forget_changes(&mut self) {
        self.followed = Followed::default();
    }

    /// The last good copy, however old.
    #[must_use]
    pub fn last(&self) -> Option<&Arc<DesiredSnapshot>> {
        self.last.as_ref()
    }
}
