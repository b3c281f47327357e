//! Trees of `sys` and `proc` as machines with accelerators have them, for a machine without.
//!
//! The files, their texts and their places are those of the kernel's documentation of amdgpu, KFD and
//! the PCI bus.

use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

/// A root directory in place of `/`.
#[derive(Debug)]
pub struct DeviceTree {
    directory: TempDir,
}

impl DeviceTree {
    /// A host without accelerators.
    pub fn new() -> Result<Self> {
        Ok(Self {
            directory: tempfile::tempdir()?,
        })
    }

    /// Lines of `[node]` that make the dataplane look here.
    pub fn settings(&self) -> String {
        let root = self.root().display();
        format!("[node.accelerators]\ndevice-root = \"{root}\"\n")
    }

    /// In place of `/`.
    pub fn root(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a file and the directories above it.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.root().join(path);
        if let Some(above) = path.parent() {
            std::fs::create_dir_all(above)?;
        }
        Ok(std::fs::write(path, text)?)
    }

    /// Takes a directory away, as when a device falls off the bus.
    pub fn remove(&self, path: &str) -> Result<()> {
        Ok(std::fs::remove_dir_all(self.root().join(path))?)
    }

    /// Two AMD devices on two NUMA nodes, and the processor's node that KFD lists first.
    pub fn amd(&self) -> Result<()> {
        const NODES: &str = "sys/class/kfd/kfd/topology/nodes";
        self.write(&format!("{NODES}/0/gpu_id"), "0\n")?;
        self.write(
            &format!("{NODES}/0/properties"),
            "cpu_cores_count 64\nsimd_count 0\nlocation_id 0\n",
        )?;
        for index in 0..2_u64 {
            let (node, bus) = (index + 1, 0x10 + 0x20 * index);
            let gpu = 5000 + index;
            self.write(&format!("{NODES}/{node}/gpu_id"), &format!("{gpu}\n"))?;
            self.write(
                &format!("{NODES}/{node}/properties"),
                &format!(
                    "cpu_cores_count 0\nsimd_count 1216\nsimd_per_cu 4\nlocation_id {}\ndomain 0\n\
                     drm_render_minor {}\ngfx_target_version 90402\nvendor_id 4098\nunique_id {}\n",
                    bus << 8,
                    128 + index,
                    0xabc0_u64 + index,
                ),
            )?;
            let pci = self.amd_pci(index);
            for (file, text) in [
                ("vendor", "0x1002\n".to_owned()),
                ("numa_node", format!("{index}\n")),
                ("mem_info_vram_total", "206141652992\n".to_owned()),
                ("mem_info_vram_used", format!("{}\n", (index + 1) << 30)),
                ("gpu_busy_percent", format!("{}\n", 30 + index)),
                ("mem_busy_percent", "7\n".to_owned()),
                ("hwmon/hwmon4/power1_average", "250000000\n".to_owned()),
                ("hwmon/hwmon4/power1_cap", "750000000\n".to_owned()),
                ("hwmon/hwmon4/temp1_input", "51000\n".to_owned()),
                ("hwmon/hwmon4/freq1_input", "2100000000\n".to_owned()),
                ("hwmon/hwmon4/freq2_input", "1300000000\n".to_owned()),
                ("ras/umc_err_count", "ue: 0\nce: 3\n".to_owned()),
                (
                    &format!("drm/renderD{}/dev", 128 + index),
                    "226:128\n".to_owned(),
                ),
                ("drm/card1/dev", "226:1\n".to_owned()),
            ] {
                self.write(&format!("{pci}/{file}"), &text)?;
            }
        }
        Ok(())
    }

    /// A device in four partitions (QPX), on another bus than the others: four nodes of KFD with one PCI
    /// address and a render node each, of which the first alone is below the device.
    pub fn amd_partitions(&self) -> Result<()> {
        const NODES: &str = "sys/class/kfd/kfd/topology/nodes";
        let pci = "sys/bus/pci/devices/0000:90:00.0";
        for part in 0..4_u64 {
            let node = format!("{NODES}/{}", 3 + part);
            self.write(&format!("{node}/gpu_id"), &format!("{}\n", 6000 + part))?;
            self.write(
                &format!("{node}/properties"),
                &format!(
                    "cpu_cores_count 0\nsimd_count 304\nsimd_per_cu 4\nlocation_id {}\ndomain 0\n\
                     drm_render_minor {}\ngfx_target_version 90402\nvendor_id 4098\nunique_id 43981\n",
                    0x90_u64 << 8,
                    130 + part,
                ),
            )?;
            for (bank, heap, bytes) in [(0, 1, 48_u64 << 30), (1, 0, 1 << 40)] {
                self.write(
                    &format!("{node}/mem_banks/{bank}/properties"),
                    &format!("heap_type {heap}\nsize_in_bytes {bytes}\nflags 0\n"),
                )?;
            }
        }
        for (file, text) in [
            ("vendor", "0x1002\n"),
            ("numa_node", "1\n"),
            ("mem_info_vram_total", "206141652992\n"),
            ("mem_info_vram_used", "77\n"),
            ("gpu_busy_percent", "88\n"),
            ("hwmon/hwmon7/power1_average", "250000000\n"),
            ("drm/renderD130/dev", "226:130\n"),
        ] {
            self.write(&format!("{pci}/{file}"), text)?;
        }
        Ok(())
    }

