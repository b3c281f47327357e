//! Construction and wiring of the control process: the only module that knows all the others.
//!
//! In: the configuration. Out: a node that answers, until it is told to stop. Invariant: the order.
//! The directory's lock and a free RPC address before anything is touched; Docker and the found kernels before the first
//! RPC is answered; READY after that. Stopping leaves containers, rows and journal as they are.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use config::{Config, CudaInjection, CurveFiles, Host, LoadOptions, Loaded, Publish, ThisHost};
use shared::Sizes;
use shared::desired::NodeRow;
use shared::lock::Ousted;
use shared::run_dir::{RunDir, RunDirError};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accelerator::engine::{EngineDevices, EngineFacts};
use crate::accelerator::host::{self, PluginHost};
use crate::accelerator::{self, Accelerators, mock::MockError, settings};
use crate::background::BackgroundTasks;
use crate::blocking::blocking;
use crate::causes::chain;
use crate::cluster::{self, Changes, Cluster, ClusterError, Joined, Starting, notices};
use crate::docker::{Deadlines, Docker, DockerError, DockerOptions};
use crate::events::bus::console_logs::ConsoleLogs;
use crate::events::bus::{Bus, BusError};
use crate::events::{Event, Events, FileSink, FileSinkError, LogSink, Sink};
use crate::files::{plain_name, replace_file};
use crate::firewall;
use crate::heartbeat::{Heartbeat, Identity};
use crate::http::{self, EngineWatch};
use crate::image::Images;
use crate::kernel::abuse::{self, AbuseReports};
use crate::kernel::agent_socket::{self, AgentSocketError, AgentSocketOptions};
use crate::kernel::container_processes::KernelFiles;
use crate::kernel::container_request::{ContainerSettings, override_files, override_part};
use crate::kernel::destroy::{CONSOLES_AT_ONCE, stops_at_once};
use crate::kernel::distro::Distros;
use crate::kernel::host_sockets::HostSockets;
use crate::kernel::journal::{Journal, JournalError};
use crate::kernel::kept_logs::{KeptLogs, KeptLogsError};
use crate::kernel::lifecycle::State;
use crate::kernel::looks::Looks;
use crate::kernel::record::Record;
use crate::kernel::recovery::{self, RecoveryError};
use crate::kernel::registry::Registry;
use crate::kernel::scratch::{Scratch, ScratchKind};
use crate::kernel::{Node, memory_nodes, monitor};
use crate::link::{Link, LinkOpenError};
use crate::metadata::{self, redirect};
use crate::metrics::Recorder;
use crate::pid_file::PidFile;
use crate::ports::{DEFAULT_REST, PortPool};
use crate::resource::{InventoryError, Ledger};
use crate::rpc::methods::AgentService;
use crate::rpc::{
    BindError, CurveServer, KeyError, KeyPair, Limits, PublicKey, Server, ServerOptions,
    await_address,
};
use crate::runner::RunnerFiles;
use crate::stats::publish;
use crate::storage_proxy::{self, StorageProxy};
use crate::volumes::{self, Volumes};

/// Events kept in the process.
const EVENT_RING: usize = 4096;
/// Pauses between attempts to reach Docker at start: doubled up to the second.
const DOCKER_PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// How long the RPC address may still be held by the last process of this agent, whose lock is free: the
/// kernel closes what a process had open one after the other.
const ADDRESS_GRACE: Duration = Duration::from_millis(500);
/// How long the heartbeat may take to end.
const HEARTBEAT_END: Duration = Duration::from_secs(2);
/// How long the last events may take to the bus when the agent is told to stop.
const BUS_GRACE: Duration = Duration::from_secs(3);
/// How long operations under way may take when the agent is told to stop.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Between two times at which unused memory is given back.
const TRIM_PAUSE: Duration = Duration::from_secs(600);
/// Deadline of one step on a scratch directory.
const SCRATCH_LIMIT: Duration = Duration::from_secs(120);

