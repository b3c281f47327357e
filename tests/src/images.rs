//! Images to run kernels in, made on the spot without a registry.
//!
//! [`image`] calls `tests/scripts/make-image`, which makes an image once and then only names it.
//! [`import`] makes one-off images out of a list of files, removed when the value is dropped.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value as Json;

/// The images `make-image` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Image {
    /// busybox only.
    Bare,
    /// Runs the in-container runner; service `web` (http 8080).
    Runner,
    /// Services `web`, `pair` (ports 9001 and 9002), `echo` (tcp 9005), `broken`.
    Services,
    /// Debian with ipykernel, for query mode. A minute the first time.
    Python,
}

/// The docker client, of the engine with this address or the machine's own.
pub fn docker(host: Option<&str>) -> Command {
    let mut command = Command::new("docker");
    command.envs(host.map(|host| ("DOCKER_HOST", host)));
    command
}

/// Makes the image if it is missing and returns its name.
pub fn image(which: Image) -> Result<String> {
    image_in(which, None)
}

/// As [`image`], in the engine with this address.
pub fn image_in(which: Image, host: Option<&str>) -> Result<String> {
    let kind = match which {
        Image::Bare => "bare",
        Image::Runner => "runner",
        Image::Services => "services",
        Image::Python => "python",
    };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/make-image");
    let made = Command::new(&script)
        .arg(kind)
        .envs(host.map(|host| ("DOCKER_HOST", host)))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start {}", script.display()))?;
    if !made.status.success() {
        bail!("{} {kind} failed: {}", script.display(), made.status);
    }
    let name = String::from_utf8(made.stdout).context("image name")?;
    let name = name.trim();
    if name.is_empty() {
        bail!("{} {kind} printed no name", script.display());
    }
    Ok(name.to_owned())
}

/// A local image of such an engine, as `docker inspect` tells it.
pub fn inspect(name: &str, host: Option<&str>) -> Result<Json> {
    let output = docker(host)
        .args(["image", "inspect", name])
        .output()
        .context("docker can't be started")?;
    ensure!(output.status.success(), "the image {name} is not there");
    let mut list: Json = serde_json::from_slice(&output.stdout)?;
    Ok(list[0].take())
}

/// A file of a one-off image.
#[derive(Debug, Clone)]
pub struct ImageFile {
    /// Path without a leading slash.
    pub path: PathBuf,
    /// Mode bits.
    pub mode: u32,
    /// Content, or the target of a link.
    pub content: FileContent,
}

/// What an image file holds.
#[derive(Debug, Clone)]
pub enum FileContent {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A symbolic link.
    Link(String),
    /// A directory.
    Directory,
}

/// An image that goes away with this value.
#[derive(Debug)]
pub struct OwnImage {
    /// `name:tag`.
    pub name: String,
}

impl Drop for OwnImage {
    fn drop(&mut self) {
        let removed = Command::new("docker")
            .args(["rmi", "-f", &self.name])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("image {} could not be removed", self.name);
        }
    }
}

/// Imports an image of these files with Dockerfile-like changes (`LABEL a=b`, `CMD [..]`).
pub fn import(name: &str, files: &[ImageFile], changes: &[&str]) -> Result<OwnImage> {
    let mut archive = tar::Builder::new(Vec::new());
    for file in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(file.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        match &file.content {
            FileContent::Bytes(bytes) => {
                header.set_size(bytes.len() as u64);
                archive.append_data(&mut header, &file.path, bytes.as_slice())?;
            }
            FileContent::Link(target) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                archive.append_link(&mut header, &file.path, target)?;
            }
            FileContent::Directory => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_size(0);
                archive.append_data(&mut header, &file.path, std::io::empty())?;
            }
        }
    }
    let archive = archive.into_inner()?;
    let mut command = Command::new("docker");
    command.arg("import");
    for change in changes {
        command.args(["--change", change]);
    }
    let mut child = command
        .args(["-", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .context("start docker import")?;
    {
        use std::io::Write;
        let mut input = child.stdin.take().context("docker import has no input")?;
        input.write_all(&archive).context("feed docker import")?;
    }
    if !child.wait()?.success() {
        bail!("docker import {name} failed");
    }
    Ok(OwnImage {
        name: name.to_owned(),
    })
}

/// Derives an image of another one with Dockerfile-like changes (`ENV a=b`, `LABEL a=b`).
pub fn derive(name: &str, from: &str, changes: &[&str]) -> Result<OwnImage> {
    let run = |args: &[&str]| -> Result<String> {
        let output = docker(None).args(args).output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            bail!("docker {args:?}: {told}");
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    let container = run(&["create", from, "true"])?;
    let mut commit = vec!["commit"];
    commit.extend(changes.iter().flat_map(|change| ["--change", change]));
    commit.extend([&*container, name]);
    let derived = run(&commit);
    run(&["rm", "-f", &container])?;
    derived?;
    Ok(OwnImage {
        name: name.to_owned(),
    })
}

/// The files of a busybox root: `/bin/busybox`, `/bin/sh` and the named applets.
pub fn busybox_files(applets: &[&str]) -> Result<Vec<ImageFile>> {
    let binary = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| std::fs::read(path).ok())
        .context("busybox-static is not installed; try: apt-get install busybox-static")?;
    let mut files = vec![
        ImageFile {
            path: "tmp".into(),
            mode: 0o1777,
            content: FileContent::Directory,
        },
        ImageFile {
            path: "bin/busybox".into(),
            mode: 0o755,
            content: FileContent::Bytes(binary),
        },
    ];
    for applet in ["sh"].iter().chain(applets) {
        files.push(ImageFile {
            path: Path::new("bin").join(applet),
            mode: 0o777,
            content: FileContent::Link("busybox".into()),
        });
    }
    Ok(files)
}
