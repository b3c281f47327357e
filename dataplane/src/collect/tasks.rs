//! Listing processes by a program in the kernel.
//!
//! In: a cgroup directory per container. Out: the processes in and below each, as `/proc` would tell
//! them, from one walk over all tasks that takes no lock and opens no file. Invariants: a walk is
//! believed only after it has told of this very process what `/proc` says; a container has a cap, and
//! what is beyond it is counted; what could not be read consistently is absent.
//!
//! Cost: `make bench-stats` (`processes_ms`).

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use aya::maps::{Map, MapError};
use aya::programs::{Iter, ProgramError};
use aya::{Btf, BtfError, Ebpf, EbpfError, EbpfLoader};
use ebpf::task_records::{TaskRecord, filled, hierarchy, tally, walk};
use shared::ids::ContainerId;
use shared::observed::{ProcessCounters, ProcessSample, Source};
use shared::procfs::tick_ns;

use super::cgroup_program::possible_cpus;
use super::hierarchies::{CgroupHierarchies, Hierarchy};
use super::process::{self, PER_CONTAINER};
use crate::sys::iterator::{self, SharedArray};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// The kernel tells nothing of its types.
    #[error("the kernel's type information can't be read (is CONFIG_DEBUG_INFO_BTF on?)")]
    Btf(#[source] BtfError),
    /// The object is refused.
    #[error("the task program can't be prepared (CAP_BPF and CAP_PERFMON are needed)")]
    Load(#[source] Box<EbpfError>),
    /// The program is refused.
    #[error("the kernel refuses the task program")]
    Program(#[source] ProgramError),
    /// Something of the object is not in it.
    #[error("the task object has no {0}")]
    Lacks(&'static str),
    /// A map can't be shared.
    #[error("the records of the task program can't be mapped")]
    Share(#[source] io::Error),
    /// The containers can't be told to the program.
    #[error("the task program can't be told which cgroups are containers")]
    Tell(#[source] MapError),
    /// The kernel has no task iterators.
    #[error("the kernel offers no walk over tasks")]
    Attach(#[source] io::Error),
    /// A walk failed.
    #[error("the walk over tasks fails")]
    Walk(#[source] io::Error),
    /// A walk ended before its end.
    #[error("the walk over tasks did not come to its end")]
    Unfinished,
    /// No hierarchy tells which container a task is in.
    #[error("no cgroup hierarchy to tell containers by is mounted")]
    NoHierarchy,
    /// What was read of this process is not what `/proc` says.
    #[error("the walk over tasks says otherwise than /proc of the {0} of this process")]
    Disagrees(&'static str),
}

/// The program, its maps, and what was told of each process.
#[derive(Debug)]
pub struct Tasks {
    /// Owns the program and the maps.
    object: Ebpf,
    link: OwnedFd,
    records: SharedArray,
    tallies: SharedArray,
    orders: SharedArray,
    mount: PathBuf,
    /// Numbers of the cgroups that the program knows.
    numbers: HashMap<u64, u32>,
    free: Vec<u32>,
    /// Times in user and kernel mode last told of a process, by pid and start.
    told: HashMap<(u32, u64), (u64, u64)>,
    tick_ns: u64,
}

/// The processes of one container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProcessList {
    /// Those that had room.
    pub list: Vec<ProcessSample>,
    /// Those that had none.
    pub left_out: u32,
}

/// Where containers are found, if anywhere.
pub fn mount(hierarchies: &CgroupHierarchies) -> Option<&Path> {
    chosen(hierarchies).map(|(_, mount)| mount)
}

/// The hierarchy in which containers are found first (as `Watched::directory` has it).
fn chosen(hierarchies: &CgroupHierarchies) -> Option<(u32, &Path)> {
    let by = [
        (&hierarchies.pids, hierarchy::PIDS),
        (&hierarchies.cpu, hierarchy::CPUACCT),
        (&hierarchies.memory, hierarchy::MEMORY),
    ];
    by.into_iter().find_map(|(place, number)| {
        Some(match place.as_ref()? {
            Hierarchy::V1(mount) => (number, mount.as_path()),
            Hierarchy::V2(mount) => (hierarchy::UNIFIED, mount.as_path()),
        })
    })
}

impl Tasks {
    /// Loads the program, with room for so many containers and processes, and tries it on this
    /// process.
    ///
    /// # Errors
    /// The step that failed; files must do then.
    pub fn start(
        hierarchies: &CgroupHierarchies,
        containers: u32,
        processes: u32,
    ) -> Result<Self, TasksError> {
        let (hierarchy, mount) = chosen(hierarchies).ok_or(TasksError::NoHierarchy)?;
        let btf = Btf::from_sys_fs().map_err(TasksError::Btf)?;
        let containers = containers.max(1);
        let capacity = processes.max(1);
        let cpus = possible_cpus();
        let per_container = u32::try_from(PER_CONTAINER).unwrap_or(u32::MAX);
        let mut object = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("cpus", &cpus, true)
            .override_global("capacity", &capacity, true)
            .override_global("hierarchy", &hierarchy, true)
            .override_global("per_container", &per_container, true)
            .map_max_entries("containers", containers)
            .map_max_entries("tallies", containers)
            .map_max_entries("tasks", capacity)
            .load(ebpf::task_stats())
            .map_err(|err| TasksError::Load(Box::new(err)))?;
        let program: &mut Iter = object
            .program_mut("list_processes")
            .ok_or(TasksError::Lacks("program"))?
            .try_into()
            .map_err(TasksError::Program)?;
        program.load("task", &btf).map_err(TasksError::Program)?;
        let program = program.fd().map_err(TasksError::Program)?;
        let link = iterator::task_iterator(program).map_err(TasksError::Attach)?;
        let words = |count: u32, each: usize| usize::try_from(count).unwrap_or(0) * each;
        let mut tasks = Self {
            records: share(&object, "tasks", words(capacity, TaskRecord::WORDS))?,
            tallies: share(&object, "tallies", words(containers, tally::WORDS))?,
            orders: share(&object, "walk", walk::WORDS)?,
            object,
            link,
            mount: mount.to_owned(),
            numbers: HashMap::new(),
            free: (0..containers).rev().collect(),
            told: HashMap::new(),
            tick_ns: tick_ns(),
        };
        tasks.try_on_this_process()?;
        Ok(tasks)
    }

    /// The mount of the hierarchy by which containers are found.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The processes of these containers, in the same order.
    ///
    /// # Errors
    /// The walk failed; nothing was listed.
    pub fn list(
        &mut self,
        wanted: &[(ContainerId, PathBuf)],
    ) -> Result<Vec<(ContainerId, ProcessList)>, TasksError> {
        let ids: Vec<Option<u64>> = wanted
            .iter()
            .map(|(_, directory)| Some(std::fs::metadata(directory).ok()?.ino()))
            .collect();
        self.tell(&ids)?;
        let count = self.walk(0)?;
        let mut found: Vec<(ContainerId, ProcessList)> = wanted
            .iter()
            .map(|(id, _)| (*id, ProcessList::default()))
            .collect();
        let mut places = HashMap::new();
        for (place, id) in ids.iter().enumerate() {
            if let Some(number) = id.as_ref().and_then(|id| self.numbers.get(id)) {
                places.insert(u64::from(*number), place);
            }
        }
        let mut told = HashMap::with_capacity(self.told.len());
        for place in 0..count {
            let Some(record) = TaskRecord::read(self.records.words(), place) else {
                break;
            };
            let Some((id, of)) = places
                .get(&record.container)
                .and_then(|place| found.get_mut(*place))
            else {
                continue;
            };
            let mut sample = self.sample(&record, &mut told);
            sample.container_id = *id;
            of.list.push(sample);
        }
        self.told = told;
        for (number, place) in places {
            let at = usize::try_from(number).unwrap_or(0) * tally::WORDS + tally::SEEN;
            let seen = self
                .tallies
                .words()
                .get(at)
                .map_or(0, |it| it.load(Relaxed));
            if let Some((_, of)) = found.get_mut(place) {
                let listed = of.list.len() as u64;
                of.left_out = u32::try_from(seen.saturating_sub(listed)).unwrap_or(u32::MAX);
            }
        }
        Ok(found)
    }

    /// Tells the program which cgroups are containers, as far as that has changed.
    fn tell(&mut self, ids: &[Option<u64>]) -> Result<(), TasksError> {
        let gone: Vec<u64> = {
            let wanted: HashSet<u64> = ids.iter().copied().flatten().collect();
            let known = self.numbers.keys().copied();
            known.filter(|id| !wanted.contains(id)).collect()
        };
        let map = self
            .object
            .map_mut("containers")
            .ok_or(TasksError::Lacks("map of containers"))?;
        let mut map = aya::maps::HashMap::<_, u64, u32>::try_from(map).map_err(TasksError::Tell)?;
        for id in gone {
            map.remove(&id).map_err(TasksError::Tell)?;
            self.free.extend(self.numbers.remove(&id));
        }
        for id in ids.iter().copied().flatten() {
            if self.numbers.contains_key(&id) {
                continue;
            }
            // There are never more containers than their table has rows.
            let Some(number) = self.free.pop() else {
                break;
            };
            map.insert(id, number, 0).map_err(TasksError::Tell)?;
            self.numbers.insert(id, number);
        }
        Ok(())
    }

    /// Walks; answers how many records it filled.
    fn walk(&mut self, only: u32) -> Result<usize, TasksError> {
        let orders = self.orders.words();
        for word in self.tallies.words() {
            word.store(0, Relaxed);
        }
        let finished = read(orders, walk::FINISHED);
        set(orders, walk::ONLY, u64::from(only));
        set(orders, walk::COUNT, 0);
        iterator::run_iterator(&self.link).map_err(TasksError::Walk)?;
        if read(orders, walk::FINISHED) == finished {
            return Err(TasksError::Unfinished);
        }
        Ok(usize::try_from(read(orders, walk::COUNT)).unwrap_or(usize::MAX))
    }

    fn sample(
        &self,
        record: &TaskRecord,
        told: &mut HashMap<(u32, u64), (u64, u64)>,
    ) -> ProcessSample {
        let has = |group| record.filled & group != 0;
        let key = (record.pid, record.start_ns);
        let before = self.told.get(&key).copied();
        let times = if has(filled::TIMES) {
            let by_kernel = (record.told_user_ns, record.told_system_ns);
            let last = later(by_kernel, before.unwrap_or_default());
            Some(split(
                record.runtime_ns,
                record.user_ns,
                record.system_ns,
                last,
            ))
        } else {
            None
        };
        told.extend(times.or(before).map(|times| (key, times)));
        let length = record.name.iter().position(|byte| *byte == 0);
        let name = record.name.get(..length.unwrap_or(record.name.len()));
        ProcessSample {
            pid: record.pid,
            container_pid: record.container_pid,
            parent_pid: record.parent_pid,
            threads: record.threads,
            state: state_letter(record.state, record.exit_state),
            name: String::from_utf8_lossy(name.unwrap_or_default()).into_owned(),
            start_ticks: record.start_ns / self.tick_ns,
            source: Source::Bpf,
            counters: ProcessCounters {
                user_ns: times.map(|(user, _)| user),
                system_ns: times.map(|(_, system)| system),
                rss_bytes: has(filled::RESIDENT)
                    .then(|| super::cgroup_program::bytes(record.resident_pages)),
                read_bytes: has(filled::IO).then_some(record.read_bytes),
                write_bytes: has(filled::IO).then_some(record.write_bytes),
                ..ProcessCounters::default()
            },
            ..ProcessSample::default()
        }
    }

    /// Compares what a walk says of this process with what `/proc` says right before and after.
    fn try_on_this_process(&mut self) -> Result<(), TasksError> {
        let own = std::process::id();
        let mut differs = "presence";
        // Threads begin and end meanwhile.
        for _ in 0..5 {
            let before = process::read(own, self.tick_ns);
            let count = self.walk(own)?;
            let after = process::read(own, self.tick_ns);
            let record = TaskRecord::read(self.records.words(), 0).filter(|_| count == 1);
            let (Some(before), Some(record), Some(after)) = (before, record, after) else {
                continue;
            };
            let sample = self.sample(&record, &mut HashMap::new());
            match disagreement(&sample, &before, &after, own_resident(), self.tick_ns) {
                None => return Ok(()),
                Some(what) => differs = what,
            }
        }
        Err(TasksError::Disagrees(differs))
    }
}

/// Resident memory of this process as its page tables have it: the counters of some kernels lag by
/// what each CPU has not added yet.
fn own_resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    let kib: u64 = kib.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib.saturating_mul(1024))
}

/// What of a process the walk says otherwise than files read before and after it.
fn disagreement(
    ours: &ProcessSample,
    before: &ProcessSample,
    after: &ProcessSample,
    resident: Option<u64>,
    tick_ns: u64,
) -> Option<&'static str> {
    let within = |pick: fn(&ProcessCounters) -> Option<u64>, slack: u64| {
        match (
            pick(&before.counters),
            pick(&ours.counters),
            pick(&after.counters),
        ) {
            (Some(low), Some(found), Some(high)) => {
                found.saturating_add(slack) >= low && found <= high.saturating_add(slack)
            }
            // Not told by this kernel.
            (None, None, None) => true,
            _ => false,
        }
    };
    let total = |it: &ProcessCounters| Some(it.user_ns?.saturating_add(it.system_ns?));
    let checks = [
        ("pid", ours.pid == before.pid),
        ("pid inside", ours.container_pid == before.container_pid),
        ("parent", ours.parent_pid == before.parent_pid),
        ("threads", ours.threads == before.threads),
        ("name", ours.name == before.name),
        (
            "state",
            ours.state == b'R' || ours.state == b'S' || ours.state == b'D',
        ),
        ("start", ours.start_ticks == before.start_ticks),
        // A file rounds each of the two down.
        ("times", within(total, 2 * tick_ns)),
        ("bytes read", within(|it| it.read_bytes, 0)),
        ("bytes written", within(|it| it.write_bytes, 0)),
        (
            "resident memory",
            match (
                ours.counters.rss_bytes,
                resident.or(after.counters.rss_bytes),
            ) {
                (Some(ours), Some(file)) => ours.abs_diff(file) <= file / 4 + (1 << 20),
                _ => false,
            },
        ),
    ];
    checks
        .into_iter()
        .find(|(_, fine)| !fine)
        .map(|(what, _)| what)
}

/// The two parts of a time, of which the later total is the later one.
fn later(one: (u64, u64), other: (u64, u64)) -> (u64, u64) {
    let total = |(user, system): (u64, u64)| user.saturating_add(system);
    if total(other) > total(one) {
        other
    } else {
        one
    }
}

/// What `/proc` tells of a time that the scheduler knows exactly and whose parts were found by ticks
/// (`cputime_adjust` in kernel/sched/cputime.c): the parts are in proportion, add up to the whole, and
/// never go back behind what was told last. Answers user and system time.
fn split(runtime: u64, user: u64, system: u64, last: (u64, u64)) -> (u64, u64) {
    if last.0.saturating_add(last.1) >= runtime {
        return last;
    }
    let share = match (user, system) {
        (_, 0) => 0,
        (0, _) => runtime,
        (user, system) => {
            let part = u128::from(system) * u128::from(runtime);
            let part = part / (u128::from(user) + u128::from(system));
            u64::try_from(part).unwrap_or(u64::MAX).min(runtime)
        }
    };
    let mut in_kernel = share.max(last.1);
    let mut in_user = runtime.saturating_sub(in_kernel);
    if in_user < last.0 {
        in_user = last.0;
        in_kernel = runtime.saturating_sub(in_user);
    }
    (in_user, in_kernel)
}

/// The letter that `/proc` has for a state (`task_state_array` in fs/proc/array.c; the bits are those
/// of linux/sched.h).
fn state_letter(state: u32, exit_state: u32) -> u8 {
    const LETTERS: &[u8; 8] = b"RSDTtXZP";
    const REPORTED: u32 = 0x7f;
    const IDLE: u32 = 0x402;
    const WAITS_FOR_LOCK_OR_FROZEN: u32 = 0x9000;
    if state & IDLE == IDLE {
        return b'I';
    }
    if state & WAITS_FOR_LOCK_OR_FROZEN != 0 {
        return b'D';
    }
    let bits = (state | exit_state) & REPORTED;
    let place = (u32::BITS - bits.leading_zeros()) as usize;
    LETTERS.get(place).copied().unwrap_or(b'R')
}

fn share(object: &Ebpf, name: &'static str, words: usize) -> Result<SharedArray, TasksError> {
    match object.map(name) {
        Some(Map::Array(map)) => SharedArray::new(map.fd(), words).map_err(TasksError::Share),
        _ => Err(TasksError::Lacks(name)),
    }
}

fn read(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Relaxed))
}

fn set(words: &[AtomicU64], at: usize, value: u64) {
    if let Some(word) = words.get(at) {
        word.store(value, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_time_add_up_and_never_go_back() {
        // Without ticks all of it is the user's; without ticks in user mode, the kernel's.
        assert_eq!(split(100, 0, 0, (0, 0)), (100, 0));
        assert_eq!(split(100, 0, 7, (0, 0)), (0, 100));
        assert_eq!(split(100, 30, 10, (0, 0)), (75, 25));
        // Once told, a part stays, though the proportion has changed.
        assert_eq!(split(100, 10, 30, (60, 20)), (60, 40));
        assert_eq!(split(100, 30, 10, (20, 60)), (40, 60));
        assert_eq!(split(70, 1, 1, (60, 20)), (60, 20), "behind what was told");
        let most = split(u64::MAX, u64::MAX / 2, u64::MAX / 2, (0, 0));
        assert_eq!(most.0 + most.1, u64::MAX);
        assert_eq!(later((5, 5), (1, 8)), (5, 5));
        assert_eq!(later((1, 8), (5, 5)), (5, 5));
    }

    #[test]
    fn states_have_the_letters_of_proc() {
        let letters = [
            (0, 0, b'R'),
            (1, 0, b'S'),
            (2, 0, b'D'),
            // TASK_KILLABLE, as a parent after vfork has it.
            (0x102, 0, b'D'),
            (4, 0, b'T'),
            (8, 0, b't'),
            (0x80, 0x10, b'X'),
            (0x80, 0x20, b'Z'),
            (0x40, 0, b'P'),
            (0x402, 0, b'I'),
            (0x8000, 0, b'D'),
        ];
        for (state, exit_state, letter) in letters {
            assert_eq!(state_letter(state, exit_state), letter, "{state:#x}");
        }
    }

    fn own() -> ProcessSample {
        process::read(std::process::id(), tick_ns()).expect("this process")
    }

    #[test]
    fn a_walk_that_says_otherwise_than_proc_is_not_believed() {
        let mut fine = own();
        fine.state = b'R';
        let rss = fine.counters.rss_bytes;
        assert_eq!(disagreement(&fine, &fine, &fine, rss, 1), None);
        type Change = fn(&mut ProcessSample);
        let changes: [(&str, Change); 10] = [
            ("pid", |it| it.pid += 1),
            ("pid inside", |it| it.container_pid += 1),
            ("parent", |it| it.parent_pid += 1),
            ("threads", |it| it.threads = 0),
            ("name", |it| it.name.clear()),
            ("state", |it| it.state = b'P'),
            ("start", |it| it.start_ticks += 1),
            ("times", |it| it.counters.user_ns = Some(u64::MAX)),
            ("bytes read", |it| it.counters.read_bytes = Some(u64::MAX)),
            ("resident memory", |it| it.counters.rss_bytes = Some(0)),
        ];
        for (what, change) in changes {
            let mut wrong = fine.clone();
            change(&mut wrong);
            assert_eq!(disagreement(&wrong, &fine, &fine, rss, 1), Some(what));
        }
    }

    fn tasks(containers: u32, processes: u32) -> Option<(Tasks, PathBuf)> {
        if !rustix::process::geteuid().is_root() {
            crate::skip::needs("loading programs into the kernel needs root");
            return None;
        }
        let hierarchies = CgroupHierarchies::gather();
        let tasks =
            Tasks::start(&hierarchies, containers, processes).expect("this kernel has iterators");
        let root = tasks.mount().to_owned();
        Some((tasks, root))
    }

    fn pids() -> Vec<u32> {
        let entries = std::fs::read_dir("/proc").expect("/proc").flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    /// What a walk and the files say differently of a process that was read before and after. The
    /// process may have done it meanwhile.
    fn difference(
        [before, sample, after]: [&ProcessSample; 3],
        tick_ns: u64,
    ) -> Option<&'static str> {
        let same = |pick: fn(&ProcessSample) -> u64| {
            pick(before) != pick(after) || pick(sample) == pick(before)
        };
        let counters = |it: &ProcessSample| {
            let it = it.counters;
            [it.user_ns, it.system_ns, it.read_bytes, it.write_bytes]
        };
        let within = |at: usize, slack| {
            let [low, found, high] = [before, sample, after].map(|it| counters(it)[at]);
            let (Some(low), Some(high)) = (low, high) else {
                return true;
            };
            found.is_some_and(|found| found >= low && found < high + slack)
        };
        // Of a worker of the kernel's own a file tells more than its name.
        let named = before.name != after.name || before.name.starts_with(&sample.name);
        let checks = [
            ("pid in its container", same(|it| it.container_pid.into())),
            ("parent", same(|it| it.parent_pid.into())),
            ("threads", same(|it| it.threads.into())),
            ("name", named),
            ("user time", within(0, tick_ns)),
            ("system time", within(1, tick_ns)),
            ("read", within(2, 1)),
            ("written", within(3, 1)),
        ];
        let wrong = checks.into_iter().find(|(_, right)| !right);
        wrong.map(|(what, _)| what)
    }

    /// All processes of this host that have not ended, as if the root were a container.
    #[test]
    fn a_walk_tells_of_living_processes_what_proc_tells() {
        let Some((mut tasks, root)) = tasks(4, 16_384) else {
            return;
        };
        let id = ContainerId([7; 32]);
        let tick_ns = tasks.tick_ns;
        let all = || -> HashMap<u32, ProcessSample> {
            let read = |pid| Some((pid, process::read(pid, tick_ns)?));
            pids().into_iter().filter_map(read).collect()
        };
        let mut round = || {
            let before = all();
            let found = tasks.list(&[(id, root.clone())]).expect("a walk");
            let after = all();
            let [(of, found)] = found.as_slice() else {
                panic!("one container was asked for");
            };
            assert_eq!(*of, id);
            let ours = &found.list;
            let living = |it: &&ProcessSample| !matches!(it.state, b'Z' | b'X');
            let count = ours.len() + found.left_out as usize;
            let (low, high) = (
                before.values().filter(living).count(),
                after.values().filter(living).count(),
            );
            // Others come and go meanwhile.
            assert!(
                count + 20 >= low.min(high) && count <= low.max(high) + 20,
                "{low} {count} {high}"
            );
            assert!(ours.len() == PER_CONTAINER || found.left_out == 0);
            let own = ours.iter().any(|it| it.pid == std::process::id());
            assert!(own || found.left_out > 0, "this process is missing");
            let (mut compared, mut wrong) = (0, HashMap::new());
            for sample in ours {
                let Some((before, after)) = before.get(&sample.pid).zip(after.get(&sample.pid))
                else {
                    continue;
                };
                compared += 1;
                assert_eq!(sample.source, Source::Bpf);
                assert_eq!(
                    sample.start_ticks, before.start_ticks,
                    "{sample:?} {before:?}"
                );
                if let Some(what) = difference([before, sample, after], tick_ns) {
                    let told = format!("{what}: {sample:?}, the files: {before:?} {after:?}");
                    wrong.insert(sample.pid, told);
                }
            }
            assert!(compared >= 2, "only {compared} processes were compared");
            wrong
        };
        // Threads begin and end between the readings, and files divide the time of a busy process
        // anew each time: what is wrong is wrong in each round.
        let mut wrong = round();
        for _ in 0..4 {
            let again = round();
            wrong.retain(|pid, _| again.contains_key(pid));
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    /// Memory, and room for fewer processes than there are.
    #[test]
    fn resident_memory_is_that_of_the_page_tables_and_what_has_no_room_is_counted() {
        let Some((mut tasks, root)) = tasks(4, 1) else {
            return;
        };
        let block = vec![1_u8; 64 << 20];
        assert_eq!(block.len(), 64 << 20);
        // Kernels that keep one counter (before 6.2) let each thread count apart what its last 64 faults
        // brought, up to 16 pages each; their files say the same. Later ones say less in the file than
        // there is. Other tests of this process take and give back memory meanwhile.
        let (slack, mut seen) = (1_u64 << 20, Vec::new());
        let file = || process::read(std::process::id(), 1)?.counters.rss_bytes;
        let near = (0..200).any(|_| {
            let before = (own_resident().expect("page tables"), file());
            assert_eq!(tasks.walk(std::process::id()).expect("a walk"), 1);
            let after = (own_resident().expect("page tables"), file());
            let record = TaskRecord::read(tasks.records.words(), 0).expect("a record");
            let ours = super::super::cgroup_program::bytes(record.resident_pages);
            seen = vec![before, (ours, None), after];
            let mapped = before.0.abs_diff(after.0) <= slack && ours.abs_diff(after.0) <= slack;
            mapped || [before.1, after.1] == [Some(ours); 2] && ours > 64 << 20
        });
        assert!(near, "{seen:?}");
        let nowhere = (ContainerId([9; 32]), root.join("not-there"));
        let found = tasks.list(&[nowhere, (ContainerId([8; 32]), root)]);
        let found = found.expect("a walk");
        assert_eq!(
            found[0].1,
            ProcessList::default(),
            "no cgroup, no processes"
        );
        assert_eq!(found[1].1.list.len(), 1);
        assert!(found[1].1.left_out >= 1);
        // Those no longer wanted leave their numbers to others.
        assert_eq!(tasks.list(&[]).expect("a walk"), []);
        assert_eq!((tasks.numbers.len(), tasks.free.len()), (0, 4));
    }
}
