//! Lifecycle events: their types, and where they go.
//!
//! In: events from the lifecycle, from execution and from pulls. Out: each event, once, to every
//! sink, and to an in-process ring from which `bai.events` and the command line read. Invariants:
//! emitting never waits and never fails (a sink that cannot keep up counts what it left out); the
//! order in the ring and in each sink is the order of emission.
//!
//! Names and arguments are the manager's (`kernel_started`, ...); the bus that carries them to a
//! manager is one more sink.

pub mod bus;
mod file;
mod ring;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use shared::ids::{ContainerId, KernelId, SessionId};

use crate::json_text::JsonText;
use crate::kernel::lifecycle::Reason;

pub use file::{FileSink, FileSinkError};
pub use ring::Ring;

/// The exit code of a kernel whose container's code could not be learned.
pub const UNKNOWN_EXIT_CODE: i64 = -1;

/// Whom an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// One manager handles it.
    Anycast,
    /// Everybody who listens hears it.
    Broadcast,
    /// Both, the anycast first.
    Both,
    /// It does not leave the node.
    Local,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The agent is ready.
    AgentStarted {
        /// `self-started`.
        reason: &'static str,
    },
    /// The agent stops; its kernels stay.
    AgentTerminated {
        /// `shutdown`.
        reason: &'static str,
    },
    /// Devices could not be reserved: the manager may compare its view.
    DoAgentResourceCheck {
        /// The agent id.
        agent: String,
    },
    /// Images that the last look at the engine showed are gone.
    AgentImagesRemove {
        /// Canonical names.
        images: Vec<String>,
    },
    /// Something failed that should not; an administrator may want to know.
    AgentError {
        /// What, in a sentence.
        message: String,
        /// Where it came from: the chain of causes.
        trace: Option<String>,
        /// Ids and addresses that belong to it.
        context: serde_json::Map<String, Value>,
        /// How bad it is.
        severity: Severity,
    },
    /// A creation was accepted.
    KernelPreparing {
        /// The kernel.
        kernel: KernelId,
        /// Its session.
        session: SessionId,
    },
    /// A creation has to pull the image.
    KernelPulling {
        /// The kernel.
        kernel: KernelId,
        /// Its session.
        session: SessionId,
        /// Canonical image name.
        image: String,
    },
    /// The image is there; the container is being made.
    KernelCreating {
        /// The kernel.
        kernel: KernelId,
        /// Its session.
        session: SessionId,
    },
    /// The kernel runs and its runner has answered.
    KernelStarted {
        /// The kernel.
        kernel: KernelId,
        /// Its session.
        session: SessionId,
        /// The same map that `create_kernels` answers.
        creation_info: JsonText,
    },
    /// The kernel has ended and holds nothing any more.
    KernelTerminated {
        /// The kernel.
        kernel: KernelId,
        /// Its session.
        session: SessionId,
        /// Why.
        reason: Reason,
        /// The container's exit code, if it could be learned.
        exit_code: Option<i64>,
    },
    /// The kernel's logs are stored.
    DoSyncKernelLogs {
        /// The kernel.
        kernel: KernelId,
        /// Its container.
        container: ContainerId,
    },
    /// A step of a creation, for people who watch it.
    KernelProgress {
        /// The kernel.
        kernel: KernelId,
        /// What is being done, in a few words.
        step: String,
    },
    /// A batch session's command ended with 0.
    SessionSuccess {
        /// The session.
        session: SessionId,
        /// `task-finished`.
        reason: Reason,
        /// 0.
        exit_code: i64,
    },
    /// A batch session's command failed or ran out of time.
    SessionFailure {
        /// The session.
        session: SessionId,
        /// `task-failed`, `task-timeout`.
        reason: Reason,
        /// The command's, -1 when unknown, -2 for a timeout.
        exit_code: i64,
    },
    /// An execution is under way; told with each call on it, and after another's end.
    ExecutionStarted {
        /// The session.
        session: SessionId,
    },
    /// An execution came to its end.
    ExecutionFinished {
        /// The session.
        session: SessionId,
    },
    /// An execution will not come to its end.
    ExecutionCancelled {
        /// The session.
        session: SessionId,
    },
    /// A model service could not be started, or its health has changed.
    ModelServiceStatusUpdated {
        /// The session.
        session: SessionId,
        /// `healthy`, `unhealthy`.
        status: &'static str,
    },
    /// A pull begins.
    ImagePullStarted {
        /// Canonical image name.
        image: String,
        /// The agent id.
        agent: String,
    },
    /// The image is there.
    ImagePullFinished {
        /// Canonical image name.
        image: String,
        /// The agent id.
        agent: String,
        /// `Image already exists` when nothing was pulled.
        message: Option<String>,
    },
    /// The pull failed.
    ImagePullFailed {
        /// Canonical image name.
        image: String,
        /// The agent id.
        agent: String,
        /// Why.
        message: String,
    },
    /// A background task moved on.
    BgtaskUpdated {
        /// Task id, with hyphens.
        task: String,
        /// Units done.
        current: u64,
        /// Units in all.
        total: u64,
        /// What it does.
        message: Option<String>,
    },
    /// A background task is done.
    BgtaskDone {
        /// Task id, with hyphens.
        task: String,
        /// A result in words.
        message: Option<String>,
    },
    /// A background task failed.
    BgtaskFailed {
        /// Task id, with hyphens.
        task: String,
        /// Why.
        message: String,
    },
    /// A background task was given up because the agent stops.
    BgtaskCancelled {
        /// Task id, with hyphens.
        task: String,
    },
    /// A volume was mounted, or could not be.
    VolumeMounted(VolumeAnswer),
    /// A volume was unmounted, or could not be.
    VolumeUnmounted(VolumeAnswer),
}

