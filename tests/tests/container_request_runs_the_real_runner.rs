//! A container made from our request, scratch and mounts alone: the published runner starts in it
//! and answers, with the user, files and limits asked for.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use control::docker::{Docker, DockerOptions, ExecRequest};
use control::kernel::agent_socket::MOUNT_POINTS;
use control::kernel::container_request::{
    ContainerInputs, ContainerSettings, HostFacts, Limits, build, seccomp_profile,
};
use control::kernel::environment::{self, EnvironmentInputs, Identity};
use control::kernel::mounts::{HostPaths, Intrinsic, intrinsic};
use control::kernel::request::{ClusterInfo, KernelCreationConfig};
use control::kernel::resource_text::{ResourceSpec, parse, render};
use control::kernel::runner_link::{InitPolling, RunnerAddress, RunnerLink};
use control::kernel::scratch::{ClusterFiles, ConfigFiles, NewScratch, Scratch, ScratchKind};
use control::kernel::service_ports::{Exposure, arrange};
use control::runner::RunnerFiles;
use harness::{images, runner_packages};
use shared::ids::KernelId;
use tokio_util::sync::CancellationToken;

/// Removes the container however the test ends.
struct Container(String);

impl Drop for Container {
    fn drop(&mut self) {
        let _ = std::process::Command::new("docker")
            .args(["rm", "-f", "-v", &self.0])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status();
    }
}

