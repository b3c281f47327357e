//! The node's own numbers.
//!
//! In: /proc/stat, /proc/meminfo, files of /sys/class/net, the size of the scratch file system; the pass's
//! link counters only where those files are another network namespace's. Out: the counters of a node
//! sample. Invariant: the network counts each byte that crossed the node's edge once, or is absent (a node
//! that has never had an edge has 0): only interfaces with hardware behind them, not bridges, veths or
//! bonds over them, and all of those; it does not go back when one of them leaves, nor does one that comes
//! later bring along what it has carried before, unless this process starts again: then the greater counts, of
//! what was told and what the interfaces of now have carried, as they went on meanwhile.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::observed::NodeCounters;
use shared::procfs::{CpuTicks, meminfo_bytes, tick_ns};
use shared::{monotonic_ns, wall_ns};

use super::file::{Budget, CachedFile, keyed, pressure};
use crate::default_route;
use crate::sys::netlink::{LinkLookup, Links};

/// The node is not read more often than this: it costs as much as many containers do, on machines of
/// hundreds of processors milliseconds.
const INTERVAL: Duration = Duration::from_millis(500);
/// How often the list of physical interfaces is made anew.
const INTERFACES: Duration = Duration::from_secs(60);
/// How often kills for want of memory are counted: for this one number the kernel adds up a hundred
/// of each processor.
const OOM_KILLS: Duration = Duration::from_secs(5);

/// What was read, and when.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    /// The numbers.
    pub counters: NodeCounters,
    /// Per CPU: busy time since boot ([`CpuTicks::busy`]), ns.
    pub cores_busy_ns: Vec<u64>,
    /// When, CLOCK_MONOTONIC, ns.
    pub monotonic_ns: u64,
    /// When, CLOCK_REALTIME, ns since 1970.
    pub wall_ns: u64,
}

impl Reading {
    fn age(&self) -> Duration {
        Duration::from_nanos(monotonic_ns().saturating_sub(self.monotonic_ns))
    }
}

/// Reads the node.
#[derive(Debug)]
pub struct Node {
    last: Option<Reading>,
    /// By their numbers: what those that are off line had when they were last on line.
    cores_busy_ns: Vec<u64>,
    stat: CachedFile,
    meminfo: CachedFile,
    vmstat: CachedFile,
    oom_kills: Option<(Instant, Option<u64>)>,
    pressure: [CachedFile; 3],
    interfaces: Vec<Interface>,
    interfaces_at: Option<Instant>,
    /// There has never been an edge, so nothing has crossed it.
    secluded: bool,
    edge: Edge,
    /// Of /proc/self/fd, kept so that no path is walked.
    descriptors: Option<File>,
    tick_ns: u64,
    budget: Arc<Budget>,
}

/// What has crossed the node's edge, bytes received and sent.
#[derive(Debug, Default)]
struct Edge {
    /// In all, once it was read.
    sum: Option<[u64; 2]>,
    /// What an earlier life of this process had told.
    before: [u64; 2],
    /// By the numbers of interfaces, what they had counted when they were read last.
    last: Vec<(u32, [u64; 2])>,
}

impl Edge {
    /// Adds what interfaces have counted since the last time. Of one that is new only what comes is known to
    /// have crossed the edge. A counter that has gone back adds nothing and goes on from there, as a bond
    /// takes those below it (`bond_fold_stats`): some drivers forget all at a reset, others a part with each
    /// queue that goes, and nothing tells what has come since.
    fn crossed(&mut self, now: Vec<(u32, [u64; 2])>) -> [u64; 2] {
        let mut sum = self.sum.unwrap_or_default();
        for (index, counted) in &now {
            let known = self.last.iter().find(|(known, _)| known == index);
            let last = match known {
                Some((_, last)) => *last,
                None if self.sum.is_none() => [0; 2],
                None => *counted,
            };
            for (way, sum) in sum.iter_mut().enumerate() {
                *sum = sum.saturating_add(counted[way].saturating_sub(last[way]));
            }
        }
        if self.sum.is_none() {
            sum = [0, 1].map(|way| sum[way].max(self.before[way]));
        }
        self.last = now;
        *self.sum.insert(sum)
    }
}

