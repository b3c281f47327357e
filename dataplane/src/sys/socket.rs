//! TCP sockets as the relay wants them: non-blocking, close-on-exec, no Nagle.
//!
//! In: socket addresses. Out: owned descriptors. Invariant: every descriptor returned is
//! non-blocking and closes on exec.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, Shutdown, SocketFlags, SocketType, ipproto, sockopt};

/// A failed step of opening a listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The socket itself could not be made (descriptor limit, address family missing).
    #[error("cannot create a socket for {address}")]
    Socket {
        /// Where the listener should have been.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// A socket option was refused.
    #[error("cannot set {option} on the listener of {address}")]
    Option {
        /// Where the listener should have been.
        address: SocketAddr,
        /// The name of the option.
        option: &'static str,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// The address or port is taken, reserved or not of this host.
    #[error("cannot bind {address}")]
    Bind {
        /// Where the listener should have been.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
    /// `listen` was refused.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where the listener should have been.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: Errno,
    },
}

impl ListenError {
    /// The kernel's answer, whichever step failed.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Socket { source, .. }
            | Self::Option { source, .. }
            | Self::Bind { source, .. }
            | Self::Listen { source, .. } => *source,
        }
    }
}

/// Seconds of silence after which the kernel probes a client (`TCP_KEEPIDLE`): a client that lost
/// power must not hold a session for ever when no idle timeout is set. Five minutes is below the
/// usual 350 s and more after which NAT gateways forget a connection.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(300);
/// Distance of the probes that follow (`TCP_KEEPINTVL`); nine unanswered ones end the session.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);

fn family(address: &SocketAddr) -> AddressFamily {
    match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    }
}

fn stream(address: &SocketAddr) -> Result<OwnedFd, Errno> {
    net::socket_with(
        family(address),
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        Some(ipproto::TCP),
    )
}

/// Opens a listener. `[::]` accepts IPv4 clients too (their addresses arrive as mapped ones).
///
/// `TCP_NODELAY`, keep-alive and `SO_OOBINLINE` are set here because the kernel hands them on to
/// accepted sockets (socket(7), tcp(7)); so a new connection costs no further system call.
///
/// # Errors
/// One variant per system call, with the kernel's answer.
pub fn listen(address: SocketAddr, backlog: i32) -> Result<OwnedFd, ListenError> {
    let fd = stream(&address).map_err(|source| ListenError::Socket { address, source })?;
    let option = |option: &'static str| {
        move |source| ListenError::Option {
            address,
            option,
            source,
        }
    };
    sockopt::set_socket_reuseaddr(&fd, true).map_err(option("SO_REUSEADDR"))?;
    if let IpAddr::V6(ip) = address.ip() {
        sockopt::set_ipv6_v6only(&fd, !ip.is_unspecified()).map_err(option("IPV6_V6ONLY"))?;
    }
    sockopt::set_tcp_nodelay(&fd, true).map_err(option("TCP_NODELAY"))?;
    sockopt::set_socket_oobinline(&fd, true).map_err(option("SO_OOBINLINE"))?;
    sockopt::set_socket_keepalive(&fd, true).map_err(option("SO_KEEPALIVE"))?;
    sockopt::set_tcp_keepidle(&fd, KEEPALIVE_IDLE).map_err(option("TCP_KEEPIDLE"))?;
    sockopt::set_tcp_keepintvl(&fd, KEEPALIVE_INTERVAL).map_err(option("TCP_KEEPINTVL"))?;
    net::bind(&fd, &address).map_err(|source| ListenError::Bind { address, source })?;
    net::listen(&fd, backlog).map_err(|source| ListenError::Listen { address, source })?;
    Ok(fd)
}

/// The local address of a socket.
///
/// # Errors
/// The kernel's answer; `EAFNOSUPPORT` when it is no internet address.
pub fn local_address(fd: impl AsFd) -> Result<SocketAddr, Errno> {
    let any = net::getsockname(fd)?;
    SocketAddr::try_from(any).map_err(|_| Errno::AFNOSUPPORT)
}

/// The address of the other end of a connection.
///
/// # Errors
/// The kernel's answer (`ENOTCONN` when it has ended).
pub fn peer_address(fd: impl AsFd) -> Result<SocketAddr, Errno> {
    let any = net::getpeername(fd)?.ok_or(Errno::NOTCONN)?;
    SocketAddr::try_from(any).map_err(|_| Errno::AFNOSUPPORT)
}

/// Accepts one connection with the address of its client.
///
/// # Errors
/// The kernel's answer (`EAGAIN` when none is waiting).
pub fn accept(listener: impl AsFd) -> Result<(OwnedFd, SocketAddr), Errno> {
    let (fd, peer) = net::acceptfrom_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let peer = peer
        .and_then(|any| SocketAddr::try_from(any).ok())
        .ok_or(Errno::CONNABORTED)?;
    Ok((fd, peer))
}

/// The address a connection begins at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The one that routes choose.
    Any,
    /// The target's own.
    Target,
}

