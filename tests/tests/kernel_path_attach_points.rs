//! Where the kernel path serves: several uplinks, VLANs, bridges towards other machines and towards
//! containers, kernels with filters only; and how it gets over changes of all that.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use aya::EbpfLoader;
use aya::programs::{SchedClassifier, TcAttachType};
use harness::dataplane::{free_port, until};
use harness::interface_lock::InterfaceLock;
use harness::kernel_path::{
    KERNEL, Node, ask, attached, echo, host, knows_links, mirror, pins, told,
};
use harness::netns::ip;
use harness::remote_client::{command, may_use_bpf, within};
use harness::{traffic, wait};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, sockopt};
use shared::desired::{Drain, PortRow, Protocol};
use shared::ids::ContainerId;
use shared::observed::{ForwardPath, PortState, PortStatus};

/// Waits until a client at `address` is served by the kernel path: the container sees its address.
fn served(node: &Node, address: SocketAddr) {
    until(&format!("{address} by the kernel path"), || {
        let (seen, own) = node.at_client(move || told(address)).ok()?;
        (seen == own.to_string()).then_some(())
    })
    .expect("served");
}

/// A program that ends the search for another one at a container's link, where answers have to be
/// translated.
#[test]
fn a_program_at_the_containers_link_does_not_keep_answers_from_clients() {
    let Some((mut node, row)) = Node::with_echo() else {
        return;
    };
    if !knows_links() {
        harness::skip::here("no tcx before Linux 6.6", false);
        return;
    }
    until("the programs of the node", || {
        attached(&node).contains("from_uplink").then_some(())
    })
    .expect("attached");
    let link = node.container.link.clone();
    let mut object = EbpfLoader::new()
        .default_map_pin_directory(pins(&node))
        .load(ebpf::nat())
        .expect("programs");
    let other = within(&node.network.host, move || {
        // It says "pass" of every packet.
        let program = object.program_mut(ebpf::program::SWEEP).expect("one");
        let program: &mut SchedClassifier = program.try_into().expect("of this kind");
        program.load().expect("loaded");
        let attached = program.attach(&link, TcAttachType::Ingress);
        attached.expect("attached");
        object
    });
    let other = other.expect("the host's namespace");
    node.lift(&row);
    let address = host(&row, 0);
    let answer = node.at_client(move || ask(address, b"word"));
    assert_eq!(answer.expect("served"), b"word");
    let there = attached(&node);
    let ingress = format!("{} tcx Ingress", node.container.link);
    let order: Vec<_> = there
        .lines()
        .filter(|it| it.starts_with(&ingress))
        .collect();
    assert!(
        matches!(order[..], [first, second] if first.ends_with("from_container") && second.ends_with("sweep")),
        "{there}"
    );
    drop(other);
}

/// The kernel has room for 63 programs on each side of an interface, and tells nobody when one goes.
#[test]
fn a_guard_for_which_there_was_no_room_comes_soon() {
    if !may_use_bpf() {
        return;
    }
    if !knows_links() {
        harness::skip::here("no tcx before Linux 6.6", false);
        return;
    }
    let mut node = Node::new();
    until("the programs of the node", || {
        attached(&node).contains("to_container").then_some(())
    })
    .expect("attached");
    let late = node.network.container(3).expect("another container");
    let (link, pins) = (late.link.clone(), pins(&node));
    let others = within(&node.network.host, move || {
        let other = |_| {
            let mut object = EbpfLoader::new()
                .default_map_pin_directory(&pins)
                .load(ebpf::nat())
                .expect("programs");
            let program = object.program_mut(ebpf::program::SWEEP).expect("one");
            let program: &mut SchedClassifier = program.try_into().expect("of this kind");
            program.load().expect("loaded");
            program.attach(&link, TcAttachType::Egress).ok()?;
            Some(object)
        };
        (0..64).map_while(other).collect::<Vec<_>>()
    });
    let others = others.expect("the host's namespace");
    assert!(others.len() < 64, "there is room for all");
    let row = late.row(ContainerId([8; 32]));
    let id = row.container_id;
    node.control
        .write(|batch| batch.put_container(row))
        .expect("known");
    node.control.sample(id, |_| true).expect("it is known");
    let guard = format!("{} tcx Egress to_container", late.link);
    assert!(!attached(&node).contains(&guard), "no room");
    drop(others);
    // All is looked at anew when the process has lived for half a minute.
    let guarded = || attached(&node).contains(&guard).then_some(());
    wait::until_blocking("the guard", Duration::from_secs(12), guarded).expect("attached");
}

