//! What is made of the samples: ratios, a check of the figures, tables, a plot, JSON.
//!
//! In: [`Findings`]. Out: the screen, `ports.json`, `ports.svg`. Invariant: a ratio compares
//! figures of the same round, and is left out when one of its sides was not measured.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Findings, Load, Options, Sample};
use crate::chart::{self, Panel, short};
use crate::peer::Peer;
use crate::statistics::Spread;

/// What the bench ran on.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Model of the first of them.
    pub cpu: String,
    /// Load average before the bench.
    pub load_before: String,
}

fn text_of(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

impl Machine {
    /// This machine now.
    #[must_use]
    pub fn now() -> Self {
        Self {
            kernel: text_of("/proc/sys/kernel/osrelease"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            cpu: text_of("/proc/cpuinfo")
                .lines()
                .find(|line| line.starts_with("model name"))
                .and_then(|line| line.split(':').nth(1))
                .unwrap_or_default()
                .trim()
                .to_owned(),
            load_before: text_of("/proc/loadavg"),
        }
    }
}

type Figure = fn(&Sample) -> f64;

struct Samples<'a>(&'a [Sample]);

impl Samples<'_> {
    fn by_round(&self, load: Load, peer: Peer, figure: Figure) -> BTreeMap<u32, f64> {
        self.0
            .iter()
            .filter(|it| it.load == load && it.peer == peer)
            .map(|it| (it.round, figure(it)))
            .collect()
    }

    fn spread(&self, load: Load, peer: Peer, figure: Figure) -> Option<Spread> {
        Spread::of(self.by_round(load, peer, figure).into_values())
    }

    fn ratio(&self, load: Load, figure: Figure, of: Peer, to: Peer) -> Option<Spread> {
        let to = self.by_round(load, to, figure);
        Spread::of(
            self.by_round(load, of, figure)
                .into_iter()
                .filter_map(|(round, value)| Some(value / to.get(&round)?)),
        )
    }

    /// The shipped proxy with the highest median.
    fn best_proxy(&self, load: Load, figure: Figure) -> Option<Peer> {
        [Peer::DockerProxy, Peer::Haproxy, Peer::Nginx]
            .into_iter()
            .filter_map(|peer| Some((peer, self.spread(load, peer, figure)?.median)))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map(|(peer, _)| peer)
    }
}

fn p50(sample: &Sample) -> f64 {
    sample.latency_us.p50
}

fn ratios(findings: &Findings) -> Vec<(String, Spread)> {
    use Load::{Bulk, Connections, HostRequests, Latency, Requests};
    let samples = Samples(&findings.samples);
    let mut found: Vec<(String, Spread)> = Vec::new();
    let mut add = |name: &str, spread: Option<Spread>| {
        if let Some(spread) = spread {
            found.push((name.to_owned(), spread));
        }
    };
    let ours = Peer::Kernel;
    let (rate, cpu): (Figure, Figure) = (Sample::rate, Sample::cpu_per_unit);
    for peer in [
        Peer::Direct,
        Peer::Dnat,
        Peer::Nginx,
        Peer::Haproxy,
        Peer::DockerProxy,
    ] {
        add(
            &format!("remote_requests_vs_{}", peer.name()),
            samples.ratio(Requests, rate, ours, peer),
        );
    }
    for (name, load) in [
        ("request", Requests),
        ("gb", Bulk),
        ("connection", Connections),
    ] {
        add(
            &format!("remote_cpu_per_{name}_vs_direct"),
            samples.ratio(load, cpu, ours, Peer::Direct),
        );
    }
    for peer in [Peer::Direct, Peer::Nginx, Peer::Haproxy, Peer::DockerProxy] {
        add(
            &format!("remote_bulk_vs_{}", peer.name()),
            samples.ratio(Bulk, rate, ours, peer),
        );
    }
    add(
        "remote_connections_vs_direct",
        samples.ratio(Connections, rate, ours, Peer::Direct),
    );
    add(
        "remote_connections_vs_best_proxy",
        samples
            .best_proxy(Connections, rate)
            .and_then(|best| samples.ratio(Connections, rate, ours, best)),
    );
    add(
        "remote_p50_vs_direct",
        samples.ratio(Latency, p50, ours, Peer::Direct),
    );
    add(
        "host_requests_vs_direct",
        samples.ratio(HostRequests, rate, ours, Peer::Direct),
    );
    add(
        "host_cpu_per_request_vs_docker_proxy",
        samples.ratio(HostRequests, cpu, ours, Peer::DockerProxy),
    );
    add(
        "relay_cpu_s_per_gb",
        samples.spread(Bulk, Peer::Relay, Sample::own_per_unit),
    );
    add(
        "relay_requests_vs_nginx",
        samples.ratio(Requests, rate, Peer::Relay, Peer::Nginx),
    );
    add(
        "relay_bytes_per_idle_connection",
        findings
            .idle
            .iter()
            .find(|it| it.peer == Peer::Relay)
            .and_then(|it| Spread::of([it.bytes_per_connection()])),
    );
    found
}

