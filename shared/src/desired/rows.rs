//! The rows control writes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::table;
use crate::ids::{ContainerId, Generation, KernelId, SessionId};
use crate::layout::{LINKS, NETWORKS, RawContainer, RawNode, RawPort};
use crate::table::{BatchError, KeyedRow, load_text, state, store_text};

/// Transport protocol of a host port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// IP protocol number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// The protocol of an IP protocol number.
    #[must_use]
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// What names a port row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortKey {
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the host.
    pub host_port: u16,
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host_port, self.protocol)
    }
}

/// What happens to a port's sessions when its row is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// They are cut at once.
    Cut,
    /// They may finish within this many milliseconds.
    Within {
        /// Milliseconds.
        ms: u32,
    },
}

/// A network whose clients may use a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientNetwork {
    /// Address of the network; bits beyond the prefix do not matter.
    pub address: IpAddr,
    /// Prefix length in bits, at most 32 or 128.
    pub prefix: u8,
}

impl ClientNetwork {
    /// Whether a client's address is in this network. An IPv4-mapped IPv6 client counts as IPv4.
    #[must_use]
    pub fn contains(&self, client: IpAddr) -> bool {
        match (self.address, client.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(client)) => {
                let difference = u32::from(network) ^ u32::from(client);
                difference.leading_zeros() >= u32::from(self.prefix.min(32))
            }
            (IpAddr::V6(network), IpAddr::V6(client)) => {
                let difference = u128::from(network) ^ u128::from(client);
                difference.leading_zeros() >= u32::from(self.prefix.min(128))
            }
            _ => false,
        }
    }
}

/// A host port that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRow {
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the host.
    pub host_port: u16,
    /// Kernel the port belongs to.
    pub kernel_id: KernelId,
    /// Container the port leads to.
    pub container_id: ContainerId,
    /// Service name, at most 63 bytes.
    pub service: String,
    /// Address listened on.
    pub bind: IpAddr,
    /// Container's address.
    pub target: IpAddr,
    /// Port in the container.
    pub target_port: u16,
    /// Host-side interface index of the container; 0 unknown or none.
    pub link_index: u32,
    /// MAC address behind that interface; all zero unknown.
    pub link_mac: [u8; 6],
    /// The engine publishes this port already: count it, do not serve it.
    pub observe_only: bool,
    /// The dataplane must disable the row by itself when `link_index` is gone.
    pub link_guard: bool,
    /// Only clients on this host may use it.
    pub local_only: bool,
    /// Sessions at once; 0 the node's default.
    pub max_sessions: u32,
    /// A session without a byte for this long is closed, ms; 0 the node's default.
    pub idle_timeout_ms: u32,
    /// Time a connection to the container may take, ms; 0 the node's default.
    pub connect_timeout_ms: u32,
    /// New sessions in a second, in the long run; 0 no limit.
    pub new_per_second: u32,
    /// The host's firewall decides about clients: nothing may bypass it.
    pub honour_firewall: bool,
    /// What happens to sessions on removal.
    pub drain: Drain,
    /// Client networks allowed, at most 8; none means all.
    pub networks: Vec<ClientNetwork>,
    /// The batch that wrote the row. Set by the writer; what is given to `put_port` does not matter.
    pub generation: Generation,
}

impl PortRow {
    /// The row's key.
    #[must_use]
    pub fn key(&self) -> PortKey {
        PortKey {
            protocol: self.protocol,
            host_port: self.host_port,
        }
    }

    /// A row with defaults: all addresses, drained within 30 s, guarded by its link when one is set later.
    #[must_use]
    pub fn new(
        key: PortKey,
        kernel_id: KernelId,
        container_id: ContainerId,
        target: IpAddr,
        target_port: u16,
    ) -> Self {
        Self {
            protocol: key.protocol,
            host_port: key.host_port,
            kernel_id,
            container_id,
            service: String::new(),
            bind: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            target,
            target_port,
            link_index: 0,
            link_mac: [0; 6],
            observe_only: false,
            link_guard: false,
            local_only: false,
            max_sessions: 0,
            idle_timeout_ms: 0,
            connect_timeout_ms: 0,
            new_per_second: 0,
            honour_firewall: false,
            drain: Drain::Cut,
            networks: Vec::new(),
            generation: Generation(0),
        }
    }
}

