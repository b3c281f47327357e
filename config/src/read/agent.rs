//! `[agent]`.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use super::{DefaultPaths, not_blank, on_every_address, within};
use crate::choice::{Backend, ScalingGroupType};
use crate::document::Table;
use crate::problem::{NoteKind, Origin};
use crate::section::{Key, Reader, Section, key};
use crate::sections::{Agent, Container, CurveFiles, SyncContainerLifecycles};
use crate::setting::{AnyPath, Directory, ExistingFile, Setting};
use crate::units::{Fault, HostPort};

const RPC: Key = key("rpc-listen-addr");
const PLUGIN_NETWORK: &str = "there are no network plugins here";
const DEBUGGER: &str = "it belongs to the Python debugger";
const NOT_USED: &[(&str, &str)] = &[
    (
        "ssl-enabled",
        "the service address speaks plain HTTP; put a TLS proxy before it",
    ),
    ("ssl-cert", "the service address speaks plain HTTP"),
    ("ssl-key", "the service address speaks plain HTTP"),
    ("instance-type", "the original only logs it"),
    ("mount-path-uid-gid", "mounted folders keep their owner"),
    ("event-loop", "it chooses a Python event loop"),
    ("aiomonitor-termui-port", DEBUGGER),
    ("aiomonitor-port", DEBUGGER),
    ("aiomonitor-webui-port", DEBUGGER),
    ("allow-network-plugins", PLUGIN_NETWORK),
    ("block-network-plugins", PLUGIN_NETWORK),
    (
        "use-experimental-redis-event-dispatcher",
        "there is one event client here",
    ),
    ("docker-mode", "it is found out at start"),
];

