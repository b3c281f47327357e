//! Networks that routes of this network namespace lead to, by interface.
//!
//! In: answers of rtnetlink(7), of all routing tables. Out: [`Networks`] of each interface that is asked
//! about. Invariants: none is named that no route leads to; a host with the routes of the whole internet
//! costs no more memory than `MOST` and what comes in meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::asker::Asker;
use super::interfaces::ip_of;
use super::{AF_INET, AF_INET6, NLM_F_DUMP, NetlinkError, attributes, u16_at, u32_at};

// linux/rtnetlink.h
pub(super) const RTM_NEWROUTE: u16 = 24;
pub(super) const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTN_UNICAST: u8 = 1;
const RTM_F_CLONED: u32 = 0x200;
const RTNH_F_DEAD: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;
const RTA_ENCAP_TYPE: u16 = 21;
/// `struct rtmsg`.
const ROUTE: usize = 12;
/// `struct rtnexthop`.
const NEXT_HOP: usize = 8;

/// Most networks of an interface, for each version of IP. Of more the widest are kept.
const MOST: usize = 1024;
/// So many are collected before those that say nothing new are taken out.
const COLLECTED: usize = 16 * MOST;

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Network {
    /// Its address.
    pub address: IpAddr,
    /// Bits of it that count.
    pub prefix: u8,
}

impl Network {
    fn bits(&self) -> (u128, u8) {
        match self.address {
            IpAddr::V4(v4) => (u128::from(u32::from(v4)) << 96, 32),
            IpAddr::V6(v6) => (u128::from(v6), 128),
        }
    }

    fn holds(&self, other: &Self) -> bool {
        let (own, others) = (self.bits(), other.bits());
        let differ = (own.0 ^ others.0).checked_shr(128 - u32::from(self.prefix));
        own.1 == others.1 && self.prefix <= other.prefix && differ.unwrap_or(0) == 0
    }
}

/// What routes lead to by an interface. No network holds another one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Networks {
    /// The networks.
    pub list: Vec<Network>,
    /// Of which family there are more, narrower ones: IPv4, IPv6.
    cut: [bool; 2],
}

impl Networks {
    /// Whether there are more, narrower ones.
    pub fn is_cut(&self) -> bool {
        self.cut.contains(&true)
    }

    fn add(&mut self, network: Network) {
        self.list.push(network);
        if self.list.len() >= COLLECTED {
            self.settle();
        }
    }

    /// Takes out what another one holds, then the narrowest beyond [`MOST`].
    fn settle(&mut self) {
        // One that holds others is before them.
        self.list.sort_unstable();
        self.list
            .dedup_by(|narrow, wide| wide.holds(narrow) || wide == narrow);
        for (is_ipv4, cut) in [true, false].into_iter().zip(&mut self.cut) {
            let of_family = |it: &&Network| it.address.is_ipv4() == is_ipv4;
            let mut prefixes: Vec<u8> = self
                .list
                .iter()
                .filter(of_family)
                .map(|it| it.prefix)
                .collect();
            if prefixes.len() <= MOST {
                // One that holds all others is not missing any that was left out before it came.
                *cut &= !prefixes.contains(&0);
                continue;
            }
            *cut = true;
            prefixes.sort_unstable();
            let longest = prefixes[MOST - 1];
            let mut room = MOST - prefixes.partition_point(|it| *it < longest);
            self.list.retain(|it| {
                if !of_family(&it) || it.prefix != longest {
                    return !of_family(&it) || it.prefix < longest;
                }
                let keep = room > 0;
                room -= usize::from(keep);
                keep
            });
        }
    }
}

