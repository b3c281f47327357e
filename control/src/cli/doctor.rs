//! `bai-agent doctor`: what the host lacks, and what to do about it. Looks only; changes nothing.

mod devices;
mod forwarding;

use std::path::Path;
use std::time::Duration;

use config::{Config, Loaded, NoteKind};
use serde::Serialize;
use serde_json::json;
use shared::procfs::{cgroup_mounts, unified_cgroup_mount};

use super::exit::Problem;
use super::output::{self, Form, Table, say, say_part};
use crate::blocking::blocking;
use crate::causes::chain;
use crate::docker::{Docker, DockerError, DockerOptions, SystemInfo};
use crate::etcd::Etcd;
use crate::firewall;
use crate::image::containerd_store;
use crate::storage_proxy::{ProxyClient, ProxyError};

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    Good,
    /// Works, but less well than it could.
    Warning,
    /// The node does not work like this.
    Failure,
}

/// One checked thing.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub check: &'static str,
    pub level: Level,
    pub found: String,
    /// What to do; empty when nothing needs doing.
    pub remedy: String,
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Finding {
            check,
            level: Level::Good,
            found: found.into(),
            remedy: String::new(),
        }
    }

    fn bad(
        check: &'static str,
        level: Level,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Finding {
            check,
            level,
            found: found.into(),
            remedy: remedy.into(),
        }
    }
}

/// Runs every check and shows the findings; a failure among them ends with code 1. `standalone` is whether
/// the command line says that the node is on its own.
pub async fn run(loaded: &Loaded, standalone: bool, form: Form) -> Result<(), Problem> {
    let findings = findings(loaded, standalone).await?;
    match form {
        Form::Json => output::json(&json!({ "findings": findings }))?,
        Form::Text => show(&findings),
    }
    let failed = findings.iter().any(|it| it.level == Level::Failure);
    match failed {
        true => Err(Problem::Findings),
        false => Ok(()),
    }
}

fn show(findings: &[Finding]) {
    let mut table = Table::new(&["", "CHECK", "FOUND"]);
    for finding in findings {
        let mark = match finding.level {
            Level::Good => "ok",
            Level::Warning => "warning",
            Level::Failure => "FAILURE",
        };
        table.row([
            mark.to_owned(),
            finding.check.to_owned(),
            finding.found.clone(),
        ]);
    }
    say_part!("{}", table.render());
    for finding in findings.iter().filter(|it| !it.remedy.is_empty()) {
        say!("\n{}: {}", finding.check, finding.remedy);
    }
}

