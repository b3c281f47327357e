//! From a checked request to a container that has been started: files, container.
//!
//! Invariant: what is taken is in the record (and the journal) before it is used, so that the
//! ending of the kernel, or the next start of the agent, finds it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use shared::ids::{ContainerId, KernelId};
use tokio_util::sync::CancellationToken;

use super::error::CreateError;
use super::host_ports::{KeptPorts, take_ports};
use super::prepare::{self, Prepared};
use super::serve::{Attempt, serve};
use super::{CreatePermit, CreatePlan, Order, abortable, aborted, enter};
use crate::accelerator::host::Granted;
use crate::accelerator::inject::{NO_NVIDIA, NVIDIA_VISIBLE};
use crate::blocking::blocking;
use crate::kernel::agent_socket;
use crate::kernel::container_request::{
    self, ContainerInputs, ContainerRequest, HELD_FOLDERS_LABEL, Limits,
};
use crate::kernel::environment::{self, AttachedDevice, EnvironmentInputs};
use crate::kernel::lifecycle::Stage;
use crate::kernel::memory_nodes;
use crate::kernel::mounts::{self, HostPaths, Intrinsic, Mount, WORK};
use crate::kernel::node::Node;
use crate::kernel::record::{PublishedBy, Record};
use crate::kernel::registry::Kernel;
use crate::kernel::request::TextMap;
use crate::kernel::resource_text::{self, ResourceSpec};
use crate::kernel::scratch::{ClusterFiles, ConfigFiles, NewScratch};
use crate::kernel::service_ports::{SSHD, TTYD};
use crate::network;
use crate::resource::{Allocation, ContainerLimits, ResourceError};

/// How often a creation is tried with other host ports.
const ATTEMPTS: u32 = 4;
/// How long the dataplane may take to let go of the ports of an attempt that failed.
const ROWS_GONE: Duration = Duration::from_secs(3);

/// Everything after the reservation of devices. One that is made anew has ports and files.
pub async fn files_and_container(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    plan: &CreatePlan,
    kept: Option<KeptPorts<'_>>,
    abort: &CancellationToken,
    permit: &mut CreatePermit<'_>,
) -> Result<(), CreateError> {
    let CreatePlan { prepared, distro } = plan;
    enter(kernel, Stage::Files)?;
    let mut attempt = 1;
    if let Some(kept) = kept {
        kept.settle(prepared.published_by).await;
        let id = uuid::Uuid::from_bytes(kernel.id.0);
        node.scratch.renew(id, scratch_of(order, prepared)).await?;
    } else {
        take_ports(node, kernel, order, prepared)?;
        node.store(kernel).await?;
        node.progress(kernel.id, "writing the scratch");
        make_scratch(node, kernel, order, prepared).await?;
    }
    loop {
        match launch(node, kernel, order, prepared, distro, abort, permit).await {
            Ok(()) => return Ok(()),
            Err(Attempt::Busy(err, ports)) if attempt < ATTEMPTS => {
                attempt += 1;
                tracing::warn!(kernel_id = %kernel.id, ?ports, err = &err as &dyn std::error::Error,
                    "a host port is in use; trying others");
                discard_container(node, kernel).await?;
                abortable(kernel, abort, permit.resume()).await??;
                for port in ports {
                    node.ports.give_up(kernel.id, port);
                }
                node.ports.release_kernel(kernel.id);
                kernel.update_record(|record| record.services.clear());
                take_ports(node, kernel, order, prepared)?;
            }
            Err(Attempt::Busy(err, _) | Attempt::Failed(err)) => return Err(err),
        }
    }
}

async fn make_scratch(
    node: &Node,
    kernel: &Kernel,
    order: &Order,
    prepared: &Prepared,
) -> Result<(), CreateError> {
    let id = uuid::Uuid::from_bytes(kernel.id.0);
    node.scratch.create(id, scratch_of(order, prepared)).await?;
    Ok(())
}

