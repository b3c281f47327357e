//! What to do with each kernel found at start: a pure decision over what Docker lists and what the
//! journal holds. Docker says what exists, the journal says what it is.
//!
//! Invariant: a container that runs and belongs to this agent is never stopped unless its end had
//! been decided before (defect 4 of the original: it killed what it did not know). A restart decides the
//! end of the old container, which may have been told to stop already.

use std::collections::{BTreeMap, BTreeSet};

use shared::ids::{ContainerId, KernelId};

use crate::docker::Liveness;
use crate::kernel::journal::{Phase, StoredEnding};
use crate::kernel::lifecycle::{Ending, Reason};

/// One container of this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContainerState {
    /// The kernel its name tells.
    pub kernel: KernelId,
    /// Its id.
    pub container: ContainerId,
    /// Its state.
    pub liveness: Liveness,
}

/// What the journal says of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalState {
    /// How far it had come.
    pub phase: Phase,
    /// The end that was decided.
    pub ending: Option<StoredEnding>,
    /// Its container.
    pub container: Option<ContainerId>,
    /// What it is made from is known, so that it can be made again.
    pub request: bool,
    /// It was in service before: what is being started is its next container.
    pub served: bool,
}

/// What to do with one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// In service: go on with it.
    Adopt(ContainerId),
    /// Started, but its runner had not been heard: wait for it, then announce it.
    ResumeStart(ContainerId),
    /// It was being restarted and its new container has not run: make that, in place of what is left,
    /// which may still run.
    Recreate(Option<ContainerId>),
    /// Bring it to its end, whatever is left of it.
    Finish(Option<ContainerId>, Ending),
    /// In service and without a journal: rebuild the record from labels and scratch, then go on.
    AdoptFromLabels(ContainerId),
    /// Ended without a journal: rebuild what can be rebuilt, then finish it.
    FinishFromLabels(ContainerId, Ending),
    /// Never started and without a journal: remove the container.
    RemoveUnstarted(ContainerId),
}

/// A decision for each kernel, and the containers that nobody claims.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// One decision per kernel.
    pub kernels: BTreeMap<KernelId, Decision>,
    /// Second containers of a kernel (a restart was cut short): removed.
    pub extra: BTreeSet<ContainerId>,
}

/// Decides.
pub fn plan(seen: &[ContainerState], known: &BTreeMap<KernelId, JournalState>) -> Plan {
    let mut plan = Plan::default();
    let mut of_kernel: BTreeMap<KernelId, Vec<ContainerState>> = BTreeMap::new();
    for container in seen {
        of_kernel
            .entry(container.kernel)
            .or_default()
            .push(*container);
    }
    for kernel in of_kernel
        .keys()
        .chain(known.keys())
        .collect::<BTreeSet<_>>()
    {
        let known = known.get(kernel);
        let containers = of_kernel.get(kernel).map_or(&[][..], Vec::as_slice);
        let chosen = choose(containers, known);
        plan.extra.extend(
            containers
                .iter()
                .filter(|seen| Some(**seen) != chosen)
                .map(|seen| seen.container),
        );
        plan.kernels.insert(*kernel, decide(chosen, known));
    }
    plan
}

/// The container that is the kernel: a running one before the one the journal names before any.
fn choose(containers: &[ContainerState], known: Option<&JournalState>) -> Option<ContainerState> {
    let named = known.and_then(|known| known.container);
    containers.iter().copied().max_by_key(|seen| {
        (
            seen.liveness == Liveness::Active,
            Some(seen.container) == named,
        )
    })
}