#[test]
fn every_uplink_is_served_and_answered_by() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    let (client, host) = (&node.network.client, &node.network.host);
    for words in [
        format!("-n {host} link add up1 type veth peer name eth1 netns {client}"),
        format!("-n {host} addr add 10.78.8.1/24 dev up1"),
        format!("-n {client} addr add 10.78.8.2/24 dev eth1"),
        format!("-n {host} link set up1 up"),
        format!("-n {client} link set eth1 up"),
    ] {
        ip(&words).expect("another uplink");
    }
    served(&node, ([10, 78, 8, 1], row.host_port).into());
    served(&node, ([10, 78, 1, 1], row.host_port).into());
    answered_by_the_way_back(&node, &row);
    forgers_end_no_connection(&mut node);
    forgers_get_no_answers(&mut node);
    // The other goes; this one stays.
    let host = &node.network.host;
    ip(&format!("-n {host} link del up1")).expect("gone");
    served(&node, ([10, 78, 1, 1], row.host_port).into());
}

/// A client that comes in by an uplink that no route leads back to it by is the listener's, as the stack
/// answers by another one; from when there is a route it is not.
fn answered_by_the_way_back(node: &Node, row: &PortRow) {
    let (client, host) = (&node.network.client, &node.network.host);
    for (namespace, link) in [(host, "up1"), (client, "eth0"), (client, "eth1")] {
        // Packets of this client come in by another interface than the way back, here as there.
        let loose = move || {
            ["all", link]
                .map(|it| std::fs::write(format!("/proc/sys/net/ipv4/conf/{it}/rp_filter"), "0"))
        };
        let done = within(namespace, loose).expect("a namespace");
        done.into_iter().for_each(|it| it.expect("an option"));
    }
    ip(&format!("-n {client} addr add 10.99.0.5/32 dev lo")).expect("an address");
    let (own, address) = (
        "10.99.0.5:0",
        SocketAddr::from(([10, 78, 8, 1], row.host_port)),
    );
    let asked = move || {
        let mut stream = traffic::connect_from(own.parse().expect("an address"), address)?;
        let own = stream.local_addr()?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok::<_, std::io::Error>((text, own))
    };
    let (seen, _) = node.at_client(asked).expect("answered");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay: {seen}");
    ip(&format!(
        "-n {host} route add 10.99.0.0/24 via 10.78.8.2 dev up1"
    ))
    .expect("a route");
    let by_the_kernel = || {
        let (seen, own) = node.at_client(asked).ok()?;
        (seen == own.to_string()).then_some(())
    };
    until("the route being known", by_the_kernel).expect("by the kernel path");
    ip(&format!("-n {host} route del 10.99.0.0/24")).expect("gone");
    until("the route being forgotten", || {
        by_the_kernel().is_none().then_some(())
    })
    .expect("known");
    let (seen, _) = node.at_client(asked).expect("answered");
    assert!(seen.starts_with("10.78.2.1:"), "by the relay again: {seen}");
}

/// A socket of the client's address and port on one of its links.
fn on_link(kind: SockType, port: u16, link: &str) -> std::io::Result<OwnedFd> {
    let socket = socket::socket(AddressFamily::Inet, kind, SockFlag::empty(), None)?;
    socket::setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    socket::setsockopt(&socket, sockopt::BindToDevice, &link.into())?;
    let own = SocketAddrV4::new([10, 78, 1, 2].into(), port);
    socket::bind(socket.as_raw_fd(), &SockaddrIn::from(own))?;
    Ok(socket)
}

