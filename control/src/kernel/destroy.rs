//! The end of a kernel: stop, keep the console, give everything back, announce it once.
//!
//! In: a kernel whose lifecycle has decided its end. Out: no container, no rows, no scratch, no
//! reservation, no port, no journal file, and one `kernel_terminated` with the real exit code.
//! Invariants: ending one kernel waits for no other kernel, but for its turns to be stopped and to have
//! its console kept; nothing is given back while the
//! container may still use it, so with a broken engine the ending goes on trying; the journal file
//! goes after the end and its announcement are on the disk; every single wait has a deadline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::ids::{KernelId, SessionId};
use thiserror::Error;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::batch_job;
use super::death::{Death, Evidence, full_shm};
use super::kept_logs::Shipping;
use super::lifecycle::{Action, Ending, Input, Reason};
use super::node::Node;
use super::record::Record;
use super::recovery;
use super::registry::{EndedKernel, Kernel};
use super::runner_link::Owed;
use super::runner_link::runs::OWED_AT_MOST;
use super::scratch::ScratchError;
use crate::blocking::blocking;
use crate::causes::chain;
use crate::docker::{ContainerInspectResponse, DockerError, Liveness, LogOptions};
use crate::events::Event;

/// Pauses between attempts to give things back: doubled up to the second.
const RETRY_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long to wait for the dataplane to let go of the ports. They rest afterwards anyway.
const ROWS_GONE: Duration = Duration::from_secs(3);
/// How long to wait until the announcement of an end is in the outbox.
const ANNOUNCED: Duration = Duration::from_secs(10);
/// How long the end waits for the word on the console, which the original sends first.
const CONSOLE_TOLD: Duration = Duration::from_secs(3);
/// Consoles that are read and written at a time: each is in memory as a whole, and many kernels end at once
/// when a large session does.
pub const CONSOLES_AT_ONCE: usize = 8;
/// How long an end waits for the consoles of others to be brought to the bus, so that few have to be dropped.
const CONSOLE_ROOM: Duration = Duration::from_secs(30);
/// How long a restart waits for its turn among kernels that are stopped, or whose consoles are kept.
pub const TURN_OF_RESTART: Duration = Duration::from_secs(10);
/// Containers that are stopped at a time: so many for each processor, within these bounds. Beyond what the
/// host can bear none of them gets through with its shutdown within its grace, and all are killed.
const STOPS_PER_PROCESSOR: usize = 4;
const STOPS_AT_ONCE: (usize, usize) = (16, 96);
/// How long an end waits for its turn among them: kernels that do not heed the signal take their whole
/// grace, and many of them would take it one after the other.
pub const STOP_TURN: Duration = Duration::from_secs(60);
/// What a destroy may take beyond the container's time to stop: the turn for that, the console's room and
/// reading (60 s), and removing (90 s).
const DESTROY_MARGIN: Duration = Duration::from_secs(280);

/// A destroy that could not be answered with success.
#[derive(Debug, Error)]
pub enum DestroyError {
    /// The kernel still holds something; the node goes on trying.
    #[error(
        "kernel {kernel} has not ended after {} s ({trouble}); the node goes on trying",
        after.as_secs()
    )]
    StillEnding {
        /// Which.
        kernel: KernelId,
        /// How long was waited.
        after: Duration,
        /// The last failure.
        trouble: String,
    },
    /// It could not be learned whether the kernel exists.
    #[error("cannot look for a container of kernel {kernel}")]
    Inspect {
        /// Which.
        kernel: KernelId,
        /// Why.
        #[source]
        source: DockerError,
    },
}

/// Why a kernel could not be given back yet.
#[derive(Debug, Error)]
pub enum EndError {
    /// A Docker call failed.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// The scratch could not be removed.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
}

/// Destroys a kernel, or joins the ending that is under way. Answers when nothing is left.
///
/// # Errors
/// What is there of it could not be looked for, or not be removed.
pub async fn destroy(
    node: &Arc<Node>,
    id: KernelId,
    session: SessionId,
    reason: Reason,
    suppress: bool,
) -> Result<(), DestroyError> {
    let kernel = match node.registry.get(id) {
        Some(kernel) => Some(kernel),
        // Not registered, but perhaps there: a container this agent was not told of.
        None => recovery::adopt_stray(node, id)
            .await
            .map_err(|source| DestroyError::Inspect { kernel: id, source })?,
    };
    let Some(kernel) = kernel else {
        if !suppress {
            tell_end_again(node, id, session, Some(reason));
        }
        return Ok(());
    };
    let actions = kernel.step(Input::Destroy { reason, suppress });
    node.perform(&kernel, &actions);
    let after = node.config.node.engine.stop_grace + DESTROY_MARGIN;
    match tokio::time::timeout(after, kernel.wait_ended()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(DestroyError::StillEnding {
            kernel: id,
            after,
            trouble: kernel.trouble().unwrap_or_else(|| "no answer yet".into()),
        }),
    }
}

