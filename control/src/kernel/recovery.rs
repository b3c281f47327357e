//! What becomes of the kernels that are found when the agent starts, and of containers found later
//! that nobody registered.
//!
//! In: Docker's list of all containers of this agent, the journal, the scratch root. Out: kernels
//! in the registry with their reservations and ports, endings under way, and no remains that belong
//! to nobody. Invariants: reservations and ports of all found kernels are restored before the first
//! RPC is answered; user work is never killed for being unknown; rows of kernels that exist stay.

pub mod plan;
mod rebuild;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::{StreamExt as _, stream};
use shared::ids::{ContainerId, KernelId};
use thiserror::Error;

use self::plan::{ContainerState, Decision, JournalState};
use super::create;
use super::journal::{Damaged, JournalError};
use super::lifecycle::Lifecycle;
use super::node::Node;
use super::record::{PublishedBy, Record};
use super::registry::{EndedKernel, Kernel};
use super::{batch_job, commit, restart, rows, services};
use crate::blocking::blocking;
use crate::docker::{ContainerSummary, DockerError, Liveness};
use crate::json_text::JsonText;
use crate::ports::PortError;
use crate::resource::Restored;

/// A scratch directory of nobody is deleted only when it is older than this.
const ORPHAN_AGE: Duration = Duration::from_secs(600);
/// How long the managers wait for the removal of containers that belong to no kernel, whose names new
/// ones may bear.
const UNWANTED_GONE: Duration = Duration::from_secs(3);
/// Removals asked for at a time.
const REMOVALS_AT_ONCE: usize = 8;
/// Journal files of found kernels written at a time.
const NOTES_AT_ONCE: usize = 32;
/// Pauses between attempts to take up a kernel that runs: doubled up to the second.
const RESUME_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How long a runner may take to tell its services.
const SERVICES_TOLD: Duration = Duration::from_secs(10);

