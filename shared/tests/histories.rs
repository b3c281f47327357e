//! Any history of batches, restarts and acknowledgements leaves the region saying what a plain map
//! would say.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;
use shared::desired::{
    ClientNetwork, DesiredReader, DesiredWriter, Drain, PortKey, PortRow, Protocol,
};
use shared::ids::{ContainerId, Generation, KernelId};
use shared::observed::{Applied, ObservedReader, ObservedWriter};
use shared::{BatchError, Sizes};

const SIZES: Sizes = Sizes {
    ports: 5,
    containers: 2,
    accelerators: 1,
    processes: 1,
};

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes))),
        any::<[u8; 16]>().prop_map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes))),
    ]
}

fn network() -> impl Strategy<Value = ClientNetwork> {
    (address(), any::<u8>()).prop_map(|(address, prefix)| ClientNetwork {
        address,
        prefix: prefix % if address.is_ipv4() { 33 } else { 129 },
    })
}

prop_compose! {
    /// Any row with one of eight host ports, more than the table has rows.
    fn port()(
        host_port in 1u16..9,
        udp in any::<bool>(),
        ids in any::<([u8; 16], [u8; 32])>(),
        service in "\\PC{0,15}",
        bind in address(),
        target in address(),
        numbers in any::<(u16, u32, u32, u32, u32, u32)>(),
        link_mac in any::<[u8; 6]>(),
        flags in any::<(bool, bool, bool, bool)>(),
        drain in prop_oneof![Just(Drain::Cut), any::<u32>().prop_map(|ms| Drain::Within { ms })],
        networks in prop::collection::vec(network(), 0..=8),
    ) -> PortRow {
        PortRow {
            protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            host_port,
            kernel_id: KernelId(ids.0),
            container_id: ContainerId(ids.1),
            service,
            bind,
            target,
            target_port: numbers.0.max(1),
            link_index: numbers.1,
            link_mac,
            observe_only: flags.0,
            link_guard: flags.1,
            local_only: flags.2,
            max_sessions: numbers.2,
            idle_timeout_ms: numbers.3,
            connect_timeout_ms: numbers.4,
            new_per_second: numbers.5,
            honour_firewall: flags.3,
            drain,
            networks,
            generation: Generation(0),
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Batch {
        put: Vec<PortRow>,
        remove: Vec<(u16, bool)>,
    },
    Restart,
    Acknowledge,
}

fn step() -> impl Strategy<Value = Step> {
    let batch = (
        prop::collection::vec(port(), 0..4),
        prop::collection::vec((1u16..9, any::<bool>()), 0..4),
    )
        .prop_map(|(put, remove)| Step::Batch { put, remove });
    prop_oneof![4 => batch, 1 => Just(Step::Restart), 1 => Just(Step::Acknowledge)]
}

/// What a batch does to plain maps, or why it cannot.
fn apply(
    live: &mut BTreeMap<PortKey, PortRow>,
    buried: &mut BTreeMap<PortKey, Generation>,
    put: &[PortRow],
    remove: &[PortKey],
) -> Result<Vec<PortKey>, &'static str> {
    let visible = live.clone();
    let mut removed_now = Vec::new();
    for key in remove {
        if live.remove(key).is_some() && visible.contains_key(key) {
            buried.insert(*key, Generation(0));
            removed_now.push(*key);
        }
    }
    for row in put {
        if buried.contains_key(&row.key()) {
            return Err("pending");
        }
        if !live.contains_key(&row.key()) && live.len() + buried.len() == SIZES.ports as usize {
            return Err("full");
        }
        live.insert(row.key(), row.clone());
    }
    Ok(removed_now)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn the_region_says_what_a_map_would_say(steps in prop::collection::vec(step(), 1..25)) {
        let control = tempfile::tempdir_in("/dev/shm").unwrap();
        let dataplane = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut writer = Some(DesiredWriter::open(control.path(), SIZES).unwrap());
        let mut observed = ObservedWriter::open(dataplane.path(), SIZES).unwrap();
        let mut answers = ObservedReader::open(dataplane.path()).unwrap();
        let mut reader = DesiredReader::open(control.path()).unwrap();
        let mut follower = DesiredReader::open(control.path()).unwrap();
        let mut followed = BTreeMap::new();
        let (mut live, mut buried) = (BTreeMap::new(), BTreeMap::new());
        let mut newest = Generation(0);
        for step in steps {
            let open = writer.as_mut().unwrap();
            match step {
                Step::Batch { put, remove } => {
                    let keys: Vec<PortKey> = remove
                        .iter()
                        .map(|(host_port, udp)| PortKey {
                            protocol: if *udp { Protocol::Udp } else { Protocol::Tcp },
                            host_port: *host_port,
                        })
                        .collect();
                    let (mut live_after, mut buried_after) = (live.clone(), buried.clone());
                    let expected = apply(&mut live_after, &mut buried_after, &put, &keys);
                    let done = open.batch(|batch| {
                        keys.iter().for_each(|key| batch.remove_port(*key));
                        put.iter().for_each(|row| batch.put_port(row.clone()));
                    });
                    match (done, expected) {
                        (Ok(generation), Ok(removed)) => {
                            prop_assert!(put.is_empty() && keys.is_empty() || generation > newest);
                            newest = generation;
                            for row in &put {
                                if let Some(row) = live_after.get_mut(&row.key()) {
                                    row.generation = generation;
                                }
                            }
                            for key in removed {
                                buried_after.insert(key, generation);
                            }
                            (live, buried) = (live_after, buried_after);
                        }
                        (Err(BatchError::RemovalPending { .. }), Err("pending"))
                        | (Err(BatchError::TableFull { .. }), Err("full")) => {}
                        (done, expected) => {
                            prop_assert!(false, "{done:?}, expected {expected:?}");
                        }
                    }
                }
                Step::Restart => {
                    drop(writer.take());
                    writer = Some(DesiredWriter::open(control.path(), SIZES).unwrap());
                }
                Step::Acknowledge => {
                    let applied = Applied {
                        region_id: open.region_id(),
                        epoch: open.epoch(),
                        generation: open.committed(),
                    };
                    observed.batch(|batch| batch.set_applied(applied)).unwrap();
                    let freed = open.release_acknowledged(&answers.snapshot().unwrap());
                    prop_assert_eq!(freed, buried.len());
                    buried.clear();
                }
            }
            let snapshot = reader.snapshot().unwrap();
            prop_assert_eq!(snapshot.invalid_rows, 0);
            let expected: Vec<PortRow> = live.values().cloned().collect();
            prop_assert_eq!(&snapshot.ports, &expected);
            let removed: BTreeMap<PortKey, Generation> =
                snapshot.removed_ports.iter().map(|row| (row.key, row.generation)).collect();
            prop_assert_eq!(&removed, &buried);
            // Who follows the changes alone knows the same rows, and is told none twice.
            if let Some(changes) = follower.changes().unwrap() {
                if changes.whole {
                    followed.clear();
                }
                for key in &changes.freed_ports {
                    prop_assert!(followed.remove(key).is_some());
                }
                let used = changes.rows.ports.iter().map(|row| (row.key(), row.generation));
                let removed = changes.rows.removed_ports.iter().map(|row| (row.key, row.generation));
                for (key, generation) in used.chain(removed) {
                    prop_assert_ne!(followed.insert(key, generation), Some(generation));
                }
            }
            let expected = expected.iter().map(|row| (row.key(), row.generation));
            prop_assert_eq!(&followed, &expected.chain(removed).collect());
        }
    }
}
