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

use std::borrow::Cow;
use std::fmt;

use super::death::Death;

/// Why a kernel ended, in the manager's words (`KernelLifecycleEventReason`, or free text).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reason(pub Cow<'static, str>);

macro_rules! reasons {
    ($($name:ident = $text:literal;)*) => {
        impl Reason {
            $(#[doc = concat!("`", $text, "`")] pub const $name: Reason = Reason(Cow::Borrowed($text));)*
        }
    };
}

reasons! {
    ALREADY_TERMINATED = "already-terminated";
    ANOMALY_DETECTED = "anomaly-detected";
    CONTAINER_NOT_FOUND = "container-not-found";
    FAILED_TO_CREATE = "failed-to-create";
    FAILED_TO_START = "failed-to-start";
    NOT_FOUND_IN_MANAGER = "not-found-in-manager";
    OUT_OF_MEMORY = "out-of-memory";
    RESTART_TIMEOUT = "restart-timeout";
    SELF_TERMINATED = "self-terminated";
    SHARED_MEMORY_FULL = "shared-memory-full";
    TASK_FAILED = "task-failed";
    TASK_FINISHED = "task-finished";
    TASK_TIMEOUT = "task-timeout";
    USER_REQUESTED = "user-requested";
    USER_PURGED = "user-purged";
}

/// All that `KernelLifecycleEventReason` names.
const KNOWN: [&str; 30] = [
    "agent-termination",
    "already-terminated",
    "anomaly-detected",
    "exec-timeout",
    "failed-to-create",
    "failed-to-start",
    "force-terminated",
    "bootstrap-timeout",
    "hang-timeout",
    "idle-timeout",
    "idle-session-lifetime",
    "idle-utilization",
    "killed-by-event",
    "service-scaled-down",
    "new-container-started",
    "pending-timeout",
    "restarting",
    "restart-timeout",
    "resuming-agent-operation",
    "self-terminated",
    "task-failed",
    "task-timeout",
    "task-cancelled",
    "task-finished",
    "terminated-unknown-container",
    "unknown",
    "user-requested",
    "user-purged",
    "not-found-in-manager",
    "container-not-found",
];

impl Reason {
    /// A reason given by the manager: any text is accepted.
    pub fn from_text(text: &str) -> Reason {
        Reason(Cow::Owned(text.to_owned()))
    }

    /// One of the reasons that the manager has a name for.
    pub fn known(text: &str) -> Option<Reason> {
        KNOWN.contains(&text).then(|| Reason::from_text(text))
    }

    /// The text sent in events.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

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

/// How a kernel ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// The reason stored first. Later ones do not replace it, but for one that is to be told where none was.
    pub reason: Reason,
    /// No `kernel_terminated` is sent.
    pub suppress: bool,
    /// The container's exit code, once it is known.
    pub exit_code: Option<i64>,
    /// What killed a container that ended by itself, once it is known.
    pub death: Option<Death>,
}

impl Ending {
    /// An ending without a known exit code.
    pub fn new(reason: Reason, suppress: bool) -> Ending {
        Ending {
            reason,
            suppress,
            exit_code: None,
            death: None,
        }
    }

    /// Joins what is asked for later: managers purge what they have begun to destroy when a heartbeat
    /// comes in between, and wait for the word on the destroy.
    /// Says what to do about it.
    fn join(&mut self, reason: Reason, suppress: bool) -> Vec<Action> {
        if self.suppress && !suppress {
            (self.reason, self.suppress) = (reason, suppress);
            return vec![Action::NoteEnding, Action::JoinEnding];
        }
        vec![Action::JoinEnding]
    }

    /// The reason as others are told it: what it died of stands for "by itself".
    pub fn told(&self) -> Reason {
        self.death
            .filter(|_| self.reason == Reason::SELF_TERMINATED)
            .and_then(Death::reason)
            .unwrap_or_else(|| self.reason.clone())
    }

    /// Whether nobody asked for it.
    pub fn is_by_itself(&self) -> bool {
        [Reason::SELF_TERMINATED, Reason::FAILED_TO_START].contains(&self.reason)
    }

    /// Whether the node came to it without being asked: a manager that is told a reason of these has not
    /// begun to terminate the session.
    pub fn is_the_nodes_own(&self) -> bool {
        let own = [
            Reason::ANOMALY_DETECTED,
            Reason::CONTAINER_NOT_FOUND,
            Reason::FAILED_TO_CREATE,
            Reason::RESTART_TIMEOUT,
        ];
        !self.suppress && (self.is_by_itself() || own.contains(&self.reason))
    }

    fn with_exit_code(mut self, exit_code: Option<i64>) -> Ending {
        self.exit_code = exit_code;
        self
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse_input(word: &str) -> Input {
        match word {
            "create" => Input::Create,
            "reserved" => Input::Entered(Stage::Reserved),
            "files" => Input::Entered(Stage::Files),
            "container" => Input::Entered(Stage::Container),
            "started" => Input::Entered(Stage::Started),
            "ready" => Input::Ready,
            "failed" => Input::CreationFailed { exit_code: None },
            "destroy" => Input::Destroy {
                reason: Reason::USER_REQUESTED,
                suppress: false,
            },
            "purge" => Input::Destroy {
                reason: Reason::USER_PURGED,
                suppress: true,
            },
            "died" => Input::Died { exit_code: Some(7) },
            "missing" => Input::Missing,
            "restart" => Input::Restart,
            "old-gone" => Input::OldContainerGone,
            "restart-failed" => Input::RestartFailed,
            "cleaned" => Input::Cleaned {
                exit_code: Some(9),
                death: None,
            },
            "cleaned-oom" => Input::Cleaned {
                exit_code: Some(9),
                death: Some(Death::OutOfMemory),
            },
            other => panic!("unknown input {other}"),
        }
    }

    fn ending_text(ending: &Ending) -> String {
        let mut text = ending.told().to_string();
        if let Some(code) = ending.exit_code {
            text += &format!("={code}");
        }
        if ending.suppress {
            text += "!";
        }
        text
    }

    fn state_text(state: &State) -> String {
        let abort_text = |abort: &Option<Ending>| match abort {
            Some(ending) => format!("/{}", ending_text(ending)),
            None => String::new(),
        };
        match state {
            State::Creating {
                stage,
                restart,
                abort,
            } => format!(
                "{}{:?}{}",
                if *restart { "re" } else { "" },
                stage,
                abort_text(abort)
            ),
            State::Running => "Running".into(),
            State::Restarting { abort } => format!("Restarting{}", abort_text(abort)),
            State::Ending(ending) => format!("Ending:{}", ending_text(ending)),
            State::Ended(ending) => format!("Ended:{}", ending_text(ending)),
        }
    }

    fn action_text(actions: &[Action]) -> String {
        actions
            .iter()
            .map(|action| match action {
                Action::Proceed => "-".into(),
                Action::Refuse(why) => format!("Refuse{why:?}"),
                other => format!("{other:?}"),
            })
            .collect::<Vec<_>>()
            .join("+")
    }

    /// Every way through the machine: the inputs that lead there, then the expected state and the
    /// actions of the last input.
    const TABLE: &str = "
        create                                 | Queued                                   | RefuseCreationInProgress
        reserved                               | Reserved                                 | -
        reserved files                         | Files                                    | -
        reserved files container               | Container                                | -
        started container                      | Started                                  | -
        started ready                          | Running                                  | AnnounceStarted
        restart                                | Queued                                   | RefuseNotRunning
        missing                                | Queued                                   | -
        died                                   | Queued                                   | -
        failed                                 | Ending:failed-to-create                  | StopAndClean
        failed cleaned                         | Ended:failed-to-create=9                 | Forget
        reserved failed cleaned                | Ended:failed-to-create=9                 | Forget
        files failed cleaned                   | Ended:failed-to-create=9                 | AnnounceTerminated+Forget
        destroy                                | Queued/user-requested                    | AbortCreation+JoinEnding
        destroy failed                         | Ending:user-requested                    | StopAndClean
        destroy failed cleaned                 | Ended:user-requested=9                   | AnnounceTerminated+Forget
        reserved destroy failed cleaned        | Ended:user-requested=9                   | AnnounceTerminated+Forget
        purge failed cleaned                   | Ended:user-purged=9!                     | Forget
        failed destroy                         | Ending:failed-to-create                  | JoinEnding
        failed destroy cleaned                 | Ended:failed-to-create=9                 | AnnounceTerminated+Forget
        failed purge cleaned                   | Ended:failed-to-create=9                 | Forget
        failed cleaned destroy                 | Ended:failed-to-create=9                 | AnnounceTerminated+JoinEnding
        failed cleaned destroy destroy         | Ended:failed-to-create=9                 | JoinEnding
        failed cleaned purge                   | Ended:failed-to-create=9                 | JoinEnding
        started failed                         | Ending:failed-to-start                   | StopAndClean
        started died                           | Started/failed-to-start=7                | AbortCreation
        started died died                      | Started/failed-to-start=7                | -
        started missing                        | Started/failed-to-start                  | AbortCreation
        started missing missing                | Started/failed-to-start                  | -
        started missing failed cleaned         | Ended:failed-to-start=9                  | AnnounceTerminated+Forget
        started destroy missing                | Started/user-requested                   | -
        container missing                      | Container                                | -
        started died failed                    | Ending:failed-to-start=7                 | StopAndClean
        started died ready                     | Ending:failed-to-start=7                 | StopAndClean
        started died failed cleaned            | Ended:failed-to-start=7                  | AnnounceTerminated+Forget
        files destroy                          | Files/user-requested                     | AbortCreation+JoinEnding
        files destroy destroy                  | Files/user-requested                     | JoinEnding
        files destroy purge                    | Files/user-requested                     | JoinEnding
        files destroy container                | Container/user-requested                 | AbortCreation
        files destroy failed                   | Ending:user-requested                    | StopAndClean
        files destroy failed cleaned           | Ended:user-requested=9                   | AnnounceTerminated+Forget
        started purge ready                    | Ending:user-purged!                      | StopAndClean
        started purge ready cleaned            | Ended:user-purged=9!                     | Forget
        started ready create                   | Running                                  | AnswerStored
        started ready ready                    | Running                                  | -
        started ready destroy                  | Ending:user-requested                    | StopAndClean+JoinEnding
        started ready destroy died             | Ending:user-requested=7                  | -
        started ready destroy missing          | Ending:user-requested                    | -
        started ready destroy purge            | Ending:user-requested                    | JoinEnding
        started ready destroy create           | Ending:user-requested                    | RefuseEnding
        started ready destroy restart          | Ending:user-requested                    | RefuseEnding
        started ready destroy died cleaned     | Ended:user-requested=7                   | AnnounceTerminated+Forget
        started ready purge cleaned            | Ended:user-purged=9!                     | Forget
        started ready purge destroy            | Ending:user-requested                    | NoteEnding+JoinEnding
        started ready purge destroy purge      | Ending:user-requested                    | JoinEnding
        started ready purge destroy cleaned    | Ended:user-requested=9                   | AnnounceTerminated+Forget
        started ready purge cleaned destroy    | Ended:user-requested=9                   | AnnounceTerminated+NoteEnding+JoinEnding
        started purge destroy                  | Started/user-requested                   | NoteEnding+JoinEnding
        started purge destroy ready            | Ending:user-requested                    | StopAndClean
        started ready died                     | Ending:self-terminated=7                 | Clean
        started ready died destroy             | Ending:self-terminated=7                 | JoinEnding
        started ready died cleaned             | Ended:self-terminated=7                  | AnnounceTerminated+Forget
        started ready died cleaned-oom         | Ended:out-of-memory=7                    | AnnounceTerminated+Forget
        started ready destroy died cleaned-oom | Ended:user-requested=7                   | AnnounceTerminated+Forget
        started ready missing                  | Ending:container-not-found               | Clean
        started ready died cleaned destroy     | Ended:self-terminated=7                  | JoinEnding
        started ready died cleaned create      | Ended:self-terminated=7                  | RefuseEnding
        started ready died cleaned cleaned     | Ended:self-terminated=7                  | -
        started ready restart                  | Restarting                               | StopForRestart
        started ready restart restart          | Restarting                               | JoinRestart
        started ready restart create           | Restarting                               | RefuseCreationInProgress
        started ready restart died             | Restarting                               | -
        started ready restart missing          | Restarting                               | -
        started ready restart old-gone         | reFiles                                  | -
        started ready restart old-gone restart | reFiles                                  | JoinRestart
        started ready restart old-gone died    | reFiles                                  | -
        started ready restart old-gone started ready   | Running                          | AnnounceStarted
        started ready restart old-gone started failed  | Ending:failed-to-start           | StopAndClean
        started ready restart restart-failed           | Ending:restart-timeout           | StopAndClean
        started ready restart destroy                  | Restarting/user-requested        | JoinEnding
        started ready restart destroy old-gone         | Ending:user-requested            | StopAndClean
        started ready restart destroy restart-failed   | Ending:user-requested            | StopAndClean
    ";

    #[test]
    fn transition_table() {
        for row in TABLE.lines().map(str::trim).filter(|row| !row.is_empty()) {
            let mut columns = row.split('|').map(str::trim);
            let inputs = columns.next().unwrap();
            let mut kernel = Lifecycle::creating();
            let mut actions = Vec::new();
            for word in inputs.split_whitespace() {
                actions = kernel.step(parse_input(word));
            }
            assert_eq!(state_text(kernel.state()), columns.next().unwrap(), "{row}");
            assert_eq!(action_text(&actions), columns.next().unwrap(), "{row}");
        }
    }

    #[test]
    fn found_kernels_start_in_their_state() {
        let mut starting = Lifecycle::found_starting();
        assert_eq!(starting.step(Input::Ready), vec![Action::AnnounceStarted]);
        let mut restarting = Lifecycle::found_restarting();
        assert_eq!(restarting.step(Input::Restart), vec![Action::JoinRestart]);
        assert_eq!(restarting.step(Input::Missing), vec![Action::Proceed]);
        assert_eq!(restarting.step(Input::Ready), vec![Action::AnnounceStarted]);
        let mut running = Lifecycle::found_running();
        assert_eq!(running.step(Input::Create), vec![Action::AnswerStored]);
        let mut ending = Lifecycle::found_ending(Ending::new(Reason::USER_REQUESTED, false));
        assert_eq!(
            ending.step(Input::Cleaned {
                exit_code: None,
                death: None
            }),
            vec![Action::AnnounceTerminated, Action::Forget]
        );
    }

    proptest! {
        /// Whatever is asked for and seen, in whatever order: one ending is started, one end is
        /// announced, and the reason stored first, or the first that is to be told, is the one announced.
        #[test]
        fn one_end_per_life(words in proptest::collection::vec(
            proptest::sample::select(vec![
                "create", "reserved", "files", "container", "started", "ready", "failed",
                "destroy", "purge", "died", "missing", "restart", "old-gone", "restart-failed",
                "cleaned",
            ]), 0..40))
        {
            let mut kernel = Lifecycle::creating();
            let (mut cleans, mut announced, mut forgotten) = (0, 0, 0);
            let mut first: Option<Ending> = None;
            for word in words {
                for action in kernel.step(parse_input(word)) {
                    match action {
                        Action::StopAndClean | Action::Clean => cleans += 1,
                        Action::AnnounceTerminated => announced += 1,
                        Action::Forget => forgotten += 1,
                        _ => {}
                    }
                }
                match (&first, kernel.ending()) {
                    (None, Some(ending)) => first = Some(ending.clone()),
                    (Some(before), Some(ending)) if before.suppress && !ending.suppress => {
                        first = Some(ending.clone());
                    }
                    (Some(before), Some(ending)) => {
                        prop_assert_eq!(&before.reason, &ending.reason);
                        prop_assert_eq!(before.suppress, ending.suppress);
                    }
                    (Some(_), None) => prop_assert!(false, "an ending was forgotten"),
                    (None, None) => {}
                }
            }
            prop_assert!(cleans <= 1 && announced <= 1 && forgotten <= 1);
            prop_assert!(announced <= forgotten && forgotten <= cleans);
        }
    }
}
