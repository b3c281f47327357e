//! Installing: wheels in, one complete version directory out.

use super::archive::{self, ArchiveError};
use super::manifest::{FILE, Manifest, RunnerDirError, verify};
use super::wheel::{Member, Wheel, WheelError};
use super::{ENVIRONMENT_VERSION, RUNNER_VERSION, pinned_version};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The published packages and the pinned version of each.
const PACKAGES: [(&str, &str); 4] = [
    ("backend.ai-kernel", RUNNER_VERSION),
    ("backend.ai-kernel-binary", RUNNER_VERSION),
    ("backend.ai-kernel-helper", RUNNER_VERSION),
    ("backend.ai-krunner-static-gnu", ENVIRONMENT_VERSION),
];

/// Where the wheels come from.
#[derive(Debug, Clone)]
pub enum WheelSource {
    /// A directory that has the four wheels of the pinned versions.
    Directory(PathBuf),
    /// `<python> -m pip download` with these further arguments (an index, a proxy, ...).
    Pip {
        python: PathBuf,
        arguments: Vec<String>,
    },
}

impl Default for WheelSource {
    fn default() -> Self {
        Self::Pip {
            python: "python3".into(),
            arguments: Vec::new(),
        }
    }
}

/// What to install, and where.
#[derive(Debug, Clone)]
pub struct InstallOptions {
    pub runner_dir: PathBuf,
    /// `x86_64` or `aarch64`, as the wheels' file names spell it.
    pub arch: String,
    pub source: WheelSource,
    /// Make the version anew even if it is there; for damaged ones.
    pub force: bool,
    /// Longest a download may take.
    pub download_limit: Duration,
}

impl InstallOptions {
    /// This machine's architecture, by pip, at most ten minutes.
    pub fn new(runner_dir: impl Into<PathBuf>) -> Self {
        Self {
            runner_dir: runner_dir.into(),
            arch: std::env::consts::ARCH.to_owned(),
            source: WheelSource::default(),
            force: false,
            download_limit: Duration::from_secs(600),
        }
    }
}

/// An installed version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    pub version: String,
    pub path: PathBuf,
    /// False when it was there already.
    pub fresh: bool,
}

/// Why nothing was installed. What was there before is unchanged.
#[derive(Debug, Error)]
pub enum InstallError {
    #[error("the runner directory {path} cannot be made or locked")]
    RunnerDir {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("another `bai-agent runner install` is at work in {0}; wait for it")]
    Busy(PathBuf),
    #[error("{path} cannot be listed")]
    List {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(
        "{directory} has no wheel of {package} {version} for {arch}; download it with `pip download --no-deps --only-binary=:all: --python-version 3.13 {package}=={version}`"
    )]
    NoWheel {
        directory: PathBuf,
        package: String,
        version: String,
        arch: String,
    },
    #[error(
        "{python} cannot be started; install python3 with pip, or give the wheels with --wheels"
    )]
    StartPip {
        python: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("pip did not download {package} {version}: {told}")]
    Pip {
        package: String,
        version: String,
        told: String,
    },
    #[error("pip took longer than {limit:?} to download {package} {version}")]
    PipTimeout {
        package: String,
        version: String,
        limit: Duration,
    },
    #[error(transparent)]
    Wheel(#[from] WheelError),
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("the package {package} has no {member}; it is not the package this agent knows")]
    Lacks { package: String, member: String },
    #[error("{path} cannot be written")]
    Write {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error(transparent)]
    Existing(#[from] RunnerDirError),
}

