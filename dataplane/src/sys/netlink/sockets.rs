//! Ending TCP connections by their sockets (sock_diag(7)).
//!
//! In: cookies of sockets of this thread's network namespace, or addresses it had. Out: those sockets,
//! or the connections from those addresses, are reset, as if the peer had done it. Invariant: no other
//! socket is touched: the kernel compares the cookie.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netlink;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::{
    AF_INET, AF_INET6, ANSWER, BUFFER, HEADER, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
    NetlinkError, from_kernel, messages, u32_at,
};

// linux/sock_diag.h, linux/inet_diag.h, linux/socket.h
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_ACK: u16 = 4;
const IPPROTO_TCP: u8 = 6;
/// `struct inet_diag_sockid`, and where it is in `struct inet_diag_msg`.
const ID: usize = 48;
const ID_AT: usize = 4;
const COOKIE_AT: usize = 40;
// include/net/tcp_states.h
const TIME_WAIT: u8 = 6;
const LISTEN: u8 = 10;

fn request(kind: u16, flags: u16, family: u8, id: &Id) -> Vec<u8> {
    let mut body = vec![family, IPPROTO_TCP, 0, 0];
    body.extend_from_slice(&u32::MAX.to_ne_bytes());
    body.extend_from_slice(id);
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&body);
    request
}

type Id = [u8; ID];

fn id_of(body: &[u8]) -> Option<Id> {
    body.get(ID_AT..ID_AT + ID)?.try_into().ok()
}

/// The id of a listed socket, if it is one of those towards `peer`.
fn wanted(body: &[u8], cookies: &HashSet<u64>, peer: SocketAddr) -> Option<Id> {
    let id = id_of(body)?;
    let port = u16::from_be_bytes([id[2], id[3]]);
    let (low, high) = (u32_at(&id, COOKIE_AT)?, u32_at(&id, COOKIE_AT + 4)?);
    let cookie = u64::from(high) << 32 | u64::from(low);
    let destination: [u8; 16] = id[20..36].try_into().ok()?;
    let same = match peer.ip() {
        IpAddr::V4(v4) => {
            destination[..4] == v4.octets() || destination == v4.to_ipv6_mapped().octets()
        }
        IpAddr::V6(v6) => destination == v6.octets(),
    };
    (port == peer.port() && same && cookies.contains(&cookie)).then_some(id)
}

/// The id of a listed connection whose own address is one of these.
fn of_address(body: &[u8], addresses: &HashSet<IpAddr>) -> Option<Id> {
    let (family, state) = (*body.first()?, *body.get(1)?);
    let id = id_of(body)?;
    let own: [u8; 16] = id[4..20].try_into().ok()?;
    let own = if family == AF_INET {
        IpAddr::from([own[0], own[1], own[2], own[3]])
    } else {
        Ipv6Addr::from(own).to_canonical()
    };
    (addresses.contains(&own) && !matches!(state, LISTEN | TIME_WAIT)).then_some(id)
}

fn list(
    socket: &OwnedFd,
    family: u8,
    wanted: &impl Fn(&[u8]) -> Option<Id>,
) -> Result<Vec<Id>, NetlinkError> {
    let ask = request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, &[0; ID]);
    net::send(socket, &ask, SendFlags::empty()).map_err(NetlinkError::Ask)?;
    let mut buffer = vec![0; BUFFER];
    let mut found = Vec::new();
    loop {
        let (read, _, sender) = match net::recvfrom(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(NetlinkError::Answer(errno)),
        };
        if !from_kernel(sender) {
            continue;
        }
        for message in messages(buffer.get(..read).unwrap_or_default()) {
            match message.kind {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => return Err(NetlinkError::Refused(refusal(message.body))),
                _ => found.extend(wanted(message.body)),
            }
        }
    }
}

fn refusal(body: &[u8]) -> Errno {
    let code = u32_at(body, 0).unwrap_or(0).cast_signed();
    Errno::from_raw_os_error(code.saturating_neg())
}

/// Resets those TCP sockets among `cookies` that are connected to `peer`. Answers how many.
///
/// # Errors
/// The step that failed; kernels without `CONFIG_INET_DIAG_DESTROY` refuse.
pub fn cut(cookies: &HashSet<u64>, peer: SocketAddr) -> Result<usize, NetlinkError> {
    end(&|body| wanted(body, cookies, peer))
}

/// Resets the TCP connections of this thread's network namespace that have one of these as their own
/// address. Answers how many.
///
/// # Errors
/// The step that failed.
pub(super) fn cut_from(addresses: &HashSet<IpAddr>) -> Result<usize, NetlinkError> {
    end(&|body| of_address(body, addresses))
}

/// Resets the wanted ones among the TCP sockets of this thread's namespace.
fn end(wanted: &impl Fn(&[u8]) -> Option<Id>) -> Result<usize, NetlinkError> {
    let socket = net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )
    .map_err(NetlinkError::Open)?;
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))
        .map_err(NetlinkError::Open)?;
    let (mut cut, mut refused) = (0, None);
    let mut buffer = vec![0; BUFFER];
    for family in [AF_INET, AF_INET6] {
        for id in list(&socket, family, wanted)? {
            let order = request(SOCK_DESTROY, NLM_F_ACK, family, &id);
            net::send(&socket, &order, SendFlags::empty()).map_err(NetlinkError::Ask)?;
            let read = net::recv(&socket, &mut buffer[..], RecvFlags::empty())
                .map_err(NetlinkError::Answer)?
                .0;
            for message in messages(buffer.get(..read).unwrap_or_default()) {
                // An error of zero is the acknowledgement.
                if message.kind != NLMSG_ERROR || u32_at(message.body, 0) == Some(0) {
                    cut += 1;
                    continue;
                }
                match refusal(message.body) {
                    // It has ended by itself meanwhile.
                    Errno::NOENT => {}
                    // Older kernels refuse those that only wait for the other side's end.
                    errno => refused = Some(errno),
                }
            }
        }
    }
    match refused {
        Some(errno) if cut == 0 => Err(NetlinkError::Refused(errno)),
        _ => Ok(cut),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = wanted(&bytes, &HashSet::new(), ([127, 0, 0, 1], 1).into());
            let _ = of_address(&bytes, &HashSet::new());
        }
    }
}
