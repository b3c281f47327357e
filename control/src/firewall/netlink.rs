//! Questions to the kernel, and its word of changes (netlink(7)).
//!
//! In: a protocol and the kind of a question. Out: the bodies of its answers. Invariant: answers that are
//! cut or make no sense end the list, never the process.

use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use shared::netlink::{NLA_TYPE_MASK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR};

const HEADER: usize = 16;
/// What follows it in a question: a family, which is any.
const FAMILY_HEADER: usize = 4;
/// The kernel answers at once; a lost answer is no reason to wait for long.
const ANSWER: Duration = Duration::from_secs(2);
const BUFFER: usize = 1 << 17;
/// A change rarely comes alone: what follows within this time belongs to it.
const QUIET: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};
/// Words of changes that are taken for one.
const MOST_WORDS: u32 = 20_000;

/// Attributes one after the other: kind and content.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let content = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & NLA_TYPE_MASK, content))
    })
}

/// Answers to a request: kind and body.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
        let length = usize::try_from(length).ok()?;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

fn socket(protocol: Protocol, groups: u32) -> Result<OwnedFd, Errno> {
    let socket = net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(protocol),
    )?;
    if groups != 0 {
        net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    }
    Ok(socket)
}

/// Asks, and gives each answer's body to `note`.
///
/// # Errors
/// The kernel does not know the protocol, does not let us ask, or does not answer.
pub fn ask(
    protocol: Protocol,
    kind: u16,
    flags: u16,
    mut note: impl FnMut(&[u8]),
) -> Result<(), Errno> {
    let socket = socket(protocol, 0)?;
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
    let length = u32::try_from(HEADER + FAMILY_HEADER).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend_from_slice(&[0; 8 + FAMILY_HEADER]);
    net::send(&socket, &request, SendFlags::empty())?;
    let mut buffer = vec![0; BUFFER];
    loop {
        // The kernel alone sends to a socket that is bound to nothing but its own number.
        let read = match net::recv(&socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((read, _)) => read,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        };
        for (kind, body) in messages(buffer.get(..read).unwrap_or_default()) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = body.get(..4).and_then(|it| it.try_into().ok());
                    let code = i32::from_ne_bytes(code.unwrap_or_default());
                    return Err(Errno::from_raw_os_error(code.saturating_neg()));
                }
                _ => note(body),
            }
        }
        if flags & NLM_F_DUMP == 0 {
            return Ok(());
        }
    }
}

/// Hears of changes.
#[derive(Debug)]
pub struct Watch(Vec<OwnedFd>);

impl Watch {
    /// Hears of every change in these groups from now on, as far as the kernel knows of them.
    ///
    /// # Errors
    /// It knows of none, or does not tell us.
    pub fn open(groups: &[(Protocol, u32)]) -> Result<Self, Errno> {
        let mut sockets = Vec::new();
        let mut failed = Errno::NODATA;
        for (protocol, groups) in groups {
            match socket(*protocol, *groups) {
                Ok(socket) => sockets.push(socket),
                Err(errno) => failed = errno,
            }
        }
        match sockets.is_empty() {
            true => Err(failed),
            false => Ok(Self(sockets)),
        }
    }

    /// Waits for the end of a change, not longer than `most` for its beginning; false when there is
    /// none.
    ///
    /// # Errors
    /// A socket is of no use any more.
    pub fn wait(&self, most: &Timespec) -> Result<bool, Errno> {
        let mut changed = false;
        // What never stops changing is looked at all the same.
        for _ in 0..MOST_WORDS {
            let patience = if changed { &QUIET } else { most };
            let fds = self.0.iter().map(|it| PollFd::new(it, PollFlags::IN));
            let mut fds: Vec<_> = fds.collect();
            match poll(&mut fds, Some(patience)) {
                Ok(0) => break,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            }
            changed = true;
            for socket in &self.0 {
                // Only that something was said counts. Too much of it at once is lost, and told once.
                match net::recv(socket, &mut [0_u8; 64][..], RecvFlags::DONTWAIT) {
                    Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(changed)
    }
}
