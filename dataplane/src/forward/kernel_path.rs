//! The kernel path: service ports whose bytes no process touches.
//!
//! In: rows that may take it ([`eligibility`]), interfaces, addresses and routes of this host. Out: the
//! programs of crate `ebpf` attached to uplinks, to containers' links and to the sockets of this
//! host (`host`), their maps filled, counters. Everything is pinned ([`pins`]): it goes on when
//! this process is dead, and a later one takes it over in place. Invariants: a service is in the map
//! only while its container's link has the program for replies; flows of a service end with it; the
//! relay's listener is always there for what the programs leave alone; what waits for the kernel's
//! interface lock is done by a thread (`rtnl`), without which all else goes on.

mod attach;
mod attach_points;
pub mod eligibility;
mod error;
mod flows;
mod host;
mod leads;
mod object;
mod pending_removals;
pub mod pins;
mod predecessors;
mod rtnl;
mod services;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, PerCpuHashMap};
use aya::programs::ProgramFd;
use ebpf::records::{
    ADDRESS_HOST, Address, Bridge, Delivered, PortCounters, PortFlows, Service, ServiceKey,
    SweepOrder, WayBack,
};
use ebpf::{RELEASE_HOOK, map, program};
use shared::desired::ContainerRow;
use shared::log_limit::LogLimit;

pub use self::attach::AttachMethod;
pub use self::error::KernelPathError;
pub use self::flows::KernelPort;
use self::flows::Tables;
use self::host::Hooks;
use self::leads::{Leads, Services};
use self::object::{adopt_delivered, classifier, load, pins_fit, typed};
use self::pending_removals::PendingRemovals;
use self::pins::{Pins, PinsError};
use self::predecessors::Predecessors;
use self::rtnl::{AttachPoint, PacedRoutes, Reply, RtnlThread, Worker};
use crate::causes::chain;
use crate::sys::bpf::CounterTable;
use crate::sys::netlink::LinkLookup;
use crate::sys::netlink::interfaces::{Interface, InterfaceWatch, Interfaces};

/// Distance of sweeps.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug)]
struct Served {
    service: Service,
    port: Arc<KernelPort>,
}

impl Leads for Served {
    fn service(&self) -> &Service {
        &self.service
    }
}

/// Rows that something has changed for beside themselves and their containers.
#[derive(Debug, Default)]
pub struct AffectedRows {
    /// All of them.
    pub all: bool,
    /// Those of containers with these links.
    pub links: BTreeSet<u32>,
}

impl AffectedRows {
    fn is_empty(&self) -> bool {
        !self.all && self.links.is_empty()
    }

    fn holds(&self, link: u32) -> bool {
        self.all || self.links.contains(&link)
    }
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
    /// Nobody tells when that changes.
    pub untold: bool,
}

