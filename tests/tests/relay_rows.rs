//! Port rows become ports: what control writes in the desired region is served, changed, drained
//! and removed by another process, and each step is acknowledged.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use harness::dataplane::{Control, Options, Place, Process, address_of, row_to, until};
use harness::traffic::{self, Manner, ask, turned_away};
use nix::sys::signal::Signal;
use shared::desired::{ClientNetwork, Drain, NodeRow, Protocol};
use shared::observed::{ForwardPath, PortState, RelayEngine};

fn place(mut options: Options) -> Place {
    options.node += "\n";
    options.node += harness::relay::setting(module_path!());
    Place::new(options).expect("a place")
}

fn started(options: Options) -> (Place, Process, Control) {
    let place = place(options);
    let control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    (place, process, control)
}

#[test]
fn a_row_is_served_counted_and_removed() {
    let (_place, _process, mut control) = started(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        ..Options::default()
    });
    let echo = traffic::echo_server("127.0.0.1:0");
    let row = row_to(echo);
    let status = control.publish(row.clone()).expect("an answer");
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    assert_eq!(status.kernel_id, row.kernel_id);
    assert_eq!(ask(address_of(&row), b"hello").expect("an echo"), b"hello");
    let counted = until("the counters", || {
        control
            .status(row.key())
            .filter(|status| status.bytes_out == 5)
    })
    .expect("counters");
    assert_eq!((counted.bytes_in, counted.sessions_total), (5, 1));
    assert!(counted.tick > 0);
    control.withdraw(row.key()).expect("removal");
    assert!(turned_away(address_of(&row)), "no row, no listener");
    until("the row being forgotten", || {
        control.status(row.key()).is_none().then_some(())
    })
    .expect("the status row is given back");
}

#[test]
fn no_row_means_no_listener() {
    let (_place, process, mut control) = started(Options::default());
    let echo = traffic::echo_server("127.0.0.1:0");
    let row = row_to(echo);
    control.publish(row.clone()).expect("an answer");
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/tcp", process.pid())).expect("tcp");
    let inodes: Vec<String> = std::fs::read_dir(format!("/proc/{}/fd", process.pid()))
        .expect("descriptors")
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|link| {
            let text = link.to_string_lossy().into_owned();
            Some(text.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let listening: Vec<&str> = sockets
        .lines()
        .filter(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(3) == Some(&"0A")
                && fields
                    .get(9)
                    .is_some_and(|inode| inodes.iter().any(|own| own == inode))
        })
        .collect();
    assert_eq!(listening.len(), 1, "one row, one listener: {listening:?}");
    assert!(listening[0].contains(&format!("0100007F:{:04X}", row.host_port)));
}

#[test]
fn rows_that_can_not_be_served_are_refused_with_words_and_tried_again() {
    let (_place, _process, mut control) = started(Options::default());
    let echo = traffic::echo_server("127.0.0.1:0");
    let mut row = row_to(echo);
    let squatter = TcpListener::bind(address_of(&row)).expect("the port is free");
    let status = control.publish(row.clone()).expect("an answer");
    assert_eq!(status.state, PortState::Refused);
    assert!(status.reason.contains("in use"), "{}", status.reason);
    drop(squatter);
    control
        .in_state(row.key(), PortState::Serving)
        .expect("served once the port is free");
    assert_eq!(ask(address_of(&row), b"x").expect("an echo"), b"x");

    row.protocol = Protocol::Udp;
    let status = control.publish(row.clone()).expect("an answer");
    assert_eq!(
        (status.state, status.path, status.engine),
        (PortState::Serving, ForwardPath::Relay, RelayEngine::Copy),
        "the number of one protocol is free for the other"
    );

    let mut foreign = row_to(echo);
    foreign.bind = "192.0.2.77".parse().expect("an address");
    let status = control.publish(foreign).expect("an answer");
    assert_eq!(status.state, PortState::Refused);
    assert!(status.reason.contains("192.0.2.77"), "{}", status.reason);

    let mut observed = row_to(echo);
    observed.observe_only = true;
    let status = control.publish(observed.clone()).expect("an answer");
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Engine)
    );
    assert!(
        turned_away(address_of(&observed)),
        "the engine's port is not ours to serve"
    );
}

