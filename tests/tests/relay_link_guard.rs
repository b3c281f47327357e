//! A port whose container's link is gone reaches nobody: Docker gives addresses out again, and a
//! dead kernel's port must never lead to a stranger. The dataplane sees to it alone.

use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use harness::dataplane::{Control, Options, Place, Process, row_to, until};
use harness::netns::{CONTAINER_ADDRESS, HOST_ADDRESS, VethPair, ip};
use shared::desired::{Drain, PortRow};
use shared::observed::PortState;

const HOST_LOOPBACK: &str = "127.0.0.1";

struct Guarded {
    pair: VethPair,
    _place: Place,
    _process: Process,
    control: Control,
    row: PortRow,
    server: Child,
}

/// Conversations run inside the host-side namespace by a shell, line by line.
struct Client {
    child: Child,
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An echo server of the standard library, in the container's namespace.
const SERVER: &str = "
import socketserver
class H(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            d = self.request.recv(4096)
            if not d: return
            self.request.sendall(d)
class S(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
S(('0.0.0.0', 7000), H).serve_forever()
";

/// Echoes its input lines through a connection; says how the connection ended.
const CLIENT: &str = "
import socket, sys
try:
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20)
    for line in sys.stdin:
        s.sendall(line.encode())
        d = s.recv(4096)
        if not d: raise EOFError('end')
        print('echo', flush=True)
    d = s.recv(4096)
    print('end' if not d else 'data', flush=True)
except Exception as e:
    print(type(e).__name__, flush=True)
";

fn guarded(name: &str) -> Option<Guarded> {
    let pair = VethPair::new(name).expect("namespaces")?;
    let server = pair
        .in_container("python3")
        .args(["-c", SERVER])
        .spawn()
        .expect("a server in the container");
    let place = Place::new(Options {
        namespace: Some(pair.host.clone()),
        node: harness::relay::setting_alone(module_path!()),
        ..Options::default()
    })
    .expect("a place");
    let control = place.control().expect("the desired region");
    let process = place.start().expect("bai-dataplane");
    let target: SocketAddr = format!("{CONTAINER_ADDRESS}:7000")
        .parse()
        .expect("an address");
    let mut row = row_to(target);
    // An address that stays when the link goes.
    row.bind = HOST_LOOPBACK.parse().expect("an address");
    row.host_port = 30_000;
    row.link_index = pair.host_index;
    row.link_guard = true;
    Some(Guarded {
        pair,
        _place: place,
        _process: process,
        control,
        row,
        server,
    })
}

impl Guarded {
    fn client(&self) -> Client {
        let child = self
            .pair
            .in_host("python3")
            .args(["-c", CLIENT, HOST_LOOPBACK, "30000"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a client");
        Client { child }
    }
}

impl Client {
    fn say(&mut self) {
        let input = self.child.stdin.as_mut().expect("piped");
        // A client that has seen the end is gone; what it said tells.
        let _ = input.write_all(b"hello\n");
    }

    fn hear(&mut self) -> String {
        let output = self.child.stdout.as_mut().expect("piped");
        let mut text = Vec::new();
        let mut byte = [0];
        loop {
            match output.read(&mut byte) {
                Ok(0) => break,
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) => text.push(byte[0]),
                Err(err) if err.kind() == ErrorKind::Interrupted => {}
                Err(err) => panic!("the client's words: {err}"),
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn converse(&mut self) -> String {
        self.say();
        self.hear()
    }
}

#[test]
fn a_vanished_link_cuts_sessions_and_refuses_new_ones_without_control() {
    let Some(mut world) = guarded("gone") else {
        return;
    };
    let row = world.row.clone();
    let status = world.control.publish(row.clone()).expect("an answer");
    assert_eq!(status.state, PortState::Serving, "{}", status.reason);
    let mut session = until("a conversation", || {
        let mut client = world.client();
        (client.converse() == "echo").then_some(client)
    })
    .expect("the service");

    // Nobody rings and nobody writes from here on: the dataplane is alone.
    world.pair.delete_link().expect("the link's end");
    let status = world
        .control
        .in_state(row.key(), PortState::Disabled)
        .expect("disabled");
    assert!(
        status.reason.contains(&row.link_index.to_string()),
        "{}",
        status.reason
    );
    assert_eq!(
        session.converse(),
        "ConnectionResetError",
        "the session is cut"
    );

    // The address is given to a stranger, over another link.
    let (host, container) = (world.pair.host.clone(), world.pair.container.clone());
    ip(&format!(
        "-n {host} link add vhost2 type veth peer name eth1 netns {container}"
    ))
    .expect("another link");
    ip(&format!("-n {host} addr add {HOST_ADDRESS}/24 dev vhost2")).expect("an address");
    ip(&format!(
        "-n {container} addr add {CONTAINER_ADDRESS}/24 dev eth1"
    ))
    .expect("an address");
    ip(&format!("-n {host} link set vhost2 up")).expect("up");
    ip(&format!("-n {container} link set eth1 up")).expect("up");
    let direct = until("the stranger being reachable", || {
        let mut client = Client {
            child: world
                .pair
                .in_host("python3")
                .args(["-c", CLIENT, CONTAINER_ADDRESS, "7000"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .ok()?,
        };
        (client.converse() == "echo").then_some(())
    });
    direct.expect("the address answers again");
    let mut client = world.client();
    let answer = client.converse();
    assert!(
        answer == "ConnectionResetError" || answer == "BrokenPipeError",
        "a stranger was reached: {answer}"
    );

    // Control resolves the container anew: the row is served over the new link.
    let text = ip(&format!("-n {host} -o link show vhost2")).expect("the link");
    let mut fresh = row.clone();
    fresh.link_index = text
        .split(':')
        .next()
        .and_then(|it| it.trim().parse().ok())
        .expect("an index");
    let status = world.control.publish(fresh).expect("an answer");
    assert_eq!(status.state, PortState::Serving, "{}", status.reason);
    assert_eq!(world.client().converse(), "echo");
}

#[test]
fn a_row_over_a_link_that_is_gone_already_is_never_served() {
    let Some(mut world) = guarded("never") else {
        return;
    };
    let mut row = world.row.clone();
    row.link_index = 4_000_000;
    let status = world.control.publish(row.clone()).expect("an answer");
    assert_eq!(status.state, PortState::Disabled);
    let answer = world.client().converse();
    assert_ne!(answer, "echo");
    world
        .control
        .withdraw(row.key())
        .expect("it can be removed");
}

#[test]
fn leaving_a_bridge_does_not_disable_a_port() {
    let Some(mut world) = guarded("bridge") else {
        return;
    };
    let host = world.pair.host.clone();
    ip(&format!("-n {host} link add br0 type bridge")).expect("a bridge");
    ip(&format!("-n {host} link set br0 up")).expect("up");
    ip(&format!("-n {host} link set vhost master br0")).expect("into the bridge");
    let status = world.control.publish(world.row.clone()).expect("an answer");
    assert_eq!(status.state, PortState::Serving);
    ip(&format!("-n {host} link set vhost nomaster")).expect("out of the bridge");
    ip(&format!("-n {host} link del br0")).expect("no bridge");
    until("a conversation", || {
        (world.client().converse() == "echo").then_some(())
    })
    .expect("served");
    let status = world.control.status(world.row.key()).expect("a status");
    assert_eq!(status.state, PortState::Serving, "{}", status.reason);
}

#[test]
fn draining_sessions_end_with_the_link_too() {
    let Some(mut world) = guarded("drain") else {
        return;
    };
    let mut row = world.row.clone();
    row.drain = Drain::Within { ms: 600_000 };
    world.control.publish(row.clone()).expect("an answer");
    let mut session = until("a conversation", || {
        let mut client = world.client();
        (client.converse() == "echo").then_some(client)
    })
    .expect("the service");
    world
        .control
        .write(|batch| batch.remove_port(row.key()))
        .expect("written");
    world
        .control
        .in_state(row.key(), PortState::Draining)
        .expect("draining");
    assert_eq!(session.converse(), "echo");
    world.pair.delete_link().expect("the link's end");
    world
        .control
        .in_state(row.key(), PortState::Removed)
        .expect("cut with the link");
    assert_eq!(session.converse(), "ConnectionResetError");
}
