//! On a node with NVIDIA's driver: what the dataplane tells is what `nvidia-smi` tells. Elsewhere the
//! suite says why it is skipped.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Options, Place, until};

/// `nvidia-smi` lists what is asked for per device; `None`, and why, where there is no driver.
fn smi(query: &str) -> Result<Option<Vec<Vec<String>>>> {
    let output = Command::new("nvidia-smi")
        .args([
            &format!("--query-gpu={query}"),
            "--format=csv,noheader,nounits",
        ])
        .output();
    let Ok(output) = output else {
        println!("SKIP: there is no nvidia-smi, so no NVIDIA device to compare with");
        return Ok(None);
    };
    if !output.status.success() {
        println!(
            "SKIP: nvidia-smi finds no device: {}",
            String::from_utf8_lossy(&output.stdout).trim()
        );
        return Ok(None);
    }
    let text = String::from_utf8(output.stdout)?;
    let rows = text.lines().map(|line| {
        let fields = line.split(',');
        fields.map(|field| field.trim().to_owned()).collect()
    });
    Ok(Some(rows.collect()))
}

#[test]
fn inventory_is_that_of_nvidia_smi() -> Result<()> {
    let Some(told) = smi("uuid,name,pci.bus_id,memory.total,power.limit")? else {
        return Ok(());
    };
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.5".to_owned(),
        ..Options::default()
    })?;
    let mut control = place.control()?;
    let _process = place.start()?;
    let rows = until("the devices", || {
        let snapshot = control.observed.snapshot().ok()?;
        (!snapshot.accelerators.is_empty()).then(|| snapshot.accelerators.clone())
    })?;
    let whole: BTreeMap<&str, _> = (rows.iter())
        .filter(|row| row.part_of.is_none())
        .map(|row| (row.id.as_str(), row))
        .collect();
    ensure!(whole.len() == told.len(), "{whole:?} and {told:?}");
    for fields in &told {
        let row = whole.get(fields[0].as_str()).context("a UUID")?;
        println!(
            "seen: {fields:?}; {} of {:?}",
            row.model, row.counters.memory_total_bytes
        );
        ensure!(row.model == fields[1], "{row:?}");
        let pci = fields[2].to_lowercase();
        ensure!(pci.ends_with(&row.pci[4..]), "{pci} {}", row.pci);
        let mib: u64 = fields[3].parse()?;
        let total = row.counters.memory_total_bytes.context("memory")?;
        ensure!((total >> 20).abs_diff(mib) <= 1, "{total} bytes, {mib} MiB");
        if let (Ok(watts), Some(limit)) = (fields[4].parse::<f64>(), row.counters.power_limit_mw) {
            let limit = f64::from(u32::try_from(limit)?) / 1000.0;
            ensure!((limit - watts).abs() < 1.0, "{limit} W, {watts} W");
        }
    }
    Ok(())
}

/// A load in a cgroup named like a container: PyTorch where the machine has it.
#[test]
fn a_load_is_attributed_to_its_container() -> Result<()> {
    const LOAD: &str = "import torch, time\n\
        a = torch.zeros(1 << 28, dtype=torch.uint8, device='cuda')\n\
        m = torch.randn(4096, 4096, device='cuda')\n\
        while True: m = (m @ m).clamp(-1, 1)\n";
    if smi("uuid")?.is_none() {
        return Ok(());
    }
    let torch = Command::new("python3")
        .args(["-c", "import torch; torch.zeros(1, device='cuda')"])
        .output();
    if !torch.is_ok_and(|output| output.status.success()) {
        println!("SKIP: python3 has no PyTorch with CUDA to make a load");
        return Ok(());
    }
    let id = "d".repeat(64);
    let Some(mut group) = TestCgroup::new(&id)? else {
        return Ok(());
    };
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), LOAD)?;
    group.run(&format!("exec python3 {}", file.path().display()))?;
    let place = Place::new(Options {
        dataplane: "stats-interval = 0.5".to_owned(),
        ..Options::default()
    })?;
    let mut control = place.control()?;
    let _process = place.start()?;
    let container: shared::ids::ContainerId = id.parse()?;
    let (row, used) = until("the load's memory on a device", || {
        let snapshot = control.observed.snapshot().ok()?;
        snapshot.accelerators.iter().find_map(|row| {
            let user = row
                .users
                .iter()
                .find(|user| user.container_id == container)?;
            let busy = row.counters.utilisation_permille? > 0;
            (user.memory_bytes? >= 1 << 28 && busy).then(|| (row.clone(), *user))
        })
    })?;
    println!(
        "seen: {used:?} on {} of {:?}",
        row.model, row.counters.memory_used_bytes
    );
    ensure!(
        used.memory_bytes <= row.counters.memory_used_bytes,
        "{used:?} {row:?}"
    );
    Ok(())
}
