//! A node without etcd, bus and manager.

use config::{NoteKind, Origin, UserEntry};

use crate::host::{SMALLEST, Setup, with_line};

fn standalone(text: &str) -> Setup {
    let mut setup = Setup::new(text);
    setup.standalone = true;
    setup
}

#[test]
fn nothing_is_required_and_everything_is_below_the_state_directory() {
    let loaded = standalone("[node]\nstate-dir = '/nowhere/state'\n").loaded();
    let config = &loaded.config;
    assert_eq!(config.agent.rpc_listen_addr.to_string(), "127.0.0.1:6001");
    assert_eq!(
        config.agent.advertised_rpc_addr.to_string(),
        "127.0.0.1:6001"
    );
    assert_eq!(config.container.bind_host.to_string(), "127.0.0.1");
    assert_eq!(config.etcd, None);
    for path in [
        &config.agent.var_base_path,
        &config.agent.ipc_base_path,
        &config.agent.image_commit_path,
        &config.container.scratch_root,
    ] {
        assert!(path.starts_with("/nowhere/state"), "{}", path.display());
    }
    let scratch = loaded
        .origins
        .iter()
        .find(|v| v.key == "scratch-root")
        .unwrap();
    assert_eq!(scratch.origin, Origin::Standalone);
    let noted: Vec<&str> = loaded.notes.iter().map(|note| &*note.key).collect();
    assert_eq!(noted, ["container.kernel-uid"]);
}

#[test]
fn the_state_directory_follows_the_user() {
    let mut setup = standalone("");
    assert_eq!(
        setup.loaded().config.node.state_dir.display().to_string(),
        "/var/lib/bai-agent/standalone"
    );
    setup.host.user = UserEntry {
        uid: 1000,
        gid: 1000,
    };
    setup.host.home = Some("/nowhere/home".into());
    assert_eq!(
        setup.loaded().config.node.state_dir.display().to_string(),
        "/nowhere/home/.local/state/bai-agent"
    );
}

#[test]
fn with_a_manager_the_state_is_in_the_var_directory() {
    let config = Setup::new(SMALLEST).loaded().config;
    assert_eq!(config.node.state_dir, config.agent.var_base_path);
}

#[test]
fn the_file_of_a_cluster_node_works_and_its_etcd_is_left_out() {
    let loaded = standalone(SMALLEST).loaded();
    assert_eq!(loaded.config.etcd, None);
    assert!(
        loaded
            .notes
            .iter()
            .any(|n| n.key == "etcd" && n.kind == NoteKind::NotUsed)
    );
}

#[test]
fn an_open_rpc_without_keys_is_a_warning() {
    let text = with_line("agent", "rpc-listen-addr = '0.0.0.0:6001'");
    let loaded = standalone(&text).loaded();
    let warned = loaded
        .notes
        .iter()
        .find(|n| n.key == "agent.rpc-listen-addr")
        .unwrap();
    assert_eq!(warned.kind, NoteKind::Warning);
    assert!(
        !Setup::new(&text)
            .loaded()
            .notes
            .iter()
            .any(|n| n.key == "agent.rpc-listen-addr")
    );
}
