//! What can stand between client and container: the bare route, the engine's own ways, proxies
//! that are shipped, and ours.
//!
//! In: a site. Out: a published echo server and iperf3. Invariant: only one peer is there at a
//! time, and nothing of it stays behind, so that none slows another.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use shared::observed::{ForwardPath, RelayEngine};

use crate::load;
use crate::node::{Node, program};
use crate::site::{
    BULK_PORT, CABLE, CONTAINER, ECHO_PORT, Group, HOST, HOST_BULK_PORT, HOST_ECHO_PORT, Place,
    Site,
};

/// What stands between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, clap::ValueEnum)]
pub enum Peer {
    /// No host between: client and container on one veth pair. The floor of any path.
    Cable,
    /// Routed to the container's own address.
    Direct,
    /// Destination NAT by iptables, as the engine publishes ports for remote clients.
    Dnat,
    /// The engine's userspace proxy.
    DockerProxy,
    /// HAProxy in TCP mode with splice.
    Haproxy,
    /// nginx with its stream module.
    Nginx,
    /// A plain tokio program: `copy_bidirectional`.
    Tokio,
    /// Our relay, with splice.
    Relay,
    /// Our relay, with io_uring.
    RelayUring,
    /// Our kernel path.
    Kernel,
}

/// The first line of what a program says when it is asked so.
///
/// # Errors
/// The program is missing.
pub fn said(program: &Path, flag: &str) -> Result<String> {
    let output = Command::new(program).arg(flag).output().with_context(|| {
        format!(
            "{} is missing: run `deploy/setup bench`, or leave it out with --peers",
            program.display()
        )
    })?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

impl Peer {
    /// All, in the order of tables.
    pub const ALL: [Self; 10] = [
        Self::Cable,
        Self::Direct,
        Self::Dnat,
        Self::DockerProxy,
        Self::Haproxy,
        Self::Nginx,
        Self::Tokio,
        Self::Relay,
        Self::RelayUring,
        Self::Kernel,
    ];

    /// Its name in tables and files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cable => "cable",
            Self::Direct => "direct",
            Self::Dnat => "dnat",
            Self::DockerProxy => "docker_proxy",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Tokio => "tokio",
            Self::Relay => "relay",
            Self::RelayUring => "relay_uring",
            Self::Kernel => "kernel",
        }
    }

    /// Ours, not a peer's.
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Relay | Self::RelayUring | Self::Kernel)
    }

    /// A process carries the bytes.
    #[must_use]
    pub fn has_process(self) -> bool {
        !matches!(self, Self::Cable | Self::Direct | Self::Dnat)
    }

    /// Where clients at a place reach the echo server and iperf3; `None` where this peer does not
    /// serve such clients.
    #[must_use]
    pub fn addresses(self, from: Place) -> Option<[SocketAddr; 2]> {
        let (ip, ports) = match (self, from) {
            (Self::Cable, Place::Client) => (CABLE, [ECHO_PORT, BULK_PORT]),
            (Self::Cable, _) => return None,
            (Self::Direct, _) => (CONTAINER, [ECHO_PORT, BULK_PORT]),
            (_, Place::Client) => (HOST, [HOST_ECHO_PORT, HOST_BULK_PORT]),
            (Self::Dnat, _) => return None,
            _ => ("127.0.0.1", [HOST_ECHO_PORT, HOST_BULK_PORT]),
        };
        let ip = ip.parse().ok()?;
        Some(ports.map(|port| SocketAddr::new(ip, port)))
    }

    /// Lines of `[node]` that make our program this peer.
    fn settings(self) -> &'static str {
        match self {
            Self::Kernel => "forward = \"auto\"",
            Self::RelayUring => "forward = \"relay\"\nrelay-engine = \"uring\"",
            _ => "forward = \"relay\"\nrelay-engine = \"splice\"",
        }
    }

    /// Version and configuration, for the report.
    ///
    /// # Errors
    /// The peer is not installed.
    pub fn description(self, site: &Site) -> Result<(String, String)> {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(match self {
            Self::Cable => (kernel.trim().to_owned(), "one veth pair".into()),
            Self::Direct => (kernel.trim().to_owned(), "route through the host".into()),
            Self::Dnat => (said(Path::new("iptables"), "--version")?, dnat_rules()),
            Self::DockerProxy => (
                // The program has no flag for its version; it comes with the engine.
                format!(
                    "{}, {}",
                    docker_proxy()?.display(),
                    said(Path::new("dockerd"), "--version")
                        .unwrap_or_else(|_| "of an unknown engine".into())
                ),
                docker_proxy_arguments(HOST_ECHO_PORT, ECHO_PORT).join(" "),
            ),
            Self::Haproxy => (said(&sbin("haproxy"), "-v")?, haproxy_configuration()),
            Self::Nginx => (said(&sbin("nginx"), "-v")?, nginx_configuration(site)),
            Self::Tokio => (
                "tokio 1, copy_bidirectional, multi-threaded".into(),
                copy_pairs().join(" "),
            ),
            Self::Relay | Self::RelayUring | Self::Kernel => (
                said(&program("bai-dataplane")?, "--version")?,
                self.settings().into(),
            ),
        })
    }

    /// Puts it in place and proves that it answers.
    ///
    /// # Errors
    /// It does not.
    pub fn start(self, site: &Site, init_pid: u32) -> Result<Running<'_>> {
        let mut running = Running {
            site,
            peer: self,
            children: Vec::new(),
            node: None,
        };
        match self {
            Self::Cable => site.plug_cable()?,
            Self::Direct => {}
            Self::Dnat => site.restore(&dnat_rules())?,
            Self::DockerProxy => {
                for (host_port, port) in PORTS {
                    // It tells the engine by descriptor 3 that it listens.
                    let mut arguments = vec![
                        "-c".to_owned(),
                        "exec \"$0\" \"$@\" 3>/dev/null".to_owned(),
                        docker_proxy()?.display().to_string(),
                    ];
                    arguments.extend(docker_proxy_arguments(host_port, port));
                    running.spawn("/bin/sh".as_ref(), &arguments)?;
                }
                // One process per port: an answer of the one tells nothing of the other.
                site.within(Place::Host, || {
                    crate::site::until("docker-proxy listening", || {
                        PORTS.iter().all(|(port, _)| listens(*port)).then_some(())
                    })
                })??;
            }
            Self::Haproxy => {
                let path = site.directory().join("haproxy.cfg");
                std::fs::write(&path, haproxy_configuration())?;
                running.spawn(&sbin("haproxy"), &["-db", "-f", &path.to_string_lossy()])?;
            }
            Self::Nginx => {
                let path = site.directory().join("nginx.conf");
                std::fs::write(&path, nginx_configuration(site))?;
                running.spawn(&sbin("nginx"), &["-c", &path.to_string_lossy()])?;
            }
            Self::Tokio => {
                let mut arguments = vec!["copy".to_owned()];
                arguments.extend(copy_pairs());
                running.spawn(&program("bench-load")?, &arguments)?;
            }
            Self::Relay | Self::RelayUring | Self::Kernel => {
                let (path, engine) = match self {
                    Self::Kernel => (ForwardPath::KernelPath, RelayEngine::None),
                    Self::RelayUring => (ForwardPath::Relay, RelayEngine::Uring),
                    _ => (ForwardPath::Relay, RelayEngine::Splice),
                };
                let mut node = Node::start(site, Some(Place::Host), self.settings())?;
                let published = node.publish(site, &PORTS, path, init_pid);
                let served = node.engine(HOST_ECHO_PORT);
                running.node = Some(node);
                published?;
                ensure!(served == Some(engine), "served by {served:?}, not {engine}");
            }
        }
        let [echo, _] = self
            .addresses(Place::Client)
            .context("every peer serves remote clients")?;
        let answers = site.within(Place::Client, || {
            crate::site::until("an answer of the echo server", || load::proven(echo).ok())
        })?;
        answers.with_context(|| format!("{} does not serve", self.name()))?;
        Ok(running)
    }
}