/// One that speaks and hears there.
fn by_link(address: SocketAddr, port: u16, link: &str) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::from(on_link(SockType::Datagram, port, link)?);
    socket.set_read_timeout(Some(traffic::PATIENCE))?;
    socket.connect(address)?;
    Ok(socket)
}

/// What comes by another uplink in the name of a client has its answers go on by the client's, until a
/// route says that the client may be there.
fn forgers_get_no_answers(node: &mut Node) {
    let port = within(&node.container.namespace, || {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a port");
        let port = socket.local_addr().expect("bound").port();
        std::thread::spawn(move || {
            let mut word = [0; 64];
            while let Ok((length, peer)) = socket.recv_from(&mut word) {
                let _ = socket.send_to(&word[..length], peer);
            }
        });
        port
    });
    let mut row = node.container.port(port.expect("the container"));
    row.protocol = Protocol::Udp;
    node.lift(&row);
    let address = SocketAddr::from(([10, 78, 1, 1], row.host_port));
    let sockets = node.at_client(move || {
        let own = by_link(address, 0, "eth0")?;
        let port = own.local_addr()?.port();
        Ok::<_, std::io::Error>((by_link(address, port, "eth1")?, own))
    });
    let (forger, own) = sockets.expect("sockets");
    let mut word = [0; 64];
    own.send(b"begun").expect("sent");
    own.recv(&mut word).expect("answered");
    forger.send(b"forged").expect("sent");
    let length = own.recv(&mut word).expect("where the client is");
    assert_eq!(&word[..length], b"forged");
    ip(&format!(
        "-n {} route add 10.78.1.2/32 via 10.78.8.2 dev up1",
        node.network.host
    ))
    .expect("a route");
    let short = Some(Duration::from_millis(50));
    forger.set_read_timeout(short).expect("an option");
    until("the client being where it may be", || {
        forger.send(b"moved").expect("sent");
        forger.recv(&mut word).ok()
    })
    .expect("answered there");
}

/// A SYN that comes by another uplink in the name of a client leaves the client's connection be.
fn forgers_end_no_connection(node: &mut Node) {
    let row = node.container.port(echo(&node.container));
    node.lift(&row);
    let listener = SockaddrIn::from(SocketAddrV4::new([10, 78, 1, 1].into(), row.host_port));
    let passed = node.at_client(move || {
        let own = on_link(SockType::Stream, 0, "eth0")?;
        socket::connect(own.as_raw_fd(), &listener)?;
        let mut own = TcpStream::from(own);
        own.set_read_timeout(Some(traffic::PATIENCE))?;
        let port = own.local_addr()?.port();
        let mut say = |word: &[u8; 4]| {
            own.write_all(word)?;
            let mut heard = [0; 4];
            own.read_exact(&mut heard)?;
            Ok::<_, std::io::Error>(heard == *word)
        };
        let before = say(b"said")?;
        let forger = TcpStream::from(on_link(SockType::Stream, port, "eth1")?);
        forger.set_nonblocking(true)?;
        // It asks again after a second.
        let begun = socket::connect(forger.as_raw_fd(), &listener);
        std::thread::sleep(Duration::from_millis(1500));
        Ok::<_, std::io::Error>((before, begun, say(b"more")?))
    });
    let (before, begun, after) = passed.expect("still connected");
    assert_eq!(begun, Err(nix::errno::Errno::EINPROGRESS));
    assert!(before && after);
}

