//! From a container that has been started to a runner that answers.
//!
//! In: a kernel and its container. Out: a kernel that serves, or why not. Invariant: where the container has ended
//! meanwhile, that is what is told, with its last words, whatever could not be done with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::PortKey;
use shared::ids::ContainerId;
use tokio_util::sync::CancellationToken;

use super::error::CreateError;
use super::follow::{follow_models, note_runs};
use super::{aborted, console_tail};
use crate::causes::chain;
use crate::docker::ExecRequest;
use crate::kernel::lifecycle::Reason;
use crate::kernel::node::Node;
use crate::kernel::record::{PublishedBy, Record};
use crate::kernel::registry::Kernel;
use crate::kernel::rows;
use crate::kernel::runner_link::{InitError, InitPolling, LinkOptions, Owed, RunnerLink};
use crate::kernel::services;
use crate::link::LinkError;

/// How much later than its processes the engine may know that a container has ended.
const NEWS: Duration = Duration::from_secs(2);

/// Why an attempt failed.
pub(super) enum Attempt {
    /// A host port turned out to be in use; others may do.
    Busy(CreateError, Vec<u16>),
    Failed(CreateError),
}

impl<E: Into<CreateError>> From<E> for Attempt {
    fn from(err: E) -> Attempt {
        Attempt::Failed(err.into())
    }
}

/// Gives the kernel's user its rights, publishes the ports, connects the runner, and waits for both.
pub(super) async fn serve(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    container: ContainerId,
    abort: &CancellationToken,
) -> Result<(), Attempt> {
    match serve_running(node, kernel, container, abort).await {
        Err(Attempt::Failed(err @ (CreateError::Died { .. } | CreateError::Aborted { .. }))) => {
            Err(err.into())
        }
        // It has ended meanwhile: what it said is worth more than what could not be done with it.
        Err(attempt) => {
            // The engine hears of an end later than whoever looks for the container's processes.
            let patience = match &attempt {
                Attempt::Failed(CreateError::Rows(_) | CreateError::Sudo(_)) => NEWS,
                _ => Duration::ZERO,
            };
            match has_ended(node, container, patience).await {
                true => Err(died(node, kernel, container).await.into()),
                false => Err(attempt),
            }
        }
        served => served,
    }
}

fn wants_sudo(record: &Record) -> bool {
    let request = record.request.as_ref();
    request.is_some_and(|request| request.internal_data.sudo_session_enabled)
}

/// Lets the kernel's user become root without a password.
async fn allow_sudo(node: &Node, container: ContainerId) -> Result<(), CreateError> {
    const SCRIPT: &str = "mkdir -p /etc/sudoers.d && \
        echo 'work ALL=(ALL:ALL) NOPASSWD:ALL' > /etc/sudoers.d/01-bai-work && \
        chmod 0440 /etc/sudoers.d/01-bai-work";
    let mut request = ExecRequest::new(["sh", "-c", SCRIPT]);
    request.user = Some("root".to_owned());
    let output = node.docker.exec(&container.to_string(), &request).await;
    let output = output.map_err(|err| CreateError::Sudo(chain(&err)))?;
    match output.exit_code {
        0 => Ok(()),
        code => {
            let words = String::from_utf8_lossy(&output.stderr);
            let words = format!("sh ended with exit code {code}: {}", words.trim());
            Err(CreateError::Sudo(words))
        }
    }
}

/// Whether the engine says so, at once or before `patience` has passed.
async fn has_ended(node: &Node, container: ContainerId, patience: Duration) -> bool {
    let began = Instant::now();
    loop {
        let ended = match node.docker.inspect(&container.to_string()).await {
            Ok(found) => found.state.and_then(|state| state.running) == Some(false),
            Err(err) => err.is_not_found(),
        };
        if ended || began.elapsed() >= patience {
            return ended;
        }
        tokio::time::sleep(NEWS / 20).await;
    }
}

