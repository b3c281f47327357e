//! Counters of a container from version 1 hierarchies.
//!
//! In: the container's directory in each hierarchy. Out: counters, each present or absent by
//! itself. Sources: Documentation/admin-guide/cgroup-v1/{cpuacct,memory,pids,blkio-controller}.
//!
//! User and system time are counted by the clock tick and may run ahead of the exact usage by a
//! few ticks.
//!
//! Limits of block devices in this version: `blkio.throttle.io_service_bytes` counts what passes
//! the throttling layer. Buffered writes are charged to whom writes them back: the root's threads, unless a
//! task does itself by fsync(2). Some kernels count nothing at all unless a limit is set (then the file has
//! only a `Total 0` line); that is reported as absent, because it can't be told from "no I/O". So kernel
//! programs count instead where they can be loaded ([`super::cgroup_program`]).

use std::path::Path;
use std::sync::Arc;

use shared::observed::{CpuCounters, IoCounters, MemoryCounters, PidsCounters, UNLIMITED};

use super::file::{Budget, CachedFile, Failure, keyed, number};
use super::stacked_devices::{self, StackedDevices};

/// Limits at or above this are "no limit": the page counter's maximum, rounded to a page.
const NO_LIMIT: u64 = 0x7fff_ffff_ffff_0000;

/// A limit in bytes, or [`UNLIMITED`].
pub fn limit(bytes: u64) -> u64 {
    if bytes >= NO_LIMIT { UNLIMITED } else { bytes }
}

/// CPU files.
#[derive(Debug)]
pub struct Cpu {
    usage: CachedFile,
    user: CachedFile,
    system: CachedFile,
    quota: Option<CachedFile>,
}

impl Cpu {
    /// In the directories of `cpuacct` and, where there is one, `cpu`.
    pub fn new(accounting: &Path, quota: Option<&Path>, budget: &Arc<Budget>) -> Self {
        let file = |name: &str| CachedFile::new(accounting.join(name), budget);
        Self {
            usage: file("cpuacct.usage"),
            user: file("cpuacct.usage_user"),
            system: file("cpuacct.usage_sys"),
            quota: quota.map(|path| CachedFile::new(path.join("cpu.stat"), budget)),
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// The usage can't be read; the others are absent one by one.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<CpuCounters, Failure> {
        let mut counters = CpuCounters {
            usage_ns: number(self.usage.read(buffer)?),
            user_ns: self.user.read(buffer).ok().and_then(number),
            system_ns: self.system.read(buffer).ok().and_then(number),
            ..CpuCounters::default()
        };
        if let Some(Ok(text)) = self.quota.as_mut().map(|file| file.read(buffer)) {
            counters.periods = keyed(text, "nr_periods");
            counters.throttled_periods = keyed(text, "nr_throttled");
            counters.throttled_ns = keyed(text, "throttled_time");
        }
        Ok(counters)
    }
}

/// Memory files.
#[derive(Debug)]
pub struct Memory {
    usage: CachedFile,
    stat: CachedFile,
    peak: CachedFile,
    oom: CachedFile,
    failures: CachedFile,
    swap_failures: CachedFile,
    limit_with_swap: CachedFile,
}

impl Memory {
    /// In the directory of `memory`.
    pub fn new(directory: &Path, budget: &Arc<Budget>) -> Self {
        let file = |name: &str| CachedFile::new(directory.join(name), budget);
        Self {
            usage: file("memory.usage_in_bytes"),
            stat: file("memory.stat"),
            peak: file("memory.max_usage_in_bytes"),
            oom: file("memory.oom_control"),
            failures: file("memory.failcnt"),
            swap_failures: file("memory.memsw.failcnt"),
            limit_with_swap: file("memory.memsw.limit_in_bytes"),
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// The usage can't be read; the others are absent one by one.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<MemoryCounters, Failure> {
        let mut counters = MemoryCounters {
            current_bytes: number(self.usage.read(buffer)?),
            peak_bytes: self.peak.read(buffer).ok().and_then(number),
            oom_kill_events: self
                .oom
                .read(buffer)
                .ok()
                .and_then(|text| keyed(text, "oom_kill")),
            max_events: self.failures.read(buffer).ok().and_then(number),
            ..MemoryCounters::default()
        };
        // Where both limits are the same, it is the one with swap that is hit.
        if let Some(more) = self.swap_failures.read_if_offered(buffer).and_then(number) {
            counters.max_events = counters.max_events.map(|hits| hits.saturating_add(more));
        }
        counters.swap_limit_bytes = self
            .limit_with_swap
            .read_if_offered(buffer)
            .and_then(number)
            .map(limit);
        if let Ok(text) = self.stat.read(buffer) {
            // The limit in force, which is the least of this cgroup's and its parents'.
            counters.limit_bytes = keyed(text, "hierarchical_memory_limit").map(limit);
            counters.inactive_file_bytes = keyed(text, "total_inactive_file");
            counters.anon_bytes = keyed(text, "total_rss");
            counters.file_bytes = keyed(text, "total_cache");
            counters.shmem_bytes = keyed(text, "total_shmem");
            counters.swap_bytes = keyed(text, "total_swap");
        }
        Ok(counters)
    }
}

/// Task files.
#[derive(Debug)]
pub struct Pids {
    current: CachedFile,
    limit: CachedFile,
    events: CachedFile,
}

impl Pids {
    /// In the directory of `pids`; version 2 has the same files.
    pub fn new(directory: &Path, budget: &Arc<Budget>) -> Self {
        let file = |name: &str| CachedFile::new(directory.join(name), budget);
        Self {
            current: file("pids.current"),
            limit: file("pids.max"),
            events: file("pids.events"),
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// The count can't be read; the limit is absent by itself.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<PidsCounters, Failure> {
        Ok(PidsCounters {
            current: number(self.current.read(buffer)?),
            limit: self.limit.read(buffer).ok().and_then(number_or_max),
            limit_events: self
                .events
                .read_if_offered(buffer)
                .and_then(|text| keyed(text, "max")),
        })
    }
}

/// A limit: a number, or `max` for none.
pub fn number_or_max(text: &str) -> Option<u64> {
    if text.trim() == "max" {
        Some(UNLIMITED)
    } else {
        number(text)
    }
}

/// Block device files.
#[derive(Debug)]
pub struct Io {
    bytes: [CachedFile; 2],
    operations: [CachedFile; 2],
}

impl Io {
    /// In the directory of `blkio`.
    pub fn new(directory: &Path, budget: &Arc<Budget>) -> Self {
        let file = |name: &str| CachedFile::new(directory.join(name), budget);
        Self {
            // Where the bfq scheduler is in use, its own counters are complete.
            bytes: [
                file("blkio.bfq.io_service_bytes_recursive"),
                file("blkio.throttle.io_service_bytes_recursive"),
            ],
            operations: [
                file("blkio.bfq.io_serviced_recursive"),
                file("blkio.throttle.io_serviced_recursive"),
            ],
        }
    }

