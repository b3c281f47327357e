//! Whether the dataplane tells of NVIDIA devices what `nvidia-smi` tells, idle and under load.
//!
//! In: a machine with NVIDIA's driver, or one where everything of it is stood in for. Out: what was
//! compared, number by number, or the first thing that does not fit. The loads are real: programs
//! (`tests/python/cuda_load.py`) in cgroups named like containers, and one in none.
//! Invariants: no value is taken for agreement that was not told by both; a check that cannot be done is
//! a failure, but where nobody may make cgroups (not root, or none is mounted to be written to), or the driver lists no process by the pids
//! that are seen there: then it is a skip (`SKIP`), and what was seen says so.

mod comparison;
mod loads;
mod numbers;
mod report;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use shared::ids::ContainerId;
use shared::observed::AcceleratorRow;

use self::comparison::Comparison;
use self::loads::Loads;
use self::numbers::{NUMBERS, Number};
pub use self::report::{Line, Report};

use crate::dataplane::{Control, Options, Place};
use crate::nvidia_smi::{NvidiaSmi, value};
use crate::{cgroup, wait};

const MIB: u64 = 1 << 20;
/// The first pid namespace (`PROC_PID_INIT_INO` of the kernel).
const HOST_PIDS: &str = "pid:[4026531836]";

/// The machine that is looked at.
#[derive(Debug)]
pub struct Machine {
    /// What its programs find the driver by; nothing where it is installed.
    pub environment: Vec<(String, String)>,
    /// How long two programs may take to agree.
    pub patience: Duration,
}

impl Machine {
    /// This one.
    pub fn here() -> Self {
        Self {
            environment: Vec::new(),
            patience: wait::here(Duration::from_secs(60)),
        }
    }

    fn smi(&self) -> NvidiaSmi {
        NvidiaSmi(self.environment.clone())
    }

    /// Why there is nothing to compare; `None` where NVML is.
    pub fn without_nvml(&self) -> Result<Option<String>> {
        const LOAD: &str = "import ctypes, sys\n\
            try: ctypes.CDLL('libnvidia-ml.so.1')\n\
            except OSError as error: sys.exit(str(error))";
        let output = Command::new("python3")
            .args(["-c", LOAD])
            .envs(self.environment.iter().cloned())
            .output()
            .context("python3 can't be started; run deploy/setup test")?;
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Ok((!output.status.success()).then(|| format!("no NVIDIA driver on this node: {reason}")))
    }

    /// Compares the inventory, then puts loads on the first and the last device and compares all
    /// numbers, then ends the loads and sees them gone.
    pub fn check(&self) -> Result<Report> {
        let place = Place::new(Options {
            dataplane: "stats-interval = 0.5".to_owned(),
            environment: self.environment.clone(),
            ..Options::default()
        })?;
        let mut control = place.control()?;
        let process = place.start()?;
        let mut report = Report::default();
        self.compare_all(&mut control, &mut report)
            .with_context(|| {
                format!(
                    "told the same before that:\n{}\nbai-dataplane has logged:\n{}",
                    report.text(),
                    process.log()
                )
            })?;
        Ok(report)
    }

    fn compare_all(&self, control: &mut Control, report: &mut Report) -> Result<()> {
        let rows = self.inventory(control, report)?;
        let mut loads = self.loads(&rows, control, report)?;
        if !self.lists(&loads)? {
            report.leave_out(
                "processes and containers: the driver lists none by the pids of this pid namespace"
                    .to_owned(),
            );
            loads.unlisted = true;
        }
        // What does not fit in one comparison keeps nobody from the other ones.
        let compared = [
            self.hold(control, &loads, report),
            self.under_load(control, &loads, report),
        ];
        loads.end()?;
        let failed = compared.into_iter().filter_map(Result::err);
        let failed: Vec<String> = failed.map(|err| format!("{err:#}")).collect();
        ensure!(failed.is_empty(), "{}", failed.join("\n"));
        self.until_agreed(report, |told| {
            let rows = accelerators(control)?;
            for load in loads.all.iter().filter(|_| !loads.unlisted) {
                let row = row_of(&rows, &load.device)?;
                let users: BTreeSet<_> = row.users.iter().map(|user| user.container_id).collect();
                let (ours, theirs) = (users_of(&loads, &users), self.smi_users(&loads)?);
                let what = format!("{}, these loads after their end", row.id);
                told.is(
                    &what,
                    ours.to_string(),
                    &theirs.to_string(),
                    ours == 0 && theirs == 0,
                );
            }
            Ok(())
        })
    }

