//! `bai-agent top`: kernels, service ports, devices and the node, live, in a terminal.
//!
//! In: the regions and keys. Out: a screen. Invariants: the regions are only read, and the agent is
//! not asked; the terminal is given back as it was, also after an error.

mod model;
mod screen;

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::Args;
use config::Config;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use super::exit::Problem;
use super::region::Regions;
use model::Model;
use screen::{Next, Screen};

/// Arguments of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Seconds between two looks at the samples.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
}

/// Runs until a key ends it.
pub fn run(args: &TopArgs, config: &Config) -> Result<(), Problem> {
    if !std::io::stdout().is_terminal() {
        return Err(Problem::Usage(anyhow::anyhow!(
            "top needs a terminal; `bai-agent stats` prints the same numbers once"
        )));
    }
    let mut regions = Regions::of(config)?;
    let mut model = Model::default();
    // A node without samples is told before the screen is taken.
    model.observe(&regions.look()?);
    let mut terminal = ratatui::try_init()?;
    let ended = watch(
        &mut terminal,
        &mut regions,
        &mut model,
        Duration::from_secs(args.interval),
    );
    ratatui::try_restore()?;
    ended
}

fn watch(
    terminal: &mut DefaultTerminal,
    regions: &mut Regions,
    model: &mut Model,
    interval: Duration,
) -> Result<(), Problem> {
    let mut screen = Screen::new();
    let mut looked = Instant::now();
    loop {
        terminal.draw(|frame| screen.draw(frame, model))?;
        let rest = interval.saturating_sub(looked.elapsed());
        if event::poll(rest)?
            && let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
            && screen.press(key) == Next::Quit
        {
            return Ok(());
        }
        if looked.elapsed() >= interval {
            looked = Instant::now();
            // A region that is gone for a moment: the last numbers stay and their age tells.
            match regions.look() {
                Ok(look) if !screen.paused => model.observe(&look),
                Ok(_) => {}
                Err(_) => model.alive = false,
            }
        }
    }
}

#[cfg(test)]
mod tests;
