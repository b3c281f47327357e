use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use config::{Config, CudaInjection};
use shared::ids::KernelId;
use shared::observed::{AcceleratorCounters, AcceleratorKind, Proximity};

use super::*;
use crate::accelerator::device::of_rows;
use crate::accelerator::engine::EngineFacts;
use crate::accelerator::mock;
use crate::accelerator::settings::Options;
use crate::resource::{Ledger, SlotRequest, Slots};
use crate::stats::fixture::card;

fn defaults() -> std::sync::Arc<config::Config> {
    let mut options = config::LoadOptions::of_this_process(None, true);
    options.environment = Box::new(|_| None);
    config::load(&options).unwrap().config
}

fn settings(options: &[(&str, &str)]) -> Settings {
    let config = defaults();
    let cuda = options
        .iter()
        .map(|(key, text)| ((*key).to_owned(), (*text).to_owned()))
        .collect();
    let options = Options::from([("cuda".to_owned(), cuda)]);
    Settings::of(&config, &options, EngineFacts::default())
}

/// Devices 0 to 2 whole with 80 GiB, 3 divided into two parts, 1 faulty.
fn devices(settings: &Settings) -> Vec<AcceleratorDevice> {
    let counters = |gib: u64| AcceleratorCounters {
        memory_total_bytes: Some(gib << 30),
        ..AcceleratorCounters::default()
    };
    let mut rows: Vec<_> = (0..4).map(|index| card(index, counters(80))).collect();
    rows[1].healthy = false;
    rows[1].fault = Some(79);
    rows[0].units = Some(132);
    rows[3].divided = true;
    for part in 0..2 {
        let mut row = card(4000 + part, counters(10));
        row.id = format!("MIG-{part}");
        row.part_of = Some(3);
        row.profile = "1g.10gb".to_owned();
        row.units = Some(16);
        rows.push(row);
    }
    of_rows(&rows, settings)
}

fn plugin(settings: &Settings) -> AcceleratorPlugin {
    AcceleratorPlugin::of_kind("cuda", &devices(settings), settings)
}

fn totals(plugin: &AcceleratorPlugin) -> BTreeMap<String, String> {
    let totals = plugin.totals(&[]).into_iter();
    totals
        .map(|(slot, amount)| (slot, amount.to_string()))
        .collect()
}

fn shares(slot: &str, shares: &[(&str, &str)]) -> Vec<(String, Shares)> {
    let shares = shares.iter();
    let shares = shares.map(|(id, amount)| ((*id).to_owned(), amount.parse().unwrap()));
    vec![(slot.to_owned(), shares.collect())]
}

#[test]
fn working_devices_are_slots_and_parts_stand_in_for_what_is_divided() {
    let plugin = plugin(&settings(&[]));
    let ids: Vec<&str> = plugin.devices.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["GPU-0", "GPU-1", "GPU-2", "MIG-0", "MIG-1"]);
    let slots: Vec<(String, SlotType)> = plugin
        .slots()
        .into_iter()
        .map(|s| (s.name, s.kind))
        .collect();
    assert_eq!(
        slots,
        [
            ("cuda.device".to_owned(), SlotType::Count),
            ("cuda.device:1g.10gb-mig".to_owned(), SlotType::Unique),
        ]
    );
    assert_eq!(
        totals(&plugin),
        BTreeMap::from([
            ("cuda.device".to_owned(), "2".to_owned()),
            ("cuda.device:1g.10gb-mig".to_owned(), "2".to_owned()),
        ])
    );
    let hardware = plugin.hardware().unwrap();
    assert_eq!(hardware.status, HardwareStatus::Degraded);
    assert_eq!(hardware.metadata["GPU-1"], "fault 79");
    assert_eq!(
        hardware.status_info.as_deref(),
        Some("not given out: GPU-1")
    );
}

