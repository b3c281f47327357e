//! Committing a kernel: its container's files as an image of this node, or as a compressed archive
//! in the commit directory.
//!
//! In: an order. Out: the image under the name asked for, or `SUBDIR/FILENAME`, complete or not at
//! all. Invariants: no name of another image is touched on the way (the manager sends the name of
//! the *base* image with an archive; the original gives that name to the commit and then deletes it,
//! and the node has lost its image); the archive appears under its name only when it is whole and on
//! the disk; what was begun is removed when it can't be finished, and no kernel stays paused by it,
//! nor goes on under another one: the engine commits one kernel once at a time.
//! What a commit may leave behind is noted before it begins, under an id that its image bears as a
//! label, by which it is found, and as its comment, which no image that is made from it inherits: so
//! an engine or an agent that dies over it leaves nothing for good, and nothing is removed that
//! another has made.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use shared::ids::{ContainerId, KernelId};
use thiserror::Error;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::container_request::{
    HELD_FOLDERS_LABEL, HOST_PORTS_LABEL, SESSION_TYPE_LABEL, SLOTS_LABEL,
};
use super::node::Node;
use super::record::Record;
use super::registry::Kernel;
use crate::background::Reporter;
use crate::blocking::blocking;
use crate::docker::{CommitRequest, DockerError};

/// Pieces between the engine and the compressor; each is 64 KiB or less.
const PIECES: usize = 16;
/// Shortest and longest time between two tries to let a kernel go on.
const GO_ON_PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// How long the removal of an image that is not needed may be waited for when a commit ends.
const CLEAN_UP: Duration = Duration::from_secs(60);
/// Shortest and longest time between two looks for the image of a commit that was cut short.
const LOOKS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// How long an engine may go on with a commit that nobody waits for: as long as one is waited for.
const LOOKED_FOR: Duration = Duration::from_secs(7200);
/// Label of an image with the id of the commit that made it.
const COMMIT_LABEL: &str = "ai.backend.internal.commit";
/// Label of the image's services, which a kernel's container extends.
const SERVICES_LABEL: &str = "ai.backend.service-ports";
/// Labels that say whose a container is. In an image they would make strangers' containers ours.
const LABELS_OF_A_KERNEL: [&str; 10] = [
    "ai.backend.kernel-id",
    "ai.backend.session-id",
    "ai.backend.owner",
    "ai.backend.owner-user-id",
    "ai.backend.owner-project-id",
    "ai.backend.internal.block-service-ports",
    HOST_PORTS_LABEL,
    SLOTS_LABEL,
    SESSION_TYPE_LABEL,
    HELD_FOLDERS_LABEL,
];

/// What is to be made of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CommitOrder {
    /// Directory below the commit directory: the owner's.
    pub subdir: String,
    /// Name of the new image; not used for an archive.
    pub canonical: Option<String>,
    /// Labels of the new image.
    pub labels: BTreeMap<String, String>,
    /// File name of the archive; without one the image stays on the node.
    pub filename: Option<String>,
}

/// Why a commit failed.
#[derive(Debug, Error)]
pub enum CommitError {
    /// The place of the archive is not below the commit directory.
    #[error("malformed committed path: {0:?} must be a plain name below the commit directory")]
    Path(String),
    /// The kernel has no container.
    #[error("kernel {0} has no container that could be committed")]
    NoContainer(shared::ids::KernelId),
    /// The engine could not commit or export.
    #[error("the container could not be committed")]
    Engine(#[source] DockerError),
    /// A directory could not be made.
    #[error("cannot make the directory {path}; see that agent.image-commit-path is writable")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive was not there in time.
    #[error(
        "the archive {path} was not written in {} s; see whether the disk of agent.image-commit-path answers, and \
         api.commit-timeout",
        after.as_secs()
    )]
    Late {
        /// Which.
        path: PathBuf,
        /// The deadline that passed.
        after: Duration,
    },
    /// The archive could not be written.
    #[error("cannot write the archive {path}; see that its disk has room")]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl CommitOrder {
    /// Checks the names and gives `SUBDIR/FILENAME`, which the caller is told.
    ///
    /// # Errors
    /// A name leads away from the commit directory.
    pub fn path(&self) -> Result<Option<String>, CommitError> {
        plain(&self.subdir)?;
        let Some(filename) = &self.filename else {
            return Ok(None);
        };
        // Of an image whose project has several parts, the manager puts one into the file's name.
        plain(filename)?;
        let path = Path::new(&self.subdir).join(filename);
        Ok(Some(path.to_string_lossy().into_owned()))
    }
}

