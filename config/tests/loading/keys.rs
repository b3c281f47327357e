//! Every key by every one of its names, and every environment variable.

use config::{Errors, NoteKind, Origin};
use serde_json::{Value, json};

use crate::host::{Setup, with_line};

/// Section, names (the first is the canonical one), a value in TOML, the value as JSON.
type Row = (&'static str, &'static [&'static str], &'static str, Value);

fn addr(host: &str, port: u16) -> Value {
    json!({"host": host, "port": port})
}

fn cluster() -> Vec<Row> {
    vec![
        ("etcd", &["namespace"], "'prod'", json!("prod")),
        (
            "etcd",
            &["addr"],
            "'10.0.0.1:2380'",
            json!([addr("10.0.0.1", 2380)]),
        ),
        (
            "etcd",
            &["addr"],
            "[{host='a',port=1},{host='b',port='2'}]",
            json!([addr("a", 1), addr("b", 2)]),
        ),
        ("etcd", &["user"], "'me'", json!("me")),
        ("etcd", &["password"], "'pw'", json!("***")),
        ("etcd", &["tls"], "true", json!(true)),
        ("service-discovery", &["type"], "'etcd'", json!("etcd")),
    ]
}

fn agent() -> Vec<Row> {
    vec![
        ("agent", &["mode", "backend"], "'docker'", json!("docker")),
        (
            "agent",
            &["rpc-listen-addr"],
            "{host='10.0.0.5',port=6101}",
            addr("10.0.0.5", 6101),
        ),
        (
            "agent",
            &["rpc-listen-addr"],
            "['::1', '6101']",
            addr("::1", 6101),
        ),
        (
            "agent",
            &["rpc-listen-addr"],
            "'[0:0::1]:6101'",
            addr("::1", 6101),
        ),
        (
            "agent",
            &["advertised-rpc-addr"],
            "'10.0.0.6:6102'",
            addr("10.0.0.6", 6102),
        ),
        (
            "agent",
            &["service-addr", "internal-addr"],
            "'10.0.0.5:6103'",
            addr("10.0.0.5", 6103),
        ),
        (
            "agent",
            &["announce-addr", "announce-internal-addr"],
            "'h:6103'",
            addr("h", 6103),
        ),
        ("agent", &["id"], "'i-a.b_c-1'", json!("i-a.b_c-1")),
        ("agent", &["region"], "'eu'", json!("eu")),
        ("agent", &["abuse-report-path"], "'/tmp'", json!("/tmp")),
        (
            "agent",
            &["force-terminate-abusing-containers"],
            "true",
            json!(true),
        ),
        ("agent", &["scaling-group"], "'gpu'", json!("gpu")),
        (
            "agent",
            &["scaling-group-type"],
            "'storage'",
            json!("storage"),
        ),
        (
            "agent",
            &["public-host"],
            "'node.example'",
            json!("node.example"),
        ),
        ("agent", &["agent-sock-port"], "6107", json!(6107)),
        (
            "agent",
            &["metadata-server-bind-host"],
            "'127.0.0.1'",
            json!("127.0.0.1"),
        ),
        ("agent", &["metadata-server-port"], "'40129'", json!(40129)),
        (
            "agent",
            &["ipc-base-path"],
            "'/nowhere/ipc'",
            json!("/nowhere/ipc"),
        ),
        (
            "agent",
            &["var-base-path"],
            "'/nowhere/a/../var'",
            json!("/nowhere/var"),
        ),
        (
            "agent",
            &["mount-path"],
            "'/nowhere/vfroot'",
            json!("/nowhere/vfroot"),
        ),
        ("agent", &["cohabiting-storage-proxy"], "'no'", json!(false)),
        (
            "agent",
            &["pid-file"],
            "'/nowhere/pid'",
            json!("/nowhere/pid"),
        ),
        ("agent", &["skip-manager-detection"], "1", json!(true)),
        (
            "agent",
            &["allow-compute-plugins"],
            "['rocm','cuda','rocm']",
            json!(["cuda", "rocm"]),
        ),
        (
            "agent",
            &["block-compute-plugins"],
            "['tpu']",
            json!(["tpu"]),
        ),
        (
            "agent",
            &["image-commit-path"],
            "'/nowhere/commit'",
            json!("/nowhere/commit"),
        ),
        ("agent", &["kernel-creation-concurrency"], "32", json!(32)),
        (
            "agent.sync-container-lifecycles",
            &["enabled"],
            "false",
            json!(false),
        ),
        (
            "agent.sync-container-lifecycles",
            &["interval"],
            "2.5",
            json!(2.5),
        ),
    ]
}

fn container() -> Vec<Row> {
    vec![
        ("container", &["kernel-uid"], "1000", json!(1000)),
        ("container", &["kernel-uid"], "'work'", json!(1100)),
        ("container", &["kernel-uid"], "''", json!(0)),
        ("container", &["kernel-gid"], "'work'", json!(1200)),
        ("container", &["kernel-gid"], "'-1'", json!(0)),
        (
            "container",
            &["bind-host", "kernel-host"],
            "'10.0.0.9'",
            json!("10.0.0.9"),
        ),
        (
            "container",
            &["advertised-host"],
            "'node.example'",
            json!("node.example"),
        ),
        (
            "container",
            &["port-range"],
            "[30000, '30010']",
            json!([30000, 30010]),
        ),
        (
            "container",
            &["port-range"],
            "'30000-30010'",
            json!([30000, 30010]),
        ),
        ("container", &["stats-type"], "'cgroup'", json!("cgroup")),
        ("container", &["sandbox-type"], "'jail'", json!("jail")),
        ("container", &["jail-args"], "['-x']", json!(["-x"])),
        ("container", &["scratch-type"], "'memory'", json!("memory")),
        (
            "container",
            &["scratch-root"],
            "'/nowhere/scratches'",
            json!("/nowhere/scratches"),
        ),
        (
            "container",
            &["scratch-size"],
            "'1.5 GiB'",
            json!(1_610_612_736),
        ),
        ("container", &["alternative-bridge"], "'br7'", json!("br7")),
        ("resource", &["reserved-cpu"], "2", json!(2)),
        (
            "resource",
            &["reserved-mem"],
            "'2g'",
            json!(2_147_483_648_u64),
        ),
        (
            "resource",
            &["memory-align-size"],
            "1048576",
            json!(1_048_576),
        ),
        (
            "resource",
            &["allocation-order"],
            "['mem','cpu']",
            json!(["mem", "cpu"]),
        ),
        (
            "resource",
            &["affinity-policy"],
            "'prefer_single_node'",
            json!("PREFER_SINGLE_NODE"),
        ),
        ("container-logs", &["max-length"], "'1m'", json!(1_048_576)),
        ("container-logs", &["chunk-size"], "4096", json!(4096)),
    ]
}

fn debug() -> Vec<Row> {
    vec![
        ("debug", &["heartbeat-interval"], "7.5", json!(7.5)),
        ("debug", &["skip-container-deletion"], "true", json!(true)),
        ("debug", &["kernel-runner"], "true", json!(true)),
        ("debug.coredump", &["enabled"], "true", json!(true)),
        (
            "debug.coredump",
            &["path"],
            "'/nowhere/cores'",
            json!("/nowhere/cores"),
        ),
        ("debug.coredump", &["backup-count"], "3", json!(3)),
        ("debug.coredump", &["size-limit"], "'1m'", json!(1_048_576)),
        ("logging", &["level"], "'debug'", json!("DEBUG")),
        ("logging", &["drivers"], "[]", json!([])),
        (
            "logging",
            &["pkg-ns"],
            "{'aiohttp'='error'}",
            json!({"aiohttp": "ERROR"}),
        ),
        ("logging.console", &["colored"], "false", json!(false)),
        ("logging.console", &["format"], "'simple'", json!("simple")),
    ]
}

fn deadlines() -> Vec<Row> {
    vec![
        (
            "watcher",
            &["service-addr"],
            "'127.0.0.1:6109'",
            addr("127.0.0.1", 6109),
        ),
        (
            "watcher",
            &["target-service"],
            "'x.service'",
            json!("x.service"),
        ),
        ("watcher", &["soft-reset-available"], "true", json!(true)),
        ("api", &["pull-timeout"], "60", json!(60.0)),
        ("api", &["commit-timeout"], "'2m'", json!(120.0)),
        ("api", &["push-timeout"], "0.5", json!(0.5)),
        (
            "kernel-lifecycles",
            &["init-polling-attempt"],
            "3",
            json!(3),
        ),
        (
            "kernel-lifecycles",
            &["init-polling-timeout-sec"],
            "3.5",
            json!(3.5),
        ),
        (
            "kernel-lifecycles",
            &["init-timeout-sec"],
            "30",
            json!(30.0),
        ),
    ]
}

fn node() -> Vec<Row> {
    vec![
        (
            "node",
            &["run-dir"],
            "'/dev/shm/elsewhere'",
            json!("/dev/shm/elsewhere"),
        ),
        (
            "node",
            &["state-dir"],
            "'/nowhere/state'",
            json!("/nowhere/state"),
        ),
        (
            "node",
            &["runner-dir"],
            "'/nowhere/runner'",
            json!("/nowhere/runner"),
        ),
        ("node", &["publish"], "'rows'", json!("rows")),
        ("node", &["forward"], "'relay'", json!("relay")),
        ("node", &["kernel-attach"], "'filters'", json!("filters")),
        ("node", &["relay-engine"], "'uring'", json!("uring")),
        ("node", &["relay-from"], "'host'", json!("host")),
        ("node", &["honour-firewall"], "true", json!(true)),
        (
            "node",
            &["allowed-clients"],
            "['10.0.0.0/8', '::1']",
            json!(["10.0.0.0/8", "::1/128"]),
        ),
        (
            "node",
            &["service-clients"],
            "{ sshd = ['10.0.0.0/8', '::1'], web = [] }",
            json!({"sshd": ["10.0.0.0/8", "::1/128"], "web": []}),
        ),
        (
            "node",
            &["redis-ca-file"],
            "'/etc/hostname'",
            json!("/etc/hostname"),
        ),
        ("node", &["cpu-quota"], "true", json!(true)),
        ("node", &["memory-nodes"], "false", json!(false)),
        ("node", &["metadata-redirect"], "true", json!(true)),
        ("node", &["max-containers"], "16", json!(16)),
        ("node", &["dataplane-wait"], "'1s'", json!(1.0)),
        ("node", &["folder-wait"], "'2s'", json!(2.0)),
        (
            "node",
            &["device-limits"],
            "[{device='/dev/null', read-bps='1m', write_iops=5}]",
            json!([{"device": "/dev/null", "read-bps": 1_048_576, "write-bps": null, "read-iops": null, "write-iops": 5}]),
        ),
    ]
}

fn node_parts() -> Vec<Row> {
    vec![
        (
            "node.dataplane",
            &["max-new-sessions-per-second"],
            "50",
            json!(50),
        ),
        (
            "node.engine",
            &["host"],
            "'unix:///nowhere.sock'",
            json!("unix:///nowhere.sock"),
        ),
        (
            "node.volumes",
            &["allow"],
            "['nfs h:/x']",
            json!(["nfs h:/x"]),
        ),
        (
            "node.volumes",
            &["fstab"],
            "['/etc/mtab']",
            json!(["/etc/mtab"]),
        ),
        ("node.volumes", &["timeout"], "'9s'", json!(9.0)),
        ("node.watcher", &["insecure-token"], "true", json!(true)),
        ("node.watcher", &["shutdown"], "true", json!(true)),
        ("node.watcher", &["timeout"], "'3s'", json!(3.0)),
        ("node.storage-proxy", &["timeout"], "'7s'", json!(7.0)),
        ("node.storage-proxy", &["interval"], "'8s'", json!(8.0)),
        (
            "node.accelerators",
            &["device-mask"],
            "['GPU-1','cuda:2']",
            json!(["GPU-1", "cuda:2"]),
        ),
        (
            "node.accelerators",
            &["cuda-injection"],
            "'cdi'",
            json!("cdi"),
        ),
        (
            "node.accelerators",
            &["allocation-mode"],
            "'fractional'",
            json!("fractional"),
        ),
        (
            "node.accelerators",
            &["unit-mem"],
            "'1g'",
            json!(1_073_741_824),
        ),
        (
            "node.accelerators",
            &["device-root"],
            "'/nowhere/root'",
            json!("/nowhere/root"),
        ),
        ("node.accelerators", &["unit-proc"], "4", json!(4)),
        ("node.accelerators", &["quantum-percent"], "5", json!(5)),
        (
            "node.accelerators",
            &["mock"],
            "'/dev/null'",
            json!("/dev/null"),
        ),
        (
            "node.accelerators",
            &["tpu-metrics-port"],
            "1234",
            json!(1234),
        ),
        (
            "node.accelerators",
            &["plugin-dir"],
            "'/nowhere/plugins'",
            json!("/nowhere/plugins"),
        ),
        (
            "node.accelerators",
            &["device-plugins"],
            "{'a.b/c'='c.device'}",
            json!({"a.b/c": "c.device"}),
        ),
        ("node.engine", &["connect-timeout"], "'1s'", json!(1.0)),
        ("node.engine", &["request-timeout"], "'2s'", json!(2.0)),
        ("node.engine", &["create-timeout"], "'3s'", json!(3.0)),
        ("node.engine", &["start-timeout"], "'4s'", json!(4.0)),
        ("node.engine", &["stop-grace"], "0", json!(0.0)),
        ("node.engine", &["remove-timeout"], "'6s'", json!(6.0)),
        ("node.dataplane", &["max-sessions-per-port"], "7", json!(7)),
        ("node.dataplane", &["max-sessions"], "70000", json!(70000)),
        ("node.dataplane", &["idle-timeout"], "'1h'", json!(3600.0)),
        ("node.dataplane", &["connect-timeout"], "'1s'", json!(1.0)),
        ("node.dataplane", &["drain"], "'30s'", json!(30.0)),
        (
            "node.dataplane",
            &["stats-interval"],
            "'250ms'",
            json!(0.25),
        ),
        ("node.dataplane", &["records-interval"], "'3s'", json!(3.0)),
        ("node.rpc", &["max-message"], "'1m'", json!(1_048_576)),
        ("node.rpc", &["max-in-flight"], "9", json!(9)),
    ]
}

fn is_read_by_every_name(rows: Vec<Row>) {
    for (section, names, value, expected) in rows {
        for name in names {
            for spelling in [(*name).to_owned(), name.replace('-', "_")] {
                let line = format!("{spelling} = {value}");
                let mut text = with_line(section, &line);
                if *name == "backend" {
                    text = text.replace("mode = 'docker'\n", "");
                }
                let setup = Setup::new(&text);
                let loaded = setup.loaded();
                let found = loaded
                    .origins
                    .iter()
                    .find(|v| v.section == section && v.key == names[0]);
                let found = found.unwrap_or_else(|| panic!("[{section}] {line} is not shown"));
                assert_eq!(found.json, expected, "[{section}] {line}");
                let at = text.lines().position(|l| l == line).map(|index| index + 1);
                assert_eq!(
                    found.origin,
                    Origin::File { line: at.unwrap() },
                    "[{section}] {line}"
                );
                let mut others = loaded.notes.iter().filter(|n| n.kind != NoteKind::NotUsed);
                // What `notes` looks at.
                let of_the_value =
                    |text: &str| text.starts_with("is root's") || text.starts_with("is relative");
                let note = others.find(|n| n.key.ends_with(&spelling) && !of_the_value(&n.text));
                assert_eq!(note.map(|n| &n.text), None, "[{section}] {line}");
            }
        }
    }
}

#[test]
fn keys_of_the_cluster_are_read_by_every_name() {
    is_read_by_every_name(cluster());
}

#[test]
fn keys_of_the_agent_are_read_by_every_name() {
    is_read_by_every_name(agent());
}

#[test]
fn keys_of_containers_are_read_by_every_name() {
    is_read_by_every_name(container());
}

#[test]
fn keys_of_debugging_and_logs_are_read_by_every_name() {
    is_read_by_every_name(debug());
}

#[test]
fn keys_of_deadlines_and_the_watcher_are_read_by_every_name() {
    is_read_by_every_name(deadlines());
}

#[test]
fn keys_of_the_node_are_read_by_every_name() {
    is_read_by_every_name(node());
}

#[test]
fn keys_of_the_node_s_parts_are_read_by_every_name() {
    is_read_by_every_name(node_parts());
}

/// A key that can be shown and has no row above would be untested.
#[test]
fn the_table_of_keys_is_complete() {
    let table = [
        cluster(),
        agent(),
        container(),
        debug(),
        deadlines(),
        node(),
        node_parts(),
    ]
    .concat();
    for value in Setup::new(crate::host::SMALLEST).loaded().origins {
        let covered = table
            .iter()
            .any(|row| row.0 == value.section && row.1[0] == value.key);
        // No key in the file, only variables; and key files, which must exist (see `faults`).
        let files = value.key.starts_with("rpc-auth-")
            || value.key.starts_with("tls-")
            || value.key == "token-file"
            || (value.section == "node.storage-proxy"
                && ["url", "secret-file", "ca-file"].contains(&value.key));
        assert!(
            covered || value.section == "overcommit" || files,
            "{}.{} has no row",
            value.section,
            value.key
        );
    }
}

#[test]
fn every_variable_replaces_its_key() {
    let file = with_line(
        "agent",
        "rpc-listen-addr = { host = '10.0.0.1', port = 6001 }\nregion = 'file'",
    );
    for (variable, value, section, key, expected) in [
        ("BACKEND_NAMESPACE", "n", "etcd", "namespace", json!("n")),
        (
            "BACKEND_ETCD_ADDR",
            "e:1",
            "etcd",
            "addr",
            json!([{"host": "e", "port": 1}]),
        ),
        ("BACKEND_ETCD_USER", "u", "etcd", "user", json!("u")),
        (
            "BACKEND_ETCD_PASSWORD",
            "p",
            "etcd",
            "password",
            json!("***"),
        ),
        (
            "BACKEND_AGENT_HOST_OVERRIDE",
            "10.9.9.9",
            "agent",
            "rpc-listen-addr",
            json!({"host": "10.9.9.9", "port": 6001}),
        ),
        (
            "BACKEND_AGENT_PORT",
            "7001",
            "agent",
            "rpc-listen-addr",
            json!({"host": "10.0.0.1", "port": 7001}),
        ),
        (
            "BACKEND_PID_FILE",
            "/nowhere/p",
            "agent",
            "pid-file",
            json!("/nowhere/p"),
        ),
        (
            "BACKEND_CONTAINER_PORT_RANGE",
            "31000-31005",
            "container",
            "port-range",
            json!([31000, 31005]),
        ),
        (
            "BACKEND_BIND_HOST_OVERRIDE",
            "127.0.0.2",
            "container",
            "bind-host",
            json!("127.0.0.2"),
        ),
        (
            "BACKEND_SANDBOX_TYPE",
            "jail",
            "container",
            "sandbox-type",
            json!("jail"),
        ),
        (
            "BACKEND_SCRATCH_ROOT",
            "/nowhere/s",
            "container",
            "scratch-root",
            json!("/nowhere/s"),
        ),
        (
            "BACKEND_CPU_OVERCOMMIT_FACTOR",
            "10",
            "overcommit",
            "cpu-factor",
            json!(10),
        ),
        (
            "BACKEND_MEM_OVERCOMMIT_FACTOR",
            "3",
            "overcommit",
            "mem-factor",
            json!(3),
        ),
        (
            "BACKEND_WATCHER_SERVICE_IP",
            "127.0.0.1",
            "watcher",
            "service-addr",
            json!({"host": "127.0.0.1", "port": 6009}),
        ),
        (
            "BACKEND_WATCHER_SERVICE_PORT",
            "6010",
            "watcher",
            "service-addr",
            json!({"host": "0.0.0.0", "port": 6010}),
        ),
        (
            "DOCKER_HOST",
            "tcp://h:1",
            "node.engine",
            "host",
            json!("tcp://h:1"),
        ),
    ] {
        let loaded = Setup::new(&file).env(variable, value).loaded();
        let found = loaded
            .origins
            .iter()
            .find(|v| v.section == section && v.key == key)
            .unwrap();
        assert_eq!(
            (&found.json, found.origin),
            (&expected, Origin::Environment(variable)),
            "{variable}"
        );
    }
}

#[test]
fn the_region_variable_gives_way_to_the_file() {
    let of = |setup: Setup| {
        setup
            .env("BACKEND_REGION", "env")
            .loaded()
            .config
            .agent
            .region
            .clone()
    };
    assert_eq!(
        of(Setup::new(&with_line("agent", "region = 'file'"))),
        "file"
    );
    assert_eq!(of(Setup::new(crate::host::SMALLEST)), "env");
}

#[test]
fn a_variable_set_to_nothing_replaces_too() {
    let file = with_line("agent", "rpc-listen-addr = '10.0.0.1:6001'");
    let loaded = Setup::new(&file)
        .env("BACKEND_AGENT_HOST_OVERRIDE", "")
        .loaded();
    assert_eq!(
        loaded.config.agent.rpc_listen_addr.to_string(),
        "192.0.2.7:6001"
    );
    let setup = Setup::new(&file).env("BACKEND_SCRATCH_ROOT", "");
    assert_eq!(setup.problems()[0].variable, Some("BACKEND_SCRATCH_ROOT"));
}

#[test]
fn etcd_credentials_need_both() {
    let both = Setup::new(&with_line("etcd", "user = 'u'\npassword = 'p'")).loaded();
    let etcd = both.config.etcd.clone().unwrap();
    let (user, password) = etcd.credentials.unwrap();
    assert_eq!((user.as_str(), password.reveal()), ("u", "p"));
    for half in ["user = 'u'", "password = 'p'", "user = 'u'\npassword = ''"] {
        let loaded = Setup::new(&with_line("etcd", half)).loaded();
        assert_eq!(loaded.config.etcd.as_ref().unwrap().credentials, None);
    }
}

/// The original announces 0.0.0.0 literally; its guard against that never triggers.
#[test]
fn an_unspecified_address_is_never_announced() {
    for listen in ["'0.0.0.0:6001'", "'[::]:6001'", "':6001'"] {
        let loaded =
            Setup::new(&with_line("agent", &format!("rpc-listen-addr = {listen}"))).loaded();
        let agent = &loaded.config.agent;
        assert_eq!(
            agent.advertised_rpc_addr.to_string(),
            "192.0.2.7:6001",
            "{listen}"
        );
        assert_eq!(
            loaded.config.container.advertised_host, "192.0.2.7",
            "{listen}"
        );
        assert_eq!(agent.public_host, "192.0.2.7", "{listen}");
    }
    let default = Setup::new(crate::host::SMALLEST).loaded();
    assert_eq!(
        default.config.agent.rpc_listen_addr.to_string(),
        "0.0.0.0:6001"
    );
    assert!(default.config.container.bind_host.is_unspecified());
    let given = Setup::new(&with_line("agent", "advertised-rpc-addr = '0.0.0.0:1'")).problems();
    assert_eq!(given[0].key, "agent.advertised-rpc-addr");
}

#[test]
fn the_bind_host_follows_the_rpc_host() {
    let loaded = Setup::new(&with_line(
        "agent",
        "rpc-listen-addr = 'node-1.example:6001'",
    ))
    .loaded();
    assert_eq!(loaded.config.container.bind_host.to_string(), "192.0.2.8");
    assert_eq!(
        loaded.config.agent.advertised_rpc_addr.to_string(),
        "node-1.example:6001"
    );
}

#[test]
fn without_a_default_route_the_route_to_etcd_gives_the_address() {
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let etcd =
        "addr = [{ host = '10.9.0.1', port = 2379 }, { host = 'node-1.example', port = 2379 }]";
    for listen in [
        "rpc-listen-addr = '0.0.0.0:6001'",
        "rpc-listen-addr = ':6001'",
    ] {
        let text = with_line("etcd", etcd).replace("[agent]\n", &format!("[agent]\n{listen}\n"));
        let mut setup = Setup::new(&text);
        // A stranger's, by a wildcard of the DNS, or a container bridge's.
        setup.host.named = vec![ip("127.0.1.1"), ip("198.51.100.1"), ip("172.17.0.1")];
        let address = |setup: &Setup| {
            let loaded = setup.loaded();
            let warned = loaded.render_notes().contains("advertised-rpc-addr");
            (loaded.config.agent.advertised_rpc_addr.host.clone(), warned)
        };
        // No way to etcd at all: said, once.
        assert_eq!(address(&setup), ("127.0.0.1".to_owned(), true), "{listen}");
        let notes = setup.loaded().notes;
        let told = notes.iter().filter(|note| note.key.contains("rpc-addr"));
        assert_eq!(told.count(), 1, "{notes:?}");
        // The second address is a name.
        setup.host.routes = vec![(ip("192.0.2.8"), ip("10.9.0.7"))];
        assert_eq!(address(&setup), ("10.9.0.7".to_owned(), false), "{listen}");
        setup.host.routes.push((ip("10.9.0.1"), ip("10.9.0.8")));
        assert_eq!(address(&setup), ("10.9.0.8".to_owned(), false), "{listen}");
        // A cluster on one host.
        setup.host.routes = vec![(ip("10.9.0.1"), ip("127.0.0.1"))];
        assert_eq!(address(&setup), ("127.0.0.1".to_owned(), false), "{listen}");
        // One of several members on this host, or reached by IPv6.
        for first in ["127.0.0.1", "fd00::7"] {
            let second = (ip("192.0.2.8"), ip("10.9.0.7"));
            setup.host.routes = vec![(ip("10.9.0.1"), ip(first)), second];
            assert_eq!(address(&setup), ("10.9.0.7".to_owned(), false), "{listen}");
        }
        // The default route comes before, and the host's name before that.
        let by_default = (ip("192.0.2.1"), ip("10.9.0.9"));
        setup.host.routes.push(by_default);
        assert_eq!(address(&setup), ("10.9.0.9".to_owned(), false), "{listen}");
        setup.host.named.push(ip("192.0.2.7"));
        assert_eq!(address(&setup), ("192.0.2.7".to_owned(), false), "{listen}");
    }
}

#[test]
fn of_several_addresses_of_the_host_that_towards_etcd_is_taken() {
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let etcd = "addr = { host = '10.9.0.1', port = 2379 }";
    let mut setup = Setup::new(&with_line("etcd", etcd));
    // Storage is first.
    let own = ["10.1.0.7", "10.9.0.7", "192.0.2.7"].map(ip);
    (setup.host.named, setup.host.own) = (own.to_vec(), own.to_vec());
    let address = |setup: &Setup| {
        let loaded = setup.loaded();
        let warned = loaded.render_notes().contains("10.1.0.7 and 10.9.0.7 and");
        (loaded.config.agent.advertised_rpc_addr.host.clone(), warned)
    };
    assert_eq!(address(&setup), ("10.1.0.7".to_owned(), true));
    // An address that the name does not lead to tells nothing.
    setup.host.routes = vec![(ip("10.9.0.1"), ip("10.2.0.7"))];
    assert_eq!(address(&setup), ("10.1.0.7".to_owned(), true));
    setup.host.routes.push((ip("192.0.2.1"), ip("192.0.2.7")));
    assert_eq!(address(&setup), ("192.0.2.7".to_owned(), false));
    setup.host.routes[0].1 = ip("10.9.0.7");
    assert_eq!(address(&setup), ("10.9.0.7".to_owned(), false));
    // What the default route leaves by is no bridge of containers, whatever its ports look like.
    setup.host.routes[1].1 = ip("10.9.0.7");
    setup.host.own = vec![ip("10.1.0.7")];
    assert_eq!(address(&setup), ("10.9.0.7".to_owned(), false));
}

#[test]
fn a_name_that_does_not_resolve_now_is_no_fault_of_the_configuration() {
    let text = with_line("agent", "rpc-listen-addr = 'nowhere:6001'");
    let errors = Setup::new(&text).load().unwrap_err();
    assert!(errors.is_passing(), "{errors}");
    let told = errors.to_string();
    assert!(
        told.contains("container.bind-host") && told.contains("\"nowhere\""),
        "{told}"
    );
    // Who binds nothing there has the rest.
    let Errors::Unresolved { loaded, .. } = errors else {
        panic!("{errors}");
    };
    let listen = &loaded.config.agent.rpc_listen_addr;
    assert_eq!(listen.to_string(), "nowhere:6001");
    // With a fault beside it, both are told, and another try is of no use.
    let setup = Setup::new(&text.replace("[agent]\n", "[agent]\nagent-sock-port = 1\n"));
    let errors = setup.load().unwrap_err();
    assert!(!errors.is_passing(), "{errors}");
    let keys: Vec<String> = setup.problems().into_iter().map(|it| it.key).collect();
    assert_eq!(keys, ["agent.agent-sock-port", "container.bind-host"]);
}

#[test]
fn the_log_file_needs_its_driver() {
    let file =
        "[logging.file]\npath = '/nowhere/log'\nfilename = 'a.log'\nrotation-size = '10MB'\n";
    let text = with_line("logging", "drivers = ['console', 'file']") + file;
    let loaded = Setup::new(&text).loaded();
    let log = loaded.config.logging.file.clone().unwrap();
    assert_eq!(
        (log.filename.as_str(), log.rotation_size.0, log.backup_count),
        ("a.log", 10_000_000, 5)
    );
    assert_eq!(
        Setup::new(&with_line("logging", "drivers = ['file']")).problems()[0].key,
        "logging.drivers"
    );
}

#[test]
fn a_blank_host_to_listen_on_is_every_address() {
    for (section, line, key, shown) in [
        (
            "agent",
            "service-addr = ':6103'",
            "service-addr",
            addr("0.0.0.0", 6103),
        ),
        (
            "agent",
            "service-addr = { host = '', port = 6103 }",
            "service-addr",
            addr("0.0.0.0", 6103),
        ),
        (
            "agent",
            "metadata-server-bind-host = ''",
            "metadata-server-bind-host",
            json!("0.0.0.0"),
        ),
        (
            "watcher",
            "service-addr = ':6109'",
            "service-addr",
            addr("0.0.0.0", 6109),
        ),
    ] {
        let loaded = Setup::new(&with_line(section, line)).loaded();
        let mut origins = loaded.origins.iter();
        let found = origins
            .find(|v| v.section == section && v.key == key)
            .unwrap();
        assert_eq!(found.json, shown, "{line}");
        assert!(matches!(found.origin, Origin::File { .. }), "{line}");
        let config = &loaded.config;
        let listened = [
            &config.agent.service_addr,
            &config.agent.metadata_server,
            &config.watcher.service_addr,
        ];
        assert!(listened.iter().all(|it| it.host == "0.0.0.0"), "{line}");
    }
    let text = with_line("watcher", "service-addr = '127.0.0.1:6009'");
    let loaded = Setup::new(&text)
        .env("BACKEND_WATCHER_SERVICE_IP", "")
        .loaded();
    assert_eq!(
        loaded.config.watcher.service_addr.to_string(),
        "0.0.0.0:6009"
    );
}

#[test]
fn a_blank_host_to_announce_is_the_one_that_others_use() {
    for address in ["':6103'", "{ host = '', port = 6103 }"] {
        let text = with_line("agent", &format!("announce-addr = {address}"));
        let loaded = Setup::new(&text).loaded();
        let agent = &loaded.config.agent;
        assert!(!agent.advertised_rpc_addr.host.is_empty());
        let expected = addr(&agent.advertised_rpc_addr.host, 6103);
        let mut origins = loaded.origins.iter();
        let found = origins.find(|v| v.section == "agent" && v.key == "announce-addr");
        assert_eq!(found.unwrap().json, expected, "{address}");
        assert_eq!(
            agent.announce_addr.host, agent.advertised_rpc_addr.host,
            "{address}"
        );
    }
}
