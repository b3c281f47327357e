//! Writing the pickles the manager reads, without framing and memo.

use super::{COMMON_DOCKER, COMMON_TYPES, EnumValue, ImageRef};

const HEAD: [u8; 2] = [0x80, 5];
const STOP: u8 = 0x2e;

/// Writes an enum member.
pub(in crate::rpc) fn write_enum_value(module: &str, class: &str, value: &EnumValue) -> Vec<u8> {
    let mut out = HEAD.to_vec();
    push_class(&mut out, module, class);
    match value {
        EnumValue::Text(text) => push_text(&mut out, text),
        EnumValue::Int(number) => push_int(&mut out, i128::from(*number)),
    }
    out.extend([0x85, 0x52, STOP]);
    out
}

/// Writes a `decimal.Decimal` from its text.
#[must_use]
pub fn write_decimal(text: &str) -> Vec<u8> {
    let mut out = HEAD.to_vec();
    push_decimal(&mut out, text);
    out.push(STOP);
    out
}

/// Writes a `BinarySize` from a count of bytes.
#[must_use]
pub fn write_binary_size(size: i128) -> Vec<u8> {
    let mut out = HEAD.to_vec();
    push_class(&mut out, COMMON_TYPES, "BinarySize");
    push_int(&mut out, size);
    out.extend([0x85, 0x81, STOP]);
    out
}

/// Writes a `ResourceSlot` with every amount as a `Decimal`; amounts must be decimal text.
#[must_use]
pub fn write_resource_slot(slots: &[(String, String)]) -> Vec<u8> {
    let mut out = HEAD.to_vec();
    push_class(&mut out, COMMON_TYPES, "ResourceSlot");
    // NEWOBJ without arguments, then the slots-style state (None, {"data": {...}}).
    out.extend([0x29, 0x81, b'N', b'}']);
    push_text(&mut out, "data");
    out.extend(*b"}(");
    for (slot, amount) in slots {
        push_text(&mut out, slot);
        if super::is_decimal(amount) {
            push_decimal(&mut out, amount);
        } else {
            push_text(&mut out, amount);
        }
    }
    out.extend([b'u', b's', 0x86, 0x62, STOP]);
    out
}

/// Writes an `ImageRef` as a call of its constructor.
#[must_use]
pub fn write_image_ref(image: &ImageRef) -> Vec<u8> {
    let mut out = HEAD.to_vec();
    push_class(&mut out, COMMON_DOCKER, "ImageRef");
    out.push(b'(');
    push_text(&mut out, &image.name);
    match &image.project {
        Some(project) => push_text(&mut out, project),
        None => out.push(b'N'),
    }
    push_text(&mut out, &image.tag);
    push_text(&mut out, &image.registry);
    push_text(&mut out, &image.architecture);
    out.push(if image.is_local { 0x88 } else { 0x89 });
    out.extend([b't', 0x52, STOP]);
    out
}

fn push_class(out: &mut Vec<u8>, module: &str, class: &str) {
    push_text(out, module);
    push_text(out, class);
    out.push(0x93);
}

fn push_decimal(out: &mut Vec<u8>, text: &str) {
    push_class(out, "decimal", "Decimal");
    push_text(out, text);
    out.extend([0x85, 0x52]);
}

fn push_text(out: &mut Vec<u8>, text: &str) {
    if let Ok(length) = u8::try_from(text.len()) {
        out.extend([0x8c, length]);
    } else if let Ok(length) = u32::try_from(text.len()) {
        out.push(b'X');
        out.extend(length.to_le_bytes());
    } else {
        out.push(0x8d);
        out.extend(u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
    }
    out.extend(text.as_bytes());
}

fn push_int(out: &mut Vec<u8>, number: i128) {
    if let Ok(byte) = u8::try_from(number) {
        out.extend([b'K', byte]);
    } else if let Ok(short) = u16::try_from(number) {
        out.push(b'M');
        out.extend(short.to_le_bytes());
    } else if let Ok(word) = i32::try_from(number) {
        out.push(b'J');
        out.extend(word.to_le_bytes());
    } else {
        let bytes = number.to_le_bytes();
        let fill: u8 = if number < 0 { 0xff } else { 0 };
        // The shortest form that keeps the sign bit.
        let mut length = bytes.len();
        while length > 1 && bytes[length - 1] == fill && (bytes[length - 2] ^ fill) & 0x80 == 0 {
            length -= 1;
        }
        out.extend([0x8a, u8::try_from(length).unwrap_or(16)]);
        out.extend(&bytes[..length]);
    }
}