/// Refuses a path that leads anywhere but below the directory it is joined to.
fn plain(path: &str) -> Result<(), CommitError> {
    let mut parts = Path::new(path).components().peekable();
    let some = parts.peek().is_some();
    if some && parts.all(|part| matches!(part, Component::Normal(_))) && !path.contains('\0') {
        Ok(())
    } else {
        Err(CommitError::Path(path.to_owned()))
    }
}

/// Carries an order out.
///
/// # Errors
/// The same; there is no container, or the engine or the disk fails.
pub async fn commit(
    node: Arc<Node>,
    kernel: Arc<Kernel>,
    order: CommitOrder,
    mut reporter: Reporter,
) -> Result<Option<String>, CommitError> {
    let container = kernel
        .container()
        .ok_or(CommitError::NoContainer(kernel.id))?;
    let archive = order.filename.as_ref().map(|filename| {
        let commits = &node.config.agent.image_commit_path;
        commits.join(&order.subdir).join(filename)
    });
    let mut note = CommitNote::note(&node, archive.as_deref()).await;
    let mut request = CommitRequest {
        name: match order.filename {
            Some(_) => None,
            None => order.canonical.clone(),
        },
        labels: kernel.with_record(|record| labels(record, &order)),
        comment: note.id.hyphenated().to_string(),
    };
    let id = request.comment.clone();
    request.labels.insert(COMMIT_LABEL.to_owned(), id);
    reporter.update(0, 0, || "Committing the container".to_owned());
    tracing::info!(kernel_id = %kernel.id, archive = order.filename, image = request.name, "committing a kernel");
    let image = match commit_paused(&node, &kernel, container, &request).await {
        Ok(image) => image,
        Err(err) => {
            if is_answer(&err) {
                note.image = ImageState::Settled;
            }
            return Err(CommitError::Engine(err));
        }
    };
    let written = match archive.zip(note.note.part.clone()) {
        Some((path, part)) => {
            note.image = ImageState::Settled;
            let after = node.docker.commit_deadline();
            let archive = export(&node, &image, &path, part, &mut reporter);
            match tokio::time::timeout(after, archive).await {
                Ok(written) => written,
                Err(_) => Err(CommitError::Late { path, after }),
            }
        }
        None => {
            note.image = ImageState::Wanted;
            Ok(())
        }
    };
    note.end().await;
    written.map(|()| None)
}

/// Whether the engine itself has said that a step failed: it is not at work on it any more.
fn is_answer(err: &DockerError) -> bool {
    matches!(
        err,
        DockerError::NotFound { .. }
            | DockerError::Conflict { .. }
            | DockerError::Engine { .. }
            | DockerError::BadName { .. }
    )
}

/// An engine that dies over a commit leaves the container paused, and with live-restore finds it so
/// when it is back: the journal knows, until it goes on.
async fn commit_paused(
    node: &Arc<Node>,
    kernel: &Arc<Kernel>,
    container: ContainerId,
    request: &CommitRequest,
) -> Result<String, DockerError> {
    // What one commit pauses, no other lets go on.
    let _turn = kernel.committing.lock().await;
    // By somebody else, who will want it to stay so.
    let paused = is_paused(node, container).await?;
    if !paused {
        node.note(kernel, |record| record.pausing = true).await;
    }
    let committed = node
        .docker
        .commit_container(&container.to_string(), request)
        .await;
    if !paused {
        go_on(node, kernel);
    }
    committed
}

async fn is_paused(node: &Node, container: ContainerId) -> Result<bool, DockerError> {
    let found = node.docker.inspect(&container.to_string()).await?;
    Ok(found.state.and_then(|state| state.paused) == Some(true))
}

