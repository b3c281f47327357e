//! The connection to the runner inside one container.
//!
//! Owns the two sockets and three tasks (`tasks`): a reader that waits for a client for a moment at most, a
//! writer, and a ticker (status ping every 10 s, sweeping of old runs, the probe again while it is not answered).
//! Where messages may have been lost, the runner is probed before a run is sent (see `runs`).
//! In: requests (see `execution`, `services`) and the runner's messages. Out: answers and the results
//! of runs.
//!
//! Invariants: the receiving socket is drained whether or not a client polls (otherwise printing
//! processes in the container stall); one link per container, closed for good before another is opened;
//! a client that goes away closes nothing.

pub mod answers;
pub mod decoder;
mod error;
mod first_contact;
pub mod frame;
mod inner;
pub mod runs;
mod socket;
mod tasks;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::ids::{KernelId, SessionId};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio_util::sync::CancellationToken;

use answers::AnswerLine;
pub use error::{BadAnswer, LinkError};
pub use first_contact::{InitError, InitPolling};
use frame::{AnswerKind, Outgoing};
use inner::{Inner, OWED_IN_DOUBT, State, lock};
use runs::{RunIds, RunLimits, RunTable, Submission, Taken};
pub use socket::SocketError;

use crate::events::Events;

/// Where a runner listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunnerAddress {
    /// The container's address (loopback with host networking).
    pub ip: IpAddr,
    /// REPL input port.
    pub repl_in: u16,
    /// REPL output port.
    pub repl_out: u16,
}

impl RunnerAddress {
    /// The fixed ports 2000 and 2001 at a container's own address.
    pub fn container(ip: IpAddr) -> Self {
        Self {
            ip,
            repl_in: 2000,
            repl_out: 2001,
        }
    }
}

/// What a link leaves to the next one of its runner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owed {
    /// Runs that were told to have started and not to have ended.
    pub runs: u32,
    /// Whose they are.
    pub ids: RunIds,
    /// The runner has yet to answer the start of a service.
    pub service: bool,
}

impl Owed {
    /// What of this `noted` has, too.
    pub fn known_to(&self, noted: &Owed) -> Owed {
        Owed {
            runs: self.runs.min(noted.runs),
            ids: self.ids.known_to(&noted.ids),
            service: self.service && noted.service,
        }
    }
}

/// How a link behaves.
#[derive(Clone, Debug)]
pub struct LinkOptions {
    /// Time between two status pings.
    pub ping_interval: Duration,
    /// Bounds of what runs may hold.
    pub runs: RunLimits,
    /// The container ran before this process did: its runner may be in the middle of a run.
    pub resumed: bool,
    /// What the link before this one has left.
    pub owed: Owed,
    /// Who is told that runs begin and end, and of which session.
    pub told: Option<(Events, SessionId)>,
}

impl Default for LinkOptions {
    fn default() -> Self {
        Self {
            ping_interval: Duration::from_secs(10),
            runs: RunLimits::default(),
            resumed: false,
            owed: Owed::default(),
            told: None,
        }
    }
}

/// What an interrupt that is meant for one run has met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Interrupted {
    /// The runner was told: it works on that run.
    AtWork,
    /// Nothing of that run was sent, nor will be.
    Unsent,
    /// Neither: it is over, or not known yet.
    Absent,
}

/// What the runner says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunnerStatus {
    /// Monotonic clock of the container's host when the runner started, seconds.
    pub started_at: f64,
}

/// A service the image defines, as the runner lists it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AppRecord {
    /// Service name.
    pub name: String,
    /// Template of the URL clients open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_template: Option<String>,
    /// Arguments clients may give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_arguments: Option<Value>,
    /// Environment variables clients may give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_envs: Option<Value>,
}

/// A change of a model service's health.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelServiceStatus {
    /// Name in the model definition.
    pub model_name: String,
    /// Whether it is healthy.
    pub is_healthy: bool,
}

const TICK: Duration = Duration::from_secs(1);
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// How long an unanswered request of a kind that is answered at once may still be answered.
const PROMPT_OWED: Duration = Duration::from_secs(30);

/// A handle to the connection; clones share it.
#[derive(Clone, Debug)]
pub struct RunnerLink(Arc<Inner>);

