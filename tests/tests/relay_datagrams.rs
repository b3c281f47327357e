//! The relay of datagrams: each client has a session of its own, answers come from where they were
//! asked, and neither silence nor strangers fill the table.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dataplane::forward::relay::port::{Port, Rules};
use dataplane::forward::relay::{Options, Relay};
use harness::dataplane::until;
use harness::traffic;
use shared::desired::ClientNetwork;

fn relay() -> Relay {
    Relay::start(Options::default()).expect("a relay")
}

fn open(relay: &Relay, bind: &str, target: SocketAddr, rules: Rules) -> Arc<Port> {
    let bind = bind.parse().expect("an address");
    relay.open_datagrams(bind, target, rules).expect("a port")
}

fn socket(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("a socket");
    socket
        .set_read_timeout(Some(traffic::PATIENCE))
        .expect("a deadline");
    socket
}

/// A server that answers each datagram with its sender's port and the datagram.
fn mirror(address: &str) -> SocketAddr {
    let socket = UdpSocket::bind(address).expect("a server");
    let at = socket.local_addr().expect("bound");
    thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let mut answer = peer.port().to_be_bytes().to_vec();
            answer.extend(&buffer[..length.min(65_000)]);
            let _ = socket.send_to(&answer, peer);
        }
    });
    at
}

/// A port that leads to a mirror.
fn mirrored(relay: &Relay, rules: Rules) -> Arc<Port> {
    open(relay, "127.0.0.1:0", mirror("127.0.0.1:0"), rules)
}

/// A port that leads to where nobody is.
fn forsaken(relay: &Relay) -> Arc<Port> {
    let free = UdpSocket::bind("127.0.0.1:0").and_then(|it| it.local_addr());
    open(
        relay,
        "127.0.0.1:0",
        free.expect("a port"),
        Rules::default(),
    )
}

/// Sends and receives; answers the port that the server has seen.
fn exchange(client: &UdpSocket, to: SocketAddr, sent: &[u8]) -> u16 {
    client.send_to(sent, to).expect("sent");
    let mut buffer = vec![0; 65_536];
    let (length, from) = client.recv_from(&mut buffer).expect("an answer");
    assert_eq!(from, to, "from where it was asked");
    assert!(buffer[2..length] == *sent, "whole");
    u16::from_be_bytes([buffer[0], buffer[1]])
}

fn answered(client: &UdpSocket, to: SocketAddr) -> bool {
    client
        .set_read_timeout(Some(Duration::from_millis(300)))
        .expect("a deadline");
    client.send_to(b"x", to).expect("sent");
    client.recv_from(&mut [0; 16]).is_ok()
}

#[test]
fn each_client_has_a_session_and_its_own_answers() {
    let relay = relay();
    let port = mirrored(&relay, Rules::default());
    let clients: Vec<UdpSocket> = (0..50).map(|_| socket("127.0.0.1:0")).collect();
    let mut seen = Vec::new();
    for round in 0..3_usize {
        for (number, client) in clients.iter().enumerate() {
            let word = format!("{round} {number}");
            let port = exchange(client, port.bind(), word.as_bytes());
            if round == 0 {
                seen.push(port);
            } else {
                assert_eq!(port, seen[number], "one session all along");
            }
        }
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), clients.len(), "the server tells clients apart");
    // An answer is counted when it has been sent, and may be here before that.
    let counters = until("the last answer being counted", || {
        let counters = port.counters();
        (counters.bytes_out >= counters.bytes_in + 2 * 150).then_some(counters)
    })
    .expect("counted");
    assert_eq!((counters.total, counters.active), (50, 50));
    assert_eq!(counters.bytes_out, counters.bytes_in + 2 * 150);
}

#[test]
fn datagrams_of_all_sizes_pass_whole() {
    let relay = relay();
    let port = mirrored(&relay, Rules::default());
    let client = socket("127.0.0.1:0");
    for length in [0, 1, 2, 1_400, 1_473, 9_000, 60_000] {
        let mut sent = vec![0; length];
        traffic::fill(length as u64, 0, &mut sent);
        exchange(&client, port.bind(), &sent);
    }
}

