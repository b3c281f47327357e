//! How a kernel ends: the reason in the manager's words, and what is told of it.

use std::borrow::Cow;
use std::fmt;

use super::Action;
use crate::kernel::death::Death;

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
    pub(super) fn join(&mut self, reason: Reason, suppress: bool) -> Vec<Action> {
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

    pub(super) fn with_exit_code(mut self, exit_code: Option<i64>) -> Ending {
        self.exit_code = exit_code;
        self
    }
}