/// Installs the pinned versions, or finds them installed. `progress` gets one sentence per step.
/// Blocks for as long as the download and unpacking take.
///
/// # Errors
/// Downloads, wheels and disk; see [`InstallError`].
pub fn install(
    options: &InstallOptions,
    mut progress: impl FnMut(&str),
) -> Result<Installed, InstallError> {
    let directory = &options.runner_dir;
    let version = pinned_version(&options.arch);
    let path = directory.join(&version);
    let _lock = lock(directory)?;
    clear_leftovers(directory)?;
    match Manifest::read(&path) {
        Ok(_) if !options.force => {
            return Ok(Installed {
                version,
                path,
                fresh: false,
            });
        }
        Ok(_) if verify(directory, &version).is_ok_and(|report| report.problems.is_empty()) => {
            progress("the installed version is as it should be");
            return Ok(Installed {
                version,
                path,
                fresh: false,
            });
        }
        Err(err @ RunnerDirError::Format { .. }) if !options.force => return Err(err.into()),
        _ => {}
    }
    let staging = directory.join(format!(".staging-{version}"));
    archive::make_directory(&staging)?;
    let result = (|| {
        let manifest = fill(&staging, &version, options, &mut progress)?;
        complete(&staging, &manifest)
    })();
    if let Err(err) = result {
        // The next install clears it if this fails too.
        let _ = fs::remove_dir_all(&staging);
        return Err(err);
    }
    let failed = |cause| InstallError::Write {
        path: path.clone(),
        cause,
    };
    if path.exists() {
        // A half-made or damaged one: containers that have it mounted keep its files by inode.
        let doomed = directory.join(format!(".removed-{version}"));
        fs::rename(&path, &doomed).map_err(failed)?;
    }
    fs::rename(&staging, &path).map_err(failed)?;
    File::open(directory)
        .and_then(|dir| dir.sync_all())
        .map_err(failed)?;
    clear_leftovers(directory)?;
    progress("the runner is installed");
    Ok(Installed {
        version,
        path,
        fresh: true,
    })
}

/// Takes the directory's lock; it ends with the returned file, whatever happens to this process.
fn lock(directory: &Path) -> Result<File, InstallError> {
    let failed = |cause| InstallError::RunnerDir {
        path: directory.to_owned(),
        cause,
    };
    fs::create_dir_all(directory).map_err(failed)?;
    // Containers' users read the files below.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).map_err(failed)?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join(".lock"))
        .map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(InstallError::Busy(directory.to_owned())),
        Err(err) => Err(failed(err.into())),
    }
}

/// Removes what an install or removal cut short left. Called with the lock held.
fn clear_leftovers(directory: &Path) -> Result<(), InstallError> {
    let listing = |cause| InstallError::List {
        path: directory.to_owned(),
        cause,
    };
    for entry in fs::read_dir(directory).map_err(listing)? {
        let entry = entry.map_err(listing)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(".staging-") || name.starts_with(".removed-") {
            let path = entry.path();
            fs::remove_dir_all(&path).map_err(|cause| InstallError::Write { path, cause })?;
        }
    }
    Ok(())
}

