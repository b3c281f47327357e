//! A restricted reader of the few pickles the manager sends, and a writer of the ones it reads.
//!
//! In: the payload of an ext value; out: an enum member, a decimal, an image reference, resource
//! slots or a byte count. In: a file of the Python agent's; out: a [`Value`]. A pickle is treated as data: the opcodes and the classes are on
//! allow-lists, nothing is ever called, and objects become rows of a flat arena, so neither depth
//! nor sharing nor cycles of the input cost more than its length. Invariant: no input panics, and
//! the work is linear in the input, which is at most [`MAX_PICKLE_BYTES`].
//!
//! CPython writes protocol 5 with framing and a memo; the writer here
//! leaves both out, which the real unpickler accepts.

mod machine;
mod write;

use super::value::{ImageRef, Value};
pub use machine::PickleError;
use machine::{Arena, Id, Node, is_path};
pub(in crate::rpc) use write::write_enum_value;
pub use write::{write_binary_size, write_decimal, write_image_ref, write_resource_slot};

/// Longest pickle that is looked at, in bytes. The largest of the real ones is about 400.
pub const MAX_PICKLE_BYTES: usize = 64 * 1024;

/// Longest pickle of a file, in bytes: a bootstrap script and dotfiles may be in it.
pub const MAX_FILE_BYTES: usize = 4 * 1024 * 1024;
/// Values of one file, and how deep they may lie in each other: a pickle may hold one object in many places.
const MAX_VALUES: usize = 100_000;
const MAX_DEPTH: usize = 32;

/// Module of the common value types of Backend.AI.
pub const COMMON_TYPES: &str = "ai.backend.common.types";
/// Module of `ImageRef`.
pub const COMMON_DOCKER: &str = "ai.backend.common.docker";

/// The value of an enum member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EnumValue {
    /// Members of `StrEnum` and of enums over text.
    Text(String),
    /// Members over integers.
    Int(i64),
}

/// Reads an enum member: its class as `module:ClassName`, and its value.
///
/// # Errors
/// It is no pickle of that, or beyond the limits.
pub fn read_enum(pickle: &[u8]) -> Result<(String, EnumValue), PickleError> {
    let arena = Arena::load(pickle, MAX_PICKLE_BYTES)?;
    let member = arena.object(arena.root())?;
    let class = format!("{}:{}", member.module, member.name);
    let value = match member.args {
        [value] => match arena.node(*value) {
            Node::Str(text) => EnumValue::Text(text.clone()),
            Node::Int(number) => EnumValue::Int(
                i64::try_from(*number).map_err(|_| PickleError::Shape("a small enum value"))?,
            ),
            _ => return Err(PickleError::Shape("an enum value of text or int")),
        },
        _ => return Err(PickleError::Shape("an enum member of one value")),
    };
    Ok((class, value))
}

/// Reads plain values and the few rich types that Backend.AI's programs keep in files.
///
/// # Errors
/// There is something else in it, or too much.
pub fn read_file(pickle: &[u8]) -> Result<Value, PickleError> {
    let arena = Arena::load(pickle, MAX_FILE_BYTES)?;
    value(&arena, arena.root(), MAX_DEPTH, &mut MAX_VALUES.clone())
}

fn value(arena: &Arena, id: Id, depth: usize, left: &mut usize) -> Result<Value, PickleError> {
    let depth = depth.checked_sub(1);
    let depth = depth.ok_or(PickleError::Shape("values of that depth"))?;
    *left = left
        .checked_sub(1)
        .ok_or(PickleError::Shape("that many values"))?;
    Ok(match arena.node(id) {
        Node::None => Value::Nil,
        Node::Bool(flag) => Value::Bool(*flag),
        Node::Int(number) => match (i64::try_from(*number), u64::try_from(*number)) {
            (Ok(number), _) => Value::Int(number),
            (_, Ok(number)) => Value::UInt(number),
            _ => return Err(PickleError::Shape("integers of 64 bits")),
        },
        Node::Float(number) => Value::Float(*number),
        Node::Str(text) => Value::Str(text.clone()),
        Node::Tuple(items) | Node::List(items) => {
            let items = items.iter().map(|item| value(arena, *item, depth, left));
            Value::Array(items.collect::<Result<_, _>>()?)
        }
        Node::Dict(pairs) => {
            let pairs = pairs.iter().map(|(key, of)| {
                let key = value(arena, *key, depth, left)?;
                Ok((key, value(arena, *of, depth, left)?))
            });
            Value::Map(pairs.collect::<Result<_, _>>()?)
        }
        Node::Object { .. } => rich(arena, id)?,
        Node::Bytes | Node::Set | Node::Class { .. } => {
            return Err(PickleError::Shape("plain values"));
        }
    })
}

