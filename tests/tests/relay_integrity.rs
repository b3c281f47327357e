//! What goes into the relay comes out of it: every byte, in order, in both directions, with the
//! end of each direction where it was put.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use dataplane::forward::relay::port::{Port, Rules};
use dataplane::forward::relay::{Engine, Options, Relay};
use harness::traffic::{self, Dice, Manner};

const MIB: u64 = 1024 * 1024;

fn relay(threads: usize, splice: bool) -> Relay {
    let ours = harness::relay::options(module_path!());
    Relay::start(Options {
        threads,
        engine: if splice { ours.engine } else { Engine::Copy },
        ..ours
    })
    .expect("a relay")
}

fn open(relay: &Relay, target: SocketAddr) -> Arc<Port> {
    let bind = SocketAddr::new(target.ip(), 0);
    relay.open(bind, target, Rules::default()).expect("a port")
}

/// Connects through the relay; returns both ends.
fn pair(port: &Port, server: &TcpListener) -> (TcpStream, TcpStream) {
    let client = traffic::connect(port.bind()).expect("the relay accepts");
    let (accepted, _) = server.accept().expect("the relay connects");
    traffic::patient(&accepted).expect("deadlines");
    (client, accepted)
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    harness::dataplane::until(what, || done().then_some(())).expect("in time");
}

struct Exchange {
    seed: u64,
    up: u64,
    down: u64,
    client: Manner,
    server: Manner,
}

/// Sends both ways at once, each direction ending when its bytes are out, and checks both.
fn exchange(port: &Port, server: &TcpListener, plan: &Exchange) {
    let (client, accepted) = pair(port, server);
    let ends = [
        (client, plan.up, plan.down, plan.client, 0),
        (accepted, plan.down, plan.up, plan.server, 1),
    ];
    thread::scope(|scope| {
        for (stream, outgoing, incoming, manner, end) in ends {
            let mut reader = stream.try_clone().expect("a second handle");
            let mut writer = stream;
            let seed = plan.seed;
            scope.spawn(move || {
                traffic::send(&mut writer, seed + end, outgoing, manner).expect("all bytes go out");
                writer.shutdown(Shutdown::Write).expect("half-close");
            });
            scope.spawn(move || {
                let got = traffic::receive(&mut reader, seed + 1 - end, manner)
                    .unwrap_or_else(|err| panic!("seed {seed}, end {end}: {err}"));
                assert_eq!(got, incoming, "seed {seed}, end {end}: length");
            });
        }
    });
}

fn random_manner(dice: &mut Dice) -> Manner {
    let pieces = [1400, 4096, 9000, 65_536, 200_000, 1_000_000];
    let piece = pieces[usize::try_from(dice.below(pieces.len() as u64)).expect("small")];
    let slow = dice.below(3) == 0;
    Manner {
        piece,
        pause_every: if slow { 40 } else { 0 },
        pause: Duration::from_millis(dice.below(8)),
    }
}

fn random_transfers(threads: usize, splice: bool, rounds: u64, seed: u64) {
    let relay = relay(threads, splice);
    let server = traffic::listener("127.0.0.1:0");
    let port = open(&relay, server.local_addr().expect("bound"));
    let mut dice = Dice::new(seed);
    let (mut up, mut down) = (0, 0);
    for round in 0..rounds {
        // Most are long in one direction at least; some directions end at once.
        let mut length = || match dice.below(4) {
            0 => dice.below(3) * dice.below(70_000),
            _ => 2 * MIB + dice.below(10 * MIB),
        };
        let plan = Exchange {
            seed: seed + round * 2,
            up: length(),
            down: length(),
            client: random_manner(&mut dice),
            server: random_manner(&mut dice),
        };
        exchange(&port, &server, &plan);
        up += plan.up;
        down += plan.down;
    }
    until("the end of all sessions", || {
        relay.session_counts().sessions == 0
    });
    let counters = port.counters();
    assert_eq!(counters.bytes_in, up, "bytes counted towards the container");
    assert_eq!(counters.bytes_out, down, "bytes counted towards clients");
    assert_eq!((counters.total, counters.active), (rounds, 0));
    assert_eq!((counters.refused, counters.connect_failures), (0, 0));
}

