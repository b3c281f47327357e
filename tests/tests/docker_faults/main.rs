//! The engine module against an engine that hangs, breaks off, refuses, dies and comes back.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

mod events;
mod images;
mod turns;

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
