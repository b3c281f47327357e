//! The life of one kernel as a pure state machine.
//!
//! In: what was asked for (create, destroy, restart) and what was seen (a step finished, the
//! container died, the container is missing). Out: what the caller has to do next. Nothing here
//! waits, reads a clock or touches Docker, so every race between two requests for one kernel is
//! decided in one place and can be tested as a table.
//!
//! Invariants, for each life of a kernel id:
//! * at most one of creation, ending and restart is running, and each is started exactly once;
//! * the end is reported at most once, with the reason that was stored first (a better word for "by
//!   itself" excepted, see `death`);
//! * a request that arrives while another one is busy is refused or joins it, never queued.

mod ending;
#[cfg(test)]
mod tests;

pub use self::ending::{Ending, Reason};
use super::death::Death;

/// How far a creation has come. Later stages hold everything the earlier ones hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Waiting, checking and pulling the image: nothing is held.
    Queued,
    /// Devices are reserved.
    Reserved,
    /// Scratch files exist or are being written; host ports may be taken.
    Files,
    /// The container exists and has not run.
    Container,
    /// The container runs; its runner has not answered yet.
    Started,
}

/// Where a kernel is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// A creation (or the second half of a restart) is at work. `abort` is set when it has been
    /// told to give up.
    Creating {
        /// The stage reached.
        stage: Stage,
        /// Second half of a restart.
        restart: bool,
        /// The ending that stops it.
        abort: Option<Ending>,
    },
    /// The container runs and its runner has answered.
    Running,
    /// First half of a restart: the old container is being stopped and removed.
    Restarting {
        /// The ending that was requested meanwhile.
        abort: Option<Ending>,
    },
    /// The container is being stopped, its remains removed.
    Ending(Ending),
    /// Nothing is left. The registry forgets a kernel in this state.
    Ended(Ending),
}

/// The three states the manager knows.
impl State {
    /// `preparing`, `running`, `terminating` (or `terminated`, which the manager never sees).
    pub fn name(&self) -> &'static str {
        match self {
            State::Creating { .. } => "preparing",
            State::Running => "running",
            State::Restarting { .. } => "restarting",
            State::Ending(_) => "terminating",
            State::Ended(_) => "terminated",
        }
    }
}

/// What was asked for or seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// `create_kernels` names this kernel.
    Create,
    /// The creation entered a stage.
    Entered(Stage),
    /// The runner answered; ports are served.
    Ready,
    /// The creation gave up by itself.
    CreationFailed {
        /// Set when the container ended by itself.
        exit_code: Option<i64>,
    },
    /// `destroy_kernel`, or a decision of the node.
    Destroy {
        /// Stored unless there is one already.
        reason: Reason,
        /// Do not announce the end.
        suppress: bool,
    },
    /// The container ended.
    Died {
        /// As Docker reports it.
        exit_code: Option<i64>,
    },
    /// Docker was listed and the container is not there.
    Missing,
    /// `restart_kernel`.
    Restart,
    /// First half of a restart is done: the old container is gone.
    OldContainerGone,
    /// First half of a restart failed.
    RestartFailed,
    /// Everything the kernel held has been given back.
    Cleaned {
        /// The exit code found while cleaning, if it was not known before.
        exit_code: Option<i64>,
        /// What killed it.
        death: Option<Death>,
    },
}

/// What the caller has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Go on; nothing to do.
    Proceed,
    /// Answer with the stored result of the creation.
    AnswerStored,
    /// Answer with an error.
    Refuse(Refusal),
    /// Wake the creation task and let it fail.
    AbortCreation,
    /// Announce `kernel_started`.
    AnnounceStarted,
    /// Start the ending: stop the container if it runs, collect logs, give everything back.
    StopAndClean,
    /// Start the ending of a container that has already stopped.
    Clean,
    /// Start the first half of a restart.
    StopForRestart,
    /// Wait for the ending that is under way (or will follow the aborted creation).
    JoinEnding,
    /// The end that was decided is told otherwise from now on: an agent that is killed now must find that.
    NoteEnding,
    /// Wait for the restart that is under way.
    JoinRestart,
    /// Announce `kernel_terminated`.
    AnnounceTerminated,
    /// Drop the registry entry and the journal file.
    Forget,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The same kernel is being created or restarted.
    #[error("it is being created or restarted; wait until it runs")]
    CreationInProgress,
    /// The same kernel is being destroyed.
    #[error("it is being destroyed; start a new session")]
    Ending,
    /// A restart needs a running kernel.
    #[error("it does not run; try again when it does")]
    NotRunning,
}

/// The state of one kernel and the rules that change it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    state: State,
    /// The end has to be announced: the kernel got far enough to leave traces, or its end was asked
    /// for (the manager takes a kernel for terminated only when it is told so).
    visible: bool,
}

