//! Rows whose contents tell which batch wrote them, and a watch that checks what a reader sees.

use std::path::Path;

use shared::desired::{
    ContainerRow, DesiredBatch, DesiredReader, NodeRow, PortKey, PortRow, Protocol,
};
use shared::ids::{ContainerId, Generation, KernelId, RegionId};
use shared::observed::{
    ContainerSample, CpuCounters, Measured, NetCounters, NodeSample, ObservedBatch, ObservedReader,
    PortState, PortStatus, ProcessCounters, ProcessSample, Processes, Source,
};
use shared::{ReadError, Sizes, Start};

/// Table sizes of the exercised regions.
pub const SIZES: Sizes = Sizes {
    ports: 24,
    containers: 12,
    accelerators: 1,
    processes: 64,
};
const PORTS: u16 = 20;
const CONTAINERS: u8 = 10;
const PROCESSES: u32 = 50;

/// Whether the writer before died inside a batch.
#[must_use]
pub fn repaired(start: Start) -> bool {
    matches!(start, Start::Continued { repaired } if repaired > 0)
}

fn text(number: u64) -> String {
    format!("{number:x}").repeat(3)
}

/// All rows of the desired region, stamped with `number`.
pub fn fill_desired(batch: &mut DesiredBatch, number: u64, repairs: u32) {
    let low = u32::try_from(number & 0xffff_ffff).unwrap_or(0);
    for host_port in 1..=PORTS {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port,
        };
        let address = std::net::Ipv4Addr::from(low).into();
        let mut row = PortRow::new(
            key,
            KernelId([5; 16]),
            ContainerId([6; 32]),
            address,
            host_port,
        );
        row.service = text(number);
        row.max_sessions = low;
        row.connect_timeout_ms = low;
        batch.put_port(row);
    }
    for byte in 0..CONTAINERS {
        batch.put_container(ContainerRow {
            container_id: ContainerId([byte; 32]),
            memory_limit_bytes: number,
            cgroup_path: text(number),
            scratch_path: text(number),
            ..ContainerRow::default()
        });
    }
    batch.set_node(NodeRow {
        sample_interval_ms: low,
        drain_ms: repairs,
        ..NodeRow::default()
    });
}

/// All rows of the observed region, stamped with `number`.
pub fn fill_observed(batch: &mut ObservedBatch, number: u64, repairs: u64) {
    for host_port in 1..=PORTS {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port,
        };
        let mut status = PortStatus::new(
            key,
            KernelId([5; 16]),
            RegionId([6; 16]),
            PortState::Serving,
        );
        status.tick = number;
        status.bytes_in = number;
        status.connect_failures = number;
        status.reason = text(number);
        batch.put_port(status);
    }
    for byte in 0..CONTAINERS {
        let cpu = CpuCounters {
            usage_ns: Some(number),
            ..CpuCounters::default()
        };
        let net = NetCounters {
            tx_drops: Some(number),
            ..NetCounters::default()
        };
        batch.put_container(ContainerSample {
            container_id: ContainerId([byte; 32]),
            tick: number,
            cpu: Measured::now(Source::File, cpu),
            net: Measured::now(Source::Netlink, net),
            ..ContainerSample::default()
        });
    }
    batch.set_node(NodeSample {
        tick: number,
        taken_wall_ns: repairs,
        ..NodeSample::default()
    });
    let process = |pid| ProcessSample {
        pid,
        start_ticks: number,
        name: format!("{:x}", number & 0xffff_ffff),
        counters: ProcessCounters {
            rss_bytes: Some(number),
            ..ProcessCounters::default()
        },
        ..ProcessSample::default()
    };
    batch.set_processes(Processes {
        tick: number,
        list: (0..PROCESSES).map(process).collect(),
        ..Processes::default()
    });
}

/// Something a reader must never see.
#[derive(Debug)]
pub struct Seen(pub String);

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! must {
    ($holds:expr, $($words:tt)*) => {
        if !$holds {
            return Err(Seen(format!($($words)*)));
        }
    };
}

#[derive(Debug)]
enum Reader {
    Desired(DesiredReader),
    Observed(ObservedReader),
}

/// Reads a region again and again and remembers what it may no longer see.
#[derive(Debug)]
pub struct Watch {
    reader: Reader,
    number: u64,
    generation: Generation,
    /// Snapshots checked.
    pub whole: u64,
    /// Attempts that gave up because the writer was faster.
    pub busy: u64,
    /// Lives of the writer that began with a repair, as the rows tell.
    pub repairs: u64,
}

impl Watch {
    /// A watch on the desired region in `directory`.
    #[must_use]
    pub fn desired(directory: &Path) -> Self {
        Self::of(Reader::Desired(DesiredReader::at(directory)))
    }

    /// A watch on the observed region in `directory`.
    #[must_use]
    pub fn observed(directory: &Path) -> Self {
        Self::of(Reader::Observed(ObservedReader::at(directory)))
    }

