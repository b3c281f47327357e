//! What a command prints: text for a person or JSON for a program, chosen by `--output`.
//!
//! Work is not given up for want of somebody to show it to, but for a run that might never end (`kernel exec`).
//! Whoever closed the output (`| head`) has seen enough, and is no error; any other fault of it is told once, and in the exit code of the program.

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use serde_json::Value;

/// The form of a command's output.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Tables and sentences.
    #[default]
    Text,
    /// One JSON document on standard output.
    Json,
}

/// Prints one JSON document.
pub fn json(value: &Value) -> std::io::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    say!("{text}");
    Ok(())
}

/// Whether something could not be written that somebody waits for.
static LOST: AtomicBool = AtomicBool::new(false);

/// Whether output of this process was lost.
pub fn is_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}

/// Whether whoever read standard output has closed it.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Whether nobody reads standard output any more.
pub fn is_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}

/// Takes the outcome of writing output.
pub fn written(outcome: std::io::Result<()>) {
    if let Err(err) = outcome
        && err.kind() != ErrorKind::BrokenPipe
        && !LOST.swap(true, Ordering::Relaxed)
    {
        aside!("bai-agent: the output cannot be written: {err}");
    }
}

/// Writes to standard output.
pub fn text(text: std::fmt::Arguments<'_>) {
    let mut output = std::io::stdout().lock();
    // What is left in the buffer would be lost without a word at the end.
    let outcome = output.write_fmt(text).and_then(|()| output.flush());
    if matches!(&outcome, Err(err) if err.kind() == ErrorKind::BrokenPipe) {
        CLOSED.store(true, Ordering::Relaxed);
    }
    written(outcome);
}

/// Writes to standard error, where it can be: the macros of the library panic where it cannot.
pub fn to_stderr(text: std::fmt::Arguments<'_>) {
    let _ = std::io::stderr().lock().write_fmt(text);
}

/// One line of text on standard error.
macro_rules! aside {
    ($($part:tt)*) => {
        $crate::cli::output::to_stderr(format_args!("{}\n", format_args!($($part)*)))
    };
}
pub(crate) use aside;

/// One line of text on standard output.
macro_rules! say {
    ($($part:tt)*) => {
        $crate::cli::output::text(format_args!("{}\n", format_args!($($part)*)))
    };
}
pub(crate) use say;

/// Text on standard output as it is.
macro_rules! say_part {
    ($($part:tt)*) => { $crate::cli::output::text(format_args!($($part)*)) };
}
pub(crate) use say_part;

/// A table with a heading; each column as wide as its widest cell, numbers (by heading mark `>`) to the right.
#[derive(Debug)]
pub struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A heading that begins with `>` aligns its column to the right.
    pub fn new(headings: &[&'static str]) -> Self {
        Table {
            headings: headings.to_vec(),
            rows: Vec::new(),
        }
    }

    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    pub fn render(&self) -> String {
        let names: Vec<&str> = self
            .headings
            .iter()
            .map(|heading| heading.trim_start_matches('>'))
            .collect();
        let widths: Vec<usize> = names
            .iter()
            .enumerate()
            .map(|(column, name)| {
                self.rows
                    .iter()
                    .filter_map(|row| row.get(column))
                    .map(|cell| cell.chars().count())
                    .fold(name.len(), usize::max)
            })
            .collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut text = String::new();
            for (column, cell) in cells.enumerate() {
                let pad = widths
                    .get(column)
                    .map_or(0, |width| width.saturating_sub(cell.chars().count()));
                if column > 0 {
                    text.push_str("  ");
                }
                let right = self
                    .headings
                    .get(column)
                    .is_some_and(|heading| heading.starts_with('>'));
                let (before, after) = if right { (pad, 0) } else { (0, pad) };
                text.extend(std::iter::repeat_n(' ', before));
                text.push_str(cell);
                text.extend(std::iter::repeat_n(' ', after));
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
            text
        };
        let mut text = line(&mut names.iter().copied());
        for row in &self.rows {
            text.push_str(&line(&mut row.iter().map(String::as_str)));
        }
        text
    }
}

/// Bytes with a binary unit, three significant figures: `0 B`, `1.50 KiB`, `512 MiB`.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if value < 1024 {
        return format!("{value} B");
    }
    #[expect(clippy::cast_precision_loss, reason = "three figures are shown")]
    let mut scaled = value as f64 / 1024.0;
    let mut unit = 0;
    while scaled >= 999.5 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    let digits = if scaled < 9.995 {
        2
    } else {
        usize::from(scaled < 99.95)
    };
    format!("{scaled:.digits$} {}", UNITS[unit])
}

/// A duration in the two largest units that matter: `850 ms`, `12.3 s`, `4 min 5 s`, `3 h 20 min`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".to_owned();
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be a sane positive number"
    )]
    let whole = seconds.min(1e15) as u64;
    match seconds {
        s if s < 1.0 => format!("{:.0} ms", s * 1000.0),
        s if s < 60.0 => format!("{s:.1} s"),
        s if s < 3600.0 => format!("{} min {} s", whole / 60, whole % 60),
        s if s < 86400.0 => format!("{} h {} min", whole / 3600, whole / 60 % 60),
        _ => format!("{} d {} h", whole / 86400, whole / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_as_wide_as_its_cells() {
        let mut table = Table::new(&["NAME", ">BYTES"]);
        table.row(["web".to_owned(), "5".to_owned()]);
        table.row(["a longer one".to_owned(), "12345".to_owned()]);
        assert_eq!(
            table.render(),
            "NAME          BYTES\nweb               5\na longer one  12345\n"
        );
    }

    #[test]
    fn bytes_have_three_figures() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            (512 << 20, "512 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(value), text, "{value}");
        }
    }

    #[test]
    fn durations_use_the_units_that_matter() {
        for (seconds, text) in [
            (0.0, "0 ms"),
            (0.85, "850 ms"),
            (12.34, "12.3 s"),
            (245.0, "4 min 5 s"),
            (12000.0, "3 h 20 min"),
            (f64::NAN, "unknown"),
            (200_000.0, "2 d 7 h"),
        ] {
            assert_eq!(duration(seconds), text, "{seconds}");
        }
    }
}
