//! The command line of bai-agent. What is parsed here is resolved and carried out in the modules below.

mod check_config;
mod connection;
mod detach;
mod doctor;
mod exit;
mod kernel;
mod manuals;
mod output;
mod region;
mod run;
mod runner;
mod stats;
mod status;
mod top;
mod watcher;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use connection::{Connection, Source};
use exit::Problem;
use output::Form;

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 refused by the agent, or a check found something; 64 wrong usage; 69 the agent or the engine \
does not answer; 70 an internal error; 74 done, but the output could not be written; 78 a wrong configuration. \
`kernel exec` ends with the command's own code.";

/// The worker-node agent of a Backend.AI cluster.
#[derive(Debug, Parser)]
#[command(name = "bai-agent", version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    source: Source,
    /// The form of the output.
    #[arg(short, long, global = true, value_enum, default_value_t)]
    output: Form,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, for a moment")]
enum Command {
    /// Run the agent in the foreground.
    Run(run::RunArgs),
    /// Run the watcher, by which managers start and stop the agent's unit and mount volumes.
    Watcher(run::RunArgs),
    /// Check a configuration and show each value with its origin.
    CheckConfig(check_config::CheckConfigArgs),
    /// Create, use and destroy kernels by hand.
    Kernel {
        #[command(flatten)]
        connection: Connection,
        #[command(subcommand)]
        command: kernel::KernelCommand,
    },
    /// Install and look after the in-container runner packages.
    #[command(subcommand)]
    Runner(runner::RunnerCommand),
    /// Show whether the node is well.
    Status(Connection),
    /// Show each service port, what serves it and, if nothing does, why.
    Ports(Connection),
    /// Show the last samples of kernels, devices and the node, straight from the shared region.
    Stats,
    /// Watch kernels, ports, devices and the node in the terminal.
    Top(top::TopArgs),
    /// Check the host and say what to do about each finding.
    Doctor,
    /// Remove what a stopped agent and dataplane have left on this host: regions, doorbells, kernel hooks.
    Detach,
    /// Print a completion script for a shell.
    Completions { shell: Shell },
    /// Print the manual page, or write one per command into a directory.
    Man {
        /// Where the pages are written; it is made where it is missing.
        directory: Option<PathBuf>,
    },
}

/// Parses the command line and carries it out.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            output::written(error.print());
            // Help and version are no errors.
            let code = if error.use_stderr() { 64 } else { 0 };
            return exit::told(code);
        }
    };
    match cli.carry_out() {
        Ok(code) => exit::told(code),
        Err(problem) => problem.report(),
    }
}

/// A runtime for a command that talks to the agent and ends.
fn short_lived<T>(work: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

impl Cli {
    fn carry_out(self) -> Result<u8, Problem> {
        let (source, form) = (self.source, self.output);
        match self.command {
            Command::Run(args) => run::run(&args, &source)?,
            Command::Watcher(args) => watcher::run(&args, &source)?,
            Command::CheckConfig(args) => check_config::run(&args, &source, form)?,
            Command::Kernel {
                connection,
                command,
            } => {
                let way = connection.way(&source)?;
                return short_lived(kernel::run(command, &way, form)).map(|status| status.0);
            }
            Command::Runner(command) => {
                let config = source.load()?.config;
                short_lived(runner::run(command, &config.node, form))?;
            }
            Command::Status(connection) => {
                let way = connection.way(&source)?;
                // A node that was named is not the one of the configuration.
                let own = connection.address.is_none().then(|| source.load().ok());
                let config = own.flatten().map(|loaded| loaded.config);
                short_lived(status::status(&way, config.as_deref(), form))?;
            }
            Command::Ports(connection) => {
                short_lived(status::ports(&connection.way(&source)?, form))?;
            }
            Command::Stats => stats::run(&source.load()?.config, form)?,
            Command::Top(args) => top::run(&args, &source.load()?.config)?,
            Command::Doctor => {
                short_lived(doctor::run(&source.load()?, source.standalone, form))?;
            }
            Command::Detach => {
                detach::run(&source.load()?, form)?;
            }
            Command::Completions { shell } => {
                manuals::completions(shell, &mut Cli::command())?;
            }
            Command::Man { directory } => manuals::man(&Cli::command(), directory.as_deref())?,
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_command_after_two_dashes_is_taken_as_it_is() {
        let cli = Cli::try_parse_from([
            "bai-agent",
            "kernel",
            "exec",
            "abc",
            "--",
            "ls",
            "-l",
            "--output",
            "x",
        ])
        .unwrap();
        assert_eq!(cli.output, Form::Text);
        assert!(matches!(
            cli.command,
            Command::Kernel {
                command: kernel::KernelCommand::Exec(_),
                ..
            }
        ));
    }
}
