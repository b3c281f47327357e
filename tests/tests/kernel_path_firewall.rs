//! Where the host's firewall may turn clients of service ports away, it decides: the kernel path, which
//! bypasses it, is left to nobody. With real rules, of iptables and of nftables alone.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::fault_docker::FaultDocker;
use harness::images::Image;
use harness::kernels::{self, Order, docker};
use harness::netns::{HOST_ADDRESS, VethPair, ip};
use harness::node::{self, Node, NodeOptions};
use harness::remote_client::{command, may_use_bpf};
use harness::wait;
use serde_json::Value as Json;

/// Feeds a program of the firewall's with commands, in a namespace or here.
fn feed(mut program: Command, text: &str) -> Result<()> {
    let mut child = program
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("iptables and nftables must be installed (deploy/setup)")?;
    let mut input = child.stdin.take().context("its input")?;
    input.write_all(text.as_bytes())?;
    drop(input);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{text}: {said}");
    Ok(())
}

/// What `bai-agent doctor` finds of one check.
fn finding(mut doctor: Command, check: &str) -> Result<Json> {
    let output = doctor.output().context("bai-agent")?;
    let all: Json = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    let list = all["findings"].as_array().context("findings")?;
    let found = list.iter().find(|it| it["check"] == check);
    Ok(found.cloned().unwrap_or(Json::Null))
}

/// A firewall: how it is made, and which chain decides about ports 30000 to 31000, if one does.
struct Firewall {
    iptables: &'static str,
    nft: &'static str,
    decides: Option<&'static str>,
}

/// What a policy of IPsec encrypts.
const TUNNEL: &str = "tmpl src 198.51.100.1 dst 192.0.2.1 proto esp mode tunnel";

/// Chains that are asked before those of incoming packets.
const EARLY: &str = "firewall at prerouting";

/// Ports that Docker publishes, and senders that fail2ban shuts out of some.
const PUBLISHED: &str = "*nat\n:PREROUTING ACCEPT\n:DOCKER -\n\
    -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A DOCKER -i docker0 -j RETURN\n\
    -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\nCOMMIT\n\
    *filter\n:INPUT ACCEPT\n:FORWARD DROP\n:f2b-sshd -\n\
    -A INPUT -p tcp -m multiport --dports 22,80:90 -j f2b-sshd\n\
    -A f2b-sshd -s 192.0.2.7/32 -j REJECT --reject-with icmp-port-unreachable\n\
    -A f2b-sshd -j RETURN\nCOMMIT\n";

/// The same, of the older kind.
const PUBLISHED_LEGACY: &str = "legacy\n*nat\n:PREROUTING ACCEPT\n:DOCKER -\n\
    -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n-A DOCKER -i docker0 -j RETURN\n\
    -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\nCOMMIT\n\
    *filter\n:INPUT ACCEPT\n:FORWARD DROP\n:f2b-sshd -\n\
    -A INPUT -p tcp -m multiport --dports 22,80:90 -j f2b-sshd\n\
    -A f2b-sshd -s 192.0.2.7/32 -j REJECT --reject-with icmp-port-unreachable\n\
    -A f2b-sshd -j RETURN\nCOMMIT\n";

