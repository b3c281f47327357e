//! Reading one section: keys by any of their names, environment first, every fault and every
//! origin recorded, and what is left over reported.

use crate::document::{Kind, Table, Value};
use crate::host::Host;
use crate::overlay::Overlay;
use crate::problem::{Effective, Note, NoteKind, Origin, Problem};
use crate::setting::Setting;
use crate::spelling::nearest;
use crate::units::Fault;

/// A key with its other names and the variable that replaces it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    pub name: &'static str,
    pub aliases: &'static [&'static str],
    pub variable: Option<&'static str>,
    pub secret: bool,
    /// Whether an empty text is the same as none.
    pub blank: bool,
    /// Where in etcd a value stands that wins over the file's and the environment's.
    pub etcd: Option<&'static str>,
}

/// A key by its kebab-case name; the snake_case form is always accepted too.
pub(crate) const fn key(name: &'static str) -> Key {
    Key {
        name,
        aliases: &[],
        variable: None,
        secret: false,
        blank: false,
        etcd: None,
    }
}

impl Key {
    pub(crate) const fn or(mut self, aliases: &'static [&'static str]) -> Self {
        self.aliases = aliases;
        self
    }

    pub(crate) const fn env(mut self, variable: &'static str) -> Self {
        self.variable = Some(variable);
        self
    }

    pub(crate) const fn over(mut self, place: &'static str) -> Self {
        self.etcd = Some(place);
        self
    }

    pub(crate) const fn or_blank(mut self) -> Self {
        self.blank = true;
        self
    }

    pub(crate) const fn secret(mut self) -> Self {
        self.secret = true;
        self
    }
}

/// Everything gathered while reading.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    pub problems: Vec<Problem>,
    /// Names that do not resolve now: faults that may pass by themselves.
    pub unresolved: Vec<Problem>,
    pub notes: Vec<Note>,
    pub values: Vec<Effective>,
    /// Section and key in the order they were first asked for: the order they are shown in.
    pub order: Vec<(&'static str, &'static str)>,
}

/// What all sections share.
pub(crate) struct Reader<'a> {
    pub environment: &'a dyn Fn(&str) -> Option<String>,
    pub host: &'a dyn Host,
    pub standalone: bool,
    /// See [`crate::LoadOptions::only_looks`].
    pub only_looks: bool,
    pub overlay: &'a Overlay,
    pub gathered: Gathered,
}

/// A section being read.
pub(crate) struct Section<'r, 'a> {
    pub reader: &'r mut Reader<'a>,
    name: &'static str,
    table: Option<&'r Table>,
    known: Vec<&'static str>,
    /// Where in etcd the table is from, and the scope; none for a table of the file.
    etcd: Option<(&'static str, &'static str)>,
}

pub(crate) fn kebab(key: &str) -> String {
    key.replace('_', "-")
}

/// The key of etcd that holds a section.
fn etcd_place(section: &str) -> &'static str {
    match section {
        "api" => "config/agent/api",
        "container-logs" => "config/agent/container-logs",
        _ => "config/agent/kernel-lifecycles",
    }
}

