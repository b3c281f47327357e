//! What a kind of device must tell: the seam where accelerators plug in beside cpu and mem.

use std::fmt;

use super::allocation::Shares;
use super::{AllocationMap, Amount, ContainerLimits, SlotType};

/// One device of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Id, unique within the device name; no comma.
    pub id: String,
    /// Device name, the plugin's key.
    pub device_name: String,
    /// Where it is: a bus address, or `root`.
    pub hw_location: String,
    /// Its memory in bytes.
    pub memory_size: u64,
    /// Its processing units, with overcommit.
    pub processing_units: u64,
    /// NUMA node; -1 as the kernel says it, none when unknown.
    pub numa_node: Option<i32>,
}

/// A slot a plugin offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotDeclaration {
    /// Slot name: the plugin's key, or the key and a dot before the rest.
    pub name: String,
    /// What it counts.
    pub kind: SlotType,
}

/// A device as it is shown with a kernel.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AttachedDevice {
    /// Device id.
    pub device_id: String,
    /// Model, empty for cpu and mem.
    pub model_name: String,
    /// Plain numbers, such as `cores`.
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// Why a plugin has no devices to tell.
#[derive(Debug, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct PluginError {
    /// What could not be found out.
    pub what: String,
    /// What would do.
    pub remedy: String,
}

/// A kind of device. Implementations answer from what they found at start: no call blocks.
pub trait DevicePlugin: fmt::Debug + Send + Sync {
    /// Device name: `cpu`, `mem`, `cuda`, ...
    fn key(&self) -> &str;

    /// Slots it offers, also those no device has at the moment.
    fn slots(&self) -> Vec<SlotDeclaration>;

    /// Its devices, in the order that decides between equals.
    ///
    /// # Errors
    /// When the host does not tell.
    fn devices(&self) -> Result<Vec<Device>, PluginError>;

    /// An empty map of the devices.
    fn allocation_map(&self, devices: &[Device]) -> AllocationMap;

    /// How much of each slot the devices have.
    fn totals(&self, devices: &[Device]) -> Vec<(String, Amount)>;

    /// What the container of an allocation needs, added to `limits`.
    fn limit(
        &self,
        devices: &[Device],
        allocation: &[(String, Shares)],
        limits: &mut ContainerLimits,
    );

    /// The devices of an allocation as shown with the kernel.
    fn attached(&self, devices: &[Device], allocation: &[(String, Shares)]) -> Vec<AttachedDevice>;

    /// Version in the heartbeat's `compute_plugins`.
    fn version(&self) -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }
}
