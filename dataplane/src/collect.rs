//! Gathering statistics: one thread at a time, one pass per interval, one publication per pass.
//!
//! In: the containers to sample and the interval (from [`crate::link`]), kernel files, and the counters of
//! cgroups and links: by a kernel program what that can read, else by files and by asking. Out: samples and
//! the node's numbers on the [`Board`], all of one pass visible at once, with its tick number. Invariants:
//! missing is absent, never zero; a container that goes away during a pass harms only its own sample; a pass
//! that takes longer than the interval makes the next one late, never two at once.

pub mod cgroup_program;
#[cfg(test)]
mod cgroup_program_tests;
pub mod cgroup_v1;
pub mod cgroup_v2;
pub mod container;
pub mod disk;
pub mod file;
pub mod hierarchies;
mod links;
pub mod node;
pub mod process;
mod record;
pub mod stacked_devices;
pub mod tasks;
mod threads;
pub mod veths;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::{ContainerRow, DesiredChanges};
use shared::heap::trimmed;
use shared::ids::ContainerId;
use shared::log_limit::LogLimit;
use shared::observed::{
    ContainerSample, DiskCounters, IoCounters, Measured, NodeSample, Processes, Samples, Source,
};
use shared::{monotonic_ns, wall_ns};

use self::cgroup_program::CgroupProgram;
use self::container::{Networks, Watched};
use self::disk::Disk;
use self::file::Budget;
use self::hierarchies::{CgroupHierarchies, Hierarchy};
use self::links::{LinkReader, Seek};
use self::node::Node;
use self::process::Lister;
use self::record::Before;
use self::stacked_devices::StackedDeviceReader;
use self::tasks::Tasks;
use self::threads::CollectorThreads;
use crate::board::{Board, Pass};
use crate::forward::relay::namespaces::ContainerNamespaces;
use crate::forward::relay::port::Totals;
use crate::sys::bpf::CounterTable;
use crate::sys::clock::thread_cpu;
use crate::sys::netlink::Links;

/// File systems and directories are not asked for more often than this; samples tell how old the
/// answers are.
const DISK: Duration = Duration::from_secs(1);
/// proc(5)
const MOUNTS: &str = "/proc/self/mountinfo";

/// What the thread is told at its start.
#[derive(Debug)]
pub struct Options {
    /// Distance of passes, until another is wanted.
    pub interval: Duration,
    /// Directory of all scratch directories.
    pub scratch_root: Option<PathBuf>,
    /// So many may be kept open between passes.
    pub descriptors: u32,
    /// How cgroups are read.
    pub method: ReadMethod,
    /// The samples of an earlier life of this process.
    pub before: Vec<ContainerSample>,
    /// Its sample of the node.
    pub node_before: Option<NodeSample>,
    /// What programs put into containers past the host's ends of their links.
    pub delivered: Option<CounterTable>,
    /// What the relay sends them and receives past their links.
    pub carried: Arc<ContainerNamespaces>,
}

/// The collector's handle; dropping it ends its threads.
#[derive(Debug)]
pub struct Collector(CollectorThreads);

impl Collector {
    /// Starts the threads.
    ///
    /// # Errors
    /// No thread.
    pub fn start(board: Board, totals: Arc<Totals>, options: Options) -> std::io::Result<Self> {
        let Options {
            interval,
            scratch_root,
            descriptors,
            method,
            before,
            node_before,
            delivered,
            carried,
        } = options;
        let disk = Disk::start()?;
        let lister = Lister::start()?;
        let processes = board.sizes().processes;
        CollectorThreads::start(interval, board, move || {
            let mut sampler = Sampler::new(totals, disk, scratch_root, descriptors, method);
            sampler.list_processes(lister, method, processes);
            sampler.go_on_from(&before, node_before.as_ref());
            sampler.delivered = delivered;
            sampler.carried = carried;
            sampler
        })
        .map(Self)
    }

    /// Tells what has changed of what to sample, and how often from now on.
    pub fn want(&self, changes: DesiredChanges, interval: Duration) {
        self.0.want(changes, interval);
    }

    /// False when a thread has ended by itself.
    pub fn healthy(&self) -> bool {
        self.0.healthy()
    }
}

