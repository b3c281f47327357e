//! What a kind of device must tell: the seam where accelerators plug in beside cpu and mem.

use std::borrow::Cow;
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
    /// Other devices of the same name and how near they are, the larger the nearer; those left out
    /// are at an unknown distance.
    pub near: Vec<(String, u8)>,
}

/// A slot a plugin offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotDeclaration {
    /// Slot name: the plugin's key, or the key and a dot before the rest.
    pub name: String,
    /// What it counts.
    pub kind: SlotType,
}

/// How a slot is shown to people, in the words of the manager's page of slot types.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SlotMetadata {
    /// Slot name. The original calls memory `ram` here.
    pub slot_name: String,
    /// In a sentence.
    pub description: String,
    /// In a word.
    pub human_readable_name: String,
    /// Unit after a number.
    pub display_unit: String,
    /// How numbers are written.
    pub number_format: NumberFormat,
    /// Name of an icon of the web page.
    pub display_icon: String,
}

/// How amounts of a slot are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct NumberFormat {
    /// In multiples of 1024.
    pub binary: bool,
    /// Digits after the point.
    pub round_length: u32,
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

/// What the heartbeat tells of a plugin, in `compute_plugins`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginFacts {
    /// Its version.
    pub version: String,
    /// Text such as `nvidia_version`.
    pub texts: Vec<(Cow<'static, str>, String)>,
    /// Whether something is supported, such as `cuda_support`.
    pub flags: Vec<(Cow<'static, str>, bool)>,
}

impl Default for PluginFacts {
    fn default() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            texts: Vec::new(),
            flags: Vec::new(),
        }
    }
}

/// State of a kind of hardware, as `gather_hwinfo` answers it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Hardware {
    /// How it is.
    pub status: HardwareStatus,
    /// In a sentence; none when all is well.
    pub status_info: Option<String>,
    /// What else there is to know, such as a fault per device.
    pub metadata: std::collections::BTreeMap<String, String>,
}

/// How hardware is, in the original's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HardwareStatus {
    /// Every device works.
    Healthy,
    /// Some do.
    Degraded,
    /// None does.
    Offline,
    /// Nothing is known.
    Unavailable,
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

    /// How its slots are shown; those left out are shown by their names.
    fn metadata(&self) -> Vec<SlotMetadata> {
        Vec::new()
    }

    /// What the heartbeat tells of it.
    fn facts(&self) -> PluginFacts {
        PluginFacts::default()
    }

    /// The state of its hardware; none when there is nothing to tell, as of cores and memory.
    fn hardware(&self) -> Option<Hardware> {
        None
    }
}
