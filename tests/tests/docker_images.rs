//! Images against the real engine and a real registry: the check table, pulls, pushes, the scan,
//! purge, base distros, architectures.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::collections::HashMap;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use control::docker::{Docker, DockerOptions, RegistryAuth};
use control::image::{AutoPull, Check, ImageError, ImageRequest, Images, containerd_store};
use control::kernel::distro::Distros;
use harness::cdi_engine::CdiEngine;
use harness::engine::{engine, unique};
use harness::images::{FileContent, Image, ImageFile, OwnImage, busybox_files, image, import};
use harness::registry::{PASSWORD, Registry, USER};

fn request(canonical: &str, digest: &str, auto_pull: AutoPull) -> ImageRequest {
    ImageRequest {
        canonical: canonical.to_owned(),
        digest: digest.to_owned(),
        architecture: String::new(),
        is_local: false,
        auth: None,
        auto_pull,
    }
}

/// Removes a name from the engine when the test ends.
struct Untag(String);

impl Drop for Untag {
    fn drop(&mut self) {
        let _ = Command::new("docker").args(["rmi", "-f", &self.0]).output();
    }
}

/// An image that no other test has, with `size` bytes that do not compress.
fn distinct(name: &str, size: usize, changes: &[&str]) -> OwnImage {
    let mut noise = Vec::with_capacity(size + 16);
    while noise.len() < size {
        noise.extend_from_slice(uuid::Uuid::new_v4().as_bytes());
    }
    let file = ImageFile {
        path: "noise".into(),
        mode: 0o644,
        content: FileContent::Bytes(noise),
    };
    import(name, &[file], changes).unwrap()
}

#[tokio::test]
async fn the_check_follows_the_table_of_auto_pull_modes() {
    let docker = engine().await;
    let images = Images::new(docker.clone());
    let own = distinct(&format!("{}:1", unique("check")), 100, &[]);
    let id = docker.inspect_image(&own.name).await.unwrap().id;
    let other = format!("sha256:{}", "0".repeat(64));
    let absent = format!("{}:1", unique("absent"));
    for (name, digest, mode, expected) in [
        (&own.name, &id, AutoPull::Digest, "present"),
        (&own.name, &id, AutoPull::Tag, "present"),
        (&own.name, &id, AutoPull::None, "present"),
        (&own.name, &other, AutoPull::Digest, "pull"),
        (&own.name, &other, AutoPull::Tag, "present"),
        (&own.name, &other, AutoPull::None, "present"),
        (&absent, &other, AutoPull::Digest, "pull"),
        (&absent, &other, AutoPull::Tag, "pull"),
        (&absent, &other, AutoPull::None, "ImageNotAvailable"),
    ] {
        let found = match images.check(&request(name, digest, mode)).await {
            Ok(Check::Present(record)) => {
                assert_eq!(record.id, id);
                "present"
            }
            Ok(Check::MustPull) => "pull",
            Err(err) => err.class(),
        };
        assert_eq!(found, expected, "{name} {mode:?}");
    }
    let local = ImageRequest {
        is_local: true,
        ..request(&absent, &other, AutoPull::Digest)
    };
    let err = images.check(&local).await.unwrap_err();
    assert_eq!(err.class(), "ImageNotAvailable");
    assert!(err.to_string().contains("docker load"), "{err}");
}

#[tokio::test]
async fn an_image_of_another_architecture_is_refused_with_both_named() {
    let docker = engine().await;
    let images = Images::new(docker.clone());
    let own = distinct(&format!("{}:1", unique("arch")), 100, &[]);
    let ours = docker.inspect_image(&own.name).await.unwrap();
    let foreign = ImageRequest {
        architecture: "riscv64".into(),
        ..request(&own.name, &ours.id, AutoPull::Digest)
    };
    let err = images.check(&foreign).await.unwrap_err();
    assert!(matches!(err, ImageError::WrongArchitecture { .. }), "{err}");
    let words = err.to_string();
    assert!(
        words.contains("riscv64") && words.contains(std::env::consts::ARCH),
        "{words}"
    );
    let right = ImageRequest {
        architecture: std::env::consts::ARCH.into(),
        ..foreign
    };
    assert!(matches!(
        images.check(&right).await.unwrap(),
        Check::Present(_)
    ));
}

