//! The kernel path while its process dies, stops, is replaced by another version or taken down: what goes
//! on, what is taken over, and that nothing stays attached.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use harness::dataplane::until;
use harness::kernel_path::{KERNEL, Node, ask, attached, echo, host, mirror, pins, told};
use harness::netns::ip;
use harness::remote_client::{may_use_bpf, within};
use harness::traffic::{self, Manner};
use nix::sys::signal::Signal;
use shared::desired::PortRow;
use shared::ids::ContainerId;
use shared::observed::{ForwardPath, PortState};

#[test]
fn bulk_goes_on_while_the_process_is_killed_and_replaced() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    const PIECE: u64 = 4 << 20;
    let stream = node.connect(address);
    let mut sender = stream.try_clone().expect("a clone");
    let (go, turn) = std::sync::mpsc::channel::<()>();
    // One piece before each step of the test's and one after the last.
    let sending = thread::spawn(move || {
        let mut offset = 0;
        let mut piece = vec![0; 65536];
        while offset < 4 * PIECE {
            traffic::fill(5, offset, &mut piece);
            sender.write_all(&piece).expect("sent");
            offset += piece.len() as u64;
            if offset.is_multiple_of(PIECE) && offset < 4 * PIECE {
                turn.recv().expect("the test goes on");
            }
        }
        sender.shutdown(Shutdown::Write).expect("ended");
    });
    let mut stream = stream;
    let receiving = thread::spawn(move || traffic::receive(&mut stream, 5, Manner::eager(90_000)));
    for _ in 0..3 {
        // Killed while a piece is under way, as like as not.
        go.send(()).expect("the sender lives");
        node.process.signal(Signal::SIGKILL).expect("killed");
        node.process.ended().expect("gone");
        node.process = node.place.start().expect("bai-dataplane");
        let pid = u64::try_from(node.process.pid().as_raw()).expect("a pid");
        until("the next process speaking", || {
            node.control.observed.snapshot().ok()?;
            let life = node.control.observed.writer().ok()?;
            (life.pid == pid).then_some(())
        })
        .expect("taken over");
    }
    sending.join().expect("all was sent");
    let back = receiving.join().expect("the receiver").expect("whole");
    assert_eq!(back, 4 * PIECE);
}

#[test]
fn flows_and_new_clients_survive_the_death_of_the_process() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let port = node.container.echo().expect("an echo server");
    let row = node.container.port(port);
    node.lift(&row);
    let address = host(&row, 0);
    let mut old = node.flow(address);

    node.process.signal(Signal::SIGKILL).expect("killed");
    node.process.ended().expect("gone");
    old.write_all(b"after").expect("sent");
    let mut back = [0; 5];
    old.read_exact(&mut back).expect("the old flow goes on");
    assert_eq!(&back, b"after");
    let answer = node
        .at_client(move || ask(address, b"new"))
        .expect("a new flow");
    assert_eq!(answer, b"new");

    node.process = node.place.start().expect("bai-dataplane");
    let status = node.counted(&row, |it| it.sessions_total == 2);
    assert_eq!(
        status.path,
        ForwardPath::KernelPath,
        "counted while dead, too"
    );
    old.write_all(b"later").expect("sent");
    old.read_exact(&mut back)
        .expect("taken over by the next process");
    assert_eq!(&back, b"later");
    let answer = node
        .at_client(move || ask(address, b"newer"))
        .expect("a new flow");
    assert_eq!(answer, b"newer");
}

#[test]
fn an_orderly_stop_leaves_the_kernel_path() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    node.process.signal(Signal::SIGTERM).expect("asked to stop");
    assert!(node.process.ended().expect("gone").success());
    let address = host(&row, 0);
    let answer = node
        .at_client(move || ask(address, b"new"))
        .expect("a new flow");
    assert_eq!(answer, b"new");
}

#[test]
fn detach_leaves_nothing_attached() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let answer = node
        .at_client(move || ask(address, b"new"))
        .expect("served");
    assert_eq!(answer, b"new");
    let there = attached(&node);
    assert!(
        there.contains("from_uplink") && there.contains("to_container"),
        "{there}"
    );
    node.kill();
    let output = node.place.command(&["detach"]).expect("detach").output();
    let output = output.expect("detach can be run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("/sys/fs/bpf/bai-agent/"),
        "{text}"
    );
    until("new clients being refused", || {
        let refused = node.at_client(move || TcpStream::connect(address));
        refused.is_err().then_some(())
    })
    .expect("nothing is left");
    let home = text
        .lines()
        .find_map(|line| line.strip_prefix("removed /sys/fs/bpf/"))
        .expect("the pins");
    assert!(!std::path::Path::new("/sys/fs/bpf").join(home).exists());
    // The kernel takes a program off some time after its pin is gone.
    until("nothing being attached", || {
        let left = attached(&node);
        (!left.contains("from_") && !left.contains("to_container")).then_some(())
    })
    .expect("nothing is left");
    // Nor do the hooks go on.
    let port = row.host_port;
    let refused = within(&node.network.host, move || {
        TcpStream::connect(("127.0.0.1", port))
    });
    assert!(refused.expect("the host").is_err());
}

