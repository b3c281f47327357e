//! Wiring: builds every part, in reading order, and runs the main loop. The only file that knows
//! all parts.
//!
//! In: [`Options`]. Out: the end of the process. The main thread owns the link; relay threads own
//! their sessions; the collector's threads own its descriptors. Invariant: nothing is mapped or
//! bound before the writer lock is held, and readiness is told only after the desired region was
//! looked at once.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use shared::desired::DesiredReader;
use shared::doorbell::{Doorbell, DoorbellError, Ringer};
use shared::lock::{LockError, LockLost, WriterLock};
use shared::observed::{ObservedReader, ObservedWriter};
use shared::run_dir::{RunDir, RunDirError};
use shared::{OpenError, Sizes};

use crate::accelerator::{self, Accelerators};
use crate::board::Board;
use crate::causes::chain;
use crate::collect::{self, Collector, ReadMethod};
use crate::forward::kernel_path::{self, KernelPath};
use crate::forward::relay::{self, Relay, StartError};
use crate::link::{Defaults, Link, kept_descriptors};
use crate::sys::netlink::{LinkLookup, LinkWatch, NetlinkError};
use crate::sys::rlimit;
use crate::sys::signal::{Request, Signals};

/// How often the region is looked at without a ring, and a sign of life is left.
const SLOW_TICK: Duration = Duration::from_secs(1);
/// The same while sessions drain.
const DRAIN_TICK: Duration = Duration::from_millis(20);

/// How long the start waits for the kernel path of an earlier process to be taken down.
const DETACHED_WITHIN: Duration = Duration::from_secs(1);

const BELL: Token = Token(0);
const SIGNALS: Token = Token(1);
const LINKS: Token = Token(2);
const KERNEL: Token = Token(3);
const PLACED: Token = Token(4);

/// What the process is told at its start.
#[derive(Debug, Clone)]
pub struct Options {
    /// Base of the run directories, on tmpfs; `None` chooses `/run` or `/dev/shm`.
    pub run_dir: Option<PathBuf>,
    /// The agent whose regions these are.
    pub agent_id: String,
    /// Container rows of the observed region, when the desired one does not tell.
    pub max_containers: u32,
    /// Port rows of the observed region, when the desired one does not tell.
    pub max_ports: u32,
    /// What holds until control says otherwise.
    pub defaults: Defaults,
    /// Directory of all scratch directories, whose file system is watched.
    pub scratch_root: Option<PathBuf>,
    /// Relay threads; 0 chooses by the number of CPUs.
    pub relay_threads: usize,
    /// How the relay moves the bytes of connections.
    pub relay_engine: relay::Engine,
    /// The relay's connections begin in the namespaces of their containers.
    pub relay_inside: bool,
    /// Serve clients in the kernel where that is possible, by programs attached like this.
    pub kernel_path: Option<kernel_path::AttachMethod>,
    /// Drivers of accelerators to look for.
    pub accelerators: accelerator::Options,
}

