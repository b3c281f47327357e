//! Every way to end a session, for every size around the limits of the engine, fast and slow
//! readers, with and without an urgent byte at the very end: bytes are whole, ends are where they
//! were put, a reset never looks like an end.

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dataplane::forward::relay::port::{Port, Rules};
use dataplane::forward::relay::{Engine, Options, Relay};
use harness::traffic::{self, Manner};
use rustix::net::sockopt;

/// Nothing, a byte, a message; around the change to splice (32 KiB), the shared buffer (64 KiB)
/// and a pipe (256 KiB); and more than sockets hold.
const SIZES: [u64; 12] = [
    0, 1, 64, 16_383, 32_767, 32_768, 65_535, 65_536, 65_537, 262_144, 300_001, 2_500_000,
];

const SLOW: Manner = Manner {
    piece: 20_000,
    pause_every: 4,
    pause: Duration::from_millis(1),
};

#[derive(Debug, Clone, Copy)]
enum Order {
    /// One side sends and half-closes; the other reads to the end, then answers and half-closes.
    InTurn,
    /// Both send and half-close at once.
    AtOnce,
    /// One side sends and closes altogether; the other reads.
    CloseAfterSending,
    /// One side sends and resets; the other reads.
    Reset,
}

struct Case {
    order: Order,
    client_first: bool,
    size: u64,
    answer: u64,
    reader: Manner,
    urgent: bool,
}

fn send(stream: &mut TcpStream, seed: u64, size: u64, urgent: bool) -> u64 {
    traffic::send(stream, seed, size, Manner::eager(100_000)).expect("all bytes go out");
    if !urgent {
        return size;
    }
    let last = [traffic::byte(seed, size)];
    rustix::net::send(stream.as_fd(), &last, rustix::net::SendFlags::OOB).expect("urgent");
    size + 1
}

fn run(port: &Port, server: &TcpListener, case: &Case, name: &str) {
    let client = traffic::connect(port.bind()).expect("the relay accepts");
    let (accepted, _) = server.accept().expect("the relay connects");
    traffic::patient(&accepted).expect("deadlines");
    // Both ends of a test read urgent bytes in line, as the relay does.
    for stream in [&client, &accepted] {
        sockopt::set_socket_oobinline(stream, true).expect("in line");
    }
    let (mut first, mut second) = if case.client_first {
        (client, accepted)
    } else {
        (accepted, client)
    };
    let (size, answer, urgent, reader) = (case.size, case.answer, case.urgent, case.reader);
    match case.order {
        Order::InTurn => thread::scope(|scope| {
            scope.spawn(|| {
                let sent = send(&mut first, 1, size, urgent);
                first.shutdown(Shutdown::Write).expect("half-close");
                let got = traffic::receive(&mut first, 2, reader);
                assert_eq!(
                    got,
                    Ok(answer + u64::from(urgent)),
                    "{name}, answer to {sent}"
                );
            });
            let got = traffic::receive(&mut second, 1, reader);
            assert_eq!(got, Ok(size + u64::from(urgent)), "{name}");
            send(&mut second, 2, answer, urgent);
            second.shutdown(Shutdown::Write).expect("half-close");
        }),
        Order::AtOnce => thread::scope(|scope| {
            for (stream, own, theirs, length, expected) in
                [(&first, 1, 2, size, answer), (&second, 2, 1, answer, size)]
            {
                let mut writer = stream.try_clone().expect("a second handle");
                let mut incoming = stream.try_clone().expect("a second handle");
                scope.spawn(move || {
                    send(&mut writer, own, length, urgent);
                    writer.shutdown(Shutdown::Write).expect("half-close");
                });
                scope.spawn(move || {
                    let got = traffic::receive(&mut incoming, theirs, reader);
                    assert_eq!(got, Ok(expected + u64::from(urgent)), "{name}");
                });
            }
        }),
        Order::CloseAfterSending => thread::scope(|scope| {
            scope.spawn(move || {
                send(&mut first, 1, size, urgent);
                drop(first);
            });
            let got = traffic::receive(&mut second, 1, reader);
            assert_eq!(got, Ok(size + u64::from(urgent)), "{name}");
        }),
        Order::Reset => thread::scope(|scope| {
            scope.spawn(move || {
                send(&mut first, 1, size, urgent);
                sockopt::set_socket_linger(&first, Some(Duration::ZERO)).expect("linger");
                drop(first);
            });
            // What was under way may be lost with a reset; what arrives is right, and the end is
            // not a clean one.
            let got = traffic::receive(&mut second, 1, reader);
            let words = got.expect_err(name);
            assert!(words.contains("reset"), "{name}: {words}");
        }),
    }
}

fn every_case(order: Order, splice: bool) {
    let ours = harness::relay::options(module_path!());
    let relay = Relay::start(Options {
        engine: if splice { ours.engine } else { Engine::Copy },
        ..ours
    })
    .expect("a relay");
    let server = traffic::listener("127.0.0.1:0");
    let target: SocketAddr = server.local_addr().expect("bound");
    let bind = SocketAddr::new(target.ip(), 0);
    let port: Arc<Port> = relay.open(bind, target, Rules::default()).expect("a port");
    let mut cases = 0;
    for client_first in [true, false] {
        for (number, size) in SIZES.into_iter().enumerate() {
            for (reader, slow) in [(Manner::eager(65_536), false), (SLOW, true)] {
                for urgent in [false, true] {
                    let case = Case {
                        order,
                        client_first,
                        size,
                        // Another size, so that both directions are in different engines.
                        answer: SIZES[(number + 5) % SIZES.len()],
                        reader,
                        urgent,
                    };
                    let name = format!(
                        "{order:?}, client first {client_first}, {size} bytes, slow {slow}, urgent {urgent}"
                    );
                    run(&port, &server, &case, &name);
                    cases += 1;
                }
            }
        }
    }
    harness::dataplane::until("the end of all sessions", || {
        (relay.session_counts().sessions == 0).then_some(())
    })
    .expect("none are left");
    let counters = port.counters();
    assert_eq!((counters.total, counters.active), (cases, 0));
    // A container that resets before the relay has seen its acceptance counts as not reached.
    if !matches!(order, Order::Reset) {
        assert_eq!(counters.connect_failures, 0);
    }
}

#[test]
fn one_side_after_the_other() {
    every_case(Order::InTurn, true);
}

#[test]
fn one_side_after_the_other_by_copying() {
    every_case(Order::InTurn, false);
}

#[test]
fn both_sides_at_once() {
    every_case(Order::AtOnce, true);
}

#[test]
fn both_sides_at_once_by_copying() {
    every_case(Order::AtOnce, false);
}

#[test]
fn closing_after_the_last_byte() {
    every_case(Order::CloseAfterSending, true);
}

#[test]
fn resets_in_the_middle_of_a_stream() {
    every_case(Order::Reset, true);
}

#[test]
fn resets_in_the_middle_of_a_stream_by_copying() {
    every_case(Order::Reset, false);
}