#[test]
fn answers_leave_by_the_address_that_was_asked() {
    let relay = relay();
    let target = mirror("127.0.0.1:0");
    let port = open(&relay, "0.0.0.0:0", target, Rules::default());
    let client = socket("127.0.0.1:0");
    let mut seen = Vec::new();
    for host in [[127, 0, 0, 1], [127, 0, 0, 7]] {
        seen.push(exchange(&client, (host, port.bind().port()).into(), b"x"));
    }
    assert_ne!(seen[0], seen[1], "another address, another session");
    if !harness::netns::has_ipv6() {
        return;
    }
    // A port of all addresses, for clients of both versions, to a container of one.
    let port = open(&relay, "[::]:0", target, Rules::default());
    exchange(
        &socket("[::1]:0"),
        ([0, 0, 0, 0, 0, 0, 0, 1], port.bind().port()).into(),
        b"x",
    );
    exchange(&client, ([127, 0, 0, 1], port.bind().port()).into(), b"x");
}

#[test]
fn silent_sessions_leave_and_limits_hold_until_then() {
    let relay = relay();
    let rules = Rules {
        max_sessions: 2,
        idle_timeout: Some(Duration::from_secs(4)),
        ..Rules::default()
    };
    let port = mirrored(&relay, rules);
    let (first, second, third) = (
        socket("127.0.0.1:0"),
        socket("127.0.0.1:0"),
        socket("127.0.0.1:0"),
    );
    for client in [&first, &second] {
        exchange(client, port.bind(), b"x");
        // Whoever speaks again after an answer is not displaced.
        exchange(client, port.bind(), b"y");
    }
    assert!(!answered(&third, port.bind()), "no room for a third");
    assert!(port.counters().refused >= 1);
    until("silent sessions being forgotten", || {
        exchange(&first, port.bind(), b"still here");
        (port.counters().idle_timeouts == 1).then_some(())
    })
    .expect("in time");
    until("room again", || answered(&third, port.bind()).then_some(())).expect("served");
    assert_eq!(port.active(), 2, "who speaks is kept");
}

#[test]
fn strangers_are_not_let_in_and_leave_no_session() {
    let relay = relay();
    let network = |address: &str, prefix| ClientNetwork {
        address: address.parse().expect("an address"),
        prefix,
    };
    let rules = |allowed| Rules {
        allowed,
        ..Rules::default()
    };
    let port = mirrored(&relay, rules(vec![network("192.0.2.0", 24)]));
    let client = socket("127.0.0.1:0");
    assert!(!answered(&client, port.bind()));
    until("the count", || (port.counters().refused == 1).then_some(())).expect("counted");
    assert_eq!(port.counters().total, 0);
    port.set_rules(rules(vec![network("127.0.0.0", 8)]));
    until("being let in", || {
        answered(&client, port.bind()).then_some(())
    })
    .expect("served");
}

#[test]
fn a_container_that_refuses_costs_a_session_and_nothing_else() {
    let relay = relay();
    let port = forsaken(&relay);
    let client = socket("127.0.0.1:0");
    client.send_to(b"x", port.bind()).expect("sent");
    until("the refusal", || {
        (port.counters().connect_failures == 1 && port.active() == 0).then_some(())
    })
    .expect("counted, and the seat given back");
}

/// The socket tells of an earlier datagram's refusal instead of sending: the later one must not be
/// lost for it.
#[test]
fn a_refusal_costs_no_later_datagram() {
    let relay = relay();
    let port = forsaken(&relay);
    let client = socket("127.0.0.1:0");
    for _ in 0..64 {
        client.send_to(b"word", port.bind()).expect("sent");
    }
    until("all of them being handed on", || {
        (port.counters().bytes_in == 64 * 4).then_some(())
    })
    .expect("none is lost");
}