/// What the request brings into the scratch.
fn scratch_of(order: &Order, prepared: &Prepared) -> NewScratch {
    let config = &order.config;
    let own_ssh = prepared
        .folders
        .iter()
        .any(|mount| Path::new(&mount.target) == Path::new(WORK).join(".ssh"));
    NewScratch {
        owner: prepared.identity.into(),
        skeleton: prepared.runner.runner_file(""),
        bootstrap_script: config.bootstrap_script.clone(),
        dotfiles: config.internal_data.dotfiles.clone(),
        ssh_keypair: config
            .internal_data
            .ssh_keypair
            .clone()
            .filter(|_| !own_ssh),
        docker_credentials: config.internal_data.docker_credentials.clone(),
        cluster: ClusterFiles::of(
            &order.cluster,
            order.config.environ.get("BACKENDAI_CLUSTER_HOSTS"),
        ),
    }
}

async fn launch(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    prepared: &Prepared,
    distro: &str,
    abort: &CancellationToken,
    permit: &mut CreatePermit<'_>,
) -> Result<(), Attempt> {
    let container = make_container(node, kernel, order, prepared, distro).await?;
    // Its own, too: others may have come while it was made.
    memory_nodes::make_room(node).await;
    if abort.is_cancelled() {
        return Err(aborted(kernel).into());
    }
    node.progress(kernel.id, "starting the container");
    enter(kernel, Stage::Started)?;
    node.store(kernel).await?;
    kernel.container_starts();
    if let Err(source) = node.docker.start(&container.to_string()).await {
        let busy = source.is_port_taken();
        let err = CreateError::DockerStart {
            kernel: kernel.id,
            source,
        };
        return Err(match busy {
            true => Attempt::Busy(err, node.ports.of_kernel(kernel.id)),
            false => Attempt::Failed(err),
        });
    }
    // The runner answers when the user's own script has ended.
    permit.rest();
    serve(node, kernel, container, abort).await
}

/// What a container is given beside its mounts.
struct ContainerExtras {
    limits: ContainerLimits,
    /// What device plugins give it.
    granted: Granted,
    attached: Vec<(String, Vec<AttachedDevice>)>,
    environ: TextMap,
}

/// Writes the config files and creates the container; notes its id.
async fn make_container(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    prepared: &Prepared,
    distro: &str,
) -> Result<ContainerId, CreateError> {
    let allocation = kernel.with_record(|record| record.allocation.clone());
    let allocation = allocation.unwrap_or_default();
    let extras = extras(node, kernel.id, order, prepared, &allocation).await?;
    let mounts = all_mounts(node, kernel, order, prepared, distro).await?;
    write_config(node, kernel, prepared, &allocation, &extras, &mounts).await?;
    let request = request_of(node, kernel, order, prepared, &extras, &mounts).await?;
    let (name, body) = (request.name, request.body);
    let models: Vec<_> = prepared.models.iter().map(|model| json!(model)).collect();
    node.progress(kernel.id, "creating the container");
    kernel.update_record(|record| {
        record.mounts = mounts;
        // Only the main kernel of a session serves.
        record.models_pending = !models.is_empty() && order.config.is_main();
        record.models = models;
        record.environ = Some(extras.environ);
        record.memory_pinned = Some(extras.limits.cpuset_mems.is_some());
        record.container_name = name.clone();
        record.container_id = None;
    });
    enter(kernel, Stage::Container)?;
    node.store(kernel).await?;
    let created =
        node.docker
            .create(&name, &body)
            .await
            .map_err(|source| CreateError::DockerCreate {
                kernel: kernel.id,
                source,
            })?;
    let container: ContainerId = created.parse().map_err(|_| {
        CreateError::Request(format!("Docker answered a strange container id: {created}"))
    })?;
    kernel.update_record(|record| record.container_id = Some(created.clone()));
    node.store(kernel).await?;
    node.ledger.commit(kernel.id);
    let id = uuid::Uuid::from_bytes(kernel.id.0);
    node.scratch.record_container(id, created).await?;
    Ok(container)
}

