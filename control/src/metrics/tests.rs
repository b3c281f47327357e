use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use shared::desired::{PortKey, Protocol};
use shared::ids::{ContainerId, KernelId, RegionId};
use shared::observed::{
    AcceleratorCounters, AcceleratorUse, ContainerSample, CpuCounters, DiskCounters, DiskSpace,
    ForwardPath, IoCounters, Measured, MemoryCounters, NetCounters, NodeCounters, NodeSample,
    PidsCounters, PortState, PortStatus, ProcessCounts, Source,
};

use super::*;
use crate::stats::fixture::card;
use crate::stats::kernels::HeldDevices;
use crate::stats::node::Space as Filled;
use crate::storage_proxy::{
    Answer, Cache, FolderId, FolderUsage, Mounted, Next, Query, Quota, Space, Volume, VolumeHealth,
};

fn container_id(number: u16) -> ContainerId {
    let mut id = [0; 32];
    id[..2].copy_from_slice(&number.to_be_bytes());
    ContainerId(id)
}

fn kernel_id(number: u16) -> KernelId {
    let mut id = [0; 16];
    id[..2].copy_from_slice(&number.to_be_bytes());
    KernelId(id)
}

/// A sample in which every counter was read, those too that are added later once they have a series.
#[allow(clippy::needless_update)]
fn sample(number: u16) -> ContainerSample {
    let some = Some(u64::from(number) + 1_500_000_000);
    ContainerSample {
        container_id: container_id(number),
        kernel_id: kernel_id(number),
        tick: 3,
        taken_monotonic_ns: 1,
        taken_wall_ns: 1_700_000_000_500_000_000,
        cpu: Measured::now(
            Source::File,
            CpuCounters {
                usage_ns: some,
                user_ns: some,
                system_ns: some,
                periods: some,
                throttled_periods: some,
                throttled_ns: some,
                pressure_some_ns: some,
                ..CpuCounters::default()
            },
        ),
        memory: Measured::now(
            Source::File,
            MemoryCounters {
                current_bytes: some,
                limit_bytes: some,
                inactive_file_bytes: Some(500_000_000),
                anon_bytes: some,
                file_bytes: some,
                shmem_bytes: some,
                swap_bytes: some,
                peak_bytes: some,
                oom_events: some,
                oom_kill_events: Some(2),
                max_events: some,
                kernel_bytes: some,
                pressure_some_ns: some,
                pressure_full_ns: some,
                swap_limit_bytes: some,
                ..MemoryCounters::default()
            },
        ),
        pids: Measured::now(
            Source::File,
            PidsCounters {
                current: some,
                limit: Some(u64::MAX),
                limit_events: some,
                ..PidsCounters::default()
            },
        ),
        io: Measured::now(
            Source::File,
            IoCounters {
                read_bytes: some,
                write_bytes: some,
                read_operations: some,
                write_operations: some,
                pressure_some_ns: some,
                pressure_full_ns: some,
                ..IoCounters::default()
            },
        ),
        net: Measured::now(
            Source::Netlink,
            NetCounters {
                rx_bytes: some,
                rx_packets: some,
                rx_errors: some,
                rx_drops: some,
                tx_bytes: some,
                tx_packets: some,
                tx_errors: some,
                tx_drops: some,
                ..NetCounters::default()
            },
        ),
        disk: Measured::now(
            Source::Walk,
            DiskCounters {
                scratch_bytes: some,
                scratch_files: some,
                scratch_limit_bytes: some,
                shm_bytes: some,
                shm_limit_bytes: some,
                shm_age_ms: some,
                ..DiskCounters::default()
            },
        ),
    }
}

