//! The suite for real devices (`gpu`), run where there are none: the driver's libraries and
//! `nvidia-smi` are stand-ins that share the state of made-up devices. It shows that the suite's own
//! code works and finds what is wrong. It says nothing about a real device.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::nvml::StandIn;
use harness::smi_comparison::Machine;

/// Devices of one model, the last ones cut into two instances each.
fn devices(count: u64, divided: u64, more: &str) -> String {
    let mut text = String::new();
    for index in 0..count {
        let mig = u8::from(index >= count - divided);
        text += &format!(
            "device {index} uuid=GPU-{index} name=Stand-in mem=85899345920 used={} reserved=4194304 power={} temp={} pci=00000000:{:02X}:00.0 mig={mig}{more}\n",
            index << 30,
            100_000 + index,
            40 + index,
            16 + index,
        );
        for part in (0..2).filter(|_| mig == 1) {
            text += &format!(
                "part {index} {part} uuid=MIG-{index}-{part} mem=10200547328 gi={part} ci=0\n"
            );
        }
    }
    text
}

/// What fails within a moment, with its causes.
fn failure(mut machine: Machine) -> Result<String> {
    machine.patience = Duration::from_secs(6);
    let failed = machine.check().err();
    Ok(format!("{:#}", failed.context("nothing was found wrong")?))
}

#[test]
fn loads_on_two_devices_are_told_alike_and_recorded() -> Result<()> {
    let driver = StandIn::new(&devices(8, 2, " enc=3"))?;
    let machine = driver.machine()?;
    ensure!(machine.without_nvml()?.is_none());
    let seen = machine.check()?;
    println!("{}", seen.text());
    let line = |what: &str| seen.lines.iter().find(|line| line[0] == what);
    // The first device has the busy load of 512 MiB and an idle one in no container; the last one that
    // is not divided has a busy one and an idle one in one container.
    for (what, agent) in [
        ("container 1 of 1 processes on GPU-0, memory", "512"),
        ("container 2 of 2 processes on GPU-5, memory", "384"),
        ("GPU-0 memory.free", "81212"),
        ("GPU-5 memory.free", "76412"),
        ("GPU-0 utilization.encoder", "3"),
        ("GPU-0 utilization.decoder", "not told"),
        ("GPU-7 utilization.gpu", "not told"),
        ("idle process of 128 MiB on GPU-5, share", "0"),
        ("GPU-0, these loads after their end", "0"),
    ] {
        let line = line(what).with_context(|| format!("{what}: {:?}", seen.lines))?;
        ensure!(line[1] == agent && line[2] == agent, "{line:?}");
    }
    // It takes the place that the document has for it, again and again.
    let place = tempfile::tempdir()?;
    let document = place.path().join("gpu.md");
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/gpu.md");
    std::fs::copy(&docs, &document)?;
    seen.record(&document)?;
    let once = std::fs::read_to_string(&document)?;
    seen.record(&document)?;
    ensure!(once == std::fs::read_to_string(&document)?);
    ensure!(once.contains("8 x Stand-in, 4 MIG instances, driver 550.54.15; "));
    ensure!(once.contains("| container 1 of 1 processes on GPU-0, memory | 512 | 512 |"));
    Ok(())
}

#[test]
fn a_single_device_is_shared_by_all_loads() -> Result<()> {
    let driver = StandIn::new(&devices(1, 0, ""))?;
    let seen = driver.machine()?.check()?;
    let line = |what: &str| seen.lines.iter().any(|line| line[0] == what);
    ensure!(line("container 1 of 1 processes on GPU-0, memory"));
    ensure!(line("container 2 of 2 processes on GPU-0, memory"));
    Ok(())
}

#[test]
fn where_all_devices_are_divided_instances_compute() -> Result<()> {
    let driver = StandIn::new(&devices(1, 1, ""))?;
    let seen = driver.machine()?.check()?;
    let share = "container 2 of 2 processes on MIG-0-1, share";
    let line = seen.lines.iter().find(|line| line[0] == share);
    let line = line.with_context(|| format!("{:?}", seen.lines))?;
    ensure!(line[1] == "not told" && line[2] == "not told", "{line:?}");
    Ok(())
}

