//! What a reader of the regions sees after each thing a writer can do.

mod lives;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use shared::desired::{
    ClientNetwork, ContainerRow, DesiredReader, DesiredWriter, Drain, NodeRow, PortKey, PortRow,
    Protocol,
};
use shared::ids::{ContainerId, Generation, KernelId, SessionId};
use shared::observed::{
    AcceleratorCounters, AcceleratorKind, AcceleratorRow, AcceleratorUse, Applied, ContainerSample,
    CpuCounters, DiskSpace, ForwardPath, KernelPathCounters, Measured, MemoryCounters, MigInstance,
    NodeCounters, NodeSample, ObservedReader, ObservedSnapshot, ObservedWriter, PortState,
    PortStatus, ProcessCounters, ProcessCounts, ProcessSample, Processes, Proximity, RelayEngine,
    Samples, Source,
};
use shared::{BatchError, OpenError, ReadError, Sizes, Start};
use tempfile::TempDir;

const SIZES: Sizes = Sizes {
    ports: 4,
    containers: 3,
    accelerators: 2,
    processes: 5,
};

fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").expect("tests need a tmpfs at /dev/shm")
}

fn key(host_port: u16) -> PortKey {
    PortKey {
        protocol: Protocol::Tcp,
        host_port,
    }
}

fn port(host_port: u16) -> PortRow {
    PortRow {
        service: "jupyter".to_owned(),
        link_index: 17,
        link_mac: [2, 66, 172, 17, 0, 2],
        link_guard: true,
        max_sessions: 100,
        drain: Drain::Within { ms: 30_000 },
        networks: vec![
            ClientNetwork {
                address: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)),
                prefix: 8,
            },
            ClientNetwork {
                address: IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0)),
                prefix: 64,
            },
        ],
        ..PortRow::new(
            key(host_port),
            KernelId([7; 16]),
            ContainerId([9; 32]),
            IpAddr::V4(Ipv4Addr::new(172, 17, 0, 2)),
            8080,
        )
    }
}

fn container(byte: u8) -> ContainerRow {
    ContainerRow {
        container_id: ContainerId([byte; 32]),
        kernel_id: KernelId([7; 16]),
        session_id: SessionId([8; 16]),
        init_pid: 4711,
        cgroup_path: format!("docker/{}", ContainerId([byte; 32])),
        past_host: true,
        link_indexes: vec![17, 19],
        memory_limit_bytes: 1 << 30,
        cpu_milli: 1500,
        scratch_path: "/scratches/k".to_owned(),
        ..ContainerRow::default()
    }
}

#[test]
fn rows_arrive_as_they_were_put() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(writer.start(), Start::Fresh);
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    assert_eq!(reader.snapshot().unwrap().committed, Generation(0));

    let node = NodeRow {
        sample_interval_ms: 2_000,
        total_max_sessions: 9,
        ..NodeRow::default()
    };
    let generation = writer
        .batch(|batch| {
            batch.put_port(port(30_001));
            batch.put_port(port(30_000));
            batch.put_container(container(1));
            batch.set_node(node);
        })
        .unwrap();
    let snapshot = reader.snapshot().unwrap();
    assert_eq!(snapshot.committed, generation);
    assert_eq!(snapshot.region_id, writer.region_id());
    assert_eq!(snapshot.node, Some(node));
    assert_eq!(
        snapshot.ports,
        [
            PortRow {
                generation,
                ..port(30_000)
            },
            PortRow {
                generation,
                ..port(30_001)
            }
        ]
    );
    assert_eq!(
        snapshot.containers,
        [ContainerRow {
            generation,
            ..container(1)
        }]
    );
    assert_eq!(*snapshot, writer.snapshot().unwrap());
    // Nothing changed: the very same copy.
    assert!(std::sync::Arc::ptr_eq(
        &snapshot,
        &reader.snapshot().unwrap()
    ));
}

