//! The command of a batch session: started once, watched until it ends, announced once.
//!
//! Invariants: at most one job per kernel; it is in the journal before the call that starts it is
//! answered, with its command until that was sent, and with its time limit, so that a restarted
//! agent sends what was not sent, watches what was, and ends it in time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::ids::{ContainerId, KernelId, SessionId};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::batch::{self, BatchOutcome, CommandKiller, ContainerCommands};
use super::container_processes::KernelFiles;
use super::death::{Death, Evidence, full_shm};
use super::lifecycle::{Ending, Reason, State};
use super::node::Node;
use super::record::{BatchRecord, BatchStep, Record};
use super::registry::Kernel;
use super::runner_link::RunnerLink;
use crate::events::Event;

/// What is left at least of the time limit of a job that is taken over: one that ended while nobody
/// watched is told as it ended.
const TAKEN_OVER: Duration = Duration::from_secs(3);
/// How long after the restart of its kernel a job may be started again: the manager waits for the
/// restarts of all kernels of the session first, which may take as long as creations.
const STARTED_AGAIN: Duration = Duration::from_secs(600);
/// Pauses before the journal is tried again that has to say that a job is sent: doubled up to the second.
const JOURNAL_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// How long an end that is known already may take to be told when the agent stops.
const LAST_LOOK: Duration = Duration::from_secs(1);
/// How long after the call for a job the manager takes its session for a running one: it ends no
/// other.
const SESSION_RUNS: Duration = Duration::from_secs(3);
/// How long after it was told the end of a job is told again, and how often, while the kernel stays in
/// service: a manager that takes it ends the session, and one that cannot yet throws it away.
const TOLD_AGAIN: (Duration, u32) = (Duration::from_secs(60), 3);

/// Starts the job and answers when it is in the journal; `false` when one runs already (a retry of
/// the call).
pub async fn start(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    code: String,
    timeout: Option<Duration>,
) -> bool {
    let Some(gone) = kernel.begin_batch() else {
        return false;
    };
    let job = BatchRecord {
        step: BatchStep::Waiting,
        command: Some(code),
        time_up: timeout.map(|timeout| uptime() + timeout.as_secs_f64()),
    };
    let begun = Instant::now();
    let (noted, wait) = oneshot::channel();
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone().tasks.spawn(async move {
        node.note(&kernel, |record| {
            record.batch_running = true;
            record.batch_job = Some(job);
        })
        .await;
        // The one who asked may have stopped waiting.
        let _ = noted.send(());
        carry_through(&node, &kernel, &gone, Some(begun)).await;
    });
    // Also when the runtime ends under it: the job is as good as started.
    let _ = wait.await;
    true
}

/// After the restart of a kernel whose job had not ended: the manager starts it again. When that does
/// not come, the session is told to have failed, so that it does not stay without a result.
pub fn expect_again(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    if !is_dropped(kernel) {
        return;
    }
    let container = kernel.container();
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone().tasks.spawn(async move {
        let given_up = is_given_up(&kernel, container, STARTED_AGAIN);
        // The next start waits anew.
        let given_up = node.stopping.run_until_cancelled(given_up).await;
        if given_up != Some(true) {
            return;
        }
        tracing::warn!(kernel_id = %kernel.id,
            "a batch job was not started again after its kernel was restarted; its session is told to have failed");
        if take_untold(&kernel) {
            tell_failure(&node, kernel.session, -1);
        }
        kernel.end_batch();
        forget(&node, &kernel).await;
    });
}

/// Tells that a job ended with its kernel, unless the managers have asked for that: they end the session
/// when they hear of the job, and take no end of a kernel before. Once, by whoever comes first.
pub fn end_with_kernel(node: &Node, kernel: &Kernel, ending: &Ending) {
    let condemned = kernel.with_record(|record| record.condemned);
    if let Some(exit_code) = failure_of(ending, condemned)
        && take_untold(kernel)
    {
        tracing::warn!(kernel_id = %kernel.id, exit_code = ending.exit_code,
            "a kernel has ended with its batch job; its session is told to have failed");
        tell_failure(node, kernel.session, exit_code);
    }
}

/// The exit code that the session of a job is told of its kernel's end; none where the managers have
/// asked for that.
fn failure_of(ending: &Ending, condemned: bool) -> Option<i64> {
    let unasked = ending.is_the_nodes_own() || condemned;
    unasked.then(|| ending.exit_code.unwrap_or(-1))
}

/// The same of a kernel that is not here; one that is not remembered has failed.
fn failure_of_past(end: Option<&(Ending, bool)>) -> Option<i64> {
    end.map_or(Some(-1), |(ending, condemned)| {
        failure_of(ending, *condemned)
    })
}