/// Why the relay serves a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// In words for the port's status.
    pub why: String,
    /// Only because a program is on its way to the container's link.
    pub waits: bool,
    /// Nobody tells when that changes.
    pub untold: bool,
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
    /// What another version has left attached, until flows have come over.
    predecessors: Predecessors,
    rtnl: RtnlThread,
    sweeper: ProgramFd,
    /// The hooks, or why there are none.
    hooks: Result<Hooks, String>,
    services: HashMap<MapData, ServiceKey, Service>,
    addresses: HashMap<MapData, Address, u32>,
    counters: PerCpuHashMap<MapData, ServiceKey, PortCounters>,
    active: HashMap<MapData, ServiceKey, PortFlows>,
    /// Both of these for all ports at once, where the kernel does that.
    tables: Option<Tables>,
    delivered: PerCpuHashMap<MapData, u32, Delivered>,
    /// The same for another thread.
    delivered_table: Option<CounterTable>,
    /// Bridges of containers' links ...
    bridges: HashMap<MapData, u32, Bridge>,
    /// ... and what is there.
    known_bridges: BTreeMap<u32, Bridge>,
    orders: Array<MapData, SweepOrder>,
    uplink_mtus: HashMap<MapData, u32, u32>,
    /// Networks that routes lead to by the uplinks ...
    ways_back: LpmTrie<MapData, WayBack, u32>,
    /// ... and what is there, with how many bits count.
    known_ways: BTreeSet<(u32, WayBack)>,
    /// Uplinks that lead to more than that.
    cut: BTreeSet<u32>,
    watch: InterfaceWatch,
    /// Lists that were asked for and have not come ...
    lists: u32,
    /// ... and looks at some interfaces.
    looks: u32,
    /// One has come.
    listed: bool,
    /// That thread hung at the last turn.
    hung: bool,
    interfaces: BTreeMap<u32, Interface>,
    /// Those by which clients of other hosts arrive ...
    ways_in: BTreeSet<u32>,
    /// ... and that have the program for them.
    uplinks: BTreeSet<u32>,
    /// Where programs are.
    attached: BTreeSet<AttachPoint>,
    /// Where those of an earlier process still are.
    inherited: BTreeSet<AttachPoint>,
    /// Where programs are on their way to, with the number of the order.
    attaching: BTreeMap<AttachPoint, u64>,
    /// Where programs can't be, until rows are looked at anew.
    refused: BTreeMap<AttachPoint, String>,
    /// Containers' links to which rows wait for a program to come.
    awaited: BTreeSet<u32>,
    /// Containers' links that have got one, and no service yet.
    unused: BTreeSet<u32>,
    known_addresses: BTreeSet<Address>,
    /// Container links that nobody but this host may reach the runner by, with how many containers
    /// have each ...
    guarded: BTreeMap<u32, usize>,
    /// ... and those of them where no guard is or is on its way.
    unguarded: BTreeSet<u32>,
    guards_tried_at: Instant,
    served: Services<Served>,
    /// Taken off, their flows not swept yet.
    unswept: BTreeSet<ServiceKey>,
    /// Swept, but still in a map.
    pending_removals: PendingRemovals,
    /// Some of those had flows, or there may be flows of clients that were shut out since.
    flows_left: bool,
    /// Services an earlier process has left.
    found: Services<Service>,
    routed: HashSet<(u32, u32, bool)>,
    next_life: u32,
    pass: u32,
    /// Something has changed: all, or these interfaces.
    changed_at: Option<Instant>,
    changed_all: bool,
    changed_links: BTreeSet<u32>,
    /// What has changed since the last turn.
    affected: AffectedRows,
    /// Some interfaces, or all, were asked for.
    looked_at: Instant,
    /// All were.
    scanned_at: Instant,
    /// Filters were put up anew.
    renewed_at: Instant,
    /// Routes are to be looked at then.
    routes_at: Option<Instant>,
    /// They were asked for.
    routed_at: Instant,
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

/// Flows of a life that was used before must not come back to life: one above all that are known,
/// and above those of services that ended earlier, as it goes by the clock.
fn unused_life(found: &Services<Service>) -> u32 {
    let seconds = shared::wall_ns() / 1_000_000_000;
    let clock = u32::try_from(seconds % u64::from(u32::MAX / 2)).unwrap_or(0);
    let known = found.values().map(|it| it.life);
    known.fold(clock, u32::max).wrapping_add(1).max(1)
}

/// A program's own descriptor, for who has not the object.
fn descriptor(object: &mut aya::Ebpf, name: &'static str) -> Result<ProgramFd, KernelPathError> {
    let fd = classifier(object, name)?
        .fd()
        .map_err(|source| KernelPathError::Program { name, source })?;
    fd.try_clone()
        .map_err(|source| KernelPathError::Descriptor { name, source })
}

/// Counts no socket of this host any more. Flows that come or go meanwhile are put right by a sweep.
fn forget_sockets(
    active: &mut HashMap<MapData, ServiceKey, PortFlows>,
) -> Result<(), KernelPathError> {
    let counted: Vec<_> = active.iter().flatten().collect();
    for (key, flows) in counted.into_iter().filter(|(_, flows)| flows.local != 0) {
        active
            .insert(key, PortFlows { local: 0, ..flows }, 0)
            .map_err(|source| KernelPathError::Map {
                name: map::ACTIVE,
                source,
            })?;
    }
    Ok(())
}