#[test]
fn a_refused_batch_leaves_nothing_behind() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let before = writer.batch(|batch| batch.put_port(port(1))).unwrap();
    let refused = writer.batch(|batch| {
        batch.remove_port(key(1));
        for host_port in 2..=5 {
            batch.put_port(port(host_port));
        }
    });
    assert_eq!(
        refused,
        Err(BatchError::TableFull {
            table: "ports",
            rows: 4
        })
    );
    let refused = writer.batch(|batch| {
        batch.put_port(port(2));
        batch.put_port(PortRow {
            service: "x".repeat(64),
            ..port(3)
        });
    });
    assert_eq!(
        refused,
        Err(BatchError::TextTooLong {
            field: "service",
            length: 64,
            limit: 63
        })
    );
    let snapshot = writer.snapshot().unwrap();
    assert_eq!(snapshot.committed, before);
    assert_eq!(snapshot.ports.len(), 1);
    // Generations of refused batches are not given out again.
    assert!(writer.batch(|batch| batch.put_port(port(2))).unwrap() > before);
}

#[test]
fn a_removed_row_is_reused_only_after_the_acknowledgement() {
    let (control, dataplane) = (directory(), directory());
    let mut writer = DesiredWriter::open(control.path(), SIZES).unwrap();
    let mut observed = ObservedWriter::open(dataplane.path(), SIZES).unwrap();
    let mut reader = ObservedReader::open(dataplane.path()).unwrap();
    writer
        .batch(|batch| {
            for host_port in 1..=4 {
                batch.put_port(port(host_port));
            }
        })
        .unwrap();
    let removal = writer.batch(|batch| batch.remove_port(key(1))).unwrap();
    let snapshot = writer.snapshot().unwrap();
    assert_eq!(snapshot.removed_ports.len(), 1);
    assert_eq!(snapshot.removed_ports[0].generation, removal);
    assert_eq!(snapshot.removed_ports[0].kernel_id, KernelId([7; 16]));

    assert!(matches!(
        writer.batch(|batch| batch.put_port(port(1))),
        Err(BatchError::RemovalPending { .. })
    ));
    assert!(matches!(
        writer.batch(|batch| batch.put_port(port(5))),
        Err(BatchError::TableFull { .. })
    ));
    assert_eq!(writer.release_acknowledged(&reader.snapshot().unwrap()), 0);

    // Looked at, but the port still drains.
    let applied = Applied {
        region_id: writer.region_id(),
        epoch: writer.epoch(),
        generation: removal,
    };
    let mut status = PortStatus::new(
        key(1),
        KernelId([7; 16]),
        writer.region_id(),
        PortState::Draining,
    );
    status.acknowledged = removal;
    observed
        .batch(|batch| {
            batch.set_applied(applied);
            batch.put_port(status.clone());
        })
        .unwrap();
    assert_eq!(writer.release_acknowledged(&reader.snapshot().unwrap()), 0);

    status.state = PortState::Removed;
    observed
        .batch(|batch| batch.put_port(status.clone()))
        .unwrap();
    assert_eq!(writer.release_acknowledged(&reader.snapshot().unwrap()), 1);
    writer.batch(|batch| batch.put_port(port(5))).unwrap();
    assert!(writer.snapshot().unwrap().removed_ports.is_empty());
}

#[test]
fn an_acknowledgement_of_another_region_counts_for_nothing() {
    let (control, dataplane) = (directory(), directory());
    let mut writer = DesiredWriter::open(control.path(), SIZES).unwrap();
    let mut observed = ObservedWriter::open(dataplane.path(), SIZES).unwrap();
    let mut reader = ObservedReader::open(dataplane.path()).unwrap();
    writer
        .batch(|batch| batch.put_container(container(1)))
        .unwrap();
    let removal = writer
        .batch(|batch| batch.remove_container(ContainerId([1; 32])))
        .unwrap();
    let mut applied = Applied {
        region_id: observed.region_id(),
        epoch: 1,
        generation: Generation(99),
    };
    observed.batch(|batch| batch.set_applied(applied)).unwrap();
    assert_eq!(writer.release_acknowledged(&reader.snapshot().unwrap()), 0);
    applied = Applied {
        region_id: writer.region_id(),
        epoch: 1,
        generation: removal,
    };
    observed.batch(|batch| batch.set_applied(applied)).unwrap();
    assert_eq!(writer.release_acknowledged(&reader.snapshot().unwrap()), 1);
}