    /// Reads them; `None` when the kernel has counted for no device.
    ///
    /// # Errors
    /// None of the files of bytes can be read.
    pub fn read(
        &mut self,
        stacks: &StackedDevices,
        buffer: &mut Vec<u8>,
    ) -> Result<Option<IoCounters>, Failure> {
        let mut failure = Failure::Missing;
        for (bytes, operations) in self.bytes.iter_mut().zip(&mut self.operations) {
            if bytes.is_hopeless() {
                continue;
            }
            let moved = match bytes.read(buffer) {
                Ok(text) => by_direction(text, stacks),
                Err(err) => {
                    if err == Failure::Missing {
                        bytes.give_up();
                    }
                    failure = err;
                    continue;
                }
            };
            let Some((read_bytes, write_bytes)) = moved else {
                continue;
            };
            let served = operations.read(buffer).ok();
            let served = served.and_then(|text| by_direction(text, stacks));
            return Ok(Some(IoCounters {
                read_bytes: Some(read_bytes),
                write_bytes: Some(write_bytes),
                read_operations: served.map(|(reads, _)| reads),
                write_operations: served.map(|(_, writes)| writes),
                ..IoCounters::default()
            }));
        }
        if failure == Failure::Gone {
            Err(failure)
        } else {
            Ok(None)
        }
    }
}

/// Sums `8:0 Read 4096` lines over devices, those on others once; `None` when there is no device.
fn by_direction(text: &str, stacks: &StackedDevices) -> Option<(u64, u64)> {
    let mut any = false;
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (device, direction, count) = (words.next()?, words.next()?, words.next()?);
        let count = count.parse().ok().filter(|_| device.contains(':'))?;
        any = true;
        let counts = match direction {
            "Read" => [count, 0],
            "Write" => [0, count],
            _ => [0, 0],
        };
        Some((stacked_devices::device(device), counts))
    });
    let [read, written] = stacks.sum(lines);
    any.then_some((read, written))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_is_summed_over_devices_and_absent_without_one() {
        let text =
            "8:0 Read 10\n8:0 Write 5\n8:0 Total 15\n8:16 Read 1\n8:16 Discard 9\nTotal 16\n";
        let by_direction = |text: &str| by_direction(text, &StackedDevices::default());
        assert_eq!(by_direction(text), Some((11, 5)));
        assert_eq!(by_direction("Total 0\n"), None);
        assert_eq!(by_direction(""), None);
        assert_eq!(by_direction("8:0 Read x\n8:0\n"), None);
    }

    #[test]
    fn no_limit_is_said_as_no_limit() {
        assert_eq!(limit(9_223_372_036_854_771_712), UNLIMITED);
        assert_eq!(limit(1 << 40), 1 << 40);
        assert_eq!(number_or_max("max\n"), Some(UNLIMITED));
        assert_eq!(number_or_max("12\n"), Some(12));
        assert_eq!(number_or_max("x"), None);
    }

    #[test]
    fn a_directory_of_files_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let put =
            |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put("memory.usage_in_bytes", "1000\n");
        put(
            "memory.stat",
            "total_inactive_file 100\nhierarchical_memory_limit 9223372036854771712\n",
        );
        put(
            "memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
        );
        let budget = Budget::new(10);
        let mut memory = Memory::new(directory.path(), &budget);
        let counters = memory.read(&mut Vec::new()).unwrap();
        assert_eq!(counters.current_bytes, Some(1000));
        assert_eq!(counters.inactive_file_bytes, Some(100));
        assert_eq!(counters.limit_bytes, Some(UNLIMITED));
        assert_eq!(counters.oom_kill_events, Some(3));
        assert_eq!((counters.peak_bytes, counters.anon_bytes), (None, None));
    }
}
