//! The bus killed, hung, cut off, restarted empty; the agent killed between.

use std::time::Duration;

use anyhow::{Result, ensure};
use control::events::Event;
use control::events::bus::Bus;
use control::events::bus::message::Message;
use control::events::bus::queue::{Bound, Bounds};
use harness::redis::{Gate, Redis};
use shared::ids::SessionId;

use super::{LIMIT, bus, drained, ended, numbers, settings};

/// Waits until the bus has noticed that the server does not answer.
async fn noticed(bus: &Bus) -> Result<()> {
    let mut state = bus.state();
    tokio::time::timeout(
        LIMIT,
        state.wait_for(|state| state.connected == Some(false)),
    )
    .await??;
    Ok(())
}

#[tokio::test]
async fn a_killed_server_that_comes_back_empty_gets_what_was_emitted_meanwhile() -> Result<()> {
    let mut redis = Redis::start()?;
    let (bus, events) = bus(&settings(redis.port))?;
    events.emit(ended(0));
    drained(&bus).await?;
    redis.kill()?;
    for n in 1..=60 {
        events.emit(ended(n));
    }
    noticed(&bus).await?;
    for n in 61..=80 {
        events.emit(ended(n));
    }
    redis.restart()?;
    drained(&bus).await?;
    let expected: Vec<u16> = (1..=80).collect();
    assert_eq!(numbers(&redis.stream()?), expected);
    // A manager that finds the server later reads them too.
    let mut manager = redis.manager()?;
    let mut read = Vec::new();
    while read.len() < expected.len() {
        let more = manager.read(Duration::from_secs(5))?;
        ensure!(!more.is_empty(), "only {} were read", read.len());
        read.extend(more);
    }
    assert_eq!(numbers(&read), expected);
    Ok(())
}

#[tokio::test]
async fn a_long_backlog_waits_for_a_manager_that_comes_later() -> Result<()> {
    let redis = Redis::start()?;
    let (bus, events) = bus(&settings(redis.port))?;
    for n in 0..400 {
        events.emit(ended(n));
    }
    // More than half of what the stream keeps is there, and nobody reads.
    harness::wait::until("much is unread", LIMIT, || {
        let unread = redis.stream().map_or(0, |stream| stream.len());
        async move { (unread > 64).then_some(()) }
    })
    .await?;
    // Without a pause all of them pass by in this time.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut manager = redis.manager()?;
    let reading = tokio::task::spawn_blocking(move || -> Result<Vec<u16>> {
        let mut read = Vec::new();
        loop {
            let more = manager.read(Duration::from_secs(2))?;
            if more.is_empty() {
                return Ok(read);
            }
            read.extend(numbers(&more));
            if read.last() == Some(&399) {
                return Ok(read);
            }
        }
    });
    assert_eq!(reading.await??, (0..400).collect::<Vec<u16>>());
    drained(&bus).await
}

/// A stream that lost most of 300 entries before managers read them.
fn trimmed_stream(redis: &Redis) -> Result<()> {
    let mut client = redis.client()?;
    client.ask(&["SELECT", "4"])?;
    let add = ["XADD", "events", "MAXLEN", "~", "128", "*", "name", "other"];
    for _ in 0..300 {
        client.ask(&add)?;
    }
    Ok(())
}

#[tokio::test]
async fn managers_that_have_read_all_that_is_left_are_not_waited_for() -> Result<()> {
    let redis = Redis::start()?;
    let mut manager = redis.manager()?;
    trimmed_stream(&redis)?;
    while !manager.read(Duration::from_millis(1))?.is_empty() {}
    let (bus, events) = bus(&settings(redis.port))?;
    for n in 0..40 {
        events.emit(ended(n));
    }
    // Half as long as managers are waited for.
    ensure!(
        bus.drained(Duration::from_secs(5)).await,
        "managers are waited for"
    );
    Ok(())
}

