//! The dataplane's end of the `observed` region.
//!
//! In: what [`crate::link`] did about ports and what [`crate::collect`] sampled. Out: rows in the
//! region and a ring at control's doorbell. It is the only owner of the writer; all threads go
//! through its lock. Invariant: the statuses here and the rows in the region agree after every
//! publication, so a pass that refreshes counters can't bring back a port that is gone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use shared::desired::PortKey;
use shared::doorbell::Ringer;
use shared::ids::ContainerId;
use shared::lock::LockLost;
use shared::observed::{
    AcceleratorKey, Applied, KernelPathCounters, NodeSample, ObservedWriter, PortStatus, Processes,
    Samples,
};
use shared::{BatchError, OpenError};

use crate::accelerator::{self, Accelerators, DriverReports};
use crate::forward::kernel_path::KernelPort;
use crate::forward::relay::port::{Counters, Port};

/// A port's status and where its counters live.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What the region says.
    pub status: PortStatus,
    /// The relay's port, while it has one.
    pub port: Option<Arc<Port>>,
    /// The kernel path's, while that serves it too.
    pub kernel_port: Option<Arc<KernelPort>>,
    /// What earlier listeners of the same kernel's port had counted.
    pub base: Counters,
}

impl Entry {
    fn refresh(&mut self, tick: u64) -> bool {
        let now = self
            .port
            .as_ref()
            .map(|port| port.counters())
            .unwrap_or_default();
        let flows = self
            .kernel_port
            .as_ref()
            .map(|port| port.counters())
            .unwrap_or_default();
        let status = &mut self.status;
        // Beside the sums, because the maps count on when this process is dead.
        status.in_kernel_path = KernelPathCounters {
            sessions_total: flows.total,
            sessions_refused: flows.refused,
            bytes_in: flows.bytes_in,
            bytes_out: flows.bytes_out,
            packets_in: flows.packets_in,
            packets_out: flows.packets_out,
        };
        let fresh = [
            u64::from(now.active) + u64::from(flows.active),
            self.base.total + now.total + flows.total,
            self.base.refused + now.refused + flows.refused,
            self.base.bytes_in + now.bytes_in + flows.bytes_in,
            self.base.bytes_out + now.bytes_out + flows.bytes_out,
            self.base.connect_failures + now.connect_failures,
            self.base.packets_in + flows.packets_in,
            self.base.packets_out + flows.packets_out,
        ];
        let shown = [
            &mut status.sessions_active,
            &mut status.sessions_total,
            &mut status.sessions_refused,
            &mut status.bytes_in,
            &mut status.bytes_out,
            &mut status.connect_failures,
            &mut status.packets_in,
            &mut status.packets_out,
        ];
        let mut changed = false;
        for (fresh, shown) in fresh.into_iter().zip(shown) {
            changed |= *shown != fresh;
            *shown = fresh;
        }
        if changed {
            status.tick = tick;
        }
        changed
    }
}

#[derive(Debug)]
struct Inner {
    writer: ObservedWriter,
    ringer: Ringer,
    entries: BTreeMap<PortKey, Entry>,
    accelerators: Accelerators,
    /// Devices the region had no room for at the last pass.
    devices_left_out: usize,
    /// The same for containers.
    containers_left_out: usize,
    /// Containers of the last pass, sorted; `None` when the region may have rows of others.
    sampled: Option<Vec<ContainerId>>,
    /// The region's file is not in its place, which is told once.
    misplaced: bool,
    tick: u64,
}

/// The shared handle.
#[derive(Debug, Clone)]
pub struct Board(Arc<Mutex<Inner>>);

/// One pass of the collector.
#[derive(Debug, Default)]
pub struct Pass {
    /// Its number.
    pub tick: u64,
    /// One sample per container, sorted by id.
    pub samples: Samples,
    /// The node.
    pub node: NodeSample,
    /// Processes, when they were listed since the last pass.
    pub processes: Option<Processes>,
}

/// What the link has done about the desired rows.
#[derive(Debug, Default)]
pub struct Changes {
    /// Statuses that are new or different.
    pub put: Vec<Entry>,
    /// Statuses to forget.
    pub forget: Vec<PortKey>,
    /// How far the desired region was looked at.
    pub applied: Option<Applied>,
}