impl KernelPath {
    /// Loads the programs, takes over what an earlier process has pinned, attaches to the uplinks.
    /// `root` is the agent's run directory; `wake` is called, by another thread, when [`Self::turn`] has
    /// something to do.
    ///
    /// # Errors
    /// The step that failed: no permission, no BPF file system, an old kernel.
    pub fn start(
        agent: &str,
        root: &Path,
        method: AttachMethod,
        wake: impl Fn() + Send + 'static,
    ) -> Result<Self, KernelPathError> {
        let watch = InterfaceWatch::open().map_err(KernelPathError::Interfaces)?;
        let pins = Pins::open(agent, root).map_err(KernelPathError::Pins)?;
        if !pins_fit(&pins) {
            tracing::warn!("pinned maps are of another shape; flows of the kernel path are lost");
            pins.clear().map_err(KernelPathError::Pins)?;
        }
        adopt_delivered(&pins);
        // Nobody has seen sockets go, so those that were led are as good as unknown.
        let unseen = !pins.hook(RELEASE_HOOK).exists();
        if unseen {
            // Whom they led from here on, nobody would see go either.
            pins.remove_leading_hooks().map_err(KernelPathError::Pins)?;
            pins.remove_map(map::LED_SOCKETS)
                .map_err(KernelPathError::Pins)?;
        }
        let mut object = load(&pins)?;
        let services: HashMap<MapData, ServiceKey, Service> = typed!(&mut object, map::SERVICES);
        let addresses: HashMap<MapData, Address, u32> = typed!(&mut object, map::ADDRESSES);
        let counters: PerCpuHashMap<MapData, ServiceKey, PortCounters> =
            typed!(&mut object, map::COUNTERS);
        let mut active: HashMap<MapData, ServiceKey, PortFlows> = typed!(&mut object, map::ACTIVE);
        if unseen {
            forget_sockets(&mut active)?;
        }
        let tables = Tables::of(counters.map(), active.map())
            .inspect_err(|err| tracing::debug!(%err, "counters of ports are read one by one"))
            .ok();
        let delivered = typed!(&mut object, map::DELIVERED);
        let delivered_table = CounterTable::open(&pins.directory().join(map::DELIVERED))
            .map_err(KernelPathError::Delivered)?;
        let bridges: HashMap<MapData, u32, Bridge> = typed!(&mut object, map::BRIDGES);
        let known = bridges.iter().flatten();
        let known_bridges = known
            .map(|(link, it)| (link, Bridge { learnt: 0, ..it }))
            .collect();
        let orders: Array<MapData, SweepOrder> = typed!(&mut object, map::ORDERS);
        let uplink_mtus = typed!(&mut object, map::UPLINKS);
        let ways_back: LpmTrie<MapData, WayBack, u32> = typed!(&mut object, map::WAYS_BACK);
        let known_ways = ways_back.keys().flatten();
        let known_ways = known_ways.map(|it| (it.prefix_len(), it.data())).collect();
        let hooks = Hooks::start(&pins).map_err(|err| {
            tracing::warn!(
                err = chain(&err),
                "no hooks at this host's sockets, the relay serves its clients"
            );
            chain(&err)
        });
        let found: Services<Service> = services.iter().flatten().collect();
        let known_addresses = addresses
            .iter()
            .flatten()
            .filter(|(_, what)| *what == ADDRESS_HOST)
            .map(|(address, _)| address)
            .collect();
        let next_life = unused_life(&found);
        let pass = orders.get(&0, 0).map_or(0, |order| order.pass);
        let sweeper = descriptor(&mut object, program::SWEEP)?;
        let predecessors = Predecessors::beside(&pins);
        let worker = Worker {
            object,
            pins: pins.clone(),
            predecessors: predecessors.pins().to_vec(),
            method,
            interfaces: Interfaces::open().map_err(KernelPathError::Interfaces)?,
            routes: PacedRoutes::open().map_err(KernelPathError::Interfaces)?,
            names: LinkLookup::open().map_err(KernelPathError::Interfaces)?,
        };
        let rtnl = RtnlThread::start(worker, wake).map_err(KernelPathError::Thread)?;
        let now = Instant::now();
        let mut path = Self {
            predecessors,
            inherited: pins.links().into_iter().collect(),
            pins,
            rtnl,
            sweeper,
            hooks,
            services,
            addresses,
            counters,
            active,
            tables,
            delivered,
            delivered_table: Some(delivered_table),
            bridges,
            known_bridges,
            orders,
            uplink_mtus,
            ways_back,
            known_ways,
            cut: BTreeSet::new(),
            watch,
            lists: 0,
            looks: 0,
            listed: false,
            hung: false,
            interfaces: BTreeMap::new(),
            ways_in: BTreeSet::new(),
            uplinks: BTreeSet::new(),
            attached: BTreeSet::new(),
            attaching: BTreeMap::new(),
            refused: BTreeMap::new(),
            awaited: BTreeSet::new(),
            unused: BTreeSet::new(),
            known_addresses,
            guarded: BTreeMap::new(),
            unguarded: BTreeSet::new(),
            guards_tried_at: now,
            served: Services::default(),
            unswept: BTreeSet::new(),
            pending_removals: PendingRemovals::default(),
            flows_left: false,
            found,
            routed: HashSet::new(),
            next_life,
            pass,
            changed_at: None,
            changed_all: false,
            changed_links: BTreeSet::new(),
            affected: AffectedRows::default(),
            looked_at: now,
            scanned_at: now,
            renewed_at: now,
            routes_at: None,
            routed_at: now,
            swept_at: now,
            counted_at: now,
            log: LogLimit::default(),
        };
        path.take_over()?;
        tracing::info!(
            pins = %path.pins.directory().display(),
            uplinks = path.uplinks.len(),
            services = path.found.len(),
            "kernel path ready"
        );
        Ok(path)
    }

