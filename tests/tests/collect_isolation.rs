//! What hangs makes its own numbers old and nobody else's: a mount that does not answer, tasks that
//! cannot be interrupted or are frozen, a crowd of processes, a network that is gone. And what cannot
//! be had is done without, in words.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, container_row};
use harness::process_files::{ProcessFiles, TICK_NS};
use harness::wait::until_blocking;
use shared::desired::ContainerRow;
use shared::ids::ContainerId;
use shared::monotonic_ns;
use shared::observed::{ContainerSample, ObservedSnapshot, Processes, Source};

/// For a loaded machine; nothing here is asserted to be quick.
const LIMIT: Duration = Duration::from_secs(60);
/// What everybody else's numbers may be old at most.
const FRESH_MS: u32 = 2000;

/// A mount namespace of its own, in which mounts can hang without a trace on the host.
struct Mounts {
    holder: Child,
    directory: tempfile::TempDir,
}

impl Mounts {
    fn new() -> Mounts {
        let directory = tempfile::tempdir().expect("a directory");
        let holder = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sleep", "1000"])
            .stdin(Stdio::null())
            .spawn()
            .expect("a mount namespace");
        let mounts = Mounts { holder, directory };
        // The namespace is another one once unshare has become sleep.
        until_blocking("a mount namespace", LIMIT, || {
            let of = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
            (of(&mounts.pid().to_string())? != of("self")?).then_some(())
        })
        .expect("a mount namespace");
        mounts
    }

    fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// A directory that has a file system of its own.
    fn file_system(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::create_dir(&path).expect("a directory");
        let options = ["-t", "tmpfs", "-o", "size=8m", "bai-test"];
        let done = self.inside("mount").args(options).arg(&path).status();
        assert!(done.expect("mount").success());
        path
    }

    /// Covers a place by a file system whose server never says a word; it ends with the handle.
    fn hang(&self, path: &Path) -> Hung {
        let script = "exec 3<>/dev/fuse && mount -i -t fuse \
            -o fd=3,rootmode=40000,user_id=0,group_id=0,allow_other bai-hung \"$0\" && exec sleep 1000";
        let server = self
            .inside("sh")
            .args(["-c", script])
            .arg(path)
            .stdin(Stdio::null())
            .spawn()
            .expect("a server");
        let table = format!("/proc/{}/mounts", self.pid());
        until_blocking("the mount", LIMIT, || {
            let text = std::fs::read_to_string(&table).ok()?;
            text.contains("bai-hung").then_some(())
        })
        .expect("this kernel has FUSE");
        Hung(server)
    }

    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--mount=/proc/{}/ns/mnt", self.pid()))
            .arg(program);
        command
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

struct Hung(Child);

impl Drop for Hung {
    fn drop(&mut self) {
        // Closing its end lets everybody go who waits for it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Setup {
    // Before the process, which may wait for what it holds.
    hung: Option<Hung>,
    control: Control,
    process: Process,
    _place: Place,
    mounts: Mounts,
}

fn setup() -> Setup {
    setup_without(None)
}

fn setup_without(capabilities: Option<&'static str>) -> Setup {
    let mounts = Mounts::new();
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        mounts_of: Some(mounts.pid()),
        without: capabilities,
        ..Options::default()
    })
    .expect("a place");
    let control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    Setup {
        hung: None,
        control,
        process,
        _place: place,
        mounts,
    }
}

fn cgroup(name: &str) -> Option<TestCgroup> {
    TestCgroup::new(name).expect("a cgroup")
}

impl Setup {
    fn want(&mut self, rows: &[&ContainerRow]) {
        self.control
            .write(|batch| {
                for row in rows {
                    batch.put_container((*row).clone());
                }
            })
            .expect("written");
    }

    /// Looks at one publication of all samples until it is as wanted.
    fn snapshot(&mut self, what: &str, wanted: impl Fn(&ObservedSnapshot) -> bool) {
        let mut last = None;
        let found = until_blocking(what, LIMIT, || {
            let snapshot = self.control.observed.snapshot().ok()?;
            let fine = wanted(&snapshot);
            last = Some(snapshot);
            fine.then_some(())
        });
        assert!(
            found.is_ok(),
            "{found:?}: {:#?}",
            last.map(|it| it.containers.clone())
        );
    }

    /// The same for a listing of processes.
    fn processes(&mut self, what: &str, wanted: impl Fn(&Processes) -> bool) -> Processes {
        until_blocking(what, LIMIT, || {
            let listed = self.control.observed.processes().ok()?;
            wanted(&listed).then_some(listed)
        })
        .expect(what)
    }
}

fn of(snapshot: &ObservedSnapshot, id: ContainerId) -> Option<&ContainerSample> {
    snapshot.container(id)
}

