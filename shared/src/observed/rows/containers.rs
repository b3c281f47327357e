//! Rows of containers.

use crate::ids::{ContainerId, Generation, KernelId};
use crate::layout::{RawRow, RawSample};
use crate::observed::counters::{
    CpuCounters, DiskCounters, IoCounters, Measured, MemoryCounters, NetCounters, PidsCounters,
};
use crate::observed::rows::Source;
use crate::observed::table;
use crate::table::{BatchError, KeyedRow, state};

/// One container at one tick.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerSample {
    /// The row's key.
    pub container_id: ContainerId,
    /// Kernel it runs.
    pub kernel_id: KernelId,
    /// Pass this sample belongs to.
    pub tick: u64,
    /// When, CLOCK_MONOTONIC, ns.
    pub taken_monotonic_ns: u64,
    /// When, CLOCK_REALTIME, ns since 1970.
    pub taken_wall_ns: u64,
    /// CPU.
    pub cpu: Measured<CpuCounters>,
    /// Memory.
    pub memory: Measured<MemoryCounters>,
    /// Tasks.
    pub pids: Measured<PidsCounters>,
    /// Block devices.
    pub io: Measured<IoCounters>,
    /// Network, as the container sees it.
    pub net: Measured<NetCounters>,
    /// Disk space.
    pub disk: Measured<DiskCounters>,
}

impl ContainerSample {
    fn encode(&self) -> RawSample {
        let mut raw = RawSample {
            state: state::USED,
            container_id: self.container_id.0,
            kernel_id: self.kernel_id.0,
            tick: self.tick,
            taken_monotonic_ns: self.taken_monotonic_ns,
            taken_wall_ns: self.taken_wall_ns,
            reserved: 0,
            sources: [0; 8],
            ages_ms: [0; 8],
            present: [0; 8],
            cpu: [0; 8],
            memory: [0; 16],
            pids: [0; 8],
            io: [0; 8],
            net: [0; 8],
            disk: [0; 8],
        };
        macro_rules! group {
            ($index:literal, $field:ident) => {
                if self.$field.source != Source::Absent {
                    raw.sources[$index] = self.$field.source.code();
                    raw.ages_ms[$index] = self.$field.age_ms;
                    (raw.$field, raw.present[$index]) = self.$field.counters.pack();
                }
            };
        }
        group!(0, cpu);
        group!(1, memory);
        group!(2, pids);
        group!(3, io);
        group!(4, net);
        group!(5, disk);
        raw
    }
}

impl KeyedRow for ContainerSample {
    type Key = ContainerId;
    type Raw = RawSample;
    const TABLE: usize = table::CONTAINERS;

    fn key(&self) -> ContainerId {
        self.container_id
    }

    fn generation(&self) -> Generation {
        Generation(self.tick)
    }

    fn to_raw(&self) -> Result<RawSample, BatchError> {
        Ok(self.encode())
    }

    fn from_raw(raw: &RawSample, _: Generation) -> Option<Self> {
        macro_rules! group {
            ($index:literal, $field:ident, $counters:ident) => {
                match Source::from_code(raw.sources[$index])? {
                    Source::Absent => Measured::default(),
                    source => Measured {
                        source,
                        age_ms: raw.ages_ms[$index],
                        counters: $counters::unpack(&raw.$field, raw.present[$index]),
                    },
                }
            };
        }
        Some(Self {
            container_id: ContainerId(raw.container_id),
            kernel_id: KernelId(raw.kernel_id),
            tick: raw.tick,
            taken_monotonic_ns: raw.taken_monotonic_ns,
            taken_wall_ns: raw.taken_wall_ns,
            cpu: group!(0, cpu, CpuCounters),
            memory: group!(1, memory, MemoryCounters),
            pids: group!(2, pids, PidsCounters),
            io: group!(3, io, IoCounters),
            net: group!(4, net, NetCounters),
            disk: group!(5, disk, DiskCounters),
        })
    }
}

/// Samples of containers, kept as the region keeps them: half as long as they are to be worked with, so that
/// those of a thousand containers stay in the processor's caches until they are published.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Samples {
    bytes: Vec<u8>,
}

impl Samples {
    const ROW: usize = RawSample::INFO.size;

    /// None yet, with room for so many.
    #[must_use]
    pub fn with_capacity(samples: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(samples * Self::ROW),
        }
    }

    /// Adds one.
    pub fn push(&mut self, sample: &ContainerSample) {
        let start = self.bytes.len();
        self.bytes.resize(start + Self::ROW, 0);
        sample.encode().store(&mut self.bytes[start..]);
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / Self::ROW
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Leaves out those beyond the first `most`.
    pub fn truncate(&mut self, most: usize) {
        self.bytes.truncate(most.saturating_mul(Self::ROW));
    }

    /// The samples.
    pub fn iter(&self) -> impl Iterator<Item = ContainerSample> + '_ {
        self.raw().filter_map(|(_, bytes)| {
            ContainerSample::from_raw(&RawSample::load(bytes), Generation(0))
        })
    }

    /// Whose they are.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ContainerId> + Clone + '_ {
        self.raw().map(|(id, _)| id)
    }

    /// Each with whose it is.
    pub(in crate::observed) fn raw(
        &self,
    ) -> impl ExactSizeIterator<Item = (ContainerId, &[u8])> + Clone + '_ {
        const PLACE: usize = std::mem::offset_of!(RawSample, container_id);
        self.bytes.chunks_exact(Self::ROW).map(|bytes| {
            let mut id = [0; 32];
            id.copy_from_slice(&bytes[PLACE..PLACE + 32]);
            (ContainerId(id), bytes)
        })
    }
}

impl FromIterator<ContainerSample> for Samples {
    fn from_iter<T: IntoIterator<Item = ContainerSample>>(list: T) -> Self {
        let mut samples = Self::default();
        list.into_iter().for_each(|sample| samples.push(&sample));
        samples
    }
}
