//! What the kernel path does with packets that are not plain segments: datagrams, their fragments,
//! errors of routers and of containers, large packets for narrow ways.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use harness::dataplane::until;
use harness::kernel_path::{KERNEL, Node, attached, host, mirror, pins, told};
use harness::netns::{ip, offload_nothing};
use harness::remote_client::{Container, command, may_use_bpf, within};
use harness::traffic::{self, Manner};
use shared::desired::{PortRow, Protocol};
use shared::observed::{ForwardPath, PortState};

/// An echo of datagrams in the container.
fn echo(node: &Node) -> u16 {
    within(&node.container.namespace, || {
        let socket = UdpSocket::bind("[::]:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        thread::spawn(move || {
            let mut buffer = vec![0; 65_536];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], peer);
            }
        });
        port
    })
    .expect("the container's namespace")
}

/// A row of datagrams on the kernel path.
fn datagrams(node: &mut Node, family: usize) -> PortRow {
    let mut row = node.container.port(echo(node));
    row.protocol = Protocol::Udp;
    row.target = node.container.address[family];
    if family == 1 {
        row.bind = "::".parse().expect("an address");
    }
    node.lift(&row);
    row
}

fn socket_to(address: SocketAddr) -> UdpSocket {
    let any = if address.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any).expect("a socket");
    socket
        .set_read_timeout(Some(traffic::PATIENCE))
        .expect("a deadline");
    socket.connect(address).expect("a peer");
    socket
}

fn round_trip(socket: &UdpSocket, length: usize) {
    let mut sent = vec![0; length];
    traffic::fill(length as u64, 0, &mut sent);
    socket.send(&sent).expect("sent");
    let mut back = vec![0; 65_536];
    let received = socket.recv(&mut back).expect("an answer");
    assert!(back[..received] == sent, "{length} bytes came back whole");
}

/// Baselines: a length check that is the same for all protocols loses small datagrams, and those of
/// several fragments are lost without a map of them.
fn datagrams_of_all_sizes(family: usize) {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = datagrams(&mut node, family);
    let address = host(&row, family);
    node.at_client(move || {
        let socket = socket_to(address);
        for length in [1, 2, 64, 1_400, 1_472, 1_473, 3_000, 9_000, 40_000] {
            round_trip(&socket, length);
        }
    });
    let status = node.counted(&row, |it| it.bytes_out >= 56_000);
    assert_eq!(
        (status.path, status.sessions_total, status.sessions_active),
        (ForwardPath::KernelPath, 1, 1)
    );
    assert_eq!(status.bytes_in, status.bytes_out);
    if family == 0 {
        // Of IPv4 datagrams may come without a sum, and have none in the container either.
        assert_eq!(
            by_hand(&node, ["2", "1", "11", "01000000"], address),
            "unsummed"
        );
    }
}

/// A client with an option of sockets that Rust has no name for: its type, the option's level, number and
/// value, and where it connects to. It says what it got.
const BY_HAND: &str = "
import socket, sys
kind, level, option, value, address, port = sys.argv[1:]
family = socket.AF_INET6 if ':' in address else socket.AF_INET
client = socket.socket(family, int(kind))
client.settimeout(30)
client.setsockopt(int(level), int(option), bytes.fromhex(value))
client.connect((address, int(port)))
if client.type == socket.SOCK_DGRAM:
    client.send(b'unsummed')
    print(client.recv(64).decode())
else:
    print(b''.join(iter(lambda: client.recv(64), b'')).decode())
";

