//! Everything that operations on kernels work with, and the place where lifecycle actions turn into
//! work.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use config::Config;
use shared::ids::{ContainerId, KernelId};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::abuse::AbuseReports;
use super::container_request::ContainerSettings;
use super::distro::Distros;
use super::guarded_io::GuardedIo;
use super::host_sockets::HostSockets;
use super::journal::{Journal, JournalError};
use super::kept_logs::KeptLogs;
use super::lifecycle::{Action, State};
use super::record::Record;
use super::registry::{Kernel, Registry};
use super::scratch::Scratch;
use crate::accelerator::Accelerators;
use crate::accelerator::host::PluginHost;
use crate::background::BackgroundTasks;
use crate::blocking::blocking;
use crate::cluster::Cluster;
use crate::docker::Docker;
use crate::events::bus::console_logs::ConsoleLogs;
use crate::events::{Event, Events, Severity};
use crate::image::Images;
use crate::link::Link;
use crate::ports::PortPool;
use crate::resource::Ledger;
use crate::storage_proxy::StorageProxy;
use crate::volumes::Volumes;

/// One worker node.
#[derive(Debug)]
pub struct Node {
    /// The configuration.
    pub config: Arc<Config>,
    /// The engine.
    pub docker: Docker,
    /// Where events go.
    pub events: Events,
    /// The kernels.
    pub registry: Registry,
    /// Host ports.
    pub ports: PortPool,
    /// Devices.
    pub ledger: Ledger,
    /// What the drivers told of accelerators.
    pub accelerators: Accelerators,
    /// Device plugins of Kubernetes.
    pub plugin_host: PluginHost,
    /// The journal.
    pub journal: Journal,
    /// The ends of kernels.
    pub ends: Journal,
    /// What commits under way may leave behind.
    pub commits: Journal,
    /// Consoles of ended kernels.
    pub logs: KeptLogs,
    /// The dataplane.
    pub link: Link,
    /// What of the configuration containers depend on.
    pub settings: ContainerSettings,
    /// Where the operator may add to container requests.
    pub override_files: Vec<PathBuf>,
    /// The images of this node.
    pub images: Images,
    /// The C libraries of images.
    pub distros: Distros,
    /// The kernels' files.
    pub scratch: Scratch,
    /// Work on folders, which may hang.
    pub guarded_io: GuardedIo,
    /// Directory of the socket for programs in containers.
    pub socket_dir: PathBuf,
    /// Bounds the creations at work on this node, whichever calls they belong to.
    pub creations: Semaphore,
    /// Bounds the containers that are being stopped.
    pub stop_turns: Semaphore,
    /// Bounds the consoles of ending kernels that are in memory.
    pub console_turns: Semaphore,
    /// Containers that cannot be adopted, so that each is reported once.
    pub left_alone: Mutex<HashSet<ContainerId>>,
    /// Containers of this agent that run, as of the last comparison with the engine.
    pub active_containers: watch::Sender<Option<usize>>,
    /// The resource group, which managers may change while the node runs.
    pub scaling_group: watch::Sender<String>,
    /// The cluster; none in standalone mode.
    pub cluster: Option<Cluster>,
    /// Brings consoles of ended kernels to the cluster.
    pub consoles: Option<ConsoleLogs>,
    /// Cancelled when the agent stops. Kernels stay.
    pub stopping: CancellationToken,
    /// Sockets of this host that kernels were given.
    pub host_sockets: HostSockets,
    /// Kernels that were reported for abuse.
    pub abuse: AbuseReports,
    /// Volumes mounted on request.
    pub volumes: Volumes,
    /// What the storage proxy tells of folders; none when none is configured.
    pub storage_proxy: Option<StorageProxy>,
    /// The operations under way.
    pub tasks: TaskTracker,
    /// Those of them that their callers follow by events.
    pub background: BackgroundTasks,
}

