//! The engine restarted, killed and suspended under creations, pulls, batch jobs and commits.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use control::rpc::{self, Value};
use harness::images::Image;
use harness::kernels::{self, Order, commit, text};
use harness::node::{Node, NodeOptions};
use harness::own_engine::OwnEngine;
use harness::wait;
use nix::sys::signal::Signal;
use serde_json::json;
use uuid::Uuid;

const SOON: Duration = Duration::from_secs(90);
/// How long an engine hangs: longer than a question to it may take, and less than an order.
const HANGS: Duration = Duration::from_secs(15);

async fn node(engine: &OwnEngine) -> Result<Node> {
    Node::start(NodeOptions {
        engine: Some(engine.host()),
        ..NodeOptions::default()
    })
    .await
}

fn order(engine: &OwnEngine) -> Result<Order> {
    let mut order = Order::of_engine(Image::Runner, &engine.host())?;
    order.config["resource_slots"] = json!({"cpu": "0", "mem": "134217728"});
    Ok(order)
}

async fn wait_clean(node: &Node) -> Result<()> {
    let clean = wait::until("nothing is left", SOON, || async {
        kernels::remains(node).await.ok()?.is_empty().then_some(())
    });
    match clean.await {
        Ok(()) => Ok(()),
        Err(err) => kernels::assert_clean(node).await.context(err),
    }
}

