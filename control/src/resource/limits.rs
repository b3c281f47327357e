//! What an allocation means for a container.

/// Resource limits of a container, in the engine's units.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerLimits {
    /// `CpusetCpus`: cores in numeric order, joined by commas.
    pub cpuset_cpus: Option<String>,
    /// `CpusetMems`: the NUMA node of all the cores, when they share one with room for the memory.
    pub cpuset_mems: Option<String>,
    /// `Memory` in bytes.
    pub memory: Option<i64>,
    /// `MemorySwap` in bytes: the same, so there is no swap.
    pub memory_swap: Option<i64>,
    /// `NanoCpus`: CPU time in billionths of a core, with `node.cpu-quota`. With an overcommit
    /// factor a slot is that part of a core.
    pub nano_cpus: Option<i64>,
    /// Number of distinct cores, for `ai.backend.envs.corecount`.
    pub cpu_count: u32,
    /// Variables of accelerators; they win over the request's.
    pub environment: Vec<(String, String)>,
    /// Variables of accelerators that a request's own win over.
    pub defaults: Vec<(String, String)>,
    /// Groups whose device nodes are given.
    pub gids: Vec<u32>,
    /// System calls that devices need beyond the profile.
    pub syscalls: Vec<String>,
    /// Parts of the engine's create body from accelerators (`HostConfig.DeviceRequests`, ...).
    pub arguments: Vec<serde_json::Value>,
    /// Why no container can have these devices on this node, and what to do about it.
    pub refused: Option<String>,
    /// Lines of accelerators in `resource.txt`.
    pub resource_lines: Vec<(String, String)>,
}
