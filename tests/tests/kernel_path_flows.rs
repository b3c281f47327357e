//! Clients of another host reach containers through the kernel alone: bytes are whole, addresses
//! kept, and what is not ours is left alone.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use harness::dataplane::until;
use harness::kernel_path::{KERNEL, Node, ask, echo, host, mirror, told};
use harness::netns::{ip, offload_nothing};
use harness::remote_client::{CLIENT, HOST, command, may_use_bpf, within};
use harness::traffic::{self, Manner};
use nix::sys::signal::Signal;
use shared::desired::{ClientNetwork, ContainerRow, Drain, PortRow, Protocol};
use shared::observed::{ForwardPath, PortState};

const LENGTH: u64 = 24 << 20;

/// Bytes the relay has not seen: it has no session while the kernel path has traffic.
fn integrity(family: usize) {
    integrity_of(Node::new, family, 0);
}

/// `segments` is how many there are each way at least.
fn integrity_of(node: impl FnOnce() -> Node, family: usize, segments: u64) {
    if !may_use_bpf() {
        return;
    }
    let mut node = node();
    let port = node.container.echo().expect("an echo server");
    let mut row = node.container.port(port);
    row.target = node.container.address[family];
    if family == 1 {
        row.bind = "::".parse().expect("an address");
    }
    node.lift(&row);
    let address = host(&row, family);
    let back = node.at_client(move || {
        let stream = traffic::connect(address).expect("accepted");
        let mut sender = stream.try_clone().expect("a clone");
        let sending = thread::spawn(move || {
            traffic::send(&mut sender, 7, LENGTH, Manner::eager(100_000)).expect("sent");
            sender.shutdown(Shutdown::Write).expect("ended");
        });
        let mut stream = stream;
        let back = traffic::receive(&mut stream, 7, Manner::eager(70_000)).expect("whole");
        sending.join().expect("the sender");
        back
    });
    assert_eq!(back, LENGTH);
    let status = node.counted(&row, |it| it.bytes_out >= LENGTH && it.sessions_active == 0);
    assert_eq!(status.path, ForwardPath::KernelPath);
    assert_eq!(
        status.sessions_total, 1,
        "one flow, no session of the relay"
    );
    assert!(status.bytes_in >= LENGTH, "{status:?}");
    assert!(
        status.packets_in >= segments && status.packets_out >= segments,
        "{status:?}"
    );
}

/// Interfaces between namespaces hand over segments of 64 KiB whose sums nobody has made. Other hardware sends
/// what goes over the wire, with its sums, which the programs must keep right.
fn without_offloads() -> Node {
    let node = Node::new();
    let network = &node.network;
    for (namespace, link) in [
        (&network.client, "eth0"),
        (&network.host, "up0"),
        (&network.host, &node.container.link),
        (&node.container.namespace, "eth0"),
    ] {
        offload_nothing(namespace, link).expect("an interface without offloads");
    }
    node
}

#[test]
fn bytes_are_whole_where_interfaces_offload_nothing() {
    integrity_of(without_offloads, 0, LENGTH / 1500);
}

#[test]
fn bytes_are_whole_where_interfaces_offload_nothing_over_ipv6() {
    integrity_of(without_offloads, 1, LENGTH / 1500);
}

#[test]
fn bytes_are_whole_both_ways() {
    integrity(0);
}

#[test]
fn bytes_are_whole_both_ways_over_ipv6() {
    integrity(1);
}

/// The proof that it was not the relay, too.
fn sees_the_client(family: usize) {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(mirror(&node.container));
    row.target = node.container.address[family];
    if family == 1 {
        row.bind = "::".parse().expect("an address");
    }
    node.lift(&row);
    let address = host(&row, family);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string());
    assert_eq!(
        own.ip(),
        CLIENT[family].parse::<IpAddr>().expect("an address")
    );
}

#[test]
fn the_container_sees_the_client() {
    sees_the_client(0);
}

#[test]
fn the_container_sees_the_client_over_ipv6() {
    sees_the_client(1);
}

