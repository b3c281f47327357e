//! Publishing service ports, by rows and by the engine: `make bench-publish`.
//!
//! Rows: from writing 100 of them to the last acknowledgement, then every port must answer.
//! Containers: start and stop with ports of the engine's and of ours, in turn, under a private
//! engine in a namespace, so that no other rule than those asked for is there.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use benches::publish::{self, Options};
use clap::Parser;

fn main() -> ExitCode {
    benches::run(|stage| publish::run(&Options::parse(), stage))
}