/// What follows from the devices, and the variables.
async fn extras(
    node: &Node,
    kernel: KernelId,
    order: &Order,
    prepared: &Prepared,
    allocation: &Allocation,
) -> Result<ContainerExtras, CreateError> {
    let mut limits = node.ledger.container_limits(kernel, allocation);
    if let Some(why) = limits.refused.take() {
        return Err(ResourceError::General(why).into());
    }
    let attached = attached_devices(node, allocation);
    let first_model = prepared.models.first().map(|model| model.name.as_str());
    let last_path = prepared
        .models
        .last()
        .map(|model| model.model_path.as_str());
    let mut environ = environment::variables(
        &order.config,
        prepared.identity,
        &EnvironmentInputs {
            cores: usize::try_from(limits.cpu_count).unwrap_or_default(),
            attached: &attached,
            accelerator_gids: &limits.gids,
            hooks: &[],
            model: first_model.zip(last_path),
        },
    );
    for (name, value) in &limits.defaults {
        if !environ.contains(name) {
            environ.insert(name, value);
        }
    }
    let granted = node.plugin_host.grant(allocation).await?;
    enforce(&mut environ, &limits.environment, &granted.environment);
    Ok(ContainerExtras {
        limits,
        granted,
        attached,
        environ,
    })
}

/// Sets what requests and images have no say in. NVIDIA's runtime gives every device to a container
/// whose image asks for all: who was given none by name sees none, whatever the node knows of them.
fn enforce(environ: &mut TextMap, limits: &[(String, String)], granted: &[(String, String)]) {
    environ.insert(NVIDIA_VISIBLE, NO_NVIDIA);
    for (name, value) in limits.iter().chain(granted) {
        environ.insert(name, value);
    }
}

/// Writes what the runner reads at its start.
async fn write_config(
    node: &Node,
    kernel: &Kernel,
    prepared: &Prepared,
    allocation: &Allocation,
    extras: &ContainerExtras,
    mounts: &[Mount],
) -> Result<(), CreateError> {
    let spec = ResourceSpec {
        slots: prepared.slots.to_text(),
        allocations: allocation.to_text(),
        scratch_disk_size: 0,
        mounts: mounts.to_vec(),
    };
    let rendered = resource_text::render(&spec, &extras.limits.resource_lines, |slot| {
        node.ledger.is_bytes(slot)
    })?;
    let devices = extras.attached.iter();
    let files = ConfigFiles {
        environ: environment::render(&extras.environ, &[]),
        resource: rendered.text,
        devices: devices.map(|(device, _)| device.clone()).collect(),
        intrinsic_ports: kernel.with_record(intrinsic_ports),
    };
    let id = uuid::Uuid::from_bytes(kernel.id.0);
    Ok(node.scratch.write_config(id, files).await?)
}

/// On the host's network the runner opens these in place of its usual ones.
fn intrinsic_ports(record: &Record) -> Option<serde_json::Value> {
    let service_port = |number: u16| {
        record
            .services
            .iter()
            .find(|service| service.container_ports == [number])
            .and_then(|service| service.host_ports.first().copied())
    };
    let on_host = record.published_by == PublishedBy::Host;
    let (repl_in, repl_out) = record.repl_ports.filter(|_| on_host)?;
    Some(json!({
        "replin": repl_in,
        "replout": repl_out,
        "sshd": service_port(SSHD),
        "ttyd": service_port(TTYD),
    }))
}

