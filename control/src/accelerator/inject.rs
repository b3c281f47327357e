//! What a container gets so that it sees its devices, and no others.
//!
//! Sources: NVIDIA's container toolkit (device requests, CDI names, the meaning of
//! `NVIDIA_VISIBLE_DEVICES=void`), AMD's and Google's guides to containers, the engine's API.

use std::path::{Path, PathBuf};

use config::CudaInjection;
use serde_json::{Value, json};

use super::device::AcceleratorDevice;
use super::engine::EngineFacts;
use super::settings::{Settings, group_of};
use crate::resource::ContainerLimits;

/// System calls of AMD's runtime that the runner's profile does not allow; the original switches the
/// profile off instead.
const ROCM_SYSCALLS: [&str; 5] = [
    "get_mempolicy",
    "mbind",
    "process_vm_readv",
    "process_vm_writev",
    "set_mempolicy",
];

/// What NVIDIA's runtime reads a container's devices from.
pub(crate) const NVIDIA_VISIBLE: &str = "NVIDIA_VISIBLE_DEVICES";
/// Its value for none.
pub(crate) const NO_NVIDIA: &str = "void";

/// How containers get devices of a kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Injection {
    /// NVIDIA's.
    Cuda {
        /// By which means, as the configuration says.
        how: CudaInjection,
        /// What the engine can do, which may not have said so yet.
        engine: EngineFacts,
        /// Where device nodes are looked up.
        root: PathBuf,
    },
    /// AMD's.
    Rocm {
        /// Where device nodes are looked up.
        root: PathBuf,
    },
    /// Google's.
    Tpu,
    /// Nothing but variables.
    MadeUp,
    /// What a device plugin answers, which is asked when the container is made.
    Answered {
        /// Whether it may be NVIDIA's, whose runtime looks at a variable that images bring.
        nvidia: bool,
    },
}

impl Injection {
    pub(super) fn of_kind(kind: &str, settings: &Settings) -> Self {
        let root = settings.root.clone();
        match kind {
            "cuda" => Self::Cuda {
                how: settings.injection,
                engine: settings.engine.clone(),
                root,
            },
            "rocm" => Self::Rocm { root },
            _ => Self::Tpu,
        }
    }

    /// Adds what a container with these devices needs, also with none.
    pub(super) fn inject(
        &self,
        ids: &[&str],
        devices: &[Option<&AcceleratorDevice>],
        limits: &mut ContainerLimits,
    ) {
        match self {
            Self::Cuda { how, engine, root } => {
                cuda_variables(ids, limits);
                if !ids.is_empty() {
                    let how = engine.get().injection(*how);
                    cuda(how, root, ids, devices, limits);
                }
            }
            Self::Answered { nvidia } => {
                if *nvidia && ids.is_empty() {
                    limits.environment.push(no_nvidia());
                }
            }
            _ if ids.is_empty() => {}
            Self::Rocm { root } => rocm(root, ids, devices, limits),
            Self::Tpu => tpu(ids, devices, limits),
            Self::MadeUp => made_up(ids, devices, limits),
        }
    }
}

fn nodes_of<'k>(devices: &[Option<&'k AcceleratorDevice>]) -> impl Iterator<Item = &'k str> {
    let known = devices.iter().flatten();
    known.flat_map(|device| device.nodes.iter().map(String::as_str))
}

fn set(list: &mut Vec<(String, String)>, name: &str, value: impl Into<String>) {
    list.push((name.to_owned(), value.into()));
}

fn cuda(
    how: CudaInjection,
    root: &Path,
    ids: &[&str],
    devices: &[Option<&AcceleratorDevice>],
    limits: &mut ContainerLimits,
) {
    let arguments = match how {
        CudaInjection::Auto | CudaInjection::DeviceRequests => json!({
            "HostConfig": {"DeviceRequests": [{
                "Driver": "nvidia",
                "DeviceIDs": ids,
                "Capabilities": [["utility", "compute", "video", "graphics", "display"]],
            }]}
        }),
        CudaInjection::Cdi => cdi(ids
            .iter()
            .map(|id| format!("nvidia.com/gpu={id}"))
            .collect()),
        CudaInjection::DeviceNodes => match super::device_nodes::of_devices(root, ids, devices) {
            Ok(all) => device_nodes(all.iter().map(String::as_str)),
            Err(err) => {
                limits.refused = Some(err.to_string());
                return;
            }
        },
    };
    limits.arguments.push(arguments);
}

