//! The runs of one kernel: which one the runner works on, which ones wait, and what they produced.
//!
//! In: requests of clients, records of the runner, the time. Out: the messages to send next, results
//! cut at step ends, and the runs' milestones. Pure: no I/O, no clock of its own.
//!
//! Invariants:
//! - At most one run is *current*: no other has had messages sent and is not finished, and the current one
//!   has, unless it is *held* for who submitted it. The runner has no correlation ids, so order is all there is.
//! - A run stays current until the runner's `finished`, whether or not a client polls; its records stay
//!   until a client takes them. (The original detaches at each step end and loses what comes next.)
//! - Records are taken only together with the end of a result, so a client that goes away loses nothing.
//! - Memory is bounded: a run nobody reads keeps its newest output; what was dropped is told in words.
//!   Reading waits a moment for a client before that, so that one which polls loses nothing.
//! - Each run that was told to have started is told to have ended, once, whether or not a client polls.
//! - Where messages may have been lost (a new agent, a new connection), the runner is *probed*: it takes
//!   an empty `build` and an empty `clean`, which do nothing, in their turn. Their answers in this order
//!   come of no run, and say that all that was sent before is over. Until then no run is sent.

mod earlier;
mod ended;
mod probe;
mod run;

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

pub use self::earlier::RunIds;
use self::probe::{Probe, Sifted};
use self::run::{Phase, Run};
use super::frame::{Outgoing, Record, Step};

/// Bounds of what a kernel's runs may hold.
#[derive(Clone, Debug)]
pub struct RunLimits {
    /// Bytes of unread records of one run.
    pub bytes: usize,
    /// Unread records of one run.
    pub records: usize,
    /// How long reading from the runner waits for a client, once half of that or [`Self::result_bytes`] is
    /// there; after that the oldest output gives way. Each result that is taken begins it anew, and four times as long.
    pub hold_up: Duration,
    /// A result with this much output is handed over as `continued` before its step ends.
    pub result_bytes: usize,
    /// Runs waiting for their turn.
    pub waiting: usize,
    /// Finished runs whose last result is kept (for the client that did not get it), and as many of those
    /// that have not been fetched.
    pub ended: usize,
    /// Bytes that finished runs may hold together: results, output that was not fetched, requests. Beyond
    /// that the oldest go, and of those that were not fetched all but the ends of their steps.
    pub ended_bytes: usize,
    /// A waiting run whose client stopped asking for this long is ended unsent.
    pub waiting_idle: Duration,
    /// A finished run that was fetched is forgotten after this long; until then a repeated request gets the
    /// same answer.
    pub ended_keep: Duration,
    /// The output of a run that nobody polls for this long is dropped; one that is over is forgotten.
    pub unread: Duration,
}

impl Default for RunLimits {
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self {
            bytes: 16 * MIB,
            records: 65_536,
            hold_up: Duration::from_secs(1),
            result_bytes: 8 * MIB,
            waiting: WAITING as usize,
            ended: 64,
            ended_bytes: 64 * MIB,
            waiting_idle: Duration::from_secs(60),
            ended_keep: Duration::from_secs(60),
            unread: Duration::from_secs(600),
        }
    }
}

/// Why a run was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunRefused {
    /// The queue of waiting runs is full.
    #[error(
        "{waiting} runs already wait for their turn in this kernel; wait for them or interrupt the running one"
    )]
    TooManyWaiting {
        /// How many wait.
        waiting: usize,
    },
    /// One run id was given too many requests that are not answered yet.
    #[error("too many requests are pending on run {run_id}")]
    TooManyRequests {
        /// The run.
        run_id: String,
    },
}

/// How a result ends.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// Time is up or enough was collected; more follows.
    Continued,
    /// A step ended.
    Step(Step, Option<i64>),
    /// The run waits for input.
    WaitingInput(Map<String, Value>),
}

/// What others than the client are told of a run: whether the kernel works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Milestone {
    /// It waits for its turn or is at work; told again with each call on it, and some seconds after
    /// another run's end: who hears of that takes the whole session for idle.
    Started,
    /// The runner has finished it.
    Finished,
    /// It will not be finished: nobody wants it any more, or its runner is gone.
    Cancelled,
}

