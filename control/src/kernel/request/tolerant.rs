//! Readers for values that arrive in more than one form.

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Unexpected, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// A value, or its default for null.
pub(super) fn null_default<'de, D, T>(source: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(source)?.unwrap_or_default())
}

/// A list, or an empty one for null.
pub(super) fn list<'de, D, T>(source: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::<Vec<T>>::deserialize(source)?.unwrap_or_default())
}

/// Text from text, a number, a boolean, or null (empty).
pub(super) fn text<'de, D: Deserializer<'de>>(source: D) -> Result<String, D::Error> {
    Ok(optional_text(source)?.unwrap_or_default())
}

/// Text from text, a number or a boolean; nothing for null.
pub(super) fn optional_text<'de, D: Deserializer<'de>>(
    source: D,
) -> Result<Option<String>, D::Error> {
    source.deserialize_any(TextVisitor)
}

/// One text of a map or list.
pub(super) struct Text(pub Option<String>);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        optional_text(source).map(Text)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text, a number, a boolean or null")
    }
    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Some(value.to_owned()))
    }
    fn visit_string<E: Error>(self, value: String) -> Result<Self::Value, E> {
        Ok(Some(value))
    }
    fn visit_bytes<E: Error>(self, value: &[u8]) -> Result<Self::Value, E> {
        let value = std::str::from_utf8(value)
            .map_err(|_| E::invalid_value(Unexpected::Bytes(value), &self))?;
        Ok(Some(value.to_owned()))
    }
    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }
    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }
    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }
    fn visit_i128<E: Error>(self, value: i128) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }
    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
    fn visit_some<D: Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
        source.deserialize_any(self)
    }
}

/// A yes or no: a boolean, a number, or one of the usual words; null is no.
pub(super) fn truth<'de, D: Deserializer<'de>>(source: D) -> Result<bool, D::Error> {
    let Some(written) = optional_text(source)? else {
        return Ok(false);
    };
    match written.trim().to_ascii_lowercase().as_str() {
        "" | "false" | "0" | "no" | "off" => Ok(false),
        "true" | "1" | "yes" | "on" => Ok(true),
        other => Err(D::Error::invalid_value(
            Unexpected::Str(other),
            &"true or false",
        )),
    }
}

/// A JSON number as a whole number of at least zero.
pub(super) fn whole_number(number: &serde_json::Number) -> Option<u64> {
    number.as_u64().or_else(|| {
        let float = number.as_f64()?;
        // Above 2^53 a float no longer says which number was meant.
        let whole = (0.0..=9_007_199_254_740_992.0).contains(&float) && float.fract() == 0.0;
        whole.then(|| format!("{float:.0}").parse().ok())?
    })
}

/// Whole numbers from a number or its text.
pub(super) mod whole {
    use super::*;

    pub(in super::super) fn optional<'de, D, N>(source: D) -> Result<Option<N>, D::Error>
    where
        D: Deserializer<'de>,
        N: TryFrom<i64>,
    {
        match optional_text(source)? {
            Some(written) if !written.trim().is_empty() => parse(&written).map(Some),
            _ => Ok(None),
        }
    }

    pub(in super::super) fn or_zero<'de, D, N>(source: D) -> Result<N, D::Error>
    where
        D: Deserializer<'de>,
        N: TryFrom<i64> + Default,
    {
        Ok(optional(source)?.unwrap_or_default())
    }

    pub(in super::super) fn list<'de, D, N>(source: D) -> Result<Vec<N>, D::Error>
    where
        D: Deserializer<'de>,
        N: TryFrom<i64>,
    {
        source.deserialize_any(Numbers(PhantomData))
    }

    struct Numbers<N>(PhantomData<N>);

    impl<'de, N: TryFrom<i64>> Visitor<'de> for Numbers<N> {
        type Value = Vec<N>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of whole numbers, or null")
        }
        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }
        fn visit_none<E: Error>(self) -> Result<Self::Value, E> {
            Ok(Vec::new())
        }
        fn visit_some<D: Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
            source.deserialize_any(self)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
            let mut numbers = Vec::new();
            while let Some(Text(item)) = items.next_element()? {
                numbers.push(parse(item.as_deref().unwrap_or_default())?);
            }
            Ok(numbers)
        }
    }

    fn parse<N: TryFrom<i64>, E: Error>(written: &str) -> Result<N, E> {
        let trimmed = written.trim();
        // "1000.0" is how a float column prints a whole number.
        let digits = trimmed.strip_suffix(".0").unwrap_or(trimmed);
        digits
            .parse::<i64>()
            .ok()
            .and_then(|number| N::try_from(number).ok())
            .ok_or_else(|| E::invalid_value(Unexpected::Str(written), &"a whole number in range"))
    }
}

/// The comparable form of an enumeration's text: `SINGLE_NODE` and `single-node` are one.
pub(super) fn folded(written: &str) -> String {
    written.trim().to_ascii_lowercase().replace('_', "-")
}

/// An enumeration that is one text on the wire, compared without case and with `_` as `-`.
macro_rules! text_enum {
    ($(#[$doc:meta])* pub enum $name:ident { $($(#[$mark:ident])? $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub enum $name { $($(#[$mark])? $variant),+ }

        impl $name {
            /// The text of this value on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// Reads the text, whatever its case.
            pub fn from_text(written: &str) -> Option<Self> {
                match $crate::kernel::request::tolerant::folded(written).as_str() {
                    $($text => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, sink: S) -> Result<S::Ok, S::Error> {
                sink.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
                let written = $crate::kernel::request::tolerant::text(source)?;
                Self::from_text(&written).ok_or_else(|| {
                    serde::de::Error::unknown_variant(&written, &[$($text),+])
                })
            }
        }
    };
}
pub(super) use text_enum;
