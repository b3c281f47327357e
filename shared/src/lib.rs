//! The words both processes know: two regions of shared memory, their locks and their doorbells.
//!
//! *control* writes the desired region, the *dataplane* the observed one; each reads the other's
//! through a read-only mapping and trusts none of it. `docs/shared-memory.md` has the bytes.
//!
//! In a model-checking build (`--cfg loom`) only the cell and its models are compiled: a mapping
//! cannot hold loom's atomics.

// The region writer exists for tests of the models too.
#![cfg_attr(loom, allow(dead_code))]

mod cell;
mod sync;

#[cfg(not(loom))]
mod layout;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod region;
#[cfg(not(loom))]
mod table;

#[cfg(not(loom))]
pub mod causes;
#[cfg(not(loom))]
pub mod desired;
#[cfg(not(loom))]
pub mod doorbell;
#[cfg(all(not(loom), any(test, feature = "fuzzing")))]
pub mod fuzzing;
#[cfg(not(loom))]
pub mod heap;
#[cfg(not(loom))]
pub mod ids;
#[cfg(not(loom))]
pub mod lock;
#[cfg(not(loom))]
pub mod log_limit;
#[cfg(not(loom))]
pub mod netlink;
#[cfg(not(loom))]
pub mod observed;
#[cfg(not(loom))]
pub mod pins;
#[cfg(not(loom))]
pub mod procfs;
#[cfg(not(loom))]
pub mod run_dir;

#[cfg(not(loom))]
pub use layout::{FieldInfo, LAYOUT_HASH, LAYOUT_VERSION, ROWS, RegionKind, RowInfo, Sizes};
#[cfg(not(loom))]
pub use region::{OpenError, ReadError, Start, WriterLife, monotonic_ns, wall_ns};
#[cfg(not(loom))]
pub use table::BatchError;
