//! The programs that run in the kernel, and the records they share with the dataplane.
//!
//! In: C sources under `bpf/`, compiled by the build script. Out: the object's bytes, the names in
//! it, and its [`records`] as Rust types. Nothing is loaded here; the dataplane does that.
//! Invariant: sizes and offsets of every record are asserted on both sides at compile time.

pub mod cgroup_records;
pub mod link_records;
pub mod records;
pub mod task_records;

/// Bytes at an alignment that parsers of object files can work with in place.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static NAT_OBJECT: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/nat.bpf.o")));

static CONNECT_OBJECT: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/connect.bpf.o")));

static CGROUP_STATS_OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
    env!("OUT_DIR"),
    "/cgroup_stats.bpf.o"
)));

/// An object that calls the kernel function `bpf_rdonly_cast`, which has this number among the kernel's
/// types (`cast` in `bpf/cgroup_stats.bpf.c`): aya does not resolve names of kernel functions, so the
/// calls are written with a number of no helper, and changed here.
#[must_use]
pub fn with_cast(object: &[u8], function: u32) -> Vec<u8> {
    /// BPF_JMP | BPF_CALL, linux/bpf.h.
    const CALL: u8 = 0x85;
    const CAST_CALL: u32 = 0x7fff_fff1;
    /// BPF_PSEUDO_KFUNC_CALL in the bits of the source register.
    const KERNEL_FUNCTION: u8 = if cfg!(target_endian = "big") {
        0x02
    } else {
        0x20
    };
    let mut patched = object.to_vec();
    for instruction in patched.chunks_exact_mut(8) {
        let [CALL, 0, 0, 0, number @ ..] = instruction else {
            continue;
        };
        if *number == CAST_CALL.to_ne_bytes() {
            number.copy_from_slice(&function.to_ne_bytes());
            instruction[1] = KERNEL_FUNCTION;
        }
    }
    patched
}

static TASK_STATS_OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
    env!("OUT_DIR"),
    "/task_stats.bpf.o"
)));

/// The object of the collector: processes of containers.
pub fn task_stats() -> &'static [u8] {
    &TASK_STATS_OBJECT.0
}

/// The object of the collector: counters of cgroups.
pub fn cgroup_stats() -> &'static [u8] {
    &CGROUP_STATS_OBJECT.0
}

/// The object of the kernel path for clients on the host: hooks at their sockets.
pub fn connect() -> &'static [u8] {
    &CONNECT_OBJECT.0
}

/// The object of the kernel path: address translation at uplinks and containers' links.
pub fn nat() -> &'static [u8] {
    &NAT_OBJECT.0
}

/// Names of the programs in [`nat`].
pub mod program {
    /// Ingress of an uplink.
    pub const FROM_UPLINK: &str = "from_uplink";
    /// Ingress of the host side of a container's link.
    pub const FROM_CONTAINER: &str = "from_container";
    /// Egress of the host side of a container's link.
    pub const TO_CONTAINER: &str = "to_container";
    /// Run by the dataplane: removes dead flows, counts living ones.
    pub const SWEEP: &str = "sweep";
}

/// Names of the programs in [`connect`] that look at addresses of sockets.
pub const ADDRESS_HOOKS: [&str; 8] = [
    "connect4",
    "connect6",
    "sendmsg4",
    "sendmsg6",
    "recvmsg4",
    "recvmsg6",
    "getpeername4",
    "getpeername6",
];

/// Those of them that lead sockets; the others tell whom led ones speak to.
pub const LEADING_HOOKS: [&str; 4] = ["connect4", "connect6", "sendmsg4", "sendmsg6"];

/// Name of the program in [`connect`] that sees sockets go.
pub const RELEASE_HOOK: &str = "released";

/// Names of the maps.
pub mod map {
    /// Published ports and where they lead.
    pub const SERVICES: &str = "services";
    /// Flows of clients.
    pub const FLOWS: &str = "flows";
    /// Those of clients on this host.
    pub const LOCAL_FLOWS: &str = "local_flows";
    /// Datagrams in pieces.
    pub const FRAGMENTS: &str = "fragments";
    /// Addresses of this host and of containers.
    pub const ADDRESSES: &str = "addresses";
    /// Connections to the outside under the number of a published port.
    pub const OUTGOING: &str = "outgoing";
    /// Uplinks and their largest packets.
    pub const UPLINKS: &str = "uplinks";
    /// Networks that routes lead to by each uplink.
    pub const WAYS_BACK: &str = "ways_back";
    /// Traffic per published port and CPU.
    pub const COUNTERS: &str = "counters";
    /// What each container was given past the host's end of its link, per CPU.
    pub const DELIVERED: &str = "delivered";
    /// Bridges of containers' links.
    pub const BRIDGES: &str = "bridges";
    /// Living flows per published port.
    pub const ACTIVE: &str = "active";
    /// What the next sweep is to do.
    pub const ORDERS: &str = "orders";
    /// What the hooks know of the node.
    pub const NODES: &str = "nodes";
    /// Containers' links that are there.
    pub const LINKS: &str = "links";
    /// Sockets of this host that lead to containers.
    pub const LED_SOCKETS: &str = "led_sockets";
    /// Peers of datagram sockets of this host.
    pub const LED_PEERS: &str = "led_peers";
}

#[cfg(test)]
mod tests {
    #[test]
    fn calls_of_the_cast_are_changed_and_nothing_else() {
        let object = super::cgroup_stats();
        let patched = super::with_cast(object, 0x0102_0304);
        let calls = |bytes: &[u8], call: [u8; 8]| {
            let all = bytes.chunks_exact(8);
            all.filter(|instruction| **instruction == call).count()
        };
        let before = calls(object, [0x85, 0, 0, 0, 0xf1, 0xff, 0xff, 0x7f]);
        assert!(before > 20, "{before}");
        assert_eq!(calls(&patched, [0x85, 0x20, 0, 0, 4, 3, 2, 1]), before);
        let same = object.iter().zip(patched.iter()).filter(|(a, b)| a == b);
        assert_eq!(same.count(), object.len() - 5 * before);
    }

    #[test]
    fn the_objects_are_aligned_elf_files_for_bpf() {
        for object in [
            super::nat(),
            super::connect(),
            super::cgroup_stats(),
            super::task_stats(),
        ] {
            assert_eq!(object.as_ptr().align_offset(8), 0);
            assert_eq!(object.get(..4), Some(&b"\x7fELF"[..]));
            const EM_BPF: u16 = 247;
            let machine = u16::from_ne_bytes([object[18], object[19]]);
            assert_eq!(machine, EM_BPF);
        }
    }
}
