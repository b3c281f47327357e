//! Images: is it here, pull it, list what is installed, purge.
//!
//! In: the image part of a request. Out: the local image, or why it can't be had. Pulls of one
//! image with the same credentials are one transfer that all callers wait for; it ends when the
//! last caller has gone. Layers already fetched stay with the engine, so the next pull goes on where
//! this one stopped. Invariant: at most one transfer per image and credentials, and a finished one is
//! never joined.

pub mod containerd_store;
mod pulls;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt as _;
use tokio::sync::OnceCell;

use crate::blocking::blocking;
use crate::causes::chain;
use crate::docker::{Docker, DockerError, ImageRecord, ListedImage, Progress, RegistryAuth};

pub use self::pulls::PullTicket;

use self::pulls::Pulls;

/// Images that a pull has brought are remembered up to this many; then all are forgotten.
const MOST_PULLED: usize = 1024;

/// Removals of images at a time in one purge, of the eight that the engine gets: the others are for kernels.
const PURGES: usize = 4;

/// Label with the version of the image contract; only `1` is supported.
pub const KERNELSPEC_LABEL: &str = "ai.backend.kernelspec";

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AutoPull {
    /// When the local image is missing or is not the wanted one.
    #[default]
    Digest,
    /// When the local image is missing.
    Tag,
    /// Never.
    None,
}

/// The image a kernel asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRequest {
    /// Full reference with registry, project and tag; for a local image its short name.
    pub canonical: String,
    /// Config digest (`sha256:...`): the image's id, where the engine keeps images in its own store.
    pub digest: String,
    /// Wanted architecture in the manager's words; empty accepts any.
    pub architecture: String,
    /// The image only exists on this node: neither checked nor pulled.
    pub is_local: bool,
    /// Credentials of its registry.
    pub auth: Option<RegistryAuth>,
    /// When to pull.
    pub auto_pull: AutoPull,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// Usable as it is.
    Present(ImageRecord),
    /// To be pulled first.
    MustPull,
}

/// Why an image can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The image is not here and may not be pulled.
    #[error(
        "image {image} is not on this node and auto-pull forbids fetching it; pull it by hand or set auto-pull to `tag` or `digest`"
    )]
    NotAvailable {
        /// Reference.
        image: String,
    },
    /// A local image is not here, and no registry has it.
    #[error(
        "image {image} is registered as local and is not on this node; load it here (`docker load`, or `docker pull` and `docker tag`)"
    )]
    LocalNotHere {
        /// Reference.
        image: String,
    },
    /// The image is of another architecture.
    #[error(
        "image {image} is for {found}, this node needs {wanted}; choose an image of that architecture"
    )]
    WrongArchitecture {
        /// Reference.
        image: String,
        /// The image's architecture.
        found: String,
        /// The node's architecture.
        wanted: String,
    },
    /// The engine could not say.
    #[error("look up image {image}")]
    Lookup {
        /// Reference.
        image: String,
        /// The engine's refusal.
        #[source]
        source: DockerError,
    },
    /// The pull failed; the same for every caller that waited for it.
    #[error("image {image} could not be pulled; check its name, the registry and the credentials")]
    Pull {
        /// Reference.
        image: String,
        /// The engine's refusal.
        #[source]
        source: Arc<DockerError>,
    },
    /// The push failed.
    #[error("image {image} could not be pushed; check the registry and the credentials")]
    Push {
        /// Reference.
        image: String,
        /// The engine's refusal.
        #[source]
        source: DockerError,
    },
    /// The list of images could not be had.
    #[error("list the images of this node")]
    List {
        /// The engine's refusal.
        #[source]
        source: DockerError,
    },
}

impl ImageError {
    /// Class name known to the manager's users.
    pub fn class(&self) -> &'static str {
        match self {
            Self::NotAvailable { .. } | Self::LocalNotHere { .. } => "ImageNotAvailable",
            Self::WrongArchitecture { .. } => "AgentError",
            Self::Pull { source, .. }
                if matches!(
                    **source,
                    DockerError::Timeout { .. }
                        | DockerError::Late { .. }
                        | DockerError::Standstill { .. }
                ) =>
            {
                "AgentError"
            }
            Self::Pull { .. } | Self::Push { .. } => "RuntimeError",
            Self::Lookup { .. } | Self::List { .. } => "DockerError",
        }
    }
}

