//! What the screen looks like, and what keys do to it.
//!
//! Invariants: drawing reads the state and changes nothing of it; any size of the terminal is drawn, and a
//! number is shown whole or not at all.

use std::cmp::Ordering;

use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Cell, Paragraph, Row, Sparkline, Table, TableState};

use super::model::{KernelLine, Model, PortLine};
use crate::cli::output;

/// Which table is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tab {
    /// Kernels.
    #[default]
    Kernels,
    /// Service ports.
    Ports,
    /// Accelerators.
    Devices,
}

impl Tab {
    const ALL: [(Tab, &'static str); 3] = [
        (Tab::Kernels, "1 kernels"),
        (Tab::Ports, "2 ports"),
        (Tab::Devices, "3 devices"),
    ];

    fn next(self) -> Tab {
        match self {
            Tab::Kernels => Tab::Ports,
            Tab::Ports => Tab::Devices,
            Tab::Devices => Tab::Kernels,
        }
    }
}

const KERNEL_COLUMNS: [&str; 10] = [
    "KERNEL", "CPU %", "HISTORY", "MEMORY", "LIMIT", "READ/s", "WRITE/s", "RX/s", "TX/s", "TASKS",
];
const PORT_COLUMNS: [&str; 9] = [
    "PORT", "SERVICE", "KERNEL", "STATE", "PATH", "OPEN", "TOTAL", "IN/s", "OUT/s",
];
const DEVICE_COLUMNS: [&str; 7] = ["DEVICE", "MODEL", "LOAD %", "MEMORY", "OF", "POWER", "HEAT"];
/// Width of the history in a kernel's line.
const SPARK: u16 = 12;

/// How wide the columns of a table are, and which give way where they do not all fit.
struct Columns {
    widths: &'static [u16],
    /// A column of text, which may be cut.
    text: usize,
    /// Down to this.
    least: u16,
    /// The others, the one that is missed least first.
    order: &'static [usize],
}

const KERNELS: Columns = Columns {
    widths: &[36, 7, SPARK, 9, 9, 9, 9, 9, 9, 6],
    text: 0,
    least: 8,
    order: &[2, 9, 4, 5, 6, 7, 8, 3, 1],
};
const PORTS: Columns = Columns {
    widths: &[9, 14, 36, 10, 12, 6, 8, 10, 10],
    text: 2,
    least: 8,
    order: &[6, 5, 2, 8, 7, 4, 1, 3],
};
const DEVICES: Columns = Columns {
    widths: &[10, 24, 8, 10, 10, 9, 8],
    text: 1,
    least: 8,
    order: &[4, 6, 5, 1, 3, 2],
};

impl Columns {
    /// Those that fit into a line, in their order, and how wide each is.
    fn fitting(&self, line: u16) -> Vec<(usize, u16)> {
        let mut left: Vec<(usize, u16)> = self.widths.iter().copied().enumerate().collect();
        let mut going = self.order.iter();
        loop {
            let blanks = u16::try_from(left.len().saturating_sub(1)).unwrap_or(u16::MAX);
            let whole = left.iter().map(|(_, width)| *width).sum::<u16>() + blanks;
            let excess = whole.saturating_sub(line);
            let text = left.iter_mut().find(|(place, _)| *place == self.text);
            let gives = text
                .as_ref()
                .map_or(0, |(_, width)| width.saturating_sub(self.least));
            if excess <= gives {
                if let Some((_, width)) = text {
                    *width -= excess;
                }
                return left;
            }
            let Some(next) = going.next() else {
                return left;
            };
            left.retain(|(place, _)| place != next);
        }
    }
}

/// The state of the screen.
#[derive(Clone, Debug, Default)]
pub struct Screen {
    /// The table shown.
    pub tab: Tab,
    /// Column it is ordered by, per tab.
    sort: [usize; 3],
    reversed: bool,
    /// Only lines with this text.
    pub filter: String,
    editing: bool,
    selected: usize,
    /// Nothing new is taken in.
    pub paused: bool,
}

/// What the program is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Go on.
    Continue,
    /// End.
    Quit,
}

impl Screen {
    /// Kernels by CPU, the busiest first.
    pub fn new() -> Screen {
        Screen {
            sort: [1, 0, 0],
            ..Screen::default()
        }
    }