const FIREWALLS: [Firewall; 38] = [
    Firewall {
        iptables: "",
        nft: "",
        decides: None,
    },
    Firewall {
        iptables: "*filter\n:INPUT DROP\n-A INPUT -i lo -j ACCEPT\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n-A INPUT -p tcp --dport 22 -j ACCEPT\n\
                   -A INPUT -j REJECT\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*filter\n:INPUT DROP\n-A INPUT -p tcp --dport 30000:31000 -j ACCEPT\nCOMMIT\n",
        nft: "",
        decides: None,
    },
    Firewall {
        iptables: "",
        nft: "table inet filter { chain input { type filter hook input priority 0; policy drop; \
              ct state established,related accept; iif lo accept; tcp dport 22 accept; }\n}",
        decides: Some("input of nftables' inet filter"),
    },
    // As firewalld does.
    Firewall {
        iptables: "",
        nft: "table inet firewalld { chain filter_INPUT_ZONES { tcp dport 22 accept; }\n\
              chain filter_INPUT { type filter hook input priority 10; policy accept; \
              ct state { established, related } accept; iifname \"lo\" accept; \
              ct state invalid drop; jump filter_INPUT_ZONES; reject with icmpx admin-prohibited; }\n}",
        decides: Some("filter_INPUT of nftables' inet firewalld"),
    },
    Firewall {
        iptables: "",
        nft: "table ip guard { chain in { type filter hook input priority 0; policy accept; \
              ct state invalid drop; tcp dport 30500 ip saddr != 10.0.0.0/8 counter drop; }\n}",
        decides: Some("in of nftables' ip guard"),
    },
    Firewall {
        iptables: "",
        nft: "table ip early { chain pre { type filter hook prerouting priority raw; policy accept; \
              iifname \"lo\" accept; jump block; }\n\
              chain block { tcp dport 22 drop; ip saddr 10.0.0.0/8 tcp dport 30000-30010 drop; }\n}",
        decides: Some("pre of nftables' ip early"),
    },
    Firewall {
        iptables: "",
        nft: "table netdev gate { chain in { type filter hook ingress device lo priority 0; policy accept; \
              tcp dport 30000 drop; }\n}",
        decides: Some("in of nftables' netdev gate"),
    },
    Firewall {
        iptables: "*raw\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 30010 -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("PREROUTING of nftables' ip raw"),
    },
    Firewall {
        iptables: "legacy\n*mangle\n:PREROUTING ACCEPT\n-A PREROUTING -s 10.0.0.0/8 -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("PREROUTING of iptables-legacy -t mangle"),
    },
    Firewall {
        iptables: "legacy\n*filter\n:INPUT DROP\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of iptables-legacy -t filter"),
    },
    // Made by nft under the names of iptables, whose programs show these rules without their sets and maps.
    Firewall {
        iptables: "",
        nft: "table ip filter { chain INPUT { type filter hook input priority 0; policy drop; \
              ip saddr { 10.0.0.1, 10.0.0.2 } tcp dport 30000-31000 accept; }\n}",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "",
        nft: "table ip filter { chain INPUT { type filter hook input priority 0; policy drop; \
              iifname { lo, docker0 } accept; }\n}",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "",
        nft: "table ip filter { chain INPUT { type filter hook input priority 0; policy drop; \
              tcp dport { 22, 80, 443 } accept; }\n}",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "",
        nft: "table ip filter { chain INPUT { type filter hook input priority 0; policy accept; \
              tcp dport vmap { 30005 : drop }; }\n}",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "",
        nft: "table ip filter { chain INPUT { type filter hook prerouting priority 0; policy drop; }\n}",
        decides: Some("INPUT of nftables' ip filter"),
    },
    // Matches of iptables that the kernel lists as they are.
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n-A INPUT -p tcp -m multiport --dports 22,30000:30010 -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n-A INPUT -p tcp -m multiport --sports 1:65535 -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n-A INPUT -m conntrack --ctstate NEW -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n-A INPUT -m conntrack ! --ctstate INVALID -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n-A INPUT -m addrtype ! --dst-type LOCAL -j RETURN\n\
                   -A INPUT -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "*mangle\n:PREROUTING ACCEPT\n-A PREROUTING -m rpfilter -j DROP\nCOMMIT\n",
        nft: "",
        decides: Some("PREROUTING of nftables' ip mangle"),
    },
    // Connections that nobody follows have no state that is let in, nor have they before they are followed.
    Firewall {
        iptables: "*raw\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 30000:31000 -j CT --notrack\nCOMMIT\n\
                   *filter\n:INPUT DROP\n-A INPUT -m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT\nCOMMIT\n",
        nft: "",
        decides: Some("INPUT of nftables' ip filter"),
    },
    Firewall {
        iptables: "",
        nft: "table ip early { chain pre { type filter hook prerouting priority raw; policy accept; \
              ct state invalid drop; }\n}",
        decides: Some("pre of nftables' ip early"),
    },
    // A table that is switched off.
    Firewall {
        iptables: "",
        nft: "table inet asleep { flags dormant;\nchain in { type filter hook input priority 0; policy drop; }\n}",
        decides: None,
    },
    // Clients of service ports are led elsewhere.
    Firewall {
        iptables: "",
        nft: "table ip lead { chain pre { type nat hook prerouting priority dstnat; policy accept; \
              tcp dport 30005 redirect to :22; }\n}",
        decides: Some("pre of nftables' ip lead"),
    },
    Firewall {
        iptables: "",
        nft: "table ip lead { chain pre { type nat hook prerouting priority dstnat; policy accept; \
              tcp dport 30005 drop; }\n}",
        decides: Some("pre of nftables' ip lead"),
    },
    Firewall {
        iptables: "*nat\n:PREROUTING ACCEPT\n:DOCKER -\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
                   -A DOCKER ! -i docker0 -p tcp -m tcp --dport 30005 -j DNAT --to-destination 172.17.0.2:80\nCOMMIT\n",
        nft: "",
        decides: Some("PREROUTING of nftables' ip nat"),
    },
    Firewall {
        iptables: "legacy\n*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 30005 -j REDIRECT --to-ports 22\nCOMMIT\n",
        nft: "",
        decides: Some("PREROUTING of iptables-legacy -t nat"),
    },
    // As Docker does, with nftables of its own.
    Firewall {
        iptables: "",
        nft: "table ip docker-bridges { chain nat-pre { type nat hook prerouting priority dstnat; policy accept; \
              fib daddr type local counter jump nat-prerouting-and-output; }\n\
              chain nat-prerouting-and-output { iifname != \"docker0\" tcp dport 8080 counter dnat to 172.17.0.2:80; }\n\
              chain raw-PREROUTING { type filter hook prerouting priority raw; policy accept; \
              ip daddr 172.17.0.2 iifname != \"docker0\" counter drop; }\n\
              chain forward { type filter hook forward priority 0; policy drop; }\n}",
        decides: None,
    },
    // As Docker and fail2ban do, with iptables of both kinds.
    Firewall {
        iptables: PUBLISHED,
        nft: "",
        decides: None,
    },
    Firewall {
        iptables: PUBLISHED_LEGACY,
        nft: "",
        decides: None,
    },
    // As ufw does where it lets in by default.
    Firewall {
        iptables: "*filter\n:INPUT ACCEPT\n:before -\n:not-local -\n:user -\n-A INPUT -j before\n-A INPUT -j user\n\
                   -A before -i lo -j ACCEPT\n-A before -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
                   -A before -m conntrack --ctstate INVALID -j DROP\n\
                   -A before -p udp --sport 67 --dport 68 -j ACCEPT\n-A before -j not-local\n\
                   -A not-local -m addrtype --dst-type LOCAL -j RETURN\n\
                   -A not-local -m addrtype --dst-type MULTICAST -j RETURN\n\
                   -A not-local -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix \"[UFW BLOCK] \"\n\
                   -A not-local -j DROP\n\
                   -A user -p tcp -m multiport --dports 25,137:139 -m comment --comment \"no mail\" -j REJECT\nCOMMIT\n",
        nft: "",
        decides: None,
    },
    // What engines and firewalls do at prerouting for reasons of their own: containers' addresses,
    // senders that no answer would reach, connections that are not followed.
    Firewall {
        iptables: "*raw\n:PREROUTING ACCEPT\n-A PREROUTING -d 172.17.0.2/32 ! -i docker0 -j DROP\n\
                   -A PREROUTING -p tcp --dport 30000:31000 -j CT --notrack\nCOMMIT\n\
                   *mangle\n:PREROUTING ACCEPT\n-A PREROUTING -m rpfilter --invert -j DROP\n\
                   -A PREROUTING -j MARK --set-mark 1\nCOMMIT\n",
        nft: "table inet firewalld { chain filter_PREROUTING { type filter hook prerouting priority 10; \
              meta nfproto ipv6 fib saddr . mark . iif oif missing drop; jump zones; }\n\
              chain zones { ct state invalid drop; return; }\n}",
        decides: None,
    },
    // A chain that is jumped to lets them in.
    Firewall {
        iptables: "",
        nft: "table inet filter { chain input { type filter hook input priority 0; policy drop; \
              ct state established,related accept; jump services; }\n\
              chain services { tcp dport 22 return; tcp dport 29000-32000 accept; }\n}",
        decides: None,
    },
    // Lets service ports in before anything else.
    Firewall {
        iptables: "",
        nft: "table inet filter { chain input { type filter hook input priority 0; policy drop; \
              tcp dport 22 counter accept; tcp dport 30000-31000 accept; }\n}",
        decides: None,
    },
    // Of other ports, protocols, hooks and families.
    Firewall {
        iptables: "",
        nft: "table inet other { chain input { type filter hook input priority 0; policy accept; \
              ct state invalid drop; tcp dport 22 drop; tcp dport 31001-65535 drop; udp dport 30000 reject; \
              meta l4proto icmp counter drop; }\n\
              chain forward { type filter hook forward priority 0; policy drop; }\n}\n\
              table ip6 six { chain input { type filter hook input priority 0; policy drop; }\n}",
        decides: None,
    },
];