/// Why the node could not be taken over.
#[derive(Debug, Error)]
pub enum RecoveryError {
    /// Docker could not be asked.
    #[error("cannot list the containers of this agent")]
    List(#[source] DockerError),
    /// The journal could not be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// One container of this agent.
#[derive(Clone, Debug)]
pub struct ListedContainer {
    /// What matters for decisions.
    pub seen: ContainerState,
    /// Its labels.
    pub labels: HashMap<String, String>,
    /// When it was made, seconds since 1970; 0 when the engine does not say.
    pub created_at: f64,
}

/// What was found at start, in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Kernels in service.
    pub adopted: usize,
    /// Kernels whose start or restart goes on.
    pub resumed: usize,
    /// Kernels being brought to their end.
    pub finishing: usize,
    /// Containers removed because they never ran.
    pub removed: usize,
}

/// The kernel a container's name tells: `kernel.<image>.<uuid>`, with or without Docker's slash.
pub fn kernel_of_name(name: &str) -> Option<KernelId> {
    let name = name.strip_prefix('/').unwrap_or(name);
    let rest = name.strip_prefix("kernel.")?;
    let (_, id) = rest.rsplit_once('.')?;
    // The dashed form only: anything else is not ours.
    (id.len() == 36).then(|| id.parse().ok())?
}

fn listed(summary: &ContainerSummary) -> Option<ListedContainer> {
    let kernel = summary
        .names
        .as_ref()?
        .iter()
        .find_map(|name| kernel_of_name(name))?;
    let container: ContainerId = summary.id.as_ref()?.parse().ok()?;
    Some(ListedContainer {
        seen: ContainerState {
            kernel,
            container,
            liveness: Liveness::of_listed(summary),
        },
        labels: summary.labels.clone().unwrap_or_default(),
        #[allow(clippy::cast_precision_loss, reason = "exact for all dates")]
        created_at: summary.created.unwrap_or_default() as f64,
    })
}

/// All containers of this agent, running or not.
///
/// # Errors
/// The engine cannot be asked.
pub async fn list(node: &Node) -> Result<Vec<ListedContainer>, DockerError> {
    let containers = node
        .docker
        .list_containers(true, Some(node.agent_id()))
        .await?;
    Ok(containers.iter().filter_map(listed).collect())
}

/// Takes the node over. Endings and pending starts go on in the background.
///
/// # Errors
/// The engine cannot be asked, or the journal not be read.
pub async fn recover(node: &Arc<Node>) -> Result<Recovered, RecoveryError> {
    let journal = node.journal.clone();
    let (records, damaged) = blocking(move || journal.load::<Record>()).await?;
    report_damage(&damaged);
    recall_ends(node).await;
    let listed = list(node).await.map_err(RecoveryError::List)?;
    let known = records
        .iter()
        .map(|(id, record)| (*id, known(record)))
        .collect();
    let seen: Vec<ContainerState> = listed.iter().map(|listed| listed.seen).collect();
    let plan = plan::plan(&seen, &known);

    let mut recovered = Recovered::default();
    let mut begin = Vec::new();
    let mut unwanted = Vec::new();
    for (id, decision) in &plan.kernels {
        if let Decision::RemoveUnstarted(container) = decision {
            unwanted.push(*container);
            continue;
        }
        let record = records.get(id).cloned();
        let listed = listed.iter().find(|listed| listed.seen.kernel == *id);
        if let Some(step) = enter(node, *id, record, listed, decision, &mut recovered).await {
            begin.push(step);
        }
    }
    // Their files one after the other would keep the managers waiting where there are many.
    let noting = stream::iter(&begin).for_each_concurrent(NOTES_AT_ONCE, |step| step.note(node));
    Box::pin(noting).await;
    restore_assigned_ports(node).await;
    // From here on every kernel that exists is registered: rows of others may go.
    let keep: HashSet<KernelId> = node.registry.all().iter().map(|kernel| kernel.id).collect();
    let stale = node.link.settle(keep).await;
    if stale > 0 {
        tracing::info!(kernels = stale, "removed the rows of kernels that are gone");
    }
    unwanted.extend(plan.extra);
    recovered.removed += unwanted.len();
    remove_containers(node, unwanted).await;
    commit::clear_earlier(node).await;
    for step in begin {
        step.run(node);
    }
    // Nobody waits for it: a slow disk must not keep the node from the managers.
    let sweeper = node.clone();
    node.tasks.spawn(async move {
        let sweep = sweep_scratch(&sweeper);
        sweeper.stopping.run_until_cancelled(sweep).await;
    });
    Ok(recovered)
}

fn report_damage(damaged: &[Damaged]) {
    for damaged in damaged {
        tracing::error!(path = %damaged.path.display(), err = &damaged.reason as &dyn std::error::Error,
            "a journal file cannot be read; its kernel is adopted from Docker's labels");
    }
}

/// How kernels ended in earlier lives of the agent.
async fn recall_ends(node: &Node) {
    let ends = node.ends.clone();
    match blocking(move || EndedKernel::load(&ends)).await {
        Ok((found, damaged)) => {
            for damaged in damaged {
                tracing::warn!(path = %damaged.path.display(), err = &damaged.reason as &dyn std::error::Error,
                    "cannot read how a kernel ended; a destroy of it is told already-terminated");
            }
            node.registry.remember(found);
        }
        Err(err) => {
            tracing::warn!(
                err = &err as &dyn std::error::Error,
                "cannot read how kernels ended; destroys of them are told already-terminated"
            );
        }
    }
}

fn known(record: &Record) -> JournalState {
    JournalState {
        phase: record.phase,
        ending: record.ending.clone(),
        container: record.container(),
        request: record.request.is_some(),
        served: record.result.is_some(),
    }
}

/// What is started once all kernels are entered.
enum FollowUp {
    Service(Arc<Kernel>),
    /// Of a kernel found without a journal.
    Acquaintance(Arc<Kernel>),
    Start(Arc<Kernel>),
    Restart(Arc<Kernel>),
    End(Arc<Kernel>),
}

impl FollowUp {
    /// Writes down what is known of the kernel now.
    async fn note(&self, node: &Node) {
        let (FollowUp::Service(kernel)
        | FollowUp::Acquaintance(kernel)
        | FollowUp::Start(kernel)
        | FollowUp::Restart(kernel)
        | FollowUp::End(kernel)) = self;
        node.note(kernel, |_| {}).await;
    }