/// An image that can run kernels, as the heartbeat lists it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct InstalledImage {
    /// One of its `name:tag`.
    pub name: String,
    /// The engine's image id; the manager takes note of the name alone.
    pub id: String,
}

/// Result of purging one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Purged {
    /// Reference as asked.
    pub image: String,
    /// Why it is still here; `None` when it is gone.
    pub error: Option<String>,
}

/// The images of this node; clones share the running pulls.
#[derive(Debug, Clone)]
pub struct Images {
    docker: Docker,
    pulls: Arc<Pulls>,
    /// Where containerd's store may lie, once the engine has said so.
    roots: Arc<OnceCell<Vec<PathBuf>>>,
    /// What pulls have brought whose config digest nobody tells: by reference the digest that was
    /// wanted and the id that was found.
    pulled: Arc<Mutex<HashMap<String, (String, String)>>>,
}

impl Images {
    /// Images of this engine.
    pub fn new(docker: Docker) -> Self {
        Self {
            docker,
            pulls: Arc::default(),
            roots: Arc::default(),
            pulled: Arc::default(),
        }
    }

    /// Whether to pull, by what is here and what the manager asked for.
    ///
    /// # Errors
    /// `NotAvailable`, `LocalNotHere`, `WrongArchitecture`, `Lookup`.
    pub async fn check(&self, request: &ImageRequest) -> Result<Check, ImageError> {
        let found = match self.docker.inspect_image(&request.canonical).await {
            Ok(found) => Some(found),
            Err(err) if err.is_not_found() => None,
            Err(source) => {
                return Err(ImageError::Lookup {
                    image: request.canonical.clone(),
                    source,
                });
            }
        };
        let usable = match &found {
            None => false,
            Some(_) if request.is_local || request.auto_pull != AutoPull::Digest => true,
            Some(found) => match self.is_wanted(request, found).await {
                Some(is_wanted) => is_wanted,
                None => self.is_pulled(request, found),
            },
        };
        match found {
            Some(found) if usable => {
                accept_architecture(request, &found)?;
                Ok(Check::Present(found))
            }
            _ if request.is_local => Err(ImageError::LocalNotHere {
                image: request.canonical.clone(),
            }),
            _ if request.auto_pull == AutoPull::None => Err(ImageError::NotAvailable {
                image: request.canonical.clone(),
            }),
            _ => Ok(Check::MustPull),
        }
    }

    /// Whether an image has the wanted configuration; `None` where its id tells another digest and
    /// containerd's store can't be read.
    async fn is_wanted(&self, request: &ImageRequest, found: &ImageRecord) -> Option<bool> {
        if found.id == request.digest {
            return Some(true);
        }
        if !found.has_manifest_id() {
            return Some(false);
        }
        let roots = self.roots.get_or_try_init(|| self.find_roots()).await;
        let (roots, id) = (roots.ok()?.clone(), found.id.clone());
        let digests = blocking(move || containerd_store::config_digests(&roots, &id)).await?;
        Some(digests.contains(&request.digest))
    }

    async fn find_roots(&self) -> Result<Vec<PathBuf>, DockerError> {
        if !self.docker.is_local() {
            return Ok(Vec::new());
        }
        let info = self.docker.info().await?;
        Ok(blocking(move || containerd_store::roots(&info)).await)
    }

    fn pulled(&self) -> MutexGuard<'_, HashMap<String, (String, String)>> {
        self.pulled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this is what the registry gave when the same was wanted before.
    fn is_pulled(&self, request: &ImageRequest, found: &ImageRecord) -> bool {
        let pulled = self.pulled();
        let pair = pulled.get(&request.canonical);
        pair.is_some_and(|(wanted, id)| (wanted, id) == (&request.digest, &found.id))
    }

    /// Takes note of what a pull has brought, and returns it.
    ///
    /// # Errors
    /// `WrongArchitecture`, `Lookup`.
    pub async fn settle(&self, request: &ImageRequest) -> Result<ImageRecord, ImageError> {
        let found = self.docker.inspect_image(&request.canonical).await;
        let found = found.map_err(|source| ImageError::Lookup {
            image: request.canonical.clone(),
            source,
        })?;
        accept_architecture(request, &found)?;
        if request.digest.is_empty() {
            return Ok(found);
        }
        match self.is_wanted(request, &found).await {
            Some(true) => {}
            // The tag moved since the manager scanned the registry; the original uses it as well.
            Some(false) => {
                tracing::warn!(image = %request.canonical, wanted = %request.digest, found = %found.id,
                    "the registry holds another image under this name than the manager knows");
            }
            None => {
                let mut pulled = self.pulled();
                if pulled.len() >= MOST_PULLED {
                    pulled.clear();
                }
                let pair = (request.digest.clone(), found.id.clone());
                pulled.insert(request.canonical.clone(), pair);
            }
        }
        Ok(found)
    }

