//! The probe: whether the runner is at work, asked where messages may have been lost.
//!
//! In: the moment of a new connection, the ends of steps. Out: the messages that ask, and whose each end
//! of a step is. Invariant: the two answers come of no run, in this order, after the end of all that was
//! sent before; what looks like one of them and may be a run's is held until the next record tells.

use std::time::{Duration, Instant};

use super::{Milestone, Phase, RunTable};
use crate::kernel::runner_link::frame::{Outgoing, Record, Step};

/// A question to the runner that it answers when all that was sent before is over.
#[derive(Debug)]
pub(super) struct Probe {
    asked: Instant,
    /// After how long it is asked again: the question or its answer may be lost, too.
    again: Duration,
    /// Requests on the current run that were sent after it.
    pub(super) newer: u32,
}

/// Connections that end as soon as they are open are not probed each time, but once more at last.
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// How long after a new connection's first probe the second comes; doubled with each further one.
const PROBE_AGAIN: Duration = Duration::from_secs(10);
/// A lost probe holds up new runs for this long at most.
const PROBE_AGAIN_LAST: Duration = Duration::from_secs(300);
/// The two answers to a probe come one right after the other.
const HELD_FOR: Duration = Duration::from_secs(1);

/// Whose the end of a step is.
pub(super) enum Sifted {
    /// The run's, like everything else.
    Own,
    /// The run's or the first answer to a probe: what comes next tells.
    Either,
    /// The first answer to a probe.
    Probe,
    /// The second one.
    Answered,
}

impl RunTable {
    /// The messages that ask the runner whether it is at work. They must be the last ones sent so far.
    pub fn probe(&mut self, now: Instant) -> Vec<Outgoing> {
        if let Some(probe) = &mut self.probe
            && now.saturating_duration_since(probe.asked) < PROBE_PAUSE
        {
            probe.again = PROBE_PAUSE;
            return Vec::new();
        }
        self.ask(now, PROBE_AGAIN)
    }

    /// The same again, when there was no answer for long. The runner answers all of them.
    pub fn probe_again(&mut self, now: Instant) -> Vec<Outgoing> {
        match &self.probe {
            Some(probe) if now.saturating_duration_since(probe.asked) >= probe.again => {
                let again = probe.again.saturating_mul(2);
                self.ask(now, again.clamp(PROBE_AGAIN, PROBE_AGAIN_LAST))
            }
            _ => Vec::new(),
        }
    }

    fn ask(&mut self, now: Instant, again: Duration) -> Vec<Outgoing> {
        self.probe = Some(Probe {
            asked: now,
            again,
            newer: 0,
        });
        self.probed = true;
        vec![Outgoing::text("build", ""), Outgoing::text("clean", "")]
    }

    /// Everything that was sent before the probe is over.
    pub(super) fn answered(&mut self, now: Instant) -> Vec<Outgoing> {
        let Some(probe) = self.probe.take() else {
            return Vec::new();
        };
        if self.holds_current() {
            return Vec::new();
        }
        let mut lost = false;
        if let Some(run) = self
            .current
            .as_ref()
            .and_then(|run_id| self.runs.get_mut(run_id))
        {
            if probe.newer > 0 {
                run.expected = run.expected.min(probe.newer);
                return Vec::new();
            }
            lost = run.lose(now, &self.limits);
            self.current = None;
            self.forget_surplus();
        } else if let Some(orphan) = &mut self.orphan {
            if orphan.is_under_way() {
                lost = orphan.lose(now, &self.limits);
            } else if orphan.phase == Phase::Waiting {
                self.orphan = None;
            }
        }
        if lost {
            self.milestones.push(Milestone::Cancelled);
            self.end_told = true;
        }
        self.next(now)
    }

    /// Whose the end of a step is; all else is the run's.
    pub(super) fn sift(&mut self, record: &Record) -> Sifted {
        let (Record::StepEnd(step, _), true) = (record, self.probed) else {
            return Sifted::Own;
        };
        let unsent = self.holds_current();
        let run = match &self.current {
            Some(_) if unsent => None,
            Some(run_id) => self.runs.get_mut(run_id),
            None => self
                .orphan
                .as_mut()
                .filter(|orphan| orphan.phase != Phase::Ended),
        };
        let unseen =
            self.current.is_none() && run.as_ref().is_some_and(|run| run.phase == Phase::Waiting);
        if unseen && *step == Step::Clean && !self.armed {
            // The rest of an answer to a probe of an earlier life, or the first step of a run whose
            // next ones will show it.
            return Sifted::Probe;
        }
        let owns = run.as_ref().map_or(Some(false), |run| run.owns(*step));
        let sifted = match (step, owns) {
            (Step::Build, Some(false)) => Sifted::Probe,
            (Step::Build, None) => Sifted::Either,
            (Step::Clean, Some(false)) => Sifted::Answered,
            (Step::Clean, _) if self.armed => Sifted::Answered,
            _ => Sifted::Own,
        };
        self.armed = matches!(sifted, Sifted::Probe | Sifted::Either);
        if let (Sifted::Own, Some(run)) = (&sifted, run) {
            run.steps = match step {
                Step::Run => 0,
                Step::Clean | Step::Build => run.steps.saturating_add(1),
            };
        }
        sifted
    }

    /// Files what was held for a second answer that has not come.
    pub(super) fn release_held(&mut self, now: Instant) {
        let late =
            |(since, _): &mut (Instant, Record)| now.saturating_duration_since(*since) >= HELD_FOR;
        if let Some((_, held)) = self.held.take_if(late) {
            let _none = self.file(now, held);
        }
    }
}
