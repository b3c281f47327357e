//! From any serialisable type to a [`Value`], and from a [`Value`] to any serde format.
//!
//! A reply struct becomes a map in field order. The other way is for people and tools (JSON on the
//! command line): rich kinds are written plainly, as the reader in `deserialize` describes.

use serde::ser::{self, Serialize};

use super::deserialize::ConversionError;
use super::value::Value;

/// Converts any serialisable value. Bytes need `serde_bytes` to become a bin.
///
/// # Errors
/// The value has no form in msgpack.
pub fn to_value<T: Serialize + ?Sized>(value: &T) -> Result<Value, ConversionError> {
    value.serialize(ToValue)
}

impl Serialize for Value {
    fn serialize<S: ser::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Nil => serializer.serialize_unit(),
            Self::Bool(flag) => serializer.serialize_bool(*flag),
            Self::Int(number) => serializer.serialize_i64(*number),
            Self::UInt(number) => serializer.serialize_u64(*number),
            Self::Float(number) => serializer.serialize_f64(*number),
            Self::Str(text)
            | Self::Decimal(text)
            | Self::Path(text)
            | Self::PurePath(text)
            | Self::AutoDirectoryPath(text) => serializer.serialize_str(text),
            Self::Bin(bytes) | Self::Ext(_, bytes) => serializer.serialize_bytes(bytes),
            Self::Array(items) => serializer.collect_seq(items),
            Self::Map(pairs) => {
                serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
            }
            Self::Uuid(uuid) => serializer.collect_str(&uuid.hyphenated()),
            Self::DateTime(at) => serializer.collect_str(at),
            Self::Enum { value, .. } => value.serialize(serializer),
            Self::ImageRef(image) => image.serialize(serializer),
            Self::ResourceSlot(slots) => {
                serializer.collect_map(slots.iter().map(|(slot, amount)| (slot, amount)))
            }
            Self::BinarySize(size) => match (i64::try_from(*size), u64::try_from(*size)) {
                (Ok(size), _) => serializer.serialize_i64(size),
                (_, Ok(size)) => serializer.serialize_u64(size),
                _ => serializer.serialize_i128(*size),
            },
        }
    }
}

struct ToValue;

/// Collects the parts of a compound.
#[derive(Debug, Default)]
pub(super) struct Parts {
    variant: Option<&'static str>,
    items: Vec<Value>,
    pairs: Vec<(Value, Value)>,
    key: Option<Value>,
}

impl Parts {
    fn of(variant: Option<&'static str>) -> Self {
        Self {
            variant,
            ..Self::default()
        }
    }

    fn tagged(variant: Option<&'static str>, value: Value) -> Value {
        match variant {
            Some(variant) => Value::map([(variant, value)]),
            None => value,
        }
    }

    fn into_array(self) -> Value {
        Self::tagged(self.variant, Value::Array(self.items))
    }

    fn into_map(self) -> Value {
        Self::tagged(self.variant, Value::Map(self.pairs))
    }

    fn item<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<(), ConversionError> {
        self.items.push(to_value(item)?);
        Ok(())
    }

    fn field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), ConversionError> {
        self.pairs.push((name.into(), to_value(value)?));
        Ok(())
    }
}

impl ser::Serializer for ToValue {
    type Ok = Value;
    type Error = ConversionError;
    type SerializeSeq = Parts;
    type SerializeTuple = Parts;
    type SerializeTupleStruct = Parts;
    type SerializeTupleVariant = Parts;
    type SerializeMap = Parts;
    type SerializeStruct = Parts;
    type SerializeStructVariant = Parts;

    fn serialize_bool(self, flag: bool) -> Result<Value, ConversionError> {
        Ok(flag.into())
    }

    fn serialize_i8(self, number: i8) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_i16(self, number: i16) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_i32(self, number: i32) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_i64(self, number: i64) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_i128(self, number: i128) -> Result<Value, ConversionError> {
        i64::try_from(number)
            .map(Into::into)
            .or_else(|_| u64::try_from(number).map(Into::into))
            .map_err(|_| ser::Error::custom("an integer beyond 64 bits can't be sent"))
    }

    fn serialize_u8(self, number: u8) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_u16(self, number: u16) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_u32(self, number: u32) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_u64(self, number: u64) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_f32(self, number: f32) -> Result<Value, ConversionError> {
        Ok(f64::from(number).into())
    }

    fn serialize_f64(self, number: f64) -> Result<Value, ConversionError> {
        Ok(number.into())
    }

    fn serialize_char(self, letter: char) -> Result<Value, ConversionError> {
        Ok(letter.to_string().into())
    }

    fn serialize_str(self, text: &str) -> Result<Value, ConversionError> {
        Ok(text.into())
    }

    fn serialize_bytes(self, bytes: &[u8]) -> Result<Value, ConversionError> {
        Ok(Value::Bin(bytes.to_vec().into()))
    }

