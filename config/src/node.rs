//! `[node]`: the settings the original does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use crate::choice::{
    AllocationMode, CudaInjection, Forward, KernelAttach, Publish, RelayEngine, RelayFrom,
};
use crate::units::{ByteSize, ProxyUrl, Subnet, mask_password};

/// `[node]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Base of the shared regions, on tmpfs; each agent has a directory of its id in it.
    pub run_dir: PathBuf,
    /// State of standalone mode; the same as `agent.var-base-path` otherwise.
    pub state_dir: PathBuf,
    /// Installed in-container runner packages, a directory per version.
    pub runner_dir: PathBuf,
    /// Who publishes container ports.
    pub publish: Publish,
    /// How the dataplane serves rows.
    pub forward: Forward,
    /// How the kernel path's programs get to interfaces.
    pub kernel_attach: KernelAttach,
    /// How the relay moves the bytes of connections.
    pub relay_engine: RelayEngine,
    /// Where the relay's connections to containers begin.
    pub relay_from: RelayFrom,
    /// Whether the host's firewall decides about clients of service ports, which the kernel path
    /// would bypass; left out, the agent looks at it.
    pub honour_firewall: Option<bool>,
    /// Client networks that may use service ports; none means all.
    pub allowed_clients: Vec<Subnet>,
    /// The same for services by their names; both lists must let a client in.
    pub service_clients: BTreeMap<String, Vec<Subnet>>,
    /// PEM file of the authorities that the event bus's certificate is checked against, where
    /// `config/redis` of etcd asks for encryption; none means those of the system.
    pub redis_ca_file: Option<PathBuf>,
    /// Whether containers get a CPU quota of their slots besides the cpuset.
    pub cpu_quota: bool,
    /// Whether memory is pinned to the NUMA nodes of the allocated cores.
    pub memory_nodes: bool,
    /// Whether iptables leads what kernels ask of 169.254.169.254 to the metadata service.
    pub metadata_redirect: bool,
    /// Container rows in the shared region.
    pub max_containers: u32,
    /// How long a create waits for the dataplane to serve its ports.
    pub dataplane_wait: Duration,
    /// How long the folders of a kernel may take to be looked at before its creation is given up.
    pub folder_wait: Duration,
    /// Limits on the block devices for each container.
    pub device_limits: Vec<DeviceLimit>,
    /// `[node.engine]`.
    pub engine: Engine,
    /// `[node.dataplane]`.
    pub dataplane: DataplaneLimits,
    /// `[node.rpc]`.
    pub rpc: RpcLimits,
    /// `[node.volumes]`.
    pub volumes: Volumes,
    /// `[node.accelerators]`.
    pub accelerators: Accelerators,
    /// `[node.watcher]`.
    pub watcher: WatcherLimits,
    /// `[node.storage-proxy]`; none asks no storage proxy.
    pub storage_proxy: Option<StorageProxy>,
}

impl Node {
    /// The directory of one agent's shared regions: a sub-directory for each writer is in it.
    pub fn region_directory(&self, agent_id: &str) -> PathBuf {
        self.run_dir.join(agent_id)
    }
}

/// One entry of `[[node.device-limits]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLimit {
    /// Block device, such as `/dev/sda`.
    pub device: PathBuf,
    /// Bytes read per second.
    pub read_bps: Option<ByteSize>,
    /// Bytes written per second.
    pub write_bps: Option<ByteSize>,
    /// Read operations per second.
    pub read_iops: Option<u64>,
    /// Write operations per second.
    pub write_iops: Option<u64>,
}

/// `[node.engine]`: the container engine and a deadline for each kind of call.
#[derive(Clone, PartialEq, Eq)]
pub struct Engine {
    /// `DOCKER_HOST` form (`unix:///...`, `tcp://...`); none is the engine's default socket.
    pub host: Option<String>,
    /// Connecting.
    pub connect_timeout: Duration,
    /// Calls that only ask or change a little.
    pub request_timeout: Duration,
    /// Creating a container.
    pub create_timeout: Duration,
    /// Starting a container.
    pub start_timeout: Duration,
    /// How long a container may take to stop before it is killed.
    pub stop_grace: Duration,
    /// Removing a container.
    pub remove_timeout: Duration,
}

