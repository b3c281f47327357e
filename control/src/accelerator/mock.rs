//! Made-up devices, so that scheduling of accelerators can be tried where there are none.
//!
//! In: the original's `mock-accelerator.toml`. Out: a plugin with its devices. Invariant: only a node
//! whose `node.accelerators.mock` names the file has them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use super::device::AcceleratorDevice;
use super::inject::Injection;
use super::plugin::AcceleratorPlugin;
use super::settings::Settings;
use crate::kernel::resource_text::parse_binary_size;
use crate::resource::{
    NumberFormat, PluginFacts, SlotDeclaration, SlotMetadata, SlotType, device_of,
};

/// Why the file cannot be used.
#[derive(Debug, Error)]
pub enum MockError {
    /// It cannot be read.
    #[error("cannot read the made-up devices of {path}, which node.accelerators.mock names", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It does not say what it should.
    #[error("{path} is not a description of made-up devices; docs/gpu.md has one", path = path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: toml::de::Error,
    },
    /// A value makes no sense.
    #[error("{path}: {why}", path = path.display())]
    Value {
        /// Which.
        path: PathBuf,
        /// What.
        why: String,
    },
}

#[derive(Debug, Deserialize)]
struct File {
    #[serde(default = "cuda")]
    slot_name: String,
    devices: Vec<Entry>,
    #[serde(default)]
    attributes: BTreeMap<String, toml::Value>,
    #[serde(default)]
    formats: BTreeMap<String, Format>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    mother_uuid: String,
    model_name: String,
    #[serde(default)]
    numa_node: Option<i32>,
    #[serde(default, alias = "smp_count")]
    subproc_count: u64,
    memory_size: Size,
    #[serde(default)]
    is_mig_device: bool,
}

/// `"40G"`, or bytes.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Size {
    Written(String),
    Bytes(u64),
}

#[derive(Debug, Deserialize)]
struct Format {
    human_readable_name: String,
    description: String,
    display_unit: String,
    display_icon: String,
    number_format: Numbers,
}

#[derive(Debug, Deserialize)]
struct Numbers {
    binary: bool,
    round_length: u32,
}

fn cuda() -> String {
    "cuda".to_owned()
}

/// The device name of a file, if it can be told.
pub(super) fn key_of(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(toml::from_str::<File>(&text).ok()?.slot_name)
}

/// Reads the file. Blocking.
///
/// # Errors
/// It cannot be read, or is no description of devices.
pub fn read(path: &Path, settings: &Settings) -> Result<AcceleratorPlugin, MockError> {
    let text = std::fs::read_to_string(path).map_err(|source| MockError::Read {
        path: path.to_owned(),
        source,
    })?;
    let file: File = toml::from_str(&text).map_err(|source| MockError::Parse {
        path: path.to_owned(),
        source,
    })?;
    let refused = |why: String| MockError::Value {
        path: path.to_owned(),
        why,
    };
    let key = file.slot_name.clone();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if key.is_empty() || !key.chars().all(plain) || matches!(key.as_str(), "cpu" | "mem") {
        return Err(refused(format!("{key:?} is no name of a device")));
    }
    let mut devices: Vec<AcceleratorDevice> = Vec::new();
    for (place, entry) in file.devices.iter().enumerate() {
        let device = known(&key, place, entry).map_err(refused)?;
        if devices.iter().any(|other| other.id == device.id) {
            return Err(refused(format!("two devices are called {}", device.id)));
        }
        let number = u32::try_from(place).unwrap_or(u32::MAX);
        if !settings.masks(&key, &device.id, number) {
            devices.push(device);
        }
    }
    let shares = settings.mock_shares;
    let whole = format!(
        "{key}.{}",
        if shares.is_some() { "shares" } else { "device" }
    );
    let mut facts = PluginFacts::default();
    facts.flags.push((format!("{key}_support").into(), true));
    for (name, value) in file.attributes {
        let text = match value {
            toml::Value::String(text) => text,
            other => other.to_string(),
        };
        // As a real device's plugin has them too.
        let also = match (key.as_str(), name.as_str()) {
            ("cuda", "nvidia_driver") => Some("nvidia_version"),
            ("cuda", "cuda_runtime") => Some("cuda_version"),
            _ => None,
        };
        facts
            .texts
            .extend(also.map(|name| (name.into(), text.clone())));
        facts.texts.push((name.into(), text));
    }
    let shown = file.formats.into_iter();
    let shown = shown.map(|(name, format)| metadata(&key, &name, format));
    Ok(AcceleratorPlugin {
        shown: shown.collect(),
        declared: vec![SlotDeclaration {
            name: whole,
            kind: SlotType::Count,
        }],
        key,
        devices,
        shares,
        injection: Injection::MadeUp,
        facts,
    })
}

fn known(key: &str, place: usize, entry: &Entry) -> Result<AcceleratorDevice, String> {
    let memory = match &entry.memory_size {
        Size::Bytes(bytes) => *bytes,
        Size::Written(text) => {
            parse_binary_size(text).ok_or_else(|| format!("the memory {text:?} is no size"))?
        }
    };
    let uuid = &entry.mother_uuid;
    if uuid.is_empty() || uuid.contains([',', ':', '\n', '=']) {
        return Err(format!("{uuid:?} cannot be the id of a device"));
    }
    let (id, profile) = if entry.is_mig_device && key == "cuda" {
        let profile = entry.model_name.strip_prefix("MIG-").ok_or_else(|| {
            format!(
                "the model {:?} of a part is not MIG-<profile>",
                entry.model_name
            )
        })?;
        // The number is its place in the file, as in the original.
        (format!("MIG-{uuid}/{place}/0"), Some(profile.to_owned()))
    } else {
        (uuid.clone(), None)
    };
    Ok(AcceleratorDevice {
        kind: key.to_owned(),
        id,
        model: entry.model_name.clone(),
        pci: format!("0000:99:{place:02}.0"),
        numa_node: entry.numa_node,
        healthy: true,
        fault: None,
        instance: None,
        profile,
        memory,
        units: entry.subproc_count,
        nodes: Vec::new(),
        slot: None,
        versions: Default::default(),
        near: Vec::new(),
        number: None,
    })
}

/// `[formats.device]`, `[formats.devices]`, `[formats.shares]`, `[formats."1g.5gb-mig"]`.
fn metadata(key: &str, name: &str, format: Format) -> SlotMetadata {
    let slot_name = match name {
        "device" | "devices" => format!("{key}.device"),
        "shares" => format!("{key}.shares"),
        name if device_of(name) == key => name.to_owned(),
        profile => format!("{key}.device:{profile}"),
    };
    SlotMetadata {
        slot_name,
        description: format.description,
        human_readable_name: format.human_readable_name,
        display_unit: format.display_unit,
        number_format: NumberFormat {
            binary: format.number_format.binary,
            round_length: format.number_format.round_length,
        },
        display_icon: format.display_icon,
    }
}
