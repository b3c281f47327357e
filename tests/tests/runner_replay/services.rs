//! Services and models: who gets which answer.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use control::kernel::runner_link::{LinkOptions, RunnerLink};
use control::kernel::services::{self, ServiceStart};
use harness::fake_runner::{FakeRunner, logged_frames, vector};
use serde_json::{Map, Value, json};
use shared::ids::KernelId;

use super::link_to;

fn service(name: &str, ports: &[u16]) -> ServiceStart {
    ServiceStart {
        name: name.to_owned(),
        ports: ports.to_vec(),
        protocol: "http".to_owned(),
        options: Map::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn late_service_answers_reach_nobody_else() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let play = async {
        let (kind, payload) = runner.receive().await?;
        ensure!(kind == "start-service");
        ensure!(
            serde_json::from_slice::<Value>(&payload)?
                == json!({"name": "multi", "port": 8090, "ports": [8090, 8091], "protocol": "http", "options": {}})
        );
        runner.send("service-result", r#"{"status": "started"}"#);
        runner.expect("shutdown-service", "\"multi\"").await?;
        // The slow service: its answer comes when its caller is gone.
        ensure!(runner.receive().await?.0 == "start-service");
        Ok::<(), anyhow::Error>(())
    };
    let client = async {
        let reply = services::start_service(&link, service("multi", &[8090, 8091])).await;
        ensure!(reply.is_up(), "{reply:?}");
        services::shutdown_service(&link, "multi");
        let begun = Instant::now();
        let slow = services::start_service(&link, service("slow", &[1])).await;
        ensure!(
            slow.error.as_deref() == Some("timeout") && begun.elapsed() < Duration::from_secs(60),
            "{slow:?}"
        );
        Ok(())
    };
    tokio::try_join!(client, play)?;
    let next = async {
        Ok::<_, anyhow::Error>(services::start_service(&link, service("next", &[2])).await)
    };
    let play = async {
        // The next request is held back until the owed answer came.
        tokio::time::sleep(Duration::from_millis(200)).await;
        ensure!(runner.nothing_waits().await);
        runner.send(
            "service-result",
            r#"{"status": "failed", "error": "about slow"}"#,
        );
        ensure!(runner.receive().await?.0 == "start-service");
        runner.send("service-result", r#"{"status": "running"}"#);
        Ok(())
    };
    let (reply, ()) = tokio::try_join!(next, play)?;
    ensure!(reply.status == "running", "{reply:?}");
    let nowhere = services::start_service(&link, service("none", &[])).await;
    ensure!(nowhere.status == "failed");
    // The agent is restarted while one is being started.
    let gone = services::start_service(&link, service("slow", &[1]));
    let sent = async {
        ensure!(runner.receive().await?.0 == "start-service");
        Ok(())
    };
    tokio::select! {
        reply = gone => anyhow::bail!("{reply:?}"),
        sent = sent => sent?,
    }
    link.leave().await;
    let owed = link.owed().borrow().clone();
    ensure!(owed.service, "{owed:?}");
    let resumed = LinkOptions {
        resumed: true,
        owed,
        ..LinkOptions::default()
    };
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, resumed);
    let next = async {
        Ok::<_, anyhow::Error>(services::start_service(&link, service("next", &[2])).await)
    };
    let play = async {
        link.status(Duration::from_secs(10)).await?;
        ensure!(runner.nothing_waits().await);
        runner.send("service-result", r#"{"status": "started"}"#);
        ensure!(runner.receive().await?.0 == "start-service");
        runner.send("service-result", r#"{"status": "running"}"#);
        Ok(())
    };
    let (reply, ()) = tokio::try_join!(next, play)?;
    ensure!(reply.status == "running", "{reply:?}");
    // It is noted a moment after the answer was given.
    let mut owed = link.owed();
    let settled = owed.wait_for(|owed| !owed.service);
    tokio::time::timeout(Duration::from_secs(30), settled).await??;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn model_services_report_their_health() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let mut updates = link.model_updates();
    let log = logged_frames(&vector("model_service")?["J inference"])?;
    let log: Vec<_> = log
        .into_iter()
        .skip_while(|frame| frame.kind != "start-model-service")
        .collect();
    let model: Value = serde_json::from_slice(&log[0].payload)?;
    let start = async { Ok(services::start_model_service(&link, &model).await) };
    let (reply, ()) = tokio::try_join!(start, runner.replay(&log))?;
    ensure!(reply.status == "started");
    let update = tokio::time::timeout(Duration::from_secs(5), updates.recv()).await??;
    ensure!(update.model_name == "m1" && update.is_healthy);
    Ok(())
}