impl Board {
    /// Takes over the writer. Port rows of an earlier life stay until the link has spoken; those of
    /// containers and accelerators go with the first pass, where it has none of their own: what an
    /// earlier life measured is no measurement of now.
    pub fn new(writer: ObservedWriter, ringer: Ringer, accelerators: Accelerators) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            writer,
            ringer,
            entries: BTreeMap::new(),
            accelerators,
            devices_left_out: 0,
            containers_left_out: 0,
            sampled: None,
            misplaced: false,
            tick: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A sign of life in the region's header.
    ///
    /// # Errors
    /// Another process writes the region now: this one is to end.
    pub fn heartbeat(&self) -> Result<(), LockLost> {
        let mut inner = self.lock();
        match inner.writer.heartbeat() {
            Ok(false) => inner.misplaced = false,
            Ok(true) => {
                tracing::warn!("somebody had taken the region's file away; it has been made again");
            }
            Err(OpenError::LockLost(lock_lost)) => return Err(lock_lost),
            Err(err) => {
                if !std::mem::replace(&mut inner.misplaced, true) {
                    tracing::error!(
                        err = &err as &dyn std::error::Error,
                        "somebody has taken the region's file or lock away, and it cannot be made again yet; put its directory right, or restart bai-dataplane"
                    );
                }
            }
        }
        Ok(())
    }

    /// Whether this process still writes the region. Cheap.
    ///
    /// # Errors
    /// Another one does: this one is to do nothing more, and to end.
    pub fn is_writer(&self) -> Result<(), LockLost> {
        self.lock().writer.is_writer()
    }

    /// Sizes of the region.
    pub fn sizes(&self) -> shared::Sizes {
        self.lock().writer.sizes()
    }

    /// Keys of all port rows in the region, an earlier life's too.
    pub fn port_keys(&self) -> Vec<PortKey> {
        self.lock().writer.port_keys().collect()
    }

    /// Publishes what the link has done, as one, and rings.
    ///
    /// # Errors
    /// The region has no room for all of it; nothing of it was published then.
    pub fn publish_changes(&self, changes: Changes) -> Result<(), BatchError> {
        let mut inner = self.lock();
        let Inner {
            writer,
            entries,
            tick,
            ..
        } = &mut *inner;
        let mut put = changes.put;
        for entry in &mut put {
            entry.refresh(*tick);
        }
        writer.batch(|batch| {
            for key in &changes.forget {
                batch.remove_port(*key);
            }
            for entry in &put {
                batch.put_port(entry.status.clone());
            }
            if let Some(applied) = changes.applied {
                batch.set_applied(applied);
            }
        })?;
        for key in &changes.forget {
            entries.remove(key);
        }
        for entry in put {
            entries.insert(entry.status.key, entry);
        }
        inner.ring();
        Ok(())
    }

