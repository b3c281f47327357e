//! The shared regions as commands read them: without the agent, and without touching anything.
//!
//! In: the configuration's run directory and agent id. Out: what both processes have written.
//! Invariant: both regions are mapped read-only; neither process needs to run.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use shared::desired::{DesiredReader, DesiredSnapshot};
use shared::monotonic_ns;
use shared::observed::{ObservedReader, ObservedSnapshot};
use shared::run_dir::RunDir;

use super::exit::Problem;

/// A dataplane that has shown no sign of life for this long does not run. It beats every second.
const HEARTBEAT_LIMIT: Duration = Duration::from_secs(4);

/// What both processes have written.
#[derive(Clone, Debug, Default)]
pub struct RegionsSnapshot {
    /// The dataplane's side.
    pub observed: Arc<ObservedSnapshot>,
    /// Control's side, if it is there.
    pub desired: Option<Arc<DesiredSnapshot>>,
    /// Since the dataplane's last sign of life.
    pub heartbeat_age: Option<Duration>,
    /// Now, ns of the monotonic clock.
    pub now_ns: u64,
}

impl RegionsSnapshot {
    /// Whether the dataplane runs.
    pub fn is_alive(&self) -> bool {
        self.heartbeat_age.is_some_and(|age| age < HEARTBEAT_LIMIT)
    }

    /// Since the last pass.
    pub fn sample_age(&self) -> Option<Duration> {
        let taken = self.observed.node.as_ref()?.taken_monotonic_ns;
        Some(Duration::from_nanos(self.now_ns.saturating_sub(taken)))
    }

    /// The service behind a port, as control wants it.
    pub fn service(&self, key: shared::desired::PortKey) -> Option<&str> {
        let row = self
            .desired
            .as_ref()?
            .ports
            .iter()
            .find(|row| row.key() == key)?;
        (!row.service.is_empty()).then_some(row.service.as_str())
    }
}

/// Whether something was refused for want of rights.
fn is_denied(err: &anyhow::Error) -> bool {
    err.chain().any(|cause| {
        let cause = cause.downcast_ref::<std::io::Error>();
        cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::PermissionDenied)
    })
}

/// The reading end of both regions.
#[derive(Debug)]
pub struct Regions {
    observed: ObservedReader,
    desired: DesiredReader,
    directory: PathBuf,
}

impl Regions {
    /// Of the agent the configuration describes.
    pub fn of(config: &config::Config) -> Result<Regions, Problem> {
        let run_dir = RunDir::choose(Some(&config.node.run_dir), &config.agent.id)
            .map_err(|err| Problem::Config(err.into()))?;
        Ok(Regions::at(&run_dir))
    }

    /// In a run directory.
    pub fn at(run_dir: &RunDir) -> Regions {
        Regions {
            observed: ObservedReader::at(run_dir.dataplane()),
            desired: DesiredReader::at(run_dir.control()),
            directory: run_dir.dataplane(),
        }
    }

    /// Looks now.
    pub fn look(&mut self) -> Result<RegionsSnapshot, Problem> {
        let observed = self.observed.snapshot();
        let observed = observed.map_err(|err| {
            let err = anyhow::Error::new(err);
            let place = self.directory.display();
            let words = if is_denied(&err) {
                format!("this user may not look into {place}; run this as root")
            } else {
                format!(
                    "there are no samples in {place}; does bai-dataplane run with the same configuration \
                     (node.run-dir, agent.id)?"
                )
            };
            Problem::Unavailable(err.context(words))
        })?;
        let now_ns = monotonic_ns();
        let life = self.observed.writer().ok();
        Ok(RegionsSnapshot {
            observed,
            desired: self.desired.snapshot().ok(),
            heartbeat_age: life.map(|life| {
                Duration::from_nanos(now_ns.saturating_sub(life.heartbeat_monotonic_ns))
            }),
            now_ns,
        })
    }
}
