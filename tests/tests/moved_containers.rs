//! A container that loses an address while it runs: what it has open by it is ended, and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use harness::cgroup::TestCgroup;
use harness::dataplane::{Options, Place, until};
use harness::netns::ip;
use harness::remote_client::{Container, Network, may_use_bpf, within};
use harness::traffic;
use shared::desired::ContainerRow;
use shared::ids::ContainerId;

const BELIEVED: ContainerId = ContainerId([8; 32]);
const ANOTHER: ContainerId = ContainerId([9; 32]);
/// Addresses that a route makes local though no interface has them.
const ANYWHERE: &str = "10.99.0.0/16";

/// A connection between two sockets of these namespaces, to a listener at `address`: the end of `here`
/// first.
fn pair(here: &str, there: &str, address: &str) -> Result<(TcpStream, TcpStream)> {
    let address: SocketAddr = format!("{address}:0").parse()?;
    let listener = within(there, move || TcpListener::bind(address))??;
    let address = listener.local_addr()?;
    let own = within(here, move || traffic::connect(address))??;
    let other = listener.accept()?.0;
    for stream in [&own, &other] {
        stream.set_read_timeout(Some(traffic::PATIENCE))?;
    }
    Ok((own, other))
}

fn exchange((mut from, mut to): (&TcpStream, &TcpStream)) -> Result<()> {
    let mut byte = [0];
    from.write_all(b"x")?;
    to.read_exact(&mut byte)?;
    assert_eq!(&byte, b"x");
    Ok(())
}

/// What a read says of a connection that nobody sends anything by.
fn word(mut stream: &TcpStream) -> Option<ErrorKind> {
    stream.read(&mut [0]).err().map(|err| err.kind())
}

#[test]
fn only_connections_from_addresses_that_a_container_has_lost_are_ended() -> Result<()> {
    if !may_use_bpf() {
        return Ok(());
    }
    let Some(mut group) = TestCgroup::new(&BELIEVED.to_string())? else {
        return Ok(());
    };
    let network = Network::new()?;
    let host = network.host.clone();
    let containers = [network.container(2)?, network.container(3)?];
    for container in &containers {
        ip(&format!(
            "-n {} route add local {ANYWHERE} dev lo",
            container.namespace
        ))?;
    }
    // The one has a process in a group of its name. What the row of the other names is not in such a
    // one, as a process that has its id after it.
    let place = format!("/run/netns/{}", containers[0].namespace);
    let pid = group.run(&format!("exec nsenter --net={place} sleep 1000000"))?;
    until("the process being in its namespace", || {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        (name.trim() == "sleep").then_some(())
    })?;
    let mut believed = containers[0].row(BELIEVED);
    believed.init_pid = pid;
    let another = containers[1].row(ANOTHER);

    let place = Place::new(Options {
        node: "forward = \"relay\"".to_owned(),
        namespace: Some(host.clone()),
        ..Options::default()
    })?;
    let mut control = place.control()?;
    let process = place.start()?;
    let rows = [believed, another];
    let write = rows.clone();
    control.write(|batch| write.into_iter().for_each(|row| batch.put_container(row)))?;
    let logged = |words: &str, id: ContainerId, times: usize| {
        until(words, || {
            let log = process.log();
            let of_it = log.lines().filter(|line| {
                line.contains(words) && line.contains(&format!("container_id={id}"))
            });
            (of_it.count() >= times).then_some(())
        })
    };
    logged("the addresses of a container are known", BELIEVED, 1)?;
    logged("its id is used again", ANOTHER, 1)?;

    let mut open = Vec::new();
    for container in &containers {
        let outwards = ["10.78.2.1", "[fd78:2::1]"].map(|address| {
            pair(&container.namespace, &host, address).with_context(|| address.to_owned())
        });
        let [v4, v6] = outwards;
        let (v4, v6) = (v4?, v6?);
        let inside = pair(&container.namespace, &container.namespace, "10.99.0.1")?;
        for (own, other) in [&v4, &v6, &inside] {
            exchange((own, other))?;
        }
        open.push((v4, v6, inside));
    }

    // Both lose all they have but what routes make local.
    for container in &containers {
        ip(&format!("-n {host} link del {}", container.link))?;
    }
    let moved = rows.map(|row| ContainerRow {
        link_indexes: Vec::new(),
        ..row
    });
    control.write(|batch| moved.into_iter().for_each(|row| batch.put_container(row)))?;
    logged("its connections there are ended", BELIEVED, 1)?;
    logged("its id is used again", ANOTHER, 2)?;
    let (v4, v6, inside) = &open[0];
    for (own, _) in [v4, v6] {
        assert_eq!(word(own), Some(ErrorKind::ConnectionAborted));
    }
    exchange((&inside.0, &inside.1))?;
    let (v4, v6, inside) = &open[1];
    for (own, _) in [v4, v6] {
        own.set_read_timeout(Some(Duration::from_millis(50)))?;
        assert_eq!(word(own), Some(ErrorKind::WouldBlock), "nobody cuts it");
    }
    exchange((&inside.0, &inside.1))?;
    drop::<[Container; 2]>(containers);
    Ok(())
}