async fn findings(loaded: &Loaded, standalone: bool) -> Result<Vec<Finding>, Problem> {
    let config = loaded.config.clone();
    let engine = engine(&config).await;
    let config_for_rules = config.clone();
    let decider = firewall::decider(&config).await;
    let decider = decider.unwrap_or_else(|err| Some(err.to_string()));
    let honour_firewall = decider.is_some();
    let place = shared::run_dir::RunDir::choose(Some(&config.node.run_dir), &config.agent.id);
    let statuses = match place.ok().filter(|_| dataplane_alive(&config)) {
        Some(place) => Some(blocking(move || forwarding::statuses(&place.dataplane())).await),
        None => None,
    };
    let ports = statuses.clone().unwrap_or_default();
    let runner = {
        let config = config.clone();
        move || runner(&config)
    };
    let mut findings = vec![
        configuration(loaded, standalone),
        privileges(nix::unistd::geteuid().is_root()),
    ];
    findings.extend(engine);
    findings.extend(Box::pin(cluster(&config)).await);
    findings.extend(Box::pin(storage_proxy(&config)).await);
    let host = tokio::task::spawn_blocking(move || {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        vec![
            run_directory(&config),
            socket_directory(&config.agent.ipc_base_path),
            descriptors(
                nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
                    .map_or(0, |(_, hard)| hard),
            ),
            control_groups(&read("/proc/self/mounts"), own_control_groups(), |root| {
                std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default()
            }),
            ephemeral_ports(
                &read("/proc/sys/net/ipv4/ip_local_port_range"),
                &read("/proc/sys/net/ipv4/ip_local_reserved_ports"),
                config.container.port_range.first,
                config.container.port_range.last,
            ),
            taken_ports(
                &(read("/proc/net/tcp") + &read("/proc/net/tcp6")),
                config.container.port_range.first,
                config.container.port_range.last,
                dataplane_alive(&config),
            ),
            runner(),
            forwarding::kernel_path(
                (config.node.forward, config.node.honour_firewall),
                decider.as_deref(),
                &read("/proc/sys/kernel/osrelease"),
                &read("/proc/self/mounts"),
                &ports,
            ),
            forwarding::relay_engine(
                config.node.relay_engine,
                &read("/proc/sys/kernel/io_uring_disabled"),
            ),
            kernel_features(Path::new("/sys/kernel/btf/vmlinux").exists()),
        ]
    })
    .await
    .map_err(|error| Problem::Other(error.into()))?;
    findings.extend(host);
    findings.extend(devices::nvidia_links(&config_for_rules).await);
    findings.extend(forwarding::leftovers(Path::new(shared::pins::HOME)));
    if config_for_rules.node.metadata_redirect {
        let input = firewall::rules("iptables", &["-S", "INPUT"]).await;
        let server = &config_for_rules.agent.metadata_server;
        findings.push(forwarding::metadata(server, input.as_deref()));
    }
    let refusals = firewall::refusals(&config_for_rules).await;
    findings.extend(forwarding::firewall(&refusals));
    if let Some(rules) = firewall::rules("iptables", &["-S", "DOCKER-USER"]).await {
        findings.extend(forwarding::user_rules(
            &config_for_rules,
            honour_firewall,
            &rules,
        ));
    }
    findings.extend(statuses.as_deref().map(forwarding::paths));
    Ok(findings)
}

/// Which configuration the other checks go by.
fn configuration(loaded: &Loaded, standalone: bool) -> Finding {
    const CHECK: &str = "configuration";
    let (place, how) = match &loaded.config.file {
        Some(file) => {
            let file = file.display();
            let how = format!("if it is one, say --standalone --config {file}");
            (file.to_string(), how)
        }
        None => (
            "no file, built-in values".to_owned(),
            "if it is one, say --standalone".to_owned(),
        ),
    };
    let kind = match loaded.config.standalone {
        true => "a node on its own",
        false => "a node of a cluster",
    };
    let found = format!("{place}: {kind}");
    if loaded.config.standalone && !standalone {
        return Finding::bad(
            CHECK,
            Level::Warning,
            found,
            format!("{how}; of a cluster's node `bai-agent check-config` tells what is missing"),
        );
    }
    let remarks = loaded
        .notes
        .iter()
        .filter(|note| note.kind != NoteKind::NotUsed)
        .count();
    match remarks {
        0 => Finding::good(CHECK, found),
        _ => Finding::bad(
            CHECK,
            Level::Warning,
            format!(
                "{found}, {remarks} {}",
                if remarks == 1 { "remark" } else { "remarks" }
            ),
            "`bai-agent check-config`, with the same options, lists them at its end",
        ),
    }
}

fn privileges(root: bool) -> Finding {
    match root {
        true => Finding::good("privileges", "running as root"),
        false => Finding::bad(
            "privileges",
            Level::Failure,
            "not root",
            "the agent owns scratch directories for other users and reads every cgroup; run it (and this check) as root",
        ),
    }
}

