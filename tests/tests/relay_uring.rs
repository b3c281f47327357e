//! The relay's suites once more, with the engine on io_uring, and what only that engine has: the ring
//! itself, the ways on it and off it, and what happens where there is none.

#[path = "first_light.rs"]
mod first_light;
#[path = "relay_close_order.rs"]
mod relay_close_order;
#[path = "relay_endings.rs"]
mod relay_endings;
#[path = "relay_integrity.rs"]
mod relay_integrity;
#[path = "relay_link_guard.rs"]
mod relay_link_guard;
#[path = "relay_rows.rs"]
mod relay_rows;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use dataplane::forward::relay::port::{Port, Rules};
use dataplane::forward::relay::worker::SessionCounts;
use dataplane::forward::relay::{Engine, Relay};
use harness::dataplane::{Options, Place, address_of, row_to, until};
use harness::traffic::{self, Manner};
use shared::desired::Protocol;
use shared::observed::RelayEngine;

const MIB: u64 = 1024 * 1024;

struct Site {
    relay: Relay,
    port: Arc<Port>,
    server: TcpListener,
}

/// A relay on io_uring; `None` where there is none, which `what_can_not_be_had` is about.
fn site(rules: Rules) -> Option<Site> {
    let relay = harness::relay::start(module_path!());
    if !harness::relay::has_uring() {
        return None;
    }
    assert_eq!(relay.engine(), Engine::Uring);
    let server = traffic::listener("127.0.0.1:0");
    let target = server.local_addr().expect("bound");
    let bind = "127.0.0.1:0".parse().expect("an address");
    let port = relay.open(bind, target, rules).expect("a port");
    Some(Site {
        relay,
        port,
        server,
    })
}

impl Site {
    fn pair(&self) -> (TcpStream, TcpStream) {
        let client = traffic::connect(self.port.bind()).expect("the relay accepts");
        let (accepted, _) = self.server.accept().expect("the relay connects");
        traffic::patient(&accepted).expect("deadlines");
        (client, accepted)
    }

    fn session_counts(&self, what: &str, wanted: impl Fn(&SessionCounts) -> bool) {
        let mut last = SessionCounts::default();
        until(what, || {
            last = self.relay.session_counts();
            wanted(&last).then_some(())
        })
        .unwrap_or_else(|err| panic!("{err}: {last:?}"));
    }
}

fn exchange(client: &mut TcpStream, accepted: &mut TcpStream, word: &[u8]) {
    let mut got = vec![0; word.len()];
    client.write_all(word).expect("sent");
    accepted.read_exact(&mut got).expect("arrives");
    assert_eq!(got, word);
    accepted.write_all(word).expect("sent");
    client.read_exact(&mut got).expect("arrives");
    assert_eq!(got, word);
}

#[test]
fn messages_stay_on_the_ring_bulk_leaves_it_and_comes_back() {
    let Some(site) = site(Rules::default()) else {
        return;
    };
    let (mut client, mut accepted) = site.pair();
    for length in [1, 64, 8191, 8192, 8193, 20_000] {
        exchange(&mut client, &mut accepted, &vec![7; length]);
    }
    site.session_counts("a session on the ring", |it| {
        (it.sessions, it.on_ring) == (1, 1)
    });
    thread::scope(|scope| {
        let mut writer = client.try_clone().expect("a second handle");
        scope.spawn(move || {
            traffic::send(&mut writer, 9, 8 * MIB, Manner::eager(300_000)).expect("sent");
            writer.shutdown(Shutdown::Write).expect("half-close");
        });
        let got = traffic::receive(&mut accepted, 9, Manner::eager(100_000));
        assert_eq!(got, Ok(8 * MIB));
    });
    site.session_counts("a session off the ring", |it| {
        (it.sessions, it.on_ring) == (1, 0)
    });
    drop((client, accepted));
    site.session_counts("none", |it| it.sessions == 0);

    // The same without an end: it is one of messages again.
    let (mut client, mut accepted) = site.pair();
    let bulk = vec![5; 2_000_000];
    thread::scope(|scope| {
        let mut writer = client.try_clone().expect("a second handle");
        scope.spawn(move || writer.write_all(&bulk).expect("sent"));
        let mut got = vec![0; 2_000_000];
        accepted.read_exact(&mut got).expect("arrives");
        assert!(got.iter().all(|byte| *byte == 5));
    });
    site.session_counts("a session off the ring", |it| {
        (it.sessions, it.on_ring) == (1, 0)
    });
    for _ in 0..200 {
        exchange(&mut client, &mut accepted, b"a message");
    }
    site.session_counts("a session on the ring", |it| {
        (it.sessions, it.on_ring) == (1, 1)
    });
    exchange(&mut client, &mut accepted, b"and another");
}

