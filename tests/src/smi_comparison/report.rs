//! What was compared, as text and as a part of a document.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use crate::skip;

/// Around the lines of a document that keep what was seen.
const MARKS: [&str; 2] = ["<!-- seen: begin -->\n", "<!-- seen: end -->\n"];

/// What, as the agent tells it, as `nvidia-smi` does.
pub type Line = [String; 3];

/// What was told the same by both.
#[derive(Debug, Default)]
pub struct Report {
    /// Version of the driver.
    pub driver: String,
    /// How many devices of each model.
    pub models: BTreeMap<String, usize>,
    /// How many instances of divided devices.
    pub parts: usize,
    /// All comparisons.
    pub lines: Vec<Line>,
    /// What could not be compared here, and why.
    pub left_out: Vec<String>,
}

impl Report {
    pub(super) fn leave_out(&mut self, what: String) {
        skip::needs(format!("gpu: {what}"));
        self.left_out.push(what);
    }

    /// As a part of a document.
    pub fn text(&self) -> String {
        let models = self
            .models
            .iter()
            .map(|(name, count)| format!("{count} x {name}"));
        let models: Vec<String> = models.collect();
        let mut text = format!(
            "{}, {} MIG instances, driver {}; {} comparisons.\n\n",
            models.join(", "),
            self.parts,
            self.driver,
            self.lines.len()
        );
        for what in &self.left_out {
            let _ = writeln!(text, "Not compared: {what}.\n");
        }
        text += "| what | agent | nvidia-smi |\n|---|---|---|\n";
        for [what, ours, theirs] in &self.lines {
            let _ = writeln!(text, "| {what} | {ours} | {theirs} |");
        }
        text
    }

    /// Puts it into a document, in place of what was seen before.
    pub fn record(&self, document: &Path) -> Result<()> {
        let text = std::fs::read_to_string(document)?;
        let parts = text
            .split_once(MARKS[0])
            .and_then(|(before, rest)| Some((before, rest.split_once(MARKS[1])?.1)));
        let (before, after) = parts.context("the document has no place for what was seen")?;
        let [begin, end] = MARKS;
        let fresh = format!("{before}{begin}{}{end}{after}", self.text());
        Ok(std::fs::write(document, fresh)?)
    }
}
