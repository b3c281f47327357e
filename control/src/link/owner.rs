//! The one task that writes the desired region and looks at the observed one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use shared::desired::{DesiredBatch, DesiredSnapshot, DesiredWriter, NodeRow, PortKey, PortRow};
use shared::doorbell::{RingOutcome, Ringer};
use shared::ids::{ContainerId, Generation, KernelId};
use shared::lock::LockLost;
use shared::observed::ObservedReader;
use shared::{BatchError, OpenError, ReadError, monotonic_ns};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Command, KernelRows, Observed, Withdrawn};

/// How often the regions are looked at when nobody rings.
const LOOK: Duration = Duration::from_secs(1);

/// What the region holds of one kernel.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Held {
    ports: BTreeMap<PortKey, PortRow>,
    containers: BTreeSet<ContainerId>,
}

pub(super) struct Owner {
    writer: DesiredWriter,
    reader: ObservedReader,
    ringer: Ringer,
    seen: watch::Sender<Observed>,
    lock_lost: watch::Sender<Option<LockLost>>,
    held: HashMap<KernelId, Held>,
    /// Whose each port is: it is among those that its kernel holds.
    owners: HashMap<PortKey, KernelId>,
    /// The node's row until it is written.
    node: Option<NodeRow>,
    /// Whether the host's firewall decides about new clients; it does until it is said not to.
    honours_firewall: bool,
    /// So that a broken region is reported once and not every second.
    trouble: Option<String>,
    /// The same of our own region's file.
    misplaced: bool,
}

impl Owner {
    pub(super) fn new(
        writer: DesiredWriter,
        reader: ObservedReader,
        ringer: Ringer,
        seen: watch::Sender<Observed>,
        found: &DesiredSnapshot,
        node: NodeRow,
    ) -> Owner {
        let mut held: HashMap<KernelId, Held> = HashMap::new();
        let owned = |row: &PortRow| (row.key(), row.kernel_id);
        for row in &found.ports {
            held.entry(row.kernel_id)
                .or_default()
                .ports
                .insert(row.key(), row.clone());
        }
        for row in &found.containers {
            held.entry(row.kernel_id)
                .or_default()
                .containers
                .insert(row.container_id);
        }
        Owner {
            writer,
            reader,
            ringer,
            seen,
            lock_lost: watch::Sender::default(),
            held,
            owners: found.ports.iter().map(owned).collect(),
            node: Some(node),
            honours_firewall: true,
            trouble: None,
            misplaced: false,
        }
    }

    /// Writes the node's row, if that is still to be done. A region that has said nothing speaks from
    /// then on.
    pub(super) fn write_node(&mut self) {
        let Some(node) = self.node.take() else {
            return;
        };
        if let Err(err) = self.writer.batch(|batch| batch.set_node(node)) {
            tracing::error!(
                err = &err as &dyn std::error::Error,
                "cannot write the node's row"
            );
        }
    }

    /// Tells who has become the writer, once somebody has.
    pub(super) fn lock_lost(&self) -> watch::Receiver<Option<LockLost>> {
        self.lock_lost.subscribe()
    }

