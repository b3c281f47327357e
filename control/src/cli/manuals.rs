//! `bai-agent completions` and `bai-agent man`: made from the same definitions as the help.

use std::path::{Path, PathBuf};

use clap::Command;
use clap_complete::Shell;

use super::exit::Problem;

/// Prints a completion script.
pub fn completions(shell: Shell, command: &mut Command) {
    let name = command.get_name().to_owned();
    clap_complete::generate(shell, command, name, &mut std::io::stdout());
}

/// Prints the manual page, or writes one for each command into a directory.
pub fn man(command: &Command, directory: Option<&Path>) -> Result<(), Problem> {
    match directory {
        None => clap_mangen::Man::new(command.clone()).render(&mut std::io::stdout())?,
        Some(directory) => {
            std::fs::create_dir_all(directory)?;
            for path in write_pages(command.clone(), directory, command.get_name().to_owned())? {
                println!("{}", path.display());
            }
        }
    }
    Ok(())
}

fn write_pages(command: Command, directory: &Path, name: String) -> std::io::Result<Vec<PathBuf>> {
    let path = directory.join(format!("{name}.1"));
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone().name(name.clone())).render(&mut page)?;
    std::fs::write(&path, page)?;
    let mut written = vec![path];
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        written.extend(write_pages(sub.clone(), directory, format!("{name}-{}", sub.get_name()))?);
    }
    Ok(written)
}
