//! The atomics of this crate: the standard library's, or loom's when a model is checked (`--cfg loom`).
//!
//! Everything that two processes touch at once goes through these names, so that the protocol of
//! [`crate::cell`] is the same code in the models and in the daemons.

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
