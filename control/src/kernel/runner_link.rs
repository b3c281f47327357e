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
mod first_contact;
pub mod frame;
pub mod runs;
mod socket;
mod tasks;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::ids::{KernelId, SessionId};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use answers::AnswerLine;
use decoder::StreamDecoder;
pub use first_contact::{InitError, InitPolling};
use frame::{AnswerKind, Incoming, Outgoing, Record, Step, Stream};
use runs::{Milestone, RunIds, RunLimits, RunRefused, RunTable, Submission, Taken};
pub use socket::SocketError;

use crate::events::{Event, Events};

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

/// Why a request to the runner failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The link was closed (the kernel is going away).
    #[error("the connection to the kernel's runner is closed")]
    Closed,
    /// No answer in time; the runner may still be working on it.
    #[error("the kernel's runner did not answer `{request}` within {limit:?}")]
    Timeout {
        /// Type of the request.
        request: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The runner does not take messages, or not as fast as they come, and the queue is full.
    #[error(
        "too much waits for the kernel's runner already ({queued} messages, {} KiB with the runs that wait for their turn); try again when it has taken some, or interrupt what it runs", bytes / 1024
    )]
    Backlogged {
        /// Messages waiting.
        queued: usize,
        /// Bytes of payload waiting, those of waiting runs included.
        bytes: usize,
    },
    /// The runner's answer could not be read.
    #[error("the kernel's runner answered `{request}` with something else than expected")]
    BadAnswer {
        /// Type of the request.
        request: &'static str,
        /// What is wrong with it.
        #[source]
        source: BadAnswer,
    },
    /// A run was refused.
    #[error("the run was refused")]
    Refused(#[source] RunRefused),
}

