//! What to do so that the running ports become the desired ones. Pure.
//!
//! In: the rows that run and what has changed in the desired region. Out: a list of steps. Invariant: a
//! port is closed only because control said so: its removal is on record, or it is missing from a
//! sound region that is the same that put it there. A region that says nothing yet, is damaged
//! or is another file than before closes nothing at once.

use std::collections::BTreeMap;

use shared::desired::{DesiredChanges, PortKey, PortRow};
use shared::ids::{Generation, KernelId, RegionId};

/// A row that runs and the region that asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppliedRow {
    /// The row as last applied.
    pub row: PortRow,
    /// The region it came from.
    pub region: RegionId,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Start to serve a row.
    Open(PortRow),
    /// The row leads elsewhere: retire what runs, then serve the new one.
    Replace(PortRow),
    /// Only rules changed: sessions go on under the new ones.
    Adjust(PortRow),
    /// Nothing changed but the generation or the region's identity: acknowledge.
    Acknowledge(PortRow),
    /// Stop to serve.
    Retire {
        /// Which port.
        key: PortKey,
        /// The generation that acknowledges it.
        generation: Generation,
    },
    /// It does not run and is not wanted: say so.
    Gone {
        /// Which port.
        key: PortKey,
        /// Kernel it belonged to.
        kernel_id: KernelId,
        /// The generation of its removal.
        generation: Generation,
    },
    /// A new region does not know it: keep it for a while.
    Orphan(PortKey),
}

impl Step {
    /// The port whose listener is to be closed before anything else.
    pub(super) fn ends(&self) -> Option<PortKey> {
        match self {
            Self::Replace(row) => Some(row.key()),
            Self::Retire { key, .. } => Some(*key),
            _ => None,
        }
    }
}

/// Whether sessions of one row may go on under the other.
fn same_route(a: &PortRow, b: &PortRow) -> bool {
    a.kernel_id == b.kernel_id
        && a.container_id == b.container_id
        && (a.bind, a.target, a.target_port) == (b.bind, b.target, b.target_port)
        && (a.link_index, a.link_guard) == (b.link_index, b.link_guard)
        && a.observe_only == b.observe_only
}

fn same_but_generation(a: &PortRow, b: &PortRow) -> bool {
    let mut b = b.clone();
    b.generation = a.generation;
    *a == b
}

