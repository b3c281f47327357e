//! What is refused, all at once, in words that say what to do.

use config::UserEntry;

use crate::host::{SMALLEST, Setup, with_line};

#[test]
fn all_faults_are_told_at_once_in_golden_words() {
    let text = "\
[etcd]
namespace = 'local'
addr = '127.0.0.1'
[agent]
mode = 'dokcer'
rpc-listen-addr = { host = '10.0.0.5', prot = 6001 }
kernel-creation-concurrency = 33
id = '../etc'
[container]
scratch-type = 'k8s-nfs'
port-range = [31000, 30000]
kernel-uid = 'nobody-here'
bind-host = 'node-1'
[resource]
reserved-mem = '1x'
affinity-policy = 'prefer-single-node'
[debug]
heartbeat-interval = nan
";
    let setup = Setup::new(text)
        .env("BACKEND_CPU_OVERCOMMIT_FACTOR", "11")
        .env("BACKEND_AGENT_PORT", "0");
    let shown = setup.load().unwrap_err().to_string();
    let shown = shown.replace(&setup.host.working_directory.display().to_string(), "");
    let expected = r#"the configuration has 14 errors:
  /agent.toml:5: agent.mode = "dokcer": the word is not known (did you mean "docker"?); write one of "docker", "kubernetes", "dummy"
  /agent.toml:6: agent.rpc-listen-addr = { host, prot }: an address has no key "prot"; write { host = "10.0.0.5", port = 6001 } or "10.0.0.5:6001"
  environment BACKEND_AGENT_PORT: agent.rpc-listen-addr = "0": the port is not a number from 1 to 65535; write { host = "10.0.0.5", port = 6001 } or "10.0.0.5:6001"
  /agent.toml:8: agent.id = "../etc": the id can not be a file name; write 1 to 64 letters, digits, dots, dashes or underscores, the first not a dot
  /agent.toml:7: agent.kernel-creation-concurrency = 33: the number is out of range; write 1 to 32
  /agent.toml:12: container.kernel-uid = "nobody-here": there is no user of this name; write a number, a user name, or -1 for the user this agent runs as
  /agent.toml:13: container.bind-host = "node-1": ports can only be bound to an IP address; write an IP address of this host, 0.0.0.0 for all, or leave it blank
  /agent.toml:11: container.port-range = [31000, 30000]: the first port is above the last; write [30000, 31000] or "30000-31000"
  /agent.toml:10: container.scratch-type = "k8s-nfs": this agent does not run on Kubernetes; write "hostdir", "hostfile" or "memory"
  /agent.toml:15: resource.reserved-mem = "1x": the unit is not known; write a whole number of bytes or a number with k, m, g, t, p or e, such as "512m" or "1.5g"
  /agent.toml:16: resource.affinity-policy = "prefer-single-node": the word is not known; write one of "INTERLEAVED", "PREFER_SINGLE_NODE"
  /agent.toml:3: etcd.addr = "127.0.0.1": the port is missing; write { host = "127.0.0.1", port = 2379 } or a list of such tables
  /agent.toml:18: debug.heartbeat-interval = NaN: an interval is a finite number, not below zero; write seconds as a number, or a number with ms, s, m, h or d, such as "500ms" or "2h"
  environment BACKEND_CPU_OVERCOMMIT_FACTOR: overcommit.cpu-factor = "11": the factor is out of range or not a whole number; write a whole number from 1 to 10, or unset the variable"#;
    assert_eq!(shown, expected);
}

#[test]
fn required_keys_are_asked_for() {
    let keys: Vec<String> = Setup::new("")
        .problems()
        .into_iter()
        .map(|p| p.key)
        .collect();
    assert_eq!(
        keys,
        [
            "agent.mode",
            "container.scratch-type",
            "etcd.namespace",
            "etcd.addr"
        ]
    );
}

#[test]
fn a_section_that_is_a_value_is_refused() {
    let problems =
        Setup::new(&format!("node = 3\n{SMALLEST}").replace("[resource]", "")).problems();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(problems[0].remedy.contains("[node]"), "{problems:?}");
}

/// Each of these lines is a fault, told at its (first) key.
fn refuses(section: &str, lines: &[&str]) {
    for line in lines {
        let (name, _) = line.split_once(" = ").expect("a key");
        refuses_at(&format!("{section}.{name}"), section, line);
    }
}

fn refuses_at(key: &str, section: &str, line: &str) {
    let problems = Setup::new(&with_line(section, line)).problems();
    assert_eq!(problems.len(), 1, "[{section}] {line}: {problems:?}");
    assert_eq!(problems[0].key, key, "[{section}] {line}");
    assert!(!problems[0].remedy.is_empty(), "[{section}] {line}");
}

