//! What lies in the server after events were emitted and values were put.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use config::Secret;
use control::events::bus::{Endpoint, Put, Role, StoreError, VolumeRequest};
use control::events::{Event, Events};
use harness::redis::{Answer, Redis, RedisOptions, valkey};
use harness::wait;

use super::{LIMIT, bus, drained, ended, numbers, settings};

fn updated(current: u64) -> Event {
    Event::BgtaskUpdated {
        task: "29d8aebc-8d49-427a-9cce-86d5e75ebdb9".into(),
        current,
        total: 9,
        message: None,
    }
}

/// Emits one event of each kind and looks at everything they leave.
async fn publish_and_look(redis: &Redis) -> Result<()> {
    let mut listener = redis.client()?;
    listener.ask(&["SUBSCRIBE", "events_all"])?;
    let (bus, events) = bus(&settings(redis.port))?;
    events.emit(Event::AgentStarted {
        reason: "self-started",
    });
    events.emit(ended(7));
    events.emit(updated(3));
    drained(&bus).await?;

    let stream = redis.stream()?;
    let names: Vec<String> = stream.iter().map(|entry| entry.text("name")).collect();
    assert_eq!(names, ["agent_started", "kernel_terminated"]);
    let fields: Vec<&str> = stream[1]
        .fields
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(fields, ["name", "source", "args", "metadata"]);
    assert_eq!(stream[1].text("source"), "i-evh");
    assert_eq!(
        stream[1].text("metadata"),
        r#"{"request_id":null,"user":null}"#
    );

    // Both broadcasts, the kernel's after its anycast, with the same arguments.
    let mut heard = Vec::new();
    for _ in 0..2 {
        let message = listener.read()?;
        let text: serde_json::Value = serde_json::from_slice(message.item(2)?.bytes()?)?;
        heard.push(text);
    }
    assert_eq!(heard[0]["name"], "kernel_terminated");
    let args = STANDARD.decode(heard[0]["args"].as_str().context("base64")?)?;
    assert_eq!(args, stream[1].bytes("args"));
    assert_eq!(heard[1]["name"], "bgtask_updated");

    let mut client = redis.client()?;
    client.ask(&["SELECT", "4"])?;
    let key = "bgtask.29d8aebc-8d49-427a-9cce-86d5e75ebdb9";
    let cached: serde_json::Value = serde_json::from_slice(client.ask(&["GET", key])?.bytes()?)?;
    assert_eq!(cached, heard[1]);
    let expires = client.ask(&["TTL", key])?.int()?;
    assert!((1..=300).contains(&expires), "{expires}");
    bus.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test]
async fn streams_channel_and_cache_hold_what_was_emitted() -> Result<()> {
    publish_and_look(&Redis::start()?).await
}

#[tokio::test]
async fn a_valkey_holds_it_as_well() -> Result<()> {
    let Some(program) = valkey("event_bus")? else {
        return Ok(());
    };
    publish_and_look(&Redis::start_program(&program, RedisOptions::default())?).await
}

#[tokio::test]
async fn values_go_to_the_database_of_their_role() -> Result<()> {
    let redis = Redis::start()?;
    let (bus, _events) = bus(&settings(redis.port))?;
    let long = Duration::from_secs(86_400);
    bus.statistics()
        .put("node", &b"\x81\xff"[..], Duration::from_secs(120))
        .await?;
    let puts = (0..3)
        .map(|n| Put {
            key: format!("kernel-{n}"),
            value: vec![n].into(),
            expires: long,
        })
        .collect();
    bus.statistics().put_all(puts).await?;
    let fields = vec![
        ("cpu".to_owned(), "{}".into()),
        ("ram".to_owned(), "{}".into()),
    ];
    bus.statistics()
        .set_fields("computer.metadata", fields.clone(), None)
        .await?;
    bus.statistics()
        .change_fields("abuse_report", fields[..1].to_vec(), vec![])
        .await?;
    bus.statistics()
        .change_fields("abuse_report", fields[1..].to_vec(), vec!["cpu".into()])
        .await?;
    let logs = vec!["one".into(), "two".into()];
    bus.container_logs()
        .append("containerlog.c", logs, Duration::from_secs(3600))
        .await?;
    bus.service_discovery()
        .set_fields(
            "service_discovery.agent.x",
            fields,
            Some(Duration::from_secs(180)),
        )
        .await?;
    assert_eq!(
        bus.statistics().get("kernel-2").await?.as_deref(),
        Some(&[2][..])
    );
    assert_eq!(bus.statistics().get("nothing").await?, None);
    bus.statistics().delete("kernel-2").await?;
    assert_eq!(bus.statistics().get("kernel-2").await?, None);

    let mut client = redis.client()?;
    let ttl =
        |client: &mut harness::redis::RedisClient, key: &str| client.ask(&["TTL", key])?.int();
    assert_eq!(client.ask(&["GET", "node"])?.bytes()?, b"\x81\xff");
    assert!((100..=120).contains(&ttl(&mut client, "node")?));
    assert!((80_000..=86_400).contains(&ttl(&mut client, "kernel-0")?));
    assert_eq!(ttl(&mut client, "computer.metadata")?, -1);
    assert_eq!(
        client.ask(&["HKEYS", "computer.metadata"])?.items()?.len(),
        2
    );
    assert_eq!(
        client.ask(&["HKEYS", "abuse_report"])?.item(0)?.bytes()?,
        b"ram"
    );
    assert!((150..=180).contains(&ttl(&mut client, "service_discovery.agent.x")?));
    client.ask(&["SELECT", "6"])?;
    let list = client.ask(&["LRANGE", "containerlog.c", "0", "-1"])?;
    assert_eq!(
        list.items()?,
        [
            Answer::Bytes(b"one".to_vec()),
            Answer::Bytes(b"two".to_vec())
        ]
    );
    assert!((3500..=3600).contains(&ttl(&mut client, "containerlog.c")?));
    // What the server refuses is told, and the connection serves on.
    let refused = bus.container_logs().put_all(vec![]).await;
    assert!(refused.is_ok());
    let refused =
        bus.container_logs()
            .set_fields("containerlog.c", vec![("a".into(), "b".into())], None);
    assert!(matches!(refused.await, Err(StoreError::Refused { .. })));
    assert_eq!(bus.container_logs().get("x").await?, None);
    Ok(())
}

