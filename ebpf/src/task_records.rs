//! `bpf/task_records.h` in Rust: what a walk over tasks tells.
//!
//! The header says what the fields hold. All are read as 64-bit words, one by one, from memory that
//! the kernel's side writes.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Hierarchies that tell which container a task is in.
pub mod hierarchy {
    /// The unified tree.
    pub const UNIFIED: u32 = 0;
    /// `pids` of version 1.
    pub const PIDS: u32 = 1;
    /// `cpuacct` of version 1.
    pub const CPUACCT: u32 = 2;
    /// `memory` of version 1.
    pub const MEMORY: u32 = 3;
}

/// Bits of [`TaskRecord::filled`].
pub mod filled {
    /// CPU times.
    pub const TIMES: u64 = 1;
    /// Resident memory.
    pub const RESIDENT: u64 = 2;
    /// Traffic of block devices.
    pub const IO: u64 = 4;
}

/// `struct task_record`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TaskRecord {
    /// Number of its container.
    pub container: u64,
    /// Groups that were read.
    pub filled: u64,
    /// Pid as the reader knows it.
    pub pid: u32,
    /// Pid as it knows itself.
    pub container_pid: u32,
    /// Its parent's pid as the reader knows it, 0 none.
    pub parent_pid: u32,
    /// Threads.
    pub threads: u32,
    /// Bits of the first thread's state.
    pub state: u32,
    /// Bits of its state once it has ended.
    pub exit_state: u32,
    /// When it began, since boot, ns.
    pub start_ns: u64,
    /// Time in user mode by ticks, ns.
    pub user_ns: u64,
    /// Time in kernel mode by ticks, ns.
    pub system_ns: u64,
    /// Both, as the scheduler has it, ns.
    pub runtime_ns: u64,
    /// Time in user mode as the kernel has told last, ns.
    pub told_user_ns: u64,
    /// Time in kernel mode as the kernel has told last, ns.
    pub told_system_ns: u64,
    /// Resident pages.
    pub resident_pages: u64,
    /// Bytes read from block devices.
    pub read_bytes: u64,
    /// Bytes written to block devices.
    pub write_bytes: u64,
    /// Name, ended by a zero byte.
    pub name: [u8; 16],
}

impl TaskRecord {
    /// Words of a record.
    pub const WORDS: usize = 16;

    /// Reads record number `place`.
    pub fn read(words: &[AtomicU64], place: usize) -> Option<Self> {
        let start = place.checked_mul(Self::WORDS)?;
        let mut words = words.get(start..start.checked_add(Self::WORDS)?)?.iter();
        let mut next = || words.next().map_or(0, |word| word.load(Relaxed));
        let mut record = Self {
            container: next(),
            filled: next(),
            ..Self::default()
        };
        (record.pid, record.container_pid) = halves(next());
        (record.parent_pid, record.threads) = halves(next());
        (record.state, record.exit_state) = halves(next());
        for field in [
            &mut record.start_ns,
            &mut record.user_ns,
            &mut record.system_ns,
            &mut record.runtime_ns,
            &mut record.told_user_ns,
            &mut record.told_system_ns,
            &mut record.resident_pages,
            &mut record.read_bytes,
            &mut record.write_bytes,
        ] {
            *field = next();
        }
        let (first, second) = record.name.split_at_mut(8);
        first.copy_from_slice(&next().to_ne_bytes());
        second.copy_from_slice(&next().to_ne_bytes());
        Some(record)
    }
}

const _: () = assert!(size_of::<TaskRecord>() == 8 * TaskRecord::WORDS);

/// The two fields that lie in one word.
fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    (
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
    )
}

/// Words of `struct task_walk`.
pub mod walk {
    /// Not 0: this process alone, wherever it is.
    pub const ONLY: usize = 0;
    /// Records filled since this was set to 0.
    pub const COUNT: usize = 1;
    /// Walks that came to their end.
    pub const FINISHED: usize = 2;
    /// All of them, one of the program's own included.
    pub const WORDS: usize = 4;
}

/// Words of `struct task_tally`.
pub mod tally {
    /// Processes of the container.
    pub const SEEN: usize = 0;
    /// All of them, one of the program's own included.
    pub const WORDS: usize = 2;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_field_by_field() {
        let pair = |low: u32, high: u32| {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&low.to_ne_bytes());
            bytes[4..].copy_from_slice(&high.to_ne_bytes());
            u64::from_ne_bytes(bytes)
        };
        let mut words = vec![0; TaskRecord::WORDS];
        words.extend([1, 2, pair(3, 4), pair(5, 6), pair(7, 8)]);
        words.extend(9..18);
        words.extend([*b"a name\0\0", [0; 8]].map(u64::from_ne_bytes));
        let words: Vec<AtomicU64> = words.into_iter().map(AtomicU64::new).collect();
        let record = TaskRecord::read(&words, 1).unwrap();
        assert_eq!((record.container, record.filled), (1, 2));
        assert_eq!((record.pid, record.container_pid), (3, 4));
        assert_eq!((record.parent_pid, record.threads), (5, 6));
        assert_eq!((record.state, record.exit_state), (7, 8));
        assert_eq!((record.start_ns, record.user_ns), (9, 10));
        assert_eq!((record.system_ns, record.runtime_ns), (11, 12));
        assert_eq!((record.told_user_ns, record.told_system_ns), (13, 14));
        assert_eq!(record.resident_pages, 15);
        assert_eq!((record.read_bytes, record.write_bytes), (16, 17));
        assert_eq!(record.name, *b"a name\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(TaskRecord::read(&words, 2), None);
    }
}
