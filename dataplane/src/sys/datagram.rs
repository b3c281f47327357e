//! UDP sockets as the relay wants them: answers leave by the address that was asked.
//!
//! In: socket addresses. Out: owned descriptors, datagrams with both their addresses. Invariant:
//! every descriptor returned is non-blocking and closes on exec.

use std::io::{IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage,
    recvmsg, sendmsg, setsockopt, sockopt,
};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketFlags, SocketType, ipproto};

use super::socket::{ListenError, Source, begin_at, leads_to_itself};

fn own(errno: nix::errno::Errno) -> Errno {
    Errno::from_raw_os_error(errno as i32)
}

fn open(address: &SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    net::socket_with(
        family,
        SocketType::DGRAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        Some(ipproto::UDP),
    )
}

/// Binds a socket that tells which of this host's addresses a datagram was sent to. `[::]` takes
/// those of IPv4 clients too.
///
/// # Errors
/// One variant per system call, with the kernel's answer.
pub fn bind(address: SocketAddr) -> Result<OwnedFd, ListenError> {
    let fd = open(&address).map_err(|source| ListenError::Socket { address, source })?;
    let option = |option, source| ListenError::Option {
        address,
        option,
        source,
    };
    if let IpAddr::V6(ip) = address.ip() {
        net::sockopt::set_ipv6_v6only(&fd, !ip.is_unspecified())
            .map_err(|errno| option("IPV6_V6ONLY", errno))?;
        setsockopt(&fd, sockopt::Ipv6RecvPacketInfo, &true)
            .map_err(|errno| option("IPV6_RECVPKTINFO", own(errno)))?;
    } else {
        setsockopt(&fd, sockopt::Ipv4PacketInfo, &true)
            .map_err(|errno| option("IP_PKTINFO", own(errno)))?;
    }
    net::bind(&fd, &address).map_err(|source| ListenError::Bind { address, source })?;
    Ok(fd)
}

/// A socket that speaks to one peer only.
///
/// # Errors
/// The kernel's answer: no descriptor, no route. From the peer's own address also those of
/// [`socket::start_connect`](super::socket::start_connect).
pub fn connect(peer: &SocketAddr, source: Source) -> Result<OwnedFd, Errno> {
    let fd = open(peer)?;
    if source == Source::Target {
        begin_at(&fd, peer.ip())?;
    }
    net::connect(&fd, peer)?;
    if source == Source::Target && leads_to_itself(&fd, peer) {
        return Err(Errno::CONNREFUSED);
    }
    Ok(fd)
}

/// A datagram's length and addresses.
#[derive(Debug, Clone, Copy)]
pub struct Received {
    /// Bytes in the buffer.
    pub length: usize,
    /// Who has sent it.
    pub peer: SocketAddr,
    /// The address of this host it was sent to.
    pub local: IpAddr,
}

fn plain(address: &SockaddrStorage) -> Option<SocketAddr> {
    match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => Some(SocketAddr::from((v4.ip(), v4.port()))),
        (_, Some(v6)) => Some(SocketAddr::V6((*v6).into())),
        _ => None,
    }
}

/// Takes one datagram.
///
/// # Errors
/// The kernel's answer (`EAGAIN` when none is waiting).
pub fn receive(fd: &OwnedFd, buffer: &mut [u8]) -> Result<Received, Errno> {
    let mut space = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(
        fd.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_DONTWAIT,
    )
    .map_err(own)?;
    let local = message
        .cmsgs()
        .ok()
        .into_iter()
        .flatten()
        .find_map(|it| match it {
            ControlMessageOwned::Ipv4PacketInfo(it) => {
                Some(IpAddr::from(it.ipi_spec_dst.s_addr.to_ne_bytes()))
            }
            ControlMessageOwned::Ipv6PacketInfo(it) => Some(IpAddr::from(it.ipi6_addr.s6_addr)),
            _ => None,
        });
    let peer = message.address.as_ref().and_then(plain);
    match (peer, local) {
        (Some(peer), Some(local)) => Ok(Received {
            length: message.bytes,
            peer,
            local,
        }),
        _ => Err(Errno::AFNOSUPPORT),
    }
}

/// Sends a datagram from one of this host's addresses.
///
/// # Errors
/// The kernel's answer.
pub fn send(fd: &OwnedFd, bytes: &[u8], to: SocketAddr, from: IpAddr) -> Result<(), Errno> {
    let parts = [IoSlice::new(bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let sent = match (to, from) {
        (SocketAddr::V4(to), IpAddr::V4(from)) => {
            let from = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(from.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&from)];
            sendmsg(
                fd.as_raw_fd(),
                &parts,
                &control,
                flags,
                Some(&SockaddrIn::from(to)),
            )
        }
        (SocketAddr::V6(to), IpAddr::V6(from)) => {
            let from = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: 0,
            };
            let control = [ControlMessage::Ipv6PacketInfo(&from)];
            sendmsg(
                fd.as_raw_fd(),
                &parts,
                &control,
                flags,
                Some(&SockaddrIn6::from(to)),
            )
        }
        _ => return Err(Errno::AFNOSUPPORT),
    };
    sent.map(drop).map_err(own)
}
