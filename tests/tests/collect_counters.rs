//! What the dataplane says of a container is what the kernel says: rising numbers lie between two
//! readings of the kernel's own files, standing ones are equal, and missing ones are absent.

use std::thread;

use harness::cgroup::TestCgroup;
use harness::dataplane::{Control, Options, Place, Process, container_row, until};
use harness::netns::{CONTAINER_ADDRESS, VethPair};
use shared::observed::{Source, UNLIMITED};

fn started(namespace: Option<&str>) -> (Place, Process, Control) {
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        namespace: namespace.map(str::to_owned),
        ..Options::default()
    })
    .expect("a place");
    let control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    (place, process, control)
}

fn cgroup(name: &str) -> Option<TestCgroup> {
    TestCgroup::new(name).expect("a cgroup")
}

#[test]
fn cpu_time_lies_between_two_readings_of_the_file() {
    let Some(mut group) = cgroup("cpu") else {
        return;
    };
    let (_place, _process, mut control) = started(None);
    let mut row = container_row(1);
    row.cgroup_path.clone_from(&group.path);
    group.run("while :; do :; done").expect("a busy loop");
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    until("CPU time being used", || {
        group.cpu_ns().filter(|ns| *ns > 50_000_000)
    })
    .expect("a busy loop");
    for _ in 0..5 {
        let before = group.cpu_ns().expect("the file");
        let tick = control
            .sample(row.container_id, |_| true)
            .expect("a sample")
            .tick;
        // The pass after the next one has begun after `before` was read.
        let sample = control
            .sample(row.container_id, |it| it.tick >= tick + 2)
            .expect("a sample");
        let after = group.cpu_ns().expect("the file");
        assert_eq!(sample.cpu.source, Source::Bpf, "root may load programs");
        let usage = sample.cpu.counters.usage_ns.expect("CPU time");
        assert!(
            before <= usage && usage <= after,
            "{before} <= {usage} <= {after}"
        );
        // Version 1 counts user time by the clock tick, while the usage is exact: on a machine that is
        // shared with much else the two differ a lot.
        let user = sample.cpu.counters.user_ns.expect("user time");
        let ticks = 100_000_000;
        assert!(
            user <= 2 * usage + ticks && user + ticks > usage / 4,
            "a busy loop runs in user mode: {user} of {usage}"
        );
    }
}

#[test]
fn throttling_is_counted() {
    let Some(mut group) = cgroup("quota") else {
        return;
    };
    let limited = if let Some(directory) = group.directory_with("cpu.cfs_quota_us") {
        std::fs::write(directory.join("cpu.cfs_quota_us"), "10000").is_ok()
    } else if let Some(directory) = group.directory_with("cpu.max") {
        std::fs::write(directory.join("cpu.max"), "10000 100000").is_ok()
    } else {
        panic!("neither version of the cpu controller is there");
    };
    assert!(limited, "the quota can't be set");
    let (_place, _process, mut control) = started(None);
    let mut row = container_row(2);
    row.cgroup_path.clone_from(&group.path);
    group.run("while :; do :; done").expect("a busy loop");
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    let sample = control
        .sample(row.container_id, |it| {
            it.cpu.counters.throttled_periods > Some(2)
        })
        .expect("throttled periods");
    assert!(sample.cpu.counters.periods >= sample.cpu.counters.throttled_periods);
    assert!(sample.cpu.counters.throttled_ns > Some(10_000_000));
}