/// Rules of a chain of nftables at input, and whether they may turn clients away.
const RULES: [(&str, bool); 21] = [
    // What is compared is not what was loaded for the test before.
    (
        "tcp dport 30000-31000 tcp option maxseg size 1-500 drop",
        true,
    ),
    ("tcp dport 30000-31000 numgen random mod 2 == 0 drop", true),
    ("meta l4proto tcp numgen random mod 2 == 0 drop", true),
    ("tcp dport 30000-31000 socket transparent 0 drop", true),
    ("ip daddr HOST numgen random mod 2 == 0 drop", true),
    (
        "fib saddr . iif oif != 0 numgen random mod 2 == 0 drop",
        true,
    ),
    ("meta l4proto 1-17 drop", true),
    ("ct state & invalid != invalid drop", true),
    // What is written leads clients elsewhere.
    ("tcp dport 30500 tcp dport set 22", true),
    ("ip daddr HOST ip daddr set 192.0.2.9", true),
    ("tcp dport 22 numgen random mod 2 == 0 drop", false),
    ("ip daddr 192.0.2.77 numgen random mod 2 == 0 drop", false),
    ("ct state invalid drop", false),
    ("ip daddr 127.0.0.0/8 iifname != \"lo\" drop", false),
    ("fib daddr type != local drop", false),
    ("policy drop; fib daddr type local accept", false),
    // What comes after a client's first packet is let in, too, or it is not.
    (
        "policy drop; ct state established,related accept; ct state new,untracked tcp dport 30000-31000 accept",
        false,
    ),
    (
        "policy drop; ct state established accept; ct state new tcp dport 30000-31000 accept",
        false,
    ),
    (
        "policy drop; ct state new tcp dport 30000-31000 accept",
        true,
    ),
    ("policy drop; ct state established,related accept", true),
    ("ct state established drop", true),
];