/// Records of one result and how it ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Taken {
    /// Output in order.
    pub records: Vec<Record>,
    /// The end.
    pub ending: Ending,
}

/// A client's request on a run id.
#[derive(Clone, Debug)]
pub struct Submission {
    /// Messages for the runner; none for `continue`.
    pub messages: Vec<Outgoing>,
    /// Whether the messages lead to one `finished`.
    pub starts: bool,
}

const REQUESTS_PER_RUN: u32 = 16;
/// Runs of one kernel that wait for their turn, unless its limits say otherwise.
const WAITING: u32 = 16;
/// How many runs an earlier life can owe the end of, whatever the disk says: those and the current one.
pub const OWED_AT_MOST: u32 = WAITING + 1;

/// All runs of one kernel.
#[derive(Debug)]
pub struct RunTable {
    limits: RunLimits,
    runs: HashMap<String, Run>,
    current: Option<String>,
    waiting: VecDeque<String>,
    /// After a restart of the agent the runner may be in the middle of a run: what arrives before any
    /// run is known here is kept for the client whose it is, or for the first one that continues an id we do
    /// not know.
    orphan: Option<Run>,
    /// The id of that run, where the journal knows it.
    earlier: Option<String>,
    /// Not taken yet.
    milestones: Vec<Milestone>,
    /// An end was told since the last sweep.
    end_told: bool,
    /// What is not answered yet.
    probe: Option<Probe>,
    /// The runner was ever probed: answers may come.
    probed: bool,
    /// The first answer to a probe may have come.
    armed: bool,
    /// What may have been that, and when it came.
    held: Option<(Instant, Record)>,
}

impl RunTable {
    /// An empty table. `resumed`: the container ran before we connected.
    pub fn new(limits: RunLimits, resumed: bool, now: Instant) -> Self {
        let orphan = resumed.then(|| Run::new(now, Phase::Waiting));
        Self {
            limits,
            runs: HashMap::new(),
            current: None,
            waiting: VecDeque::new(),
            orphan,
            earlier: None,
            milestones: Vec::new(),
            end_told: false,
            probe: None,
            probed: false,
            armed: false,
            held: None,
        }
    }

    /// Whether the runner may work on something.
    pub fn is_in_doubt(&self) -> bool {
        self.probe.is_some() || self.current.is_some() || self.orphan_works()
    }

    /// The milestones since the last call. Every change of the table adds a few at most.
    pub fn milestones(&mut self) -> Vec<Milestone> {
        std::mem::take(&mut self.milestones)
    }

    /// Says that a run is under way, if it is.
    fn tell_started(&mut self, run_id: &str) {
        if self.runs.get(run_id).is_some_and(Run::is_live) {
            self.milestones.push(Milestone::Started);
        }
    }

    /// The runner is gone, and with it all that was not finished.
    pub fn abandon(&mut self) {
        let orphan = self.orphan.take().filter(Run::is_under_way);
        let runs = self.runs.drain().map(|(_, run)| run).chain(orphan);
        let live = runs.filter(Run::is_live).count();
        let cancelled = std::iter::repeat_n(Milestone::Cancelled, live);
        self.milestones.extend(cancelled);
        self.current = None;
        self.waiting.clear();
        self.probe = None;
    }

    /// The run whose turn it is.
    pub fn current(&self) -> Option<&str> {
        self.current.as_deref()
    }

    /// The run the runner works on.
    pub fn at_work(&self) -> Option<&str> {
        self.current().filter(|_| !self.holds_current())
    }

    /// For how long nothing more is to be read from the runner, unless a client takes what is there: what
    /// comes after could only be kept by dropping the oldest output.
    pub fn holds_up(&self, now: Instant) -> Option<Duration> {
        let run = self.runs.get(self.current.as_ref()?)?;
        run.holds_up(now, &self.limits)
    }

    /// Bytes of payload of the runs that wait for their turn.
    pub fn unsent_bytes(&self) -> usize {
        let waiting = self
            .waiting
            .iter()
            .filter_map(|run_id| self.runs.get(run_id));
        let unsent = waiting.flat_map(|run| &run.unsent);
        unsent.map(|message| message.payload.len()).sum()
    }

