//! Counters of a container from the unified hierarchy.
//!
//! In: the container's directory. Out: counters, each present or absent by itself. Source:
//! Documentation/admin-guide/cgroup-v2.rst.

use std::path::Path;
use std::sync::Arc;

use shared::observed::{CpuCounters, IoCounters, MemoryCounters};

use super::cgroup_v1::number_or_max;
use super::file::{Budget, CachedFile, Failure, keyed, number, pressure};
use super::stacked_devices::{self, StackedDevices};

/// `cpu.stat`.
#[derive(Debug)]
pub struct Cpu {
    stat: CachedFile,
    pressure: CachedFile,
}

fn from_us(us: u64) -> u64 {
    us.saturating_mul(1000)
}

impl Cpu {
    /// In the container's directory.
    pub fn new(directory: &Path, budget: &Arc<Budget>) -> Self {
        Self {
            stat: CachedFile::new(directory.join("cpu.stat"), budget),
            pressure: CachedFile::new(directory.join("cpu.pressure"), budget),
        }
    }

    /// Reads it.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<CpuCounters, Failure> {
        let text = self.stat.read(buffer)?;
        let mut counters = CpuCounters {
            usage_ns: keyed(text, "usage_usec").map(from_us),
            user_ns: keyed(text, "user_usec").map(from_us),
            system_ns: keyed(text, "system_usec").map(from_us),
            periods: keyed(text, "nr_periods"),
            throttled_periods: keyed(text, "nr_throttled"),
            throttled_ns: keyed(text, "throttled_usec").map(from_us),
            pressure_some_ns: None,
        };
        self.add_pressure(&mut counters, buffer);
        Ok(counters)
    }

    /// Reads the pressure alone: the kernel adds it up when its file is read, and not before.
    pub fn add_pressure(&mut self, counters: &mut CpuCounters, buffer: &mut Vec<u8>) {
        if let Some(text) = self.pressure.read_if_offered(buffer) {
            [counters.pressure_some_ns, _] = pressure(text);
        }
    }
}

/// Memory files.
#[derive(Debug)]
pub struct Memory {
    current: CachedFile,
    limit: CachedFile,
    stat: CachedFile,
    events: CachedFile,
    peak: CachedFile,
    swap: CachedFile,
    swap_limit: CachedFile,
    pressure: CachedFile,
}

impl Memory {
    /// In the container's directory.
    pub fn new(directory: &Path, budget: &Arc<Budget>) -> Self {
        let file = |name: &str| CachedFile::new(directory.join(name), budget);
        Self {
            current: file("memory.current"),
            limit: file("memory.max"),
            stat: file("memory.stat"),
            events: file("memory.events"),
            peak: file("memory.peak"),
            swap: file("memory.swap.current"),
            swap_limit: file("memory.swap.max"),
            pressure: file("memory.pressure"),
        }
    }

    /// Reads them.
    ///
    /// # Errors
    /// The usage can't be read; the others are absent one by one.
    pub fn read(&mut self, buffer: &mut Vec<u8>) -> Result<MemoryCounters, Failure> {
        let mut counters = MemoryCounters {
            current_bytes: number(self.current.read(buffer)?),
            limit_bytes: self.limit.read(buffer).ok().and_then(number_or_max),
            peak_bytes: self.peak.read_if_offered(buffer).and_then(number),
            swap_bytes: self.swap.read_if_offered(buffer).and_then(number),
            swap_limit_bytes: self
                .swap_limit
                .read_if_offered(buffer)
                .and_then(number_or_max),
            ..MemoryCounters::default()
        };
        if let Ok(text) = self.stat.read(buffer) {
            counters.inactive_file_bytes = keyed(text, "inactive_file");
            counters.anon_bytes = keyed(text, "anon");
            counters.file_bytes = keyed(text, "file");
            counters.shmem_bytes = keyed(text, "shmem");
            counters.kernel_bytes = keyed(text, "kernel");
        }
        if let Ok(text) = self.events.read(buffer) {
            counters.oom_events = keyed(text, "oom");
            counters.oom_kill_events = keyed(text, "oom_kill");
            counters.max_events = keyed(text, "max");
        }
        self.add_pressure(&mut counters, buffer);
        Ok(counters)
    }