/// Reads `rtmsg` and its attributes: a network, and each interface by which its hosts are sent what is
/// theirs as it is. Others are of no use here: those that want an envelope, hold for some senders or
/// services alone, or drop.
fn route(body: &[u8], mut each: impl FnMut(u32, Network)) -> Option<()> {
    let header = body.get(..ROUTE)?;
    let (family, prefix, source, service, kind) =
        (header[0], header[1], header[2], header[3], header[7]);
    let flags = u32_at(header, 8)?;
    let dead = u32::from(RTNH_F_DEAD);
    if kind != RTN_UNICAST || source != 0 || service != 0 || flags & (RTM_F_CLONED | dead) != 0 {
        return None;
    }
    let mut address = match family {
        AF_INET => IpAddr::from([0; 4]),
        AF_INET6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    if prefix > if address.is_ipv4() { 32 } else { 128 } {
        return None;
    }
    let (mut interface, mut hops) = (None, None);
    for (kind, value) in attributes(body.get(ROUTE..)?) {
        match kind {
            RTA_DST => address = ip_of(family, value)?,
            RTA_OIF => interface = u32_at(value, 0),
            RTA_MULTIPATH => hops = Some(value),
            RTA_ENCAP_TYPE => return None,
            _ => {}
        }
    }
    let network = Network { address, prefix };
    if let Some(interface) = interface {
        each(interface, network);
    }
    let mut rest = hops.unwrap_or_default();
    while let Some(length) = u16_at(rest, 0).map(usize::from) {
        let hop = rest.get(..length.max(NEXT_HOP))?;
        let plain = attributes(&hop[NEXT_HOP..]).all(|(kind, _)| kind != RTA_ENCAP_TYPE);
        if plain && hop[2] & RTNH_F_DEAD == 0 {
            each(u32_at(hop, 4)?, network);
        }
        rest = rest
            .get(length.max(NEXT_HOP).next_multiple_of(4)..)
            .unwrap_or_default();
    }
    Some(())
}

/// The interface that a route leads by, if it says so and no other.
pub(super) fn only_way(body: &[u8]) -> Option<u32> {
    let mut way = None;
    for (kind, value) in attributes(body.get(ROUTE..)?) {
        match kind {
            RTA_OIF => way = u32_at(value, 0),
            RTA_MULTIPATH => return None,
            _ => {}
        }
    }
    way
}

/// The means to list routes.
#[derive(Debug)]
pub struct Routes {
    asker: Asker,
}

impl Routes {
    /// A socket to ask by.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            asker: Asker::open()?,
        })
    }

    /// What routes lead to by each of these interfaces; all of them are answered. May wait for the kernel's
    /// interface lock, and takes a second for each million of routes. Word of a change comes for what
    /// changes meanwhile.
    ///
    /// # Errors
    /// The step that failed.
    pub fn list(
        &mut self,
        interfaces: &BTreeSet<u32>,
    ) -> Result<BTreeMap<u32, Networks>, NetlinkError> {
        let none = |index: &u32| (*index, Networks::default());
        let mut found: BTreeMap<u32, Networks> = interfaces.iter().map(none).collect();
        if found.is_empty() {
            return Ok(found);
        }
        for family in [AF_INET, AF_INET6] {
            let mut body = [0; ROUTE];
            body[0] = family;
            self.asker
                .ask(RTM_GETROUTE, NLM_F_DUMP, &body, |kind, body| {
                    if kind == RTM_NEWROUTE {
                        route(body, |interface, network| {
                            if let Some(networks) = found.get_mut(&interface) {
                                networks.add(network);
                            }
                        });
                    }
                })?;
        }
        found.values_mut().for_each(Networks::settle);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Network {
        let (address, prefix) = text.split_once('/').unwrap();
        Network {
            address: address.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
        }
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut out = u16::try_from(4 + value.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        out.extend(kind.to_ne_bytes());
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    /// `struct rtmsg` with family, prefix, kind, and attributes.
    fn message(family: u8, prefix: u8, kind: u8, all: &[(u16, &[u8])]) -> Vec<u8> {
        let mut out = vec![family, prefix, 0, 0, 254, 3, 0, kind, 0, 0, 0, 0];
        out.extend(all.iter().flat_map(|(kind, value)| attribute(*kind, value)));
        out
    }

    fn read(body: &[u8]) -> Vec<(u32, Network)> {
        let mut found = Vec::new();
        route(body, |interface, network| found.push((interface, network)));
        found
    }

    #[test]
    fn routes_are_read_with_all_their_ways() {
        let two: &[u8] = &2_u32.to_ne_bytes();
        let net: &[u8] = &[10, 5, 0, 0];
        let plain = message(AF_INET, 16, RTN_UNICAST, &[(RTA_DST, net), (RTA_OIF, two)]);
        assert_eq!(read(&plain), [(2, network("10.5.0.0/16"))]);
        let default = message(AF_INET6, 0, RTN_UNICAST, &[(RTA_OIF, two)]);
        assert_eq!(read(&default), [(2, network("::/0"))]);
        // Of several ways those that are dead, or want an envelope, are left out.
        let hop = |flags: u8, interface: u32, more: &[u8]| {
            let length = u16::try_from(NEXT_HOP + more.len()).unwrap();
            let mut out = length.to_ne_bytes().to_vec();
            out.extend([flags, 0]);
            out.extend(interface.to_ne_bytes());
            out.extend(more);
            out
        };
        let envelope = attribute(RTA_ENCAP_TYPE, &[1, 0]);
        let gateway = attribute(5, &[10, 5, 0, 1]);
        let ways = [
            hop(0, 2, &gateway),
            hop(RTNH_F_DEAD, 3, &gateway),
            hop(0, 4, &envelope),
            hop(0, 5, &[]),
        ]
        .concat();
        let several = message(AF_INET, 0, RTN_UNICAST, &[(RTA_MULTIPATH, &ways)]);
        let all = network("0.0.0.0/0");
        assert_eq!(read(&several), [(2, all), (5, all)]);
        // None: what drops, what is the host's own, what wants an envelope, what is a memory of a host's.
        for kind in [2, 6, 7, 8] {
            assert!(read(&message(AF_INET, 0, kind, &[(RTA_OIF, two)])).is_empty());
        }
        let mut wrapped = default.clone();
        wrapped.extend(&envelope);
        assert!(read(&wrapped).is_empty());
        for (at, value) in [(1, 129), (2, 64), (3, 4), (8, RTNH_F_DEAD), (9, 2)] {
            let mut other = default.clone();
            other[at] = value;
            assert!(read(&other).is_empty(), "{at}");
        }
    }

    #[test]
    fn networks_in_others_say_nothing_new_and_the_widest_are_kept() {
        let mut few = Networks::default();
        for text in [
            "10.5.3.0/24",
            "::/0",
            "10.4.0.0/15",
            "fd00::/8",
            "10.6.0.0/16",
            "10.5.3.0/24",
        ] {
            few.add(network(text));
        }
        few.settle();
        let expected = ["10.4.0.0/15", "10.6.0.0/16", "::/0"].map(network);
        assert_eq!((&few.list[..], few.is_cut()), (&expected[..], false));

        let mut many = Networks::default();
        let wide = network("2001:db8::/32");
        many.add(wide);
        for number in 0..3 * u32::try_from(COLLECTED).unwrap() {
            let address = (0x0b00_0000 + number * 256).to_be_bytes().into();
            many.add(Network {
                address,
                prefix: 24,
            });
            assert!(many.list.len() < COLLECTED);
        }
        many.add(network("11.0.0.0/10"));
        many.settle();
        assert_eq!(many.list.len(), MOST + 1);
        assert!(many.is_cut() && many.list.contains(&wide));
        assert!(many.list.contains(&network("11.0.0.0/10")));
        many.add(network("0.0.0.0/0"));
        many.settle();
        assert_eq!(many.list, [network("0.0.0.0/0"), wide]);
        assert!(!many.is_cut(), "it holds all that were left out");
    }

    #[test]
    fn all_that_are_asked_about_are_answered() {
        let asked = BTreeSet::from([1, 9_999_999]);
        let found = Routes::open().unwrap().list(&asked).unwrap();
        assert!(found.keys().eq(&asked));
        assert_eq!(found[&9_999_999], Networks::default());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }
    }
}