/// Puts everything below `staging`.
fn fill(
    staging: &Path,
    version: &str,
    options: &InstallOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<Manifest, InstallError> {
    let mut manifest = Manifest::new(version, &options.arch);
    let downloads;
    let wheels = match &options.source {
        WheelSource::Directory(path) => path.as_path(),
        WheelSource::Pip { python, arguments } => {
            downloads = staging.join("downloads");
            archive::make_directory(&downloads)?;
            download(&downloads, python, arguments, options, progress)?;
            &downloads
        }
    };
    let mut environment = Environment::default();
    for (package, version) in PACKAGES {
        progress(&format!("unpacking {package} {version}"));
        let path = find_wheel(wheels, package, version, &options.arch)?;
        Wheel::open(&path)?
            .read_all(|member| place(staging, member, &mut manifest, &mut environment))?;
    }
    progress("unpacking the python environment");
    environment.unpack(staging, &mut manifest, &options.arch)?;
    require(staging, &options.arch)?;
    if matches!(options.source, WheelSource::Pip { .. }) {
        let path = staging.join("downloads");
        fs::remove_dir_all(&path).map_err(|cause| InstallError::Write { path, cause })?;
    }
    Ok(manifest)
}

/// The members of the environment's package that are not plain files to copy.
#[derive(Debug, Default)]
struct Environment {
    archives: Vec<Member>,
    versions: Vec<Member>,
}

const ENVIRONMENT_PACKAGE: &str = "ai/backend/krunner/static_gnu/";

/// Writes one member to its place, keeps it for later, or passes it over (package metadata).
fn place(
    staging: &Path,
    member: Member,
    manifest: &mut Manifest,
    environment: &mut Environment,
) -> Result<(), InstallError> {
    let Member {
        name,
        content,
        executable,
    } = member;
    let relative = if let Some(rest) = name.strip_prefix(ENVIRONMENT_PACKAGE) {
        if rest.ends_with(".tar.xz") {
            environment.archives.push(Member {
                name: rest.to_owned(),
                content,
                executable,
            });
            return Ok(());
        }
        if rest.starts_with("krunner-") || rest == "versions.txt" {
            environment.versions.push(Member {
                name: rest.to_owned(),
                content,
                executable,
            });
            return Ok(());
        }
        match rest.strip_prefix("licenses/") {
            Some(license) => format!("licenses/krunner/{license}"),
            None => return Ok(()),
        }
    } else if let Some(rest) = name.strip_prefix("ai/backend/") {
        // The extractor is an image that this agent does not need: it unpacks in process.
        if rest.starts_with("runner/krunner-extractor") {
            return Ok(());
        }
        match rest.split('/').next() {
            Some("runner" | "kernel" | "helpers") => rest.to_owned(),
            _ => return Ok(()),
        }
    } else {
        return Ok(());
    };
    // Whatever the zip says: the entrypoint and su-exec must be executable in the container.
    let file = relative.rsplit('/').next().unwrap_or_default();
    let tool = relative.starts_with("runner/") && (file.ends_with(".bin") || file.ends_with(".sh"));
    let path = staging.join(&relative);
    archive::make_directory(path.parent().unwrap_or(staging))?;
    let entry = archive::write_file(&path, relative, &mut content.as_slice(), executable || tool)?;
    manifest.files.push(entry);
    Ok(())
}

impl Environment {
    fn text(&self, name: &str) -> Result<String, InstallError> {
        let found = self.versions.iter().find(|member| member.name == name);
        let text = found.map(|member| String::from_utf8_lossy(&member.content).trim().to_owned());
        text.filter(|text| !text.is_empty())
            .ok_or_else(|| self.lacks(name))
    }

    fn lacks(&self, member: &str) -> InstallError {
        InstallError::Lacks {
            package: "backend.ai-krunner-static-gnu".to_owned(),
            member: member.to_owned(),
        }
    }

    fn unpack(
        &self,
        staging: &Path,
        manifest: &mut Manifest,
        arch: &str,
    ) -> Result<(), InstallError> {
        let key = self.text("versions.txt")?;
        let key = key.lines().next().unwrap_or_default().trim().to_owned();
        let revision = self.text(&format!("krunner-version.{key}.txt"))?;
        let python = self.text(&format!("krunner-python.{key}.txt"))?;
        let name = format!("krunner-env.{key}.{arch}.tar.xz");
        let archive = self.archives.iter().find(|member| member.name == name);
        let archive = archive.ok_or_else(|| self.lacks(&name))?;
        let prefix = format!("krunner/{key}");
        let target = staging.join(&prefix);
        archive::make_directory(&staging.join("krunner"))?;
        let unpacked = archive::unpack(&archive.content, &target, &prefix)?;
        manifest.files.extend(unpacked.files);
        manifest.links.extend(unpacked.links);
        // The original's extractor leaves this file in its volume.
        let content = format!("{revision}\n");
        let named = format!("{prefix}/VERSION");
        let path = target.join("VERSION");
        if !path.exists() {
            let written = archive::write_file(&path, named, &mut content.as_bytes(), false)?;
            manifest.files.push(written);
        }
        // Mount points for the two packages; the archive has them, a container needs them.
        for package in ["kernel", "helpers"] {
            let place = format!("lib/python{python}/site-packages/ai/backend/{package}");
            archive::make_directory(&target.join(place))?;
        }
        manifest.environment_key = key;
        manifest.environment_revision = revision;
        manifest.python = python;
        Ok(())
    }
}

/// Files without which no kernel starts.
fn require(staging: &Path, arch: &str) -> Result<(), InstallError> {
    let binary = |member: &str| (format!("runner/{member}"), "backend.ai-kernel-binary");
    let needed = [
        binary("entrypoint.sh"),
        binary(&format!("su-exec.{arch}.bin")),
        binary("default-seccomp.json"),
        ("kernel/__main__.py".to_owned(), "backend.ai-kernel"),
        ("helpers/__init__.py".to_owned(), "backend.ai-kernel-helper"),
    ];
    for (member, package) in needed {
        if !staging.join(&member).is_file() {
            return Err(InstallError::Lacks {
                package: package.to_owned(),
                member,
            });
        }
    }
    Ok(())
}

/// Writes the marker after everything else is on the disk.
fn complete(staging: &Path, manifest: &Manifest) -> Result<(), InstallError> {
    let failed = |path: &Path, cause| InstallError::Write {
        path: path.to_owned(),
        cause,
    };
    let mut directories = vec![staging.to_owned()];
    while let Some(directory) = directories.pop() {
        // Intermediate directories were made under the caller's umask.
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755))
            .map_err(|cause| failed(&directory, cause))?;
        for entry in fs::read_dir(&directory).map_err(|cause| failed(&directory, cause))? {
            let entry = entry.map_err(|cause| failed(&directory, cause))?;
            if entry
                .file_type()
                .map_err(|cause| failed(&directory, cause))?
                .is_dir()
            {
                directories.push(entry.path());
            }
        }
    }
    let root = File::open(staging).map_err(|cause| failed(staging, cause))?;
    rustix::fs::syncfs(&root).map_err(|err| failed(staging, err.into()))?;
    let path = staging.join(FILE);
    let text = serde_json::to_vec(manifest).expect("a manifest is texts and numbers");
    let written = File::create(&path).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_all()
    });
    written.map_err(|cause| failed(&path, cause))?;
    root.sync_all().map_err(|cause| failed(staging, cause))
}