fn by_hand(node: &Node, words: [&str; 4], to: SocketAddr) -> String {
    let output = command(&node.network.client, "python3")
        .args(["-c", BY_HAND])
        .args(words)
        .args([to.ip().to_string(), to.port().to_string()])
        .output()
        .expect("python3");
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{why}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// linux/in.h, linux/in6.h: the first says nothing four times, the second fills a header of eight bytes.
#[test]
fn clients_with_options_of_ip_are_the_relays() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    for (family, option, bridge) in [
        (0, ["1", "0", "4", "01010101"], "10.78.2.1:"),
        (1, ["1", "41", "54", "0000010400000000"], "[fd78:2::1]:"),
    ] {
        let mut row = node.container.port(mirror(&node.container));
        row.target = node.container.address[family];
        if family == 1 {
            row.bind = "::".parse().expect("an address");
        }
        node.lift(&row);
        let address = host(&row, family);
        let (seen, own) = node.at_client(move || told(address)).expect("told");
        assert_eq!(seen, own.to_string(), "without them by the kernel");
        let seen = by_hand(&node, option, address);
        assert!(seen.starts_with(bridge), "by the relay: {seen}");
    }
}

#[test]
fn datagrams_of_all_sizes_come_back() {
    datagrams_of_all_sizes(0);
}

#[test]
fn datagrams_of_all_sizes_come_back_over_ipv6() {
    datagrams_of_all_sizes(1);
}

/// Nothing tells of a datagram's end: its flow goes when it was silent for half a minute.
#[test]
fn a_flow_that_is_never_answered_is_forgotten() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let silent = within(&node.container.namespace, || UdpSocket::bind("[::]:0"));
    let silent = silent.expect("the container").expect("a port");
    let mut row = node
        .container
        .port(silent.local_addr().expect("bound").port());
    row.protocol = Protocol::Udp;
    node.lift(&row);
    let address = host(&row, 0);
    let begun = Instant::now();
    node.at_client(move || socket_to(address).send(b"x"))
        .expect("sent");
    node.counted(&row, |it| it.sessions_active == 1);
    while begun.elapsed() < Duration::from_secs(120) {
        if node.counted(&row, |_| true).sessions_active == 0 {
            assert!(begun.elapsed() >= Duration::from_secs(30), "too early");
            return;
        }
        thread::sleep(Duration::from_millis(200));
    }
    panic!("the flow is still there");
}

fn closed_port_is_told(family: usize) {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    // A port of the container that nobody has.
    let free = within(&node.container.namespace, || {
        UdpSocket::bind("[::]:0").and_then(|it| it.local_addr())
    });
    let port = free.expect("the container").expect("a port").port();
    let mut row = node.container.port(port);
    row.protocol = Protocol::Udp;
    row.target = node.container.address[family];
    if family == 1 {
        row.bind = "::".parse().expect("an address");
    }
    node.lift(&row);
    let address = host(&row, family);
    let err = node.at_client(move || {
        let socket = socket_to(address);
        socket.send(b"x").expect("sent");
        socket.recv(&mut [0; 16])
    });
    assert_eq!(
        err.expect_err("nobody answers").kind(),
        ErrorKind::ConnectionRefused
    );
}

#[test]
fn the_client_hears_that_a_containers_port_is_closed() {
    closed_port_is_told(0);
}

#[test]
fn the_client_hears_that_a_containers_port_is_closed_over_ipv6() {
    closed_port_is_told(1);
}

/// Who has begun by the relay goes on by it: the container would take the kernel path's packets for
/// another client's.
#[test]
fn datagrams_of_the_relay_stay_with_it_when_the_kernel_path_could_serve() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    node.control
        .write(|batch| batch.remove_container(KERNEL))
        .expect("removed");
    let mut row = node.container.port(echo(&node));
    row.protocol = Protocol::Udp;
    let status = node.publish(&row);
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    let address = host(&row, 0);
    let socket = node.at_client(move || {
        let socket = socket_to(address);
        round_trip(&socket, 3_000);
        socket
    });
    let container = node.container.row(KERNEL);
    until("the container's row being free", || {
        let row = container.clone();
        node.control.release();
        node.control.write(|batch| batch.put_container(row)).ok()
    })
    .expect("known again");
    let status = node.counted(&row, |it| it.reason.contains("datagrams"));
    assert_eq!(status.path, ForwardPath::Relay, "{}", status.reason);
    round_trip(&socket, 100);
    let status = node.counted(&row, |it| it.bytes_out == 3_100);
    assert_eq!((status.sessions_total, status.sessions_active), (1, 1));
}

