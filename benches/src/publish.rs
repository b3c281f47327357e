//! The bench of publishing: how long rows take, what ports cost at a container's start and stop.
//!
//! In: [`Options`]. Out: tables, `publish.json`. Invariant: a time ends with the last
//! acknowledgement, and afterwards every port has answered a connection, or refused one.

mod standing;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde_json::json;
use shared::desired::{PortKey, PortRow};
use shared::ids::Generation;
use shared::observed::{ForwardPath, PortState};

use self::standing::Figures;
use crate::Stage;
use crate::chart::short;
use crate::engine::Engine;
use crate::load;
use crate::node::{Node, row};
use crate::ports::report::Machine;
use crate::ports::serve;
use crate::site::{CONTAINER, ECHO_PORT, Group, HOST, Place, Site};
use crate::statistics::Spread;

/// First host port of the bench, in a namespace of its own.
const FIRST: u16 = 20_000;
/// How long an acknowledgement may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What to measure and how often.
#[derive(Debug, Clone, clap::Parser)]
#[command(about = "Publishing service ports, against the engine's bindings")]
pub struct Options {
    /// Rounds of everything.
    #[arg(long, default_value_t = 7)]
    pub rounds: u32,
    /// Ports published at once.
    #[arg(long, default_value_t = 100)]
    pub ports: u16,
    /// Ports whose memory is taken.
    #[arg(long, default_value_t = 1000)]
    pub many: u16,
    /// Ports that stand while rows and links come and go, at most 2,000; not measured when there are none.
    #[arg(long, value_delimiter = ',')]
    pub standing: Vec<u16>,
    /// Ports of a container.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 1, 10, 32])]
    pub container_ports: Vec<u16>,
    /// Other rules on the host.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 200])]
    pub rules: Vec<u16>,
    /// Leave the container engine out.
    #[arg(long)]
    pub no_engine: bool,
    /// Where the results go.
    #[arg(long, default_value = "target/bench")]
    pub output: PathBuf,
}

/// One time taken.
#[derive(Debug, Clone, Serialize)]
struct Sample {
    /// `publish`, `withdraw`, `start` or `stop`.
    what: &'static str,
    /// `kernel`, `relay`, `engine` or `ours`.
    how: &'static str,
    ports: u16,
    rules: u16,
    round: u32,
    ms: f64,
}

/// Memory of the dataplane.
#[derive(Debug, Clone, Copy, Serialize)]
struct Many {
    ports: u16,
    processes: u64,
    private_without: u64,
    private_with: u64,
}

/// Runs the bench.
///
/// # Errors
/// A port is not served, or a program is missing.
pub fn run(options: &Options, stage: &Stage) -> Result<()> {
    ensure!(options.rounds > 0, "--rounds 0 measures nothing");
    let most = options.standing.iter().all(|it| *it <= 2000);
    ensure!(most, "--standing takes at most 2000 ports");
    std::fs::create_dir_all(&options.output)
        .with_context(|| options.output.display().to_string())?;
    let machine = Machine::now();
    let site = stage.set(Site::new()?);
    site.make()?;
    let init_pid = serve(&site)?;
    let mut samples = Vec::new();
    let mut many = None;
    for (how, path) in [
        ("kernel", ForwardPath::KernelPath),
        ("relay", ForwardPath::Relay),
    ] {
        let settings = if how == "kernel" { "auto" } else { "relay" };
        let mut node = Node::start(
            &site,
            Some(Place::Host),
            &format!("forward = \"{settings}\""),
        )?;
        // One port stays, so that the container is known and what is made once is made.
        node.publish(&site, &[(FIRST - 1, ECHO_PORT)], path, init_pid)?;
        let link_index = node.link_index(&site)?;
        for round in 0..options.rounds {
            let times = rows(&mut node, &site, options.ports, link_index, path)
                .with_context(|| format!("{} rows by the {path}", options.ports))?;
            for (what, ms) in [("publish", times[0]), ("withdraw", times[1])] {
                samples.push(Sample {
                    what,
                    how,
                    ports: options.ports,
                    rules: 0,
                    round,
                    ms,
                });
            }
        }
        if how == "kernel" {
            many = Some(memory(&mut node, &site, options.many, link_index)?);
        }
        node.stop(&site);
    }
    let standing: Vec<Figures> = options
        .standing
        .iter()
        .map(|count| standing::measure(&site, init_pid, *count))
        .collect::<Result<_>>()?;
    let mut version = None;
    if !options.no_engine {
        site.end(Group::Server);
        version = Some(containers(options, &site, &mut samples)?);
    }
    site.clean();
    report(options, &machine, &samples, many, &standing, version)
}

fn wanted(
    from: u16,
    count: u16,
    target: IpAddr,
    target_port: u16,
    link_index: u32,
) -> Vec<PortRow> {
    (from..from + count)
        .map(|port| {
            let mut row = row(port, target, target_port);
            row.link_index = link_index;
            row.link_guard = link_index != 0;
            row
        })
        .collect()
}

