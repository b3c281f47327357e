//! From a running container to the rows the dataplane gets: where it is, what it exposes.
//!
//! In: the kernel's record and the container as Docker and /proc show it. Out: one `KernelRows`.
//! Invariant: a port row that leads to a container's own address carries the host-side interface of
//! that container and the guard flag, so that it fails closed when the container is gone.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use config::Config;
use shared::desired::{ClientNetwork, ContainerRow, Drain, PortKey, PortRow, Protocol};
use shared::ids::{ContainerId, Generation};
use thiserror::Error;

use super::callers::Source;
use super::node::Node;
use super::record::{PublishedBy, Record};
use super::registry::Kernel;
use super::service_ports::TTYD;
use crate::blocking::blocking;
use crate::docker::{ContainerInspectResponse, DockerError};
use crate::link::{KernelRows, LinkError};
use crate::network::{self, Endpoint, NetworkError};

/// Pauses between attempts to renew a kernel's rows: doubled up to the second.
const RENEWAL_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A row holds at most so many interfaces.
const LINKS: usize = 8;
/// Bytes of a path that fit in a row.
const PATH_LIMIT: usize = 255;
/// Bytes of a service name that fit in a row.
const SERVICE_LIMIT: usize = 63;

/// Why a container's rows could not be made.
#[derive(Debug, Error)]
pub enum RowsError {
    /// Docker could not be asked.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// The container does not run.
    #[error("container {container} does not run")]
    NotRunning {
        /// Which.
        container: ContainerId,
    },
    /// The container has no address.
    #[error(
        "container {container} has no address on its network {network:?}; it has ended or was taken off (docker inspect shows it)"
    )]
    NoAddress {
        /// Which.
        container: ContainerId,
        /// The network.
        network: String,
    },
    /// The host's side of the container's interfaces could not be found.
    #[error(transparent)]
    Links(#[from] NetworkError),
    /// The container's control group could not be read.
    #[error("cannot read the control group of container {container}")]
    Cgroup {
        /// Which.
        container: ContainerId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The rows could not be written or are not served.
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// Where a running container is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerLocation {
    /// The container.
    pub container: ContainerId,
    /// Host pid of its first process.
    pub init_pid: u32,
    /// Path below each cgroup root; empty when it could not be learned.
    pub cgroup_path: String,
    /// It is on the host's network.
    pub host_network: bool,
    /// Address of the network it was put on.
    pub address: IpAddr,
    /// Host-side interface of that address.
    pub link_index: u32,
    /// Hardware address of the container's end of it.
    pub link_mac: [u8; 6],
    /// Its host-side interfaces, that of the address first; no more than a row holds.
    pub links: Vec<u32>,
    /// It has links that lead past this host.
    pub past_host: bool,
    /// Where its programs call this host from.
    pub sources: Vec<Source>,
    /// Memory limit, bytes; 0 none.
    pub memory: u64,
    /// CPUs it may use, thousandths; 0 not limited.
    pub cpu_milli: u32,
}

/// Finds a running container.
///
/// # Errors
/// The container does not run, or where it is cannot be found out.
pub async fn locate(node: &Node, container: ContainerId) -> Result<ContainerLocation, RowsError> {
    let found = node.docker.inspect(&container.to_string()).await?;
    let pid = found
        .state
        .as_ref()
        .filter(|state| state.running == Some(true))
        .and_then(|state| state.pid)
        .and_then(|pid| u32::try_from(pid).ok())
        .filter(|pid| *pid != 0)
        .ok_or(RowsError::NotRunning { container })?;
    let host_config = found.host_config.as_ref();
    let mode = host_config
        .and_then(|host| host.network_mode.clone())
        .unwrap_or_default();
    let memory = host_config
        .and_then(|host| host.memory)
        .and_then(|memory| u64::try_from(memory).ok());
    let cores = host_config
        .and_then(|host| host.cpuset_cpus.as_deref())
        .map_or(0, count_cpus);
    let host_network = network::is_host_network(&found);
    let no_address = || RowsError::NoAddress {
        container,
        network: mode.clone(),
    };
    // A remote engine's processes are not ours to look at: no interface, no guard, no samples.
    let local = node.docker.is_local();
    let (cgroup_path, links) = if local {
        let cgroup = blocking(move || cgroup_path(Path::new("/proc"), pid, container)).await;
        let cgroup = cgroup.map_err(|source| RowsError::Cgroup { container, source })?;
        (cgroup, network::links(&found).await?)
    } else {
        (String::new(), network::Links::default())
    };
    let network::Links {
        here: links,
        past_host,
    } = links;
    let mut sources: Vec<Source> = links
        .iter()
        .flat_map(|link| sources_by(link, link.ipv4, link.ipv6))
        .collect();
    let (address, mac) = if host_network {
        (IpAddr::V4(Ipv4Addr::LOCALHOST), None)
    } else {
        let mut endpoint = endpoint(&found, &mode).ok_or_else(no_address)?;
        let here = |link: &network::HostLink| Some(link.container_mac) == endpoint.mac;
        if !links.is_empty() && !links.iter().any(here) {
            // On an overlay: this host reaches the container through the swarm's gateway.
            let gateway = network::gateway_endpoint(&node.docker, &links).await?;
            endpoint = gateway.unwrap_or(endpoint);
            let same = |link: &&network::HostLink| Some(link.container_mac) == endpoint.mac;
            if let Some(link) = links.iter().find(same) {
                sources.extend(sources_by(link, endpoint.ipv4, endpoint.ipv6));
            }
        }
        let v4 = endpoint.ipv4.map(IpAddr::V4);
        (
            v4.or(endpoint.ipv6.map(IpAddr::V6))
                .ok_or_else(no_address)?,
            endpoint.mac,
        )
    };
    let main = links.iter().find(|link| Some(link.container_mac) == mac);
    let link_index = main.or(links.first()).map_or(0, |link| link.ifindex);
    let indexes = links.iter().map(|link| link.ifindex).collect();
    let (indexes, left_out) = that_fit(indexes, link_index);
    if left_out > 0 {
        tracing::warn!(
            container_id = %container,
            links = left_out,
            limit = LINKS,
            "a container is on more networks than are looked at: its traffic on the others is not counted, and other containers there reach the kernel's runner"
        );
    }
    if !past_host.is_empty() {
        tracing::warn!(
            container_id = %container,
            links = past_host.join(", "),
            "a container is on networks that lead past this host (macvlan, a device of its own): who is there reaches the kernel's runner"
        );
    }
    Ok(ContainerLocation {
        container,
        init_pid: if local { pid } else { 0 },
        cgroup_path,
        host_network,
        address,
        link_index,
        link_mac: mac.map_or([0; 6], |mac| mac.0),
        links: indexes,
        past_host: !past_host.is_empty(),
        sources,
        memory: memory.unwrap_or(0),
        cpu_milli: cores.saturating_mul(1000),
    })
}

/// As many links as a row holds, that of the ports first: what leads to the container is guarded and watched. And how
/// many are left out.
fn that_fit(mut indexes: Vec<u32>, of_ports: u32) -> (Vec<u32>, usize) {
    indexes.sort_by_key(|index| *index != of_ports);
    let left_out = indexes.split_off(indexes.len().min(LINKS));
    (indexes, left_out.len())
}

/// The addresses that a container has on one of its links.
fn sources_by(
    link: &network::HostLink,
    ipv4: Option<Ipv4Addr>,
    ipv6: Option<Ipv6Addr>,
) -> impl Iterator<Item = Source> {
    let link_index = link.ifindex;
    let addresses = ipv4.map(IpAddr::V4).into_iter().chain(ipv6.map(IpAddr::V6));
    addresses.map(move |address| Source {
        address,
        link_index,
    })
}

/// The endpoint of the network the container was put on first.
fn endpoint(found: &ContainerInspectResponse, mode: &str) -> Option<Endpoint> {
    let name = match mode {
        "default" | "" => "bridge",
        name => name,
    };
    let mut endpoints = network::endpoints(found);
    let place = endpoints
        .iter()
        .position(|endpoint| endpoint.network == name || endpoint.network_id == name)
        .unwrap_or(0);
    (place < endpoints.len()).then(|| endpoints.swap_remove(place))
}

/// Number of CPUs in a list such as `0-3,8`.
fn count_cpus(list: &str) -> u32 {
    list.split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .fold(0, u32::saturating_add)
}

/// The container's path below the cgroup roots: the memory controller's on v1, the one there is on
/// v2. Its first process may have gone into a cgroup below the container's own, which carries the
/// container's id; another one may have its number by now, and then there is no path.
fn cgroup_path(proc_root: &Path, pid: u32, container: ContainerId) -> io::Result<String> {
    let text = fs::read_to_string(proc_root.join(pid.to_string()).join("cgroup"))?;
    let mut unified = None;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if controllers
            .split(',')
            .any(|controller| controller == "memory")
        {
            return Ok(of_container(path, container));
        }
        if controllers.is_empty() {
            unified = Some(of_container(path, container));
        }
    }
    Ok(unified.unwrap_or_default())
}

