//! `bai-agent detach`: nothing that acts on the host without us stays. Refuses while one of the programs runs.
//! Sockets of containers below `agent.ipc-base-path` stay, with the containers that have them mounted.

use crate::cli::output::say;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use config::{Config, Loaded};
use nix::unistd::Uid;
use serde_json::json;
use shared::lock::writer_of;
use shared::run_dir::RunDir;

use super::exit::Problem;
use super::output::{self, Form};
use crate::metadata::redirect;

const DATAPLANE: &str = "bai-dataplane";

/// Without root nothing is seen of what root's programs have left, which would pass for nothing. Who names his own
/// run directory has his own programs.
fn refuse_without_root(loaded: &Loaded) -> Result<(), Problem> {
    if Uid::effective().is_root() || loaded.is_written("node", "run-dir") {
        return Ok(());
    }
    Err(Problem::Refused {
        method: "detach".to_owned(),
        class: "not root".to_owned(),
        repr: "what root's programs have left can't be seen; run this again as root, or write the node.run-dir of \
               this user's own programs into the configuration"
            .to_owned(),
    })
}

/// Removes this agent's regions and doorbells, and has the dataplane remove its kernel hooks.
pub fn run(loaded: &Loaded, form: Form) -> Result<(), Problem> {
    refuse_without_root(loaded)?;
    let config = &*loaded.config;
    let place = RunDir::choose(Some(&config.node.run_dir), &config.agent.id)
        .map_err(|error| Problem::Other(error.into()))?;
    refuse_if_running(&place.control(), "bai-agent")?;
    refuse_if_running(&place.dataplane(), DATAPLANE)?;
    let hooks = detach_dataplane(config)?;
    let redirected = super::short_lived(async {
        let removed = redirect::remove(&config.agent.id).await;
        removed.map_err(|err| {
            Problem::Other(anyhow::Error::new(err).context(format!(
                "the rules of node.metadata-redirect stay; run this again as root, or remove chain {} of table nat",
                redirect::chain_of(&config.agent.id)
            )))
        })
    })?;
    let root = place.root();
    let existed = root.exists();
    if existed {
        std::fs::remove_dir_all(root)?;
    }
    match form {
        Form::Json => output::json(
            &json!({ "removed": existed.then_some(root), "dataplane": hooks, "metadata_redirect": redirected }),
        )?,
        Form::Text => {
            say!(
                "{}",
                if existed {
                    format!("removed {}", root.display())
                } else {
                    "there was nothing to remove".to_owned()
                }
            );
            if redirected {
                say!("removed the rules of node.metadata-redirect");
            }
            if !hooks {
                say!(
                    "{DATAPLANE} was not found beside this program or in PATH, so kernel hooks were not looked for"
                );
            }
        }
    }
    Ok(())
}

fn refuse_if_running(directory: &Path, program: &str) -> Result<(), Problem> {
    let Some(holder) = writer_of(directory).map_err(|error| Problem::Other(error.into()))? else {
        return Ok(());
    };
    let pid = holder
        .pid
        .map_or_else(|| "unknown pid".to_owned(), |pid| format!("pid {pid}"));
    Err(Problem::Refused {
        method: "detach".to_owned(),
        class: "running".to_owned(),
        repr: format!("{program} ({pid}) still runs; stop it first"),
    })
}

/// Id and place themselves: left to find the configuration on its own, the dataplane might find another one.
fn handed_on(config: &Config) -> [OsString; 5] {
    [
        "detach".into(),
        "--agent-id".into(),
        config.agent.id.clone().into(),
        "--run-dir".into(),
        config.node.run_dir.clone().into(),
    ]
}

/// The dataplane alone knows what it hooked into the kernel. False when its program is not on this host.
fn detach_dataplane(config: &Config) -> Result<bool, Problem> {
    let beside: Option<PathBuf> = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join(DATAPLANE)))
        .filter(|path| path.exists());
    let program = beside.unwrap_or_else(|| PathBuf::from(DATAPLANE));
    match Command::new(program).args(handed_on(config)).output() {
        Ok(output) if output.status.success() => Ok(true),
        Ok(output) => Err(Problem::Other(anyhow::anyhow!(
            "{DATAPLANE} detach failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dataplane_is_told_which_node_it_is_about() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = directory.path().display().to_string();
        let file = directory.path().join("agent.toml");
        let text = format!("[agent]\nid = 'worker-17'\n[node]\nrun-dir = '{place}'\n");
        std::fs::write(&file, text).unwrap();
        let options = config::LoadOptions::of_this_process(Some(file), true);
        let loaded = config::load(&options).unwrap();
        assert_eq!(
            handed_on(&loaded.config),
            ["detach", "--agent-id", "worker-17", "--run-dir", &place].map(OsString::from)
        );
    }
}
