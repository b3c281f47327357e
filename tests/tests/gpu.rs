//! On a node with NVIDIA's driver: what the dataplane tells of its devices, idle and under a real
//! load, is what `nvidia-smi` tells. Elsewhere the suite says why it is skipped.
//! `accelerator_gpu_suite` runs the same with stand-ins for the driver.

use std::path::Path;

use anyhow::Result;
use harness::smi_comparison::Machine;

#[test]
fn what_is_told_is_what_nvidia_smi_tells() -> Result<()> {
    let machine = Machine::here();
    if let Some(reason) = machine.without_nvml()? {
        let driver = Path::new("/proc/driver/nvidia").exists();
        harness::skip::here(format!("gpu: {reason}"), driver);
        return Ok(());
    }
    let seen = machine.check()?;
    println!("{}", seen.text());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let document = harness::smi_comparison::here().join("../docs/gpu.md");
        seen.record(&document)?;
    }
    Ok(())
}