/// How cgroups are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadMethod {
    /// Through a program in the kernel where it can be had, with room for so many containers; files
    /// for what it does not tell.
    Best {
        /// Most containers.
        containers: u32,
    },
    /// By files alone.
    Files,
}

/// Does the passes. Owned by the thread that collects; benches drive it directly.
#[derive(Debug)]
pub struct Sampler {
    hierarchies: CgroupHierarchies,
    budget: Arc<Budget>,
    cgroup_program: Option<CgroupProgram>,
    /// Only where the kernel's counters of block devices are read.
    stacks: Option<StackedDeviceReader>,
    /// Sorted by id; side by side, because each pass goes through all of them.
    containers: Vec<Watched>,
    /// What an earlier life of this process had counted of block devices.
    io_before: HashMap<ContainerId, IoCounters>,
    /// What it had told of them.
    told_before: HashMap<ContainerId, Before>,
    /// Not here while a thread that asks with it hangs.
    links: Option<LinkReader>,
    /// What to look for with it.
    sought: HashMap<ContainerId, Seek>,
    /// Those with links that only their own namespaces have, or of which a question under way is to tell
    /// whether they have: what others have read is not all then.
    partly_told: HashSet<ContainerId>,
    delivered: Option<CounterTable>,
    carried: Arc<ContainerNamespaces>,
    delivered_log: LogLimit,
    node: Node,
    disk: Disk,
    disk_asked: Option<Instant>,
    lister: Option<Lister>,
    scratch_root: Option<PathBuf>,
    totals: Arc<Totals>,
    tick: u64,
    buffer: Vec<u8>,
    last_pass: Duration,
    last_cpu: Duration,
    late: Duration,
    missed: u64,
}

/// When a pass began.
#[derive(Debug, Clone, Copy)]
struct PassStart {
    at: Instant,
    /// CPU time of its thread then.
    cpu: Duration,
}

impl PassStart {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            cpu: thread_cpu(),
        }
    }
}

/// A question about links. Its answer may take for ever.
#[derive(Debug)]
struct LinkQuery {
    reader: LinkReader,
    sought: HashMap<ContainerId, Seek>,
    /// The counters of this host's links were read.
    read: bool,
}

impl LinkQuery {
    fn ask(&mut self) {
        self.read = self.reader.read(std::mem::take(&mut self.sought));
    }
}

fn age_ms(at: Instant) -> u32 {
    u32::try_from(at.elapsed().as_millis()).unwrap_or(u32::MAX)
}

impl Sampler {
    /// A sampler that may keep so many descriptors open between passes.
    pub fn new(
        totals: Arc<Totals>,
        disk: Disk,
        scratch_root: Option<PathBuf>,
        descriptors: u32,
        method: ReadMethod,
    ) -> Self {
        let hierarchies = CgroupHierarchies::gather();
        tracing::info!(?hierarchies, "cgroup hierarchies found");
        let budget = Budget::new(descriptors);
        let cgroup_program = match method {
            ReadMethod::Files => None,
            ReadMethod::Best { containers } => {
                trimmed(|| CgroupProgram::start(&hierarchies, &budget, containers))
                    .inspect_err(|err| {
                        tracing::warn!(
                            err = err as &dyn std::error::Error,
                            "cgroups are read by files, which costs more"
                        );
                    })
                    .ok()
            }
        };
        let stacks = hierarchies.io.is_some();
        let stacks =
            stacks.then(|| StackedDeviceReader::new(Path::new("/sys"), Path::new(MOUNTS), &budget));
        Self {
            hierarchies,
            cgroup_program,
            stacks,
            node: Node::new(&budget),
            budget,
            containers: Vec::new(),
            io_before: HashMap::new(),
            told_before: HashMap::new(),
            links: Some(LinkReader::new()),
            sought: HashMap::new(),
            partly_told: HashSet::new(),
            delivered: None,
            carried: Arc::default(),
            delivered_log: LogLimit::default(),
            disk,
            disk_asked: None,
            lister: None,
            scratch_root,
            totals,
            tick: 0,
            buffer: Vec::new(),
            last_pass: Duration::ZERO,
            last_cpu: Duration::ZERO,
            late: Duration::ZERO,
            missed: 0,
        }
    }

