//! Chains of nftables that see what comes in for this host, as the kernel lists them (nfnetlink).
//!
//! In: the kernel's answers, or nothing where it has no such tables. Out: base chains of type filter at
//! the input hook, with what each of their rules may do to new clients. Invariant: what is not
//! understood counts as a refusal; answers that are cut or make no sense end the list, never the
//! process.

use std::time::Duration;

use rustix::io::Errno;
use rustix::net::netlink;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

// linux/netlink.h, linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const HEADER: usize = 16;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NFTABLES: u16 = 10 << 8;
const GET_CHAIN: u16 = NFTABLES | 4;
const GET_RULE: u16 = NFTABLES | 7;
const TYPE_MASK: u16 = 0x3fff;
/// `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
const HOOK_INPUT: u32 = 1;
const VERDICT_REGISTER: u32 = 0;
const TRANSPORT_HEADER: u32 = 2;
const META_L4PROTO: u32 = 16;
const CT_STATE: u32 = 0;
const CT_INVALID: u32 = 1;
const TCP: u64 = 6;

/// The kernel answers at once; a lost answer is no reason to wait for long.
const ANSWER: Duration = Duration::from_secs(2);
const BUFFER: usize = 1 << 17;

/// Families of tables, as the kernel numbers them.
pub const INET: u8 = 1;
/// Tables for IPv4.
pub const IPV4: u8 = 2;
/// Tables for IPv6.
pub const IPV6: u8 = 10;

/// A chain at the input hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Of its table.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    drops: bool,
    rules: Vec<Rule>,
}

/// What a rule does to a client that its tests let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The next rule is asked.
    GoesOn,
    Accepts,
    /// Or leads to where it may be refused.
    MayRefuse,
}

/// A rule, as far as it says something about new clients of TCP ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    /// Ports it is about.
    ports: (u16, u16),
    /// New TCP connections never meet it.
    elsewhere: bool,
    /// It has no other tests than those above.
    for_all: bool,
    verdict: Verdict,
}

impl Chain {
    /// Whether it may turn away new clients of TCP ports `first` to `last`.
    pub fn may_refuse(&self, first: u16, last: u16) -> bool {
        for rule in &self.rules {
            let (low, high) = rule.ports;
            if rule.elsewhere || high < first || last < low {
                continue;
            }
            match rule.verdict {
                Verdict::GoesOn => {}
                Verdict::Accepts if rule.for_all && low <= first && last <= high => return false,
                Verdict::Accepts => {}
                Verdict::MayRefuse => return true,
            }
        }
        self.drops
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

/// Attributes one after the other: kind and content.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?);
        let content = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE_MASK, content))
    })
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

/// Answers to a request: kind and body.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
        let length = usize::try_from(length).ok()?;
        let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
        let body = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

fn chain_of(body: &[u8]) -> Option<Chain> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    let hook = number(attribute(rest, 4)?, 1)?;
    if hook != HOOK_INPUT
        || ![INET, IPV4, IPV6].contains(&family)
        || text(rest, 7).as_deref() != Some("filter")
    {
        return None;
    }
    Some(Chain {
        family,
        table: text(rest, 1)?,
        name: text(rest, 3)?,
        drops: number(rest, 5) != Some(1),
        rules: Vec::new(),
    })
}

/// What a register holds, where that is understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loaded {
    Protocol,
    Port,
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
        "payload" if (two, three, four) == (Some(TRANSPORT_HEADER), Some(2), Some(2)) => {
            Loaded::Port
        }
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
    // ACCEPT, then CONTINUE and BREAK. What jumps elsewhere or returns to the policy may refuse.
    let code = attribute(expression, 2)
        .and_then(|it| attribute(it, 2))
        .and_then(|it| number(it, 1));
    match code.map(u32::cast_signed) {
        Some(1) => Verdict::Accepts,
        Some(-1 | -2) => Verdict::GoesOn,
        _ => Verdict::MayRefuse,
    }
}

fn rule_of(body: &[u8]) -> Option<(u8, String, String, Rule)> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    let mut rule = Rule {
        ports: (0, u16::MAX),
        elsewhere: false,
        for_all: true,
        verdict: Verdict::GoesOn,
    };
    let mut held = Loaded::Other;
    for (_, element) in attributes(attribute(rest, 4).unwrap_or_default()) {
        let name = text(element, 1)?;
        let expression = attribute(element, 2).unwrap_or_default();
        match name.as_str() {
            "meta" | "payload" | "ct" | "bitwise" => held = loaded(&name, expression, held),
            "cmp" | "range" => match held {
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
            "reject" | "queue" | "synproxy" | "tproxy" | "fwd" | "target" => {
                rule.verdict = Verdict::MayRefuse;
            }
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

fn ask(kind: u16, mut note: impl FnMut(&[u8])) -> Result<(), Errno> {
    let socket = net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        Some(netlink::NETFILTER),
    )?;
    sockopt::set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER))?;
    let length = u32::try_from(HEADER + FAMILY_HEADER).unwrap_or(u32::MAX);
    let mut request = length.to_ne_bytes().to_vec();
    request.extend_from_slice(&kind.to_ne_bytes());
    request.extend_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
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
    }
}

/// The chains at the input hook with their rules.
///
/// # Errors
/// The kernel has no nftables, or does not let us look.
pub fn input_chains() -> Result<Vec<Chain>, Errno> {
    let mut chains = Vec::new();
    ask(GET_CHAIN, |body| chains.extend(chain_of(body)))?;
    if chains.is_empty() {
        return Ok(chains);
    }
    ask(GET_RULE, |body| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chain(drops: bool, rules: Vec<Rule>) -> Chain {
        Chain {
            family: INET,
            table: "firewalld".to_owned(),
            name: "filter_INPUT".to_owned(),
            drops,
            rules,
        }
    }

    fn rule(ports: (u16, u16), for_all: bool, verdict: Verdict) -> Rule {
        Rule {
            ports,
            elsewhere: false,
            for_all,
            verdict,
        }
    }

    #[test]
    fn the_first_rule_that_decides_for_all_ports_decides() {
        let all = (0, u16::MAX);
        let refuses = |drops, rules| chain(drops, rules).may_refuse(30_000, 31_000);
        assert!(!refuses(false, vec![]));
        assert!(refuses(true, vec![]));
        assert!(refuses(false, vec![rule(all, true, Verdict::MayRefuse)]));
        assert!(!refuses(
            false,
            vec![rule((22, 22), true, Verdict::MayRefuse)]
        ));
        let admits = rule((30_000, 31_000), true, Verdict::Accepts);
        assert!(!refuses(true, vec![admits]));
        assert!(!refuses(
            true,
            vec![admits, rule(all, true, Verdict::MayRefuse)]
        ));
        assert!(refuses(
            true,
            vec![rule((30_000, 31_000), false, Verdict::Accepts)]
        ));
        assert!(refuses(
            true,
            vec![rule((30_000, 30_500), true, Verdict::Accepts)]
        ));
        let elsewhere = Rule {
            elsewhere: true,
            ..rule(all, true, Verdict::MayRefuse)
        };
        assert!(!refuses(false, vec![elsewhere]));
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
