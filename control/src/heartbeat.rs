//! Signs of life: what makes and keeps this node ALIVE in the manager.
//!
//! In: what the node is, its slots, its installed images, its resource group; the clock; the first
//! scan of accelerators, since absent is not zero. Out:
//! `agent_heartbeat` at a fixed period, `agent_status_heartbeat` every minute, and
//! `agent_images_remove`. Invariants: a heartbeat waits for nothing: not for the engine, not for
//! the bus (of a report only the newest waits); what the engine does not tell in time is told as
//! it was last known.

mod images;
pub mod payload;
pub mod status;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::MissedTickBehavior;

use crate::events::bus::Bus;
use crate::events::bus::message::Message;
use crate::kernel::Node;

pub use payload::{Identity, PROTOCOL_VERSION};

/// How long the first heartbeat lets the engine answer first: managers see the status report and
/// the images at once when the engine is well, and the node all the same when it is not.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// Period of the status report.
const STATUS_PERIOD: Duration = Duration::from_secs(60);

/// What the heartbeat is made of besides the node itself.
#[derive(Debug)]
pub struct Heartbeat {
    /// What does not change while the process lives.
    pub identity: Identity,
    /// Time between heartbeats.
    pub period: Duration,
    /// The resource group; a change is told at once.
    pub scaling_group: watch::Receiver<String>,
}

impl Heartbeat {
    /// Runs until the node stops. The caller has emitted `agent_started` before.
    pub async fn run(self, node: Arc<Node>, bus: Bus) {
        let (installed, images) = watch::channel(images::Installed::default());
        let (reported, status) = oneshot::channel();
        let statuses =
            status::report_periodically(node.clone(), bus.clone(), STATUS_PERIOD, reported);
        let scans = images::scan_periodically(
            node.images.clone(),
            node.events.clone(),
            installed,
            node.stopping.clone(),
        );
        let tasks = [
            node.tasks.spawn(scans),
            node.tasks.spawn(statuses),
            node.tasks
                .spawn(self.beat(node.clone(), bus, images, status)),
        ];
        for task in tasks {
            if let Err(err) = task.await {
                tracing::error!(%err, "a part of the heartbeat has ended");
            }
        }
    }

    async fn beat(
        mut self,
        node: Arc<Node>,
        bus: Bus,
        mut images: watch::Receiver<images::Installed>,
        status: oneshot::Receiver<()>,
    ) {
        let runs = node.link.observed().is_alive();
        let mut devices = node.accelerators.subscribe();
        let mut shrinks = node.ledger.shrinks();
        // The engine has told what it has, or it is slow: both are reasons to go on.
        let told = async { tokio::join!(images.changed(), status) };
        let told = tokio::time::timeout(FIRST_LOOK, told);
        tokio::select! {
            _ = async { tokio::join!(told, node.accelerators.first_scan(runs)) } => {}
            () = node.stopping.cancelled() => return,
        }
        devices.mark_unchanged();
        shrinks.mark_unchanged();
        images.mark_unchanged();
        self.scaling_group.mark_unchanged();
        let mut ticks = tokio::time::interval(self.period.max(Duration::from_millis(100)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                Ok(()) = images.changed() => {}
                // A device that failed must not be given out by the manager for a whole period.
                Ok(()) = devices.changed() => {}
                // Nor one that was announced for its last kernel only.
                Ok(()) = shrinks.changed() => {}
                Ok(()) = self.scaling_group.changed() => {}
                () = node.stopping.cancelled() => return,
            }
            let message = {
                let group = self.scaling_group.borrow_and_update().clone();
                let installed = images.borrow_and_update().clone();
                let args = payload::args(
                    &self.identity,
                    &group,
                    &node.ledger.available(),
                    &node.ledger.compute_plugins(),
                    installed.compressed,
                );
                Message::report("agent_heartbeat", args)
            };
            match message {
                Ok(message) => bus.publish(message),
                Err(err) => tracing::error!(
                    err = &err as &dyn std::error::Error,
                    "the heartbeat cannot be put into words"
                ),
            }
        }
    }
}
