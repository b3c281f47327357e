//! The request that makes a kernel's container.
//!
//! In: everything decided before: the request, ports, mounts, environment, limits, and what this
//! host has ([`HostFacts`]). Out: the container's name and the engine's create body. Invariants: the
//! builder is a pure function, and a restarted kernel gets the same limits as a new one, because both
//! come through here.
//!
//! Differences from the original, all on purpose: no port bindings unless the engine publishes;
//! host ports, slots and session type are kept in labels; `Cpus` is not sent (the engine does not
//! know it); the jail comes without the other seccomp profile; the tasks of a container are bounded.

mod host_facts;
mod merge;

pub use host_facts::{HostFacts, HostFactsError, override_files, override_part, seccomp_profile};

use super::mounts::{Mount, MountKind, WORK};
use super::request::{ClusterInfo, KernelCreationConfig, TextMap};
use super::resource_text::scaled;
use super::service_ports::{
    REPL_IN, REPL_OUT, ServicePort, TTYD, container_label, container_ports,
};
use crate::resource::ContainerLimits;
use bollard::models::{
    ContainerCreateBody, DeviceMapping, EndpointSettings, HostConfig, HostConfigLogConfig,
    Mount as EngineMount, MountBindOptions, MountType, MountVolumeOptions, NetworkingConfig,
    PortBinding, PortMap, ResourcesUlimits, ThrottleDevice,
};
use config::{Config, DeviceLimit, SandboxType, ScalingGroupType};
use std::collections::HashMap;
use std::net::IpAddr;
use thiserror::Error;

/// Label with `<container port>:<host port>` pairs, comma-separated, for an agent whose journal is
/// lost.
pub const HOST_PORTS_LABEL: &str = "ai.backend.host-ports";
/// Label with the host paths of folders that the engine was given another path for, as a JSON list.
pub const HELD_FOLDERS_LABEL: &str = "ai.backend.held-folders";
/// Label with the kernel's slots as a JSON map of texts.
pub const SLOTS_LABEL: &str = "ai.backend.slots";
/// Label with the session type (`interactive`, `batch`, ...).
pub const SESSION_TYPE_LABEL: &str = "ai.backend.session-type";

/// What of the node's configuration a container depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerSettings {
    pub agent_id: String,
    /// Address the engine publishes service ports on.
    pub bind_host: IpAddr,
    /// The web terminal is published on the loopback address only (storage nodes).
    pub local_terminal: bool,
    /// Arguments of the jail, if it wraps the runner.
    pub jail: Option<Vec<String>>,
    /// The runner gets `--debug`.
    pub debug_runner: bool,
    /// Longest console log kept by the engine, in bytes.
    pub log_length: u64,
    /// Network instead of the one the session asks for.
    pub alternative_bridge: Option<String>,
    pub device_limits: Vec<DeviceLimit>,
}

impl ContainerSettings {
    /// Takes them from the configuration.
    pub fn of(config: &Config) -> Self {
        Self {
            agent_id: config.agent.id.clone(),
            bind_host: config.container.bind_host,
            local_terminal: config.agent.scaling_group_type == ScalingGroupType::Storage,
            jail: (config.container.sandbox_type == SandboxType::Jail)
                .then(|| config.container.jail_args.clone()),
            debug_runner: config.debug.kernel_runner,
            log_length: config.container_logs.max_length.0,
            alternative_bridge: config.container.alternative_bridge.clone(),
            device_limits: config.node.device_limits.clone(),
        }
    }
}

/// Limits that follow from the allocation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// Core ids in numeric order, joined by commas.
    pub cpuset_cpus: Option<String>,
    /// NUMA nodes of the memory.
    pub cpuset_mems: Option<String>,
    /// Bytes.
    pub memory: Option<i64>,
    /// Bytes of memory and swap together; the same as `memory` means no swap.
    pub memory_swap: Option<i64>,
    /// CPU time in billionths of a core, only when the node gives quotas.
    pub nano_cpus: Option<i64>,
}

