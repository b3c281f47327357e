//! What becomes of new clients of service ports in the chains of a firewall.
//!
//! In: chains and rules, as nftables.rs and iptables.rs understand them. Out: the first rule of a chain on the
//! way in (ingress, prerouting, input), or of one that it jumps to, that may turn such clients away or lead them
//! elsewhere. Invariant: what is not understood counts as a refusal.

use std::collections::HashMap;
use std::net::IpAddr;

/// Rules that are read before a set of chains counts as not understood.
const MOST_RULES: u32 = 20_000;
/// Chains that jump to one another: the kernel takes no more either.
const DEEPEST: u32 = 16;
/// Ranges of ports that a rule is about; with more of them it is not understood.
const MOST_RANGES: usize = 64;

/// Families of tables, as the kernel numbers them.
pub const INET: u8 = 1;
/// Tables for IPv4.
pub const IPV4: u8 = 2;
/// Tables for IPv6.
pub const IPV6: u8 = 10;
/// Tables of single devices.
pub const NETDEV: u8 = 5;

// linux/netfilter/nf_conntrack_common.h: what conntrack says of the connection of a packet.
/// Nothing, or nothing yet.
pub const INVALID: u32 = 1;
/// It has been answered.
pub const ESTABLISHED: u32 = 1 << 1;
/// Another one has announced it.
pub const RELATED: u32 = 1 << 2;
/// It begins.
pub const NEW: u32 = 1 << 3;
/// It is not followed.
pub const UNTRACKED: u32 = 1 << 6;
/// Of states each packet has one of these.
pub const STATES: u32 = INVALID | ESTABLISHED | RELATED | NEW | UNTRACKED;
/// What iptables calls a state, too: an address was translated.
pub const TRANSLATED: u32 = 1 << 7;

/// Targets of iptables after which the next rule is asked.
pub const GOES_ON: [&str; 12] = [
    "LOG", "NFLOG", "MARK", "CONNMARK", "TRACE", "CT", "NOTRACK", "TCPMSS", "SET", "DSCP", "TOS",
    "CLASSIFY",
];

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
    /// Conntrack has seen the packets that meet it there.
    pub sees_states: bool,
    /// The program that shows it, of tables of the older kind; none for those of nftables.
    pub shown_by: Option<&'static str>,
    /// Its policy is to refuse.
    pub drops: bool,
    /// In their order.
    pub rules: Vec<Rule>,
}

/// What a rule does to a client that its tests let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The next rule is asked.
    GoesOn,
    /// No other rule of the chain's hook and priority is asked.
    Accepts,
    /// Or leads elsewhere, or to where it may be refused.
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
pub struct Rule {
    /// The kernel's number for it (nftables' handle), or its place in the chain from 1 on.
    pub number: u64,
    /// Ranges of the ports that it is about; of none, nobody meets it.
    pub ports: Vec<(u16, u16)>,
    /// New TCP connections never meet it.
    pub elsewhere: bool,
    /// The one destination that it is about.
    pub destination: Option<IpAddr>,
    /// It is about IPv6 (or IPv4) alone.
    pub of_ipv6: Option<bool>,
    /// The states of connections that it is about; none when it asks for none.
    pub states: Option<u32>,
    /// Conntrack does not follow what meets it.
    pub untracks: bool,
    /// It has no other tests than those above.
    pub for_all: bool,
    /// What it does.
    pub verdict: Verdict,
}

/// Clients that are asked about.
#[derive(Debug, Clone)]
pub struct Clients {
    /// The first and the last port that they may want.
    pub ports: (u16, u16),
    /// Some may speak IPv6.
    pub with_ipv6: bool,
    /// Where they come to: the addresses of this host. They come from other hosts, and to no loopback
    /// address therefore.
    pub addresses: Vec<IpAddr>,
    /// A rule keeps conntrack from following some of them.
    pub may_be_untracked: bool,
}

/// Where clients may be turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// By a rule: its chain and its number.
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

/// Chains by family, table and name.
#[derive(Debug)]
pub struct Index<'a>(HashMap<(u8, &'a str, &'a str), &'a Chain>);

impl<'a> Index<'a> {
    /// Of all chains there are.
    pub fn new(chains: &'a [Chain]) -> Self {
        let named = |it: &'a Chain| ((it.family, &*it.table, &*it.name), it);
        Self(chains.iter().map(named).collect())
    }

    /// The chain of this name in the table of another one.
    fn beside(&self, chain: &Chain, name: &str) -> Option<&'a Chain> {
        self.0.get(&(chain.family, &*chain.table, name)).copied()
    }
}

