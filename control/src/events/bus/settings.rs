//! Where the bus is: the plain settings that whoever reads the cluster's configuration fills in.
//!
//! Invariant: database numbers belong to roles and cannot be configured.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use config::Secret;
use thiserror::Error;

/// Everything the bus needs to know before it starts.
#[derive(Clone, Debug)]
pub struct BusSettings {
    /// Source of every event: the manager takes it as this node's identity.
    pub agent_id: String,
    /// The server of every role without one of its own.
    pub server: BusServer,
    /// Servers of single roles (`override_configs`).
    pub overrides: BTreeMap<Role, BusServer>,
    /// How long a connection may take, name resolution and log-in included.
    pub connect_timeout: Duration,
    /// How long a command may take on an established connection.
    pub command_timeout: Duration,
    /// Directory of the outbox; `None` keeps waiting events in memory only.
    pub outbox_dir: Option<PathBuf>,
}

impl BusSettings {
    /// Settings for one server, with the deadlines that suit a local network.
    #[must_use]
    pub fn new(agent_id: impl Into<String>, server: BusServer) -> Self {
        Self {
            agent_id: agent_id.into(),
            server,
            overrides: BTreeMap::new(),
            connect_timeout: Duration::from_secs(3),
            command_timeout: Duration::from_secs(5),
            outbox_dir: None,
        }
    }

    /// The server of a role.
    #[must_use]
    pub fn server_of(&self, role: Role) -> &BusServer {
        self.overrides.get(&role).unwrap_or(&self.server)
    }
}

/// One Redis or Valkey, reached directly or through sentinels.
#[derive(Clone, Debug)]
pub struct BusServer {
    /// Where.
    pub endpoint: Endpoint,
    /// User of an ACL; none is the default user.
    pub username: Option<String>,
    /// Password, the same for sentinels.
    pub password: Option<Secret>,
    /// Encryption; none is plain TCP.
    pub tls: Option<BusTls>,
}

impl BusServer {
    /// A server without log-in and encryption.
    #[must_use]
    pub fn plain(host: impl Into<String>, port: u16) -> Self {
        Self {
            endpoint: Endpoint::Direct(HostPort {
                host: host.into(),
                port,
            }),
            username: None,
            password: None,
            tls: None,
        }
    }
}

/// How the server is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// At a fixed address.
    Direct(HostPort),
    /// By asking sentinels who the master is.
    Sentinels {
        /// Asked one after the other, the next one when the last has not answered for a moment.
        addresses: Vec<HostPort>,
        /// Name of the master's group.
        service_name: String,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Direct(address) => address.fmt(f),
            Endpoint::Sentinels {
                addresses,
                service_name,
            } => {
                write!(f, "{service_name} of ")?;
                for (n, address) in addresses.iter().enumerate() {
                    write!(f, "{}{address}", if n == 0 { "" } else { "," })?;
                }
                Ok(())
            }
        }
    }
}

/// Encryption towards the server and the sentinels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BusTls {
    /// Accept any certificate.
    pub skip_verify: bool,
    /// PEM file of the authorities to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
}

/// `host:port`, IPv6 hosts in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Text that is no `host:port`.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0:?} is no address of the form host:port")]
pub struct HostPortError(String);

impl FromStr for HostPort {
    type Err = HostPortError;

    fn from_str(text: &str) -> Result<Self, HostPortError> {
        let refuse = || HostPortError(text.to_owned());
        let (host, port) = text.trim().rsplit_once(':').ok_or_else(refuse)?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match bracketed {
            Some(inner) => inner,
            None if host.contains(':') => return Err(refuse()),
            None => host,
        };
        let port = port.parse().map_err(|_| refuse())?;
        if host.is_empty() || port == 0 {
            return Err(refuse());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// What a database is for. The cluster's configuration may give each role a server of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Statistics, metadata, service discovery.
    Statistics,
    /// Not used by agents.
    RateLimit,
    /// The manager's view of liveness; here only the server counts, for service discovery.
    Live,
    /// The manager's sets of images.
    Image,
    /// Events.
    Stream,
    /// Not used by agents.
    StreamLock,
    /// Logs of ended containers.
    ContainerLog,
    /// Registry of background tasks.
    Bgtask,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 8] = [
        Role::Statistics,
        Role::RateLimit,
        Role::Live,
        Role::Image,
        Role::Stream,
        Role::StreamLock,
        Role::ContainerLog,
        Role::Bgtask,
    ];

    /// The database's number, the same in every cluster.
    #[must_use]
    pub fn database(self) -> u8 {
        match self {
            Role::Statistics => 0,
            Role::RateLimit => 1,
            Role::Live => 2,
            Role::Image => 3,
            Role::Stream => 4,
            Role::StreamLock => 5,
            Role::ContainerLog => 6,
            Role::Bgtask => 7,
        }
    }

    /// The name under `override_configs`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Statistics => "statistics",
            Role::RateLimit => "rate_limit",
            Role::Live => "live",
            Role::Image => "image",
            Role::Stream => "stream",
            Role::StreamLock => "stream_lock",
            Role::ContainerLog => "container_log",
            Role::Bgtask => "bgtask",
        }
    }

    /// The role of a name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|role| role.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, host, port) in [
            ("127.0.0.1:6379", "127.0.0.1", 6379),
            ("redis.cluster.local:1", "redis.cluster.local", 1),
            ("[::1]:6379", "::1", 6379),
        ] {
            let address: HostPort = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port));
            assert_eq!(address.to_string(), text);
        }
        for text in [
            "",
            "redis",
            ":6379",
            "redis:",
            "redis:0",
            "redis:70000",
            "::1:6379",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn roles_have_their_numbers_and_overrides() {
        let numbers: Vec<u8> = Role::ALL.iter().map(|role| role.database()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(Role::from_name("container_log"), Some(Role::ContainerLog));
        assert_eq!(Role::from_name("containerlog"), None);
        let mut settings = BusSettings::new("i-x", BusServer::plain("a", 1));
        let own = BusServer::plain("b", 2);
        settings.overrides.insert(Role::Stream, own);
        assert_eq!(settings.server_of(Role::Stream).endpoint.to_string(), "b:2");
        assert_eq!(settings.server_of(Role::Live).endpoint.to_string(), "a:1");
    }
}
