//! Texts of procfs that both processes read: `/proc/stat`, `/proc/meminfo`.
//!
//! In: texts. Out: numbers with their units. Invariant: what is not there or makes no sense is `None`.

/// Highest number of a CPU believed: the `NR_CPUS` of the largest kernels.
const MOST_CPUS: usize = 8192;

/// How long a tick of procfs is, ns.
pub fn tick_ns() -> u64 {
    1_000_000_000 / rustix::param::clock_ticks_per_second().max(1)
}

/// A line of `/proc/stat` about CPUs (proc(5)): ticks since boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTicks {
    /// In user mode, that of guests with it.
    pub user: u64,
    /// In user mode at low priority.
    pub nice: u64,
    /// In kernel mode, without interrupts.
    pub system: u64,
    /// With nothing to do.
    pub idle: u64,
    /// With nothing to do but to wait for block devices.
    pub iowait: u64,
    /// In interrupts.
    pub irq: u64,
    /// In soft interrupts.
    pub softirq: u64,
    /// In which other machines of the host ran in place of this one.
    pub steal: u64,
}

impl CpuTicks {
    /// Reads a line: the number of its CPU, none for the sum of all CPUs, and the ticks. `None` when it is
    /// not about CPUs.
    pub fn parse(line: &str) -> Option<(Option<usize>, Self)> {
        let mut words = line.split_ascii_whitespace();
        let cpu = match words.next()?.strip_prefix("cpu")? {
            "" => None,
            number => Some(number.parse().ok().filter(|cpu| *cpu < MOST_CPUS)?),
        };
        let mut next = || words.next()?.parse().ok();
        let ticks = Self {
            user: next()?,
            nice: next()?,
            system: next()?,
            idle: next()?,
            iowait: next()?,
            irq: next()?,
            softirq: next()?,
            steal: next()?,
        };
        Some((cpu, ticks))
    }

    /// At work: user, nice, system and both kinds of interrupts. Stolen time is other machines' work.
    pub fn busy(&self) -> u64 {
        sum([self.user, self.nice, self.system, self.irq, self.softirq])
    }

    /// Not at work: idle and iowait.
    pub fn idle(&self) -> u64 {
        sum([self.idle, self.iowait])
    }

    /// Busy, idle and stolen.
    pub fn total(&self) -> u64 {
        sum([self.busy(), self.idle(), self.steal])
    }
}

fn sum<const N: usize>(ticks: [u64; N]) -> u64 {
    ticks.into_iter().fold(0, u64::saturating_add)
}

/// An amount in `/proc/meminfo` or a NUMA node's `meminfo`, bytes: `MemTotal:`, `MemAvailable:`.
pub fn meminfo_bytes(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace().skip_while(|it| *it != name);
        let (_, kib, unit) = (words.next()?, words.next()?, words.next()?);
        (unit == "kB").then_some(())?;
        kib.parse::<u64>().ok()?.checked_mul(1024)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_idle_and_stolen_time_are_all_there_is() {
        let (cpu, all) = CpuTicks::parse("cpu  10 1 20 300 4 30 5 6 7 0").unwrap();
        assert_eq!((cpu, all.user, all.system), (None, 10, 20));
        assert_eq!((all.busy(), all.idle(), all.total()), (66, 304, 376));
        let (cpu, one) = CpuTicks::parse("cpu11 1 0 2 3 0 0 0 9").unwrap();
        assert_eq!(
            (cpu, one.busy(), one.idle(), one.total()),
            (Some(11), 3, 3, 15)
        );
        let huge = format!("cpu0{}", " 18446744073709551615".repeat(8));
        assert_eq!(CpuTicks::parse(&huge).unwrap().1.total(), u64::MAX);
        for line in [
            "",
            "cpu  1 2",
            "cpu8192 1 1 1 1 1 1 1 1",
            "cpux 1 1 1 1 1 1 1 1",
            "cpu0 1 1 1 x 1 1 1 1",
            "intr 1 2 3 4 5 6 7 8 9",
        ] {
            assert_eq!(CpuTicks::parse(line), None, "{line}");
        }
    }

    #[test]
    fn memory_is_read_with_its_unit() {
        let text = "MemTotal:       24684096 kB\nMemAvailable:   20000000 MB\nMemFree: kB\n";
        assert_eq!(meminfo_bytes(text, "MemTotal:"), Some(24_684_096 << 10));
        assert_eq!(
            meminfo_bytes("Node 1 MemTotal: 4 kB\n", "MemTotal:"),
            Some(4096)
        );
        for name in ["MemAvailable:", "MemFree:", "SwapTotal:"] {
            assert_eq!(meminfo_bytes(text, name), None, "{name}");
        }
    }
}
