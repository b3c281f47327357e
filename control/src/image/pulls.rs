//! The pulls under way and who waits for them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::docker::{Docker, DockerError, Progress, RegistryAuth};

use super::ImageError;

/// Where a pull stands.
#[derive(Debug, Clone, Default)]
enum PullState {
    /// Nothing heard from the engine yet.
    #[default]
    Asked,
    /// Under way.
    Running(Progress),
    /// The image is here.
    Done,
    /// The pull failed.
    Failed(Arc<DockerError>),
}

impl PullState {
    fn is_over(&self) -> bool {
        matches!(self, Self::Done | Self::Failed(_))
    }
}

type Key = (String, Option<RegistryAuth>);

#[derive(Debug, Default)]
pub(super) struct Pulls {
    running: Mutex<HashMap<Key, Running>>,
}

#[derive(Debug)]
struct Running {
    /// Tells this pull from an earlier one of the same key.
    number: u64,
    state: watch::Receiver<PullState>,
    task: AbortHandle,
    waiting: usize,
}

/// A place in the queue of those who wait for a pull. When the last one is dropped, the transfer
/// is cancelled.
#[derive(Debug)]
pub struct PullTicket {
    pulls: Arc<Pulls>,
    key: Key,
    number: u64,
    state: watch::Receiver<PullState>,
    joined: bool,
}

impl Pulls {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Running>> {
        // The map is whole after every statement, also if a holder panicked.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn start(
        self: &Arc<Self>,
        docker: &Docker,
        canonical: &str,
        auth: Option<&RegistryAuth>,
    ) -> PullTicket {
        let key: Key = (canonical.to_owned(), auth.cloned());
        let mut running = self.lock();
        let mut number = 0;
        if let Some(present) = running.get_mut(&key) {
            if !present.state.borrow().is_over() && !present.task.is_finished() {
                present.waiting += 1;
                return PullTicket {
                    pulls: self.clone(),
                    number: present.number,
                    state: present.state.clone(),
                    joined: true,
                    key,
                };
            }
            number = present.number + 1;
        }
        let (sender, state) = watch::channel(PullState::Asked);
        let task = tokio::spawn({
            let (docker, image, auth) = (docker.clone(), key.0.clone(), auth.cloned());
            async move {
                let outcome = docker
                    .pull_image(&image, auth.as_ref(), |progress| {
                        sender.send_replace(PullState::Running(progress.clone()));
                    })
                    .await;
                let last = match outcome {
                    Ok(()) => PullState::Done,
                    Err(err) => PullState::Failed(Arc::new(err)),
                };
                sender.send_replace(last);
            }
        })
        .abort_handle();
        running.insert(
            key.clone(),
            Running {
                number,
                state: state.clone(),
                task,
                waiting: 1,
            },
        );
        PullTicket {
            pulls: self.clone(),
            number,
            state,
            joined: false,
            key,
        }
    }

    pub fn is_pulling(&self, canonical: &str) -> bool {
        self.lock().iter().any(|(key, pull)| {
            key.0 == canonical && !pull.state.borrow().is_over() && !pull.task.is_finished()
        })
    }
}

impl PullTicket {
    /// True when the transfer was already under way for someone else.
    pub fn joined(&self) -> bool {
        self.joined
    }

    /// Waits for the end, reporting progress; several steps may be reported as one.
    ///
    /// # Errors
    /// `Pull`.
    pub async fn wait(mut self, mut report: impl FnMut(&Progress)) -> Result<(), ImageError> {
        loop {
            let state = self.state.borrow_and_update().clone();
            match state {
                PullState::Asked => {}
                PullState::Running(progress) => report(&progress),
                PullState::Done => return Ok(()),
                PullState::Failed(source) => {
                    return Err(ImageError::Pull {
                        image: self.key.0.clone(),
                        source,
                    });
                }
            }
            if self.state.changed().await.is_err() {
                let image = self.key.0.clone();
                let source = DockerError::Progress {
                    step: format!("pull image {image}"),
                    message: "it was broken off".to_owned(),
                };
                return Err(ImageError::Pull {
                    image,
                    source: Arc::new(source),
                });
            }
        }
    }
}

impl Drop for PullTicket {
    fn drop(&mut self) {
        let mut running = self.pulls.lock();
        let Some(pull) = running.get_mut(&self.key) else {
            return;
        };
        if pull.number != self.number {
            return;
        }
        pull.waiting -= 1;
        if pull.waiting == 0 {
            pull.task.abort();
            running.remove(&self.key);
        }
    }
}
