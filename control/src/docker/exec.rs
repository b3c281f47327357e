//! A command inside a running container.
//!
//! The engine offers no way to end an exec: after a timeout the command goes on in the container.

use bytes::BytesMut;
use http_body_util::BodyExt;
use hyper::Method;
use serde::Deserialize;

use super::error::DockerError;
use super::logs::{Demultiplexer, Stream};
use super::transport::{Call, Class, segment, within};
use super::{Created, Docker};

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// User (name, uid or uid:gid); `None` is the container's.
    pub user: Option<String>,
    /// Additional `KEY=VALUE` entries.
    pub env: Vec<String>,
    /// Working directory; `None` is the container's.
    pub working_dir: Option<String>,
    /// Bytes kept of each of the two streams; the rest is read and counted.
    pub keep: usize,
    /// A user asks: it waits its turn among such calls, not among those that kernels end by.
    pub for_user: bool,
}

impl ExecRequest {
    /// A command with default settings: the container's user, 1 MiB of each stream kept, asked by the
    /// agent itself.
    pub fn new(argv: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            user: None,
            env: Vec::new(),
            working_dir: None,
            keep: 1 << 20,
            for_user: false,
        }
    }
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// First `keep` bytes of standard output.
    pub stdout: Vec<u8>,
    /// First `keep` bytes of standard error.
    pub stderr: Vec<u8>,
    /// Bytes of both streams that were not kept.
    pub cut: u64,
    /// Exit code; 126 and 127 also when the program can't be started.
    pub exit_code: i64,
}

impl Docker {
    /// Runs a command to its end, within `deadlines.exec`.
    ///
    /// # Errors
    /// `NotFound` and `Conflict` when the container is gone or does not run.
    pub async fn exec(
        &self,
        container: &str,
        request: &ExecRequest,
    ) -> Result<ExecOutput, DockerError> {
        #[derive(Deserialize)]
        struct Ended {
            #[serde(rename = "ExitCode")]
            exit_code: Option<i64>,
        }
        let program = request.argv.first().map_or("", String::as_str);
        let step = format!("run {program} in container {container}");
        let path = format!("/containers/{}/exec", segment(&step, container)?);
        let body = serde_json::json!({
            "AttachStdout": true,
            "AttachStderr": true,
            "Tty": false,
            "Cmd": request.argv,
            "User": request.user.as_deref().unwrap_or(""),
            "Env": request.env,
            "WorkingDir": request.working_dir.as_deref().unwrap_or(""),
        });
        let deadline = self.deadlines.exec;
        within(&step, deadline, async {
            let mut create = self.change(step.clone(), deadline, path);
            if request.for_user {
                create.class = Class::Read;
            }
            let created: Created = self.transport.json(create.json(&body)?).await?;
            let id = segment(&step, &created.id)?;
            let start = Call::new(
                step.clone(),
                Class::asked(request.for_user),
                deadline,
                Method::POST,
                format!("/exec/{id}/start"),
            )
            .json(&serde_json::json!({ "Detach": false, "Tty": false }))?;
            let streaming = self.transport.stream(&start).await?;
            let mut body = streaming.response.into_body();
            let mut frames = Demultiplexer::default();
            let (mut stdout, mut stderr) = (BytesMut::new(), BytesMut::new());
            let mut cut = 0u64;
            while let Some(frame) = body.frame().await {
                let frame = frame.map_err(|source| DockerError::Broken {
                    step: step.clone(),
                    source: source.into(),
                })?;
                let Ok(chunk) = frame.into_data() else {
                    continue;
                };
                frames.push(chunk, |stream, piece| {
                    let kept = match stream {
                        Stream::Output => &mut stdout,
                        Stream::Error => &mut stderr,
                    };
                    let room = request.keep.saturating_sub(kept.len()).min(piece.len());
                    kept.extend_from_slice(&piece[..room]);
                    cut += (piece.len() - room) as u64;
                });
            }
            let ended: Ended = self
                .transport
                .json(self.query(step.clone(), format!("/exec/{id}/json")))
                .await?;
            let Some(exit_code) = ended.exit_code else {
                return Err(DockerError::Broken {
                    step: step.clone(),
                    source: "the output ended but the command still runs".into(),
                });
            };
            Ok(ExecOutput {
                stdout: stdout.to_vec(),
                stderr: stderr.to_vec(),
                cut,
                exit_code,
            })
        })
        .await
    }
}
