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
            Class::Slow,
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
        let call = Call::new(step.clone(), Class::Slow, deadline, Method::GET, path);
        Ok(ImageExport {
            streaming: self.transport.stream(&call).await?,
            step,
            silence: self.deadlines.transfer_silence,
        })
    }
}

/// An image on its way out of the engine; dropping it ends the exchange.
#[derive(Debug)]
pub struct ImageExport {
    streaming: Streaming,
    step: String,
    silence: Duration,
}

impl ImageExport {
    /// The next piece, `None` at the orderly end.
    ///
    /// # Errors
    /// `Timeout` when the stream stands still, `Broken` when it ends early.
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
                return Ok(None);
            };
            if let Ok(chunk) = frame.into_data() {
                return Ok(Some(chunk));
            }
        }
    }
}
