//! What is mounted, and the two programs that change it.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;

use super::{MountOrder, VolumeError};
use crate::kernel::node::blocking;

/// Where the programs are looked for; nothing of our environment is handed on.
const SEARCH_PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
/// How much of what a program said is told.
const WORDS: usize = 1024;

/// What is mounted at exactly this path, if anything is: the source of the topmost mount.
pub(super) async fn at(path: &Path) -> Result<Option<String>, VolumeError> {
    let text = blocking(|| std::fs::read_to_string("/proc/self/mountinfo"))
        .await
        .map_err(VolumeError::Table)?;
    Ok(source_at(&text, path))
}

/// Mount points directly below a directory, sorted. Nothing of them is touched: a server may hang.
pub(super) async fn below(base: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let text = blocking(|| std::fs::read_to_string("/proc/self/mountinfo"))
        .await
        .map_err(VolumeError::Table)?;
    Ok(points_below(&text, base))
}

fn points_below(mountinfo: &str, base: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| Some(PathBuf::from(unescape(line.split(' ').nth(4)?))))
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
            (Path::new(&unescape(point)) == path).then(|| unescape(source))
        })
        .next_back()
}

/// Blanks and backslashes are written as a backslash and three octal digits.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Mounts, and sees that it is so.
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
    run("mount", command, limit).await?;
    match at(path).await? {
        Some(_) => Ok(()),
        None => Err(VolumeError::NotDone(path.to_owned())),
    }
}

/// Unmounts, and sees that it is so.
pub(super) async fn unmount(path: &Path, limit: Duration) -> Result<(), VolumeError> {
    let mut command = Command::new("umount");
    command.arg("--").arg(path);
    run("umount", command, limit).await?;
    match at(path).await? {
        None => Ok(()),
        Some(_) => Err(VolumeError::NotDone(path.to_owned())),
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
        .kill_on_drop(true);
    let output: Output = match tokio::time::timeout(limit, command.output()).await {
        Ok(Ok(output)) => output,
        Ok(Err(source)) => return Err(VolumeError::Program { program, source }),
        Err(_) => {
            return Err(VolumeError::Timeout {
                program,
                after: limit,
            });
        }
    };
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words: String = words.trim().chars().take(WORDS).collect();
    Err(VolumeError::Refused {
        program,
        words: if words.is_empty() {
            output.status.to_string()
        } else {
            words
        },
    })
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
    fn escapes_are_read_and_odd_ones_stay() {
        assert_eq!(unescape("a\\040b\\134c"), "a b\\c");
        assert_eq!(unescape("a\\04"), "a\\04");
        assert_eq!(unescape("\\999"), "\\999");
    }
}
