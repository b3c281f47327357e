//! The rows the dataplane writes.

use std::fmt;

use super::counters::{
    AcceleratorCounters, CpuCounters, DiskCounters, IoCounters, Measured, MemoryCounters,
    NetCounters, NodeCounters, PidsCounters, ProcessCounters, Source,
};
use super::table;
use crate::desired::{PortKey, Protocol};
use crate::ids::{ContainerId, Generation, KernelId, RegionId};
use crate::layout::{
    CORES, DEVICE, DISKS, RawAccelerator, RawApplied, RawNodeSample, RawPortStatus, RawProcess,
    RawRow, RawSample, USERS,
};
use crate::table::{BatchError, KeyedRow, load_text, state, store_text};

/// Declares an enum with its codes in the region.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident { $( $(#[$variant_doc:meta])* $variant:ident = $code:literal $text:literal, )* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $( $(#[$variant_doc])* $variant, )* }

        impl $name {
            pub(crate) const fn code(self) -> u8 {
                match self { $( Self::$variant => $code, )* }
            }
            pub(crate) const fn from_code(code: u8) -> Option<Self> {
                match code { $( $code => Some(Self::$variant), )* _ => None }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $( Self::$variant => $text, )* })
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
    /// Kinds of accelerators.
    AcceleratorKind {
        /// NVIDIA, CUDA.
        Cuda = 1 "cuda",
        /// AMD, ROCm.
        Rocm = 2 "rocm",
        /// Google TPU.
        Tpu = 3 "tpu",
        /// A plug-in's.
        Plugin = 4 "plugin",
        /// Made up, for tests.
        Mock = 255 "mock",
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
    pub in_kernel: InKernel,
}

/// The part of a port's counters that the kernel path's maps held when they were told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InKernel {
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
            in_kernel: InKernel::default(),
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
            kernel_sessions_total: self.in_kernel.sessions_total,
            kernel_sessions_refused: self.in_kernel.sessions_refused,
            kernel_bytes_in: self.in_kernel.bytes_in,
            kernel_bytes_out: self.in_kernel.bytes_out,
            kernel_packets_in: self.in_kernel.packets_in,
            kernel_packets_out: self.in_kernel.packets_out,
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
            in_kernel: InKernel {
                sessions_total: raw.kernel_sessions_total,
                sessions_refused: raw.kernel_sessions_refused,
                bytes_in: raw.kernel_bytes_in,
                bytes_out: raw.kernel_bytes_out,
                packets_in: raw.kernel_packets_in,
                packets_out: raw.kernel_packets_out,
            },
        })
    }
}

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
    pub(super) fn raw(&self) -> impl ExactSizeIterator<Item = (ContainerId, &[u8])> + Clone + '_ {
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

/// What names an accelerator row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AcceleratorKey {
    /// Kind.
    pub kind: AcceleratorKind,
    /// Number the driver gives it.
    pub index: u32,
}

/// Devices of a kind that others know their distance to: those with numbers below this.
pub const NEIGHBOURS: usize = 64;

/// How near one device is to another: the larger, the nearer. None is known by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Nearness(pub u8);

impl Nearness {
    /// The traffic crosses the connection between processors.
    pub const SYSTEM: Self = Self(1);
    /// It stays on the NUMA node, crossing host bridges.
    pub const NUMA_NODE: Self = Self(2);
    /// It crosses the host bridge.
    pub const HOST_BRIDGE: Self = Self(3);
    /// It crosses several PCIe switches.
    pub const SWITCHES: Self = Self(4);
    /// It crosses one PCIe switch.
    pub const SWITCH: Self = Self(5);
    /// They are on one board.
    pub const BOARD: Self = Self(6);
    /// One below a single link.
    const LINKS: u8 = 16;

    /// So many NVLinks lead there.
    pub fn links(count: u32) -> Self {
        Self(Self::LINKS.saturating_add(u8::try_from(count).unwrap_or(u8::MAX)))
    }

    /// Whether anything is known.
    pub fn is_known(self) -> bool {
        self.0 != 0
    }
}

