//! The restart of a kernel: a new container with the same devices, limits, ports and files.
//!
//! Invariants: what the kernel holds (devices, host ports, scratch) is never given back in between,
//! so nobody else can take it (the original's restarted containers had no limits at all), but for the
//! host ports of services that the new container does not have; the old
//! container is not touched before everything is found that the new one is made of; a kernel has one
//! restart at a time, and who asks for another meanwhile gets its outcome; an agent that ends under it
//! leaves what the next one needs to go on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use shared::ids::KernelId;
use thiserror::Error;
use tokio::sync::watch;

use super::create::{self, CreateError, Order, Ready};
use super::destroy::TURN_OF_RESTART;
use super::journal::JournalError;
use super::lifecycle::{Action, Input, Refusal, State};
use super::node::Node;
use super::record::{BatchRecord, Record};
use super::registry::Kernel;
use super::request::KernelCreationConfig;
use super::{batch_job, destroy};
use crate::causes::chain;

/// How long the old container may take to go, beyond its turn and time to stop (the original's number).
const OLD_CONTAINER: Duration = Duration::from_secs(60);
/// Pauses between attempts to remove it: doubled up to the second.
const REMOVAL_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(8));

/// A failed restart.
#[derive(Debug, Error)]
pub enum RestartError {
    /// Nobody knows the kernel.
    #[error("kernel {0} is not known to this agent")]
    Unknown(KernelId),
    /// It is not in a state to be restarted.
    #[error("kernel {kernel} cannot be restarted: {why}")]
    Refused {
        /// Which.
        kernel: KernelId,
        /// Why.
        why: Refusal,
    },
    /// It was adopted without a journal, so what it was made from is not known.
    #[error(
        "kernel {0} was found without a journal; it cannot be restarted, only used and destroyed"
    )]
    NoRequest(KernelId),
    /// The changes of the request make no sense.
    #[error("the updated configuration of kernel {kernel} cannot be read")]
    Update {
        /// Which.
        kernel: KernelId,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A new container could not be made.
    #[error("kernel {kernel} goes on and is not restarted")]
    NotNow {
        /// Which.
        kernel: KernelId,
        /// What is in the way.
        #[source]
        source: Box<CreateError>,
    },
    /// The agent stops before anything was done.
    #[error("kernel {0} goes on and is not restarted: the agent is stopping; try again")]
    Stopping(KernelId),
    /// The journal cannot be written: without it the new container would not be made.
    #[error("kernel {kernel} goes on and is not restarted; free space below agent.var-base-path")]
    Journal {
        /// Which.
        kernel: KernelId,
        /// Why.
        #[source]
        source: JournalError,
    },
    /// The old container did not go.
    #[error("the old container of kernel {0} did not go within 70 s and node.engine.stop-grace")]
    Timeout(KernelId),
    /// The new container did not come.
    #[error(transparent)]
    Create(#[from] CreateError),
}

/// What a restart answers, to all who wait for it.
pub type Outcome = Result<Value, Arc<RestartError>>;

/// The restart of a kernel that is under way.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<Option<watch::Receiver<Option<Outcome>>>>);

impl UnderWay {
    /// Where the outcome will be told, and for the one who has to see to it, how.
    fn join(
        &self,
    ) -> (
        watch::Receiver<Option<Outcome>>,
        Option<watch::Sender<Option<Outcome>>>,
    ) {
        let mut under_way = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = &*under_way
            && outcome.borrow().is_none()
            // Nobody tells it any more: its task has panicked.
            && outcome.has_changed().is_ok()
        {
            return (outcome.clone(), None);
        }
        let (told, outcome) = watch::channel(None);
        *under_way = Some(outcome.clone());
        (outcome, Some(told))
    }
}

/// Restarts a kernel, or joins the restart under way. Answers its result map.
///
/// # Errors
/// The kernel goes on where it says so. Else it ends, which is announced.
pub async fn restart(node: &Arc<Node>, id: KernelId, updated: &Value) -> Outcome {
    let kernel = node.registry.get(id).ok_or(RestartError::Unknown(id))?;
    let (mut outcome, told) = kernel.restart.join();
    if let Some(told) = told {
        let (node, updated) = (node.clone(), updated.clone());
        // Its own task: the caller may go away, the restart may not.
        node.clone().tasks.spawn(async move {
            let outcome = carry_out(&node, &kernel, &updated).await;
            told.send_replace(Some(outcome.map_err(Arc::new)));
        });
    }
    let outcome = match outcome.wait_for(Option::is_some).await {
        Ok(outcome) => outcome.clone(),
        Err(_) => None,
    };
    outcome.unwrap_or_else(|| Err(Arc::new(RestartError::Timeout(id))))
}

async fn carry_out(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    updated: &Value,
) -> Result<Value, RestartError> {
    let order = new_order(kernel, updated)?;
    let refused = |why| RestartError::Refused {
        kernel: kernel.id,
        why,
    };
    match kernel.state() {
        State::Running => {}
        // Begun by an earlier life of the agent.
        State::Restarting { .. } | State::Creating { restart: true, .. } => {
            return join(kernel).await;
        }
        State::Creating { .. } => return Err(refused(Refusal::NotRunning)),
        State::Ending(_) | State::Ended(_) => return Err(refused(Refusal::Ending)),
    }
    // Nothing is stopped before it is known that it can be made again.
    let out_of_service = kernel.wait_until(|state| match state {
        State::Running => None,
        _ => Some(()),
    });
    let ready = tokio::select! {
        biased;
        () = out_of_service => return Err(refused(Refusal::Ending)),
        () = node.stopping.cancelled() => return Err(RestartError::Stopping(kernel.id)),
        ready = create::look_ahead(node, kernel, &order) => ready,
    };
    let ready = ready.map_err(|source| RestartError::NotNow {
        kernel: kernel.id,
        source: Box::new(source),
    })?;
    let stored = node.store(kernel).await;
    stored.map_err(|source| RestartError::Journal {
        kernel: kernel.id,
        source,
    })?;
    match kernel.step(Input::Restart).as_slice() {
        [Action::StopForRestart] => replace(node, kernel, order, ready).await,
        [Action::Refuse(why)] => Err(refused(*why)),
        _ => Err(refused(Refusal::NotRunning)),
    }
}

async fn join(kernel: &Arc<Kernel>) -> Result<Value, RestartError> {
    let running = kernel
        .wait_until(|state| match state {
            State::Running => Some(true),
            State::Ending(_) | State::Ended(_) => Some(false),
            State::Creating { .. } | State::Restarting { .. } => None,
        })
        .await;
    match running {
        true => Ok(kernel
            .with_record(|record| record.result.clone())
            .unwrap_or_default()
            .tree()),
        false => Err(RestartError::Refused {
            kernel: kernel.id,
            why: Refusal::Ending,
        }),
    }
}

/// Waits while a restart is under way, so that an execution does not meet a closing runner.
pub async fn wait_if_restarting(kernel: &Kernel) {
    kernel
        .wait_until(|state| match state {
            State::Restarting { .. } | State::Creating { restart: true, .. } => None,
            _ => Some(()),
        })
        .await;
}

/// The stored request with the changes laid over it.
fn new_order(kernel: &Kernel, updated: &Value) -> Result<Order, RestartError> {
    let (request, cluster) =
        kernel.with_record(|record| (record.request.clone(), record.cluster.clone()));
    let request = request.ok_or(RestartError::NoRequest(kernel.id))?;
    Ok(Order {
        id: kernel.id,
        config: Arc::new(
            overlay(&request, updated).map_err(|source| RestartError::Update {
                kernel: kernel.id,
                source,
            })?,
        ),
        cluster: Arc::new(cluster.unwrap_or_default()),
    })
}

fn overlay(
    request: &KernelCreationConfig,
    updated: &Value,
) -> Result<KernelCreationConfig, serde_json::Error> {
    let Value::Object(changes) = updated else {
        return Ok(request.clone());
    };
    let mut merged = serde_json::to_value(request)?;
    if let Value::Object(merged) = &mut merged {
        for (key, value) in changes {
            // Who the kernel is does not change.
            if !matches!(key.as_str(), "kernel_id" | "session_id") {
                merged.insert(key.clone(), value.clone());
            }
        }
    }
    serde_json::from_value(merged)
}

/// Puts a new container into the old one's place.
async fn replace(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: Order,
    ready: Ready<'_>,
) -> Result<Value, RestartError> {
    // From here on the next start would go on with it, and with the changes.
    let config = (*order.config).clone();
    node.note(kernel, |record| record.request = Some(config))
        .await;
    tracing::info!(kernel_id = %kernel.id, "restarting a kernel");
    kernel.end_batch();
    destroy::let_runner_go(node, kernel).await;
    let gone = remove_old(node, kernel, Instant::now() + old_container(node)).await;
    let input = match gone {
        Ok(()) => Input::OldContainerGone,
        Err(Kept::Stopping) => return Err(CreateError::Stopping.into()),
        Err(Kept::Ending | Kept::Late) => Input::RestartFailed,
    };
    if input == Input::OldContainerGone {
        kernel.update_record(forget_container);
    }
    let actions = kernel.step(input);
    node.perform(kernel, &actions);
    if actions != [Action::Proceed] {
        return Err(match gone {
            Err(Kept::Late) => RestartError::Timeout(kernel.id),
            _ => RestartError::Refused {
                kernel: kernel.id,
                why: Refusal::Ending,
            },
        });
    }
    node.note(kernel, |_| {}).await;
    let result = create::recreate(node, kernel, &order, ready).await?;
    batch_job::expect_again(node, kernel);
    Ok(result)
}

/// Why the old container may still be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// The kernel is to end.
    Ending,
    /// The agent stops, perhaps with the engine. The journal tells the next start to go on.
    Stopping,
    /// It did not go in time.
    Late,
}

