//! The bench of statistics: what a sample of many containers costs, ours and others' ways.
//!
//! In: [`Options`]. Out: a table, `stats.json`. Invariants: every native way reads after all
//! containers have worked since the last reading; a ratio is somebody's CPU divided by ours.

pub mod crowd;
mod peers;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::builder::PossibleValuesParser;
use dataplane::accelerator::Accelerators;
use dataplane::board::Board;
use dataplane::collect::disk::Disk;
use dataplane::collect::file::Budget;
use dataplane::collect::hierarchies::{CgroupHierarchies, Hierarchy};
use dataplane::collect::node::Node;
use dataplane::collect::process::Lister;
use dataplane::collect::tasks::{self, Tasks};
use dataplane::collect::{ReadMethod, Sampler};
use dataplane::forward::relay::port::Totals;
use dataplane::sys::rlimit;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use serde_json::{Map, Value, json};
use shared::Sizes;
use shared::desired::ContainerRow;
use shared::doorbell::{Doorbell, Ringer};
use shared::observed::{ContainerSample, ObservedReader, ObservedWriter, Source};
use shared::run_dir::RunDir;

use self::crowd::Crowd;
use self::peers::PythonLoop;
use crate::Stage;
use crate::ports::report::Machine;
use crate::site::{Place, Site};
use crate::statistics::Spread;

/// About so many ticks of a way follow each other while containers sleep.
const LOOP: u32 = 50;

/// What to measure and how often.
#[derive(Debug, Clone, clap::Parser)]
#[command(about = "Statistics of many containers, against other ways to get them")]
pub struct Options {
    /// Numbers of containers.
    #[arg(long, value_delimiter = ',', default_values_t = [50, 200, 1000])]
    pub containers: Vec<u16>,
    /// Ticks of each way.
    #[arg(long, default_value_t = 1000)]
    pub ticks: u32,
    /// Containers sleep, and each way in turn reads in a loop; else every container works between any
    /// two ticks, which leaves nothing in the processor's caches.
    #[arg(long)]
    pub asleep: bool,
    /// Native ways.
    #[arg(
        long,
        value_delimiter = ',',
        default_values = WAYS.map(|(name, ..)| name),
        value_parser = PossibleValuesParser::new(WAYS.map(|(name, ..)| name))
    )]
    pub ways: Vec<String>,
    /// Leave the loop in Python out.
    #[arg(long)]
    pub no_python: bool,
    /// Containers for the engine's statistics API and for the Python agent.
    #[arg(long, default_value_t = 20)]
    pub engine_containers: u16,
    /// Rounds over them by the API.
    #[arg(long, default_value_t = 10)]
    pub engine_rounds: u32,
    /// Leave the container engine out.
    #[arg(long)]
    pub no_engine: bool,
    /// Seconds to watch the Python agent for, with the containers and without; 0 leaves it out.
    #[arg(long, default_value_t = 60)]
    pub agent_seconds: u32,
    /// Where the results go.
    #[arg(long, default_value = "target/bench")]
    pub output: PathBuf,
    /// Be a container's process.
    #[arg(long, hide = true)]
    pub member: bool,
}

/// One tick of one way.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Tick {
    /// CPU of the thread, us.
    pub cpu_us: f64,
    /// Time it took, us.
    pub elapsed_us: f64,
}

/// All ticks of one way.
#[derive(Debug, Clone, Serialize)]
struct Way {
    containers: u16,
    way: &'static str,
    /// CPU of the reading thread over all ticks by getrusage, divided by them, ms.
    cpu_ms_per_sample: f64,
    elapsed_us: Option<Spread>,
    /// What read each group of counters; the loop in Python reads files.
    #[serde(skip_serializing_if = "Option::is_none")]
    readers: Option<Readers>,
    ticks: Vec<Tick>,
}

/// What read each group of counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Readers {
    cpu: &'static str,
    memory: &'static str,
    pids: &'static str,
    io: &'static str,
    net: &'static str,
}

impl Readers {
    fn of(sample: &ContainerSample) -> Self {
        Self {
            cpu: sample.cpu.source.name(),
            memory: sample.memory.source.name(),
            pids: sample.pids.source.name(),
            io: sample.io.source.name(),
            net: sample.net.source.name(),
        }
    }

