//! What can go wrong between us and the engine, in words that tell what to do.
//!
//! Each value names the step that failed; the cause is the error's `source`, never part of its
//! text.

use std::time::Duration;

/// Cause of a failed exchange, kept opaque so that no client type leaks out of this module.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A failed exchange with the engine.
#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    /// 404: the container, image, network, volume or exec does not exist.
    #[error("{step}: not found: {message}")]
    NotFound {
        /// What was being done.
        step: String,
        /// The engine's own words.
        message: String,
    },
    /// 409 for a state that forbids the step (name taken, not running, in use).
    #[error("{step}: refused by the engine's present state: {message}")]
    Conflict {
        /// What was being done.
        step: String,
        /// The engine's own words.
        message: String,
    },
    /// 409 because the engine is already doing it (removal of a container, for one).
    #[error("{step}: the engine is already doing this: {message}")]
    AlreadyInProgress {
        /// What was being done.
        step: String,
        /// The engine's own words.
        message: String,
    },
    /// No connection to the engine.
    #[error(
        "{step}: can't reach the Docker engine at {host}; see that it runs (systemctl status docker), \
         that this user may open its socket, and that DOCKER_HOST is right"
    )]
    Unreachable {
        /// What was being done.
        step: String,
        /// Address that was tried.
        host: String,
        /// The connection error.
        #[source]
        source: Cause,
    },
    /// The connection broke in the middle of an exchange.
    #[error(
        "{step}: the Docker engine closed the connection before it had answered in full; it was probably restarted"
    )]
    Broken {
        /// What was being done.
        step: String,
        /// The transport error.
        #[source]
        source: Cause,
    },
    /// The engine did not answer in time.
    #[error(
        "{step}: the Docker engine gave no answer in {} s; see whether `docker ps` answers, else restart the engine",
        after.as_secs_f32()
    )]
    Timeout {
        /// What was being done.
        step: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// The engine answered, but what it was asked to move was not there in time.
    #[error(
        "{step}: not done in {} s; see whether the registry is reachable and how fast it is, and api.pull-timeout or \
         api.push-timeout",
        after.as_secs_f32()
    )]
    Late {
        /// What was being done.
        step: String,
        /// The deadline that passed.
        after: Duration,
    },
    /// The engine answered, but nothing was moved for long.
    #[error(
        "{step}: nothing came from the registry for {} s; see whether it is reachable",
        after.as_secs_f32()
    )]
    Standstill {
        /// What was being done.
        step: String,
        /// How long nothing came.
        after: Duration,
    },
    /// Too many calls were already waiting for the engine when the deadline passed.
    #[error("{step}: not sent, {in_flight} other calls kept the Docker engine busy for {} s", after.as_secs_f32())]
    Busy {
        /// What was being done.
        step: String,
        /// Calls of the same class in flight.
        in_flight: usize,
        /// The deadline that passed.
        after: Duration,
    },
    /// The agent stops, and did not ask any more.
    #[error("{step}: not asked for, the agent is stopping; its next start goes on")]
    Stopping {
        /// What was to be done.
        step: String,
    },
    /// Any other refusal.
    #[error("{step}: the Docker engine answered {status}: {message}")]
    Engine {
        /// What was being done.
        step: String,
        /// HTTP status.
        status: u16,
        /// The engine's own words.
        message: String,
    },
    /// An error reported inside a progress stream (pull, push, import).
    #[error("{step}: {message}")]
    Progress {
        /// What was being done.
        step: String,
        /// The engine's own words.
        message: String,
    },
    /// The answer was not what the engine's API promises.
    #[error("{step}: the Docker engine's answer can't be understood")]
    Undecodable {
        /// What was being done.
        step: String,
        /// The decoding error.
        #[source]
        source: Cause,
    },
    /// The answer was larger than allowed.
    #[error("{step}: larger than the limit of {limit} bytes")]
    TooLarge {
        /// What was being done.
        step: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The container's log driver can't be read back.
    #[error(
        "{step}: the log driver of this container can't be read back; use `local` or `json-file` ({message})"
    )]
    LogsNotReadable {
        /// What was being done.
        step: String,
        /// The engine's own words.
        message: String,
    },
    /// A name that can't be part of a request.
    #[error("{step}: `{name}` is not a valid name")]
    BadName {
        /// What was being done.
        step: String,
        /// The name as given.
        name: String,
    },
    /// The engine's address is not one we can use.
    #[error("the Docker engine's address `{host}` can't be used: {reason}")]
    BadHost {
        /// The address as given.
        host: String,
        /// Why, and what would do.
        reason: &'static str,
    },
}

impl DockerError {
    /// True when the object named in the request does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// True when a host port was taken by someone else (engine-published ports only).
    pub fn is_port_taken(&self) -> bool {
        let message = match self {
            Self::Engine { message, .. } | Self::Conflict { message, .. } => message,
            _ => return false,
        };
        message.contains("port is already allocated") || message.contains("address already in use")
    }

    /// The refusal that belongs to an HTTP status.
    pub(super) fn from_status(step: String, status: u16, message: String) -> Self {
        match status {
            404 => Self::NotFound { step, message },
            409 if message.contains("already in progress") => {
                Self::AlreadyInProgress { step, message }
            }
            409 => Self::Conflict { step, message },
            _ => Self::Engine {
                step,
                status,
                message,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_become_the_variants_callers_branch_on() {
        let of = |status, text: &str| DockerError::from_status("x".into(), status, text.into());
        assert!(of(404, "No such container").is_not_found());
        assert!(matches!(
            of(409, "removal of container abc is already in progress"),
            DockerError::AlreadyInProgress { .. }
        ));
        assert!(matches!(
            of(409, "Container abc is not running"),
            DockerError::Conflict { .. }
        ));
        assert!(
            of(
                500,
                "Bind for 127.0.0.1:30001 failed: port is already allocated"
            )
            .is_port_taken()
        );
        assert!(!of(404, "port is already allocated").is_port_taken());
    }
}
