//! What is mounted, and the two programs that change it.
//!
//! Invariants: a program that misses its deadline is killed with all that it has started, so that
//! nothing is mounted after the answer; a mount that failed is undone.

use std::collections::HashSet;
use std::future::pending;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use shared::procfs::unescape;
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, Command};

use super::{MountOrder, UsedFolder, VolumeError};
use crate::blocking::blocking;

/// Where the programs are looked for; nothing of our environment is handed on.
const SEARCH_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// How much of what a program said is told.
const WORDS: usize = 1024;
/// How long what a failed program has started may keep us from what else there is to read of it.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long killed processes may take to be gone. One that waits for a server may not be killed at
/// all while it does.
const DEATH: Duration = Duration::from_secs(5);
/// Links that are followed on the way to a path; the kernel follows no more either.
const LINKS: usize = 40;

/// What is mounted at exactly this path, if anything is: the source of the topmost mount.
pub(super) async fn at(path: &Path) -> Result<Option<String>, VolumeError> {
    let path = path.to_owned();
    let found = blocking(move || at_now(&path)).await;
    found.map_err(VolumeError::Table)
}

/// The same for who cannot wait. Blocks, for the time that the kernel takes to list what is mounted.
pub(super) fn at_now(path: &Path) -> io::Result<Option<String>> {
    let text = std::fs::read_to_string("/proc/self/mountinfo")?;
    let place = place_of(&points(&text).collect(), path, led_to);
    Ok(source_at(&text, &place))
}

/// Who uses what is mounted at a path, if somebody does: whose folder is it, or lies below it, by its own
/// name or by links on the root file system. Nothing of any mount is touched.
pub(super) async fn user_of(
    path: &Path,
    used: Vec<UsedFolder>,
) -> Result<Option<String>, VolumeError> {
    if used.is_empty() {
        return Ok(None);
    }
    let path = path.to_owned();
    let found = blocking(move || {
        let text = std::fs::read_to_string("/proc/self/mountinfo")?;
        let points = points(&text).collect();
        let place = place_of(&points, &path, led_to);
        let is_below = |folder: &Path| {
            folder.starts_with(&path) || behind(&points, folder, led_to).starts_with(&place)
        };
        let mut used = used.into_iter();
        let user = used.find(|(folder, _)| is_below(folder));
        Ok(user.map(|(_, user)| user))
    });
    found.await.map_err(VolumeError::Table)
}

/// Mount points directly below a directory, sorted. Nothing of them is touched: a server may hang.
pub(super) async fn below(base: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let spelled = base.to_owned();
    let found = blocking(move || {
        let text = std::fs::read_to_string("/proc/self/mountinfo")?;
        let base = behind(&points(&text).collect(), &spelled, led_to);
        let names = points_below(&text, &base).into_iter();
        Ok(names
            .filter_map(|point| Some(spelled.join(point.file_name()?)))
            .collect())
    });
    found.await.map_err(VolumeError::Table)
}

/// Where the file system is mounted that a path is on. Links on the root file system are followed.
/// Nothing is touched at or below any other mount: a server may hang. Links there are taken by name.
pub(crate) async fn point_of(path: &Path) -> PathBuf {
    let path = path.to_owned();
    blocking(move || {
        let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points: HashSet<PathBuf> = points(&text).collect();
        let place = behind(&points, &path, led_to);
        point_above(points.into_iter(), &place)
    })
    .await
}

/// Where a link leads; nothing for what is none.
fn led_to(link: &Path) -> Option<PathBuf> {
    std::fs::read_link(link).ok()
}

/// Where a mount point is in the table, which has paths without links. A link itself is no mount point.
fn place_of(
    points: &HashSet<PathBuf>,
    path: &Path,
    link: impl Fn(&Path) -> Option<PathBuf>,
) -> PathBuf {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => behind(points, parent, link).join(name),
        _ => path.to_owned(),
    }
}

