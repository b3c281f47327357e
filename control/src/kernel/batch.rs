//! The job of a batch session: one command, watched until it ends.
//!
//! In: the command (or nothing, to watch the one that runs since before a restart), an optional time
//! limit. Out: one outcome, which the caller turns into the session event. Invariant: at the time limit
//! the command is ended, first by an interrupt and then, when it ignores that, by force (the original
//! leaves it running). Source: execution.md section 6.

use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::container_processes::KernelFiles;
use super::execution::{self, BatchSteps, Mode};
use super::runner_link::frame::Step;
use super::runner_link::runs::Ending;
use super::runner_link::{LinkError, RunnerLink};

/// The run id of batch jobs; also after a restart of the agent.
pub const RUN_ID: &str = "batch-job";

/// Environment of commands in batch mode (execution.md section 2).
const BATCH_MARK: &str = "_BACKEND_BATCH_MODE=1";

const POLL: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(500);
/// How long the command has to obey an interrupt.
const INTERRUPT_GRACE: Duration = Duration::from_secs(5);
/// How long the end may take after the command was killed.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// A batch session's job.
#[derive(Clone, Debug)]
pub struct BatchJob {
    /// The command; `None` = it runs already (the agent was restarted).
    pub code: Option<String>,
    /// Time it may take, from now.
    pub timeout: Option<Duration>,
}

/// Ends what a batch command started, by force.
pub trait CommandKiller: Send + Sync {
    /// Kills the command's processes and says how many.
    fn kill(&self) -> BoxFuture<'_, std::io::Result<usize>>;
}

/// How a batch job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchOutcome {
    /// Exit code 0.
    Succeeded,
    /// Another exit code; -1 when the runner did not say one.
    Failed {
        /// The exit code.
        exit_code: i64,
    },
    /// The time limit passed; the command was ended.
    TimedOut,
    /// The kernel went away meanwhile.
    KernelGone,
}

impl BatchOutcome {
    /// Event name, reason and exit code of the session event to publish.
    pub fn event(self) -> (&'static str, &'static str, i64) {
        match self {
            BatchOutcome::Succeeded => ("session_success", "task-finished", 0),
            BatchOutcome::Failed { exit_code } => ("session_failure", "task-failed", exit_code),
            BatchOutcome::TimedOut => ("session_failure", "task-timeout", -2),
            BatchOutcome::KernelGone => ("kernel_terminated", "self-terminated", -1),
        }
    }
}

/// Runs (or re-attaches to) the job and waits for its end. Output is discarded: the container's log has it.
/// `gone` is cancelled when the kernel is being destroyed.
pub async fn run(
    link: &RunnerLink,
    job: BatchJob,
    killer: Option<&dyn CommandKiller>,
    gone: &CancellationToken,
) -> BatchOutcome {
    let deadline = job
        .timeout
        // A limit beyond the clock's end is none.
        .and_then(|timeout| Instant::now().checked_add(timeout));
    match job.code {
        Some(code) => {
            let opts = BatchSteps {
                exec: Some(code),
                ..BatchSteps::default()
            };
            // The queue to the runner can be full for a moment; the job must not be lost for that.
            while let Err(err) = link.submit(
                RUN_ID,
                execution::submission(Mode::Batch, String::new(), opts.clone()),
            ) {
                if matches!(err, LinkError::Closed) || gone.is_cancelled() {
                    return BatchOutcome::KernelGone;
                }
                tokio::time::sleep(RETRY).await;
            }
        }
        None => link.adopt(RUN_ID),
    }
    if let Some(outcome) = watch(link, deadline, gone).await {
        return outcome;
    }
    tracing::info!(kernel_id = %link.kernel_id(), "The batch job reached its time limit and is interrupted.");
    // While it waits behind somebody else's run, an interrupt would hit that one.
    let works = link.current_run().as_deref() == Some(RUN_ID);
    if works
        && link.interrupt().is_ok()
        && watch(link, Some(Instant::now() + INTERRUPT_GRACE), gone)
            .await
            .is_some()
    {
        return BatchOutcome::TimedOut;
    }
    if let Some(killer) = killer.filter(|_| works) {
        match killer.kill().await {
            Ok(killed) => {
                tracing::info!(kernel_id = %link.kernel_id(), killed, "The batch job ignored the interrupt and was killed.");
                let _ended = watch(link, Some(Instant::now() + KILL_GRACE), gone).await;
            }
            Err(err) => {
                tracing::warn!(kernel_id = %link.kernel_id(), %err, "The batch job ignored the interrupt and could not be killed.");
            }
        }
    }
    BatchOutcome::TimedOut
}

/// Polls until the run's end; `None` when the deadline passed first.
async fn watch(
    link: &RunnerLink,
    deadline: Option<Instant>,
    gone: &CancellationToken,
) -> Option<BatchOutcome> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return None;
        }
        let poll = left.map_or(POLL, |left| left.min(POLL));
        let taken = tokio::select! {
            biased;
            () = gone.cancelled() => return Some(BatchOutcome::KernelGone),
            taken = link.collect(RUN_ID, poll) => taken,
        };
        match taken.map(|taken| taken.ending) {
            Ok(Ending::Step(Step::Run, Some(0))) => return Some(BatchOutcome::Succeeded),
            Ok(Ending::Step(Step::Run, exit_code)) => {
                return Some(BatchOutcome::Failed {
                    exit_code: exit_code.unwrap_or(-1),
                });
            }
            Ok(Ending::ExecTimeout) => return None,
            Ok(Ending::Continued | Ending::Step(..) | Ending::WaitingInput(_)) => {}
            Err(_) => return Some(BatchOutcome::KernelGone),
        }
    }
}

/// The processes a batch command started, found by the mark the runner puts into their environment.
#[derive(Clone, Debug)]
pub struct ContainerCommands {
    /// Any process of the container as the host numbers it (its init).
    pub init_pid: i32,
    /// Where the kernel's files are.
    pub files: KernelFiles,
}

impl CommandKiller for ContainerCommands {
    fn kill(&self) -> BoxFuture<'_, std::io::Result<usize>> {
        Box::pin(async move {
            let commands = self.clone();
            let work = tokio::task::spawn_blocking(move || {
                let container =
                    commands
                        .files
                        .container_of(commands.init_pid)
                        .ok_or_else(|| {
                            std::io::Error::new(
                                std::io::ErrorKind::NotFound,
                                "the container's processes are gone",
                            )
                        })?;
                commands.files.kill_with_environment(&container, BATCH_MARK)
            });
            work.await.map_err(std::io::Error::other)?
        })
    }
}
