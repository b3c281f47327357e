//! Services: rows in the terms of the programs, put into their map and taken out of it.
//!
//! In: rows and what holds for them. Out: where a row counts, or why it is not served here.
//! Invariants: a service is in the map only while its container's link has the program for replies;
//! a service that leads elsewhere has another life, so that no flow follows it there.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use aya::Pod;
use aya::maps::{IterableMap as _, MapError, PerCpuValues};
use ebpf::map;
use ebpf::records::{
    ADDRESS_CONTAINER, Address, ClientNetwork, Delivered, PROTOCOL_TCP, PROTOCOL_UDP, PortCounters,
    PortFlows, SERVICE_ANY_ADDRESS, SERVICE_DRAINING, SERVICE_HOST, SERVICE_REMOTE,
    SERVICE_REMOTE_OLD, Service, ServiceKey,
};
use shared::desired::{PortKey, PortRow, Protocol};

use super::eligibility::{self, EligibilityInputs};
use super::pins::Side;
use super::{KernelPath, KernelPathError, KernelPort, Lift, Refusal, Served, Terms};
use crate::causes::chain;
use crate::forward::relay::port::Counters;
use crate::sys::bpf;

/// linux/bpf.h: an update that makes an entry or replaces it.
const BPF_ANY: u64 = 0;
/// linux/bpf.h: an update that makes an entry or fails.
const BPF_NOEXIST: u64 = 1;
/// Containers whose routes were looked at and found good.
const ROUTED: usize = 65_536;

/// Clients of other hosts, new ones or those there are.
const REMOTE: u8 = SERVICE_REMOTE | SERVICE_REMOTE_OLD;

