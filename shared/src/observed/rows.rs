//! The rows the dataplane writes.

mod accelerators;
mod containers;

use std::borrow::Cow;
use std::fmt;

use super::counters::{NodeCounters, ProcessCounters};
use super::table;
use crate::desired::{PortKey, Protocol};
use crate::ids::{ContainerId, Generation, KernelId, RegionId};
use crate::layout::{CORES, DEVICE, DISKS, RawApplied, RawNodeSample, RawPortStatus, RawProcess};
use crate::table::{BatchError, KeyedRow, load_text, state, store_text};

pub use accelerators::{
    AcceleratorKey, AcceleratorRow, AcceleratorUse, MigInstance, NEIGHBOURS, Proximity,
};
pub use containers::{ContainerSample, Samples};

/// Declares an enum with its codes in the region and its names in words.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $( $(#[$variant_doc:meta])* $variant:ident = $code:literal $text:literal, )* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $( $(#[$variant_doc])* $variant, )* }

        impl $name {
            /// Its name in words.
            pub const fn name(self) -> &'static str {
                match self { $( Self::$variant => $text, )* }
            }
            pub(crate) const fn code(self) -> u8 {
                match self { $( Self::$variant => $code, )* }
            }
            pub(crate) const fn from_code(code: u8) -> Option<Self> {
                match code { $( $code => Some(Self::$variant), )* _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

codes! {
    /// What became of a port row.
    PortState {
        /// Seen, not serving yet.
        Pending = 0 "pending",
        /// Clients reach the container.
        Serving = 1 "serving",
        /// The container's link is gone; nothing is forwarded.
        Disabled = 2 "disabled",
        /// Removed; sessions may finish.
        Draining = 3 "draining",
        /// It cannot be served; the reason says why.
        Refused = 4 "refused",
        /// Removed, nothing is left of it.
        Removed = 5 "removed",
    }
}

codes! {
    /// How bytes get to the container.
    ForwardPath {
        /// They do not.
        None = 0 "none",
        /// Through the relay.
        Relay = 1 "relay",
        /// Through the kernel alone.
        KernelPath = 2 "kernel path",
        /// The container engine publishes the port.
        Engine = 3 "engine",
    }
}

codes! {
    /// Which relay engine serves a port.
    RelayEngine {
        /// None.
        None = 0 "none",
        /// read and write.
        Copy = 1 "copy",
        /// splice through pipes.
        Splice = 2 "splice",
        /// io_uring.
        Uring = 3 "uring",
    }
}

codes! {
    /// Where the numbers of a group were read.
    #[derive(Default)]
    Source {
        /// They were not read: there are none.
        #[default]
        Absent = 0 "absent",
        /// A file of the kernel's (cgroupfs, procfs, sysfs).
        File = 1 "file",
        /// A BPF program or map.
        Bpf = 2 "bpf",
        /// A netlink answer.
        Netlink = 3 "netlink",
        /// A walk through a directory tree.
        Walk = 5 "walk",
    }
}

codes! {
    /// Kinds of accelerators.
    AcceleratorKind {
        /// NVIDIA, CUDA.
        Cuda = 1 "cuda",
        /// AMD, ROCm.
        Rocm = 2 "rocm",
        /// Google TPU.
        Tpu = 3 "tpu",
    }
}

impl AcceleratorKind {
    /// Its bit in the node's counter of drivers that have told nothing.
    pub fn bit(self) -> u64 {
        match self {
            Self::Cuda => 1,
            Self::Rocm => 2,
            Self::Tpu => 4,
        }
    }
}

/// How far the dataplane has come in a desired region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Desired region it speaks of.
    pub region_id: RegionId,
    /// Life of that region's writer at the time.
    pub epoch: u64,
    /// Everything committed up to here has been looked at. What became of each port is in its status.
    pub generation: Generation,
}

impl Applied {
    pub(super) fn to_raw(self) -> RawApplied {
        RawApplied {
            state: state::USED,
            reserved: 0,
            region_id: self.region_id.0,
            generation: self.generation.0,
            epoch: self.epoch,
        }
    }

    pub(super) fn from_raw(raw: &RawApplied) -> Self {
        Self {
            region_id: RegionId(raw.region_id),
            epoch: raw.epoch,
            generation: Generation(raw.generation),
        }
    }
}

/// What became of a port row, and its counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortStatus {
    /// Port it is about.
    pub key: PortKey,
    /// Kernel of the row acknowledged.
    pub kernel_id: KernelId,
    /// Desired region acknowledged.
    pub region_id: RegionId,
    /// Generation of the port row acknowledged: this status is about that row or a newer one.
    pub acknowledged: Generation,
    /// State.
    pub state: PortState,
    /// How bytes get to the container.
    pub path: ForwardPath,
    /// Relay engine.
    pub engine: RelayEngine,
    /// Why it is not serving; cut to 119 bytes when written.
    pub reason: String,
    /// Tick of the counters.
    pub tick: u64,
    /// Sessions open now.
    pub sessions_active: u64,
    /// Sessions ever accepted.
    pub sessions_total: u64,
    /// Sessions refused by a limit or network list.
    pub sessions_refused: u64,
    /// Client to container, bytes.
    pub bytes_in: u64,
    /// Container to client, bytes.
    pub bytes_out: u64,
    /// Connections to the container that failed.
    pub connect_failures: u64,
    /// Client to container on the kernel path, packets.
    pub packets_in: u64,
    /// Container to client on the kernel path, packets.
    pub packets_out: u64,
    /// What of this is in the kernel path's maps, which count on when nobody reads them.
    pub in_kernel_path: KernelPathCounters,
}

