//! The msgpack dialect of request and reply bodies.
//!
//! In: bytes of a peer; out: a [`Value`], and back. Byte strings are slices of the message, not
//! copies. Invariant: decoding never panics, never recurses deeper than
//! [`DecodeLimits::depth`], never makes more values than [`DecodeLimits::values`], and reserves no
//! memory on the word of a length field.

use bytes::Bytes;
use uuid::Uuid;

use super::pickle::{self, EnumValue, PickleError};
use super::temporenc::{DateTime, TemporencError};
use super::value::Value;

/// Ext codes of the dialect.
mod ext {
    pub(super) const UUID: i8 = 1;
    pub(super) const DATETIME: i8 = 2;
    pub(super) const DECIMAL: i8 = 3;
    pub(super) const POSIX_PATH: i8 = 4;
    pub(super) const PURE_POSIX_PATH: i8 = 5;
    pub(super) const ENUM: i8 = 6;
    pub(super) const IMAGE_REF: i8 = 7;
    pub(super) const RESOURCE_SLOT: i8 = 8;
    pub(super) const BINARY_SIZE: i8 = 16;
    pub(super) const AUTO_DIRECTORY_PATH: i8 = 17;
}

/// Bounds of one decoding.
#[derive(Clone, Copy, Debug)]
pub struct DecodeLimits {
    /// Deepest nesting of arrays and maps.
    pub depth: usize,
    /// Most values in one document, counting every array item, map key and map value.
    pub values: usize,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        // Real requests nest about 8 deep and hold some thousand values. A million values take
        // about 50 MB.
        Self {
            depth: 96,
            values: 1_000_000,
        }
    }
}

/// Why bytes are not a document of the dialect.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The document ends early.
    #[error("the msgpack document ends early")]
    Truncated,
    /// Bytes after the document.
    #[error("bytes follow the msgpack document")]
    Trailing,
    /// The reserved byte 0xc1.
    #[error("byte 0xc1 is not msgpack")]
    Reserved,
    /// Text that is not UTF-8.
    #[error("text in the msgpack document is not UTF-8")]
    Text,
    /// More nesting than allowed.
    #[error("the msgpack document is nested too deeply")]
    Depth,
    /// More values than allowed.
    #[error("the msgpack document has too many values")]
    Values,
    /// An ext 1 that is not 16 bytes.
    #[error("a UUID of wrong length")]
    Uuid,
    /// An ext 2 that is no datetime.
    #[error("a broken datetime")]
    DateTime(#[source] TemporencError),
    /// A pickle that was refused.
    #[error("a broken pickle in ext {code}")]
    Pickle {
        /// The ext code.
        code: i8,
        /// Why.
        #[source]
        source: PickleError,
    },
}

/// Why a value can't be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// Nested deeper than readers accept.
    #[error("the value is nested too deeply to be sent")]
    Depth,
    /// A text, byte string or collection of more than 2^32 - 1 items.
    #[error("a part of the value is too long to be sent")]
    Length,
    /// A datetime outside the years 1 to 4094.
    #[error("a datetime that can't be sent")]
    DateTime(#[source] TemporencError),
    /// An enum whose class is not `module:Name`, or whose value is neither text nor int.
    #[error("an enum that can't be sent")]
    Enum,
}

/// Deepest nesting that is written; msgpack readers in Python stop at 1024.
const MAX_ENCODE_DEPTH: usize = 512;

/// Decodes one document that fills `bytes` completely.
///
/// # Errors
/// It is not msgpack of the known dialect, beyond the limits, or something follows.
pub fn decode(bytes: &Bytes, limits: &DecodeLimits) -> Result<Value, DecodeError> {
    let mut reader = Reader {
        bytes,
        at: 0,
        values_left: limits.values,
    };
    let value = reader.value(limits.depth)?;
    if reader.at == bytes.len() {
        Ok(value)
    } else {
        Err(DecodeError::Trailing)
    }
}