/// Sees to it, in the background, that a kernel whose commit has failed is not paused any more.
pub fn go_on(node: &Arc<Node>, kernel: &Arc<Kernel>) {
    let (node, kernel) = (node.clone(), kernel.clone());
    node.clone().tasks.spawn(async move {
        let mut pause = GO_ON_PAUSES.0;
        loop {
            // A commit may have begun meanwhile.
            let turn = tokio::select! {
                turn = kernel.committing.lock() => turn,
                () = node.stopping.cancelled() => return,
            };
            let Some(container) = kernel.container().filter(|_| kernel.is_running()) else {
                return;
            };
            match let_go_on(&node, container).await {
                Ok(()) => {
                    node.note(&kernel, |record| record.pausing = false).await;
                    return;
                }
                Err(err) if err.is_not_found() => return,
                Err(err) => {
                    tracing::warn!(kernel_id = %kernel.id, err = &err as &dyn std::error::Error,
                        "a kernel whose commit has failed may be paused; trying again to let it go on");
                }
            }
            drop(turn);
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                // The next start does it.
                () = node.stopping.cancelled() => return,
            }
            pause = (pause * 2).min(GO_ON_PAUSES.1);
        }
    });
}

async fn let_go_on(node: &Node, container: ContainerId) -> Result<(), DockerError> {
    if is_paused(node, container).await? {
        node.docker.unpause(&container.to_string()).await?;
        tracing::info!(container_id = %container, "a container that a failed commit had left paused goes on");
    }
    Ok(())
}

/// Labels of the new image: those asked for, and none that say it were this kernel's container.
fn labels(record: &Record, order: &CommitOrder) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = LABELS_OF_A_KERNEL
        .iter()
        .map(|name| ((*name).to_owned(), String::new()))
        .collect();
    // The ports that one session had opened are no services of the image.
    if let Some(request) = &record.request {
        let services = request.image.label_or(SERVICES_LABEL, "").to_owned();
        labels.insert(SERVICES_LABEL.to_owned(), services);
    }
    labels.extend(order.labels.clone());
    labels
}

/// What is known of a commit's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ImageState {
    /// It may be there, or come yet: the engine may go on with what nobody waits for.
    Unknown,
    /// It is there and not wanted, or it is not there; nothing comes any more.
    Settled,
    /// It is what was asked for.
    Wanted,
}

/// What a commit under way may leave behind, beside the image that bears its id.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    /// The archive while it is written.
    part: Option<PathBuf>,
}

/// The note of a commit. What it names is removed when the commit ends, also when it is cut short.
struct CommitNote {
    node: Arc<Node>,
    id: Uuid,
    note: Note,
    image: ImageState,
    ended: bool,
}

impl CommitNote {
    async fn note(node: &Arc<Node>, archive: Option<&Path>) -> CommitNote {
        let id = Uuid::new_v4();
        let note = Note {
            part: archive.map(|path| part_of(path, id)),
        };
        let (commits, stored) = (node.commits.clone(), note.clone());
        let key = KernelId(id.into_bytes());
        if let Err(err) = blocking(move || commits.store(key, &stored)).await {
            tracing::warn!(
                err = &err as &dyn std::error::Error,
                "cannot note a commit; what it leaves behind when the agent is killed stays"
            );
        }
        CommitNote {
            node: node.clone(),
            id,
            note,
            image: ImageState::Unknown,
            ended: false,
        }
    }

    /// Clears up, and leaves to the background what takes long.
    async fn end(mut self) {
        let clearing = clear(&self.node, self.id, &self.note, self.image);
        self.ended = tokio::time::timeout(CLEAN_UP, clearing).await.is_ok();
    }
}

impl Drop for CommitNote {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let (node, id, image) = (self.node.clone(), self.id, self.image);
        let note = self.note.clone();
        node.clone()
            .tasks
            .spawn(async move { clear(&node, id, &note, image).await });
    }
}

/// The name of an archive while it is written.
fn part_of(path: &Path, id: Uuid) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.part", id.simple()))
}

