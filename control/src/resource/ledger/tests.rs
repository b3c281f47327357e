use std::sync::Arc;

use proptest::prelude::*;

mod captured;

use super::views::align_memory;
use super::*;
use crate::resource::map::{MapDevice, Strategy};
use crate::resource::plugin::SlotDeclaration;
use crate::resource::slots::text;
use crate::resource::{AttachedDevice, ContainerLimits};

fn policy() -> Policy {
    Policy {
        order: ["cuda", "rocm", "tpu", "cpu", "mem"]
            .map(str::to_owned)
            .to_vec(),
        affinity: AffinityPolicy::Interleaved,
        reserved_cpu: 1,
        reserved_mem: 1 << 30,
        align_mem: 16 << 20,
        memory_nodes: true,
    }
}

fn host(cores: u32, nodes: u32, gib: u64) -> HostInventory {
    let node = |core: u32| i32::try_from(core * nodes / cores).unwrap();
    let per_node = (gib << 30) / u64::from(nodes);
    HostInventory {
        cores: (0..cores).collect(),
        node_of_core: (0..cores).map(|core| (core, node(core))).collect(),
        node_memory: (0..nodes)
            .map(|id| (i32::try_from(id).unwrap(), per_node))
            .collect(),
        memory: gib << 30,
    }
}

fn intrinsic(host: HostInventory, overcommit: u32, quota: bool) -> Vec<Box<dyn DevicePlugin>> {
    let total = host.memory;
    vec![
        Box::new(CpuPlugin {
            host,
            overcommit,
            quota,
        }),
        Box::new(MemPlugin { total }),
    ]
}

fn ledger_of(host: HostInventory) -> Ledger {
    let memory = host.node_memory.clone();
    Ledger::with_plugins(intrinsic(host, 1, false), policy(), memory).unwrap()
}

/// Eight cores on one node, 16 GiB.
fn ledger() -> Ledger {
    ledger_of(host(8, 1, 16))
}

/// A kind of device as the tests want it: one unit of one slot per device.
#[derive(Debug)]
struct Kind {
    key: &'static str,
    slot: &'static str,
    /// Ids and NUMA nodes.
    devices: Vec<(String, Option<i32>)>,
    /// Given out in halves.
    fraction: bool,
    /// A variable that names what a container got.
    variable: Option<&'static str>,
}

impl Kind {
    /// A kind that is not in the usual order.
    fn fpga(key: &'static str, slot: &'static str, count: u32) -> Box<dyn DevicePlugin> {
        Box::new(Self {
            key,
            slot,
            devices: (0..count)
                .map(|index| (format!("f{index}"), Some(0)))
                .collect(),
            fraction: false,
            variable: Some("FPGA"),
        })
    }
}

impl DevicePlugin for Kind {
    fn key(&self) -> &str {
        self.key
    }
    fn slots(&self) -> Vec<SlotDeclaration> {
        vec![SlotDeclaration {
            name: self.slot.to_owned(),
            kind: SlotType::Count,
        }]
    }
    fn devices(&self) -> Result<Vec<Device>, PluginError> {
        let device = |(id, numa_node): &(String, Option<i32>)| Device {
            id: id.clone(),
            device_name: self.key.to_owned(),
            hw_location: "0000:01:00.0".to_owned(),
            memory_size: 0,
            processing_units: 1,
            numa_node: *numa_node,
            near: Vec::new(),
        };
        Ok(self.devices.iter().map(device).collect())
    }
    fn allocation_map(&self, devices: &[Device]) -> AllocationMap {
        let rows = devices.iter().map(|device| MapDevice {
            id: device.id.clone(),
            alias: None,
            slot: self.slot.to_owned(),
            kind: SlotType::Count,
            total: Decimal::ONE,
        });
        let rows = rows.collect();
        match self.fraction {
            true => AllocationMap::fraction(Strategy::Evenly, Decimal::new(1, 2), rows, vec![]),
            false => AllocationMap::discrete(Strategy::Evenly, rows, vec![]),
        }
    }
    fn totals(&self, devices: &[Device]) -> Vec<(String, Amount)> {
        vec![(self.slot.to_owned(), devices.len().into())]
    }
    fn limit(
        &self,
        _: &[Device],
        allocation: &[(String, Vec<(String, Amount)>)],
        limits: &mut ContainerLimits,
    ) {
        let Some(name) = self.variable else {
            return;
        };
        for (id, _) in allocation.iter().flat_map(|(_, shares)| shares) {
            limits.environment.push((name.to_owned(), id.clone()));
        }
    }
    fn attached(&self, _: &[Device], _: &[(String, Vec<(String, Amount)>)]) -> Vec<AttachedDevice> {
        Vec::new()
    }
}

