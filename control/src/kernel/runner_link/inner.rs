//! What the handles and the tasks of a link share: its state, its queue to the runner, what it tells.
//!
//! In: messages of the runner, requests of handles. Out: messages for the writer, answers, events. Invariants: what is
//! sent under the state's lock leaves in the order of the lock; no end of a run is told before its start.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use shared::ids::{KernelId, SessionId};
use tokio::sync::{Notify, broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::answers::AnswerLine;
use super::decoder::StreamDecoder;
use super::frame::{self, AnswerKind, Incoming, Outgoing, Record, Step, Stream};
use super::runs::{Milestone, RunTable};
use super::{LinkError, ModelServiceStatus, Owed, RunnerAddress};
use crate::events::{Event, Events};

/// Messages waiting for the socket, beyond which requests are refused.
const WRITE_QUEUE: usize = 1024;
/// Bytes of payload waiting for the socket and for their run's turn, from which on requests that carry
/// something are refused. The one before that may be of any size that an RPC can have.
const WRITE_QUEUE_BYTES: usize = 16 * 1024 * 1024;
/// Bytes of a request that is refused for the number of messages only: pings and interrupts go on.
const SMALL_REQUEST: usize = 4 * 1024;
/// How long after a new connection a service's answer may still come: the runner polls its port for up
/// to 30 s, and does something before.
pub(super) const OWED_IN_DOUBT: Duration = Duration::from_secs(45);

#[derive(Debug)]
pub(super) struct State {
    pub(super) runs: RunTable,
    pub(super) decoders: HashMap<Stream, StreamDecoder>,
    pub(super) lines: HashMap<AnswerKind, AnswerLine>,
    pub(super) last_heard: Option<Instant>,
}

impl State {
    pub(super) fn line(&mut self, kind: AnswerKind) -> &mut AnswerLine {
        let interchangeable = matches!(kind, AnswerKind::Status | AnswerKind::Apps);
        self.lines
            .entry(kind)
            .or_insert_with(|| AnswerLine::new(interchangeable))
    }
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) kernel_id: KernelId,
    /// Where the runner is now; both connections follow it. None while it moves.
    pub(super) address: watch::Sender<Option<RunnerAddress>>,
    pub(super) state: Mutex<State>,
    /// Counts changes of `state` that a waiter may care about.
    pub(super) changed: watch::Sender<u64>,
    /// A client has taken a result.
    pub(super) taken: Notify,
    pub(super) outgoing: mpsc::UnboundedSender<Outgoing>,
    pub(super) queued: AtomicUsize,
    /// Bytes of payload of the queued messages.
    pub(super) queued_bytes: AtomicUsize,
    pub(super) model_updates: broadcast::Sender<ModelServiceStatus>,
    pub(super) told: Option<(Events, SessionId)>,
    pub(super) owed: watch::Sender<Owed>,
    pub(super) closed: CancellationToken,
    pub(super) tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Inner {
    /// Messages and bytes of payload that the runner has yet to take, those of waiting runs included.
    fn backlog(&self, state: &State) -> (usize, usize) {
        let sent = self.queued_bytes.load(Ordering::Relaxed);
        let queued = self.queued.load(Ordering::Relaxed);
        (queued, sent + state.runs.unsent_bytes())
    }

    /// Refuses a request with this many bytes of payload when too much waits already.
    pub(super) fn check_room(&self, state: &State, payload: usize) -> Result<(), LinkError> {
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

    pub(super) fn send(
        &self,
        messages: impl IntoIterator<Item = Outgoing>,
    ) -> Result<(), LinkError> {
        for message in messages {
            let bytes = message.payload.len();
            self.queued.fetch_add(1, Ordering::Relaxed);
            self.queued_bytes.fetch_add(bytes, Ordering::Relaxed);
            self.outgoing.send(message).map_err(|_| LinkError::Closed)?;
        }
        Ok(())
    }

    /// Notes that a message was written.
    pub(super) fn written(&self, message: &Outgoing) {
        self.queued.fetch_sub(1, Ordering::Relaxed);
        let bytes = message.payload.len();
        self.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if self.is_flushed() {
            self.note_change();
        }
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.queued.load(Ordering::Relaxed) == 0
    }

    pub(super) fn note_change(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn join(
        &self,
        kind: AnswerKind,
        message: Outgoing,
        owed_for: Duration,
    ) -> Result<tokio::sync::oneshot::Receiver<Bytes>, LinkError> {
        self.join_locked(&mut lock(&self.state), kind, message, owed_for)
    }

    /// Takes a place and sends under one lock, so that places and messages have the same order.
    pub(super) fn join_locked(
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

    pub(super) async fn await_answer(
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
    pub(super) fn receive(&self, kind: &[u8], payload: Bytes) {
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
    pub(super) async fn hold_up(&self) {
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
    pub(super) fn probe(&self, state: &mut State) {
        if self.check_room(state, 0).is_ok() {
            // The writer is gone only when the link is closed.
            let _sent = self.send(state.runs.probe(Instant::now()));
        }
    }

    /// What was written to the connection before may never have arrived, nor what came back.
    pub(super) fn reconnected(&self) {
        let mut state = lock(&self.state);
        state
            .line(AnswerKind::Service)
            .doubt(Instant::now(), OWED_IN_DOUBT);
        if state.runs.is_in_doubt() {
            self.probe(&mut state);
        }
    }

    /// Emits what the runs have come to. Under the lock, so that no end is told before its start.
    pub(super) fn tell(&self, state: &mut State) {
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
    pub(super) fn publish(&self, state: &mut State) {
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

    pub(super) fn file(&self, state: &mut State, now: Instant, record: Record) {
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

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