    pub(super) async fn run(
        mut self,
        rung: Arc<Notify>,
        mut requests: mpsc::Receiver<Command>,
        stopping: CancellationToken,
    ) {
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.serve(request),
                    None => return,
                },
                () = rung.notified() => self.look(),
                _ = tick.tick() => {
                    if let Err(lock_lost) = self.beat() {
                        self.lock_lost.send_replace(Some(lock_lost));
                        return;
                    }
                    self.look();
                }
                // Requests of operations that are still under way are served until they are done.
                () = stopping.cancelled(), if requests.is_closed() => return,
            }
        }
    }

    fn beat(&mut self) -> Result<(), LockLost> {
        match self.writer.heartbeat() {
            Ok(false) => self.misplaced = false,
            Ok(true) => tracing::warn!(
                path = %self.writer.directory().display(),
                "somebody had taken the region's file away; it has been made again"
            ),
            Err(OpenError::LockLost(lock_lost)) => return Err(lock_lost),
            Err(err) => {
                if !std::mem::replace(&mut self.misplaced, true) {
                    tracing::error!(
                        err = &err as &dyn std::error::Error,
                        "somebody has taken the region's file or lock away, and it cannot be made again yet; put its directory right, or restart the agent"
                    );
                }
            }
        }
        Ok(())
    }

    fn serve(&mut self, command: Command) {
        match command {
            Command::Publish {
                kernel,
                rows,
                reply,
            } => {
                let result = self.publish(kernel, &rows);
                let _ = reply.send(result);
            }
            Command::Withdraw { kernel, reply } => {
                let held = self.let_go(kernel);
                let withdrawn = self.remove(BTreeMap::from([(kernel, held)]));
                let _ = reply.send(withdrawn);
            }
            Command::HonourFirewall { decides, reply } => {
                let _ = reply.send(self.honour_firewall(decides));
            }
            Command::Settle { keep, reply } => {
                let _ = reply.send(self.settle(&keep));
            }
        }
    }

    fn publish(&mut self, kernel: KernelId, rows: &KernelRows) -> Result<Generation, BatchError> {
        // What is only looked at has the number it has. Where another kernel's row has it too, that one
        // stays.
        let of_another = |key: &PortKey| self.owners.get(key).is_some_and(|it| *it != kernel);
        let ports: BTreeMap<_, _> = rows
            .ports
            .iter()
            .filter(|row| !(row.observe_only && of_another(&row.key())))
            .map(|row| PortRow {
                honour_firewall: self.honours_firewall,
                ..row.clone()
            })
            .map(|row| (row.key(), row))
            .collect();
        let wanted = Held {
            ports,
            containers: rows.container.iter().map(|row| row.container_id).collect(),
        };
        self.write_node();
        let before = self.held.get(&kernel).cloned().unwrap_or_default();
        let generation = self.writer.batch(|batch| {
            let is_left = |key: &&PortKey| !wanted.ports.contains_key(key);
            for key in before.ports.keys().filter(is_left) {
                batch.remove_port(*key);
            }
            for id in before.containers.difference(&wanted.containers) {
                batch.remove_container(*id);
            }
            if let Some(row) = &rows.container {
                batch.put_container(row.clone());
            }
            for row in wanted.ports.values() {
                batch.put_port(row.clone());
            }
        })?;
        self.let_go(kernel);
        self.hold(kernel, wanted);
        self.ring();
        Ok(generation)
    }

    /// Writes the rows anew that say something else. Nothing else of them changes: nobody is asked where the
    /// containers are.
    fn honour_firewall(&mut self, decides: bool) -> Result<bool, BatchError> {
        let is_change = std::mem::replace(&mut self.honours_firewall, decides) != decides;
        let rows = self
            .held
            .values_mut()
            .flat_map(|held| held.ports.values_mut());
        let others: Vec<_> = rows.filter(|row| row.honour_firewall != decides).collect();
        if !others.is_empty() {
            self.writer.batch(|batch| {
                for row in &others {
                    batch.put_port(PortRow {
                        honour_firewall: decides,
                        ..(*row).clone()
                    });
                }
            })?;
            for row in others {
                row.honour_firewall = decides;
            }
            self.ring();
        }
        Ok(is_change)
    }

    /// Notes what a kernel holds. The row of one that is only looked at is this kernel's then.
    fn hold(&mut self, kernel: KernelId, held: Held) {
        for key in held.ports.keys() {
            if let Some(other) = self.owners.insert(*key, kernel)
                && let Some(held) = self.held.get_mut(&other)
            {
                held.ports.remove(key);
            }
        }
        self.held.insert(kernel, held);
    }

    /// A kernel holds nothing any more. Answers what it had.
    fn let_go(&mut self, kernel: KernelId) -> Held {
        let held = self.held.remove(&kernel).unwrap_or_default();
        for key in held.ports.keys() {
            self.owners.remove(key);
        }
        held
    }

    fn settle(&mut self, keep: &HashSet<KernelId>) -> usize {
        self.write_node();
        let strangers = self.held.keys().filter(|kernel| !keep.contains(kernel));
        let strangers: Vec<KernelId> = strangers.copied().collect();
        let strangers: BTreeMap<KernelId, Held> = strangers
            .into_iter()
            .map(|kernel| (kernel, self.let_go(kernel)))
            .collect();
        let count = strangers.len();
        self.remove(strangers);
        count
    }

    fn remove(&mut self, kernels: BTreeMap<KernelId, Held>) -> Withdrawn {
        let keys: Vec<PortKey> = kernels
            .values()
            .flat_map(|held| held.ports.keys().copied())
            .collect();
        let removed = self.writer.batch(|batch: &mut DesiredBatch| {
            for held in kernels.values() {
                for key in held.ports.keys() {
                    batch.remove_port(*key);
                }
                for id in &held.containers {
                    batch.remove_container(*id);
                }
            }
        });
        match removed {
            Ok(generation) => {
                self.ring();
                Withdrawn { keys, generation }
            }
            Err(err) => {
                // A removal names rows that are there: nothing can be too long or too many.
                tracing::error!(err = &err as &dyn std::error::Error, "cannot remove rows");
                for (kernel, held) in kernels {
                    self.hold(kernel, held);
                }
                Withdrawn {
                    keys: Vec::new(),
                    generation: self.writer.committed(),
                }
            }
        }
    }

    pub(super) fn ring(&mut self) {
        match self.ringer.ring() {
            Ok(RingOutcome::Heard | RingOutcome::Pending | RingOutcome::Nobody) => {}
            // A lost ring costs nothing: the dataplane looks by itself.
            Err(err) => {
                tracing::debug!(
                    err = &err as &dyn std::error::Error,
                    "cannot ring the dataplane"
                );
            }
        }
    }

    /// Reads the observed region and shows it to those who wait.
    pub(super) fn look(&mut self) {
        match self.reader.snapshot() {
            Ok(snapshot) => {
                self.trouble = None;
                self.writer.release_acknowledged(&snapshot);
                let life = self.reader.writer().unwrap_or_default();
                let age = monotonic_ns().saturating_sub(life.heartbeat_monotonic_ns);
                self.seen.send_replace(Observed {
                    snapshot: Some(snapshot),
                    heartbeat_age: Some(Duration::from_nanos(age)),
                    epoch: life.epoch,
                });
            }
            Err(err) => {
                let missing = matches!(err, ReadError::Missing { .. });
                let text = err.to_string();
                if !missing && self.trouble.as_ref() != Some(&text) {
                    tracing::warn!(
                        err = &err as &dyn std::error::Error,
                        "cannot read the observed region"
                    );
                    self.trouble = Some(text);
                }
                // The last good copy stays; its age tells that nobody writes.
                let life = self.reader.writer().ok();
                self.seen.send_modify(|observed| {
                    observed.heartbeat_age = life.map(|life| {
                        Duration::from_nanos(
                            monotonic_ns().saturating_sub(life.heartbeat_monotonic_ns),
                        )
                    });
                });
            }
        }
    }
}
