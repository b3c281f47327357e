//! Questions to the kernel, and its word of changes (netlink(7)).
//!
//! In: a protocol and the kind of a question. Out: the bodies of its answers. Invariant: answers that are
//! cut or make no sense end the list, never the process; a list that changed while it was read is none.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};
use shared::netlink::{
    NLA_TYPE_MASK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR,
};

const HEADER: usize = 16;
/// What follows it in a question: a family, which is any.
const FAMILY_HEADER: usize = 4;
/// The kernel answers at once; a lost answer is no reason to wait for long.
const ANSWER: Duration = Duration::from_secs(2);
/// Reads of a list that changes meanwhile.
const READS: u32 = 10;
const BETWEEN_READS: Duration = Duration::from_millis(20);
const BUFFER: usize = 1 << 17;
/// A change rarely comes alone: what follows within this time belongs to it.
const QUIET: Duration = Duration::from_millis(200);
/// And what follows later than this after its beginning does not, however little quiet there was.
const LONGEST: Duration = Duration::from_secs(1);

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

/// Answers to a request: kind, flags and body.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
        let length = usize::try_from(length).ok()?;
        let short = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let (kind, flags) = (short(4)?, short(6)?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, flags, body))
    })
}

/// Reads a list again that changed while it was read (`INTR`).
///
/// # Errors
/// It can't be read, or changes all the time.
pub fn whole<T>(mut list: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut reads = 1;
    loop {
        match list() {
            Err(Errno::INTR) if reads < READS => {
                reads += 1;
                std::thread::sleep(BETWEEN_READS);
            }
            outcome => return outcome,
        }
    }
}

fn socket(protocol: Option<Protocol>, groups: u32) -> Result<OwnedFd, Errno> {
    let socket = net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )?;
    if groups != 0 {
        net::bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    }
    Ok(socket)
}

/// Asks, and gives each answer's body to `note`.
///
/// # Errors
/// The kernel does not know the protocol, does not let us ask, or does not answer. `INTR`: what was asked for
/// changed meanwhile, and what `note` got may be torn.
pub fn ask(
    protocol: Protocol,
    kind: u16,
    flags: u16,
    note: impl FnMut(&[u8]),
) -> Result<(), Errno> {
    let socket = socket(Some(protocol), 0)?;
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
    let length = u32::try_from(HEADER + FAMILY_HEADER).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    request.extend_from_slice(&[0; 8 + FAMILY_HEADER]);
    net::send(&socket, &request, SendFlags::empty())?;
    answers(&socket, flags & NLM_F_DUMP != 0, note)
}

/// The error number in a message that has one first, which is negative.
fn failure(body: &[u8]) -> Option<Errno> {
    let code = i32::from_ne_bytes(body.get(..4)?.try_into().ok()?);
    (code < 0).then(|| Errno::from_raw_os_error(code.saturating_neg()))
}

fn answers(socket: &OwnedFd, is_list: bool, mut note: impl FnMut(&[u8])) -> Result<(), Errno> {
    let mut buffer = vec![0; BUFFER];
    let mut is_torn = false;
    loop {
        // The kernel alone sends to a socket that is bound to nothing but its own number.
        let read = match net::recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((read, _)) => read,
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno),
        };
        for (kind, flags, body) in messages(buffer.get(..read).unwrap_or_default()) {
            is_torn |= is_list && flags & NLM_F_DUMP_INTR != 0;
            match kind {
                NLMSG_ERROR => return Err(failure(body).unwrap_or(Errno::PROTO)),
                NLMSG_DONE => {
                    let failed = failure(body).or(is_torn.then_some(Errno::INTR));
                    return failed.map_or(Ok(()), Err);
                }
                _ => note(body),
            }
        }
        if !is_list {
            return Ok(());
        }
    }
}

/// Hears of changes.
#[derive(Debug)]
pub struct Watch(Vec<OwnedFd>);

