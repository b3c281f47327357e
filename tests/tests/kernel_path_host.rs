//! Clients on the host reach containers by sockets that are led there: the peer they see is the one
//! they asked for, nobody else's sockets are touched, and it needs no process of ours.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData};
use ebpf::records::{Address, Bridge, Flow, FlowKey, LedSet, LocalFlow};
use harness::dataplane::until;
use harness::kernel_path::{Node, ask, echo, mirror, pins, told};
use harness::netns::ip;
use harness::remote_client::{CLIENT, Container, HOST, may_use_bpf, within};
use harness::traffic;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, ipproto};
use shared::desired::{ClientNetwork, Drain, Protocol};
use shared::observed::{ForwardPath, PortState};

fn loopback(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// Connects on the host: the peer and the own address that the socket tells, and the mirror's words.
fn seen_on(node: &Node, address: SocketAddr) -> std::io::Result<(SocketAddr, SocketAddr, String)> {
    let run = move || {
        let mut stream = traffic::connect(address)?;
        let (peer, own) = (stream.peer_addr()?, stream.local_addr()?);
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok((peer, own, text))
    };
    within(&node.network.host, run).expect("the host's namespace")
}

#[test]
fn a_client_on_the_host_sees_the_peer_it_asked_for() {
    let Some((mut node, row)) = Node::serving(mirror) else {
        return;
    };
    for address in [
        loopback(row.host_port),
        ([127, 0, 0, 53], row.host_port).into(),
        SocketAddr::new(HOST[0].parse().expect("an address"), row.host_port),
        ([10, 78, 2, 1], row.host_port).into(),
    ] {
        let (peer, own, text) = seen_on(&node, address).expect("served");
        assert_eq!(peer, address);
        assert_eq!(text, own.to_string(), "the container sees the very socket");
    }
    let status = node.counted(&row, |it| it.sessions_total == 4 && it.sessions_active == 0);
    assert_eq!(status.path, ForwardPath::KernelPath);
}

#[test]
fn a_client_on_the_host_sees_the_peer_it_asked_for_over_ipv6() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(mirror(&node.container));
    row.target = node.container.address[1];
    row.bind = "::".parse().expect("an address");
    node.lift(&row);
    for address in ["::1", HOST[1]] {
        let address = SocketAddr::new(address.parse().expect("an address"), row.host_port);
        let (peer, own, text) = seen_on(&node, address).expect("served");
        assert_eq!((peer, text), (address, own.to_string()));
    }
    // An IPv4 client of an IPv6 container is the listener's.
    let (_, own, text) = seen_on(&node, loopback(row.host_port)).expect("served");
    assert_ne!(text, own.to_string());
    // And an IPv6 socket may ask for an IPv4 address.
    let mut row = node.container.port(row.target_port);
    row.bind = "::".parse().expect("an address");
    node.lift(&row);
    let mapped: SocketAddr = format!("[::ffff:127.0.0.1]:{}", row.host_port)
        .parse()
        .expect("an address");
    let (peer, own, text) = seen_on(&node, mapped).expect("served");
    let own = SocketAddr::new(own.ip().to_canonical(), own.port());
    assert_eq!((peer, text), (mapped, own.to_string()));
}

#[test]
fn sockets_of_other_namespaces_are_untouched() {
    let Some((node, row)) = Node::serving(mirror) else {
        return;
    };
    // The same port number at the loopback of another namespace, in the same control group.
    let port = row.host_port;
    let seen = node.at_client(move || {
        let own = TcpListener::bind(loopback(port)).expect("its port is its own");
        thread::spawn(move || {
            while let Ok((mut stream, _)) = own.accept() {
                let _ = stream.write_all(b"own");
            }
        });
        told(loopback(port)).expect("told").0
    });
    assert_eq!(seen, "own");
    // A container that asks for a port of the host, its own included, is the listener's.
    let bridge: SocketAddr = ([10, 78, 2, 1], port).into();
    let inside = within(&node.container.namespace, move || told(bridge));
    let (text, own) = inside.expect("the container").expect("told");
    assert_ne!(text, own.to_string());
    assert!(text.starts_with("10.78.2.1:"), "by the relay: {text}");
}

