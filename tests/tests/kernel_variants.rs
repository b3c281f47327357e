//! The lifecycle in its variants: other scratches, limits, networks and publishers, folders and
//! users, and the ways a container ends by itself.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use control::rpc::{self, Value};
use harness::images::{self, Image};
use harness::kernels::{self, Order, text};
use harness::node::{Node, NodeOptions};
use harness::wait;
use serde_json::{Value as Json, json};

/// How long a thing that follows by itself may take.
const SOON: Duration = Duration::from_secs(30);

fn inspect(container: &str) -> Result<Json> {
    let list: Json = serde_json::from_str(&kernels::docker(&["inspect", container])?)?;
    Ok(list[0].clone())
}

fn container_of(result: &Json) -> &str {
    result["container_id"].as_str().expect("a container id")
}

/// Everything mounted at or below a directory of the host.
fn mounts_below(directory: &Path) -> Vec<String> {
    std::fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .filter(|line| {
            line.split(' ')
                .nth(1)
                .is_some_and(|at| Path::new(at).starts_with(directory))
        })
        .map(str::to_owned)
        .collect()
}

/// Loop devices whose file is below a directory, whether it still exists or not.
fn loops_below(directory: &Path) -> Vec<String> {
    std::fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("loop/backing_file")).ok())
        .filter(|file| Path::new(file).starts_with(directory))
        .collect()
}

/// A command's output; it has to succeed.
async fn output_of(node: &Node, order: &Order, command: &str) -> Result<String> {
    let ran = kernels::run(node, order, command).await?;
    ensure!(ran.exit_code == Some(0), "{command}: {ran:?}");
    Ok(ran.output)
}

async fn restart(node: &Node, order: &Order) -> Result<Json> {
    let args = vec![
        text(order.session),
        text(order.kernel),
        Value::Nil,
        Value::Map(Vec::new()),
    ];
    kernels::ask(node, "restart_kernel", args).await
}

async fn start_service(node: &Node, order: &Order, name: &str) -> Result<()> {
    let args = vec![
        text(order.kernel),
        Value::from(name),
        Value::Map(Vec::new()),
    ];
    let reply = kernels::ask(node, "start_service", args).await?;
    ensure!(reply["status"] == "started", "{name}: {reply}");
    Ok(())
}

/// Takes a port as soon as its holder lets go of it.
struct Thief {
    thread: Option<std::thread::JoinHandle<Option<std::net::TcpListener>>>,
}

impl Thief {
    fn waiting_for(port: u16) -> Thief {
        let deadline = Instant::now() + SOON;
        let thread = std::thread::spawn(move || {
            while Instant::now() < deadline {
                if let Ok(taken) = std::net::TcpListener::bind(("127.0.0.1", port)) {
                    return Some(taken);
                }
                std::thread::yield_now();
            }
            None
        });
        Thief {
            thread: Some(thread),
        }
    }

    /// What was taken.
    fn loot(mut self) -> Result<std::net::TcpListener> {
        let thread = self.thread.take().expect("joined once");
        let loot = thread
            .join()
            .map_err(|_| anyhow::anyhow!("the thief panicked"))?;
        loot.context("the port never became free")
    }
}