    /// Whether they are those that this way is to have.
    fn fit(&self, by_program: bool, hierarchies: &CgroupHierarchies) -> bool {
        let (cgroups, links) = match by_program {
            true => (Source::Bpf, Source::Bpf),
            false => (Source::File, Source::Netlink),
        };
        let io = match self.io {
            "bpf" => by_program,
            // Some kernels keep their counters of block devices where the program does not know them.
            "file" => true,
            // Some count nothing in version 1 unless there is a limit.
            "absent" => !by_program && matches!(hierarchies.io, Some(Hierarchy::V1(_))),
            _ => false,
        };
        io && [self.cpu, self.memory, self.pids] == [cgroups.name(); 3] && self.net == links.name()
    }
}

/// The native ways.
const WAYS: [(&str, u32, bool); 3] = [
    ("ours", u32::MAX, true),
    ("cached_pread", u32::MAX, false),
    ("open_read_close", 0, false),
];

/// Runs the bench.
///
/// # Errors
/// A way does not read what it should, or a program is missing.
pub fn run(options: &Options, stage: &Stage) -> Result<()> {
    ensure!(options.ticks > 0, "--ticks 0 measures nothing");
    std::fs::create_dir_all(&options.output)
        .with_context(|| options.output.display().to_string())?;
    let machine = Machine::now();
    rlimit::raise_descriptors();
    let site = stage.set(Site::new()?);
    site.make_groups()?;
    let (mut ways, mut apart) = (Vec::new(), Map::new());
    for count in &options.containers {
        ways.extend(natively(&site, *count, options, &mut apart)?);
    }
    let engine = if options.no_engine {
        None
    } else {
        Some(peers::engine(
            &site,
            options.engine_containers,
            options.engine_rounds,
        )?)
    };
    site.clean();
    let agent = match options.agent_seconds {
        0 => None,
        seconds => Some(peers::agent(
            stage,
            options.engine_containers,
            seconds,
            &options.output,
        )?),
    };
    report(options, &machine, &ways, apart, engine, agent)
}

/// A thread that reads whenever it is told to.
struct Reader<'scope> {
    name: &'static str,
    begin: SyncSender<()>,
    done: Receiver<Tick>,
    thread: ScopedJoinHandle<'scope, Result<(f64, Readers)>>,
}

/// CPU of this thread, us, exact at this moment.
fn thread_us() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 * 1e6 + now.tv_nsec as f64 / 1e3
}

/// The same as the kernel accounts it, ms. Brought up to date when the thread is switched.
fn rusage_ms() -> Result<f64> {
    thread::yield_now();
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let us = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(us as f64 / 1e3)
}

/// Passes and their publication, one for each word of `begin`; CPU of the thread meanwhile, ms, and what read.
fn read(
    run_dir: &RunDir,
    rows: &[ContainerRow],
    descriptors: u32,
    by_program: bool,
    begin: &Receiver<()>,
    done: &SyncSender<Tick>,
) -> Result<(f64, Readers)> {
    let containers = u32::try_from(rows.len())?;
    let sizes = Sizes {
        containers,
        ..Sizes::default()
    };
    let directory = run_dir.create_dataplane()?;
    let board = Board::new(
        ObservedWriter::open(&directory, sizes)?,
        Ringer::of(run_dir.control())?,
        Accelerators::none(),
    );
    let method = if by_program {
        ReadMethod::Best { containers }
    } else {
        ReadMethod::Files
    };
    let totals = Arc::new(Totals::default());
    let mut sampler = Sampler::new(totals, Disk::start()?, None, descriptors, method);
    sampler.follow(rows, true);
    // The first pass finds everything, the second knows where.
    for _ in 0..2 {
        board.publish_pass(sampler.pass())?;
    }
    let mut before = rusage_ms()?;
    let mut first = true;
    while begin.recv().is_ok() {
        if std::mem::take(&mut first) {
            before = rusage_ms()?;
        }
        let (cpu, at) = (thread_us(), Instant::now());
        board.publish_pass(sampler.pass())?;
        let tick = Tick {
            elapsed_us: at.elapsed().as_secs_f64() * 1e6,
            cpu_us: thread_us() - cpu,
        };
        if done.send(tick).is_err() {
            break;
        }
    }
    let used = rusage_ms()? - before;
    // All of it must have been there, and by the way it is said to be.
    let snapshot = ObservedReader::at(&directory).snapshot()?;
    let hierarchies = CgroupHierarchies::gather();
    let mut all = None;
    for sample in snapshot.containers.iter() {
        let readers = Readers::of(sample);
        ensure!(
            readers.fit(by_program, &hierarchies) && *all.get_or_insert(readers) == readers,
            "a container was read otherwise: {readers:?} {sample:?}"
        );
    }
    ensure!(
        snapshot.containers.len() == rows.len(),
        "{} of {} containers were sampled",
        snapshot.containers.len(),
        rows.len()
    );
    Ok((used, all.context("there are no containers")?))
}