impl Rule {
    /// A rule that all meet, and that does nothing.
    pub fn new(number: u64) -> Self {
        Self {
            number,
            ports: vec![(0, u16::MAX)],
            elsewhere: false,
            destination: None,
            of_ipv6: None,
            states: None,
            untracks: false,
            for_all: true,
            verdict: Verdict::GoesOn,
        }
    }

    /// It is about none but these ports.
    pub fn narrow(&mut self, ranges: &[(u16, u16)]) {
        let both = self.ports.iter().flat_map(|(low, high)| {
            let common = ranges.iter().map(|it| (it.0.max(*low), it.1.min(*high)));
            common.filter(|it| it.0 <= it.1)
        });
        let both: Vec<(u16, u16)> = both.take(MOST_RANGES + 1).collect();
        if both.len() > MOST_RANGES {
            self.for_all = false;
        } else {
            self.ports = both;
        }
    }

    /// It is about none but connections in these states.
    pub fn of_states(&mut self, states: u32) {
        // Two tests are not understood as one: some have a state and translated addresses.
        self.for_all &= self.states.is_none();
        self.states.get_or_insert(states);
    }

    /// Whether it keeps conntrack from following some of these clients.
    pub fn untracks(&self, clients: &Clients) -> bool {
        self.untracks && self.is_about(clients).is_some()
    }

    /// Whether clients meet it while their connections are in a state, and whether all of them do.
    fn meets(&self, clients: &Clients, state: u32) -> Option<bool> {
        let whole = self.is_about(clients)?;
        match self.states {
            Some(states) if states & state == 0 => {
                let for_some = states & !(INVALID | ESTABLISHED | NEW) != 0;
                for_some.then_some(false)
            }
            _ => Some(whole),
        }
    }

    /// The same in whatever state.
    fn is_about(&self, clients: &Clients) -> Option<bool> {
        let (first, last) = clients.ports;
        let elsewhere = self.elsewhere
            || !self
                .ports
                .iter()
                .any(|(low, high)| *low <= last && first <= *high)
            || self
                .destination
                .is_some_and(|it| it.is_loopback() || !clients.addresses.contains(&it))
            || (self.of_ipv6 == Some(true) && !clients.with_ipv6);
        let whole = self.for_all
            && self.destination.is_none()
            && self
                .ports
                .iter()
                .any(|(low, high)| *low <= first && last <= *high)
            && (self.of_ipv6.is_none() || (self.of_ipv6 == Some(false) && !clients.with_ipv6));
        (!elsewhere).then_some(whole)
    }
}

/// A way of clients through chains.
struct Walk<'a> {
    chains: &'a Index<'a>,
    clients: &'a Clients,
    state: u32,
    /// Rules that may still be read.
    left: u32,
}