/// Answers a start of a job in a kernel that is not here (any more): with how it ended, if that is
/// remembered. In the background.
pub fn end_without_kernel(node: &Arc<Node>, id: KernelId, session: SessionId) {
    let node = node.clone();
    node.clone().tasks.spawn(async move {
        let wait = tokio::time::sleep(SESSION_RUNS);
        node.stopping.run_until_cancelled(wait).await;
        let end = node.registry.end_of(id, session);
        if let Some(exit_code) = failure_of_past(end.as_ref()) {
            tell_failure(&node, session, exit_code);
        }
        let ending = end.map(|(ending, _)| ending);
        node.events.emit(Event::KernelTerminated {
            kernel: id,
            session,
            reason: ending
                .as_ref()
                .map_or(Reason::SELF_TERMINATED, Ending::told),
            exit_code: ending.and_then(|ending| ending.exit_code),
        });
    });
}

/// Tells that the job of a session has failed.
fn tell_failure(node: &Node, session: SessionId, exit_code: i64) {
    node.events.emit(Event::SessionFailure {
        session,
        reason: Reason::from_text("task-failed"),
        exit_code,
    });
}

/// Whether the end of the job is still to be told. The one who asks tells it.
fn take_untold(kernel: &Kernel) -> bool {
    let mut untold = false;
    kernel.update_record(|record| untold = std::mem::take(&mut record.batch_running));
    untold
}

/// Waits for a dropped job to be started again in that container. When it was not, the kernel takes no
/// other until the end of this one is told.
async fn is_given_up(kernel: &Kernel, container: Option<ContainerId>, patience: Duration) -> bool {
    tokio::time::sleep(patience).await;
    // It was started, or the kernel was restarted once more or has ended.
    is_dropped(kernel)
        && kernel.container() == container
        && kernel.is_running()
        && kernel.begin_batch().is_some()
}

fn is_dropped(kernel: &Kernel) -> bool {
    kernel.with_record(|record| {
        let job = record.batch_job.as_ref();
        record.batch_running && job.is_some_and(|job| job.step == BatchStep::Dropped)
    })
}

/// Goes on with the job that the journal holds.
pub fn resume(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    if is_dropped(kernel) {
        return expect_again(node, kernel);
    }
    let Some(gone) = kernel.begin_batch() else {
        return;
    };
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone()
        .tasks
        .spawn(async move { carry_through(&node, &kernel, &gone, None).await });
}

/// Brings the job in the record to its end and announces that. `begun` is when it was called for, if that
/// was now.
async fn carry_through(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    gone: &CancellationToken,
    begun: Option<Instant>,
) {
    let Some(runner) = kernel.runner() else {
        tracing::warn!(kernel_id = %kernel.id, "a batch job cannot start without the runner");
        kernel.end_batch();
        note_gone(node, kernel);
        return;
    };
    let session = kernel.session;
    let mut work = std::pin::pin!(work(node, kernel, &runner, gone, begun.is_some()));
    let outcome = tokio::select! {
        biased;
        outcome = &mut work => outcome,
        () = node.stopping.cancelled() => {
            // The job goes on, and the next start watches it: nothing more is read of the runner. An
            // end that was read already is known to nobody else.
            runner.leave().await;
            match tokio::time::timeout(LAST_LOOK, work).await {
                Ok(outcome) => outcome,
                Err(_elapsed) => return,
            }
        }
    };
    if outcome == BatchOutcome::KernelGone {
        note_gone(node, kernel);
        return;
    }
    if let Some(begun) = begun {
        let early = SESSION_RUNS.saturating_sub(begun.elapsed());
        let wait = tokio::time::sleep(early);
        node.stopping.run_until_cancelled(wait).await;
    }
    if !take_untold(kernel) {
        kernel.end_batch();
        return;
    }
    let (reason, exit_code) = outcome.told();
    let event = if outcome == BatchOutcome::Succeeded {
        Event::SessionSuccess {
            session,
            reason,
            exit_code,
        }
    } else {
        report_death(node, kernel, exit_code);
        Event::SessionFailure {
            session,
            reason,
            exit_code,
        }
    };
    node.events.emit(event.clone());
    kernel.end_batch();
    forget(node, kernel).await;
    let again = tell_again(kernel, TOLD_AGAIN, || node.events.emit(event.clone()));
    node.stopping.run_until_cancelled(again).await;
}

/// Tells the end of a job again while its kernel stays in service and has no other.
async fn tell_again(kernel: &Kernel, (pause, times): (Duration, u32), tell: impl Fn()) {
    for _ in 0..times {
        let left = kernel.wait_until(|state| (*state != State::Running).then_some(()));
        if tokio::time::timeout(pause, left).await.is_ok()
            || kernel.with_record(|record| record.batch_running)
        {
            return;
        }
        tracing::info!(kernel_id = %kernel.id, "no manager has ended the session of a job that was told to have ended; telling it again");
        tell();
    }
}

