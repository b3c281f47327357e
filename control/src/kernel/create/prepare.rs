//! The part of a creation that only looks: everything that can be found wrong with a request is
//! found here, before anything is taken or written.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::Value;
use tokio::time::Instant;

use super::error::CreateError;
use crate::docker::ImageRecord;
use crate::image;
use crate::kernel::container_request::{HostFacts, override_part, seccomp_profile};
use crate::kernel::environment::Identity;
use crate::kernel::host_sockets;
use crate::kernel::model_definition::{self, Model, ModelDefinitionError};
use crate::kernel::mounts::{self, Mount};
use crate::kernel::node::Node;
use crate::kernel::record::PublishedBy;
use crate::kernel::request::{ClusterInfo, KernelCreationConfig, SessionType};
use crate::kernel::scratch::validate_dotfiles;
use crate::kernel::service_ports::{self, Exposure, ServicePort, ServiceProtocol};
use crate::resource::Slots;
use crate::runner::RunnerFiles;
use config::{Publish, SandboxType};

/// The network a kernel is put on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkChoice {
    /// The engine's default bridge, or the node's alternative one.
    Default,
    /// A named network, with the kernel's host name as its alias.
    Named(String),
    /// The host's own.
    Host,
}

/// What is known of a kernel before anything is taken for it.
#[derive(Debug)]
pub struct Prepared {
    /// Who runs in it.
    pub identity: Identity,
    /// Its folders.
    pub folders: Vec<Mount>,
    /// Its services, without host ports.
    pub services: Vec<ServicePort>,
    /// Its models (inference).
    pub models: Vec<Model>,
    /// Its slots.
    pub slots: Slots,
    /// Bytes of `/dev/shm`.
    pub shared_memory: Option<u64>,
    /// Its network.
    pub network: NetworkChoice,
    /// Who holds its host ports.
    pub published_by: PublishedBy,
    /// The runner it gets.
    pub runner: RunnerFiles,
    /// The runner's seccomp profile.
    pub seccomp: Option<Value>,
    /// What of this host it gets.
    pub host: HostFacts,
}

/// Checks that need no image.
pub async fn check(
    node: &Node,
    config: &KernelCreationConfig,
    cluster: &ClusterInfo,
) -> Result<Prepared, CreateError> {
    check_architecture(config)?;
    let shared_memory = config.shared_memory().map_err(CreateError::SharedMemory)?;
    let slots = Slots::from_text(config.resource_slots.iter())?;
    let slots = node.ledger.normalise(&slots)?;
    validate_dotfiles(&config.internal_data.dotfiles)?;
    let network = match &node.settings.alternative_bridge {
        // It takes the place of the host's network as of any other.
        Some(_) if cluster.network_mode() == Some("host") => NetworkChoice::Default,
        _ => choose_network(cluster)?,
    };
    let published_by = publisher(node, &network);

    let until = node.guarded_io.until();
    let folders = look_at_folders(node, config, until).await?;
    for socket in &config.internal_data.domain_socket_proxies {
        let (what, wanted) = (format!("the host socket {socket}"), socket.clone());
        let look = move || host_sockets::check(&[wanted]);
        node.guarded_io.at(until, what, socket, look).await??;
    }
    let (runner, seccomp, mut host) = look_at_runner(node, until).await?;
    host.overrides = look_at_overrides(node, until).await?;
    let services = service_ports::arrange(&exposure(config, &[]))?;
    if published_by == PublishedBy::Rows {
        node.link
            .require_dataplane(node.config.node.dataplane_wait)
            .await?;
    }
    Ok(Prepared {
        identity: Identity::of(
            config,
            node.config.container.kernel_uid,
            node.config.container.kernel_gid,
        ),
        folders,
        services,
        models: Vec::new(),
        slots,
        shared_memory,
        network,
        published_by,
        runner,
        seccomp,
        host,
    })
}

