//! Interfaces of this network namespace and their addresses, and word of changes to either
//! or to routes.
//!
//! In: answers of rtnetlink(7). Out: [`Interface`]s. Invariant: a list is whole or not given.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::{self, RecvFlags, SocketFlags};
use shared::netlink::{IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO};

use super::asker::Asker;
use super::routes::{RTM_DELROUTE, RTM_NEWROUTE, only_way};
use super::{
    AF_INET, AF_INET6, BUFFER, IFINFO, IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_MASTER, NLM_F_DUMP,
    NetlinkError, RTEXT_FILTER_SKIP_STATS, RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK, RTMGRP_LINK,
    attributes, messages, open, u16_at, u32_at,
};

// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/if_arp.h, linux/if.h
const RTMGRP_IPV4_IFADDR: u32 = 0x10;
const RTMGRP_IPV4_ROUTE: u32 = 0x40;
const RTMGRP_IPV6_IFADDR: u32 = 0x100;
const RTMGRP_IPV6_ROUTE: u32 = 0x400;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_VLAN_FILTERING: u16 = 7;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// `struct ifaddrmsg`.
const IFADDR: usize = 8;
const ARPHRD_ETHER: u16 = 1;
const IFF_UP: u32 = 1;
// linux/netlink.h
const NLM_F_REPLACE: u16 = 0x100;

/// One interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Kind of a virtual one (`veth`, `bridge`, `vlan`); empty for hardware.
    pub kind: String,
    /// It speaks Ethernet.
    pub ethernet: bool,
    /// It is up.
    pub up: bool,
    /// Its hardware address, if that is Ethernet's.
    pub hardware: Option<[u8; 6]>,
    /// It is a bridge that tells VLANs apart.
    pub filters_vlans: bool,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// The bridge or bond it belongs to.
    pub master: Option<u32>,
    /// Its other end is in another network namespace.
    pub peer_elsewhere: bool,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&value[..end.unwrap_or(value.len())]).into_owned()
}

/// Reads `ifinfomsg` and its attributes.
fn interface(body: &[u8]) -> Option<Interface> {
    let mut found = Interface {
        index: u32_at(body, 4)?,
        ethernet: u16_at(body, 2)? == ARPHRD_ETHER,
        up: u32_at(body, 8)? & IFF_UP != 0,
        ..Interface::default()
    };
    for (kind, value) in attributes(body.get(IFINFO..)?) {
        match kind {
            IFLA_IFNAME => found.name = text(value),
            IFLA_ADDRESS => found.hardware = value.try_into().ok(),
            IFLA_MTU => found.mtu = u32_at(value, 0)?,
            IFLA_MASTER => found.master = u32_at(value, 0),
            IFLA_LINK_NETNSID => found.peer_elsewhere = true,
            IFLA_LINKINFO => info(value, &mut found),
            _ => {}
        }
    }
    Some(found)
}

/// Reads what a virtual one says of itself: what kind it is comes first.
fn info(value: &[u8], found: &mut Interface) {
    for (kind, value) in attributes(value) {
        match kind {
            IFLA_INFO_KIND => found.kind = text(value),
            IFLA_INFO_DATA if found.kind == "bridge" => {
                found.filters_vlans = attributes(value)
                    .any(|(kind, value)| kind == IFLA_BR_VLAN_FILTERING && value != [0]);
            }
            _ => {}
        }
    }
}

/// An address of a family, as messages have it.
pub(super) fn ip_of(family: u8, value: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => {
            let octets: [u8; 4] = value.try_into().ok()?;
            Some(IpAddr::V4(Ipv4Addr::from(octets)))
        }
        AF_INET6 => {
            let octets: [u8; 16] = value.try_into().ok()?;
            Some(IpAddr::V6(Ipv6Addr::from(octets)))
        }
        _ => None,
    }
}

/// Reads `ifaddrmsg` and its attributes: whose address, and the address.
fn address(body: &[u8]) -> Option<(u32, IpAddr)> {
    let index = u32_at(body, 4)?;
    let read = |value: &[u8]| ip_of(*body.first()?, value);
    let (mut own, mut other) = (None, None);
    for (kind, value) in attributes(body.get(IFADDR..)?) {
        match kind {
            // On a link with two ends IFA_ADDRESS is the far one.
            IFA_LOCAL => own = read(value),
            IFA_ADDRESS => other = read(value),
            _ => {}
        }
    }
    Some((index, own.or(other)?))
}

/// What may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Addresses, or words of changes were lost: interfaces, and what routes came and went with them.
    pub all: bool,
    /// These interfaces.
    pub links: BTreeSet<u32>,
    /// Routes.
    pub routes: bool,
}

impl Changes {
    fn note(&mut self, datagram: &[u8], is_of_interest: &impl Fn(u32) -> bool) {
        for message in messages(datagram) {
            match message.kind {
                RTM_NEWROUTE | RTM_DELROUTE => {
                    // One that takes the place of another says nothing of that.
                    let replaces = message.flags & NLM_F_REPLACE != 0;
                    let way = only_way(message.body).filter(|_| !replaces);
                    self.routes |= way.is_none_or(is_of_interest);
                }
                RTM_NEWLINK | RTM_DELLINK => match u32_at(message.body, 4) {
                    Some(index) => _ = self.links.insert(index),
                    None => self.all = true,
                },
                _ => {
                    let address = address(message.body).map(|(_, address)| address);
                    self.all |=
                        !matches!(address, Some(IpAddr::V6(it)) if it.is_unicast_link_local());
                }
            }
        }
    }
}