    /// Has processes listed too from now on, by this method, so many at most.
    pub fn list_processes(&mut self, mut lister: Lister, method: ReadMethod, most: u32) {
        if let ReadMethod::Best { containers } = method
            && let Some(mount) = tasks::mount(&self.hierarchies)
        {
            let hierarchies = self.hierarchies.clone();
            let load = move || trimmed(|| Tasks::start(&hierarchies, containers, most));
            if let Err(err) = lister.walk_by(mount.to_owned(), load) {
                tracing::warn!(%err, "there is no thread to walk over tasks");
            }
        }
        self.lister = Some(lister);
    }

    /// CPU time of the last pass.
    pub fn last_cpu(&self) -> Duration {
        self.last_cpu
    }

    /// Has counters that begin with this process go on from samples of an earlier one.
    pub fn go_on_from(&mut self, samples: &[ContainerSample], node: Option<&NodeSample>) {
        // In version 2 the kernel counts, whoever reads it.
        let counts = matches!(self.hierarchies.io, Some(Hierarchy::V1(_)));
        let counted = samples
            .iter()
            .filter(|it| counts && it.io.source == Source::Bpf);
        self.io_before = counted
            .map(|sample| (sample.container_id, sample.io.counters))
            .collect();
        self.told_before = samples
            .iter()
            .map(|sample| (sample.container_id, Before::of(sample)))
            .collect();
        if let Some(node) = node {
            self.node.go_on_from(&node.counters);
        }
    }

    /// One pass over the containers followed.
    pub fn pass(&mut self) -> Pass {
        let begun = PassStart::now();
        let Some(mut question) = self.ask_links() else {
            return self.pass_with(begun, None);
        };
        question.ask();
        self.pass_with(begun, Some(question))
    }

    /// The question about links, to be asked without this; none while an earlier one is out, or when all is
    /// known without.
    fn ask_links(&mut self) -> Option<LinkQuery> {
        let compares = match &self.cgroup_program {
            Some(cgroup_program) => {
                let all = !cgroup_program.veths().lacking()
                    && self.sought.is_empty()
                    && self.partly_told.is_empty()
                    && !self.node.needs_links();
                let compares = cgroup_program.veths().compares();
                if all && !compares {
                    return None;
                }
                compares
            }
            None => false,
        };
        let mut reader = self.links.take()?;
        if compares && let Some(cgroup_program) = &mut self.cgroup_program {
            cgroup_program.read_before_asking();
        }
        reader.keep(|id| place_of(&self.containers, id).is_ok());
        self.partly_told.extend(self.sought.keys());
        Some(LinkQuery {
            reader,
            sought: std::mem::take(&mut self.sought),
            read: false,
        })
    }

    /// Takes the reader back after a question.
    fn take_back(&mut self, mut reader: LinkReader) {
        for (id, seek) in reader.unanswered() {
            if place_of(&self.containers, &id).is_ok() {
                // Of a row that has changed since it is sought already.
                self.sought.entry(id).or_insert(seek);
            }
        }
        self.partly_told.clear();
        self.partly_told.extend(reader.with_inner());
        self.links = Some(reader);
    }