/// `etcd` are the addresses of the cluster's etcd; none on a node on its own.
pub(super) fn read(
    reader: &mut Reader<'_>,
    root: &Table,
    defaults: &DefaultPaths,
    etcd: &[HostPort],
) -> Agent {
    let host = reader.host;
    let standalone = reader.standalone;
    let ipc_default = defaults.directory(reader, "/tmp/backend.ai/ipc", "ipc");
    let var_default = defaults.directory(reader, "./var/lib/backend.ai", "var");
    let mut s = Section::open(reader, Some(root), "agent");

    let mode = mode(&mut s);
    let (rpc_listen_addr, how) = rpc_listen_addr(&mut s, etcd);
    let advertised_rpc_addr = advertised(&mut s, &rpc_listen_addr, how, etcd);
    let loopback = if standalone { "127.0.0.1" } else { "0.0.0.0" };
    const SERVICE: Key = key("service-addr").or(&["internal-addr"]);
    let mut service_addr = s.or(SERVICE, HostPort::new(loopback, 6003));
    if on_every_address(&mut service_addr.host) {
        s.amend(SERVICE, &service_addr);
    }
    const ANNOUNCED: Key = key("announce-addr").or(&["announce-internal-addr"]);
    let reached = &advertised_rpc_addr.host;
    let mut announce_addr = s.or(ANNOUNCED, HostPort::new(reached, service_addr.port));
    if announce_addr.host.is_empty() {
        announce_addr.host.clone_from(reached);
        s.amend(ANNOUNCED, &announce_addr);
    }
    let rpc_auth = rpc_auth(&mut s);
    let id = id(&mut s, &host.hostname());
    let region = region(&mut s);
    let scaling_group = s.or_checked(key("scaling-group"), "default".to_owned(), not_blank);
    let scaling_group_type = s.or(key("scaling-group-type"), ScalingGroupType::Compute);
    // Completed by `public_host` once the container section is known.
    let _ = s.optional::<String>(key("public-host"));
    let agent_sock_port = s.or_checked(key("agent-sock-port"), 6007, within(1024, 65535));
    const METADATA: Key = key("metadata-server-bind-host");
    let mut metadata_host = s.or_checked(METADATA, "0.0.0.0".to_owned(), host_name);
    if on_every_address(&mut metadata_host) {
        s.amend(METADATA, &metadata_host);
    }
    let metadata_port = s.or_checked(key("metadata-server-port"), 40128, within(1, 65535));
    let ipc_base_path = place(&mut s, key("ipc-base-path"), ipc_default);
    let var_base_path = place(&mut s, key("var-base-path"), var_default);
    let mount_path = s.maybe::<Directory>(key("mount-path")).map(|d| d.0);
    let cohabiting_storage_proxy = s.or(key("cohabiting-storage-proxy"), true);
    let pid_file = s
        .or(
            key("pid-file").env("BACKEND_PID_FILE").or_blank(),
            AnyPath(PathBuf::from("/dev/null")),
        )
        .0;
    let skip_manager_detection = s.or(key("skip-manager-detection"), false);
    let allow_compute_plugins: Option<BTreeSet<String>> = s.maybe(key("allow-compute-plugins"));
    let block_compute_plugins: Option<BTreeSet<String>> = s.maybe(key("block-compute-plugins"));
    let beside = match standalone {
        true => &defaults.state_dir,
        false => &var_base_path,
    };
    // Not in a `tmp` of the directory one starts in, as the original's: from `/`, where units start, that is emptied
    // at boot.
    let commit_default = Directory(beside.join("commit"));
    let image_commit_path = place(&mut s, key("image-commit-path"), commit_default);
    let abuse_report_path = s
        .maybe::<Directory>(key("abuse-report-path"))
        .map(|directory| directory.0);
    let force_terminate_abusing_containers = s.or(key("force-terminate-abusing-containers"), false);
    let kernel_creation_concurrency =
        s.or_checked(key("kernel-creation-concurrency"), 4, within(1, 32));
    let sync_container_lifecycles = sync(&mut s);
    s.finish(NOT_USED, &["sync-container-lifecycles"]);

    Agent {
        mode,
        rpc_listen_addr,
        advertised_rpc_addr,
        service_addr,
        announce_addr,
        rpc_auth,
        id,
        region,
        scaling_group,
        scaling_group_type,
        public_host: String::new(),
        agent_sock_port,
        metadata_server: HostPort::new(metadata_host, metadata_port),
        ipc_base_path,
        var_base_path,
        mount_path,
        cohabiting_storage_proxy,
        pid_file,
        skip_manager_detection,
        allow_compute_plugins,
        block_compute_plugins,
        image_commit_path,
        abuse_report_path,
        force_terminate_abusing_containers,
        kernel_creation_concurrency,
        sync_container_lifecycles,
    }
}

/// A directory whose default depends on the mode.
pub(super) fn place(s: &mut Section<'_, '_>, key: Key, default: Directory) -> PathBuf {
    s.or_standalone(key, default.clone(), default).0
}

fn mode(s: &mut Section<'_, '_>) -> Backend {
    let key = key("mode").or(&["backend"]);
    let rule = |mode: &Backend| match mode {
        Backend::Docker => Ok(()),
        _ => Err(Fault::new(
            "this agent only runs Docker containers",
            "write \"docker\", or use the Python agent",
        )),
    };
    let faults = s.reader.gathered.problems.len();
    match s.checked(key, rule) {
        Some(mode) => mode,
        None if s.reader.standalone => s.or_standalone(key, Backend::Docker, Backend::Docker),
        None => {
            if s.reader.gathered.problems.len() == faults {
                s.missing(key, "write mode = \"docker\" in [agent]");
            }
            Backend::Docker
        }
    }
}

/// The bind address; how its host was detected, when it was.
fn rpc_listen_addr(s: &mut Section<'_, '_>, etcd: &[HostPort]) -> (HostPort, Option<&'static str>) {
    let standalone = s.reader.standalone;
    let default = HostPort::new(if standalone { "127.0.0.1" } else { "0.0.0.0" }, 6001);
    let mut addr = s.or_standalone(RPC, default.clone(), default);
    override_part(s, "BACKEND_AGENT_HOST_OVERRIDE", |text| {
        addr.host = HostPort::parse_host(text)?;
        Ok(addr.clone())
    });
    override_part(s, "BACKEND_AGENT_PORT", |text| {
        addr.port = HostPort::parse_port(text)?;
        Ok(addr.clone())
    });
    if !addr.host.is_empty() {
        return (addr, None);
    }
    let (ip, how) = reachable_address(s, etcd);
    addr.host = ip.to_string();
    s.reader
        .record("agent", RPC.name, &addr, Origin::Detected(how));
    (addr, Some(how))
}