fn kernel(n: u8) -> KernelId {
    KernelId([n; 16])
}

fn ask(cpu: &str, mem: &str) -> SlotRequest {
    SlotRequest {
        slots: Slots::from_text([("cpu", cpu), ("mem", mem)]).unwrap(),
        allow_fragmentation: true,
    }
}

#[test]
fn a_reservation_gives_devices_and_a_release_gives_them_back() {
    let ledger = ledger();
    let empty = ledger.snapshot();
    let reserved = ledger.reserve(kernel(1), &ask("3", "2g")).unwrap();
    assert_eq!(reserved.allocation.ids("cpu", "cpu"), ["0", "1", "2"]);
    assert_eq!(
        reserved.allocation.total("mem", "mem"),
        Decimal::from(2_u64 << 30)
    );
    assert_eq!(
        ledger.allocation(kernel(1)),
        Some(reserved.allocation.clone())
    );
    assert!(ledger.commit(kernel(1)));
    let limits = ledger.container_limits(kernel(1), &reserved.allocation);
    assert_eq!(limits.cpuset_cpus.as_deref(), Some("0,1,2"));
    assert_eq!(
        (limits.memory, limits.memory_swap),
        (Some(2 << 30), Some(2 << 30))
    );
    assert_eq!(
        (limits.nano_cpus, limits.cpuset_mems, limits.cpu_count),
        (None, None, 3)
    );
    assert_eq!(ledger.release(kernel(1)), Some(reserved.allocation));
    assert_eq!(ledger.snapshot(), empty);
}

/// The original frees on failure and then rebuilds, which can free twice.
#[test]
fn releasing_twice_frees_once() {
    let ledger = ledger();
    ledger.reserve(kernel(1), &ask("1", "1g")).unwrap();
    let other = ledger.reserve(kernel(2), &ask("1", "1g")).unwrap();
    assert!(ledger.release(kernel(1)).is_some());
    let after = ledger.snapshot();
    assert_eq!(ledger.release(kernel(1)), None);
    assert_eq!(ledger.snapshot(), after);
    assert_eq!(ledger.allocation(kernel(2)), Some(other.allocation));
    assert!(!ledger.commit(kernel(1)));
}

/// The original forgets a kernel without a container when another one is cleaned up.
#[test]
fn a_kernel_without_a_container_keeps_its_devices_while_others_come_and_go() {
    let ledger = ledger();
    let pulling = ledger.reserve(kernel(1), &ask("4", "8g")).unwrap();
    for _ in 0..20 {
        let other = ledger.reserve(kernel(2), &ask("4", "4g")).unwrap();
        let cores = other.allocation.ids("cpu", "cpu");
        assert!(
            pulling
                .allocation
                .ids("cpu", "cpu")
                .iter()
                .all(|core| !cores.contains(core))
        );
        ledger.release(kernel(2));
    }
    assert_eq!(ledger.allocation(kernel(1)), Some(pulling.allocation));
}

