//! `bai-agent run`: the agent in the foreground.

use std::io::IsTerminal;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use config::{Config, LogFormat, LogLevel};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing_subscriber::EnvFilter;

use super::connection::Source;
use super::exit::Problem;

/// Threads for async work. It waits nearly all the time, and a big node's processors belong to its
/// kernels: a thread for each of 256 of them would cost memory and wake-ups only.
const MOST_WORKERS: usize = 4;

/// Arguments of `run` and `watcher`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Log what is done in detail; the same as --log-level DEBUG, and stronger than it.
    #[arg(long)]
    debug: bool,
    /// Lowest level that is logged, instead of the configured one (logging.level); NOTSET is the configured one.
    #[arg(long, value_name = "LEVEL", ignore_case = true, value_parser = levels())]
    log_level: Option<LogLevel>,
}

impl RunArgs {
    /// The level that is logged where `configured` is the configuration's.
    fn level(&self, configured: LogLevel) -> LogLevel {
        match (self.debug, self.log_level) {
            (true, _) => LogLevel::Debug,
            (false, None | Some(LogLevel::NotSet)) => configured,
            (false, Some(level)) => level,
        }
    }
}

/// Takes the words of `logging.level`.
fn levels() -> impl TypedValueParser<Value = LogLevel> {
    PossibleValuesParser::new(LogLevel::all().map(LogLevel::word)).try_map(|word| {
        let mut all = LogLevel::all();
        all.find(|level| level.word().eq_ignore_ascii_case(&word))
            .ok_or("no level is called so")
    })
}

/// Loads the configuration and begins the log, as every service of this program does.
pub(super) fn begin(
    args: &RunArgs,
    source: &Source,
    load: impl FnOnce(&config::LoadOptions) -> Result<config::Loaded, config::Errors>,
) -> Result<(config::LoadOptions, config::Loaded), Problem> {
    let options = source.options();
    let loaded = load(&options)?;
    shared::heap::one_arena();
    start_log(args, &loaded.config)?;
    Ok((options, loaded))
}

/// Raises the soft limit of descriptors to the hard one: each kernel takes two and each call of a peer one. What
/// containers are given goes by the hard one, which stays.
fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if raised != limit
        && let Err(err) = setrlimit(Resource::Nofile, raised)
    {
        tracing::warn!(%err, soft = limit.current, hard = limit.maximum,
            "cannot raise the limit of open files; many kernels may not find room in it: raise LimitNOFILE");
    }
}

/// Loads the configuration and runs until told to stop.
pub fn run(args: &RunArgs, source: &Source) -> Result<(), Problem> {
    let (options, loaded) = begin(args, source, config::load)?;
    raise_descriptors();
    for note in loaded.render_notes().lines() {
        tracing::warn!("{note}");
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .worker_threads(processors.min(MOST_WORKERS))
        .thread_name("control")
        .build()?;
    let outcome = runtime.block_on(crate::app::run(loaded, Arc::new(options)));
    // A driver or disk call that never returns must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(3));
    match outcome {
        Ok(()) | Err(crate::app::AppError::Interrupted) => Ok(()),
        Err(err) if err.is_of_configuration() => Err(Problem::Config(err.into())),
        Err(err) => Err(Problem::Unavailable(err.into())),
    }
}

fn start_log(args: &RunArgs, config: &Config) -> Result<(), Problem> {
    let level = args.level(config.logging.level).directive();
    let directives = format!("warn,control={level},bai_agent={level}");
    let filter = match std::env::var("RUST_LOG") {
        Ok(given) if !given.is_empty() => EnvFilter::try_new(given),
        _ => EnvFilter::try_new(directives),
    }
    .context("RUST_LOG can not be used; write it as control=debug,control::rpc=trace")
    .map_err(Problem::Usage)?;
    let colour = config
        .logging
        .console_colored
        .unwrap_or_else(|| std::io::stderr().is_terminal());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell of a log that can't be written on the same standard error, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(colour);
    let started = match config.logging.console_format {
        LogFormat::Simple => builder.compact().try_init(),
        LogFormat::Verbose => builder.try_init(),
    };
    started.map_err(|err| Problem::Other(anyhow::anyhow!("the log cannot be started: {err}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_wins_over_the_configured_level() {
        for (debug, log_level, level) in [
            (false, None, LogLevel::Warning),
            (false, Some(LogLevel::NotSet), LogLevel::Warning),
            (false, Some(LogLevel::Error), LogLevel::Error),
            (false, Some(LogLevel::Trace), LogLevel::Trace),
            (true, None, LogLevel::Debug),
            (true, Some(LogLevel::NotSet), LogLevel::Debug),
            (true, Some(LogLevel::Error), LogLevel::Debug),
        ] {
            let args = RunArgs { debug, log_level };
            assert_eq!(args.level(LogLevel::Warning), level, "{args:?}");
        }
        let everything = RunArgs {
            debug: false,
            log_level: None,
        };
        assert_eq!(everything.level(LogLevel::NotSet).directive(), "trace");
    }
}
