//! Reading one container.
//!
//! In: its desired row, this host's facts, the pass's link counters. Out: one sample. Invariant:
//! what can't be read is absent in this sample and hurts nothing else; a container whose cgroup
//! was removed and made again (a restart) is found again by path.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::desired::ContainerRow;
use shared::observed::{
    ContainerSample, CpuCounters, IoCounters, Measured, MemoryCounters, NetCounters, PidsCounters,
    Source, UNLIMITED,
};

use ebpf::cgroup_records::{CgroupRecord, filled};

use super::cgroup_v1;
use super::cgroup_v2;
use super::facts::{Facts, Hierarchy};
use super::file::{Budget, Failure};
use super::walks::{Kind, Place, Walks, bytes};
use crate::sys::netlink::{LinkCounters, Links};

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

/// A container's cgroup in one hierarchy, and where its record is once it is walked.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    kind: Kind,
    place: Option<Place>,
    /// Serial number of the controller's state there, once known; 0 unknown.
    serial: u64,
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
            place: None,
            serial: 0,
        }
    }
}

/// Places of serial numbers in a record.
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
    /// Version 1 only: there the kernel program counts.
    io: Option<Group>,
    /// Swap is counted for this container.
    counts_swap: bool,
}

/// One container: its files and records.
#[derive(Debug)]
pub struct Watched {
    row: ContainerRow,
    io_before: IoCounters,
    groups: Groups,
    split: CpuSplit,
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
    if !relative.contains(&row.container_id.to_string()) {
        return None;
    }
    let path = mount.join(relative);
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

fn find(row: &ContainerRow, hierarchy: Option<&Hierarchy>, controller: &str) -> Option<PathBuf> {
    directory(row, hierarchy?, controller)
}

impl Watched {
    /// Finds the container's directories. Those that are not there yet are looked for again at
    /// the next [`Watched::sample`].
    pub fn new(
        row: ContainerRow,
        io_before: IoCounters,
        facts: &Facts,
        budget: &Arc<Budget>,
    ) -> Self {
        let mut watched = Self {
            row,
            io_before,
            groups: Groups::default(),
            split: CpuSplit::default(),
            cpu: None,
            memory: None,
            pids: None,
            io: None,
        };
        watched.find_missing(facts, budget);
        watched
    }

    /// The row it was made for.
    pub fn row(&self) -> &ContainerRow {
        &self.row
    }

    /// A cgroup of the container, once one was found.
    pub fn directory(&self) -> Option<&Path> {
        let groups = &self.groups;
        [&groups.pids, &groups.cpu, &groups.memory]
            .into_iter()
            .flatten()
            .map(|group| group.path.as_path())
            .next()
    }

    fn find_missing(&mut self, facts: &Facts, budget: &Arc<Budget>) {
        let row = &self.row;
        if self.cpu.is_none()
            && let Some(path) = find(row, facts.cpu.as_ref(), "cpuacct")
        {
            self.groups.cpu = Some(Group::new(
                &path,
                facts.cpu.as_ref(),
                Controller::CpuAccounting,
            ));
            self.cpu = Some(match &facts.cpu {
                Some(Hierarchy::V1(_)) => {
                    let quota = find(row, facts.cpu_quota.as_ref(), "cpu");
                    self.groups.quota = quota
                        .as_deref()
                        .map(|path| Group::new(path, facts.cpu_quota.as_ref(), Controller::Cpu));
                    Cpu::V1(cgroup_v1::Cpu::new(&path, quota.as_deref(), budget))
                }
                _ => Cpu::V2(cgroup_v2::Cpu::new(&path, budget)),
            });
        }
        if self.memory.is_none()
            && let Some(path) = find(row, facts.memory.as_ref(), "memory")
        {
            let swap = ["memory.memsw.usage_in_bytes", "memory.swap.current"];
            self.groups.counts_swap = swap.iter().any(|file| path.join(file).exists());
            self.groups.memory = Some(Group::new(&path, facts.memory.as_ref(), Controller::Memory));
            self.memory = Some(match &facts.memory {
                Some(Hierarchy::V1(_)) => Memory::V1(cgroup_v1::Memory::new(&path, budget)),
                _ => Memory::V2(cgroup_v2::Memory::new(&path, budget)),
            });
        }
        if self.pids.is_none()
            && let Some(path) = find(row, facts.pids.as_ref(), "pids")
        {
            self.groups.pids = Some(Group::new(&path, facts.pids.as_ref(), Controller::Pids));
            self.pids = Some(cgroup_v1::Pids::new(&path, budget));
        }
        if self.io.is_none()
            && let Some(path) = find(row, facts.io.as_ref(), "blkio")
        {
            self.io = Some(match &facts.io {
                Some(Hierarchy::V1(_)) => {
                    self.groups.io = Some(Group::new(&path, facts.io.as_ref(), Controller::Io));
                    Io::V1(cgroup_v1::Io::new(&path, budget))
                }
                _ => Io::V2(cgroup_v2::Io::new(&path, budget)),
            });
        }
    }

