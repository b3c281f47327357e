//! What the kernel's own files say of a process: the oracle for what the dataplane lists.
//!
//! In: a pid. Out: the numbers of `stat`, `statm`, `status` and `io` below `/proc/<pid>`. Invariant:
//! a process that is gone, or went while it was read, is `None`.

use shared::observed::ProcessSample;

/// One reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessFiles {
    /// State letter.
    pub state: u8,
    /// Pid of the parent.
    pub parent_pid: u32,
    /// Pid that the process has for itself.
    pub inner_pid: u32,
    /// Threads.
    pub threads: u32,
    /// Start, clock ticks since boot.
    pub start_ticks: u64,
    /// Time in user and in kernel mode, ns, each rounded down to a tick.
    pub times_ns: [u64; 2],
    /// Resident bytes.
    pub resident: u64,
    /// Bytes read from and written to block devices.
    pub moved: [u64; 2],
}

/// A clock tick (USER_HZ), ns.
pub const TICK_NS: u64 = 10_000_000;

impl ProcessFiles {
    /// Reads them.
    pub fn read(pid: u32) -> Option<Self> {
        let text = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        let stat = text("stat")?;
        let words: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let number = |at: usize| words.get(at)?.parse::<u64>().ok();
        let (status, io, statm) = (text("status")?, text("io")?, text("statm")?);
        let line = |text: &str, key: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().last()?.parse::<u64>().ok()
        };
        let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
        Some(Self {
            state: *words.first()?.as_bytes().first()?,
            parent_pid: u32::try_from(number(1)?).ok()?,
            inner_pid: u32::try_from(line(&status, "NSpid:")?).ok()?,
            threads: u32::try_from(number(17)?).ok()?,
            start_ticks: number(19)?,
            times_ns: [number(11)? * TICK_NS, number(12)? * TICK_NS],
            resident: pages * 4096,
            moved: [line(&io, "read_bytes:")?, line(&io, "write_bytes:")?],
        })
    }

    /// The same of what was listed: times are rounded as the files do.
    pub fn of(sample: &ProcessSample) -> Option<Self> {
        let counters = sample.counters;
        let rounded = |ns: u64| ns / TICK_NS * TICK_NS;
        Some(Self {
            state: sample.state,
            parent_pid: sample.parent_pid,
            inner_pid: sample.container_pid,
            threads: sample.threads,
            start_ticks: sample.start_ticks,
            times_ns: [rounded(counters.user_ns?), rounded(counters.system_ns?)],
            resident: counters.rss_bytes?,
            moved: [counters.read_bytes?, counters.write_bytes?],
        })
    }
}