fn rich(arena: &Arena, id: Id) -> Result<Value, PickleError> {
    let object = arena.object(id)?;
    if (object.module, object.name) == ("decimal", "Decimal") {
        return decimal(arena, id).map(Value::Decimal);
    }
    if is_path(object.module) {
        let parts = object.args.iter().map(|part| match arena.node(*part) {
            Node::Str(part) => Ok(part.as_str()),
            _ => Err(PickleError::Shape("paths of text")),
        });
        let path: std::path::PathBuf = parts.collect::<Result<_, _>>()?;
        return Ok(Value::PurePath(path.to_string_lossy().into_owned()));
    }
    let [content] = object.args else {
        return Err(PickleError::Shape("objects of one value"));
    };
    let content = match arena.node(*content) {
        Node::Int(size) if object.name == "BinarySize" => return Ok(Value::BinarySize(*size)),
        Node::Int(number) => i64::try_from(*number).map(Value::Int).ok(),
        Node::Str(text) => Some(Value::Str(text.clone())),
        _ => None,
    };
    Ok(Value::Enum {
        class: format!("{}:{}", object.module, object.name),
        value: Box::new(content.ok_or(PickleError::Shape("an enum of text or a small number"))?),
    })
}

/// Reads a `decimal.Decimal` as the text Python prints.
///
/// # Errors
/// It is no pickle of that, or beyond the limits.
pub fn read_decimal(pickle: &[u8]) -> Result<String, PickleError> {
    let arena = Arena::load(pickle, MAX_PICKLE_BYTES)?;
    decimal(&arena, arena.root())
}

/// Reads a `BinarySize`, in bytes.
///
/// # Errors
/// It is no pickle of that, or beyond the limits.
pub fn read_binary_size(pickle: &[u8]) -> Result<i128, PickleError> {
    let arena = Arena::load(pickle, MAX_PICKLE_BYTES)?;
    let args = arena.instance(arena.root(), COMMON_TYPES, "BinarySize")?.0;
    match args {
        [size] => match arena.node(*size) {
            Node::Int(number) => Ok(*number),
            _ => Err(PickleError::Shape("an int in BinarySize")),
        },
        _ => Err(PickleError::Shape("one argument of BinarySize")),
    }
}

/// Reads a `ResourceSlot`: slot names with amounts as text, in the sender's order.
///
/// # Errors
/// It is no pickle of that, or beyond the limits.
pub fn read_resource_slot(pickle: &[u8]) -> Result<Vec<(String, String)>, PickleError> {
    let arena = Arena::load(pickle, MAX_PICKLE_BYTES)?;
    let (args, state) = arena.instance(arena.root(), COMMON_TYPES, "ResourceSlot")?;
    let slots = match (args, state) {
        ([slots], None) => *slots,
        ([], Some(state)) => {
            // Slots-style state: a pair of the (absent) __dict__ and the slot attributes.
            let attributes = match arena.node(state) {
                Node::Tuple(pair) if pair.len() == 2 => pair[1],
                _ => state,
            };
            arena
                .entry(attributes, "data")?
                .ok_or(PickleError::Shape("ResourceSlot.data"))?
        }
        _ => return Err(PickleError::Shape("the state of a ResourceSlot")),
    };
    let Node::Dict(pairs) = arena.node(slots) else {
        return Err(PickleError::Shape("a dict in ResourceSlot"));
    };
    pairs
        .iter()
        .map(|(slot, amount)| {
            let Node::Str(slot) = arena.node(*slot) else {
                return Err(PickleError::Shape("slot names of text"));
            };
            let amount = match arena.node(*amount) {
                Node::Str(text) => text.clone(),
                Node::Int(number) => number.to_string(),
                _ => decimal(&arena, *amount)?,
            };
            Ok((slot.clone(), amount))
        })
        .collect()
}

/// Reads an `ImageRef`. Attributes beyond the six of the reference are derived and skipped.
///
/// # Errors
/// It is no pickle of that, or beyond the limits.
pub fn read_image_ref(pickle: &[u8]) -> Result<ImageRef, PickleError> {
    let arena = Arena::load(pickle, MAX_PICKLE_BYTES)?;
    let (args, state) = arena.instance(arena.root(), COMMON_DOCKER, "ImageRef")?;
    let attribute = |index: usize, name: &str| -> Result<Id, PickleError> {
        let found = match (state, args) {
            (Some(state), _) => arena.entry(state, name)?,
            (None, args) => args.get(index).copied(),
        };
        found.ok_or(PickleError::Shape("all attributes of an ImageRef"))
    };
    let text = |index: usize, name: &str| match arena.node(attribute(index, name)?) {
        Node::Str(text) => Ok(text.clone()),
        _ => Err(PickleError::Shape("text attributes of an ImageRef")),
    };
    Ok(ImageRef {
        name: text(0, "name")?,
        project: match arena.node(attribute(1, "project")?) {
            Node::None => None,
            Node::Str(text) => Some(text.clone()),
            _ => return Err(PickleError::Shape("ImageRef.project of text or None")),
        },
        tag: text(2, "tag")?,
        registry: text(3, "registry")?,
        architecture: text(4, "architecture")?,
        is_local: match arena.node(attribute(5, "is_local")?) {
            Node::Bool(flag) => *flag,
            _ => return Err(PickleError::Shape("ImageRef.is_local of bool")),
        },
    })
}

