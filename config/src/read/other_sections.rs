//! The smaller sections.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use super::{interval_within, on_every_address, within};
use crate::choice::{AffinityPolicy, DiscoveryType, LogDriver, LogFormat, LogLevel};
use crate::document::Table;
use crate::problem::NoteKind;
use crate::section::{Key, Reader, Section, key};
use crate::sections::{
    Api, ContainerLogs, Coredump, Debug, Etcd, EtcdTls, KernelLifecycles, LogFile, Logging,
    Resource, Watcher,
};
use crate::setting::{Addresses, Directory, ExistingFile, LogSize, absolute};
use crate::units::{ByteSize, Fault, HostPort, Secret};

pub(super) fn resource(reader: &mut Reader<'_>, root: &Table) -> Resource {
    let order = ["cuda", "rocm", "tpu", "cpu", "mem"]
        .map(str::to_owned)
        .to_vec();
    let mut s = Section::open(reader, Some(root), "resource");
    let resource = Resource {
        reserved_cpu: s.or(key("reserved-cpu"), 1),
        reserved_mem: s.or(key("reserved-mem"), ByteSize(1 << 30)),
        memory_align_size: s.or_checked(key("memory-align-size"), ByteSize(16 << 20), |size| {
            if size.0 == 0 {
                return Err(Fault::new(
                    "nothing can be aligned to zero",
                    "write a size such as \"16m\", or 1 for no alignment",
                ));
            }
            Ok(())
        }),
        allocation_order: s.or_checked(key("allocation-order"), order, |order| {
            let mut seen: Vec<&String> = order.iter().collect();
            seen.sort();
            seen.dedup();
            if seen.len() != order.len() {
                return Err(Fault::new(
                    "a device name stands twice",
                    "name each device once",
                ));
            }
            Ok(())
        }),
        affinity_policy: s.or(key("affinity-policy"), AffinityPolicy::Interleaved),
    };
    s.finish(
        &[(
            "reserved-disk",
            "disk space is not a slot; the original ignores it too",
        )],
        &[],
    );
    resource
}

pub(super) fn etcd(reader: &mut Reader<'_>, root: &Table) -> Option<Etcd> {
    let standalone = reader.standalone;
    let mut s = Section::open(reader, Some(root), "etcd");
    if standalone {
        if s.is_present() {
            let line = root
                .entries
                .iter()
                .find(|e| e.key == "etcd")
                .map(|e| e.line);
            s.reader.note(
                NoteKind::NotUsed,
                line,
                "etcd",
                "is not used: standalone mode has no etcd",
            );
        }
        return None;
    }
    let namespace = key("namespace").env("BACKEND_NAMESPACE");
    let addr = key("addr").env("BACKEND_ETCD_ADDR");
    let namespace = s.required(
        namespace,
        String::new(),
        "write namespace = \"local\" in [etcd], or use --standalone",
    );
    let addr = s.required(
        addr,
        Addresses(Vec::new()),
        "write addr = { host = \"127.0.0.1\", port = 2379 } in [etcd], or use --standalone",
    );
    for endpoint in addr.0.iter().filter(|endpoint| endpoint.host.is_empty()) {
        let why = format!("the host of {endpoint} is blank");
        s.reader
            .fault("etcd", "addr", why, "write the address of the etcd server");
    }
    let user: Option<String> = s.maybe(key("user").env("BACKEND_ETCD_USER"));
    let password: Option<Secret> = s.maybe(key("password").env("BACKEND_ETCD_PASSWORD").secret());
    let credentials = match (user, password) {
        (Some(user), Some(password)) if !user.is_empty() && !password.is_empty() => {
            Some((user, password))
        }
        _ => None,
    };
    let tls = etcd_tls(&mut s);
    s.finish(&[], &[]);
    Some(Etcd {
        namespace,
        addr: addr.0,
        credentials,
        tls,
    })
}