#[test]
fn a_vlan_is_an_uplink_of_its_own() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    let (client, host) = (&node.network.client, &node.network.host);
    for (namespace, link, address) in [
        (host, "up0", "10.78.7.1/24"),
        (client, "eth0", "10.78.7.2/24"),
    ] {
        let made = ip(&format!(
            "-n {namespace} link add link {link} name tag7 type vlan id 7"
        ));
        if let Err(err) = &made
            && !std::path::Path::new("/sys/module/8021q").exists()
            && (err.to_string().contains("Unknown device type")
                || err.to_string().contains("not supported"))
        {
            harness::skip::here("this kernel is built without VLANs", false);
            return;
        }
        made.expect("a VLAN");
        ip(&format!("-n {namespace} addr add {address} dev tag7")).expect("an address");
        ip(&format!("-n {namespace} link set tag7 up")).expect("up");
    }
    served(&node, ([10, 78, 7, 1], row.host_port).into());
    served(&node, ([10, 78, 1, 1], row.host_port).into());
}

#[test]
fn a_bridge_that_leads_to_other_machines_is_an_uplink() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    let (client, host) = (&node.network.client, &node.network.host);
    // A member that is no veth, as hardware is none.
    for words in [
        format!("-n {host} link add up1 type veth peer name eth1 netns {client}"),
        format!("-n {host} link set up1 up"),
        format!("-n {host} link add link up1 name lan0 type macvlan mode passthru"),
        format!("-n {host} link add lan address 02:42:0a:4e:09:01 type bridge"),
        format!("-n {host} link set lan0 master lan up"),
        format!("-n {host} addr add 10.78.9.1/24 dev lan"),
        format!("-n {host} link set lan up"),
        format!("-n {client} addr add 10.78.9.2/24 dev eth1"),
        format!("-n {client} link set eth1 up"),
    ] {
        ip(&words).expect("a bridge with another machine behind");
    }
    served(&node, ([10, 78, 9, 1], row.host_port).into());
    served(&node, ([10, 78, 1, 1], row.host_port).into());
}

#[test]
fn containers_of_two_bridges_are_served_and_stay_apart() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let first = node.container.port(mirror(&node.container));
    node.lift(&first);
    let other = node.network.bridged_elsewhere(2).expect("another bridge");
    let mut container = other.row(KERNEL);
    container.container_id = shared::ids::ContainerId([8; 32]);
    let id = container.container_id;
    node.control
        .write(|batch| batch.put_container(container))
        .expect("known");
    let mut second = other.port(mirror(&other));
    second.container_id = id;
    node.lift(&second);
    for row in [&first, &second] {
        served(&node, ([10, 78, 1, 1], row.host_port).into());
    }
    // From one bridge to a port of the other: the listener's, by the host's address there.
    let address: SocketAddr = ([10, 78, 3, 1], first.host_port).into();
    let inside = within(&other.namespace, move || told(address));
    let (text, own) = inside.expect("the container").expect("told");
    assert_ne!(text, own.to_string());
    assert!(text.starts_with("10.78.2.1:"), "by the relay: {text}");
}

fn survives_filters(node: &mut Node, row: &PortRow) {
    served(node, ([10, 78, 1, 1], row.host_port).into());
    node.kill();
    served(node, ([10, 78, 1, 1], row.host_port).into());
    node.restart();
    node.counted(row, |it| it.path == ForwardPath::KernelPath);
    served(node, ([10, 78, 1, 1], row.host_port).into());
}

/// Filters that somebody has taken away come back, and clients with them.
fn are_put_up_again(node: &Node, row: &PortRow) {
    let filters = || attached(node).matches("clsact/").count();
    let before = attached(node);
    let wanted = filters();
    let links = before.lines().filter(|line| line.contains("clsact/"));
    let links = links.filter_map(|line| Some(line.split_once('(')?.0));
    for link in links.collect::<BTreeSet<&str>>() {
        let mut tc = command(&node.network.host, "tc");
        let gone = tc.args(["qdisc", "del", "dev", link, "clsact"]).status();
        assert!(gone.expect("tc").success(), "{link}");
    }
    assert_eq!(filters(), 0, "of {wanted}");
    // They are looked after every 30 s.
    let again = || (filters() == wanted).then_some(());
    wait::until_blocking("the filters", Duration::from_secs(90), again).expect("put up again");
    served(node, ([10, 78, 1, 1], row.host_port).into());
}

