//! What the host's firewall says about clients of service ports.
//!
//! In: chains in the words of `iptables -S`, and those of nftables as the kernel lists them. Out: which
//! of them may turn such clients away, which the kernel path would pass by. Invariant: what is not
//! understood counts as a refusal.

mod nftables;

use std::net::IpAddr;
use std::time::Duration;

use config::Config;

/// Deadline of one question.
const PATIENCE: Duration = Duration::from_secs(5);
/// Targets after which a packet goes on to the next rule.
const GOES_ON: [&str; 5] = ["LOG", "NFLOG", "MARK", "CONNMARK", "TRACE"];
/// Words of a rule that lets in whoever asks for its ports.
const FOR_ALL: [&str; 10] = [
    "-A",
    "INPUT",
    "-p",
    "tcp",
    "-m",
    "multiport",
    "--dport",
    "--dports",
    "-j",
    "ACCEPT",
];

/// What a program of the iptables family says; none when there is no such program or chain, or no
/// answer.
pub async fn rules(program: &str, words: &[&str]) -> Option<String> {
    let mut command = tokio::process::Command::new(program);
    command.arg("-w").arg("2").args(words).kill_on_drop(true);
    let output = tokio::time::timeout(PATIENCE, command.output()).await;
    let output = output.ok()?.ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Why the firewall decides about clients of service ports, if it does: what `node.honour-firewall`
/// says or, where that is left out, a chain of incoming packets that may turn some of them away.
pub async fn decider(config: &Config) -> Option<String> {
    if let Some(said) = config.node.honour_firewall {
        return said.then(|| "node.honour-firewall".to_owned());
    }
    let range = config.container.port_range;
    for program in programs(config) {
        if let Some(chain) = rules(program, &["-S", "INPUT"]).await
            && may_refuse(&chain, range.first, range.last)
        {
            return Some(format!(
                "the INPUT chain of {program} may turn clients away"
            ));
        }
    }
    let (chain, _) = refusing_chain(config).await?;
    Some(format!("the chain {chain} may turn clients away"))
}

/// Those that show the chains in the way of clients.
fn programs(config: &Config) -> &'static [&'static str] {
    match config.container.bind_host {
        IpAddr::V4(_) => &["iptables"],
        IpAddr::V6(_) => &["iptables", "ip6tables"],
    }
}

/// The first chain of nftables, beside those that iptables shows, that may turn clients of service
/// ports away, and the command that lets them in.
pub async fn refusing_chain(config: &Config) -> Option<(String, String)> {
    let mut shown = Vec::new();
    for program in programs(config) {
        // The older kind of iptables has chains of its own and does not show those of nftables.
        let version = rules(program, &["-V"]).await.unwrap_or_default();
        if version.contains("nf_tables") && rules(program, &["-S", "INPUT"]).await.is_some() {
            shown.push(match *program {
                "iptables" => nftables::IPV4,
                _ => nftables::IPV6,
            });
        }
    }
    let with_v6 = config.container.bind_host.is_ipv6();
    let range = config.container.port_range;
    let chains = tokio::task::spawn_blocking(nftables::input_chains).await;
    let chains = match chains.ok()? {
        Ok(chains) => chains,
        Err(errno) => {
            tracing::debug!(%errno, "the kernel lists no chains of nftables");
            return None;
        }
    };
    let refusing = chains.into_iter().find(|it| {
        let is_shown = shown.contains(&it.family) && it.table == "filter" && it.name == "INPUT";
        let concerned = it.family != nftables::IPV6 || with_v6;
        !is_shown && concerned && it.may_refuse(range.first, range.last)
    })?;
    let opening = refusing.admitting(range.first, range.last);
    Some((refusing.to_string(), opening))
}

/// Whether the INPUT chain may turn away clients of TCP ports `first` to `last`.
pub fn may_refuse(chain: &str, first: u16, last: u16) -> bool {
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
        let negated = words.contains(&"!");
        let elsewhere = !negated
            && (after("-p").is_some_and(|it| it != "tcp")
                || after("-i") == Some("lo")
                || after("--ctstate") == Some("INVALID")
                || ports.is_some_and(|ports| !meets(ports, first, last)));
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
        ] {
            assert!(!may_refuse(chain, 30_000, 31_000), "{chain}");
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
        ] {
            assert!(may_refuse(chain, 30_000, 31_000), "{chain}");
        }
    }
}
