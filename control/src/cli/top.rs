//! `bai-agent top`: kernels, service ports, devices and the node, live, in a terminal.
//!
//! In: the regions and keys. Out: a screen. Invariants: the regions are only read, and the agent is
//! not asked; the terminal is given back as it was, also after an error or a signal to end.

mod model;
mod screen;

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
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

/// A signal to end is noticed after this long at most.
const ATTENTION: Duration = Duration::from_millis(200);

/// Becomes true with the first signal to end: without it the terminal would stay as it is drawn on.
fn ending() -> std::io::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let (mut terminate, mut hangup, mut interrupt) = {
        let _guard = runtime.enter();
        (
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
            signal(SignalKind::interrupt())?,
        )
    };
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = hangup.recv() => {}
                    _ = interrupt.recv() => {}
                }
            });
            flag.store(true, Ordering::Relaxed);
        })?;
    Ok(ended)
}

/// Runs until a key or a signal ends it.
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
    let ending = ending()?;
    let mut terminal = ratatui::try_init()?;
    let ended = watch(
        &mut terminal,
        &mut regions,
        &mut model,
        Duration::from_secs(args.interval),
        &ending,
    );
    ratatui::try_restore()?;
    ended
}

fn watch(
    terminal: &mut DefaultTerminal,
    regions: &mut Regions,
    model: &mut Model,
    interval: Duration,
    ending: &AtomicBool,
) -> Result<(), Problem> {
    let mut screen = Screen::new();
    let mut looked = Instant::now();
    let mut draw = true;
    while !ending.load(Ordering::Relaxed) {
        if std::mem::take(&mut draw) {
            terminal.draw(|frame| screen.draw(frame, model))?;
        }
        let rest = interval.saturating_sub(looked.elapsed());
        let happened = event::poll(rest.min(ATTENTION))?;
        draw |= happened;
        if happened
            && let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
            && screen.press(key) == Next::Quit
        {
            return Ok(());
        }
        if looked.elapsed() >= interval {
            looked = Instant::now();
            draw = true;
            // A region that is gone for a moment: the last numbers stay and their age tells.
            match regions.look() {
                Ok(look) if !screen.paused => model.observe(&look),
                Ok(_) => {}
                Err(_) => model.alive = false,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
