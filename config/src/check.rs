//! Rules over several values: what the original finds out at start, and what it finds out too late.

use crate::choice::{SandboxType, ScratchType, StatsType};
use crate::plugins::means_plugin;
use crate::problem::{NoteKind, Origin};
use crate::section::Reader;
use crate::sections::Config;
use crate::units::HostPort;

pub(crate) fn all(reader: &mut Reader<'_>, config: &Config) {
    privileges(reader, config);
    keys(reader);
    plugins(reader, config);
    ports(reader, config);
    socket_paths(reader, config);
}

fn privileges(reader: &mut Reader<'_>, config: &Config) {
    let root = reader.host.process_user().uid == 0;
    let container = &config.container;
    if container.sandbox_type == SandboxType::Jail && reader.host.architecture() != "x86_64" {
        let why = format!(
            "the jail only exists for x86_64, this host is {}",
            reader.host.architecture()
        );
        reader.fault("container", "sandbox-type", why, "write \"docker\"");
    }
    if container.stats_type == Some(StatsType::Cgroup) && !root {
        let why = "needs root, and this agent runs without it";
        reader.fault(
            "container",
            "stats-type",
            why,
            "run as root, or write \"docker\"",
        );
    }
    if container.scratch_type == ScratchType::Hostfile {
        if !root {
            let why = "needs root to mount loop files, and this agent runs without it";
            reader.fault(
                "container",
                "scratch-type",
                why,
                "run as root, or write \"hostdir\"",
            );
        }
        // ext4 needs some hundred kilobytes for itself.
        if container.scratch_size.0 < 1 << 20 {
            let why = "is the size of each scratch file system of scratch-type \"hostfile\" and is too small";
            reader.fault(
                "container",
                "scratch-size",
                why,
                "write a size such as \"10g\", at least 1m",
            );
        }
    }
}

/// Paths of unix sockets have at most 107 bytes; the longest below these directories has some 30
/// bytes of its own.
fn socket_paths(reader: &mut Reader<'_>, config: &Config) {
    const LONGEST: usize = 76;
    let region = config.node.region_directory(&config.agent.id);
    for (section, key, path) in [
        ("node", "run-dir", region.as_path()),
        (
            "agent",
            "ipc-base-path",
            config.agent.ipc_base_path.as_path(),
        ),
    ] {
        let length = path.as_os_str().len();
        if length > LONGEST {
            let why = format!(
                "sockets in {} would have names too long for the kernel ({length} bytes of {LONGEST})",
                path.display()
            );
            reader.fault(
                section,
                key,
                why,
                "name a directory with a shorter path, or shorten agent.id",
            );
        }
    }
}

/// CURVE needs both files; one alone would silently leave the RPC open.
fn keys(reader: &mut Reader<'_>) {
    const PAIR: [&str; 2] = ["rpc-auth-agent-keypair", "rpc-auth-manager-public-key"];
    let given = PAIR.map(|key| {
        matches!(
            reader.origin("agent", key),
            Some(Origin::File { .. } | Origin::Environment(_))
        )
    });
    let refused = |key: &str| {
        let name = format!("agent.{key}");
        reader
            .gathered
            .problems
            .iter()
            .any(|problem| problem.key == name)
    };
    if given[0] != given[1] && !PAIR.iter().any(|key| refused(key)) {
        let (present, missing) = if given[0] {
            (PAIR[0], PAIR[1])
        } else {
            (PAIR[1], PAIR[0])
        };
        let why = format!("is given without {missing}, and encryption needs both");
        reader.fault(
            "agent",
            present,
            why,
            format!("add {missing}, or remove both"),
        );
    }
}

fn plugins(reader: &mut Reader<'_>, config: &Config) {
    let agent = &config.agent;
    if let (Some(allow), Some(block)) = (&agent.allow_compute_plugins, &agent.block_compute_plugins)
        && let Some(both) = allow.intersection(block).next()
    {
        let why = format!("{both:?} is also in block-compute-plugins");
        reader.fault(
            "agent",
            "allow-compute-plugins",
            why,
            "name each plugin in one of the two lists",
        );
    }
    let drivers = ["cuda", "rocm", "tpu", "mock"].map(str::to_owned);
    let slots = config.node.accelerators.device_plugins.values();
    let listed = slots.filter_map(|slot| slot.split('.').next().map(str::to_owned));
    let known: Vec<String> = drivers.into_iter().chain(listed).collect();
    for (key, list) in [
        ("allow-compute-plugins", &agent.allow_compute_plugins),
        ("block-compute-plugins", &agent.block_compute_plugins),
    ] {
        let all = list.iter().flatten();
        let odd: Vec<&str> = all
            .filter(|entry| known.iter().all(|plugin| !means_plugin(entry, plugin)))
            .map(String::as_str)
            .collect();
        if !odd.is_empty() {
            let line = match reader.origin("agent", key) {
                Some(Origin::File { line }) => Some(line),
                _ => None,
            };
            let text = format!(
                "{} no plugin of this agent, which has {}",
                match odd.as_slice() {
                    [one] => format!("{one:?} means"),
                    _ => format!("{} mean", odd.join(", ")),
                },
                known.join(", ")
            );
            reader.note(NoteKind::Warning, line, format!("agent.{key}"), text);
        }
    }
}

fn ports(reader: &mut Reader<'_>, config: &Config) {
    let agent = &config.agent;
    let listeners = [
        ("rpc-listen-addr", &agent.rpc_listen_addr),
        ("service-addr", &agent.service_addr),
        ("metadata-server-port", &agent.metadata_server),
    ];
    for (index, (key, addr)) in listeners.iter().enumerate() {
        if let Some((other, _)) = listeners[..index]
            .iter()
            .find(|(_, earlier)| collide(earlier, addr))
        {
            let why = format!("is the same port of the same address as agent.{other}");
            reader.fault("agent", key, why, "give each its own port");
        }
        if config.container.port_range.contains(addr.port) {
            let text = format!(
                "contains port {} of agent.{key}, which no container can get",
                addr.port
            );
            let line = match reader.origin("container", "port-range") {
                Some(Origin::File { line }) => Some(line),
                _ => None,
            };
            reader.note(NoteKind::Warning, line, "container.port-range", text);
        }
    }
}

fn collide(a: &HostPort, b: &HostPort) -> bool {
    a.port == b.port && (a.host == b.host || a.is_unspecified() || b.is_unspecified())
}
