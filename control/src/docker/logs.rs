//! A container's log as text.
//!
//! With a terminal the engine sends raw bytes, without one it sends frames of an 8-byte header
//! (stream, length) and a payload; which of the two is known from the container's own `Tty`
//! setting and never guessed from the bytes. The text keeps the tail that fits the bound.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

/// What to read and how much of it to keep.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// Bytes kept, counted from the end.
    pub keep: usize,
    /// When the deadline passes in the middle, give what was read instead of an error.
    pub partial: bool,
    /// The deadline, where it is not `Deadlines::logs`.
    pub limit: Option<Duration>,
    /// A user asks: it waits its turn among such calls, not among those that kernels end by.
    pub for_user: bool,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            keep: 10 << 20,
            partial: false,
            limit: None,
            for_user: false,
        }
    }
}

/// A container's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerLog {
    /// Standard output and error in the order the engine stored them; invalid UTF-8 replaced.
    pub text: String,
    /// Bytes left out at the beginning.
    pub cut: u64,
    /// False when the deadline passed before the end.
    pub complete: bool,
}

/// Keeps the last `limit` bytes of what is pushed, as bytes: a container chooses how small the
/// pieces are, and each kept as it came costs more than what is in it.
#[derive(Debug)]
pub(super) struct Tail {
    held: VecDeque<u8>,
    limit: usize,
    cut: u64,
}

impl Tail {
    pub fn new(limit: usize) -> Self {
        Self {
            held: VecDeque::new(),
            limit,
            cut: 0,
        }
    }

    pub fn push(&mut self, chunk: &[u8]) {
        let surplus = (self.held.len() + chunk.len()).saturating_sub(self.limit);
        let old = surplus.min(self.held.len());
        self.held.drain(..old);
        self.held.extend(&chunk[surplus - old..]);
        self.cut += surplus as u64;
    }

    /// The kept bytes, cut at a character boundary, and the number of bytes left out before them.
    pub fn finish(self) -> (Vec<u8>, u64) {
        let mut out = Vec::from(self.held);
        let mut cut = self.cut;
        if cut > 0 {
            // A character split by the cut would show as a replacement mark.
            let stray = out
                .iter()
                .take(3)
                .take_while(|byte| **byte & 0xC0 == 0x80)
                .count();
            out.drain(..stray);
            cut += stray as u64;
        }
        (out, cut)
    }
}

/// Which stream a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    Output,
    Error,
}

/// Takes framed output apart without ever buffering more than one header.
#[derive(Debug, Default)]
pub(super) struct Demultiplexer {
    header: Vec<u8>,
    /// Stream and bytes left of the present frame.
    frame: Option<(bool, u32)>,
}

impl Demultiplexer {
    /// Hands each piece of payload in `chunk` to `sink`.
    pub fn push(&mut self, mut chunk: Bytes, mut sink: impl FnMut(Stream, Bytes)) {
        while !chunk.is_empty() {
            match &mut self.frame {
                Some((error, left)) => {
                    let take = chunk.len().min(*left as usize);
                    let piece = chunk.split_to(take);
                    // `take` is at most `left`, which is a u32.
                    *left -= u32::try_from(take).unwrap_or(*left);
                    let stream = if *error {
                        Stream::Error
                    } else {
                        Stream::Output
                    };
                    if *left == 0 {
                        self.frame = None;
                    }
                    sink(stream, piece);
                }
                None => {
                    let want = 8 - self.header.len();
                    let piece = chunk.split_to(want.min(chunk.len()));
                    self.header.extend_from_slice(&piece);
                    if let [kind, _, _, _, a, b, c, d] = self.header[..] {
                        let length = u32::from_be_bytes([a, b, c, d]);
                        self.header.clear();
                        if length > 0 {
                            self.frame = Some((kind == 2, length));
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_tail_is_kept_and_the_cut_counted() {
        let mut tail = Tail::new(5);
        for part in ["abc", "defg", "", "hi"] {
            tail.push(part.as_bytes());
        }
        assert_eq!(tail.finish(), (b"efghi".to_vec(), 4));
        let mut tail = Tail::new(4);
        tail.push("xx\u{20ac}yz".as_bytes());
        assert_eq!(tail.finish(), (b"yz".to_vec(), 5));
        let mut tail = Tail::new(0);
        tail.push(b"x");
        assert_eq!(tail.finish(), (Vec::new(), 1));
        let mut tail = Tail::new(2);
        tail.push(b"longer than the limit");
        assert_eq!(tail.finish(), (b"it".to_vec(), 19));
    }

    #[test]
    fn small_pieces_take_no_more_memory_than_what_is_kept() {
        const LIMIT: usize = 64 << 10;
        let mut tail = Tail::new(LIMIT);
        for _ in 0..4 * LIMIT {
            tail.push(b"x");
        }
        let taken = size_of_val(&tail) + tail.held.capacity() * size_of_val(&tail.held[0]);
        assert!(taken <= 3 * LIMIT, "{taken}");
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..50)), 0..12),
            cuts in prop::collection::vec(1usize..20, 1..40),
        ) {
            let mut wire = Vec::new();
            let mut expected = (Vec::new(), Vec::new());
            for (error, payload) in &frames {
                wire.extend_from_slice(&[if *error { 2 } else { 1 }, 0, 0, 0]);
                wire.extend_from_slice(&u32::try_from(payload.len()).unwrap().to_be_bytes());
                wire.extend_from_slice(payload);
                if *error { &mut expected.1 } else { &mut expected.0 }.extend_from_slice(payload);
            }
            let mut wire = Bytes::from(wire);
            let mut seen = (Vec::new(), Vec::new());
            let mut demultiplexer = Demultiplexer::default();
            for cut in cuts.iter().cycle() {
                if wire.is_empty() { break; }
                let piece = wire.split_to((*cut).min(wire.len()));
                demultiplexer.push(piece, |stream, bytes| match stream {
                    Stream::Output => seen.0.extend_from_slice(&bytes),
                    Stream::Error => seen.1.extend_from_slice(&bytes),
                });
            }
            prop_assert_eq!(seen, expected);
        }
    }
}
