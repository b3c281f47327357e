//! Why a kernel could not be created, in words that say what to do, and as the exception the
//! manager knows.

use std::path::PathBuf;

use shared::ids::KernelId;
use thiserror::Error;

use crate::accelerator::host::GrantError;
use crate::causes::chain;
use crate::docker::DockerError;
use crate::image::ImageError;
use crate::kernel::container_request::{ContainerRequestError, HostFactsError};
use crate::kernel::distro::DistroError;
use crate::kernel::guarded_io::Silent;
use crate::kernel::journal::JournalError;
use crate::kernel::lifecycle::Reason;
use crate::kernel::model_definition::ModelDefinitionError;
use crate::kernel::mounts::MountError;
use crate::kernel::resource_text::ResourceTextError;
use crate::kernel::rows::RowsError;
use crate::kernel::runner_link::InitError;
use crate::kernel::scratch::ScratchError;
use crate::kernel::service_ports::ServicePortError;
use crate::link::LinkError;
use crate::ports::PortError;
use crate::resource::ResourceError;
use crate::rpc::Failure;
use crate::runner::LookupError;

/// A failed creation: one variant per step.
#[derive(Debug, Error)]
pub enum CreateError {
    /// A retry of a call that is still at work.
    #[error("Kernel creation already in progress (k:{0})")]
    InProgress(KernelId),
    /// The id is being destroyed.
    #[error("kernel {0} is being destroyed; ids are not used twice")]
    Ending(KernelId),
    /// The id runs something else.
    #[error("kernel {kernel} exists already with another session or image ({existing})")]
    Different {
        /// Which.
        kernel: KernelId,
        /// What it is.
        existing: String,
    },
    /// The ids of the call do not fit its configs.
    #[error("{0}")]
    Request(String),
    /// The image is for other machines.
    #[error(
        "the image {image} is for {wanted} and this node is {have}; choose an image of this \
         architecture"
    )]
    Architecture {
        /// Canonical name.
        image: String,
        /// Its architecture.
        wanted: String,
        /// The node's.
        have: &'static str,
    },
    /// The image's labels would make the engine's answers too long.
    #[error(
        "the image {image} has {bytes} bytes of labels, more than 128 KiB; the engine repeats them in all its lists, so use an image with fewer"
    )]
    Labels {
        /// Canonical name.
        image: String,
        /// Bytes of keys and values.
        bytes: usize,
    },
    /// The image is not there or could not be pulled.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The C library of the image could not be determined.
    #[error(transparent)]
    Distro(#[from] DistroError),
    /// Devices could not be reserved.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// A device plugin did not give its devices.
    #[error(transparent)]
    Grant(#[from] GrantError),
    /// Host ports could not be taken.
    #[error(transparent)]
    Ports(#[from] PortError),
    /// The service ports make no sense.
    #[error(transparent)]
    Services(#[from] ServicePortError),
    /// A folder cannot be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// What has to be looked at does not answer.
    #[error(transparent)]
    Silent(#[from] Silent),
    /// The model definition makes no sense.
    #[error(transparent)]
    Model(#[from] ModelDefinitionError),
    /// The scratch could not be made.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// `resource.txt` cannot say it.
    #[error(transparent)]
    ResourceText(#[from] ResourceTextError),
    /// `shmem` is no size.
    #[error("resource_opts.shmem is neither a number of bytes nor a size such as 64m: {0}")]
    SharedMemory(String),
    /// The in-container runner is not installed.
    #[error("the in-container runner cannot be used; run `bai-agent runner install` ({dir})", dir = dir.display())]
    Runner {
        /// Where it should be.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: LookupError,
    },
    /// Its seccomp profile, or a file with the operator's container options, is not one.
    #[error(transparent)]
    Host(#[from] HostFactsError),
    /// The network asked for does not exist here.
    #[error("Network plugin {0} not loaded!")]
    NetworkMode(String),
    /// The network has no name.
    #[error(
        "the manager asked for a network and named none (network_config has no network_name); its log says whether the session's network was made"
    )]
    NoNetworkName,
    /// The container request could not be built.
    #[error(transparent)]
    Container(#[from] ContainerRequestError),
    /// Docker refused to create the container.
    #[error(
        "Kernel failed to create container (k:{kernel}, detail: {})",
        chain(source)
    )]
    DockerCreate {
        /// Which.
        kernel: KernelId,
        /// Why.
        #[source]
        source: DockerError,
    },
    /// Docker refused to start it.
    #[error(
        "Kernel failed to start its container (k:{kernel}, detail: {})",
        chain(source)
    )]
    DockerStart {
        /// Which.
        kernel: KernelId,
        /// Why.
        #[source]
        source: DockerError,
    },
    /// Another Docker call failed.
    #[error("{step} failed for kernel {kernel}: {}", chain(source))]
    Docker {
        /// What.
        step: &'static str,
        /// Which.
        kernel: KernelId,
        /// Why.
        #[source]
        source: DockerError,
    },
    /// The kernel's user could not be allowed to become root.
    #[error("sudo cannot be allowed in the container; see that its image has a shell: {0}")]
    Sudo(String),
    /// The container's address or interface could not be found.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// The ports are not served.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The journal could not be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The container ended before its runner answered.
    #[error(
        "Container startup failed, the container has ended with exit code {} before its runner \
         answered; its last words: {tail}",
        exit_code.map_or_else(|| "unknown".to_owned(), |code| code.to_string())
    )]
    Died {
        /// Its exit code.
        exit_code: Option<i64>,
        /// The end of its console.
        tail: String,
    },
    /// The runner did not answer.
    #[error(
        "Timeout during container startup (k:{kernel}, container: {container}): {}; its last words: {tail}",
        chain(source)
    )]
    NotReady {
        /// Which.
        kernel: KernelId,
        /// Its container.
        container: String,
        /// The end of its console.
        tail: String,
        /// Why.
        #[source]
        source: InitError,
    },
    /// Somebody destroyed the kernel meanwhile.
    #[error("Cancelled waiting of container startup (k:{kernel}, reason: {reason})")]
    Aborted {
        /// Which.
        kernel: KernelId,
        /// Why it was destroyed.
        reason: Reason,
    },
    /// Our own code panicked.
    #[error("a defect of the agent ended the creation; its log says where, please report it")]
    Defect,
    /// The agent stops.
    #[error("the agent is stopping; the creation goes on or is undone at its next start")]
    Stopping,
}

