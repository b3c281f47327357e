use super::*;
use serde_json::json;

fn smallest() -> serde_json::Value {
    json!({
        "image": {"canonical": "registry.example.com/stable/python:3.9-ubuntu20.04"},
        "kernel_id": "5d5f6a40-3d9c-4f0e-9a55-0b1c2d3e4f50",
        "session_id": "8a3e1c52-7b64-4b9f-8c0d-1e2f3a4b5c6d",
    })
}

fn with(fields: serde_json::Value) -> Result<KernelCreationConfig, serde_json::Error> {
    let mut config = smallest();
    for (name, value) in fields.as_object().expect("a map of fields") {
        config[name] = value.clone();
    }
    serde_json::from_value(config)
}

#[test]
fn absent_fields_have_the_originals_defaults() {
    let config: KernelCreationConfig = serde_json::from_value(smallest()).unwrap();
    assert!(config.is_main());
    assert_eq!(config.hostname(), "main1");
    assert_eq!(config.session_type, SessionType::Interactive);
    assert_eq!(config.image.architecture, std::env::consts::ARCH);
    assert_eq!(config.auto_pull, AutoPull::Digest);
    assert_eq!(config.uid, None);
    assert!(config.image.has_feature("uid-match"));
    assert!(config.allow_fragmentation());
    assert_eq!(config.image.short_name(), "python");
}

#[test]
fn null_stands_for_absent_everywhere() {
    let config = with(json!({
        "internal_data": null, "mounts": null, "preopen_ports": null, "environ": null,
        "resource_opts": null, "bootstrap_script": null, "uid": null, "supplementary_gids": null,
        "owner_project_id": null, "session_type": null, "idle_timeout": null,
        "resource_slots": null, "endpoint_id": null,
    }))
    .unwrap();
    assert!(config.mounts.is_empty() && config.preopen_ports.is_empty());
    assert!(config.internal_data.dotfiles.is_empty());
    assert!(config.internal_data.docker_credentials.0.is_null());
}

#[test]
fn numbers_may_be_text_and_texts_numbers() {
    let config = with(json!({
        "uid": "1500", "main_gid": 1600.0, "supplementary_gids": ["1700", 1701],
        "preopen_ports": ["9000"], "cluster_idx": "2",
        "resource_slots": {"cpu": 2, "mem": "1073741824", "cuda.shares": 0.5},
        "environ": {"N": 4, "FLAG": true, "GONE": null, "T": "x"},
    }))
    .unwrap();
    assert_eq!((config.uid, config.main_gid), (Some(1500), Some(1600)));
    assert_eq!(config.supplementary_gids, [1700, 1701]);
    assert_eq!(config.preopen_ports, [9000]);
    assert_eq!(config.cluster_idx, 2);
    assert_eq!(config.resource_slots.get("cpu"), Some("2"));
    assert_eq!(config.resource_slots.get("cuda.shares"), Some("0.5"));
    let environ: Vec<_> = config.environ.iter().collect();
    assert_eq!(environ, [("N", "4"), ("FLAG", "true"), ("T", "x")]);
}

#[test]
fn enumerations_ignore_case_and_dash_spelling() {
    for written in ["single-node", "SINGLE_NODE", "Single-Node"] {
        let config = with(json!({ "cluster_mode": written })).unwrap();
        assert_eq!(config.cluster_mode, ClusterMode::SingleNode);
    }
    assert_eq!(
        with(json!({"session_type": "INFERENCE"}))
            .unwrap()
            .session_type,
        SessionType::Inference
    );
    let refused = with(json!({"session_type": "holiday"}))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("holiday") && refused.contains("interactive"),
        "{refused}"
    );
}

#[test]
fn shared_memory_is_read_from_text_and_number() {
    let size = |value| {
        with(json!({"resource_opts": {"shmem": value}}))
            .unwrap()
            .shared_memory()
    };
    assert_eq!(size(json!("67108864")), Ok(Some(67_108_864)));
    assert_eq!(size(json!(67_108_864)), Ok(Some(67_108_864)));
    assert_eq!(size(json!("64m")), Ok(Some(67_108_864)));
    assert_eq!(size(json!(0)), Ok(None));
    assert_eq!(size(json!(null)), Ok(None));
    assert!(size(json!("much")).is_err());
    assert!(size(json!(-1)).is_err());
}

#[test]
fn out_of_range_numbers_are_refused() {
    assert!(with(json!({"preopen_ports": [65536]})).is_err());
    assert!(with(json!({"uid": -1})).is_err());
    assert!(with(json!({"uid": "root"})).is_err());
}

