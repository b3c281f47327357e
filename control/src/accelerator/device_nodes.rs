//! NVIDIA's device nodes, for containers that get them without NVIDIA's toolkit.
//!
//! In: what the kernel driver publishes below `/proc`, and the nodes that are there. Out: the nodes of
//! some devices, or what is missing and how to make it. Invariant: no container gets a node that is
//! another device's, and none starts with devices that cannot be opened.
//!
//! Sources: NVIDIA's MIG user guide, "Device Nodes and Capabilities"; of libnvidia-container which nodes
//! an instance needs: its device's, and those of its GPU instance and compute instance.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::device::AcceleratorDevice;

/// Nodes that every process of CUDA opens.
const NEEDED: [&str; 2] = ["/dev/nvidiactl", "/dev/nvidia-uvm"];
/// Those of profilers and of graphics; what a host lacks is left out.
const OPTIONAL: [&str; 2] = ["/dev/nvidia-uvm-tools", "/dev/nvidia-modeset"];
/// Where the driver publishes what a node opens.
const CAPABILITIES: &str = "/proc/driver/nvidia/capabilities";
/// The same as one list, of all instances that there may be.
const MINORS: &str = "/proc/driver/nvidia-caps/mig-minors";
/// Who may open such a node if the driver does not say so: everybody, for reading.
const MODE: u32 = 0o444;

/// Why devices cannot be given by their nodes. Each is the host's fault and says what to do.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum NodeError {
    #[error(
        "{id} is not among the devices that the driver tells of now; wait until bai-dataplane runs and gather_hwinfo lists it"
    )]
    Unknown { id: String },
    #[error(
        "NVIDIA's driver does not tell the minor number of {id}, which names its device node; see what bai-dataplane logs of the driver, {OTHERWISE}"
    )]
    NoMinor { id: String },
    #[error("{node} is not there; run: {remedy}")]
    Missing { node: String, remedy: String },
    #[error(
        "NVIDIA's driver does not tell the ids of MIG instance {id}; update it (450.80 or later), {OTHERWISE}"
    )]
    NoInstance { id: String },
    #[error(
        "/proc/devices lists no nvidia-caps: NVIDIA's driver makes no device nodes for MIG instances; load it with nv_cap_enable_devfs=1 (450.80 or later), {OTHERWISE}"
    )]
    NoCapabilities,
    #[error(
        "neither {file} nor {MINORS} tells the node of MIG instance {id}; divide the device anew (nvidia-smi mig), {OTHERWISE}"
    )]
    NoNumber { id: String, file: String },
    #[error(
        "{node} is not device {major}:{minor}, as the driver has it now; run: rm {node} && {remedy}"
    )]
    Stale {
        node: String,
        major: u32,
        minor: u32,
        remedy: String,
    },
}

/// The ways that need none of this.
const OTHERWISE: &str = "or set node.accelerators.cuda-injection to \"cdi\" or \"device-requests\"";

/// All nodes that a container with these devices needs, each once.
pub(super) fn of_devices(
    root: &Path,
    ids: &[&str],
    devices: &[Option<&AcceleratorDevice>],
) -> Result<Vec<String>, NodeError> {
    let driver = Driver { root };
    let mut all: Vec<String> = Vec::new();
    for (id, device) in ids.iter().zip(devices) {
        let device = device.ok_or_else(|| NodeError::Unknown {
            id: (*id).to_owned(),
        })?;
        let (minor, node) = own_node(device)?;
        driver.check(node, || format!("nvidia-modprobe -c {minor}"))?;
        all.push(node.to_owned());
        if device.profile.is_some() {
            let instance = device.instance.ok_or_else(|| NodeError::NoInstance {
                id: device.id.clone(),
            })?;
            all.extend(driver.of_instance(minor, instance, &device.id)?);
        }
    }
    for node in NEEDED {
        driver.check(node, || "nvidia-modprobe -u -c 0".to_owned())?;
    }
    all.extend(NEEDED.map(str::to_owned));
    let optional = OPTIONAL.iter().filter(|node| driver.path(node).exists());
    all.extend(optional.map(|node| (*node).to_owned()));
    let mut seen: Vec<String> = Vec::new();
    all.retain(|node| {
        let fresh = !seen.contains(node);
        if fresh {
            seen.push(node.clone());
        }
        fresh
    });
    Ok(all)
}

/// The node of a device, or of the device that it is a part of, and its minor number.
fn own_node(device: &AcceleratorDevice) -> Result<(u32, &str), NodeError> {
    let found = device.nodes.iter().find_map(|node| {
        let minor = node.strip_prefix("/dev/nvidia")?.parse().ok()?;
        Some((minor, node.as_str()))
    });
    found.ok_or_else(|| NodeError::NoMinor {
        id: device.id.clone(),
    })
}

/// What the driver publishes on a host.
struct Driver<'r> {
    root: &'r Path,
}

/// A file of [`CAPABILITIES`], and what the driver wants its node to be.
struct Capability {
    file: String,
    minor: u32,
    mode: u32,
}

