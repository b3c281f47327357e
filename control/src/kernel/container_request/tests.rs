use super::*;
use crate::kernel::create::{NetworkChoice, with_host_ports};
use crate::kernel::environment::{EnvironmentInputs, Identity, variables};
use crate::kernel::mounts::{HostPaths, Intrinsic, intrinsic, vfolders};
use crate::kernel::scratch::ScratchPaths;
use crate::kernel::service_ports::{Exposure, arrange};
use crate::runner::RunnerFiles;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

fn settings() -> ContainerSettings {
    ContainerSettings {
        agent_id: "i-lctest".into(),
        bind_host: IpAddr::from([127, 0, 0, 1]),
        local_terminal: false,
        jail: None,
        debug_runner: false,
        log_length: 10 << 20,
        alternative_bridge: None,
        device_limits: Vec::new(),
    }
}

fn host() -> HostFacts {
    HostFacts {
        open_files: Some(20_000),
        locked_memory: Some(8 << 20),
        ..HostFacts::default()
    }
}

fn profile() -> Value {
    json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []})
}

fn limits() -> Limits {
    Limits {
        cpuset_cpus: Some("0".into()),
        memory: Some(512 << 20),
        memory_swap: Some(512 << 20),
        ..Limits::default()
    }
}

fn request(extra: Value) -> KernelCreationConfig {
    let mut config = json!({
        "image": {
            "canonical": "lctest/lcpy:1.0-debian12",
            "labels": {
                "ai.backend.runtime-type": "python",
                "ai.backend.runtime-path": "/usr/bin/python3",
                "ai.backend.service-ports": "jupyter:http:8081,webapp:http:8090,pre:preopen:8070",
                "ai.backend.envs.corecount": "OPENBLAS_NUM_THREADS,OMP_NUM_THREADS",
            },
        },
        "kernel_id": "44843cf7-7964-4cd9-8c60-f8e4fdc69e3a",
        "session_id": "a61cd3c8-03c5-4ac1-abcd-0246dc7e82f8",
        "owner_user_id": "11111111-2222-3333-4444-555555555555",
        "owner_project_id": null,
        "cluster_role": "main",
        "cluster_hostname": "main1",
        "resource_slots": {"cpu": "1", "mem": "536870912"},
        "resource_opts": {"shmem": "67108864"},
    });
    for (name, value) in extra.as_object().unwrap() {
        config[name] = value.clone();
    }
    serde_json::from_value(config).unwrap()
}

