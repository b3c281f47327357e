//! A node with the kernel path in namespaces, for the suites that look at it from all sides.
//!
//! In: nothing. Out: a running dataplane whose rows the test writes. Invariant: nothing stays attached
//! when the handle goes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;

use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use shared::Sizes;
use shared::desired::PortRow;
use shared::ids::ContainerId;
use shared::observed::{ForwardPath, PortState, PortStatus};

use crate::dataplane::{Control, Options, Place, Process, until};
use crate::netns::ip;
use crate::remote_client::{Container, HOST, Network, command, may_use_bpf, within};
use crate::traffic;
pub use crate::traffic::ask;

/// The container's id.
pub const KERNEL: ContainerId = ContainerId([9; 32]);

/// A host with a container, its dataplane with the kernel path, and the test as control. The order is
/// that of their ends.
#[derive(Debug)]
pub struct Node {
    /// The dataplane.
    pub process: Process,
    /// The test's ends of the regions.
    pub control: Control,
    /// Where it runs.
    pub place: Place,
    /// The container.
    pub container: Container,
    /// All of the network.
    pub network: Network,
}

impl Node {
    /// Everything, with the container's row written.
    pub fn new() -> Self {
        Self::with("forward = \"auto\"")
    }

    /// The same with these lines in the configuration's `[node]`.
    pub fn with(lines: &str) -> Self {
        Self::sized(lines, Sizes::default())
    }

    /// The same with tables of these sizes.
    pub fn sized(lines: &str, sizes: Sizes) -> Self {
        let network = Network::new().expect("namespaces");
        let container = network.container(2).expect("a container");
        let place = Place::new(Options {
            node: lines.to_owned(),
            dataplane: "stats-interval = 0.1".to_owned(),
            namespace: Some(network.host.clone()),
            ..Options::default()
        })
        .expect("a place");
        let mut control = place.control_sized(sizes).expect("the desired region");
        let process = place.start().expect("bai-dataplane");
        let row = container.row(KERNEL);
        control
            .write(|batch| batch.put_container(row))
            .expect("the container's row");
        Self {
            process,
            control,
            place,
            container,
            network,
        }
    }

    /// The same, with a row on the kernel path to what `server` starts in the container. `None` where
    /// programs can't be loaded.
    pub fn serving(server: impl FnOnce(&Container) -> u16) -> Option<(Self, PortRow)> {
        let (mut node, row) = Self::with_row(server)?;
        node.lift(&row);
        Some((node, row))
    }

    /// The same, with the row of a server of echoes that is not lifted yet.
    pub fn with_echo() -> Option<(Self, PortRow)> {
        Self::with_row(|container| container.echo().expect("a server"))
    }

    fn with_row(server: impl FnOnce(&Container) -> u16) -> Option<(Self, PortRow)> {
        if !may_use_bpf() {
            return None;
        }
        let node = Self::new();
        let row = node.container.port(server(&node.container));
        Some((node, row))
    }

    /// The container goes, and another one has its address and listens at a port.
    pub fn replace_container(&self, port: u16) -> (Container, TcpListener) {
        let (host, link) = (&self.network.host, &self.container.link);
        ip(&format!("-n {host} link del {link}")).expect("gone");
        let stranger = self.network.container(2).expect("the address, used again");
        let listener = within(&stranger.namespace, move || {
            let listener = TcpListener::bind(("0.0.0.0", port)).expect("its port");
            listener.set_nonblocking(true).expect("an option");
            listener
        });
        (stranger, listener.expect("the stranger"))
    }

    /// Publishes a row.
    pub fn publish(&mut self, row: &PortRow) -> PortStatus {
        self.control.publish(row.clone()).expect("an answer")
    }

    /// Publishes a row that must take the kernel path, from the first answer on.
    pub fn lift(&mut self, row: &PortRow) {
        let status = self.publish(row);
        assert_eq!(
            (status.state, status.path, status.reason.as_str()),
            (PortState::Serving, ForwardPath::KernelPath, "")
        );
    }

