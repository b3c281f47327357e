//! A restricted reader of the few pickles the manager sends, and a writer of the ones it reads.
//!
//! In: the payload of an ext value; out: an enum member, a decimal, an image reference, resource
//! slots or a byte count. A pickle is treated as data: the opcodes and the classes are on
//! allow-lists, nothing is ever called, and objects become rows of a flat arena, so neither depth
//! nor sharing nor cycles of the input cost more than its length. Invariant: no input panics, and
//! the work is linear in the input, which is at most [`MAX_PICKLE_BYTES`].
//!
//! CPython writes protocol 5 with framing and a memo; the writer here
//! leaves both out, which the real unpickler accepts.

mod machine;
mod write;

use super::value::ImageRef;
pub use machine::PickleError;
use machine::{Arena, Id, Node};
pub(in crate::rpc) use write::write_enum_value;
pub use write::{
    write_binary_size, write_decimal, write_enum, write_image_ref, write_resource_slot,
};

/// Longest pickle that is looked at, in bytes. The largest of the real ones is about 400.
pub const MAX_PICKLE_BYTES: usize = 64 * 1024;

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
pub fn read_enum(pickle: &[u8]) -> Result<(String, EnumValue), PickleError> {
    let arena = Arena::load(pickle)?;
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

/// Reads a `decimal.Decimal` as the text Python prints.
pub fn read_decimal(pickle: &[u8]) -> Result<String, PickleError> {
    let arena = Arena::load(pickle)?;
    decimal(&arena, arena.root())
}

/// Reads a `BinarySize`, in bytes.
pub fn read_binary_size(pickle: &[u8]) -> Result<i128, PickleError> {
    let arena = Arena::load(pickle)?;
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
pub fn read_resource_slot(pickle: &[u8]) -> Result<Vec<(String, String)>, PickleError> {
    let arena = Arena::load(pickle)?;
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
pub fn read_image_ref(pickle: &[u8]) -> Result<ImageRef, PickleError> {
    let arena = Arena::load(pickle)?;
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
}
