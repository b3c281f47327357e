//! Cores, memory and NUMA nodes of the host, read from `/proc` and `/sys`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use shared::procfs::{CgroupMount, cgroup_mounts, meminfo_bytes};

/// What the host has. Cores are those Docker's containers may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostInventory {
    /// Usable cores, ascending.
    pub cores: Vec<u32>,
    /// NUMA node of each core; 0 when the host tells none.
    pub node_of_core: BTreeMap<u32, i32>,
    /// Memory of each NUMA node that has some, in bytes; empty when the host tells none.
    pub node_memory: BTreeMap<i32, u64>,
    /// Memory in bytes.
    pub memory: u64,
}

/// What could not be read.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file of `/proc` could not be read.
    #[error("{} can not be read; is /proc mounted?", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// The kernel does not say how much memory there is.
    #[error("/proc/meminfo has no MemTotal")]
    Memory,
    /// No source names a core.
    #[error(
        "the host names no usable core; check the cpuset of the docker cgroup and the affinity of this process"
    )]
    NoCore,
}

impl HostInventory {
    /// Reads this host. Blocking.
    ///
    /// # Errors
    /// When neither cores nor memory can be found out.
    pub fn read() -> Result<Self, HostError> {
        Self::read_below(Path::new("/"))
    }

    /// Reads a tree with `proc` and `sys` in it.
    pub(crate) fn read_below(root: &Path) -> Result<Self, HostError> {
        let cores = docker_cores(root)
            .or_else(|| affinity_cores(root))
            .or_else(|| online_cores(root))
            .ok_or(HostError::NoCore)?;
        let nodes = numa_nodes(root);
        let node_of = |core: u32| {
            nodes
                .iter()
                .find(|(_, node)| node.cores.contains(&core))
                .map_or(0, |(id, _)| *id)
        };
        Ok(Self {
            node_of_core: cores.iter().map(|core| (*core, node_of(*core))).collect(),
            node_memory: nodes
                .iter()
                .filter_map(|(id, node)| Some((*id, node.memory.filter(|bytes| *bytes > 0)?)))
                .collect(),
            memory: memory(root)?,
            cores,
        })
    }
}

fn text(root: &Path, path: impl AsRef<Path>) -> Option<String> {
    let path = path.as_ref();
    std::fs::read_to_string(root.join(path.strip_prefix("/").unwrap_or(path))).ok()
}

/// The cpuset of Docker's parent cgroup: `docker` with the cgroupfs driver, `system.slice` with
/// systemd; version 1 or 2, wherever it is mounted.
fn docker_cores(root: &Path) -> Option<Vec<u32>> {
    let mounts = text(root, "proc/self/mounts")?;
    for (version_one, file) in [
        (true, "cpuset.effective_cpus"),
        (false, "cpuset.cpus.effective"),
    ] {
        let may_have = |mount: &CgroupMount<'_>| match version_one {
            true => mount.has("cpuset"),
            false => mount.unified,
        };
        let Some(mount) = cgroup_mounts(&mounts).find(may_have) else {
            continue;
        };
        for parent in ["docker", "system.slice"] {
            let path = mount.place.join(parent).join(file);
            if let Some(cores) = text(root, &path).and_then(|cores| parse_cores(&cores)) {
                return Some(cores);
            }
        }
    }
    None
}

/// The cores this process may run on.
fn affinity_cores(root: &Path) -> Option<Vec<u32>> {
    let status = text(root, "proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    parse_cores(line)
}

fn online_cores(root: &Path) -> Option<Vec<u32>> {
    parse_cores(&text(root, "sys/devices/system/cpu/online")?)
}

/// Highest core number believed: the kernel's own limit is 8192.
const HIGHEST_CORE: u32 = 65_535;

/// Comma separated `n` or `a-b`. Empty, backwards or absurd text is no list.
fn parse_cores(list: &str) -> Option<Vec<u32>> {
    let mut cores = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last > HIGHEST_CORE {
            return None;
        }
        cores.extend(first..=last);
    }
    cores.sort_unstable();
    cores.dedup();
    Some(cores)
}

struct NumaNode {
    cores: Vec<u32>,
    memory: Option<u64>,
}

