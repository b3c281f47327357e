//! The kernel program against the kernel's files, on this host.
//!
//! Cgroups of our own, each with other limits so that two numbers taken for each other are seen, one
//! with a cgroup below it, all quiet while they are read; and of others that are busy, what lies between.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::ContainerRow;
use shared::ids::{ContainerId, Generation};
use shared::observed::{ContainerSample, Source};

use super::disk::Disk;
use super::hierarchies::{CgroupHierarchies, Hierarchy};
use super::{ReadMethod, Sampler};
use crate::forward::relay::port::Totals;

const GROUPS: u8 = 3;

struct Tree {
    name: String,
    roots: Vec<PathBuf>,
    tasks: Vec<Child>,
}

impl Tree {
    fn new(name: &str) -> Self {
        let tree = Self {
            name: format!("bai-{name}-{}", std::process::id()),
            roots: CgroupHierarchies::gather().mounts(),
            tasks: Vec::new(),
        };
        for root in &tree.roots {
            let top = root.join(&tree.name);
            for number in 0..GROUPS {
                std::fs::create_dir_all(top.join(number.to_string())).expect("a cgroup");
            }
            for place in [root, &top, &top.join("0")] {
                for controller in ["cpu", "memory", "pids", "io"] {
                    // Only the unified hierarchy has this file.
                    let _ = std::fs::write(
                        place.join("cgroup.subtree_control"),
                        format!("+{controller}"),
                    );
                }
            }
            std::fs::create_dir_all(top.join("0/below")).expect("a cgroup");
        }
        tree
    }

    /// Writes to a file of a group, in whichever hierarchy has it.
    fn set(&self, group: u8, file: &str, value: u64) {
        for root in &self.roots {
            let path = root.join(format!("{}/{group}/{file}", self.name));
            if path.exists() {
                let _ = std::fs::write(path, value.to_string());
            }
        }
    }

    /// Whether any hierarchy has a file of a group.
    fn has(&self, group: u8, file: &str) -> bool {
        let path = format!("{}/{group}/{file}", self.name);
        self.roots.iter().any(|root| root.join(&path).exists())
    }