/// The kernel's end tells of its job, unless it has passed before that was in the record.
fn note_gone(node: &Node, kernel: &Kernel) {
    if let State::Ended(ending) = kernel.state() {
        end_with_kernel(node, kernel, &ending);
    }
}

/// The job's end was told.
async fn forget(node: &Node, kernel: &Kernel) {
    let change = |record: &mut Record| {
        record.batch_running = false;
        record.batch_job = None;
    };
    if kernel.is_running() {
        node.note(kernel, change).await;
    } else {
        kernel.update_record(change);
    }
}

async fn work(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    runner: &RunnerLink,
    gone: &CancellationToken,
    begun: bool,
) -> BatchOutcome {
    let killer = init_pid(node, kernel)
        .await
        .map(|init_pid| ContainerCommands {
            init_pid,
            files: KernelFiles::default(),
        });
    let killer = killer.as_ref().map(|killer| killer as &dyn CommandKiller);
    let job = kernel.with_record(|record| record.batch_job.clone());
    let step = job.as_ref().map_or(BatchStep::Sent, |job| job.step);
    let command = job.as_ref().and_then(|job| job.command.clone());
    let unsent = match step {
        BatchStep::Waiting => true,
        BatchStep::Sending => !batch::shows(runner, killer).await,
        BatchStep::Sent | BatchStep::Dropped => false,
    };
    let command = command.filter(|_| unsent);
    let sends = command.is_some();
    let grace = match begun || sends {
        true => Duration::ZERO,
        false => TAKEN_OVER,
    };
    let deadline = job
        .and_then(|job| job.time_up)
        .and_then(|time_up| left(time_up, uptime(), grace))
        // A limit beyond the clock's end is none.
        .and_then(|left| tokio::time::Instant::now().checked_add(left));
    match command {
        Some(command) => {
            if let Err(outcome) = batch::submit(runner, command, deadline, gone).await {
                return outcome;
            }
        }
        None => batch::adopt(runner),
    }
    let noted = async {
        if sends {
            // First noted, then sent: whatever is noted as waiting the runner never had.
            batch::turn(runner).await;
            kernel.update_record(|record| set_step(record, BatchStep::Sending));
            store(node, kernel).await;
            batch::send(runner);
        }
        if step != BatchStep::Sent {
            batch::sent(runner).await;
            node.note(kernel, |record| set_step(record, BatchStep::Sent))
                .await;
        }
        std::future::pending().await
    };
    let outcome = tokio::select! {
        biased;
        never = noted => never,
        outcome = batch::attend(runner, deadline, killer, gone) => outcome,
    };
    // Its time was up while it waited for its turn.
    batch::withdraw(runner);
    outcome
}

/// Seconds since the host's start, its sleep included.
fn uptime() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

/// What is left of a limit; one beyond what can be counted is none.
fn left(time_up: f64, now: f64, grace: Duration) -> Option<Duration> {
    Duration::try_from_secs_f64((time_up - now).max(grace.as_secs_f64())).ok()
}

fn set_step(record: &mut Record, step: BatchStep) {
    if let Some(job) = &mut record.batch_job {
        job.step = step;
        if step == BatchStep::Sent {
            job.command = None;
        }
    }
}