/// Answers for a kernel that is not here with how it ended, if that is remembered: the manager takes
/// no end of a kernel that it has not begun to terminate, so it hears of one that came by itself only
/// now. An end that nobody was told of, a purge's, has the reason that is asked for now.
pub fn tell_end_again(node: &Node, id: KernelId, session: SessionId, asked: Option<Reason>) {
    let ending = node.registry.end_of(id, session).map(|(ending, _)| ending);
    let told = |ending: &Ending| {
        let asked = asked.clone().filter(|_| ending.suppress);
        asked.unwrap_or_else(|| ending.told())
    };
    node.events.emit(Event::KernelTerminated {
        kernel: id,
        session,
        reason: ending.as_ref().map_or(Reason::ALREADY_TERMINATED, told),
        exit_code: ending.and_then(|ending| ending.exit_code),
    });
}

/// Brings a kernel to its end. One task per kernel, started by the lifecycle.
pub async fn end(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    tracing::debug!(kernel_id = %kernel.id, "ending a kernel");
    if kernel.is_visible() {
        node.note(kernel, |_| {}).await;
    }
    kernel.end_batch();
    let_runner_go(node, kernel).await;
    let mut pause = RETRY_PAUSES.0;
    let ended = Instant::now();
    // Before the row goes, and its sample with it.
    let sample = kernel
        .container()
        .and_then(|container| node.link.sample(container));
    if let Some(sample) = &sample {
        kernel.note_sample(sample, node.config.node.dataplane.stats_interval);
    }
    // Over all attempts: the container that told it may be gone when a later step fails.
    let mut stopped = StoppedContainer::default();
    loop {
        match give_back(node, kernel, &mut stopped).await {
            Ok(()) => break,
            // The journal holds the ending; the next start goes on with it.
            Err(_) if node.stopping.is_cancelled() => return,
            Err(err) => {
                let trouble = chain(&err);
                if kernel.trouble().as_ref() != Some(&trouble) {
                    let context = [("kernel_id", kernel.id.to_string())];
                    node.report(format!("cannot finish a kernel yet: {trouble}"), context);
                }
                kernel.set_trouble(trouble);
                tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                    "cannot finish a kernel yet; trying again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = node.stopping.cancelled() => return,
        }
        pause = (pause * 2).min(RETRY_PAUSES.1);
    }
    let ending = kernel.ending().filter(Ending::is_by_itself);
    let death = ending.and_then(|ending| {
        let evidence = Evidence {
            out_of_memory: kernel.out_of_memory().explains(ended, stopped.oom_killed),
            shm_full: sample.as_ref().and_then(full_shm).is_some(),
        };
        Death::of(ending.exit_code.or(stopped.exit_code), evidence)
    });
    if let Some(death) = death {
        tracing::warn!(kernel_id = %kernel.id, cause = death.words(), "a kernel has died");
    }
    if let Some(consoles) = &node.consoles {
        consoles.settled(kernel.id, CONSOLE_TOLD).await;
    }
    let actions = kernel.step(Input::Cleaned {
        exit_code: stopped.exit_code,
        death,
    });
    if let Some(ending) = kernel.ending() {
        batch_job::end_with_kernel(node, kernel, &ending);
    }
    node.perform(kernel, &actions);
    let end = EndedKernel::now(kernel);
    keep_end(node, end.clone()).await;
    if !actions.contains(&Action::AnnounceTerminated) || announcement_is_kept(node, kernel).await {
        remove_record(node, kernel).await;
    }
    let oldest = node.registry.forget(kernel, end);
    kernel.leave();
    if let Some(oldest) = oldest {
        let ends = node.ends.clone();
        if let Err(err) = blocking(move || ends.remove(oldest)).await {
            // The next start removes what is too much.
            tracing::warn!(kernel_id = %oldest, err = &err as &dyn std::error::Error, "cannot remove the end of a kernel");
        }
    }
}

/// Closes the link to a runner that is going away. Its runs that have not ended are told to be
/// cancelled, also those of an earlier life of the agent whose runner this one never reached.
pub async fn let_runner_go(node: &Node, kernel: &Kernel) {
    match kernel.set_runner(None) {
        Some(runner) => runner.close().await,
        None => {
            for _ in 0..kernel.with_record(|record| record.runs_owed.min(OWED_AT_MOST)) {
                node.events.emit(Event::ExecutionCancelled {
                    session: kernel.session,
                });
            }
        }
    }
    if kernel.with_record(Record::owed) != Owed::default() {
        // What was told, the next agent does not tell again.
        node.note(kernel, |record| record.set_owed(Owed::default()))
            .await;
    }
}

/// For a destroy that comes after a restart of the agent.
async fn keep_end(node: &Node, end: EndedKernel) {
    let (ends, id) = (node.ends.clone(), end.view.id);
    let stored = tokio::time::timeout(ANNOUNCED, blocking(move || end.store(&ends)));
    let why = match stored.await {
        Ok(Ok(())) => return,
        Ok(Err(err)) => chain(&err),
        Err(_) => "the disk does not answer".to_owned(),
    };
    tracing::warn!(kernel_id = %id, err = why,
        "cannot write down how a kernel ended; it is known until the agent stops");
}

/// Whether the end of a kernel will reach the managers although this process be killed.
async fn announcement_is_kept(node: &Node, kernel: &Kernel) -> bool {
    let Some(cluster) = &node.cluster else {
        return true;
    };
    let kept = cluster.bus.kept(ANNOUNCED).await;
    if !kept {
        tracing::warn!(kernel_id = %kernel.id,
            "the end of a kernel is not on the disk yet; its journal file stays, and the next start tells the end again");
    }
    kept
}

async fn remove_record(node: &Node, kernel: &Kernel) {
    let (journal, entry) = (node.journal.clone(), kernel.journal_entry());
    if let Err(err) = blocking(move || entry.remove(&journal)).await {
        // What it names is gone; the next start finds nothing to finish and removes it then.
        tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error, "cannot remove a journal file");
    }
}