/// No client of another host may use the row's port.
fn is_of_this_host(row: &PortRow) -> bool {
    row.local_only || row.bind.is_loopback()
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

fn each_cpu<T: Pod + Default>() -> Result<PerCpuValues<T>, MapError> {
    let cpus = aya::util::nr_cpus().map_err(|(_, err)| MapError::IoError(err))?;
    PerCpuValues::try_from(vec![T::default(); cpus]).map_err(MapError::IoError)
}

/// Whether an entry was made: one that is there already stays as it is.
fn is_new(made: Result<(), MapError>) -> Result<bool, MapError> {
    match made {
        Ok(()) => Ok(true),
        Err(MapError::SyscallError(err))
            if err.io_error.kind() == std::io::ErrorKind::AlreadyExists =>
        {
            Ok(false)
        }
        Err(err) => Err(err),
    }
}

/// Whether flows of one service may go on under the other.
fn same_route(a: &Service, b: &Service) -> bool {
    (a.bind, a.target, a.target_port, a.link_index)
        == (b.bind, b.target, b.target_port, b.link_index)
        && (a.flags ^ b.flags) & SERVICE_ANY_ADDRESS == 0
}

/// Whether some flows of one service, of the same route, end under the other.
fn lets_in_less(before: &Service, service: &Service) -> bool {
    has_other_networks(before, service)
        || (before.flags & REMOTE != 0 && service.flags & REMOTE == 0)
}

fn has_other_networks(before: &Service, service: &Service) -> bool {
    let networks = |it: &Service| (it.networks, it.network);
    service.networks > 0 && networks(before) != networks(service)
}

/// Whether a service lets a client in.
fn lets_in(service: &Service, client: &Address) -> bool {
    let networks = &service.network[..usize::from(service.networks).min(service.network.len())];
    let is_of = |it: &ClientNetwork| {
        let bytes = client.0.iter().zip(it.address.0).zip(it.mask.0);
        let mut other = bytes.filter(|((client, address), mask)| (**client ^ address) & mask != 0);
        other.next().is_none()
    };
    service.networks == 0 || networks.iter().any(is_of)
}

/// Why a row's service is not in the map.
enum Unserved {
    /// Its link has not got the program yet.
    Waits,
    /// Its link can't have the program; the log has been told.
    Refused(String),
    /// Another step failed.
    Failed(KernelPathError),
}

impl From<KernelPathError> for Unserved {
    fn from(err: KernelPathError) -> Self {
        Self::Failed(err)
    }
}

fn refused(why: String) -> Refusal {
    Refusal {
        why,
        waits: false,
        untold: false,
    }
}

/// The same, where something may have passed by the next time.
fn refused_so_far(why: String) -> Refusal {
    Refusal {
        untold: true,
        ..refused(why)
    }
}

impl KernelPath {
    /// Rows are about to be offered, those among them that were refused for now: what was refused is tried
    /// again.
    pub fn begin_offers(&mut self) {
        self.refused.clear();
    }

    /// Serves a row, or says why the relay must. The same row again costs nothing. One that waits for a
    /// program has not been taken down yet: it is to be offered again after [`Self::catch_up`], and
    /// [`Self::put_off`] when it waits still.
    ///
    /// # Errors
    /// Words for the port's status.
    pub fn offer(&mut self, row: &PortRow, terms: &Terms<'_>) -> Result<Lift, Refusal> {
        self.look_for(row.link_index);
        let at = EligibilityInputs {
            container: terms.container,
            interfaces: &self.interfaces,
            uplinks: &self.uplinks,
            idle_timeout: terms.idle_timeout,
            networks: terms.allowed.len(),
            // Once it is served here, sessions of the relay are those of others.
            relayed: if !self.listed || self.served.contains_key(&key_of(row.key())) {
                0
            } else {
                terms.relayed
            },
        };
        let judge: fn(&PortRow, &EligibilityInputs<'_>) -> Option<String> = if self.listed {
            eligibility::common_obstacle
        } else {
            eligibility::obstacle_of_row
        };
        let common = judge(row, &at);
        let remote = eligibility::remote_obstacle(row, &at);
        let filtered_alone = row.honour_firewall && {
            let unfiltered = PortRow {
                honour_firewall: false,
                ..row.clone()
            };
            judge(&unfiltered, &at).is_none()
        };
        if filtered_alone && let Some(port) = self.let_finish(row, terms) {
            return Ok(Lift {
                port,
                remote: common.clone(),
                host: common,
                untold: true,
            });
        }
        if !self.listed {
            return Err(refused(self.keep(row, terms, common)));
        }
        let mut untold = false;
        let remote = remote.or_else(|| {
            let pid = terms.container.map_or(0, |it| it.init_pid);
            let none = self.no_route(pid, row.link_index, row.target);
            untold = none.is_some();
            none
        });
        let host = self.hooks.as_ref().err().cloned();
        if (common.is_none() && remote.is_some() && host.is_some())
            && let Some(port) = self.let_finish(row, terms)
        {
            return Ok(Lift {
                port,
                remote,
                host,
                untold: true,
            });
        }
        if let Some(why) = common.or_else(|| host.as_ref().and(remote.clone())) {
            self.withdraw(row.key());
            return Err(Refusal {
                untold,
                ..refused(why)
            });
        }
        // What keeps new ones away may pass, or is of the container's making: no reason to cut the others.
        let others = match &remote {
            None => SERVICE_REMOTE,
            Some(_) if is_of_this_host(row) => 0,
            Some(_) => SERVICE_REMOTE_OLD,
        };
        let clients = others | if host.is_none() { SERVICE_HOST } else { 0 };
        match self.serve(row, service_of(row, terms, clients)) {
            Ok(port) => Ok(Lift {
                port,
                remote,
                host,
                untold,
            }),
            Err(Unserved::Waits) => {
                let link = self.interfaces.get(&row.link_index);
                let name = link.map_or("the link", |it| it.name.as_str());
                let why = self.so_far(format!("{name} has no program yet"));
                Err(Refusal {
                    waits: true,
                    ..refused(why)
                })
            }
            Err(Unserved::Refused(why)) => {
                self.withdraw(row.key());
                Err(refused_so_far(why))
            }
            Err(Unserved::Failed(err)) => {
                self.complain(&err);
                self.withdraw(row.key());
                Err(refused_so_far(chain(&err)))
            }
        }
    }

    /// Why something is not there yet. Only an order that hangs tells of somebody who holds the lock.
    fn so_far(&self, what: String) -> String {
        match self.rtnl.hangs() {
            true => what + ", somebody holds the kernel's interface lock",
            false => what,
        }
    }

    /// A row waits for its link's program and is the relay's until that comes. An earlier version's
    /// programs keep it until then, and its flows with it.
    pub fn put_off(&mut self, row: &PortRow) {
        self.take_off(key_of(row.key()));
        self.want((Side::Container, row.link_index));
        self.awaited.insert(row.link_index);
    }

    /// No list of interfaces has come since the start. What an earlier process has left for the very same
    /// row goes on, as does what another version's programs have, whose records are not known; anything
    /// else is taken off. Answers why the relay has the rest.
    fn keep(&mut self, row: &PortRow, terms: &Terms<'_>, obstacle: Option<String>) -> String {
        let key = key_of(row.key());
        let same = self.found.get(&key).is_some_and(|before| {
            let clients = before.flags & (REMOTE | SERVICE_HOST);
            let mut wanted = service_of(row, terms, clients);
            wanted.life = before.life;
            wanted == *before && !(is_of_this_host(row) && clients & REMOTE != 0)
        });
        let unknown = self.so_far("interfaces are not known yet".to_owned());
        match obstacle {
            None if same => format!("as it was left: {unknown}"),
            None => {
                self.take_off(key);
                unknown
            }
            Some(why) => {
                self.withdraw(row.key());
                why
            }
        }
    }

    /// Takes no new flows for a row whose clients the firewall decides about from now on, or whose only
    /// ones are kept away by something that may pass. Those there are were let in by what held then, and
    /// go on, as by a firewall that knows connections. None when there are none.
    fn let_finish(&mut self, row: &PortRow, terms: &Terms<'_>) -> Option<Arc<KernelPort>> {
        let key = key_of(row.key());
        let served = self.served.get(&key).map(|it| it.service);
        let before = served.or_else(|| self.found.get(&key).copied())?;
        let others = if is_of_this_host(row) { 0 } else { REMOTE };
        let mut service = service_of(row, terms, before.flags & (others | SERVICE_HOST));
        service.flags |= SERVICE_DRAINING;
        if !same_route(&before, &service) {
            return None;
        }
        let port = match self.serve(row, service) {
            Ok(port) => port,
            Err(Unserved::Failed(err)) => {
                self.complain(&err);
                return None;
            }
            Err(Unserved::Waits | Unserved::Refused(_)) => return None,
        };
        if before.flags & SERVICE_DRAINING == 0 {
            self.sweep(Instant::now());
        }
        (port.counters().active > 0).then_some(port)
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

    fn serve(&mut self, row: &PortRow, mut service: Service) -> Result<Arc<KernelPort>, Unserved> {
        let key = key_of(row.key());
        if self.unswept.contains(&key) || self.pending_removals.contains(key) {
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
        let place = (Side::Container, row.link_index);
        if !self.is_there(place) {
            self.want(place);
            return Err(match self.refused.get(&place) {
                Some(why) => Unserved::Refused(why.clone()),
                None => Unserved::Waits,
            });
        }
        if let Some(served) = self.served.get(&key)
            && served.service == service
        {
            return Ok(Arc::clone(&served.port));
        }
        let fails = |name| move |source| KernelPathError::Map { name, source };
        if !self.served.leads_to(service.link_index, service.target) {
            self.count_delivered(row.link_index)?;
            self.tell_bridge(row.link_index)?;
            if let Ok(hooks) = &mut self.hooks {
                hooks.allow(row.link_index)?;
            }
            self.addresses
                .insert(service.target, ADDRESS_CONTAINER, 0)
                .map_err(fails(map::ADDRESSES))?;
        }
        // What an earlier port could not be rid of is begun anew.
        let how = match self.pending_removals.contains(key) {
            true => BPF_ANY,
            false => BPF_NOEXIST,
        };
        let made = self.active.insert(key, PortFlows::default(), how);
        let counts_flows = is_new(made).map_err(fails(map::ACTIVE))?;
        let zero = each_cpu::<PortCounters>().map_err(fails(map::COUNTERS))?;
        let made = self.counters.insert(key, zero, how);
        let counts = is_new(made).map_err(fails(map::COUNTERS))?;
        if how == BPF_ANY {
            self.pending_removals.forget(key);
        }
        self.services
            .insert(key, service, 0)
            .map_err(fails(map::SERVICES))?;
        self.flows_left |= before.is_some_and(|before| lets_in_less(&before, &service));
        self.found.remove(&key);
        self.unused.remove(&row.link_index);
        self.predecessors.withdraw(key, &mut self.rtnl);
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
        if !counts_flows || !counts {
            self.count_one(key);
        }
        if before.is_some_and(|before| has_other_networks(&before, &service))
            && self.has_local(key)
            && let Ok(hooks) = &mut self.hooks
        {
            hooks.cut(key, &service, |host| !lets_in(&service, host));
        }
        Ok(port)
    }

    /// Has what a container is given past the host's end of its link counted, for as long as the link
    /// lives.
    pub(super) fn count_delivered(&mut self, link: u32) -> Result<(), KernelPathError> {
        let made = each_cpu::<Delivered>()
            .and_then(|zero| is_new(self.delivered.insert(link, zero, BPF_NOEXIST)));
        made.map(|_| ()).map_err(|source| KernelPathError::Map {
            name: map::DELIVERED,
            source,
        })
    }

    fn new_life(&mut self) -> u32 {
        let life = self.next_life;
        self.next_life = self.next_life.wrapping_add(1).max(1);
        life
    }

    /// Takes no new flows for a port; those there are go on. False when it is not served here.
    pub fn drain(&mut self, key: PortKey) -> bool {
        let key = key_of(key);
        let Some(served) = self.served.get(&key) else {
            return false;
        };
        let (mut service, port) = (served.service, Arc::clone(&served.port));
        service.flags |= SERVICE_DRAINING;
        self.served.insert(key, Served { service, port });
        if let Err(source) = self.services.insert(key, service, 0) {
            self.complain(&KernelPathError::Map {
                name: map::SERVICES,
                source,
            });
            return false;
        }
        true
    }

    /// What a port has counted that an earlier process has left and nobody has claimed.
    pub fn counted(&self, key: PortKey) -> Option<Counters> {
        let key = key_of(key);
        self.found.get(&key)?;
        let port = KernelPort::default();
        self.read_counters(key, &port);
        Some(port.counters())
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
        self.predecessors.withdraw(key, &mut self.rtnl);
        self.take_off(key);
    }

    /// The same, but what another version's programs have of it goes on.
    fn take_off(&mut self, key: ServiceKey) {
        let found = self.found.remove(&key);
        let served = self.served.get(&key).map(|it| it.service);
        // What an earlier process has served has clients on this host like what this one does.
        let Some(service) = served.or(found) else {
            return;
        };
        match self.services.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound) => {}
            Err(source) => self.complain(&KernelPathError::Map {
                name: map::SERVICES,
                source,
            }),
        }
        self.flows_left |= self.count_one(key);
        if self.has_local(key)
            && let Ok(hooks) = &mut self.hooks
        {
            hooks.cut(key, &service, |_| true);
        }
        if let Some(served) = self.served.remove(&key) {
            served.port.active.store(0, Relaxed);
        }
        self.unswept.insert(key);
        let target = service.target;
        if !self.served.has_target(target)
            && !self.found.has_target(target)
            && !self.known_addresses.contains(&target)
        {
            let _ = self.addresses.remove(&target);
        }
        let link = service.link_index;
        if !self.services_at(link) {
            if let Ok(hooks) = &mut self.hooks {
                hooks.forbid(link);
            }
            self.detach(Side::Container, link);
        }
    }

    /// Cuts the flows of ports that were taken off, and those of clients that were shut out; many at once
    /// cost no more than one. What of them can't be removed is tried again with the next, or the next sweep.
    pub fn settle(&mut self) {
        self.catch_up();
        if self.unswept.is_empty() && self.pending_removals.is_empty() && !self.flows_left {
            return;
        }
        // What has ended already goes with the next sweep; nothing comes in by it without a service.
        if std::mem::take(&mut self.flows_left) {
            self.sweep(Instant::now());
        }
        for key in std::mem::take(&mut self.unswept) {
            if !self.served.contains_key(&key) {
                self.pending_removals.add(key);
            }
        }
        let (counters, active) = (self.counters.map(), self.active.map());
        let removed = self.pending_removals.carry_out(&mut [
            (map::COUNTERS, &mut |gone| {
                bpf::remove_entries(counters, gone)
            }),
            (map::ACTIVE, &mut |gone| bpf::remove_entries(active, gone)),
        ]);
        if let Err(err) = removed {
            self.complain(&err);
        }
    }

    fn services_at(&self, link: u32) -> bool {
        self.served.has_link(link) || self.found.has_link(link)
    }

    /// All rows were offered that something had changed for: links whose rows have gone before the program
    /// came lose it again.
    pub fn end_offers(&mut self) {
        for link in std::mem::take(&mut self.unused) {
            if self.affected.holds(link) {
                // Its rows have not been offered since it came.
                self.unused.insert(link);
            } else if !self.services_at(link) {
                self.detach(Side::Container, link);
            }
        }
    }

    /// All rows are lifted that can be: an earlier version's hooks have no more sockets to lead.
    pub fn lifted(&mut self) {
        if self.listed && self.awaited.is_empty() {
            self.predecessors.stop_leading();
        }
    }

    /// Gives up what an earlier process has left and nobody has asked for since.
    pub fn forget_unclaimed(&mut self) {
        self.predecessors.remove(&mut self.rtnl);
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
                Side::Guard => !self.guarded.contains_key(&index),
            };
            // Rows wait for one that is on its way.
            if unwanted && !self.attaching.contains_key(&(side, index)) {
                self.detach(side, index);
            }
        }
    }
}
