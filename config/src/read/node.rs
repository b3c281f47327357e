//! `[node]`: what the original does not have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use super::{DefaultPaths, interval_within, within};
use crate::choice::{
    AllocationMode, CudaInjection, Forward, KernelAttach, Publish, RelayEngine, RelayFrom,
};
use crate::document::{Kind, Table, Value};
use crate::node::{
    Accelerators, DataplaneLimits, DeviceLimit, Engine, Node, RpcLimits, StorageProxy, Volumes,
    WatcherLimits,
};
use crate::problem::Origin;
use crate::section::{Key, Reader, Section, key};
use crate::sections::Agent;
use crate::setting::{AnyPath, Directory, ExistingFile, SecretFile, Setting};
use crate::units::{ByteSize, Fault, ProxyUrl, Subnet};

const STATE_DIR: Key = key("state-dir");

/// Where standalone mode keeps its state; other defaults depend on it, so it is read first.
pub(super) fn state_dir(reader: &mut Reader<'_>, root: &Table) -> PathBuf {
    let host = reader.host;
    let default = match (host.process_user().uid, host.home()) {
        (0, _) | (_, None) => PathBuf::from("/var/lib/bai-agent/standalone"),
        (_, Some(home)) => home.join(".local/state/bai-agent"),
    };
    let standalone = reader.standalone;
    let mut s = Section::open(reader, Some(root), "node");
    match s.optional::<Directory>(STATE_DIR) {
        Some(directory) => directory.0,
        None => {
            if standalone {
                s.reader.record(
                    "node",
                    STATE_DIR.name,
                    &Directory(default.clone()),
                    Origin::Standalone,
                );
            }
            default
        }
    }
}

/// Client networks that a row of the shared region holds.
const SERVICE_NETWORKS: usize = 8;

pub(super) fn read(
    reader: &mut Reader<'_>,
    root: &Table,
    defaults: &DefaultPaths,
    agent: &Agent,
) -> Node {
    let standalone = reader.standalone;
    // `open` reported a [node] that is no section when `state_dir` read it.
    let faults = reader.gathered.problems.len();
    let mut s = Section::open(reader, Some(root), "node");
    s.reader.gathered.problems.truncate(faults);
    let state_dir = if standalone {
        defaults.state_dir.clone()
    } else {
        let given = s.reader.origin("node", STATE_DIR.name).is_some();
        if !given {
            let same = Directory(agent.var_base_path.clone());
            s.reader.record(
                "node",
                STATE_DIR.name,
                &same,
                Origin::Detected("agent.var-base-path"),
            );
        }
        if given {
            defaults.state_dir.clone()
        } else {
            agent.var_base_path.clone()
        }
    };
    let run_dir = run_dir(&mut s);
    let runner_dir = s
        .or(
            key("runner-dir"),
            Directory(PathBuf::from("/var/lib/bai-agent/runner")),
        )
        .0;
    let publish = s.or(key("publish"), Publish::Auto);
    let forward = s.or(key("forward"), Forward::Auto);
    let kernel_attach = s.or(key("kernel-attach"), KernelAttach::Auto);
    let relay_engine = s.or(key("relay-engine"), RelayEngine::Auto);
    let relay_from = s.or(key("relay-from"), RelayFrom::Container);
    let honour_firewall = s.maybe(key("honour-firewall"));
    let allowed_clients = s.or(key("allowed-clients"), Vec::<Subnet>::new());
    let service_clients = s.or_checked(
        key("service-clients"),
        BTreeMap::<String, Vec<Subnet>>::new(),
        |services| match services.values().any(|it| it.len() > SERVICE_NETWORKS) {
            true => Err(Fault::new(
                format!("names more than {SERVICE_NETWORKS} networks for a service"),
                "join them to larger ones",
            )),
            false => Ok(()),
        },
    );
    let redis_ca_file: Option<ExistingFile> = s.maybe(key("redis-ca-file"));
    let cpu_quota = s.or(key("cpu-quota"), false);
    let memory_nodes = s.or(key("memory-nodes"), true);
    let metadata_redirect = s.or(key("metadata-redirect"), false);
    let max_containers = s.or_checked(key("max-containers"), 1024, within(1, 16_384));
    let dataplane_wait = s.or_checked(
        key("dataplane-wait"),
        Duration::from_secs(5),
        interval_within(10, 600),
    );
    let folder_wait = s.or_checked(
        key("folder-wait"),
        Duration::from_secs(30),
        interval_within(10, 600),
    );
    let device_limits = device_limits(&mut s);
    let engine = engine(&mut s);
    let dataplane = dataplane(&mut s);
    let rpc = rpc(&mut s, max_containers);
    let volumes = volumes(&mut s);
    let accelerators = accelerators(&mut s);
    let watcher = watcher(&mut s);
    let storage_proxy = storage_proxy(&mut s);
    // Read by `state_dir`; named here so that it counts as known.
    let _ = s.raw(STATE_DIR);
    s.finish(
        &[],
        &[
            "engine",
            "dataplane",
            "rpc",
            "volumes",
            "accelerators",
            "storage-proxy",
            "watcher",
        ],
    );
    Node {
        run_dir,
        state_dir,
        runner_dir,
        publish,
        forward,
        kernel_attach,
        relay_engine,
        relay_from,
        honour_firewall,
        allowed_clients,
        service_clients,
        redis_ca_file: redis_ca_file.map(|file| file.0),
        cpu_quota,
        memory_nodes,
        metadata_redirect,
        max_containers,
        dataplane_wait,
        folder_wait,
        device_limits,
        engine,
        dataplane,
        rpc,
        volumes,
        accelerators,
        storage_proxy,
        watcher,
    }
}

