//! Slots, devices, allocation maps and the reservation ledger.
//!
//! In: what the host has ([`host`]: cores, memory, NUMA nodes; accelerators through
//! [`DevicePlugin`]) and what kernels ask for ([`Slots`]). Out: which devices a kernel got
//! ([`Allocation`]), what that means for its container ([`ContainerLimits`]) and what the node
//! announces ([`Ledger::available`]). The placement rules are those of the original, checked against captures of it. Invariant: the sum of what kernels hold is
//! exactly what the maps count as used, at every moment and after every restart; a kernel holds
//! its devices from the reservation on, before its container exists.

mod affinity;
mod allocation;
mod discrete;
mod error;
mod fabric;
mod fraction;
pub mod host;
mod intrinsic;
mod ledger;
mod limits;
mod map;
mod plugin;
mod slots;

pub use affinity::{AffinityGraph, Hint};
pub(crate) use allocation::Shares;
pub use allocation::{Allocation, BadAllocation};
pub use error::ResourceError;
pub use ledger::{
    AvailableSlot, HeldState, Holder, InventoryError, Ledger, Pinned, Reserved, RestoreError,
    Restored, SlotRequest, Snapshot,
};
pub use limits::ContainerLimits;
pub use map::{AllocationMap, MapDevice, Strategy};
pub use plugin::{
    AttachedDevice, Device, DevicePlugin, Hardware, HardwareStatus, NumberFormat, PluginError,
    PluginFacts, SlotDeclaration, SlotMetadata,
};
pub use slots::{Amount, SlotType, Slots};

/// Device name of a slot: the text before the first dot.
pub fn device_of(slot: &str) -> &str {
    slot.split('.').next().unwrap_or(slot)
}

/// Whether a slot belongs to a device: it is the device's name or starts with it and a dot.
pub(crate) fn belongs(slot: &str, device: &str) -> bool {
    slot == device
        || slot
            .strip_prefix(device)
            .is_some_and(|rest| rest.starts_with('.'))
}
