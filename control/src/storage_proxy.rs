//! What the storage proxy knows of the folders mounted in kernels, when one is configured.
//!
//! In: the mounts of the kernels, a storage proxy's answers. Out: the usage and quota of folders and
//! the health of their volumes, for `/metrics`, `bai-agent kernel folders` and `status`. Invariants:
//! nothing waits for the proxy (a kernel is made, shown and ended without it); one question at a
//! time; what is shown is the last answer with its age.

mod answers;
mod cache;
mod client;
pub mod documents;
mod folder;

use std::sync::Arc;
use std::time::{Duration, Instant};

use config::Config;
use tokio::sync::watch;

use crate::causes::chain;
use crate::kernel::node::Node;

pub use answers::{FolderUsage, Quota, Space, Volume, VolumeHealth};
pub use cache::{Answer, Cache, CacheEntry, Failure, Mounted, Next, Query};
pub use client::{ProxyClient, ProxyError};
pub use folder::FolderId;

/// How often new mounts are looked for.
const LOOK: Duration = Duration::from_secs(2);
/// Between two questions.
const PACE: Duration = Duration::from_millis(100);

/// The last answers of a storage proxy; one task keeps them current.
#[derive(Debug)]
pub struct StorageProxy {
    client: ProxyClient,
    /// Where it is, to be shown.
    url: String,
    known: watch::Sender<Arc<Cache>>,
}

impl StorageProxy {
    /// The configured one; none when none is.
    pub fn new(config: &Config) -> Option<StorageProxy> {
        let settings = config.node.storage_proxy.as_ref()?;
        let cache = Cache::new(settings.interval);
        Some(StorageProxy {
            client: ProxyClient::new(settings),
            url: settings.url.to_string(),
            known: watch::Sender::new(Arc::new(cache)),
        })
    }

    /// Where it is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What is known now.
    pub fn known(&self) -> Arc<Cache> {
        self.known.borrow().clone()
    }

    async fn ask(&self, question: &Query) -> Result<Answer, Failure> {
        let answer = match question {
            Query::Volumes => self.client.volumes().await.map(Answer::Volumes),
            Query::Volume(name) => match self.client.health(name).await {
                Ok(health) => {
                    let space = self.client.space(name).await;
                    space.map(|space| Answer::Volume(health, space))
                }
                Err(err) => Err(err),
            },
            Query::Scope(volume, scope) => {
                self.client.quota(volume, scope).await.map(Answer::Scope)
            }
            Query::Folder(volume, folder) => {
                self.client.usage(volume, folder).await.map(Answer::Folder)
            }
        };
        answer.map_err(|err| Failure {
            words: chain(&err),
            of_proxy: err.is_of_proxy(),
            slow: matches!(err, ProxyError::Timeout { .. }),
        })
    }
}

/// The folders mounted in kernels of this node. Reads memory only.
pub fn mounted(node: &Node) -> Vec<Mounted> {
    let mut mounted = Vec::new();
    for kernel in node.registry.all() {
        kernel.with_record(|record| {
            let Some(request) = &record.request else {
                return;
            };
            let prevented = request.internal_data.prevent_vfolder_mounts;
            let mounts = request.mounts.iter();
            for mount in mounts.filter(|mount| !prevented || mount.name == ".logs") {
                mounted.push(Mounted {
                    kernel: kernel.id.to_string(),
                    name: mount.name.clone(),
                    target: mount.kernel_path.clone(),
                    source: mount.host_path.clone(),
                    folder: mount.vfid.as_deref().and_then(FolderId::parse),
                });
            }
        });
    }
    mounted
}

/// Keeps the answers current until the agent stops.
pub async fn run(node: Arc<Node>) {
    let Some(proxy) = &node.storage_proxy else {
        return;
    };
    let follow = async {
        let mut cache = Cache::clone(&proxy.known());
        loop {
            let next = cache.next(Instant::now(), &mounted(&node));
            // Forgotten folders are shown no longer, whether or not something is asked.
            if cache.all().count() != proxy.known().all().count() {
                proxy.known.send_replace(Arc::new(cache.clone()));
            }
            let question = match next {
                Next::Ask(question) => question,
                Next::Rest(rest) => {
                    tokio::time::sleep(rest.min(LOOK)).await;
                    continue;
                }
            };
            let outcome = proxy.ask(&question).await;
            tell(&cache, &outcome, &proxy.url);
            cache.told(Instant::now(), &question, outcome, rand::random());
            proxy.known.send_replace(Arc::new(cache.clone()));
            tokio::time::sleep(PACE).await;
        }
    };
    tokio::select! {
        () = follow => {}
        () = node.stopping.cancelled() => {}
    }
}

/// Logs the beginning and the end of trouble; a refused question is its own matter.
fn tell(cache: &Cache, outcome: &Result<Answer, Failure>, url: &str) {
    match (outcome, &cache.trouble) {
        (Err(failure), None) if failure.of_proxy => tracing::warn!(
            url,
            err = failure.words,
            "the storage proxy does not answer; figures of folders grow old, kernels are not concerned"
        ),
        (Err(failure), _) if !failure.of_proxy => {
            tracing::debug!(err = failure.words, "the storage proxy has no answer");
        }
        (Ok(_), Some((_, since))) => tracing::info!(
            url,
            seconds = since.elapsed().as_secs(),
            "the storage proxy answers again"
        ),
        _ => {}
    }
}