/// The path without the links that are on the root file system, with these mount points. `link` answers
/// where a link leads, and nothing for what is none.
fn behind(
    points: &HashSet<PathBuf>,
    path: &Path,
    link: impl Fn(&Path) -> Option<PathBuf>,
) -> PathBuf {
    let root = PathBuf::from("/");
    let (mut reached, mut rest, mut followed) = (root.clone(), path.to_owned(), 0);
    loop {
        let mut parts = rest.components();
        let Some(part) = parts.next() else {
            return reached;
        };
        let mut after = parts.as_path().to_owned();
        match part {
            Component::RootDir => reached = root.clone(),
            Component::ParentDir => {
                reached.pop();
            }
            Component::Normal(name) => {
                reached.push(name);
                if points.contains(&reached) {
                    return reached.join(after);
                }
                if followed < LINKS
                    && let Some(target) = link(&reached)
                {
                    followed += 1;
                    reached.pop();
                    after = target.join(after);
                }
            }
            Component::CurDir | Component::Prefix(_) => {}
        }
        rest = after;
    }
}

fn point_above(points: impl Iterator<Item = PathBuf>, path: &Path) -> PathBuf {
    points
        .filter(|point| path.starts_with(point))
        .max_by_key(|point| point.components().count())
        .unwrap_or_else(|| PathBuf::from("/"))
}

fn points(mountinfo: &str) -> impl Iterator<Item = PathBuf> {
    mountinfo
        .lines()
        .filter_map(|line| Some(unescape(line.split(' ').nth(4)?)))
}

fn points_below(mountinfo: &str, base: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = points(mountinfo)
        .filter(|point| point.parent() == Some(base))
        .collect();
    points.sort();
    points.dedup();
    points
}

/// Of lines in the form of proc_pid_mountinfo(5); the last one for a path is on top.
fn source_at(mountinfo: &str, path: &Path) -> Option<String> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (place, source) = line.split_once(" - ")?;
            let point = place.split(' ').nth(4)?;
            let source = source.split(' ').nth(1)?;
            (unescape(point) == path).then(|| unescape(source).to_string_lossy().into_owned())
        })
        .next_back()
}

/// Mounts where nothing is mounted, and sees that it is so; what failed is undone.
pub(super) async fn mount(
    path: &Path,
    order: &MountOrder,
    limit: Duration,
) -> Result<(), VolumeError> {
    let mut command = Command::new("mount");
    command.args(["-t", &order.fs_type]);
    if let Some(options) = order.options.as_deref().filter(|text| !text.is_empty()) {
        command.args(["-o", options]);
    }
    command.arg("--").arg(&order.location).arg(path);
    let mounted = async {
        run("mount", command, limit).await?;
        match at(path).await? {
            Some(_) => Ok(()),
            None => Err(VolumeError::NotDone {
                command: "mount",
                path: path.to_owned(),
            }),
        }
    };
    let mounted = mounted.await;
    if mounted.is_err() {
        undo(path, limit).await;
    }
    mounted
}

/// Takes away what a failed order has mounted, if it has; the failure is already on its way.
pub(super) async fn undo(path: &Path, limit: Duration) {
    let undone = match at(path).await {
        Ok(None) => return,
        Ok(Some(_)) => unmount(path, limit).await,
        Err(err) => Err(err),
    };
    if let Err(err) = undone {
        tracing::warn!(path = %path.display(), err = &err as &dyn std::error::Error, "a volume may stay mounted after a failed order");
    }
}

/// Unmounts, and sees that it is so.
pub(super) async fn unmount(path: &Path, limit: Duration) -> Result<(), VolumeError> {
    let mut command = Command::new("umount");
    command.arg("--").arg(path);
    let ran = run("umount", command, limit).await;
    match at(path).await {
        // What was asked for, however late.
        Ok(None) => Ok(()),
        Ok(Some(_)) => ran.and_then(|()| {
            Err(VolumeError::NotDone {
                command: "umount",
                path: path.to_owned(),
            })
        }),
        Err(err) => ran.and(Err(err)),
    }
}

