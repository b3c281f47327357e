//! One kernel of this node: its lifecycle, its record, and what waits for it.
//!
//! In: inputs to the lifecycle, changes of the record. Out: what to do next, copies for the journal and for
//! those who show kernels, and waiting until a state is reached. Invariant: the lifecycle is stepped under a
//! lock held for a few instructions and never over an await.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shared::ids::{ContainerId, KernelId, SessionId};
use shared::monotonic_ns;
use shared::observed::ContainerSample;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::ended::stored;
use crate::kernel::death::OutOfMemory;
use crate::kernel::journal::{Journal, JournalError, Phase};
use crate::kernel::lifecycle::{Action, Ending, Input, Lifecycle, Stage, State};
use crate::kernel::record::Record;
use crate::kernel::restart::UnderWay;
use crate::kernel::runner_link::RunnerLink;

/// Between two times at which the start of one kernel is told.
pub(super) const START_AGAIN: Duration = Duration::from_secs(5);

/// One kernel: shared by everything that works on it.
#[derive(Debug)]
pub struct Kernel {
    /// The kernel id.
    pub id: KernelId,
    /// Its session.
    pub session: SessionId,
    inner: Mutex<Inner>,
    /// Number of the journal entry on the disk.
    written: Arc<Mutex<u64>>,
    changes: watch::Sender<u64>,
    /// Held from finding the container to using what was found, for rows and the link to the runner.
    pub(in crate::kernel) refreshing: tokio::sync::Mutex<()>,
    /// How often something has asked for that until it succeeds: only the last goes on trying.
    pub(in crate::kernel) renewals: AtomicU64,
    /// Its restart, from the first look whether it can be made again.
    pub(in crate::kernel) restart: UnderWay,
    /// Held by what the engine may pause the container for, and by what lets it go on.
    pub(in crate::kernel) committing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Inner {
    lifecycle: Lifecycle,
    record: Record,
    /// Tells the present creation to give up.
    abort: CancellationToken,
    /// What stands in the way of the present operation.
    trouble: Option<String>,
    /// The end has been announced and the entry dropped.
    gone: bool,
    runner: Option<RunnerLink>,
    batch: Option<CancellationToken>,
    /// Kills for memory in the present container.
    out_of_memory: OutOfMemory,
    /// How often the engine has told that its container died.
    deaths: u64,
    /// Counts the copies that were made for the journal.
    entries: u64,
    /// When this life of the agent told its start.
    start_told: Option<Instant>,
}

/// A copy of a record on its way to the journal. Copies are made in one order and written by several
/// threads: a later one that was written first stays.
#[derive(Debug)]
pub struct JournalEntry {
    number: u64,
    record: Record,
    written: Arc<Mutex<u64>>,
}

impl JournalEntry {
    /// Writes it, unless a later one has been written or the file was removed for good. Blocks.
    ///
    /// # Errors
    /// The file cannot be written; the one before stays.
    pub fn write(self, journal: &Journal) -> Result<(), JournalError> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if self.number <= *written {
            return Ok(());
        }
        journal.store(self.record.id(), &self.record)?;
        *written = self.number;
        Ok(())
    }

    /// Removes the kernel's file; no entry is written after that. Blocks.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(self, journal: &Journal) -> Result<(), JournalError> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        *written = u64::MAX;
        journal.remove(self.record.id())
    }
}

/// A copy of what is known of a kernel, for those who show it.
#[derive(Clone, Debug)]
pub struct KernelView {
    /// The kernel id.
    pub id: KernelId,
    /// The lifecycle's state.
    pub state: State,
    /// What the journal holds.
    pub record: Record,
}

