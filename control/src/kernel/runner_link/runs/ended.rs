//! Runs that have ended, and how long they are kept.
//!
//! In: the runs, the limits. Out: fewer of them, and less of each. Invariant: all of them together are bounded in
//! number and in bytes; what a client has yet to fetch goes last, and of that the end goes after the output.

use super::RunTable;
use super::run::{Phase, Run};

impl RunTable {
    /// Forgets what is too much: runs whose last result was given first, the oldest of them first.
    pub(super) fn forget_surplus(&mut self) {
        for fetched in [true, false] {
            while self.ended(fetched).count() > self.limits.ended {
                match self.oldest(|run| run.records.is_empty() == fetched) {
                    Some(run_id) => self.runs.remove(&run_id),
                    None => break,
                };
            }
        }
        while self.ended_bytes() > self.limits.ended_bytes {
            let fetched = self.oldest(|run| run.records.is_empty());
            let holding = self.oldest(Run::holds_output);
            match (fetched, holding) {
                (None, Some(run_id)) => {
                    if let Some(run) = self.runs.get_mut(&run_id) {
                        run.shed();
                    }
                }
                // What is left are ends, and ids of any length.
                (fetched, _) => match fetched.or_else(|| self.oldest(|_| true)) {
                    Some(run_id) => drop(self.runs.remove(&run_id)),
                    None => return,
                },
            }
        }
    }

    fn ended(&self, fetched: bool) -> impl Iterator<Item = &Run> {
        let ended = self.runs.values().filter(|run| run.phase == Phase::Ended);
        ended.filter(move |run| run.records.is_empty() == fetched)
    }

    /// What those that have ended take, apart from a few hundred bytes each.
    fn ended_bytes(&self) -> usize {
        let ended = self.runs.iter();
        let ended = ended.filter(|(_, run)| run.phase == Phase::Ended);
        ended.map(|(run_id, run)| run_id.len() + run.bytes()).sum()
    }

    /// The one of such runs that no client has asked for longest. One that is at it now is to have it.
    fn oldest(&self, such: impl Fn(&Run) -> bool) -> Option<String> {
        let ended = self.runs.iter();
        let ended = ended.filter(|(_, run)| run.phase == Phase::Ended && run.pollers == 0);
        let oldest = ended
            .filter(|(_, run)| such(run))
            .min_by_key(|(_, run)| run.polled);
        oldest.map(|(run_id, _)| run_id.clone())
    }
}