/// The base of the shared regions must be memory: a region on a disk would be written back.
fn run_dir(s: &mut Section<'_, '_>) -> PathBuf {
    const RUN_DIR: Key = key("run-dir");
    let host = s.reader.host;
    let looks = s.reader.only_looks;
    let faults = s.reader.gathered.problems.len();
    let given = s.checked(RUN_DIR, |directory: &Directory| {
        if looks || host.is_writable_tmpfs(&directory.0) {
            return Ok(());
        }
        if host.is_read_only(&directory.0) {
            let place = directory.0.display();
            return Err(Fault::new(
                "is read-only for this process",
                format!(
                    "in a unit with ProtectSystem=, as bai-dataplane's, make the directory and add ReadWritePaths={place} \
                     (systemctl edit bai-dataplane); else mount it for writing"
                ),
            ));
        }
        Err(Fault::new(
            "is not on a tmpfs this user may write to",
            "name a directory on a tmpfs such as /run or /dev/shm, or leave the key out",
        ))
    });
    if let Some(directory) = given {
        return directory.0;
    }
    let places = ["/run/bai-agent", "/dev/shm/bai-agent"].map(PathBuf::from);
    let writable = |place: &&PathBuf| host.is_writable_tmpfs(place);
    // Who looks may be who runs the programs, and else looks at those of the units.
    let own = places
        .iter()
        .find(|it| writable(it) && (!looks || host.is_on_tmpfs(it) && host.is_own(it)));
    let there = places.iter().find(|place| looks && host.is_on_tmpfs(place));
    let place = own.or(there).or_else(|| places.iter().find(writable));
    // Who only looks needs none.
    let place = place.or(looks.then_some(&places[0])).cloned();
    if s.reader.gathered.problems.len() == faults {
        match &place {
            Some(place) => s.reader.record(
                "node",
                RUN_DIR.name,
                &Directory(place.clone()),
                Origin::Default,
            ),
            None => s.reader.fault(
                "node",
                RUN_DIR.name,
                "is not set, and neither /run nor /dev/shm is a tmpfs this user may write to",
                "name a directory on a tmpfs, or mount one at /run",
            ),
        }
    }
    let [first, _] = places;
    place.unwrap_or(first)
}

fn device_limits(s: &mut Section<'_, '_>) -> Vec<DeviceLimit> {
    const LIMITS: Key = key("device-limits");
    let Some((value, origin)) = s.raw(LIMITS) else {
        s.reader
            .record("node", LIMITS.name, &Shown(&[]), Origin::Default);
        return Vec::new();
    };
    let host = s.reader.host;
    let read = match &value.kind {
        Kind::Array(items) => items
            .iter()
            .map(|item| device_limit(item, host).map_err(|fault| (item.clone(), fault)))
            .collect(),
        _ => Err((
            value.clone(),
            Fault::new("is not a list of tables", DEVICE_REMEDY),
        )),
    };
    match read {
        Ok(limits) => {
            let limits: Vec<DeviceLimit> = limits;
            s.reader
                .record("node", LIMITS.name, &Shown(&limits), origin);
            limits
        }
        Err((item, fault)) => {
            s.refuse(LIMITS, &item, Origin::File { line: item.line }, fault);
            Vec::new()
        }
    }
}

const DEVICE_REMEDY: &str = "write [[node.device-limits]] with device = \"/dev/sda\" and read-bps, write-bps, read-iops or write-iops";

