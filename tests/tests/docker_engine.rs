//! The engine module against the real dockerd: every call, its refusals and its bounds.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::collections::HashMap;
use std::time::{Duration, Instant};

use control::docker::{
    ContainerCreateBody, Docker, DockerError, ExecRequest, HostConfig, LogOptions, models,
};
use harness::engine::{Owned, engine, unique};
use harness::images::{Image, image};

const WATCHDOG: Duration = Duration::from_secs(30);

fn shell(script: &str) -> ContainerCreateBody {
    ContainerCreateBody {
        image: Some(image(Image::Bare).unwrap()),
        cmd: Some(vec!["/bin/sh".into(), "-c".into(), script.into()]),
        host_config: Some(HostConfig {
            init: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container of this body, created but not started.
async fn created(docker: &Docker, body: &ContainerCreateBody) -> (Owned, String) {
    let owned = Owned(unique("box"));
    let id = docker.create(&owned.0, body).await.unwrap();
    assert_eq!(id.len(), 64);
    (owned, id)
}

async fn ran(docker: &Docker, body: &ContainerCreateBody) -> (Owned, String) {
    let (owned, id) = created(docker, body).await;
    docker.start(&id).await.unwrap();
    docker.wait(&id, WATCHDOG).await.unwrap();
    (owned, id)
}

#[tokio::test]
async fn the_engine_describes_itself() {
    let docker = engine().await;
    docker.ping().await.unwrap();
    let offered = docker.version().await.unwrap().api_version;
    assert!(offered.split_once('.').is_some(), "{offered}");
    assert!(docker.info().await.unwrap().server_version.is_some());
}

#[tokio::test]
async fn unknown_objects_are_not_found() {
    let docker = engine().await;
    let absent = unique("absent");
    let refusals = [
        docker.inspect(&absent).await.map(drop),
        docker.start(&absent).await,
        docker.stop(&absent, Duration::ZERO).await,
        docker.kill(&absent, "SIGKILL").await,
        docker.remove(&absent, true).await,
        docker.wait(&absent, WATCHDOG).await.map(drop),
        docker.logs(&absent, LogOptions::default()).await.map(drop),
        docker
            .exec(&absent, &ExecRequest::new(["true"]))
            .await
            .map(drop),
        docker.archive(&absent, "/", 10).await.map(drop),
        docker.inspect_image(&absent).await.map(drop),
        docker.remove_image(&absent, true, false).await,
        docker.inspect_network(&absent).await.map(drop),
        docker.remove_network(&absent).await,
        docker.inspect_volume(&absent).await.map(drop),
        docker
            .create(
                &unique("box"),
                &ContainerCreateBody {
                    image: Some(format!("{absent}:1")),
                    ..Default::default()
                },
            )
            .await
            .map(drop),
    ];
    for (place, refusal) in refusals.into_iter().enumerate() {
        let err = refusal.unwrap_err();
        assert!(err.is_not_found(), "{place}: {err:?}");
        assert!(err.to_string().contains(&absent), "{place}: {err}");
    }
}

#[tokio::test]
async fn a_name_that_would_leave_its_place_in_the_path_is_refused_here() {
    let docker = engine().await;
    for name in ["../images/json", "a/../../b", "", "a?b", "a#b"] {
        assert!(matches!(
            docker.inspect(name).await.unwrap_err(),
            DockerError::BadName { .. }
        ));
        assert!(matches!(
            docker.inspect_image(name).await.unwrap_err(),
            DockerError::BadName { .. }
        ));
    }
}

#[tokio::test]
async fn a_container_lives_from_create_to_remove() {
    let docker = engine().await;
    let owner = unique("owner");
    let mut body = shell("trap 'exit 3' INT; echo ready; while :; do sleep 0.1; done");
    body.labels = Some(HashMap::from([("ai.backend.owner".into(), owner.clone())]));
    body.stop_signal = Some("SIGINT".into());
    let (owned, id) = created(&docker, &body).await;
    let err = docker.create(&owned.0, &body).await.unwrap_err();
    assert!(matches!(err, DockerError::Conflict { .. }), "{err:?}");

    let listed = |all| docker.list_containers(all, Some(&owner));
    assert_eq!(listed(false).await.unwrap().len(), 0);
    assert_eq!(listed(true).await.unwrap().len(), 1);
    let err = docker.kill(&id, "SIGKILL").await.unwrap_err();
    assert!(matches!(err, DockerError::Conflict { .. }), "{err:?}");
    let err = docker
        .exec(&id, &ExecRequest::new(["true"]))
        .await
        .unwrap_err();
    assert!(matches!(err, DockerError::Conflict { .. }), "{err:?}");

    docker.start(&id).await.unwrap();
    docker.start(&id).await.unwrap();
    assert_eq!(
        listed(false).await.unwrap()[0].id.as_deref(),
        Some(id.as_str())
    );
    let until = Instant::now() + WATCHDOG;
    while !docker
        .logs(&id, LogOptions::default())
        .await
        .unwrap()
        .text
        .contains("ready")
    {
        assert!(Instant::now() < until);
    }
    let err = docker
        .wait(&id, Duration::from_millis(100))
        .await
        .unwrap_err();
    assert!(matches!(err, DockerError::Timeout { .. }), "{err:?}");
    docker.set_memory_nodes(&id, "0").await.unwrap();
    let host = docker.inspect(&id).await.unwrap().host_config.unwrap();
    assert_eq!(host.cpuset_mems.as_deref(), Some("0"));
    assert!(docker.set_memory_nodes(&id, "4095").await.is_err());
    let err = docker.remove(&id, false).await.unwrap_err();
    assert!(matches!(err, DockerError::Conflict { .. }), "{err:?}");

    docker.stop(&id, Duration::from_secs(20)).await.unwrap();
    docker.stop(&id, Duration::from_secs(20)).await.unwrap();
    assert_eq!(docker.wait(&id, WATCHDOG).await.unwrap(), 3);
    docker.remove(&id, false).await.unwrap();
    assert!(docker.remove(&id, true).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_log_of_a_terminal_is_not_mistaken_for_frames() {
    let docker = engine().await;
    // Begins with bytes that look like the header of a frame of 16 MiB, holds invalid UTF-8, and
    // ends without a newline.
    let mut body =
        shell(r"printf '\001\000\000\000\001\000\000\000'; printf 'a\377b\n'; printf end");
    body.tty = Some(true);
    let (_owned, id) = ran(&docker, &body).await;
    let log = docker.logs(&id, LogOptions::default()).await.unwrap();
    assert_eq!(log.text, "\u{1}\0\0\0\u{1}\0\0\0a\u{fffd}b\r\nend");
    assert_eq!((log.cut, log.complete), (0, true));
}

#[tokio::test]
async fn a_long_log_keeps_its_tail_and_tells_the_cut() {
    let docker = engine().await;
    let (_owned, id) = ran(&docker, &shell("seq 1 20000; echo oops >&2")).await;
    let whole = docker.logs(&id, LogOptions::default()).await.unwrap();
    // The engine reads the two streams side by side.
    let (before, after) = whole.text.split_once("oops\n").expect("both streams");
    assert!(format!("{before}{after}").starts_with("1\n2\n"));
    assert_eq!(whole.cut, 0);
    let tail = docker
        .logs(
            &id,
            LogOptions {
                keep: 1000,
                ..LogOptions::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(tail.text.len(), 1000);
    assert!(whole.text.ends_with(&tail.text));
    assert_eq!(tail.cut, whole.text.len() as u64 - 1000);
}

#[tokio::test]
async fn logs_of_the_local_driver_are_read_and_an_unreadable_driver_is_named() {
    let docker = engine().await;
    for (driver, readable) in [("local", true), ("json-file", true), ("none", false)] {
        let mut body = shell("echo hello");
        body.host_config = Some(HostConfig {
            log_config: Some(models::HostConfigLogConfig {
                typ: Some(driver.into()),
                config: None,
            }),
            ..Default::default()
        });
        let (_owned, id) = ran(&docker, &body).await;
        match docker.logs(&id, LogOptions::default()).await {
            Ok(log) => {
                assert!(readable, "{driver}");
                assert_eq!(log.text, "hello\n");
            }
            Err(err) => {
                assert!(!readable, "{driver}: {err}");
                assert!(
                    matches!(err, DockerError::LogsNotReadable { .. }),
                    "{err:?}"
                );
                assert!(err.to_string().contains("use `local` or `json-file`"));
            }
        }
    }
}

#[tokio::test]
async fn a_log_is_read_while_the_container_goes_on() {
    let docker = engine().await;
    let (_owned, id) = created(&docker, &shell("echo one; sleep 300")).await;
    docker.start(&id).await.unwrap();
    let until = Instant::now() + WATCHDOG;
    loop {
        let log = docker.logs(&id, LogOptions::default()).await.unwrap();
        assert!(log.complete);
        if log.text == "one\n" {
            break;
        }
        assert!(Instant::now() < until, "{:?}", log.text);
    }
}

#[tokio::test]
async fn a_command_gives_both_streams_its_exit_code_and_a_bounded_output() {
    let docker = engine().await;
    let (_owned, id) = created(&docker, &shell("sleep 300")).await;
    docker.start(&id).await.unwrap();
    let script = "echo out; echo err >&2; echo $WORD; pwd; id -u; exit 5";
    let done = docker
        .exec(
            &id,
            &ExecRequest {
                user: Some("65534".into()),
                env: vec!["WORD=given".into()],
                working_dir: Some("/tmp".into()),
                ..ExecRequest::new(["/bin/sh", "-c", script])
            },
        )
        .await
        .unwrap();
    assert_eq!(done.exit_code, 5);
    assert_eq!(
        String::from_utf8(done.stdout).unwrap(),
        "out\ngiven\n/tmp\n65534\n"
    );
    assert_eq!(String::from_utf8(done.stderr).unwrap(), "err\n");
    assert_eq!(done.cut, 0);

    let flood = docker
        .exec(
            &id,
            &ExecRequest {
                keep: 100,
                ..ExecRequest::new(["/bin/sh", "-c", "yes | head -c 3000000"])
            },
        )
        .await
        .unwrap();
    assert_eq!(
        (flood.stdout.len(), flood.cut, flood.exit_code),
        (100, 2_999_900, 0)
    );

    let missing = docker
        .exec(&id, &ExecRequest::new(["/no/such/program"]))
        .await;
    match missing {
        Ok(done) => assert!(matches!(done.exit_code, 126 | 127), "{done:?}"),
        Err(err) => assert!(
            matches!(err, DockerError::Engine { status: 400, .. }),
            "{err:?}"
        ),
    }
}

#[tokio::test]
async fn an_archive_has_a_limit() {
    let docker = engine().await;
    let script = "echo content > /tmp/file; head -c 300000 /dev/zero > /tmp/big";
    let (_owned, id) = ran(&docker, &shell(script)).await;
    let archive = docker.archive(&id, "/tmp/file", 64 << 10).await.unwrap();
    let mut archive = tar::Archive::new(&archive[..]);
    let mut entries = archive.entries().unwrap();
    let mut entry = entries.next().unwrap().unwrap();
    assert_eq!(entry.path().unwrap().to_str(), Some("file"));
    assert_eq!(std::io::read_to_string(&mut entry).unwrap(), "content\n");
    let err = docker.archive(&id, "/tmp/big", 64 << 10).await.unwrap_err();
    assert!(
        matches!(err, DockerError::TooLarge { limit: 65536, .. }),
        "{err:?}"
    );
    let err = docker
        .archive(&id, "/tmp/absent", 64 << 10)
        .await
        .unwrap_err();
    assert!(err.is_not_found(), "{err:?}");
}

#[tokio::test]
async fn the_mount_point_of_a_volume_is_told() {
    let docker = engine().await;
    let name = unique("volume");
    harness::kernels::docker(&["volume", "create", &name]).unwrap();
    let mount = docker.inspect_volume(&name).await.unwrap().mountpoint;
    let printed = harness::kernels::docker(&["volume", "rm", &name]).unwrap();
    assert_eq!(printed.trim(), name);
    assert!(mount.ends_with(&format!("/{name}/_data")), "{mount}");
}

#[tokio::test]
async fn connections_are_reused() {
    let docker = engine().await;
    let open = || {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("socket:"))
            .count()
    };
    docker.ping().await.unwrap();
    let before = open();
    for _ in 0..200 {
        docker.ping().await.unwrap();
    }
    let burst = (0..100).map(|_| {
        let docker = docker.clone();
        tokio::spawn(async move { docker.info().await })
    });
    for one in burst.collect::<Vec<_>>() {
        one.await.unwrap().unwrap();
    }
    // The pool keeps 16 idle connections; the rest are closed as they fall idle.
    let until = Instant::now() + WATCHDOG;
    while open() > before + 16 {
        assert!(
            Instant::now() < until,
            "{} sockets stay open",
            open() - before
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
