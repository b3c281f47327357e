//! Where the programs are attached: uplinks, links of containers, and the guards of their runners.
//!
//! In: interfaces and addresses of this host, as they change. Out: programs at all of them, the
//! maps that name them. Invariant: what is gone is forgotten at the next look, which comes with the
//! first word of a change.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use aya::maps::MapError;
use ebpf::records::{ADDRESS_HOST, Address};
use ebpf::{map, program};
use shared::desired::ContainerRow;

use super::object::classifier;
use super::pins::Side;
use super::{KernelPath, KernelPathError, attach, eligibility, words};
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
        self.guarded.retain(|link| links.contains(link));
        for link in links {
            if self.guarded.contains(&link) {
                continue;
            }
            self.look_for(link);
            let interface = self.interfaces.get(&link);
            if !interface.is_some_and(|it| it.kind == "veth" && it.peer_elsewhere) {
                continue;
            }
            match self.attach(Side::Guard, link) {
                Ok(()) => {
                    self.guarded.insert(link);
                }
                Err(err) => self.complain(&err),
            }
        }
    }

    pub(super) fn note_changes(&mut self, now: Instant) {
        if self.watch.changed() {
            self.changed_at.get_or_insert(now);
        }
    }

    pub(super) fn rescan(&mut self, now: Instant) {
        self.changed_at = None;
        let before = (self.interfaces.clone(), self.uplinks.clone());
        if let Err(err) = self.scan() {
            self.scanned_at = now;
            self.complain(&err);
        }
        self.rows_concerned |= before != (self.interfaces.clone(), self.uplinks.clone());
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
            self.rescan(now);
        }
    }

    /// Looks at interfaces and addresses: attaches to new uplinks, forgets what is gone.
    pub(super) fn scan(&mut self) -> Result<(), KernelPathError> {
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
    pub(super) fn note_uplinks(&mut self, wanted: &BTreeSet<u32>) -> Result<(), KernelPathError> {
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

    /// Attaches a program to an interface, or puts it in the place of an earlier version's.
    pub(super) fn attach(&mut self, side: Side, index: u32) -> Result<(), KernelPathError> {
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
        let pins = (&self.pins, &self.elders);
        attach::attach(program, pins, self.means, side, index, &interface)?;
        self.attached.insert((side, index));
        Ok(())
    }

    pub(super) fn detach(&mut self, side: Side, index: u32) {
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
}