fn device_limit(value: &Value, host: &dyn crate::host::Host) -> Result<DeviceLimit, Fault> {
    let Kind::Table(table) = &value.kind else {
        return Err(Fault::new("is not a table", DEVICE_REMEDY));
    };
    let mut device = None;
    let mut limit = DeviceLimit {
        device: PathBuf::new(),
        read_bps: None,
        write_bps: None,
        read_iops: None,
        write_iops: None,
    };
    for entry in &table.entries {
        let within =
            |fault: Fault| Fault::new(format!("{}: {}", entry.key, fault.why), fault.remedy);
        match entry.key.replace('_', "-").as_str() {
            "device" => device = Some(AnyPath::read(&entry.value, host).map_err(within)?.0),
            "read-bps" => {
                limit.read_bps = Some(ByteSize::read(&entry.value, host).map_err(within)?)
            }
            "write-bps" => {
                limit.write_bps = Some(ByteSize::read(&entry.value, host).map_err(within)?)
            }
            "read-iops" => limit.read_iops = Some(u64::read(&entry.value, host).map_err(within)?),
            "write-iops" => limit.write_iops = Some(u64::read(&entry.value, host).map_err(within)?),
            _ => {
                return Err(Fault::new(
                    format!("has no key {:?}", entry.key),
                    DEVICE_REMEDY,
                ));
            }
        }
    }
    limit.device = device.ok_or_else(|| Fault::new("the device is missing", DEVICE_REMEDY))?;
    if !limit.device.starts_with("/dev") {
        return Err(Fault::new("the device is not below /dev", DEVICE_REMEDY));
    }
    let zero = [limit.read_bps, limit.write_bps].contains(&Some(ByteSize(0)))
        || [limit.read_iops, limit.write_iops].contains(&Some(0));
    if zero {
        return Err(Fault::new(
            "a limit of zero means none to the engine",
            "leave the key out for no limit",
        ));
    }
    Ok(limit)
}

struct Shown<'a>(&'a [DeviceLimit]);

impl Setting for Shown<'_> {
    fn read(_: &Value, _: &dyn crate::host::Host) -> Result<Self, Fault> {
        Ok(Self(&[]))
    }

    fn text(&self) -> String {
        let shown = self.0.iter().map(|limit| {
            let mut text = limit.device.display().to_string();
            for (name, value) in [
                ("read-bps", limit.read_bps.map(|v| v.to_string())),
                ("write-bps", limit.write_bps.map(|v| v.to_string())),
                ("read-iops", limit.read_iops.map(|v| v.to_string())),
                ("write-iops", limit.write_iops.map(|v| v.to_string())),
            ] {
                if let Some(value) = value {
                    text.push_str(&format!(" {name}={value}"));
                }
            }
            text
        });
        shown.collect::<Vec<_>>().join("; ")
    }

    fn json(&self) -> serde_json::Value {
        let shown = self.0.iter().map(|limit| {
            serde_json::json!({
                "device": limit.device.display().to_string(),
                "read-bps": limit.read_bps.map(|v| v.0),
                "write-bps": limit.write_bps.map(|v| v.0),
                "read-iops": limit.read_iops,
                "write-iops": limit.write_iops,
            })
        });
        shown.collect()
    }
}

fn engine(node: &mut Section<'_, '_>) -> Engine {
    let table = node.table();
    let mut s = Section::open(&mut *node.reader, table, "node.engine");
    let host = s.checked(key("host").env("DOCKER_HOST"), |text: &String| {
        let known = ["unix://", "tcp://", "http://"];
        if text.is_empty() || known.iter().any(|scheme| text.starts_with(scheme)) {
            return Ok(());
        }
        Err(Fault::new(
            "is not an address of a Docker engine",
            "write unix:///path or tcp://host:port",
        ))
    });
    s.show_absent("host");
    let seconds = Duration::from_secs;
    let timeout = || interval_within(100, 86_400);
    let engine = Engine {
        host: host.filter(|text| !text.is_empty()),
        connect_timeout: s.or_checked(key("connect-timeout"), seconds(5), timeout()),
        request_timeout: s.or_checked(key("request-timeout"), seconds(30), timeout()),
        create_timeout: s.or_checked(key("create-timeout"), seconds(60), timeout()),
        start_timeout: s.or_checked(key("start-timeout"), seconds(60), timeout()),
        stop_grace: s.or_checked(key("stop-grace"), seconds(10), interval_within(0, 3600)),
        remove_timeout: s.or_checked(key("remove-timeout"), seconds(120), timeout()),
    };
    s.finish(&[], &[]);
    engine
}

