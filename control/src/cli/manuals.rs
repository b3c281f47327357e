//! `bai-agent completions` and `bai-agent man`: made from the same definitions as the help.

use std::path::Path;

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
            clap_mangen::generate_to(command.clone(), directory)?;
        }
    }
    Ok(())
}