/// An installed version with the names of the published files, all empty.
fn fake_runner(root: &Path) -> RunnerFiles {
    let names = [
        "su-exec.x86_64.bin",
        "libbaihook.ubuntu22.04.x86_64.so",
        "dropbearmulti.x86_64.bin",
        "sftp-server.x86_64.bin",
        "tmux.x86_64.bin",
        "ttyd_linux.x86_64.bin",
        "yank.sh",
        "all-smi.x86_64.bin",
        "all-smi.1",
        "extract_dotfiles.py",
        "entrypoint.sh",
        "fantompass.py",
        "hash_phrase.py",
        "words.json",
        "jail.ubuntu22.04.x86_64.bin",
        "DO_NOT_STORE_PERSISTENT_FILES_HERE.md",
    ];
    let directories = ["runner", "kernel", "helpers", "krunner/static-gnu"];
    for directory in directories {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let mut files = Vec::new();
    for name in names {
        fs::write(root.join("runner").join(name), "").unwrap();
        files.push(
            json!({"path": format!("runner/{name}"), "size": 0, "mode": 0o644, "sha256": ""}),
        );
    }
    let manifest = json!({
        "format": 1, "version": "x", "arch": "x86_64", "environment_key": "static-gnu",
        "environment_revision": "14", "python": "3.13", "files": files, "links": [],
    });
    fs::write(root.join("manifest.json"), manifest.to_string()).unwrap();
    RunnerFiles::open_version(root).unwrap()
}

/// The body for a captured request, with the capture's ports.
fn captured_body(config: &KernelCreationConfig, engine_ports: bool) -> (String, Value) {
    let directory = tempfile::tempdir().unwrap();
    let runner = fake_runner(&directory.path().join("PKG"));
    let etc = directory.path().join("etc");
    fs::create_dir(&etc).unwrap();
    fs::write(etc.join("localtime"), "").unwrap();
    let scratch = ScratchPaths::new(Path::new("<SCRATCH_ROOT>"), config.kernel_id, false);
    let here = HostPaths {
        etc,
        lxcfs: directory.path().join("none"),
    };
    let mut mounts = intrinsic(&scratch, &Intrinsic::default(), &here);
    mounts.extend(vfolders(&config.mounts, false).unwrap());
    mounts.extend(runner.mounts("ubuntu22.04", false).unwrap());

    let services = arrange(&Exposure {
        label: config.image.label_or("ai.backend.service-ports", ""),
        is_main: config.is_main(),
        preopen: &config.preopen_ports,
        ..Exposure::default()
    })
    .unwrap();
    let count = container_ports(&services).len() - 2;
    let host_ports: Vec<u16> = (30722..).take(count).collect();
    let services = with_host_ports(&services, &host_ports, &NetworkChoice::Default);
    let identity = Identity::of(config, 1000, 1000);
    let environ = variables(
        config,
        identity,
        &EnvironmentInputs {
            cores: 1,
            ..EnvironmentInputs::default()
        },
    );
    let built = build(&ContainerInputs {
        settings: &settings(),
        host: &host(),
        seccomp: Some(&profile()),
        request: config,
        cluster: &ClusterInfo::default(),
        services: &services,
        repl_ports: engine_ports.then_some((30720, 30721)),
        engine_ports,
        environ: &environ,
        mounts: &mounts,
        limits: &limits(),
        shared_memory: config.shared_memory().unwrap(),
        device_arguments: &[],
        device_syscalls: &[],
    })
    .unwrap();
    assert!(built.unknown.is_empty());
    let text = serde_json::to_string(&built.body).unwrap();
    let etc = format!("{}/etc/", directory.path().display());
    let text = text.replace(&format!("{}/PKG", directory.path().display()), "<PKG>");
    (
        built.name,
        serde_json::from_str(&text.replace(&etc, "/etc/")).unwrap(),
    )
}

/// The capture with each deliberate difference applied.
fn expected(capture: &str, engine_ports: bool) -> (String, Value) {
    let capture: Value = serde_json::from_str(capture).unwrap();
    let name = capture["data"]["name"].as_str().unwrap().to_owned();
    let mut body = capture["data"]["config"].clone();
    let top = body.as_object_mut().unwrap();
    // Spelled as the API has it; at this level the engine knows no `Privileged`.
    let entrypoint = top.shift_remove("EntryPoint").unwrap();
    top.insert("Entrypoint".into(), entrypoint);
    assert_eq!(top.shift_remove("Privileged"), Some(json!(false)));
    // Null and empty text are the same to the engine.
    top["Labels"]["ai.backend.owner-project-id"] = json!("");
    let host = top["HostConfig"].as_object_mut().unwrap();
    // Not an option of the engine.
    assert_eq!(host.shift_remove("Cpus"), Some(json!(1)));
    if !engine_ports {
        // Host ports are rows of the dataplane.
        assert!(host.shift_remove("PortBindings").is_some());
    }
    for mount in host["Mounts"].as_array_mut().unwrap() {
        // A directory of ours instead of a volume that is never verified (defect 9).
        if mount["Type"] == "volume" {
            *mount = json!({"Target": "/opt/backend.ai", "Source": "<PKG>/krunner/static-gnu",
                            "Type": "bind", "ReadOnly": true, "BindOptions": {}});
        }
    }
    // The socket comes with its directory at `/opt/kernel`; here there is none.
    let mounts = host["Mounts"].as_array_mut().unwrap();
    mounts.retain(|mount| mount["Target"] != "/opt/kernel/agent.sock");
    (name, body)
}

fn compare(config: &KernelCreationConfig, capture: &str) {
    for engine_ports in [false, true] {
        let (name, mut body) = captured_body(config, engine_ports);
        let (expected_name, mut expected) = expected(capture, engine_ports);
        assert_eq!(name, expected_name);
        // Ours, for an agent that has lost its journal.
        let labels = body["Labels"].as_object_mut().unwrap();
        let host_ports = labels.shift_remove(HOST_PORTS_LABEL).unwrap();
        let pairs = parse_host_ports(host_ports.as_str().unwrap());
        assert_eq!(pairs.get(&2200), Some(&30722));
        assert_eq!(pairs.get(&2000).copied(), engine_ports.then_some(30720));
        assert!(
            labels
                .shift_remove(SLOTS_LABEL)
                .unwrap()
                .as_str()
                .unwrap()
                .contains("\"cpu\":\"1\"")
        );
        assert_eq!(
            labels.shift_remove(SESSION_TYPE_LABEL),
            Some(json!("interactive"))
        );
        // One capture shows a placeholder for the profile, the other leaves it out.
        let security = body["HostConfig"]
            .as_object_mut()
            .unwrap()
            .shift_remove("SecurityOpt")
            .unwrap();
        assert!(security[0].as_str().unwrap().starts_with("seccomp={"));
        expected["HostConfig"]
            .as_object_mut()
            .unwrap()
            .shift_remove("SecurityOpt");
        // Folders lie elsewhere on the machine of the capture.
        for body in [&mut body, &mut expected] {
            for mount in body["HostConfig"]["Mounts"].as_array_mut().unwrap() {
                if mount["Target"] == "/home/work/vf1" {
                    mount["Source"] = json!("<VFHOST>/vf1");
                }
            }
        }
        assert_eq!(body, expected);
    }
}

/// The request variables of a capture: its `Env` up to what the agent adds.
fn request_environ(capture: &str) -> Value {
    let capture: Value = serde_json::from_str(capture).unwrap();
    let entries = capture["data"]["config"]["Env"].as_array().unwrap().iter();
    let entries = entries.map(|entry| entry.as_str().unwrap().split_once('=').unwrap());
    let own = entries.take_while(|(name, _)| *name != "LOCAL_USER_ID");
    Value::Object(
        own.map(|(name, value)| (name.to_owned(), json!(value)))
            .collect(),
    )
}

#[test]
fn the_captured_single_kernel_body_is_built() {
    let capture = include_str!("../../../../tests/vectors/runner/container_create.json");
    compare(
        &request(json!({ "environ": request_environ(capture) })),
        capture,
    );
}

#[test]
fn the_captured_body_with_all_options_is_built() {
    let capture = include_str!("../../../../tests/vectors/runner/container_create_full.json");
    let folder = tempfile::tempdir().unwrap();
    let config = request(json!({
        "image": {
            "canonical": "lctest/lcsvc:1.0-debian12",
            "labels": {
                "ai.backend.runtime-type": "python",
                "ai.backend.runtime-path": "/usr/bin/python3",
                "ai.backend.service-ports": "webapp:http:8090,fast:http:8091,missing:tcp:8092,pre:preopen:8070",
                "ai.backend.envs.corecount": "OPENBLAS_NUM_THREADS,OMP_NUM_THREADS",
            },
        },
        "kernel_id": "44ad4143-830a-46e0-9a3a-5d769a7b4b7d",
        "session_id": "ceaf1355-2b48-4d2c-8474-946e9c69ae92",
        "environ": request_environ(capture),
        "uid": 1500, "main_gid": 1600, "supplementary_gids": [1700, 1701],
        "preopen_ports": [9000],
        "mounts": [{"name": "vf1", "host_path": folder.path(), "kernel_path": "/home/work/vf1",
                    "mount_perm": "ro", "usage_mode": "general"}],
    }));
    compare(&config, capture);
}

fn built(
    config: &KernelCreationConfig,
    change: impl FnOnce(&mut ContainerSettings, &mut HostFacts, &mut ClusterInfo, &mut Limits),
    device_arguments: &[Value],
) -> Result<ContainerRequest, ContainerRequestError> {
    built_under(Some(&profile()), config, change, device_arguments)
}

fn built_under(
    seccomp: Option<&Value>,
    config: &KernelCreationConfig,
    change: impl FnOnce(&mut ContainerSettings, &mut HostFacts, &mut ClusterInfo, &mut Limits),
    device_arguments: &[Value],
) -> Result<ContainerRequest, ContainerRequestError> {
    let (mut settings, mut host, mut cluster, mut limits) =
        (settings(), host(), ClusterInfo::default(), limits());
    change(&mut settings, &mut host, &mut cluster, &mut limits);
    build(&ContainerInputs {
        settings: &settings,
        host: &host,
        seccomp,
        request: config,
        cluster: &cluster,
        services: &[],
        repl_ports: None,
        engine_ports: false,
        environ: &TextMap::default(),
        mounts: &[],
        limits: &limits,
        shared_memory: Some(64 << 20),
        device_arguments,
        device_syscalls: &["perf_event_open".to_owned()],
    })
}

/// Defect 1 of the original: a restarted container had no limits. The builder has no "restart".
#[test]
fn defect_1_the_same_inputs_give_the_same_limits_again() {
    let config = request(json!({}));
    let first = built(&config, |_, _, _, _| (), &[]).unwrap().body;
    let stored: KernelCreationConfig =
        serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
    let again = built(&stored, |_, _, _, _| (), &[]).unwrap().body;
    assert_eq!(first, again);
    let host = again.host_config.unwrap();
    assert_eq!(host.memory, Some(512 << 20));
    assert_eq!(host.memory_swap, Some(512 << 20));
    assert_eq!(host.cpuset_cpus.as_deref(), Some("0"));
    assert_eq!(host.shm_size, Some(64 << 20));
}

#[test]
fn a_jail_wraps_the_command_and_is_unconfined() {
    let change = |settings: &mut ContainerSettings, _: &mut _, _: &mut _, _: &mut _| {
        settings.jail = Some(vec!["-mount=/x".into()]);
        settings.debug_runner = true;
    };
    let body = built(&request(json!({})), change, &[]).unwrap().body;
    assert_eq!(
        body.cmd.unwrap(),
        [
            "/opt/kernel/jail",
            "-mount=/x",
            "--",
            "/opt/backend.ai/bin/python",
            "-s",
            "-m",
            "ai.backend.kernel",
            "--debug",
            "python",
            "/usr/bin/python3"
        ]
    );
    let host = body.host_config.unwrap();
    assert!(host.cap_add.unwrap().contains(&"SYS_PTRACE".to_owned()));
    assert_eq!(
        host.security_opt.unwrap(),
        ["seccomp=unconfined", "apparmor=unconfined"]
    );
}

#[test]
fn accelerators_and_operators_add_to_the_body() {
    let gpu = json!({
        "Env": ["NVIDIA_VISIBLE_DEVICES=0"],
        "HostConfig": {"DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": ["0"], "Capabilities": [["gpu"]]}]},
    });
    let change = |_: &mut ContainerSettings, host: &mut HostFacts, _: &mut _, _: &mut _| {
        let part = json!({"EntryPoint": ["/x"], "HostConfig": {"CapAdd": ["SYS_ADMIN"], "Memory": 1, "Wishes": 3}});
        host.overrides.push(("/etc/backend.ai/o.json".into(), part));
        host.rdma = true;
    };
    let request = built(&request(json!({})), change, &[gpu]).unwrap();
    assert_eq!(request.unknown, ["HostConfig.Wishes"]);
    let body = request.body;
    assert_eq!(body.env.unwrap(), ["NVIDIA_VISIBLE_DEVICES=0"]);
    assert_eq!(
        body.entrypoint.unwrap(),
        ["/opt/kernel/entrypoint.sh", "/x"]
    );
    let host = body.host_config.unwrap();
    assert_eq!(host.cap_add.unwrap(), ["IPC_LOCK", "SYS_NICE", "SYS_ADMIN"]);
    assert_eq!(host.memory, Some(1));
    assert_eq!(
        host.device_requests.unwrap()[0].driver.as_deref(),
        Some("nvidia")
    );
    assert_eq!(
        host.devices.unwrap()[0].path_on_host.as_deref(),
        Some("/dev/infiniband")
    );
    assert!(host.security_opt.unwrap()[0].contains("perf_event_open"));
}