    /// Whether `nvidia-smi` lists a load by its pid, which takes it a moment. A host's driver has to.
    fn lists(&self, loads: &Loads) -> Result<bool> {
        if Path::new("/proc/self/ns/pid")
            .read_link()
            .is_ok_and(|it| it == Path::new(HOST_PIDS))
        {
            return Ok(true);
        }
        let deadline = Instant::now() + self.patience.min(Duration::from_secs(10));
        while self.smi_users(loads)? == 0 {
            if Instant::now() > deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(true)
    }

    /// How many of the loads `nvidia-smi` lists.
    fn smi_users(&self, loads: &Loads) -> Result<usize> {
        let listed = self.smi().memory()?;
        let pids: BTreeSet<u32> = listed.keys().map(|(_, pid)| *pid).collect();
        let own = loads.all.iter().filter(|load| pids.contains(&load.pid));
        Ok(own.count())
    }

    fn inventory(&self, control: &mut Control, report: &mut Report) -> Result<Vec<AcceleratorRow>> {
        let told = self.smi().devices(&[
            "index",
            "name",
            "pci.bus_id",
            "driver_version",
            "mig.mode.current",
        ])?;
        ensure!(!told.is_empty(), "nvidia-smi lists no device");
        let rows = control.accelerators("devices", |rows| !rows.is_empty())?;
        let whole: BTreeSet<&str> = (rows.iter())
            .filter(|row| row.part_of.is_none())
            .map(|row| row.id.as_str())
            .collect();
        let ids: BTreeSet<&str> = told.iter().map(|(id, _)| id.as_str()).collect();
        ensure!(
            whole == ids,
            "devices are {whole:?}; nvidia-smi lists {ids:?}"
        );
        for (id, fields) in &told {
            let row = row_of(&rows, id)?;
            ensure!(
                row.key.index.to_string() == fields["index"],
                "{row:?}, {fields:?}"
            );
            ensure!(row.model == fields["name"], "{row:?}, {fields:?}");
            let bus = fields["pci.bus_id"].to_lowercase();
            ensure!(
                bus.ends_with(&row.pci) && !row.pci.is_empty(),
                "{row:?}, {fields:?}"
            );
            let divided = fields["mig.mode.current"] == "Enabled";
            ensure!(row.divided == divided, "{row:?}, {fields:?}");
            ensure!(row.healthy, "{id} does not work: {row:?}");
            report.driver.clone_from(&fields["driver_version"]);
            *report.models.entry(row.model.clone()).or_default() += 1;
        }
        report.parts = rows.iter().filter(|row| row.part_of.is_some()).count();
        Ok(rows)
    }

    fn loads(
        &self,
        rows: &[AcceleratorRow],
        control: &mut Control,
        report: &mut Report,
    ) -> Result<Loads> {
        // Of divided devices only the parts can be used.
        let whole = rows
            .iter()
            .filter(|row| row.part_of.is_none() && !row.divided);
        let mut usable: Vec<&AcceleratorRow> = whole.collect();
        if usable.is_empty() {
            usable = rows.iter().filter(|row| row.part_of.is_some()).collect();
        }
        let (Some(first), Some(last)) = (usable.first(), usable.last()) else {
            bail!("all devices are divided and have no instance: nothing can compute here");
        };
        let mut loads = Loads {
            place: tempfile::tempdir()?,
            groups: Vec::new(),
            session: None,
            unlisted: false,
            outside: Vec::new(),
            all: Vec::new(),
        };
        match cgroup::nobody_makes_them() {
            None => loads
                .make_groups(control)
                .context("cgroups can be made here, and loads have none of their own")?,
            Some(reason) => {
                report.leave_out(format!(
                    "containers: loads cannot be put into cgroups of their own ({reason})"
                ));
                loads.join_session(control, report)?;
            }
        }
        for (device, group, mib, what) in [
            (first, Some(0), 512, "spin"),
            (last, Some(1), 256, "spin"),
            (last, Some(1), 128, "idle"),
            (first, None, 192, "idle"),
        ] {
            let group = group.filter(|_| !loads.groups.is_empty());
            loads.start(self, device, group, mib * MIB, what)?;
        }
        loads.wait(self.patience)?;
        for load in &loads.all {
            let row = row_of(rows, &load.device)?;
            ensure!(
                load.bus == row.pci,
                "the load for {row:?} computes at {}",
                load.bus
            );
        }
        Ok(loads)
    }

    /// That all of them hold their memory and the devices have been busy for a while: before that two
    /// programs could agree on what is not there yet.
    fn hold(&self, control: &mut Control, loads: &Loads, report: &mut Report) -> Result<()> {
        let smi = self.smi();
        self.until_agreed(report, |told| {
            let rows = accelerators(control)?;
            told.busy(&rows, &smi.devices(&["utilization.gpu"])?, loads)?;
            if !loads.unlisted {
                let memory = smi.memory()?;
                for holder in loads.holders(&rows, control)? {
                    told.memory(&holder, &memory);
                }
                told.users(&rows, loads);
            }
            Ok(())
        })
    }

    fn under_load(&self, control: &mut Control, loads: &Loads, report: &mut Report) -> Result<()> {
        let smi = self.smi();
        let numbers = NUMBERS.iter().filter(|number| smi.knows(number.0));
        let numbers: Vec<&Number> = numbers.collect();
        for needed in ["memory.free", "utilization.gpu"] {
            let there = numbers.iter().any(|number| number.0 == needed);
            ensure!(there, "nvidia-smi does not tell {needed}");
        }
        let fields: Vec<&str> = numbers.iter().map(|number| number.0).collect();
        self.until_agreed(report, |told| {
            let devices = smi.devices(&fields)?;
            let rows = accelerators(control)?;
            for (id, values) in &devices {
                let row = row_of(&rows, id)?;
                for (name, ours, amount, share) in &numbers {
                    let theirs = value(&values[*name])?;
                    told.number(&format!("{id} {name}"), ours(row), theirs, |a, b| {
                        (a - b).abs() <= amount + share * b
                    });
                }
            }
            if !loads.unlisted {
                let busy = smi.busy()?;
                let rows = accelerators(control)?;
                for holder in loads.holders(&rows, control)? {
                    told.share(&holder, &busy);
                }
            }
            Ok(())
        })
    }

    /// Looks again and again until each thing was told the same by both at least once.
    fn until_agreed(
        &self,
        report: &mut Report,
        mut look: impl FnMut(&mut Comparison) -> Result<()>,
    ) -> Result<()> {
        let deadline = Instant::now() + self.patience;
        let mut told = Comparison::default();
        loop {
            let looked = look(&mut told);
            if looked.is_ok() && told.open.is_empty() {
                report.lines.extend(told.agreed.into_values());
                return Ok(());
            }
            if Instant::now() > deadline {
                report.lines.extend(told.agreed.into_values());
                looked?;
                let open = told.open.values().map(|line| line.join(" | "));
                let open: Vec<String> = open.collect();
                bail!(
                    "not told the same within {:?} (what | agent | nvidia-smi):\n{}",
                    self.patience,
                    open.join("\n")
                );
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

/// How many of these users are containers of the loads.
fn users_of(loads: &Loads, users: &BTreeSet<ContainerId>) -> usize {
    let own = loads.containers().filter(|id| users.contains(id));
    own.count()
}

/// The directory of the suites: as cargo says when it runs them, as a kit does that was built
/// elsewhere, or where this was built.
pub fn here() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

fn accelerators(control: &mut Control) -> Result<Vec<AcceleratorRow>> {
    Ok(control.observed.snapshot()?.accelerators.clone())
}

fn row_of<'a>(rows: &'a [AcceleratorRow], id: &str) -> Result<&'a AcceleratorRow> {
    let row = rows.iter().find(|row| row.id == id);
    row.with_context(|| format!("{id} is not told"))
}