/// As `nvidia-smi topo -m` writes it.
impl fmt::Display for Nearness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SYSTEM => f.write_str("SYS"),
            Self::NUMA_NODE => f.write_str("NODE"),
            Self::HOST_BRIDGE => f.write_str("PHB"),
            Self::SWITCHES => f.write_str("PXB"),
            Self::SWITCH => f.write_str("PIX"),
            Self::BOARD => f.write_str("PSB"),
            Self(links) if links > Self::LINKS => write!(f, "NV{}", links - Self::LINKS),
            Self(_) => f.write_str("unknown"),
        }
    }
}

/// What one container uses of an accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceleratorUse {
    /// The container.
    pub container_id: ContainerId,
    /// Device memory of its processes, bytes; `None` when the driver does not tell.
    pub memory_bytes: Option<u64>,
    /// Busy share of its processes, thousandths; `None` when the driver does not tell.
    pub utilisation_permille: Option<u32>,
}

/// What NVIDIA's driver calls a part of a device (a MIG instance).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigInstance {
    /// Id of the GPU instance, which has the memory.
    pub gpu: u32,
    /// Id of the compute instance in it, which has the processors.
    pub compute: u32,
}

/// One accelerator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcceleratorRow {
    /// The row's key.
    pub key: AcceleratorKey,
    /// Stable id (UUID), at most 80 bytes.
    pub id: String,
    /// Model name, at most 64 bytes.
    pub model: String,
    /// PCI address, at most 32 bytes; empty none.
    pub pci: String,
    /// NUMA node, if known.
    pub numa_node: Option<u16>,
    /// `false`: the driver reports a fault.
    pub healthy: bool,
    /// Number of the device it is a part of (a MIG instance); `None` for a whole device.
    pub part_of: Option<u32>,
    /// Whether it is divided into parts, which are then used instead of it.
    pub divided: bool,
    /// Name of the kind of part (`1g.5gb`), at most 32 bytes; empty for a whole device.
    pub profile: String,
    /// What the driver calls the part, if it tells.
    pub instance: Option<MigInstance>,
    /// Processing units, if known.
    pub units: Option<u32>,
    /// Last fault code of the driver (NVIDIA: XID).
    pub fault: Option<u32>,
    /// Containers whose processes use it; those beyond the capacity of a row are counted in
    /// `users_left_out`.
    pub users: Vec<AcceleratorUse>,
    /// Containers that use it and are not in `users`.
    pub users_left_out: u32,
    /// How near the devices of the same kind are, by their numbers.
    pub near: [Nearness; NEIGHBOURS],
    /// How old the numbers were at the tick, ms.
    pub age_ms: u32,
    /// Pass this row belongs to.
    pub tick: u64,
    /// The numbers.
    pub counters: AcceleratorCounters,
}

impl AcceleratorRow {
    /// A whole device that works, of which nothing else is told yet.
    pub fn new(kind: AcceleratorKind, index: u32, id: impl Into<String>) -> Self {
        Self {
            key: AcceleratorKey { kind, index },
            id: id.into(),
            model: String::new(),
            pci: String::new(),
            numa_node: None,
            healthy: true,
            part_of: None,
            divided: false,
            profile: String::new(),
            instance: None,
            units: None,
            fault: None,
            users: Vec::new(),
            users_left_out: 0,
            near: [Nearness::default(); NEIGHBOURS],
            age_ms: 0,
            tick: 0,
            counters: AcceleratorCounters::default(),
        }
    }
}

impl KeyedRow for AcceleratorRow {
    type Key = AcceleratorKey;
    type Raw = RawAccelerator;
    const TABLE: usize = table::ACCELERATORS;

    fn key(&self) -> AcceleratorKey {
        self.key
    }

    fn generation(&self) -> Generation {
        Generation(self.tick)
    }

