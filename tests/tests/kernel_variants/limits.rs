//! Scratch kinds, full disks, and limits that outlive a restart.

use super::*;

// Defect 11 of the original: the scratch in memory was not mounted; and the loop file's leftovers.
#[tokio::test(flavor = "multi_thread")]
async fn defect_memory_scratch_is_not_mounted() -> Result<()> {
    for (kind, size, mounts, file_system) in [
        ("memory", "64m", 2, "bai-scratch"),
        ("hostfile", "64m", 1, "/dev/loop"),
    ] {
        let node = Node::start(NodeOptions {
            scratch_type: kind.to_owned(),
            container: format!("scratch-size = \"{size}\"\n"),
            ..NodeOptions::default()
        })
        .await?;
        let order = Order::of(Image::Runner)?;
        kernels::create(&node, &order).await?;
        let found = mounts_below(&node.scratch_root());
        assert_eq!(found.len(), mounts, "{kind}: {found:?}");
        assert!(found.iter().all(|line| line.starts_with(file_system)));
        assert!(
            found.iter().all(|line| line.contains("nosuid")),
            "{found:?}"
        );
        let scratch = node.scratch(&order.kernel.to_string());
        assert_eq!(
            std::fs::metadata(scratch)?.permissions().mode() & 0o7777,
            0o700
        );
        let shown = output_of(
            &node,
            &order,
            "df -k /home/work | tail -1; id -u > /home/work/file; cat file",
        )
        .await?;
        let total: u64 = shown
            .split_whitespace()
            .nth(1)
            .and_then(|field| field.parse().ok())
            .with_context(|| format!("df: {shown}"))?;
        assert!((40_000..=65_536).contains(&total), "{kind}: {shown}");
        assert!(shown.ends_with("1000\n"), "{shown}");
        // It is full when it is full, and the kernel lives on.
        let ran = kernels::run(
            &node,
            &order,
            "dd if=/dev/zero of=/home/work/big bs=1M count=80",
        )
        .await?;
        assert_ne!(ran.exit_code, Some(0), "{ran:?}");
        assert!(ran.output.contains("No space left"), "{ran:?}");
        let after = restart(&node, &order).await?;
        assert!(after["container_id"].is_string());
        assert_eq!(
            output_of(&node, &order, "rm big; cat file").await?,
            "1000\n"
        );

        kernels::destroy(&node, &order).await?;
        kernels::assert_clean(&node).await?;
        assert_eq!(mounts_below(&node.scratch_root()), [""; 0]);
        wait::until("the loop device is free", SOON, || async {
            loops_below(&node.scratch_root()).is_empty().then_some(())
        })
        .await?;
    }
    Ok(())
}

// Defect 5 of the original: what a failed creation had made stayed.
#[tokio::test(flavor = "multi_thread")]
async fn defect_scratch_leaks_when_its_disk_is_full() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let order = Order::of(Image::Runner)?;
    // Room for the directories, not for the files.
    nix::mount::mount(
        Some("variants-full"),
        &node.scratch_root(),
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=16k"),
    )?;
    let failure = kernels::fail_to_create(&node, &order).await?;
    assert_eq!(failure.class, "AgentError");
    for word in ["full", "scratch"] {
        assert!(failure.repr.contains(word), "{word}: {}", failure.repr);
    }
    assert_eq!(
        kernels::ends(&node, order.kernel).await?,
        [("failed-to-create".to_owned(), -1)]
    );
    kernels::assert_clean(&node).await?;
    // With room again, the same order succeeds.
    nix::mount::umount(&node.scratch_root())?;
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

