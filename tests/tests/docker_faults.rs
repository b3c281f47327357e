//! The engine module against an engine that hangs, breaks off, refuses, dies and comes back.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::time::Duration;

use control::docker::{
    CommitRequest, ContainerCreateBody, Deadlines, Docker, DockerError, DockerOptions, EngineEvent,
    EventStream, ExecRequest, LogOptions, RegistryAuth,
};
use control::image::{Images, Purged};
use control::kernel::distro::{DistroError, Distros, PROBE_LABEL};
use harness::engine::{Owned, unique};
use harness::fault_docker::{Fault, FaultDocker};
use harness::images::{Image, image};
use harness::wait;

/// Longest a step of these tests may take before the test fails.
const WATCHDOG: Duration = Duration::from_secs(30);

fn options(proxy: &FaultDocker) -> DockerOptions {
    let short = Duration::from_millis(700);
    DockerOptions {
        host: Some(proxy.host()),
        deadlines: Deadlines {
            query: short,
            logs: short,
            transfer_silence: short,
            event_silence: short,
            ..Deadlines::default()
        },
        ..DockerOptions::default()
    }
}

fn client(proxy: &FaultDocker) -> Docker {
    Docker::new(&options(proxy)).unwrap()
}

/// A client that does not go through the proxy.
fn direct() -> Docker {
    Docker::new(&DockerOptions::default()).unwrap()
}

async fn created(script: &str) -> (Owned, String) {
    let name = unique("faulty");
    let body = ContainerCreateBody {
        image: Some(image(Image::Bare).unwrap()),
        cmd: Some(vec!["/bin/sh".into(), "-c".into(), script.into()]),
        ..Default::default()
    };
    let owned = Owned(name.clone());
    let id = direct().create(&name, &body).await.unwrap();
    (owned, id)
}

#[tokio::test]
async fn a_hung_engine_is_told_after_the_deadline_and_the_place_is_given_back() {
    let proxy = FaultDocker::start().unwrap();
    let docker = Docker::new(&DockerOptions {
        query_limit: 2,
        ..options(&proxy)
    })
    .unwrap();
    docker.ping().await.unwrap();
    proxy.spoil("/containers/json", Fault::Hang, 3);
    let (a, b, c) = tokio::join!(
        docker.list_containers(true, None),
        docker.list_containers(true, None),
        docker.list_containers(true, None),
    );
    let errors = [a.unwrap_err(), b.unwrap_err(), c.unwrap_err()];
    let timeouts = errors
        .iter()
        .filter(|err| matches!(err, DockerError::Timeout { .. }))
        .count();
    assert!(timeouts >= 2, "{errors:?}");
    assert!(
        errors
            .iter()
            .any(|err| err.to_string().contains("docker ps"))
    );
    proxy.behave();
    docker.list_containers(true, None).await.unwrap();
}

#[tokio::test]
async fn an_answer_that_stalls_midway_is_a_timeout_too() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    proxy.spoil("/info", Fault::StallAfter(400), 1);
    let err = docker.info().await.unwrap_err();
    assert!(matches!(err, DockerError::Timeout { .. }), "{err}");
}

#[tokio::test]
async fn a_broken_answer_is_asked_again_only_when_that_is_harmless() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    proxy.spoil("/info", Fault::CutAfter(400), 1);
    docker.info().await.unwrap();
    let asked = |needle: &str| {
        proxy
            .requests()
            .iter()
            .filter(|line| line.contains(needle))
            .count()
    };
    assert_eq!(asked("/info"), 2);
    proxy.spoil("/containers/create", Fault::Close, 1);
    let err = docker
        .create(&unique("never"), &ContainerCreateBody::default())
        .await
        .unwrap_err();
    assert!(matches!(err, DockerError::Broken { .. }), "{err}");
    assert_eq!(asked("/containers/create"), 1);
}

