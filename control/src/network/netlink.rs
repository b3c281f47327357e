//! The few rtnetlink questions control asks, over a plain socket.
//!
//! Parsed here and not by a crate: the general ones refuse a whole message when a newer kernel
//! changes one attribute they know, and four attributes are all that is needed. Every length is
//! checked; what does not fit is an error, never a guess.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, sendto, socket_with,
};
use shared::netlink::{
    IFLA_EXT_MASK, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINK, IFLA_LINK_NETNSID, IFLA_LINKINFO,
    IFLA_MASTER, IFLA_TARGET_NETNSID, NETNSA_NSID, NETNSA_PID, NLA_TYPE_MASK, NLM_F_DUMP,
    NLM_F_DUMP_INTR, NLM_F_MULTI, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, RTEXT_FILTER_SKIP_STATS,
    RTM_GETLINK, RTM_GETNSID, RTM_NEWLINK, RTM_NEWNSID, is_past_host,
};

// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for MacAddress {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|it| it.is_ascii_hexdigit()))
                .ok_or(BadMac)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMac)?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(BadMac),
        }
    }
}

/// Not six bytes in hex with colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a hardware address has the form 02:42:ac:11:00:02")]
pub struct BadMac;

/// A link between a namespace and ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Peer {
    pub interface: String,
    pub container_mac: MacAddress,
    /// Index of the end in our namespace.
    pub host_ifindex: u32,
    /// Index of the bridge that end is a port of.
    pub bridge_ifindex: Option<u32>,
}

/// The links of a network namespace that lead out of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Those whose other end is in our namespace.
    pub peers: Vec<Peer>,
    /// Names of those that lead past this host.
    pub past_host: Vec<String>,
}

/// The links of the network namespace of `pid`. None are told of one that no link of ours leads to. Blocking.
pub(super) fn links(pid: u32, deadline: Duration) -> io::Result<Found> {
    let mut socket = Socket::open(Instant::now() + deadline)?;
    let mut found = Found::default();
    let namespace = socket.namespace_id(pid)?;
    // Our own may have an id, too, and its links lead to no container.
    let own = socket.namespace_id(std::process::id())?;
    let Some(namespace) = namespace.filter(|it| Some(*it) != own) else {
        return Ok(found);
    };
    for inside in socket.links_of(namespace)? {
        if inside.is_past_host {
            found.past_host.push(inside.name);
            continue;
        }
        let (Some(peer), Some(container_mac)) = (inside.link, inside.mac) else {
            continue;
        };
        let Some(outside) = socket.link(peer)? else {
            continue;
        };
        // Indexes are per namespace: only a peer that points back is the other end.
        let points_back =
            outside.link == Some(inside.index) && outside.link_namespace == Some(namespace);
        if points_back {
            found.peers.push(Peer {
                interface: inside.name,
                container_mac,
                host_ifindex: peer,
                bridge_ifindex: outside.master,
            });
        }
    }
    Ok(found)
}

#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    sequence: u32,
    until: Instant,
    buffer: Vec<u8>,
}