#[test]
fn other_destinations_and_the_bind_address_are_kept() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    ip(&format!(
        "-n {} addr add 10.78.1.9/24 dev up0",
        node.network.host
    ))
    .expect("an address");
    let mut row = node.container.port(mirror(&node.container));
    row.bind = HOST[0].parse().expect("an address");
    node.lift(&row);
    let port = row.host_port;
    // The same port of another machine.
    let elsewhere = SocketAddr::new(CLIENT[0].parse().expect("an address"), port);
    node.at_client(move || {
        let listener = TcpListener::bind(elsewhere).expect("its port");
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write_all(b"elsewhere");
            }
        });
    });
    let (_, _, text) = seen_on(&node, elsewhere).expect("reached");
    assert_eq!(text, "elsewhere");
    for other in [loopback(port), ([10, 78, 1, 9], port).into()] {
        let err = seen_on(&node, other).expect_err("nobody listens there");
        assert_eq!(err.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    let bound = SocketAddr::new(row.bind, port);
    let (peer, own, text) = seen_on(&node, bound).expect("served");
    assert_eq!((peer, text), (bound, own.to_string()));
    // A socket at a loopback address can't go out to a container.
    let from = within(&node.network.host, move || {
        let own = "127.0.0.1:0".parse().expect("an address");
        let mut stream = traffic::connect_from(own, bound).expect("the listener");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("told");
        text
    });
    assert!(
        from.expect("the host's namespace")
            .starts_with("10.78.2.1:"),
        "by the relay"
    );
}

#[test]
fn a_row_for_clients_on_the_host_is_for_them_alone() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(mirror(&node.container));
    row.bind = [127, 0, 0, 1].into();
    row.local_only = true;
    node.lift(&row);
    let (peer, own, text) = seen_on(&node, loopback(row.host_port)).expect("served");
    assert_eq!((peer, text), (loopback(row.host_port), own.to_string()));
    let address = SocketAddr::new(HOST[0].parse().expect("an address"), row.host_port);
    let refused = node.at_client(move || told(address));
    assert!(refused.is_err(), "{refused:?}");
}

#[test]
fn a_row_with_client_networks_is_the_listeners() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(mirror(&node.container));
    row.networks = vec![ClientNetwork {
        address: CLIENT[0].parse().expect("an address"),
        prefix: 32,
    }];
    node.lift(&row);
    let refused = seen_on(&node, loopback(row.host_port)).map(|(_, _, text)| text);
    assert_eq!(refused.unwrap_or_default(), "", "not in the list");
    node.counted(&row, |it| it.sessions_refused == 1);
}

/// Sends `length` bytes and takes them back, on the host.
fn echoed_on(node: &Node, address: SocketAddr, length: usize) {
    let run = move || {
        let mut sent = vec![0; length];
        traffic::fill(5, 0, &mut sent);
        assert!(ask(address, &sent).expect("served") == sent, "whole");
    };
    within(&node.network.host, run).expect("the host's namespace");
}

fn bytes_are_counted(family: usize) {
    if !may_use_bpf() {
        return;
    }
    const LENGTH: usize = 100_000;
    let mut node = Node::new();
    let port = node.container.echo().expect("a server");
    let mut row = node.container.port(port);
    row.target = node.container.address[family];
    let (local, any) = [("127.0.0.1", "0.0.0.0"), ("::1", "::")][family];
    row.bind = any.parse().expect("an address");
    node.lift(&row);
    let address = SocketAddr::new(local.parse().expect("an address"), row.host_port);
    echoed_on(&node, address, LENGTH);
    let counted = |node: &mut Node, times: u64| {
        let bytes = times * LENGTH as u64;
        let status = node.counted(&row, |it| it.bytes_in >= bytes && it.bytes_out >= bytes);
        // What is sent again on a busy machine counts again.
        for found in [status.bytes_in, status.bytes_out] {
            assert!(found < bytes + LENGTH as u64 / 2, "{found}");
        }
        status
    };
    let status = counted(&mut node, 1);
    assert!(status.packets_in > 3 && status.packets_out > 3);
    // Who connects to the container directly is not counted, nor is it while nobody lives.
    echoed_on(&node, SocketAddr::new(row.target, port), LENGTH);
    node.kill();
    echoed_on(&node, address, LENGTH);
    node.restart();
    let status = counted(&mut node, 2);
    assert_eq!(status.sessions_total, 2);
}