async fn engine(config: &Config) -> Vec<Finding> {
    const CHECK: &str = "engine";
    let options = DockerOptions {
        host: config.node.engine.host.clone(),
        ..DockerOptions::default()
    };
    let found = async {
        let docker = Docker::connect(&options).await?;
        Ok((
            docker.version().await?,
            docker.info().await?,
            docker.is_local(),
        ))
    };
    let found: Result<(_, _, _), DockerError> =
        match tokio::time::timeout(Duration::from_secs(10), found).await {
            Ok(found) => found,
            Err(_) => {
                return vec![Finding::bad(
                    CHECK,
                    Level::Failure,
                    "no answer within 10 s",
                    "see whether `docker ps` answers, else restart the engine",
                )];
            }
        };
    match found {
        Ok((version, info, is_local)) => {
            let store = blocking(move || image_store(&info, is_local)).await;
            let version = engine_version(&version.version);
            std::iter::once(version).chain(store).collect()
        }
        // Its text says what to do.
        Err(error) => vec![Finding::bad(
            CHECK,
            Level::Failure,
            "not usable",
            chain(&error),
        )],
    }
}

/// Whether images in containerd's store can be told from others of the same name. Blocking.
fn image_store(info: &SystemInfo, is_local: bool) -> Option<Finding> {
    const CHECK: &str = "image store";
    if !containerd_store::is_used(info) {
        return None;
    }
    let roots = is_local.then(|| containerd_store::roots(info));
    let mut roots = roots.iter().flatten();
    Some(match roots.find(|root| containerd_store::is_root(root)) {
        Some(place) => Finding::good(CHECK, format!("containerd's, in {}", place.display())),
        None => Finding::bad(
            CHECK,
            Level::Warning,
            "containerd's, in a place that is not known",
            "with auto-pull `digest` each image is asked of its registry once after a start of the agent; let root in /etc/containerd/config.toml name containerd's directory, and this host see it",
        ),
    })
}

/// What a node that joins a cluster needs of it; nothing for a node on its own.
async fn cluster(config: &Config) -> Vec<Finding> {
    const ETCD: &str = "etcd";
    const MANAGER: &str = "manager";
    const BUS: &str = "event bus";
    let Some(settings) = &config.etcd else {
        return Vec::new();
    };
    let agent = &config.agent;
    let etcd = match Etcd::new(settings, &agent.id, &agent.scaling_group) {
        Ok(etcd) => etcd,
        Err(err) => {
            return vec![Finding::bad(
                ETCD,
                Level::Failure,
                chain(&err),
                "correct [etcd]",
            )];
        }
    };
    let [managers, redis] = match etcd.trees(["nodes/manager", "config/redis"]).await {
        Ok(found) => found,
        Err(err) => {
            return vec![Finding::bad(
                ETCD,
                Level::Failure,
                chain(&err),
                "check that etcd runs at etcd.addr and that this host may reach it; until then the agent waits",
            )];
        }
    };
    let place = format!(
        "answers at {}, namespace {}",
        etcd.endpoints(),
        settings.namespace
    );
    let mut findings = vec![Finding::good(ETCD, place)];
    findings.push(if !managers.tree.is_empty() || agent.skip_manager_detection {
        Finding::good(MANAGER, format!("{} registered", managers.tree.members.len()))
    } else {
        Finding::bad(
            MANAGER,
            Level::Warning,
            "none has registered",
            "start a manager in this namespace, or set agent.skip-manager-detection; until then the agent waits",
        )
    });
    findings.push(match crate::cluster::bus_settings(&redis.tree, &agent.id, None, None) {
        Ok(bus) => Finding::good(BUS, format!("at {}", bus.server.endpoint)),
        Err(err) => Finding::bad(
            BUS,
            Level::Failure,
            chain(&err),
            "set config/redis in etcd (backend.ai mgr etcd put config/redis/addr HOST:PORT); until then the agent waits",
        ),
    });
    findings
}

