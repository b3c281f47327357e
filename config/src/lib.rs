//! Agent configuration: `agent.toml`, environment and defaults, merged and checked.
//!
//! In goes a file in the Python agent's own format (found in its places or named), the
//! environment and facts about the host; out comes one immutable [`Config`] of plain data,
//! where each value came from ([`Effective`]), and notes on what was not used. Loading reads
//! only: directories are made in a separate step, [`Config::prepare_directories`], so a check
//! of a configuration changes nothing. Either everything is valid or all faults are reported
//! together. Secrets are never printed, neither in errors nor in the rendered table.
#![forbid(unsafe_code)]

mod check;
mod choice;
mod directories;
mod document;
mod host;
mod load;
mod node;
mod overlay;
mod plugins;
mod problem;
mod read;
mod render;
mod scaling_group;
mod search;
mod section;
mod sections;
mod setting;
mod spelling;
mod units;

pub use choice::{
    AffinityPolicy, AllocationMode, Backend, CudaInjection, DiscoveryType, Forward, KernelAttach,
    LogDriver, LogFormat, LogLevel, Publish, RelayEngine, RelayFrom, SandboxType, ScalingGroupType,
    ScratchType, StatsType,
};
pub use directories::{DirectoryError, PreparedDirectory};
pub use host::{Host, ThisHost, UserEntry};
pub use load::{Environment, LoadOptions, Loaded, load, load_but_for_names, load_over};
pub use node::{
    Accelerators, DataplaneLimits, DeviceLimit, Engine, Node, RpcLimits, StorageProxy, Volumes,
    WatcherLimits,
};
pub use overlay::{AGENT_SECTIONS, Overlay};
pub use plugins::means_plugin;
pub use problem::{Effective, Errors, Note, NoteKind, Origin, Problem};
pub use render::{render_json, render_notes, render_text};
pub use scaling_group::{RewriteError, update_scaling_group};
pub use search::candidates;
pub use sections::{
    Agent, Api, Config, Container, ContainerLogs, Coredump, CurveFiles, Debug, Etcd, EtcdTls,
    KernelLifecycles, LogFile, Logging, Overcommit, Resource, SyncContainerLifecycles, Watcher,
};
pub use units::{
    ByteSize, Fault, HostPort, PortRange, ProxyUrl, Secret, SecretFileError, Subnet,
    parse_interval, read_secret_file,
};

/// Entry points for the fuzz targets: parse without a host, never panic.
#[doc(hidden)]
pub mod fuzzing {
    /// Reads a document and every section of it against a fixed host; the result is dropped.
    pub fn load_text(text: &str) {
        let _ = crate::load::load_text_for_fuzzing(text);
    }
}
