//! What the kernel program's record and the list of links say, as counters of a container.
//!
//! In: a record, links. Out: groups of counters. Invariant: what was not read is absent.

use std::sync::Arc;

use ebpf::cgroup_records::{CgroupRecord, filled};
use shared::desired::ContainerRow;
use shared::observed::{
    ContainerSample, CpuCounters, IoCounters, MemoryCounters, NetCounters, PidsCounters, UNLIMITED,
};

use super::cgroup_program::bytes;
use super::cgroup_v1;
use super::stacked_devices::StackedDevices;
use crate::sys::netlink::{LinkCounters, Links};

/// How the unified tree's CPU time is split: the kernel scales what it has sampled to the exact sum,
/// and lets neither part run backwards (kernel/sched/cputime.c, cputime_adjust).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct CpuSplit {
    user: u64,
    system: u64,
}

impl CpuSplit {
    /// Goes on from what was told of a container before.
    pub(super) fn after(told: &CpuCounters) -> Self {
        Self {
            user: told.user_ns.unwrap_or(0),
            system: told.system_ns.unwrap_or(0),
        }
    }

    pub(super) fn adjust(&mut self, usage: u64, user: u64, system: u64) -> (u64, u64) {
        // One cgroup's time never runs backwards: this is another one, of a container that was
        // started again.
        if usage < self.user.saturating_add(self.system) {
            *self = Self::default();
        }
        let scaled = match (user, system) {
            (_, 0) => 0,
            (0, _) => usage,
            _ => {
                let sum = u128::from(user) + u128::from(system);
                let scaled = u128::from(system) * u128::from(usage) / sum;
                u64::try_from(scaled).unwrap_or(usage)
            }
        };
        let mut system = scaled.max(self.system);
        let mut user = usage.saturating_sub(system);
        if user < self.user {
            user = self.user;
            system = usage - user;
        }
        (self.user, self.system) = (user, system);
        (user, system)
    }
}

pub(super) fn cpu_counters(record: &CgroupRecord, split: &mut CpuSplit) -> Option<CpuCounters> {
    let (usage, (user, system)) = if record.filled & filled::CPUACCT != 0 {
        let split = (record.cpu_user_ns, record.cpu_system_ns);
        (record.cpu_usage_ns, split)
    } else if record.filled & filled::CPU_BASE != 0 {
        // As `cpu.stat` tells it, so that it does not go back when that is read instead.
        let usage = record.cpu_usage_ns / 1000 * 1000;
        let split = split.adjust(usage, record.cpu_user_ns, record.cpu_system_ns);
        (usage, split)
    } else {
        return None;
    };
    let quota = Some(record).filter(|record| record.filled & filled::QUOTA != 0);
    Some(CpuCounters {
        usage_ns: Some(usage),
        user_ns: Some(user),
        system_ns: Some(system),
        periods: quota.map(|record| record.periods),
        throttled_periods: quota.map(|record| record.throttled_periods),
        throttled_ns: quota.map(|record| record.throttled_ns),
        pressure_some_ns: None,
    })
}

pub(super) fn memory_counters(
    record: &CgroupRecord,
    unified: bool,
    counts_swap: bool,
) -> MemoryCounters {
    let [inactive_file, anon, file, shmem, swap, kernel] =
        record.stat_pages.map(|pages| Some(bytes(pages)));
    let limit = |pages| Some(cgroup_v1::limit(bytes(pages)));
    let swap_limit = limit(record.swap_limit_pages).filter(|_| counts_swap);
    let both = MemoryCounters {
        current_bytes: Some(bytes(record.memory_pages)),
        inactive_file_bytes: inactive_file,
        anon_bytes: anon,
        file_bytes: file,
        shmem_bytes: shmem,
        peak_bytes: Some(bytes(record.memory_peak_pages)),
        oom_kill_events: Some(record.oom_kill_events),
        swap_limit_bytes: swap_limit,
        ..MemoryCounters::default()
    };
    if unified {
        MemoryCounters {
            limit_bytes: limit(record.memory_limit_pages),
            swap_bytes: Some(bytes(record.swap_pages)).filter(|_| counts_swap),
            oom_events: Some(record.oom_events),
            max_events: Some(record.memory_max_events),
            kernel_bytes: kernel,
            ..both
        }
    } else {
        let swap_failures = if counts_swap { record.swap_failures } else { 0 };
        MemoryCounters {
            limit_bytes: limit(record.memory_least_limit_pages),
            // Not accounted is not compared either.
            swap_bytes: swap.filter(|_| counts_swap),
            max_events: Some(record.memory_failures.saturating_add(swap_failures)),
            ..both
        }
    }
}

