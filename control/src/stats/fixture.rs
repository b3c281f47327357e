//! Rows that tests are made of.

use shared::observed::{AcceleratorCounters, AcceleratorKind, AcceleratorRow};

/// A CUDA device that tells these numbers.
pub(crate) fn card(index: u32, counters: AcceleratorCounters) -> AcceleratorRow {
    AcceleratorRow {
        model: "A card".to_owned(),
        age_ms: 250,
        tick: 3,
        counters,
        ..AcceleratorRow::new(AcceleratorKind::Cuda, index, format!("GPU-{index}"))
    }
}
