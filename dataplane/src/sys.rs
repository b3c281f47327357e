//! Thin kernel interfaces: sockets, pipes and splice, netlink, descriptor limits, signals.
//!
//! Owns nothing by itself; each file wraps one interface of the kernel so that the rest of the
//! crate neither sees raw numbers nor needs `unsafe`. Invariant: what unsafe code this crate has
//! lives here (today none is needed: `rustix` and `nix` offer safe calls for all of it).

pub mod netlink;
pub mod pipe;
pub mod rlimit;
pub mod signal;
pub mod socket;