#[test]
fn random_transfers_arrive_whole_with_splice() {
    random_transfers(1, true, 16, 0xb1);
}

#[test]
fn random_transfers_arrive_whole_by_copying() {
    random_transfers(1, false, 8, 0xb2);
}

#[test]
fn random_transfers_arrive_whole_with_two_threads() {
    random_transfers(2, true, 8, 0xb3);
}

#[test]
fn concurrent_bulk_streams_do_not_mix() {
    let relay = relay(2, true);
    let server = Arc::new(traffic::listener("127.0.0.1:0"));
    let port = open(&relay, server.local_addr().expect("bound"));
    thread::scope(|scope| {
        // The server learns from the first eight bytes which stream it has got.
        scope.spawn(|| {
            thread::scope(|scope| {
                for _ in 0..12 {
                    let (mut accepted, _) = server.accept().expect("a session");
                    scope.spawn(move || {
                        traffic::patient(&accepted).expect("deadlines");
                        let mut head = [0; 8];
                        accepted.read_exact(&mut head).expect("the seed");
                        let seed = u64::from_le_bytes(head);
                        let mut back = accepted.try_clone().expect("a second handle");
                        let writer = thread::spawn(move || {
                            traffic::send(&mut back, seed + 1, 6 * MIB, Manner::eager(300_000))
                                .expect("all bytes go out");
                            back.shutdown(Shutdown::Write).expect("half-close");
                        });
                        let got = traffic::receive(&mut accepted, seed, Manner::eager(100_000));
                        assert_eq!(got, Ok(6 * MIB), "upwards, seed {seed}");
                        writer.join().expect("the writer");
                    });
                }
            });
        });
        for number in 0..12_u64 {
            let address = port.bind();
            scope.spawn(move || {
                let seed = 0xc000 + number * 16;
                let mut client = traffic::connect(address).expect("accepted");
                client.write_all(&seed.to_le_bytes()).expect("the seed");
                let mut back = client.try_clone().expect("a second handle");
                let reader = thread::spawn(move || {
                    traffic::receive(&mut back, seed + 1, Manner::eager(70_000))
                });
                traffic::send(&mut client, seed, 6 * MIB, Manner::eager(500_000)).expect("sent");
                client.shutdown(Shutdown::Write).expect("half-close");
                let got = reader.join().expect("the reader");
                assert_eq!(got, Ok(6 * MIB), "downwards, seed {seed}");
            });
        }
    });
}

/// Named after the failure of the prototype: 4 of 30 exchanges with a half-close hung.
#[test]
fn half_closed_exchanges_never_hang() {
    let relay = relay(1, true);
    let server = traffic::listener("127.0.0.1:0");
    let port = open(&relay, server.local_addr().expect("bound"));
    let mut dice = Dice::new(0xd00d);
    for round in 0..150_u64 {
        let request = dice.below(1_500_000);
        let reply = dice.below(1_500_000);
        let (mut client, mut accepted) = pair(&port, &server);
        thread::scope(|scope| {
            // The server answers only after the end of the request: the answer needs a session
            // that is closed in one direction and open in the other.
            scope.spawn(move || {
                let got = traffic::receive(&mut accepted, round, Manner::eager(60_000));
                assert_eq!(got, Ok(request), "round {round}: request");
                traffic::send(&mut accepted, !round, reply, Manner::eager(90_000)).expect("reply");
            });
            traffic::send(&mut client, round, request, Manner::eager(120_000)).expect("request");
            client.shutdown(Shutdown::Write).expect("half-close");
            let got = traffic::receive(&mut client, !round, Manner::eager(50_000));
            assert_eq!(got, Ok(reply), "round {round}: reply");
        });
    }
    until("the end of all sessions", || {
        relay.session_counts().sessions == 0
    });
}