/// What the program of another layout leaves behind is as real here as can be: its directory, by
/// another number.
#[test]
fn an_upgrade_with_another_layout_loses_no_flow() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let (listener, speaker) = within(&node.container.namespace, || {
        let listener = traffic::listener("0.0.0.0:0");
        let port = listener.local_addr().expect("bound").port();
        (listener, port)
    })
    .expect("the container's namespace");
    let mut silent = row.clone();
    silent.host_port = harness::dataplane::free_port();
    silent.target_port = speaker;
    node.lift(&silent);
    // Somebody who only listens.
    let speaking = host(&silent, 0);
    let mut listening = node
        .at_client(move || traffic::connect(speaking))
        .expect("accepted");
    let (mut speaker, _) = listener.accept().expect("the client");
    // Requests of a client elsewhere and of one here, and a stream in bulk.
    let mut asking = node.connect(address);
    let at_host = within(&node.network.host, move || traffic::connect(address));
    let mut own = at_host.expect("the host's namespace").expect("accepted");
    let mut both = |word: &[u8]| {
        let mut back = vec![0; word.len()];
        for stream in [&mut asking, &mut own] {
            stream.write_all(word).expect("sent");
            stream.read_exact(&mut back).expect("echoed");
            assert_eq!(back, word);
        }
    };
    both(b"before");
    let stream = node.connect(address);
    let over = Arc::new(AtomicBool::new(false));
    let (mut sender, sending) = (stream.try_clone().expect("a clone"), Arc::clone(&over));
    let sent = thread::spawn(move || {
        let (mut offset, mut piece) = (0, vec![0; 65_536]);
        while !sending.load(Relaxed) {
            traffic::fill(5, offset, &mut piece);
            sender.write_all(&piece).expect("sent");
            offset += piece.len() as u64;
            // It lasts a while: no faster than that.
            thread::sleep(Duration::from_millis(2));
        }
        sender.shutdown(Shutdown::Write).expect("ended");
        offset
    });
    let mut stream = stream;
    let received = thread::spawn(move || traffic::receive(&mut stream, 5, Manner::eager(90_000)));

    node.kill();
    let now = pins(&node);
    let before = now.with_file_name("v0");
    assert!(now != before && now.join("hook-connect4").exists());
    std::fs::rename(&now, &before).expect("another layout's");
    node.restart();
    let both_attached = || (now.exists() && before.exists()).then_some(());
    until("both being attached", both_attached).expect("not one after the other");
    // The last thing that is done when all rows are lifted.
    let leads = before.join("hook-connect4");
    until("the rows", || (!leads.exists()).then_some(())).expect("lifted");
    // The container speaks first, before its client has said a word to the new programs.
    speaker.write_all(b"word").expect("sent");
    let mut word = [0; 4];
    listening.read_exact(&mut word).expect("heard");
    assert_eq!(&word, b"word");
    both(b"after");
    let made = node.at_client(move || ask(address, b"new"));
    assert_eq!(made.expect("served"), b"new");
    assert!(before.exists(), "until now");
    harness::wait::until_blocking("the other layout's end", Duration::from_secs(120), || {
        (!before.exists()).then_some(())
    })
    .expect("removed");
    speaker.write_all(b"more").expect("sent");
    listening.read_exact(&mut word).expect("heard");
    assert_eq!(&word, b"more");
    both(b"alone");
    assert_eq!(
        node.at_client(move || ask(address, b"new"))
            .expect("served"),
        b"new"
    );
    over.store(true, Relaxed);
    let length = sent.join().expect("all was sent");
    let back = received.join().expect("the receiver").expect("whole");
    assert_eq!(back, length);
}

#[test]
fn without_permission_the_relay_serves_and_says_so() {
    if !may_use_bpf() {
        return;
    }
    // Maps can't be opened; or they can, and programs not be loaded.
    relays_without("-bpf,-sys_admin,-perfmon");
    relays_without("-net_admin,-sys_admin");
}

fn relays_without(capabilities: &str) {
    let mut node = Node::new();
    until("the programs of one that may", || {
        attached(&node).contains("from_uplink").then_some(())
    })
    .expect("attached");
    node.process.signal(Signal::SIGKILL).expect("killed");
    node.process.ended().expect("gone");
    let program = node.place.command(&[]).expect("the command");
    let words = std::iter::once(program.get_program()).chain(program.get_args());
    // Entering the namespace needs permissions, too: the loss comes after it.
    let words: Vec<_> = words.map(|word| word.to_owned()).collect();
    let (enter, run) = words.split_at(2);
    let mut weak = Command::new(&enter[0])
        .arg(&enter[1])
        .arg("setpriv")
        .arg(format!("--bounding-set={capabilities}"))
        .args(run)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("bai-dataplane with less permission");
    let row = node.container.port(mirror(&node.container));
    let status = node.publish(&row);
    let address = host(&row, 0);
    let answer = node.at_client(move || told(address));
    // Nobody would look after what the one before it has left.
    let taken_down = until("the programs being gone", || {
        (!attached(&node).contains("from_uplink")).then_some(())
    });
    let _ = weak.kill();
    let _ = weak.wait();
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    assert!(
        status.reason.contains("by the relay: "),
        "{}",
        status.reason
    );
    taken_down.expect("taken down");
    let (seen, _) = answer.expect("told");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay: {seen}");
}

