//! Placements captured from the original.

use super::*;

/// The devices of a captured table.
fn captured(
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
    Box::new(Kind {
        key,
        slot,
        devices: devices.collect(),
        fraction,
        variable: None,
    })
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
            captured(case, "cuda", accelerator, fraction),
            captured(case, "cpu", "cpu", false),
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
