//! Where the programs are attached: uplinks, links of containers, and the guards of their runners.
//!
//! In: interfaces, addresses and routes of this host, as they change. Out: programs at all of them, by orders
//! to the [`super::placer`]; the maps that name them. Invariants: what is gone is forgotten at the next
//! look, which comes with the first word of a change; what waits for the kernel's interface lock is
//! waited for only as long as the placer does.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use aya::maps::MapError;
use aya::maps::lpm_trie::Key;
use ebpf::map;
use ebpf::records::{ADDRESS_HOST, Address, WayBack};
use shared::desired::ContainerRow;

use super::pins::Side;
use super::placer::{Place, Ways, Word};
use super::{KernelPath, KernelPathError, eligibility};
use crate::causes::words;
use crate::sys::netlink::NetlinkError;
use crate::sys::netlink::interfaces::Interface;
use crate::sys::netlink::routes::Networks;

/// Distance of two looks at the interfaces, however often they change.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_millis(100);
/// A look at the interfaces without a notification.
pub(super) const RESCAN_SLOWLY: Duration = Duration::from_secs(30);
/// Routes that could not be listed are asked for again after this.
const ROUTES_AGAIN: Duration = Duration::from_secs(1);

/// What came of a removal: what is not there is removed.
fn forgotten(name: &'static str, removed: Result<(), MapError>) -> Result<(), KernelPathError> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(source) => Err(KernelPathError::Map { name, source }),
    }
}

impl KernelPath {
    /// Readable when interfaces, addresses or routes have changed.
    pub fn watch(&self) -> RawFd {
        self.watch.watch()
    }

    /// Changes wait for their turn: come back soon.
    pub fn is_pending(&self) -> bool {
        let routes = self.routes_at.is_some_and(|at| at <= Instant::now());
        self.changed_at.is_some() || routes || self.rows_concerned
    }

