//! The desired region: what control wants, written by control, read by the dataplane and tools.
//!
//! In (writer): batches of ports, containers and node settings. Out (reader): one consistent
//! snapshot per committed generation. Invariants: a batch is visible as a whole or not at all, also
//! when the writer is killed inside it; a row's generation is the batch that wrote it; a removed
//! row keeps its place until the observed region says that its removal has been applied, so no
//! reader mistakes a new row for an old one.
//!
//! A region whose committed generation is 0 says nothing yet: the dataplane keeps what it runs.

mod reader;
mod rows;
mod writer;

pub use reader::{DesiredChanges, DesiredReader, DesiredSnapshot};
pub use rows::{ClientNetwork, ContainerRow, Drain, NodeRow, PortKey, PortRow, Protocol, Removed};
pub use writer::{DesiredBatch, DesiredWriter};

/// Places of the tables.
pub(crate) mod table {
    pub(crate) const PORTS: usize = 0;
    pub(crate) const CONTAINERS: usize = 1;
    pub(crate) const NODE: usize = 2;
}
