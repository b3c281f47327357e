//! Where a storage proxy is: `http://host:port` or `https://host:port`.

use std::fmt;
use std::str::FromStr;

use super::{Fault, HostPort};

/// The address of an HTTP API that lies at the root of its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    /// Whether the connection is encrypted.
    pub tls: bool,
    /// Host and port.
    pub address: HostPort,
}

const REMEDY: &str = "write \"https://10.0.0.5:6022\"";
/// Of the manager-facing API, unless its configuration names another.
const DEFAULT_PORT: u16 = 6022;

impl FromStr for ProxyUrl {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let (tls, rest) = match (text.strip_prefix("https://"), text.strip_prefix("http://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => {
                return Err(Fault::new(
                    "the address begins with neither http:// nor https://",
                    REMEDY,
                ));
            }
        };
        let place = rest.strip_suffix('/').unwrap_or(rest);
        if place.contains('@') {
            return Err(Fault::new(
                "the address holds a user",
                "remove it; the secret belongs in secret-file",
            ));
        }
        if place.contains(['/', '?', '#', '%']) {
            return Err(Fault::new(
                "the address goes on after host and port",
                REMEDY,
            ));
        }
        let with_port = match place.rsplit_once(':') {
            Some((host, _)) if !host.contains(':') || host.ends_with(']') => place.to_owned(),
            _ => format!("{place}:{DEFAULT_PORT}"),
        };
        let address: HostPort = with_port
            .parse()
            .map_err(|fault: Fault| Fault::new(fault.why, REMEDY))?;
        if address.host.is_empty() || address.is_unspecified() {
            return Err(Fault::new("the host is missing", REMEDY));
        }
        Ok(Self { tls, address })
    }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for (text, shown) in [
            (
                "https://storage.example:6022",
                "https://storage.example:6022",
            ),
            ("http://127.0.0.1:6022/", "http://127.0.0.1:6022"),
            ("https://storage.example", "https://storage.example:6022"),
            ("https://[fd00::5]:443", "https://[fd00::5]:443"),
            ("https://[fd00::5]", "https://[fd00::5]:6022"),
        ] {
            let url: ProxyUrl = text.parse().unwrap();
            assert_eq!(url.to_string(), shown, "{text}");
            assert_eq!(url.tls, text.starts_with("https"), "{text}");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "storage.example:6022",
            "ftp://h:1",
            "https://",
            "https://:6022",
            "https://h:0",
            "https://h:port",
            "https://me:secret@h:1",
            "https://h:1/path",
            "https://h:1?x",
            "https://0.0.0.0:1",
        ] {
            let fault = text.parse::<ProxyUrl>().unwrap_err();
            assert!(!fault.why.contains("secret@"), "{fault}");
        }
    }
}
