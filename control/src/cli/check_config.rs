//! `bai-agent check-config`: the effective configuration, and where each value came from.

use crate::cli::output::say_part;
use std::sync::Arc;

use clap::Args;
use config::{Host, Loaded, Note, NoteKind};

use super::connection::Source;
use super::exit::Problem;
use super::output::Form;
use crate::causes::chain;
use crate::kernel::container_request::{override_files, override_part};

/// Arguments of `check-config`.
#[derive(Debug, Args)]
pub struct CheckConfigArgs {
    /// Say nothing when all is well.
    #[arg(short, long)]
    quiet: bool,
    /// Also read what the cluster's etcd sets, as a start would, and show it.
    #[arg(long)]
    with_etcd: bool,
}

/// Loads the configuration and prints it, or every error in it.
pub fn run(args: &CheckConfigArgs, source: &Source, form: Form) -> Result<(), Problem> {
    // Said here: where a flag of all commands stands before the command, the parser compares nothing.
    if args.with_etcd && source.standalone {
        return Err(Problem::Usage(anyhow::anyhow!(
            "--with-etcd asks a cluster's etcd, and --standalone is for a node without a cluster; leave one of them out"
        )));
    }
    let options = Arc::new(source.options());
    let mut loaded = config::load(&options)?;
    if args.with_etcd {
        let look = crate::cluster::look(options.clone(), &loaded.config);
        loaded = super::short_lived(async {
            let looked = look.await;
            looked.map_err(|err| Problem::Unavailable(err.into()))
        })?;
    }
    note_overrides(&mut loaded, &*options.host);
    if !args.quiet {
        match form {
            Form::Text => say_part!("{}", loaded.render_text()),
            Form::Json => super::output::json(&loaded.render_json())?,
        }
    }
    Ok(())
}

/// Tells of files with container options that would fail each creation.
fn note_overrides(loaded: &mut Loaded, host: &dyn Host) {
    let files = override_files(host.home().as_deref(), &host.working_directory());
    for file in files {
        if let Err(err) = override_part(&file) {
            loaded.notes.push(Note {
                kind: NoteKind::Warning,
                line: None,
                key: "agent-docker-container-opts.json".to_owned(),
                text: format!("cannot be used: {}", chain(&err)),
            });
        }
    }
}
