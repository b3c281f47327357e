//! The effective configuration as a table and as JSON, for `check-config`. Secrets were hidden when
//! the values were recorded, so nothing here can print one.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::load::Loaded;
use crate::problem::{NoteKind, Origin};

/// Longest value shown in full in the table.
const WIDEST: usize = 72;

impl Loaded {
    /// See [`render_text`].
    pub fn render_text(&self) -> String {
        render_text(self)
    }

    /// See [`render_notes`].
    pub fn render_notes(&self) -> String {
        render_notes(self)
    }

    /// See [`render_json`].
    pub fn render_json(&self) -> Value {
        render_json(self)
    }
}

/// A table of section, key, value and origin, one block per section, and the remarks below it.
pub fn render_text(loaded: &Loaded) -> String {
    let mut out = String::new();
    let file = loaded
        .config
        .file
        .as_ref()
        .map_or("none (built-in defaults)".to_owned(), |f| {
            f.display().to_string()
        });
    let _ = writeln!(out, "file: {file}");
    let key_width = loaded
        .origins
        .iter()
        .map(|v| v.key.len())
        .max()
        .unwrap_or(0);
    let value_width = loaded
        .origins
        .iter()
        .map(|v| shown(&v.text).chars().count())
        .max()
        .unwrap_or(0);
    let mut section = "";
    for value in &loaded.origins {
        if value.section != section {
            section = &value.section;
            let _ = writeln!(out, "\n[{section}]");
        }
        let text = shown(&value.text);
        let origin = origin_text(value.origin, value.key);
        let _ = writeln!(
            out,
            "  {:key_width$}  {text:value_width$}  {origin}",
            value.key
        );
    }
    if !loaded.notes.is_empty() {
        let _ = write!(out, "\n{}", render_notes(loaded));
    }
    out
}

fn shown(text: &str) -> String {
    if text.is_empty() {
        return "-".to_owned();
    }
    let plain: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if plain.chars().count() <= WIDEST {
        return plain;
    }
    plain
        .chars()
        .take(WIDEST - 3)
        .chain("...".chars())
        .collect()
}

fn origin_text(origin: Origin, key: &str) -> String {
    match origin {
        Origin::File { line } => format!("line {line}"),
        Origin::Environment(variable) => format!("environment {variable}"),
        Origin::Default => "default".to_owned(),
        Origin::Standalone => "standalone default".to_owned(),
        Origin::Detected(how) => format!("from {how}"),
        Origin::Etcd { under, scope } => format!("etcd {under}/{key} ({scope})"),
    }
}

/// The remarks, one line each; empty when there are none.
pub fn render_notes(loaded: &Loaded) -> String {
    let mut out = String::new();
    for note in &loaded.notes {
        let _ = write!(out, "{}: ", kind_word(note.kind));
        let _ = note.write(&mut out, loaded.config.file.as_deref());
        out.push('\n');
    }
    out
}

fn kind_word(kind: NoteKind) -> &'static str {
    match kind {
        NoteKind::NotUsed => "not used",
        NoteKind::Unknown => "unknown",
        NoteKind::Warning => "warning",
    }
}

/// The same as JSON: `file`, `values` (section, key, value, origin) and `notes`.
pub fn render_json(loaded: &Loaded) -> Value {
    let values: Vec<Value> = loaded
        .origins
        .iter()
        .map(|value| {
            let mut entry = Map::new();
            entry.insert("section".into(), json!(value.section));
            entry.insert("key".into(), json!(value.key));
            entry.insert("value".into(), value.json.clone());
            entry.insert("origin".into(), origin_json(value.origin));
            Value::Object(entry)
        })
        .collect();
    let notes: Vec<Value> = loaded
        .notes
        .iter()
        .map(|n| json!({"kind": kind_word(n.kind), "line": n.line, "key": n.key, "text": n.text}))
        .collect();
    let file = loaded.config.file.as_ref().map(|f| f.display().to_string());
    json!({"file": file, "standalone": loaded.config.standalone, "values": values, "notes": notes})
}

fn origin_json(origin: Origin) -> Value {
    match origin {
        Origin::File { line } => json!({"from": "file", "line": line}),
        Origin::Environment(variable) => json!({"from": "environment", "variable": variable}),
        Origin::Default => json!({"from": "default"}),
        Origin::Standalone => json!({"from": "standalone"}),
        Origin::Detected(how) => json!({"from": "detected", "how": how}),
        Origin::Etcd { under, scope } => json!({"from": "etcd", "under": under, "scope": scope}),
    }
}