impl From<&ContainerLimits> for Limits {
    fn from(limits: &ContainerLimits) -> Self {
        Self {
            cpuset_cpus: limits.cpuset_cpus.clone(),
            cpuset_mems: limits.cpuset_mems.clone(),
            memory: limits.memory,
            memory_swap: limits.memory_swap,
            nano_cpus: limits.nano_cpus,
        }
    }
}

/// Everything the body is made of.
#[derive(Debug, Clone, Copy)]
pub struct ContainerInputs<'a> {
    pub settings: &'a ContainerSettings,
    pub host: &'a HostFacts,
    /// The runner's seccomp profile; the engine's own applies without one.
    pub seccomp: Option<&'a serde_json::Value>,
    pub request: &'a KernelCreationConfig,
    pub cluster: &'a ClusterInfo,
    /// Services with their host ports.
    pub services: &'a [ServicePort],
    /// Host ports of the runner, where it has some: with engine publishing, or on the host's
    /// network.
    pub repl_ports: Option<(u16, u16)>,
    /// The engine publishes the ports, not the dataplane.
    pub engine_ports: bool,
    pub environ: &'a TextMap,
    pub mounts: &'a [Mount],
    pub limits: &'a Limits,
    /// Bytes of `/dev/shm`.
    pub shared_memory: Option<u64>,
    /// Raw parts of the body from accelerators (`Env`, `HostConfig.DeviceRequests`, ...).
    pub device_arguments: &'a [serde_json::Value],
    /// System calls that accelerators need beyond the profile.
    pub device_syscalls: &'a [String],
}

/// What to send.
#[derive(Debug, Clone)]
pub struct ContainerRequest {
    /// `kernel.<image>.<kernel id>`.
    pub name: String,
    pub body: ContainerCreateBody,
    /// Keys of the operator's file or of accelerators that the engine's API does not know.
    pub unknown: Vec<String>,
}

/// Why there is no body.
#[derive(Debug, Error)]
pub enum ContainerRequestError {
    #[error("a service lacks a host port: {0}")]
    NoHostPort(String),
    #[error("{source_name} does not fit a container request; correct it")]
    Override {
        source_name: String,
        #[source]
        cause: serde_json::Error,
    },
    #[error("resource_opts.shmem is {0} bytes, more than the engine takes; ask for less")]
    SharedMemory(u64),
    #[error("a tmpfs at {0} is not supported")]
    MountKind(String),
}

/// The name of a kernel's container.
pub fn container_name(request: &KernelCreationConfig) -> String {
    format!(
        "kernel.{}.{}",
        request.image.short_name(),
        request.kernel_id
    )
}

/// Builds the request.
///
/// # Errors
/// A service without host ports where the engine should publish them, or an operator's file that
/// gives a known key a value of the wrong kind.
pub fn build(inputs: &ContainerInputs<'_>) -> Result<ContainerRequest, ContainerRequestError> {
    let ContainerInputs {
        settings, request, ..
    } = inputs;
    let host_network =
        inputs.cluster.network_mode() == Some("host") && settings.alternative_bridge.is_none();
    let mut body = ContainerCreateBody {
        image: Some(request.image.docker_name().to_owned()),
        tty: Some(true),
        open_stdin: Some(true),
        stop_signal: Some("SIGINT".to_owned()),
        exposed_ports: Some(
            container_ports(inputs.services)
                .iter()
                .map(|port| format!("{port}/tcp"))
                .collect(),
        ),
        entrypoint: Some(vec!["/opt/kernel/entrypoint.sh".to_owned()]),
        cmd: Some(command(settings, request)),
        working_dir: Some(WORK.to_owned()),
        hostname: Some(request.hostname().to_owned()),
        env: Some(super::environment::env_list(inputs.environ, &[])),
        labels: Some(labels(inputs)),
        ..ContainerCreateBody::default()
    };
    let mut host = host_config(inputs)?;
    if inputs.engine_ports && !host_network {
        host.port_bindings = Some(port_bindings(inputs)?);
    }
    network(inputs, &mut body, &mut host);
    body.host_config = Some(host);

    let mut unknown = Vec::new();
    for part in inputs.device_arguments {
        body = merge::into_body(
            body,
            part,
            "an accelerator's container argument",
            &mut unknown,
        )?;
    }
    for (path, part) in &inputs.host.overrides {
        body = merge::into_body(body, part, &path.display().to_string(), &mut unknown)?;
    }
    Ok(ContainerRequest {
        name: container_name(request),
        body,
        unknown,
    })
}

