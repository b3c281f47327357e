//! The rules of the house that a compiler does not check: who may depend on whom, where unsafe
//! code may live, which dependencies are accounted for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests crate lives below the root")
        .to_owned()
}

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version=1",
            "--locked",
            "--offline",
            "--no-deps",
        ])
        .current_dir(root())
        .output()
        .expect("cargo can be started");
    assert!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

/// Direct dependencies of every workspace crate that end up in its library or binary.
fn direct_dependencies(kinds: &[Option<&str>]) -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"]
                .as_array()
                .expect("dependencies")
                .iter()
                .filter(|dependency| kinds.contains(&dependency["kind"].as_str()))
                .map(|dependency| dependency["name"].as_str().expect("name").to_owned())
                .collect();
            (
                package["name"].as_str().expect("name").to_owned(),
                dependencies,
            )
        })
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let all = direct_dependencies(&[None, Some("build")]);
    let ours: BTreeSet<String> = all.keys().cloned().collect();
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("config", &[][..]),
        ("shared", &[]),
        ("ebpf", &[]),
        ("dataplane", &["shared", "config", "ebpf"]),
        ("control", &["shared", "config"]),
    ]);
    for (name, allowed) in allowed {
        let inside: BTreeSet<&str> = all[name]
            .iter()
            .map(String::as_str)
            .filter(|d| ours.contains(*d))
            .collect();
        let allowed: BTreeSet<&str> = allowed.iter().copied().collect();
        let extra: Vec<_> = inside.difference(&allowed).collect();
        assert!(extra.is_empty(), "{name} must not depend on {extra:?}");
    }
}

#[test]
fn control_and_dataplane_do_not_see_each_other() {
    for (name, other) in [("control", "dataplane"), ("dataplane", "control")] {
        let output = Command::new(env!("CARGO"))
            .args([
                "tree",
                "--locked",
                "--offline",
                "-p",
                name,
                "--edges",
                "normal,build",
                "--prefix",
                "none",
            ])
            .current_dir(root())
            .output()
            .expect("cargo can be started");
        assert!(
            output.status.success(),
            "cargo tree: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let tree = String::from_utf8(output.stdout).expect("cargo tree prints UTF-8");
        assert!(
            tree.lines().any(|line| line.starts_with("shared v")),
            "{name} uses the shared crate:\n{tree}"
        );
        let seen: Vec<_> = tree
            .lines()
            .filter(|line| line.starts_with(&format!("{other} v")))
            .collect();
        assert!(seen.is_empty(), "{name} links {other}: {seen:?}");
    }
}

#[test]
fn every_direct_dependency_is_accounted_for() {
    let text =
        std::fs::read_to_string(root().join("docs/dependencies.md")).expect("docs/dependencies.md");
    let listed: BTreeSet<&str> = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| crate"))
        .filter_map(|line| line.split('|').nth(1))
        .flat_map(|cell| cell.split(','))
        .map(str::trim)
        .collect();
    let all = direct_dependencies(&[None, Some("build"), Some("dev")]);
    let ours: BTreeSet<&String> = all.keys().collect();
    let used: BTreeSet<&str> = all
        .values()
        .flatten()
        .filter(|d| !ours.contains(d))
        .map(String::as_str)
        .collect();
    let unlisted: Vec<_> = used.difference(&listed).collect();
    let stale: Vec<_> = listed.difference(&used).collect();
    assert!(
        unlisted.is_empty(),
        "not in docs/dependencies.md: {unlisted:?}"
    );
    assert!(
        stale.is_empty(),
        "in docs/dependencies.md but used by no crate: {stale:?}"
    );
}

#[test]
fn every_direct_dependency_is_used() {
    let all = direct_dependencies(&[None, Some("build"), Some("dev")]);
    let mut unused = Vec::new();
    for (name, dependencies) in &all {
        let code: String = sources(".rs")
            .iter()
            .filter(|path| path.starts_with(name))
            .map(|path| std::fs::read_to_string(root().join(path)).expect("a source"))
            .collect();
        let words: BTreeSet<&str> = code
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .collect();
        let others = dependencies.iter().filter(|it| !all.contains_key(*it));
        let idle = others.filter(|it| !words.contains(it.replace('-', "_").as_str()));
        unused.extend(idle.map(|it| format!("{name}/Cargo.toml: {it}")));
    }
    assert!(unused.is_empty(), "no source names these: {unused:?}");
}

fn sources(extension: &str) -> Vec<PathBuf> {
    let output = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(root())
        .output()
        .expect("git can be started");
    assert!(
        output.status.success(),
        "git ls-files: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .expect("file names are UTF-8")
        .split('\0')
        .filter(|name| name.ends_with(extension))
        .map(PathBuf::from)
        .filter(|path| root().join(path).exists())
        .collect()
}

#[test]
fn unsafe_code_lives_where_the_house_allows_it() {
    let allowed = |path: &Path| {
        path == Path::new("shared/src/mapping.rs")
            || path == Path::new("shared/src/cell.rs")
            || path == Path::new("shared/src/heap.rs")
            || path.starts_with("dataplane/src/sys")
            || path == Path::new("dataplane/src/sys.rs")
            || path.starts_with("ebpf")
    };
    let mut offenders = Vec::new();
    let mut checked = 0;
    for path in sources(".rs") {
        checked += 1;
        if allowed(&path) {
            continue;
        }
        let text = std::fs::read_to_string(root().join(&path)).expect("a source file");
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let mut words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            // The word alone: `unsafe_code` in an attribute and strings naming it are other words.
            if words.any(|word| word == concat!("un", "safe")) {
                offenders.push(format!(
                    "{}:{}: {}",
                    path.display(),
                    number + 1,
                    line.trim()
                ));
            }
        }
    }
    assert!(
        checked > 20,
        "only {checked} Rust files found: the check looks in the wrong place"
    );
    assert!(
        offenders.is_empty(),
        "not allowed here:\n{}",
        offenders.join("\n")
    );
}

#[test]
fn crates_without_unsafe_code_forbid_it() {
    for file in [
        "config/src/lib.rs",
        "control/src/lib.rs",
        "control/src/main.rs",
        "tests/src/lib.rs",
    ] {
        let text = std::fs::read_to_string(root().join(file)).expect(file);
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{file} lacks #![forbid(unsafe_code)]"
        );
    }
}