/// Ratios that no target names but that explain those that are.
fn further(findings: &Findings) -> Vec<(String, Spread)> {
    use Load::{Bulk, Connections, HostBulk, HostConnections, HostRequests, Latency, Requests};
    let samples = Samples(&findings.samples);
    let (rate, cpu, own): (Figure, Figure, Figure) =
        (Sample::rate, Sample::cpu_per_unit, Sample::own_per_unit);
    let (kernel, relay) = (Peer::Kernel, Peer::Relay);
    let mut found: Vec<_> = [
        (
            "relay_own_cpu_per_request_vs_nginx",
            samples.ratio(Requests, own, relay, Peer::Nginx),
        ),
        (
            "relay_own_cpu_per_gb_vs_haproxy",
            samples.ratio(Bulk, own, relay, Peer::Haproxy),
        ),
        (
            "relay_cpu_per_connection_vs_nginx",
            samples.ratio(Connections, cpu, relay, Peer::Nginx),
        ),
        (
            "relay_connections_vs_nginx",
            samples.ratio(Connections, rate, relay, Peer::Nginx),
        ),
        (
            "relay_uring_own_cpu_per_request_vs_splice",
            samples.ratio(Requests, own, Peer::RelayUring, relay),
        ),
        (
            "relay_uring_own_cpu_per_gb_vs_splice",
            samples.ratio(Bulk, own, Peer::RelayUring, relay),
        ),
        (
            "relay_uring_own_cpu_per_connection_vs_splice",
            samples.ratio(Connections, own, Peer::RelayUring, relay),
        ),
        (
            "relay_uring_requests_vs_splice",
            samples.ratio(Requests, rate, Peer::RelayUring, relay),
        ),
        (
            "remote_cpu_per_request_vs_dnat",
            samples.ratio(Requests, cpu, kernel, Peer::Dnat),
        ),
        (
            "host_cpu_per_request_vs_direct",
            samples.ratio(HostRequests, cpu, kernel, Peer::Direct),
        ),
        (
            "host_cpu_per_gb_vs_direct",
            samples.ratio(HostBulk, cpu, kernel, Peer::Direct),
        ),
        (
            "host_bulk_vs_direct",
            samples.ratio(HostBulk, rate, kernel, Peer::Direct),
        ),
        (
            "host_connections_vs_direct",
            samples.ratio(HostConnections, rate, kernel, Peer::Direct),
        ),
        (
            "host_cpu_per_connection_vs_direct",
            samples.ratio(HostConnections, cpu, kernel, Peer::Direct),
        ),
    ]
    .into_iter()
    .filter_map(|(name, spread)| Some((name.to_owned(), spread?)))
    .collect();
    // How far below the direct route any path can get.
    for load in [Requests, Latency, Connections, Bulk] {
        let name = load.name();
        for (name, figure) in [
            (format!("cable_{name}_vs_direct"), rate),
            (format!("cable_cpu_of_{name}_vs_direct"), cpu),
        ] {
            let spread = samples.ratio(load, figure, Peer::Cable, Peer::Direct);
            found.extend(spread.map(|spread| (name, spread)));
        }
    }
    found
}

/// Figures of peers that can't be: a bench that measures those measures something else.
/// Bounds are an order of magnitude beyond what small and large machines were seen to do.
fn check(samples: &[Sample]) -> Result<()> {
    let mut strange = Vec::new();
    for sample in samples.iter().filter(|it| !it.peer.is_ours()) {
        let (name, scale, rate, cpu) = match sample.load {
            Load::Requests | Load::HostRequests => ("requests", 1e6, (300.0, 5e6), (1.0, 2_000.0)),
            Load::Latency => ("requests", 1e6, (50.0, 3e5), (1.0, 5_000.0)),
            Load::Connections | Load::HostConnections => {
                ("connections", 1e6, (30.0, 1e6), (10.0, 20_000.0))
            }
            Load::Bulk | Load::HostBulk => ("GB", 1.0, (0.01, 60.0), (0.02, 30.0)),
            Load::Idle => continue,
        };
        let what = format!(
            "{} over {} in round {}",
            sample.load.name(),
            sample.peer.name(),
            sample.round
        );
        let mut band = |figure: f64, (low, high): (f64, f64), unit: String| {
            if !(low..=high).contains(&figure) {
                strange.push(format!(
                    "{what}: {} {unit}, expected {low} to {high}",
                    short(figure)
                ));
            }
        };
        band(sample.rate(), rate, format!("{name}/s"));
        let unit = if scale > 1.0 { "us" } else { "s" };
        band(
            sample.cpu_per_unit() * scale,
            cpu,
            format!("CPU {unit} per unit"),
        );
        if sample.peer.has_process() && sample.cpu.proxy <= 0.0 {
            strange.push(format!("{what}: the proxy has used no CPU time"));
        }
        if sample.failures as f64 > sample.units / 100.0 {
            strange.push(format!("{what}: {} connections lost", sample.failures));
        }
    }
    if strange.is_empty() {
        Ok(())
    } else {
        bail!("figures outside the sane band:\n  {}", strange.join("\n  "))
    }
}

