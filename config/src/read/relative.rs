//! Relative paths: another directory for each that a program is started in. Units start in `/`, a Python agent
//! was often started by hand.

use std::path::Path;

use super::later::section_of;
use crate::document::{Kind, Table};
use crate::problem::NoteKind;
use crate::section::{Reader, kebab};

/// Settings that are paths, and may be of something that is not there yet.
const PATHS: &[(&str, &[&str])] = &[
    (
        "agent",
        &[
            "ipc-base-path",
            "var-base-path",
            "mount-path",
            "image-commit-path",
            "abuse-report-path",
            "pid-file",
        ],
    ),
    ("container", &["scratch-root"]),
    ("debug.coredump", &["path"]),
    ("node", &["run-dir", "state-dir", "runner-dir"]),
];

/// Warns of each that the file has.
pub(super) fn note(reader: &mut Reader<'_>, root: &Table) {
    let working = reader.host.working_directory();
    for (section, keys) in PATHS {
        let Some((_, table)) = section_of(root, section) else {
            continue;
        };
        for entry in &table.entries {
            let Kind::Text(path) = &entry.value.kind else {
                continue;
            };
            let rooted = path.is_empty() || path.starts_with(['/', '~']);
            if rooted || !keys.contains(&kebab(&entry.key).as_str()) {
                continue;
            }
            let plain = path.trim_start_matches("./");
            let text = format!(
                "is relative: {} from here, {} for the units, which start in /; write the whole path",
                working.join(plain).display(),
                Path::new("/").join(plain).display()
            );
            let key = format!("{section}.{}", entry.key);
            reader.note(NoteKind::Warning, Some(entry.line), key, text);
        }
    }
}
