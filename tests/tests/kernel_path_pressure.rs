//! The kernel path under more than it can hold: flows beyond its table, thousands of ports, clients
//! that come too fast.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use aya::EbpfLoader;
use aya::maps::{Array, HashMap, MapData};
use aya::programs::{ProgramFd, SchedClassifier};
use ebpf::records::{Flow, FlowKey, SweepOrder};
use harness::dataplane::until;
use harness::kernel_path::{Node, ask, host, pins};
use harness::remote_client::{Container, HOST, may_use_bpf, within};
use harness::traffic;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use shared::Sizes;
use shared::desired::PortRow;
use shared::ids::ContainerId;
use shared::observed::{ForwardPath, PortState};

fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2);
    words
        .map(|it| u32::from(it[0]) << 8 | u32::from(it.get(1).copied().unwrap_or(0)))
        .sum()
}

fn fold(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).expect("folded")).to_be_bytes()
}

/// The first segment of a connection.
const SYN: u8 = 2;
/// The end of one.
const RST: u8 = 4;
/// `FLOW_HALF_OPEN` of the kernel path's records.
const HALF_OPEN: u16 = 128;
/// One from its middle: to a table that has lost it, a flow to make again.
const ACK: u8 = 16;

fn segment(from: Ipv4Addr, from_port: u16, to: Ipv4Addr, port: u16, flags: u8) -> Vec<u8> {
    // The kernel puts in length and sum of this header.
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    let mut tcp = Vec::new();
    tcp.extend(from_port.to_be_bytes());
    tcp.extend(port.to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0]);
    let check = fold(sum(&tcp) + sum(&packet[12..20]) + 6 + 20);
    tcp[16..18].copy_from_slice(&check);
    packet.extend(tcp);
    packet
}

/// Sends segments of `count` connections that nobody has.
fn flood(row: &PortRow, count: u32, flags: u8) {
    let clients = (0..count).map(|number| {
        let from = Ipv4Addr::from(0xac10_0001 + number / 50_000);
        let from_port = u16::try_from(1_024 + number % 50_000).expect("a port");
        (from, from_port)
    });
    forge(row, clients, flags);
}

/// Sends one segment in the name of each of these.
fn forge(row: &PortRow, clients: impl IntoIterator<Item = (Ipv4Addr, u16)>, flags: u8) {
    let raw = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::empty(),
        SockProtocol::Raw,
    )
    .expect("a raw socket");
    let to: Ipv4Addr = HOST[0].parse().expect("an address");
    let address = SockaddrIn::from(std::net::SocketAddrV4::new(to, 0));
    for (from, from_port) in clients {
        let packet = segment(from, from_port, to, row.host_port, flags);
        let sent = sendto(raw.as_raw_fd(), &packet, &address, MsgFlags::empty());
        assert_eq!(sent.expect("sent"), packet.len());
    }
}

#[test]
fn a_flow_that_fell_out_of_a_full_table_goes_on() {
    let Some((mut node, row)) = Node::with_echo() else {
        return;
    };
    node.lift(&row);
    let address = host(&row, 0);
    let mut old = node.flow(address);
    // More than twice what the table holds, all younger than the flow that is silent meanwhile.
    let target = row.clone();
    node.at_client(move || flood(&target, 300_000, ACK));
    old.write_all(b"after").expect("sent");
    let mut back = [0; 5];
    old.read_exact(&mut back).expect("the flow goes on");
    assert_eq!(&back, b"after");
    let answer = node
        .at_client(move || ask(address, b"new"))
        .expect("a new flow");
    assert_eq!(answer, b"new");
    let status = node.counted(&row, |it| it.bytes_out >= 14);
    assert_eq!(status.path, ForwardPath::KernelPath);
    // The container refuses all the others. A busy machine drops packets, refusals too: once more then.
    until("the others being over", || {
        let target = row.clone();
        node.at_client(move || flood(&target, 300_000, ACK));
        let looked = std::time::Instant::now();
        // A sweep, which counts, comes every five seconds.
        while looked.elapsed() < Duration::from_secs(7) {
            if node.control.status(row.key())?.sessions_active <= 1 {
                return Some(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    })
    .expect("refused");
}

/// A server of echoes that does not end what its client has ended.
fn reluctant(container: &Container) -> u16 {
    within(&container.namespace, || {
        let listener = traffic::listener("[::]:0");
        let port = listener.local_addr().expect("bound").port();
        thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                let mut stream = stream.expect("a client");
                kept.push(stream.try_clone().expect("a descriptor"));
                thread::spawn(move || {
                    let mut buffer = [0; 64];
                    while let Ok(length @ 1..) = stream.read(&mut buffer) {
                        let _ = stream.write_all(&buffer[..length]);
                    }
                });
            }
        });
        port
    })
    .expect("the container's namespace")
}