/// Whether the configured storage proxy answers; nothing where none is asked.
async fn storage_proxy(config: &Config) -> Option<Finding> {
    const CHECK: &str = "storage proxy";
    let settings = config.node.storage_proxy.as_ref()?;
    let client = ProxyClient::new(settings);
    let found = async { Ok::<_, ProxyError>((client.volumes().await?, client.version().await?)) };
    let (volumes, version) = match found.await {
        Ok(found) => found,
        Err(err) => {
            return Some(Finding::bad(
                CHECK,
                Level::Warning,
                chain(&err),
                "kernels run without it; figures of their folders are old or missing (bai-agent kernel folders)",
            ));
        }
    };
    let found = format!("{version} at {}, {} volumes", settings.url, volumes.len());
    let address = &settings.url.address;
    let near = address.host == "localhost" || address.ip().is_some_and(|ip| ip.is_loopback());
    Some(match settings.url.tls || near {
        true => Finding::good(CHECK, found),
        false => Finding::bad(
            CHECK,
            Level::Warning,
            format!("{found}, without encryption"),
            "its secret, which opens every folder, goes over the network as plain text; use https:// in node.storage-proxy.url",
        ),
    })
}

fn engine_version(version: &str) -> Finding {
    let mut numbers = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let release = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if release >= (20, 10) {
        Finding::good("engine", format!("Docker {version}"))
    } else {
        Finding::bad(
            "engine",
            Level::Failure,
            format!("Docker {version}"),
            "the agent needs Docker 20.10 or newer",
        )
    }
}

fn run_directory(config: &Config) -> Finding {
    const CHECK: &str = "run directory";
    let mut place: &Path = &config.node.run_dir;
    while !place.exists() {
        let Some(parent) = place.parent() else { break };
        place = parent;
    }
    match shared::run_dir::require_tmpfs(place) {
        Ok(()) => Finding::good(
            CHECK,
            format!("{} is on tmpfs", config.node.run_dir.display()),
        ),
        Err(error) => Finding::bad(
            CHECK,
            Level::Failure,
            error.to_string(),
            "set node.run-dir to a directory on tmpfs, such as /run/bai-agent or /dev/shm/bai-agent",
        ),
    }
}

/// The agent shows containers what lies there, so it starts only where nobody else can change that.
fn socket_directory(base: &Path) -> Finding {
    const CHECK: &str = "socket directory";
    let places = ["container", "proxy"].map(|kind| {
        let wanted = base.join(kind);
        let there = wanted.ancestors().find(|place| place.exists());
        there.unwrap_or(Path::new("/")).to_owned()
    });
    match places
        .iter()
        .try_for_each(|place| shared::run_dir::require_own(place))
    {
        Ok(()) => Finding::good(CHECK, format!("{} is root's or ours", base.display())),
        Err(error) => Finding::bad(
            CHECK,
            Level::Failure,
            error.to_string(),
            "give agent.ipc-base-path and the directories above it to the agent's user or root, and let nobody else write to them",
        ),
    }
}

fn descriptors(hard: u64) -> Finding {
    let found = format!("{hard} open files at most");
    if hard >= 65_536 {
        Finding::good("descriptors", found)
    } else {
        Finding::bad(
            "descriptors",
            Level::Warning,
            found,
            "each relayed connection needs two; raise LimitNOFILE (the shipped units do) or `ulimit -Hn`",
        )
    }
}

/// Whether this process is in another namespace of control groups than the host's first process, whose number
/// is always the same (linux/proc_ns.h, PROC_CGROUP_INIT_INO).
fn own_control_groups() -> bool {
    use std::os::unix::fs::MetadataExt;
    const OF_THE_HOST: u64 = 0xEFFF_FFFB;
    std::fs::metadata("/proc/self/ns/cgroup").is_ok_and(|found| found.ino() != OF_THE_HOST)
}