#[tokio::test]
async fn concurrent_pulls_of_one_image_are_one_transfer() {
    let docker = engine().await;
    let registry = Registry::start(false).unwrap();
    let images = Images::new(docker.clone());
    let canonical = format!("{}/stable/{}:1.0", registry.address, unique("pull"));
    let own = distinct(&canonical, 6 << 20, &["LABEL ai.backend.kernelspec=1"]);
    let pushed = AtomicUsize::new(0);
    images
        .push(&canonical, None, |_| {
            pushed.fetch_add(1, Ordering::Relaxed);
        })
        .await
        .unwrap();
    assert!(pushed.load(Ordering::Relaxed) > 0);
    let id = docker.inspect_image(&canonical).await.unwrap().id;
    drop(own);
    assert!(
        docker
            .inspect_image(&canonical)
            .await
            .unwrap_err()
            .is_not_found()
    );
    let _untag = Untag(canonical.clone());

    let asked = AtomicUsize::new(0);
    let reported = AtomicUsize::new(0);
    let wanted = request(&canonical, &id, AutoPull::Digest);
    let one = || {
        images.ensure(
            &wanted,
            async || {
                asked.fetch_add(1, Ordering::Relaxed);
            },
            |progress| {
                assert!(progress.current <= progress.total);
                reported.fetch_add(1, Ordering::Relaxed);
            },
        )
    };
    let first = images.pull(&canonical, None);
    assert!(!first.joined() && images.is_pulling(&canonical));
    let second = images.pull(&canonical, None);
    assert!(second.joined());
    let (a, b, c, d) = tokio::join!(one(), one(), first.wait(|_| {}), second.wait(|_| {}));
    assert_eq!(a.unwrap().id, id);
    assert_eq!(b.unwrap().id, id);
    c.unwrap();
    d.unwrap();
    assert!(reported.load(Ordering::Relaxed) > 0);
    assert_eq!(
        asked.load(Ordering::Relaxed),
        2,
        "each creation tells that it pulls"
    );
    assert!(!images.is_pulling(&canonical));
    // It is here now: nothing is asked of the registry any more.
    drop(registry);
    assert_eq!(one().await.unwrap().id, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_in_containerds_store_are_known_by_their_configuration() {
    let Some(second) = CdiEngine::with_containerd_images().unwrap() else {
        return;
    };
    let (own_engine, docker) = (
        engine().await,
        Docker::connect(&DockerOptions {
            host: Some(second.host()),
            ..DockerOptions::default()
        })
        .await
        .unwrap(),
    );
    assert!(containerd_store::is_used(&docker.info().await.unwrap()));
    let registry = Registry::start(false).unwrap();
    let canonical = format!("{}/stable/{}:1.0", registry.address, unique("store"));
    let own = distinct(&canonical, 4096, &["LABEL ai.backend.kernelspec=1"]);
    let images = Images::new(own_engine.clone());
    images.push(&canonical, None, |_| {}).await.unwrap();
    let digest = own_engine.inspect_image(&canonical).await.unwrap().id;

    let wanted = request(&canonical, &digest, AutoPull::Digest);
    let images = Images::new(docker.clone());
    let found = images.ensure(&wanted, async || {}, |_| {}).await.unwrap();
    assert_ne!(found.id, digest);
    // Nothing is asked of the registry any more, by a later life of the agent neither.
    drop(registry);
    let present = async |digest: &str| {
        let wanted = request(&canonical, digest, AutoPull::Digest);
        let found = Images::new(docker.clone()).check(&wanted).await.unwrap();
        matches!(found, Check::Present(_))
    };
    assert!(present(&digest).await);
    assert!(!present(&format!("sha256:{}", "0".repeat(64))).await);
    let listed = images.installed().await.unwrap();
    assert!(
        listed.iter().any(|image| image.name == canonical),
        "{listed:?}"
    );

    // One that came as a file.
    docker.remove_image(&canonical, true, false).await.unwrap();
    let archive = second.place().join("image.tar");
    for (host, way) in [
        (None, ["save", "-o"]),
        (Some(second.host()), ["load", "-i"]),
    ] {
        let mut carry = harness::images::docker(host.as_deref());
        carry.args(way).arg(&archive);
        carry.args(host.is_none().then_some(&canonical));
        assert!(carry.status().unwrap().success());
    }
    assert!(present(&digest).await);
    drop(own);
}

/// A way to a registry that lets only so many bytes of answers through until it is opened.
struct Gate {
    address: String,
    open: Arc<AtomicBool>,
}

impl Gate {
    fn before(registry: &str, bytes: usize) -> Gate {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (open, left) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(bytes)),
        );
        let (registry, gate) = (registry.to_owned(), open.clone());
        // Ends with the test's process.
        std::thread::spawn(move || {
            for inside in listener.incoming() {
                let Ok(inside) = inside else { return };
                let Ok(outside) = std::net::TcpStream::connect(&registry) else {
                    return;
                };
                let (from, to) = (inside.try_clone().unwrap(), outside.try_clone().unwrap());
                std::thread::spawn(move || through(from, to, || true));
                let (gate, left) = (gate.clone(), left.clone());
                std::thread::spawn(move || {
                    through(outside, inside, || {
                        gate.load(Ordering::Relaxed)
                            || left
                                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                                    left.checked_sub(PIECE)
                                })
                                .is_ok()
                    });
                });
            }
        });
        Gate { address, open }
    }
}

