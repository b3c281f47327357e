//! The command of a batch session: started once, watched until it ends, announced once.
//!
//! Invariant: at most one job per kernel; the journal says that one runs before it is sent, so that
//! a restarted agent watches it again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::batch::{self, BatchJob, BatchOutcome, CommandKiller, ContainerCommands};
use super::container_processes::KernelFiles;
use super::death::{Death, Signs, full_shm};
use super::lifecycle::Reason;
use super::node::Node;
use super::registry::Kernel;
use crate::events::Event;

/// Starts the job; `false` when one runs already (a retry of the call).
pub fn start(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    code: String,
    timeout: Option<Duration>,
) -> bool {
    let Some(gone) = kernel.begin_batch() else {
        return false;
    };
    spawn(
        node,
        kernel,
        BatchJob {
            code: Some(code),
            timeout,
        },
        gone,
    );
    true
}

/// Watches the job that was running when the agent stopped.
pub fn resume(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    if let Some(gone) = kernel.begin_batch() {
        spawn(
            node,
            kernel,
            BatchJob {
                code: None,
                timeout: None,
            },
            gone,
        );
    }
}

fn spawn(node: &Arc<Node>, kernel: &Arc<Kernel>, job: BatchJob, gone: CancellationToken) {
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone().tasks.spawn(async move {
        let Some(runner) = kernel.runner() else {
            tracing::warn!(kernel_id = %kernel.id, "a batch job cannot start without the runner");
            kernel.end_batch();
            return;
        };
        node.note(&kernel, |record| record.batch_running = true)
            .await;
        let killer = init_pid(&node, &kernel)
            .await
            .map(|init_pid| ContainerCommands {
                init_pid,
                files: KernelFiles::default(),
            });
        let killer = killer.as_ref().map(|killer| killer as &dyn CommandKiller);
        let outcome = tokio::select! {
            outcome = batch::run(&runner, job, killer, &gone) => outcome,
            // The job goes on; the next start watches it.
            () = node.stopping.cancelled() => return,
        };
        let session = kernel.session;
        let (_, reason, exit_code) = outcome.event();
        let reason = Reason::from_text(reason);
        match outcome {
            BatchOutcome::Succeeded => node.events.emit(Event::SessionSuccess {
                session,
                reason,
                exit_code,
            }),
            BatchOutcome::Failed { .. } | BatchOutcome::TimedOut => {
                report_death(&node, &kernel, exit_code);
                node.events.emit(Event::SessionFailure {
                    session,
                    reason,
                    exit_code,
                });
            }
            // The kernel's own end is announced by the kernel.
            BatchOutcome::KernelGone => return,
        }
        kernel.end_batch();
        if kernel.is_running() {
            node.note(&kernel, |record| record.batch_running = false)
                .await;
        }
    });
}

/// Says in the log what memory had to do with the end of a job.
fn report_death(node: &Node, kernel: &Kernel, exit_code: i64) {
    let sample = kernel
        .container()
        .and_then(|container| node.link.sample(container));
    let signs = Signs {
        out_of_memory: kernel.out_of_memory().explains(Instant::now(), false),
        shm_full: sample.as_ref().and_then(full_shm).is_some(),
    };
    if let Some(death) = Death::of(Some(exit_code), signs) {
        tracing::warn!(kernel_id = %kernel.id, exit_code, cause = death.words(), "a batch job has died");
    }
}

async fn init_pid(node: &Node, kernel: &Kernel) -> Option<i32> {
    if !node.docker.is_local() {
        return None;
    }
    let found = node
        .docker
        .inspect(&kernel.container()?.to_string())
        .await
        .ok()?;
    i32::try_from(found.state?.pid?)
        .ok()
        .filter(|pid| *pid != 0)
}
