//! How sessions end: resets stay resets, timeouts strike in time, limits hold, and nobody's
//! misbehaviour reaches a neighbour.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dataplane::forward::relay::port::{Port, Rules};
use dataplane::forward::relay::{Options, Relay};
use harness::dataplane::until;
use harness::traffic::{self, Manner, turned_away};
use rustix::net::sockopt;
use shared::desired::ClientNetwork;

fn relay() -> Relay {
    harness::relay::start(module_path!())
}

fn open(relay: &Relay, target: SocketAddr, rules: Rules) -> Arc<Port> {
    relay
        .open("127.0.0.1:0".parse().expect("an address"), target, rules)
        .expect("a port")
}

fn pair(relay: &Relay) -> (Arc<Port>, TcpStream, TcpStream) {
    let server = traffic::listener("127.0.0.1:0");
    let port = open(relay, server.local_addr().expect("bound"), Rules::default());
    let client = traffic::connect(port.bind()).expect("accepted");
    let (accepted, _) = server.accept().expect("connected");
    traffic::patient(&accepted).expect("deadlines");
    (port, client, accepted)
}

/// Closes with RST.
fn reset(stream: TcpStream) {
    sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).expect("linger");
    drop(stream);
}

fn kind_of_end(stream: &mut TcpStream) -> Result<(), ErrorKind> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(err) => return Err(err.kind()),
        }
    }
}

fn echoes(stream: &mut TcpStream) -> bool {
    stream.write_all(b"!").is_ok() && stream.read_exact(&mut [0]).is_ok()
}