fn decide(chosen: Option<ContainerState>, known: Option<&JournalState>) -> Decision {
    let container = chosen.map(|seen| seen.container);
    let finish = |reason: Reason| Decision::Finish(container, Ending::new(reason, false));
    let Some(known) = known else {
        return match chosen {
            Some(seen) => match seen.liveness {
                Liveness::Active => Decision::AdoptFromLabels(seen.container),
                Liveness::Created => Decision::RemoveUnstarted(seen.container),
                Liveness::Dead => Decision::FinishFromLabels(
                    seen.container,
                    Ending::new(Reason::SELF_TERMINATED, false),
                ),
            },
            None => finish(Reason::CONTAINER_NOT_FOUND),
        };
    };
    if let (Phase::Ending, Some(ending)) = (known.phase, &known.ending) {
        return Decision::Finish(
            container,
            Ending {
                reason: Reason::from_text(&ending.reason),
                suppress: ending.suppress,
                exit_code: ending.exit_code,
                death: None,
            },
        );
    }
    match (
        chosen.map(|seen| (seen.liveness, seen.container)),
        known.phase,
    ) {
        // The old one: that the new one is started is noted before it is.
        (_, Phase::Restarting) if known.request => Decision::Recreate(container),
        (Some((Liveness::Active, container)), Phase::Running | Phase::Restarting) => {
            Decision::Adopt(container)
        }
        // The end was decided and its reason lost: a record that no version of ours writes.
        (Some((Liveness::Active, container)), Phase::Ending) => Decision::Adopt(container),
        (Some((Liveness::Active, container)), Phase::Files | Phase::Container | Phase::Started) => {
            Decision::ResumeStart(container)
        }
        // Killed between the note that it is started and the start.
        (None | Some((Liveness::Created, _)), Phase::Started) if known.request && known.served => {
            Decision::Recreate(container)
        }
        (Some((Liveness::Dead, _)), Phase::Running | Phase::Ending) => {
            finish(Reason::SELF_TERMINATED)
        }
        (Some((Liveness::Dead, _)), Phase::Files | Phase::Container | Phase::Started) => {
            finish(Reason::FAILED_TO_START)
        }
        (None | Some((Liveness::Created, _)), Phase::Files | Phase::Container | Phase::Started) => {
            finish(Reason::FAILED_TO_CREATE)
        }
        (None | Some((Liveness::Dead | Liveness::Created, _)), Phase::Restarting) => {
            finish(Reason::RESTART_TIMEOUT)
        }
        (None | Some((Liveness::Created, _)), Phase::Running | Phase::Ending) => {
            finish(Reason::CONTAINER_NOT_FOUND)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> KernelId {
        KernelId([n; 16])
    }

    fn container(n: u8) -> ContainerId {
        ContainerId([n; 32])
    }

    fn text(decision: &Decision) -> String {
        let ending = |ending: &Ending| {
            format!(
                "{}{}",
                ending.reason,
                if ending.suppress { "!" } else { "" }
            )
        };
        match decision {
            Decision::Adopt(_) => "adopt".into(),
            Decision::ResumeStart(_) => "resume".into(),
            Decision::Recreate(container) => match container {
                Some(_) => "replace".into(),
                None => "recreate".into(),
            },
            Decision::Finish(_, end) => format!("finish:{}", ending(end)),
            Decision::AdoptFromLabels(_) => "adopt-labels".into(),
            Decision::FinishFromLabels(_, end) => format!("finish-labels:{}", ending(end)),
            Decision::RemoveUnstarted(_) => "remove".into(),
        }
    }

    /// Rows: what the journal says, with `*` of a kernel that was in service before and with `!` of one
    /// whose request is lost; columns: none, created, active, dead.
    const TABLE: &str = "
        -          | -                          | remove                     | adopt-labels           | finish-labels:self-terminated
        files      | finish:failed-to-create    | finish:failed-to-create    | resume                 | finish:failed-to-start
        container  | finish:failed-to-create    | finish:failed-to-create    | resume                 | finish:failed-to-start
        started    | finish:failed-to-create    | finish:failed-to-create    | resume                 | finish:failed-to-start
        started*   | recreate                   | replace                    | resume                 | finish:failed-to-start
        started*!  | finish:failed-to-create    | finish:failed-to-create    | resume                 | finish:failed-to-start
        running    | finish:container-not-found | finish:container-not-found | adopt                  | finish:self-terminated
        restarting | recreate                   | replace                    | replace                | replace
        restarting! | finish:restart-timeout    | finish:restart-timeout     | adopt                  | finish:restart-timeout
        ending     | finish:user-requested!     | finish:user-requested!     | finish:user-requested! | finish:user-requested!
    ";

    #[test]
    fn decision_table() {
        let columns = [
            None,
            Some(Liveness::Created),
            Some(Liveness::Active),
            Some(Liveness::Dead),
        ];
        for row in TABLE.lines().map(str::trim).filter(|row| !row.is_empty()) {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            let marks = cells[0].trim_start_matches(|it: char| it.is_ascii_lowercase());
            let phase = match cells[0].trim_end_matches(['*', '!']) {
                "-" => None,
                "files" => Some(Phase::Files),
                "container" => Some(Phase::Container),
                "started" => Some(Phase::Started),
                "running" => Some(Phase::Running),
                "restarting" => Some(Phase::Restarting),
                "ending" => Some(Phase::Ending),
                other => panic!("{other}"),
            };
            let known: BTreeMap<KernelId, JournalState> = phase
                .map(|phase| JournalState {
                    phase,
                    ending: (phase == Phase::Ending).then(|| StoredEnding {
                        reason: "user-requested".into(),
                        suppress: true,
                        exit_code: None,
                    }),
                    container: Some(container(1)),
                    request: !marks.contains('!'),
                    served: marks.contains('*'),
                })
                .map(|known| (id(1), known))
                .into_iter()
                .collect();
            for (liveness, expected) in columns.iter().zip(&cells[1..]) {
                let seen: Vec<ContainerState> = liveness
                    .map(|liveness| ContainerState {
                        kernel: id(1),
                        container: container(1),
                        liveness,
                    })
                    .into_iter()
                    .collect();
                let plan = plan(&seen, &known);
                let decided = plan.kernels.get(&id(1)).map_or("-".into(), text);
                assert_eq!(&decided, expected, "{row} with {liveness:?}");
                assert!(plan.extra.is_empty());
            }
        }
    }

    // Defect 4 of the original: live containers that were not registered were killed after a crash.
    #[test]
    fn defect_live_containers_killed_after_crash() {
        for phase in [
            None,
            Some(Phase::Files),
            Some(Phase::Started),
            Some(Phase::Running),
        ] {
            let known = phase
                .map(|phase| JournalState {
                    phase,
                    ending: None,
                    container: None,
                    request: true,
                    served: false,
                })
                .map(|known| (id(1), known))
                .into_iter()
                .collect();
            let seen = [ContainerState {
                kernel: id(1),
                container: container(1),
                liveness: Liveness::Active,
            }];
            let decision = &plan(&seen, &known).kernels[&id(1)];
            assert!(
                matches!(
                    decision,
                    Decision::Adopt(_) | Decision::AdoptFromLabels(_) | Decision::ResumeStart(_)
                ),
                "{decision:?}"
            );
        }
    }

    #[test]
    fn a_second_container_of_a_kernel_is_removed() {
        let known = BTreeMap::from([(
            id(1),
            JournalState {
                phase: Phase::Restarting,
                ending: None,
                container: Some(container(1)),
                request: true,
                served: true,
            },
        )]);
        let seen = [
            ContainerState {
                kernel: id(1),
                container: container(1),
                liveness: Liveness::Dead,
            },
            ContainerState {
                kernel: id(1),
                container: container(2),
                liveness: Liveness::Active,
            },
        ];
        let plan = plan(&seen, &known);
        let replaced = Decision::Recreate(Some(container(2)));
        assert_eq!(plan.kernels[&id(1)], replaced);
        assert_eq!(plan.extra, BTreeSet::from([container(1)]));
    }
}