    /// Acts on a key.
    pub fn press(&mut self, key: KeyEvent) -> Next {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Next::Quit;
        }
        if self.editing {
            match key.code {
                KeyCode::Enter => self.editing = false,
                KeyCode::Esc => {
                    self.editing = false;
                    self.filter.clear();
                }
                KeyCode::Backspace => {
                    self.filter.pop();
                }
                KeyCode::Char(character) if self.filter.len() < 64 => self.filter.push(character),
                _ => {}
            }
            self.selected = 0;
            return Next::Continue;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Tab => self.show(self.tab.next()),
            KeyCode::Char('1') => self.show(Tab::Kernels),
            KeyCode::Char('2') => self.show(Tab::Ports),
            KeyCode::Char('3') => self.show(Tab::Devices),
            KeyCode::Char('/') => self.editing = true,
            KeyCode::Char('s') => {
                let columns = self.columns().len();
                let sort = &mut self.sort[self.tab as usize];
                *sort = (*sort + 1) % columns;
            }
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Down | KeyCode::Char('j') => self.selected = self.selected.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Home | KeyCode::Char('g') => self.selected = 0,
            _ => {}
        }
        Next::Continue
    }

    fn show(&mut self, tab: Tab) {
        self.tab = tab;
        self.selected = 0;
    }

    fn columns(&self) -> &'static [&'static str] {
        match self.tab {
            Tab::Kernels => &KERNEL_COLUMNS,
            Tab::Ports => &PORT_COLUMNS,
            Tab::Devices => &DEVICE_COLUMNS,
        }
    }

    /// Draws everything.
    pub fn draw(&self, frame: &mut Frame<'_>, model: &Model) {
        let [head, sparks, tabs, body, foot] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(3),
            Constraint::Length(1),
            Constraint::Min(1),
            Constraint::Length(1),
        ])
        .areas(frame.area());
        frame.render_widget(Paragraph::new(head_lines(model, head.width)), head);
        sparklines(frame, sparks, model);
        frame.render_widget(self.tab_line(model), tabs);
        self.table(frame, body, model);
        frame.render_widget(self.foot(model, foot.width), foot);
    }

    fn tab_line(&self, model: &Model) -> Line<'static> {
        let count = |tab| match tab {
            Tab::Kernels => model.kernels.len(),
            Tab::Ports => model.ports.len(),
            Tab::Devices => model.devices.len(),
        };
        let spans = Tab::ALL.into_iter().map(|(tab, name)| {
            let text = format!(" {name} ({}) ", count(tab));
            if tab == self.tab {
                Span::from(text).reversed()
            } else {
                Span::from(text)
            }
        });
        Line::from_iter(spans)
    }

    fn foot(&self, model: &Model, width: u16) -> Line<'static> {
        if self.editing || !self.filter.is_empty() {
            let cursor = if self.editing { "_" } else { "" };
            return Line::from(format!(
                "filter: {}{cursor}  (Enter keeps, Esc clears)",
                self.filter
            ));
        }
        if let Some(reason) = self.reason(model) {
            return Line::from(reason);
        }
        let paused = self.paused.then(|| "PAUSED".to_owned());
        let keys = [
            "q quit",
            "Tab/1-3 table",
            "s sort",
            "r reverse",
            "/ filter",
            "p pause",
            "up/down select",
        ];
        let keys = keys.into_iter().map(str::to_owned);
        Line::from(together(paused.into_iter().chain(keys), width)).dim()
    }

    /// Why the selected port does not serve.
    fn reason(&self, model: &Model) -> Option<String> {
        if self.tab != Tab::Ports {
            return None;
        }
        let ports = self.ports(model);
        let port = ports.get(self.selected.min(ports.len().saturating_sub(1)))?;
        (!port.reason.is_empty()).then(|| format!("{}: {}", port.port, port.reason))
    }

    fn table(&self, frame: &mut Frame<'_>, area: Rect, model: &Model) {
        let (rows, columns): (Vec<Vec<String>>, &Columns) = match self.tab {
            Tab::Kernels => {
                let list = self.kernels(model).into_iter();
                (list.map(|it| kernel_row(it).into()).collect(), &KERNELS)
            }
            Tab::Ports => {
                let list = self.ports(model).into_iter();
                (list.map(|it| port_row(it).into()).collect(), &PORTS)
            }
            Tab::Devices => (self.devices(model), &DEVICES),
        };
        if rows.is_empty() {
            let text = match self.tab {
                _ if !self.filter.is_empty() => "nothing matches the filter",
                Tab::Kernels => "no kernel is measured",
                Tab::Ports => "no service port",
                Tab::Devices => "no accelerator",
            };
            frame.render_widget(Paragraph::new(text), area);
            return;
        }
        let sort = self.sort[self.tab as usize];
        let columns = columns.fitting(area.width);
        let header = columns.iter().map(|(place, _)| {
            let cell = Cell::from(self.columns()[*place]);
            if *place == sort {
                cell.style(Style::new().add_modifier(Modifier::UNDERLINED))
            } else {
                cell
            }
        });
        let mut state = TableState::new().with_selected(self.selected.min(rows.len() - 1));
        let shown = rows.into_iter().map(|mut row| {
            let cells = columns
                .iter()
                .map(|(place, _)| std::mem::take(&mut row[*place]));
            Row::new(cells.collect::<Vec<String>>())
        });
        let widths = columns.iter().map(|(_, width)| Constraint::Length(*width));
        let table = Table::new(shown, widths)
            .header(Row::new(header).bold())
            .row_highlight_style(Style::new().reversed());
        frame.render_stateful_widget(table, area, &mut state);
    }

    fn matches(&self, texts: &[&str]) -> bool {
        let filter = self.filter.to_lowercase();
        filter.is_empty()
            || texts
                .iter()
                .any(|text| text.to_lowercase().contains(&filter))
    }

    fn kernels<'m>(&self, model: &'m Model) -> Vec<&'m KernelLine> {
        let mut list: Vec<&KernelLine> = model
            .kernels
            .iter()
            .filter(|line| self.matches(&[&line.kernel, &line.services]))
            .collect();
        // Numbers fall, names rise, until reversed.
        match self.sort[Tab::Kernels as usize] {
            1 | 2 => list.sort_by(|a, b| falling(a.cpu, b.cpu)),
            3 => list.sort_by_key(|line| std::cmp::Reverse(line.memory)),
            4 => list.sort_by_key(|line| std::cmp::Reverse(line.limit)),
            column @ 5..=8 => {
                list.sort_by(|a, b| falling(a.rates[column - 5], b.rates[column - 5]))
            }
            9 => list.sort_by_key(|line| std::cmp::Reverse(line.tasks)),
            _ => list.sort_by(|a, b| a.kernel.cmp(&b.kernel)),
        }
        if self.reversed {
            list.reverse();
        }
        list
    }

    fn ports<'m>(&self, model: &'m Model) -> Vec<&'m PortLine> {
        let mut list: Vec<&PortLine> = model
            .ports
            .iter()
            .filter(|line| {
                let port = line.port.to_string();
                self.matches(&[
                    &port,
                    &line.protocol,
                    &line.service,
                    &line.kernel,
                    &line.state,
                    &line.path,
                ])
            })
            .collect();
        match self.sort[Tab::Ports as usize] {
            1 => list.sort_by(|a, b| a.service.cmp(&b.service)),
            2 => list.sort_by(|a, b| a.kernel.cmp(&b.kernel)),
            3 => list.sort_by(|a, b| a.state.cmp(&b.state)),
            4 => list.sort_by(|a, b| a.path.cmp(&b.path)),
            5 => list.sort_by_key(|line| std::cmp::Reverse(line.open)),
            6 => list.sort_by_key(|line| std::cmp::Reverse(line.total)),
            column @ 7..=8 => {
                list.sort_by(|a, b| falling(a.rates[column - 7], b.rates[column - 7]))
            }
            _ => list.sort_by_key(|line| line.port),
        }
        if self.reversed {
            list.reverse();
        }
        list
    }

    fn devices(&self, model: &Model) -> Vec<Vec<String>> {
        let mut list: Vec<_> = model
            .devices
            .iter()
            .filter(|row| self.matches(&[&row.id, &row.model, &row.key.kind.to_string()]))
            .collect();
        match self.sort[Tab::Devices as usize] {
            1 => list.sort_by(|a, b| a.model.cmp(&b.model)),
            2 => list.sort_by_key(|row| std::cmp::Reverse(row.counters.utilisation_permille)),
            3 => list.sort_by_key(|row| std::cmp::Reverse(row.counters.memory_used_bytes)),
            4 => list.sort_by_key(|row| std::cmp::Reverse(row.counters.memory_total_bytes)),
            5 => list.sort_by_key(|row| std::cmp::Reverse(row.counters.power_mw)),
            6 => list.sort_by_key(|row| std::cmp::Reverse(row.counters.temperature_mc)),
            _ => list.sort_by_key(|row| row.key),
        }
        if self.reversed {
            list.reverse();
        }
        let thousandths = |value: Option<u64>, unit: &str| {
            value.map_or_else(
                || "-".to_owned(),
                |value| format!("{} {unit}", value / 1000),
            )
        };
        list.into_iter()
            .map(|row| {
                let counters = &row.counters;
                let load = counters.utilisation_permille;
                vec![
                    format!("{} {}", row.key.kind, row.key.index),
                    row.model.clone(),
                    load.map_or_else(
                        || "-".to_owned(),
                        |load| format!("{}.{}", load / 10, load % 10),
                    ),
                    bytes(counters.memory_used_bytes),
                    bytes(counters.memory_total_bytes),
                    thousandths(counters.power_mw, "W"),
                    thousandths(counters.temperature_mc, "C"),
                ]
            })
            .collect()
    }
}

