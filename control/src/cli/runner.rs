//! `bai-agent runner …`: the published in-container runner packages of this node.

use crate::cli::output::{aside, say, say_part};
use std::path::{Path, PathBuf};

use anyhow::Error;
use clap::{Args, Subcommand};
use serde_json::json;

use super::exit::Problem;
use super::output::{self, Form, Table};
use crate::runner::{self, InstallOptions, WheelSource};

/// The commands on the runner packages.
#[derive(Debug, Subcommand)]
pub enum RunnerCommand {
    /// Install the published packages into a directory of their version; what is there stays.
    Install(InstallArgs),
    /// List the installed versions.
    List(PlaceArgs),
    /// Compare an installation with what was installed.
    Verify {
        #[command(flatten)]
        place: PlaceArgs,
        /// The version [default: the one new kernels get].
        #[arg(value_name = "VERSION")]
        version: Option<String>,
    },
    /// Remove versions that neither new kernels nor running containers use.
    Prune(PlaceArgs),
}

/// Where the packages are.
#[derive(Debug, Clone, Args)]
pub struct PlaceArgs {
    /// The directory of the installed versions [default: node.runner-dir of the configuration].
    #[arg(long, value_name = "DIRECTORY")]
    runner_dir: Option<PathBuf>,
}

/// Arguments of `runner install`.
#[derive(Debug, Args)]
pub struct InstallArgs {
    #[command(flatten)]
    place: PlaceArgs,
    /// Take the packages (wheels) from this directory instead of downloading them with pip.
    #[arg(long, value_name = "DIRECTORY")]
    wheels: Option<PathBuf>,
    /// The Python whose pip downloads.
    #[arg(long, default_value = "python3", conflicts_with = "wheels")]
    python: PathBuf,
    /// The architecture to install for.
    #[arg(long, default_value = std::env::consts::ARCH)]
    arch: String,
    /// Install again although this version is complete.
    #[arg(long)]
    force: bool,
}

/// Runs one command on the node's directory and, where it asks who uses a version, the node's engine.
pub async fn run(command: RunnerCommand, node: &config::Node, form: Form) -> Result<(), Problem> {
    let in_use = match &command {
        RunnerCommand::Prune(_) => Some(mounted_directories(node).await?),
        _ => None,
    };
    let configured = node.runner_dir.clone();
    tokio::task::spawn_blocking(move || work(command, configured, in_use, form))
        .await
        .map_err(|error| Problem::Other(error.into()))?
}

fn work(
    command: RunnerCommand,
    configured: PathBuf,
    in_use: Option<Vec<PathBuf>>,
    form: Form,
) -> Result<(), Problem> {
    let place = |given: PlaceArgs| given.runner_dir.unwrap_or(configured);
    match command {
        RunnerCommand::Install(args) => install(args, place, form),
        RunnerCommand::List(given) => list(&place(given), form),
        RunnerCommand::Verify {
            place: given,
            version,
        } => verify(&place(given), version, form),
        RunnerCommand::Prune(given) => prune(&place(given), &in_use.unwrap_or_default(), form),
    }
}

fn install(
    args: InstallArgs,
    place: impl FnOnce(PlaceArgs) -> PathBuf,
    form: Form,
) -> Result<(), Problem> {
    let mut options = InstallOptions::new(place(args.place));
    options.arch = args.arch;
    options.force = args.force;
    options.source = match args.wheels {
        Some(directory) => WheelSource::Directory(directory),
        None => WheelSource::Pip {
            python: args.python,
            arguments: Vec::new(),
        },
    };
    let done = runner::install(&options, |line| aside!("{line}")).map_err(Error::from)?;
    match form {
        Form::Json => output::json(
            &json!({ "version": done.version, "path": done.path, "fresh": done.fresh }),
        )?,
        Form::Text if done.fresh => {
            say!("installed {} in {}", done.version, done.path.display())
        }
        Form::Text => say!(
            "{} is installed already in {}",
            done.version,
            done.path.display()
        ),
    }
    Ok(())
}

fn list(directory: &Path, form: Form) -> Result<(), Problem> {
    let found = runner::list(directory).map_err(Error::from)?;
    if form == Form::Json {
        let found: Vec<_> = found.iter().map(|i| json!({ "version": i.version, "arch": i.arch, "path": i.path, "files": i.files, "bytes": i.bytes })).collect();
        return Ok(output::json(&json!({ "installations": found }))?);
    }
    let mut table = Table::new(&["VERSION", "ARCH", ">FILES", ">SIZE", "PATH"]);
    for installation in found {
        table.row([
            installation.version,
            installation.arch,
            installation.files.to_string(),
            output::bytes(installation.bytes),
            installation.path.display().to_string(),
        ]);
    }
    say_part!("{}", table.render());
    Ok(())
}

fn verify(directory: &Path, version: Option<String>, form: Form) -> Result<(), Problem> {
    let version = version.unwrap_or_else(|| runner::pinned_version(std::env::consts::ARCH));
    let report = runner::verify(directory, &version).map_err(Error::from)?;
    let problems = &report.problems;
    match form {
        Form::Json => output::json(
            &json!({ "version": version, "checked": report.checked, "problems": problems }),
        )?,
        Form::Text => {
            say!(
                "{version}: {} files checked, {} problems",
                report.checked,
                problems.len()
            );
            problems.iter().for_each(|problem| say!("  {problem}"));
            if !problems.is_empty() {
                say!("Install it again: bai-agent runner install --force");
            }
        }
    }
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Problem::Findings),
    }
}

/// A version of which somebody uses a directory stays.
fn prune(directory: &Path, in_use: &[PathBuf], form: Form) -> Result<(), Problem> {
    let keep = runner::pinned_version(std::env::consts::ARCH);
    let removed = runner::prune(directory, &[&keep], |path| {
        in_use.iter().any(|used| used.starts_with(path))
    })
    .map_err(Error::from)?;
    match form {
        Form::Json => output::json(&json!({ "removed": removed }))?,
        Form::Text => removed.iter().for_each(|version| say!("removed {version}")),
    }
    Ok(())
}

/// Host directories that some container mounts, running or not: a stopped kernel may be restarted.
async fn mounted_directories(node: &config::Node) -> Result<Vec<PathBuf>, Problem> {
    use crate::docker::{Docker, DockerOptions};
    let unavailable = |error: crate::docker::DockerError| {
        Problem::Unavailable(
            Error::new(error)
                .context("without the engine it is unknown which versions running kernels use"),
        )
    };
    let options = DockerOptions {
        host: node.engine.host.clone(),
        ..DockerOptions::default()
    };
    let docker = Docker::connect(&options).await.map_err(unavailable)?;
    let containers = docker
        .list_containers(true, None)
        .await
        .map_err(unavailable)?;
    Ok(containers
        .into_iter()
        .flat_map(|container| container.mounts.unwrap_or_default())
        .filter_map(|mount| mount.source)
        .map(PathBuf::from)
        .collect())
}