/// The kernel's "no limit" of tasks is one more than the most there may be (kernel/cgroup/pids.c).
const NO_PIDS_LIMIT: u64 = 4 * 1024 * 1024 + 1;

/// Counted by the kernel, or since the program was loaded, on top of what an earlier life of this process had
/// counted. With `loops_on_disks` the disks may have counted what loop devices have handed on: the greater counts.
pub(super) fn io_counters(
    record: &CgroupRecord,
    before: Option<&IoCounters>,
    loops_on_disks: bool,
) -> IoCounters {
    let before = before.copied().unwrap_or_default();
    let sum = |others: u64, loops: u64, before: Option<u64>| {
        let now = match loops_on_disks {
            true => others.max(loops),
            false => others.saturating_add(loops),
        };
        Some(now.saturating_add(before.unwrap_or(0)))
    };
    IoCounters {
        read_bytes: sum(
            record.io_read_bytes,
            record.loops_read_bytes,
            before.read_bytes,
        ),
        write_bytes: sum(
            record.io_write_bytes,
            record.loops_write_bytes,
            before.write_bytes,
        ),
        read_operations: sum(record.io_reads, record.loops_reads, before.read_operations),
        write_operations: sum(
            record.io_writes,
            record.loops_writes,
            before.write_operations,
        ),
        ..IoCounters::default()
    }
}

/// By what I/O is added up.
#[derive(Debug, Clone)]
pub(super) enum IoWay {
    /// Records of the kernel's program.
    Records {
        /// Loop devices lie on disks, so what is done on them counts there.
        loops_on_disks: bool,
    },
    /// Files, with these stacks of devices.
    Files(Arc<StackedDevices>),
}

impl IoWay {
    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Records {
                    loops_on_disks: one,
                },
                Self::Records {
                    loops_on_disks: two,
                },
            ) => one == two,
            (Self::Files(one), Self::Files(two)) => Arc::ptr_eq(one, two) || one == two,
            _ => false,
        }
    }
}

/// The same as told, on and on, however it is added up: that changes for all containers as devices that lie on
/// others come and go, and when the program or the files can't be read.
#[derive(Debug, Clone, Default)]
pub(super) struct IoSums {
    steady: Steady<4>,
    /// How they were added up last.
    way: Option<IoWay>,
}

impl IoSums {
    /// Makes of what was counted this way what is told. When it was counted another way until now, what was `counted_by`
    /// that one is told first, as far as it can be known.
    pub(super) fn tell(
        &mut self,
        way: &IoWay,
        counted: &mut IoCounters,
        counted_by: impl FnOnce(&IoWay) -> Option<IoCounters>,
    ) {
        if let Some(last) = self.way.replace(way.clone())
            && !last.is(way)
        {
            if let Some(mut counted) = counted_by(&last) {
                self.steady.tell(of_io(&mut counted));
            }
            self.steady.go_on(of_io(counted));
        }
        self.steady.tell(of_io(counted));
    }
}

pub(super) fn pids_counters(record: &CgroupRecord) -> PidsCounters {
    let limit = record.pids_limit;
    PidsCounters {
        current: Some(record.pids),
        limit: Some(if limit >= NO_PIDS_LIMIT {
            UNLIMITED
        } else {
            limit
        }),
        limit_events: (record.filled & filled::PIDS_EVENTS != 0)
            .then_some(record.pids_limit_events),
    }
}