    /// Goes on with what an earlier process has left attached.
    fn take_over(&mut self) -> Result<(), KernelPathError> {
        // Of an earlier version, which did not count that.
        let led: BTreeSet<u32> = self.found.values().map(|it| it.link_index).collect();
        for link in led {
            self.count_delivered(link)?;
        }
        self.rtnl.remove_abandoned();
        self.ask_for_list(Instant::now());
        for reply in self.rtnl.wait() {
            match reply {
                Reply::Listed(Err(err)) => return Err(KernelPathError::Interfaces(err)),
                reply => self.hear(reply),
            }
        }
        self.catch_up();
        // Rows are looked at now in any case.
        self.affected = AffectedRows::default();
        Ok(())
    }

    /// What is due: a look at the interfaces, a sweep, the counters. True when there are rows for
    /// [`Self::affected`].
    pub fn turn(&mut self, now: Instant) -> bool {
        for reply in self.rtnl.replies() {
            self.hear(reply);
        }
        let hangs = self.rtnl.hangs();
        if std::mem::replace(&mut self.hung, hangs) != hangs {
            // Rows that wait say why.
            self.affected.all |= !self.listed;
            self.affected.links.extend(&self.awaited);
        }
        self.look_around(now);
        if now.saturating_duration_since(self.swept_at) >= SWEEP_INTERVAL {
            self.sweep(now);
            // Those that could not be removed.
            self.settle();
        }
        if now.saturating_duration_since(self.counted_at) >= Duration::from_secs(1) {
            self.counted_at = now;
            self.count();
        }
        !self.affected.is_empty()
    }

    /// Which rows are to be offered anew, since it was asked last.
    pub fn affected(&mut self) -> AffectedRows {
        std::mem::take(&mut self.affected)
    }

    /// False when its thread has ended by itself.
    pub fn healthy(&self) -> bool {
        self.rtnl.healthy()
    }

    /// Interfaces are known.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// What containers are given, for who reads it. It lives as long as their links.
    pub fn take_delivered(&mut self) -> Option<CounterTable> {
        self.delivered_table.take()
    }

    fn complain(&mut self, err: &KernelPathError) {
        if let Some(suppressed) = self.log.pass() {
            tracing::warn!(err = chain(err), suppressed, "the kernel path");
        }
    }
}

/// Removes all that the kernel path of an agent has left, of every version, and what agents that are gone
/// have. That may wait for the kernel's interface lock, for as long as anybody holds it, but nobody is
/// led any more by then. Answers the agent's own directories that were there.
///
/// # Errors
/// A directory can't be removed.
pub fn detach(agent: &str, root: &Path) -> Result<Vec<PathBuf>, PinsError> {
    let here = pins::here(agent, root);
    for pins in &here {
        lead_nobody(pins)?;
    }
    if let Ok(names) = LinkLookup::open() {
        pins::remove_abandoned(&names);
        for pins in &here {
            attach::remove_filters(pins, &names);
        }
    }
    pins::detach(agent, root)
}

/// Takes all services out, which ends their flows, and the hooks away. What has records of another size
/// keeps its services until its programs go.
fn lead_nobody(pins: &Pins) -> Result<(), PinsError> {
    let path = pins.directory().join(map::SERVICES);
    if let Ok(pinned) = MapData::from_pin(path)
        && let Ok(mut services) = HashMap::<_, ServiceKey, Service>::try_from(Map::HashMap(pinned))
    {
        let keys: Vec<ServiceKey> = services.keys().flatten().collect();
        for key in keys {
            if let Err(err) = services.remove(&key) {
                tracing::debug!(%err, "a service stays until the programs go");
            }
        }
    }
    pins.remove_hooks()
}
