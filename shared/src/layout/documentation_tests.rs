//! `docs/shared-memory.md` says what the code says.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::{HEADER_BYTES, LAYOUT_HASH, LAYOUT_VERSION, ROWS, RegionKind, Sizes};
use crate::observed::GROUPS;

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/shared-memory.md")
}

/// The part of the document between two marks, and where it is.
fn part<'a>(text: &'a str, name: &str) -> (usize, &'a str) {
    let begin = format!("<!-- begin {name} -->\n");
    let start = text.find(&begin).expect("the document has the mark") + begin.len();
    let length = text[start..]
        .find(&format!("<!-- end {name} -->"))
        .expect("and its end");
    (start, &text[start..start + length])
}

fn tables() -> String {
    let mut text = format!(
        "Layout version {LAYOUT_VERSION}, hash `{LAYOUT_HASH:#018x}`.\n\n\
         | region | table | payload of a row, bytes | a row, bytes | rows by default | at most |\n\
         | --- | --- | --- | --- | --- | --- |\n"
    );
    for kind in [RegionKind::Desired, RegionKind::Observed] {
        let limits = kind.tables(Sizes::LIMIT);
        for (table, limit) in kind.tables(Sizes::default()).iter().zip(limits) {
            let (payload, row, rows, most) = if table.name == "processes" {
                let (usual, most) = (Sizes::default().processes, Sizes::LIMIT.processes);
                (
                    "64 + 136 per process".to_owned(),
                    "two banks".to_owned(),
                    format!("{usual} processes"),
                    format!("{most} processes"),
                )
            } else {
                (
                    (table.payload_words * 8).to_string(),
                    (table.stride_words * 8).to_string(),
                    table.rows.to_string(),
                    limit.rows.to_string(),
                )
            };
            writeln!(
                text,
                "| {} | {} | {payload} | {row} | {rows} | {most} |",
                kind.file_name(),
                table.name
            )
            .expect("a string takes all");
        }
    }
    text
}

fn rows() -> String {
    let mut text = String::new();
    for row in ROWS {
        write!(
            text,
            "### {}, {} bytes\n\n| offset | field | type | bytes | meaning |\n| --- | --- | --- | --- | --- |\n",
            row.name, row.size
        )
        .expect("a string takes all");
        for field in row.fields {
            writeln!(
                text,
                "| {} | {} | {} | {} | {} |",
                field.offset, field.name, field.kind, field.size, field.meaning
            )
            .expect("a string takes all");
        }
        text.push('\n');
    }
    text
}

fn counters() -> String {
    let mut text = "| group | word | counter | meaning |\n| --- | --- | --- | --- |\n".to_owned();
    for (group, counters) in GROUPS {
        for (word, counter) in counters.iter().enumerate() {
            writeln!(
                text,
                "| {group} | {word} | {} | {} |",
                counter.name, counter.meaning
            )
            .expect("a string takes all");
        }
    }
    text
}

/// With `UPDATE_DOCS=1` in the environment the tables are written instead of compared.
#[test]
fn the_document_has_every_table_row_and_counter() {
    let mut text = std::fs::read_to_string(path()).unwrap();
    let update = std::env::var_os("UPDATE_DOCS").is_some();
    for (name, wanted) in [
        ("tables", tables()),
        ("rows", rows()),
        ("counters", counters()),
    ] {
        let (start, found) = part(&text, name);
        let end = start + found.len();
        if update {
            text.replace_range(start..end, &wanted);
        } else {
            assert_eq!(
                found, wanted,
                "docs/shared-memory.md differs; UPDATE_DOCS=1 cargo test -p shared documentation writes it"
            );
        }
    }
    if update {
        std::fs::write(path(), text).unwrap();
    }
    assert_eq!(HEADER_BYTES, 4096, "the document says so in its prose");
}

/// The hash of each version that was ever released, and of the one that will be next, whose hash is
/// replaced here with each change.
#[test]
fn a_changed_layout_has_a_new_version() {
    let recorded = [(1u32, 0x396d_5c36_9a30_d6e6)];
    assert!(
        recorded.contains(&(LAYOUT_VERSION, LAYOUT_HASH)),
        "layout {LAYOUT_VERSION} now has the hash {LAYOUT_HASH:#018x}; record it here, and raise LAYOUT_VERSION if a release has this version"
    );
}