fn subject(number: u16) -> Subject {
    Subject {
        facts: KernelFacts {
            id: kernel_id(number),
            container: container_id(number),
            adopted: false,
            devices: vec![HeldDevices {
                name: "cuda".to_owned(),
                ids: vec!["0".to_owned()],
                shared: false,
            }],
            scaled_by_load: false,
        },
        session: "5a3c1f6e-0000-4000-8000-0000000000a1".to_owned(),
        user: Some("c0ffee00-0000-4000-8000-000000000001".to_owned()),
        project: None,
        image: "cr.example/python:3.13".to_owned(),
        name: "kernel.\"odd\"\\name".to_owned(),
        created_at: 1_700_000_000.25,
        services: vec![(30_000, "ttyd".to_owned())],
    }
}

/// A node with so many containers, of which everything is known.
fn node_snapshot(containers: u16) -> NodeSnapshot {
    let some = Some(2_000_000_000);
    let mut card = card(
        0,
        AcceleratorCounters {
            memory_total_bytes: some,
            memory_used_bytes: some,
            utilisation_permille: Some(505),
            power_mw: some,
            power_limit_mw: some,
            temperature_mc: Some(61_500),
            energy_mj: some,
            memory_utilisation_permille: Some(250),
            clock_mhz: Some(1980),
            memory_clock_mhz: Some(2619),
            pcie_rx_bytes_per_s: Some(200_000),
            pcie_tx_bytes_per_s: Some(100_000),
            encoder_permille: Some(10),
            decoder_permille: Some(20),
            ecc_corrected: Some(2),
            ecc_uncorrected: Some(1),
        },
    );
    card.fault = Some(31);
    // A program of no container that is shown has a part in it too.
    card.users = [(0, Some(250)), (60_000, Some(9))]
        .map(|(number, share)| AcceleratorUse {
            container_id: container_id(number),
            memory_bytes: some,
            utilisation_permille: share,
            encoder_permille: share.map(|_| 30),
            decoder_permille: None,
        })
        .to_vec();
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port: 30_000,
    };
    let status = PortStatus::new(key, kernel_id(0), RegionId([1; 16]), PortState::Serving);
    let node = NodeSample {
        tick: 3,
        taken_monotonic_ns: 1_000_000_000,
        taken_wall_ns: 1,
        counters: NodeCounters {
            cpu_total_ns: some,
            cpu_idle_ns: some,
            memory_total_bytes: Some(16 << 30),
            memory_available_bytes: some,
            disk_total_bytes: some,
            disk_available_bytes: some,
            net_rx_bytes: some,
            net_tx_bytes: some,
            sessions_active: some,
            sessions_total: some,
            accepts_shed: some,
            containers_sampled: some,
            pass_ns: Some(1_400_000),
            descriptors_open: some,
            pass_cpu_ns: some,
            tick_late_ns: some,
            ticks_missed: some,
            oom_kill_events: some,
            cpu_pressure_some_ns: some,
            memory_pressure_some_ns: some,
            memory_pressure_full_ns: some,
            io_pressure_some_ns: some,
            io_pressure_full_ns: some,
            disks_age_ms: Some(1500),
            ..NodeCounters::default()
        },
        disks: ["/dev/vda", "/dev/loop3"]
            .map(|device| DiskSpace {
                device: device.to_owned(),
                total_bytes: 2,
                used_bytes: 1,
            })
            .into(),
        ..NodeSample::default()
    };
    NodeSnapshot {
        interval: std::time::Duration::from_secs(5),
        agent_id: "i-node01".to_owned(),
        mode: "standalone",
        subjects: (0..containers).map(subject).collect(),
        kernels: usize::from(containers),
        observed: Observed {
            snapshot: Some(Arc::new(ObservedSnapshot {
                containers: Arc::new((0..containers).map(sample).collect()),
                ports: vec![status].into(),
                accelerators: vec![card],
                node: Some(node),
                processes: Some(ProcessCounts {
                    listed: 900,
                    left_out: 34,
                }),
                ..ObservedSnapshot::default()
            })),
            heartbeat_age: Some(Duration::from_millis(1500)),
            epoch: 2,
        },
        reading: HostReading {
            at_ns: 1,
            busy_ns: Some(3_000_000),
            cores_ns: vec![(0, 1_000_000), (1, 2_000_000)],
            memory: Some(Filled { used: 1, total: 2 }),
            ..HostReading::default()
        },
        engine: EngineState {
            answers: true,
            age: Some(Duration::ZERO),
        },
        slots: vec![("cpu".to_owned(), 8.into(), 2.into())],
        unheard: Vec::new(),
        occupancy: Some(Occupancy::default()),
        folders: Some(folders_known()),
        now_ns: 3_500_000_000,
    }
}

