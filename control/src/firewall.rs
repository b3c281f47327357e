//! What the host's firewall says about clients of service ports.
//!
//! In: chains of nftables and policies of IPsec as the kernel lists them, and tables of iptables' older kind in
//! its own words; their changes. Out: which of them may turn such clients away or lead them elsewhere, which the
//! kernel path would bypass, and rows that leave their ports to the relay as long as one may. Invariants: what is
//! not understood counts as a refusal; no answer is never taken for an open firewall.

mod chains;
mod follow;
mod ipsec;
mod iptables;
mod netlink;
mod nftables;

use std::io;
use std::net::IpAddr;
use std::process::Output;
use std::time::Duration;

use config::Config;
use rustix::io::Errno;
use thiserror::Error;
use tokio::sync::Semaphore;

use self::chains::{Chain, Clients, Hook, IPV6, Index, Refusal as Refused};
pub use self::follow::follow;

/// Deadline of one question.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a program of the iptables family ends that has not got its lock, or no memory.
const NO_RESOURCES: i32 = 4;

/// It is not known what the firewall says, for now.
#[derive(Debug, Error)]
#[error("{0} does not tell its rules now; another program may hold its lock")]
pub struct NoAnswer(&'static str);

/// The same, and none when there was no answer, for who only shows it.
pub async fn rules(program: &'static str, words: &[&str]) -> Option<String> {
    ask(program, words).await.unwrap_or_default()
}

/// What a program of the iptables family says; none when there is no such program or chain, or when we
/// may not look.
///
/// # Errors
/// There was no answer.
pub async fn ask(program: &'static str, words: &[&str]) -> Result<Option<String>, NoAnswer> {
    let mut command = tokio::process::Command::new(program);
    command.arg("-w").arg("2").args(words).kill_on_drop(true);
    match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(outcome) => said(program, outcome),
        Err(_) => Err(NoAnswer(program)),
    }
}

fn said(program: &'static str, outcome: io::Result<Output>) -> Result<Option<String>, NoAnswer> {
    let output = match outcome {
        Ok(output) => output,
        // A folder of PATH that we may not search hides that there is no such program.
        Err(err)
            if matches!(
                err.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            return Ok(None);
        }
        Err(_) => return Err(NoAnswer(program)),
    };
    // So it ends, too, where we may not look, and where the kernel has no nftables.
    let for_good = || {
        let words = String::from_utf8_lossy(&output.stderr);
        [
            "Permission denied",
            "Operation not permitted",
            "generation id: Invalid argument",
        ]
        .iter()
        .any(|why| words.contains(why))
    };
    match output.status.code() {
        Some(0) => Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned())),
        Some(NO_RESOURCES) | None if !for_good() => Err(NoAnswer(program)),
        _ => Ok(None),
    }
}

/// What may turn clients of service ports away, or lead them elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The chain, or the table that nobody shows.
    pub by: String,
    /// The rule that may do so; none when it is the policy, or some rule.
    pub rule: Option<String>,
    /// It is asked before the chains of incoming packets are.
    pub is_early: bool,
    /// What lets them in.
    pub remedy: String,
}

/// Why the firewall decides about clients of service ports, if it does: what `node.honour-firewall`
/// says or, where that is left out, a chain on their way that may turn some of them away.
///
/// # Errors
/// Nothing that was told refuses, and not all was told.
pub async fn decider(config: &Config) -> Result<Option<String>, NoAnswer> {
    if let Some(said) = config.node.honour_firewall {
        return Ok(said.then(|| "node.honour-firewall".to_owned()));
    }
    if let Some(first) = refusals(config).await?.into_iter().next() {
        return Ok(Some(format!("{} may turn clients away", first.by)));
    }
    let decides = listed("IPsec", ipsec::decides_about_clients).await?;
    Ok((decides == Some(true)).then(|| {
        "a policy of IPsec (`ip xfrm policy`, and its `getdefault`) says how clients come in or are answered".to_owned()
    }))
}

/// What was answered; notes where there was no answer.
fn told<T>(answer: Result<Option<T>, NoAnswer>, silent: &mut Option<NoAnswer>) -> Option<T> {
    answer.unwrap_or_else(|err| {
        *silent = Some(err);
        None
    })
}

/// What the kernel lists of that; none where it has none, or does not let us look.
async fn listed<T: Send + 'static>(
    what: &'static str,
    list: impl FnOnce() -> Result<T, Errno> + Send + 'static,
) -> Result<Option<T>, NoAnswer> {
    match tokio::task::spawn_blocking(list).await {
        Ok(Ok(found)) => Ok(Some(found)),
        Ok(Err(errno)) if has_none(errno) => {
            tracing::debug!(%errno, what, "the kernel lists none");
            Ok(None)
        }
        Ok(Err(errno)) => {
            tracing::debug!(%errno, what, "the kernel does not answer");
            Err(NoAnswer(what))
        }
        Err(_) => Err(NoAnswer(what)),
    }
}

/// Whether the kernel says so that it has no such thing, or does not let us look at it.
fn has_none(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::INVAL
            | Errno::OPNOTSUPP
            | Errno::PROTONOSUPPORT
            // Nobody listens to the protocol in this network namespace.
            | Errno::CONNREFUSED
            | Errno::PERM
            | Errno::ACCESS
    )
}

