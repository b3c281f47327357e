//! Moving the bytes of service ports between clients and containers.
//!
//! In: port specifications made by [`crate::link`]. Out: forwarded bytes and counters. The [`relay`]
//! has a listener for every port and forwards in this process; the kernel path ([`kernel_path`]) takes clients of
//! other hosts off it where it can.

pub mod kernel_path;
pub mod relay;
