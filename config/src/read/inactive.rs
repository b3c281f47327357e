//! Settings that are read and checked, and on which nothing of this release acts: who sets one is
//! told so. A setting that is put to use leaves this list in the same change.

use crate::document::{Kind, Table, Value};
use crate::problem::NoteKind;
use crate::section::{Reader, kebab};

const LOG: &str = "this release logs to standard error only; a service manager keeps it";

/// Section, key and why; the key `*` is the section as a whole.
const LATER: &[(&str, &str, &str)] = &[
    (
        "agent",
        "agent-sock-port",
        "containers reach the agent by a socket file, no port is needed",
    ),
    (
        "container",
        "stats-type",
        "the collector finds out by itself what the kernel offers",
    ),
    (
        "debug.coredump",
        "backup-count",
        "old core dumps are not cleared up yet",
    ),
    (
        "debug.coredump",
        "size-limit",
        "the size of core dumps is not limited yet",
    ),
    ("logging", "drivers", LOG),
    ("logging", "pkg-ns", "set levels by module with RUST_LOG"),
    ("logging.file", "*", LOG),
];

/// Notes what the file sets of these.
pub(super) fn note(reader: &mut Reader<'_>, root: &Table) {
    for (section, key, why) in LATER {
        let Some((mut line, table)) = section_of(root, section) else {
            continue;
        };
        let mut named = (*section).to_owned();
        if *key != "*" {
            let Some(entry) = table.entries.iter().find(|entry| kebab(&entry.key) == *key) else {
                continue;
            };
            if is_console_only(section, key, &entry.value) {
                continue;
            }
            line = entry.line;
            named = format!("{section}.{}", entry.key);
        }
        // Said already, or said of its keys one by one.
        let told = |note: &crate::problem::Note| note.key.starts_with(&named);
        if reader.gathered.notes.iter().any(told) {
            continue;
        }
        let text = format!("is not used: {why}");
        reader.note(NoteKind::NotUsed, Some(line), named, text);
    }
}

/// The table of a section and the line it begins on.
pub(super) fn section_of<'t>(root: &'t Table, section: &str) -> Option<(usize, &'t Table)> {
    let mut found = (0, root);
    for name in section.split('.') {
        let entry = found
            .1
            .entries
            .iter()
            .find(|entry| kebab(&entry.key) == name)?;
        let Kind::Table(table) = &entry.value.kind else {
            return None;
        };
        found = (entry.line, table);
    }
    Some(found)
}

/// `logging.drivers = ["console"]` is what is done anyway.
fn is_console_only(section: &str, key: &str, value: &Value) -> bool {
    let Kind::Array(drivers) = &value.kind else {
        return false;
    };
    let console = |driver: &Value| matches!(&driver.kind, Kind::Text(name) if name == "console");
    section == "logging" && key == "drivers" && drivers.iter().all(console)
}