impl Walk<'_> {
    /// Follows them through a chain and those that it jumps to.
    fn through(&mut self, chain: &Chain, depth: u32) -> Outcome {
        // Some have gone back already: what is said of the rest does not hold for all.
        let mut parted = false;
        for rule in &chain.rules {
            let refuses = || Outcome::Refuses(Refusal::Rule(chain.name.clone(), rule.number));
            self.left = self.left.saturating_sub(1);
            if self.left == 0 || depth > DEEPEST {
                return refuses();
            }
            let Some(whole) = rule.meets(self.clients, self.state) else {
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
                    let Some(next) = self.chains.beside(chain, name) else {
                        return refuses();
                    };
                    match self.through(next, depth + 1) {
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
}

impl Chain {
    /// Where it may turn away clients, if it does: new ones, or what they send later. `chains` are all
    /// there are.
    pub fn refusal(&self, chains: &Index<'_>, clients: &Clients) -> Option<Refusal> {
        let states: &[u32] = match self.sees_states {
            true => &[NEW, ESTABLISHED],
            false => &[INVALID],
        };
        let untracked = clients.may_be_untracked.then_some(UNTRACKED);
        states.iter().copied().chain(untracked).find_map(|state| {
            let mut walk = Walk {
                chains,
                clients,
                state,
                left: MOST_RULES,
            };
            match walk.through(self, 0) {
                Outcome::Refuses(refusal) => Some(refusal),
                Outcome::GoesOn if self.drops => Some(Refusal::Policy),
                Outcome::GoesOn | Outcome::Admits => None,
            }
        })
    }

    /// The command that lets them in.
    pub fn admitting(&self, first: u16, last: u16) -> String {
        let (table, name) = (&self.table, &self.name);
        if let Some(program) = self.shown_by {
            return format!(
                "{program} -t {table} -I {name} -p tcp --dport {first}:{last} -j ACCEPT"
            );
        }
        let family = self.family_name();
        format!("nft insert rule {family} {table} {name} tcp dport {first}-{last} accept")
    }

    /// Which of its rules, or of the chains it jumps to, has the number.
    pub fn naming(&self, at: &str, number: u64) -> String {
        match self.shown_by {
            Some(_) => format!("rule {number} of chain {at}"),
            None => format!("rule with handle {number} of chain {at}"),
        }
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
        let (table, name) = (&self.table, &self.name);
        match self.shown_by {
            Some(program) => write!(f, "{name} of {program} -t {table}"),
            None => write!(f, "{name} of nftables' {} {table}", self.family_name()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use super::*;

    fn chain(name: &str, drops: bool, rules: Vec<Rule>) -> Chain {
        Chain {
            family: INET,
            table: "firewalld".to_owned(),
            name: name.to_owned(),
            hook: Some(Hook::Input),
            sees_states: true,
            shown_by: None,
            drops,
            rules,
        }
    }

    fn rule(ports: (u16, u16), for_all: bool, verdict: Verdict) -> Rule {
        Rule {
            ports: vec![ports],
            for_all,
            verdict,
            ..Rule::new(7)
        }
    }

    const ALL: (u16, u16) = (0, u16::MAX);
    const POOL: (u16, u16) = (30_000, 31_000);

    fn clients() -> Clients {
        Clients {
            ports: POOL,
            with_ipv6: false,
            addresses: [[127, 0, 0, 1], [192, 0, 2, 1]].map(IpAddr::from).into(),
            may_be_untracked: false,
        }
    }

    fn refusal(chains: &[Chain]) -> Option<Refusal> {
        chains[0].refusal(&Index::new(chains), &clients())
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
        // Of what is published on the loopback address, where no other host's clients come to.
        assert!(!only(
            |it| it.destination = Some(IpAddr::from([127, 0, 0, 1]))
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
    fn clients_are_let_in_from_their_first_packet_to_their_last() {
        let of = |states, verdict| {
            let mut it = rule(POOL, true, verdict);
            it.of_states(states);
            it
        };
        let mut policy = chain("in", true, Vec::new());
        let mut refuses = |rules: &[Rule], sees_states, may_be_untracked| {
            policy.rules = rules.to_vec();
            policy.sees_states = sees_states;
            let clients = Clients {
                may_be_untracked,
                ..clients()
            };
            policy
                .refusal(&Index::new(&[policy.clone()]), &clients)
                .is_some()
        };
        let known = of(ESTABLISHED | RELATED, Verdict::Accepts);
        let first = of(NEW, Verdict::Accepts);
        assert!(!refuses(&[known.clone(), first.clone()], true, false));
        assert!(refuses(from_ref(&known), true, false));
        assert!(refuses(from_ref(&first), true, false));
        // Conntrack does not follow some of them, or none yet.
        assert!(refuses(&[known.clone(), first.clone()], true, true));
        assert!(refuses(&[known, first], false, false));
        let all = of(NEW | ESTABLISHED | UNTRACKED, Verdict::Accepts);
        assert!(!refuses(&[all], true, true));
        let open = rule(ALL, true, Verdict::Accepts);
        let mut closes = |states, sees_states| {
            refuses(
                &[of(states, Verdict::MayRefuse), open.clone()],
                sees_states,
                false,
            )
        };
        assert!(!closes(INVALID, true) && closes(INVALID, false));
        for states in [
            NEW,
            ESTABLISHED,
            RELATED,
            UNTRACKED,
            TRANSLATED,
            INVALID | NEW,
        ] {
            assert!(closes(states, true), "{states}");
        }
        // A translated address and a state do not shut each other out.
        let mut both = of(TRANSLATED, Verdict::MayRefuse);
        both.of_states(NEW);
        assert!(refuses(&[both, open.clone()], true, false));
        let mut both = of(NEW | ESTABLISHED, Verdict::Accepts);
        both.of_states(INVALID);
        assert!(refuses(&[both], true, false));
    }

    #[test]
    fn ports_of_several_tests_are_those_of_all() {
        let mut it = Rule::new(1);
        it.narrow(&[(22, 22), (29_000, 32_000)]);
        it.narrow(&[(0, 100), (30_000, u16::MAX)]);
        assert_eq!(it.ports, [(22, 22), (30_000, 32_000)]);
        it.narrow(&[(80, 80)]);
        assert_eq!(it.ports, []);
        let mut all = Rule::new(1);
        for _ in 0..4 {
            all.narrow(&[(0, u16::MAX); 15]);
        }
        assert!(all.ports.len() <= MOST_RANGES && !all.for_all);
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
}
