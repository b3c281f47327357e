//! Client networks of the node and of a row, together.
//!
//! In: two lists, each of which lets everybody in when it is empty. Out: one that lets in whom both
//! do, in the same terms. Invariant: two lists that have nobody in common let nobody in, not everybody.

use std::net::{IpAddr, Ipv4Addr};

use shared::desired::ClientNetwork;

/// A network that no client comes from.
const NOBODY: ClientNetwork = ClientNetwork {
    address: IpAddr::V4(Ipv4Addr::BROADCAST),
    prefix: 32,
};

/// Two networks are apart, or one is in the other.
fn common(a: &ClientNetwork, b: &ClientNetwork) -> Option<ClientNetwork> {
    let (wide, narrow) = if a.prefix <= b.prefix { (a, b) } else { (b, a) };
    let same_family = wide.address.is_ipv4() == narrow.address.is_ipv4();
    (same_family && wide.contains(narrow.address)).then_some(*narrow)
}

/// Whom both lists let in.
pub(super) fn both(node: &[ClientNetwork], row: &[ClientNetwork]) -> Vec<ClientNetwork> {
    if node.is_empty() {
        return row.to_vec();
    }
    if row.is_empty() {
        return node.to_vec();
    }
    let mut found: Vec<ClientNetwork> = Vec::new();
    for it in node
        .iter()
        .flat_map(|a| row.iter().filter_map(|b| common(a, b)))
    {
        if !found.contains(&it) {
            found.push(it);
        }
    }
    if found.is_empty() {
        found.push(NOBODY);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(texts: &[&str]) -> Vec<ClientNetwork> {
        let read = |text: &&str| {
            let (address, prefix) = text.split_once('/').unwrap();
            ClientNetwork {
                address: address.parse().unwrap(),
                prefix: prefix.parse().unwrap(),
            }
        };
        texts.iter().map(read).collect()
    }

    #[test]
    fn both_lists_must_let_a_client_in() {
        let none: Vec<ClientNetwork> = Vec::new();
        let ten = list(&["10.0.0.0/8"]);
        assert_eq!(both(&none, &none), none);
        assert_eq!(both(&ten, &none), ten);
        assert_eq!(both(&none, &ten), ten);
        assert_eq!(
            both(&ten, &list(&["10.1.0.0/16", "192.168.0.0/16"])),
            list(&["10.1.0.0/16"])
        );
        assert_eq!(
            both(
                &list(&["10.1.0.0/16", "2001:db8::/32"]),
                &list(&["0.0.0.0/0", "::/0"])
            ),
            list(&["10.1.0.0/16", "2001:db8::/32"])
        );
        let nobody = both(&ten, &list(&["11.0.0.0/8", "::/0"]));
        assert_eq!(nobody, [NOBODY]);
        for client in ["10.0.0.1", "11.0.0.1", "::1"] {
            let client: IpAddr = client.parse().unwrap();
            assert!(!nobody.iter().any(|it| it.contains(client)));
        }
    }
}