const PORTS: [(u16, u16); 2] = [(HOST_ECHO_PORT, ECHO_PORT), (HOST_BULK_PORT, BULK_PORT)];

/// Whether somebody listens on a port in this thread's network namespace.
fn listens(port: u16) -> bool {
    const LISTEN: &str = "0A";
    let end = format!(":{port:04X}");
    ["tcp", "tcp6"].into_iter().any(|table| {
        let text = std::fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        text.unwrap_or_default().lines().any(|line| {
            let mut fields = line.split_whitespace().skip(1);
            let local = fields.next().unwrap_or_default();
            local.ends_with(&end) && fields.nth(1) == Some(LISTEN)
        })
    })
}

/// A peer in place; gone when dropped.
#[derive(Debug)]
pub struct Running<'a> {
    site: &'a Site,
    peer: Peer,
    children: Vec<Child>,
    node: Option<Node>,
}

impl Running<'_> {
    fn spawn(&mut self, program: &Path, arguments: &[impl AsRef<std::ffi::OsStr>]) -> Result<()> {
        let child = self
            .site
            .command(Some(Place::Host), Group::Proxy, program)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("{} cannot be started", program.display()))?;
        self.children.push(child);
        Ok(())
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let undone = match self.peer {
            Peer::Dnat => {
                let undo = dnat_rules().replace("-A DOCKER", "-D DOCKER");
                self.site.restore(&undo)
            }
            Peer::Cable => self.site.unplug_cable(),
            _ => Ok(()),
        };
        if let Err(err) = undone {
            eprintln!("{err:#}");
        }
        for child in &mut self.children {
            let _ = child.kill();
        }
        self.site.end(Group::Proxy);
        for child in &mut self.children {
            let _ = child.wait();
        }
        if let Some(node) = self.node.take() {
            node.stop(self.site);
        }
    }
}

