//! A TOML document as a tree of values that know their lines.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::problem::Problem;
use crate::units::mask_password;

/// A value and the line it starts on.
#[derive(Debug, Clone)]
pub(crate) struct Value {
    pub line: usize,
    pub kind: Kind,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Text(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    Array(Vec<Value>),
    Table(Table),
    /// Dates, and integers beyond 64 bits: nothing here takes them.
    Other(String),
}

/// The entries of a table in file order.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    pub entries: Vec<Entry>,
}

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub key: String,
    pub line: usize,
    pub value: Value,
}

impl Value {
    pub(crate) fn text(line: usize, text: impl Into<String>) -> Self {
        Self {
            line,
            kind: Kind::Text(text.into()),
        }
    }

    /// The value as one short line for an error, with passwords in addresses hidden. Tables show
    /// their keys only.
    pub(crate) fn shown(&self) -> String {
        const LONGEST: usize = 120;
        let shown = match &self.kind {
            Kind::Text(text) => format!("{:?}", mask_password(text)),
            Kind::Integer(number) => number.to_string(),
            Kind::Float(number) => number.to_string(),
            Kind::Boolean(flag) => flag.to_string(),
            Kind::Array(items) => {
                let items: Vec<String> = items.iter().take(LONGEST).map(Value::shown).collect();
                format!("[{}]", items.join(", "))
            }
            Kind::Table(table) => {
                let keys: Vec<&str> = table.entries.iter().map(|e| e.key.as_str()).collect();
                format!("{{ {} }}", keys.join(", "))
            }
            Kind::Other(text) => text.clone(),
        };
        if shown.chars().count() > LONGEST {
            shown.chars().take(LONGEST).chain("...".chars()).collect()
        } else {
            shown
        }
    }

    /// The kind of value in words.
    pub(crate) fn kind_words(&self) -> &'static str {
        match &self.kind {
            Kind::Text(_) => "a text",
            Kind::Integer(_) => "an integer",
            Kind::Float(_) => "a number with a fraction",
            Kind::Boolean(_) => "a boolean",
            Kind::Array(_) => "an array",
            Kind::Table(_) => "a table",
            Kind::Other(_) => "a date or an integer beyond 64 bits",
        }
    }
}

/// Parses a document. Every syntax error is reported; the text of the file is never repeated.
pub(crate) fn parse(text: &str) -> Result<Table, Vec<Problem>> {
    let lines = Lines::of(text);
    let (root, errors) = DeTable::parse_recoverable(text);
    if errors.is_empty() {
        return Ok(table(root.get_ref(), &lines));
    }
    let mut problems: Vec<Problem> = errors
        .iter()
        .map(|error| Problem {
            line: error.span().map(|span| lines.at(span.start)),
            variable: None,
            etcd: None,
            key: String::new(),
            value: None,
            why: format!("not valid TOML: {}", error.message().replace('\n', ", ")),
            remedy: "correct the line; texts need quotes and each key stands once".to_owned(),
        })
        .collect();
    // The parser reports the structure first and the values after it.
    problems.sort_by_key(|problem| problem.line);
    Err(problems)
}

fn table(source: &DeTable<'_>, lines: &Lines) -> Table {
    let mut entries: Vec<(usize, Entry)> = source
        .iter()
        .map(|(key, item)| {
            let start = key.span().start;
            let entry = Entry {
                key: key.get_ref().to_string(),
                line: lines.at(start),
                value: value(item, lines),
            };
            (start, entry)
        })
        .collect();
    entries.sort_by_key(|(start, _)| *start);
    Table {
        entries: entries.into_iter().map(|(_, entry)| entry).collect(),
    }
}

fn value(source: &Spanned<DeValue<'_>>, lines: &Lines) -> Value {
    let line = lines.at(source.span().start);
    let kind = match source.get_ref() {
        DeValue::String(text) => Kind::Text(text.to_string()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or_else(|_| Kind::Other(number.as_str().to_owned()), Kind::Integer),
        DeValue::Float(number) => number
            .as_str()
            .parse()
            .map_or_else(|_| Kind::Other(number.as_str().to_owned()), Kind::Float),
        DeValue::Boolean(flag) => Kind::Boolean(*flag),
        DeValue::Datetime(date) => Kind::Other(date.to_string()),
        DeValue::Array(items) => Kind::Array(items.iter().map(|item| value(item, lines)).collect()),
        DeValue::Table(inner) => Kind::Table(table(inner, lines)),
    };
    Value { line, kind }
}

/// Byte offsets of line starts.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        let breaks = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        Self(
            std::iter::once(0)
                .chain(breaks.map(|(at, _)| at + 1))
                .collect(),
        )
    }

    /// The line, counted from 1, that holds the offset.
    fn at(&self, offset: usize) -> usize {
        self.0.partition_point(|start| *start <= offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_know_their_lines_and_keep_file_order() {
        let root = parse("b = 1\n[a]\n  x = 'y'\nz = [1,\n 2]\n").unwrap();
        let names: Vec<(&str, usize)> = root
            .entries
            .iter()
            .map(|e| (e.key.as_str(), e.line))
            .collect();
        assert_eq!(names, [("b", 1), ("a", 2)]);
        let Kind::Table(a) = &root.entries[1].value.kind else {
            panic!("a table")
        };
        assert_eq!(a.entries[1].line, 4);
    }

    #[test]
    fn all_syntax_errors_come_at_once_without_the_text() {
        let problems = parse("[etcd]\npassword = hunter2\n[agent\nmode = docker\n").unwrap_err();
        assert!(problems.len() >= 2, "{problems:?}");
        assert!(
            problems
                .iter()
                .all(|p| !format!("{p:?}").contains("hunter2"))
        );
        assert_eq!(problems[0].line, Some(2));
    }

    #[test]
    fn integers_beyond_64_bits_are_kept_as_text() {
        let root = parse("a = 99999999999999999999\n").unwrap();
        assert!(matches!(root.entries[0].value.kind, Kind::Other(_)));
    }
}
