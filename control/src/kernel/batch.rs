//! The job of a batch session: one command, watched until it ends.
//!
//! In: the command (or the run of one that was sent before a restart), when its time is up. Out:
//! one outcome, which the caller turns into the session event. Invariant: at the time limit
//! the command is ended, first by an interrupt and then, when it ignores that, by force (the original
//! leaves it running).

use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::container_processes::{ContainerCgroup, KernelFiles};
use super::execution::{self, BatchSteps, Mode};
use super::lifecycle::Reason;
use super::runner_link::frame::Step;
use super::runner_link::runs::Ending;
use super::runner_link::{LinkError, RunnerLink};

/// The run id of batch jobs; also after a restart of the agent.
pub const RUN_ID: &str = "batch-job";

/// Environment of commands in batch mode.
const BATCH_MARK: &str = "_BACKEND_BATCH_MODE=1";

const POLL: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_millis(500);
/// How often to look for signs of a job.
const SIGNS_POLL: Duration = Duration::from_millis(50);
/// How long a job that may have been sent has to show itself: the runner sends what it holds as
/// soon as somebody connects.
const SIGNS: Duration = Duration::from_secs(2);
/// How long the command has to obey an interrupt.
const INTERRUPT_GRACE: Duration = Duration::from_secs(5);
/// How long the end may take after the command was killed.
const KILL_GRACE: Duration = Duration::from_secs(5);

/// Ends what a batch command started, by force.
pub trait CommandKiller: Send + Sync {
    /// Whether a process of the command's lives.
    fn is_alive(&self) -> BoxFuture<'_, std::io::Result<bool>>;

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
    /// Reason and exit code for the event to publish.
    pub fn told(self) -> (Reason, i64) {
        match self {
            BatchOutcome::Succeeded => (Reason::TASK_FINISHED, 0),
            BatchOutcome::Failed { exit_code } => (Reason::TASK_FAILED, exit_code),
            BatchOutcome::TimedOut => (Reason::TASK_TIMEOUT, -2),
            BatchOutcome::KernelGone => (Reason::SELF_TERMINATED, -1),
        }
    }
}

/// Gives a command that was not sent to the link. It may wait there for the end of another run, and is
/// held until [`send`].
///
/// # Errors
/// The outcome of a job that is not there to be sent: the kernel has gone away, or the time is up.
pub async fn submit(
    link: &RunnerLink,
    code: String,
    deadline: Option<Instant>,
    gone: &CancellationToken,
) -> Result<(), BatchOutcome> {
    let opts = BatchSteps {
        exec: Some(code),
        ..BatchSteps::default()
    };
    loop {
        let now = Instant::now();
        if deadline.is_some_and(|deadline| deadline <= now) {
            return Err(BatchOutcome::TimedOut);
        }
        let request = execution::submission(Mode::Batch, String::new(), opts.clone());
        match link.submit_held(RUN_ID, request) {
            Ok(()) => return Ok(()),
            Err(LinkError::Closed) => return Err(BatchOutcome::KernelGone),
            // The queue to the runner can be full for a moment; the job must not be lost for that.
            Err(_) => {}
        }
        let again = now + RETRY;
        let wait = tokio::time::sleep_until(deadline.unwrap_or(again).min(again));
        if gone.run_until_cancelled(wait).await.is_none() {
            return Err(BatchOutcome::KernelGone);
        }
    }
}

/// Takes over the job that was sent before this process started.
pub fn adopt(link: &RunnerLink) {
    link.adopt(RUN_ID);
}

/// Waits for the turn of a command that was submitted: no other run is at work.
pub async fn turn(link: &RunnerLink) {
    link.turn_of(RUN_ID).await;
}

/// Sends the command in its turn.
pub fn send(link: &RunnerLink) {
    // A link that is closed has no runner any more, which the watch finds out.
    let _closed = link.release(RUN_ID);
}

/// Gives up a command that was submitted and not sent, if there is one.
pub fn withdraw(link: &RunnerLink) {
    link.withdraw(RUN_ID);
}

/// Waits until the command has left for the runner.
pub async fn sent(link: &RunnerLink) {
    link.turn_of(RUN_ID).await;
    link.flushed().await;
}

