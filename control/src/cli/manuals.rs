//! `bai-agent completions` and `bai-agent man`: made from the same definitions as the help.

use std::path::Path;

use clap::Command;
use clap_complete::Shell;

use super::exit::Problem;
use super::output::say_part;

/// Prints a completion script.
pub fn completions(shell: Shell, command: &mut Command) -> Result<(), Problem> {
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, command, name, &mut script);
    show(&script)
}

/// Prints the manual page, or writes one for each command into a directory.
pub fn man(command: &Command, directory: Option<&Path>) -> Result<(), Problem> {
    match directory {
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command.clone()).render(&mut page)?;
            show(&page)?;
        }
        Some(directory) => {
            std::fs::create_dir_all(directory)?;
            clap_mangen::generate_to(command.clone(), directory)?;
        }
    }
    Ok(())
}

fn show(text: &[u8]) -> Result<(), Problem> {
    let text = std::str::from_utf8(text).map_err(|err| Problem::Other(err.into()))?;
    say_part!("{text}");
    Ok(())
}
