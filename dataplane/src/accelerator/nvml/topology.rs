//! How near NVIDIA devices are to each other: NVLinks, and what lies between them on the PCIe bus.
//!
//! In: the driver. Out: for each device the nearness of every other one. Invariants: what the driver
//! does not tell is unknown; it is asked when devices come or go, and now and then, because links fail.
//!
//! Source: NVIDIA's NVML API reference, "NvLink Methods" and `nvmlDeviceGetTopologyCommonAncestor`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use nvml_wrapper::enum_wrappers::device::TopologyLevel;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use shared::observed::{NEIGHBOURS, Proximity};

use super::constants::bus_address;

/// Links that are asked about; devices have 18 today.
const LINKS: u32 = 64;
/// How long an answer is good for.
const KEPT: Duration = Duration::from_secs(60);

const UNKNOWN: [Proximity; NEIGHBOURS] = [Proximity(0); NEIGHBOURS];

/// A device that answers.
pub(super) struct Node<'nvml> {
    pub index: u32,
    pub id: String,
    /// PCI address as sysfs writes it.
    pub pci: String,
    pub device: Device<'nvml>,
}

/// The last answer.
#[derive(Debug, Default)]
pub(super) struct Topology {
    asked: Option<(Instant, Vec<(u32, String)>)>,
    near: HashMap<u32, [Proximity; NEIGHBOURS]>,
}

impl Topology {
    /// How near the others are to a device.
    pub(super) fn near(&self, index: u32) -> [Proximity; NEIGHBOURS] {
        self.near.get(&index).copied().unwrap_or(UNKNOWN)
    }

    /// Asks again where these are others than before, or the last answer is old.
    pub(super) fn refresh(&mut self, nvml: &Nvml, nodes: &[Node<'_>]) {
        let all: Vec<(u32, String)> = nodes.iter().map(|n| (n.index, n.id.clone())).collect();
        if let Some((at, before)) = &self.asked
            && *before == all
            && at.elapsed() < KEPT
        {
            return;
        }
        self.near.clear();
        if nodes.len() > 1 {
            let buses: BTreeSet<&str> = nodes.iter().map(|node| node.pci.as_str()).collect();
            let links: Vec<_> = nodes.iter().map(|node| links(&node.device)).collect();
            for (place, one) in nodes.iter().enumerate() {
                for (beyond, other) in nodes.iter().enumerate().skip(place + 1) {
                    let count = links_between(
                        (&one.pci, &links[place]),
                        (&other.pci, &links[beyond]),
                        &buses,
                    );
                    let near = match count {
                        0 => by_bus(nvml.topology_common_ancestor(&one.device, &other.device)),
                        count => Proximity::links(count),
                    };
                    self.put(one.index, other.index, near);
                    self.put(other.index, one.index, near);
                }
            }
        }
        self.asked = Some((Instant::now(), all));
    }

    fn put(&mut self, from: u32, to: u32, near: Proximity) {
        let place = usize::try_from(to).unwrap_or(usize::MAX);
        let row = self.near.entry(from).or_insert(UNKNOWN);
        if let Some(place) = row.get_mut(place) {
            *place = near;
        }
    }
}

/// Active links of a device, counted by what is at their other end.
fn links(device: &Device<'_>) -> BTreeMap<String, u32> {
    let mut ends = BTreeMap::new();
    for number in 0..LINKS {
        let link = device.link_wrapper_for(number);
        match link.is_active() {
            Ok(true) => {}
            Ok(false) => continue,
            // There is no such link, and none after it; or the device has none at all.
            Err(NvmlError::InvalidArg) => break,
            Err(_) if number == 0 => break,
            Err(_) => continue,
        }
        if let Ok(end) = link.remote_pci_info() {
            *ends.entry(bus_address(&end.bus_id)).or_insert(0) += 1;
        }
    }
    ends
}

/// Links that go from one device to the other, else by way of switches that both are linked to. What
/// is linked to a third device is no switch.
fn links_between(
    one: (&str, &BTreeMap<String, u32>),
    other: (&str, &BTreeMap<String, u32>),
    devices: &BTreeSet<&str>,
) -> u32 {
    if let Some(direct) = one.1.get(other.0).or_else(|| other.1.get(one.0)) {
        return *direct;
    }
    let switches = one
        .1
        .iter()
        .filter(|(end, _)| !devices.contains(end.as_str()));
    let shared = switches.filter_map(|(end, count)| Some((*count).min(*other.1.get(end)?)));
    shared.sum()
}

fn by_bus(level: Result<TopologyLevel, NvmlError>) -> Proximity {
    match level {
        Ok(TopologyLevel::Internal) => Proximity::BOARD,
        Ok(TopologyLevel::Single) => Proximity::SWITCH,
        Ok(TopologyLevel::Multiple) => Proximity::SWITCHES,
        Ok(TopologyLevel::HostBridge) => Proximity::HOST_BRIDGE,
        Ok(TopologyLevel::Node) => Proximity::NUMA_NODE,
        Ok(TopologyLevel::System) => Proximity::SYSTEM,
        Err(_) => Proximity::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(all: &[(&str, u32)]) -> BTreeMap<String, u32> {
        all.iter()
            .map(|(end, count)| ((*end).to_owned(), *count))
            .collect()
    }

    #[test]
    fn links_are_counted_directly_and_by_switches() {
        let devices = BTreeSet::from(["a", "b", "c"]);
        let between = |one: (&str, &[(&str, u32)]), other: (&str, &[(&str, u32)])| {
            links_between((one.0, &ends(one.1)), (other.0, &ends(other.1)), &devices)
        };
        assert_eq!(between(("a", &[("b", 4)]), ("b", &[("a", 4)])), 4);
        // A third device is on the way of neither.
        assert_eq!(between(("a", &[("b", 4)]), ("c", &[("b", 4)])), 0);
        assert_eq!(
            between(("a", &[("x", 3), ("y", 3)]), ("b", &[("x", 2), ("y", 3)])),
            5
        );
        assert_eq!(between(("a", &[("x", 3)]), ("b", &[])), 0);
    }
}
