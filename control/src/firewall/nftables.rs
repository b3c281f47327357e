//! Chains of nftables that see what comes in for this host, as the kernel lists them (nfnetlink).
//!
//! In: the kernel's answers, or nothing where it has no such tables; its word when they change. Out: chains,
//! whoever made them (iptables' rules among them, with its own matches), and which of them are on the way in.
//! Invariant: what is not understood is for some clients only, and may refuse them; answers that are cut or
//! make no sense end the list, never the process.

use std::net::IpAddr;

use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;
use shared::netlink::NLM_F_DUMP;

use super::chains::{Chain, GOES_ON, Hook, INET, IPV4, IPV6, NETDEV, Rule, Verdict};
use super::netlink::{ask, attributes, whole};

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
/// linux/netfilter/xt_addrtype.h: addresses of this host.
const RTN_LOCAL: u16 = 1 << 2;
/// linux/netfilter/xt_rpfilter.h
const RPFILTER_INVERT: u8 = 1 << 3;
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
    // Those of type route see only what leaves.
    let decides = matches!(text(rest, 7).as_deref(), Some("filter" | "nat"));
    Some(Chain {
        family,
        table: text(rest, 1)?,
        name: text(rest, 3)?,
        hook: hook.filter(|_| decides),
        shown_by: None,
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

/// Adds what a match of iptables asks for, as the kernel keeps it; none when it asks for more than that.
fn match_of(rule: &mut Rule, name: &str, revision: u32, content: &[u8]) -> Option<()> {
    let byte = |at: usize| content.get(at).copied();
    let short = |at: usize| {
        let bytes = content.get(at..at + 2)?.try_into().ok()?;
        Some(u16::from_ne_bytes(bytes))
    };
    match (name, revision) {
        ("comment", _) => {}
        // `struct xt_tcp`: ports of the source and of the destination, an option, flags, what is negated.
        ("tcp", 0) => {
            let negated = byte(11)?;
            if negated & 2 == 0 {
                rule.narrow(&[(short(4)?, short(6)?)]);
            }
            let of_source = (short(0)?, short(2)?) != (0, u16::MAX);
            (!of_source && byte(8)? == 0 && byte(9)? == 0 && negated == 0).then_some(())?;
        }
        // `struct xt_multiport_v1`: which ports, how many, ports, which begin a range, what is negated.
        ("multiport", 1) => {
            let (count, negated) = (usize::from(byte(1)?), byte(47)?);
            (byte(0)? == 1 && negated == 0).then_some(())?;
            let (mut ranges, mut at) = (Vec::new(), 0);
            while at < count.min(15) {
                let low = short(2 + 2 * at)?;
                let is_range = byte(32 + at)? != 0;
                at += usize::from(is_range);
                ranges.push((low, short(2 + 2 * at)?));
                at += 1;
            }
            rule.narrow(&ranges);
        }
        // `struct xt_conntrack_mtinfo2` and 3: nothing but the state is asked for, and only whether it is invalid.
        ("conntrack", 2 | 3) => {
            let asked = [short(146)?, short(148)?, short(150)?];
            rule.elsewhere |= asked == [1, 0, 1];
            return None;
        }
        // `struct xt_addrtype_info_v1`: kinds of the source and of the destination, what is negated.
        ("addrtype", 1) => {
            let flags = u32::from_ne_bytes(content.get(4..8)?.try_into().ok()?);
            let is_own = short(2)? & RTN_LOCAL != 0;
            (short(0)? == 0 && flags == 0 && is_own).then_some(())?;
        }
        // There is no way back: nobody can make a connection from there.
        ("rpfilter", 0) if byte(0)? & RPFILTER_INVERT != 0 => rule.elsewhere = true,
        _ => return None,
    }
    Some(())
}

fn rule_of(body: &[u8]) -> Option<(u8, String, String, Rule)> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    let handle = attribute(rest, 3).and_then(|it| it.try_into().ok());
    let mut rule = Rule::new(u64::from_be_bytes(handle.unwrap_or_default()));
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
                    Some(range) => rule.narrow(&[range]),
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
            "reject" | "queue" | "synproxy" | "tproxy" | "fwd" | "target" | "nat" | "redir" => {
                rule.verdict = Verdict::MayRefuse;
            }
            "match" => {
                let match_name = text(expression, 1).unwrap_or_default();
                let revision = number(expression, 2).unwrap_or_default();
                let content = attribute(expression, 3).unwrap_or_default();
                if match_of(&mut rule, &match_name, revision, content).is_none() {
                    rule.for_all = false;
                }
            }
            // A map of verdicts.
            "lookup" if number(expression, 3) == Some(VERDICT_REGISTER) => {
                rule.verdict = Verdict::MayRefuse;
            }
            _ => rule.for_all = false,
        }
    }
    Some((family, text(rest, 1)?, text(rest, 2)?, rule))
}

/// All chains with their rules.
///
/// # Errors
/// The kernel has no nftables, or does not let us look, or they change all the time.
pub fn chains() -> Result<Vec<Chain>, Errno> {
    whole(|| {
        let before = generation()?;
        let chains = list()?;
        // Chains and rules are two lists.
        (generation()? == before)
            .then_some(chains)
            .ok_or(Errno::INTR)
    })
}

fn list() -> Result<Vec<Chain>, Errno> {
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

    proptest! {
        #[test]
        fn no_answer_ends_the_process(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for (_, _, body) in messages(&bytes) {
                let _ = (chain_of(body), rule_of(body));
            }
            let _ = (chain_of(&bytes), rule_of(&bytes));
        }
    }
}
