//! One run: what it waits for, and what it has produced that no client has taken yet.
//!
//! In: the runner's records in order. Out: results cut at the ends of steps. Invariant: what is held is
//! bounded; where a client may be at it, reading is held up for a moment before anything is dropped.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::earlier::digest;
use super::{Ending, RunLimits, Taken};
use crate::kernel::runner_link::frame::{Outgoing, Record, Step, Stream};

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub(super) enum Phase {
    Waiting,
    Current,
    Ended,
}

#[derive(Debug)]
pub(super) struct Run {
    pub(super) phase: Phase,
    /// The messages of the last starting request: its repetition is recognised by content.
    pub(super) content: Vec<Outgoing>,
    /// The same in few bytes, for the next life of the agent, which has only that.
    pub(super) request: Option<String>,
    /// Messages not sent yet (while waiting or held).
    pub(super) unsent: Vec<Outgoing>,
    /// Nothing of it is sent, also in its turn.
    pub(super) held: bool,
    /// `finished` messages still expected from the runner.
    pub(super) expected: u32,
    pub(super) records: VecDeque<Record>,
    pub(super) weight: usize,
    /// Since when there is so much that a client should take it before more is read.
    pub(super) full_since: Option<Instant>,
    /// A client has taken a result of it.
    pub(super) has_client: bool,
    pub(super) ends: usize,
    pub(super) dropped: u64,
    pub(super) started: Instant,
    pub(super) polled: Instant,
    pub(super) pollers: u32,
    /// Taken over from before our start, and nothing of it seen yet: it may not exist at all.
    pub(super) tentative: bool,
    /// An earlier life of the agent has told its start and not its end.
    pub(super) owed: bool,
    /// The runner has said something of it to us.
    pub(super) seen: bool,
    /// Steps of its present request that have ended.
    pub(super) steps: u8,
    pub(super) last: Option<Taken>,
    /// Bytes of that.
    pub(super) last_weight: usize,
}

const MARKER_PREFIX: &str = "[bai-agent: ";
/// How many times longer a client that has taken a result is waited for.
const RETURN: u32 = 4;
/// Ends of steps that are kept: a request has three, and a client takes one with each result.
const ENDS: usize = 1024;
/// Consecutive text of one stream is merged up to this size, so that dropping the oldest stays fine-grained.
const MERGE_LIMIT: usize = 64 * 1024;

impl Run {
    pub(super) fn new(now: Instant, phase: Phase) -> Self {
        Self {
            phase,
            content: Vec::new(),
            request: None,
            unsent: Vec::new(),
            held: false,
            expected: 0,
            records: VecDeque::new(),
            weight: 0,
            full_since: None,
            has_client: false,
            ends: 0,
            dropped: 0,
            started: now,
            polled: now,
            pollers: 0,
            tentative: false,
            owed: false,
            seen: false,
            steps: 0,
            last: None,
            last_weight: 0,
        }
    }

    /// Of the run of an earlier life: whether there is one.
    pub(super) fn is_under_way(&self) -> bool {
        self.phase == Phase::Current || (self.phase == Phase::Waiting && self.owed)
    }

    /// Whether it has begun and not ended, as far as anybody knows.
    pub(super) fn is_live(&self) -> bool {
        self.phase != Phase::Ended && (!self.tentative || self.owed)
    }

    /// Notes what it is asked for now.
    pub(super) fn ask(&mut self, messages: &[Outgoing]) {
        self.content = messages.to_vec();
        self.request = Some(digest(messages));
    }

    /// Whether that is what it was asked for last.
    pub(super) fn was_asked(&self, messages: &[Outgoing]) -> bool {
        match &self.request {
            Some(request) if self.content.is_empty() => *request == digest(messages),
            _ => self.content == messages,
        }
    }

    /// Whether the end of this step is this run's and not the answer to a probe; `None` when its
    /// request is not known.
    pub(super) fn owns(&self, step: Step) -> Option<bool> {
        if self.content.is_empty() || self.expected > 1 {
            return None;
        }
        let has_steps = self.content.iter().any(|message| message.kind == "clean");
        Some(match step {
            Step::Clean => has_steps && self.steps == 0,
            Step::Build => has_steps && self.steps == 1,
            Step::Run => true,
        })
    }

    /// Ends a run whose end was lost. True when that has to be told.
    pub(super) fn lose(&mut self, now: Instant, limits: &RunLimits) -> bool {
        let live = self.is_live();
        if live {
            let words = "the run has ended; how, and what it said last, was lost when the agent was restarted or the container's network was changed";
            self.end_in_words(now, words, limits);
        }
        self.phase = Phase::Ended;
        self.polled = now;
        live
    }

    /// Ends a run of which the runner was sent nothing. The same request is a new one afterwards.
    pub(super) fn end_unsent(&mut self, now: Instant, why: &str, limits: &RunLimits) {
        self.unsent = Vec::new();
        self.held = false;
        self.content = Vec::new();
        self.request = None;
        self.expected = 0;
        self.end_in_words(now, &format!("the run was not started: {why}"), limits);
        self.phase = Phase::Ended;
        self.polled = now;
    }

    /// Words of ours and an end without an exit code. The runner has said nothing.
    fn end_in_words(&mut self, now: Instant, words: &str, limits: &RunLimits) {
        let seen = self.seen;
        let words = format!("{MARKER_PREFIX}{words}]\n");
        self.push(now, Record::Text(Stream::Stderr, words), limits);
        self.push(now, Record::StepEnd(Step::Run, None), limits);
        self.seen = seen;
    }