#[test]
fn files_are_named_for_what_they_own() {
    let banned = [
        "mod.rs",
        "utils.rs",
        "util.rs",
        "common.rs",
        "helpers.rs",
        "helper.rs",
        "misc.rs",
    ];
    let offenders: Vec<_> = sources(".rs")
        .into_iter()
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| banned.iter().any(|b| name == *b))
        })
        .collect();
    assert!(
        offenders.is_empty(),
        "name these for the thing they own: {offenders:?}"
    );
}

#[test]
fn a_skip_is_said_in_one_way_only() {
    let begins = |text: &str| {
        let text = text.to_ascii_lowercase();
        let rest = text.strip_prefix("skip").unwrap_or_default();
        let rest = rest.strip_prefix("ped").unwrap_or(rest);
        let rest = rest.strip_prefix("ping").unwrap_or(rest);
        rest.starts_with([':', ' '])
    };
    assert!(["skipped: x", "SKIP: x", "Skipping x", "SKIP x"].map(begins) == [true; 4]);
    let offenders: Vec<_> = sources(".rs")
        .into_iter()
        .filter(|path| !path.ends_with("tests/src/skip.rs") && !path.ends_with(file!()))
        .filter(|path| {
            let text = std::fs::read_to_string(root().join(path)).expect("a source file");
            text.split('"').skip(1).any(begins)
        })
        .collect();
    assert!(
        offenders.is_empty(),
        "these say themselves what `tests/src/skip.rs` says: {offenders:?}"
    );
    // What test-all counts: each skipped test once, a failed one not at all.
    let report = tempfile::NamedTempFile::new().expect("a file");
    let text = "<testcase name=\"a\"><system-out>SKIP one\nSKIP two</system-out></testcase>\n\
        <testcase name=\"b\"><failure/><system-out>SKIP three</system-out></testcase>\n\
        <testcase name=\"c\"><system-out>\nnothing</system-out></testcase>\n\
        <testcase name=\"d\"><system-out>x\nSKIP four &lt;4&gt;</system-out></testcase>\n";
    std::fs::write(&report, text).expect("written");
    let counted = Command::new(root().join("tests/scripts/skipped"))
        .arg(report.path())
        .output()
        .expect("the script");
    let lines = String::from_utf8_lossy(&counted.stdout);
    assert_eq!(lines, "SKIP one\nSKIP four \n", "{counted:?}");
}

#[test]
fn container_client_and_message_library_are_each_known_to_few_files() {
    let homes: [(&str, &[&str]); 2] = [
        ("omq_proto", &["control/src/rpc/transport"]),
        ("bollard::Docker", &["control/src/docker"]),
    ];
    for (word, homes) in homes {
        let offenders: Vec<_> = sources(".rs")
            .into_iter()
            .filter(|path| path.starts_with("control/src"))
            .filter(|path| {
                !homes
                    .iter()
                    .any(|home| path.to_string_lossy().starts_with(home))
            })
            .filter(|path| {
                std::fs::read_to_string(root().join(path)).is_ok_and(|text| text.contains(word))
            })
            .collect();
        assert!(
            offenders.is_empty(),
            "{word} belongs to {homes:?}, found in {offenders:?}"
        );
    }
}

#[test]
fn tests_that_the_kernel_paths_rules_name_exist() {
    let text = std::fs::read_to_string(root().join("docs/kernel-path.md")).expect("the rules");
    let code: String = sources("rs")
        .iter()
        .map(|path| std::fs::read_to_string(root().join(path)).expect("a source"))
        .collect();
    // Names in backquotes; commands and paths have other characters.
    let is_name =
        |it: &&str| it.contains('_') && it.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric());
    let names: Vec<&str> = text.split('`').skip(1).step_by(2).filter(is_name).collect();
    assert!(names.len() > 50, "{}", names.len());
    for name in names {
        assert!(
            code.contains(&format!("fn {name}(")),
            "no test is named {name}"
        );
    }
}