    /// Whether a request is the last one on this run once more, which sends nothing.
    pub fn repeats(&self, now: Instant, run_id: &str, request: &Submission) -> bool {
        request.starts
            && match self.runs.get(run_id) {
                Some(run) => run.was_asked(&request.messages),
                None => self.repeats_old(now, run_id, request),
            }
    }

    /// Accepts a client's request and returns the messages to send now.
    ///
    /// # Errors
    /// Too many runs wait, or too many requests of this one.
    pub fn submit(
        &mut self,
        now: Instant,
        run_id: &str,
        request: Submission,
    ) -> Result<Vec<Outgoing>, RunRefused> {
        let messages = self.accept(now, run_id, request, false)?;
        self.tell_started(run_id);
        Ok(messages)
    }

    /// Accepts a request of which nothing is sent before [`RunTable::release`], also when its turn has come: who
    /// submits it has something to note between.
    ///
    /// # Errors
    /// Too many runs wait, or another request on this run is not over.
    pub fn submit_held(
        &mut self,
        now: Instant,
        run_id: &str,
        request: Submission,
    ) -> Result<(), RunRefused> {
        let _nothing = self.accept(now, run_id, request, true)?;
        self.tell_started(run_id);
        Ok(())
    }

    fn accept(
        &mut self,
        now: Instant,
        run_id: &str,
        request: Submission,
        held: bool,
    ) -> Result<Vec<Outgoing>, RunRefused> {
        let repeated = self.repeats(now, run_id, &request);
        if let Some(run) = self.runs.get_mut(run_id) {
            run.polled = now;
            if request.messages.is_empty() || repeated {
                return Ok(Vec::new());
            }
            match run.phase {
                Phase::Current | Phase::Waiting => {
                    if request.starts && run.tentative {
                        // It may never have been there: its end is not waited for beside the new one.
                        run.tentative = false;
                        run.expected = 0;
                        run.started = now;
                    }
                    if held
                        || run.expected >= REQUESTS_PER_RUN
                        || run.unsent.len() >= 4 * REQUESTS_PER_RUN as usize
                    {
                        return Err(RunRefused::TooManyRequests {
                            run_id: run_id.to_owned(),
                        });
                    }
                    if request.starts {
                        run.expected += 1;
                        run.ask(&request.messages);
                    }
                    if run.phase == Phase::Current && !run.held {
                        if let Some(probe) = self.probe.as_mut().filter(|_| request.starts) {
                            probe.newer += 1;
                        }
                        return Ok(request.messages);
                    }
                    run.unsent.extend(request.messages);
                    return Ok(Vec::new());
                }
                // Input for a run that is over: the runner ignores it, nobody waits.
                Phase::Ended if !request.starts => return Ok(Vec::new()),
                Phase::Ended => {
                    self.runs.remove(run_id);
                }
            }
        }
        self.admit(now, run_id, request, held)
    }

    fn admit(
        &mut self,
        now: Instant,
        run_id: &str,
        request: Submission,
        held: bool,
    ) -> Result<Vec<Outgoing>, RunRefused> {
        let repeated = request.starts && self.repeats_old(now, run_id, &request);
        if (!request.starts || repeated)
            && let Some(mut run) = self.orphan_of(run_id)
        {
            // The client goes on with a run that was started before we were.
            run.polled = now;
            run.started = now;
            if run.phase != Phase::Ended {
                run.tentative = run.phase == Phase::Waiting;
                run.phase = Phase::Current;
                run.expected = 1;
                self.current = Some(run_id.to_owned());
            }
            self.runs.insert(run_id.to_owned(), run);
            return Ok(match repeated {
                true => Vec::new(),
                false => request.messages,
            });
        }
        if !request.starts
            && let Some(run) = self.lost(now)
        {
            self.runs.insert(run_id.to_owned(), run);
            self.forget_surplus();
            return Ok(Vec::new());
        }
        if request.starts && self.probe.is_none() {
            self.release_tentative();
        }
        let busy = self.current.is_some()
            || !self.waiting.is_empty()
            || self.orphan_works()
            || self.probe.is_some();
        let mut run = Run::new(now, Phase::Waiting);
        run.held = held;
        if request.starts {
            run.expected = 1;
            run.ask(&request.messages);
        } else if busy {
            // `continue` or `input` of an unknown id: there is nothing it could wait for.
            run.phase = Phase::Ended;
            self.runs.insert(run_id.to_owned(), run);
            self.forget_surplus();
            return Ok(Vec::new());
        }
        if busy {
            if self.waiting.len() >= self.limits.waiting {
                return Err(RunRefused::TooManyWaiting {
                    waiting: self.waiting.len(),
                });
            }
            run.unsent = request.messages;
            self.waiting.push_back(run_id.to_owned());
            self.runs.insert(run_id.to_owned(), run);
            return Ok(Vec::new());
        }
        run.phase = if request.starts {
            Phase::Current
        } else {
            Phase::Ended
        };
        let mut messages = request.messages;
        if request.starts {
            self.settle_orphan();
            self.current = Some(run_id.to_owned());
            if held {
                run.unsent = std::mem::take(&mut messages);
            }
        }
        self.runs.insert(run_id.to_owned(), run);
        self.forget_surplus();
        Ok(messages)
    }

