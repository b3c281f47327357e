use std::fmt::Write;

use serde_json::Value;
use shared::observed::{
    AcceleratorCounters, AcceleratorUse, CpuCounters, DiskCounters, IoCounters, Measured,
    MemoryCounters, NetCounters, NodeCounters, NodeSample, Source,
};

use super::super::fixture::card;
use super::super::record::pack;
use super::*;

const CONTAINER: ContainerId = ContainerId([7; 32]);

fn facts() -> KernelFacts {
    KernelFacts {
        id: KernelId([1; 16]),
        container: CONTAINER,
        adopted: false,
        devices: vec![HeldDevices {
            name: "cuda".to_owned(),
            ids: vec!["0".to_owned()],
            shared: false,
        }],
        scaled_by_load: false,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn gpu(used: u64, total: u64, permille: Option<u64>) -> AcceleratorRow {
    card(
        0,
        AcceleratorCounters {
            memory_total_bytes: Some(total),
            memory_used_bytes: Some(used),
            utilisation_permille: permille,
            ..AcceleratorCounters::default()
        },
    )
}

fn snapshot(sample: ContainerSample, accelerators: Vec<AcceleratorRow>) -> ObservedSnapshot {
    ObservedSnapshot {
        containers: vec![sample].into(),
        accelerators,
        node: Some(NodeSample {
            counters: NodeCounters {
                memory_total_bytes: Some(16 << 30),
                ..NodeCounters::default()
            },
            ..NodeSample::default()
        }),
        ..ObservedSnapshot::default()
    }
}

/// The sample whose record the original wrote.
fn sample(second: u64) -> ContainerSample {
    ContainerSample {
        container_id: CONTAINER,
        taken_monotonic_ns: second * 1_000_000_000,
        cpu: Measured::now(
            Source::File,
            CpuCounters {
                usage_ns: Some(1_000_000_000),
                ..CpuCounters::default()
            },
        ),
        memory: Measured::now(
            Source::File,
            MemoryCounters {
                current_bytes: Some(3000),
                inactive_file_bytes: Some(1000),
                limit_bytes: Some(1 << 30),
                ..MemoryCounters::default()
            },
        ),
        ..ContainerSample::default()
    }
}

/// A pass at the moment of the newest sample, one in 5 s.
fn see(
    kernels: &mut Kernels,
    facts: &[KernelFacts],
    snapshot: &ObservedSnapshot,
) -> Vec<(KernelId, StatRecord)> {
    let taken = snapshot.containers.iter();
    let now_ns = taken.map(|sample| sample.taken_monotonic_ns).max();
    kernels.observe(
        facts,
        &none(),
        snapshot,
        at(now_ns.unwrap_or(0) / 1_000_000_000),
    )
}

/// No kernel starts again.
fn none() -> HashSet<KernelId> {
    HashSet::new()
}

fn at(second: u64) -> Moment {
    Moment {
        now_ns: second * 1_000_000_000,
        interval: Duration::from_secs(5),
    }
}

#[test]
fn bytes_are_those_of_the_original() {
    let golden: Value = serde_json::from_str(include_str!(
        "../../../../tests/vectors/telemetry/live_stat.json"
    ))
    .unwrap();
    let inputs = &golden["inputs"];
    let mut kernels = Kernels::default();
    for (round, wanted) in golden["rounds"].as_array().unwrap().iter().enumerate() {
        let number = |key: &str| -> Decimal {
            inputs[key]["values"][round]
                .as_str()
                .unwrap()
                .parse()
                .unwrap()
        };
        let whole = |key: &str| u64::try_from(number(key)).unwrap();
        let capacity = |key: &str| inputs[key]["capacity"].as_str().unwrap().parse().unwrap();
        let mut sample = sample(1000 + 5 * u64::try_from(round).unwrap());
        sample.cpu.counters.usage_ns =
            Some(u64::try_from(number("cpu_util") * Decimal::from(1_000_000)).unwrap());
        sample.memory.counters.inactive_file_bytes = Some(4096);
        sample.memory.counters.current_bytes = Some(whole("mem") + 4096);
        sample.memory.counters.limit_bytes = Some(capacity("mem"));
        sample.io = Measured::now(
            Source::File,
            IoCounters {
                read_bytes: Some(whole("io_read")),
                write_bytes: Some(whole("io_write")),
                ..IoCounters::default()
            },
        );
        sample.net = Measured::now(
            Source::Netlink,
            NetCounters {
                rx_bytes: Some(whole("net_rx")),
                tx_bytes: Some(whole("net_tx")),
                ..NetCounters::default()
            },
        );
        sample.disk = Measured::now(
            Source::Walk,
            DiskCounters {
                scratch_bytes: Some(0),
                ..DiskCounters::default()
            },
        );
        let load = whole("cuda_util") * 10;
        let gpu0 = gpu(whole("cuda_mem"), capacity("cuda_mem"), Some(load));
        let records = see(&mut kernels, &[facts()], &snapshot(sample, vec![gpu0]));
        let [(kernel, record)] = records.as_slice() else {
            panic!("one record is expected: {records:?}");
        };
        assert_eq!(*kernel, facts().id);
        assert_eq!(
            hex(&pack(record).unwrap()),
            wanted["value_hex"].as_str().unwrap(),
            "round {round}: {}",
            serde_json::to_string_pretty(record).unwrap()
        );
    }
}

#[test]
fn every_key_is_there_whatever_was_measured() {
    let mut kernels = Kernels::default();
    let records = see(&mut kernels, &[facts()], &snapshot(sample(1), Vec::new()));
    let record = &records[0].1;
    let keys: Vec<&str> = record.0.iter().map(|(key, _)| &**key).collect();
    assert_eq!(
        keys,
        [
            "cpu_util",
            "cpu_used",
            "mem",
            "io_read",
            "io_write",
            "net_rx",
            "net_tx",
            "io_scratch_size",
            "cuda_mem",
            "cuda_util"
        ]
    );
    let percentage = |key: &str| record.get(key).unwrap().percentage.as_str();
    assert_eq!(percentage("net_rx"), "0.00");
    // A device whose load nobody could read must not look idle.
    assert_eq!(percentage("cuda_util"), "100");
    assert_eq!(percentage("cuda_mem"), "100");
}

#[test]
fn a_record_waits_until_cpu_and_memory_were_read() {
    let mut kernels = Kernels::default();
    let mut first = sample(1);
    first.memory = Measured::default();
    assert!(see(&mut kernels, &[facts()], &snapshot(first, Vec::new())).is_empty());
    let records = see(&mut kernels, &[facts()], &snapshot(sample(2), Vec::new()));
    assert_eq!(records.len(), 1);
    // A later failure keeps the last good value.
    let mut third = sample(3);
    third.memory = Measured::default();
    let records = see(&mut kernels, &[facts()], &snapshot(third, Vec::new()));
    assert_eq!(records[0].1.get("mem").unwrap().current, "2000");
}

#[test]
fn a_lost_device_keeps_its_last_load_and_then_counts_as_busy() {
    let mut kernels = Kernels::default();
    let mut pass = |second, rows| {
        let records = see(&mut kernels, &[facts()], &snapshot(sample(second), rows));
        let load = records[0].1.get("cuda_util").unwrap();
        (load.current.clone(), load.percentage.clone())
    };
    let pair = |current: &str, percentage: &str| (current.to_owned(), percentage.to_owned());
    pass(10, vec![gpu(1, 2, Some(505))]);
    assert_eq!(pass(11, vec![gpu(1, 2, None)]), pair("50.5", "50.5"));
    assert_eq!(pass(25, Vec::new()), pair("50.5", "50.5"));
    assert_eq!(pass(26, Vec::new()), pair("50.5", "100"));
    assert_eq!(pass(30, vec![gpu(1, 2, Some(0))]), pair("0", "0"));
}

#[test]
fn a_kernel_that_is_not_read_any_more_counts_as_busy() {
    let mut kernels = Kernels::default();
    let kept = snapshot(sample(10), vec![gpu(0, 2, Some(0))]);
    let all = ["cpu_util", "mem", "cuda_mem", "cuda_util"];
    let mut pass = |second, snapshot: &ObservedSnapshot| {
        let records = kernels.observe(&[facts()], &none(), snapshot, at(second));
        records.into_iter().next().map(|(_, record)| {
            let percentages = all.map(|key| record.get(key).unwrap().percentage.clone());
            (record, percentages)
        })
    };
    let (healthy, percentages) = pass(10, &kept).unwrap();
    assert_ne!(percentages, ["100"; 4]);
    // Within three intervals the manager keeps what it was told.
    assert_eq!(pass(25, &kept), None);
    // The dataplane stalls, and its last words stay; or it began anew and has not seen the container.
    for (second, snapshot) in [(26, &kept), (31, &kept), (36, &ObservedSnapshot::default())] {
        let (silent, percentages) = pass(second, snapshot).unwrap();
        assert_eq!(percentages, ["100"; 4], "second {second}");
        let value = |record: &StatRecord, key| record.get(key).unwrap().current.clone();
        for key in ["cpu_used", "mem"] {
            assert_eq!(value(&silent, key), value(&healthy, key), "{key}");
        }
    }
    // It is told as it is with the next sample.
    let (_, percentages) = pass(40, &snapshot(sample(40), vec![gpu(0, 2, Some(0))])).unwrap();
    assert_eq!(percentages[0], "0");
    assert_eq!(percentages[3], "0");
}

#[test]
fn a_kernel_that_is_never_read_counts_as_busy() {
    let adopted = KernelFacts {
        adopted: true,
        ..facts()
    };
    let never = |facts: &KernelFacts, seen: &dyn Fn(u64) -> ObservedSnapshot| {
        let mut kernels = Kernels::default();
        let facts = [facts.clone()];
        for second in [10, 25] {
            let records = kernels.observe(&facts, &none(), &seen(second), at(second));
            assert!(records.is_empty(), "second {second}: {records:?}");
        }
        let record = kernels
            .observe(&facts, &none(), &seen(26), at(26))
            .remove(0)
            .1;
        ["cpu_util", "mem", "cuda_util"].map(|key| record.get(key).unwrap().percentage.clone())
    };
    let nothing = |_| ObservedSnapshot::default();
    assert_eq!(never(&facts(), &nothing), ["100"; 3]);
    // Its only sample is that of its past.
    let once = |_| snapshot(sample(10), Vec::new());
    assert_eq!(never(&adopted, &once), ["100"; 3]);
    // Its memory can't be read.
    let half = |second| {
        let mut half = sample(second);
        half.memory = Measured::default();
        snapshot(half, Vec::new())
    };
    assert_eq!(never(&facts(), &half)[1..], ["100"; 2]);
}

/// A rule of the manager would add replicas to it for ever.
#[test]
fn a_load_that_is_not_read_is_left_out_where_replicas_are_added_by_it() {
    let inference = [KernelFacts {
        scaled_by_load: true,
        ..facts()
    }];
    let mut kernels = Kernels::default();
    for second in [10, 15] {
        let seen = snapshot(sample(second), Vec::new());
        let _ = kernels.observe(&inference, &none(), &seen, at(second));
    }
    let keys = |record: &StatRecord| {
        ["cpu_util", "mem", "cuda_util", "io_read"].map(|key| record.get(key).is_some())
    };
    let seen = snapshot(sample(16), Vec::new());
    let record = kernels
        .observe(&inference, &none(), &seen, at(16))
        .remove(0)
        .1;
    assert_eq!(keys(&record), [true, true, false, true]);
    let record = kernels
        .observe(&inference, &none(), &seen, at(60))
        .remove(0)
        .1;
    assert_eq!(keys(&record), [false, false, false, true]);
}

#[test]
fn an_adopted_kernel_begins_with_a_rate_not_with_its_whole_past() {
    let mut kernels = Kernels::default();
    let adopted = KernelFacts {
        adopted: true,
        ..facts()
    };
    let kernel = [adopted];
    assert!(see(&mut kernels, &kernel, &snapshot(sample(1), Vec::new())).is_empty());
    // The same sample again is no second one.
    assert!(see(&mut kernels, &kernel, &snapshot(sample(1), Vec::new())).is_empty());
    let mut second = sample(2);
    second.cpu.counters.usage_ns = Some(1_500_000_000);
    let records = see(&mut kernels, &kernel, &snapshot(second, Vec::new()));
    assert_eq!(records[0].1.get("cpu_util").unwrap().percentage, "50");
}

#[test]
fn an_adopted_kernel_whose_cpu_time_was_not_read_at_first_begins_with_a_rate_too() {
    let mut kernels = Kernels::default();
    let kernel = [KernelFacts {
        adopted: true,
        ..facts()
    }];
    let used = |second, milliseconds: Option<u64>| {
        let mut sample = sample(second);
        sample.cpu.counters.usage_ns = milliseconds.map(|ms| ms * 1_000_000);
        snapshot(sample, Vec::new())
    };
    assert!(see(&mut kernels, &kernel, &used(1, None)).is_empty());
    assert!(see(&mut kernels, &kernel, &used(2, Some(60_000))).is_empty());
    let records = see(&mut kernels, &kernel, &used(3, Some(60_500)));
    assert_eq!(records[0].1.get("cpu_util").unwrap().percentage, "50");
}

#[test]
fn a_kernel_that_starts_again_keeps_its_statistics_and_shows_no_load_of_the_past() {
    let mut kernels = Kernels::default();
    let used = |second, milliseconds: u64| {
        let mut sample = sample(second);
        sample.cpu.counters.usage_ns = Some(milliseconds * 1_000_000);
        snapshot(sample, vec![gpu(0, 100, Some(0))])
    };
    let kernel = [facts()];
    see(&mut kernels, &kernel, &used(10, 3_600_000));
    let records = see(&mut kernels, &kernel, &used(15, 3_601_000));
    let value = |record: &StatRecord, key: &str, figure: &str| {
        let figures = record.get(key).unwrap();
        let found = figures.statistics.iter().find(|(name, _)| *name == figure);
        found.unwrap().1.clone()
    };
    let most = value(&records[0].1, "cpu_util", "stats.max");
    assert_eq!(most, "3601000");
    // Its container is stopped and started, which takes longer than samples are believed.
    let away = HashSet::from([facts().id]);
    for second in [20, 40, 60] {
        let told = kernels.observe(&[], &away, &used(15, 3_601_000), at(second));
        assert!(told.is_empty(), "{told:?}");
    }
    let told = kernels.observe(&kernel, &none(), &ObservedSnapshot::default(), at(65));
    assert!(told.is_empty(), "{told:?}");
    // What the new cgroup has counted since is less than before.
    let records = see(&mut kernels, &kernel, &used(66, 1500));
    let record = &records[0].1;
    let load = record.get("cpu_util").unwrap();
    assert_eq!(
        (load.current.as_str(), load.percentage.as_str()),
        ("0", "0")
    );
    assert_eq!(value(record, "cpu_util", "stats.max"), most);
    assert_eq!(record.get("cuda_util").unwrap().percentage, "0");
    let records = see(&mut kernels, &kernel, &used(70, 3500));
    assert_eq!(records[0].1.get("cpu_util").unwrap().percentage, "50");
    // It ends while it starts.
    kernels.observe(&[], &none(), &ObservedSnapshot::default(), at(75));
    assert!(kernels.tracked.is_empty());
}

#[test]
fn no_limit_is_the_memory_of_the_machine() {
    for unlimited in [UNLIMITED, 0x7fff_ffff_ffff_f000] {
        let mut sample = sample(1);
        sample.memory.counters.limit_bytes = Some(unlimited);
        assert_eq!(memory_capacity(&sample, Some(16 << 30)), Some(16 << 30));
    }
    assert_eq!(memory_capacity(&sample(1), Some(16 << 30)), Some(1 << 30));
}

#[test]
fn a_kernel_that_is_gone_is_forgotten() {
    let mut kernels = Kernels::default();
    see(&mut kernels, &[facts()], &snapshot(sample(1), Vec::new()));
    assert!(see(&mut kernels, &[], &snapshot(sample(2), Vec::new())).is_empty());
    assert!(kernels.tracked.is_empty());
}

#[test]
fn a_kernel_is_told_what_it_uses_of_a_device_and_not_what_others_do() {
    let facts = facts();
    let user = |container, memory, load| AcceleratorUse {
        container_id: container,
        memory_bytes: memory,
        utilisation_permille: load,
        encoder_permille: None,
        decoder_permille: None,
    };
    let (own, other) = (facts.container, ContainerId([0xee; 32]));
    let figures_of = |facts: &KernelFacts, row: AcceleratorRow| {
        let snapshot = snapshot(sample(1), vec![row]);
        let measured = measurements(&sample(1), facts, &snapshot);
        let value = |key: &str| {
            let found = measured.iter().find(|one| one.quantity.key == key);
            found.map(|one| {
                (
                    one.value.to_string(),
                    one.capacity.map(|all| all.to_string()),
                )
            })
        };
        let of_hundred = |(value, capacity): (String, Option<String>)| {
            assert_eq!(capacity.as_deref(), Some("100"));
            value
        };
        (
            value("cuda_mem").map(of_hundred),
            value("cuda_util").map(of_hundred),
        )
    };
    let device = |users: Vec<AcceleratorUse>, users_left_out| AcceleratorRow {
        users,
        users_left_out,
        ..gpu(40, 100, Some(700))
    };
    let figures = |users, left_out| figures_of(&facts, device(users, left_out));
    let pair = |memory: &str, load: &str| (Some(memory.to_owned()), Some(load.to_owned()));
    let both = vec![
        user(own, Some(30), Some(500)),
        user(other, Some(10), Some(200)),
    ];
    assert_eq!(figures(both, 0), pair("30", "50"));
    let other_only = || vec![user(other, Some(10), Some(200))];
    assert_eq!(figures(other_only(), 0), pair("0", "0"));
    // What is not known is the whole device's when nobody else uses it.
    assert_eq!(figures(vec![user(own, None, None)], 0), pair("40", "70"));
    assert_eq!(figures(Vec::new(), 0), pair("40", "70"));
    // The driver tells no work of a program's (a client of MPS), but of the device.
    let idle = || vec![user(own, Some(30), Some(0))];
    assert_eq!(figures(idle(), 0), pair("30", "70"));
    // And never a copy of what several use together.
    assert_eq!(figures(other_only(), 1), (None, None));
    let shared = || vec![user(own, Some(30), None), user(other, Some(10), None)];
    assert_eq!(figures(shared(), 0), (Some("30".to_owned()), None));
    assert_eq!(figures(vec![user(own, Some(30), None)], 1).1, None);
    // A look that did not find who uses it: the device is still this kernel's alone, unless it is
    // given out in shares. Then only what is told of the container itself counts.
    let unsure = |users| AcceleratorRow {
        users_unknown: true,
        ..device(users, 0)
    };
    let mut in_shares = facts.clone();
    in_shares.devices[0].shared = true;
    assert_eq!(figures_of(&facts, unsure(Vec::new())), pair("40", "70"));
    assert_eq!(figures_of(&in_shares, unsure(Vec::new())), (None, None));
    assert_eq!(
        figures_of(&in_shares, device(Vec::new(), 0)),
        pair("0", "0")
    );
    assert_eq!(
        figures_of(&in_shares, device(vec![user(own, None, None)], 0)),
        pair("40", "70")
    );
    let own_only = || vec![user(own, Some(30), None)];
    assert_eq!(
        figures_of(&in_shares, unsure(own_only())),
        (Some("30".to_owned()), None)
    );
    // The rest of the load may be somebody else's.
    assert_eq!(figures_of(&in_shares, unsure(idle())), pair("30", "0"));
    // Others are known, and the container is not among them: it may be all the same.
    assert_eq!(figures_of(&facts, unsure(other_only())), (None, None));
}