    /// Has this container's cgroups walked from now on.
    pub fn walk(&mut self, walks: &mut Walks) {
        let groups = &mut self.groups;
        // Walked for the counters of block devices alone, which the kernel program keeps.
        let io = groups.io.as_mut().filter(|_| walks.counts_block_io());
        let all = [
            &mut groups.cpu,
            &mut groups.quota,
            &mut groups.memory,
            &mut groups.pids,
        ];
        for group in all.into_iter().flatten().chain(io) {
            if group.place.is_none() {
                group.place = walks.place(&group.path, group.kind);
            }
        }
    }

    /// Reads everything of this container. Times and tick are the caller's to fill in.
    pub fn sample(
        &mut self,
        facts: &Facts,
        budget: &Arc<Budget>,
        walks: Option<&mut Walks>,
        links: Option<&Links>,
        buffer: &mut Vec<u8>,
    ) -> ContainerSample {
        let mut sample = ContainerSample {
            container_id: self.row.container_id,
            kernel_id: self.row.kernel_id,
            ..ContainerSample::default()
        };
        if let Some(walks) = walks {
            self.take_records(&mut sample, walks);
        }
        self.find_missing(facts, budget);
        if self.read_groups(&mut sample, buffer) {
            // A restarted container has new cgroups at the old place.
            self.find_missing(facts, budget);
            self.read_groups(&mut sample, buffer);
        }
        if let Some(net) = links.and_then(|links| network(&self.row, links)) {
            sample.net = Measured::now(Source::Netlink, net);
        }
        sample
    }

    /// Takes what the walks have found.
    fn take_records(&mut self, sample: &mut ContainerSample, walks: &mut Walks) {
        let groups = &mut self.groups;
        let memory = find_record(&mut groups.memory, None, walks, Controller::Memory);
        let known = memory.as_ref();
        let cpu = find_record(&mut groups.cpu, known, walks, Controller::CpuAccounting);
        let apart = find_record(&mut groups.quota, known, walks, Controller::Cpu);
        if let Some(record) = cpu {
            let own = Some(&record).filter(|record| record.filled & filled::QUOTA != 0);
            let quota = apart
                .as_ref()
                .filter(|record| record.filled & filled::QUOTA != 0)
                .or(own);
            // A quota kept apart and not found makes the whole group the files'.
            if groups.quota.is_none() || apart.is_some() {
                let counters = cpu_counters(&record, quota, &mut self.split);
                if let Some(counters) = counters {
                    sample.cpu = Measured::now(Source::Bpf, counters);
                }
            }
        }
        let pids = find_record(&mut groups.pids, known, walks, Controller::Pids);
        if let Some(record) = pids
            && record.filled & filled::PIDS != 0
        {
            sample.pids = Measured::now(Source::Bpf, pids_counters(&record));
        }
        if walks.counts_block_io()
            && let Some(record) = find_record(&mut groups.io, known, walks, Controller::Io)
            && record.filled & filled::IO != 0
        {
            sample.io = Measured::now(Source::Bpf, io_counters(&record, &self.io_before));
        }
        if let Some(record) = memory
            && walks.knows_statistics()
            && record.filled & filled::MEMORY_STAT != 0
        {
            let unified = groups
                .memory
                .as_ref()
                .is_some_and(|group| group.kind == Kind::Unified);
            let counters = memory_counters(&record, unified, groups.counts_swap);
            sample.memory = Measured::now(Source::Bpf, counters);
        }
    }

