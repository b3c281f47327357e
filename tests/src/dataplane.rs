//! A dataplane process of its own, with the test in the place of control.
//!
//! In: rows. Out: statuses, samples, the process to signal or kill. Invariant: it lives in a run
//! directory of its own and ends with its handle.

use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shared::Sizes;
use shared::desired::{ContainerRow, DesiredBatch, DesiredWriter, PortKey, PortRow, Protocol};
use shared::doorbell::{Doorbell, Ringer};
use shared::ids::{ContainerId, Generation, KernelId};
use shared::observed::{AcceleratorRow, ContainerSample, ObservedReader, PortState, PortStatus};
use shared::run_dir::RunDir;

use crate::place::HeldDirectory;
use crate::{host_ports, wait};

/// How long to wait for what is bound to come, on a machine of usual speed.
const LIMIT: Duration = Duration::from_secs(30);

/// Looks until there is an answer; fails after a deadline.
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
    wait::until_blocking(what, LIMIT, look)
}

/// How the process is started.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Lines added to the configuration's `[node.dataplane]`.
    pub dataplane: String,
    /// Lines added to its `[node]`.
    pub node: String,
    /// Limit of open descriptors, soft and hard.
    pub descriptors: Option<u32>,
    /// Run it in this network namespace (made by the test).
    pub namespace: Option<String>,
    /// Run it in the mount namespace of this process.
    pub mounts_of: Option<u32>,
    /// Run it without these capabilities: `-bpf,-perfmon`.
    pub without: Option<&'static str>,
    /// Run it by this command, which gets the program and its arguments.
    pub by: Vec<String>,
    /// Added to its environment.
    pub environment: Vec<(String, String)>,
}

/// The run directory and the configuration, kept over restarts of the process.
#[derive(Debug)]
pub struct Place {
    directory: HeldDirectory,
    run_dir: RunDir,
    options: Options,
}

const AGENT: &str = "i-dataplane-test";

impl Place {
    /// A fresh place.
    pub fn new(options: Options) -> Result<Self> {
        let directory = HeldDirectory::new()?;
        let run_dir = RunDir::choose(Some(directory.path()), AGENT)?;
        run_dir.create_control()?;
        let place = Self {
            directory,
            run_dir,
            options,
        };
        place.reconfigure(&place.options.node)?;
        Ok(place)
    }

    /// Other lines for the configuration's `[node]`, from the next start on.
    pub fn reconfigure(&self, node: &str) -> Result<()> {
        let text = format!(
            "[agent]\nid = \"{AGENT}\"\n[node]\nrun-dir = \"{}\"\n{node}\n[node.dataplane]\n{}\n",
            self.directory.path().display(),
            self.options.dataplane
        );
        std::fs::write(self.directory.path().join("agent.toml"), text)?;
        Ok(())
    }

    /// The directories of the two regions.
    pub fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    /// The command line of the program at this place.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = match (&self.options.namespace, self.options.descriptors) {
            (Some(name), _) => {
                // Unlike `ip netns exec` it leaves the mounts as they are, /sys/fs/bpf among them.
                let mut command = Command::new("nsenter");
                command
                    .arg(format!("--net=/run/netns/{name}"))
                    .arg(program()?);
                command
            }
            (None, Some(limit)) => {
                let mut command = Command::new("sh");
                command
                    .args(["-c", &format!("ulimit -n {limit}; exec \"$0\" \"$@\"")])
                    .arg(program()?);
                command
            }
            (None, None) => Command::new(program()?),
        };
        if let Some((wrapper, first)) = self.options.by.split_first() {
            let mut within = Command::new(wrapper);
            within
                .args(first)
                .arg(command.get_program())
                .args(command.get_args());
            command = within;
        }
        let within = |wrapper: &str, argument: String, command: Command| {
            let mut within = Command::new(wrapper);
            within
                .arg(argument)
                .arg(command.get_program())
                .args(command.get_args());
            within
        };
        if let Some(capabilities) = self.options.without {
            let kept = format!("--bounding-set={capabilities}");
            command = within("setpriv", kept, command);
        }
        // Entering a namespace needs what may be taken away.
        if let Some(pid) = self.options.mounts_of {
            let place = format!("--mount=/proc/{pid}/ns/mnt");
            command = within("nsenter", place, command);
        }
        command
            .args(["--standalone", "--config"])
            .arg(self.directory.path().join("agent.toml"))
            .args(arguments)
            .stdin(Stdio::null())
            .envs(self.options.environment.iter().cloned())
            .env("RUST_LOG", "debug");
        Ok(command)
    }

    /// Starts the program; its log goes to a file of this place.
    pub fn start(&self) -> Result<Process> {
        let log = self.directory.path().join("log");
        let file = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)?;
        let child = self
            .command(&[])?
            .stderr(file)
            .spawn()
            .context("bai-dataplane can't be started")?;
        Ok(Process { child, log })
    }

    /// A place with control and a process that looks ten times a second.
    pub fn sampling(options: Options) -> Result<(Self, Process, Control)> {
        let place = Self::new(Options {
            dataplane: "stats-interval = 0.1".to_owned(),
            ..options
        })?;
        let control = place.control()?;
        let process = place.start()?;
        Ok((place, process, control))
    }

    /// Becomes control: opens the desired region.
    pub fn control(&self) -> Result<Control> {
        self.control_sized(Sizes::default())
    }

    /// The same with tables of these sizes.
    pub fn control_sized(&self, sizes: Sizes) -> Result<Control> {
        let directory = self.run_dir.control();
        Ok(Control {
            desired: DesiredWriter::open(&directory, sizes)?,
            observed: ObservedReader::at(self.run_dir.dataplane()),
            ringer: Ringer::of(self.run_dir.dataplane())?,
            _bell: Doorbell::bind(&directory)?,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nothing stays attached, whatever the outcome. The process has ended before.
        if let Ok(mut detach) = self.command(&["detach"]) {
            let _ = detach.output();
        }
    }
}

/// The path of the built program, beside this test's.
fn program() -> Result<PathBuf> {
    let own = std::env::current_exe().context("the test's own path is unknown")?;
    let path = own
        .parent()
        .and_then(Path::parent)
        .context("the test runs outside a target directory")?
        .join("bai-dataplane");
    ensure!(
        path.exists(),
        "{} is not built; run `make build` first",
        path.display()
    );
    Ok(path)
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.pid(), signal)?)
    }

    /// Names of its threads.
    pub fn threads(&self) -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        let tasks = tasks.into_iter().flatten().flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect()
    }

    /// Its pid.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0))
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        until("the end of bai-dataplane", || {
            self.child.try_wait().ok().flatten()
        })
    }

    /// Whether it runs.
    pub fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        let mut text = String::new();
        if let Ok(mut file) = std::fs::File::open(&self.log) {
            let _ = file.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of bai-dataplane\n{}", self.log());
        }
    }
}

