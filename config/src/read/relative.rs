//! Relative paths: another directory for each that a program is started in. Units start in `/`, a Python agent
//! was often started by hand.

use std::path::Path;

use super::inactive::section_of;
use crate::document::{Kind, Table};
use crate::problem::{NoteKind, Origin};
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

/// Warns of each that the file has, and of scratch directories that lie where the original has them by default.
pub(super) fn note(reader: &mut Reader<'_>, root: &Table) {
    let working = reader.host.working_directory();
    let from_both = |plain: &str| {
        format!(
            "{} from here, {} for the units, which start in /; write the whole path",
            working.join(plain).display(),
            Path::new("/").join(plain).display()
        )
    };
    if !reader.standalone && reader.origin("container", "scratch-root") == Some(Origin::Default) {
        let text = format!(
            "is not set, and relative then, as the original's: {}",
            from_both("scratches")
        );
        reader.note(NoteKind::Warning, None, "container.scratch-root", text);
    }
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
            let text = format!("is relative: {}", from_both(plain));
            let key = format!("{section}.{}", entry.key);
            reader.note(NoteKind::Warning, Some(entry.line), key, text);
        }
    }
}