#[test]
fn put_and_removed_in_one_batch_was_never_there() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    writer
        .batch(|batch| {
            batch.put_port(port(1));
            batch.remove_port(key(1));
        })
        .unwrap();
    let snapshot = writer.snapshot().unwrap();
    assert!(snapshot.ports.is_empty() && snapshot.removed_ports.is_empty());
    assert_eq!(snapshot.invalid_rows, 0);
    writer.batch(|batch| batch.put_port(port(1))).unwrap();
}

#[test]
fn a_restarted_writer_continues_the_region() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let (region_id, epoch) = (writer.region_id(), writer.epoch());
    let first = writer
        .batch(|batch| {
            batch.put_port(port(1));
            batch.put_port(port(2));
        })
        .unwrap();
    let removal = writer.batch(|batch| batch.remove_port(key(2))).unwrap();
    drop(writer);
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let before = reader.snapshot().unwrap();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(writer.start(), Start::Continued { repaired: 0 });
    assert_eq!((writer.region_id(), writer.epoch()), (region_id, epoch + 1));
    let after = reader.snapshot().unwrap();
    assert_eq!((&after.ports, after.epoch), (&before.ports, epoch + 1));
    assert_eq!(after.ports[0].generation, first);
    assert!(writer.batch(|batch| batch.put_port(port(3))).unwrap() > removal);
    assert!(matches!(
        writer.batch(|batch| batch.put_port(port(2))),
        Err(BatchError::RemovalPending { .. })
    ));
}

#[test]
fn larger_tables_carry_the_rows_into_a_new_file() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let generation = writer.batch(|batch| batch.put_port(port(1))).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    reader.snapshot().unwrap();
    let old = writer.region_id();
    drop(writer);
    let larger = Sizes { ports: 40, ..SIZES };
    let mut writer = DesiredWriter::open(directory.path(), larger).unwrap();
    assert_eq!(writer.start(), Start::Grown);
    let snapshot = reader.snapshot().unwrap();
    assert_ne!(snapshot.region_id, old);
    assert_eq!(
        snapshot.ports,
        [PortRow {
            generation,
            ..port(1)
        }]
    );
    assert!(writer.batch(|batch| batch.put_port(port(2))).unwrap() > generation);
    drop(writer);
    // Smaller ones are not worth a new file.
    let writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(writer.sizes().ports, 40);
}

/// The header's `used_rows` of the desired region's ports and containers.
fn used_rows(directory: &TempDir) -> [u64; 2] {
    let file = std::fs::File::open(directory.path().join("desired")).expect("a region");
    [120, 128].map(|offset| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, offset).expect("a header");
        u64::from_le_bytes(word)
    })
}