/// Decodes a document that is a map, and of it only the fields named; the others are checked and
/// dropped. Of equal keys the last counts. `None`: the document is no map.
pub(super) fn decode_fields<const N: usize>(
    bytes: &Bytes,
    limits: &DecodeLimits,
    names: [&str; N],
) -> Result<Option<[Option<Value>; N]>, DecodeError> {
    let mut reader = Reader {
        bytes,
        at: 0,
        values_left: limits.values,
    };
    let Some(length) = reader.map_head()? else {
        return decode(bytes, limits).map(|_| None);
    };
    let depth = limits.depth.checked_sub(1).ok_or(DecodeError::Depth)?;
    reader.reserve(length)?;
    let mut fields = [const { None }; N];
    for _ in 0..length {
        let place = reader.key(depth, &names)?;
        let value = reader.value(depth)?;
        if let Some(place) = place {
            fields[place] = Some(value);
        }
    }
    if reader.at == bytes.len() {
        Ok(Some(fields))
    } else {
        Err(DecodeError::Trailing)
    }
}

struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
    values_left: usize,
}

impl<'a> Reader<'a> {
    /// Length of the map that begins here; `None`, and nothing read, if something else does.
    fn map_head(&mut self) -> Result<Option<usize>, DecodeError> {
        let [marker] = self.take_array()?;
        let length = match marker {
            0x80..=0x8f => usize::from(marker & 0x0f),
            0xde | 0xdf => self.length(marker - 0xde + 1)?,
            _ => {
                self.at -= 1;
                return Ok(None);
            }
        };
        self.values_left = self.values_left.checked_sub(1).ok_or(DecodeError::Values)?;
        Ok(Some(length))
    }

    /// Reads a map's key: its place among the names.
    fn key(&mut self, depth: usize, names: &[&str]) -> Result<Option<usize>, DecodeError> {
        let find = |key: &str| names.iter().position(|name| *name == key);
        // Real keys are short texts; these need no copy.
        if let Some(marker @ 0xa0..=0xbf) = self.bytes.get(self.at) {
            self.values_left = self.values_left.checked_sub(1).ok_or(DecodeError::Values)?;
            self.at += 1;
            return Ok(find(self.str(usize::from(marker & 0x1f))?));
        }
        Ok(self.value(depth)?.as_str().and_then(find))
    }

    fn value(&mut self, depth: usize) -> Result<Value, DecodeError> {
        self.values_left = self.values_left.checked_sub(1).ok_or(DecodeError::Values)?;
        let [marker] = self.take_array()?;
        Ok(match marker {
            0x00..=0x7f => Value::Int(i64::from(marker)),
            0x80..=0x8f => self.map(usize::from(marker & 0x0f), depth)?,
            0x90..=0x9f => self.array(usize::from(marker & 0x0f), depth)?,
            0xa0..=0xbf => self.text(usize::from(marker & 0x1f))?,
            0xc0 => Value::Nil,
            0xc1 => return Err(DecodeError::Reserved),
            0xc2 => Value::Bool(false),
            0xc3 => Value::Bool(true),
            0xc4..=0xc6 => {
                let length = self.length(marker - 0xc4)?;
                Value::Bin(self.take(length)?)
            }
            0xc7..=0xc9 => {
                let length = self.length(marker - 0xc7)?;
                self.ext(length)?
            }
            0xca => Value::Float(f64::from(f32::from_be_bytes(self.take_array()?))),
            0xcb => Value::Float(f64::from_be_bytes(self.take_array()?)),
            0xcc => u8::from_be_bytes(self.take_array()?).into(),
            0xcd => u16::from_be_bytes(self.take_array()?).into(),
            0xce => u32::from_be_bytes(self.take_array()?).into(),
            0xcf => u64::from_be_bytes(self.take_array()?).into(),
            0xd0 => i8::from_be_bytes(self.take_array()?).into(),
            0xd1 => i16::from_be_bytes(self.take_array()?).into(),
            0xd2 => i32::from_be_bytes(self.take_array()?).into(),
            0xd3 => i64::from_be_bytes(self.take_array()?).into(),
            0xd4..=0xd8 => self.ext(1 << (marker - 0xd4))?,
            0xd9..=0xdb => {
                let length = self.length(marker - 0xd9)?;
                self.text(length)?
            }
            0xdc | 0xdd => {
                let length = self.length(marker - 0xdc + 1)?;
                self.array(length, depth)?
            }
            0xde | 0xdf => {
                let length = self.length(marker - 0xde + 1)?;
                self.map(length, depth)?
            }
            0xe0..=0xff => Value::Int(i64::from(i8::from_be_bytes([marker]))),
        })
    }