/// A folder with everything a storage proxy can tell.
fn folders_known() -> Folders {
    let (volume, now) = ("local", std::time::Instant::now());
    let id = "user:f38dea23-50fa-42a0-b5ae-338f5f4693f4/0123456789abcdef0123456789abcdef";
    let mount = Mounted {
        kernel: kernel_id(0).to_string(),
        name: "data \"x\"".to_owned(),
        target: "/home/work/data".to_owned(),
        source: "/mnt/local/data".to_owned(),
        folder: FolderId::parse(id),
    };
    // Twice in one kernel is one series.
    let mounted = vec![mount.clone(), mount];
    let mut known = Cache::new(Duration::from_secs(60));
    while let Next::Ask(question) = known.next(now, &mounted) {
        let some = Some(7);
        let answer = match question {
            Query::Volumes => Answer::Volumes(vec![Volume {
                name: volume.to_owned(),
                backend: "vfs".to_owned(),
                path: "/mnt/local".to_owned(),
            }]),
            Query::Volume(_) => Answer::Volume(
                VolumeHealth {
                    status: "healthy".to_owned(),
                    words: None,
                },
                Space {
                    capacity: some,
                    used: some,
                },
            ),
            Query::Scope(..) => Answer::Scope(Quota {
                used: some,
                limit: some,
            }),
            Query::Folder(..) => Answer::Folder(FolderUsage {
                files: some,
                used: some,
            }),
        };
        known.told(now, &question, Ok(answer), 1.0);
    }
    Folders {
        mounted,
        known: Arc::new(known),
        now: now + Duration::from_secs(3),
    }
}

/// The samples of a page by name and labels; fails on anything that is not well formed.
fn parse(page: &str) -> BTreeMap<String, f64> {
    let mut series = BTreeMap::new();
    let mut family = "";
    let mut seen = BTreeSet::new();
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# ") {
            let name = rest.split(' ').nth(1).unwrap();
            if rest.starts_with("TYPE ") {
                assert!(seen.insert(name), "{name} comes in two places");
                family = name;
            }
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(name.starts_with(family), "{line}");
        assert!(
            series
                .insert(name.to_owned(), value.parse().unwrap())
                .is_none(),
            "{line}"
        );
    }
    series
}

#[test]
fn the_original_families_are_as_the_manager_asks_for_them() {
    let series = parse(&node_snapshot(1).render());
    let kernel = kernel_id(0);
    let find = |name: &str, kind: &str| {
        let wanted = format!(
            "backendai_container_utilization{{container_metric_name=\"{name}\",agent_id=\"i-node01\",\
             kernel_id=\"{kernel}\",session_id=\"5a3c1f6e-0000-4000-8000-0000000000a1\",\
             user_id=\"c0ffee00-0000-4000-8000-000000000001\",project_id=\"undefined\",\
             value_type=\"{kind}\"}}"
        );
        series.get(&wanted).copied()
    };
    // Counters are as they are, in milliseconds and bytes; there is no capacity unless one is measured.
    assert_eq!(find("cpu_util", "current"), Some(1500.0));
    assert_eq!(find("cpu_util", "capacity"), Some(1000.0));
    assert_eq!(find("cpu_used", "capacity"), None);
    assert_eq!(find("mem", "current"), Some(1e9));
    assert_eq!(find("net_rx", "current"), Some(1.5e9));
    // Its own processes' share, not the whole card's.
    assert_eq!(find("cuda_util", "current"), Some(25.0));
    assert_eq!(find("cuda_mem", "capacity"), Some(2e9));
    let device = "backendai_device_utilization{device_metric_name=\"cpu_util\",agent_id=\"i-node01\",\
                  device_id=\"1\",value_type=\"current\"}";
    assert_eq!(series.get(device), Some(&2.0));
}

