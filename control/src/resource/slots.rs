//! Requested and announced amounts per slot.

use rust_decimal::Decimal;

use super::ResourceError;
use crate::kernel::request::TextMap;

/// An amount of a slot: exact, never a float.
pub type Amount = Decimal;

/// Largest amount accepted: an exabyte is 1.2e18, and sums over thousands of devices still fit the
/// 28 digits of the arithmetic.
const LARGEST: Decimal = Decimal::from_parts(0x6310_0000, 0x6bc7_5e2d, 5, false, 0);

/// What the amounts of a slot count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotType {
    /// Things, whole or in parts.
    Count,
    /// Bytes.
    Bytes,
    /// Exactly one per request.
    Unique,
}

impl SlotType {
    /// The word the manager knows.
    pub fn word(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::Bytes => "bytes",
            Self::Unique => "unique",
        }
    }

    /// What a slot of an accelerator counts, by its name alone: parts of devices are asked for one by
    /// one.
    pub fn of_devices(slot: &str) -> Self {
        match slot.contains(".device:") && slot.ends_with("-mig") {
            true => Self::Unique,
            false => Self::Count,
        }
    }
}

/// Slot name to amount, in the order given; each name once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Slots(Vec<(String, Amount)>);

impl Slots {
    /// No slots.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads amounts as the manager writes them: decimal text, or a size such as `2g`.
    ///
    /// # Errors
    /// `InvalidResourceArgument` for text that is no amount, below zero, or absurdly large.
    pub fn from_text<'a>(
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, ResourceError> {
        let mut slots = Self::new();
        for (name, text) in pairs {
            slots.set(name, amount(name, text)?);
        }
        Ok(slots)
    }

    /// The amount of a slot, if it is named.
    pub fn get(&self, name: &str) -> Option<Amount> {
        self.0
            .iter()
            .find(|(slot, _)| slot == name)
            .map(|(_, amount)| *amount)
    }

    /// Sets an amount; a name that is there keeps its place.
    pub fn set(&mut self, name: &str, amount: Amount) {
        match self.0.iter_mut().find(|(slot, _)| slot == name) {
            Some(entry) => entry.1 = amount,
            None => self.0.push((name.to_owned(), amount)),
        }
    }

    /// Name and amount, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Amount)> {
        self.0.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    /// Amounts as plain decimal text, as in `SLOTS` of `resource.txt`.
    pub fn to_text(&self) -> TextMap {
        self.0
            .iter()
            .map(|(name, amount)| (name.as_str(), text(*amount)))
            .collect()
    }
}

/// An amount as the shortest plain decimal text.
pub(super) fn text(amount: Amount) -> String {
    amount.normalize().to_string()
}

pub(super) fn amount(slot: &str, written: &str) -> Result<Amount, ResourceError> {
    let refuse =
        |why: &str| ResourceError::argument(format!("the amount {written:?} of {slot} {why}"));
    let trimmed = written.trim();
    let parsed = match trimmed.chars().last() {
        Some(last) if last.is_ascii_alphabetic() => {
            crate::kernel::resource_text::parse_binary_size(trimmed).map(Decimal::from)
        }
        _ => trimmed
            .parse()
            .or_else(|_| Decimal::from_scientific(trimmed))
            .ok(),
    };
    match parsed {
        None => Err(refuse("is not a number")),
        Some(amount) if amount.is_sign_negative() && !amount.is_zero() => {
            Err(refuse("is below zero"))
        }
        Some(amount) if amount > LARGEST => Err(refuse("is larger than any node")),
        Some(amount) => Ok(amount),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_largest_amount_is_ten_to_the_twentieth() {
        assert_eq!(LARGEST.to_string(), "100000000000000000000");
    }

    #[test]
    fn amounts_are_read_as_the_manager_writes_them() {
        for (text, expected) in [
            ("2", "2"),
            ("2147483648", "2147483648"),
            ("2g", "2147483648"),
            ("0.50", "0.50"),
            ("1.5GiB", "1610612736"),
            ("1E+3", "1000"),
            ("0", "0"),
            ("-0", "0"),
        ] {
            let slots = Slots::from_text([("x", text)]).unwrap();
            assert_eq!(slots.get("x"), Some(expected.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused_by_class() {
        for text in [
            "",
            "x",
            "-1",
            "NaN",
            "Infinity",
            "1e40",
            "999999999999999999999",
            "1 2",
            "inf",
        ] {
            let err = Slots::from_text([("cpu", text)]).unwrap_err();
            assert_eq!(err.class(), "InvalidResourceArgument", "{text}");
            assert!(err.to_string().contains("cpu"), "{err}");
        }
    }

    #[test]
    fn order_is_kept_and_a_later_amount_wins() {
        let slots = Slots::from_text([("mem", "1g"), ("cpu", "1"), ("mem", "2g")]).unwrap();
        let names: Vec<_> = slots.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["mem", "cpu"]);
        assert_eq!(slots.to_text().get("mem"), Some("2147483648"));
    }

    proptest! {
        #[test]
        fn reading_an_amount_never_panics(text in "\\PC{0,40}") {
            let _ = Slots::from_text([("x", text.as_str())]);
        }

        #[test]
        fn numbers_never_panic(text in "-?[0-9]{0,40}\\.?[0-9]{0,40}([eE][+-]?[0-9]{1,5})?[kmgtpe]?") {
            let _ = Slots::from_text([("x", text.as_str())]);
        }
    }
}
