//! An allocation map: how much of each device of one plugin is used, and where new requests go.

use rust_decimal::Decimal;
use rust_decimal::prelude::ToPrimitive;

use super::affinity::{Candidate, Hint, order};
use super::allocation::Shares;
use super::{Amount, ResourceError, SlotType, device_of, discrete, fraction};

/// How a request spreads over devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// One device is filled before the next.
    Fill,
    /// Equal parts of as many devices as the request has room in.
    Evenly,
}

/// A device in a map: it offers one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapDevice {
    /// Device id.
    pub id: String,
    /// Another id that an allocation may name it by: of the Python agent's kernels.
    pub alias: Option<String>,
    /// Slot it offers.
    pub slot: String,
    /// What the slot counts.
    pub kind: SlotType,
    /// How much it has.
    pub total: Amount,
}

impl MapDevice {
    fn is_called(&self, id: &str) -> bool {
        self.id == id || self.alias.as_deref() == Some(id)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Division {
    Discrete,
    Fraction { quantum: Amount },
}

/// Use of the devices of one plugin. A copy is a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllocationMap {
    division: Division,
    strategy: Strategy,
    /// In the order of the device list, which decides between equals.
    devices: Vec<MapDevice>,
    /// Used amount of each device, in the same order.
    used: Vec<Amount>,
    exclusive: Vec<String>,
}

/// What comes with a request besides its slots.
#[derive(Debug, Clone, Copy)]
pub struct MapRequest<'a> {
    /// Device name, for the error text.
    pub context: Option<&'a str>,
    /// Where earlier devices of the request are.
    pub hint: Option<&'a Hint<'a>>,
    /// Whether a fractional amount may be split over devices.
    pub allow_fragmentation: bool,
}

impl AllocationMap {
    /// A map of whole units.
    pub fn discrete(strategy: Strategy, devices: Vec<MapDevice>, exclusive: Vec<String>) -> Self {
        Self::new(Division::Discrete, strategy, devices, exclusive)
    }

    /// A map of shares, each a multiple of `quantum` (at least 0.01).
    pub fn fraction(
        strategy: Strategy,
        quantum: Amount,
        devices: Vec<MapDevice>,
        exclusive: Vec<String>,
    ) -> Self {
        let quantum = quantum.max(fraction::RESOLUTION);
        Self::new(Division::Fraction { quantum }, strategy, devices, exclusive)
    }

    fn new(
        division: Division,
        strategy: Strategy,
        devices: Vec<MapDevice>,
        exclusive: Vec<String>,
    ) -> Self {
        let used = vec![Decimal::ZERO; devices.len()];
        Self {
            division,
            strategy,
            devices,
            used,
            exclusive,
        }
    }

    /// Places the slots of one device name. On an error the map may be left changed: the caller
    /// works on a copy.
    ///
    /// # Errors
    /// Any class but `UnsupportedResource`.
    pub fn allocate(
        &mut self,
        slots: &[(String, Amount)],
        request: MapRequest<'_>,
    ) -> Result<Vec<(String, Shares)>, ResourceError> {
        let wanted: Vec<&(String, Amount)> = slots
            .iter()
            .filter(|(_, amount)| *amount > Decimal::ZERO)
            .collect();
        self.check_exclusive(&wanted)?;
        for (slot, amount) in &wanted {
            if self.is_unique(slot) && *amount != Decimal::ONE {
                return Err(ResourceError::argument(format!(
                    "{slot} is a unique resource: ask for exactly 1, not {amount}"
                )));
            }
        }
        let mut given = Vec::new();
        for (slot, amount) in wanted {
            // What is unique is given whole also where other devices are given in shares.
            let division = match self.is_unique(slot) {
                true => Division::Discrete,
                false => self.division,
            };
            let shares = match (division, self.strategy) {
                (Division::Discrete, Strategy::Fill) => {
                    discrete::fill(self, slot, *amount, request)?
                }
                (Division::Discrete, Strategy::Evenly) => {
                    discrete::evenly(self, slot, *amount, request)?
                }
                (Division::Fraction { quantum }, strategy) => {
                    fraction::allocate(self, slot, *amount, strategy, quantum, request)?
                }
            };
            if !shares.is_empty() {
                given.push((slot.clone(), shares));
            }
        }
        Ok(given)
    }