/// Whether a job that may have been sent by an earlier life was: its processes live, or the runner
/// tells of a run this process has not started.
pub async fn shows(link: &RunnerLink, killer: Option<&dyn CommandKiller>) -> bool {
    let until = Instant::now() + SIGNS;
    loop {
        if link.tells_of_unknown_run() {
            return true;
        }
        if let Some(killer) = killer
            && killer.is_alive().await.unwrap_or(false)
        {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(SIGNS_POLL).await;
    }
}

/// Waits for the end of a job that was submitted or adopted; at `deadline` it is ended. Output is
/// discarded: the container's log has it. `gone` is cancelled when the kernel is being destroyed.
pub async fn attend(
    link: &RunnerLink,
    deadline: Option<Instant>,
    killer: Option<&dyn CommandKiller>,
    gone: &CancellationToken,
) -> BatchOutcome {
    if let Some(outcome) = watch(link, deadline, gone).await {
        return outcome;
    }
    tracing::info!(kernel_id = %link.kernel_id(), "the batch job reached its time limit and is interrupted");
    // While it waits behind somebody else's run, an interrupt would hit that one; before it is sent, nothing.
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
                tracing::info!(kernel_id = %link.kernel_id(), killed, "the batch job ignored the interrupt and was killed");
                let _ended = watch(link, Some(Instant::now() + KILL_GRACE), gone).await;
            }
            Err(err) => {
                tracing::warn!(kernel_id = %link.kernel_id(), %err, "the batch job ignored the interrupt and could not be killed");
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

impl ContainerCommands {
    async fn with_container<T: Send + 'static>(
        &self,
        work: impl FnOnce(&KernelFiles, &ContainerCgroup) -> std::io::Result<T> + Send + 'static,
    ) -> std::io::Result<T> {
        let commands = self.clone();
        let work = tokio::task::spawn_blocking(move || {
            let container = commands
                .files
                .container_of(commands.init_pid)
                .ok_or_else(|| {
                    std::io::Error::new(
                        std::io::ErrorKind::NotFound,
                        "the container's processes are gone",
                    )
                })?;
            work(&commands.files, &container)
        });
        work.await.map_err(std::io::Error::other)?
    }
}

impl CommandKiller for ContainerCommands {
    fn is_alive(&self) -> BoxFuture<'_, std::io::Result<bool>> {
        Box::pin(
            self.with_container(
                |files, container| Ok(files.has_environment(container, BATCH_MARK)),
            ),
        )
    }

    fn kill(&self) -> BoxFuture<'_, std::io::Result<usize>> {
        Box::pin(
            self.with_container(|files, container| {
                files.kill_with_environment(container, BATCH_MARK)
            }),
        )
    }
}

#[cfg(test)]
mod tests {
    use shared::ids::KernelId;

    use super::super::runner_link::runs::{OWED_AT_MOST, RunIds};
    use super::super::runner_link::{LinkOptions, Owed, RunnerAddress};
    use super::*;

    /// A link to a runner that takes nothing: nobody listens there.
    fn open(resumed: bool, owed: Owed) -> RunnerLink {
        let address = RunnerAddress {
            ip: std::net::Ipv4Addr::LOCALHOST.into(),
            repl_in: 1,
            repl_out: 1,
        };
        let options = LinkOptions {
            resumed,
            owed,
            ..LinkOptions::default()
        };
        RunnerLink::open(KernelId([1; 16]), address, options)
    }

    #[tokio::test]
    async fn a_job_whose_time_is_up_before_it_is_sent_is_not_interrupted() {
        let gone = CancellationToken::new();
        let link = open(false, Owed::default());
        let now = Some(Instant::now());
        let submitted = submit(&link, "true".to_owned(), now, &gone).await;
        assert_eq!(submitted, Err(BatchOutcome::TimedOut));
        assert_eq!(link.owed().borrow().runs, 0);
        // Its turn has come, and that is not noted yet.
        let submitted = submit(&link, "true".to_owned(), None, &gone).await;
        assert_eq!(submitted, Ok(()));
        turn(&link).await;
        let outcome = attend(&link, now, None, &gone).await;
        assert_eq!(outcome, BatchOutcome::TimedOut);
        assert!(link.is_flushed());
        link.leave().await;
    }

    #[tokio::test]
    async fn a_job_that_finds_no_room_waits_no_longer_than_its_time() {
        let gone = CancellationToken::new();
        let link = open(false, Owed::default());
        for number in 0..=OWED_AT_MOST {
            let request = execution::submission(Mode::Query, String::new(), BatchSteps::default());
            let submitted = link.submit(&number.to_string(), request);
            assert_eq!(submitted.is_ok(), number < OWED_AT_MOST);
        }
        let soon = Instant::now() + Duration::from_millis(20);
        let submitted = submit(&link, "true".to_owned(), Some(soon), &gone).await;
        assert_eq!(submitted, Err(BatchOutcome::TimedOut));
        gone.cancel();
        let submitted = submit(&link, "true".to_owned(), None, &gone).await;
        assert_eq!(submitted, Err(BatchOutcome::KernelGone));
        link.leave().await;
    }

    #[tokio::test]
    async fn a_job_that_was_noted_and_not_sent_is_sent() {
        let gone = CancellationToken::new();
        let before = open(false, Owed::default());
        let submitted = submit(&before, "true".to_owned(), None, &gone).await;
        assert_eq!(submitted, Ok(()));
        // Its turn has come, and nothing is sent before that is noted.
        turn(&before).await;
        let noted = before.owed().borrow().clone();
        assert_eq!(
            (noted.ids.current, noted.ids.waiting),
            (None, vec![RUN_ID.to_owned()])
        );
        assert!(before.is_flushed());
        send(&before);
        let noted = before.owed().borrow().clone();
        assert_eq!(noted.ids.current.as_deref(), Some(RUN_ID));
        assert!(noted.ids.request.is_some() && !before.is_flushed());
        before.leave().await;

        let link = open(true, noted);
        let submitted = submit(&link, "true".to_owned(), None, &gone).await;
        assert_eq!(submitted, Ok(()));
        // Its turn comes when the runner has answered whether it is at work.
        let RunIds { waiting, .. } = link.owed().borrow().ids.clone();
        assert_eq!(waiting, [RUN_ID]);
        link.leave().await;
    }
}
