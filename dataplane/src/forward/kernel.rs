//! The kernel path: service ports whose bytes no process touches.
//!
//! In: rows that may take it ([`eligibility`]), interfaces and addresses of this host. Out: the
//! programs of crate `ebpf` attached to uplinks, to containers' links and to the sockets of this
//! host (`host`), their maps filled, counters. Everything is pinned ([`pins`]): it goes on when
//! this process is dead, and a later one takes it over in place. Invariants: a service is in the map
//! only while its container's link has the program for replies; flows of a service end with it; the
//! relay's listener is always there for what the programs leave alone.

mod attach;
pub mod eligibility;
mod error;
mod host;
mod object;
pub mod pins;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData, MapError, PerCpuHashMap, PerCpuValues};
use ebpf::records::{
    ADDRESS_CONTAINER, ADDRESS_HOST, Address, ClientNetwork, PROTOCOL_TCP, PROTOCOL_UDP,
    PortCounters, PortFlows, SERVICE_ANY_ADDRESS, SERVICE_DRAINING, SERVICE_HOST, SERVICE_REMOTE,
    Service, ServiceKey, SweepOrder,
};
use ebpf::{map, program};
use shared::desired::{ContainerRow, PortKey, PortRow, Protocol};

pub use self::attach::Means;
use self::eligibility::Circumstances;
pub use self::error::{KernelPathError, words};
use self::host::Hooks;
use self::object::{classifier, load, pins_fit, typed};
use self::pins::{Pins, PinsError, Side};
use super::relay::port::Counters;
use crate::log_limit::LogLimit;
use crate::sys::bpf;
use crate::sys::netlink::interfaces::{Interface, Interfaces};

/// A SYN may be repeated for so long before its flow is given up.
const OPENING: Duration = Duration::from_secs(60);
/// Late segments of an ended flow still find their way for so long.
const ENDED: Duration = Duration::from_secs(30);
/// A silent flow is forgotten after this, as by the kernel's connection tracking.
const IDLE: Duration = Duration::from_secs(5 * 24 * 3600);
/// The same for datagrams, whose flows have no end.
const DATAGRAM_IDLE: Duration = Duration::from_secs(180);
/// ... and before an answer.
const DATAGRAM_OPENING: Duration = Duration::from_secs(30);
/// Distance of sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);
/// Distance of two looks at the interfaces, however often they change.
const RESCAN_INTERVAL: Duration = Duration::from_millis(100);
/// A look at the interfaces without a notification.
const RESCAN_SLOWLY: Duration = Duration::from_secs(30);
/// Containers whose routes were looked at and found good.
const ROUTED: usize = 65_536;

/// What a port has counted on the kernel path; refreshed every second.
#[derive(Debug, Default)]
pub struct KernelPort {
    active: AtomicU64,
    total: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    refused: AtomicU64,
    packets_in: AtomicU64,
    packets_out: AtomicU64,
    /// Of the active ones, those of clients on this host.
    local: AtomicU64,
}

impl KernelPort {
    /// The counters, in the relay's terms. A payload that is sent again counts again; that of
    /// clients on this host is not counted.
    pub fn counters(&self) -> Counters {
        Counters {
            active: u32::try_from(self.active.load(Relaxed)).unwrap_or(u32::MAX),
            total: self.total.load(Relaxed),
            refused: self.refused.load(Relaxed),
            packets_in: self.packets_in.load(Relaxed),
            packets_out: self.packets_out.load(Relaxed),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
            ..Counters::default()
        }
    }
}

#[derive(Debug)]
struct Served {
    service: Service,
    port: Arc<KernelPort>,
}

/// What the kernel path does for a row.
#[derive(Debug, Clone)]
pub struct Lift {
    /// Where it counts.
    pub port: Arc<KernelPort>,
    /// Why clients of other hosts are not served by it.
    pub remote: Option<String>,
    /// Why those on this host are not.
    pub host: Option<String>,
}

