//! `bpf/records.h` in Rust: keys and values of the maps, byte for byte.
//!
//! Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`; ports are in network order.
//! The fields say what they hold in the header; here are the types and conversions.

use std::mem::{offset_of, size_of};
use std::net::{IpAddr, Ipv6Addr};

use aya::Pod;

/// Number of this layout; pins of another one are not touched but replaced.
pub const LAYOUT: u32 = 3;

/// Most client networks of a port.
pub const CLIENT_NETWORKS: usize = 8;

/// TCP in [`ServiceKey::protocol`] and [`FlowKey::protocol`].
pub const PROTOCOL_TCP: u8 = 6;

/// UDP there.
pub const PROTOCOL_UDP: u8 = 17;

/// An address, IPv4 mapped into IPv6.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C, align(4))]
pub struct Address(pub [u8; 16]);

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        Self(match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        })
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        Ipv6Addr::from(address.0).to_canonical()
    }
}

/// `struct service_key`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct ServiceKey {
    /// Published port, network order.
    pub port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub zero: u8,
}

impl ServiceKey {
    /// As the maps of every layout have it.
    pub fn bytes(self) -> [u8; 4] {
        let [first, second] = self.port.to_ne_bytes();
        [first, second, self.protocol, self.zero]
    }
}

/// `struct client_network`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct ClientNetwork {
    /// Address with host bits zero.
    pub address: Address,
    /// Bits that count.
    pub mask: Address,
}

impl ClientNetwork {
    /// The network of `address`, `prefix` bits long (counted in the address's own family).
    pub fn new(address: IpAddr, prefix: u8) -> Self {
        let bits = usize::from(prefix) + if address.is_ipv4() { 96 } else { 0 };
        let mut mask = [0_u8; 16];
        for (at, byte) in mask.iter_mut().enumerate() {
            let set = bits.saturating_sub(at * 8).min(8);
            *byte = if set == 0 { 0 } else { 0xff << (8 - set) };
        }
        Self {
            address: Address::from(address),
            mask: Address(mask),
        }
    }
}

/// No new flows; those there are go on.
pub const SERVICE_DRAINING: u8 = 1;
/// Any local address will do.
pub const SERVICE_ANY_ADDRESS: u8 = 2;
/// Clients of other hosts are let through.
pub const SERVICE_REMOTE: u8 = 4;
/// Clients on this host are let through.
pub const SERVICE_HOST: u8 = 8;
/// Clients of other hosts are let through no more; those there are go on.
pub const SERVICE_REMOTE_OLD: u8 = 16;

/// What an address in `addresses` is: the host's own.
pub const ADDRESS_HOST: u32 = 1;
/// ... or a container's that a service leads to.
pub const ADDRESS_CONTAINER: u32 = 2;

/// `struct service`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Service {
    /// Address clients must use, unless any will do.
    pub bind: Address,
    /// The container's address.
    pub target: Address,
    /// Host side of its veth.
    pub link_index: u32,
    /// Identity of the route.
    pub life: u32,
    /// Most flows at once; 0 means no limit.
    pub max_flows: u32,
    /// Port in the container, network order.
    pub target_port: u16,
    /// `SERVICE_*`.
    pub flags: u8,
    /// Client networks in use.
    pub networks: u8,
    /// Them.
    pub network: [ClientNetwork; CLIENT_NETWORKS],
    /// Distance of two new flows in the long run; 0 means no limit.
    pub spacing_ns: u64,
}

/// `struct flow_key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct FlowKey {
    /// The container's address.
    pub container: Address,
    /// The client's.
    pub client: Address,
    /// Network order.
    pub container_port: u16,
    /// Network order.
    pub client_port: u16,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 3],
}

/// `struct flow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Flow {
    /// Last segment, coarse monotonic clock.
    pub seen_ns: u64,
    /// What the client connected to.
    pub host: Address,
    /// Sequence number of its SYN, network order; of a client on this host the lower half of its
    /// socket's cookie.
    pub first_sequence: u32,
    /// Interface it comes by.
    pub uplink: u32,
    /// Host side of the container's veth.
    pub link_index: u32,
    /// The service's life it belongs to.
    pub life: u32,
    /// Published port, network order.
    pub host_port: u16,
    /// `FLOW_*` of the header.
    pub flags: u16,
    /// Largest packet that the uplink takes.
    pub mtu: u32,
}

