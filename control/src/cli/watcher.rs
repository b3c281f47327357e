//! `bai-agent watcher`: the watcher in the foreground.

use super::connection::Source;
use super::exit::Problem;
use super::run::{RunArgs, begin};

/// Loads the configuration and runs until told to stop.
pub fn run(args: &RunArgs, source: &Source) -> Result<(), Problem> {
    let (_, loaded) = begin(args, source, config::load_but_for_names)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(crate::watcher::run(loaded.config.clone()));
    // A mount that never returns must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(3));
    match outcome {
        Ok(()) => Ok(()),
        Err(err) if err.is_of_configuration() => Err(Problem::Config(err.into())),
        Err(err) => Err(Problem::Unavailable(err.into())),
    }
}