/// Sweeps in the place of a dataplane, which does not live meanwhile.
struct Sweeper {
    program: ProgramFd,
    orders: Array<MapData, SweepOrder>,
    flows: HashMap<MapData, FlowKey, Flow>,
}

impl Sweeper {
    fn at(pins: &Path) -> anyhow::Result<Self> {
        let mut object = EbpfLoader::new()
            .default_map_pin_directory(pins)
            .load(ebpf::nat())?;
        let mut map = |name: &str| object.take_map(name).context("a map");
        let (orders, flows) = (map(ebpf::map::ORDERS)?, map(ebpf::map::FLOWS)?);
        let program = object.program_mut(ebpf::program::SWEEP);
        let program: &mut SchedClassifier = program.context("the program")?.try_into()?;
        program.load()?;
        Ok(Self {
            program: program.fd()?.try_clone()?,
            orders: orders.try_into()?,
            flows: flows.try_into()?,
        })
    }

    /// How many flows are left.
    fn left(&mut self, order: SweepOrder) -> usize {
        self.orders.set(0, order, 0).expect("an order");
        dataplane::sys::bpf::run_once(&self.program).expect("a sweep");
        self.flows.keys().count()
    }
}

#[test]
fn flows_that_nobody_confirms_or_that_one_side_has_ended_do_not_hold_a_port_for_days() {
    const MOST: u32 = 8;
    if !may_use_bpf() {
        return;
    }
    let mut node = Node::new();
    let mut row = node.container.port(reluctant(&node.container));
    row.max_sessions = MOST;
    node.lift(&row);
    let address = host(&row, 0);
    let mut open = node.flow(address);
    // A stranger says in the client's name that it begins anew, and that it has ended: the container knows
    // better.
    let own = open.local_addr().expect("an address");
    let IpAddr::V4(client) = own.ip() else {
        panic!("{own}");
    };
    let mut sweeper = Sweeper::at(&pins(&node)).expect("a sweep");
    let half_open = |sweeper: &Sweeper| {
        let flows = sweeper.flows.iter().flatten();
        flows
            .filter(|(_, flow)| flow.flags & HALF_OPEN != 0)
            .count()
    };
    let target = row.clone();
    let began = node.counted(&row, |it| it.sessions_total == 1);
    node.at_client(move || forge(&target, [(client, own.port())], SYN));
    node.counted(&row, |it| it.sessions_total > began.sessions_total);
    until("the container's word that it has the connection", || {
        (half_open(&sweeper) == 0).then_some(())
    })
    .expect("confirmed");
    let target = row.clone();
    node.at_client(move || forge(&target, [(client, own.port())], RST));
    node.counted(&row, |it| it.sessions_active == 0);
    until("the container going on with it", || {
        open.write_all(b"on").expect("sent");
        open.read_exact(&mut [0; 2]).expect("the flow goes on");
        (node.control.status(row.key())?.sessions_active == 1).then_some(())
    })
    .expect("counted again");
    let half_closed = node.flow(address);
    half_closed.shutdown(Shutdown::Write).expect("ended");
    let target = row.clone();
    node.at_client(move || {
        // The container answers all of them, and nobody hears it.
        flood(&target, MOST - 3, SYN);
        // Nobody has this address: the container can't say that it knows of no such connection.
        let neighbour = Ipv4Addr::new(10, 78, 2, 200);
        forge(&target, [(neighbour, 2_000)], ACK);
        // Nobody can have these.
        let nobodys = [[127, 0, 0, 9], [224, 0, 0, 9]];
        forge(&target, nobodys.map(|it| (it.into(), 2_000)), ACK);
    });
    node.counted(&row, |it| it.sessions_active == u64::from(MOST));
    let served = move || {
        let talk = |mut stream: TcpStream| {
            stream.write_all(b"new")?;
            stream.read_exact(&mut [0; 3])
        };
        traffic::connect(address).and_then(talk).is_ok()
    };
    until("the port being full", || {
        (!node.at_client(served)).then_some(())
    })
    .expect("its limit holds");
    node.kill();

    let hour = 3600 * 1_000_000_000;
    let mut order = SweepOrder {
        opening_ns: hour,
        closing_s: 3600,
        idle_ns: hour,
        ended_ns: hour,
        pass: 1 << 31,
        ..SweepOrder::default()
    };
    let mut sweep = |order: &mut SweepOrder| {
        order.pass += 1;
        sweeper.left(*order)
    };
    assert_eq!(sweep(&mut order), 8, "all are young");
    // The clock of flows ticks some hundred times a second.
    let mut left = |what: &str, wanted: usize, order: &mut SweepOrder| {
        until(what, || (sweep(order) <= wanted).then_some(())).expect(what);
        assert_eq!(sweep(order), wanted, "{what}");
    };
    order.opening_ns = 0;
    left("those that nobody has confirmed being over", 3, &mut order);
    order.closing_s = 0;
    left(
        "the one that its client has ended, and the one that was never answered, being over",
        1,
        &mut order,
    );
    node.restart();
    assert_eq!(
        node.counted(&row, |it| it.sessions_active == 1).path,
        ForwardPath::KernelPath
    );
    assert!(node.at_client(served), "there is room");
    open.write_all(b"after").expect("sent");
    open.read_exact(&mut [0; 5]).expect("the flow goes on");
    node.kill();
    order.idle_ns = 0;
    left("the last being silent", 0, &mut order);
    // What was lost is made again.
    open.write_all(b"after").expect("sent");
    open.read_exact(&mut [0; 5]).expect("the flow goes on");
}

