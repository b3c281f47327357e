//! `bpf/cgroup_records.h` in Rust: what a walk over cgroups tells.
//!
//! The header says what the fields hold. All are 64-bit words, read one by one from memory that the
//! kernel's side writes.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Items of memory statistics: inactive file, anonymous, file, shared, swapped, kernel.
pub const STAT_ITEMS: usize = 6;

/// Controllers: cpuacct, cpu, memory, io, pids.
pub const CONTROLLERS: usize = 5;

/// Most CPUs whose parts a walk adds up.
pub const MOST_CPUS: usize = 1024;

/// Largest index into the kernel's array of memory statistics.
pub const MOST_STATS: u64 = 64;

/// Bits of [`CgroupRecord::filled`].
pub mod filled {
    /// CPU time by cpuacct of version 1.
    pub const CPUACCT: u64 = 1;
    /// CPU time of the unified tree.
    pub const CPU_BASE: u64 = 2;
    /// Throttling.
    pub const QUOTA: u64 = 4;
    /// Memory, but for its statistics.
    pub const MEMORY: u64 = 8;
    /// Statistics of memory.
    pub const MEMORY_STAT: u64 = 16;
    /// Tasks.
    pub const PIDS: u64 = 32;
    /// How often their limit was hit.
    pub const PIDS_EVENTS: u64 = 64;
    /// Block devices.
    pub const IO: u64 = 128;
    /// Loop devices are among those that the kernel has counted for.
    pub const LOOPS: u64 = 256;
}

macro_rules! record {
    ($( $field:ident, )*) => {
        /// `struct cgroup_record`.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[repr(C)]
        pub struct CgroupRecord {
            $( #[allow(missing_docs)] pub $field: u64, )*
            /// Pages per item of memory statistics.
            pub stat_pages: [u64; STAT_ITEMS],
        }

        impl CgroupRecord {
            /// Words of a record.
            pub const WORDS: usize = [$( stringify!($field), )*].len() + STAT_ITEMS;

            /// Reads record number `place`.
            pub fn read(words: &[AtomicU64], place: usize) -> Option<Self> {
                let start = place.checked_mul(Self::WORDS)?;
                let mut words = words.get(start..start.checked_add(Self::WORDS)?)?.iter();
                let mut next = || words.next().map_or(0, |word| word.load(Relaxed));
                Some(Self {
                    $( $field: next(), )*
                    stat_pages: std::array::from_fn(|_| next()),
                })
            }
        }
    };
}

record! {
    filled, alive,
    cpu_usage_ns, cpu_user_ns, cpu_system_ns,
    periods, throttled_periods, throttled_ns,
    memory_pages, memory_limit_pages, memory_least_limit_pages, memory_peak_pages, memory_failures,
    swap_pages, swap_limit_pages, swap_failures,
    oom_events, oom_kill_events, memory_max_events,
    pids, pids_limit, pids_limit_events,
    io_read_bytes, io_write_bytes, io_reads, io_writes,
    loops_read_bytes, loops_write_bytes, loops_reads, loops_writes,
}

const _: () = assert!(size_of::<CgroupRecord>() == 8 * CgroupRecord::WORDS);

/// Words of `struct cgroup_target`.
pub mod target {
    use super::CONTROLLERS;

    /// Address of each controller's state, 0 none.
    pub const STATES: usize = 0;
    /// Its serial number.
    pub const SERIALS: usize = STATES + CONTROLLERS;
    /// 1 when CPU time is that of the unified tree.
    pub const UNIFIED: usize = SERIALS + CONTROLLERS;
    /// CPU time per CPU: two addresses.
    pub const CPU: usize = UNIFIED + 1;
    /// Address of the statistics of memory.
    pub const STATISTICS: usize = CPU + 2;
    /// The reading program's own; 0 has it look up the counters of block devices.
    pub const IO_MARK: usize = STATISTICS + 1;
    /// 1 when the kernel's own counters of block devices are read.
    pub const IO_UNIFIED: usize = IO_MARK + 1;
    /// All of them.
    pub const WORDS: usize = IO_UNIFIED + 1;
}

/// Words of `struct cgroup_walk`.
pub mod walk {
    use super::{STAT_ITEMS, target};

    /// Targets to read.
    pub const COUNT: usize = 0;
    /// 1 when a cgroup of the unified hierarchy is to be found.
    pub const UNIFIED: usize = 1;
    /// 1 once one was found.
    pub const HAS_FOUND: usize = 2;
    /// What was found: a target.
    pub const FOUND: usize = 3;
    /// Where the items of memory statistics are.
    pub const STAT_INDEX: usize = FOUND + target::WORDS;
    /// The same as the kernel's enumerations number them.
    pub const ENUM_INDEX: usize = STAT_INDEX + STAT_ITEMS;
    /// Length of the array of all memory statistics.
    pub const STAT_LENGTH: usize = ENUM_INDEX + STAT_ITEMS;
    /// Length of the array of those kept per node.
    pub const NODE_STAT_LENGTH: usize = STAT_LENGTH + 1;
    /// Links to read, after three words of the program's own.
    pub const LINKS: usize = NODE_STAT_LENGTH + 4;
    /// 1 when what is read of links is to be compared.
    pub const LINKS_COMPARED: usize = LINKS + 1;
    /// All of them.
    pub const WORDS: usize = LINKS_COMPARED + 1;
}
