//! The maps against captures of the original, operation by operation.

use proptest::prelude::*;
use serde_json::Value;

use super::Strategy;
use super::*;

fn dec(value: &Value) -> Decimal {
    value.as_str().unwrap().parse().unwrap()
}

fn vectors(text: &str) -> Vec<Value> {
    let parsed: Value = serde_json::from_str(text).unwrap();
    parsed["cases"].as_array().unwrap().clone()
}

/// Device to amount, in the order given.
fn shares(value: &Value) -> Shares {
    let map = value.as_object().unwrap();
    map.iter()
        .map(|(id, amount)| (id.clone(), dec(amount)))
        .collect()
}

fn slots(value: &Value) -> Vec<(String, Shares)> {
    let map = value.as_object().unwrap();
    map.iter()
        .map(|(slot, of_slot)| (slot.clone(), shares(of_slot)))
        .collect()
}

fn state(map: &AllocationMap) -> Shares {
    map.rows()
        .map(|(device, used)| (device.id.clone(), used))
        .collect()
}

fn rows(devices: &Value, slot: &str, total: Option<Decimal>) -> Vec<MapDevice> {
    let rows = devices.as_array().unwrap().iter().map(|device| MapDevice {
        id: device[0].as_str().unwrap().to_owned(),
        alias: None,
        slot: slot.to_owned(),
        kind: SlotType::Count,
        total: total.unwrap_or_else(|| dec(&device[1])),
    });
    rows.collect()
}

/// Every operation of every case: result in its order, error class, what was left, whole state.
#[test]
fn every_captured_operation_gives_the_same_result_and_state() {
    let mut operations = 0;
    for case in vectors(include_str!(
        "../../../../tests/vectors/resources/alloc_map.json"
    )) {
        let slot = case["slot"].as_str().unwrap();
        let devices = rows(&case["devices"], slot, None);
        let strategy = match case["strategy"].as_str().unwrap() {
            "FILL" => Strategy::Fill,
            _ => Strategy::Evenly,
        };
        let mut map = match case["kind"].as_str().unwrap() {
            "discrete" => AllocationMap::discrete(strategy, devices, vec![]),
            _ => AllocationMap::fraction(strategy, dec(&case["quantum_size"]), devices, vec![]),
        };
        for (index, op) in case["ops"].as_array().unwrap().iter().enumerate() {
            let at = format!("{} operation {index}: {op}", case["id"]);
            operations += 1;
            if op["op"] == "free" {
                assert_eq!(map.free(&slots(&op["alloc"])), [], "{at}");
            } else {
                let request = MapRequest {
                    context: None,
                    hint: None,
                    allow_fragmentation: op["allow_resource_fragmentation"] != Value::Bool(false),
                };
                match map.allocate(&[(slot.to_owned(), dec(&op["amount"]))], request) {
                    Ok(given) => assert_eq!(given, slots(&op["ok"]), "{at}"),
                    Err(err) => {
                        assert_eq!(op["error"], err.class(), "{at}");
                        if let ResourceError::Insufficient { total, .. } = err {
                            assert_eq!(total, dec(&op["total_allocatable"]), "{at}");
                        }
                    }
                }
            }
            assert_eq!(state(&map), shares(&op["state"][slot]), "{at}");
        }
    }
    assert_eq!(operations, 2900);
}

fn device(id: &str, slot: &str, kind: SlotType, total: &str) -> MapDevice {
    MapDevice {
        id: id.to_owned(),
        alias: None,
        slot: slot.to_owned(),
        kind,
        total: total.parse().unwrap(),
    }
}

fn request() -> MapRequest<'static> {
    MapRequest {
        context: Some("cuda"),
        hint: None,
        allow_fragmentation: true,
    }
}

#[test]
fn unique_slots_are_given_one_at_a_time_and_profiles_exclude_each_other() {
    let profile = |name: &str| format!("cuda.device:{name}-mig");
    let devices = vec![
        device("MIG-1/1/0", &profile("1g.5gb"), SlotType::Unique, "1"),
        device("MIG-2/2/0", &profile("2g.10gb"), SlotType::Unique, "1"),
    ];
    let exclusive = vec!["cuda.device".to_owned(), "cuda.device:*-mig".to_owned()];
    let mut map = AllocationMap::discrete(Strategy::Evenly, devices, exclusive);
    let ask = |map: &mut AllocationMap, slots: &[(&str, i64)]| {
        let slots: Vec<_> = slots
            .iter()
            .map(|(name, amount)| (profile(name), Decimal::from(*amount)))
            .collect();
        map.allocate(&slots, request())
    };
    let err = ask(&mut map, &[("1g.5gb", 2)]).unwrap_err();
    assert_eq!(err.class(), "InvalidResourceArgument");
    let err = ask(&mut map, &[("1g.5gb", 1), ("2g.10gb", 1)]).unwrap_err();
    assert_eq!(err.class(), "InvalidResourceCombination");
    // A slot that is asked for nothing excludes nothing.
    let given = ask(&mut map, &[("1g.5gb", 1), ("2g.10gb", 0)]).unwrap();
    assert_eq!(given[0].1, [("MIG-1/1/0".to_owned(), Decimal::ONE)]);
}

