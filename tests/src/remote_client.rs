//! A client on another machine, a host and its containers: namespaces joined as on a real node.
//!
//! In: nothing. Out: `client --veth-- host --bridge-- container(s)`, with IPv4 and IPv6 addresses,
//! default routes and forwarding; code and programs that run in one of them. Invariant: all of it
//! vanishes with the handle, and nothing of this machine's own network is touched.

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use shared::desired::{ContainerRow, PortRow};
use shared::ids::ContainerId;

use crate::dataplane::{free_port, row_to, until};
use crate::netns::ip;
use crate::skip;

/// Addresses of the host's interface towards the client.
pub const HOST: [&str; 2] = ["10.78.1.1", "fd78:1::1"];
/// Addresses of the client.
pub const CLIENT: [&str; 2] = ["10.78.1.2", "fd78:1::2"];

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Whether this process may load programs into the kernel. Where it may not, says so.
pub fn may_use_bpf() -> bool {
    // capabilities(7): CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
        .unwrap_or(0);
    let has = |bit: u32| effective & (1 << bit) != 0;
    let may = nix::unistd::geteuid().is_root() && has(12) && (has(21) || has(39));
    if !may {
        skip::needs("loading BPF programs needs root with CAP_NET_ADMIN and CAP_BPF");
    }
    may
}

/// A container's namespace on the bridge.
#[derive(Debug)]
pub struct Container {
    /// Name of its namespace.
    pub namespace: String,
    /// Its IPv4 and IPv6 address.
    pub address: [IpAddr; 2],
    /// Host-side interface.
    pub link_index: u32,
    /// Name of it.
    pub link: String,
    init: Child,
}

impl Container {
    /// The row of this container, as control writes it.
    pub fn row(&self, id: ContainerId) -> ContainerRow {
        ContainerRow {
            container_id: id,
            init_pid: self.init.id(),
            link_indexes: vec![self.link_index],
            ..ContainerRow::default()
        }
    }

    /// A row from a free port of any address to a port of the container.
    pub fn port(&self, port: u16) -> PortRow {
        let mut row = row_to(SocketAddr::new(self.address[0], port));
        row.host_port = free_port();
        row.bind = [0, 0, 0, 0].into();
        row.link_index = self.link_index;
        row.link_guard = true;
        row
    }

    /// An echo server at a free port of both families, running until the process ends.
    pub fn echo(&self) -> Result<u16> {
        within(&self.namespace, || {
            crate::traffic::echo_server("[::]:0").port()
        })
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
        let _ = ip(&format!("netns del {}", self.namespace));
    }
}

/// The whole of it.
#[derive(Debug)]
pub struct Network {
    /// Name of the client's namespace.
    pub client: String,
    /// Name of the host's namespace.
    pub host: String,
    number: u32,
}

impl Network {
    /// Makes client and host. Names are this process's own.
    pub fn new() -> Result<Self> {
        let number = COUNT.fetch_add(1, Relaxed);
        let id = format!("{}-{number}", std::process::id());
        let network = Self {
            client: format!("bai-kp-c-{id}"),
            host: format!("bai-kp-h-{id}"),
            number,
        };
        let (client, host) = (&network.client, &network.host);
        for namespace in [client, host] {
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
        }
        ip(&format!(
            "-n {host} link add up0 type veth peer name eth0 netns {client}"
        ))?;
        for (namespace, link, addresses) in [(host, "up0", HOST), (client, "eth0", CLIENT)] {
            address(namespace, link, addresses)?;
            ip(&format!("-n {namespace} link set {link} up"))?;
        }
        // A hardware address of its own, as Docker gives its bridges: without one it has that of one
        // of its ports, which hides what a port sees of frames for the bridge.
        ip(&format!(
            "-n {host} link add br0 address 02:42:0a:4e:02:01 type bridge"
        ))?;
        address(host, "br0", ["10.78.2.1", "fd78:2::1"])?;
        ip(&format!("-n {host} link set br0 up"))?;
        network.set("net.ipv4.ip_forward", "1")?;
        network.set("net.ipv6.conf.all.forwarding", "1")?;
        // As a neighbour host that knows the way to the containers.
        ip(&format!(
            "-n {client} route add 10.78.2.0/24 via {}",
            HOST[0]
        ))?;
        ip(&format!(
            "-n {client} -6 route add fd78:2::/64 via {}",
            HOST[1]
        ))?;
        for (family, gateway) in [("-4", CLIENT[0]), ("-6", CLIENT[1])] {
            ip(&format!(
                "-n {host} {family} route add default via {gateway}"
            ))?;
        }
        Ok(network)
    }

    fn set(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        let value = value.to_owned();
        within(&self.host, move || std::fs::write(path, value))??;
        Ok(())
    }

    /// Adds a container at address `last` (the last byte of it) on the bridge.
    pub fn container(&self, last: u8) -> Result<Container> {
        self.container_at(2, last)
    }

