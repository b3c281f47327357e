//! A process of the two-process tests: writes a region without pause, or reads one without pause,
//! until it is killed. `region-exerciser write-desired|write-observed|read-desired|read-observed DIRECTORY`.
//!
//! Every batch stamps all rows with one number, so that a reader can tell rows of different batches
//! apart. Exit code 2: the directory has another writer (who is on standard error); 3: a reader saw
//! something that must never be seen.

#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use harness::regions::{self, Watch};
use shared::desired::DesiredWriter;
use shared::observed::ObservedWriter;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, mode, directory] = arguments.as_slice() else {
        eprintln!("usage: region-exerciser MODE DIRECTORY");
        return ExitCode::from(64);
    };
    let directory = Path::new(directory);
    let outcome = match mode.as_str() {
        "write-desired" => write_desired(directory),
        "write-observed" => write_observed(directory),
        "read-desired" => return read(Watch::desired(directory)),
        "read-observed" => return read(Watch::observed(directory)),
        other => {
            eprintln!("unknown mode {other}");
            return ExitCode::from(64);
        }
    };
    match outcome {
        Ok(never) => match never {},
        Err(err) => {
            eprintln!("{err:#}");
            ExitCode::from(2)
        }
    }
}

fn write_desired(directory: &Path) -> anyhow::Result<std::convert::Infallible> {
    let mut writer = DesiredWriter::open(directory, regions::SIZES)?;
    let node = writer.snapshot()?.node.unwrap_or_default();
    let repairs = node.drain_ms + u32::from(regions::repaired(writer.start()));
    let mut number = u64::from(node.sample_interval_ms);
    loop {
        number += 1;
        writer.batch(|batch| regions::fill_desired(batch, number, repairs))?;
    }
}

fn write_observed(directory: &Path) -> anyhow::Result<std::convert::Infallible> {
    let mut writer = ObservedWriter::open(directory, regions::SIZES)?;
    let mut reader = shared::observed::ObservedReader::open(directory)?;
    let node = reader.snapshot()?.node.clone().unwrap_or_default();
    let repairs = node.taken_wall_ns + u64::from(regions::repaired(writer.start()));
    let mut number = node.tick;
    loop {
        number += 1;
        writer.batch(|batch| regions::fill_observed(batch, number, repairs))?;
    }
}

fn read(mut watch: Watch) -> ExitCode {
    loop {
        if let Err(seen) = watch.look() {
            eprintln!("{seen}");
            return ExitCode::from(3);
        }
    }
}