#[test]
fn rows_that_nothing_has_changed_for_are_not_worked_on() {
    if !may_use_bpf() {
        return;
    }
    const STANDING: u16 = 60;
    const ROUNDS: usize = 5;
    let mut node = Node::new();
    let port = node.container.echo().expect("a server");
    let rows: Vec<PortRow> = (0..STANDING)
        .map(|number| PortRow {
            host_port: 20_000 + number,
            ..node.container.port(port)
        })
        .collect();
    let wanted = rows.clone();
    node.control
        .write(|batch| wanted.into_iter().for_each(|row| batch.put_port(row)))
        .expect("written");
    for row in &rows {
        node.counted(row, |it| it.path == ForwardPath::KernelPath);
    }
    let other = node.network.container(3).expect("another container");
    let port = other.echo().expect("a server");
    let begun = node.process.log().len();
    for round in 0..ROUNDS {
        let id = ContainerId([100 + u8::try_from(round).expect("few"); 32]);
        let (container, row) = (
            other.row(id),
            PortRow {
                host_port: 21_000,
                container_id: id,
                ..other.port(port)
            },
        );
        let key = row.key();
        let wanted = row.clone();
        node.control
            .write(|batch| {
                batch.put_container(container);
                batch.put_port(wanted);
            })
            .expect("written");
        node.counted(&row, |it| it.path == ForwardPath::KernelPath);
        node.control
            .write(|batch| {
                batch.remove_port(key);
                batch.remove_container(id);
            })
            .expect("written");
        node.counted(&row, |it| it.state == PortState::Removed);
        until("control being told", || {
            let observed = node.control.observed.snapshot().ok()?;
            (node.control.desired.release_acknowledged(&observed) > 0).then_some(())
        })
        .expect("released");
    }
    let log = node.process.log();
    let told = |words: &str, field: &str| -> Vec<(usize, bool)> {
        let lines = log[begun..].lines().filter(|line| line.contains(words));
        let number = |line: &str| -> Option<usize> {
            let (_, rest) = line.split_once(" ports=")?;
            rest.split(' ').next()?.parse().ok()
        };
        let all = format!(" {field}=true");
        lines
            .map(|line| (number(line).expect("ports"), line.contains(&all)))
            .collect()
    };
    let read = told("rows of the desired region are read", "whole");
    let looked = told("paths of ports are looked at", "all");
    // Twice a minute it is all of them.
    let walks = read.iter().filter(|(_, whole)| *whole).count();
    let whole = looked.iter().filter(|(_, all)| *all).count();
    assert!(whole <= walks + 1, "{looked:?}");
    for told in [read, looked] {
        let ports = told.iter().filter(|(_, all)| !*all);
        let ports: usize = ports.map(|(ports, _)| *ports).sum();
        assert!((ROUNDS..usize::from(STANDING)).contains(&ports), "{told:?}");
    }
}

