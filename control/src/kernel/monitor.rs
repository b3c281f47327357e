//! Keeping what is and what should be together.
//!
//! In: Docker's events, every few seconds Docker's list of all containers of this agent, and the
//! dataplane's samples. Out: inputs to lifecycles, rows of a container whose address changed, and what
//! each kernel knows of kills for memory. Invariant: nothing is
//! decided from a list alone: a kernel that seems to be gone is looked at by itself first, because
//! the list and the registry are never of the same instant.

use std::collections::HashMap;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use shared::ids::{ContainerId, KernelId};

use super::destroy::exit_code_of;
use super::lifecycle::{Input, Stage, State};
use super::node::Node;
use super::recovery::{self, ListedContainer};
use super::registry::Kernel;
use super::rows;
use crate::causes::chain;
use crate::docker::{ContainerEvent, DockerError, EngineEvent, Liveness, NetworkEvent};
use crate::metrics::{count_sync, count_sync_end};

/// Docker events waiting for us; a full queue makes the stream say `Resynchronise`.
const EVENT_QUEUE: usize = 1024;
/// How many containers of one comparison are looked at at a time: one that can't be inspected keeps
/// the engine's deadline long, and the others are not to wait for it.
const LOOKS: usize = 8;

/// Follows Docker's events until the agent stops.
pub async fn follow_events(node: Arc<Node>) {
    let mut events = node.docker.events(EVENT_QUEUE);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = node.stopping.cancelled() => return,
        };
        match event {
            EngineEvent::Container(event) => container_event(&node, &event),
            EngineEvent::Network(event) => network_event(&node, &event),
            EngineEvent::Resynchronise => {
                reconcile_and_report(&node).await;
                // Nobody tells of moves that were missed.
                for kernel in node.registry.all() {
                    follow_container(&node, &kernel);
                }
            }
        }
    }
}

/// Compares now and then, until the agent stops.
pub async fn reconcile_periodically(node: Arc<Node>) {
    let sync = node.config.agent.sync_container_lifecycles;
    if !sync.enabled {
        return;
    }
    let mut ticks = tokio::time::interval(sync.interval.max(std::time::Duration::from_millis(100)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => reconcile_and_report(&node).await,
            () = node.stopping.cancelled() => return,
        }
    }
}

/// Follows the kills for memory that Linux counts, until the agent stops: the engine's events of them
/// may be missed.
pub async fn follow_samples(node: Arc<Node>) {
    let mut observed = node.link.subscribe();
    let interval = node.config.node.dataplane.stats_interval;
    let mut seen = None;
    loop {
        let changed = tokio::select! {
            changed = observed.changed() => changed,
            () = node.stopping.cancelled() => return,
        };
        if changed.is_err() {
            return;
        }
        let Some(snapshot) = observed.borrow_and_update().snapshot.clone() else {
            continue;
        };
        let pass = snapshot.node.as_ref().map(|node| node.taken_monotonic_ns);
        if std::mem::replace(&mut seen, pass) == pass {
            continue;
        }
        for kernel in node.registry.all() {
            let container = kernel.container();
            if let Some(sample) = container.and_then(|id| snapshot.container(id)) {
                kernel.note_sample(sample, interval);
            }
        }
    }
}

async fn reconcile_and_report(node: &Arc<Node>) {
    count_sync(node.agent_id());
    let reconciled = reconcile(node).await;
    let ended = reconciled.as_ref().map_err(|_| "DockerError");
    count_sync_end(node.agent_id(), ended.copied());
    if let Err(err) = reconciled {
        let message = format!("cannot compare kernels with containers: {}", chain(&err));
        node.report(message, []);
        tracing::warn!(
            err = &err as &dyn std::error::Error,
            "cannot compare kernels with containers"
        );
    }
}

fn container_event(node: &Arc<Node>, event: &ContainerEvent) {
    let Some(kernel) = recovery::kernel_of_name(event.name()).and_then(|id| node.registry.get(id))
    else {
        return;
    };
    let Ok(container) = event.container_id.parse::<ContainerId>() else {
        return;
    };
    // The old container of a restart, or one that is not ours to speak of.
    if kernel.container() != Some(container) {
        return;
    }
    match event.action.as_str() {
        "die" => {
            tracing::debug!(kernel_id = %kernel.id, exit_code = event.exit_code(), "container died");
            kernel.count_death();
            let actions = kernel.step(Input::Died {
                exit_code: event.exit_code(),
            });
            node.perform(&kernel, &actions);
        }
        "oom" => {
            if kernel.count_out_of_memory() {
                tracing::warn!(kernel_id = %kernel.id, container_id = %container,
                    "a process of a kernel was killed at the kernel's memory limit");
            }
            if let Some(runner) = kernel.runner()
                && let Err(err) = runner.notify_oom()
            {
                tracing::debug!(
                    err = &err as &dyn std::error::Error,
                    "cannot tell the runner of an oom kill"
                );
            }
        }
        // A start by hand is none of a kernel: its life was over when the container died.
        _ => {}
    }
}

fn network_event(node: &Arc<Node>, event: &NetworkEvent) {
    let Ok(container) = event.container_id.parse::<ContainerId>() else {
        return;
    };
    let of_container = |kernel: &Arc<Kernel>| kernel.container() == Some(container);
    if let Some(kernel) = node.registry.all().into_iter().find(of_container) {
        follow_container(node, &kernel);
    }
}

