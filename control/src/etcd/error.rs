//! Why something could not be read from or written to etcd.

use std::error::Error as _;
use std::path::PathBuf;

use thiserror::Error;

/// A failed step.
#[derive(Debug, Error)]
pub enum EtcdError {
    /// A certificate or key cannot be read.
    #[error("cannot read {path}; check the tls-* keys of [etcd]", path = path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// No address answered, or those that did refused and the others may not.
    #[error("etcd does not answer at {endpoints} ({reason})")]
    Unreachable {
        /// All that were tried.
        endpoints: String,
        /// What was wrong with the last one, after what the first said that refused.
        reason: String,
    },
    /// No address answered in time.
    #[error("etcd at {endpoints} did not answer within {seconds} s")]
    Deadline {
        /// All that were tried.
        endpoints: String,
        /// How long was waited.
        seconds: u64,
    },
    /// A value is not text. Whoever wrote it has to write it again.
    #[error("the value of {key} in etcd is not text (UTF-8); write it again, or remove the key")]
    NotText {
        /// Where it lies.
        key: String,
    },
    /// etcd answered that it will not; another try would end the same.
    #[error("etcd at {endpoint} refused to {step}; {remedy}")]
    Refused {
        /// The address that did.
        endpoint: String,
        /// What was asked for.
        step: &'static str,
        /// What to do.
        remedy: &'static str,
        /// Its words.
        #[source]
        source: etcd_client::Error,
    },
}

impl EtcdError {
    /// Whether the same call may succeed later without anybody changing anything here.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            EtcdError::Unreachable { .. } | EtcdError::Deadline { .. } | EtcdError::NotText { .. }
        )
    }

    /// Whether etcd answers and does not let this node do what it must, whatever it asks for.
    pub(super) fn is_denial(&self) -> bool {
        match self {
            EtcdError::Refused { source, .. } => {
                matches!(verdict(source), Verdict::Denied(_) | Verdict::LogIn)
            }
            _ => false,
        }
    }
}

/// Why an attempt failed, in a few words: the deepest cause, where the transport names one, for the
/// client's own text repeats the whole chain with the names of its types.
pub(super) fn reason(error: &etcd_client::Error) -> String {
    let etcd_client::Error::GRpcStatus(status) = error else {
        return error.to_string();
    };
    std::iter::successors(status.source(), |&cause| cause.source())
        .last()
        .map_or_else(|| status.message().to_owned(), ToString::to_string)
}

/// What a failed attempt means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The member or the way to it: ask another.
    Elsewhere,
    /// Our log-in is no longer known: log in again.
    LogIn,
    /// This node is not let in, or may not do this; the text says what to do.
    Denied(&'static str),
    /// The answer is final; the text says what to do.
    Final(&'static str),
}

/// Numbers of gRPC's status codes.
mod code {
    pub const INVALID_ARGUMENT: i32 = 3;
    pub const PERMISSION_DENIED: i32 = 7;
    pub const FAILED_PRECONDITION: i32 = 9;
    pub const OUT_OF_RANGE: i32 = 11;
    pub const UNAUTHENTICATED: i32 = 16;
}

pub(super) fn verdict(error: &etcd_client::Error) -> Verdict {
    const CREDENTIALS: &str = "check etcd.user and etcd.password";
    const RIGHTS: &str = "give the user of [etcd] read and write rights below the namespace";
    let status = match error {
        etcd_client::Error::GRpcStatus(status) => status,
        etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => {
            return Verdict::Final("check etcd.addr");
        }
        // A watch is ended with words alone.
        etcd_client::Error::WatchError(reason) if reason.contains("permission denied") => {
            return Verdict::Denied(RIGHTS);
        }
        _ => return Verdict::Elsewhere,
    };
    match status.code() as i32 {
        code::UNAUTHENTICATED => Verdict::LogIn,
        // Users or roles were changed since the log-in.
        code::INVALID_ARGUMENT if status.message().contains("auth store is old") => Verdict::LogIn,
        code::INVALID_ARGUMENT if status.message().contains("user name is empty") => {
            Verdict::Denied("it has users: set etcd.user and etcd.password")
        }
        code::INVALID_ARGUMENT if status.message().contains("authentication failed") => {
            Verdict::Denied(CREDENTIALS)
        }
        code::FAILED_PRECONDITION if status.message().contains("not enabled") => {
            Verdict::Denied("it has no users: remove etcd.user and etcd.password")
        }
        code::PERMISSION_DENIED => Verdict::Denied(RIGHTS),
        // The client's own limit, in its own words.
        code::OUT_OF_RANGE if status.message().contains("message length too large") => {
            Verdict::Final("more lies there than 4 MiB: remove the keys that are no settings")
        }
        code::INVALID_ARGUMENT | code::FAILED_PRECONDITION => {
            Verdict::Final("see the log of etcd for the reason")
        }
        _ => Verdict::Elsewhere,
    }
}