    /// Keeps everybody but this host away from the runners of these containers. A link that is not
    /// there yet is to be offered again.
    pub fn guard<'a>(&mut self, containers: impl Iterator<Item = &'a ContainerRow>) {
        let links: BTreeSet<u32> = containers
            .filter(|it| !it.host_network)
            .flat_map(|it| it.link_indexes.iter().copied())
            .collect();
        for link in &links {
            let place = (Side::Guard, *link);
            if self.attached.contains(&place) || self.placing.contains_key(&place) {
                continue;
            }
            self.look_for(*link);
            let interface = self.interfaces.get(link);
            if interface.is_some_and(|it| it.kind == "veth" && it.peer_elsewhere) {
                self.refused.remove(&place);
                self.want(place);
            }
        }
        self.guarded = links;
    }

    pub(super) fn note_changes(&mut self, now: Instant) {
        let changes = self.watch.changes();
        if changes.interfaces {
            self.changed_at.get_or_insert(now);
        }
        if changes.routes {
            self.routes_at.get_or_insert(now);
        }
    }

    /// Looks at what has changed, now and then at what has changed without a word.
    pub(super) fn look_around(&mut self, now: Instant) {
        self.note_changes(now);
        let since = now.saturating_duration_since(self.scanned_at);
        if since >= RESCAN_SLOWLY || (self.changed_at.is_some() && since >= RESCAN_INTERVAL) {
            self.ask_for_list(now);
        }
        let since = now.saturating_duration_since(self.routed_at);
        if self.routes_at.is_some_and(|at| at <= now) && since >= RESCAN_INTERVAL {
            self.routes_at = None;
            self.routed_at = now;
            self.placer.list_routes();
        }
    }

    pub(super) fn ask_for_list(&mut self, now: Instant) {
        self.changed_at = None;
        self.routes_at = None;
        (self.scanned_at, self.routed_at) = (now, now);
        self.lists += u32::from(self.placer.list());
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
            self.ask_for_list(now);
        }
        if self.lists > 0 {
            self.catch_up();
        }
    }

    /// Takes note of what came of all orders, if that can be had soon.
    pub fn catch_up(&mut self) {
        // What came of some may ask for more.
        for _ in 0..3 {
            let words = self.placer.wait();
            if words.is_empty() {
                return;
            }
            for word in words {
                self.hear(word);
            }
        }
    }

    /// Takes note of what came of an order.
    pub(super) fn hear(&mut self, word: Word) {
        match word {
            Word::Listed(Ok((interfaces, ways))) => {
                self.lists = self.lists.saturating_sub(1);
                let Some(ways) = self.known(ways) else {
                    // Nobody would be led back.
                    self.changed_at.get_or_insert_with(Instant::now);
                    return;
                };
                let before = std::mem::replace(&mut self.interfaces, interfaces);
                self.rows_concerned |= before != self.interfaces;
                if let Err(err) = self.take_stock(ways) {
                    self.complain(&err);
                }
                if !std::mem::replace(&mut self.listed, true) {
                    self.take_over_places();
                }
                self.note_uplinks();
            }
            Word::Listed(Err(err)) => {
                self.lists = self.lists.saturating_sub(1);
                self.complain(&KernelPathError::Interfaces(err));
                if !self.listed {
                    self.changed_at.get_or_insert_with(Instant::now);
                }
            }
            Word::Routed(ways) => {
                if let Some(ways) = self.known(ways) {
                    let uplinks = self.ways_in.clone();
                    self.tell_ways(ways, &uplinks);
                }
            }
            Word::Attached(place, number, result) => {
                // Not when it has been taken back since.
                if self.placing.get(&place) == Some(&number) {
                    self.placing.remove(&place);
                    self.note_attached(place, result);
                }
            }
        }
    }

    fn note_attached(&mut self, place: Place, result: Result<(), KernelPathError>) {
        let (side, index) = place;
        self.inherited.remove(&place);
        let fails = result.is_err();
        match result {
            Ok(()) => {
                self.attached.insert(place);
                if side == Side::Container {
                    self.unused.insert(index);
                }
            }
            Err(err) => {
                self.refused.insert(place, words(&err));
                if side != Side::Uplink {
                    self.complain(&err);
                } else if let Some(suppressed) = self.log.pass() {
                    tracing::warn!(
                        interface = index,
                        err = words(&err),
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
                self.rows_concerned |= self.awaited.remove(&index)
                    || (fails
                        && self
                            .served
                            .values()
                            .any(|it| it.service.link_index == index));
            }
            Side::Guard => {}
        }
    }

    /// What an earlier process has attached is replaced: replies of flows under way are translated by
    /// this version from now on, too.
    fn take_over_places(&mut self) {
        let places = self.inherited.iter().copied();
        let here =
            |place: &Place| place.0 != Side::Uplink && self.interfaces.contains_key(&place.1);
        let places: Vec<Place> = places.filter(here).collect();
        for place in places {
            self.want(place);
        }
    }

    /// Does what a new list of interfaces and addresses asks for: attaches to new uplinks, forgets what
    /// is gone.
    fn take_stock(&mut self, ways: Ways) -> Result<(), KernelPathError> {
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
        self.rows_concerned |= uplinks != self.uplinks;
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
    fn known(&mut self, ways: Result<Ways, NetlinkError>) -> Option<Ways> {
        ways.map_or_else(
            |err| {
                self.complain(&KernelPathError::Interfaces(err));
                self.listed
                    .then(|| Ways::Later(Instant::now() + ROUTES_AGAIN))
            },
            Some,
        )
    }

    /// Tells the programs to whom routes lead back by each uplink. What is new comes before what is gone
    /// goes, and what led back by an uplink that is down for a moment stays. Clients that they are not told of
    /// are the relay's.
    fn tell_ways(&mut self, ways: Ways, wanted: &BTreeSet<u32>) {
        match ways {
            Ways::Told(told) => {
                if let Err(err) = self.change_ways(&told, wanted) {
                    self.complain(&err);
                }
                self.note_cut(&told);
            }
            Ways::Later(at) => self.routes_at = Some(at),
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
    pub(super) fn is_there(&self, place: Place) -> bool {
        self.attached.contains(&place) || self.inherited.contains(&place)
    }

    /// Has a program attached where none of this process is, unless that was refused.
    pub(super) fn want(&mut self, place: Place) {
        let known = self.attached.contains(&place) || self.refused.contains_key(&place);
        if !known && !self.placing.contains_key(&place) {
            let number = self.placer.attach(place);
            self.placing.insert(place, number);
        }
    }

    pub(super) fn detach(&mut self, side: Side, index: u32) {
        let place = (side, index);
        self.attached.remove(&place);
        self.inherited.remove(&place);
        self.placing.remove(&place);
        if side == Side::Container {
            self.awaited.remove(&index);
            self.unused.remove(&index);
        }
        self.placer.detach(place);
    }
}