fn numa_nodes(root: &Path) -> BTreeMap<i32, NumaNode> {
    let directory = root.join("sys/devices/system/node");
    let Ok(entries) = std::fs::read_dir(directory) else {
        return BTreeMap::new();
    };
    let mut nodes = BTreeMap::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(id) = name
            .to_str()
            .and_then(|name| name.strip_prefix("node")?.parse().ok())
        else {
            continue;
        };
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
        // A node with memory only has an empty list of cores.
        let cores = read("cpulist")
            .and_then(|list| parse_cores(&list))
            .unwrap_or_default();
        let memory = read("meminfo").and_then(|info| meminfo_bytes(&info, "MemTotal:"));
        nodes.insert(id, NumaNode { cores, memory });
    }
    nodes
}

fn memory(root: &Path) -> Result<u64, HostError> {
    let path = root.join("proc/meminfo");
    let info = std::fs::read_to_string(&path).map_err(|err| HostError::Read(path, err))?;
    meminfo_bytes(&info, "MemTotal:").ok_or(HostError::Memory)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        root
    }

    const MEMORY: (&str, &str) = ("proc/meminfo", "MemTotal:       65536 kB\nMemFree: 1 kB\n");
    const STATUS: (&str, &str) = ("proc/self/status", "Name:\tx\nCpus_allowed_list:\t0-3,8\n");

    #[test]
    fn this_host_has_cores_and_memory() {
        let host = HostInventory::read().unwrap();
        assert!(!host.cores.is_empty());
        assert!(host.memory > 64 << 20);
        assert!(
            host.cores
                .iter()
                .all(|core| host.node_of_core.contains_key(core))
        );
    }

    #[test]
    fn the_docker_cpuset_comes_first_then_affinity_then_all() {
        let v1 = "cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let of =
            |files: &[(&str, &str)]| HostInventory::read_below(tree(files).path()).unwrap().cores;
        let v1_file = "sys/fs/cgroup/cpuset/docker/cpuset.effective_cpus";
        assert_eq!(
            of(&[MEMORY, STATUS, ("proc/self/mounts", v1), (v1_file, "2-3\n")]),
            [2, 3]
        );
        let v2_file = "sys/fs/cgroup/system.slice/cpuset.cpus.effective";
        assert_eq!(
            of(&[MEMORY, STATUS, ("proc/self/mounts", v2), (v2_file, "5\n")]),
            [5]
        );
        // Empty or backwards text is passed over.
        for bad in ["\n", "3-2\n", "a\n", "0-99999999\n"] {
            assert_eq!(
                of(&[MEMORY, STATUS, ("proc/self/mounts", v1), (v1_file, bad)]),
                [0, 1, 2, 3, 8]
            );
        }
        assert_eq!(
            of(&[MEMORY, ("sys/devices/system/cpu/online", "0-1\n")]),
            [0, 1]
        );
        assert!(matches!(
            HostInventory::read_below(tree(&[MEMORY]).path()),
            Err(HostError::NoCore)
        ));
        assert!(matches!(
            HostInventory::read_below(tree(&[STATUS]).path()),
            Err(HostError::Read(..))
        ));
    }

    #[test]
    fn numa_nodes_are_read_with_their_memory() {
        let root = tree(&[
            MEMORY,
            STATUS,
            ("sys/devices/system/node/node0/cpulist", "0-1\n"),
            (
                "sys/devices/system/node/node0/meminfo",
                "Node 0 MemTotal:  32768 kB\n",
            ),
            ("sys/devices/system/node/node1/cpulist", "2-3,8\n"),
            // Its slots are empty: an engine takes no memory of it.
            (
                "sys/devices/system/node/node1/meminfo",
                "Node 1 MemTotal:      0 kB\n",
            ),
            ("sys/devices/system/node/node2/cpulist", "\n"),
            ("sys/devices/system/node/possible", "0-2\n"),
        ]);
        let host = HostInventory::read_below(root.path()).unwrap();
        assert_eq!(
            host.node_of_core,
            BTreeMap::from([(0, 0), (1, 0), (2, 1), (3, 1), (8, 1)])
        );
        assert_eq!(host.node_memory, BTreeMap::from([(0, 32 << 20)]));
        assert_eq!(host.memory, 64 << 20);
    }

    proptest! {
        #[test]
        fn core_lists_never_panic(list in "\\PC{0,30}", numbers in "[0-9,-]{0,30}") {
            let _ = parse_cores(&list);
            let _ = parse_cores(&numbers);
        }
    }
}