    fn run(self, node: &Arc<Node>) {
        let node = node.clone();
        match self {
            FollowUp::Service(kernel) => {
                node.clone()
                    .tasks
                    .spawn(async move { resume_service(&node, &kernel).await });
            }
            FollowUp::Acquaintance(kernel) => {
                node.clone().tasks.spawn(async move {
                    resume_service(&node, &kernel).await;
                    learn_services(&node, &kernel).await;
                });
            }
            FollowUp::Start(kernel) => {
                node.clone()
                    .tasks
                    .spawn(async move { create::resume_start(&node, &kernel).await });
            }
            FollowUp::Restart(kernel) => {
                node.clone()
                    .tasks
                    .spawn(async move { restart::resume(&node, &kernel).await });
            }
            FollowUp::End(kernel) => {
                node.clone()
                    .tasks
                    .spawn(async move { super::destroy::end(&node, &kernel).await });
            }
        }
    }
}

/// Enters one kernel in the registry with what it holds. It is still to be written down.
async fn enter(
    node: &Arc<Node>,
    id: KernelId,
    record: Option<Record>,
    listed: Option<&ListedContainer>,
    decision: &Decision,
    recovered: &mut Recovered,
) -> Option<FollowUp> {
    let container = match decision {
        Decision::Adopt(container)
        | Decision::ResumeStart(container)
        | Decision::AdoptFromLabels(container)
        | Decision::FinishFromLabels(container, _)
        | Decision::RemoveUnstarted(container) => Some(*container),
        Decision::Finish(container, _) | Decision::Recreate(container) => *container,
    };
    if let Decision::RemoveUnstarted(container) = decision {
        remove_container(node, *container).await;
        recovered.removed += 1;
        return None;
    }
    let mut record = match (record, container.zip(listed)) {
        (Some(record), _) => record,
        (None, Some((container, listed))) => {
            match Box::pin(rebuild::record(node, id, container, listed)).await {
                Ok(record) => record,
                Err(err) => {
                    let mut reported = node
                        .left_alone
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    if reported.insert(container) {
                        tracing::error!(kernel_id = %id, container_id = %container,
                            err = &err as &dyn std::error::Error,
                            "a container of this agent cannot be adopted and is left alone");
                    }
                    return None;
                }
            }
        }
        (None, None) => return None,
    };
    match container {
        Some(container) => record.container_id = Some(container.to_string()),
        // One that the engine is just making is found by its name.
        None if matches!(decision, Decision::Recreate(_)) => record.container_id = None,
        None => {}
    }
    let (lifecycle, begin): (_, fn(Arc<Kernel>) -> FollowUp) = match decision {
        Decision::Adopt(_) => {
            recovered.adopted += 1;
            (Lifecycle::found_running(), FollowUp::Service)
        }
        Decision::AdoptFromLabels(_) => {
            recovered.adopted += 1;
            (Lifecycle::found_running(), FollowUp::Acquaintance)
        }
        Decision::ResumeStart(_) => {
            recovered.resumed += 1;
            (Lifecycle::found_starting(), FollowUp::Start)
        }
        Decision::Recreate(_) => {
            recovered.resumed += 1;
            (Lifecycle::found_restarting(), FollowUp::Restart)
        }
        Decision::Finish(_, ending) | Decision::FinishFromLabels(_, ending) => {
            recovered.finishing += 1;
            (Lifecycle::found_ending(ending.clone()), FollowUp::End)
        }
        Decision::RemoveUnstarted(_) => return None,
    };
    if let Decision::FinishFromLabels(..) = decision {
        // The agent that started its job may have told the end, and a word of ours would count in its place.
        record.batch_running = false;
    }
    if !matches!(decision, Decision::Recreate(_)) {
        // It was not to be made anew yet, or has been.
        record.ports_ahead.clear();
    }
    if let Decision::AdoptFromLabels(_) = decision {
        // A manager that believes it under creation is told of its start again, and asks for what it has.
        record.result = Some(JsonText::from(&create::creation_info(node, &record)));
    }
    // A kernel that entered meanwhile on another way holds its own already.
    let kernel = node.registry.adopt(lifecycle, record)?;
    kernel.with_record(|record| restore_holdings(node, record));
    if !matches!(
        decision,
        Decision::Finish(..) | Decision::FinishFromLabels(..)
    ) {
        // Nothing waits for it: only the sweep of a later start reads it.
        node.tasks.spawn(claim_scratch(node.clone(), id));
    }
    tracing::info!(kernel_id = %id, container_id = container.map(tracing::field::display),
        decision = ?decision, "found a kernel");
    Some(begin(kernel))
}

/// Marks the scratch of a kernel that was found, if nobody has: the agent of an earlier version left no
/// mark.
async fn claim_scratch(node: Arc<Node>, id: KernelId) {
    if let Err(err) = node.scratch.claim(uuid::Uuid::from_bytes(id.0)).await {
        tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error,
            "cannot mark a scratch directory as this agent's; if it is ever left over, it stays");
    }
}