/// Why the agent could not start.
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
    Ousted(#[from] Ousted),
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

/// Runs the agent until it is told to stop. The options are those the configuration was loaded with:
/// what the cluster sets is laid over the same file.
///
/// # Errors
/// It could not start, or one of its parts has ended.
pub async fn run(loaded: Loaded, options: Arc<LoadOptions>) -> Result<(), AppError> {
    let stopping = CancellationToken::new();
    listen_for_signals(&stopping)?;
    let recorder = Recorder::install().map_err(AppError::Counters)?;
    // A wrong key file is told at once, not after Docker was waited for.
    let curve = curve(loaded.config.agent.rpc_auth.as_ref())?;
    let link = take_node(&loaded.config, &stopping).await?;
    let ousted = link.ousted();
    let served = serve(loaded, options, link, recorder, curve, stopping);
    tokio::select! {
        served = Box::pin(served) => served,
        // No farewell: the node and its kernels are the other's, who is not to be taken for stopped.
        ousted = ousted => Err(ousted.into()),
    }
}

/// All that is done with the node's lock held.
async fn serve(
    loaded: Loaded,
    options: Arc<LoadOptions>,
    link: Link,
    recorder: Recorder,
    curve: Option<CurveServer>,
    stopping: CancellationToken,
) -> Result<(), AppError> {
    let config = loaded.config.clone();
    let public_key = curve.as_ref().map(|curve| curve.pair.public);
    // After the lock: a second agent of this id leaves the first one's file alone.
    let path = config.agent.pid_file.clone();
    let _pid_file = blocking(move || PidFile::write(&path)).await;
    let starting = Starting::new(&config);
    let (config, joined) = if config.standalone {
        (config, None)
    } else {
        let joined = Box::pin(cluster::join(options, &config, &starting, &stopping)).await?;
        // Those of the file alone were told when it was read.
        let told = &loaded.notes;
        for note in joined
            .loaded
            .notes
            .iter()
            .filter(|note| !told.contains(note))
        {
            tracing::warn!(key = note.key, "{}", note.text);
        }
        (joined.loaded.config.clone(), Some(joined))
    };
    let node = assemble(config, link, joined, &starting, &stopping).await?;
    let address = node.config.agent.rpc_listen_addr.to_string();
    // Another agent may have come while etcd or Docker was waited for, and etcd may name another address.
    await_address(&address, ADDRESS_GRACE).await?;
    let recovered = tokio::select! {
        recovered = recovery::recover(&node) => recovered?,
        () = stopping.cancelled() => return Err(AppError::Interrupted),
    };
    tracing::info!(
        adopted = recovered.adopted,
        resumed = recovered.resumed,
        finishing = recovered.finishing,
        removed = recovered.removed,
        "took the node over"
    );
    let options = ServerOptions {
        address,
        curve,
        limits: limits(&node.config),
    };
    let service = Arc::new(AgentService::new(node.clone()));
    let server = Server::bind(options, service).await?;
    let engine = EngineWatch::begin(&node);
    let pages = http::Service::new(node.clone(), recorder, engine);
    if let Some(cluster) = &node.cluster {
        let store = Arc::new(cluster.bus.statistics().clone());
        tokio::spawn(publish::run(node.clone(), store));
        if let Some(requests) = cluster.bus.take_volume_requests() {
            node.tasks.spawn(volumes::serve(node.clone(), requests));
        }
    }
    let loops = begin_loops(&node, pages);
    if let Some(cluster) = &node.cluster {
        cluster.register(&node.config, stopping.clone()).await;
    }
    node.events.emit(Event::AgentStarted {
        reason: "self-started",
    });
    let heartbeat = node.cluster.as_ref().map(|cluster| {
        let heartbeat = Heartbeat {
            identity: Identity::of(&node.config, public_key.as_ref()),
            period: node.config.debug.heartbeat_interval,
            scaling_group: node.scaling_group.subscribe(),
        };
        tokio::spawn(heartbeat.run(node.clone(), cluster.bus.clone()))
    });
    starting.step("ready");
    tracing::info!(agent_id = node.agent_id(), address = %server.local_addr(), "the agent is ready");
    // Not under systemd there is nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    trim_until(&stopping).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping; kernels go on");
    stop(&node, server, loops, heartbeat).await;
    Ok(())
}

/// What goes on beside the RPC for as long as the agent runs.
fn begin_loops(node: &Arc<Node>, pages: http::Service) -> Vec<JoinHandle<()>> {
    vec![
        tokio::spawn(http::serve(Arc::new(pages))),
        tokio::spawn(monitor::follow_events(node.clone())),
        tokio::spawn(monitor::follow_samples(node.clone())),
        tokio::spawn(monitor::reconcile_periodically(node.clone())),
        tokio::spawn(abuse::watch(node.clone())),
        tokio::spawn(memory_nodes::watch(node.clone())),
        tokio::spawn(accelerator::follow(node.clone())),
        tokio::spawn(notices::run(node.clone())),
        tokio::spawn(firewall::follow(node.clone())),
        tokio::spawn(host::serve(node.clone())),
        tokio::spawn(storage_proxy::run(node.clone())),
        tokio::spawn(metadata::serve(node.clone())),
        tokio::spawn(redirect::follow(node.clone())),
    ]
}

/// Gives memory back now and then, until the agent is told to stop.
async fn trim_until(stopping: &CancellationToken) {
    loop {
        blocking(shared::heap::trim).await;
        if tokio::time::timeout(TRIM_PAUSE, stopping.cancelled())
            .await
            .is_ok()
        {
            return;
        }
    }
}

/// Says farewell, then ends everything, each part in its time.
async fn stop(
    node: &Arc<Node>,
    server: Server,
    loops: Vec<JoinHandle<()>>,
    heartbeat: Option<JoinHandle<()>>,
) {
    // A heartbeat after the farewell would make the manager take the node for alive again.
    if let Some(heartbeat) = heartbeat
        && tokio::time::timeout(HEARTBEAT_END, heartbeat)
            .await
            .is_err()
    {
        tracing::warn!("the heartbeat did not end in time");
    }
    node.events
        .emit(Event::AgentTerminated { reason: "shutdown" });
    server.shutdown(Duration::from_secs(2)).await;
    node.tasks.close();
    let ended = async {
        for task in loops {
            let _ = task.await;
        }
        node.tasks.wait().await;
    };
    if tokio::time::timeout(STOP_GRACE, ended).await.is_err() {
        tracing::warn!(
            left = node.tasks.len(),
            "operations were cut short; the next start goes on with them"
        );
    }
    leave_runners(node).await;
    keep_distros(node).await;
    if let Some(cluster) = &node.cluster {
        cluster.bus.close(BUS_GRACE).await;
    }
}

/// Leaves the runners of kernels in service to the next start. Those that are still being waited for
/// keep their link until the process ends: without it their starts would be taken for failed, and undone.
async fn leave_runners(node: &Arc<Node>) {
    for kernel in node.registry.all() {
        if matches!(kernel.state(), State::Creating { .. }) {
            continue;
        }
        if let Some(runner) = kernel.set_runner(None) {
            runner.leave().await;
            let owed = runner.owed().borrow().clone();
            if kernel.with_record(Record::owed) != owed {
                node.note(&kernel, |record| record.set_owed(owed)).await;
            }
        }
    }
}

/// Takes the node's lock and its region: a second agent of this id, also the Python agent's successor while
/// that still serves the RPC address, ends here, before it has told the cluster anything or touched a container.
async fn take_node(config: &Arc<Config>, stopping: &CancellationToken) -> Result<Link, AppError> {
    let prepared = config.clone();
    blocking(move || prepared.prepare_directories().map(drop))
        .await
        .map_err(AppError::Directories)?;
    let run_dir = RunDir::choose(Some(&config.node.run_dir), &config.agent.id)?;
    let link = Link::open(run_dir, sizes(config), node_row(config), stopping.clone())?;
    let address = config.agent.rpc_listen_addr.to_string();
    match await_address(&address, ADDRESS_GRACE).await {
        // Names may have no meaning yet while a host starts.
        Ok(()) | Err(BindError::Resolve { .. } | BindError::NoAddress(_)) => Ok(link),
        Err(taken) => Err(taken.into()),
    }
}

fn listen_for_signals(stopping: &CancellationToken) -> Result<(), AppError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(AppError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AppError::Signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(AppError::Signals)?;
    let stopping = stopping.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => stopping.cancel(),
                _ = interrupt.recv() => stopping.cancel(),
                _ = hangup.recv() => tracing::warn!(
                    "SIGHUP was received; the configuration is read at start only, restart the agent to apply changes (kernels go on)"
                ),
                () = stopping.cancelled() => return,
            }
        }
    });
    Ok(())
}