async fn give_back(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    stopped: &mut StoppedContainer,
) -> Result<(), EndError> {
    let keep = node.config.debug.skip_container_deletion;
    let found = stop_and_remove(node, kernel, keep).await?;
    stopped.exit_code = found.exit_code.or(stopped.exit_code);
    stopped.oom_killed |= found.oom_killed;
    let (closer, id) = (node.clone(), kernel.id);
    blocking(move || closer.host_sockets.close(id)).await;
    let record = kernel.record();
    node.scratch.remove(record.kernel_id).await?;
    node.ledger.release(kernel.id);
    node.ports.release_kernel(kernel.id);
    Ok(())
}

/// What a container that has stopped tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoppedContainer {
    /// Its exit code, if it has run.
    pub exit_code: Option<i64>,
    /// The engine's word: something in it was killed for memory.
    pub oom_killed: bool,
}

impl StoppedContainer {
    fn of(found: &ContainerInspectResponse) -> StoppedContainer {
        let state = found.state.as_ref();
        StoppedContainer {
            exit_code: exit_code_of(found),
            oom_killed: state.and_then(|state| state.oom_killed).unwrap_or(false),
        }
    }
}

/// Withdraws the rows, stops and removes the container, keeps its console. Answers what it tells of
/// its end. Scratch, devices and host ports stay (a restart needs them), and with
/// `keep` the stopped container (a restart can't have that: the new one bears its name).
///
/// # Errors
/// The engine does not tell of the container, or does not stop or remove it.
pub async fn stop_and_remove(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    keep: bool,
) -> Result<StoppedContainer, DockerError> {
    let rows_gone = node.link.withdraw(kernel.id).await;
    let record = kernel.record();
    // Before the look: a death that comes after it must not be missed.
    let deaths = kernel.deaths();
    let Some(found) = find_container(node, &record).await? else {
        node.link.await_removed(rows_gone, ROWS_GONE).await;
        return Ok(StoppedContainer::default());
    };
    let container = found
        .id
        .clone()
        .unwrap_or_else(|| record.container_name.clone());
    let liveness = Liveness::of(&found);
    let stopped = match liveness {
        Liveness::Created => StoppedContainer::default(),
        Liveness::Active => {
            if !stop(node, kernel, &container, deaths).await {
                return Err(DockerError::Stopping {
                    step: format!("stopping container {container}"),
                });
            }
            match node.docker.inspect(&container).await {
                Ok(stopped) => StoppedContainer::of(&stopped),
                Err(err) if err.is_not_found() => StoppedContainer::default(),
                Err(err) => return Err(err),
            }
        }
        Liveness::Dead => StoppedContainer::of(&found),
    };
    if stopped.exit_code.is_some() && kernel.ending().is_some() {
        // Nobody tells it once the container is gone.
        kernel.step(Input::Died {
            exit_code: stopped.exit_code,
        });
        node.note(kernel, |_| {}).await;
    }
    if liveness != Liveness::Created {
        keep_console(node, kernel, &container).await;
    }
    node.link.await_removed(rows_gone, ROWS_GONE).await;
    if keep && liveness != Liveness::Created {
        tracing::info!(kernel_id = %kernel.id, container_id = container, "the container is kept (debug.skip-container-deletion)");
        return Ok(stopped);
    }
    match node.docker.remove(&container, true).await {
        Ok(()) => Ok(stopped),
        Err(err) if err.is_not_found() => Ok(stopped),
        Err(DockerError::AlreadyInProgress { .. }) => {
            await_gone(node, &container).await?;
            Ok(stopped)
        }
        Err(err) => Err(err),
    }
}