#[test]
fn a_refused_request_leaves_no_trace() {
    let ledger = ledger();
    ledger.reserve(kernel(1), &ask("3", "2g")).unwrap();
    let before = ledger.snapshot();
    let err = ledger.reserve(kernel(2), &ask("6", "1g")).unwrap_err();
    assert_eq!(err.class(), "InsufficientResource");
    assert_eq!(
        err.to_string(),
        "InsufficientResource: DiscretePropertyAllocMap: insufficient allocatable amount! \
         (cpu (tag: 'cpu'), allocating 6 out of 5)"
    );
    // Cores are placed before memory is found short.
    let err = ledger.reserve(kernel(2), &ask("1", "15g")).unwrap_err();
    assert!(
        err.to_string()
            .contains("(mem (tag: 'mem'), allocating 16106127360 out of 15032385536)"),
        "{err}"
    );
    let err = ledger.reserve(kernel(1), &ask("1", "1g")).unwrap_err();
    assert_eq!(
        (err.class(), err.to_string().as_str()),
        ("ResourceError", "Kernel creation already in progress")
    );
    assert_eq!(ledger.snapshot(), before);
}

#[test]
fn requests_are_completed_and_unknown_slots_refused() {
    let plugins = {
        let mut all = intrinsic(host(2, 1, 4), 1, false);
        all.push(Kind::fpga("fpga", "fpga.device", 1));
        all
    };
    let ledger = Ledger::with_plugins(plugins, policy(), BTreeMap::new()).unwrap();
    let slots = Slots::from_text([("cpu", "1"), ("mem", "1g"), ("cuda.device", "0")]).unwrap();
    let complete = ledger.normalise(&slots).unwrap();
    let text: Vec<_> = complete
        .iter()
        .map(|(name, amount)| format!("{name}={amount}"))
        .collect();
    assert_eq!(text, ["cpu=1", "mem=1073741824", "fpga.device=0"]);
    let unknown = Slots::from_text([("cpu", "1"), ("mem", "1g"), ("cuda.device", "1")]).unwrap();
    let err = ledger.normalise(&unknown).unwrap_err();
    assert_eq!(err.class(), "UnsupportedResource");
    assert!(
        err.to_string().contains("cuda.device") && err.to_string().contains("fpga.device"),
        "{err}"
    );
    let err = ledger
        .normalise(&Slots::from_text([("cpu", "1")]).unwrap())
        .unwrap_err();
    assert_eq!(err.class(), "InvalidResourceArgument");
    assert!(ledger.is_bytes("mem") && !ledger.is_bytes("cpu") && !ledger.is_bytes("x"));
}

/// The original fails every creation when a device is missing from the allocation order.
#[test]
fn a_device_missing_from_the_order_is_placed_before_cpu() {
    let mut plugins = intrinsic(host(2, 1, 4), 1, false);
    plugins.push(Kind::fpga("fpga", "fpga.device", 2));
    let ledger = Ledger::with_plugins(plugins, policy(), BTreeMap::new()).unwrap();
    assert_eq!(
        ledger.inventory().order,
        ["cuda", "rocm", "tpu", "fpga", "cpu", "mem"]
    );
    let slots = Slots::from_text([("cpu", "1"), ("mem", "1g"), ("fpga.device", "2")]).unwrap();
    let reserved = ledger
        .reserve(
            kernel(1),
            &SlotRequest {
                slots,
                allow_fragmentation: true,
            },
        )
        .unwrap();
    assert_eq!(reserved.allocation.ids("fpga", "fpga.device"), ["f0", "f1"]);
    assert_eq!(
        ledger
            .container_limits(kernel(1), &reserved.allocation)
            .environment
            .len(),
        2
    );
    let json = serde_json::to_value(&reserved.allocation).unwrap();
    assert_eq!(json["fpga"]["fpga.device"]["f1"], "1");
}