    /// One pass, with what was told about links.
    fn pass_with(&mut self, begun: PassStart, answered: Option<LinkQuery>) -> Pass {
        self.tick += 1;
        let mut told = false;
        if let Some(question) = answered {
            told = question.read;
            self.take_back(question.reader);
        }
        if let Some(stacks) = &mut self.stacks {
            stacks.refresh(&mut self.buffer);
        }
        if let Some(cgroup_program) = &mut self.cgroup_program {
            for watched in &mut self.containers {
                watched.walk(cgroup_program);
            }
            cgroup_program.pass(&mut self.buffer);
            cgroup_program
                .veths_mut()
                .take(told_by(self.links.as_ref(), told));
        }
        let steady = self.add_delivered(told);
        let told = told && steady;
        let samples = self.take_samples(told, steady);
        let links = told_by(self.links.as_ref(), told);
        let read = self.node.read(links, &mut self.buffer);
        let mut node = NodeSample {
            tick: self.tick,
            taken_monotonic_ns: read.monotonic_ns,
            taken_wall_ns: read.wall_ns,
            counters: read.counters,
            cores_busy_ns: read.cores_busy_ns.clone(),
            disks: Vec::new(),
        };
        self.add_own(&mut node, samples.len());
        self.ask_disk();
        let processes = self.lister.as_mut().and_then(|lister| {
            let wanted = self.containers.iter().filter_map(|watched| {
                Some((watched.row().container_id, watched.directory()?.to_owned()))
            });
            lister.turn(wanted).map(|listing| Processes {
                tick: self.tick,
                ..listing
            })
        });
        self.last_pass = begun.at.elapsed();
        self.last_cpu = thread_cpu().saturating_sub(begun.cpu);
        node.counters.pass_ns = u64::try_from(self.last_pass.as_nanos()).ok();
        node.counters.pass_cpu_ns = u64::try_from(self.last_cpu.as_nanos()).ok();
        node.counters.tick_late_ns = u64::try_from(self.late.as_nanos()).ok();
        node.counters.ticks_missed = Some(self.missed);
        Pass {
            tick: self.tick,
            samples,
            processes,
            node,
        }
    }

    /// A sample of each container: by what was told about links if it was, by what was read of them if
    /// that is `steady`.
    fn take_samples(&mut self, told: bool, steady: bool) -> Samples {
        let reader = self.links.as_ref().filter(|_| told);
        let read = self.cgroup_program.as_ref().filter(|_| steady);
        let networks = Networks {
            read: read.map(|cgroup_program| cgroup_program.veths().believed()),
            told: told_by(self.links.as_ref(), told),
        };
        // What the program has read is of one moment; files are read one after the other.
        let files = self.cgroup_program.is_none();
        let none = Arc::default();
        let stacks = self
            .stacks
            .as_ref()
            .map_or(&none, StackedDeviceReader::stacks);
        let mut now = (monotonic_ns(), wall_ns());
        let carried = self.carried.carried();
        let mut samples = Samples::with_capacity(self.containers.len());
        for watched in &mut self.containers {
            let mut sample = watched.sample(
                &self.hierarchies,
                &self.budget,
                self.cgroup_program.as_ref(),
                networks,
                stacks,
                &mut self.buffer,
            );
            // Its host-side links are there, so the namespace is still its own.
            if sample.net.get().is_some()
                && (!self.partly_told.is_empty() || !self.sought.is_empty())
                && (self.partly_told.contains(&sample.container_id)
                    || self.sought.contains_key(&sample.container_id))
            {
                match reader.and_then(|it| it.inner(sample.container_id)?) {
                    Some(counted) => record::add_inner(&mut sample.net.counters, counted),
                    // Its network has no counters without them, as they would go back.
                    None => sample.net = Measured::default(),
                }
            }
            if sample.net.get().is_some() {
                let (id, net) = (sample.container_id, &mut sample.net.counters);
                record::add_carried(net, carried.get(&id).copied().unwrap_or_default());
                watched.tell_net(net);
            }
            if files {
                now = (monotonic_ns(), wall_ns());
            }
            sample.tick = self.tick;
            (sample.taken_monotonic_ns, sample.taken_wall_ns) = now;
            if watched.has_disk() {
                add_disk(&mut sample, watched.row(), &self.disk);
            }
            samples.push(&sample);
        }
        samples
    }

    /// Adds what is known without asking the kernel now.
    fn add_own(&self, node: &mut NodeSample, sampled: usize) {
        let counters = &mut node.counters;
        let space = self.scratch_root.as_deref();
        if let Some(space) = space.and_then(|path| self.disk.at(path)) {
            counters.disk_total_bytes = space.total;
            counters.disk_available_bytes = Some(space.available);
        }
        node.disks = self.disk.node(counters);
        counters.sessions_active = Some(u64::from(self.totals.active()));
        counters.sessions_total = Some(self.totals.admitted());
        counters.accepts_shed = Some(self.totals.shed());
        counters.containers_sampled = Some(sampled as u64);
    }

