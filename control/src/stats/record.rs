//! Records as the manager reads them: nested msgpack maps in which every number is a text.
//!
//! Invariant: the bytes are those of the original for the same values; order included.

use std::borrow::Cow;

use serde::ser::{Serialize, SerializeMap, Serializer};

/// The figures of one quantity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// The current value.
    pub current: String,
    /// The most it can be.
    pub capacity: Option<String>,
    /// The current value in percent of the capacity.
    pub percentage: String,
    /// Its unit.
    pub unit: &'static str,
    /// Moving statistics: key and value.
    pub statistics: Vec<(&'static str, String)>,
}

impl Figures {
    /// What is said of a load that was never read: it counts as busy. A reader of records takes a
    /// missing one for idle, and may end the session that is at work.
    pub fn unread(unit: &'static str) -> Self {
        Self {
            current: "0".to_owned(),
            capacity: None,
            percentage: "100".to_owned(),
            unit,
            statistics: Vec::new(),
        }
    }
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(4 + self.statistics.len()))?;
        map.serialize_entry("current", &self.current)?;
        map.serialize_entry("capacity", &self.capacity)?;
        map.serialize_entry("pct", &self.percentage)?;
        map.serialize_entry("unit_hint", self.unit)?;
        for (key, value) in &self.statistics {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

/// The record of one object: quantity to figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record(pub Vec<(Cow<'static, str>, Figures)>);

impl Record {
    /// The figures of one quantity.
    pub fn get(&self, key: &str) -> Option<&Figures> {
        let found = self.0.iter().find(|(known, _)| known == key)?;
        Some(&found.1)
    }

    /// Shows a quantity whose last value is too old to be told as one that is used to the full. The
    /// value itself and its statistics stay: they were true.
    pub fn count_as_busy(&mut self, key: &str) {
        for (_, figures) in self.0.iter_mut().filter(|(known, _)| known == key) {
            "100".clone_into(&mut figures.percentage);
        }
    }
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        in_order(serializer, &self.0)
    }
}

/// The record of a node and its devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeRecord {
    /// The node.
    pub node: Record,
    /// Quantity to device to figures.
    pub devices: Vec<(Cow<'static, str>, DeviceFigures)>,
}

/// Device id to figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceFigures(pub Vec<(String, Figures)>);

impl Serialize for DeviceFigures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        in_order(serializer, &self.0)
    }
}

impl Serialize for NodeRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        struct Devices<'a>(&'a [(Cow<'static, str>, DeviceFigures)]);
        impl Serialize for Devices<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                in_order(serializer, self.0)
            }
        }
        let mut map = serializer.serialize_map(Some(2))?;
        map.serialize_entry("node", &self.node)?;
        map.serialize_entry("devices", &Devices(&self.devices))?;
        map.end()
    }
}

/// The record of a container's processes: host pid to record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessRecord(pub Vec<(u32, Record)>);

impl Serialize for ProcessRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        in_order(serializer, &self.0)
    }
}

fn in_order<K: Serialize, V: Serialize, S: Serializer>(
    serializer: S,
    list: &[(K, V)],
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(list.len()))?;
    for (key, value) in list {
        map.serialize_entry(key, value)?;
    }
    map.end()
}

/// The msgpack bytes of a record.
///
/// # Errors
/// None that a record can cause: its maps have known sizes and its values are texts.
pub fn pack(record: &impl Serialize) -> Result<Vec<u8>, rmp_serde::encode::Error> {
    rmp_serde::to_vec(record)
}