    /// Begins a pull, or joins the one of the same image and credentials that is under way.
    /// Must be called within a tokio runtime.
    pub fn pull(&self, canonical: &str, auth: Option<&RegistryAuth>) -> PullTicket {
        self.pulls.start(&self.docker, canonical, auth)
    }

    /// True while the image is being pulled.
    pub fn is_pulling(&self, canonical: &str) -> bool {
        self.pulls.is_pulling(canonical)
    }

    /// Checks, pulls when needed (after calling `before_pull`) and returns the local image.
    ///
    /// # Errors
    /// As [`Images::check`], and `Pull`.
    pub async fn ensure(
        &self,
        request: &ImageRequest,
        before_pull: impl AsyncFnOnce(),
        report: impl FnMut(&Progress),
    ) -> Result<ImageRecord, ImageError> {
        if let Check::Present(found) = self.check(request).await? {
            return Ok(found);
        }
        before_pull().await;
        self.pull(&request.canonical, request.auth.as_ref())
            .wait(report)
            .await?;
        self.settle(request).await
    }

    /// Pushes an image to the registry in its name.
    ///
    /// # Errors
    /// `Push`.
    pub async fn push(
        &self,
        canonical: &str,
        auth: Option<&RegistryAuth>,
        report: impl FnMut(&Progress) + Send,
    ) -> Result<(), ImageError> {
        self.docker
            .push_image(canonical, auth, report)
            .await
            .map_err(|source| ImageError::Push {
                image: canonical.to_owned(),
                source,
            })
    }

    /// Every tag of every image that can run kernels, sorted.
    ///
    /// # Errors
    /// `List`.
    pub async fn installed(&self) -> Result<Vec<InstalledImage>, ImageError> {
        let listed = self
            .docker
            .list_images()
            .await
            .map_err(|source| ImageError::List { source })?;
        Ok(installed(&listed))
    }

    /// Removes images, a few at a time, and answers in their order; what can't be removed is told per
    /// image, never as a failure.
    pub async fn purge(&self, images: Vec<String>, force: bool, noprune: bool) -> Vec<Purged> {
        futures_util::stream::iter(images)
            .map(|image| self.purge_one(image, force, noprune))
            .buffered(PURGES)
            .collect()
            .await
    }

    async fn purge_one(&self, image: String, force: bool, noprune: bool) -> Purged {
        let error = match self.docker.remove_image(&image, force, noprune).await {
            Ok(()) => {
                tracing::info!(image, "an image was purged");
                None
            }
            Err(err) => {
                tracing::warn!(
                    image,
                    err = &err as &dyn std::error::Error,
                    "an image could not be purged"
                );
                Some(chain(&err))
            }
        };
        Purged { image, error }
    }
}

fn accept_architecture(request: &ImageRequest, found: &ImageRecord) -> Result<(), ImageError> {
    let wanted = architecture(&request.architecture);
    let present = architecture(&found.architecture);
    // An image imported from a plain archive may name none.
    if wanted.is_empty() || present.is_empty() || wanted == present {
        return Ok(());
    }
    Err(ImageError::WrongArchitecture {
        image: request.canonical.clone(),
        found: present.to_owned(),
        wanted: wanted.to_owned(),
    })
}

/// An architecture in the manager's words (`x86_64`, `aarch64`), given Go's or its own.
pub fn architecture(name: &str) -> &str {
    match name {
        "amd64" => "x86_64",
        "arm64" => "aarch64",
        other => other,
    }
}

fn installed(listed: &[ListedImage]) -> Vec<InstalledImage> {
    let supported = |labels: &HashMap<String, String>| {
        labels
            .get(KERNELSPEC_LABEL)
            .is_none_or(|version| version.trim() == "1")
    };
    let mut found: Vec<InstalledImage> = listed
        .iter()
        .filter(|image| image.labels.as_ref().is_some_and(supported))
        .flat_map(|image| {
            image
                .repo_tags
                .iter()
                .filter(|name| !name.contains("<none>") && is_reference(name))
                .map(|name| InstalledImage {
                    name: name.clone(),
                    id: image.id.clone(),
                })
        })
        .collect();
    found.sort();
    found
}