/// Rules of iptables, of either kind, for packets that come in, and whether they may turn clients away.
const RULES_OF_IPTABLES: [(&str, bool); 11] = [
    (
        ":INPUT DROP\n-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT\n\
         -A INPUT -p tcp -m state --state NEW -m tcp --dport 30000:31000 -j ACCEPT",
        false,
    ),
    (
        ":INPUT DROP\n-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n\
         -A INPUT -p tcp -m conntrack --ctstate NEW,UNTRACKED -m tcp --dport 30000:31000 -j ACCEPT",
        false,
    ),
    (
        ":INPUT DROP\n-A INPUT -p tcp -m conntrack --ctstate NEW -m tcp --dport 30000:31000 -j ACCEPT",
        true,
    ),
    (
        ":INPUT DROP\n-A INPUT -p tcp -m conntrack ! --ctstate INVALID -m tcp --dport 30000:31000 -j ACCEPT",
        false,
    ),
    (
        ":INPUT DROP\n-A INPUT -p tcp -m addrtype --dst-type LOCAL -m tcp --dport 30000:31000 -j ACCEPT",
        false,
    ),
    (
        ":INPUT ACCEPT\n-A INPUT -m conntrack --ctstate INVALID -j DROP",
        false,
    ),
    (
        ":INPUT ACCEPT\n-A INPUT -m conntrack ! --ctstate ESTABLISHED,DNAT -j DROP",
        true,
    ),
    (
        ":INPUT ACCEPT\n-A INPUT -d 127.0.0.0/8 ! -i lo -j DROP",
        false,
    ),
    // As kubelets do.
    (
        ":INPUT ACCEPT\n:KUBE-FIREWALL -\n-A INPUT -j KUBE-FIREWALL\n\
         -A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet\" \
         -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        false,
    ),
    (":INPUT ACCEPT\n-A INPUT -d 10.0.0.0/8 -j DROP", true),
    (":INPUT ACCEPT\n-A INPUT -d HOST/32 -j DROP", true),
];

