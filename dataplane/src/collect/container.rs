//! Reading one container.
//!
//! In: its desired row, this host's hierarchies, what the kernel program has read of its cgroups and links in the
//! pass, and link counters the kernel was asked for. Out: one sample. Invariant: what can't be read is absent
//! in this sample and hurts nothing else; a container whose cgroup was removed and made again (a restart) is
//! found again by path.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::desired::ContainerRow;
use shared::ids::{ContainerId, KernelId};
use shared::observed::{ContainerSample, IoCounters, Measured, NetCounters, Source};

use ebpf::cgroup_records::{CgroupRecord, filled};

use super::cgroup_program::{CgroupProgram, Kind, Slot};
use super::cgroup_v1;
use super::cgroup_v2;
use super::file::{Budget, Failure};
use super::hierarchies::{CgroupHierarchies, Hierarchy};
use super::record::{
    Before, CpuSplit, IoSums, IoWay, Steady, cpu_counters, io_counters, memory_counters, network,
    network_of, of_net, pids_counters,
};
use super::stacked_devices::StackedDevices;
use crate::sys::netlink::Links;

#[derive(Debug)]
enum Cpu {
    V1(cgroup_v1::Cpu),
    V2(cgroup_v2::Cpu),
}

#[derive(Debug)]
enum Memory {
    V1(cgroup_v1::Memory),
    V2(cgroup_v2::Memory),
}

#[derive(Debug)]
enum Io {
    V1(cgroup_v1::Io),
    V2(cgroup_v2::Io),
}

impl Io {
    fn read(
        &mut self,
        stacks: &StackedDevices,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<IoCounters>, Failure> {
        match self {
            Self::V1(io) => io.read(stacks, buffer),
            Self::V2(io) => io.read(stacks, buffer).map(Some),
        }
    }
}

/// A container's cgroup in one hierarchy.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    kind: Kind,
    /// What is read to bring it up to date, once it was found for the kernel program.
    found: Option<Arc<Path>>,
}

impl Group {
    fn new(path: &Path, hierarchy: Option<&Hierarchy>, controller: Controller) -> Self {
        Self {
            path: path.to_owned(),
            kind: match hierarchy {
                Some(Hierarchy::V2(_)) => Kind::Unified,
                _ if controller == Controller::Memory => Kind::Memory,
                _ => Kind::Other,
            },
            found: None,
        }
    }
}

/// Controllers, by their numbers in targets and records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Controller {
    CpuAccounting = 0,
    Cpu = 1,
    Memory = 2,
    Io = 3,
    Pids = 4,
}

/// The cgroups of a container, by what is read from them.
#[derive(Debug, Default)]
struct Groups {
    cpu: Option<Group>,
    quota: Option<Group>,
    memory: Option<Group>,
    pids: Option<Group>,
    io: Option<Group>,
}

/// When to look for the cgroups that the kernel program does not know yet. One may never have some
/// controller: after each look in vain twice as many passes go by.
#[derive(Debug, Default)]
struct Search {
    wanted: bool,
    in_vain: u32,
    wait: u32,
}

impl Search {
    const LONGEST_WAIT: u32 = 64;

    fn begin(&mut self) {
        // One that is looked for already goes on being so at its pace.
        if !self.wanted {
            *self = Self {
                wanted: true,
                ..Self::default()
            };
        }
    }

    fn is_due(&mut self) -> bool {
        let due = self.wait == 0;
        self.wait = self.wait.saturating_sub(1);
        self.wanted && due
    }

    fn end(&mut self, all: bool) {
        self.wanted = !all;
        self.in_vain = (2 * self.in_vain).clamp(1, Self::LONGEST_WAIT);
        self.wait = if all { 0 } else { self.in_vain - 1 };
    }
}

impl Groups {
    fn by_controller(&mut self) -> [(Controller, &mut Option<Group>); 5] {
        [
            (Controller::CpuAccounting, &mut self.cpu),
            (Controller::Cpu, &mut self.quota),
            (Controller::Memory, &mut self.memory),
            (Controller::Io, &mut self.io),
            (Controller::Pids, &mut self.pids),
        ]
    }
}