impl Socket {
    fn open(until: Instant) -> io::Result<Self> {
        let fd = socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // Protocol 0 is NETLINK_ROUTE; rustix has no name for zero.
            None,
        )?;
        bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self {
            fd,
            sequence: 0,
            until,
            // The kernel fills at most 32 KiB per message of a dump.
            buffer: vec![0; 64 << 10],
        })
    }

    /// The id our namespace has for the namespace of `pid`, `None` when it has none.
    fn namespace_id(&mut self, pid: u32) -> io::Result<Option<i32>> {
        let mut body = vec![0; 4];
        attribute(&mut body, NETNSA_PID, &pid.to_ne_bytes());
        let mut id = None;
        self.ask(RTM_GETNSID, 0, &body, |kind, payload| {
            if kind == RTM_NEWNSID {
                for (kind, value) in attributes(payload, 4)? {
                    if kind == NETNSA_NSID {
                        id = Some(i32::from_ne_bytes(word(value)?));
                    }
                }
            }
            Ok(())
        })?;
        Ok(id.filter(|id| *id >= 0))
    }

    fn links_of(&mut self, namespace: i32) -> io::Result<Vec<Link>> {
        let mut body = vec![0; 16];
        attribute(&mut body, IFLA_TARGET_NETNSID, &namespace.to_ne_bytes());
        attribute(
            &mut body,
            IFLA_EXT_MASK,
            &RTEXT_FILTER_SKIP_STATS.to_ne_bytes(),
        );
        loop {
            let mut links = Vec::new();
            let answer = self.ask(RTM_GETLINK, NLM_F_DUMP, &body, |kind, payload| {
                if kind == RTM_NEWLINK {
                    links.push(Link::parse(payload)?);
                }
                Ok(())
            })?;
            if !answer.torn {
                return Ok(links);
            }
        }
    }

    /// A link of our namespace by index, `None` when it is gone.
    fn link(&mut self, index: u32) -> io::Result<Option<Link>> {
        let mut body = vec![0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        attribute(
            &mut body,
            IFLA_EXT_MASK,
            &RTEXT_FILTER_SKIP_STATS.to_ne_bytes(),
        );
        let mut link = None;
        let asked = self.ask(RTM_GETLINK, 0, &body, |kind, payload| {
            if kind == RTM_NEWLINK {
                link = Some(Link::parse(payload)?);
            }
            Ok(())
        });
        match asked {
            Err(err) if err.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => {
                Ok(None)
            }
            Err(err) => Err(err),
            Ok(_) => Ok(link),
        }
    }

    fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut sink: impl FnMut(u16, &[u8]) -> io::Result<()>,
    ) -> io::Result<Answer> {
        self.sequence += 1;
        let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(16 + body.len());
        message.extend_from_slice(&length.to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend_from_slice(&self.sequence.to_ne_bytes());
        message.extend_from_slice(&[0; 4]);
        message.extend_from_slice(body);
        sendto(
            &self.fd,
            &message,
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut answer = Answer::default();
        while !answer.over {
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            set_socket_timeout(&self.fd, Timeout::Recv, Some(left))?;
            let (_, read) = match recv(&self.fd, &mut self.buffer[..], RecvFlags::TRUNC) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let Some(datagram) = self.buffer.get(..read) else {
                return Err(malformed("a message larger than the buffer"));
            };
            answer.take(datagram, self.sequence, &mut sink)?;
        }
        Ok(answer)
    }
}

/// How far an answer has come.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    /// Nothing more is to come.
    over: bool,
    /// What it lists has changed meanwhile, and something may be missing.
    torn: bool,
}