fn old_container(node: &Node) -> Duration {
    let turn_and_grace = TURN_OF_RESTART.saturating_add(node.config.node.engine.stop_grace);
    OLD_CONTAINER.saturating_add(turn_and_grace)
}

/// Removes the old container, as often as it takes: an engine that is at it already, restarts or comes
/// up more slowly than the agent fails at first.
async fn remove_old(node: &Arc<Node>, kernel: &Arc<Kernel>, until: Instant) -> Result<(), Kept> {
    let mut pause = REMOVAL_PAUSES.0;
    loop {
        let removal = destroy::stop_and_remove(node, kernel, false);
        let limit = until.saturating_duration_since(Instant::now());
        let trouble = match tokio::time::timeout(limit.min(old_container(node)), removal).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(err)) => chain(&err),
            Err(_) => "the attempt took too long".to_owned(),
        };
        let late = Instant::now() >= until;
        tracing::warn!(kernel_id = %kernel.id, err = trouble, again = !late,
            "cannot remove the old container of a kernel that is restarted");
        let ending = kernel.wait_until(|state| match state {
            State::Restarting { abort: None } | State::Creating { abort: None, .. } => None,
            _ => Some(()),
        });
        tokio::select! {
            biased;
            () = ending => return Err(Kept::Ending),
            () = node.stopping.cancelled() => {
                tracing::info!(kernel_id = %kernel.id,
                    "the restart of a kernel is cut short, as the agent stops; its next start goes on with it");
                return Err(Kept::Stopping);
            }
            () = std::future::ready(()), if late => return Err(Kept::Late),
            () = tokio::time::sleep_until(until.min(Instant::now() + pause).into()) => {}
        }
        pause = (pause * 2).min(REMOVAL_PAUSES.1);
    }
}