#[tokio::test]
async fn a_backlog_that_waits_for_managers_does_not_hold_up_a_report() -> Result<()> {
    let redis = Redis::start()?;
    let _manager = redis.manager()?;
    trimmed_stream(&redis)?;
    let (bus, events) = bus(&settings(redis.port))?;
    events.emit(ended(0));
    bus.publish(Message::report("agent_heartbeat", Vec::new())?);
    let mut state = bus.state();
    // Half as long as managers are waited for.
    let soon = Duration::from_secs(5);
    let connected = state.wait_for(|state| state.connected == Some(true) && state.sent == 1);
    tokio::time::timeout(soon, connected).await??;
    let stream = redis.stream()?;
    assert_eq!(numbers(&stream), [0; 0], "managers are behind");
    let last = stream.last().map(|entry| entry.text("name"));
    assert_eq!(last.as_deref(), Some("agent_heartbeat"));
    Ok(())
}

#[tokio::test]
async fn a_small_backlog_of_a_new_connection_goes_as_far_as_managers_have_room() -> Result<()> {
    let redis = Redis::start()?;
    let _manager = redis.manager()?;
    let mut client = redis.client()?;
    client.ask(&["SELECT", "4"])?;
    for _ in 0..60 {
        client.ask(&["XADD", "events", "*", "name", "other"])?;
    }
    let (bus, events) = bus(&settings(redis.port))?;
    for n in 0..30 {
        events.emit(ended(n));
    }
    let sent = async |count| {
        let mut state = bus.state();
        let sent = state.wait_for(|state| state.sent == count);
        tokio::time::timeout(Duration::from_secs(5), sent)
            .await
            .map(drop)
    };
    sent(8).await?;
    // It goes while the rest is held.
    bus.publish(Message::report("agent_heartbeat", Vec::new())?);
    sent(9).await?;
    assert_eq!(numbers(&redis.stream()?), (0..8).collect::<Vec<u16>>());
    Ok(())
}

#[tokio::test]
async fn a_hung_server_that_goes_on_gets_each_event_once() -> Result<()> {
    let redis = Redis::start()?;
    let (bus, events) = bus(&settings(redis.port))?;
    events.emit(ended(0));
    drained(&bus).await?;
    redis.freeze()?;
    // Some are in the frozen server's socket, where they will be carried out later.
    for n in 1..=40 {
        events.emit(ended(n));
    }
    noticed(&bus).await?;
    for n in 41..=50 {
        events.emit(ended(n));
    }
    // Others see at once that there is no answer, and wait no longer than they have to.
    let put = bus.statistics().put("k", "v", LIMIT).await;
    ensure!(put.is_err(), "a frozen server took a value");
    redis.thaw()?;
    drained(&bus).await?;
    let expected: Vec<u16> = (0..=50).collect();
    assert_eq!(numbers(&redis.stream()?), expected);
    Ok(())
}

#[tokio::test]
async fn a_server_cut_off_for_a_while_gets_each_event_once() -> Result<()> {
    let redis = Redis::start()?;
    let gate = Gate::before(redis.port).await?;
    let (bus, events) = bus(&settings(gate.port))?;
    events.emit(ended(0));
    drained(&bus).await?;
    gate.shut();
    for n in 1..=10 {
        events.emit(ended(n));
    }
    // Large values fill the socket: the connection must be given up all the same.
    let logs = vec![vec![7; 8 << 20].into()];
    let put = bus.container_logs().append("l", logs, LIMIT).await;
    ensure!(put.is_err(), "a cut network took a value");
    noticed(&bus).await?;
    gate.open();
    for n in 11..=20 {
        events.emit(ended(n));
    }
    drained(&bus).await?;
    let expected: Vec<u16> = (0..=20).collect();
    assert_eq!(numbers(&redis.stream()?), expected);
    harness::wait::until("values are taken again", LIMIT, || async {
        bus.container_logs()
            .append("m", vec!["x".into()], LIMIT)
            .await
            .ok()
    })
    .await
}

