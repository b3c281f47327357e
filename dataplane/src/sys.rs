//! Thin kernel interfaces: sockets, pipes and splice, io_uring, netlink, BPF, clocks, descriptor limits, project quotas,
//! signals; and what NVML's binding leaves out.
//!
//! Owns nothing by itself; each file wraps one interface so that the rest of the crate neither sees
//! raw numbers nor needs `unsafe`. Invariant: what unsafe code this crate has lives here ([`bpf`] and
//! [`nvml`] have the calls that no crate offers).

pub mod bpf;
pub mod btf;
pub mod clock;
pub mod datagram;
pub mod iterator;
pub mod netlink;
pub mod netns;
pub mod nvml;
pub mod pipe;
pub mod quota;
pub mod rlimit;
pub mod signal;
pub mod socket;
pub mod uring;
