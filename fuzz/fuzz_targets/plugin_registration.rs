//! What comes in on the socket for device plugins: the registration service never panics, never waits
//! for more than it was sent, and answers in frames that make sense.
#![no_main]

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use control::accelerator::host::registration;
use libfuzzer_sys::fuzz_target;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What is answered; everything is there at once, so nothing may be waited for.
fn answered(sent: &[u8]) -> Vec<u8> {
    let mut answer = Vec::new();
    let served = registration::serve(tokio::io::join(sent, &mut answer), |_| Ok(()));
    let polled = pin!(served).poll(&mut Context::from_waker(Waker::noop()));
    assert!(matches!(polled, Poll::Ready(_)), "it waits for what never comes");
    answer
}

fuzz_target!(|data: &[u8]| {
    assert!(data.starts_with(PREFACE) || answered(data).is_empty());
    let sent = [PREFACE, data].concat();
    let answer = answered(&sent);
    // At most a few short frames for each frame of at least nine bytes.
    assert!(answer.len() <= 9 + sent.len() * 256);
    let mut rest = answer.as_slice();
    while let Some((head, tail)) = rest.split_first_chunk::<9>() {
        let length = usize::from(head[1]) << 8 | usize::from(head[2]);
        assert!(head[0] == 0 && length <= 16_384 && matches!(head[3], 0 | 1 | 4 | 6));
        rest = &tail[length..];
    }
    assert!(rest.is_empty());
});