async fn serve_running(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    container: ContainerId,
    abort: &CancellationToken,
) -> Result<(), Attempt> {
    if kernel.with_record(wants_sudo) {
        allow_sudo(node, container).await?;
    }
    // Who finds the container later than this comes later with what was found.
    let turn = kernel.refreshing.lock().await;
    let place = rows::locate(node, container).await?;
    node.registry.enter_sources(kernel, &place.sources);
    let record = kernel.record();
    let wanted = rows::rows_of(node, &record, &place);
    let keys: Vec<PortKey> = wanted.ports.iter().map(|row| row.key()).collect();
    let generation = node.link.publish(kernel.id, wanted).await?;
    node.progress(kernel.id, "waiting for the runner");
    let runner = open_runner(node, kernel, &place, false);
    follow_models(node, kernel, &runner);
    note_runs(node, kernel, &runner);
    let old = kernel.set_runner(Some(runner.clone()));
    drop(turn);
    if let Some(old) = old {
        old.close().await;
    }
    let served = async {
        if record.published_by == PublishedBy::Rows {
            node.link
                .await_serving(&keys, generation, node.config.node.dataplane_wait)
                .await?;
        }
        Ok::<_, LinkError>(())
    };
    let polling = InitPolling::of(&node.config.kernel_lifecycles);
    let ready = runner.wait_ready(&polling, abort);
    tokio::pin!(served, ready);
    let apps = tokio::select! {
        served = &mut served => {
            if let Err(err) = served {
                return Err(not_served(err));
            }
            ready.await
        }
        apps = &mut ready => {
            if apps.is_ok() && let Err(err) = served.await {
                return Err(not_served(err));
            }
            apps
        }
    };
    match apps {
        Ok(apps) => {
            kernel.update_record(|record| services::merge_apps(&mut record.services, &apps));
            Ok(())
        }
        Err(InitError::Died | InitError::Closed) => Err(died(node, kernel, container).await.into()),
        Err(source) => {
            let tail = console_tail(node, &container.to_string()).await;
            Err(Attempt::Failed(CreateError::NotReady {
                kernel: kernel.id,
                container: container.to_string(),
                tail,
                source,
            }))
        }
    }
}

fn not_served(err: LinkError) -> Attempt {
    match err {
        LinkError::Refused { port, .. } => Attempt::Busy(err.into(), vec![port.host_port]),
        err => Attempt::Failed(err.into()),
    }
}

/// The container has ended, or the kernel is being destroyed: which of the two, and what is known.
async fn died(node: &Node, kernel: &Kernel, container: ContainerId) -> CreateError {
    let ending = kernel.ending();
    if let Some(ending) = &ending
        && ending.reason != Reason::FAILED_TO_START
    {
        return aborted(kernel);
    }
    let tail = console_tail(node, &container.to_string()).await;
    let mut exit_code = ending.and_then(|ending| ending.exit_code);
    if exit_code.is_none()
        && let Ok(found) = node.docker.inspect(&container.to_string()).await
    {
        exit_code = crate::kernel::destroy::exit_code_of(&found);
    }
    CreateError::Died { exit_code, tail }
}

fn open_runner(
    node: &Node,
    kernel: &Kernel,
    place: &rows::ContainerLocation,
    resumed: bool,
) -> RunnerLink {
    let address = kernel.with_record(|record| record.runner_address(place.address));
    let options = LinkOptions {
        resumed,
        owed: if resumed {
            kernel.with_record(Record::under_way)
        } else {
            Owed::default()
        },
        told: Some((node.events.clone(), kernel.session)),
        ..LinkOptions::default()
    };
    RunnerLink::open(kernel.id, address, options)
}

/// Connects to the runner of a kernel found in service.
///
/// # Errors
/// Where the container is cannot be found out.
pub async fn connect_runner(node: &Arc<Node>, kernel: &Arc<Kernel>) -> Result<(), rows::RowsError> {
    let Some(container) = kernel.container() else {
        return Ok(());
    };
    // The link is there before anybody finds the container elsewhere, and has it follow.
    let turn = kernel.refreshing.lock().await;
    let place = rows::locate(node, container).await?;
    node.registry.enter_sources(kernel, &place.sources);
    let runner = open_runner(node, kernel, &place, true);
    // What the link has told at once, neither the ending nor the next agent tells again.
    let owed = runner.owed().borrow().clone();
    let noted = kernel.with_record(Record::owed);
    let left = owed.known_to(&noted);
    let fell = left != noted;
    kernel.update_record(|record| record.set_owed(left));
    follow_models(node, kernel, &runner);
    note_runs(node, kernel, &runner);
    let idle = kernel.offer_runner(container, runner);
    drop(turn);
    if fell {
        node.note(kernel, |_| {}).await;
    }
    if let Some(idle) = idle {
        // Of a kernel that ends just now the ending tells.
        idle.leave().await;
    }
    Ok(())
}

/// Goes on with a kernel found started: rows, runner, readiness.
///
/// # Errors
/// It does not come into service, or the journal names no container.
pub async fn resume(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    abort: &CancellationToken,
) -> Result<(), CreateError> {
    let Some(container) = kernel.container() else {
        return Err(CreateError::Request(
            "the journal names no container".into(),
        ));
    };
    match serve(node, kernel, container, abort).await {
        Ok(()) => Ok(()),
        Err(Attempt::Busy(err, _) | Attempt::Failed(err)) => Err(err),
    }
}
