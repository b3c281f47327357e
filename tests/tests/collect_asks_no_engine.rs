//! The statistics path never asks the engine: a proxy in front of its socket sees no call.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::fault_docker::FaultDocker;
use harness::images;
use harness::node::{Node, NodeOptions};
use harness::wait;

const PATIENCE: Duration = Duration::from_secs(90);

fn scrape(node: &Node) -> Result<String> {
    let mut stream = TcpStream::connect(node.http_address()).context("nobody listens")?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    write!(
        stream,
        "GET /metrics HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
    )?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

fn value(page: &str, series: &str, of: &str) -> Option<f64> {
    page.lines()
        .find(|line| line.starts_with(series) && line.contains(of))
        .and_then(|line| line.rsplit_once(' ')?.1.parse().ok())
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
    let image = images::image(images::Image::Runner)?;
    let created = node.command(&[
        "kernel", "create", "--quiet", "--cpu", "0.1", "--mem", "128m", &image,
    ])?;
    ensure!(created.status.success(), "{created:?}");
    let kernel = String::from_utf8(created.stdout)?.trim_end().to_owned();
    let used = "container_cpu_usage_seconds_total";
    wait::until("the kernel is measured", PATIENCE, || async {
        value(&scrape(&node).ok()?, used, &kernel)
    })
    .await?;
    let ticks = |page: &str| value(page, "bai_dataplane_ticks_total ", "");
    let first = ticks(&scrape(&node)?).context("ticks are counted")?;
    let before = engine.requests();
    wait::until("25 more passes, each scraped", PATIENCE, || async {
        ticks(&scrape(&node).ok()?).filter(|now| *now >= first + 25.0)
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