#[test]
fn memory_tasks_and_limits_equal_the_files() {
    let Some(mut group) = cgroup("memory") else {
        return;
    };
    let limit = 300 * 1024 * 1024_u64;
    let memory = ["memory.limit_in_bytes", "memory.max"];
    for file in memory {
        if let Some(directory) = group.directory_with(file) {
            std::fs::write(directory.join(file), limit.to_string()).expect("the limit");
        }
    }
    let pids = group
        .directory_with("pids.max")
        .expect("the pids controller")
        .join("pids.max");
    std::fs::write(pids, "77").expect("the limit");
    let (_place, _process, mut control) = started(None);
    let mut row = container_row(3);
    row.cgroup_path.clone_from(&group.path);
    // Forty million bytes of a file in memory that only `sleep` still knows, then silence.
    group
        .run("f=/dev/shm/$$; head -c 40000000 /dev/zero > $f; exec 3<$f; rm $f; exec sleep 1000")
        .expect("an eater");
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    let used = |group: &TestCgroup| {
        group
            .number("memory.usage_in_bytes", None)
            .or_else(|| group.number("memory.current", None))
    };
    // Steady once `sleep` alone is left.
    until("the eater having become sleep", || {
        let procs = group.read(&["cgroup.procs"])?;
        let mut lines = procs.lines();
        let pid = lines.next()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (lines.next().is_none() && name.trim() == "sleep").then_some(())
    })
    .expect("sleep");
    let peak = |group: &TestCgroup| {
        group
            .number("memory.max_usage_in_bytes", None)
            .or_else(|| group.number("memory.peak", None))
    };
    let mut last = None;
    let sample = until(
        "a sample of a quiet moment that says what the file says",
        || {
            let before = used(&group)?;
            let tick = control.sample(row.container_id, |_| true).ok()?.tick;
            let sample = control.sample(row.container_id, |it| it.tick > tick);
            let sample = sample.ok()?;
            let current = sample.memory.counters.current_bytes;
            last = Some((before, current, used(&group)));
            (used(&group) == Some(before) && current == Some(before)).then_some(sample)
        },
    );
    let sample = sample.unwrap_or_else(|err| panic!("{err}: {last:?}"));
    let memory = sample.memory.get().expect("memory");
    assert!(memory.current_bytes >= Some(40_000_000), "{memory:?}");
    if let Some(peak) = peak(&group) {
        assert_eq!(memory.peak_bytes, Some(peak));
    }
    assert_eq!(memory.limit_bytes, Some(limit));
    assert!(memory.peak_bytes >= Some(40_000_000), "{memory:?}");
    assert!(memory.inactive_file_bytes.is_some() && memory.anon_bytes.is_some());
    assert_eq!(memory.oom_kill_events, Some(0));
    let tasks = sample.pids.get().expect("tasks");
    assert_eq!((tasks.current, tasks.limit), (Some(1), Some(77)));
}

#[test]
fn an_unlimited_container_says_so() {
    let Some(mut group) = cgroup("unlimited") else {
        return;
    };
    let (_place, _process, mut control) = started(None);
    let mut row = container_row(4);
    row.cgroup_path.clone_from(&group.path);
    group.run("exec sleep 1000").expect("a process");
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    let sample = control
        .sample(row.container_id, |it| it.memory.get().is_some())
        .expect("a sample");
    assert_eq!(sample.memory.counters.limit_bytes, Some(UNLIMITED));
    assert_eq!(sample.pids.counters.limit, Some(UNLIMITED));
}

#[test]
fn an_out_of_memory_kill_is_counted() {
    let Some(mut group) = cgroup("oom") else {
        return;
    };
    for (file, value) in [
        ("memory.limit_in_bytes", "16777216"),
        ("memory.memsw.limit_in_bytes", "16777216"),
        ("memory.max", "16777216"),
        ("memory.swap.max", "0"),
    ] {
        if let Some(directory) = group.directory_with(file) {
            let _ = std::fs::write(directory.join(file), value);
        }
    }
    let (_place, _process, mut control) = started(None);
    let mut row = container_row(5);
    row.cgroup_path.clone_from(&group.path);
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    group.run("tail /dev/zero").expect("an eater");
    let sample = control
        .sample(row.container_id, |it| {
            it.memory.counters.oom_kill_events > Some(0)
        })
        .expect("the kill is seen");
    // How often the limit was hit is the kernel's word; some kernels say 0 in version 1.
    let hits = group
        .number("memory.failcnt", None)
        .map(|hits| hits + group.number("memory.memsw.failcnt", None).unwrap_or(0))
        .or_else(|| group.number("memory.events", Some("max")));
    assert_eq!(sample.memory.counters.max_events, hits);
}

