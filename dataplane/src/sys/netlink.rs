//! Routing netlink: which interfaces go away, and what all of them have counted.
//!
//! In: messages of the kernel (rtnetlink(7), linux/if_link.h). Out: interface indexes and
//! counters, for the network namespace of this process. Invariants: only the kernel's own messages
//! are believed (the sender's port is checked); a lost notification is reported as an overflow,
//! never passed over; every wait for an answer has a deadline.

mod asker;
pub mod inner;
pub mod interfaces;
pub mod queueing;
pub mod routes;
pub mod sockets;
pub mod stale_connections;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt;
use rustix::net::{self, AddressFamily, RecvFlags, SocketFlags, SocketType};
use shared::netlink::{
    IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_MASTER, NLA_TYPE_MASK, NLM_F_DUMP, NLM_F_DUMP_INTR,
    NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, RTEXT_FILTER_SKIP_STATS, RTM_GETLINK, RTM_NEWLINK,
};

use asker::Asker;

/// linux/rtnetlink.h: the bit of the link notifications in a subscription.
const RTMGRP_LINK: u32 = 1;
const RTM_DELLINK: u16 = 17;
const RTM_NEWSTATS: u16 = 92;
const RTM_GETSTATS: u16 = 94;
/// linux/if_link.h: `struct rtnl_link_stats64`, as attribute and as filter bit.
const IFLA_STATS_LINK_64: u16 = 1;
const FILTER_LINK_64: u32 = 1;

/// linux/socket.h
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

const HEADER: usize = 16;
/// `struct ifinfomsg`.
const IFINFO: usize = 16;
/// `struct if_stats_msg`.
const IFSTATS: usize = 12;

/// Room for one answer; the kernel fills at most 32 KiB per message of a dump.
const BUFFER: usize = 64 * 1024;
/// How long the kernel may take for one answer, which it gives from memory. It takes the interface lock
/// inside the calls that ask and read, and no time limit ends that wait.
const ANSWER: Duration = Duration::from_secs(2);

/// A failed step of talking netlink.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket.
    #[error("cannot open a netlink socket")]
    Open(#[source] Errno),
    /// The request was not taken.
    #[error("cannot ask for link statistics")]
    Ask(#[source] Errno),
    /// No answer, or an interrupted one.
    #[error("cannot read the answer about link statistics")]
    Answer(#[source] Errno),
    /// The kernel refused.
    #[error("the kernel refused to list link statistics")]
    Refused(#[source] Errno),
    /// Links came and went all the time while they were listed.
    #[error("the list of links changed while it was read, several times in a row")]
    Unsteady,
}

fn open(groups: u32, flags: SocketFlags) -> Result<OwnedFd, Errno> {
    let fd = net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        flags | SocketFlags::CLOEXEC,
        None,
    )?;
    net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
    Ok(fd)
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    let field = bytes.get(offset..offset + 2)?;
    Some(u16::from_ne_bytes(field.try_into().ok()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    let field = bytes.get(offset..offset + 4)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    let field = bytes.get(offset..offset + 8)?;
    Some(u64::from_ne_bytes(field.try_into().ok()?))
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

/// Attributes of a message; stops at the first one that makes no sense.
fn attributes(body: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Splits a datagram into messages; stops at the first one that makes no sense.
fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let message = rest.get(..length)?;
        let body = message.get(HEADER..)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Message {
            kind: u16_at(message, 4)?,
            flags: u16_at(message, 6)?,
            sequence: u32_at(message, 8)?,
            body,
        })
    })
}

fn from_kernel(sender: Option<net::SocketAddrAny>) -> bool {
    sender
        .and_then(|any| SocketAddrNetlink::try_from(any).ok())
        .is_some_and(|address| address.pid() == 0)
}

/// What a look at the notifications found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkChanges {
    /// Interfaces that have left this network namespace.
    pub gone: Vec<u32>,
    /// Notifications were lost: every interface of interest must be looked up.
    pub overflow: bool,
}

/// A subscription to interfaces coming and going.
#[derive(Debug)]
pub struct LinkWatch {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl LinkWatch {
    /// Subscribes. What happens from now on will be told.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        let fd = open(RTMGRP_LINK, SocketFlags::NONBLOCK).map_err(NetlinkError::Open)?;
        // A node of a thousand containers may lose all its links at once.
        let _ = sockopt::set_socket_recv_buffer_size(&fd, 1024 * 1024);
        Ok(Self {
            fd,
            buffer: vec![0; BUFFER],
        })
    }

    /// Takes all waiting notifications. Never blocks.
    pub fn changes(&mut self) -> LinkChanges {
        let mut found = LinkChanges::default();
        loop {
            match net::recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((read, _, sender)) => {
                    if from_kernel(sender) {
                        let datagram = self.buffer.get(..read).unwrap_or_default();
                        gone_links(datagram, &mut found.gone);
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::NOBUFS) => found.overflow = true,
                Err(_) => return found,
            }
        }
    }
}

/// The links a datagram reports as deleted. A port that only leaves its bridge is reported with
/// the same message and the bridge's address family (net/bridge/br_netlink.c): not counted.
fn gone_links(datagram: &[u8], gone: &mut Vec<u32>) {
    for message in messages(datagram) {
        if message.kind == RTM_DELLINK
            && message.body.len() >= IFINFO
            && message.body.first() == Some(&0)
            && let Some(index) = u32_at(message.body, 4)
        {
            gone.push(index);
        }
    }
}

impl AsFd for LinkWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for LinkWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Looks up interfaces by index. That takes no lock of the kernel's that anybody holds for long.
#[derive(Debug)]
pub struct LinkLookup {
    socket: OwnedFd,
}

impl LinkLookup {
    /// A lookup (any socket does for the ioctl).
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        net::socket_with(
            AddressFamily::UNIX,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map(|socket| Self { socket })
        .map_err(NetlinkError::Open)
    }

    /// The index of the interface of this name, if it is there.
    pub fn index(&self, name: &str) -> Option<u32> {
        net::netdevice::name_to_index(&self.socket, name).ok()
    }

    /// Whether an interface of this index is there. An unclear answer counts as "no".
    pub fn exists(&self, index: u32) -> bool {
        net::netdevice::index_to_name_inlined(&self.socket, index).is_ok()
    }

    /// What the interface of this index is called now; none when there is none.
    pub fn name(&self, index: u32) -> Option<String> {
        let name = net::netdevice::index_to_name_inlined(&self.socket, index).ok()?;
        Some(name.as_str().to_owned())
    }
}

/// What an interface has counted, as the host sees it (`struct rtnl_link_stats64`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Packets received.
    pub rx_packets: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Receive errors.
    pub rx_errors: u64,
    /// Send errors.
    pub tx_errors: u64,
    /// Received packets dropped.
    pub rx_dropped: u64,
    /// Packets to be sent dropped.
    pub tx_dropped: u64,
    /// Packets that went to its other end past it: none of those above.
    pub delivered_packets: u64,
    /// Their bytes.
    pub delivered_bytes: u64,
}