#[test]
fn rules_change_under_running_sessions_and_routes_do_not() {
    let (_place, _process, mut control) = started(Options::default());
    let first = traffic::echo_server("127.0.0.1:0");
    let mut row = row_to(first);
    control.publish(row.clone()).expect("an answer");
    let mut session = traffic::connect(address_of(&row)).expect("accepted");
    session.write_all(b"a").expect("sent");
    session.read_exact(&mut [0]).expect("echoed");

    row.max_sessions = 1;
    control.publish(row.clone()).expect("an answer");
    assert!(turned_away(address_of(&row)), "the limit holds at once");
    session.write_all(b"b").expect("sent");
    session.read_exact(&mut [0]).expect("the session goes on");

    row.max_sessions = 0;
    row.networks = vec![ClientNetwork {
        address: "10.0.0.0".parse().expect("an address"),
        prefix: 8,
    }];
    control.publish(row.clone()).expect("an answer");
    assert!(
        turned_away(address_of(&row)),
        "127.0.0.1 is not in 10.0.0.0/8"
    );
    let cut = session
        .read(&mut [0])
        .expect_err("nor is a session of its left");
    assert_eq!(cut.kind(), ErrorKind::ConnectionReset);

    row.networks.clear();
    control.publish(row.clone()).expect("an answer");
    let mut session = traffic::connect(address_of(&row)).expect("accepted");
    session.write_all(b"c").expect("sent");
    session.read_exact(&mut [0]).expect("echoed");
    row.networks.push(ClientNetwork {
        address: "127.0.0.0".parse().expect("an address"),
        prefix: 8,
    });
    control.publish(row.clone()).expect("an answer");
    session.write_all(b"d").expect("sent");
    session.read_exact(&mut [0]).expect("it is let in");
    row.networks.clear();
    let second = TcpListener::bind("127.0.0.1:0").expect("a server");
    row.target_port = second.local_addr().expect("bound").port();
    control.publish(row.clone()).expect("an answer");
    let cut = session
        .read(&mut [0])
        .expect_err("a session of the old route is cut");
    assert_eq!(cut.kind(), ErrorKind::ConnectionReset);
    let _client = traffic::connect(address_of(&row)).expect("accepted");
    second.accept().expect("new sessions take the new route");
}

#[test]
fn a_removed_port_drains_then_cuts() {
    let (_place, _process, mut control) = started(Options::default());
    let echo = traffic::echo_server("127.0.0.1:0");
    let mut row = row_to(echo);
    row.drain = Drain::Within { ms: 60_000 };
    control.publish(row.clone()).expect("an answer");
    let mut session = traffic::connect(address_of(&row)).expect("accepted");
    session.write_all(b"a").expect("sent");
    session.read_exact(&mut [0]).expect("echoed");
    let generation = control
        .write(|batch| batch.remove_port(row.key()))
        .expect("written");
    let status = control.answer(row.key(), generation).expect("an answer");
    assert_eq!(status.state, PortState::Draining);
    assert!(
        turned_away(address_of(&row)),
        "no new sessions while draining"
    );
    session.write_all(b"b").expect("sent");
    session.read_exact(&mut [0]).expect("the session goes on");
    drop(session);
    control
        .in_state(row.key(), PortState::Removed)
        .expect("drained");

    let mut row = row_to(echo);
    row.drain = Drain::Within { ms: 300 };
    control.publish(row.clone()).expect("an answer");
    let mut session = traffic::connect(address_of(&row)).expect("accepted");
    session.write_all(b"a").expect("sent");
    session.read_exact(&mut [0]).expect("echoed");
    control
        .write(|batch| batch.remove_port(row.key()))
        .expect("written");
    control
        .in_state(row.key(), PortState::Removed)
        .expect("cut in the end");
    let cut = session.read(&mut [0]).expect_err("reset after the drain");
    assert_eq!(cut.kind(), ErrorKind::ConnectionReset);
}

