//! Container networks: local cluster networks, and how a container is reached from this host.
//!
//! In: network names of the manager, inspections of containers. Out: the addresses a container has,
//! and for each the host-side end of its link (what the dataplane forwards to and guards).
//! Invariant: a link is only reported when the kernel itself confirms both of its ends; Docker's
//! word alone names an address, never an interface.

mod netlink;

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use tokio::sync::Semaphore;

use crate::docker::{ContainerInspectResponse, Docker, DockerError};

pub use self::netlink::MacAddress;

/// Label of networks made for clusters.
pub const CLUSTER_NETWORK_LABEL: &str = "ai.backend.cluster-network";

/// Through which a swarm's containers reach the outside; every node of a swarm has one.
pub const GATEWAY_BRIDGE: &str = "docker_gwbridge";

/// A network may still hold an endpoint of a container that is just being removed.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);
const DRAIN_POLL: Duration = Duration::from_millis(200);

/// Reading links takes about a millisecond; a kernel that needs longer is in trouble.
const LINK_DEADLINE: Duration = Duration::from_secs(5);

/// Questions about links at once. Each holds a thread, for as long as anybody holds the kernel's interface
/// lock; the others' deadlines pass meanwhile, and the threads that are left do what else blocks.
static ASKING: Semaphore = Semaphore::const_new(64);

/// A failed step on a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The network could not be created.
    #[error("create the local network {name}")]
    Create {
        /// Network name.
        name: String,
        /// The engine's refusal.
        #[source]
        source: DockerError,
    },
    /// The network could not be removed.
    #[error("remove the local network {name}")]
    Remove {
        /// Network name.
        name: String,
        /// The engine's refusal.
        #[source]
        source: DockerError,
    },
    /// The container does not run, so it has no links.
    #[error("container {container} does not run, it has no network links")]
    NotRunning {
        /// Container id.
        container: String,
    },
    /// The links of a container could not be read.
    #[error(
        "read the network links of process {pid}; the agent must run as root on the engine's host"
    )]
    Links {
        /// Init process of the container.
        pid: u32,
        /// The kernel's refusal.
        #[source]
        source: io::Error,
    },
    /// The kernel did not answer.
    #[error("read the network links of process {pid}: no answer in {} s", LINK_DEADLINE.as_secs())]
    LinksTimeout {
        /// Init process of the container.
        pid: u32,
    },
}

/// Creates a bridge network for a cluster on this node; an existing one of that name is a success.
///
/// # Errors
/// [`NetworkError::Create`].
pub async fn create_local_network(docker: &Docker, name: &str) -> Result<(), NetworkError> {
    let failed = |source| NetworkError::Create {
        name: name.to_owned(),
        source,
    };
    // Looked up first: an engine may hold two networks of one name when creations race.
    match docker.inspect_network(name).await {
        Ok(_) => return Ok(()),
        Err(err) if err.is_not_found() => {}
        Err(err) => return Err(failed(err)),
    }
    let labels = HashMap::from([(CLUSTER_NETWORK_LABEL.to_owned(), "1".to_owned())]);
    match docker.create_network(name, "bridge", labels).await {
        Ok(_) => {
            tracing::info!(network = name, "a local network was created");
            Ok(())
        }
        Err(DockerError::Conflict { .. }) => Ok(()),
        Err(err) => Err(failed(err)),
    }
}

/// Removes a network; a missing one is a success. Endpoints of containers that are just going away
/// are waited for, ten seconds at most.
///
/// # Errors
/// [`NetworkError::Remove`].
pub async fn destroy_local_network(docker: &Docker, name: &str) -> Result<(), NetworkError> {
    let deadline = tokio::time::Instant::now() + DRAIN_LIMIT;
    loop {
        match docker.remove_network(name).await {
            Ok(()) => {
                tracing::info!(network = name, "a local network was removed");
                return Ok(());
            }
            Err(err) if err.is_not_found() => return Ok(()),
            Err(DockerError::Engine {
                status: 403,
                message,
                ..
            }) if message.contains("active endpoints")
                && tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(DRAIN_POLL).await;
            }
            Err(source) => {
                return Err(NetworkError::Remove {
                    name: name.to_owned(),
                    source,
                });
            }
        }
    }
}

