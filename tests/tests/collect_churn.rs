//! Containers that come and go leave nothing in the dataplane: no descriptor, no row, no memory.
//!
//! `SOAK_SECONDS` (set by `make soak-stats`) has it go on for so long.

use std::time::{Duration, Instant};

use harness::cgroup::TestCgroup;
use harness::dataplane::{Options, Place, Process, container_row, until};
use shared::desired::ContainerRow;

const CONTAINERS: u8 = 12;
const ROUNDS: u32 = 6;

/// Open descriptors, resident memory in KiB and threads of the process.
fn held(process: &Process) -> (usize, u64, usize) {
    let at = format!("/proc/{}", process.pid());
    let count = |of: &str| std::fs::read_dir(format!("{at}/{of}")).map_or(0, Iterator::count);
    let status = std::fs::read_to_string(format!("{at}/status")).unwrap_or_default();
    let resident = status.lines().find_map(|line| {
        let rest = line.strip_prefix("VmRSS:")?;
        rest.trim().strip_suffix(" kB")?.parse().ok()
    });
    (count("fd"), resident.unwrap_or(0), count("task"))
}

#[test]
fn containers_that_come_and_go_leave_nothing() {
    let soak = std::env::var("SOAK_SECONDS").ok();
    let soak = soak
        .and_then(|text| text.parse().ok())
        .map(Duration::from_secs);
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        ..Options::default()
    })
    .expect("a place");
    let mut control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    let (begun, mut settled, mut round) = (Instant::now(), None, 0_u32);
    while round < ROUNDS || soak.is_some_and(|soak| begun.elapsed() < soak) {
        round += 1;
        let mut groups = Vec::new();
        for number in 0..CONTAINERS {
            let Some(mut group) =
                TestCgroup::new(&format!("churn-{round}-{number}")).expect("a cgroup")
            else {
                return;
            };
            group.run("exec sleep 1000").expect("a process");
            groups.push(group);
        }
        let rows: Vec<_> = (0..CONTAINERS)
            .zip(&groups)
            .map(|(number, group)| {
                let mut row = container_row(number + 1);
                // Each is another container.
                row.container_id.0[..4].copy_from_slice(&round.to_be_bytes());
                row.cgroup_path.clone_from(&group.path);
                row
            })
            .collect();
        control
            .write(|batch| rows.iter().for_each(|row| batch.put_container(row.clone())))
            .expect("written");
        for row in &rows {
            control
                .sample(row.container_id, |sample| {
                    sample.cpu.get().is_some() && sample.pids.counters.current == Some(1)
                })
                .expect("each is sampled");
        }
        // The program that lists processes is loaded by then, however long that takes.
        until("their processes being listed", || {
            let listing = control.observed.processes().ok()?;
            let is_listed = |row: &ContainerRow| {
                let mut list = listing.list.iter();
                list.any(|it| it.container_id == row.container_id)
            };
            rows.iter().all(is_listed).then_some(())
        })
        .expect("a listing");
        // Half of them lose their cgroup before their row goes.
        groups.truncate(usize::from(CONTAINERS / 2));
        control
            .write(|batch| {
                rows.iter()
                    .for_each(|row| batch.remove_container(row.container_id));
            })
            .expect("written");
        drop(groups);
        until("no sample being left", || {
            let snapshot = control.observed.snapshot().ok()?;
            snapshot.containers.is_empty().then_some(())
        })
        .expect("samples end with their containers");
        // As control does: without it the region is full of removed rows before long.
        let mut freed = 0;
        until("the rows being free again", || {
            freed += control.release();
            (freed == usize::from(CONTAINERS)).then_some(())
        })
        .expect("removals are acknowledged");
        let tick = |control: &mut harness::dataplane::Control| {
            let snapshot = control.observed.snapshot().ok()?;
            Some(snapshot.node.as_ref()?.tick)
        };
        // A walk that nobody asks is given up after a few passes.
        let from = until("a tick", || tick(&mut control)).expect("ticks");
        until("five more passes", || {
            tick(&mut control).filter(|tick| *tick >= from + 5)
        })
        .expect("ticks");
        let (descriptors, resident, threads) = *settled.get_or_insert_with(|| held(&process));
        // Whoever reads a file at this moment holds a descriptor more; what leaked stays.
        let mut now = held(&process);
        let settles = until("no more descriptors and threads than at first", || {
            now = held(&process);
            (now.0 <= descriptors && now.2 <= threads).then_some(())
        });
        assert!(
            settles.is_ok(),
            "round {round}: descriptors {descriptors} to {}, threads {threads} to {}",
            now.0,
            now.2
        );
        // The allocator's own ways need some room.
        assert!(
            now.1 <= resident + 16 * 1024,
            "round {round}: {resident} KiB to {} KiB",
            now.1
        );
        if soak.is_some() && round.is_multiple_of(50) {
            println!("round {round} after {:?}: {now:?}", begun.elapsed());
        }
    }
}