/// A container on the host's network has no counters of its own, and never the host's.
pub(super) fn network_of(row: &ContainerRow, links: &Links) -> Option<NetCounters> {
    if row.host_network {
        return None;
    }
    network(&row.link_indexes, links, &mut 0)
}

/// The container's view of its network: what the host's end sent, it received, and what the kernel path
/// put into its own end past that. One whose link can't be found has no counters.
pub(super) fn network(indexes: &[u32], links: &Links, place: &mut usize) -> Option<NetCounters> {
    if indexes.is_empty() {
        return None;
    }
    let mut sum = LinkCounters::default();
    for index in indexes {
        let link = links.get_at(*index, place)?;
        sum += *link;
    }
    Some(NetCounters {
        rx_bytes: Some(sum.tx_bytes + sum.delivered_bytes),
        rx_packets: Some(sum.tx_packets + sum.delivered_packets),
        rx_errors: Some(sum.tx_errors),
        rx_drops: Some(sum.tx_dropped),
        tx_bytes: Some(sum.rx_bytes),
        tx_packets: Some(sum.rx_packets),
        tx_errors: Some(sum.rx_errors),
        tx_drops: Some(sum.rx_dropped),
    })
}

/// Adds what links have counted that have no end on this host.
pub(super) fn add_inner(net: &mut NetCounters, inner: &LinkCounters) {
    for (sum, count) in [
        (&mut net.rx_bytes, inner.rx_bytes),
        (&mut net.rx_packets, inner.rx_packets),
        (&mut net.rx_errors, inner.rx_errors),
        (&mut net.rx_drops, inner.rx_dropped),
        (&mut net.tx_bytes, inner.tx_bytes),
        (&mut net.tx_packets, inner.tx_packets),
        (&mut net.tx_errors, inner.tx_errors),
        (&mut net.tx_drops, inner.tx_dropped),
    ] {
        *sum = sum.map(|sum| sum.saturating_add(count));
    }
}

/// Adds bytes received and sent past all links.
pub(super) fn add_carried(net: &mut NetCounters, [received, sent]: [u64; 2]) {
    for (sum, bytes) in [(&mut net.rx_bytes, received), (&mut net.tx_bytes, sent)] {
        *sum = sum.map(|sum| sum.saturating_add(bytes));
    }
}

/// Sums over what comes and goes (links, devices), which don't go back: what has gone stays in them. What the
/// others have counted between the last time and then is missing, so that no sum goes ahead either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Steady<const N: usize> {
    told: [u64; N],
    /// What is told beyond what is counted. Of most containers nothing ever goes.
    beyond: Option<Box<[i64; N]>>,
}

impl<const N: usize> Default for Steady<N> {
    fn default() -> Self {
        Self::after([None; N])
    }
}

impl<const N: usize> Steady<N> {
    /// Goes on from what was told before.
    pub(super) fn after(told: [Option<u64>; N]) -> Self {
        let told = told.map(Option::unwrap_or_default);
        Self { told, beyond: None }
    }

    /// What is counted another way from now on goes on from what was told.
    pub(super) fn go_on(&mut self, counted: [&mut Option<u64>; N]) {
        for (place, counted) in counted.into_iter().enumerate() {
            if let Some(counted) = *counted {
                self.go_on_at(place, counted);
            }
        }
    }

    fn go_on_at(&mut self, place: usize, counted: u64) {
        let beyond = self.told[place].wrapping_sub(counted).cast_signed();
        if beyond != 0 || self.beyond.is_some() {
            self.beyond.get_or_insert_with(|| Box::new([0; N]))[place] = beyond;
        }
    }

    /// Makes of what is counted now what is told. What is absent stays so.
    pub(super) fn tell(&mut self, counted: [&mut Option<u64>; N]) {
        for (place, counted) in counted.into_iter().enumerate() {
            let Some(counted) = counted else {
                continue;
            };
            let beyond = self.beyond.as_ref().map_or(0, |beyond| beyond[place]);
            let sum = counted.saturating_add_signed(beyond);
            if sum < self.told[place] {
                self.go_on_at(place, *counted);
            }
            self.told[place] = sum.max(self.told[place]);
            *counted = self.told[place];
        }
    }
}