#[test]
fn a_half_close_by_the_container_leaves_uploads_flowing() {
    let relay = relay(1, true);
    let server = traffic::listener("127.0.0.1:0");
    let port = open(&relay, server.local_addr().expect("bound"));
    let (mut client, mut accepted) = pair(&port, &server);
    accepted.write_all(b"banner").expect("banner");
    accepted.shutdown(Shutdown::Write).expect("half-close");
    let mut text = String::new();
    client
        .read_to_string(&mut text)
        .expect("banner and its end");
    assert_eq!(text, "banner");
    let upload = thread::spawn(move || {
        traffic::send(&mut client, 5, 9 * MIB, Manner::eager(100_000)).expect("upload");
    });
    assert_eq!(
        traffic::receive(&mut accepted, 5, Manner::eager(64_000)),
        Ok(9 * MIB)
    );
    upload.join().expect("the client");
}

#[test]
fn thousands_of_short_connections_each_get_their_own_answer() {
    let relay = relay(2, true);
    let echo = traffic::echo_server("127.0.0.1:0");
    let port = open(&relay, echo);
    let address = port.bind();
    let asked = AtomicU64::new(0);
    thread::scope(|scope| {
        for client in 0..8_u64 {
            let asked = &asked;
            scope.spawn(move || {
                let mut dice = Dice::new(client);
                for number in 0..500_u64 {
                    let seed = client << 32 | number;
                    let mut stream = traffic::connect(address).expect("accepted");
                    let length = 1 + dice.below(300);
                    traffic::send(&mut stream, seed, length, Manner::eager(100)).expect("sent");
                    stream.shutdown(Shutdown::Write).expect("half-close");
                    let got = traffic::receive(&mut stream, seed, Manner::eager(400));
                    assert_eq!(got, Ok(length), "client {client}, connection {number}");
                    asked.fetch_add(1, Relaxed);
                }
            });
        }
    });
    assert_eq!(asked.load(Relaxed), 4000);
    until("the end of all sessions", || {
        relay.session_counts().sessions == 0
    });
    assert_eq!(port.counters().total, 4000);
}

#[test]
fn a_conversation_of_alternating_sizes_switches_engines_and_stays_whole() {
    let relay = relay(1, true);
    let echo = traffic::echo_server("127.0.0.1:0");
    let port = open(&relay, echo);
    let mut client = traffic::connect(port.bind()).expect("accepted");
    let mut dice = Dice::new(77);
    let mut spliced = false;
    for round in 0..120_u64 {
        let length = match round % 10 {
            0 => 700_000 + dice.below(900_000),
            5 => 20_000 + dice.below(40_000),
            _ => 1 + dice.below(200),
        };
        let mut writer = client.try_clone().expect("a second handle");
        let sender = thread::spawn(move || {
            traffic::send(&mut writer, round, length, Manner::eager(400_000)).expect("sent");
        });
        let mut back = vec![0; usize::try_from(length).expect("small")];
        client.read_exact(&mut back).expect("the echo");
        let mut want = vec![0; back.len()];
        traffic::fill(round, 0, &mut want);
        assert!(back == want, "round {round}: {length} bytes differ");
        sender.join().expect("the sender");
        spliced |= relay.session_counts().splicing > 0;
    }
    assert!(spliced, "the bulk of this conversation was to use splice");
}

#[test]
fn a_reader_that_sleeps_holds_the_sender_back_and_loses_nothing() {
    let relay = relay(1, true);
    let server = traffic::listener("127.0.0.1:0");
    let port = open(&relay, server.local_addr().expect("bound"));
    let (mut client, mut accepted) = pair(&port, &server);
    client.set_nonblocking(true).expect("non-blocking");
    let mut sent = 0_u64;
    let mut quiet_since = Instant::now();
    let mut buffer = vec![0; 100_000];
    // Push until nothing has been taken for half a second.
    while quiet_since.elapsed() < Duration::from_millis(500) {
        traffic::fill(9, sent, &mut buffer);
        match client.write(&buffer) {
            Ok(taken) => {
                sent += taken as u64;
                quiet_since = Instant::now();
            }
            Err(_) => thread::sleep(Duration::from_millis(5)),
        }
        assert!(sent < 64 * MIB, "no backpressure: {sent} bytes swallowed");
    }
    let counted = port.counters().bytes_in;
    assert!(
        counted > 0 && counted <= sent,
        "{counted} of {sent} delivered"
    );
    client.set_nonblocking(false).expect("blocking");
    client.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(
        traffic::receive(&mut accepted, 9, Manner::eager(65_536)),
        Ok(sent)
    );
}