#[test]
fn the_listener_serves_whom_the_kernel_path_does_not() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let other = node.network.container(3).expect("another container");
    let mut row = node.container.port(mirror(&node.container));
    row.bind = "::".parse().expect("an address");
    node.lift(&row);
    let port = row.host_port;
    // A client in a container, and an IPv6 one of an IPv4 container.
    let bridge: SocketAddr = ([10, 78, 2, 1], port).into();
    let there = within(&other.namespace, move || told(bridge));
    let (seen, _) = there.expect("the container's namespace").expect("told");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay: {seen}");
    let address = host(&row, 1);
    let (seen, _) = node.at_client(move || told(address)).expect("told");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay: {seen}");
    let address = host(&row, 0);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string(), "by the kernel");
}

/// The container's network could not answer it.
#[test]
fn a_client_with_a_links_address_alone_is_the_listeners() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(mirror(&node.container));
    row.target = node.container.address[1];
    row.bind = "::".parse().expect("an address");
    node.lift(&row);
    let client = node.network.client.clone();
    for words in [
        format!("addr del {}/64 dev eth0", CLIENT[1]),
        format!("-6 route add {}/128 dev eth0", HOST[1]),
    ] {
        ip(&format!("-n {client} {words}")).expect("done");
    }
    let address = host(&row, 1);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert!(own.to_string().starts_with("[fe80:"), "{own}");
    assert_ne!(seen, own.to_string(), "by the relay");
}

#[test]
fn transit_and_other_addresses_are_left_alone() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let other = node.network.container(3).expect("another container");
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    let port = row.host_port;
    // The same port number at another machine behind this host.
    let elsewhere = within(&other.namespace, move || {
        let listener = TcpListener::bind(("0.0.0.0", port)).expect("its port is its own");
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write_all(b"elsewhere");
            }
        });
    });
    elsewhere.expect("a server");
    let transit = SocketAddr::new(other.address[0], port);
    let (seen, _) = node.at_client(move || told(transit)).expect("told");
    assert_eq!(seen, "elsewhere");

    // A row for one address of the host does not take another's port.
    ip(&format!(
        "-n {} addr add 10.78.1.9/24 dev up0",
        node.network.host
    ))
    .expect("an address");
    let mut narrow = node.container.port(row.target_port);
    narrow.bind = HOST[0].parse().expect("an address");
    node.lift(&narrow);
    let address = host(&narrow, 0);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string());
    let wrong: SocketAddr = ([10, 78, 1, 9], narrow.host_port).into();
    let refused = node.at_client(move || TcpStream::connect(wrong));
    let err = refused.expect_err("nobody listens there");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionRefused);
    // A row for all addresses takes the new one as soon as the kernel says it is there.
    let new: SocketAddr = ([10, 78, 1, 9], port).into();
    until("the new address being served", || {
        let (seen, own) = node.at_client(move || told(new)).ok()?;
        (seen == own.to_string()).then_some(())
    })
    .expect("address changes are followed");
}

#[test]
fn a_removed_row_refuses_new_flows_at_once_and_cuts_the_old() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let mut old = node.flow(address);
    node.control.withdraw(row.key()).expect("removed");
    let err = node.at_client(move || TcpStream::connect(address));
    let kind = err.expect_err("no new flow").kind();
    assert_eq!(kind, std::io::ErrorKind::ConnectionRefused);
    // The host's own stack answers what comes now: nobody has that connection.
    let _ = old.write_all(b"x");
    let err = old.read(&mut [0]).expect_err("cut");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_draining_row_refuses_new_flows_and_lets_the_old_finish() {
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    row.drain = Drain::Within { ms: 60_000 };
    node.lift(&row);
    let address = host(&row, 0);
    let mut old = node.flow(address);
    let key = row.key();
    node.control
        .write(|batch| batch.remove_port(key))
        .expect("asked");
    node.control
        .in_state(key, PortState::Draining)
        .map(|status| assert_eq!(status.path, ForwardPath::KernelPath))
        .expect("draining");
    let err = node.at_client(move || TcpStream::connect(address));
    let kind = err.expect_err("no new flow").kind();
    assert_eq!(kind, std::io::ErrorKind::ConnectionRefused);
    old.write_all(b"goes on").expect("sent");
    let mut back = [0; 7];
    old.read_exact(&mut back).expect("echoed");
    assert_eq!(&back, b"goes on");
    drop(old);
    let status = node
        .control
        .in_state(key, PortState::Removed)
        .expect("removed");
    assert_eq!(
        (status.bytes_in, status.bytes_out, status.sessions_total),
        (13, 13, 1)
    );
}