/// The first bytes a server says, or what it answers to a request.
fn greeting(port: u16, request: &str) -> Result<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(request.as_bytes())?;
    let mut buffer = [0; 256];
    let length = stream.read(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

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
    let node = Node::start(NodeOptions {
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
    } else {
        eprintln!(
            "the rate is not tried: {} is on no block device",
            std::env::temp_dir().display()
        );
    }

    let after = restart(&node, &order).await?;
    let new = inspect(container_of(&after))?;
    let mut compared = 0;
    for (key, value) in host.as_object().context("a map")? {
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

// Defects 2 and 16 of the original: services with several ports, and a host port that is busy.
#[tokio::test(flavor = "multi_thread")]
async fn defect_a_busy_host_port_ends_the_creation() -> Result<()> {
    let node = Node::start(NodeOptions {
        ports: 20,
        ..NodeOptions::default()
    })
    .await?;
    // Two ports of the pool belong to a stranger.
    let (first, _) = node.ports();
    let strangers = [first, first + 2];
    let _taken = strangers
        .map(|port| std::net::TcpListener::bind(("127.0.0.1", port)).expect("a free port"));
    let mut order = Order::of(Image::Services)?;
    order.config["preopen_ports"] = json!([8500]);
    order.config["allocated_host_ports"] = json!([19_999]);
    order.config["image"]["labels"]["ai.backend.service-ports"] =
        json!("web:http:8080,pair:http:[9001,9002]");
    let result = kernels::create(&node, &order).await?;
    let names: Vec<&str> = result["service_ports"]
        .as_array()
        .context("services")?
        .iter()
        .filter_map(|service| service["name"].as_str())
        .collect();
    // The hidden one is not told.
    assert_eq!(names, ["sshd", "ttyd", "8500", "web", "pair"]);
    let mut all: Vec<u16> = names
        .iter()
        .flat_map(|name| kernels::host_ports(&result, name))
        .collect();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), 6, "{result}");
    assert!(strangers.iter().all(|port| !all.contains(port)), "{all:?}");

    start_service(&node, &order, "pair").await?;
    let ports = kernels::host_ports(&result, "pair");
    for (port, words) in ports.iter().zip(["first", "second"]) {
        let page = kernels::fetch(*port, "/")?;
        assert!(page.ends_with(&format!("{words}\n")), "{page}");
    }
    // What listens on a preopened port inside is reached, once it listens.
    let args = vec![
        text(order.session),
        text(order.kernel),
        Value::Int(3),
        Value::from("serve"),
        Value::from("batch"),
        Value::from(""),
        rpc::to_value(
            &json!({"exec": "echo preopened > index.html; busybox httpd -p 8500 -h /home/work"}),
        )?,
        Value::Float(2.0),
    ];
    kernels::ask(&node, "execute", args).await?;
    let port = kernels::host_ports(&result, "8500")[0];
    let page = wait::until("the preopened port", SOON, || async {
        kernels::fetch(port, "/")
            .ok()
            .filter(|page| page.contains("preopened"))
    })
    .await?;
    assert!(page.starts_with("HTTP/1"), "{page}");

    // A restart gives its ports free for a moment. One that a stranger takes then is replaced.
    let web = kernels::host_ports(&result, "web")[0];
    let thief = Thief::waiting_for(web);
    let after = restart(&node, &order).await?;
    let _loot = thief.loot()?;
    let moved = kernels::host_ports(&after, "web")[0];
    assert_ne!(moved, web);
    start_service(&node, &order, "web").await?;
    assert!(kernels::fetch(moved, "/")?.contains("It works"));

    // Seven of twenty are held; nobody can have fourteen.
    let mut greedy = Order::of(Image::Runner)?;
    greedy.config["preopen_ports"] = json!((8600..8611).collect::<Vec<u16>>());
    let failure = kernels::fail_to_create(&node, &greedy).await?;
    assert_eq!(failure.class, "RuntimeError");
    for words in [
        "not sufficiently available",
        "requested: 14",
        "container.port-range",
    ] {
        assert!(failure.repr.contains(words), "{words}: {}", failure.repr);
    }
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

/// The runner's image with more in it; goes away with the value.
struct Extended(String);

impl Drop for Extended {
    fn drop(&mut self) {
        let _ = kernels::docker(&["rmi", "-f", &self.0]);
    }
}

/// The runner's image with an ssh client and an account for the kernel's user.
fn image_with_ssh() -> Result<Extended> {
    let base = images::image(Image::Runner)?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let (name, container) = (format!("variants-ssh:{id}"), format!("variants-ssh-{id}"));
    let directory = tempfile::tempdir()?;
    let files = directory.path().join("files");
    std::fs::create_dir(&files)?;
    let ssh = Path::new("/usr/bin/ssh");
    ensure!(
        ssh.exists(),
        "{} is not there; try: apt-get install openssh-client",
        ssh.display()
    );
    let listed = std::process::Command::new("ldd").arg(ssh).output()?;
    let listed = String::from_utf8(listed.stdout)?;
    let libraries = listed
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    for file in libraries.chain(ssh.to_str()) {
        let file = Path::new(file);
        std::fs::copy(file, files.join(file.file_name().context("a file")?))?;
    }
    let script = "cp -n /files/lib* /lib/; cp /files/ssh /usr/bin/ssh; \
        echo 'work:x:1000:1000::/home/work:/bin/sh' >> /etc/passwd; echo 'work:x:1000:' >> /etc/group; rm -rf /files";
    let files = format!("{}/.", files.display());
    let made = (|| {
        kernels::docker(&[
            "create", "--name", &container, &base, "/bin/sh", "-c", script,
        ])?;
        kernels::docker(&["cp", &files, &format!("{container}:/files")])?;
        kernels::docker(&["start", "-a", &container])?;
        kernels::docker(&["commit", &container, &name])
    })();
    kernels::docker(&["rm", "-f", &container])?;
    made.map(|_| Extended(name))
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_of_a_cluster_log_in_to_each_other() -> Result<()> {
    let image = image_with_ssh()?;
    let node = Node::start(NodeOptions::default()).await?;
    let network = format!("variants-{}", uuid::Uuid::new_v4().simple());
    let keys = tempfile::tempdir()?;
    let made = std::process::Command::new("ssh-keygen")
        .args(["-q", "-t", "rsa", "-b", "2048", "-m", "PEM", "-N", "", "-f"])
        .arg(keys.path().join("id"))
        .status()
        .context("ssh-keygen can't be started; try: apt-get install openssh-client")?;
    ensure!(made.success(), "no key");
    let keypair = json!({
        "private_key": std::fs::read_to_string(keys.path().join("id"))?,
        "public_key": std::fs::read_to_string(keys.path().join("id.pub"))?,
    });
    // Made twice: the second is no error.
    for _ in 0..2 {
        kernels::ask(
            &node,
            "create_local_network",
            vec![Value::from(network.as_str())],
        )
        .await?;
    }
    let (mut main, mut sub) = (Order::named(&image.0)?, Order::named(&image.0)?);
    sub.session = main.session;
    for (order, role, hostname) in [(&mut main, "main", "main1"), (&mut sub, "sub", "sub1")] {
        order.cluster = json!({
            "mode": "single-node", "size": 2, "replicas": {"main": 1, "sub": 1},
            "network_config": {"mode": "bridge", "network_name": network},
            "ssh_keypair": keypair, "cluster_ssh_port_mapping": null,
        });
        order.config["session_id"] = json!(order.session.to_string());
        order.config["cluster_role"] = json!(role);
        order.config["cluster_hostname"] = json!(hostname);
        order.config["environ"] = json!({
            "BACKENDAI_CLUSTER_REPLICAS": "main:1,sub:1", "BACKENDAI_CLUSTER_SIZE": "2",
            "BACKENDAI_CLUSTER_HOSTS": "main1,sub1", "BACKENDAI_CLUSTER_HOST": hostname,
            "BACKENDAI_CLUSTER_ROLE": role,
        });
    }
    // Both in one call, as the manager does.
    let plain = |json: &Json| rpc::to_value(json).expect("JSON is a value");
    let args = vec![
        text(main.session),
        Value::Array(vec![text(main.kernel), text(sub.kernel)]),
        Value::Array(vec![plain(&main.config), plain(&sub.config)]),
        plain(&main.cluster),
        Value::Map(Vec::new()),
    ];
    let results = kernels::ask(&node, "create_kernels", args).await?;
    let services = |index: usize| -> Vec<String> {
        let list = results[index]["service_ports"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        list.iter()
            .filter_map(|it| it["name"].as_str().map(str::to_owned))
            .collect()
    };
    assert_eq!(services(0), ["sshd", "ttyd", "web"]);
    assert_eq!(services(1), ["sshd", "ttyd"]);

    for (from, to) in [(&main, "sub1"), (&sub, "main1")] {
        let said = output_of(
            &node,
            from,
            &format!("timeout 20 ssh -o BatchMode=yes {to} 'hostname; id -un' 2>&1"),
        )
        .await?;
        assert!(said.ends_with(&format!("{to}\nwork\n")), "{said}");
    }
    // The private key is for the kernel's user alone (defect 15 of the original).
    let config = node.scratch(&main.kernel.to_string()).join("config");
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let key = std::fs::metadata(config.join("ssh/id_cluster"))?;
    assert_eq!((key.permissions().mode() & 0o777, key.uid()), (0o600, 1000));
    for entry in std::fs::read_dir(&config)?.flatten() {
        if entry.metadata()?.is_file() && entry.metadata()?.permissions().mode() & 0o044 != 0 {
            let text = std::fs::read_to_string(entry.path())?;
            assert!(!text.contains("PRIVATE KEY"), "{}", entry.path().display());
        }
    }
    kernels::destroy(&node, &main).await?;
    kernels::destroy(&node, &sub).await?;
    // Removed twice: the second is no error.
    for _ in 0..2 {
        kernels::ask(
            &node,
            "destroy_local_network",
            vec![Value::from(network.as_str())],
        )
        .await?;
    }
    assert!(kernels::docker(&["network", "inspect", &network]).is_err());
    kernels::assert_clean(&node).await
}

// Defect 10 of the original: kernels on the host's network could not work.
#[tokio::test(flavor = "multi_thread")]
async fn defect_host_network_mode_is_broken() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let assigned = kernels::ask(&node, "assign_port", Vec::new()).await?;
    let assigned = u16::try_from(assigned.as_u64().context("a port")?)?;
    let (mut one, mut two) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    for (order, hostname) in [(&mut one, "main1"), (&mut two, "sub1")] {
        order.cluster["network_config"] = json!({"mode": "host", "network_name": "host"});
        order.config["cluster_hostname"] = json!(hostname);
    }
    one.cluster["cluster_ssh_port_mapping"] =
        json!({"main1": ["127.0.0.1", assigned], "other": ["127.0.0.2", 7]});
    two.config["image"]["labels"]["ai.backend.service-ports"] = json!("");
    let first = kernels::create(&node, &one).await?;
    // Two on the same network do not meet.
    let second = kernels::create(&node, &two).await?;
    assert_eq!(kernels::host_ports(&first, "sshd"), [assigned]);
    let check = |order: &Order, result: &Json| -> Result<()> {
        let seen = inspect(container_of(result))?;
        assert_eq!(seen["HostConfig"]["NetworkMode"], "host");
        let file = node
            .scratch(&order.kernel.to_string())
            .join("config/intrinsic-ports.json");
        let ports: Json = serde_json::from_str(&std::fs::read_to_string(file)?)?;
        assert_eq!(ports["replin"], result["repl_in_port"]);
        assert_eq!(ports["replout"], result["repl_out_port"]);
        assert_eq!(ports["sshd"], kernels::host_ports(result, "sshd")[0]);
        assert_eq!(ports["ttyd"], kernels::host_ports(result, "ttyd")[0]);
        let (low, high) = node.ports();
        for port in ports.as_object().context("a map")?.values() {
            let port = port.as_u64().context("a port")?;
            assert!(
                (u64::from(low)..=u64::from(high)).contains(&port),
                "{ports}"
            );
        }
        let greeted = greeting(kernels::host_ports(result, "sshd")[0], "")?;
        assert!(greeted.starts_with("SSH-2.0-"), "{greeted}");
        let page = greeting(
            kernels::host_ports(result, "ttyd")[0],
            "GET / HTTP/1.0\r\n\r\n",
        )?;
        assert!(page.starts_with("HTTP/1"), "{page}");
        Ok(())
    };
    check(&one, &first)?;
    check(&two, &second)?;
    let hosts = inspect(container_of(&first))?["HostConfig"]["ExtraHosts"].clone();
    assert!(hosts.to_string().contains("other:127.0.0.2"), "{hosts}");

    // Its network is the host's: no number of it is the kernel's.
    let sample = wait::until("a sample", SOON, || async {
        let stats = kernels::ask(&node, "bai.stats", Vec::new()).await.ok()?;
        let sample = stats["kernels"][one.kernel.to_string()].clone();
        (sample["memory"]["current"].as_u64()? > 0).then_some(sample)
    })
    .await?;
    assert!(
        sample["net"]["rx_bytes"].is_null() && sample["net"]["tx_bytes"].is_null(),
        "{sample}"
    );

    // Known again after a crash, also when the journal is lost.
    node.kill_control()?;
    let journal = node
        .state()
        .join("kernels")
        .join(node.agent_id())
        .join(format!("{}.json", two.kernel));
    std::fs::remove_file(&journal).with_context(|| journal.display().to_string())?;
    node.start_control().await?;
    for order in [&one, &two] {
        assert_eq!(output_of(&node, order, "echo again").await?, "again\n");
    }
    kernels::destroy(&node, &one).await?;
    kernels::destroy(&node, &two).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_publishes_where_it_is_told_to() -> Result<()> {
    let mut node = Node::start(NodeOptions {
        node: "publish = \"engine\"\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let bindings = inspect(container_of(&result))?["HostConfig"]["PortBindings"].clone();
    let web = kernels::host_ports(&result, "web")[0];
    assert_eq!(
        bindings["8080/tcp"],
        json!([{"HostIp": "127.0.0.1", "HostPort": web.to_string()}])
    );
    // The runner is reached through the engine, too: the container's address may be out of reach.
    for (port, key) in [("2000/tcp", "repl_in_port"), ("2001/tcp", "repl_out_port")] {
        assert_eq!(
            bindings[port],
            json!([{"HostIp": "127.0.0.1", "HostPort": result[key].to_string()}])
        );
    }
    start_service(&node, &order, "web").await?;
    assert!(kernels::fetch(web, "/")?.contains("It works"));
    let shown = wait::until("the rows are observed", SOON, || async {
        let shown = kernels::ask(&node, "bai.ports", Vec::new()).await.ok()?;
        let list = shown["ports"].as_array()?.clone();
        list.iter()
            .all(|port| port["path"] == "engine" && port["state"] == "serving")
            .then_some(list)
    })
    .await?;
    assert_eq!(shown.len(), 3, "{shown:?}");
    // Recovery, with the journal and without.
    for lost in [false, true] {
        node.kill_control()?;
        if lost {
            let journal = node
                .state()
                .join("kernels")
                .join(node.agent_id())
                .join(format!("{}.json", order.kernel));
            std::fs::remove_file(&journal).with_context(|| journal.display().to_string())?;
        }
        node.start_control().await?;
        assert_eq!(output_of(&node, &order, "echo again").await?, "again\n");
        assert!(kernels::fetch(web, "/")?.contains("It works"));
    }
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await?;

    // Defect 16 of the original, where the engine finds the port in use.
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let web = kernels::host_ports(&result, "web")[0];
    let thief = Thief::waiting_for(web);
    let after = restart(&node, &order).await?;
    let _loot = thief.loot()?;
    let moved = kernels::host_ports(&after, "web")[0];
    assert_ne!(moved, web);
    start_service(&node, &order, "web").await?;
    assert!(kernels::fetch(moved, "/")?.contains("It works"));
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

/// A Docker network that goes away with the value.
struct Bridge(String);

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = kernels::docker(&["network", "rm", &self.0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_are_put_on_the_alternative_bridge() -> Result<()> {
    let bridge = Bridge(format!("variants-{}", uuid::Uuid::new_v4().simple()));
    kernels::docker(&["network", "create", &bridge.0])?;
    let node = Node::start(NodeOptions {
        container: format!("alternative-bridge = \"{}\"\n", bridge.0),
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let networks = inspect(container_of(&result))?["NetworkSettings"]["Networks"].clone();
    let names: Vec<&String> = networks.as_object().context("a map")?.keys().collect();
    assert_eq!(names, [&bridge.0]);
    start_service(&node, &order, "web").await?;
    assert!(kernels::fetch(kernels::host_ports(&result, "web")[0], "/")?.contains("It works"));
    // It takes the place of the host's network, too: such a kernel has ports like any other.
    let mut hosted = Order::of(Image::Runner)?;
    hosted.cluster["network_config"] = json!({"mode": "host", "network_name": "host"});
    let result = kernels::create(&node, &hosted).await?;
    let networks = inspect(container_of(&result))?["NetworkSettings"]["Networks"].clone();
    assert!(networks[&bridge.0].is_object(), "{networks}");
    let greeted = greeting(kernels::host_ports(&result, "sshd")[0], "")?;
    assert!(greeted.starts_with("SSH-2.0-"), "{greeted}");
    kernels::destroy(&node, &hosted).await?;
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_users_and_private_files_are_as_asked_for() -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let node = Node::start(NodeOptions::default()).await?;
    let folder = tempfile::tempdir()?;
    std::fs::create_dir_all(folder.path().join("deep/er"))?;
    std::fs::write(folder.path().join("deep/er/file"), "sub\n")?;
    std::fs::write(folder.path().join("file"), "top\n")?;
    for directory in ["", "deep/er"] {
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(folder.path().join(directory), open)?;
    }
    let mount = |name: &str, host: &Path, target: &str, permission: &str, sub: &str| {
        json!({"name": name, "vfid": null, "vfsubpath": sub, "host_path": host.display().to_string(),
            "kernel_path": target, "mount_perm": permission, "usage_mode": "general"})
    };
    let mut order = Order::of(Image::Runner)?;
    order.config["mounts"] = json!([
        mount("a", folder.path(), "/home/work/rw", "rw", "."),
        mount("b", folder.path(), "/home/work/ro", "ro", "."),
        mount(
            "c",
            &folder.path().join("deep/er"),
            "/mnt/sub",
            "wd",
            "deep/er"
        ),
    ]);
    order.config["uid"] = json!(1500);
    order.config["main_gid"] = json!(1600);
    order.config["supplementary_gids"] = json!([1700, 1701]);
    order.config["bootstrap_script"] = json!("#!/bin/sh\nid -u > /home/work/booted\n");
    order.config["internal_data"] = json!({
        "dotfiles": [
            {"path": ".deep/dot", "data": "relative", "perm": "600"},
            {"path": "/home/work/.absolute", "data": "absolute\n", "perm": "755"},
        ],
        "ssh_keypair": {"public_key": "ssh-rsa AAAA given\n", "private_key": "not a real key\n"},
        "docker_credentials": {"registry": "secret"},
        "sudo_session_enabled": true,
    });
    // A folder that is not there: told before anything is made.
    let mut missing = order.clone();
    let path = folder.path().join("absent");
    missing.config["mounts"] = json!([mount("gone", &path, "/home/work/gone", "rw", ".")]);
    let failure = kernels::fail_to_create(&node, &missing).await?;
    for words in ["gone", &path.display().to_string(), "does not exist"] {
        assert!(failure.repr.contains(words), "{words}: {}", failure.repr);
    }
    kernels::assert_clean(&node).await?;
    assert!(!node.scratch(&missing.kernel.to_string()).exists());

    order.kernel = uuid::Uuid::new_v4();
    order.config["kernel_id"] = json!(order.kernel.to_string());
    let result = kernels::create(&node, &order).await?;
    let seen = output_of(&node, &order, "id -u; id -g; id -G; cat booted rw/file ro/file /mnt/sub/file .deep/dot .absolute; \
        echo new > rw/new; { echo no > ro/no; } 2>/dev/null || echo refused; echo deeper > /mnt/sub/new; \
        cat .ssh/authorized_keys .ssh/id_rsa id_container; env | grep -E '^(LOCAL_USER_ID|LOCAL_GROUP_ID)=' | sort").await?;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[..2], ["1500", "1600"], "{seen}");
    let mut groups: Vec<&str> = lines[2].split(' ').collect();
    groups.sort_unstable();
    assert_eq!(groups, ["1000", "1600", "1700", "1701", "42"], "{seen}");
    assert_eq!(
        lines[3..9],
        ["1500", "top", "top", "sub", "relative", "absolute"],
        "{seen}"
    );
    assert!(seen.contains("refused"), "{seen}");
    assert!(seen.contains("ssh-rsa AAAA given\n"), "{seen}");
    assert_eq!(seen.matches("not a real key").count(), 2, "{seen}");
    assert!(
        seen.contains("LOCAL_GROUP_ID=1600\nLOCAL_USER_ID=1500\n"),
        "{seen}"
    );
    assert_eq!(std::fs::read_to_string(folder.path().join("new"))?, "new\n");
    assert_eq!(
        std::fs::read_to_string(folder.path().join("deep/er/new")).unwrap_or_default(),
        "deeper\n"
    );
    assert!(!folder.path().join("no").exists());
    let sudo = kernels::docker(&[
        "exec",
        container_of(&result),
        "sh",
        "-c",
        "cat /etc/sudoers.d/01-bai-work",
    ])?;
    assert!(
        sudo.contains("work ALL") && sudo.contains("NOPASSWD"),
        "{sudo}"
    );
    // Nobody starts a service in a kernel that blocks them; root is root.
    let mut root = Order::of(Image::Runner)?;
    root.config["uid"] = json!(0);
    root.config["main_gid"] = json!(0);
    root.config["internal_data"] =
        json!({"block_service_ports": true, "prevent_vfolder_mounts": true});
    root.config["mounts"] = json!([
        mount("a", folder.path(), "/home/work/a", "rw", "."),
        mount(".logs", folder.path(), "/home/work/.logs", "rw", "."),
    ]);
    kernels::create(&node, &root).await?;
    assert!(start_service(&node, &root, "web").await.is_err());
    let seen_by_root = output_of(&node, &root, "id -u; ls -d a .logs 2>/dev/null || true").await?;
    assert_eq!(seen_by_root, "0\n.logs\n");
    kernels::destroy(&node, &root).await?;
    // Owners and modes on the host.
    let scratch = node.scratch(&order.kernel.to_string());
    for (file, mode, uid) in [
        ("work/.deep/dot", 0o600, 1500),
        ("work/.absolute", 0o755, 1500),
        ("work/.ssh", 0o700, 1500),
        ("work/.ssh/authorized_keys", 0o600, 1500),
        ("work/.ssh/id_rsa", 0o600, 1500),
        ("work/id_container", 0o600, 1500),
        ("work/bootstrap.sh", 0o644, 1500),
    ] {
        let found = std::fs::metadata(scratch.join(file)).context(file)?;
        assert_eq!(
            (found.permissions().mode() & 0o777, found.uid()),
            (mode, uid),
            "{file}"
        );
    }
    let credentials: Json = serde_json::from_str(&std::fs::read_to_string(
        scratch.join("config/docker-creds.json"),
    )?)?;
    assert_eq!(credentials, json!({"registry": "secret"}));

    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await?;
    // The folder is the user's: nothing of it goes with the kernel.
    assert_eq!(std::fs::read_to_string(folder.path().join("new"))?, "new\n");
    Ok(())
}

// Defects 3, 5 and 6 of the original: ends without a code, left scratches, leaked ports.
#[tokio::test(flavor = "multi_thread")]
async fn defect_a_container_that_ends_by_itself_leaves_things_behind() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    // How it ends, the exit code to be told, whether its console can still be read.
    type End = fn(&str) -> Result<String>;
    let ways: [(&str, End, Option<i64>, &str); 4] = [
        (
            "its runner is killed",
            |id| {
                let shown = kernels::docker(&["top", id, "-eo", "pid,args"])?;
                let line = shown
                    .lines()
                    .find(|line| line.contains("bai-krunner"))
                    .context(shown.clone())?;
                let pid: i32 = line.split_whitespace().next().context("a pid")?.parse()?;
                nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(pid),
                    nix::sys::signal::Signal::SIGKILL,
                )?;
                Ok(String::new())
            },
            Some(137),
            "self-terminated",
        ),
        (
            "it is killed",
            |id| kernels::docker(&["kill", id]),
            Some(137),
            "self-terminated",
        ),
        (
            "it is stopped",
            |id| kernels::docker(&["stop", id]),
            Some(0),
            "self-terminated",
        ),
        // Somebody else takes it away: nothing to read any more.
        (
            "it is removed",
            |id| kernels::docker(&["rm", "-f", id]),
            None,
            "self-terminated",
        ),
    ];
    let mut waiting = Vec::new();
    for (how, end, code, reason) in ways {
        let order = Order::of(Image::Runner)?;
        let result = kernels::create(&node, &order).await?;
        let id = container_of(&result).to_owned();
        output_of(&node, &order, "echo its last words").await?;
        tokio::task::spawn_blocking(move || end(&id)).await??;
        waiting.push((how, order, code, reason));
    }
    for (how, order, code, reason) in waiting {
        let end = kernels::wait_end(&node, order.kernel).await?;
        assert_eq!(end.0, reason, "{how}");
        if let Some(code) = code {
            assert_eq!(end.1, code, "{how}");
            let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)]).await?;
            assert!(
                logs["logs"].to_string().contains("its last words"),
                "{how}: {logs}"
            );
        }
        kernels::destroy(&node, &order).await?;
        let ends = kernels::ends(&node, order.kernel).await?;
        assert_eq!(
            ends.iter()
                .filter(|(reason, _)| reason != "already-terminated")
                .count(),
            1,
            "{how}: {ends:?}"
        );
    }
    kernels::assert_clean(&node).await
}

// Defects 3 and 14 of the original: a container that cannot run was waited for.
#[tokio::test(flavor = "multi_thread")]
async fn defect_an_image_that_cannot_run_is_waited_for() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let id = uuid::Uuid::new_v4().simple().to_string();
    let labels = [
        "LABEL ai.backend.base-distro=ubuntu22.04",
        "LABEL ai.backend.kernelspec=1",
    ];
    // No shell at all; and a shell, but no C library for the runner.
    let mut no_shell = images::busybox_files(&[])?;
    no_shell.retain(|file| !file.path.ends_with("sh"));
    let no_shell = images::import(&format!("variants-noshell:{id}"), &no_shell, &labels)?;
    let no_libc = images::import(
        &format!("variants-nolibc:{id}"),
        &images::busybox_files(&["cat", "date", "chown", "cut", "tr", "ln"])?,
        &labels,
    )?;
    for image in [&no_shell, &no_libc] {
        let order = Order::named(&image.name)?;
        let began = Instant::now();
        let failure = kernels::fail_to_create(&node, &order).await?;
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "{:?}",
            began.elapsed()
        );
        assert_eq!(failure.class, "AgentError");
        assert!(
            failure.repr.contains("exit code 127") || failure.repr.contains("exit code 1"),
            "{}",
            failure.repr
        );
        assert!(
            failure.repr.contains("entrypoint.sh") || failure.repr.contains("not found"),
            "{}",
            failure.repr
        );
        let ends = kernels::ends(&node, order.kernel).await?;
        assert_eq!(ends.len(), 1, "{ends:?}");
        assert_eq!(ends[0].0, "failed-to-start");
        assert!(ends[0].1 > 0, "{ends:?}");
        kernels::assert_clean(&node).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_on_one_engine_leave_each_other_alone() -> Result<()> {
    let quick = || NodeOptions {
        agent: "sync-container-lifecycles = { enabled = true, interval = 0.5 }\n".to_owned(),
        ..NodeOptions::default()
    };
    let (mut one, mut two) = (Node::start(quick()).await?, Node::start(quick()).await?);
    let (first, second) = (Order::of(Image::Runner)?, Order::of(Image::Runner)?);
    kernels::create(&one, &first).await?;
    let result = kernels::create(&two, &second).await?;
    // The other one's kernel is nobody's here.
    kernels::destroy(&two, &first).await?;
    assert_eq!(
        kernels::ends(&two, first.kernel).await?,
        [("already-terminated".to_owned(), -1)]
    );
    // A crash, a recovery and several comparisons on either side.
    one.kill_control()?;
    two.kill_control()?;
    one.start_control().await?;
    two.start_control().await?;
    for (node, order) in [(&one, &first), (&two, &second)] {
        assert_eq!(node.containers()?.len(), 1);
        assert_eq!(output_of(node, order, "echo here").await?, "here\n");
        assert_eq!(kernels::ends(node, order.kernel).await?, []);
    }
    kernels::destroy(&one, &first).await?;
    kernels::assert_clean(&one).await?;
    assert_eq!(inspect(container_of(&result))?["State"]["Running"], true);
    kernels::destroy(&two, &second).await?;
    kernels::assert_clean(&two).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oom_kill_ends_the_command_and_not_the_kernel() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.config["resource_slots"]["mem"] = json!("134217728");
    kernels::create(&node, &order).await?;
    let ran = kernels::run(&node, &order, "tail /dev/zero; exit $?").await?;
    assert_eq!(ran.exit_code, Some(137), "{ran:?}");
    // The runner was told, and says so on the console.
    wait::until("the runner's warning", SOON, || async {
        let logs = kernels::ask(&node, "get_logs", vec![text(order.kernel)])
            .await
            .ok()?;
        let logs = logs["logs"].as_str()?.to_lowercase();
        (logs.contains("oom") || logs.contains("out of memory")).then_some(())
    })
    .await?;
    let counted = wait::until("the kill is counted", SOON, || async {
        let stats = kernels::ask(&node, "bai.stats", Vec::new()).await.ok()?;
        stats["kernels"][order.kernel.to_string()]["memory"]["oom_kill"]
            .as_u64()
            .filter(|count| *count > 0)
    })
    .await;
    assert!(
        counted.is_ok(),
        "{}",
        kernels::ask(&node, "bai.stats", Vec::new()).await?
    );
    assert_eq!(output_of(&node, &order, "echo alive").await?, "alive\n");
    kernels::destroy(&node, &order).await?;
    assert_eq!(
        kernels::ends(&node, order.kernel).await?,
        [("user-requested".to_owned(), 0)]
    );
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_container_is_no_hindrance() -> Result<()> {
    let node = Node::start(NodeOptions {
        agent: "sync-container-lifecycles = { enabled = true, interval = 0.5 }\n".to_owned(),
        sections: "[debug]\nskip-container-deletion = true\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    let after = restart(&node, &order).await?;
    assert_eq!(output_of(&node, &order, "echo again").await?, "again\n");
    kernels::destroy(&node, &order).await?;
    // Kept for the person who debugs, stopped, and nobody's kernel.
    assert_eq!(node.containers()?, [container_of(&after)]);
    assert_eq!(inspect(container_of(&after))?["State"]["Running"], false);
    kernels::docker(&["rm", container_of(&after)])?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inference_kernel_serves_its_model() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let folder = tempfile::tempdir()?;
    std::fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )?;
    std::fs::write(folder.path().join("index.html"), "the model\n")?;
    let definition = "models:\n- name: echo\n  model_path: /models\n  service:\n    \
        start_command: [busybox, httpd, -f, -p, '8600', -h, /models]\n    shell: /bin/sh\n    port: 8600\n    \
        health_check:\n      path: /index.html\n      interval: 0.5\n      max_retries: 20\n";
    std::fs::write(folder.path().join("model-definition.yaml"), definition)?;
    let mut order = Order::of(Image::Runner)?;
    order.config["session_type"] = json!("inference");
    order.config["mounts"] = json!([{
        "name": "model", "vfid": null, "vfsubpath": ".", "host_path": folder.path().display().to_string(),
        "kernel_path": "/models", "mount_perm": "ro", "usage_mode": "model",
    }]);
    order.config["internal_data"] =
        json!({"runtime_variant": "custom", "model_definition_path": null});
    let result = kernels::create(&node, &order).await?;
    let ports = kernels::host_ports(&result, "echo-8600");
    assert_eq!(ports.len(), 1, "{result}");
    let page = wait::until("the model answers", SOON, || async {
        kernels::fetch(ports[0], "/index.html")
            .ok()
            .filter(|page| page.contains("the model"))
    })
    .await?;
    assert!(page.starts_with("HTTP/1"), "{page}");
    let model = kernels::run(
        &node,
        &order,
        "echo $BACKEND_MODEL_NAME $BACKEND_MODEL_PATH",
    )
    .await?;
    assert_eq!(model.output, "echo /models\n");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await?;

    // A definition that is none is told before anything is made.
    std::fs::write(
        folder.path().join("model-definition.yaml"),
        "models: nonsense\n",
    )?;
    let mut broken = order.clone();
    broken.kernel = uuid::Uuid::new_v4();
    broken.config["kernel_id"] = json!(broken.kernel.to_string());
    let failure = kernels::fail_to_create(&node, &broken).await?;
    assert!(
        failure.repr.contains("model-definition.yaml"),
        "{}",
        failure.repr
    );
    kernels::assert_clean(&node).await
}