/// Control's ends of both regions.
#[derive(Debug)]
pub struct Control {
    /// The writer of the desired region.
    pub desired: DesiredWriter,
    /// The reader of the observed region.
    pub observed: ObservedReader,
    ringer: Ringer,
    _bell: Doorbell,
}

impl Control {
    /// Writes a batch and rings.
    pub fn write(&mut self, fill: impl FnOnce(&mut DesiredBatch)) -> Result<Generation> {
        let generation = self.desired.batch(fill)?;
        self.ringer.ring()?;
        Ok(generation)
    }

    /// Publishes one row and waits until it is answered.
    pub fn publish(&mut self, row: PortRow) -> Result<PortStatus> {
        let key = row.key();
        let generation = self.write(|batch| batch.put_port(row))?;
        self.answer(key, generation)
    }

    /// Waits for the answer about a port at or after a generation.
    pub fn answer(&mut self, key: PortKey, generation: Generation) -> Result<PortStatus> {
        let region = self.desired.region_id();
        until(&format!("an answer about {key}"), || {
            self.status(key)
                .filter(|status| status.answers(region, generation))
        })
    }

    /// Waits until a port is in a state.
    pub fn in_state(&mut self, key: PortKey, state: PortState) -> Result<PortStatus> {
        until(&format!("{key} being {state}"), || {
            self.status(key).filter(|status| status.state == state)
        })
    }

    /// What is said about a port now.
    pub fn status(&mut self, key: PortKey) -> Option<PortStatus> {
        self.observed.snapshot().ok()?.port(key).cloned()
    }

    /// Removes a port and waits until nothing is left of it; frees its row.
    pub fn withdraw(&mut self, key: PortKey) -> Result<()> {
        self.write(|batch| batch.remove_port(key))?;
        self.in_state(key, PortState::Removed)?;
        self.release();
        Ok(())
    }

    /// Frees the rows whose removal was acknowledged.
    pub fn release(&mut self) -> usize {
        let Ok(observed) = self.observed.snapshot() else {
            return 0;
        };
        let freed = self.desired.release_acknowledged(&observed);
        let _ = self.ringer.ring();
        freed
    }

    /// Waits for a sample of a container that `wanted` accepts.
    pub fn sample(
        &mut self,
        id: ContainerId,
        mut wanted: impl FnMut(&ContainerSample) -> bool,
    ) -> Result<ContainerSample> {
        until("a sample of the container", || {
            let snapshot = self.observed.snapshot().ok()?;
            snapshot.container(id).filter(|it| wanted(it)).cloned()
        })
    }

    /// Waits for accelerators that `wanted` accepts.
    pub fn accelerators(
        &mut self,
        what: &str,
        wanted: impl Fn(&[AcceleratorRow]) -> bool,
    ) -> Result<Vec<AcceleratorRow>> {
        until(what, || {
            let snapshot = self.observed.snapshot().ok()?;
            wanted(&snapshot.accelerators).then_some(snapshot.accelerators.clone())
        })
    }

    /// Waits until every driver has answered and there is no accelerator.
    pub fn no_accelerators(&mut self) -> Result<()> {
        until("the drivers' first look", || {
            let snapshot = self.observed.snapshot().ok()?;
            (snapshot.node.as_ref()?.counters.accelerators_found == Some(0)).then_some(())
        })
    }
}

/// A port of this host that no other test process has.
pub fn free_port() -> u16 {
    host_ports::one().expect("a port")
}

/// A row that leads from a free loopback port to `target`.
pub fn row_to(target: SocketAddr) -> PortRow {
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port: free_port(),
    };
    let mut row = PortRow::new(
        key,
        KernelId([7; 16]),
        ContainerId([9; 32]),
        target.ip(),
        target.port(),
    );
    row.bind = IpAddr::V4(Ipv4Addr::LOCALHOST);
    row
}

/// Where clients of a row connect to.
pub fn address_of(row: &PortRow) -> SocketAddr {
    SocketAddr::new(row.bind, row.host_port)
}

/// A container row without anything to find.
pub fn container_row(number: u8) -> ContainerRow {
    ContainerRow {
        container_id: ContainerId([number; 32]),
        kernel_id: KernelId([number; 16]),
        ..ContainerRow::default()
    }
}