/// Every way that reads the kernel, over `count` containers.
fn natively(
    site: &Site,
    count: u16,
    options: &Options,
    apart: &mut Map<String, Value>,
) -> Result<Vec<Way>> {
    let ticks = options.ticks;
    let mut crowd = Crowd::gather(site, count)?;
    let rows = crowd.rows.clone();
    let mut ways = site.within(Place::Host, || {
        thread::scope(|scope| -> Result<Vec<Way>> {
            let mut readers = Vec::new();
            let mut bells = Vec::new();
            for (name, descriptors, by_program) in WAYS {
                if !options.ways.iter().any(|way| way == name) {
                    continue;
                }
                let run_dir =
                    RunDir::choose(Some(&site.directory()), &format!("i-{name}-{count}"))?;
                bells.push(Doorbell::bind(run_dir.create_control()?)?);
                let (begin, begun) = sync_channel(0);
                let (told, done) = sync_channel(1);
                let rows = &rows;
                readers.push(Reader {
                    name,
                    begin,
                    done,
                    thread: thread::Builder::new()
                        .name(name.to_owned())
                        .spawn_scoped(scope, move || {
                            read(&run_dir, rows, descriptors, by_program, &begun, &told)
                        })?,
                });
            }
            let mut python = (!options.no_python)
                .then(|| PythonLoop::start(&rows))
                .transpose()?;
            let mut found = vec![Vec::new(); readers.len()];
            let mut by_python = Vec::new();
            let mut between = || match options.asleep {
                true => Ok(()),
                false => crowd.busy(),
            };
            let turns = if options.asleep {
                ticks.div_ceil(LOOP)
            } else {
                ticks
            };
            for turn in 0..turns {
                let turn = (ticks * turn / turns)..(ticks * (turn + 1) / turns);
                for (reader, samples) in readers.iter().zip(&mut found) {
                    for _ in turn.clone() {
                        between()?;
                        // One that has ended says why below.
                        if reader.begin.send(()).is_err() {
                            break;
                        }
                        samples.extend(reader.done.recv());
                    }
                }
                if let Some(python) = &mut python {
                    for _ in turn {
                        between()?;
                        by_python.push(python.tick()?);
                    }
                }
                for bell in &bells {
                    while bell.drain() {}
                }
            }
            let mut ways = Vec::new();
            for reader in readers {
                let Reader {
                    name,
                    begin,
                    thread,
                    ..
                } = reader;
                drop(begin);
                let (used, readers) = thread
                    .join()
                    .map_err(|_| anyhow::anyhow!("the reader of {name} has died"))?
                    .with_context(|| name.to_owned())?;
                ways.push(way(
                    count,
                    name,
                    Some((used, readers)),
                    std::mem::take(&mut found[ways.len()]),
                ));
            }
            if python.is_some() {
                ways.push(way(count, "python_files", None, by_python));
            }
            Ok(ways)
        })
    })??;
    for way in &mut ways {
        ensure!(
            way.ticks.len() == ticks as usize,
            "{} has ended early",
            way.way
        );
        println!(
            "{count:>5} {:<16} {:>9.3} ms CPU per sample, {:>7.2} us per container, elapsed p50 {:>9.0} us",
            way.way,
            way.cpu_ms_per_sample,
            way.cpu_ms_per_sample * 1e3 / f64::from(count),
            way.elapsed_us.map_or(0.0, |it| it.median),
        );
    }
    let node = node(ticks.min(100), || match options.asleep {
        true => Ok(()),
        false => crowd.busy(),
    })?;
    println!("{count:>5} the node, apart: {node:>9.3} ms CPU per reading");
    apart.insert(format!("node_ms_{count}"), json!(node));
    for (walked, name) in [(true, "processes"), (false, "processes_by_files")] {
        let listing = processes(&rows, ticks.min(20), walked)?;
        println!("{count:>5} {name}, apart: {listing:>9.3} ms CPU per listing");
        apart.insert(format!("{name}_ms_{count}"), json!(listing));
    }
    let (asked, counted) = disks(site, count, ticks.min(20))?;
    println!(
        "{count:>5} disks, apart: {asked:>9.3} ms CPU per round, {counted:>9.3} to count directories"
    );
    apart.insert(format!("disk_ms_{count}"), json!(asked));
    apart.insert(format!("disk_count_ms_{count}"), json!(counted));
    crowd.disperse(site)?;
    Ok(ways)
}