/// An interface at the node's edge.
#[derive(Debug)]
struct Interface {
    index: u32,
    /// Bytes received and sent, read without the kernel's interface lock; none when the files are those of
    /// another network namespace.
    bytes: Option<[CachedFile; 2]>,
}

impl Interface {
    fn below(class: &Path, name: &str, number: u32, budget: &Arc<Budget>) -> Self {
        let directory = class.join(name);
        let own = number_of(class, name, "ifindex") == Some(number);
        let file = |file| CachedFile::new(directory.join("statistics").join(file), budget);
        Self {
            index: number,
            bytes: own.then(|| ["rx_bytes", "tx_bytes"].map(file)),
        }
    }

    /// Bytes received and sent.
    fn read(&mut self, links: Option<&Links>, buffer: &mut Vec<u8>) -> Option<(u64, u64)> {
        let Some([rx, tx]) = &mut self.bytes else {
            let link = links?.get(self.index)?;
            return Some((link.rx_bytes, link.tx_bytes));
        };
        let mut number = |file: &mut CachedFile| file.read(buffer).ok()?.trim().parse().ok();
        Some((number(rx)?, number(tx)?))
    }
}

impl Node {
    /// Nothing is read yet.
    pub fn new(budget: &Arc<Budget>) -> Self {
        Self::below(Path::new("/proc"), budget)
    }

    fn below(proc: &Path, budget: &Arc<Budget>) -> Self {
        let file = |path: PathBuf| CachedFile::new(path, budget);
        Self {
            last: None,
            cores_busy_ns: Vec::new(),
            stat: file(proc.join("stat")),
            meminfo: file(proc.join("meminfo")),
            vmstat: file(proc.join("vmstat")),
            oom_kills: None,
            pressure: ["cpu", "memory", "io"].map(|of| file(proc.join("pressure").join(of))),
            interfaces: Vec::new(),
            interfaces_at: None,
            secluded: false,
            edge: Edge::default(),
            descriptors: File::open("/proc/self/fd").ok(),
            budget: Arc::clone(budget),
            tick_ns: tick_ns(),
        }
    }

    /// CPU, memory and network, read now or not long ago. What can't be read is absent.
    pub fn read(&mut self, links: Option<&Links>, buffer: &mut Vec<u8>) -> &Reading {
        let last = self.last.take();
        let reading = match last.filter(|last| last.age() < INTERVAL) {
            Some(last) => last,
            None => self.read_now(links, buffer),
        };
        self.last.insert(reading)
    }

    /// The same, read now.
    pub fn read_now(&mut self, links: Option<&Links>, buffer: &mut Vec<u8>) -> Reading {
        let mut counters = NodeCounters::default();
        let mut cores_busy_ns = Vec::new();
        let (monotonic_ns, wall_ns) = (monotonic_ns(), wall_ns());
        if let Ok(text) = self.stat.read(buffer)
            && let Some((None, all)) = text.lines().next().and_then(CpuTicks::parse)
        {
            let ns = |ticks: u64| Some(ticks.saturating_mul(self.tick_ns));
            counters.cpu_total_ns = ns(all.total());
            counters.cpu_idle_ns = ns(all.idle());
            counters.cpu_user_ns = ns(all.user);
            counters.cpu_system_ns = ns(all.system);
            for line in text.lines().skip(1) {
                let Some((Some(core), ticks)) = CpuTicks::parse(line) else {
                    break;
                };
                if self.cores_busy_ns.len() <= core {
                    self.cores_busy_ns.resize(core + 1, 0);
                }
                self.cores_busy_ns[core] = ticks.busy().saturating_mul(self.tick_ns);
            }
            cores_busy_ns.clone_from(&self.cores_busy_ns);
        }
        counters.oom_kill_events = self.oom_kill_events(buffer);
        let [cpu, memory, io] = &mut self.pressure;
        if let Some(text) = cpu.read_if_offered(buffer) {
            [counters.cpu_pressure_some_ns, _] = pressure(text);
        }
        if let Some(text) = memory.read_if_offered(buffer) {
            [
                counters.memory_pressure_some_ns,
                counters.memory_pressure_full_ns,
            ] = pressure(text);
        }
        if let Some(text) = io.read_if_offered(buffer) {
            [counters.io_pressure_some_ns, counters.io_pressure_full_ns] = pressure(text);
        }
        if let Ok(text) = self.meminfo.read(buffer) {
            counters.memory_total_bytes = meminfo_bytes(text, "MemTotal:");
            counters.memory_available_bytes = meminfo_bytes(text, "MemAvailable:");
        }
        self.find_interfaces();
        if let Some((rx, tx)) = self.carried(links, buffer) {
            (counters.net_rx_bytes, counters.net_tx_bytes) = (Some(rx), Some(tx));
        }
        counters.descriptors_open = self.descriptors.as_ref().and_then(open_descriptors);
        Reading {
            counters,
            cores_busy_ns,
            monotonic_ns,
            wall_ns,
        }
    }