/// Stores as often as it takes.
async fn store(node: &Node, kernel: &Kernel) {
    let (mut pause, longest) = JOURNAL_PAUSES;
    while let Err(err) = node.store(kernel).await {
        tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
            "a batch job is not started before the journal can be written; free space below agent.var-base-path");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

/// Says in the log what memory had to do with the end of a job.
fn report_death(node: &Node, kernel: &Kernel, exit_code: i64) {
    let sample = kernel
        .container()
        .and_then(|container| node.link.sample(container));
    let evidence = Evidence {
        out_of_memory: kernel.out_of_memory().explains(Instant::now(), false),
        shm_full: sample.as_ref().and_then(full_shm).is_some(),
    };
    if let Some(death) = Death::of(Some(exit_code), evidence) {
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

#[cfg(test)]
mod tests {
    use super::super::lifecycle::{Input, Stage};
    use super::super::registry::{Admission, EndedKernel, Registry, tests::record};
    use super::*;

    /// A kernel that was restarted while its job was at work.
    fn restarted() -> Arc<Kernel> {
        let mut record = record(1);
        record.container_id = Some(ContainerId([1; 32]).to_string());
        record.batch_running = true;
        record.batch_job = Some(BatchRecord {
            step: BatchStep::Dropped,
            command: None,
            time_up: None,
        });
        let Admission::Accepted(kernel) = Registry::default().admit(record) else {
            panic!("not admitted");
        };
        kernel.step(Input::Entered(Stage::Started));
        kernel.step(Input::Ready);
        assert!(is_dropped(&kernel) && kernel.is_running());
        kernel
    }

    /// What comes of it when this happens while it is waited for.
    async fn after(happens: impl FnOnce(&Arc<Kernel>)) -> bool {
        let kernel = restarted();
        let waits = is_given_up(&kernel, kernel.container(), Duration::from_millis(50));
        let (given_up, ()) = tokio::join!(waits, async { happens(&kernel) });
        // It is this wait's alone then.
        assert!(!given_up || kernel.begin_batch().is_none());
        given_up
    }

    #[tokio::test]
    async fn a_job_that_is_not_started_again_is_given_up() {
        assert!(after(|_| {}).await);
        // Started again: it is in the record soon after it has begun.
        assert!(!after(|kernel| drop(kernel.begin_batch())).await);
        let noted = after(|kernel| {
            kernel.update_record(|record| {
                let job = record.batch_job.as_mut().expect("the job");
                job.step = BatchStep::Waiting;
            });
        });
        assert!(!noted.await);
        let again = |kernel: &Arc<Kernel>| {
            let other = Some(ContainerId([2; 32]).to_string());
            kernel.update_record(|record| record.container_id = other);
        };
        assert!(!after(again).await);
        let ended = after(|kernel| {
            kernel.step(Input::Died { exit_code: None });
        });
        assert!(!ended.await);
        let told = after(|kernel| kernel.update_record(|record| record.batch_running = false));
        assert!(!told.await);
    }

    #[tokio::test]
    async fn the_end_of_a_job_is_told_again_until_its_kernel_ends() {
        let pause = Duration::from_millis(30);
        let told = async |happens: fn(&Arc<Kernel>, u32)| {
            let kernel = restarted();
            kernel.update_record(|record| record.batch_running = false);
            let count = std::cell::Cell::new(0);
            let tell = || {
                count.set(count.get() + 1);
                happens(&kernel, count.get());
            };
            tell_again(&kernel, (pause, 3), tell).await;
            count.get()
        };
        assert_eq!(told(|_, _| {}).await, 3);
        let ended = told(|kernel, count| {
            if count == 2 {
                kernel.step(Input::Died { exit_code: None });
            }
        });
        assert_eq!(ended.await, 2);
        let another = told(|kernel, _| kernel.update_record(|record| record.batch_running = true));
        assert_eq!(another.await, 1);
    }

    #[test]
    fn a_job_that_is_called_for_after_its_kernels_end_has_failed_unless_a_manager_ended_that() {
        let told = |condemned: bool, reason: Reason, suppress: bool| {
            let mut record = record(1);
            record.condemned = condemned;
            let (registry, session) = (Registry::default(), record.session());
            let Admission::Accepted(kernel) = registry.admit(record) else {
                panic!("not admitted");
            };
            kernel.step(Input::Entered(Stage::Started));
            kernel.step(Input::Ready);
            kernel.step(Input::Destroy { reason, suppress });
            kernel.step(Input::Cleaned {
                exit_code: Some(137),
                death: None,
            });
            assert_eq!(registry.forget(&kernel, EndedKernel::now(&kernel)), None);
            failure_of_past(registry.end_of(kernel.id, session).as_ref())
        };
        assert_eq!(told(true, Reason::USER_REQUESTED, false), Some(137));
        assert_eq!(told(false, Reason::ANOMALY_DETECTED, false), Some(137));
        assert_eq!(told(false, Reason::USER_REQUESTED, false), None);
        assert_eq!(told(false, Reason::ANOMALY_DETECTED, true), None);
        assert_eq!(failure_of_past(None), Some(-1));
    }

    #[test]
    fn the_time_of_a_job_is_counted_from_the_hosts_start() {
        let told = std::fs::read_to_string("/proc/uptime").unwrap();
        let told: f64 = told.split(' ').next().unwrap().parse().unwrap();
        // Whatever the clock on the wall says: it may be set between two starts of the agent.
        let ours = uptime();
        assert!(
            (told..told + 60.0).contains(&(ours + 0.01)),
            "{told} {ours}"
        );
        let grace = Duration::from_secs(3);
        let after = |now| left(1000.0, now, grace);
        assert_eq!(after(400.0), Some(Duration::from_secs(600)));
        assert_eq!(after(999.0), Some(grace));
        assert_eq!(after(5000.0), Some(grace));
        assert_eq!(left(f64::INFINITY, 0.0, grace), None);
    }
}
