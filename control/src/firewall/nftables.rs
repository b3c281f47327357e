//! Chains of nftables that see what comes in for this host, as the kernel lists them (nfnetlink).
//!
//! In: the kernel's answers, or nothing where it has no such tables; its word when they change. Out: chains,
//! whoever made them (iptables' rules among them, with its own matches), and which of them are on the way in.
//! Invariant: what is not understood is for some clients only, and may refuse them; answers that are cut or
//! make no sense end the list, never the process.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};

use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;
use shared::netlink::NLM_F_DUMP;

use super::chains::{
    Chain, GOES_ON, Hook, INET, IPV4, IPV6, NETDEV, Rule, STATES, TRANSLATED, UNTRACKED, Verdict,
};
use super::netlink::{ask, attributes, whole};

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFTABLES: u16 = 10 << 8;
const GET_TABLE: u16 = NFTABLES | 1;
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
const META_PROTOCOL: u32 = 1;
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const OBJECT_SYNPROXY: u32 = 10;
const CT_STATE: u32 = 0;
/// NF_IP_PRI_CONNTRACK: conntrack sees packets at prerouting, after those chains that ask for no more.
const CONNTRACK: i32 = -200;
const DORMANT: u32 = 1;
// linux/netfilter/xt_conntrack.h
const XT_TRANSLATED: u32 = 3 << 6;
const XT_UNTRACKED: u32 = 1 << 8;
/// It was written as a match of the name `state`.
const XT_STATE_ALIAS: u16 = 1 << 13;
/// linux/netfilter/xt_CT.h
const XT_CT_NOTRACK: u16 = 1;
const TCP: u8 = 6;
// linux/rtnetlink.h: kinds of addresses; the first are those of this host.
const LOCAL: u32 = 2;
const BROADCAST: u32 = 3;
const MULTICAST: u32 = 5;
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

/// The bytes of an attribute of data.
fn data(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attribute(attribute(bytes, kind)?, 1)
}

/// Where a register begins, in words of four bytes; none for that of the verdict.
fn place(register: u32) -> Option<u32> {
    match register {
        1..=4 => Some((register - 1) * 4),
        8..=23 => Some(register - 8),
        _ => None,
    }
}

fn chain_of(body: &[u8]) -> Option<Chain> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    if ![INET, IPV4, IPV6, NETDEV].contains(&family) {
        return None;
    }
    let hook = attribute(rest, 4);
    let number_of_hook = hook.and_then(|it| number(it, 1));
    let priority = hook.and_then(|it| number(it, 2)).map(u32::cast_signed);
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
        sees_states: match hook {
            Some(Hook::Input) => true,
            Some(Hook::Prerouting) => priority.is_some_and(|it| it > CONNTRACK),
            Some(Hook::Ingress) | None => false,
        },
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
    EtherType,
    Port,
    Destination,
    /// The first byte of one of IPv4 or more of it.
    Network,
    KindOfDestination,
    ReversePath,
    /// These bits of it.
    State(u32),
}

/// What an expression loads, in a rule of a table of this family.
fn loaded(name: &str, expression: &[u8], family: u8, rule: &Rule) -> Option<Loaded> {
    let is_of = |wanted: u8| family == wanted || rule.of_ipv6 == Some(wanted == IPV6);
    let two = number(expression, 2)?;
    let part = (two, number(expression, 3), number(expression, 4));
    match name {
        "meta" if two == META_L4PROTO => Some(Loaded::Protocol),
        "meta" if two == META_NFPROTO => Some(Loaded::Family),
        "meta" if two == META_PROTOCOL => Some(Loaded::EtherType),
        "payload" => match part {
            (NETWORK_HEADER, Some(9), Some(1)) if is_of(IPV4) => Some(Loaded::Protocol),
            (NETWORK_HEADER, Some(16), Some(4)) if is_of(IPV4) => Some(Loaded::Destination),
            (NETWORK_HEADER, Some(16), Some(1..=3)) if is_of(IPV4) => Some(Loaded::Network),
            (NETWORK_HEADER, Some(24), Some(16)) if is_of(IPV6) => Some(Loaded::Destination),
            (TRANSPORT_HEADER, Some(2), Some(2)) => Some(Loaded::Port),
            _ => None,
        },
        // Which way an answer would take: FIB_RESULT_OIF of the source.
        "fib" if two == 1 && part.1.is_some_and(|flags| flags & 1 != 0) => {
            Some(Loaded::ReversePath)
        }
        // FIB_RESULT_ADDRTYPE of the destination, whatever the device.
        "fib" if part.0 == 3 && part.1 == Some(2) => Some(Loaded::KindOfDestination),
        "ct" if two == CT_STATE => Some(Loaded::State(STATES)),
        _ => None,
    }
}