    /// Bytes received and sent at the edge. None without one of its interfaces: a sum without it would go back,
    /// and forth again when it can be read.
    fn carried(&mut self, links: Option<&Links>, buffer: &mut Vec<u8>) -> Option<(u64, u64)> {
        let mut now = Vec::with_capacity(self.interfaces.len());
        for interface in &mut self.interfaces {
            let (rx, tx) = interface.read(links, buffer)?;
            now.push((interface.index, [rx, tx]));
        }
        (self.secluded || !now.is_empty()).then(|| {
            let [rx, tx] = self.edge.crossed(now);
            (rx, tx)
        })
    }

    /// Has the network's counters go on from what an earlier life of this process had told.
    pub fn go_on_from(&mut self, told: &NodeCounters) {
        self.edge.before = [told.net_rx_bytes, told.net_tx_bytes].map(Option::unwrap_or_default);
    }

    /// Whether counters of links are needed to read all of this.
    pub fn needs_links(&mut self) -> bool {
        self.find_interfaces();
        self.interfaces.iter().any(|it| it.bytes.is_none())
    }

    fn oom_kill_events(&mut self, buffer: &mut Vec<u8>) -> Option<u64> {
        match self.oom_kills {
            Some((at, kills)) if at.elapsed() < OOM_KILLS => kills,
            _ => {
                let text = self.vmstat.read(buffer).ok();
                let kills = text.and_then(|text| keyed(text, "oom_kill"));
                self.oom_kills = Some((Instant::now(), kills));
                kills
            }
        }
    }

    fn find_interfaces(&mut self) {
        if self
            .interfaces_at
            .is_some_and(|at| at.elapsed() < INTERFACES)
        {
            return;
        }
        let first = self.interfaces_at.replace(Instant::now()).is_none();
        let class = Path::new("/sys/class/net");
        let Ok(lookup) = LinkLookup::open() else {
            return;
        };
        let mut found = physical_interfaces(class);
        // The files may be those of another network namespace.
        found.retain(|(index, name)| lookup.index(name) == Some(*index));
        if found.is_empty() {
            // In a network namespace of its own the node's edge is where the default routes lead.
            let routes = std::fs::read_to_string("/proc/self/net/route").unwrap_or_default();
            let routes6 = std::fs::read_to_string("/proc/self/net/ipv6_route").unwrap_or_default();
            let edge = edge(
                class,
                default_route::ipv4(&routes),
                default_route::ipv6(&routes6),
            );
            found = edge
                .into_iter()
                .flatten()
                .filter_map(|name| Some((lookup.index(name)?, name.to_owned())))
                .collect();
        }
        let interface =
            |(index, name): (u32, String)| Interface::below(class, &name, index, &self.budget);
        self.interfaces = found.into_iter().map(interface).collect();
        self.secluded = self.interfaces.is_empty() && (first || self.secluded);
    }
}

/// Interfaces with a device behind them, but for those whose bytes another one counts, too: the virtual
/// function below a synthetic interface (netvsc, net_failover). A bond has no device itself.
fn physical_interfaces(class: &Path) -> Vec<(u32, String)> {
    let Ok(entries) = std::fs::read_dir(class) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let path = entry.path();
            let physical = path.join("device").exists() && !path.join("master/device").exists();
            physical.then_some(())?;
            let name = entry.file_name().into_string().ok()?;
            Some((number_of(class, &name, "ifindex")?, name))
        })
        .collect()
}

