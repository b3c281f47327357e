//! The node's own numbers.
//!
//! In: /proc/stat, /proc/meminfo, the pass's link counters, the size of the scratch file system.
//! Out: the counters of a node sample. Invariant: the network counts each byte that crossed the
//! node's edge once: only interfaces with hardware behind them, not bridges, veths or bonds over
//! them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::observed::NodeCounters;

use super::file::{Budget, CachedFile, keyed};
use crate::sys::netlink::LinkCounters;

/// How often the list of physical interfaces is made anew.
const INTERFACES: Duration = Duration::from_secs(60);

/// Reads the node.
#[derive(Debug)]
pub struct Node {
    stat: CachedFile,
    meminfo: CachedFile,
    interfaces: Vec<u32>,
    interfaces_at: Option<Instant>,
    tick_ns: u64,
}

impl Node {
    /// Nothing is read yet.
    pub fn new(budget: &Arc<Budget>) -> Self {
        Self {
            stat: CachedFile::new(PathBuf::from("/proc/stat"), budget),
            meminfo: CachedFile::new(PathBuf::from("/proc/meminfo"), budget),
            interfaces: Vec::new(),
            interfaces_at: None,
            tick_ns: 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1),
        }
    }

    /// Reads CPU, memory and network. What can't be read is absent.
    pub fn read(
        &mut self,
        links: Option<&HashMap<u32, LinkCounters>>,
        buffer: &mut Vec<u8>,
    ) -> NodeCounters {
        let mut counters = NodeCounters::default();
        if let Ok(text) = self.stat.read(buffer)
            && let Some((total, idle)) = cpu_ticks(text)
        {
            counters.cpu_total_ns = Some(total.saturating_mul(self.tick_ns));
            counters.cpu_idle_ns = Some(idle.saturating_mul(self.tick_ns));
        }
        if let Ok(text) = self.meminfo.read(buffer) {
            let bytes = |key: &str| meminfo_kib(text, key).map(|kib| kib.saturating_mul(1024));
            counters.memory_total_bytes = bytes("MemTotal:");
            counters.memory_available_bytes = bytes("MemAvailable:");
        }
        if let Some(links) = links {
            self.find_interfaces();
            let mut found = self
                .interfaces
                .iter()
                .filter_map(|index| links.get(index))
                .peekable();
            if found.peek().is_some() {
                let (rx, tx) = found.fold((0, 0), |(rx, tx), link| {
                    (rx + link.rx_bytes, tx + link.tx_bytes)
                });
                counters.net_rx_bytes = Some(rx);
                counters.net_tx_bytes = Some(tx);
            }
        }
        counters.descriptors_open = open_descriptors();
        counters
    }

    fn find_interfaces(&mut self) {
        if self
            .interfaces_at
            .is_some_and(|at| at.elapsed() < INTERFACES)
        {
            return;
        }
        self.interfaces_at = Some(Instant::now());
        self.interfaces = physical_interfaces(Path::new("/sys/class/net"));
        if self.interfaces.is_empty() {
            // In a network namespace of its own the node's edge is where the default route leads.
            let routes = std::fs::read_to_string("/proc/self/net/route").unwrap_or_default();
            self.interfaces = default_route(&routes)
                .and_then(|name| {
                    let path = Path::new("/sys/class/net").join(name).join("ifindex");
                    std::fs::read_to_string(path).ok()?.trim().parse().ok()
                })
                .into_iter()
                .collect();
        }
    }
}

/// Total and idle ticks of the first line of /proc/stat (proc(5)): user, nice, system, idle,
/// iowait, irq, softirq, steal. Guest time is inside user time.
fn cpu_ticks(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let mut ticks = [0_u64; 8];
    let mut words = line.split_whitespace();
    for tick in &mut ticks {
        *tick = words.next()?.parse().ok()?;
    }
    let [_, _, _, idle, iowait, ..] = ticks;
    Some((ticks.iter().sum(), idle + iowait))
}

fn meminfo_kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    keyed(line.trim_end().strip_suffix("kB")?, key)
}

/// Interfaces with a device behind them.
fn physical_interfaces(class: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(class) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            path.join("device").exists().then_some(())?;
            std::fs::read_to_string(path.join("ifindex"))
                .ok()?
                .trim()
                .parse()
                .ok()
        })
        .collect()
}

/// The interface of the default route in /proc/net/route.
fn default_route(text: &str) -> Option<&str> {
    text.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace();
        let (name, destination) = (words.next()?, words.next()?);
        let mask = words.nth(5)?;
        (destination == "00000000" && mask == "00000000").then_some(name)
    })
}

/// Descriptors of this process: the size of the directory on kernels from 6.2 on, absent before.
fn open_descriptors() -> Option<u64> {
    let size = std::fs::metadata("/proc/self/fd").ok()?.len();
    (size > 0).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_total_time() {
        let text = "cpu  10 1 20 300 4 0 5 6 7 0\ncpu0 1 1 1 1\n";
        assert_eq!(cpu_ticks(text), Some((346, 304)));
        assert_eq!(cpu_ticks("cpu  1 2\n"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn memory_is_read_with_its_unit() {
        let text = "MemTotal:       24684096 kB\nMemAvailable:   20000000 kB\n";
        assert_eq!(meminfo_kib(text, "MemTotal:"), Some(24_684_096));
        assert_eq!(meminfo_kib(text, "MemFree:"), None);
    }

    #[test]
    fn the_default_route_has_an_interface() {
        let text = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n\
                    br0\t000011AC\t0\t1\t0\t0\t0\t0000FFFF\t0\n\
                    eth9\t00000000\t0100A8C0\t3\t0\t0\t0\t00000000\t0\n";
        assert_eq!(default_route(text), Some("eth9"));
        assert_eq!(default_route(""), None);
    }

    #[test]
    fn this_node_has_cpu_and_memory() {
        let mut node = Node::new(&Budget::new(10));
        let counters = node.read(None, &mut Vec::new());
        assert!(counters.cpu_total_ns > counters.cpu_idle_ns);
        assert!(counters.memory_total_bytes > counters.memory_available_bytes);
        assert_eq!(counters.net_rx_bytes, None);
    }
}