/// Everything of it was measured, a moment ago.
fn is_fresh(sample: &ContainerSample) -> bool {
    let age = monotonic_ns().saturating_sub(sample.taken_monotonic_ns);
    age < u64::from(FRESH_MS) * 1_000_000
        && sample.cpu.get().is_some()
        && sample.memory.get().is_some()
        && sample.pids.get().is_some()
        && sample.disk.get().is_some()
        && [sample.cpu.age_ms, sample.memory.age_ms, sample.disk.age_ms]
            .iter()
            .all(|age| *age < FRESH_MS)
}

#[test]
fn a_mount_that_hangs_and_tasks_that_wait_for_it_delay_nobody_else() {
    let (Some(mut stuck), Some(mut steady)) = (cgroup("stuck"), cgroup("steady")) else {
        return;
    };
    let mut setup = setup();
    let (mut bad, mut good) = (container_row(41), container_row(42));
    bad.cgroup_path.clone_from(&stuck.path);
    good.cgroup_path.clone_from(&steady.path);
    let place = setup.mounts.file_system("bad");
    bad.scratch_path = place.display().to_string();
    good.scratch_path = setup.mounts.file_system("good").display().to_string();
    steady.run("exec sleep 1000").expect("a process");
    stuck.run("exec sleep 1000").expect("a process");
    setup.want(&[&bad, &good]);
    let ids = [bad.container_id, good.container_id];
    setup.snapshot("both being measured", |snapshot| {
        ids.iter().all(|id| of(snapshot, *id).is_some_and(is_fresh))
    });

    setup.hung = Some(setup.mounts.hang(&place));
    // A task of the container that waits for the mount cannot be interrupted.
    let enter = format!(
        "exec nsenter --mount=/proc/{}/ns/mnt stat {}/file",
        setup.mounts.pid(),
        place.display()
    );
    let waiting = stuck.run(&enter).expect("a task");
    let state = |processes: &Processes, id, state| {
        let mut list = processes.list.iter();
        list.any(|it| it.container_id == id && it.state == state)
    };
    let first = setup.processes("the task in D state", |listed| {
        state(listed, bad.container_id, b'D') && state(listed, good.container_id, b'S')
    });
    let sample = first.list.iter().find(|it| it.pid == waiting);
    let sample = sample.expect("the task that waits");
    assert_eq!(sample.source, Source::Bpf, "root may load programs");
    assert_eq!(ProcessFiles::of(sample), ProcessFiles::read(waiting));
    setup.snapshot("one being old and the other fresh", |snapshot| {
        let (Some(bad), Some(good)) = (of(snapshot, ids[0]), of(snapshot, ids[1])) else {
            return false;
        };
        // The last numbers stay, and their age is told; all else of it is fresh.
        let old = bad
            .disk
            .get()
            .is_some_and(|disk| disk.scratch_bytes.is_some())
            && bad.disk.age_ms > FRESH_MS;
        let rest = bad.cpu.get().is_some() && bad.memory.get().is_some();
        old && rest && bad.tick == good.tick && is_fresh(good)
    });
    setup.processes("processes being listed on", |listed| {
        listed.taken_monotonic_ns > first.taken_monotonic_ns
            && state(listed, bad.container_id, b'D')
            && state(listed, good.container_id, b'S')
    });
    setup.hung = None;
}

#[test]
fn a_frozen_container_and_one_whose_process_and_link_are_gone_delay_nobody_else() {
    let (Some(mut frozen), Some(mut steady)) = (cgroup("frozen"), cgroup("lively")) else {
        return;
    };
    let mut setup = setup();
    let (mut cold, mut good, mut dead) = (container_row(43), container_row(44), container_row(45));
    cold.cgroup_path.clone_from(&frozen.path);
    good.cgroup_path.clone_from(&steady.path);
    good.scratch_path = setup.mounts.file_system("good").display().to_string();
    // A process that is no more, and an interface that went with its namespace.
    let mut gone = Command::new("true").spawn().expect("a process");
    gone.wait().expect("its end");
    dead.init_pid = gone.id();
    dead.link_indexes = vec![987_654];
    frozen.run("while :; do :; done").expect("a process");
    steady.run("exec sleep 1000").expect("a process");
    let (file, cold_word, warm_word) = if frozen.directory_with("freezer.state").is_some() {
        ("freezer.state", "FROZEN", "THAWED")
    } else {
        ("cgroup.freeze", "1", "0")
    };
    let freezer = frozen.directory_with(file).expect("a freezer").join(file);
    setup.want(&[&cold, &good, &dead]);
    let ids = [cold.container_id, good.container_id, dead.container_id];
    setup.snapshot("all being there", |snapshot| {
        ids.iter().all(|id| of(snapshot, *id).is_some())
    });
    std::fs::write(&freezer, cold_word).expect("frozen");
    let before = setup.processes("a listing", |_| true);
    let began = setup.control.observed.snapshot().expect("a snapshot");
    let tick = began.node.as_ref().map_or(0, |node| node.tick);
    setup.snapshot("twenty passes", |snapshot| {
        let all = ids.map(|id| of(snapshot, id));
        let [Some(cold), Some(good), Some(dead)] = all else {
            return false;
        };
        let same = cold.tick == good.tick && dead.tick == good.tick;
        let measured = cold.cpu.get().is_some() && cold.memory.get().is_some();
        same && good.tick >= tick + 20 && measured && is_fresh(good) && dead.net.get().is_none()
    });
    setup.processes("both being listed on", |listed| {
        listed.taken_monotonic_ns > before.taken_monotonic_ns
            && ids[..2]
                .iter()
                .all(|id| listed.list.iter().any(|it| it.container_id == *id))
    });
    std::fs::write(&freezer, warm_word).expect("thawed");
}

