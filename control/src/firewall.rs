//! What the host's firewall says about clients of service ports.
//!
//! In: chains in the words of `iptables -S`, and those of nftables and policies of IPsec as the kernel lists
//! them; their changes. Out: which of them may turn such clients away, which the kernel path would bypass, and
//! rows that leave their ports to the relay as long as one may. Invariants: what is not understood
//! counts as a refusal; no answer is never taken for an open firewall.

mod follow;
mod ipsec;
mod netlink;
mod nftables;

use std::io;
use std::net::IpAddr;
use std::process::Output;
use std::time::Duration;

use config::Config;
use rustix::io::Errno;
use thiserror::Error;

pub use self::follow::follow;
use self::nftables::{Clients, Hook};

/// Deadline of one question.
const PATIENCE: Duration = Duration::from_secs(5);
/// Targets after which a packet goes on to the next rule.
const GOES_ON: [&str; 11] = [
    "LOG", "NFLOG", "MARK", "CONNMARK", "TRACE", "CT", "NOTRACK", "TCPMSS", "DSCP", "TOS",
    "CLASSIFY",
];
/// Words of a rule that lets in whoever asks for its ports.
const FOR_ALL: [&str; 11] = [
    "-A",
    "INPUT",
    "PREROUTING",
    "-p",
    "tcp",
    "-m",
    "multiport",
    "--dport",
    "--dports",
    "-j",
    "ACCEPT",
];

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

/// A chain that may turn clients of service ports away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Its name, and where it is.
    pub chain: String,
    /// The rule that may do so; none when it is the policy, or some rule.
    pub rule: Option<String>,
    /// It is asked before the chains of incoming packets are.
    pub is_early: bool,
    /// The command that lets them in.
    pub opening: String,
    /// It is one of nftables, whoever made it.
    pub is_nftables: bool,
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
        let chain = if first.is_nftables {
            "the chain"
        } else {
            "the"
        };
        return Ok(Some(format!(
            "{chain} {} may turn clients away",
            first.chain
        )));
    }
    let decides = listed("IPsec", ipsec::decides_about_clients).await?;
    Ok((decides == Some(true)).then(|| {
        "a policy of IPsec (`ip xfrm policy`) says how clients come in or are answered".to_owned()
    }))
}

/// A program of the iptables family, and which tables it shows.
#[derive(Debug, Clone, Copy)]
struct Program {
    name: &'static str,
    ipv6: bool,
    /// Those of the older kind, which nftables does not have.
    legacy: bool,
}