/// Builds the node from the configuration; nothing of what runs is touched yet.
async fn assemble(
    config: Arc<Config>,
    link: Link,
    joined: Option<Joined>,
    starting: &Starting,
    stopping: &CancellationToken,
) -> Result<Arc<Node>, AppError> {
    let agent_id = config.agent.id.clone();
    let scaling_group = watch::Sender::new(config.agent.scaling_group.clone());
    let docker = Docker::new(&docker_options(&config))?;
    reach_docker(&docker, starting, stopping).await?;
    let state_dir = config.agent.var_base_path.clone();
    let journal = Journal::open(&state_dir, &agent_id)?;
    let ends = Journal::open_ends(&state_dir, &agent_id)?;
    let commits = Journal::open_commits(&state_dir, &agent_id)?;
    let logs = KeptLogs::open(&state_dir, &agent_id)?;
    let events_file = state_dir.join(format!("events.{}.jsonl", plain_name(&agent_id)));
    let mut sinks: Vec<Box<dyn Sink>> =
        vec![Box::new(LogSink), Box::new(FileSink::open(&events_file)?)];
    let accelerator_options = joined
        .as_ref()
        .map(|joined| settings::of_tree(&joined.settings.accelerator.tree))
        .unwrap_or_default();
    let cluster = match joined {
        None => None,
        Some(joined) => {
            let cluster = take_part(joined, scaling_group.subscribe(), stopping).await?;
            sinks.push(Box::new(cluster.bus.sink()));
            Some(cluster)
        }
    };

    let tasks = TaskTracker::new();
    let (engine, own_users) = ask_engine(&docker, &config, &tasks, stopping).await;
    let inventory = config.clone();
    let facts = engine.clone();
    let (ledger, accelerators) = blocking(move || {
        let accelerators = Accelerators::open(&inventory, &accelerator_options, facts);
        let ledger = Ledger::discover(&inventory, accelerators.plugins()?)?;
        Ok::<_, AppError>((ledger, accelerators))
    })
    .await?;
    let override_files = files_for_containers(&config).await;
    let distros = known_distros(&docker, &config).await;
    let (socket_dir, host_sockets) = open_sockets(&config, stopping).await?;
    let range = config.container.port_range;
    let kind = ScratchKind::of(
        config.container.scratch_type,
        config.container.scratch_size.0,
    );
    let creations = usize::try_from(config.agent.kernel_creation_concurrency)
        .unwrap_or(1)
        .max(1);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    if config.node.publish == Publish::Auto && !docker.is_local() {
        tracing::info!("the engine is remote: it publishes the ports itself");
    }
    let honours_firewall = AtomicBool::new(firewall_decides(&config).await);
    let events = Events::new(EVENT_RING, sinks);
    let consoles = cluster.as_ref().map(|cluster| {
        ConsoleLogs::start(
            &cluster.bus,
            logs.clone(),
            events.clone(),
            usize::try_from(config.container_logs.chunk_size.0).unwrap_or(usize::MAX),
            &tasks,
            stopping.clone(),
        )
    });
    let volumes = Volumes::new(&config, cluster.as_ref().map(|cluster| &cluster.etcd));
    Ok(Arc::new(Node {
        settings: ContainerSettings::of(&config),
        images: Images::new(docker.clone()),
        background: BackgroundTasks::new(events.clone(), tasks.clone(), stopping.clone()),
        events,
        registry: Registry::default(),
        ports: PortPool::new(range.first, range.last, DEFAULT_REST),
        scratch: Scratch::new(config.container.scratch_root.clone(), kind, SCRATCH_LIMIT)
            .of_agent(&config.agent.id)
            .open_to_engine(own_users),
        looks: Looks::new(config.node.folder_wait),
        creations: Semaphore::new(creations),
        stop_turns: Semaphore::new(stops_at_once(processors)),
        console_turns: Semaphore::new(CONSOLES_AT_ONCE),
        left_alone: Mutex::default(),
        active_containers: watch::Sender::default(),
        scaling_group,
        cluster,
        consoles,
        stopping: stopping.clone(),
        host_sockets,
        abuse: AbuseReports::default(),
        volumes,
        storage_proxy: StorageProxy::new(&config),
        tasks,
        plugin_host: PluginHost::new(&config, engine),
        honours_firewall,
        config,
        docker,
        distros,
        override_files,
        ledger,
        accelerators,
        journal,
        ends,
        commits,
        logs,
        link,
        socket_dir,
    }))
}