#[test]
fn a_driver_that_samples_no_processes_leaves_their_share_unknown() -> Result<()> {
    let driver = StandIn::new(&devices(1, 0, " noutil=1"))?;
    let seen = driver.machine()?.check()?;
    let share = "container 1 of 1 processes on GPU-0, share";
    let line = seen.lines.iter().find(|line| line[0] == share);
    let line = line.with_context(|| format!("{:?}", seen.lines))?;
    ensure!(line[1] == "not told" && line[2] == "not told", "{line:?}");
    Ok(())
}

#[test]
fn what_differs_is_found() -> Result<()> {
    // nvidia-smi tells of other devices than NVML: of more memory in use, and of another load.
    let driver = StandIn::new(&devices(2, 0, ""))?;
    let mut machine = driver.machine()?;
    let state = tempfile::NamedTempFile::new()?;
    let lie = |text: &str| std::fs::write(state.path(), text);
    let script = driver.directory().join("lie");
    std::fs::create_dir(&script)?;
    std::fs::write(
        script.join("nvidia-smi"),
        format!(
            "#!/bin/sh\nln -sfn \"$NVML_STANDIN.d\" '{0}.d'\nNVML_STANDIN='{0}' exec '{1}' \"$@\"\n",
            state.path().display(),
            driver.directory().join("nvidia-smi").display()
        ),
    )?;
    let executable = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(script.join("nvidia-smi"), executable)?;
    for (name, value) in &mut machine.environment {
        if name == "PATH" {
            *value = format!("{}:{value}", script.display());
        }
    }
    let environment = machine.environment.clone();
    let again = || Machine {
        environment: environment.clone(),
        patience: Duration::ZERO,
    };
    let told = devices(2, 0, "");
    for (lies, found) in [
        (
            told.replace("used=0 ", "used=104857600 "),
            "GPU-0 memory.free",
        ),
        (told.replace("temp=40", "temp=60"), "GPU-0 temperature.gpu"),
        (
            told.replace("uuid=GPU-1", "uuid=GPU-1 noutil=1"),
            "container 2 of 2 processes on GPU-1, share",
        ),
        (told.replace("uuid=GPU-1", "uuid=GPU-2"), "nvidia-smi lists"),
        (told.replace(":11:", ":12:"), "00000000:12:00.0"),
    ] {
        lie(&lies)?;
        let failed = failure(again())?;
        ensure!(failed.contains(found), "{found} is not in: {failed}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_checked_is_a_failure_and_no_driver_is_a_skip() -> Result<()> {
    let driver = StandIn::new(&devices(1, 0, ""))?;
    // No programs of the driver.
    let without = |file: &str| -> Result<String> {
        let machine = driver.machine()?;
        std::fs::remove_file(driver.directory().join(file))?;
        ensure!(machine.without_nvml()?.is_none());
        failure(machine)
    };
    let failed = without("nvidia-smi")?;
    ensure!(failed.contains("nvidia-smi can't be started"), "{failed}");
    let failed = without("libcuda.so.1")?;
    ensure!(failed.contains("no CUDA driver library"), "{failed}");
    // A device that is too small for the loads.
    let machine = driver.machine()?;
    driver.describe("device 0 uuid=GPU-0 mem=268435456 pci=00000000:10:00.0\n")?;
    let failed = failure(machine)?;
    ensure!(failed.contains("CUDA_ERROR_OUT_OF_MEMORY"), "{failed}");
    // A library of the driver, and no driver.
    driver.describe("init 9\n")?;
    let failed = failure(driver.machine()?)?;
    ensure!(failed.contains("couldn't communicate"), "{failed}");
    // No library.
    let machine = driver.machine()?;
    std::fs::remove_file(driver.directory().join("libnvidia-ml.so.1"))?;
    let reason = machine.without_nvml()?.context("a reason to skip")?;
    ensure!(reason.contains("libnvidia-ml.so.1"), "{reason}");
    Ok(())
}