/// Clears up after commits of earlier lives, in the background.
pub async fn clear_earlier(node: &Arc<Node>) {
    let commits = node.commits.clone();
    let (notes, damaged) = match blocking(move || commits.load::<Note>()).await {
        Ok(found) => found,
        Err(err) => {
            tracing::warn!(
                err = &err as &dyn std::error::Error,
                "cannot read the notes of commits; what those that were cut short have left stays"
            );
            return;
        }
    };
    for damaged in damaged {
        tracing::warn!(path = %damaged.path.display(), err = &damaged.reason as &dyn std::error::Error,
            "cannot read the note of a commit; what it has left behind stays");
    }
    for (id, note) in notes {
        let (node, id) = (node.clone(), Uuid::from_bytes(id.0));
        node.clone()
            .tasks
            .spawn(async move { clear(&node, id, &note, ImageState::Unknown).await });
    }
}

/// Removes what a commit has left, until that is known to be all, and then its note.
async fn clear(node: &Arc<Node>, id: Uuid, note: &Note, image: ImageState) {
    if image != ImageState::Wanted && !remove_all(node, id, note, image).await {
        return;
    }
    let commits = node.commits.clone();
    let key = KernelId(id.into_bytes());
    if let Err(err) = blocking(move || commits.remove(key)).await {
        tracing::warn!(
            err = &err as &dyn std::error::Error,
            "cannot remove the note of a commit; the next start looks again"
        );
    }
}

/// Removes what is there until that is known to be all; `false` when the agent stops before.
async fn remove_all(node: &Node, id: Uuid, note: &Note, image: ImageState) -> bool {
    let (began, mut pause) = (Instant::now(), LOOKS.0);
    loop {
        match remove_traces(node, id, note).await {
            // A commit makes one image.
            Ok(removed)
                if removed || image == ImageState::Settled || began.elapsed() >= LOOKED_FOR =>
            {
                return true;
            }
            Ok(_) => {}
            Err(err) => {
                tracing::warn!(err = &*err, commit = %id,
                    "cannot remove what a commit has left behind yet; trying again");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // The next start does it.
            () = node.stopping.cancelled() => return false,
        }
        pause = (pause * 2).min(LOOKS.1);
    }
}

/// Removes what is there, and says whether the image was.
async fn remove_traces(
    node: &Node,
    id: Uuid,
    note: &Note,
) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
    if let Some(part) = note.part.clone() {
        match blocking(move || std::fs::remove_file(part)).await {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err.into()),
            _ => {}
        }
    }
    let label = format!("{COMMIT_LABEL}={id}");
    let mut removed = false;
    for image in node.docker.list_unnamed(&label).await? {
        match node.docker.inspect_image(&image.id).await {
            Ok(found) if found.comment == id.hyphenated().to_string() => {}
            // Somebody has made it from that of the commit.
            Ok(_) => continue,
            Err(err) if err.is_not_found() => continue,
            Err(err) => return Err(err.into()),
        }
        removed = true;
        // The base image stays, whatever names it has.
        match node.docker.remove_image(&image.id, false, true).await {
            Ok(()) => {
                tracing::debug!(image = image.id, "removed the image of a commit");
            }
            Err(err) if err.is_not_found() => {}
            Err(err @ DockerError::Conflict { .. }) => {
                tracing::warn!(
                    image = image.id,
                    err = &err as &dyn std::error::Error,
                    "an image that a commit has left behind is in use and stays on the node"
                );
            }
            Err(err) => return Err(err.into()),
        }
    }
    Ok(removed)
}