impl Driver<'_> {
    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap_or_default()
    }

    fn check(&self, node: &str, remedy: impl FnOnce() -> String) -> Result<(), NodeError> {
        if self.path(node).exists() {
            return Ok(());
        }
        Err(NodeError::Missing {
            node: node.to_owned(),
            remedy: remedy(),
        })
    }

    /// The nodes of a part: of its GPU instance, and of its compute instance.
    fn of_instance(
        &self,
        gpu: u32,
        (gpu_instance, compute_instance): (u32, u32),
        id: &str,
    ) -> Result<[String; 2], NodeError> {
        let major = major(&self.read("/proc/devices")).ok_or(NodeError::NoCapabilities)?;
        let above = format!("gi{gpu_instance}");
        let of_gpu = self.capability(gpu, &format!("{above}/access"), id)?;
        let own = format!("{above}/ci{compute_instance}/access");
        let of_compute = self.capability(gpu, &own, id)?;
        Ok([of_gpu.node(self, major)?, of_compute.node(self, major)?])
    }

    fn capability(&self, gpu: u32, place: &str, id: &str) -> Result<Capability, NodeError> {
        let file = format!("{CAPABILITIES}/gpu{gpu}/mig/{place}");
        let text = self.read(&file);
        let number = |name: &str| {
            let mut lines = text.lines();
            let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value.trim().parse::<u32>().ok()
        };
        let listed = || {
            let name = format!("gpu{gpu}/{place}");
            let text = self.read(MINORS);
            let mut lines = text.lines().map(str::split_whitespace);
            lines.find_map(|mut line| {
                let found = line.next()? == name;
                found.then(|| line.next()?.parse().ok())?
            })
        };
        match number("DeviceFileMinor").or_else(listed) {
            Some(minor) => Ok(Capability {
                // The driver writes the mode as a decimal number.
                mode: number("DeviceFileMode").unwrap_or(MODE) & 0o777,
                file,
                minor,
            }),
            None => Err(NodeError::NoNumber {
                id: id.to_owned(),
                file,
            }),
        }
    }
}

impl Capability {
    /// Its node, if that is there and opens this capability.
    fn node(&self, driver: &Driver<'_>, major: u32) -> Result<String, NodeError> {
        let Self { file, minor, mode } = self;
        let node = format!("/dev/nvidia-caps/nvidia-cap{minor}");
        let remedy = format!(
            "nvidia-modprobe -f {file} (or: mkdir -p /dev/nvidia-caps && mknod -m {mode:o} {node} c {major} {minor})"
        );
        driver.check(&node, || remedy.clone())?;
        let found = std::fs::metadata(driver.path(&node));
        let right = found.is_ok_and(|found| {
            let device = found.rdev();
            let numbers = (rustix::fs::major(device), rustix::fs::minor(device));
            found.file_type().is_char_device() && numbers == (major, *minor)
        });
        if right {
            return Ok(node);
        }
        Err(NodeError::Stale {
            node,
            major,
            minor: *minor,
            remedy,
        })
    }
}

