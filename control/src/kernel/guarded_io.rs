//! Work on files that may lie on a file system that hangs: folders of users before all.
//!
//! In: a path and work that touches it. Out: what the work found, or that the path does not answer.
//! Invariants: nobody waits beyond a moment that was set before; a thread that waits for a server that
//! does not answer can't be called back, so at one mount only a few do, however often it is asked for;
//! the node's own directories are not refused for what hangs elsewhere.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::blocking::blocking;
use crate::volumes::mount;

/// Operations at work at one mount. The runtime has 512 threads for all work that blocks.
const AT_ONE_MOUNT: usize = 4;

/// What was touched has not answered, and may go on hanging: a retry helps once its server is back.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{what} cannot be used: {path} has not answered within {limit:?}, so its file system seems to hang; bring its server back or unmount it on this node, then try again",
    path = path.display()
)]
pub struct Silent {
    /// What it is for.
    pub what: String,
    /// Where it is.
    pub path: PathBuf,
    /// How long is waited (`node.folder-wait`).
    pub limit: Duration,
}

/// The operations of a node; clones share them.
#[derive(Clone, Debug)]
pub struct GuardedIo {
    limit: Duration,
    mounts: Arc<Mutex<Mounts>>,
}

#[derive(Debug, Default)]
struct Mounts {
    /// By the directory itself where it is the node's own.
    by_mount: HashMap<PathBuf, MountIo>,
    begun: u64,
}

/// The operations at one mount.
#[derive(Debug)]
struct MountIo {
    permits: Arc<Semaphore>,
    /// What they touch, and how long somebody waits for it.
    under_way: HashMap<u64, (PathBuf, Instant)>,
}

impl MountIo {
    /// Whether one more operation would only be one more that hangs.
    fn hangs(&self, path: &Path) -> bool {
        let now = Instant::now();
        let overdue = || self.under_way.values().filter(|(_, until)| now >= *until);
        overdue().any(|(other, _)| other == path) || overdue().count() >= AT_ONE_MOUNT
    }
}

/// An operation at work, wherever the one is who asked for it.
struct Operation {
    mounts: Arc<Mutex<Mounts>>,
    mount: PathBuf,
    number: u64,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Operation {
    fn drop(&mut self) {
        drop(self.permit.take());
        let mut mounts = lock(&self.mounts);
        let Some(place) = mounts.by_mount.get_mut(&self.mount) else {
            return;
        };
        place.under_way.remove(&self.number);
        // Who waits for a permit, or has got one, has a share of the semaphore.
        if place.under_way.is_empty() && Arc::strong_count(&place.permits) == 1 {
            mounts.by_mount.remove(&self.mount);
        }
    }
}

fn lock(mounts: &Mutex<Mounts>) -> MutexGuard<'_, Mounts> {
    // The maps are whole after every statement.
    mounts.lock().unwrap_or_else(PoisonError::into_inner)
}

impl GuardedIo {
    /// Operations that may take `limit` each, or several in a row.
    pub fn new(limit: Duration) -> GuardedIo {
        GuardedIo {
            limit,
            mounts: Arc::default(),
        }
    }

    /// When operations that begin now have to be over.
    pub fn until(&self) -> Instant {
        Instant::now() + self.limit
    }

    /// Does what touches `path` off the async workers. `what` names it in the error.
    ///
    /// # Errors
    /// It has not answered at `until`; at once when an earlier operation at the path, or too many at its
    /// mount, wait for longer than the limit already. The work may go on, and nobody hears of it.
    pub async fn at<T: Send + 'static>(
        &self,
        until: Instant,
        what: String,
        path: impl AsRef<Path>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Silent> {
        let path = path.as_ref();
        let mount = mount::point_of(path);
        self.at_mount(until, what, path, mount, work).await
    }

    /// The same for a directory of the node itself, which every kernel needs: what hangs elsewhere at
    /// its mount, behind links perhaps, is not counted.
    ///
    /// # Errors
    /// It has not answered at `until`; at once when an earlier operation at it hangs.
    pub async fn at_own<T: Send + 'static>(
        &self,
        until: Instant,
        what: String,
        path: impl AsRef<Path>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Silent> {
        let path = path.as_ref();
        let place = std::future::ready(path.to_owned());
        self.at_mount(until, what, path, place, work).await
    }

    async fn at_mount<T: Send + 'static>(
        &self,
        until: Instant,
        what: String,
        path: &Path,
        place: impl Future<Output = PathBuf>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Silent> {
        let looked = async {
            let mount = place.await;
            let permits = self.permits(&mount, path)?;
            let permit = permits.acquire_owned().await.ok()?;
            let operation = self.begin(mount, path, until, permit);
            let found = blocking(move || {
                let found = work();
                drop(operation);
                found
            });
            Some(found.await)
        };
        let looked = tokio::time::timeout_at(until, looked).await;
        looked.ok().flatten().ok_or_else(|| Silent {
            what,
            path: path.to_owned(),
            limit: self.limit,
        })
    }