/// What every pass needs of a container, side by side: of the rest nothing is looked at while all goes
/// well. With a thousand containers each line of memory is a miss of the cache.
#[derive(Debug)]
struct Hot {
    container_id: ContainerId,
    kernel_id: KernelId,
    /// Where its record is, once there is one.
    slot: Option<Slot>,
    search: Search,
    /// Bit per controller that the kernel program knows.
    known: u64,
    split: CpuSplit,
    net: Steady<8>,
    io: IoSums,
    /// Its link, when it has just one and is not on the host's network.
    link: Option<u32>,
    /// Where its link was in the last pass's list.
    link_place: usize,
    /// Some files were not found yet.
    incomplete: bool,
    /// Something of it is in files only.
    by_files: bool,
    /// Memory is the unified tree's.
    unified_memory: bool,
    /// Block devices are counted by the unified tree.
    unified_io: bool,
    /// Swap is counted for this container.
    counts_swap: bool,
    /// Has a scratch directory or a /dev/shm to ask about.
    has_disk: bool,
    io_before: Option<Box<IoCounters>>,
}

impl Hot {
    /// Other cgroups than before stand for these.
    fn look_for(&mut self, controllers: &[Controller]) {
        for controller in controllers {
            self.known &= !(1 << *controller as u64);
        }
        self.search.begin();
    }
}

/// What links have counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Networks<'a> {
    /// As the kernel program read them; only those that are believed.
    pub read: Option<&'a Links>,
    /// As the kernel told.
    pub told: Option<&'a Links>,
}

/// One container: its files and records.
#[derive(Debug)]
pub struct Watched {
    hot: Hot,
    cold: Box<Cold>,
}

#[derive(Debug)]
struct Cold {
    row: ContainerRow,
    groups: Groups,
    cpu: Option<Cpu>,
    memory: Option<Memory>,
    pids: Option<cgroup_v1::Pids>,
    io: Option<Io>,
}

/// The container's directory in a hierarchy: where the row says, else where its first process is,
/// provided that this place carries the container's id (process ids are used again).
fn directory(row: &ContainerRow, hierarchy: &Hierarchy, controller: &str) -> Option<PathBuf> {
    let mount = hierarchy.mount();
    if !row.cgroup_path.is_empty() {
        let path = mount.join(&row.cgroup_path);
        if path.is_dir() {
            return Some(path);
        }
    }
    if row.init_pid == 0 {
        return None;
    }
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", row.init_pid)).ok()?;
    let unified = matches!(hierarchy, Hierarchy::V2(_));
    let relative = process_path(&text, (!unified).then_some(controller))?;
    let path = mount.join(of_container(relative, &row.container_id.to_string())?);
    path.is_dir().then_some(path)
}

/// The path of a v1 controller, or of the unified tree, in `/proc/<pid>/cgroup`.
fn process_path<'a>(text: &'a str, controller: Option<&str>) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let here = match controller {
            Some(controller) => controllers.split(',').any(|name| name == controller),
            None => number == "0" && controllers.is_empty(),
        };
        let path = path.strip_prefix('/').unwrap_or(path);
        let inside = !path.split('/').any(|part| part == "..");
        (here && inside).then_some(path)
    })
}

/// A path up to the name that carries the container's id: its first process may have gone further down.
fn of_container<'a>(path: &'a str, id: &str) -> Option<&'a str> {
    let at = path.find(id)?;
    let end = path.get(at..)?.find('/').map_or(path.len(), |it| at + it);
    path.get(..end)
}

fn find(row: &ContainerRow, hierarchy: Option<&Hierarchy>, controller: &str) -> Option<PathBuf> {
    directory(row, hierarchy?, controller)
}

impl Watched {
    /// Finds the container's directories. Those that are not there yet are looked for again at
    /// the next [`Watched::sample`].
    pub fn new(
        row: ContainerRow,
        io_before: IoCounters,
        hierarchies: &CgroupHierarchies,
        budget: &Arc<Budget>,
    ) -> Self {
        let one = row.link_indexes.as_slice();
        let mut watched = Self {
            hot: Hot {
                container_id: row.container_id,
                kernel_id: row.kernel_id,
                slot: None,
                search: Search::default(),
                known: 0,
                split: CpuSplit::default(),
                net: Steady::default(),
                io: IoSums::default(),
                link: one
                    .first()
                    .copied()
                    .filter(|_| one.len() == 1 && !row.host_network),
                link_place: 0,
                incomplete: true,
                by_files: false,
                unified_memory: false,
                unified_io: false,
                counts_swap: false,
                has_disk: row.init_pid != 0 || !row.scratch_path.is_empty(),
                io_before: (io_before != IoCounters::default()).then(|| Box::new(io_before)),
            },
            cold: Box::new(Cold {
                row,
                groups: Groups::default(),
                cpu: None,
                memory: None,
                pids: None,
                io: None,
            }),
        };
        watched.find_missing(hierarchies, budget);
        watched
    }

