//! Loading a configuration, as the daemons see it: keys, aliases, environment, faults, places.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod faults;
mod host;
mod keys;
mod notes;
mod overlay;
mod search_paths;
mod secrets;
mod standalone;
