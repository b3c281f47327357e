//! The processes of each container, listed by a thread of their own.
//!
//! In: a cgroup directory per container. Out: the last listing with the time it was made. A container
//! of ten thousand processes, or one whose files are slow, must cost its neighbours nothing: each
//! container has a cap, each round a time limit, and the collector only ever takes listings that are
//! already there. Invariant: what is left out is counted.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shared::ids::ContainerId;
use shared::monotonic_ns;
use shared::observed::{ProcessCounters, ProcessSample, Processes};

use super::file::keyed;

/// Most processes listed per container: three files each.
const PER_CONTAINER: usize = 256;
/// Most cgroups looked at per container.
const CGROUPS: usize = 64;
/// After this long a round lists nothing more, it only counts.
const ROUND: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    wanted: Vec<(ContainerId, PathBuf)>,
    listing: Option<Processes>,
    round: u64,
    stop: bool,
}

/// The listing thread's handle.
#[derive(Debug, Clone)]
pub struct Lister(Arc<(Mutex<State>, Condvar)>);

impl Lister {
    /// Starts the thread. It ends when told to.
    ///
    /// # Errors
    /// No thread.
    pub fn start() -> std::io::Result<Self> {
        let lister = Self(Arc::default());
        let own = lister.clone();
        std::thread::Builder::new()
            .name("processes".to_owned())
            .spawn(move || own.serve())?;
        Ok(lister)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut seen = 0;
        loop {
            let wanted = {
                let mut state = self.lock();
                while state.round == seen && !state.stop {
                    state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.stop {
                    return;
                }
                seen = state.round;
                state.wanted.clone()
            };
            let listing = list(&wanted);
            self.lock().listing = Some(listing);
        }
    }

    /// Asks for another round over these containers; never waits.
    pub fn refresh(&self, wanted: Vec<(ContainerId, PathBuf)>) {
        let mut state = self.lock();
        state.wanted = wanted;
        state.round += 1;
        self.0.1.notify_one();
    }

    /// The last listing, once.
    pub fn take(&self) -> Option<Processes> {
        self.lock().listing.take()
    }

    /// Ends the thread after its round.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.0.1.notify_one();
    }
}

fn list(wanted: &[(ContainerId, PathBuf)]) -> Processes {
    let until = Instant::now() + ROUND;
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let mut listing = Processes {
        taken_monotonic_ns: monotonic_ns(),
        ..Processes::default()
    };
    let mut left_out = 0;
    for (container_id, directory) in wanted {
        let pids = pids_below(directory);
        let mut room = PER_CONTAINER;
        for pid in pids {
            if room == 0 || Instant::now() > until {
                left_out += 1;
                continue;
            }
            // One that has ended meanwhile is no loss.
            if let Some(process) = read(pid, 1_000_000_000 / ticks) {
                room -= 1;
                listing.list.push(ProcessSample {
                    container_id: *container_id,
                    ..process
                });
            }
        }
    }
    listing.left_out = left_out;
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

fn read(pid: u32, tick_ns: u64) -> Option<ProcessSample> {
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
        let ids = [ContainerId([1; 32]), ContainerId([2; 32])];
        let listing = list(&[(ids[0], many), (ids[1], few)]);
        let of = |id| {
            listing
                .list
                .iter()
                .filter(|it| it.container_id == id)
                .count()
        };
        // The time limit may have cut a slow machine's round shorter, never longer.
        assert!(of(ids[0]) <= PER_CONTAINER);
        assert_eq!(
            listing.list.len() + listing.left_out as usize,
            PER_CONTAINER + 45
        );
    }
}
