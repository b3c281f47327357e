//! From the frames of a call to the frames of its reply.
//!
//! In: header and envelope frames; out: exactly one reply for every message that is a call with
//! an understandable header. Decoding, the handler and packing run in a task of their own.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Instant;

use bytes::Bytes;
use futures_util::FutureExt as _;
use shared::log_limit::LogLimit;
use tokio::runtime::Handle;

use super::admission::Ticket;
use super::{Limits, Shared, is_call};
use crate::metrics::{count_call, count_failure};
use crate::rpc::catalogue;
use crate::rpc::failure::Failure;
use crate::rpc::frame::{self, Frames, Header, HeaderError};
use crate::rpc::msgpack::EncodeError;
use crate::rpc::service::{Call, Peer, Service};
use crate::rpc::transport::{Link, SendOutcome};
use crate::rpc::value::Value;

/// Longest request that is decoded on the transport's thread, in bytes; real ones that are answered
/// at once have about 40.
const SHORT_REQUEST: usize = 1024;

#[derive(Clone)]
pub(super) struct Answerer {
    pub(super) service: Arc<dyn Service>,
    pub(super) shared: Arc<Shared>,
    pub(super) limits: Limits,
    /// Where calls run.
    pub(super) runtime: Handle,
}

impl Answerer {
    /// Takes an RPC message in: ignores, refuses, or starts its task. Never waits.
    pub(super) fn accept(&self, from: &Arc<Link>, header: &Bytes, envelope: Bytes) {
        let totals = &self.shared.totals;
        let header = match Header::decode(header) {
            Ok(header) => header,
            Err(err) => {
                totals.undecodable.fetch_add(1, Ordering::Relaxed);
                log_undecodable(from.peer(), &err);
                return;
            }
        };
        if !is_call(header.kind) {
            // CANCEL too: the handler runs to its end and is answered.
            totals.ignored.fetch_add(1, Ordering::Relaxed);
            tracing::trace!(peer = %from.peer(), kind = ?header.kind, "an RPC message is no call");
            return;
        }
        // Two changes of thread cost more than an answer that is there already.
        if envelope.len() <= SHORT_REQUEST && self.service.answers_at_once(&header.method) {
            totals.calls.fetch_add(1, Ordering::Relaxed);
            self.answer_at_once(from, &header, &envelope);
            return;
        }
        let Some(ticket) = self.admit(from, &header, envelope.len()) else {
            return;
        };
        totals.calls.fetch_add(1, Ordering::Relaxed);
        let (answerer, link) = (self.clone(), from.clone());
        let answering = async move { answerer.answer(link, header, envelope, ticket).await };
        self.start(answering);
    }

    /// Leave for one more in flight, or the refusal is sent.
    fn admit(&self, from: &Arc<Link>, header: &Header, bytes: usize) -> Option<Ticket> {
        let ours = header.method.starts_with("bai.");
        let admission = &self.shared.admission;
        match admission.admit(from.peer().connection, bytes, ours) {
            Ok(ticket) => Some(ticket),
            Err(failure) => {
                self.shared.totals.refused.fetch_add(1, Ordering::Relaxed);
                self.refuse(from, header, &failure);
                None
            }
        }
    }

    fn start(&self, task: impl Future<Output = ()> + Send + 'static) {
        let tracked = self.shared.tasks.track_future(task);
        drop(self.runtime.spawn(tracked));
    }

    /// A refusal is never worth waiting for: the queue of a connection that doesn't read is full.
    fn refuse(&self, from: &Arc<Link>, header: &Header, failure: &Failure) {
        count_failure(counted_name(&header.method), &failure.class);
        log_refused(from.peer(), &header.method, failure);
        let sent = match header.failure(failure) {
            Ok(frames) => from.try_send(&frames),
            Err(_) => SendOutcome::PeerGone,
        };
        self.count_reply(&sent, true);
    }

