//! A record for a container whose journal is lost, or that another agent made: from its labels, its
//! inspection and its scratch.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::json;
use shared::ids::{ContainerId, KernelId};
use thiserror::Error;
use uuid::Uuid;

use super::ListedContainer;
use crate::causes::chain;
use crate::docker::{ContainerInspectResponse, DockerError};
use crate::kernel::container_request::{
    HOST_PORTS_LABEL, SESSION_TYPE_LABEL, SLOTS_LABEL, parse_host_ports,
};
use crate::kernel::journal::Phase;
use crate::kernel::node::Node;
use crate::kernel::record::{PublishedBy, Record};
use crate::kernel::request::{ClusterInfo, KernelCreationConfig, SessionType};
use crate::kernel::resource_text::{self, Allocations, ResourceSpec};
use crate::kernel::runner_link::runs::RunIds;
use crate::kernel::service_ports::{
    self, Exposure, REPL_IN, REPL_OUT, ServicePort, ServiceProtocol,
};
use crate::network;
use crate::resource::Allocation;
use crate::rpc::{from_value, pickle};

/// Labels of a kernel's container.
pub const LABEL_SESSION: &str = "ai.backend.session-id";
const LABEL_SERVICES: &str = "ai.backend.service-ports";
const LABEL_BLOCKED: &str = "ai.backend.internal.block-service-ports";

/// Where a kernel's config directory is mounted.
const CONFIG: &str = "/home/config";

/// Why a record could not be rebuilt.
#[derive(Debug, Error)]
pub enum RebuildError {
    /// Docker could not be asked.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// The container does not tell its session.
    #[error("the container has no valid label {LABEL_SESSION}")]
    NoSession,
}

/// Rebuilds the record of one kernel.
///
/// # Errors
/// It has no valid label of a session, or the engine cannot be asked.
pub async fn record(
    node: &Node,
    id: KernelId,
    container: ContainerId,
    listed: &ListedContainer,
) -> Result<Record, RebuildError> {
    let labels = &listed.labels;
    let session_id: Uuid = labels
        .get(LABEL_SESSION)
        .and_then(|text| text.parse().ok())
        .ok_or(RebuildError::NoSession)?;
    let found = node.docker.inspect(&container.to_string()).await?;
    let kernel_id = Uuid::from_bytes(id.0);
    let resource = given(node, kernel_id, &found).await;
    let allocation = resource
        .as_ref()
        .and_then(|spec| allocation_of(kernel_id, spec, &found));
    let image = found
        .config
        .as_ref()
        .and_then(|config| config.image.clone())
        .unwrap_or_default();
    let (services, repl_ports, published_by) = services_of(labels, &found);
    let (request, cluster) = asked_of_the_original(node, kernel_id).await.unzip();
    // Such a job was sent when the session began.
    let batch_running = request.as_ref().is_some_and(|request| {
        request.session_type == SessionType::Batch
            && request.is_main()
            && request.startup_command.is_some()
    });
    let hostname = found
        .config
        .as_ref()
        .and_then(|config| config.hostname.clone());
    let mounts = resource
        .as_ref()
        .map(|spec| spec.mounts.clone())
        .unwrap_or_default();
    let of_resource = || {
        let slots = resource.as_ref()?.slots.iter();
        Some(
            slots
                .map(|(name, amount)| (name.to_owned(), json!(amount)))
                .collect(),
        )
    };
    let of_label = || serde_json::from_str(labels.get(SLOTS_LABEL)?).ok();
    let slots = of_label().or_else(of_resource).unwrap_or_default();
    let session_type = labels
        .get(SESSION_TYPE_LABEL)
        .and_then(|text| serde_json::from_value(json!(text)).ok())
        .or(request.as_ref().map(|request| request.session_type))
        .unwrap_or(SessionType::Interactive);
    Ok(Record {
        kernel_id,
        session_id,
        phase: Phase::Running,
        ending: None,
        created_at: listed.created_at,
        request,
        cluster,
        image,
        session_type,
        hostname: hostname.unwrap_or_default(),
        container_name: found
            .name
            .clone()
            .unwrap_or_default()
            .trim_start_matches('/')
            .to_owned(),
        container_id: Some(container.to_string()),
        slots,
        allocation,
        services,
        ports_ahead: Vec::new(),
        published_by,
        repl_ports,
        block_service_ports: labels.get(LABEL_BLOCKED).is_some_and(|value| value == "1"),
        network: network_of(&found),
        distro: None,
        mounts,
        models: Vec::new(),
        models_pending: false,
        runner_version: None,
        result: None,
        environ: None,
        batch_running,
        batch_job: None,
        condemned: false,
        pausing: false,
        runs_owed: 0,
        run_ids: RunIds::default(),
        service_owed: false,
        memory_pinned: None,
    })
}