/// What came of a request to mount or unmount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeAnswer {
    /// The agent id.
    pub agent: String,
    /// The mount point; empty when a storage proxy of this host does the mounting.
    pub path: String,
    /// Quota scope of the request.
    pub quota_scope: String,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// How bad an error event is, in the manager's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The node cannot do its work.
    Critical,
    /// One thing failed.
    Error,
    /// Something is odd.
    Warning,
}

impl Severity {
    /// The manager's word.
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Critical => "CRITICAL",
            Severity::Error => "ERROR",
            Severity::Warning => "WARNING",
        }
    }
}

impl Event {
    /// The event's name on the bus.
    pub fn name(&self) -> &'static str {
        match self {
            Event::AgentStarted { .. } => "agent_started",
            Event::AgentTerminated { .. } => "agent_terminated",
            Event::DoAgentResourceCheck { .. } => "do_agent_resource_check",
            Event::AgentImagesRemove { .. } => "agent_images_remove",
            Event::AgentError { .. } => "agent_error",
            Event::KernelPreparing { .. } => "kernel_preparing",
            Event::KernelPulling { .. } => "kernel_pulling",
            Event::KernelCreating { .. } => "kernel_creating",
            Event::KernelStarted { .. } => "kernel_started",
            Event::KernelTerminated { .. } => "kernel_terminated",
            Event::DoSyncKernelLogs { .. } => "do_sync_kernel_logs",
            Event::KernelProgress { .. } => "kernel_progress",
            Event::SessionSuccess { .. } => "session_success",
            Event::SessionFailure { .. } => "session_failure",
            Event::ExecutionStarted { .. } => "execution_started",
            Event::ExecutionFinished { .. } => "execution_finished",
            Event::ExecutionCancelled { .. } => "execution_cancelled",
            Event::ModelServiceStatusUpdated { .. } => "model_service_status_updated",
            Event::ImagePullStarted { .. } => "image_pull_started",
            Event::ImagePullFinished { .. } => "image_pull_finished",
            Event::ImagePullFailed { .. } => "image_pull_failed",
            Event::BgtaskUpdated { .. } => "bgtask_updated",
            Event::BgtaskDone { .. } => "bgtask_done",
            Event::BgtaskFailed { .. } => "bgtask_failed",
            Event::BgtaskCancelled { .. } => "bgtask_cancelled",
            Event::VolumeMounted(_) => "volume_mounted",
            Event::VolumeUnmounted(_) => "volume_unmounted",
        }
    }

    /// Whom it is for.
    pub fn delivery(&self) -> Delivery {
        match self {
            Event::KernelProgress { .. } => Delivery::Local,
            Event::BgtaskUpdated { .. }
            | Event::BgtaskDone { .. }
            | Event::BgtaskFailed { .. }
            | Event::BgtaskCancelled { .. }
            | Event::VolumeMounted(_)
            | Event::VolumeUnmounted(_) => Delivery::Broadcast,
            Event::KernelPreparing { .. }
            | Event::KernelPulling { .. }
            | Event::KernelCreating { .. }
            | Event::KernelStarted { .. }
            | Event::KernelTerminated { .. }
            | Event::SessionSuccess { .. }
            | Event::SessionFailure { .. }
            | Event::ModelServiceStatusUpdated { .. } => Delivery::Both,
            Event::AgentStarted { .. }
            | Event::AgentTerminated { .. }
            | Event::AgentImagesRemove { .. }
            | Event::AgentError { .. }
            | Event::DoAgentResourceCheck { .. }
            | Event::DoSyncKernelLogs { .. }
            | Event::ExecutionStarted { .. }
            | Event::ExecutionFinished { .. }
            | Event::ExecutionCancelled { .. }
            | Event::ImagePullStarted { .. }
            | Event::ImagePullFinished { .. }
            | Event::ImagePullFailed { .. } => Delivery::Anycast,
        }
    }

    /// The kernel it speaks of, if it speaks of one.
    pub fn kernel(&self) -> Option<KernelId> {
        match self {
            Event::KernelPreparing { kernel, .. }
            | Event::KernelPulling { kernel, .. }
            | Event::KernelCreating { kernel, .. }
            | Event::KernelStarted { kernel, .. }
            | Event::KernelTerminated { kernel, .. }
            | Event::DoSyncKernelLogs { kernel, .. }
            | Event::KernelProgress { kernel, .. } => Some(*kernel),
            _ => None,
        }
    }

    /// The positional arguments, in the order of the original's event classes.
    pub fn args(&self, at: SystemTime) -> Value {
        match self {
            Event::AgentStarted { reason } | Event::AgentTerminated { reason } => json!([reason]),
            Event::DoAgentResourceCheck { agent } => json!([agent]),
            Event::AgentImagesRemove { images } => json!([images]),
            Event::AgentError {
                message,
                trace,
                context,
                severity,
            } => json!([message, trace, null, context, severity.as_str()]),
            Event::KernelPreparing { kernel, session }
            | Event::KernelCreating { kernel, session } => {
                json!([kernel.to_string(), session.to_string(), "", {}])
            }
            Event::KernelPulling {
                kernel,
                session,
                image,
            } => json!([kernel.to_string(), session.to_string(), image, {}]),
            Event::KernelStarted {
                kernel,
                session,
                creation_info,
            } => json!([kernel.to_string(), session.to_string(), "", creation_info]),
            Event::KernelTerminated {
                kernel,
                session,
                reason,
                exit_code,
            } => json!([
                kernel.to_string(),
                session.to_string(),
                reason.as_str(),
                exit_code.unwrap_or(UNKNOWN_EXIT_CODE)
            ]),
            Event::DoSyncKernelLogs { kernel, container } => {
                json!([kernel.to_string(), container.to_string()])
            }
            Event::KernelProgress { kernel, step } => json!([kernel.to_string(), step]),
            Event::SessionSuccess {
                session,
                reason,
                exit_code,
            }
            | Event::SessionFailure {
                session,
                reason,
                exit_code,
            } => json!([session.to_string(), reason.as_str(), exit_code]),
            Event::ExecutionStarted { session }
            | Event::ExecutionFinished { session }
            | Event::ExecutionCancelled { session } => json!([session.to_string()]),
            Event::ModelServiceStatusUpdated { session, status } => {
                json!([session.to_string(), status])
            }
            Event::ImagePullStarted { image, agent } => json!([image, agent, unix_seconds(at)]),
            Event::ImagePullFinished {
                image,
                agent,
                message,
            } => json!([image, agent, unix_seconds(at), message]),
            Event::ImagePullFailed {
                image,
                agent,
                message,
            } => json!([image, agent, message]),
            Event::BgtaskUpdated {
                task,
                current,
                total,
                message,
            } => json!([task, current, total, message]),
            Event::BgtaskDone { task, message } => json!([task, message]),
            Event::BgtaskFailed { task, message } => json!([task, message]),
            Event::BgtaskCancelled { task } => json!([task, "Task cancelled"]),
            Event::VolumeMounted(answer) | Event::VolumeUnmounted(answer) => json!([
                answer.agent,
                "agent",
                answer.path,
                answer.quota_scope,
                answer.error
            ]),
        }
    }
}

