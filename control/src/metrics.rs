//! The series of the agent, in Prometheus' text format.
//!
//! In: one look at the node ([`NodeSnapshot`]): the observed region, the kernels, the host. Out: the page of
//! a scrape, made when it is asked for. Invariants: every family is declared once, here or in a
//! module below, and listed in `docs/metrics.md`; labels come from the node's own objects, so their
//! number is bounded; the series of a container end with it; what was not measured has no series,
//! and what was measured is shown for [`patience`] only: a number that stays as it is looks idle.

mod containers;
mod folders;
mod machine;
mod page;
mod recorder;

use std::time::Duration;

use shared::observed::{ContainerSample, ObservedSnapshot};

use crate::accelerator::device::AcceleratorDevice;
use crate::kernel::node::Node;
use crate::kernel::registry::Kernel;
use crate::link::Observed;
use crate::ports::Occupancy;
use crate::stats::kernels::KernelFacts;
use crate::stats::node::HostReading;
use crate::storage_proxy;

pub use folders::Folders;
pub use page::{Family, Kind, Page};
pub use recorder::{
    Recorder, Round, TaskEnd, count_call, count_failure, count_request, count_round, count_sync,
    count_sync_end, count_task, count_task_end,
};

/// Samples may be this many intervals old, and a little more for a busy machine.
const INTERVALS: u32 = 3;
const GRACE: Duration = Duration::from_secs(2);

/// How old a sample may be to be told, where one is taken every `interval`.
pub fn patience(interval: Duration) -> Duration {
    interval
        .checked_mul(INTERVALS)
        .map_or(Duration::MAX, |all| all.saturating_add(GRACE))
}

/// What is said of a kernel in its labels.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// What the records know of it too.
    pub facts: KernelFacts,
    /// Its session.
    pub session: String,
    /// Who owns it, if that was told.
    pub user: Option<String>,
    /// Its project, if that was told.
    pub project: Option<String>,
    /// Canonical image name.
    pub image: String,
    /// The container's name.
    pub name: String,
    /// When it was accepted, seconds since 1970.
    pub created_at: f64,
    /// Its services: host port and name.
    pub services: Vec<(u16, String)>,
}

impl Subject {
    /// Of a kernel that has a container.
    pub fn of(kernel: &Kernel) -> Option<Subject> {
        kernel.with_record(|record| {
            let request = record.request.as_ref();
            let services = record.services.iter().flat_map(|service| {
                let ports = service.host_ports.iter();
                ports.map(|port| (*port, service.name.clone()))
            });
            Some(Subject {
                facts: KernelFacts::of(record, 0.0)?,
                session: record.session().to_string(),
                user: request.and_then(|request| request.owner_user_id.clone()),
                project: request.and_then(|request| request.owner_project_id.clone()),
                image: record.image.clone(),
                name: record.container_name.clone(),
                created_at: record.created_at,
                services: services.collect(),
            })
        })
    }
}

/// How the engine answered lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineState {
    /// Whether it did.
    pub answers: bool,
    /// Since it last did.
    pub age: Option<Duration>,
}

/// One look at the node.
#[derive(Debug, Default)]
pub struct NodeSnapshot {
    /// The agent's id.
    pub agent_id: String,
    /// `manager` or `standalone`.
    pub mode: &'static str,
    /// Kernels with a container.
    pub subjects: Vec<Subject>,
    /// Kernels in any state.
    pub kernels: usize,
    /// What the dataplane says.
    pub observed: Observed,
    /// Between two passes of the dataplane, as configured.
    pub interval: Duration,
    /// What the host says, without what the dataplane finds.
    pub reading: HostReading,
    /// The engine.
    pub engine: EngineState,
    /// Slots: name, total and used amount.
    pub slots: Vec<(String, rust_decimal::Decimal, rust_decimal::Decimal)>,
    /// Devices that do not work and that the dataplane has no row of.
    pub unheard: Vec<AcceleratorDevice>,
    /// Host ports.
    pub occupancy: Option<Occupancy>,
    /// Folders of kernels; none when no storage proxy is asked.
    pub folders: Option<Folders>,
    /// Now, ns of the monotonic clock.
    pub now_ns: u64,
}

impl NodeSnapshot {
    /// Looks at the node. Reads memory only: neither the engine nor a disk is asked.
    pub fn of(node: &Node, reading: HostReading, engine: EngineState) -> NodeSnapshot {
        let kernels = node.registry.all();
        let mut used: std::collections::BTreeMap<String, rust_decimal::Decimal> =
            std::collections::BTreeMap::new();
        for kernel in &kernels {
            kernel.with_record(|record| {
                for (slot, amount) in &record.slots {
                    let amount = amount.as_str().and_then(|text| text.parse().ok());
                    let sum = used.entry(slot.clone()).or_default();
                    *sum = sum.saturating_add(amount.unwrap_or_default());
                }
            });
        }
        let slots = node.ledger.available().into_iter().map(|slot| {
            let used = used.get(&slot.name).copied().unwrap_or_default();
            (slot.name, slot.amount, used)
        });
        let observed = node.link.observed();
        NodeSnapshot {
            agent_id: node.agent_id().to_owned(),
            mode: if node.config.standalone {
                "standalone"
            } else {
                "manager"
            },
            subjects: kernels
                .iter()
                .filter_map(|kernel| Subject::of(kernel))
                .collect(),
            kernels: kernels.len(),
            interval: node.config.node.dataplane.stats_interval,
            slots: slots.collect(),
            unheard: node.accelerators.unheard(&observed),
            observed,
            occupancy: Some(node.ports.occupancy()),
            folders: node.storage_proxy.as_ref().map(|proxy| Folders {
                mounted: storage_proxy::mounted(node),
                known: proxy.known(),
                now: std::time::Instant::now(),
            }),
            now_ns: shared::monotonic_ns(),
            reading,
            engine,
        }
    }

    /// Age of the last pass of the dataplane.
    pub fn sample_age(&self) -> Option<Duration> {
        let taken = self.snapshot()?.node.as_ref()?.taken_monotonic_ns;
        Some(Duration::from_nanos(self.now_ns.saturating_sub(taken)))
    }

    fn is_old(&self, taken_ns: u64) -> bool {
        let age = Duration::from_nanos(self.now_ns.saturating_sub(taken_ns));
        age > patience(self.interval)
    }

    /// What the dataplane says, unless its last pass is long ago; before its first one, while it lives.
    fn fresh(&self) -> Option<&ObservedSnapshot> {
        self.snapshot().filter(|snapshot| match &snapshot.node {
            Some(node) => !self.is_old(node.taken_monotonic_ns),
            None => self.observed.is_alive(),
        })
    }

    /// Whether the numbers of a container are told.
    fn is_fresh(&self, sample: &ContainerSample) -> bool {
        !self.is_old(sample.taken_monotonic_ns)
    }

    fn snapshot(&self) -> Option<&ObservedSnapshot> {
        self.observed.snapshot.as_deref()
    }

    /// The page, without what the [`Recorder`] counts.
    pub fn render(&self) -> String {
        let mut page = Page::default();
        containers::render(self, &mut page);
        machine::render(self, &mut page);
        folders::render(self, &mut page);
        page.into_text()
    }
}

/// Every family of a page, in its order.
pub fn families() -> impl Iterator<Item = &'static Family> {
    containers::FAMILIES
        .iter()
        .chain(machine::FAMILIES)
        .chain(folders::FAMILIES)
        .chain(recorder::FAMILIES)
        .copied()
}

#[cfg(test)]
mod tests;