#[test]
fn what_does_not_fit_the_cluster_is_refused_at_its_key() {
    refuses(
        "etcd",
        &["addr = []", "addr = ['127.0.0.1', 2379]", "addr = ':2379'"],
    );
}

#[test]
fn what_does_not_fit_the_agent_is_refused_at_its_key() {
    refuses(
        "agent",
        &[
            "mode = 'kubernetes'",
            "scaling-group = ' '",
            "scaling-group = 3",
            "agent-sock-port = 80",
            "metadata-server-port = 70000",
            "metadata-server-bind-host = 'a b'",
            "ipc-base-path = '/proc/version/x'",
            "var-base-path = ''",
            "rpc-auth-agent-keypair = '/nowhere'",
            "rpc-auth-manager-public-key = '/proc/version'",
            "allow-compute-plugins = 'cuda'",
            "allow-compute-plugins = ['a']\nblock-compute-plugins = ['a']",
            "service-addr = '0.0.0.0:6001'",
            "cohabiting-storage-proxy = 'maybe'",
            "region = ''",
            "id = ' '",
            "kernel-creation-concurrency = 0",
        ],
    );
    refuses("agent.sync-container-lifecycles", &["interval = 0"]);
    // A blank host is every address.
    let port = "agent.metadata-server-port";
    refuses_at(
        port,
        "agent",
        "service-addr = '127.0.0.1:40128'\nmetadata-server-bind-host = ''",
    );
    let both = "service-addr = ':40128'\nmetadata-server-bind-host = '127.0.0.1'";
    refuses_at(port, "agent", both);
}

#[test]
fn what_does_not_fit_containers_is_refused_at_its_key() {
    refuses(
        "container",
        &[
            "kernel-gid = -2",
            "kernel-uid = 4294967295",
            "port-range = 30000",
            "port-range = [1, 2, 3]",
            "port-range = [1.5, 2]",
            "advertised-host = '0.0.0.0'",
        ],
    );
    refuses(
        "resource",
        &[
            "memory-align-size = 0",
            "allocation-order = ['cpu', 'cpu']",
            "reserved-cpu = -1",
            "reserved-mem = 1979-05-27",
        ],
    );
    refuses("container-logs", &["chunk-size = 0", "max-length = '15e'"]);
    refuses_at(
        "container.scratch-size",
        "container",
        "scratch-type = 'hostfile'",
    );
}

#[test]
fn what_does_not_fit_debugging_and_logs_is_refused_at_its_key() {
    refuses("debug", &["heartbeat-interval = 0"]);
    refuses("logging", &["level = 'LOUD'", "drivers = ['graylog']"]);
}

#[test]
fn what_does_not_fit_deadlines_and_the_watcher_is_refused_at_its_key() {
    refuses(
        "kernel-lifecycles",
        &[
            "init-polling-attempt = 0",
            "init-polling-timeout-sec = 0",
            "init-timeout-sec = '1ms'",
        ],
    );
}

#[test]
fn what_does_not_fit_the_node_is_refused_at_its_key() {
    refuses(
        "node",
        &[
            "run-dir = '/var/lib/x'",
            "publish = 'both'",
            "forward = 'kernel'",
            "kernel-attach = 'tcx'",
            "relay-engine = 'copy'",
            "allowed-clients = ['10.0.0.1/8']",
            "service-clients = { sshd = ['10.0.0.1/8'] }",
            "service-clients = ['sshd']",
            "service-clients = { a = ['10.0.0.1','10.0.0.2','10.0.0.3','10.0.0.4','10.0.0.5','10.0.0.6','10.0.0.7','10.0.0.8','10.0.0.9'] }",
            "device-limits = [{ read-bps = 1 }]",
            "device-limits = [{ device = '/dev/null', read-bps = 0 }]",
            "device-limits = [{ device = '/etc', read-bps = 1 }]",
            "device-limits = { device = '/dev/null' }",
        ],
    );
}

#[test]
fn what_does_not_fit_the_node_s_parts_is_refused_at_its_key() {
    refuses("node.engine", &["host = 'ssh://h'", "request-timeout = 0"]);
    refuses("node.dataplane", &["stats-interval = '1ms'"]);
    refuses(
        "node.accelerators",
        &[
            "unit-mem = '1m'",
            "unit-mem = '8e'",
            "device-plugins = {'a/b'='mem.x'}",
            "device-plugins = {'a/b'='x.device', 'c/d'='x.device'}",
        ],
    );
    refuses("node.rpc", &["max-message = '1k'"]);
    refuses_at(
        "node.dataplane.max-sessions-per-port",
        "node.dataplane",
        "max-sessions = 10",
    );
}