    /// The whole way of a short call, on the transport's thread.
    fn answer_at_once(&self, from: &Arc<Link>, header: &Header, envelope: &Bytes) {
        let begun = Instant::now();
        let answer = || {
            let call = self.read(from.peer(), header, envelope)?;
            self.service.answer_at_once(call)
        };
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(answer));
        let Some((frames, failed)) = finish(header, outcome, begun) else {
            return;
        };
        let sent = from.try_send(&frames);
        if !matches!(sent, SendOutcome::Full) {
            self.count_reply(&sent, failed);
        } else if let Some(ticket) = self.admit(from, header, frames.iter().map(Bytes::len).sum()) {
            let (answerer, from) = (self.clone(), from.clone());
            self.start(async move {
                answerer.send(&from, &frames, failed).await;
                drop(ticket);
            });
        }
    }

    async fn answer(self, from: Arc<Link>, header: Header, envelope: Bytes, ticket: Ticket) {
        let begun = Instant::now();
        let outcome = AssertUnwindSafe(self.outcome(&from, &header, envelope))
            .catch_unwind()
            .await;
        if let Some((frames, failed)) = finish(&header, outcome, begun) {
            self.send(&from, &frames, failed).await;
        }
        drop(ticket);
    }

    async fn send(&self, to: &Arc<Link>, frames: &Frames, failed: bool) {
        let sent = to.send(frames, self.limits.reply_deadline).await;
        if matches!(sent, SendOutcome::Full) {
            tracing::debug!(peer = %to.peer(), "a connection that does not read is cut");
            to.end();
        }
        self.count_reply(&sent, failed);
    }

    async fn outcome(
        &self,
        from: &Link,
        header: &Header,
        envelope: Bytes,
    ) -> Result<Value, Failure> {
        let call = self.read(from.peer(), header, &envelope)?;
        drop(envelope);
        let mut answer = self.service.call(call);
        if !self.service.ends_with_its_caller(&header.method) {
            return answer.await;
        }
        // It is begun also for a caller that leaves at once, and then takes nothing for one that has left.
        if let Poll::Ready(outcome) = futures_util::poll!(&mut answer) {
            return outcome;
        }
        tokio::select! {
            biased;
            () = from.ended() => Err(Failure::bare("CancelledError")),
            outcome = answer => outcome,
        }
    }

    fn read(&self, peer: &Peer, header: &Header, envelope: &Bytes) -> Result<Call, Failure> {
        if header.zipped {
            return Err(Failure::value_error(
                "compressed RPC messages are not supported; switch compression off",
            ));
        }
        let (args, kwargs) = frame::read_request(envelope, &self.limits.decode)
            .map_err(|err| Failure::from(&err))?;
        Ok(Call {
            method: header.method.clone(),
            args,
            kwargs,
            peer: peer.clone(),
        })
    }

    fn count_reply(&self, sent: &SendOutcome, failed: bool) {
        let totals = &self.shared.totals;
        let add = |total: &AtomicU64| total.fetch_add(1, Ordering::Relaxed);
        match sent {
            SendOutcome::Accepted => {
                add(&totals.replies);
                if failed {
                    add(&totals.failures);
                }
            }
            SendOutcome::PeerGone | SendOutcome::Full => {
                add(&totals.undeliverable);
            }
        }
    }
}

/// Counts a call and packs its reply; the flag says whether that is a failure.
fn finish(
    header: &Header,
    outcome: Result<Result<Value, Failure>, Box<dyn Any + Send>>,
    begun: Instant,
) -> Option<(Frames, bool)> {
    let outcome = outcome.unwrap_or_else(|panic| Err(panicked(&header.method, &*panic)));
    if let Err(failure) = &outcome {
        tracing::debug!(method = header.method, err = %failure, "an RPC call failed");
    }
    let failed = outcome.is_err();
    let class = outcome.as_ref().err().map(|failure| failure.class.as_str());
    count_call(counted_name(&header.method), class, begun.elapsed());
    match pack(header, outcome) {
        Ok(frames) => Some((frames, failed)),
        Err(err) => {
            tracing::error!(method = header.method, %err, "a reply could not be packed");
            None
        }
    }
}

/// The method's name in counters: one of ours, whatever the caller wrote.
fn counted_name(method: &str) -> &'static str {
    match catalogue::find(method) {
        Some(known) => known.name,
        None if method.starts_with("bai.") => "bai",
        None => "unknown",
    }
}

/// The reply; a value that can't be packed becomes a failure that can.
fn pack(header: &Header, outcome: Result<Value, Failure>) -> Result<Frames, EncodeError> {
    let failure = match outcome {
        Ok(value) => match header.result(&value) {
            Ok(frames) => return Ok(frames),
            Err(err) => Failure::type_error(format!(
                "the result of {} can't be sent: {err}",
                header.method
            )),
        },
        Err(failure) => failure,
    };
    header.failure(&failure)
}

fn panicked(method: &str, panic: &(dyn Any + Send)) -> Failure {
    let text = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    tracing::error!(method, text, "an RPC handler panicked");
    Failure::runtime_error(format!("the agent's handler of {method} failed: {text}"))
}

/// One that is refused is followed by many, so most of them log at debug.
fn log_refused(peer: &Peer, method: &str, failure: &Failure) {
    static LIMIT: Mutex<LogLimit> = Mutex::new(LogLimit::new());
    let passed = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).pass();
    if let Some(suppressed) = passed {
        tracing::warn!(%peer, method, err = %failure, suppressed, "an RPC call was refused");
    } else {
        tracing::debug!(%peer, method, err = %failure, "an RPC call was refused");
    }
}

/// Anybody can send these at will, so most of them log at debug.
fn log_undecodable(peer: &Peer, err: &HeaderError) {
    static LIMIT: Mutex<LogLimit> = Mutex::new(LogLimit::new());
    let passed = LIMIT.lock().unwrap_or_else(PoisonError::into_inner).pass();
    if let Some(suppressed) = passed {
        tracing::warn!(%peer, %err, suppressed, "an RPC message with an undecodable header was dropped");
    } else {
        tracing::debug!(%peer, %err, "an RPC message with an undecodable header was dropped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rpc::frame::{Envelope, Kind};

    fn header() -> Header {
        Header {
            kind: Kind::Function,
            method: "m".into(),
            order_key: "".into(),
            sequence: 0.into(),
            zipped: false,
        }
    }

    #[test]
    fn an_unpackable_result_becomes_a_failure() {
        let unpackable = Value::Enum {
            class: "no-module".into(),
            value: Box::new("x".into()),
        };
        let frames = pack(&header(), Ok(unpackable)).unwrap();
        assert_eq!(Header::decode(&frames[1]).unwrap().kind, Kind::Failure);
        let failure = Envelope::decode(&frames[2]).unwrap().failure().unwrap();
        assert_eq!(failure.class, "TypeError");
        assert!(failure.repr.contains("result of m"), "{}", failure.repr);
    }
}
