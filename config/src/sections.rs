//! The configuration itself: plain, immutable data in the sections of the original's file.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::choice::{
    AffinityPolicy, Backend, DiscoveryType, LogDriver, LogFormat, LogLevel, SandboxType,
    ScalingGroupType, ScratchType, StatsType,
};
use crate::node::Node;
use crate::units::{ByteSize, HostPort, PortRange, Secret};

/// Everything the node agent is told. Paths are absolute; nothing has been created.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The file it was read from; none in standalone mode without one.
    pub file: Option<PathBuf>,
    /// Whether the node runs without etcd, bus and manager.
    pub standalone: bool,
    /// `[agent]`.
    pub agent: Agent,
    /// `[container]`.
    pub container: Container,
    /// `[resource]`.
    pub resource: Resource,
    /// `[etcd]`; none in standalone mode.
    pub etcd: Option<Etcd>,
    /// `[debug]`.
    pub debug: Debug,
    /// `[logging]`.
    pub logging: Logging,
    /// `service-discovery.type`.
    pub service_discovery: DiscoveryType,
    /// `[watcher]`.
    pub watcher: Watcher,
    /// `[container-logs]`.
    pub container_logs: ContainerLogs,
    /// `[api]`.
    pub api: Api,
    /// `[kernel-lifecycles]`.
    pub kernel_lifecycles: KernelLifecycles,
    /// Factors from the environment.
    pub overcommit: Overcommit,
    /// `[node]`: what the original does not have.
    pub node: Node,
}

/// `[agent]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Agent {
    /// Container backend; always Docker here.
    pub mode: Backend,
    /// Where the RPC server binds; the host is never blank.
    pub rpc_listen_addr: HostPort,
    /// The RPC address announced to the manager: never blank, never `0.0.0.0` or `::`.
    pub advertised_rpc_addr: HostPort,
    /// HTTP server of `/metrics` and `/health`; the host is never blank.
    pub service_addr: HostPort,
    /// HTTP address published in service discovery; the host is never blank.
    pub announce_addr: HostPort,
    /// CURVE key files; none means NULL authentication.
    pub rpc_auth: Option<CurveFiles>,
    /// Agent id, at most 64 characters, safe as a file name.
    pub id: String,
    /// Region announced to the manager.
    pub region: String,
    /// Resource group.
    pub scaling_group: String,
    /// Kind of resource group.
    pub scaling_group_type: ScalingGroupType,
    /// Heartbeat `public_host`.
    pub public_host: String,
    /// Port of the original's relay for in-container helpers; not used, they have a socket file.
    pub agent_sock_port: u16,
    /// Metadata server for containers.
    pub metadata_server: HostPort,
    /// Sockets.
    pub ipc_base_path: PathBuf,
    /// State.
    pub var_base_path: PathBuf,
    /// Base of folder mounts made on volume events.
    pub mount_path: Option<PathBuf>,
    /// Whether a storage proxy on the same host does the mounts.
    pub cohabiting_storage_proxy: bool,
    /// Where the process id is written; `/dev/null` for nowhere.
    pub pid_file: PathBuf,
    /// Whether to start without waiting for a manager in etcd.
    pub skip_manager_detection: bool,
    /// Compute plugins to use; none means all.
    pub allow_compute_plugins: Option<BTreeSet<String>>,
    /// Compute plugins to leave out.
    pub block_compute_plugins: Option<BTreeSet<String>>,
    /// Output of image commits.
    pub image_commit_path: PathBuf,
    /// Where the node's watchdogs leave reports of abusing kernels.
    pub abuse_report_path: Option<PathBuf>,
    /// Whether reported kernels are ended.
    pub force_terminate_abusing_containers: bool,
    /// Parallel creations inside one `create_kernels` call, 1 to 32.
    pub kernel_creation_concurrency: u32,
    /// Reconciliation with the container engine.
    pub sync_container_lifecycles: SyncContainerLifecycles,
}

/// CURVE key files of the RPC server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CurveFiles {
    /// ZeroMQ certificate with the agent's secret key.
    pub agent_keypair: PathBuf,
    /// ZeroMQ certificate with the manager's public key.
    pub manager_public_key: PathBuf,
}

/// `agent.sync-container-lifecycles`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SyncContainerLifecycles {
    /// Whether it runs.
    pub enabled: bool,
    /// Its period.
    pub interval: Duration,
}