fn dataplane(node: &mut Section<'_, '_>) -> DataplaneLimits {
    let table = node.table();
    let seconds = Duration::from_secs;
    let mut s = Section::open(&mut *node.reader, table, "node.dataplane");
    let limits = DataplaneLimits {
        max_sessions_per_port: s.or_checked(
            key("max-sessions-per-port"),
            4096,
            within(1, 1_000_000),
        ),
        max_sessions: s.or_checked(key("max-sessions"), 32_768, within(1, 10_000_000)),
        max_new_sessions_per_second: s.or_checked(
            key("max-new-sessions-per-second"),
            0,
            within(0, 1_000_000),
        ),
        idle_timeout: s.or_checked(
            key("idle-timeout"),
            seconds(0),
            interval_within(0, 30 * 86_400),
        ),
        connect_timeout: s.or_checked(
            key("connect-timeout"),
            seconds(10),
            interval_within(10, 600),
        ),
        drain: s.or_checked(key("drain"), seconds(0), interval_within(0, 86_400)),
        stats_interval: s.or_checked(key("stats-interval"), seconds(1), interval_within(100, 60)),
        records_interval: s.or_checked(
            key("records-interval"),
            seconds(5),
            interval_within(100, 60),
        ),
    };
    s.finish(&[], &[]);
    if limits.max_sessions_per_port > limits.max_sessions {
        let why = "is more than node.dataplane.max-sessions allows for all ports";
        node.reader.fault(
            "node.dataplane",
            "max-sessions-per-port",
            why,
            "lower it, or raise max-sessions",
        );
    }
    limits
}

/// Most calls wait for a kernel to start or to end: there may be a few for each.
const CALLS_PER_CONTAINER: u32 = 4;
/// What a node of few containers lets in all the same: pulls, uploads and logs are calls, too.
const FEWEST_CALLS: u32 = 512;

fn rpc(node: &mut Section<'_, '_>, max_containers: u32) -> RpcLimits {
    let table = node.table();
    let mut s = Section::open(&mut *node.reader, table, "node.rpc");
    let limits = RpcLimits {
        max_message: s.or_checked(key("max-message"), ByteSize(256 << 20), |size| {
            if (64 << 10..=2 << 30).contains(&size.0) {
                return Ok(());
            }
            Err(Fault::new("the size is out of range", "write 64k to 2g"))
        }),
        max_in_flight: s.or_checked(
            key("max-in-flight"),
            (CALLS_PER_CONTAINER * max_containers).max(FEWEST_CALLS),
            within(1, 100_000),
        ),
    };
    s.finish(&[], &[]);
    limits
}

fn volumes(node: &mut Section<'_, '_>) -> Volumes {
    let table = node.table();
    let mut s = Section::open(&mut *node.reader, table, "node.volumes");
    let rules = |rules: &BTreeSet<String>| {
        let whole = |rule: &String| {
            rule.split_once(' ')
                .is_some_and(|(kind, source)| !kind.is_empty() && !source.trim().is_empty())
        };
        match rules.iter().find(|rule| !whole(rule)) {
            None => Ok(()),
            Some(rule) => Err(Fault::new(
                format!("{rule:?} is not a type and a source"),
                "write \"nfs 10.0.0.1:/export/*\"",
            )),
        }
    };
    let tables = |tables: &BTreeSet<String>| match tables.iter().find(|path| !path.starts_with('/'))
    {
        None => Ok(()),
        Some(path) => Err(Fault::new(
            format!("{path:?} is not an absolute path"),
            "write \"/etc/fstab\"",
        )),
    };
    let volumes = Volumes {
        allow: s.or_checked(key("allow"), BTreeSet::new(), rules),
        fstab: s.or_checked(key("fstab"), ["/etc/fstab".to_owned()].into(), tables),
        timeout: s.or_checked(
            key("timeout"),
            Duration::from_secs(60),
            interval_within(100, 86_400),
        ),
    };
    s.finish(&[], &[]);
    volumes
}

fn watcher(node: &mut Section<'_, '_>) -> WatcherLimits {
    let table = node.table();
    let mut s = Section::open(&mut *node.reader, table, "node.watcher");
    let limits = WatcherLimits {
        token_file: s.maybe::<SecretFile>(key("token-file")).map(|it| it.0),
        insecure_token: s.or(key("insecure-token"), false),
        shutdown: s.or(key("shutdown"), false),
        // Managers wait for 20 s.
        timeout: s.or_checked(
            key("timeout"),
            Duration::from_secs(15),
            interval_within(100, 600),
        ),
    };
    s.finish(&[], &[]);
    limits
}

