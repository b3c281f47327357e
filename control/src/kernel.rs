//! Kernels: their life, their files, their runner.
//!
//! `lifecycle` decides, `registry` holds who is where, `journal` remembers it over a restart;
//! `create`, `destroy`, `restart` and `recovery` do the work on Docker and on disk, `monitor` keeps
//! comparing what should be with what is. `Node` is what they all work with.

pub mod abuse;
pub mod agent_socket;
pub mod batch;
pub mod batch_job;
pub mod callers;
pub mod commit;
pub mod container_processes;
pub mod container_request;
pub mod create;
pub mod death;
pub mod destroy;
pub mod distro;
pub mod environment;
pub mod execution;
pub mod file_access;
pub mod guarded_io;
pub mod host_sockets;
pub mod journal;
pub mod kept_logs;
pub mod lifecycle;
pub mod memory_nodes;
pub mod model_definition;
pub mod monitor;
pub mod mounts;
pub mod node;
pub mod record;
pub mod recovery;
pub mod registry;
pub mod request;
pub mod resource_text;
pub mod restart;
pub mod rows;
pub mod runner_link;
pub mod scratch;
pub mod service_ports;
pub mod services;
pub mod zmtp;

pub use node::Node;
