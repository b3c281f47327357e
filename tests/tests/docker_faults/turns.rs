//! Places at the engine, and how long a call may wait for one.

use super::*;

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
