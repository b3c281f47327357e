//! What the host can do for service ports: the kernel path, the firewall, and what serves each port.
//!
//! In: the configuration, texts of the kernel and of iptables, chains that refuse, the dataplane's region. Out: findings.

use std::collections::BTreeMap;
use std::path::Path;

use config::{Config, Forward, HostPort, RelayEngine};
use shared::observed::{ForwardPath, ObservedReader, PortState, PortStatus};
use shared::procfs::unified_cgroup_mount;

use super::{Finding, Level};
use crate::firewall::{self, NoAnswer, Refusal};

/// The oldest kernel that the kernel path was tried on.
const TRIED: (u32, u32) = (6, 1);

/// What the kernel path needs, as far as ports that it serves do not tell.
pub(super) fn kernel_path(
    (forward, honour_firewall): (Forward, Option<bool>),
    decider: Option<&str>,
    release: &str,
    mounts: &str,
    statuses: &[PortStatus],
) -> Finding {
    const CHECK: &str = "kernel path";
    if forward == Forward::Relay {
        return Finding::good(CHECK, "off (node.forward): the relay serves all ports");
    }
    if let Some(why) = decider {
        let way = match honour_firewall {
            Some(_) => "",
            None => "; node.honour-firewall = false uses it",
        };
        return Finding::good(
            CHECK,
            format!("unused ({why}{way}): the relay serves all ports"),
        );
    }
    let mut numbers = release
        .split(['.', '-'])
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let release = release.trim();
    let served = serving(statuses, ForwardPath::KernelPath);
    if served == 0 && version < TRIED {
        return Finding::bad(
            CHECK,
            Level::Warning,
            format!("Linux {release} is older than all it was tried on"),
            "it is used if the kernel takes it, else the relay serves all ports (bai-agent ports says so); Linux 6.1 or newer has it, 6.6 or newer all of it",
        );
    }
    if unified_cgroup_mount(mounts).is_none() {
        return Finding::bad(
            CHECK,
            Level::Warning,
            "clients on this host are served by the relay",
            "the hooks for them need a mounted version 2 control group tree: mount -t cgroup2 none /sys/fs/cgroup/unified",
        );
    }
    let means = if version < (6, 6) { "filters" } else { "links" };
    let found = match served {
        0 => format!("Linux {release}, attached by {means}"),
        count => format!("Linux {release}, serves {count} ports"),
    };
    Finding::good(CHECK, found)
}

/// How many ports are served that way.
fn serving(statuses: &[PortStatus], path: ForwardPath) -> usize {
    let serving = |it: &&PortStatus| it.state == PortState::Serving && it.path == path;
    statuses.iter().filter(serving).count()
}

/// What the relay's engine needs: `disabled` is what `kernel.io_uring_disabled` says. Whether a service
/// manager or a security module is against it is seen by the dataplane alone, and told with its ports.
pub(super) fn relay_engine(engine: RelayEngine, disabled: &str) -> Finding {
    const CHECK: &str = "relay engine";
    if engine != RelayEngine::Uring {
        return Finding::good(CHECK, "splice");
    }
    match disabled.trim() {
        // Before Linux 6.6 there is no such switch.
        "" | "0" => Finding::good(CHECK, "uring"),
        value => Finding::bad(
            CHECK,
            Level::Warning,
            format!("kernel.io_uring_disabled is {value}"),
            "the relay goes without io_uring; run: sysctl kernel.io_uring_disabled=0, or set node.relay-engine = \"splice\"",
        ),
    }
}

/// What agents that are gone have left in the kernel.
pub(super) fn leftovers(home: &Path) -> Option<Finding> {
    let left = shared::pins::abandoned(home);
    let first = left.first()?;
    Some(Finding::bad(
        "left behind",
        Level::Warning,
        format!(
            "{} agents that are gone have programs attached, the first in {}",
            left.len(),
            first.display()
        ),
        "the next start of bai-dataplane removes them; without one, run: bai-dataplane detach",
    ))
}

/// Whether a chain, in the words of `iptables -S`, refuses what no rule admits.
fn refuses_others(rules: &str) -> bool {
    rules.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["-P", "INPUT", what] => *what != "ACCEPT",
            // A rule that refuses everything at the end is a policy, too.
            ["-A", "INPUT", "-j", what, ..] => matches!(*what, "DROP" | "REJECT"),
            _ => false,
        }
    })
}