#[test]
fn a_flow_of_datagrams_does_not_translate_direct_ones() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = datagrams(&mut node, 0);
    let (address, direct) = (host(&row, 0), SocketAddr::new(row.target, row.target_port));
    node.at_client(move || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        socket
            .set_read_timeout(Some(traffic::PATIENCE))
            .expect("a deadline");
        let mut buffer = [0; 16];
        for to in [address, direct, address, direct] {
            socket.send_to(b"x", to).expect("sent");
            let (_, from) = socket.recv_from(&mut buffer).expect("an answer");
            assert_eq!(from, to);
        }
    });
}

#[test]
fn no_datagram_is_lost_while_the_process_is_killed_and_replaced() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = datagrams(&mut node, 0);
    let address = host(&row, 0);
    let over = Arc::new(AtomicBool::new(false));
    let stop = Arc::clone(&over);
    let traffic = node.at_client(move || {
        thread::spawn(move || {
            let socket = socket_to(address);
            let mut number = 0_u64;
            while !stop.load(Relaxed) {
                socket.send(&number.to_le_bytes()).expect("sent");
                let mut back = [0; 8];
                let length = socket.recv(&mut back).expect("each is answered");
                assert_eq!((length, u64::from_le_bytes(back)), (8, number));
                number += 1;
            }
            number
        })
    });
    for _ in 0..3 {
        node.kill();
        node.restart();
        node.counted(&row, |it| it.path == ForwardPath::KernelPath);
    }
    over.store(true, Relaxed);
    let sent = traffic.join().expect("no datagram was lost");
    let status = node.counted(&row, |it| it.bytes_in >= sent * 8);
    assert_eq!(status.sessions_total, 1, "one flow all along");
    assert_eq!((status.bytes_in, status.bytes_out), (sent * 8, sent * 8));
}

/// Bytes of a download.
const LENGTH: u64 = 2 << 20;

/// A server in the container that sends all it can at once. Nothing large goes the other way: the
/// narrow ends of the veths here would swallow it without a word.
fn source(node: &Node) -> u16 {
    within(&node.container.namespace, || {
        let listener = traffic::listener("[::]:0");
        let port = listener.local_addr().expect("bound").port();
        thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                thread::spawn(move || {
                    let sent = traffic::send(&mut stream, 3, LENGTH, Manner::eager(60_000));
                    sent.and_then(|()| stream.shutdown(Shutdown::Write))
                });
            }
        });
        port
    })
    .expect("the container's namespace")
}

fn download(address: SocketAddr) -> Result<(), String> {
    let mut stream = traffic::connect(address).map_err(|err| err.to_string())?;
    let received = traffic::receive(&mut stream, 3, Manner::eager(60_000))?;
    (received == LENGTH)
        .then_some(())
        .ok_or(format!("{received} bytes"))
}

/// A row that leads to such a server.
fn sourced(node: &mut Node, family: usize) -> PortRow {
    let mut row = node.container.port(source(node));
    row.target = node.container.address[family];
    if family == 1 {
        row.bind = "::".parse().expect("an address");
    }
    node.lift(&row);
    row
}

/// A router beyond the client's network has a narrow way: the container must hear of it.
fn path_mtu(family: usize) {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = sourced(&mut node, family);
    let far = node.network.beyond_the_client(1_300).expect("a far client");
    let address = host(&row, family);
    within(&far.name, move || download(address))
        .expect("the far client")
        .expect("whole");
    let status = node.counted(&row, |it| it.sessions_total >= 1);
    assert_eq!(status.path, ForwardPath::KernelPath);
    // Without that knowledge every full segment would be lost.
    let known = within(&node.container.namespace, {
        let to = far.address[family].clone();
        move || ip(&format!("route get {to}"))
    });
    let known = known.expect("the container").expect("a route");
    assert!(known.contains("mtu 1300"), "{known}");
}