fn falling(a: Option<f64>, b: Option<f64>) -> Ordering {
    b.unwrap_or(-1.0).total_cmp(&a.unwrap_or(-1.0))
}

fn bytes(value: Option<u64>) -> String {
    value.map_or_else(|| "-".to_owned(), output::bytes)
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn per_second(value: Option<f64>) -> String {
    bytes(value.map(|value| value.max(0.0).round() as u64))
}

fn percent(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1}"))
}

fn kernel_row(line: &KernelLine) -> [String; 10] {
    let [read, written, received, sent] = line.rates;
    [
        line.kernel.clone(),
        percent(line.cpu),
        spark(&line.history),
        bytes(line.memory),
        bytes(line.limit),
        per_second(read),
        per_second(written),
        per_second(received),
        per_second(sent),
        line.tasks
            .map_or_else(|| "-".to_owned(), |tasks| tasks.to_string()),
    ]
}

fn port_row(line: &PortLine) -> [String; 9] {
    let [inward, outward] = line.rates;
    [
        format!("{}/{}", line.port, line.protocol),
        line.service.clone(),
        line.kernel.clone(),
        line.state.clone(),
        line.path.clone(),
        line.open.to_string(),
        line.total.to_string(),
        per_second(inward),
        per_second(outward),
    ]
}