#[tokio::test]
async fn a_server_that_was_made_a_replica_is_left_for_the_one_that_took_over() -> Result<()> {
    let (old, new) = (Redis::start()?, Redis::start()?);
    let gate = Gate::before(old.port).await?;
    let (bus, _events) = bus(&settings(gate.port))?;
    bus.statistics().put("k", "before", LIMIT).await?;
    let port = new.port.to_string();
    old.client()?.ask(&["REPLICAOF", "127.0.0.1", &port])?;
    gate.lead_to(new.port);
    let refused = bus.statistics().put("k", "between", LIMIT).await;
    let words = refused.map_err(|err| err.to_string()).unwrap_err();
    ensure!(words.contains("READONLY"), "{words}");
    harness::wait::until("values are taken by the new server", LIMIT, || async {
        bus.statistics().put("k", "after", LIMIT).await.ok()
    })
    .await?;
    assert_eq!(new.client()?.ask(&["GET", "k"])?.bytes()?, b"after");
    Ok(())
}

#[tokio::test]
async fn a_server_without_memory_refuses_no_value_for_good() -> Result<()> {
    let redis = Redis::start()?;
    let (bus, _events) = bus(&settings(redis.port))?;
    let mut client = redis.client()?;
    client.ask(&["CONFIG", "SET", "maxmemory", "1"])?;
    let elements = || vec!["x".into()];
    let lists = bus.container_logs();
    let refused = lists.append("l", elements(), LIMIT).await.unwrap_err();
    ensure!(refused.is_certain() && !refused.is_final(), "{refused}");
    client.ask(&["CONFIG", "SET", "maxmemory", "0"])?;
    lists.append("l", elements(), LIMIT).await?;
    client.ask(&["SELECT", "6"])?;
    client.ask(&["SET", "other", "no list"])?;
    let refused = lists.append("other", elements(), LIMIT).await.unwrap_err();
    ensure!(refused.is_certain() && refused.is_final(), "{refused}");
    Ok(())
}

#[tokio::test]
async fn an_outage_longer_than_the_bounds_costs_the_oldest_and_no_memory() -> Result<()> {
    let mut redis = Redis::start()?;
    redis.kill()?;
    let bound = |count| Bound {
        count,
        bytes: 64 << 10,
    };
    let bounds = Bounds {
        journalled: bound(50),
        doing: bound(20),
        queued: bound(10),
        newest: bound(5),
    };
    let settings = settings(redis.port);
    let bus = Bus::start_with(&settings, bounds)?;
    let events = control::events::Events::new(4, vec![Box::new(bus.sink())]);
    for n in 0..500_u16 {
        events.emit(ended(n));
        events.emit(Event::DoAgentResourceCheck {
            agent: format!("i-{n}"),
        });
        events.emit(Event::BgtaskUpdated {
            task: format!("task-{}", n % 7),
            current: n.into(),
            total: 500,
            message: None,
        });
        ensure!(bus.waiting() <= 65, "{} wait", bus.waiting());
    }
    assert_eq!(bus.waiting(), 65);
    assert!(bus.state().borrow().left_out > 900);
    redis.restart()?;
    drained(&bus).await?;
    let stream = redis.stream()?;
    assert_eq!(numbers(&stream), (450..500).collect::<Vec<u16>>());
    let others = stream
        .iter()
        .filter(|entry| entry.text("name") == "do_agent_resource_check");
    assert_eq!(others.count(), 10);
    Ok(())
}