#[tokio::test]
async fn the_engines_own_words_reach_the_caller() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    proxy.spoil(
        "/start",
        Fault::json(
            500,
            r#"{"message":"driver failed: port is already allocated"}"#,
        ),
        1,
    );
    let err = docker.start("x").await.unwrap_err();
    assert!(err.is_port_taken(), "{err}");
    let html =
        b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\nContent-Length: 13\r\n\r\n<html></html>";
    proxy.spoil("/start", Fault::Answer(html.to_vec()), 1);
    let err = docker.start("x").await.unwrap_err();
    assert!(
        matches!(&err, DockerError::Engine { status: 502, message, .. } if message == "<html></html>"),
        "{err:?}"
    );
    proxy.spoil("/info", Fault::json(200, r#"{"Containers": "many"}"#), 1);
    let err = docker.info().await.unwrap_err();
    assert!(matches!(err, DockerError::Undecodable { .. }), "{err}");
}

#[tokio::test]
async fn an_engine_that_is_down_is_named_and_found_again_when_it_is_back() {
    let mut proxy = FaultDocker::start().unwrap();
    proxy.go_down();
    let docker = client(&proxy);
    let err = docker.ping().await.unwrap_err();
    assert!(matches!(err, DockerError::Unreachable { .. }), "{err:?}");
    let words = err.to_string();
    assert!(words.contains(&proxy.host()), "{words}");
    assert!(words.contains("systemctl status docker"), "{words}");
    proxy.bring_up().unwrap();
    docker.ping().await.unwrap();
}

/// Passes bytes between a TCP port and the real engine, keeping connections open, until cut.
async fn engine_over_tcp() -> (String, tokio::sync::broadcast::Sender<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("tcp://{}", listener.local_addr().unwrap());
    let (cut, _) = tokio::sync::broadcast::channel(1);
    let cutter = cut.clone();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut cut = cutter.subscribe();
            tokio::spawn(async move {
                let mut engine = tokio::net::UnixStream::connect("/var/run/docker.sock")
                    .await
                    .unwrap();
                tokio::select! {
                    _ = tokio::io::copy_bidirectional(&mut client, &mut engine) => {}
                    _ = cut.recv() => {}
                }
            });
        }
    });
    (host, cut)
}

#[tokio::test]
async fn an_engine_over_tcp_is_used_and_its_restart_survived() {
    let (host, cut) = engine_over_tcp().await;
    let docker = Docker::connect(&DockerOptions {
        host: Some(host),
        ..DockerOptions::default()
    })
    .await
    .unwrap();
    assert!(!docker.is_local());
    let (_owned, id) = created("sleep 300").await;
    docker.start(&id).await.unwrap();
    for _ in 0..20 {
        // Connections lie idle in the pool when the engine goes away.
        let (a, b) = tokio::join!(docker.ping(), docker.info());
        a.unwrap();
        b.unwrap();
        cut.send(()).unwrap();
        tokio::task::yield_now().await;
        // Not repeatable by ourselves, but it was never sent on the dead connection.
        match docker.start(&id).await {
            Ok(()) => {}
            // Written just before the close was seen: told as such, never as a success.
            Err(err) => assert!(matches!(err, DockerError::Broken { .. }), "{err}"),
        }
        docker.inspect(&id).await.unwrap();
    }
}

#[tokio::test]
async fn every_request_carries_the_negotiated_version() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    proxy.spoil(
        "/version",
        Fault::json(200, r#"{"Version":"1","ApiVersion":"1.30"}"#),
        1,
    );
    docker.ping().await.unwrap();
    // The engine was replaced by a newer one that refuses the old version.
    let refusal =
        r#"{"message":"client version 1.30 is too old. Minimum supported API version is 1.40"}"#;
    proxy.spoil("/containers/json", Fault::json(400, refusal), 1);
    docker.list_containers(false, None).await.unwrap();
    let requests = proxy.requests();
    assert_eq!(requests[0], "GET /version");
    assert_eq!(requests[1], "GET /v1.30/_ping");
    assert!(requests[2].starts_with("GET /v1.30/containers/json"));
    assert_eq!(requests[3], "GET /version");
    let newer = requests[4].strip_prefix("GET /v1.").unwrap();
    let (minor, path) = newer.split_once('/').unwrap();
    assert!(minor.parse::<u16>().unwrap() > 30, "{newer}");
    assert!(path.starts_with("containers/json"), "{newer}");
}