#[test]
fn rules_are_read_as_the_kernel_does() -> Result<()> {
    let Some(network) = VethPair::new("fwrules")? else {
        return Ok(());
    };
    let place = tempfile::tempdir_in("/dev/shm")?;
    let file = configuration(place.path())?;
    for (rule, decides) in RULES {
        let rule = rule.replace("HOST", HOST_ADDRESS);
        let mut rules = command(&network.host, "nft");
        rules.args(["-f", "-"]);
        let chain = "type filter hook input priority 0";
        feed(
            rules,
            &format!("flush ruleset\ntable inet t {{ chain in {{ {chain}; {rule}; }}\n}}"),
        )?;
        let found = finding(doctor(&network, &file)?, "kernel path")?;
        let said = found["found"].as_str().context("a finding")?;
        ensure!(said.contains("unused") == decides, "{rule}: {said}");
    }
    for (rules, decides) in RULES_OF_IPTABLES {
        let rules = rules.replace("HOST", HOST_ADDRESS);
        for program in ["iptables-restore", "iptables-legacy-restore"] {
            let mut flush = command(&network.host, "nft");
            flush.args(["flush", "ruleset"]);
            feed(flush, "")?;
            let legacy = command(&network.host, "iptables-legacy-restore");
            feed(legacy, "*filter\n:INPUT ACCEPT\nCOMMIT\n")?;
            let restore = command(&network.host, program);
            feed(restore, &format!("*filter\n{rules}\nCOMMIT\n"))?;
            let found = finding(doctor(&network, &file)?, "kernel path")?;
            let said = found["found"].as_str().context("a finding")?;
            ensure!(
                said.contains("unused") == decides,
                "{program} {rules}: {said}"
            );
        }
    }
    Ok(())
}

/// An agent's configuration in a folder.
fn configuration(place: &Path) -> Result<PathBuf> {
    let file = place.join("agent.toml");
    let text = format!(
        "[agent]\nid = \"i-firewall\"\n[container]\nbind-host = \"127.0.0.1\"\n\
         port-range = [30000, 31000]\n[node]\nrun-dir = \"{}\"\n",
        place.display()
    );
    std::fs::write(&file, text)?;
    Ok(file)
}

/// `bai-agent doctor` on the host's side.
fn doctor(network: &VethPair, file: &Path) -> Result<Command> {
    let program = node::program("bai-agent")?;
    let mut doctor = command(&network.host, &program.to_string_lossy());
    doctor.arg("--config").arg(file);
    doctor.args(["doctor", "--output", "json"]);
    Ok(doctor)
}