#[test]
fn secrets_are_not_shown_and_survive_a_round_trip() {
    let config = with(json!({
        "image": {"canonical": "a/b:c", "registry": {"name": "a", "username": "u", "password": "pw-1"}},
        "environ": {"TOKEN": "tk-1"},
        "internal_data": {
            "ssh_keypair": {"public_key": "ssh-rsa A", "private_key": "pk-1"},
            "docker_credentials": {"auths": "dc-1"},
            "dotfiles": [{"path": ".netrc", "data": "df-1", "perm": "600"}],
        },
    }))
    .unwrap();
    let shown = format!("{config:?}");
    for secret in ["pw-1", "tk-1", "pk-1", "dc-1", "df-1"] {
        assert!(!shown.contains(secret), "{secret} is shown");
    }
    let stored = serde_json::to_string(&config).unwrap();
    let read: KernelCreationConfig = serde_json::from_str(&stored).unwrap();
    assert_eq!(serde_json::to_string(&read).unwrap(), stored);
    assert_eq!(read.image.registry.password.unwrap().reveal(), "pw-1");
}

#[test]
fn a_local_image_is_named_without_its_registry() {
    let mut config = with(json!({
        "image": {"canonical": "registry.example.com/stable/python:3.9", "is_local": true,
                  "registry": {"name": "registry.example.com"}},
    }))
    .unwrap();
    assert_eq!(config.image.docker_name(), "stable/python:3.9");
    config.image.is_local = false;
    assert_eq!(
        config.image.docker_name(),
        "registry.example.com/stable/python:3.9"
    );
}

#[test]
fn cluster_information_is_read() {
    let cluster: ClusterInfo = serde_json::from_value(json!({
        "mode": "MULTI_NODE", "size": "2", "replicas": {"main": 1, "sub": 1},
        "network_config": {"mode": "bridge", "network_name": "bai-singlenode-1"},
        "ssh_keypair": null,
        "cluster_ssh_port_mapping": {"sub1": ["10.0.0.5", 30123]},
    }))
    .unwrap();
    assert_eq!(cluster.mode, ClusterMode::MultiNode);
    assert_eq!(cluster.network_mode(), Some("bridge"));
    assert_eq!(cluster.network_name(), Some("bai-singlenode-1"));
    let id = KernelId([7; 16]);
    assert_eq!(cluster.mapped_ssh_port("sub1", id), Some(30123));
    assert_eq!(cluster.mapped_ssh_port("main1", id), None);
}

#[test]
fn the_ports_of_sshd_are_found_by_name_and_by_id() {
    let [main, sub] = [7, 3].map(|n| KernelId([n; 16]));
    let (main_key, sub_key) = (by_id(main), by_id(sub));
    assert_eq!(main_key, "node-07070707-0707-0707-0707-070707070707");
    let cluster: ClusterInfo = serde_json::from_value(json!({
        "cluster_ssh_port_mapping": {&main_key: ["10.0.0.5", 30123], &sub_key: ["10.0.0.6", 30124]},
    }))
    .unwrap();
    assert_eq!(cluster.mapped_ssh_port("main1", main), Some(30123));
    assert_eq!(cluster.mapped_ssh_port("sub1", sub), Some(30124));
    assert_eq!(cluster.mapped_ssh_port("sub1", KernelId([1; 16])), None);
    // The kernels' order, whatever that of their ids.
    let places = |hosts| serde_json::to_string(&cluster.ssh_places(hosts)).unwrap();
    let given = format!(r#""{main_key}":["10.0.0.5",30123],"{sub_key}":["10.0.0.6",30124]"#);
    let named = r#""main1":["10.0.0.5",30123],"sub1":["10.0.0.6",30124]"#;
    assert_eq!(places(Some("main1,sub1")), format!("{{{given},{named}}}"));
    for others in [None, Some("main1"), Some("main1,sub1,sub2")] {
        assert_eq!(places(others), format!("{{{given}}}"));
    }
    // Names are there already.
    let cluster: ClusterInfo = serde_json::from_value(json!({
        "cluster_ssh_port_mapping": {"main1": ["10.0.0.5", 30123]},
    }))
    .unwrap();
    let places = cluster.ssh_places(Some("other")).unwrap();
    assert_eq!(places.keys().collect::<Vec<_>>(), ["main1"]);
    assert_eq!(ClusterInfo::default().ssh_places(Some("main1")), None);
}