#[test]
fn plugins_in_conflict_do_not_start() {
    let with = |key, slot| {
        let mut plugins = intrinsic(host(2, 1, 4), 1, false);
        plugins.push(Kind::fpga(key, slot, 1));
        Ledger::with_plugins(plugins, policy(), BTreeMap::new()).unwrap_err()
    };
    assert!(matches!(with("cpu", "cpu.x"), InventoryError::Twice(name) if name == "cpu"));
    assert!(matches!(
        with("fpga", "cuda.device"),
        InventoryError::SlotName { .. }
    ));
    assert!(matches!(
        with("fpga", "fpgas.device"),
        InventoryError::SlotName { .. }
    ));
}

#[test]
fn a_restart_gives_the_same_map() {
    let before = ledger();
    for n in 1..=3 {
        before.reserve(kernel(n), &ask("2", "1.5g")).unwrap();
        before.commit(kernel(n));
    }
    before.release(kernel(2));
    let after = ledger();
    for n in [3, 1] {
        let recorded = serde_json::to_string(&before.allocation(kernel(n))).unwrap();
        let recorded = serde_json::from_str(&recorded).unwrap();
        assert_eq!(
            after.restore(kernel(n), &recorded, true),
            Ok(Restored::default())
        );
        assert_eq!(
            after.restore(kernel(n), &recorded, true),
            Ok(Restored::default())
        );
    }
    assert_eq!(after.snapshot(), before.snapshot());
    let next = ask("4", "1g");
    assert_eq!(
        before.reserve(kernel(9), &next),
        after.reserve(kernel(9), &next)
    );
    let other = before.allocation(kernel(9)).unwrap();
    assert_eq!(
        after.restore(kernel(1), &other, true),
        Err(RestoreError::Held(kernel(1)))
    );
}

#[test]
fn what_runs_is_held_even_when_the_node_has_shrunk() {
    let large = ledger();
    let given = large
        .reserve(kernel(1), &ask("8", "12g"))
        .unwrap()
        .allocation;
    let small = ledger_of(host(4, 1, 8));
    let restored = small.restore(kernel(1), &given, true).unwrap();
    assert_eq!(restored.missing.len(), 4);
    assert_eq!(restored.overused, [("mem".to_owned(), "root".to_owned())]);
    assert_eq!(
        small
            .reserve(kernel(2), &ask("1", "1g"))
            .unwrap_err()
            .class(),
        "InsufficientResource"
    );
    small.release(kernel(1));
    assert!(small.reserve(kernel(2), &ask("4", "8g")).is_ok());
}

#[test]
fn a_quota_is_the_part_of_the_cores_that_was_given() {
    let all = host(4, 1, 8);
    let memory = all.node_memory.clone();
    let ledger = Ledger::with_plugins(intrinsic(all, 2, true), policy(), memory).unwrap();
    let first = ledger.reserve(kernel(1), &ask("3", "1g")).unwrap();
    assert_eq!(
        ledger
            .container_limits(kernel(1), &first.allocation)
            .nano_cpus,
        Some(1_500_000_000)
    );
    let second = ledger.reserve(kernel(2), &ask("5", "1g")).unwrap();
    let limits = ledger.container_limits(kernel(2), &second.allocation);
    assert_eq!(
        (limits.cpu_count, limits.nano_cpus),
        (4, Some(2_500_000_000))
    );
    assert_eq!(
        second.allocation.shares("cpu", "cpu")[3],
        ("3".to_owned(), 2.into())
    );
}

#[test]
fn memory_is_pinned_to_a_node_only_when_cores_and_room_are_there() {
    let two_nodes = host(8, 2, 16);
    let memory = two_nodes.node_memory.clone();
    let single = Policy {
        affinity: AffinityPolicy::PreferSingleNode,
        ..policy()
    };
    let ledger = Ledger::with_plugins(intrinsic(two_nodes, 1, false), single, memory).unwrap();
    let mems = |n: u8, cpu: &str, mem: &str| {
        let reserved = ledger.reserve(kernel(n), &ask(cpu, mem)).unwrap();
        let limits = ledger.container_limits(kernel(n), &reserved.allocation);
        limits.cpuset_mems
    };
    assert_eq!(mems(1, "2", "5g").as_deref(), Some("0"));
    // The next core is on the other, emptier node; five cores span both; then node 0 is too full.
    assert_eq!(mems(2, "2", "3g").as_deref(), Some("1"));
    ledger.release(kernel(2));
    assert_eq!(mems(2, "5", "1g"), None);
    ledger.release(kernel(2));
    assert_eq!(mems(3, "4", "9g"), None, "more than a node has");
}