#[test]
fn a_node_that_goes_back_to_the_relay_takes_its_programs_down() {
    let Some((mut node, row)) = Node::serving(mirror) else {
        return;
    };
    assert!(attached(&node).contains("from_uplink"));
    node.kill();
    node.place
        .reconfigure("forward = \"relay\"")
        .expect("another configuration");
    node.restart();
    node.counted(&row, |it| it.path == ForwardPath::Relay);
    until("the programs being gone", || {
        (!attached(&node).contains("from_uplink")).then_some(())
    })
    .expect("taken down");
    let address = host(&row, 0);
    let (seen, _) = node.at_client(move || told(address)).expect("told");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay: {seen}");
}

#[test]
fn counters_of_both_paths_go_on_over_lives_of_the_process() {
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    let address = host(&row, 0);
    let send = |node: &Node, times: usize, bytes: usize| {
        node.at_client(move || {
            for _ in 0..times {
                assert_eq!(ask(address, &vec![7; bytes]).expect("served").len(), bytes);
            }
        });
    };
    let same = row.clone();
    let counted = |node: &mut Node, sessions: u64, bytes: u64| {
        let status = node.counted(&same, |it| {
            (it.sessions_total, it.bytes_in) == (sessions, bytes) && it.sessions_active == 0
        });
        assert_eq!(status.bytes_out, bytes);
        (status.packets_in, status.packets_out)
    };
    row.honour_firewall = true;
    let status = node.publish(&row);
    assert_eq!(status.path, ForwardPath::Relay);
    send(&node, 5, 1000);
    counted(&mut node, 5, 5000);
    row.honour_firewall = false;
    node.lift(&row);
    send(&node, 2, 10);
    let before = counted(&mut node, 7, 5020);
    assert!(before.0 > 6, "two by the kernel path: {before:?}");
    node.kill();
    send(&node, 4, 1);
    node.restart();
    let after = counted(&mut node, 11, 5024);
    assert!(after.0 > before.0 && after.1 > before.1, "{after:?}");
    node.kill();
    send(&node, 1, 100);
    node.restart();
    counted(&mut node, 12, 5124);
    // And those of a port that leaves the kernel path, whose maps end with that.
    row.honour_firewall = true;
    node.publish(&row);
    send(&node, 1, 100);
    let before = counted(&mut node, 13, 5224);
    node.kill();
    node.restart();
    // The listener is there with the answer.
    node.publish(&row);
    send(&node, 1, 1);
    assert_eq!(counted(&mut node, 14, 5225), before);
}

/// Control's file was lost, and the next one names its kernels one after the other.
#[test]
fn a_region_that_begins_anew_cuts_no_flow_of_a_row_that_it_names_again() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let mut old = node.flow(address);
    let goes_on = |old: &mut TcpStream| {
        old.write_all(b"after").expect("sent");
        let mut back = [0; 5];
        old.read_exact(&mut back).expect("the flow goes on");
        assert_eq!(&back, b"after");
    };
    let file = node.place.run_dir().control().join("desired");
    std::fs::remove_file(file).expect("the region's file");
    let lost = node.control.desired.region_id();
    // Its lock goes with it.
    drop(node.control);
    node.control = node.place.control().expect("another region");
    assert_ne!(node.control.desired.region_id(), lost);

    // Another kernel comes first.
    let stranger = node.network.container(3).expect("another container");
    let another = stranger.row(ContainerId([77; 32]));
    let first = PortRow {
        container_id: another.container_id,
        ..stranger.port(stranger.echo().expect("a server"))
    };
    let write = (another, first.clone());
    let generation = node.control.write(|batch| {
        batch.put_container(write.0);
        batch.put_port(write.1);
    });
    let generation = generation.expect("written");
    node.control
        .answer(first.key(), generation)
        .expect("the region has been taken up");
    goes_on(&mut old);
    let status = node.control.status(row.key()).expect("its status");
    assert_eq!(status.path, ForwardPath::KernelPath, "{status:?}");

    let container = node.container.row(KERNEL);
    node.control
        .write(|batch| batch.put_container(container))
        .expect("written");
    goes_on(&mut old);
    node.lift(&row);
    goes_on(&mut old);
    let status = node.counted(&row, |it| it.sessions_active == 1);
    assert_eq!(status.sessions_total, 1);
    // Gone is gone, whatever region names it.
    let link = node.container.link.clone();
    ip(&format!("-n {} link del {link}", node.network.host)).expect("gone");
    let status = node.control.in_state(row.key(), PortState::Disabled);
    status.expect("noticed");
}