#[test]
fn urgent_bytes_neither_end_a_stream_nor_get_lost() {
    let relay = relay(1, true);
    let server = traffic::listener("127.0.0.1:0");
    let port = open(&relay, server.local_addr().expect("bound"));
    let (mut client, mut accepted) = pair(&port, &server);
    let reader = thread::spawn(move || traffic::receive(&mut accepted, 3, Manner::eager(32_768)));
    let mut offset = 0;
    for round in 0..40_u64 {
        let mut bulk = vec![0; 150_000 + usize::try_from(round).expect("small") * 997];
        traffic::fill(3, offset, &mut bulk);
        client.write_all(&bulk).expect("bulk");
        offset += bulk.len() as u64;
        let urgent = [traffic::byte(3, offset)];
        rustix::net::send(client.as_fd(), &urgent, rustix::net::SendFlags::OOB).expect("urgent");
        offset += 1;
    }
    client.shutdown(Shutdown::Write).expect("half-close");
    assert_eq!(reader.join().expect("the reader"), Ok(offset));
}

/// The kernel answers a splice that stands at an urgent byte as if nothing were there, and tells of the
/// byte once.
#[test]
fn an_urgent_byte_with_little_behind_it_does_not_stall_a_direction_that_splices() {
    let relay = relay(1, true);
    let server = traffic::listener("127.0.0.1:0");
    let port = open(&relay, server.local_addr().expect("bound"));
    let bulk = vec![7; 1024 * 1024];
    let mut got = vec![0; bulk.len()];
    for (upwards, behind) in [(true, 0), (true, 1), (false, 0), (false, 1)] {
        let (client, accepted) = pair(&port, &server);
        let (mut from, mut to) = match upwards {
            true => (client, accepted),
            false => (accepted, client),
        };
        for round in 0..3 {
            // A direction that dries up for the first time may go back to copying.
            until("splice", || {
                thread::scope(|scope| {
                    scope.spawn(|| from.write_all(&bulk).expect("bulk"));
                    to.read_exact(&mut got).expect("bulk");
                });
                relay.session_counts().splicing == 1
            });
            rustix::net::send(from.as_fd(), b"!", rustix::net::SendFlags::OOB).expect("urgent");
            from.write_all(&vec![b'.'; behind]).expect("behind it");
            let mut last = vec![0; 1 + behind];
            to.read_exact(&mut last)
                .unwrap_or_else(|err| panic!("{upwards}, {behind}, round {round}: {err}"));
            assert_eq!(last, b"!."[..=behind]);
        }
        drop((from, to));
        until("the end of the session", || {
            relay.session_counts().sessions == 0
        });
    }
}

#[test]
fn ipv6_clients_and_containers_are_served() {
    if !harness::netns::has_ipv6() {
        return;
    }
    let relay = relay(1, true);
    for (bind, server) in [
        ("[::1]:0", "[::1]:0"),
        ("[::1]:0", "127.0.0.1:0"),
        ("127.0.0.1:0", "[::1]:0"),
        ("[::]:0", "127.0.0.1:0"),
    ] {
        let server = traffic::listener(server);
        let target = server.local_addr().expect("bound");
        let port = relay
            .open(bind.parse().expect("an address"), target, Rules::default())
            .expect("a port");
        let mut addresses = vec![port.bind()];
        if port.bind().ip().is_unspecified() {
            let at = |ip: &str| SocketAddr::new(ip.parse().expect("ip"), port.bind().port());
            addresses = vec![at("::1"), at("127.0.0.1")];
        }
        for address in addresses {
            let mut client = traffic::connect(address).expect("accepted");
            let (mut accepted, _) = server.accept().expect("connected");
            let writer = thread::spawn(move || {
                traffic::send(&mut client, 4, MIB, Manner::eager(80_000)).expect("sent");
            });
            assert_eq!(
                traffic::receive(&mut accepted, 4, Manner::eager(64_000)),
                Ok(MIB),
                "{address} to {target}"
            );
            writer.join().expect("the writer");
        }
    }
}