impl Kernel {
    pub(super) fn new(lifecycle: Lifecycle, record: Record) -> Kernel {
        Kernel {
            id: record.id(),
            session: record.session(),
            inner: Mutex::new(Inner {
                lifecycle,
                record,
                abort: CancellationToken::new(),
                trouble: None,
                gone: false,
                runner: None,
                batch: None,
                out_of_memory: OutOfMemory::default(),
                deaths: 0,
                entries: 0,
                start_told: None,
            }),
            written: Arc::default(),
            changes: watch::Sender::new(0),
            refreshing: tokio::sync::Mutex::default(),
            renewals: AtomicU64::new(0),
            restart: UnderWay::default(),
            committing: tokio::sync::Mutex::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // No method leaves `Inner` half-changed at a point that can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Applies one input to the lifecycle; wakes those who wait and the creation that has to give
    /// up.
    pub fn step(&self, input: Input) -> Vec<Action> {
        let mut inner = self.inner();
        let restart_begins = matches!(
            (inner.lifecycle.state(), &input),
            (State::Running, Input::Restart)
        );
        let actions = inner.lifecycle.step(input);
        if restart_begins {
            inner.abort = CancellationToken::new();
            inner.trouble = None;
            inner.out_of_memory = OutOfMemory::default();
        }
        if actions.contains(&Action::AbortCreation) {
            inner.abort.cancel();
        }
        drop(inner);
        self.changed();
        actions
    }

    /// The present state.
    pub fn state(&self) -> State {
        self.inner().lifecycle.state().clone()
    }

    /// Whether the kernel is in service.
    pub fn is_running(&self) -> bool {
        matches!(self.inner().lifecycle.state(), State::Running)
    }

    /// Notes that its start is told.
    pub fn start_told(&self, now: Instant) {
        self.inner().start_told = Some(now);
    }

    /// Whether its start may be told again: it is in service, and nobody told it just before. If so,
    /// that is noted.
    pub fn may_tell_start(&self, now: Instant) -> bool {
        let mut inner = self.inner();
        let just_told = |told: Instant| now.saturating_duration_since(told) < START_AGAIN;
        let may = matches!(inner.lifecycle.state(), State::Running)
            && !inner.start_told.is_some_and(just_told);
        if may {
            inner.start_told = Some(now);
        }
        may
    }

    /// Whether its container has been started and nobody has decided its end.
    pub fn is_up(&self) -> bool {
        match self.inner().lifecycle.state() {
            State::Running => true,
            State::Creating { stage, abort, .. } => *stage == Stage::Started && abort.is_none(),
            _ => false,
        }
    }

    /// The ending that was decided, if any.
    pub fn ending(&self) -> Option<Ending> {
        self.inner().lifecycle.ending().cloned()
    }

    /// What the present creation has to watch.
    pub fn abort_token(&self) -> CancellationToken {
        self.inner().abort.clone()
    }

    /// A copy of the record.
    pub fn record(&self) -> Record {
        self.inner().record.clone()
    }

    /// Reads something from the record.
    pub fn with_record<T>(&self, read: impl FnOnce(&Record) -> T) -> T {
        read(&self.inner().record)
    }

    /// Changes the record in memory.
    pub fn update_record(&self, change: impl FnOnce(&mut Record)) {
        change(&mut self.inner().record);
    }

    /// A copy for the journal, with the lifecycle's state of this moment.
    pub fn journal_entry(&self) -> JournalEntry {
        let mut inner = self.inner();
        inner.entries += 1;
        inner.record.phase = phase_of(inner.lifecycle.state());
        inner.record.ending = inner.lifecycle.ending().map(stored);
        JournalEntry {
            number: inner.entries,
            record: inner.record.clone(),
            written: self.written.clone(),
        }
    }

    /// The container, when there is one.
    pub fn container(&self) -> Option<ContainerId> {
        self.inner().record.container()
    }

    /// The connection to the runner.
    pub fn runner(&self) -> Option<RunnerLink> {
        self.inner().runner.clone()
    }

    /// Replaces the connection to the runner; returns the old one, which has to be closed.
    pub fn set_runner(&self, runner: Option<RunnerLink>) -> Option<RunnerLink> {
        let old = std::mem::replace(&mut self.inner().runner, runner);
        self.changed();
        old
    }

    /// The connection to the runner of a kernel in service, also when it is just being taken over;
    /// nothing once `limit` has passed or the kernel is out of service.
    pub async fn wait_runner(&self, limit: Duration) -> Option<RunnerLink> {
        let connected = self.wait_inner(|inner| match (&inner.runner, inner.lifecycle.state()) {
            (Some(runner), _) => Some(Some(runner.clone())),
            (None, State::Running) => None,
            (None, _) => Some(None),
        });
        tokio::time::timeout(limit, connected).await.ok().flatten()
    }

    /// Puts the link to a running kernel in place. Returns the link to close: the one before, or
    /// this one when the kernel does not run in that container (any more). A link that outlived
    /// its kernel would go on calling an address that the engine gives to another container.
    pub fn offer_runner(&self, container: ContainerId, runner: RunnerLink) -> Option<RunnerLink> {
        let to_close = {
            let mut inner = self.inner();
            let runs = matches!(inner.lifecycle.state(), State::Running);
            if runs && inner.record.container() == Some(container) {
                inner.runner.replace(runner)
            } else {
                Some(runner)
            }
        };
        // Calls may be waiting for this very link.
        self.changed();
        to_close
    }

    /// Marks the kernel's batch job as running; the token is cancelled when the kernel ends. `None`
    /// when one is running already.
    pub fn begin_batch(&self) -> Option<CancellationToken> {
        let mut inner = self.inner();
        match &inner.batch {
            Some(running) if !running.is_cancelled() => None,
            _ => {
                let token = CancellationToken::new();
                inner.batch = Some(token.clone());
                Some(token)
            }
        }
    }

    /// Ends the batch job's wait.
    pub fn end_batch(&self) {
        if let Some(token) = self.inner().batch.take() {
            token.cancel();
        }
    }

    /// Remembers what stands in the way, for those who wait.
    pub fn set_trouble(&self, trouble: String) {
        self.inner().trouble = Some(trouble);
    }

    /// What stands in the way.
    pub fn trouble(&self) -> Option<String> {
        self.inner().trouble.clone()
    }

    /// Whether the kernel got far enough to leave traces (a journal file, an event at its end), or its
    /// end was asked for.
    pub fn is_visible(&self) -> bool {
        self.inner().lifecycle.is_visible()
    }

    /// Notes that the engine has told of a kill for memory. True when the log should have a line.
    pub fn count_out_of_memory(&self) -> bool {
        self.inner().out_of_memory.count(Instant::now())
    }

    /// Notes that its container is started now, for the first time.
    pub fn container_starts(&self) {
        self.inner().out_of_memory = OutOfMemory::of_new_container(monotonic_ns());
    }

    /// Takes in the kills for memory that Linux has counted in the present container; a sample comes
    /// every `interval`.
    pub fn note_sample(&self, sample: &ContainerSample, interval: Duration) {
        let mut inner = self.inner();
        if inner.record.container() == Some(sample.container_id) {
            inner
                .out_of_memory
                .sampled(sample, interval, Instant::now());
        }
    }

    /// The kills for memory in the present container.
    pub fn out_of_memory(&self) -> OutOfMemory {
        self.inner().out_of_memory
    }

    /// The last step of a kernel that has ended, after its registry entry was dropped: those who wait
    /// for the end go on.
    pub fn leave(&self) {
        self.inner().gone = true;
        self.changed();
    }

    /// Notes that the engine has told of its container's death.
    pub fn count_death(&self) {
        self.inner().deaths += 1;
        self.changed();
    }

    /// How often the engine has told so.
    pub fn deaths(&self) -> u64 {
        self.inner().deaths
    }

    /// Waits until the engine tells of a death that is not among those counted.
    pub async fn wait_death(&self, counted: u64) {
        self.wait_inner(|inner| (inner.deaths > counted).then_some(()))
            .await;
    }

    /// Waits until `reached` gives a value for the state.
    pub async fn wait_until<T>(&self, mut reached: impl FnMut(&State) -> Option<T>) -> T {
        self.wait_inner(|inner| reached(inner.lifecycle.state()))
            .await
    }

    async fn wait_inner<T>(&self, mut reached: impl FnMut(&Inner) -> Option<T>) -> T {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(value) = reached(&self.inner()) {
                return value;
            }
            // The sender lives in `self`; this cannot fail while we are borrowed.
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Waits until the kernel has ended.
    pub async fn wait_ended(&self) -> Ending {
        self.wait_inner(|inner| match inner.lifecycle.state() {
            State::Ended(ending) if inner.gone => Some(ending.clone()),
            _ => None,
        })
        .await
    }

    /// A copy for those who show it.
    pub fn view(&self) -> KernelView {
        let inner = self.inner();
        KernelView {
            id: self.id,
            state: inner.lifecycle.state().clone(),
            record: inner.record.clone(),
        }
    }
}

pub(super) fn phase_of(state: &State) -> Phase {
    match state {
        State::Creating { abort: Some(_), .. } | State::Ending(_) | State::Ended(_) => {
            Phase::Ending
        }
        State::Restarting { abort: Some(_) } => Phase::Ending,
        State::Restarting { .. } => Phase::Restarting,
        State::Creating {
            restart: true,
            stage,
            ..
        } if *stage < Stage::Started => Phase::Restarting,
        State::Creating { stage, .. } => match stage {
            Stage::Queued | Stage::Reserved | Stage::Files => Phase::Files,
            Stage::Container => Phase::Container,
            Stage::Started => Phase::Started,
        },
        State::Running => Phase::Running,
    }
}
