//! Where the programs are attached: uplinks, links of containers, and the guards of their runners.
//!
//! In: interfaces, addresses and routes of this host, as they change. Out: programs at all of them, by orders
//! to the [`super::rtnl`]; the maps that name them. Invariants: what is gone is forgotten at the next
//! look, which comes with the first word of a change; what waits for the kernel's interface lock is
//! waited for only as long as that thread does.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use aya::maps::MapError;
use aya::maps::lpm_trie::Key;
use ebpf::map;
use ebpf::records::{ADDRESS_HOST, Address, WayBack};
use shared::desired::ContainerRow;

use super::pins::Side;
use super::rtnl::{AttachPoint, Reply, UplinkNetworks};
use super::{KernelPath, KernelPathError, eligibility};
use crate::causes::chain;
use crate::sys::netlink::NetlinkError;
use crate::sys::netlink::interfaces::Interface;
use crate::sys::netlink::routes::Networks;

/// Distance of two looks at the interfaces, however often they change.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_millis(100);
/// A look at the interfaces without a notification.
pub(super) const RESCAN_SLOWLY: Duration = Duration::from_secs(30);
/// Of more interfaces that have changed all are listed.
const MOST_LOOKS: usize = 64;
/// A guard that could not be attached is tried again after this.
const GUARDS_AGAIN: Duration = Duration::from_secs(1);
/// Routes that could not be listed are asked for again after this.
const ROUTES_AGAIN: Duration = Duration::from_secs(1);

/// What came of a removal: what is not there is removed.
fn forgotten(name: &'static str, removed: Result<(), MapError>) -> Result<(), KernelPathError> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(source) => Err(KernelPathError::Map { name, source }),
    }
}

/// Interfaces that came, went or are not as they were.
fn changed(before: &BTreeMap<u32, Interface>, now: &BTreeMap<u32, Interface>) -> BTreeSet<u32> {
    let all = before.keys().chain(now.keys()).copied();
    all.filter(|it| before.get(it) != now.get(it)).collect()
}

impl KernelPath {
    /// Readable when interfaces, addresses or routes have changed.
    pub fn watch(&self) -> RawFd {
        self.watch.watch()
    }

    /// Changes wait for their turn: come back soon.
    pub fn is_pending(&self) -> bool {
        let routes = self.routes_at.is_some_and(|at| at <= Instant::now());
        self.changed_at.is_some() || routes || !self.affected.is_empty()
    }

    /// Keeps everybody but this host away from the runner of a container whose row came, went or changed,
    /// with [`Self::guard_waiting`].
    pub fn guard(&mut self, before: Option<&ContainerRow>, now: Option<&ContainerRow>) {
        let links = |row: Option<&ContainerRow>| -> BTreeSet<u32> {
            let row = row.filter(|it| !it.host_network).into_iter();
            row.flat_map(|it| it.link_indexes.iter().copied()).collect()
        };
        for link in links(now) {
            *self.guarded.entry(link).or_default() += 1;
            self.note_unguarded(link);
        }
        for link in links(before) {
            let Some(containers) = self.guarded.get_mut(&link) else {
                continue;
            };
            *containers -= 1;
            if *containers == 0 {
                self.guarded.remove(&link);
                self.unguarded.remove(&link);
            }
        }
    }

    fn note_unguarded(&mut self, link: u32) {
        let place = (Side::Guard, link);
        let guarded = self.attached.contains(&place) || self.attaching.contains_key(&place);
        if !guarded && self.guarded.contains_key(&link) {
            self.unguarded.insert(link);
        }
    }

    /// A guard could not be attached, nobody tells when it can be, and it was tried long enough ago. What else
    /// guards wait for is told of.
    pub fn is_guard_due(&self, now: Instant) -> bool {
        let refused = |link: &u32| self.refused.contains_key(&(Side::Guard, *link));
        now.saturating_duration_since(self.guards_tried_at) >= GUARDS_AGAIN
            && self.unguarded.iter().any(refused)
    }

