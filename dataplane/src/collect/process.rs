//! The processes of each container, listed by threads of their own.
//!
//! In: a cgroup directory per container. Out: listings, each with the time it was made. Where a kernel
//! program can list them ([`super::tasks`]), one walk does for all containers; else, and for containers
//! it can't see, files of `/proc` are read. A container of ten thousand processes, or one whose files
//! hang, must cost its neighbours nothing: each container has a cap and a time limit, one whose files
//! hang is left out alone, and the collector only ever takes listings that are already there.
//! Invariant: what is left out is counted.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shared::ids::ContainerId;
use shared::monotonic_ns;
use shared::observed::{ProcessCounters, ProcessSample, Processes, Source};
use shared::procfs::tick_ns;

use super::file::keyed;
use super::tasks::{ProcessList, Tasks, TasksError};
use crate::background_queries::{BackgroundQueries, QueryResult};

/// Most processes listed per container.
pub(super) const PER_CONTAINER: usize = 256;
/// Most cgroups looked at per container.
const CGROUPS: usize = 64;
/// After this long nothing more of a container is listed, only counted.
const PATIENCE: Duration = Duration::from_millis(150);
/// So many containers may hang before the others grow old.
const THREADS: usize = 16;

type Container = (ContainerId, PathBuf);

/// The listing threads' handle.
#[derive(Debug)]
pub struct Lister {
    walk: Option<Walker>,
    files: BackgroundQueries<Container, ProcessList>,
    /// When the round under way began; none before the first.
    round_ns: Option<u64>,
    /// How many processes each container had.
    known: HashMap<ContainerId, u32>,
}

/// What a walk found, or nothing when it failed.
type Walked = Option<Vec<(ContainerId, ProcessList)>>;

/// The thread that walks over all tasks.
#[derive(Debug)]
struct Walker {
    /// Below this it finds containers.
    mount: PathBuf,
    wanted: Arc<Mutex<Vec<Container>>>,
    answers: BackgroundQueries<(), Walked>,
    /// The round under way has begun.
    asked: bool,
    /// What it found, until files have been read too.
    walked: Option<Walked>,
}

impl Walker {
    /// `load` is run by the thread, before its first round: it takes a while.
    fn start(
        mount: PathBuf,
        load: impl Fn() -> Result<Tasks, TasksError> + Send + Sync + 'static,
    ) -> std::io::Result<Self> {
        let tasks = Mutex::new(None);
        let wanted = Arc::new(Mutex::new(Vec::new()));
        let list = Arc::clone(&wanted);
        let answers = BackgroundQueries::start("tasks", 1, move |(): &()| {
            let wanted: Vec<Container> =
                list.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut tasks = tasks.lock().unwrap_or_else(PoisonError::into_inner);
            let loaded = match tasks.take() {
                Some(known) => Ok(known),
                None => load(),
            };
            let walked = loaded.and_then(|known| tasks.insert(known).list(&wanted));
            let walked = walked.inspect_err(|err| {
                tracing::warn!(
                    err = err as &dyn std::error::Error,
                    "processes are listed by files, which costs more"
                );
            });
            QueryResult::Is(walked.ok())
        })?;
        Ok(Self {
            mount,
            wanted,
            answers,
            asked: false,
            walked: None,
        })
    }

    /// Whether the round has come to its end.
    fn is_done(&mut self) -> bool {
        if self.asked && self.walked.is_none() {
            let taken = self.answers.take();
            self.walked = taken.and_then(|(answers, _)| Some(answers.into_iter().next()?.1));
            return self.walked.is_some();
        }
        true
    }

    fn ask(&mut self, wanted: Vec<Container>) {
        *self.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
        self.asked = true;
        self.answers.ask([()]);
    }
}

impl Lister {
    /// Starts the first thread, which reads files. Threads end with the handle, or with the process
    /// when they hang.
    ///
    /// # Errors
    /// No thread.
    pub fn start() -> std::io::Result<Self> {
        let files =
            BackgroundQueries::start("processes", THREADS, |(id, directory): &Container| {
                QueryResult::Is(list(*id, directory))
            })?;
        Ok(Self {
            walk: None,
            files,
            round_ns: None,
            known: HashMap::new(),
        })
    }

    /// Has a program list what it can of containers below this mount from the next round on.
    ///
    /// # Errors
    /// No thread.
    pub fn walk_by(
        &mut self,
        mount: PathBuf,
        load: impl Fn() -> Result<Tasks, TasksError> + Send + Sync + 'static,
    ) -> std::io::Result<()> {
        self.walk = Some(Walker::start(mount, load)?);
        Ok(())
    }

