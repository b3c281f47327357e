//! Reading cgroups by a program in the kernel.
//!
//! In: directories of containers' cgroups. Out: after each pass, one record per container. Where the
//! kernel keeps the states of a cgroup's controllers is found once, when the cgroup is first asked for;
//! after that a pass is one run of a program over these addresses, without a walk and without a system
//! call per container. Invariants: a record tells which states were there in this pass; memory
//! statistics are believed only where they have been compared with the kernel's own file.
//!
//! Cost: `make bench-stats`.

use std::borrow::Cow;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use aya::maps::Map;
use aya::programs::{BtfTracePoint, Iter};
use aya::{Btf, BtfError, Ebpf, EbpfError, EbpfLoader};
use aya_obj::btf::BtfKind;
use ebpf::cgroup_records::{
    CONTROLLERS, CgroupRecord, MOST_CPUS, MOST_STATS, STAT_ITEMS, filled, target, walk,
};
use ebpf::link_records::{LinkRecord, link_layout, link_target};
use rustix::fs::{Mode, OFlags};

use super::file::{Budget, CachedFile, keyed};
use super::hierarchies::{CgroupHierarchies, Hierarchy};
use super::veths::Veths;
use crate::sys::iterator::{self, SharedArray};

/// Targets beyond those of containers: some that are gone may not be given back yet.
const OTHERS: u32 = 64;
/// Entries for the block devices of cgroups, per container: itself, what is around and below it.
const BLOCK_ENTRIES: u32 = 20;
/// Links per container that there is room for.
const LINKS: u32 = 2;
/// Directories whose statistics are brought up to date before each pass; containers of further ones are
/// read by files.
const MOST_SETTLED: usize = 64;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupProgramError {
    /// The kernel tells nothing of its types.
    #[error("the kernel's type information can't be read (is CONFIG_DEBUG_INFO_BTF on?)")]
    Btf(#[source] BtfError),
    /// The object is refused.
    #[error("the cgroup program can't be prepared (CAP_BPF and CAP_PERFMON are needed)")]
    Load(#[source] Box<EbpfError>),
    /// The program is refused.
    #[error("the kernel refuses the cgroup program")]
    Program(#[source] aya::programs::ProgramError),
    /// Something of the object is not in it.
    #[error("the cgroup object has no {0}")]
    Lacks(&'static str),
    /// A map can't be shared.
    #[error("the records of the cgroup program can't be mapped")]
    Map(#[source] io::Error),
    /// The kernel has no cgroup iterators.
    #[error("the kernel offers no iterator over cgroups")]
    Attach(#[source] io::Error),
    /// A trial failed.
    #[error("reading a root by the cgroup program fails")]
    Trial(#[source] io::Error),
    /// The kernel marks living cgroups in another way.
    #[error("the cgroup program takes a root for one that is gone")]
    Marks,
}

/// What a directory is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The unified tree: all controllers are on it.
    Unified,
    /// `memory` of version 1.
    Memory,
    /// Another hierarchy of version 1.
    Other,
}

/// Where the kernel keeps what it knows of a cgroup.
#[derive(Debug, Clone)]
pub struct CgroupTarget {
    words: [u64; target::WORDS],
    /// Brought up to date before each pass for as long as this is kept.
    settled: Arc<Path>,
}

impl CgroupTarget {
    /// The directory whose statistics are brought up to date.
    pub fn settled(&self) -> Arc<Path> {
        Arc::clone(&self.settled)
    }
}

/// Place of one container among the targets and records; given back when dropped.
#[derive(Debug)]
pub struct Slot {
    place: usize,
    free: Arc<Mutex<Vec<usize>>>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(self.place);
    }
}

/// A directory whose files are read before the pass: reading makes the kernel add up what its CPUs have counted
/// apart, for the cgroup and all below it.
#[derive(Debug)]
struct Settled {
    path: Arc<Path>,
    files: Vec<CachedFile>,
}

/// The program and what it reads.
#[derive(Debug)]
pub struct CgroupProgram {
    /// Owns the programs and the maps.
    object: Ebpf,
    targets: SharedArray,
    records: SharedArray,
    orders: SharedArray,
    /// Runs the reading program.
    reader: OwnedFd,
    free: Arc<Mutex<Vec<usize>>>,
    /// Slots ever given away: those to be read.
    used: usize,
    capacity: usize,
    settled: Vec<Settled>,
    budget: Arc<Budget>,
    counts_block_io: bool,
    /// The program was taken with its part for links.
    #[cfg(test)]
    reads_links: bool,
    veths: Veths,
}

/// Pages to bytes, but for "no limit", which stays it.
pub fn bytes(pages: u64) -> u64 {
    pages.saturating_mul(rustix::param::page_size() as u64)
}

fn word(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Relaxed))
}

fn set(words: &[AtomicU64], at: usize, value: u64) {
    if let Some(word) = words.get(at) {
        word.store(value, Relaxed);
    }
}

impl CgroupProgram {
    /// Loads the program and tries it.
    ///
    /// # Errors
    /// The step that failed; files must do then.
    pub fn start(
        hierarchies: &CgroupHierarchies,
        budget: &Arc<Budget>,
        containers: u32,
    ) -> Result<Self, CgroupProgramError> {
        let btf = Btf::from_sys_fs().map_err(CgroupProgramError::Btf)?;
        let capacity = containers.saturating_add(OTHERS);
        let cast = btf.id_by_type_name_kind("bpf_rdonly_cast", BtfKind::Func);
        let plainly = cast.ok().map(Some);
        // Best first: each is refused by kernels that lack something.
        let ways = plainly.into_iter().chain([None]);
        let ways = ways.flat_map(|cast| [(cast, true), (cast, false)]);
        let mut failed = CgroupProgramError::Lacks("way to be read");
        for (cast, links) in ways {
            match Self::by(
                cast,
                links,
                &btf,
                hierarchies,
                budget,
                capacity,
                possible_cpus(),
            ) {
                Ok(program) => return Ok(program),
                Err(err) => {
                    tracing::info!(
                        plainly = cast.is_some(),
                        links,
                        err = &err as &dyn std::error::Error,
                        "the cgroup program can't be had so, which costs more"
                    );
                    failed = err;
                }
            }
        }
        Err(failed)
    }

    /// Reads by plain loads when given the number of the kernel's function for it; with links if they are to
    /// be read; adds up the parts of so many CPUs.
    fn by(
        cast: Option<u32>,
        links: bool,
        btf: &Btf,
        hierarchies: &CgroupHierarchies,
        budget: &Arc<Budget>,
        capacity: u32,
        cpus: u32,
    ) -> Result<Self, CgroupProgramError> {
        let reader = match cast {
            Some(_) => "read_targets_plainly",
            None => "read_targets",
        };
        let mut object = load(btf, capacity, cast, links, reader, cpus)?;
        // In version 2 the kernel's own counters are complete.
        let counts_block_io = matches!(hierarchies.io, Some(Hierarchy::V1(_)))
            && match count_block_io(&mut object, btf) {
                Ok(()) => true,
                Err(err) => {
                    tracing::warn!(
                        err = &err as &dyn std::error::Error,
                        "block devices are counted by the kernel's files, which may miss them"
                    );
                    false
                }
            };
        let room = usize::try_from(capacity.saturating_mul(LINKS)).unwrap_or(0);
        let capacity = usize::try_from(capacity).unwrap_or(0);
        let veths = Veths::new(
            shared(&object, "link_targets", link_target::WORDS * room)?,
            shared(&object, "link_records", LinkRecord::WORDS * room)?,
            shared(&object, "link_layout", link_layout::WORDS)?,
            room,
        );
        let hierarchy = hierarchies.memory.as_ref().or(hierarchies.cpu.as_ref());
        let root = hierarchy.ok_or(CgroupProgramError::Lacks("hierarchy to read"))?;
        let mut program = Self {
            targets: shared(&object, "targets", target::WORDS * capacity)?,
            records: shared(&object, "records", CgroupRecord::WORDS * capacity)?,
            orders: shared(&object, "walk", walk::WORDS)?,
            reader: attach(&object, reader, root.mount()).map_err(CgroupProgramError::Attach)?,
            object,
            free: Arc::default(),
            used: 0,
            capacity,
            settled: Vec::new(),
            budget: Arc::clone(budget),
            counts_block_io,
            #[cfg(test)]
            reads_links: links,
            veths,
        };
        program.learn(root)?;
        Ok(program)
    }

    /// Finds out where the kernel keeps which memory statistic, by comparing the root cgroup's with
    /// its file. Where nothing fits, they are read from files.
    fn learn(&mut self, hierarchy: &Hierarchy) -> Result<(), CgroupProgramError> {
        let root = hierarchy.mount();
        let unified = matches!(hierarchy, Hierarchy::V2(_));
        let slot = self.slot().ok_or(CgroupProgramError::Lacks("room"))?;
        let words = self
            .look_up(root, unified)
            .map_err(CgroupProgramError::Trial)?;
        for controller in 0..CONTROLLERS {
            self.put(&slot, controller, &words);
        }
        let mut believed = false;
        for candidate in candidate_layouts(self.orders.words()) {
            self.expect_layout(&candidate);
            let text = std::fs::read_to_string(root.join("memory.stat")).unwrap_or_default();
            self.read(false).map_err(CgroupProgramError::Trial)?;
            let record = self.record(&slot).unwrap_or_default();
            if record.alive == 0 {
                return Err(CgroupProgramError::Marks);
            }
            if record.filled & filled::MEMORY_STAT != 0 && agrees(&text, unified, &record) {
                believed = true;
                break;
            }
        }
        if !believed {
            self.expect_layout(&[MOST_STATS; STAT_ITEMS]);
        }
        tracing::info!(
            memory_statistics = if believed { "bpf" } else { "file" },
            "cgroups are read by a kernel program"
        );
        Ok(())
    }

    fn expect_layout(&self, layout: &[u64; STAT_ITEMS]) {
        for (item, index) in layout.iter().enumerate() {
            set(self.orders.words(), walk::STAT_INDEX + item, *index);
        }
    }

    /// Whether the memory statistics in the records may be believed.
    pub fn knows_statistics(&self) -> bool {
        word(self.orders.words(), walk::STAT_INDEX) < MOST_STATS
    }

    /// Whether block devices are known here: the kernel counts them in version 2, programs do in version 1 where they
    /// are attached.
    pub fn knows_block_io(&self, kind: Kind) -> bool {
        kind == Kind::Unified || self.counts_block_io
    }

    /// A place for a container; `None` when there is no room.
    pub fn slot(&mut self) -> Option<Slot> {
        let given_back = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let place = match given_back {
            Some(place) => place,
            None if self.used < self.capacity => {
                self.used += 1;
                self.used - 1
            }
            None => return None,
        };
        let words = self.targets.words().iter();
        for word in words.skip(place * target::WORDS).take(target::WORDS) {
            word.store(0, Relaxed);
        }
        Some(Slot {
            place,
            free: Arc::clone(&self.free),
        })
    }

    /// Looks a cgroup up. `None` when it is not there, or can't be read this way.
    pub fn find(&mut self, directory: &Path, kind: Kind) -> Option<CgroupTarget> {
        // Once for all siblings, by their parent. But reading `cpu.stat` and `io.stat` of the unified root, which
        // alone has no `cgroup.type`, brings nothing below it up to date.
        let parent = directory.parent()?;
        let path = match kind {
            Kind::Unified if !parent.join("cgroup.type").exists() => directory,
            _ => parent,
        };
        let known = self.settled.iter().find(|it| *it.path == *path);
        let known = known.map(|it| Arc::clone(&it.path));
        let settles = kind != Kind::Other;
        if settles && known.is_none() && self.settled.len() >= MOST_SETTLED {
            return None;
        }
        let words = self
            .look_up(directory, kind == Kind::Unified)
            .inspect_err(|err| {
                tracing::debug!(%err, directory = %directory.display(), "a cgroup can't be found");
            })
            .ok()?;
        let settled = known.unwrap_or_else(|| self.settle(path.into(), kind));
        Some(CgroupTarget { words, settled })
    }

    fn settle(&mut self, path: Arc<Path>, kind: Kind) -> Arc<Path> {
        let names = match kind {
            // Newer kernels keep what is to be added up apart by controller.
            Kind::Unified => &["cpu.stat", "memory.stat", "io.stat"][..],
            Kind::Memory => &["memory.stat"],
            Kind::Other => return path,
        };
        self.settled.push(Settled {
            files: names
                .iter()
                .map(|name| CachedFile::new(path.join(name), &self.budget))
                .collect(),
            path: Arc::clone(&path),
        });
        path
    }

    fn look_up(&self, directory: &Path, unified: bool) -> io::Result<[u64; target::WORDS]> {
        let orders = self.orders.words();
        for word in orders.iter().skip(walk::FOUND).take(target::WORDS) {
            word.store(0, Relaxed);
        }
        set(orders, walk::HAS_FOUND, 0);
        set(orders, walk::UNIFIED, u64::from(unified));
        iterator::run_iterator(attach(&self.object, "find_cgroup", directory)?)?;
        if word(orders, walk::HAS_FOUND) == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(std::array::from_fn(|at| word(orders, walk::FOUND + at)))
    }

    /// Has a controller of a container read from now on, as it was found. False when the cgroup does
    /// not have it.
    pub fn know(&mut self, slot: &Slot, controller: usize, found: &CgroupTarget) -> bool {
        self.put(slot, controller, &found.words);
        found.words.get(target::STATES + controller) > Some(&0)
    }

    fn put(&self, slot: &Slot, controller: usize, words: &[u64; target::WORDS]) {
        let Some(own) = self.targets.words().get(slot.place * target::WORDS..) else {
            return;
        };
        let more: &[usize] = match controller {
            0 => &[target::UNIFIED, target::CPU, target::CPU + 1],
            2 => &[target::STATISTICS],
            3 => &[target::IO_MARK, target::IO_UNIFIED],
            _ => &[],
        };
        let places = [target::STATES + controller, target::SERIALS + controller];
        for at in places.iter().chain(more) {
            set(own, *at, words.get(*at).copied().unwrap_or(0));
        }
    }

    /// Reads all containers.
    pub fn pass(&mut self, buffer: &mut Vec<u8>) {
        // Held here and by each cgroup that is brought up to date by it.
        self.settled.retain(|it| Arc::strong_count(&it.path) > 1);
        for file in self.settled.iter_mut().flat_map(|it| &mut it.files) {
            file.read_if_offered(buffer);
        }
        if let Err(err) = self.read(self.veths.comparing()) {
            tracing::debug!(%err, "the cgroup program can't be run");
            for at in 0..self.used {
                set(self.records.words(), at * CgroupRecord::WORDS, 0);
                set(self.records.words(), at * CgroupRecord::WORDS + 1, 0);
            }
            self.veths.forget();
        }
    }

    /// Reads links once before the kernel is asked about them, to compare.
    pub fn read_before_asking(&mut self) {
        if self.read(true).is_ok() {
            self.veths.begin_comparing();
        }
    }

    /// Whether links are read at all.
    #[cfg(test)]
    pub fn reads_links(&self) -> bool {
        self.reads_links
    }

    /// Links that are read with the cgroups.
    pub fn veths(&self) -> &Veths {
        &self.veths
    }

    /// The same, to change them.
    pub fn veths_mut(&mut self) -> &mut Veths {
        &mut self.veths
    }

    /// Reads all, links so that they can be compared or not.
    fn read(&self, compared: bool) -> io::Result<()> {
        set(self.orders.words(), walk::COUNT, self.used as u64);
        set(self.orders.words(), walk::LINKS, self.veths.used() as u64);
        set(self.orders.words(), walk::LINKS_COMPARED, compared.into());
        iterator::run_iterator(&self.reader)
    }

    /// What was read of a container in this pass.
    pub fn record(&self, slot: &Slot) -> Option<CgroupRecord> {
        CgroupRecord::read(self.records.words(), slot.place)
    }
}

/// Loads the programs that find and read.
fn load(
    btf: &Btf,
    capacity: u32,
    cast: Option<u32>,
    links: bool,
    reader: &str,
    cpus: u32,
) -> Result<Ebpf, CgroupProgramError> {
    let object = match cast {
        Some(cast) => Cow::Owned(ebpf::with_cast(ebpf::cgroup_stats(), cast)),
        None => Cow::Borrowed(ebpf::cgroup_stats()),
    };
    let mut object = EbpfLoader::new()
        .btf(Some(btf))
        .override_global("cpus", &cpus, true)
        .override_global("reads_links", &u32::from(links), true)
        .map_max_entries("targets", capacity)
        .map_max_entries("records", capacity)
        .map_max_entries("link_targets", capacity.saturating_mul(LINKS))
        .map_max_entries("link_records", capacity.saturating_mul(LINKS))
        .map_max_entries("block_io", capacity.saturating_mul(BLOCK_ENTRIES))
        .load(&object)
        .map_err(|err| CgroupProgramError::Load(Box::new(err)))?;
    for name in ["find_cgroup", reader] {
        let program: &mut Iter = object
            .program_mut(name)
            .ok_or(CgroupProgramError::Lacks("program"))?
            .try_into()
            .map_err(CgroupProgramError::Program)?;
        program
            .load("cgroup", btf)
            .map_err(CgroupProgramError::Program)?;
    }
    Ok(object)
}

fn attach(object: &Ebpf, name: &str, directory: &Path) -> io::Result<OwnedFd> {
    let program = object.program(name).ok_or(io::ErrorKind::NotFound)?;
    let directory = rustix::fs::open(
        directory,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let program = program.fd().map_err(io::Error::other)?;
    iterator::cgroup_iterator(program, directory)
}

fn count_block_io(object: &mut Ebpf, btf: &Btf) -> Result<(), CgroupProgramError> {
    for (name, place) in [
        ("count_request", "block_getrq"),
        ("count_joined_behind", "block_bio_backmerge"),
        ("count_joined_before", "block_bio_frontmerge"),
    ] {
        let program: &mut BtfTracePoint = object
            .program_mut(name)
            .ok_or(CgroupProgramError::Lacks("program for block devices"))?
            .try_into()
            .map_err(CgroupProgramError::Program)?;
        program
            .load(place, btf)
            .map_err(CgroupProgramError::Program)?;
        // The link lives as long as the object.
        program.attach().map_err(CgroupProgramError::Program)?;
    }
    Ok(())
}

fn shared(
    object: &Ebpf,
    name: &'static str,
    words: usize,
) -> Result<SharedArray, CgroupProgramError> {
    match object.map(name) {
        Some(Map::Array(map)) => SharedArray::new(map.fd(), words).map_err(CgroupProgramError::Map),
        _ => Err(CgroupProgramError::Lacks(name)),
    }
}

/// CPUs that may ever be there: the kernel keeps a part of each counter for each. None when they are more
/// than the programs have room for, which leave such counters to files then.
pub(super) fn possible_cpus() -> u32 {
    let cpus = aya::util::nr_cpus().unwrap_or(MOST_CPUS + 1);
    u32::try_from(cpus)
        .ok()
        .filter(|cpus| *cpus as usize <= MOST_CPUS)
        .unwrap_or(0)
}

/// Layouts the array of memory statistics may have: as the enumerations number the items, or packed in
/// the order of the kernel's list of those it keeps per cgroup (memcg_node_stat_items, then
/// memcg_stat_items, in mm/memcontrol.c).
fn candidate_layouts(orders: &[AtomicU64]) -> Vec<[u64; STAT_ITEMS]> {
    let length = word(orders, walk::STAT_LENGTH);
    let per_node = word(orders, walk::NODE_STAT_LENGTH);
    let plain: [u64; STAT_ITEMS] =
        std::array::from_fn(|item| word(orders, walk::ENUM_INDEX + item));
    let packed = [2, 14, 16, 19, per_node, per_node + 4];
    [plain, packed]
        .into_iter()
        .filter(|layout| layout.iter().all(|index| *index < length.min(MOST_STATS)))
        .collect()
}

/// Where what is swapped out is among the items of a layout.
const SWAP_ITEM: usize = 4;
/// Where memory of the kernel's own is.
const KERNEL_ITEM: usize = 5;

/// Whether a record says what the file says, and enough of it that chance can't.
fn agrees(text: &str, unified: bool, record: &CgroupRecord) -> bool {
    let names = if unified {
        ["inactive_file", "anon", "file", "shmem"]
    } else {
        [
            "total_inactive_file",
            "total_rss",
            "total_cache",
            "total_shmem",
        ]
    };
    let mut telling = 0;
    for (name, pages) in names.into_iter().zip(record.stat_pages) {
        let Some(file) = keyed(text, name) else {
            return false;
        };
        let ours = bytes(pages);
        // Other tasks run between the two readings.
        let slack = (file / 20).max(16 << 20);
        if file.abs_diff(ours) > slack {
            return false;
        }
        telling += u32::from(file > 2 * slack);
    }
    // Version 1 does not tell it, nor do kernels before 5.18.
    let kernel_agrees = keyed(text, "kernel").is_none_or(|file| {
        let slack = (file / 10).max(4 << 20);
        let ours = bytes(record.stat_pages[KERNEL_ITEM]);
        // Nothing is no slack where the file tells of something, however little (Linux 7.2).
        file.abs_diff(ours) <= slack && (ours > 0 || file == 0)
    });
    // Version 1 where it accounts swap; version 2 counts it elsewhere. Most nodes have none, which is
    // all there is to compare then.
    let told = keyed(text, "total_swap").filter(|_| !unified);
    let swap_agrees = told.is_none_or(|file| {
        let slack = (file / 10).max(4 << 20);
        let ours = bytes(record.stat_pages[SWAP_ITEM]);
        file.abs_diff(ours) <= slack && (ours > 0) == (file > 0)
    });
    telling >= 2 && kernel_agrees && swap_agrees
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_that_do_not_fit_are_no_candidates() {
        let words: Vec<AtomicU64> = (0..walk::WORDS).map(|_| AtomicU64::new(0)).collect();
        assert!(candidate_layouts(&words).is_empty());
        for (item, index) in [2, 17, 19, 22, 51, 55].into_iter().enumerate() {
            set(&words, walk::ENUM_INDEX + item, index);
        }
        set(&words, walk::STAT_LENGTH, 40);
        set(&words, walk::NODE_STAT_LENGTH, 33);
        assert_eq!(candidate_layouts(&words), [[2, 14, 16, 19, 33, 37]]);
        set(&words, walk::STAT_LENGTH, 58);
        assert_eq!(candidate_layouts(&words).len(), 2);
    }

    #[test]
    fn a_layout_is_believed_only_when_the_file_says_the_same_and_enough() {
        let mebi = |count: u64| (count << 20) / rustix::param::page_size() as u64;
        let mut record = CgroupRecord {
            stat_pages: [mebi(100), mebi(300), mebi(200), mebi(1), 0, 0],
            ..CgroupRecord::default()
        };
        let text = "inactive_file 104857600\nanon 314572800\nfile 209715200\nshmem 1048576\n";
        assert!(agrees(text, true, &record));
        assert!(!agrees(text, false, &record), "other names");
        let newer = format!("{text}kernel 33554432\n");
        assert!(!agrees(&newer, true, &record), "no kernel memory");
        let little = format!("{text}kernel 69632\n");
        assert!(!agrees(&little, true, &record), "little kernel memory");
        record.stat_pages[KERNEL_ITEM] = mebi(32);
        assert!(agrees(&newer, true, &record));
        record.stat_pages.swap(0, 1);
        assert!(!agrees(text, true, &record));
        let empty = "inactive_file 0\nanon 0\nfile 0\nshmem 0\n";
        assert!(
            !agrees(empty, true, &CgroupRecord::default()),
            "says nothing"
        );
    }

    #[test]
    fn swap_of_version_1_is_believed_only_when_the_file_says_the_same() {
        let mebi = |count: u64| (count << 20) / rustix::param::page_size() as u64;
        let text = |swap: &str| {
            format!(
                "total_cache 209715200\ntotal_rss 314572800\ntotal_shmem 1048576\n\
                 total_inactive_file 104857600\n{swap}"
            )
        };
        let agrees = |swap: &str, pages: u64| {
            let record = CgroupRecord {
                stat_pages: [mebi(100), mebi(300), mebi(200), mebi(1), pages, 0],
                ..CgroupRecord::default()
            };
            agrees(&text(swap), false, &record)
        };
        assert!(agrees("total_swap 0\n", 0));
        assert!(!agrees("total_swap 0\n", 1), "another item");
        assert!(agrees("total_swap 33554432\n", mebi(30)));
        assert!(!agrees("total_swap 33554432\n", mebi(20)));
        assert!(!agrees("total_swap 4096\n", 0), "swap that is not seen");
        assert!(agrees("", mebi(20)), "the kernel accounts no swap");
    }

    /// The whole of it on this kernel: a cgroup is found with its own numbers, and missed when it goes.
    #[test]
    fn a_cgroup_is_read_until_it_is_gone() {
        if !rustix::process::geteuid().is_root() {
            crate::skip::needs("loading programs into the kernel needs root");
            return;
        }
        let (hierarchies, budget) = (CgroupHierarchies::gather(), Budget::new(100));
        let btf = Btf::from_sys_fs().expect("types");
        let cast = btf.id_by_type_name_kind("bpf_rdonly_cast", BtfKind::Func);
        // By plain loads where the kernel has them, and as older ones must.
        for cast in [cast.ok(), None] {
            let program =
                CgroupProgram::by(cast, true, &btf, &hierarchies, &budget, 8, possible_cpus());
            reads_until_it_is_gone(&hierarchies, program.expect("this kernel has iterators"));
        }
    }

    fn reads_until_it_is_gone(hierarchies: &CgroupHierarchies, mut program: CgroupProgram) {
        const PIDS: usize = 4;
        let Some(pids) = hierarchies.pids.as_ref() else {
            panic!("no pids controller");
        };
        let unified = matches!(pids, Hierarchy::V2(_));
        let group = pids
            .mount()
            .join(format!("bai-walk-{}", std::process::id()));
        let kind = if unified { Kind::Unified } else { Kind::Other };
        assert!(program.find(&group, kind).is_none(), "not there yet");
        let slot = program.slot().expect("room");
        let mut buffer = Vec::new();
        // Made, removed and made again at the same place: another state each time.
        for limit in [77, 78] {
            std::fs::create_dir(&group).expect("a cgroup");
            std::fs::write(group.join("pids.max"), limit.to_string()).expect("limited");
            program.pass(&mut buffer);
            let before = program.record(&slot).expect("a record");
            assert_eq!(before.alive, 0, "the one before it is not taken for it");
            let found = program.find(&group, kind).expect("found");
            assert!(program.know(&slot, PIDS, &found));
            program.pass(&mut buffer);
            let record = program.record(&slot);
            std::fs::remove_dir(&group).expect("removed");
            program.pass(&mut buffer);
            let after = program.record(&slot).expect("a record");
            assert_eq!((after.alive, after.filled), (0, 0), "gone");
            let record = record.expect("its record");
            assert_eq!(record.alive, 1 << PIDS);
            assert!(record.filled & filled::PIDS != 0, "{record:?}");
            assert_eq!((record.pids, record.pids_limit), (0, limit));
        }
        assert!(
            program.knows_statistics(),
            "no layout of memory statistics fits"
        );
    }

    /// A sum over none would be zero, which is not what a busy cgroup has used.
    #[test]
    fn cpu_time_of_more_cpus_than_there_is_room_for_is_left_to_files() {
        const CPU_TIME: usize = 0;
        if !rustix::process::geteuid().is_root() {
            crate::skip::needs("loading programs into the kernel needs root");
            return;
        }
        let (hierarchies, budget) = (CgroupHierarchies::gather(), Budget::new(100));
        let Some(Hierarchy::V1(mount)) = &hierarchies.cpu else {
            crate::skip::here("CPU time is counted for the unified tree as a whole", false);
            return;
        };
        let group = mount.join(format!("bai-many-cpus-{}", std::process::id()));
        std::fs::create_dir(&group).expect("a cgroup");
        let btf = Btf::from_sys_fs().expect("types");
        let cast = btf.id_by_type_name_kind("bpf_rdonly_cast", BtfKind::Func);
        let most = u32::try_from(MOST_CPUS).expect("fits");
        let mut told = Vec::new();
        for cast in [cast.ok(), None] {
            for cpus in [possible_cpus(), 0, most] {
                let program = CgroupProgram::by(cast, true, &btf, &hierarchies, &budget, 8, cpus);
                let mut program = program.expect("the verifier takes any number of CPUs");
                let found = program.find(&group, Kind::Other).expect("found");
                let slot = program.slot().expect("room");
                assert!(program.know(&slot, CPU_TIME, &found));
                program.pass(&mut Vec::new());
                let record = program.record(&slot).expect("a record");
                assert_eq!(record.alive, 1 << CPU_TIME);
                told.push(record.filled & filled::CPUACCT != 0);
            }
        }
        std::fs::remove_dir(&group).expect("removed");
        assert_eq!(told, [true, false, false, true, false, false]);
    }

    /// A CPU's time is added up when somebody asks, and a root's file asks for no one.
    #[test]
    fn a_cgroup_right_below_the_unified_root_is_up_to_date() {
        const CPU_TIME: usize = 0;
        if !rustix::process::geteuid().is_root() {
            crate::skip::needs("making cgroups needs root");
            return;
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").expect("mounts");
        let unified: String = mounts
            .lines()
            .filter(|line| line.split(' ').nth(2) == Some("cgroup2"))
            .map(|line| format!("{line}\n"))
            .collect();
        let Some(root) = CgroupHierarchies::from_mounts(&unified, |_| String::new()).cpu else {
            crate::skip::here("there is no unified hierarchy", false);
            return;
        };
        let budget = Budget::new(100);
        let mut program =
            CgroupProgram::start(&CgroupHierarchies::gather(), &budget, 4).expect("iterators");
        let name = format!("bai-below-root-{}", std::process::id());
        let group = root.mount().join(name);
        std::fs::create_dir(&group).expect("a cgroup");
        let found = program.find(&group, Kind::Unified).expect("found");
        let slot = program.slot().expect("room");
        assert!(program.know(&slot, CPU_TIME, &found));
        let mut buffer = Vec::new();
        let mut before = 0;
        let mut compared = Vec::new();
        for _ in 0..3 {
            let script = format!(
                "echo $$ > {}/cgroup.procs; i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done",
                group.display()
            );
            let status = std::process::Command::new("sh")
                .args(["-c", &script])
                .status();
            assert!(status.expect("sh").success());
            program.pass(&mut buffer);
            let record = program.record(&slot).expect("a record");
            // The file after it: reading it brings the cgroup up to date, too.
            let text = std::fs::read_to_string(group.join("cpu.stat")).expect("its file");
            let file = keyed(&text, "usage_usec").expect("CPU time");
            compared.push((record.cpu_usage_ns / 1000, file));
            assert!(file > before, "{compared:?}");
            before = file;
        }
        std::fs::remove_dir(&group).expect("removed");
        assert!(
            compared.iter().all(|(ours, file)| ours == file),
            "{compared:?}"
        );
    }

    #[test]
    fn there_is_room_for_so_many_and_it_is_given_back() {
        if !rustix::process::geteuid().is_root() {
            crate::skip::needs("loading programs into the kernel needs root");
            return;
        }
        let mut program = CgroupProgram::start(&CgroupHierarchies::gather(), &Budget::new(100), 2)
            .expect("iterators");
        let mut slots: Vec<Slot> = std::iter::from_fn(|| program.slot()).collect();
        assert_eq!(slots.len(), 2 + OTHERS as usize);
        slots.pop();
        assert!(program.slot().is_some());
    }
}