#[test]
fn devices_with_links_are_given_together_and_their_ways_are_told() {
    let settings = settings(&[]);
    let mut rows: Vec<_> = (0..4)
        .map(|index| card(index, AcceleratorCounters::default()))
        .collect();
    for (one, other, near) in [
        (0, 1, Proximity::SYSTEM),
        (1, 3, Proximity::links(12)),
        (2, 3, Proximity::SWITCH),
    ] {
        rows[one].near[other] = near;
        rows[other].near[one] = near;
    }
    let plugin = AcceleratorPlugin::of_kind("cuda", &of_rows(&rows, &settings), &settings);
    let hardware = plugin.hardware().unwrap();
    assert_eq!(hardware.metadata["GPU-3 near"], "GPU-1 NV12, GPU-2 PIX");
    let ledger = Ledger::discover(&defaults(), vec![Box::new(plugin)]).unwrap();
    let reserve = |kernel: u8, count: &str| {
        let all = [("cpu", "1"), ("mem", "64m"), ("cuda.device", count)];
        let request = SlotRequest {
            slots: Slots::from_text(all).unwrap(),
            allow_fragmentation: false,
        };
        let given = ledger.reserve(KernelId([kernel; 16]), &request).unwrap();
        let ids = given.allocation.ids("cuda", "cuda.device");
        ids.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(reserve(1, "2"), ["GPU-1", "GPU-3"]);
    assert_eq!(reserve(2, "1"), ["GPU-0"]);
    for row in &mut rows {
        row.key.kind = AcceleratorKind::Rocm;
    }
    let amd = AcceleratorPlugin::of_kind("rocm", &of_rows(&rows, &settings), &settings);
    let hardware = amd.hardware().unwrap();
    assert_eq!(hardware.metadata["GPU-3 near"], "GPU-1 XGMI12, GPU-2 PIX");
}

#[test]
fn masks_name_devices_by_id_and_by_number() {
    let settings = settings(&[("device_mask", "0,gpu-2")]);
    let ids: Vec<String> = devices(&settings).into_iter().map(|d| d.id).collect();
    assert_eq!(ids, ["GPU-1", "MIG-0", "MIG-1"]);
    // A mask of a divided device is one of its parts too.
    for mask in ["3", "GPU-3"] {
        let settings = self::settings(&[("device_mask", mask)]);
        let whole = devices(&settings).iter().all(|d| d.profile.is_none());
        assert!(whole, "{mask}");
    }
    let settings = self::settings(&[("device_mask", "mig-1")]);
    let ids: Vec<String> = devices(&settings).into_iter().map(|d| d.id).collect();
    assert_eq!(ids, ["GPU-0", "GPU-1", "GPU-2", "MIG-0"]);
}

#[test]
fn shares_are_limited_by_memory_and_processors() {
    let settings = settings(&[
        ("allocation_mode", "fractional"),
        ("unit_mem", "2g"),
        ("unit_proc", "8"),
        ("quantum_size", "0.1"),
    ]);
    let plugin = plugin(&settings);
    // 80 GiB are 40 units of memory, 132 processors 16.5 of processors; unknown ones do not limit.
    assert_eq!(totals(&plugin)["cuda.shares"], "56.50");
    let held = shares("cuda.shares", &[("GPU-0", "0.50")]);
    let mut limits = ContainerLimits::default();
    plugin.limit(&[], &held, &mut limits);
    let line = |name: &str| {
        let found = limits.resource_lines.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(line("CUDA_GLOBAL_DEVICE_IDS"), Some("0:GPU-0"));
    assert_eq!(line("CUDA_MEMORY_LIMITS"), Some("GPU-0:1073741824"));
    assert_eq!(line("CUDA_PROCESSOR_LIMITS"), Some("GPU-0:4"));
    assert_eq!(line("CUDA_RESOURCE_VIRTUALIZED"), Some("1"));
    let attached = plugin.attached(&[], &held);
    assert_eq!(attached[0].data["mem"], json!(1_u64 << 30));
    assert_eq!(attached[0].data["smp"], json!(4));
    // Memory that is a part of the host's does not limit either.
    let mut of_host = plugin;
    of_host.devices[0].memory = 0;
    assert_eq!(totals(&of_host)["cuda.shares"], "56.50");
    of_host.devices.truncate(1);
    assert_eq!(totals(&of_host)["cuda.shares"], "16.50");
}

#[test]
fn what_is_told_by_number_is_of_the_device_that_a_container_gives_this_number() {
    let settings = settings(&[("allocation_mode", "fractional"), ("unit_mem", "2g")]);
    let plugin = plugin(&settings);
    // In the order of choice, as shares that are split over devices come.
    let held = shares("cuda.shares", &[("GPU-2", "4.0"), ("GPU-0", "1.5")]);
    let mut limits = ContainerLimits::default();
    plugin.limit(&[], &held, &mut limits);
    let line = |name: &str| {
        let found = limits.resource_lines.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    };
    assert_eq!(line("CUDA_GLOBAL_DEVICE_IDS"), Some("0:GPU-0,1:GPU-2"));
    assert_eq!(limits.environment[0].1, "GPU-0,GPU-2");
    // Of these `GPU_CONFIG` and the others are made.
    let attached = plugin.attached(&[], &held).into_iter();
    let attached: Vec<(String, u64)> = attached
        .map(|device| (device.device_id, device.data["mem"].as_u64().unwrap() >> 20))
        .collect();
    assert_eq!(
        attached,
        [("GPU-0".to_owned(), 3072), ("GPU-2".to_owned(), 8192)]
    );
}

#[test]
fn nonsense_of_a_cluster_leaves_the_settings_as_they_are() {
    let usual = settings(&[("allocation_mode", "fractional")]);
    for (key, values) in [
        ("allocation_mode", &["", "Fractional", "half"] as &[&str]),
        (
            "unit_mem",
            &[
                "",
                "0",
                "-2g",
                "1m",
                "2 g b",
                "8e",
                "99999999999999999999e",
                "nan",
                "\u{fffd}",
            ],
        ),
        (
            "unit_proc",
            &["", "-8", "0", "1", "4294967295", "8.5", "8e1", "0x8"],
        ),
        (
            "quantum_size",
            &[
                "",
                "0",
                "-0.1",
                "1.01",
                "0.001",
                "1e-28",
                "nan",
                "inf",
                "79228162514264337593543950335",
            ],
        ),
    ] {
        for value in values {
            let settings = settings(&[("allocation_mode", "fractional"), (key, value)]);
            if key == "allocation_mode" {
                assert_eq!(settings.shares, None, "{value:?}");
            } else {
                assert_eq!(settings, usual, "{key} {value:?}");
            }
        }
    }
    // Blanks around a number are no nonsense.
    let settings = settings(&[("unit_mem", " 4g\n"), ("quantum_size", " 0.250 ")]);
    assert_eq!(settings.units.memory, 4 << 30);
    assert_eq!(settings.units.quantum.to_string(), "0.250");
}

#[test]
fn containers_see_their_devices_and_no_others() {
    let plugin = plugin(&settings(&[]));
    let mut limits = ContainerLimits::default();
    plugin.limit(&[], &[], &mut limits);
    assert_eq!(
        limits.environment,
        [("NVIDIA_VISIBLE_DEVICES".to_owned(), "void".to_owned())]
    );
    assert!(limits.arguments.is_empty() && limits.defaults.is_empty());
    let held = shares("cuda.device", &[("GPU-2", "1"), ("GPU-0", "1")]);
    let mut limits = ContainerLimits::default();
    plugin.limit(&[], &held, &mut limits);
    assert_eq!(limits.environment[0].1, "GPU-0,GPU-2");
    assert_eq!(
        limits.defaults[0],
        ("CUDA_VISIBLE_DEVICES".to_owned(), "0,1".to_owned())
    );
    let request = &limits.arguments[0]["HostConfig"]["DeviceRequests"][0];
    assert_eq!(request["DeviceIDs"], json!(["GPU-0", "GPU-2"]));
    assert_eq!(request["Driver"], "nvidia");
    let part = shares("cuda.device:1g.10gb-mig", &[("MIG-1", "1")]);
    let mut limits = ContainerLimits::default();
    let by_nodes = AcceleratorPlugin {
        injection: Injection::Cuda {
            how: CudaInjection::DeviceNodes,
            engine: EngineFacts::default(),
            root: "/nowhere".into(),
        },
        ..plugin
    };
    by_nodes.limit(&[], &part, &mut limits);
    let why = std::mem::take(&mut limits).refused;
    assert!(why.is_some_and(|why| why.contains("cuda-injection")));
    assert!(limits.arguments.is_empty());
    let cdi = AcceleratorPlugin {
        injection: Injection::Cuda {
            how: CudaInjection::Cdi,
            engine: EngineFacts::default(),
            root: "/".into(),
        },
        ..by_nodes
    };
    cdi.limit(&[], &part, &mut limits);
    assert_eq!(limits.defaults[0].1, "MIG-1");
    assert_eq!(
        limits.arguments[0],
        json!({"HostConfig": {"DeviceRequests": [
            {"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=MIG-1"]}
        ]}})
    );
}

#[test]
fn made_up_devices_are_read_from_the_originals_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("mock.toml");
    let write = |text: &str| std::fs::write(&file, text).unwrap();
    let read = |settings: &Settings| mock::read(Path::new(&file), settings);
    write(
        r#"
slot_name = "cuda"
device_plugin_name = "CUDADevice"
devices = [
  { mother_uuid = "a", model_name = "CUDA GPU", numa_node = 0, subproc_count = 108, memory_size = "40G", is_mig_device = false },
  { mother_uuid = "b", model_name = "MIG-10g", numa_node = 1, subproc_count = 28, memory_size = "10G", is_mig_device = true },
  { mother_uuid = "b", model_name = "MIG-10g", numa_node = 1, subproc_count = 28, memory_size = "10G", is_mig_device = true },
]
[attributes]
nvidia_driver = "450.0.0"
cuda_runtime = "11.0"
[formats.devices]
display_unit = "GPU"
display_icon = "gpu1"
human_readable_name = "GPU of the house"
description = "CUDA-capable GPU"
number_format = { binary = false, round_length = 0 }
"#,
    );
    let plugin = read(&settings(&[])).unwrap();
    let ids: Vec<&str> = plugin.devices.iter().map(|d| d.id.as_str()).collect();
    assert_eq!(ids, ["a", "MIG-b/1/0", "MIG-b/2/0"]);
    assert_eq!(totals(&plugin)["cuda.device:10g-mig"], "2");
    assert_eq!(plugin.metadata()[0].human_readable_name, "GPU of the house");
    let facts: Vec<String> = (plugin.facts.texts.iter())
        .map(|(name, text)| format!("{name} {text}"))
        .collect();
    assert_eq!(
        facts,
        [
            "cuda_version 11.0",
            "cuda_runtime 11.0",
            "nvidia_version 450.0.0",
            "nvidia_driver 450.0.0",
        ]
    );
    assert_eq!(plugin.facts.flags, [("cuda_support".into(), true)]);
    let mut limits = ContainerLimits::default();
    plugin.limit(&[], &shares("cuda.device", &[("a", "1")]), &mut limits);
    assert!(limits.arguments.is_empty(), "no real device is asked for");
    let mut shared = settings(&[("allocation_mode", "fractional")]);
    assert!(
        shared.mock_shares.is_none(),
        "CUDA's mode is not that of other kinds"
    );
    shared.mock_shares = shared.shares;
    let fractional = read(&shared).unwrap();
    assert_eq!(totals(&fractional)["cuda.shares"], "13.50");
    // What a cluster says of made-up devices is of these, and nothing else of it.
    let mut config = Config::clone(&defaults());
    config.node.accelerators.mock = Some(file.clone());
    let options = [
        ("allocation_mode", "fractional"),
        ("unit_mem", "4g"),
        ("quantum_size", "0.5"),
        ("reserved_memory", "134217728"),
        ("device_mask", "1"),
        ("unit_proc", "many"),
    ];
    let options = options.map(|(key, text)| (key.to_owned(), text.to_owned()));
    let options = Options::from([("mock".to_owned(), BTreeMap::from(options))]);
    for (allowed, blocked) in [(Some("cuda_open"), None), (None, Some("mock"))] {
        let names = |name: &str| [format!("ai.backend.accelerator.{name}")].into();
        config.agent.allow_compute_plugins = allowed.map(names);
        config.agent.block_compute_plugins = blocked.map(names);
        let off = Settings::of(&config, &options, EngineFacts::default());
        assert_eq!((off.mock, off.mock_key), (None, None));
    }
    config.agent.allow_compute_plugins = None;
    config.agent.block_compute_plugins = None;
    let settings_of_mock = Settings::of(&config, &options, EngineFacts::default());
    assert_eq!(settings_of_mock.shares, None);
    let mock = read(&settings_of_mock).unwrap();
    let expected = BTreeMap::from([
        ("cuda.device:10g-mig".to_owned(), "1".to_owned()),
        ("cuda.shares".to_owned(), "10.00".to_owned()),
    ]);
    assert_eq!(totals(&mock), expected);
    assert_eq!(mock.shares.unwrap().quantum.to_string(), "0.5");
    let mut limits = ContainerLimits::default();
    mock.limit(&[], &shares("cuda.shares", &[("a", "1")]), &mut limits);
    let line = |name: &str| limits.resource_lines.iter().find(|(key, _)| key == name);
    assert_eq!(line("CUDA_RESERVED_MEMORY").unwrap().1, "134217728");
    // Another kind has no parts, and its own name in what it supports.
    let many: Vec<String> = (0..11)
        .map(|place| format!("{{ mother_uuid = 'g{place}', model_name = 'MIG-x', subproc_count = 1, memory_size = 1073741824, is_mig_device = true }}"))
        .collect();
    let many = many.join(", ");
    write(&format!(
        "slot_name = 'gaudi'\ndevices = [{many}]\n[attributes]\nlinks = 24\n"
    ));
    let other = read(&settings(&[])).unwrap();
    assert_eq!(totals(&other)["gaudi.device"], "11");
    assert_eq!(
        (other.devices[0].memory, other.devices[10].pci.as_str()),
        (1 << 30, "0000:99:10.0")
    );
    assert_eq!(other.facts.flags, [("gaudi_support".into(), true)]);
    assert_eq!(other.facts.texts, [("links".into(), "24".to_owned())]);
    for (wrong, why) in [
        ("devices = 3", "docs/gpu.md"),
        ("slot_name = 'mem'\ndevices = []", "no name of a device"),
        (
            "devices = [{mother_uuid='a,b', model_name='x', memory_size='1G'}]",
            "id of a device",
        ),
        (
            "devices = [{mother_uuid='a', model_name='x', memory_size='lots'}]",
            "no size",
        ),
    ] {
        write(wrong);
        let err = read(&settings(&[])).unwrap_err();
        assert!(err.to_string().contains(why), "{err}");
    }
}