fn override_part(
    s: &mut Section<'_, '_>,
    variable: &'static str,
    mut apply: impl FnMut(&str) -> Result<HostPort, Fault>,
) {
    let Some(text) = (s.reader.environment)(variable) else {
        return;
    };
    match apply(&text) {
        Ok(addr) => s
            .reader
            .record("agent", RPC.name, &addr, Origin::Environment(variable)),
        Err(fault) => {
            let value = crate::document::Value::text(0, text);
            s.refuse(RPC, &value, Origin::Environment(variable), fault);
        }
    }
}

/// What the manager is told. The original announces `0.0.0.0` literally, which nobody can reach.
fn advertised(
    s: &mut Section<'_, '_>,
    listen: &HostPort,
    how: Option<&'static str>,
    etcd: &[HostPort],
) -> HostPort {
    const ADVERTISED: Key = key("advertised-rpc-addr");
    let given = s.checked(ADVERTISED, |addr: &HostPort| {
        if addr.is_unspecified() {
            return Err(Fault::new(
                "nobody can reach an agent at this address",
                "write the address others use, or leave the key out to have it detected",
            ));
        }
        Ok(())
    });
    let port = given.as_ref().map_or(listen.port, |addr| addr.port);
    let (host, origin) = match given {
        Some(addr) if !addr.host.is_empty() => return addr,
        None if !listen.is_unspecified() => {
            let origin = match how {
                Some(how) => Origin::Detected(how),
                None => Origin::Detected("rpc-listen-addr"),
            };
            (listen.host.clone(), origin)
        }
        _ => {
            let (ip, how) = reachable_address(s, etcd);
            (ip.to_string(), Origin::Detected(how))
        }
    };
    let addr = HostPort { host, port };
    s.reader.record("agent", ADVERTISED.name, &addr, origin);
    addr
}

/// An address of this host that others can reach: in the cluster's subnet when it names one.
fn reachable_address(s: &mut Section<'_, '_>, etcd: &[HostPort]) -> (IpAddr, &'static str) {
    const SUBNET: &str = "config/network/subnet/agent";
    let fault = match s.reader.overlay.agent_subnet() {
        Ok(None) => return detected_address(s, etcd),
        Ok(Some(subnet)) => {
            let local = s.reader.host.local_addresses();
            match local.into_iter().find(|ip| subnet.holds(*ip)) {
                Some(ip) => return (ip, SUBNET),
                None => Fault::new(
                    format!("no address of this host lies in {subnet}, {SUBNET} of etcd"),
                    "write the host's address here, or correct the subnet",
                ),
            }
        }
        Err(fault) => fault,
    };
    s.reader.fault("agent", RPC.name, fault.why, fault.remedy);
    detected_address(s, etcd)
}