#[test]
fn killing_control_leaves_transfers_whole_and_a_new_control_is_answered() {
    let place = place(Options::default());
    let _process = place.start().expect("bai-dataplane");
    let server = traffic::listener("127.0.0.1:0");
    let row = row_to(server.local_addr().expect("bound"));
    let mut doomed = Command::new(env!("CARGO_BIN_EXE_row-publisher"))
        .arg(place.run_dir().control())
        .arg(place.run_dir().dataplane())
        .args([row.host_port.to_string(), row_target(&row).to_string()])
        .spawn()
        .expect("a control");
    let mut client = until("the row being served", || {
        traffic::connect(address_of(&row)).ok()
    })
    .expect("served");
    let (mut accepted, _) = server.accept().expect("connected");
    traffic::patient(&accepted).expect("deadlines");
    let length = 60 * 1024 * 1024;
    let sender = thread::spawn(move || {
        traffic::send(&mut client, 1, length, Manner::eager(200_000)).expect("sent");
        client.shutdown(Shutdown::Write).expect("half-close");
    });
    // Killed in the middle: the first bytes have arrived, the last can't have.
    let mut first = [0];
    accepted.peek(&mut first).expect("the transfer has begun");
    doomed.kill().expect("SIGKILL");
    doomed.wait().expect("its end");
    assert_eq!(
        traffic::receive(&mut accepted, 1, Manner::eager(100_000)),
        Ok(length)
    );
    sender.join().expect("the sender");

    let mut control = place.control().expect("the region is taken over");
    let snapshot = control.desired.snapshot().expect("its rows");
    assert_eq!(snapshot.ports.len(), 1, "the region outlives its writer");
    let status = control
        .publish(row_to(row_target(&row)))
        .expect("an answer");
    assert_eq!(status.state, PortState::Serving);
    assert_eq!(
        control.status(row.key()).map(|status| status.state),
        Some(PortState::Serving),
        "what the dead control wanted is still served"
    );
    traffic::connect(address_of(&row)).expect("still served");
}

#[test]
fn hundreds_of_rows_come_and_go_in_one_batch_each() {
    let (_place, mut process, mut control) = started(Options::default());
    let echo = traffic::echo_server("127.0.0.1:0");
    let rows: Vec<_> = (0..300).map(|_| row_to(echo)).collect();
    let mut keys: Vec<_> = rows.iter().map(shared::desired::PortRow::key).collect();
    keys.sort_unstable();
    keys.dedup();
    let generation = control
        .write(|batch| rows.iter().for_each(|row| batch.put_port(row.clone())))
        .expect("written");
    for key in &keys {
        let status = control.answer(*key, generation).expect("an answer");
        assert_eq!(status.state, PortState::Serving, "{key}: {}", status.reason);
    }
    for row in rows.iter().step_by(37) {
        assert_eq!(ask(address_of(row), b"n").expect("an echo"), b"n");
    }
    control
        .write(|batch| keys.iter().for_each(|key| batch.remove_port(*key)))
        .expect("written");
    for key in &keys {
        control.in_state(*key, PortState::Removed).expect("removed");
    }
    assert_eq!(control.release(), keys.len(), "all rows can be used again");
    let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid()))
        .expect("descriptors")
        .count();
    assert!(open < 100, "{open} descriptors are left open");
    assert!(process.running());
}

fn row_target(row: &shared::desired::PortRow) -> SocketAddr {
    SocketAddr::new(row.target, row.target_port)
}

#[test]
fn a_desired_region_that_vanishes_or_is_damaged_changes_nothing() {
    let (place, _process, mut control) = started(Options::default());
    let echo = traffic::echo_server("127.0.0.1:0");
    let row = row_to(echo);
    control.publish(row.clone()).expect("an answer");
    let file = place.run_dir().control().join("desired");
    let moved = place.run_dir().control().join("elsewhere");
    std::fs::rename(&file, &moved).expect("the region file");
    std::fs::write(&file, vec![0xa5; 10_000]).expect("garbage in its place");
    // Two slow ticks pass; what is asked in them still works.
    let begin = std::time::Instant::now();
    while begin.elapsed() < Duration::from_millis(2500) {
        assert_eq!(ask(address_of(&row), b"y").expect("an echo"), b"y");
        thread::sleep(Duration::from_millis(100));
    }
    std::fs::rename(&moved, &file).expect("the region file back");
    let other = row_to(echo);
    let status = control.publish(other).expect("an answer after the repair");
    assert_eq!(status.state, PortState::Serving);
}

