//! The `bai-dataplane` program: arguments, configuration, logs, exit code.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use config::{
    Config, Forward, KernelAttach, LoadOptions, LogFormat, Logging, RelayEngine, RelayFrom,
};
use dataplane::accelerator;
use dataplane::app::{self, AppError, Options};

use dataplane::detach;
use dataplane::forward::kernel_path::AttachMethod;
use dataplane::forward::relay::Engine;
use dataplane::link::Defaults;
use dataplane::sys::signal;
use nix::unistd::Uid;
use shared::causes::chain;
use shared::desired::ClientNetwork;
use tracing_subscriber::EnvFilter;

/// Exit codes of sysexits(3): a wrong command line ...
const EX_USAGE: u8 = 64;
/// ... a fault of the configuration ...
const EX_CONFIG: u8 = 78;
/// ... a resource held by someone else, try again later ...
const EX_TEMPFAIL: u8 = 75;
/// ... and anything else.
const EX_SOFTWARE: u8 = 70;

const EXIT_CODES: &str = "\
Exit codes: 0 done; 64 wrong usage; 70 an internal error; 75 another process has this node's place (agent.id, \
node.run-dir), or detach could not remove everything; 78 a wrong configuration.";

/// Forwards service ports and gathers statistics of a Backend.AI worker node.
#[derive(Debug, Parser)]
#[command(name = "bai-dataplane", version, about, after_help = EXIT_CODES)]
struct Arguments {
    /// The agent's configuration file [default: the places where the agent looks].
    #[arg(
        short = 'f',
        long,
        global = true,
        value_name = "FILE",
        visible_alias = "config-path"
    )]
    config: Option<PathBuf>,
    /// The node is on its own: no etcd, no bus, no manager. Only a file that is named is read then.
    #[arg(long, global = true)]
    standalone: bool,
    /// Log what is done in detail; RUST_LOG says it more finely.
    #[arg(long, global = true)]
    debug: bool,
    /// NVIDIA's management library: a name the loader knows, or a path.
    #[arg(long, env = "BAI_NVML_LIBRARY", value_name = "FILE", default_value = accelerator::nvml::LIBRARY)]
    nvml_library: OsString,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Remove what a dataplane that is not running has left on this host.
    Detach(DetachArguments),
}

/// Whose leavings are removed. With both given no configuration is read.
#[derive(Debug, clap::Args)]
struct DetachArguments {
    /// The agent whose dataplane it was [default: agent.id of the configuration].
    #[arg(long, value_name = "ID", requires = "run_dir")]
    agent_id: Option<String>,
    /// Where its regions are [default: node.run-dir of the configuration].
    #[arg(long, value_name = "DIR", requires = "agent_id")]
    run_dir: Option<PathBuf>,
}

