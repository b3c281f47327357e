//! Tables of iptables' older kind, which the kernel shows to iptables' own programs alone.
//!
//! In: tables that the kernel has loaded, and what `iptables -S` says of them. Out: their chains; that nobody
//! shows them. Tables of the newer kind are nftables'. Invariant: what is not understood is for some clients
//! only, and may refuse them; a loaded table that is not shown is never taken for an open one.

use std::collections::HashMap;
use std::net::IpAddr;

use super::chains::{
    Chain, ESTABLISHED, GOES_ON, Hook, INVALID, IPV4, IPV6, NEW, RELATED, Rule, STATES, TRANSLATED,
    UNTRACKED, Verdict,
};
use super::{NoAnswer, ask};

/// Tables of the older kind that the kernel has loaded.
pub fn loaded(ipv6: bool) -> Vec<String> {
    let names = if ipv6 { "ip6" } else { "ip" };
    let names = std::fs::read_to_string(format!("/proc/net/{names}_tables_names"));
    names
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// The program that shows tables of the older kind.
///
/// # Errors
/// The usual one does not say of which kind it is.
pub async fn program(ipv6: bool) -> Result<&'static str, NoAnswer> {
    let (usual, older) = match ipv6 {
        false => ("iptables", "iptables-legacy"),
        true => ("ip6tables", "ip6tables-legacy"),
    };
    let version = ask(usual, &["-V"]).await?;
    let is_older = version.is_some_and(|it| !it.contains("nf_tables"));
    Ok(if is_older { usual } else { older })
}

/// The chains of a table; none when the program is not there, or does not show it.
///
/// # Errors
/// There was no answer.
pub async fn chains(
    program: &'static str,
    table: &str,
    ipv6: bool,
) -> Result<Option<Vec<Chain>>, NoAnswer> {
    let said = ask(program, &["-t", table, "-S"]).await?;
    Ok(said.map(|text| parse(&text, program, table, ipv6)))
}

