//! Reading cgroups by a program in the kernel.
//!
//! In: directories of cgroups. Out: after each pass, one record per cgroup, found by the walk over its
//! parent and its id. One walk per parent directory, made when a cgroup below it is first asked for and
//! dropped when none is any more. Invariants: a record is of this pass or not there at all; memory
//! statistics are believed only where they have been compared with the kernel's own file.
//!
//! Cost: `make bench-stats`.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use aya::maps::Map;
use aya::programs::{BtfTracePoint, Iter};
use aya::{Btf, BtfError, Ebpf, EbpfError, EbpfLoader};
use ebpf::cgroup_records::{CgroupRecord, MOST_CPUS, MOST_STATS, STAT_ITEMS, filled, walk};
use rustix::fs::{Mode, OFlags};

use super::facts::{Facts, Hierarchy};
use super::file::{Budget, CachedFile, keyed};
use crate::sys::iterator::{self, SharedArray, Visit};

/// Records beyond those of containers: their parents, and cgroups of others beside them.
const OTHERS: u32 = 512;
/// Hierarchies that may each have a record of a container.
const HIERARCHIES: u32 = 5;
/// Parents walked over; containers of further ones are read by files.
const MOST_WALKS: usize = 64;
/// Passes after which a walk that nobody asked is dropped.
const UNUSED_PASSES: u32 = 3;

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum WalksError {
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
    #[error("the kernel offers no walk over cgroups")]
    Attach(#[source] io::Error),
    /// A trial walk failed.
    #[error("the walk over cgroups fails")]
    Walk(#[source] io::Error),
}

/// Where the record of one cgroup is to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    walk: u64,
    id: u64,
    /// Where it was last time: cgroups keep their order as long as none comes or goes.
    at: usize,
}

/// What a walk is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The unified tree: all controllers are on it.
    Unified,
    /// `memory` of version 1; tells of the other hierarchies too what the same processes have there.
    Memory,
    /// Another hierarchy of version 1; run when one is asked for that `Memory` could not tell of.
    Other,
}

#[derive(Debug)]
struct Walk {
    number: u64,
    kind: Kind,
    /// Whether it was run, or tried, in this pass.
    ran: bool,
    link: Option<OwnedFd>,
    /// Read before the walk: reading makes the kernel add up what its CPUs have counted apart.
    settle: Vec<CachedFile>,
    /// Records of the last pass: first, and one after the last.
    range: (usize, usize),
    /// Where each id is, looked up in pass number `places_of_pass`.
    places: HashMap<u64, usize>,
    places_of_pass: u64,
    unused: u32,
}

/// The walks and their program.
#[derive(Debug)]
pub struct Walks {
    /// Owns the program and the maps.
    object: Ebpf,
    records: SharedArray,
    orders: SharedArray,
    /// By their numbers.
    walks: Vec<(PathBuf, Walk)>,
    budget: Arc<Budget>,
    next: u64,
    pass: u64,
    counts_block_io: bool,
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

impl Walks {
    /// Loads the program and tries it.
    ///
    /// # Errors
    /// The step that failed; files must do then.
    pub fn start(facts: &Facts, budget: &Arc<Budget>, containers: u32) -> Result<Self, WalksError> {
        let btf = Btf::from_sys_fs().map_err(WalksError::Btf)?;
        let capacity = containers
            .saturating_mul(HIERARCHIES)
            .saturating_add(OTHERS);
        let cpus = possible_cpus();
        let mut object = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("cpus", &cpus, true)
            .override_global("capacity", &capacity, true)
            .map_max_entries("records", capacity)
            .map_max_entries("block_io", capacity.saturating_mul(4))
            .load(ebpf::cgroup_stats())
            .map_err(|err| WalksError::Load(Box::new(err)))?;
        {
            let program: &mut Iter = object
                .program_mut("read_cgroups")
                .ok_or(WalksError::Lacks("program"))?
                .try_into()
                .map_err(WalksError::Program)?;
            program.load("cgroup", &btf).map_err(WalksError::Program)?;
        }
        // In version 2 the kernel's own counters are complete.
        let counts_block_io = matches!(facts.io, Some(Hierarchy::V1(_)))
            && match count_block_io(&mut object, &btf) {
                Ok(()) => true,
                Err(err) => {
                    tracing::warn!(
                        err = &err as &dyn std::error::Error,
                        "block devices are counted by the kernel's files, which may miss them"
                    );
                    false
                }
            };
        let words = CgroupRecord::WORDS * usize::try_from(capacity).unwrap_or(0);
        let records = shared(&object, "records", words)?;
        let orders = shared(&object, "walk", walk::WORDS)?;
        let mut walks = Self {
            object,
            records,
            orders,
            walks: Vec::new(),
            budget: Arc::clone(budget),
            next: 1,
            pass: 0,
            counts_block_io,
        };
        walks.learn(facts)?;
        Ok(walks)
    }