    fn run(&mut self, group: &str, script: &str) {
        let enter: String = self
            .roots
            .iter()
            .map(|root| root.join(&self.name).join(group))
            .map(|path| format!("echo $$ > {}/cgroup.procs; ", path.display()))
            .collect();
        let task = Command::new("sh")
            .args(["-c", &format!("{enter}{script}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("sh");
        self.tasks.push(task);
    }

    fn rows(&self) -> Vec<ContainerRow> {
        (0..GROUPS)
            .map(|number| ContainerRow {
                container_id: ContainerId([number + 1; 32]),
                cgroup_path: format!("{}/{number}", self.name),
                generation: Generation(1),
                ..ContainerRow::default()
            })
            .collect()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        for task in &mut self.tasks {
            let _ = task.kill();
            let _ = task.wait();
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        for root in &self.roots {
            let top = root.join(&self.name);
            let inner = ["0/below", "0", "1", "2", ""].map(|path| top.join(path));
            for path in inner {
                while path.exists()
                    && std::fs::remove_dir(&path).is_err()
                    && Instant::now() < deadline
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }
}

fn sampler(method: ReadMethod) -> Sampler {
    let totals = Arc::new(Totals::default());
    Sampler::new(
        totals,
        Disk::start().expect("a thread"),
        None,
        1_000,
        method,
    )
}

/// Whether `dd` does this.
fn dd(words: &[&str]) -> bool {
    let done = Command::new("dd")
        .args(words)
        .stderr(Stdio::null())
        .status();
    done.is_ok_and(|it| it.success())
}

/// Whether a block device lies behind a directory, so that a task can be charged for it, and files there
/// are read and written past the cache; else says why not.
fn on_a_disk(place: &str) -> Result<(), &'static str> {
    let device = std::fs::metadata(place).map(|it| it.dev());
    let is_one = device.is_ok_and(|it| {
        let (major, minor) = (rustix::fs::major(it), rustix::fs::minor(it));
        Path::new(&format!("/sys/dev/block/{major}:{minor}")).exists()
    });
    if !is_one {
        return Err("no block device lies behind /var/tmp");
    }
    let file = format!("{place}/bai-direct-{}", std::process::id());
    let (to, from) = (format!("of={file}"), format!("if={file}"));
    let direct = dd(&["if=/dev/zero", &to, "bs=64k", "count=1", "oflag=direct"])
        && dd(&[&from, "of=/dev/null", "bs=64k", "count=1", "iflag=direct"]);
    let _ = std::fs::remove_file(&file);
    direct
        .then_some(())
        .ok_or("files in /var/tmp can't be written past the cache")
}

/// Disks that are read past the cache. Of devices made of files or memory others do the work, who may
/// not be told for whom.
fn disks() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/sys/block").into_iter().flatten();
    let names = entries.flatten().map(|entry| entry.file_name());
    let made_up = |name: &str| {
        ["loop", "zram", "ram", "nbd"]
            .iter()
            .any(|it| name.starts_with(it))
    };
    let names = names.filter(|name| name.to_str().is_some_and(|name| !made_up(name)));
    let places = names.map(|name| Path::new("/dev").join(name));
    let readable = |place: &PathBuf| {
        let from = format!("if={}", place.display());
        dd(&[&from, "of=/dev/null", "bs=4k", "count=3", "iflag=direct"])
    };
    places.filter(readable).take(8).collect()
}

/// What is compared: the clock tick's user and system time may move for a moment after a task sleeps.
fn comparable(
    sample: &ContainerSample,
    unified: bool,
    counts_io: bool,
) -> impl PartialEq + std::fmt::Debug + use<> {
    let mut cpu = sample.cpu.counters;
    if unified {
        // The files count microseconds. How they split them depends on when they were read before.
        for time in [&mut cpu.usage_ns, &mut cpu.throttled_ns] {
            *time = time.map(|ns| ns / 1000);
        }
        (cpu.user_ns, cpu.system_ns) = (None, None);
        // Waiting goes on being counted while nobody waits.
        cpu.pressure_some_ns = cpu.pressure_some_ns.map(|_| 0);
    }
    let mut io = sample.io.counters;
    (io.pressure_some_ns, io.pressure_full_ns) = (None, None);
    // In version 1 the files may count nothing, and the program begins with itself.
    let io = Some(io).filter(|_| counts_io);
    (cpu, sample.memory.counters, sample.pids.counters, io)
}

#[test]
fn the_program_says_what_the_files_say() {
    if !rustix::process::geteuid().is_root() {
        crate::skip::needs("making cgroups needs root");
        return;
    }
    let mut tree = Tree::new("truth");
    let unified = matches!(CgroupHierarchies::gather().cpu, Some(Hierarchy::V2(_)));
    let counts_io = matches!(CgroupHierarchies::gather().io, Some(Hierarchy::V2(_)));
    for group in 0..GROUPS {
        let number = u64::from(group);
        tree.set(group, "memory.limit_in_bytes", (300 + number * 7) << 20);
        tree.set(
            group,
            "memory.memsw.limit_in_bytes",
            (500 + number * 11) << 20,
        );
        tree.set(group, "memory.max", (300 + number * 7) << 20);
        tree.set(group, "memory.swap.max", (200 + number * 17) << 20);
        tree.set(group, "pids.max", 77 + number * 13);
        tree.set(group, "cpu.cfs_quota_us", 60_000 + number * 1_000);
    }
    // Two write and read, one of them on all disks.
    let disk = on_a_disk("/var/tmp");
    if let Err(reason) = disk
        && counts_io
    {
        crate::skip::here(format!("bytes of a known number: {reason}"), false);
    }
    let on_disk = counts_io && disk.is_ok();
    let disks = if on_disk { disks() } else { Vec::new() };
    let mut moves = ["", ""].map(str::to_owned);
    if on_disk {
        moves = [(30, 20), (50, 10)].map(|(written, read)| {
            format!(
                "f=/var/tmp/bai-truth-$$; dd if=/dev/zero of=$f bs=64k count={written} oflag=direct 2>/dev/null; \
                 dd if=$f of=/dev/null bs=64k count={read} iflag=direct 2>/dev/null; rm $f; "
            )
        });
        for disk in &disks {
            moves[1] += &format!(
                "dd if={} of=/dev/null bs=4k count=3 iflag=direct 2>/dev/null; ",
                disk.display()
            );
        }
    }
    tree.run(
        "0/below",
        &format!(
            "{}v=$(head -c 20000000 /dev/zero | tr '\\0' x); exec sleep 1000 # $v",
            moves[0]
        ),
    );
    tree.run(
        "1",
        &format!(
            "{}head -c 30000000 /dev/zero > /dev/shm/$$; rm /dev/shm/$$; exec sleep 1000",
            moves[1]
        ),
    );
    tree.run(
        "2",
        "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exec sleep 1000",
    );
    let rows = tree.rows();
    let (mut program, mut files) = (
        sampler(ReadMethod::Best { containers: 64 }),
        sampler(ReadMethod::Files),
    );
    for sampler in [&mut program, &mut files] {
        sampler.follow(&rows, true);
    }
    // The first pass makes the walk known.
    program.pass();
    // The kernel adds up memory statistics every two seconds by itself; until then either may lag.
    let deadline = Instant::now() + Duration::from_secs(240);
    loop {
        let before = files.pass();
        let ours = program.pass();
        let after = files.pass();
        let quiet = before
            .samples
            .iter()
            .zip(after.samples.iter())
            .all(|(before, after)| {
                comparable(&before, unified, counts_io) == comparable(&after, unified, counts_io)
            });
        // The two that take memory have done so.
        let peaks = ours
            .samples
            .iter()
            .take(2)
            .all(|it| it.memory.counters.peak_bytes >= Some(15 << 20));
        let equal = ours
            .samples
            .iter()
            .zip(after.samples.iter())
            .all(|(ours, files)| {
                comparable(&ours, unified, counts_io) == comparable(&files, unified, counts_io)
            });
        // On a busy machine a pass may run out of time, and goes on with files.
        let by_program = ours.samples.iter().all(|it| {
            [it.cpu.source, it.memory.source, it.pids.source] == [Source::Bpf; 3]
                && (!counts_io || it.io.source == Source::Bpf)
        });
        // The tools that made the shells' memory have ended; what is below counts too.
        let alone = ours
            .samples
            .iter()
            .all(|it| it.pids.counters.current == Some(1));
        if quiet && peaks && equal && by_program && alone {
            for (group, sample) in (0..GROUPS).zip(ours.samples.iter()) {
                let number = u64::from(group);
                let swap_limit = if tree.has(group, "memory.swap.max") {
                    Some((200 + number * 17) << 20)
                } else if tree.has(group, "memory.memsw.limit_in_bytes") {
                    Some((500 + number * 11) << 20)
                } else {
                    None
                };
                let memory = &sample.memory.counters;
                assert_eq!(memory.swap_limit_bytes, swap_limit);
                assert_eq!(memory.swap_bytes.is_some(), swap_limit.is_some());
                let cpu = &sample.cpu.counters;
                assert!(cpu.usage_ns > Some(0));
                if unified {
                    let parts = cpu.user_ns.zip(cpu.system_ns);
                    assert_eq!(parts.map(|(user, system)| user + system), cpu.usage_ns);
                }
                assert!(sample.memory.counters.limit_bytes < Some(400 << 20));
            }
            if on_disk {
                for (place, read, written) in [(0, 20, 30), (1, 10, 50)] {
                    let io = ours.samples.iter().nth(place).expect("a sample").io;
                    assert!(io.counters.read_bytes >= Some(read << 16), "{io:?}");
                    assert!(io.counters.write_bytes >= Some(written << 16), "{io:?}");
                }
                let files = tree.roots.iter().map(|root| root.join(&tree.name));
                let text: String = files
                    .filter_map(|top| std::fs::read_to_string(top.join("1/io.stat")).ok())
                    .collect();
                assert!(
                    text.matches("rbytes=").count() >= disks.len(),
                    "{disks:?} {text}"
                );
                println!("{text}");
            }
            return;
        }
        assert!(
            Instant::now() < deadline,
            "quiet {quiet}: the program says\n{:#?}\nthe files\n{:#?}",
            ours.samples.iter().collect::<Vec<_>>(),
            after.samples.iter().collect::<Vec<_>>()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Below what the files say after it and above what they said before it, whatever is going on.
#[test]
fn while_block_devices_are_busy_the_program_says_what_lies_between() {
    if !rustix::process::geteuid().is_root() {
        crate::skip::needs("making cgroups needs root");
        return;
    }
    if !matches!(CgroupHierarchies::gather().io, Some(Hierarchy::V2(_))) {
        crate::skip::here("no block device is counted by the unified hierarchy", false);
        return;
    }
    if let Err(reason) = on_a_disk("/var/tmp") {
        crate::skip::here(reason, false);
        return;
    }
    let mut tree = Tree::new("busy");
    let file = |group: usize| format!("/var/tmp/bai-busy-{}-{group}", std::process::id());
    // The last one does nothing.
    for (number, group) in ["0/below", "1"].into_iter().enumerate() {
        let file = file(number);
        tree.run(
            group,
            &format!(
                "while :; do dd if=/dev/zero of={file} bs=64k count=20 oflag=direct 2>/dev/null; \
                 dd if={file} of=/dev/null bs=64k iflag=direct 2>/dev/null; done"
            ),
        );
    }
    let rows = tree.rows();
    let (mut program, mut files) = (
        sampler(ReadMethod::Best { containers: 64 }),
        sampler(ReadMethod::Files),
    );
    for sampler in [&mut program, &mut files] {
        sampler.follow(&rows, true);
    }
    let numbers = |sampler: &mut Sampler| -> Vec<(Source, [Option<u64>; 4])> {
        let pass = sampler.pass();
        let one = |it: ContainerSample| {
            let io = it.io.counters;
            let bytes = [io.read_bytes, io.write_bytes];
            let operations = [io.read_operations, io.write_operations];
            let all = [bytes[0], bytes[1], operations[0], operations[1]];
            (it.io.source, all)
        };
        pass.samples.iter().map(one).collect()
    };
    let deadline = Instant::now() + Duration::from_secs(240);
    let (mut first, mut compared) = (None, 0);
    loop {
        let before = numbers(&mut files);
        let ours = numbers(&mut program);
        let after = numbers(&mut files);
        for ((before, ours), after) in before.iter().zip(&ours).zip(&after) {
            for ((before, ours), after) in before.1.iter().zip(ours.1).zip(after.1) {
                assert!(
                    *before <= ours && ours <= after,
                    "{before:?} {ours:?} {after:?}"
                );
            }
        }
        // The first pass makes the walk known.
        let by_program = ours.iter().all(|(source, _)| *source == Source::Bpf);
        compared += u32::from(by_program);
        let first = first.get_or_insert_with(|| ours.clone());
        let moved = |group: usize| {
            let all = first[group].1.iter().zip(ours[group].1);
            all.into_iter().all(|(first, now)| *first < now)
        };
        if compared >= 20 && moved(0) && moved(1) {
            assert_eq!(ours[2].1, [Some(0); 4], "nothing was done there");
            break;
        }
        assert!(Instant::now() < deadline, "{compared} of {ours:?}");
    }
    drop(tree);
    for number in 0..2 {
        std::fs::remove_file(file(number)).expect("removed");
    }
}