/// The wheel of a package in a directory: for this architecture, or for any.
fn find_wheel(
    directory: &Path,
    package: &str,
    version: &str,
    arch: &str,
) -> Result<PathBuf, InstallError> {
    let listing = |cause| InstallError::List {
        path: directory.to_owned(),
        cause,
    };
    let prefix = format!("{}-{version}-", package.replace(['.', '-'], "_"));
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(listing)? {
        let entry = entry.map_err(listing)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Some(tags) = name
            .strip_prefix(&prefix)
            .and_then(|tags| tags.strip_suffix(".whl"))
        else {
            continue;
        };
        let platforms = tags.rsplit('-').next().unwrap_or_default();
        let fits = platforms.split('.').any(|platform| {
            platform == "any" || platform.contains("linux") && platform.ends_with(arch)
        });
        if fits {
            found.push(entry.path());
        }
    }
    found.sort();
    found
        .into_iter()
        .next()
        .ok_or_else(|| InstallError::NoWheel {
            directory: directory.to_owned(),
            package: package.to_owned(),
            version: version.to_owned(),
            arch: arch.to_owned(),
        })
}

fn download(
    directory: &Path,
    python: &Path,
    arguments: &[String],
    options: &InstallOptions,
    progress: &mut dyn FnMut(&str),
) -> Result<(), InstallError> {
    for (package, version) in PACKAGES {
        progress(&format!("downloading {package} {version}"));
        let mut command = Command::new(python);
        command
            .args([
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--no-input",
                "--progress-bar=off",
            ])
            .args(["--disable-pip-version-check", "--only-binary=:all:"])
            // The packages ask for python 3.13; they run with the one they bring, not this one.
            .args(["--python-version", "3.13"])
            .args(["--platform", &format!("manylinux2014_{}", options.arch)])
            .arg("--dest")
            .arg(directory)
            .args(arguments)
            .arg(format!("{package}=={version}"));
        let (package, version) = (package.to_owned(), version.to_owned());
        match run(command, options.download_limit) {
            Ok(Ended::Well) => {}
            Ok(Ended::Badly(mut told)) => {
                if told.contains("No module named pip") {
                    told += "; install python3-pip, or give the wheels with --wheels";
                }
                return Err(InstallError::Pip {
                    package,
                    version,
                    told,
                });
            }
            Ok(Ended::Late) => {
                let limit = options.download_limit;
                return Err(InstallError::PipTimeout {
                    package,
                    version,
                    limit,
                });
            }
            Err(cause) => {
                return Err(InstallError::StartPip {
                    python: python.to_owned(),
                    cause,
                });
            }
        }
    }
    Ok(())
}

enum Ended {
    Well,
    /// The last lines it printed.
    Badly(String),
    Late,
}

/// Runs a command, output to a temporary file (so that a full pipe can't stop it), and kills it
/// after `limit`.
fn run(mut command: Command, limit: Duration) -> io::Result<Ended> {
    let output = rustix::fs::memfd_create("pip-output", rustix::fs::MemfdFlags::CLOEXEC)?;
    let output = File::from(output);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output.try_clone()?));
    let mut child = command.spawn()?;
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok(Ended::Late);
        }
        // Not a synchronisation: std has no wait with a deadline.
        std::thread::sleep(Duration::from_millis(50));
    };
    if status.success() {
        return Ok(Ended::Well);
    }
    let told = read_tail(&output)?;
    Ok(Ended::Badly(if told.is_empty() {
        status.to_string()
    } else {
        told
    }))
}

fn read_tail(output: &File) -> io::Result<String> {
    use std::os::unix::fs::FileExt;
    const TAIL: u64 = 2000;
    let length = output.metadata()?.len();
    let mut text = vec![0; usize::try_from(length.min(TAIL)).unwrap_or_default()];
    output.read_exact_at(&mut text, length.saturating_sub(TAIL))?;
    Ok(String::from_utf8_lossy(&text).trim().to_owned())
}