/// By id, or by name for a creation whose answer was lost.
async fn find_container(
    node: &Node,
    record: &Record,
) -> Result<Option<ContainerInspectResponse>, DockerError> {
    let key = record
        .container_id
        .as_deref()
        .unwrap_or(&record.container_name);
    if key.is_empty() {
        return Ok(None);
    }
    match node.docker.inspect(key).await {
        Ok(found) => Ok(Some(found)),
        Err(err) if err.is_not_found() => Ok(None),
        Err(err) => Err(err),
    }
}

/// How many containers of a node with so many processors are stopped at a time.
#[must_use]
pub fn stops_at_once(processors: usize) -> usize {
    let wanted = processors.saturating_mul(STOPS_PER_PROCESSOR);
    wanted.clamp(STOPS_AT_ONCE.0, STOPS_AT_ONCE.1)
}

/// How long a kernel waits for its turn; for ever when it ends. One that is restarted does not end for
/// others' sake: it waits no longer than it has time for.
fn patience(kernel: &Kernel) -> Option<Duration> {
    kernel.ending().is_none().then_some(TURN_OF_RESTART)
}

/// A turn at what only so many kernels do at a time. None when it did not come in time.
async fn turn(turns: &Semaphore, patience: Option<Duration>) -> Option<SemaphorePermit<'_>> {
    let turn = turns.acquire();
    match patience {
        None => turn.await.ok(),
        Some(limit) => tokio::time::timeout(limit, turn).await.ok()?.ok(),
    }
}

/// The same for one that is to be stopped. Nothing once its container has died by itself, beyond the deaths
/// that were counted: it needs none.
async fn turn_unless_dead<'t>(
    turns: &'t Semaphore,
    limit: Duration,
    kernel: &Kernel,
    deaths: u64,
) -> Option<Option<SemaphorePermit<'t>>> {
    tokio::select! {
        biased;
        turn = turn(turns, Some(limit)) => Some(turn),
        () = kernel.wait_death(deaths) => None,
    }
}

/// Asks the container to stop, then makes it. What fails here fails again at the removal, which
/// kills by force and is retried. False when the agent stops before its turn: the next start goes on.
async fn stop(node: &Node, kernel: &Kernel, container: &str, deaths: u64) -> bool {
    let grace = node.config.node.engine.stop_grace;
    // The engine's time for it, which the grace is a part of, begins with the turn.
    let limit = patience(kernel).unwrap_or(STOP_TURN);
    let turn = turn_unless_dead(&node.stop_turns, limit, kernel, deaths);
    let _turn = match node.stopping.run_until_cancelled(turn).await {
        Some(Some(turn)) => turn,
        Some(None) => return true,
        None => return false,
    };
    if let Err(err) = node.docker.stop(container, grace).await
        && !err.is_not_found()
    {
        tracing::warn!(kernel_id = %kernel.id, container_id = container,
            err = &err as &dyn std::error::Error, "cannot stop a container; killing it");
        if let Err(err) = node.docker.kill(container, "SIGKILL").await {
            tracing::debug!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error, "cannot kill a container");
        }
    }
    true
}