/// The url switches it on: without one nobody is asked.
fn storage_proxy(node: &mut Section<'_, '_>) -> Option<StorageProxy> {
    const NAME: &str = "node.storage-proxy";
    let table = node.table();
    let mut s = Section::open(&mut *node.reader, table, NAME);
    let faults = s.reader.gathered.problems.len();
    let url = s.maybe::<ProxyUrl>(key("url"));
    let secret_file = s.maybe::<SecretFile>(key("secret-file")).map(|it| it.0);
    let ca_file = s.maybe::<ExistingFile>(key("ca-file")).map(|path| path.0);
    let timeout = s.or_checked(
        key("timeout"),
        // The proxy itself gives up counting a folder's files after 30 s.
        Duration::from_secs(40),
        interval_within(100, 600),
    );
    let interval = s.or_checked(
        key("interval"),
        Duration::from_secs(600),
        interval_within(1000, 86_400),
    );
    if s.reader.gathered.problems.len() == faults {
        match (&url, &secret_file) {
            (Some(_), None) => s.missing(
                key("secret-file"),
                "name a file (mode 0600) with the secret of [api.manager] in the storage proxy's configuration",
            ),
            (None, Some(_)) => s.missing(
                key("url"),
                "write where the storage proxy's manager-facing API is, such as \"https://10.0.0.5:6022\", or remove secret-file",
            ),
            _ => {}
        }
    }
    if ca_file.is_some() && url.as_ref().is_some_and(|url| !url.tls) {
        let why = "is given, and the url begins with http://";
        s.reader.fault(
            NAME,
            "ca-file",
            why,
            "write https:// in url, or remove ca-file",
        );
    }
    s.finish(&[], &[]);
    Some(StorageProxy {
        url: url?,
        secret_file: secret_file?,
        ca_file,
        timeout,
        interval,
    })
}

fn accelerators(node: &mut Section<'_, '_>) -> Accelerators {
    let table = node.table();
    let mut s = Section::open(&mut *node.reader, table, "node.accelerators");
    let slots = |plugins: &BTreeMap<String, String>| {
        let fits = |slot: &str| {
            slot.split_once('.').is_some_and(|(device, rest)| {
                !device.is_empty() && !rest.is_empty() && !matches!(device, "cpu" | "mem")
            })
        };
        if let Some((name, slot)) = plugins.iter().find(|(_, slot)| !fits(slot)) {
            return Err(Fault::new(
                format!("{slot:?} of {name:?} is not the name of a slot"),
                "write { \"habana.ai/gaudi\" = \"gaudi2.device\" }",
            ));
        }
        let mut seen = BTreeSet::new();
        match plugins.values().find(|slot| !seen.insert(*slot)) {
            None => Ok(()),
            Some(slot) => Err(Fault::new(
                format!("two resources are given out as {slot:?}"),
                "give each a slot of its own",
            )),
        }
    };
    let accelerators = Accelerators {
        device_mask: s.or(key("device-mask"), Vec::<String>::new()),
        cuda_injection: s.or(key("cuda-injection"), CudaInjection::Auto),
        allocation_mode: s.or(key("allocation-mode"), AllocationMode::Discrete),
        unit_mem: s.or_checked(key("unit-mem"), ByteSize(2 << 30), |size| {
            const REMEDY: &str = "write 512m to 1t";
            match size.0 {
                0..0x2000_0000 => Err(Fault::new("the unit is too small", REMEDY)),
                0x100_0000_0001.. => Err(Fault::new("no device has as much", REMEDY)),
                _ => Ok(()),
            }
        }),
        unit_proc: s.or_checked(key("unit-proc"), 8, within(2, 1024)),
        quantum_percent: s.or_checked(key("quantum-percent"), 10, within(1, 100)),
        device_root: s.or(key("device-root"), Directory(PathBuf::from("/"))).0,
        mock: s.maybe::<AnyPath>(key("mock")).map(|path| path.0),
        tpu_metrics_port: s.or(key("tpu-metrics-port"), 8431),
        plugin_dir: s
            .or(
                key("plugin-dir"),
                Directory(PathBuf::from("/var/lib/kubelet/device-plugins")),
            )
            .0,
        device_plugins: s.or_checked(key("device-plugins"), BTreeMap::new(), slots),
    };
    s.finish(&[], &[]);
    accelerators
}