/// `struct local_flow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct LocalFlow {
    /// Whose.
    pub key: FlowKey,
    /// It.
    pub flow: Flow,
    /// 0 where the place is free.
    pub taken: u32,
    /// Zero.
    pub zero: u32,
}

/// `struct port_counters`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PortCounters {
    /// Flows begun.
    pub flows: u64,
    /// Segments from clients.
    pub packets_in: u64,
    /// Their payload.
    pub bytes_in: u64,
    /// Segments to clients.
    pub packets_out: u64,
    /// Their payload.
    pub bytes_out: u64,
    /// Flows that came too soon after the ones before.
    pub refused: u64,
}

/// `struct delivered`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Delivered {
    /// Packets, as an interface counts them.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// `struct bridge`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Bridge {
    /// Its interface's index.
    pub index: u32,
    /// When it last saw a packet of the container's, the program's own.
    pub learnt: u32,
    /// Its hardware address.
    pub address: [u8; 6],
    /// Zero.
    pub zero: u16,
}

/// `struct port_flows`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PortFlows {
    /// Living flows.
    pub active: i64,
    /// Sockets of this host that lead to the container.
    pub local: i64,
    /// When the next new flow would be on time.
    pub next_ns: u64,
    /// The sweep that counted.
    pub pass: u32,
    /// What it counted.
    pub counted: u32,
}

/// `struct sweep_order`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct SweepOrder {
    /// How long a connection may be silent before its client has answered the container's answer.
    pub opening_ns: u64,
    /// How long a flow may be silent.
    pub idle_ns: u64,
    /// How long an ended flow lingers for late segments.
    pub ended_ns: u64,
    /// How long a flow of datagrams may be silent.
    pub datagram_idle_ns: u64,
    /// The same before it was answered.
    pub datagram_opening_ns: u64,
    /// Number of the sweep.
    pub pass: u32,
    /// How long a connection may be silent that one side has ended and the other has not, in seconds.
    pub closing_s: u32,
}

/// `struct fragment_key`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct FragmentKey {
    /// Who sent the datagram.
    pub source: Address,
    /// To whom.
    pub destination: Address,
    /// Its number.
    pub id: u32,
    /// IP protocol.
    pub protocol: u8,
    /// Zero.
    pub zero: [u8; 3],
}

/// `struct fragment`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Fragment {
    /// When the first one was seen, coarse monotonic clock.
    pub seen_ns: u64,
    /// In place of the source or destination.
    pub address: Address,
    /// Where the others go.
    pub interface: u32,
    /// 1 out of the container, 0 into it.
    pub outwards: u32,
}

/// `struct way_back` after its first word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct WayBack {
    /// By which uplink.
    pub uplink: u32,
    /// 4 or 6.
    pub family: u32,
    /// The network's address.
    pub address: Address,
}

impl WayBack {
    /// The network of `address`, `prefix` bits long (counted in the address's own family), by `uplink`, and
    /// how many bits of it count.
    pub fn new(uplink: u32, address: IpAddr, prefix: u8) -> (u32, Self) {
        let (family, before) = if address.is_ipv4() { (4, 96) } else { (6, 0) };
        let way = Self {
            uplink,
            family,
            address: Address::from(address),
        };
        (64 + before + u32::from(prefix), way)
    }
}

/// `struct led_socket`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedSocket {
    /// Where it wanted.
    pub host: Address,
    /// The port there, network order.
    pub host_port: u16,
    /// Zero.
    pub zero: u16,
    /// The service's life.
    pub life: u32,
}

/// Led sockets of a [`LedSet`].
pub const LED_WAYS: usize = 8;

/// `struct led_set`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedSet {
    /// 0 where the place is free.
    pub cookie: [u64; LED_WAYS],
    /// Where they wanted.
    pub led: [LedSocket; LED_WAYS],
}