#[test]
fn the_ledger_takes_what_changes_and_keeps_what_is_held() {
    let settings = settings(&[]);
    let config = defaults();
    let ledger = crate::resource::Ledger::discover(&config, Vec::new()).unwrap();
    let install = |devices: &[AcceleratorDevice]| {
        let plugin = AcceleratorPlugin::of_kind("cuda", devices, &settings);
        ledger.install(std::sync::Arc::new(plugin)).unwrap();
    };
    let announced = || {
        let all = ledger.available().into_iter();
        let found = all
            .filter(|slot| slot.name == "cuda.device")
            .map(|slot| slot.amount);
        found.sum::<Amount>()
    };
    let mut devices = devices(&settings);
    install(&devices);
    assert_eq!(announced(), 2.into());
    let ask = |kernel: u8| {
        let slots = Slots::from_text([("cpu", "1"), ("mem", "64m"), ("cuda.device", "1")]).unwrap();
        let request = crate::resource::SlotRequest {
            slots,
            allow_fragmentation: true,
        };
        ledger.reserve(shared::ids::KernelId([kernel; 16]), &request)
    };
    let first = ask(1).unwrap().allocation.ids("cuda", "cuda.device")[0].to_owned();
    // The held device fails: it is announced for its kernel only, and the other one is given out.
    let place = devices.iter().position(|d| d.id == first).unwrap();
    devices[place].healthy = false;
    install(&devices);
    assert_eq!(announced(), 2.into());
    let second = ask(2).unwrap().allocation.ids("cuda", "cuda.device")[0].to_owned();
    assert_ne!(first, second);
    assert!(ask(3).is_err());
    // It is nobody's then, and taken back if it works.
    let held = ledger.release(KernelId([1; 16])).unwrap();
    assert_eq!(announced(), 1.into());
    ledger.restore(KernelId([1; 16]), &held, true).unwrap();
    // It works again: it is still held, and free when its kernel ends.
    devices[place].healthy = true;
    install(&devices);
    assert!(ask(3).is_err());
    assert_eq!(ledger.accelerators_held()[&first], 1.into());
    ledger.release(shared::ids::KernelId([1; 16]));
    assert_eq!(
        ask(3).unwrap().allocation.ids("cuda", "cuda.device"),
        [first.as_str()]
    );
}