/// The major number of the driver's capabilities in `/proc/devices`.
fn major(devices: &str) -> Option<u32> {
    let characters = devices
        .lines()
        .take_while(|line| !line.starts_with("Block devices"));
    let mut numbers = characters.filter_map(|line| {
        let mut fields = line.split_whitespace();
        let number = fields.next()?.parse().ok()?;
        (fields.next()? == "nvidia-caps").then_some(number)
    });
    numbers.next()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What a driver with one divided device publishes; `null` and `zero` of this host stand for the
    /// nodes of its capabilities.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            let host = Self(tempfile::tempdir().unwrap());
            host.write("proc/devices", "Character devices:\n  1 mem\n195 nvidia\n  1 nvidia-caps\n254 nvidia-caps-imex-channels\n\nBlock devices:\n  7 nvidia-caps\n");
            host.write(
                "proc/driver/nvidia/capabilities/gpu2/mig/gi1/access",
                "DeviceFileMinor: 3\nDeviceFileMode: 292\nDeviceFileModify: 1\n",
            );
            host.write(
                "proc/driver/nvidia-caps/mig-minors",
                "config 1\nmonitor 2\ngpu2/gi1/access 3\ngpu2/gi1/ci0/access 5\ngpu2/gi11/access 7\n",
            );
            for node in ["nvidia2", "nvidiactl", "nvidia-uvm", "nvidia-modeset"] {
                host.write(&format!("dev/{node}"), "");
            }
            std::fs::create_dir(host.0.path().join("dev/nvidia-caps")).unwrap();
            host.link("nvidia-cap3", "/dev/null");
            host.link("nvidia-cap5", "/dev/zero");
            host
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn remove(&self, path: &str) {
            std::fs::remove_file(self.0.path().join(path)).unwrap();
        }

        fn link(&self, name: &str, to: &str) {
            symlink(to, self.0.path().join("dev/nvidia-caps").join(name)).unwrap();
        }

        fn nodes(&self, device: &AcceleratorDevice) -> Result<Vec<String>, NodeError> {
            of_devices(self.0.path(), &[device.id.as_str()], &[Some(device)])
        }

        fn refusal(&self, device: &AcceleratorDevice) -> String {
            self.nodes(device).unwrap_err().to_string()
        }
    }

    fn part() -> AcceleratorDevice {
        AcceleratorDevice {
            kind: "cuda".to_owned(),
            id: "MIG-a".to_owned(),
            model: String::new(),
            pci: "0000:10:00.0".to_owned(),
            numa_node: None,
            healthy: true,
            fault: None,
            profile: Some("1g.10gb".to_owned()),
            instance: Some((1, 0)),
            memory: 0,
            units: 0,
            nodes: vec!["/dev/nvidia2".to_owned()],
            slot: None,
            versions: Default::default(),
            near: Vec::new(),
            number: None,
        }
    }

    #[test]
    fn a_part_needs_its_devices_node_and_two_of_its_own() {
        let host = Host::new();
        assert_eq!(
            host.nodes(&part()).unwrap(),
            [
                "/dev/nvidia2",
                "/dev/nvidia-caps/nvidia-cap3",
                "/dev/nvidia-caps/nvidia-cap5",
                "/dev/nvidiactl",
                "/dev/nvidia-uvm",
                "/dev/nvidia-modeset",
            ]
        );
        let whole = AcceleratorDevice {
            id: "GPU-a".to_owned(),
            profile: None,
            instance: None,
            ..part()
        };
        let ids = ["GPU-a", "MIG-a"];
        let both = of_devices(host.0.path(), &ids, &[Some(&whole), Some(&part())]).unwrap();
        assert_eq!(both, host.nodes(&part()).unwrap(), "each once");
        assert_eq!(
            host.nodes(&whole).unwrap(),
            [
                "/dev/nvidia2",
                "/dev/nvidiactl",
                "/dev/nvidia-uvm",
                "/dev/nvidia-modeset"
            ]
        );
    }

    #[test]
    fn a_missing_node_is_told_with_the_command_that_makes_it() {
        let host = Host::new();
        host.remove("dev/nvidia-caps/nvidia-cap5");
        assert_eq!(
            host.refusal(&part()),
            "/dev/nvidia-caps/nvidia-cap5 is not there; run: nvidia-modprobe -f \
             /proc/driver/nvidia/capabilities/gpu2/mig/gi1/ci0/access (or: mkdir -p /dev/nvidia-caps && \
             mknod -m 444 /dev/nvidia-caps/nvidia-cap5 c 1 5)"
        );
        // Left over from before the driver was loaded anew with another number.
        host.link("nvidia-cap5", "/dev/full");
        let said = host.refusal(&part());
        assert!(said.contains("is not device 1:5"), "{said}");
        assert!(
            said.contains("rm /dev/nvidia-caps/nvidia-cap5 && nvidia-modprobe -f"),
            "{said}"
        );
        host.remove("dev/nvidia-uvm");
        host.remove("dev/nvidia-caps/nvidia-cap5");
        host.link("nvidia-cap5", "/dev/zero");
        assert_eq!(
            host.refusal(&part()),
            "/dev/nvidia-uvm is not there; run: nvidia-modprobe -u -c 0"
        );
        host.remove("dev/nvidia2");
        assert_eq!(
            host.refusal(&part()),
            "/dev/nvidia2 is not there; run: nvidia-modprobe -c 2"
        );
    }

    #[test]
    fn what_the_driver_does_not_publish_is_told_apart() {
        let host = Host::new();
        let lost = of_devices(host.0.path(), &["MIG-b"], &[None]).unwrap_err();
        assert_eq!(
            lost,
            NodeError::Unknown {
                id: "MIG-b".to_owned()
            }
        );
        let nowhere = AcceleratorDevice {
            nodes: Vec::new(),
            ..part()
        };
        assert!(
            host.refusal(&nowhere)
                .contains("does not tell the minor number of MIG-a")
        );
        let unnamed = AcceleratorDevice {
            instance: None,
            ..part()
        };
        assert!(
            host.refusal(&unnamed)
                .contains("the ids of MIG instance MIG-a")
        );
        let unlisted = AcceleratorDevice {
            instance: Some((11, 0)),
            ..part()
        };
        let said = host.refusal(&unlisted);
        assert!(said.contains("gpu2/mig/gi11/ci0/access"), "{said}");
        // A list that makes no sense is none.
        host.write(
            "proc/driver/nvidia-caps/mig-minors",
            "gpu2/gi1/ci0/access\n\ngpu2/gi1/ci0/access x\n",
        );
        let said = host.refusal(&part());
        assert!(said.contains("gpu2/mig/gi1/ci0/access"), "{said}");
        host.write(
            "proc/devices",
            "Character devices:\n195 nvidia\n\nBlock devices:\n  7 nvidia-caps\n",
        );
        assert!(host.refusal(&part()).contains("nv_cap_enable_devfs=1"));
    }
}
