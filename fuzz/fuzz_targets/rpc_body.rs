//! Arbitrary msgpack: decoding never panics, and what was read is written and read as the same.
#![no_main]

use bytes::Bytes;
use control::rpc::{Value, from_value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(value) = Value::decode(&Bytes::copy_from_slice(data)) else {
        return;
    };
    // Towards typed structs and plain formats.
    let _ = from_value::<Vec<String>>(value.clone());
    let plain: Value = from_value(value.clone()).expect("every value has a plain form");
    let _ = plain.kind();
    let written = value.encode().expect("what was read can be written");
    let again = Value::decode(&Bytes::from(written)).expect("what was written can be read");
    // Debug text, because NaN is not equal to itself.
    assert_eq!(format!("{again:?}"), format!("{value:?}"));
});