    /// What its counters have come to until now.
    pub(super) fn before(&self) -> Before {
        Before {
            split: self.hot.split,
            net: self.hot.net.clone(),
            io: self.hot.io.clone(),
        }
    }

    /// Makes of what its links and others have counted what is told.
    pub(super) fn tell_net(&mut self, net: &mut NetCounters) {
        self.hot.net.tell(of_net(net));
    }

    /// What an earlier life of this process had counted of block devices.
    #[cfg(test)]
    pub(super) fn counted_before(&self) -> Option<IoCounters> {
        self.hot.io_before.as_deref().copied()
    }

    /// Lets its network's counters begin anew.
    #[cfg(test)]
    pub(super) fn forget_net(&mut self) {
        self.hot.net = Steady::default();
    }

    /// The same with its counters going on from there.
    pub(super) fn going_on(mut self, before: Before) -> Self {
        (self.hot.split, self.hot.net, self.hot.io) = (before.split, before.net, before.io);
        self
    }

    /// Whose it is.
    pub fn id(&self) -> ContainerId {
        self.hot.container_id
    }

    /// The row it was made for.
    pub fn row(&self) -> &ContainerRow {
        &self.cold.row
    }

    /// A cgroup of the container, once one was found.
    pub fn directory(&self) -> Option<&Path> {
        let groups = &self.cold.groups;
        [&groups.pids, &groups.cpu, &groups.memory]
            .into_iter()
            .flatten()
            .map(|group| group.path.as_path())
            .next()
    }

    /// Whether there may be something to say about its disks.
    pub fn has_disk(&self) -> bool {
        self.hot.has_disk
    }

    fn find_missing(&mut self, hierarchies: &CgroupHierarchies, budget: &Arc<Budget>) {
        if !self.hot.incomplete {
            return;
        }
        let row = &self.cold.row;
        if self.cold.cpu.is_none()
            && let Some(path) = find(row, hierarchies.cpu.as_ref(), "cpuacct")
        {
            self.cold.groups.cpu = Some(Group::new(
                &path,
                hierarchies.cpu.as_ref(),
                Controller::CpuAccounting,
            ));
            self.cold.cpu = Some(match &hierarchies.cpu {
                Some(Hierarchy::V1(_)) => {
                    let quota = find(row, hierarchies.cpu_quota.as_ref(), "cpu");
                    self.cold.groups.quota = quota.as_deref().map(|path| {
                        Group::new(path, hierarchies.cpu_quota.as_ref(), Controller::Cpu)
                    });
                    Cpu::V1(cgroup_v1::Cpu::new(&path, quota.as_deref(), budget))
                }
                _ => {
                    let quota = Group::new(&path, hierarchies.cpu.as_ref(), Controller::Cpu);
                    self.cold.groups.quota = Some(quota);
                    Cpu::V2(cgroup_v2::Cpu::new(&path, budget))
                }
            });
            self.hot
                .look_for(&[Controller::CpuAccounting, Controller::Cpu]);
        }
        if self.cold.memory.is_none()
            && let Some(path) = find(row, hierarchies.memory.as_ref(), "memory")
        {
            let swap = ["memory.memsw.usage_in_bytes", "memory.swap.current"];
            self.hot.counts_swap = swap.iter().any(|file| path.join(file).exists());
            self.hot.unified_memory = matches!(hierarchies.memory, Some(Hierarchy::V2(_)));
            self.cold.groups.memory = Some(Group::new(
                &path,
                hierarchies.memory.as_ref(),
                Controller::Memory,
            ));
            self.cold.memory = Some(match &hierarchies.memory {
                Some(Hierarchy::V1(_)) => Memory::V1(cgroup_v1::Memory::new(&path, budget)),
                _ => Memory::V2(cgroup_v2::Memory::new(&path, budget)),
            });
            self.hot.look_for(&[Controller::Memory]);
        }
        if self.cold.pids.is_none()
            && let Some(path) = find(row, hierarchies.pids.as_ref(), "pids")
        {
            self.cold.groups.pids = Some(Group::new(
                &path,
                hierarchies.pids.as_ref(),
                Controller::Pids,
            ));
            self.cold.pids = Some(cgroup_v1::Pids::new(&path, budget));
            self.hot.look_for(&[Controller::Pids]);
        }
        if self.cold.io.is_none()
            && let Some(path) = find(row, hierarchies.io.as_ref(), "blkio")
        {
            self.hot.unified_io = matches!(hierarchies.io, Some(Hierarchy::V2(_)));
            self.cold.groups.io = Some(Group::new(&path, hierarchies.io.as_ref(), Controller::Io));
            self.cold.io = Some(match &hierarchies.io {
                Some(Hierarchy::V1(_)) => Io::V1(cgroup_v1::Io::new(&path, budget)),
                _ => Io::V2(cgroup_v2::Io::new(&path, budget)),
            });
            self.hot.look_for(&[Controller::Io]);
        }
        self.hot.incomplete = self.cold.cpu.is_none()
            || self.cold.memory.is_none()
            || self.cold.pids.is_none()
            || self.cold.io.is_none();
        self.hot.by_files = matches!(self.cold.cpu, Some(Cpu::V2(_)))
            || matches!(self.cold.memory, Some(Memory::V2(_)))
            || matches!(self.cold.io, Some(Io::V2(_)));
    }

