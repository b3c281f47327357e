//! Why the agent could not start, or could not go on.

use std::path::PathBuf;

use shared::lock::LockLost;
use shared::run_dir::RunDirError;
use thiserror::Error;

use crate::accelerator::mock::MockError;
use crate::cluster::ClusterError;
use crate::docker::DockerError;
use crate::events::FileSinkError;
use crate::events::bus::BusError;
use crate::kernel::agent_socket::AgentSocketError;
use crate::kernel::journal::JournalError;
use crate::kernel::kept_logs::KeptLogsError;
use crate::kernel::recovery::RecoveryError;
use crate::link::{LinkError, LinkOpenError};
use crate::resource::InventoryError;
use crate::rpc::{BindError, KeyError};

/// Why the agent could not start, or could not go on.
#[derive(Debug, Error)]
pub enum AppError {
    /// A directory of the configuration cannot be used.
    #[error("cannot prepare the node's directories")]
    Directories(#[source] config::DirectoryError),
    /// The run directory cannot be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The regions cannot be used, for one because another agent of this id runs.
    #[error(transparent)]
    Link(#[from] LinkOpenError),
    /// The rows of an earlier life cannot be changed.
    #[error(transparent)]
    Rows(#[from] LinkError),
    /// Docker's address is wrong.
    #[error(transparent)]
    Docker(#[from] DockerError),
    /// The journal cannot be used.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kept logs cannot be used.
    #[error(transparent)]
    Logs(#[from] KeptLogsError),
    /// The events file cannot be used.
    #[error(transparent)]
    Events(#[from] FileSinkError),
    /// The node's devices cannot be read.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The made-up devices cannot be used.
    #[error(transparent)]
    Mock(#[from] MockError),
    /// The socket for programs in containers cannot be served.
    #[error(transparent)]
    AgentSocket(#[from] AgentSocketError),
    /// The directory of the sockets for kernels cannot be used.
    #[error("cannot use the directory {path}; see that agent.ipc-base-path is writable", path = path.display())]
    HostSockets {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The cluster cannot be joined.
    #[error(transparent)]
    Cluster(ClusterError),
    /// The bus cannot be set up.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// What was running cannot be taken over.
    #[error(transparent)]
    Recovery(#[from] RecoveryError),
    /// A key file cannot be used.
    #[error("cannot read the key file {path}", path = path.display())]
    Key {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// The RPC address cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The agent's own counters cannot be set up.
    #[error("cannot set up the agent's counters")]
    Counters(#[source] metrics_exporter_prometheus::BuildError),
    /// Signals cannot be received.
    #[error("cannot receive signals")]
    Signals(#[source] std::io::Error),
    /// Another agent has come to hold the node.
    #[error(transparent)]
    LockLost(#[from] LockLost),
    /// The agent was told to stop before it was ready.
    #[error("stopped before the node was ready")]
    Interrupted,
}

impl AppError {
    /// Whether only a change of the configuration helps, not another try.
    pub fn is_of_configuration(&self) -> bool {
        match self {
            AppError::Directories(_)
            | AppError::RunDir(_)
            | AppError::Key { .. }
            | AppError::Cluster(_)
            | AppError::Mock(_) => true,
            AppError::AgentSocket(AgentSocketError::Directory { source, .. })
            | AppError::HostSockets { source, .. } => is_distrust(source),
            AppError::Bind(err) => matches!(err, BindError::KeyMismatch),
            _ => false,
        }
    }
}

impl From<ClusterError> for AppError {
    fn from(err: ClusterError) -> AppError {
        match err {
            ClusterError::Interrupted => AppError::Interrupted,
            err => AppError::Cluster(err),
        }
    }
}

/// Whether a directory was refused for whom it, or one above it, belongs to.
fn is_distrust(source: &std::io::Error) -> bool {
    let inner = source.get_ref();
    let inner = inner.and_then(|err| err.downcast_ref::<RunDirError>());
    matches!(inner, Some(RunDirError::Shared { .. }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_of_the_configuration_is_one() {
        let address = "nowhere.invalid:6001".to_owned();
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        let passing = [
            BindError::NoAddress(address.clone()),
            BindError::Resolve { address, source },
        ];
        for err in passing.map(AppError::Bind) {
            assert!(!err.is_of_configuration(), "{err}");
        }
        assert!(AppError::Bind(BindError::KeyMismatch).is_of_configuration());
    }
}
