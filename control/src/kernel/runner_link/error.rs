//! Why requests to a runner fail.

use std::time::Duration;

use super::runs::RunRefused;

/// Why a request to the runner failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The link was closed (the kernel is going away).
    #[error("the connection to the kernel's runner is closed")]
    Closed,
    /// No answer in time; the runner may still be working on it.
    #[error("the kernel's runner did not answer `{request}` within {limit:?}")]
    Timeout {
        /// Type of the request.
        request: &'static str,
        /// How long was waited.
        limit: Duration,
    },
    /// The runner does not take messages, or not as fast as they come, and the queue is full.
    #[error(
        "too much waits for the kernel's runner already ({queued} messages, {} KiB with the runs that wait for their turn); try again when it has taken some, or interrupt what it runs", bytes / 1024
    )]
    Backlogged {
        /// Messages waiting.
        queued: usize,
        /// Bytes of payload waiting, those of waiting runs included.
        bytes: usize,
    },
    /// The runner's answer could not be read.
    #[error("the kernel's runner answered `{request}` with something else than expected")]
    BadAnswer {
        /// Type of the request.
        request: &'static str,
        /// What is wrong with it.
        #[source]
        source: BadAnswer,
    },
    /// A run was refused.
    #[error("the run was refused")]
    Refused(#[source] RunRefused),
}

/// Why an answer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BadAnswer {
    /// It should be msgpack.
    #[error(transparent)]
    Msgpack(#[from] rmp_serde::decode::Error),
    /// It should be JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

impl LinkError {
    /// An answer to this request that could not be read.
    pub(in crate::kernel) fn bad_answer(
        request: &'static str,
        source: impl Into<BadAnswer>,
    ) -> Self {
        let source = source.into();
        LinkError::BadAnswer { request, source }
    }
}