#[test]
fn packets_of_ports_are_told_where_somebody_sees_them() {
    let mut node_snapshot = node_snapshot(1);
    assert!(
        !node_snapshot
            .render()
            .contains("bai_port_receive_packets_total")
    );
    let mut told = |path, packets_in| {
        let snapshot = node_snapshot.observed.snapshot.as_mut().unwrap();
        let port = &mut Arc::make_mut(&mut Arc::make_mut(snapshot).ports)[0];
        (port.path, port.packets_in) = (path, packets_in);
        let series = parse(&node_snapshot.render());
        let of = |name: &str| {
            let found = series.iter().find(|(key, _)| key.starts_with(name));
            *found.unwrap_or_else(|| panic!("no {name}")).1
        };
        (
            of("bai_port_receive_packets_total"),
            of("bai_port_transmit_packets_total"),
        )
    };
    assert_eq!(told(ForwardPath::KernelPath, 0), (0.0, 0.0));
    // It was served by the kernel path before.
    assert_eq!(told(ForwardPath::Relay, 7), (7.0, 0.0));
}

#[test]
fn known_series_have_their_units() {
    let series = parse(&node_snapshot(1).render());
    let find = |name: &str| {
        let found = series
            .iter()
            .find(|(key, _)| key.starts_with(&format!("{name}{{")));
        *found.unwrap_or_else(|| panic!("no {name}")).1
    };
    assert_eq!(find("container_cpu_usage_seconds_total"), 1.5);
    assert_eq!(find("container_memory_working_set_bytes"), 1e9);
    assert_eq!(find("container_threads_max"), 0.0);
    assert_eq!(find("container_last_seen"), 1_700_000_000.5);
    assert_eq!(find("bai_container_fs_age_seconds"), 0.0);
    assert_eq!(find("bai_container_shm_age_seconds"), 1.5e6);
    assert_eq!(series.get("bai_node_disk_age_seconds"), Some(&1.5));
    let disk = |device| format!("bai_node_disk_bytes{{device=\"{device}\",state=\"used\"}}");
    assert_eq!(series.get(&disk("/dev/vda")), Some(&1.0));
    assert_eq!(
        series.get(&disk("/dev/loop3")),
        None,
        "it lies on the other"
    );
    assert_eq!(find("bai_accelerator_utilization_ratio"), 0.505);
    assert_eq!(find("bai_container_accelerator_utilization_ratio"), 0.25);
    assert_eq!(find("bai_container_accelerator_memory_used_bytes"), 2e9);
    assert_eq!(
        find("bai_container_accelerator_encoder_utilization_ratio"),
        0.03
    );
    let users = series.keys().filter(|key| key.contains(",device_id="));
    let users: Vec<&String> = users
        .filter(|key| key.starts_with("bai_container_accelerator_"))
        .collect();
    // The device's decoders are told, and not as this container's; nor is its power.
    assert_eq!(users.len(), 3, "{users:?}");
    assert!(
        users[0].ends_with(",kind=\"cuda\",device_id=\"GPU-0\"}"),
        "{users:?}"
    );
    assert_eq!(series["bai_sample_age_seconds"], 2.5);
    assert_eq!(series["bai_dataplane_pass_seconds"], 0.0014);
    assert_eq!(series["bai_processes{state=\"listed\"}"], 900.0);
    assert_eq!(series["bai_processes{state=\"left_out\"}"], 34.0);
    assert_eq!(find("bai_vfolder_used_bytes"), 7.0);
    for told in ["vfolder", "quota_scope", "volume"] {
        let age = format!("bai_{told}_answer_age_seconds");
        assert_eq!(find(&age), 3.0, "{age}");
    }
    assert_eq!(find("bai_volume_healthy"), 1.0);
    let odd = series
        .keys()
        .find(|key| key.contains("container_threads{"))
        .unwrap();
    assert!(odd.contains(r#"name="kernel.\"odd\"\\name""#), "{odd}");
}

#[test]
fn nothing_measured_is_nothing_shown() {
    let mut node_snapshot = node_snapshot(1);
    let mut empty = ContainerSample {
        container_id: container_id(0),
        ..ContainerSample::default()
    };
    empty.taken_wall_ns = 1;
    node_snapshot.observed.snapshot = Some(Arc::new(ObservedSnapshot {
        containers: vec![empty].into(),
        ..ObservedSnapshot::default()
    }));
    let series = parse(&node_snapshot.render());
    let containers: BTreeSet<&str> = series
        .keys()
        .filter_map(|key| key.split('{').next())
        .filter(|name| name.starts_with("container_"))
        .collect();
    assert_eq!(
        containers,
        BTreeSet::from(["container_last_seen", "container_start_time_seconds"])
    );
    // A container that left the region leaves no series.
    node_snapshot.observed.snapshot = Some(Arc::default());
    assert!(!node_snapshot.render().contains("container_"));
    assert!(!NodeSnapshot::default().render().is_empty());
}

/// With a dataplane that is gone, its last numbers would stay: a rate of 0 whatever happens.
#[test]
fn an_old_sample_tells_only_when_it_was_taken() {
    let mut node_snapshot = node_snapshot(2);
    let names = |node_snapshot: &NodeSnapshot| -> BTreeSet<String> {
        let series = parse(&node_snapshot.render());
        let names = series.keys().filter_map(|key| key.split('{').next());
        names.map(str::to_owned).collect()
    };
    let all = names(&node_snapshot);
    // Three intervals of 5 s and 2 s after the node's sample, which is the last.
    node_snapshot.now_ns = 18_000_000_000;
    let snapshot = node_snapshot.observed.snapshot.as_mut().unwrap();
    for sample in Arc::make_mut(&mut Arc::make_mut(snapshot).containers) {
        sample.taken_monotonic_ns = 1_000_000_000;
    }
    assert_eq!(names(&node_snapshot), all);

    // One of the containers only.
    let snapshot = node_snapshot.observed.snapshot.as_mut().unwrap();
    Arc::make_mut(&mut Arc::make_mut(snapshot).containers)[1].taken_monotonic_ns = 999_999_999;
    let series = parse(&node_snapshot.render());
    let of = |number| {
        let kernel = kernel_id(number).to_string();
        let names = series.keys().filter(|key| key.contains(&kernel));
        let names = names.filter_map(|key| key.split('{').next());
        names.map(str::to_owned).collect::<BTreeSet<String>>()
    };
    let unmeasured = [
        "bai_container_info",
        "container_last_seen",
        "container_start_time_seconds",
    ];
    let unmeasured = BTreeSet::from(unmeasured.map(str::to_owned));
    assert_eq!(of(1), unmeasured);
    assert!(of(0).len() > 40, "{:?}", of(0));

    node_snapshot.now_ns += 1;
    let series = parse(&node_snapshot.render());
    let old: BTreeSet<&str> = series
        .keys()
        .filter(|key| !key.starts_with("backendai_device_utilization"))
        .filter_map(|key| key.split('{').next())
        .filter(|name| {
            [
                "container_",
                "bai_container_",
                "bai_node_",
                "bai_accelerator_",
                "bai_port_",
                "backendai_",
            ]
            .iter()
            .any(|start| name.starts_with(start))
        })
        .collect();
    assert_eq!(old, unmeasured.iter().map(String::as_str).collect());
    // What the agent reads itself goes on.
    let devices: BTreeSet<&str> = series
        .keys()
        .filter_map(|key| key.strip_prefix("backendai_device_utilization{device_metric_name=\""))
        .filter_map(|rest| rest.split('"').next())
        .collect();
    assert_eq!(devices, BTreeSet::from(["cpu_util", "mem"]));
    assert!(series.contains_key("bai_sample_age_seconds"));

    // A dataplane that has passed over nothing yet tells of its ports while it lives.
    let ports = |node_snapshot: &NodeSnapshot| {
        node_snapshot
            .render()
            .contains("\nbai_port_sessions_total{")
    };
    let snapshot = node_snapshot.observed.snapshot.as_mut().unwrap();
    Arc::make_mut(snapshot).node = None;
    assert!(ports(&node_snapshot));
    node_snapshot.observed.heartbeat_age = Some(Duration::from_secs(60));
    assert!(!ports(&node_snapshot));
}

#[test]
fn a_thousand_containers_are_one_well_formed_page() {
    let node_snapshot = node_snapshot(1000);
    let page = node_snapshot.render();
    // `cargo test --release` shows what a scrape costs, with --nocapture.
    let mut took: Vec<_> = (0..21)
        .map(|_| {
            let begun = std::time::Instant::now();
            assert_eq!(node_snapshot.render().len(), page.len());
            begun.elapsed()
        })
        .collect();
    took.sort();
    println!("{} bytes, median {:?}", page.len(), took[took.len() / 2]);
    let series = parse(&page);
    assert_eq!(
        series
            .keys()
            .filter(|key| key.starts_with("container_cpu_usage_seconds_total"))
            .count(),
        1000
    );
}

/// Every family of a full page is declared, with the labels it is declared with, and documented.
#[test]
fn the_document_lists_every_family() {
    let declared: BTreeMap<&str, &Family> =
        families().map(|family| (family.name, family)).collect();
    for key in parse(&node_snapshot(1).render()).keys() {
        let (name, labels) = key.split_once('{').unwrap_or((key, ""));
        let family = declared
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not declared"));
        let found: Vec<&str> = labels
            .split(&[',', '{'][..])
            .filter_map(|label| label.split_once("=\"").map(|(name, _)| name))
            .collect();
        assert_eq!(found.join(" "), family.labels, "{name}");
    }
    let document = include_str!("../../../docs/metrics.md");
    let rows: BTreeSet<&str> = document
        .lines()
        .filter(|line| line.starts_with("| `"))
        .collect();
    let wanted: Vec<String> = families()
        .map(|family| {
            let labels = match family.labels {
                "" => "-".to_owned(),
                labels => labels.replace(' ', ", "),
            };
            let (name, kind) = (family.name, family.kind.word());
            format!("| `{name}` | {kind} | {labels} | {} |", family.help)
        })
        .collect();
    let missing: Vec<&String> = wanted
        .iter()
        .filter(|row| !rows.contains(row.as_str()))
        .collect();
    assert!(
        missing.is_empty(),
        "docs/metrics.md lacks:\n{}",
        missing
            .iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>()
    );
    let stale: Vec<&&str> = rows
        .iter()
        .filter(|row| !wanted.iter().any(|w| w == **row))
        .collect();
    assert!(
        stale.is_empty(),
        "docs/metrics.md has what is not there: {stale:#?}"
    );
}

/// What the page of the Python agent of 25.15.8 has, and its labels; a counter is by its name on the page.
const ORIGINAL: &[(&str, Kind, &str)] = {
    const REQUEST: &str = "method endpoint domain operation error_detail status_code";
    const TASK: &str = "task_name status domain operation error_detail";
    const GRAPHQL: &str = "operation_type field_name parent_type operation_name domain operation error_detail success";
    const LAYER: &str = "domain layer operation success";
    use Kind::{Counter, Gauge, Histogram};
    &[
        (
            "backendai_container_utilization",
            Gauge,
            "container_metric_name agent_id kernel_id session_id user_id project_id value_type",
        ),
        (
            "backendai_device_utilization",
            Gauge,
            "device_metric_name agent_id device_id value_type",
        ),
        ("backendai_rpc_requests_total", Counter, "method"),
        (
            "backendai_rpc_failure_requests_total",
            Counter,
            "method exception",
        ),
        (
            "backendai_rpc_request_duration_seconds",
            Histogram,
            "method",
        ),
        (
            "backendai_sync_container_lifecycle_trigger_count_total",
            Counter,
            "agent_id",
        ),
        (
            "backendai_sync_container_lifecycle_success_count_total",
            Counter,
            "agent_id",
        ),
        (
            "backendai_sync_container_lifecycle_failure_count_total",
            Counter,
            "agent_id exception",
        ),
        (
            "backendai_stat_task_trigger_count_total",
            Counter,
            "agent_id stat_scope",
        ),
        (
            "backendai_stat_task_success_count_total",
            Counter,
            "agent_id stat_scope",
        ),
        (
            "backendai_stat_task_failure_count_total",
            Counter,
            "agent_id stat_scope exception",
        ),
        ("backendai_stage_count_total", Counter, "stage upper_layer"),
        ("backendai_event_count_total", Counter, "event_type"),
        (
            "backendai_event_failure_count_total",
            Counter,
            "event_type exception domain operation error_detail",
        ),
        (
            "backendai_event_processing_time_sec",
            Histogram,
            "event_type status domain operation error_detail",
        ),
        ("backendai_bgtask_count", Gauge, "task_name"),
        ("backendai_bgtask_done_count_total", Counter, TASK),
        ("backendai_bgtask_processing_time_sec", Histogram, TASK),
        (
            "backendai_layer_operation_triggered_count",
            Gauge,
            "domain layer operation",
        ),
        ("backendai_layer_operation_count_total", Counter, LAYER),
        (
            "backendai_layer_retry_count_total",
            Counter,
            "domain layer operation",
        ),
        ("backendai_layer_operation_duration_sec", Histogram, LAYER),
        ("backendai_api_request_count_total", Counter, REQUEST),
        ("backendai_api_request_duration_sec", Histogram, REQUEST),
        ("backendai_graphql_request_count_total", Counter, GRAPHQL),
        ("backendai_graphql_request_duration_sec", Histogram, GRAPHQL),
        (
            "backendai_sweep_session_count_total",
            Counter,
            "status success",
        ),
        ("backendai_sweep_kernel_count_total", Counter, "success"),
        ("backendai_event_propagator_count", Gauge, ""),
        (
            "backendai_event_propagator_alias_count",
            Gauge,
            "domain alias_id",
        ),
        (
            "backendai_event_propagator_registration_count_total",
            Counter,
            "",
        ),
        (
            "backendai_event_propagator_unregistration_count_total",
            Counter,
            "",
        ),
        ("backendai_async_task_count", Gauge, ""),
        ("backendai_cpu_usage_percent", Gauge, ""),
        ("backendai_memory_used_rss", Gauge, ""),
        ("backendai_memory_used_vms", Gauge, ""),
    ]
};

#[test]
fn what_the_original_has_is_there_or_told_to_be_left_out() {
    let document = include_str!("../../../docs/metrics.md");
    let part = document.split_once("\nLeft out are ").expect("the part").1;
    let part = part.split_once("\n\n").expect("its end").0;
    let left_out: Vec<&str> = part
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.starts_with("backendai_"))
        .collect();
    let is_left_out = |name: &str| {
        let by = |out: &&str| match out.strip_suffix('*') {
            Some(start) => name.starts_with(start),
            None => name == *out || name.strip_suffix("_total") == Some(*out),
        };
        left_out.iter().any(by)
    };
    for (name, kind, labels) in ORIGINAL {
        let ours = families().find(|family| family.name == *name);
        assert_eq!(ours.is_none(), is_left_out(name), "{name}");
        if let Some(ours) = ours {
            let own = ours.labels.strip_suffix(" le").unwrap_or(ours.labels);
            assert_eq!((ours.kind, own), (*kind, *labels), "{name}");
        }
    }
    for out in left_out {
        let start = out.trim_end_matches('*');
        let known = ORIGINAL.iter().any(|(name, ..)| name.starts_with(start));
        assert!(known, "{out} is not the original's");
    }
}
