//! Where the programs are attached: uplinks, links of containers, and the guards of their runners.
//!
//! In: interfaces and addresses of this host, as they change. Out: programs at all of them, by orders to
//! the [`super::placer`]; the maps that name them. Invariants: what is gone is forgotten at the next
//! look, which comes with the first word of a change; what waits for the kernel's interface lock is
//! waited for only as long as the placer does.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use aya::maps::MapError;
use ebpf::map;
use ebpf::records::{ADDRESS_HOST, Address};
use shared::desired::ContainerRow;

use super::pins::Side;
use super::placer::{Place, Word};
use super::{KernelPath, KernelPathError, eligibility, words};
use crate::sys::netlink::interfaces::Interface;

/// Distance of two looks at the interfaces, however often they change.
pub(super) const RESCAN_INTERVAL: Duration = Duration::from_millis(100);
/// A look at the interfaces without a notification.
pub(super) const RESCAN_SLOWLY: Duration = Duration::from_secs(30);

impl KernelPath {
    /// Readable when interfaces or addresses have changed.
    pub fn watch(&self) -> RawFd {
        self.watch.watch()
    }

    /// Changes wait for their turn: come back soon.
    pub fn is_pending(&self) -> bool {
        self.changed_at.is_some() || self.rows_concerned
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
        if self.watch.changed() {
            self.changed_at.get_or_insert(now);
        }
    }

    pub(super) fn ask_for_list(&mut self, now: Instant) {
        self.changed_at = None;
        self.scanned_at = now;
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
            Word::Listed(Ok(interfaces)) => {
                self.lists = self.lists.saturating_sub(1);
                let before = std::mem::replace(&mut self.interfaces, interfaces);
                self.rows_concerned |= before != self.interfaces;
                if let Err(err) = self.take_stock() {
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
    fn take_stock(&mut self) -> Result<(), KernelPathError> {
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

        let gone: Vec<u32> = self
            .delivered
            .keys()
            .flatten()
            .filter(|link| !self.interfaces.contains_key(link))
            .collect();
        for link in gone {
            match self.delivered.remove(&link) {
                Ok(()) | Err(MapError::KeyNotFound) => {}
                Err(source) => {
                    return Err(KernelPathError::Map {
                        name: map::DELIVERED,
                        source,
                    });
                }
            }
        }

        let wanted = eligibility::uplinks(&self.interfaces);
        self.tell_sizes(&wanted)?;
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