/// Seconds since the epoch, as the manager counts time.
pub fn unix_seconds(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs_f64()
}

/// An event with its place in the order and its time.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRecord {
    /// 1 for the first event of this process.
    pub seq: u64,
    /// When it was emitted.
    pub at: SystemTime,
    /// What happened.
    pub event: Event,
}

impl EventRecord {
    /// The form of `bai.events` and of the events file.
    pub fn to_json(&self) -> Value {
        json!({
            "seq": self.seq,
            "at": unix_seconds(self.at),
            "name": self.event.name(),
            "args": self.event.args(self.at),
        })
    }
}

/// Where events go. `accept` must not wait: queue, or count and drop.
pub trait Sink: Debug + Send + Sync + 'static {
    /// Takes one event.
    fn accept(&self, occurrence: &EventRecord);
}

/// The sink that writes events to the log.
#[derive(Debug, Default)]
pub struct LogSink;

impl Sink for LogSink {
    fn accept(&self, occurrence: &EventRecord) {
        let name = occurrence.event.name();
        match &occurrence.event {
            Event::KernelTerminated {
                kernel,
                reason,
                exit_code,
                ..
            } => {
                tracing::info!(event = name, kernel_id = %kernel, %reason, exit_code, "kernel has ended")
            }
            Event::KernelStarted { kernel, .. } => {
                tracing::info!(event = name, kernel_id = %kernel, "kernel has started");
            }
            Event::ImagePullFailed { image, message, .. } => {
                tracing::warn!(event = name, image, err = message, "image pull failed");
            }
            Event::AgentStarted { .. } | Event::AgentTerminated { .. } => {
                tracing::info!(event = name, "agent event");
            }
            // What a client can cause at will stays below the default level.
            event => tracing::debug!(
                event = name,
                kernel_id = event.kernel().map(tracing::field::display),
                "event"
            ),
        }
    }
}

