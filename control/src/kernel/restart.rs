//! The restart of a kernel: a new container with the same devices, limits, ports and files.
//!
//! Invariant: what the kernel holds (devices, host ports, scratch) is never given back in between,
//! so nobody else can take it (the original's restarted containers had no limits at all).

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use shared::ids::KernelId;
use thiserror::Error;

use super::create::{self, CreateError, Order};
use super::journal::JournalError;
use super::lifecycle::{Action, Input, Refusal, State};
use super::node::Node;
use super::record::BatchRecord;
use super::registry::Kernel;
use super::request::KernelCreationConfig;
use super::{batch_job, destroy};

/// How long the old container may take to go (the original's number).
const OLD_CONTAINER: Duration = Duration::from_secs(60);

/// A failed restart.
#[derive(Debug, Error)]
pub enum RestartError {
    /// Nobody knows the kernel.
    #[error("kernel {0} is not known to this agent")]
    Unknown(KernelId),
    /// It is not in a state to be restarted.
    #[error("kernel {kernel} cannot be restarted now: {why:?}")]
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
    #[error("the old container of kernel {0} did not go within 60 s")]
    Timeout(KernelId),
    /// The new container did not come.
    #[error(transparent)]
    Create(#[from] CreateError),
}

/// Restarts a kernel, or joins the restart under way. Answers its result map.
pub async fn restart(
    node: &Arc<Node>,
    id: KernelId,
    updated: &Value,
) -> Result<Value, RestartError> {
    let kernel = node.registry.get(id).ok_or(RestartError::Unknown(id))?;
    let order = new_order(&kernel, updated)?;
    if kernel.is_running() {
        // Before anything is stopped that could not be made again.
        let kernel_id = kernel.id;
        let stored = node.store(&kernel).await;
        stored.map_err(|source| RestartError::Journal {
            kernel: kernel_id,
            source,
        })?;
    }
    match kernel.step(Input::Restart).as_slice() {
        [Action::StopForRestart] => {
            let (node, restarting) = (node.clone(), kernel.clone());
            // Its own task: the caller may go away, the restart may not.
            let task = node
                .clone()
                .tasks
                .spawn(async move { carry_out(&node, &restarting, order).await });
            match task.await {
                Ok(outcome) => outcome,
                Err(_) => Err(RestartError::Timeout(id)),
            }
        }
        [Action::JoinRestart] => join(&kernel).await,
        [Action::Refuse(why)] => Err(RestartError::Refused {
            kernel: id,
            why: *why,
        }),
        _ => Err(RestartError::Refused {
            kernel: id,
            why: Refusal::NotRunning,
        }),
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
            .unwrap_or_default()),
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

async fn carry_out(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: Order,
) -> Result<Value, RestartError> {
    node.note(kernel, |_| {}).await;
    tracing::info!(kernel_id = %kernel.id, "restarting a kernel");
    kernel.end_batch();
    destroy::let_runner_go(node, kernel).await;
    let removal = destroy::stop_and_remove(node, kernel, false);
    let gone = tokio::time::timeout(OLD_CONTAINER, removal).await;
    let input = match &gone {
        Ok(Ok(_)) => Input::OldContainerGone,
        Ok(Err(err)) => {
            tracing::warn!(kernel_id = %kernel.id, err = err as &dyn std::error::Error, "cannot remove the old container");
            Input::RestartFailed
        }
        Err(_) => Input::RestartFailed,
    };
    if input == Input::OldContainerGone {
        kernel.update_record(|record| {
            record.container_id = None;
            record.request = Some((*order.config).clone());
            // The manager starts the job of a batch session again after a restart.
            record.batch_job = record.batch_running.then(BatchRecord::dropped);
        });
    }
    let actions = kernel.step(input);
    node.perform(kernel, &actions);
    if actions != [Action::Proceed] {
        return Err(match gone {
            Err(_) => RestartError::Timeout(kernel.id),
            Ok(_) => RestartError::Refused {
                kernel: kernel.id,
                why: Refusal::Ending,
            },
        });
    }
    let result = create::recreate(node, kernel, &order).await?;
    batch_job::expect_again(node, kernel);
    Ok(result)
}