#[test]
fn what_drains_ends_with_its_container() {
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    row.drain = Drain::Within { ms: 3_600_000 };
    node.lift(&row);
    let address = host(&row, 0);
    let mut remote = node.connect(address);
    let at_host = within(&node.network.host, move || traffic::connect(address));
    let mut local = at_host.expect("the host's namespace").expect("accepted");
    for stream in [&mut remote, &mut local] {
        stream.write_all(b"before").expect("sent");
        stream.read_exact(&mut [0; 6]).expect("echoed");
    }
    let key = row.key();
    node.control
        .write(|batch| batch.remove_port(key))
        .expect("asked");
    node.control
        .in_state(key, PortState::Draining)
        .expect("draining");
    node.replace_container(row.target_port);
    let status = node
        .control
        .in_state(key, PortState::Removed)
        .expect("not at the drain's deadline, but with the container");
    assert_eq!(
        (status.bytes_in, status.bytes_out, status.sessions_total),
        (12, 12, 2)
    );
}

#[test]
fn a_container_that_is_gone_leads_nowhere_even_when_its_address_is_used_again() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let port = row.target_port;
    // The process is dead when the container goes: nobody can tell the kernel.
    node.process.signal(Signal::SIGKILL).expect("killed");
    node.process.ended().expect("gone");
    let (_stranger, reached) = node.replace_container(port);
    let address = host(&row, 0);
    let refused = node
        .at_client(move || TcpStream::connect_timeout(&address, std::time::Duration::from_secs(2)));
    assert!(refused.is_err(), "a dead kernel's port leads to a stranger");
    assert!(reached.accept().is_err(), "the stranger was reached");
    // The next process finds the link gone and says so.
    node.process = node.place.start().expect("bai-dataplane");
    node.control
        .in_state(row.key(), PortState::Disabled)
        .expect("disabled");
    let refused = node.at_client(move || ask(address, b"x"));
    assert!(refused.is_err());
    assert!(reached.accept().is_err(), "the stranger was reached");
}

/// Baselines 3.5, first lesson: a client that vanishes leaves its flow behind, and later uses the
/// same port for a connection that goes to the container directly.
#[test]
fn a_stale_flow_does_not_translate_a_direct_connection() {
    let Some((node, row)) = Node::serving(mirror) else {
        return;
    };
    let (address, direct) = (host(&row, 0), SocketAddr::new(row.target, row.target_port));
    let client = node.network.client.clone();
    // Without a word: the client's end is torn down while its packets can't leave.
    let port = node.at_client(move || {
        let stream = traffic::connect(address).expect("accepted");
        let port = stream.local_addr().expect("bound").port();
        ip(&format!("-n {client} link set eth0 down")).expect("down");
        traffic::reset(stream);
        ip(&format!("-n {client} link set eth0 up")).expect("up");
        ip(&format!(
            "-n {client} route replace 10.78.2.0/24 via {}",
            HOST[0]
        ))
        .expect("routed");
        port
    });
    let seen = node.at_client(move || {
        let own = format!("{}:{port}", CLIENT[0]).parse().expect("own");
        let mut stream = traffic::connect_from(own, direct).expect("the same port again");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("told");
        text
    });
    assert_eq!(seen, format!("{}:{port}", CLIENT[0]));
}