/// What the files of a kernel say that it was given. They may lie elsewhere: a relative `scratch-root` is another
/// directory for each that an agent is started in. Where, the container tells.
async fn given(
    node: &Node,
    kernel_id: Uuid,
    found: &ContainerInspectResponse,
) -> Option<ResourceSpec> {
    const FILE: &str = "resource.txt";
    let own = node.scratch.paths(kernel_id).config;
    let mut read = node.scratch.read_config(kernel_id, FILE).await;
    if let Ok(None) = read
        && let Some(place) = config_of(found).filter(|place| *place != own)
    {
        read = node
            .scratch
            .read_config_of(kernel_id, place.clone(), FILE)
            .await;
        if let Ok(Some(_)) = read {
            tracing::error!(%kernel_id, place = %place.display(), own = %own.display(),
                "a kernel's scratch lies outside container.scratch-root: the kernel can't be restarted, and its directory stays when it ends; write the whole path of scratch-root before agents take kernels over");
        }
    }
    let why = match read {
        Ok(Some(text)) => match resource_text::parse(&text, |slot| node.ledger.is_bytes(slot)) {
            Ok(resource) => return Some(resource.spec),
            Err(err) => chain(&err),
        },
        // What has ended holds no device, and its scratch may be gone already.
        Ok(None) if !is_running(found) => return None,
        Ok(None) => format!("there is none in {}", own.display()),
        Err(err) => chain(&err),
    };
    tracing::error!(%kernel_id, err = why,
        "cannot read what a kernel was given (resource.txt of its scratch); its devices count as free: end the kernel before others get them");
    None
}

/// Where the directory lies that a container has as its `/home/config`.
fn config_of(found: &ContainerInspectResponse) -> Option<PathBuf> {
    let mut mounts = found.mounts.iter().flatten();
    let config = mounts.find(|mount| mount.destination.as_deref() == Some(CONFIG))?;
    let source = PathBuf::from(config.source.as_deref()?);
    source.is_absolute().then_some(source)
}

fn is_running(found: &ContainerInspectResponse) -> bool {
    let state = found.state.as_ref();
    state.and_then(|state| state.running).unwrap_or(false)
}

fn allocation_of(
    kernel_id: Uuid,
    spec: &ResourceSpec,
    found: &ContainerInspectResponse,
) -> Option<Allocation> {
    let mut allocations = spec.allocations.clone();
    // The text form of a size is lossy; the container's own limit is not.
    let memory = found.host_config.as_ref().and_then(|host| host.memory);
    if let Some(bytes) = memory.filter(|bytes| *bytes > 0) {
        replace_memory(&mut allocations, bytes);
    }
    let allocation = Allocation::from_text(&allocations);
    let told = allocation.inspect_err(|err| {
        tracing::error!(%kernel_id, err = err as &dyn std::error::Error,
            "what a kernel was given makes no sense (resource.txt of its scratch); its devices count as free: end the kernel before others get them");
    });
    told.ok()
}

/// The network's mode and name; nothing for the engine's own bridge.
fn network_of(found: &ContainerInspectResponse) -> Option<(String, String)> {
    let mode = found.host_config.as_ref()?.network_mode.as_deref()?;
    match mode {
        "" | "default" | "bridge" => None,
        "host" => Some(("host".into(), String::new())),
        name => Some(("bridge".into(), name.to_owned())),
    }
}