    /// Has guards attached where there are none yet. A link that is not there is tried again the next time.
    pub fn guard_waiting(&mut self, now: Instant) {
        self.guards_tried_at = now;
        for link in std::mem::take(&mut self.unguarded) {
            self.look_for(link);
            let interface = self.interfaces.get(&link);
            if interface.is_some_and(|it| it.kind == "veth" && it.peer_elsewhere) {
                let place = (Side::Guard, link);
                self.refused.remove(&place);
                self.want(place);
            }
            self.note_unguarded(link);
        }
    }

    pub(super) fn note_changes(&mut self, now: Instant) {
        // A list that is on its way may have new uplinks.
        let (ways_in, lists) = (&self.ways_in, self.lists);
        let of_interest = |index| lists > 0 || ways_in.contains(&index);
        let changes = self.watch.changes(of_interest);
        if changes.all || !changes.links.is_empty() {
            self.changed_at.get_or_insert(now);
            self.changed_all |= changes.all;
            self.changed_links.extend(changes.links);
        }
        if changes.routes {
            self.routes_at.get_or_insert(now);
        }
    }

    /// Looks at what has changed, now and then at what has changed without a word.
    pub(super) fn look_around(&mut self, now: Instant) {
        self.note_changes(now);
        let since = |then| now.saturating_duration_since(then);
        if since(self.scanned_at) >= RESCAN_SLOWLY {
            self.ask_for_list(now);
        } else if self.changed_at.is_some() && since(self.looked_at) >= RESCAN_INTERVAL {
            self.ask(now);
        }
        if since(self.renewed_at) >= RESCAN_SLOWLY {
            self.renewed_at = now;
            self.renew_filters();
        }
        let since = now.saturating_duration_since(self.routed_at);
        if self.routes_at.is_some_and(|at| at <= now) && since >= RESCAN_INTERVAL {
            self.routes_at = None;
            self.routed_at = now;
            self.rtnl.list_routes();
        }
    }

    /// Puts filters in the place of themselves: nobody tells of those that somebody has taken away. Links
    /// can't be.
    fn renew_filters(&mut self) {
        let places = self.attached.iter().copied();
        let by_filter = |(side, index): &AttachPoint| self.pins.filter(*side, *index).exists();
        for place in places.filter(by_filter).collect::<Vec<_>>() {
            let number = self.rtnl.attach(place);
            self.attaching.insert(place, number);
        }
    }

    pub(super) fn ask_for_list(&mut self, now: Instant) {
        self.changed_at = None;
        self.changed_all = false;
        self.changed_links.clear();
        self.routes_at = None;
        (self.looked_at, self.scanned_at, self.routed_at) = (now, now, now);
        self.lists += u32::from(self.rtnl.list());
    }

    /// Asks for what has changed: for all where routes or other interfaces may go with it.
    fn ask(&mut self, now: Instant) {
        let links = &self.changed_links;
        let all = !self.listed || self.changed_all || links.len() > MOST_LOOKS;
        if all || !links.is_disjoint(&self.ways_in) {
            self.ask_for_list(now);
            return;
        }
        self.changed_at = None;
        self.looked_at = now;
        let links = std::mem::take(&mut self.changed_links);
        self.looks += u32::from(self.rtnl.look(links));
    }

    /// All interfaces are to be listed as soon as may be.
    fn note_all(&mut self) {
        self.changed_all = true;
        self.changed_at.get_or_insert_with(Instant::now);
    }

    /// A container's link may be younger than the last look at the interfaces, or have been
    /// half made then: its row is not judged by that look when there has been word of a change.
    pub(super) fn look_for(&mut self, link: u32) {
        let ready = |it: &Interface| it.up && it.peer_elsewhere;
        if link == 0 || self.interfaces.get(&link).is_some_and(ready) {
            return;
        }
        let now = Instant::now();
        self.note_changes(now);
        if self.changed_at.is_some() {
            self.ask(now);
        }
        if self.lists > 0 || self.looks > 0 {
            self.catch_up();
        }
    }

