//! Placements captured from the original.

use super::*;

/// A plugin from a captured table: one unit of one slot per device, on given NUMA nodes.
#[derive(Debug)]
struct Captured {
    key: &'static str,
    slot: &'static str,
    devices: Vec<(String, Option<i32>)>,
    fraction: bool,
}

impl Captured {
    fn of(
        case: &serde_json::Value,
        key: &'static str,
        slot: &'static str,
        fraction: bool,
    ) -> Box<dyn DevicePlugin> {
        let entries = case[key].as_array().unwrap().iter();
        let devices = entries.map(|entry| {
            let node = entry[1].as_i64().map(|node| i32::try_from(node).unwrap());
            (entry[0].as_str().unwrap().to_owned(), node)
        });
        Box::new(Self {
            key,
            slot,
            devices: devices.collect(),
            fraction,
        })
    }
}

impl DevicePlugin for Captured {
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
            hw_location: String::new(),
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
            slot: self.slot.to_owned(),
            kind: SlotType::Count,
            total: Decimal::ONE,
        });
        match self.fraction {
            true => AllocationMap::fraction(
                Strategy::Evenly,
                Decimal::new(1, 2),
                rows.collect(),
                vec![],
            ),
            false => AllocationMap::discrete(Strategy::Evenly, rows.collect(), vec![]),
        }
    }
    fn totals(&self, _: &[Device]) -> Vec<(String, Amount)> {
        vec![]
    }
    fn limit(&self, _: &[Device], _: &[(String, Vec<(String, Amount)>)], _: &mut ContainerLimits) {}
    fn attached(&self, _: &[Device], _: &[(String, Vec<(String, Amount)>)]) -> Vec<AttachedDevice> {
        vec![]
    }
}

/// Every captured multi-device operation over NUMA layouts, both policies, through the ledger.
#[test]
fn every_captured_placement_over_numa_nodes_is_the_same() {
    let text = include_str!("../../../../../tests/vectors/resources/alloc_affinity.json");
    let parsed: serde_json::Value = serde_json::from_str(text).unwrap();
    let mut operations = 0;
    for case in parsed["cases"].as_array().unwrap() {
        let fraction = case["accel_kind"] == "fraction";
        let accelerator = if fraction {
            "cuda.shares"
        } else {
            "cuda.device"
        };
        let plugins: Vec<Box<dyn DevicePlugin>> = vec![
            Captured::of(case, "cuda", accelerator, fraction),
            Captured::of(case, "cpu", "cpu", false),
            Box::new(MemPlugin {
                total: case["mem_total"].as_str().unwrap().parse().unwrap(),
            }),
        ];
        let affinity = match case["policy"].as_str().unwrap() {
            "INTERLEAVED" => AffinityPolicy::Interleaved,
            _ => AffinityPolicy::PreferSingleNode,
        };
        let ledger = Ledger::with_plugins(
            plugins,
            Policy {
                affinity,
                ..policy()
            },
            BTreeMap::new(),
        )
        .unwrap();
        for (index, op) in case["ops"].as_array().unwrap().iter().enumerate() {
            let at = format!("{} operation {index}: {op}", case["id"]);
            operations += 1;
            let recorded = |value: &serde_json::Value| -> Allocation {
                serde_json::from_value(value.clone()).unwrap()
            };
            if op["op"] == "free" {
                let freed = recorded(&op["alloc"]);
                let holder = (0..=u8::MAX).map(kernel).find(|id| {
                    ledger
                        .allocation(*id)
                        .is_some_and(|held| held.same_as(&freed))
                });
                ledger.release(holder.expect(&at));
                continue;
            }
            let pairs = op["slots"].as_object().unwrap().iter();
            let slots = Slots::from_text(
                pairs.map(|(slot, amount)| (slot.as_str(), amount.as_str().unwrap())),
            )
            .unwrap();
            let id = kernel(u8::try_from(index).unwrap());
            let before = ledger.snapshot();
            match ledger.reserve(
                id,
                &SlotRequest {
                    slots,
                    allow_fragmentation: true,
                },
            ) {
                Ok(reserved) => {
                    assert!(op["ok"].is_object(), "{at}");
                    let expected = recorded(&op["ok"]);
                    for (name, slots) in expected.devices() {
                        assert_eq!(reserved.allocation.of_device(name), slots, "{at}");
                    }
                    assert!(reserved.allocation.same_as(&expected), "{at}");
                }
                Err(err) => {
                    assert_eq!(op["error"], err.class(), "{at}");
                    assert_eq!(ledger.snapshot(), before, "{at}");
                }
            }
        }
    }
    assert_eq!(operations, 960);
}
