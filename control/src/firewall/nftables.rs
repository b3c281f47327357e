//! Chains of nftables that see what comes in for this host, as the kernel lists them (nfnetlink).
//!
//! In: the kernel's answers, or nothing where it has no such tables; its word when they change. Out:
//! base chains of type filter on the way in (ingress, prerouting, input), and the first rule of each
//! that may turn new clients away, in the chains it jumps to as well. Invariant: what is not
//! understood counts as a refusal; answers that are cut or make no sense end the list, never the
//! process.

use std::net::IpAddr;

use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;
use shared::netlink::NLM_F_DUMP;

use super::netlink::{ask, attributes};

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFTABLES: u16 = 10 << 8;
const GET_CHAIN: u16 = NFTABLES | 4;
const GET_RULE: u16 = NFTABLES | 7;
const GET_GENERATION: u16 = NFTABLES | 16;
/// The seventh group: changes of tables, chains, rules and sets.
pub const CHANGES: u32 = 1 << 6;
/// `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
const VERDICT_REGISTER: u32 = 0;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const META_L4PROTO: u32 = 16;
const META_NFPROTO: u32 = 15;
const CT_STATE: u32 = 0;
const CT_INVALID: u32 = 1;
const TCP: u64 = 6;
/// Targets of iptables (as nftables names them in its rules) after which the next rule is asked.
const GOES_ON: [&str; 12] = [
    "LOG", "NFLOG", "MARK", "CONNMARK", "TRACE", "CT", "NOTRACK", "TCPMSS", "SET", "DSCP", "TOS",
    "CLASSIFY",
];
/// Rules that are read before a set of chains counts as not understood.
const MOST_RULES: u32 = 20_000;
/// Chains that jump to one another: the kernel takes no more either.
const DEEPEST: u32 = 16;

/// Families of tables, as the kernel numbers them.
pub const INET: u8 = 1;
/// Tables for IPv4.
pub const IPV4: u8 = 2;
/// Tables for IPv6.
pub const IPV6: u8 = 10;
/// Tables of single devices.
const NETDEV: u8 = 5;

/// Where a base chain meets packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// As they come in by a device.
    Ingress,
    /// Before it is known where they go.
    Prerouting,
    /// On their way to a program of this host.
    Input,
}

/// A chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Of its table.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Where it meets packets; those that are only jumped to meet none of themselves.
    pub hook: Option<Hook>,
    drops: bool,
    rules: Vec<Rule>,
}

/// What a rule does to a client that its tests let through.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// The next rule is asked.
    GoesOn,
    Accepts,
    /// Or leads to where it may be refused.
    MayRefuse,
    /// Back to the rule after the jump, or to the policy.
    Returns,
    /// Another chain of the table is asked, and then the next rule.
    Jumps(String),
    /// Another chain of the table is asked, in the place of this one.
    Continues(String),
}

/// A rule, as far as it says something about new clients of TCP ports.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    /// The kernel's number for it.
    handle: u64,
    /// Ports it is about.
    ports: (u16, u16),
    /// New TCP connections never meet it.
    elsewhere: bool,
    /// The one destination that it is about.
    destination: Option<IpAddr>,
    /// It is about IPv6 (or IPv4) alone.
    of_ipv6: Option<bool>,
    /// It has no other tests than those above.
    for_all: bool,
    verdict: Verdict,
}

/// Clients that are asked about.
#[derive(Debug, Clone)]
pub struct Clients {
    /// The first and the last port that they may want.
    pub ports: (u16, u16),
    /// Some may speak IPv6.
    pub with_ipv6: bool,
    /// Where they come to: the addresses of this host.
    pub addresses: Vec<IpAddr>,
}

/// Where clients may be turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// By a rule: its chain and the kernel's number for it.
    Rule(String, u64),
    /// By the policy of the base chain.
    Policy,
}

/// What becomes of all clients in a chain.
enum Outcome {
    GoesOn,
    Admits,
    Refuses(Refusal),
}

/// The first chain of `chains` with these names.
fn named<'a>(chains: &'a [Chain], of: &Chain, name: &str) -> Option<&'a Chain> {
    let same = |it: &&Chain| (it.family, &it.table) == (of.family, &of.table) && it.name == name;
    chains.iter().find(same)
}

