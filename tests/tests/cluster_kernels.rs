//! Kernels of a node in a cluster of a real etcd and a real Redis: what they leave there, what managers order over the bus,
//! and what is told whatever becomes of the bus, the engine or the agent.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use control::rpc::Value;
use harness::etcd::EtcdServer;
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::Image;
use harness::kernels::{self, Order, text};
use harness::node::{Node, NodeOptions};
use harness::redis::{Gate, Redis, RedisClient, StreamEntry};
use harness::wait;
use serde_json::{Value as Json, json};

const LIMIT: Duration = Duration::from_secs(90);
/// For what is told twice a minute.
const LONG: Duration = Duration::from_secs(180);

struct Cluster {
    etcd: EtcdServer,
    redis: Redis,
}

impl Cluster {
    /// Stores where a manager says that it is up. With a gate the node reaches Redis through it.
    async fn start() -> Result<Cluster> {
        let (etcd, redis) = (EtcdServer::start().await?, Redis::start()?);
        let cluster = Cluster { etcd, redis };
        cluster.put("nodes/manager/m1", "up").await?;
        cluster.redis_is_at(cluster.redis.port).await?;
        Ok(cluster)
    }

    async fn redis_is_at(&self, port: u16) -> Result<()> {
        self.put("config/redis/addr", &format!("127.0.0.1:{port}"))
            .await
    }

    async fn put(&self, key: &str, value: &str) -> Result<()> {
        let key = format!("/sorna/local/{key}");
        self.etcd.client().await?.put(key, value, None).await?;
        Ok(())
    }

    /// A node of it; `sections` are added.
    fn options(&self, sections: &str) -> NodeOptions {
        NodeOptions {
            cluster: true,
            sections: self.etcd.section("local") + sections,
            ..NodeOptions::default()
        }
    }

    /// Events of one kernel on the stream, oldest first: name and arguments.
    fn told_of(&self, order: &Order) -> Result<Vec<(String, Vec<Value>)>> {
        let kernel = Value::Str(order.kernel.to_string());
        let mut told = Vec::new();
        for entry in self.redis.stream()? {
            let args = entry.args();
            if args.first() == Some(&kernel) {
                told.push((entry.text("name"), args));
            }
        }
        Ok(told)
    }

    fn count_of(&self, name: &str) -> usize {
        let entries = self.redis.stream().unwrap_or_default();
        entries
            .iter()
            .filter(|entry| entry.text("name") == name)
            .count()
    }
}

fn names(told: &[(String, Vec<Value>)]) -> Vec<&str> {
    told.iter().map(|(name, _)| name.as_str()).collect()
}

/// Fields of a hash as JSON; what is no JSON as text.
fn hash(client: &mut RedisClient, key: &str) -> Result<BTreeMap<String, Json>> {
    let answer = client.ask(&["HGETALL", key])?;
    let pairs = answer.items()?.chunks_exact(2);
    pairs
        .map(|pair| {
            let text = pair[1].text()?;
            let value = serde_json::from_str(&text).unwrap_or(Json::String(text));
            Ok((pair[0].text()?, value))
        })
        .collect()
}

/// A record of statistics, and how long it lives on in seconds.
fn record(client: &mut RedisClient, key: &str) -> Option<(Value, i64)> {
    let answer = client.ask(&["GET", key]).ok()?;
    let value = Value::decode(&Bytes::copy_from_slice(answer.bytes().ok()?)).ok()?;
    Some((value, client.ask(&["TTL", key]).ok()?.int().ok()?))
}