fn dnat_rules() -> String {
    let mut text = "*nat\n".to_owned();
    for (host_port, port) in PORTS {
        text += &format!(
            "-A DOCKER ! -i br0 -p tcp -m tcp --dport {host_port} -j DNAT --to-destination {CONTAINER}:{port}\n"
        );
    }
    text + "COMMIT\n"
}

fn sbin(name: &str) -> PathBuf {
    Path::new("/usr/sbin").join(name)
}

fn docker_proxy() -> Result<PathBuf> {
    for path in [
        "/usr/sbin/docker-proxy",
        "/usr/bin/docker-proxy",
        "/usr/libexec/docker/docker-proxy",
    ] {
        if Path::new(path).exists() {
            return Ok(path.into());
        }
    }
    bail!(
        "docker-proxy is missing: run `deploy/setup bench`, or leave docker-proxy out with --peers"
    )
}

fn docker_proxy_arguments(host_port: u16, port: u16) -> Vec<String> {
    [
        "-proto".to_owned(),
        "tcp".to_owned(),
        "-host-ip".to_owned(),
        "0.0.0.0".to_owned(),
        "-host-port".to_owned(),
        host_port.to_string(),
        "-container-ip".to_owned(),
        CONTAINER.to_owned(),
        "-container-port".to_owned(),
        port.to_string(),
    ]
    .to_vec()
}

fn haproxy_configuration() -> String {
    let mut text = "global\n  maxconn 6000\ndefaults\n  mode tcp\n  option splice-request\n  option splice-response\n  option tcp-smart-accept\n  option tcp-smart-connect\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n".to_owned();
    for (host_port, port) in PORTS {
        text += &format!(
            "listen port{host_port}\n  bind 0.0.0.0:{host_port} backlog 4096\n  server container {CONTAINER}:{port}\n"
        );
    }
    text
}

fn nginx_configuration(site: &Site) -> String {
    let directory = site.directory();
    let directory = directory.display();
    let mut text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\nuser root;\ndaemon off;\npid {directory}/nginx.pid;\nerror_log {directory}/nginx.log;\nworker_processes auto;\nworker_rlimit_nofile 20000;\nevents {{ worker_connections 9000; multi_accept on; }}\nstream {{\n  tcp_nodelay on;\n  proxy_connect_timeout 10s;\n  proxy_timeout 1h;\n"
    );
    for (host_port, port) in PORTS {
        text += &format!(
            "  server {{ listen {host_port} backlog=4096 reuseport; proxy_pass {CONTAINER}:{port}; }}\n"
        );
    }
    text + "}\n"
}

fn copy_pairs() -> Vec<String> {
    PORTS
        .iter()
        .map(|(host_port, port)| format!("0.0.0.0:{host_port}={CONTAINER}:{port}"))
        .collect()
}