impl Rule {
    /// Whether clients meet it, and whether all of them do.
    fn meets(&self, clients: &Clients) -> Option<bool> {
        let ((low, high), (first, last)) = (self.ports, clients.ports);
        let elsewhere = self.elsewhere
            || high < first
            || last < low
            || self
                .destination
                .is_some_and(|it| !clients.addresses.contains(&it))
            || (self.of_ipv6 == Some(true) && !clients.with_ipv6);
        let whole = self.for_all
            && self.destination.is_none()
            && low <= first
            && last <= high
            && (self.of_ipv6.is_none() || (self.of_ipv6 == Some(false) && !clients.with_ipv6));
        (!elsewhere).then_some(whole)
    }
}

/// Follows clients through a chain and those that it jumps to; `left` bounds the work.
fn follow(
    chains: &[Chain],
    chain: &Chain,
    clients: &Clients,
    depth: u32,
    left: &mut u32,
) -> Outcome {
    // Some have gone back already: what is said of the rest does not hold for all.
    let mut parted = false;
    for rule in &chain.rules {
        let refuses = || Outcome::Refuses(Refusal::Rule(chain.name.clone(), rule.handle));
        *left = left.saturating_sub(1);
        if *left == 0 || depth > DEEPEST {
            return refuses();
        }
        let Some(whole) = rule.meets(clients) else {
            continue;
        };
        match &rule.verdict {
            Verdict::GoesOn => {}
            Verdict::MayRefuse => return refuses(),
            Verdict::Accepts if whole && !parted => return Outcome::Admits,
            Verdict::Accepts => {}
            Verdict::Returns if whole => return Outcome::GoesOn,
            Verdict::Returns => parted = true,
            Verdict::Jumps(name) | Verdict::Continues(name) => {
                let Some(next) = named(chains, chain, name) else {
                    return refuses();
                };
                match follow(chains, next, clients, depth + 1, left) {
                    Outcome::Refuses(refusal) => return Outcome::Refuses(refusal),
                    Outcome::Admits if whole && !parted => return Outcome::Admits,
                    Outcome::Admits => {}
                    Outcome::GoesOn if matches!(rule.verdict, Verdict::Continues(_)) => {
                        if whole {
                            return Outcome::GoesOn;
                        }
                        parted = true;
                    }
                    Outcome::GoesOn => {}
                }
            }
        }
    }
    Outcome::GoesOn
}

impl Chain {
    /// Where it may turn away new clients, if it does. `chains` are all there are.
    pub fn refusal(&self, chains: &[Chain], clients: &Clients) -> Option<Refusal> {
        let mut left = MOST_RULES;
        match follow(chains, self, clients, 0, &mut left) {
            Outcome::Refuses(refusal) => Some(refusal),
            Outcome::GoesOn if self.drops => Some(Refusal::Policy),
            Outcome::GoesOn | Outcome::Admits => None,
        }
    }

    /// The command that lets them in.
    pub fn admitting(&self, first: u16, last: u16) -> String {
        let (family, table, name) = (self.family_name(), &self.table, &self.name);
        format!("nft insert rule {family} {table} {name} tcp dport {first}-{last} accept")
    }

    fn family_name(&self) -> &'static str {
        match self.family {
            INET => "inet",
            IPV4 => "ip",
            NETDEV => "netdev",
            _ => "ip6",
        }
    }
}

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (family, table) = (self.family_name(), &self.table);
        write!(f, "{} of nftables' {family} {table}", self.name)
    }
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|it| it.0 == kind).map(|it| it.1)
}

fn text(bytes: &[u8], kind: u16) -> Option<String> {
    let content = attribute(bytes, kind)?;
    let content = content.strip_suffix(&[0]).unwrap_or(content);
    Some(String::from_utf8_lossy(content).into_owned())
}

/// Numbers of attributes are in the network's order.
fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    let content = attribute(bytes, kind)?;
    Some(u32::from_be_bytes(content.try_into().ok()?))
}

/// The value in an attribute of data, as it is compared: byte by byte.
fn value(bytes: &[u8], kind: u16) -> Option<u64> {
    let content = attribute(attribute(bytes, kind)?, 1)?;
    let fold = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
    (content.len() <= 8).then(|| content.iter().fold(0, fold))
}