/// A row that was removed and whose removal the observed region has not acknowledged yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed<K> {
    /// What was removed.
    pub key: K,
    /// Kernel it belonged to.
    pub kernel_id: KernelId,
    /// The batch that removed it.
    pub generation: Generation,
}

const OBSERVE_ONLY: u8 = 1;
const LINK_GUARD: u8 = 2;
const LOCAL_ONLY: u8 = 4;
const HONOUR_FIREWALL: u8 = 8;

fn store_address(address: IpAddr) -> ([u8; 16], u8) {
    match address {
        IpAddr::V4(address) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&address.octets());
            (bytes, 4)
        }
        IpAddr::V6(address) => (address.octets(), 6),
    }
}

fn load_address(bytes: &[u8; 16], family: u8) -> Option<IpAddr> {
    match family {
        4 => Some(IpAddr::V4(Ipv4Addr::new(
            bytes[0], bytes[1], bytes[2], bytes[3],
        ))),
        6 => Some(IpAddr::V6(Ipv6Addr::from(*bytes))),
        _ => None,
    }
}

impl KeyedRow for PortRow {
    type Key = PortKey;
    type Raw = RawPort;
    const TABLE: usize = table::PORTS;

    fn key(&self) -> PortKey {
        Self::key(self)
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn to_raw(&self) -> Result<RawPort, BatchError> {
        if self.networks.len() > NETWORKS {
            return Err(BatchError::ListTooLong {
                field: "networks",
                length: self.networks.len(),
                limit: NETWORKS,
            });
        }
        if self.host_port == 0 {
            return Err(BatchError::Impossible { field: "host_port" });
        }
        if self.target_port == 0 && !self.observe_only {
            return Err(BatchError::Impossible {
                field: "target_port",
            });
        }
        let (bind_address, bind_family) = store_address(self.bind);
        let (target_address, target_family) = store_address(self.target);
        let (drain_policy, drain_ms) = match self.drain {
            Drain::Cut => (0, 0),
            Drain::Within { ms } => (1, ms),
        };
        let mut raw = RawPort {
            state: state::USED,
            host_port: self.host_port,
            protocol: self.protocol.number(),
            flags: (u8::from(self.observe_only) * OBSERVE_ONLY)
                | (u8::from(self.link_guard) * LINK_GUARD)
                | (u8::from(self.local_only) * LOCAL_ONLY)
                | (u8::from(self.honour_firewall) * HONOUR_FIREWALL),
            kernel_id: self.kernel_id.0,
            container_id: self.container_id.0,
            bind_address,
            target_address,
            target_port: self.target_port,
            bind_family,
            target_family,
            link_index: self.link_index,
            link_mac: self.link_mac,
            drain_policy,
            network_count: u8::try_from(self.networks.len()).unwrap_or(0),
            max_sessions: self.max_sessions,
            drain_ms,
            idle_timeout_ms: self.idle_timeout_ms,
            connect_timeout_ms: self.connect_timeout_ms,
            new_per_second: self.new_per_second,
            ..RawPort::default()
        };
        raw.service_length = store_text("service", &self.service, &mut raw.service)?;
        for (index, network) in self.networks.iter().enumerate() {
            let (address, family) = store_address(network.address);
            if network.prefix > if family == 4 { 32 } else { 128 } {
                return Err(BatchError::Impossible { field: "networks" });
            }
            raw.network_prefixes[index] = network.prefix;
            raw.network_families[index] = family;
            raw.network_addresses[index * 16..(index + 1) * 16].copy_from_slice(&address);
        }
        Ok(raw)
    }

    fn from_raw(raw: &RawPort, generation: Generation) -> Option<Self> {
        let count = usize::from(raw.network_count);
        if count > NETWORKS || raw.host_port == 0 || raw.flags > 15 {
            return None;
        }
        let observe_only = raw.flags & OBSERVE_ONLY != 0;
        if raw.target_port == 0 && !observe_only {
            return None;
        }
        let mut networks = Vec::with_capacity(count);
        for index in 0..count {
            let mut address = [0; 16];
            address.copy_from_slice(raw.network_addresses.get(index * 16..(index + 1) * 16)?);
            let family = raw.network_families[index];
            let prefix = raw.network_prefixes[index];
            // A prefix that is too long must not widen or narrow the list silently.
            if prefix > if family == 4 { 32 } else { 128 } {
                return None;
            }
            networks.push(ClientNetwork {
                address: load_address(&address, family)?,
                prefix,
            });
        }
        Some(Self {
            protocol: Protocol::from_number(raw.protocol)?,
            host_port: raw.host_port,
            kernel_id: KernelId(raw.kernel_id),
            container_id: ContainerId(raw.container_id),
            service: load_text(raw.service_length, &raw.service)?,
            bind: load_address(&raw.bind_address, raw.bind_family)?,
            target: load_address(&raw.target_address, raw.target_family)?,
            target_port: raw.target_port,
            link_index: raw.link_index,
            link_mac: raw.link_mac,
            observe_only,
            link_guard: raw.flags & LINK_GUARD != 0,
            local_only: raw.flags & LOCAL_ONLY != 0,
            max_sessions: raw.max_sessions,
            idle_timeout_ms: raw.idle_timeout_ms,
            connect_timeout_ms: raw.connect_timeout_ms,
            new_per_second: raw.new_per_second,
            honour_firewall: raw.flags & HONOUR_FIREWALL != 0,
            drain: match raw.drain_policy {
                0 => Drain::Cut,
                1 => Drain::Within { ms: raw.drain_ms },
                _ => return None,
            },
            networks,
            generation,
        })
    }
}

/// Flags of a container's row.
const HOST_NETWORK: u32 = 1;
const PAST_HOST: u32 = 2;

/// A container to be sampled.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerRow {
    /// The row's key.
    pub container_id: ContainerId,
    /// Kernel it runs.
    pub kernel_id: KernelId,
    /// Session of the kernel.
    pub session_id: SessionId,
    /// Host pid of its first process; 0 unknown.
    pub init_pid: u32,
    /// Path below each cgroup root (every v1 controller's and v2's), without a leading slash, at
    /// most 255 bytes, such as `docker/<container id>`.
    pub cgroup_path: String,
    /// It uses the host's network: its links are the host's and not counted as its own.
    pub host_network: bool,
    /// It has links that have no end on this host and lead past it (macvlan, a device of its own): what it answers
    /// may leave by them.
    pub past_host: bool,
    /// Host-side veth interface indexes, at most 8.
    pub link_indexes: Vec<u32>,
    /// Memory limit, bytes; 0 none.
    pub memory_limit_bytes: u64,
    /// CPUs it may use, thousandths; 0 not limited.
    pub cpu_milli: u32,
    /// Scratch directory on the host, at most 255 bytes; empty none.
    pub scratch_path: String,
    /// The batch that wrote the row. Set by the writer.
    pub generation: Generation,
}