/// The first IPv4 subnet of a network, if there is such a network.
///
/// # Errors
/// Why the engine could not say.
pub async fn subnet(docker: &Docker, name: &str) -> Result<Option<String>, DockerError> {
    let found = match docker.inspect_network(name).await {
        Ok(found) => found,
        Err(err) if err.is_not_found() => return Ok(None),
        Err(err) => return Err(err),
    };
    let pools = found.ipam.and_then(|ipam| ipam.config).unwrap_or_default();
    Ok(pools
        .into_iter()
        .filter_map(|pool| pool.subnet)
        .find(|subnet| subnet.contains('.')))
}

/// A container's endpoint on the gateway network of a swarm, found by the hardware address of one of
/// its links. An inspection of the container does not name it: Docker adds it for containers on
/// networks that this host itself is not on, such as overlays.
///
/// # Errors
/// Why the engine could not say.
pub async fn gateway_endpoint(
    docker: &Docker,
    links: &[HostLink],
) -> Result<Option<Endpoint>, DockerError> {
    let found = match docker.inspect_network(GATEWAY_BRIDGE).await {
        Ok(found) => found,
        Err(err) if err.is_not_found() => return Ok(None),
        Err(err) => return Err(err),
    };
    let network_id = found.id.unwrap_or_default();
    let endpoints = found.containers.unwrap_or_default().into_values();
    Ok(endpoints
        .map(|endpoint| Endpoint {
            network: GATEWAY_BRIDGE.to_owned(),
            network_id: network_id.clone(),
            ipv4: without_prefix(endpoint.ipv4_address.as_deref()),
            ipv6: without_prefix(endpoint.ipv6_address.as_deref()),
            mac: parsed(endpoint.mac_address.as_deref()),
        })
        .find(|endpoint| {
            links
                .iter()
                .any(|link| Some(link.container_mac) == endpoint.mac)
        }))
}

/// An address of a container on one network, in Docker's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Network name.
    pub network: String,
    /// Network id; empty while not connected.
    pub network_id: String,
    /// Address in this network.
    pub ipv4: Option<Ipv4Addr>,
    /// Global address in this network.
    pub ipv6: Option<Ipv6Addr>,
    /// Hardware address of the container's interface.
    pub mac: Option<MacAddress>,
}

/// The addresses of a container, those with an IPv4 address first and then by network name, so that
/// the choice of the first is stable.
pub fn endpoints(container: &ContainerInspectResponse) -> Vec<Endpoint> {
    let networks = container
        .network_settings
        .as_ref()
        .and_then(|settings| settings.networks.as_ref());
    let mut found: Vec<Endpoint> = networks
        .into_iter()
        .flatten()
        .map(|(network, endpoint)| Endpoint {
            network: network.clone(),
            network_id: endpoint.network_id.clone().unwrap_or_default(),
            ipv4: parsed(endpoint.ip_address.as_deref()),
            ipv6: parsed(endpoint.global_ipv6_address.as_deref()),
            mac: parsed(endpoint.mac_address.as_deref()),
        })
        .filter(|endpoint| endpoint.ipv4.is_some() || endpoint.ipv6.is_some())
        .collect();
    found.sort_by(|a, b| (a.ipv4.is_none(), &a.network).cmp(&(b.ipv4.is_none(), &b.network)));
    found
}

fn parsed<T: std::str::FromStr>(text: Option<&str>) -> Option<T> {
    text?.parse().ok()
}

/// An address as networks list it: with the length of the subnet's prefix.
fn without_prefix<T: std::str::FromStr>(text: Option<&str>) -> Option<T> {
    parsed(text?.split('/').next())
}

/// True when the container uses the host's network namespace.
pub fn is_host_network(container: &ContainerInspectResponse) -> bool {
    container
        .host_config
        .as_ref()
        .and_then(|config| config.network_mode.as_deref())
        == Some("host")
}

/// Whether a link of this number is in this host's network namespace.
pub fn is_link_here(index: u32) -> bool {
    nix::net::if_::if_indextoname(index).is_ok()
}

/// A container's link as seen from this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostLink {
    /// Network name; empty when the interface is none of Docker's endpoints.
    pub network: String,
    /// Name of the interface inside the container.
    pub interface: String,
    /// Index of the host-side end.
    pub ifindex: u32,
    /// Hardware address of the container's end.
    pub container_mac: MacAddress,
    /// The container's address on this link.
    pub ipv4: Option<Ipv4Addr>,
    /// The container's global address on this link.
    pub ipv6: Option<Ipv6Addr>,
    /// Index of the bridge the host-side end is a port of.
    pub bridge_ifindex: Option<u32>,
}