    /// A length field of 1, 2 or 4 bytes.
    fn length(&mut self, size_class: u8) -> Result<usize, DecodeError> {
        let length = match size_class {
            0 => u32::from(u8::from_be_bytes(self.take_array()?)),
            1 => u32::from(u16::from_be_bytes(self.take_array()?)),
            _ => u32::from_be_bytes(self.take_array()?),
        };
        usize::try_from(length).map_err(|_| DecodeError::Truncated)
    }

    /// Where the next `length` bytes are; they count as read.
    fn range(&mut self, length: usize) -> Result<std::ops::Range<usize>, DecodeError> {
        let end = self.at.checked_add(length).ok_or(DecodeError::Truncated)?;
        if end > self.bytes.len() {
            return Err(DecodeError::Truncated);
        }
        Ok(std::mem::replace(&mut self.at, end)..end)
    }

    fn take(&mut self, length: usize) -> Result<Bytes, DecodeError> {
        let range = self.range(length)?;
        Ok(self.bytes.slice(range))
    }

    fn str(&mut self, length: usize) -> Result<&'a str, DecodeError> {
        let range = self.range(length)?;
        std::str::from_utf8(&self.bytes[range]).map_err(|_| DecodeError::Text)
    }

    fn take_array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let rest = self.bytes.get(self.at..).ok_or(DecodeError::Truncated)?;
        let taken = *rest.first_chunk().ok_or(DecodeError::Truncated)?;
        self.at += N;
        Ok(taken)
    }

    fn text(&mut self, length: usize) -> Result<Value, DecodeError> {
        Ok(Value::Str(self.str(length)?.to_owned()))
    }

    /// How many items to reserve for: a length field costs a peer five bytes, memory costs us.
    fn reserve(&self, length: usize) -> Result<usize, DecodeError> {
        if length > self.bytes.len() - self.at {
            return Err(DecodeError::Truncated);
        }
        if length > self.values_left {
            return Err(DecodeError::Values);
        }
        Ok(length.min(1024))
    }

    fn array(&mut self, length: usize, depth: usize) -> Result<Value, DecodeError> {
        let depth = depth.checked_sub(1).ok_or(DecodeError::Depth)?;
        let mut items = Vec::with_capacity(self.reserve(length)?);
        for _ in 0..length {
            items.push(self.value(depth)?);
        }
        Ok(Value::Array(items))
    }

    fn map(&mut self, length: usize, depth: usize) -> Result<Value, DecodeError> {
        let depth = depth.checked_sub(1).ok_or(DecodeError::Depth)?;
        let mut pairs = Vec::with_capacity(self.reserve(length)?);
        for _ in 0..length {
            let key = self.value(depth)?;
            pairs.push((key, self.value(depth)?));
        }
        Ok(Value::Map(pairs))
    }

    fn ext(&mut self, length: usize) -> Result<Value, DecodeError> {
        let [code] = self.take_array()?;
        let code = i8::from_be_bytes([code]);
        let payload = self.take(length)?;
        let broken = |source| DecodeError::Pickle { code, source };
        Ok(match code {
            ext::UUID => Value::Uuid(Uuid::from_slice(&payload).map_err(|_| DecodeError::Uuid)?),
            ext::DATETIME => {
                Value::DateTime(DateTime::decode(&payload).map_err(DecodeError::DateTime)?)
            }
            ext::DECIMAL => Value::Decimal(pickle::read_decimal(&payload).map_err(broken)?),
            ext::POSIX_PATH => Value::Path(path(&payload)?),
            ext::PURE_POSIX_PATH => Value::PurePath(path(&payload)?),
            ext::AUTO_DIRECTORY_PATH => Value::AutoDirectoryPath(path(&payload)?),
            ext::ENUM => {
                let (class, value) = pickle::read_enum(&payload).map_err(broken)?;
                let value = Box::new(match value {
                    EnumValue::Text(text) => Value::Str(text),
                    EnumValue::Int(number) => Value::Int(number),
                });
                Value::Enum { class, value }
            }
            ext::IMAGE_REF => {
                Value::ImageRef(Box::new(pickle::read_image_ref(&payload).map_err(broken)?))
            }
            ext::RESOURCE_SLOT => {
                Value::ResourceSlot(pickle::read_resource_slot(&payload).map_err(broken)?)
            }
            ext::BINARY_SIZE => {
                Value::BinarySize(pickle::read_binary_size(&payload).map_err(broken)?)
            }
            _ => Value::Ext(code, payload),
        })
    }
}