    /// Takes note of what came of all orders, if that can be had soon.
    pub fn catch_up(&mut self) {
        // What came of some may ask for more.
        for _ in 0..3 {
            let replies = self.rtnl.wait();
            if replies.is_empty() {
                return;
            }
            for reply in replies {
                self.hear(reply);
            }
        }
    }

    /// Takes note of what came of an order.
    pub(super) fn hear(&mut self, reply: Reply) {
        match reply {
            Reply::Listed(Ok((interfaces, ways))) => {
                self.lists = self.lists.saturating_sub(1);
                let Some(ways) = self.known(ways) else {
                    // Nobody would be led back.
                    self.note_all();
                    return;
                };
                let before = std::mem::replace(&mut self.interfaces, interfaces);
                let changed = changed(&before, &self.interfaces);
                // Of these the other rows' terms are made, too.
                self.affected.all |= !self.listed || !changed.is_disjoint(&self.uplinks);
                self.affected.links.extend(changed);
                if let Err(err) = self.take_stock(ways) {
                    self.complain(&err);
                }
                if !std::mem::replace(&mut self.listed, true) {
                    self.take_over_places();
                }
                self.note_uplinks();
            }
            Reply::Listed(Err(err)) => {
                self.lists = self.lists.saturating_sub(1);
                self.complain(&KernelPathError::Interfaces(err));
                if !self.listed {
                    self.note_all();
                }
            }
            Reply::Looked(looked) => {
                self.looks = self.looks.saturating_sub(1);
                let noted = looked
                    .map_err(KernelPathError::Interfaces)
                    .and_then(|looked| self.note_looked(looked));
                if let Err(err) = noted {
                    self.complain(&err);
                    self.note_all();
                }
            }
            Reply::Routed(ways) => {
                if let Some(ways) = self.known(ways) {
                    let uplinks = self.ways_in.clone();
                    self.tell_ways(ways, &uplinks);
                }
            }
            Reply::Attached(place, number, result) => {
                // Not when it has been taken back since.
                if self.attaching.get(&place) == Some(&number) {
                    self.attaching.remove(&place);
                    self.note_attached(place, result);
                }
            }
        }
    }

    /// Takes note of what has become of some interfaces. Links of containers concern their own rows alone; what
    /// others change is found in a list.
    fn note_looked(
        &mut self,
        looked: BTreeMap<u32, Option<Interface>>,
    ) -> Result<(), KernelPathError> {
        for (index, mut now) in looked {
            let before = self.interfaces.get(&index);
            if let (Some(before), Some(now)) = (before, &mut now) {
                now.addresses.clone_from(&before.addresses);
            }
            if before == now.as_ref() {
                continue;
            }
            if !before.into_iter().chain(&now).all(eligibility::is_alone) {
                self.note_all();
                continue;
            }
            self.affected.links.insert(index);
            if let Some(now) = now {
                self.interfaces.insert(index, now);
            } else {
                self.interfaces.remove(&index);
                forgotten(map::DELIVERED, self.delivered.remove(&index))?;
                for side in [Side::Container, Side::Guard] {
                    let place = (side, index);
                    if self.is_there(place) || self.attaching.contains_key(&place) {
                        self.detach(side, index);
                    }
                }
            }
            if self.known_bridges.contains_key(&index) || self.delivered.get(&index, 0).is_ok() {
                self.tell_bridge(index)?;
            }
        }
        Ok(())
    }

    fn note_attached(&mut self, place: AttachPoint, result: Result<(), KernelPathError>) {
        let (side, index) = place;
        self.inherited.remove(&place);
        let fails = result.is_err();
        match result {
            Ok(()) => {
                let fresh = self.attached.insert(place);
                if fresh && side == Side::Container {
                    self.unused.insert(index);
                }
            }
            Err(err) => {
                self.attached.remove(&place);
                self.refused.insert(place, chain(&err));
                if side != Side::Uplink {
                    self.complain(&err);
                } else if let Some(suppressed) = self.log.pass() {
                    tracing::warn!(
                        interface = index,
                        err = chain(&err),
                        suppressed,
                        "clients that come in by this interface are served by the relay"
                    );
                }
            }
        }
        match side {
            Side::Uplink => self.note_uplinks(),
            Side::Container => {
                // Services that count on a program of an earlier process can't go on without one.
                if self.awaited.remove(&index) || (fails && self.served.has_link(index)) {
                    self.affected.links.insert(index);
                }
            }
            Side::Guard => self.note_unguarded(index),
        }
    }

