//! Programs that use devices: in cgroups named like containers, and one in none.
//!
//! Invariant: they end with the value, and so do their cgroups.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value as Json;
use shared::ids::ContainerId;
use shared::observed::AcceleratorRow;
use tempfile::TempDir;

use super::numbers::{mib, percent};
use super::{MIB, Machine, Report, here, row_of};
use crate::cgroup::TestCgroup;
use crate::dataplane::{Control, container_row};

/// A program that computes, or only holds memory.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) device: String,
    /// Which of the cgroups it is in.
    pub(super) group: Option<usize>,
    pub(super) pid: u32,
    pub(super) memory: u64,
    pub(super) busy: bool,
    pub(super) output: PathBuf,
    /// PCI address of what it computes on.
    pub(super) bus: String,
}

/// A container or a process of the loads, as the agent tells of it.
pub(super) struct Holder {
    pub(super) name: String,
    pub(super) of_part: bool,
    pub(super) memory: Option<f64>,
    pub(super) share: Option<f64>,
    /// Its processes as `nvidia-smi` numbers them.
    pub(super) keys: Vec<(u32, u32)>,
    /// Bytes that its programs have asked for.
    pub(super) taken: u64,
}

pub(super) struct Loads {
    pub(super) place: TempDir,
    pub(super) groups: Vec<(ContainerId, TestCgroup)>,
    /// Where there are no such cgroups: this process's own, by which processes are listed, and whether
    /// its path names a container.
    pub(super) session: Option<(ContainerId, bool)>,
    /// The driver does not list them.
    pub(super) unlisted: bool,
    pub(super) outside: Vec<Child>,
    pub(super) all: Vec<Load>,
}

impl Loads {
    pub(super) fn make_groups(&mut self, control: &mut Control) -> Result<()> {
        for number in [1u8, 2] {
            let id = format!("{number:x}").repeat(64);
            let group = TestCgroup::new(&id)?.context("this takes root")?;
            let mut row = container_row(number);
            row.container_id = id.parse()?;
            row.cgroup_path.clone_from(&group.path);
            control.write(|batch| batch.put_container(row))?;
            self.groups.push((id.parse()?, group));
        }
        Ok(())
    }

    /// Has the processes of the cgroup that this one runs in listed.
    pub(super) fn join_session(
        &mut self,
        control: &mut Control,
        report: &mut Report,
    ) -> Result<()> {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let paths = text.lines().filter_map(|line| line.splitn(3, ':').nth(2));
        let path = paths
            .map(|path| path.trim_matches('/'))
            .max_by_key(|it| it.len());
        let Some(path) = path.filter(|path| !path.is_empty()) else {
            report.leave_out("processes: this process has no cgroup of its own".to_owned());
            return Ok(());
        };
        let words = path.split(|c: char| !c.is_ascii_hexdigit());
        let own: Option<ContainerId> = words
            .filter(|word| word.len() == 64)
            .find_map(|word| word.parse().ok());
        let mut row = container_row(1);
        if let Some(id) = own {
            row.container_id = id;
        }
        path.clone_into(&mut row.cgroup_path);
        self.session = Some((row.container_id, own.is_some()));
        control.write(|batch| batch.put_container(row))?;
        Ok(())
    }

    /// The container that a load is in.
    pub(super) fn container_of(&self, load: &Load) -> Option<ContainerId> {
        match load.group {
            Some(place) => Some(self.groups[place].0),
            None => self.session.filter(|(_, named)| *named).map(|(id, _)| id),
        }
    }

    /// All containers that loads are in.
    pub(super) fn containers(&self) -> impl Iterator<Item = ContainerId> {
        let session = self.session.filter(|(_, named)| *named);
        let groups = self.groups.iter().map(|(id, _)| *id);
        groups.chain(session.map(|(id, _)| id))
    }