fn chain_of(body: &[u8]) -> Option<Chain> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    if ![INET, IPV4, IPV6, NETDEV].contains(&family) {
        return None;
    }
    let number_of_hook = attribute(rest, 4).and_then(|it| number(it, 1));
    let hook = match (family, number_of_hook) {
        (NETDEV, Some(0)) | (INET, Some(5)) => Some(Hook::Ingress),
        (INET | IPV4 | IPV6, Some(0)) => Some(Hook::Prerouting),
        (INET | IPV4 | IPV6, Some(1)) => Some(Hook::Input),
        _ => None,
    };
    // Those that translate addresses refuse nothing.
    let filters = text(rest, 7).as_deref() == Some("filter");
    Some(Chain {
        family,
        table: text(rest, 1)?,
        name: text(rest, 3)?,
        hook: hook.filter(|_| filters),
        // The policy of a chain without a hook is nothing.
        drops: number(rest, 5).is_some_and(|policy| policy != 1),
        rules: Vec::new(),
    })
}

/// What a register holds, where that is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loaded {
    Protocol,
    Family,
    Port,
    Destination,
    ReversePath,
    State,
    Invalid,
    Other,
}

fn loaded(name: &str, expression: &[u8], before: Loaded) -> Loaded {
    let (two, three, four) = (
        number(expression, 2),
        number(expression, 3),
        number(expression, 4),
    );
    match name {
        "meta" if two == Some(META_L4PROTO) => Loaded::Protocol,
        "payload" if (two, three, four) == (Some(NETWORK_HEADER), Some(9), Some(1)) => {
            Loaded::Protocol
        }
        "meta" if two == Some(META_NFPROTO) => Loaded::Family,
        "payload" if (two, three, four) == (Some(TRANSPORT_HEADER), Some(2), Some(2)) => {
            Loaded::Port
        }
        "payload"
            if two == Some(NETWORK_HEADER)
                && [(Some(16), Some(4)), (Some(24), Some(16))].contains(&(three, four)) =>
        {
            Loaded::Destination
        }
        // Which way an answer would take: FIB_RESULT_OIF of the source.
        "fib" if two == Some(1) && three.is_some_and(|flags| flags & 1 != 0) => Loaded::ReversePath,
        "ct" if two == Some(CT_STATE) => Loaded::State,
        "bitwise" if before == Loaded::State => {
            let mask = attribute(expression, 4).and_then(|it| attribute(it, 1));
            if mask == Some(&CT_INVALID.to_ne_bytes()) {
                Loaded::Invalid
            } else {
                Loaded::Other
            }
        }
        _ => Loaded::Other,
    }
}

/// The ports that a test lets through, if it is one of ports.
fn tested_ports(name: &str, expression: &[u8]) -> Option<(u16, u16)> {
    let port = |kind| u16::try_from(value(expression, kind)?).ok();
    match (name, number(expression, 2)?) {
        ("cmp", 0) => Some((port(3)?, port(3)?)),
        ("cmp", 2) => Some((0, port(3)?.checked_sub(1)?)),
        ("cmp", 3) => Some((0, port(3)?)),
        ("cmp", 4) => Some((port(3)?.checked_add(1)?, u16::MAX)),
        ("cmp", 5) => Some((port(3)?, u16::MAX)),
        ("range", 0) => Some((port(3)?, port(4)?)),
        _ => None,
    }
}

fn verdict_of(expression: &[u8]) -> Verdict {
    let verdict = attribute(expression, 2).and_then(|it| attribute(it, 2));
    let code = verdict.and_then(|it| number(it, 1)).map(u32::cast_signed);
    match (code, verdict.and_then(|it| text(it, 2))) {
        (Some(1), _) => Verdict::Accepts,
        // CONTINUE and BREAK.
        (Some(-1 | -2), _) => Verdict::GoesOn,
        (Some(-3), Some(chain)) => Verdict::Jumps(chain),
        (Some(-4), Some(chain)) => Verdict::Continues(chain),
        (Some(-5), _) => Verdict::Returns,
        _ => Verdict::MayRefuse,
    }
}

/// The address that is compared with.
fn compared_address(expression: &[u8]) -> Option<IpAddr> {
    let content = attribute(attribute(expression, 3)?, 1)?;
    match content.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(content).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(content).ok()?)),
        _ => None,
    }
}

