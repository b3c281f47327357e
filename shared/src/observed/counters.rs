//! Groups of counters and where they came from.

use super::rows::Source;

/// A limit that is "no limit" (`max` in cgroup files).
pub const UNLIMITED: u64 = u64::MAX;

/// A group of counters with its source and its age when the sample was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Measured<T> {
    /// Where the numbers come from.
    pub source: Source,
    /// How old they were when the sample was taken, ms.
    pub age_ms: u32,
    /// The numbers; all `None` when the source is absent.
    pub counters: T,
}

impl<T> Measured<T> {
    /// Fresh numbers of a source.
    pub fn now(source: Source, counters: T) -> Self {
        Self {
            source,
            age_ms: 0,
            counters,
        }
    }

    /// The numbers, unless the group is absent.
    pub fn get(&self) -> Option<&T> {
        (self.source != Source::Absent).then_some(&self.counters)
    }
}

/// One counter, as the documentation lists it.
#[derive(Debug, Clone, Copy)]
pub struct CounterInfo {
    /// Name.
    pub name: &'static str,
    /// What it counts, with its unit.
    pub meaning: &'static str,
}

macro_rules! groups {
    ($(
        $(#[$doc:meta])*
        $name:ident, $group:literal, $words:literal { $( $field:ident = $meaning:literal, )* }
    )*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
            pub struct $name { $( #[doc = $meaning] pub $field: Option<u64>, )* }

            impl $name {
                const COUNTERS: &'static [CounterInfo] = &[
                    $( CounterInfo { name: stringify!($field), meaning: $meaning }, )*
                ];

                /// Every counter with its name, which ends with its unit unless it is a plain count.
                pub fn named(&self) -> impl Iterator<Item = (&'static str, Option<u64>)> {
                    [ $( (stringify!($field), self.$field), )* ].into_iter()
                }

                /// The words, and a bit per word that was read.
                pub(crate) fn pack(&self) -> ([u64; $words], u32) {
                    const { assert!(Self::COUNTERS.len() <= $words && $words <= 32) };
                    let mut words = [0u64; $words];
                    let mut present = 0u32;
                    let values = [ $( self.$field, )* ];
                    for (index, value) in values.into_iter().enumerate() {
                        if let Some(value) = value {
                            words[index] = value;
                            present |= 1 << index;
                        }
                    }
                    (words, present)
                }

                pub(crate) fn unpack(words: &[u64; $words], present: u32) -> Self {
                    let mut values = words
                        .iter()
                        .enumerate()
                        .map(|(index, word)| (present & (1 << index) != 0).then_some(*word));
                    Self { $( $field: values.next().flatten(), )* }
                }
            }
        )*

        /// Every group of counters: its name and the counters in the order of their words.
        pub const GROUPS: &[(&str, &[CounterInfo])] = &[ $( ($group, $name::COUNTERS), )* ];
    };
}

groups! {
    /// CPU of a container.
    CpuCounters, "cpu", 8 {
        usage_ns = "CPU time used, ns",
        user_ns = "CPU time in user mode, ns",
        system_ns = "CPU time in kernel mode, ns",
        periods = "enforcement periods of the quota that have passed",
        throttled_periods = "of them, those in which it was throttled",
        throttled_ns = "time throttled, ns",
        pressure_some_ns = "time in which some task waited for a CPU, ns",
    }
    /// Memory of a container.
    MemoryCounters, "memory", 16 {
        current_bytes = "memory charged, bytes",
        limit_bytes = "limit, bytes, all ones unlimited",
        inactive_file_bytes = "file cache that is easily given back, bytes",
        anon_bytes = "anonymous memory, bytes",
        file_bytes = "file cache, bytes",
        shmem_bytes = "shared memory and tmpfs, bytes",
        swap_bytes = "swap used, bytes",
        peak_bytes = "most ever charged, bytes",
        oom_events = "times the limit led to out of memory",
        oom_kill_events = "processes killed for it",
        max_events = "times the limit was hit",
        kernel_bytes = "kernel memory, bytes",
        swap_limit_bytes = "limit of swap (version 1: of memory and swap together), bytes, all ones unlimited",
        pressure_some_ns = "time in which some task waited for memory, ns",
        pressure_full_ns = "time in which all tasks waited for memory, ns",
    }
    /// Number of tasks of a container.
    PidsCounters, "pids", 8 {
        current = "tasks",
        limit = "limit, all ones unlimited",
        limit_events = "times the limit refused a task",
    }
    /// Block devices, as a container uses them.
    IoCounters, "io", 8 {
        read_bytes = "bytes read",
        write_bytes = "bytes written",
        read_operations = "read operations",
        write_operations = "write operations",
        pressure_some_ns = "time in which some task waited for a block device, ns",
        pressure_full_ns = "time in which all tasks waited for a block device, ns",
    }
    /// Network, as the container sees it.
    NetCounters, "net", 8 {
        rx_bytes = "bytes received by the container",
        rx_packets = "packets received by the container",
        rx_errors = "receive errors",
        rx_drops = "received packets dropped",
        tx_bytes = "bytes sent by the container",
        tx_packets = "packets sent by the container",
        tx_errors = "send errors",
        tx_drops = "packets to be sent dropped",
    }
    /// Disk space of a container.
    DiskCounters, "disk", 8 {
        scratch_bytes = "bytes in the scratch directory",
        scratch_files = "files in the scratch directory",
        scratch_limit_bytes = "most the scratch directory may take, bytes; absent when it shares its file system",
        shm_bytes = "bytes in the container's /dev/shm",
        shm_limit_bytes = "size of the container's /dev/shm, bytes",
        shm_age_ms = "how old the numbers of /dev/shm were at taken_*, ms",
    }
    /// An accelerator.
    AcceleratorCounters, "accelerator", 16 {
        memory_total_bytes = "memory, bytes",
        memory_used_bytes = "memory used, bytes",
        utilisation_permille = "busy share of the last interval, thousandths",
        memory_utilisation_permille = "memory bandwidth used in the last interval, thousandths",
        power_mw = "power drawn, mW",
        power_limit_mw = "power limit, mW",
        temperature_mc = "temperature, thousandths of a degree Celsius",
        energy_mj = "energy used since the driver was loaded, mJ",
        clock_mhz = "clock of the processing units, MHz",
        memory_clock_mhz = "clock of the memory, MHz",
        pcie_rx_bytes_per_s = "bytes per second received over PCIe",
        pcie_tx_bytes_per_s = "bytes per second sent over PCIe",
        encoder_permille = "busy share of the video encoder, thousandths",
        decoder_permille = "busy share of the video decoder, thousandths",
        ecc_corrected = "memory errors corrected since the driver was loaded",
        ecc_uncorrected = "memory errors not corrected since the driver was loaded",
    }
    /// The node.
    NodeCounters, "node", 32 {
        cpu_total_ns = "CPU time of all CPUs since boot, idle included, ns",
        cpu_idle_ns = "of it idle, ns",
        memory_total_bytes = "memory, bytes",
        memory_available_bytes = "memory available without swapping, bytes",
        disk_total_bytes = "size of the file system of the scratch root, bytes",
        disk_available_bytes = "space available on it, bytes",
        net_rx_bytes = "bytes received on physical interfaces",
        net_tx_bytes = "bytes sent on physical interfaces",
        sessions_active = "relay sessions open on all ports",
        sessions_total = "relay sessions ever accepted",
        accepts_shed = "connections closed for lack of descriptors or by the total limit",
        containers_sampled = "containers of the last pass",
        pass_ns = "time the last pass took, ns",
        descriptors_open = "descriptors the dataplane has open",
        cpu_user_ns = "CPU time of all CPUs in user mode, neither nice nor idle, ns",
        cpu_system_ns = "CPU time of all CPUs in kernel mode, without interrupts, ns",
        disks_total_bytes = "size of all disks listed, bytes",
        disks_used_bytes = "of it not available to ordinary users, bytes",
        disks_age_ms = "how old the numbers of the disks were at taken_*, ms",
        disks_left_out = "disks there was no room to list",
        pass_cpu_ns = "CPU time the last pass took, ns",
        tick_late_ns = "how long after its beat the last pass began, ns",
        ticks_missed = "beats that went by while a pass was under way, since the dataplane started",
        oom_kill_events = "processes killed for lack of memory on the node since boot",
        cpu_pressure_some_ns = "time in which some task of the node waited for a CPU, ns",
        memory_pressure_some_ns = "time in which some task of the node waited for memory, ns",
        memory_pressure_full_ns = "time in which all tasks of the node waited for memory, ns",
        io_pressure_some_ns = "time in which some task of the node waited for a block device, ns",
        io_pressure_full_ns = "time in which all tasks of the node waited for a block device, ns",
        accelerators_found = "accelerators; not there while a driver that has told nothing yet may do so",
        accelerators_silent = "kinds of accelerators whose driver is there and has told nothing since the dataplane started: 1 CUDA, 2 ROCm, 4 TPU, added up",
    }
    /// A process.
    ProcessCounters, "process", 7 {
        user_ns = "CPU time in user mode, ns",
        system_ns = "CPU time in kernel mode, ns",
        rss_bytes = "resident memory, bytes",
        read_bytes = "bytes read from block devices",
        write_bytes = "bytes written to block devices",
        accelerator_memory_bytes = "accelerator memory, bytes",
        accelerator_utilisation_permille = "busy share on its accelerators, thousandths",
    }
}
