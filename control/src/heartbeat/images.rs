//! Which images are installed.
//!
//! In: the engine's list, every twenty seconds. Out: the list as the heartbeat carries it, and the
//! names that have gone. Invariant: a look that fails changes nothing; only what two looks differ
//! in is told to be gone.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::blocking::blocking;
use crate::causes::chain;
use crate::events::{Event, Events};
use crate::image::{Images, InstalledImage};
use crate::rpc::Value;

/// Time between looks.
const PERIOD: Duration = Duration::from_secs(20);

/// The installed images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Installed {
    /// Their names.
    names: BTreeSet<String>,
    /// Names and ids as a compressed msgpack array; empty before the first look.
    pub(super) compressed: Bytes,
}

/// Looks until the node stops.
pub(super) async fn scan_periodically(
    images: Images,
    events: Events,
    installed: watch::Sender<Installed>,
    stopping: CancellationToken,
) {
    scan(PERIOD, images, events, installed, stopping).await;
}

async fn scan(
    period: Duration,
    images: Images,
    events: Events,
    installed: watch::Sender<Installed>,
    stopping: CancellationToken,
) {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut last: Option<Vec<InstalledImage>> = None;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stopping.cancelled() => return,
        }
        let looked = tokio::select! {
            looked = images.installed() => looked,
            () = stopping.cancelled() => return,
        };
        let found = match looked {
            Ok(found) => found,
            Err(err) => {
                tracing::warn!(err = chain(&err), "cannot list the installed images");
                continue;
            }
        };
        if last.as_ref() == Some(&found) {
            continue;
        }
        let list = found.clone();
        let compressed = match blocking(move || compressed(&list)).await {
            Ok(compressed) => compressed.into(),
            Err(err) => {
                tracing::error!(%err, "cannot compress the list of images");
                continue;
            }
        };
        let names: BTreeSet<String> = found.iter().map(|image| image.name.clone()).collect();
        let gone: Vec<String> = {
            let before = installed.borrow();
            before.names.difference(&names).cloned().collect()
        };
        tracing::debug!(count = names.len(), gone = gone.len(), "installed images");
        installed.send_replace(Installed { names, compressed });
        if !gone.is_empty() {
            events.emit(Event::AgentImagesRemove { images: gone });
        }
        last = Some(found);
    }
}

/// The list in the heartbeat's form.
fn compressed(images: &[InstalledImage]) -> io::Result<Vec<u8>> {
    let pairs = images
        .iter()
        .map(|image| Value::array([image.name.clone(), image.id.clone()]));
    let packed = Value::array(pairs).encode().map_err(io::Error::other)?;
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(&packed)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Json;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::get;
    use serde_json::json;

    use super::*;
    use crate::docker::{Docker, DockerOptions};

    /// An engine that lists two images, fails, lists the second one, and nothing from then on.
    async fn engine() -> Docker {
        let image = |name: &str| json!({"Id": format!("sha256:{name}"), "RepoTags": [format!("{name}:1")], "Labels": {}});
        let lists = [
            Some(json!([image("a"), image("b")])),
            None,
            Some(json!([image("b")])),
            Some(json!([])),
        ];
        let asked = Arc::new(AtomicUsize::new(0));
        let list = move || {
            let turn = asked.fetch_add(1, Ordering::Relaxed).min(lists.len() - 1);
            let answer = match &lists[turn] {
                Some(list) => Json(list.clone()).into_response(),
                None => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            };
            async move { answer }
        };
        let version = json!({"Version": "27", "ApiVersion": "1.47", "MinAPIVersion": "1.24", "Os": "linux", "Arch": "amd64"});
        let router = axum::Router::new()
            .route("/version", get(move || async move { Json(version) }))
            .route("/{version}/images/json", get(list));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = format!("tcp://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Docker::new(&DockerOptions {
            host: Some(host),
            ..DockerOptions::default()
        })
        .unwrap()
    }

    #[tokio::test]
    async fn images_that_are_gone_are_told_of_and_a_failed_look_is_not() {
        let events = Events::new(16, Vec::new());
        let (installed, seen) = watch::channel(Installed::default());
        let stopping = CancellationToken::new();
        let scanning = scan(
            Duration::from_millis(5),
            Images::new(engine().await),
            events.clone(),
            installed,
            stopping.clone(),
        );
        let all_are_told = async {
            let wanted = [vec!["a:1".to_owned()], vec!["b:1".to_owned()]];
            loop {
                let (told, ..) = events.ring().after(0, 16);
                let told = told.into_iter().map(|one| match one.event {
                    Event::AgentImagesRemove { images } => images,
                    other => panic!("an event of something else: {other:?}"),
                });
                let told: Vec<Vec<String>> = told.collect();
                assert!(wanted.starts_with(&told), "{told:?}");
                if told == wanted {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert!(seen.borrow().names.is_empty());
            stopping.cancel();
        };
        let both = async { tokio::join!(scanning, all_are_told) };
        tokio::time::timeout(Duration::from_secs(60), both)
            .await
            .unwrap();
    }

    #[test]
    fn the_list_is_pairs_of_name_and_id() {
        let images = [InstalledImage {
            name: "cr.example/stable/python:3.9".into(),
            id: "sha256:ab".into(),
        }];
        let mut packed = Vec::new();
        flate2::read::ZlibDecoder::new(&compressed(&images).unwrap()[..])
            .read_to_end(&mut packed)
            .unwrap();
        let value = Value::decode(&packed.into()).unwrap();
        let expected = Value::array([Value::array(["cr.example/stable/python:3.9", "sha256:ab"])]);
        assert_eq!(value, expected);
    }

    #[test]
    fn no_images_are_an_empty_list() {
        let mut packed = Vec::new();
        flate2::read::ZlibDecoder::new(super::super::payload::NO_IMAGES)
            .read_to_end(&mut packed)
            .unwrap();
        assert_eq!(packed, [0x90]);
    }
}