#[test]
fn clients_outside_the_rows_networks_are_turned_away() {
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
    let address = host(&row, 0);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string());
    row.networks[0].address = "10.78.1.3".parse().expect("an address");
    node.lift(&row);
    let err = node.at_client(move || told(address)).map(|(seen, _)| seen);
    assert_eq!(err.unwrap_or_default(), "", "reset or ended without a byte");
    let status = node.counted(&row, |it| it.sessions_refused == 1);
    assert_eq!(status.sessions_total, 1);
    node.control.withdraw(row.key()).expect("removed");

    // Nor are those kept that were let in before, whatever process hears of it.
    let mut row = node.container.port(echo(&node.container));
    node.lift(&row);
    let address = host(&row, 0);
    let mut old = node.flow(address);
    let own = SocketAddr::from(([127, 0, 0, 1], row.host_port));
    let here = within(&node.network.host, move || traffic::connect(own));
    let mut here = here.expect("the host").expect("accepted");
    let goes_on = |stream: &mut TcpStream| {
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    };
    goes_on(&mut here).expect("all are let in");
    let network = |address: &str| ClientNetwork {
        address: address.parse().expect("an address"),
        prefix: 32,
    };
    row.networks = vec![network(CLIENT[0])];
    node.lift(&row);
    goes_on(&mut here).expect_err("the host is not in the list");
    goes_on(&mut old).expect("the client is");
    node.kill();
    row.networks = vec![network("10.78.1.3")];
    let change = row.clone();
    node.control
        .write(|batch| batch.put_port(change))
        .expect("written");
    goes_on(&mut old).expect("nobody has heard of it");
    node.restart();
    node.lift(&row);
    let err = goes_on(&mut old).expect_err("cut");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_session_of_the_relay_goes_on_when_its_row_is_lifted() {
    let Some((mut node, row)) = Node::with_echo() else {
        return;
    };
    // First without the container's row: the relay serves, and says why.
    node.control
        .write(|batch| batch.remove_container(KERNEL))
        .expect("removed");
    let status = node.publish(&row);
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    assert!(status.reason.contains("container"), "{}", status.reason);
    let address = host(&row, 0);
    let mut old = node.connect(address);
    old.write_all(b"relay").expect("sent");
    let mut back = [0; 5];
    old.read_exact(&mut back).expect("echoed");
    node.control.release();
    let container = node.container.row(KERNEL);
    until("the container's row being free", || {
        let row = container.clone();
        node.control.release();
        node.control.write(|batch| batch.put_container(row)).ok()
    })
    .expect("known again");
    node.counted(&row, |it| it.path == ForwardPath::KernelPath);
    old.write_all(b"still").expect("sent");
    old.read_exact(&mut back).expect("the session goes on");
    assert_eq!(&back, b"still");
    let answer = node
        .at_client(move || ask(address, b"kernel"))
        .expect("a flow");
    assert_eq!(answer, b"kernel");
    let status = node.counted(&row, |it| it.sessions_total == 2);
    assert_eq!(status.sessions_active, 1, "the relay's");
}

#[test]
fn a_udp_row_does_not_touch_the_tcp_flows_of_its_port_number() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let mut old = node.flow(address);
    let mut udp = row.clone();
    udp.protocol = Protocol::Udp;
    node.lift(&udp);
    old.write_all(b"after").expect("sent");
    old.read_exact(&mut [0; 5]).expect("the flow goes on");
    node.control.withdraw(udp.key()).expect("removed");
    old.write_all(b"after").expect("sent");
    old.read_exact(&mut [0; 5]).expect("the flow goes on");
    let status = node.counted(&row, |it| it.bytes_out == 16);
    assert_eq!(status.path, ForwardPath::KernelPath);
}

#[test]
fn an_uplink_that_goes_down_and_comes_back_serves_again() {
    let Some((mut node, row)) = Node::serving(mirror) else {
        return;
    };
    let (address, name) = (host(&row, 0), node.network.host.clone());
    ip(&format!("-n {name} link set up0 down")).expect("down");
    // No way in, so nothing for the kernel path to serve; the listener stays.
    node.counted(&row, |it| {
        it.path == ForwardPath::Relay && it.reason.contains("other hosts")
    });
    ip(&format!("-n {name} link set up0 up")).expect("up");
    node.counted(&row, |it| it.path == ForwardPath::KernelPath);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string());
}

