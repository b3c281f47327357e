//! Kernels: their life, their files, their runner.

pub mod environment;
pub mod mounts;
pub mod request;
pub mod resource_text;
pub mod scratch;
pub mod service_ports;
