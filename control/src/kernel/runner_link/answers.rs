//! Requests to the runner that wait for an answer.
//!
//! The runner has no correlation ids: answers of one kind come in the order of the requests of that
//! kind. In: a request's wish to wait; an answer. Out: the answer at the request it belongs to.
//! Invariant: a request that gave up keeps its place, so that its late answer reaches nobody else
//! (in the original it reaches the next request); after `owed_for` an answer counts as lost, or sooner
//! after a new connection.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;

/// Requests of one kind in flight, beyond which a new one is refused.
const IN_FLIGHT: usize = 64;

#[derive(Debug)]
struct PendingRequest {
    answer: Option<oneshot::Sender<Bytes>>,
    lost_after: Instant,
}

impl PendingRequest {
    fn gave_up(&self) -> bool {
        self.answer.as_ref().is_none_or(oneshot::Sender::is_closed)
    }
}

/// The requests of one kind, oldest first.
#[derive(Debug)]
pub struct AnswerLine {
    pending: VecDeque<PendingRequest>,
    interchangeable: bool,
}

impl AnswerLine {
    /// An empty line. `interchangeable`: all answers of this kind say the same (status, services), so
    /// one goes to the oldest request that still waits; a lost message then costs nothing.
    pub fn new(interchangeable: bool) -> Self {
        Self {
            pending: VecDeque::new(),
            interchangeable,
        }
    }

    /// Whether nothing is in flight and no answer is owed.
    pub fn is_clear(&mut self, now: Instant) -> bool {
        self.forget_lost(now);
        self.pending.is_empty()
    }