/// Those who do not read would hold all buffers of a ring that keeps what it has received.
#[test]
fn hundreds_who_do_not_read_leave_buffers_for_the_others() {
    let Some(site) = site(Rules::default()) else {
        return;
    };
    let deaf: Vec<_> = (0..400).map(|_| site.pair()).collect();
    for (client, _) in &deaf {
        let mut client = client.try_clone().expect("a second handle");
        client.set_nonblocking(true).expect("non-blocking");
        while client.write(&[1; 65_536]).is_ok() {}
    }
    site.session_counts("all of them off the ring", |it| {
        (it.sessions, it.on_ring) == (400, 0)
    });
    let (mut client, mut accepted) = site.pair();
    for _ in 0..100 {
        exchange(&mut client, &mut accepted, &[3; 5000]);
    }
    site.session_counts("the other on it", |it| {
        (it.sessions, it.on_ring) == (401, 1)
    });
    drop(deaf);
    exchange(&mut client, &mut accepted, b"still here");
}

#[test]
fn what_arrives_before_the_container_answers_is_not_lost() {
    let Some(site) = site(Rules::default()) else {
        return;
    };
    // Everything is sent before the connection to the container is looked at.
    for size in [1, 5000, 70_000, 3 * MIB] {
        let mut client = traffic::connect(site.port.bind()).expect("accepted");
        let writer = thread::spawn(move || {
            traffic::send(&mut client, 4, size, Manner::eager(80_000)).expect("sent");
        });
        let (mut accepted, _) = site.server.accept().expect("connected");
        traffic::patient(&accepted).expect("deadlines");
        let got = traffic::receive(&mut accepted, 4, Manner::eager(64_000));
        assert_eq!(got, Ok(size));
        writer.join().expect("the writer");
    }
    site.session_counts("none", |it| it.sessions == 0);
    assert_eq!(site.port.active(), 0);
}

#[test]
fn a_silent_session_on_the_ring_is_ended_in_time() {
    let rules = Rules {
        idle_timeout: Some(Duration::from_secs(4)),
        ..Rules::default()
    };
    let Some(site) = site(rules) else {
        return;
    };
    let (mut client, mut accepted) = site.pair();
    exchange(&mut client, &mut accepted, b"hello");
    site.session_counts("a session on the ring", |it| it.on_ring == 1);
    for stream in [&mut client, &mut accepted] {
        let end = stream.read(&mut [0]).expect_err("a reset");
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    }
    assert_eq!(site.port.counters().idle_timeouts, 1);
}

#[test]
fn a_relay_that_ends_takes_its_requests_back() {
    let Some(first) = site(Rules::default()) else {
        return;
    };
    let pairs: Vec<_> = (0..50).map(|_| first.pair()).collect();
    first.session_counts("all on the ring", |it| it.on_ring == 50);
    let port = Arc::clone(&first.port);
    let Site { relay, .. } = first;
    drop(relay);
    assert_eq!(port.active(), 0);
    for (mut client, _) in pairs {
        let end = client.read(&mut [0]).expect_err("a reset");
        assert_eq!(end.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

/// Refuses `io_uring_setup` (425 on all machines) like a container's seccomp profile does.
const DENY: &str = "
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
rules = b''.join(struct.pack('HBBI', *rule) for rule in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)])
buffer = ctypes.create_string_buffer(rules, len(rules))
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('rules', ctypes.c_void_p)]
program = Program(len(rules) // 8, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[1], sys.argv[1:])
";

#[test]
fn what_can_not_be_had_is_done_without_and_said_with_every_port() {
    let place = Place::new(Options {
        node: harness::relay::setting_alone(module_path!()),
        by: ["python3", "-c", DENY].map(str::to_owned).to_vec(),
        ..Options::default()
    })
    .expect("a place");
    let mut control = place.control().expect("the desired region");
    let _process = place.start().expect("bai-dataplane");
    let echo = traffic::echo_server("127.0.0.1:0");
    let mut row = row_to(echo);
    let status = control.publish(row.clone()).expect("an answer");
    assert_eq!(status.engine, RelayEngine::Splice);
    assert!(
        status.reason.contains("io_uring is not permitted"),
        "{}",
        status.reason
    );
    let mut client = traffic::connect(address_of(&row)).expect("accepted");
    client.write_all(b"hello").expect("sent");
    client.read_exact(&mut [0; 5]).expect("an echo");
    row.protocol = Protocol::Udp;
    let status = control.publish(row).expect("an answer");
    assert_eq!(
        (status.engine, status.reason.as_str()),
        (RelayEngine::Copy, "")
    );
}

#[test]
fn the_engine_is_told_with_every_port() {
    if site(Rules::default()).is_none() {
        return;
    }
    let place = Place::new(Options {
        node: harness::relay::setting_alone(module_path!()),
        ..Options::default()
    })
    .expect("a place");
    let mut control = place.control().expect("the desired region");
    let _process = place.start().expect("bai-dataplane");
    let row = row_to(traffic::echo_server("127.0.0.1:0"));
    let status = control.publish(row).expect("an answer");
    assert_eq!(
        (status.engine, status.reason.as_str()),
        (RelayEngine::Uring, "")
    );
}