    fn is_unique(&self, slot: &str) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|device| device.slot == slot && device.kind == SlotType::Unique)
    }

    fn check_exclusive(&self, wanted: &[&(String, Amount)]) -> Result<(), ResourceError> {
        let exclusive = |slot: &str| self.exclusive.iter().any(|pattern| glob(pattern, slot));
        let mut found = wanted.iter().filter(|(slot, _)| exclusive(slot));
        match (found.next(), found.next()) {
            (Some((first, _)), Some((second, _))) => Err(ResourceError::Combination {
                first: first.clone(),
                second: second.clone(),
            }),
            _ => Ok(()),
        }
    }

    /// Counts an allocation as used. Devices that are not in the map are returned.
    pub fn apply(&mut self, slots: &[(String, Shares)]) -> Vec<(String, String)> {
        self.change(slots, |used, amount| used + amount)
    }

    /// Takes an allocation back. Devices that are not in the map are returned.
    pub fn free(&mut self, slots: &[(String, Shares)]) -> Vec<(String, String)> {
        self.change(slots, |used, amount| used - amount)
    }

    fn change(
        &mut self,
        slots: &[(String, Shares)],
        change: impl Fn(Amount, Amount) -> Amount,
    ) -> Vec<(String, String)> {
        let mut missing = Vec::new();
        for (slot, shares) in slots {
            for (id, amount) in shares {
                // What was given as another slot, before the node's settings were changed, is held whole.
                let other = || self.devices.iter().position(|device| device.is_called(id));
                if let Some(index) = self.index(slot, id) {
                    self.used[index] = change(self.used[index], *amount);
                } else if let Some(index) = other() {
                    self.used[index] = change(self.used[index], self.devices[index].total);
                } else {
                    missing.push((slot.clone(), id.clone()));
                }
            }
        }
        missing
    }

    fn index(&self, slot: &str, id: &str) -> Option<usize> {
        self.devices
            .iter()
            .position(|device| device.slot == slot && device.is_called(id))
    }

    /// The device of a slot that an allocation names so.
    pub(super) fn row(&self, slot: &str, id: &str) -> Option<&MapDevice> {
        self.devices.get(self.index(slot, id)?)
    }

    pub(super) fn add(&mut self, slot: &str, id: &str, amount: Amount) {
        if let Some(index) = self.index(slot, id) {
            self.used[index] += amount;
        }
    }

    pub(super) fn used_mut(&mut self, slot: &str, id: &str) -> Option<&mut Amount> {
        let index = self.index(slot, id)?;
        self.used.get_mut(index)
    }

    /// Devices of a slot in the order a request of this amount considers them.
    pub(super) fn ordered(
        &self,
        slot: &str,
        amount: Amount,
        hint: Option<&Hint<'_>>,
    ) -> Vec<Candidate> {
        let count = amount.to_usize().unwrap_or(usize::MAX);
        order(self.candidates(slot), count, device_of(slot), hint)
    }

    /// Devices of a slot in device-list order.
    pub(super) fn candidates(&self, slot: &str) -> Vec<Candidate> {
        self.rows()
            .filter(|(device, _)| device.slot == slot)
            .map(|(device, used)| Candidate {
                id: device.id.clone(),
                used,
                // What is held twice takes nothing from the others.
                free: (device.total - used).max(Decimal::ZERO),
            })
            .collect()
    }

    /// Every device and its used amount, in device-list order.
    pub fn rows(&self) -> impl Iterator<Item = (&MapDevice, Amount)> {
        self.devices.iter().zip(self.used.iter().copied())
    }

    /// Devices used beyond what they have, and not as in an earlier copy of this map: only a recovery can
    /// leave such.
    pub fn overused_since(&self, before: &Self) -> Vec<(String, String)> {
        let over = self
            .rows()
            .zip(&before.used)
            .filter(|((device, used), before)| *used > device.total && used != *before);
        over.map(|((device, _), _)| (device.slot.clone(), device.id.clone()))
            .collect()
    }
}

/// Exact match, or a shell pattern when it contains a star. Case counts.
fn glob(pattern: &str, text: &str) -> bool {
    if !pattern.contains('*') {
        return pattern == text;
    }
    let parts: Vec<&str> = pattern.split('*').collect();
    let (Some(head), Some(tail)) = (parts.first(), parts.last()) else {
        return false;
    };
    let Some(rest) = text.strip_prefix(head) else {
        return false;
    };
    let Some(mut rest) = rest.strip_suffix(tail) else {
        return false;
    };
    for middle in &parts[1..parts.len() - 1] {
        match rest.find(middle) {
            Some(at) => rest = &rest[at + middle.len()..],
            None => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests;