impl Watch {
    /// Hears of every change in these groups from now on, as far as the kernel knows of them; without a
    /// protocol, of links, addresses and routes.
    ///
    /// # Errors
    /// It knows of none, or does not tell us.
    pub fn open(groups: &[(Option<Protocol>, u32)]) -> Result<Self, Errno> {
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

    /// Hears what is said by one socket.
    #[cfg(test)]
    pub fn of(socket: OwnedFd) -> Self {
        Self(vec![socket])
    }

    /// Waits for the end of a change, or until it has gone on for a second, and not longer than `most` for its
    /// beginning; false when there is none.
    ///
    /// # Errors
    /// A socket is of no use any more.
    pub fn wait(&self, most: &Timespec) -> Result<bool, Errno> {
        let mut began: Option<Instant> = None;
        loop {
            let patience = match began.map(|began| LONGEST.checked_sub(began.elapsed())) {
                None => *most,
                Some(Some(left)) => timespec(left.min(QUIET)),
                // What never stops changing is looked at all the same.
                Some(None) => break,
            };
            let fds = self.0.iter().map(|it| PollFd::new(it, PollFlags::IN));
            let mut fds: Vec<_> = fds.collect();
            match poll(&mut fds, Some(&patience)) {
                Ok(0) => break,
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno),
            }
            began.get_or_insert_with(Instant::now);
            for socket in &self.0 {
                // Only that something was said counts. Too much of it at once is lost, and told once.
                match net::recv(socket, &mut [0_u8; 64][..], RecvFlags::DONTWAIT) {
                    Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => {}
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(began.is_some())
    }
}

/// A time of less than the longest a change may take.
fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: 0,
        tv_nsec: time.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    }

    /// The kernel's end of a socket, and ours.
    fn pair() -> (OwnedFd, OwnedFd) {
        net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap()
    }

    /// What comes of a list whose messages these are.
    fn read(packets: &[Vec<u8>]) -> (Result<(), Errno>, usize) {
        let (kernel, socket) = pair();
        for packet in packets {
            net::send(&kernel, packet, SendFlags::empty()).unwrap();
        }
        let mut noted = 0;
        let outcome = answers(&socket, true, |_| noted += 1);
        (outcome, noted)
    }

    #[test]
    fn a_list_that_changed_while_it_was_read_is_none() {
        let entry = |flags| message(0x0a03, flags, &[0; 8]);
        let done = |flags, code: i32| message(NLMSG_DONE, flags, &code.to_ne_bytes());
        assert_eq!(read(&[entry(0), done(0, 0)]), (Ok(()), 1));
        let torn = Err(Errno::INTR);
        let both = [entry(0), entry(NLM_F_DUMP_INTR)].concat();
        assert_eq!(read(&[both, done(0, 0)]), (torn, 2));
        assert_eq!(read(&[done(NLM_F_DUMP_INTR, 0)]), (torn, 0));
        let short_of = done(0, -Errno::NOMEM.raw_os_error());
        assert_eq!(read(&[entry(0), short_of]), (Err(Errno::NOMEM), 1));
    }

    #[test]
    fn a_list_that_changes_is_read_again_but_not_for_ever() {
        let mut reads = 0;
        let outcome = whole(|| {
            reads += 1;
            (reads == 3).then_some(reads).ok_or(Errno::INTR)
        });
        assert_eq!(outcome, Ok(3));
        let (mut reads, mut refused) = (0, 0);
        let outcome: Result<(), Errno> = whole(|| {
            reads += 1;
            Err(Errno::INTR)
        });
        assert_eq!((outcome, reads), (Err(Errno::INTR), READS));
        let outcome: Result<(), Errno> = whole(|| {
            refused += 1;
            Err(Errno::PERM)
        });
        assert_eq!((outcome, refused), (Err(Errno::PERM), 1));
    }

    #[test]
    fn changes_that_never_pause_do_not_put_the_look_off() {
        const WORDS: usize = 500;
        let (kernel, socket) = pair();
        let watch = Watch(vec![socket]);
        let changes = std::thread::spawn(move || {
            (0..WORDS)
                .take_while(|_| {
                    std::thread::sleep(Duration::from_millis(10));
                    // Nobody listens any more once the look was not put off.
                    net::send(&kernel, &[0], SendFlags::NOSIGNAL).is_ok()
                })
                .count()
        });
        let most = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        assert_eq!(watch.wait(&most), Ok(true));
        drop(watch);
        assert!(changes.join().unwrap() < WORDS);
    }
}
