//! The statistics path never asks the engine: a proxy in front of its socket sees no call.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::etcd::EtcdServer;
use harness::fault_docker::FaultDocker;
use harness::images::{self, Image};
use harness::kernels::{self, Order};
use harness::node::{Node, NodeOptions};
use harness::redis::Redis;
use harness::{scrape, wait};

const PATIENCE: Duration = Duration::from_secs(90);

/// Passes over all containers so far.
fn ticks(node: &Node) -> Option<f64> {
    let page = scrape::page(node.http_address()).ok()?;
    scrape::value(&page, "bai_dataplane_ticks_total", "")
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_scrapes_and_the_command_line_ask_the_engine_nothing() -> Result<()> {
    let engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        // What looks after containers, and asks the engine for that, is not what is watched here.
        agent: "sync-container-lifecycles = { enabled = false }".to_owned(),
        sections: "[node.dataplane]\nstats-interval = \"200ms\"\n".to_owned(),
        ..NodeOptions::default()
    })
    .await?;
    let image = images::image(Image::Runner)?;
    let created = node.command(&[
        "kernel", "create", "--quiet", "--cpu", "0.1", "--mem", "128m", &image,
    ])?;
    ensure!(created.status.success(), "{created:?}");
    let kernel = String::from_utf8(created.stdout)?.trim_end().to_owned();
    let used = "container_cpu_usage_seconds_total";
    wait::until("the kernel is measured", PATIENCE, || async {
        scrape::value(&scrape::page(node.http_address()).ok()?, used, &kernel)
    })
    .await?;
    let first = ticks(&node).context("ticks are counted")?;
    let before = engine.requests();
    wait::until("25 more passes, each scraped", PATIENCE, || async {
        ticks(&node).filter(|now| *now >= first + 25.0)
    })
    .await?;
    let config = node.config_file();
    let config = config.to_str().context("a path in UTF-8")?;
    let told = node.command(&["stats", "--output", "json", "--config", config])?;
    ensure!(told.status.success(), "{told:?}");
    let after = engine.requests();
    // Whether the engine lives is asked now and then, and is no statistics.
    let asked: Vec<&String> = after[before.len()..]
        .iter()
        .filter(|line| !line.contains("/_ping"))
        .collect();
    assert!(asked.is_empty(), "the engine was asked {asked:#?}");
    Ok(())
}

const ROUNDS: f64 = 50.0;

/// What an agent of a cluster asks the engine anyway, a method and the end of a path each: whether it lives, what images
/// there are (told with heartbeats), what containers there are (looked after), and its events.
const NO_STATISTICS: [&str; 4] = [
    "GET /_ping",
    "GET /images/json",
    "GET /containers/json",
    "GET /events",
];

/// A request without the version of the API and without its parameters.
fn bare(line: &str) -> String {
    let (method, path) = line.split_once(' ').unwrap_or((line, ""));
    let path = path.split('?').next().unwrap_or_default();
    let path = match path
        .strip_prefix("/v")
        .and_then(|rest| rest.split_once('/'))
    {
        Some((version, rest)) if version.parse::<f32>().is_ok() => format!("/{rest}"),
        _ => path.to_owned(),
    };
    format!("{method} {path}")
}

#[tokio::test(flavor = "multi_thread")]
async fn rounds_of_statistics_for_a_manager_ask_the_engine_nothing() -> Result<()> {
    let (etcd, redis) = (EtcdServer::start().await?, Redis::start()?);
    let address = format!("127.0.0.1:{}", redis.port);
    for (key, value) in [("nodes/manager/m1", "up"), ("config/redis/addr", &address)] {
        let key = format!("/sorna/local/{key}");
        etcd.client().await?.put(key, value, None).await?;
    }
    let engine = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        cluster: true,
        environment: vec![("DOCKER_HOST".to_owned(), engine.host())],
        sections: etcd.section("local") + "[node.dataplane]\nrecords-interval = \"200ms\"\n",
        ..NodeOptions::default()
    })
    .await?;
    let orders = [Order::of(Image::Runner)?, Order::of(Image::Runner)?];
    for order in &orders {
        kernels::create(&node, order).await?;
    }
    // Each has its record where the manager looks.
    let mut client = redis.client()?;
    for order in &orders {
        let kernel = order.kernel.to_string();
        wait::until("a record of the kernel", PATIENCE, || {
            let there = client.ask(&["EXISTS", &kernel]).and_then(|it| it.int());
            async move { (there.ok()? == 1).then_some(()) }
        })
        .await?;
    }
    let rounds = || -> Option<Vec<f64>> {
        let page = scrape::page(node.http_address()).ok()?;
        let of = |scope: &str| {
            let label = format!("stat_scope=\"{scope}\"");
            scrape::value(&page, "backendai_stat_task_success_count_total", &label)
        };
        ["node", "container", "process"]
            .map(of)
            .into_iter()
            .collect()
    };
    let first = rounds().context("rounds are counted")?;
    let before = engine.requests().len();
    wait::until("50 more rounds of each", PATIENCE, || async {
        let now = rounds()?;
        let done = now
            .iter()
            .zip(&first)
            .all(|(now, first)| *now >= first + ROUNDS);
        done.then_some(())
    })
    .await?;
    let asked: Vec<String> = engine.requests()[before..]
        .iter()
        .map(|line| bare(line))
        .collect();
    let unknown: Vec<&String> = asked
        .iter()
        .filter(|line| !NO_STATISTICS.contains(&line.as_str()))
        .collect();
    assert!(unknown.is_empty(), "the engine was asked {unknown:#?}");
    // Nor does one of these come with each round.
    for known in NO_STATISTICS {
        let times = asked.iter().filter(|line| *line == known).count();
        assert!(times < 10, "{known} came {times} times: {asked:#?}");
    }
    Ok(())
}
