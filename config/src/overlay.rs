//! What a cluster sets for its agents in etcd, laid over the file.
//!
//! In: texts by section and key, with the scope they were found in. Out: tables that are read like
//! sections of the file. Invariant, as in the original: once `config/agent` has any key, the sections
//! it may hold are taken from etcd alone; what etcd leaves out of them has its default.

use std::net::IpAddr;

use crate::document::{Entry, Table, Value};
use crate::spelling::nearest;
use crate::units::Fault;

/// Sections that `config/agent` replaces.
pub const AGENT_SECTIONS: [&str; 3] = ["api", "container-logs", "kernel-lifecycles"];

/// Keys that are no settings are told up to this many, and up to this length.
const MOST_UNREAD: usize = 64;
const LONGEST_KEY: usize = 200;
/// What is read below `config/container`.
const CONTAINER_KEYS: [&str; 2] = ["kernel-uid", "kernel-gid"];

fn unknown<const N: usize>(name: &str, known: [&'static str; N]) -> String {
    let ignored = "is not a known key and is ignored";
    match nearest(name, known) {
        Some(word) => format!("{ignored}; did you mean {word:?}?"),
        None => format!("{ignored}; known are {}", known.join(", ")),
    }
}

/// What etcd says. The default changes nothing.
#[derive(Debug, Clone, Default)]
pub struct Overlay {
    agent: Option<Vec<Replaced>>,
    container: Vec<(String, ScopedValue)>,
    agent_subnet: Option<String>,
    container_subnet: Option<String>,
    unread: Vec<Unread>,
}

/// A key of etcd that stands where settings are read and is none.
#[derive(Debug, Clone)]
pub(crate) struct Unread {
    pub key: String,
    pub scope: &'static str,
    pub why: String,
}

#[derive(Debug, Clone)]
struct Replaced {
    section: &'static str,
    scope: &'static str,
    table: Table,
}

/// A value and the name of the scope it was found in.
#[derive(Debug, Clone)]
pub(crate) struct ScopedValue {
    pub value: Value,
    pub scope: &'static str,
}

impl Overlay {
    /// `config/agent` has keys: its sections replace those of the file.
    pub fn replace_agent_sections(&mut self) {
        self.agent.get_or_insert_default();
    }

    /// A key of etcd that is not read, and why; it is told in the notes.
    pub fn leave_out(&mut self, key: &str, scope: &'static str, why: impl Into<String>) {
        if self.unread.len() < MOST_UNREAD {
            let shown = key.chars().take(LONGEST_KEY).flat_map(char::escape_debug);
            self.unread.push(Unread {
                key: shown.collect(),
                scope,
                why: why.into(),
            });
        }
    }

    /// `config/agent/{section}/{key}`. Sections that agents do not read are told in the notes.
    pub fn set_agent(&mut self, section: &str, key: &str, text: &str, scope: &'static str) {
        let replaced = self.agent.get_or_insert_default();
        let name = crate::section::kebab(section);
        let Some(section) = AGENT_SECTIONS.into_iter().find(|known| *known == name) else {
            let why = unknown(&name, AGENT_SECTIONS);
            return self.leave_out(&format!("config/agent/{section}/{key}"), scope, why);
        };
        let entry = Entry {
            key: key.to_owned(),
            line: 0,
            value: Value::text(0, text),
        };
        match replaced.iter_mut().find(|known| known.section == section) {
            Some(known) => known.table.entries.push(entry),
            None => replaced.push(Replaced {
                section,
                scope,
                table: Table {
                    entries: vec![entry],
                },
            }),
        }
    }

    /// `config/container/{key}`; `kernel-uid` and `kernel-gid` are read.
    pub fn set_container(&mut self, key: &str, text: &str, scope: &'static str) {
        let name = crate::section::kebab(key);
        if !CONTAINER_KEYS.contains(&name.as_str()) {
            let why = unknown(&name, CONTAINER_KEYS);
            return self.leave_out(&format!("config/container/{key}"), scope, why);
        }
        let value = Value::text(0, text);
        self.container.push((name, ScopedValue { value, scope }));
    }

    /// `config/network/subnet/agent`: where the RPC address lies when it is to be detected.
    pub fn set_agent_subnet(&mut self, text: Option<String>) {
        self.agent_subnet = text;
    }

    /// `config/network/subnet/container`: the same of the address that ports are bound to.
    pub fn set_container_subnet(&mut self, text: Option<String>) {
        self.container_subnet = text;
    }

    pub(crate) fn without_agent_sections(&self) -> Overlay {
        Overlay {
            agent: None,
            ..self.clone()
        }
    }

    pub(crate) fn unread(&self) -> &[Unread] {
        &self.unread
    }

    /// The table and scope that take the place of a section of the file; an empty table is there
    /// for a section that etcd does not name.
    pub(crate) fn section(&self, name: &str) -> Option<(Option<&Table>, &'static str)> {
        let replaced = self.agent.as_ref()?;
        if !AGENT_SECTIONS.contains(&name) {
            return None;
        }
        let found = replaced.iter().find(|known| known.section == name);
        Some((
            found.map(|known| &known.table),
            found.map_or("", |known| known.scope),
        ))
    }

    pub(crate) fn container(&self, key: &str) -> Option<&ScopedValue> {
        let mut found = self.container.iter().filter(|(name, _)| name == key);
        found.next().map(|(_, found)| found)
    }

    pub(crate) fn agent_subnet(&self) -> Result<Option<Subnet>, Fault> {
        self.agent_subnet.as_deref().map_or(Ok(None), Subnet::parse)
    }

    pub(crate) fn container_subnet(&self) -> Result<Option<Subnet>, Fault> {
        self.container_subnet
            .as_deref()
            .map_or(Ok(None), Subnet::parse)
    }
}

/// Addresses that begin alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subnet {
    network: IpAddr,
    prefix: u8,
}