/// What holds for a row beside the row itself.
#[derive(Debug, Clone)]
pub struct Terms<'a> {
    /// Its container, if that is known.
    pub container: Option<&'a ContainerRow>,
    /// Most flows at once; 0 means no limit.
    pub max_flows: u32,
    /// Most new flows in a second, in the long run; 0 means no limit.
    pub new_per_second: u32,
    /// Silent sessions are to be ended.
    pub idle_timeout: bool,
    /// Client networks that are let in; none means all.
    pub allowed: &'a [shared::desired::ClientNetwork],
    /// Sessions of the relay that would be torn apart.
    pub relayed: u32,
}

/// The kernel path. One thread owns it.
pub struct KernelPath {
    pins: Pins,
    means: Means,
    object: Ebpf,
    /// The hooks, or why there are none.
    hooks: Result<Hooks, String>,
    services: HashMap<MapData, ServiceKey, Service>,
    addresses: HashMap<MapData, Address, u32>,
    counters: PerCpuHashMap<MapData, ServiceKey, PortCounters>,
    active: HashMap<MapData, ServiceKey, PortFlows>,
    orders: Array<MapData, SweepOrder>,
    uplink_mtus: HashMap<MapData, u32, u32>,
    watch: Interfaces,
    interfaces: BTreeMap<u32, Interface>,
    uplinks: BTreeSet<u32>,
    attached: BTreeSet<(Side, u32)>,
    known_addresses: BTreeSet<Address>,
    /// Container links that nobody but this host may reach the runner by.
    guarded: BTreeSet<u32>,
    served: BTreeMap<ServiceKey, Served>,
    /// Taken off, their flows not swept yet.
    unswept: BTreeSet<ServiceKey>,
    /// Services an earlier process has left.
    found: BTreeMap<ServiceKey, Service>,
    routed: HashSet<(u32, u32, bool)>,
    next_life: u32,
    pass: u32,
    changed_at: Option<Instant>,
    scanned_at: Instant,
    swept_at: Instant,
    counted_at: Instant,
    log: LogLimit,
}

impl std::fmt::Debug for KernelPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelPath")
            .field("pins", &self.pins)
            .field("uplinks", &self.uplinks)
            .field("served", &self.served.len())
            .finish_non_exhaustive()
    }
}

fn key_of(key: PortKey) -> ServiceKey {
    ServiceKey {
        port: key.host_port.to_be(),
        protocol: match key.protocol {
            Protocol::Tcp => PROTOCOL_TCP,
            Protocol::Udp => PROTOCOL_UDP,
        },
        zero: 0,
    }
}

/// The service of a row; its life is not decided here.
fn service_of(row: &PortRow, terms: &Terms<'_>, clients: u8) -> Service {
    let mut network = [ClientNetwork::default(); ebpf::records::CLIENT_NETWORKS];
    for (slot, it) in network.iter_mut().zip(terms.allowed) {
        *slot = ClientNetwork::new(it.address, it.prefix);
    }
    let any = if row.bind.is_unspecified() {
        SERVICE_ANY_ADDRESS
    } else {
        0
    };
    Service {
        bind: Address::from(row.bind),
        target: Address::from(row.target),
        link_index: row.link_index,
        life: 0,
        max_flows: terms.max_flows,
        target_port: row.target_port.to_be(),
        flags: any | clients,
        networks: u8::try_from(terms.allowed.len()).unwrap_or(u8::MAX),
        network,
        spacing_ns: match terms.new_per_second {
            0 => 0,
            rate => 1_000_000_000 / u64::from(rate),
        },
    }
}

/// Whether flows of one service may go on under the other.
fn same_route(a: &Service, b: &Service) -> bool {
    (a.bind, a.target, a.target_port, a.link_index)
        == (b.bind, b.target, b.target_port, b.link_index)
        && (a.flags ^ b.flags) & SERVICE_ANY_ADDRESS == 0
}

