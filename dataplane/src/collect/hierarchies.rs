//! The cgroup hierarchies of this host: where each controller is mounted and in which version.
//!
//! In: the mount table. Out: for each group of counters the hierarchy to read it from. What is there
//! decides: no kernel version is compared anywhere. Invariant: each controller has
//! at most one hierarchy (the kernel sees to that); v1 is taken where it is mounted, else v2.

use std::path::{Path, PathBuf};

use shared::procfs::{cgroup_mounts, unified_cgroup_mount};

/// A cgroup hierarchy that a controller is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hierarchy {
    /// Version 1, mounted here.
    V1(PathBuf),
    /// Version 2, mounted here.
    V2(PathBuf),
}

impl Hierarchy {
    /// Where it is mounted.
    pub fn mount(&self) -> &Path {
        match self {
            Self::V1(path) | Self::V2(path) => path,
        }
    }
}

/// The hierarchies of the controllers read here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CgroupHierarchies {
    /// `cpuacct` (v1) or the unified tree, whose `cpu.stat` needs no controller.
    pub cpu: Option<Hierarchy>,
    /// `cpu` of v1, for throttling.
    pub cpu_quota: Option<Hierarchy>,
    /// `memory`.
    pub memory: Option<Hierarchy>,
    /// `pids`.
    pub pids: Option<Hierarchy>,
    /// `blkio` (v1) or `io` (v2).
    pub io: Option<Hierarchy>,
}

impl CgroupHierarchies {
    /// Finds those of this host.
    pub fn gather() -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        Self::from_mounts(&mounts, |mount| {
            std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default()
        })
    }

    /// Where the hierarchies are mounted, each once.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let all = [
            &self.cpu,
            &self.cpu_quota,
            &self.memory,
            &self.pids,
            &self.io,
        ];
        let mounts = all.into_iter().flatten();
        let mut mounts: Vec<PathBuf> = mounts.map(|it| it.mount().to_owned()).collect();
        mounts.sort();
        mounts.dedup();
        mounts
    }

    /// Those a mount table tells; `unified` answers the controllers of a v2 tree.
    pub fn from_mounts(mounts: &str, unified: impl Fn(&Path) -> String) -> Self {
        let v2 = unified_cgroup_mount(mounts);
        let on_v1 = |controller: &str| {
            cgroup_mounts(mounts)
                .find(|mount| mount.has(controller))
                .map(|mount| Hierarchy::V1(mount.place))
        };
        let controllers = v2.as_deref().map(&unified).unwrap_or_default();
        let on_v2 = |controller: &str| {
            controllers
                .split_whitespace()
                .any(|name| name == controller)
                .then(|| v2.clone().map(Hierarchy::V2))
                .flatten()
        };
        Self {
            cpu: on_v1("cpuacct").or_else(|| v2.clone().map(Hierarchy::V2)),
            cpu_quota: on_v1("cpu"),
            memory: on_v1("memory").or_else(|| on_v2("memory")),
            pids: on_v1("pids").or_else(|| on_v2("pids")),
            io: on_v1("blkio").or_else(|| on_v2("io")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
cgroup /sys/fs/cgroup/cpu cgroup rw,relatime,cpu 0 0
cgroup /sys/fs/cgroup/cpuacct cgroup rw,relatime,cpuacct 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,relatime,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0
";

    #[test]
    fn a_hybrid_host_has_controllers_on_both_versions() {
        let hierarchies = CgroupHierarchies::from_mounts(HYBRID, |_| "io hugetlb\n".to_owned());
        let v1 = |name: &str| Some(Hierarchy::V1(Path::new("/sys/fs/cgroup").join(name)));
        assert_eq!(hierarchies.cpu, v1("cpuacct"));
        assert_eq!(hierarchies.cpu_quota, v1("cpu"));
        assert_eq!(hierarchies.memory, v1("memory"));
        assert_eq!(hierarchies.pids, None);
        assert_eq!(
            hierarchies.io,
            Some(Hierarchy::V2("/sys/fs/cgroup/unified".into()))
        );
    }

    #[test]
    fn a_unified_host_has_all_on_v2() {
        let hierarchies =
            CgroupHierarchies::from_mounts("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", |_| {
                "cpu io memory pids\n".to_owned()
            });
        let v2 = Some(Hierarchy::V2("/sys/fs/cgroup".into()));
        assert_eq!((&hierarchies.cpu, &hierarchies.memory), (&v2, &v2));
        assert_eq!((&hierarchies.pids, &hierarchies.io), (&v2, &v2));
        assert_eq!(hierarchies.cpu_quota, None);
    }

    #[test]
    fn controllers_may_share_a_mount_and_places_may_hold_spaces() {
        let hierarchies = CgroupHierarchies::from_mounts(
            "x /mnt/a\\040b/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n",
            |_| String::new(),
        );
        assert_eq!(
            hierarchies.cpu,
            Some(Hierarchy::V1("/mnt/a b/cpu,cpuacct".into()))
        );
        assert_eq!(hierarchies.cpu, hierarchies.cpu_quota);
        assert_eq!(hierarchies.memory, None);
    }
}
