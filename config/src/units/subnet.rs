//! Networks: `10.0.0.0/8`, `2001:db8::/32`, or a single address.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use super::Fault;

/// A network, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// Its address; no bit beyond the prefix is set.
    pub address: IpAddr,
    /// Length of the prefix in bits.
    pub prefix: u8,
}

const REMEDY: &str = "write a network such as 10.0.0.0/8 or 2001:db8::/32, or one address";

impl FromStr for Subnet {
    type Err = Fault;

    fn from_str(text: &str) -> Result<Self, Fault> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address
            .trim()
            .parse()
            .map_err(|_| Fault::new("the address makes no sense", REMEDY))?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix.map(|it| it.trim().parse::<u8>()) {
            None => most,
            Some(Ok(prefix)) if prefix <= most => prefix,
            Some(_) => return Err(Fault::new("the prefix length makes no sense", REMEDY)),
        };
        let bits = match address {
            IpAddr::V4(v4) => u128::from(u32::from(v4)) << 96,
            IpAddr::V6(v6) => u128::from(v6),
        };
        if bits.checked_shl(u32::from(prefix)).unwrap_or(0) != 0 {
            // It would let in others than are written there.
            return Err(Fault::new(
                "bits beyond the prefix are set",
                "write the network's own address, with zeros beyond the prefix",
            ));
        }
        Ok(Self { address, prefix })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_shown() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::1", "::1/128"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(text.parse::<Subnet>().unwrap().to_string(), shown);
        }
        for text in [
            "",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "host",
            "::1/129",
            "10/8",
            "1.2.3.4/",
            "1.2.3.4/-1",
        ] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }
}