#[test]
fn flows_go_on_where_new_ones_are_left_to_the_relay() {
    let Some((mut node, mut row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let mut old = node.flow(address);
    // Large enough for segments of the uplink's size.
    let word = vec![7; 100_000];
    let mut goes_on = |when: &str| {
        old.write_all(&word).expect("sent");
        let mut back = vec![0; word.len()];
        old.read_exact(&mut back)
            .unwrap_or_else(|err| panic!("{when}: {err}"));
        assert_eq!(back, word);
    };
    // Somebody connects the container to another network.
    let container = node.container.row(KERNEL);
    let mut connected = container.clone();
    connected.link_indexes.push(u32::from(u16::MAX));
    let put = |node: &mut Node, container: ContainerRow| {
        node.control
            .write(|batch| batch.put_container(container))
            .expect("written");
    };
    put(&mut node, connected);
    node.counted(&row, |it| {
        it.path == ForwardPath::Relay && it.reason.contains("several networks")
    });
    goes_on("on several networks");
    let new = node.at_client(move || ask(address, b"new"));
    assert_eq!(new.expect("by the relay"), b"new");
    put(&mut node, container);
    node.counted(&row, |it| it.path == ForwardPath::KernelPath);
    goes_on("on its own network again");
    // The only way in goes away, and is back before anybody looks.
    let name = node.network.host.clone();
    ip(&format!("-n {name} link set up0 down")).expect("down");
    node.counted(&row, |it| {
        it.path == ForwardPath::Relay && it.reason.contains("other hosts")
    });
    node.process.signal(Signal::SIGSTOP).expect("stopped");
    ip(&format!("-n {name} link set up0 up")).expect("up");
    goes_on("while the uplink is not known to be back");
    node.process.signal(Signal::SIGCONT).expect("goes on");
    node.counted(&row, |it| it.path == ForwardPath::KernelPath);
    goes_on("by the uplink");
    // Clients of other hosts are shut out: that holds for all of them.
    row.local_only = true;
    node.lift(&row);
    let _ = old.write_all(b"x");
    let err = old.read(&mut [0]).expect_err("cut");
    assert_eq!(err.kind(), std::io::ErrorKind::ConnectionReset);
    node.counted(&row, |it| it.sessions_active == 0);
}

#[test]
fn thousands_of_connections_come_and_go() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    const WORKERS: u64 = 16;
    const EACH: u64 = 250;
    node.at_client(move || {
        let workers: Vec<_> = (0..WORKERS)
            .map(|worker| {
                thread::spawn(move || {
                    for turn in 0..EACH {
                        let word = format!("{worker} {turn}");
                        let answer = ask(address, word.as_bytes()).expect("an answer");
                        assert_eq!(answer, word.as_bytes());
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().expect("every answer is right");
        }
    });
    let status = node.counted(&row, |it| {
        it.sessions_total == WORKERS * EACH && it.sessions_active == 0
    });
    assert_eq!(status.connect_failures, 0);
}

#[test]
fn the_hosts_forwarding_rules_are_not_in_the_way() {
    if may_use_bpf() {
        behind_forwarding_rules(None);
    }
}

#[test]
fn the_hosts_forwarding_rules_for_bridges_are_not_in_the_way() {
    const CALL: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    if !may_use_bpf() {
        return;
    }
    if std::path::Path::new(CALL).exists() {
        behind_forwarding_rules(Some(CALL));
        return;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("its release");
    let lists = ["modules.dep", "modules.builtin"].map(|list| {
        let path = format!("/lib/modules/{}/{list}", release.trim());
        std::fs::read_to_string(path).unwrap_or_default()
    });
    let has = lists.iter().any(|it| it.contains("/br_netfilter.ko"));
    harness::skip::here(
        "br_netfilter is not loaded (where there is one, modprobe br_netfilter)",
        has,
    );
}

fn behind_forwarding_rules(bridge_filter: Option<&'static str>) {
    let mut node = Node::new();
    let row = node.container.port(mirror(&node.container));
    // As Docker sets a host up: nothing is forwarded unless a rule says so, bridges included.
    for words in [
        "-P FORWARD DROP",
        "-t nat -A POSTROUTING -s 10.78.2.0/24 ! -o br0 -j MASQUERADE",
    ] {
        let output = command(&node.network.host, "iptables")
            .args(words.split_whitespace())
            .output()
            .expect("iptables");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    if let Some(bridge_filter) = bridge_filter {
        within(&node.network.host, move || {
            std::fs::write(bridge_filter, "1")
        })
        .expect("the host's namespace")
        .expect("br_netfilter");
    }
    node.lift(&row);
    let (address, direct) = (host(&row, 0), SocketAddr::new(row.target, row.target_port));
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string());
    let blocked = node.at_client(move || {
        TcpStream::connect_timeout(&direct, std::time::Duration::from_millis(500))
    });
    assert!(blocked.is_err(), "the rule holds for the direct way");
    masqueraded_under_its_number(&node, &row);
}

/// A connection of another container's to the outside, which the host gives the number of a published port:
/// it goes on, and the port is still its row's.
fn masqueraded_under_its_number(node: &Node, row: &PortRow) {
    let other = node.network.container(3).expect("another container");
    let number = row.host_port;
    for words in [
        "-P FORWARD ACCEPT".to_owned(),
        format!(
            "-t nat -I POSTROUTING -p tcp -s 10.78.2.3 ! -o br0 -j MASQUERADE --to-ports {number}"
        ),
    ] {
        let output = command(&node.network.host, "iptables")
            .args(words.split_whitespace())
            .output()
            .expect("iptables");
        assert!(output.status.success(), "{words}");
    }
    let outside = node.at_client(|| {
        let listener = traffic::listener(&format!("{}:0", CLIENT[0]));
        let address = listener.local_addr().expect("bound");
        thread::spawn(move || {
            let (mut stream, peer) = listener.accept().expect("a client");
            drop(listener);
            while stream.read_exact(&mut [0; 4]).is_ok() {
                stream.write_all(&peer.port().to_be_bytes()).expect("sent");
            }
        });
        address
    });
    let exchange = move || {
        let mut stream = traffic::connect(outside)?;
        let mut numbers = [0; 2];
        for _ in 0..3 {
            stream.write_all(b"word")?;
            stream.read_exact(&mut numbers)?;
        }
        stream.shutdown(Shutdown::Write)?;
        stream.read_to_end(&mut Vec::new())?;
        Ok::<_, std::io::Error>(u16::from_be_bytes(numbers))
    };
    let seen = within(&other.namespace, exchange).expect("the container");
    assert_eq!(seen.expect("goes on"), number);
    // A client of the port with the same two numbers.
    let SocketAddr::V4(own) = outside else {
        unreachable!("an address of IPv4");
    };
    let address = host(row, 0);
    let seen = node.at_client(move || {
        let mut stream = traffic::connect_from(own, address)?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok::<_, std::io::Error>(text)
    });
    assert_eq!(seen.expect("told"), own.to_string(), "by the kernel path");
}

#[test]
fn the_nodes_client_networks_hold_on_every_path() {
    if !may_use_bpf() {
        return;
    }
    for (allowed, lets_in) in [("10.78.1.0/24", true), ("10.79.0.0/16", false)] {
        let mut node = Node::with(&format!(
            "forward = \"auto\"\nallowed-clients = [\"{allowed}\"]"
        ));
        let row = node.container.port(mirror(&node.container));
        node.lift(&row);
        let address = host(&row, 0);
        let seen = node.at_client(move || told(address)).map(|(seen, _)| seen);
        let port = row.host_port;
        let here = within(&node.network.host, move || {
            told(([127, 0, 0, 1], port).into()).map(|(seen, _)| seen)
        });
        let here = here.expect("the host").unwrap_or_default();
        assert_eq!(here, "", "the host's own clients are not in the list");
        if lets_in {
            assert!(seen.expect("told").starts_with(CLIENT[0]));
            node.counted(&row, |it| {
                it.sessions_total == 1 && it.sessions_refused == 1
            });
        } else {
            assert_eq!(seen.unwrap_or_default(), "");
            node.counted(&row, |it| {
                it.sessions_total == 0 && it.sessions_refused == 2
            });
        }
    }
}

#[test]
fn where_the_hosts_firewall_decides_the_relay_serves() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(mirror(&node.container));
    row.honour_firewall = true;
    let status = node.publish(&row);
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    assert!(status.reason.contains("firewall"), "{}", status.reason);
    let address = host(&row, 0);
    let (seen, _) = node.at_client(move || told(address)).expect("told");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay: {seen}");
    let rule = format!(
        "-A INPUT -p tcp --dport {} -j REJECT --reject-with tcp-reset",
        row.host_port
    );
    let output = command(&node.network.host, "iptables")
        .args(rule.split_whitespace())
        .output()
        .expect("iptables");
    assert!(output.status.success());
    let refused = node.at_client(move || TcpStream::connect(address));
    assert!(refused.is_err(), "the firewall is bypassed");
    // Without the row's word it would be.
    row.honour_firewall = false;
    node.lift(&row);
    let (seen, own) = node.at_client(move || told(address)).expect("told");
    assert_eq!(seen, own.to_string());
}

#[test]
fn flows_that_the_firewall_let_in_before_it_decided_go_on() {
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    node.lift(&row);
    let address = host(&row, 0);
    let mut old = node.connect(address);
    let mut goes_on = |word: &[u8]| {
        old.write_all(word).expect("sent");
        let mut back = vec![0; word.len()];
        old.read_exact(&mut back).expect("echoed");
        assert_eq!(back, word);
    };
    goes_on(b"before");
    // Others end, and one is lost with a machine that says no more; their ports are used again later.
    let client = node.network.client.clone();
    let past = node.at_client(move || {
        [false, true].map(|vanishes| {
            let mut stream = traffic::connect(address).expect("accepted");
            let own = stream.local_addr().expect("bound");
            stream.write_all(b"x").expect("sent");
            stream.read_exact(&mut [0]).expect("echoed");
            if vanishes {
                ip(&format!("-n {client} link set eth0 down")).expect("down");
            }
            traffic::reset(stream);
            ip(&format!("-n {client} link set eth0 up")).expect("up");
            own.to_string().parse().expect("of IPv4")
        })
    });
    row.honour_firewall = true;
    let status = node.publish(&row);
    assert_eq!(status.path, ForwardPath::Relay);
    assert!(status.reason.contains("firewall"), "{}", status.reason);
    goes_on(b"after");
    // What they have left does not take segments of the relay's sessions.
    node.at_client(move || {
        for own in past {
            let mut stream = traffic::connect_from(own, address).expect("accepted");
            stream.write_all(b"again").expect("sent");
            stream.read_exact(&mut [0; 5]).expect("echoed");
        }
    });
    // New ones meet the firewall, and then the listener.
    let rule = |what: &str| {
        let mut words = vec![what, "INPUT", "-p", "tcp", "--dport"];
        let port = row.host_port.to_string();
        words.extend([port.as_str(), "-j", "REJECT", "--reject-with", "tcp-reset"]);
        let output = command(&node.network.host, "iptables").args(words).output();
        assert!(output.expect("iptables").status.success());
    };
    let asked = |node: &Node| node.at_client(move || ask(address, b"new"));
    rule("-A");
    assert!(asked(&node).is_err(), "the firewall is bypassed");
    goes_on(b"all the same");
    rule("-D");
    assert_eq!(asked(&node).expect("by the relay"), b"new");
    // Nor does a new process cut them.
    node.counted(&row, |it| (it.sessions_total, it.bytes_in) == (6, 38));
    node.kill();
    node.restart();
    // The listener is there with the answer.
    let status = node.publish(&row);
    assert_eq!(status.path, ForwardPath::Relay);
    goes_on(b"and by another process");
    assert_eq!(asked(&node).expect("by the relay"), b"new");
    // Back on the kernel path, with what all of them have sent.
    row.honour_firewall = false;
    node.lift(&row);
    goes_on(b"to the end");
    assert_eq!(asked(&node).expect("by the kernel path"), b"new");
    let bytes = [6, 1, 1, 5, 5, 5, 12, 22, 10, 3, 3, 3].iter().sum::<u64>();
    let status = node.counted(&row, |it| it.bytes_in == bytes);
    assert_eq!((status.bytes_out, status.sessions_total), (bytes, 8));
}
