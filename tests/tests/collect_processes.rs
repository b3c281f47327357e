//! The processes that the dataplane lists are those that `/proc` shows, with the same numbers: equal
//! while a process sleeps, between two readings while it works.

use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, container_row, until};
use harness::process_files::{ProcessFiles, TICK_NS};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shared::desired::ContainerRow;
use shared::observed::{ProcessSample, Processes, Source};

/// A dataplane that lists the processes of one cgroup. Dropped in this order.
struct Listed {
    control: Control,
    process: Process,
    _place: Place,
    row: ContainerRow,
    group: TestCgroup,
}

fn listed(name: &str, number: u8) -> Option<Listed> {
    let group = TestCgroup::new(name).expect("a cgroup")?;
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        ..Options::default()
    })
    .expect("a place");
    let mut control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    let mut row = container_row(number);
    row.cgroup_path.clone_from(&group.path);
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    Some(Listed {
        control,
        process,
        _place: place,
        row,
        group,
    })
}

impl Listed {
    /// A listing made after now that knows of the container.
    fn next(&mut self) -> Processes {
        let now = shared::monotonic_ns();
        until("a listing", || {
            let listing = self.control.observed.processes().ok()?;
            let known = !self.own(&listing).is_empty();
            (listing.taken_monotonic_ns > now && known).then_some(listing)
        })
        .expect("a listing")
    }

    fn own(&self, listing: &Processes) -> Vec<ProcessSample> {
        let own = listing.list.iter();
        let own = own.filter(|it| it.container_id == self.row.container_id);
        own.cloned().collect()
    }

    fn pids(&self) -> Vec<u32> {
        let text = self.group.read(&["cgroup.procs"]).unwrap_or_default();
        let mut pids: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
        pids.sort_unstable();
        pids
    }
}

#[test]
fn of_sleeping_processes_the_files_say_the_same() {
    let Some(mut it) = listed("sleepers", 61) else {
        return;
    };
    let file = format!("/var/tmp/bai-listed-{}", std::process::id());
    // One that has worked, one that holds memory, one that has written, one that is first in its own
    // pid namespace, and one in a cgroup below.
    for script in [
        "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; exec sleep 1000".to_owned(),
        "dd if=/dev/zero bs=30000000 count=1 | exec sleep 1000".to_owned(),
        format!(
            "dd if=/dev/zero of={file} bs=1M count=8 conv=fsync status=none; rm {file}; exec sleep 1000"
        ),
        "exec unshare --pid --fork sleep 1000".to_owned(),
    ] {
        it.group.run(&script).expect("a process");
    }
    let below: String = it
        .group
        .directories()
        .map(|directory| {
            let below = directory.join("below");
            std::fs::create_dir_all(&below).expect("a cgroup below");
            format!("echo $$ > {}/cgroup.procs; ", below.display())
        })
        .collect();
    let deep = it.group.run(&format!("{below}exec sleep 1000"));
    let deep = deep.expect("a process");
    let mut names = [
        "sleep", "sh", "dd", "sleep", "sleep", "unshare", "sleep", "sleep",
    ];
    names.sort_unstable();
    let settled = until("all of them sleeping", || {
        let mut pids = it.pids();
        pids.push(deep);
        pids.sort_unstable();
        pids.dedup();
        let name = |pid: &u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        let mut found: Vec<String> = pids.iter().filter_map(name).collect();
        found.sort_unstable();
        let read = |pid: &u32| Some((*pid, ProcessFiles::read(*pid)?));
        let files: Vec<_> = pids.iter().filter_map(read).collect();
        let calm = files.iter().all(|(_, it)| it.state == b'S');
        let named = found.iter().map(|name| name.trim()).eq(names);
        (calm && named).then_some(files)
    })
    .expect("asleep");
    let listing = it.next();
    let mut ours = it.own(&listing);
    ours.sort_by_key(|sample| sample.pid);
    assert_eq!(listing.left_out, 0);
    let pids = |list: &[(u32, ProcessFiles)]| list.iter().map(|(pid, _)| *pid).collect::<Vec<_>>();
    assert_eq!(
        ours.iter().map(|it| it.pid).collect::<Vec<_>>(),
        pids(&settled)
    );
    for (sample, (pid, files)) in ours.iter().zip(&settled) {
        assert_eq!(sample.source, Source::Bpf, "root may load programs");
        // Reading `io` and `stat` changes nothing of one that sleeps.
        assert_eq!(ProcessFiles::of(sample).as_ref(), Some(files), "{pid}");
    }
    assert!(ours.iter().any(|it| it.container_pid == 1));
    assert!(ours.iter().any(|it| it.counters.user_ns > Some(TICK_NS)));
    assert!(
        ours.iter()
            .any(|it| it.counters.rss_bytes > Some(30_000_000))
    );
    assert!(
        ours.iter()
            .any(|it| it.counters.write_bytes >= Some(8 << 20))
    );
    let deep = Pid::from_raw(deep.cast_signed());
    kill(deep, Signal::SIGKILL).expect("killed");
    for directory in it.group.directories() {
        until("the cgroup below being free", || {
            std::fs::remove_dir(directory.join("below")).ok()
        })
        .expect("removed");
    }
}

#[test]
fn of_a_working_process_of_many_threads_the_files_say_more_and_more() {
    let Some(mut it) = listed("workers", 62) else {
        return;
    };
    // The dataplane itself: its threads work, sleep, begin and end.
    let pid = it.process.pid().as_raw().cast_unsigned();
    for directory in it.group.directories() {
        std::fs::write(directory.join("cgroup.procs"), pid.to_string()).expect("moved");
    }
    it.next();
    for _ in 0..10 {
        let before = ProcessFiles::read(pid).expect("the files");
        let listing = it.next();
        let after = ProcessFiles::read(pid).expect("the files");
        let ours = it.own(&listing);
        let [sample] = ours.as_slice() else {
            panic!("one process, but {ours:?}");
        };
        assert_eq!(
            (sample.pid, sample.name.as_str()),
            (pid, "bai-dataplane"),
            "{sample:?}"
        );
        let found = ProcessFiles::of(sample).expect("all of it");
        assert_eq!(found.start_ticks, before.start_ticks);
        // One or two more may wait for something that is slow.
        let near = |files: &ProcessFiles| files.threads.abs_diff(found.threads) <= 2;
        assert!(
            found.threads > 1 && (near(&before) || near(&after)),
            "{before:?} {found:?} {after:?}"
        );
        let total = |times: [u64; 2]| times[0] + times[1];
        // Each part is rounded down by itself.
        assert!(
            total(found.times_ns) + TICK_NS >= total(before.times_ns)
                && total(found.times_ns) <= total(after.times_ns) + TICK_NS,
            "{before:?} {found:?} {after:?}"
        );
        for at in 0..2 {
            assert!((before.moved[at]..=after.moved[at]).contains(&found.moved[at]));
        }
        let (low, high) = (
            before.resident.min(after.resident),
            before.resident.max(after.resident),
        );
        let slack = 2 << 20;
        assert!(
            found.resident + slack >= low && found.resident <= high + slack,
            "{before:?} {found:?} {after:?}"
        );
    }
}