/// What does not go back of a network.
pub(super) fn of_net(net: &mut NetCounters) -> [&mut Option<u64>; 8] {
    [
        &mut net.rx_bytes,
        &mut net.rx_packets,
        &mut net.rx_errors,
        &mut net.rx_drops,
        &mut net.tx_bytes,
        &mut net.tx_packets,
        &mut net.tx_errors,
        &mut net.tx_drops,
    ]
}

/// The same of block devices.
pub(super) fn of_io(io: &mut IoCounters) -> [&mut Option<u64>; 4] {
    [
        &mut io.read_bytes,
        &mut io.write_bytes,
        &mut io.read_operations,
        &mut io.write_operations,
    ]
}

/// What a container's counters go on from.
#[derive(Debug, Clone, Default)]
pub(super) struct Before {
    pub(super) split: CpuSplit,
    pub(super) net: Steady<8>,
    pub(super) io: IoSums,
}

impl Before {
    /// Of a container that was told of like this.
    pub(super) fn of(sample: &ContainerSample) -> Self {
        let (mut net, mut io) = (sample.net.counters, sample.io.counters);
        Self {
            split: CpuSplit::after(&sample.cpu.counters),
            net: Steady::after(of_net(&mut net).map(|count| *count)),
            io: IoSums {
                steady: Steady::after(of_io(&mut io).map(|count| *count)),
                way: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(rx_bytes: u64, tx_bytes: u64) -> LinkCounters {
        LinkCounters {
            rx_bytes,
            tx_bytes,
            ..LinkCounters::default()
        }
    }

    fn links<const N: usize>(list: [(u32, LinkCounters); N]) -> Links {
        list.into_iter().collect()
    }

    fn row(links: &[u32]) -> ContainerRow {
        ContainerRow {
            link_indexes: links.to_vec(),
            ..ContainerRow::default()
        }
    }

    #[test]
    fn directions_are_swapped_and_links_summed() {
        let links = links([(3, link(10, 20)), (4, link(1, 2)), (5, link(99, 99))]);
        let net = network_of(&row(&[3, 4]), &links).unwrap();
        assert_eq!((net.rx_bytes, net.tx_bytes), (Some(22), Some(11)));
    }

    #[test]
    fn what_has_gone_from_a_sum_stays_in_it() {
        let mut steady = Steady::<2>::default();
        let mut told = |first, second| {
            let mut counted = (first, second);
            steady.tell([&mut counted.0, &mut counted.1]);
            counted
        };
        assert_eq!(told(Some(100), None), (Some(100), None));
        // A link or a device is gone; what is left goes on from there.
        assert_eq!(told(Some(30), Some(5)), (Some(100), Some(5)));
        assert_eq!(told(Some(37), Some(6)), (Some(107), Some(6)));
        assert_eq!(told(None, Some(6)), (None, Some(6)));
        assert_eq!(told(Some(1), Some(6)), (Some(107), Some(6)));
        assert_eq!(told(Some(2), Some(9)), (Some(108), Some(9)));
    }

    #[test]
    fn loop_devices_that_come_and_go_elsewhere_add_nothing() {
        let record = |io_read_bytes, loops_read_bytes| CgroupRecord {
            io_read_bytes,
            loops_read_bytes,
            ..CgroupRecord::default()
        };
        let mut sums = IoSums::default();
        let mut told = |others, loops, loops_on_disks| {
            let record = record(others, loops);
            let mut counted = io_counters(&record, None, loops_on_disks);
            let way = IoWay::Records { loops_on_disks };
            sums.tell(&way, &mut counted, |last| match last {
                IoWay::Records { loops_on_disks } => {
                    Some(io_counters(&record, None, *loops_on_disks))
                }
                IoWay::Files(_) => None,
            });
            counted.read_bytes
        };
        assert_eq!(told(100, 30, false), Some(130));
        for _ in 0..2 {
            assert_eq!(told(100, 30, true), Some(130));
            assert_eq!(told(100, 30, false), Some(130));
        }
        // What was done meanwhile counts as it did until then.
        assert_eq!(told(110, 32, true), Some(142));
        assert_eq!(told(111, 40, true), Some(143));
        assert_eq!(told(112, 41, false), Some(144));
        assert_eq!(told(112, 42, false), Some(145));
        // One that went is forgotten by the kernel's program.
        assert_eq!(told(0, 0, false), Some(145));
        assert_eq!(told(1, 1, false), Some(147));
    }

    #[test]
    fn io_that_is_added_up_another_way_from_now_on_does_not_jump() {
        let read = |bytes| IoCounters {
            read_bytes: Some(bytes),
            ..IoCounters::default()
        };
        let mut sums = IoSums::default();
        let mut told = |way: &IoWay, bytes, as_before: Option<u64>| {
            let mut counted = read(bytes);
            sums.tell(way, &mut counted, |_| as_before.map(read));
            counted.read_bytes
        };
        let stacked = IoWay::Files(Arc::new(StackedDevices::default()));
        let records = IoWay::Records {
            loops_on_disks: false,
        };
        assert_eq!(told(&stacked, 100, None), Some(100));
        for _ in 0..2 {
            // The last loop device is gone, and what was done on it counts beside what was on its disk.
            assert_eq!(told(&records, 200, None), Some(100));
            assert_eq!(told(&stacked, 100, None), Some(100));
        }
        // What was done until then counts as it did.
        assert_eq!(told(&records, 230, Some(115)), Some(115));
        assert_eq!(told(&records, 231, None), Some(116));
    }

    #[test]
    fn a_missing_link_means_no_numbers_rather_than_fewer() {
        let links = links([(3, link(10, 20))]);
        assert_eq!(network_of(&row(&[3, 4]), &links), None);
        assert_eq!(network_of(&row(&[]), &links), None);
    }

    /// The original reported the host's totals for every container.
    #[test]
    fn a_container_on_the_hosts_network_never_gets_the_hosts_totals() {
        let links = links([(1, link(10, 20))]);
        let mut row = row(&[1]);
        row.host_network = true;
        assert_eq!(network_of(&row, &links), None);
    }

    #[test]
    fn cpu_time_is_split_exactly_and_never_runs_backwards() {
        let mut split = CpuSplit::default();
        assert_eq!(split.adjust(100, 30, 10), (75, 25));
        // The sampled parts say less system time than before; none of it is taken back.
        let (user, system) = split.adjust(120, 119, 1);
        assert_eq!(user + system, 120);
        assert!(user >= 75 && system >= 25);
        // The cgroup of a container that was started again has done less than the one before.
        assert_eq!(split.adjust(110, 1, 1), (55, 55));
        assert_eq!(CpuSplit::default().adjust(7, 0, 0), (7, 0));
    }

    #[test]
    fn neither_part_of_cpu_time_runs_backwards_over_lives_of_the_process() {
        let record = |usage, user, system| CgroupRecord {
            cpu_usage_ns: usage,
            cpu_user_ns: user,
            cpu_system_ns: system,
            filled: filled::CPU_BASE,
            ..CgroupRecord::default()
        };
        let told = cpu_counters(&record(100_000, 30, 10), &mut CpuSplit::default()).unwrap();
        assert_eq!((told.user_ns, told.system_ns), (Some(75_000), Some(25_000)));
        // What was sampled since says that more of it had been the system's.
        let mut split = CpuSplit::after(&told);
        let next = cpu_counters(&record(104_999, 40, 30), &mut split).unwrap();
        assert_eq!((next.user_ns, next.system_ns), (Some(75_000), Some(29_000)));
        // The file tells no less, and its parts go on from there.
        assert_eq!(next.usage_ns, Some(104_000));
        assert_eq!(split.adjust(104_000, 61_000, 43_000), (75_000, 29_000));
    }
}
