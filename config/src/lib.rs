//! Agent configuration.
#![forbid(unsafe_code)]