/// The interfaces of the default routes of both families that carry different bytes: what one of them
/// carries in a tunnel crosses the other one.
fn edge<'a>(class: &Path, v4: Option<&'a str>, v6: Option<&'a str>) -> [Option<&'a str>; 2] {
    let (Some(v4), Some(v6)) = (v4, v6) else {
        return [v4, v6];
    };
    match [v4, v6].map(|name| is_tunnel(class, name)) {
        _ if v4 == v6 => [Some(v4), None],
        [true, false] => [None, Some(v6)],
        [false, true] => [Some(v4), None],
        _ => [Some(v4), Some(v6)],
    }
}

/// Whether an interface has no link layer of its own that reaches others. Tunnels that carry Ethernet
/// can't be told apart by that.
fn is_tunnel(class: &Path, name: &str) -> bool {
    /// linux/if_arp.h.
    const ARPHRD_PPP: u32 = 512;
    const ARPHRD_TUNNEL: u32 = 768;
    const ARPHRD_TUNNEL6: u32 = 769;
    const ARPHRD_SIT: u32 = 776;
    const ARPHRD_IPGRE: u32 = 778;
    const ARPHRD_IP6GRE: u32 = 823;
    const ARPHRD_NONE: u32 = 0xfffe;
    matches!(
        number_of(class, name, "type"),
        Some(
            ARPHRD_PPP
                | ARPHRD_TUNNEL
                | ARPHRD_TUNNEL6
                | ARPHRD_SIT
                | ARPHRD_IPGRE
                | ARPHRD_IP6GRE
                | ARPHRD_NONE
        )
    )
}

fn number_of(class: &Path, name: &str, attribute: &str) -> Option<u32> {
    let text = std::fs::read_to_string(class.join(name).join(attribute)).ok()?;
    text.trim().parse().ok()
}