/// A program and what it has started, in a process group of its own.
struct Group(Child);

impl Group {
    /// Kills all of them. Does nothing once the program was waited for: its number may be
    /// somebody else's then.
    fn kill(&self) {
        let leader = self.0.id().and_then(|id| i32::try_from(id).ok());
        if let Some(leader) = leader.and_then(Pid::from_raw) {
            // Fails only when there is none left.
            let _ = kill_process_group(leader, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The beginning of what a program says, and of what it has started: they have the pipe from it.
struct Said {
    pipe: Option<ChildStderr>,
    bytes: Vec<u8>,
}

impl Said {
    /// Reads until nobody holds the pipe any more. May be dropped and called again.
    async fn drain(&mut self) {
        let mut chunk = [0; 1024];
        while let Some(pipe) = &mut self.pipe {
            match pipe.read(&mut chunk).await {
                Ok(0) | Err(_) => self.pipe = None,
                Ok(read) => {
                    let room = (4 * WORDS).saturating_sub(self.bytes.len());
                    self.bytes.extend_from_slice(&chunk[..read.min(room)]);
                }
            }
        }
    }

    fn words(&self) -> String {
        let words = String::from_utf8_lossy(&self.bytes);
        words.trim().chars().take(WORDS).collect()
    }
}

async fn run(
    program: &'static str,
    mut command: Command,
    limit: Duration,
) -> Result<(), VolumeError> {
    command
        .env_clear()
        .env("PATH", SEARCH_PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // mount(8) leaves NFS and others to helpers, which go on when only it is killed.
        .process_group(0)
        .kill_on_drop(true);
    let failed = |source| VolumeError::Program { program, source };
    let mut group = Group(command.spawn().map_err(failed)?);
    let mut said = Said {
        pipe: group.0.stderr.take(),
        bytes: Vec::new(),
    };
    let ended = async {
        tokio::select! {
            status = group.0.wait() => status,
            status = async { said.drain().await; pending().await } => status,
        }
    };
    let status = match tokio::time::timeout(limit, ended).await {
        Ok(ended) => ended.map_err(failed)?,
        Err(_) => {
            group.kill();
            // At the end of the pipe none of them is left that could mount something yet.
            let gone = async {
                said.drain().await;
                group.0.wait().await
            };
            if tokio::time::timeout(DEATH, gone).await.is_err() {
                tracing::warn!(program, "a program that took too long cannot be killed yet");
            }
            return Err(VolumeError::Timeout {
                program,
                after: limit,
            });
        }
    };
    if status.success() {
        return Ok(());
    }
    // What it has started may live on with the pipe.
    let _ = tokio::time::timeout(LAST_WORDS, said.drain()).await;
    let words = match said.words() {
        words if words.is_empty() => status.to_string(),
        words => words,
    };
    Err(VolumeError::Refused { program, words })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_of_a_path_is_found() {
        let lines = "\
            22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n\
            40 22 0:35 / /mnt/a\\040b rw - nfs 10.0.0.1:/export rw\n\
            41 22 0:36 / /mnt/x rw - tmpfs first rw\n\
            42 41 0:37 / /mnt/x rw shared:3 - tmpfs second rw\n\
            43 22 254:1 /srv/data /mnt/bound rw - ext4 /dev/vda1 rw\n\
            damaged line\n";
        let found = |path: &str| source_at(lines, Path::new(path));
        assert_eq!(found("/mnt/a b").as_deref(), Some("10.0.0.1:/export"));
        assert_eq!(found("/mnt/x").as_deref(), Some("second"));
        assert_eq!(found("/mnt/bound").as_deref(), Some("/dev/vda1"));
        assert_eq!(found("/mnt"), None);
        let points = points_below(lines, Path::new("/mnt"));
        let expected = ["/mnt/a b", "/mnt/bound", "/mnt/x"].map(PathBuf::from);
        assert_eq!(points, expected);
    }

    #[test]
    fn links_on_the_root_file_system_lead_to_the_mount_and_nothing_of_it_is_touched() {
        let lines = "\
            22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n\
            40 22 0:35 / /mnt/a\\040b rw - nfs 10.0.0.1:/export rw\n\
            41 22 0:36 / /mnt/nas rw - nfs 10.0.0.1:/other rw\n\
            42 41 0:37 / /mnt/nas/inner rw - tmpfs tmpfs rw\n";
        let link = |path: &Path| {
            assert!(!path.starts_with("/mnt/nas") && !path.starts_with("/mnt/a b"));
            let target = match path.to_str()? {
                "/vfroot" => "/mnt/nas",
                "/srv/near" => "../mnt/./a b",
                "/srv/two" => "/vfroot/inner",
                "/srv/local" => "/data",
                "/srv/round" => "round/and",
                _ => return None,
            };
            Some(PathBuf::from(target))
        };
        for (path, point) in [
            ("/mnt/a b/deep/er", "/mnt/a b"),
            ("/mnt/nas", "/mnt/nas"),
            ("/mnt/nas/inner/deep", "/mnt/nas/inner"),
            ("/mnt/nasty", "/"),
            ("no path of ours", "/"),
            ("/vfroot/user/folder", "/mnt/nas"),
            ("/vfroot", "/mnt/nas"),
            ("/srv/near/folder", "/mnt/a b"),
            ("/srv/two/folder", "/mnt/nas/inner"),
            ("/srv/../vfroot/folder", "/mnt/nas"),
            ("/srv/local/folder", "/"),
            ("/srv/round/folder", "/"),
        ] {
            let points: HashSet<PathBuf> = points(lines).collect();
            let place = behind(&points, Path::new(path), link);
            let found = point_above(points.into_iter(), &place);
            assert_eq!(found, Path::new(point), "{path}");
        }
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn what_a_program_has_started_ends_with_it_at_the_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let held = directory.path().join("held");
        // Holds a lock as long as it lives, as a helper of mount(8) that goes on alone would.
        let script = format!("flock {} sleep 600; exit 0", held.display());
        let ran = run("mount", shell(&script), Duration::from_millis(300)).await;
        assert!(matches!(ran, Err(VolumeError::Timeout { .. })), "{ran:?}");
        let file = std::fs::File::create(&held).unwrap();
        let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        rustix::fs::flock(&file, lock).expect("nobody holds it any more");
    }

    #[tokio::test]
    async fn what_a_program_leaves_running_keeps_nobody_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let limit = Duration::from_secs(60);
        for (code, well) in [(0, true), (1, false)] {
            let file = directory.path().join("sleeper");
            // The pipe is the sleeper's too: it is the program's own end that counts.
            let script = format!("sleep 600 & echo $! > {}; exit {code}", file.display());
            let ended = run("mount", shell(&script), limit).await;
            let number = std::fs::read_to_string(&file).unwrap();
            let sleeper = Pid::from_raw(number.trim().parse().unwrap()).unwrap();
            rustix::process::kill_process(sleeper, Signal::KILL).expect("still there");
            match ended {
                Ok(()) => assert!(well),
                Err(VolumeError::Refused { .. }) => assert!(!well),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[tokio::test]
    async fn much_that_is_said_neither_blocks_nor_is_all_kept() {
        let script = "yes | head -c 1000000 >&2; exit 3";
        let ran = run("mount", shell(script), Duration::from_secs(60)).await;
        let Err(VolumeError::Refused { words, .. }) = ran else {
            panic!("{ran:?}");
        };
        assert_eq!(words.len(), WORDS);
        let ran = run("mount", shell("exit 3"), Duration::from_secs(60)).await;
        let words = ran.unwrap_err().to_string();
        assert_eq!(words, "mount failed: exit status: 3");
    }
}
