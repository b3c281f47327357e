//! Flows in the kernel's table: how old they may grow, and what each port has counted.
//!
//! In: the maps of the programs. Out: a [`KernelPort`] per service. Invariant: what no service
//! stands for is out of the table after a sweep.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use aya::maps::MapData;
use ebpf::map;
use ebpf::records::{PortCounters, PortFlows, ServiceKey, SweepOrder};

use super::{KernelPath, KernelPathError, Served, Services};
use crate::forward::relay::port::Counters;
use crate::sys::bpf::{self, Table};

/// A connection that its client has not confirmed may be silent for so long before it is given up.
const OPENING: Duration = Duration::from_secs(60);
/// Late segments of an ended flow still find their way for so long.
const ENDED: Duration = Duration::from_secs(30);
/// One that a side has ended and the other has not. Who waits for the rest of an answer hears more often.
const CLOSING: Duration = Duration::from_secs(3600);
/// A silent flow is forgotten after this, as by the kernel's connection tracking.
const IDLE: Duration = Duration::from_secs(5 * 24 * 3600);
/// The same for datagrams, whose flows have no end.
const DATAGRAM_IDLE: Duration = Duration::from_secs(180);
/// ... and before an answer.
const DATAGRAM_OPENING: Duration = Duration::from_secs(30);

/// From so many ports on their counters are read by whole tables: for that the kernel goes over all
/// the room that these have.
const MANY: usize = 64;

/// What a port has counted on the kernel path; refreshed every second.
#[derive(Debug, Default)]
pub struct KernelPort {
    pub(super) active: AtomicU64,
    total: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    refused: AtomicU64,
    packets_in: AtomicU64,
    packets_out: AtomicU64,
    /// Of the active ones, those of clients on this host.
    pub(super) local: AtomicU64,
}

impl KernelPort {
    /// The counters, in the relay's terms. A payload that is sent again counts again.
    pub fn counters(&self) -> Counters {
        Counters {
            active: u32::try_from(self.active.load(Relaxed)).unwrap_or(u32::MAX),
            total: self.total.load(Relaxed),
            refused: self.refused.load(Relaxed),
            packets_in: self.packets_in.load(Relaxed),
            packets_out: self.packets_out.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            ..Counters::default()
        }
    }

    /// Takes over what each CPU has counted.
    fn note_counters(&self, values: &[PortCounters]) {
        let sum = |of: fn(&PortCounters) -> u64| values.iter().map(of).sum();
        self.total.store(sum(|it| it.flows), Relaxed);
        self.bytes_in.store(sum(|it| it.bytes_in), Relaxed);
        self.bytes_out.store(sum(|it| it.bytes_out), Relaxed);
        self.refused.store(sum(|it| it.refused), Relaxed);
        self.packets_in.store(sum(|it| it.packets_in), Relaxed);
        self.packets_out.store(sum(|it| it.packets_out), Relaxed);
    }

    fn note_flows(&self, flows: &PortFlows) {
        let local = flows.local.max(0);
        self.local.store(u64::try_from(local).unwrap_or(0), Relaxed);
        let active = u64::try_from(flows.active + local).unwrap_or(0);
        self.active.store(active, Relaxed);
    }
}

/// The counters of all ports, read by a few calls for all.
#[derive(Debug)]
pub(super) struct Tables {
    counters: Table<ServiceKey, PortCounters>,
    active: Table<ServiceKey, PortFlows>,
}

impl Tables {
    /// # Errors
    /// A map is another one.
    pub(super) fn of(counters: &MapData, active: &MapData) -> io::Result<Self> {
        Ok(Self {
            counters: Table::of(counters)?,
            active: Table::of(active)?,
        })
    }

    fn read(&mut self, served: &Services<Served>) -> io::Result<()> {
        self.counters.read(|key, values| {
            if let Some(served) = served.get(key) {
                served.port.note_counters(values);
            }
        })?;
        self.read_flows(served)
    }