impl RunnerLink {
    /// Starts connecting and returns at once. Must be called inside a tokio runtime.
    pub fn open(kernel_id: KernelId, address: RunnerAddress, options: LinkOptions) -> Self {
        let (outgoing, messages) = mpsc::unbounded_channel();
        let mut runs = RunTable::new(options.runs, options.resumed, Instant::now());
        runs.owe(Instant::now(), options.owed.runs, options.owed.ids.clone());
        let inner = Arc::new(Inner {
            kernel_id,
            address: watch::channel(Some(address)).0,
            state: Mutex::new(State {
                runs,
                decoders: HashMap::new(),
                lines: HashMap::new(),
                last_heard: None,
            }),
            changed: watch::channel(0).0,
            taken: Notify::new(),
            outgoing,
            queued: AtomicUsize::new(0),
            queued_bytes: AtomicUsize::new(0),
            model_updates: broadcast::channel(16).0,
            told: options.told,
            owed: watch::channel(Owed::default()).0,
            closed: CancellationToken::new(),
            tasks: Mutex::new(Vec::new()),
        });
        {
            let mut state = lock(&inner.state);
            if options.resumed && options.owed.service {
                // Nobody waits for it; no start is asked for before it has come or counts as lost.
                let line = state.line(AnswerKind::Service);
                let _nobody = line.join(Instant::now(), OWED_IN_DOUBT);
            }
            inner.tell(&mut state);
            inner.publish(&mut state);
            if options.resumed {
                inner.probe(&mut state);
            }
        }
        let tasks = vec![
            tokio::spawn(tasks::read(Arc::clone(&inner))),
            tokio::spawn(tasks::write(Arc::clone(&inner), messages)),
            tokio::spawn(tasks::tick(Arc::clone(&inner), options.ping_interval)),
        ];
        *lock(&inner.tasks) = tasks;
        Self(inner)
    }

    /// The kernel this link belongs to.
    pub fn kernel_id(&self) -> KernelId {
        self.0.kernel_id
    }

    /// Whether the runner is believed to be there.
    pub fn is_at(&self, address: RunnerAddress) -> bool {
        *self.0.address.borrow() == Some(address)
    }

    /// The runner is no more where it was: nothing is sent until it is known where it is.
    pub fn hold(&self) {
        self.0.address.send_replace(None);
    }

    /// The runner is elsewhere from now on: both connections are opened anew there, runs and requests
    /// go on.
    pub fn follow(&self, address: RunnerAddress) {
        tracing::info!(kernel_id = %self.0.kernel_id, peer = %address.ip, "the runner has moved");
        self.0.address.send_replace(Some(address));
    }

    /// When the runner last sent anything.
    pub fn last_heard(&self) -> Option<Instant> {
        lock(&self.0.state).last_heard
    }

    /// The run the runner works on, as far as we know.
    pub fn current_run(&self) -> Option<String> {
        lock(&self.0.state).runs.at_work().map(str::to_owned)
    }

    /// Whether every message so far was written to the runner.
    pub fn is_flushed(&self) -> bool {
        self.0.is_flushed()
    }

    /// What the link would leave to the next one, as that changes.
    pub fn owed(&self) -> watch::Receiver<Owed> {
        self.0.owed.subscribe()
    }

    /// Whether the runner has told of a run that was started before this link.
    pub fn tells_of_unknown_run(&self) -> bool {
        lock(&self.0.state).runs.tells_of_unknown()
    }