impl Answer {
    /// Takes one datagram of the kernel, and of it what answers question number `sequence`.
    fn take(
        &mut self,
        datagram: &[u8],
        sequence: u32,
        sink: &mut impl FnMut(u16, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = datagram;
        while !rest.is_empty() && !self.over {
            let header = rest.get(..16).ok_or_else(|| malformed("a short header"))?;
            let length = u32::from_ne_bytes(word(&header[..4])?) as usize;
            let kind = u16::from_ne_bytes([header[4], header[5]]);
            let flags = u16::from_ne_bytes([header[6], header[7]]);
            let of = u32::from_ne_bytes(word(&header[8..12])?);
            let payload = rest
                .get(16..length)
                .ok_or_else(|| malformed("a length beyond the message"))?;
            let next = length.next_multiple_of(4).min(rest.len());
            rest = &rest[next..];
            if of != sequence {
                continue;
            }
            self.torn |= flags & NLM_F_DUMP_INTR != 0;
            match kind {
                NLMSG_DONE => self.over = true,
                NLMSG_ERROR => {
                    let code = payload
                        .get(..4)
                        .ok_or_else(|| malformed("a short error"))
                        .and_then(word)
                        .map(i32::from_ne_bytes)?;
                    if code != 0 {
                        return Err(io::Error::from_raw_os_error(code.saturating_neg()));
                    }
                    self.over = true;
                }
                kind => {
                    sink(kind, payload)?;
                    self.over = flags & NLM_F_MULTI == 0;
                }
            }
        }
        Ok(())
    }
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    mac: Option<MacAddress>,
    /// Index of the peer.
    link: Option<u32>,
    /// Namespace of the peer when it is not this one.
    link_namespace: Option<i32>,
    master: Option<u32>,
    is_past_host: bool,
}

impl Link {
    fn parse(payload: &[u8]) -> io::Result<Self> {
        let index = payload
            .get(4..8)
            .ok_or_else(|| malformed("a short link message"))
            .and_then(word)?;
        let mut link = Self {
            index: u32::from_ne_bytes(index),
            ..Self::default()
        };
        let hardware = u16::from_ne_bytes([payload[2], payload[3]]);
        let mut name: &[u8] = &[];
        for (kind, value) in attributes(payload, 16)? {
            match kind {
                IFLA_ADDRESS => link.mac = value.try_into().ok().map(MacAddress),
                IFLA_IFNAME => {
                    let name = value.split(|byte| *byte == 0).next().unwrap_or_default();
                    link.name = String::from_utf8_lossy(name).into_owned();
                }
                IFLA_LINK => link.link = Some(u32::from_ne_bytes(word(value)?)),
                IFLA_LINK_NETNSID => link.link_namespace = Some(i32::from_ne_bytes(word(value)?)),
                IFLA_MASTER => link.master = Some(u32::from_ne_bytes(word(value)?)),
                IFLA_LINKINFO => {
                    let kinds = attributes(value, 0)?.into_iter();
                    let mut kinds = kinds.filter(|(kind, _)| *kind == IFLA_INFO_KIND);
                    name = kinds.next().map_or(name, |(_, kind)| kind);
                }
                _ => {}
            }
        }
        link.is_past_host = is_past_host(name, hardware, link.link_namespace.is_some());
        Ok(link)
    }
}

fn attribute(into: &mut Vec<u8>, kind: u16, value: &[u8; 4]) {
    into.extend_from_slice(&8u16.to_ne_bytes());
    into.extend_from_slice(&kind.to_ne_bytes());
    into.extend_from_slice(value);
}

/// The attributes behind a fixed header of `skip` bytes.
fn attributes(payload: &[u8], skip: usize) -> io::Result<Vec<(u16, &[u8])>> {
    let mut rest = payload
        .get(skip..)
        .ok_or_else(|| malformed("a short message"))?;
    let mut found = Vec::new();
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let kind = u16::from_ne_bytes([rest[2], rest[3]]) & NLA_TYPE_MASK;
        let value = rest
            .get(4..length)
            .ok_or_else(|| malformed("an attribute beyond the message"))?;
        found.push((kind, value));
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    Ok(found)
}

fn word(bytes: &[u8]) -> io::Result<[u8; 4]> {
    bytes
        .try_into()
        .map_err(|_| malformed("a number of the wrong size"))
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("the kernel's answer holds {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hardware_addresses_read_and_write() {
        let mac: MacAddress = "02:42:ac:11:00:0f".parse().unwrap();
        assert_eq!(mac, MacAddress([2, 0x42, 0xac, 0x11, 0, 15]));
        assert_eq!(mac.to_string(), "02:42:ac:11:00:0f");
        for bad in [
            "",
            "02:42:ac:11:00",
            "02:42:ac:11:00:0f:01",
            "2:42:ac:11:00:0f",
            "zz:42:ac:11:00:0f",
            "+2:42:ac:11:00:0f",
        ] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn our_own_namespace_has_no_peers() {
        assert_eq!(
            links(std::process::id(), Duration::from_secs(5)).unwrap(),
            Found::default()
        );
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        // Above the largest pid_max of the kernel.
        assert!(links(0x7fff_fffe, Duration::from_secs(5)).is_err());
    }

    #[test]
    fn a_list_that_changed_while_it_was_told_is_known_as_such() {
        let message = |kind: u16, flags: u16, sequence: u32| {
            let mut bytes = 20u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(flags.to_ne_bytes());
            bytes.extend(sequence.to_ne_bytes());
            bytes.extend([0; 8]);
            bytes
        };
        let (whole, torn) = (NLM_F_MULTI, NLM_F_MULTI | NLM_F_DUMP_INTR);
        for (first, last, expected) in [
            (whole, whole, false),
            (torn, whole, true),
            (whole, torn, true),
        ] {
            let mut answer = Answer::default();
            let mut told = 0;
            let mut sink = |_: u16, _: &[u8]| {
                told += 1;
                Ok(())
            };
            let datagram = [
                // Left over from an earlier question.
                message(NLMSG_DONE, torn, 6),
                message(RTM_NEWLINK, first, 7),
                message(RTM_NEWLINK, whole, 7),
            ];
            answer.take(&datagram.concat(), 7, &mut sink).unwrap();
            assert!(!answer.over);
            let done = message(NLMSG_DONE, last, 7);
            answer.take(&done, 7, &mut sink).unwrap();
            assert_eq!((answer.over, answer.torn, told), (true, expected, 2));
        }
    }

    #[test]
    fn loopback_is_read_by_index() {
        let mut socket = Socket::open(Instant::now() + Duration::from_secs(5)).unwrap();
        let link = socket.link(1).unwrap().unwrap();
        assert_eq!((link.name.as_str(), link.index), ("lo", 1));
        assert_eq!(link.mac, Some(MacAddress([0; 6])));
        assert_eq!(socket.link(0x7fff_0000).unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Link::parse(&bytes);
            if let Ok(found) = attributes(&bytes, 4) {
                prop_assert!(found.len() <= bytes.len() / 4 + 1);
            }
        }
    }
}