    fn permits(&self, mount: &Path, path: &Path) -> Option<Arc<Semaphore>> {
        let mut mounts = lock(&self.mounts);
        let place = mounts.of(mount);
        (!place.hangs(path)).then(|| place.permits.clone())
    }

    fn begin(
        &self,
        mount: PathBuf,
        path: &Path,
        until: Instant,
        permit: OwnedSemaphorePermit,
    ) -> Operation {
        let mut mounts = lock(&self.mounts);
        mounts.begun += 1;
        let number = mounts.begun;
        let awaited = (path.to_owned(), until);
        mounts.of(&mount).under_way.insert(number, awaited);
        Operation {
            mounts: self.mounts.clone(),
            mount,
            number,
            permit: Some(permit),
        }
    }
}

impl Mounts {
    fn of(&mut self, mount: &Path) -> &mut MountIo {
        self.by_mount
            .entry(mount.to_owned())
            .or_insert_with(|| MountIo {
                permits: Arc::new(Semaphore::new(AT_ONE_MOUNT)),
                under_way: HashMap::new(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    const LIMIT: Duration = Duration::from_millis(100);
    /// For looks that have to succeed, on a busy machine too.
    const AMPLE: Duration = Duration::from_secs(30);

    /// Something whose server answers when the test says so.
    struct Server {
        begun: Arc<AtomicUsize>,
        answers: Arc<AtomicBool>,
    }

    impl Server {
        fn new() -> Server {
            Server {
                begun: Arc::default(),
                answers: Arc::default(),
            }
        }

        async fn look(&self, looks: &GuardedIo, path: &str) -> Result<(), Silent> {
            self.look_until(looks, looks.until(), path).await
        }

        async fn look_until(
            &self,
            looks: &GuardedIo,
            until: Instant,
            path: &str,
        ) -> Result<(), Silent> {
            let (begun, answers) = (self.begun.clone(), self.answers.clone());
            let work = move || {
                begun.fetch_add(1, Ordering::SeqCst);
                while !answers.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            let what = "the folder data".to_owned();
            looks.at(until, what, path, work).await
        }

        fn answer(&self) {
            self.answers.store(true, Ordering::SeqCst);
        }

        fn begun(&self) -> usize {
            self.begun.load(Ordering::SeqCst)
        }
    }

    // A test that fails must not wait for its threads for ever.
    impl Drop for Server {
        fn drop(&mut self) {
            self.answer();
        }
    }

    #[tokio::test]
    async fn what_hangs_is_named_and_not_looked_at_again() {
        let (looks, server) = (GuardedIo::new(LIMIT), Server::new());
        // Another mount than the temporary directory's, at any rate.
        let (hanging, other) = ("/proc/1/a", std::env::temp_dir());
        let told = server.look(&looks, hanging).await.unwrap_err().to_string();
        for words in ["the folder data", hanging, "unmount"] {
            assert!(told.contains(words), "{told}");
        }
        // On a busy machine the limit may be over before a thread has begun.
        while server.begun() == 0 {
            server.look(&looks, hanging).await.unwrap_err();
        }
        server.look(&looks, hanging).await.unwrap_err();
        assert_eq!(server.begun(), 1, "one thread hangs, not two");
        // Others may be alive: a few are tried.
        let mut others = (0..).map(|n| format!("/proc/1/other-{n}"));
        while server.begun() < AT_ONE_MOUNT {
            let path = others.next().unwrap();
            server.look(&looks, &path).await.unwrap_err();
        }
        for path in others.take(AT_ONE_MOUNT) {
            server.look(&looks, &path).await.unwrap_err();
        }
        assert_eq!(server.begun(), AT_ONE_MOUNT);
        let ample = || Instant::now() + AMPLE;
        let alive = looks.at(ample(), String::new(), other, || 7).await;
        assert_eq!(alive, Ok(7));
        // The node's own stand for themselves.
        let own = looks
            .at_own(ample(), String::new(), "/proc/1/own", || 8)
            .await;
        assert_eq!(own, Ok(8));
        server.answer();
        while !lock(&looks.mounts).by_mount.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let answered = server.look_until(&looks, ample(), hanging).await;
        assert_eq!(answered, Ok(()));
    }

    #[tokio::test]
    async fn who_gives_up_leaves_no_more_behind() {
        let (looks, server) = (GuardedIo::new(Duration::from_secs(600)), Server::new());
        for n in 0..2 * AT_ONE_MOUNT {
            // Destroyed meanwhile.
            let path = format!("/proc/1/{n}");
            let operation = server.look(&looks, &path);
            let soon = Duration::from_millis(50);
            assert!(tokio::time::timeout(soon, operation).await.is_err());
        }
        assert!(server.begun() <= AT_ONE_MOUNT, "{}", server.begun());
        server.answer();
        assert_eq!(server.look(&looks, "/proc/1/0").await, Ok(()));
    }
}
