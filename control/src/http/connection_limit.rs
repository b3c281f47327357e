//! How many connections the HTTP servers take: in all, and from one address.
//!
//! In: the address of a connection that has come. Out: a permit for it, or why there is none. Invariant:
//! whoever holds many connections leaves room for those who hold few.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections at once.
pub(super) const ALL: usize = 128;
/// Of one address.
pub(super) const OF_AN_ADDRESS: usize = 16;
/// Of all permits, those for addresses that hold none yet.
pub(super) const KEPT: usize = ALL / 4;

/// Who is counted as one: an IPv4 address, or the network that an IPv6 client may choose its address in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Origin(IpAddr);

impl Origin {
    fn of(address: IpAddr) -> Origin {
        Origin(match address.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
            address @ IpAddr::V4(_) => address,
        })
    }
}

/// Why there is no permit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The address has as many as one may have, or at least one while few are left.
    OfTheAddress,
    /// None is left for anybody.
    Full,
}

impl Refusal {
    /// A whole answer for who is turned away.
    pub(super) fn answer(self) -> String {
        let words = match self {
            Self::OfTheAddress => {
                "this address has too many connections here: close some, or wait for their end\n"
            }
            Self::Full => "there are too many connections here: try again in a moment\n",
        };
        format!(
            "HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\n\
             content-length: {}\r\nretry-after: 5\r\nconnection: close\r\n\r\n{words}",
            words.len()
        )
    }
}

/// Permits for connections, and how many are taken.
#[derive(Debug, Default)]
pub(super) struct ConnectionLimit(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    by_origin: HashMap<Origin, usize>,
}

impl ConnectionLimit {
    fn taken(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A permit for one more connection.
    ///
    /// # Errors
    /// There is none for this address.
    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Result<ConnectionPermit, Refusal> {
        let origin = Origin::of(address);
        let mut taken = self.taken();
        if taken.all >= ALL {
            return Err(Refusal::Full);
        }
        let most = if taken.all < ALL - KEPT {
            OF_AN_ADDRESS
        } else {
            1
        };
        if taken.by_origin.get(&origin).copied().unwrap_or(0) >= most {
            return Err(Refusal::OfTheAddress);
        }
        taken.all += 1;
        *taken.by_origin.entry(origin).or_default() += 1;
        Ok(ConnectionPermit(self.clone(), origin))
    }
}

/// A permit that is taken until this is dropped.
#[derive(Debug)]
pub(super) struct ConnectionPermit(Arc<ConnectionLimit>, Origin);

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let mut taken = self.0.taken();
        taken.all -= 1;
        if let Some(count) = taken.by_origin.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                taken.by_origin.remove(&self.1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn who_holds_many_leaves_places_to_others() {
        let connections = Arc::<ConnectionLimit>::default();
        let take = |text: &str| connections.take(address(text));
        let mut held: Vec<ConnectionPermit> = Vec::new();
        for client in 0..(ALL - KEPT) / OF_AN_ADDRESS {
            let client = format!("10.0.0.{client}");
            held.extend((0..OF_AN_ADDRESS).map(|_| take(&client).expect("a permit")));
            assert_eq!(take(&client).unwrap_err(), Refusal::OfTheAddress);
        }
        // What is left is for those who have none.
        for client in 0..KEPT {
            let client = format!("10.0.1.{client}");
            held.push(take(&client).expect("a permit"));
            let more = take(&client).unwrap_err();
            assert!(held.len() == ALL || more == Refusal::OfTheAddress);
        }
        assert_eq!(take("10.0.2.0").unwrap_err(), Refusal::Full);
        held.pop();
        assert!(take("10.0.2.0").is_ok());
        drop(held);
        let taken = connections.taken();
        assert!(taken.all == 0 && taken.by_origin.is_empty(), "{taken:?}");
    }

    #[test]
    fn a_network_of_ipv6_is_one_client_and_a_mapped_address_is_its_own() {
        let one = |text: &str| Origin::of(address(text));
        assert_eq!(one("2001:db8:1:2::1"), one("2001:db8:1:2:ffff::9"));
        assert_ne!(one("2001:db8:1:2::1"), one("2001:db8:1:3::1"));
        assert_eq!(one("::ffff:10.0.0.1"), one("10.0.0.1"));
        assert_ne!(one("::ffff:10.0.0.1"), one("::ffff:10.0.0.2"));
        assert_ne!(one("10.0.0.1"), one("10.0.0.2"));
    }
}
