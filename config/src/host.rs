//! Facts about the host that a configuration depends on, behind a trait so tests can fix them.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::{AccessFlags, User, access, getegid, geteuid};

/// User and group number of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserEntry {
    /// User number.
    pub uid: u32,
    /// Number of the primary group.
    pub gid: u32,
}

/// What loading asks about the host. Answers are read-only: nothing is changed.
pub trait Host: fmt::Debug + Send + Sync {
    /// Effective user and group of this process.
    fn process_user(&self) -> UserEntry;
    /// Account by name.
    fn user(&self, name: &str) -> Option<UserEntry>;
    /// Name of the host.
    fn hostname(&self) -> String;
    /// Processor architecture as Rust names it (`x86_64`, `aarch64`).
    fn architecture(&self) -> &str;
    /// Directory that relative paths start from.
    fn working_directory(&self) -> PathBuf;
    /// Home directory of the user.
    fn home(&self) -> Option<PathBuf>;
    /// Whether the path, or its nearest existing parent, is on tmpfs and writable.
    fn is_writable_tmpfs(&self, path: &Path) -> bool;
    /// Whether the path is there, on tmpfs, for whomever to write.
    fn is_on_tmpfs(&self, path: &Path) -> bool {
        self.is_writable_tmpfs(path)
    }
    /// Whether the path is this user's.
    fn is_own(&self, _path: &Path) -> bool {
        true
    }
    /// Whether writing there fails because the file system, as this process sees it, is read-only.
    fn is_read_only(&self, _path: &Path) -> bool {
        false
    }
    /// The address from which this host reaches another one; none without a route. Nothing is sent.
    fn address_towards(&self, _target: IpAddr) -> Option<IpAddr> {
        None
    }
    /// The addresses of this host's interfaces that are up.
    fn local_addresses(&self) -> Vec<IpAddr> {
        Vec::new()
    }
    /// Those of them that are not of containers' bridges, which no other host reaches.
    fn outer_addresses(&self) -> Vec<IpAddr> {
        self.local_addresses()
    }
    /// Addresses of a host name; empty when it does not resolve in time.
    fn resolve(&self, name: &str) -> Vec<IpAddr>;
    /// The kernel's core dump pattern.
    fn core_pattern(&self) -> String;
}

/// The host this process runs on.
#[derive(Debug, Clone, Copy, Default)]
pub struct ThisHost;

/// How long a name lookup may hold up the start.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(3);

impl Host for ThisHost {
    fn process_user(&self) -> UserEntry {
        UserEntry {
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
        }
    }

    fn user(&self, name: &str) -> Option<UserEntry> {
        let user = User::from_name(name).ok().flatten()?;
        Some(UserEntry {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        })
    }

    fn hostname(&self) -> String {
        let read = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        match read.trim() {
            "" => "localhost".to_owned(),
            name => name.to_owned(),
        }
    }

    fn architecture(&self) -> &str {
        std::env::consts::ARCH
    }

    fn working_directory(&self) -> PathBuf {
        std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"))
    }

    fn home(&self) -> Option<PathBuf> {
        home(std::env::var_os("HOME"))
    }

    fn is_writable_tmpfs(&self, path: &Path) -> bool {
        let Some(existing) = path.ancestors().find(|p| p.exists()) else {
            return false;
        };
        statfs(existing).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC)
            && access(existing, AccessFlags::W_OK | AccessFlags::X_OK).is_ok()
    }

    fn is_on_tmpfs(&self, path: &Path) -> bool {
        statfs(path).is_ok_and(|fs| fs.filesystem_type() == TMPFS_MAGIC)
    }

    fn is_own(&self, path: &Path) -> bool {
        let uid = geteuid().as_raw();
        std::fs::metadata(path).is_ok_and(|it| it.uid() == uid)
    }

    fn is_read_only(&self, path: &Path) -> bool {
        let existing = path.ancestors().find(|p| p.exists());
        existing.is_some_and(|place| access(place, AccessFlags::W_OK) == Err(Errno::EROFS))
    }

    fn address_towards(&self, target: IpAddr) -> Option<IpAddr> {
        route_source(target)
    }

    fn local_addresses(&self) -> Vec<IpAddr> {
        addresses(|_| true)
    }

    fn outer_addresses(&self) -> Vec<IpAddr> {
        addresses(|interface| !is_containers_bridge(Path::new(INTERFACES), interface))
    }

    fn resolve(&self, name: &str) -> Vec<IpAddr> {
        // The resolver has no deadline of its own, so it runs aside and may be left behind.
        let (sender, receiver) = mpsc::channel();
        let name = name.to_owned();
        let spawned = std::thread::Builder::new()
            .name("resolve".into())
            .spawn(move || {
                let found = (name.as_str(), 0u16).to_socket_addrs();
                let _ = sender.send(
                    found
                        .map(|a| a.map(|a| a.ip()).collect())
                        .unwrap_or_default(),
                );
            });
        match spawned {
            Ok(_) => receiver.recv_timeout(RESOLVE_DEADLINE).unwrap_or_default(),
            Err(_) => Vec::new(),
        }
    }

    fn core_pattern(&self) -> String {
        let read = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
        read.trim().to_owned()
    }
}