    /// Adds a container at address `last` of network `net`, of which there is a bridge.
    fn container_at(&self, net: u8, last: u8) -> Result<Container> {
        static NAMES: AtomicU32 = AtomicU32::new(0);
        let name = NAMES.fetch_add(1, Relaxed);
        let namespace = format!("bai-kp-k-{}-{}-{name}", std::process::id(), self.number);
        let link = format!("cont{name}");
        let host = &self.host;
        ip(&format!("netns add {namespace}"))?;
        ip(&format!("-n {namespace} link set lo up"))?;
        ip(&format!(
            "-n {host} link add {link} type veth peer name eth0 netns {namespace}"
        ))?;
        let bridge = net - 2;
        ip(&format!("-n {host} link set {link} master br{bridge} up"))?;
        let addresses = [
            format!("10.78.{net}.{last}"),
            format!("fd78:{net}::{last:x}"),
        ];
        address(&namespace, "eth0", [&addresses[0], &addresses[1]])?;
        ip(&format!("-n {namespace} link set eth0 up"))?;
        ip(&format!(
            "-n {namespace} route add default via 10.78.{net}.1"
        ))?;
        ip(&format!(
            "-n {namespace} -6 route add default via fd78:{net}::1"
        ))?;
        let text = ip(&format!("-n {host} -o link show {link}"))?;
        let index = text.split(':').next().unwrap_or_default().trim();
        let init = command(&namespace, "sleep")
            .arg("1000000")
            .spawn()
            .context("a process for the container")?;
        let container = Container {
            address: [addresses[0].parse()?, addresses[1].parse()?],
            link_index: index.parse().context("an interface index")?,
            link,
            init,
            namespace,
        };
        // The process enters the namespace before it becomes the program.
        let wanted = std::fs::metadata(format!("/run/netns/{}", container.namespace))?;
        until("the process being in its namespace", || {
            use std::os::unix::fs::MetadataExt;
            let is = std::fs::metadata(format!("/proc/{}/ns/net", container.init.id())).ok()?;
            (is.ino() == wanted.ino()).then_some(())
        })?;
        Ok(container)
    }
}

/// A machine beyond the client, which is its router.
#[derive(Debug)]
pub struct Far {
    /// Name of its namespace.
    pub name: String,
    /// Its IPv4 and IPv6 address.
    pub address: [String; 2],
}

impl Drop for Far {
    fn drop(&mut self) {
        let _ = ip(&format!("netns del {}", self.name));
    }
}

impl Network {
    /// A machine behind the client's, whose way to it takes packets of `mtu` bytes. The machine
    /// itself does not know that.
    pub fn beyond_the_client(&self, mtu: u32) -> Result<Far> {
        let far = Far {
            name: format!("bai-kp-f-{}-{}", std::process::id(), self.number),
            address: ["10.78.4.2".to_owned(), "fd78:4::2".to_owned()],
        };
        let (name, client, host) = (&far.name, &self.client, &self.host);
        ip(&format!("netns add {name}"))?;
        ip(&format!("-n {name} link set lo up"))?;
        ip(&format!(
            "-n {client} link add far0 type veth peer name eth0 netns {name}"
        ))?;
        address(client, "far0", ["10.78.4.1", "fd78:4::1"])?;
        address(name, "eth0", [&far.address[0], &far.address[1]])?;
        for words in [
            format!("-n {client} link set far0 mtu {mtu} up"),
            format!("-n {name} link set eth0 up"),
            format!("-n {name} route add default via 10.78.4.1"),
            format!("-n {name} -6 route add default via fd78:4::1"),
            format!("-n {host} route add 10.78.4.0/24 via {}", CLIENT[0]),
            format!("-n {host} -6 route add fd78:4::/64 via {}", CLIENT[1]),
        ] {
            ip(&words)?;
        }
        within(&self.client, || {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        })??;
        Ok(far)
    }

    /// A container at address `last` of a second bridge.
    pub fn bridged_elsewhere(&self, last: u8) -> Result<Container> {
        let host = &self.host;
        ip(&format!(
            "-n {host} link add br1 address 02:42:0a:4e:03:01 type bridge"
        ))?;
        address(host, "br1", ["10.78.3.1", "fd78:3::1"])?;
        ip(&format!("-n {host} link set br1 up"))?;
        self.container_at(3, last)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in [&self.client, &self.host] {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn address(namespace: &str, link: &str, [v4, v6]: [&str; 2]) -> Result<()> {
    ip(&format!("-n {namespace} addr add {v4}/24 dev {link}"))?;
    // Nobody else is there: no need to wait for duplicates to be found. Of the link's own address
    // too, which routers ask their neighbours with: until it is sure they ask nobody.
    ip(&format!("-n {namespace} addr add {v6}/64 dev {link} nodad"))?;
    let sure = format!("/proc/sys/net/ipv6/conf/{link}/accept_dad");
    within(namespace, move || std::fs::write(sure, "0"))??;
    Ok(())
}

/// A command that runs in a namespace, in this mount namespace (where pins outlive it).
pub fn command(namespace: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net=/run/netns/{namespace}"))
        .arg(program)
        .stdin(Stdio::null());
    command
}

/// Runs code on a thread in a namespace. Its sockets stay there, as do threads it starts.
pub fn within<T: Send + 'static>(
    namespace: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let path = format!("/run/netns/{namespace}");
    let file = std::fs::File::open(&path).with_context(|| path)?;
    let thread = thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        Ok::<T, nix::Error>(run())
    });
    match thread.join() {
        Ok(done) => Ok(done?),
        Err(_) => bail!("the code in namespace {namespace} has panicked"),
    }
}
