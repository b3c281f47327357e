//! Background tasks: work that a call starts, and that its caller follows by events.
//!
//! In: work with a key. Out: an id at once; then `bgtask_updated` as it goes on and exactly one of
//! `bgtask_done`, `bgtask_failed`, `bgtask_cancelled`. Invariants: at most one task per key is under
//! way, and whoever asks for the same again gets its id (the manager repeats a call whose answer it
//! missed, and waits for the id it was told last); progress is told once a second at most.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use shared::ids::KernelId;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::causes::chain;
use crate::docker::RegistryAuth;
use crate::events::{Event, Events};
use crate::kernel::commit::CommitOrder;
use crate::metrics::{TaskEnd, count_task, count_task_end};

/// How often progress is told.
const PROGRESS_PAUSE: Duration = Duration::from_secs(1);

/// What tells one piece of work from another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TaskKey {
    /// A commit of a kernel, as ordered.
    Commit(KernelId, CommitOrder),
    /// A push of an image.
    Push(String, Option<RegistryAuth>),
    /// Work that is never joined, by what it is for and an id of its own.
    Own(Purpose, Uuid),
}

/// What work is for that is never joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// A pull of an image.
    Pull,
    /// A push of an image that stays here.
    Push,
}

impl TaskKey {
    /// What `/metrics` calls such tasks: the original's names.
    fn name(&self) -> &'static str {
        match self {
            TaskKey::Commit(..) => "_commit",
            TaskKey::Push(..) | TaskKey::Own(Purpose::Push, _) => "_push_image",
            TaskKey::Own(Purpose::Pull, _) => "_pull",
        }
    }
}