/// The directory that `HOME` names or, where it says nothing, as in a service of systemd, the account's.
fn home(named: Option<OsString>) -> Option<PathBuf> {
    let named = named.filter(|home| !home.is_empty());
    named
        .map(PathBuf::from)
        .or_else(|| Some(User::from_uid(geteuid()).ok()??.dir))
}

/// Where Linux shows interfaces as directories.
const INTERFACES: &str = "/sys/class/net";

/// The addresses of those interfaces that are up and wanted by name.
fn addresses(wanted: impl Fn(&str) -> bool) -> Vec<IpAddr> {
    let up = nix::net::if_::InterfaceFlags::IFF_UP;
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|found| found.ip().into());
        v4.or_else(|| address.as_sockaddr_in6().map(|found| found.ip().into()))
    };
    interfaces
        .filter(|interface| interface.flags.contains(up) && wanted(&interface.interface_name))
        .filter_map(|interface| interface.address.and_then(ip))
        .collect()
}

/// Whether it is a bridge that no port leads out of this host from: of an engine's containers, or of virtual
/// machines. A port leads out that is a device, or that lies on another interface (a bond, a VLAN).
fn is_containers_bridge(interfaces: &Path, name: &str) -> bool {
    let Ok(ports) = std::fs::read_dir(interfaces.join(name).join("brif")) else {
        return false;
    };
    let leads_out = |port: std::fs::DirEntry| {
        let parts = std::fs::read_dir(interfaces.join(port.file_name()));
        parts.into_iter().flatten().flatten().any(|part| {
            let part = part.file_name();
            part == "device" || part.to_string_lossy().starts_with("lower_")
        })
    };
    !ports.flatten().any(leads_out)
}

/// The source address of the route to a target: connecting a UDP socket sends nothing.
fn route_source(target: IpAddr) -> Option<IpAddr> {
    let any = match target {
        IpAddr::V4(_) => IpAddr::from([0; 4]),
        IpAddr::V6(_) => IpAddr::from([0; 16]),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(target, 9)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified()).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_that_is_not_named_is_the_accounts() {
        let account = User::from_uid(geteuid()).unwrap().unwrap();
        assert_eq!(home(None).as_ref(), Some(&account.dir));
        assert_eq!(home(Some("".into())), Some(account.dir));
        assert_eq!(home(Some("/else".into())), Some("/else".into()));
    }

    #[test]
    fn this_host_answers() {
        let host = ThisHost;
        assert!(!host.hostname().is_empty());
        assert!(host.working_directory().is_absolute());
        let loopback = IpAddr::from([127, 0, 0, 1]);
        assert_eq!(host.address_towards(loopback), Some(loopback));
        assert_eq!(host.resolve("127.0.0.1"), [IpAddr::from([127, 0, 0, 1])]);
        assert!(host.resolve("no such host").is_empty());
        assert!(
            host.local_addresses()
                .contains(&IpAddr::from([127, 0, 0, 1]))
        );
        let all = host.local_addresses();
        assert!(host.outer_addresses().iter().all(|ip| all.contains(ip)));
        assert!(!host.is_writable_tmpfs(Path::new("/proc/x")));
        assert!(!host.is_read_only(Path::new("/dev/shm/x")));
    }

    #[test]
    fn bridges_without_a_way_out_are_containers() {
        let place = tempfile::tempdir().unwrap();
        for path in [
            "docker0/brif",
            "br-0123456789ab/brif/veth1",
            "veth1/queues",
            "br0/brif/eth0",
            "br0/brif/veth2",
            "eth0/device",
            "br1/brif/bond0",
            "bond0/lower_eth1",
        ] {
            std::fs::create_dir_all(place.path().join(path)).unwrap();
        }
        let is_one = |name| is_containers_bridge(place.path(), name);
        assert!(is_one("docker0") && is_one("br-0123456789ab"));
        for other in ["br0", "br1", "eth0", "veth1", "absent"] {
            assert!(!is_one(other), "{other}");
        }
    }
}
