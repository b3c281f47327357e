//! What the runner link and the execution RPCs make of a runner's messages: captured sessions of the
//! real runner replayed, and everything a runner or a client can do wrong.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use control::events::Events;
use control::kernel::batch::{self, BatchOutcome};
use control::kernel::execution::{
    self, BatchSteps, ExecuteReply, ExecuteRequest, ExecutionError, Mode, Status,
};
use control::kernel::runner_link::runs::RunLimits;
use control::kernel::runner_link::{
    InitError, InitPolling, LinkError, LinkOptions, RunnerAddress, RunnerLink,
};
use control::kernel::services::{self, ServiceStart};
use harness::fake_runner::{FakeRunner, logged_frames, vector};
use serde_json::{Map, Value, json};
use shared::ids::{KernelId, SessionId};
use tokio_util::sync::CancellationToken;

fn link_to(runner: &FakeRunner) -> RunnerLink {
    RunnerLink::open(KernelId([7; 16]), runner.address, LinkOptions::default())
}

fn request(run_id: &str, mode: Mode, code: &str) -> ExecuteRequest {
    ExecuteRequest {
        run_id: Some(run_id.to_owned()),
        mode,
        code: code.to_owned(),
        opts: BatchSteps::default(),
        api_version: 3,
        flush_timeout: Some(2.0),
    }
}

async fn execute(link: &RunnerLink, run_id: &str, mode: Mode, code: &str) -> Result<ExecuteReply> {
    Ok(execution::execute(link, request(run_id, mode, code)).await?)
}

fn text(reply: &ExecuteReply) -> Result<String> {
    let value = serde_json::to_value(reply)?;
    let items = value["console"].as_array().context("console")?;
    Ok(items.iter().filter_map(|item| item[1].as_str()).collect())
}