/// The agent answers all the while.
async fn answers(node: &Node, span: Duration) -> Result<()> {
    let until = Instant::now() + span;
    while Instant::now() < until {
        let ping = node.call("ping", vec![Value::from("there")]);
        tokio::time::timeout(span / 3, ping)
            .await
            .context("the agent hangs with the engine")??;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// What an engine does that is in trouble.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trouble {
    /// It dies, and comes back. It may kill a container that it was just starting.
    Death,
    /// It does nothing for a while.
    Silence,
}

/// Creates kernels while `trouble` is made, then again what has failed; all end well.
async fn creations_under(
    node: &Node,
    engine: &mut OwnEngine,
    kind: Trouble,
    trouble: impl AsyncFnOnce(&Node, &mut OwnEngine) -> Result<()>,
) -> Result<()> {
    let orders = (0..4).map(|_| order(engine)).collect::<Result<Vec<_>>>()?;
    let creations = orders
        .iter()
        .map(|order| kernels::call(node, "create_kernels", order.arguments()));
    let creations = futures_util::future::try_join_all(creations);
    let troubled = async {
        wait::until("a container is made", SOON, || async {
            (!engine.docker(&["ps", "-aq"]).ok()?.is_empty()).then_some(())
        })
        .await?;
        trouble(node, engine).await
    };
    let (outcomes, troubled) = tokio::join!(creations, troubled);
    troubled?;
    let outcomes = outcomes?;
    let failed = outcomes.iter().filter(|outcome| outcome.is_err()).count();
    eprintln!("{failed} of {} creations failed", outcomes.len());
    for (order, outcome) in orders.iter().zip(&outcomes) {
        match outcome {
            Ok(_) => match runs(node, order).await {
                Ok(()) => {
                    let ends = kernels::ends(node, order.kernel).await?;
                    ensure!(ends.is_empty(), "{ends:?} of one that runs");
                    continue;
                }
                // Only where the engine has killed it, and the node says so.
                Err(err) if kind == Trouble::Death => {
                    let why = format!("{err:?}");
                    let told = ends_of(node, order).await.with_context(|| why.clone())?;
                    // What it died of is what a dying engine has written down of that.
                    let [(reason, code)] = &told[..] else {
                        bail!("{told:?}: {why}");
                    };
                    let killed = reason == "self-terminated" && *code != 0;
                    ensure!(killed, "{told:?}: {why}");
                    wait::until("it is over", SOON, || async {
                        let state = kernels::state(node, order.kernel).await.ok()?;
                        state.is_none().then_some(())
                    })
                    .await?;
                    eprintln!("the engine has killed one that was created");
                }
                Err(err) => return Err(err),
            },
            Err(failure) => {
                let told = ends_of(node, order)
                    .await
                    .with_context(|| failure.repr.clone())?;
                assert_eq!(told.len(), 1, "{told:?}: {}", failure.repr);
            }
        }
        // A manager tries again at once, with the same kernel.
        kernels::create(node, order).await?;
        runs(node, order).await?;
    }
    for order in &orders {
        kernels::destroy(node, order).await?;
    }
    wait_clean(node).await
}

/// What was told of a kernel's end, once it was.
async fn ends_of(node: &Node, order: &Order) -> Result<Vec<(String, i64)>> {
    wait::until("the end is told", SOON, || async {
        let ends = kernels::ends(node, order.kernel).await.ok()?;
        (!ends.is_empty()).then_some(ends)
    })
    .await
}

async fn runs(node: &Node, order: &Order) -> Result<()> {
    let ran = kernels::run(node, order, "echo well").await?;
    ensure!(ran.output == "well\n", "{ran:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn creations_go_on_or_fail_whole() -> Result<()> {
    let Some(mut engine) = OwnEngine::start()? else {
        return Ok(());
    };
    let node = node(&engine).await?;
    let (death, silence) = (Trouble::Death, Trouble::Silence);
    creations_under(&node, &mut engine, death, async |_, engine| {
        engine.restart()
    })
    .await?;
    // One that comes while the engine is away has nothing that the engine would have to give back.
    let early = order(&engine)?;
    engine.end(Signal::SIGKILL)?;
    let refused = kernels::call(&node, "create_kernels", early.arguments()).await?;
    ensure!(refused.is_err(), "created without an engine");
    let creating = kernels::ask(&node, "check_creating", vec![text(early.kernel)]).await?;
    assert_eq!(creating, json!(false));
    engine.resume()?;
    creations_under(&node, &mut engine, death, async |_, engine| {
        engine.end(Signal::SIGKILL)?;
        engine.resume()
    })
    .await?;
    creations_under(&node, &mut engine, silence, async |node, engine| {
        engine.signal(Signal::SIGSTOP)?;
        let answered = answers(node, HANGS).await;
        engine.signal(Signal::SIGCONT)?;
        answered
    })
    .await
}

async fn start_batch(node: &Node, engine: &OwnEngine, command: &str) -> Result<Order> {
    let mut order = order(engine)?;
    order.config["session_type"] = json!("batch");
    kernels::create(node, &order).await?;
    kernels::start_batch(node, &order, command, Value::Nil).await?;
    Ok(order)
}

async fn failure_of(node: &Node, session: Uuid) -> Result<Vec<serde_json::Value>> {
    let events = kernels::events(node, session).await?;
    let ends = events
        .into_iter()
        .filter(|(name, _)| name.starts_with("session_"));
    Ok(ends.map(|(_, args)| args).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_jobs_do_not_notice() -> Result<()> {
    let Some(mut engine) = OwnEngine::start()? else {
        return Ok(());
    };
    let node = node(&engine).await?;
    for hang in [false, true] {
        let order = start_batch(&node, &engine, "sleep 6; exit 3").await?;
        if hang {
            engine.signal(Signal::SIGSTOP)?;
            let answered = answers(&node, HANGS).await;
            engine.signal(Signal::SIGCONT)?;
            answered?;
        } else {
            engine.restart()?;
        }
        let told = wait::until("the job's end", SOON, || async {
            let told = failure_of(&node, order.session).await.ok()?;
            (!told.is_empty()).then_some(told)
        })
        .await?;
        let session = order.session.to_string();
        assert_eq!(told, [json!([session, "task-failed", 3])]);
        let ends = kernels::ends(&node, order.kernel).await?;
        ensure!(ends.is_empty(), "{ends:?}");
        kernels::destroy(&node, &order).await?;
    }
    wait_clean(&node).await
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.path().is_dir() {
                true => left.push(entry.path()),
                false => found.push(entry.path()),
            }
        }
    }
    found
}

async fn commit_ended(node: &Node, order: &Order) -> Result<()> {
    wait::until("the commit's end", 3 * SOON, || async {
        let args = vec![text(order.kernel), Value::from("user_example.com")];
        let status = kernels::ask(node, "get_commit_status", args).await.ok()?;
        (status["status"] == "ready").then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_cut_short_leaves_its_kernel_running_and_no_half_archive() -> Result<()> {
    let Some(mut engine) = OwnEngine::start()? else {
        return Ok(());
    };
    let commits = tempfile::tempdir()?;
    let node = Node::start(NodeOptions {
        engine: Some(engine.host()),
        agent: format!(
            "image-commit-path = {:?}\n",
            commits.path().display().to_string()
        ),
        ..NodeOptions::default()
    })
    .await?;
    let order = order(&engine)?;
    kernels::create(&node, &order).await?;
    let fill = "head -c 100000000 /dev/urandom > /tmp/much; echo done";
    assert_eq!(kernels::run(&node, &order, fill).await?.output, "done\n");
    let container = node.containers()?.first().context("its container")?.clone();
    let paused =
        |engine: &OwnEngine| engine.docker(&["inspect", "-f", "{{.State.Paused}}", &container]);
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGSTOP] {
        commit(&node, &order, "kept.tar.gz").await?;
        wait::until("the container is paused", SOON, || async {
            (paused(&engine).ok()? == "true").then_some(())
        })
        .await?;
        if signal == Signal::SIGSTOP {
            engine.signal(signal)?;
            let answered = answers(&node, HANGS).await;
            engine.signal(Signal::SIGCONT)?;
            answered?;
        } else {
            engine.end(signal)?;
            engine.resume()?;
        }
        commit_ended(&node, &order).await?;
        wait::until("the container goes on", SOON, || async {
            (paused(&engine).ok()? == "false").then_some(())
        })
        .await
        .with_context(|| format!("after {signal}"))?;
        let ran = kernels::run(&node, &order, "echo well").await?;
        assert_eq!(ran.output, "well\n", "after {signal}");
        wait::until("no image without a name is left", SOON, || async {
            let left = engine.docker(&["images", "-q", "--filter", "dangling=true"]);
            left.ok()?.is_empty().then_some(())
        })
        .await
        .with_context(|| format!("after {signal}"))?;
        for file in files(commits.path()) {
            // One that was only suspended has gone on.
            ensure!(
                signal == Signal::SIGSTOP && file.ends_with("kept.tar.gz"),
                "{file:?} after {signal}"
            );
        }
    }
    kernels::destroy(&node, &order).await?;
    wait_clean(&node).await
}

/// A registry that says what it has and then keeps the content to itself, until it is told otherwise.
struct SlowRegistry {
    address: String,
    slow: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl SlowRegistry {
    /// How much of each answer comes.
    const COMES: usize = 64 << 10;

    async fn before(registry: &str) -> Result<SlowRegistry> {
        use std::sync::atomic::{AtomicBool, Ordering};
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let slow = std::sync::Arc::new(AtomicBool::new(false));
        let (told, registry) = (slow.clone(), registry.to_owned());
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (slow, registry) = (told.clone(), registry.clone());
                tokio::spawn(async move {
                    let mut server = tokio::net::TcpStream::connect(registry).await?;
                    let (mut from, mut to) = client.split();
                    let (mut answers, mut requests) = server.split();
                    let asking = tokio::io::copy(&mut from, &mut requests);
                    let answering = async {
                        let (mut buffer, mut passed) = (vec![0; 16 << 10], 0);
                        loop {
                            let read = answers.read(&mut buffer).await?;
                            if read == 0 {
                                return Ok(());
                            }
                            passed += read;
                            while slow.load(Ordering::Relaxed) && passed > Self::COMES {
                                tokio::time::sleep(Duration::from_millis(50)).await;
                            }
                            to.write_all(&buffer[..read]).await?;
                        }
                    };
                    tokio::select! {
                        _ = asking => {}
                        answered = answering => { let _: std::io::Result<()> = answered; }
                    }
                    std::io::Result::Ok(())
                });
            }
        });
        Ok(SlowRegistry { address, slow })
    }

    fn hold(&self, slow: bool) {
        self.slow.store(slow, std::sync::atomic::Ordering::Relaxed);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_cut_short_is_told_and_tried_again() -> Result<()> {
    let Some(mut engine) = OwnEngine::start()? else {
        return Ok(());
    };
    let registry = harness::registry::Registry::start(false)?;
    let slow = SlowRegistry::before(&registry.address).await?;
    let node = node(&engine).await?;
    let mut order = order(&engine)?;
    let local = order.config["image"]["canonical"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let canonical = format!("{}/bai/runner:cut", slow.address);
    engine.docker(&["tag", &local, &canonical])?;
    engine.docker(&["push", &canonical])?;
    engine.docker(&["rmi", &canonical, &local])?;
    order.config["image"]["canonical"] = json!(canonical);
    order.config["image"]["is_local"] = json!(false);
    order.config["image"]["auto_pull"] = json!("tag");
    order.config["auto_pull"] = json!("tag");
    order.config["image"]["registry"] =
        json!({"name": slow.address, "url": format!("http://{}", slow.address)});
    let configs = json!({ &canonical: order.config["image"] });
    let pulls = async || -> Result<Vec<String>> {
        let args = vec![Value::Int(0), Value::Float(0.0), Value::Int(1000)];
        let reply = kernels::ask(&node, "bai.events", args).await?;
        let events = reply["events"].as_array().context("events")?.iter();
        let of_image = events.filter(|event| event["args"][0] == canonical.as_str());
        Ok(of_image
            .map(|event| event["name"].as_str().unwrap_or_default().to_owned())
            .collect())
    };
    let mut told = 0;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        slow.hold(true);
        kernels::ask(&node, "check_and_pull", vec![rpc::to_value(&configs)?]).await?;
        wait::until("the pull begins", SOON, || async {
            (pulls().await.ok()?.len() > told).then_some(())
        })
        .await?;
        engine.end(signal)?;
        engine.resume()?;
        let names = wait::until("the pull's end", SOON, || async {
            pulls().await.ok().filter(|names| names.len() >= told + 2)
        })
        .await?;
        assert_eq!(
            names[told..],
            ["image_pull_started", "image_pull_failed"],
            "{signal}"
        );
        told = names.len();
    }
    // Hung as long as it lasts; then it is there.
    slow.hold(false);
    engine.signal(Signal::SIGSTOP)?;
    let args = order.arguments();
    let creation = kernels::call(&node, "create_kernels", args);
    let hanging = async {
        let answered = answers(&node, HANGS).await;
        engine.signal(Signal::SIGCONT)?;
        answered
    };
    let (created, hung) = tokio::join!(creation, hanging);
    hung?;
    if let Err(failure) = created? {
        eprintln!("the creation under a hanging engine: {}", failure.repr);
        kernels::create(&node, &order).await?;
    }
    let ran = kernels::run(&node, &order, "echo well").await?;
    assert_eq!(ran.output, "well\n");
    kernels::destroy(&node, &order).await?;
    wait_clean(&node).await
}