/// Why the process could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The run directory can't be used.
    #[error("the run directory can't be used")]
    RunDir(#[source] RunDirError),
    /// Another dataplane serves this agent, or the lock file is out of reach.
    #[error("this agent's dataplane can't be taken over")]
    Lock(#[source] LockError),
    /// Another dataplane has come to serve this agent.
    #[error(transparent)]
    LockLost(#[from] LockLost),
    /// The observed region can't be made.
    #[error("the observed region can't be opened")]
    Region(#[source] OpenError),
    /// A doorbell can't be made.
    #[error("the doorbell can't be put up")]
    Doorbell(#[source] DoorbellError),
    /// The relay can't be started.
    #[error("the relay can't be started")]
    Relay(#[source] StartError),
    /// No netlink: guarded rows could not be disabled in time.
    #[error("links can't be watched")]
    Links(#[source] NetlinkError),
    /// The main loop's own epoll fails.
    #[error("the main loop can't wait for events")]
    Poll(#[source] io::Error),
    /// The collector can't be started.
    #[error("the collector can't be started")]
    Collector(#[source] io::Error),
    /// The accelerators' threads can't be started.
    #[error("the accelerators' drivers can't be looked at")]
    Drivers(#[source] io::Error),
    /// A thread has ended by itself.
    #[error(
        "the {thread} has ended by itself, so bai-dataplane ends; systemd starts it again, without systemd start it by hand"
    )]
    Died {
        /// Which one.
        thread: &'static str,
    },
}

/// Relay threads for a number of CPUs: containers need the others.
fn threads_for(cpus: usize) -> usize {
    (cpus / 4).clamp(2, 4).min(cpus.max(1))
}

/// Runs the dataplane until a signal ends it. `signals` must have been blocked before any thread
/// was started.
///
/// # Errors
/// A part that can't be built, or a loop that can't go on.
pub fn run(options: &Options, signals: Signals) -> Result<(), AppError> {
    let descriptors = rlimit::raise_descriptors();
    let run_dir =
        RunDir::choose(options.run_dir.as_deref(), &options.agent_id).map_err(AppError::RunDir)?;
    let directory = run_dir.create_dataplane().map_err(AppError::RunDir)?;
    let lock = WriterLock::acquire(&directory).map_err(AppError::Lock)?;

    let mut reader = DesiredReader::at(run_dir.control());
    let sizes = region_sizes(&mut reader, options);
    let writer = ObservedWriter::open_locked(lock, sizes).map_err(AppError::Region)?;
    let (before, node_before, ports_before) = ObservedReader::at(&directory)
        .snapshot()
        .map(|found| {
            let (containers, node) = (found.containers.to_vec(), found.node.clone());
            (containers, node, found.ports.to_vec())
        })
        .unwrap_or_default();
    tracing::info!(
        directory = %directory.display(),
        region_id = %writer.region_id(),
        epoch = writer.epoch(),
        ports = sizes.ports,
        containers = sizes.containers,
        accelerators = sizes.accelerators,
        descriptors,
        "observed region opened"
    );
    let doorbell = Doorbell::bind(&directory).map_err(AppError::Doorbell)?;
    let ringer = Ringer::of(run_dir.control()).map_err(AppError::Doorbell)?;
    let accelerators = Accelerators::start(&options.accelerators).map_err(AppError::Drivers)?;
    let board = Board::new(writer, ringer, accelerators);

    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let relay = Relay::start(relay::Options {
        threads: match options.relay_threads {
            0 => threads_for(cpus),
            threads => threads,
        },
        engine: options.relay_engine,
        inside: options.relay_inside,
        ..relay::Options::default()
    })
    .map_err(AppError::Relay)?;

    // The watch is opened before any row is applied: what goes away after this is told.
    let mut watch = LinkWatch::open().map_err(AppError::Links)?;
    let lookup = LinkLookup::open().map_err(AppError::Links)?;
    let mut link = Link::new(
        reader,
        relay,
        board.clone(),
        lookup,
        options.defaults.clone(),
        descriptors,
        ports_before,
    );

    let poll = Poll::new().map_err(AppError::Poll)?;
    let waker = Waker::new(poll.registry(), PLACED).map_err(AppError::Poll)?;
    begin_kernel_path(&mut link, options, &run_dir, waker);

    register(&poll, doorbell.as_raw_fd(), BELL)?;
    register(&poll, signals.as_raw_fd(), SIGNALS)?;
    register(&poll, watch.as_raw_fd(), LINKS)?;
    if let Some(changes) = link.kernel_watch() {
        register(&poll, changes, KERNEL)?;
    }

    let files = u32::try_from(kept_descriptors(descriptors) / 2).unwrap_or(u32::MAX);
    let collector = Collector::start(
        board.clone(),
        Arc::clone(link.relay().totals()),
        collect::Options {
            interval: link.settings().sample_interval,
            scratch_root: options.scratch_root.clone(),
            descriptors: files,
            method: ReadMethod::Best {
                containers: board.sizes().containers,
            },
            before,
            node_before,
            delivered: link.take_delivered(),
            carried: Arc::clone(link.relay().namespaces()),
        },
    )
    .map_err(AppError::Collector)?;

    board.heartbeat()?;
    look(&mut link, &collector, Instant::now());
    // Not under systemd this does nothing.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!("dataplane ready");

    serve(
        poll, &mut link, &board, &collector, &doorbell, &mut watch, signals,
    )
}

/// The turns of the main loop, until a signal ends it.
fn serve(
    mut poll: Poll,
    link: &mut Link,
    board: &Board,
    collector: &Collector,
    doorbell: &Doorbell,
    watch: &mut LinkWatch,
    mut signals: Signals,
) -> Result<(), AppError> {
    let mut events = Events::with_capacity(16);
    let mut tick_at = Instant::now() + SLOW_TICK;
    let mut stopping: Option<Instant> = None;
    loop {
        let now = Instant::now();
        let busy = stopping.is_some() || link.is_draining() || link.is_kernel_pending();
        let wait =
            tick_at
                .saturating_duration_since(now)
                .min(if busy { DRAIN_TICK } else { SLOW_TICK });
        match poll.poll(&mut events, Some(wait)) {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(AppError::Poll(err)),
        }
        // Another process may have this node by now: what this one would do is its to do.
        board.is_writer()?;
        while doorbell.drain() {}
        // Links first: a row that just arrived must not be served over a link that is gone.
        link.links_changed(&watch.changes());
        while let Some(request) = signals.take() {
            match request {
                Request::Stop => {
                    tracing::info!("stopping at once");
                    stop(link, board);
                    return Ok(());
                }
                Request::Drain if stopping.is_none() => {
                    let drain = link.settings().drain;
                    tracing::info!(
                        sessions = link.relay().totals().active(),
                        drain_ms = drain.as_millis(),
                        "stopping, sessions may finish"
                    );
                    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
                    link.stop_accepting();
                    stopping = Some(Instant::now() + drain);
                }
                Request::Drain => {}
                Request::Reload => tracing::warn!(
                    "SIGHUP was received; the configuration is read at start only, restart bai-dataplane to apply changes"
                ),
            }
        }
        let now = Instant::now();
        link.kernel_turn(now);
        if let Some(until) = stopping {
            if link.relay().totals().active() == 0 || now >= until {
                stop(link, board);
                return Ok(());
            }
        } else {
            look(link, collector, now);
        }
        link.finish_drains(now);
        if now >= tick_at {
            link.tick(now);
            tick_at = now + SLOW_TICK;
            board.heartbeat()?;
            if !link.relay().healthy() {
                return Err(AppError::Died { thread: "relay" });
            }
            if !link.is_kernel_healthy() {
                return Err(AppError::Died {
                    thread: "kernel path's thread",
                });
            }
            if !collector.healthy() {
                return Err(AppError::Died {
                    thread: "collector",
                });
            }
        }
    }
}

/// Leads clients past the relay where that is wanted and possible; the link says why not with each port.
fn begin_kernel_path(link: &mut Link, options: &Options, run_dir: &RunDir, waker: Waker) {
    if let Some(method) = options.kernel_path {
        let wake = move || {
            // It fails only when the loop is gone, and a turn without a call comes every second.
            let _ = waker.wake();
        };
        let started = shared::heap::trimmed(|| {
            KernelPath::start(&options.agent_id, run_dir.root(), method, wake)
        });
        if let Err(err) = &started {
            tracing::warn!(err = chain(err), "no kernel path, the relay serves all");
            // Nobody would tell what an earlier process has left which rows go.
            take_kernel_path_down(options.agent_id.clone(), run_dir.root().to_owned());
        }
        link.use_kernel_path(started.map_err(|err| chain(&err)));
    } else {
        take_kernel_path_down(options.agent_id.clone(), run_dir.root().to_owned());
    }
}

/// An earlier process may have had a kernel path, and its programs go on without it. The kernel may keep
/// who takes them down waiting for as long as somebody holds its interface lock.
fn take_kernel_path_down(agent: String, root: PathBuf) {
    let (sender, done) = mpsc::channel::<Infallible>();
    let thread = std::thread::Builder::new().name("detach".into());
    let started = thread.spawn(move || {
        let _sender = sender;
        match kernel_path::detach(&agent, &root) {
            Ok(removed) if removed.is_empty() => {}
            Ok(_) => tracing::info!("the kernel path of an earlier process leads nobody any more"),
            Err(err) => tracing::error!(
                err = chain(&err),
                "the kernel path of an earlier process goes on; stop this one and run: \
                 bai-dataplane detach"
            ),
        }
    });
    if let Err(err) = started {
        tracing::error!(
            %err,
            "no thread, so the kernel path of an earlier process goes on; stop this one and run: \
             bai-dataplane detach"
        );
    }
    if done.recv_timeout(DETACHED_WITHIN) == Err(RecvTimeoutError::Timeout) {
        tracing::warn!(
            "what an earlier process has attached can't be taken away yet, somebody holds the kernel's \
             interface lock; it stays there until then"
        );
    }
}

fn look(link: &mut Link, collector: &Collector, now: Instant) {
    if let Some(news) = link.look(now) {
        collector.want(news, link.settings().sample_interval);
    }
}

fn stop(link: &mut Link, board: &Board) {
    link.stop_accepting();
    link.cut_all();
    if let Err(err) = board.heartbeat() {
        tracing::error!(%err, "the region is another's");
    }
    tracing::info!("dataplane stopped");
}

fn register(poll: &Poll, fd: RawFd, token: Token) -> Result<(), AppError> {
    poll.registry()
        .register(&mut SourceFd(&fd), token, Interest::READABLE)
        .map_err(AppError::Poll)
}

/// Room for what the desired region can ask for, or for what the configuration says.
fn region_sizes(reader: &mut DesiredReader, options: &Options) -> Sizes {
    let told = reader.writer().ok().and_then(|_| reader.sizes());
    let accelerators = accelerator::room(&options.accelerators.root);
    sizes_for(
        told,
        options.max_ports,
        options.max_containers,
        accelerators,
    )
}

fn sizes_for(told: Option<Sizes>, ports: u32, containers: u32, accelerators: u32) -> Sizes {
    let containers = told.map_or(containers, |told| told.containers.max(containers));
    Sizes {
        ports: told.map_or(ports, |told| told.ports.max(ports)),
        containers,
        accelerators,
        processes: Sizes::processes_of(containers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_threads_whatever_the_machine() {
        assert_eq!([1, 2, 8, 12, 64].map(threads_for), [1, 2, 2, 3, 4]);
    }

    #[test]
    fn room_for_processes_grows_with_that_for_containers() {
        let processes = |told: Option<u32>, containers| {
            let told = told.map(|containers| Sizes {
                containers,
                ..Sizes::default()
            });
            sizes_for(told, 10, containers, 1).processes
        };
        assert_eq!(processes(None, 16), 16_384);
        assert_eq!(processes(None, 1_000), 32_000);
        assert_eq!(processes(Some(2_000), 1_000), 64_000);
        assert_eq!(processes(Some(500), 1_000), 32_000);
        let most = sizes_for(None, 10, Sizes::LIMIT.containers, 1);
        assert!(most.are_possible(), "{most:?}");
    }
}
