//! Kernels: their life, their files, their runner.

pub mod distro;
pub mod environment;
pub mod journal;
pub mod kept_logs;
pub mod lifecycle;
pub mod mounts;
pub mod recovery;
pub mod request;
pub mod resource_text;
pub mod scratch;
pub mod service_ports;
