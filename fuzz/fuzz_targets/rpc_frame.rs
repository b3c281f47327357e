//! Arbitrary frames: tags, headers and envelopes never panic, and a header that is understood is
//! answered with frames that are understood.
#![no_main]

use bytes::Bytes;
use control::rpc::frame::{self, Envelope, Header, Message};
use control::rpc::msgpack::DecodeLimits;
use control::rpc::{Failure, Value};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // A byte of lengths cuts the input into frames.
    let mut rest = data;
    let mut frames = Vec::new();
    while let Some((length, tail)) = rest.split_first() {
        let (frame, tail) = tail.split_at(tail.len().min(usize::from(*length)));
        frames.push(Bytes::copy_from_slice(frame));
        rest = tail;
    }
    let _ = Message::read(&frames);
    for frame in &frames {
        let _ = frame::read_request(frame, &DecodeLimits::default());
        let _ = Envelope::decode(frame).map(|envelope| envelope.failure());
        if let Ok(header) = Header::decode(frame) {
            let failure = Failure::value_error(&header.method);
            for reply in [header.result(&Value::Nil), header.failure(&failure)] {
                let reply = reply.expect("a header that was read can be written");
                let echoed = Header::decode(&reply[1]);
                // Larger than a header may be only when it was at the limit already.
                if let Ok(echoed) = echoed {
                    assert_eq!(echoed.method, header.method);
                } else {
                    assert!(reply[1].len() > frame::MAX_HEADER_BYTES);
                }
            }
        }
    }
});