/// The part of a port's counters that the kernel path's maps held when they were told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelPathCounters {
    /// Sessions.
    pub sessions_total: u64,
    /// Sessions refused.
    pub sessions_refused: u64,
    /// Client to container, bytes.
    pub bytes_in: u64,
    /// Container to client, bytes.
    pub bytes_out: u64,
    /// Client to container, packets.
    pub packets_in: u64,
    /// Container to client, packets.
    pub packets_out: u64,
}

impl PortStatus {
    /// A status without counters.
    #[must_use]
    pub fn new(key: PortKey, kernel_id: KernelId, region_id: RegionId, state: PortState) -> Self {
        Self {
            key,
            kernel_id,
            region_id,
            acknowledged: Generation(0),
            state,
            path: ForwardPath::None,
            engine: RelayEngine::None,
            reason: String::new(),
            tick: 0,
            sessions_active: 0,
            sessions_total: 0,
            sessions_refused: 0,
            bytes_in: 0,
            bytes_out: 0,
            connect_failures: 0,
            packets_in: 0,
            packets_out: 0,
            in_kernel_path: KernelPathCounters::default(),
        }
    }

    /// Whether this answers a port row of `region` written at `generation`.
    #[must_use]
    pub fn answers(&self, region: RegionId, generation: Generation) -> bool {
        self.region_id == region && self.acknowledged >= generation
    }
}