#[test]
fn a_narrow_way_beyond_the_host_is_told_to_the_container() {
    path_mtu(0);
}

#[test]
fn a_narrow_way_beyond_the_host_is_told_to_the_container_over_ipv6() {
    path_mtu(1);
}

fn narrow_uplink(family: usize) {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    ip(&format!("-n {} link set up0 mtu 1300", node.network.host)).expect("narrow");
    let row = sourced(&mut node, family);
    let address = host(&row, family);
    // The dataplane may look at the interface a moment later than the test has changed it.
    until("the narrow way being known", || {
        node.at_client(move || download(address)).ok()
    })
    .expect("whole");
}

/// What the uplink takes is looked at again with each sweep of the flows.
#[test]
fn a_flow_follows_its_uplink_when_that_gets_narrower() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let port = node.container.echo().expect("an echo server");
    let row = node.container.port(port);
    node.lift(&row);
    let network = &node.network;
    // Segments as they are on a wire: others are not looked at for their size.
    for (namespace, link) in [
        (&network.host, &node.container.link),
        (&node.container.namespace, &"eth0".to_owned()),
    ] {
        offload_nothing(namespace, link).expect("an interface without offloads");
    }
    let mut flow = node.flow(host(&row, 0));
    for (namespace, link) in [(&network.client, "eth0"), (&network.host, "up0")] {
        ip(&format!("-n {namespace} link set {link} mtu 1300")).expect("narrow");
    }
    // Longer than a sweep is away, and what was lost is sent again.
    flow.set_read_timeout(Some(Duration::from_secs(30)))
        .expect("a limit");
    let large = vec![7; 100_000];
    flow.write_all(&large).expect("sent");
    let mut back = vec![0; large.len()];
    flow.read_exact(&mut back).expect("whole");
    assert_eq!(back, large);
}

#[test]
fn an_uplink_narrower_than_the_containers_link_will_do() {
    narrow_uplink(0);
}

#[test]
fn an_uplink_narrower_than_the_containers_link_will_do_over_ipv6() {
    narrow_uplink(1);
}