/// A destination from the range reserved for documentation, so it is never a neighbour.
const ELSEWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// By the host's name, of several addresses the one that leads to etcd, as managers are there too; else
/// by its default route, else by the route to etcd.
fn detected_address(s: &mut Section<'_, '_>, etcd: &[HostPort]) -> (IpAddr, &'static str) {
    const TO_ETCD: &str = "route to etcd.addr";
    const DEFAULT_ROUTE: &str = "default route";
    let host = s.reader.host;
    let by_default = host.address_towards(ELSEWHERE);
    let mut own = host.outer_addresses();
    // Of a node that is a container itself, a bridge may lead out by a port that looks like a container's.
    own.extend(by_default);
    let mut named = host.resolve(&host.hostname());
    // Debian names the host 127.0.1.1 in /etc/hosts, and a wildcard of the DNS may name a stranger.
    named.retain(|ip| ip.is_ipv4() && !ip.is_loopback() && own.contains(ip));
    named.sort();
    named.dedup();
    if let [ip] = named[..] {
        return (ip, "host name");
    }
    let targets = etcd.iter().flat_map(|addr| match addr.ip() {
        Some(ip) => vec![ip],
        None => host.resolve(&addr.host),
    });
    let mut ways: Vec<IpAddr> = targets
        .filter_map(|target| host.address_towards(target))
        .collect();
    // Managers ask for IPv4 addresses alone.
    ways.sort_by_key(IpAddr::is_ipv6);
    if let Some(first) = named.first().copied() {
        let to_etcd = ways.iter().map(|ip| (*ip, TO_ETCD));
        let mut found = to_etcd.chain(by_default.map(|ip| (ip, DEFAULT_ROUTE)));
        return found.find(|(ip, _)| named.contains(ip)).unwrap_or_else(|| {
            let named: Vec<String> = named.iter().map(IpAddr::to_string).collect();
            let text = format!(
                "is {first}, as this host's name leads to {}, and neither the route to etcd.addr nor the default route \
                 tells which of them others use; write it",
                named.join(" and ")
            );
            warn_of_address(s, text);
            (first, "host name")
        });
    }
    if let Some(ip) = by_default.filter(|ip| !ip.is_loopback()) {
        return (ip, DEFAULT_ROUTE);
    }
    if let Some(ip) = ways.iter().find(|ip| !ip.is_loopback()) {
        return (*ip, TO_ETCD);
    }
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    // With a way all of the cluster is on this host.
    if ways.is_empty() && !etcd.is_empty() {
        let text = format!(
            "is {loopback}, which no manager on another host reaches: this host's name leads to no other address, and \
             there is no route to etcd.addr; write the address that others use"
        );
        warn_of_address(s, text);
    }
    (loopback, "loopback")
}

/// Says it once, though both addresses of the RPC may be detected.
fn warn_of_address(s: &mut Section<'_, '_>, text: String) {
    let key = "agent.advertised-rpc-addr";
    if !s.reader.gathered.notes.iter().any(|note| note.key == key) {
        s.reader.note(NoteKind::Warning, None, key, text);
    }
}

fn rpc_auth(s: &mut Section<'_, '_>) -> Option<CurveFiles> {
    let agent: Option<ExistingFile> = s.maybe(key("rpc-auth-agent-keypair"));
    let manager: Option<ExistingFile> = s.maybe(key("rpc-auth-manager-public-key"));
    Some(CurveFiles {
        agent_keypair: agent?.0,
        manager_public_key: manager?.0,
    })
}

fn id(s: &mut Section<'_, '_>, hostname: &str) -> String {
    let rule = |id: &String| {
        const REMEDY: &str =
            "write 1 to 64 letters, digits, dots, dashes or underscores, the first not a dot";
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if id.is_empty() || id.len() > 64 {
            return Err(Fault::new("the id has no or too many characters", REMEDY));
        }
        if !id.chars().all(allowed) || id.starts_with('.') {
            return Err(Fault::new("the id can not be a file name", REMEDY));
        }
        Ok(())
    };
    // The original's sample says that both are unset like this.
    const ID: Key = key("id").or_blank();
    let faults = s.reader.gathered.problems.len();
    if let Some(id) = s.checked(ID, rule) {
        return id;
    }
    let detected = format!("i-{hostname}");
    if s.reader.gathered.problems.len() == faults {
        s.reader
            .record("agent", ID.name, &detected, Origin::Detected("host name"));
        if let Err(fault) = rule(&detected) {
            s.reader.fault(
                "agent",
                ID.name,
                fault.why,
                format!("{}, as agent.id", fault.remedy),
            );
        }
    }
    detected
}

fn region(s: &mut Section<'_, '_>) -> String {
    const REGION: Key = key("region");
    if let Some(region) = s.checked(REGION, not_blank) {
        return region;
    }
    // The variable replaces the *detected* region: a value in the file wins over it.
    let (region, origin) = match (s.reader.environment)("BACKEND_REGION").filter(|r| !r.is_empty())
    {
        Some(region) => (region, Origin::Environment("BACKEND_REGION")),
        None => ("local".to_owned(), Origin::Default),
    };
    s.reader.record("agent", REGION.name, &region, origin);
    region
}