#[tokio::test]
async fn an_engine_is_asked_in_versions_that_it_takes() {
    let versions = [
        // What the engine takes, and in which versions it is asked for a ping and for its description.
        (("1.52", "1.44"), ["1.47", "1.50"]),
        (("1.60", "1.51"), ["1.51", "1.51"]),
        (("1.41", "1.12"), ["1.41", "1.41"]),
    ];
    for ((newest, oldest), [ping, info]) in versions {
        let proxy = FaultDocker::start().unwrap();
        let docker = client(&proxy);
        let version = format!(r#"{{"ApiVersion":"{newest}","MinAPIVersion":"{oldest}"}}"#);
        proxy.spoil("/version", Fault::json(200, &version), 1);
        proxy.spoil("/_ping", Fault::json(200, "{}"), 1);
        proxy.spoil("/info", Fault::json(200, "{}"), 1);
        docker.ping().await.unwrap();
        docker.info().await.unwrap();
        let wanted = [
            "/version",
            &format!("/v{ping}/_ping"),
            &format!("/v{info}/info"),
        ];
        assert_eq!(proxy.requests(), wanted.map(|path| format!("GET {path}")));
    }
}

#[tokio::test]
async fn a_burst_does_not_pile_up_at_the_engine() {
    let proxy = FaultDocker::start().unwrap();
    let docker = Docker::new(&DockerOptions {
        host: Some(proxy.host()),
        query_limit: 4,
        ..DockerOptions::default()
    })
    .unwrap();
    docker.ping().await.unwrap();
    let burst = (0..100).map(|_| {
        let docker = docker.clone();
        tokio::spawn(async move { docker.list_containers(true, None).await })
    });
    for one in burst.collect::<Vec<_>>() {
        one.await.unwrap().unwrap();
    }
    // The proxy may see the end of one exchange after the start of the next.
    assert!(proxy.most_open() <= 8, "{}", proxy.most_open());
    assert_eq!(proxy.requests().len(), 102);
}

#[tokio::test]
async fn a_creation_does_not_stand_in_line_behind_removals() {
    let proxy = FaultDocker::start().unwrap();
    let docker = Docker::new(&DockerOptions {
        change_limit: 2,
        deadlines: Deadlines {
            create: WATCHDOG,
            remove: 10 * WATCHDOG,
            ..Deadlines::default()
        },
        ..options(&proxy)
    })
    .unwrap();
    docker.ping().await.unwrap();
    let gone = unique("gone");
    proxy.spoil(&gone, Fault::Hang, 100);
    let mut removals = tokio::task::JoinSet::new();
    for n in 0..10 {
        let (docker, name) = (docker.clone(), format!("{gone}-{n}"));
        removals.spawn(async move { docker.remove(&name, true).await });
    }
    // Past the limit of changes, and no more than are to be asked at a time.
    let asked = || {
        let lines = proxy.requests();
        let asked = lines.iter().filter(|line| line.contains(&gone));
        asked.count()
    };
    wait::until("eight are asked for", WATCHDOG, || async {
        (asked() >= DockerOptions::default().removal_limit).then_some(())
    })
    .await
    .unwrap();
    let name = unique("new");
    let body = ContainerCreateBody {
        image: Some(image(Image::Bare).unwrap()),
        ..Default::default()
    };
    let _owned = Owned(name.clone());
    docker.create(&name, &body).await.unwrap();
    assert_eq!(asked(), DockerOptions::default().removal_limit);
    let ended = removals.try_join_next();
    assert!(ended.is_none(), "a removal has ended: {ended:?}");
}

#[tokio::test]
async fn a_kernel_ends_while_users_calls_and_images_take_their_time() {
    let proxy = FaultDocker::start().unwrap();
    let patient = 10 * WATCHDOG;
    let docker = Docker::new(&DockerOptions {
        slow_limit: 1,
        deadlines: Deadlines {
            query: WATCHDOG,
            logs: patient,
            transfer_silence: patient,
            exec: patient,
            stop_margin: WATCHDOG,
            ..Deadlines::default()
        },
        ..options(&proxy)
    })
    .unwrap();
    docker.ping().await.unwrap();
    proxy.spoil("/containers/shown/json", Fault::json(200, "{}"), 1);
    let exec = Fault::json(201, r#"{"Id": "listed"}"#);
    proxy.spoil("/containers/shown/exec", exec, 1);
    let hung = [
        "/containers/shown/logs",
        "/containers/shown/archive",
        "/exec/listed/start",
        "/images/create",
        "/push",
        "/commit",
        "/images/x/get",
    ];
    for needle in hung {
        proxy.spoil(needle, Fault::Hang, usize::MAX);
    }
    let mut calls = tokio::task::JoinSet::new();
    let with = || docker.clone();
    let docker = with();
    calls.spawn(async move {
        let options = LogOptions {
            for_user: true,
            ..LogOptions::default()
        };
        docker.logs("shown", options).await.map(drop)
    });
    let docker = with();
    calls.spawn(async move { docker.archive("shown", "/", 1).await.map(drop) });
    let docker = with();
    calls.spawn(async move {
        let mut request = ExecRequest::new(["ls"]);
        request.for_user = true;
        docker.exec("shown", &request).await.map(drop)
    });
    let docker = with();
    calls.spawn(async move { docker.pull_image("x", None, |_| {}).await });
    let docker = with();
    calls.spawn(async move { docker.push_image("x", None, |_| {}).await });
    let docker = with();
    calls.spawn(async move {
        let request = CommitRequest::default();
        docker.commit_container("shown", &request).await.map(drop)
    });
    let docker = with();
    calls.spawn(async move { docker.export_image("x").await.map(drop) });
    wait::until("all are asked for", WATCHDOG, || async {
        let lines = proxy.requests();
        let asked = |needle: &&str| lines.iter().any(|line| line.contains(*needle));
        hung.iter().all(asked).then_some(())
    })
    .await
    .unwrap();
    let missing = unique("missing");
    let err = with().stop(&missing, Duration::ZERO).await.unwrap_err();
    assert!(err.is_not_found(), "{err}");
    let ended = calls.try_join_next();
    assert!(ended.is_none(), "a call has ended: {ended:?}");
}

#[tokio::test]
async fn one_deadline_covers_the_wait_for_a_place_and_the_whole_archive() {
    let proxy = FaultDocker::start().unwrap();
    let limit = Duration::from_secs(3);
    let docker = Docker::new(&DockerOptions {
        read_limit: 1,
        deadlines: Deadlines {
            query: WATCHDOG,
            archive: limit,
            ..Deadlines::default()
        },
        ..options(&proxy)
    })
    .unwrap();
    docker.ping().await.unwrap();
    let head =
        b"HTTP/1.1 200 OK\r\nContent-Type: application/x-tar\r\nConnection: close\r\n\r\n".to_vec();
    // Either is in time for a call that need not wait for its place.
    for late in [
        Fault::Slow(Vec::new(), limit / 3 * 2, head.clone()),
        Fault::Slow(head.clone(), limit / 3 * 2, b"tar".to_vec()),
    ] {
        proxy.spoil("/archive", late.clone(), 2);
        let (_, second) = tokio::join!(
            docker.archive("shown", "/", 1 << 10),
            docker.archive("shown", "/", 1 << 10),
        );
        let err = second.expect_err("what came was late");
        let told = matches!(err, DockerError::Timeout { .. } | DockerError::Busy { .. });
        assert!(told, "{late:?}: {err}");
        proxy.behave();
    }
}

async fn next(events: &mut EventStream) -> EngineEvent {
    tokio::time::timeout(WATCHDOG, events.next())
        .await
        .expect("no event in time")
}

/// The next event of one container, counting the markers before it.
async fn next_of(events: &mut EventStream, id: &str) -> (usize, String) {
    let mut markers = 0;
    loop {
        match next(events).await {
            EngineEvent::Resynchronise => markers += 1,
            EngineEvent::Container(event) if event.container_id == id => {
                return (markers, event.action);
            }
            _ => {}
        }
    }
}

#[tokio::test]
async fn events_between_two_streams_are_delivered_once() {
    let mut proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    let (_owned, id) = created("exit 7").await;
    assert_eq!(next_of(&mut events, &id).await, (0, "create".to_owned()));
    proxy.go_down();
    // Lives and dies while nobody listens.
    direct().start(&id).await.unwrap();
    assert_eq!(direct().wait(&id, WATCHDOG).await.unwrap(), 7);
    proxy.bring_up().unwrap();
    let mut markers = 0;
    let mut actions = Vec::new();
    while actions.last().map(String::as_str) != Some("die") {
        let (seen, action) = next_of(&mut events, &id).await;
        markers += seen;
        actions.push(action);
    }
    assert_eq!(markers, 1, "one marker per subscription");
    // Docker's own connect event may stand between, the container's are these, each once.
    assert_eq!(actions, ["start", "die"]);
    // Cut again: nothing is delivered a second time.
    proxy.cut_all();
    loop {
        match next(&mut events).await {
            EngineEvent::Resynchronise => break,
            EngineEvent::Container(event) => assert_ne!(event.container_id, id),
            EngineEvent::Network(_) => {}
        }
    }
    direct().remove(&id, true).await.unwrap();
    assert_eq!(next_of(&mut events, &id).await, (0, "destroy".to_owned()));
}

#[tokio::test]
async fn the_exit_code_and_name_are_read_from_the_event() {
    let docker = direct();
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    let (owned, id) = created("exit 7").await;
    docker.start(&id).await.unwrap();
    let died = loop {
        match next(&mut events).await {
            EngineEvent::Container(event) if event.container_id == id && event.action == "die" => {
                break event;
            }
            _ => {}
        }
    };
    assert_eq!(died.exit_code(), Some(7));
    assert_eq!(died.name(), owned.0);
}

#[tokio::test]
async fn a_stream_that_hangs_is_found_out_by_a_ping() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    proxy.spoil("/_ping", Fault::Hang, 1);
    // Nothing closes the stream; only the unanswered ping can end it.
    loop {
        if next(&mut events).await == EngineEvent::Resynchronise {
            break;
        }
    }
    let subscriptions = proxy
        .requests()
        .iter()
        .filter(|line| line.contains("/events"))
        .count();
    assert_eq!(subscriptions, 2);
}

/// One container's event must not keep those of the others from being read, for ever: each new
/// subscription begins before it again.
#[tokio::test]
async fn an_event_of_any_length_is_passed_over() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    let event = |id: &str, label: &str| {
        format!(
            r#"{{"Type":"container","Action":"die","Actor":{{"ID":"{id}","Attributes":{{"label":"{label}"}}}},"timeNano":4000000000000000000}}"#
        )
    };
    let long = event("long", &"x".repeat(3 << 20));
    let odd = event(&"y".repeat(5000), "");
    let lines = format!("{long}\n{odd}\n{}\n", event("short", ""));
    proxy.spoil("/events", chunked(&lines), 1);
    let mut events = docker.events(64);
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    // For the one that was left out.
    assert_eq!(next(&mut events).await, EngineEvent::Resynchronise);
    let EngineEvent::Container(event) = next(&mut events).await else {
        panic!("the event after the long one");
    };
    assert_eq!(event.container_id, "short");
}