/// Where the operator may add to container requests. What would fail each creation is told at once; a runner,
/// and such a file, may be put there later.
async fn files_for_containers(config: &Arc<Config>) -> Vec<PathBuf> {
    let config = config.clone();
    blocking(move || {
        if let Err(err) = RunnerFiles::open(&config.node.runner_dir, std::env::consts::ARCH) {
            tracing::warn!(
                err = chain(&err),
                "the in-container runner is not installed; kernels cannot be created before `bai-agent runner install`"
            );
        }
        let host = ThisHost;
        let files = override_files(host.home().as_deref(), &host.working_directory());
        for err in files.iter().filter_map(|file| override_part(file).err()) {
            tracing::warn!(err = chain(&err), "a file with container options cannot be used");
        }
        files
    })
    .await
}

/// Opens the sockets for programs in containers, and the place of those of the host that kernels are given.
async fn open_sockets(
    config: &Config,
    stopping: &CancellationToken,
) -> Result<(PathBuf, HostSockets), AppError> {
    let place = |kind: &str| {
        let base = config.agent.ipc_base_path.join(kind);
        base.join(plain_name(&config.agent.id))
    };
    let directory = place("container");
    agent_socket::serve(
        AgentSocketOptions {
            directory: directory.clone(),
            jail: config.container.sandbox_type == config::SandboxType::Jail,
            files: KernelFiles::default(),
        },
        stopping.clone(),
    )?;
    let path = place("proxy");
    let made = path.clone();
    let host_sockets = blocking(move || HostSockets::new(made))
        .await
        .map_err(|source| AppError::HostSockets { path, source })?;
    Ok((directory, host_sockets))
}

