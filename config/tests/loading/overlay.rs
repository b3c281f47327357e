//! What a cluster's etcd sets, laid over the file.

use std::time::Duration;

use config::{LoadOptions, Overlay, load_over};

use crate::host::FixedHost;

const FILE: &str = "[etcd]\nnamespace = \"x\"\naddr = \"127.0.0.1:2379\"\n[agent]\nmode = \"docker\"\nrpc-listen-addr = \"10.0.0.5:6001\"\n\
                    [container]\nscratch-type = \"hostdir\"\nkernel-uid = 7\n[resource]\n[api]\npull-timeout = 10\npush-timeout = 20\n\
                    [container-logs]\nmax-length = \"1m\"\n";

fn loaded(overlay: &Overlay, file: &str) -> Result<config::Loaded, config::Errors> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.toml");
    std::fs::write(&path, file).unwrap();
    let options = LoadOptions {
        explicit: Some(path),
        standalone: false,
        only_looks: false,
        environment: Box::new(|_| None),
        host: Box::new(FixedHost::at(directory.path())),
    };
    load_over(&options, overlay)
}

#[test]
fn sections_of_config_agent_take_the_place_of_the_files() {
    let mut overlay = Overlay::default();
    overlay.set_agent("api", "pull-timeout", "7200.0", "scaling group");
    overlay.set_container("kernel-uid", "1000", "global");
    let loaded = loaded(&overlay, FILE).unwrap();
    let config = &loaded.config;
    assert_eq!(config.api.pull_timeout, Some(Duration::from_secs(7200)));
    // What etcd leaves out has its default, in the same section and in one it does not name.
    assert_eq!(config.api.push_timeout, None);
    assert_eq!(config.container_logs.max_length.0, 10 << 20);
    assert_eq!(config.container.kernel_uid, 1000);
    let text = loaded.render_text();
    assert!(
        text.contains("etcd config/agent/api/pull-timeout (scaling group)"),
        "{text}"
    );
    assert!(
        text.contains("etcd config/container/kernel-uid (global)"),
        "{text}"
    );
    assert!(
        text.contains("config/agent in etcd takes its place"),
        "{text}"
    );
}

#[test]
fn a_wrong_value_leaves_all_of_config_agent_out_and_is_told() {
    let mut overlay = Overlay::default();
    overlay.set_agent("api", "pull-timeout", "soon", "global");
    overlay.set_agent("container-logs", "max-length", "2m", "global");
    let loaded = loaded(&overlay, FILE).unwrap();
    assert_eq!(
        loaded.config.api.pull_timeout,
        Some(Duration::from_secs(10))
    );
    assert_eq!(loaded.config.container_logs.max_length.0, 1 << 20);
    let notes = loaded.render_notes();
    assert!(
        notes.contains("api.pull-timeout = \"soon\" in etcd is wrong"),
        "{notes}"
    );
}

#[test]
fn subnets_choose_among_the_hosts_addresses() {
    let blank = FILE.replace("10.0.0.5:6001", ":6001");
    let mut overlay = Overlay::default();
    overlay.set_agent_subnet(Some("0.0.0.0/0".to_owned()));
    overlay.set_container_subnet(Some("10.77.0.0/16".to_owned()));
    let found = loaded(&overlay, &blank).unwrap();
    // The network of all addresses says nothing; a container subnet without an address here neither.
    assert_eq!(
        found.config.container.bind_host.to_string(),
        found.config.agent.rpc_listen_addr.host
    );
    overlay.set_agent_subnet(Some("10.77.0.0/16".to_owned()));
    let errors = loaded(&overlay, &blank).unwrap_err().to_string();
    assert!(
        errors.contains("no address of this host lies in 10.77.0.0/16"),
        "{errors}"
    );
    // Nothing is detected when the host is given.
    assert!(loaded(&overlay, FILE).is_ok());
}

#[test]
fn what_etcd_holds_and_nobody_reads_is_told() {
    let mut overlay = Overlay::default();
    overlay.set_agent("container-log", "max-length", "2m", "global");
    overlay.set_agent("api", "pul-timeout", "10", "scaling group");
    overlay.set_container("kernel-uids", "7", "node");
    overlay.leave_out("config/agent/api", "global", "is a value");
    let loaded = loaded(&overlay, FILE).unwrap();
    let notes = loaded.render_notes();
    for words in [
        "config/agent/container-log/max-length (global) of etcd is not a known key and is ignored; did you mean \"container-logs\"?",
        "config/agent/api/pul-timeout (scaling group) of etcd is not a known key and is ignored; did you mean \"pull-timeout\"?",
        "config/container/kernel-uids (node) of etcd is not a known key and is ignored; did you mean \"kernel-uid\"?",
        "config/agent/api (global) of etcd is a value",
    ] {
        assert!(notes.contains(words), "{words}\nis not in\n{notes}");
    }
    assert_eq!(loaded.config.container.kernel_uid, 7);
    // Whoever fills etcd does not fill the log.
    let mut many = Overlay::default();
    for number in 0..1000 {
        many.set_container(&format!("{number}\n{}", "x".repeat(1000)), "1", "global");
    }
    let found = self::loaded(&many, FILE).unwrap();
    assert!(found.notes.len() < 100 && found.render_notes().lines().count() < 100);
}

#[test]
fn a_wrong_value_is_told_at_its_place_in_etcd() {
    let mut overlay = Overlay::default();
    overlay.set_container("kernel-uid", "nobody-knows-whom", "scaling group");
    let errors = loaded(&overlay, FILE).unwrap_err().to_string();
    let words = "etcd config/container/kernel-uid (scaling group): container.kernel-uid = \"nobody-knows-whom\": there is no user";
    assert!(errors.contains(words), "{errors}");
    assert!(!errors.contains("agent.toml"), "{errors}");
}
