//! Test harness.
#![forbid(unsafe_code)]
