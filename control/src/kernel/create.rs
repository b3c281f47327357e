//! The creation of a kernel, from the request to a runner that answers.
//!
//! In: a request of the manager (or a restart). Out: a running kernel and its result, or an error
//! and nothing left behind. Invariants: what is checked before anything is taken is in `prepare`;
//! whatever a failed creation had taken is given back by the ending of the kernel, the same way as
//! after a destroy; the number of creations at work is bounded for the node, not per call. Who waits
//! for others (an image's registry, what a user has the runner do first) is not at work.

mod error;
mod follow;
mod host_ports;
mod launch;
mod prepare;
mod result;
mod serve;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use shared::ids::KernelId;
use tokio::sync::SemaphorePermit;
use tokio_util::sync::CancellationToken;

pub use error::CreateError;
pub use follow::start_models;
pub use prepare::{NetworkChoice, Prepared, public_services, takes_pool_ports, with_host_ports};
pub use result::creation_info;
pub use serve::connect_runner;

use self::host_ports::KeptPorts;
use super::batch_job;
use super::destroy::STOP_TURN;
use super::journal::{Phase, now_unix};
use super::lifecycle::{Action, Input, Refusal, Stage, State};
use super::node::Node;
use super::record::{PublishedBy, Record};
use super::registry::{Admission, Kernel};
use super::request::{ClusterInfo, KernelCreationConfig};
use super::runner_link::runs::RunIds;
use crate::docker::LogOptions;
use crate::docker::{ImageRecord, RegistryAuth};
use crate::events::Event;
use crate::image::{AutoPull, ImageRequest};
use crate::json_text::JsonText;
use crate::kernel::request::{self, ImageConfig};
use crate::resource::SlotRequest;

/// How much of a console is shown with a failed start.
const TAIL_BYTES: usize = 2048;
/// How long the console of a container that has just died may take to be read.
const TAIL_LIMIT: Duration = Duration::from_secs(5);
/// How long it is tried to go on with a restart that was cut short with its agent: to remove the old
/// container and to make the new one.
pub(super) const RESTART_PATIENCE: Duration = Duration::from_secs(300);
/// Pauses between the tries: doubled up to the second.
const RESTART_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// One kernel to be created.
#[derive(Clone, Debug)]
pub struct Order {
    /// The kernel.
    pub id: KernelId,
    /// What was asked for.
    pub config: Arc<KernelCreationConfig>,
    /// Its cluster.
    pub cluster: Arc<ClusterInfo>,
}

/// Creates kernels at the same time; each one's outcome, in order.
pub async fn create_kernels(
    node: &Arc<Node>,
    orders: Vec<Order>,
) -> Vec<Result<serde_json::Value, CreateError>> {
    let tasks: Vec<_> = orders
        .into_iter()
        .map(|order| {
            let node = node.clone();
            node.clone()
                .tasks
                .spawn(async move { create_one(&node, order).await })
        })
        .collect();
    let mut outcomes = Vec::with_capacity(tasks.len());
    for task in tasks {
        outcomes.push(match task.await {
            Ok(outcome) => outcome,
            Err(err) => Err(CreateError::Request(format!(
                "the creation was cut short: {err}"
            ))),
        });
    }
    outcomes
}

async fn create_one(node: &Arc<Node>, order: Order) -> Result<serde_json::Value, CreateError> {
    let id = order.id;
    let kernel = match node.registry.admit(new_record(&order)) {
        Admission::Accepted(kernel) => kernel,
        Admission::Exists(kernel) => return stored_result(&kernel, &order),
        Admission::Refused(Refusal::Ending) => return Err(CreateError::Ending(id)),
        Admission::Refused(_) => return Err(CreateError::InProgress(id)),
    };
    tracing::info!(kernel_id = %id, image = order.config.image.canonical, "creating a kernel");
    let abort = kernel.abort_token();
    let built = match CreatePermit::take(node, &kernel, &abort).await {
        Ok(mut permit) => {
            guarded(Box::pin(build(node, &kernel, &order, &abort, &mut permit))).await
        }
        Err(err) => Err(err),
    };
    conclude(node, &kernel, built).await
}

