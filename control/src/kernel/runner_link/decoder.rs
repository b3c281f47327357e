//! Turns the byte pieces of one output stream into text.
//!
//! In: pieces cut anywhere, also inside a character. Out: valid UTF-8, each maximal invalid sequence
//! replaced by one U+FFFD. Invariant: at most three bytes are held back between two pieces.

/// Incremental UTF-8 decoder of one stream of one runner.
#[derive(Debug, Default)]
pub struct StreamDecoder {
    held: Vec<u8>,
}

impl StreamDecoder {
    /// Decodes one piece; an incomplete character at its end waits for the next piece.
    pub fn push(&mut self, piece: &[u8]) -> String {
        let joined;
        let mut rest: &[u8] = if self.held.is_empty() {
            piece
        } else {
            let mut bytes = std::mem::take(&mut self.held);
            bytes.extend_from_slice(piece);
            joined = bytes;
            &joined
        };
        let mut text = String::with_capacity(rest.len());
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(flaw) => {
                    let (valid, after) = rest.split_at(flaw.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match flaw.error_len() {
                        Some(length) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            rest = &after[length..];
                        }
                        None => {
                            self.held = after.to_vec();
                            return text;
                        }
                    }
                }
            }
        }
    }

    /// Ends the stream's step: a character that never got complete becomes one U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        if self.held.is_empty() {
            return None;
        }
        self.held.clear();
        Some(char::REPLACEMENT_CHARACTER.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_character_split_over_two_pieces_is_one_character() {
        let mut decoder = StreamDecoder::default();
        let bytes = "한글".as_bytes();
        let mut text = decoder.push(&bytes[..2]);
        assert_eq!(text, "");
        text.push_str(&decoder.push(&bytes[2..4]));
        text.push_str(&decoder.push(&bytes[4..]));
        assert_eq!(text, "한글");
        assert_eq!(decoder.finish(), None);
    }

    #[test]
    fn invalid_bytes_become_replacement_characters() {
        let mut decoder = StreamDecoder::default();
        assert_eq!(decoder.push(b"a\xffb\xc3"), "a\u{fffd}b");
        assert_eq!(decoder.finish().as_deref(), Some("\u{fffd}"));
        assert_eq!(decoder.push(b"clean"), "clean");
    }

    proptest! {
        #[test]
        fn any_cutting_decodes_like_the_whole(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 1usize..7) {
            let mut decoder = StreamDecoder::default();
            let mut text = String::new();
            for piece in bytes.chunks(cut) {
                text.push_str(&decoder.push(piece));
            }
            text.push_str(&decoder.finish().unwrap_or_default());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
