//! Construction and wiring of the control process: the only module that knows all the others.
//!
//! In: the configuration. Out: a node that answers, until it is told to stop. Invariant: the order.
//! The directory's lock and a free RPC address before anything is touched; Docker and the found kernels before the first
//! RPC is answered; READY after that. Stopping leaves containers, rows and journal as they are.

mod engine;
mod error;
mod options;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use config::{Config, Host, LoadOptions, Loaded, Publish, ThisHost};
use shared::run_dir::RunDir;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::accelerator::host::{self, PluginHost};
use crate::accelerator::{self, Accelerators, settings};
use crate::background::BackgroundTasks;
use crate::blocking::blocking;
use crate::causes::chain;
use crate::cluster::{self, Changes, Cluster, Joined, Starting, notices};
use crate::docker::Docker;
use crate::events::bus::Bus;
use crate::events::bus::console_logs::ConsoleLogs;
use crate::events::{Event, Events, FileSink, LogSink, Sink};
use crate::files::{plain_name, replace_file};
use crate::firewall;
use crate::heartbeat::{Heartbeat, Identity};
use crate::http::{self, EngineWatch};
use crate::image::Images;
use crate::kernel::abuse::{self, AbuseReports};
use crate::kernel::agent_socket::{self, AgentSocketOptions};
use crate::kernel::container_processes::KernelFiles;
use crate::kernel::container_request::{ContainerSettings, override_files, override_part};
use crate::kernel::destroy::{CONSOLES_AT_ONCE, stops_at_once};
use crate::kernel::distro::Distros;
use crate::kernel::guarded_io::GuardedIo;
use crate::kernel::host_sockets::HostSockets;
use crate::kernel::journal::Journal;
use crate::kernel::kept_logs::KeptLogs;
use crate::kernel::lifecycle::State;
use crate::kernel::record::Record;
use crate::kernel::recovery;
use crate::kernel::registry::Registry;
use crate::kernel::scratch::{Scratch, ScratchKind};
use crate::kernel::{Node, memory_nodes, monitor};
use crate::link::Link;
use crate::metadata::{self, redirect};
use crate::metrics::Recorder;
use crate::pid_file::PidFile;
use crate::ports::{DEFAULT_REST, PortPool};
use crate::resource::Ledger;
use crate::rpc::methods::AgentService;
use crate::rpc::{BindError, CurveServer, Server, ServerOptions, await_address};
use crate::runner::RunnerFiles;
use crate::stats::publish;
use crate::storage_proxy::{self, StorageProxy};
use crate::volumes::{self, Volumes};

use self::engine::{ask_engine, reach_docker};
pub use self::error::AppError;
use self::options::{curve, docker_options, limits, node_row, sizes};

/// Events kept in the process.
const EVENT_RING: usize = 4096;
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
    let lock_lost = link.lock_lost();
    let served = serve(loaded, options, link, recorder, curve, stopping);
    tokio::select! {
        served = Box::pin(served) => served,
        // No farewell: the node and its kernels are the other's, who is not to be taken for stopped.
        lock_lost = lock_lost => Err(lock_lost.into()),
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
        // The cluster may take long to answer. Of ports that only it knows nothing is said to be open.
        if firewall_decides(&config).await {
            link.honour_firewall(true).await?;
        }
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
    // Before the engine is waited for: the rows of an earlier life are served meanwhile.
    link.honour_firewall(firewall_decides(&config).await)
        .await?;
    let firewall = firewall::follow(config.clone(), link.clone(), stopping.clone());
    let firewall = tokio::spawn(firewall);
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
    let mut loops = begin_loops(&node, pages);
    loops.push(firewall);
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
        guarded_io: GuardedIo::new(config.node.folder_wait),
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