    fn read_flows(&mut self, served: &Services<Served>) -> io::Result<()> {
        self.active.read(|key, flows| {
            if let (Some(served), [flows]) = (served.get(key), flows) {
                served.port.note_flows(flows);
            }
        })
    }
}

fn order(pass: u32) -> SweepOrder {
    let nanoseconds = |it: Duration| u64::try_from(it.as_nanos()).unwrap_or(u64::MAX);
    SweepOrder {
        opening_ns: nanoseconds(OPENING),
        idle_ns: nanoseconds(IDLE),
        ended_ns: nanoseconds(ENDED),
        datagram_idle_ns: nanoseconds(DATAGRAM_IDLE),
        datagram_opening_ns: nanoseconds(DATAGRAM_OPENING),
        pass,
        closing_s: u32::try_from(CLOSING.as_secs()).unwrap_or(u32::MAX),
    }
}

impl KernelPath {
    /// Removes dead flows and counts the living.
    pub fn sweep(&mut self, now: Instant) {
        self.swept_at = now;
        if let Err(err) = self.try_sweep() {
            self.complain(&err);
        }
    }

    fn try_sweep(&mut self) -> Result<(), KernelPathError> {
        self.pass = self.pass.wrapping_add(1);
        self.orders
            .set(0, order(self.pass), 0)
            .map_err(|source| KernelPathError::Map {
                name: map::ORDERS,
                source,
            })?;
        bpf::run_once(&self.sweeper).map_err(KernelPathError::Sweep)?;
        self.read_all(Tables::read_flows, |path, key, port| {
            path.read_flows(key, port);
        });
        Ok(())
    }

    pub(super) fn count(&mut self) {
        self.read_all(Tables::read, |path, key, port| {
            path.read_counters(key, port);
        });
    }

    /// Reads something of all ports by `tables`, or by `one` of each.
    fn read_all(
        &mut self,
        tables: impl Fn(&mut Tables, &Services<Served>) -> io::Result<()>,
        one: impl Fn(&Self, ServiceKey, &KernelPort),
    ) {
        if self.served.len() >= MANY
            && let Some(all) = &mut self.tables
        {
            match tables(all, &self.served) {
                Ok(()) => return,
                Err(err) => {
                    tracing::info!(%err, "the kernel reads counters of ports one by one only");
                    self.tables = None;
                }
            }
        }
        for (key, served) in self.served.iter() {
            one(self, *key, &served.port);
        }
    }

    /// Whether flows of the service may be under way.
    pub(super) fn count_one(&mut self, key: ServiceKey) -> bool {
        let served = self.served.get(&key);
        served.is_none_or(|served| self.read_counters(key, &served.port))
    }

    /// Whether a port has clients on this host. To cut them all that are led anywhere are looked at, which is
    /// too much for each of a thousand ports that have none.
    pub(super) fn has_local(&self, key: ServiceKey) -> bool {
        self.active.get(&key, 0).map_or(true, |it| it.local > 0)
    }

    pub(super) fn read_counters(&self, key: ServiceKey, port: &KernelPort) -> bool {
        if let Ok(values) = self.counters.get(&key, 0) {
            port.note_counters(&values);
        }
        self.read_flows(key, port)
    }

    fn read_flows(&self, key: ServiceKey, port: &KernelPort) -> bool {
        let Ok(flows) = self.active.get(&key, 0) else {
            return true;
        };
        port.note_flows(&flows);
        flows.active != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeps_are_told_how_old_each_kind_of_flow_may_grow() {
        let order = order(7);
        let second = 1_000_000_000;
        assert_eq!(
            (order.opening_ns, order.ended_ns),
            (60 * second, 30 * second)
        );
        assert_eq!((order.closing_s, order.idle_ns), (3600, 432_000 * second));
        let datagrams = (order.datagram_opening_ns, order.datagram_idle_ns);
        assert_eq!(datagrams, (30 * second, 180 * second));
        assert_eq!(order.pass, 7);
    }
}