#[test]
fn a_container_that_goes_away_harms_only_itself_and_comes_back() {
    let Some(mut steady) = cgroup("steady") else {
        return;
    };
    let Some(mut fickle) = cgroup("fickle") else {
        return;
    };
    let (_place, process, mut control) = started(None);
    let (mut a, mut b, nowhere) = (container_row(6), container_row(7), container_row(8));
    a.cgroup_path.clone_from(&steady.path);
    b.cgroup_path.clone_from(&fickle.path);
    steady.run("exec sleep 1000").expect("a process");
    fickle.run("exec sleep 1000").expect("a process");
    control
        .write(|batch| {
            for row in [&a, &b, &nowhere] {
                batch.put_container(row.clone());
            }
        })
        .expect("written");
    control
        .sample(b.container_id, |it| it.cpu.get().is_some())
        .expect("both are there");
    fickle.remove().expect("removed under open descriptors");
    let gone = control
        .sample(b.container_id, |it| it.cpu.get().is_none())
        .expect("absent");
    assert_eq!(gone.memory.source, Source::Absent);
    assert_eq!(
        gone.memory.counters.current_bytes, None,
        "absent is not zero"
    );
    let neighbour = control
        .sample(a.container_id, |it| it.tick > gone.tick)
        .expect("the neighbour");
    assert!(neighbour.cpu.get().is_some() && neighbour.memory.get().is_some());
    let unknown = control
        .sample(nowhere.container_id, |it| it.tick > gone.tick)
        .expect("a row");
    assert_eq!(
        (unknown.cpu.source, unknown.net.source),
        (Source::Absent, Source::Absent)
    );

    // A restarted container has the same id and path, and new cgroups.
    let mut again = cgroup("fickle").expect("made before");
    again.run("exec sleep 1000").expect("a process");
    control
        .sample(b.container_id, |it| it.cpu.get().is_some())
        .expect("found again");

    // A removed row is forgotten, and its descriptors are closed.
    let open = |needle: &str| {
        std::fs::read_dir(format!("/proc/{}/fd", process.pid()))
            .expect("descriptors")
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .filter(|path| path.to_string_lossy().contains(needle))
            .count()
    };
    control
        .write(|batch| batch.remove_container(b.container_id))
        .expect("written");
    until("the sample being forgotten", || {
        control
            .observed
            .snapshot()
            .ok()?
            .container(b.container_id)
            .is_none()
            .then_some(())
    })
    .expect("forgotten");
    assert_eq!(open("/fickle/"), 0);
}

#[test]
fn network_counters_are_the_interfaces_own_seen_from_inside() {
    let Some(pair) = VethPair::new("net").expect("namespaces") else {
        return;
    };
    let (_place, _process, mut control) = started(Some(&pair.host));
    let mut row = container_row(9);
    row.link_indexes = vec![pair.host_index];
    let mut on_host_network = container_row(10);
    on_host_network.host_network = true;
    on_host_network.link_indexes = vec![pair.host_index];
    let mut half = container_row(11);
    half.link_indexes = vec![pair.host_index, 987_654];
    control
        .write(|batch| {
            for row in [&row, &on_host_network, &half] {
                batch.put_container(row.clone());
            }
        })
        .expect("written");
    // Datagrams to a port nobody has: bytes in, and answers that say so out.
    let sent = pair
        .in_host("bash")
        .args([
            "-c",
            &format!(
                "for i in $(seq 300); do printf %01000d 0 >/dev/udp/{CONTAINER_ADDRESS}/9 || :; done"
            ),
        ])
        .output()
        .expect("bash");
    assert!(sent.status.success(), "{sent:?}");
    // The kernel's own numbers, read inside the container.
    let text = pair
        .in_container("cat")
        .arg("/proc/net/dev")
        .output()
        .expect("counters");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let line = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("eth0:"))
        .expect("eth0");
    let numbers: Vec<u64> = line
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let (rx_bytes, rx_packets, tx_bytes) = (numbers[0], numbers[1], numbers[8]);
    assert!(rx_bytes > 200_000);
    let sample = control
        .sample(row.container_id, |it| {
            it.net.counters.rx_bytes >= Some(rx_bytes) && it.net.source == Source::Bpf
        })
        .expect("the bytes are seen, by the kernel program");
    // Router solicitations of IPv6 may still come after the reading.
    let near =
        |got: Option<u64>, want: u64| got.is_some_and(|got| got >= want && got < want + 2000);
    assert!(
        near(sample.net.counters.rx_bytes, rx_bytes),
        "{sample:?} {rx_bytes}"
    );
    assert!(
        near(sample.net.counters.tx_bytes, tx_bytes),
        "{sample:?} {tx_bytes}"
    );
    assert!(sample.net.counters.rx_packets >= Some(rx_packets));
    for id in [on_host_network.container_id, half.container_id] {
        let sample = control.sample(id, |_| true).expect("a sample");
        assert_eq!(
            sample.net.source,
            Source::Absent,
            "never the host's, never a part"
        );
    }
    pair.delete_link().expect("the link's end");
    control
        .sample(row.container_id, |it| it.net.get().is_none())
        .expect("absent, not zero");
}

