//! Devices as the node knows them: what stays the same between two looks at a driver.

use std::path::Path;

use serde::{Deserialize, Serialize};
use shared::observed::{AcceleratorKind, AcceleratorRow, Proximity};

use super::settings::Settings;

/// What runs a device, as its driver tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Versions {
    /// Of the driver; empty unknown.
    pub driver: String,
    /// The latest runtime (CUDA) that the driver serves; empty unknown.
    pub runtime: String,
}

/// A device, or a part of one, that can be given out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceleratorDevice {
    /// Device name: `cuda`, `rocm`, `tpu`.
    pub kind: String,
    /// Stable id, also in allocations: a UUID, a serial number, a PCI address.
    pub id: String,
    /// The number by which the Python agent's kernels hold it: of a whole CUDA device.
    #[serde(default)]
    pub number: Option<u32>,
    /// Model.
    pub model: String,
    /// PCI address as sysfs writes it, or empty.
    pub pci: String,
    /// NUMA node.
    pub numa_node: Option<i32>,
    /// Whether it works.
    pub healthy: bool,
    /// The driver's last fault code.
    pub fault: Option<u32>,
    /// Name of the kind of part (`1g.10gb`); none for a whole device.
    pub profile: Option<String>,
    /// Ids of a MIG instance's GPU instance and compute instance, if the driver tells.
    #[serde(default)]
    pub instance: Option<(u32, u32)>,
    /// Memory, bytes.
    pub memory: u64,
    /// Processing units; 0 unknown.
    pub units: u64,
    /// Its device nodes.
    pub nodes: Vec<String>,
    /// The slot it is given out as, when a device plugin lists it; of a driver's device the kind and
    /// the profile say it.
    #[serde(default)]
    pub slot: Option<String>,
    /// Versions of its software.
    #[serde(default)]
    pub versions: Versions,
    /// Other devices of the kind by id, and how near they are ([`Proximity`]).
    #[serde(default)]
    pub near: Vec<(String, u8)>,
}

impl AcceleratorDevice {
    /// Whether an allocation means this device.
    pub(super) fn is_called(&self, id: &str) -> bool {
        self.id == id || self.number.is_some_and(|number| number.to_string() == id)
    }

    /// The same device, which nobody lists any more.
    pub(super) fn as_lost(&self) -> Self {
        Self {
            healthy: false,
            ..self.clone()
        }
    }
}

/// What can be given out of the drivers' devices: parts in place of what is divided, and nothing
/// that is masked or whose plugin is switched off. In the order of the rows.
pub(super) fn of_rows(rows: &[AcceleratorRow], settings: &Settings) -> Vec<AcceleratorDevice> {
    let given = rows.iter().filter(|row| {
        let kind = row.key.kind.to_string();
        // A mask of a divided device is one of its parts.
        let whole = row.part_of.unwrap_or(row.key.index);
        let mut named = rows.iter().filter(|other| {
            let is_whole = other.key.kind == row.key.kind && other.key.index == whole;
            is_whole || other.key == row.key
        });
        !row.divided && named.all(|named| settings.gives_out(&kind, &named.id, whole))
    });
    let given: Vec<&AcceleratorRow> = given.collect();
    let device = |row: &&AcceleratorRow| AcceleratorDevice {
        near: near(row, &given),
        ..known(row, settings)
    };
    given.iter().map(device).collect()
}

/// The id under which a device is given out.
pub(crate) fn id_of(row: &AcceleratorRow) -> String {
    match row.id.as_str() {
        // Never two devices of one name, however little their driver tells.
        "" => format!("{}-{}", row.key.kind, row.key.index),
        // Ids are put into lists of `id:amount`.
        id => id.replace([',', ':', '=', ' ', '\n'], "_"),
    }
}

/// The other whole devices of the kind, and how near they are.
fn near(row: &AcceleratorRow, all: &[&AcceleratorRow]) -> Vec<(String, u8)> {
    if row.part_of.is_some() {
        return Vec::new();
    }
    let others = all.iter().filter(|other| {
        let same = other.key.kind == row.key.kind && other.part_of.is_none();
        same && other.key != row.key
    });
    others
        .filter_map(|other| {
            let place = usize::try_from(other.key.index).ok()?;
            let near = row.near.get(place).filter(|near| near.is_known())?;
            Some((id_of(other), near.0))
        })
        .collect()
}