/// What is left of a register when a mask is laid over it.
fn masked(expression: &[u8], held: Loaded) -> Option<Loaded> {
    let plain = number(expression, 6).is_none_or(|operation| operation == 0)
        && data(expression, 5)?.iter().all(|it| *it == 0);
    match held {
        Loaded::State(bits) if plain => {
            let mask = data(expression, 4)?.try_into().ok()?;
            Some(Loaded::State(bits & u32::from_ne_bytes(mask)))
        }
        Loaded::Destination if plain => {
            matches!(data(expression, 4)?, [u8::MAX, _, _, _]).then_some(Loaded::Network)
        }
        _ => None,
    }
}

/// The states that a test of these bits lets through.
fn tested_states(bits: u32, operation: u32, value: u32) -> Option<u32> {
    // A packet has one state: of several bits at once, none has any.
    let states = match value {
        0 => STATES & !bits,
        one if one.is_power_of_two() && one & bits != 0 => one,
        _ => return None,
    };
    match operation {
        EQUAL => Some(states),
        NOT_EQUAL => Some(STATES & !states),
        _ => None,
    }
}

/// The ports that a test lets through.
fn tested_ports(name: &str, expression: &[u8]) -> Option<(u16, u16)> {
    let port = |kind| Some(u16::from_be_bytes(data(expression, kind)?.try_into().ok()?));
    match (name, number(expression, 2)?) {
        ("cmp", EQUAL) => Some((port(3)?, port(3)?)),
        ("cmp", 2) => Some((0, port(3)?.checked_sub(1)?)),
        ("cmp", 3) => Some((0, port(3)?)),
        ("cmp", 4) => Some((port(3)?.checked_add(1)?, u16::MAX)),
        ("cmp", 5) => Some((port(3)?, u16::MAX)),
        ("range", EQUAL) => Some((port(3)?, port(4)?)),
        _ => None,
    }
}