/// Whether the host's firewall decides about clients of service ports at first.
async fn firewall_decides(config: &Config) -> bool {
    let decider = match firewall::decider(config).await {
        Ok(decider) => decider,
        // Nobody is let in meanwhile whom it may refuse; its changes are followed from the start on.
        Err(err) => Some(err.to_string()),
    };
    if let Some(why) = &decider
        && config.node.honour_firewall.is_none()
    {
        tracing::info!(
            why,
            "the host's firewall decides about clients of service ports: the relay serves them (node.honour-firewall)"
        );
    }
    decider.is_some()
}

/// Starts the bus of a node that has joined its cluster, and follows what the cluster sets.
async fn take_part(
    joined: Joined,
    scaling_group: watch::Receiver<String>,
    stopping: &CancellationToken,
) -> Result<Cluster, AppError> {
    let settings = joined.bus;
    let bus = blocking(move || Bus::start(&settings)).await?;
    let etcd = joined.etcd.clone();
    let changes = Changes::follow(etcd, joined.settings, scaling_group, stopping.clone());
    Ok(Cluster::new(joined.etcd, bus, changes))
}

/// What the engine can do for devices, and whether it or its containers' users may be others than root. Where it
/// does not say so it is asked again in the background: kernels start all the same.
async fn ask_engine(
    docker: &Docker,
    config: &Arc<Config>,
    tasks: &TaskTracker,
    stopping: &CancellationToken,
) -> (EngineFacts, Arc<AtomicBool>) {
    match engine_facts(docker, config).await {
        Ok((devices, own_users)) => (devices.into(), Arc::new(own_users.into())),
        Err(err) => {
            tracing::warn!(
                err = chain(&err),
                "the engine does not say what it can do for devices; it is asked again, and until then containers get CUDA devices by device requests"
            );
            let engine = EngineFacts::default();
            // Else containers might not start.
            let own_users = Arc::new(AtomicBool::new(true));
            let (docker, config) = (docker.clone(), config.clone());
            let (told, stopping) = ((engine.clone(), own_users.clone()), stopping.clone());
            tasks.spawn(async move {
                let again = ask_again(&docker, &config, &told.0, &told.1);
                stopping.run_until_cancelled(again).await;
            });
            (engine, own_users)
        }
    }
}