/// `own` is whether this process has a namespace of its own; `controllers` tells those of a unified root.
fn control_groups(mounts: &str, own: bool, controllers: impl Fn(&Path) -> String) -> Finding {
    const CHECK: &str = "control groups";
    let root = unified_cgroup_mount(mounts);
    let first = |controller: &str| cgroup_mounts(mounts).any(|mount| mount.has(controller));
    let found = match (root.is_some(), first("memory"), first("cpuacct")) {
        (true, false, false) => "version 2",
        (true, true, true) => "version 1 with a unified tree (hybrid)",
        (false, true, true) => "version 1",
        _ => {
            return Finding::bad(
                CHECK,
                Level::Failure,
                "neither version 2 nor version 1 with memory and cpuacct",
                "mount the control groups; without them no container can be limited or measured",
            );
        }
    };
    if own {
        return Finding::bad(
            CHECK,
            Level::Failure,
            format!("{found}, seen from a namespace of their own"),
            "those of the host's containers are not in it, so none is measured: run both programs on the host, or in a container with --cgroupns=host and the host's /sys/fs/cgroup",
        );
    }
    let there = root.as_deref().map(controllers).unwrap_or_default();
    let lacking: Vec<&str> = [
        ("cpu", "cpu"),
        ("memory", "memory"),
        ("pids", "pids"),
        ("io", "blkio"),
    ]
    .into_iter()
    .filter(|(unified, old)| !there.split_whitespace().any(|it| it == *unified) && !first(old))
    .map(|(unified, _)| unified)
    .collect();
    if lacking.is_empty() {
        return Finding::good(CHECK, found);
    }
    Finding::bad(
        CHECK,
        Level::Warning,
        format!("{found} without {}", lacking.join(", ")),
        "what these controllers limit and count stays unlimited and unknown: take cgroup_disable= off the kernel's command line (some distributions for ARM need cgroup_enable=memory), or build the kernel with them",
    )
}

/// `reserved` are the ports that the kernel gives to nobody who names none, as it lists them: `8080,30000-31000`.
fn ephemeral_ports(range: &str, reserved: &str, first: u16, last: u16) -> Finding {
    let mut numbers = range
        .split_whitespace()
        .filter_map(|number| number.parse::<u16>().ok());
    let (Some(low), Some(high)) = (numbers.next(), numbers.next()) else {
        return Finding::bad(
            "ephemeral ports",
            Level::Warning,
            "the kernel's range is unknown",
            "",
        );
    };
    let found = format!("{low}-{high}; service ports {first}-{last}");
    if low > last || high < first {
        return Finding::good("ephemeral ports", found);
    }
    let given: Vec<&str> = reserved
        .trim()
        .split(',')
        .filter(|it| !it.is_empty())
        .collect();
    if is_reserved(&given, first.max(low), last.min(high)) {
        return Finding::good("ephemeral ports", format!("{found}, which are reserved"));
    }
    // The setting is one list: what others have reserved stays in it. The file is read last, also where
    // /etc/sysctl.conf is among them as 99-sysctl.conf.
    let own = format!("{first}-{last}");
    let all = [given, vec![&own]].concat().join(",");
    Finding::bad(
        "ephemeral ports",
        Level::Warning,
        found,
        format!(
            "outgoing connections may take service ports away; run: \
             echo net.ipv4.ip_local_reserved_ports = {all} > /etc/sysctl.d/99-zz-bai-agent.conf && \
             sysctl -p /etc/sysctl.d/99-zz-bai-agent.conf"
        ),
    )
}

/// Whether a list of ports and ranges has every port from `first` to `last`.
fn is_reserved(list: &[&str], first: u16, last: u16) -> bool {
    let mut ranges: Vec<(u16, u16)> = list
        .iter()
        .filter_map(|range| {
            let (low, high) = range.split_once('-').unwrap_or((range, range));
            Some((low.trim().parse().ok()?, high.trim().parse().ok()?))
        })
        .collect();
    ranges.sort_unstable();
    let mut next = u32::from(first);
    for (low, high) in ranges {
        if u32::from(low) <= next {
            next = next.max(u32::from(high) + 1);
        }
    }
    next > u32::from(last)
}

