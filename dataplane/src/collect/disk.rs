//! Sizes of file systems and directories, asked for by threads that may hang.
//!
//! In: paths of interest. Out: the last answers with their age. A dead mount blocks statfs(2) for
//! minutes; only the answers about that mount grow old. What a directory takes is asked of its file
//! system where that knows (one of its own, or a project of its own whose use is counted: ext4 and XFS), and
//! counted in the background where it does not. Invariant: the
//! collector only ever reads answers that are already there.

mod devices;
mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::{Mode, OFlags, StatVfs};
use shared::ids::ContainerId;
use shared::observed::{DiskSpace, NodeCounters, NodeSample, Source};

use self::devices::Device;
use self::tree::Trees;
use crate::background_queries::{BackgroundQueries, QueryResult};
use crate::sys::quota;

/// So many questions about file systems may hang before the others grow old.
const THREADS: usize = 16;
/// Directories counted at the same time.
const COUNTING: usize = 2;

/// What a file system or directory takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Its size; `None` for a directory that shares its file system.
    pub total: Option<u64>,
    /// What an ordinary user may still take.
    pub available: u64,
    /// What is in use.
    pub used: u64,
    /// Files on it, where that is known.
    pub files: Option<u64>,
    /// When it was asked.
    pub at: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Question {
    /// The devices mounted on this node.
    Devices,
    /// The file system a path lies on.
    At(PathBuf),
    /// The same, if it is this path's alone.
    Own(PathBuf),
    /// A container's /dev/shm, while its first process is still the container's.
    Memory(u32, ContainerId),
}

#[derive(Debug, Clone)]
enum Answer {
    Devices(Arc<Vec<Device>>),
    Space(Space),
    /// There is a directory, and its file system does not know what it takes.
    Shared,
}

/// The handle.
#[derive(Debug)]
pub struct Disk {
    questions: BackgroundQueries<Question, Answer>,
    trees: BackgroundQueries<PathBuf, Space>,
    devices: Arc<Vec<Device>>,
}

impl Disk {
    /// Starts the threads. They end with the handle, or with the process when they hang.
    ///
    /// # Errors
    /// No thread.
    pub fn start() -> std::io::Result<Self> {
        let trees = Trees::default();
        Ok(Self {
            questions: BackgroundQueries::start("disk", THREADS, ask)?,
            trees: BackgroundQueries::start("tree", COUNTING, move |path: &PathBuf| {
                trees.ask(path)
            })?,
            devices: Arc::default(),
        })
    }