impl Lifecycle {
    /// A kernel whose creation has just been accepted.
    pub fn creating() -> Lifecycle {
        Lifecycle {
            state: State::Creating {
                stage: Stage::Queued,
                restart: false,
                abort: None,
            },
            visible: false,
        }
    }

    /// A kernel found at start whose container runs and whose runner had not been heard yet.
    pub fn found_starting() -> Lifecycle {
        Lifecycle {
            state: State::Creating {
                stage: Stage::Started,
                restart: false,
                abort: None,
            },
            visible: true,
        }
    }

    /// A kernel found at start whose restart has to go on: its new container is to be made.
    pub fn found_restarting() -> Lifecycle {
        Lifecycle {
            state: State::Creating {
                stage: Stage::Files,
                restart: true,
                abort: None,
            },
            visible: true,
        }
    }

    /// A kernel found running at start.
    pub fn found_running() -> Lifecycle {
        Lifecycle {
            state: State::Running,
            visible: true,
        }
    }

    /// A kernel found at start that has to be brought to its end.
    pub fn found_ending(ending: Ending) -> Lifecycle {
        Lifecycle {
            state: State::Ending(ending),
            visible: true,
        }
    }

    /// The present state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Whether the kernel got far enough for its end to be announced, or somebody waits for that.
    pub fn is_visible(&self) -> bool {
        self.visible
    }

    /// The ending that was stored, if the kernel has one.
    pub fn ending(&self) -> Option<&Ending> {
        match &self.state {
            State::Creating { abort, .. } | State::Restarting { abort } => abort.as_ref(),
            State::Ending(ending) | State::Ended(ending) => Some(ending),
            State::Running => None,
        }
    }

    /// Applies one input and says what to do, in order.
    pub fn step(&mut self, input: Input) -> Vec<Action> {
        let state = std::mem::replace(&mut self.state, State::Running);
        let (next, actions) = self.decide(state, input);
        self.state = next;
        actions
    }

    fn decide(&mut self, state: State, input: Input) -> (State, Vec<Action>) {
        match state {
            State::Creating {
                stage,
                restart,
                abort,
            } => self.decide_creating(stage, restart, abort, input),
            State::Running => decide_running(input),
            State::Restarting { abort } => decide_restarting(abort, input),
            State::Ending(ending) => self.decide_ending(ending, input),
            State::Ended(mut ending) => {
                let actions = match input {
                    Input::Create | Input::Restart => vec![Action::Refuse(Refusal::Ending)],
                    // Ended without a word, and not forgotten yet.
                    Input::Destroy { reason, suppress }
                        if !suppress && (!self.visible || ending.suppress) =>
                    {
                        self.visible = true;
                        let mut actions = vec![Action::AnnounceTerminated];
                        actions.extend(ending.join(reason, suppress));
                        actions
                    }
                    Input::Destroy { .. } => vec![Action::JoinEnding],
                    _ => vec![Action::Proceed],
                };
                (State::Ended(ending), actions)
            }
        }
    }

    fn decide_creating(
        &mut self,
        stage: Stage,
        restart: bool,
        abort: Option<Ending>,
        input: Input,
    ) -> (State, Vec<Action>) {
        let same = |abort: Option<Ending>, action: Action| {
            (
                State::Creating {
                    stage,
                    restart,
                    abort,
                },
                vec![action],
            )
        };
        match input {
            Input::Create => same(abort, Action::Refuse(Refusal::CreationInProgress)),
            Input::Restart if restart => same(abort, Action::JoinRestart),
            Input::Restart => same(abort, Action::Refuse(Refusal::NotRunning)),
            Input::Entered(entered) => {
                // Stages only grow: what an earlier stage took is still held.
                let stage = stage.max(entered);
                self.visible |= stage >= Stage::Files;
                let action = match abort {
                    Some(_) => Action::AbortCreation,
                    None => Action::Proceed,
                };
                (
                    State::Creating {
                        stage,
                        restart,
                        abort,
                    },
                    vec![action],
                )
            }
            Input::Ready => match abort {
                None => (State::Running, vec![Action::AnnounceStarted]),
                // The request to end came while the last answer was on its way.
                Some(ending) => (State::Ending(ending), vec![Action::StopAndClean]),
            },
            Input::CreationFailed { exit_code } => {
                let mut ending = abort.unwrap_or_else(|| {
                    let reason = match stage {
                        Stage::Started => Reason::FAILED_TO_START,
                        _ => Reason::FAILED_TO_CREATE,
                    };
                    Ending::new(reason, false)
                });
                ending.exit_code = ending.exit_code.or(exit_code);
                (State::Ending(ending), vec![Action::StopAndClean])
            }
            Input::Destroy { reason, suppress } => {
                self.visible |= !suppress;
                let fresh = abort.is_none();
                let (abort, mut actions) = joined(abort, reason, suppress);
                if fresh {
                    actions.insert(0, Action::AbortCreation);
                }
                (
                    State::Creating {
                        stage,
                        restart,
                        abort: Some(abort),
                    },
                    actions,
                )
            }
            // The old container's death during a restart is expected; the new one's is not, and
            // only a started container can die.
            Input::Died { exit_code } if stage == Stage::Started => match abort {
                None => same(
                    Some(Ending::new(Reason::FAILED_TO_START, false).with_exit_code(exit_code)),
                    Action::AbortCreation,
                ),
                Some(mut ending) => {
                    ending.exit_code = ending.exit_code.or(exit_code);
                    same(Some(ending), Action::Proceed)
                }
            },
            // It ran, and was taken away before its death was heard of.
            Input::Missing if stage == Stage::Started && abort.is_none() => same(
                Some(Ending::new(Reason::FAILED_TO_START, false)),
                Action::AbortCreation,
            ),
            Input::Died { .. }
            | Input::Missing
            | Input::OldContainerGone
            | Input::RestartFailed
            | Input::Cleaned { .. } => same(abort, Action::Proceed),
        }
    }

