//! Harness of the integration suites: what they need made, started and observed.
#![forbid(unsafe_code)]

pub mod cdi_engine;
pub mod cgroup;
pub mod dataplane;
pub mod device_plugin;
pub mod device_tree;
pub mod etcd;
pub mod fake_runner;
pub mod fault_docker;
pub mod gpu_truth;
pub mod host_ports;
pub mod images;
pub mod interface_lock;
pub mod kernel_path;
pub mod kernels;
pub mod netns;
pub mod node;
pub mod nvidia_nodes;
pub mod nvidia_smi;
pub mod nvml;
pub mod own_engine;
pub mod place;
pub mod process_files;
pub mod python;
pub mod redis;
pub mod regions;
pub mod registry;
pub mod relay;
pub mod remote_client;
pub mod rpc_service;
pub mod runner_packages;
pub mod scrape;
pub mod skip;
pub mod traffic;
pub mod wait;
pub mod zmtp;