#[test]
fn of_changes_only_rows_that_were_written_are_told() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let silent = reader.changes().unwrap().expect("the first look");
    assert_eq!((silent.whole, silent.rows.committed), (true, Generation(0)));
    writer
        .batch(|batch| {
            (1..4).for_each(|number| batch.put_port(port(number)));
            (1..3).for_each(|number| batch.put_container(container(number)));
        })
        .unwrap();
    let told = |reader: &mut DesiredReader| {
        let changes = reader.changes().unwrap()?;
        let rows = &changes.rows;
        assert_eq!(rows.invalid_rows, 0);
        let ports: Vec<u16> = rows.ports.iter().map(|row| row.host_port).collect();
        let removed: Vec<u16> = rows
            .removed_ports
            .iter()
            .map(|it| it.key.host_port)
            .collect();
        let freed: Vec<u16> = changes.freed_ports.iter().map(|it| it.host_port).collect();
        let containers = rows.containers.len() + rows.removed_containers.len();
        let containers = (containers, changes.freed_containers.len());
        Some((changes.whole, ports, removed, freed, containers))
    };
    let all = (true, vec![1, 2, 3], vec![], vec![], (2, 0));
    assert_eq!(told(&mut reader).expect("it speaks"), all);
    assert_eq!(told(&mut reader), None, "nothing was written");

    writer.batch(|batch| batch.put_port(port(2))).unwrap();
    let one = (false, vec![2], vec![], vec![], (0, 0));
    assert_eq!(told(&mut reader), Some(one));
    let removed = writer.batch(|batch| {
        batch.remove_port(key(1));
        batch.remove_container(ContainerId([1; 32]));
    });
    let gone = (false, vec![], vec![1], vec![], (1, 0));
    assert_eq!(told(&mut reader), Some(gone));
    let observed = ObservedSnapshot {
        applied: Some(Applied {
            region_id: writer.region_id(),
            epoch: writer.epoch(),
            generation: removed.unwrap(),
        }),
        ..ObservedSnapshot::default()
    };
    assert_eq!(writer.release_acknowledged(&observed), 2);
    let freed = (false, vec![], vec![], vec![1], (0, 1));
    assert_eq!(told(&mut reader), Some(freed));

    // The next life of the writer says it all by having written nothing; who wants all rows asks.
    drop(writer);
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(told(&mut reader).expect("another life").1, [0; 0]);
    reader.forget_changes();
    assert_eq!(told(&mut reader).expect("asked for").1, [2, 3]);

    // A row that makes no sense may be any port's: all are told while there is one.
    let file = std::fs::File::options()
        .write(true)
        .open(directory.path().join("desired"))
        .unwrap();
    writer.batch(|batch| batch.put_port(port(2))).unwrap();
    // The port's number in both slots of the second row (docs/shared-memory.md).
    for slot in [0, 8 + 336] {
        file.write_all_at(&[0; 2], 4096 + 704 + slot + 8 + 4)
            .unwrap();
    }
    let damaged = reader.changes().unwrap().expect("news");
    assert_eq!((damaged.whole, damaged.rows.invalid_rows), (true, 1));
    assert_eq!(damaged.rows.ports.len(), 1);
    assert_eq!(told(&mut reader), None, "nothing was written");
    writer.batch(|batch| batch.put_port(port(2))).unwrap();
    assert_eq!(told(&mut reader).expect("put right").1, [2, 3]);

    // Larger tables are another region.
    drop(writer);
    let larger = Sizes { ports: 9, ..SIZES };
    let _writer = DesiredWriter::open(directory.path(), larger).unwrap();
    assert_eq!(told(&mut reader).expect("another region").1, [2, 3]);
}

#[test]
fn only_rows_that_were_ever_used_are_looked_at() {
    let directory = directory();
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    assert_eq!(used_rows(&directory), [0, 0]);
    writer
        .batch(|batch| {
            batch.put_port(port(1));
            batch.put_port(port(2));
        })
        .unwrap();
    writer.batch(|batch| batch.remove_port(key(2))).unwrap();
    assert_eq!(used_rows(&directory), [2, 0]);
    drop(writer);

    // The next life goes on from there, and so does a larger file.
    let mut writer = DesiredWriter::open(directory.path(), SIZES).unwrap();
    writer.batch(|batch| batch.put_port(port(3))).unwrap();
    assert_eq!(used_rows(&directory), [3, 0]);
    drop(writer);
    let larger = Sizes { ports: 9, ..SIZES };
    let mut writer = DesiredWriter::open(directory.path(), larger).unwrap();
    assert_eq!(
        (writer.start(), used_rows(&directory)),
        (Start::Grown, [3, 0])
    );
    writer.batch(|batch| batch.put_port(port(4))).unwrap();
    let mut reader = DesiredReader::open(directory.path()).unwrap();
    let ports = |reader: &mut DesiredReader| -> Vec<u16> {
        let snapshot = reader.snapshot().unwrap();
        snapshot
            .ports
            .iter()
            .map(|row| row.key().host_port)
            .collect()
    };
    assert_eq!(ports(&mut reader), [1, 3, 4]);

    // Less than there are hides rows; nonsense hides none.
    let file = std::fs::File::options()
        .write(true)
        .open(directory.path().join("desired"))
        .unwrap();
    for (claimed, seen) in [(1_u64, &[1][..]), (u64::MAX, &[1, 3, 4])] {
        file.write_all_at(&claimed.to_le_bytes(), 120).unwrap();
        let mut reader = DesiredReader::open(directory.path()).unwrap();
        assert_eq!(ports(&mut reader), seen);
    }
}

