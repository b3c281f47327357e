//! Links of a container that have no end on this host: those of a swarm's overlay, whose peers are in a
//! namespace of the engine's own, and those that lead past this host (macvlan, a device of its own).
//!
//! In: a process of the container and the host's ends of its other links. Out: which links these are,
//! and what they have counted. Invariants: no namespace is entered, the kernel is asked from here
//! (rtnetlink(7), `IFLA_TARGET_NETNSID`); a namespace is believed to be the container's only if the
//! far end of one of its host-side links is in it.

use rustix::io::Errno;
use shared::netlink::{
    IFLA_INFO_KIND, IFLA_LINK, IFLA_LINKINFO, IFLA_TARGET_NETNSID, NETNSA_NSID, NETNSA_PID,
    RTM_GETNSID, RTM_NEWNSID, is_past_host,
};

use super::asker::Asker;
use super::{
    IFINFO, IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_MASTER, LinkCounters, NLM_F_DUMP, NetlinkError,
    RTEXT_FILTER_SKIP_STATS, RTM_GETLINK, RTM_NEWLINK, attributes, stats64, u16_at, u32_at,
};

/// linux/if_link.h
const IFLA_STATS64: u16 = 23;

/// The links of one container that have no end here nor both in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InnerLinks {
    /// The number this host's namespace has for the container's. It is the container's for as long as
    /// one of its host-side links exists.
    namespace: i32,
    /// Their indexes in it.
    indexes: Vec<u32>,
}

/// A link as its namespace is listed from here.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Listed {
    index: u32,
    veth: bool,
    /// It leads past this host.
    past: bool,
    peer: Option<u32>,
    peer_namespace: Option<i32>,
    enslaved: bool,
}

fn listed(body: &[u8]) -> Option<Listed> {
    let mut found = Listed {
        index: u32_at(body, 4)?,
        ..Listed::default()
    };
    let mut name: &[u8] = &[];
    for (kind, value) in attributes(body.get(IFINFO..)?) {
        match kind {
            IFLA_LINK => found.peer = u32_at(value, 0),
            IFLA_MASTER => found.enslaved = true,
            IFLA_LINK_NETNSID => found.peer_namespace = u32_at(value, 0).map(u32::cast_signed),
            IFLA_LINKINFO => {
                let mut values = attributes(value);
                let kind = values.find(|(kind, _)| *kind == IFLA_INFO_KIND);
                name = kind.map_or(name, |(_, value)| value);
            }
            _ => {}
        }
    }
    found.veth = name.starts_with(b"veth");
    found.past = is_past_host(name, u16_at(body, 2)?, found.peer_namespace.is_some());
    Some(found)
}

/// The links among these that end elsewhere or lead past this host, if it is the namespace of one that ends at `outside`.
/// `here` is the number of this host's own namespace.
fn inner(links: &[Listed], here: i32, outside: &[u32]) -> Vec<u32> {
    let ends_at = |link: &&Listed| {
        link.peer_namespace == Some(here) && link.peer.is_some_and(|peer| outside.contains(&peer))
    };
    if !links.iter().any(|link| ends_at(&link)) {
        return Vec::new();
    }
    let elsewhere = |link: &&Listed| {
        // A port of a bridge inside is the near end of a container's in this container.
        let inner = link.veth && !link.enslaved;
        link.past || inner && link.peer_namespace.is_some_and(|it| it != here)
    };
    let found = links.iter().filter(elsewhere);
    found.map(|link| link.index).collect()
}

/// Asks about links of other namespaces.
#[derive(Debug)]
pub struct InnerStatistics {
    asker: Asker,
}

