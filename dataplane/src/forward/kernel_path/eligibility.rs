//! Whether the kernel path may serve a row. Pure, but for one look at a container's routes.
//!
//! In: the row, its container, the interfaces of this host. Out: nothing, or why not, in words for
//! the status. Invariant: when in doubt the answer is no, and the relay serves.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use ebpf::records::Bridge;
use shared::desired::{ContainerRow, PortRow, Protocol};

use crate::default_route;
use crate::sys::netlink::interfaces::Interface;

/// Interfaces by which clients of other hosts arrive: they speak Ethernet, are up, are nobody's
/// member and have an address others can reach. A bridge counts when it reaches other machines by
/// one of its members; by one with nothing but containers and virtual machines come neighbours only,
/// and those belong to the relay.
pub fn uplinks(interfaces: &BTreeMap<u32, Interface>) -> BTreeSet<u32> {
    let leads_out = |bridge: u32| {
        let mut members = interfaces.values().filter(|it| it.master == Some(bridge));
        members.any(|it| it.ethernet && it.up && it.kind != "veth" && it.kind != "tun")
    };
    interfaces
        .values()
        .filter(|it| it.ethernet && it.up && it.master.is_none())
        .filter(|it| it.kind != "bridge" || leads_out(it.index))
        .filter(|it| it.addresses.iter().any(|address| is_reachable(*address)))
        .map(|it| it.index)
        .collect()
}

/// The bridge that a container's link belongs to, if what the container sends to this host may be put into
/// the bridge's interface: one that tells VLANs apart may have the host in another.
pub fn bridge_of(link: u32, interfaces: &BTreeMap<u32, Interface>) -> Option<Bridge> {
    let bridge = interfaces.get(&interfaces.get(&link)?.master?)?;
    let is_plain = bridge.kind == "bridge" && !bridge.filters_vlans;
    Some(Bridge {
        index: bridge.index,
        address: bridge.hardware.filter(|_| is_plain)?,
        ..Bridge::default()
    })
}

/// Whether nothing but the rows of its own container depends on an interface.
pub fn is_alone(interface: &Interface) -> bool {
    interface.kind == "veth" && !interface.addresses.iter().any(|it| is_reachable(*it))
}

/// Whether clients of other hosts can use this address without naming an interface.
pub fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unspecified() && !v6.is_unicast_link_local(),
    }
}

/// What the decision is made from, beside the row.
#[derive(Debug)]
pub struct EligibilityInputs<'a> {
    /// The row's container, if its own row is there.
    pub container: Option<&'a ContainerRow>,
    /// All interfaces of this host.
    pub interfaces: &'a BTreeMap<u32, Interface>,
    /// Those with the program for clients attached.
    pub uplinks: &'a BTreeSet<u32>,
    /// Sessions of this row end when silent for a time.
    pub idle_timeout: bool,
    /// How many client networks are let in; 0 is everyone.
    pub networks: usize,
    /// Sessions that the relay has on the port.
    pub relayed: u32,
}

/// Why the kernel path can't serve a row to anybody.
pub fn common_obstacle(row: &PortRow, at: &EligibilityInputs<'_>) -> Option<String> {
    obstacle_of_row(row, at).or_else(|| obstacle_of_link(row, at))
}

/// The same as far as interfaces don't matter.
pub fn obstacle_of_row(row: &PortRow, at: &EligibilityInputs<'_>) -> Option<String> {
    let no = |why: &str| Some(why.to_owned());
    let families = (row.bind.is_ipv4(), row.target.is_ipv4());
    if families == (true, false) || (families == (false, true) && !row.bind.is_unspecified()) {
        return no("clients and container speak different versions of IP");
    }
    if row.honour_firewall {
        return no("the host's firewall decides about clients");
    }
    if at.idle_timeout {
        return no("the relay ends silent sessions, the kernel path can't");
    }
    if at.networks > ebpf::records::CLIENT_NETWORKS {
        return no("the row names too many client networks");
    }
    // Nothing in a datagram tells that it belongs to a session of the relay.
    if row.protocol == Protocol::Udp && at.relayed > 0 {
        return no("sessions of datagrams are under way");
    }
    let Some(container) = at.container else {
        return no("nothing is known of the container");
    };
    if container.host_network {
        return no("the container is on the host's network");
    }
    if row.link_index == 0 {
        return no("the host's end of the container's link is not known");
    }
    None
}

fn obstacle_of_link(row: &PortRow, at: &EligibilityInputs<'_>) -> Option<String> {
    let Some(link) = at.interfaces.get(&row.link_index) else {
        return Some(format!("interface {} is not here", row.link_index));
    };
    if link.kind != "veth" || !link.peer_elsewhere {
        return Some(format!("{} does not lead into a container", link.name));
    }
    if !link.up {
        return Some(format!("{} is down", link.name));
    }
    None
}

