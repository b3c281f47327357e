//! The kernel program against the kernel's files, on this host.
//!
//! Cgroups of our own, each with other limits so that two numbers taken for each other are seen, one
//! with a cgroup below it, all quiet while they are read.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::desired::ContainerRow;
use shared::ids::{ContainerId, Generation};
use shared::observed::{ContainerSample, Source};

use super::disk::Disk;
use super::facts::{Facts, Hierarchy};
use super::{Means, Sampler};
use crate::forward::relay::port::Totals;

const GROUPS: u8 = 3;

struct Tree {
    name: String,
    roots: Vec<PathBuf>,
    tasks: Vec<Child>,
}

impl Tree {
    fn new() -> Self {
        let tree = Self {
            name: format!("bai-truth-{}", std::process::id()),
            roots: Facts::gather().mounts(),
            tasks: Vec::new(),
        };
        for root in &tree.roots {
            let top = root.join(&tree.name);
            std::fs::create_dir_all(&top).expect("a cgroup");
            for place in [root, &top] {
                for controller in ["cpu", "memory", "pids", "io"] {
                    // Only the unified hierarchy has this file.
                    let _ = std::fs::write(
                        place.join("cgroup.subtree_control"),
                        format!("+{controller}"),
                    );
                }
            }
            for number in 0..GROUPS {
                std::fs::create_dir_all(top.join(number.to_string())).expect("a cgroup");
            }
            if !top.join("0/cgroup.controllers").exists() {
                std::fs::create_dir_all(top.join("0/below")).expect("a cgroup");
            }
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

fn sampler(means: Means) -> Sampler {
    let totals = Arc::new(Totals::default());
    Sampler::new(totals, Disk::start().expect("a thread"), None, 1_000, means)
}

/// What is compared: the clock tick's user and system time may move for a moment after a task sleeps.
fn comparable(sample: &ContainerSample, unified: bool) -> impl PartialEq + std::fmt::Debug + use<> {
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
    (cpu, sample.memory.counters, sample.pids.counters)
}

#[test]
fn the_program_says_what_the_files_say() {
    if !rustix::process::geteuid().is_root() {
        crate::skip::needs("making cgroups needs root");
        return;
    }
    let mut tree = Tree::new();
    let unified = matches!(Facts::gather().cpu, Some(Hierarchy::V2(_)));
    for group in 0..GROUPS {
        let number = u64::from(group);
        tree.set(group, "memory.limit_in_bytes", (300 + number * 7) << 20);
        tree.set(
            group,
            "memory.memsw.limit_in_bytes",
            (500 + number * 11) << 20,
        );
        tree.set(group, "memory.max", (300 + number * 7) << 20);
        tree.set(group, "pids.max", 77 + number * 13);
        tree.set(group, "cpu.cfs_quota_us", 60_000 + number * 1_000);
    }
    let below = if tree
        .roots
        .iter()
        .all(|root| root.join(&tree.name).join("0/below").exists())
    {
        "0/below"
    } else {
        "0"
    };
    tree.run(
        below,
        "v=$(head -c 20000000 /dev/zero | tr '\\0' x); exec sleep 1000 # $v",
    );
    tree.run(
        "1",
        "head -c 30000000 /dev/zero > /dev/shm/$$; rm /dev/shm/$$; exec sleep 1000",
    );
    tree.run(
        "2",
        "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; exec sleep 1000",
    );
    let rows = tree.rows();
    let (mut program, mut files) = (
        sampler(Means::Best { containers: 64 }),
        sampler(Means::Files),
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
            .all(|(before, after)| comparable(&before, unified) == comparable(&after, unified));
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
            .all(|(ours, files)| comparable(&ours, unified) == comparable(&files, unified));
        // On a busy machine a pass may run out of time, and goes on with files.
        let by_program = ours
            .samples
            .iter()
            .all(|it| [it.cpu.source, it.memory.source, it.pids.source] == [Source::Bpf; 3]);
        // The tools that made the shells' memory have ended; what is below counts too.
        let alone = ours
            .samples
            .iter()
            .all(|it| it.pids.counters.current == Some(1));
        if quiet && peaks && equal && by_program && alone {
            for sample in ours.samples.iter() {
                let cpu = &sample.cpu.counters;
                assert!(cpu.usage_ns > Some(0));
                if unified {
                    let parts = cpu.user_ns.zip(cpu.system_ns);
                    assert_eq!(parts.map(|(user, system)| user + system), cpu.usage_ns);
                }
                assert!(sample.memory.counters.limit_bytes < Some(400 << 20));
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