fn command(settings: &ContainerSettings, request: &KernelCreationConfig) -> Vec<String> {
    let mut command = Vec::new();
    if let Some(arguments) = &settings.jail {
        command.push("/opt/kernel/jail".to_owned());
        command.extend(arguments.iter().cloned());
        command.push("--".to_owned());
    }
    command.extend(
        [
            "/opt/backend.ai/bin/python",
            "-s",
            "-m",
            "ai.backend.kernel",
        ]
        .map(str::to_owned),
    );
    if settings.debug_runner {
        command.push("--debug".to_owned());
    }
    command.push(
        request
            .image
            .label_or("ai.backend.runtime-type", "app")
            .to_owned(),
    );
    if let Some(path) = request.image.labels.get("ai.backend.runtime-path") {
        command.push(path.to_owned());
    }
    command
}

fn labels(inputs: &ContainerInputs<'_>) -> HashMap<String, String> {
    let request = inputs.request;
    // The original sends null for a missing owner, which the engine keeps as empty text.
    let or_empty = |text: &Option<String>| text.clone().unwrap_or_default();
    let image_ports = request.image.label_or("ai.backend.service-ports", "");
    let blocked = if request.internal_data.block_service_ports {
        "1"
    } else {
        "0"
    };
    let repl = inputs
        .repl_ports
        .map(|(port_in, port_out)| [(REPL_IN, port_in), (REPL_OUT, port_out)]);
    let services = inputs.services.iter().flat_map(|service| {
        service
            .container_ports
            .iter()
            .copied()
            .zip(service.host_ports.iter().copied())
    });
    let host_ports: Vec<String> = repl
        .into_iter()
        .flatten()
        .chain(services)
        .map(|(container, host)| format!("{container}:{host}"))
        .collect();
    let slots = serde_json::to_string(&request.resource_slots).expect("a map of texts is JSON");
    let entries = [
        ("ai.backend.kernel-id", request.kernel_id.to_string()),
        ("ai.backend.session-id", request.session_id.to_string()),
        ("ai.backend.owner", inputs.settings.agent_id.clone()),
        ("ai.backend.owner-user-id", or_empty(&request.owner_user_id)),
        (
            "ai.backend.owner-project-id",
            or_empty(&request.owner_project_id),
        ),
        (
            "ai.backend.internal.block-service-ports",
            blocked.to_owned(),
        ),
        (
            "ai.backend.service-ports",
            container_label(image_ports, &request.preopen_ports),
        ),
        (HOST_PORTS_LABEL, host_ports.join(",")),
        (SLOTS_LABEL, slots),
        (SESSION_TYPE_LABEL, request.session_type.as_str().to_owned()),
    ];
    entries
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn host_config(inputs: &ContainerInputs<'_>) -> Result<HostConfig, ContainerRequestError> {
    let ContainerInputs {
        settings,
        host,
        limits,
        ..
    } = inputs;
    let jail = settings.jail.is_some();
    let mut capabilities = vec!["IPC_LOCK".to_owned(), "SYS_NICE".to_owned()];
    let security = if jail {
        capabilities.push("SYS_PTRACE".to_owned());
        Some(vec![
            "seccomp=unconfined".to_owned(),
            "apparmor=unconfined".to_owned(),
        ])
    } else {
        inputs.seccomp.map(|profile| {
            let profile = host_facts::permitting(profile, inputs.device_syscalls);
            vec![format!("seccomp={profile}")]
        })
    };
    let shm_size = inputs
        .shared_memory
        .map(|bytes| i64::try_from(bytes).map_err(|_| ContainerRequestError::SharedMemory(bytes)));
    let throttle = |rate: fn(&DeviceLimit) -> Option<u64>| throttle(&settings.device_limits, rate);
    let mounts: Result<Vec<_>, _> = inputs.mounts.iter().map(engine_mount).collect();
    Ok(HostConfig {
        init: Some(true),
        publish_all_ports: Some(false),
        cap_add: Some(capabilities),
        security_opt: security,
        ulimits: Some(host.ulimits()),
        log_config: Some(log_config(settings.log_length)),
        mounts: Some(mounts?),
        devices: host.rdma.then(|| {
            vec![DeviceMapping {
                path_on_host: Some("/dev/infiniband".to_owned()),
                path_in_container: Some("/dev/infiniband".to_owned()),
                cgroup_permissions: Some("rwm".to_owned()),
            }]
        }),
        cpuset_cpus: limits.cpuset_cpus.clone(),
        cpuset_mems: limits.cpuset_mems.clone(),
        memory: limits.memory,
        memory_swap: limits.memory_swap,
        nano_cpus: limits.nano_cpus,
        pids_limit: host
            .tasks
            .map(|tasks| i64::try_from(tasks).unwrap_or(i64::MAX)),
        shm_size: shm_size.transpose()?,
        blkio_device_read_bps: throttle(|limit| limit.read_bps.map(|size| size.0)),
        blkio_device_write_bps: throttle(|limit| limit.write_bps.map(|size| size.0)),
        blkio_device_read_iops: throttle(|limit| limit.read_iops),
        blkio_device_write_iops: throttle(|limit| limit.write_iops),
        ..HostConfig::default()
    })
}

/// Five files of a fifth of the length each, as in the original.
fn log_config(length: u64) -> HostConfigLogConfig {
    let options = [
        // Below a file of a byte the engine refuses to start the container.
        ("max-size", scaled((length / 5).max(1024))),
        ("max-file", "5".to_owned()),
        ("compress", "false".to_owned()),
    ];
    HostConfigLogConfig {
        typ: Some("local".to_owned()),
        config: Some(
            options
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
        ),
    }
}

fn throttle(
    limits: &[DeviceLimit],
    rate: fn(&DeviceLimit) -> Option<u64>,
) -> Option<Vec<ThrottleDevice>> {
    let devices: Vec<_> = limits
        .iter()
        .filter_map(|limit| {
            let rate = i64::try_from(rate(limit)?).unwrap_or(i64::MAX);
            let path = Some(super::mounts::display(&limit.device));
            Some(ThrottleDevice {
                path,
                rate: Some(rate),
            })
        })
        .collect();
    (!devices.is_empty()).then_some(devices)
}

fn engine_mount(mount: &Mount) -> Result<EngineMount, ContainerRequestError> {
    let mut engine = EngineMount {
        target: Some(mount.target.clone()),
        source: Some(mount.source.clone()),
        read_only: Some(mount.is_read_only()),
        ..EngineMount::default()
    };
    match mount.kind {
        MountKind::Bind => {
            engine.typ = Some(MountType::BIND);
            engine.bind_options = Some(MountBindOptions::default());
        }
        MountKind::Volume => {
            engine.typ = Some(MountType::VOLUME);
            engine.volume_options = Some(MountVolumeOptions::default());
        }
        // Only accelerators could ask for one, and none does.
        MountKind::Tmpfs => return Err(ContainerRequestError::MountKind(mount.target.clone())),
    }
    Ok(engine)
}

/// Bindings for the engine: the runner's ports and a storage node's terminal on loopback.
fn port_bindings(inputs: &ContainerInputs<'_>) -> Result<PortMap, ContainerRequestError> {
    let local = IpAddr::from([127, 0, 0, 1]);
    let public = inputs.settings.bind_host;
    let mut wanted: Vec<(u16, u16, IpAddr)> = Vec::new();
    // The runner is reached on the container's address where there are no ports for it.
    if let Some((port_in, port_out)) = inputs.repl_ports {
        wanted.extend([(REPL_IN, port_in, local), (REPL_OUT, port_out, local)]);
    }
    for service in inputs.services {
        if service.host_ports.len() != service.container_ports.len() {
            return Err(ContainerRequestError::NoHostPort(service.name.clone()));
        }
        for (&container, &host) in service.container_ports.iter().zip(&service.host_ports) {
            let near = inputs.settings.local_terminal && container == TTYD;
            wanted.push((container, host, if near { local } else { public }));
        }
    }
    let bindings = wanted.into_iter().map(|(container, host, address)| {
        let binding = PortBinding {
            host_ip: Some(address.to_string()),
            host_port: Some(host.to_string()),
        };
        (format!("{container}/tcp"), Some(vec![binding]))
    });
    Ok(bindings.collect())
}

fn network(inputs: &ContainerInputs<'_>, body: &mut ContainerCreateBody, host: &mut HostConfig) {
    let cluster = inputs.cluster;
    match (cluster.network_mode(), cluster.network_name()) {
        (None, _) => {}
        (Some("host"), _) => {
            host.network_mode = Some("host".to_owned());
            let mapping = cluster.ssh_places(inputs.request.environ.get("BACKENDAI_CLUSTER_HOSTS"));
            let hosts: Vec<String> = mapping
                .iter()
                .flatten()
                .filter_map(|(name, place)| {
                    // The manager cuts it out of a node's address, and may be left with a name or a
                    // part: the engine would refuse the container.
                    let address: IpAddr = place.as_array()?.first()?.as_str()?.parse().ok()?;
                    Some(format!("{name}:{address}"))
                })
                .collect();
            host.extra_hosts = (!hosts.is_empty()).then_some(hosts);
        }
        (Some(_), name) => {
            let name = name.unwrap_or_default().to_owned();
            host.network_mode = Some(name.clone());
            let endpoint = EndpointSettings {
                aliases: Some(vec![inputs.request.hostname().to_owned()]),
                ..EndpointSettings::default()
            };
            let endpoints = HashMap::from([(name, endpoint)]);
            body.networking_config = Some(NetworkingConfig {
                endpoints_config: Some(endpoints),
            });
        }
    }
    if let Some(bridge) = &inputs.settings.alternative_bridge {
        host.network_mode = Some(bridge.clone());
    }
}

/// Reads the host-port label back: host ports by container ports. Entries that are no pair of numbers are
/// passed over.
pub fn parse_host_ports(label: &str) -> HashMap<u16, u16> {
    let pairs = label.split(',').filter_map(|pair| pair.split_once(':'));
    pairs
        .filter_map(|(container, host)| Some((container.parse().ok()?, host.parse().ok()?)))
        .collect()
}

impl HostFacts {
    fn ulimits(&self) -> Vec<ResourcesUlimits> {
        let limit = |name: &str, wanted: Option<u64>, own: Option<u64>| {
            // None is no limit, which the engine writes as -1.
            let value = match (wanted, own) {
                (Some(wanted), Some(own)) => Some(wanted.min(own)),
                (one, other) => one.or(other),
            };
            let value = value.map_or(-1, |value| i64::try_from(value).unwrap_or(i64::MAX));
            ResourcesUlimits {
                name: Some(name.to_owned()),
                soft: Some(value),
                hard: Some(value),
            }
        };
        vec![
            limit("nofile", Some(1 << 20), self.open_files),
            limit("memlock", None, self.locked_memory),
        ]
    }
}

#[cfg(test)]
mod tests;