/// Streams the image through a compressor into its file.
async fn export(
    node: &Arc<Node>,
    image: &str,
    path: &Path,
    part: PathBuf,
    reporter: &mut Reporter,
) -> Result<(), CommitError> {
    let directory = path.parent().map(Path::to_owned).unwrap_or_default();
    let target = directory.clone();
    blocking(move || std::fs::create_dir_all(&target))
        .await
        .map_err(|source| CommitError::Directory {
            path: directory,
            source,
        })?;
    // Only tells how far it is; the archive is of about that size.
    let total = node
        .docker
        .inspect_image(image)
        .await
        .map_or(0, |found| found.size);
    let (sender, pieces) = mpsc::channel::<Bytes>(PIECES);
    let writer = tokio::task::spawn_blocking(move || write_archive(part, pieces));
    let exported = pass_on(node, image, total, &sender, reporter).await;
    drop(sender);
    let written = match writer.await {
        Ok(written) => written,
        Err(err) => Err(io::Error::other(err)),
    };
    // What is not named after all goes away.
    exported.map_err(CommitError::Engine)?;
    let named = match written {
        Ok(unfinished) => {
            let path = path.to_owned();
            blocking(move || std::fs::rename(&unfinished.0, path)).await
        }
        Err(err) => Err(err),
    };
    named.map_err(|source| CommitError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Hands the engine's pieces to the writer, until all are there or the writer has given up.
async fn pass_on(
    node: &Node,
    image: &str,
    total: u64,
    writer: &mpsc::Sender<Bytes>,
    reporter: &mut Reporter,
) -> Result<(), DockerError> {
    let mut export = node.docker.export_image(image).await?;
    let mut done = 0;
    while let Some(piece) = export.next().await? {
        done += piece.len() as u64;
        reporter.update(done, total.max(done), || "Writing the archive".to_owned());
        if writer.send(piece).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// Writes the pieces to `part`, a file that goes away unless it is renamed.
fn write_archive(part: PathBuf, mut pieces: mpsc::Receiver<Bytes>) -> io::Result<Unfinished> {
    let unfinished = Unfinished(part);
    let file = std::fs::File::create_new(&unfinished.0)?;
    let mut archive = GzEncoder::new(io::BufWriter::new(file), Compression::default());
    while let Some(piece) = pieces.blocking_recv() {
        archive.write_all(&piece)?;
    }
    let mut buffer = archive.finish()?;
    buffer.flush()?;
    buffer.get_ref().sync_all()?;
    Ok(unfinished)
}

/// A file that goes away unless it was renamed.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Gone already when it was renamed.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn order(subdir: &str, filename: Option<&str>) -> CommitOrder {
        CommitOrder {
            subdir: subdir.to_owned(),
            canonical: None,
            labels: BTreeMap::new(),
            filename: filename.map(str::to_owned),
        }
    }

    #[test]
    fn archives_lie_below_the_commit_directory() {
        let path = order("user_example.com", Some("a.tar.gz")).path().unwrap();
        assert_eq!(path.as_deref(), Some("user_example.com/a.tar.gz"));
        let path = order("a", Some("s_team/python.tar.gz")).path().unwrap();
        assert_eq!(path.as_deref(), Some("a/s_team/python.tar.gz"));
        assert_eq!(order("user_example.com", None).path().unwrap(), None);
        for (subdir, filename) in [
            ("..", Some("a")),
            ("/etc", Some("a")),
            ("", Some("a")),
            ("a/../../b", Some("a")),
            ("a", Some("../b")),
            ("a", Some("/b")),
            ("a", Some("")),
            ("a", Some("b\0c")),
            ("../x", None),
        ] {
            let err = order(subdir, filename).path().unwrap_err();
            assert!(matches!(err, CommitError::Path(_)), "{subdir} {filename:?}");
        }
    }

    #[test]
    fn an_archive_that_nobody_names_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.tar.gz");
        let write = || {
            let (sender, receiver) = mpsc::channel(2);
            for piece in [&b"one "[..], b"two"] {
                sender.try_send(Bytes::from_static(piece)).unwrap();
            }
            drop(sender);
            write_archive(part_of(&path, Uuid::new_v4()), receiver).unwrap()
        };
        let files = || std::fs::read_dir(directory.path()).unwrap().count();
        let written = write();
        assert_eq!(files(), 1);
        drop(written);
        assert_eq!(files(), 0);
        std::fs::rename(&write().0, &path).unwrap();
        let mut text = String::new();
        flate2::read::GzDecoder::new(std::fs::File::open(&path).unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "one two");
    }
}