/// The links of a running container.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Links {
    /// Those whose other end is in this host's network namespace, in the order of [`endpoints`].
    pub here: Vec<HostLink>,
    /// Names, inside the container, of those that lead past this host: macvlan, ipvlan, a device of its own. Not known
    /// of a container that has no other links.
    pub past_host: Vec<String>,
}

/// The links of a running container. Containers on the host's network, on none, or on networks without a
/// veth (macvlan, ipvlan) alone have none with an end here.
///
/// No namespace is entered: the kernel is asked over netlink for the links of the container's
/// namespace by id (rtnetlink(7), `IFLA_TARGET_NETNSID`), which also tells each link's peer; the
/// peer is then read here and must point back. A bridge's forwarding table would not do: it knows
/// a container only after its first frame.
///
/// # Errors
/// [`NetworkError::NotRunning`], [`NetworkError::Links`] without the privilege (`CAP_NET_ADMIN`),
/// [`NetworkError::LinksTimeout`].
pub async fn links(container: &ContainerInspectResponse) -> Result<Links, NetworkError> {
    let pid = container
        .state
        .as_ref()
        .and_then(|state| state.pid)
        .and_then(|pid| u32::try_from(pid).ok())
        .filter(|pid| *pid > 0)
        .ok_or_else(|| NetworkError::NotRunning {
            container: container.id.clone().unwrap_or_default(),
        })?;
    if is_host_network(container) {
        return Ok(Links::default());
    }
    let reading = async {
        let turn = ASKING.acquire().await.ok();
        let ask = move || {
            let _turn = turn;
            netlink::links(pid, LINK_DEADLINE)
        };
        tokio::task::spawn_blocking(ask).await
    };
    let found = match tokio::time::timeout(LINK_DEADLINE, reading).await {
        Ok(Ok(found)) => found.map_err(|source| NetworkError::Links { pid, source })?,
        Ok(Err(panicked)) => {
            return Err(NetworkError::Links {
                pid,
                source: io::Error::other(panicked),
            });
        }
        Err(_) => return Err(NetworkError::LinksTimeout { pid }),
    };
    let endpoints = endpoints(container);
    let mut links: Vec<(usize, HostLink)> = found
        .peers
        .into_iter()
        .map(|peer| {
            let place = endpoints
                .iter()
                .position(|endpoint| endpoint.mac == Some(peer.container_mac));
            let endpoint = place.map(|place| &endpoints[place]);
            let link = HostLink {
                network: endpoint.map(|it| it.network.clone()).unwrap_or_default(),
                interface: peer.interface,
                ifindex: peer.host_ifindex,
                container_mac: peer.container_mac,
                ipv4: endpoint.and_then(|it| it.ipv4),
                ipv6: endpoint.and_then(|it| it.ipv6),
                bridge_ifindex: peer.bridge_ifindex,
            };
            (place.unwrap_or(usize::MAX), link)
        })
        .collect();
    links.sort_by_key(|(place, link)| (*place, link.ifindex));
    Ok(Links {
        here: links.into_iter().map(|(_, link)| link).collect(),
        past_host: found.past_host,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_come_in_a_stable_order_and_empty_ones_are_left_out() {
        let container: ContainerInspectResponse = serde_json::from_value(serde_json::json!({
            "HostConfig": { "NetworkMode": "bridge" },
            "NetworkSettings": { "Networks": {
                "zeta": { "IPAddress": "172.18.0.2", "MacAddress": "02:42:ac:12:00:02" },
                "six": { "IPAddress": "", "GlobalIPv6Address": "fd00::2" },
                "alpha": { "IPAddress": "172.19.0.2", "MacAddress": "nonsense" },
                "gone": { "IPAddress": "", "MacAddress": "" },
            }}
        }))
        .unwrap();
        let found = endpoints(&container);
        let names: Vec<&str> = found.iter().map(|it| it.network.as_str()).collect();
        assert_eq!(names, ["alpha", "zeta", "six"]);
        assert_eq!(found[0].mac, None);
        assert_eq!(found[1].mac.unwrap().to_string(), "02:42:ac:12:00:02");
        assert_eq!(found[2].ipv6, Some("fd00::2".parse().unwrap()));
        assert!(!is_host_network(&container));
    }

    #[test]
    fn addresses_of_networks_lose_their_prefix() {
        let address = |text| without_prefix::<Ipv4Addr>(text);
        assert_eq!(address(Some("172.22.0.3/16")), Some([172, 22, 0, 3].into()));
        assert_eq!(address(Some("172.22.0.3")), Some([172, 22, 0, 3].into()));
        assert_eq!((address(Some("")), address(None)), (None, None));
    }
}