/// All that may turn clients of service ports away; first what is asked about incoming packets.
///
/// # Errors
/// Nothing that was told refuses, and not all was told.
pub async fn refusals(config: &Config) -> Result<Vec<Refusal>, NoAnswer> {
    const ADDRESSES: &str = "the kernel's list of addresses";
    let mut silent = None;
    let range = &config.container.port_range;
    // It waits for who holds the lock of all interfaces: one thread at most does.
    static ASKED: Semaphore = Semaphore::const_new(1);
    let addresses = async {
        let asked = ASKED.acquire().await.ok()?;
        let asked = tokio::task::spawn_blocking(move || {
            let _asked = asked;
            own_addresses()
        });
        asked.await.ok()?.ok()
    };
    let addresses = tokio::time::timeout(PATIENCE, addresses).await;
    let Ok(Some(addresses)) = addresses else {
        return Err(NoAnswer(ADDRESSES));
    };
    let mut clients = Clients {
        ports: (range.first, range.last),
        with_ipv6: config.container.bind_host.is_ipv6(),
        addresses,
        may_be_untracked: false,
    };
    let (mut found, mut all) = (Vec::new(), Vec::new());
    let listed = listed("the kernel's nftables", nftables::chains).await;
    all.extend(told(listed, &mut silent));
    for ipv6 in [false, true] {
        let tables = iptables::loaded(ipv6);
        if tables.is_empty() || (ipv6 && !clients.with_ipv6) {
            continue;
        }
        let program = iptables::program(ipv6).await.map(Some);
        let Some(program) = told(program, &mut silent) else {
            continue;
        };
        for table in &tables {
            match iptables::chains(program, table, ipv6).await {
                Ok(Some(chains)) => all.push(chains),
                Ok(None) => found.push(Refusal {
                    by: format!("the table {table}, which {program} would show,"),
                    rule: None,
                    is_early: false,
                    remedy: format!("install {program}, which shows its rules"),
                }),
                Err(err) => silent = Some(err),
            }
        }
    }
    let mut rules = all.iter().flatten().flat_map(|it| &it.rules);
    clients.may_be_untracked = rules.any(|it| it.untracks(&clients));
    for chains in &all {
        found.extend(refused(chains, &clients));
    }
    found.sort_by_key(|it| it.is_early);
    match silent {
        Some(err) if found.is_empty() => Err(err),
        _ => Ok(found),
    }
}

/// Those of the chains on the way in that may turn these clients away.
fn refused(chains: &[Chain], clients: &Clients) -> Vec<Refusal> {
    let concerned = |it: &&Chain| it.family != IPV6 || clients.with_ipv6;
    let (first, last) = clients.ports;
    let index = Index::new(chains);
    let refusal = |chain: &Chain| {
        let hook = chain.hook?;
        let rule = match chain.refusal(&index, clients)? {
            Refused::Policy => None,
            Refused::Rule(at, number) => Some(chain.naming(&at, number)),
        };
        Some(Refusal {
            by: format!("the chain {chain}"),
            rule,
            is_early: hook != Hook::Input,
            remedy: format!(
                "let them in where its rules come from, or run: {}",
                chain.admitting(first, last)
            ),
        })
    };
    chains
        .iter()
        .filter(concerned)
        .filter_map(refusal)
        .collect()
}

/// Addresses that clients may come to.
fn own_addresses() -> nix::Result<Vec<IpAddr>> {
    let all = nix::ifaddrs::getifaddrs()?.filter_map(|it| {
        let address = it.address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
    });
    Ok(all.collect())
}

/// Whether one of the comma-joined ports or ranges of a rule of iptables holds all of `first` to `last`.
pub fn covers(ports: &str, first: u16, last: u16) -> bool {
    let holds = |(low, high): &(u16, u16)| *low <= first && last <= *high;
    iptables::ranges(ports).is_some_and(|it| it.iter().any(holds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_kernel_that_fails_to_list_is_no_open_firewall() {
        for none in [
            Errno::INVAL,
            Errno::OPNOTSUPP,
            Errno::PROTONOSUPPORT,
            Errno::PERM,
        ] {
            assert_eq!(
                listed("it", move || Err::<(), _>(none)).await.unwrap(),
                None
            );
        }
        for failure in [
            Errno::PROTO,
            Errno::NODATA,
            Errno::IO,
            Errno::NOBUFS,
            Errno::INTR,
        ] {
            let list = move || Err::<(), _>(failure);
            assert!(listed("it", list).await.is_err(), "{failure}");
        }
    }

    #[test]
    fn no_answer_is_no_open_firewall() {
        use std::os::unix::process::ExitStatusExt as _;
        let ended = |status: i32, words: &str| {
            said(
                "iptables",
                Ok(Output {
                    status: std::process::ExitStatus::from_raw(status),
                    stdout: b"-P INPUT DROP\n".to_vec(),
                    stderr: words.as_bytes().to_vec(),
                }),
            )
        };
        let locked = "Another app is currently holding the xtables lock.";
        assert!(ended(4 << 8, locked).is_err());
        assert!(ended(9, "").is_err(), "killed");
        let out_of = io::Error::from(io::ErrorKind::OutOfMemory);
        assert!(said("iptables", Err(out_of)).is_err());
        assert_eq!(ended(0, "").unwrap().unwrap(), "-P INPUT DROP\n");
        // No such chain, nobody whom it is told, no such program.
        assert_eq!(ended(1 << 8, "No chain by that name.").unwrap(), None);
        for words in [
            "Permission denied (you must be root)",
            "Could not fetch rule set generation id: Invalid argument",
        ] {
            assert_eq!(ended(4 << 8, words).unwrap(), None);
        }
        for kind in [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied] {
            assert_eq!(said("iptables", Err(kind.into())).unwrap(), None);
        }
    }
}