/// `BAI_CROWD=10000` for a machine that can bear it.
#[test]
fn a_crowd_of_processes_is_counted_and_delays_nobody_else() {
    let (Some(mut crowd), Some(mut steady)) = (cgroup("crowd"), cgroup("alone")) else {
        return;
    };
    let many: usize = std::env::var("BAI_CROWD")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1000);
    let mut setup = setup();
    let (mut bad, mut good) = (container_row(46), container_row(47));
    bad.cgroup_path.clone_from(&crowd.path);
    good.cgroup_path.clone_from(&steady.path);
    good.scratch_path = setup.mounts.file_system("good").display().to_string();
    steady.run("exec sleep 1000").expect("a process");
    crowd
        .run(&format!(
            "i=0; while [ $i -lt {many} ]; do i=$((i+1)); sleep 1000 & done; wait"
        ))
        .expect("a crowd");
    setup.want(&[&bad, &good]);
    let tasks = many as u64;
    let listed = setup.processes("the crowd being counted", |listed| {
        let count = |id| {
            listed
                .list
                .iter()
                .filter(|it| it.container_id == id)
                .count()
        };
        let (crowd, alone) = (count(bad.container_id), count(good.container_id));
        alone == 1 && crowd <= 256 && crowd + listed.left_out as usize > many
    });
    setup.snapshot("both being measured", |snapshot| {
        let (Some(bad), Some(good)) = (
            of(snapshot, bad.container_id),
            of(snapshot, good.container_id),
        ) else {
            return false;
        };
        bad.pids.counters.current > Some(tasks) && bad.tick == good.tick && is_fresh(good)
    });
    assert!(listed.left_out > 0, "{}", listed.list.len());
    for sample in &listed.list {
        assert_eq!(sample.source, Source::Bpf, "root may load programs");
        if sample.name == "sleep" {
            let [mut ours, mut files] =
                [ProcessFiles::of(sample), ProcessFiles::read(sample.pid)].map(Option::unwrap);
            // How the time is parted depends on when one looked: neither part ever goes back, here or in
            // the kernel. Each is rounded.
            let [told, read] = [&mut ours, &mut files].map(|it| std::mem::take(&mut it.times_ns));
            let sum = |times: [u64; 2]| times.iter().sum::<u64>();
            assert!(
                sum(told).abs_diff(sum(read)) <= TICK_NS,
                "{told:?} {read:?}"
            );
            assert_eq!(ours, files, "{}", sample.pid);
        }
    }
}

#[test]
fn where_no_program_may_be_loaded_files_are_read_and_the_log_says_so() {
    let Some(mut group) = cgroup("files") else {
        return;
    };
    // As on a kernel without BPF: to load a program needs one of these.
    let mut setup = setup_without(Some("-sys_admin,-bpf,-perfmon"));
    let mut row = container_row(48);
    row.cgroup_path.clone_from(&group.path);
    row.scratch_path = setup.mounts.file_system("own").display().to_string();
    group.run("exec sleep 1000").expect("a process");
    setup.want(&[&row]);
    setup.snapshot("everything being measured by files", |snapshot| {
        of(snapshot, row.container_id).is_some_and(|sample| {
            let sources = [sample.cpu.source, sample.memory.source, sample.pids.source];
            is_fresh(sample) && sources == [Source::File; 3]
        })
    });
    setup.processes("its process being listed by files", |listed| {
        let own = listed.list.iter();
        let mut own = own.filter(|it| it.container_id == row.container_id);
        own.any(|it| it.source == Source::File && it.name == "sleep")
    });
    let log = setup.process.log();
    assert!(log.contains("cgroups are read by files"), "{log}");
    assert!(log.contains("processes are listed by files"), "{log}");
}
