//! Pulls, purges and probes of images.

use super::*;

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