#[tokio::test]
async fn a_role_may_have_its_own_server_and_password() -> Result<()> {
    let password = "pass word";
    let common = Redis::start_with(RedisOptions {
        lines: vec![format!("requirepass \"{password}\"")],
        password: Some(password.into()),
        sentinel: false,
    })?;
    let own = Redis::start()?;
    let mut wanted = settings(common.port);
    wanted.server.password = Some(Secret::new(password));
    let other = settings(own.port).server;
    wanted.overrides.insert(Role::Statistics, other);
    let (bus, events) = bus(&wanted)?;
    events.emit(ended(1));
    drained(&bus).await?;
    bus.statistics().put("k", "v", LIMIT).await?;
    assert_eq!(numbers(&common.stream()?), [1]);
    assert_eq!(own.client()?.ask(&["GET", "k"])?.bytes()?, b"v");
    assert_eq!(common.client()?.ask(&["GET", "k"])?, Answer::Nil);

    // A wrong password is said to be one, and does not end the bus.
    wanted.server.password = Some(Secret::new("wrong"));
    let (bus, events) = super::bus(&wanted)?;
    events.emit(ended(2));
    let mut state = bus.state();
    let failed = tokio::time::timeout(LIMIT, state.wait_for(|state| state.trouble.is_some()));
    let trouble = failed.await??.trouble.clone().unwrap_or_default();
    ensure!(
        trouble.contains("WRONGPASS") || trouble.to_lowercase().contains("password"),
        "{trouble}"
    );
    ensure!(
        !trouble.contains("wrong\""),
        "the password is told: {trouble}"
    );
    Ok(())
}

#[tokio::test]
async fn sentinels_are_asked_for_the_master() -> Result<()> {
    let master = Redis::start()?;
    let sentinel = Redis::start_with(RedisOptions {
        lines: vec![
            format!("sentinel monitor mymaster 127.0.0.1 {} 1", master.port),
            "sentinel down-after-milliseconds mymaster 60000".into(),
        ],
        password: None,
        sentinel: true,
    })?;
    let mut wanted = settings(master.port);
    let nobody = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    wanted.server.endpoint = Endpoint::Sentinels {
        addresses: vec![
            nobody.to_string().parse()?,
            format!("127.0.0.1:{}", sentinel.port).parse()?,
        ],
        service_name: "mymaster".into(),
    };
    let (bus, events) = bus(&wanted)?;
    events.emit(ended(5));
    drained(&bus).await?;
    bus.statistics().put("k", "v", LIMIT).await?;
    assert_eq!(numbers(&master.stream()?), [5]);

    // One that takes connections and says nothing costs less than a call's deadline.
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    wanted.server.endpoint = Endpoint::Sentinels {
        addresses: vec![
            silent.local_addr()?.to_string().parse()?,
            format!("127.0.0.1:{}", sentinel.port).parse()?,
        ],
        service_name: "mymaster".into(),
    };
    wanted.connect_timeout = Duration::from_secs(60);
    wanted.command_timeout = Duration::from_secs(60);
    let (bus, _events) = super::bus(&wanted)?;
    let put = bus.statistics().put("k", "w", LIMIT);
    // The publisher waits no longer.
    tokio::time::timeout(Duration::from_secs(5), put).await??;
    Ok(())
}