/// Listening ports of the pool in the text of `/proc/net/tcp` and `tcp6`.
fn listening(table: &str, first: u16, last: u16) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let mut ports: Vec<u16> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next()?;
            let state = fields.nth(1)?;
            let port = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
            (state == LISTEN && (first..=last).contains(&port)).then_some(port)
        })
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn taken_ports(table: &str, first: u16, last: u16, dataplane: bool) -> Finding {
    let ports = listening(table, first, last);
    match (ports.len(), dataplane) {
        (0, _) => Finding::good("service ports", format!("none of {first}-{last} is in use")),
        (count, true) => Finding::good(
            "service ports",
            format!(
                "{count} of {first}-{last} listen, the dataplane is running (bai-agent ports shows them)"
            ),
        ),
        (count, false) => Finding::bad(
            "service ports",
            Level::Warning,
            format!(
                "{count} of {first}-{last} are taken by other programs, the first is {}",
                ports[0]
            ),
            "the pool skips them; `ss -ltnp` names their owners",
        ),
    }
}

fn dataplane_alive(config: &Config) -> bool {
    shared::run_dir::RunDir::choose(Some(&config.node.run_dir), &config.agent.id)
        .is_ok_and(|place| matches!(shared::lock::writer_of(place.dataplane()), Ok(Some(_))))
}

fn runner(config: &Config) -> Finding {
    match crate::runner::RunnerFiles::open(&config.node.runner_dir, std::env::consts::ARCH) {
        Ok(found) => Finding::good(
            "runner",
            format!(
                "{} in {}",
                found.version(),
                config.node.runner_dir.display()
            ),
        ),
        // Its text names the command that helps.
        Err(error) => Finding::bad("runner", Level::Failure, "not usable", chain(&error)),
    }
}