/// Not in the original, which speaks plain HTTP only and ignores these keys.
fn etcd_tls(s: &mut Section<'_, '_>) -> Option<EtcdTls> {
    let enabled = s.or(key("tls"), false);
    let ca_file: Option<ExistingFile> = s.maybe(key("tls-ca-file"));
    let cert: Option<ExistingFile> = s.maybe(key("tls-cert-file"));
    let key_file: Option<ExistingFile> = s.maybe(key("tls-key-file"));
    let server_name: Option<String> = s.maybe(key("tls-server-name"));
    let given = ca_file.is_some() || cert.is_some() || key_file.is_some() || server_name.is_some();
    if given && !enabled {
        s.reader.fault(
            "etcd",
            "tls",
            "certificates are given and encryption is off",
            "write tls = true in [etcd], or remove the tls-* keys",
        );
    }
    let identity = match (cert, key_file) {
        (Some(cert), Some(key_file)) => Some((cert.0, key_file.0)),
        (None, None) => None,
        (cert, _) => {
            let missing = match cert {
                Some(_) => "tls-key-file",
                None => "tls-cert-file",
            };
            s.reader.fault(
                "etcd",
                missing,
                "the certificate and its key belong together",
                "name both files, or neither",
            );
            None
        }
    };
    enabled.then(|| EtcdTls {
        ca_file: ca_file.map(|file| file.0),
        identity,
        server_name,
    })
}

const LOGS: &str = "raise the log level of the part instead";
const PYTHON: &str = "it belongs to the Python event loop";

pub(super) fn debug(reader: &mut Reader<'_>, root: &Table) -> Debug {
    let mut s = Section::open(reader, Some(root), "debug");
    let heartbeat_interval = s.or_checked(
        key("heartbeat-interval"),
        Duration::from_secs(20),
        interval_within(100, 3600),
    );
    let skip_container_deletion = s.or(key("skip-container-deletion"), false);
    let kernel_runner = s.or(key("kernel-runner"), false);
    let coredump = coredump(&mut s);
    s.finish(
        &[
            (
                "enabled",
                "the original overwrites it by its --debug; say --debug here too, or set logging.level",
            ),
            ("log-stats", LOGS),
            ("log-kernel-config", LOGS),
            ("log-alloc-map", LOGS),
            ("log-events", LOGS),
            ("log-heartbeats", LOGS),
            ("log-docker-events", LOGS),
            ("asyncio", PYTHON),
            ("enhanced-aiomonitor-task-info", PYTHON),
        ],
        &["coredump"],
    );
    Debug {
        heartbeat_interval,
        skip_container_deletion,
        kernel_runner,
        coredump,
    }
}

fn coredump(debug: &mut Section<'_, '_>) -> Option<Coredump> {
    const SECTION: &str = "debug.coredump";
    let table = debug.table();
    let host = debug.reader.host;
    let mut s = Section::open(&mut *debug.reader, table, SECTION);
    let enabled = s.or(key("enabled"), false);
    let default = absolute("./coredumps", host).unwrap_or_else(|_| PathBuf::from("/coredumps"));
    let path = s.or(key("path"), Directory(default)).0;
    let backup_count = s.or_checked(key("backup-count"), 10, within(1, 100_000));
    let size_limit = s.or(key("size-limit"), ByteSize(64 << 20));
    s.finish(&[], &[]);
    if !enabled {
        return None;
    }
    let pattern = host.core_pattern();
    let core_path = PathBuf::from(&pattern).parent().map(PathBuf::from);
    match core_path {
        Some(core_path) if pattern.starts_with('/') => Some(Coredump {
            path,
            core_path,
            backup_count,
            size_limit,
        }),
        _ => {
            let why = format!(
                "core dumps need an absolute path in /proc/sys/kernel/core_pattern, which holds {pattern:?}"
            );
            debug.reader.fault(
                SECTION,
                "enabled",
                why,
                "write a path such as /tmp/core.%p there, or enabled = false here",
            );
            None
        }
    }
}

const LOG_SERVER: &str = "logs go to standard error only; let the journal forward them";

