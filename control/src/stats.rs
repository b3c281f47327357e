//! From the dataplane's samples to what others read of them.
//!
//! In: samples of the observed region, the kernels of this node, the host's own counters. Out: the
//! records the manager keeps of node, devices, kernels and processes ([`publish`]), and plain maps
//! for the command line. Invariants: a record has every key of what its kernel was given, so that
//! missing data never looks like an idle session; a value that could not be read for a while stays
//! the last good one, but as a load of a kernel it is told for three intervals only.

pub mod decimal;
#[cfg(test)]
pub(crate) mod fixture;
pub mod kernels;
pub mod metric;
pub mod node;
mod plain;
pub mod processes;
pub mod publish;
pub mod record;

pub use plain::{container, counters, node as node_map};
