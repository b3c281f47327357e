//! The values that travel in request and reply bodies.
//!
//! [`Value`] is what the manager's msgpack dialect can say, with Python's rich types (UUID, enum,
//! image reference, ...) as variants of their own. Decoding and encoding live in
//! [`super::msgpack`], the bridge to typed structs in [`super::from_value`] and
//! [`super::to_value`]. Invariant: a `UInt` holds only what does not fit `Int`.

use bytes::Bytes;
use uuid::Uuid;

use super::msgpack::{self, DecodeError, EncodeError};
use super::temporenc::DateTime;

/// One value of a request or reply body.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Python's `None`.
    Nil,
    /// A truth value.
    Bool(bool),
    /// An integer within 64 signed bits.
    Int(i64),
    /// An integer above `i64::MAX`.
    UInt(u64),
    /// A 64-bit float.
    Float(f64),
    /// UTF-8 text.
    Str(String),
    /// Raw bytes.
    Bin(Bytes),
    /// A list or tuple; the wire does not tell them apart.
    Array(Vec<Value>),
    /// A mapping in wire order; keys may be of any kind.
    Map(Vec<(Value, Value)>),
    /// Ext 1.
    Uuid(Uuid),
    /// Ext 2.
    DateTime(DateTime),
    /// Ext 3: a `decimal.Decimal` as Python prints it (`1`, `0.25`, `1E+3`, `NaN`).
    Decimal(String),
    /// Ext 4: an absolute or relative path of the sender's filesystem.
    Path(String),
    /// Ext 5: a path without a filesystem.
    PurePath(String),
    /// Ext 17: a path the original creates as a directory on reading.
    AutoDirectoryPath(String),
    /// Ext 6: an enum member.
    Enum {
        /// `module:ClassName`, for example `ai.backend.common.types:SessionTypes`.
        class: String,
        /// The member's value: text, or an integer.
        value: Box<Value>,
    },
    /// Ext 7.
    ImageRef(Box<ImageRef>),
    /// Ext 8: slot names with amounts as decimal text (or text with a unit, as the sender had it).
    ResourceSlot(Vec<(String, String)>),
    /// Ext 16: a byte count.
    BinarySize(i128),
    /// Any other ext code, untouched.
    Ext(i8, Bytes),
}

/// A reference to a container image (`ai.backend.common.docker:ImageRef`).
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImageRef {
    /// Last part of the image path; empty when the path equals the project.
    pub name: String,
    /// Project part; may itself contain slashes.
    pub project: Option<String>,
    /// Tag without the colon.
    pub tag: String,
    /// Registry host, with port when it has one.
    pub registry: String,
    /// Architecture, for example `x86_64`.
    pub architecture: String,
    /// True when the image exists only on the node and is never pulled.
    pub is_local: bool,
}

impl ImageRef {
    /// Registry, project and name joined by slashes, then the tag.
    #[must_use]
    pub fn canonical(&self) -> String {
        let parts = [
            self.registry.as_str(),
            self.project.as_deref().unwrap_or_default(),
            self.name.as_str(),
        ];
        let path: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        format!("{}:{}", path.join("/"), self.tag)
    }
}