#[test]
fn bytes_of_clients_on_the_host_are_counted() {
    bytes_are_counted(0);
}

#[test]
fn bytes_of_clients_on_the_host_are_counted_over_ipv6() {
    bytes_are_counted(1);
}

/// Packets that the bridge has passed up to the host.
fn passed_up(node: &Node) -> u64 {
    let read = || std::fs::read_to_string("/proc/thread-self/net/dev").expect("interfaces");
    let text = within(&node.network.host, read).expect("the host's namespace");
    let line = text.lines().find_map(|it| it.trim().strip_prefix("br0:"));
    let packets = line.and_then(|it| it.split_whitespace().nth(1));
    packets.and_then(|it| it.parse().ok()).expect("a count")
}

/// What the container answers does not go through the bridge's code, but where that would be wrong.
#[test]
fn answers_to_clients_on_the_host_bypass_the_bridge() {
    const WORDS: u64 = 100;
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    for (family, local) in [IpAddr::from([127, 0, 0, 1]), Ipv6Addr::LOCALHOST.into()]
        .into_iter()
        .enumerate()
    {
        row.target = node.container.address[family];
        row.bind = [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Ipv6Addr::UNSPECIFIED.into(),
        ][family];
        node.lift(&row);
        let address = SocketAddr::new(local, row.host_port);
        let mut stream = within(&node.network.host, move || traffic::connect(address))
            .expect("the host's namespace")
            .expect("served");
        let mut passed = |node: &Node| {
            let before = passed_up(node);
            for _ in 0..WORDS {
                stream.write_all(b"word").expect("sent");
                stream.read_exact(&mut [0; 4]).expect("echoed");
            }
            passed_up(node) - before
        };
        // The bridge is to learn where the container is, and neighbours look for each other.
        let few = passed(&node);
        assert!(few < WORDS / 2, "{few}");

        let table = Map::HashMap(pinned(&node, "bridges"));
        let mut table: HashMap<MapData, u32, Bridge> = table.try_into().expect("of this layout");
        let link = node.container.link_index;
        let known = table.get(&link, 0).expect("the container's bridge");
        let other = Bridge {
            address: [2; 6],
            ..known
        };
        table.insert(link, other, 0).expect("changed");
        let all = passed(&node);
        assert!(all >= WORDS, "not for the bridge's own address: {all}");
        table.insert(link, known, 0).expect("changed back");
    }
}

fn pinned(node: &Node, name: &str) -> MapData {
    MapData::from_pin(pins(node).join(name)).expect("pinned")
}

fn local_flows(node: &Node) -> Array<MapData, LocalFlow> {
    let table = Map::Array(pinned(node, "local_flows"));
    table.try_into().expect("of this layout")
}

/// Flows in the tables of a node's programs.
fn flows(node: &Node) -> usize {
    let table = Map::LruHashMap(pinned(node, "flows"));
    let table: HashMap<MapData, FlowKey, Flow> = table.try_into().expect("of this layout");
    let local = local_flows(node);
    let local = local.iter().flatten();
    let taken = local.filter(|it| it.taken != 0 && it.key.client_port != 0);
    table.keys().flatten().count() + taken.count()
}

fn led_sets(node: &Node) -> Array<MapData, LedSet> {
    let table = Map::Array(pinned(node, "led_sockets"));
    table.try_into().expect("of this layout")
}

/// Sockets that a node's programs have led.
fn led_sockets(node: &Node) -> usize {
    let table = led_sets(node);
    let cookies = table.iter().flatten().flat_map(|it| it.cookie);
    cookies.filter(|it| *it != 0).count()
}