fn number(record: &Value, path: &[&str]) -> Option<f64> {
    let leaf = path
        .iter()
        .try_fold(record, |value, name| value.get(name))?;
    leaf.as_str()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_and_notices_lie_where_managers_look() -> Result<()> {
    let cluster = Cluster::start().await?;
    let engine = FaultDocker::start()?;
    let reports = tempfile::tempdir()?;
    let mut client = cluster.redis.client()?;
    // Another agent's, whose word counts for its own kernels.
    client.ask(&["HSET", "abuse_report", "of-another-agent", "detected"])?;
    let node = Node::start(NodeOptions {
        agent: format!(
            "abuse-report-path = \"{}\"\nannounce-addr = \"10.1.2.3:6103\"",
            reports.path().display()
        ),
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..cluster.options("")
    })
    .await?;
    let order = Order::of(Image::Runner)?;
    let made = kernels::create(&node, &order).await?;
    let container = made["container_id"].as_str().context("no id")?.to_owned();
    let kernel = order.kernel.to_string();
    let report = reports.path().join("report.1.json");
    std::fs::write(
        &report,
        format!("{{\"ID\": \"{kernel}\", \"CID\": \"{container}\"}}"),
    )?;

    // How slots are shown; kept for good.
    let shown = wait::until("slots are described", LIMIT, || {
        let found = hash(&mut client, "computer.metadata").unwrap_or_default();
        async move { (found.len() >= 2).then_some(found) }
    })
    .await?;
    assert_eq!(shown["ram"]["display_unit"], "GiB", "{shown:?}");
    assert_eq!(
        shown["cpu"]["number_format"]["round_length"], 0,
        "{shown:?}"
    );
    assert_eq!(client.ask(&["TTL", "computer.metadata"])?.int()?, -1);

    // Where Prometheus finds the node.
    let entry = wait::until("the node is entered for discovery", LIMIT, || {
        let keys = client.ask(&["KEYS", "service_discovery.agent.*"]);
        let key = keys.ok().and_then(|keys| keys.item(0).ok()?.text().ok());
        async move { key }
    })
    .await?;
    let fields = hash(&mut client, &entry)?;
    assert_eq!(fields["endpoint"]["prometheus_address"], "10.1.2.3:6103");
    assert_eq!(fields["endpoint"]["port"], 6103);
    assert_eq!(
        fields["display_name"],
        format!("agent-{}", node.agent_id()),
        "{fields:?}"
    );
    assert!(
        entry.ends_with(fields["id"].as_str().unwrap()),
        "{fields:?}"
    );
    let life = client.ask(&["TTL", &entry])?.int()?;
    assert!((1..=180).contains(&life), "{life}");

    let count = format!("container_count.{}", node.agent_id());
    wait::until("the container is counted", LIMIT, || {
        let counted = client.ask(&["GET", &count]).and_then(|count| count.text());
        async move { (counted.ok()? == "1").then_some(()) }
    })
    .await?;

    // Statistics of node, kernel and processes, each with its life.
    let agent = node.agent_id().to_owned();
    for (key, path, lives) in [
        (agent.as_str(), &["node", "mem", "current"][..], 1..=120),
        (kernel.as_str(), &["mem", "current"][..], 80_000..=86_400),
    ] {
        let (found, life) = wait::until("a record", LIMIT, || {
            let found = record(&mut client, key);
            async move { found.filter(|(found, _)| number(found, path).is_some()) }
        })
        .await?;
        assert!(number(&found, path).unwrap() > 0.0, "{found:?}");
        assert!(lives.contains(&life), "{key} lives {life} s");
    }
    let processes = wait::until("a record of processes", LIMIT, || {
        let found = record(&mut client, &container);
        async move { found }
    })
    .await?;
    assert!((0..=9).contains(&processes.1), "{} s", processes.1);
    let (_, first) = processes
        .0
        .as_map()
        .unwrap()
        .first()
        .context("no process")?;
    assert!(number(first, &["mem", "current"]).is_some(), "{first:?}");

    // A commit under way is told while it lasts.
    engine.spoil("/commit", Fault::Hang, 1);
    let args = vec![
        text(order.kernel),
        Value::from("user_example.com"),
        Value::from("a/b:c"),
        Value::Map(vec![]),
        Value::from("kept.tar.gz"),
    ];
    kernels::ask(&node, "commit", args).await?;
    let key = format!("kernel.{kernel}.commit");
    wait::until("the commit is told", LIMIT, || {
        let told = client.ask(&["GET", &key]).and_then(|word| word.text());
        async move { (told.ok()? == "ongoing").then_some(()) }
    })
    .await?;
    let life = client.ask(&["TTL", &key])?.int()?;
    assert!((0..=13).contains(&life), "{life}");
    let status = || async {
        let args = vec![text(order.kernel), Value::from("user_example.com")];
        kernels::ask(&node, "get_commit_status", args).await
    };
    assert_eq!(
        status().await?,
        json!({"kernel": kernel, "status": "ongoing"})
    );
    engine.cut_all();
    wait::until("its end is told", LIMIT, || {
        let there = client.ask(&["EXISTS", &key]).and_then(|there| there.int());
        async move { (there.ok()? == 0).then_some(()) }
    })
    .await?;
    assert_eq!(
        status().await?,
        json!({"kernel": kernel, "status": "ready"})
    );

    // Reported kernels, without a word on those of others.
    let reported = async |client: &mut RedisClient, wanted: Option<&str>| {
        wait::until("the report is told", LONG, || {
            let told = hash(client, "abuse_report").unwrap_or_default();
            let word = told.get(&kernel).and_then(Json::as_str).map(str::to_owned);
            let others = told.contains_key("of-another-agent");
            async move { (others && word.as_deref() == wanted).then_some(()) }
        })
        .await
    };
    reported(&mut client, Some("detected")).await?;
    std::fs::remove_file(&report)?;
    reported(&mut client, None).await?;

    kernels::destroy(&node, &order).await?;
    // The manager reads the last record of a kernel after its end.
    assert!(record(&mut client, &kernel).is_some());
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn discovery_by_etcd_has_the_same_entry_as_keys() -> Result<()> {
    let cluster = Cluster::start().await?;
    // What Redis does not take keeps nothing from etcd.
    let mut client = cluster.redis.client()?;
    client.ask(&["SET", "computer.metadata", "no hash"])?;
    let node = Node::start(NodeOptions {
        dataplane: false,
        ..cluster.options("[service-discovery]\ntype = \"etcd\"\n")
    })
    .await?;
    let prefix = "/sorna/local/ai/backend/service_discovery/agent/";
    let found = wait::until("the node is entered", LIMIT, || async {
        let all = cluster.etcd.dump().await.ok()?;
        let own: BTreeMap<String, String> = all
            .into_iter()
            .filter_map(|(key, value)| {
                let (_id, leaf) = key.strip_prefix(prefix)?.split_once('/')?;
                Some((leaf.to_owned(), value))
            })
            .collect();
        (!own.is_empty()).then_some(own)
    })
    .await?;
    assert_eq!(found["display_name"], format!("agent-{}", node.agent_id()));
    assert_eq!(found["endpoint/prometheus_address"], node.http_address());
    assert_eq!(found.len(), 10, "{found:?}");
    let keys = client.ask(&["KEYS", "service_discovery.agent.*"])?;
    assert!(keys.items()?.is_empty(), "{keys:?}");
    Ok(())
}

/// Orders volumes as a manager does, and hears the answers.
struct Orders {
    publisher: RedisClient,
    listener: RedisClient,
}

impl Orders {
    async fn of(redis: &Redis) -> Result<Orders> {
        let mut orders = Orders {
            publisher: redis.client()?,
            listener: redis.client()?,
        };
        orders.listener.ask(&["SUBSCRIBE", "events_all"])?;
        wait::until("the node listens", LIMIT, || {
            let heard = orders.publisher.ask(&["PUBSUB", "NUMSUB", "events_all"]);
            async move { (heard.ok()?.item(1).ok()?.int().ok()? >= 2).then_some(()) }
        })
        .await?;
        Ok(orders)
    }

    /// The answer's path and error.
    fn give(&mut self, name: &str, args: Vec<Value>) -> Result<(PathBuf, Option<String>)> {
        let args = STANDARD.encode(Value::Array(args).encode()?);
        let order = serde_json::json!({"name": name, "source": "i-manager", "args": args, "metadata": "{}"});
        self.publisher
            .ask(&["PUBLISH", "events_all", &order.to_string()])?;
        let answer = if name == "do_volume_mount" {
            "volume_mounted"
        } else {
            "volume_unmounted"
        };
        loop {
            let message = self.listener.read()?;
            let heard: Json = serde_json::from_slice(message.item(2)?.bytes()?)?;
            if heard["name"] != answer {
                continue;
            }
            let args = STANDARD.decode(heard["args"].as_str().context("no arguments")?)?;
            let args = Value::decode(&Bytes::from(args))?;
            let args = args.as_array().context("no list")?;
            ensure!(args.len() == 5, "{args:?}");
            assert_eq!(args[0].as_str(), heard["source"].as_str());
            assert_eq!(args[1].as_str(), Some("agent"));
            assert_eq!(args[3].as_str(), Some("user:u1"));
            let path = PathBuf::from(args[2].as_str().context("no path")?);
            return Ok((path, args[4].as_str().map(str::to_owned)));
        }
    }

    fn mount(&mut self, name: &str, location: &str) -> Result<(PathBuf, Option<String>)> {
        let words = [name, "backend", "user:u1", location, "tmpfs", "size=1m"].map(Value::from);
        let rest = [Value::Nil, Value::Bool(false), Value::from("/etc/fstab")];
        self.give("do_volume_mount", words.into_iter().chain(rest).collect())
    }

    fn unmount(&mut self, name: &str) -> Result<(PathBuf, Option<String>)> {
        let words = [name, "backend", "user:u1"].map(Value::from);
        let rest = [Value::Nil, Value::Bool(false), Value::Nil];
        self.give("do_volume_unmount", words.into_iter().chain(rest).collect())
    }
}

fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut points = table.lines().filter_map(|line| line.split(' ').nth(1));
    points.any(|point| Path::new(point) == path)
}

/// Takes away what a failed test has left mounted.
struct Mounts(tempfile::TempDir);

impl Drop for Mounts {
    fn drop(&mut self) {
        let _ = nix::mount::umount(&self.0.path().join("vol1"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn volumes_ordered_over_the_bus_are_mounted_refused_and_taken_away() -> Result<()> {
    let place = Mounts(tempfile::tempdir()?);
    let cluster = Cluster::start().await?;
    let options = |agent: String| NodeOptions {
        agent,
        dataplane: false,
        ..cluster.options("[node.volumes]\nallow = [\"tmpfs compat-memory\"]\n")
    };
    let node = Node::start(options(format!(
        "cohabiting-storage-proxy = false\nmount-path = \"{}\"",
        place.0.path().display()
    )))
    .await?;
    let mut orders = Orders::of(&cluster.redis).await?;
    let point = place.0.path().join("vol1");
    assert_eq!(
        orders.mount("vol1", "compat-memory")?,
        (point.clone(), None)
    );
    assert!(is_mounted(&point));
    let (_, why) = orders.mount("vol2", "somebody-elses")?;
    assert!(why.context("not refused")?.contains("node.volumes.allow"));
    let (path, why) = orders.mount("../vol3", "compat-memory")?;
    assert_eq!(path, Path::new(""));
    assert!(why.context("not refused")?.contains("volume name"));
    assert_eq!(std::fs::read_dir(place.0.path())?.count(), 1);
    assert_eq!(orders.unmount("vol1")?, (point.clone(), None));
    assert!(!is_mounted(&point) && !point.exists());
    drop(node);

    // With a storage proxy on the same host that one mounts; the answer is the original's.
    let _node = Node::start(options(String::new())).await?;
    let mut orders = Orders::of(&cluster.redis).await?;
    assert_eq!(
        orders.mount("vol1", "compat-memory")?,
        (PathBuf::new(), None)
    );
    assert_eq!(orders.unmount("vol1")?, (PathBuf::new(), None));
    assert!(!is_mounted(&point));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_volumes_are_mounted_is_asked_at_each_order() -> Result<()> {
    let (first, second) = (Mounts(tempfile::tempdir()?), Mounts(tempfile::tempdir()?));
    let mut cluster = Cluster::start().await?;
    let prefix = |place: &Mounts| place.0.path().display().to_string();
    cluster.put("volumes/_mount", &prefix(&first)).await?;
    let _node = Node::start(NodeOptions {
        agent: "cohabiting-storage-proxy = false".to_owned(),
        dataplane: false,
        ..cluster.options("[node.volumes]\nallow = [\"tmpfs compat-memory\"]\n")
    })
    .await?;
    let mut orders = Orders::of(&cluster.redis).await?;
    let point = first.0.path().join("vol1");
    assert_eq!(
        orders.mount("vol1", "compat-memory")?,
        (point.clone(), None)
    );
    cluster.etcd.stop(0);
    for answer in [
        orders.mount("vol1", "compat-memory")?,
        orders.unmount("vol1")?,
    ] {
        assert_eq!(answer.0, Path::new(""));
        let why = answer.1.context("nothing is told")?;
        assert!(why.contains("volumes/_mount"), "{why}");
    }
    assert!(is_mounted(&point) && !Path::new("/vol1").exists());
    cluster.etcd.restart(0).await?;
    assert_eq!(orders.unmount("vol1")?, (point.clone(), None));
    assert!(!is_mounted(&point));
    cluster.put("volumes/_mount", &prefix(&second)).await?;
    let point = second.0.path().join("vol1");
    assert_eq!(
        orders.mount("vol1", "compat-memory")?,
        (point.clone(), None)
    );
    assert!(is_mounted(&point));
    assert_eq!(orders.unmount("vol1")?, (point, None));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_without_the_bus_costs_no_lifecycle_event() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gate = Gate::before(cluster.redis.port).await?;
    cluster.redis_is_at(gate.port).await?;
    let node = Node::start(cluster.options("")).await?;
    let [before, during] = [Order::of(Image::Runner)?, Order::of(Image::Runner)?];
    // One that is there all the time.
    let lasting = Order::of(Image::Runner)?;
    let starts = |order: &Order| {
        let told = cluster.told_of(order).unwrap_or_default();
        let is_start = |name: &&str| *name == "kernel_started";
        names(&told).into_iter().filter(is_start).count()
    };
    // Soon after the start of the last one it is asked of: then its start is not told again.
    for order in [&before, &lasting] {
        kernels::create(&node, order).await?;
        wait::until("the kernel is told", LIMIT, || async {
            (starts(order) == 1).then_some(())
        })
        .await?;
    }
    // What a manager asks that has not read of the start.
    let check = || kernels::ask(&node, "check_creating", vec![text(lasting.kernel)]);
    assert_eq!(check().await?, json!(true));

    gate.shut();
    let cut = Instant::now();
    kernels::destroy(&node, &before).await?;
    kernels::create(&node, &during).await?;
    kernels::destroy(&node, &during).await?;
    // The minute is what is looked at.
    tokio::time::sleep(Duration::from_secs(60).saturating_sub(cut.elapsed())).await;
    assert_eq!(check().await?, json!(true));
    gate.open();

    let life = [
        "kernel_preparing",
        "kernel_creating",
        "kernel_started",
        "kernel_terminated",
        "do_sync_kernel_logs",
    ];
    for order in [&before, &during] {
        let told = wait::until("its events are there", LIMIT, || async {
            let told = cluster.told_of(order).ok()?;
            let all = |name: &&str| names(&told).contains(name);
            life.iter().all(all).then_some(told)
        })
        .await?;
        let once = |name: &&str| names(&told).iter().filter(|told| *told == name).count() == 1;
        assert!(life.iter().all(once), "{:?}", names(&told));
    }
    // Not soon after it was told, and not while the word on it may still wait.
    assert_eq!(starts(&lasting), 1);
    for _ in 0..3 {
        assert_eq!(check().await?, json!(true));
    }
    wait::until("its start is told again", LIMIT, || async {
        (starts(&lasting) > 1).then_some(())
    })
    .await?;
    let told = cluster.told_of(&lasting)?;
    let mut args = told.iter().filter(|(name, _)| name == "kernel_started");
    assert_eq!(args.next(), args.next(), "the same is told");
    // A later event comes after all of them, so nothing more of them is on its way.
    let later = Order::of(Image::Runner)?;
    kernels::create(&node, &later).await?;
    kernels::destroy(&node, &later).await?;
    wait::until("a later end is told", LIMIT, || async {
        let told = cluster.told_of(&later).ok()?;
        names(&told).contains(&"kernel_terminated").then_some(())
    })
    .await?;
    // While the bus answers, the word on the console comes first, as the original's.
    let told = cluster.told_of(&later)?;
    assert_eq!(
        names(&told)[3..],
        ["do_sync_kernel_logs", "kernel_terminated"]
    );
    for order in [&before, &during] {
        let told = cluster.told_of(order)?;
        assert_eq!(told.len(), life.len(), "{:?}", names(&told));
    }
    assert_eq!(starts(&lasting), 2);
    kernels::destroy(&node, &lasting).await?;
    kernels::assert_clean(&node).await
}

// What is told takes time to be given up, and until then whatever was begun goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_is_slow_to_start_outlives_a_stop_of_the_agent() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gate = Gate::before(cluster.redis.port).await?;
    cluster.redis_is_at(gate.port).await?;
    let mut node = Node::start(cluster.options("")).await?;
    let mut order = Order::of(Image::Runner)?;
    // Longer than a stop waits for what is under way.
    order.config["bootstrap_script"] = json!("sleep 18\n");
    let (client, args) = (node.client().await?, order.arguments());
    let creation = tokio::spawn(async move {
        // The agent is stopped under it.
        let _ = client.call("create_kernels", args, Vec::new(), LIMIT).await;
    });
    wait::until("the container runs", LIMIT, || async {
        let container = node.containers().ok()?.pop()?;
        let state = ["inspect", "--format", "{{.State.Running}}", &container];
        (kernels::docker(&state).ok()? == "true").then_some(())
    })
    .await?;
    gate.shut();
    tokio::task::block_in_place(|| node.stop_control())?;
    gate.open();
    node.start_control().await?;
    let told = wait::until("its start is told", LIMIT, || async {
        let told = cluster.told_of(&order).ok()?;
        let is_over = |name: &&str| ["kernel_started", "kernel_terminated"].contains(name);
        names(&told).iter().any(is_over).then_some(told)
    })
    .await?;
    assert_eq!(names(&told).last(), Some(&"kernel_started"), "{told:?}");
    creation.await?;
    let ran = kernels::run(&node, &order, "echo here").await?;
    assert_eq!(ran.output, "here\n");
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_go_on_while_the_engine_hangs() -> Result<()> {
    let cluster = Cluster::start().await?;
    let engine = FaultDocker::start()?;
    let _node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        dataplane: false,
        ..cluster.options("[debug]\nheartbeat-interval = 1.0\n")
    })
    .await?;
    wait::until("a heartbeat", LIMIT, || async {
        (cluster.count_of("agent_heartbeat") > 0).then_some(())
    })
    .await?;
    engine.spoil("", Fault::Hang, usize::MAX);
    engine.cut_all();
    // Whatever waited for the engine would be given up after tens of seconds, each time.
    let before = cluster.count_of("agent_heartbeat");
    wait::until("twenty more", LIMIT, || async {
        (cluster.count_of("agent_heartbeat") >= before + 20).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_a_kernel_is_told_once_although_the_agent_is_killed_right_after_it() -> Result<()>
{
    let mut cluster = Cluster::start().await?;
    let mut node = Node::start(cluster.options("")).await?;
    for _ in 0..3 {
        let order = Order::of(Image::Runner)?;
        kernels::create(&node, &order).await?;
        wait::until("its start is told", LIMIT, || async {
            let told = cluster.told_of(&order).ok()?;
            names(&told).contains(&"kernel_started").then_some(())
        })
        .await?;
        // Nothing can be sent, so what is told later was on the disk.
        cluster.redis.kill()?;
        let record = node
            .state()
            .join("kernels")
            .join(node.agent_id())
            .join(format!("{}.json", order.kernel));
        ensure!(record.exists(), "no record in {}", record.display());
        let client = node.client().await?;
        let args = vec![
            text(order.kernel),
            text(order.session),
            Value::from("user-requested"),
        ];
        let call = tokio::spawn(async move {
            // The agent is killed under it.
            let _ = client.call("destroy_kernel", args, Vec::new(), LIMIT).await;
        });
        let pid = nix::unistd::Pid::from_raw(i32::try_from(node.control_pid().unwrap())?);
        tokio::task::spawn_blocking(move || {
            let deadline = Instant::now() + LIMIT;
            while record.exists() && Instant::now() < deadline {
                std::thread::yield_now();
            }
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)
        })
        .await??;
        call.await?;
        node.kill_control()?;
        cluster.redis.restart()?;
        node.start_control().await?;
        let told = wait::until("its end is told", LIMIT, || async {
            let told = cluster.told_of(&order).ok()?;
            names(&told).contains(&"kernel_terminated").then_some(told)
        })
        .await?;
        // The console, which waited too, may be told after it.
        let end = told.iter().find(|(name, _)| name == "kernel_terminated");
        let (_, args) = end.unwrap();
        assert_eq!(args[2], Value::from("user-requested"), "{args:?}");
        assert_ne!(args[3].as_i64(), Some(-1), "{args:?}");
        // The server was empty; only what this start has told is there.
        assert_eq!(cluster.count_of("kernel_terminated"), 1);
    }
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_console_reaches_the_bus_although_the_agent_is_killed_while_it_waits() -> Result<()> {
    let cluster = Cluster::start().await?;
    let gate = Gate::before(cluster.redis.port).await?;
    cluster.redis_is_at(gate.port).await?;
    let mut node = Node::start(cluster.options("")).await?;
    let order = Order::of(Image::Runner)?;
    let made = kernels::create(&node, &order).await?;
    let container = made["container_id"].as_str().context("no id")?;
    gate.shut();
    kernels::destroy(&node, &order).await?;
    node.kill_control()?;
    gate.open();
    node.start_control().await?;
    wait::until("its console is told", LIMIT, || async {
        let told = cluster.told_of(&order).ok()?;
        names(&told).contains(&"do_sync_kernel_logs").then_some(())
    })
    .await?;
    let mut client = cluster.redis.client()?;
    client.ask(&["SELECT", "6"])?;
    let key = format!("containerlog.{container}");
    let pieces = client.ask(&["LLEN", &key])?.int()?;
    assert!(pieces > 0, "{key} is empty");
    // Nor is it told again by the next start.
    node.kill_control()?;
    node.start_control().await?;
    let later = Order::of(Image::Runner)?;
    kernels::create(&node, &later).await?;
    kernels::destroy(&node, &later).await?;
    wait::until("a later console is told", LIMIT, || async {
        let told = cluster.told_of(&later).ok()?;
        names(&told).contains(&"do_sync_kernel_logs").then_some(())
    })
    .await?;
    let told = cluster.told_of(&order)?;
    let count = names(&told)
        .iter()
        .filter(|name| **name == "do_sync_kernel_logs")
        .count();
    assert_eq!(count, 1, "{:?}", names(&told));
    assert_eq!(client.ask(&["LLEN", &key])?.int()?, pieces);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn troubles_with_the_engine_are_told_to_administrators() -> Result<()> {
    let cluster = Cluster::start().await?;
    let engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        ..cluster.options("")
    })
    .await?;
    let errors = |words: &str| -> Vec<Vec<Value>> {
        let entries = cluster.redis.stream().unwrap_or_default();
        entries
            .iter()
            .filter(|entry| entry.text("name") == "agent_error")
            .map(StreamEntry::args)
            .filter(|args| {
                let text = args.first().and_then(Value::as_str);
                text.is_some_and(|text| text.contains(words))
            })
            .collect()
    };
    let order = Order::of(Image::Runner)?;
    kernels::create(&node, &order).await?;
    engine.spoil("DELETE ", Fault::json(500, "{\"message\": \"no room\"}"), 3);
    kernels::destroy(&node, &order).await?;
    let told = wait::until("the ending's trouble is told", LIMIT, || {
        let told = errors("cannot finish a kernel yet");
        async move { told.first().cloned() }
    })
    .await?;
    assert!(told[0].as_str().unwrap().contains("no room"), "{told:?}");
    let kernel = told[3].get("kernel_id").and_then(Value::as_str);
    assert_eq!(kernel, Some(order.kernel.to_string().as_str()), "{told:?}");
    assert_eq!(told[4].as_str(), Some("ERROR"), "{told:?}");
    // The same trouble is told once.
    assert_eq!(errors("cannot finish a kernel yet").len(), 1);

    engine.spoil(
        "/containers/json",
        Fault::json(500, "{\"message\": \"no list\"}"),
        usize::MAX,
    );
    wait::until("the comparison's trouble is told", LIMIT, || {
        let told = errors("no list");
        async move { (!told.is_empty()).then_some(()) }
    })
    .await?;
    engine.behave();
    kernels::assert_clean(&node).await
}