#[test]
fn thousands_of_ports_are_served_and_removed() {
    if !may_use_bpf() {
        return;
    }
    const PORTS: u16 = 3_000;
    const FIRST: u16 = 20_000;
    let mut node = Node::sized(
        "forward = \"auto\"",
        Sizes {
            ports: u32::from(PORTS),
            ..Sizes::default()
        },
    );
    let port = node.container.echo().expect("a server");
    let rows: Vec<PortRow> = (0..PORTS)
        .map(|number| {
            let mut row = node.container.port(port);
            // Nobody else is in this namespace.
            row.host_port = FIRST + number;
            row
        })
        .collect();
    let wanted = rows.clone();
    let generation = node
        .control
        .write(|batch| wanted.into_iter().for_each(|row| batch.put_port(row)))
        .expect("written");
    let region = node.control.desired.region_id();
    until("all ports being answered", || {
        let snapshot = node.control.observed.snapshot().ok()?;
        rows.iter()
            .all(|row| {
                snapshot.port(row.key()).is_some_and(|it| {
                    it.answers(region, generation) && it.path == ForwardPath::KernelPath
                })
            })
            .then_some(())
    })
    .expect("all on the kernel path");
    let addresses: Vec<_> = rows.iter().map(|row| host(row, 0)).collect();
    node.at_client(move || {
        for address in addresses {
            let answer = ask(address, b"x").expect("each port answers");
            assert_eq!(answer, b"x");
        }
    });
    until("each port having counted its client", || {
        let snapshot = node.control.observed.snapshot().ok()?;
        let counted = |row: &PortRow| {
            let status = snapshot.port(row.key());
            // What a busy machine sends again counts again.
            status.is_some_and(|it| it.sessions_total == 1 && it.bytes_in > 0 && it.bytes_out > 0)
        };
        rows.iter().all(counted).then_some(())
    })
    .expect("all counted");
    let keys: Vec<_> = rows.iter().map(PortRow::key).collect();
    node.control
        .write(|batch| keys.into_iter().for_each(|key| batch.remove_port(key)))
        .expect("written");
    until("all ports being removed", || {
        let snapshot = node.control.observed.snapshot().ok()?;
        rows.iter()
            .all(|row| {
                snapshot
                    .port(row.key())
                    .is_none_or(|it| it.state == PortState::Removed)
            })
            .then_some(())
    })
    .expect("nothing left");
    let last = host(&rows[2_999], 0);
    let refused = node.at_client(move || TcpStream::connect(last));
    assert!(refused.is_err());
}

#[test]
fn new_connections_beyond_a_ports_rate_are_turned_away_and_counted() {
    let Some((mut node, mut row)) = Node::with_echo() else {
        return;
    };
    row.new_per_second = 20;
    node.lift(&row);
    let address = host(&row, 0);
    // So many at once that the rate is passed however slowly they are sent; nobody waits for answers.
    node.at_client(move || {
        for _ in 0..300 {
            let _ = TcpStream::connect_timeout(&address, Duration::from_millis(1));
        }
    });
    let status = node.counted(&row, |it| it.sessions_refused >= 3);
    assert!(status.sessions_total >= 20, "a burst is let in: {status:?}");
    // Clients on the host have the same limit and are told at once.
    let own: std::net::SocketAddr = ([127, 0, 0, 1], row.host_port).into();
    let err = within(&node.network.host, move || {
        // All of them stay open, which costs less than to end each.
        let mut kept = Vec::new();
        loop {
            match TcpStream::connect(own) {
                Ok(stream) => kept.push(stream),
                Err(err) => return err,
            }
        }
    });
    assert_eq!(
        err.expect("the host").kind(),
        std::io::ErrorKind::PermissionDenied
    );
    // The rate is of the long run: later there is room again.
    until("room again", || {
        let answer = node.at_client(move || {
            let wait = Duration::from_millis(500);
            TcpStream::connect_timeout(&address, wait).ok()
        });
        answer.map(drop)
    })
    .expect("served again");
}