/// The steps from `known` to what the region says now.
pub fn plan(known: &BTreeMap<PortKey, AppliedRow>, changes: &DesiredChanges) -> Vec<Step> {
    let desired = &changes.rows;
    let mut steps = Vec::new();
    if desired.committed == Generation(0) {
        return steps;
    }
    for removed in &desired.removed_ports {
        steps.push(if known.contains_key(&removed.key) {
            Step::Retire {
                key: removed.key,
                generation: removed.generation,
            }
        } else {
            Step::Gone {
                key: removed.key,
                kernel_id: removed.kernel_id,
                generation: removed.generation,
            }
        });
    }
    let unmentioned = |key: &PortKey| {
        let mentioned = desired.ports.binary_search_by_key(key, PortRow::key);
        mentioned.is_err() && !desired.is_removed(*key)
    };
    let ended = |key: &PortKey| {
        known.get(key).map(|known| match known.region {
            region if region == desired.region_id => Step::Retire {
                key: *key,
                generation: desired.committed,
            },
            _ => Step::Orphan(*key),
        })
    };
    if !changes.whole {
        steps.extend(changes.freed_ports.iter().filter_map(ended));
    } else if desired.invalid_rows == 0 {
        let unmentioned = known.keys().filter(|key| unmentioned(key));
        steps.extend(unmentioned.filter_map(ended));
    }
    for row in &desired.ports {
        let step = match known.get(&row.key()) {
            None => Step::Open(row.clone()),
            Some(known)
                if known.row.generation == row.generation && known.region == desired.region_id =>
            {
                continue;
            }
            Some(known) if same_but_generation(&known.row, row) => Step::Acknowledge(row.clone()),
            Some(known) if same_route(&known.row, row) => Step::Adjust(row.clone()),
            Some(_) => Step::Replace(row.clone()),
        };
        steps.push(step);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::desired::{DesiredSnapshot, Protocol, Removed};
    use shared::ids::ContainerId;

    const A: RegionId = RegionId([1; 16]);
    const B: RegionId = RegionId([2; 16]);

    fn row(port: u16, target_port: u16, generation: u64) -> PortRow {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port: port,
        };
        let mut row = PortRow::new(
            key,
            KernelId([7; 16]),
            ContainerId([8; 32]),
            "172.17.0.2".parse().unwrap(),
            target_port,
        );
        row.generation = Generation(generation);
        row
    }

    fn known(rows: &[PortRow], region: RegionId) -> BTreeMap<PortKey, AppliedRow> {
        rows.iter()
            .map(|row| {
                let known = AppliedRow {
                    row: row.clone(),
                    region,
                };
                (row.key(), known)
            })
            .collect()
    }

    fn whole(region_id: RegionId, committed: u64, ports: &[PortRow]) -> DesiredChanges {
        DesiredChanges {
            rows: DesiredSnapshot {
                region_id,
                epoch: 1,
                committed: Generation(committed),
                ports: ports.to_vec(),
                ..DesiredSnapshot::default()
            },
            whole: true,
            ..DesiredChanges::default()
        }
    }

    #[test]
    fn new_changed_and_unchanged_rows() {
        let running = known(&[row(1, 80, 1), row(2, 80, 1), row(3, 80, 1)], A);
        let moved = row(2, 81, 2);
        let mut limited = row(3, 80, 2);
        limited.max_sessions = 5;
        let fresh = row(4, 80, 2);
        let desired = whole(
            A,
            2,
            &[row(1, 80, 1), moved.clone(), limited.clone(), fresh.clone()],
        );
        assert_eq!(
            plan(&running, &desired),
            [
                Step::Replace(moved),
                Step::Adjust(limited),
                Step::Open(fresh)
            ]
        );
    }

    #[test]
    fn of_changes_only_what_they_name_is_planned() {
        let running = known(&[row(1, 80, 1), row(2, 80, 1), row(3, 80, 1)], A);
        let mut changes = whole(A, 5, &[row(4, 80, 5)]);
        changes.whole = false;
        changes.freed_ports = vec![row(2, 80, 1).key(), row(9, 80, 1).key()];
        let retire = Step::Retire {
            key: row(2, 80, 1).key(),
            generation: Generation(5),
        };
        assert_eq!(
            plan(&running, &changes),
            [retire, Step::Open(row(4, 80, 5))]
        );
    }

    #[test]
    fn a_region_that_says_nothing_yet_changes_nothing() {
        let running = known(&[row(1, 80, 1)], A);
        assert_eq!(plan(&running, &whole(B, 0, &[])), []);
    }

    #[test]
    fn a_damaged_region_closes_only_what_it_names() {
        let running = known(&[row(1, 80, 1), row(2, 80, 1)], A);
        let mut desired = whole(A, 5, &[]);
        desired.rows.invalid_rows = 1;
        desired.rows.removed_ports = vec![Removed {
            key: row(2, 80, 1).key(),
            kernel_id: KernelId([7; 16]),
            generation: Generation(5),
        }];
        assert_eq!(
            plan(&running, &desired),
            [Step::Retire {
                key: row(2, 80, 1).key(),
                generation: Generation(5)
            }]
        );
    }

    #[test]
    fn a_replaced_region_keeps_what_it_does_not_know() {
        let running = known(&[row(1, 80, 1), row(2, 80, 1)], A);
        let desired = whole(B, 3, &[row(1, 80, 3)]);
        assert_eq!(
            plan(&running, &desired),
            [
                Step::Orphan(row(2, 80, 1).key()),
                Step::Acknowledge(row(1, 80, 3))
            ]
        );
    }

    #[test]
    fn a_row_released_by_its_own_region_is_retired() {
        let running = known(&[row(1, 80, 1)], A);
        assert_eq!(
            plan(&running, &whole(A, 9, &[])),
            [Step::Retire {
                key: row(1, 80, 1).key(),
                generation: Generation(9)
            }]
        );
    }

    #[test]
    fn the_removal_of_what_does_not_run_is_acknowledged() {
        let mut desired = whole(A, 4, &[]);
        desired.rows.removed_ports = vec![Removed {
            key: row(1, 80, 1).key(),
            kernel_id: KernelId([7; 16]),
            generation: Generation(4),
        }];
        assert_eq!(
            plan(&BTreeMap::new(), &desired),
            [Step::Gone {
                key: row(1, 80, 1).key(),
                kernel_id: KernelId([7; 16]),
                generation: Generation(4)
            }]
        );
    }
}