/// True for a name the manager can read: lower-case path segments, then a tag.
fn is_reference(name: &str) -> bool {
    let Some((path, tag)) = name.rsplit_once(':') else {
        return false;
    };
    !tag.is_empty()
        && !tag.contains('/')
        && !path.is_empty()
        && path.split('/').all(|segment| {
            !segment.is_empty()
                && segment
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte))
        })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::Json;
    use axum::routing::{get, post};
    use serde_json::json;

    use super::*;
    use crate::docker::DockerOptions;

    #[test]
    fn the_scan_lists_tagged_images_of_the_supported_contract() {
        let listed: Vec<ListedImage> = serde_json::from_value(serde_json::json!([
            { "Id": "sha256:1", "RepoTags": ["b:1", "reg:5000/a:2"], "Labels": {"ai.backend.kernelspec": "1"} },
            { "Id": "sha256:2", "RepoTags": ["default:1"], "Labels": {} },
            { "Id": "sha256:3", "RepoTags": ["old:1"], "Labels": {"ai.backend.kernelspec": "2"} },
            { "Id": "sha256:4", "RepoTags": ["plain:1"], "Labels": null },
            { "Id": "sha256:5", "RepoTags": ["<none>:<none>"], "Labels": {} },
            { "Id": "sha256:6", "RepoTags": null, "Labels": {} },
        ]))
        .unwrap();
        let names: Vec<(String, String)> = installed(&listed)
            .into_iter()
            .map(|image| (image.name, image.id))
            .collect();
        let expected = [
            ("b:1", "sha256:1"),
            ("default:1", "sha256:2"),
            ("reg:5000/a:2", "sha256:1"),
        ]
        .map(|(name, id)| (name.to_owned(), id.to_owned()));
        assert_eq!(names, expected);
    }

    /// An engine on another host that knows its image by the manifest's digest, and counts pulls.
    async fn engine_elsewhere(pulls: Arc<AtomicUsize>) -> Docker {
        let id = "sha256:manifest";
        let image =
            json!({"Id": id, "RepoDigests": [format!("cr.example/a@{id}")], "Architecture": ""});
        let version = json!({"Version": "29", "ApiVersion": "1.52", "MinAPIVersion": "1.44"});
        let router = axum::Router::new()
            .route("/version", get(move || async move { Json(version) }))
            .route(
                "/{version}/images/create",
                post(move || {
                    pulls.fetch_add(1, Ordering::Relaxed);
                    async { Json(json!({"status": "Status: Image is up to date"})) }
                }),
            )
            .route(
                "/{version}/images/{*name}",
                get(move || async move { Json(image) }),
            );
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
    async fn what_a_pull_has_brought_is_not_asked_of_the_registry_again() {
        let pulls = Arc::new(AtomicUsize::new(0));
        let images = Images::new(engine_elsewhere(pulls.clone()).await);
        let mut request = ImageRequest {
            canonical: "cr.example/a:1".into(),
            digest: "sha256:config".into(),
            architecture: String::new(),
            is_local: false,
            auth: None,
            auto_pull: AutoPull::Digest,
        };
        for (digest, asked) in [("config", 1), ("config", 1), ("newer", 2), ("newer", 2)] {
            request.digest = format!("sha256:{digest}");
            let found = images.ensure(&request, async || (), |_| ()).await.unwrap();
            assert_eq!(found.id, "sha256:manifest");
            assert_eq!(pulls.load(Ordering::Relaxed), asked, "{digest}");
        }
        // As `check_and_pull` does, before the kernel is created.
        request.digest = "sha256:newest".into();
        assert_eq!(images.check(&request).await.unwrap(), Check::MustPull);
        let ticket = images.pull(&request.canonical, None);
        ticket.wait(|_| ()).await.unwrap();
        images.settle(&request).await.unwrap();
        assert!(matches!(
            images.check(&request).await.unwrap(),
            Check::Present(_)
        ));
    }

    #[test]
    fn architectures_compare_in_the_managers_words() {
        assert_eq!(architecture("amd64"), "x86_64");
        assert_eq!(architecture("aarch64"), "aarch64");
    }
}
