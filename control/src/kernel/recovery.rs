//! What becomes of the kernels that are found when the agent starts.

pub mod plan;