/// Eight cores on two nodes of 8 GiB each, 1 GiB of it all the host's.
fn two_nodes() -> Ledger {
    let host = host(8, 2, 16);
    let memory = host.node_memory.clone();
    let single = Policy {
        affinity: AffinityPolicy::PreferSingleNode,
        ..policy()
    };
    Ledger::with_plugins(intrinsic(host, 1, false), single, memory).unwrap()
}

/// Reserves, and the node that the kernel is pinned to.
fn pin(ledger: &Ledger, n: u8, cpu: &str, mem: &str) -> Option<String> {
    let reserved = ledger.reserve(kernel(n), &ask(cpu, mem)).unwrap();
    let limits = ledger.container_limits(kernel(n), &reserved.allocation);
    limits.cpuset_mems
}

#[test]
fn nothing_is_pinned_where_others_may_take_the_memory() {
    // One of both nodes may have all of its memory on either.
    let ledger = two_nodes();
    assert_eq!(pin(&ledger, 1, "5", "6g"), None);
    assert_eq!(pin(&ledger, 2, "1", "4g"), None);
    // What the host has reserved may be there too.
    assert_eq!(pin(&two_nodes(), 1, "2", "8g"), None);
    assert_eq!(pin(&two_nodes(), 1, "2", "7g"), None);
    assert_eq!(pin(&two_nodes(), 1, "2", "6g").as_deref(), Some("0"));
    // One on the other node that finds too little there.
    let ledger = two_nodes();
    assert_eq!(pin(&ledger, 1, "4", "10g"), None);
    assert_eq!(pin(&ledger, 2, "4", "5g"), None);
    ledger.release(kernel(2));
    assert_eq!(pin(&ledger, 2, "4", "4g").as_deref(), Some("1"));
    // Asking alone pins nothing, and counts what is asked for.
    let ledger = two_nodes();
    let reserved = ledger.reserve(kernel(1), &ask("2", "5g")).unwrap();
    let limits = |n| ledger.container_limits(kernel(n), &reserved.allocation);
    assert_eq!(limits(2).cpuset_mems, None);
    assert_eq!(limits(1).cpuset_mems.as_deref(), Some("0"));
}

#[test]
fn memory_without_cores_is_no_second_node() {
    let mut host = host(8, 1, 16);
    host.node_memory.insert(1, 64 << 30);
    let memory = host.node_memory.clone();
    let ledger = Ledger::with_plugins(intrinsic(host, 1, false), policy(), memory).unwrap();
    assert_eq!(pin(&ledger, 1, "2", "4g"), None);
}

