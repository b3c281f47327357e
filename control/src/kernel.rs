//! Kernels: their life, their files, their runner.

pub mod agent_socket;
pub mod batch;
pub mod container_processes;
pub mod container_request;
pub mod distro;
pub mod environment;
pub mod execution;
pub mod journal;
pub mod kept_logs;
pub mod lifecycle;
pub mod model_definition;
pub mod mounts;
pub mod recovery;
pub mod request;
pub mod resource_text;
pub mod runner_link;
pub mod scratch;
pub mod service_ports;
pub mod services;
pub mod zmtp;
