//! The programs that run in the kernel, and the records they share with the dataplane.
//!
//! In: C sources under `bpf/`, compiled by the build script. Out: the object's bytes, the names in
//! it, and its [`records`] as Rust types. Nothing is loaded here; the dataplane does that.
//! Invariant: sizes and offsets of every record are asserted on both sides at compile time.

pub mod cgroup_records;
pub mod records;

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

/// Name of the program in [`connect`] that sees sockets go.
pub const RELEASE_HOOK: &str = "released";

/// Names of the maps.
pub mod map {
    /// Published ports and where they lead.
    pub const SERVICES: &str = "services";
    /// Flows of clients.
    pub const FLOWS: &str = "flows";
    /// Datagrams in pieces.
    pub const FRAGMENTS: &str = "fragments";
    /// Addresses of this host and of containers.
    pub const ADDRESSES: &str = "addresses";
    /// Uplinks and their largest packets.
    pub const UPLINKS: &str = "uplinks";
    /// Traffic per published port and CPU.
    pub const COUNTERS: &str = "counters";
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
    fn the_objects_are_aligned_elf_files_for_bpf() {
        for object in [super::nat(), super::connect()] {
            assert_eq!(object.as_ptr().align_offset(8), 0);
            assert_eq!(object.get(..4), Some(&b"\x7fELF"[..]));
            const EM_BPF: u16 = 247;
            let machine = u16::from_ne_bytes([object[18], object[19]]);
            assert_eq!(machine, EM_BPF);
        }
    }
}