impl KeyedRow for ContainerRow {
    type Key = ContainerId;
    type Raw = RawContainer;
    const TABLE: usize = table::CONTAINERS;

    fn key(&self) -> ContainerId {
        self.container_id
    }

    fn generation(&self) -> Generation {
        self.generation
    }

    fn to_raw(&self) -> Result<RawContainer, BatchError> {
        let mut raw = RawContainer {
            state: state::USED,
            flags: u32::from(self.host_network) * HOST_NETWORK
                + u32::from(self.past_host) * PAST_HOST,
            container_id: self.container_id.0,
            kernel_id: self.kernel_id.0,
            session_id: self.session_id.0,
            memory_limit_bytes: self.memory_limit_bytes,
            cpu_milli: self.cpu_milli,
            init_pid: self.init_pid,
            ..RawContainer::default()
        };
        if self.link_indexes.len() > LINKS {
            return Err(BatchError::ListTooLong {
                field: "link_indexes",
                length: self.link_indexes.len(),
                limit: LINKS,
            });
        }
        raw.link_count = u8::try_from(self.link_indexes.len()).unwrap_or(0);
        raw.link_indexes[..self.link_indexes.len()].copy_from_slice(&self.link_indexes);
        if !is_plain_path(&self.cgroup_path) {
            return Err(BatchError::Impossible {
                field: "cgroup_path",
            });
        }
        raw.cgroup_length = store_text("cgroup_path", &self.cgroup_path, &mut raw.cgroup_path)?;
        raw.scratch_length = store_text("scratch_path", &self.scratch_path, &mut raw.scratch_path)?;
        Ok(raw)
    }