/// What a kernel holds whose agent had other settings, or was the Python agent, which numbers devices.
#[test]
fn devices_held_by_number_or_as_another_slot_are_given_to_nobody_else() {
    let whole = settings(&[]);
    let in_shares = settings(&[("allocation_mode", "fractional")]);
    for (settings, slot, free) in [
        (whole, "cuda.device", ["GPU-2"]),
        (in_shares, "cuda.shares", ["GPU-2"]),
    ] {
        let plugin = plugin(&settings);
        let ledger = Ledger::discover(&defaults(), vec![Box::new(plugin.clone())]).unwrap();
        let holder = KernelId([1; 16]);
        let held = serde_json::from_value(json!({"cuda": {"cuda.device": {"0": "1"}}})).unwrap();
        let restored = ledger.restore(holder, &held, true).unwrap();
        assert_eq!(restored.missing, []);
        // A driver that answers later changes nothing about that.
        ledger.install(std::sync::Arc::new(plugin.clone())).unwrap();
        assert_eq!(ledger.free_devices(slot), free);
        let all = [("cpu", "1"), ("mem", "64m"), (slot, "1")];
        let request = SlotRequest {
            slots: Slots::from_text(all).unwrap(),
            allow_fragmentation: false,
        };
        let given = ledger.reserve(KernelId([2; 16]), &request).unwrap();
        assert_eq!(given.allocation.ids("cuda", slot), free);
        // A restart asks for the device by the name that it has here.
        let by_number = shares("cuda.device", &[("0", "1")]);
        let mut limits = ContainerLimits::default();
        plugin.limit(&[], &by_number, &mut limits);
        assert_eq!(limits.environment[0].1, "GPU-0");
        assert_eq!(plugin.attached(&[], &by_number)[0].model_name, "A card");
        ledger.release(holder);
        assert_eq!(ledger.free_devices(slot), ["GPU-0"]);
    }
}

