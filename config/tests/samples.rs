//! The sample files parse without a fault or an unknown key, and the annotated one tells the truth
//! about every default.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use config::{LoadOptions, Loaded, NoteKind, Origin, load, render_json, render_notes, render_text};

fn sample(name: &str, standalone: bool) -> Loaded {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name);
    let mut options = LoadOptions::of_this_process(Some(path), standalone);
    options.environment = Box::new(|_| None);
    match load(&options) {
        Ok(loaded) => loaded,
        Err(errors) => panic!("{name}: {errors}"),
    }
}

#[test]
fn every_sample_loads_without_a_remark() {
    for (name, standalone) in [
        ("agent.toml", false),
        ("halfstack.toml", false),
        ("standalone.toml", true),
    ] {
        let loaded = sample(name, standalone);
        let remarks = render_notes(&loaded);
        // What a first try may do without is told of.
        let known =
            |line: &str| name != "agent.toml" && line.contains("container.kernel-uid is root's");
        let others = |line: &&str| !line.contains("is not used") && !known(line);
        assert_eq!(remarks.lines().find(others), None, "{name}: {remarks}");
        assert!(!render_text(&loaded).is_empty());
        assert!(
            render_json(&loaded)["values"]
                .as_array()
                .is_some_and(|values| values.len() > 80)
        );
    }
}

#[test]
fn standalone_needs_no_file() {
    let mut options = LoadOptions::of_this_process(None, true);
    options.environment = Box::new(|_| None);
    let loaded = load(&options).unwrap();
    assert_eq!(
        loaded.config.agent.rpc_listen_addr.to_string(),
        "127.0.0.1:6001"
    );
    assert_eq!(loaded.config.etcd, None);
    assert_eq!(loaded.config.file, None);
}

/// Uncomments every example line of the annotated file: each is a known key with a valid value.
#[test]
fn every_commented_example_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("agent.toml");
    let mut uncommented = String::new();
    for line in std::fs::read_to_string(path).unwrap().lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        let is_example = bare.starts_with("[[")
            || bare.split_once(" = ").is_some_and(|(key, _)| {
                !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '-')
            });
        uncommented.push_str(if is_example { bare } else { line });
        uncommented.push('\n');
    }
    let place = dir.path().display().to_string();
    for (example, real) in [
        (
            "/etc/backend.ai/agent.key_secret",
            format!("{place}/secret"),
        ),
        ("/etc/backend.ai/manager.key", format!("{place}/public")),
        ("tls = false", "tls = true".to_owned()),
        ("/etc/backend.ai/etcd-ca.pem", format!("{place}/public")),
        ("/etc/backend.ai/etcd-client.pem", format!("{place}/public")),
        ("/etc/backend.ai/etcd-client.key", format!("{place}/secret")),
        ("/etc/backend.ai/redis-ca.pem", format!("{place}/public")),
        (
            "/etc/backend.ai/storage-proxy.secret",
            format!("{place}/private"),
        ),
        ("/etc/backend.ai/watcher.token", format!("{place}/private")),
        ("/etc/backend.ai/storage-ca.pem", format!("{place}/public")),
        ("i-<host name>", "i-node".to_owned()),
        ("<container.advertised-host>", "10.0.0.5".to_owned()),
        ("\"/run/bai-agent\"", "\"/dev/shm/bai-agent\"".to_owned()),
    ] {
        assert!(uncommented.contains(example), "{example}");
        uncommented = uncommented.replace(example, &real);
    }
    std::fs::write(dir.path().join("secret"), "").unwrap();
    std::fs::write(dir.path().join("public"), "").unwrap();
    std::fs::write(dir.path().join("private"), "").unwrap();
    let private = std::fs::Permissions::from_mode(0o600);
    std::fs::set_permissions(dir.path().join("private"), private).unwrap();
    let file = dir.path().join("agent.toml");
    std::fs::write(&file, &uncommented).unwrap();
    let mut options = LoadOptions::of_this_process(Some(file), false);
    options.environment = Box::new(|_| None);
    let loaded = match load(&options) {
        Ok(loaded) => loaded,
        Err(errors) => panic!("{errors}"),
    };
    let unknown: Vec<_> = loaded
        .notes
        .iter()
        .filter(|n| !matches!(n.kind, NoteKind::Warning | NoteKind::NotUsed))
        .collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    // The examples with values are defaults: everything not in the list below is unchanged.
    let plain = sample("agent.toml", false);
    let now = |value: &config::Effective| {
        let mut found = loaded.origins.iter();
        found
            .find(|v| v.section == value.section && v.key == value.key)
            .map(|v| v.json.clone())
    };
    let changed: Vec<String> = plain
        .origins
        .iter()
        .filter(|value| value.origin == Origin::Default && now(value) != Some(value.json.clone()))
        .map(|value| format!("{}.{}", value.section, value.key))
        .collect();
    let examples = [
        "etcd.user",
        "etcd.password",
        "etcd.tls",
        "etcd.tls-ca-file",
        "etcd.tls-cert-file",
        "etcd.tls-key-file",
        "etcd.tls-server-name",
        "agent.rpc-auth-agent-keypair",
        "agent.rpc-auth-manager-public-key",
        "agent.mount-path",
        "agent.abuse-report-path",
        "agent.allow-compute-plugins",
        "agent.block-compute-plugins",
        "agent.advertised-rpc-addr",
        "agent.announce-addr",
        "container.alternative-bridge",
        "logging.pkg-ns",
        "node.device-limits",
        "node.honour-firewall",
        "node.redis-ca-file",
        "node.engine.host",
        "api.commit-timeout",
        "api.push-timeout",
        "node.run-dir",
        "node.accelerators.mock",
        "node.watcher.token-file",
        "node.storage-proxy.url",
        "node.storage-proxy.secret-file",
        "node.storage-proxy.ca-file",
    ];
    let lies: Vec<_> = changed
        .iter()
        .filter(|key| !examples.contains(&key.as_str()))
        .collect();
    assert!(
        lies.is_empty(),
        "agent.toml shows another default for {lies:?}"
    );
}