    /// Asks for another round; never waits.
    pub fn refresh<'a>(
        &mut self,
        root: Option<&Path>,
        scratches: impl Iterator<Item = &'a str>,
        memories: impl Iterator<Item = (u32, ContainerId)>,
    ) {
        if let Some((_, Answer::Devices(devices))) = self.questions.last(&Question::Devices) {
            self.devices = devices;
        }
        let scratches: Vec<PathBuf> = scratches.map(PathBuf::from).collect();
        let shared = scratches.iter().filter(|path| {
            let answer = self.questions.last(&Question::Own((*path).clone()));
            matches!(answer, Some((_, Answer::Shared)))
        });
        self.trees.ask(shared.cloned());
        let places = self.devices.iter().map(|device| device.place.clone());
        let all = std::iter::once(Question::Devices)
            .chain(root.map(Path::to_owned).map(Question::At))
            .chain(places.map(Question::At))
            .chain(memories.map(|(pid, container)| Question::Memory(pid, container)))
            .chain(scratches.into_iter().map(Question::Own));
        self.questions.ask(all);
    }

    fn space(&self, question: &Question) -> Option<Space> {
        match self.questions.last(question)?.1 {
            Answer::Space(space) => Some(space),
            Answer::Devices(_) | Answer::Shared => None,
        }
    }

    /// The file system a path lies on.
    pub fn at(&self, path: &Path) -> Option<Space> {
        self.space(&Question::At(path.to_owned()))
    }

    /// What a container's scratch directory takes, and how that was learned.
    pub fn scratch(&self, path: &Path) -> Option<(Space, Source)> {
        let own = self.space(&Question::Own(path.to_owned()));
        own.map(|space| (space, Source::File)).or_else(|| {
            let (_, space) = self.trees.last(&path.to_owned())?;
            Some((space, Source::Walk))
        })
    }

    /// A container's /dev/shm.
    pub fn memory(&self, pid: u32, container: ContainerId) -> Option<Space> {
        self.space(&Question::Memory(pid, container))
    }

    /// The node's devices, and in its counters the sums of those that lie on no other's file.
    pub fn node(&self, counters: &mut NodeCounters) -> Vec<DiskSpace> {
        let (mut disks, mut oldest) = (Vec::new(), None::<Instant>);
        let (mut total, mut used, mut left_out) = (0_u64, 0_u64, 0_u64);
        for device in self.devices.iter() {
            let Some(space) = self.at(&device.place) else {
                continue;
            };
            let Some(size) = space.total.filter(|size| *size > 0) else {
                continue;
            };
            let taken = size.saturating_sub(space.available);
            if !device.is_loop() {
                (total, used) = (total.saturating_add(size), used.saturating_add(taken));
                oldest = Some(oldest.map_or(space.at, |oldest| oldest.min(space.at)));
            }
            if disks.len() == NodeSample::MOST_DISKS {
                left_out += 1;
                continue;
            }
            disks.push(DiskSpace {
                device: device.name.clone(),
                total_bytes: size,
                used_bytes: taken,
            });
        }
        if let Some(oldest) = oldest {
            counters.disks_total_bytes = Some(total);
            counters.disks_used_bytes = Some(used);
            counters.disks_age_ms = u64::try_from(oldest.elapsed().as_millis()).ok();
            counters.disks_left_out = Some(left_out);
        }
        disks
    }
}

fn ask(question: &Question) -> QueryResult<Answer> {
    match question {
        Question::Devices => match devices::list() {
            Some(list) => QueryResult::Is(Answer::Devices(Arc::new(list))),
            None => QueryResult::Unknown,
        },
        Question::At(path) => space(path),
        Question::Own(path) => match is_own(path) {
            Some(true) => space(path),
            Some(false) => QueryResult::Is(of_project(path).map_or(Answer::Shared, Answer::Space)),
            None => QueryResult::Gone,
        },
        // Process ids are used again; the cgroup's path names the container. The last word about one
        // that has died stays: it tells why it did.
        Question::Memory(pid, container) => {
            let path = PathBuf::from(format!("/proc/{pid}/root/dev/shm"));
            let ours = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))
                .is_ok_and(|text| text.contains(&container.to_string()));
            match ours && is_own(&path) == Some(true) {
                true => space(&path),
                false => QueryResult::Unknown,
            }
        }
    }
}

fn space(path: &Path) -> QueryResult<Answer> {
    match rustix::fs::statvfs(path) {
        Ok(found) => QueryResult::Is(Answer::Space(told(&found))),
        Err(_) => QueryResult::Gone,
    }
}

fn told(found: &StatVfs) -> Space {
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Space {
        total: Some(bytes(found.f_blocks)),
        available: bytes(found.f_bavail),
        used: bytes(found.f_blocks.saturating_sub(found.f_bfree)),
        files: Some(found.f_files.saturating_sub(found.f_ffree)),
        at: Instant::now(),
    }
}

/// Whether a path has a file system of its own. `None` when it is not there.
fn is_own(path: &Path) -> Option<bool> {
    let parent = path.parent()?;
    let (own, around) = (rustix::fs::stat(path).ok()?, rustix::fs::stat(parent).ok()?);
    Some(own.st_dev != around.st_dev)
}

/// What a directory takes for which its file system keeps a project, other than that around it.
fn of_project(path: &Path) -> Option<Space> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty()).ok();
    let (own, around) = (open(path)?, open(path.parent()?)?);
    let project = quota::project(&own).ok()??;
    if quota::project(&around).ok()? == Some(project) {
        return None;
    }
    if let Ok(usage) = quota::usage(&own, project) {
        let left = |limit: u64| limit.saturating_sub(usage.bytes);
        return Some(Space {
            total: usage.limit,
            available: usage.limit.map_or(0, left),
            used: usage.bytes,
            files: Some(usage.files),
            at: Instant::now(),
        });
    }
    let statvfs = |directory| rustix::fs::fstatvfs(directory).ok();
    limited(&statvfs(own)?, &statvfs(around)?)
}