/// Those that show chains in the way of clients. A host may have tables of both kinds.
async fn programs(config: &Config, silent: &mut Option<NoAnswer>) -> Vec<Program> {
    let families: &[(bool, [&'static str; 2])] = &[
        (false, ["iptables", "iptables-legacy"]),
        (true, ["ip6tables", "ip6tables-legacy"]),
    ];
    let wanted = match config.container.bind_host {
        IpAddr::V4(_) => &families[..1],
        IpAddr::V6(_) => families,
    };
    let mut found = Vec::new();
    for (ipv6, [usual, older]) in wanted {
        let version = told(ask(usual, &["-V"]).await, silent).unwrap_or_default();
        let legacy = !version.contains("nf_tables");
        if !version.is_empty() {
            found.push(Program {
                name: usual,
                ipv6: *ipv6,
                legacy,
            });
        }
        if !legacy && !legacy_tables(*ipv6).is_empty() {
            found.push(Program {
                name: older,
                ipv6: *ipv6,
                legacy: true,
            });
        }
    }
    found
}

/// Tables of the older kind that the kernel has loaded.
fn legacy_tables(ipv6: bool) -> String {
    let names = if ipv6 { "ip6" } else { "ip" };
    std::fs::read_to_string(format!("/proc/net/{names}_tables_names")).unwrap_or_default()
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
        Ok(Err(
            Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM | Errno::MFILE | Errno::NFILE | Errno::BUSY,
        ))
        | Err(_) => Err(NoAnswer(what)),
        Ok(Err(errno)) => {
            tracing::debug!(%errno, what, "the kernel lists none");
            Ok(None)
        }
    }
}

/// All chains that may turn clients of service ports away; first those of incoming packets.
///
/// # Errors
/// Nothing that was told refuses, and not all was told.
pub async fn refusals(config: &Config) -> Result<Vec<Refusal>, NoAnswer> {
    let mut silent = None;
    let (first, last) = (
        config.container.port_range.first,
        config.container.port_range.last,
    );
    let addresses = own_addresses();
    let mut found = Vec::new();
    let mut early = Vec::new();
    let mut shown = Vec::new();
    for program in programs(config, &mut silent).await {
        let Program { name, ipv6, legacy } = program;
        let tables = legacy_tables(ipv6);
        let has = |table: &str| !legacy || tables.lines().any(|it| it == table);
        let input = match has("filter") {
            true => told(ask(name, &["-S", "INPUT"]).await, &mut silent),
            false => None,
        };
        if let Some(chain) = &input {
            if !legacy {
                shown.push(if ipv6 { nftables::IPV6 } else { nftables::IPV4 });
            }
            if may_refuse(chain, first, last, &addresses) {
                found.push(Refusal {
                    chain: format!("INPUT chain of {name}"),
                    rule: None,
                    is_early: false,
                    opening: format!("{name} -I INPUT -p tcp --dport {first}:{last} -j ACCEPT"),
                    is_nftables: false,
                });
            }
        }
        // nftables lists those of the newer kind itself.
        for table in ["raw", "mangle"] {
            if !legacy || !has(table) {
                continue;
            }
            let answer = ask(name, &["-t", table, "-S", "PREROUTING"]).await;
            if let Some(chain) = told(answer, &mut silent)
                && may_refuse(&chain, first, last, &addresses)
            {
                early.push(Refusal {
                    chain: format!("PREROUTING chain of {name} -t {table}"),
                    rule: None,
                    is_early: true,
                    opening: format!(
                        "{name} -t {table} -I PREROUTING -p tcp --dport {first}:{last} -j ACCEPT"
                    ),
                    is_nftables: false,
                });
            }
        }
    }
    let chains = told(
        listed("the kernel's nftables", nftables::chains).await,
        &mut silent,
    )
    .unwrap_or_default();
    let clients = Clients {
        ports: (first, last),
        with_ipv6: config.container.bind_host.is_ipv6(),
        addresses,
    };
    for chain in &chains {
        let Some(hook) = chain.hook else { continue };
        let is_shown = shown.contains(&chain.family)
            && (chain.table.as_str(), chain.name.as_str()) == ("filter", "INPUT");
        let concerned = chain.family != nftables::IPV6 || clients.with_ipv6;
        if is_shown || !concerned {
            continue;
        }
        let Some(refusal) = chain.refusal(&chains, &clients) else {
            continue;
        };
        let refusal = Refusal {
            chain: chain.to_string(),
            rule: match refusal {
                nftables::Refusal::Policy => None,
                nftables::Refusal::Rule(at, handle) => Some(format!("{handle} of chain {at}")),
            },
            is_early: hook != Hook::Input,
            opening: chain.admitting(first, last),
            is_nftables: true,
        };
        match hook {
            Hook::Input => found.push(refusal),
            Hook::Ingress | Hook::Prerouting => early.push(refusal),
        }
    }
    found.append(&mut early);
    match silent {
        Some(err) if found.is_empty() => Err(err),
        _ => Ok(found),
    }
}

/// Addresses that clients may come to.
fn own_addresses() -> Vec<IpAddr> {
    let all = nix::ifaddrs::getifaddrs().into_iter().flatten();
    all.filter_map(|it| {
        let address = it.address?;
        let v4 = address.as_sockaddr_in().map(|it| IpAddr::V4(it.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::V6(it.ip())))
    })
    .collect()
}

/// Whether the rule is about another destination than this host.
fn is_elsewhere(destination: &str, addresses: &[IpAddr]) -> bool {
    let (address, length) = destination.split_once('/').unwrap_or((destination, ""));
    // Of a network we may be part.
    ["", "32", "128"].contains(&length)
        && address
            .parse()
            .is_ok_and(|address: IpAddr| !addresses.contains(&address))
}

/// Whether a chain may turn away clients of TCP ports `first` to `last` of these addresses.
fn may_refuse(chain: &str, first: u16, last: u16, addresses: &[IpAddr]) -> bool {
    let mut refuses = false;
    for line in chain.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |word: &str| {
            let at = words.iter().position(|it| *it == word)?;
            words.get(at + 1).copied()
        };
        if words.first() == Some(&"-P") {
            refuses = words.get(2) != Some(&"ACCEPT");
            continue;
        }
        let ports = after("--dport").or(after("--dports"));
        let target = after("-j").or(after("-g")).unwrap_or_default();
        if target == "ACCEPT" {
            let all_ports = ports.is_none_or(|ports| covers(ports, first, last));
            let all_clients = |word: &&str| FOR_ALL.contains(word) || Some(*word) == ports;
            if all_ports && words.iter().all(all_clients) {
                return false;
            }
            continue;
        }
        let negated = |word: &str| words.windows(2).any(|it| it == ["!", word]);
        let plain = |word: &str| after(word).filter(|_| !negated(word));
        let elsewhere = plain("-p").is_some_and(|it| it != "tcp")
            || plain("-i") == Some("lo")
            || plain("--ctstate") == Some("INVALID")
            || plain("-d").is_some_and(|it| is_elsewhere(it, addresses))
            // There is no way back: nobody can make a connection from there.
            || (words.contains(&"rpfilter") && words.contains(&"--invert"))
            || plain("--dport")
                .or(plain("--dports"))
                .is_some_and(|ports| !meets(ports, first, last));
        if !GOES_ON.contains(&target) && !target.is_empty() && !elsewhere {
            return true;
        }
    }
    refuses
}