/// What the Python agent was asked for, which it keeps beside its kernel's other files.
async fn asked_of_the_original(
    node: &Node,
    kernel_id: Uuid,
) -> Option<(KernelCreationConfig, ClusterInfo)> {
    let read = async |name| {
        let limit = pickle::MAX_FILE_BYTES as u64;
        let read = node.scratch.read_own_config(kernel_id, name, limit).await;
        read.unwrap_or_else(|err| {
            tracing::warn!(%kernel_id, err = &err as &dyn std::error::Error, "cannot read what a kernel was made from; it can't be restarted");
            None
        })
    };
    let (config, cluster) = (read("kconfig.dat").await?, read("cluster.json").await?);
    let asked = pickle::read_file(&config)
        .map_err(|err| err.to_string())
        .and_then(|config| {
            from_value::<KernelCreationConfig>(config).map_err(|err| err.to_string())
        })
        .and_then(|config| {
            let cluster = serde_json::from_slice(&cluster).map_err(|err| err.to_string())?;
            Ok((config, cluster))
        });
    match asked {
        Ok(asked) if asked.0.kernel_id == kernel_id => Some(asked),
        Ok(_) => {
            tracing::warn!(%kernel_id, "the scratch holds what another kernel was made from; it can't be restarted");
            None
        }
        Err(err) => {
            tracing::warn!(%kernel_id, err, "what a kernel was made from is not understood; it can't be restarted");
            None
        }
    }
}

fn replace_memory(allocations: &mut Allocations, bytes: i64) {
    for device in allocations
        .0
        .iter_mut()
        .filter(|device| device.device == "mem")
    {
        for slot in device.slots.iter_mut().filter(|slot| slot.slot == "mem") {
            for (_, amount) in &mut slot.amounts {
                *amount = bytes.to_string();
            }
        }
    }
}

/// The services the labels name, with the host ports that the engine or our own label tells, and
/// those of the runner.
fn services_of(
    labels: &HashMap<String, String>,
    found: &ContainerInspectResponse,
) -> (Vec<ServicePort>, Option<(u16, u16)>, PublishedBy) {
    let engine = engine_ports(found);
    let own = labels
        .get(HOST_PORTS_LABEL)
        .map(|label| parse_host_ports(label))
        .unwrap_or_default();
    let published_by = if network::is_host_network(found) {
        PublishedBy::Host
    } else if engine.is_empty() {
        PublishedBy::Rows
    } else {
        PublishedBy::Engine
    };
    let mut host_ports = if engine.is_empty() { own } else { engine };
    let repl_ports = host_ports
        .remove(&REPL_IN)
        .zip(host_ports.remove(&REPL_OUT));
    let exposure = Exposure {
        label: labels.get(LABEL_SERVICES).map_or("", String::as_str),
        is_main: true,
        ..Exposure::default()
    };
    let services = service_ports::arrange(&exposure).unwrap_or_else(|err| {
        tracing::warn!(
            err = &err as &dyn std::error::Error,
            "the service ports of a container cannot be read"
        );
        service_ports::arrange(&Exposure::default()).unwrap_or_default()
    });
    // Ports that no label names as a service (hidden ones, those of models) are held all the same.
    let mut hidden: Vec<u16> = host_ports.keys().copied().collect();
    hidden.retain(|port| {
        !services
            .iter()
            .any(|service| service.container_ports.contains(port))
    });
    hidden.sort_unstable();
    let hidden = hidden.into_iter().map(|port| {
        let name = format!("hostport{port}");
        ServicePort::new(name, ServiceProtocol::Internal, vec![port])
    });
    let services = services
        .into_iter()
        .chain(hidden)
        .filter_map(|mut service| {
            service.host_ports = service
                .container_ports
                .iter()
                .map(|port| host_ports.get(port).copied())
                .collect::<Option<Vec<u16>>>()?;
            Some(service)
        })
        .collect();
    (services, repl_ports, published_by)
}

/// Container port to host port, as the engine publishes them; the runner's sockets too.
fn engine_ports(found: &ContainerInspectResponse) -> HashMap<u16, u16> {
    let ports = found
        .network_settings
        .as_ref()
        .and_then(|settings| settings.ports.as_ref());
    ports
        .into_iter()
        .flatten()
        .filter_map(|(key, bindings)| {
            let container: u16 = key.split('/').next()?.parse().ok()?;
            let host: u16 = bindings
                .as_ref()?
                .first()?
                .host_port
                .as_deref()?
                .parse()
                .ok()?;
            Some((container, host))
        })
        .collect()
}