    /// Finds out where the kernel keeps which memory statistic, by comparing the root cgroup's with
    /// its file. Where nothing fits, they are read from files.
    fn learn(&mut self, facts: &Facts) -> Result<(), WalksError> {
        let hierarchy = facts.memory.as_ref().or(facts.cpu.as_ref());
        let Some(hierarchy) = hierarchy else {
            return Ok(());
        };
        let root = hierarchy.mount();
        let unified = matches!(hierarchy, Hierarchy::V2(_));
        let link = self
            .attach(root, Visit::Itself)
            .map_err(WalksError::Attach)?;
        // The first try tells the array's lengths.
        let mut candidates = vec![[MOST_STATS; STAT_ITEMS]];
        let mut at = 0;
        let mut believed = false;
        while let Some(candidate) = candidates.get(at).copied() {
            let orders = self.orders.words();
            for (item, index) in candidate.into_iter().enumerate() {
                set(orders, walk::STAT_INDEX + item, index);
            }
            set(orders, walk::COUNT, 0);
            set(orders, walk::BEGIN, 1);
            set(orders, walk::UNIFIED, u64::from(unified));
            let text = std::fs::read_to_string(root.join("memory.stat")).unwrap_or_default();
            iterator::run_iterator(&link).map_err(WalksError::Walk)?;
            if at == 0 {
                candidates.extend(candidate_layouts(self.orders.words()));
            } else if let Some(record) = CgroupRecord::read(self.records.words(), 0)
                && word(self.orders.words(), walk::COUNT) == 1
                && record.filled & filled::MEMORY_STAT != 0
                && agrees(&text, unified, &record)
            {
                believed = true;
                break;
            }
            at += 1;
        }
        if !believed {
            let orders = self.orders.words();
            for item in 0..STAT_ITEMS {
                set(orders, walk::STAT_INDEX + item, MOST_STATS);
            }
        }
        tracing::info!(
            memory_statistics = if believed { "bpf" } else { "file" },
            "cgroups are walked by a kernel program"
        );
        Ok(())
    }

    /// Whether the memory statistics in the records may be believed.
    pub fn knows_statistics(&self) -> bool {
        word(self.orders.words(), walk::STAT_INDEX) < MOST_STATS
    }

    /// Whether block devices are counted here for version 1.
    pub fn counts_block_io(&self) -> bool {
        self.counts_block_io
    }

