//! The units a configuration value can be written in: sizes, intervals, addresses, port ranges,
//! secrets. Each parser is strict, total (never panics) and says why it refused and what would do.

mod host_port;
mod interval;
mod port_range;
mod proxy_url;
mod secret;
mod size;
mod subnet;

pub use host_port::HostPort;
pub use interval::parse_interval;
pub(crate) use interval::{interval_from_seconds, interval_text};
pub use port_range::PortRange;
pub use proxy_url::ProxyUrl;
pub use secret::{Secret, SecretFileError, read_secret_file};
pub(crate) use secret::{mask_password, only_for_its_owner};
pub use size::ByteSize;
pub use subnet::Subnet;

/// Why a value was refused, and what would be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}; {remedy}")]
pub struct Fault {
    /// What is wrong with the value.
    pub why: String,
    /// What would do instead.
    pub remedy: String,
}

impl Fault {
    pub(crate) fn new(why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            remedy: remedy.into(),
        }
    }
}