    fn to_raw(&self) -> Result<RawAccelerator, BatchError> {
        let (counters, present) = self.counters.pack();
        let mut raw = RawAccelerator {
            state: state::USED,
            index: self.key.index,
            kind: self.key.kind.code(),
            present: u16::try_from(present).unwrap_or(u16::MAX),
            flags: u32::from(self.part_of.is_some()) | (u32::from(self.divided) << 1),
            whole_index: self.part_of.unwrap_or(self.key.index),
            units: self.units.unwrap_or(0),
            fault: self.fault.unwrap_or(0),
            healthy: u8::from(self.healthy),
            numa_node: self.numa_node.map_or(-1, i32::from),
            age_ms: self.age_ms,
            tick: self.tick,
            counters,
            near: self.near.map(|near| near.0),
            gpu_instance: self.instance.map_or(0, |ids| ids.gpu.saturating_add(1)),
            compute_instance: (self.instance).map_or(0, |ids| ids.compute.saturating_add(1)),
            ..RawAccelerator::default()
        };
        raw.id_length = store_text("id", &self.id, &mut raw.id)?;
        raw.model_length = store_text("model", &self.model, &mut raw.model)?;
        raw.pci_length = store_text("pci", &self.pci, &mut raw.pci)?;
        raw.profile_length = store_text("profile", &self.profile, &mut raw.profile)?;
        let listed = self.users.len().min(USERS);
        let beyond = u32::try_from(self.users.len() - listed).unwrap_or(u32::MAX);
        raw.user_count = u32::try_from(listed).unwrap_or(0);
        raw.users_left_out = self.users_left_out.saturating_add(beyond);
        for (user, place) in self
            .users
            .iter()
            .zip(raw.user_containers.as_chunks_mut().0.iter_mut())
        {
            *place = user.container_id.0;
        }
        for (place, user) in raw.user_memory.iter_mut().zip(&self.users) {
            *place = user.memory_bytes.unwrap_or(u64::MAX);
        }
        for (place, user) in raw.user_utilisation.iter_mut().zip(&self.users) {
            *place = user.utilisation_permille.unwrap_or(u32::MAX);
        }
        Ok(raw)
    }

    fn from_raw(raw: &RawAccelerator, _: Generation) -> Option<Self> {
        let listed = usize::try_from(raw.user_count).ok()?;
        if listed > USERS {
            return None;
        }
        let (containers, _) = raw.user_containers.as_chunks();
        let users = (containers.iter())
            .zip(&raw.user_memory)
            .zip(&raw.user_utilisation)
            .take(listed)
            .map(|((container, memory), utilisation)| AcceleratorUse {
                container_id: ContainerId(*container),
                memory_bytes: (*memory != u64::MAX).then_some(*memory),
                utilisation_permille: (*utilisation != u32::MAX).then_some(*utilisation),
            })
            .collect();
        Some(Self {
            key: AcceleratorKey {
                kind: AcceleratorKind::from_code(raw.kind)?,
                index: raw.index,
            },
            id: load_text(raw.id_length, &raw.id)?,
            model: load_text(raw.model_length, &raw.model)?,
            pci: load_text(raw.pci_length, &raw.pci)?,
            numa_node: u16::try_from(raw.numa_node).ok(),
            healthy: raw.healthy != 0,
            part_of: (raw.flags & 1 != 0).then_some(raw.whole_index),
            divided: raw.flags & 2 != 0,
            profile: load_text(raw.profile_length, &raw.profile)?,
            instance: (raw.gpu_instance.checked_sub(1))
                .zip(raw.compute_instance.checked_sub(1))
                .map(|(gpu, compute)| MigInstance { gpu, compute }),
            units: (raw.units != 0).then_some(raw.units),
            fault: (raw.fault != 0).then_some(raw.fault),
            users,
            users_left_out: raw.users_left_out,
            near: raw.near.map(Nearness),
            age_ms: raw.age_ms,
            tick: raw.tick,
            counters: AcceleratorCounters::unpack(&raw.counters, u32::from(raw.present)),
        })
    }
}

/// One disk of the node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskSpace {
    /// Path of the device; cut to 63 bytes when written.
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
            let device = cut(&disk.device, DEVICE);
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