    /// Publishes one pass, with the counters of all ports and the last answers of the accelerators'
    /// drivers at this moment, as one, and rings. Containers and devices beyond the region's rows are
    /// left out, and a warning tells so.
    ///
    /// # Errors
    /// The region can't be written; nothing of the pass was published then.
    pub fn publish_pass(&self, mut pass: Pass) -> Result<(), BatchError> {
        let mut inner = self.lock();
        let Inner {
            writer,
            entries,
            accelerators,
            devices_left_out,
            containers_left_out,
            sampled,
            tick,
            ..
        } = &mut *inner;
        *tick = pass.tick;
        let room = usize::try_from(writer.sizes().containers).unwrap_or(usize::MAX);
        let found = pass.samples.ids().len();
        pass.samples.truncate(room);
        let published = pass.samples.ids().len();
        pass.node.counters.containers_sampled = Some(published as u64);
        let left_out = found - published;
        if std::mem::replace(containers_left_out, left_out) != left_out && left_out > 0 {
            tracing::warn!(
                left_out,
                room,
                "there are more containers than the region has rows for; those left out have no statistics, restart bai-dataplane, which takes node.max-containers at its start"
            );
        }
        let DriverReports {
            rows: mut devices,
            silent,
            waits,
        } = accelerators.told(pass.tick);
        let on_devices = accelerators.processes();
        pass.node.counters.accelerators_found = (!waits).then_some(devices.len() as u64);
        pass.node.counters.accelerators_silent = Some(silent);
        let device_room = usize::try_from(writer.sizes().accelerators).unwrap_or(usize::MAX);
        let left_out = accelerator::fit(&mut devices, device_room);
        if std::mem::replace(devices_left_out, left_out) != left_out && left_out > 0 {
            tracing::warn!(
                left_out,
                room = device_room,
                "there are more accelerators than the region has rows for; those left out are not given out, restart bai-dataplane if they were plugged in while it ran"
            );
        }
        let is_lost = |key: &AcceleratorKey| {
            let found = devices.binary_search_by_key(key, |row| row.key);
            found.is_err()
        };
        let lost: Vec<AcceleratorKey> = writer.accelerator_keys().filter(is_lost).collect();
        // Most passes are over the containers of the pass before.
        let before = sampled.take();
        let same = before.filter(|before| before.iter().copied().eq(pass.samples.ids()));
        let mut gone = Vec::new();
        let now = same.unwrap_or_else(|| {
            let now: Vec<ContainerId> = pass.samples.ids().collect();
            let lost = |id: &ContainerId| now.binary_search(id).is_err();
            gone.extend(writer.container_ids().filter(lost));
            now
        });
        writer.batch(|batch| {
            for id in gone {
                batch.remove_container(id);
            }
            for entry in entries.values_mut() {
                if entry.refresh(pass.tick) {
                    batch.put_port(entry.status.clone());
                }
            }
            batch.put_containers(pass.samples);
            for key in lost {
                batch.remove_accelerator(key);
            }
            for row in devices {
                batch.put_accelerator(row);
            }
            batch.set_node(pass.node);
            if let Some(mut processes) = pass.processes {
                for process in &mut processes.list {
                    if let Some(used) = on_devices.get(&process.pid) {
                        process.counters.accelerator_memory_bytes = used.memory_bytes;
                        process.counters.accelerator_utilisation_permille =
                            used.utilisation_permille.map(u64::from);
                    }
                }
                batch.set_processes(processes);
            }
        })?;
        *sampled = Some(now);
        inner.ring();
        Ok(())
    }
}

impl Inner {
    fn ring(&self) {
        // Control looks by itself now and then; a doorbell that can't be rung costs time only.
        if let Err(err) = self.ringer.ring() {
            tracing::debug!(%err, "control's doorbell can't be rung");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::Sizes;
    use shared::observed::{ContainerSample, ObservedReader};
    use shared::run_dir::RunDir;

    /// As when `node.max-containers` was raised and only bai-agent was started again.
    #[test]
    fn containers_beyond_the_regions_rows_are_left_out_and_the_others_are_published() {
        let base = tempfile::tempdir_in("/dev/shm").unwrap();
        let run_dir = RunDir::choose(Some(base.path()), "i-board").unwrap();
        let directory = run_dir.create_dataplane().unwrap();
        let sizes = Sizes {
            containers: 2,
            ..Sizes::default()
        };
        let board = Board::new(
            ObservedWriter::open(&directory, sizes).unwrap(),
            Ringer::of(run_dir.control()).unwrap(),
            Accelerators::none(),
        );
        let mut reader = ObservedReader::at(&directory);
        let mut published = |tick, ids: &[u8]| {
            let sample = |id: &u8| ContainerSample {
                container_id: ContainerId([*id; 32]),
                tick,
                ..ContainerSample::default()
            };
            let pass = Pass {
                tick,
                samples: ids.iter().map(sample).collect(),
                ..Pass::default()
            };
            board.publish_pass(pass).unwrap();
            let snapshot = reader.snapshot().unwrap();
            let counters = &snapshot.node.as_ref().unwrap().counters;
            let rows = snapshot.containers.iter();
            let ids: Vec<(u8, u64)> = rows.map(|it| (it.container_id.0[0], it.tick)).collect();
            (ids, counters.containers_sampled)
        };
        assert_eq!(published(1, &[2, 3]), (vec![(2, 1), (3, 1)], Some(2)));
        // One more, before them: the last one's row goes to it.
        assert_eq!(published(2, &[1, 2, 3]), (vec![(1, 2), (2, 2)], Some(2)));
        assert_eq!(published(3, &[3]), (vec![(3, 3)], Some(1)));
    }
}