    fn from_raw(raw: &RawContainer, generation: Generation) -> Option<Self> {
        if raw.flags > HOST_NETWORK | PAST_HOST {
            return None;
        }
        Some(Self {
            container_id: ContainerId(raw.container_id),
            kernel_id: KernelId(raw.kernel_id),
            session_id: SessionId(raw.session_id),
            init_pid: raw.init_pid,
            cgroup_path: load_text(raw.cgroup_length, &raw.cgroup_path)
                .filter(|path| is_plain_path(path))?,
            host_network: raw.flags & HOST_NETWORK != 0,
            past_host: raw.flags & PAST_HOST != 0,
            link_indexes: raw
                .link_indexes
                .get(..usize::from(raw.link_count))?
                .to_vec(),
            memory_limit_bytes: raw.memory_limit_bytes,
            cpu_milli: raw.cpu_milli,
            scratch_path: load_text(raw.scratch_length, &raw.scratch_path)
                .filter(|path| !path.contains('\0'))?,
            generation,
        })
    }
}

/// A path that stays below the root it is joined to.
fn is_plain_path(path: &str) -> bool {
    !path.starts_with('/') && !path.contains('\0') && !path.split('/').any(|part| part == "..")
}

/// What holds for the whole node. Zero means the dataplane's own default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodeRow {
    /// Time between two samples, ms.
    pub sample_interval_ms: u32,
    /// Drain time when the dataplane itself stops, ms.
    pub drain_ms: u32,
    /// Sessions at once of a port that names no limit.
    pub default_max_sessions: u32,
    /// Sessions at once of all ports.
    pub total_max_sessions: u32,
    /// Idle time of a port that names none, ms.
    pub idle_timeout_ms: u32,
    /// Connect time of a port that names none, ms.
    pub connect_timeout_ms: u32,
}

impl NodeRow {
    pub(super) fn to_raw(self) -> RawNode {
        RawNode {
            state: state::USED,
            sample_interval_ms: self.sample_interval_ms,
            drain_ms: self.drain_ms,
            default_max_sessions: self.default_max_sessions,
            total_max_sessions: self.total_max_sessions,
            idle_timeout_ms: self.idle_timeout_ms,
            connect_timeout_ms: self.connect_timeout_ms,
            reserved: [0; 12],
        }
    }

    pub(super) fn from_raw(raw: &RawNode) -> Self {
        Self {
            sample_interval_ms: raw.sample_interval_ms,
            drain_ms: raw.drain_ms,
            default_max_sessions: raw.default_max_sessions,
            total_max_sessions: raw.total_max_sessions,
            idle_timeout_ms: raw.idle_timeout_ms,
            connect_timeout_ms: raw.connect_timeout_ms,
        }
    }
}