    /// The messages of a run that was held, to be sent now; none while its turn has not come, when they are sent.
    pub fn release(&mut self, run_id: &str) -> Vec<Outgoing> {
        let Some(run) = self.runs.get_mut(run_id) else {
            return Vec::new();
        };
        if !std::mem::take(&mut run.held) || run.phase != Phase::Current {
            return Vec::new();
        }
        if let Some(probe) = &mut self.probe {
            probe.newer += 1;
        }
        std::mem::take(&mut run.unsent)
    }

    /// Ends a run of which nothing was sent. The messages of the next one; `None` where there is no such run.
    pub fn withdraw(&mut self, now: Instant, run_id: &str) -> Option<Vec<Outgoing>> {
        let run = self.runs.get_mut(run_id)?;
        let its_turn = run.phase == Phase::Current;
        if run.phase == Phase::Ended || (its_turn && !run.held) {
            return None;
        }
        run.end_unsent(now, "it is not wanted any more", &self.limits);
        self.milestones.push(Milestone::Cancelled);
        self.end_told = true;
        self.waiting.retain(|waiting| waiting != run_id);
        if !its_turn {
            return Some(Vec::new());
        }
        self.current = None;
        Some(self.next(now))
    }

    /// Whether the runner has nothing of the current run.
    fn holds_current(&self) -> bool {
        let run = self.current.as_ref().and_then(|id| self.runs.get(id));
        run.is_some_and(|run| run.held)
    }

    /// A run taken over by name alone must not block a new one for ever.
    fn release_tentative(&mut self) {
        let Some(run_id) = &self.current else { return };
        if let Some(run) = self.runs.get_mut(run_id)
            && run.tentative
        {
            if run.is_live() {
                self.milestones.push(Milestone::Cancelled);
            }
            run.phase = Phase::Ended;
            self.current = None;
        }
    }

    /// Files what the runner produced; returns messages of the next run when this ended the current one.
    pub fn record(&mut self, now: Instant, record: Record) -> Vec<Outgoing> {
        match self.sift(&record) {
            Sifted::Own => {}
            Sifted::Either => {
                if let Some((_, earlier)) = self.held.replace((now, record)) {
                    let _none = self.file(now, earlier);
                }
                return Vec::new();
            }
            Sifted::Probe => return Vec::new(),
            Sifted::Answered => {
                self.held = None;
                return self.answered(now);
            }
        }
        if let Some((_, held)) = self.held.take() {
            // It ends no run.
            let _none = self.file(now, held);
        }
        self.file(now, record)
    }

    fn file(&mut self, now: Instant, record: Record) -> Vec<Outgoing> {
        let finished = matches!(record, Record::StepEnd(Step::Run, _));
        let unsent = self.holds_current();
        let run = match &self.current {
            Some(_) if unsent => None,
            Some(run_id) => self.runs.get_mut(run_id),
            None => self.orphan.as_mut(),
        };
        let Some(run) = run else {
            return Vec::new();
        };
        if run.phase == Phase::Ended {
            // A second `finished` of an unknown run: keep what is there.
            return Vec::new();
        }
        run.push(now, record, &self.limits);
        if self.current.is_none() {
            run.phase = if finished {
                Phase::Ended
            } else {
                Phase::Current
            };
            run.polled = now;
            if !finished {
                return Vec::new();
            }
            self.milestones.push(Milestone::Finished);
            self.end_told = true;
            return self.next(now);
        }
        if !finished {
            return Vec::new();
        }
        run.expected = run.expected.saturating_sub(1);
        if run.expected > 0 {
            return Vec::new();
        }
        run.phase = Phase::Ended;
        run.polled = now;
        if !run.content.is_empty() {
            // That answers it as well; of a run that was taken over there may be more to come.
            self.probe = None;
        }
        self.milestones.push(Milestone::Finished);
        self.end_told = true;
        self.current = None;
        self.forget_surplus();
        self.next(now)
    }