    fn lacks_files(&self) -> bool {
        let missing = [self.cold.cpu.is_none(), self.cold.memory.is_none()];
        missing.contains(&true) || self.cold.pids.is_none() || self.cold.io.is_none()
    }

    /// Has this container's cgroups read by the kernel program from now on.
    pub fn walk(&mut self, program: &mut CgroupProgram) {
        if !self.hot.search.is_due() {
            return;
        }
        if self.hot.slot.is_none() {
            self.hot.slot = program.slot();
        }
        let Some(slot) = &self.hot.slot else {
            return;
        };
        let mut all = true;
        for (controller, group) in self.cold.groups.by_controller() {
            let Some(group) = group.as_mut().filter(|group| group.found.is_none()) else {
                continue;
            };
            if controller == Controller::Io && !program.knows_block_io(group.kind) {
                continue;
            }
            match program.find(&group.path, group.kind) {
                Some(found) if program.know(slot, controller as usize, &found) => {
                    group.found = Some(found.settled());
                    self.hot.known |= 1 << controller as u64;
                }
                _ => all = false,
            }
        }
        self.hot.search.end(all);
    }

    /// Reads everything of this container. Times and tick are the caller's to fill in.
    pub fn sample(
        &mut self,
        hierarchies: &CgroupHierarchies,
        budget: &Arc<Budget>,
        program: Option<&CgroupProgram>,
        links: Networks<'_>,
        stacks: &Arc<StackedDevices>,
        buffer: &mut Vec<u8>,
    ) -> ContainerSample {
        let mut sample = ContainerSample {
            container_id: self.hot.container_id,
            kernel_id: self.hot.kernel_id,
            ..ContainerSample::default()
        };
        if let Some(program) = program {
            self.take_record(&mut sample, program, stacks, buffer);
        }
        self.find_missing(hierarchies, budget);
        if self.read_groups(&mut sample, stacks, buffer) {
            // A restarted container has new cgroups at the old place.
            self.find_missing(hierarchies, budget);
            self.read_groups(&mut sample, stacks, buffer);
        }
        if sample.io.source == Source::File {
            let record = self.hot.slot.as_ref().zip(program);
            let record = record.and_then(|(slot, program)| program.record(slot));
            let way = IoWay::Files(Arc::clone(stacks));
            self.tell_io(&way, &mut sample.io.counters, record.as_ref(), buffer);
        }
        for (source, links) in [(Source::Bpf, links.read), (Source::Netlink, links.told)] {
            let place = &mut self.hot.link_place;
            let net = links.and_then(|links| match self.hot.link {
                Some(link) => network(&[link], links, place),
                None => network_of(&self.cold.row, links),
            });
            if let Some(net) = net {
                sample.net = Measured::now(source, net);
                break;
            }
        }
        sample
    }

