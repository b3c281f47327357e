//! Ports that are gone, until their entries have left the maps.
//!
//! In: keys of ports that were swept. Out: one call per map for all of them. Invariant: a key is
//! forgotten only when each map has let go of its entry, or when a new port has begun it anew.

use std::collections::BTreeSet;
use std::io;

use ebpf::records::ServiceKey;

use super::KernelPathError;

/// What takes entries out of a map.
pub(super) type Removal<'a> = &'a mut dyn FnMut(&[ServiceKey]) -> io::Result<()>;

/// Keys whose entries may still be in a map.
#[derive(Debug, Default)]
pub(super) struct PendingRemovals(BTreeSet<ServiceKey>);

impl PendingRemovals {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn contains(&self, key: ServiceKey) -> bool {
        self.0.contains(&key)
    }

    /// One more.
    pub(super) fn add(&mut self, key: ServiceKey) {
        self.0.insert(key);
    }

    /// A new port has begun the entries anew.
    pub(super) fn forget(&mut self, key: ServiceKey) {
        self.0.remove(&key);
    }

    /// Takes the entries out of all maps. What one of them keeps is tried again the next time.
    ///
    /// # Errors
    /// The last refusal.
    pub(super) fn carry_out(
        &mut self,
        maps: &mut [(&'static str, Removal<'_>)],
    ) -> Result<(), KernelPathError> {
        let keys: Vec<ServiceKey> = self.0.iter().copied().collect();
        let mut left = Ok(());
        for (name, remove) in maps {
            if let Err(source) = remove(&keys) {
                left = Err(KernelPathError::PendingRemovals {
                    name,
                    ports: keys.len(),
                    source,
                });
            }
        }
        if left.is_ok() {
            self.0.clear();
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_map_keeps_is_tried_again_until_it_is_gone() {
        let key = |port| ServiceKey {
            port,
            protocol: 6,
            zero: 0,
        };
        let mut removals = PendingRemovals::default();
        removals.add(key(1));
        removals.add(key(2));
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let mut busy = true;
        for _ in 0..2 {
            let took = removals.carry_out(&mut [
                ("first", &mut |keys: &[ServiceKey]| {
                    first.push(keys.to_vec());
                    Ok(())
                }),
                ("second", &mut |keys: &[ServiceKey]| {
                    second.push(keys.to_vec());
                    match std::mem::take(&mut busy) {
                        true => Err(io::ErrorKind::ResourceBusy.into()),
                        false => Ok(()),
                    }
                }),
            ]);
            assert_eq!(took.is_ok(), removals.is_empty());
            // Gone meanwhile, too; and one that is served again by now.
            removals.add(key(3));
            removals.forget(key(2));
        }
        let all = [vec![key(1), key(2)], vec![key(1), key(3)]];
        assert_eq!((first, second), (all.to_vec(), all.to_vec()));
        assert!(!removals.contains(key(1)) && removals.contains(key(3)));
    }
}
