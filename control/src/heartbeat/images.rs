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

use crate::events::{Event, Events};
use crate::image::{Images, InstalledImage};
use crate::kernel::destroy::chain;
use crate::kernel::node::blocking;
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
    let mut ticks = tokio::time::interval(PERIOD);
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

    use super::*;

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
