//! Arbitrary text as a configuration file: a configuration or faults, never a panic or a hang.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| config::fuzzing::load_text(text));
