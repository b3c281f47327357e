//! Kernels that have ended, for those who ask afterwards and over restarts of the agent.
//!
//! In: a kernel at its end. Out: its last view, in memory and as a file beside the journal. Invariants: no
//! secret and nothing big stays; the newest [`ENDED_KEPT`] are remembered.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::kernel::phase_of;
use super::{Kernel, KernelView, outcome};
use crate::kernel::death::Death;
use crate::kernel::journal::{Damaged, Journal, JournalError, StoredEnding};
use crate::kernel::lifecycle::{Ending, Reason, State};
use crate::kernel::record::Record;

/// How many ended kernels are remembered for those who ask, over restarts of the agent too.
pub(super) const ENDED_KEPT: usize = 256;

/// A kernel that has ended.
#[derive(Clone, Debug)]
pub struct EndedKernel {
    /// The last view.
    pub view: KernelView,
    /// When it ended.
    pub at: SystemTime,
}

/// The same on the disk: the record has the ending, but for what the kernel died of.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredEnd {
    /// Seconds since the epoch.
    at: f64,
    death: Option<Death>,
    record: Record,
}

impl EndedKernel {
    /// A kernel that ends now.
    pub fn now(kernel: &Kernel) -> EndedKernel {
        let mut view = kernel.view();
        view.record.forget_details();
        view.record.phase = phase_of(&view.state);
        view.record.ending = outcome(&view.state).map(stored);
        EndedKernel {
            view,
            at: SystemTime::now(),
        }
    }

    /// Writes it beside the journal, in the place of an earlier life's. Blocks.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self, ends: &Journal) -> Result<(), JournalError> {
        let end = StoredEnd {
            at: crate::events::unix_seconds(self.at),
            death: outcome(&self.view.state).and_then(|ending| ending.death),
            record: self.view.record.clone(),
        };
        ends.store(self.view.id, &end)
    }

    /// The last ones on the disk, oldest first; others are removed. Blocks.
    ///
    /// # Errors
    /// The directory cannot be read. Single files that cannot are told of.
    pub fn load(ends: &Journal) -> Result<(Vec<EndedKernel>, Vec<Damaged>), JournalError> {
        let (found, mut damaged) = ends.load::<StoredEnd>()?;
        let mut kernels = Vec::new();
        for (id, end) in found {
            match end.read() {
                Some(ended) if ended.view.id == id => kernels.push(ended),
                _ => damaged.push(ends.put_aside(id, "no end, or no end of this kernel")),
            }
        }
        kernels.sort_by_key(|ended| ended.at);
        let surplus = kernels.len().saturating_sub(ENDED_KEPT);
        for ended in kernels.drain(..surplus) {
            // What was read is good all the same, and the next start tries again.
            let _ = ends.remove(ended.view.id);
        }
        Ok((kernels, damaged))
    }
}

impl StoredEnd {
    fn read(mut self) -> Option<EndedKernel> {
        // Earlier releases kept more.
        self.record.forget_details();
        let at = Duration::try_from_secs_f64(self.at).ok()?;
        let ending = self.record.ending.as_ref()?;
        let ending = Ending {
            reason: Reason::from_text(&ending.reason),
            suppress: ending.suppress,
            exit_code: ending.exit_code,
            death: self.death,
        };
        Some(EndedKernel {
            view: KernelView {
                id: self.record.id(),
                state: State::Ended(ending),
                record: self.record,
            },
            at: SystemTime::UNIX_EPOCH.checked_add(at)?,
        })
    }
}

/// As the journal has it.
pub(super) fn stored(ending: &Ending) -> StoredEnding {
    StoredEnding {
        reason: ending.reason.to_string(),
        suppress: ending.suppress,
        exit_code: ending.exit_code,
    }
}
