//! The dataplane process: it forwards service ports and gathers statistics.
//!
//! Truth comes in through the `desired` region, answers and samples go out through `observed`
//! (crate `shared`). It knows nothing of the manager, of Docker or of kernels' lives; it may run
//! for weeks while control is restarted. The binary is `bai-dataplane`; this library exists so
//! that tests and benches can drive its parts.

pub mod accelerator;
pub mod app;
pub mod background_queries;
pub mod board;
pub mod collect;
mod default_route;
pub mod detach;
pub mod forward;
pub mod link;
mod mailbox;
pub mod sys;

pub use shared::causes;

#[cfg(test)]
#[path = "../../tests/src/skip.rs"]
mod skip;