fn main() -> ExitCode {
    shared::heap::one_arena();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            // Help and version are no errors.
            return if error.use_stderr() {
                ExitCode::from(EX_USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    // Who names both needs no file, which may be faulty by now.
    if let Some(Command::Detach(DetachArguments {
        agent_id: Some(agent_id),
        run_dir: Some(run_dir),
    })) = &arguments.command
    {
        return detach(run_dir, agent_id);
    }
    let mut options = LoadOptions::of_this_process(arguments.config.clone(), arguments.standalone);
    // What it would run with need not be so for this user.
    options.only_looks = arguments.command.is_some();
    // The agent alone listens at addresses that may be names.
    let loaded = match config::load_but_for_names(&options) {
        Ok(loaded) => loaded,
        Err(errors) => {
            eprintln!("bai-dataplane: {errors}");
            return ExitCode::from(EX_CONFIG);
        }
    };
    let level = if arguments.debug {
        "debug"
    } else {
        loaded.config.logging.level.directive()
    };
    let given = std::env::var("RUST_LOG").ok().filter(|it| !it.is_empty());
    let filter = match given.map(EnvFilter::try_new) {
        None => EnvFilter::new(level),
        Some(Ok(filter)) => filter,
        Some(Err(err)) => {
            eprintln!(
                "bai-dataplane: RUST_LOG can not be used; write it as dataplane=debug,dataplane::forward=trace: {err}"
            );
            return ExitCode::from(EX_USAGE);
        }
    };
    start_log(&loaded.config.logging, filter);
    match arguments.command {
        None => run(&loaded.config, arguments.nvml_library),
        // Of root's it would see nothing, and say that nothing is left.
        Some(Command::Detach(_))
            if !Uid::effective().is_root() && !loaded.is_written("node", "run-dir") =>
        {
            eprintln!(
                "bai-dataplane: what root's has left can't be seen; run this again as root, or write the node.run-dir of \
                 this user's own programs into the configuration"
            );
            ExitCode::from(EX_TEMPFAIL)
        }
        Some(Command::Detach(_)) => detach(&loaded.config.node.run_dir, &loaded.config.agent.id),
    }
}

fn start_log(logging: &Logging, filter: EnvFilter) {
    let colour = logging
        .console_colored
        .unwrap_or_else(|| std::io::stderr().is_terminal());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would tell of a log that can't be written on the same standard error, and panic.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(colour);
    match logging.console_format {
        LogFormat::Simple => builder.compact().init(),
        LogFormat::Verbose => builder.init(),
    }
}

fn detach(run_dir: &Path, agent_id: &str) -> ExitCode {
    match detach::detach(Some(run_dir), agent_id) {
        Ok(removed) => {
            for directory in &removed {
                println!("removed {}", directory.display());
            }
            if removed.is_empty() {
                println!("nothing of the dataplane was left");
            }
            ExitCode::SUCCESS
        }
        Err(err) => fail(&err, EX_TEMPFAIL),
    }
}

fn run(config: &Config, nvml_library: OsString) -> ExitCode {
    // Before any thread exists, so that all of them leave the signals to the main loop.
    let signals = match signal::block() {
        Ok(signals) => signals,
        Err(errno) => return fail(&errno, EX_SOFTWARE),
    };
    match app::run(&options(config, nvml_library), signals) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err @ (AppError::Lock(_) | AppError::LockLost(_))) => fail(&err, EX_TEMPFAIL),
        Err(err @ AppError::RunDir(_)) => fail(&err, EX_CONFIG),
        Err(err) => fail(&err, EX_SOFTWARE),
    }
}

fn options(config: &Config, nvml_library: OsString) -> Options {
    let limits = &config.node.dataplane;
    let range = config.container.port_range;
    Options {
        run_dir: Some(config.node.run_dir.clone()),
        agent_id: config.agent.id.clone(),
        max_containers: config.node.max_containers,
        max_ports: u32::from(range.last.saturating_sub(range.first)) + 1,
        defaults: Defaults {
            allowed: config
                .node
                .allowed_clients
                .iter()
                .map(|it| ClientNetwork {
                    address: it.address,
                    prefix: it.prefix,
                })
                .collect(),
            max_sessions: limits.max_sessions_per_port,
            total_sessions: limits.max_sessions,
            idle_timeout: limits.idle_timeout,
            connect_timeout: limits.connect_timeout,
            drain: limits.drain,
            sample_interval: limits.stats_interval,
        },
        scratch_root: Some(config.container.scratch_root.clone()),
        relay_threads: 0,
        relay_engine: match config.node.relay_engine {
            RelayEngine::Auto | RelayEngine::Splice => Engine::Splice,
            RelayEngine::Uring => Engine::Uring,
        },
        relay_inside: config.node.relay_from == RelayFrom::Container,
        kernel_path: match (config.node.forward, config.node.kernel_attach) {
            (Forward::Relay, _) => None,
            (Forward::Auto, KernelAttach::Auto) => Some(AttachMethod::Auto),
            (Forward::Auto, KernelAttach::Filters) => Some(AttachMethod::Filters),
        },
        accelerators: accelerator::Options {
            nvml_library,
            root: config.node.accelerators.device_root.clone(),
            tpu_runtime: match config.node.accelerators.tpu_metrics_port {
                0 => None,
                port => Some((Ipv4Addr::LOCALHOST, port).into()),
            },
        },
    }
}

/// Says what went wrong and why, cause by cause.
fn fail(err: &dyn std::error::Error, code: u8) -> ExitCode {
    eprintln!("bai-dataplane: {}", chain(err));
    ExitCode::from(code)
}