    /// Runs code as the remote client.
    pub fn at_client<T: Send + 'static>(&self, run: impl FnOnce() -> T + Send + 'static) -> T {
        within(&self.network.client, run).expect("the client's namespace")
    }

    /// A connection of the remote client's.
    pub fn connect(&self, address: SocketAddr) -> TcpStream {
        self.at_client(move || traffic::connect(address))
            .expect("accepted")
    }

    /// The same to a server of echoes, with a word sent and come back.
    pub fn flow(&self, address: SocketAddr) -> TcpStream {
        let mut stream = self.connect(address);
        stream.write_all(b"before").expect("sent");
        stream.read_exact(&mut [0; 6]).expect("echoed");
        stream
    }

    /// Waits until a row's status is as wanted.
    pub fn counted(&mut self, row: &PortRow, wanted: impl Fn(&PortStatus) -> bool) -> PortStatus {
        let key = row.key();
        until("the counters", || {
            self.control.status(key).filter(|status| wanted(status))
        })
        .expect("counters")
    }

    /// Kills the dataplane.
    pub fn kill(&mut self) {
        self.process.signal(Signal::SIGKILL).expect("killed");
        self.process.ended().expect("gone");
    }

    /// Starts it again and waits until it speaks.
    pub fn restart(&mut self) {
        self.process = self.place.start().expect("bai-dataplane");
        let pid = u64::try_from(self.process.pid().as_raw()).expect("a pid");
        until("the next process speaking", || {
            self.control.observed.snapshot().ok()?;
            let life = self.control.observed.writer().ok()?;
            (life.pid == pid).then_some(())
        })
        .expect("taken over");
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

/// Where clients of other hosts find a row, by IPv4 (0) or IPv6 (1).
pub fn host(row: &PortRow, family: usize) -> SocketAddr {
    SocketAddr::new(HOST[family].parse().expect("an address"), row.host_port)
}

/// The node's directory of pins in use.
pub fn pins(node: &Node) -> PathBuf {
    let run_dir = node.place.run_dir().root().to_owned();
    let homes = std::fs::read_dir(shared::pins::HOME).expect("pins");
    let mut homes = homes.flatten().map(|it| it.path());
    let home = homes
        .find(|it| std::fs::read_link(it.join("owner")).is_ok_and(|to| to == run_dir))
        .expect("this node's");
    let entries = std::fs::read_dir(home).expect("its directory").flatten();
    let mut layouts = entries.filter(|it| it.file_type().is_ok_and(|it| it.is_dir()));
    let only = layouts.next().expect("a layout").path();
    assert!(layouts.next().is_none(), "one layout");
    only
}

/// A server that sends back what it gets.
pub fn echo(container: &Container) -> u16 {
    container.echo().expect("a server")
}

/// A server that tells each client the address it sees, then ends.
pub fn mirror(container: &Container) -> u16 {
    within(&container.namespace, || {
        let listener = traffic::listener("[::]:0");
        let port = listener.local_addr().expect("bound").port();
        thread::spawn(move || {
            while let Ok((mut stream, peer)) = listener.accept() {
                let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                let _ = stream.write_all(peer.to_string().as_bytes());
            }
        });
        port
    })
    .expect("the container's namespace")
}

/// What a mirror says, and the address it should be.
pub fn told(address: SocketAddr) -> std::io::Result<(String, SocketAddr)> {
    let mut stream = traffic::connect(address)?;
    let own = stream.local_addr()?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok((text, own))
}

/// Whether this kernel has links of programs to interfaces: tcx, since Linux 6.6.
pub fn knows_links() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split('.').map(|it| it.parse().unwrap_or(0_u32));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 6)
}

/// What is attached to interfaces of the host: links as the kernel lists them, then filters as its own
/// tool does.
pub fn attached(node: &Node) -> String {
    let links = within(&node.network.host, || {
        let mut text = String::new();
        for name in nix::net::if_::if_nameindex().expect("interfaces").iter() {
            let name = name.name().to_string_lossy().into_owned();
            for side in [TcAttachType::Ingress, TcAttachType::Egress] {
                let programs = match SchedClassifier::query_tcx(&name, side) {
                    Ok((_, programs)) => programs,
                    Err(_) if !knows_links() => Vec::new(),
                    Err(err) => panic!("links: {err}"),
                };
                for program in programs {
                    let program = program.name_as_str().unwrap_or("unnamed").to_owned();
                    text.push_str(&format!("{name} tcx {side:?} {program}\n"));
                }
            }
        }
        text
    });
    let filters = command(&node.network.host, "bpftool")
        .args(["net", "show"])
        .output()
        .expect("bpftool");
    assert!(
        filters.status.success(),
        "bpftool: {}",
        String::from_utf8_lossy(&filters.stderr)
    );
    links.expect("the host's namespace") + &String::from_utf8_lossy(&filters.stdout)
}