/// What a load's figures are called and scaled by.
struct Units {
    rate: &'static str,
    rate_scale: f64,
    cpu: &'static str,
    cpu_scale: f64,
}

fn units(load: Load) -> Units {
    match load {
        Load::Bulk | Load::HostBulk => Units {
            rate: "Gbit/s",
            rate_scale: 8.0,
            cpu: "CPU s per GB",
            cpu_scale: 1.0,
        },
        Load::Connections | Load::HostConnections => Units {
            rate: "connections/s",
            rate_scale: 1.0,
            cpu: "CPU us per connection",
            cpu_scale: 1e6,
        },
        _ => Units {
            rate: "requests/s",
            rate_scale: 1.0,
            cpu: "CPU us per request",
            cpu_scale: 1e6,
        },
    }
}

fn scaled(spread: Spread, by: f64) -> Spread {
    Spread {
        q1: spread.q1 * by,
        median: spread.median * by,
        q3: spread.q3 * by,
        count: spread.count,
    }
}

fn cell(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "-".to_owned(),
        |it| format!("{} ({}-{})", short(it.median), short(it.q1), short(it.q3)),
    )
}

fn tables(findings: &Findings) {
    let samples = Samples(&findings.samples);
    for load in Load::ALL {
        if !findings.samples.iter().any(|it| it.load == load) {
            continue;
        }
        let units = units(load);
        println!("\n{}: median (quartiles)", load.name());
        println!(
            "  {:<13} {:>27} {:>27} {:>27} {:>23} {:>23}",
            "", units.rate, units.cpu, "of it the proxy", "p50 us", "p99 us"
        );
        for peer in Peer::ALL {
            let figure = |figure: Figure, by: f64| {
                samples
                    .spread(load, peer, figure)
                    .map(|spread| scaled(spread, by))
            };
            let rate = figure(Sample::rate, units.rate_scale);
            if rate.is_none() {
                continue;
            }
            let latency = |figure_: Figure| {
                if matches!(load, Load::Bulk | Load::HostBulk) {
                    "-".to_owned()
                } else {
                    cell(figure(figure_, 1.0))
                }
            };
            println!(
                "  {:<13} {:>27} {:>27} {:>27} {:>23} {:>23}",
                peer.name(),
                cell(rate),
                cell(figure(Sample::cpu_per_unit, units.cpu_scale)),
                cell(figure(Sample::own_per_unit, units.cpu_scale)),
                latency(p50),
                latency(|it| it.latency_us.p99),
            );
        }
    }
    if !findings.idle.is_empty() {
        println!("\nidle connections");
        println!(
            "  {:<13} {:>10} {:>14} {:>14} {:>14}",
            "", "processes", "private KiB", "resident KiB", "B/connection"
        );
        for idle in &findings.idle {
            println!(
                "  {:<13} {:>10} {:>14} {:>14} {:>14.0}",
                idle.peer.name(),
                idle.before.processes,
                idle.before.private / 1024,
                idle.before.resident / 1024,
                idle.bytes_per_connection()
            );
        }
    }
}

fn plot(findings: &Findings) -> String {
    let samples = Samples(&findings.samples);
    let mut panels = Vec::new();
    for load in Load::ALL {
        let units = units(load);
        let mut panel = |what: &str, more_is_better, figure: Figure, by: f64| {
            let bars: Vec<_> = Peer::ALL
                .into_iter()
                .filter_map(|peer| {
                    let spread = samples.spread(load, peer, figure)?;
                    Some((peer.name().to_owned(), scaled(spread, by), peer.is_ours()))
                })
                .collect();
            if !bars.is_empty() {
                panels.push(Panel {
                    title: format!("{}: {what}", load.name()),
                    more_is_better,
                    bars,
                });
            }
        };
        panel(units.rate, true, Sample::rate, units.rate_scale);
        panel(units.cpu, false, Sample::cpu_per_unit, units.cpu_scale);
    }
    chart::draw("Service ports against peers", &panels)
}