/// The block device below a directory.
fn device_of(directory: &Path) -> Result<String> {
    let output = std::process::Command::new("findmnt")
        .args(["-nvo", "SOURCE", "-T"])
        .arg(directory)
        .output()
        .context("findmnt can't be started")?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

// Defect 1 of the original, for every limit a node may give.
#[tokio::test(flavor = "multi_thread")]
async fn defect_restart_loses_the_limits_of_the_node() -> Result<()> {
    let device = device_of(&std::env::temp_dir())?;
    let real = Path::new(&device).exists();
    // Without a disk below the test's files any block device shows that the request carries it.
    let device = if real {
        device
    } else {
        "/dev/loop0".to_owned()
    };
    let home = tempfile::tempdir()?;
    let node = Node::start(NodeOptions {
        environment: vec![("HOME".to_owned(), home.path().display().to_string())],
        node: "cpu-quota = true\n".to_owned(),
        sections: format!(
            "[[node.device-limits]]\ndevice = \"{device}\"\nread-bps = \"8m\"\nwrite-bps = \"1m\"\nread-iops = 2000\nwrite-iops = 1000\n"
        ),
        ..NodeOptions::default()
    })
    .await?;
    let mut order = Order::of(Image::Services)?;
    order.config["resource_opts"] = json!({"shmem": "33554432"});
    order.config["preopen_ports"] = json!([8500]);
    order.config["allocated_host_ports"] = json!([19_999]);
    let before = kernels::create(&node, &order).await?;
    let old = inspect(container_of(&before))?;
    let host = &old["HostConfig"];
    assert_eq!(host["NanoCpus"], 1_000_000_000u64);
    assert_eq!(host["ShmSize"], 33_554_432);
    // One that forks without end leaves the host half of its tasks.
    let most = std::fs::read_to_string("/proc/sys/kernel/pid_max")?;
    let most: u64 = most.trim().parse()?;
    let tasks = host["PidsLimit"].as_u64().context("no limit of tasks")?;
    assert!((1..=most / 2).contains(&tasks), "{tasks} of {most}");
    let rate = |key: &str| {
        let limits = &host[key];
        assert_eq!(limits[0]["Path"], device.as_str(), "{key}: {limits}");
        limits[0]["Rate"].as_u64()
    };
    assert_eq!(rate("BlkioDeviceReadBps"), Some(8 << 20));
    assert_eq!(rate("BlkioDeviceWriteBps"), Some(1 << 20));
    assert_eq!(rate("BlkioDeviceReadIOps"), Some(2000));
    assert_eq!(rate("BlkioDeviceWriteIOps"), Some(1000));

    // What the processes see of it.
    let script = "df -k /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2; ulimit -n; ulimit -l; \
        grep -E '^(CapBnd|Seccomp):' /proc/self/status | tr -d '\\t'; \
        cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null | head -1";
    let seen = output_of(&node, &order, script).await?;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[0], "32768", "{seen}");
    // As much as the agent itself may.
    let own = |resource| -> Result<(u64, u64)> { Ok(nix::sys::resource::getrlimit(resource)?) };
    let (_, files) = own(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    let (_, locked) = own(nix::sys::resource::Resource::RLIMIT_MEMLOCK)?;
    assert_eq!(lines[1], files.min(1 << 20).to_string(), "{seen}");
    let locked = match locked {
        u64::MAX => "unlimited".to_owned(),
        bytes => (bytes / 1024).to_string(),
    };
    assert_eq!(lines[2], locked, "{seen}");
    let bounds = lines[3].strip_prefix("CapBnd:").context(seen.clone())?;
    let bounds = u64::from_str_radix(bounds, 16)?;
    for (name, bit, there) in [
        ("IPC_LOCK", 14, true),
        ("SYS_NICE", 23, true),
        ("SYS_ADMIN", 21, false),
    ] {
        assert_eq!(bounds >> bit & 1 == 1, there, "{name}: {seen}");
    }
    assert_eq!(lines[4], "Seccomp:2", "{seen}");
    assert!(lines[5].starts_with("100000"), "{seen}");

    // Elsewhere `a_slowed_device_moves_what_dd_says_at_its_limit` alone tries a rate.
    if real {
        // 3 MiB past the cache at 1 MiB/s.
        let began = Instant::now();
        output_of(
            &node,
            &order,
            "dd if=/dev/zero of=/home/work/big bs=1M count=3 oflag=direct 2>&1",
        )
        .await?;
        assert!(
            began.elapsed() > Duration::from_millis(1800),
            "{:?}",
            began.elapsed()
        );
    }

    // The operator's options count from the next creation on; with wrong ones nothing is stopped.
    let options = home
        .path()
        .join(".config/backend.ai/agent-docker-container-opts.json");
    std::fs::create_dir_all(options.parent().context("a directory")?)?;
    std::fs::write(&options, "{")?;
    let failure = restart(&node, &order).await.unwrap_err();
    let told = format!("{failure:#}");
    assert!(told.contains(&options.display().to_string()), "{told}");
    assert_eq!(output_of(&node, &order, "echo on").await?, "on\n");
    std::fs::write(&options, r#"{"HostConfig": {"OomScoreAdj": 7}}"#)?;
    let after = restart(&node, &order).await?;
    let new = inspect(container_of(&after))?;
    assert_eq!(new["HostConfig"]["OomScoreAdj"], 7);
    let mut compared = 0;
    for (key, value) in host.as_object().context("a map")? {
        if key == "OomScoreAdj" {
            continue;
        }
        assert_eq!(&new["HostConfig"][key], value, "{key}");
        compared += 1;
    }
    assert!(compared > 40, "{compared}");
    for key in ["Labels", "Env", "Cmd", "ExposedPorts", "Hostname"] {
        assert_eq!(new["Config"][key], old["Config"][key], "{key}");
    }
    let label = old["Config"]["Labels"]["ai.backend.host-ports"]
        .as_str()
        .unwrap_or_default();
    assert_eq!(label.split(',').count(), 9, "{label}");
    let resource = std::fs::read_to_string(
        node.scratch(&order.kernel.to_string())
            .join("config/resource.txt"),
    )?;
    let ids: Vec<&str> = resource
        .lines()
        .filter_map(|line| line.strip_prefix("CID="))
        .collect();
    assert_eq!(ids, [container_of(&after)]);
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}