/// What statfs(2) says of a project that has a limit, which stands for the size then. Where the file system has
/// less left than the project, newer kernels tell that, older ones do not: what the project takes is not to be had.
fn limited(own: &StatVfs, around: &StatVfs) -> Option<Space> {
    if own.f_blocks >= around.f_blocks || own.f_bfree >= around.f_bfree {
        return None;
    }
    let mut space = told(own);
    // The files have a limit of their own.
    space.files = space.files.filter(|_| own.f_files != around.f_files);
    Some(space)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "no answer");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn sizes_come_by_themselves_and_a_plain_directory_is_counted() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let inside = directory.path().join("scratch");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("file"), vec![1; 10_000]).unwrap();
        let mut disk = Disk::start().unwrap();
        let container = ContainerId([0xab; 32]);
        let (space, counted) = until(|| {
            disk.refresh(
                Some(directory.path()),
                [inside.to_str().unwrap()].into_iter(),
                std::iter::once((std::process::id(), container)),
            );
            Some((disk.at(directory.path())?, disk.scratch(&inside)?))
        });
        assert!(space.total >= Some(space.available) && space.total > Some(0));
        let (scratch, source) = counted;
        assert_eq!((scratch.total, source), (None, Source::Walk));
        assert_eq!((scratch.used, scratch.files), (3 * 4096, Some(1)));
        let not_ours = disk.memory(std::process::id(), container);
        assert_eq!(not_ours, None, "another container's process");
        assert_eq!(is_own(Path::new("/dev/shm")), Some(true));
        assert_eq!(is_own(&inside), Some(false));
        assert_eq!(is_own(Path::new("/dev/shm/not there")), None);
    }

    #[test]
    fn what_statfs_says_of_a_project_is_believed_while_the_project_is_the_closer_limit() {
        let file_system = || {
            let mut found = rustix::fs::statvfs("/dev/shm").unwrap();
            (found.f_blocks, found.f_bfree, found.f_frsize) = (1000, 400, 4096);
            (found.f_files, found.f_ffree) = (500, 100);
            found
        };
        let (mut own, around) = (file_system(), file_system());
        assert_eq!(limited(&own, &around), None, "no limit");
        (own.f_blocks, own.f_bfree) = (600, 250);
        let space = limited(&own, &around).unwrap();
        assert_eq!((space.total, space.used), (Some(600 << 12), 350 << 12));
        assert_eq!(space.files, None, "those of the file system");
        (own.f_files, own.f_ffree) = (50, 20);
        assert_eq!(limited(&own, &around).unwrap().files, Some(30));
        // Two ways kernels have to say it when the file system has less left.
        for left in [400, 450] {
            own.f_bfree = left;
            assert_eq!(limited(&own, &around), None, "{left}");
        }
    }

    /// File systems with quotas of projects that were made for this test: it sets limits and fills them.
    fn with_projects() -> Vec<PathBuf> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let has = |options: &str| options.split(',').any(|it| it == "prjquota");
        let place = |line: &str| {
            let mut words = line.split(' ').skip(1);
            let (place, _, options) = (words.next()?, words.next()?, words.next()?);
            has(options).then(|| shared::procfs::unescape(place))
        };
        let places = mounts.lines().filter_map(place);
        places
            .filter(|it| it.starts_with("/var/projects"))
            .collect()
    }

    /// `make vm-test` has an ext4 and an XFS with projects.
    #[test]
    fn a_project_is_asked_for_and_never_counted() {
        let places = with_projects();
        if places.is_empty() {
            crate::skip::here(
                "no file system with quotas of projects is mounted below /var/projects",
                false,
            );
        }
        for (number, place) in (4711..).step_by(2).zip(places) {
            projects_of(&place, number);
        }
    }

    fn projects_of(place: &Path, number: u32) {
        let top = tempfile::tempdir_in(place).unwrap();
        let made = |name: &str, project: Option<u32>| {
            let path = top.path().join(name);
            std::fs::create_dir(&path).unwrap();
            let directory = std::fs::File::open(&path).unwrap();
            if let Some(project) = project {
                quota::change::project(&directory, project).unwrap();
            }
            (path, directory)
        };
        let (limited_path, limited_directory) = made("limited", Some(number));
        let (free_path, _) = made("free", Some(number + 1));
        let (plain_path, plain) = made("plain", None);
        let within = limited_path.join("within");
        std::fs::create_dir(&within).unwrap();
        for (path, mebibytes) in [
            (&limited_path, 5),
            (&free_path, 3),
            (&plain_path, 1),
            (&within, 2),
        ] {
            let mut file = std::fs::File::create(path.join("file")).unwrap();
            std::io::Write::write_all(&mut file, &vec![1; mebibytes << 20]).unwrap();
            file.sync_all().unwrap();
        }
        let whole = rustix::fs::statvfs(place).unwrap();
        // Half of what there is, in the units of a quota.
        let limit = (whole.f_blocks / 2 * whole.f_frsize) >> 20 << 20;
        quota::change::limit(&limited_directory, number, limit).unwrap();
        rustix::fs::syncfs(&plain).unwrap();
        let paths = [&limited_path, &free_path, &plain_path, &within];
        let told = || {
            let mut disk = Disk::start().unwrap();
            until(|| {
                disk.refresh(
                    None,
                    paths.iter().map(|path| path.to_str().unwrap()),
                    std::iter::empty(),
                );
                let all: Option<Vec<_>> = paths.iter().map(|path| disk.scratch(path)).collect();
                all
            })
        };
        let counted = paths.map(|path| tree::count_all(path).unwrap());
        let check = || {
            let told = told();
            for ((space, _), (bytes, _)) in told.iter().zip(counted) {
                assert_eq!(
                    space.used, bytes,
                    "{place:?}: {told:?}, counted {counted:?}"
                );
            }
            let sources: Vec<_> = told.iter().map(|(_, source)| *source).collect();
            let wanted = [Source::File, Source::File, Source::Walk, Source::Walk];
            assert_eq!(
                sources, wanted,
                "one within another's project is not known apart"
            );
            let totals = told.iter().map(|(space, _)| space.total);
            assert!(totals.eq([Some(limit), None, None, None]), "{told:?}");
            // With the directories themselves.
            let files = told.iter().map(|(space, _)| space.files);
            assert!(files.eq([Some(4), Some(2), Some(1), Some(1)]), "{told:?}");
            // As before Linux 5.14, where the project can't be asked for.
            let around = rustix::fs::statvfs(top.path()).unwrap();
            let own = rustix::fs::fstatvfs(&limited_directory).unwrap();
            println!(
                "{place:?}: statfs(2) has it {} of {}",
                super::told(&own).used,
                counted[0].0
            );
            limited(&own, &around)
        };
        let fallback = check().expect("there is more left than the project may take");
        assert_eq!((fallback.used, fallback.total), (counted[0].0, Some(limit)));
        // Others take what the project might have.
        let left = rustix::fs::statvfs(place).unwrap();
        let taken = left.f_bfree * left.f_frsize - limit / 2;
        let filler = std::fs::File::create(top.path().join("filler")).unwrap();
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&filler, flags, 0, taken).unwrap();
        filler.sync_all().unwrap();
        assert_eq!(check(), None);
    }

    #[test]
    fn the_nodes_devices_are_those_of_the_mount_table() {
        let mut disk = Disk::start().unwrap();
        let mounted = devices::list().unwrap();
        let (disks, counters) = until(|| {
            disk.refresh(None, std::iter::empty(), std::iter::empty());
            let mut counters = NodeCounters::default();
            let disks = disk.node(&mut counters);
            let most = mounted.len().min(NodeSample::MOST_DISKS);
            // One that has no blocks is listed nowhere.
            (mounted.is_empty() || (disks.len() * 2 > most)).then_some((disks, counters))
        });
        for disk in &disks {
            assert!(disk.used_bytes <= disk.total_bytes, "{disk:?}");
        }
        assert_eq!(counters.disks_total_bytes.is_some(), !disks.is_empty());
    }
}