    /// Whether the link was closed.
    pub fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }

    /// Ends when the link is closed.
    pub async fn closed(&self) {
        self.0.closed.cancelled().await;
    }

    /// Closes the link for good: its runner is gone or going, and runs that have not ended are told to
    /// be cancelled. Every waiter gets [`LinkError::Closed`]. Returns when the sockets are gone.
    pub async fn close(&self) {
        self.0.closed.cancel();
        {
            let mut state = lock(&self.0.state);
            state.runs.abandon();
            state.lines.values_mut().for_each(AnswerLine::clear);
            self.0.tell(&mut state);
        }
        self.leave().await;
    }

    /// Closes the link and leaves the runner at work: the next agent tells how its run ends.
    pub async fn leave(&self) {
        self.0.closed.cancel();
        let tasks = std::mem::take(&mut *lock(&self.0.tasks));
        for mut task in tasks {
            if tokio::time::timeout(CLOSE_LIMIT, &mut task).await.is_err() {
                task.abort();
            }
        }
        self.0.publish(&mut lock(&self.0.state));
        tracing::debug!(kernel_id = %self.0.kernel_id, "the link to the runner is closed");
    }

    /// Health changes of model services from now on.
    pub fn model_updates(&self) -> broadcast::Receiver<ModelServiceStatus> {
        self.0.model_updates.subscribe()
    }

    /// Asks the runner whether it lives.
    ///
    /// # Errors
    /// The link is closed or full, or there is no answer within `limit`, or none that can be read.
    pub async fn status(&self, limit: Duration) -> Result<RunnerStatus, LinkError> {
        let payload = self
            .ask(
                AnswerKind::Status,
                Outgoing::text("status", ""),
                limit,
                PROMPT_OWED,
            )
            .await?;
        rmp_serde::from_slice(&payload).map_err(|err| LinkError::bad_answer("status", err))
    }

    /// Asks the runner for the services the image defines; `None` when it says it failed.
    ///
    /// # Errors
    /// As for [`status`](Self::status).
    pub async fn apps(&self, limit: Duration) -> Result<Option<Vec<AppRecord>>, LinkError> {
        #[derive(Deserialize)]
        struct Apps {
            status: String,
            #[serde(default)]
            data: Vec<AppRecord>,
        }
        let payload = self
            .ask(
                AnswerKind::Apps,
                Outgoing::text("get-apps", ""),
                limit,
                PROMPT_OWED,
            )
            .await?;
        let apps: Apps = serde_json::from_slice(&payload)
            .map_err(|err| LinkError::bad_answer("get-apps", err))?;
        Ok((apps.status == "done").then_some(apps.data))
    }

    /// Interrupts what the runner works on.
    ///
    /// # Errors
    /// The link is closed or full.
    pub fn interrupt(&self) -> Result<(), LinkError> {
        self.post(Outgoing::text("interrupt", ""))
    }

    /// Interrupts this run if the runner works on it, and ends it unsent if it waits.
    ///
    /// # Errors
    /// The link is closed or full.
    pub(super) fn interrupt_run(&self, run_id: &str) -> Result<Interrupted, LinkError> {
        // Under one lock: no other run has its turn in between.
        let mut state = lock(&self.0.state);
        self.0.check_room(&state, 0)?;
        if state.runs.at_work() == Some(run_id) {
            self.0.send([Outgoing::text("interrupt", "")])?;
            return Ok(Interrupted::AtWork);
        }
        Ok(match self.withdraw_locked(&mut state, run_id)? {
            true => Interrupted::Unsent,
            false => Interrupted::Absent,
        })
    }

    /// Tells the runner that the kernel killed a process for lack of memory; it logs which.
    ///
    /// # Errors
    /// The link is closed or full.
    pub fn notify_oom(&self) -> Result<(), LinkError> {
        self.post(Outgoing::json("event", &json!({"type": "oom", "data": {}})))
    }

    /// Sends a message that has no answer.
    pub(super) fn post(&self, message: Outgoing) -> Result<(), LinkError> {
        let state = lock(&self.0.state);
        self.0.check_room(&state, message.payload.len())?;
        self.0.send([message])
    }

    /// Sends a request and waits for its answer. Giving up (or being dropped) leaves the answer owed
    /// for `owed_for` after the limit.
    pub(super) async fn ask(
        &self,
        kind: AnswerKind,
        message: Outgoing,
        limit: Duration,
        owed_for: Duration,
    ) -> Result<Bytes, LinkError> {
        let request = message.kind;
        let answer = self.0.join(kind, message, limit + owed_for)?;
        self.0.await_answer(answer, request, limit).await
    }

    /// Like [`Self::ask`], but only one request of this kind is with the runner at a time: it is sent
    /// when every earlier answer has come (or counts as lost).
    pub(super) async fn ask_alone(
        &self,
        kind: AnswerKind,
        message: Outgoing,
        limit: Duration,
        owed_for: Duration,
    ) -> Result<Bytes, LinkError> {
        let request = message.kind;
        let until = tokio::time::Instant::now() + limit;
        let mut changed = self.0.changed.subscribe();
        loop {
            changed.borrow_and_update();
            let answer = {
                let mut state = lock(&self.0.state);
                if state.line(kind).is_clear(Instant::now()) {
                    Some(
                        self.0
                            .join_locked(&mut state, kind, message.clone(), limit + owed_for)?,
                    )
                } else {
                    None
                }
            };
            if let Some(answer) = answer {
                let left = until.saturating_duration_since(tokio::time::Instant::now());
                return self.0.await_answer(answer, request, left).await;
            }
            tokio::select! {
                _ = changed.changed() => {}
                // An answer that counts as lost frees the line without a message.
                () = tokio::time::sleep(TICK) => {}
                () = tokio::time::sleep_until(until) => return Err(LinkError::Timeout { request, limit }),
                () = self.0.closed.cancelled() => return Err(LinkError::Closed),
            }
        }
    }

    /// Hands a client's request to the run table.
    pub(super) fn submit(&self, run_id: &str, request: Submission) -> Result<(), LinkError> {
        // Under the lock: a run that enters after the end of all would have none.
        let mut state = lock(&self.0.state);
        let now = self.make_room(&state, run_id, &request)?;
        let messages = state.runs.submit(now, run_id, request);
        let messages = messages.map_err(LinkError::Refused)?;
        self.0.tell(&mut state);
        self.0.send(messages)
    }

    /// The same for a run of which nothing is sent before [`Self::release`], also in its turn. What an earlier
    /// life has noted of it was never sent.
    pub(super) fn submit_held(&self, run_id: &str, request: Submission) -> Result<(), LinkError> {
        let mut state = lock(&self.0.state);
        state.runs.forget_request(run_id);
        let now = self.make_room(&state, run_id, &request)?;
        let held = state.runs.submit_held(now, run_id, request);
        held.map_err(LinkError::Refused)?;
        self.0.tell(&mut state);
        Ok(())
    }

    /// Waits until it is this run's turn.
    pub(super) async fn turn_of(&self, run_id: &str) {
        self.until(|inner| lock(&inner.state).runs.current() == Some(run_id))
            .await;
    }

    /// Sends a run that was held, in its turn.
    pub(super) fn release(&self, run_id: &str) -> Result<(), LinkError> {
        let mut state = lock(&self.0.state);
        let messages = state.runs.release(run_id);
        self.0.publish(&mut state);
        self.0.send(messages)
    }

    /// Ends a run unsent, if nothing of it was sent: others have their turn. Answers whether it was so. A link that
    /// is closed keeps it for the next one.
    pub(super) fn withdraw(&self, run_id: &str) -> bool {
        let mut state = lock(&self.0.state);
        // The writer is gone only when the link is closed.
        !self.is_closed() && self.withdraw_locked(&mut state, run_id).unwrap_or(false)
    }

    fn withdraw_locked(&self, state: &mut State, run_id: &str) -> Result<bool, LinkError> {
        let Some(messages) = state.runs.withdraw(Instant::now(), run_id) else {
            return Ok(false);
        };
        self.0.tell(state);
        self.0.note_change();
        self.0.send(messages)?;
        Ok(true)
    }

    /// Waits until every message so far was written to the runner.
    pub(super) async fn flushed(&self) {
        self.until(|inner| inner.is_flushed()).await;
    }

    async fn until(&self, is_so: impl Fn(&Inner) -> bool) {
        let mut changed = self.0.changed.subscribe();
        while !is_so(&self.0) {
            tokio::select! {
                _ = changed.changed() => {}
                // Time passes without a message.
                () = tokio::time::sleep(TICK) => {}
            }
        }
    }

    /// The time of a request that there is room for.
    fn make_room(
        &self,
        state: &State,
        run_id: &str,
        request: &Submission,
    ) -> Result<Instant, LinkError> {
        let now = Instant::now();
        let bytes = match state.runs.repeats(now, run_id, request) {
            // Nothing of it is sent again.
            true => 0,
            false => request.messages.iter().map(|it| it.payload.len()).sum(),
        };
        self.0.check_room(state, bytes)?;
        Ok(now)
    }

    /// Takes over a run the runner already works on.
    pub(super) fn adopt(&self, run_id: &str) {
        let mut state = lock(&self.0.state);
        if !self.is_closed() {
            state.runs.adopt(Instant::now(), run_id);
            self.0.tell(&mut state);
        }
    }

    /// Waits for a result of the run: the end of a step, enough output, or `flush` passed.
    /// May be dropped at any point without losing output.
    pub(super) async fn collect(&self, run_id: &str, flush: Duration) -> Result<Taken, LinkError> {
        let until = tokio::time::Instant::now() + flush;
        let mut changed = self.0.changed.subscribe();
        let _polling = Polling::begin(&self.0, run_id);
        loop {
            changed.borrow_and_update();
            // First: what was received before the link was left is there after it.
            let closed = self.is_closed();
            let late = !closed && tokio::time::Instant::now() >= until;
            {
                let mut state = lock(&self.0.state);
                let taken = state.runs.take(Instant::now(), run_id, late);
                self.0.tell(&mut state);
                if let Some(taken) = taken {
                    self.0.taken.notify_waiters();
                    return Ok(taken);
                }
            }
            if closed {
                return Err(LinkError::Closed);
            }
            tokio::select! {
                _ = changed.changed() => {}
                // Run timeouts pass without a message.
                () = tokio::time::sleep(TICK) => {}
                () = tokio::time::sleep_until(until) => {}
                () = self.0.closed.cancelled() => {}
            }
        }
    }
}

/// A client's presence at a run; ends when dropped.
struct Polling<'a> {
    inner: &'a Inner,
    run_id: &'a str,
}

impl<'a> Polling<'a> {
    fn begin(inner: &'a Inner, run_id: &'a str) -> Self {
        lock(&inner.state).runs.begin_poll(Instant::now(), run_id);
        Self { inner, run_id }
    }
}

impl Drop for Polling<'_> {
    fn drop(&mut self) {
        lock(&self.inner.state)
            .runs
            .end_poll(Instant::now(), self.run_id);
    }
}