    /// Takes what the kernel program has read.
    fn take_record(
        &mut self,
        sample: &mut ContainerSample,
        program: &CgroupProgram,
        stacks: &Arc<StackedDevices>,
        buffer: &mut Vec<u8>,
    ) {
        let Some(record) = self.hot.slot.as_ref().and_then(|slot| program.record(slot)) else {
            return;
        };
        let lost = self.hot.known & !record.alive;
        if lost != 0 {
            // They may have been made again.
            self.hot.known &= record.alive;
            self.hot.search.begin();
            for (controller, group) in self.cold.groups.by_controller() {
                if lost & (1 << controller as u64) != 0
                    && let Some(group) = group
                {
                    group.found = None;
                }
            }
        }
        let bits = self.hot.known;
        let known = |controller: Controller| bits & (1 << controller as u64) != 0;
        let filled = |bits: u64| record.filled & bits != 0;
        // A quota kept apart and not found makes the whole group the files'; in version 2 a cgroup may
        // have CPU time and no quota.
        let quota = || self.cold.groups.quota.as_ref();
        if known(Controller::CpuAccounting)
            && (known(Controller::Cpu) || quota().is_none_or(|it| it.kind == Kind::Unified))
            && let Some(counters) = cpu_counters(&record, &mut self.hot.split)
        {
            sample.cpu = Measured::now(Source::Bpf, counters);
        }
        if known(Controller::Pids) && filled(filled::PIDS) {
            sample.pids = Measured::now(Source::Bpf, pids_counters(&record));
        }
        // What the kernel has counted is there as the sum over all devices.
        let loops = || stacks.have_loops() && filled(filled::LOOPS);
        let once = !self.hot.unified_io || !(stacks.have_others() || loops());
        if known(Controller::Io) && filled(filled::IO) && once {
            let loops_on_disks = stacks.have_loops();
            let before = self.hot.io_before.as_deref();
            let mut counted = io_counters(&record, before, loops_on_disks);
            let way = IoWay::Records { loops_on_disks };
            self.tell_io(&way, &mut counted, Some(&record), buffer);
            sample.io = Measured::now(Source::Bpf, counted);
        }
        if known(Controller::Memory) && filled(filled::MEMORY_STAT) && program.knows_statistics() {
            let (unified, swap) = (self.hot.unified_memory, self.hot.counts_swap);
            let counters = memory_counters(&record, unified, swap);
            sample.memory = Measured::now(Source::Bpf, counters);
        }
    }

    /// Makes of what was counted this way what is told.
    fn tell_io(
        &mut self,
        way: &IoWay,
        counted: &mut IoCounters,
        record: Option<&CgroupRecord>,
        buffer: &mut Vec<u8>,
    ) {
        let before = self.hot.io_before.as_deref();
        let files = &mut self.cold.io;
        self.hot.io.tell(way, counted, |last| match last {
            IoWay::Records { loops_on_disks } => record
                .filter(|record| record.filled & filled::IO != 0)
                .map(|record| io_counters(record, before, *loops_on_disks)),
            IoWay::Files(stacks) => files.as_mut()?.read(stacks, buffer).ok()?,
        });
    }

    /// Reads the groups that are still absent. True when one was found gone and given up.
    fn read_groups(
        &mut self,
        sample: &mut ContainerSample,
        stacks: &Arc<StackedDevices>,
        buffer: &mut Vec<u8>,
    ) -> bool {
        let mut gone = false;
        let all = sample.cpu.get().is_some()
            && sample.memory.get().is_some()
            && sample.pids.get().is_some()
            && sample.io.get().is_some();
        if all && !self.hot.by_files {
            return false;
        }
        // Pressure is in files only.
        if let Some(Cpu::V2(cpu)) = &mut self.cold.cpu
            && sample.cpu.get().is_some()
        {
            cpu.add_pressure(&mut sample.cpu.counters, buffer);
        }
        if let Some(Memory::V2(memory)) = &mut self.cold.memory
            && sample.memory.get().is_some()
        {
            memory.add_pressure(&mut sample.memory.counters, buffer);
        }
        if let Some(Io::V2(io)) = &mut self.cold.io
            && sample.io.get().is_some()
        {
            io.add_pressure(&mut sample.io.counters, buffer);
        }
        if let Some(cpu) = self
            .cold
            .cpu
            .as_mut()
            .filter(|_| sample.cpu.get().is_none())
        {
            let read = match cpu {
                Cpu::V1(cpu) => cpu.read(buffer),
                Cpu::V2(cpu) => cpu.read(buffer).map(|mut counters| {
                    let whole = [counters.usage_ns, counters.user_ns, counters.system_ns];
                    if let [Some(usage), Some(user), Some(system)] = whole {
                        let (user, system) = self.hot.split.adjust(usage, user, system);
                        (counters.user_ns, counters.system_ns) = (Some(user), Some(system));
                    }
                    counters
                }),
            };
            gone |= take(read.map(Some), &mut sample.cpu, &mut self.cold.cpu);
        }
        if let Some(memory) = self
            .cold
            .memory
            .as_mut()
            .filter(|_| sample.memory.get().is_none())
        {
            let read = match memory {
                Memory::V1(memory) => memory.read(buffer),
                Memory::V2(memory) => memory.read(buffer),
            };
            gone |= take(read.map(Some), &mut sample.memory, &mut self.cold.memory);
        }
        if let Some(pids) = self
            .cold
            .pids
            .as_mut()
            .filter(|_| sample.pids.get().is_none())
        {
            let read = pids.read(buffer);
            gone |= take(read.map(Some), &mut sample.pids, &mut self.cold.pids);
        }
        if let Some(io) = self.cold.io.as_mut().filter(|_| sample.io.get().is_none()) {
            gone |= take(io.read(stacks, buffer), &mut sample.io, &mut self.cold.io);
        }
        self.hot.incomplete |= self.lacks_files();
        gone
    }
}

