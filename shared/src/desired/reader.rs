//! Reading the desired region.

use std::path::Path;
use std::sync::Arc;

use super::{ContainerRow, NodeRow, PortKey, PortRow, Removed, table};
use crate::ids::{ContainerId, Generation, RegionId};
use crate::layout::{RawNode, RegionKind, Sizes};
use crate::region::{Mapped, ReadError, RegionReader, Snapshotted, WriterLife};
use crate::table::{Moved, copy_table, single};

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
        let epoch = mapped.epoch();
        let ports = copy_table::<PortRow>(mapped, committed)?;
        let containers = copy_table::<ContainerRow>(mapped, committed)?;
        let node = single::<RawNode>(mapped, table::NODE, committed)?;
        Ok(Self {
            region_id: mapped.region_id(),
            epoch,
            committed,
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
            node: node.as_ref().map(NodeRow::from_raw),
            invalid_rows: ports.invalid.saturating_add(containers.invalid),
        })
    }
}

/// The reading end of a desired region. Finds the file again when it is replaced.
#[derive(Debug)]
pub struct DesiredReader {
    region: RegionReader,
    last: Option<Arc<DesiredSnapshot>>,
}

impl DesiredReader {
    /// A reader for the region in control's directory, whether or not it is there yet.
    #[must_use]
    pub fn at(directory: impl AsRef<Path>) -> Self {
        Self {
            region: RegionReader::at(directory.as_ref(), RegionKind::Desired),
            last: None,
        }
    }

    /// A reader for the region in control's directory, which must be there.
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
    pub fn writer(&mut self) -> Result<WriterLife, ReadError> {
        Ok(self.region.refresh()?.life())
    }

    /// A consistent copy of everything; the last one again when nothing was committed since (one
    /// `stat` then). On an error the last good copy is still [`DesiredReader::last`].
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

    /// The last good copy, however old.
    #[must_use]
    pub fn last(&self) -> Option<&Arc<DesiredSnapshot>> {
        self.last.as_ref()
    }
}