#[tokio::test]
async fn an_engine_whose_events_break_off_is_asked_less_and_less() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    proxy.spoil("/events", chunked("garbage\n"), usize::MAX);
    let mut events = docker.events(64);
    let reading = async {
        loop {
            next(&mut events).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(3), reading).await;
    let asked = proxy.requests();
    let asked = asked.iter().filter(|line| line.contains("/events")).count();
    // After 0, 0.1, 0.3, 0.7 and 1.5 seconds.
    assert!((2..=6).contains(&asked), "asked {asked} times");
}

#[tokio::test]
async fn answers_that_make_no_sense_are_errors_and_the_next_is_read() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    let raw = |text: String| Fault::Answer(text.into_bytes());
    let body = |body: &str| Fault::json(200, body);
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    let chunk = format!("100000\r\n{}\r\n", " ".repeat(1 << 20));
    let faults = [
        ("cut off", body(r#"[{"Id": "a", "Names": ["#)),
        ("another type", body("{}")),
        ("null", body("null")),
        ("a number as id", body(r#"[{"Id": 5}]"#)),
        (
            "a list as state",
            body(r#"[{"Id": "a", "State": [], "Created": -1}]"#),
        ),
        ("deep", body(&"[".repeat(1 << 20))),
        ("no text", Fault::json(200, "\u{0}\u{ffff}")),
        ("empty", body("")),
        (
            "too little",
            raw(format!("{head}Content-Length: 10000000000\r\n\r\n[]")),
        ),
        (
            "two lengths",
            raw(format!(
                "{head}Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]"
            )),
        ),
        (
            "negative length",
            raw(format!("{head}Content-Length: -2\r\n\r\n[]")),
        ),
        (
            "70 MiB",
            raw(format!(
                "{head}Transfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n",
                chunk.repeat(70)
            )),
        ),
        (
            "a chunk of any size",
            raw(format!(
                "{head}Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n[]"
            )),
        ),
        (
            "headers without end",
            raw(format!("{head}{}", "X: y\r\n".repeat(200_000))),
        ),
        (
            "only a promise",
            raw("HTTP/1.1 100 Continue\r\n\r\n".repeat(1000)),
        ),
        ("another protocol", raw("SSH-2.0-x\r\n".to_owned())),
        (
            "an upgrade",
            raw(
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
                    .to_owned(),
            ),
        ),
        (
            "a refusal without words",
            raw("HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n".to_owned()),
        ),
    ];
    for (what, fault) in faults {
        // Twice: a question whose connection breaks is asked again.
        proxy.spoil("/containers/json", fault, 2);
        let asked = docker.list_containers(true, None);
        let answer = tokio::time::timeout(WATCHDOG, asked).await.expect(what);
        let err = answer.expect_err(what).to_string();
        assert!(err.len() < 2000, "{what}: {err}");
        proxy.behave();
        docker.list_containers(true, None).await.expect(what);
    }
}

#[tokio::test]
async fn a_log_that_stalls_gives_what_was_read_when_asked_to() {
    let proxy = FaultDocker::start().unwrap();
    // Long enough for a slow machine to send the part before the stall; what does not stall is read
    // without such haste.
    let stalled = Docker::new(&DockerOptions {
        host: Some(proxy.host()),
        deadlines: Deadlines {
            logs: Duration::from_secs(3),
            ..Deadlines::default()
        },
        ..DockerOptions::default()
    })
    .unwrap();
    let docker = Docker::new(&DockerOptions {
        host: Some(proxy.host()),
        ..DockerOptions::default()
    })
    .unwrap();
    let (_owned, id) = created("seq 1 20000").await;
    docker.start(&id).await.unwrap();
    direct().wait(&id, WATCHDOG).await.unwrap();
    proxy.spoil("/logs", Fault::StallAfter(4000), 2);
    let whole = LogOptions::default();
    let partial = LogOptions {
        partial: true,
        ..whole
    };
    let (refused, log) = tokio::join!(stalled.logs(&id, whole), stalled.logs(&id, partial));
    let err = refused.unwrap_err();
    assert!(matches!(err, DockerError::Timeout { .. }), "{err}");
    let log = log.unwrap();
    assert!(!log.complete);
    assert!(log.text.starts_with("1\n2\n3\n"), "{}", log.text);
    let log = docker.logs(&id, whole).await.unwrap();
    assert!(log.complete && log.text.ends_with("19999\n20000\n"));
    proxy.spoil("/logs", Fault::CutAfter(4000), 2);
    let err = docker.logs(&id, whole).await.unwrap_err();
    assert!(matches!(err, DockerError::Broken { .. }), "{err}");
}

fn chunked(lines: &str) -> Fault {
    Fault::Answer(
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\
             Content-Length: {}\r\n\r\n{lines}",
            lines.len()
        )
        .into_bytes(),
    )
}

#[tokio::test]
async fn every_way_a_pull_can_fail_is_noticed() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    docker.ping().await.unwrap();
    let pulls = [
        (
            chunked("{\"error\":\"denied\"}\n{\"status\":\"Digest: x\"}\n"),
            "denied",
        ),
        (
            chunked("{\"status\":\"a\"}\n{\"errorDetail\":{\"message\":\"manifest unknown\"}}\n"),
            "manifest unknown",
        ),
        (chunked(""), "without a word"),
        (chunked("not json\n"), "can't be understood"),
        (Fault::Close, "closed the connection"),
        (Fault::Hang, "no answer"),
    ];
    for (fault, words) in pulls {
        proxy.spoil("/images/create", fault.clone(), 1);
        let err = docker
            .pull_image("eng.invalid/x:1", None, |_| {})
            .await
            .unwrap_err();
        assert!(err.to_string().contains(words), "{fault:?}: {err}");
    }
}

#[tokio::test]
async fn a_pull_that_waits_its_turn_in_the_engine_is_waited_for() {
    let proxy = FaultDocker::start().unwrap();
    let mut patient = options(&proxy);
    patient.deadlines.query = WATCHDOG;
    let docker = Docker::new(&patient).unwrap();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n";
    let waits = Fault::Slow(
        format!("{head}{{\"status\":\"Waiting\",\"id\":\"a\"}}\n").into_bytes(),
        Duration::from_secs(3),
        b"{\"status\":\"Pull complete\",\"id\":\"a\"}\n".to_vec(),
    );
    proxy.spoil("/images/create", waits, 2);
    let auth = RegistryAuth::from_parts(Some("user"), Some("word"));
    let name = "eng.invalid/x:1";
    docker
        .pull_image(name, auth.as_ref(), |_| {})
        .await
        .unwrap();
    // The engine itself is silent.
    proxy.spoil("/_ping", Fault::Hang, usize::MAX);
    let err = client(&proxy)
        .pull_image(name, auth.as_ref(), |_| {})
        .await
        .unwrap_err();
    assert!(matches!(err, DockerError::Timeout { .. }), "{err}");
}

#[tokio::test]
async fn a_pull_ends_with_its_last_waiter() {
    let proxy = FaultDocker::start().unwrap();
    let images = Images::new(client(&proxy));
    proxy.spoil("/images/create", Fault::Hang, 1);
    let first = images.pull("eng.invalid/x:1", None);
    let second = images.pull("eng.invalid/x:1", None);
    assert!(!first.joined() && second.joined());
    assert!(images.is_pulling("eng.invalid/x:1"));
    drop(first);
    assert!(images.is_pulling("eng.invalid/x:1"));
    drop(second);
    assert!(!images.is_pulling("eng.invalid/x:1"));
}

#[tokio::test]
async fn images_are_purged_a_few_at_a_time_and_answered_in_their_order() {
    let proxy = FaultDocker::start().unwrap();
    let docker = client(&proxy);
    let images = Images::new(docker.clone());
    let names = |count| (0..count).map(|n| format!("eng.invalid/x{n}:1"));
    let Fault::Answer(missing) = Fault::json(404, r#"{"message": "No such image"}"#) else {
        panic!("an answer");
    };
    let late = Fault::Slow(Vec::new(), Duration::from_secs(1), missing);
    proxy.spoil("/images/eng.invalid/x0:1", late, 1);
    let purged = images.purge(names(3).collect(), false, false).await;
    let asked: Vec<&String> = purged.iter().map(|one| &one.image).collect();
    assert_eq!(
        asked,
        names(3).collect::<Vec<_>>().iter().collect::<Vec<_>>()
    );
    let told = |one: &Purged| {
        one.error
            .as_ref()
            .is_some_and(|it| it.contains("No such image"))
    };
    assert!(purged.iter().all(told), "{purged:?}");

    // An engine that takes its time for images has room for kernels that are removed.
    proxy.spoil("/images/", Fault::Hang, usize::MAX);
    let many = tokio::spawn({
        let images = images.clone();
        async move { images.purge(names(20).collect(), false, false).await }
    });
    let asked = || {
        let lines = proxy.requests();
        let images = lines.iter().filter(|line| line.contains("/images/"));
        images.count() - 3
    };
    wait::until("four are asked for", WATCHDOG, || async {
        (asked() >= 4).then_some(())
    })
    .await
    .unwrap();
    let err = docker.remove(&unique("missing"), true).await.unwrap_err();
    assert!(err.is_not_found(), "{err}");
    assert_eq!(asked(), 4);
    many.abort();
}

#[tokio::test]
async fn a_distro_probe_is_removed_also_when_it_fails() {
    let proxy = FaultDocker::start().unwrap();
    let name = image(Image::Bare).unwrap();
    let removed = async |id: &str| {
        let gone = async || {
            let probes = direct().list_labelled(true, PROBE_LABEL).await.unwrap();
            let mut probes = probes.iter();
            probes
                .all(|probe| probe.image_id.as_deref() != Some(id))
                .then_some(())
        };
        wait::until("no probe is left", WATCHDOG, gone)
            .await
            .unwrap();
    };
    // An image of its own, so that other tests' probes are not counted.
    let own = harness::images::import(
        &format!("{}:1", unique("probe")),
        &harness::images::busybox_files(&["sleep"]).unwrap(),
        &["CMD [\"/bin/sh\"]"],
    )
    .unwrap();
    let id = direct().inspect_image(&own.name).await.unwrap().id;
    assert_ne!(id, direct().inspect_image(&name).await.unwrap().id);
    let agent = unique("i-probe");
    let hasty = Distros::new(client(&proxy), &agent, Default::default())
        .with_deadline(Duration::from_secs(2));
    proxy.spoil("/wait", Fault::Hang, 1);
    proxy.spoil("/start", Fault::json(204, ""), 1);
    let err = hasty
        .resolve(&own.name, &Default::default())
        .await
        .unwrap_err();
    assert!(matches!(err, DistroError::Timeout { .. }), "{err:?}");
    removed(&id).await;
    // No `ldd` in it: the words say what to do, nothing is left.
    proxy.behave();
    let patient = DockerOptions {
        host: options(&proxy).host,
        ..DockerOptions::default()
    };
    let patient = Docker::new(&patient).unwrap();
    let distros = Distros::new(patient, &agent, Default::default());
    let err = distros
        .resolve(&own.name, &Default::default())
        .await
        .unwrap_err();
    assert!(
        err.to_string()
            .contains("label it with ai.backend.base-distro"),
        "{err}"
    );
    removed(&id).await;
    // Given up midway: the removal goes on by itself.
    proxy.spoil("/wait", Fault::Hang, 1);
    proxy.spoil("/start", Fault::json(204, ""), 1);
    {
        let labels = Default::default();
        let before = proxy.requests().len();
        let at_work = async {
            while !proxy.requests()[before..]
                .iter()
                .any(|it| it.contains("/wait"))
            {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            resolved = distros.resolve(&own.name, &labels) => panic!("{resolved:?}"),
            () = at_work => {}
        }
    }
    removed(&id).await;
    // At its next start the agent removes its own and leaves those of the other agents at work.
    let create = |owner: &str| {
        let label = format!("{PROBE_LABEL}={owner}");
        harness::kernels::docker(&["create", "--label", &label, &own.name, "true"]).unwrap()
    };
    let (ours, theirs) = (create(&agent), create(&unique("i-other")));
    proxy.behave();
    let removed = distros.remove_leftovers().await;
    let stays = direct().inspect(&theirs).await;
    harness::kernels::docker(&["rm", "-f", &theirs]).unwrap();
    assert!(removed.unwrap() >= 1);
    assert!(stays.is_ok(), "{stays:?}");
    assert!(direct().inspect(&ours).await.unwrap_err().is_not_found());
}
