//! The observed region: what the dataplane did and saw, written by the dataplane, read by control
//! and tools.
//!
//! In (writer): acknowledgements, port states, samples. Out (reader): one consistent snapshot per
//! committed generation, or single rows. Invariants: as of the desired region, a batch is visible
//! as a whole or not at all; every sample carries the tick it belongs to; a number that was not
//! read is absent, never zero.

mod counters;
mod reader;
mod rows;
mod writer;

pub use counters::{
    AcceleratorCounters, CounterInfo, CpuCounters, DiskCounters, GROUPS, IoCounters, Measured,
    MemoryCounters, NetCounters, NodeCounters, PidsCounters, ProcessCounters, UNLIMITED,
};
pub use reader::{ObservedReader, ObservedSnapshot, ProcessCounts, Processes};
pub use rows::{
    AcceleratorKey, AcceleratorKind, AcceleratorRow, AcceleratorUse, Applied, ContainerSample,
    DiskSpace, ForwardPath, KernelPathCounters, MigInstance, NEIGHBOURS, NodeSample, PortState,
    PortStatus, ProcessSample, Proximity, RelayEngine, Samples, Source,
};
pub use writer::{ObservedBatch, ObservedWriter};

/// Places of the tables.
pub(crate) mod table {
    pub(crate) const APPLIED: usize = 0;
    pub(crate) const PORTS: usize = 1;
    pub(crate) const CONTAINERS: usize = 2;
    pub(crate) const ACCELERATORS: usize = 3;
    pub(crate) const NODE: usize = 4;
    pub(crate) const PROCESSES: usize = 5;
}