/// Has a socket begin at an address of this network namespace, and at a port that is chosen once it is
/// known whom it leads to (ip(7), `IP_BIND_ADDRESS_NO_PORT`).
///
/// # Errors
/// `EADDRNOTAVAIL` when the address is not of this namespace.
pub(super) fn begin_at(fd: &OwnedFd, address: IpAddr) -> Result<(), Errno> {
    setsockopt(fd, IpBindAddressNoPort, &true)
        .map_err(|errno| Errno::from_raw_os_error(errno as i32))?;
    net::bind(fd, &SocketAddr::new(address, 0))
}

/// Whether a socket that begins at the address it leads to has got the target's port too. Then nobody
/// listens there, and what it would reach is itself.
pub(super) fn leads_to_itself(fd: &OwnedFd, target: &SocketAddr) -> bool {
    local_address(fd).is_ok_and(|own| own.port() == target.port())
}

/// Starts a connection; it is complete when the socket becomes writable without an error.
///
/// # Errors
/// The kernel's answer when the attempt failed at once. From the target's own address `EADDRNOTAVAIL` when
/// that is not of this namespace, `ECONNREFUSED` when the socket would reach itself.
pub fn start_connect(target: &SocketAddr, source: Source) -> Result<OwnedFd, Errno> {
    let fd = stream(target)?;
    sockopt::set_tcp_nodelay(&fd, true)?;
    sockopt::set_socket_oobinline(&fd, true)?;
    if source == Source::Target {
        // A service may take the port that this socket happens to have, as it sets the same.
        sockopt::set_socket_reuseaddr(&fd, true)?;
        begin_at(&fd, target.ip())?;
    }
    match net::connect(&fd, target) {
        Ok(()) | Err(Errno::INPROGRESS)
            if source == Source::Target && leads_to_itself(&fd, target) =>
        {
            abort(fd);
            Err(Errno::CONNREFUSED)
        }
        Ok(()) | Err(Errno::INPROGRESS) => Ok(fd),
        Err(errno) => Err(errno),
    }
}

/// The pending error of a socket (`SO_ERROR`), which reading clears.
///
/// # Errors
/// The pending error, or the failure to ask for it.
pub fn take_error(fd: impl AsFd) -> Result<(), Errno> {
    sockopt::socket_error(fd)?
}

/// Tells the peer that nothing more will be sent; receiving goes on.
///
/// # Errors
/// The kernel's answer (`ENOTCONN` when the peer has reset the connection).
pub fn finish_sending(fd: impl AsFd) -> Result<(), Errno> {
    net::shutdown(fd, Shutdown::Write)
}

/// Whether something waits to be read, or a client to be accepted.
pub fn is_readable(fd: impl AsFd) -> bool {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    let at_once = Timespec::default();
    matches!(poll(&mut polled, Some(&at_once)), Ok(1..))
}

/// Resets the clients that wait at a listener without a descriptor for any of them; it listens on.
///
/// # Errors
/// The listener is one no longer.
pub fn turn_away_waiting(listener: &OwnedFd, backlog: i32) -> Result<(), Errno> {
    // Listening ends by `shutdown` and begins anew; the port stays bound, as it was asked for by
    // number.
    net::shutdown(listener, Shutdown::Read)?;
    net::listen(listener, backlog)
}

/// Closes with RST: unsent bytes are dropped and the peer sees a reset instead of an end.
pub fn abort(fd: OwnedFd) {
    // A failure here means that the connection is already gone; closing is all that is left.
    let _ = sockopt::set_socket_linger(&fd, Some(Duration::ZERO));
    drop(fd);
}

/// Resets the connection at once, although the kernel may have requests for the socket; these end with
/// it. The descriptor stays.
pub fn reset(fd: impl AsFd) {
    // `connect` to nowhere is how TCP disconnects (connect(2)). Should that not be possible, closing
    // does it when the last request is gone.
    if net::connect_unspec(&fd).is_err() {
        let _ = sockopt::set_socket_linger(&fd, Some(Duration::ZERO));
    }
}

/// Reads without blocking. Returns the number of bytes, 0 at the end of the stream.
///
/// # Errors
/// The kernel's answer.
pub fn read(fd: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    // read(2) would go the way of files first.
    let (read, _) = net::recv(fd, buffer, net::RecvFlags::empty())?;
    Ok(read)
}

/// Writes without blocking and without SIGPIPE. Returns how many bytes were taken.
///
/// # Errors
/// The kernel's answer.
pub fn write(fd: impl AsFd, bytes: &[u8]) -> Result<usize, Errno> {
    net::send(fd, bytes, net::SendFlags::NOSIGNAL)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn clients_that_wait_are_turned_away_and_others_come() {
        // A port by number, as rows have: what the kernel has chosen would be given up.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let listener = listen(address, 16).unwrap();
        let waiting: Vec<_> = (0..3)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        turn_away_waiting(&listener, 16).unwrap();
        for mut client in waiting {
            client
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            let end = client.read(&mut [0]).unwrap_err();
            assert_eq!(end.kind(), ErrorKind::ConnectionReset);
        }
        assert_eq!(accept(&listener).unwrap_err(), Errno::AGAIN);
        let _client = TcpStream::connect(address).unwrap();
        assert!(accept(&listener).is_ok());
    }
}