/// The comma-joined ports or ranges of a rule.
fn ranges(ports: &str) -> impl Iterator<Item = Option<(u16, u16)>> {
    ports.split(',').map(|range| {
        let (low, high) = range.split_once(':').unwrap_or((range, range));
        Some((low.parse().ok()?, high.parse().ok()?))
    })
}

/// Whether one of the ranges holds all of `first` to `last`.
pub fn covers(ports: &str, first: u16, last: u16) -> bool {
    ranges(ports)
        .flatten()
        .any(|(low, high)| low <= first && last <= high)
}

/// Whether one of the ranges holds any of `first` to `last`, or is not understood.
fn meets(ports: &str, first: u16, last: u16) -> bool {
    ranges(ports).any(|it| it.is_none_or(|(low, high)| low <= last && first <= high))
}

#[cfg(test)]
mod tests {
    use super::*;

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

    const OWN: [IpAddr; 1] = [IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1))];

    #[test]
    fn a_chain_that_lets_all_clients_in_decides_nothing() {
        for chain in [
            "",
            "-P INPUT ACCEPT\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m multiport --dports 22,80:90 -j f2b-sshd\n",
            "-P INPUT ACCEPT\n-A INPUT -p udp -j DROP\n-A INPUT -j LOG\n",
            "-P INPUT ACCEPT\n-A INPUT -m conntrack --ctstate INVALID -j DROP\n",
            "-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m multiport --dports 22,30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -j ACCEPT\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -m rpfilter --validmark --invert -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp -m tcp --dport 30000:31000 -j CT --notrack\n",
        ] {
            assert!(!may_refuse(chain, 30_000, 31_000, &OWN), "{chain}");
        }
    }

    #[test]
    fn a_chain_that_may_turn_clients_away_decides() {
        for chain in [
            "-P INPUT DROP\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m tcp --dport 30000:30500 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -s 10.0.0.0/8 -p tcp -m tcp --dport 30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -j ufw-before-input\n",
            "-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n",
            "-P INPUT ACCEPT\n-A INPUT ! -s 10.0.0.0/8 -p tcp -m tcp --dport 30000:31000 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp ! --dport 22 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m multiport --dports 22,30500 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -s 192.0.2.1/32 -j DROP\n-A INPUT -j ACCEPT\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 192.0.2.1/32 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING ! -d 172.17.0.2/32 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 192.0.2.0/24 -j DROP\n",
        ] {
            assert!(may_refuse(chain, 30_000, 31_000, &OWN), "{chain}");
        }
    }
}