#[tokio::test]
async fn the_runner_answers_in_a_container_of_ours() {
    let image = images::image(images::Image::Runner).unwrap();
    let runner = RunnerFiles::open(
        &runner_packages::installed().unwrap(),
        std::env::consts::ARCH,
    )
    .unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kernel_id = uuid::Uuid::new_v4();
    let config: KernelCreationConfig = serde_json::from_value(serde_json::json!({
        "image": {"canonical": image, "labels": {"ai.backend.runtime-type": "app"}},
        "kernel_id": kernel_id,
        "session_id": uuid::Uuid::new_v4(),
        "cluster_hostname": "main1",
        "uid": 1500, "main_gid": 1600,
        "environ": {"GREETING": "two\nlines", "LAST": "here"},
        "resource_slots": {"cpu": "1", "mem": "268435456"},
        "bootstrap_script": "echo booted > /home/work/booted\n",
        "internal_data": {"dotfiles": [{"path": ".config/a", "data": "x", "perm": "644"}]},
    }))
    .unwrap();

    let identity = Identity::of(&config, 1000, 1000);
    let scratch = Scratch::new(
        directory.path().join("scratch"),
        ScratchKind::HostDir,
        Duration::from_secs(30),
    );
    let paths = scratch
        .create(
            kernel_id,
            NewScratch {
                owner: identity.into(),
                skeleton: runner.runner_file(""),
                bootstrap_script: config.bootstrap_script.clone(),
                dotfiles: config.internal_data.dotfiles.clone(),
                cluster: ClusterFiles::of(&ClusterInfo::default(), None),
                ..NewScratch::default()
            },
        )
        .await
        .unwrap();
    // The agent's socket directory, as it is bound read-only below the runner's files.
    let socket_dir = directory.path().join("socket");
    fs::create_dir(&socket_dir).unwrap();
    for name in MOUNT_POINTS {
        fs::write(socket_dir.join(name), "").unwrap();
    }
    let wanted = Intrinsic {
        agent_socket_dir: Some(&socket_dir),
        ..Intrinsic::default()
    };
    let mut mounts = intrinsic(&paths, &wanted, &HostPaths::default());
    mounts.extend(runner.mounts("ubuntu22.04", false).unwrap());
    let environ = environment::variables(
        &config,
        identity,
        &EnvironmentInputs {
            cores: 1,
            ..EnvironmentInputs::default()
        },
    );
    let spec = ResourceSpec {
        slots: config.resource_slots.clone(),
        mounts: mounts.clone(),
        ..ResourceSpec::default()
    };
    let resource = render(&spec, &[], |_| false).unwrap().text;
    let files = ConfigFiles {
        environ: environment::render(&environ, &[]),
        resource,
        ..ConfigFiles::default()
    };
    scratch.write_config(kernel_id, files).await.unwrap();

    let settings = ContainerSettings {
        agent_id: "i-files-test".into(),
        bind_host: [127, 0, 0, 1].into(),
        local_terminal: false,
        jail: None,
        debug_runner: false,
        log_length: 1 << 20,
        alternative_bridge: None,
        device_limits: Vec::new(),
    };
    let host = HostFacts::read();
    let seccomp = seccomp_profile(&runner.seccomp_profile()).unwrap();
    let services = arrange(&Exposure::default()).unwrap();
    let limits = Limits {
        cpuset_cpus: Some("0".into()),
        memory: Some(256 << 20),
        memory_swap: Some(256 << 20),
        ..Limits::default()
    };
    let request = build(&ContainerInputs {
        settings: &settings,
        host: &host,
        seccomp: seccomp.as_ref(),
        request: &config,
        cluster: &ClusterInfo::default(),
        services: &services,
        repl_ports: None,
        engine_ports: false,
        environ: &environ,
        mounts: &mounts,
        limits: &limits,
        shared_memory: Some(32 << 20),
        device_arguments: &[],
        device_syscalls: &[],
    })
    .unwrap();

    let docker = Docker::connect(&DockerOptions::default()).await.unwrap();
    let container = Container(docker.create(&request.name, &request.body).await.unwrap());
    scratch
        .record_container(kernel_id, container.0.clone())
        .await
        .unwrap();
    docker.start(&container.0).await.unwrap();
    let inspected = docker.inspect(&container.0).await.unwrap();
    let host_config = inspected.host_config.clone().unwrap();
    assert_eq!(host_config.memory, Some(256 << 20));
    assert_eq!(host_config.memory_swap, Some(256 << 20));
    assert_eq!(host_config.shm_size, Some(32 << 20));
    assert_eq!(host_config.cpuset_cpus.as_deref(), Some("0"));
    assert!(host_config.port_bindings.unwrap_or_default().is_empty());
    assert!(host_config.security_opt.unwrap()[0].starts_with("seccomp={"));

    let networks = inspected.network_settings.unwrap().networks.unwrap();
    let address = networks
        .values()
        .next()
        .unwrap()
        .ip_address
        .clone()
        .unwrap();
    let link = RunnerLink::open(
        KernelId(*kernel_id.as_bytes()),
        RunnerAddress::container(address.parse().unwrap()),
        Default::default(),
    );
    let ready = link
        .wait_ready(&InitPolling::default(), &CancellationToken::new())
        .await;
    if let Err(err) = ready {
        let log = std::process::Command::new("docker")
            .args(["logs", &container.0])
            .output()
            .unwrap();
        panic!(
            "the runner does not answer: {err}\n{}",
            String::from_utf8_lossy(&log.stdout)
        );
    }
    link.close().await;

    // The user's own script ran, as the user.
    let booted = fs::metadata(paths.work.join("booted")).unwrap();
    assert_eq!((booted.uid(), booted.gid()), (1500, 1600));
    assert_eq!(
        fs::metadata(paths.work.join(".config/a")).unwrap().uid(),
        1500
    );
    // Read-only parts are read-only, the cluster's file is not for everybody.
    let exec = |argv: &[&str]| ExecRequest::new(argv.iter().map(|word| (*word).to_owned()));
    for path in ["/home/config/x", "/opt/backend.ai/x", "/opt/kernel/x"] {
        let output = docker
            .exec(
                &container.0,
                &exec(&["sh", "-c", &format!("echo x > {path}")]),
            )
            .await
            .unwrap();
        assert_ne!(output.exit_code, 0, "{path}");
    }
    assert_eq!(
        fs::metadata(paths.config.join("cluster.json"))
            .unwrap()
            .mode()
            & 0o777,
        0o600
    );
    let text = scratch
        .read_config(kernel_id, "resource.txt")
        .await
        .unwrap()
        .unwrap();
    let read = parse(&text, |_| false).unwrap();
    assert_eq!(read.container_id.as_deref(), Some(container.0.as_str()));
    assert!(
        read.spec
            .mounts
            .iter()
            .any(|mount| mount.target == "/opt/backend.ai")
    );

    drop(container);
    scratch.remove(kernel_id).await.unwrap();
    assert!(!Path::new(&paths.root).exists());
}