    /// Reads the groups that are still absent. True when one was found gone and given up.
    fn read_groups(&mut self, sample: &mut ContainerSample, buffer: &mut Vec<u8>) -> bool {
        let mut gone = false;
        // Pressure is in files only.
        if let Some(Cpu::V2(cpu)) = &mut self.cpu
            && sample.cpu.get().is_some()
        {
            cpu.add_pressure(&mut sample.cpu.counters, buffer);
        }
        if let Some(Memory::V2(memory)) = &mut self.memory
            && sample.memory.get().is_some()
        {
            memory.add_pressure(&mut sample.memory.counters, buffer);
        }
        if let Some(cpu) = self.cpu.as_mut().filter(|_| sample.cpu.get().is_none()) {
            let read = match cpu {
                Cpu::V1(cpu) => cpu.read(buffer),
                Cpu::V2(cpu) => cpu.read(buffer),
            };
            gone |= take(read.map(Some), &mut sample.cpu, &mut self.cpu);
        }
        if let Some(memory) = self
            .memory
            .as_mut()
            .filter(|_| sample.memory.get().is_none())
        {
            let read = match memory {
                Memory::V1(memory) => memory.read(buffer),
                Memory::V2(memory) => memory.read(buffer),
            };
            gone |= take(read.map(Some), &mut sample.memory, &mut self.memory);
        }
        if let Some(pids) = self.pids.as_mut().filter(|_| sample.pids.get().is_none()) {
            let read = pids.read(buffer);
            gone |= take(read.map(Some), &mut sample.pids, &mut self.pids);
        }
        if let Some(io) = self.io.as_mut().filter(|_| sample.io.get().is_none()) {
            let read = match io {
                Io::V1(io) => io.read(buffer),
                Io::V2(io) => io.read(buffer).map(Some),
            };
            gone |= take(read, &mut sample.io, &mut self.io);
        }
        gone
    }
}

/// The record that tells of a cgroup in this pass: memory's if that has read the same state, else its
/// own. A cgroup without one may have been made again: its place is looked for again.
fn find_record(
    group: &mut Option<Group>,
    memory: Option<&CgroupRecord>,
    walks: &mut Walks,
    controller: Controller,
) -> Option<CgroupRecord> {
    let group = group.as_mut()?;
    let serial = |record: &CgroupRecord| record.serials[controller as usize];
    let joined = memory.filter(|record| group.serial != 0 && serial(record) == group.serial);
    if let Some(record) = joined {
        return Some(*record);
    }
    let found = walks.find(group.place.as_mut()?);
    match &found {
        Some(record) => group.serial = serial(record),
        None => {
            group.place = None;
            group.serial = 0;
        }
    }
    found
}

/// How the unified tree's CPU time is split: the kernel scales what it has sampled to the exact sum,
/// and lets neither part run backwards (kernel/sched/cputime.c, cputime_adjust).
#[derive(Debug, Clone, Copy, Default)]
struct CpuSplit {
    user: u64,
    system: u64,
}

impl CpuSplit {
    fn adjust(&mut self, usage: u64, user: u64, system: u64) -> (u64, u64) {
        if usage < self.user.saturating_add(self.system) {
            return (self.user, self.system);
        }
        let scaled = match (user, system) {
            (_, 0) => 0,
            (0, _) => usage,
            _ => {
                let sum = u128::from(user) + u128::from(system);
                let scaled = u128::from(system) * u128::from(usage) / sum;
                u64::try_from(scaled).unwrap_or(usage)
            }
        };
        let mut system = scaled.max(self.system);
        let mut user = usage.saturating_sub(system);
        if user < self.user {
            user = self.user;
            system = usage - user;
        }
        (self.user, self.system) = (user, system);
        (user, system)
    }
}

fn cpu_counters(
    record: &CgroupRecord,
    quota: Option<&CgroupRecord>,
    split: &mut CpuSplit,
) -> Option<CpuCounters> {
    let usage = record.cpu_usage_ns;
    let (user, system) = if record.filled & filled::CPUACCT != 0 {
        (record.cpu_user_ns, record.cpu_system_ns)
    } else if record.filled & filled::CPU_BASE != 0 {
        split.adjust(usage, record.cpu_user_ns, record.cpu_system_ns)
    } else {
        return None;
    };
    Some(CpuCounters {
        usage_ns: Some(usage),
        user_ns: Some(user),
        system_ns: Some(system),
        periods: quota.map(|record| record.periods),
        throttled_periods: quota.map(|record| record.throttled_periods),
        throttled_ns: quota.map(|record| record.throttled_ns),
        pressure_some_ns: None,
    })
}

fn memory_counters(record: &CgroupRecord, unified: bool, counts_swap: bool) -> MemoryCounters {
    let [inactive_file, anon, file, shmem, swap, kernel] =
        record.stat_pages.map(|pages| Some(bytes(pages)));
    let limit = |pages| Some(cgroup_v1::limit(bytes(pages)));
    let swap_limit = limit(record.swap_limit_pages).filter(|_| counts_swap);
    let both = MemoryCounters {
        current_bytes: Some(bytes(record.memory_pages)),
        inactive_file_bytes: inactive_file,
        anon_bytes: anon,
        file_bytes: file,
        shmem_bytes: shmem,
        peak_bytes: Some(bytes(record.memory_peak_pages)),
        oom_kill_events: Some(record.oom_kill_events),
        swap_limit_bytes: swap_limit,
        ..MemoryCounters::default()
    };
    if unified {
        MemoryCounters {
            limit_bytes: limit(record.memory_limit_pages),
            swap_bytes: Some(bytes(record.swap_pages)).filter(|_| counts_swap),
            oom_events: Some(record.oom_events),
            max_events: Some(record.memory_max_events),
            kernel_bytes: kernel,
            ..both
        }
    } else {
        let swap_failures = if counts_swap { record.swap_failures } else { 0 };
        MemoryCounters {
            limit_bytes: limit(record.memory_least_limit_pages),
            swap_bytes: swap,
            max_events: Some(record.memory_failures.saturating_add(swap_failures)),
            ..both
        }
    }
}

/// The kernel's "no limit" of tasks is one more than the most there may be (kernel/cgroup/pids.c).
const NO_PIDS_LIMIT: u64 = 4 * 1024 * 1024 + 1;

/// Counted since the program was loaded, on top of what an earlier life of this process had counted.
fn io_counters(record: &CgroupRecord, before: &IoCounters) -> IoCounters {
    let sum = |now: u64, before: Option<u64>| Some(now.saturating_add(before.unwrap_or(0)));
    IoCounters {
        read_bytes: sum(record.io_read_bytes, before.read_bytes),
        write_bytes: sum(record.io_write_bytes, before.write_bytes),
        read_operations: sum(record.io_reads, before.read_operations),
        write_operations: sum(record.io_writes, before.write_operations),
        ..IoCounters::default()
    }
}

fn pids_counters(record: &CgroupRecord) -> PidsCounters {
    let limit = record.pids_limit;
    PidsCounters {
        current: Some(record.pids),
        limit: Some(if limit >= NO_PIDS_LIMIT {
            UNLIMITED
        } else {
            limit
        }),
        limit_events: (record.filled & filled::PIDS_EVENTS != 0)
            .then_some(record.pids_limit_events),
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

/// The container's view of its network: what the host's end sent, it received. A container on the
/// host's network has no counters of its own, and never the host's; one whose link can't be found
/// has none either.
fn network(row: &ContainerRow, links: &Links) -> Option<NetCounters> {
    if row.host_network || row.link_indexes.is_empty() {
        return None;
    }
    let mut sum = LinkCounters::default();
    for index in &row.link_indexes {
        let link = links.get(*index)?;
        sum.rx_bytes += link.rx_bytes;
        sum.rx_packets += link.rx_packets;
        sum.rx_errors += link.rx_errors;
        sum.rx_dropped += link.rx_dropped;
        sum.tx_bytes += link.tx_bytes;
        sum.tx_packets += link.tx_packets;
        sum.tx_errors += link.tx_errors;
        sum.tx_dropped += link.tx_dropped;
    }
    Some(NetCounters {
        rx_bytes: Some(sum.tx_bytes),
        rx_packets: Some(sum.tx_packets),
        rx_errors: Some(sum.tx_errors),
        rx_drops: Some(sum.tx_dropped),
        tx_bytes: Some(sum.rx_bytes),
        tx_packets: Some(sum.rx_packets),
        tx_errors: Some(sum.rx_errors),
        tx_drops: Some(sum.rx_dropped),
    })
}

/// Whether a path is a place of its own file system, so that its usage can be asked for at once.
pub fn is_own_file_system(path: &Path) -> bool {
    let Some(parent) = path.parent() else {
        return false;
    };
    match (rustix::fs::stat(path), rustix::fs::stat(parent)) {
        (Ok(own), Ok(parent)) => own.st_dev != parent.st_dev,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::ids::ContainerId;

    fn link(rx_bytes: u64, tx_bytes: u64) -> LinkCounters {
        LinkCounters {
            rx_bytes,
            tx_bytes,
            ..LinkCounters::default()
        }
    }

    fn links<const N: usize>(list: [(u32, LinkCounters); N]) -> Links {
        list.into_iter().collect()
    }

    fn row(links: &[u32]) -> ContainerRow {
        ContainerRow {
            link_indexes: links.to_vec(),
            ..ContainerRow::default()
        }
    }

    #[test]
    fn directions_are_swapped_and_links_summed() {
        let links = links([(3, link(10, 20)), (4, link(1, 2)), (5, link(99, 99))]);
        let net = network(&row(&[3, 4]), &links).unwrap();
        assert_eq!((net.rx_bytes, net.tx_bytes), (Some(22), Some(11)));
    }

    #[test]
    fn a_missing_link_means_no_numbers_rather_than_fewer() {
        let links = links([(3, link(10, 20))]);
        assert_eq!(network(&row(&[3, 4]), &links), None);
        assert_eq!(network(&row(&[]), &links), None);
    }

    /// The original reported the host's totals for every container.
    #[test]
    fn a_container_on_the_hosts_network_never_gets_the_hosts_totals() {
        let links = links([(1, link(10, 20))]);
        let mut row = row(&[1]);
        row.host_network = true;
        assert_eq!(network(&row, &links), None);
    }

    #[test]
    fn cpu_time_is_split_exactly_and_never_runs_backwards() {
        let mut split = CpuSplit::default();
        assert_eq!(split.adjust(100, 30, 10), (75, 25));
        // The sampled parts say less system time than before; none of it is taken back.
        let (user, system) = split.adjust(120, 119, 1);
        assert_eq!(user + system, 120);
        assert!(user >= 75 && system >= 25);
        assert_eq!(split.adjust(110, 1, 1), (user, system));
        assert_eq!(CpuSplit::default().adjust(7, 0, 0), (7, 0));
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
    }

    #[test]
    fn a_process_of_someone_else_is_not_taken_for_the_container() {
        // Our own process is real, and its cgroup does not carry this id.
        let row = ContainerRow {
            container_id: ContainerId([0xab; 32]),
            init_pid: std::process::id(),
            ..ContainerRow::default()
        };
        let facts = Facts::gather();
        let mut watched = Watched::new(row, IoCounters::default(), &facts, &Budget::new(100));
        let sample = watched.sample(&facts, &Budget::new(100), None, None, &mut Vec::new());
        assert_eq!(sample.cpu.source, Source::Absent);
        assert_eq!(sample.memory.source, Source::Absent);
    }
}