#[test]
fn a_closed_firewall_of_whatever_kind_is_found() -> Result<()> {
    let Some(network) = VethPair::new("firewall")? else {
        return Ok(());
    };
    let place = tempfile::tempdir_in("/dev/shm")?;
    let file = configuration(place.path())?;
    let doctor = || doctor(&network, &file);
    for (number, firewall) in FIREWALLS.iter().enumerate() {
        let mut rules = command(&network.host, "nft");
        rules.args(["-f", "-"]);
        feed(rules, &format!("flush ruleset\n{}", firewall.nft))?;
        let (program, text) = match firewall.iptables.strip_prefix("legacy\n") {
            Some(text) => ("iptables-legacy-restore", text),
            None => ("iptables-restore", firewall.iptables),
        };
        for table in ["filter", "mangle", "nat"] {
            let mut open = command(&network.host, "iptables-legacy");
            open.args(["-t", table, "-F"]);
            feed(open, "")?;
        }
        let mut open = command(&network.host, "iptables-legacy");
        open.args(["-P", "INPUT", "ACCEPT"]);
        feed(open, "")?;
        if !text.is_empty() {
            feed(command(&network.host, program), text)?;
        }
        let found = finding(doctor()?, "kernel path")?;
        let said = found["found"].as_str().context("a finding")?;
        let Some(chain) = firewall.decides else {
            ensure!(!said.contains("unused"), "{number}: {said}");
            continue;
        };
        ensure!(
            said.contains(chain) && said.contains("the relay serves all ports"),
            "{number}: {said}"
        );
        let early = ["pre of", "netdev", "PREROUTING"];
        let is_early =
            early.iter().any(|it| chain.contains(it)) || firewall.nft.contains("hook prerouting");
        let found = finding(doctor()?, ["firewall", EARLY][usize::from(is_early)])?;
        let named = found["found"].as_str().context("a finding")?;
        ensure!(named.contains(chain), "{number}: {named}");
        let remedy = found["remedy"].as_str().context("a finding")?;
        let rule = remedy.split_once("run: ").context("a command")?.1;
        let (program, rule) = rule.split_once(' ').context("a command")?;
        // What it says helps.
        let mut rules = command(&network.host, program);
        rules.args(rule.split_whitespace());
        feed(rules, "")?;
        let found = finding(doctor()?, "kernel path")?;
        let said = found["found"].as_str().context("a finding")?;
        ensure!(!said.contains("unused"), "{number}: {said}");
    }
    let mut rules = command(&network.host, "nft");
    rules.args(["flush", "ruleset"]);
    feed(rules, "")?;
    // Tables of the older kind are loaded, and nothing here shows them.
    let mut blind = command(&network.host, "env");
    blind.arg("PATH=/nowhere").arg(node::program("bai-agent")?);
    blind.arg("--config").arg(&file);
    blind.args(["doctor", "--output", "json"]);
    let found = finding(blind, "kernel path")?;
    let said = found["found"].as_str().context("a finding")?;
    ensure!(
        said.contains("which iptables-legacy would show") && said.contains("unused"),
        "{said}"
    );
    // A tunnel that is no interface; one that is; what goes around the first.
    for (policy, decides) in [
        (format!("dir out {TUNNEL}"), true),
        ("dir in action block".to_owned(), true),
        (format!("dir out {TUNNEL} if_id 7"), false),
        (format!("dir out mark 42 {TUNNEL}"), false),
        ("dir out action allow".to_owned(), false),
    ] {
        let host = &network.host;
        ip(&format!("-n {host} xfrm policy flush"))?;
        ip(&format!(
            "-n {host} xfrm policy add src 198.51.100.0/24 dst 192.0.2.0/24 {policy}"
        ))?;
        let found = finding(doctor()?, "kernel path")?;
        let said = found["found"].as_str().context("a finding")?;
        ensure!(said.contains("IPsec") == decides, "{policy}: {said}");
    }
    ip(&format!("-n {} xfrm policy flush", network.host))?;
    // What no policy is about.
    for (direction, action, decides) in [
        ("in", "block", true),
        ("in", "accept", false),
        ("out", "block", true),
        ("out", "accept", false),
        ("fwd", "block", false),
    ] {
        let host = &network.host;
        ip(&format!(
            "-n {host} xfrm policy setdefault {direction} {action}"
        ))?;
        let found = finding(doctor()?, "kernel path")?;
        let said = found["found"].as_str().context("a finding")?;
        ensure!(
            said.contains("IPsec") == decides,
            "{direction} {action}: {said}"
        );
    }
    Ok(())
}

