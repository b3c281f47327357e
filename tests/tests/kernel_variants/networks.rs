//! Host ports, clusters, host networks, engine bindings, other bridges.

use super::*;

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
/// The engine in a swarm of its own, and a network over it as the manager makes it.
struct Swarm {
    network: String,
    begun: bool,
}

impl Swarm {
    fn begin() -> Result<Swarm> {
        let state = kernels::docker(&["info", "-f", "{{.Swarm.LocalNodeState}}"])?;
        let begun = state != "active";
        if begun {
            let here = [
                "--advertise-addr",
                "127.0.0.1",
                "--listen-addr",
                "127.0.0.1",
            ];
            kernels::docker(&[&["swarm", "init"], &here[..]].concat())?;
        }
        let network = format!("variants-{}", uuid::Uuid::new_v4().simple());
        let swarm = Swarm { network, begun };
        kernels::docker(&[
            "network",
            "create",
            "-d",
            "overlay",
            "--attachable",
            &swarm.network,
        ])?;
        Ok(swarm)
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        let _ = kernels::docker(&["network", "rm", &self.network]);
        if self.begun {
            let _ = kernels::docker(&["swarm", "leave", "--force"]);
            let _ = kernels::docker(&["network", "rm", "docker_gwbridge"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kernels_on_an_overlay_meet_there_and_are_reached_through_its_gateway() -> Result<()> {
    let swarm = Swarm::begin()?;
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    order.cluster["network_config"] = json!({"mode": "overlay", "network_name": swarm.network});
    // The engine makes the gateway for the first container that needs it.
    let mut other = Order::of(Image::Runner)?;
    other.cluster = order.cluster.clone();
    let outcome = async {
        kernels::create(&node, &other).await?;
        let result = kernels::create(&node, &order).await?;
        let found = inspect(container_of(&result))?;
        let subnet = kernels::docker(&[
            "network",
            "inspect",
            "-f",
            "{{(index .IPAM.Config 0).Subnet}}",
            "docker_gwbridge",
        ])?;
        let wanted = format!("OMPI_MCA_btl_tcp_if_exclude=127.0.0.1/32,{subnet}");
        let environment = found["Config"]["Env"].as_array().context("Env")?;
        assert!(environment.contains(&json!(wanted)), "{environment:?}");
        let endpoint = &found["NetworkSettings"]["Networks"][&swarm.network];
        let own = endpoint["IPAddress"].as_str().unwrap_or_default();
        ensure!(!own.is_empty(), "{found}");
        // Its runner and its services are reached although this host has no way to that address ...
        let said = output_of(&node, &order, "ip -4 -o addr show").await?;
        assert!(said.contains(own), "{said:?} without {own}");
        start_service(&node, &order, "web").await?;
        let web = kernels::host_ports(&result, "web")[0];
        assert!(kernels::fetch(web, "/")?.contains("It works"));
        // ... and other kernels reach it there.
        let page = format!(
            "/opt/backend.ai/bin/python -c 'from urllib.request import urlopen; \
             print(urlopen(\"http://{own}:8080/\", timeout=10).read())'"
        );
        let said = output_of(&node, &other, &page).await?;
        assert!(said.contains("It works"), "{said}");
        // What it gets there is counted, though its link there has no end on this host.
        let send = format!(
            "/opt/backend.ai/bin/python -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
             for _ in range(3000): s.sendto(bytes(1400), (\"{own}\", 9))'"
        );
        output_of(&node, &other, &send).await?;
        let counted = async || -> Result<u64> {
            let files = "cat /sys/class/net/eth*/statistics/rx_bytes";
            let said = output_of(&node, &order, files).await?;
            Ok(said.lines().filter_map(|line| line.parse::<u64>().ok()).sum())
        };
        let before = counted().await?;
        ensure!(before > 3000 * 1400, "{before}");
        let told = wait::until("a sample with these", SOON, || async {
            let stats = kernels::ask(&node, "bai.stats", Vec::new()).await.ok()?;
            let net = &stats["kernels"][order.kernel.to_string()]["net"];
            net["rx_bytes"].as_u64().filter(|told| *told >= before)
        })
        .await?;
        let after = counted().await?;
        assert!(told <= after, "{before} {told} {after}");
        // The metadata service knows it by its address behind the gateway.
        let ask = format!(
            "printf 'GET /latest/meta-data/local-ipv4 HTTP/1.0\\r\\n\\r\\n' | \
             busybox nc -w 5 $(ip route | busybox awk '/^default/ {{print $3}}') {}",
            node.metadata_port()
        );
        let said = output_of(&node, &order, &ask).await?;
        assert!(said.starts_with("HTTP/1.0 200 OK"), "{said}");
        let address = said.lines().last().context("an address")?;
        let shown = output_of(&node, &order, "ip -4 -o addr show").await?;
        assert!(
            address != own && shown.contains(&format!(" {address}/")),
            "{address}: {shown}"
        );
        kernels::destroy(&node, &other).await?;
        kernels::destroy(&node, &order).await?;
        kernels::assert_clean(&node).await
    }
    .await;
    drop(swarm);
    outcome
}

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
    // As newer managers have it.
    let by_id = kernels::ask(&node, "assign_port", Vec::new()).await?;
    let by_id = u16::try_from(by_id.as_u64().context("a port")?)?;
    let key = format!("node-{}", two.kernel);
    two.cluster["cluster_ssh_port_mapping"] = json!({key: ["127.0.0.1", by_id]});
    two.config["environ"]["BACKENDAI_CLUSTER_HOSTS"] = json!("sub1");
    // It names a port that is the other's.
    two.config["image"]["labels"]["ai.backend.service-ports"] =
        json!(format!("own:http:{assigned}"));
    let first = kernels::create(&node, &one).await?;
    // Two on the same network do not meet.
    let second = kernels::create(&node, &two).await?;
    assert_eq!(kernels::host_ports(&first, "sshd"), [assigned]);
    assert_eq!(kernels::host_ports(&second, "sshd"), [by_id]);
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
    wait::until("the port is still the first's", SOON, || async {
        let shown = kernels::ask(&node, "bai.ports", Vec::new()).await.ok()?;
        let states: std::collections::HashMap<String, bool> = shown["ports"]
            .as_array()?
            .iter()
            .filter(|port| port["host_port"] == assigned)
            .map(|port| (port["kernel_id"].to_string(), port["state"] == "serving"))
            .collect();
        let of = |order: &Order| states.get(&json!(order.kernel).to_string()).copied();
        ((of(&one)?, of(&two)?) == (true, false)).then_some(())
    })
    .await?;
    let hosts = inspect(container_of(&first))?["HostConfig"]["ExtraHosts"].clone();
    assert!(hosts.to_string().contains("other:127.0.0.2"), "{hosts}");
    let hosts = inspect(container_of(&second))?["HostConfig"]["ExtraHosts"].clone();
    assert!(hosts.to_string().contains("sub1:127.0.0.1"), "{hosts}");

    // Its network is the host's: no number of it is the kernel's.
    let sample = wait::until("a sample", SOON, || async {
        let stats = kernels::ask(&node, "bai.stats", Vec::new()).await.ok()?;
        let sample = stats["kernels"][one.kernel.to_string()].clone();
        (sample["memory"]["current_bytes"].as_u64()? > 0).then_some(sample)
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
async fn ports_follow_a_container_that_is_moved_between_networks_by_hand() -> Result<()> {
    let bridge = Bridge(format!("variants-{}", uuid::Uuid::new_v4().simple()));
    kernels::docker(&["network", "create", &bridge.0])?;
    let node = Node::start(NodeOptions::default()).await?;
    let mut order = Order::of(Image::Runner)?;
    // The runner answers after that. The first move comes before.
    let script = "until [ -e /home/work/go ]; do sleep 0.1; done\n";
    order.config["bootstrap_script"] = json!(script);
    let moving = async {
        wait::until("its runner is waited for", SOON, || async {
            let events = kernels::events(&node, order.kernel).await.ok()?;
            let mut steps = events.iter().map(|(_, args)| &args[1]);
            steps
                .any(|step| step == "waiting for the runner")
                .then_some(())
        })
        .await?;
        let container = node.containers()?.first().context("its container")?.clone();
        let networks = inspect(&container)?["NetworkSettings"]["Networks"].clone();
        let names: Vec<&String> = networks.as_object().context("a map")?.keys().collect();
        let [first] = names[..] else {
            anyhow::bail!("one network at first: {networks}");
        };
        kernels::docker(&["network", "connect", &bridge.0, &container])?;
        kernels::docker(&["network", "disconnect", first, &container])?;
        assert!(kernels::state(&node, order.kernel).await?.as_deref() != Some("running"));
        let scratch = node.scratch(&order.kernel.to_string());
        std::fs::write(scratch.join("work").join("go"), "")?;
        Ok(first.clone())
    };
    let (result, first) = tokio::try_join!(kernels::create(&node, &order), moving)?;
    let container = container_of(&result);
    start_service(&node, &order, "web").await?;
    let web = kernels::host_ports(&result, "web")[0];
    wait::until("the port leading where it began", SOON, || async {
        let page = kernels::fetch(web, "/").ok()?;
        page.contains("It works").then_some(())
    })
    .await?;
    // Back and there; the address that the port leads to is another each time.
    for (to, from) in [(&first, &bridge.0), (&bridge.0, &first)] {
        kernels::docker(&["network", "connect", to, container])?;
        kernels::docker(&["network", "disconnect", from, container])?;
        // The old address is nobody's now.
        wait::until("the port leading to the new address", SOON, || async {
            let page = kernels::fetch(web, "/").ok()?;
            page.contains("It works").then_some(())
        })
        .await?;
        assert_eq!(output_of(&node, &order, "echo here").await?, "here\n");
    }
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_is_reached_that_was_moved_while_a_new_agent_looked_for_it() -> Result<()> {
    let bridge = Bridge(format!("variants-{}", uuid::Uuid::new_v4().simple()));
    kernels::docker(&["network", "create", &bridge.0])?;
    let engine = FaultDocker::start()?;
    let mut node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..NodeOptions::default()
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    let result = kernels::create(&node, &order).await?;
    let container = container_of(&result);
    let networks = inspect(container)?["NetworkSettings"]["Networks"].clone();
    let names: Vec<&String> = networks.as_object().context("a map")?.keys().collect();
    let [first] = names[..] else {
        anyhow::bail!("one network at first: {networks}");
    };

    node.stop_control()?;
    // The first look is for the rows, the second for the link to the runner.
    let look = format!("/containers/{container}/json");
    engine.spoil(&look, Fault::CutAfter(usize::MAX), 1);
    engine.spoil(&look, Fault::Keep, 1);
    node.start_control().await?;
    wait::until("the look for the runner", SOON, || async {
        (engine.kept() == 1).then_some(())
    })
    .await?;
    let looks = || {
        let requests = engine.requests();
        requests.iter().filter(|line| line.contains(&look)).count()
    };
    let before = looks();
    kernels::docker(&["network", "connect", &bridge.0, container])?;
    kernels::docker(&["network", "disconnect", first, container])?;
    // Time enough for a look that waits for no other.
    let overtaken = wait::until("a look meanwhile", Duration::from_secs(3), || async {
        (looks() > before).then_some(())
    });
    assert!(overtaken.await.is_err(), "a later look came first");
    engine.let_go();
    // What is written to where the runner was before the agent knows better is lost with the connection.
    let there = inspect(container)?["NetworkSettings"]["Networks"][&bridge.0]["IPAddress"].clone();
    let input = format!("{}:2000", there.as_str().context("an address")?);
    wait::until("the link stands where the runner is", SOON, || async {
        let words = ["-Htn", "state", "established", "dst", &input];
        let found = std::process::Command::new("ss").args(words).output().ok()?;
        (!found.stdout.is_empty()).then_some(())
    })
    .await?;
    assert_eq!(output_of(&node, &order, "echo here").await?, "here\n");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
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
