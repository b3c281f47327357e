//! What an image id stands for in an engine that keeps its images in containerd's store, as fresh
//! installations of Docker 29 do.
//!
//! In: the id, which is the digest of the image's index or manifest there. Out: the digests of its
//! configurations, by which the manager knows it and which no call of the engine's API tells.
//! Invariant: a file counts only when its content has the digest that it is named by.
//!
//! Sources: containerd's own documents on operation (`root`) and on content (blobs by digest); the OCI image
//! specification's index and manifest.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::docker::SystemInfo;

/// Where containerd keeps content below its root.
const CONTENT: &str = "io.containerd.content.v1.content";
/// containerd's own configuration, which may name another root.
const CONFIGURATION: &str = "/etc/containerd/config.toml";
/// containerd's root where nothing is said.
const ROOT: &str = "/var/lib/containerd";
/// Larger manifests are not read, bytes; registries take none beyond 4 MiB.
const LARGEST: u64 = 4 << 20;
/// Manifests of one index beyond this many are not looked at.
const MOST: usize = 64;

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
}

/// An index has manifests, a manifest a configuration.
#[derive(Deserialize)]
struct Described {
    config: Option<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

/// Whether the engine keeps its images in containerd's store.
pub fn is_used(info: &SystemInfo) -> bool {
    let status = info.driver_status.iter().flatten();
    status
        .filter_map(|pair| pair.last())
        .any(|value| value.starts_with("io.containerd.snapshotter."))
}

/// Where on this host the store of such an engine may lie: at the root of the containerd that it has
/// started for itself, or of the system's. Blocking.
pub fn roots(info: &SystemInfo) -> Vec<PathBuf> {
    let configuration = std::fs::read_to_string(CONFIGURATION).unwrap_or_default();
    let engine = info.docker_root_dir.as_ref();
    let engine = engine.map(|root| Path::new(root).join("containerd/daemon"));
    engine.into_iter().chain([root(&configuration)]).collect()
}

/// Whether a containerd keeps its things there. It makes room for content with the first image only.
pub fn is_root(place: &Path) -> bool {
    place.join("io.containerd.metadata.v1.bolt").is_dir()
}

/// The root that containerd's configuration names.
fn root(configuration: &str) -> PathBuf {
    let table: Option<toml::Table> = configuration.parse().ok();
    let named = table.and_then(|table| Some(table.get("root")?.as_str()?.into()));
    named.unwrap_or_else(|| ROOT.into())
}

/// The configurations of the image with this id, of all platforms of which something is here; `None`
/// where none of the roots has it. Blocking.
pub(super) fn config_digests(roots: &[PathBuf], id: &str) -> Option<BTreeSet<String>> {
    let read = |digest: &str| roots.iter().find_map(|root| described(root, digest));
    let top = read(id)?;
    let of_index = top.manifests.iter().take(MOST);
    let below = of_index.filter_map(|manifest| read(&manifest.digest)?.config);
    let found: BTreeSet<String> = top
        .config
        .into_iter()
        .chain(below)
        .map(|it| it.digest)
        .collect();
    (!found.is_empty()).then_some(found)
}

fn described(root: &Path, digest: &str) -> Option<Described> {
    let hex = digest.strip_prefix("sha256:")?;
    if hex.len() != 64 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let blobs = root.join(CONTENT).join("blobs/sha256");
    let file = File::open(blobs.join(hex)).ok()?;
    let mut content = Vec::new();
    file.take(LARGEST).read_to_end(&mut content).ok()?;
    let is_whole = digest_of(&content) == digest;
    is_whole.then(|| serde_json::from_slice(&content).ok())?
}

fn digest_of(content: &[u8]) -> String {
    let hash = Sha256::digest(content);
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    struct Store(tempfile::TempDir);

    impl Store {
        fn blobs(&self) -> PathBuf {
            self.0.path().join(CONTENT).join("blobs/sha256")
        }

        fn put(&self, content: &Value) -> String {
            let content = content.to_string();
            let digest = digest_of(content.as_bytes());
            let blobs = self.blobs();
            std::fs::create_dir_all(&blobs).unwrap();
            std::fs::write(blobs.join(&digest["sha256:".len()..]), content).unwrap();
            digest
        }

        fn ask(&self, id: &str) -> Option<Vec<String>> {
            let nowhere = PathBuf::from("/nonexistent");
            let roots = [nowhere, self.0.path().to_owned()];
            Some(config_digests(&roots, id)?.into_iter().collect())
        }
    }

    #[test]
    fn configurations_are_found_by_manifests_and_indexes() {
        let store = Store(tempfile::tempdir().unwrap());
        let absent = format!("sha256:{}", "0".repeat(64));
        let manifest =
            store.put(&json!({"config": {"digest": "sha256:c", "size": 2}, "layers": []}));
        assert_eq!(store.ask(&manifest).unwrap(), ["sha256:c"]);
        // Of other platforms only the name is here.
        let index = store.put(&json!({"manifests": [{"digest": absent}, {"digest": manifest}]}));
        assert_eq!(store.ask(&index).unwrap(), ["sha256:c"]);
        let nothing = store.put(&json!({"manifests": [{"digest": absent}]}));
        for id in [&nothing, &absent, "sha256:../../x", "sha512:00", ""] {
            assert_eq!(store.ask(id), None, "{id}");
        }
        // What is not whole tells nothing.
        let file = store.blobs().join(&manifest["sha256:".len()..]);
        std::fs::write(file, json!({"config": {"digest": "sha256:d"}}).to_string()).unwrap();
        assert_eq!(store.ask(&manifest), None);
    }

    #[test]
    fn the_store_is_told_by_the_engine_and_its_place_by_containerd() {
        let info = |status: Value| -> SystemInfo {
            serde_json::from_value(json!({ "DriverStatus": status })).unwrap()
        };
        let kind = "io.containerd.snapshotter.v1";
        assert!(is_used(&info(json!([["driver-type", kind]]))));
        assert!(!is_used(&info(json!([["Backing Filesystem", "extfs"]]))));
        assert!(!is_used(&info(Value::Null)));
        assert_eq!(
            root("version = 2\nroot = \"/data/c\"\n"),
            Path::new("/data/c")
        );
        for silent in ["", "[plugins]\nroot = \"/data/c\"\n", "root = 1", "root ="] {
            assert_eq!(root(silent), Path::new(ROOT), "{silent}");
        }
        let info = serde_json::from_value(json!({ "DockerRootDir": "/data/docker" })).unwrap();
        assert_eq!(roots(&info)[0], Path::new("/data/docker/containerd/daemon"));
    }
}
