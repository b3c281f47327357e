//! Questions to the kernel over routing netlink, one at a time.
//!
//! In: a kind, flags and a body. Out: the messages of its answer. Invariants: only the kernel's own
//! messages are believed; an answer to a question that was given up is passed over; a wait for an answer
//! has a deadline. None has the wait for the interface lock, which the kernel may take inside a call.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, RecvFlags, SendFlags, SocketFlags};
use shared::netlink::NLM_F_MULTI;

use super::{
    ANSWER, BUFFER, HEADER, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkError,
    from_kernel, messages, open, u32_at,
};

/// A socket to ask by.
#[derive(Debug)]
pub(super) struct Asker {
    fd: OwnedFd,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Asker {
    /// # Errors
    /// No socket.
    pub(super) fn open() -> Result<Self, NetlinkError> {
        let fd = open(0, SocketFlags::empty()).map_err(NetlinkError::Open)?;
        sockopt::set_socket_timeout(&fd, Timeout::Recv, Some(ANSWER))
            .map_err(NetlinkError::Open)?;
        Ok(Self {
            fd,
            buffer: vec![0; BUFFER],
            sequence: 0,
        })
    }

    /// Asks and hands on what is answered, as kinds and bodies; false when a list changed while it
    /// was told.
    ///
    /// # Errors
    /// The step that failed.
    pub(super) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(u16, &[u8]),
    ) -> Result<bool, NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER + body.len()).expect("a few attributes fit in 32 bits");
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend_from_slice(&length.to_ne_bytes());
        request.extend_from_slice(&kind.to_ne_bytes());
        request.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        request.extend_from_slice(&self.sequence.to_ne_bytes());
        request.extend_from_slice(&[0; 4]); // sender: filled in by the kernel
        request.extend_from_slice(body);
        net::send(&self.fd, &request, SendFlags::empty()).map_err(NetlinkError::Ask)?;
        let mut steady = true;
        loop {
            let (read, _, sender) =
                match net::recvfrom(&self.fd, &mut self.buffer[..], RecvFlags::empty()) {
                    Ok(received) => received,
                    Err(Errno::INTR) => continue,
                    Err(errno) => return Err(NetlinkError::Answer(errno)),
                };
            if !from_kernel(sender) {
                continue;
            }
            for message in messages(self.buffer.get(..read).unwrap_or_default()) {
                // An answer to a question given up earlier.
                if message.sequence != self.sequence {
                    continue;
                }
                steady &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_DONE => return Ok(steady),
                    NLMSG_ERROR => {
                        let code = u32_at(message.body, 0).unwrap_or(0).cast_signed();
                        return Err(NetlinkError::Refused(Errno::from_raw_os_error(
                            code.saturating_neg(),
                        )));
                    }
                    kind => each(kind, message.body),
                }
                if message.flags & NLM_F_MULTI == 0 {
                    return Ok(steady);
                }
            }
        }
    }
}
