//! Moving the bytes of service ports between clients and containers.
//!
//! In: port specifications made by [`crate::link`]. Out: forwarded bytes and counters. This
//! version has one path, the [`relay`]; the kernel path joins it beside this file.

pub mod relay;