#[test]
fn samples_are_kept_as_they_were_and_published_so() {
    let all: Vec<ContainerSample> = (1..=4).map(|byte| sample(byte, 9)).collect();
    let mut samples: Samples = all.iter().cloned().collect();
    assert_eq!(samples.len(), 4);
    assert!(samples.iter().eq(all.iter().cloned()));
    assert!(samples.ids().eq(all.iter().map(|it| it.container_id)));
    samples.truncate(3);
    assert!(samples.iter().eq(all[..3].iter().cloned()));
    samples.truncate(usize::MAX);
    assert_eq!((samples.len(), samples.is_empty()), (3, false));

    let dir = directory();
    let mut writer = ObservedWriter::open(dir.path(), SIZES).unwrap();
    writer
        .batch(|batch| batch.put_containers(samples.clone()))
        .unwrap();
    let snapshot = ObservedReader::at(dir.path()).snapshot().unwrap();
    assert!(samples.iter().eq(snapshot.containers.iter().cloned()));
    // Nothing of a list that has no room is seen.
    let more: Samples = (3..=9).map(|byte| sample(byte, 10)).collect();
    let full = writer.batch(|batch| batch.put_containers(more));
    assert!(full.is_err());
    let snapshot = ObservedReader::at(dir.path()).snapshot().unwrap();
    assert!(samples.iter().eq(snapshot.containers.iter().cloned()));
    // And the list of before goes where it was.
    writer
        .batch(|batch| batch.put_containers(samples.clone()))
        .unwrap();
    assert_eq!(
        ObservedReader::at(dir.path())
            .snapshot()
            .unwrap()
            .containers,
        snapshot.containers
    );
}

fn sample(byte: u8, tick: u64) -> ContainerSample {
    ContainerSample {
        container_id: ContainerId([byte; 32]),
        kernel_id: KernelId([7; 16]),
        tick,
        taken_monotonic_ns: 5,
        taken_wall_ns: 6,
        cpu: Measured::now(
            Source::File,
            CpuCounters {
                usage_ns: Some(1),
                throttled_ns: Some(0),
                ..CpuCounters::default()
            },
        ),
        memory: Measured {
            source: Source::Bpf,
            age_ms: 12,
            counters: MemoryCounters {
                kernel_bytes: Some(3),
                ..MemoryCounters::default()
            },
        },
        ..ContainerSample::default()
    }
}