/// Sockets that find no place in the table of led ones are not led.
#[test]
fn clients_for_whom_there_is_no_place_are_the_listeners() {
    let Some((mut node, row)) = Node::serving(mirror) else {
        return;
    };
    let address = loopback(row.host_port);
    let run = move || traffic::connect(address);
    let kept = within(&node.network.host, run).expect("the host's namespace");
    let mut kept = kept.expect("led");
    node.counted(&row, |it| it.sessions_active == 1);
    let led = |node: &Node| {
        let (peer, own, text) = seen_on(node, address).expect("served");
        assert_eq!(peer, address);
        text == own.to_string()
    };
    assert_eq!(led_sockets(&node), 1);
    let mut table = led_sets(&node);
    let before: Vec<LedSet> = table.iter().flatten().collect();
    for (at, set) in (0..).zip(&before) {
        let cookie = set.cookie.map(|it| if it == 0 { u64::MAX } else { it });
        table.set(at, LedSet { cookie, ..*set }, 0).expect("taken");
    }
    assert!(!led(&node), "where is it kept?");
    for (at, set) in (0..).zip(&before) {
        table.set(at, set, 0).expect("free again");
    }
    assert!(led(&node));
    node.counted(&row, |it| it.sessions_total == 3 && it.sessions_active == 1);

    // Somebody has taken the hooks away. Whoever was led then is not known any more, and not missed.
    node.kill();
    let entries = std::fs::read_dir(pins(&node)).expect("pins").flatten();
    for pin in entries.filter(|it| it.file_name().as_encoded_bytes().starts_with(b"hook-")) {
        std::fs::remove_file(pin.path()).expect("detached");
    }
    node.restart();
    node.counted(&row, |it| {
        it.path == ForwardPath::KernelPath && it.sessions_active == 0
    });
    let another = within(&node.network.host, run).expect("the host's namespace");
    let another = another.expect("led");
    node.counted(&row, |it| it.sessions_active == 1);
    kept.read_to_string(&mut String::new()).expect("goes on");
    drop(kept);
    assert!(led(&node));
    node.counted(&row, |it| it.sessions_total == 5 && it.sessions_active == 1);
    drop(another);
    node.counted(&row, |it| it.sessions_active == 0);
}

/// The end of a connection of the host's takes its flow out of the table, whoever closes first and
/// without a process that sweeps.
#[test]
fn flows_of_clients_on_the_host_go_with_their_last_segment() {
    let servers: [fn(&Container) -> u16; 2] = [echo, mirror];
    for (number, server) in servers.into_iter().enumerate() {
        let Some((mut node, row)) = Node::serving(server) else {
            return;
        };
        node.kill();
        if number == 0 {
            // All places of such flows are taken: these are kept with the others.
            let mut local = local_flows(&node);
            for at in 0..local.len() {
                let mut place = local.get(&at, 0).expect("a place");
                place.taken = 1;
                local.set(at, place, 0).expect("taken");
            }
        }
        let address = loopback(row.host_port);
        let run = move || {
            let mut kept = traffic::connect(address).expect("accepted");
            for _ in 0..20 {
                let mut stream = traffic::connect(address).expect("accepted");
                if number == 0 {
                    stream.write_all(&[1; 50]).expect("sent");
                    stream.read_exact(&mut [0; 50]).expect("echoed");
                } else {
                    stream.read_to_string(&mut String::new()).expect("told");
                }
            }
            if number == 0 {
                kept.write_all(&[1; 50]).expect("sent");
                kept.read_exact(&mut [0; 50]).expect("echoed");
            } else {
                // Closed with something unread it would be reset.
                kept.read_to_string(&mut String::new()).expect("told");
            }
            kept
        };
        let kept = within(&node.network.host, run).expect("the host's namespace");
        // The one that is still open, or that its server has closed and its client has not.
        until("the others being gone", || {
            (flows(&node) == 1).then_some(())
        })
        .expect("gone");
        drop(kept);
        until("all being gone", || (flows(&node) == 0).then_some(())).expect("gone");
        node.restart();
        let status = node.counted(&row, |it| {
            it.sessions_total == 21 && it.sessions_active == 0
        });
        if number == 0 {
            assert_eq!((status.bytes_in, status.bytes_out), (1050, 1050));
        }
        assert!(
            status.packets_in >= 21 * 3 && status.packets_out >= 21 * 3,
            "{status:?}"
        );
    }
}

