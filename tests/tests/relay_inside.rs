//! The relay's connections begin inside the container, past the bridge: only where that is the container's
//! namespace and may be entered, and none of their bytes is missing from the container's statistics.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::thread;

use anyhow::Result;
use harness::cgroup::TestCgroup;
use harness::dataplane::{Options, Place, Process, until};
use harness::remote_client::{Container, Network, within};
use harness::traffic;
use nix::sys::signal::Signal;
use shared::desired::{ContainerRow, PortRow, Protocol};
use shared::ids::ContainerId;
use shared::observed::PortState;

const ID: ContainerId = ContainerId([9; 32]);
/// The bridge's address, by which the host reaches containers.
const BRIDGE: &str = "10.78.2.1";
const BYTES: u64 = 300_000;

/// A process of the container, in a control group of its name.
fn process_of(container: &Container, group: &mut TestCgroup) -> Result<u32> {
    let place = format!("/run/netns/{}", container.namespace);
    let pid = group.run(&format!("exec nsenter --net={place} sleep 1000000"))?;
    until("the process being in its namespace", || {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "sleep").then_some(())
    })?;
    Ok(pid)
}

/// Servers at a free port of the container that answer with the address they were asked from, whatever
/// else they are sent.
fn servers(container: &Container) -> Result<u16> {
    within(&container.namespace, || {
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let socket = UdpSocket::bind(("0.0.0.0", port))?;
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let Ok(peer) = stream.peer_addr() else {
                    continue;
                };
                let mut sink = Vec::new();
                if stream.read_to_end(&mut sink).is_ok() {
                    let _ = stream.write_all(peer.ip().to_string().as_bytes());
                    let _ = stream.write_all(&vec![b' '; sink.len()]);
                }
            }
        });
        thread::spawn(move || {
            let mut buffer = [0; 16];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(peer.ip().to_string().as_bytes(), peer);
            }
        });
        Ok(port)
    })?
}

/// Whom the server saw, asked by a client on the host that sends so many bytes and gets as many.
fn seen(host: &str, row: &PortRow, bytes: u64) -> Result<IpAddr> {
    let address = SocketAddr::from(([127, 0, 0, 1], row.host_port));
    let datagrams = row.protocol == Protocol::Udp;
    let text = within(host, move || -> Result<String> {
        if datagrams {
            let socket = UdpSocket::bind("127.0.0.1:0")?;
            socket.set_read_timeout(Some(traffic::PATIENCE))?;
            socket.send_to(b"x", address)?;
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer)?;
            return Ok(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        let mut stream = traffic::connect(address)?;
        stream.set_read_timeout(Some(traffic::PATIENCE))?;
        stream.write_all(&vec![b' '; usize::try_from(bytes)?])?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })??;
    Ok(text.trim().parse()?)
}

/// How many network namespaces a process has open.
fn namespaces_of(process: &Process) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", process.pid()));
    let files = files.into_iter().flatten().flatten();
    files
        .filter_map(|file| std::fs::read_link(file.path()).ok())
        .filter(|target| target.to_string_lossy().starts_with("net:["))
        .count()
}

/// Rows of one container to these servers, one of connections and one of datagrams.
fn rows(container: &Container, port: u16) -> [PortRow; 2] {
    let of = |protocol| PortRow {
        protocol,
        container_id: ID,
        ..container.port(port)
    };
    [of(Protocol::Tcp), of(Protocol::Udp)]
}