#[test]
fn a_restarted_dataplane_takes_up_the_rows_and_acknowledges_them_again() {
    let (place, process, mut control) = started(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        ..Options::default()
    });
    let echo = traffic::echo_server("127.0.0.1:0");
    let (kept, gone) = (row_to(echo), row_to(echo));
    control.publish(kept.clone()).expect("an answer");
    control.publish(gone.clone()).expect("an answer");
    assert_eq!(
        ask(address_of(&kept), b"counted").expect("an echo"),
        b"counted"
    );
    ask(address_of(&gone), b"gone").expect("an echo");
    for (row, bytes) in [(&kept, 7), (&gone, 4)] {
        until("the counters", || {
            let status = control.status(row.key())?;
            (status.bytes_out == bytes).then_some(())
        })
        .expect("counted");
    }
    let epoch = control.observed.snapshot().expect("observed").epoch;
    process.signal(Signal::SIGKILL).expect("killed");
    drop(process);
    control
        .write(|batch| batch.remove_port(gone.key()))
        .expect("written");
    let _process = place.start().expect("bai-dataplane again");
    let status = control
        .in_state(gone.key(), PortState::Removed)
        .expect("the removal is acknowledged");
    assert_eq!((status.bytes_out, status.sessions_total), (4, 1));
    until("the row being served again", || {
        ask(address_of(&kept), b"z").ok()
    })
    .expect("an echo");
    let observed = control.observed.snapshot().expect("observed");
    assert!(observed.epoch > epoch, "another life of the writer");
    assert!(turned_away(address_of(&gone)));
    let status = until("the counters going on", || {
        let status = control.status(kept.key())?;
        (status.bytes_out >= 8).then_some(status)
    })
    .expect("counted on");
    // The waiting above may have asked more than once, and each time a byte.
    assert_eq!(status.bytes_in, status.bytes_out);
    assert!(status.sessions_total >= 2);
    // Whatever else is asked for, the last counts stay until control has taken note of them.
    control.publish(row_to(echo)).expect("an answer");
    let status = control.status(gone.key()).expect("still told");
    assert_eq!((status.state, status.bytes_out), (PortState::Removed, 4));
    control.release();
    let status = control.publish(gone).expect("an answer");
    assert_eq!(
        (status.state, status.bytes_out),
        (PortState::Serving, 0),
        "it begins anew"
    );
}

#[test]
fn a_port_removed_in_an_earlier_life_begins_anew() {
    let (place, process, mut control) = started(Options {
        dataplane: "stats-interval = 0.1".to_owned(),
        ..Options::default()
    });
    let row = row_to(traffic::echo_server("127.0.0.1:0"));
    control.publish(row.clone()).expect("an answer");
    ask(address_of(&row), b"once").expect("an echo");
    control
        .write(|batch| batch.remove_port(row.key()))
        .expect("written");
    let status = control
        .in_state(row.key(), PortState::Removed)
        .expect("acknowledged");
    assert_eq!(status.bytes_out, 4);
    process.signal(Signal::SIGKILL).expect("killed");
    drop(process);
    control.release();
    let generation = control
        .write(|batch| batch.put_port(row.clone()))
        .expect("written");
    let _process = place.start().expect("bai-dataplane again");
    let status = control.answer(row.key(), generation).expect("an answer");
    assert_eq!((status.state, status.bytes_out), (PortState::Serving, 0));
}

#[test]
fn a_second_dataplane_names_the_first_and_exits() {
    let (place, process, mut control) = started(Options::default());
    let echo = traffic::echo_server("127.0.0.1:0");
    control.publish(row_to(echo)).expect("an answer");
    let output = place
        .command(&[])
        .expect("a command")
        .output()
        .expect("run");
    assert!(!output.status.success());
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(words.contains(&process.pid().to_string()), "{words}");
    let output = place
        .command(&["detach"])
        .expect("a command")
        .output()
        .expect("run");
    assert!(
        !output.status.success(),
        "nothing is detached under a running dataplane"
    );
}

