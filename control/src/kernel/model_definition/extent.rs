//! How much a definition holds once its aliases are put in their places.
//!
//! In: the text of a file. Out: whether it may be read into memory. Invariant: the look keeps nothing,
//! and ends soon after a limit is passed.

use std::cell::Cell;
use std::fmt;
use std::time::{Duration, Instant};

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor,
};

/// Bytes of text, each alias counted with what it stands for.
const TEXT: usize = 1 << 20;
/// Values: texts, keys, numbers, lists, maps.
const VALUES: usize = 100_000;
/// How long the look may take. Numbers are counted whatever their length, and long ones take their time.
const TIME: Duration = Duration::from_secs(2);

/// Whether a definition is small enough to be read.
///
/// # Errors
/// It is no YAML, or holds more than it may.
pub(super) fn check(text: &[u8]) -> Result<(), serde_yaml_ng::Error> {
    within(text, TIME)
}

pub(super) fn within(text: &[u8], time: Duration) -> Result<(), serde_yaml_ng::Error> {
    let count = Count {
        text: Cell::new(0),
        values: Cell::new(0),
        until: Instant::now() + time,
    };
    (&count).deserialize(serde_yaml_ng::Deserializer::from_slice(text))
}

struct Count {
    text: Cell<usize>,
    values: Cell<usize>,
    until: Instant,
}

impl Count {
    fn value<E: Error>(&self, text: usize) -> Result<(), E> {
        self.values.set(self.values.get().saturating_add(1));
        self.text.set(self.text.get().saturating_add(text));
        let what = if self.text.get() > TEXT {
            "more than 1 MiB of text"
        } else if self.values.get() > VALUES {
            "more than 100000 values"
        } else if Instant::now() >= self.until {
            "more than can be read in 2 s"
        } else {
            return Ok(());
        };
        Err(E::custom(format_args!(
            "with its aliases it holds {what}; make it smaller"
        )))
    }
}

impl<'de> DeserializeSeed<'de> for &Count {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &Count {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        self.value(0)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        self.value(0)
    }

    fn visit_i128<E: Error>(self, _: i128) -> Result<(), E> {
        self.value(0)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        self.value(0)
    }

    fn visit_u128<E: Error>(self, _: u128) -> Result<(), E> {
        self.value(0)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        self.value(0)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.value(text.len())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        self.value(0)
    }

    fn visit_none<E: Error>(self) -> Result<(), E> {
        self.value(0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.value(0)?;
        while items.next_element_seed(self)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.value(0)?;
        while entries.next_entry_seed(self, self)?.is_some() {}
        Ok(())
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<(), A::Error> {
        let ((), value) = tagged.variant_seed(self)?;
        value.newtype_variant_seed(self)
    }
}