/// `struct led_peer_key`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedPeerKey {
    /// The socket.
    pub cookie: u64,
    /// Where it was led.
    pub container: Address,
    /// The port there, network order.
    pub container_port: u16,
    /// Zero.
    pub zero: [u8; 6],
}

/// `struct led_peer`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct LedPeer {
    /// Where it wanted.
    pub host: Address,
    /// The port there, network order.
    pub host_port: u16,
    /// Zero.
    pub zero: [u8; 6],
}

/// `struct node`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Node {
    /// Cookie of the host's network namespace; 0 keeps the hooks from acting.
    pub namespace: u64,
}

macro_rules! layout {
    ($type:ty, $size:literal $(, $field:ident = $offset:literal)* $(,)?) => {
        const _: () = assert!(size_of::<$type>() == $size);
        $(const _: () = assert!(offset_of!($type, $field) == $offset);)*
        // SAFETY: the type is `repr(C)` of integers and byte arrays: every bit pattern is valid,
        // and the assertions above and the fields' sizes leave no padding.
        unsafe impl Pod for $type {}
    };
}

layout!(Address, 16);
layout!(ServiceKey, 4, protocol = 2);
layout!(ClientNetwork, 32, mask = 16);
layout!(
    Service,
    312,
    target = 16,
    link_index = 32,
    life = 36,
    max_flows = 40,
    target_port = 44,
    flags = 46,
    networks = 47,
    network = 48,
    spacing_ns = 304,
);
layout!(
    FlowKey,
    40,
    client = 16,
    container_port = 32,
    client_port = 34,
    protocol = 36
);
layout!(
    Flow,
    48,
    host = 8,
    first_sequence = 24,
    uplink = 28,
    link_index = 32,
    life = 36,
    host_port = 40,
    flags = 42,
    mtu = 44,
);
layout!(
    PortCounters,
    48,
    packets_in = 8,
    bytes_in = 16,
    packets_out = 24,
    bytes_out = 32,
    refused = 40
);
layout!(Delivered, 16, bytes = 8);
layout!(Bridge, 16, learnt = 4, address = 8);
layout!(
    PortFlows,
    32,
    local = 8,
    next_ns = 16,
    pass = 24,
    counted = 28
);
layout!(
    SweepOrder,
    48,
    idle_ns = 8,
    ended_ns = 16,
    datagram_idle_ns = 24,
    datagram_opening_ns = 32,
    pass = 40,
    closing_s = 44
);
layout!(FragmentKey, 40, destination = 16, id = 32, protocol = 36);
layout!(Fragment, 32, address = 8, interface = 24, outwards = 28);
layout!(WayBack, 24, family = 4, address = 8);
layout!(LedSocket, 24, host_port = 16, life = 20);
layout!(LedSet, 256, led = 64);
layout!(LocalFlow, 96, flow = 40, taken = 88);
layout!(LedPeerKey, 32, container = 8, container_port = 24);
layout!(LedPeer, 24, host_port = 16);
layout!(Node, 8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_keep_their_family() {
        for text in ["10.1.2.3", "2001:db8::1", "0.0.0.0", "::"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(IpAddr::from(Address::from(address)), address);
        }
    }

    #[test]
    fn prefixes_become_masks() {
        let v4 = ClientNetwork::new("10.1.0.0".parse().unwrap(), 12);
        assert_eq!(v4.mask.0[..12], [0xff; 12]);
        assert_eq!(v4.mask.0[12..], [0xff, 0xf0, 0, 0]);
        let all = ClientNetwork::new("0.0.0.0".parse().unwrap(), 0);
        assert_eq!(all.mask.0[11..13], [0xff, 0], "IPv4 only");
        let v6 = ClientNetwork::new("2001:db8::".parse().unwrap(), 33);
        assert_eq!(v6.mask.0[..6], [0xff, 0xff, 0xff, 0xff, 0x80, 0]);
        let one = ClientNetwork::new("2001:db8::1".parse().unwrap(), 128);
        assert_eq!(one.mask.0, [0xff; 16]);
    }
}
