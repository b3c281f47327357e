//! The rows themselves. Change one, and the layout hash and `docs/shared-memory.md` change with it.

use super::declare;

/// Capacity of the client network list of a port row.
pub(crate) const NETWORKS: usize = 8;
/// Capacity of the user list of an accelerator row.
pub(crate) const USERS: usize = 16;
/// Capacity of the veth list of a container row.
pub(crate) const LINKS: usize = 8;
/// Capacity of the core list of a node sample.
pub(crate) const CORES: usize = 512;
/// Capacity of the disk list of a node sample.
pub(crate) const DISKS: usize = 32;
/// Longest device name of a disk.
pub(crate) const DEVICE: usize = 63;

declare! {
    /// The start of every region file. The first four fields keep their place in every layout.
    Header, 512 {
        0 magic: u64 = "`bai-regn` in ASCII; keeps its place in every layout",
        8 layout_version: u32 = "version of this layout; keeps its place in every layout",
        12 region: u32 = "1 desired, 2 observed; keeps its place in every layout",
        16 layout_hash: u64 = "hash of every row's fields; keeps its place in every layout",
        24 retired: u64 = "not 0: a new file has taken this one's name; keeps its place in every layout",
        32 region_id: [u8; 16] = "random, set when the file was made",
        48 epoch: u64 = "one more with every life of the writer",
        56 allocated: u64 = "last generation handed to a batch, committed or not",
        64 committed: u64 = "last generation readers may see",
        72 heartbeat_monotonic_ns: u64 = "writer's last sign of life, CLOCK_MONOTONIC, ns",
        80 heartbeat_wall_ns: u64 = "the same instant, CLOCK_REALTIME, ns since 1970",
        88 writer_pid: u64 = "process id of the writer of this epoch",
        96 file_bytes: u64 = "length of the file, bytes",
        104 port_rows: u32 = "rows of the ports table",
        108 container_rows: u32 = "rows of the containers table",
        112 accelerator_rows: u32 = "rows of the accelerators table",
        116 process_rows: u32 = "rows of one bank of the process pool",
        120 used_rows: [u64; 6] = "per table in the order above, rows from the first up to the last that was ever written: the rest need not be looked at",
        168 reserved: [u64; 43] = "zero",
    }

    /// A host port that is wanted (desired region, table ports).
    RawPort, 336 {
        0 state: u32 = "0 free, 1 wanted, 2 removed and not yet acknowledged",
        4 host_port: u16 = "port on the host",
        6 protocol: u8 = "6 TCP, 17 UDP",
        7 flags: u8 = "bit 0 observe only, bit 1 link guard, bit 2 local clients only, bit 3 the host's firewall decides",
        8 kernel_id: [u8; 16] = "kernel the port belongs to",
        24 container_id: [u8; 32] = "container the port leads to",
        56 bind_address: [u8; 16] = "address listened on (IPv4 in the first 4 bytes)",
        72 target_address: [u8; 16] = "container's address (IPv4 in the first 4 bytes)",
        88 target_port: u16 = "port in the container",
        90 bind_family: u8 = "4 or 6",
        91 target_family: u8 = "4 or 6",
        92 link_index: u32 = "host-side interface index of the container, 0 unknown",
        96 link_mac: [u8; 6] = "MAC address behind that interface, all zero unknown",
        102 drain_policy: u8 = "0 cut sessions on removal, 1 drain them for drain_ms",
        103 network_count: u8 = "client networks allowed, 0 all",
        104 max_sessions: u32 = "sessions at once, 0 the node's default",
        108 drain_ms: u32 = "drain time, ms",
        112 idle_timeout_ms: u32 = "a session without a byte for this long is closed, ms, 0 the node's default",
        116 connect_timeout_ms: u32 = "time a connection to the container may take, ms, 0 the node's default",
        120 service_length: u8 = "bytes of service",
        121 service: [u8; 63] = "service name, UTF-8",
        184 network_prefixes: [u8; 8] = "prefix length per client network, bits",
        192 network_families: [u8; 8] = "4 or 6 per client network",
        200 network_addresses: [u8; 128] = "16 bytes per client network",
        328 new_per_second: u32 = "new sessions in a second in the long run, 0 no limit",
        332 reserved: [u8; 4] = "zero",
    }

    /// A container to be sampled (desired region, table containers).
    RawContainer, 640 {
        0 state: u32 = "0 free, 1 wanted, 2 removed and not yet acknowledged",
        4 flags: u32 = "bit 0 host network, bit 1 on networks past the host, too",
        8 container_id: [u8; 32] = "the row's key",
        40 kernel_id: [u8; 16] = "kernel it runs",
        56 session_id: [u8; 16] = "session of the kernel",
        72 memory_limit_bytes: u64 = "memory limit, bytes, 0 none",
        80 cpu_milli: u32 = "CPUs it may use, thousandths, 0 not limited",
        84 init_pid: u32 = "host pid of its first process, 0 unknown",
        88 link_indexes: [u32; 8] = "host-side veth interface indexes",
        120 link_count: u8 = "how many of them",
        121 cgroup_length: u8 = "bytes of cgroup_path",
        122 scratch_length: u8 = "bytes of scratch_path",
        123 cgroup_path: [u8; 255] = "path below each cgroup root, UTF-8",
        378 scratch_path: [u8; 255] = "scratch directory on the host, UTF-8, empty none",
        633 reserved: [u8; 7] = "zero",
    }

    /// What holds for the whole node (desired region, table node).
    RawNode, 40 {
        0 state: u32 = "0 not set, 1 set",
        4 sample_interval_ms: u32 = "time between two samples, ms",
        8 drain_ms: u32 = "drain time when the dataplane itself stops, ms",
        12 default_max_sessions: u32 = "sessions at once of a port that names no limit",
        16 total_max_sessions: u32 = "sessions at once of all ports",
        20 idle_timeout_ms: u32 = "idle time of a port that names none, ms",
        24 connect_timeout_ms: u32 = "connect time of a port that names none, ms",
        28 reserved: [u8; 12] = "zero",
    }

    /// How far the dataplane has come in the desired region (observed region, table applied).
    RawApplied, 40 {
        0 state: u32 = "0 nothing applied yet, 1 set",
        4 reserved: u32 = "zero",
        8 region_id: [u8; 16] = "desired region it speaks of",
        24 generation: u64 = "everything committed up to here has been looked at",
        32 epoch: u64 = "epoch of the desired region's writer then",
    }

    /// What became of a port row (observed region, table ports).
    RawPortStatus, 296 {
        0 state: u32 = "0 free, 1 used",
        4 host_port: u16 = "port on the host",
        6 protocol: u8 = "6 TCP, 17 UDP",
        7 status: u8 = "0 pending, 1 serving, 2 disabled, 3 draining, 4 refused, 5 removed",
        8 path: u8 = "0 none, 1 relay, 2 kernel path, 3 engine",
        9 relay_engine: u8 = "0 none, 1 copy, 2 splice, 3 uring",
        10 reason_length: u8 = "bytes of reason",
        11 reason: [u8; 119] = "why it is not serving, UTF-8",
        130 reserved: [u8; 6] = "zero",
        136 kernel_id: [u8; 16] = "kernel of the row acknowledged",
        152 region_id: [u8; 16] = "desired region acknowledged",
        168 acknowledged: u64 = "generation of the port row acknowledged",
        176 tick: u64 = "tick of the counters",
        184 sessions_active: u64 = "sessions open now",
        192 sessions_total: u64 = "sessions ever accepted",
        200 sessions_refused: u64 = "sessions refused by a limit or network list",
        208 bytes_in: u64 = "client to container, bytes",
        216 bytes_out: u64 = "container to client, bytes",
        224 connect_failures: u64 = "connections to the container that failed",
        232 packets_in: u64 = "client to container on the kernel path, packets",
        240 packets_out: u64 = "container to client on the kernel path, packets",
        248 kernel_path_sessions_total: u64 = "of the counters above, what the kernel path's maps had counted: sessions",
        256 kernel_path_sessions_refused: u64 = "... sessions refused",
        264 kernel_path_bytes_in: u64 = "... bytes to the container",
        272 kernel_path_bytes_out: u64 = "... bytes to the client",
        280 kernel_path_packets_in: u64 = "... packets to the container",
        288 kernel_path_packets_out: u64 = "... packets to the client",
    }

    /// One container at one tick (observed region, table containers). Group order: cpu, memory,
    /// pids, io, net, disk.
    RawSample, 600 {
        0 state: u32 = "0 free, 1 used",
        4 reserved: u32 = "zero",
        8 container_id: [u8; 32] = "the row's key",
        40 kernel_id: [u8; 16] = "kernel it runs",
        56 tick: u64 = "pass this sample belongs to",
        64 taken_monotonic_ns: u64 = "when, CLOCK_MONOTONIC, ns",
        72 taken_wall_ns: u64 = "when, CLOCK_REALTIME, ns since 1970",
        80 sources: [u8; 8] = "per group: 0 absent, 1 file, 2 bpf, 3 netlink, 5 walk",
        88 ages_ms: [u32; 8] = "per group: how old the numbers were at taken_*, ms",
        120 present: [u32; 8] = "per group: bit i set, counter i was read",
        152 cpu: [u64; 8] = "counters of group cpu",
        216 memory: [u64; 16] = "counters of group memory",
        344 pids: [u64; 8] = "counters of group pids",
        408 io: [u64; 8] = "counters of group io",
        472 net: [u64; 8] = "counters of group net, as the container sees them",
        536 disk: [u64; 8] = "counters of group disk",
    }

    /// One accelerator (observed region, table accelerators).
    RawAccelerator, 1360 {
        0 state: u32 = "0 free, 1 used",
        4 index: u32 = "number the driver gives it; with kind the row's key",
        8 kind: u8 = "1 CUDA, 2 ROCm, 3 TPU",
        9 healthy: u8 = "1 usable, 0 the driver reports a fault",
        10 present: u16 = "bit i set, counter i was read",
        12 id_length: u8 = "bytes of id",
        13 model_length: u8 = "bytes of model",
        14 pci_length: u8 = "bytes of pci",
        15 profile_length: u8 = "bytes of profile",
        16 numa_node: i32 = "NUMA node, -1 unknown",
        20 age_ms: u32 = "how old the numbers were at the tick, ms",
        24 tick: u64 = "pass this row belongs to",
        32 flags: u32 = "bit 0 part of another device, bit 1 divided into parts, bit 2 others may use it too",
        36 whole_index: u32 = "number of the device it is a part of, else its own",
        40 units: u32 = "processing units, 0 unknown",
        44 fault: u32 = "last fault code of the driver (NVIDIA: XID), 0 none",
        48 counters: [u64; 16] = "counters of an accelerator",
        176 id: [u8; 80] = "stable id (UUID), UTF-8",
        256 model: [u8; 64] = "model name, UTF-8",
        320 pci: [u8; 32] = "PCI address, UTF-8",
        352 profile: [u8; 32] = "name of the kind of part, UTF-8, empty for a whole device",
        384 user_count: u32 = "containers that use it and are listed",
        388 users_left_out: u32 = "containers that use it and had no room",
        392 user_containers: [u8; 512] = "container id per user",
        904 user_memory: [u64; 16] = "device memory per user, bytes, all ones unknown",
        1032 user_utilisation: [u32; 16] = "busy share per user, thousandths, all ones unknown",
        1096 near: [u8; 64] = "how near the device of that number is: 0 unknown, 1 to 6 by the PCIe bus, 16 + n by n NVLinks",
        1160 gpu_instance: u32 = "id of its GPU instance (MIG) plus one, 0 none or unknown",
        1164 compute_instance: u32 = "id of its compute instance (MIG) plus one, 0 none or unknown",
        1168 user_encoder: [u32; 16] = "share of the encoders per user, thousandths, all ones unknown",
        1232 user_decoder: [u32; 16] = "share of the decoders per user, thousandths, all ones unknown",
        1296 driver: [u8; 32] = "version of the driver, UTF-8",
        1328 runtime: [u8; 16] = "latest version of the runtime that the driver serves, UTF-8",
        1344 driver_length: u8 = "bytes of driver, 0 unknown",
        1345 runtime_length: u8 = "bytes of runtime, 0 unknown",
        1346 unused: [u8; 2] = "zero",
        1348 minor: u32 = "minor number of its device node (/dev/nvidiaN) plus one, 0 none or unknown",
        1352 reserved: [u8; 8] = "zero",
    }

    /// The node at one tick (observed region, table node).
    RawNodeSample, 6968 {
        0 state: u32 = "0 not set, 1 set",
        4 present: u32 = "bit i set, counter i was read",
        8 tick: u64 = "last finished pass",
        16 taken_monotonic_ns: u64 = "when, CLOCK_MONOTONIC, ns",
        24 taken_wall_ns: u64 = "when, CLOCK_REALTIME, ns since 1970",
        32 counters: [u64; 32] = "counters of the node",
        288 core_count: u32 = "CPUs listed",
        292 disk_count: u32 = "disks listed",
        296 cores_busy_ns: [u64; 512] = "per CPU: busy time since boot, that of niced work and interrupts included, ns",
        4392 disk_total_bytes: [u64; 32] = "per disk: size, bytes",
        4648 disk_used_bytes: [u64; 32] = "per disk: not available to ordinary users, bytes",
        4904 disk_name_lengths: [u8; 32] = "per disk: bytes of its name",
        4936 disk_names: [u8; 2016] = "per disk: 63 bytes, path of the device, UTF-8",
        6952 reserved: [u64; 2] = "zero",
    }

    /// The head of a bank of processes (observed region, table processes).
    RawBank, 64 {
        0 tick: u64 = "pass this bank belongs to",
        8 count: u32 = "rows filled",
        12 left_out: u32 = "processes seen that had no room",
        16 taken_monotonic_ns: u64 = "when the processes were listed, CLOCK_MONOTONIC, ns",
        24 reserved: [u64; 5] = "zero",
    }

    /// One process of a container (observed region, table processes).
    RawProcess, 136 {
        0 container_id: [u8; 32] = "container it runs in",
        32 pid: u32 = "pid on the host",
        36 parent_pid: u32 = "its parent's",
        40 threads: u32 = "threads",
        44 container_pid: u32 = "pid in the container, 0 unknown",
        48 name: [u8; 16] = "comm, bytes",
        64 start_ticks: u64 = "start time of /proc/pid/stat, clock ticks since boot",
        72 counters: [u64; 7] = "counters of a process",
        128 name_length: u8 = "bytes of name",
        129 state: u8 = "state letter of /proc/pid/stat, ASCII",
        130 present: u16 = "bit i set, counter i was read",
        132 source: u8 = "0 absent, 1 file, 2 bpf",
        133 reserved: [u8; 3] = "zero",
    }
}
