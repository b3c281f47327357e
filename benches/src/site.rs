//! Where benches against peers run: a remote client, a host with docker-like rules and a
//! container, in namespaces; a cgroup for each of client, server and proxy.
//!
//! In: nothing. Out: commands that run in a place and are accounted to a group, CPU time and
//! memory of a group. Invariant: [`Site::clean`] ends every process started here and removes all
//! that was made; it runs when the handle drops, at SIGINT and SIGTERM, and for a bench that was
//! killed, when the next begins.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dataplane::collect::hierarchies::{CgroupHierarchies, Hierarchy};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shared::ids::ContainerId;

/// The host as the client sees it.
pub const HOST: &str = "10.78.1.1";
/// The container.
pub const CONTAINER: &str = "10.78.2.2";
/// The id it would have from an engine.
pub const CONTAINER_ID: ContainerId = ContainerId([9; 32]);
/// The container at the end of a cable ([`Site::plug_cable`]).
pub const CABLE: &str = "10.78.3.2";
/// Port of the echo server in the container.
pub const ECHO_PORT: u16 = 7000;
/// Port of iperf3 in the container.
pub const BULK_PORT: u16 = 5201;
/// Where the host publishes the echo server.
pub const HOST_ECHO_PORT: u16 = 8000;
/// Where the host publishes iperf3.
pub const HOST_BULK_PORT: u16 = 8001;

const PREFIX: &str = "bai-bench";
const RULES: &str = include_str!("site/rules.v4");

/// A namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The other machine.
    Client,
    /// The worker node.
    Host,
    /// The container on it.
    Container,
}

impl Place {
    const ALL: [Self; 3] = [Self::Client, Self::Host, Self::Container];

    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Host => "host",
            Self::Container => "container",
        }
    }
}

/// Whose CPU time it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The load generator.
    Client,
    /// What answers in the container.
    Server,
    /// What stands between, ours or a peer.
    Proxy,
}

impl Group {
    const ALL: [Self; 3] = [Self::Client, Self::Server, Self::Proxy];

    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Proxy => "proxy",
        }
    }
}

/// CPU seconds of the groups.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
#[allow(missing_docs, reason = "the groups name them")]
pub struct Cpu {
    pub client: f64,
    pub server: f64,
    pub proxy: f64,
}

impl Cpu {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.client + self.server + self.proxy
    }

    /// What was spent since.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            client: self.client - before.client,
            server: self.server - before.server,
            proxy: self.proxy - before.proxy,
        }
    }
}

/// Memory of the processes of a group, in bytes.
#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Memory {
    /// Pages nobody shares.
    pub private: u64,
    /// Resident pages, shared ones counted in every process.
    pub resident: u64,
    /// Number of processes.
    pub processes: u64,
}

/// The whole of it.
#[derive(Debug)]
pub struct Site {
    id: String,
    cgroup: Hierarchy,
}

/// Runs a program to its end; what it said wrong becomes the error.
///
/// # Errors
/// It is not there or fails.
pub fn done(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `ip` with these words.
///
/// # Errors
/// It fails.
pub fn ip(words: &str) -> Result<String> {
    done(Command::new("ip").args(words.split_whitespace()))
}

/// Looks until there is something; fails after a deadline.
///
/// # Errors
/// The deadline.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    const LIMIT: Duration = Duration::from_secs(20);
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not so after {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(2));
    }
}