    fn decide_ending(&mut self, mut ending: Ending, input: Input) -> (State, Vec<Action>) {
        match input {
            Input::Create | Input::Restart => {
                (State::Ending(ending), vec![Action::Refuse(Refusal::Ending)])
            }
            Input::Destroy { reason, suppress } => {
                self.visible |= !suppress;
                let actions = ending.join(reason, suppress);
                (State::Ending(ending), actions)
            }
            Input::Died { exit_code } => {
                ending.exit_code = ending.exit_code.or(exit_code);
                (State::Ending(ending), vec![Action::Proceed])
            }
            Input::Cleaned { exit_code, death } => {
                ending.exit_code = ending.exit_code.or(exit_code);
                ending.death = death;
                let mut actions = Vec::new();
                if self.visible && !ending.suppress {
                    actions.push(Action::AnnounceTerminated);
                }
                actions.push(Action::Forget);
                (State::Ended(ending), actions)
            }
            _ => (State::Ending(ending), vec![Action::Proceed]),
        }
    }
}

/// The end asked for, or the one that was asked for before, and what to do about it.
fn joined(before: Option<Ending>, reason: Reason, suppress: bool) -> (Ending, Vec<Action>) {
    match before {
        Some(mut ending) => {
            let actions = ending.join(reason, suppress);
            (ending, actions)
        }
        None => (Ending::new(reason, suppress), vec![Action::JoinEnding]),
    }
}

fn decide_running(input: Input) -> (State, Vec<Action>) {
    match input {
        Input::Create => (State::Running, vec![Action::AnswerStored]),
        Input::Destroy { reason, suppress } => (
            State::Ending(Ending::new(reason, suppress)),
            vec![Action::StopAndClean, Action::JoinEnding],
        ),
        Input::Died { exit_code } => (
            State::Ending(Ending::new(Reason::SELF_TERMINATED, false).with_exit_code(exit_code)),
            vec![Action::Clean],
        ),
        Input::Missing => (
            State::Ending(Ending::new(Reason::CONTAINER_NOT_FOUND, false)),
            vec![Action::Clean],
        ),
        Input::Restart => (
            State::Restarting { abort: None },
            vec![Action::StopForRestart],
        ),
        Input::Entered(_)
        | Input::Ready
        | Input::CreationFailed { .. }
        | Input::OldContainerGone
        | Input::RestartFailed
        | Input::Cleaned { .. } => (State::Running, vec![Action::Proceed]),
    }
}

fn decide_restarting(abort: Option<Ending>, input: Input) -> (State, Vec<Action>) {
    match input {
        Input::Create => (
            State::Restarting { abort },
            vec![Action::Refuse(Refusal::CreationInProgress)],
        ),
        Input::Restart => (State::Restarting { abort }, vec![Action::JoinRestart]),
        Input::Destroy { reason, suppress } => {
            let (abort, actions) = joined(abort, reason, suppress);
            let abort = Some(abort);
            (State::Restarting { abort }, actions)
        }
        Input::OldContainerGone => match abort {
            None => (
                State::Creating {
                    stage: Stage::Files,
                    restart: true,
                    abort: None,
                },
                vec![Action::Proceed],
            ),
            Some(ending) => (State::Ending(ending), vec![Action::StopAndClean]),
        },
        Input::RestartFailed => (
            State::Ending(abort.unwrap_or_else(|| Ending::new(Reason::RESTART_TIMEOUT, false))),
            vec![Action::StopAndClean],
        ),
        // Its death is what the restart is waiting for.
        Input::Entered(_)
        | Input::Ready
        | Input::CreationFailed { .. }
        | Input::Died { .. }
        | Input::Missing
        | Input::Cleaned { .. } => (State::Restarting { abort }, vec![Action::Proceed]),
    }
}