/// Sends a SYN behind tags that name no VLAN, past its own kernel, and says whether it is answered. In:
/// how many tags, its own address, the other's hardware, address and port, seconds to wait.
const TAGGED_SYN: &str = "
import select, socket, struct, sys, time
tags, hardware, peer, port = int(sys.argv[1]), sys.argv[3], sys.argv[4], int(sys.argv[5])
own = 40000 + tags
fold = lambda it: ~((it & 0xffff) + (it >> 16) + (((it & 0xffff) + (it >> 16)) >> 16)) & 0xffff
total = lambda it: sum(struct.unpack('!%dH' % (len(it) // 2), it))
ends = socket.inet_aton(sys.argv[2]) + socket.inet_aton(peer)
tcp = lambda check: struct.pack('!HHIIBBHHH', own, port, 1, 0, 0x50, 2, 65535, check, 0)
tcp = tcp(fold(total(tcp(0)) + total(ends) + 6 + 20))
ip = lambda check: struct.pack('!BBHHHBBH', 0x45, 0, 40, 0, 0x4000, 64, 6, check) + ends
ip = ip(fold(total(ip(0))))
answers = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(('eth0', 0))
frame = bytes.fromhex(hardware.replace(':', '')) + link.getsockname()[4]
link.send(frame + bytes.fromhex('81000000') * tags + b'\\x08\\x00' + ip + tcp)
until = time.monotonic() + float(sys.argv[6])
while select.select([answers], [], [], max(0, until - time.monotonic()))[0]:
    packet, (whence, _) = answers.recvfrom(2048)
    source, destination = struct.unpack('!HH', packet[20:24])
    if (whence, source, destination, packet[33] & 18) == (peer, port, own, 18):
        print('answered')
        break
else:
    print('silence')
";

/// Whether a port of `to` answers `from` when it is asked by a frame with so many tags.
fn answers_tagged(from: &Container, to: &Container, port: u16, tags: u32, wait: Duration) -> bool {
    let link = ip(&format!("-n {} -o link show eth0", to.namespace)).expect("its link");
    let mut words = link.split_whitespace().skip_while(|it| *it != "link/ether");
    let hardware = words.nth(1).expect("a hardware address");
    let (own, peer) = (from.address[0].to_string(), to.address[0].to_string());
    let output = command(&from.namespace, "python3")
        .args(["-c", TAGGED_SYN, &tags.to_string(), &own, hardware, &peer])
        .args([port.to_string(), wait.as_secs_f64().to_string()])
        .output()
        .expect("python3");
    match String::from_utf8_lossy(&output.stdout).trim() {
        "answered" => true,
        "silence" => false,
        _ => panic!("{}", String::from_utf8_lossy(&output.stderr)),
    }
}

#[test]
fn nobody_but_the_host_reaches_the_runner() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let other = node.network.container(3).expect("another container");
    let unguarded = node
        .network
        .container(4)
        .expect("a container without a row");
    for container in [&node.container, &unguarded] {
        within(&container.namespace, || {
            for port in [2000, 2001, 2002] {
                let listener = traffic::listener(&format!("[::]:{port}"));
                thread::spawn(move || {
                    for stream in listener.incoming() {
                        let _ = stream.expect("a client").write_all(b"runner");
                    }
                });
            }
        })
        .expect("the container's namespace");
    }
    let within_time = |namespace: &str, address: SocketAddr, wait: Duration| {
        let run = move || {
            let mut stream = TcpStream::connect_timeout(&address, wait)?;
            traffic::patient(&stream)?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            std::io::Result::Ok(text)
        };
        within(namespace, run).expect("a namespace")
    };
    let reach = |namespace: &str, address| within_time(namespace, address, traffic::PATIENCE);
    // Who is let in is within microseconds, on an idle machine.
    let moment = Duration::from_millis(300);
    let kept_out = |namespace: &str, address| within_time(namespace, address, moment);
    // The row of the container is enough; it needs no port.
    until("the guard being up", || {
        attached(&node).contains("to_container").then_some(())
    })
    .expect("guarded");
    node.kill();
    for (family, port) in [(0, 2000), (0, 2001), (1, 2000), (1, 2001)] {
        for from in [&other.namespace, &node.network.client] {
            let err = kept_out(from, SocketAddr::new(node.container.address[family], port));
            let err = err.expect_err("the runner was reached");
            assert_eq!(err.kind(), ErrorKind::TimedOut, "{from}");
        }
    }
    for family in [0, 1] {
        let own = |port: u16| SocketAddr::new(node.container.address[family], port);
        assert_eq!(
            reach(&other.namespace, own(2002)).expect("another port"),
            "runner"
        );
        assert_eq!(
            reach(&node.network.host, own(2000)).expect("the agent"),
            "runner"
        );
    }
    // Receivers look behind tags that name no VLAN, however many there are.
    let asked = |to, port, tags, wait| answers_tagged(&other, to, port, tags, wait);
    for tags in [1, 2, 3] {
        assert!(asked(&unguarded, 2000, tags, traffic::PATIENCE), "{tags}");
        assert!(!asked(&node.container, 2000, tags, moment), "{tags}");
    }
    assert!(asked(&node.container, 2002, 1, traffic::PATIENCE));
}

/// Bytes and packets in, then out, as the container's own interface counts them.
fn own(node: &Node) -> [u64; 4] {
    let table = within(&node.container.namespace, || {
        std::fs::read_to_string("/proc/thread-self/net/dev")
    });
    let table = table.expect("the container").expect("its own counters");
    let line = table.lines().find_map(|it| it.trim().strip_prefix("eth0:"));
    let words: Vec<&str> = line.expect("eth0").split_whitespace().collect();
    [0, 1, 8, 9].map(|place| words[place].parse().expect("a number"))
}

/// Waits until nothing passes while a sample is taken, and compares that with the container's own.
fn charged_exactly(node: &mut Node, when: &str) -> [u64; 4] {
    let mut last = None;
    let found = until("a sample of a quiet moment", || {
        let before = own(node);
        let snapshot = node.control.observed.snapshot().ok()?;
        let tick = snapshot.container(KERNEL)?.tick;
        let sample = node.control.sample(KERNEL, |it| it.tick != tick).ok()?;
        let net = sample.net.counters;
        let told = [net.rx_bytes, net.rx_packets, net.tx_bytes, net.tx_packets];
        last = Some((before, told));
        // One that was begun before this could have missed something: the next tells.
        (own(node) == before && told == before.map(Some)).then_some(before)
    });
    found.unwrap_or_else(|err| panic!("{when}: its own and what is told: {last:?}: {err}"))
}

/// The kernel path puts packets into the container's end of the link, past the host's: that one counts
/// none of them.
#[test]
fn a_container_is_charged_what_the_kernel_path_gives_it() {
    const BULK: u64 = 16 << 20;
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let datagrams = host(&datagrams(&mut node, 0), 0);
    let echo = node
        .container
        .port(node.container.echo().expect("a server"));
    node.lift(&echo);
    let echo = host(&echo, 0);
    let source = host(&sourced(&mut node, 0), 0);
    let far = node.network.beyond_the_client(1_300).expect("a far client");
    let before = charged_exactly(&mut node, "at rest");

    let both_ways = move || {
        let mut stream = traffic::connect(echo).expect("accepted");
        let mut other = stream.try_clone().expect("a descriptor");
        let sender = thread::spawn(move || {
            traffic::send(&mut other, 1, BULK, Manner::eager(60_000)).expect("sent");
            other.shutdown(Shutdown::Write)
        });
        let back = traffic::receive(&mut stream, 1, Manner::eager(60_000));
        sender.join().expect("sent").expect("an end");
        assert_eq!(back, Ok(BULK));
    };
    node.at_client(both_ways);
    let after = charged_exactly(&mut node, "after bulk both ways");
    for way in [0, 2] {
        let moved = after[way] - before[way];
        assert!((BULK..2 * BULK).contains(&moved), "{before:?} {after:?}");
    }
    // Whole and in fragments.
    node.at_client(move || {
        let socket = socket_to(datagrams);
        for length in [1, 1_472, 9_000, 40_000] {
            round_trip(&socket, length);
        }
    });
    charged_exactly(&mut node, "after datagrams");
    // The errors of a router.
    let narrow = within(&far.name, move || download(source));
    narrow.expect("the far client").expect("whole");
    let before = charged_exactly(&mut node, "after a narrow way");

    // It goes on while nobody looks, and with the next process.
    node.kill();
    node.at_client(both_ways);
    node.restart();
    let after = charged_exactly(&mut node, "after a restart");
    assert!(after[0] - before[0] >= BULK && after[2] - before[2] >= BULK);

    // ... even with one of another layout of the other tables.
    node.kill();
    let pins = pins(&node);
    let other = pins.with_file_name("v0");
    std::fs::create_dir(&other).expect("a directory of pins");
    std::fs::rename(pins.join("delivered"), other.join("delivered")).expect("another layout's");
    node.restart();
    charged_exactly(&mut node, "after a change of layout");

    // ... but no longer than its link.
    let (host, link) = (&node.network.host, &node.container.link);
    ip(&format!("-n {host} link del {link}")).expect("gone");
    let entries = || {
        let pin = pins.join("delivered");
        let map = aya::maps::MapData::from_pin(pin).expect("the table");
        let map = aya::maps::Map::PerCpuHashMap(map);
        let map = aya::maps::PerCpuHashMap::<_, u32, u128>::try_from(map).expect("the table");
        map.keys().count()
    };
    until("its entry being gone", || (entries() == 0).then_some(())).expect("forgotten");
}