/// Why the kernel path can't serve a row, which has no [`common_obstacle`], to clients of other
/// hosts; `None` when only the container's routes can be in the way.
pub fn remote_obstacle(row: &PortRow, at: &EligibilityInputs<'_>) -> Option<String> {
    let no = |why: &str| Some(why.to_owned());
    if row.local_only || row.bind.is_loopback() {
        return no("only clients on this host may use the port");
    }
    // Replies leave by the container's routes, which may be another network's.
    if at
        .container
        .is_some_and(|it| it.past_host || it.link_indexes != [row.link_index])
    {
        return no("the container is on several networks");
    }
    if at.uplinks.is_empty() {
        return no("no interface leads to other hosts");
    }
    // A stream's sender learns how much would do; a datagram would be lost without a word.
    let link = at.interfaces.get(&row.link_index)?;
    let narrow = at
        .uplinks
        .iter()
        .filter_map(|index| at.interfaces.get(index))
        .find(|uplink| uplink.mtu < link.mtu);
    narrow
        .filter(|_| row.protocol == Protocol::Udp)
        .map(|uplink| {
            format!(
                "{} takes packets of {} bytes, {} only {}",
                link.name, link.mtu, uplink.name, uplink.mtu
            )
        })
}

/// Whether the network namespace of a process has a default route of the family of `target`:
/// without one the container can't answer clients of other networks.
pub fn has_default_route(proc: &Path, pid: u32, target: IpAddr) -> bool {
    let directory = proc.join(pid.to_string()).join("net");
    let text = |file| std::fs::read_to_string(directory.join(file)).unwrap_or_default();
    match target {
        IpAddr::V4(_) => default_route::ipv4(&text("route")).is_some(),
        IpAddr::V6(_) => default_route::ipv6(&text("ipv6_route")).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::desired::PortKey;
    use shared::ids::{ContainerId, KernelId};

    fn interfaces() -> BTreeMap<u32, Interface> {
        let eth = |index: u32, kind: &str, address: Option<&str>| Interface {
            index,
            name: format!("if{index}"),
            kind: kind.to_owned(),
            ethernet: true,
            up: true,
            mtu: 1500,
            master: (kind == "veth").then_some(3),
            peer_elsewhere: kind == "veth",
            hardware: Some([2, 0, 0, 0, 0, u8::try_from(index).unwrap()]),
            filters_vlans: false,
            addresses: address.map(|it| it.parse().unwrap()).into_iter().collect(),
        };
        [
            eth(2, "", Some("192.0.2.1")),
            eth(3, "bridge", Some("172.17.0.1")),
            eth(4, "veth", None),
            eth(5, "", None),
            eth(6, "vlan", Some("2001:db8::1")),
            eth(7, "", Some("fe80::1")),
        ]
        .into_iter()
        .map(|it| (it.index, it))
        .collect()
    }

    fn row() -> PortRow {
        let key = PortKey {
            protocol: Protocol::Tcp,
            host_port: 30000,
        };
        let target = "172.17.0.2".parse().unwrap();
        let mut row = PortRow::new(key, KernelId([1; 16]), ContainerId([2; 32]), target, 80);
        row.bind = "0.0.0.0".parse().unwrap();
        row.link_index = 4;
        row
    }

    fn container() -> ContainerRow {
        ContainerRow {
            link_indexes: vec![4],
            ..ContainerRow::default()
        }
    }

    #[test]
    fn uplinks_have_addresses_and_lead_out() {
        let mut all = interfaces();
        assert_eq!(uplinks(&all), BTreeSet::from([2, 6]));
        // Of a bond its members are none.
        let mut bond = all.clone();
        let mut bonded = |index: u32, master| {
            bond.get_mut(&index).unwrap().master = master;
        };
        bonded(5, Some(2));
        bonded(7, Some(2));
        bond.get_mut(&2).unwrap().kind = "bond".to_owned();
        assert_eq!(uplinks(&bond), BTreeSet::from([2, 6]));
        // A bridge with hardware in it is one.
        all.get_mut(&5).unwrap().master = Some(3);
        assert_eq!(uplinks(&all), BTreeSet::from([2, 3, 6]));
    }

    #[test]
    fn answers_bypass_the_code_of_plain_bridges() {
        let mut all = interfaces();
        let bridge = bridge_of(4, &all).unwrap();
        assert_eq!((bridge.index, bridge.address), (3, [2, 0, 0, 0, 0, 3]));
        assert_eq!((bridge_of(5, &all), bridge_of(9, &all)), (None, None));
        for change in [
            |it: &mut Interface| it.kind = "bond".to_owned(),
            |it: &mut Interface| it.filters_vlans = true,
            |it: &mut Interface| it.hardware = None,
        ] {
            let mut all = all.clone();
            change(all.get_mut(&3).unwrap());
            assert_eq!(bridge_of(4, &all), None);
        }
        all.remove(&3);
        assert_eq!(bridge_of(4, &all), None);
    }

    #[test]
    fn every_obstacle_is_named() {
        let mut all = interfaces();
        let uplinks = BTreeSet::from([2]);
        fn at<'a>(
            container: Option<&'a ContainerRow>,
            interfaces: &'a BTreeMap<u32, Interface>,
            uplinks: &'a BTreeSet<u32>,
        ) -> EligibilityInputs<'a> {
            EligibilityInputs {
                container,
                interfaces,
                uplinks,
                idle_timeout: false,
                networks: 0,
                relayed: 0,
            }
        }
        let words = |row: &PortRow, at: &EligibilityInputs<'_>| {
            common_obstacle(row, at).or_else(|| remote_obstacle(row, at))
        };
        let ask =
            |row: &PortRow, container: Option<&ContainerRow>, all: &BTreeMap<u32, Interface>| {
                words(row, &at(container, all, &uplinks))
            };
        let good = container();
        assert_eq!(ask(&row(), Some(&good), &all), None);
        assert!(
            ask(&row(), None, &all)
                .unwrap()
                .contains("nothing is known")
        );
        let mut two = container();
        two.link_indexes.push(9);
        assert!(ask(&row(), Some(&two), &all).unwrap().contains("several"));
        let mut past = container();
        past.past_host = true;
        assert!(ask(&row(), Some(&past), &all).unwrap().contains("several"));
        let mut host = container();
        host.host_network = true;
        assert!(ask(&row(), Some(&host), &all).unwrap().contains("host's"));
        let mut local = row();
        local.bind = "127.0.0.1".parse().unwrap();
        assert!(
            ask(&local, Some(&good), &all)
                .unwrap()
                .contains("this host")
        );
        all.get_mut(&4).unwrap().mtu = 9000;
        assert_eq!(ask(&row(), Some(&good), &all), None, "a stream adapts");
        let mut datagrams = row();
        datagrams.protocol = Protocol::Udp;
        assert!(ask(&datagrams, Some(&good), &all).unwrap().contains("9000"));
        all.get_mut(&4).unwrap().peer_elsewhere = false;
        assert!(
            ask(&row(), Some(&good), &all)
                .unwrap()
                .contains("lead into")
        );
        all.remove(&4);
        assert!(ask(&row(), Some(&good), &all).unwrap().contains("not here"));
        let (none, all) = (BTreeSet::new(), interfaces());
        let nowhere = at(Some(&good), &all, &none);
        assert!(words(&row(), &nowhere).unwrap().contains("other hosts"));
        assert_eq!(common_obstacle(&row(), &nowhere), None);
        let idle = EligibilityInputs {
            idle_timeout: true,
            ..at(Some(&good), &all, &uplinks)
        };
        assert!(words(&row(), &idle).unwrap().contains("silent"));
        let mut filtered = row();
        filtered.honour_firewall = true;
        assert!(
            ask(&filtered, Some(&good), &all)
                .unwrap()
                .contains("firewall")
        );
        let busy = EligibilityInputs {
            relayed: 1,
            ..at(Some(&good), &all, &uplinks)
        };
        assert_eq!(words(&row(), &busy), None);
        assert!(words(&datagrams, &busy).unwrap().contains("under way"));
        let many = EligibilityInputs {
            networks: 9,
            ..at(Some(&good), &all, &uplinks)
        };
        assert!(words(&row(), &many).unwrap().contains("too many"));
    }

    #[test]
    fn default_routes_are_of_one_family() {
        let proc = tempfile::tempdir().unwrap();
        let net = proc.path().join("7/net");
        std::fs::create_dir_all(&net).unwrap();
        let route = "Iface\neth0\t00000000\t0100A8C0\t3\t0\t0\t0\t00000000\t0\n";
        std::fs::write(net.join("route"), route).unwrap();
        let has = |pid, target: &str| has_default_route(proc.path(), pid, target.parse().unwrap());
        assert!(has(7, "10.0.0.1"));
        assert!(!has(7, "fd00::1"), "its file is not there");
        assert!(!has(8, "10.0.0.1"), "the process is not there");
    }
}