#[test]
fn sessions_begin_inside_their_container_and_count_as_its_traffic() -> Result<()> {
    let Some(mut group) = TestCgroup::new(&ID.to_string())? else {
        return Ok(());
    };
    let network = Network::new()?;
    let container = network.container(2)?;
    let own = container.address[0];
    let port = servers(&container)?;
    let container_row = ContainerRow {
        init_pid: process_of(&container, &mut group)?,
        ..container.row(ID)
    };
    let (place, process, mut control) = Place::sampling(Options {
        node: "forward = \"relay\"".to_owned(),
        namespace: Some(network.host.clone()),
        ..Options::default()
    })?;
    control.write(|batch| batch.put_container(container_row.clone()))?;
    let before = control
        .sample(ID, |it| it.net.get().is_some())?
        .net
        .counters;
    let rows = rows(&container, port);
    for row in &rows {
        control.publish(row.clone())?;
        // A thread of its own looks for the namespace.
        until("sessions that begin inside", || {
            (seen(&network.host, row, 1).ok()? == own).then_some(())
        })?;
        assert_eq!(seen(&network.host, row, BYTES)?, own, "{}", row.key());
    }
    let counted = |past: Option<u64>, now: Option<u64>| now >= past.map(|past| past + BYTES);
    let after = control.sample(ID, |it| {
        let net = &it.net.counters;
        counted(before.rx_bytes, net.rx_bytes) && counted(before.tx_bytes, net.tx_bytes)
    })?;
    // What passes its link comes in packets that are counted.
    let packets = after.net.counters.rx_packets.zip(before.rx_packets);
    assert!(
        packets.is_some_and(|(after, before)| after - before < 100),
        "{packets:?}"
    );

    // The next process goes on from there, though the link knows nothing of it.
    process.signal(Signal::SIGKILL)?;
    drop(process);
    let last = control.sample(ID, |_| true)?.taken_monotonic_ns;
    let process = place.start()?;
    let later = control.sample(ID, |it| {
        it.taken_monotonic_ns > last && it.net.get().is_some()
    })?;
    assert!(
        later.net.counters.rx_bytes >= after.net.counters.rx_bytes,
        "{later:?}"
    );
    assert!(
        later.net.counters.tx_bytes >= after.net.counters.tx_bytes,
        "{later:?}"
    );
    control.in_state(rows[0].key(), PortState::Serving)?;
    until("sessions that begin inside again", || {
        (seen(&network.host, &rows[0], 1).ok()? == own).then_some(())
    })?;

    // Where nobody listens nobody answers: not the connection itself, which may have but this one port.
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    within(&container.namespace, move || {
        std::fs::write(path, "40000 40001")
    })??;
    let nobody = PortRow {
        container_id: ID,
        ..container.port(40_000)
    };
    control.publish(nobody.clone())?;
    let address = SocketAddr::from(([127, 0, 0, 1], nobody.host_port));
    assert!(within(&network.host, move || traffic::turned_away(
        address
    ))?);
    within(&container.namespace, || TcpListener::bind("0.0.0.0:40000"))??;

    // Nothing keeps the namespace of a container that is gone.
    until("one namespace beside the own", || {
        (namespaces_of(&process) == 2).then_some(())
    })?;
    for row in rows.iter().chain([&nobody]) {
        control.withdraw(row.key())?;
    }
    control.write(|batch| batch.remove_container(ID))?;
    until("the namespace being let go", || {
        (namespaces_of(&process) == 1).then_some(())
    })
}

#[test]
fn what_is_not_the_containers_or_may_not_be_entered_is_reached_from_the_host() -> Result<()> {
    let Some(mut group) = TestCgroup::new(&ID.to_string())? else {
        return Ok(());
    };
    let network = Network::new()?;
    let containers = [network.container(2)?, network.container(3)?];
    let port = servers(&containers[0])?;
    let pids = [
        process_of(&containers[0], &mut group)?,
        // In the group, but not where the address is.
        process_of(&containers[1], &mut group)?,
        // Where the address is, but not in the group.
        containers[0].row(ID).init_pid,
    ];
    let chosen = "forward = \"relay\"\nrelay-from = \"host\"";
    let relay = "forward = \"relay\"";
    let host = format!("nsenter --net=/run/netns/{}", network.host);
    let powerless = format!("{host} setpriv --bounding-set=-sys_admin");
    for (what, node, by, pid) in [
        ("as configured", chosen, &host, pids[0]),
        ("without permission", relay, &powerless, pids[0]),
        ("by another container's process", relay, &host, pids[1]),
        ("by a stranger's process", relay, &host, pids[2]),
    ] {
        let place = Place::new(Options {
            node: node.to_owned(),
            by: by.split(' ').map(str::to_owned).collect(),
            ..Options::default()
        })?;
        let mut control = place.control()?;
        let _process = place.start()?;
        control.write(|batch| {
            batch.put_container(ContainerRow {
                init_pid: pid,
                ..containers[0].row(ID)
            });
        })?;
        for row in rows(&containers[0], port) {
            control.publish(row.clone())?;
            let seen = seen(&network.host, &row, 1)?;
            assert_eq!(seen, BRIDGE.parse::<IpAddr>()?, "{what}, {}", row.key());
        }
    }
    Ok(())
}