fn known(row: &AcceleratorRow, settings: &Settings) -> AcceleratorDevice {
    AcceleratorDevice {
        kind: row.key.kind.to_string(),
        id: id_of(row),
        number: (row.key.kind == AcceleratorKind::Cuda && row.part_of.is_none())
            .then_some(row.key.index),
        model: row.model.clone(),
        numa_node: row.numa_node.map(i32::from),
        healthy: row.healthy,
        fault: row.fault,
        profile: row.part_of.map(|_| row.profile.clone()),
        instance: row.instance.map(|ids| (ids.gpu, ids.compute)),
        memory: row.counters.memory_total_bytes.unwrap_or(0),
        units: row.units.unwrap_or(0).into(),
        nodes: match row.key.kind {
            AcceleratorKind::Cuda => cuda_nodes(row),
            AcceleratorKind::Rocm => rocm_nodes(&settings.root, row),
            AcceleratorKind::Tpu => tpu_nodes(&settings.root, &row.pci),
        },
        pci: row.pci.clone(),
        slot: None,
        versions: Versions {
            driver: row.driver.clone(),
            runtime: row.runtime.clone(),
        },
        near: Vec::new(),
    }
}

impl AcceleratorDevice {
    /// How near the others are, in the words of `nvidia-smi topo -m`; none when that is unknown.
    /// AMD's links are `XGMI` where NVIDIA's are `NV`.
    pub(super) fn ways(&self) -> Option<String> {
        let words = |near: &u8| {
            let words = Proximity(*near).to_string();
            match words.strip_prefix("NV") {
                Some(links) if self.kind == "rocm" => format!("XGMI{links}"),
                _ => words,
            }
        };
        let ways = self.near.iter();
        let ways = ways.map(|(id, near)| format!("{id} {}", words(near)));
        let ways: Vec<String> = ways.collect();
        (!ways.is_empty()).then(|| ways.join(", "))
    }
}

/// The PCI address as one name of a directory; a driver's text is no path.
fn plain(pci: &str) -> Option<&str> {
    (!pci.is_empty() && !pci.contains('/') && !pci.starts_with('.')).then_some(pci)
}

/// `/dev/nvidiaN`: the number is the driver's minor, which need not be the device's place. It comes with
/// the row: the driver's file of it can't be read while the driver hangs.
fn cuda_nodes(row: &AcceleratorRow) -> Vec<String> {
    let node = row.minor.map(|minor| format!("/dev/nvidia{minor}"));
    node.into_iter().collect()
}

/// `/dev/dri/renderDN` of the device: as KFD tells it, because a partition of a divided device has a node
/// of its own, which is not below the device; else those that are below it.
fn rocm_nodes(root: &Path, row: &AcceleratorRow) -> Vec<String> {
    if let Some(minor) = render_minor(root, row) {
        return vec![format!("/dev/dri/renderD{minor}")];
    }
    let Some(pci) = plain(&row.pci) else {
        return Vec::new();
    };
    let directory = root.join("sys/bus/pci/devices").join(pci).join("drm");
    let mut nodes: Vec<String> = names(&directory)
        .filter(|name| name.starts_with("renderD"))
        .map(|name| format!("/dev/dri/{name}"))
        .collect();
    nodes.sort();
    nodes
}

/// The minor number of a render node, of the device with this number among those that compute.
fn render_minor(root: &Path, row: &AcceleratorRow) -> Option<u64> {
    let topology = root.join("sys/class/kfd/kfd/topology/nodes");
    let mut nodes: Vec<u32> = names(&topology)
        .filter_map(|name| name.parse().ok())
        .collect();
    nodes.sort_unstable();
    let properties = nodes.into_iter().filter_map(|node| {
        let file = topology.join(node.to_string()).join("properties");
        let text = std::fs::read_to_string(file).ok()?;
        let get = |name: &str| -> Option<u64> {
            let mut lines = text.lines().filter_map(|line| line.split_once(' '));
            let (_, value) = lines.find(|(key, _)| *key == name)?;
            value.trim().parse().ok()
        };
        get("simd_count").filter(|count| *count > 0)?;
        Some([get("domain"), get("location_id"), get("drm_render_minor")])
    });
    let [domain, place, minor] = properties
        .into_iter()
        .nth(usize::try_from(row.key.index).ok()?)?;
    let place = place?;
    let pci = format!(
        "{:04x}:{:02x}:{:02x}.",
        domain.unwrap_or(0),
        (place >> 8) & 0xff,
        (place >> 3) & 0x1f
    );
    minor.filter(|minor| *minor > 0 && row.pci.starts_with(&pci))
}

/// `/dev/accelN`, or the VFIO group of the device.
fn tpu_nodes(root: &Path, pci: &str) -> Vec<String> {
    let Some(pci) = plain(pci) else {
        return Vec::new();
    };
    let device = root.join("sys/bus/pci/devices").join(pci);
    let of_class = names(&device.join("accel")).find(|name| name.starts_with("accel"));
    if let Some(name) = of_class {
        return vec![format!("/dev/{name}")];
    }
    let group = std::fs::read_link(device.join("iommu_group")).ok();
    let group = group.and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()));
    group
        .map(|group| vec!["/dev/vfio/vfio".to_owned(), format!("/dev/vfio/{group}")])
        .unwrap_or_default()
}

fn names(directory: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}