/// The engine's request, for folders whose parts are held from now on.
async fn request_of(
    node: &Node,
    kernel: &Kernel,
    order: &Order,
    prepared: &Prepared,
    extras: &ContainerExtras,
    mounts: &[Mount],
) -> Result<ContainerRequest, CreateError> {
    let (limits, granted) = (&extras.limits, &extras.granted);
    let mut extra = gateway_arguments(node, kernel, order).await?;
    extra.extend(limits.arguments.iter().chain(&granted.arguments).cloned());
    let (held, engine_mounts) = hold_parts(node, kernel, mounts).await?;
    let record = kernel.record();
    let mut request = container_request::build(&ContainerInputs {
        settings: &node.settings,
        host: &prepared.host,
        seccomp: prepared.seccomp.as_ref(),
        request: &order.config,
        cluster: &order.cluster,
        services: &record.services,
        repl_ports: record.repl_ports,
        engine_ports: record.published_by == PublishedBy::Engine,
        environ: &extras.environ,
        mounts: &engine_mounts,
        limits: &Limits::from(limits),
        shared_memory: prepared.shared_memory,
        device_arguments: &extra,
        device_syscalls: &limits.syscalls,
    })?;
    // Also when there are none: an image may bring the label along.
    let labels = request.body.labels.get_or_insert_default();
    labels.insert(HELD_FOLDERS_LABEL.to_owned(), json!(held).to_string());
    for key in &request.unknown {
        tracing::warn!(kernel_id = %kernel.id, key, "an option of the operator's file is unknown to the engine's API and left out");
    }
    Ok(request)
}

/// Takes the parts of folders out of their users' hands: where they really are, and the mounts with
/// the paths for the engine. One that runs elsewhere goes by its own host's names.
async fn hold_parts(
    node: &Node,
    kernel: &Kernel,
    mounts: &[Mount],
) -> Result<(Vec<String>, Vec<Mount>), CreateError> {
    let mut mounts = mounts.to_vec();
    let mut parts = Vec::new();
    let mut given: Vec<&mut Mount> = Vec::new();
    if node.docker.is_local() {
        for mount in &mut mounts {
            if let Some(part) = mount.part() {
                parts.push(part);
                given.push(mount);
            }
        }
    }
    if parts.is_empty() {
        return Ok((Vec::new(), mounts));
    }
    let id = uuid::Uuid::from_bytes(kernel.id.0);
    let paths = node.scratch.hold(id, parts).await?;
    let sources = given.iter().map(|mount| mount.source.clone()).collect();
    for (mount, path) in given.into_iter().zip(&paths) {
        mount.source = mounts::display(path);
    }
    Ok((sources, mounts))
}

/// What keeps MPI off the interface through which a swarm's nodes reach the outside.
async fn gateway_arguments(
    node: &Node,
    kernel: &Kernel,
    order: &Order,
) -> Result<Vec<serde_json::Value>, CreateError> {
    if !sees_gateway(order.cluster.network_mode()) {
        return Ok(Vec::new());
    }
    let subnet = network::subnet(&node.docker, network::GATEWAY_BRIDGE)
        .await
        .map_err(|source| CreateError::Docker {
            step: "looking at the swarm's gateway network",
            kernel: kernel.id,
            source,
        })?;
    Ok(subnet.as_deref().map(exclude_gateway).into_iter().collect())
}

/// Whether a container of a session's network has an interface on the swarm's gateway network: its
/// second one on an overlay, the host's own on the host's network. The addresses there are the same on
/// every node: MPI must not try to meet others by them.
fn sees_gateway(mode: Option<&str>) -> bool {
    mode.is_some_and(|mode| mode != "bridge")
}

fn exclude_gateway(subnet: &str) -> serde_json::Value {
    json!({ "Env": [format!("OMPI_MCA_btl_tcp_if_exclude=127.0.0.1/32,{subnet}")] })
}

/// The ledger's devices in the form of the container's environment.
fn attached_devices(node: &Node, allocation: &Allocation) -> Vec<(String, Vec<AttachedDevice>)> {
    let devices = node.ledger.attached_devices(allocation);
    devices
        .into_iter()
        .map(|(name, list)| {
            let list = list
                .into_iter()
                .map(|device| AttachedDevice {
                    device_id: device.device_id,
                    model_name: device.model_name,
                    data: device.data,
                })
                .collect();
            (name, list)
        })
        .collect()
}

