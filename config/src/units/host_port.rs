//! An address as `host:port`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::Fault;

/// A host (name, IP literal or blank for "detect it") and a port.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Host name or IP literal, the latter normalised and without brackets. May be blank.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

const REMEDY: &str = "write { host = \"10.0.0.5\", port = 6001 } or \"10.0.0.5:6001\"";

impl HostPort {
    /// An address from checked parts; the caller's host is used as it is.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
        }
    }

    /// The host as an IP address, when it is a literal.
    pub fn ip(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// True for `0.0.0.0` and `::`.
    pub fn is_unspecified(&self) -> bool {
        self.ip().is_some_and(|ip| ip.is_unspecified())
    }

    pub(crate) fn parse_host(text: &str) -> Result<String, Fault> {
        let bare = match text.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(Some(inner)) => inner,
            Some(None) => return Err(Fault::new("a bracket is not closed", REMEDY)),
            None => text,
        };
        if let Ok(ip) = bare.parse::<IpAddr>() {
            return Ok(ip.to_string());
        }
        let allowed =
            |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '%' | ':');
        if bare.len() > 253 {
            return Err(Fault::new("a host name has at most 253 characters", REMEDY));
        }
        if bare != text || !bare.chars().all(allowed) {
            return Err(Fault::new(
                "the host is neither a name nor an IP address",
                REMEDY,
            ));
        }
        // A colon belongs in an IPv6 literal only, there with an optional zone.
        if bare.contains([':', '%'])
            && bare.split_once('%').is_none_or(|(ip, zone)| {
                !matches!(ip.parse(), Ok(IpAddr::V6(_)))
                    || zone.is_empty()
                    || zone.contains([':', '%'])
            })
        {
            return Err(Fault::new(
                "the host is neither a name nor an IP address",
                REMEDY,
            ));
        }
        Ok(bare.to_owned())
    }

    pub(crate) fn parse_port(text: &str) -> Result<u16, Fault> {
        match text.trim().parse::<u16>() {
            Ok(port) if port > 0 && !text.trim().starts_with('+') => Ok(port),
            _ => Err(Fault::new(
                "the port is not a number from 1 to 65535",
                REMEDY,
            )),
        }
    }
}

impl FromStr for HostPort {
    type Err = Fault;

    /// Splits at the last colon, as the original does.
    fn from_str(text: &str) -> Result<Self, Fault> {
        let (host, port) = text
            .rsplit_once(':')
            .ok_or_else(|| Fault::new("the port is missing", REMEDY))?;
        Ok(Self {
            host: Self::parse_host(host)?,
            port: Self::parse_port(port)?,
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_text_form_splits_at_the_last_colon() {
        for (text, host, port) in [
            ("10.0.0.5:6001", "10.0.0.5", 6001),
            (":6001", "", 6001),
            ("[::1]:6003", "::1", 6003),
            ("::1:6003", "::1", 6003),
            ("node_1.example:1", "node_1.example", 1),
            ("[0:0:0:0:0:0:0:1]:80", "::1", 80),
            ("fe80::1%eth0:80", "fe80::1%eth0", 80),
        ] {
            assert_eq!(
                text.parse::<HostPort>().unwrap(),
                HostPort::new(host, port),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        for text in [
            "",
            "10.0.0.5",
            "h:0",
            "h:65536",
            "h:+1",
            "h:-1",
            "h:",
            "a b:1",
            "[::1:1",
            "http://h:1",
            "u:p@h:1",
            "a:b:1",
            "[name]:1",
            "h/x:1",
        ] {
            assert!(text.parse::<HostPort>().is_err(), "{text}");
        }
    }

    #[test]
    fn ipv6_is_shown_with_brackets() {
        let addr: HostPort = "::1:6003".parse().unwrap();
        assert_eq!(addr.to_string(), "[::1]:6003");
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,60}") {
            let _ = text.parse::<HostPort>();
        }

        #[test]
        fn what_is_shown_parses_back(host in "[a-z0-9.-]{0,20}", port in 1u16..) {
            let addr = HostPort::new(host, port);
            prop_assert_eq!(addr.to_string().parse::<HostPort>().unwrap(), addr);
        }

        #[test]
        fn ipv6_parses_back(bits in any::<u128>(), port in 1u16..) {
            let addr = HostPort::new(std::net::Ipv6Addr::from(bits).to_string(), port);
            prop_assert_eq!(addr.to_string().parse::<HostPort>().unwrap(), addr);
        }
    }
}