#[test]
fn who_is_pinned_is_widened_when_others_may_take_the_memory() {
    let ledger = two_nodes();
    let due = |ledger: &Ledger| -> Vec<(KernelId, String, String)> {
        let due = ledger.to_widen().into_iter();
        due.map(|pinned| (pinned.kernel_id, pinned.node, pinned.all))
            .collect()
    };
    let first = [(kernel(1), "0".to_owned(), "0,1".to_owned())];
    assert_eq!(pin(&ledger, 1, "2", "5g").as_deref(), Some("0"));
    assert_eq!(due(&ledger), []);
    // Of both nodes, and its 4 GiB may all be on the first.
    assert_eq!(pin(&ledger, 2, "5", "4g"), None);
    assert_eq!(due(&ledger), first);
    // Until it is done, or the other is gone.
    assert_eq!(due(&ledger), first);
    ledger.release(kernel(2));
    assert_eq!(due(&ledger), []);
    assert_eq!(pin(&ledger, 2, "5", "4g"), None);
    let told = ledger.to_widen();
    // A new container of the same kernel meanwhile: what was done was done to the old one.
    ledger.release(kernel(2));
    let held = ledger.allocation(kernel(1)).unwrap();
    assert!(
        ledger
            .container_limits(kernel(1), &held)
            .cpuset_mems
            .is_some()
    );
    assert_eq!(pin(&ledger, 2, "5", "4g"), None);
    ledger.widened(&told[0]);
    assert_eq!(due(&ledger), first);
    ledger.widened(&ledger.to_widen()[0]);
    assert_eq!(due(&ledger), []);

    // After a restart of the agent nobody says who was pinned.
    let next = two_nodes();
    next.restore(kernel(1), &held, true).unwrap();
    assert_eq!(due(&next), []);
    let other = ledger.allocation(kernel(2)).unwrap();
    next.restore(kernel(2), &other, true).unwrap();
    assert_eq!(due(&next), first);
    next.release(kernel(1));
    assert_eq!(due(&next), []);

    // Nothing is to be pinned any more: who may be is widened, and nobody is pinned anew.
    let mut next = two_nodes();
    next.policy.memory_nodes = false;
    next.restore(kernel(1), &held, true).unwrap();
    assert_eq!(due(&next), first);
    next.widened(&next.to_widen()[0]);
    assert_eq!(due(&next), []);
    next.release(kernel(1));
    assert_eq!(pin(&next, 1, "2", "5g"), None);
    assert_eq!(due(&next), []);
    // One that was not pinned is the operator's, who may have pinned it to the same node.
    next.release(kernel(1));
    next.restore(kernel(1), &held, false).unwrap();
    assert_eq!(due(&next), []);
}

