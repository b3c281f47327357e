//! Our side of the comparison: a dataplane of its own with the bench in the place of control.
//!
//! In: rows. Out: their statuses. Invariant: it lives in the site's directory, in the host's
//! namespace and in the proxy's group, and leaves nothing attached.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec};
use shared::Sizes;
use shared::desired::{ContainerRow, DesiredBatch, DesiredWriter, PortKey, PortRow, Protocol};
use shared::doorbell::{Doorbell, Ringer};
use shared::ids::{Generation, KernelId};
use shared::observed::{ForwardPath, ObservedReader, PortState, RelayEngine};
use shared::run_dir::RunDir;

use crate::site::{CONTAINER_ID, Group, Place, Site, done, ip, until};

const AGENT: &str = "i-bench";
const KERNEL: KernelId = KernelId([7; 16]);

/// A program built beside this one.
///
/// # Errors
/// It is not there.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("the bench's own path is unknown")?;
    // Tests run one directory further down.
    for directory in own.ancestors().skip(1).take(2) {
        let path = directory.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("{name} is not built beside {}", own.display())
}

/// A running dataplane.
#[derive(Debug)]
pub struct Node {
    /// Control's region.
    pub desired: DesiredWriter,
    /// The dataplane's region.
    pub observed: ObservedReader,
    ringer: Ringer,
    bell: Doorbell,
    child: Child,
    sandbox: bool,
}

fn configuration(site: &Site) -> PathBuf {
    site.directory().join("agent.toml")
}