#[test]
fn an_operators_file_of_the_wrong_kind_is_named() {
    let change = |_: &mut ContainerSettings, host: &mut HostFacts, _: &mut _, _: &mut _| {
        let part = json!({"HostConfig": {"Memory": "much"}});
        host.overrides.push(("/etc/backend.ai/o.json".into(), part));
    };
    let told = built(&request(json!({})), change, &[])
        .unwrap_err()
        .to_string();
    assert!(told.contains("/etc/backend.ai/o.json"), "{told}");
}

#[test]
fn configured_limits_reach_the_engine() {
    let change =
        |settings: &mut ContainerSettings, host: &mut HostFacts, _: &mut _, limits: &mut Limits| {
            settings.device_limits = vec![DeviceLimit {
                device: "/dev/sda".into(),
                read_bps: Some(config::ByteSize(1 << 20)),
                write_bps: None,
                read_iops: None,
                write_iops: Some(100),
            }];
            settings.log_length = 100;
            host.open_files = None;
            host.locked_memory = None;
            limits.nano_cpus = Some(1_500_000_000);
        };
    let host = built_under(None, &request(json!({})), change, &[])
        .unwrap()
        .body
        .host_config
        .unwrap();
    assert_eq!(host.nano_cpus, Some(1_500_000_000));
    let reads = host.blkio_device_read_bps.unwrap();
    assert_eq!(
        (reads[0].path.as_deref(), reads[0].rate),
        (Some("/dev/sda"), Some(1 << 20))
    );
    assert_eq!(host.blkio_device_write_iops.unwrap()[0].rate, Some(100));
    assert!(host.blkio_device_write_bps.is_none() && host.blkio_device_read_iops.is_none());
    assert!(host.security_opt.is_none());
    let ulimits = host.ulimits.unwrap();
    assert_eq!(
        (ulimits[0].soft, ulimits[1].hard),
        (Some(1 << 20), Some(-1))
    );
    assert_eq!(host.log_config.unwrap().config.unwrap()["max-size"], "1k");
}

