//! The control process of a Backend.AI worker node: it answers the manager's RPC, owns the life
//! of kernels on Docker, and tells the dataplane through shared memory what to forward and count.
//!
//! `app` is the only module that knows all the others.
#![forbid(unsafe_code)]

pub mod accelerator;
pub mod app;
pub mod background;
pub mod blocking;
pub mod cli;
pub mod cluster;
pub mod docker;
pub mod etcd;
pub mod events;
pub mod files;
pub mod firewall;
pub mod heartbeat;
pub mod http;
pub mod image;
pub mod json_text;
pub mod kernel;
pub mod link;
pub mod metadata;
pub mod metrics;
pub mod network;
pub mod pid_file;
pub mod ports;
pub mod resource;
pub mod rpc;
pub mod runner;
pub mod stats;
pub mod storage_proxy;
pub mod volumes;
pub mod watcher;

pub use shared::causes;

#[cfg(test)]
#[path = "../../tests/src/skip.rs"]
mod skip;
