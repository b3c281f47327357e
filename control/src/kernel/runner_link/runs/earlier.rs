//! The runs of an earlier life of the agent: whose they are, and who may go on with them.
//!
//! In: what the journal knows, the ids that clients go on with. Out: the run of old at its client, an end for
//! each other. Invariant: what the runner says of a run of old reaches nobody but its client, where the journal
//! names that; whoever goes on with a run that was lost is told so and does not wait.

use std::time::Instant;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::run::{Phase, Run};
use super::{Milestone, OWED_AT_MOST, RunTable, Submission, WAITING};
use crate::kernel::runner_link::frame::Outgoing;

/// Longest run id that is noted.
const ID_LENGTH: usize = 256;

/// Whose the runs are that have not ended. Some may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunIds {
    /// The run the runner works on.
    pub current: Option<String>,
    /// What that was asked for, as `digest` has it; none where that is not known.
    pub request: Option<String>,
    /// Those that wait for their turn: the runner has nothing of them.
    pub waiting: Vec<String>,
}

impl RunIds {
    /// What of this one `other` names, too.
    pub fn known_to(&self, other: &RunIds) -> RunIds {
        let known =
            |id: &&String| other.current.as_ref() == Some(*id) || other.waiting.contains(id);
        let same = self.current.is_some() && self.current == other.current;
        let request = self.request.as_ref();
        let request = request.filter(|_| same && self.request == other.request);
        RunIds {
            current: self.current.iter().find(known).cloned(),
            request: request.cloned(),
            waiting: self.waiting.iter().filter(known).cloned().collect(),
        }
    }
}

/// What a run is asked for, in few bytes that stay the same: hexadecimal.
pub(super) fn digest(messages: &[Outgoing]) -> String {
    let mut digest = Sha256::new();
    for message in messages {
        digest.update(message.kind);
        // Where a payload ends is told by its length.
        digest.update((message.payload.len() as u64).to_be_bytes());
        digest.update(&message.payload);
    }
    format!("{:x}", digest.finalize())
}

impl RunTable {
    /// An earlier life has told that so many runs started, and not that they ended. The runner works
    /// on one of them at most; the others were never sent.
    pub fn owe(&mut self, now: Instant, runs: u32, ids: RunIds) {
        let Some(orphan) = &mut self.orphan else {
            return;
        };
        let runs = runs.min(OWED_AT_MOST) as usize;
        let unsent = runs.saturating_sub(1).max(ids.waiting.len().min(runs));
        orphan.owed = runs > unsent;
        let cancelled = std::iter::repeat_n(Milestone::Cancelled, unsent);
        self.milestones.extend(cancelled);
        self.end_told |= unsent > 0;
        for run_id in ids.waiting.into_iter().take(WAITING as usize) {
            let mut run = Run::new(now, Phase::Waiting);
            let why = "it still waited for its turn when the agent was restarted";
            run.end_unsent(now, why, &self.limits);
            self.runs.insert(run_id, run);
        }
        if let Some(run_id) = &ids.current {
            self.runs.remove(run_id);
        }
        if let Some(orphan) = &mut self.orphan {
            orphan.request = ids.current.as_ref().and(ids.request);
        }
        self.earlier = ids.current;
    }

    /// How many runs were told to have started and not to have ended.
    pub fn owed(&self) -> u32 {
        let orphan = self.orphan.iter().filter(|orphan| orphan.is_under_way());
        let live = self.runs.values().filter(|run| run.is_live()).count() + orphan.count();
        u32::try_from(live).unwrap_or(u32::MAX)
    }