impl InnerStatistics {
    /// A socket to ask by.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let asker = Asker::open()?;
        Ok(Self { asker })
    }

    /// The links of the container of process `pid` that have no end here nor both in it; none when it has
    /// none, or when the process is not that of the container whose host-side links are `outside`.
    ///
    /// # Errors
    /// The step that failed.
    pub fn find(&mut self, pid: u32, outside: &[u32]) -> Result<Option<InnerLinks>, NetlinkError> {
        let Some(namespace) = self.namespace_of(pid)? else {
            return Ok(None);
        };
        let mut body = vec![0; IFINFO];
        attribute(&mut body, IFLA_TARGET_NETNSID, namespace.cast_unsigned());
        attribute(&mut body, IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        let mut links = Vec::new();
        // A link may be missing from a list that changed meanwhile; a second look is nearly always steady.
        let mut looks = 0..3;
        loop {
            looks.next().ok_or(NetlinkError::Unsteady)?;
            links.clear();
            let steady = self
                .asker
                .ask(RTM_GETLINK, NLM_F_DUMP, &body, |kind, body| {
                    if kind == RTM_NEWLINK {
                        links.extend(listed(body));
                    }
                })?;
            if steady {
                break;
            }
        }
        // The list gave our own namespace a number, if it is a peer's and had none.
        let Some(here) = self.namespace_of(std::process::id())? else {
            return Ok(None);
        };
        let indexes = inner(&links, here, outside);
        Ok((namespace != here && !indexes.is_empty()).then_some(InnerLinks { namespace, indexes }))
    }

    /// What these links have counted together, as their container sees it.
    ///
    /// # Errors
    /// The step that failed; the kernel refuses when a link is gone.
    pub fn read(&mut self, links: &InnerLinks) -> Result<LinkCounters, NetlinkError> {
        let mut sum = LinkCounters::default();
        for index in &links.indexes {
            let mut body = vec![0; IFINFO];
            body[4..8].copy_from_slice(&index.to_ne_bytes());
            attribute(
                &mut body,
                IFLA_TARGET_NETNSID,
                links.namespace.cast_unsigned(),
            );
            let mut counters = None;
            self.asker.ask(RTM_GETLINK, 0, &body, |kind, body| {
                if kind == RTM_NEWLINK {
                    let mut values = attributes(body.get(IFINFO..).unwrap_or_default());
                    let value = values.find(|(kind, _)| *kind == IFLA_STATS64);
                    counters = value.and_then(|(_, value)| stats64(value));
                }
            })?;
            sum += counters.ok_or(NetlinkError::Answer(Errno::NODATA))?;
        }
        Ok(sum)
    }

    /// The number our namespace has for that of a process, if it has one.
    fn namespace_of(&mut self, pid: u32) -> Result<Option<i32>, NetlinkError> {
        // `struct rtgenmsg`, padded.
        let mut body = vec![0; 4];
        attribute(&mut body, NETNSA_PID, pid);
        let mut found = None;
        self.asker.ask(RTM_GETNSID, 0, &body, |kind, body| {
            if kind == RTM_NEWNSID {
                let mut values = attributes(body.get(4..).unwrap_or_default());
                let value = values.find(|(kind, _)| *kind == NETNSA_NSID);
                found = value.and_then(|(_, value)| u32_at(value, 0));
            }
        })?;
        Ok(found.map(u32::cast_signed).filter(|id| *id >= 0))
    }
}

fn attribute(into: &mut Vec<u8>, kind: u16, value: u32) {
    into.extend_from_slice(&8u16.to_ne_bytes());
    into.extend_from_slice(&kind.to_ne_bytes());
    into.extend_from_slice(&value.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_links_that_end_elsewhere_are_inner_ones() {
        const HERE: i32 = 3;
        let veth = |index, peer, peer_namespace| Listed {
            index,
            veth: true,
            peer: Some(peer),
            peer_namespace: Some(peer_namespace),
            ..Listed::default()
        };
        let loopback = Listed {
            index: 1,
            ..Listed::default()
        };
        let mut port = veth(40, 2, 8);
        port.enslaved = true;
        let mut vlan = veth(50, 2, 8);
        vlan.veth = false;
        // A port of a bridge or not, it is the way to others.
        let mut past = vlan.clone();
        (past.index, past.past, past.enslaved) = (60, true, true);
        // The same number may be a link's on this host and one's elsewhere.
        let all = [
            loopback,
            veth(20, 7, HERE),
            veth(30, 7, 5),
            port,
            vlan,
            past,
        ];
        assert_eq!(inner(&all, HERE, &[7]), [30, 60]);
        assert!(inner(&all, HERE, &[8]).is_empty(), "another container's");
        assert!(inner(&all[..2], HERE, &[7]).is_empty());
    }

    #[test]
    fn this_process_is_in_no_container() {
        let mut statistics = InnerStatistics::open().unwrap();
        let found = statistics.find(std::process::id(), &[1]).unwrap();
        assert_eq!(found, None);
        let absent = InnerLinks {
            namespace: i32::MAX,
            indexes: vec![1],
        };
        assert!(statistics.read(&absent).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = listed(&bytes);
            let _ = stats64(&bytes);
        }
    }
}