impl Node {
    /// Starts it in the site's host (or, without a topology, on this machine) with `node` lines
    /// in the `[node]` section of its configuration.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(site: &Site, place: Option<Place>, node: &str) -> Result<Self> {
        let run_dir = RunDir::choose(Some(&site.directory()), AGENT)?;
        run_dir.create_control()?;
        std::fs::write(
            configuration(site),
            format!(
                "[agent]\nid = \"{AGENT}\"\n[container]\nport-range = [20000, 22000]\n[node]\nrun-dir = \"{}\"\n{node}\n",
                site.directory().display()
            ),
        )?;
        let log = std::fs::File::create(site.directory().join("log"))?;
        let begun = shared::monotonic_ns();
        let child = site
            .command(place, Group::Proxy, &program("bai-dataplane")?)
            .args(["--standalone", "--config"])
            .arg(configuration(site))
            .stdout(Stdio::null())
            .stderr(log)
            .env("RUST_LOG", "info")
            .spawn()
            .context("bai-dataplane cannot be started")?;
        let directory = run_dir.control();
        let sizes = Sizes {
            ports: 2048,
            ..Sizes::default()
        };
        let mut node = Self {
            desired: DesiredWriter::open(&directory, sizes)?,
            observed: ObservedReader::at(run_dir.dataplane()),
            ringer: Ringer::of(run_dir.dataplane())?,
            bell: Doorbell::bind(&directory)?,
            child,
            sandbox: place.is_some(),
        };
        // Its start, which loads programs on several threads, is no part of what serving costs.
        until("the dataplane's first samples and processes", || {
            let snapshot = node.observed.snapshot().ok()?;
            let processes = node.observed.processes().ok()?;
            let sampled = snapshot.node.as_ref()?.taken_monotonic_ns;
            (sampled.min(processes.taken_monotonic_ns) > begun).then_some(())
        })
        .with_context(|| log_of(site))?;
        Ok(node)
    }

    /// Writes a batch and rings.
    ///
    /// # Errors
    /// The region is full.
    pub fn write(&mut self, fill: impl FnOnce(&mut DesiredBatch)) -> Result<Generation> {
        let generation = self.desired.batch(fill)?;
        let _ = self.ringer.ring();
        Ok(generation)
    }

    /// Waits for a ring of the dataplane, not longer than `most`.
    pub fn wait_for_ring(&self, most: Duration) {
        let mut wanted = [PollFd::new(&self.bell, PollFlags::IN)];
        let most = Timespec {
            tv_sec: i64::try_from(most.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: most.subsec_nanos().into(),
        };
        let _ = rustix::event::poll(&mut wanted, Some(&most));
        while self.bell.drain() {}
    }

    /// Publishes host port → container port pairs of the site's container and waits for the
    /// answer, which must name `path`.
    ///
    /// # Errors
    /// The rows are refused or served another way.
    pub fn publish(
        &mut self,
        site: &Site,
        ports: &[(u16, u16)],
        path: ForwardPath,
        init_pid: u32,
    ) -> Result<()> {
        let link_index = self.link_index(site)?;
        let container: IpAddr = crate::site::CONTAINER.parse()?;
        let rows: Vec<PortRow> = ports
            .iter()
            .map(|(host_port, container_port)| {
                let mut row = row(*host_port, container, *container_port);
                row.link_index = link_index;
                row.link_guard = true;
                row
            })
            .collect();
        let keys: Vec<PortKey> = rows.iter().map(PortRow::key).collect();
        let region = self.desired.region_id();
        let generation = self.write(|batch| {
            batch.put_container(ContainerRow {
                container_id: CONTAINER_ID,
                kernel_id: KERNEL,
                init_pid,
                link_indexes: vec![link_index],
                ..ContainerRow::default()
            });
            for row in rows {
                batch.put_port(row);
            }
        })?;
        for key in keys {
            until(&format!("{key} being served by the {path}"), || {
                let status = self.observed.snapshot().ok()?.port(key).cloned()?;
                (status.answers(region, generation)
                    && status.state == PortState::Serving
                    && status.path == path)
                    .then_some(())
            })
            .with_context(|| log_of(site))?;
        }
        Ok(())
    }

    /// The relay's engine for a TCP port that was published.
    pub fn engine(&mut self, host_port: u16) -> Option<RelayEngine> {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port,
        };
        Some(self.observed.snapshot().ok()?.port(key)?.engine)
    }

    /// Index of the container's interface on the host's side.
    ///
    /// # Errors
    /// It is gone.
    pub fn link_index(&self, site: &Site) -> Result<u32> {
        let host = site.namespace(Place::Host);
        let text = ip(&format!("-n {host} -o link show cont0"))?;
        text.split(':')
            .next()
            .and_then(|word| word.trim().parse().ok())
            .context("an interface index")
    }

    /// Frees the rows whose removal was acknowledged.
    pub fn release(&mut self) {
        if let Ok(observed) = self.observed.snapshot() {
            self.desired.release_acknowledged(&observed);
            let _ = self.ringer.ring();
        }
    }

    /// Ends it and removes what it attached.
    pub fn stop(mut self, site: &Site) {
        let _ = self.child.kill();
        site.end(Group::Proxy);
        let _ = self.child.wait();
        if self.sandbox {
            detach(site);
        }
    }
}

fn log_of(site: &Site) -> String {
    let log = std::fs::read_to_string(site.directory().join("log")).unwrap_or_default();
    format!("log of bai-dataplane:\n{log}")
}

/// A row as control writes it.
#[must_use]
pub fn row(host_port: u16, target: IpAddr, target_port: u16) -> PortRow {
    let key = PortKey {
        protocol: Protocol::Tcp,
        host_port,
    };
    let mut row = PortRow::new(key, KERNEL, CONTAINER_ID, target, target_port);
    row.bind = [0, 0, 0, 0].into();
    row
}

/// Removes hooks and pins of the dataplane that ran here.
pub fn detach(site: &Site) {
    if !configuration(site).exists() {
        return;
    }
    let Ok(program) = program("bai-dataplane") else {
        return;
    };
    let removed = done(
        std::process::Command::new(program)
            .args(["--standalone", "--config"])
            .arg(configuration(site))
            .arg("detach"),
    );
    if let Err(err) = removed {
        eprintln!("bai-dataplane detach: {err:#}");
    }
}
