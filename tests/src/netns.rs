//! Network namespaces of a test's own, joined by a veth pair.
//!
//! In: a name. Out: two namespaces, the "host" side and the "container" side, with addresses.
//! Invariant: both vanish with the handle.

use std::process::{Command, Stdio};

use anyhow::{Result, bail};

/// Runs `ip` with these words.
pub fn ip(words: &str) -> Result<String> {
    let output = Command::new("ip")
        .args(words.split_whitespace())
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        bail!(
            "ip {words}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Sets to 0 what an interface offloads (linux/ethtool.h): GRO, GSO, TSO, sums it makes and checks, and
/// scattered data.
const OFFLOAD_NOTHING: &str = "
import ctypes, fcntl, socket, struct, sys
asked = socket.socket()
for command in (0x2c, 0x24, 0x1f, 0x17, 0x15, 0x19):
    value = ctypes.create_string_buffer(struct.pack('II', command, 0))
    request = struct.pack('16sP16x', sys.argv[1].encode(), ctypes.addressof(value))
    fcntl.ioctl(asked, 0x8946, request)
";

/// Has an interface send and take packets as they are on the wire, with their sums.
pub fn offload_nothing(namespace: &str, link: &str) -> Result<()> {
    let output = Command::new("ip")
        .args([
            "netns",
            "exec",
            namespace,
            "python3",
            "-c",
            OFFLOAD_NOTHING,
            link,
        ])
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        bail!(
            "{link} keeps its offloads: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// A host side and a container side.
#[derive(Debug)]
pub struct VethPair {
    /// Name of the namespace on the host's side.
    pub host: String,
    /// Name of the namespace on the container's side.
    pub container: String,
    /// Index of the host-side interface in the host-side namespace.
    pub host_index: u32,
}

/// Address of the host side.
pub const HOST_ADDRESS: &str = "10.213.7.1";
/// Address of the container side.
pub const CONTAINER_ADDRESS: &str = "10.213.7.2";

/// Whether sockets of IPv6 can be had on this host's loopback; where they can't, a skip.
pub fn has_ipv6() -> bool {
    let has = std::net::UdpSocket::bind("[::1]:0").is_ok();
    if !has {
        let off = std::fs::read_to_string("/proc/sys/net/ipv6/conf/lo/disable_ipv6");
        let on = matches!(off.as_deref().map(str::trim), Ok("0"));
        crate::skip::here("this host has no IPv6", on);
    }
    has
}

impl VethPair {
    /// Makes both namespaces. `Ok(None)` when this host does not let us.
    pub fn new(name: &str) -> Result<Option<Self>> {
        if !nix::unistd::geteuid().is_root() {
            crate::skip::needs("making network namespaces needs root");
            return Ok(None);
        }
        let id = std::process::id();
        let mut pair = Self {
            host: format!("bai-{name}-h-{id}"),
            container: format!("bai-{name}-c-{id}"),
            host_index: 0,
        };
        let (host, container) = (pair.host.clone(), pair.container.clone());
        ip(&format!("netns add {host}"))?;
        ip(&format!("netns add {container}"))?;
        ip(&format!(
            "-n {host} link add vhost type veth peer name eth0 netns {container}"
        ))?;
        ip(&format!("-n {host} addr add {HOST_ADDRESS}/24 dev vhost"))?;
        ip(&format!(
            "-n {container} addr add {CONTAINER_ADDRESS}/24 dev eth0"
        ))?;
        for (namespace, link) in [
            (&host, "vhost"),
            (&host, "lo"),
            (&container, "eth0"),
            (&container, "lo"),
        ] {
            ip(&format!("-n {namespace} link set {link} up"))?;
        }
        let text = ip(&format!("-n {host} -o link show vhost"))?;
        pair.host_index = text
            .split(':')
            .next()
            .and_then(|index| index.trim().parse().ok())
            .unwrap_or(0);
        Ok(Some(pair))
    }

    /// Deletes the link, as the end of a container does.
    pub fn delete_link(&self) -> Result<()> {
        ip(&format!("-n {} link del vhost", self.host)).map(|_| ())
    }

    /// A command that runs inside the container side.
    pub fn in_container(&self, program: &str) -> Command {
        inside(&self.container, program)
    }

    /// A command that runs inside the host side.
    pub fn in_host(&self, program: &str) -> Command {
        inside(&self.host, program)
    }
}

fn inside(namespace: &str, program: &str) -> Command {
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", namespace, program])
        .stdin(Stdio::null());
    command
}

impl Drop for VethPair {
    fn drop(&mut self) {
        for name in [&self.host, &self.container] {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}