/// Whether a rule lets in who asks for all of these ports, or for whatever port by one of the links
/// that `by` tells.
fn admits(rules: &str, (first, last): (u16, u16), by: impl Fn(&str) -> bool) -> bool {
    rules.lines().any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let after = |names: &[&str]| {
            let pair = words.windows(2).find(|pair| names.contains(&pair[0]))?;
            Some(pair[1])
        };
        after(&["-j"]) == Some("ACCEPT")
            && match after(&["--dport", "--dports"]) {
                Some(ports) => firewall::covers(ports, first, last),
                None => after(&["-i"]).is_some_and(&by),
            }
    })
}

/// Whether kernels that `node.metadata-redirect` leads to the metadata service get there.
pub(super) fn metadata(server: &HostPort, rules: Option<&str>) -> Finding {
    const CHECK: &str = "metadata";
    let port = server.port;
    match rules {
        None => Finding::bad(
            CHECK,
            Level::Warning,
            "iptables does not list the INPUT chain",
            "node.metadata-redirect needs it; install iptables and run this as root, or set it to false",
        ),
        // Connections are led to the address of the bridge that they come by.
        _ if !server.is_unspecified() => Finding::bad(
            CHECK,
            Level::Warning,
            format!("the service listens at {server} only"),
            "node.metadata-redirect leads kernels to this host's address on their own network; set agent.metadata-server-bind-host = \"0.0.0.0\"",
        ),
        Some(rules) if refuses_others(rules) && !admits(rules, (port, port), is_bridge) => {
            Finding::bad(
                CHECK,
                Level::Warning,
                format!("the INPUT chain refuses what no rule admits, and none names {port}"),
                format!(
                    "kernels may not reach the metadata service; run: iptables -I INPUT -p tcp --dport {port} -j ACCEPT (others are answered 403)"
                ),
            )
        }
        Some(_) => Finding::good(CHECK, format!("169.254.169.254 is led to port {port}")),
    }
}

/// The names that the engine gives to bridges, and patterns of them.
fn is_bridge(link: &str) -> bool {
    link.starts_with("docker") || link.starts_with("br-") || link == "br+"
}

/// What the firewall says about clients of the listeners.
pub(super) fn firewall(refusals: &Result<Vec<Refusal>, NoAnswer>) -> Vec<Finding> {
    const CHECK: &str = "firewall";
    match refusals {
        Ok(found) if found.is_empty() => {
            vec![Finding::good(CHECK, "lets clients of service ports in")]
        }
        Ok(found) => found.iter().map(refusal).collect(),
        Err(err) => vec![Finding::bad(
            CHECK,
            Level::Warning,
            err.to_string(),
            "run this again",
        )],
    }
}

fn refusal(refusal: &Refusal) -> Finding {
    let Refusal { by, remedy, .. } = refusal;
    let rule = match &refusal.rule {
        Some(rule) => format!(" ({rule})"),
        None => String::new(),
    };
    let (check, when) = match refusal.is_early {
        true => (
            "firewall at prerouting",
            " before chains of incoming packets are asked",
        ),
        false => ("firewall", ""),
    };
    Finding::bad(
        check,
        Level::Warning,
        format!("{by}{rule} may turn clients of service ports away, or lead them elsewhere{when}"),
        format!("if it should not, {remedy}"),
    )
}

/// Rules that people put up for published ports do not see what bypasses them.
pub(super) fn user_rules(config: &Config, honour_firewall: bool, rules: &str) -> Option<Finding> {
    let some = rules
        .lines()
        .any(|line| line.starts_with("-A DOCKER-USER") && !line.ends_with("-j RETURN"));
    let passed_by = config.node.forward == Forward::Auto && !honour_firewall;
    (some && passed_by).then(|| {
        Finding::bad(
            "published ports",
            Level::Warning,
            "DOCKER-USER has rules, which do not see clients on the kernel path",
            "say who may use service ports in node.allowed-clients, or by the INPUT chain and node.honour-firewall = true",
        )
    })
}

/// What serves the ports, and why not something better.
pub(super) fn paths(statuses: &[PortStatus]) -> Finding {
    const CHECK: &str = "paths of ports";
    let count = |path| serving(statuses, path);
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for status in statuses.iter().filter(|it| !it.reason.is_empty()) {
        *reasons.entry(&status.reason).or_default() += 1;
    }
    let mut found = format!(
        "{} kernel path, {} relay, {} engine",
        count(ForwardPath::KernelPath),
        count(ForwardPath::Relay),
        count(ForwardPath::Engine),
    );
    let mut reasons: Vec<(&str, usize)> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (reason, count) in reasons.iter().take(3) {
        found.push_str(&format!("; {count} times: {reason}"));
    }
    let broken = statuses
        .iter()
        .any(|it| matches!(it.state, PortState::Refused | PortState::Disabled));
    if broken {
        return Finding::bad(
            CHECK,
            Level::Warning,
            found,
            "bai-agent ports shows which and why",
        );
    }
    Finding::good(CHECK, found)
}