async fn all_mounts(
    node: &Arc<Node>,
    kernel: &Kernel,
    order: &Order,
    prepared: &Prepared,
    distro: &str,
) -> Result<Vec<Mount>, CreateError> {
    let samples_volume = node
        .docker
        .inspect_volume("deeplearning-samples")
        .await
        .is_ok();
    let paths = node.scratch.paths(uuid::Uuid::from_bytes(kernel.id.0));
    let short_name = order.config.image.short_name().to_owned();
    let coredump = node.config.debug.coredump.clone();
    let socket_dir = node.socket_dir.clone();
    let host = HostPaths::default();
    let lxcfs = host.lxcfs.clone();
    let look = move || {
        let wanted = Intrinsic {
            samples_volume,
            short_image_name: &short_name,
            coredump: coredump
                .as_ref()
                .map(|dump| (dump.path.as_path(), dump.core_path.as_path())),
            agent_socket_dir: Some(&socket_dir),
        };
        mounts::intrinsic(&paths, &wanted, &host)
    };
    let (until, what) = (node.guarded_io.until(), "what lxcfs serves".to_owned());
    let mut mounts = node.guarded_io.at_own(until, what, &lxcfs, look).await?;
    let (opener, order) = (node.clone(), order.config.clone());
    let id = kernel.id;
    let sockets = blocking(move || {
        let sockets = &order.internal_data.domain_socket_proxies;
        // Cleaners of /tmp may have taken some away.
        agent_socket::ensure_mount_points(&opener.socket_dir, agent_socket::MOUNT_POINTS)?;
        opener.host_sockets.open(id, sockets)
    });
    mounts.extend(sockets.await?);
    mounts.extend(prepared.folders.iter().cloned());
    let (runner, distro) = (prepared.runner.clone(), distro.to_owned());
    let jail = prepare::jailed(node);
    let runner_dir = node.config.node.runner_dir.clone();
    let files = blocking(move || runner.mounts(&distro, jail))
        .await
        .map_err(|source| CreateError::Runner {
            dir: runner_dir,
            source,
        })?;
    mounts.extend(files);
    Ok(mounts)
}

/// Removes the container of an attempt that failed; the kernel lives on.
async fn discard_container(node: &Arc<Node>, kernel: &Arc<Kernel>) -> Result<(), CreateError> {
    let withdrawal = node.link.withdraw(kernel.id).await;
    if let Some(runner) = kernel.set_runner(None) {
        runner.close().await;
    }
    // Forgotten first: its death is not the kernel's.
    let container = kernel.container();
    kernel.update_record(|record| record.container_id = None);
    if let Some(container) = container {
        match node.docker.remove(&container.to_string(), true).await {
            Ok(()) => {}
            Err(err) if err.is_not_found() => {}
            Err(source) => {
                kernel.update_record(|record| record.container_id = Some(container.to_string()));
                return Err(CreateError::Docker {
                    step: "removing a container whose port is in use",
                    kernel: kernel.id,
                    source,
                });
            }
        }
    }
    node.link.await_removed(withdrawal, ROWS_GONE).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(all: &[(&str, &str)]) -> Vec<(String, String)> {
        all.iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn without_a_word_of_a_driver_no_device_of_nvidia_is_seen() {
        let visible = |limits: &[(String, String)], granted: &[(String, String)]| {
            let mut environ = TextMap::default();
            environ.insert(NVIDIA_VISIBLE, "all");
            enforce(&mut environ, limits, granted);
            environ.get(NVIDIA_VISIBLE).map(str::to_owned)
        };
        let given = variables(&[(NVIDIA_VISIBLE, "GPU-1")]);
        assert_eq!(visible(&[], &[]).as_deref(), Some("void"));
        assert_eq!(visible(&given, &[]).as_deref(), Some("GPU-1"));
        assert_eq!(visible(&[], &given).as_deref(), Some("GPU-1"));
    }

    #[test]
    fn mpi_is_kept_off_the_gateway_on_the_hosts_network_too() {
        assert_eq!(
            [None, Some("bridge"), Some("overlay"), Some("host")].map(sees_gateway),
            [false, false, true, true]
        );
        assert_eq!(
            exclude_gateway("172.18.0.0/16"),
            json!({ "Env": ["OMPI_MCA_btl_tcp_if_exclude=127.0.0.1/32,172.18.0.0/16"] })
        );
    }
}