#[test]
fn one_curve_key_without_the_other_is_refused() {
    let setup = Setup::new(&with_line("agent", "rpc-auth-agent-keypair = 'agent.toml'"));
    let problems = setup.problems();
    assert_eq!(problems.len(), 1);
    assert!(
        problems[0].why.contains("rpc-auth-manager-public-key"),
        "{problems:?}"
    );
    let both = "rpc-auth-agent-keypair = 'agent.toml'\nrpc-auth-manager-public-key = 'agent.toml'";
    let loaded = Setup::new(&with_line("agent", both)).loaded();
    assert!(loaded.config.agent.rpc_auth.is_some());
}

#[test]
fn privileges_are_checked_before_the_start() {
    for (line, key) in [
        ("stats-type = 'cgroup'", "container.stats-type"),
        (
            "scratch-type = 'hostfile'\nscratch-size = '1g'",
            "container.scratch-type",
        ),
    ] {
        let mut setup = Setup::new(&with_line("container", line));
        setup.loaded();
        setup.host.user = UserEntry {
            uid: 1000,
            gid: 1000,
        };
        assert_eq!(setup.problems()[0].key, key);
    }
    let mut jail = Setup::new(&with_line("container", "sandbox-type = 'jail'"));
    jail.loaded();
    jail.host.architecture = "aarch64";
    assert_eq!(jail.problems()[0].key, "container.sandbox-type");
}

#[test]
fn core_dumps_need_an_absolute_pattern() {
    let mut setup = Setup::new(&with_line("debug.coredump", "enabled = true"));
    let coredump = setup.loaded().config.debug.coredump.clone().unwrap();
    assert_eq!(coredump.core_path.display().to_string(), "/var/crash");
    for pattern in ["core", "|/usr/bin/handler %p", ""] {
        setup.host.core_pattern = pattern;
        assert_eq!(
            setup.problems()[0].key,
            "debug.coredump.enabled",
            "{pattern}"
        );
    }
}

#[test]
fn a_run_directory_that_the_unit_may_not_write_to_is_told_as_such() {
    let mut setup = Setup::new(&with_line("node", "run-dir = '/run/elsewhere'"));
    assert_eq!(
        setup.loaded().config.node.run_dir.to_str(),
        Some("/run/elsewhere")
    );
    setup.host.tmpfs = vec![];
    let told = setup.problems();
    assert!(told[0].why.contains("not on a tmpfs"), "{told:?}");
    setup.host.read_only = vec!["/run"];
    let told = setup.problems();
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].why.contains("read-only"), "{told:?}");
    let remedy = "ReadWritePaths=/run/elsewhere";
    assert!(told[0].remedy.contains(remedy), "{told:?}");
}

#[test]
fn without_a_tmpfs_the_run_directory_must_be_named() {
    let mut setup = Setup::new(SMALLEST);
    assert_eq!(
        setup.loaded().config.node.run_dir.display().to_string(),
        "/run/bai-agent"
    );
    setup.host.tmpfs = vec!["/dev/shm"];
    assert_eq!(
        setup.loaded().config.node.run_dir.display().to_string(),
        "/dev/shm/bai-agent"
    );
    setup.host.tmpfs = vec![];
    assert_eq!(setup.problems()[0].key, "node.run-dir");
}

/// Whoever looks at the node of the units is often not root.
#[test]
fn who_only_looks_goes_by_what_is_there() {
    let mut setup = Setup::new(SMALLEST);
    setup.host.tmpfs = vec!["/dev/shm"];
    let run_dir = |setup: &Setup| setup.loaded().config.node.run_dir.display().to_string();
    setup.host.there = vec!["/run/bai-agent"];
    assert_eq!(run_dir(&setup), "/dev/shm/bai-agent");
    setup.only_looks = true;
    assert_eq!(run_dir(&setup), "/run/bai-agent");
    // Who runs the programs looks at those.
    setup.host.there = vec!["/run/bai-agent", "/dev/shm/bai-agent"];
    assert_eq!(run_dir(&setup), "/dev/shm/bai-agent");
    setup.host.there = vec![];
    assert_eq!(run_dir(&setup), "/dev/shm/bai-agent");
    setup.host.tmpfs = vec![];
    assert_eq!(run_dir(&setup), "/run/bai-agent");
    assert!(!setup.loaded().is_written("node", "run-dir"));
    let mut named = Setup::new(&with_line("node", "run-dir = '/run/elsewhere'"));
    named.host.tmpfs = vec![];
    assert_eq!(named.problems()[0].key, "node.run-dir");
    named.only_looks = true;
    assert_eq!(run_dir(&named), "/run/elsewhere");
    assert!(named.loaded().is_written("node", "run-dir"));
}

