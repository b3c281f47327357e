//! Queueing disciplines at the ingress of interfaces.
//!
//! In: an interface. Out: which kind stands there. Invariant: of no answer nothing is concluded.

use super::asker::Asker;
use super::{NetlinkError, attributes};

// linux/rtnetlink.h
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;
const TCA_KIND: u16 = 1;
// linux/netlink.h: without it kernels before 6.7 tell only those who listen.
const NLM_F_ECHO: u16 = 8;
/// linux/pkt_sched.h: of both `ingress` and `clsact`.
const TC_H_INGRESS: u32 = 0xffff_fff1;
/// `struct tcmsg`.
const TCMSG: usize = 20;

/// The kind of the queueing discipline at the ingress of this interface: `clsact`, which has an egress too, or
/// `ingress`, which has not.
///
/// # Errors
/// The step that failed; the kernel refuses when there is none.
pub fn kind_at_ingress(index: u32) -> Result<Option<String>, NetlinkError> {
    let mut body = vec![0; TCMSG];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[12..16].copy_from_slice(&TC_H_INGRESS.to_ne_bytes());
    let mut found = None;
    Asker::open()?.ask(RTM_GETQDISC, NLM_F_ECHO, &body, |kind, body| {
        if kind == RTM_NEWQDISC {
            let mut values = attributes(body.get(TCMSG..).unwrap_or_default());
            let name = values.find(|(kind, _)| *kind == TCA_KIND);
            found = name.map(|(_, name)| {
                String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default())
                    .into_owned()
            });
        }
    })?;
    Ok(found)
}