    /// Whose those are.
    pub fn ids(&self) -> RunIds {
        let orphan = self.orphan.iter().filter(|orphan| orphan.is_under_way());
        let of_old = self.earlier.iter().zip(orphan);
        let held = self.holds_current();
        let (unsent, at_work) = match &self.current {
            Some(id) if held => (Some(id), None),
            current => (None, current.as_ref()),
        };
        let at_work = at_work.into_iter();
        let at_work = at_work.filter_map(|id| Some((id, self.runs.get(id)?)));
        let short = |id: &&String| id.len() <= ID_LENGTH;
        let found = at_work.chain(of_old).find(|(id, _)| short(id));
        let waiting = unsent.into_iter().chain(&self.waiting);
        RunIds {
            current: found.map(|(id, _)| id.clone()),
            request: found.and_then(|(_, run)| run.request.clone()),
            waiting: waiting.filter(short).cloned().collect(),
        }
    }

    /// The run of old, for a client that goes on with it. What the runner is at may be taken over while
    /// nothing else is current.
    pub(super) fn orphan_of(&mut self, run_id: &str) -> Option<Run> {
        let free = self.current.is_none();
        let its_own = self.earlier.as_ref().is_none_or(|id| id == run_id);
        self.orphan
            .take_if(|orphan| its_own && (free || orphan.phase == Phase::Ended))
    }

    /// Whether a request is the one once more that the run of old was begun with: whoever sends it has not
    /// heard of that. One that has ended counts as long as those whose output nobody has fetched.
    pub(super) fn repeats_old(&self, now: Instant, run_id: &str, request: &Submission) -> bool {
        let is_kept = |run: &Run| {
            run.phase != Phase::Ended
                || now.saturating_duration_since(run.polled) < self.limits.unread
        };
        self.earlier.as_deref() == Some(run_id)
            && self.orphan.as_ref().is_some_and(|orphan| {
                is_kept(orphan) && orphan.request.is_some() && orphan.was_asked(&request.messages)
            })
    }

    /// The run of old was never sent, if it is this one: its request is a new one when it comes again.
    pub fn forget_request(&mut self, run_id: &str) {
        if self.earlier.as_deref() == Some(run_id)
            && let Some(orphan) = &mut self.orphan
        {
            orphan.request = None;
        }
    }

    /// What a client is told that goes on with a run of which nothing is known, while it is known whose
    /// the run of old was: this one was lost, or is over for long.
    pub(super) fn lost(&self, now: Instant) -> Option<Run> {
        self.earlier.as_ref()?;
        let mut run = Run::new(now, Phase::Waiting);
        run.lose(now, &self.limits);
        Some(run)
    }

    /// A new run begins: the run of old is over. Its client has yet to come, where it is known whose it is.
    pub(super) fn settle_orphan(&mut self) {
        let Some(orphan) = self.orphan.take() else {
            return;
        };
        if orphan.is_under_way() {
            self.milestones.push(Milestone::Cancelled);
        }
        if let Some(run_id) = &self.earlier
            && orphan.phase == Phase::Ended
            && !self.runs.contains_key(run_id)
        {
            self.runs.insert(run_id.clone(), orphan);
        }
    }

    /// Whether records of an unknown, unfinished run were seen after a restart.
    pub(super) fn orphan_works(&self) -> bool {
        self.orphan
            .as_ref()
            .is_some_and(|orphan| orphan.phase == Phase::Current)
    }

    /// Whether records of a run of old were seen after a restart, finished or not.
    pub fn tells_of_unknown(&self) -> bool {
        let of_old = self.earlier.as_ref().and_then(|id| self.runs.get(id));
        self.orphan.iter().chain(of_old).any(|run| run.seen)
    }

    /// Takes over a run that the runner already works on (the batch job after a restart).
    pub fn adopt(&mut self, now: Instant, run_id: &str) {
        let idle = self.probed && self.probe.is_none() && self.orphan.is_none();
        let of_old = self.orphan.take().or_else(|| self.runs.remove(run_id));
        let mut run = of_old.unwrap_or_else(|| Run::new(now, Phase::Current));
        run.polled = now;
        if idle {
            // It was over when the runner was probed.
            run.lose(now, &self.limits);
        }
        if run.phase != Phase::Ended {
            run.phase = Phase::Current;
            run.expected = 1;
            self.current = Some(run_id.to_owned());
        }
        self.runs.insert(run_id.to_owned(), run);
        self.tell_started(run_id);
    }
}