impl std::ops::AddAssign for LinkCounters {
    fn add_assign(&mut self, other: Self) {
        self.rx_packets += other.rx_packets;
        self.tx_packets += other.tx_packets;
        self.rx_bytes += other.rx_bytes;
        self.tx_bytes += other.tx_bytes;
        self.rx_errors += other.rx_errors;
        self.tx_errors += other.tx_errors;
        self.rx_dropped += other.rx_dropped;
        self.tx_dropped += other.tx_dropped;
        self.delivered_packets += other.delivered_packets;
        self.delivered_bytes += other.delivered_bytes;
    }
}

/// The counters of interfaces, sorted by index.
#[derive(Debug, Default)]
pub struct Links(Vec<(u32, LinkCounters)>);

impl Links {
    /// Those of one interface.
    pub fn get(&self, index: u32) -> Option<&LinkCounters> {
        let place = self.0.binary_search_by_key(&index, |(known, _)| *known);
        Some(&self.0.get(place.ok()?)?.1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Adds a link whose index is above those of all others.
    pub fn push(&mut self, index: u32, counters: LinkCounters) {
        debug_assert!(self.0.last().is_none_or(|(last, _)| *last < index));
        self.0.push((index, counters));
    }

    /// Adds to the link of this index, if it is there, what others count for it.
    pub fn add_delivered(&mut self, index: u32, packets: u64, bytes: u64) {
        if let Ok(place) = self.0.binary_search_by_key(&index, |(known, _)| *known)
            && let Some((_, link)) = self.0.get_mut(place)
        {
            link.delivered_packets += packets;
            link.delivered_bytes += bytes;
        }
    }

    /// As [`Links::get`], looking first at `place`, where it was last time; keeps that up to date.
    pub fn get_at(&self, index: u32, place: &mut usize) -> Option<&LinkCounters> {
        if self.0.get(*place).is_none_or(|(known, _)| *known != index) {
            *place = self
                .0
                .binary_search_by_key(&index, |(known, _)| *known)
                .ok()?;
        }
        Some(&self.0.get(*place)?.1)
    }
}

impl FromIterator<(u32, LinkCounters)> for Links {
    fn from_iter<T: IntoIterator<Item = (u32, LinkCounters)>>(list: T) -> Self {
        let mut links = Self(list.into_iter().collect());
        links.0.sort_unstable_by_key(|(index, _)| *index);
        links
    }
}

/// Reads the counters of all interfaces at once.
#[derive(Debug)]
pub struct LinkStatistics {
    asker: Asker,
    links: Links,
}

impl LinkStatistics {
    /// A socket to ask by.
    ///
    /// # Errors
    /// No socket.
    pub fn open() -> Result<Self, NetlinkError> {
        Ok(Self {
            asker: Asker::open()?,
            links: Links::default(),
        })
    }

    /// The counters of every interface of this network namespace.
    ///
    /// # Errors
    /// The step that failed. The numbers are whole or not there at all.
    pub fn read(&mut self) -> Result<&Links, NetlinkError> {
        // Links come and go while containers start; a second look is nearly always steady.
        for _ in 0..3 {
            if self.dump()? {
                return Ok(&self.links);
            }
        }
        Err(NetlinkError::Unsteady)
    }

    /// What was read last.
    pub fn last(&self) -> &Links {
        &self.links
    }

    /// The same, to add to it.
    pub fn last_mut(&mut self) -> &mut Links {
        &mut self.links
    }

    /// One dump; false when the list changed meanwhile.
    fn dump(&mut self) -> Result<bool, NetlinkError> {
        let links = &mut self.links.0;
        links.clear();
        let mut body = [0; IFSTATS]; // family, padding, all interfaces
        body[IFSTATS - 4..].copy_from_slice(&FILTER_LINK_64.to_ne_bytes());
        let steady = self
            .asker
            .ask(RTM_GETSTATS, NLM_F_DUMP, &body, |kind, body| {
                if kind == RTM_NEWSTATS {
                    links.extend(link_counters(body));
                }
            })?;
        // The kernel's order is that of its table, and nearly always this one.
        links.sort_unstable_by_key(|(index, _)| *index);
        Ok(steady)
    }
}

/// Reads `if_stats_msg` and its attributes.
fn link_counters(body: &[u8]) -> Option<(u32, LinkCounters)> {
    let index = u32_at(body, 4)?;
    let mut values = attributes(body.get(IFSTATS..)?);
    let (_, value) = values.find(|(kind, _)| *kind == IFLA_STATS_LINK_64)?;
    Some((index, stats64(value)?))
}

/// Reads `struct rtnl_link_stats64`.
fn stats64(value: &[u8]) -> Option<LinkCounters> {
    Some(LinkCounters {
        rx_packets: u64_at(value, 0)?,
        tx_packets: u64_at(value, 8)?,
        rx_bytes: u64_at(value, 16)?,
        tx_bytes: u64_at(value, 24)?,
        rx_errors: u64_at(value, 32)?,
        tx_errors: u64_at(value, 40)?,
        rx_dropped: u64_at(value, 48)?,
        tx_dropped: u64_at(value, 56)?,
        ..LinkCounters::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + body.len()).unwrap();
        let mut out = length.to_ne_bytes().to_vec();
        out.extend_from_slice(&kind.to_ne_bytes());
        out.extend_from_slice(&[0; 10]);
        out.extend_from_slice(body);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn ifinfo(family: u8, index: u32) -> Vec<u8> {
        let mut body = vec![family, 0, 0, 0];
        body.extend_from_slice(&index.to_ne_bytes());
        body.extend_from_slice(&[0; 8]);
        body
    }

    #[test]
    fn deleted_links_are_found_among_other_messages() {
        let mut datagram = message(16, &ifinfo(0, 3));
        datagram.extend(message(RTM_DELLINK, &ifinfo(0, 7)));
        datagram.extend(message(RTM_DELLINK, &ifinfo(0, 9)));
        let mut gone = Vec::new();
        gone_links(&datagram, &mut gone);
        assert_eq!(gone, [7, 9]);
    }

    #[test]
    fn leaving_a_bridge_is_not_going_away() {
        const AF_BRIDGE: u8 = 7;
        let mut gone = Vec::new();
        gone_links(&message(RTM_DELLINK, &ifinfo(AF_BRIDGE, 7)), &mut gone);
        assert!(gone.is_empty());
    }

    #[test]
    fn loopback_has_counters_and_exists() {
        let mut statistics = LinkStatistics::open().unwrap();
        let links = statistics.read().unwrap();
        assert!(links.get(1).is_some(), "{links:?}");
        let lookup = LinkLookup::open().unwrap();
        assert!(lookup.exists(1));
        assert_eq!(lookup.name(1).as_deref(), Some("lo"));
        assert!(!lookup.exists(u32::MAX >> 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut gone = Vec::new();
            gone_links(&bytes, &mut gone);
            for message in messages(&bytes) {
                let _ = link_counters(message.body);
            }
            let _ = link_counters(&bytes);
        }
    }
}