/// The handle through which everything emits events.
#[derive(Clone, Debug)]
pub struct Events {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    ring: Ring,
    sinks: Vec<Box<dyn Sink>>,
}

impl Events {
    /// Events go to the ring of `capacity` entries and to the given sinks.
    pub fn new(capacity: usize, sinks: Vec<Box<dyn Sink>>) -> Events {
        Events {
            inner: Arc::new(Inner {
                ring: Ring::new(capacity),
                sinks,
            }),
        }
    }

    /// Emits one event. Never waits.
    pub fn emit(&self, event: Event) {
        self.inner.ring.push(event, |occurrence| {
            for sink in &self.inner.sinks {
                sink.accept(occurrence);
            }
        });
    }

    /// The in-process ring.
    pub fn ring(&self) -> &Ring {
        &self.inner.ring
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_have_the_originals_order() {
        let kernel = KernelId([0x11; 16]);
        let session = SessionId([0x22; 16]);
        let at = UNIX_EPOCH + Duration::from_millis(1500);
        let (k, s) = (
            "11111111-1111-1111-1111-111111111111",
            "22222222-2222-2222-2222-222222222222",
        );
        let cases = [
            (
                Event::KernelPreparing { kernel, session },
                json!([k, s, "", {}]),
            ),
            (
                Event::KernelPulling {
                    kernel,
                    session,
                    image: "r/a:1".into(),
                },
                json!([k, s, "r/a:1", {}]),
            ),
            (
                Event::KernelTerminated {
                    kernel,
                    session,
                    reason: Reason::USER_REQUESTED,
                    exit_code: Some(137),
                },
                json!([k, s, "user-requested", 137]),
            ),
            (
                Event::KernelTerminated {
                    kernel,
                    session,
                    reason: Reason::SELF_TERMINATED,
                    exit_code: None,
                },
                json!([k, s, "self-terminated", -1]),
            ),
            (
                Event::ImagePullFinished {
                    image: "r/a:1".into(),
                    agent: "i-x".into(),
                    message: None,
                },
                json!(["r/a:1", "i-x", 1.5, null]),
            ),
        ];
        for (event, args) in cases {
            assert_eq!(event.args(at), args, "{}", event.name());
        }
    }

    #[derive(Debug)]
    struct Count(std::sync::Mutex<Vec<u64>>);

    impl Sink for Arc<Count> {
        fn accept(&self, occurrence: &EventRecord) {
            self.0.lock().unwrap().push(occurrence.seq);
        }
    }

    #[test]
    fn every_sink_sees_every_event_in_order() {
        let count = Arc::new(Count(std::sync::Mutex::default()));
        let events = Events::new(2, vec![Box::new(LogSink), Box::new(count.clone())]);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        events.emit(Event::AgentStarted {
                            reason: "self-started",
                        });
                    }
                });
            }
        });
        let seen = count.0.lock().unwrap().clone();
        assert_eq!(seen, (1..=200).collect::<Vec<_>>());
        assert_eq!(events.ring().after(0, 10).0.len(), 2);
    }
}