/// Notifications about interfaces, addresses and routes. Reading them takes no lock of the kernel's.
#[derive(Debug)]
pub struct InterfaceWatch {
    watch: OwnedFd,
    buffer: Vec<u8>,
}

impl InterfaceWatch {
    /// Subscribes. What changes from now on will be told.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let groups = RTMGRP_LINK
            | RTMGRP_IPV4_IFADDR
            | RTMGRP_IPV6_IFADDR
            | RTMGRP_IPV4_ROUTE
            | RTMGRP_IPV6_ROUTE;
        let watch = open(groups, SocketFlags::NONBLOCK).map_err(NetlinkError::Open)?;
        Ok(Self {
            watch,
            buffer: vec![0; BUFFER],
        })
    }

    /// Readable when something has changed.
    pub fn watch(&self) -> RawFd {
        self.watch.as_raw_fd()
    }

    /// Takes all waiting notifications. Of routes those count that lead by an interface `of` interest, or by
    /// several. Links' own addresses, which each link of a container gets, do not.
    pub fn changes(&mut self, of: impl Fn(u32) -> bool) -> Changes {
        let mut changed = Changes::default();
        loop {
            match net::recv(&self.watch, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((read, _)) => changed.note(self.buffer.get(..read).unwrap_or_default(), &of),
                Err(Errno::NOBUFS) => changed.all = true,
                Err(Errno::INTR) => {}
                Err(_) => return changed,
            }
        }
    }
}

/// The means to list interfaces and addresses.
#[derive(Debug)]
pub struct Interfaces {
    asker: Asker,
}

impl Interfaces {
    /// A socket to ask by.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            asker: Asker::open()?,
        })
    }

    /// All interfaces with their addresses, by index. Waits for the kernel's interface lock, for as
    /// long as anybody holds it.
    ///
    /// # Errors
    /// The step that failed.
    pub fn list(&mut self) -> Result<BTreeMap<u32, Interface>, NetlinkError> {
        // Interfaces come and go while containers start; a second look is nearly always steady.
        for _ in 0..4 {
            let mut found = BTreeMap::new();
            let mut steady = self.dump(RTM_GETLINK, IFINFO, |kind, body| {
                if kind == RTM_NEWLINK
                    && let Some(it) = interface(body)
                {
                    found.insert(it.index, it);
                }
            })?;
            steady &= self.dump(RTM_GETADDR, IFADDR, |kind, body| {
                if kind == RTM_NEWADDR
                    && let Some((index, address)) = address(body)
                    && let Some(it) = found.get_mut(&index)
                {
                    it.addresses.push(address);
                }
            })?;
            if steady {
                return Ok(found);
            }
        }
        Err(NetlinkError::Unsteady)
    }

    /// One interface without its addresses, if it is there. Waits for the same lock.
    ///
    /// # Errors
    /// The step that failed.
    pub fn one(&mut self, index: u32) -> Result<Option<Interface>, NetlinkError> {
        let mut found = None;
        let asked = self.asker.ask(RTM_GETLINK, 0, &links(index), |kind, body| {
            if kind == RTM_NEWLINK {
                found = interface(body);
            }
        });
        match asked {
            Err(NetlinkError::Refused(Errno::NODEV)) => Ok(None),
            asked => asked.map(|_| found),
        }
    }

    /// One dump; false when the list changed meanwhile.
    fn dump(
        &mut self,
        kind: u16,
        header: usize,
        each: impl FnMut(u16, &[u8]),
    ) -> Result<bool, NetlinkError> {
        let body = match kind {
            RTM_GETLINK => links(0),
            _ => vec![0; header],
        };
        self.asker.ask(kind, NLM_F_DUMP, &body, each)
    }
}

/// Asks for a link, or with 0 for all, without counters.
fn links(index: u32) -> Vec<u8> {
    let mut body = vec![0; IFINFO];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&8_u16.to_ne_bytes());
    body.extend_from_slice(&IFLA_EXT_MASK.to_ne_bytes());
    body.extend_from_slice(&RTEXT_FILTER_SKIP_STATS.to_ne_bytes());
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn loopback_is_listed_with_its_address() {
        let found = Interfaces::open().unwrap().list().unwrap();
        let lo = &found[&1];
        assert_eq!((lo.name.as_str(), lo.ethernet), ("lo", false));
        assert!(
            lo.addresses.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)),
            "{lo:?}"
        );
        let mut interfaces = Interfaces::open().unwrap();
        let alone = interfaces.one(1).unwrap().unwrap();
        let addresses = lo.addresses.clone();
        assert_eq!(&Interface { addresses, ..alone }, lo);
        assert_eq!(interfaces.one(u32::MAX >> 1).unwrap(), None);
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len() + 4).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn bridges_that_tell_vlans_apart_are_known() {
        let read = |kind: &[u8], filters: u8| {
            let data = attribute(IFLA_BR_VLAN_FILTERING, &[filters]);
            let info = [
                attribute(IFLA_INFO_KIND, kind),
                attribute(IFLA_INFO_DATA, &data),
            ];
            let body = [
                vec![0; IFINFO],
                attribute(IFLA_ADDRESS, &[2, 4, 6, 8, 10, 12]),
                attribute(IFLA_LINKINFO, &info.concat()),
            ];
            let found = interface(&body.concat()).unwrap();
            assert_eq!(found.hardware, Some([2, 4, 6, 8, 10, 12]));
            found.filters_vlans
        };
        assert!(read(b"bridge\0", 1));
        assert!(!read(b"bridge\0", 0));
        // The same number is another attribute there.
        assert!(!read(b"vlan\0", 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = interface(&bytes);
            let _ = address(&bytes);
        }
    }
}
