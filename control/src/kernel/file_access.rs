//! A user's files in a kernel: upload, download, listing.
//!
//! In: names as clients give them, relative to `/home/work`. Out: file contents and lists. Uploads are
//! written by this process into the kernel's work directory, which the user controls: paths are resolved
//! by the kernel beneath that directory, and new files belong to the kernel's user (in the original they
//! belong to root, and the check is a moment before the use). Downloads and lists go through the engine;
//! a list shows what the session's own processes may see, neither more nor less.

use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use bytes::Bytes;
use serde::Serialize;

use super::mounts::WORK;
use super::scratch::beneath::{Beneath, LeadsOut, Owner, Shut};
use crate::docker::{Docker, DockerError, ExecRequest};

/// Largest archive a download may have.
const DOWNLOAD_LIMIT: usize = 1024 * 1024;
/// The runner's own Python, in every kernel's container.
const PYTHON: &str = "/opt/backend.ai/bin/python";
/// The runner's program that becomes a user with any groups: an exec of the engine with a user and a
/// group has no others. It is linked statically, so that nothing of the container is run by root.
const SU_EXEC: &str = "/opt/kernel/su-exec";
/// The group `shadow`, which the runner's entrypoint gives to each session.
const SHADOW_GID: u32 = 42;
/// Bytes of a listing; the script stops before.
const LISTING_LIMIT: usize = 2 * 1024 * 1024;

/// Prints a directory as JSON. Names that are not UTF-8 are shown with replacement characters.
const LISTING: &str = r#"
import json, os, stat, sys
path, limit = sys.argv[1], int(sys.argv[2])
items, size = [], 2
try:
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except OSError as err:
                print(f"{entry.name}: {err.strerror}", file=sys.stderr)
                continue
            item = json.dumps({
                "mode": stat.filemode(found.st_mode),
                "size": found.st_size,
                "ctime": found.st_ctime,
                "mtime": found.st_mtime,
                "atime": found.st_atime,
                "filename": os.fsencode(entry.name).decode("utf-8", "replace"),
            })
            size += len(item) + 2
            if size > limit:
                print("the directory has too many entries; the rest is left out", file=sys.stderr)
                break
            items.append(item)
except OSError as err:
    print(f"{path}: {err.strerror}", file=sys.stderr)
sys.stdout.write("[" + ", ".join(items) + "]")
"#;

/// Why a file operation failed.
#[derive(Debug, thiserror::Error)]
pub enum FileAccessError {
    /// The path leaves the user's directory.
    #[error("{path:?} is outside of {WORK}; give a path relative to it")]
    Outside {
        /// As the client gave it.
        path: String,
    },
    /// A link of the user's leads an upload elsewhere than into the kernel's own directory. One that is
    /// absolute is taken from the root of the host, where uploads are written.
    #[error(
        "{path:?} goes by the link {link:?}, which is absolute or leads out of {WORK}; make it a relative link, \
         or upload to the path that it leads to"
    )]
    Link {
        /// As the client gave it.
        path: String,
        /// The link, relative to the user's directory.
        link: String,
    },
    /// The path is in a mounted folder, whose files are not in the kernel's own directory.
    #[error("{path:?} is in the mounted folder {mount}; upload to the folder itself")]
    InMount {
        /// As the client gave it.
        path: String,
        /// Where the folder is mounted.
        mount: String,
    },
    /// Its place on the node refuses the agent.
    #[error(
        "the agent may not write {path:?}; let it be written by the session instead, or see the modes and flags \
         (chmod, chattr) of the file and of the directories above it"
    )]
    Denied {
        /// As the client gave it.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The file could not be written.
    #[error("{path:?} cannot be written")]
    Write {
        /// As the client gave it.
        path: String,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// More than a download may have.
    #[error("{path:?} is larger than {} KiB; put it into a folder to fetch it", DOWNLOAD_LIMIT / 1024)]
    TooLarge {
        /// As the client gave it.
        path: String,
    },
    /// Not exactly one file.
    #[error("{path:?} is not a single file; download it as an archive")]
    NotSingle {
        /// As the client gave it.
        path: String,
    },
    /// The runner's Python could not be started.
    #[error("the directory cannot be listed (exit code {exit_code}): {reason}")]
    Listing {
        /// Exit code.
        exit_code: i64,
        /// What it said.
        reason: String,
    },
    /// The engine could not do it.
    #[error("{path:?} cannot be read from the container")]
    Engine {
        /// As the client gave it.
        path: String,
        /// Cause.
        source: DockerError,
    },
}

impl FileAccessError {
    /// The Python exception class the manager expects.
    pub fn python_class(&self) -> &'static str {
        match self {
            FileAccessError::Outside { .. }
            | FileAccessError::Link { .. }
            | FileAccessError::InMount { .. }
            | FileAccessError::Denied { .. } => "PermissionError",
            FileAccessError::TooLarge { .. } | FileAccessError::NotSingle { .. } => "ValueError",
            FileAccessError::Write { .. }
            | FileAccessError::Listing { .. }
            | FileAccessError::Engine { .. } => "RuntimeError",
        }
    }

    fn engine(path: &str, source: DockerError) -> Self {
        let path = path.to_owned();
        match source {
            DockerError::TooLarge { .. } => FileAccessError::TooLarge { path },
            source => FileAccessError::Engine { path, source },
        }
    }
}