fn path(payload: &[u8]) -> Result<String, DecodeError> {
    std::str::from_utf8(payload)
        .map(str::to_owned)
        .map_err(|_| DecodeError::Text)
}

/// Encodes one document, every item in its shortest form, as msgpack-python does.
///
/// # Errors
/// It is nested too deeply, a part of it is too long, or a date or an enum in it has no form.
pub fn encode(value: &Value) -> Result<Vec<u8>, EncodeError> {
    let mut out = Vec::new();
    write(&mut out, value, MAX_ENCODE_DEPTH)?;
    Ok(out)
}

/// Writes a document piece by piece, without a [`Value`] of the whole.
pub(super) struct Writer<'a>(pub(super) &'a mut Vec<u8>);

impl Writer<'_> {
    /// A map's head; its keys and values follow.
    pub(super) fn map(&mut self, length: usize) -> Result<(), EncodeError> {
        let widths = [None, Some(0xde), Some(0xdf)];
        write_head(self.0, length, Some((0x80, 15)), widths)
    }

    /// A text.
    pub(super) fn text(&mut self, text: &str) -> Result<(), EncodeError> {
        let widths = [Some(0xd9), Some(0xda), Some(0xdb)];
        write_head(self.0, text.len(), Some((0xa0, 31)), widths)?;
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }

    /// A byte string.
    pub(super) fn bin(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        let widths = [Some(0xc4), Some(0xc5), Some(0xc6)];
        write_head(self.0, bytes.len(), None, widths)?;
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    /// Any value.
    pub(super) fn value(&mut self, value: &Value) -> Result<(), EncodeError> {
        write(self.0, value, MAX_ENCODE_DEPTH)
    }
}

fn write(out: &mut Vec<u8>, value: &Value, depth: usize) -> Result<(), EncodeError> {
    let depth = depth.checked_sub(1).ok_or(EncodeError::Depth)?;
    match value {
        Value::Nil => out.push(0xc0),
        Value::Bool(flag) => out.push(if *flag { 0xc3 } else { 0xc2 }),
        Value::Int(number) => write_int(out, *number),
        Value::UInt(number) => write_uint(out, *number),
        Value::Float(number) => {
            out.push(0xcb);
            out.extend(number.to_be_bytes());
        }
        Value::Str(text) => Writer(out).text(text)?,
        Value::Bin(bytes) => Writer(out).bin(bytes)?,
        Value::Array(items) => {
            write_head(
                out,
                items.len(),
                Some((0x90, 15)),
                [None, Some(0xdc), Some(0xdd)],
            )?;
            for item in items {
                write(out, item, depth)?;
            }
        }
        Value::Map(pairs) => {
            Writer(out).map(pairs.len())?;
            for (key, value) in pairs {
                write(out, key, depth)?;
                write(out, value, depth)?;
            }
        }
        Value::Uuid(uuid) => write_ext(out, ext::UUID, uuid.as_bytes())?,
        Value::DateTime(at) => {
            write_ext(
                out,
                ext::DATETIME,
                &at.encode().map_err(EncodeError::DateTime)?,
            )?;
        }
        Value::Decimal(text) => write_ext(out, ext::DECIMAL, &pickle::write_decimal(text))?,
        Value::Path(path) => write_ext(out, ext::POSIX_PATH, path.as_bytes())?,
        Value::PurePath(path) => write_ext(out, ext::PURE_POSIX_PATH, path.as_bytes())?,
        Value::AutoDirectoryPath(path) => {
            write_ext(out, ext::AUTO_DIRECTORY_PATH, path.as_bytes())?;
        }
        Value::Enum { class, value } => {
            let (module, name) = class.split_once(':').ok_or(EncodeError::Enum)?;
            let value = match &**value {
                Value::Str(text) => EnumValue::Text(text.clone()),
                Value::Int(number) => EnumValue::Int(*number),
                _ => return Err(EncodeError::Enum),
            };
            write_ext(
                out,
                ext::ENUM,
                &pickle::write_enum_value(module, name, &value),
            )?;
        }
        Value::ImageRef(image) => {
            write_ext(out, ext::IMAGE_REF, &pickle::write_image_ref(image))?;
        }
        Value::ResourceSlot(slots) => {
            write_ext(out, ext::RESOURCE_SLOT, &pickle::write_resource_slot(slots))?;
        }
        Value::BinarySize(size) => {
            write_ext(out, ext::BINARY_SIZE, &pickle::write_binary_size(*size))?;
        }
        Value::Ext(code, payload) => write_ext(out, *code, payload)?,
    }
    Ok(())
}