#[test]
fn concurrent_reservations_never_share_a_core() {
    let ledger = Arc::new(ledger_of(host(64, 1, 64)));
    let threads: Vec<_> = (0..8u8)
        .map(|thread| {
            let ledger = Arc::clone(&ledger);
            std::thread::spawn(move || {
                for round in 0..50u8 {
                    let id = KernelId([thread; 16]);
                    let reserved = ledger.reserve(id, &ask("4", "1g")).unwrap();
                    let held = ledger.snapshot();
                    assert!(
                        held.devices
                            .iter()
                            .all(|(slot, _, used, _)| slot != "cpu" || used == "0" || used == "1")
                    );
                    if round % 2 == 0 {
                        ledger.commit(id);
                    }
                    assert_eq!(ledger.release(id), Some(reserved.allocation));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(ledger.snapshot().holders.is_empty());
    assert!(
        ledger
            .snapshot()
            .devices
            .iter()
            .all(|(_, _, used, _)| used == "0")
    );
}

/// The table of the specification, bit by bit.
#[test]
fn announced_memory_is_aligned_as_in_the_original() {
    for (total, reserved, usable) in [
        (68_719_476_736, 1 << 30, 67_645_734_912),
        (67_430_129_664, 1 << 30, 66_353_889_280),
        (67_430_129_664, 0, 67_427_631_104),
        (17_179_869_189, 1 << 30, 16_106_127_360),
        (17_195_597_824, 1 << 30, 16_122_904_576),
        (1 << 20, 1 << 30, 0),
    ] {
        assert_eq!(align_memory(total, reserved, 16 << 20), usable, "{total}");
    }
}

#[test]
fn the_node_announces_what_is_not_reserved() {
    let ledger = ledger();
    let available: Vec<_> = ledger
        .available()
        .into_iter()
        .map(|s| (s.name, s.kind.word(), s.amount.to_string()))
        .collect();
    assert_eq!(
        available,
        [
            ("cpu".to_owned(), "count", "7".to_owned()),
            ("mem".to_owned(), "bytes", "16106127360".to_owned())
        ]
    );
    // Announcing is about the node, not about what is free.
    ledger.reserve(kernel(1), &ask("8", "1g")).unwrap();
    assert_eq!(ledger.available()[0].amount, 7.into());
}

#[test]
fn devices_are_shown_with_their_kernel() {
    let ledger = ledger();
    let reserved = ledger.reserve(kernel(1), &ask("2", "1g")).unwrap();
    let attached = ledger.attached_devices(&reserved.allocation);
    let json = serde_json::to_value(&attached).unwrap();
    assert_eq!(
        json,
        serde_json::json!([
            ["cpu", [
                {"device_id": "0", "model_name": "", "data": {"cores": 2}},
                {"device_id": "1", "model_name": "", "data": {"cores": 2}},
            ]],
            ["mem", [{"device_id": "root", "model_name": "", "data": {}}]],
        ])
    );
}

#[test]
fn devices_are_exchanged_for_free_ones_only() {
    let mut plugins = intrinsic(host(8, 1, 16), 1, false);
    plugins.push(Kind::fpga("fpga", "fpga.device", 3));
    let ledger = Ledger::with_plugins(plugins, policy(), BTreeMap::new()).unwrap();
    let one = || SlotRequest {
        slots: Slots::from_text([("cpu", "1"), ("mem", "64m"), ("fpga.device", "1")]).unwrap(),
        allow_fragmentation: true,
    };
    ledger.reserve(kernel(1), &one()).unwrap();
    ledger.reserve(kernel(2), &one()).unwrap();
    assert_eq!(ledger.free_devices("fpga.device"), ["f2"]);
    let exchange = |ids: &[&str]| {
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        ledger.exchange(kernel(1), "fpga.device", &ids)
    };
    let before = ledger.snapshot();
    for wrong in [&["f1"][..], &["f9"], &["f0", "f2"], &[], &["f2", "f2"]] {
        assert_eq!(exchange(wrong), None, "{wrong:?}");
    }
    assert_eq!(ledger.snapshot(), before);
    let given = exchange(&["f2"]).unwrap();
    assert_eq!(given.ids("fpga", "fpga.device"), ["f2"]);
    assert_eq!(ledger.free_devices("fpga.device"), ["f0"]);
    ledger.release(kernel(1));
    assert_eq!(ledger.free_devices("fpga.device"), ["f0", "f2"]);
}

fn announced(ledger: &Ledger, slot: &str) -> Option<(String, SlotType)> {
    let mut all = ledger.available().into_iter();
    let found = all.find(|found| found.name == slot)?;
    Some((text(found.amount), found.kind))
}

/// The manager takes what kernels hold off what is announced: less than that, and the node gets no
/// session any more.
#[test]
fn what_kernels_hold_is_announced_when_it_is_given_out_no_more() {
    const SLOT: &str = "fpga.device";
    let ledger = |plugins: Vec<Box<dyn DevicePlugin>>| {
        let mut all = intrinsic(host(8, 1, 16), 1, false);
        all.extend(plugins);
        Ledger::with_plugins(all, policy(), BTreeMap::new()).unwrap()
    };
    let count = |amount: &str| Some((amount.to_owned(), SlotType::Count));
    let ask = |amount: &str| SlotRequest {
        slots: Slots::from_text([("cpu", "1"), ("mem", "64m"), (SLOT, amount)]).unwrap(),
        allow_fragmentation: true,
    };
    let first = ledger(vec![Kind::fpga("fpga", SLOT, 3)]);
    let shrinks = first.shrinks();
    let held = first.reserve(kernel(1), &ask("2")).unwrap().allocation;
    assert_eq!(held.ids("fpga", SLOT), ["f0", "f1"]);
    assert_eq!(announced(&first, SLOT), count("3"));
    // Of the three the last two are gone: one is held, and the other nobody's.
    first.install(Kind::fpga("fpga", SLOT, 1).into()).unwrap();
    assert_eq!(announced(&first, SLOT), count("2"));
    assert!(first.reserve(kernel(2), &ask("1")).is_err());
    assert!(!shrinks.has_changed().unwrap());
    first.release(kernel(1));
    assert_eq!(announced(&first, SLOT), count("1"));
    assert!(shrinks.has_changed().unwrap(), "the manager is not told");
    // What is given back and works is announced as before: no news.
    let shrinks = first.shrinks();
    first.reserve(kernel(2), &ask("1")).unwrap();
    first.release(kernel(2));
    assert!(!shrinks.has_changed().unwrap());

    // The plugin has not come yet; when it has, nothing is announced twice.
    let next = ledger(Vec::new());
    next.restore(kernel(1), &held, true).unwrap();
    assert_eq!(announced(&next, SLOT), count("2"));
    next.install(Kind::fpga("fpga", SLOT, 3).into()).unwrap();
    assert_eq!(announced(&next, SLOT), count("3"));
    next.release(kernel(1));
    assert_eq!(announced(&next, SLOT), count("3"));

    // Parts are told as such, and shares of a device are no more than was given of it.
    let part = "cuda.device:1g.10gb-mig";
    let mut of_cuda = Allocation::default();
    let one = vec![("MIG-0".to_owned(), Decimal::ONE)];
    let half = vec![("GPU-0".to_owned(), Decimal::new(5, 1))];
    of_cuda.insert(
        "cuda",
        vec![(part.to_owned(), one), ("cuda.shares".to_owned(), half)],
    );
    next.restore(kernel(2), &of_cuda, true).unwrap();
    assert_eq!(
        announced(&next, part),
        Some(("1".to_owned(), SlotType::Unique))
    );
    assert_eq!(announced(&next, "cuda.shares"), count("0.5"));
    next.release(kernel(2));
    assert_eq!(announced(&next, part), None);
}

#[test]
fn this_host_can_be_discovered() {
    let mut options = config::LoadOptions::of_this_process(None, true);
    options.environment = Box::new(|_| None);
    let config = config::load(&options).unwrap().config;
    let ledger = Ledger::discover(&config, Vec::new()).unwrap();
    let reserved = ledger.reserve(kernel(1), &ask("1", "64m")).unwrap();
    assert!(
        ledger
            .container_limits(kernel(1), &reserved.allocation)
            .cpuset_cpus
            .is_some()
    );
}

proptest! {
    /// Any sequence of reservations, releases and restarts: used is the sum of what is held.
    #[test]
    fn used_is_always_the_sum_of_what_is_held(
        steps in prop::collection::vec((0u8..6, 0u32..5, 0u64..6, 0u8..8), 1..60),
    ) {
        let mut ledger = ledger();
        for (n, cpu, gib, action) in steps {
            match action {
                0 | 1 => { ledger.release(kernel(n)); }
                2 => {
                    let fresh = self::ledger();
                    for id in 0..6 {
                        if let Some(held) = ledger.allocation(kernel(id)) {
                            prop_assert_eq!(fresh.restore(kernel(id), &held, true), Ok(Restored::default()));
                        }
                    }
                    prop_assert_eq!(fresh.snapshot().devices, ledger.snapshot().devices);
                    ledger = fresh;
                }
                _ => { let _ = ledger.reserve(kernel(n), &ask(&cpu.to_string(), &format!("{gib}g"))); }
            }
            let snapshot = ledger.snapshot();
            for (slot, id, used, total) in &snapshot.devices {
                let held: Amount = snapshot
                    .holders
                    .values()
                    .flat_map(|holder| holder.allocation.shares(slot, slot))
                    .filter(|(held, _)| held == id)
                    .map(|(_, amount)| *amount)
                    .sum();
                let used: Amount = used.parse().unwrap();
                prop_assert_eq!(used, held);
                prop_assert!(used <= total.parse().unwrap());
            }
        }
    }
}