/// What a kernel does not have between two containers.
fn forget_container(record: &mut Record) {
    record.container_id = None;
    // What a commit had paused has gone with it.
    record.pausing = false;
    // The manager starts the job of a batch session again after a restart.
    record.batch_job = record.batch_running.then(BatchRecord::dropped);
}

/// Goes on with a restart that was cut short with its agent, whether the old container is gone, has
/// stopped or still runs. The one who had asked for it is not there any more: what becomes of it is
/// announced.
pub async fn resume(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    tracing::info!(kernel_id = %kernel.id, "going on with the restart of a kernel");
    let began = Instant::now();
    let order = match new_order(kernel, &Value::Null) {
        Ok(order) => order,
        Err(err) => return give_up(node, kernel, &chain(&err)),
    };
    destroy::let_runner_go(node, kernel).await;
    match remove_old(node, kernel, began + create::RESTART_PATIENCE).await {
        Ok(()) => {}
        Err(Kept::Stopping) => return,
        Err(Kept::Ending | Kept::Late) => {
            return give_up(node, kernel, "its old container is not gone");
        }
    }
    node.note(kernel, forget_container).await;
    match create::resume_restart(node, kernel, &order, began).await {
        Ok(_) => batch_job::expect_again(node, kernel),
        Err(err) => {
            tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                "the restart of a kernel could not be gone on with");
        }
    }
}

fn give_up(node: &Arc<Node>, kernel: &Arc<Kernel>, err: &str) {
    tracing::warn!(kernel_id = %kernel.id, err, "the restart of a kernel could not be gone on with");
    let actions = kernel.step(Input::CreationFailed { exit_code: None });
    node.perform(kernel, &actions);
}
