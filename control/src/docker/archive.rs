//! Files out of a container as a tar archive of bounded size.

use std::time::Duration;

use hyper::Method;

use super::Docker;
use super::error::DockerError;
use super::transport::{Call, Class, collect, segment, within_since};

impl Docker {
    /// The file or directory at `path` inside the container, as tar bytes of at most `limit`, within
    /// `deadlines.archive`.
    ///
    /// # Errors
    /// `NotFound` when the container or the path is missing, `TooLarge` beyond the limit.
    pub async fn archive(
        &self,
        container: &str,
        path: &str,
        limit: usize,
    ) -> Result<bytes::Bytes, DockerError> {
        let step = format!("copy {path} from container {container}");
        let target = format!("/containers/{}/archive", segment(&step, container)?);
        let deadline: Duration = self.deadlines.archive;
        let call =
            Call::new(step.clone(), Class::Read, deadline, Method::GET, target).query("path", path);
        let streaming = self.transport.stream(&call).await?;
        let body = collect(&step, streaming.response.into_body(), limit);
        within_since(&step, streaming.begun, deadline, body).await
    }
}