    pub(super) fn start(
        &mut self,
        machine: &Machine,
        device: &AcceleratorRow,
        group: Option<usize>,
        memory: u64,
        what: &str,
    ) -> Result<()> {
        let program = here().join("python/cuda_load.py");
        let output = self.place.path().join(self.all.len().to_string());
        let variables = machine.environment.iter();
        let mut script: String = variables
            .map(|(name, value)| format!("export {name}='{value}'; "))
            .collect();
        let _ = write!(
            script,
            "export CUDA_VISIBLE_DEVICES='{}'; exec python3 '{}' {memory} {what} >'{}' 2>&1",
            device.id,
            program.display(),
            output.display()
        );
        let pid = match group {
            Some(place) => self.groups[place].1.run(&script)?,
            None => {
                let child = Command::new("sh")
                    .args(["-c", &script])
                    .stdin(Stdio::null())
                    .spawn()?;
                let pid = child.id();
                self.outside.push(child);
                pid
            }
        };
        self.all.push(Load {
            device: device.id.clone(),
            group,
            pid,
            memory,
            busy: what == "spin",
            output,
            bus: String::new(),
        });
        Ok(())
    }

    /// The containers with loads, and their processes.
    pub(super) fn holders(
        &self,
        rows: &[AcceleratorRow],
        control: &mut Control,
    ) -> Result<Vec<Holder>> {
        let mut all = Vec::new();
        if self.groups.is_empty() && self.session.is_none() {
            return Ok(all);
        }
        let listing = control.observed.processes()?;
        let of_device = |row: &AcceleratorRow, name: String| Holder {
            name: format!("{name} on {}", row.id),
            of_part: row.part_of.is_some(),
            memory: None,
            share: None,
            keys: Vec::new(),
            taken: 0,
        };
        let of_process = |load: &Load| -> Result<Holder> {
            let row = row_of(rows, &load.device)?;
            let process = listing.list.iter().find(|it| it.pid == load.pid);
            let found = process.map(|process| &process.counters);
            let what = if load.busy { "busy" } else { "idle" };
            Ok(Holder {
                memory: found.and_then(|it| mib(it.accelerator_memory_bytes)),
                share: found.and_then(|it| percent(it.accelerator_utilisation_permille)),
                keys: vec![(row.key.index, load.pid)],
                taken: load.memory,
                ..of_device(row, format!("{what} process of {} MiB", load.memory / MIB))
            })
        };
        if self.groups.is_empty() {
            return self.all.iter().map(of_process).collect();
        }
        for (place, (id, _)) in self.groups.iter().enumerate() {
            let own = || self.all.iter().filter(|load| load.group == Some(place));
            let device = &own().next().context("a load in each container")?.device;
            let row = row_of(rows, device)?;
            let user = row.users.iter().find(|user| user.container_id == *id);
            all.push(Holder {
                memory: user.and_then(|user| mib(user.memory_bytes)),
                share: user.and_then(|user| percent(user.utilisation_permille)),
                keys: own().map(|load| (row.key.index, load.pid)).collect(),
                taken: own().map(|load| load.memory).sum(),
                ..of_device(
                    row,
                    format!("container {} of {} processes", place + 1, own().count()),
                )
            });
            for load in own() {
                all.push(of_process(load)?);
            }
        }
        Ok(all)
    }

    /// Until all compute.
    pub(super) fn wait(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        for load in &mut self.all {
            loop {
                let said = std::fs::read_to_string(&load.output).unwrap_or_default();
                if let Some(ready) = said.lines().find(|line| line.starts_with('{')) {
                    let ready: Json = serde_json::from_str(ready)?;
                    ready["bus"]
                        .as_str()
                        .unwrap_or("?")
                        .clone_into(&mut load.bus);
                    break;
                }
                ensure!(
                    Instant::now() < deadline && !said.contains("cuda_load: "),
                    "the load on {} does not compute: {}",
                    load.device,
                    said.trim()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    pub(super) fn end(&mut self) -> Result<()> {
        for (_, group) in &mut self.groups {
            group.remove()?;
        }
        for child in &mut self.outside {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Loads {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
