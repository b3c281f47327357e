//! Services by their ports, and how many of them lead to each link and address.
//!
//! In: services as they come and go. Out: whether any leads somewhere. Invariant: the counts are those of
//! the services there are, so that nobody goes through all of them to find that out.

use std::collections::BTreeMap;
use std::ops::Deref;

use ebpf::records::{Address, Service, ServiceKey};

/// What has a service.
pub(super) trait Leads {
    /// It.
    fn service(&self) -> &Service;
}

impl Leads for Service {
    fn service(&self) -> &Service {
        self
    }
}

/// Services by their ports.
#[derive(Debug)]
pub(super) struct Services<T> {
    ports: BTreeMap<ServiceKey, T>,
    places: BTreeMap<(u32, Address), usize>,
    targets: BTreeMap<Address, usize>,
}

impl<T> Default for Services<T> {
    fn default() -> Self {
        Self {
            ports: BTreeMap::new(),
            places: BTreeMap::new(),
            targets: BTreeMap::new(),
        }
    }
}

impl<T> Deref for Services<T> {
    type Target = BTreeMap<ServiceKey, T>;

    fn deref(&self) -> &Self::Target {
        &self.ports
    }
}

impl<T: Leads> FromIterator<(ServiceKey, T)> for Services<T> {
    fn from_iter<I: IntoIterator<Item = (ServiceKey, T)>>(services: I) -> Self {
        let mut all = Self::default();
        for (key, service) in services {
            all.insert(key, service);
        }
        all
    }
}

fn count_off<K: Ord>(counts: &mut BTreeMap<K, usize>, of: &K) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

impl<T: Leads> Services<T> {
    /// One more, or another one for a port.
    pub(super) fn insert(&mut self, key: ServiceKey, service: T) {
        self.remove(&key);
        let Service {
            link_index, target, ..
        } = *service.service();
        *self.places.entry((link_index, target)).or_default() += 1;
        *self.targets.entry(target).or_default() += 1;
        self.ports.insert(key, service);
    }

    /// One less.
    pub(super) fn remove(&mut self, key: &ServiceKey) -> Option<T> {
        let gone = self.ports.remove(key)?;
        let Service {
            link_index, target, ..
        } = *gone.service();
        count_off(&mut self.places, &(link_index, target));
        count_off(&mut self.targets, &target);
        Some(gone)
    }

    /// Whether any leads to this address over this link.
    pub(super) fn leads_to(&self, link: u32, target: Address) -> bool {
        self.places.contains_key(&(link, target))
    }

    /// Whether any leads to this address.
    pub(super) fn has_target(&self, target: Address) -> bool {
        self.targets.contains_key(&target)
    }

    /// Whether any leads over this link.
    pub(super) fn has_link(&self, link: u32) -> bool {
        let first = (link, Address([0; 16]));
        let next = self.places.range(first..).next();
        next.is_some_and(|((found, _), _)| *found == link)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebpf::records::{CLIENT_NETWORKS, ClientNetwork};

    #[test]
    fn links_and_addresses_are_led_to_for_as_long_as_a_service_leads_there() {
        let key = |port| ServiceKey {
            port,
            protocol: 6,
            zero: 0,
        };
        let to = |link_index, last| Service {
            link_index,
            target: Address([last; 16]),
            bind: Address([0; 16]),
            life: 1,
            max_flows: 0,
            target_port: 80,
            flags: 0,
            networks: 0,
            network: [ClientNetwork::default(); CLIENT_NETWORKS],
            spacing_ns: 0,
        };
        let mut all: Services<Service> = [(key(1), to(4, 1)), (key(2), to(4, 1))]
            .into_iter()
            .collect();
        all.insert(key(3), to(5, 1));
        let led = |all: &Services<Service>| {
            let links = [3, 4, 5, 6].map(|link| all.has_link(link));
            let targets = [1, 2].map(|last| all.has_target(Address([last; 16])));
            (links, targets, all.leads_to(4, Address([1; 16])))
        };
        let four_and_five = [false, true, true, false];
        assert_eq!(led(&all), (four_and_five, [true, false], true));
        all.remove(&key(1));
        assert_eq!(led(&all), (four_and_five, [true, false], true));
        // The last one leads to another address by now.
        all.insert(key(2), to(4, 2));
        assert_eq!(led(&all), (four_and_five, [true, true], false));
        all.remove(&key(2));
        all.remove(&key(2));
        let five = [false, false, true, false];
        assert_eq!(led(&all), (five, [true, false], false));
        all.remove(&key(3));
        assert_eq!(led(&all), ([false; 4], [false; 2], false));
        assert!(all.is_empty() && all.places.is_empty());
    }
}