/// `[container]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Container {
    /// Owner of the kernel process and its scratch.
    pub kernel_uid: u32,
    /// Group of the same.
    pub kernel_gid: u32,
    /// Address on which container ports are published.
    pub bind_host: IpAddr,
    /// Address told to the manager as `kernel_host`: never blank or unspecified.
    pub advertised_host: String,
    /// Host ports.
    pub port_range: PortRange,
    /// Statistics source of the original; accepted, the dataplane always reads the kernel's counters.
    pub stats_type: Option<StatsType>,
    /// Sandbox.
    pub sandbox_type: SandboxType,
    /// Arguments of the jail.
    pub jail_args: Vec<String>,
    /// Kind of scratch space.
    pub scratch_type: ScratchType,
    /// Where scratch directories are.
    pub scratch_root: PathBuf,
    /// Size of the loop file of `hostfile`.
    pub scratch_size: ByteSize,
    /// Docker network used instead of the default bridge.
    pub alternative_bridge: Option<String>,
}

/// `[resource]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Cores subtracted from the announced slots.
    pub reserved_cpu: u32,
    /// Memory subtracted from the announced slots, then aligned.
    pub reserved_mem: ByteSize,
    /// Alignment of announced memory; never zero.
    pub memory_align_size: ByteSize,
    /// Order in which devices are allocated.
    pub allocation_order: Vec<String>,
    /// How devices spread over NUMA nodes.
    pub affinity_policy: AffinityPolicy,
}

/// `[etcd]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Etcd {
    /// Prefix of all keys.
    pub namespace: String,
    /// Endpoints, at least one.
    pub addr: Vec<HostPort>,
    /// User and password, only when both are given and not empty.
    pub credentials: Option<(String, Secret)>,
    /// Encryption; none is plain HTTP, all that the original knows.
    pub tls: Option<EtcdTls>,
}

/// Encryption towards etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdTls {
    /// PEM file of the authorities to trust; none means those of the system.
    pub ca_file: Option<PathBuf>,
    /// PEM files of our own certificate and key, for servers that ask for one.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name the server's certificate is checked against, when it is not the endpoint's host.
    pub server_name: Option<String>,
}

/// `[debug]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Debug {
    /// Heartbeat period.
    pub heartbeat_interval: Duration,
    /// Whether dead containers are kept.
    pub skip_container_deletion: bool,
    /// Whether the in-container runner gets `--debug`.
    pub kernel_runner: bool,
    /// Core dumps of kernels, when enabled.
    pub coredump: Option<Coredump>,
}

/// `[debug.coredump]` when enabled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coredump {
    /// Where dumps go.
    pub path: PathBuf,
    /// Directory of the host's core pattern, the mount target in the container.
    pub core_path: PathBuf,
    /// Dumps kept; not used.
    pub backup_count: u32,
    /// Largest dump; not used.
    pub size_limit: ByteSize,
}

/// `[logging]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Logging {
    /// Lowest level that is logged.
    pub level: LogLevel,
    /// Where the original's log lines go; not used, ours go to standard error.
    pub drivers: Vec<LogDriver>,
    /// Levels per logger name of the original; not used.
    pub pkg_ns: BTreeMap<String, LogLevel>,
    /// Colours on the console; none means when it is a terminal.
    pub console_colored: Option<bool>,
    /// Format on the console.
    pub console_format: LogFormat,
    /// Log file, when the `file` driver is on; not used.
    pub file: Option<LogFile>,
}

/// `[logging.file]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFile {
    /// Directory.
    pub path: PathBuf,
    /// Name in it.
    pub filename: String,
    /// Rotated files kept.
    pub backup_count: u32,
    /// Size at which the file is rotated.
    pub rotation_size: ByteSize,
    /// Format.
    pub format: LogFormat,
}

/// `[watcher]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Watcher {
    /// Its HTTP address.
    pub service_addr: HostPort,
    /// The systemd unit it controls.
    pub target_service: String,
    /// Whether a soft reset may be asked for.
    pub soft_reset_available: bool,
}

/// `[container-logs]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContainerLogs {
    /// Longest log kept.
    pub max_length: ByteSize,
    /// Size of the pieces it is sent in.
    pub chunk_size: ByteSize,
}

/// `[api]`: deadlines of image operations; none means no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Api {
    /// Image pull.
    pub pull_timeout: Option<Duration>,
    /// Image commit.
    pub commit_timeout: Option<Duration>,
    /// Image push.
    pub push_timeout: Option<Duration>,
}

/// `[kernel-lifecycles]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelLifecycles {
    /// Attempts to find a kernel ready.
    pub init_polling_attempt: u32,
    /// After this long no further attempt is begun.
    pub init_polling_timeout: Duration,
    /// Deadline of one attempt: a runner that starts slowly (its bootstrap script runs first) has at least
    /// this long, whatever `init_polling_timeout` is.
    pub init_timeout: Duration,
}

/// Factors on what the node announces, from the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overcommit {
    /// On cores, 1 to 10.
    pub cpu: u32,
    /// On memory, at least 1.
    pub mem: u32,
}
