//! What the runner link and the execution RPCs make of a runner's messages: captured sessions of the
//! real runner replayed, and everything a runner or a client can do wrong.

mod batch;
mod lives;
mod services;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use control::kernel::execution::{
    self, BatchSteps, ExecuteReply, ExecuteRequest, ExecutionError, Mode, Status,
};
use control::kernel::runner_link::runs::RunLimits;
use control::kernel::runner_link::{
    InitError, InitPolling, LinkError, LinkOptions, RunnerAddress, RunnerLink,
};
use harness::fake_runner::{FakeRunner, logged_frames, vector};
use harness::kernels::request;
use serde_json::{Map, Value, json};
use shared::ids::KernelId;
use tokio_util::sync::CancellationToken;

fn link_to(runner: &FakeRunner) -> RunnerLink {
    RunnerLink::open(KernelId([7; 16]), runner.address, LinkOptions::default())
}

async fn execute(link: &RunnerLink, run_id: &str, mode: Mode, code: &str) -> Result<ExecuteReply> {
    Ok(execution::execute(link, request(run_id, mode, code)).await?)
}

/// Like [`execute`], for a run whose end may take long where the machine is busy. One call: each is told.
async fn execute_to_its_end(
    link: &RunnerLink,
    run_id: &str,
    mode: Mode,
    code: &str,
) -> Result<ExecuteReply> {
    let patient = ExecuteRequest {
        flush_timeout: Some(20.0),
        ..request(run_id, mode, code)
    };
    Ok(execution::execute(link, patient).await?)
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
    // A runner that starts slowly has the time of one attempt, though no other would begin after it.
    let polling = InitPolling::of(&config::KernelLifecycles {
        init_polling_attempt: 10,
        init_polling_timeout: Duration::from_secs(1),
        init_timeout: Duration::from_secs(15),
    });
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
    ensure!(begun.elapsed() < Duration::from_secs(60));
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

/// A run `loud` with so many pieces of output on their way, of which the link may hold `room`, and waits
/// for a client for `hold_up`.
async fn loud_run(
    runner: &FakeRunner,
    (room, hold_up): (usize, Duration),
    pieces: usize,
) -> Result<RunnerLink> {
    let runs = RunLimits {
        records: room,
        hold_up,
        ..RunLimits::default()
    };
    let options = LinkOptions {
        runs,
        ..LinkOptions::default()
    };
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, options);
    let first = ExecuteRequest {
        flush_timeout: Some(0.0),
        ..request("loud", Mode::Query, "shout()")
    };
    execution::execute(&link, first).await?;
    runner.expect("code", "shout()").await?;
    for number in 0..pieces {
        let stream = if number % 2 == 0 { "stdout" } else { "stderr" };
        runner.send(stream, format!("{number}\n"));
    }
    Ok(link)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_polls_loses_nothing_of_a_flood() -> Result<()> {
    const PIECES: usize = 5000;
    let runner = FakeRunner::start().await?;
    let link = loud_run(&runner, (512, Duration::from_secs(20)), PIECES).await?;
    runner.send("finished", r#"{"exitCode": 0}"#);
    let client = async {
        let mut output = String::new();
        loop {
            // The way of the reply and of the next call.
            tokio::time::sleep(Duration::from_millis(20)).await;
            let reply = execute(&link, "loud", Mode::Continue, "").await?;
            output.push_str(&text(&reply)?);
            if reply.status == Status::Finished {
                return anyhow::Ok(output);
            }
        }
    };
    // Behind all of it.
    let status = async { Ok(link.status(Duration::from_secs(20)).await?) };
    let (output, _) = tokio::try_join!(client, status)?;
    let expected: String = (0..PIECES).map(|number| format!("{number}\n")).collect();
    ensure!(output == expected, "{} bytes arrived", output.len());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_blocks_pings_in_the_original() -> Result<()> {
    const RECORDS: usize = 6000;
    let runner = FakeRunner::start().await?;
    let hold_up = Duration::from_millis(300);
    let link = loud_run(&runner, (4096, hold_up), RECORDS).await?;
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
    ensure!(waiting.status == Status::Continued && begun.elapsed() < Duration::from_secs(60));
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
    let ask =
        async { Ok(execution::completions(&link, "pri", opts, execution::COMPLETION_LIMIT).await) };
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
        execution::completions(&link, "x", Map::new(), execution::COMPLETION_LIMIT)
    );
    ensure!(ping.is_none() && begun.elapsed() < Duration::from_secs(60));
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