/// Asks the engine the same until it says so: it was asked when the agent started, and did not.
async fn ask_again(docker: &Docker, config: &Config, engine: &EngineFacts, own_users: &AtomicBool) {
    let mut pause = DOCKER_PAUSES.0;
    loop {
        tokio::time::sleep(pause).await;
        if let Ok((devices, users)) = engine_facts(docker, config).await {
            engine.tell(devices);
            own_users.store(users, Ordering::Relaxed);
            tracing::info!(?devices, "the engine has said what it can do for devices");
            return;
        }
        pause = (pause * 2).min(DOCKER_PAUSES.1);
    }
}

/// What the engine can do for devices, and whether it, or its containers' users, are others than root on its host;
/// as it says.
async fn engine_facts(
    docker: &Docker,
    config: &Config,
) -> Result<(EngineDevices, bool), DockerError> {
    let info = docker.info().await?;
    let mut options = info.security_options.iter().flatten();
    let own_users = options.any(|option| {
        let name = option.split(',').next();
        matches!(name, Some("name=rootless" | "name=userns"))
    });
    let local = docker.is_local();
    let engine = blocking(move || EngineDevices::of(&info, local)).await;
    if config.node.accelerators.cuda_injection == CudaInjection::Cdi && !engine.cdi {
        tracing::warn!(
            "node.accelerators.cuda-injection is \"cdi\", and this engine has no CDI or has it switched off; kernels with CUDA devices will not start"
        );
    }
    Ok((engine, own_users))
}