#[test]
fn partitions_of_an_amd_device_have_a_render_node_each() {
    let root = tempfile::tempdir().unwrap();
    let write = |path: &str, text: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let nodes = "sys/class/kfd/kfd/topology/nodes";
    let place = 0x90 << 8;
    write(&format!("{nodes}/0/properties"), "simd_count 0\n");
    for (node, minor) in [(9, 128), (10, 129)] {
        write(
            &format!("{nodes}/{node}/properties"),
            &format!("simd_count 304\nlocation_id {place}\ndrm_render_minor {minor}\ndomain 0\n"),
        );
    }
    let pci = "sys/bus/pci/devices/0000:90:00.0";
    write(&format!("{pci}/drm/renderD128/dev"), "226:128\n");
    let mut settings = settings(&[]);
    settings.root = root.path().to_owned();
    let device = |index: u32, pci: &str| {
        let mut row = card(index, AcceleratorCounters::default());
        row.key.kind = AcceleratorKind::Rocm;
        row.pci = pci.to_owned();
        of_rows(&[row], &settings).remove(0).nodes
    };
    assert_eq!(device(0, "0000:90:00.0"), ["/dev/dri/renderD128"]);
    assert_eq!(device(1, "0000:90:00.0"), ["/dev/dri/renderD129"]);
    // What the topology says of another device counts for nothing, and the device's own files do.
    assert_eq!(device(0, "0000:91:00.0"), [""; 0]);
    assert_eq!(device(2, "0000:90:00.0"), ["/dev/dri/renderD128"]);
    write(&format!("{nodes}/9/properties"), "simd_count 304\n");
    assert_eq!(device(0, "0000:90:00.0"), ["/dev/dri/renderD128"]);
}