    /// What an earlier process has attached is replaced: replies of flows under way are translated by
    /// this version from now on, too.
    fn take_over_places(&mut self) {
        let places = self.inherited.iter().copied();
        let here =
            |place: &AttachPoint| place.0 != Side::Uplink && self.interfaces.contains_key(&place.1);
        let places: Vec<AttachPoint> = places.filter(here).collect();
        for place in places {
            self.want(place);
        }
    }

    /// Does what a new list of interfaces and addresses asks for: attaches to new uplinks, forgets what
    /// is gone.
    fn take_stock(&mut self, ways: UplinkNetworks) -> Result<(), KernelPathError> {
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
            forgotten(map::ADDRESSES, self.addresses.remove(address))?;
        }
        for address in addresses.difference(&self.known_addresses) {
            self.addresses
                .insert(address, ADDRESS_HOST, 0)
                .map_err(fails)?;
        }
        self.known_addresses = addresses;

        let links: BTreeSet<u32> = self.delivered.keys().flatten().collect();
        for link in links.iter().filter(|it| !self.interfaces.contains_key(it)) {
            forgotten(map::DELIVERED, self.delivered.remove(link))?;
        }
        let known = self.known_bridges.keys().copied();
        for link in known.chain(links).collect::<BTreeSet<u32>>() {
            self.tell_bridge(link)?;
        }

        let wanted = eligibility::uplinks(&self.interfaces);
        self.tell_sizes(&wanted)?;
        self.tell_ways(ways, &wanted);
        for index in &wanted {
            let place = (Side::Uplink, *index);
            self.refused.remove(&place);
            self.want(place);
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
        self.ways_in = wanted;
        Ok(())
    }

    /// Tells the programs the bridge of a container's link, as far as there is one.
    pub(super) fn tell_bridge(&mut self, link: u32) -> Result<(), KernelPathError> {
        let bridge = eligibility::bridge_of(link, &self.interfaces);
        if self.known_bridges.get(&link) == bridge.as_ref() {
            return Ok(());
        }
        if let Some(bridge) = bridge {
            self.bridges
                .insert(link, bridge, 0)
                .map_err(|source| KernelPathError::Map {
                    name: map::BRIDGES,
                    source,
                })?;
            self.known_bridges.insert(link, bridge);
        } else {
            forgotten(map::BRIDGES, self.bridges.remove(&link))?;
            self.known_bridges.remove(&link);
        }
        Ok(())
    }

    /// By which interfaces clients of other hosts are served now.
    fn note_uplinks(&mut self) {
        let all = self.ways_in.iter().copied();
        let uplinks: BTreeSet<u32> = all
            .filter(|it| self.is_there((Side::Uplink, *it)))
            .collect();
        self.affected.all |= uplinks != self.uplinks;
        self.uplinks = uplinks;
    }