/// Where uploads to a kernel go.
#[derive(Clone, Debug)]
pub struct UploadTarget {
    /// `<scratch>/work` on the host.
    pub work_dir: PathBuf,
    /// The kernel's user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Container paths of folders mounted below `/home/work`.
    pub mounts: Vec<String>,
}

/// Who the processes of a session are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionUser {
    /// The user.
    pub uid: u32,
    /// The main group.
    pub gid: u32,
    /// The other groups that the kernel was given.
    pub groups: Vec<u32>,
}

impl SessionUser {
    /// Arguments that run a command as this user, the way the runner's entrypoint does. None for root,
    /// whose session is the container's user.
    fn become_user(&self) -> Vec<String> {
        if self.uid == 0 {
            return Vec::new();
        }
        let groups = self.groups.iter().chain([&SHADOW_GID]);
        let groups: String = groups.map(|gid| format!(",{gid}")).collect();
        let user = format!("{}:{}{groups}", self.uid, self.gid);
        vec![SU_EXEC.to_owned(), user]
    }
}

/// The absolute path inside the container, `.` and `..` resolved by name; below `/home/work` or refused.
fn inside(path: &str) -> Result<PathBuf, FileAccessError> {
    let mut resolved = PathBuf::from("/");
    for component in Path::new(WORK).join(path).components() {
        match component {
            Component::Normal(name) => resolved.push(name),
            Component::ParentDir => {
                resolved.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    if resolved.starts_with(WORK) && !path.contains('\0') {
        Ok(resolved)
    } else {
        Err(FileAccessError::Outside {
            path: path.to_owned(),
        })
    }
}

/// Writes an uploaded file, making the directories above it. What is made belongs to the kernel's user; a
/// file that was there keeps its mode and its owner.
///
/// # Errors
/// The name leads out of the home or into a mounted folder, or the file cannot be written.
pub async fn upload_file(
    place: UploadTarget,
    name: String,
    content: Bytes,
) -> Result<(), FileAccessError> {
    const FILE_MODE: u32 = 0o644;
    const DIRECTORY_MODE: u32 = 0o755;
    let resolved = inside(&name)?;
    // An absolute name is not relative to the work directory, even where it leads there.
    let Ok(relative) = resolved.strip_prefix(WORK).map(Path::to_owned) else {
        return Err(FileAccessError::Outside { path: name });
    };
    if Path::new(&name).is_absolute() || relative.as_os_str().is_empty() {
        return Err(FileAccessError::Outside { path: name });
    }
    let in_mount = |path: String, mount: &Path| FileAccessError::InMount {
        path,
        mount: Path::new(WORK).join(mount).display().to_string(),
    };
    // Where their files would be in the work directory, on which they are mounted.
    let mounts: Vec<PathBuf> = (place.mounts.iter())
        .filter_map(|mount| Some(Path::new(mount).strip_prefix(WORK).ok()?.to_owned()))
        .filter(|mount| !mount.as_os_str().is_empty())
        .collect();
    if let Some(mount) = mounts.iter().find(|mount| relative.starts_with(mount)) {
        return Err(in_mount(name, mount));
    }
    let owner = Owner {
        uid: Some(place.uid),
        gid: Some(place.gid),
    };
    let write = move || -> Result<(), (io::Error, Option<PathBuf>)> {
        let work = Beneath::open(&place.work_dir)
            .map_err(|err| (err, None))?
            .without(mounts);
        let parent = relative.parent();
        let made = match parent.filter(|parent| !parent.as_os_str().is_empty()) {
            Some(parent) => work.make_directories(parent, DIRECTORY_MODE, owner),
            None => Ok(()),
        };
        made.and_then(|()| work.write_users(&relative, &content, FILE_MODE, owner))
            .map_err(|err| (err, work.link_out(&relative)))
    };
    let outcome = tokio::task::spawn_blocking(write)
        .await
        .unwrap_or_else(|err| Err((io::Error::other(err), None)));
    outcome.map_err(|(source, link)| {
        let shut = source.get_ref().and_then(|inner| inner.downcast_ref());
        match (shut, LeadsOut::is(&source), link) {
            (Some(Shut(mount)), ..) => in_mount(name, mount),
            (None, true, Some(link)) => FileAccessError::Link {
                path: name,
                link: link.display().to_string(),
            },
            (None, true, None) => FileAccessError::Outside { path: name },
            (None, false, _) if source.kind() == io::ErrorKind::PermissionDenied => {
                FileAccessError::Denied { path: name, source }
            }
            (None, false, _) => FileAccessError::Write { path: name, source },
        }
    })
}

/// A file or directory as a tar archive.
///
/// # Errors
/// The path leads out of the home, cannot be read, or holds too much.
pub async fn download_file(
    docker: &Docker,
    container: &str,
    path: &str,
) -> Result<Bytes, FileAccessError> {
    let resolved = inside(path)?;
    docker
        .archive(container, &resolved.to_string_lossy(), DOWNLOAD_LIMIT)
        .await
        .map_err(|source| FileAccessError::engine(path, source))
}

/// The content of one file.
///
/// # Errors
/// As for [`download_file`]; it is not a single file.
pub async fn download_single(
    docker: &Docker,
    container: &str,
    path: &str,
) -> Result<Bytes, FileAccessError> {
    let archive = download_file(docker, container, path).await?;
    single_member(&archive).ok_or_else(|| FileAccessError::NotSingle {
        path: path.to_owned(),
    })
}

fn single_member(archive: &[u8]) -> Option<Bytes> {
    let mut archive = tar::Archive::new(archive);
    let mut members = archive.entries().ok()?;
    let mut member = members.next()?.ok()?;
    if !member.header().entry_type().is_file() {
        return None;
    }
    let mut content = Vec::new();
    member.read_to_end(&mut content).ok()?;
    members.next().is_none().then(|| Bytes::from(content))
}

/// Answer of `list_files`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListFilesReply {
    /// JSON text of an array of items `mode`, `size`, `ctime`, `mtime`, `atime`, `filename`.
    pub files: String,
    /// What could not be listed, in words.
    pub errors: String,
    /// The path as it was asked for.
    pub abspath: String,
}

/// Lists a directory as the session's processes see it.
///
/// # Errors
/// The path is outside of the user's directory, or the engine or the runner's Python fails. A directory
/// that can't be read is no error: the reply says why.
pub async fn list_files(
    docker: &Docker,
    container: &str,
    path: &str,
    user: &SessionUser,
) -> Result<ListFilesReply, FileAccessError> {
    let resolved = inside(path)?;
    let directory = resolved.to_string_lossy().into_owned();
    // -I: nothing from the user's directory or environment takes part.
    let limit = (LISTING_LIMIT - 1024).to_string();
    let mut argv = user.become_user();
    let as_root = !argv.is_empty();
    argv.extend([PYTHON, "-I", "-c", LISTING, &directory, &limit].map(str::to_owned));
    let mut request = ExecRequest::new(argv);
    // Whatever user the image names: only root may become another one.
    request.user = as_root.then(|| "0:0".to_owned());
    request.keep = LISTING_LIMIT;
    request.for_user = true;
    let output = docker
        .exec(container, &request)
        .await
        .map_err(|source| FileAccessError::engine(path, source))?;
    if output.exit_code != 0 {
        let mut said = output.stderr;
        said.extend_from_slice(&output.stdout);
        let reason = String::from_utf8_lossy(&said).trim().to_owned();
        return Err(FileAccessError::Listing {
            exit_code: output.exit_code,
            reason,
        });
    }
    Ok(ListFilesReply {
        files: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        abspath: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::scratch::beneath::forgo_rights;
    use std::fs::Permissions;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn paths_stay_in_the_users_directory() {
        for (path, expected) in [
            ("a.txt", "/home/work/a.txt"),
            ("./x/../y", "/home/work/y"),
            (".", "/home/work"),
            ("/home/work/z", "/home/work/z"),
        ] {
            assert_eq!(inside(path).expect(path), PathBuf::from(expected));
        }
        for path in [
            "../x",
            "/etc/passwd",
            "a/../../../etc",
            "/home/workshop",
            "a\0b",
        ] {
            let err = inside(path).expect_err(path);
            assert_eq!(err.python_class(), "PermissionError");
        }
    }

    fn place(directory: &Path) -> UploadTarget {
        UploadTarget {
            work_dir: directory.to_owned(),
            uid: rustix::process::geteuid().as_raw()
                + u32::from(rustix::process::geteuid().is_root()) * 1000,
            gid: rustix::process::getegid().as_raw(),
            mounts: vec!["/home/work/data".to_owned()],
        }
    }

    #[tokio::test]
    async fn uploads_belong_to_root_in_the_original() {
        let directory = tempfile::tempdir().expect("directory");
        let place = place(directory.path());
        upload_file(place.clone(), "a/b/c.txt".into(), Bytes::from_static(b"hi"))
            .await
            .expect("written");
        upload_file(place.clone(), "a/b/c.txt".into(), Bytes::from_static(b"h"))
            .await
            .expect("written over");
        let file = directory.path().join("a/b/c.txt");
        assert_eq!(std::fs::read(&file).expect("file"), b"h");
        for path in [
            &file,
            &directory.path().join("a/b"),
            &directory.path().join("a"),
        ] {
            assert_eq!(path.metadata().expect("metadata").uid(), place.uid);
        }
    }

    #[tokio::test]
    async fn an_upload_over_a_file_changes_neither_its_mode_nor_its_owner() {
        let directory = tempfile::tempdir().expect("directory");
        let is_root = rustix::process::geteuid().is_root();
        for (name, mode) in [("run.sh", 0o755), ("secret", 0o600)] {
            let file = directory.path().join(name);
            std::fs::write(&file, "longer than before").expect("written");
            std::fs::set_permissions(&file, Permissions::from_mode(mode)).expect("changed");
            if is_root {
                std::os::unix::fs::chown(&file, Some(2345), Some(2346)).expect("changed");
            }
            let before = file.metadata().expect("metadata");
            let place = place(directory.path());
            upload_file(place, name.into(), Bytes::from_static(b"new"))
                .await
                .expect(name);
            let after = file.metadata().expect("metadata");
            assert_eq!(std::fs::read(&file).expect("file"), b"new");
            assert_eq!(after.mode() & 0o7777, mode, "{name}");
            assert_eq!((after.uid(), after.gid()), (before.uid(), before.gid()));
        }
        let place = place(directory.path());
        upload_file(place.clone(), "new".into(), Bytes::new())
            .await
            .expect("written");
        let made = directory.path().join("new").metadata().expect("metadata");
        assert_eq!((made.mode() & 0o7777, made.uid()), (0o644, place.uid));
    }

    #[tokio::test]
    async fn no_link_leads_an_upload_below_a_mounted_folder() {
        let directory = tempfile::tempdir().expect("directory");
        let at = |name: &str| directory.path().join(name);
        std::fs::create_dir(at("data")).expect("directory");
        std::fs::create_dir(at("mine")).expect("directory");
        for (target, link) in [
            ("data", "d"),
            ("../data", "mine/back"),
            ("data/new", "dangling"),
            ("mine", "ours"),
        ] {
            symlink(target, at(link)).expect("link");
        }
        let upload = async |name: &str| {
            let place = place(directory.path());
            upload_file(place, name.to_owned(), Bytes::from_static(b"x")).await
        };
        for name in ["d/x", "d/deep/er/x", "mine/back/x", "ours/back/deep/x"] {
            let err = upload(name).await.expect_err(name);
            let FileAccessError::InMount { path, mount } = &err else {
                panic!("{name}: {err}");
            };
            assert_eq!((&**path, &**mount), (name, "/home/work/data"));
        }
        upload("dangling")
            .await
            .expect_err("nothing is made by a link");
        assert_eq!(at("data").read_dir().expect("directory").count(), 0);
        // What the mounted folder hides may be left from before it was mounted.
        std::fs::write(at("data/old"), "old").expect("written");
        symlink("data/old", at("f")).expect("link");
        let err = upload("f").await.expect_err("f");
        assert!(matches!(err, FileAccessError::InMount { .. }), "{err}");
        assert_eq!(std::fs::read(at("data/old")).expect("file"), b"old");
        // Other links of the user lead where they did.
        upload("ours/y").await.expect("written");
        upload("mine/../data-like/z").await.expect("written");
        assert!(at("mine/y").exists() && at("data-like/z").exists());
    }

    #[tokio::test]
    async fn uploads_do_not_leave_the_directory() {
        let directory = tempfile::tempdir().expect("directory");
        let outside = tempfile::tempdir().expect("directory");
        symlink(outside.path(), directory.path().join("way-out")).expect("link");
        symlink(
            outside.path().join("target"),
            directory.path().join("file-out"),
        )
        .expect("link");
        for name in [
            "way-out/x",
            "file-out",
            "../x",
            "/home/work/x",
            "data/x",
            ".",
        ] {
            let err = upload_file(place(directory.path()), name.into(), Bytes::new())
                .await
                .expect_err(name);
            assert_eq!(err.python_class(), "PermissionError", "{name}: {err}");
        }
        assert_eq!(outside.path().read_dir().expect("directory").count(), 0);
        // What is in the way is told: a link that is absolute, wherever it leads, also behind others.
        std::fs::create_dir(directory.path().join("sub")).expect("directory");
        for (target, link) in [
            ("/home/work/sub", "sub/absolute"),
            ("sub/absolute", "by-another"),
            ("../elsewhere", "up"),
        ] {
            symlink(target, directory.path().join(link)).expect("link");
        }
        for (name, by) in [
            ("way-out/x/y", "way-out"),
            ("file-out", "file-out"),
            ("sub/absolute/x", "sub/absolute"),
            ("by-another/x", "by-another"),
            ("up/x", "up"),
        ] {
            let err = upload_file(place(directory.path()), name.into(), Bytes::new())
                .await
                .expect_err(name);
            let FileAccessError::Link { path, link } = &err else {
                panic!("{name}: {err}");
            };
            assert_eq!((&**path, &**link), (name, by));
            assert_eq!(err.python_class(), "PermissionError");
        }
        std::fs::create_dir(directory.path().join("dir")).expect("directory");
        let err = upload_file(place(directory.path()), "dir".into(), Bytes::new())
            .await
            .expect_err("a directory");
        assert_eq!(err.python_class(), "RuntimeError", "{err}");
    }

    #[test]
    fn a_place_that_the_agent_may_not_write_is_no_way_out() {
        let directory = tempfile::tempdir().expect("directory");
        let locked = directory.path().join("locked");
        std::fs::create_dir(&locked).expect("directory");
        std::fs::write(locked.join("file"), "kept").expect("written");
        symlink("locked/file", directory.path().join("link")).expect("link");
        std::fs::set_permissions(&locked, Permissions::from_mode(0o000)).expect("changed");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .on_thread_start(forgo_rights)
            .build()
            .expect("runtime");
        for name in ["locked/file", "locked/deep/er/file", "link"] {
            let upload = upload_file(place(directory.path()), name.to_owned(), Bytes::new());
            let err = runtime.block_on(upload).expect_err(name);
            assert!(
                matches!(err, FileAccessError::Denied { .. }),
                "{name}: {err}"
            );
            assert_eq!(err.python_class(), "PermissionError");
            let told = shared::causes::chain(&err);
            for words in [name, "may not write", "Permission denied"] {
                assert_eq!(told.matches(words).count(), 1, "{words}: {told}");
            }
        }
        std::fs::set_permissions(&locked, Permissions::from_mode(0o700)).expect("changed");
    }

    #[test]
    fn a_cause_is_told_by_the_chain_alone() {
        let path = || "a.txt".to_owned();
        let missing = DockerError::NotFound {
            step: "copy a.txt".to_owned(),
            message: "no such file".to_owned(),
        };
        for err in [
            FileAccessError::engine("a.txt", missing),
            FileAccessError::Write {
                path: path(),
                source: io::ErrorKind::StorageFull.into(),
            },
            FileAccessError::Denied {
                path: path(),
                source: io::ErrorKind::PermissionDenied.into(),
            },
        ] {
            let cause = std::error::Error::source(&err)
                .expect("a cause")
                .to_string();
            assert!(!err.to_string().contains(&cause), "{err}");
            assert!(shared::causes::chain(&err).ends_with(&cause), "{err}");
        }
    }

    #[test]
    fn a_list_is_made_by_the_sessions_user_with_all_groups() {
        let user = |uid, groups: &[u32]| SessionUser {
            uid,
            gid: 1600,
            groups: groups.to_vec(),
        };
        assert_eq!(user(0, &[1700]).become_user(), [""; 0]);
        assert_eq!(user(1500, &[]).become_user(), [SU_EXEC, "1500:1600,42"]);
        assert_eq!(
            user(1500, &[1000, 1700]).become_user(),
            [SU_EXEC, "1500:1600,1000,1700,42"]
        );
    }

    #[test]
    fn a_single_file_is_taken_out_of_its_archive() {
        let archive = |names: &[&str]| {
            let mut builder = tar::Builder::new(Vec::new());
            for name in names {
                let mut header = tar::Header::new_gnu();
                header.set_size(2);
                header.set_mode(0o644);
                header.set_cksum();
                builder
                    .append_data(&mut header, name, &b"ab"[..])
                    .expect("appended");
            }
            builder.into_inner().expect("archive")
        };
        assert_eq!(single_member(&archive(&["a"])).as_deref(), Some(&b"ab"[..]));
        assert_eq!(single_member(&archive(&["a", "b"])), None);
        assert_eq!(single_member(&archive(&[])), None);
        assert_eq!(single_member(b"not an archive at all"), None);
    }
}