/// A tree with the nodes of two AMD devices, or of TPU chips: by the class of accelerators, and by VFIO.
#[test]
fn containers_with_amd_devices_or_tpu_chips_get_the_nodes_of_these() {
    let root = tempfile::tempdir().unwrap();
    let at = |path: &str| {
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    };
    for (pci, render) in [("0000:03:00.0", 128), ("0000:04:00.0", 129)] {
        let drm = format!("sys/bus/pci/devices/{pci}/drm/renderD{render}/dev");
        std::fs::write(at(&drm), "").unwrap();
    }
    std::fs::write(at("sys/bus/pci/devices/0000:05:00.0/accel/accel3/dev"), "").unwrap();
    let group = at("sys/bus/pci/devices/0000:06:00.0/iommu_group");
    std::os::unix::fs::symlink("../../../kernel/iommu_groups/17", group).unwrap();
    // Only root may give a file to another group.
    let groups = [("dev/kfd", 105), ("dev/dri/renderD129", 44)].map(|(node, wanted)| {
        let node = at(node);
        std::fs::write(&node, "").unwrap();
        let given = std::os::unix::fs::chown(&node, None, Some(wanted));
        match given {
            Ok(()) => wanted,
            Err(_) => std::fs::metadata(&node).unwrap().gid(),
        }
    });
    let mut settings = settings(&[]);
    settings.root = root.path().to_owned();
    let plugin = |kind: AcceleratorKind, places: &[&str]| {
        let places = places.iter().zip(0..);
        let rows: Vec<_> = places
            .map(|(pci, index)| {
                let mut row = card(index, AcceleratorCounters::default());
                row.key.kind = kind;
                row.pci = (*pci).to_owned();
                row
            })
            .collect();
        AcceleratorPlugin::of_kind(&kind.to_string(), &of_rows(&rows, &settings), &settings)
    };
    let given = |plugin: &AcceleratorPlugin, held: &[(&str, &str)]| {
        let mut limits = ContainerLimits::default();
        plugin.limit(&[], &shares("x.device", held), &mut limits);
        limits
    };
    let nodes = |limits: &ContainerLimits| -> Vec<String> {
        let all = limits.arguments[0]["HostConfig"]["Devices"].as_array();
        let all = all.unwrap().iter().map(|node| {
            assert_eq!(node["PathOnHost"], node["PathInContainer"]);
            assert_eq!(node["CgroupPermissions"], "mrw");
            node["PathOnHost"].as_str().unwrap().to_owned()
        });
        all.collect()
    };
    let amd = plugin(AcceleratorKind::Rocm, &["0000:03:00.0", "0000:04:00.0"]);
    let limits = given(&amd, &[("GPU-1", "1")]);
    assert_eq!(nodes(&limits), ["/dev/kfd", "/dev/dri/renderD129"]);
    let mut expected: Vec<u32> = groups.into_iter().filter(|gid| *gid != 0).collect();
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(limits.gids, expected);
    assert!(limits.syscalls.contains(&"mbind".to_owned()));
    let visible = |value: &str| {
        ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"]
            .map(|name| (name.to_owned(), value.to_owned()))
    };
    // The container sees one device, which is its first.
    assert_eq!(limits.defaults, visible("0"));
    assert!(limits.environment.is_empty());
    let both = given(&amd, &[("GPU-1", "1"), ("GPU-0", "1")]);
    let all = ["/dev/kfd", "/dev/dri/renderD128", "/dev/dri/renderD129"];
    assert_eq!(nodes(&both), all);
    assert_eq!(both.defaults, visible("0,1"));
    let line = (
        "ROCM_GLOBAL_DEVICE_IDS".to_owned(),
        "0:GPU-0,1:GPU-1".to_owned(),
    );
    assert_eq!(both.resource_lines, [line]);

    let tpu = plugin(AcceleratorKind::Tpu, &["0000:05:00.0", "0000:06:00.0"]);
    let nodes_of = |id: &str| nodes(&given(&tpu, &[(id, "1")]));
    assert_eq!(nodes_of("GPU-0"), ["/dev/accel3"]);
    assert_eq!(nodes_of("GPU-1"), ["/dev/vfio/vfio", "/dev/vfio/17"]);
    for plugin in [&amd, &tpu] {
        assert_eq!(given(plugin, &[]), ContainerLimits::default());
    }
}