/// Why an answer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BadAnswer {
    /// It should be msgpack.
    #[error(transparent)]
    Msgpack(#[from] rmp_serde::decode::Error),
    /// It should be JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

impl LinkError {
    /// An answer to this request that could not be read.
    pub(super) fn bad_answer(request: &'static str, source: impl Into<BadAnswer>) -> Self {
        let source = source.into();
        LinkError::BadAnswer { request, source }
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

/// Messages waiting for the socket, beyond which requests are refused.
const WRITE_QUEUE: usize = 1024;
/// Bytes of payload waiting for the socket and for their run's turn, from which on requests that carry
/// something are refused. The one before that may be of any size that an RPC can have.
const WRITE_QUEUE_BYTES: usize = 16 * 1024 * 1024;
/// Bytes of a request that is refused for the number of messages only: pings and interrupts go on.
const SMALL_REQUEST: usize = 4 * 1024;
const TICK: Duration = Duration::from_secs(1);
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// How long an unanswered request of a kind that is answered at once may still be answered.
const PROMPT_OWED: Duration = Duration::from_secs(30);
/// How long after a new connection a service's answer may still come: the runner polls its port for up
/// to 30 s, and does something before.
const OWED_IN_DOUBT: Duration = Duration::from_secs(45);

#[derive(Debug)]
struct State {
    runs: RunTable,
    decoders: HashMap<Stream, StreamDecoder>,
    lines: HashMap<AnswerKind, AnswerLine>,
    last_heard: Option<Instant>,
}

impl State {
    fn line(&mut self, kind: AnswerKind) -> &mut AnswerLine {
        let interchangeable = matches!(kind, AnswerKind::Status | AnswerKind::Apps);
        self.lines
            .entry(kind)
            .or_insert_with(|| AnswerLine::new(interchangeable))
    }
}

#[derive(Debug)]
struct Inner {
    kernel_id: KernelId,
    /// Where the runner is now; both connections follow it. None while it moves.
    address: watch::Sender<Option<RunnerAddress>>,
    state: Mutex<State>,
    /// Counts changes of `state` that a waiter may care about.
    changed: watch::Sender<u64>,
    /// A client has taken a result.
    taken: Notify,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    queued: AtomicUsize,
    /// Bytes of payload of the queued messages.
    queued_bytes: AtomicUsize,
    model_updates: broadcast::Sender<ModelServiceStatus>,
    told: Option<(Events, SessionId)>,
    owed: watch::Sender<Owed>,
    closed: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

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

impl Inner {
    /// Messages and bytes of payload that the runner has yet to take, those of waiting runs included.
    fn backlog(&self, state: &State) -> (usize, usize) {
        let sent = self.queued_bytes.load(Ordering::Relaxed);
        let queued = self.queued.load(Ordering::Relaxed);
        (queued, sent + state.runs.unsent_bytes())
    }

    /// Refuses a request with this many bytes of payload when too much waits already.
    fn check_room(&self, state: &State, payload: usize) -> Result<(), LinkError> {
        if self.closed.is_cancelled() {
            return Err(LinkError::Closed);
        }
        let (queued, bytes) = self.backlog(state);
        if queued >= WRITE_QUEUE || (payload > SMALL_REQUEST && bytes >= WRITE_QUEUE_BYTES) {
            Err(LinkError::Backlogged { queued, bytes })
        } else {
            Ok(())
        }
    }

    fn send(&self, messages: impl IntoIterator<Item = Outgoing>) -> Result<(), LinkError> {
        for message in messages {
            let bytes = message.payload.len();
            self.queued.fetch_add(1, Ordering::Relaxed);
            self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.outgoing.send(message).map_err(|_| LinkError::Closed)?;
        }
        Ok(())
    }

    /// Notes that a message was written.
    fn written(&self, message: &Outgoing) {
        self.queued.fetch_sub(1, Ordering::Relaxed);
        let bytes = message.payload.len();
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if self.is_flushed() {
            self.note_change();
        }
    }

    fn is_flushed(&self) -> bool {
        self.queued.load(Ordering::Relaxed) == 0
    }

    fn note_change(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn join(
        &self,
        kind: AnswerKind,
        message: Outgoing,
        owed_for: Duration,
    ) -> Result<tokio::sync::oneshot::Receiver<Bytes>, LinkError> {
        self.join_locked(&mut lock(&self.state), kind, message, owed_for)
    }

    /// Takes a place and sends under one lock, so that places and messages have the same order.
    fn join_locked(
        &self,
        state: &mut State,
        kind: AnswerKind,
        message: Outgoing,
        owed_for: Duration,
    ) -> Result<tokio::sync::oneshot::Receiver<Bytes>, LinkError> {
        self.check_room(state, message.payload.len())?;
        let (queued, bytes) = self.backlog(state);
        let answer = state
            .line(kind)
            .join(Instant::now(), owed_for)
            .ok_or(LinkError::Backlogged { queued, bytes })?;
        self.send([message])?;
        if kind == AnswerKind::Service {
            self.publish(state);
        }
        Ok(answer)
    }

    async fn await_answer(
        &self,
        answer: tokio::sync::oneshot::Receiver<Bytes>,
        request: &'static str,
        limit: Duration,
    ) -> Result<Bytes, LinkError> {
        tokio::select! {
            biased;
            payload = answer => payload.map_err(|_| LinkError::Closed),
            () = self.closed.cancelled() => Err(LinkError::Closed),
            () = tokio::time::sleep(limit) => Err(LinkError::Timeout { request, limit }),
        }
    }

    /// Files one received message. Never waits.
    fn receive(&self, kind: &[u8], payload: Bytes) {
        let now = Instant::now();
        let incoming = frame::sort(kind, payload);
        let mut state = lock(&self.state);
        state.last_heard = Some(now);
        match incoming {
            Incoming::Output(stream, bytes) => {
                let text = state.decoders.entry(stream).or_default().push(&bytes);
                if !text.is_empty() {
                    self.file(&mut state, now, Record::Text(stream, text));
                }
            }
            Incoming::Record(record) => {
                if matches!(record, Record::StepEnd(Step::Build | Step::Run, _)) {
                    for stream in [Stream::Stdout, Stream::Stderr] {
                        if let Some(text) = state.decoders.entry(stream).or_default().finish() {
                            self.file(&mut state, now, Record::Text(stream, text));
                        }
                    }
                }
                self.file(&mut state, now, record);
            }
            Incoming::Answer(kind, payload) => {
                if !state.line(kind).answer(now, payload) {
                    tracing::debug!(kernel_id = %self.kernel_id, "an answer of the runner came too late and is discarded");
                }
                if kind == AnswerKind::Service {
                    self.publish(&mut state);
                }
            }
            Incoming::ModelStatus {
                model_name,
                is_healthy,
            } => {
                // Nobody listening is fine.
                let _receivers = self.model_updates.send(ModelServiceStatus {
                    model_name,
                    is_healthy,
                });
            }
            Incoming::Unknown => {
                tracing::trace!(kernel_id = %self.kernel_id, "the runner sent a message of an unknown type");
            }
        }
        drop(state);
        self.note_change();
    }

    /// Waits while a client has much to take before more is read.
    async fn hold_up(&self) {
        loop {
            // Before the look: what is taken in between is not missed.
            let taken = self.taken.notified();
            let held_up = lock(&self.state).runs.holds_up(Instant::now());
            let Some(left) = held_up else { return };
            tokio::select! {
                () = taken => {}
                () = tokio::time::sleep(left) => {}
            }
        }
    }

    /// Asks the runner whether it is at work, behind all that was sent so far.
    fn probe(&self, state: &mut State) {
        if self.check_room(state, 0).is_ok() {
            // The writer is gone only when the link is closed.
            let _sent = self.send(state.runs.probe(Instant::now()));
        }
    }

    /// What was written to the connection before may never have arrived, nor what came back.
    fn reconnected(&self) {
        let mut state = lock(&self.state);
        state
            .line(AnswerKind::Service)
            .doubt(Instant::now(), OWED_IN_DOUBT);
        if state.runs.is_in_doubt() {
            self.probe(&mut state);
        }
    }

    /// Emits what the runs have come to. Under the lock, so that no end is told before its start.
    fn tell(&self, state: &mut State) {
        let milestones = state.runs.milestones();
        if milestones.is_empty() {
            return;
        }
        if let Some((events, session)) = &self.told {
            let session = *session;
            for milestone in milestones {
                events.emit(match milestone {
                    Milestone::Started => Event::ExecutionStarted { session },
                    Milestone::Finished => Event::ExecutionFinished { session },
                    Milestone::Cancelled => Event::ExecutionCancelled { session },
                });
            }
        }
        // Who hears of this finds the events told.
        self.publish(state);
    }

    /// Notes what the next link has to know.
    fn publish(&self, state: &mut State) {
        let service = state.line(AnswerKind::Service);
        let owed = Owed {
            service: !service.is_clear(Instant::now()),
            runs: state.runs.owed(),
            ids: state.runs.ids(),
        };
        self.owed.send_if_modified(|told| {
            let changed = *told != owed;
            *told = owed;
            changed
        });
    }

    fn file(&self, state: &mut State, now: Instant, record: Record) {
        let messages = state.runs.record(now, record);
        self.tell(state);
        // One that waited is at work now.
        if !messages.is_empty() {
            self.publish(state);
        }
        // The writer is gone only when the link is closed.
        let _sent = self.send(messages);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