/// A path up to the name that carries the container's id: `docker/<id>`, `system.slice/docker-<id>.scope`.
fn of_container(path: &str, container: ContainerId) -> String {
    let id = container.to_string();
    let path = path.trim_start_matches('/');
    let Some(at) = path.find(&id) else {
        return String::new();
    };
    let rest = path.get(at..).unwrap_or_default();
    let end = rest.find('/').map_or(path.len(), |length| at + length);
    path.get(..end).unwrap_or_default().to_owned()
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn cut(text: &str, limit: usize) -> String {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// The rows of a kernel whose container is there.
pub fn rows_of(node: &Node, record: &Record, place: &ContainerLocation) -> KernelRows {
    let limits = node.config.node.dataplane;
    let storage = node.config.agent.scaling_group_type == config::ScalingGroupType::Storage;
    let scratch = node
        .config
        .container
        .scratch_root
        .join(record.kernel_id.to_string());
    let fits = |text: String| {
        if text.len() <= PATH_LIMIT {
            text
        } else {
            String::new()
        }
    };
    let container = ContainerRow {
        container_id: place.container,
        kernel_id: record.id(),
        session_id: record.session(),
        init_pid: place.init_pid,
        cgroup_path: fits(place.cgroup_path.clone()),
        host_network: place.host_network,
        link_indexes: place.links.clone(),
        past_host: place.past_host,
        memory_limit_bytes: place.memory,
        cpu_milli: place.cpu_milli,
        scratch_path: fits(scratch.to_string_lossy().into_owned()),
        generation: Generation::default(),
    };
    let mut ports = Vec::new();
    for service in &record.services {
        for (container_port, host_port) in service.container_ports.iter().zip(&service.host_ports) {
            let key = PortKey {
                protocol: Protocol::Tcp,
                host_port: *host_port,
            };
            // On the host's network the program listens on the host port itself.
            let target_port = match record.published_by {
                PublishedBy::Host => *host_port,
                PublishedBy::Rows | PublishedBy::Engine => *container_port,
            };
            let local_only = storage && *container_port == TTYD;
            ports.push(PortRow {
                service: cut(&service.name, SERVICE_LIMIT),
                bind: if local_only {
                    IpAddr::V4(Ipv4Addr::LOCALHOST)
                } else {
                    node.bind_host()
                },
                link_index: place.link_index,
                link_mac: place.link_mac,
                observe_only: record.published_by != PublishedBy::Rows,
                link_guard: place.link_index != 0,
                local_only,
                max_sessions: limits.max_sessions_per_port,
                idle_timeout_ms: millis(limits.idle_timeout),
                connect_timeout_ms: millis(limits.connect_timeout),
                new_per_second: limits.max_new_sessions_per_second,
                networks: clients_of(&node.config, &service.name),
                drain: match millis(limits.drain) {
                    0 => Drain::Cut,
                    ms => Drain::Within { ms },
                },
                ..PortRow::new(
                    key,
                    record.id(),
                    place.container,
                    place.address,
                    target_port,
                )
            });
        }
    }
    KernelRows {
        container: Some(container),
        ports,
    }
}

/// Whom the configuration lets use a service; none means all.
fn clients_of(config: &Config, service: &str) -> Vec<ClientNetwork> {
    let networks = config
        .node
        .service_clients
        .get(service)
        .into_iter()
        .flatten();
    networks
        .map(|it| ClientNetwork {
            address: it.address,
            prefix: it.prefix,
        })
        .collect()
}

/// Finds the container again: replaces the kernel's rows and has the connection to the runner follow.
///
/// # Errors
/// As for [`locate`]; the rows cannot be written.
pub async fn refresh(node: &Arc<Node>, kernel: &Arc<Kernel>) -> Result<(), RowsError> {
    // What was found later must not be overtaken by what was found before.
    let _turn = kernel.refreshing.lock().await;
    let Some(container) = kernel.container() else {
        return Ok(());
    };
    let place = locate(node, container).await?;
    // Its end may have come meanwhile: rows are withdrawn then, and must not come back.
    if !kernel.is_up() || kernel.container() != Some(container) {
        return Ok(());
    }
    node.registry.enter_sources(kernel, &place.sources);
    let (rows, runner) = kernel.with_record(|record| {
        let rows = rows_of(node, record, &place);
        (rows, record.runner_address(place.address))
    });
    let keys: Vec<PortKey> = rows.ports.iter().map(|row| row.key()).collect();
    let moved = kernel.runner().filter(|link| !link.is_at(runner));
    if let Some(link) = &moved {
        link.hold();
    }
    let published = node.link.publish(kernel.id, rows).await;
    let is_gone = || !kernel.is_up() || kernel.container() != Some(container);
    if is_gone() {
        node.link.withdraw(kernel.id).await;
        return Ok(());
    }
    if let Ok(generation) = &published
        && moved.is_some()
    {
        // With the rows the dataplane ends what the runner has open at the old address. A runner that
        // believed in two connections would give each every other message.
        let patience = node.config.node.dataplane_wait;
        let served = node.link.await_serving(&keys, *generation, patience);
        if let Err(err) = served.await {
            tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                "a kernel has moved, but its ports have not followed");
        }
    }
    if let Some(link) = &moved {
        link.follow(runner);
    }
    published?;
    if is_gone() {
        node.link.withdraw(kernel.id).await;
    }
    Ok(())
}

/// Does the same until it succeeds, another call does so, or the kernel's container ends.
pub async fn renew(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    let own = kernel.renewals.fetch_add(1, SeqCst) + 1;
    let mut pause = RENEWAL_PAUSES.0;
    while kernel.is_up() && kernel.renewals.load(SeqCst) == own {
        let Err(err) = refresh(node, kernel).await else {
            return;
        };
        tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
            "cannot renew the ports of a kernel yet; trying again");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = node.stopping.cancelled() => return,
        }
        pause = (pause * 2).min(RENEWAL_PAUSES.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_of_the_ports_is_among_those_that_fit() {
        assert_eq!(that_fit(vec![], 0), (vec![], 0));
        assert_eq!(that_fit(vec![7, 8], 8), (vec![8, 7], 0));
        let (kept, left_out) = that_fit((1..=10).collect(), 10);
        assert_eq!(kept, [10, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(left_out, 2);
    }

    #[test]
    fn the_cgroup_is_the_containers_own_by_the_memory_controller() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("7")).unwrap();
        let container = ContainerId([0xab; 32]);
        let id = container.to_string();
        let inner = ContainerId([0xcd; 32]);
        for (text, path) in [
            (
                format!("9:pids:/x\n4:memory:/docker/{id}\n0::/docker/{inner}\n"),
                format!("docker/{id}"),
            ),
            (
                format!("0::/system.slice/docker-{id}.scope\n"),
                format!("system.slice/docker-{id}.scope"),
            ),
            // systemd within, and Docker within: the first process is not where the limits are.
            (
                format!("0::/system.slice/docker-{id}.scope/init.scope\n"),
                format!("system.slice/docker-{id}.scope"),
            ),
            (
                format!("4:memory:/docker/{id}/docker/{inner}\n"),
                format!("docker/{id}"),
            ),
            (
                format!("0::/user.slice/a.service/libpod-{id}.scope/container\n"),
                format!("user.slice/a.service/libpod-{id}.scope"),
            ),
            // Its number is another's by now.
            ("4:memory:/docker/other\n".to_owned(), String::new()),
            (format!("0::/docker/{inner}\n"), String::new()),
            ("garbage\n".to_owned(), String::new()),
        ] {
            fs::write(root.path().join("7/cgroup"), &text).unwrap();
            let found = cgroup_path(root.path(), 7, container).unwrap();
            assert_eq!(found, path, "{text}");
        }
    }

    #[test]
    fn small_parsers() {
        assert_eq!(count_cpus("0-3,8"), 5);
        assert_eq!(count_cpus(""), 0);
        assert_eq!(cut("äbc", 1), "");
    }
}