#[test]
fn sigterm_drains_and_sigint_does_not_wait() {
    let (place, mut process, mut control) = started(Options::default());
    control
        .write(|batch| {
            batch.set_node(NodeRow {
                drain_ms: 60_000,
                ..NodeRow::default()
            });
        })
        .expect("written");
    let echo = traffic::echo_server("127.0.0.1:0");
    let row = row_to(echo);
    control.publish(row.clone()).expect("an answer");
    let mut session = traffic::connect(address_of(&row)).expect("accepted");
    session.write_all(b"a").expect("sent");
    session.read_exact(&mut [0]).expect("echoed");
    // As when a terminal is closed: what runs goes on.
    process.signal(Signal::SIGHUP).expect("signalled");
    until("the answer to SIGHUP", || {
        let told = process
            .log()
            .contains("the configuration is read at start only");
        (told || !process.running()).then_some(())
    })
    .expect("told");
    assert!(process.running(), "{}", process.log());
    session.write_all(b"h").expect("sent");
    session.read_exact(&mut [0]).expect("the session goes on");
    process.signal(Signal::SIGTERM).expect("signalled");
    control
        .in_state(row.key(), PortState::Pending)
        .expect("not served any more");
    assert!(turned_away(address_of(&row)));
    session.write_all(b"b").expect("sent");
    session.read_exact(&mut [0]).expect("the session goes on");
    assert!(process.running());
    drop(session);
    assert!(process.ended().expect("its end").success());

    let mut process = place.start().expect("bai-dataplane again");
    control
        .in_state(row.key(), PortState::Serving)
        .expect("served again");
    let mut session = traffic::connect(address_of(&row)).expect("accepted");
    session.write_all(b"a").expect("sent");
    session.read_exact(&mut [0]).expect("echoed");
    process.signal(Signal::SIGINT).expect("signalled");
    assert!(process.ended().expect("its end").success());
    let cut = session.read(&mut [0]).expect_err("reset");
    assert_eq!(cut.kind(), ErrorKind::ConnectionReset);

    let output = place
        .command(&["detach"])
        .expect("a command")
        .output()
        .expect("run");
    assert!(output.status.success(), "{output:?}");
    assert!(!place.run_dir().dataplane().exists(), "nothing is left");
}

/// As when the terminal or the pipe that took it is gone, or its disk is full.
#[test]
fn a_log_that_can_not_be_written_ends_nothing() {
    let (_place, mut process, mut control) = started(Options {
        by: ["sh", "-c", "exec \"$0\" \"$@\" 2>/dev/full"]
            .map(str::to_owned)
            .to_vec(),
        ..Options::default()
    });
    let echo = traffic::echo_server("127.0.0.1:0");
    for _ in 0..2 {
        let row = row_to(echo);
        control.publish(row.clone()).expect("an answer");
        let mut session = traffic::connect(address_of(&row)).expect("accepted");
        session.write_all(b"a").expect("sent");
        session.read_exact(&mut [0]).expect("echoed");
        process.signal(Signal::SIGHUP).expect("signalled");
    }
    assert!(process.running());
}

/// docker-proxy stops for good when its descriptors are used up; this must not.
#[test]
fn running_out_of_descriptors_sheds_clients_and_serving_goes_on() {
    let (_place, mut process, mut control) = started(Options {
        descriptors: Some(115),
        node: "forward = \"auto\"".to_owned(),
        dataplane: "stats-interval = 0.1".to_owned(),
        ..Options::default()
    });
    let echo = traffic::echo_server("127.0.0.1:0");
    let row = row_to(echo);
    control.publish(row.clone()).expect("an answer");
    let mut kept: Vec<TcpStream> = Vec::new();
    let mut shed = 0;
    for _ in 0..200 {
        let answered = traffic::connect(address_of(&row)).and_then(|mut stream| {
            stream.write_all(b"q")?;
            stream.read_exact(&mut [0])?;
            Ok(stream)
        });
        match answered {
            Ok(stream) => kept.push(stream),
            Err(_) => shed += 1,
        }
    }
    assert!(
        kept.len() >= 16 && shed > 100,
        "{} kept, {shed} shed",
        kept.len()
    );
    for stream in &mut kept {
        stream.write_all(b"r").expect("sent");
        stream.read_exact(&mut [0]).expect("sessions are not hurt");
    }
    kept.clear();
    until("new sessions", || {
        ask(address_of(&row), b"again")
            .ok()
            .filter(|back| back == b"again")
    })
    .expect("served again");
    let status = until("the count", || {
        control
            .status(row.key())
            .filter(|status| status.sessions_refused >= shed)
    })
    .expect("refusals are counted");
    assert_eq!(status.state, PortState::Serving);
    assert!(process.running());
}