impl Site {
    /// A handle that has made nothing yet, so that it can be cleaned whatever happens later.
    ///
    /// # Errors
    /// No root, no cgroups.
    pub fn new() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            bail!("namespaces and cgroups need root: run this with sudo");
        }
        sweep();
        let cgroup = CgroupHierarchies::gather()
            .cpu
            .context("no cgroup hierarchy with CPU accounting is mounted")?;
        Ok(Self {
            id: format!("{PREFIX}-{}", std::process::id()),
            cgroup,
        })
    }

    /// Makes cgroups and the directory; enough for benches that need no topology.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn make_groups(&self) -> Result<()> {
        std::fs::create_dir(self.top()).with_context(|| self.top().display().to_string())?;
        for group in Group::ALL {
            std::fs::create_dir(self.group(group))?;
        }
        std::fs::create_dir(self.directory())?;
        Ok(())
    }

    /// Makes cgroups, directory and topology.
    ///
    /// # Errors
    /// A step of it fails.
    pub fn make(&self) -> Result<()> {
        self.make_groups()?;
        for place in Place::ALL {
            ip(&format!("netns add {}", self.namespace(place)))?;
            ip(&format!("-n {} link set lo up", self.namespace(place)))?;
        }
        let [client, host, container] = Place::ALL.map(|place| self.namespace(place));
        for words in [
            format!("-n {host} link add up0 type veth peer name eth0 netns {client}"),
            format!("-n {host} addr add {HOST}/24 dev up0"),
            format!("-n {host} link set up0 up"),
            format!("-n {client} addr add 10.78.1.2/24 dev eth0"),
            format!("-n {client} link set eth0 up"),
            format!("-n {host} link add br0 address 02:42:0a:4e:02:01 type bridge"),
            format!("-n {host} addr add 10.78.2.1/24 dev br0"),
            format!("-n {host} link set br0 up"),
            format!("-n {host} link add cont0 type veth peer name eth0 netns {container}"),
            format!("-n {host} link set cont0 master br0 up"),
            format!("-n {container} addr add {CONTAINER}/24 dev eth0"),
            format!("-n {container} link set eth0 up"),
            format!("-n {container} route add default via 10.78.2.1"),
            // As a machine that knows the way to the containers, for the direct route.
            format!("-n {client} route add 10.78.2.0/24 via {HOST}"),
        ] {
            ip(&words)?;
        }
        for place in Place::ALL {
            // Not bbr, whose pacing bounds bulk on veth. Cubic may be reserved to the machine's own
            // namespace; without loss the two behave alike. Ports enough for TIME_WAIT.
            let control = "net.ipv4.tcp_congestion_control";
            if self.set(place, control, "cubic").is_err() {
                self.set(place, control, "reno")?;
            }
            self.set(place, "net.ipv4.ip_local_port_range", "10000 65535")?;
            self.set(place, "net.ipv4.tcp_tw_reuse", "1")?;
            self.set(place, "net.core.somaxconn", "4096")?;
        }
        self.set(Place::Host, "net.ipv4.ip_forward", "1")?;
        // Docker turns this on; a kernel without br_netfilter has no such key.
        let _ = self.set(Place::Host, "net.bridge.bridge-nf-call-iptables", "1");
        self.restore(RULES)
    }

    /// Joins client and container by a veth pair with no host between them.
    ///
    /// # Errors
    /// The kernel refuses, or one is there already.
    pub fn plug_cable(&self) -> Result<()> {
        let [client, container] = [Place::Client, Place::Container].map(|it| self.namespace(it));
        for words in [
            format!("-n {client} link add cable type veth peer name cable netns {container}"),
            format!("-n {client} addr add 10.78.3.1/24 dev cable"),
            format!("-n {client} link set cable up"),
            format!("-n {container} addr add {CABLE}/24 dev cable"),
            format!("-n {container} link set cable up"),
        ] {
            ip(&words)?;
        }
        Ok(())
    }

    /// Takes it away.
    ///
    /// # Errors
    /// There is none.
    pub fn unplug_cable(&self) -> Result<()> {
        ip(&format!(
            "-n {} link del cable",
            self.namespace(Place::Client)
        ))
        .map(drop)
    }

    /// Adds rules to the host's tables.
    ///
    /// # Errors
    /// iptables refuses.
    pub fn restore(&self, rules: &str) -> Result<()> {
        let mut child = self
            .enter(Place::Host, "iptables-restore")
            .arg("--noflush")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("iptables-restore cannot be started (run deploy/setup bench)")?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(rules.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!(
                "iptables-restore: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }

    /// What names all that is of this site.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Name of a namespace.
    #[must_use]
    pub fn namespace(&self, place: Place) -> String {
        format!("{}-{}", self.id, place.name())
    }

    /// A directory on tmpfs for files of this bench.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        Path::new("/dev/shm").join(&self.id)
    }

    fn top(&self) -> PathBuf {
        self.cgroup.mount().join(&self.id)
    }

    fn group(&self, group: Group) -> PathBuf {
        let name = match group {
            // As an engine's container is known by its control group.
            Group::Server => format!("{}-{CONTAINER_ID}", group.name()),
            Group::Client | Group::Proxy => group.name().to_owned(),
        };
        self.top().join(name)
    }

    /// Runs code on a thread in a namespace.
    ///
    /// # Errors
    /// The namespace is gone, or the code panics.
    pub fn within<T: Send>(&self, place: Place, run: impl FnOnce() -> T + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.namespace(place));
        let file = std::fs::File::open(&path).with_context(|| path)?;
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                Ok::<T, nix::Error>(run())
            });
            match thread.join() {
                Ok(done) => Ok(done?),
                Err(_) => bail!("the code in a namespace has panicked"),
            }
        })
    }

    fn set(&self, place: Place, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.within(place, || std::fs::write(&path, value))?
            .with_context(|| format!("{key} = {value}"))
    }

    /// A command in a namespace, accounted to nobody.
    #[must_use]
    pub fn enter(&self, place: Place, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespace(place)))
            .arg(program.as_ref())
            .stdin(Stdio::null());
        command
    }

    /// A command in a namespace (or none), accounted to a group.
    #[must_use]
    pub fn command(&self, place: Option<Place>, group: Group, program: &Path) -> Command {
        // The shell joins the group, then becomes the program.
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg("echo $$ >\"$0\" && exec \"$@\"")
            .arg(self.group(group).join("cgroup.procs"));
        if let Some(place) = place {
            command
                .arg("nsenter")
                .arg(format!("--net=/run/netns/{}", self.namespace(place)));
        }
        command.arg(program).stdin(Stdio::null());
        command
    }

    /// CPU time of the groups until now.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn cpu(&self) -> Result<Cpu> {
        let of = |group| -> Result<f64> {
            let (file, key) = match self.cgroup {
                Hierarchy::V1(_) => ("cpuacct.usage", ""),
                Hierarchy::V2(_) => ("cpu.stat", "usage_usec "),
            };
            let text = std::fs::read_to_string(self.group(group).join(file))?;
            let number: f64 = text
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .context("no CPU time in the cgroup")?
                .trim()
                .parse()?;
            Ok(number / if key.is_empty() { 1e9 } else { 1e6 })
        };
        Ok(Cpu {
            client: of(Group::Client)?,
            server: of(Group::Server)?,
            proxy: of(Group::Proxy)?,
        })
    }

    fn members(&self, group: Group) -> Vec<i32> {
        std::fs::read_to_string(self.group(group).join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.trim().parse().ok())
            .collect()
    }

    /// Memory of a group's processes.
    #[must_use]
    pub fn memory(&self, group: Group) -> Memory {
        let mut sum = Memory::default();
        for pid in self.members(group) {
            let text =
                std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            sum.processes += 1;
            for line in text.lines() {
                let bytes = line
                    .split_whitespace()
                    .nth(1)
                    .and_then(|word| word.parse::<u64>().ok())
                    .unwrap_or(0)
                    * 1024;
                if line.starts_with("Private_") {
                    sum.private += bytes;
                } else if line.starts_with("Rss:") {
                    sum.resident += bytes;
                }
            }
        }
        sum
    }

    /// Kills every process of a group and waits until they are gone.
    pub fn end(&self, group: Group) {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let members = self.members(group);
            if members.is_empty() || Instant::now() >= deadline {
                return;
            }
            for pid in members {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends and removes all that is there; nothing is no error.
    pub fn clean(&self) {
        crate::engine::end(self);
        crate::stats::crowd::end(self);
        for group in Group::ALL {
            self.end(group);
        }
        crate::node::detach(self);
        for place in Place::ALL {
            if Path::new("/run/netns").join(self.namespace(place)).exists() {
                let _ = ip(&format!("netns del {}", self.namespace(place)));
            }
        }
        for group in Group::ALL {
            // Children that this process has not reaped yet keep the group for a moment.
            let _ = until("an empty cgroup", || {
                let removed = std::fs::remove_dir(self.group(group));
                (removed.is_ok() || !self.group(group).exists()).then_some(())
            });
        }
        let _ = std::fs::remove_dir(self.top());
        let _ = std::fs::remove_dir_all(self.directory());
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.clean();
    }
}

/// Removes what benches that were killed have left.
fn sweep() {
    let Some(cgroup) = CgroupHierarchies::gather().cpu else {
        return;
    };
    let Ok(entries) = std::fs::read_dir(cgroup.mount()) else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.strip_prefix('-'))
            .and_then(|rest| rest.parse::<u32>().ok())
        else {
            continue;
        };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            let left = Site {
                id: name,
                cgroup: cgroup.clone(),
            };
            left.clean();
        }
    }
}