fn way(containers: u16, name: &'static str, read: Option<(f64, Readers)>, ticks: Vec<Tick>) -> Way {
    let sum = || ticks.iter().map(|tick| tick.cpu_us).sum::<f64>() / 1e3;
    Way {
        containers,
        way: name,
        cpu_ms_per_sample: read.map_or_else(sum, |(used, _)| used) / ticks.len().max(1) as f64,
        elapsed_us: Spread::of(ticks.iter().map(|tick| tick.elapsed_us)),
        readers: read.map(|(_, readers)| readers),
        ticks,
    }
}

/// CPU of this process's threads whose names begin like this, ms.
fn threads_ms(names: &[&str]) -> Result<f64> {
    let mut ns = 0.0;
    for task in std::fs::read_dir("/proc/self/task")?.flatten() {
        let text = |name: &str| std::fs::read_to_string(task.path().join(name));
        // Others come and go.
        let Some(name) = text("comm").ok() else {
            continue;
        };
        if names.iter().any(|it| name.starts_with(it)) {
            let first = text("schedstat")?;
            ns += first
                .split(' ')
                .next()
                .context("no number")?
                .parse::<f64>()?;
        }
    }
    Ok(ns / 1e6)
}

/// CPU of reading the node's own numbers after what comes in `between`, which a pass does twice a second at
/// most, ms.
fn node(rounds: u32, mut between: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut node = Node::new(&Budget::new(u32::MAX));
    let mut buffer = Vec::new();
    // The first reading finds everything.
    let _ = node.read_now(None, &mut buffer);
    let mut used = 0.0;
    for _ in 0..rounds {
        between()?;
        let before = thread_us();
        let reading = node.read_now(None, &mut buffer);
        used += thread_us() - before;
        ensure!(reading.counters.cpu_total_ns.is_some(), "there is no CPU");
    }
    Ok(used / f64::from(rounds) / 1e3)
}

/// Files in each container's directory.
const FILES: u32 = 16;

/// CPU of asking once about the node's devices and the directories of so many containers, and of counting
/// these, which have no file systems of their own, ms.
fn disks(site: &Site, count: u16, rounds: u32) -> Result<(f64, f64)> {
    let root = site.directory().join("scratches");
    let mut scratches = Vec::new();
    for number in 0..count {
        let scratch = root.join(number.to_string());
        std::fs::create_dir_all(&scratch)?;
        for file in 0..FILES {
            std::fs::write(scratch.join(file.to_string()), [1; 4096])?;
        }
        scratches.push(scratch.to_str().context("a path")?.to_owned());
    }
    // Questions are asked one after the other: when this one is answered, the round is over.
    scratches.push("/dev/shm".to_owned());
    let last = std::path::Path::new("/dev/shm");
    let mut disk = Disk::start()?;
    let mut round = || -> Result<()> {
        let begin = Instant::now();
        let all = scratches.iter().map(String::as_str);
        disk.refresh(Some(&root), all, std::iter::empty());
        crate::site::until("a round", || {
            let (space, _) = disk.scratch(last)?;
            (space.at >= begin).then_some(())
        })
    };
    let before = threads_ms(&["tree"])?;
    // The first round tells which are to be counted.
    round()?;
    round()?;
    let counted = |disk: &Disk, path: &str| disk.scratch(path.as_ref()).is_some();
    let asked = threads_ms(&["disk"])?;
    for _ in 0..rounds {
        round()?;
    }
    let asked = (threads_ms(&["disk"])? - asked) / f64::from(rounds);
    crate::site::until("all being counted", || {
        scratches.iter().all(|it| counted(&disk, it)).then_some(())
    })?;
    let counting = threads_ms(&["tree"])? - before;
    std::fs::remove_dir_all(&root)?;
    Ok((asked, counting))
}