fn decimal(arena: &Arena, id: Id) -> Result<String, PickleError> {
    let (args, _state) = arena.instance(id, "decimal", "Decimal")?;
    match args {
        [text] => match arena.node(*text) {
            Node::Str(text) if is_decimal(text) => Ok(text.clone()),
            _ => Err(PickleError::Shape("decimal text")),
        },
        _ => Err(PickleError::Shape("one argument of Decimal")),
    }
}

/// Whether `text` is what `str(Decimal)` can print.
#[must_use]
pub fn is_decimal(text: &str) -> bool {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if unsigned == "Infinity" {
        return true;
    }
    if let Some(payload) = unsigned
        .strip_prefix("sNaN")
        .or(unsigned.strip_prefix("NaN"))
    {
        return payload.bytes().all(|byte| byte.is_ascii_digit());
    }
    let (coefficient, exponent) = match unsigned.split_once(['E', 'e']) {
        Some((coefficient, exponent)) => (coefficient, Some(exponent)),
        None => (unsigned, None),
    };
    let (whole, fraction) = coefficient.split_once('.').unwrap_or((coefficient, ""));
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    digits(whole)
        && digits(fraction)
        && !(whole.is_empty() && fraction.is_empty())
        && exponent.is_none_or(|exponent| {
            let exponent = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
            !exponent.is_empty() && digits(exponent)
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn write_enum(module: &str, class: &str, value: &str) -> Vec<u8> {
        write_enum_value(module, class, &EnumValue::Text(value.to_owned()))
    }

    #[test]
    fn decimal_text_is_told_from_other_text() {
        for good in [
            "1",
            "0.25",
            "-12.50",
            "1E+3",
            "1e-3",
            ".5",
            "Infinity",
            "-Infinity",
            "NaN",
            "sNaN12",
        ] {
            assert!(is_decimal(good), "{good}");
        }
        for bad in [
            "", "-", ".", "1.2.3", "1E", "abc", "1 ", "0x10", "NaNx", "infinity",
        ] {
            assert!(!is_decimal(bad), "{bad}");
        }
    }

    #[test]
    fn a_class_outside_the_allow_list_is_refused_and_never_called() {
        // What a hostile peer sends to run `posix.system("id")`.
        let mut pickle = vec![0x80, 5];
        for text in ["posix", "system"] {
            pickle.extend([0x8c, u8::try_from(text.len()).unwrap()]);
            pickle.extend(text.as_bytes());
        }
        pickle.extend([0x93, 0x8c, 2, b'i', b'd', 0x85, 0x52, 0x2e]);
        let refused = PickleError::Class {
            module: "posix".into(),
            name: "system".into(),
        };
        assert_eq!(read_enum(&pickle), Err(refused));
    }

    #[test]
    fn a_cycle_in_private_state_is_skipped() {
        // ImageRef whose _tag_set is a list that holds itself.
        let image = ImageRef {
            name: "python".into(),
            project: None,
            tag: "3".into(),
            registry: "r".into(),
            architecture: "x86_64".into(),
            is_local: true,
        };
        let mut pickle = vec![0x80, 5];
        let text = |pickle: &mut Vec<u8>, text: &str| {
            pickle.extend([0x8c, u8::try_from(text.len()).unwrap()]);
            pickle.extend(text.as_bytes());
        };
        text(&mut pickle, COMMON_DOCKER);
        text(&mut pickle, "ImageRef");
        pickle.extend([0x93, 0x29, 0x81, 0x7d, 0x28]);
        for (key, value) in [
            ("name", "python"),
            ("tag", "3"),
            ("registry", "r"),
            ("architecture", "x86_64"),
        ] {
            text(&mut pickle, key);
            text(&mut pickle, value);
        }
        text(&mut pickle, "project");
        pickle.push(0x4e);
        text(&mut pickle, "is_local");
        pickle.push(0x88);
        text(&mut pickle, "_tag_set");
        pickle.extend([0x5d, 0x94, 0x68, 0, 0x61]);
        pickle.extend([0x75, 0x62, 0x2e]);
        assert_eq!(read_image_ref(&pickle), Ok(image));
    }

    #[test]
    fn oversized_and_truncated_pickles_are_refused() {
        assert_eq!(
            read_enum(&vec![0x4e; MAX_PICKLE_BYTES + 1]),
            Err(PickleError::TooLarge)
        );
        let whole = write_enum(COMMON_TYPES, "SessionTypes", "batch");
        for end in 0..whole.len() {
            assert!(read_enum(&whole[..end]).is_err(), "{end}");
        }
    }

    proptest! {
        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_enum(&bytes);
            let _ = read_decimal(&bytes);
            let _ = read_image_ref(&bytes);
            let _ = read_resource_slot(&bytes);
            let _ = read_binary_size(&bytes);
        }

        #[test]
        fn broken_real_pickles_never_panic(at in 0_usize..150, with in any::<u8>()) {
            let slots = [("cpu".to_owned(), "2".to_owned()), ("mem".to_owned(), "1.5".to_owned())];
            let mut pickle = write_resource_slot(&slots);
            let at = at % pickle.len();
            pickle[at] = with;
            let _ = read_resource_slot(&pickle);
        }

        #[test]
        fn what_is_written_is_read(
            slots in proptest::collection::vec(("[a-z.-]{1,300}", "[1-9][0-9]{0,20}"), 0..8),
            size in any::<i128>(),
            value in "\\PC{0,300}",
        ) {
            prop_assert_eq!(read_resource_slot(&write_resource_slot(&slots)), Ok(slots));
            prop_assert_eq!(read_binary_size(&write_binary_size(size)), Ok(size));
            let (class, read) = read_enum(&write_enum("ai.backend.x", "Kind", &value)).unwrap();
            prop_assert_eq!(class, "ai.backend.x:Kind");
            prop_assert_eq!(read, EnumValue::Text(value));
        }
    }

    /// Written by CPython 3.13 with the classes of the original.
    const KEPT: &str = "8004954f010000000000007d94288c0474797065948c1761692e6261636b656e642e636f6d6d6f6e2e7479706573948c\
        0c53657373696f6e54797065739493948c05626174636894859452948c047065726d9468028c0f4d6f756e745065726d697373696f6e9493\
        948c02726f94859452948c0470617468948c0e706174686c69622e5f6c6f63616c948c0d50757265506f736978506174689493948c092f6d\
        6e742f76662f6194859452948c056c6f63616c94680f8c09506f736978506174689493948c03622f6394859452948c0473697a659468028c\
        0a42696e61727953697a659493944d0004859481948c03646563948c07646563696d616c948c07446563696d616c9493948c03302e359485\
        9452948c016694473ff80000000000008c016e944afdffffff8c03626967948a090000000000000080008c017494284b018c0161944e8874\
        948c016c945d94285d944b0161682f65752e";

    fn bytes(hex: &str) -> Vec<u8> {
        let digits = hex.as_bytes().chunks_exact(2);
        let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.map(byte).collect()
    }

    fn text(text: &str) -> Value {
        Value::Str(text.to_owned())
    }

    #[test]
    fn a_file_of_the_original_is_read() {
        let member = |class: &str, of: &str| Value::Enum {
            class: format!("{COMMON_TYPES}:{class}"),
            value: Box::new(text(of)),
        };
        let one = || Value::Array(vec![Value::Int(1)]);
        let of = [
            ("type", member("SessionTypes", "batch")),
            ("perm", member("MountPermission", "ro")),
            ("path", Value::PurePath("/mnt/vf/a".to_owned())),
            ("local", Value::PurePath("b/c".to_owned())),
            ("size", Value::BinarySize(1024)),
            ("dec", Value::Decimal("0.5".to_owned())),
            ("f", Value::Float(1.5)),
            ("n", Value::Int(-3)),
            ("big", Value::UInt(1 << 63)),
            (
                "t",
                Value::Array(vec![
                    Value::Int(1),
                    text("a"),
                    Value::Nil,
                    Value::Bool(true),
                ]),
            ),
            ("l", Value::Array(vec![one(), one()])),
        ];
        let wanted = of.map(|(key, of)| (text(key), of)).to_vec();
        assert_eq!(read_file(&bytes(KEPT)), Ok(Value::Map(wanted)));
    }

    #[test]
    fn depth_and_copies_are_bounded() {
        // Lists in lists.
        let deep = [
            b"\x80\x04".to_vec(),
            vec![b']'; 100],
            vec![b'a'; 99],
            b".".to_vec(),
        ]
        .concat();
        assert_eq!(
            read_file(&deep),
            Err(PickleError::Shape("values of that depth"))
        );
        // Each of 21 lists holds the next one twice.
        let mut wide = b"\x80\x04".to_vec();
        wide.extend(b"]\x94(".repeat(21));
        wide.extend(b"K\x01K\x01e");
        wide.extend((1..21).rev().flat_map(|inner| [b'h', inner, b'e']));
        wide.push(b'.');
        assert_eq!(
            read_file(&wide),
            Err(PickleError::Shape("that many values"))
        );
    }
}