    /// Reads the pressure alone.
    pub fn add_pressure(&mut self, counters: &mut MemoryCounters, buffer: &mut Vec<u8>) {
        if let Some(text) = self.pressure.read_if_offered(buffer) {
            [counters.pressure_some_ns, counters.pressure_full_ns] = pressure(text);
        }
    }
}

/// `io.stat`.
#[derive(Debug)]
pub struct Io {
    stat: CachedFile,
    pressure: CachedFile,
}

impl Io {
    /// In the container's directory.
    pub fn new(directory: &Path, budget: &Arc<Budget>) -> Self {
        Self {
            stat: CachedFile::new(directory.join("io.stat"), budget),
            pressure: CachedFile::new(directory.join("io.pressure"), budget),
        }
    }

    /// Reads it. An empty file means that there was no I/O: here the kernel is complete.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn read(
        &mut self,
        stacks: &StackedDevices,
        buffer: &mut Vec<u8>,
    ) -> Result<IoCounters, Failure> {
        let mut counters = sum(self.stat.read(buffer)?, stacks);
        self.add_pressure(&mut counters, buffer);
        Ok(counters)
    }

    /// Reads the pressure alone.
    pub fn add_pressure(&mut self, counters: &mut IoCounters, buffer: &mut Vec<u8>) {
        if let Some(text) = self.pressure.read_if_offered(buffer) {
            [counters.pressure_some_ns, counters.pressure_full_ns] = pressure(text);
        }
    }
}

/// Reads `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn line(text: &str) -> (Option<stacked_devices::Device>, [u64; 4]) {
    let mut words = text.split_whitespace();
    let mut device = words.next().and_then(stacked_devices::device);
    let mut counts = [0; 4];
    for word in words {
        // Of one without counters early releases of Linux 5.15 write nothing more, no line's end either.
        device = stacked_devices::device(word).or(device);
        let Some((key, value)) = word.split_once('=') else {
            continue;
        };
        let place = match key {
            "rbytes" => 0,
            "wbytes" => 1,
            "rios" => 2,
            "wios" => 3,
            _ => continue,
        };
        if let (Some(count), Ok(value)) = (counts.get_mut(place), value.parse()) {
            *count = value;
        }
    }
    (device, counts)
}

/// Sums lines over devices, those on others once. A path of NVMe has no number there, and what was done by
/// it is the disk's as well.
fn sum(text: &str, stacks: &StackedDevices) -> IoCounters {
    let lines = text.lines().map(line);
    let sums = stacks.sum(lines.filter(|(device, _)| device.is_some()));
    let [read_bytes, write_bytes, read_operations, write_operations] = sums.map(Some);
    IoCounters {
        read_bytes,
        write_bytes,
        read_operations,
        write_operations,
        ..IoCounters::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::observed::UNLIMITED;

    #[test]
    fn io_is_summed_over_devices() {
        let text =
            "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=5 dios=1\n8:16 rbytes=1 wbytes=x\n";
        let counters = sum(text, &StackedDevices::default());
        assert_eq!(counters.read_bytes, Some(11));
        assert_eq!(counters.write_bytes, Some(20));
        assert_eq!(counters.write_operations, Some(2));
        assert_eq!(sum("", &StackedDevices::default()).read_bytes, Some(0));
        // A disk that is reached by a path of NVMe, which has no number, and counts operations alone.
        let text = "259:1 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n\
                    (unknown) rbytes=0 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n";
        assert_eq!(
            sum(text, &StackedDevices::default()).read_operations,
            Some(1)
        );
    }

    /// The original raised on the text `max` and lost the memory of all containers.
    #[test]
    fn an_unlimited_container_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let put =
            |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        put("memory.current", "5\n");
        put("memory.max", "max\n");
        put(
            "memory.events",
            "low 0\nhigh 0\nmax 4\noom 2\noom_kill 1\noom_group_kill 0\n",
        );
        let mut memory = Memory::new(directory.path(), &Budget::new(10));
        let counters = memory.read(&mut Vec::new()).unwrap();
        assert_eq!(counters.limit_bytes, Some(UNLIMITED));
        assert_eq!(
            (
                counters.max_events,
                counters.oom_events,
                counters.oom_kill_events
            ),
            (Some(4), Some(2), Some(1))
        );
    }
}