/// The mounts of the request's folders, each looked at by itself: the one that hangs is told.
async fn look_at_folders(
    node: &Node,
    config: &KernelCreationConfig,
    until: Instant,
) -> Result<Vec<Mount>, CreateError> {
    let mut found = Vec::new();
    let prevent = config.internal_data.prevent_vfolder_mounts;
    for folder in mounts::allowed(&config.mounts, prevent) {
        let (what, wanted) = (format!("the folder {}", folder.name), folder.clone());
        let look = move || mounts::vfolder(&wanted);
        let mount = node
            .guarded_io
            .at(until, what, &folder.host_path, look)
            .await??;
        mounts::add(&mut found, mount)?;
    }
    Ok(found)
}

/// The installed runner, its seccomp profile, and what this host has.
async fn look_at_runner(
    node: &Node,
    until: Instant,
) -> Result<(RunnerFiles, Option<Value>, HostFacts), CreateError> {
    let dir = node.config.node.runner_dir.clone();
    let runner_dir = dir.clone();
    let look = move || -> Result<_, CreateError> {
        let runner = RunnerFiles::open(&runner_dir, std::env::consts::ARCH).map_err(|source| {
            CreateError::Runner {
                dir: runner_dir.clone(),
                source,
            }
        })?;
        let seccomp = seccomp_profile(&runner.seccomp_profile())?;
        Ok((runner, seccomp, HostFacts::read()))
    };
    let what = "the directory of the in-container runner".to_owned();
    node.guarded_io.at_own(until, what, &dir, look).await?
}

/// The operator's parts of the container's request, with the files they stand in.
async fn look_at_overrides(
    node: &Node,
    until: Instant,
) -> Result<Vec<(PathBuf, Value)>, CreateError> {
    let mut parts = Vec::new();
    for path in &node.override_files {
        let what = "a file with container options".to_owned();
        let file = path.clone();
        let look = move || override_part(&file);
        let part = node.guarded_io.at_own(until, what, path, look).await??;
        parts.extend(part.map(|part| (path.clone(), part)));
    }
    Ok(parts)
}

/// Bytes of labels an image may have. The engine repeats them in every event and every list of
/// containers, whose lengths are bounded: one image must not make the others' unreadable.
const LABELS: usize = 128 << 10;

fn check_labels(canonical: &str, labels: &HashMap<String, String>) -> Result<(), CreateError> {
    let bytes: usize = labels
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    if bytes <= LABELS {
        return Ok(());
    }
    Err(CreateError::Labels {
        image: canonical.chars().take(200).collect(),
        bytes,
    })
}

/// What depends on the image: its labels and models.
pub async fn check_models(
    node: &Node,
    prepared: &mut Prepared,
    config: &KernelCreationConfig,
    image: &ImageRecord,
) -> Result<(), CreateError> {
    check_labels(&config.image.canonical, &image.labels)?;
    if config.session_type != SessionType::Inference {
        return Ok(());
    }
    let folder = model_definition::folder(config).ok_or(ModelDefinitionError::NoFolder)?;
    let what = format!("the model folder {}", folder.name);
    let (wanted, cmd) = (config.clone(), image.cmd.clone());
    let look = move || model_definition::read(&wanted, &cmd);
    let until = node.guarded_io.until();
    prepared.models = node
        .guarded_io
        .at(until, what, &folder.host_path, look)
        .await??;
    let ports: Vec<(String, u16)> = prepared
        .models
        .iter()
        .filter_map(|model| Some((model.name.clone(), model.port()?)))
        .collect();
    prepared.services = service_ports::arrange(&exposure(config, &ports))?;
    Ok(())
}

fn exposure<'a>(config: &'a KernelCreationConfig, models: &'a [(String, u16)]) -> Exposure<'a> {
    Exposure {
        label: config.image.label_or("ai.backend.service-ports", ""),
        endpoints: config.image.label_or("ai.backend.endpoint-ports", ""),
        is_main: config.is_main(),
        preopen: &config.preopen_ports,
        allocated_host_ports: &config.allocated_host_ports,
        models,
    }
}