/// The longest start of a text that fits a field, cut between characters.
fn cut(text: &str, limit: usize) -> &str {
    let mut end = text.len().min(limit);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// A text that fits, and stays apart from others that begin like it.
fn shortened(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        // FNV-1a.
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    let kept = cut(text, limit.saturating_sub(9));
    Cow::Owned(format!("{kept}~{hash:08x}"))
}

impl KeyedRow for PortStatus {
    type Key = PortKey;
    type Raw = RawPortStatus;
    const TABLE: usize = table::PORTS;

    fn key(&self) -> PortKey {
        self.key
    }

    fn generation(&self) -> Generation {
        self.acknowledged
    }

    fn to_raw(&self) -> Result<RawPortStatus, BatchError> {
        let mut raw = RawPortStatus {
            state: state::USED,
            host_port: self.key.host_port,
            protocol: self.key.protocol.number(),
            status: self.state.code(),
            path: self.path.code(),
            relay_engine: self.engine.code(),
            kernel_id: self.kernel_id.0,
            region_id: self.region_id.0,
            acknowledged: self.acknowledged.0,
            tick: self.tick,
            sessions_active: self.sessions_active,
            sessions_total: self.sessions_total,
            sessions_refused: self.sessions_refused,
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            connect_failures: self.connect_failures,
            packets_in: self.packets_in,
            packets_out: self.packets_out,
            kernel_path_sessions_total: self.in_kernel_path.sessions_total,
            kernel_path_sessions_refused: self.in_kernel_path.sessions_refused,
            kernel_path_bytes_in: self.in_kernel_path.bytes_in,
            kernel_path_bytes_out: self.in_kernel_path.bytes_out,
            kernel_path_packets_in: self.in_kernel_path.packets_in,
            kernel_path_packets_out: self.in_kernel_path.packets_out,
            ..RawPortStatus::default()
        };
        let reason = cut(&self.reason, raw.reason.len());
        raw.reason_length = store_text("reason", reason, &mut raw.reason)?;
        Ok(raw)
    }

    fn from_raw(raw: &RawPortStatus, _: Generation) -> Option<Self> {
        Some(Self {
            key: PortKey {
                protocol: Protocol::from_number(raw.protocol)?,
                host_port: raw.host_port,
            },
            kernel_id: KernelId(raw.kernel_id),
            region_id: RegionId(raw.region_id),
            acknowledged: Generation(raw.acknowledged),
            state: PortState::from_code(raw.status)?,
            path: ForwardPath::from_code(raw.path)?,
            engine: RelayEngine::from_code(raw.relay_engine)?,
            reason: load_text(raw.reason_length, &raw.reason)?,
            tick: raw.tick,
            sessions_active: raw.sessions_active,
            sessions_total: raw.sessions_total,
            sessions_refused: raw.sessions_refused,
            bytes_in: raw.bytes_in,
            bytes_out: raw.bytes_out,
            connect_failures: raw.connect_failures,
            packets_in: raw.packets_in,
            packets_out: raw.packets_out,
            in_kernel_path: KernelPathCounters {
                sessions_total: raw.kernel_path_sessions_total,
                sessions_refused: raw.kernel_path_sessions_refused,
                bytes_in: raw.kernel_path_bytes_in,
                bytes_out: raw.kernel_path_bytes_out,
                packets_in: raw.kernel_path_packets_in,
                packets_out: raw.kernel_path_packets_out,
            },
        })
    }
}

/// One disk of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskSpace {
    /// Path of the device; when written, one of more than 63 bytes ends with a hash of the whole in the
    /// place of what is left out.
    pub device: String,
    /// Its size, bytes.
    pub total_bytes: u64,
    /// What of it is not available to ordinary users, bytes.
    pub used_bytes: u64,
}

/// The node at one tick.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeSample {
    /// Last finished pass.
    pub tick: u64,
    /// When, CLOCK_MONOTONIC, ns.
    pub taken_monotonic_ns: u64,
    /// When, CLOCK_REALTIME, ns since 1970.
    pub taken_wall_ns: u64,
    /// The numbers.
    pub counters: NodeCounters,
    /// Per CPU, in the order of `/proc/stat`: time in user and kernel mode, ns. Those beyond
    /// [`NodeSample::MOST_CORES`] are not written.
    pub cores_busy_ns: Vec<u64>,
    /// File systems on devices, each device once. Those beyond [`NodeSample::MOST_DISKS`] are not
    /// written.
    pub disks: Vec<DiskSpace>,
}

impl NodeSample {
    /// The most CPUs a row holds.
    pub const MOST_CORES: usize = CORES;
    /// The most disks a row holds.
    pub const MOST_DISKS: usize = DISKS;

    pub(super) fn to_raw(&self) -> RawNodeSample {
        let (counters, present) = self.counters.pack();
        let count = |found: usize, most: usize| u32::try_from(found.min(most)).unwrap_or(0);
        let mut raw = RawNodeSample {
            state: state::USED,
            present,
            tick: self.tick,
            taken_monotonic_ns: self.taken_monotonic_ns,
            taken_wall_ns: self.taken_wall_ns,
            counters,
            core_count: count(self.cores_busy_ns.len(), CORES),
            disk_count: count(self.disks.len(), DISKS),
            ..RawNodeSample::default()
        };
        for (into, ns) in raw.cores_busy_ns.iter_mut().zip(&self.cores_busy_ns) {
            *into = *ns;
        }
        let names = raw.disk_names.chunks_exact_mut(DEVICE);
        for (place, (disk, name)) in self.disks.iter().zip(names).enumerate() {
            let device = shortened(&disk.device, DEVICE);
            name[..device.len()].copy_from_slice(device.as_bytes());
            raw.disk_name_lengths[place] = u8::try_from(device.len()).unwrap_or(0);
            raw.disk_total_bytes[place] = disk.total_bytes;
            raw.disk_used_bytes[place] = disk.used_bytes;
        }
        raw
    }