impl Subnet {
    /// None for the network of all addresses, which says nothing.
    fn parse(text: &str) -> Result<Option<Subnet>, Fault> {
        let bad = || {
            Fault::new(
                format!("the subnet {text:?} is no network"),
                "write one such as 10.0.0.0/16 to etcd, or remove the key",
            )
        };
        let (network, prefix) = text.trim().split_once('/').ok_or_else(bad)?;
        let network: IpAddr = network.parse().map_err(|_| bad())?;
        let prefix: u8 = prefix.parse().map_err(|_| bad())?;
        let longest = if network.is_ipv4() { 32 } else { 128 };
        if prefix > longest {
            return Err(bad());
        }
        Ok((prefix > 0).then_some(Subnet { network, prefix }))
    }

    pub(crate) fn holds(&self, address: IpAddr) -> bool {
        let same = |own: u128, other: u128, bits: u32| {
            let shift = bits - u32::from(self.prefix);
            own.checked_shr(shift) == other.checked_shr(shift)
        };
        match (self.network, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                same(u32::from(own).into(), u32::from(other).into(), 32)
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => same(own.into(), other.into(), 128),
            _ => false,
        }
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_hold_their_addresses() {
        let holds = |subnet: &str, address: &str| {
            let subnet = Subnet::parse(subnet).unwrap().unwrap();
            subnet.holds(address.parse().unwrap())
        };
        assert!(holds("10.1.0.0/16", "10.1.2.3"));
        assert!(!holds("10.1.0.0/16", "10.2.2.3"));
        assert!(holds("10.1.2.3/32", "10.1.2.3"));
        assert!(holds("fd00::/8", "fd12::1"));
        assert!(!holds("fd00::/8", "10.1.2.3"));
        assert_eq!(Subnet::parse("0.0.0.0/0").unwrap(), None);
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "x/8",
            "::/129",
            "10.0.0.0/-1",
        ] {
            assert!(Subnet::parse(text).is_err(), "{text}");
        }
    }
}
