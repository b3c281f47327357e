//! JSON objects out of a chunked answer, one per line, each of bounded length.
//!
//! Used for events, pull and push. A cut connection is an error, never a quiet end: the caller
//! must be able to tell "done" from "the engine died".

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::error::DockerError;

/// No line of the engine comes near this; one that does is refused instead of buffered.
const LINE_LIMIT: usize = 1 << 20;

/// Reader of newline-separated JSON.
#[derive(Debug)]
pub(super) struct JsonLines {
    body: Incoming,
    buffer: BytesMut,
    /// Bytes of `buffer` already searched for a newline.
    searched: usize,
    ended: bool,
    /// Inside a line that is too long, of which nothing is kept.
    passing: bool,
}

impl JsonLines {
    pub fn new(body: Incoming) -> Self {
        Self {
            body,
            buffer: BytesMut::new(),
            searched: 0,
            ended: false,
            passing: false,
        }
    }

    /// The next object, `None` at the orderly end of the answer.
    ///
    /// # Errors
    /// The connection fails, or the object is no JSON or too large.
    pub async fn next(&mut self, step: &str) -> Result<Option<serde_json::Value>, DockerError> {
        loop {
            if let Some(at) = self.buffer[self.searched..]
                .iter()
                .position(|byte| *byte == b'\n')
            {
                let line = self.buffer.split_to(self.searched + at);
                self.buffer.advance(1);
                self.searched = 0;
                if std::mem::take(&mut self.passing) {
                    continue;
                }
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return parse(step, &line).map(Some);
            }
            self.searched = self.buffer.len();
            if self.passing {
                self.buffer.clear();
                self.searched = 0;
            }
            if self.buffer.len() > LINE_LIMIT {
                // Whoever asks again gets the next line.
                self.passing = true;
                return Err(DockerError::TooLarge {
                    step: step.to_owned(),
                    limit: LINE_LIMIT as u64,
                });
            }
            if self.ended {
                let line = std::mem::take(&mut self.buffer);
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    return Ok(None);
                }
                return parse(step, &line).map(Some);
            }
            match self.body.frame().await {
                None => self.ended = true,
                Some(Ok(frame)) => {
                    if let Ok(chunk) = frame.into_data() {
                        self.buffer.extend_from_slice(&chunk);
                    }
                }
                Some(Err(source)) => {
                    return Err(DockerError::Broken {
                        step: step.to_owned(),
                        source: source.into(),
                    });
                }
            }
        }
    }
}

fn parse(step: &str, line: &[u8]) -> Result<serde_json::Value, DockerError> {
    serde_json::from_slice(line).map_err(|source| DockerError::Undecodable {
        step: step.to_owned(),
        source: source.into(),
    })
}
