//! Files into and out of a kernel.

use std::sync::Arc;

use bytes::Bytes;

use super::super::arguments::Arguments;
use super::super::failure::Failure;
use super::super::value::Value;
use super::{PATIENCE, known_kernel, reply};
use crate::causes::chain;
use crate::kernel::environment::{self, Identity};
use crate::kernel::file_access::{self, FileAccessError, SessionUser, UploadTarget};
use crate::kernel::node::Node;
use crate::kernel::registry::Kernel;

/// What the runner's entrypoint takes when it is told no user.
const ENTRYPOINT_ID: u32 = 9001;

fn refused(err: &FileAccessError) -> Failure {
    Failure::new(err.python_class(), chain(err))
}

/// What is asked of a file, within [`PATIENCE`]. What blocks in a file system goes on, and nobody hears of it.
async fn in_time<T>(
    path: &str,
    done: &str,
    work: impl Future<Output = Result<T, FileAccessError>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(PATIENCE, Box::pin(work)).await {
        Ok(outcome) => outcome.map_err(|err| refused(&err)),
        Err(_) => Err(Failure::new(
            "TimeoutError",
            format!(
                "{path} could not be {done} within {} s; do its file system and the Docker engine answer?",
                PATIENCE.as_secs()
            ),
        )),
    }
}

fn container_of(kernel: &Kernel) -> Result<String, Failure> {
    kernel
        .container()
        .map(|container| container.to_string())
        .ok_or_else(|| Failure::runtime_error(format!("kernel {} has no container", kernel.id)))
}

pub(super) async fn upload(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let name: String = args.get("filename")?;
    let content: Bytes = match args.take("filedata") {
        Value::Bin(content) => content,
        other => {
            return Err(Failure::type_error(format!(
                "filedata must be bytes, not {}",
                other.kind()
            )));
        }
    };
    let place = upload_target(node, &kernel);
    let path = name.clone();
    in_time(
        &path,
        "written",
        file_access::upload_file(place, name, content),
    )
    .await?;
    Ok(Value::Nil)
}

/// The user and group that the kernel's processes have.
fn owner_of(node: &Node, kernel: &Kernel) -> (u32, u32) {
    let container = &node.config.container;
    let request = kernel.with_record(|record| record.request.clone());
    match request {
        Some(request) => {
            let identity = Identity::of(&request, container.kernel_uid, container.kernel_gid);
            (
                identity.uid.unwrap_or(ENTRYPOINT_ID),
                identity.gid.unwrap_or(ENTRYPOINT_ID),
            )
        }
        // A kernel found without a journal: the node's own user is the best guess.
        None => (container.kernel_uid, container.kernel_gid),
    }
}

/// Who the kernel's processes are, with the groups that their container was given.
async fn session_user(node: &Node, kernel: &Kernel) -> SessionUser {
    let (uid, gid) = owner_of(node, kernel);
    let (id, environ) = kernel.with_record(|record| (record.kernel_id, record.environ.clone()));
    let environ = match environ {
        Some(environ) => environ,
        // A kernel of an earlier release, or without a journal.
        None => match node.scratch.read_config(id, "environ.txt").await {
            Ok(text) => environment::parse(&text.unwrap_or_default()),
            Err(err) => {
                tracing::debug!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                    "cannot tell the groups of a kernel; its files are listed without them");
                environment::parse("")
            }
        },
    };
    SessionUser {
        uid,
        gid,
        groups: environment::additional_gids(&environ).into_iter().collect(),
    }
}

fn upload_target(node: &Node, kernel: &Kernel) -> UploadTarget {
    let (uid, gid) = owner_of(node, kernel);
    kernel.with_record(|record| UploadTarget {
        work_dir: node.scratch.paths(record.kernel_id).work,
        uid,
        gid,
        mounts: record
            .mounts
            .iter()
            .map(|mount| mount.target.clone())
            .filter(|target| target.starts_with("/home/work/"))
            .collect(),
    })
}

pub(super) async fn download(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let path: String = args.get("filepath")?;
    let container = container_of(&kernel)?;
    let archive = file_access::download_file(&node.docker, &container, &path);
    in_time(&path, "read", archive).await.map(Value::Bin)
}

pub(super) async fn download_single(
    node: &Arc<Node>,
    mut args: Arguments,
) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let path: String = args.get("filepath")?;
    let container = container_of(&kernel)?;
    let content = file_access::download_single(&node.docker, &container, &path);
    in_time(&path, "read", content).await.map(Value::Bin)
}

pub(super) async fn list(node: &Arc<Node>, mut args: Arguments) -> Result<Value, Failure> {
    let kernel = known_kernel(node, &args)?;
    let path: String = args.get("path")?;
    let container = container_of(&kernel)?;
    let listing = async {
        let user = session_user(node, &kernel).await;
        file_access::list_files(&node.docker, &container, &path, &user).await
    };
    reply(&in_time(&path, "listed", listing).await?)
}