/// Waits for Docker, saying so, until it answers or the agent is told to stop.
async fn reach_docker(
    docker: &Docker,
    starting: &Starting,
    stopping: &CancellationToken,
) -> Result<(), AppError> {
    let began = Instant::now();
    let mut pause = DOCKER_PAUSES.0;
    loop {
        match docker.ping().await {
            Ok(()) => {
                starting.step("starting");
                return Ok(());
            }
            Err(err) => {
                starting.waiting("Docker", &chain(&err));
                tracing::error!(
                    err = chain(&err),
                    waited_s = began.elapsed().as_secs(),
                    retry_s = pause.as_secs(),
                    "Docker does not answer; the node is not ready"
                );
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stopping.cancelled() => return Err(AppError::Interrupted),
        }
        pause = (pause * 2).min(DOCKER_PAUSES.1);
    }
}

fn docker_options(config: &Config) -> DockerOptions {
    let engine = &config.node.engine;
    let unlimited = Deadlines::default();
    DockerOptions {
        host: engine.host.clone(),
        deadlines: Deadlines {
            query: engine.request_timeout,
            create: engine.create_timeout,
            start: engine.start_timeout,
            remove: engine.remove_timeout,
            transfer: config.api.pull_timeout,
            push: config.api.push_timeout,
            commit: config.api.commit_timeout.unwrap_or(unlimited.commit),
            ..unlimited
        },
        ..DockerOptions::default()
    }
}

fn sizes(config: &Config) -> Sizes {
    let range = config.container.port_range;
    Sizes {
        ports: u32::from(range.last - range.first) + 1,
        containers: config.node.max_containers,
        ..Sizes::default()
    }
}

fn node_row(config: &Config) -> NodeRow {
    let limits = config.node.dataplane;
    let ms = |duration: Duration| u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
    NodeRow {
        sample_interval_ms: ms(limits.stats_interval),
        drain_ms: ms(limits.drain),
        default_max_sessions: limits.max_sessions_per_port,
        total_max_sessions: limits.max_sessions,
        idle_timeout_ms: ms(limits.idle_timeout),
        connect_timeout_ms: ms(limits.connect_timeout),
    }
}

fn limits(config: &Config) -> Limits {
    let wanted = config.node.rpc;
    let calls = usize::try_from(wanted.max_in_flight).unwrap_or(usize::MAX);
    Limits {
        message_bytes: usize::try_from(wanted.max_message.0).unwrap_or(usize::MAX),
        calls,
        // A manager has one connection.
        calls_per_connection: calls,
        ..Limits::default()
    }
}

fn curve(files: Option<&CurveFiles>) -> Result<Option<CurveServer>, AppError> {
    let Some(files) = files else {
        return Ok(None);
    };
    let failed = |path: &PathBuf| {
        let path = path.clone();
        move |source| AppError::Key { path, source }
    };
    let own = &files.agent_keypair;
    let own_is_private = KeyPair::is_private(own).map_err(failed(own))?;
    if !own_is_private {
        tracing::warn!(
            path = %own.display(),
            "others than root and the agent may read the agent's key pair, so that the commands are not let in by it; chmod 600 it, chown it to root and restart the agent"
        );
    }
    Ok(Some(CurveServer {
        own_is_private,
        pair: KeyPair::from_file(own).map_err(failed(own))?,
        manager: PublicKey::from_file(&files.manager_public_key)
            .map_err(failed(&files.manager_public_key))?,
    }))
}

fn distros_file(config: &Config) -> PathBuf {
    config.agent.var_base_path.join("distros.json")
}

/// What earlier lives found out about images; losing it costs one look into each.
async fn known_distros(docker: &Docker, config: &Config) -> Distros {
    let path = distros_file(config);
    let known = blocking(move || {
        let bytes = std::fs::read(path).ok()?;
        serde_json::from_slice(&bytes).ok()
    })
    .await;
    let distros = Distros::new(docker.clone(), &config.agent.id, known.unwrap_or_default());
    if let Err(err) = distros.remove_leftovers().await {
        tracing::warn!(
            err = chain(&err),
            "cannot remove leftovers of an earlier life"
        );
    }
    distros
}

async fn keep_distros(node: &Node) {
    let (path, known) = (distros_file(&node.config), node.distros.known());
    let kept = blocking(move || {
        serde_json::to_vec(&known)
            .map_err(std::io::Error::other)
            .and_then(|bytes| replace_file(&path, &bytes))
    })
    .await;
    if let Err(err) = kept {
        tracing::debug!(%err, "cannot keep what was found out about images");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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

    #[test]
    fn the_agents_own_key_is_let_in_only_where_its_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("agent.key_secret");
        let pair = KeyPair::generate();
        std::fs::write(&file, pair.secret_file_text()).unwrap();
        let files = CurveFiles {
            agent_keypair: file.clone(),
            manager_public_key: file.clone(),
        };
        for (mode, private) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
            let curve = curve(Some(&files)).unwrap().unwrap();
            assert_eq!(curve.own_is_private, private, "{mode:o}");
            assert_eq!(curve.pair, pair);
        }
        assert!(curve(None).unwrap().is_none());
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(curve(Some(&files)), Err(AppError::Key { .. })));
    }
}