impl Node {
    /// The agent's id: the owner of its containers.
    pub fn agent_id(&self) -> &str {
        &self.config.agent.id
    }

    /// Carries out what the lifecycle decided. Waiting, refusing, answering and forgetting are the
    /// caller's.
    pub fn perform(self: &Arc<Self>, kernel: &Arc<Kernel>, actions: &[Action]) {
        for action in actions {
            match action {
                Action::StopAndClean | Action::Clean => self.spawn_ending(kernel),
                Action::NoteEnding => {
                    let (node, kernel) = (self.clone(), kernel.clone());
                    self.tasks
                        .spawn(async move { node.note(&kernel, |_| {}).await });
                }
                Action::AnnounceStarted => {
                    kernel.start_told(Instant::now());
                    self.tell_start(kernel);
                }
                Action::AnnounceTerminated => {
                    if let State::Ended(ending) = kernel.state() {
                        self.events.emit(Event::KernelTerminated {
                            kernel: kernel.id,
                            session: kernel.session,
                            reason: ending.told(),
                            exit_code: ending.exit_code,
                        });
                    }
                }
                Action::Forget
                | Action::Proceed
                | Action::AnswerStored
                | Action::Refuse(_)
                | Action::AbortCreation
                | Action::StopForRestart
                | Action::JoinEnding
                | Action::JoinRestart => {}
            }
        }
    }

    fn tell_start(&self, kernel: &Kernel) {
        self.events.emit(Event::KernelStarted {
            kernel: kernel.id,
            session: kernel.session,
            creation_info: kernel
                .with_record(|record| record.result.clone())
                .unwrap_or_default(),
        });
    }

    /// Tells the manager of a kernel in service that it still believes under creation: the word on
    /// its start never reached it. One that has read it takes no notice of another. Not soon after
    /// the last time, and not while the bus is away, where that word may still wait.
    pub fn tell_start_again(&self, kernel: &Kernel) {
        let reachable = |cluster: &Cluster| cluster.bus.state().borrow().connected == Some(true);
        if self.cluster.as_ref().is_some_and(reachable) && kernel.may_tell_start(Instant::now()) {
            tracing::info!(kernel_id = %kernel.id, "the manager takes a running kernel for one under creation; telling its start again");
            self.tell_start(kernel);
        }
    }

    fn spawn_ending(self: &Arc<Self>, kernel: &Arc<Kernel>) {
        let (node, kernel) = (self.clone(), kernel.clone());
        self.tasks
            .spawn(async move { super::destroy::end(&node, &kernel).await });
    }

    /// Tells administrators of a failure: the bus limits how many go out.
    pub fn report<const N: usize>(&self, message: String, context: [(&str, String); N]) {
        self.events.emit(Event::AgentError {
            message,
            trace: None,
            context: context
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.into()))
                .collect(),
            severity: Severity::Error,
        });
    }

    /// Shows a step of a creation to people who watch it.
    pub fn progress(&self, kernel: KernelId, step: impl Into<String>) {
        self.events.emit(Event::KernelProgress {
            kernel,
            step: step.into(),
        });
    }

    /// Stores the record of a kernel off the async workers.
    ///
    /// # Errors
    /// The file cannot be written; the one before stays.
    pub async fn store(&self, kernel: &Kernel) -> Result<(), JournalError> {
        let (journal, entry) = (self.journal.clone(), kernel.journal_entry());
        blocking(move || entry.write(&journal)).await
    }

    /// Changes the record of a kernel and stores it. A journal that cannot be written is reported
    /// and not fatal: labels and Docker still tell most of it.
    pub async fn note(&self, kernel: &Kernel, change: impl FnOnce(&mut Record)) {
        kernel.update_record(change);
        if let Err(err) = self.store(kernel).await {
            tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error, "cannot write the journal");
        }
    }

    /// The address host ports are bound to.
    pub fn bind_host(&self) -> std::net::IpAddr {
        self.config.container.bind_host
    }
}