/// Writes until nothing is taken any more.
fn clog(stream: &mut TcpStream) {
    stream.set_nonblocking(true).expect("non-blocking");
    let bytes = vec![0; 100_000];
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_millis(100) {
        match stream.write(&bytes) {
            Ok(taken) => {
                assert!(taken > 0, "a write of nothing");
                quiet = Instant::now();
            }
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
    stream.set_nonblocking(false).expect("blocking");
}

#[test]
fn a_reset_by_either_side_is_a_reset_for_the_other() {
    let relay = relay();
    let (_port, client, mut accepted) = pair(&relay);
    reset(client);
    assert_eq!(kind_of_end(&mut accepted), Err(ErrorKind::ConnectionReset));
    let (_port, mut client, accepted) = pair(&relay);
    reset(accepted);
    assert_eq!(kind_of_end(&mut client), Err(ErrorKind::ConnectionReset));
}

#[test]
fn a_clean_end_is_a_clean_end_for_the_other() {
    let relay = relay();
    let (_port, client, mut accepted) = pair(&relay);
    drop(client);
    assert_eq!(kind_of_end(&mut accepted), Ok(()));
    let (_port, mut client, accepted) = pair(&relay);
    drop(accepted);
    assert_eq!(kind_of_end(&mut client), Ok(()));
}

#[test]
fn a_reset_after_a_half_close_is_not_a_clean_end() {
    let relay = relay();
    let (_port, mut client, accepted) = pair(&relay);
    client.shutdown(Shutdown::Write).expect("half-close");
    client.set_nodelay(true).expect("option");
    reset(accepted);
    assert_eq!(kind_of_end(&mut client), Err(ErrorKind::ConnectionReset));
}

#[test]
fn an_answer_sent_before_a_reset_arrives() {
    let relay = relay();
    for round in 0..20 {
        let (_port, mut client, mut accepted) = pair(&relay);
        // The server answers early and goes, leaving the upload unread: its kernel resets.
        clog(&mut client);
        accepted
            .read_exact(&mut [0; 1000])
            .expect("some of the upload");
        accepted.write_all(b"413 too large").expect("the answer");
        until("the answer being on its way", || {
            let mut peeked = [0; 32];
            client.peek(&mut peeked).ok().filter(|read| *read == 13)
        })
        .unwrap_or_else(|err| panic!("round {round}: {err}"));
        drop(accepted);
        let mut answer = [0; 13];
        client.read_exact(&mut answer).expect("the answer");
        assert_eq!(&answer, b"413 too large");
        assert_eq!(kind_of_end(&mut client), Err(ErrorKind::ConnectionReset));
    }
    until("the end of all sessions", || {
        (relay.session_counts().sessions == 0).then_some(())
    })
    .expect("ended");
}

#[test]
fn a_dead_client_does_not_hold_a_session_of_a_silent_container() {
    let relay = relay();
    let (port, mut client, accepted) = pair(&relay);
    // Fill the way to a container that does not read, then vanish.
    clog(&mut client);
    reset(client);
    until("the seat being given back", || {
        (port.active() == 0).then_some(())
    })
    .expect("bounded");
    drop(accepted);
}

#[test]
fn a_side_that_ends_and_then_dies_does_not_hold_a_session_of_a_silent_other() {
    let relay = relay();
    let dies = |port: &Port, one: TcpStream, mut other: TcpStream| {
        one.shutdown(Shutdown::Write).expect("half-close");
        assert_eq!(other.read(&mut [0]).expect("the end"), 0);
        reset(one);
        until("the seat being given back", || {
            (port.active() == 0).then_some(())
        })
        .expect("told of the reset");
    };
    let (port, client, accepted) = pair(&relay);
    dies(&port, client, accepted);
    let (port, client, accepted) = pair(&relay);
    dies(&port, accepted, client);
}

#[test]
fn silence_ends_a_session_and_traffic_keeps_it() {
    let relay = relay();
    let echo = traffic::echo_server("127.0.0.1:0");
    let rules = Rules {
        // Longer than a loaded machine lets the busy client wait for its turn.
        idle_timeout: Some(Duration::from_secs(4)),
        ..Rules::default()
    };
    let port = open(&relay, echo, rules);
    let mut silent = traffic::connect(port.bind()).expect("accepted");
    let mut busy = traffic::connect(port.bind()).expect("accepted");
    assert!(echoes(&mut silent));
    let begin = Instant::now();
    let watch = thread::spawn(move || (kind_of_end(&mut silent), begin.elapsed()));
    while !watch.is_finished() {
        assert!(echoes(&mut busy), "a session with traffic lives on");
        thread::sleep(Duration::from_millis(100));
    }
    let (end, after) = watch.join().expect("the watch");
    assert_eq!(end, Err(ErrorKind::ConnectionReset), "cut, not ended");
    assert!(after >= Duration::from_secs(4), "too early: {after:?}");
    assert_eq!(port.counters().idle_timeouts, 1);
}

#[test]
fn a_container_that_does_not_answer_is_given_up() {
    let relay = relay();
    // A listener whose queue is full leaves further handshakes unanswered.
    let full = TcpListener::bind("127.0.0.1:0").expect("a listener");
    rustix::net::listen(&full, 0).expect("a shorter queue");
    let target = full.local_addr().expect("bound");
    let mut fillers = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&target, Duration::from_millis(300)) {
        fillers.push(stream);
        assert!(fillers.len() < 100, "the queue never fills");
    }
    let rules = Rules {
        connect_timeout: Duration::from_millis(700),
        ..Rules::default()
    };
    let port = open(&relay, target, rules);
    let begin = Instant::now();
    let mut client = traffic::connect(port.bind()).expect("accepted");
    assert_eq!(kind_of_end(&mut client), Err(ErrorKind::ConnectionReset));
    assert!(begin.elapsed() >= Duration::from_millis(700));
    until("the count", || {
        (port.counters().connect_failures == 1).then_some(())
    })
    .expect("counted");
    until("the seat", || (port.active() == 0).then_some(())).expect("given back");
}

#[test]
fn a_container_that_refuses_is_counted_and_the_client_is_reset() {
    let relay = relay();
    let free = traffic::listener("127.0.0.1:0")
        .local_addr()
        .expect("bound");
    let port = open(&relay, free, Rules::default());
    for _ in 0..20 {
        assert!(turned_away(port.bind()));
    }
    until("the count", || {
        (port.counters().connect_failures == 20).then_some(())
    })
    .expect("counted");
    until("the seat", || (port.active() == 0).then_some(())).expect("given back");
}

#[test]
fn limits_of_port_process_network_and_place_hold() {
    let relay = Relay::start(Options {
        total_sessions: 3,
        ..harness::relay::options(module_path!())
    })
    .expect("a relay");
    let echo = traffic::echo_server("127.0.0.1:0");
    let two = Rules {
        max_sessions: 2,
        ..Rules::default()
    };
    let (a, b) = (
        open(&relay, echo, two),
        open(&relay, echo, Rules::default()),
    );
    let mut kept: Vec<TcpStream> = (0..2)
        .map(|_| traffic::connect(a.bind()).expect("accepted"))
        .collect();
    assert!(kept.iter_mut().all(echoes));
    assert!(turned_away(a.bind()), "the port's limit");
    let mut third = traffic::connect(b.bind()).expect("accepted");
    assert!(echoes(&mut third));
    assert!(turned_away(b.bind()), "the limit of all");
    assert_eq!((a.counters().refused, b.counters().refused), (1, 1));
    assert_eq!(relay.totals().shed(), 1);
    kept.clear();
    until("room again", || {
        let mut stream = traffic::connect(b.bind()).ok()?;
        echoes(&mut stream).then_some(())
    })
    .expect("room again");

    let elsewhere = Rules {
        allowed: vec![ClientNetwork {
            address: "192.0.2.0".parse().expect("an address"),
            prefix: 24,
        }],
        ..Rules::default()
    };
    let closed = open(&relay, echo, elsewhere.clone());
    assert!(turned_away(closed.bind()));
    closed.set_rules(Rules {
        allowed: vec![ClientNetwork {
            address: "127.0.0.0".parse().expect("an address"),
            prefix: 8,
        }],
        ..elsewhere
    });
    until("a client of an allowed network", || {
        let mut stream = traffic::connect(closed.bind()).ok()?;
        echoes(&mut stream).then_some(())
    })
    .expect("let in");
}

#[test]
fn a_listener_turns_clients_away_that_come_too_fast() {
    let relay = relay();
    let echo = traffic::echo_server("127.0.0.1:0");
    let rules = Rules {
        new_per_second: 1,
        ..Rules::default()
    };
    let port = open(&relay, echo, rules.clone());
    // Two at once are within the rate; more than a hundred are not, however long they take to ask.
    let served = |count: usize| {
        let ask = |_| {
            let mut stream = traffic::connect(port.bind()).ok()?;
            echoes(&mut stream).then_some(stream)
        };
        (0..count).filter_map(ask).collect::<Vec<_>>()
    };
    let begun = Instant::now();
    let mut first = served(1);
    assert_eq!(first.len(), 1, "the first is in time");
    let kept = served(200);
    let seconds = usize::try_from(begun.elapsed().as_secs()).expect("few");
    assert!(kept.len() <= seconds + 2, "{} in {seconds} s", kept.len());
    let refused = u64::try_from(200 - kept.len()).expect("few");
    assert_eq!(port.counters().refused, refused);
    assert!(echoes(&mut first[0]), "who is there stays");
    port.set_rules(Rules {
        new_per_second: 0,
        ..rules
    });
    assert_eq!(served(50).len(), 50, "no rate");
}

#[test]
fn cutting_a_port_spares_the_others() {
    let relay = relay();
    let echo = traffic::echo_server("127.0.0.1:0");
    let (a, b) = (
        open(&relay, echo, Rules::default()),
        open(&relay, echo, Rules::default()),
    );
    let mut on_a: Vec<TcpStream> = (0..50)
        .map(|_| traffic::connect(a.bind()).expect("accepted"))
        .collect();
    let mut on_b: Vec<TcpStream> = (0..50)
        .map(|_| traffic::connect(b.bind()).expect("accepted"))
        .collect();
    assert!(on_a.iter_mut().chain(&mut on_b).all(echoes));
    relay.close(std::slice::from_ref(&a));
    assert!(
        on_a.iter_mut().all(echoes),
        "closing the listener leaves sessions"
    );
    relay.cut(std::slice::from_ref(&a));
    assert_eq!(a.active(), 0);
    for stream in &mut on_a {
        assert_eq!(kind_of_end(stream), Err(ErrorKind::ConnectionReset));
    }
    assert!(
        on_b.iter_mut().all(echoes),
        "the neighbour's sessions go on"
    );
}

#[test]
fn closing_a_listener_keeps_those_who_had_connected() {
    let relay = relay();
    let echo = traffic::echo_server("127.0.0.1:0");
    for _ in 0..20 {
        let port = open(&relay, echo, Rules::default());
        let mut streams: Vec<TcpStream> = (0..30)
            .map(|_| traffic::connect(port.bind()).expect("accepted"))
            .collect();
        relay.close(std::slice::from_ref(&port));
        assert!(
            streams.iter_mut().all(echoes),
            "a connection was dropped at closing"
        );
        assert!(TcpStream::connect(port.bind()).is_err());
    }
}

#[test]
fn a_bulk_transfer_does_not_starve_small_messages() {
    let relay = relay();
    let server = traffic::listener("127.0.0.1:0");
    let bulk = open(
        &relay,
        server.local_addr().expect("bound"),
        Rules::default(),
    );
    let echo = traffic::echo_server("127.0.0.1:0");
    let small = open(&relay, echo, Rules::default());
    let mut writers = Vec::new();
    for _ in 0..4 {
        let mut client = traffic::connect(bulk.bind()).expect("accepted");
        let (mut accepted, _) = server.accept().expect("connected");
        writers.push(thread::spawn(move || {
            let bytes = vec![0; 1 << 20];
            while client.write_all(&bytes).is_ok() {}
        }));
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 20];
            while matches!(accepted.read(&mut buffer), Ok(read) if read > 0) {}
        });
    }
    let mut stream = traffic::connect(small.bind()).expect("accepted");
    stream.set_nodelay(true).expect("option");
    until("bulk under way", || {
        (bulk.counters().bytes_in > 10_000_000).then_some(())
    })
    .expect("bulk");
    let before = bulk.counters().bytes_in;
    const MESSAGES: u64 = 100;
    for _ in 0..MESSAGES {
        assert!(echoes(&mut stream), "starved");
    }
    // A few megabytes each, at most; a session whose turn never comes sees all of the bulk pass.
    let passed = (bulk.counters().bytes_in - before) / MESSAGES;
    assert!(passed < 100_000_000, "{passed} bytes of bulk per message");
    relay.close(std::slice::from_ref(&bulk));
    relay.cut(std::slice::from_ref(&bulk));
    for writer in writers {
        writer.join().expect("the writers end with the cut");
    }
}