/// Line, variable or key of etcd that a value of this origin stands at.
fn place(
    origin: Option<Origin>,
    key: &str,
) -> (
    Option<usize>,
    Option<&'static str>,
    Option<(String, &'static str)>,
) {
    match origin {
        Some(Origin::File { line }) => (Some(line), None, None),
        Some(Origin::Environment(variable)) => (None, Some(variable), None),
        Some(Origin::Etcd { under, scope }) => {
            (None, None, Some((format!("{under}/{key}"), scope)))
        }
        _ => (None, None, None),
    }
}

impl<'a> Reader<'a> {
    /// A value that is not an entry of the file: detected or computed.
    pub(crate) fn record<T: Setting>(
        &mut self,
        section: &str,
        key: &'static str,
        value: &T,
        origin: Origin,
    ) {
        // A later record replaces an earlier one, so that the table shows what is in effect.
        let effective = Effective {
            section: section.to_owned(),
            key,
            text: value.text(),
            json: value.json(),
            origin,
        };
        let values = &mut self.gathered.values;
        match values
            .iter_mut()
            .find(|v| v.key == key && v.section == section)
        {
            Some(earlier) => *earlier = effective,
            None => values.push(effective),
        }
    }

    pub(crate) fn origin(&self, section: &str, key: &str) -> Option<Origin> {
        let mut values = self.gathered.values.iter();
        values
            .find(|v| v.key == key && v.section == section)
            .map(|v| v.origin)
    }

    pub(crate) fn note(
        &mut self,
        kind: NoteKind,
        line: Option<usize>,
        key: impl Into<String>,
        text: impl Into<String>,
    ) {
        self.gathered.notes.push(Note {
            kind,
            line,
            key: key.into(),
            text: text.into(),
        });
    }

    /// A fault found by comparing values, told at the place the named value came from.
    pub(crate) fn fault(
        &mut self,
        section: &str,
        key: &str,
        why: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let found = self
            .gathered
            .values
            .iter()
            .find(|v| v.key == key && v.section == section);
        let (line, variable, etcd) = place(found.map(|v| v.origin), key);
        let value = found
            .filter(|v| !v.text.is_empty())
            .map(|v| format!("{:?}", v.text));
        self.gathered.problems.push(Problem {
            line,
            variable,
            etcd,
            key: format!("{section}.{key}"),
            value,
            why: why.into(),
            remedy: remedy.into(),
        });
    }

    /// A name that does not resolve, told as a fault is, for as long as it lasts.
    pub(crate) fn unresolved(
        &mut self,
        section: &str,
        key: &str,
        why: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.fault(section, key, why, remedy);
        let told = self.gathered.problems.pop();
        self.gathered.unresolved.extend(told);
    }
}

impl<'r, 'a> Section<'r, 'a> {
    /// Opens a section of `parent`, which may lack it. `name` is the full dotted name.
    pub(crate) fn open(
        reader: &'r mut Reader<'a>,
        parent: Option<&'r Table>,
        name: &'static str,
    ) -> Self {
        let short = name.rsplit('.').next().unwrap_or(name);
        let found = parent.and_then(|p| p.entries.iter().find(|e| kebab(&e.key) == short));
        let table = match found.map(|entry| (&entry.value.kind, entry.line)) {
            Some((Kind::Table(table), _)) => Some(table),
            Some((_, line)) => {
                reader.gathered.problems.push(Problem {
                    line: Some(line),
                    variable: None,
                    etcd: None,
                    key: name.to_owned(),
                    value: None,
                    why: "this is a section, not a value".to_owned(),
                    remedy: format!("write [{name}] on a line of its own and the keys below it"),
                });
                None
            }
            None => None,
        };
        let mut section = Self {
            reader,
            name,
            table,
            known: Vec::new(),
            etcd: None,
        };
        if let Some((replacement, scope)) = section.reader.overlay.section(name) {
            if let Some(entry) = found {
                section.reader.note(
                    NoteKind::NotUsed,
                    Some(entry.line),
                    name,
                    "is not used: config/agent in etcd takes its place",
                );
            }
            section.table = replacement;
            section.etcd = Some((etcd_place(name), scope));
        }
        section
    }

    pub(crate) fn is_present(&self) -> bool {
        self.table.is_some()
    }

    /// The section's own entries, to open sections inside it.
    pub(crate) fn table(&self) -> Option<&'r Table> {
        self.table
    }

    /// The value of a key as it stands, and where it stands.
    pub(crate) fn raw(&mut self, key: Key) -> Option<(Value, Origin)> {
        self.known.push(key.name);
        self.reader.gathered.order.push((self.name, key.name));
        self.known.extend(key.aliases);
        let found = self.in_file(key);
        if let Some(under) = key.etcd
            && let Some(found) = self.reader.overlay.container(key.name)
        {
            let scope = found.scope;
            return Some((found.value.clone(), Origin::Etcd { under, scope }));
        }
        if let Some(variable) = key.variable
            && let Some(text) = (self.reader.environment)(variable)
        {
            // It replaces the file's all the same.
            let absent = key.blank && text.is_empty();
            return (!absent).then(|| (Value::text(0, text), Origin::Environment(variable)));
        }
        let place = self.etcd;
        let is_blank = |value: &Value| matches!(&value.kind, Kind::Text(text) if text.is_empty());
        let found = found.filter(|value| !(key.blank && is_blank(value)));
        found.map(|value| {
            let origin = match place {
                Some((under, scope)) => Origin::Etcd { under, scope },
                None => Origin::File { line: value.line },
            };
            (value.clone(), origin)
        })
    }

    fn in_file(&mut self, key: Key) -> Option<&'r Value> {
        let table = self.table?;
        let names = std::iter::once(&key.name).chain(key.aliases);
        let mut found = names.flat_map(|name| {
            // The kebab form wins over the snake form, the name over its aliases.
            let exact = table.entries.iter().filter(move |e| e.key == *name);
            let snake = table
                .entries
                .iter()
                .filter(move |e| e.key != *name && kebab(&e.key) == *name);
            exact.chain(snake)
        });
        let first = found.next()?;
        let others: Vec<_> = found.collect();
        for other in others {
            let text = format!(
                "is the same setting as {:?} of line {}, which is used",
                first.key, first.line
            );
            self.reader.note(
                NoteKind::Warning,
                Some(other.line),
                format!("{}.{}", self.name, other.key),
                text,
            );
        }
        Some(&first.value)
    }

    /// A setting that may be absent.
    pub(crate) fn optional<T: Setting>(&mut self, key: Key) -> Option<T> {
        self.checked(key, |_| Ok(()))
    }

    /// A setting that may be absent, with a rule of its own.
    pub(crate) fn checked<T: Setting>(
        &mut self,
        key: Key,
        rule: impl FnOnce(&T) -> Result<(), Fault>,
    ) -> Option<T> {
        let (value, origin) = self.raw(key)?;
        let read = T::read(&value, self.reader.host).and_then(|read| rule(&read).map(|()| read));
        match read {
            Ok(read) => {
                self.reader.record(self.name, key.name, &read, origin);
                Some(read)
            }
            Err(fault) => {
                self.refuse(key, &value, origin, fault);
                None
            }
        }
    }

    pub(crate) fn refuse(&mut self, key: Key, value: &Value, origin: Origin, fault: Fault) {
        let (line, variable, etcd) = place(Some(origin), key.name);
        let shown = if key.secret {
            "***".to_owned()
        } else {
            value.shown()
        };
        self.reader.gathered.problems.push(Problem {
            line,
            variable,
            etcd,
            key: format!("{}.{}", self.name, key.name),
            value: Some(shown),
            why: fault.why,
            remedy: fault.remedy,
        });
    }

    /// Shows a setting as it was completed; it is still from where it was read.
    pub(crate) fn amend<T: Setting>(&mut self, key: Key, value: &T) {
        let origin = self.reader.origin(self.name, key.name);
        self.reader.record(
            self.name,
            key.name,
            value,
            origin.unwrap_or(Origin::Default),
        );
    }

    /// A setting with a default.
    pub(crate) fn or<T: Setting>(&mut self, key: Key, default: T) -> T {
        self.or_checked(key, default, |_| Ok(()))
    }

    /// A setting with a default and a rule of its own.
    pub(crate) fn or_checked<T: Setting>(
        &mut self,
        key: Key,
        default: T,
        rule: impl FnOnce(&T) -> Result<(), Fault>,
    ) -> T {
        match self.checked(key, rule) {
            Some(value) => value,
            None => {
                self.reader
                    .record(self.name, key.name, &default, Origin::Default);
                default
            }
        }
    }

    /// A setting that standalone mode defaults in its own way.
    pub(crate) fn or_standalone<T: Setting>(&mut self, key: Key, cluster: T, standalone: T) -> T {
        if !self.reader.standalone {
            return self.or(key, cluster);
        }
        match self.optional(key) {
            Some(value) => value,
            None => {
                self.reader
                    .record(self.name, key.name, &standalone, Origin::Standalone);
                standalone
            }
        }
    }

    /// A setting that must be given; the placeholder goes on after the fault is recorded.
    pub(crate) fn required<T: Setting>(&mut self, key: Key, placeholder: T, remedy: &str) -> T {
        let faults = self.reader.gathered.problems.len();
        match self.optional(key) {
            Some(value) => value,
            None => {
                if self.reader.gathered.problems.len() == faults {
                    self.missing(key, remedy);
                }
                placeholder
            }
        }
    }

    pub(crate) fn missing(&mut self, key: Key, remedy: &str) {
        self.reader.gathered.problems.push(Problem {
            line: None,
            variable: None,
            etcd: None,
            key: format!("{}.{}", self.name, key.name),
            value: None,
            why: "is required and missing".to_owned(),
            remedy: remedy.to_owned(),
        });
    }

    /// Records that an optional setting is not set, so that the table is complete.
    pub(crate) fn show_absent(&mut self, key: &'static str) {
        if self.reader.origin(self.name, key).is_none() {
            self.reader.gathered.values.push(Effective {
                section: self.name.to_owned(),
                key,
                text: String::new(),
                json: serde_json::Value::Null,
                origin: Origin::Default,
            });
        }
    }

    /// An optional setting that is shown as absent when it is.
    pub(crate) fn maybe<T: Setting>(&mut self, key: Key) -> Option<T> {
        let found = self.optional(key);
        self.show_absent(key.name);
        found
    }

    /// Ends the section: keys of the original without effect and unknown keys become notes.
    pub(crate) fn finish(
        self,
        not_used: &[(&'static str, &'static str)],
        sections: &[&'static str],
    ) {
        let Some(table) = self.table else { return };
        for entry in &table.entries {
            let name = kebab(&entry.key);
            if self.known.contains(&name.as_str()) || sections.contains(&name.as_str()) {
                continue;
            }
            let key = match self.etcd {
                Some((place, scope)) => format!("{place}/{} ({scope}) of etcd", entry.key),
                None => format!("{}.{}", self.name, entry.key),
            };
            let line = self.etcd.is_none().then_some(entry.line);
            if let Some((_, why)) = not_used.iter().find(|(known, _)| *known == name) {
                self.reader
                    .note(NoteKind::NotUsed, line, key, format!("is not used: {why}"));
                continue;
            }
            let all = self
                .known
                .iter()
                .chain(sections)
                .copied()
                .chain(not_used.iter().map(|n| n.0));
            let text = match nearest(&name, all) {
                Some(word) => format!("is not a known key and is ignored; did you mean {word:?}?"),
                None => "is not a known key and is ignored".to_owned(),
            };
            self.reader.note(NoteKind::Unknown, line, key, text);
        }
    }
}