#[test]
fn commands_of_the_readme_exist() {
    let makefile = std::fs::read_to_string(root().join("Makefile")).expect("Makefile");
    for document in ["README.md", "CONTRIBUTING.md", "SPECIFICATION.md"] {
        let text = std::fs::read_to_string(root().join(document)).expect(document);
        let mut found = 0;
        for target in text.split("make ").skip(1).filter_map(|rest| {
            rest.split(|c: char| !c.is_ascii_lowercase() && c != '-')
                .next()
        }) {
            if target.is_empty()
                || !text.contains(&format!("`make {target}"))
                    && !text.contains(&format!("\nmake {target}"))
            {
                continue;
            }
            found += 1;
            assert!(
                makefile
                    .lines()
                    .any(|line| line.starts_with(&format!("{target}:"))
                        || line.starts_with(&format!("{target} "))),
                "{document} names `make {target}`, which the Makefile lacks"
            );
        }
        assert!(found > 0, "{document} names no make target");
    }
}

#[test]
fn documents_that_are_named_exist() {
    let documents = sources("md");
    // The one of the runner is a file in containers.
    let is_there = |name: &str| {
        name == "DO_NOT_STORE_PERSISTENT_FILES_HERE.md"
            || documents.iter().any(|path| path.ends_with(name))
    };
    let mut missing = BTreeSet::new();
    let in_name = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    for kind in ["rs", "c", "h", "py", "toml", "yml", "service", "md"] {
        for path in sources(&format!(".{kind}")) {
            let text = std::fs::read_to_string(root().join(&path)).expect("a source");
            for (end, _) in text.match_indices(".md") {
                let start = text[..end]
                    .rfind(|c: char| !in_name(c))
                    .map_or(0, |it| it + 1);
                let rest = text[end + 3..].chars().next();
                if rest.is_some_and(|c| c.is_ascii_alphanumeric()) || start == end {
                    continue;
                }
                let name = &text[start..end + 3];
                let name = name.rsplit('/').next().unwrap_or(name);
                if !is_there(name) {
                    missing.insert(format!("{} names {name}", path.display()));
                }
            }
        }
    }
    for path in &documents {
        let text = std::fs::read_to_string(root().join(path)).expect("a document");
        let directory = path.parent().expect("a file has a directory");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|it| it.split(')').next())
        {
            let file = link.split('#').next().unwrap_or(link);
            if !link.contains("://") && !root().join(directory).join(file).exists() {
                missing.insert(format!("{} links to {link}", path.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// The last string of each call of a log macro: its message.
fn log_messages(code: &str) -> Vec<&str> {
    let mut messages = Vec::new();
    for name in ["trace!(", "debug!(", "info!(", "warn!(", "error!("] {
        for (at, _) in code.match_indices(&format!("tracing::{name}")) {
            let call = &code[at + "tracing::".len() + name.len()..];
            let (mut depth, mut from, mut escaped) = (1, None, false);
            let mut last = "";
            for (position, byte) in call.bytes().enumerate() {
                match (from, byte) {
                    _ if std::mem::take(&mut escaped) => {}
                    (Some(_), b'\\') => escaped = true,
                    (Some(start), b'"') => {
                        last = &call[start..position];
                        from = None;
                    }
                    (Some(_), _) => {}
                    (None, b'"') => from = Some(position + 1),
                    (None, b'(' | b'[' | b'{') => depth += 1,
                    (None, b')' | b']' | b'}') => depth -= 1,
                    (None, _) => {}
                }
                if depth == 0 {
                    break;
                }
            }
            messages.push(last);
        }
    }
    messages
}

#[test]
fn log_messages_are_alike() {
    assert_eq!(
        log_messages(r#"tracing::warn!(a = f("x."), "in \"it\""); g("Y.")"#),
        [r#"in \"it\""#]
    );
    let mut others = Vec::new();
    let mut seen = 0;
    for file in sources("rs") {
        if !file.components().any(|part| part.as_os_str() == "src") {
            continue;
        }
        let code = std::fs::read_to_string(root().join(&file)).expect("source");
        for message in log_messages(&code) {
            seen += 1;
            let word = message.split([' ', '-', ';']).next().unwrap_or_default();
            let is_name = word == "Docker" || (word.len() > 1 && word == word.to_uppercase());
            let is_capital = word.starts_with(|letter: char| letter.is_ascii_uppercase());
            if message.ends_with('.') || (is_capital && !is_name) {
                others.push(format!("{}: {message}", file.display()));
            }
        }
    }
    assert!(seen > 200, "{seen} calls were found");
    assert!(
        others.is_empty(),
        "log messages begin with a small letter and end without a full stop: {others:#?}"
    );
}
