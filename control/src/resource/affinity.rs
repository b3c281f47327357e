//! Which devices are near each other: same NUMA node or not, as in the original; and where the driver
//! tells it, among devices of one node, those with the best ways between them.

use std::collections::HashSet;

use config::AffinityPolicy;

use super::fabric::{Ways, together};
use super::{Amount, Device};

/// All devices of all plugins, in the order of the plugins.
#[derive(Debug, Clone, Default)]
pub struct AffinityGraph {
    nodes: Vec<GraphNode>,
}

#[derive(Debug, Clone)]
struct GraphNode {
    device_name: String,
    id: String,
    numa_node: Option<i32>,
    near: Vec<(String, u8)>,
}

/// What earlier devices of the same request got, to place later ones near them.
#[derive(Debug, Clone)]
pub struct Hint<'a> {
    pub(super) graph: &'a AffinityGraph,
    pub(super) policy: AffinityPolicy,
    /// Device name and ids given last; empty at first.
    pub(super) given: Vec<(String, String)>,
}

impl<'a> Hint<'a> {
    /// The hint a request starts with.
    pub fn first(graph: &'a AffinityGraph, policy: AffinityPolicy) -> Self {
        Self {
            graph,
            policy,
            given: Vec::new(),
        }
    }
}

/// One device as a map sees it while it orders them.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub id: String,
    pub used: Amount,
    pub free: Amount,
}

impl AffinityGraph {
    /// The graph of the given devices.
    pub fn of<'d>(devices: impl IntoIterator<Item = &'d Device>) -> Self {
        let nodes = devices.into_iter().map(|device| GraphNode {
            device_name: device.device_name.clone(),
            id: device.id.clone(),
            numa_node: device.numa_node,
            near: device.near.clone(),
        });
        Self {
            nodes: nodes.collect(),
        }
    }

    fn numa_node(&self, device_name: &str, id: &str) -> Option<Option<i32>> {
        let found = self
            .nodes
            .iter()
            .find(|n| n.device_name == device_name && n.id == id);
        found.map(|node| node.numa_node)
    }

    fn ways(&self, device_name: &str) -> Ways<'_> {
        let own = self.nodes.iter().filter(|n| n.device_name == device_name);
        own.flat_map(|node| {
            let near = node.near.iter();
            near.map(|(other, near)| ((node.id.as_str(), other.as_str()), *near))
        })
        .collect()
    }

    /// Groups of devices of one name on the same NUMA node, in the order of first appearance.
    fn clusters(&self, device_name: &str) -> Vec<Vec<&str>> {
        let mut groups: Vec<(Option<i32>, Vec<&str>)> = Vec::new();
        for node in self
            .nodes
            .iter()
            .filter(|node| node.device_name == device_name)
        {
            match groups.iter_mut().find(|(numa, _)| *numa == node.numa_node) {
                Some((_, ids)) => ids.push(&node.id),
                None => groups.push((node.numa_node, vec![&node.id])),
            }
        }
        groups.into_iter().map(|(_, ids)| ids).collect()
    }
}

/// The order in which a map considers its devices for a request of so many. `candidates` are in
/// device-list order.
pub(super) fn order(
    candidates: Vec<Candidate>,
    count: usize,
    device_name: &str,
    hint: Option<&Hint<'_>>,
) -> Vec<Candidate> {
    let Some(hint) = hint else {
        return by_free(candidates);
    };
    // Devices the graph does not know (a plugin that lists none) are only ordered by space.
    let clusters = hint.graph.clusters(device_name);
    if clusters.is_empty() {
        return by_free(candidates);
    }
    let ways = hint.graph.ways(device_name);
    let pick = |ids: &[&str]| -> Vec<Candidate> {
        let ids: HashSet<&str> = ids.iter().copied().collect();
        let chosen = candidates.iter().filter(|c| ids.contains(c.id.as_str()));
        together(by_free(chosen.cloned().collect()), count, &ways)
    };
    let used = |set: &Vec<Candidate>| -> Amount { set.iter().map(|c| c.used).sum() };
    if hint.given.is_empty() {
        let mut clusters = clusters;
        clusters.sort_by_key(|cluster| std::cmp::Reverse(cluster.len()));
        let mut sets: Vec<Vec<Candidate>> = clusters.iter().map(|ids| pick(ids)).collect();
        sets.sort_by_key(used);
        return match hint.policy {
            AffinityPolicy::PreferSingleNode => sets.into_iter().flatten().collect(),
            AffinityPolicy::Interleaved => interleave(sets),
        };
    }
    let mut nodes: Vec<Option<i32>> = hint
        .given
        .iter()
        .filter_map(|(name, id)| hint.graph.numa_node(name, id))
        .collect();
    nodes.sort_unstable();
    nodes.dedup();
    let on = |wanted: Option<i32>| -> Vec<&str> {
        let all = hint.graph.nodes.iter();
        let on_node = all.filter(|n| n.device_name == device_name && n.numa_node == wanted);
        on_node.map(|n| n.id.as_str()).collect()
    };
    let mut near: Vec<Vec<Candidate>> = nodes.iter().map(|node| pick(&on(*node))).collect();
    near.sort_by_key(used);
    let mut ordered = interleave(near);
    let taken: HashSet<String> = ordered.iter().map(|near| near.id.clone()).collect();
    let far = candidates.iter().filter(|c| !taken.contains(&c.id));
    let far = by_free(far.cloned().collect());
    ordered.extend(far);
    ordered
}

/// Most free first; equals keep their order.
fn by_free(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    candidates.sort_by_key(|candidate| std::cmp::Reverse(candidate.free));
    candidates
}

/// One of each set in turn, leaving out exhausted sets.
fn interleave(sets: Vec<Vec<Candidate>>) -> Vec<Candidate> {
    let mut sets: Vec<_> = sets.into_iter().map(Vec::into_iter).collect();
    let mut ordered = Vec::new();
    loop {
        let before = ordered.len();
        ordered.extend(sets.iter_mut().filter_map(Iterator::next));
        if ordered.len() == before {
            return ordered;
        }
    }
}