pub(super) fn logging(reader: &mut Reader<'_>, root: &Table) -> Logging {
    let levels = [
        ("", LogLevel::Warning),
        ("ai.backend", LogLevel::Info),
        ("tests", LogLevel::Debug),
    ];
    let mut s = Section::open(reader, Some(root), "logging");
    let level = s.or(key("level"), LogLevel::Info);
    let drivers = s.or(key("drivers"), vec![LogDriver::Console]);
    let pkg_ns: BTreeMap<String, LogLevel> = s.or(
        key("pkg-ns"),
        levels.map(|(name, level)| (name.to_owned(), level)).into(),
    );
    let table = s.table();
    let has = |name: &str| table.is_some_and(|t| t.entries.iter().any(|e| e.key == name));
    for driver in [LogDriver::File, LogDriver::Logstash, LogDriver::Graylog] {
        if drivers.contains(&driver) && !has(driver.word()) {
            let why = format!("the driver {:?} has no section", driver.word());
            s.reader.fault(
                "logging",
                "drivers",
                why,
                format!("add [logging.{driver}], or take the driver out of the list"),
            );
        }
    }
    let mut console = Section::open(&mut *s.reader, table, "logging.console");
    let console_colored = console.maybe(key("colored"));
    let console_format = console.or(key("format"), LogFormat::Verbose);
    console.finish(&[], &[]);
    let file = log_file(&mut s, drivers.contains(&LogDriver::File) && has("file"));
    s.finish(
        &[
            ("logstash", LOG_SERVER),
            ("graylog", LOG_SERVER),
            ("version", "it belongs to Python's logging"),
            ("disable-existing-loggers", "it belongs to Python's logging"),
            ("handlers", "it belongs to Python's logging"),
            ("loggers", "it belongs to Python's logging"),
        ],
        &["console", "file"],
    );
    Logging {
        level,
        drivers,
        pkg_ns,
        console_colored,
        console_format,
        file,
    }
}

fn log_file(logging: &mut Section<'_, '_>, enabled: bool) -> Option<LogFile> {
    let table = logging.table();
    let mut s = Section::open(&mut *logging.reader, table, "logging.file");
    if !enabled {
        if s.is_present() {
            s.reader.note(
                NoteKind::NotUsed,
                None,
                "logging.file",
                "is not used: \"file\" is not in logging.drivers",
            );
        }
        return None;
    }
    let path = s.required(
        key("path"),
        Directory(PathBuf::new()),
        "name the directory of the log files",
    );
    const NAME: Key = key("filename");
    let filename = s.required(
        NAME,
        String::new(),
        "write a file name such as \"agent.log\"",
    );
    if filename.contains('/') || filename == "." || filename == ".." {
        s.reader.fault(
            "logging.file",
            NAME.name,
            "is not a plain file name",
            "write a name without /",
        );
    }
    let settings = LogFile {
        path: path.0,
        filename,
        backup_count: s.or_checked(key("backup-count"), 5, within(0, 100_000)),
        rotation_size: s.or(key("rotation-size"), LogSize(ByteSize(10_000_000))).0,
        format: s.or(key("format"), LogFormat::Verbose),
    };
    s.finish(&[], &[]);
    Some(settings)
}

pub(super) fn service_discovery(reader: &mut Reader<'_>, root: &Table) -> DiscoveryType {
    let mut s = Section::open(reader, Some(root), "service-discovery");
    let kind = s.or(key("type"), DiscoveryType::Redis);
    s.finish(&[], &[]);
    kind
}

/// A name that systemctl takes for a unit and for nothing else.
fn unit_name(name: &str) -> Result<(), Fault> {
    let allowed = |it: char| it.is_ascii_alphanumeric() || ":_.\\@-".contains(it);
    let fits = !name.starts_with('-') && name.len() < 256 && name.contains('.');
    if fits && name.chars().all(allowed) {
        return Ok(());
    }
    Err(Fault::new(
        "is not the name of a unit of systemd",
        "write \"bai-agent.service\"",
    ))
}

/// The name that the original's examples give to the unit of the Python agent.
const PYTHON_UNIT: &str = "backendai-agent.service";