fn medians(spreads: &[(String, Spread)]) -> Map<String, Value> {
    spreads
        .iter()
        .map(|(name, spread)| (name.clone(), json!(spread.median)))
        .collect()
}

fn quartiles(spreads: &[(String, Spread)]) -> Map<String, Value> {
    spreads
        .iter()
        .map(|(name, spread)| (name.clone(), json!(spread)))
        .collect()
}

fn summary(findings: &Findings) -> Value {
    let samples = Samples(&findings.samples);
    let mut loads = Map::new();
    for load in Load::ALL {
        let mut peers = Map::new();
        for peer in Peer::ALL {
            if let Some(rate) = samples.spread(load, peer, Sample::rate) {
                peers.insert(
                    peer.name().to_owned(),
                    json!({
                        "per_second": rate,
                        "cpu_s_per_unit": samples.spread(load, peer, Sample::cpu_per_unit),
                        "own_cpu_s_per_unit": samples.spread(load, peer, Sample::own_per_unit),
                        "p50_us": samples.spread(load, peer, p50),
                        "p99_us": samples.spread(load, peer, |it| it.latency_us.p99),
                    }),
                );
            }
        }
        if !peers.is_empty() {
            loads.insert(load.name().to_owned(), Value::Object(peers));
        }
    }
    Value::Object(loads)
}

/// Shows and writes all, then checks the figures.
///
/// # Errors
/// A file can't be written, or a figure of a peer lies outside the sane band.
pub fn write(options: &Options, machine: &Machine, findings: &Findings) -> Result<()> {
    let ratios = ratios(findings);
    let further = further(findings);
    let peers: Map<String, Value> = findings
        .peers
        .iter()
        .map(|(peer, version, configuration)| {
            let value = json!({ "version": version, "configuration": configuration });
            (peer.name().to_owned(), value)
        })
        .collect();
    let command: Vec<String> = std::env::args().collect();
    let whole = json!({
        "bench": "ports",
        "command": command.join(" "),
        "machine": machine,
        "load_after": text_of("/proc/loadavg"),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "connections": options.connections,
        "message_bytes": options.message_bytes,
        "bulk_block_bytes": options.bulk_block_bytes,
        "iperf3": crate::peer::said("iperf3".as_ref(), "--version").ok(),
        "ratios": medians(&ratios),
        "further": medians(&further),
        "quartiles": quartiles(&[ratios.clone(), further.clone()].concat()),
        "peers": peers,
        "summary": summary(findings),
        "idle": findings.idle,
        "samples": findings.samples,
    });
    let put = |name: &str, text: &str| {
        let path = options.output.join(name);
        std::fs::write(&path, text).with_context(|| path.display().to_string())?;
        anyhow::Ok(path)
    };
    tables(findings);
    println!("\nratios: median (quartiles)");
    for (name, spread) in ratios.iter().chain(&further) {
        println!("  {name:<42} {}", cell(Some(*spread)));
    }
    let json = put("ports.json", &serde_json::to_string_pretty(&whole)?)?;
    let svg = put("ports.svg", &plot(findings))?;
    println!("\n{} and {}", json.display(), svg.display());
    check(&findings.samples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Latency;
    use crate::site::Cpu;

    fn sample(load: Load, peer: Peer, round: u32, units: f64) -> Sample {
        Sample {
            load,
            peer,
            round,
            units,
            seconds: 1.0,
            cpu: Cpu {
                client: 0.5,
                server: 0.3,
                proxy: 0.2,
            },
            latency_us: Latency::default(),
            failures: 0,
        }
    }

    #[test]
    fn a_ratio_compares_within_rounds_and_needs_both_sides() {
        let findings = Findings {
            samples: vec![
                // The machine was three times as fast in the second round.
                sample(Load::Requests, Peer::Kernel, 0, 2000.0),
                sample(Load::Requests, Peer::Direct, 0, 1000.0),
                sample(Load::Requests, Peer::Kernel, 1, 6000.0),
                sample(Load::Requests, Peer::Direct, 1, 3000.0),
            ],
            ..Findings::default()
        };
        let found = medians(&ratios(&findings));
        assert_eq!(found["remote_requests_vs_direct"], json!(2.0));
        assert!(!found.contains_key("remote_requests_vs_nginx"));
    }

    #[test]
    fn a_figure_that_can_not_be_fails_the_run() {
        assert!(check(&[sample(Load::Requests, Peer::Nginx, 0, 20_000.0)]).is_ok());
        let err = check(&[sample(Load::Requests, Peer::Nginx, 0, 20.0)]).unwrap_err();
        assert!(err.to_string().contains("requests over nginx"), "{err}");
        // Ours is what is judged, not what is checked.
        assert!(check(&[sample(Load::Requests, Peer::Kernel, 0, 20.0)]).is_ok());
    }
}