    fn of(reader: Reader) -> Self {
        Self {
            reader,
            number: 0,
            generation: Generation(0),
            whole: 0,
            busy: 0,
            repairs: 0,
        }
    }

    /// Looks once. The writer may be too fast for a copy (the last one stays good); anything else
    /// but a whole batch, not older than the last one seen, is an error.
    pub fn look(&mut self) -> Result<(), Seen> {
        let looked = match &mut self.reader {
            Reader::Desired(reader) => look_desired(reader),
            Reader::Observed(reader) => look_observed(reader),
        };
        match looked? {
            None => self.busy += 1,
            Some((number, generation, repairs)) => {
                must!(
                    number >= self.number,
                    "number {number} after {}",
                    self.number
                );
                must!(
                    generation >= self.generation,
                    "generation {generation} after {}",
                    self.generation
                );
                (self.number, self.generation) = (number, generation);
                self.repairs = repairs;
                self.whole += 1;
            }
        }
        Ok(())
    }

    /// The newest number seen.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}

type Looked = Result<Option<(u64, Generation, u64)>, Seen>;

fn unreadable(err: ReadError) -> Looked {
    match err {
        ReadError::Busy { .. } | ReadError::Missing { .. } => Ok(None),
        other => Err(Seen(format!("the region cannot be read: {other}"))),
    }
}

fn look_desired(reader: &mut DesiredReader) -> Looked {
    let snapshot = match reader.snapshot() {
        Ok(snapshot) => snapshot,
        Err(err) => return unreadable(err),
    };
    if snapshot.committed == Generation(0) {
        return Ok(Some((0, Generation(0), 0)));
    }
    must!(
        snapshot.invalid_rows == 0,
        "{} torn rows",
        snapshot.invalid_rows
    );
    must!(
        snapshot.ports.len() == usize::from(PORTS),
        "{} ports",
        snapshot.ports.len()
    );
    let rows = snapshot.containers.len();
    must!(rows == usize::from(CONTAINERS), "{rows} containers");
    let Some(node) = snapshot.node else {
        return Err(Seen("no node row".to_owned()));
    };
    let number = u64::from(node.sample_interval_ms);
    for row in &snapshot.ports {
        let same = u64::from(row.max_sessions) == number
            && u64::from(row.connect_timeout_ms) == number
            && row.service == text(number)
            && row.target == std::net::Ipv4Addr::from(node.sample_interval_ms)
            && row.generation == snapshot.committed;
        must!(same, "at number {number}: {row:?}");
    }
    for row in &snapshot.containers {
        let same = row.memory_limit_bytes == number
            && row.cgroup_path == text(number)
            && row.scratch_path == text(number)
            && row.generation == snapshot.committed;
        must!(same, "at number {number}: {row:?}");
    }
    Ok(Some((number, snapshot.committed, u64::from(node.drain_ms))))
}

fn look_observed(reader: &mut ObservedReader) -> Looked {
    let snapshot = match reader.snapshot() {
        Ok(snapshot) => snapshot,
        Err(err) => return unreadable(err),
    };
    if snapshot.committed == Generation(0) {
        return Ok(Some((0, Generation(0), 0)));
    }
    must!(
        snapshot.invalid_rows == 0,
        "{} torn rows",
        snapshot.invalid_rows
    );
    must!(
        snapshot.ports.len() == usize::from(PORTS),
        "{} ports",
        snapshot.ports.len()
    );
    let rows = snapshot.containers.len();
    must!(rows == usize::from(CONTAINERS), "{rows} containers");
    let Some(node) = &snapshot.node else {
        return Err(Seen("no node row".to_owned()));
    };
    let number = node.tick;
    for status in snapshot.ports.iter() {
        let same = status.tick == number
            && status.bytes_in == number
            && status.connect_failures == number
            && status.reason == text(number);
        must!(same, "at number {number}: {status:?}");
    }
    for sample in snapshot.containers.iter() {
        let same = sample.tick == number
            && sample.cpu.get().and_then(|cpu| cpu.usage_ns) == Some(number)
            && sample.net.get().and_then(|net| net.tx_drops) == Some(number);
        must!(same, "at number {number}: {sample:?}");
    }
    match reader.processes() {
        Ok(processes) => {
            must!(
                processes.invalid_rows == 0,
                "{} torn processes",
                processes.invalid_rows
            );
            must!(
                processes.list.len() == PROCESSES as usize,
                "{} processes",
                processes.list.len()
            );
            must!(
                processes.tick >= number,
                "processes of {} after {number}",
                processes.tick
            );
            for (pid, process) in (0..).zip(&processes.list) {
                let same = process.pid == pid
                    && process.start_ticks == processes.tick
                    && process.counters.rss_bytes == Some(processes.tick);
                must!(same, "at tick {}: {process:?}", processes.tick);
            }
        }
        Err(err) => {
            unreadable(err)?;
        }
    }
    Ok(Some((number, snapshot.committed, node.taken_wall_ns)))
}