#[tokio::test]
async fn an_agent_that_ends_during_an_outage_sends_the_rest_after_its_next_start() -> Result<()> {
    let mut redis = Redis::start()?;
    let outbox = tempfile::tempdir()?;
    let mut settings = settings(redis.port);
    settings.outbox_dir = Some(outbox.path().join("outbox"));
    let (first, events) = bus(&settings)?;
    events.emit(ended(0));
    drained(&first).await?;
    redis.kill()?;
    for n in 1..=30 {
        events.emit(ended(n));
    }
    // A kill leaves what is in the file; so does dropping everything after it is there.
    ensure!(first.kept(LIMIT).await, "the outbox is not written");
    drop(events);
    drop(first);
    redis.restart()?;
    let (second, events) = bus(&settings)?;
    events.emit(Event::AgentStarted {
        reason: "self-started",
    });
    events.emit(ended(31));
    drained(&second).await?;
    let stream = redis.stream()?;
    assert_eq!(numbers(&stream), (1..=31).collect::<Vec<u16>>());
    assert_eq!(stream[30].text("name"), "agent_started", "not in its order");
    second.close(Duration::from_secs(5)).await;

    // Nothing is left, nothing is sent twice.
    drop(events);
    drop(second);
    let (third, events) = bus(&settings)?;
    events.emit(ended(32));
    drained(&third).await?;
    assert_eq!(numbers(&redis.stream()?), (1..=32).collect::<Vec<u16>>());
    Ok(())
}

#[tokio::test]
async fn an_agent_that_stops_while_the_server_hangs_leaves_each_event_once() -> Result<()> {
    let redis = Redis::start()?;
    let outbox = tempfile::tempdir()?;
    let mut settings = settings(redis.port);
    settings.outbox_dir = Some(outbox.path().join("outbox"));
    let (first, events) = bus(&settings)?;
    events.emit(ended(0));
    drained(&first).await?;
    redis.freeze()?;
    // In the frozen server's socket, where they will be carried out although their sender is gone.
    for n in 1..=20 {
        events.emit(ended(n));
    }
    noticed(&first).await?;
    // The same words again on purpose: nobody may take these for those.
    for n in 15..=25 {
        events.emit(ended(n));
    }
    first.close(Duration::from_secs(1)).await;
    drop((first, events));
    redis.thaw()?;
    let (second, events) = bus(&settings)?;
    events.emit(ended(26));
    drained(&second).await?;
    let expected: Vec<u16> = (0..=20).chain(15..=26).collect();
    assert_eq!(numbers(&redis.stream()?), expected);
    Ok(())
}

#[tokio::test]
async fn the_end_of_a_run_is_not_lost_with_an_agent_that_ends_during_an_outage() -> Result<()> {
    let mut redis = Redis::start()?;
    let outbox = tempfile::tempdir()?;
    let mut settings = settings(redis.port);
    settings.outbox_dir = Some(outbox.path().join("outbox"));
    let (first, events) = bus(&settings)?;
    let session = SessionId([7; 16]);
    events.emit(Event::ExecutionStarted { session });
    drained(&first).await?;
    redis.kill()?;
    for event in [
        Event::ExecutionFinished { session },
        Event::ExecutionStarted { session },
        Event::ExecutionCancelled { session },
        Event::ExecutionStarted { session },
        Event::ExecutionFinished { session },
    ] {
        events.emit(event);
    }
    ensure!(first.kept(LIMIT).await, "the outbox is not written");
    drop((first, events));
    redis.restart()?;
    let (second, _) = bus(&settings)?;
    drained(&second).await?;
    let told: Vec<String> = redis.stream()?.iter().map(|it| it.text("name")).collect();
    assert_eq!(
        told,
        [
            "execution_finished",
            "execution_started",
            "execution_cancelled",
            "execution_started",
            "execution_finished"
        ]
    );
    Ok(())
}

