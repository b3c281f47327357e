//! Looking at the firewall again whenever it changes.
//!
//! In: the kernel's word that tables of nftables, policies of IPsec or addresses of this host have changed; for
//! tables of the older kind, which change without a word, a look now and then. Out: what all rows say of it.
//! Invariants: a row that was made by an earlier decision does not stay, whatever its kernel or the engine does; a
//! firewall that does not answer is asked again, and changes nothing meanwhile.

use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use config::Config;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, XFRM};
use shared::log_limit::LogLimit;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::netlink::Watch;
use super::{decider, ipsec, iptables, nftables, own_addresses};
use crate::link::Link;

/// linux/rtnetlink.h: RTNLGRP_IPV4_IFADDR and RTNLGRP_IPV6_IFADDR, which rules may be about.
const ADDRESSES: u32 = 1 << 4 | 1 << 8;
/// Distance of looks without a word.
const SLOWLY: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};
/// Least distance of two looks: the engine changes its own rules with every container, and a look
/// starts programs.
const PAUSE: Duration = Duration::from_secs(1);
/// Before the firewall is asked again that has not answered.
const AGAIN: Duration = Duration::from_secs(5);

/// What the last look was at.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    generation: Option<u32>,
    ipsec: Option<bool>,
    addresses: Option<Vec<IpAddr>>,
}

impl Seen {
    /// Nothing when only a look itself can tell.
    fn now() -> Option<Self> {
        let silent = [false, true].map(iptables::loaded);
        silent.iter().all(Vec::is_empty).then(|| Self {
            generation: nftables::generation().ok(),
            ipsec: ipsec::decides_about_clients().ok(),
            addresses: own_addresses().ok(),
        })
    }
}

/// Waits for the word of a change. A watch that has failed is opened again; what changed meanwhile
/// shows in what is [`Seen`].
fn hear(watch: &mut Option<Watch>, open: impl FnOnce() -> Result<Watch, Errno>) -> bool {
    if watch.is_none() {
        *watch = open().ok();
    }
    let Some(open) = watch else {
        std::thread::sleep(AGAIN);
        return false;
    };
    open.wait(&SLOWLY).unwrap_or_else(|errno| {
        tracing::debug!(%errno, "no word of changes of the firewall; asking for it again");
        *watch = None;
        std::thread::sleep(PAUSE);
        false
    })
}

/// Tells when the firewall may have changed, from a thread of its own that blocks.
fn listen(stopping: CancellationToken) -> std::io::Result<Arc<Notify>> {
    let changed = Arc::new(Notify::new());
    let notify = changed.clone();
    std::thread::Builder::new()
        .name("firewall".into())
        .spawn(move || {
            let groups = [
                (Some(NETFILTER), nftables::CHANGES),
                (Some(XFRM), ipsec::CHANGES),
                (None, ADDRESSES),
            ];
            let mut watch = None;
            let mut seen = Seen::now();
            // It may have changed since the look at the agent's start.
            notify.notify_one();
            while !stopping.is_cancelled() {
                let told = hear(&mut watch, || Watch::open(&groups));
                let now = Seen::now();
                if now.is_none() || now != seen || told {
                    seen = now;
                    notify.notify_one();
                }
            }
        })?;
    Ok(changed)
}

/// Keeps what all rows say right until the agent stops.
pub async fn follow(config: Arc<Config>, link: Link, stopping: CancellationToken) {
    if config.node.honour_firewall.is_some() {
        return;
    }
    let changed = match listen(stopping.clone()) {
        Ok(changed) => changed,
        Err(err) => {
            tracing::warn!(%err, "changes of the firewall are not seen before the next start");
            return;
        }
    };
    let mut trouble = LogLimit::new();
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = changed.notified() => {}
        }
        let pause = match look(&config, &link).await {
            Ok(()) => PAUSE,
            Err(err) => {
                if let Some(suppressed) = trouble.pass() {
                    tracing::warn!(
                        err = &*err,
                        suppressed,
                        "it is not known what the firewall says, or not told to all ports; what it said last holds"
                    );
                }
                changed.notify_one();
                AGAIN
            }
        };
        tokio::select! {
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Looks at the firewall once, and has the rows say what it decides.
async fn look(config: &Config, link: &Link) -> Result<(), Box<dyn Error + Send + Sync>> {
    let found = decider(config).await?;
    if link.honour_firewall(found.is_some()).await? {
        match found {
            Some(why) => tracing::info!(
                why,
                "the firewall has changed: it decides about new clients of service ports, the relay serves them"
            ),
            None => tracing::info!(
                "the firewall has changed: it lets clients of service ports in, the kernel path serves them"
            ),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    #[test]
    fn a_watch_whose_socket_has_failed_is_opened_again() {
        // Always ready, and nothing can be received from it.
        let failed = std::fs::File::open("/dev/null").unwrap();
        let (kernel, socket) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        send(&kernel, b"changed", SendFlags::empty()).unwrap();
        let mut watch = Some(Watch::of(failed.into()));
        let told = hear(&mut watch, || panic!("it is open"));
        assert!(!told && watch.is_none());
        assert!(hear(&mut watch, || Ok(Watch::of(socket))));
        assert!(watch.is_some());
    }
}