/// CPU of listing the processes of all containers once, by the threads that do it, ms.
fn processes(rows: &[ContainerRow], rounds: u32, walked: bool) -> Result<f64> {
    let hierarchies = CgroupHierarchies::gather();
    let mut lister = Lister::start()?;
    if walked {
        let most = u32::try_from(rows.len())?;
        let mount = tasks::mount(&hierarchies)
            .context("no hierarchy")?
            .to_owned();
        let hierarchies = hierarchies.clone();
        lister.walk_by(mount, move || Tasks::start(&hierarchies, most, 16_384))?;
    }
    let pids = hierarchies.pids.context("no pids controller")?;
    let wanted = || {
        rows.iter()
            .map(|row| (row.container_id, pids.mount().join(&row.cgroup_path)))
    };
    let cpu_ms = || threads_ms(&["processes", "tasks"]);
    // The first round loads the program.
    crate::site::until("a listing", || lister.turn(wanted()))?;
    let before = cpu_ms()?;
    for _ in 0..rounds {
        let listing = crate::site::until("a listing", || lister.turn(wanted()))?;
        ensure!(
            listing.list.len() >= rows.len(),
            "{} processes of {} containers were listed",
            listing.list.len(),
            rows.len()
        );
    }
    Ok((cpu_ms()? - before) / f64::from(rounds))
}

/// What those of the ratios compare whose names do not tell, or not all.
fn meaning(ratios: &Map<String, Value>) -> Map<String, Value> {
    let texts = [
        (
            "vs_engine_api_per_container",
            "CPU of the engine and its helpers for one answer (two samples) about one real container, divided by ours for \
             one container in one sample; no client's CPU is in it",
        ),
        (
            "vs_python_agent_per_container",
            "different work: all that the Python agent with its engine does periodically for one idle kernel in 5 s \
             (statistics, their records in Redis, its looks at the container), divided by ours for one container in one \
             sample of the collector, written to the region and not sent to anybody",
        ),
    ];
    texts
        .into_iter()
        .filter(|(name, _)| ratios.contains_key(*name))
        .map(|(name, text)| (name.to_owned(), json!(text)))
        .collect()
}

fn report(
    options: &Options,
    machine: &Machine,
    ways: &[Way],
    apart: Map<String, Value>,
    engine: Option<peers::EngineCost>,
    agent: Option<Value>,
) -> Result<()> {
    let cost = |count: u16, name: &str| {
        ways.iter()
            .find(|way| way.containers == count && way.way == name)
            .map(|way| way.cpu_ms_per_sample)
    };
    let (mut ratios, mut further) = (Map::new(), apart);
    for count in &options.containers {
        let Some(ours) = cost(*count, "ours") else {
            continue;
        };
        ratios.insert(format!("cpu_ms_per_sample_{count}"), json!(ours));
        for (name, way) in [
            ("vs_pread", "cached_pread"),
            ("vs_open", "open_read_close"),
            ("vs_python_files", "python_files"),
        ] {
            if let Some(theirs) = cost(*count, way) {
                ratios.insert(format!("{name}_{count}"), json!(theirs / ours));
            }
        }
    }
    // Per container, where there are 200 of ours; with another choice, where there are most.
    let of = if options.containers.contains(&200) {
        Some(200)
    } else {
        options.containers.iter().max().copied()
    };
    if let Some((count, ours)) = of.and_then(|count| Some((count, cost(count, "ours")?))) {
        let ours = ours / f64::from(count);
        if let Some(engine) = &engine {
            ratios.insert(
                "vs_engine_api_per_container".to_owned(),
                json!(engine.stream_ms_per_container / ours),
            );
            further.insert(
                "vs_engine_one_shot_per_container".to_owned(),
                json!(engine.one_shot_ms_per_container / ours),
            );
        }
        if let Some(theirs) = agent
            .as_ref()
            .and_then(|found| found["ms_per_container_and_sample"].as_f64())
        {
            ratios.insert(
                "vs_python_agent_per_container".to_owned(),
                json!(theirs / ours),
            );
        }
    }
    let meaning = meaning(&ratios);
    println!("{}", serde_json::to_string_pretty(&ratios)?);
    let path = options.output.join("stats.json");
    let all = json!({
        "ratios": ratios,
        "meaning": meaning,
        "further": further,
        "machine": machine,
        "options": {
            "containers": options.containers,
            "ticks": options.ticks,
            "asleep": options.asleep,
            "engine_containers": options.engine_containers,
            "engine_rounds": options.engine_rounds,
            "agent_seconds": options.agent_seconds,
            "ways": options.ways,
            "no_python": options.no_python,
            "no_engine": options.no_engine,
        },
        "command": std::env::args().collect::<Vec<_>>(),
        "ways": ways,
        "engine": engine,
        "python_agent": agent,
    });
    std::fs::write(&path, serde_json::to_string(&all)?)
        .with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(())
}