/// A table of nftables that concerns the ports of one node alone; gone with its handle.
struct Table(String);

impl Drop for Table {
    fn drop(&mut self) {
        let mut nft = Command::new("nft");
        let _ = nft.args(["delete", "table", "ip", &self.0]).output();
    }
}

impl Table {
    fn refusing(whom: &str, ports: (u16, u16)) -> Result<Self> {
        let table = Self(format!("bai_test_{}", std::process::id()));
        let (name, (first, last)) = (&table.0, ports);
        let mut nft = Command::new("nft");
        nft.args(["-f", "-"]);
        let text = format!(
            "table ip {name} {{ chain input {{ type filter hook input priority 0; policy accept; \
             {whom} tcp dport {first}-{last} reject with tcp reset; }}\n}}"
        );
        feed(nft, &text)?;
        Ok(table)
    }
}

/// An address of the loopback interface; gone with its handle.
struct Address(&'static str);

impl Drop for Address {
    fn drop(&mut self) {
        let _ = ip(&format!("address delete {} dev lo", self.0));
    }
}

impl Address {
    fn add(address: &'static str) -> Result<Self> {
        let handle = Self(address);
        ip(&format!("address add {address} dev lo"))?;
        Ok(handle)
    }
}

/// Whether anybody takes a client of a port.
fn is_open(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_behind_nftables_leaves_its_ports_to_the_relay_and_says_why() -> Result<()> {
    if !may_use_bpf() {
        return Ok(());
    }
    docker(&["version"])?;
    let mut engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        engine: Some(engine.host()),
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let port = kernels::host_ports(&result, "web")[0];
    let served_by = |port: u16, path: &'static str| {
        let node = &node;
        wait::until(
            "the port's path",
            Duration::from_secs(30),
            move || async move {
                let all = kernels::ask(node, "bai.ports", Vec::new()).await.ok()?;
                let list = all["ports"].as_array()?;
                let found = list.iter().find(|it| it["host_port"] == port)?;
                (found["state"] == "serving" && found["path"] == path).then(|| found.clone())
            },
        )
    };
    served_by(port, "kernel").await?;
    // Its administrator changes the firewall while all runs, and the engine is down just then.
    engine.go_down();
    let table = Table::refusing("", node.ports())?;
    let status = served_by(port, "relay").await?;
    let reason = status["reason"].as_str().context("a reason")?;
    ensure!(
        reason.contains("the host's firewall decides"),
        "the reason: {reason}"
    );
    let shown = node.command(&["ports"])?;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    ensure!(shown.contains("the host's firewall decides"), "{shown}");
    let mut doctor = Command::new(node::program("bai-agent")?);
    doctor.arg("--config").arg(node.config_file());
    doctor.args(["doctor", "--output", "json"]);
    let said = finding(doctor, "kernel path")?.to_string();
    ensure!(
        said.contains(&format!("input of nftables' ip {}", table.0)),
        "{said}"
    );
    ensure!(!is_open(port), "the firewall's word does not hold");
    engine.bring_up()?;
    // A kernel that is created meanwhile is left to it from its beginning.
    let other = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &other).await?;
    let second = kernels::host_ports(&result, "web")[0];
    ensure!(!is_open(second), "the firewall's word does not hold");
    drop(table);
    ensure!(is_open(port), "the listener serves");
    served_by(port, "kernel").await?;
    served_by(second, "kernel").await?;
    let log = node.log("bai-agent");
    ensure!(
        log.matches("the firewall has changed").count() == 2,
        "{log}"
    );
    // Rules about an address decide from when the host has it.
    let _table = Table::refusing("ip daddr 192.0.2.77", node.ports())?;
    let address = Address::add("192.0.2.77/32")?;
    served_by(port, "relay").await?;
    drop(address);
    served_by(port, "kernel").await?;
    kernels::destroy(&node, &other).await?;
    kernels::destroy(&node, &order).await
}