    /// A link by xGMI (or of another type) from one AMD device to a node of KFD, which lists the
    /// processor before the devices.
    pub fn amd_link(&self, from: u64, number: u64, lines: &str) -> Result<()> {
        let node = from + 1;
        let links = format!("sys/class/kfd/kfd/topology/nodes/{node}/io_links/{number}/properties");
        self.write(
            &links,
            &format!("version_major 0\nversion_minor 0\nnode_from {node}\n{lines}"),
        )
    }

    /// A device of a class on the PCI bus.
    pub fn pci_class(&self, pci: &str, class: &str) -> Result<()> {
        self.write(&format!("sys/bus/pci/devices/{pci}/class"), class)
    }

    /// The directory of one of the AMD devices.
    pub fn amd_pci(&self, index: u64) -> String {
        format!("sys/bus/pci/devices/0000:{:02x}:00.0", 0x10 + 0x20 * index)
    }

    /// A process that uses memory of an AMD device.
    pub fn amd_process(&self, pid: u32, index: u64, bytes: u64) -> Result<()> {
        let gpu = 5000 + index;
        self.write(
            &format!("sys/class/kfd/kfd/proc/{pid}/vram_{gpu}"),
            &format!("{bytes}\n"),
        )
    }

    /// Two TPU chips of one generation, among other devices of their vendor.
    pub fn tpu(&self) -> Result<()> {
        for (pci, device) in [
            ("0000:00:03.0", "0x0042"),
            ("0000:00:04.0", "0x005e"),
            ("0000:00:05.0", "0x005e"),
        ] {
            let directory = format!("sys/bus/pci/devices/{pci}");
            self.write(&format!("{directory}/vendor"), "0x1ae0\n")?;
            self.write(&format!("{directory}/device"), &format!("{device}\n"))?;
            self.write(&format!("{directory}/numa_node"), "-1\n")?;
        }
        self.write(
            "sys/bus/pci/devices/0000:00:04.0/accel/accel0/dev",
            "261:0\n",
        )?;
        self.write(
            "sys/bus/pci/devices/0000:00:05.0/accel/accel1/dev",
            "261:1\n",
        )
    }

    /// A file of NVIDIA's driver about a device, while the driver hangs: who reads it waits for ever.
    pub fn nvidia_hangs(&self, pci: &str) -> Result<()> {
        let file = format!("proc/driver/nvidia/gpus/{pci}/information");
        let file = self.root().join(file);
        std::fs::create_dir_all(file.parent().context("a file in a directory")?)?;
        let mode = nix::sys::stat::Mode::from_bits_truncate(0o644);
        Ok(nix::unistd::mkfifo(&file, mode)?)
    }

    /// The number of the device nodes of parts of NVIDIA's devices.
    pub fn nvidia_capabilities(&self, major: u64) -> Result<()> {
        self.write(
            "proc/devices",
            &format!("Character devices:\n  1 mem\n195 nvidia\n{major} nvidia-caps\n\nBlock devices:\n  7 loop\n"),
        )
    }

    /// What the driver publishes of a part with the compute instance 0: the numbers of its nodes. One of
    /// them is told by file, as drivers do, the other one by the list alone.
    pub fn nvidia_instance(&self, gpu: u32, gpu_instance: u32, minors: [u32; 2]) -> Result<()> {
        let name = format!("gi{gpu_instance}");
        self.write(
            &format!("proc/driver/nvidia/capabilities/gpu{gpu}/mig/{name}/access"),
            &format!(
                "DeviceFileMinor: {}\nDeviceFileMode: 292\nDeviceFileModify: 1\n",
                minors[0]
            ),
        )?;
        let list = self.root().join("proc/driver/nvidia-caps/mig-minors");
        let above =
            std::fs::read_to_string(list).unwrap_or_else(|_| "config 1\nmonitor 2\n".to_owned());
        self.write(
            "proc/driver/nvidia-caps/mig-minors",
            &format!(
                "{above}gpu{gpu}/{name}/access {}\ngpu{gpu}/{name}/ci0/access {}\n",
                minors[0], minors[1]
            ),
        )
    }
}