/// A port that was used by a led connection, and is used again for a direct one, counts no longer.
#[test]
fn sockets_of_the_kernel_itself_are_forgotten_when_they_end() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = loopback(row.host_port);
    let connect = move || -> std::io::Result<TcpStream> {
        let protocol = Some(ipproto::MPTCP);
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, protocol)?;
        rustix::net::connect(&socket, &address)?;
        let mut stream = TcpStream::from(socket);
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])?;
        Ok(stream)
    };
    for resets in [false, true] {
        let stream = match within(&node.network.host, connect).expect("the host's namespace") {
            Err(err) if err.raw_os_error() == Some(Errno::PROTONOSUPPORT.raw_os_error()) => {
                harness::skip::here("this kernel is built without MPTCP", false);
                return;
            }
            stream => stream.expect("echoed"),
        };
        // What MPTCP sends by is a socket of the kernel's, and that one is led.
        assert_eq!(led_sockets(&node), 1);
        node.counted(&row, |it| it.sessions_active == 1);
        if resets {
            traffic::reset(stream);
        } else {
            drop(stream);
        }
        until("the socket being forgotten", || {
            (led_sockets(&node) == 0).then_some(())
        })
        .expect("forgotten");
        node.counted(&row, |it| it.sessions_active == 0);
    }
}

#[test]
fn a_direct_connection_by_a_led_ones_port_is_not_counted() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let port = row.target_port;
    let led = loopback(row.host_port);
    let direct = SocketAddr::new(row.target, port);
    let run = move || {
        let mut own = "0.0.0.0:0".parse().expect("an address");
        for to in [led, direct] {
            let mut stream = traffic::connect_from(own, to).expect("accepted");
            let SocketAddr::V4(bound) = stream.local_addr().expect("bound") else {
                unreachable!("an IPv4 socket");
            };
            own = bound;
            stream.write_all(&[1; 50]).expect("sent");
            stream.read_exact(&mut [0; 50]).expect("echoed");
            traffic::reset(stream);
        }
    };
    within(&node.network.host, run).expect("the host's namespace");
    let status = node.counted(&row, |it| it.bytes_out >= 50 && it.sessions_active == 0);
    assert_eq!((status.bytes_in, status.bytes_out), (50, 50));
    assert_eq!(flows(&node), 0, "a reset ends a flow");
}

#[test]
fn nobody_needs_to_live_for_it_and_the_counters_go_on() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = loopback(row.host_port);
    let host = node.network.host.clone();
    let mut old = within(&host, move || traffic::connect(address))
        .expect("the host")
        .expect("accepted");
    old.write_all(b"before").expect("sent");
    old.read_exact(&mut [0; 6]).expect("echoed");
    node.counted(&row, |it| it.sessions_active == 1);
    node.kill();
    old.write_all(b"after").expect("sent");
    old.read_exact(&mut [0; 5]).expect("the old one goes on");
    let answer = within(&host, move || ask(address, b"new")).expect("the host");
    assert_eq!(answer.expect("served"), b"new");
    node.restart();
    let status = node.counted(&row, |it| it.sessions_total == 2 && it.sessions_active == 1);
    assert_eq!(status.path, ForwardPath::KernelPath);
    drop(old);
    node.counted(&row, |it| it.sessions_active == 0);
    node.control.withdraw(row.key()).expect("removed");
    let refused = within(&host, move || ask(address, b"new")).expect("the host");
    let kind = refused.expect_err("no new one").kind();
    assert_eq!(kind, std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_container_that_is_gone_leads_nowhere_though_nobody_lives() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let port = row.target_port;
    node.kill();
    let (_stranger, reached) = node.replace_container(port);
    let address = loopback(row.host_port);
    let refused = within(&node.network.host, move || {
        TcpStream::connect_timeout(&address, Duration::from_secs(5))
    });
    let err = refused.expect("the host").expect_err("nobody there");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(reached.accept().is_err(), "the stranger was reached");
}