#[test]
fn unique_slots_are_given_whole_also_beside_shares() {
    const PART: &str = "cuda.device:1g.5gb-mig";
    let devices = vec![
        device("GPU-0", "cuda.shares", SlotType::Count, "4"),
        device("MIG-0", PART, SlotType::Unique, "1"),
        device("MIG-1", PART, SlotType::Unique, "1"),
    ];
    // A quantum of which 1 is no multiple.
    let mut map =
        AllocationMap::fraction(Strategy::Evenly, "0.3".parse().unwrap(), devices, vec![]);
    let mut ask = |amount: &str| {
        let slots = [(PART.to_owned(), amount.parse().unwrap())];
        map.allocate(&slots, request())
    };
    for amount in ["0.5", "2"] {
        assert_eq!(ask(amount).unwrap_err().class(), "InvalidResourceArgument");
    }
    let mut given: Vec<Shares> = Vec::new();
    for _ in 0..2 {
        given.push(ask("1").unwrap().remove(0).1);
    }
    let whole = |id: &str| vec![(id.to_owned(), Decimal::ONE)];
    assert_eq!(given, [whole("MIG-0"), whole("MIG-1")]);
    assert_eq!(ask("1").unwrap_err().class(), "InsufficientResource");
}

#[test]
fn a_device_that_is_held_twice_takes_nothing_from_the_others() {
    let devices = ["a", "b"].map(|id| device(id, "cuda.device", SlotType::Count, "1"));
    let mut map = AllocationMap::discrete(Strategy::Evenly, devices.to_vec(), vec![]);
    let ask = |map: &mut AllocationMap| {
        let given = map.allocate(&[("cuda.device".to_owned(), Decimal::ONE)], request());
        given.map(|given| given[0].1[0].0.clone())
    };
    // Given out in shares, when the node had other settings.
    let share = ["cuda.shares".to_owned()].map(|slot| {
        let half = vec![("a".to_owned(), Decimal::new(5, 1))];
        (slot, half)
    });
    assert_eq!(map.apply(&share), []);
    let once = map.clone();
    assert_eq!(map.apply(&share), []);
    let over = [("cuda.device".to_owned(), "a".to_owned())];
    assert_eq!(map.overused_since(&once), over);
    assert_eq!(map.overused_since(&map), []);
    assert_eq!(ask(&mut map).unwrap(), "b");
    map.free(&share);
    assert_eq!(ask(&mut map).unwrap_err().class(), "InsufficientResource");
    map.free(&share);
    assert_eq!(ask(&mut map).unwrap(), "a");
}

#[test]
fn patterns_match_as_in_a_shell() {
    for (pattern, text, expected) in [
        ("cuda.device", "cuda.device", true),
        ("cuda.device", "cuda.devices", false),
        ("cuda.device:*-mig", "cuda.device:1g.5gb-mig", true),
        ("cuda.device:*-mig", "cuda.device:1g.5gb", false),
        ("cuda.*", "CUDA.x", false),
        ("*", "", true),
        ("a*a", "a", false),
        ("a*b*c", "a-b-b-c", true),
        ("a*b*c", "a-c", false),
    ] {
        assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
    }
}

proptest! {
    /// Whatever is asked and given back: nothing below zero, nothing above the total, and all
    /// devices empty when everything is returned.
    #[test]
    fn use_stays_within_bounds_and_returns_to_zero(
        totals in prop::collection::vec(1u32..9, 1..6),
        asks in prop::collection::vec((0u32..900, any::<bool>()), 1..40),
        fraction in any::<bool>(),
        fill in any::<bool>(),
    ) {
        let devices: Vec<MapDevice> = totals
            .iter()
            .enumerate()
            .map(|(index, total)| device(&format!("d{index}"), "x", SlotType::Count, &total.to_string()))
            .collect();
        let strategy = if fill { Strategy::Fill } else { Strategy::Evenly };
        let mut map = match fraction {
            true => AllocationMap::fraction(strategy, "0.1".parse().unwrap(), devices, vec![]),
            false => AllocationMap::discrete(strategy, devices, vec![]),
        };
        let mut held: Vec<Vec<(String, Shares)>> = Vec::new();
        for (hundredths, give_back) in asks {
            if give_back && !held.is_empty() {
                map.free(&held.remove(0));
            } else {
                let amount = match fraction {
                    true => Decimal::new(hundredths.into(), 2),
                    false => Decimal::from(hundredths / 100),
                };
                let mut tried = map.clone();
                if let Ok(given) = tried.allocate(&[("x".to_owned(), amount)], request()) {
                    map = tried;
                    held.push(given);
                }
            }
            for (device, used) in map.rows() {
                prop_assert!(used >= Decimal::ZERO && used <= device.total, "{device:?} {used}");
            }
        }
        for given in held {
            map.free(&given);
        }
        prop_assert!(map.rows().all(|(_, used)| used.is_zero()));
    }
}