/// The right to be at work on a creation: to use the node's disks and its engine.
#[derive(Debug)]
struct CreatePermit<'n> {
    node: &'n Node,
    held: Option<SemaphorePermit<'n>>,
}

impl<'n> CreatePermit<'n> {
    /// Waits until one more creation may be at work on this node.
    async fn take(
        node: &'n Node,
        kernel: &Kernel,
        abort: &CancellationToken,
    ) -> Result<CreatePermit<'n>, CreateError> {
        let mut permit = CreatePermit { node, held: None };
        abortable(kernel, abort, permit.resume()).await??;
        Ok(permit)
    }

    /// Lets another creation be at work while this one waits.
    fn rest(&mut self) {
        self.held = None;
    }

    /// Waits for a permit again after a rest. Keeps none when it is dropped.
    async fn resume(&mut self) -> Result<(), CreateError> {
        if self.held.is_none() {
            let held = self.node.creations.acquire().await;
            self.held = Some(held.map_err(|_| CreateError::Stopping)?);
        }
        Ok(())
    }
}

/// Enters service, or undoes everything and waits until that is done.
async fn conclude(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    built: Result<(), CreateError>,
) -> Result<serde_json::Value, CreateError> {
    let failed = match built {
        Ok(()) => {
            let result = kernel.with_record(|record| creation_info(node, record));
            let kept = JsonText::from(&result);
            node.note(kernel, |record| record.result = Some(kept)).await;
            let actions = kernel.step(Input::Ready);
            let entered = actions.contains(&Action::AnnounceStarted);
            // Announced before the disk is waited for: its end may come meanwhile, and is
            // announced then.
            node.perform(kernel, &actions);
            if entered {
                node.note(kernel, |_| {}).await;
                start_models(node, kernel);
                return Ok(result);
            }
            aborted(kernel)
        }
        Err(err) if goes_on_later(node, kernel) => {
            tracing::info!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                "the restart of a kernel is cut short, as the agent stops; its next start goes on with it");
            return Err(CreateError::Stopping);
        }
        Err(err) => {
            tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error, "a creation failed");
            let actions = kernel.step(Input::CreationFailed {
                exit_code: err.exit_code(),
            });
            node.perform(kernel, &actions);
            err
        }
    };
    // The answer comes when nothing is left, so that a retry finds a clean node. A broken engine
    // keeps the ending busy; the caller is not kept for ever.
    let limit = node.config.node.engine.stop_grace + STOP_TURN + Duration::from_secs(60);
    let _ = tokio::time::timeout(limit, kernel.wait_ended()).await;
    Err(failed)
}

/// Whether a kernel that could not be made again is left to the next start: it has files to lose, and
/// much fails only because the agent stops.
fn goes_on_later(node: &Node, kernel: &Kernel) -> bool {
    let again = match kernel.state() {
        State::Creating {
            restart,
            abort: None,
            ..
        } => restart || kernel.with_record(|record| record.result.is_some()),
        _ => false,
    };
    again && node.stopping.is_cancelled()
}

/// A panic must not leave a kernel that is created for ever and holds what it has taken.
async fn guarded<T>(work: impl Future<Output = Result<T, CreateError>>) -> Result<T, CreateError> {
    let outcome = AssertUnwindSafe(work).catch_unwind().await;
    outcome.unwrap_or(Err(CreateError::Defect))
}

fn aborted(kernel: &Kernel) -> CreateError {
    match kernel.ending() {
        Some(ending) => CreateError::Aborted {
            kernel: kernel.id,
            reason: ending.reason,
        },
        None => CreateError::Stopping,
    }
}