/// Adds what a test of what a register holds asks for; none when it asks for more than that.
fn test(rule: &mut Rule, name: &str, expression: &[u8], held: Loaded) -> Option<()> {
    if held == Loaded::Port {
        rule.narrow(&[tested_ports(name, expression)?]);
        return Some(());
    }
    if name != "cmp" {
        return None;
    }
    match (held, number(expression, 2)?, data(expression, 3)?) {
        (Loaded::Family, EQUAL, [IPV4]) | (Loaded::EtherType, EQUAL, [0x08, 0x00]) => {
            rule.of_ipv6 = Some(false);
        }
        (Loaded::Family, EQUAL, [IPV6]) | (Loaded::EtherType, EQUAL, [0x86, 0xdd]) => {
            rule.of_ipv6 = Some(true);
        }
        (Loaded::Protocol, EQUAL, [protocol]) => rule.elsewhere |= *protocol != TCP,
        (Loaded::Destination, EQUAL, address) => rule.destination = Some(address_of(address)?),
        // There is no way back: nobody can make a connection from there.
        (Loaded::ReversePath, EQUAL, link) if link.iter().all(|it| *it == 0) => {
            rule.elsewhere = true;
        }
        (Loaded::Network, EQUAL, [127, ..]) => {
            rule.destination = Some(Ipv4Addr::LOCALHOST.into());
        }
        (Loaded::KindOfDestination, operation @ (EQUAL | NOT_EQUAL), kind) => {
            let of_clients = match u32::from_ne_bytes(kind.try_into().ok()?) {
                LOCAL => true,
                BROADCAST | MULTICAST => false,
                _ => return None,
            };
            rule.elsewhere |= of_clients != (operation == EQUAL);
        }
        (Loaded::State(bits), operation, value) => {
            let value = u32::from_ne_bytes(value.try_into().ok()?);
            rule.of_states(tested_states(bits, operation, value)?);
        }
        _ => return None,
    }
    Some(())
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

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let of_ipv4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let of_ipv6 = <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    of_ipv4.or(of_ipv6).ok()
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
        // `struct xt_conntrack_mtinfo2` and 3: what is asked for, what of it is negated, states.
        ("conntrack", 2 | 3) => {
            let (asked, negated, told) = (short(146)?, short(148)?, u32::from(short(150)?));
            let translated = told & XT_TRANSLATED != 0;
            let mut states = told & STATES & !UNTRACKED;
            if told & XT_UNTRACKED != 0 {
                states |= UNTRACKED;
            }
            if translated {
                states |= TRANSLATED;
            }
            match (asked & !XT_STATE_ALIAS, negated) {
                (1, 0) => rule.of_states(states),
                (1, 1) if !translated => rule.of_states(STATES & !states),
                _ => return None,
            }
        }
        // `struct xt_addrtype_info_v1`: kinds of the source and of the destination, what is negated.
        ("addrtype", 1) => {
            let flags = u32::from_ne_bytes(content.get(4..8)?.try_into().ok()?);
            let is_own = short(2)? & (1 << LOCAL) != 0;
            (short(0)? == 0 && flags == 0 && is_own).then_some(())?;
        }
        // There is no way back: nobody can make a connection from there.
        ("rpfilter", 0) if byte(0)? & RPFILTER_INVERT != 0 => rule.elsewhere = true,
        _ => return None,
    }
    Some(())
}

/// Adds what an expression asks for or does; none when it asks for more than that. What does something that
/// is not understood ends the rule, as no test after it undoes that.
fn add(
    rule: &mut Rule,
    name: &str,
    expression: &[u8],
    family: u8,
    held: &mut Option<(u32, Loaded)>,
) -> Option<()> {
    let register = |kind| number(expression, kind).and_then(place);
    let known = |held: Option<(u32, Loaded)>| {
        let (at, what) = held?;
        (register(1) == Some(at)).then_some(what)
    };
    match name {
        // What is written to a packet may lead it elsewhere.
        "payload" if attribute(expression, 5).is_some() => rule.verdict = Verdict::MayRefuse,
        "meta" | "payload" | "ct" | "fib" => {
            let at = register(1);
            *held = at.zip(loaded(name, expression, family, rule));
            // Without a register to load it sets something.
            at?;
        }
        "bitwise" => {
            let left = known(*held).and_then(|it| masked(expression, it));
            *held = register(2).zip(left);
        }
        "cmp" | "range" => test(rule, name, expression, known(*held)?)?,
        "counter" | "log" => {}
        "notrack" => rule.untracks = true,
        "immediate" if number(expression, 1) == Some(VERDICT_REGISTER) => {
            rule.verdict = verdict_of(expression);
        }
        "target" if text(expression, 1).is_some_and(|it| GOES_ON.contains(&it.as_str())) => {
            rule.untracks |= match text(expression, 1)?.as_str() {
                "NOTRACK" => true,
                "CT" => {
                    let flags = attribute(expression, 3)?.first_chunk()?;
                    u16::from_ne_bytes(*flags) & XT_CT_NOTRACK != 0
                }
                _ => false,
            };
        }
        "match" => {
            let match_name = text(expression, 1)?;
            let revision = number(expression, 2)?;
            match_of(rule, &match_name, revision, attribute(expression, 3)?)?;
        }
        // Without a map of verdicts.
        "lookup" if number(expression, 3) != Some(VERDICT_REGISTER) => {
            *held = None;
            return None;
        }
        // All but those that make a proxy answer.
        "objref" if number(expression, 1).is_some_and(|kind| kind != OBJECT_SYNPROXY) => {
            return None;
        }
        "limit" | "quota" | "connlimit" | "last" | "dynset" | "immediate" | "exthdr" | "numgen"
        | "hash" | "rt" | "socket" | "osf" | "xfrm" | "tunnel" | "inner" | "byteorder" | "dup" => {
            *held = None;
            return None;
        }
        _ => rule.verdict = Verdict::MayRefuse,
    }
    Some(())
}