/// One call of a vector against its result.
async fn check_call(link: &RunnerLink, call: &Value) -> Result<()> {
    let asked = ExecuteRequest {
        run_id: call["run_id"].as_str().map(str::to_owned),
        mode: serde_json::from_value(call["mode"].clone())?,
        code: call["code"].as_str().context("code")?.to_owned(),
        opts: serde_json::from_value(call["opts"].clone())?,
        api_version: call["api_version"].as_u64().unwrap_or(3).try_into()?,
        flush_timeout: call["flush_timeout"].as_f64(),
    };
    let reply = execution::execute(link, asked)
        .await
        .with_context(|| call["run_id"].to_string())?;
    let (found, expected) = (serde_json::to_value(&reply)?, &call["result"]);
    ensure!(
        found == *expected,
        "call {} {}: got {found}, expected {expected}",
        call["run_id"],
        call["mode"]
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn captured_sessions_give_the_captured_results() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let mut log = logged_frames(&vector("query")?)?;
    log.extend(logged_frames(&vector("batch")?)?);
    log.extend(logged_frames(&vector("interrupt_event")?)?);
    let calls = vector("execute_rpc")?;
    let client = async {
        for call in calls.as_array().context("calls")? {
            if call["run_id"] == "q8" {
                let interrupt = async {
                    tokio::time::sleep(Duration::from_millis(1500)).await;
                    execution::interrupt(&link)
                };
                let (result, interrupted) = tokio::join!(check_call(&link, call), interrupt);
                result?;
                interrupted?;
            } else {
                check_call(&link, call).await?;
            }
        }
        link.notify_oom()?;
        Ok::<(), anyhow::Error>(())
    };
    tokio::try_join!(client, runner.replay(&log))?;
    link.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_runs_share_a_kernel_one_after_the_other() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let data = vector("concurrency_and_batch_input")?;
    let mut log = Vec::new();
    for frames in data["frames"].as_object().context("frames")?.values() {
        log.extend(logged_frames(frames)?);
    }
    let calls = data["execute"].as_array().context("calls")?.clone();
    let client = async {
        let second = async {
            // The order of the two runs is the order of their requests.
            harness_wait(|| link.current_run().as_deref() == Some("c1")).await?;
            check_call(&link, &calls[1]).await
        };
        tokio::try_join!(check_call(&link, &calls[0]), second)?;
        for call in &calls[2..] {
            check_call(&link, call).await?;
        }
        Ok::<(), anyhow::Error>(())
    };
    tokio::try_join!(client, runner.replay(&log))?;
    Ok(())
}

async fn harness_wait(condition: impl Fn() -> bool) -> Result<()> {
    let begun = Instant::now();
    while !condition() {
        ensure!(
            begun.elapsed() < Duration::from_secs(10),
            "the condition did not come true in time"
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn output_between_steps_is_lost_in_the_original() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let log = logged_frames(&vector("output_loss_race")?["I jail"])?;
    let log: Vec<_> = log
        .into_iter()
        .filter(|frame| !matches!(frame.kind.as_str(), "get-apps" | "apps-result"))
        .collect();
    let client = async {
        let opts = BatchSteps {
            exec: Some("echo in jail".to_owned()),
            ..BatchSteps::default()
        };
        let first = execution::execute(
            &link,
            ExecuteRequest {
                opts,
                ..request("r", Mode::Batch, "")
            },
        )
        .await?;
        // The client comes back when all is over.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let second = execute(&link, "r", Mode::Continue, "").await?;
        let third = execute(&link, "r", Mode::Continue, "").await?;
        ensure!(first.status == Status::CleanFinished && second.status == Status::BuildFinished);
        ensure!(third.status == Status::Finished && third.exit_code == Some(0));
        ensure!(text(&third)? == "in jail\n", "{third:?}");
        Ok::<(), anyhow::Error>(())
    };
    tokio::try_join!(client, runner.replay(&log))?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn handshake_waits_for_the_runner_and_reads_its_services() -> Result<()> {
    // The address is known before anything listens there.
    let runner = FakeRunner::start().await?;
    runner.answers_status.store(false, Ordering::Relaxed);
    let link = link_to(&runner);
    let polling = InitPolling {
        total: Duration::from_secs(15),
        attempts: 10,
        ..InitPolling::default()
    };
    let alive = CancellationToken::new();
    let play = async {
        runner.expect("status", "").await?;
        // The first ping stays unanswered: as when its connection was reset.
        runner.expect("status", "").await?;
        runner.answers_status.store(true, Ordering::Relaxed);
        runner.send("status", STATUS.as_slice());
        runner.expect("get-apps", "").await?;
        runner.send(
            "apps-result",
            r#"{"status": "done", "data": [{"name": "webapp", "url_template": "{protocol}://{host}:{port}/", "allowed_envs": ["MYENV"]}, {"name": "fast"}]}"#,
        );
        Ok::<(), anyhow::Error>(())
    };
    let wait = async { Ok(link.wait_ready(&polling, &alive).await?) };
    let (apps, ()) = tokio::try_join!(wait, play)?;
    ensure!(apps.len() == 2 && apps[0].name == "webapp" && apps[1].url_template.is_none());
    ensure!(apps[0].allowed_envs == Some(json!(["MYENV"])));
    ensure!(link.last_heard().is_some());
    Ok(())
}

/// A status answer of the real runner.
const STATUS: [u8; 21] = *b"\x81\xaastarted_at\xcb\x40\x99\x11\xbf\xaf\x83\xb3\x20";

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_container_ends_the_wait_at_once() -> Result<()> {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = nobody.local_addr()?.port();
    drop(nobody);
    let address = RunnerAddress {
        ip: "127.0.0.1".parse()?,
        repl_in: port,
        repl_out: port,
    };
    let link = RunnerLink::open(KernelId([8; 16]), address, LinkOptions::default());
    let dead = CancellationToken::new();
    let begun = Instant::now();
    let polling = InitPolling::default();
    let (outcome, ()) = tokio::join!(link.wait_ready(&polling, &dead), async { dead.cancel() });
    ensure!(matches!(outcome, Err(InitError::Died)));
    ensure!(begun.elapsed() < Duration::from_secs(2));
    let short = InitPolling {
        total: Duration::from_millis(1500),
        attempts: 3,
        ..InitPolling::default()
    };
    let outcome = link.wait_ready(&short, &CancellationToken::new()).await;
    ensure!(
        matches!(outcome, Err(InitError::TimedOut { .. })),
        "{outcome:?}"
    );
    link.close().await;
    ensure!(matches!(
        link.status(Duration::from_secs(5)).await,
        Err(LinkError::Closed)
    ));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn html_media_does_not_wedge_the_kernel() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let play = async {
        runner.expect("code", "show()").await?;
        runner.send("media", "<table></table>");
        runner.send("finished", r#"{"exitCode": 0}"#);
        runner.expect("code", "print(2)").await?;
        runner.send("finished", r#"{"exitCode": 0}"#);
        Ok::<(), anyhow::Error>(())
    };
    let client = async {
        let first = execute(&link, "h", Mode::Query, "show()").await?;
        ensure!(
            serde_json::to_value(&first)?["console"]
                == json!([["media", ["text/html", "<table></table>"]]])
        );
        ensure!(execute(&link, "h2", Mode::Query, "print(2)").await?.status == Status::Finished);
        Ok(())
    };
    tokio::try_join!(client, play)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn characters_split_over_messages_and_huge_messages() -> Result<()> {
    const CUT: usize = 10 * 1024 * 1024;
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let play = async {
        runner.expect("code", "a").await?;
        let bytes = "é€😀".as_bytes();
        for byte in bytes {
            runner.send("stdout", Bytes::copy_from_slice(&[*byte]));
        }
        runner.send("stderr", Bytes::from_static(b"\xf0\x9f"));
        runner.send("finished", r#"{"exitCode": 0}"#);
        runner.expect("code", "b").await?;
        runner.send("stdout", vec![b'x'; CUT + 1]);
        runner.send("finished", r#"{"exitCode": 0}"#);
        Ok::<(), anyhow::Error>(())
    };
    let client = async {
        let reply = execute(&link, "a", Mode::Query, "a").await?;
        ensure!(
            serde_json::to_value(&reply)?["console"]
                == json!([["stdout", "é€😀"], ["stderr", "\u{fffd}"]]),
            "{reply:?}"
        );
        let mut length = 0;
        let mut mode = Mode::Query;
        loop {
            let code = if mode == Mode::Query { "b" } else { "" };
            let reply = execution::execute(
                &link,
                ExecuteRequest {
                    flush_timeout: Some(15.0),
                    ..request("b", mode, code)
                },
            )
            .await?;
            length += text(&reply)?.len();
            if reply.status == Status::Finished {
                break;
            }
            mode = Mode::Continue;
        }
        ensure!(length == CUT, "{length} bytes arrived");
        Ok(())
    };
    tokio::try_join!(client, play)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_blocks_pings_in_the_original() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let first = ExecuteRequest {
        flush_timeout: Some(0.0),
        ..request("loud", Mode::Query, "shout()")
    };
    execution::execute(&link, first).await?;
    runner.expect("code", "shout()").await?;
    const RECORDS: usize = 6000;
    for number in 0..RECORDS {
        let stream = if number % 2 == 0 { "stdout" } else { "stderr" };
        runner.send(stream, format!("{number}\n"));
    }
    // Nobody polls; the status goes through all the same, behind everything above.
    runner.answers_status.store(true, Ordering::Relaxed);
    let status = link.status(Duration::from_secs(10)).await?;
    ensure!(status.started_at > 0.0);
    runner.send("finished", r#"{"exitCode": 0}"#);
    let mut output = String::new();
    loop {
        let reply = execute(&link, "loud", Mode::Continue, "").await?;
        output.push_str(&text(&reply)?);
        if reply.status == Status::Finished {
            break;
        }
    }
    ensure!(
        output.contains("earlier output were dropped"),
        "the loss is told"
    );
    ensure!(
        output.ends_with(&format!("{}\n", RECORDS - 1)),
        "the newest output is kept"
    );
    ensure!(!output.contains("\n0\n"), "the oldest output is dropped");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runner_that_takes_nothing_is_not_fed_without_end() -> Result<()> {
    const MIB: usize = 1024 * 1024;
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let give = async |run_id: &str, mode: Mode, code: String| {
        let asked = ExecuteRequest {
            flush_timeout: Some(0.0),
            ..request(run_id, mode, &code)
        };
        execution::execute(&link, asked).await
    };
    let input = |number: usize| number.to_string() + &" ".repeat(MIB);
    let is_refused = |outcome: Result<ExecuteReply, ExecutionError>| {
        matches!(
            outcome,
            Err(ExecutionError::Link(LinkError::Backlogged { .. }))
        )
    };
    give("reader", Mode::Query, "read()".to_owned()).await?;
    runner.expect("code", "read()").await?;
    runner.takes.send_replace(false);
    // What the connection holds is not the agent's: more than the bound may have been taken.
    let mut taken = 0;
    let refused = loop {
        match give("reader", Mode::Input, input(taken)).await {
            Ok(_) => taken += 1,
            Err(err) => break Err(err),
        }
        ensure!(taken < 128, "{taken} MiB wait for the runner");
    };
    ensure!(is_refused(refused) && taken >= 16, "{taken} MiB were taken");
    ensure!(is_refused(give("other", Mode::Query, input(taken)).await));
    // Small ones pass.
    give("reader", Mode::Continue, String::new()).await?;
    link.interrupt()?;
    runner.takes.send_replace(true);
    for number in 0..taken {
        runner.expect("input", &input(number)).await?;
    }
    runner.expect("interrupt", "").await?;
    harness_wait(|| link.is_flushed()).await?;
    give("reader", Mode::Input, input(taken)).await?;
    runner.expect("input", &input(taken)).await?;
    harness_wait(|| link.is_flushed()).await?;
    // A run that waits for its turn may be large, and counts then; said again, it adds nothing.
    let large = " ".repeat(16 * MIB);
    give("second", Mode::Query, large.clone()).await?;
    ensure!(is_refused(give("reader", Mode::Input, input(0)).await));
    give("second", Mode::Query, large).await?;
    runner.send("finished", r#"{"exitCode": 0}"#);
    let (kind, code) = runner.receive().await?;
    ensure!(kind == "code" && code.len() == 16 * MIB);
    harness_wait(|| link.is_flushed()).await?;
    give("second", Mode::Input, input(0)).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_client_closes_the_runner_in_the_original() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let cancelled = tokio::time::timeout(
        Duration::from_millis(300),
        execute(&link, "x", Mode::Query, "slow()"),
    );
    ensure!(cancelled.await.is_err(), "the call was still waiting");
    runner.expect("code", "slow()").await?;
    runner.send("stdout", "kept");
    runner.send("finished", r#"{"exitCode": 0}"#);
    let reply = execute(&link, "x", Mode::Query, "slow()").await?;
    ensure!(
        reply.status == Status::Finished && text(&reply)? == "kept",
        "{reply:?}"
    );
    ensure!(
        runner.nothing_waits().await,
        "the repeated request ran nothing twice"
    );
    // The reply may have been lost as well: the same answer again.
    let again = execute(&link, "x", Mode::Continue, "").await?;
    ensure!(again == reply);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_another_run_has_no_limit_in_the_original() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let quick = |run_id: &str, code: &str| ExecuteRequest {
        flush_timeout: Some(0.1),
        ..request(run_id, Mode::Query, code)
    };
    execution::execute(&link, quick("one", "a")).await?;
    let begun = Instant::now();
    let waiting = execution::execute(&link, quick("two", "b")).await?;
    ensure!(waiting.status == Status::Continued && begun.elapsed() < Duration::from_secs(2));
    runner.expect("code", "a").await?;
    ensure!(
        runner.nothing_waits().await,
        "the second run is not sent before its turn"
    );
    runner.send("finished", r#"{"exitCode": 0}"#);
    // Its turn comes when the first is over, although nobody fetched the first's end.
    runner.expect("code", "b").await?;
    runner.send("finished", r#"{"exitCode": 5}"#);
    ensure!(execute(&link, "two", Mode::Continue, "").await?.exit_code == Some(5));
    ensure!(execute(&link, "one", Mode::Continue, "").await?.exit_code == Some(0));
    // The number of waiting runs is limited.
    execution::execute(&link, quick("busy", "c")).await?;
    let mut refused = 0;
    for number in 0..20 {
        let outcome = execution::execute(
            &link,
            ExecuteRequest {
                flush_timeout: Some(0.0),
                ..quick(&format!("w{number}"), "d")
            },
        )
        .await;
        refused += usize::from(matches!(outcome, Err(ExecutionError::Refused(_))));
    }
    ensure!(refused == 4, "{refused} of 20 were refused");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_agent_goes_on_with_the_run() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let events = Events::new(16, Vec::new());
    let fresh = LinkOptions {
        told: Some((events.clone(), SessionId([1; 16]))),
        ..LinkOptions::default()
    };
    let resumed = LinkOptions {
        resumed: true,
        ..fresh.clone()
    };
    let before = RunnerLink::open(KernelId([7; 16]), runner.address, fresh);
    execution::execute(
        &before,
        ExecuteRequest {
            flush_timeout: Some(0.0),
            ..request("r", Mode::Query, "long()")
        },
    )
    .await?;
    runner.expect("code", "long()").await?;
    before.leave().await;
    runner.is_idle.store(false, Ordering::Relaxed);
    let after = RunnerLink::open(KernelId([7; 16]), runner.address, resumed.clone());
    after.status(Duration::from_secs(10)).await?;
    // Output that comes before the client asks again is not lost.
    runner.send("stdout", "rest\n");
    after.status(Duration::from_secs(10)).await?;
    runner.send("finished", r#"{"exitCode": 3}"#);
    let reply = execute(&after, "r", Mode::Continue, "").await?;
    ensure!(
        reply.exit_code == Some(3) && text(&reply)? == "rest\n",
        "{reply:?}"
    );
    after.close().await;

    // A client that continues a run which is already over does not block others.
    runner.is_idle.store(true, Ordering::Relaxed);
    let third = RunnerLink::open(KernelId([7; 16]), runner.address, resumed);
    let gone = execution::execute(
        &third,
        ExecuteRequest {
            flush_timeout: Some(0.1),
            ..request("r", Mode::Continue, "")
        },
    )
    .await?;
    ensure!(gone.status == Status::Continued);
    let play = async {
        runner.expect("code", "next()").await?;
        runner.send("finished", r#"{"exitCode": 0}"#);
        Ok(())
    };
    let (reply, ()) = tokio::try_join!(execute(&third, "n", Mode::Query, "next()"), play)?;
    ensure!(reply.status == Status::Finished);

    // A kernel that goes away cancels what it had not finished.
    let cut_off = async {
        runner.expect("code", "last()").await?;
        third.close().await;
        anyhow::Ok(())
    };
    let (failed, cut) = tokio::join!(execute(&third, "l", Mode::Query, "last()"), cut_off);
    cut?;
    ensure!(failed.is_err(), "{failed:?}");
    let (told, _) = events.ring().after(0, 16);
    let mut told: Vec<&str> = told.iter().map(|told| told.event.name()).collect();
    // Whether the client or the end of its run comes first is chance.
    told.dedup();
    ensure!(
        told == [
            "execution_started",
            "execution_finished",
            "execution_started",
            "execution_finished",
            "execution_started",
            "execution_cancelled"
        ],
        "{told:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_link_leaves_no_second_peer_behind() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let old = link_to(&runner);
    old.status(Duration::from_secs(10)).await?;
    old.close().await;
    let new = link_to(&runner);
    new.status(Duration::from_secs(10)).await?;
    execution::execute(
        &new,
        ExecuteRequest {
            flush_timeout: Some(0.0),
            ..request("r", Mode::Query, "count()")
        },
    )
    .await?;
    for number in 0..200 {
        runner.send("stdout", format!("{number}\n"));
    }
    runner.send("finished", r#"{"exitCode": 0}"#);
    let reply = execute(&new, "r", Mode::Continue, "").await?;
    ensure!(
        text(&reply)?.lines().count() == 200,
        "no message went to the closed link"
    );
    Ok(())
}

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
            slow.error.as_deref() == Some("timeout") && begun.elapsed() < Duration::from_secs(11),
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

#[tokio::test(flavor = "multi_thread")]
async fn completions_and_pings_wait_for_ever_in_the_original() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let play = async {
        runner
            .expect("complete", r#"{"code": "pri", "row": 0}"#)
            .await?;
        runner.send("completion", r#"{"suggestions": ["print"]}"#);
        Ok::<(), anyhow::Error>(())
    };
    let opts: Map<String, Value> = serde_json::from_value(json!({"row": 0}))?;
    let ask = async { Ok(execution::completions(&link, "pri", opts).await) };
    let (reply, ()) = tokio::try_join!(ask, play)?;
    ensure!(
        serde_json::to_value(&reply)?
            == json!({"result": {"status": "finished", "error": null, "suggestions": ["print"]}})
    );
    let status = execution::ping_kernel(&link).await.context("alive")?;
    ensure!(serde_json::to_value(status)?["started_at"].is_f64());

    runner.answers_status.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    let (ping, silent) = tokio::join!(
        execution::ping_kernel(&link),
        execution::completions(&link, "x", Map::new())
    );
    ensure!(ping.is_none() && begun.elapsed() < Duration::from_secs(10));
    ensure!(serde_json::to_value(&silent)?["result"]["status"] == "failed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_runner_is_pinged_while_idle() -> Result<()> {
    let runner = FakeRunner::start().await?;
    runner.answers_status.store(false, Ordering::Relaxed);
    let options = LinkOptions {
        ping_interval: Duration::from_secs(1),
        ..LinkOptions::default()
    };
    let link = RunnerLink::open(KernelId([9; 16]), runner.address, options);
    runner.expect("status", "").await?;
    runner.expect("status", "").await?;
    link.close().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_takes_too_long_is_ended() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let runs = RunLimits {
        exec_timeout: Some(Duration::from_millis(400)),
        ..RunLimits::default()
    };
    let link = RunnerLink::open(
        KernelId([9; 16]),
        runner.address,
        LinkOptions {
            runs,
            ..LinkOptions::default()
        },
    );
    let reply = execution::execute(
        &link,
        ExecuteRequest {
            flush_timeout: Some(10.0),
            ..request("t", Mode::Query, "for ever")
        },
    )
    .await?;
    ensure!(reply.status == Status::ExecTimeout, "{reply:?}");
    Ok(())
}

async fn batch_steps(runner: &FakeRunner, code: &str) -> Result<()> {
    runner.expect("clean", "").await?;
    runner.expect("build", "").await?;
    runner.expect("exec", code).await?;
    runner.send("clean-finished", r#"{"exitCode": 0}"#);
    runner.send("build-finished", r#"{"exitCode": 0}"#);
    Ok(())
}

/// A batch job from its submission to its end.
async fn batch_job(
    link: &RunnerLink,
    code: &str,
    timeout: Option<Duration>,
    gone: &CancellationToken,
) -> BatchOutcome {
    if !batch::submit(link, code.to_owned(), gone).await {
        return BatchOutcome::KernelGone;
    }
    batch::attend(link, timeout, None, gone).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_whose_end_or_messages_are_lost_ends_all_the_same() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let events = Events::new(16, Vec::new());
    let options = LinkOptions {
        told: Some((events.clone(), SessionId([1; 16]))),
        ..LinkOptions::default()
    };
    let told = || {
        let (told, _) = events.ring().after(0, 16);
        told.iter()
            .map(|told| told.event.name())
            .collect::<Vec<_>>()
    };
    // An earlier agent has told its start, and read its end without telling it.
    let resumed = LinkOptions {
        resumed: true,
        owed: 1,
        ..options.clone()
    };
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, resumed);
    let mut owed = link.runs_owed();
    tokio::time::timeout(Duration::from_secs(10), owed.wait_for(|owed| *owed == 0)).await??;
    ensure!(told() == ["execution_cancelled"], "{:?}", told());
    let reply = execute(&link, "old", Mode::Continue, "").await?;
    ensure!(
        (reply.status, reply.exit_code) == (Status::Finished, None),
        "{reply:?}"
    );
    link.close().await;

    // The container is moved, and what was sent to it lies where it was.
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, options);
    let elsewhere = FakeRunner::start().await?;
    let moved = async {
        runner.expect("code", "lost()").await?;
        link.follow(elsewhere.address);
        anyhow::Ok(())
    };
    let (reply, ()) = tokio::try_join!(execute(&link, "r", Mode::Query, "lost()"), moved)?;
    ensure!(
        (reply.status, reply.exit_code) == (Status::Finished, None),
        "{reply:?}"
    );
    // The next one is not in its way.
    let play = async {
        elsewhere.expect("code", "next()").await?;
        elsewhere.send("finished", r#"{"exitCode": 0}"#);
        anyhow::Ok(())
    };
    let (reply, ()) = tokio::try_join!(execute(&link, "n", Mode::Query, "next()"), play)?;
    ensure!(reply.exit_code == Some(0), "{reply:?}");
    let (lost, next) = (
        [
            "execution_cancelled",
            "execution_started",
            "execution_cancelled",
        ],
        ["execution_started", "execution_finished"],
    );
    let told = told();
    ensure!(told == [lost.as_slice(), &next].concat(), "{told:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_jobs_end_with_one_outcome() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let alive = CancellationToken::new();
    for (answer, expected) in [
        (r#"{"exitCode": 0}"#, BatchOutcome::Succeeded),
        (r#"{"exitCode": 4}"#, BatchOutcome::Failed { exit_code: 4 }),
        ("{}", BatchOutcome::Failed { exit_code: -1 }),
    ] {
        let play = async {
            batch_steps(&runner, answer).await?;
            runner.send("stdout", "noise\n");
            runner.send("finished", answer);
            Ok::<(), anyhow::Error>(())
        };
        let work = async { Ok(batch_job(&link, answer, None, &alive).await) };
        let (outcome, ()) = tokio::try_join!(work, play)?;
        ensure!(outcome == expected, "{outcome:?}");
    }
    // A restarted agent re-attaches.
    link.close().await;
    runner.is_idle.store(false, Ordering::Relaxed);
    let resumed = LinkOptions {
        resumed: true,
        ..LinkOptions::default()
    };
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, resumed.clone());
    batch::adopt(&link);
    let work = async { Ok(batch::attend(&link, None, None, &alive).await) };
    let play = async {
        runner.send("stdout", "more\n");
        runner.send("finished", r#"{"exitCode": 0}"#);
        Ok::<(), anyhow::Error>(())
    };
    let (outcome, ()) = tokio::try_join!(work, play)?;
    ensure!(outcome == BatchOutcome::Succeeded);
    // The kernel goes away.
    let gone = CancellationToken::new();
    let (outcome, ()) = tokio::join!(batch_job(&link, "never", None, &gone), async {
        gone.cancel()
    });
    ensure!(outcome == BatchOutcome::KernelGone);
    // The agent stops: an end that it has read nobody else will.
    link.close().await;
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, resumed);
    batch::adopt(&link);
    runner.send("finished", r#"{"exitCode": 5}"#);
    let heard = async || link.current_run().is_none().then_some(());
    harness::wait::until("the end is heard", Duration::from_secs(10), heard).await?;
    link.leave().await;
    let outcome = batch::attend(&link, None, None, &alive).await;
    ensure!(
        outcome == BatchOutcome::Failed { exit_code: 5 },
        "{outcome:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_timeout_leaves_the_command_running_in_the_original() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let alive = CancellationToken::new();
    let limit = Some(Duration::from_millis(500));
    let play = async {
        batch_steps(&runner, "sleep 1000").await?;
        runner.expect("interrupt", "").await?;
        runner.send("finished", r#"{"exitCode": -2}"#);
        Ok::<(), anyhow::Error>(())
    };
    let work = async { Ok(batch_job(&link, "sleep 1000", limit, &alive).await) };
    let (outcome, ()) = tokio::try_join!(work, play)?;
    ensure!(outcome == BatchOutcome::TimedOut);
    ensure!(outcome.event() == ("session_failure", "task-timeout", -2));
    Ok(())
}
