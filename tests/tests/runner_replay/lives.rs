//! What a link leaves to the next one: runs that go on, and peers that do not.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, ensure};
use control::events::Events;
use control::kernel::execution::{self, ExecuteRequest, Mode, Status};
use control::kernel::runner_link::{LinkOptions, RunnerLink};
use harness::fake_runner::FakeRunner;
use shared::ids::{KernelId, SessionId};

use super::{execute, link_to, request, text};

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