    /// Has file systems and directories asked, not more often than once per [`DISK`].
    fn ask_disk(&mut self) {
        if self.disk_asked.is_some_and(|at| at.elapsed() < DISK) {
            return;
        }
        self.disk_asked = Some(Instant::now());
        self.disk.refresh(
            self.scratch_root.as_deref(),
            self.containers
                .iter()
                .map(|watched| watched.row().scratch_path.as_str())
                .filter(|path| !path.is_empty()),
            self.containers
                .iter()
                .map(|watched| (watched.row().init_pid, watched.row().container_id))
                .filter(|(pid, _)| *pid != 0),
        );
    }

    /// Lets go of a container before [`Self::follow`].
    fn let_go(&mut self, id: ContainerId) {
        if let Ok(place) = place_of(&self.containers, &id) {
            self.containers.remove(place);
        }
        self.io_before.remove(&id);
        self.sought.remove(&id);
        self.told_before.remove(&id);
    }

    /// Takes up new containers and changed rows, and lets go of those no longer wanted. When the list
    /// is not `whole`, those it leaves out are sampled on.
    pub fn follow(&mut self, rows: &[ContainerRow], whole: bool) {
        if whole {
            let wanted = |id: &ContainerId| {
                rows.binary_search_by_key(id, |row| row.container_id)
                    .is_ok()
            };
            self.containers.retain(|watched| wanted(&watched.id()));
            self.io_before.retain(|id, _| wanted(id));
            self.sought.retain(|id, _| wanted(id));
            self.told_before.retain(|id, _| wanted(id));
        }
        for row in rows {
            let id = row.container_id;
            let place = place_of(&self.containers, &id);
            if let Ok(place) = place
                // A region begun anew gives the numbers of its generations again.
                && self.containers[place].row() == row
            {
                continue;
            }
            self.sought.insert(id, Seek::of(row));
            let before = self.io_before.get(&id).copied().unwrap_or_default();
            let told = match place {
                Ok(place) => self.containers[place].before(),
                Err(_) => self.told_before.remove(&id).unwrap_or_default(),
            };
            let watched = Watched::new(row.clone(), before, &self.hierarchies, &self.budget);
            let watched = watched.going_on(told);
            match place {
                Ok(place) => self.containers[place] = watched,
                Err(place) => self.containers.insert(place, watched),
            }
        }
        if let Some(cgroup_program) = &mut self.cgroup_program {
            let own = self.containers.iter().map(Watched::row);
            let own = own.filter(|row| !row.host_network);
            let links = own.flat_map(|row| &row.link_indexes).copied().collect();
            cgroup_program.veths_mut().follow(links);
        }
    }

    /// Whether all that counts for links was added to what the kernel counts itself, as it told now if
    /// `told` and as it was read.
    fn add_delivered(&mut self, told: bool) -> bool {
        let Some(delivered) = &mut self.delivered else {
            return true;
        };
        let reader = self.links.as_mut().filter(|_| told);
        let mut links = reader.and_then(LinkReader::statistics_mut);
        let cgroup_program = self.cgroup_program.as_mut();
        let mut own =
            cgroup_program.map(|cgroup_program| cgroup_program.veths_mut().believed_mut());
        let read = delivered.read(|link, [packets, bytes]| {
            if let Some(links) = &mut links {
                links.last_mut().add_delivered(link, packets, bytes);
            }
            if let Some(own) = &mut own {
                own.add_delivered(link, packets, bytes);
            }
        });
        if let Err(err) = &read
            && let Some(suppressed) = self.delivered_log.pass()
        {
            tracing::warn!(
                %err,
                suppressed,
                "what the kernel path delivers can't be read, network numbers are absent"
            );
        }
        read.is_ok()
    }
}

/// The links that were told of, where that counts.
fn told_by(reader: Option<&LinkReader>, counts: bool) -> Option<&Links> {
    let links = reader.filter(|_| counts)?.statistics()?;
    Some(links.last())
}

fn place_of(containers: &[Watched], id: &ContainerId) -> Result<usize, usize> {
    containers.binary_search_by_key(id, Watched::id)
}