/// The host may hold a password, as `tcp://user:password@host`: it is hidden.
impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("host", &self.host.as_deref().map(mask_password))
            .field("connect_timeout", &self.connect_timeout)
            .field("request_timeout", &self.request_timeout)
            .field("create_timeout", &self.create_timeout)
            .field("start_timeout", &self.start_timeout)
            .field("stop_grace", &self.stop_grace)
            .field("remove_timeout", &self.remove_timeout)
            .finish()
    }
}

/// `[node.dataplane]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataplaneLimits {
    /// Sessions on one port.
    pub max_sessions_per_port: u32,
    /// Sessions on all ports together.
    pub max_sessions: u32,
    /// New sessions on one port in a second, in the long run; 0 is no limit.
    pub max_new_sessions_per_second: u32,
    /// A session without a byte for this long is closed; zero never.
    pub idle_timeout: Duration,
    /// Connecting to a container.
    pub connect_timeout: Duration,
    /// How long sessions of a removed port may go on; zero cuts them.
    pub drain: Duration,
    /// Period of the statistics samples.
    pub stats_interval: Duration,
    /// Period of the records for the manager.
    pub records_interval: Duration,
}

/// `[node.accelerators]`. What etcd says below `config/plugins/accelerator` wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accelerators {
    /// Devices left out, by id or as `kind:number`.
    pub device_mask: Vec<String>,
    /// How containers get CUDA devices.
    pub cuda_injection: CudaInjection,
    /// What a CUDA device is given out as.
    pub allocation_mode: AllocationMode,
    /// Memory that a share of 1 stands for.
    pub unit_mem: ByteSize,
    /// Multiprocessors that a share of 1 stands for.
    pub unit_proc: u32,
    /// The least share and the step of shares, hundredths.
    pub quantum_percent: u32,
    /// Where `sys`, `proc` and `dev` of the devices are.
    pub device_root: PathBuf,
    /// Devices that are not there, for trying out: the original's `mock-accelerator.toml`.
    pub mock: Option<PathBuf>,
    /// Port of this host where the runtime of TPUs serves its metrics; 0 asks nobody.
    pub tpu_metrics_port: u16,
    /// Where device plugins of Kubernetes look for a kubelet.
    pub plugin_dir: PathBuf,
    /// Resource name of a device plugin to slot name; none switches the host of plugins off.
    pub device_plugins: BTreeMap<String, String>,
}

/// `[node.volumes]`: what may be mounted here on request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volumes {
    /// Rules `TYPE SOURCE`; a source that ends with `*` stands for all that begin so.
    pub allow: BTreeSet<String>,
    /// Tables of file systems that may be changed.
    pub fstab: BTreeSet<String>,
    /// How long mount(8) and umount(8) may take.
    pub timeout: Duration,
}

/// `[node.watcher]`: what the original's `[watcher]` does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatcherLimits {
    /// File with the token; none takes the cluster's.
    pub token_file: Option<PathBuf>,
    /// Whether the token that everybody knows will do on an address that others reach.
    pub insecure_token: bool,
    /// Whether managers may switch the host off.
    pub shutdown: bool,
    /// How long one call of systemctl may take.
    pub timeout: Duration,
}

/// `[node.storage-proxy]`: the manager-facing API of a storage proxy, asked about mounted folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageProxy {
    /// Where it is.
    pub url: ProxyUrl,
    /// The file that holds its secret, which only its owner may read.
    pub secret_file: PathBuf,
    /// PEM file of the authorities to trust; none means those of the system.
    pub ca_file: Option<PathBuf>,
    /// How long one answer may take.
    pub timeout: Duration,
    /// How old an answer becomes before it is asked for again.
    pub interval: Duration,
}

/// `[node.rpc]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RpcLimits {
    /// Largest message accepted.
    pub max_message: ByteSize,
    /// Requests in flight, 4 for each of `max_containers` by default; more are refused with words, but for a
    /// few of the command line.
    pub max_in_flight: u32,
}