/// Waits for the last acknowledgement of `keys`.
fn acknowledged(node: &mut Node, keys: &[PortKey], at: Generation, state: PortState) -> Result<()> {
    let region = node.desired.region_id();
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Ok(snapshot) = node.observed.snapshot() {
            let open = keys
                .iter()
                .filter(|key| {
                    !snapshot
                        .port(**key)
                        .is_some_and(|status| status.answers(region, at) && status.state == state)
                })
                .count();
            if open == 0 {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!(
                    "{open} of {} rows are not {state} after {PATIENCE:?}",
                    keys.len()
                );
            }
        }
        node.wait_for_ring(Duration::from_millis(50));
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Publishes and withdraws rows; milliseconds of both.
fn rows(
    node: &mut Node,
    site: &Site,
    count: u16,
    link_index: u32,
    path: ForwardPath,
) -> Result<[f64; 2]> {
    let rows = wanted(FIRST, count, CONTAINER.parse()?, ECHO_PORT, link_index);
    let keys: Vec<PortKey> = rows.iter().map(PortRow::key).collect();
    let begin = Instant::now();
    let generation = node.write(|batch| {
        for row in rows {
            batch.put_port(row);
        }
    })?;
    acknowledged(node, &keys, generation, PortState::Serving)?;
    let published = milliseconds(begin);
    let snapshot = node.observed.snapshot()?;
    for key in &keys {
        let is = snapshot.port(*key).map(|status| status.path);
        ensure!(is == Some(path), "{key} is served by {is:?}");
    }
    site.within(Place::Client, || {
        for key in &keys {
            let address = SocketAddr::new(HOST.parse()?, key.host_port);
            load::proven(address).with_context(|| format!("{address} does not answer"))?;
        }
        anyhow::Ok(())
    })??;
    let begin = Instant::now();
    let generation = node.write(|batch| {
        for key in &keys {
            batch.remove_port(*key);
        }
    })?;
    acknowledged(node, &keys, generation, PortState::Removed)?;
    let withdrawn = milliseconds(begin);
    site.within(Place::Client, || {
        for key in &keys {
            let address = SocketAddr::new(HOST.parse()?, key.host_port);
            ensure!(
                TcpStream::connect_timeout(&address, Duration::from_secs(5)).is_err(),
                "{address} still answers"
            );
        }
        anyhow::Ok(())
    })??;
    node.release();
    Ok([published, withdrawn])
}

fn memory(node: &mut Node, site: &Site, count: u16, link_index: u32) -> Result<Many> {
    let before = site.memory(Group::Proxy);
    let rows = wanted(FIRST, count, CONTAINER.parse()?, ECHO_PORT, link_index);
    let keys: Vec<PortKey> = rows.iter().map(PortRow::key).collect();
    let generation = node.write(|batch| {
        for row in rows {
            batch.put_port(row);
        }
    })?;
    acknowledged(node, &keys, generation, PortState::Serving)?;
    let after = site.memory(Group::Proxy);
    Ok(Many {
        ports: count,
        processes: after.processes,
        private_without: before.private,
        private_with: after.private,
    })
}

/// Rules of somebody else, which the engine must work beside.
fn other_rules(site: &Site, count: u16) -> Result<()> {
    let mut text = "*filter\n:OTHERS - [0:0]\n".to_owned();
    let mut nat = "*nat\n:OTHERS - [0:0]\n".to_owned();
    for number in 0..count / 2 {
        let address = format!("10.79.{}.{}", number / 250, number % 250 + 1);
        text += &format!("-A OTHERS -d {address}/32 -p tcp -m tcp --dport 80 -j ACCEPT\n");
        nat += &format!(
            "-A OTHERS -p tcp -m tcp --dport {} -j DNAT --to-destination {address}:80\n",
            30_000 + number
        );
    }
    site.restore(&(text + "COMMIT\n" + &nat + "COMMIT\n"))
}

/// Starts and stops containers with the engine's bindings and with ours, in turn.
fn containers(options: &Options, site: &Site, samples: &mut Vec<Sample>) -> Result<String> {
    let engine = Engine::start(site)?;
    let mut node = Node::start(site, Some(Place::Host), "forward = \"relay\"")?;
    // The first container of an engine makes what the others find.
    engine.remove(&engine.run(&[])?)?;
    for rules in &options.rules {
        other_rules(site, *rules)?;
        for round in 0..options.rounds {
            for ports in &options.container_ports {
                let mut add = |what, how, ms| {
                    samples.push(Sample {
                        what,
                        how,
                        ports: *ports,
                        rules: *rules,
                        round,
                        ms,
                    });
                };
                let numbers: Vec<u16> = (FIRST..FIRST + ports).collect();
                let begin = Instant::now();
                let id = engine.run(&numbers)?;
                add("start", "engine", milliseconds(begin));
                let begin = Instant::now();
                engine.remove(&id)?;
                add("stop", "engine", milliseconds(begin));

                let begin = Instant::now();
                let id = engine.run(&[])?;
                let rows = wanted(FIRST, *ports, engine.address(&id)?, 80, 0);
                let keys: Vec<PortKey> = rows.iter().map(PortRow::key).collect();
                let generation = node.write(|batch| {
                    for row in rows {
                        batch.put_port(row);
                    }
                })?;
                acknowledged(&mut node, &keys, generation, PortState::Serving)?;
                add("start", "ours", milliseconds(begin));
                let begin = Instant::now();
                let generation = node.write(|batch| {
                    for key in &keys {
                        batch.remove_port(*key);
                    }
                })?;
                acknowledged(&mut node, &keys, generation, PortState::Removed)?;
                engine.remove(&id)?;
                add("stop", "ours", milliseconds(begin));
                node.release();
            }
            eprintln!(
                "{rules} other rules, round {} of {}",
                round + 1,
                options.rounds
            );
        }
    }
    node.stop(site);
    Ok(engine.version().to_owned())
}

type Key = (&'static str, &'static str, u16, u16);

fn report(
    options: &Options,
    machine: &Machine,
    samples: &[Sample],
    many: Option<Many>,
    standing: &[Figures],
    engine: Option<String>,
) -> Result<()> {
    let mut groups: BTreeMap<Key, Vec<f64>> = BTreeMap::new();
    let mut pairs: BTreeMap<(&str, u16, u16, u32), f64> = BTreeMap::new();
    for it in samples {
        groups
            .entry((it.what, it.how, it.ports, it.rules))
            .or_default()
            .push(it.ms);
        *pairs
            .entry((it.how, it.ports, it.rules, it.round))
            .or_default() += it.ms;
    }
    let mut ratios = serde_json::Map::new();
    let mut further = serde_json::Map::new();
    println!(
        "{:<10} {:<8} {:>6} {:>6} {:>10} {:>10} {:>10}  ms",
        "", "by", "ports", "rules", "median", "q1", "q3"
    );
    let mut summary = Vec::new();
    for ((what, how, ports, rules), figures) in groups {
        let Some(spread) = Spread::of(figures) else {
            continue;
        };
        println!(
            "{what:<10} {how:<8} {ports:>6} {rules:>6} {:>10} {:>10} {:>10}",
            short(spread.median),
            short(spread.q1),
            short(spread.q3)
        );
        if how == "kernel" {
            ratios.insert(format!("{what}_ms_{ports}_ports"), json!(spread.median));
        } else if how == "relay" {
            further.insert(
                format!("relay_{what}_ms_{ports}_ports"),
                json!(spread.median),
            );
        }
        summary.push(json!({
            "what": what, "how": how, "ports": ports, "rules": rules, "ms": spread,
        }));
    }
    for rules in &options.rules {
        for ports in &options.container_ports {
            let ratio = Spread::of((0..options.rounds).filter_map(|round| {
                let ours = pairs.get(&("ours", *ports, *rules, round))?;
                Some(ours / pairs.get(&("engine", *ports, *rules, round))?)
            }));
            let Some(ratio) = ratio else { continue };
            let name = format!("start_and_stop_vs_engine_{ports}_ports");
            if *rules == 0 && *ports == 32 {
                ratios.insert(name, json!(ratio.median));
            } else {
                further.insert(format!("{name}_{rules}_rules"), json!(ratio.median));
            }
        }
    }
    if let Some(many) = many {
        let grown = many.private_with.saturating_sub(many.private_without);
        ratios.insert(format!("bytes_{}_ports", many.ports), json!(grown));
        ratios.insert(
            format!("processes_{}_ports", many.ports),
            json!(many.processes),
        );
        further.insert(
            format!("private_bytes_with_{}_ports", many.ports),
            json!(many.private_with),
        );
    }
    for it in standing {
        ratios.insert(format!("row_us_beside_{}", it.ports), json!(it.row_us));
        ratios.insert(format!("link_us_beside_{}", it.ports), json!(it.link_us));
    }
    println!();
    for (name, value) in ratios.iter().chain(&further) {
        println!("  {name:<46} {}", short(value.as_f64().unwrap_or_default()));
    }
    let command: Vec<String> = std::env::args().collect();
    let whole = json!({
        "bench": "publish",
        "command": command.join(" "),
        "machine": machine,
        "engine": engine,
        "rounds": options.rounds,
        "ratios": ratios,
        "further": further,
        "summary": summary,
        "memory": many,
        "standing": standing,
        "samples": samples,
    });
    let path = options.output.join("publish.json");
    std::fs::write(&path, serde_json::to_string_pretty(&whole)?)
        .with_context(|| path.display().to_string())?;
    println!("\n{}", path.display());
    Ok(())
}