#[tokio::test]
async fn a_fail_over_leads_to_the_new_master_also_where_nobody_may_ask_for_roles() -> Result<()> {
    let start = |line: String| {
        Redis::start_with(RedisOptions {
            lines: vec![line, "user default on nopass ~* &* +@all -role".into()],
            ..RedisOptions::default()
        })
    };
    let master = start("repl-diskless-sync-delay 0".into())?;
    let replica = start(format!("replicaof 127.0.0.1 {}", master.port))?;
    let sentinel = Redis::start_with(RedisOptions {
        lines: vec![
            format!("sentinel monitor mymaster 127.0.0.1 {} 1", master.port),
            format!("sentinel known-replica mymaster 127.0.0.1 {}", replica.port),
        ],
        password: None,
        sentinel: true,
    })?;
    let mut wanted = settings(master.port);
    wanted.server.endpoint = Endpoint::Sentinels {
        addresses: vec![format!("127.0.0.1:{}", sentinel.port).parse()?],
        service_name: "mymaster".into(),
    };
    let (bus, events) = bus(&wanted)?;
    events.emit(ended(1));
    drained(&bus).await?;
    assert_eq!(numbers(&master.stream()?), [1]);
    wait::until("the replica has it", LIMIT, || {
        let there = replica.stream().is_ok_and(|stream| numbers(&stream) == [1]);
        async move { there.then_some(()) }
    })
    .await?;
    let ask_sentinel = |question: &str| sentinel.client()?.ask(&["SENTINEL", question, "mymaster"]);
    wait::until("the sentinel takes the order", LIMIT, || {
        let ordered = ask_sentinel("FAILOVER");
        async move { ordered.ok() }
    })
    .await?;
    let port = replica.port.to_string();
    wait::until("the sentinel names the new master", LIMIT, || {
        let named = ask_sentinel("GET-MASTER-ADDR-BY-NAME");
        let named = named.and_then(|address| address.item(1)?.text());
        let moved = named.is_ok_and(|named| named == port);
        async move { moved.then_some(()) }
    })
    .await?;
    // As the sentinel does some seconds later. The bus is still connected to it.
    master.client()?.ask(&["REPLICAOF", "127.0.0.1", &port])?;
    events.emit(ended(2));
    drained(&bus).await?;
    assert_eq!(numbers(&replica.stream()?), [1, 2]);
    Ok(())
}

#[tokio::test]
async fn volume_requests_are_heard_also_after_an_outage() -> Result<()> {
    let mut redis = Redis::start()?;
    let (bus, _events) = bus(&settings(redis.port))?;
    let mut requests = bus.take_volume_requests().context("taken once")?;
    ensure!(bus.take_volume_requests().is_none(), "taken twice");
    let args = STANDARD.encode(b"\x96\xa1d\xa1b\xa1q\xc0\xc3\xc0");
    let text = format!(
        "{{\"name\":\"do_volume_unmount\",\"source\":\"m\",\"args\":\"{args}\",\"metadata\":\"{{}}\"}}"
    );
    for round in 0..2 {
        let heard = wait::until("a request is heard", LIMIT, || {
            // Published until somebody listens.
            let sent = redis.client().and_then(|mut client| {
                client.ask(&["PUBLISH", "events_all", "noise"])?;
                client.ask(&["PUBLISH", "events_all", &text])?.int()
            });
            let heard = requests.try_recv().ok();
            async move { heard.filter(|_| sent.is_ok()) }
        });
        let VolumeRequest::Unmount {
            dir_name,
            edit_fstab,
            ..
        } = heard.await?
        else {
            anyhow::bail!("another request in round {round}")
        };
        assert_eq!((dir_name.as_str(), edit_fstab), ("d", true));
        redis.restart()?;
        while requests.try_recv().is_ok() {}
    }
    Ok(())
}

#[tokio::test]
async fn error_events_do_not_crowd_out_the_others() -> Result<()> {
    let redis = Redis::start()?;
    let (bus, events): (_, Events) = bus(&settings(redis.port))?;
    events.emit(ended(1));
    for n in 0..500 {
        events.emit(Event::AgentError {
            message: format!("failure {n}"),
            trace: None,
            context: serde_json::Map::new(),
            severity: control::events::Severity::Error,
        });
    }
    events.emit(ended(2));
    drained(&bus).await?;
    let stream = redis.stream()?;
    assert_eq!(numbers(&stream), [1, 2]);
    let errors = stream
        .iter()
        .filter(|entry| entry.text("name") == "agent_error")
        .count();
    assert!(
        (1..20).contains(&errors),
        "{errors} at {:?}",
        SystemTime::now()
    );
    Ok(())
}