#[test]
fn random_abuse_leaves_nothing_behind() {
    let relay = relay();
    let server = traffic::listener("127.0.0.1:0");
    let port = open(
        &relay,
        server.local_addr().expect("bound"),
        Rules::default(),
    );
    let open_before = descriptors();
    thread::spawn(move || {
        let mut dice = traffic::Dice::new(4);
        for stream in server.incoming() {
            let Ok(mut stream) = stream else { return };
            let act = dice.below(5);
            let amount = dice.below(300_000);
            thread::spawn(move || {
                let _ = traffic::patient(&stream);
                match act {
                    0 => reset(stream),
                    1 => {
                        let _ = stream.shutdown(Shutdown::Both);
                    }
                    2 => {
                        let _ = traffic::send(&mut stream, 1, amount, Manner::eager(50_000));
                        reset(stream);
                    }
                    3 => {
                        let _ = stream.shutdown(Shutdown::Read);
                        let _ = traffic::send(&mut stream, 1, amount, Manner::eager(50_000));
                    }
                    _ => {
                        let _ = kind_of_end(&mut stream);
                    }
                }
            });
        }
    });
    thread::scope(|scope| {
        for client in 0..4_u64 {
            let address = port.bind();
            scope.spawn(move || {
                let mut dice = traffic::Dice::new(100 + client);
                for _ in 0..150 {
                    let Ok(mut stream) = traffic::connect(address) else {
                        continue;
                    };
                    let amount = dice.below(300_000);
                    let _ = traffic::send(&mut stream, 2, amount, Manner::eager(70_000));
                    match dice.below(4) {
                        0 => reset(stream),
                        1 => drop(stream),
                        2 => {
                            let _ = stream.shutdown(Shutdown::Write);
                            let _ = kind_of_end(&mut stream);
                        }
                        _ => {
                            let _ = stream.shutdown(Shutdown::Both);
                        }
                    }
                }
            });
        }
    });
    until("the end of all sessions", || {
        (relay.session_counts().sessions == 0 && port.active() == 0).then_some(())
    })
    .expect("nothing is left");
    // Pooled pipes stay: up to 32 of two descriptors.
    until("descriptors being given back", || {
        (descriptors() <= open_before + 64 + 8).then_some(())
    })
    .expect("no descriptor leaks");
    assert_eq!(relay.totals().active(), 0);
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