/// The end of a history as bars; the highest is the most of what is shown.
fn spark(history: &std::collections::VecDeque<u64>) -> String {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let shown: Vec<u64> = history
        .iter()
        .rev()
        .take(SPARK.into())
        .rev()
        .copied()
        .collect();
    let most = shown.iter().copied().max().unwrap_or(0).max(1);
    shown
        .iter()
        .map(|value| {
            let step = value.saturating_mul(7).div_ceil(most).min(7);
            BARS[usize::try_from(step).unwrap_or(7)]
        })
        .collect()
}

/// As many of the parts as fit into a line, at least the first: none is cut within a number.
fn together(parts: impl IntoIterator<Item = String>, width: u16) -> String {
    let mut line = String::new();
    for part in parts {
        let gap = if line.is_empty() { "" } else { "  " };
        let length = line.chars().count() + gap.len() + part.chars().count();
        if !line.is_empty() && length > usize::from(width) {
            break;
        }
        line = line + gap + &part;
    }
    line
}

fn head_lines(model: &Model, width: u16) -> Vec<Line<'static>> {
    let node = &model.node;
    let of = |space: Option<(u64, u64)>| {
        space.map_or_else(
            || "-".to_owned(),
            |(used, total)| format!("{} of {}", output::bytes(used), output::bytes(total)),
        )
    };
    let [received, sent] = node.network;
    let first = together(
        [
            format!("node  CPU {} %", percent(node.cpu)),
            format!("memory {}", of(node.memory)),
            format!("disk {}", of(node.disk)),
            format!(
                "net {}/s in, {}/s out",
                per_second(received),
                per_second(sent)
            ),
        ],
        width,
    );
    let age = model.age.map_or_else(
        || "no samples yet".to_owned(),
        |age| format!("samples {} old", output::duration(age.as_secs_f64())),
    );
    let pass = node.pass.map_or_else(String::new, |pass| {
        format!(", last pass took {:.1} ms", pass.as_secs_f64() * 1000.0)
    });
    let second = if model.alive {
        Line::from(format!("dataplane alive, {age}{pass}"))
    } else {
        Line::from(format!("dataplane NOT RUNNING, {age}"))
            .bold()
            .red()
    };
    vec![Line::from(first), second]
}

fn sparklines(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let [left, right] =
        Layout::horizontal([Constraint::Percentage(50), Constraint::Percentage(50)]).areas(area);
    let tail = |history: &std::collections::VecDeque<u64>, width: u16| -> Vec<u64> {
        let width = usize::from(width);
        history.iter().rev().take(width).rev().copied().collect()
    };
    let cpu = Sparkline::default()
        .block(Block::new().title("CPU"))
        .max(100)
        .data(tail(&model.node.history, left.width));
    let traffic = Sparkline::default()
        .block(Block::new().title("network"))
        .data(tail(&model.node.traffic, right.width));
    frame.render_widget(cpu, left);
    frame.render_widget(traffic, right);
}
