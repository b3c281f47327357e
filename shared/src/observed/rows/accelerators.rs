//! Rows of accelerators.

use std::fmt;

use super::AcceleratorKind;
use crate::ids::{ContainerId, Generation};
use crate::layout::{RawAccelerator, USERS};
use crate::observed::counters::AcceleratorCounters;
use crate::observed::table;
use crate::table::{BatchError, KeyedRow, load_text, state, store_text};

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
pub struct Proximity(pub u8);

impl Proximity {
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
impl fmt::Display for Proximity {
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
    /// Share of the encoders, thousandths; `None` when the driver does not tell.
    pub encoder_permille: Option<u32>,
    /// Share of the decoders, thousandths; `None` when the driver does not tell.
    pub decoder_permille: Option<u32>,
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
    /// Version of its driver, at most 32 bytes; empty unknown.
    pub driver: String,
    /// Latest version of the runtime (CUDA) that the driver serves, at most 16 bytes; empty unknown.
    pub runtime: String,
    /// Minor number of its device node, or of the device it is a part of, if the driver tells.
    pub minor: Option<u32>,
    /// Processing units, if known.
    pub units: Option<u32>,
    /// Last fault code of the driver (NVIDIA: XID).
    pub fault: Option<u32>,
    /// Containers whose processes use it; those beyond the capacity of a row are counted in
    /// `users_left_out`.
    pub users: Vec<AcceleratorUse>,
    /// Containers that use it and are not in `users`.
    pub users_left_out: u32,
    /// Others may use it too: the driver lists no processes, did not at the last look, or lists some
    /// that are not to be found.
    pub users_unknown: bool,
    /// How near the devices of the same kind are, by their numbers.
    pub near: [Proximity; NEIGHBOURS],
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
            driver: String::new(),
            runtime: String::new(),
            minor: None,
            units: None,
            fault: None,
            users: Vec::new(),
            users_left_out: 0,
            users_unknown: false,
            near: [Proximity::default(); NEIGHBOURS],
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
            flags: u32::from(self.part_of.is_some())
                | (u32::from(self.divided) << 1)
                | (u32::from(self.users_unknown) << 2),
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
            minor: self.minor.map_or(0, |minor| minor.saturating_add(1)),
            compute_instance: (self.instance).map_or(0, |ids| ids.compute.saturating_add(1)),
            ..RawAccelerator::default()
        };
        raw.id_length = store_text("id", &self.id, &mut raw.id)?;
        raw.model_length = store_text("model", &self.model, &mut raw.model)?;
        raw.pci_length = store_text("pci", &self.pci, &mut raw.pci)?;
        raw.profile_length = store_text("profile", &self.profile, &mut raw.profile)?;
        raw.driver_length = store_text("driver", &self.driver, &mut raw.driver)?;
        raw.runtime_length = store_text("runtime", &self.runtime, &mut raw.runtime)?;
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
        for (place, user) in raw.user_encoder.iter_mut().zip(&self.users) {
            *place = user.encoder_permille.unwrap_or(u32::MAX);
        }
        for (place, user) in raw.user_decoder.iter_mut().zip(&self.users) {
            *place = user.decoder_permille.unwrap_or(u32::MAX);
        }
        Ok(raw)
    }

    fn from_raw(raw: &RawAccelerator, _: Generation) -> Option<Self> {
        let listed = usize::try_from(raw.user_count).ok()?;
        if listed > USERS {
            return None;
        }
        let (containers, _) = raw.user_containers.as_chunks();
        let share = |told: &u32| (*told != u32::MAX).then_some(*told);
        let users = (containers.iter())
            .zip(&raw.user_memory)
            .zip(&raw.user_utilisation)
            .zip(raw.user_encoder.iter().zip(&raw.user_decoder))
            .take(listed)
            .map(
                |(((container, memory), utilisation), (encoder, decoder))| AcceleratorUse {
                    container_id: ContainerId(*container),
                    memory_bytes: (*memory != u64::MAX).then_some(*memory),
                    utilisation_permille: share(utilisation),
                    encoder_permille: share(encoder),
                    decoder_permille: share(decoder),
                },
            )
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
            driver: load_text(raw.driver_length, &raw.driver)?,
            runtime: load_text(raw.runtime_length, &raw.runtime)?,
            minor: raw.minor.checked_sub(1),
            units: (raw.units != 0).then_some(raw.units),
            fault: (raw.fault != 0).then_some(raw.fault),
            users,
            users_left_out: raw.users_left_out,
            users_unknown: raw.flags & 4 != 0,
            near: raw.near.map(Proximity),
            age_ms: raw.age_ms,
            tick: raw.tick,
            counters: AcceleratorCounters::unpack(&raw.counters, u32::from(raw.present)),
        })
    }
}