fn rule_of(body: &[u8]) -> Option<(u8, String, String, Rule)> {
    let family = *body.first()?;
    let rest = body.get(FAMILY_HEADER..)?;
    let handle = attribute(rest, 3).and_then(|it| it.try_into().ok());
    let mut rule = Rule::new(u64::from_be_bytes(handle.unwrap_or_default()));
    let mut held = None;
    for (_, element) in attributes(attribute(rest, 4).unwrap_or_default()) {
        let name = text(element, 1).unwrap_or_default();
        let expression = attribute(element, 2).unwrap_or_default();
        // Nor does a test undo that: the rule is about all that got so far.
        let tests = ["cmp", "range", "match", "lookup"].contains(&&*name);
        if rule.untracks && tests {
            rule.verdict = Verdict::MayRefuse;
        } else if add(&mut rule, &name, expression, family, &mut held).is_none() {
            rule.for_all = false;
        }
        if rule.verdict == Verdict::MayRefuse {
            break;
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

/// Family and name of a table that meets no packets.
fn dormant(body: &[u8]) -> Option<(u8, String)> {
    let rest = body.get(FAMILY_HEADER..)?;
    let is_dormant = number(rest, 2)? & DORMANT != 0;
    Some((*body.first()?, text(rest, 1)?)).filter(|_| is_dormant)
}

fn list() -> Result<Vec<Chain>, Errno> {
    let mut asleep = HashSet::new();
    ask(NETFILTER, GET_TABLE, NLM_F_DUMP, |body| {
        asleep.extend(dormant(body))
    })?;
    let mut chains = Vec::new();
    ask(NETFILTER, GET_CHAIN, NLM_F_DUMP, |body| {
        let awake = |it: &Chain| !asleep.contains(&(it.family, it.table.clone()));
        chains.extend(chain_of(body).filter(awake));
    })?;
    if chains.iter().all(|it| it.hook.is_none()) {
        return Ok(Vec::new());
    }
    let named = |it: &Chain| (it.family, it.table.clone(), it.name.clone());
    let places: HashMap<_, usize> = chains.iter().map(named).zip(0..).collect();
    ask(NETFILTER, GET_RULE, NLM_F_DUMP, |body| {
        let Some((family, table, name, rule)) = rule_of(body) else {
            return;
        };
        let place = places.get(&(family, table, name));
        if let Some(chain) = place.and_then(|it| chains.get_mut(*it)) {
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
    use std::slice::from_ref;

    use super::super::chains::{Clients, ESTABLISHED, INVALID, Index, NEW};
    use super::super::netlink::messages;
    use super::*;
    use proptest::prelude::*;

    fn attribute_of(kind: u16, content: &[u8]) -> Vec<u8> {
        let length = u16::try_from(content.len() + 4).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// An expression with these attributes.
    fn expression(name: &str, content: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let content: Vec<u8> = content
            .iter()
            .flat_map(|(kind, content)| attribute_of(*kind, content))
            .collect();
        let all = [
            attribute_of(1, format!("{name}\0").as_bytes()),
            attribute_of(2, &content),
        ];
        attribute_of(1, &all.concat())
    }

    /// An expression whose attributes are numbers from the first one on; of none, -1.
    fn numbers(name: &str, content: &[i64]) -> Vec<u8> {
        let content: Vec<(u16, Vec<u8>)> = (1..)
            .zip(content)
            .filter_map(|(kind, it)| Some((kind, u32::try_from(*it).ok()?.to_be_bytes().into())))
            .collect();
        expression(name, &content)
    }

    fn compare(register: u32, operation: u32, with: &[u8]) -> Vec<u8> {
        let content = [
            (1, register.to_be_bytes().into()),
            (2, operation.to_be_bytes().into()),
            (3, attribute_of(1, with)),
        ];
        expression("cmp", &content)
    }

    fn mask(register: u32, mask: u32, xor: u32) -> Vec<u8> {
        let content = [
            (1, register.to_be_bytes().into()),
            (2, register.to_be_bytes().into()),
            (4, attribute_of(1, &mask.to_ne_bytes())),
            (5, attribute_of(1, &xor.to_ne_bytes())),
        ];
        expression("bitwise", &content)
    }

    fn verdict(code: i32) -> Vec<u8> {
        let code = attribute_of(1, &code.to_be_bytes());
        let content = [(1, 0_u32.to_be_bytes().into()), (2, attribute_of(2, &code))];
        expression("immediate", &content)
    }

    /// Whether a rule of these expressions, in a chain of a table of that family, may refuse clients of
    /// 192.0.2.1, where what no rule decides is let in, or is not.
    fn may_refuse(family: u8, drops: bool, expressions: &[Vec<u8>]) -> bool {
        let body = [
            &[family, 0, 0, 0][..],
            &attribute_of(1, b"guard\0"),
            &attribute_of(2, b"in\0"),
            &attribute_of(3, &7_u64.to_be_bytes()),
            &attribute_of(4, &expressions.concat()),
        ];
        let (family, table, name, rule) = rule_of(&body.concat()).unwrap();
        let chain = Chain {
            family,
            table,
            name,
            hook: Some(Hook::Input),
            sees_states: true,
            shown_by: None,
            drops,
            rules: vec![rule],
        };
        let clients = Clients {
            ports: (30_000, 31_000),
            with_ipv6: false,
            addresses: vec![IpAddr::from([192, 0, 2, 1])],
            may_be_untracked: false,
        };
        let index = Index::new(from_ref(&chain));
        chain.refusal(&index, &clients).is_some()
    }

    const DROP: i32 = 0;
    const ACCEPT: i32 = 1;

    /// `tcp dport` and 22 or 30000.
    fn to_port(port: u16) -> [Vec<u8>; 4] {
        [
            numbers("meta", &[1, 16]),
            compare(1, EQUAL, &[TCP]),
            numbers("payload", &[1, 2, 2, 2]),
            compare(1, EQUAL, &port.to_be_bytes()),
        ]
    }

    #[test]
    fn a_rule_is_about_what_its_tests_load() {
        let drops = |family, tests: &[&[Vec<u8>]]| {
            let tests = [&tests.concat()[..], &[verdict(DROP)]].concat();
            may_refuse(family, false, &tests)
        };
        let state = || numbers("ct", &[1, 0]);
        let address = || numbers("payload", &[1, 1, 16, 4]);
        assert!(drops(INET, &[&to_port(30_000)]));
        assert!(!drops(INET, &[&to_port(22)]));
        // Registers have two names.
        assert!(!drops(
            INET,
            &[&[numbers("meta", &[8, 16]), compare(1, EQUAL, &[17])]]
        ));
        assert!(!drops(
            IPV4,
            &[&[address(), compare(1, EQUAL, &[192, 0, 2, 9])]]
        ));
        assert!(!drops(
            INET,
            &[&[state(), mask(1, INVALID, 0), compare(1, NOT_EQUAL, &[0; 4])]]
        ));
        // Others than those that are invalid.
        for others in [
            [state(), mask(1, INVALID, 0), compare(1, EQUAL, &[0; 4])],
            [
                state(),
                mask(1, INVALID, 0),
                compare(1, NOT_EQUAL, &INVALID.to_ne_bytes()),
            ],
            [state(), mask(1, INVALID, 1), compare(1, NOT_EQUAL, &[0; 4])],
            [state(), mask(1, 9, 0), compare(1, NOT_EQUAL, &[0; 4])],
        ] {
            assert!(drops(INET, &[&others]));
        }
        // In a packet of IPv6 there is something else, and an address is not compared by a part of it.
        assert!(drops(
            INET,
            &[&[address(), compare(1, EQUAL, &[192, 0, 2, 9])]]
        ));
        assert!(drops(IPV4, &[&[address(), compare(1, EQUAL, &[192, 0])]]));
    }

    #[test]
    fn states_let_in_and_turn_away() {
        let asks = |tests: &[Vec<u8>], code| {
            let tests = [&[numbers("ct", &[1, 0])], tests, &[verdict(code)]].concat();
            may_refuse(INET, code == ACCEPT, &tests)
        };
        let both = NEW | ESTABLISHED;
        assert!(!asks(
            &[mask(1, both, 0), compare(1, NOT_EQUAL, &[0; 4])],
            ACCEPT
        ));
        assert!(asks(
            &[mask(1, NEW, 0), compare(1, NOT_EQUAL, &[0; 4])],
            ACCEPT
        ));
        let others = compare(1, NOT_EQUAL, &INVALID.to_ne_bytes());
        assert!(!asks(from_ref(&others), ACCEPT) && asks(&[others], DROP));
        assert!(!asks(&[compare(1, EQUAL, &INVALID.to_ne_bytes())], DROP));
        // No packet has two of them; larger and smaller ones are not understood.
        assert!(asks(&[compare(1, EQUAL, &both.to_ne_bytes())], ACCEPT));
        assert!(asks(&[compare(1, 4, &INVALID.to_ne_bytes())], DROP));
    }

    #[test]
    fn loopback_networks_and_kinds_of_destinations_are_understood() {
        let drops =
            |tests: &[Vec<u8>]| may_refuse(IPV4, false, &[tests, &[verdict(DROP)]].concat());
        let first = |with| {
            [
                numbers("payload", &[1, 1, 16, 1]),
                compare(1, EQUAL, &[with]),
            ]
        };
        assert!(!drops(&first(127)) && drops(&first(192)));
        let whole = [
            numbers("payload", &[1, 1, 16, 4]),
            mask(1, u32::from_ne_bytes([255, 0, 0, 0]), 0),
            compare(1, EQUAL, &[127, 0, 0, 0]),
        ];
        assert!(!drops(&whole));
        let kind = |operation, kind: u32| {
            let loads = numbers("fib", &[1, 3, 2]);
            [loads, compare(1, operation, &kind.to_ne_bytes())]
        };
        assert!(drops(&kind(EQUAL, LOCAL)) && !drops(&kind(NOT_EQUAL, LOCAL)));
        assert!(!drops(&kind(EQUAL, BROADCAST)) && drops(&kind(NOT_EQUAL, MULTICAST)));
        assert!(drops(&kind(EQUAL, 4)), "anycast");
        let local = [&kind(EQUAL, LOCAL)[..], &[verdict(ACCEPT)]].concat();
        assert!(!may_refuse(IPV4, true, &local));
    }

    #[test]
    fn what_conntrack_does_not_follow_is_known() {
        let rule = |expressions: &[Vec<u8>]| {
            let body = [
                &[INET, 0, 0, 0][..],
                &attribute_of(1, b"guard\0"),
                &attribute_of(2, b"in\0"),
                &attribute_of(4, &expressions.concat()),
            ];
            rule_of(&body.concat()).unwrap().3
        };
        let target = |flags: u16| {
            let mut content = vec![0; 40];
            content[..2].copy_from_slice(&flags.to_ne_bytes());
            let content = [(1, b"CT\0".to_vec()), (2, vec![0, 0, 0, 2]), (3, content)];
            expression("target", &content)
        };
        let notrack = || numbers("notrack", &[]);
        assert!(rule(&[notrack()]).untracks && rule(&[target(1)]).untracks);
        assert!(!rule(&[target(2)]).untracks);
        let late = [&[notrack()], &to_port(22)[..]].concat();
        assert_eq!(rule(&late).verdict, Verdict::MayRefuse);
    }

    #[test]
    fn tables_that_sleep_are_told_apart() {
        let table = |flags: u32| {
            let name = attribute_of(1, b"guard\0");
            let flags = attribute_of(2, &flags.to_be_bytes());
            dormant(&[&[INET, 0, 0, 0][..], &name, &flags].concat())
        };
        assert_eq!(table(DORMANT), Some((INET, "guard".to_owned())));
        assert_eq!((table(0), table(2)), (None, None));
    }

    #[test]
    fn what_is_compared_after_another_expression_is_that_ones() {
        let zero = compare(1, EQUAL, &[0; 4]);
        let loads = [
            numbers("meta", &[1, 16]),
            numbers("payload", &[1, 2, 2, 2]),
            numbers("payload", &[1, 1, 16, 4]),
            numbers("fib", &[1, 1, 9]),
        ];
        let writers = [
            numbers("numgen", &[1, 2, 1, 0]),
            numbers("exthdr", &[1, 2, 2, 2]),
            numbers("socket", &[0, 1]),
            numbers("hash", &[1, 1, 4, 2]),
            numbers("rt", &[1, 0]),
            numbers("xfrm", &[1, 0]),
            numbers("osf", &[1]),
            numbers("tunnel", &[0, 1]),
            numbers("byteorder", &[1, 1, 0, 4, 2]),
            numbers("lookup", &[-1, 1, 1]),
            numbers("inner", &[0, 1, 0]),
            numbers("immediate", &[1]),
            numbers("meta", &[1, 4]),
            numbers("ct", &[1, 1]),
            numbers("yet unknown", &[1]),
        ];
        for load in &loads {
            for writer in &writers {
                let rule = [load.clone(), writer.clone(), zero.clone(), verdict(DROP)];
                assert!(may_refuse(IPV4, false, &rule), "{load:?} {writer:?}");
            }
            let other = compare(2, EQUAL, &[0; 4]);
            assert!(may_refuse(
                IPV4,
                false,
                &[load.clone(), other, verdict(DROP)]
            ));
        }
        // A range of protocols is not its first one.
        let range = [
            (1, 1_u32.to_be_bytes().into()),
            (2, EQUAL.to_be_bytes().into()),
            (3, attribute_of(1, &[1])),
            (4, attribute_of(1, &[17])),
        ];
        let range = expression("range", &range);
        let rule = [numbers("meta", &[1, 16]), range, verdict(DROP)];
        assert!(may_refuse(IPV4, false, &rule));
    }

    #[test]
    fn what_is_done_to_clients_may_lead_them_elsewhere() {
        let sets = |header, at, length| numbers("payload", &[-1, header, at, length, 1]);
        for acts in [
            sets(2, 2, 2),
            sets(1, 16, 4),
            numbers("tproxy", &[2, 1, 1]),
            numbers("synproxy", &[1, 2, 3]),
            numbers("objref", &[10]),
            numbers("objref", &[-1, -1, 1]),
            numbers("nat", &[1]),
            numbers("yet unknown", &[]),
            expression("", &[]),
        ] {
            let rule = [&to_port(30_000)[..], &[acts], &[verdict(ACCEPT)]].concat();
            assert!(may_refuse(INET, false, &rule));
        }
        // What is done does not depend on what is asked for later.
        let rule = [&[sets(2, 2, 2)], &to_port(22)[..]].concat();
        assert!(may_refuse(INET, false, &rule));
        let counted = [&to_port(30_000)[..], &[numbers("counter", &[])]].concat();
        assert!(!may_refuse(INET, false, &counted));
        assert!(!may_refuse(
            INET,
            true,
            &[numbers("counter", &[]), verdict(ACCEPT)]
        ));
    }

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