fn add_disk(sample: &mut ContainerSample, row: &ContainerRow, disk: &Disk) {
    let mut counters = DiskCounters::default();
    let scratch = Some(Path::new(&row.scratch_path)).filter(|_| !row.scratch_path.is_empty());
    let scratch = scratch.and_then(|path| disk.scratch(path));
    let memory = Some(row.init_pid).filter(|pid| *pid != 0);
    let memory = memory.and_then(|pid| disk.memory(pid, row.container_id));
    if let Some((space, _)) = scratch {
        counters.scratch_bytes = Some(space.used);
        counters.scratch_files = space.files;
        counters.scratch_limit_bytes = space.total;
    }
    if let Some(space) = memory {
        counters.shm_bytes = Some(space.used);
        counters.shm_limit_bytes = space.total;
        counters.shm_age_ms = Some(u64::from(age_ms(space.at)));
    }
    let shown = scratch.or(memory.map(|space| (space, Source::File)));
    if let Some((space, source)) = shown {
        sample.disk = Measured {
            source,
            age_ms: age_ms(space.at),
            counters,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::ids::Generation;
    use shared::observed::NetCounters;

    #[test]
    fn counters_go_on_over_lives_of_the_process_and_changes_of_a_row() {
        let mut told = ContainerSample::default();
        told.cpu.counters.user_ns = Some(75);
        told.cpu.counters.system_ns = Some(25);
        let split = Before::of(&told).split;
        assert_ne!(split, Before::default().split);
        told.net.counters.rx_bytes = Some(1000);
        told.io = Measured::now(Source::Bpf, IoCounters::default());
        let totals = Arc::new(Totals::default());
        let disk = Disk::start().expect("a thread");
        let mut sampler = Sampler::new(totals, disk, None, 10, ReadMethod::Files);
        sampler.go_on_from(&[told], None);
        for generation in 1..3 {
            let row = ContainerRow {
                generation: Generation(generation),
                ..ContainerRow::default()
            };
            sampler.follow(&[row], true);
            assert_eq!(sampler.containers[0].row().generation.0, generation);
            assert_eq!(sampler.containers[0].before().split, split);
            // What is left of its links has counted less.
            let mut net = NetCounters {
                rx_bytes: Some(7),
                ..NetCounters::default()
            };
            sampler.containers[0].tell_net(&mut net);
            assert_eq!(net.rx_bytes, Some(1000));
        }
    }

    #[test]
    fn a_row_of_a_region_begun_anew_is_followed_though_its_generation_has_the_same_number() {
        let totals = Arc::new(Totals::default());
        let disk = Disk::start().expect("a thread");
        let mut sampler = Sampler::new(totals, disk, None, 10, ReadMethod::Files);
        for link in [7, 8] {
            let row = ContainerRow {
                generation: Generation(1),
                link_indexes: vec![link],
                ..ContainerRow::default()
            };
            sampler.follow(std::slice::from_ref(&row), true);
            assert_eq!(sampler.containers[0].row(), &row);
        }
    }

    #[test]
    fn what_programs_have_counted_of_block_devices_goes_on_and_what_the_kernel_counts_is_told_anew()
    {
        let root = PathBuf::from("/nowhere");
        for (hierarchy, source, goes_on) in [
            (Some(Hierarchy::V1(root.clone())), Source::Bpf, true),
            (Some(Hierarchy::V1(root.clone())), Source::File, false),
            (Some(Hierarchy::V2(root)), Source::Bpf, false),
            (None, Source::Bpf, false),
        ] {
            let mut told = ContainerSample::default();
            let counted = IoCounters {
                read_bytes: Some(4096),
                ..IoCounters::default()
            };
            told.io = Measured::now(source, counted);
            let totals = Arc::new(Totals::default());
            let disk = Disk::start().expect("a thread");
            let mut sampler = Sampler::new(totals, disk, None, 10, ReadMethod::Files);
            sampler.hierarchies.io.clone_from(&hierarchy);
            sampler.go_on_from(&[told], None);
            sampler.follow(&[ContainerRow::default()], true);
            let before = sampler.containers[0].counted_before();
            let wanted = goes_on.then_some(4096);
            assert_eq!(
                before.and_then(|io| io.read_bytes),
                wanted,
                "{hierarchy:?} {source:?}"
            );
        }
    }
}