#[test]
fn where_links_are_missing_filters_do_and_leave_no_trace() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::with("forward = \"auto\"\nkernel-attach = \"filters\"");
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    let there = attached(&node);
    assert!(there.contains("clsact/ingress from_uplink"), "{there}");
    assert!(!there.contains(" tcx "), "{there}");
    are_put_up_again(&node, &row);
    survives_filters(&mut node, &row);
    let there = attached(&node);
    assert_eq!(there.matches("from_uplink").count(), 1, "once: {there}");
    node.kill();
    let detach = node.place.command(&["detach"]).expect("detach").output();
    assert!(detach.expect("detach can be run").status.success());
    let left = attached(&node);
    assert!(
        !left.contains("_container") && !left.contains("from_"),
        "{left}"
    );
}

/// It would take the guard for a filter of packets that come in, without a word.
#[test]
fn no_guard_is_put_where_it_would_not_see_what_goes_out() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::with("forward = \"auto\"\nkernel-attach = \"filters\"");
    let container = node.network.container(9).expect("a container");
    let ingress = |what| {
        let mut tc = command(&node.network.host, "tc");
        tc.args(["qdisc", what, "dev", &container.link, "ingress"]);
        let done = tc.output().expect("tc can be run");
        assert!(done.status.success(), "{done:?}");
    };
    ingress("add");
    let known = container.row(ContainerId([9; 32]));
    node.control
        .write(|batch| batch.put_container(known))
        .expect("known");
    let at_link = || {
        let there = attached(&node);
        there.matches(&container.link).count()
    };
    wait::until_blocking("the refusal", Duration::from_secs(20), || {
        let log = node.process.log();
        log.contains("has no place for a filter").then_some(())
    })
    .expect("told");
    assert_eq!(at_link(), 0, "{}", attached(&node));
    ingress("del");
    wait::until_blocking("the guard", Duration::from_secs(20), || {
        (at_link() > 0).then_some(())
    })
    .expect("put up once it can be");
}

#[test]
fn a_container_that_comes_back_elsewhere_is_served_there() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    served(&node, ([10, 78, 1, 1], row.host_port).into());
    let again = node.network.container(7).expect("the container again");
    ip(&format!(
        "-n {} link del {}",
        node.network.host, node.container.link
    ))
    .expect("the old link goes");
    node.control
        .in_state(row.key(), PortState::Disabled)
        .expect("fails closed");
    let container = again.row(KERNEL);
    node.control
        .write(|batch| batch.put_container(container))
        .expect("known");
    let mut moved = again.port(mirror(&again));
    moved.host_port = row.host_port;
    node.lift(&moved);
    served(&node, ([10, 78, 1, 1], row.host_port).into());
}

