//! Bars with whiskers as SVG.
//!
//! In: panels of named spreads. Out: the text of an SVG file. Invariant: every panel has its own
//! scale from 0, and its reference line at the value 1 when it shows ratios.

use std::fmt::Write;

use crate::statistics::Spread;

/// One panel.
#[derive(Debug)]
pub struct Panel {
    /// What it shows, with its unit.
    pub title: String,
    /// Whether more is better.
    pub more_is_better: bool,
    /// Name, spread and whether it is ours.
    pub bars: Vec<(String, Spread, bool)>,
}

const WIDTH: f64 = 520.0;
const ROW: f64 = 22.0;
const LABEL: f64 = 110.0;
const VALUE: f64 = 70.0;
const HEAD: f64 = 34.0;

/// Draws the panels, two side by side.
#[must_use]
pub fn draw(title: &str, panels: &[Panel]) -> String {
    let height_of = |panel: &Panel| HEAD + ROW * panel.bars.len() as f64 + 14.0;
    let mut tops = Vec::new();
    let mut top = 40.0;
    for pair in panels.chunks(2) {
        tops.push(top);
        top += pair.iter().map(height_of).fold(0.0, f64::max);
    }
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{}\" height=\"{top}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"12\" y=\"24\" font-size=\"16\">{}</text>\n",
        2.0 * WIDTH,
        escaped(title)
    );
    for (number, panel) in panels.iter().enumerate() {
        let x = WIDTH * (number % 2) as f64;
        let y = tops.get(number / 2).copied().unwrap_or(0.0);
        // Writing to a string can't fail.
        let _ = writeln!(
            svg,
            "<g transform=\"translate({x} {y})\">{}</g>",
            one(panel)
        );
    }
    svg + "</svg>\n"
}

fn one(panel: &Panel) -> String {
    let most = panel
        .bars
        .iter()
        .map(|(_, spread, _)| spread.q3)
        .fold(f64::MIN_POSITIVE, f64::max);
    let room = WIDTH - LABEL - VALUE;
    let at = |value: f64| LABEL + value / most * room;
    let better = if panel.more_is_better { "more" } else { "less" };
    let mut svg = format!(
        "<text x=\"12\" y=\"20\" font-weight=\"bold\">{} ({better} is better)</text>",
        escaped(&panel.title)
    );
    for (row, (name, spread, ours)) in panel.bars.iter().enumerate() {
        let y = HEAD + ROW * row as f64;
        let middle = y + ROW / 2.0 - 2.0;
        let colour = if *ours { "#2b7a3d" } else { "#8aa0b8" };
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><rect x=\"{LABEL}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{colour}\"/><line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            LABEL - 6.0,
            middle + 4.0,
            escaped(name),
            y,
            at(spread.median) - LABEL,
            ROW - 5.0,
            at(spread.q1),
            at(spread.q3),
            at(spread.q3.max(spread.median)) + 6.0,
            middle + 4.0,
            short(spread.median),
        );
    }
    svg
}

/// A number with three digits that count.
#[must_use]
pub fn short(value: f64) -> String {
    match value.abs() {
        it if it >= 1000.0 => format!("{value:.0}"),
        it if it >= 100.0 => format!("{value:.0}"),
        it if it >= 10.0 => format!("{value:.1}"),
        it if it >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chart_holds_every_bar_and_no_raw_markup() {
        let spread = Spread::of([1.0, 2.0, 3.0]).unwrap();
        let panel = |title: &str| Panel {
            title: title.to_owned(),
            more_is_better: true,
            bars: vec![
                ("a<b".to_owned(), spread, true),
                ("c".to_owned(), spread, false),
            ],
        };
        let svg = draw("x", &[panel("one"), panel("two"), panel("three")]);
        assert_eq!(svg.matches("<rect").count(), 1 + 6);
        assert!(svg.contains("a&lt;b"));
        assert!(svg.ends_with("</svg>\n"));
    }
}