#[test]
fn a_closed_port_ends_its_sessions_and_spares_the_others() {
    let relay = relay();
    let target = mirror("127.0.0.1:0");
    let (a, b) = (
        open(&relay, "127.0.0.1:0", target, Rules::default()),
        open(&relay, "127.0.0.1:0", target, Rules::default()),
    );
    let client = socket("127.0.0.1:0");
    exchange(&client, a.bind(), b"x");
    let kept = exchange(&client, b.bind(), b"x");
    relay.close(std::slice::from_ref(&a));
    assert_eq!((a.active(), b.active()), (0, 1));
    assert_eq!(exchange(&client, b.bind(), b"x"), kept, "the same session");
    let alone = socket("127.0.0.1:0");
    alone.connect(a.bind()).expect("a peer");
    alone.send(b"x").expect("sent");
    let err = alone.recv(&mut [0; 1]).expect_err("nobody is there");
    assert_eq!(err.kind(), ErrorKind::ConnectionRefused);
    // The port can be taken again at once.
    let again = open(&relay, &a.bind().to_string(), target, Rules::default());
    exchange(&client, again.bind(), b"x");
    // Cut, not closed: the port stays.
    relay.disable(std::slice::from_ref(&b));
    assert_eq!(b.active(), 0);
    assert!(!answered(&client, b.bind()), "turned away");
}

#[test]
fn a_flood_of_forged_clients_fills_no_more_than_half_the_table() {
    let relay = relay();
    let port = open(&relay, "0.0.0.0:0", mirror("0.0.0.0:0"), Rules::default());
    let to: SocketAddr = ([127, 0, 0, 1], port.bind().port()).into();
    // Every address of 127.0.0.0/8 is a client.
    let mut sent = 0_u32;
    until("many more than there is room for", || {
        for _ in 0..500 {
            let [_, b, c, d] = sent.to_be_bytes();
            sent += 1;
            let client =
                UdpSocket::bind(SocketAddr::from(([127, b, c, d.max(1)], 0))).expect("an address");
            client.send_to(b"x", to).expect("sent");
        }
        assert!(port.active() <= 2048, "{}", port.active());
        (port.counters().total > 3000).then_some(())
    })
    .expect("served");
}

/// Strangers take each other's places, not those of clients who speak, of other ports or of
/// connections.
#[test]
fn a_flood_costs_those_who_speak_nothing() {
    const ALL: u32 = 64;
    let relay = Relay::start(Options {
        total_sessions: ALL,
        ..Options::default()
    })
    .expect("a relay");
    let target = mirror("127.0.0.1:0");
    let ports: Vec<Arc<Port>> = (0..3)
        .map(|_| open(&relay, "127.0.0.1:0", target, Rules::default()))
        .collect();
    let client = socket("127.0.0.1:0");
    let seen = exchange(&client, ports[0].bind(), b"x");
    assert_eq!(exchange(&client, ports[0].bind(), b"y"), seen);
    // Two ports are flooded, which is enough to fill the table. Strangers keep their ports, so that
    // none is taken for an earlier one.
    let mut strangers = Vec::new();
    for port in &ports[..2] {
        let before = port.counters().total;
        for number in 1..=100 {
            let stranger = socket("127.0.0.1:0");
            stranger.send_to(b"z", port.bind()).expect("sent");
            strangers.push(stranger);
            // Each leaves its mark before the next one comes.
            until("the stranger's session", || {
                (port.counters().total >= before + number).then_some(())
            })
            .expect("a session");
            assert!(port.active() <= ALL / 4, "{} sessions", port.active());
        }
    }
    assert_eq!(
        relay.totals().active(),
        ALL / 2,
        "connections keep the rest"
    );
    assert_eq!(
        exchange(&client, ports[0].bind(), b"w"),
        seen,
        "who speaks keeps the session"
    );
    let newcomer = socket("127.0.0.1:0");
    for port in &ports {
        exchange(&newcomer, port.bind(), b"x");
        assert_eq!(port.counters().refused, 0, "the oldest stranger made room");
    }
    let server = traffic::listener("127.0.0.1:0");
    let streams = relay
        .open(
            "127.0.0.1:0".parse().expect("an address"),
            server.local_addr().expect("bound"),
            Rules::default(),
        )
        .expect("a port");
    let _stream = traffic::connect(streams.bind()).expect("accepted");
    server.accept().expect("led to the server");
}