fn host_name<T: AsRef<str>>(text: &T) -> Result<(), Fault> {
    HostPort::parse_host(text.as_ref()).map(|_| ())
}

fn sync(s: &mut Section<'_, '_>) -> SyncContainerLifecycles {
    let table = s.table();
    let mut sync = Section::open(&mut *s.reader, table, "agent.sync-container-lifecycles");
    let settings = SyncContainerLifecycles {
        enabled: sync.or(key("enabled"), true),
        interval: sync.or(key("interval"), Duration::from_secs(10)),
    };
    sync.finish(&[], &[]);
    if settings.enabled && settings.interval < Duration::from_millis(100) {
        let (section, text) = (
            "agent.sync-container-lifecycles",
            "the engine would be asked without a pause",
        );
        s.reader.fault(
            section,
            "interval",
            text,
            "write at least 100ms, or enabled = false",
        );
    }
    settings
}

/// The heartbeat's `public_host`: as given, else what the manager is told about containers.
pub(super) fn public_host(reader: &mut Reader<'_>, container: &Container) -> String {
    let given = reader
        .gathered
        .values
        .iter()
        .find(|v| v.section == "agent" && v.key == "public-host");
    if let Some(given) = given
        && let serde_json::Value::String(text) = &given.json
        && !text.is_empty()
    {
        return text.clone();
    }
    let host = container.advertised_host.clone();
    reader.record(
        "agent",
        "public-host",
        &host,
        Origin::Detected("container.advertised-host"),
    );
    host
}

/// The address containers' ports are bound to when none is given: the RPC listen host.
pub(super) fn bind_host(reader: &mut Reader<'_>, agent: &Agent) -> IpAddr {
    const SECTION: &str = "container";
    let subnet = match reader.overlay.container_subnet() {
        Ok(subnet) => subnet,
        Err(fault) => {
            reader.fault(SECTION, "bind-host", fault.why, fault.remedy);
            None
        }
    };
    if let Some(subnet) = subnet {
        let local = reader.host.local_addresses();
        if let Some(ip) = local.into_iter().find(|ip| subnet.holds(*ip)) {
            let origin = Origin::Detected("config/network/subnet/container");
            reader.record(SECTION, "bind-host", &ip.to_string(), origin);
            return ip;
        }
    }
    let (ip, how) = match agent.rpc_listen_addr.ip() {
        Some(ip) => (ip, "agent.rpc-listen-addr"),
        None => match reader.host.resolve(&agent.rpc_listen_addr.host).first() {
            Some(ip) => (*ip, "agent.rpc-listen-addr, resolved"),
            None => {
                let host = &agent.rpc_listen_addr.host;
                let why = format!(
                    "is blank and the host {host:?} of agent.rpc-listen-addr does not resolve"
                );
                reader.unresolved(
                    SECTION,
                    "bind-host",
                    why,
                    "write an IP address of this host, or see that the name resolves (getent hosts)",
                );
                return IpAddr::from([127, 0, 0, 1]);
            }
        },
    };
    reader.record(SECTION, "bind-host", &ip.to_string(), Origin::Detected(how));
    ip
}

/// Warns where a standalone node can be driven by anyone who reaches it.
pub(super) fn warn_open_rpc(reader: &mut Reader<'_>, agent: &Agent) {
    let local = agent
        .rpc_listen_addr
        .ip()
        .is_some_and(|ip| ip.is_loopback());
    if reader.standalone && !local && agent.rpc_auth.is_none() {
        let line = match reader.origin("agent", RPC.name) {
            Some(Origin::File { line }) => Some(line),
            _ => None,
        };
        let text = format!(
            "{} is open to the network without keys: whoever reaches it can run code here",
            agent.rpc_listen_addr.text()
        );
        reader.note(NoteKind::Warning, line, "agent.rpc-listen-addr", text);
    }
}
