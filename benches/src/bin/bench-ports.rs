//! Service ports against peers, in namespaces: `make bench-ports`.
//!
//! Each round runs each load over each peer, one after the other, so that what else happens on the
//! machine hits neighbours alike; a ratio is the median of the ratios of the rounds. On a shared
//! machine judge by CPU per unit of work: it does not depend on who else runs.
//!
//! Prints tables; writes `ports.json` (samples included) and `ports.svg`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use benches::ports::{self, Options};
use clap::Parser;

fn main() -> ExitCode {
    benches::run(|stage| ports::run(&Options::parse(), stage))
}