fn write_int(out: &mut Vec<u8>, number: i64) {
    if let Ok(positive) = u64::try_from(number) {
        write_uint(out, positive);
    } else if number >= -32 {
        out.extend(number.to_be_bytes().last());
    } else if let Ok(byte) = i8::try_from(number) {
        out.push(0xd0);
        out.extend(byte.to_be_bytes());
    } else if let Ok(short) = i16::try_from(number) {
        out.push(0xd1);
        out.extend(short.to_be_bytes());
    } else if let Ok(word) = i32::try_from(number) {
        out.push(0xd2);
        out.extend(word.to_be_bytes());
    } else {
        out.push(0xd3);
        out.extend(number.to_be_bytes());
    }
}

fn write_uint(out: &mut Vec<u8>, number: u64) {
    if let Ok(byte) = u8::try_from(number) {
        if byte >= 0x80 {
            out.push(0xcc);
        }
        out.push(byte);
    } else if let Ok(short) = u16::try_from(number) {
        out.push(0xcd);
        out.extend(short.to_be_bytes());
    } else if let Ok(word) = u32::try_from(number) {
        out.push(0xce);
        out.extend(word.to_be_bytes());
    } else {
        out.push(0xcf);
        out.extend(number.to_be_bytes());
    }
}

/// A marker with the length in it where `fix` allows, else the marker for the length's width.
fn write_head(
    out: &mut Vec<u8>,
    length: usize,
    fix: Option<(u8, u8)>,
    by_width: [Option<u8>; 3],
) -> Result<(), EncodeError> {
    let length = u32::try_from(length).map_err(|_| EncodeError::Length)?;
    if let (Some((base, max)), Ok(short)) = (fix, u8::try_from(length))
        && short <= max
    {
        out.push(base | short);
        return Ok(());
    }
    match (by_width, u8::try_from(length), u16::try_from(length)) {
        ([Some(marker), ..], Ok(short), _) => out.extend([marker, short]),
        ([_, Some(marker), _], _, Ok(medium)) => {
            out.push(marker);
            out.extend(medium.to_be_bytes());
        }
        ([.., marker], ..) => {
            out.push(marker.ok_or(EncodeError::Length)?);
            out.extend(length.to_be_bytes());
        }
    }
    Ok(())
}