    /// Takes a place in the queue; `None` when too many are in flight. An answer that is not there `owed_for`
    /// after now is counted as lost.
    pub fn join(&mut self, now: Instant, owed_for: Duration) -> Option<oneshot::Receiver<Bytes>> {
        self.forget_lost(now);
        if self.pending.len() >= IN_FLIGHT {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        self.pending.push_back(PendingRequest {
            answer: Some(sender),
            lost_after: now + owed_for,
        });
        Some(receiver)
    }

    /// Delivers an answer; false when nobody had asked.
    pub fn answer(&mut self, now: Instant, payload: Bytes) -> bool {
        self.forget_lost(now);
        while self.interchangeable && self.pending.front().is_some_and(PendingRequest::gave_up) {
            self.pending.pop_front();
        }
        let Some(pending) = self.pending.pop_front() else {
            return false;
        };
        pending
            .answer
            .is_some_and(|sender| sender.send(payload).is_ok())
    }

    /// Requests or their answers may have been lost: those whose caller is gone are not waited for
    /// longer than `owed_for` after now.
    pub fn doubt(&mut self, now: Instant, owed_for: Duration) {
        for pending in &mut self.pending {
            pending.lost_after = pending.lost_after.min(now + owed_for);
        }
    }

    /// Drops all of them: all waiters end.
    pub fn clear(&mut self) {
        self.pending.clear();
    }

    fn forget_lost(&mut self, now: Instant) {
        while self
            .pending
            .front()
            .is_some_and(|pending| pending.gave_up() && now >= pending.lost_after)
        {
            self.pending.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use shared::ids::KernelId;

    use super::*;
    use crate::kernel::runner_link::frame::AnswerKind;
    use crate::kernel::runner_link::{LinkOptions, RunnerAddress, RunnerLink, lock};
    use crate::kernel::services::{self, ServiceStart};

    #[test]
    fn late_service_result_goes_to_the_wrong_request_in_the_original() {
        let now = Instant::now();
        let owed = Duration::from_secs(40);
        let mut line = AnswerLine::new(false);
        let first = line.join(now, owed).expect("a place");
        drop(first);
        assert!(!line.is_clear(now), "its answer is owed");
        let mut second = line.join(now, owed).expect("a place");
        assert!(
            !line.answer(now, Bytes::from_static(b"late")),
            "the late answer belongs to nobody"
        );
        assert!(second.try_recv().is_err());
        assert!(line.answer(now, Bytes::from_static(b"mine")));
        assert_eq!(
            second.try_recv().expect("answer"),
            Bytes::from_static(b"mine")
        );
        assert!(!line.answer(now, Bytes::from_static(b"stray")));
    }

    #[test]
    fn an_answer_that_never_comes_is_forgotten() {
        let now = Instant::now();
        let owed = Duration::from_secs(40);
        let mut line = AnswerLine::new(false);
        drop(line.join(now, owed));
        assert!(!line.is_clear(now + Duration::from_secs(39)));
        assert!(line.is_clear(now + owed));
    }

    /// It holds the lock of all services while a model of it starts, however long that takes.
    #[tokio::test]
    async fn a_service_is_answered_late_unless_its_connection_was_lost() {
        let nobody = RunnerAddress {
            ip: std::net::Ipv4Addr::LOCALHOST.into(),
            repl_in: 1,
            repl_out: 1,
        };
        let link = RunnerLink::open(KernelId([1; 16]), nobody, LinkOptions::default());
        let service = ServiceStart {
            name: "web".to_owned(),
            ports: vec![80],
            protocol: "http".to_owned(),
            options: serde_json::Map::new(),
        };
        let gone = services::start_service(&link, service);
        let gave_up = tokio::time::timeout(Duration::from_millis(10), gone).await;
        assert!(gave_up.is_err());
        let clear_in = |seconds| {
            let then = Instant::now() + Duration::from_secs(seconds);
            lock(&link.0.state).line(AnswerKind::Service).is_clear(then)
        };
        assert!(!clear_in(600));
        link.0.reconnected();
        assert!(!clear_in(30));
        assert!(clear_in(60));
    }

    #[test]
    fn a_late_answer_is_waited_for_until_it_may_be_lost() {
        let now = Instant::now();
        let seconds = Duration::from_secs;
        let mut line = AnswerLine::new(false);
        drop(line.join(now, seconds(3600)));
        let late = now + seconds(3000);
        assert!(!line.is_clear(late), "the runner still owes it");
        line.doubt(late, seconds(45));
        line.doubt(late + seconds(30), seconds(45));
        assert!(!line.is_clear(late + seconds(44)));
        assert!(line.is_clear(late + seconds(45)));
        // Whoever still waits for an answer has it when it comes.
        let mut waiting = line.join(now, seconds(3600)).expect("a place");
        line.doubt(now, seconds(45));
        assert!(line.answer(now + seconds(60), Bytes::from_static(b"late")));
        assert!(waiting.try_recv().is_ok());
    }

    #[test]
    fn a_lost_status_does_not_starve_the_next_ping() {
        let now = Instant::now();
        let mut line = AnswerLine::new(true);
        drop(line.join(now, Duration::from_secs(30)));
        let mut ping = line.join(now, Duration::from_secs(30)).expect("a place");
        assert!(line.answer(now, Bytes::from_static(b"alive")));
        assert!(ping.try_recv().is_ok());
        // An answer nobody waits for is gone; it does not answer the ping after it.
        assert!(!line.answer(now, Bytes::from_static(b"stale")));
        let mut later = line.join(now, Duration::from_secs(30)).expect("a place");
        assert!(later.try_recv().is_err());
    }

    #[test]
    fn requests_in_flight_are_limited() {
        let now = Instant::now();
        let mut line = AnswerLine::new(false);
        let held: Vec<_> = (0..IN_FLIGHT)
            .map(|_| line.join(now, Duration::from_secs(1)).expect("a place"))
            .collect();
        assert!(line.join(now, Duration::from_secs(1)).is_none());
        drop(held);
        assert!(
            line.join(now + Duration::from_secs(1), Duration::from_secs(1))
                .is_some()
        );
    }
}