#[test]
fn the_nodes_numbers_agree_with_its_files_and_ticks_go_on() {
    let (_place, process, mut control) = started(None);
    let first = until("a node sample", || {
        control.observed.snapshot().ok()?.node.clone()
    })
    .expect("a node");
    let second = until("the next reading", || {
        control
            .observed
            .snapshot()
            .ok()?
            .node
            .clone()
            .filter(|node| node.taken_monotonic_ns > first.taken_monotonic_ns)
    })
    .expect("passes");
    assert!(second.tick > first.tick);
    let (a, b) = (first.counters, second.counters);
    assert!(b.cpu_total_ns > a.cpu_total_ns && b.cpu_idle_ns >= a.cpu_idle_ns);
    let cpus = thread::available_parallelism().map_or(1, usize::from) as u64;
    let (elapsed, counted) = (
        second.taken_monotonic_ns - first.taken_monotonic_ns,
        b.cpu_total_ns.unwrap_or(0) - a.cpu_total_ns.unwrap_or(0),
    );
    let ticks = 20_000_000 * cpus;
    assert!(
        counted <= elapsed * cpus + ticks * 4,
        "{counted} in {elapsed} on {cpus}"
    );
    let meminfo = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
    let total: u64 = meminfo
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()
        })
        .expect("MemTotal");
    assert_eq!(b.memory_total_bytes, Some(total * 1024));
    assert!(b.memory_available_bytes < b.memory_total_bytes);
    assert!(b.pass_ns.is_some_and(|ns| ns > 0));
    assert_eq!(b.containers_sampled, Some(0));
    let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid()))
        .expect("descriptors")
        .count() as u64;
    if let Some(said) = b.descriptors_open {
        assert!(said.abs_diff(open) <= 3, "{said} said, {open} seen");
    }
    let gap = second.taken_monotonic_ns - first.taken_monotonic_ns;
    assert!(
        gap >= 500_000_000,
        "passes are 100 ms apart, readings of the node 500: {gap}"
    );
}

#[test]
fn processes_and_shared_memory_are_seen_from_both_sides() {
    let row_of = container_row(12);
    let Some(mut group) = cgroup(&row_of.container_id.to_string()) else {
        return;
    };
    let (_place, _process, mut control) = started(None);
    // A mount and a pid namespace of its own, as a container has; the process that is known outside
    // is the one that made them.
    let pid = group
        .run(
            "exec unshare --mount --pid --fork sh -c '\
             mount -t tmpfs -o size=8m tmpfs /dev/shm && \
             head -c 3000000 /dev/zero > /dev/shm/used && exec sleep 1000'",
        )
        .expect("namespaces");
    let mut row = row_of;
    row.cgroup_path.clone_from(&group.path);
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    let inner = until("the sleeping process being listed", || {
        let processes = control.observed.processes().ok()?;
        processes
            .list
            .into_iter()
            .find(|it| it.container_id == row.container_id && it.name == "sleep")
    })
    .expect("a process");
    assert_eq!(inner.container_pid, 1, "first in its namespace");
    assert_eq!(inner.parent_pid, pid);
    let procs = group.read(&["cgroup.procs"]).expect("the file");
    assert!(procs.lines().any(|line| line == inner.pid.to_string()));
    assert!(inner.counters.rss_bytes > Some(0) && inner.threads == 1);

    row.init_pid = inner.pid;
    control
        .write(|batch| batch.put_container(row.clone()))
        .expect("written");
    let sample = control
        .sample(row.container_id, |it| {
            it.disk.counters.shm_bytes >= Some(3_000_000)
        })
        .expect("the bytes are seen");
    assert_eq!(sample.disk.counters.shm_limit_bytes, Some(8 << 20));
    assert!(sample.disk.counters.shm_bytes < Some(4_000_000));
    assert_eq!(sample.disk.counters.scratch_bytes, None, "absent, not zero");
}
