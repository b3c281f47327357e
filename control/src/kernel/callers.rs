//! Which kernel calls, by the address it calls from.
//!
//! In: the addresses of kernels' containers and the host-side ends of the links that these belong to.
//! Out: the kernel behind an address. Invariant: an address names a kernel only while its link is
//! there. The engine gives addresses of dead containers to others; links die with their container.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use shared::ids::KernelId;
use tokio::sync::Notify;

/// An address that a container's programs call from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Source {
    /// The address.
    pub address: IpAddr,
    /// The host-side end of its link.
    pub link_index: u32,
}

/// The addresses of all kernels.
#[derive(Debug, Default)]
pub struct Callers {
    known: Mutex<CallerTable>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct CallerTable {
    sources: HashMap<KernelId, Vec<Source>>,
    kernels: HashMap<IpAddr, Vec<(KernelId, u32)>>,
}

impl CallerTable {
    fn remove(&mut self, kernel: KernelId) {
        for source in self.sources.remove(&kernel).unwrap_or_default() {
            if let Some(holders) = self.kernels.get_mut(&source.address) {
                holders.retain(|(id, _)| *id != kernel);
                if holders.is_empty() {
                    self.kernels.remove(&source.address);
                }
            }
        }
    }
}

impl Callers {
    fn known(&self) -> MutexGuard<'_, CallerTable> {
        // No method leaves `CallerTable` half-changed at a point that can panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the addresses of a kernel.
    pub fn enter(&self, kernel: KernelId, sources: Vec<Source>) {
        let mut known = self.known();
        if known.sources.get(&kernel) == Some(&sources) {
            return;
        }
        known.remove(kernel);
        for source in &sources {
            let holders = known.kernels.entry(source.address).or_default();
            holders.push((kernel, source.link_index));
        }
        known.sources.insert(kernel, sources);
        drop(known);
        self.changed.notify_one();
    }

    /// Forgets a kernel.
    pub fn leave(&self, kernel: KernelId) {
        self.known().remove(kernel);
        self.changed.notify_one();
    }

    /// The kernel that calls from an address, when there is exactly one. `is_here` says whether a
    /// link of this host exists.
    pub fn who(&self, address: IpAddr, is_here: impl Fn(u32) -> bool) -> Option<KernelId> {
        let holders = self.known().kernels.get(&address).cloned()?;
        let mut here = holders.iter().filter(|(_, link)| is_here(*link));
        let (kernel, _) = here.next()?;
        here.next().is_none().then_some(*kernel)
    }

    /// All addresses, in their order.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut all: Vec<IpAddr> = self.known().kernels.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// Waits for a change. For one who waits only.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(last: u8, link_index: u32) -> Source {
        Source {
            address: [172, 17, 0, last].into(),
            link_index,
        }
    }

    #[test]
    fn an_address_names_a_kernel_while_its_link_is_there() {
        let (callers, one, two) = (Callers::default(), KernelId([1; 16]), KernelId([2; 16]));
        let at = |last: u8| IpAddr::from([172, 17, 0, last]);
        callers.enter(one, vec![source(2, 20), source(3, 30)]);
        assert_eq!(callers.who(at(2), |_| true), Some(one));
        assert_eq!(callers.who(at(3), |_| true), Some(one));
        assert_eq!(callers.who(at(4), |_| true), None);
        assert_eq!(callers.who(at(2), |link| link != 20), None);
        // The engine has given the address of a dead container to another one.
        callers.enter(two, vec![source(2, 40)]);
        assert_eq!(callers.who(at(2), |link| link != 20), Some(two));
        assert_eq!(callers.who(at(2), |_| true), None, "two claim it");
        assert_eq!(callers.addresses(), [at(2), at(3)]);
        // Of a restarted kernel only the new addresses count.
        callers.enter(one, vec![source(5, 50)]);
        assert_eq!(callers.who(at(3), |_| true), None);
        assert_eq!(callers.who(at(2), |_| true), Some(two));
        callers.leave(two);
        assert_eq!(callers.addresses(), [at(5)]);
        callers.leave(one);
        assert!(callers.known().kernels.is_empty() && callers.known().sources.is_empty());
    }
}
