//! Reads the whole document, section by section, into a [`Config`].

mod agent;
mod container;
mod inactive;
mod node;
mod other_sections;
mod relative;

use std::path::{Path, PathBuf};

use crate::document::Table;
use crate::problem::{NoteKind, Origin};
use crate::section::Reader;
use crate::sections::{Config, Overcommit};
use crate::setting::Directory;
use crate::spelling::nearest;
use crate::units::Fault;

/// Top-level sections that are read.
pub(crate) const SECTIONS: &[&str] = &[
    "agent",
    "container",
    "resource",
    "etcd",
    "debug",
    "logging",
    "service-discovery",
    "watcher",
    "container-logs",
    "api",
    "kernel-lifecycles",
    "node",
];
/// Top-level names of the original without effect here.
const NOT_USED: &[(&str, &str)] = &[
    ("pyroscope", "this agent has no pyroscope client"),
    ("otel", "traces are not exported yet"),
    ("redis", "it comes from etcd"),
    ("plugins", "it comes from etcd"),
];

/// Defaults that depend on the mode: relative to the working directory with a manager, below the
/// state directory without one.
pub(crate) struct DefaultPaths {
    state_dir: PathBuf,
}

impl DefaultPaths {
    fn directory(&self, reader: &Reader<'_>, cluster: &str, standalone: &str) -> Directory {
        if reader.standalone {
            return Directory(self.state_dir.join(standalone));
        }
        // The built-in paths are well formed, so expanding them can not fail.
        let working = reader.host.working_directory();
        Directory(
            crate::setting::absolute(cluster, reader.host)
                .unwrap_or_else(|_| working.join(cluster)),
        )
    }
}

/// Reads everything. Faults are in the reader; the result is only valid without any.
pub(crate) fn config(reader: &mut Reader<'_>, root: &Table, file: Option<&Path>) -> Config {
    top_level(reader, root);
    let defaults = DefaultPaths {
        state_dir: node::state_dir(reader, root),
    };
    // Read first, as the agent's own address may be the one that etcd is reached from; told in its place.
    let before = reader.gathered.problems.len();
    let etcd = other_sections::etcd(reader, root);
    let of_etcd = reader.gathered.problems.split_off(before);
    let addresses = etcd.as_ref().map_or(&[][..], |etcd| &etcd.addr);
    let mut agent = agent::read(reader, root, &defaults, addresses);
    let container = container::read(reader, root, &defaults, &agent);
    agent.public_host = agent::public_host(reader, &container);
    let resource = other_sections::resource(reader, root);
    reader.gathered.problems.extend(of_etcd);
    let debug = other_sections::debug(reader, root);
    let logging = other_sections::logging(reader, root);
    let service_discovery = other_sections::service_discovery(reader, root);
    let watcher = other_sections::watcher(reader, root);
    let container_logs = other_sections::container_logs(reader, root);
    let api = other_sections::api(reader, root);
    let kernel_lifecycles = other_sections::kernel_lifecycles(reader, root);
    let overcommit = overcommit(reader);
    let node = node::read(reader, root, &defaults, &agent);
    inactive::note(reader, root);
    relative::note(reader, root);
    Config {
        file: file.map(Path::to_owned),
        standalone: reader.standalone,
        agent,
        container,
        resource,
        etcd,
        debug,
        logging,
        service_discovery,
        watcher,
        container_logs,
        api,
        kernel_lifecycles,
        overcommit,
        node,
    }
}

fn top_level(reader: &mut Reader<'_>, root: &Table) {
    for entry in &root.entries {
        let name = entry.key.replace('_', "-");
        if SECTIONS.contains(&name.as_str()) {
            continue;
        }
        if let Some((_, why)) = NOT_USED.iter().find(|(known, _)| *known == name) {
            let text = format!("is not used: {why}");
            reader.note(NoteKind::NotUsed, Some(entry.line), &entry.key, text);
            continue;
        }
        let text = match nearest(&name, SECTIONS.iter().copied()) {
            Some(word) => format!("is not a known section and is ignored; did you mean [{word}]?"),
            None => "is not a known section and is ignored".to_owned(),
        };
        reader.note(NoteKind::Unknown, Some(entry.line), &entry.key, text);
    }
}

fn overcommit(reader: &mut Reader<'_>) -> Overcommit {
    Overcommit {
        cpu: factor(reader, "cpu-factor", "BACKEND_CPU_OVERCOMMIT_FACTOR", 10),
        mem: factor(reader, "mem-factor", "BACKEND_MEM_OVERCOMMIT_FACTOR", 1024),
    }
}

fn factor(reader: &mut Reader<'_>, key: &'static str, variable: &'static str, highest: u32) -> u32 {
    let Some(text) = (reader.environment)(variable) else {
        reader.record("overcommit", key, &1u32, Origin::Default);
        return 1;
    };
    match text.trim().parse::<u32>() {
        Ok(factor) if (1..=highest).contains(&factor) => {
            reader.record("overcommit", key, &factor, Origin::Environment(variable));
            factor
        }
        _ => {
            reader.gathered.problems.push(crate::problem::Problem {
                line: None,
                variable: Some(variable),
                etcd: None,
                key: format!("overcommit.{key}"),
                value: Some(format!("{text:?}")),
                why: "the factor is out of range or not a whole number".to_owned(),
                remedy: format!("write a whole number from 1 to {highest}, or unset the variable"),
            });
            1
        }
    }
}

/// A rule: the number lies in the range.
pub(crate) fn within<T: PartialOrd + std::fmt::Display>(
    low: T,
    high: T,
) -> impl FnOnce(&T) -> Result<(), Fault> {
    move |value| {
        if *value < low || *value > high {
            return Err(Fault::new(
                "the number is out of range",
                format!("write {low} to {high}"),
            ));
        }
        Ok(())
    }
}

/// A rule: the interval lies in the range, both ends included.
pub(crate) fn interval_within(
    low_ms: u64,
    high_s: u64,
) -> impl FnOnce(&std::time::Duration) -> Result<(), Fault> {
    move |interval| {
        let (low, high) = (
            std::time::Duration::from_millis(low_ms),
            std::time::Duration::from_secs(high_s),
        );
        if *interval < low || *interval > high {
            let (low, high) = (
                crate::units::interval_text(low),
                crate::units::interval_text(high),
            );
            return Err(Fault::new(
                "the interval is out of range",
                format!("write {low} to {high}"),
            ));
        }
        Ok(())
    }
}

/// A blank host to listen on is every IPv4 address (the original takes IPv6, too); `lookup_host` knows no blank name.
/// True where the host was blank.
pub(crate) fn on_every_address(host: &mut String) -> bool {
    let blank = host.is_empty();
    if blank {
        "0.0.0.0".clone_into(host);
    }
    blank
}

/// A rule: the text is not blank.
pub(crate) fn not_blank<T: AsRef<str>>(text: &T) -> Result<(), Fault> {
    if text.as_ref().trim().is_empty() {
        return Err(Fault::new(
            "the text is blank",
            "write a name, or leave the key out",
        ));
    }
    Ok(())
}