    /// The listing of a round that has come to its end, and another round over these containers;
    /// never waits.
    pub fn turn(&mut self, wanted: impl Iterator<Item = Container>) -> Option<Processes> {
        if !self.walk.as_mut().is_none_or(Walker::is_done) {
            return None;
        }
        let (answers, hanging) = self.files.take()?;
        let Some(taken_monotonic_ns) = self.round_ns else {
            self.ask(wanted.collect());
            return None;
        };
        let by_files = answers.into_iter().map(|((id, _), found)| (id, found));
        let walked = self.walk.as_mut().and_then(|walk| walk.walked.take());
        if matches!(walked, Some(None)) {
            // What is there stands until files have been read.
            self.walk = None;
            self.ask(wanted.collect());
            return None;
        }
        let mut listing = Processes {
            taken_monotonic_ns,
            ..Processes::default()
        };
        for (id, found) in walked.flatten().into_iter().flatten().chain(by_files) {
            let seen = u32::try_from(found.list.len()).unwrap_or(u32::MAX);
            self.known.insert(id, seen.saturating_add(found.left_out));
            listing.left_out = listing.left_out.saturating_add(found.left_out);
            listing.list.extend(found.list);
        }
        for (id, _) in &hanging {
            let missed = self.known.get(id).copied().unwrap_or(1);
            listing.left_out = listing.left_out.saturating_add(missed);
        }
        let wanted: Vec<Container> = wanted.collect();
        let ids: HashSet<ContainerId> = wanted.iter().map(|(id, _)| *id).collect();
        self.known.retain(|id, _| ids.contains(id));
        self.ask(wanted);
        Some(listing)
    }

    fn ask(&mut self, wanted: Vec<Container>) {
        self.round_ns = Some(monotonic_ns());
        let Some(walk) = &mut self.walk else {
            self.files.ask(wanted);
            return;
        };
        let (walkable, others): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .partition(|(_, directory)| directory.starts_with(&walk.mount));
        walk.ask(walkable);
        self.files.ask(others);
    }
}

fn list(container_id: ContainerId, directory: &Path) -> ProcessList {
    let until = Instant::now() + PATIENCE;
    let tick_ns = tick_ns();
    let mut listing = ProcessList::default();
    for pid in pids_below(directory) {
        if listing.list.len() == PER_CONTAINER || Instant::now() > until {
            listing.left_out += 1;
            continue;
        }
        // One that has ended meanwhile is no loss.
        if let Some(process) = read(pid, tick_ns) {
            listing.list.push(ProcessSample {
                container_id,
                ..process
            });
        }
    }
    listing
}

/// Processes of a cgroup and those below it.
fn pids_below(directory: &Path) -> Vec<u32> {
    let mut pids = Vec::new();
    let mut directories = vec![directory.to_owned()];
    let mut at = 0;
    while let Some(directory) = directories.get(at).cloned() {
        at += 1;
        if let Ok(text) = std::fs::read_to_string(directory.join("cgroup.procs")) {
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        let below = std::fs::read_dir(&directory).into_iter().flatten();
        for entry in below.flatten() {
            if directories.len() >= CGROUPS {
                break;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push(entry.path());
            }
        }
    }
    // A process of another pid namespace is said to be 0.
    pids.retain(|pid| *pid != 0);
    pids
}

/// What `/proc` tells of a process.
pub(super) fn read(pid: u32, tick_ns: u64) -> Option<ProcessSample> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let text = |name: &str| std::fs::read(directory.join(name)).ok();
    let stat = text("stat")?;
    let mut process = parse_stat(&String::from_utf8_lossy(&stat), tick_ns)?;
    process.pid = pid;
    if let Some(status) = text("status") {
        process.container_pid = innermost_pid(&String::from_utf8_lossy(&status)).unwrap_or(0);
    }
    if let Some(io) = text("io") {
        let io = String::from_utf8_lossy(&io).replace(':', "");
        process.counters.read_bytes = keyed(&io, "read_bytes");
        process.counters.write_bytes = keyed(&io, "write_bytes");
    }
    Some(process)
}

