//! The `bai-agent` program.
#![forbid(unsafe_code)]

fn main() {}