impl KernelPath {
    /// Loads the programs, takes over what an earlier process has pinned, attaches to the uplinks.
    /// `root` is the agent's run directory.
    ///
    /// # Errors
    /// The step that failed: no permission, no BPF file system, an old kernel.
    pub fn start(agent: &str, root: &Path, means: Means) -> Result<Self, KernelPathError> {
        let watch = Interfaces::open().map_err(KernelPathError::Interfaces)?;
        let pins = Pins::open(agent, root).map_err(KernelPathError::Pins)?;
        if !pins_fit(&pins) {
            tracing::warn!("pinned maps are of another shape; flows of the kernel path are lost");
            pins.clear().map_err(KernelPathError::Pins)?;
        }
        let mut object = load(&pins)?;
        let services: HashMap<MapData, ServiceKey, Service> = typed!(&mut object, map::SERVICES);
        let addresses: HashMap<MapData, Address, u32> = typed!(&mut object, map::ADDRESSES);
        let counters = typed!(&mut object, map::COUNTERS);
        let active = typed!(&mut object, map::ACTIVE);
        let orders: Array<MapData, SweepOrder> = typed!(&mut object, map::ORDERS);
        let uplink_mtus = typed!(&mut object, map::UPLINKS);
        let hooks = Hooks::start(&pins).map_err(|err| {
            tracing::warn!(
                err = words(&err),
                "no hooks at this host's sockets, the relay serves its clients"
            );
            words(&err)
        });
        let found: BTreeMap<ServiceKey, Service> = services.iter().flatten().collect();
        let known_addresses = addresses
            .iter()
            .flatten()
            .filter(|(_, what)| *what == ADDRESS_HOST)
            .map(|(address, _)| address)
            .collect();
        // Flows of a life that was used before must not come back to life.
        let clock =
            u32::try_from(shared::wall_ns() / 1_000_000_000 % u64::from(u32::MAX / 2)).unwrap_or(0);
        let next_life = found.values().map(|it| it.life).fold(clock, u32::max) + 1;
        let pass = orders.get(&0, 0).map_or(0, |order| order.pass);
        let now = Instant::now();
        let mut path = Self {
            pins,
            means,
            object,
            hooks,
            services,
            addresses,
            counters,
            active,
            orders,
            uplink_mtus,
            watch,
            interfaces: BTreeMap::new(),
            uplinks: BTreeSet::new(),
            attached: BTreeSet::new(),
            known_addresses,
            guarded: BTreeSet::new(),
            served: BTreeMap::new(),
            unswept: BTreeSet::new(),
            found,
            routed: HashSet::new(),
            next_life,
            pass,
            changed_at: None,
            scanned_at: now,
            swept_at: now,
            counted_at: now,
            log: LogLimit::default(),
        };
        path.scan()?;
        // Replies of flows under way are translated by this version from now on, too.
        for (side, index) in path.pins.links() {
            if side != Side::Uplink && path.interfaces.contains_key(&index) {
                path.attach(side, index)?;
            }
        }
        for other in path.pins.other_layouts() {
            attach::remove_filters(&other, &path.interfaces);
        }
        path.pins
            .remove_other_layouts()
            .map_err(KernelPathError::Pins)?;
        tracing::info!(
            pins = %path.pins.directory().display(),
            uplinks = path.uplinks.len(),
            services = path.found.len(),
            "kernel path ready"
        );
        Ok(path)
    }

    /// Readable when interfaces or addresses have changed.
    pub fn watch(&self) -> RawFd {
        self.watch.watch()
    }

    /// Attaches a program to an interface, or puts it in the place of an earlier version's.
    fn attach(&mut self, side: Side, index: u32) -> Result<(), KernelPathError> {
        if self.attached.contains(&(side, index)) {
            return Ok(());
        }
        let interface = self
            .interfaces
            .get(&index)
            .map_or_else(|| index.to_string(), |it| it.name.clone());
        let name = match side {
            Side::Uplink => program::FROM_UPLINK,
            Side::Container => program::FROM_CONTAINER,
            Side::Guard => program::TO_CONTAINER,
        };
        let program = classifier(&mut self.object, name)?;
        attach::attach(program, &self.pins, self.means, side, index, &interface)?;
        self.attached.insert((side, index));
        Ok(())
    }

    fn detach(&mut self, side: Side, index: u32) {
        self.attached.remove(&(side, index));
        let interface = self.interfaces.get(&index).map(|it| it.name.as_str());
        if let Err(err) = attach::detach(&self.pins, side, index, interface) {
            tracing::warn!(
                interface = index,
                err = words(&err),
                "a link stays attached"
            );
        }
    }