impl Value {
    /// Decodes one msgpack document that fills `bytes` completely, with default limits.
    ///
    /// # Errors
    /// It is not msgpack of the known dialect, beyond the limits, or something follows.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        msgpack::decode(bytes, &msgpack::DecodeLimits::default())
    }

    /// Encodes as one msgpack document, each item in its shortest form.
    ///
    /// # Errors
    /// It is nested too deeply, a part of it is too long, or a date or an enum in it has no form.
    pub fn encode(&self) -> Result<Vec<u8>, EncodeError> {
        msgpack::encode(self)
    }

    /// A map with text keys, in the given order.
    pub fn map<K: Into<String>, V: Into<Value>>(entries: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::Map(
            entries
                .into_iter()
                .map(|(key, value)| (Self::Str(key.into()), value.into()))
                .collect(),
        )
    }

    /// An array of anything that becomes a value.
    pub fn array<V: Into<Value>>(items: impl IntoIterator<Item = V>) -> Self {
        Self::Array(items.into_iter().map(Into::into).collect())
    }

    /// Text of a text-like value: str, or an enum member whose value is text.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text)
            | Self::Decimal(text)
            | Self::Path(text)
            | Self::PurePath(text)
            | Self::AutoDirectoryPath(text) => Some(text),
            Self::Enum { value, .. } => value.as_str(),
            _ => None,
        }
    }

    /// The integer, when it fits.
    #[must_use]
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            Self::BinarySize(number) => i64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// The bytes of a bin.
    #[must_use]
    pub fn as_bin(&self) -> Option<&Bytes> {
        match self {
            Self::Bin(bytes) => Some(bytes),
            _ => None,
        }
    }

    /// The items of an array.
    #[must_use]
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(items) => Some(items),
            _ => None,
        }
    }

    /// The pairs of a map.
    #[must_use]
    pub fn as_map(&self) -> Option<&[(Value, Value)]> {
        match self {
            Self::Map(pairs) => Some(pairs),
            _ => None,
        }
    }

    /// The value under a text-like key of a map; the last one wins, as in a Python dict.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.as_map()?
            .iter()
            .rev()
            .find(|(candidate, _)| candidate.as_str() == Some(key))
            .map(|(_, value)| value)
    }

    /// What a person calls this kind of value, in error texts.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool(_) => "bool",
            Self::Int(_) | Self::UInt(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Bin(_) => "bin",
            Self::Array(_) => "array",
            Self::Map(_) => "map",
            Self::Uuid(_) => "UUID",
            Self::DateTime(_) => "datetime",
            Self::Decimal(_) => "Decimal",
            Self::Path(_) | Self::PurePath(_) | Self::AutoDirectoryPath(_) => "path",
            Self::Enum { .. } => "enum",
            Self::ImageRef(_) => "ImageRef",
            Self::ResourceSlot(_) => "ResourceSlot",
            Self::BinarySize(_) => "BinarySize",
            Self::Ext(..) => "ext",
        }
    }
}

impl From<()> for Value {
    fn from((): ()) -> Self {
        Self::Nil
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

macro_rules! from_small_integers {
    ($($kind:ty),*) => {$(
        impl From<$kind> for Value {
            fn from(value: $kind) -> Self {
                Self::Int(i64::from(value))
            }
        }
    )*};
}
from_small_integers!(i8, i16, i32, i64, u8, u16, u32);

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        i64::try_from(value).map_or(Self::UInt(value), Self::Int)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<&str> for Value {
    fn from(value: &str) -> Self {
        Self::Str(value.to_owned())
    }
}

impl From<String> for Value {
    fn from(value: String) -> Self {
        Self::Str(value)
    }
}

impl From<Bytes> for Value {
    fn from(value: Bytes) -> Self {
        Self::Bin(value)
    }
}

impl From<Uuid> for Value {
    fn from(value: Uuid) -> Self {
        Self::Uuid(value)
    }
}

impl From<ImageRef> for Value {
    fn from(value: ImageRef) -> Self {
        Self::ImageRef(Box::new(value))
    }
}

impl From<Vec<Value>> for Value {
    fn from(value: Vec<Value>) -> Self {
        Self::Array(value)
    }
}

impl<V: Into<Value>> From<Option<V>> for Value {
    fn from(value: Option<V>) -> Self {
        value.map_or(Self::Nil, Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_name_leaves_out_empty_parts() {
        let mut image = ImageRef {
            name: "python".into(),
            project: Some("stable/sub".into()),
            tag: "3.9".into(),
            registry: "registry.example".into(),
            architecture: "x86_64".into(),
            is_local: false,
        };
        assert_eq!(image.canonical(), "registry.example/stable/sub/python:3.9");
        image.name.clear();
        assert_eq!(image.canonical(), "registry.example/stable/sub:3.9");
        image.name = "python".into();
        image.project = None;
        assert_eq!(image.canonical(), "registry.example/python:3.9");
    }

    #[test]
    fn get_takes_the_last_of_equal_keys_and_reads_enum_keys() {
        let map = Value::Map(vec![
            ("a".into(), 1.into()),
            ("a".into(), 2.into()),
            (
                Value::Enum {
                    class: "m:LabelName".into(),
                    value: Box::new("k".into()),
                },
                3.into(),
            ),
        ]);
        assert_eq!(map.get("a"), Some(&Value::Int(2)));
        assert_eq!(map.get("k"), Some(&Value::Int(3)));
        assert_eq!(map.get("b"), None);
    }
}