#[test]
fn networks_follow_the_cluster() {
    let cluster = |value: Value| -> ClusterInfo { serde_json::from_value(value).unwrap() };
    let bridge = cluster(
        json!({"network_config": {"mode": "bridge", "network_name": "bai-singlenode-lctest"}}),
    );
    let body = built(
        &request(json!({"cluster_hostname": "sub1"})),
        |_, _, c, _| *c = bridge.clone(),
        &[],
    )
    .unwrap()
    .body;
    let value = serde_json::to_value(&body).unwrap();
    assert_eq!(value["Hostname"], "sub1");
    assert_eq!(value["HostConfig"]["NetworkMode"], "bai-singlenode-lctest");
    assert_eq!(
        value["NetworkingConfig"],
        json!({"EndpointsConfig": {"bai-singlenode-lctest": {"Aliases": ["sub1"]}}})
    );
    let moved =
        |settings: &mut ContainerSettings, _: &mut _, cluster: &mut ClusterInfo, _: &mut _| {
            *cluster = bridge.clone();
            settings.alternative_bridge = Some("br1".into());
        };
    let body = built(&request(json!({})), moved, &[]).unwrap().body;
    assert_eq!(
        body.host_config.unwrap().network_mode.as_deref(),
        Some("br1")
    );
    assert!(body.networking_config.is_some());
    let host = cluster(json!({
        "network_config": {"mode": "host"},
        "cluster_ssh_port_mapping": {
            "main1": ["10.0.0.1", 30010], "sub1": ["10.0.0.2", 30011], "sub2": ["localhost", 30012],
            "sub3": ["[fd00", 30013], "sub4": ["", 30014],
        },
    }));
    let body = built(&request(json!({})), |_, _, c, _| *c = host, &[])
        .unwrap()
        .body;
    let host = body.host_config.unwrap();
    assert_eq!(host.network_mode.as_deref(), Some("host"));
    assert_eq!(
        host.extra_hosts.unwrap(),
        ["main1:10.0.0.1", "sub1:10.0.0.2"]
    );
    assert!(host.port_bindings.is_none());
}

#[test]
fn the_profile_and_the_label_are_read_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("a.json"), r#"{"Tty": false}"#).unwrap();
    fs::write(path("broken.json"), "{").unwrap();
    assert_eq!(seccomp_profile(&path("none.json")).unwrap(), None);
    assert!(seccomp_profile(&path("a.json")).unwrap().is_some());
    assert!(seccomp_profile(&path("broken.json")).is_err());
    assert_eq!(
        parse_host_ports("2200:30001,x,9000:,8080:30002"),
        HashMap::from([(2200, 30001), (8080, 30002)])
    );
}