fn kernel_features(btf: bool) -> Finding {
    match btf {
        true => Finding::good("kernel types", "BTF is present"),
        false => Finding::bad(
            "kernel types",
            Level::Warning,
            "no BTF",
            "statistics and processes are read from files, which costs more; the kernel path works without. Kernels with CONFIG_DEBUG_INFO_BTF have it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_older_than_20_10_are_refused() {
        for (version, level) in [
            ("20.10.24+dfsg1", Level::Good),
            ("28.2.2", Level::Good),
            ("19.03.1", Level::Failure),
            ("junk", Level::Failure),
        ] {
            assert_eq!(engine_version(version).level, level, "{version}");
        }
    }

    #[test]
    fn the_control_group_layout_is_told_from_the_mounts() {
        let v1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\ncgroup /sys/fs/cgroup/cpuacct cgroup rw,cpu,cpuacct 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let all = |_: &Path| "cpuset cpu io memory hugetlb pids\n".to_owned();
        let look = |mounts: &str| control_groups(mounts, false, all);
        let v1 = v1.to_owned() + "cgroup /a cgroup rw,pids 0 0\ncgroup /b cgroup rw,blkio 0 0\n";
        for (mounts, found) in [
            (v1.clone(), "version 1"),
            (v2.to_owned(), "version 2"),
            (v1.clone() + v2, "version 1 with a unified tree (hybrid)"),
        ] {
            let finding = look(&mounts);
            assert_eq!(
                (finding.found.as_str(), finding.level),
                (found, Level::Good)
            );
        }
        assert_eq!(look("").level, Level::Failure);
        // In a container, and on a kernel that was told to leave something out.
        let inside = control_groups(v2, true, all);
        assert_eq!(inside.level, Level::Failure);
        assert!(inside.remedy.contains("--cgroupns=host"), "{inside:?}");
        let lacking = control_groups(v2, false, |root| {
            assert_eq!(root, Path::new("/sys/fs/cgroup"));
            "cpuset cpu io pids\n".to_owned()
        });
        assert_eq!(lacking.found, "version 2 without memory");
        assert_eq!(lacking.level, Level::Warning);
        let few = control_groups(
            v1.split_inclusive('\n')
                .take(3)
                .collect::<String>()
                .as_str(),
            false,
            all,
        );
        assert_eq!(few.found, "version 1 without io");
    }

    #[test]
    fn an_image_store_of_containerds_must_be_where_it_can_be_read() {
        let engine = tempfile::tempdir().unwrap();
        let look = |status: serde_json::Value, is_local| {
            let info = json!({ "DriverStatus": status, "DockerRootDir": engine.path() });
            image_store(&serde_json::from_value(info).unwrap(), is_local)
        };
        let containerd = json!([["driver-type", "io.containerd.snapshotter.v1"]]);
        assert!(look(json!([["Backing Filesystem", "extfs"]]), true).is_none());
        let remote = look(containerd.clone(), false).unwrap();
        assert_eq!(remote.level, Level::Warning);
        let root = "containerd/daemon";
        let part = engine
            .path()
            .join(root)
            .join("io.containerd.metadata.v1.bolt");
        std::fs::create_dir_all(part).unwrap();
        let found = look(containerd, true).unwrap();
        assert!(
            found.level == Level::Good && found.found.contains(root),
            "{found:?}"
        );
    }

    #[test]
    fn only_listening_ports_of_the_pool_count() {
        let table = "  sl  local_address rem_address   st\n   0: 00000000:7530 00000000:0000 0A 0\n   1: 00000000:7531 0100007F:1234 01 0\n   2: 0100007F:0050 00000000:0000 0A 0\n";
        assert_eq!(listening(table, 30000, 31000), [30000]);
        assert_eq!(
            taken_ports(table, 30000, 31000, false).level,
            Level::Warning
        );
        assert_eq!(taken_ports(table, 30000, 31000, true).level, Level::Good);
    }

    #[test]
    fn an_ephemeral_range_over_the_pool_is_a_warning() {
        let finding = |range, reserved| ephemeral_ports(range, reserved, 30000, 31000);
        assert_eq!(finding("32768\t60999\n", "\n").level, Level::Good);
        assert_eq!(finding("10000\t60999\n", "\n").level, Level::Warning);
        assert_eq!(finding("", "\n").level, Level::Warning);
    }

    #[test]
    fn ports_of_the_pool_that_are_reserved_are_not_taken_and_others_stay_reserved() {
        for (range, reserved, wanted) in [
            ("10000\t60999\n", "", Some("30000-31000")),
            ("10000\t60999\n", "\n", Some("30000-31000")),
            ("10000\t60999\n", "30000-31000\n", None),
            ("10000\t60999\n", "20000-40000\n", None),
            ("10000\t60999\n", "8080,30000-30500,30501-31000\n", None),
            ("10000\t60999\n", "8080\n", Some("8080,30000-31000")),
            (
                "10000\t60999\n",
                "30000-30499,30501-31000\n",
                Some("30000-30499,30501-31000,30000-31000"),
            ),
            (
                "10000\t60999\n",
                "30001-31000\n",
                Some("30001-31000,30000-31000"),
            ),
            (
                "10000\t60999\n",
                "30000-30999\n",
                Some("30000-30999,30000-31000"),
            ),
            // Only where the two meet.
            ("30500\t60999\n", "30500-31000\n", None),
            ("10000\t30200\n", "30000-30200\n", None),
        ] {
            let finding = ephemeral_ports(range, reserved, 30000, 31000);
            let level = wanted.map_or(Level::Good, |_| Level::Warning);
            assert_eq!(finding.level, level, "{range:?} {reserved:?}");
            let named = wanted.is_none_or(|list| {
                let setting = format!("ip_local_reserved_ports = {list} > /etc/sysctl.d/99-zz-");
                finding.remedy.contains(&setting)
            });
            assert!(named, "{reserved:?}: {}", finding.remedy);
        }
        let whole = ephemeral_ports("1\t65535\n", "1-65535\n", 1, 65535);
        assert_eq!(whole.level, Level::Good);
    }
}