/// `/proc/<pid>/stat` (proc(5)): the name may hold anything, so what counts follows its last bracket.
fn parse_stat(text: &str, tick_ns: u64) -> Option<ProcessSample> {
    let (head, tail) = text.rsplit_once(')')?;
    let name = head.split_once('(')?.1;
    let words: Vec<&str> = tail.split_whitespace().collect();
    let number = |at: usize| words.get(at)?.parse::<u64>().ok();
    let small = |at: usize| u32::try_from(number(at)?).ok();
    let page = rustix::param::page_size() as u64;
    Some(ProcessSample {
        name: name.to_owned(),
        state: *words.first()?.as_bytes().first()?,
        parent_pid: small(1)?,
        threads: small(17)?,
        start_ticks: number(19)?,
        source: Source::File,
        counters: ProcessCounters {
            user_ns: Some(number(11)?.saturating_mul(tick_ns)),
            system_ns: Some(number(12)?.saturating_mul(tick_ns)),
            rss_bytes: Some(number(21)?.saturating_mul(page)),
            ..ProcessCounters::default()
        },
        ..ProcessSample::default()
    })
}

/// The last of the pids in `NSpid:`, which is the one the process knows itself by.
fn innermost_pid(status: &str) -> Option<u32> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_brackets_and_spaces() {
        let text = "42 (a) b) (c) S 7 1 1 0 -1 4 0 0 0 0 11 12 0 0 20 0 3 0 900 1000 5 0";
        let process = parse_stat(text, 10_000_000).unwrap();
        assert_eq!(process.name, "a) b) (c");
        assert_eq!((process.state, process.parent_pid), (b'S', 7));
        assert_eq!((process.threads, process.start_ticks), (3, 900));
        assert_eq!(process.counters.user_ns, Some(110_000_000));
        assert_eq!(process.counters.system_ns, Some(120_000_000));
        assert!(process.counters.rss_bytes.unwrap() >= 5 * 4096);
        for text in ["", "42 (x", "42 (x) S 1", "42 x) S"] {
            assert_eq!(parse_stat(text, 1), None);
        }
    }

    #[test]
    fn the_pid_in_the_container_is_the_innermost() {
        assert_eq!(innermost_pid("Name:\tx\nNSpid:\t4242\t17\t1\n"), Some(1));
        assert_eq!(innermost_pid("NSpid:\t4242\n"), Some(4242));
        assert_eq!(innermost_pid("Name:\tx\n"), None);
    }

    #[test]
    fn our_own_process_is_read() {
        let process = read(std::process::id(), 10_000_000).unwrap();
        assert_eq!(process.pid, std::process::id());
        assert_ne!(process.container_pid, 0);
        assert!(process.counters.rss_bytes > Some(0));
        assert!(process.threads > 0);
    }

    #[test]
    fn one_container_of_many_leaves_the_others_theirs() {
        let directory = tempfile::tempdir().unwrap();
        let own = std::process::id();
        let (many, few) = (directory.path().join("many"), directory.path().join("few"));
        for path in [&many, &few.join("below")] {
            std::fs::create_dir_all(path).unwrap();
        }
        let crowd = format!("{own}\n").repeat(PER_CONTAINER + 44);
        std::fs::write(many.join("cgroup.procs"), crowd).unwrap();
        std::fs::write(few.join("cgroup.procs"), "0\n").unwrap();
        std::fs::write(few.join("below/cgroup.procs"), format!("{own}\n")).unwrap();
        // A file that never ends its opening: a pipe nobody writes to.
        let stuck = directory.path().join("stuck");
        std::fs::create_dir_all(&stuck).unwrap();
        let pipe = std::process::Command::new("mkfifo")
            .arg(stuck.join("cgroup.procs"))
            .status();
        assert!(pipe.unwrap().success());
        let ids = [1, 2, 3].map(|byte| ContainerId([byte; 32]));
        let wanted = || {
            ids.into_iter()
                .zip([many.clone(), stuck.clone(), few.clone()])
        };
        let mut lister = Lister::start().unwrap();
        assert_eq!(lister.turn(wanted()), None, "nothing was asked for yet");
        for _ in 0..2 {
            let deadline = Instant::now() + Duration::from_secs(120);
            let listing = loop {
                if let Some(listing) = lister.turn(wanted()) {
                    break listing;
                }
                assert!(Instant::now() < deadline, "no listing");
                std::thread::sleep(Duration::from_millis(5));
            };
            let of = |id| {
                let own = listing.list.iter().filter(|it| it.container_id == id);
                own.count()
            };
            // The time limit may have cut a slow machine's list shorter, never longer.
            assert!(of(ids[0]) <= PER_CONTAINER);
            assert_eq!((of(ids[1]), of(ids[2])), (0, 1));
            assert_eq!(
                listing.list.len() + listing.left_out as usize,
                PER_CONTAINER + 46,
                "and one for that which hangs"
            );
        }
        // Let go of the thread.
        std::fs::write(stuck.join("cgroup.procs"), "").unwrap();
    }
}
