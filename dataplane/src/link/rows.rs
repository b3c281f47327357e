//! The rows that are applied, found by their port, their container and their link.
//!
//! In: rows as they are applied and given up. Out: the ports that something concerns. Invariant: the
//! ports of a container and of a link are those of the rows there are, so that nobody goes through all
//! rows for what concerns a few.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::ops::Deref;

use shared::desired::PortKey;
use shared::ids::ContainerId;

use super::plan::AppliedRow;

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Rows {
    known: BTreeMap<PortKey, AppliedRow>,
    containers: HashMap<ContainerId, BTreeSet<PortKey>>,
    links: HashMap<u32, BTreeSet<PortKey>>,
}

impl Deref for Rows {
    type Target = BTreeMap<PortKey, AppliedRow>;

    fn deref(&self) -> &Self::Target {
        &self.known
    }
}

fn leave<K: Eq + Hash>(index: &mut HashMap<K, BTreeSet<PortKey>>, of: &K, port: PortKey) {
    if let Some(ports) = index.get_mut(of) {
        ports.remove(&port);
        if ports.is_empty() {
            index.remove(of);
        }
    }
}

impl Rows {
    /// A row is applied, instead of an earlier one of its port.
    pub(super) fn insert(&mut self, known: AppliedRow) {
        let (port, container, link) = (
            known.row.key(),
            known.row.container_id,
            known.row.link_index,
        );
        self.remove(&port);
        self.known.insert(port, known);
        self.containers.entry(container).or_default().insert(port);
        self.links.entry(link).or_default().insert(port);
    }

    /// A row is given up.
    pub(super) fn remove(&mut self, port: &PortKey) -> Option<AppliedRow> {
        let known = self.known.remove(port)?;
        leave(&mut self.containers, &known.row.container_id, *port);
        leave(&mut self.links, &known.row.link_index, *port);
        Some(known)
    }

    /// The ports of a container.
    pub(super) fn of_container(&self, id: ContainerId) -> impl Iterator<Item = PortKey> + '_ {
        self.containers.get(&id).into_iter().flatten().copied()
    }

    /// The ports of a container's link, by its index.
    pub(super) fn at_link(&self, link: u32) -> impl Iterator<Item = PortKey> + '_ {
        self.links.get(&link).into_iter().flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::desired::{PortRow, Protocol};
    use shared::ids::{KernelId, RegionId};

    #[test]
    fn a_row_is_found_where_it_is_and_nowhere_else() {
        let row = |host_port, container: u8, link_index| {
            let key = PortKey {
                protocol: Protocol::Tcp,
                host_port,
            };
            let target = std::net::Ipv4Addr::LOCALHOST.into();
            let id = ContainerId([container; 32]);
            AppliedRow {
                row: PortRow {
                    link_index,
                    ..PortRow::new(key, KernelId([1; 16]), id, target, 80)
                },
                region: RegionId([1; 16]),
            }
        };
        let mut rows = Rows::default();
        rows.insert(row(1, 1, 4));
        rows.insert(row(2, 1, 4));
        rows.insert(row(3, 2, 5));
        let found = |rows: &Rows| -> [Vec<u16>; 4] {
            let numbers =
                |ports: &mut dyn Iterator<Item = PortKey>| ports.map(|it| it.host_port).collect();
            let of = |id| numbers(&mut rows.of_container(ContainerId([id; 32])));
            let at = |link| numbers(&mut rows.at_link(link));
            [of(1), of(2), at(4), at(5)]
        };
        let none: Vec<u16> = Vec::new();
        assert_eq!(found(&rows), [vec![1, 2], vec![3], vec![1, 2], vec![3]]);
        // Another container has the port, by another link.
        rows.insert(row(2, 2, 5));
        assert_eq!(found(&rows), [vec![1], vec![2, 3], vec![1], vec![2, 3]]);
        let key = |host_port| row(host_port, 0, 0).row.key();
        assert!(rows.remove(&key(1)).is_some() && rows.remove(&key(1)).is_none());
        assert_eq!(found(&rows), [none.clone(), vec![2, 3], none, vec![2, 3]]);
        assert!(rows.containers.len() == 1 && rows.links.len() == 1 && rows.len() == 2);
    }
}