fn write_ext(out: &mut Vec<u8>, code: i8, payload: &[u8]) -> Result<(), EncodeError> {
    match payload.len() {
        1 => out.push(0xd4),
        2 => out.push(0xd5),
        4 => out.push(0xd6),
        8 => out.push(0xd7),
        16 => out.push(0xd8),
        length => write_head(out, length, None, [Some(0xc7), Some(0xc8), Some(0xc9)])?,
    }
    out.extend(code.to_be_bytes());
    out.extend(payload);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rpc::value::ImageRef;

    fn read(bytes: &[u8]) -> Result<Value, DecodeError> {
        decode(&Bytes::copy_from_slice(bytes), &DecodeLimits::default())
    }

    #[test]
    fn bombs_are_refused_before_they_cost_anything() {
        let nested = |depth: usize| [vec![0x91; depth], vec![0xc0]].concat();
        assert!(read(&nested(96)).is_ok());
        assert_eq!(read(&nested(97)), Err(DecodeError::Depth));
        assert_eq!(read(&nested(10_000_000)), Err(DecodeError::Depth));
        // A map of maps, through keys.
        assert_eq!(
            read(&[vec![0x81; 200], vec![0xc0; 201]].concat()),
            Err(DecodeError::Depth)
        );
        // Lengths nobody backs with bytes.
        for head in [0xdd, 0xdf, 0xc6, 0xdb, 0xc9] {
            assert_eq!(
                read(&[head, 0xff, 0xff, 0xff, 0xff, 0]),
                Err(DecodeError::Truncated),
                "{head:x}"
            );
        }
        let mut wide = vec![0xdd, 0, 0x10, 0, 0];
        wide.resize(5 + (1 << 20), 0xc0);
        assert_eq!(read(&wide), Err(DecodeError::Values));
        let few = DecodeLimits {
            depth: 8,
            values: 3,
        };
        assert!(decode(&Bytes::from_static(&[0x92, 1, 2]), &few).is_ok());
        assert_eq!(
            decode(&Bytes::from_static(&[0x93, 1, 2, 3]), &few),
            Err(DecodeError::Values)
        );
    }

    #[test]
    fn broken_documents_name_their_fault() {
        assert_eq!(read(&[]), Err(DecodeError::Truncated));
        assert_eq!(read(&[0xc1]), Err(DecodeError::Reserved));
        assert_eq!(read(&[0xc0, 0xc0]), Err(DecodeError::Trailing));
        assert_eq!(read(&[0xa1, 0xff]), Err(DecodeError::Text));
        assert_eq!(read(&[0xd4, 1, 0]), Err(DecodeError::Uuid));
        assert!(matches!(read(&[0xd4, 2, 0]), Err(DecodeError::DateTime(_))));
        assert!(matches!(
            read(&[0xd4, 6, 0x2e]),
            Err(DecodeError::Pickle { code: 6, .. })
        ));
        assert_eq!(read(&[0xca, 0x40, 0x20, 0, 0]), Ok(Value::Float(2.5)));
        assert_eq!(
            read(&[0xd4, 99, 7]),
            Ok(Value::Ext(99, Bytes::from_static(&[7])))
        );
    }

    #[test]
    fn values_too_deep_to_be_read_are_not_written() {
        let mut value = Value::Nil;
        for _ in 0..MAX_ENCODE_DEPTH {
            value = Value::Array(vec![value]);
        }
        assert_eq!(encode(&value), Err(EncodeError::Depth));
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let text = || "\\PC{0,40}";
        let image = (text(), proptest::option::of(text()), text(), any::<bool>()).prop_map(
            |(name, project, tag, is_local)| {
                Value::ImageRef(Box::new(ImageRef {
                    name,
                    project,
                    tag,
                    registry: "registry.example".into(),
                    architecture: "x86_64".into(),
                    is_local,
                }))
            },
        );
        let member = prop_oneof![
            text().prop_map(Value::Str),
            any::<i64>().prop_map(Value::Int)
        ];
        let leaf = prop_oneof![
            Just(Value::Nil),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::Int),
            any::<u64>().prop_map(Value::from),
            any::<i8>().prop_map(Value::from),
            (-1e300..1e300).prop_map(Value::Float),
            text().prop_map(Value::Str),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(|b| Value::Bin(b.into())),
            any::<u128>().prop_map(|bits| Value::Uuid(Uuid::from_u128(bits))),
            "-?[0-9]{1,20}(\\.[0-9]{1,10})?".prop_map(Value::Decimal),
            text().prop_map(Value::Path),
            text().prop_map(Value::PurePath),
            text().prop_map(Value::AutoDirectoryPath),
            image,
            member.prop_map(|value| Value::Enum {
                class: "ai.backend.common.types:Kind".into(),
                value: Box::new(value)
            }),
            proptest::collection::vec(("[a-z.]{1,20}", "[0-9]{1,20}"), 0..4)
                .prop_map(Value::ResourceSlot),
            any::<i128>().prop_map(Value::BinarySize),
            (20_i8..120, proptest::collection::vec(any::<u8>(), 0..300))
                .prop_map(|(code, payload)| Value::Ext(code, payload.into())),
            (
                0_i64..4_000_000_000_000_000,
                proptest::option::of(-64_i8..60)
            )
                .prop_map(|(microseconds, offset_quarters)| {
                    Value::DateTime(DateTime {
                        microseconds,
                        offset_quarters,
                    })
                }),
        ];
        leaf.prop_recursive(5, 60, 20, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..20).prop_map(Value::Array),
                proptest::collection::vec((inner.clone(), inner), 0..20).prop_map(Value::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(value in any_value()) {
            let written = Bytes::from(encode(&value).unwrap());
            prop_assert_eq!(decode(&written, &DecodeLimits::default()), Ok(value));
        }

        #[test]
        fn decoding_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes);
        }

        #[test]
        fn damaged_documents_never_panic(
            value in any_value(), at in any::<proptest::sample::Index>(), with in any::<u8>(),
        ) {
            let mut written = encode(&value).unwrap();
            let at = at.index(written.len());
            written[at] = with;
            let _ = read(&written);
            let _ = read(&written[..at]);
        }
    }
}