#[test]
fn samples_arrive_as_they_were_put_and_missing_is_not_zero() {
    let directory = directory();
    let mut writer = ObservedWriter::open(directory.path(), SIZES).unwrap();
    let mut reader = ObservedReader::open(directory.path()).unwrap();
    let status = PortStatus {
        acknowledged: Generation(3),
        path: ForwardPath::Relay,
        engine: RelayEngine::Splice,
        reason: "é".repeat(100),
        bytes_in: 10,
        in_kernel_path: KernelPathCounters {
            sessions_total: 1,
            sessions_refused: 2,
            bytes_in: 3,
            bytes_out: 4,
            packets_in: 5,
            packets_out: 6,
        },
        ..PortStatus::new(
            key(30_000),
            KernelId([7; 16]),
            writer.region_id(),
            PortState::Serving,
        )
    };
    let mut accelerator = AcceleratorRow {
        model: "Made Up 1".to_owned(),
        part_of: Some(3),
        profile: "1g.5gb".to_owned(),
        instance: Some(MigInstance { gpu: 0, compute: 6 }),
        driver: "550.54.15".to_owned(),
        runtime: "12.4".to_owned(),
        minor: Some(0),
        units: Some(14),
        fault: Some(79),
        users: vec![
            AcceleratorUse {
                container_id: ContainerId([5; 32]),
                memory_bytes: Some(1 << 30),
                utilisation_permille: None,
                encoder_permille: Some(30),
                decoder_permille: Some(0),
            },
            AcceleratorUse {
                container_id: ContainerId([6; 32]),
                memory_bytes: None,
                utilisation_permille: Some(0),
                encoder_permille: None,
                decoder_permille: Some(1600),
            },
        ],
        users_left_out: 2,
        users_unknown: true,
        age_ms: 1,
        tick: 4,
        counters: AcceleratorCounters {
            power_mw: Some(70_000),
            ecc_uncorrected: Some(1),
            ..Default::default()
        },
        ..AcceleratorRow::new(AcceleratorKind::Cuda, 0, "GPU-0000")
    };
    accelerator.near[3] = Proximity::SYSTEM;
    accelerator.near[63] = Proximity::links(18);
    let node = NodeSample {
        tick: 4,
        counters: NodeCounters {
            descriptors_open: Some(12),
            io_pressure_full_ns: Some(0),
            ..Default::default()
        },
        cores_busy_ns: vec![7, 0, 9],
        disks: vec![
            DiskSpace {
                device: "/dev/one".to_owned(),
                total_bytes: 10,
                used_bytes: 3,
            },
            DiskSpace {
                device: "/dev/\u{e9}".to_owned(),
                total_bytes: u64::MAX,
                used_bytes: 0,
            },
        ],
        ..Default::default()
    };
    writer
        .batch(|batch| {
            batch.put_port(status.clone());
            batch.put_container(sample(1, 4));
            batch.put_accelerator(accelerator.clone());
            batch.set_node(node.clone());
        })
        .unwrap();
    let cut = PortStatus {
        reason: "é".repeat(59),
        ..status.clone()
    };
    let snapshot = reader.snapshot().unwrap();
    assert_eq!(snapshot.port(key(30_000)), Some(&cut));
    assert_eq!(
        snapshot.container(ContainerId([1; 32])),
        Some(&sample(1, 4))
    );
    assert_eq!(snapshot.accelerators, [accelerator]);
    assert_eq!(snapshot.node, Some(node));
    assert_eq!(snapshot.applied, None);
    let got = snapshot.container(ContainerId([1; 32])).unwrap();
    assert!(got.net.get().is_none());
    assert_eq!(got.cpu.get().unwrap().throttled_ns, Some(0));
    assert_eq!(got.cpu.get().unwrap().user_ns, None);
    assert_eq!(snapshot.port(key(1)), None);

    // The row moves.
    writer
        .batch(|batch| {
            batch.remove_port(key(30_000));
            batch.put_port(PortStatus {
                key: key(2),
                ..status.clone()
            });
            batch.put_port(PortStatus {
                key: key(30_000),
                reason: String::new(),
                ..status.clone()
            });
        })
        .unwrap();
    let snapshot = reader.snapshot().unwrap();
    assert_eq!(snapshot.port(key(30_000)).unwrap().reason, "");
}

#[test]
fn processes_beyond_the_pool_are_counted() {
    let directory = directory();
    let mut writer = ObservedWriter::open(directory.path(), SIZES).unwrap();
    let mut reader = ObservedReader::open(directory.path()).unwrap();
    assert_eq!(reader.processes().unwrap().list.len(), 0);
    assert_eq!(reader.snapshot().unwrap().processes, None);
    let processes = |tick, list, left_out| Processes {
        tick,
        taken_monotonic_ns: tick + 100,
        list,
        left_out,
        invalid_rows: 0,
    };
    let process = |pid: u32| ProcessSample {
        pid,
        container_pid: pid + 1,
        name: format!("worker-{pid}"),
        source: Source::Bpf,
        counters: ProcessCounters {
            rss_bytes: Some(4096),
            ..Default::default()
        },
        ..Default::default()
    };
    for tick in 1..5 {
        let list: Vec<_> = (0..9).map(process).collect();
        writer
            .batch(|batch| batch.set_processes(processes(tick, list.clone(), 2)))
            .unwrap();
        let got = reader.processes().unwrap();
        assert_eq!((got.tick, got.left_out, got.invalid_rows), (tick, 6, 0));
        assert_eq!(got.taken_monotonic_ns, tick + 100);
        assert_eq!(got.list, list[..5]);
        let counts = ProcessCounts {
            listed: 5,
            left_out: 6,
        };
        assert_eq!(reader.snapshot().unwrap().processes, Some(counts));
    }
    writer
        .batch(|batch| batch.set_processes(processes(5, vec![process(1)], 0)))
        .unwrap();
    assert_eq!(reader.processes().unwrap().list, [process(1)]);
}