/// The tasks under way.
#[derive(Clone, Debug)]
pub struct BackgroundTasks {
    running: Arc<Mutex<HashMap<TaskKey, Uuid>>>,
    events: Events,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

/// Through which a task tells how far it is.
#[derive(Debug)]
pub struct Reporter {
    events: Events,
    task: Uuid,
    told: Option<Instant>,
}

impl Reporter {
    /// So many of so many units are done. Left out when the last word is less than a second old.
    pub fn update(&mut self, current: u64, total: u64, message: impl FnOnce() -> String) {
        let now = Instant::now();
        if self
            .told
            .is_some_and(|told| now.saturating_duration_since(told) < PROGRESS_PAUSE)
        {
            return;
        }
        self.told = Some(now);
        self.events.emit(Event::BgtaskUpdated {
            task: self.task.hyphenated().to_string(),
            current,
            total,
            message: Some(message()),
        });
    }
}

/// Gives the key back, also when the work panics.
struct RunningKey {
    running: Arc<Mutex<HashMap<TaskKey, Uuid>>>,
    key: TaskKey,
}

impl Drop for RunningKey {
    fn drop(&mut self) {
        lock(&self.running).remove(&self.key);
    }
}

fn lock(running: &Mutex<HashMap<TaskKey, Uuid>>) -> MutexGuard<'_, HashMap<TaskKey, Uuid>> {
    // The map is whole after every statement.
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BackgroundTasks {
    /// Tasks that tell `events`, are counted by `tasks` and end when `stopping` is cancelled.
    pub fn new(events: Events, tasks: TaskTracker, stopping: CancellationToken) -> Self {
        Self {
            running: Arc::default(),
            events,
            tasks,
            stopping,
        }
    }

    /// The task of this key, if it is under way.
    pub fn running(&self, wanted: impl Fn(&TaskKey) -> bool) -> bool {
        lock(&self.running).keys().any(wanted)
    }

    /// The kernels being committed, for those who publish it.
    pub fn committing(&self) -> Vec<KernelId> {
        lock(&self.running)
            .keys()
            .filter_map(|key| match key {
                TaskKey::Commit(kernel, _) => Some(*kernel),
                TaskKey::Push(..) | TaskKey::Own(..) => None,
            })
            .collect()
    }

    /// Starts the work, unless the same is under way; the id of the task either way.
    pub fn start<W, E>(&self, key: TaskKey, work: impl FnOnce(Reporter) -> W) -> Uuid
    where
        W: Future<Output = Result<Option<String>, E>> + Send + 'static,
        E: std::error::Error + Send + 'static,
    {
        let task = Uuid::new_v4();
        match lock(&self.running).entry(key.clone()) {
            Entry::Occupied(present) => return *present.get(),
            Entry::Vacant(free) => {
                free.insert(task);
            }
        }
        let kind = key.name();
        count_task(kind);
        let begun = Instant::now();
        let place = RunningKey {
            running: self.running.clone(),
            key,
        };
        let name = task.hyphenated().to_string();
        self.events.emit(Event::BgtaskUpdated {
            task: name.clone(),
            current: 0,
            total: 0,
            message: Some("Task started".to_owned()),
        });
        let work = work(Reporter {
            events: self.events.clone(),
            task,
            told: None,
        });
        let (events, stopping) = (self.events.clone(), self.stopping.clone());
        self.tasks.spawn(async move {
            let work = Box::pin(AssertUnwindSafe(work).catch_unwind());
            let outcome = tokio::select! {
                outcome = work => Some(outcome),
                () = stopping.cancelled() => None,
            };
            let end = match &outcome {
                Some(Ok(Ok(_))) => TaskEnd::Done,
                Some(_) => TaskEnd::Failed,
                None => TaskEnd::Cancelled,
            };
            count_task_end(kind, end, begun.elapsed());
            // Free again before it is told, so that who hears of the end may start anew.
            drop(place);
            events.emit(match outcome {
                Some(Ok(Ok(message))) => Event::BgtaskDone {
                    task: name,
                    message,
                },
                Some(Ok(Err(err))) => Event::BgtaskFailed {
                    task: name,
                    message: chain(&err),
                },
                Some(Err(_)) => Event::BgtaskFailed {
                    task: name,
                    message: "a defect of the agent; its log has the details".to_owned(),
                },
                None => Event::BgtaskCancelled { task: name },
            });
        });
        task
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("no luck")]
    struct NoLuck;

    fn tasks() -> (BackgroundTasks, Events, CancellationToken) {
        let events = Events::new(64, Vec::new());
        let stopping = CancellationToken::new();
        let tasks = BackgroundTasks::new(events.clone(), TaskTracker::new(), stopping.clone());
        (tasks, events, stopping)
    }

    async fn told(tasks: &BackgroundTasks, events: &Events) -> Vec<(&'static str, String)> {
        tasks.tasks.close();
        tasks.tasks.wait().await;
        let (seen, _) = events.ring().after(0, 64);
        seen.iter()
            .map(|it| (it.event.name(), it.event.args(it.at)[0].to_string()))
            .collect()
    }

    fn push(image: &str) -> TaskKey {
        TaskKey::Push(image.to_owned(), None)
    }

    #[tokio::test]
    async fn the_same_work_is_done_once_and_every_task_has_one_end() {
        let (tasks, events, _) = tasks();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let first = tasks.start(push("a"), |mut reporter| async move {
            reporter.update(1, 2, || "half".into());
            // Within the same second: not told.
            reporter.update(2, 2, || "whole".into());
            let _ = wait.await;
            Ok::<_, NoLuck>(None)
        });
        let again = tasks.start(push("a"), |_| async { Ok::<_, NoLuck>(None) });
        assert_eq!(first, again);
        let other = tasks.start(push("b"), |_| async { Err::<Option<String>, _>(NoLuck) });
        let third = tasks.start(push("c"), |_| async {
            if tasks_panic() {
                panic!("a defect");
            }
            Ok::<_, NoLuck>(None)
        });
        go.send(()).unwrap();
        let told = told(&tasks, &events).await;
        let of = |id: Uuid| -> Vec<&str> {
            let id = format!("\"{}\"", id.hyphenated());
            told.iter()
                .filter(|(_, task)| *task == id)
                .map(|(name, _)| *name)
                .collect()
        };
        assert_eq!(
            of(first),
            ["bgtask_updated", "bgtask_updated", "bgtask_done"]
        );
        assert_eq!(of(other), ["bgtask_updated", "bgtask_failed"]);
        assert_eq!(of(third), ["bgtask_updated", "bgtask_failed"]);
        assert!(!tasks.running(|_| true));
    }

    fn tasks_panic() -> bool {
        true
    }

    #[tokio::test]
    async fn a_stopping_agent_cancels_what_is_under_way() {
        let (tasks, events, stopping) = tasks();
        tasks.start(push("a"), |_| std::future::pending::<Result<_, NoLuck>>());
        stopping.cancel();
        let names: Vec<_> = told(&tasks, &events)
            .await
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(names, ["bgtask_updated", "bgtask_cancelled"]);
    }
}