/// Devices and ports the kernel holds, exactly as recorded. What is taken twice is reported: both
/// kernels exist, and neither is killed for it.
fn restore_holdings(node: &Node, record: &Record) {
    if let Some(allocation) = &record.allocation {
        let pinned = record.memory_pinned.unwrap_or(true);
        match node.ledger.restore(record.id(), allocation, pinned) {
            Ok(restored) if restored != Restored::default() => {
                tracing::warn!(kernel_id = %record.id(), gone = ?restored.missing, overused = ?restored.overused,
                    "a kernel holds devices that are not in service now, or that others hold too");
            }
            Ok(_) => {}
            Err(err) => {
                tracing::error!(kernel_id = %record.id(), err = &err as &dyn std::error::Error,
                    "cannot restore the devices of a kernel");
            }
        }
    }
    for port in record.host_ports() {
        match node.ports.claim(record.id(), port) {
            Ok(()) => {}
            // What an image opens on the host's network it opens where it is used to.
            Err(PortError::OutsideRange { .. }) if record.published_by == PublishedBy::Host => {}
            Err(err) => {
                tracing::warn!(kernel_id = %record.id(), port, err = &err as &dyn std::error::Error,
                "cannot restore a host port of a kernel");
            }
        }
    }
}

async fn restore_assigned_ports(node: &Node) {
    let journal = node.journal.clone();
    for port in blocking(move || journal.load_assigned_ports()).await {
        if let Err(err) = node.ports.claim_assigned(port) {
            tracing::debug!(
                port,
                err = &err as &dyn std::error::Error,
                "an assigned port is in use by a kernel"
            );
        }
    }
}

/// Rows, runner and batch job of a kernel in service.
async fn resume_service(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    if kernel.with_record(|record| record.pausing) {
        commit::go_on(node, kernel);
    }
    let (mut connected, mut pause) = (false, RESUME_PAUSES.0);
    while kernel.is_running() {
        let renewed = rows::refresh(node, kernel).await;
        if let Err(err) = &renewed {
            tracing::warn!(kernel_id = %kernel.id, err = err as &dyn std::error::Error,
                "cannot renew the ports of a kernel yet; trying again");
        }
        if !connected {
            match create::connect_runner(node, kernel).await {
                Ok(()) => {
                    connected = true;
                    if kernel.with_record(|record| record.batch_running) {
                        batch_job::resume(node, kernel);
                    }
                    create::start_models(node, kernel);
                }
                Err(err) => {
                    tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                        "cannot connect to the runner of a kernel yet; trying again");
                }
            }
        }
        if connected && renewed.is_ok() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = node.stopping.cancelled() => return,
        }
        pause = (pause * 2).min(RESUME_PAUSES.1);
    }
}

/// Asks the runner for what only it knows of the services, as at the start of a kernel.
async fn learn_services(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    let mut pause = RESUME_PAUSES.0;
    while let Some(runner) = kernel.runner().filter(|_| kernel.is_running()) {
        let asked = runner.apps(SERVICES_TOLD);
        match node.stopping.run_until_cancelled(asked).await {
            Some(Ok(apps)) => {
                node.note(kernel, |record| {
                    services::merge_apps(&mut record.services, apps.as_deref().unwrap_or_default());
                    record.result = Some(JsonText::from(&create::creation_info(node, record)));
                })
                .await;
                return;
            }
            Some(Err(err)) => {
                tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                    "the runner of an adopted kernel does not tell its services yet, which are known by their ports alone; asking again");
            }
            None => return,
        }
        let wait = tokio::time::sleep(pause);
        node.stopping.run_until_cancelled(wait).await;
        pause = (pause * 2).min(RESUME_PAUSES.1);
    }
}

/// A running container of this kernel that is not registered is adopted. `None` when there is none.
///
/// # Errors
/// The engine does not list or tell of a container, or does not remove it.
pub async fn adopt_stray(
    node: &Arc<Node>,
    id: KernelId,
) -> Result<Option<Arc<Kernel>>, DockerError> {
    for listed in list(node).await? {
        if listed.seen.kernel == id {
            take_stray(node, &listed).await?;
        }
    }
    Ok(node.registry.get(id))
}

/// Deals with a container that is not registered: adopts, finishes or removes it.
///
/// # Errors
/// The engine does not tell of the container, or does not remove it.
pub async fn take_stray(node: &Arc<Node>, listed: &ListedContainer) -> Result<(), DockerError> {
    // The list is a moment old, and the kernel may have ended since.
    let container = listed.seen.container.to_string();
    let liveness = match Box::pin(node.docker.inspect(&container)).await {
        Ok(found) => Liveness::of(&found),
        Err(err) if err.is_not_found() => return Ok(()),
        Err(err) => return Err(err),
    };
    if liveness == Liveness::Dead && node.config.debug.skip_container_deletion {
        return Ok(());
    }
    let seen = ContainerState {
        liveness,
        ..listed.seen
    };
    let plan = plan::plan(&[seen], &BTreeMap::new());
    let mut recovered = Recovered::default();
    for (id, decision) in &plan.kernels {
        if let Some(begin) = enter(node, *id, None, Some(listed), decision, &mut recovered).await {
            begin.note(node).await;
            begin.run(node);
        }
    }
    Ok(())
}