fn check_architecture(config: &KernelCreationConfig) -> Result<(), CreateError> {
    let have = std::env::consts::ARCH;
    let wanted = &config.image.architecture;
    if image::architecture(wanted) == have {
        return Ok(());
    }
    Err(CreateError::Architecture {
        image: config.image.canonical.clone(),
        wanted: wanted.clone(),
        have,
    })
}

fn choose_network(cluster: &ClusterInfo) -> Result<NetworkChoice, CreateError> {
    match cluster.network_mode() {
        None => Ok(NetworkChoice::Default),
        Some("bridge" | "overlay") => match cluster.network_name() {
            Some(name) if !name.is_empty() => Ok(NetworkChoice::Named(name.to_owned())),
            _ => Err(CreateError::NoNetworkName),
        },
        Some("host") => Ok(NetworkChoice::Host),
        Some(other) => Err(CreateError::NetworkMode(other.to_owned())),
    }
}

fn publisher(node: &Node, network: &NetworkChoice) -> PublishedBy {
    match (network, node.config.node.publish) {
        (NetworkChoice::Host, _) => PublishedBy::Host,
        (_, Publish::Rows) => PublishedBy::Rows,
        (_, Publish::Engine) => PublishedBy::Engine,
        // Containers of a remote engine have addresses this host does not reach.
        (_, Publish::Auto) if node.docker.is_local() => PublishedBy::Rows,
        (_, Publish::Auto) => PublishedBy::Engine,
    }
}

/// How many ports of the pool a kernel needs, and which of its services get them.
pub fn pool_ports(services: &[ServicePort], network: &NetworkChoice) -> usize {
    services
        .iter()
        .filter(|service| takes_pool_ports(service, network))
        .map(|service| service.container_ports.len())
        .sum()
}

/// The ports a kernel has whatever the pool gives.
pub fn own_ports(services: &[ServicePort], network: &NetworkChoice) -> impl Iterator<Item = u16> {
    services
        .iter()
        .filter(|service| !takes_pool_ports(service, network))
        .flat_map(|service| service.container_ports.iter().copied())
}

/// On the host's network only the runner's own services can be told which port to take; what an
/// image opens, it opens where it is used to.
pub fn takes_pool_ports(service: &ServicePort, network: &NetworkChoice) -> bool {
    *network != NetworkChoice::Host || matches!(service.name.as_str(), "sshd" | "ttyd")
}

/// The services with host ports: of the pool, in the order of their container ports, or the
/// container's own where those are the host's.
pub fn with_host_ports(
    services: &[ServicePort],
    pool: &[u16],
    network: &NetworkChoice,
) -> Vec<ServicePort> {
    let mut pool = pool.iter().copied();
    let mut services = services.to_vec();
    for service in &mut services {
        service.host_ports = match takes_pool_ports(service, network) {
            true => pool.by_ref().take(service.container_ports.len()).collect(),
            false => service.container_ports.clone(),
        };
    }
    services
}

/// Services as the manager is told of them.
pub fn public_services(services: &[ServicePort]) -> Value {
    let public: Vec<Value> = services
        .iter()
        .filter(|service| service.protocol != ServiceProtocol::Internal)
        .map(|service| serde_json::to_value(service).unwrap_or_default())
        .collect();
    Value::Array(public)
}

/// Whether the jail wraps the kernel's processes.
pub fn jailed(node: &Node) -> bool {
    node.config.container.sandbox_type == SandboxType::Jail
}

/// Reads the C library of the image.
pub async fn base_distro(
    node: &Node,
    config: &KernelCreationConfig,
) -> Result<String, CreateError> {
    let labels = config
        .image
        .labels
        .iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
    Ok(node
        .distros
        .resolve(config.image.docker_name(), &labels.collect())
        .await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_labels_are_bounded() {
        let labels = |length: usize| HashMap::from([("key".to_owned(), "v".repeat(length))]);
        assert!(check_labels("image", &labels(LABELS - 3)).is_ok());
        let err = check_labels("image", &labels(LABELS - 2)).unwrap_err();
        assert!(err.to_string().contains("131073 bytes"), "{err}");
    }
}
