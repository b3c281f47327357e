//! Batch jobs, and runs whose end is lost.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use control::events::Events;
use control::kernel::batch::{self, BatchOutcome};
use control::kernel::execution::{Mode, Status};
use control::kernel::lifecycle::Reason;
use control::kernel::runner_link::{LinkOptions, Owed, RunnerLink};
use harness::fake_runner::FakeRunner;
use shared::ids::{KernelId, SessionId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{execute_to_its_end, link_to};

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
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    if let Err(outcome) = batch::submit(link, code.to_owned(), deadline, gone).await {
        return outcome;
    }
    let sent = async {
        batch::turn(link).await;
        batch::send(link);
        std::future::pending().await
    };
    let outcome = tokio::select! {
        never = sent => never,
        outcome = batch::attend(link, deadline, None, gone) => outcome,
    };
    batch::withdraw(link);
    outcome
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_job_whose_time_is_up_before_its_turn_is_never_sent() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let alive = CancellationToken::new();
    let play = async {
        runner.expect("code", "first()").await?;
        let limit = Some(Duration::from_millis(100));
        let outcome = batch_job(&link, "late", limit, &alive).await;
        ensure!(outcome == BatchOutcome::TimedOut, "{outcome:?}");
        runner.send("finished", r#"{"exitCode": 0}"#);
        runner.expect("code", "next()").await?;
        runner.send("finished", r#"{"exitCode": 1}"#);
        Ok::<(), anyhow::Error>(())
    };
    let work = async {
        execute_to_its_end(&link, "first", Mode::Query, "first()").await?;
        execute_to_its_end(&link, "next", Mode::Query, "next()").await
    };
    let ((), next) = tokio::try_join!(play, work)?;
    ensure!(next.exit_code == Some(1), "{next:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_job_is_sent_after_its_turn_was_noted() -> Result<()> {
    let runner = FakeRunner::start().await?;
    let link = link_to(&runner);
    let alive = CancellationToken::new();
    let (ended, noted) = (CancellationToken::new(), CancellationToken::new());
    let play = async {
        runner.expect("code", "first()").await?;
        let submitted = batch::submit(&link, "job".to_owned(), None, &alive).await;
        ensure!(submitted == Ok(()), "{submitted:?}");
        runner.send("finished", r#"{"exitCode": 0}"#);
        batch::turn(&link).await;
        ended.cancelled().await;
        // A kill in this moment leaves a job that was never sent, and says so.
        let owed = link.owed().borrow().ids.clone();
        ensure!(
            owed.current.is_none() && owed.waiting == [batch::RUN_ID],
            "{owed:?}"
        );
        link.notify_oom()?;
        runner
            .expect("event", r#"{"data":{},"type":"oom"}"#)
            .await?;
        batch::send(&link);
        noted.cancel();
        batch_steps(&runner, "job").await?;
        runner.send("finished", r#"{"exitCode": 3}"#);
        Ok::<(), anyhow::Error>(())
    };
    let work = async {
        let first = execute_to_its_end(&link, "first", Mode::Query, "first()").await?;
        ensure!(first.exit_code == Some(0), "{first:?}");
        ended.cancel();
        noted.cancelled().await;
        batch::sent(&link).await;
        Ok(batch::attend(&link, None, None, &alive).await)
    };
    let (outcome, ()) = tokio::try_join!(work, play)?;
    ensure!(
        outcome == BatchOutcome::Failed { exit_code: 3 },
        "{outcome:?}"
    );
    Ok(())
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
        owed: Owed {
            runs: 1,
            ..Owed::default()
        },
        ..options.clone()
    };
    let link = RunnerLink::open(KernelId([7; 16]), runner.address, resumed);
    let mut owed = link.owed();
    tokio::time::timeout(
        Duration::from_secs(10),
        owed.wait_for(|owed| owed.runs == 0),
    )
    .await??;
    ensure!(told() == ["execution_cancelled"], "{:?}", told());
    let reply = execute_to_its_end(&link, "old", Mode::Continue, "").await?;
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
    let lost = execute_to_its_end(&link, "r", Mode::Query, "lost()");
    let (reply, ()) = tokio::try_join!(lost, moved)?;
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
    let next = execute_to_its_end(&link, "n", Mode::Query, "next()");
    let (reply, ()) = tokio::try_join!(next, play)?;
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
    ensure!(outcome.told() == (Reason::TASK_TIMEOUT, -2));
    Ok(())
}