impl CreateError {
    /// The exit code of the container, when that is what failed.
    pub fn exit_code(&self) -> Option<i64> {
        match self {
            CreateError::Died { exit_code, .. } => *exit_code,
            _ => None,
        }
    }

    /// The Python exception the original would raise.
    pub fn class(&self) -> &'static str {
        match self {
            CreateError::InProgress(_) | CreateError::Ending(_) | CreateError::Different { .. } => {
                "ResourceError"
            }
            CreateError::Resource(err) => err.class(),
            CreateError::Image(err) => err.class(),
            CreateError::Ports(_) | CreateError::NetworkMode(_) => "RuntimeError",
            CreateError::Services(_)
            | CreateError::SharedMemory(_)
            | CreateError::Request(_)
            | CreateError::NoNetworkName => "ValueError",
            CreateError::Sudo(_) | CreateError::Rows(_) | CreateError::Link(_) => {
                "ContainerCreationError"
            }
            _ => "AgentError",
        }
    }

    /// The reply to the manager.
    pub fn failure(&self) -> Failure {
        // Variants that show their causes themselves must not show them twice.
        let text = match self {
            CreateError::DockerCreate { .. }
            | CreateError::DockerStart { .. }
            | CreateError::Docker { .. }
            | CreateError::NotReady { .. } => self.to_string(),
            _ => chain(self),
        };
        Failure::new(self.class(), text)
    }
}