/// Finds the container of a kernel again. Of one that starts only when it was looked for before: with
/// every start the engine tells of the networks that are joined.
fn follow_container(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    let looked_for = || kernel.runner().is_some() || kernel.refreshing.try_lock().is_err();
    let is_found = kernel.is_running() || (kernel.is_up() && looked_for());
    if !is_found {
        return;
    }
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone()
        .tasks
        .spawn(async move { rows::renew(&node, &kernel).await });
}

/// One comparison. A container that can't be looked at hinders no other. Answers how many kernels without
/// a running container there were, and containers without a kernel.
///
/// # Errors
/// The engine can't be asked, or not for a container: the first failure.
pub async fn reconcile(node: &Arc<Node>) -> Result<usize, DockerError> {
    // Taken before the list: a kernel that is started meanwhile is not looked for in it.
    let running: Vec<Arc<Kernel>> = node
        .registry
        .all()
        .into_iter()
        .filter(|kernel| has_started(&kernel.state()))
        .collect();
    let listed = recovery::list(node).await?;
    let active = |listed: &&ListedContainer| listed.seen.liveness == Liveness::Active;
    node.active_containers
        .send_replace(Some(listed.iter().filter(active).count()));
    let by_kernel: HashMap<KernelId, Vec<&ListedContainer>> =
        listed.iter().fold(HashMap::new(), |mut by_kernel, listed| {
            by_kernel
                .entry(listed.seen.kernel)
                .or_default()
                .push(listed);
            by_kernel
        });
    let mut checks: Vec<Check<'_>> = Vec::new();
    for kernel in running {
        let alive = by_kernel.get(&kernel.id).is_some_and(|containers| {
            containers.iter().any(|listed| {
                Some(listed.seen.container) == kernel.container()
                    && listed.seen.liveness == Liveness::Active
            })
        });
        if !alive {
            checks.push(Box::pin(async move { confirm_end(node, &kernel).await }));
        }
    }
    for listed in &listed {
        if node.registry.get(listed.seen.kernel).is_none() {
            checks.push(Box::pin(recovery::take_stray(node, listed)));
        }
    }
    let count = checks.len();
    check_all(checks).await.map(|()| count)
}

/// A look at one container by itself, and what follows from it.
type Check<'a> = BoxFuture<'a, Result<(), DockerError>>;

/// Does all, each to its end; begins no more when the engine is gone.
async fn check_all(checks: Vec<Check<'_>>) -> Result<(), DockerError> {
    let mut waiting = checks.into_iter();
    let mut running: FuturesUnordered<_> = waiting.by_ref().take(LOOKS).collect();
    let mut failed = None;
    while let Some(looked) = running.next().await {
        if let Err(err) = looked {
            if matches!(err, DockerError::Unreachable { .. }) {
                waiting = Vec::new().into_iter();
            }
            failed.get_or_insert(err);
        }
        running.extend(waiting.next());
    }
    failed.map_or(Ok(()), Err)
}

/// Whether the kernel's container ought to be running.
fn has_started(state: &State) -> bool {
    matches!(
        state,
        State::Running
            | State::Creating {
                stage: Stage::Started,
                ..
            }
    )
}

/// Looks at the container of a kernel that seemed to be gone, then tells the lifecycle.
async fn confirm_end(node: &Arc<Node>, kernel: &Arc<Kernel>) -> Result<(), DockerError> {
    let Some(container) = kernel.container() else {
        return Ok(());
    };
    let input = match node.docker.inspect(&container.to_string()).await {
        Ok(found) => match Liveness::of(&found) {
            // Created: its start is still on the way.
            Liveness::Active | Liveness::Created => return Ok(()),
            Liveness::Dead => Input::Died {
                exit_code: exit_code_of(&found),
            },
        },
        Err(err) if err.is_not_found() => Input::Missing,
        Err(err) => return Err(err),
    };
    // A restart may have replaced the container while we looked.
    if kernel.container() == Some(container) {
        let actions = kernel.step(input);
        node.perform(kernel, &actions);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn checks(count: usize, begun: &AtomicUsize, gone: bool) -> Vec<Check<'_>> {
        let look = |at: usize| -> Check<'_> {
            Box::pin(async move {
                begun.fetch_add(1, Ordering::SeqCst);
                if at > 0 {
                    tokio::task::yield_now().await;
                }
                let (step, source) = (format!("look {at}"), "no".into());
                match (at, gone) {
                    (0, false) => Err(DockerError::Broken { step, source }),
                    (0, true) => Err(DockerError::Unreachable {
                        step,
                        host: String::new(),
                        source,
                    }),
                    _ => Ok(()),
                }
            })
        };
        (0..count).map(look).collect()
    }

    #[tokio::test]
    async fn one_look_that_fails_ends_no_other_unless_the_engine_is_gone() {
        let begun = AtomicUsize::new(0);
        let told = check_all(checks(LOOKS * 3, &begun, false)).await;
        assert!(matches!(told, Err(DockerError::Broken { .. })), "{told:?}");
        assert_eq!(begun.swap(0, Ordering::SeqCst), LOOKS * 3);
        let told = check_all(checks(LOOKS * 3, &begun, true)).await;
        assert!(
            matches!(told, Err(DockerError::Unreachable { .. })),
            "{told:?}"
        );
        assert_eq!(begun.load(Ordering::SeqCst), LOOKS);
    }
}
