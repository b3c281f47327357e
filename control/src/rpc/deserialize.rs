//! From a [`Value`] to a typed struct, through serde.
//!
//! Rich values arrive as what a plain reader expects: UUID, enum, decimal, path and datetime as
//! text, byte counts as integers, image references and slots as maps. Optional fields accept nil.

use std::fmt;

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{self, DeserializeOwned, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;

use super::value::{ImageRef, Value};

/// Why a value does not fit a type.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConversionError(String);

impl de::Error for ConversionError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

impl serde::ser::Error for ConversionError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Converts a value into any deserialisable type.
///
/// # Errors
/// The value has another shape.
pub fn from_value<T: DeserializeOwned>(value: Value) -> Result<T, ConversionError> {
    T::deserialize(value)
}

impl IntoDeserializer<'_, ConversionError> for Value {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

fn image_pairs(image: ImageRef) -> Vec<(Value, Value)> {
    let map = Value::map([
        ("name", Value::Str(image.name)),
        ("project", image.project.into()),
        ("tag", image.tag.into()),
        ("registry", image.registry.into()),
        ("architecture", image.architecture.into()),
        ("is_local", image.is_local.into()),
    ]);
    match map {
        Value::Map(pairs) => pairs,
        _ => Vec::new(),
    }
}

fn visit_map<'de, V: Visitor<'de>>(
    pairs: Vec<(Value, Value)>,
    visitor: V,
) -> Result<V::Value, ConversionError> {
    let mut map = MapDeserializer::new(pairs.into_iter());
    let visited = visitor.visit_map(&mut map)?;
    map.end()?;
    Ok(visited)
}

impl<'de> de::Deserializer<'de> for Value {
    type Error = ConversionError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self {
            Self::Nil => visitor.visit_unit(),
            Self::Bool(flag) => visitor.visit_bool(flag),
            Self::Int(number) => visitor.visit_i64(number),
            Self::UInt(number) => visitor.visit_u64(number),
            Self::Float(number) => visitor.visit_f64(number),
            Self::Str(text)
            | Self::Decimal(text)
            | Self::Path(text)
            | Self::PurePath(text)
            | Self::AutoDirectoryPath(text) => visitor.visit_string(text),
            Self::Bin(bytes) => visitor.visit_byte_buf(bytes.into()),
            Self::Array(items) => {
                let mut items = SeqDeserializer::new(items.into_iter());
                let visited = visitor.visit_seq(&mut items)?;
                items.end()?;
                Ok(visited)
            }
            Self::Map(pairs) => visit_map(pairs, visitor),
            Self::Uuid(uuid) => visitor.visit_string(uuid.hyphenated().to_string()),
            Self::DateTime(at) => visitor.visit_string(at.to_string()),
            Self::Enum { value, .. } => value.deserialize_any(visitor),
            Self::ImageRef(image) => visit_map(image_pairs(*image), visitor),
            Self::ResourceSlot(slots) => {
                let pairs = slots
                    .into_iter()
                    .map(|(slot, amount)| (slot.into(), amount.into()));
                visit_map(pairs.collect(), visitor)
            }
            Self::BinarySize(size) => match (i64::try_from(size), u64::try_from(size)) {
                (Ok(size), _) => visitor.visit_i64(size),
                (_, Ok(size)) => visitor.visit_u64(size),
                _ => visitor.visit_i128(size),
            },
            Self::Ext(_, payload) => visitor.visit_byte_buf(payload.into()),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        match self {
            Self::Nil => visitor.visit_none(),
            some => visitor.visit_some(some),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        match self {
            Self::Str(text) => visitor.visit_enum(text.into_deserializer()),
            Self::Enum { value, .. } => match *value {
                Self::Str(text) => visitor.visit_enum(text.into_deserializer()),
                other => Err(de::Error::invalid_type(
                    Unexpected::Other(other.kind()),
                    &visitor,
                )),
            },
            Self::Map(pairs) => visitor.visit_enum(de::value::MapAccessDeserializer::new(
                MapDeserializer::new(pairs.into_iter()),
            )),
            other => Err(de::Error::invalid_type(
                Unexpected::Other(other.kind()),
                &visitor,
            )),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string
        bytes byte_buf unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}

impl<'de> de::Deserialize<'de> for Value {
    /// From any self-describing format; rich kinds are lost on the way.
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PlainVisitor)
    }
}

struct PlainVisitor;

impl<'de> Visitor<'de> for PlainVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: de::Error>(self, flag: bool) -> Result<Value, E> {
        Ok(flag.into())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_i128<E: de::Error>(self, number: i128) -> Result<Value, E> {
        Ok(Value::BinarySize(number))
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Value, E> {
        Ok(number.into())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Value, E> {
        Ok(Value::Bin(bytes.to_vec().into()))
    }

    fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Value, E> {
        Ok(Value::Bin(bytes.into()))
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Nil)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        Ok(Value::Nil)
    }

    fn visit_some<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_newtype_struct<D: de::Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Value::Map(pairs))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;
    use uuid::Uuid;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Mode {
        SingleNode,
        Digest,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Typed {
        id: Uuid,
        text_id: String,
        mode: Mode,
        pull: Mode,
        timeout: Option<f64>,
        late: Option<f64>,
        size: u64,
        slots: BTreeMap<String, String>,
        image: ImageRef,
        pair: (String, u16),
        #[serde(with = "serde_bytes")]
        payload: Vec<u8>,
        #[serde(default)]
        absent: bool,
        anything: Value,
    }

    #[test]
    fn rich_values_become_typed_fields() {
        let id = Uuid::from_u128(7);
        let image = ImageRef {
            name: "python".into(),
            project: None,
            tag: "3".into(),
            registry: "r".into(),
            architecture: "x86_64".into(),
            is_local: false,
        };
        let member = |value: &str| Value::Enum {
            class: "m:C".into(),
            value: Box::new(value.into()),
        };
        let value = Value::map([
            ("id", Value::Uuid(id)),
            ("text_id", Value::Uuid(id)),
            ("mode", "single-node".into()),
            ("pull", member("digest")),
            ("timeout", 2.into()),
            ("late", Value::Nil),
            ("size", Value::BinarySize(1 << 40)),
            (
                "slots",
                Value::ResourceSlot(vec![("cpu".into(), "2".into())]),
            ),
            ("image", image.clone().into()),
            ("pair", Value::array(["h".into(), Value::Int(6001)])),
            ("payload", Value::Bin(vec![0, 255].into())),
            ("anything", Value::map([("deep", Value::array([1, 2]))])),
            ("unknown key", Value::Nil),
        ]);
        let typed: Typed = from_value(value).unwrap();
        assert_eq!(typed.id, id);
        assert_eq!(typed.text_id, id.to_string());
        assert_eq!((typed.mode, typed.pull), (Mode::SingleNode, Mode::Digest));
        assert_eq!((typed.timeout, typed.late), (Some(2.0), None));
        assert_eq!(typed.size, 1 << 40);
        assert_eq!(typed.slots["cpu"], "2");
        assert_eq!(typed.image, image);
        assert_eq!(typed.pair, ("h".into(), 6001));
        assert_eq!(typed.payload, [0, 255]);
        assert!(!typed.absent);
        assert_eq!(typed.anything.get("deep"), Some(&Value::array([1, 2])));
    }

    #[test]
    fn a_misfit_says_what_was_expected() {
        let err = from_value::<u16>(Value::Int(-1)).unwrap_err();
        assert!(err.to_string().contains("u16"), "{err}");
        let err = from_value::<bool>("x".into()).unwrap_err();
        assert!(err.to_string().contains("boolean"), "{err}");
    }
}
