//! What two programs tell of the same things, thing by thing, until they agree.
//!
//! In: what each of them tells, again and again. Out: what is agreed on and what is open. Invariant: what has
//! been agreed on once stays so.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use shared::ids::ContainerId;
use shared::observed::AcceleratorRow;

use super::loads::{Holder, Loads};
use super::numbers::{ROUNDED, SAMPLED, mib, percent, show};
use super::report::Line;
use super::row_of;
use crate::nvidia_smi::{OfProcess, value};

/// What has been compared so far.
#[derive(Default)]
pub(super) struct Comparison {
    pub(super) agreed: BTreeMap<String, Line>,
    pub(super) open: BTreeMap<String, Line>,
}

impl Comparison {
    pub(super) fn is(&mut self, what: &str, ours: String, theirs: &str, same: bool) {
        if self.agreed.contains_key(what) {
            return;
        }
        let line = [what.to_owned(), ours, theirs.to_owned()];
        let list = if same {
            self.open.remove(what);
            &mut self.agreed
        } else {
            &mut self.open
        };
        list.insert(what.to_owned(), line);
    }

    /// What neither tells is told the same.
    pub(super) fn number(
        &mut self,
        what: &str,
        ours: Option<f64>,
        theirs: Option<f64>,
        near: impl Fn(f64, f64) -> bool,
    ) {
        let same = match (ours, theirs) {
            (Some(ours), Some(theirs)) => near(ours, theirs),
            (ours, theirs) => ours.is_none() && theirs.is_none(),
        };
        self.is(what, show(ours), &show(theirs), same);
    }

    pub(super) fn memory(&mut self, holder: &Holder, told: &OfProcess<f64>) {
        let theirs = holder.keys.iter().map(|key| told.get(key).copied());
        let theirs: Option<f64> = theirs.sum();
        // Whatever both say: what the programs have asked for is theirs.
        let least = mib(Some(holder.taken)).unwrap_or(0.0);
        let enough = holder.memory.is_some_and(|ours| ours >= least);
        let what = format!("{}, memory", holder.name);
        match theirs {
            // Of parts it tells none.
            None if holder.of_part => self.is(&what, show(holder.memory), "not told", enough),
            _ => self.number(&what, holder.memory, theirs, |ours, theirs| {
                (ours - theirs).abs() <= ROUNDED && enough
            }),
        }
    }

    pub(super) fn share(&mut self, holder: &Holder, told: &OfProcess<Option<f64>>) {
        let shares = holder.keys.iter().filter_map(|key| *told.get(key)?);
        let theirs = shares.reduce(|all, one| all + one);
        // One that it has no sample of is idle; or the driver takes none, which both have to say.
        let theirs = theirs.or(holder.share.map(|_| 0.0));
        let what = format!("{}, share", holder.name);
        self.number(&what, holder.share, theirs, |ours, theirs| {
            (ours - theirs).abs() <= SAMPLED
        });
    }

    /// What computes makes its device busy. Of parts `nvidia-smi` tells no share, and some drivers none.
    pub(super) fn busy(
        &mut self,
        rows: &[AcceleratorRow],
        told: &[(String, BTreeMap<String, String>)],
        loads: &Loads,
    ) -> Result<()> {
        for load in loads.all.iter().filter(|load| load.busy) {
            let row = row_of(rows, &load.device)?;
            if row.part_of.is_some() {
                let ours = percent(row.counters.utilisation_permille);
                let what = format!("{} with a load, at least half busy", row.id);
                if ours.is_some() {
                    self.is(&what, show(ours), "not told", ours >= Some(50.0));
                }
                continue;
            }
            let theirs = told.iter().find(|(id, _)| *id == row.id);
            let theirs = theirs.context("a device with a load")?;
            let theirs = value(&theirs.1["utilization.gpu"])?;
            let ours = percent(row.counters.utilisation_permille);
            let what = format!("{} with a load, at least half busy", row.id);
            self.number(&what, ours, theirs, |ours, theirs| {
                ours >= 50.0 && theirs >= 50.0
            });
        }
        Ok(())
    }

    /// Each container uses its device and no other; the program in no container is nobody's.
    pub(super) fn users(&mut self, rows: &[AcceleratorRow], loads: &Loads) {
        for row in rows {
            let expected: BTreeSet<ContainerId> = (loads.all.iter())
                .filter(|load| load.device == row.id)
                .filter_map(|load| loads.container_of(load))
                .collect();
            // Others of the machine may be at work too.
            let users: BTreeSet<ContainerId> = (row.users.iter().map(|user| user.container_id))
                .filter(|id| loads.containers().any(|own| own == *id))
                .collect();
            self.is(
                &format!("{}, containers with loads", row.id),
                users.len().to_string(),
                &expected.len().to_string(),
                users == expected,
            );
        }
    }
}