#[test]
fn a_host_name_that_can_not_be_an_id_is_told() {
    let mut setup = Setup::new(SMALLEST);
    assert_eq!(setup.loaded().config.agent.id, "i-node-1");
    setup.host.hostname = "x".repeat(63);
    assert_eq!(setup.problems()[0].key, "agent.id");
}

#[test]
fn directories_too_deep_for_sockets_are_told() {
    let deep = "x".repeat(90);
    let problems = Setup::new(&with_line(
        "agent",
        &format!("ipc-base-path = '/nowhere/{deep}'"),
    ))
    .problems();
    assert_eq!(problems[0].key, "agent.ipc-base-path");
    let problems =
        Setup::new(&with_line("node", &format!("run-dir = '/dev/shm/{deep}'"))).problems();
    assert_eq!(problems[0].key, "node.run-dir");
}

/// A secret that others may read is none, and half a section is a slip.
#[test]
fn the_secret_of_a_storage_proxy_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("secret");
    std::fs::write(&file, "hush").unwrap();
    let mode = |mode| {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let url = "url = 'http://127.0.0.1:6022'\n";
    let secret = format!("secret-file = '{}'\n", file.display());
    let ca = format!("ca-file = '{}'\n", file.display());
    let setup = |lines: &[&str]| {
        Setup::new(&format!(
            "{SMALLEST}\n[node.storage-proxy]\n{}",
            lines.concat()
        ))
    };
    mode(0o640);
    let told = setup(&[url, &secret]).load().unwrap_err().to_string();
    assert!(
        told.contains("node.storage-proxy.secret-file")
            && told.contains("0640")
            && told.contains("chmod 0600"),
        "{told}"
    );
    mode(0o600);
    let proxy = setup(&[url, &secret])
        .load()
        .unwrap()
        .config
        .node
        .storage_proxy
        .clone();
    let proxy = proxy.unwrap();
    assert_eq!(proxy.url.to_string(), "http://127.0.0.1:6022");
    assert_eq!(proxy.interval.as_secs(), 600);
    assert!(
        setup(&[])
            .load()
            .unwrap()
            .config
            .node
            .storage_proxy
            .is_none()
    );
    for (lines, key) in [
        (&[url] as &[&str], "node.storage-proxy.secret-file"),
        (&[&secret], "node.storage-proxy.url"),
        (&[url, &secret, &ca], "node.storage-proxy.ca-file"),
        (
            &[url, &secret, "interval = '100ms'\n"],
            "node.storage-proxy.interval",
        ),
        (
            &["url = 'storage:6022'\n", &secret],
            "node.storage-proxy.url",
        ),
    ] {
        let problems = setup(lines).problems();
        let keys: Vec<_> = problems.iter().map(|it| it.key.as_str()).collect();
        assert_eq!(keys, [key]);
    }
}

#[test]
fn slips_are_told_beside_what_is_missing() {
    let text =
        "[agent]\nmode = 'docker'\nscaling-gruop = 'gpu'\n[contianer]\nscratch-type = 'hostdir'\n";
    let refused = Setup::new(text).load().unwrap_err().to_string();
    assert!(refused.contains("container.scratch-type"), "{refused}");
    for slip in [
        "did you mean \"scaling-group\"?",
        "did you mean [container]?",
    ] {
        assert!(refused.contains(slip), "{refused}");
    }
    let unused = with_line("agent", "event-loop = 'uvloop'\nid = 7");
    let refused = Setup::new(&unused).load().unwrap_err().to_string();
    assert!(!refused.contains("event-loop"), "{refused}");
}

#[test]
fn a_file_that_can_not_be_read_tells_why() {
    let directory = tempfile::tempdir().unwrap();
    let binary = directory.path().join("binary.toml");
    std::fs::write(&binary, [0xff, 0xfe]).unwrap();
    for (file, why) in [
        (directory.path().join("absent.toml"), "not there"),
        (directory.path().to_owned(), "a directory"),
        (binary, "UTF-8"),
    ] {
        let options = config::LoadOptions::of_this_process(Some(file.clone()), true);
        let refused = config::load(&options).unwrap_err().to_string();
        assert!(
            refused.starts_with(&file.display().to_string()),
            "{refused}"
        );
        assert!(refused.contains(why), "{refused}");
    }
}
