//! The objects of crate `ebpf` in the kernel.
//!
//! In: the directory of pins. Out: loaded programs, and maps, which are those that an earlier process
//! has pinned where there are any. Invariant: a pinned map is only taken when its records are of
//! this version's size.

use std::path::Path;

use aya::maps::{Map, MapData};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use ebpf::records::{
    Address, Bridge, Delivered, Flow, FlowKey, Fragment, FragmentKey, LedPeer, LedPeerKey, LedSet,
    LocalFlow, Node, PortCounters, PortFlows, Service, ServiceKey, SweepOrder, WayBack,
};
use ebpf::{map, program};

use super::error::KernelPathError;
use super::pins::Pins;

pub(super) fn take(object: &mut Ebpf, name: &'static str) -> Result<Map, KernelPathError> {
    object
        .take_map(name)
        .ok_or(KernelPathError::Missing { name })
}

pub(super) fn classifier<'a>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, KernelPathError> {
    object
        .program_mut(name)
        .ok_or(KernelPathError::Missing { name })?
        .try_into()
        .map_err(|source| KernelPathError::Program { name, source })
}

/// Entries of maps that give up the oldest one for a new one, as the object has them.
const OLDEST_GO: [(&str, u32); 3] = [
    (map::FLOWS, 131_072),
    (map::FRAGMENTS, 16_384),
    (map::OUTGOING, 8_192),
];
/// A CPU takes free entries of such a map 128 at a time (kernel/bpf/bpf_lru_list.c, `LOCAL_FREE_TARGET`).
/// Where others have all of them it gives up the youngest of its own: each has room for twice as many.
const ENTRIES_PER_CPU: u32 = 256;

/// Entries of such a map on a machine with so many possible CPUs.
fn entries(least: u32, cpus: usize) -> u32 {
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    let wanted = cpus.saturating_mul(ENTRIES_PER_CPU);
    // What Linux sets aside for them, as many as there may be, stays below 100 MiB.
    least.max(wanted.min(OLDEST_GO[0].1))
}

/// Maps that are pinned have room for as many CPUs: Linux says at its start how many there may ever be, and no pin
/// outlives that.
pub(super) fn load(pins: &Pins) -> Result<Ebpf, KernelPathError> {
    load_for(pins.directory(), aya::util::nr_cpus().unwrap_or(1))
}

fn load_for(pins: &Path, cpus: usize) -> Result<Ebpf, KernelPathError> {
    let mut loader = EbpfLoader::new();
    for (name, least) in OLDEST_GO {
        loader.map_max_entries(name, entries(least, cpus));
    }
    let mut object = loader
        .default_map_pin_directory(pins)
        .load(ebpf::nat())
        .map_err(KernelPathError::Load)?;
    for name in [
        program::FROM_UPLINK,
        program::FROM_CONTAINER,
        program::TO_CONTAINER,
        program::SWEEP,
    ] {
        classifier(&mut object, name)?
            .load()
            .map_err(|source| KernelPathError::Program { name, source })?;
    }
    Ok(object)
}

/// Sizes of keys and values of the pinned maps, as this version has them. The loader takes a
/// pinned map of any shape, and then reads past the ends of its records.
pub(super) fn pins_fit(pins: &Pins) -> bool {
    const PORT: usize = size_of::<ServiceKey>();
    const ADDRESS: usize = size_of::<Address>();
    const NUMBER: usize = size_of::<u32>();
    let sizes: [(&str, usize, usize); 16] = [
        (map::SERVICES, PORT, size_of::<Service>()),
        (map::FLOWS, size_of::<FlowKey>(), size_of::<Flow>()),
        (map::LOCAL_FLOWS, NUMBER, size_of::<LocalFlow>()),
        (
            map::FRAGMENTS,
            size_of::<FragmentKey>(),
            size_of::<Fragment>(),
        ),
        (map::OUTGOING, size_of::<FlowKey>(), NUMBER),
        (map::ADDRESSES, ADDRESS, NUMBER),
        (map::UPLINKS, NUMBER, NUMBER),
        (map::WAYS_BACK, NUMBER + size_of::<WayBack>(), NUMBER),
        (map::COUNTERS, PORT, size_of::<PortCounters>()),
        (map::ACTIVE, PORT, size_of::<PortFlows>()),
        (map::DELIVERED, NUMBER, size_of::<Delivered>()),
        (map::BRIDGES, NUMBER, size_of::<Bridge>()),
        (map::ORDERS, NUMBER, size_of::<SweepOrder>()),
        (map::NODES, NUMBER, size_of::<Node>()),
        (map::LED_SOCKETS, NUMBER, size_of::<LedSet>()),
        (
            map::LED_PEERS,
            size_of::<LedPeerKey>(),
            size_of::<LedPeer>(),
        ),
    ];
    sizes.into_iter().all(|(name, key, value)| {
        let path = pins.directory().join(name);
        !path.exists() || fits(&path, key, value)
    })
}

fn fits(pin: &Path, key: usize, value: usize) -> bool {
    aya::maps::MapInfo::from_pin(pin).is_ok_and(|info| {
        usize::try_from(info.key_size()) == Ok(key)
            && usize::try_from(info.value_size()) == Ok(value)
    })
}

/// What containers were delivered is counted on in the same map when the others begin anew because
/// their layout is another: containers live on.
pub(super) fn adopt_delivered(pins: &Pins) {
    let path = pins.directory().join(map::DELIVERED);
    if path.exists() {
        return;
    }
    let others = pins.other_layouts().into_iter();
    let known = others.map(|other| other.directory().join(map::DELIVERED));
    for known in known.filter(|it| fits(it, size_of::<u32>(), size_of::<Delivered>())) {
        match MapData::from_pin(&known).map(|map| map.pin(&path)) {
            Ok(Ok(())) => return,
            Ok(Err(err)) => tracing::warn!(%err, "what containers received is counted anew"),
            Err(err) => tracing::warn!(%err, "what containers received is counted anew"),
        }
    }
}

/// Takes a map out of an object, as what it is.
macro_rules! typed {
    ($object:expr, $name:expr) => {
        $crate::forward::kernel_path::object::take($object, $name)?
            .try_into()
            .map_err(
                |source| $crate::forward::kernel_path::error::KernelPathError::Map {
                    name: $name,
                    source,
                },
            )?
    };
}
pub(super) use typed;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cpu_has_room_in_maps_whose_oldest_entries_go() {
        for (least, cpus, wanted) in [
            (8_192, 2, 8_192),
            (8_192, 192, 49_152),
            (16_384, 192, 49_152),
            (8_192, 8_192, 131_072),
            (131_072, 8_192, 131_072),
        ] {
            assert_eq!(entries(least, cpus), wanted, "{least} {cpus}");
        }
        let pins = Path::new("/sys/fs/bpf").join(format!("bai-entries-{}", std::process::id()));
        if let Err(err) = std::fs::create_dir(&pins) {
            crate::skip::needs(format!("no pins can be made: {err}"));
            return;
        }
        let found = [2, 192].map(|cpus| {
            let mut object = load_for(&pins, cpus).expect("loaded");
            OLDEST_GO.map(|(name, _)| {
                let map = take(&mut object, name).expect("a map");
                let (Map::LruHashMap(map) | Map::HashMap(map)) = map else {
                    panic!("{name}");
                };
                std::fs::remove_file(pins.join(name)).expect("a pin");
                map.info().expect("its size").max_entries()
            })
        });
        std::fs::remove_dir_all(&pins).expect("removed");
        let few = OLDEST_GO.map(|(_, least)| least);
        assert_eq!(found, [few, [131_072, 49_152, 49_152]]);
    }
}
