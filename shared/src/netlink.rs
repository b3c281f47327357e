//! Numbers of the kernel's netlink that both processes use: its ABI, which never changes.

/// linux/netlink.h: a message that ends a question, with its error or none.
pub const NLMSG_ERROR: u16 = 2;
/// The end of a list.
pub const NLMSG_DONE: u16 = 3;
/// Flag: a question.
pub const NLM_F_REQUEST: u16 = 0x01;
/// Flag: more messages follow.
pub const NLM_F_MULTI: u16 = 0x02;
/// Flag: the table changed during the dump; something may be missing from it.
pub const NLM_F_DUMP_INTR: u16 = 0x10;
/// Flag: all there are are asked for.
pub const NLM_F_DUMP: u16 = 0x300;
/// An attribute's type without its two top bits, which are flags (nested, byte order).
pub const NLA_TYPE_MASK: u16 = 0x3fff;

/// linux/rtnetlink.h: a link that is there.
pub const RTM_NEWLINK: u16 = 16;
/// Asks for links.
pub const RTM_GETLINK: u16 = 18;
/// An id of a network namespace.
pub const RTM_NEWNSID: u16 = 88;
/// Asks for the id.
pub const RTM_GETNSID: u16 = 90;
/// A list without counters.
pub const RTEXT_FILTER_SKIP_STATS: u32 = 1 << 3;

/// linux/if_link.h, an attribute of a link: its name.
pub const IFLA_IFNAME: u16 = 3;
/// Index of its other end.
pub const IFLA_LINK: u16 = 5;
/// Index of its bridge.
pub const IFLA_MASTER: u16 = 10;
/// What kind of virtual link it is, and more of that kind.
pub const IFLA_LINKINFO: u16 = 18;
/// Within that, the kind's name.
pub const IFLA_INFO_KIND: u16 = 1;
/// What the answer is to leave out.
pub const IFLA_EXT_MASK: u16 = 29;
/// The namespace of its other end, when that is another one.
pub const IFLA_LINK_NETNSID: u16 = 37;
/// The namespace that is asked about.
pub const IFLA_TARGET_NETNSID: u16 = 46;

/// linux/net_namespace.h, an attribute of a namespace: its id.
pub const NETNSA_NSID: u16 = 1;
/// A process in it.
pub const NETNSA_PID: u16 = 2;

/// linux/if_arp.h: hardware that others are reached by.
const REACHES_OTHERS: [u16; 2] = [1, 32]; // ARPHRD_ETHER, ARPHRD_INFINIBAND

/// Whether a container is by this link of its namespace on a network that this host has no other end of: macvlan,
/// ipvlan or a VLAN of a link elsewhere, or a device that was given to it. `kind` is empty for a device, `hardware` its
/// type as `struct ifinfomsg` has it; `elsewhere` tells that the link below is in another namespace.
#[must_use]
pub fn is_past_host(kind: &[u8], hardware: u16, elsewhere: bool) -> bool {
    let name = kind.strip_suffix(&[0]).unwrap_or(kind);
    match name {
        b"" => REACHES_OTHERS.contains(&hardware),
        b"macvlan" | b"macvtap" | b"ipvlan" | b"ipvtap" | b"vlan" | b"ipoib" => elsewhere,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_past_the_host_are_known_by_their_kind() {
        let past =
            |kind: &str, hardware, elsewhere| is_past_host(kind.as_bytes(), hardware, elsewhere);
        assert!(past("macvlan\0", 1, true) && past("ipvlan", 1, true) && past("vlan\0", 1, true));
        assert!(!past("macvlan\0", 1, false), "upon one of its own");
        assert!(
            !past("veth\0", 1, true) && !past("bridge\0", 1, false) && !past("tun\0", 1, false)
        );
        assert!(past("", 1, false) && past("", 32, false), "a device");
        assert!(!past("", 772, false), "the loopback");
    }
}
