//! What a change costs a dataplane that serves many ports already.
//!
//! In: how many ports stand. Out: the dataplane's CPU time for each row that comes and goes, and for each
//! link. Invariant: what it uses without changes is measured just before, and taken off.

use std::collections::BTreeMap;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;
use shared::desired::{ContainerRow, PortKey, PortRow};
use shared::ids::ContainerId;
use shared::observed::{ForwardPath, PortState};

use super::{FIRST, acknowledged, wanted};
use crate::node::Node;
use crate::site::{CONTAINER, ECHO_PORT, Place, Site, done, ip, until};

/// Ports of a container.
const PORTS: u16 = 7;
/// Containers whose rows come and go.
const ROUNDS: u16 = 30;
/// Links that come and go.
const LINKS: u16 = 8;
/// Between two changes of a link: longer than the dataplane waits between two looks at the interfaces.
const PAUSE: Duration = Duration::from_millis(150);
/// How long nothing changes.
const IDLE: Duration = Duration::from_secs(3);

/// CPU time of the dataplane.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Figures {
    /// Ports that stand.
    pub(super) ports: u16,
    /// Microseconds for each row, published and withdrawn.
    pub(super) row_us: f64,
    /// Microseconds for each container's link, from its coming to its going.
    pub(super) link_us: f64,
}

/// Measures with about `count` ports, in containers that have their processes in the site's.
pub(super) fn measure(site: &Site, init_pid: u32, count: u16) -> Result<Figures> {
    let mut node = Node::start(site, Some(Place::Host), "forward = \"auto\"")?;
    let containers = count.div_ceil(PORTS);
    let links = links(site, containers + 1)?;
    let mut rows = Vec::new();
    for number in 0..=containers {
        rows.push(of_container(count, number, &links, init_pid)?);
    }
    let (own, own_ports) = rows.pop().context("one more")?;
    publish(&mut node, &rows)?;
    let spent = |work: &mut dyn FnMut() -> Result<()>| -> Result<(f64, f64)> {
        let (cpu, begun) = (site.cpu()?, Instant::now());
        work()?;
        Ok((
            site.cpu()?.since(&cpu).proxy * 1e6,
            begun.elapsed().as_secs_f64(),
        ))
    };
    sleep(Duration::from_secs(1));
    let (idle, took) = spent(&mut || {
        sleep(IDLE);
        Ok(())
    })?;
    let own_keys: Vec<PortKey> = own_ports.iter().map(PortRow::key).collect();
    let mut own = [(own, own_ports)];
    let each = |(cpu, seconds): (f64, f64), of: u16| (cpu - idle / took * seconds) / f64::from(of);
    let of_rows = spent(&mut || {
        for round in 0..ROUNDS {
            // Another container each time, as ids are.
            let id = id_of(count, containers + 1 + round);
            let [(container, ports)] = &mut own;
            container.container_id = id;
            ports.iter_mut().for_each(|row| row.container_id = id);
            publish(&mut node, &own)?;
            let generation = node.write(|batch| {
                batch.remove_container(id);
                own_keys.iter().for_each(|key| batch.remove_port(*key));
            })?;
            acknowledged(&mut node, &own_keys, generation, PortState::Removed)?;
            node.release();
        }
        Ok(())
    })?;
    let [host, container] = [Place::Host, Place::Container].map(|it| site.namespace(it));
    let of_links = spent(&mut || {
        for _ in 0..LINKS {
            for words in [
                format!("-n {host} link add t0 type veth peer name t1 netns {container}"),
                format!("-n {host} link set t0 up"),
                format!("-n {container} link set t1 up"),
                format!("-n {host} link del t0"),
            ] {
                ip(&words)?;
                sleep(PAUSE);
            }
        }
        Ok(())
    })?;
    let keys: Vec<PortKey> = rows.iter().flat_map(|it| &it.1).map(PortRow::key).collect();
    let generation = node.write(|batch| {
        for (container, _) in &rows {
            batch.remove_container(container.container_id);
        }
        keys.iter().for_each(|key| batch.remove_port(*key));
    })?;
    acknowledged(&mut node, &keys, generation, PortState::Removed)?;
    node.release();
    node.stop(site);
    unlink(site, containers + 1)?;
    Ok(Figures {
        ports: count,
        row_us: each(of_rows, ROUNDS * PORTS),
        link_us: each(of_links, LINKS),
    })
}

fn id_of(count: u16, container: u16) -> ContainerId {
    let mut id = [1; 32];
    id[..2].copy_from_slice(&container.to_be_bytes());
    id[2..4].copy_from_slice(&count.to_be_bytes());
    ContainerId(id)
}

fn of_container(
    count: u16,
    number: u16,
    links: &BTreeMap<u16, u32>,
    init_pid: u32,
) -> Result<(ContainerRow, Vec<PortRow>)> {
    let link = *links.get(&number).context("a link is missing")?;
    let first = FIRST + number * PORTS;
    let mut ports = wanted(first, PORTS, CONTAINER.parse()?, ECHO_PORT, link);
    for row in &mut ports {
        row.container_id = id_of(count, number);
    }
    let container = ContainerRow {
        container_id: id_of(count, number),
        init_pid,
        link_indexes: vec![link],
        ..ContainerRow::default()
    };
    Ok((container, ports))
}

fn publish(node: &mut Node, containers: &[(ContainerRow, Vec<PortRow>)]) -> Result<()> {
    let ports = containers.iter().flat_map(|(_, ports)| ports);
    let keys: Vec<PortKey> = ports.map(PortRow::key).collect();
    let generation = node.write(|batch| {
        for (container, ports) in containers {
            batch.put_container(container.clone());
            ports.iter().cloned().for_each(|row| batch.put_port(row));
        }
    })?;
    acknowledged(node, &keys, generation, PortState::Serving)?;
    // On a busy machine the programs may come after the answer.
    until("all ports being on the kernel path", || {
        let snapshot = node.observed.snapshot().ok()?;
        let path = |key: &PortKey| snapshot.port(*key).map(|it| it.path);
        let led = |key| path(key) == Some(ForwardPath::KernelPath);
        keys.iter().all(led).then_some(())
    })
}

/// Makes links of containers; the index of each one's end at the host.
fn links(site: &Site, count: u16) -> Result<BTreeMap<u16, u32>> {
    let [host, container] = [Place::Host, Place::Container].map(|it| site.namespace(it));
    let make = |number| format!("link add s{number} up type veth peer p{number} netns {container}");
    batch(site, &host, (0..count).map(make))?;
    let up = |number| format!("link set p{number} up");
    batch(site, &container, (0..count).map(up))?;
    let shown = ip(&format!("-n {host} -o link show type veth"))?;
    let read = |line: &str| {
        let (index, rest) = line.split_once(": s")?;
        let number = rest.split(['@', ':']).next()?;
        Some((number.parse().ok()?, index.trim().parse().ok()?))
    };
    Ok(shown.lines().filter_map(read).collect())
}

fn unlink(site: &Site, count: u16) -> Result<()> {
    let gone = |number| format!("link del s{number}");
    batch(site, &site.namespace(Place::Host), (0..count).map(gone))
}

fn batch(site: &Site, namespace: &str, lines: impl Iterator<Item = String>) -> Result<()> {
    let path = site.directory().join("batch");
    std::fs::write(&path, lines.map(|it| it + "\n").collect::<String>())?;
    done(
        Command::new("ip")
            .args(["-n", namespace, "-batch"])
            .arg(&path),
    )?;
    Ok(())
}