    /// Tells the programs how large a packet may leave by each uplink, also by one that is down for a
    /// moment.
    fn tell_sizes(&mut self, wanted: &BTreeSet<u32>) -> Result<(), KernelPathError> {
        let fails = |source| KernelPathError::Map {
            name: map::UPLINKS,
            source,
        };
        let known: BTreeMap<u32, u32> = self.uplink_mtus.iter().flatten().collect();
        let interfaces = &self.interfaces;
        let is_down = |index: &u32| interfaces.get(index).is_some_and(|it| !it.up);
        let kept = |index: &u32| wanted.contains(index) || is_down(index);
        let lost: Vec<u32> = known.keys().copied().filter(|it| !kept(it)).collect();
        for index in &lost {
            forgotten(map::UPLINKS, self.uplink_mtus.remove(index))?;
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

    /// What came of a list of routes. Where they can't be listed what was told holds on, if anything was.
    fn known(&mut self, ways: Result<UplinkNetworks, NetlinkError>) -> Option<UplinkNetworks> {
        ways.map_or_else(
            |err| {
                self.complain(&KernelPathError::Interfaces(err));
                self.listed
                    .then(|| UplinkNetworks::Later(Instant::now() + ROUTES_AGAIN))
            },
            Some,
        )
    }

    /// Tells the programs to whom routes lead back by each uplink. What is new comes before what is gone
    /// goes, and what led back by an uplink that is down for a moment stays. Clients that they are not told of
    /// are the relay's.
    fn tell_ways(&mut self, ways: UplinkNetworks, wanted: &BTreeSet<u32>) {
        match ways {
            UplinkNetworks::Told(told) => {
                if let Err(err) = self.change_ways(&told, wanted) {
                    self.complain(&err);
                }
                self.note_cut(&told);
            }
            UplinkNetworks::Later(at) => self.routes_at = Some(at),
        }
    }

    fn change_ways(
        &mut self,
        told: &BTreeMap<u32, Networks>,
        wanted: &BTreeSet<u32>,
    ) -> Result<(), KernelPathError> {
        let interfaces = &self.interfaces;
        let is_down = |way: &WayBack| interfaces.get(&way.uplink).is_some_and(|it| !it.up);
        let kept = self.known_ways.iter().filter(|(_, way)| is_down(way));
        let mut ways: BTreeSet<(u32, WayBack)> = kept.copied().collect();
        for (uplink, networks) in told.iter().filter(|(uplink, _)| wanted.contains(uplink)) {
            let list = networks.list.iter();
            ways.extend(list.map(|it| WayBack::new(*uplink, it.address, it.prefix)));
        }
        let fails = |source| KernelPathError::Map {
            name: map::WAYS_BACK,
            source,
        };
        let fresh: Vec<_> = ways.difference(&self.known_ways).copied().collect();
        // There may be no room before what is gone has made some: the next list comes.
        let added = fresh.into_iter().try_for_each(|(bits, way)| {
            self.ways_back.insert(&Key::new(bits, way), 1, 0)?;
            self.known_ways.insert((bits, way));
            Ok(())
        });
        let gone: Vec<_> = self.known_ways.difference(&ways).copied().collect();
        for (bits, way) in gone {
            forgotten(map::WAYS_BACK, self.ways_back.remove(&Key::new(bits, way)))?;
            self.known_ways.remove(&(bits, way));
        }
        added.map_err(fails)
    }

    /// Says by which uplinks routes lead to more networks than the programs are told.
    fn note_cut(&mut self, told: &BTreeMap<u32, Networks>) {
        let cut = told.iter().filter(|(_, networks)| networks.is_cut());
        let cut: BTreeSet<u32> = cut.map(|(uplink, _)| *uplink).collect();
        for uplink in cut.difference(&self.cut) {
            let name = self.interfaces.get(uplink).map(|it| it.name.as_str());
            tracing::warn!(
                interface = name.unwrap_or_default(),
                "routes lead to more networks by this interface than the kernel path takes; clients in \
                 the narrowest are served by the relay"
            );
        }
        self.cut = cut;
    }

    /// A program is at a place, ours or an earlier process's.
    pub(super) fn is_there(&self, place: AttachPoint) -> bool {
        self.attached.contains(&place) || self.inherited.contains(&place)
    }

    /// Has a program attached where none of this process is, unless that was refused.
    pub(super) fn want(&mut self, place: AttachPoint) {
        let known = self.attached.contains(&place) || self.refused.contains_key(&place);
        if !known && !self.attaching.contains_key(&place) {
            let number = self.rtnl.attach(place);
            self.attaching.insert(place, number);
        }
    }

    pub(super) fn detach(&mut self, side: Side, index: u32) {
        let place = (side, index);
        self.attached.remove(&place);
        self.inherited.remove(&place);
        self.attaching.remove(&place);
        match side {
            Side::Container => {
                self.awaited.remove(&index);
                self.unused.remove(&index);
            }
            Side::Guard => self.note_unguarded(index),
            Side::Uplink => {}
        }
        self.rtnl.detach(place);
    }
}