/// Answers each datagram with the sender's address.
fn datagram_mirror(node: &Node) -> u16 {
    within(&node.container.namespace, || {
        let socket = UdpSocket::bind("[::]:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                let seen = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                let _ = socket.send_to(seen.to_string().as_bytes(), peer);
            }
        });
        port
    })
    .expect("the container's namespace")
}

#[test]
fn datagrams_are_led_and_their_answers_come_from_where_they_went() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(datagram_mirror(&node));
    row.protocol = Protocol::Udp;
    node.lift(&row);
    let address = loopback(row.host_port);
    let port = row.host_port;
    let exchange = move || {
        let mut buffer = [0; 128];
        // Without a peer.
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(traffic::PATIENCE))?;
        socket.send_to(b"x", address)?;
        let (length, from) = socket.recv_from(&mut buffer)?;
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let own = socket.local_addr()?.port();
        assert!(
            text.ends_with(&format!(":{own}")),
            "{text}: the very socket"
        );
        assert_eq!(from, address);
        // Another name of the same port, by the same socket.
        let named: SocketAddr = ([10, 78, 2, 1], port).into();
        socket.send_to(b"x", named)?;
        let (_, from) = socket.recv_from(&mut buffer)?;
        assert_eq!(from, named);
        std::io::Result::Ok(())
    };
    // With a peer it is the listener's.
    let with_peer = move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(traffic::PATIENCE))?;
        socket.connect(address)?;
        assert_eq!(socket.peer_addr()?, address);
        socket.send(b"x")?;
        let mut buffer = [0; 128];
        let (length, from) = socket.recv_from(&mut buffer)?;
        assert_eq!(from, address);
        let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let own = socket.local_addr()?.port();
        assert!(!text.ends_with(&format!(":{own}")), "{text}: led");
        std::io::Result::Ok(())
    };
    let host = node.network.host.clone();
    within(&host, exchange).expect("the host").expect("led");
    within(&host, with_peer)
        .expect("the host")
        .expect("relayed");
    // The listener counts bytes, not packets.
    node.counted(&row, |it| it.packets_out == 2 && it.bytes_in == 3);
    // The process's death changes nothing for those that are led.
    node.kill();
    within(&host, exchange).expect("the host").expect("led");
    node.restart();
    // Datagrams of a byte each, and the answers.
    let status = node.counted(&row, |it| it.sessions_total >= 3 && it.packets_out >= 4);
    assert_eq!((status.bytes_in, status.packets_in), (5, 4));
    assert!(status.bytes_out > 5 * 10);
    node.control.withdraw(row.key()).expect("removed");
    let err = within(&host, move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(traffic::PATIENCE))?;
        socket.connect(address)?;
        socket.send(b"x")?;
        socket.recv(&mut [0; 1])
    });
    let kind = err.expect("the host").expect_err("no longer").kind();
    assert_eq!(kind, std::io::ErrorKind::ConnectionRefused);
    assert!(
        node.control
            .status(row.key())
            .is_none_or(|it| it.state != PortState::Serving)
    );
}

#[test]
fn a_socket_of_datagrams_with_a_peer_does_not_reach_a_stranger() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(datagram_mirror(&node));
    row.protocol = Protocol::Udp;
    node.lift(&row);
    let address = loopback(row.host_port);
    let host = node.network.host.clone();
    let socket = within(&host, move || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(traffic::PATIENCE))?;
        socket.connect(address)?;
        socket.send(b"x")?;
        socket.recv(&mut [0; 128])?;
        std::io::Result::Ok(socket)
    });
    let socket = socket.expect("the host").expect("served");
    // Nobody lives who could end anything.
    node.kill();
    let (stranger, _listener) = node.replace_container(row.target_port);
    let port = row.target_port;
    let reached = within(&stranger.namespace, move || {
        let socket = UdpSocket::bind(("0.0.0.0", port)).expect("its port");
        socket.set_nonblocking(true).expect("an option");
        socket
    });
    // The first may still be taken for sent: the refusal comes after it.
    let refused = (0..2).map(|_| socket.send(b"y")).find_map(Result::err);
    assert!(refused.is_some(), "somebody takes them");
    let mut buffer = [0; 8];
    let got = reached.expect("the stranger").recv(&mut buffer);
    assert!(got.is_err(), "the stranger was reached");
}

