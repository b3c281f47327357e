//! Consoles of ended kernels: whole when they are announced, and announced once.

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use control::events::Event;
use control::events::bus::Role;
use control::events::bus::console_logs::ConsoleLogs;
use control::events::bus::message::Message;
use control::kernel::kept_logs::{KeptLogs, Shipping};
use harness::redis::Redis;
use shared::ids::{ContainerId, KernelId};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{LIMIT, bus, drained, settings};

#[tokio::test]
async fn a_console_is_announced_once_wherever_an_earlier_life_was_killed() -> Result<()> {
    let redis = Redis::start()?;
    let (bus, events) = bus(&settings(redis.port))?;
    let state = tempfile::tempdir()?;
    let logs = KeptLogs::open(state.path(), "i-evh")?;
    let ids = |n: u8| (KernelId([n; 16]), ContainerId([n; 32]));
    let key = |n: u8| format!("containerlog.{}", ids(n).1);
    let announcement = |n: u8| {
        let (kernel, container) = ids(n);
        Message::of(
            &Event::DoSyncKernelLogs { kernel, container },
            std::time::SystemTime::now(),
        )
    };
    // Three pieces each.
    let text = "x".repeat(3000);
    let whole = || vec![Bytes::from_static(b"piece"); 3];
    // Killed: with a part of the list there; with the list there and nothing told; with the list
    // there and told; after the manager took the list, the announcement forgotten by the stream;
    // before the first step; after the last one.
    let [part, listed, told, taken, fresh, sent] = [1, 2, 3, 4, 5, 6];
    for (n, shipping) in [
        (part, Shipping::Unsent),
        (listed, Shipping::Announcing),
        (told, Shipping::Announcing),
        (taken, Shipping::Announcing),
        (fresh, Shipping::Unsent),
        (sent, Shipping::Sent),
    ] {
        let (kernel, container) = ids(n);
        logs.store(kernel, &text)?;
        logs.to_ship(kernel, container)?;
        logs.set_shipping(kernel, container, shipping)?;
    }
    let lists = bus.container_logs();
    lists.append(key(part), vec!["piece".into()], LIMIT).await?;
    lists.append(key(listed), whole(), LIMIT).await?;
    lists.append(key(told), whole(), LIMIT).await?;
    bus.publish(announcement(told)?.unwrap());
    drained(&bus).await?;

    let (tasks, stopping) = (TaskTracker::new(), CancellationToken::new());
    let consoles = ConsoleLogs::start(
        &bus,
        logs.clone(),
        events.clone(),
        1024,
        &tasks,
        stopping.clone(),
    );
    harness::wait::until("all are shipped", LIMIT, || {
        let left = logs.unshipped();
        async move { left.is_empty().then_some(()) }
    })
    .await?;
    // An ending that is tried again ships nothing.
    consoles.ship(ids(fresh).0, ids(fresh).1);
    consoles.settled(ids(fresh).0, LIMIT).await;

    let mut client = redis.client()?;
    client.ask(&["SELECT", "6"])?;
    let stream = redis.stream()?;
    for (n, pieces, announcements) in [
        (part, 3, 1),
        (listed, 3, 1),
        (told, 3, 1),
        (taken, 0, 0),
        (fresh, 3, 1),
        (sent, 0, 0),
    ] {
        let args = announcement(n)?.unwrap().args;
        let found = stream
            .iter()
            .filter(|entry| entry.bytes("args") == args.as_ref())
            .count();
        let length = client.ask(&["LLEN", &key(n)])?.int()?;
        assert_eq!((length, found), (pieces, announcements), "kernel {n}");
    }
    stopping.cancel();
    Ok(())
}

#[tokio::test]
async fn nobody_waits_for_a_console_that_the_bus_does_not_take() -> Result<()> {
    let mut redis = Redis::start()?;
    let lists = Redis::start()?;
    let mut wanted = settings(redis.port);
    let own = settings(lists.port).server;
    wanted.overrides.insert(Role::ContainerLog, own);
    let (bus, events) = bus(&wanted)?;
    redis.kill()?;
    let state = tempfile::tempdir()?;
    let logs = KeptLogs::open(state.path(), "i-evh")?;
    let (kernel, container) = (KernelId([1; 16]), ContainerId([1; 32]));
    logs.store(kernel, "console")?;
    logs.to_ship(kernel, container)?;
    let (tasks, stopping) = (TaskTracker::new(), CancellationToken::new());
    let consoles = ConsoleLogs::start(&bus, logs.clone(), events, 1024, &tasks, stopping.clone());
    consoles.ship(kernel, container);
    tokio::time::timeout(LIMIT, consoles.settled(kernel, LIMIT * 100)).await?;
    assert_eq!(logs.unshipped(), [(kernel, container)]);
    // The list lapses: nobody has taken it, for nobody was told.
    let mut client = lists.client()?;
    client.ask(&["SELECT", "6"])?;
    let key = format!("containerlog.{container}");
    assert_eq!(client.ask(&["DEL", &key])?.int()?, 1);
    redis.restart()?;
    harness::wait::until("it is announced", LIMIT, || {
        let stream = redis.stream().unwrap_or_default();
        let told = stream
            .iter()
            .any(|entry| entry.text("name") == "do_sync_kernel_logs");
        async move { told.then_some(()) }
    })
    .await?;
    stopping.cancel();
    assert_eq!(client.ask(&["LLEN", &key])?.int()?, 1);
    // A manager that finds the server, which came back empty, later than this is told too.
    let read = redis.manager()?.read(Duration::from_secs(5))?;
    let names: Vec<String> = read.iter().map(|entry| entry.text("name")).collect();
    assert_eq!(names, ["do_sync_kernel_logs"]);
    Ok(())
}