    /// Looks at interfaces and addresses: attaches to new uplinks, forgets what is gone.
    fn scan(&mut self) -> Result<(), KernelPathError> {
        self.interfaces = self.watch.list().map_err(KernelPathError::Interfaces)?;
        self.scanned_at = Instant::now();
        let addresses: BTreeSet<Address> = self
            .interfaces
            .values()
            .flat_map(|it| &it.addresses)
            .filter(|address| eligibility::is_reachable(**address))
            .map(|address| Address::from(*address))
            .collect();
        let fails = |source| KernelPathError::Map {
            name: map::ADDRESSES,
            source,
        };
        for address in self.known_addresses.difference(&addresses) {
            match self.addresses.remove(address) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(source) => return Err(fails(source)),
            }
        }
        for address in addresses.difference(&self.known_addresses) {
            self.addresses
                .insert(address, ADDRESS_HOST, 0)
                .map_err(fails)?;
        }
        self.known_addresses = addresses;

        let wanted = eligibility::uplinks(&self.interfaces);
        self.note_uplinks(&wanted)?;
        self.uplinks.clear();
        for index in &wanted {
            match self.attach(Side::Uplink, *index) {
                Ok(()) => {
                    self.uplinks.insert(*index);
                }
                Err(err) => {
                    if let Some(suppressed) = self.log.pass() {
                        tracing::warn!(
                            interface = index,
                            err = words(&err),
                            suppressed,
                            "clients that come in by this interface are served by the relay"
                        );
                    }
                }
            }
        }
        for (side, index) in self.pins.links() {
            let stale = match side {
                // An uplink that is down for a moment keeps its program.
                Side::Uplink => self
                    .interfaces
                    .get(&index)
                    .is_none_or(|it| it.up && !wanted.contains(&index)),
                Side::Container | Side::Guard => !self.interfaces.contains_key(&index),
            };
            if stale {
                self.detach(side, index);
            }
        }
        Ok(())
    }

    /// Tells the programs how large a packet may leave by each uplink.
    fn note_uplinks(&mut self, wanted: &BTreeSet<u32>) -> Result<(), KernelPathError> {
        let fails = |source| KernelPathError::Map {
            name: map::UPLINKS,
            source,
        };
        let known: BTreeMap<u32, u32> = self.uplink_mtus.iter().flatten().collect();
        for index in known.keys().filter(|index| !wanted.contains(index)) {
            match self.uplink_mtus.remove(index) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(source) => return Err(fails(source)),
            }
        }
        for index in wanted {
            let Some(interface) = self.interfaces.get(index) else {
                continue;
            };
            if known.get(index) != Some(&interface.mtu) {
                self.uplink_mtus
                    .insert(index, interface.mtu, 0)
                    .map_err(fails)?;
            }
        }
        Ok(())
    }

    /// Keeps everybody but this host away from the runners of these containers.
    pub fn guard<'a>(&mut self, containers: impl Iterator<Item = &'a ContainerRow>) {
        let links: BTreeSet<u32> = containers
            .filter(|it| !it.host_network)
            .flat_map(|it| it.link_indexes.iter().copied())
            .filter(|link| {
                let interface = self.interfaces.get(link);
                interface.is_none_or(|it| it.kind == "veth" && it.peer_elsewhere)
            })
            .collect();
        for link in &links {
            if self.guarded.contains(link) {
                continue;
            }
            if let Err(err) = self.attach(Side::Guard, *link) {
                self.complain(&err);
            }
        }
        self.guarded = links;
    }

    /// What is due: a look at the interfaces, a sweep, the counters. True when rows should be
    /// looked at anew.
    pub fn turn(&mut self, now: Instant) -> bool {
        if self.watch.changed() {
            self.changed_at.get_or_insert(now);
        }
        let since = now.saturating_duration_since(self.scanned_at);
        let mut rescanned = false;
        if since >= RESCAN_SLOWLY || (self.changed_at.is_some() && since >= RESCAN_INTERVAL) {
            self.changed_at = None;
            let before = (self.interfaces.clone(), self.uplinks.clone());
            if let Err(err) = self.scan() {
                self.scanned_at = now;
                self.complain(&err);
            }
            rescanned = before != (self.interfaces.clone(), self.uplinks.clone());
        }
        if now.saturating_duration_since(self.swept_at) >= SWEEP_INTERVAL {
            self.sweep(now);
        }
        if now.saturating_duration_since(self.counted_at) >= Duration::from_secs(1) {
            self.counted_at = now;
            self.count();
        }
        rescanned
    }

    /// Changes wait for their turn: come back soon.
    pub fn is_pending(&self) -> bool {
        self.changed_at.is_some()
    }

    fn complain(&mut self, err: &KernelPathError) {
        if let Some(suppressed) = self.log.pass() {
            tracing::warn!(err = words(err), suppressed, "the kernel path");
        }
    }

    /// Serves a row, or says why the relay must. The same row again costs nothing.
    ///
    /// # Errors
    /// Words for the port's status.
    pub fn offer(&mut self, row: &PortRow, terms: &Terms<'_>) -> Result<Lift, String> {
        let at = Circumstances {
            container: terms.container,
            interfaces: &self.interfaces,
            uplinks: &self.uplinks,
            idle_timeout: terms.idle_timeout,
            networks: terms.allowed.len(),
            // Once it is served here, sessions of the relay are those of others.
            relayed: if self.served.contains_key(&key_of(row.key())) {
                0
            } else {
                terms.relayed
            },
        };
        let common = eligibility::common_obstacle(row, &at);
        let remote = eligibility::remote_obstacle(row, &at).or_else(|| {
            let pid = terms.container.map_or(0, |it| it.init_pid);
            self.no_route(pid, row.link_index, row.target)
        });
        let host = self.hooks.as_ref().err().cloned();
        if let Some(why) = common.or_else(|| host.as_ref().and(remote.clone())) {
            self.withdraw(row.key());
            return Err(why);
        }
        let clients = if remote.is_none() { SERVICE_REMOTE } else { 0 }
            | if host.is_none() { SERVICE_HOST } else { 0 };
        match self.serve(row, service_of(row, terms, clients)) {
            Ok(port) => Ok(Lift { port, remote, host }),
            Err(err) => {
                self.complain(&err);
                self.withdraw(row.key());
                Err(words(&err))
            }
        }
    }

    fn no_route(&mut self, pid: u32, link: u32, target: IpAddr) -> Option<String> {
        let mark = (pid, link, target.is_ipv6());
        if self.routed.contains(&mark) {
            return None;
        }
        if pid == 0 || !eligibility::has_default_route(Path::new("/proc"), pid, target) {
            return Some("the container has no default route".to_owned());
        }
        if self.routed.len() >= ROUTED {
            self.routed.clear();
        }
        self.routed.insert(mark);
        None
    }

    fn serve(
        &mut self,
        row: &PortRow,
        mut service: Service,
    ) -> Result<Arc<KernelPort>, KernelPathError> {
        let key = key_of(row.key());
        if self.unswept.contains(&key) {
            self.settle();
        }
        let before = self
            .served
            .get(&key)
            .map(|it| it.service)
            .or_else(|| self.found.get(&key).copied());
        match before {
            Some(before) if same_route(&before, &service) => service.life = before.life,
            Some(_) => {
                self.withdraw(row.key());
                self.settle();
                service.life = self.new_life();
            }
            None => service.life = self.new_life(),
        }
        if let Some(served) = self.served.get(&key)
            && served.service == service
        {
            return Ok(Arc::clone(&served.port));
        }
        self.attach(Side::Container, row.link_index)?;
        if let Ok(hooks) = &mut self.hooks {
            hooks.allow(row.link_index)?;
        }
        self.addresses
            .insert(service.target, ADDRESS_CONTAINER, 0)
            .map_err(|source| KernelPathError::Map {
                name: map::ADDRESSES,
                source,
            })?;
        if self.active.get(&key, 0).is_err() {
            self.active
                .insert(key, PortFlows::default(), 0)
                .map_err(|source| KernelPathError::Map {
                    name: map::ACTIVE,
                    source,
                })?;
        }
        if self.counters.get(&key, 0).is_err() {
            let cpus = aya::util::nr_cpus().map_err(|(_, err)| KernelPathError::Sweep(err))?;
            let fails = |source| KernelPathError::Map {
                name: map::COUNTERS,
                source,
            };
            let zero = PerCpuValues::try_from(vec![PortCounters::default(); cpus])
                .map_err(|err| fails(MapError::IoError(err)))?;
            self.counters.insert(key, zero, 0).map_err(fails)?;
        }
        self.services
            .insert(key, service, 0)
            .map_err(|source| KernelPathError::Map {
                name: map::SERVICES,
                source,
            })?;
        self.found.remove(&key);
        let port = self
            .served
            .remove(&key)
            .map(|it| it.port)
            .unwrap_or_default();
        self.served.insert(
            key,
            Served {
                service,
                port: Arc::clone(&port),
            },
        );
        self.count_one(key);
        Ok(port)
    }

    fn new_life(&mut self) -> u32 {
        let life = self.next_life;
        self.next_life = self.next_life.wrapping_add(1).max(1);
        life
    }

    /// Takes no new flows for a port; those there are go on. False when it is not served here.
    pub fn drain(&mut self, key: PortKey) -> bool {
        let key = key_of(key);
        let Some(served) = self.served.get_mut(&key) else {
            return false;
        };
        served.service.flags |= SERVICE_DRAINING;
        let service = served.service;
        if let Err(source) = self.services.insert(key, service, 0) {
            self.complain(&KernelPathError::Map {
                name: map::SERVICES,
                source,
            });
            return false;
        }
        true
    }

    /// Whether this is what serves a port now.
    pub fn is_served_by(&self, key: PortKey, port: &Arc<KernelPort>) -> bool {
        self.served
            .get(&key_of(key))
            .is_some_and(|it| Arc::ptr_eq(&it.port, port))
    }

    /// Takes a port off the kernel path: no new flows, and those there were are cut. Its counters
    /// hold what it had counted in the end. Not served here is fine.
    pub fn withdraw(&mut self, key: PortKey) {
        let key = key_of(key);
        let link = match (self.served.contains_key(&key), self.found.remove(&key)) {
            (true, _) => self.served.get(&key).map(|it| it.service.link_index),
            (false, Some(found)) => Some(found.link_index),
            (false, None) => return,
        };
        match self.services.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(source) => self.complain(&KernelPathError::Map {
                name: map::SERVICES,
                source,
            }),
        }
        self.count_one(key);
        let target = self.served.remove(&key).map(|served| {
            if let Ok(hooks) = &self.hooks
                && served.port.local.load(Relaxed) > 0
            {
                hooks.cut(key, &served.service);
            }
            served.port.active.store(0, Relaxed);
            served.service.target
        });
        self.unswept.insert(key);
        if let Some(target) = target
            && !self.served.values().any(|it| it.service.target == target)
            && !self.known_addresses.contains(&target)
        {
            let _ = self.addresses.remove(&target);
        }
        if let Some(link) = link
            && !self.services_at(link)
        {
            if let Ok(hooks) = &mut self.hooks {
                hooks.forbid(link);
            }
            self.detach(Side::Container, link);
        }
    }

    /// Cuts the flows of ports that were taken off; many at once cost no more than one.
    pub fn settle(&mut self) {
        if self.unswept.is_empty() {
            return;
        }
        self.sweep(Instant::now());
        for key in std::mem::take(&mut self.unswept) {
            if !self.served.contains_key(&key) {
                let _ = self.counters.remove(&key);
                let _ = self.active.remove(&key);
            }
        }
    }

    fn services_at(&self, link: u32) -> bool {
        self.served.values().any(|it| it.service.link_index == link)
            || self.found.values().any(|it| it.link_index == link)
    }

    /// Gives up what an earlier process has left and nobody has asked for since.
    pub fn forget_unclaimed(&mut self) {
        let unclaimed: Vec<ServiceKey> = self.found.keys().copied().collect();
        for key in unclaimed {
            let host_port = u16::from_be(key.port);
            tracing::info!(
                port = host_port,
                "nobody wants this port of an earlier life"
            );
            self.withdraw(PortKey {
                protocol: if key.protocol == PROTOCOL_UDP {
                    Protocol::Udp
                } else {
                    Protocol::Tcp
                },
                host_port,
            });
        }
        self.settle();
        for (side, index) in self.pins.links() {
            let unwanted = match side {
                Side::Uplink => false,
                Side::Container => !self.services_at(index),
                Side::Guard => !self.guarded.contains(&index),
            };
            if unwanted {
                self.detach(side, index);
            }
        }
    }

    /// Removes dead flows and counts the living.
    pub fn sweep(&mut self, now: Instant) {
        self.swept_at = now;
        if let Err(err) = self.try_sweep() {
            self.complain(&err);
        }
    }

    fn try_sweep(&mut self) -> Result<(), KernelPathError> {
        let nanoseconds = |it: Duration| u64::try_from(it.as_nanos()).unwrap_or(u64::MAX);
        self.pass = self.pass.wrapping_add(1);
        let order = SweepOrder {
            opening_ns: nanoseconds(OPENING),
            idle_ns: nanoseconds(IDLE),
            ended_ns: nanoseconds(ENDED),
            datagram_idle_ns: nanoseconds(DATAGRAM_IDLE),
            datagram_opening_ns: nanoseconds(DATAGRAM_OPENING),
            pass: self.pass,
            zero: 0,
        };
        self.orders
            .set(0, order, 0)
            .map_err(|source| KernelPathError::Map {
                name: map::ORDERS,
                source,
            })?;
        let program = classifier(&mut self.object, program::SWEEP)?;
        let fd = program.fd().map_err(|source| KernelPathError::Program {
            name: program::SWEEP,
            source,
        })?;
        bpf::run_once(fd).map_err(KernelPathError::Sweep)?;
        for (key, served) in &self.served {
            let Ok(mut flows) = self.active.get(key, 0) else {
                continue;
            };
            let counted = if flows.pass == self.pass {
                flows.counted
            } else {
                0
            };
            let local = u64::try_from(flows.local).unwrap_or(0);
            served
                .port
                .active
                .store(u64::from(counted) + local, Relaxed);
            if flows.active != i64::from(counted) {
                // Flows pushed out by newer ones, or by a race of two processors.
                flows.active = i64::from(counted);
                let _ = self.active.insert(key, flows, 0);
            }
        }
        Ok(())
    }

    fn count(&mut self) {
        for (key, served) in &self.served {
            self.read_counters(*key, &served.port);
        }
    }

    fn count_one(&mut self, key: ServiceKey) {
        if let Some(served) = self.served.get(&key) {
            self.read_counters(key, &served.port);
        }
    }

    fn read_counters(&self, key: ServiceKey, port: &KernelPort) {
        if let Ok(values) = self.counters.get(&key, 0) {
            let sum = |of: fn(&PortCounters) -> u64| values.iter().map(of).sum();
            port.total.store(sum(|it| it.flows), Relaxed);
            port.bytes_in.store(sum(|it| it.bytes_in), Relaxed);
            port.bytes_out.store(sum(|it| it.bytes_out), Relaxed);
            port.refused.store(sum(|it| it.refused), Relaxed);
            port.packets_in.store(sum(|it| it.packets_in), Relaxed);
            port.packets_out.store(sum(|it| it.packets_out), Relaxed);
        }
        if let Ok(flows) = self.active.get(&key, 0) {
            let local = flows.local.max(0);
            port.local.store(u64::try_from(local).unwrap_or(0), Relaxed);
            let active = u64::try_from(flows.active + local).unwrap_or(0);
            port.active.store(active, Relaxed);
        }
    }
}

/// Removes all that the kernel path of an agent has left, of every version. Answers the directories
/// that were there.
///
/// # Errors
/// A directory can't be removed.
pub fn detach(agent: &str, root: &Path) -> Result<Vec<PathBuf>, PinsError> {
    let left = pins::here(agent, root);
    if !left.is_empty()
        && let Ok(mut watch) = Interfaces::open()
        && let Ok(interfaces) = watch.list()
    {
        for pins in &left {
            attach::remove_filters(pins, &interfaces);
        }
    }
    pins::detach(agent, root)
}