fn new_record(order: &Order) -> Record {
    let config = &order.config;
    Record {
        kernel_id: uuid::Uuid::from_bytes(order.id.0),
        session_id: config.session_id,
        phase: Phase::Files,
        ending: None,
        created_at: now_unix(),
        request: Some((**config).clone()),
        cluster: Some((*order.cluster).clone()),
        image: config.image.canonical.clone(),
        session_type: config.session_type,
        hostname: config.hostname().to_owned(),
        // Nothing to look for yet.
        container_name: String::new(),
        container_id: None,
        slots: serde_json::Map::new(),
        allocation: None,
        services: Vec::new(),
        ports_ahead: Vec::new(),
        published_by: PublishedBy::Rows,
        repl_ports: None,
        block_service_ports: config.internal_data.block_service_ports,
        network: order.cluster.network_mode().map(|mode| {
            (
                mode.to_owned(),
                order.cluster.network_name().unwrap_or_default().to_owned(),
            )
        }),
        distro: None,
        mounts: Vec::new(),
        models: Vec::new(),
        models_pending: false,
        runner_version: None,
        result: None,
        environ: None,
        batch_running: false,
        batch_job: None,
        condemned: false,
        pausing: false,
        runs_owed: 0,
        run_ids: RunIds::default(),
        service_owed: false,
        memory_pinned: None,
    }
}

/// A retry of a creation that is done.
fn stored_result(kernel: &Kernel, order: &Order) -> Result<serde_json::Value, CreateError> {
    let (session, image, result) = kernel.with_record(|record| {
        (
            record.session_id,
            record.image.clone(),
            record.result.clone(),
        )
    });
    if session != order.config.session_id || image != order.config.image.canonical {
        return Err(CreateError::Different {
            kernel: order.id,
            existing: format!("session {session}, image {image}"),
        });
    }
    tracing::debug!(kernel_id = %kernel.id, "a creation that is done was asked for again");
    Ok(result.unwrap_or_default().tree())
}

/// Waits for `work` unless the creation has to give up first. Only for work that leaves nothing
/// behind when it is dropped.
async fn abortable<T>(
    kernel: &Kernel,
    abort: &CancellationToken,
    work: impl Future<Output = T>,
) -> Result<T, CreateError> {
    tokio::select! {
        biased;
        () = abort.cancelled() => Err(aborted(kernel)),
        done = work => Ok(done),
    }
}

/// Tells the lifecycle how far the creation is; fails when it has to give up.
fn enter(kernel: &Kernel, stage: Stage) -> Result<(), CreateError> {
    match kernel.step(Input::Entered(stage)).as_slice() {
        [Action::Proceed] => Ok(()),
        _ => Err(aborted(kernel)),
    }
}

/// Everything from the accepted request to an answering runner.
async fn build(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    abort: &CancellationToken,
    permit: &mut CreatePermit<'_>,
) -> Result<(), CreateError> {
    let config = &order.config;
    node.events.emit(Event::KernelPreparing {
        kernel: kernel.id,
        session: kernel.session,
    });
    node.progress(kernel.id, "checking the request");
    let plan = abortable(kernel, abort, Box::pin(find(node, kernel, order, permit))).await??;
    let prepared = &plan.prepared;
    node.events.emit(Event::KernelCreating {
        kernel: kernel.id,
        session: kernel.session,
    });
    enter(kernel, Stage::Reserved)?;
    let request = SlotRequest {
        slots: prepared.slots.clone(),
        allow_fragmentation: config.allow_fragmentation(),
    };
    let reserved = match node.ledger.reserve(kernel.id, &request) {
        Ok(reserved) => reserved,
        Err(err) => {
            node.events.emit(Event::DoAgentResourceCheck {
                agent: node.agent_id().to_owned(),
            });
            return Err(err.into());
        }
    };
    let reserved_devices = reserved.allocation;
    let allocation = node
        .plugin_host
        .prefer(node, kernel, reserved_devices)
        .await;
    kernel.update_record(|record| {
        record.allocation = Some(allocation);
        record.slots = reserved
            .slots
            .to_text()
            .iter()
            .map(|(name, amount)| (name.to_owned(), amount.into()))
            .collect();
        record.distro = Some(plan.distro.clone());
        record.published_by = prepared.published_by;
        record.runner_version = Some(prepared.runner.version().to_owned());
    });
    launch::files_and_container(node, kernel, order, &plan, None, abort, permit).await
}

/// What a kernel is made of. Nothing is taken for it yet.
#[derive(Debug)]
struct CreatePlan {
    prepared: Prepared,
    /// The C library of its image.
    distro: String,
}