    fn attach(&self, directory: &Path, visit: Visit) -> io::Result<OwnedFd> {
        let program = self
            .object
            .program("read_cgroups")
            .ok_or(io::ErrorKind::NotFound)?;
        let directory = rustix::fs::open(
            directory,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let program = program.fd().map_err(io::Error::other)?;
        iterator::cgroup_iterator(program, directory, visit)
    }

    /// Where the record of this directory's cgroup will be from the next pass on (or already is,
    /// when its parent is walked).
    pub fn place(&mut self, directory: &Path, kind: Kind) -> Option<Place> {
        let parent = directory.parent()?;
        let id = std::fs::metadata(directory).ok()?.ino();
        if let Some((_, walk)) = self.walks.iter().find(|(path, _)| path == parent) {
            return Some(Place {
                walk: walk.number,
                id,
                at: walk.range.0,
            });
        }
        if self.walks.len() >= MOST_WALKS {
            return None;
        }
        let number = self.next;
        self.next += 1;
        let settle = match kind {
            Kind::Unified => &["cpu.stat", "memory.stat"][..],
            Kind::Memory => &["memory.stat"],
            Kind::Other => &[],
        };
        let walk = Walk {
            number,
            kind,
            ran: false,
            link: None,
            settle: settle
                .iter()
                .map(|name| CachedFile::new(parent.join(name), &self.budget))
                .collect(),
            range: (0, 0),
            places: HashMap::new(),
            places_of_pass: 0,
            unused: 0,
        };
        self.walks.push((parent.to_owned(), walk));
        Some(Place {
            walk: number,
            id,
            at: 0,
        })
    }

    /// Reads all cgroups, but those that will only be read when they are asked for.
    pub fn pass(&mut self, buffer: &mut Vec<u8>) {
        self.pass += 1;
        self.walks.retain(|(_, walk)| walk.unused < UNUSED_PASSES);
        set(self.orders.words(), walk::COUNT, 0);
        set(self.orders.words(), walk::LEFT_OUT, 0);
        for at in 0..self.walks.len() {
            let Some((_, walk)) = self.walks.get_mut(at) else {
                break;
            };
            walk.unused += 1;
            walk.range = (0, 0);
            walk.ran = false;
            for file in &mut walk.settle {
                file.read_if_offered(buffer);
            }
            if walk.kind != Kind::Other {
                self.run(at);
            }
        }
    }

    /// Runs a walk; its records come after those of the walks before it.
    fn run(&mut self, at: usize) {
        let link = match self.walks.get(at) {
            Some((parent, walk)) if walk.link.is_none() => self
                .attach(parent, Visit::Descendants)
                .inspect_err(|err| {
                    tracing::debug!(%err, parent = %parent.display(), "cgroups can't be walked");
                })
                .ok(),
            _ => None,
        };
        let Some((_, walk)) = self.walks.get_mut(at) else {
            return;
        };
        walk.ran = true;
        walk.link = link.or_else(|| walk.link.take());
        let Some(link) = &walk.link else {
            return;
        };
        let orders = self.orders.words();
        let first = word(orders, walk::COUNT);
        let is = |kind| u64::from(walk.kind == kind);
        set(orders, walk::UNIFIED, is(Kind::Unified));
        set(orders, walk::JOIN, is(Kind::Memory));
        set(orders, walk::BEGIN, 1);
        let ran = iterator::run_iterator(link);
        let after = word(orders, walk::COUNT);
        if ran.is_ok() && after > first {
            let place = |count| usize::try_from(count).unwrap_or(usize::MAX);
            walk.range = (place(first), place(after));
        } else {
            // The parent is gone; another may come in its place.
            walk.link = None;
        }
    }

    /// Cgroups of the last pass for which there was no room.
    pub fn left_out(&self) -> u64 {
        word(self.orders.words(), walk::LEFT_OUT)
    }

    /// The record of a cgroup in this pass; remembers where it is.
    pub fn find(&mut self, place: &mut Place) -> Option<CgroupRecord> {
        let by_number = |(_, walk): &(PathBuf, Walk)| walk.number;
        let at = self.walks.binary_search_by_key(&place.walk, by_number);
        let at = at.ok()?;
        if !self.walks.get(at)?.1.ran {
            self.run(at);
        }
        let (_, walk) = self.walks.get_mut(at)?;
        walk.unused = 0;
        let (first, after) = walk.range;
        let records = self.records.words();
        if !(first..after).contains(&place.at)
            || CgroupRecord::id(records, place.at) != Some(place.id)
        {
            if walk.places_of_pass != self.pass {
                walk.places_of_pass = self.pass;
                walk.places.clear();
                walk.places.extend(
                    (first..after)
                        .filter_map(|at| CgroupRecord::id(records, at).map(|id| (id, at))),
                );
            }
            place.at = walk.places.get(&place.id).copied()?;
        }
        CgroupRecord::read(records, place.at)
    }
}

fn count_block_io(object: &mut Ebpf, btf: &Btf) -> Result<(), WalksError> {
    let program: &mut BtfTracePoint = object
        .program_mut("count_block_io")
        .ok_or(WalksError::Lacks("program for block devices"))?
        .try_into()
        .map_err(WalksError::Program)?;
    program
        .load("block_rq_complete", btf)
        .map_err(WalksError::Program)?;
    // The link lives as long as the object.
    program.attach().map_err(WalksError::Program)?;
    Ok(())
}

fn shared(object: &Ebpf, name: &'static str, words: usize) -> Result<SharedArray, WalksError> {
    match object.map(name) {
        Some(Map::Array(map)) => SharedArray::new(map.fd(), words).map_err(WalksError::Map),
        _ => Err(WalksError::Lacks(name)),
    }
}

/// CPUs that may ever be there: the kernel keeps a part of each counter for each.
fn possible_cpus() -> u32 {
    let cpus = aya::util::nr_cpus().unwrap_or(MOST_CPUS + 1);
    // Beyond the program's array, CPU time comes from files.
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
    telling >= 2
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
        record.stat_pages.swap(0, 1);
        assert!(!agrees(text, true, &record));
        let empty = "inactive_file 0\nanon 0\nfile 0\nshmem 0\n";
        assert!(
            !agrees(empty, true, &CgroupRecord::default()),
            "says nothing"
        );
    }
    /// The whole of it on this kernel: every cgroup below the root is found with its own numbers.
    #[test]
    fn a_walk_finds_this_hosts_cgroups() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP loading programs into the kernel needs root");
            return;
        }
        let facts = Facts::gather();
        let budget = Budget::new(100);
        let mut walks = Walks::start(&facts, &budget, 1_024).expect("this kernel has iterators");
        let Some(pids) = facts.pids.as_ref() else {
            panic!("no pids controller");
        };
        let unified = matches!(pids, Hierarchy::V2(_));
        let group = pids
            .mount()
            .join(format!("bai-walk-{}", std::process::id()));
        std::fs::create_dir(&group).expect("a cgroup");
        let limited = std::fs::write(group.join("pids.max"), "77").is_ok();
        let kind = if unified { Kind::Unified } else { Kind::Other };
        let mut place = walks.place(&group, kind).expect("a place");
        let mut buffer = Vec::new();
        walks.pass(&mut buffer);
        let record = walks.find(&mut place);
        std::fs::remove_dir(&group).expect("removed");
        walks.pass(&mut buffer);
        let after = walks.find(&mut place);
        let record = record.expect("its record");
        assert_eq!(after, None, "gone");
        assert_eq!(walks.left_out(), 0);
        assert!(limited && record.filled & filled::PIDS != 0, "{record:?}");
        assert_eq!((record.pids, record.pids_limit), (0, 77));
        assert!(
            walks.knows_statistics(),
            "no layout of memory statistics fits"
        );
    }
}