fn rule_of(body: &[u8]) -> Option<(u8, String, String, Rule)> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    let handle = attribute(rest, 3).and_then(|it| it.try_into().ok());
    let mut rule = Rule {
        handle: u64::from_be_bytes(handle.unwrap_or_default()),
        ports: (0, u16::MAX),
        elsewhere: false,
        destination: None,
        of_ipv6: None,
        for_all: true,
        verdict: Verdict::GoesOn,
    };
    let mut held = Loaded::Other;
    for (_, element) in attributes(attribute(rest, 4).unwrap_or_default()) {
        let name = text(element, 1)?;
        let expression = attribute(element, 2).unwrap_or_default();
        match name.as_str() {
            "meta" | "payload" | "ct" | "bitwise" | "fib" => {
                held = loaded(&name, expression, held);
            }
            "cmp" | "range" => match held {
                Loaded::Family if number(expression, 2) == Some(0) => {
                    rule.of_ipv6 = value(expression, 3).map(|it| it == u64::from(IPV6));
                }
                Loaded::Destination if number(expression, 2) == Some(0) => {
                    rule.destination = compared_address(expression);
                    rule.for_all &= rule.destination.is_some();
                }
                // There is no way back: nobody can make a connection from there.
                Loaded::ReversePath
                    if number(expression, 2) == Some(0) && value(expression, 3) == Some(0) =>
                {
                    rule.elsewhere = true;
                }
                Loaded::Protocol if number(expression, 2) == Some(0) => {
                    rule.elsewhere |= value(expression, 3).is_some_and(|it| it != TCP);
                }
                Loaded::Port => match tested_ports(&name, expression) {
                    Some((low, high)) => {
                        rule.ports = (rule.ports.0.max(low), rule.ports.1.min(high));
                    }
                    None => rule.for_all = false,
                },
                Loaded::Invalid if number(expression, 2) == Some(1) => rule.elsewhere = true,
                _ => rule.for_all = false,
            },
            "counter" | "log" | "notrack" => {}
            "immediate" if number(expression, 1) == Some(VERDICT_REGISTER) => {
                rule.verdict = verdict_of(expression);
            }
            "target" if text(expression, 1).is_some_and(|it| GOES_ON.contains(&it.as_str())) => {}
            "reject" | "queue" | "synproxy" | "tproxy" | "fwd" | "target" => {
                rule.verdict = Verdict::MayRefuse;
            }
            // iptables' own name for the way back, which is only asked for what has none.
            "match" if text(expression, 1).as_deref() == Some("rpfilter") => rule.elsewhere = true,
            // A map of verdicts.
            "lookup" if number(expression, 3) == Some(VERDICT_REGISTER) => {
                rule.verdict = Verdict::MayRefuse;
            }
            _ => rule.for_all = false,
        }
    }
    // No port is in all of the rule's tests.
    rule.elsewhere |= rule.ports.0 > rule.ports.1;
    Some((family, text(rest, 1)?, text(rest, 2)?, rule))
}

/// All chains with their rules.
///
/// # Errors
/// The kernel has no nftables, or does not let us look.
pub fn chains() -> Result<Vec<Chain>, Errno> {
    let mut chains = Vec::new();
    ask(NETFILTER, GET_CHAIN, NLM_F_DUMP, |body| {
        chains.extend(chain_of(body))
    })?;
    if chains.iter().all(|it| it.hook.is_none()) {
        return Ok(Vec::new());
    }
    ask(NETFILTER, GET_RULE, NLM_F_DUMP, |body| {
        let Some((family, table, name, rule)) = rule_of(body) else {
            return;
        };
        let same = |it: &&mut Chain| (it.family, &it.table, &it.name) == (family, &table, &name);
        if let Some(chain) = chains.iter_mut().find(same) {
            chain.rules.push(rule);
        }
    })?;
    Ok(chains)
}

/// A number that is another one after each change.
///
/// # Errors
/// The kernel has no nftables, or does not let us look.
pub fn generation() -> Result<u32, Errno> {
    let mut generation = None;
    ask(NETFILTER, GET_GENERATION, 0, |body| {
        generation = body.get(FAMILY_HEADER..).and_then(|it| number(it, 1));
    })?;
    generation.ok_or(Errno::NODATA)
}

#[cfg(test)]
mod tests {
    use super::super::netlink::messages;
    use super::*;
    use proptest::prelude::*;

    fn chain(name: &str, drops: bool, rules: Vec<Rule>) -> Chain {
        Chain {
            family: INET,
            table: "firewalld".to_owned(),
            name: name.to_owned(),
            hook: Some(Hook::Input),
            drops,
            rules,
        }
    }

    fn rule(ports: (u16, u16), for_all: bool, verdict: Verdict) -> Rule {
        Rule {
            handle: 7,
            ports,
            elsewhere: false,
            destination: None,
            of_ipv6: None,
            for_all,
            verdict,
        }
    }

