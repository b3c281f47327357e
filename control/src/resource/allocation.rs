//! What a kernel got: device name, slot, device id, amount.

use rust_decimal::Decimal;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::slots::{self, Amount};
use crate::kernel::resource_text::Allocations;

/// Amounts of one slot per device id, in the order they were given.
pub(crate) type Shares = Vec<(String, Amount)>;

/// What a kernel got, in the order of allocation. A device name without slots was asked for
/// nothing. Serialised as nested maps with amounts as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allocation {
    devices: Vec<(String, Vec<(String, Shares)>)>,
}

/// A recorded allocation has an amount that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the recorded amount {amount:?} of {slot} on device {id} is not a number")]
pub struct BadAllocation {
    /// Slot.
    pub slot: String,
    /// Device id.
    pub id: String,
    /// The text recorded.
    pub amount: String,
}

impl Allocation {
    pub(super) fn insert(&mut self, device: &str, slots: Vec<(String, Shares)>) {
        match self.devices.iter_mut().find(|(name, _)| name == device) {
            Some(entry) => entry.1 = slots,
            None => self.devices.push((device.to_owned(), slots)),
        }
    }

    /// Every device name with its slots.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (&str, &[(String, Shares)])> {
        self.devices
            .iter()
            .map(|(name, slots)| (name.as_str(), slots.as_slice()))
    }

    /// The devices held of every accelerator (everything but `cpu` and `mem`): name and ids, each once.
    pub fn accelerators(&self) -> impl Iterator<Item = (&str, Vec<&str>)> {
        let others = self
            .devices()
            .filter(|(name, _)| !matches!(*name, "cpu" | "mem"));
        others.filter_map(|(name, slots)| {
            let held = slots.iter().flat_map(|(_, shares)| shares);
            let mut ids: Vec<&str> = held
                .filter(|(_, amount)| !amount.is_zero())
                .map(|(id, _)| id.as_str())
                .collect();
            ids.sort_unstable();
            ids.dedup();
            (!ids.is_empty()).then_some((name, ids))
        })
    }

    /// Whether the devices of an accelerator are held in shares, of which others may hold some too.
    pub fn in_shares(&self, device: &str) -> bool {
        let mut slots = self.of_device(device).iter();
        slots.any(|(slot, _)| slot.ends_with(".shares"))
    }

    pub(super) fn of_device(&self, device: &str) -> &[(String, Shares)] {
        let found = self.devices.iter().find(|(name, _)| name == device);
        found.map_or(&[], |(_, slots)| slots)
    }

    /// Device id and amount of one slot of a device.
    pub fn shares(&self, device: &str, slot: &str) -> &[(String, Amount)] {
        let found = self.of_device(device).iter().find(|(name, _)| name == slot);
        found.map_or(&[], |(_, shares)| shares)
    }

    /// Ids of the devices given of one slot.
    pub fn ids(&self, device: &str, slot: &str) -> Vec<&str> {
        self.shares(device, slot)
            .iter()
            .map(|(id, _)| id.as_str())
            .collect()
    }

    /// Sum of one slot over its devices.
    pub fn total(&self, device: &str, slot: &str) -> Amount {
        self.shares(device, slot)
            .iter()
            .map(|(_, amount)| *amount)
            .sum()
    }

    /// The text form of `resource.txt` and of the create reply.
    pub fn to_text(&self) -> Allocations {
        let mut text = Allocations::default();
        for (device, slots) in &self.devices {
            text.0.push(crate::kernel::resource_text::DeviceAllocation {
                device: device.clone(),
                slots: Vec::new(),
            });
            for (slot, shares) in slots {
                for (id, amount) in shares {
                    text.push(device, slot, id, &amount_text(*amount));
                }
            }
        }
        text
    }

    /// Reads the text form back.
    ///
    /// # Errors
    /// An amount that is no amount.
    pub fn from_text(text: &Allocations) -> Result<Self, BadAllocation> {
        let mut allocation = Self::default();
        for entry in &text.0 {
            let mut slots = Vec::new();
            for slot in &entry.slots {
                let mut shares = Shares::new();
                for (id, written) in &slot.amounts {
                    let amount = slots::amount(&slot.slot, written).map_err(|_| BadAllocation {
                        slot: slot.slot.clone(),
                        id: id.clone(),
                        amount: written.clone(),
                    })?;
                    shares.push((id.clone(), amount));
                }
                slots.push((slot.slot.clone(), shares));
            }
            allocation.insert(&entry.device, slots);
        }
        Ok(allocation)
    }

    /// Whether both give the same amounts of the same devices, in any order and scale.
    pub fn same_as(&self, other: &Self) -> bool {
        let flat = |allocation: &Self| {
            let mut all: Vec<(String, String, String, Decimal)> = Vec::new();
            for (device, slots) in allocation.devices() {
                for (slot, shares) in slots {
                    for (id, amount) in shares.iter().filter(|(_, amount)| !amount.is_zero()) {
                        all.push((device.to_owned(), slot.clone(), id.clone(), *amount));
                    }
                }
            }
            all.sort();
            all
        };
        flat(self) == flat(other)
    }
}

/// Amounts keep the scale they were given with (`0.50`), whole ones have none.
fn amount_text(amount: Amount) -> String {
    if amount.fract().is_zero() && amount.scale() == 0 {
        slots::text(amount)
    } else {
        amount.to_string()
    }
}

impl Serialize for Allocation {
    fn serialize<S: Serializer>(&self, sink: S) -> Result<S::Ok, S::Error> {
        self.to_text().serialize(sink)
    }
}

impl<'de> Deserialize<'de> for Allocation {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let text = Allocations::deserialize(source)?;
        Self::from_text(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_form_is_the_one_of_the_create_reply() {
        let mut allocation = Allocation::default();
        allocation.insert(
            "cuda",
            vec![(
                "cuda.shares".to_owned(),
                vec![("g0".to_owned(), "0.50".parse().unwrap())],
            )],
        );
        allocation.insert(
            "cpu",
            vec![(
                "cpu".to_owned(),
                vec![("3".to_owned(), 1.into()), ("1".to_owned(), 1.into())],
            )],
        );
        let json = serde_json::to_string(&allocation).unwrap();
        assert_eq!(
            json,
            r#"{"cuda":{"cuda.shares":{"g0":"0.50"}},"cpu":{"cpu":{"3":"1","1":"1"}}}"#
        );
        let back: Allocation = serde_json::from_str(&json).unwrap();
        assert_eq!(back, allocation);
        assert!(serde_json::from_str::<Allocation>(r#"{"cpu":{"cpu":{"0":"x"}}}"#).is_err());
        assert_eq!(back.total("cpu", "cpu"), 2.into());
        assert_eq!(back.ids("cpu", "cpu"), ["3", "1"]);
    }
}