/// Removes containers, a few at a time. An engine that takes long goes on while the node serves.
async fn remove_containers(node: &Arc<Node>, containers: Vec<ContainerId>) {
    if containers.is_empty() {
        return;
    }
    let remover = node.clone();
    let removing = node.tasks.spawn(async move {
        let all = stream::iter(containers).for_each_concurrent(REMOVALS_AT_ONCE, |container| {
            let node = remover.clone();
            async move { remove_container(&node, container).await }
        });
        remover.stopping.run_until_cancelled(all).await;
    });
    if tokio::time::timeout(UNWANTED_GONE, removing).await.is_err() {
        tracing::info!(
            "the engine takes long to remove containers that belong to no kernel; going on meanwhile"
        );
    }
}

async fn remove_container(node: &Node, container: ContainerId) {
    match node.docker.remove(&container.to_string(), true).await {
        Ok(()) => {
            tracing::info!(container_id = %container, "removed a container that belongs to no kernel")
        }
        Err(err) if err.is_not_found() => {}
        Err(err) => {
            tracing::warn!(container_id = %container, err = &err as &dyn std::error::Error, "cannot remove a container");
        }
    }
}

/// Deletes scratch directories that this agent has made and that belong to no kernel any more: no
/// journal, no registry entry, no container of that name whoever owns it, and old enough. Those of other
/// agents on the same scratch root stay (in the middle of a restart their kernels have no container),
/// and so do those of which nobody says whose they are. A removal under way goes on when this is dropped.
async fn sweep_scratch(node: &Node) {
    let of_containers: BTreeSet<KernelId> = match node.docker.list_containers(true, None).await {
        Ok(containers) => containers
            .iter()
            .filter_map(listed)
            .map(|listed| listed.seen.kernel)
            .collect(),
        Err(err) => {
            tracing::warn!(
                err = &err as &dyn std::error::Error,
                "cannot look for scratch directories of nobody"
            );
            return;
        }
    };
    let mut unknown = 0;
    let found = match node.scratch.list().await {
        Ok(found) => found,
        Err(err) => {
            tracing::warn!(
                err = &err as &dyn std::error::Error,
                "cannot look for scratch directories of nobody"
            );
            return;
        }
    };
    for uuid in found {
        let id = KernelId(uuid.into_bytes());
        if of_containers.contains(&id) || node.registry.get(id).is_some() {
            continue;
        }
        let root = node.scratch.paths(uuid).root;
        let modified = blocking(move || std::fs::metadata(root).and_then(|it| it.modified())).await;
        // What cannot be looked at has no directory any more, only remains beside it.
        let modified = modified.unwrap_or(SystemTime::UNIX_EPOCH);
        let age = SystemTime::now()
            .duration_since(modified)
            .unwrap_or_default();
        if age < ORPHAN_AGE {
            continue;
        }
        match node.scratch.owner(uuid).await {
            Ok(Some(owner)) if owner == node.agent_id() => {}
            Ok(Some(_)) => continue,
            Ok(None) => {
                unknown += 1;
                continue;
            }
            Err(err) => {
                tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error,
                    "cannot tell whose a scratch directory is; it stays");
                continue;
            }
        }
        // The node serves meanwhile.
        if node.registry.get(id).is_some() {
            continue;
        }
        match node.scratch.remove(uuid).await {
            Ok(_) => {
                tracing::info!(kernel_id = %id, "deleted a scratch directory that belongs to no kernel");
            }
            Err(err) => {
                tracing::warn!(kernel_id = %id, err = &err as &dyn std::error::Error, "cannot delete a scratch directory");
            }
        }
    }
    if unknown > 0 {
        tracing::warn!(
            directories = unknown,
            "left scratch directories alone that bear no agent's mark; delete them by hand if no agent has their kernels"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_tell_a_kernel() {
        let id = "44843cf7-7964-4cd9-8c60-f8e4fdc69e3a";
        let parsed: KernelId = id.parse().unwrap();
        for name in [format!("kernel.lcpy.{id}"), format!("/kernel.a.b.{id}")] {
            assert_eq!(kernel_of_name(&name), Some(parsed), "{name}");
        }
        for name in [
            id.to_owned(),
            format!("kernel{id}"),
            format!("kernel.{id}"),
            format!("web.kernel.x.{id}"),
            format!("kernel.x.{}", id.replace('-', "")),
            "kernel.x.not-a-uuid".to_owned(),
        ] {
            assert_eq!(kernel_of_name(&name), None, "{name}");
        }
    }
}