#[test]
fn a_row_follows_its_link_and_its_container_though_no_row_of_a_port_changes() {
    if !may_use_bpf() {
        return;
    }
    const LINK: u32 = 4_000;
    let mut node = Node::new();
    let standing = node.container.port(mirror(&node.container));
    node.lift(&standing);
    let mut container = node.container.row(ContainerId([8; 32]));
    container.link_indexes = vec![LINK];
    let known = container.clone();
    node.control
        .write(|batch| batch.put_container(known))
        .expect("known");
    let mut row = node.container.port(standing.target_port);
    row.container_id = container.container_id;
    (row.link_index, row.link_guard) = (LINK, false);
    for sessions in [0, 5] {
        row.max_sessions = sessions;
        let reason = node.publish(&row).reason;
        assert!(reason.contains("interface 4000 is not here"), "{reason}");
    }
    let (host, other) = (node.network.host.clone(), node.container.namespace.clone());
    let is_by = |node: &mut Node, path, word: &str| {
        node.counted(&row, |it| it.path == path && it.reason.contains(word));
    };
    let lifted = |node: &mut Node| {
        node.counted(&row, |it| {
            it.path == ForwardPath::KernelPath && it.reason.is_empty()
        });
    };
    for words in [
        format!("-n {host} link add late index {LINK} type veth peer name late netns {other}"),
        format!("-n {host} link set late up"),
    ] {
        ip(&words).expect("the link");
    }
    lifted(&mut node);
    ip(&format!("-n {host} link set late down")).expect("down");
    is_by(&mut node, ForwardPath::Relay, "late is down");
    ip(&format!("-n {host} link set late up")).expect("up");
    lifted(&mut node);
    let mut wider = container.clone();
    wider.link_indexes.push(node.container.link_index);
    node.control
        .write(|batch| batch.put_container(wider))
        .expect("on two networks");
    is_by(&mut node, ForwardPath::Relay, "several networks");
    node.control
        .write(|batch| batch.put_container(container))
        .expect("on one");
    lifted(&mut node);
    ip(&format!("-n {host} link del late")).expect("gone");
    is_by(&mut node, ForwardPath::Relay, "is not here");
    let status = node.control.status(standing.key()).expect("a status");
    let is = (status.path, status.reason.as_str());
    assert_eq!(is, (ForwardPath::KernelPath, ""), "the other as ever");
}

#[test]
fn a_bridge_that_is_made_again_is_no_matter() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let row = node.container.port(mirror(&node.container));
    node.lift(&row);
    let (host, link) = (&node.network.host, &node.container.link);
    for words in [
        format!("-n {host} link del br0"),
        format!("-n {host} link add br0 address 02:42:0a:4e:02:02 type bridge"),
        format!("-n {host} addr add 10.78.2.1/24 dev br0"),
        format!("-n {host} link set br0 up"),
        format!("-n {host} link set {link} master br0"),
        format!("-n {} neigh flush dev eth0", node.container.namespace),
    ] {
        ip(&words).expect("the bridge again");
    }
    served(&node, ([10, 78, 1, 1], row.host_port).into());
    let port = row.host_port;
    let answer = within(host, move || told(([127, 0, 0, 1], port).into()));
    let (text, own) = answer.expect("the host").expect("told");
    assert_eq!(text, own.to_string(), "clients on the host, too");
}

#[test]
fn without_types_of_the_kernel_all_works() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    node.kill();
    let program = node.place.command(&[]).expect("the command");
    let words: Vec<_> = std::iter::once(program.get_program())
        .chain(program.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let mut hidden = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "slave", "sh", "-c"])
        .arg("mount -t tmpfs none /sys/kernel/btf && exec \"$@\"")
        .arg("sh")
        .args(&words)
        .stdin(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("bai-dataplane without BTF");
    let row = node
        .container
        .port(node.container.echo().expect("a server"));
    let status = node.publish(&row);
    let address: SocketAddr = ([10, 78, 1, 1], row.host_port).into();
    let answer = node.at_client(move || ask(address, b"x"));
    let _ = hidden.kill();
    let _ = hidden.wait();
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::KernelPath)
    );
    assert_eq!(answer.expect("served"), b"x");
}

#[test]
fn a_container_on_the_hosts_network_is_the_relays() {
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let id = shared::ids::ContainerId([7; 32]);
    let mut container = node.container.row(KERNEL);
    container.container_id = id;
    container.host_network = true;
    container.link_indexes.clear();
    node.control
        .write(|batch| batch.put_container(container))
        .expect("known");
    let port = within(&node.network.host, || {
        harness::traffic::echo_server("127.0.0.1:0").port()
    });
    let mut row = node.container.port(port.expect("the host"));
    row.container_id = id;
    row.target = [127, 0, 0, 1].into();
    row.link_index = 0;
    row.link_guard = false;
    let status = node.publish(&row);
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    assert!(
        status.reason.contains("host's network"),
        "{}",
        status.reason
    );
    let address: SocketAddr = ([10, 78, 1, 1], row.host_port).into();
    let answer = node.at_client(move || ask(address, b"x"));
    assert_eq!(answer.expect("served"), b"x");
}