    fn next(&mut self, now: Instant) -> Vec<Outgoing> {
        if self.probe.is_some() {
            return Vec::new();
        }
        while let Some(run_id) = self.waiting.pop_front() {
            if let Some(run) = self.runs.get_mut(&run_id) {
                run.phase = Phase::Current;
                run.started = now;
                self.current = Some(run_id);
                return match run.held {
                    true => Vec::new(),
                    false => std::mem::take(&mut run.unsent),
                };
            }
        }
        Vec::new()
    }

    /// Notes that a client waits for a result of this run.
    pub fn begin_poll(&mut self, now: Instant, run_id: &str) {
        if let Some(run) = self.runs.get_mut(run_id) {
            run.pollers += 1;
            run.polled = now;
        }
    }

    /// Notes that the client stopped waiting.
    pub fn end_poll(&mut self, now: Instant, run_id: &str) {
        if let Some(run) = self.runs.get_mut(run_id) {
            run.pollers = run.pollers.saturating_sub(1);
            run.polled = now;
        }
    }

    /// A result of the run, if one is complete, or whatever is there when `flush` (time is up).
    pub fn take(&mut self, now: Instant, run_id: &str, flush: bool) -> Option<Taken> {
        self.release_held(now);
        let Some(run) = self.runs.get_mut(run_id) else {
            return flush.then(|| Taken {
                records: Vec::new(),
                ending: Ending::Continued,
            });
        };
        if run.phase == Phase::Ended && run.records.is_empty() {
            // Everything was taken before: the reply may have been lost on its way, so say it again.
            return match &run.last {
                Some(taken) => Some(taken.clone()),
                None => flush.then(|| Taken {
                    records: Vec::new(),
                    ending: Ending::Continued,
                }),
            };
        }
        let taken = run.take(now, flush, &self.limits)?;
        if run.phase == Phase::Ended && run.records.is_empty() {
            run.keep_last(&taken);
        }
        Some(taken)
    }

    /// Forgets what nobody wants any more.
    pub fn sweep(&mut self, now: Instant) {
        self.release_held(now);
        let limits = self.limits.clone();
        let works = self.owed() > 0;
        // Not beside the end itself: who is told of both takes them in any order.
        if std::mem::take(&mut self.end_told) && works {
            self.milestones.push(Milestone::Started);
        }
        let (milestones, end_told) = (&mut self.milestones, &mut self.end_told);
        let idle = |run: &Run| now.saturating_duration_since(run.polled);
        self.runs.retain(|_, run| match run.phase {
            Phase::Waiting => {
                if run.pollers == 0 && idle(run) >= limits.waiting_idle {
                    let why = "it waited for its turn, and nobody asked for it meanwhile";
                    run.end_unsent(now, why, &limits);
                    milestones.push(Milestone::Cancelled);
                    *end_told = true;
                }
                true
            }
            Phase::Ended => {
                run.pollers > 0
                    || idle(run)
                        < if run.records.is_empty() {
                            limits.ended_keep
                        } else {
                            limits.unread
                        }
            }
            Phase::Current => true,
        });
        let waits = |run: &Run| run.phase == Phase::Waiting;
        let runs = &self.runs;
        self.waiting
            .retain(|run_id| runs.get(run_id).is_some_and(waits));
        self.forget_surplus();
        if let Some(run) = self
            .current
            .as_ref()
            .and_then(|run_id| self.runs.get_mut(run_id))
            && run.pollers == 0
            && idle(run) >= limits.unread
        {
            run.drop_output();
        }
        if let Some(orphan) = &mut self.orphan
            && idle(orphan) >= limits.unread
        {
            orphan.drop_output();
        }
    }
}

#[cfg(test)]
mod tests;