    pub(super) fn from_raw(raw: &RawNodeSample) -> Self {
        let names = raw.disk_names.chunks_exact(DEVICE);
        let disks = names
            .zip(raw.disk_name_lengths)
            .zip(raw.disk_total_bytes.iter().zip(raw.disk_used_bytes))
            .take(raw.disk_count as usize)
            .filter_map(|((name, length), (total_bytes, used_bytes))| {
                Some(DiskSpace {
                    device: load_text(length, name)?,
                    total_bytes: *total_bytes,
                    used_bytes,
                })
            });
        Self {
            tick: raw.tick,
            taken_monotonic_ns: raw.taken_monotonic_ns,
            taken_wall_ns: raw.taken_wall_ns,
            counters: NodeCounters::unpack(&raw.counters, raw.present),
            cores_busy_ns: raw
                .cores_busy_ns
                .iter()
                .take(raw.core_count as usize)
                .copied()
                .collect(),
            disks: disks.collect(),
        }
    }
}

/// One process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProcessSample {
    /// Container it runs in.
    pub container_id: ContainerId,
    /// Pid on the host.
    pub pid: u32,
    /// Pid in the container, 0 unknown.
    pub container_pid: u32,
    /// Its parent's.
    pub parent_pid: u32,
    /// Threads.
    pub threads: u32,
    /// State letter of `/proc/<pid>/stat`.
    pub state: u8,
    /// Name (comm); cut to 16 bytes when written, and not always UTF-8 in the kernel: replaced where not.
    pub name: String,
    /// Start time of `/proc/<pid>/stat`, clock ticks since boot.
    pub start_ticks: u64,
    /// Where all this was read.
    pub source: Source,
    /// The numbers.
    pub counters: ProcessCounters,
}

impl ProcessSample {
    pub(super) fn to_raw(&self) -> RawProcess {
        let (counters, present) = self.counters.pack();
        let mut raw = RawProcess {
            container_id: self.container_id.0,
            pid: self.pid,
            container_pid: self.container_pid,
            parent_pid: self.parent_pid,
            threads: self.threads,
            state: self.state,
            // Seven counters: the upper half is empty.
            present: u16::try_from(present).unwrap_or(u16::MAX),
            start_ticks: self.start_ticks,
            source: self.source.code(),
            counters,
            ..RawProcess::default()
        };
        let name = cut(&self.name, raw.name.len());
        raw.name[..name.len()].copy_from_slice(name.as_bytes());
        raw.name_length = u8::try_from(name.len()).unwrap_or(0);
        raw
    }

    pub(super) fn from_raw(raw: &RawProcess) -> Option<Self> {
        Some(Self {
            container_id: ContainerId(raw.container_id),
            pid: raw.pid,
            container_pid: raw.container_pid,
            parent_pid: raw.parent_pid,
            threads: raw.threads,
            state: raw.state,
            name: load_text(raw.name_length, &raw.name)?,
            start_ticks: raw.start_ticks,
            source: Source::from_code(raw.source)?,
            counters: ProcessCounters::unpack(&raw.counters, u32::from(raw.present)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_whose_long_names_begin_alike_stay_apart() {
        let disk = |tail: &str| DiskSpace {
            device: format!("/dev/mapper/{}-{tail}", "v".repeat(60)),
            total_bytes: 2,
            used_bytes: 1,
        };
        let node = NodeSample {
            disks: vec![disk("a"), disk("b")],
            ..NodeSample::default()
        };
        let names = NodeSample::from_raw(&node.to_raw()).disks;
        let names: Vec<String> = names.into_iter().map(|disk| disk.device).collect();
        assert!(names[0] != names[1], "{names:?}");
        for name in names {
            assert!(name.starts_with("/dev/mapper/vvv"), "{name}");
            assert_eq!(name.len(), DEVICE);
        }
    }
}