    fn serialize_none(self) -> Result<Value, ConversionError> {
        Ok(Value::Nil)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Value, ConversionError> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<Value, ConversionError> {
        Ok(Value::Nil)
    }

    fn serialize_unit_struct(self, _name: &'static str) -> Result<Value, ConversionError> {
        Ok(Value::Nil)
    }

    fn serialize_unit_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
    ) -> Result<Value, ConversionError> {
        Ok(variant.into())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        value: &T,
    ) -> Result<Value, ConversionError> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Value, ConversionError> {
        Ok(Value::map([(variant, to_value(value)?)]))
    }

    fn serialize_seq(self, _length: Option<usize>) -> Result<Parts, ConversionError> {
        Ok(Parts::default())
    }

    fn serialize_tuple(self, _length: usize) -> Result<Parts, ConversionError> {
        Ok(Parts::default())
    }

    fn serialize_tuple_struct(
        self,
        _name: &'static str,
        _length: usize,
    ) -> Result<Parts, ConversionError> {
        Ok(Parts::default())
    }

    fn serialize_tuple_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        _length: usize,
    ) -> Result<Parts, ConversionError> {
        Ok(Parts::of(Some(variant)))
    }

    fn serialize_map(self, _length: Option<usize>) -> Result<Parts, ConversionError> {
        Ok(Parts::default())
    }

    fn serialize_struct(
        self,
        _name: &'static str,
        _length: usize,
    ) -> Result<Parts, ConversionError> {
        Ok(Parts::default())
    }

    fn serialize_struct_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
        _length: usize,
    ) -> Result<Parts, ConversionError> {
        Ok(Parts::of(Some(variant)))
    }
}

impl ser::SerializeSeq for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_element<T: Serialize + ?Sized>(
        &mut self,
        item: &T,
    ) -> Result<(), ConversionError> {
        self.item(item)
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_array())
    }
}

impl ser::SerializeTuple for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_element<T: Serialize + ?Sized>(
        &mut self,
        item: &T,
    ) -> Result<(), ConversionError> {
        self.item(item)
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_array())
    }
}

impl ser::SerializeTupleStruct for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<(), ConversionError> {
        self.item(item)
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_array())
    }
}

impl ser::SerializeTupleVariant for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<(), ConversionError> {
        self.item(item)
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_array())
    }
}

impl ser::SerializeMap for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), ConversionError> {
        self.key = Some(to_value(key)?);
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), ConversionError> {
        let key = self.key.take().unwrap_or(Value::Nil);
        self.pairs.push((key, to_value(value)?));
        Ok(())
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_map())
    }
}

impl ser::SerializeStruct for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), ConversionError> {
        self.field(name, value)
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_map())
    }
}

impl ser::SerializeStructVariant for Parts {
    type Ok = Value;
    type Error = ConversionError;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), ConversionError> {
        self.field(name, value)
    }

    fn end(self) -> Result<Value, ConversionError> {
        Ok(self.into_map())
    }
}

#[cfg(test)]
mod tests {
    use serde::Serialize;

    use super::super::deserialize::from_value;
    use super::*;

    #[derive(Serialize)]
    struct Port {
        name: &'static str,
        container_ports: Vec<u16>,
        #[serde(with = "serde_bytes")]
        raw: Vec<u8>,
        missing: Option<bool>,
        uuid: uuid::Uuid,
        inner: Value,
    }

    #[test]
    fn a_struct_becomes_a_map_in_field_order() {
        let port = Port {
            name: "ttyd",
            container_ports: vec![7681],
            raw: vec![1, 2],
            missing: None,
            uuid: uuid::Uuid::from_u128(1),
            inner: Value::map([("k", 1_u64)]),
        };
        let value = to_value(&port).unwrap();
        let expected = Value::map([
            ("name", "ttyd".into()),
            ("container_ports", Value::array([7681])),
            ("raw", Value::Bin(vec![1, 2].into())),
            ("missing", Value::Nil),
            ("uuid", "00000000-0000-0000-0000-000000000001".into()),
            ("inner", Value::map([("k", 1)])),
        ]);
        assert_eq!(value, expected);
    }

    #[test]
    fn values_print_as_json() {
        let value = Value::map([
            ("id", Value::Uuid(uuid::Uuid::from_u128(2))),
            ("size", Value::BinarySize(3)),
            ("list", Value::array([Value::Nil, 1.5.into()])),
        ]);
        assert_eq!(
            serde_json::to_string(&value).unwrap(),
            r#"{"id":"00000000-0000-0000-0000-000000000002","size":3,"list":[null,1.5]}"#
        );
        let back: Value = serde_json::from_str(r#"{"a":[1,"x",null]}"#).unwrap();
        assert_eq!(
            back,
            Value::map([("a", Value::array([1.into(), "x".into(), Value::Nil]))])
        );
        assert_eq!(from_value::<Value>(back.clone()), Ok(back));
    }
}