#[test]
fn a_container_with_a_few_chips_of_a_tpu_machine_is_told_how_they_lie() {
    let settings = settings(&[]);
    let rows: Vec<_> = (0..4)
        .map(|index| {
            let mut row = card(index, AcceleratorCounters::default());
            row.key.kind = AcceleratorKind::Tpu;
            row
        })
        .collect();
    let tpu = AcceleratorPlugin::of_kind("tpu", &of_rows(&rows, &settings), &settings);
    let given = |count: usize| {
        let ids = ["GPU-0", "GPU-1", "GPU-2", "GPU-3"];
        let held: Vec<(&str, &str)> = ids[..count].iter().map(|id| (*id, "1")).collect();
        let mut limits = ContainerLimits::default();
        tpu.limit(&[], &shares("tpu.device", &held), &mut limits);
        let all: BTreeMap<String, String> = limits.defaults.into_iter().collect();
        let get = |name: &str| all.get(name).cloned();
        [
            get("TPU_VISIBLE_CHIPS"),
            get("TPU_CHIPS_PER_PROCESS_BOUNDS"),
            get("TPU_PROCESS_BOUNDS"),
        ]
    };
    let words = |all: [&str; 3]| all.map(|word| Some(word.to_owned()));
    assert_eq!(given(0), [None, None, None]);
    assert_eq!(given(1), words(["0", "1,1,1", "1,1,1"]));
    assert_eq!(given(2), words(["0,1", "1,2,1", "1,1,1"]));
    assert_eq!(given(4), [Some("0,1,2,3".to_owned()), None, None]);
}