#[tokio::test]
async fn an_event_the_server_refuses_does_not_hold_up_the_others_for_ever() -> Result<()> {
    let redis = Redis::start()?;
    let mut client = redis.client()?;
    client.ask(&["SELECT", "4"])?;
    client.ask(&["SET", "events", "somebody else's"])?;
    let (bus, events) = bus(&settings(redis.port))?;
    events.emit(ended(1));
    let mut state = bus.state();
    // Reading the stream is refused too: the node says so and waits.
    tokio::time::timeout(LIMIT, state.wait_for(|state| state.trouble.is_some())).await??;
    let trouble = bus.state().borrow().trouble.clone().unwrap_or_default();
    ensure!(trouble.contains("WRONGTYPE"), "{trouble}");
    client.ask(&["DEL", "events"])?;
    drained(&bus).await?;
    assert_eq!(numbers(&redis.stream()?), [1]);
    // And while it works: each refused event is tried a few times and given up.
    client.ask(&["DEL", "events"])?;
    client.ask(&["SET", "events", "again"])?;
    events.emit(ended(2));
    tokio::time::timeout(LIMIT, state.wait_for(|state| state.left_out == 1)).await??;
    client.ask(&["DEL", "events"])?;
    events.emit(ended(3));
    drained(&bus).await?;
    assert_eq!(numbers(&redis.stream()?), [3]);
    Ok(())
}

/// A file system of its own that is full soon.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Result<Self> {
        let disk = Self(tempfile::tempdir()?);
        nix::mount::mount(
            Some("tmpfs"),
            disk.0.path(),
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some("size=256k"),
        )?;
        Ok(disk)
    }

    /// Takes all the room; answers what to delete.
    fn fill(&self) -> Result<std::path::PathBuf> {
        use std::io::Write;
        let path = self.0.path().join("filler");
        let mut file = std::fs::File::create(&path)?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_costs_no_event_when_there_is_room_again() -> Result<()> {
    let disk = SmallDisk::mount()?;
    let mut redis = Redis::start()?;
    redis.kill()?;
    let mut settings = settings(redis.port);
    settings.outbox_dir = Some(disk.0.path().join("outbox"));
    let (first, events) = bus(&settings)?;
    events.emit(ended(0));
    ensure!(first.kept(LIMIT).await);
    let filler = disk.fill()?;
    // More than the rest of the file's last page: one line is cut short.
    for n in 1..=50 {
        events.emit(ended(n));
    }
    ensure!(
        !first.kept(LIMIT).await,
        "an event that is not on the disk counts as kept"
    );
    std::fs::remove_file(&filler)?;
    events.emit(ended(51));
    ensure!(first.kept(LIMIT).await, "there is room");
    // As after a kill: the file is read while the one who wrote it is there.
    let (second, _) = bus(&settings)?;
    drop((first, events));
    redis.restart()?;
    drained(&second).await?;
    let expected: Vec<u16> = (0..=51).collect();
    assert_eq!(numbers(&redis.stream()?), expected);
    Ok(())
}

#[tokio::test]
async fn a_full_disk_keeps_nobody_from_starting_and_loses_nothing_that_was_on_it() -> Result<()> {
    let disk = SmallDisk::mount()?;
    let mut redis = Redis::start()?;
    redis.kill()?;
    let mut settings = settings(redis.port);
    settings.outbox_dir = Some(disk.0.path().join("outbox"));
    let (first, events) = bus(&settings)?;
    for n in 0..3 {
        events.emit(ended(n));
    }
    ensure!(first.kept(LIMIT).await);
    let filler = disk.fill()?;
    drop((first, events));
    // A start that finds the file, and one that finds neither file nor directory.
    for place in ["outbox", "new/outbox"] {
        settings.outbox_dir = Some(disk.0.path().join(place));
        let (second, events) = bus(&settings)?;
        let number = if place == "outbox" { 3 } else { 10 };
        events.emit(ended(number));
        ensure!(
            !second.kept(LIMIT).await,
            "an event that is not on the disk counts as kept"
        );
        std::fs::remove_file(&filler)?;
        ensure!(second.kept(LIMIT).await, "there is room");
        drop((second, events));
        disk.fill()?;
    }
    redis.restart()?;
    for place in ["outbox", "new/outbox"] {
        settings.outbox_dir = Some(disk.0.path().join(place));
        let (third, _) = bus(&settings)?;
        drained(&third).await?;
    }
    assert_eq!(numbers(&redis.stream()?), [0, 1, 2, 3, 10]);
    Ok(())
}