/// Puts what was read into the sample. True when the files are of a cgroup that is gone; they are
/// given up then.
fn take<T, F>(
    read: Result<Option<T>, Failure>,
    into: &mut Measured<T>,
    files: &mut Option<F>,
) -> bool {
    match read {
        Ok(Some(counters)) => *into = Measured::now(Source::File, counters),
        Ok(None) => {}
        Err(failure) => {
            // A file missing at its path: the directory may be gone, and its successor elsewhere.
            *files = None;
            if let Failure::Other(errno) = failure {
                tracing::debug!(err = %errno, "a cgroup file can't be read");
            }
            return failure == Failure::Gone;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_found_is_looked_for_less_and_less_often() {
        let mut search = Search::default();
        assert!(!search.is_due());
        search.begin();
        let looks = (0..400).filter(|_| {
            let due = search.is_due();
            if due {
                search.end(false);
            }
            due
        });
        // After 1, 2, 4, ... 64 passes, then every 64.
        assert_eq!(looks.count(), 7 + (400 - 127) / 64 + 1);
        while !search.is_due() {}
        search.end(true);
        assert!(!search.is_due());
        search.begin();
        assert!(search.is_due(), "a new one at once");
    }

    #[test]
    fn paths_of_processes_are_found_and_never_leave_the_tree() {
        let text = "4:memory:/docker/ab\n2:cpu,cpuacct:/x\n0::/system.slice/docker-ab.scope\n";
        assert_eq!(process_path(text, Some("memory")), Some("docker/ab"));
        assert_eq!(process_path(text, Some("cpuacct")), Some("x"));
        assert_eq!(process_path(text, Some("blkio")), None);
        assert_eq!(
            process_path(text, None),
            Some("system.slice/docker-ab.scope")
        );
        assert_eq!(process_path("4:memory:/../../etc\n", Some("memory")), None);
        let scope = "system.slice/docker-ab.scope";
        assert_eq!(of_container(scope, "ab"), Some(scope));
        let below = "system.slice/docker-ab.scope/init.scope";
        assert_eq!(of_container(below, "ab"), Some(scope));
        assert_eq!(of_container("docker/ab/docker/cd", "ab"), Some("docker/ab"));
        assert_eq!(of_container(below, "cd"), None);
    }

    #[test]
    fn a_process_of_someone_else_is_not_taken_for_the_container() {
        // Our own process is real, and its cgroup does not carry this id.
        let row = ContainerRow {
            container_id: ContainerId([0xab; 32]),
            init_pid: std::process::id(),
            ..ContainerRow::default()
        };
        let hierarchies = CgroupHierarchies::gather();
        let mut watched = Watched::new(row, IoCounters::default(), &hierarchies, &Budget::new(100));
        let sample = watched.sample(
            &hierarchies,
            &Budget::new(100),
            None,
            Networks::default(),
            &Arc::default(),
            &mut Vec::new(),
        );
        assert_eq!(sample.cpu.source, Source::Absent);
        assert_eq!(sample.memory.source, Source::Absent);
    }
}
