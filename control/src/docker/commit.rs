//! A container's files as an image, and an image as a tar stream.
//!
//! Invariant: the stream is handed on chunk by chunk and never gathered; a reader that is slow holds
//! the engine back, one that has gone ends the exchange.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::Method;
use serde::Deserialize;

use super::Docker;
use super::error::DockerError;
use super::transport::{Call, Class, Streaming, image_path, segment, within};

/// How a tar archive ends: two blocks of zeros.
const TRAILER: usize = 1024;
/// What of an archive's last bytes is kept, to say what the engine said instead of the rest.
const TAIL: usize = 512;

/// What a commit makes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CommitRequest {
    /// The new image's name (`registry/name:tag`); without one it has only its id.
    pub name: Option<String>,
    /// Labels of the image beside those of the container; these win.
    pub labels: BTreeMap<String, String>,
    /// What the image says of its making. Unlike labels, an image made from it does not have that.
    pub comment: String,
}

impl Docker {
    /// Makes an image of a container, which is paused meanwhile, and returns its id.
    ///
    /// # Errors
    /// `NotFound` when the container is gone, `Engine` with the engine's words, `Timeout`.
    pub async fn commit_container(
        &self,
        container: &str,
        request: &CommitRequest,
    ) -> Result<String, DockerError> {
        #[derive(Deserialize)]
        struct Committed {
            #[serde(rename = "Id")]
            id: String,
        }
        let step = format!("commit container {container}");
        // Labels go into the configuration, which the engine merges with the container's: as lines
        // of a Dockerfile a value with a blank or a line break would become something else.
        let mut call = Call::new(
            step.clone(),
            Class::Transfer,
            self.deadlines.commit,
            Method::POST,
            "/commit".into(),
        )
        .query("container", segment(&step, container)?)
        .query("comment", request.comment.as_str())
        .json(&serde_json::json!({ "Labels": request.labels }))?;
        if let Some(name) = &request.name {
            image_path(&step, name)?;
            let (repo, tag) = super::progress::split_reference(name);
            call = call.query("repo", repo).query("tag", tag);
        }
        let committed: Committed = self.transport.json(call).await?;
        Ok(committed.id)
    }

    /// Lets the processes of a paused container go on.
    ///
    /// # Errors
    /// `NotFound` when the container is gone, `Engine` when it is not paused, `Timeout`.
    pub async fn unpause(&self, container: &str) -> Result<(), DockerError> {
        let step = format!("let container {container} go on");
        let path = format!("/containers/{}/unpause", segment(&step, container)?);
        let deadline = self.deadlines.change;
        let call = Call::new(step, Class::Slow, deadline, Method::POST, path);
        self.transport.unit(call).await
    }

    /// Begins to stream an image as the tar archive that `docker load` reads.
    ///
    /// # Errors
    /// `NotFound`, `Timeout`.
    pub async fn export_image(&self, image: &str) -> Result<ImageExport, DockerError> {
        let step = format!("export image {image}");
        let path = format!("/images/{}/get", image_path(&step, image)?);
        // The engine gathers all layers in a temporary directory before it sends the first byte.
        let deadline = self.deadlines.commit;
        let call = Call::new(step.clone(), Class::Transfer, deadline, Method::GET, path);
        Ok(ImageExport {
            streaming: self.transport.stream(&call).await?,
            step,
            silence: self.deadlines.transfer_silence,
            end: End::default(),
        })
    }

    /// Longest that a commit may take (`api.commit-timeout`), and the archive of its image as well.
    pub fn commit_deadline(&self) -> Duration {
        self.deadlines.commit
    }
}

/// The last bytes of an archive.
#[derive(Debug, Default)]
struct End {
    zeros: usize,
    tail: Vec<u8>,
}

impl End {
    fn note(&mut self, piece: &[u8]) {
        let zeros = piece.iter().rev().take_while(|&&byte| byte == 0).count();
        self.zeros = if zeros == piece.len() {
            self.zeros.saturating_add(zeros)
        } else {
            zeros
        };
        let last = &piece[piece.len().saturating_sub(TAIL)..];
        self.tail.extend_from_slice(last);
        let excess = self.tail.len().saturating_sub(TAIL);
        self.tail.drain(..excess);
    }

    /// The engine puts its error into the archive, and then ends the answer as if it were whole.
    fn check(&self) -> Result<(), String> {
        if self.zeros >= TRAILER {
            return Ok(());
        }
        let tail = String::from_utf8_lossy(&self.tail);
        let said = tail
            .rfind("{\"message\":")
            .and_then(|at| serde_json::from_str::<serde_json::Value>(&tail[at..]).ok())
            .and_then(|said| Some(said.get("message")?.as_str()?.to_owned()));
        Err(match said {
            Some(said) => format!("the engine broke the archive off: {said}"),
            None => "the engine broke the archive off; its log may say why".to_owned(),
        })
    }
}

/// An image on its way out of the engine; dropping it ends the exchange.
#[derive(Debug)]
pub struct ImageExport {
    streaming: Streaming,
    step: String,
    silence: Duration,
    end: End,
}

impl ImageExport {
    /// The next piece, `None` at the end of a whole archive.
    ///
    /// # Errors
    /// `Timeout` when the stream stands still, `Broken` when it ends early, `Progress` when the engine
    /// has ended it before the archive was whole.
    pub async fn next(&mut self) -> Result<Option<Bytes>, DockerError> {
        let body = self.streaming.response.body_mut();
        loop {
            let frame = within(&self.step, self.silence, async {
                Ok(body.frame().await.transpose())
            })
            .await?
            .map_err(|source| DockerError::Broken {
                step: self.step.clone(),
                source: source.into(),
            })?;
            let Some(frame) = frame else {
                self.end.check().map_err(|message| DockerError::Progress {
                    step: self.step.clone(),
                    message,
                })?;
                return Ok(None);
            };
            if let Ok(chunk) = frame.into_data() {
                self.end.note(&chunk);
                return Ok(Some(chunk));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(pieces: &[&[u8]]) -> Result<(), String> {
        let mut end = End::default();
        for piece in pieces {
            end.note(piece);
        }
        end.check()
    }

    #[test]
    fn an_archive_is_whole_with_its_trailer_however_it_is_cut() {
        assert_eq!(ended(&[b"layer", &[0; TRAILER]]), Ok(()));
        assert_eq!(ended(&[b"layer\0", &[0; TRAILER - 2], b"", b"\0"]), Ok(()));
        let zeros = [0; TRAILER];
        let short = &zeros[1..];
        for pieces in [
            vec![],
            vec![&b"layer"[..]],
            vec![b"x", short],
            vec![&zeros, b"x"],
        ] {
            assert!(
                ended(&pieces).unwrap_err().contains("its log"),
                "{pieces:?}"
            );
        }
    }

    #[test]
    fn what_the_engine_says_in_the_archives_place_is_told() {
        let told = ended(&[&[7; 3000], b"{\"message\":\"no ", b"space left\"}\n"]).unwrap_err();
        assert!(told.ends_with(": no space left"), "{told}");
    }
}