const PIECE: usize = 16 << 10;

/// Carries pieces while `may` lets them; waits when it does not.
fn through(mut from: std::net::TcpStream, mut to: std::net::TcpStream, may: impl Fn() -> bool) {
    use std::io::{Read, Write};
    let mut piece = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut piece) {
        while !may() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        if to.write_all(&piece[..length]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_is_over_at_once_and_can_be_taken_up_again() {
    let docker = engine().await;
    let registry = Registry::start(false).unwrap();
    let images = Images::new(docker.clone());
    let repository = format!("stable/{}:1.0", unique("cut"));
    let direct = format!("{}/{repository}", registry.address);
    let own = distinct(&direct, 6 << 20, &["LABEL ai.backend.kernelspec=1"]);
    images.push(&direct, None, |_| {}).await.unwrap();
    let id = docker.inspect_image(&direct).await.unwrap().id;
    drop(own);

    let gate = Gate::before(&registry.address, 2 << 20);
    let canonical = format!("{}/{repository}", gate.address);
    let _untag = Untag(canonical.clone());
    let ticket = images.pull(&canonical, None);
    // Some of it is here, and the rest does not come.
    let (some, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    let waiting = tokio::spawn(ticket.wait(move |progress| {
        if progress.current > 0 {
            let _ = some.send(());
        }
    }));
    let limit = std::time::Duration::from_secs(60);
    let begun = tokio::time::timeout(limit, arrived.recv()).await;
    assert!(begun.unwrap().is_some() && images.is_pulling(&canonical));
    // The last who waits goes away: the transfer ends too.
    waiting.abort();
    assert!(waiting.await.is_err() && !images.is_pulling(&canonical));
    assert!(
        docker
            .inspect_image(&canonical)
            .await
            .unwrap_err()
            .is_not_found()
    );

    gate.open.store(true, Ordering::Relaxed);
    let found = images
        .ensure(
            &request(&canonical, &id, AutoPull::Digest),
            async || {},
            |_| {},
        )
        .await
        .unwrap();
    assert_eq!(found.id, id);
}

#[tokio::test]
async fn wrong_names_and_missing_credentials_fail_with_the_registrys_words() {
    let docker = engine().await;
    let images = Images::new(docker.clone());
    let registry = Registry::start(true).unwrap();
    let canonical = format!("{}/private/{}:1.0", registry.address, unique("auth"));
    let auth = RegistryAuth::from_parts(Some(USER), Some(PASSWORD)).unwrap();
    let own = distinct(&canonical, 4096, &[]);
    let refused = images.push(&canonical, None, |_| {}).await.unwrap_err();
    let cause = std::error::Error::source(&refused).unwrap().to_string();
    assert!(cause.contains("no basic auth credentials"), "{cause}");
    images.push(&canonical, Some(&auth), |_| {}).await.unwrap();
    drop(own);
    let _untag = Untag(canonical.clone());

    let failure = async |name: &str, auth: Option<&RegistryAuth>| {
        let err = images.pull(name, auth).wait(|_| {}).await.unwrap_err();
        assert_eq!(err.class(), "RuntimeError");
        std::error::Error::source(&err).unwrap().to_string()
    };
    let cause = failure(&canonical, None).await;
    assert!(cause.contains("no basic auth credentials"), "{cause}");
    let wrong = RegistryAuth {
        password: "other".into(),
        ..auth.clone()
    };
    let cause = failure(&canonical, Some(&wrong)).await;
    assert!(cause.contains("unauthorized"), "{cause}");
    let missing = canonical.replace(":1.0", ":2.0");
    let cause = failure(&missing, Some(&auth)).await;
    assert!(
        cause.contains("manifest") && cause.contains("unknown"),
        "{cause}"
    );
    images
        .pull(&canonical, Some(&auth))
        .wait(|_| {})
        .await
        .unwrap();
    let cause = failure("127.0.0.1:1/nobody/home:1", None).await;
    assert!(cause.contains("connection refused"), "{cause}");
}

#[tokio::test]
async fn the_scan_names_every_tag_and_purge_tells_per_image() {
    let docker = engine().await;
    let images = Images::new(docker.clone());
    let name = format!("{}:1", unique("scan"));
    let own = distinct(&name, 100, &["LABEL ai.backend.kernelspec=1"]);
    let unsupported = distinct(
        &format!("{}:1", unique("scan")),
        100,
        &["LABEL ai.backend.kernelspec=2"],
    );
    let alias = unique("alias");
    let _untag = Untag(format!("{alias}:2"));
    harness::kernels::docker(&["tag", &own.name, &format!("{alias}:2")]).unwrap();
    let id = docker.inspect_image(&name).await.unwrap().id;
    let names: Vec<String> = images
        .installed()
        .await
        .unwrap()
        .into_iter()
        .filter(|image| image.id == id || image.name == unsupported.name)
        .map(|image| image.name)
        .collect();
    assert_eq!(names, [format!("{alias}:2"), name.clone()]);

    let absent = format!("{}:1", unique("absent"));
    let wanted = [
        name.clone(),
        absent,
        "not a name".into(),
        format!("{alias}:2"),
    ];
    let purged = images.purge(wanted.to_vec(), false, false).await;
    let asked: Vec<&String> = purged.iter().map(|one| &one.image).collect();
    assert_eq!(asked, wanted.iter().collect::<Vec<_>>());
    assert_eq!(purged[0].error, None);
    assert!(purged[1].error.as_ref().unwrap().contains("No such image"));
    assert!(
        purged[2]
            .error
            .as_ref()
            .unwrap()
            .contains("not a valid name")
    );
    assert_eq!(purged[3].error, None);
    assert!(docker.inspect_image(&id).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn the_base_distro_comes_from_the_label_or_from_ldd_once() {
    let docker = engine().await;
    let distros = Distros::new(docker.clone(), "i-images", HashMap::new());
    // A label wins without a look at the image.
    let labelled = HashMap::from([(
        "ai.backend.base-distro".to_owned(),
        "ubuntu16.04".to_owned(),
    )]);
    assert_eq!(
        distros.resolve("eng/absent:1", &labelled).await.unwrap(),
        "ubuntu16.04"
    );
    let unlabelled = HashMap::new();
    let err = distros
        .resolve("eng/absent:1", &unlabelled)
        .await
        .unwrap_err();
    assert!(
        std::error::Error::source(&err)
            .unwrap()
            .to_string()
            .contains("not found")
    );

    // `ldd` as Debian and as musl print it.
    for (says, expected) in [
        ("ldd (Debian GLIBC 2.36-9+deb12u10) 2.36", "ubuntu22.04"),
        ("musl libc (x86_64)", "alpine3.8"),
    ] {
        let mut files = busybox_files(&["echo"]).unwrap();
        files.push(ImageFile {
            path: "bin/ldd".into(),
            mode: 0o755,
            content: FileContent::Bytes(
                format!("#!/bin/sh\necho '{says}'\necho more\n").into_bytes(),
            ),
        });
        let changes = ["ENV PATH=/bin", "ENTRYPOINT [\"/bin/false\"]"];
        let own = import(&format!("{}:1", unique("distro")), &files, &changes).unwrap();
        assert_eq!(
            distros.resolve(&own.name, &unlabelled).await.unwrap(),
            expected
        );
        let id = docker.inspect_image(&own.name).await.unwrap().id;
        assert_eq!(distros.known()[&id], expected);
        // What was found is believed for this image id without another container.
        let believing = Distros::new(
            docker.clone(),
            "i-images",
            HashMap::from([(id, "kept1.0".to_owned())]),
        );
        assert_eq!(
            believing.resolve(&own.name, &unlabelled).await.unwrap(),
            "kept1.0"
        );
    }
}

#[tokio::test]
async fn the_made_images_carry_what_a_kernel_needs() {
    let docker = engine().await;
    let runner = docker
        .inspect_image(&image(Image::Runner).unwrap())
        .await
        .unwrap();
    assert_eq!(runner.labels["ai.backend.kernelspec"], "1");
    assert_eq!(runner.labels["ai.backend.service-ports"], "web:http:8080");
    assert!(runner.size < 10 << 20, "{}", runner.size);
    let services = docker
        .inspect_image(&image(Image::Services).unwrap())
        .await
        .unwrap();
    assert!(services.labels["ai.backend.service-ports"].contains("pair:http:[9001,9002]"));
    // Asked again, the same image is named, not made.
    assert_eq!(
        docker
            .inspect_image(&image(Image::Runner).unwrap())
            .await
            .unwrap()
            .id,
        runner.id
    );
}