/// Descriptors of this process: the size of the directory on kernels from 6.2 on, absent before.
fn open_descriptors(directory: &File) -> Option<u64> {
    let size = directory.metadata().ok()?.len();
    (size > 0).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netlink::LinkCounters;

    #[test]
    fn what_a_tunnel_carries_is_counted_once() {
        let class = tempfile::tempdir().unwrap();
        for (name, kind) in [("eth0", 1), ("eth1", 1), ("sit1", 776), ("wg0", 65534)] {
            let place = class.path().join(name);
            std::fs::create_dir(&place).unwrap();
            std::fs::write(place.join("type"), format!("{kind}\n")).unwrap();
        }
        let of = |v4: &'static str, v6: &'static str| -> Vec<&str> {
            let edge = edge(class.path(), Some(v4), Some(v6));
            edge.into_iter().flatten().collect()
        };
        assert_eq!(of("eth0", "eth0"), ["eth0"]);
        assert_eq!(of("eth0", "eth1"), ["eth0", "eth1"]);
        assert_eq!(of("eth0", "sit1"), ["eth0"]);
        assert_eq!(of("wg0", "eth1"), ["eth1"]);
        assert_eq!(of("wg0", "sit1"), ["wg0", "sit1"]);
        // What the only route leads by is the edge; of one that has just gone nothing is known.
        assert_eq!(edge(class.path(), None, Some("sit1")), [None, Some("sit1")]);
        assert_eq!(of("eth0", "gone"), ["eth0", "gone"]);
    }

    #[test]
    fn what_a_function_below_another_interface_carries_is_counted_once() {
        let class = tempfile::tempdir().unwrap();
        let link = |to: &str, name: &str| {
            std::os::unix::fs::symlink(to, class.path().join(name)).unwrap();
        };
        for (number, name) in ["bond0", "eno1", "enP1", "eth0"].into_iter().enumerate() {
            std::fs::create_dir(class.path().join(name)).unwrap();
            std::fs::write(class.path().join(name).join("ifindex"), number.to_string()).unwrap();
        }
        for name in ["eno1", "enP1", "eth0"] {
            std::fs::create_dir(class.path().join(name).join("device")).unwrap();
        }
        // A synthetic interface counts what its function carries, too; a bond has no device.
        link("../eth0", "enP1/master");
        link("../bond0", "eno1/master");
        let mut found = physical_interfaces(class.path());
        found.sort_unstable();
        assert_eq!(found, [(1, "eno1".to_owned()), (3, "eth0".to_owned())]);
    }

    #[test]
    fn a_processor_that_goes_off_line_changes_no_other_ones_place() {
        let proc = tempfile::tempdir().unwrap();
        let mut node = Node::below(proc.path(), &Budget::new(10));
        let mut cores = |text: &str| {
            std::fs::write(proc.path().join("stat"), text).unwrap();
            let reading = node.read_now(None, &mut Vec::new());
            let ticks = |ns: u64| ns / node.tick_ns;
            reading
                .cores_busy_ns
                .into_iter()
                .map(ticks)
                .collect::<Vec<u64>>()
        };
        // Niced work and interrupts are work too; waiting and stolen time are not.
        let line = |core: &str, ticks: u64| format!("cpu{core} {} 1 1 9 9 1 1 9\n", ticks - 4);
        let (all, rest) = (line(" ", 60), line("2", 30) + "intr 5\n");
        let both = line("0", 10) + &line("1", 20);
        assert_eq!(cores(&(all.clone() + &both + &rest)), [10, 20, 30]);
        assert_eq!(cores(&(all.clone() + &line("0", 11) + &rest)), [11, 20, 30]);
        assert_eq!(cores(&(all + &both + &rest)), [10, 20, 30]);
    }

    /// 2,048 CPUs, and the interrupt lines that such a machine may have.
    #[test]
    fn a_machine_of_thousands_of_cpus_is_read_whole() {
        use std::fmt::Write;
        const CPUS: u64 = 2048;
        let times = "123456789 1234 12345678 987654321 12345 0 123456 0 0 0";
        let mut text = format!("cpu  {times}\n");
        for cpu in 0..CPUS {
            writeln!(text, "cpu{cpu} {times}").unwrap();
        }
        text.push_str("intr 99999999999");
        text.push_str(&" 0".repeat(200_000));
        text.push_str("\nctxt 1\nbtime 1\n");
        assert!(text.len() > 512 << 10);
        let proc = tempfile::tempdir().unwrap();
        std::fs::write(proc.path().join("stat"), &text).unwrap();
        let mut node = Node::below(proc.path(), &Budget::new(10));
        let mut buffer = Vec::new();
        for _ in 0..2 {
            let reading = node.read_now(None, &mut buffer);
            assert_eq!(reading.cores_busy_ns.len() as u64, CPUS);
            let user = Some(123_456_789 * node.tick_ns);
            assert_eq!(reading.counters.cpu_user_ns, user);
        }
    }

    #[test]
    fn this_node_has_cpu_and_memory() {
        let mut node = Node::new(&Budget::new(10));
        let Reading {
            counters,
            cores_busy_ns: cores,
            ..
        } = node.read(None, &mut Vec::new()).clone();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        assert!(cores.len() >= cpus, "{cores:?}");
        let busy: u64 = cores.iter().sum();
        let part = counters.cpu_user_ns.unwrap() + counters.cpu_system_ns.unwrap();
        // Each CPU's part of a tick is left out.
        assert!(busy + 1_000_000_000 >= part, "{busy} of {part}");
        assert!(counters.cpu_total_ns > counters.cpu_idle_ns);
        assert!(counters.memory_total_bytes > counters.memory_available_bytes);
        // Its edge is asked for without links, unless the files are those of another namespace. One without
        // an edge tells that nothing has crossed it.
        let edge = node.secluded || !node.interfaces.is_empty() && !node.needs_links();
        assert_eq!(counters.net_rx_bytes.is_some(), edge);
        assert_eq!(counters.net_tx_bytes.is_some(), edge);
    }

    #[test]
    fn an_interface_is_read_by_its_files_or_where_they_are_others_by_its_link() {
        let class = tempfile::tempdir().unwrap();
        let directory = class.path().join("eth9/statistics");
        std::fs::create_dir_all(&directory).unwrap();
        for (file, text) in [
            ("../ifindex", "7\n"),
            ("rx_bytes", "12\n"),
            ("tx_bytes", "13\n"),
        ] {
            std::fs::write(directory.join(file), text).unwrap();
        }
        let links: Links = [(
            8,
            LinkCounters {
                rx_bytes: 80,
                tx_bytes: 81,
                ..LinkCounters::default()
            },
        )]
        .into_iter()
        .collect();
        let mut buffer = Vec::new();
        let mut read = |index, links| {
            let budget = Budget::new(10);
            Interface::below(class.path(), "eth9", index, &budget).read(links, &mut buffer)
        };
        assert_eq!(read(7, None), Some((12, 13)));
        assert_eq!(read(8, None), None);
        assert_eq!(read(8, Some(&links)), Some((80, 81)));
    }

    #[test]
    fn the_edge_is_not_counted_without_one_of_its_interfaces() {
        let class = tempfile::tempdir().unwrap();
        let budget = Budget::new(10);
        let mut node = Node::below(class.path(), &budget);
        let mut buffer = Vec::new();
        assert_eq!(node.carried(None, &mut buffer), None, "no interface");
        node.secluded = true;
        assert_eq!(node.carried(None, &mut buffer), Some((0, 0)), "never one");
        (node.secluded, node.edge) = (false, Edge::default());
        for (name, number) in [("eth8", 8), ("eth9", 9)] {
            let directory = class.path().join(name).join("statistics");
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(class.path().join(name).join("ifindex"), number.to_string()).unwrap();
            std::fs::write(directory.join("rx_bytes"), "12\n").unwrap();
            let interface = Interface::below(class.path(), name, number, &budget);
            node.interfaces.push(interface);
        }
        let sent = |name: &str| class.path().join(name).join("statistics/tx_bytes");
        std::fs::write(sent("eth8"), "13\n").unwrap();
        assert_eq!(node.carried(None, &mut buffer), None, "a half");
        std::fs::write(sent("eth9"), "14\n").unwrap();
        assert_eq!(node.carried(None, &mut buffer), Some((24, 27)));
    }

    #[test]
    fn the_edge_does_not_go_back_when_interfaces_leave_nor_ahead_when_they_come() {
        let mut edge = Edge::default();
        assert_eq!(edge.crossed(vec![(1, [10, 1]), (2, [500, 50])]), [510, 51]);
        assert_eq!(edge.crossed(vec![(1, [12, 2])]), [512, 52]);
        // It is back with all it has ever counted, and then goes on.
        assert_eq!(edge.crossed(vec![(1, [13, 2]), (2, [900, 90])]), [513, 52]);
        assert_eq!(edge.crossed(vec![(1, [13, 2]), (2, [907, 90])]), [520, 52]);
        // Some of its counters step back, then all do.
        assert_eq!(edge.crossed(vec![(1, [13, 2]), (2, [905, 92])]), [520, 54]);
        assert_eq!(edge.crossed(vec![(1, [13, 2]), (2, [3, 0])]), [520, 54]);
        assert_eq!(edge.crossed(vec![(1, [13, 2]), (2, [6, 1])]), [523, 55]);
        // The next life of this process: one of them is gone, or none.
        let next = |now| {
            let mut node = Node::new(&Budget::new(10));
            node.go_on_from(&NodeCounters {
                net_rx_bytes: Some(523),
                net_tx_bytes: Some(52),
                ..NodeCounters::default()
            });
            node.edge.crossed(now)
        };
        assert_eq!(next(vec![(1, [14, 2])]), [523, 52]);
        assert_eq!(next(vec![(1, [600, 60])]), [600, 60]);
    }

    #[test]
    fn the_node_is_read_when_it_is_due() {
        let mut node = Node::new(&Budget::new(10));
        let mut buffer = Vec::new();
        let first = node.read(None, &mut buffer).monotonic_ns;
        node.last.as_mut().unwrap().monotonic_ns = u64::MAX;
        assert_eq!(node.read(None, &mut buffer).monotonic_ns, u64::MAX);
        let interval = u64::try_from(INTERVAL.as_nanos()).unwrap();
        node.last.as_mut().unwrap().monotonic_ns = first - interval;
        assert!(node.read(None, &mut buffer).monotonic_ns > first);
    }

    #[test]
    fn kills_are_counted_when_they_are_due() {
        let mut node = Node::new(&Budget::new(10));
        let mut buffer = Vec::new();
        assert!(node.oom_kill_events(&mut buffer).is_some());
        node.oom_kills = Some((Instant::now(), Some(u64::MAX)));
        assert_eq!(node.oom_kill_events(&mut buffer), Some(u64::MAX));
        node.oom_kills = Instant::now()
            .checked_sub(OOM_KILLS)
            .map(|at| (at, Some(u64::MAX)));
        assert_ne!(node.oom_kill_events(&mut buffer), Some(u64::MAX));
    }
}