/// Finds out everything that can be wrong with an order, and pulls the image if it has to be. Leaves
/// nothing behind when it is dropped.
async fn find(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    permit: &mut CreatePermit<'_>,
) -> Result<CreatePlan, CreateError> {
    let config = &order.config;
    let mut prepared = prepare::check(node, config, &order.cluster).await?;
    let image = ready_image(node, kernel, config, permit).await?;
    prepare::check_models(node, &mut prepared, config, &image).await?;
    node.progress(kernel.id, "looking at the image");
    let distro = prepare::base_distro(node, config).await?;
    Ok(CreatePlan { prepared, distro })
}

/// Checks that the image is there, and pulls it if the request says so.
async fn ready_image(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    config: &KernelCreationConfig,
    permit: &mut CreatePermit<'_>,
) -> Result<ImageRecord, CreateError> {
    let canonical = &config.image.canonical;
    let pulling = async || {
        // A pull takes as long as the registry does, and the engine bounds what it fetches at a time.
        permit.rest();
        node.progress(kernel.id, format!("pulling {canonical}"));
        node.events.emit(Event::KernelPulling {
            kernel: kernel.id,
            session: kernel.session,
            image: canonical.clone(),
        });
    };
    let image = node
        .images
        .ensure(&wanted_image(config), pulling, |_| ())
        .await?;
    permit.resume().await?;
    Ok(image)
}

/// What has to be there of a kernel's image. When it is pulled is said beside the image, whatever the
/// image's own configuration says (which is for `check_and_pull`).
fn wanted_image(config: &KernelCreationConfig) -> ImageRequest {
    ImageRequest {
        auto_pull: auto_pull(config.auto_pull),
        ..image_request(&config.image)
    }
}

fn auto_pull(wanted: request::AutoPull) -> AutoPull {
    match wanted {
        request::AutoPull::Digest => AutoPull::Digest,
        request::AutoPull::Tag => AutoPull::Tag,
        request::AutoPull::None => AutoPull::None,
    }
}

/// What has to be there of an image.
pub fn image_request(image: &ImageConfig) -> ImageRequest {
    let password = image.registry.password.as_ref();
    let auth = RegistryAuth::from_parts(
        image.registry.username.as_deref(),
        password.map(|password| password.reveal()),
    );
    ImageRequest {
        canonical: image.docker_name().to_owned(),
        digest: image.digest.clone(),
        architecture: image.architecture.clone(),
        is_local: image.is_local,
        auth,
        auto_pull: auto_pull(image.auto_pull),
    }
}

/// A kernel found at start whose runner had not been heard: goes on where the creation was.
pub async fn resume_start(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    let abort = kernel.abort_token();
    let built = guarded(Box::pin(serve::resume(node, kernel, &abort))).await;
    match conclude(node, kernel, built).await {
        // It may have been a restart.
        Ok(_) => batch_job::expect_again(node, kernel),
        Err(err) => {
            tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                "a kernel that was being started could not be taken over");
        }
    }
}

/// A kernel that can be made anew.
#[derive(Debug)]
pub struct Ready<'n> {
    plan: CreatePlan,
    ports: KeptPorts<'n>,
    permit: CreatePermit<'n>,
}

/// Looks whether a kernel in service can be made anew, once one more creation may be at work on this
/// node. Dropped when it is no longer in service.
///
/// # Errors
/// It can't, and goes on.
pub async fn look_ahead<'n>(
    node: &'n Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
) -> Result<Ready<'n>, CreateError> {
    let mut permit = CreatePermit { node, held: None };
    permit.resume().await?;
    node.progress(kernel.id, "checking whether it can be made anew");
    let plan = guarded(Box::pin(find(node, kernel, order, &mut permit))).await?;
    let ports = KeptPorts::take(node, kernel, &plan.prepared)?;
    Ok(Ready {
        plan,
        ports,
        permit,
    })
}

/// Second half of a restart: a new container with the same devices, ports and files, of what was found
/// and taken before the old one went.
///
/// # Errors
/// [`CreateError`]: the step that failed.
pub async fn recreate(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    ready: Ready<'_>,
) -> Result<serde_json::Value, CreateError> {
    let abort = kernel.abort_token();
    let Ready {
        plan,
        ports,
        mut permit,
    } = ready;
    let rebuilt = rebuild(node, kernel, order, &plan, ports, &abort, &mut permit);
    let built = guarded(Box::pin(rebuilt)).await;
    drop(permit);
    conclude(node, kernel, built).await
}