    pub(super) fn push(&mut self, now: Instant, record: Record, limits: &RunLimits) {
        self.tentative = false;
        self.seen = true;
        if let (Some(Record::Text(last_stream, last)), Record::Text(stream, text)) =
            (self.records.back_mut(), &record)
            && last_stream == stream
            && last.len() + text.len() <= MERGE_LIMIT
        {
            last.push_str(text);
            self.weight += text.len();
        } else {
            self.weight += record.weight();
            if is_end(&record) {
                self.ends += 1;
            }
            self.records.push_back(record);
        }
        while self.ends > ENDS {
            self.drop_first();
        }
        while (self.weight > limits.bytes || self.records.len() > limits.records)
            && self.drop_oldest()
        {}
        if self.is_full(limits) {
            self.full_since.get_or_insert(now);
        }
    }

    /// Whether there is enough for a result, well before any of it is dropped.
    fn is_full(&self, limits: &RunLimits) -> bool {
        self.records.len() >= limits.records.div_ceil(2) || self.weight >= limits.result_bytes
    }

    /// For how long more is not to be read, unless a client takes what is there.
    pub(super) fn holds_up(&self, now: Instant, limits: &RunLimits) -> Option<Duration> {
        let waited = now.saturating_duration_since(self.full_since?);
        // One who has taken a result is on the way with it, and comes back for more.
        let patience = match self.has_client {
            true => limits.hold_up * RETURN,
            false => limits.hold_up,
        };
        patience.checked_sub(waited).filter(|left| !left.is_zero())
    }

    /// Drops the oldest piece of output, and an end of a step only where nothing else is.
    fn drop_oldest(&mut self) -> bool {
        let output = self.records.iter().position(|record| !is_end(record));
        let Some(record) = self.records.remove(output.unwrap_or_default()) else {
            return false;
        };
        self.forget(&record);
        true
    }

    fn drop_first(&mut self) {
        if let Some(record) = self.records.pop_front() {
            self.forget(&record);
        }
    }

    /// Of a record that is no longer there.
    fn forget(&mut self, record: &Record) {
        self.weight = self.weight.saturating_sub(record.weight());
        if is_end(record) {
            self.ends = self.ends.saturating_sub(1);
        } else {
            let bytes = u64::try_from(record.weight()).unwrap_or(u64::MAX);
            self.dropped = self.dropped.saturating_add(bytes);
        }
    }

    pub(super) fn drop_output(&mut self) {
        self.full_since = None;
        let all = std::mem::take(&mut self.records);
        for record in all {
            match is_end(&record) {
                true => self.records.push_back(record),
                false => self.forget(&record),
            }
        }
    }

    /// What it takes once it has ended: its request, what was not fetched, and the last result.
    pub(super) fn bytes(&self) -> usize {
        let request = self.content.iter().map(|message| message.payload.len());
        request.sum::<usize>() + self.weight + self.last_weight
    }

    /// Whether there is more than the ends of its steps.
    pub(super) fn holds_output(&self) -> bool {
        !self.content.is_empty() || self.records.iter().any(|record| !is_step(record))
    }

    /// Drops all but the ends of its steps.
    pub(super) fn shed(&mut self) {
        self.content = Vec::new();
        self.request = None;
        self.full_since = None;
        for record in std::mem::take(&mut self.records) {
            match is_step(&record) {
                true => self.records.push_back(record),
                false => self.forget(&record),
            }
        }
    }

    /// Keeps its last result, for a client that asks again.
    pub(super) fn keep_last(&mut self, taken: &Taken) {
        let options = match &taken.ending {
            Ending::WaitingInput(options) => Record::WaitingInput(options.clone()).weight(),
            _ => 0,
        };
        self.last_weight = options + taken.records.iter().map(Record::weight).sum::<usize>();
        self.last = Some(taken.clone());
    }

    pub(super) fn take(&mut self, now: Instant, flush: bool, limits: &RunLimits) -> Option<Taken> {
        if !(self.ends > 0 || flush || self.is_full(limits)) {
            return None;
        }
        let mut records = Vec::new();
        if self.dropped > 0 {
            let words = format!(
                "{MARKER_PREFIX}about {} bytes of earlier output were dropped, nobody read them in time]\n",
                self.dropped
            );
            records.push(Record::Text(Stream::Stderr, words));
            self.dropped = 0;
        }
        let mut taken_bytes = 0;
        let mut ending = Ending::Continued;
        while let Some(record) = self.records.pop_front() {
            self.weight = self.weight.saturating_sub(record.weight());
            match record {
                Record::StepEnd(step, exit_code) => {
                    self.ends = self.ends.saturating_sub(1);
                    ending = Ending::Step(step, exit_code);
                    break;
                }
                Record::WaitingInput(options) => {
                    self.ends = self.ends.saturating_sub(1);
                    ending = Ending::WaitingInput(options);
                    break;
                }
                output => {
                    taken_bytes += output.weight();
                    records.push(output);
                    if taken_bytes >= limits.result_bytes {
                        break;
                    }
                }
            }
        }
        // Somebody is at it: what is still too much has its time anew.
        self.full_since = self.is_full(limits).then_some(now);
        self.has_client = true;
        Some(Taken { records, ending })
    }
}

fn is_step(record: &Record) -> bool {
    matches!(record, Record::StepEnd(..))
}

fn is_end(record: &Record) -> bool {
    matches!(record, Record::StepEnd(..) | Record::WaitingInput(_))
}
