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