/// What control takes a dataplane for dead after (control::link).
const TAKEN_FOR_DEAD: Duration = Duration::from_secs(4);

/// The word comes back by a flow.
fn goes_on(flow: &mut TcpStream) {
    flow.write_all(b"word").expect("sent");
    let mut back = [0; 4];
    flow.read_exact(&mut back).expect("echoed");
    assert_eq!(&back, b"word");
}

/// Holds the lock; where that can't be done, the test is left out.
fn hold() -> Option<InterfaceLock> {
    InterfaceLock::hold().expect("the interface lock")
}

/// Runs alone: it holds up every engine on the machine (.config/nextest.toml).
#[test]
fn a_held_interface_lock_stops_neither_life_nor_rows() {
    let Some((mut node, row)) = Node::serving(echo) else {
        return;
    };
    let address = host(&row, 0);
    let mut flow = node.flow(address);
    let other = node.network.container(7).expect("another container");
    let mut container = other.row(KERNEL);
    container.container_id = shared::ids::ContainerId([8; 32]);
    let mut fresh = other.port(mirror(&other));
    fresh.container_id = container.container_id;
    let fresh_address = host(&fresh, 0);
    let waits = |it: &PortStatus| {
        let way = (it.state, it.path) == (PortState::Serving, ForwardPath::Relay);
        way && it.reason.contains("interface lock")
    };

    // A process that starts meanwhile leaves alone what another one has left.
    let mut removed = row.clone();
    removed.host_port = free_port();
    removed.drain = Drain::Within { ms: 60_000 };
    node.lift(&removed);
    let (key, removed) = (removed.key(), host(&removed, 0));
    let mut ended = node.flow(removed);
    let mut filtered = row.clone();
    filtered.host_port = free_port();
    node.lift(&filtered);
    let mut let_in = node.flow(host(&filtered, 0));
    node.kill();
    filtered.honour_firewall = true;
    let change = filtered.clone();
    node.control
        .write(|batch| batch.put_port(change))
        .expect("the firewall decides");
    let Some(mut lock) = hold() else {
        return;
    };
    goes_on(&mut ended);
    node.restart();
    node.counted(&row, waits);
    goes_on(&mut flow);
    let decides = |it: &PortStatus| {
        it.path == ForwardPath::Relay && it.reason.contains("the host's firewall")
    };
    node.counted(&filtered, decides);
    goes_on(&mut let_in);
    // Until its row goes.
    node.control
        .write(|batch| batch.remove_port(key))
        .expect("asked");
    let state = node.control.in_state(key, PortState::Removed);
    assert_eq!(state.expect("removed").bytes_in, 10);
    node.at_client(move || ask(removed, b"x"))
        .expect_err("nobody there");
    node.control.release();
    let answer = node.at_client(move || ask(address, b"new"));
    assert_eq!(answer.expect("served"), b"new");
    lock.held().expect("all the time");
    drop(lock);
    node.counted(&row, |it| {
        it.path == ForwardPath::KernelPath && it.reason.is_empty()
    });
    goes_on(&mut flow);
    node.counted(&filtered, decides);
    goes_on(&mut let_in);
    node.control.withdraw(filtered.key()).expect("withdrawn");

    // One that runs takes on a container that it has never seen: the relay's until the kernel has time.
    let Some(mut lock) = hold() else {
        return;
    };
    node.control
        .write(|batch| batch.put_container(container))
        .expect("known");
    let status = node.publish(&fresh);
    assert_eq!(
        (status.state, status.path),
        (PortState::Serving, ForwardPath::Relay)
    );
    node.counted(&fresh, waits);
    let (seen, own) = node.at_client(move || told(fresh_address)).expect("served");
    assert_ne!(seen, own.to_string(), "by the relay");
    // What was on the kernel path stays there until its row goes.
    goes_on(&mut flow);
    node.control.withdraw(row.key()).expect("withdrawn");
    node.at_client(move || ask(address, b"x"))
        .expect_err("nobody there");
    // Alive, as control sees it, for longer than it takes a silent one for dead.
    let mut oldest = Duration::ZERO;
    while lock.held().expect("all the time") < TAKEN_FOR_DEAD + Duration::from_millis(1_200) {
        let life = node.control.observed.writer().expect("the region");
        let age = shared::monotonic_ns().saturating_sub(life.heartbeat_monotonic_ns);
        oldest = oldest.max(Duration::from_nanos(age));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(oldest < TAKEN_FOR_DEAD, "no sign of life for {oldest:?}");
    drop(lock);
    node.counted(&fresh, |it| it.path == ForwardPath::KernelPath);
    served(&node, fresh_address);
    // The program of the row that went is gone too, and the new one's guard is there.
    until("the programs where they belong", || {
        let there = attached(&node);
        let at = |link: &str, program: &str| {
            let mut lines = there.lines();
            lines.any(|line| line.starts_with(link) && line.contains(program))
        };
        let gone = !at(&node.container.link, "from_container");
        (gone && at(&other.link, "to_container")).then_some(())
    })
    .expect("settled");

    // Nor does one that starts with another layout take anything from the programs that it finds. Filters are
    // told apart by its number, which theirs would still have.
    if !knows_links() {
        return;
    }
    let mut last = other.port(echo(&other));
    last.container_id = fresh.container_id;
    node.lift(&last);
    let mut flow = node.flow(host(&last, 0));
    goes_on(&mut flow);
    node.kill();
    let now = pins(&node);
    std::fs::rename(&now, now.with_file_name("v0")).expect("another layout's");
    let Some(mut lock) = hold() else {
        return;
    };
    node.restart();
    node.counted(&last, waits);
    goes_on(&mut flow);
    lock.held().expect("all the time");
    drop(lock);
    node.counted(&last, |it| it.path == ForwardPath::KernelPath);
    goes_on(&mut flow);
}

/// Its answers to clients there don't pass this host.
#[test]
fn a_container_that_is_on_the_clients_network_too_is_the_relays_and_counted_on_both() {
    let Some((mut node, row)) = Node::with_echo() else {
        return;
    };
    let (outer, inner) = (&node.network.host, &node.container.namespace);
    for words in [
        format!("-n {outer} link add mv0 link up0 type macvlan mode bridge"),
        format!("-n {outer} link set mv0 netns {inner} name eth1"),
        format!("-n {inner} addr add 10.78.1.9/24 dev eth1"),
        format!("-n {inner} link set eth1 up"),
        format!("-n {inner} neigh add 10.78.1.77 lladdr 02:00:00:00:00:77 dev eth1"),
    ] {
        ip(&words).expect("a macvlan");
    }
    let mut container = node.container.row(KERNEL);
    container.past_host = true;
    node.control
        .write(|batch| batch.put_container(container))
        .expect("written");
    node.publish(&row);
    node.counted(&row, |it| {
        it.path == ForwardPath::Relay && it.reason.contains("several networks")
    });
    let address = host(&row, 0);
    let answer = node.at_client(move || ask(address, b"word"));
    assert_eq!(answer.expect("by the relay"), b"word");

    let send = "exec dd if=/dev/zero bs=1400 count=2000 status=none >/dev/udp/10.78.1.77/9";
    let sent = command(&node.container.namespace, "bash")
        .args(["-c", send])
        .status();
    assert!(sent.expect("bash").success());
    // With their headers, and once.
    let bytes = Some(2000 * 1442)..Some(3000 * 1442);
    let sample = node
        .control
        .sample(KERNEL, |it| it.net.counters.tx_packets >= Some(2000));
    let counters = sample.expect("what it has sent").net.counters;
    assert!(bytes.contains(&counters.tx_bytes), "{counters:?}");
}