    const ALL: (u16, u16) = (0, u16::MAX);
    const POOL: (u16, u16) = (30_000, 31_000);

    fn refusal(chains: &[Chain]) -> Option<Refusal> {
        let clients = Clients {
            ports: POOL,
            with_ipv6: false,
            addresses: vec![IpAddr::from([192, 0, 2, 1])],
        };
        chains[0].refusal(chains, &clients)
    }

    #[test]
    fn the_first_rule_that_decides_for_all_ports_decides() {
        let refuses = |drops, rules| refusal(&[chain("in", drops, rules)]).is_some();
        assert!(!refuses(false, vec![]));
        assert!(refuses(true, vec![]));
        assert!(refuses(false, vec![rule(ALL, true, Verdict::MayRefuse)]));
        assert!(!refuses(
            false,
            vec![rule((22, 22), true, Verdict::MayRefuse)]
        ));
        let admits = || rule(POOL, true, Verdict::Accepts);
        assert!(!refuses(true, vec![admits()]));
        assert!(!refuses(
            true,
            vec![admits(), rule(ALL, true, Verdict::MayRefuse)]
        ));
        assert!(refuses(true, vec![rule(POOL, false, Verdict::Accepts)]));
        assert!(refuses(
            true,
            vec![rule((30_000, 30_500), true, Verdict::Accepts)]
        ));
        let only = |change: fn(&mut Rule)| {
            let mut it = rule(ALL, true, Verdict::MayRefuse);
            change(&mut it);
            refuses(false, vec![it])
        };
        assert!(!only(|it| it.elsewhere = true));
        assert!(!only(|it| it.of_ipv6 = Some(true)));
        assert!(only(|it| it.of_ipv6 = Some(false)));
        // Of a container, whose own address clients of the host's ports never name.
        assert!(!only(
            |it| it.destination = Some(IpAddr::from([172, 17, 0, 2]))
        ));
        assert!(only(
            |it| it.destination = Some(IpAddr::from([192, 0, 2, 1]))
        ));
    }

    #[test]
    fn clients_are_followed_where_rules_send_them() {
        let to = |name: &str| Verdict::Jumps(name.to_owned());
        let base = |verdict| chain("in", true, vec![rule(ALL, true, verdict)]);
        let found = |next: Vec<Rule>| refusal(&[base(to("next")), chain("next", false, next)]);
        assert_eq!(found(vec![rule(POOL, true, Verdict::Accepts)]), None);
        assert_eq!(found(vec![]), Some(Refusal::Policy));
        assert_eq!(
            found(vec![rule(ALL, false, Verdict::MayRefuse)]),
            Some(Refusal::Rule("next".to_owned(), 7))
        );
        // Some of them go back to where they are refused, before the others are let in.
        assert_eq!(
            found(vec![
                rule(ALL, false, Verdict::Returns),
                rule(ALL, true, Verdict::Accepts)
            ]),
            Some(Refusal::Policy)
        );
        assert_eq!(
            found(vec![
                rule((22, 22), true, Verdict::Returns),
                rule(ALL, true, Verdict::Accepts)
            ]),
            None
        );
        // What is sent on for good does not come back to the rule that would let it in.
        let away = Verdict::Continues("next".to_owned());
        let parts = |for_all| {
            let rules = vec![
                rule(ALL, for_all, away.clone()),
                rule(ALL, true, Verdict::Accepts),
            ];
            refusal(&[chain("in", true, rules), chain("next", false, vec![])])
        };
        assert_eq!(
            (parts(true), parts(false)),
            (Some(Refusal::Policy), Some(Refusal::Policy))
        );
        // Nowhere, and round and round.
        assert!(refusal(&[base(to("nowhere"))]).is_some());
        assert!(found(vec![rule(ALL, true, to("next"))]).is_some());
    }

    #[test]
    fn work_is_bounded() {
        // Each chain asks the next one a hundred times.
        let chains: Vec<Chain> = (0..10)
            .map(|number| {
                let next = Verdict::Jumps((number + 1).to_string());
                chain(
                    &number.to_string(),
                    false,
                    vec![rule(ALL, false, next); 100],
                )
            })
            .chain([chain("10", false, vec![])])
            .collect();
        assert!(refusal(&chains).is_some());
    }

    proptest! {
        #[test]
        fn no_answer_ends_the_process(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for (_, body) in messages(&bytes) {
                let _ = (chain_of(body), rule_of(body));
            }
            let _ = (chain_of(&bytes), rule_of(&bytes));
        }
    }
}
