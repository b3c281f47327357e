//! Rows that tests are made of.

use shared::observed::{AcceleratorCounters, AcceleratorKey, AcceleratorKind, AcceleratorRow};

/// A CUDA device that tells these numbers.
pub(crate) fn card(index: u32, counters: AcceleratorCounters) -> AcceleratorRow {
    AcceleratorRow {
        key: AcceleratorKey {
            kind: AcceleratorKind::Cuda,
            index,
        },
        id: format!("GPU-{index}"),
        model: "A card".to_owned(),
        pci: String::new(),
        numa_node: None,
        healthy: true,
        part_of: None,
        divided: false,
        profile: String::new(),
        units: None,
        fault: None,
        users: Vec::new(),
        users_left_out: 0,
        age_ms: 250,
        tick: 3,
        counters,
    }
}
