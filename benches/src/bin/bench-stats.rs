//! Statistics of many containers, against other ways to get them: `make bench-stats`.
//!
//! Each container is a cgroup with a process that works between any two ticks, and a link of its own.
//! Ours is a pass of the collector with all metrics (CPU, memory, tasks, IO, network) and its write to
//! the region. Each tick every native way reads once, in turn, each after the containers have worked.
//! CPU is that of the reading thread (getrusage); raw samples are in `stats.json`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use benches::stats::{self, Options};
use clap::Parser;

fn main() -> ExitCode {
    let options = Options::parse();
    if options.member {
        return stats::crowd::work();
    }
    benches::run(move |stage| stats::run(&options, stage))
}