/// Words of a line, as the programs quote them.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word) = (Vec::new(), None::<String>);
    let (mut is_quoted, mut escapes) = (false, false);
    for letter in line.chars() {
        match letter {
            _ if escapes => {
                word.get_or_insert_default().push(letter);
                escapes = false;
            }
            '\\' if is_quoted => escapes = true,
            '"' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            _ if letter.is_whitespace() && !is_quoted => words.extend(word.take()),
            _ => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

/// The comma-joined ports or ranges of a rule; none where one makes no sense.
pub fn ranges(ports: &str) -> Option<Vec<(u16, u16)>> {
    let range = |range: &str| {
        let (low, high) = range.split_once(':').unwrap_or((range, range));
        Some((low.parse().ok()?, high.parse().ok()?))
    };
    ports.split(',').map(range).collect()
}

/// The one address that a rule is about; for all loopback addresses one of them.
fn host(destination: &str) -> Option<IpAddr> {
    let (address, length) = destination.split_once('/').unwrap_or((destination, ""));
    let address: IpAddr = address.parse().ok()?;
    let whole = if address.is_ipv4() { "32" } else { "128" };
    let is_one = ["", whole].contains(&length);
    (is_one || (address.is_loopback() && length == "8")).then_some(address)
}

/// What the rule does with `target`, which may be one of its table's chains.
fn verdict(target: &str, chains: &HashMap<&str, usize>) -> Verdict {
    match target {
        "ACCEPT" => Verdict::Accepts,
        "RETURN" => Verdict::Returns,
        _ if chains.contains_key(target) => Verdict::Jumps(target.to_owned()),
        _ if GOES_ON.contains(&target) => Verdict::GoesOn,
        _ => Verdict::MayRefuse,
    }
}

/// The comma-joined states of connections; none where one is not known.
fn states(names: &str) -> Option<u32> {
    let state = |name| match name {
        "INVALID" => Some(INVALID),
        "NEW" => Some(NEW),
        "ESTABLISHED" => Some(ESTABLISHED),
        "RELATED" => Some(RELATED),
        "UNTRACKED" => Some(UNTRACKED),
        "SNAT" | "DNAT" => Some(TRANSLATED),
        _ => None,
    };
    names
        .split(',')
        .try_fold(0, |all, it| Some(all | state(it)?))
}

/// A rule in the words after its chain's name.
fn rule(words: &[String], number: u64, chains: &HashMap<&str, usize>) -> Rule {
    let mut rule = Rule::new(number);
    let mut of_paths = false;
    let mut words = words.iter().map(String::as_str);
    while let Some(first) = words.next() {
        let is_negated = first == "!";
        let word = if is_negated {
            words.next().unwrap_or_default()
        } else {
            first
        };
        match word {
            // What follows belongs to the target.
            "-j" => {
                let target = words.next().unwrap_or_default();
                rule.verdict = verdict(target, chains);
                rule.untracks = target == "NOTRACK" || words.any(|it| it == "--notrack");
                break;
            }
            "-g" => {
                rule.verdict = Verdict::Continues(words.next().unwrap_or_default().to_owned());
                break;
            }
            "--ctstate" | "--state" => match words.next().and_then(states) {
                Some(states) if !is_negated => rule.of_states(states),
                Some(states) if states & TRANSLATED == 0 => rule.of_states(STATES & !states),
                _ => rule.for_all = false,
            },
            _ if is_negated => rule.for_all = false,
            "--comment" => {
                words.next();
            }
            "-m" => match words.next() {
                Some("tcp" | "multiport" | "comment" | "addrtype" | "conntrack" | "state") => {}
                name => {
                    of_paths |= name == Some("rpfilter");
                    rule.for_all = false;
                }
            },
            "-p" => rule.elsewhere |= !matches!(words.next(), Some("tcp" | "6" | "all")),
            "-d" => {
                rule.destination = words.next().and_then(host);
                rule.for_all &= rule.destination.is_some();
            }
            "--dport" | "--dports" => match words.next().and_then(ranges) {
                Some(ports) => rule.narrow(&ports),
                None => rule.for_all = false,
            },
            "--dst-type" => {
                let mut kinds = words.next().unwrap_or_default().split(',');
                rule.for_all &= kinds.any(|it| it == "LOCAL");
            }
            // There is no way back: nobody can make a connection from there.
            "--invert" if of_paths => rule.elsewhere = true,
            _ => rule.for_all = false,
        }
    }
    rule
}

/// The chains in the words of `program -t table -S`.
fn parse(text: &str, program: &'static str, table: &str, ipv6: bool) -> Vec<Chain> {
    let lines: Vec<Vec<String>> = text.lines().map(words).collect();
    let mut chains: Vec<Chain> = Vec::new();
    for line in &lines {
        let [kind, name, rest @ ..] = line.as_slice() else {
            continue;
        };
        let hook = match (kind.as_str(), name.as_str()) {
            ("-P", "PREROUTING") => Some(Hook::Prerouting),
            ("-P", "INPUT") => Some(Hook::Input),
            ("-P" | "-N", _) => None,
            _ => continue,
        };
        chains.push(Chain {
            family: if ipv6 { IPV6 } else { IPV4 },
            table: table.to_owned(),
            name: name.clone(),
            hook,
            sees_states: table != "raw",
            shown_by: Some(program),
            drops: kind == "-P" && rest.first().is_none_or(|it| it != "ACCEPT"),
            rules: Vec::new(),
        });
    }
    let names: Vec<String> = chains.iter().map(|it| it.name.clone()).collect();
    let places: HashMap<&str, usize> = (0..).zip(&names).map(|it| (&**it.1, it.0)).collect();
    for line in &lines {
        let [kind, name, rest @ ..] = line.as_slice() else {
            continue;
        };
        let place = places.get(&**name).filter(|_| kind == "-A");
        if let Some(chain) = place.and_then(|it| chains.get_mut(*it)) {
            let number = u64::try_from(chain.rules.len()).unwrap_or(u64::MAX);
            let rule = rule(rest, number.saturating_add(1), &places);
            chain.rules.push(rule);
        }
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::super::chains::{Clients, Index};
    use super::*;
    use proptest::prelude::*;

    /// Whether a chain on the way in may refuse clients of 192.0.2.1.
    fn may_refuse(text: &str) -> bool {
        let clients = Clients {
            ports: (30_000, 31_000),
            with_ipv6: false,
            addresses: [[127, 0, 0, 1], [192, 0, 2, 1]].map(IpAddr::from).into(),
            may_be_untracked: false,
        };
        let chains = parse(text, "iptables-legacy", "filter", false);
        let index = Index::new(&chains);
        let mut hooked = chains.iter().filter(|it| it.hook.is_some());
        hooked.any(|it| it.refusal(&index, &clients).is_some())
    }

    #[test]
    fn a_chain_that_lets_all_clients_in_decides_nothing() {
        for chain in [
            "",
            "-P INPUT ACCEPT\n",
            "-P INPUT ACCEPT\n-P FORWARD DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m multiport --dports 22,80:90 -j f2b-sshd\n",
            "-P INPUT ACCEPT\n-A INPUT -p udp -j DROP\n-A INPUT -j LOG\n",
            "-P INPUT ACCEPT\n-A INPUT -m conntrack --ctstate INVALID -j DROP\n",
            "-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m multiport --dports 22,30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT\n\
             -A INPUT -p tcp -m state --state NEW -m tcp --dport 30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m conntrack ! --ctstate INVALID -m tcp --dport 30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -m comment --comment \"all of \\\"us\\\" -j\" -j ACCEPT\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP\n",
            // Docker 28 and later, for what is published on the loopback address.
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 127.0.0.1/32 ! -i lo -p tcp -m tcp --dport 30500 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -d 127.0.0.0/8 ! -i lo -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -m rpfilter --validmark --invert -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -p tcp -m tcp --dport 30000:31000 -j CT --notrack\n",
            // As Docker does for a published port.
            "-P PREROUTING ACCEPT\n-N DOCKER\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
             -A DOCKER -i docker0 -j RETURN\n\
             -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\n",
            // As ufw does where it lets in by default.
            "-P INPUT ACCEPT\n-N before\n-N not-local\n-A INPUT -j before\n-A before -j not-local\n\
             -A not-local -m addrtype --dst-type LOCAL -j RETURN\n-A not-local -j DROP\n",
        ] {
            assert!(!may_refuse(chain), "{chain}");
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
            "-P INPUT DROP\n-A INPUT -s 10.0.0.1/32 -m comment --comment \"-j ACCEPT\" -j DROP\n-A INPUT -j ACCEPT\n",
            "-P INPUT DROP\n-N before\n-A INPUT -j before\n-A before -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m conntrack --ctstate NEW -m tcp --dport 30000:31000 -j ACCEPT\n",
            "-P INPUT DROP\n-A INPUT -p tcp -m conntrack --ctstate NEW,ESTABLISHED --ctproto 6 -j ACCEPT\n",
            "-P INPUT ACCEPT\n-A INPUT -m conntrack ! --ctstate ESTABLISHED,DNAT -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -j nowhere\n",
            "-P INPUT ACCEPT\n-N before\n-A INPUT -g before\n-A before -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n",
            "-P INPUT ACCEPT\n-A INPUT ! -s 10.0.0.0/8 -p tcp -m tcp --dport 30000:31000 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp ! --dport 22 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT ! -p tcp -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -m rpfilter -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -p tcp -m multiport --dports 22,30500 -j DROP\n",
            "-P INPUT ACCEPT\n-A INPUT -s 192.0.2.1/32 -j DROP\n-A INPUT -j ACCEPT\n",
            "-P INPUT ACCEPT\n-A INPUT -m addrtype --dst-type BROADCAST -j RETURN\n-A INPUT -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 192.0.2.1/32 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING ! -d 172.17.0.2/32 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING ! -d 127.0.0.1/32 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 127.0.0.0/1 -j DROP\n",
            "-P PREROUTING ACCEPT\n-A PREROUTING -d 192.0.2.0/24 -j DROP\n",
            "-P PREROUTING ACCEPT\n-N DOCKER\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
             -A DOCKER ! -i docker0 -p tcp -m tcp --dport 30005 -j DNAT --to-destination 172.17.0.2:80\n",
        ] {
            assert!(may_refuse(chain), "{chain}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_said_ends_no_process(
            parts in proptest::collection::vec("(-[PANjgmpd]|INPUT|DROP|!|--dports|1:2|\"|\\\\|a|\n| )", 0..60)
        ) {
            let _ = may_refuse(&parts.concat());
        }
    }
}
