//! Texts of procfs that both processes read: `/proc/stat`, `/proc/meminfo`, the mount table.
//!
//! In: texts. Out: numbers with their units. Invariant: what is not there or makes no sense is `None`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

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

/// A mounted hierarchy of control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupMount<'a> {
    /// Where.
    pub place: PathBuf,
    /// Whether it is the one of version 2.
    pub unified: bool,
    /// Its options, comma-joined; of version 1 its controllers are among them.
    options: &'a str,
}

impl CgroupMount<'_> {
    /// Whether it is of version 1 and has this controller.
    pub fn has(&self, controller: &str) -> bool {
        !self.unified && self.options.split(',').any(|it| it == controller)
    }
}

/// The hierarchies of control groups in `/proc/self/mounts`, in its order.
pub fn cgroup_mounts(mounts: &str) -> impl Iterator<Item = CgroupMount<'_>> {
    mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let [_, place, kind, options] = [(); 4].map(|()| fields.next());
        let (place, kind, options) = (place?, kind?, options?);
        matches!(kind, "cgroup" | "cgroup2").then(|| CgroupMount {
            place: unescape(place),
            unified: kind == "cgroup2",
            options,
        })
    })
}

/// Where the hierarchy of version 2 is mounted, alone or beside version 1, by `/proc/self/mounts`.
pub fn unified_cgroup_mount(mounts: &str) -> Option<PathBuf> {
    let mount = cgroup_mounts(mounts).find(|mount| mount.unified)?;
    Some(mount.place)
}

/// Undoes the octal escapes of the mount tables (proc(5)): of blanks, backslashes and line ends.
pub fn unescape(text: &str) -> PathBuf {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(*first));
        rest = match code {
            Some(_) => &tail[3..],
            None => tail,
        };
    }
    OsString::from_vec(out).into()
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

    #[test]
    fn hierarchies_are_found_alone_and_beside_each_other() {
        let v1 = "x /mnt/a\\040b cgroup rw,cpu,cpuacct 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,memory 0 0\n";
        let both = format!("proc /proc proc rw 0 0\nshort /a cgroup\n{v1}{v2}");
        let found: Vec<_> = cgroup_mounts(&both).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].place, PathBuf::from("/mnt/a b"));
        let has = |controller| [0, 1].map(|place: usize| found[place].has(controller));
        assert_eq!(has("cpuacct"), [true, false]);
        // An option of version 2 is no controller.
        assert_eq!([has("memory"), has("acct")], [[false; 2]; 2]);
        let unified = Some(PathBuf::from("/sys/fs/cgroup/unified"));
        assert_eq!(unified_cgroup_mount(&both), unified);
        assert_eq!(unified_cgroup_mount(v2), unified);
        assert_eq!(unified_cgroup_mount(v1), None);
    }

    #[test]
    fn escapes_are_read_and_odd_ones_stay() {
        for (text, read) in [
            ("a\\040b\\134c", "a b\\c"),
            ("a\\04", "a\\04"),
            ("\\999", "\\999"),
            ("\\é1", "\\é1"),
        ] {
            assert_eq!(unescape(text), PathBuf::from(read));
        }
    }
}