/// The statuses in a dataplane's region; none when there is none.
pub(super) fn statuses(directory: &Path) -> Vec<PortStatus> {
    ObservedReader::at(directory)
        .snapshot()
        .map(|snapshot| snapshot.ports.to_vec())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::desired::{PortKey, Protocol};
    use shared::ids::{KernelId, RegionId};

    #[test]
    fn kernels_that_are_led_to_the_metadata_service_must_get_there() {
        let ask =
            |host: &str, rules: Option<&str>| metadata(&HostPort::new(host, 40_128), rules).level;
        let closed = "-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n";
        let all = |rules: Option<&str>| ask("0.0.0.0", rules);
        assert_eq!(all(None), Level::Warning);
        assert_eq!(all(Some("-P INPUT ACCEPT\n")), Level::Good);
        assert_eq!(all(Some(closed)), Level::Warning);
        for rule in ["-i docker0", "-i br+", "-p tcp -m tcp --dport 40128"] {
            let rules = format!("{closed}-A INPUT {rule} -j ACCEPT\n");
            assert_eq!(all(Some(&rules)), Level::Good, "{rule}");
        }
        assert_eq!(ask("127.0.0.1", Some("-P INPUT ACCEPT\n")), Level::Warning);
    }

    #[test]
    fn an_engine_that_the_host_forbids_is_told_of() {
        let ask = |engine, disabled| relay_engine(engine, disabled).level;
        assert_eq!(ask(RelayEngine::Auto, "2\n"), Level::Good);
        assert_eq!(ask(RelayEngine::Uring, ""), Level::Good);
        assert_eq!(ask(RelayEngine::Uring, "0\n"), Level::Good);
        assert_eq!(ask(RelayEngine::Uring, "2\n"), Level::Warning);
    }

    #[test]
    fn agents_that_are_gone_are_told_of() {
        let top = tempfile::tempdir().unwrap();
        let (home, run_dir) = (top.path().join("home/a"), top.path().join("run"));
        std::fs::create_dir_all(&home).unwrap();
        std::fs::create_dir(&run_dir).unwrap();
        drop(shared::pins::claim(&home, &run_dir).unwrap());
        assert!(leftovers(&top.path().join("home")).is_none());
        std::fs::remove_dir(&run_dir).unwrap();
        let found = leftovers(&top.path().join("home")).unwrap();
        assert_eq!(found.level, Level::Warning);
    }

    fn status(host_port: u16, path: ForwardPath, reason: &str) -> PortStatus {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port,
        };
        let state = PortState::Serving;
        let mut it = PortStatus::new(key, KernelId::default(), RegionId::default(), state);
        it.path = path;
        it.reason = reason.to_owned();
        it
    }

    #[test]
    fn an_old_kernel_is_told_of_unless_it_serves() {
        let unified = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let look = |release, mounts, statuses: &[PortStatus]| {
            kernel_path((Forward::Auto, None), None, release, mounts, statuses)
        };
        assert_eq!(look("6.1.0-9-amd64\n", unified, &[]).level, Level::Good);
        assert_eq!(look("6.1.0-9-amd64\n", "", &[]).level, Level::Warning);
        let relayed = [status(1, ForwardPath::Relay, "by the relay: x")];
        assert_eq!(look("5.15.0", unified, &relayed).level, Level::Warning);
        let served = [status(1, ForwardPath::KernelPath, "")];
        let found = look("5.15.0", unified, &served);
        assert_eq!(
            (found.level, &*found.found),
            (Level::Good, "Linux 5.15.0, serves 1 ports")
        );
    }

    #[test]
    fn paths_are_counted_and_their_reasons_told() {
        let mut all = vec![
            status(1, ForwardPath::KernelPath, ""),
            status(2, ForwardPath::Relay, "by the relay: x"),
            status(3, ForwardPath::Relay, "by the relay: x"),
        ];
        let finding = paths(&all);
        assert_eq!(finding.level, Level::Good);
        assert!(finding.found.contains("1 kernel path, 2 relay, 0 engine"));
        assert!(finding.found.contains("2 times: by the relay: x"));
        all[0].state = PortState::Disabled;
        assert_eq!(paths(&all).level, Level::Warning);
    }
}
