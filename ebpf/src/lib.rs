//! The programs that run in the kernel, and the records they share with the dataplane.
//!
//! In: C sources under `bpf/`, compiled by the build script. Out: the object's bytes, the names in
//! it, and its [`records`] as Rust types. Nothing is loaded here; the dataplane does that.
//! Invariant: sizes and offsets of every record are asserted on both sides at compile time.

pub mod records;

/// Bytes at an alignment that parsers of object files can work with in place.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

static NAT_OBJECT: &Aligned<[u8]> =
    &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/nat.bpf.o")));

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
    /// Run by the dataplane: removes dead flows, counts living ones.
    pub const SWEEP: &str = "sweep";
}

/// Names of the maps in [`nat`].
pub mod map {
    /// Published ports and where they lead.
    pub const SERVICES: &str = "services";
    /// Flows of clients.
    pub const FLOWS: &str = "flows";
    /// Addresses of this host.
    pub const ADDRESSES: &str = "addresses";
    /// Traffic per published port and CPU.
    pub const COUNTERS: &str = "counters";
    /// Living flows per published port.
    pub const ACTIVE: &str = "active";
    /// What the next sweep is to do.
    pub const ORDERS: &str = "orders";
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_object_is_an_aligned_elf_file_for_bpf() {
        let object = super::nat();
        assert_eq!(object.as_ptr().align_offset(8), 0);
        assert_eq!(object.get(..4), Some(&b"\x7fELF"[..]));
        const EM_BPF: u16 = 247;
        let machine = u16::from_ne_bytes([object[18], object[19]]);
        assert_eq!(machine, EM_BPF);
    }
}