fn rocm(
    root: &Path,
    ids: &[&str],
    devices: &[Option<&AcceleratorDevice>],
    limits: &mut ContainerLimits,
) {
    let all: Vec<&str> = std::iter::once("/dev/kfd")
        .chain(nodes_of(devices))
        .collect();
    let groups = all.iter().filter_map(|node| group_of(root, node));
    // Group 0 is everybody's who starts as root.
    limits.gids.extend(groups.filter(|gid| *gid != 0));
    limits.gids.sort_unstable();
    limits.gids.dedup();
    limits.arguments.push(device_nodes(all.into_iter()));
    limits.syscalls.extend(ROCM_SYSCALLS.map(str::to_owned));
    for name in ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"] {
        set(&mut limits.defaults, name, local(ids.len()));
    }
}

fn tpu(ids: &[&str], devices: &[Option<&AcceleratorDevice>], limits: &mut ContainerLimits) {
    limits.arguments.push(device_nodes(nodes_of(devices)));
    for name in ["TPU_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS"] {
        set(&mut limits.defaults, name, local(ids.len()));
    }
    if let Some(bounds) = bounds(ids.len()) {
        for (name, value) in [
            ("TPU_CHIPS_PER_PROCESS_BOUNDS", bounds),
            ("TPU_PROCESS_BOUNDS", "1,1,1"),
            ("TPU_CHIPS_PER_HOST_BOUNDS", bounds),
            ("TPU_HOST_BOUNDS", "1,1,1"),
        ] {
            set(&mut limits.defaults, name, value);
        }
    }
}

/// The original's variables are about CUDA.
fn made_up(ids: &[&str], devices: &[Option<&AcceleratorDevice>], limits: &mut ContainerLimits) {
    if !devices.iter().flatten().any(|device| device.kind == "cuda") {
        return;
    }
    for (name, value) in [
        ("TF_MIN_GPU_MULTIPROCESSOR_COUNT", "4".to_owned()),
        ("BACKENDAI_MOCK_CUDA_DEVICES", ids.join(",")),
        ("BACKENDAI_MOCK_CUDA_DEVICE_COUNT", ids.len().to_string()),
    ] {
        set(&mut limits.environment, name, value);
    }
}

/// `NVIDIA_VISIBLE_DEVICES` is always ours: images bring `all`, which gives a container every device
/// of a node whose default runtime is NVIDIA's. `CUDA_VISIBLE_DEVICES` can only narrow what was
/// injected, so a request's own wins.
fn cuda_variables(ids: &[&str], limits: &mut ContainerLimits) {
    if ids.is_empty() {
        limits.environment.push(no_nvidia());
        return;
    }
    set(&mut limits.environment, NVIDIA_VISIBLE, ids.join(","));
    // CUDA numbers the devices it sees; instances of a divided device go by their ids only.
    let visible = if has_parts(ids) {
        ids.join(",")
    } else {
        local(ids.len())
    };
    set(&mut limits.defaults, "CUDA_VISIBLE_DEVICES", visible);
    set(&mut limits.defaults, "CUDA_DEVICE_ORDER", "PCI_BUS_ID");
}

/// Whether one of them is an instance of a divided device.
fn has_parts(ids: &[&str]) -> bool {
    ids.iter().any(|id| id.starts_with("MIG-"))
}

fn no_nvidia() -> (String, String) {
    (NVIDIA_VISIBLE.to_owned(), NO_NVIDIA.to_owned())
}

/// How few chips lie to each other. libtpu takes a machine's whole grid for that of its process
/// otherwise, and waits for chips that the container does not have; more than two may be the whole
/// machine, which knows better.
fn bounds(chips: usize) -> Option<&'static str> {
    match chips {
        1 => Some("1,1,1"),
        2 => Some("1,2,1"),
        _ => None,
    }
}

/// `0,1,2`: the devices as a container that sees only its own numbers them.
fn local(count: usize) -> String {
    let all: Vec<String> = (0..count).map(|place| place.to_string()).collect();
    all.join(",")
}

/// A request for devices by CDI names.
pub(crate) fn cdi(names: Vec<String>) -> Value {
    json!({"HostConfig": {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": names}]}})
}

fn device_nodes<'n>(nodes: impl Iterator<Item = &'n str>) -> Value {
    let mut seen: Vec<&str> = Vec::new();
    for node in nodes {
        if !seen.contains(&node) {
            seen.push(node);
        }
    }
    let mapped = seen.into_iter().map(|node| device_node(node, node, "mrw"));
    json!({"HostConfig": {"Devices": mapped.collect::<Vec<_>>()}})
}

/// One device node in the engine's words.
pub(crate) fn device_node(host: &str, container: &str, permissions: &str) -> Value {
    json!({
        "PathOnHost": host,
        "PathInContainer": container,
        "CgroupPermissions": permissions,
    })
}