pub(super) fn watcher(reader: &mut Reader<'_>, root: &Table) -> Watcher {
    const ADDR: Key = key("service-addr");
    let mut s = Section::open(reader, Some(root), "watcher");
    let mut service_addr = s.or(ADDR, HostPort::new("0.0.0.0", 6009));
    for variable in ["BACKEND_WATCHER_SERVICE_IP", "BACKEND_WATCHER_SERVICE_PORT"] {
        let Some(text) = (s.reader.environment)(variable) else {
            continue;
        };
        let origin = crate::problem::Origin::Environment(variable);
        let applied = if variable.ends_with("PORT") {
            HostPort::parse_port(&text).map(|port| service_addr.port = port)
        } else {
            HostPort::parse_host(&text).map(|host| service_addr.host = host)
        };
        match applied {
            Ok(()) => s.reader.record("watcher", ADDR.name, &service_addr, origin),
            Err(fault) => s.refuse(ADDR, &crate::document::Value::text(0, text), origin, fault),
        }
    }
    if on_every_address(&mut service_addr.host) {
        s.amend(ADDR, &service_addr);
    }
    let watcher = Watcher {
        service_addr,
        target_service: s.or_checked(
            key("target-service"),
            "bai-agent.service".to_owned(),
            |name: &String| unit_name(name),
        ),
        soft_reset_available: s.or(key("soft-reset-available"), false),
    };
    const TLS: &str = "the watcher of the original can not serve TLS either";
    s.finish(
        &[
            ("ssl-enabled", TLS),
            ("ssl-cert", TLS),
            ("ssl-key", TLS),
            ("ssl-privkey", TLS),
        ],
        &[],
    );
    if watcher.target_service == PYTHON_UNIT {
        let line = match reader.origin("watcher", "target-service") {
            Some(crate::problem::Origin::File { line }) => Some(line),
            _ => None,
        };
        let text = "is the Python agent's unit, which removes this agent's kernels when it starts; write \"bai-agent.service\"";
        reader.note(NoteKind::Warning, line, "watcher.target-service", text);
    }
    watcher
}

pub(super) fn container_logs(reader: &mut Reader<'_>, root: &Table) -> ContainerLogs {
    let mut s = Section::open(reader, Some(root), "container-logs");
    let logs = ContainerLogs {
        max_length: s.or_checked(key("max-length"), ByteSize(10 << 20), |size| {
            if size.0 > 1 << 30 {
                return Err(Fault::new(
                    "a console as long as this does not fit into memory, where it goes on its way to the manager",
                    "write a size up to \"1g\"",
                ));
            }
            Ok(())
        }),
        chunk_size: s.or_checked(key("chunk-size"), ByteSize(64 << 10), |size| {
            if size.0 == 0 {
                return Err(Fault::new(
                    "a piece of nothing never ends",
                    "write a size such as \"64k\"",
                ));
            }
            Ok(())
        }),
    };
    s.finish(&[], &[]);
    logs
}

pub(super) fn api(reader: &mut Reader<'_>, root: &Table) -> Api {
    let mut s = Section::open(reader, Some(root), "api");
    // Zero means no limit: a deadline of nothing would fail every call.
    let limit = |interval: Duration| (!interval.is_zero()).then_some(interval);
    let api = Api {
        pull_timeout: limit(s.or(key("pull-timeout"), Duration::from_secs(7200))),
        commit_timeout: s.maybe(key("commit-timeout")).and_then(limit),
        push_timeout: s.maybe(key("push-timeout")).and_then(limit),
    };
    s.finish(&[], &[]);
    api
}

pub(super) fn kernel_lifecycles(reader: &mut Reader<'_>, root: &Table) -> KernelLifecycles {
    let mut s = Section::open(reader, Some(root), "kernel-lifecycles");
    let minute = Duration::from_secs(60);
    let settings = KernelLifecycles {
        init_polling_attempt: s.or_checked(key("init-polling-attempt"), 10, within(1, 10_000)),
        init_polling_timeout: s.or_checked(
            key("init-polling-timeout-sec"),
            minute,
            interval_within(1000, 86_400),
        ),
        init_timeout: s.or_checked(
            key("init-timeout-sec"),
            minute,
            interval_within(1000, 86_400),
        ),
    };
    s.finish(&[], &[]);
    settings
}