async fn rebuild(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    plan: &CreatePlan,
    ports: KeptPorts<'_>,
    abort: &CancellationToken,
    permit: &mut CreatePermit<'_>,
) -> Result<(), CreateError> {
    kernel.update_record(|record| {
        record.distro = Some(plan.distro.clone());
        record.runner_version = Some(plan.prepared.runner.version().to_owned());
    });
    launch::files_and_container(node, kernel, order, plan, Some(ports), abort, permit).await
}

/// Second half of a restart that an earlier life of the agent has begun. What is not there yet may only
/// come up more slowly than the agent (the dataplane, mounts of folders, device plugins), so nothing that
/// fails before there is a container is final at first. `began` is when it was begun to go on.
///
/// # Errors
/// [`CreateError`]: the step that failed when there was a container or no time left, or that the agent stops.
pub async fn resume_restart(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    began: Instant,
) -> Result<serde_json::Value, CreateError> {
    let abort = kernel.abort_token();
    let mut pause = RESTART_PAUSES.0;
    let built = loop {
        let built = match CreatePermit::take(node, kernel, &abort).await {
            Ok(mut permit) => {
                let rebuilt = find_and_rebuild(node, kernel, order, &abort, &mut permit);
                guarded(Box::pin(rebuilt)).await
            }
            Err(err) => Err(err),
        };
        match &built {
            Err(err) if has_no_container(kernel) && began.elapsed() < RESTART_PATIENCE => {
                tracing::warn!(kernel_id = %kernel.id, err = err as &dyn std::error::Error,
                    "a kernel cannot be made again yet; trying again");
            }
            _ => break built,
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = abort.cancelled() => {}
            () = node.stopping.cancelled() => break Err(CreateError::Stopping),
        }
        pause = (pause * 2).min(RESTART_PAUSES.1);
    };
    conclude(node, kernel, built).await
}

/// Whether it is still to be made, and nothing was made of it.
fn has_no_container(kernel: &Kernel) -> bool {
    matches!(
        kernel.state(),
        State::Creating { stage, abort: None, .. } if stage < Stage::Container
    )
}

async fn find_and_rebuild(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    order: &Order,
    abort: &CancellationToken,
    permit: &mut CreatePermit<'_>,
) -> Result<(), CreateError> {
    let plan = abortable(kernel, abort, Box::pin(find(node, kernel, order, permit))).await??;
    let ports = KeptPorts::take(node, kernel, &plan.prepared)?;
    rebuild(node, kernel, order, &plan, ports, abort, permit).await
}

/// The end of a container's console, for error messages.
async fn console_tail(node: &Node, container: &str) -> String {
    let options = LogOptions {
        keep: TAIL_BYTES,
        partial: true,
        ..LogOptions::default()
    };
    match tokio::time::timeout(TAIL_LIMIT, node.docker.logs(container, options)).await {
        Ok(Ok(log)) => log.text.trim().replace('\r', ""),
        Ok(Err(err)) => format!("(cannot be read: {err})"),
        Err(_) => "(cannot be read in time)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn when_an_image_is_pulled_is_said_beside_it() {
        let wanted = |beside: serde_json::Value| {
            let mut config = serde_json::json!({
                "image": {"canonical": "a/b:c", "digest": "sha256:d", "auto_pull": "tag"},
                "kernel_id": "44843cf7-7964-4cd9-8c60-f8e4fdc69e3a",
                "session_id": "a61cd3c8-03c5-4ac1-abcd-0246dc7e82f8",
            });
            config["auto_pull"] = beside;
            let config: KernelCreationConfig = serde_json::from_value(config).unwrap();
            let request = wanted_image(&config);
            assert_eq!(request.digest, "sha256:d");
            request.auto_pull
        };
        assert_eq!(wanted("none".into()), AutoPull::None);
        assert_eq!(wanted(serde_json::Value::Null), AutoPull::Digest);
    }

    #[tokio::test]
    async fn a_panic_of_ours_fails_the_creation_and_is_not_passed_on() {
        let outcome = guarded::<()>(async { panic!("a defect") }).await;
        assert!(matches!(outcome, Err(CreateError::Defect)));
    }
}