#[test]
fn the_limit_of_sessions_counts_those_of_the_host() {
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    row.max_sessions = 2;
    node.lift(&row);
    let address = loopback(row.host_port);
    let host = node.network.host.clone();
    let connect = move || traffic::connect(address);
    let first = within(&host, connect).expect("the host").expect("accepted");
    let second = within(&host, connect).expect("the host").expect("accepted");
    node.counted(&row, |it| it.sessions_active == 2);
    // The relay, which has the rest, hears of them every second.
    until("one too many being refused", || {
        let answer = within(&host, move || ask(address, b"x")).ok()?;
        (!matches!(answer.as_deref(), Ok(b"x"))).then_some(())
    })
    .expect("refused");
    node.counted(&row, |it| it.sessions_refused >= 1);
    drop((first, second));
    until("room again", || {
        let answer = within(&host, move || ask(address, b"x")).ok()?;
        (answer.ok()? == b"x").then_some(())
    })
    .expect("sockets that are closed count no longer");
}

#[test]
fn a_removed_row_cuts_its_clients_on_the_host_or_lets_them_finish() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let port = node.container.echo().expect("a server");
    let host = node.network.host.clone();
    let connected = |node: &mut Node, row: &shared::desired::PortRow| {
        node.lift(row);
        let address = loopback(row.host_port);
        let mut stream = within(&host, move || traffic::connect(address))
            .expect("the host")
            .expect("accepted");
        stream.write_all(b"x").expect("sent");
        stream.read_exact(&mut [0; 1]).expect("echoed");
        node.counted(row, |it| it.sessions_active == 1);
        stream
    };
    let row = node.container.port(port);
    let mut stream = connected(&mut node, &row);
    node.control.withdraw(row.key()).expect("removed");
    let err = stream.read(&mut [0]).expect_err("cut");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionAborted);

    let mut row = node.container.port(port);
    row.drain = Drain::Within { ms: 60_000 };
    let mut stream = connected(&mut node, &row);
    let key = row.key();
    node.control
        .write(|batch| batch.remove_port(key))
        .expect("asked");
    node.control
        .in_state(key, PortState::Draining)
        .expect("draining");
    let address = loopback(row.host_port);
    let refused = within(&host, move || TcpStream::connect(address)).expect("the host");
    assert!(refused.is_err(), "no new one");
    stream.write_all(b"y").expect("sent");
    stream.read_exact(&mut [0; 1]).expect("goes on");
    drop(stream);
    node.control
        .in_state(key, PortState::Removed)
        .expect("over");

    // Nor when the row goes while no process lives: the next one cuts them, and forgets the container.
    let row = node.container.port(port);
    let mut stream = connected(&mut node, &row);
    node.kill();
    let key = row.key();
    node.control
        .write(|batch| batch.remove_port(key))
        .expect("asked");
    stream.write_all(b"z").expect("sent");
    stream.read_exact(&mut [0; 1]).expect("nobody has heard");
    node.restart();
    node.control
        .in_state(key, PortState::Removed)
        .expect("removed");
    let err = stream.read(&mut [0]).expect_err("cut");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionAborted);
    let map = MapData::from_pin(pins(&node).join("addresses")).expect("addresses");
    let addresses: HashMap<_, Address, u32> =
        HashMap::try_from(Map::HashMap(map)).expect("addresses");
    let containers = addresses.iter().flatten();
    let left: Vec<_> = containers
        .filter(|(_, what)| *what == ebpf::records::ADDRESS_CONTAINER)
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
