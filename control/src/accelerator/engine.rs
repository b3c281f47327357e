//! What the engine can do for devices, so that containers get them in a way that works.
//!
//! In: the engine's description of itself, and the CDI specifications it would read. Out: which of the
//! ways that the configuration leaves open is taken. Invariant: an explicit choice stays.
//!
//! Sources: the engine's API: `Runtimes`, `CDISpecDirs` (API 1.44; empty when CDI is switched off) and
//! `DiscoveredDevices` (API 1.50) of `GET /info`.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use config::CudaInjection;

use crate::docker::SystemInfo;

/// Specifications of one directory beyond this many are not read.
const MOST: usize = 256;
/// Nor more of one than this, bytes; NVIDIA's for eight devices is a hundredth of it.
const LARGEST: u64 = 4 << 20;
/// CDI names of NVIDIA devices, or of their parts, by UUID begin so.
const NVIDIA_BY_UUID: [&str; 2] = ["nvidia.com/gpu=GPU-", "nvidia.com/gpu=MIG-"];

/// What an engine can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineDevices {
    /// NVIDIA's runtime is registered with it.
    pub nvidia_runtime: bool,
    /// It knows CDI, and CDI is switched on.
    pub cdi: bool,
    /// It knows NVIDIA devices by CDI names with UUIDs.
    pub nvidia_by_cdi: bool,
}

impl EngineDevices {
    /// Out of what the engine says; specifications are looked up on this host if the engine is here.
    /// Blocking.
    pub fn of(info: &SystemInfo, local: bool) -> Self {
        let runtimes = info.runtimes.as_ref();
        let directories = info.cdi_spec_dirs.iter().flatten();
        let cdi = directories.clone().next().is_some();
        let nvidia_by_cdi = match &info.discovered_devices {
            Some(devices) => devices.iter().any(|device| {
                let id = device.id.as_deref().unwrap_or_default();
                let by_uuid = NVIDIA_BY_UUID.iter().any(|begin| id.starts_with(begin));
                device.source.as_deref() == Some("cdi") && by_uuid
            }),
            None => local && directories.map(Path::new).any(names_nvidia_devices),
        };
        Self {
            nvidia_runtime: runtimes.is_some_and(|all| all.contains_key("nvidia")),
            cdi,
            nvidia_by_cdi: cdi && nvidia_by_cdi,
        }
    }

    /// The way that is taken: with NVIDIA's toolkit in the engine its device requests, as in the
    /// original, else CDI where NVIDIA devices are known so. Where nothing is known, the engine's own
    /// refusal tells what is missing.
    pub fn injection(self, wanted: CudaInjection) -> CudaInjection {
        match wanted {
            CudaInjection::Auto if !self.nvidia_runtime && self.nvidia_by_cdi => CudaInjection::Cdi,
            CudaInjection::Auto => CudaInjection::DeviceRequests,
            explicit => explicit,
        }
    }
}

/// What the engine has said that it can do; nothing until it has.
#[derive(Debug, Clone, Default)]
pub struct EngineFacts(Arc<OnceLock<EngineDevices>>);

impl EngineFacts {
    /// What is known now.
    pub fn get(&self) -> EngineDevices {
        self.0.get().copied().unwrap_or_default()
    }

    /// The engine has said it; the first word counts.
    pub fn tell(&self, devices: EngineDevices) {
        let _ = self.0.set(devices);
    }
}

impl From<EngineDevices> for EngineFacts {
    fn from(devices: EngineDevices) -> Self {
        Self(Arc::new(OnceLock::from(devices)))
    }
}

impl PartialEq for EngineFacts {
    fn eq(&self, other: &Self) -> bool {
        self.get() == other.get()
    }
}

impl Eq for EngineFacts {}

/// Whether a specification here is NVIDIA's and names devices by UUID.
fn names_nvidia_devices(directory: &Path) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let files = entries.take(MOST).map(|entry| entry.path());
    let specifications = files.filter(|path| {
        let extension = path.extension().and_then(|text| text.to_str());
        matches!(extension, Some("json" | "yaml" | "yml"))
    });
    specifications.into_iter().any(|path| {
        let mut text = String::new();
        let read = File::open(path).and_then(|file| file.take(LARGEST).read_to_string(&mut text));
        let by_uuid = ["GPU-", "MIG-"].iter().any(|begin| text.contains(begin));
        read.is_ok() && text.contains("nvidia.com/gpu") && by_uuid
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn engine(info: Value) -> EngineDevices {
        EngineDevices::of(&serde_json::from_value(info).unwrap(), true)
    }

    #[test]
    fn the_way_is_chosen_by_what_the_engine_knows() {
        let chosen = |info: Value| engine(info).injection(CudaInjection::Auto);
        // Docker 20.10, with and without NVIDIA's toolkit.
        assert_eq!(chosen(json!({})), CudaInjection::DeviceRequests);
        let runtime =
            json!({"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}});
        assert_eq!(
            chosen(json!({ "Runtimes": runtime })),
            CudaInjection::DeviceRequests
        );
        let found = |id: &str| {
            json!({
                "CDISpecDirs": ["/etc/cdi", "/var/run/cdi"],
                "DiscoveredDevices": [{"Source": "cdi", "ID": id}],
            })
        };
        assert_eq!(chosen(found("nvidia.com/gpu=GPU-0")), CudaInjection::Cdi);
        assert_eq!(chosen(found("nvidia.com/gpu=MIG-0")), CudaInjection::Cdi);
        // By number: the agent's ids are UUIDs.
        assert_eq!(
            chosen(found("nvidia.com/gpu=0")),
            CudaInjection::DeviceRequests
        );
        let mut both = found("nvidia.com/gpu=GPU-0");
        both["Runtimes"] = runtime;
        assert_eq!(chosen(both), CudaInjection::DeviceRequests);
        let mut off = found("nvidia.com/gpu=GPU-0");
        off["CDISpecDirs"] = json!([]);
        assert_eq!(chosen(off.clone()), CudaInjection::DeviceRequests);
        assert!(!engine(off.clone()).cdi && engine(found("x.y/z=0")).cdi);
        for explicit in [CudaInjection::Cdi, CudaInjection::DeviceNodes] {
            assert_eq!(engine(off.clone()).injection(explicit), explicit);
        }
        // One that answers later.
        let facts = EngineFacts::default();
        let copy = facts.clone();
        assert_eq!(facts.get(), EngineDevices::default());
        copy.tell(engine(found("nvidia.com/gpu=GPU-0")));
        assert!(facts.get().nvidia_by_cdi);
    }

    #[test]
    fn engines_that_tell_no_devices_have_their_specifications_read() {
        let place = tempfile::tempdir().unwrap();
        let info = json!({"CDISpecDirs": ["/nowhere/cdi", place.path()]});
        std::fs::write(place.path().join("other.json"), r#"{"kind": "x.y/z"}"#).unwrap();
        std::fs::write(place.path().join("notes.txt"), "nvidia.com/gpu GPU-1").unwrap();
        assert!(!engine(info.clone()).nvidia_by_cdi);
        let text = "cdiVersion: 0.5.0\nkind: nvidia.com/gpu\ndevices:\n- name: GPU-4711\n";
        std::fs::write(place.path().join("nvidia.yaml"), text).unwrap();
        assert!(engine(info.clone()).nvidia_by_cdi);
        let remote = serde_json::from_value(info).unwrap();
        assert!(!EngineDevices::of(&remote, false).nvidia_by_cdi);
    }
}