async fn keep_console(node: &Arc<Node>, kernel: &Kernel, container: &str) {
    let limit = usize::try_from(node.config.container_logs.max_length.0).unwrap_or(usize::MAX);
    let options = LogOptions {
        keep: limit,
        partial: true,
        ..LogOptions::default()
    };
    let ends = kernel.ending().is_some();
    let turn = turn(&node.console_turns, patience(kernel)).await;
    if let Some(consoles) = node.consoles.as_ref().filter(|_| ends) {
        // Those that are at it come to it.
        let most = node
            .logs
            .waiting_room(node.config.container_logs.max_length.0);
        let most = most.saturating_sub(CONSOLES_AT_ONCE).max(CONSOLES_AT_ONCE);
        let room = consoles.room(most, CONSOLE_ROOM);
        // Nothing is brought any more then.
        node.stopping.run_until_cancelled(room).await;
    }
    let text = match node.docker.logs(container, options).await {
        Ok(log) => log.text,
        Err(err) => {
            tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error, "cannot read a console");
            return;
        }
    };
    let (logs, id) = (node.logs.clone(), kernel.id);
    // In a cluster the event follows when the console is where managers look for it.
    let parcel = kernel.container().filter(|_| node.consoles.is_some());
    let kept = blocking(move || match parcel {
        Some(container) => logs.store_to_ship(id, container, &text).map(Some),
        None => logs.store(id, &text).map(|()| None),
    })
    .await;
    drop(turn);
    match (kept, kernel.container(), &node.consoles) {
        (Ok(Some(Shipping::Sent)), ..) | (Ok(_), None, _) => {}
        (Ok(_), Some(container), Some(consoles)) => consoles.ship(id, container),
        (Ok(_), Some(container), None) => node.events.emit(Event::DoSyncKernelLogs {
            kernel: id,
            container,
        }),
        (Err(err), ..) => {
            tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error, "cannot keep a console");
        }
    }
}

async fn await_gone(node: &Node, container: &str) -> Result<(), DockerError> {
    // Somebody else removes it. One more look decides; the caller comes back if it is still there.
    tokio::time::sleep(Duration::from_millis(300)).await;
    match node.docker.inspect(container).await {
        Err(err) if err.is_not_found() => Ok(()),
        Err(err) => Err(err),
        Ok(_) => Err(DockerError::AlreadyInProgress {
            step: format!("remove container {container}"),
            message: "removal is already in progress".into(),
        }),
    }
}

/// The exit code of a container that has stopped.
pub fn exit_code_of(found: &ContainerInspectResponse) -> Option<i64> {
    let state = found.state.as_ref()?;
    match state.running {
        Some(true) => None,
        _ => state.exit_code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::registry::tests::record;
    use crate::kernel::registry::{Admission, Registry};

    #[test]
    fn a_node_stops_as_many_containers_at_a_time_as_it_can_bear() {
        assert_eq!(stops_at_once(2), 16);
        assert_eq!(stops_at_once(8), 32);
        assert_eq!(stops_at_once(256), 96);
    }

    #[tokio::test]
    async fn an_end_waits_for_its_turn_and_a_restart_goes_on_without_one() {
        let turns = Semaphore::new(1);
        let first = turn(&turns, None).await;
        assert!(first.is_some());
        let mut end = std::pin::pin!(turn(&turns, None));
        assert!(futures_util::poll!(end.as_mut()).is_pending());
        assert!(turn(&turns, Some(Duration::ZERO)).await.is_none());
        assert!(futures_util::poll!(end.as_mut()).is_pending());
        drop(first);
        assert!(end.await.is_some());
    }

    #[tokio::test]
    async fn a_container_that_dies_by_itself_waits_for_no_turn() {
        let registry = Registry::default();
        let Admission::Accepted(kernel) = registry.admit(record(1)) else {
            panic!("an empty registry admits");
        };
        let (turns, long) = (Semaphore::new(0), Duration::from_secs(3600));
        // One that was told before its container was looked at is another's.
        kernel.count_death();
        let mut end = std::pin::pin!(turn_unless_dead(&turns, long, &kernel, kernel.deaths()));
        assert!(futures_util::poll!(end.as_mut()).is_pending());
        kernel.count_death();
        assert!(end.await.is_none());
        // Between the look and the wait.
        assert!(turn_unless_dead(&turns, long, &kernel, 1).await.is_none());
        turns.add_permits(1);
        let given = turn_unless_dead(&turns, long, &kernel, 2).await;
        assert!(given.flatten().is_some());
    }
}
