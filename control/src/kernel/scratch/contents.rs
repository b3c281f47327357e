//! What lies in a scratch: the runner's skeleton, the user's own files, keys, and the config files.

use super::beneath::{Beneath, Owner, change_at};
use super::{ScratchError, ScratchPaths};
use crate::kernel::mounts::WORK;
use crate::kernel::request::{ClusterInfo, Confidential, Dotfile, SshKeypair};
use crate::kernel::resource_text::with_container_id;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::OFlags;

/// The skeleton's files of the kernel's user: name in `work` and in the runner's directory.
const DOTFILES: [&str; 5] = [".bashrc", ".bash_profile", ".zshrc", ".vimrc", ".tmux.conf"];
/// The notebook's looks; these stay with the agent's user, as in the original.
const NOTEBOOK: [(&str, &str); 4] = [
    ("custom.css", "jupyter-custom.css"),
    ("logo.svg", "logo.svg"),
    ("roboto.ttf", "roboto.ttf"),
    ("roboto-italic.ttf", "roboto-italic.ttf"),
];

/// What a new scratch holds besides the config files.
#[derive(Debug, Clone, Default)]
pub struct NewScratch {
    /// Whose the files in `work` are.
    pub owner: Owner,
    /// Directory of the runner's files (`RunnerFiles::runner_file("")`).
    pub skeleton: PathBuf,
    pub bootstrap_script: Option<String>,
    /// Checked before with [`validate_dotfiles`].
    pub dotfiles: Vec<Dotfile>,
    /// The user's keys; leave out when a folder is mounted at `/home/work/.ssh`.
    pub ssh_keypair: Option<SshKeypair>,
    /// Written to `docker-creds.json` unless null or empty.
    pub docker_credentials: Confidential,
    pub cluster: ClusterFiles,
}

/// What the kernels of a cluster know of each other.
#[derive(Debug, Clone, Default)]
pub struct ClusterFiles {
    /// The cluster information as JSON, for `cluster.json`.
    pub description: Option<Confidential>,
    pub ssh_keypair: Option<SshKeypair>,
    /// JSON map of host name to address and port.
    pub ssh_port_mapping: Option<serde_json::Value>,
}

impl ClusterFiles {
    /// What of the cluster information is written; `hosts` are the names of its kernels, as their
    /// environment has them.
    pub fn of(cluster: &ClusterInfo, hosts: Option<&str>) -> Self {
        let mapping = cluster.ssh_places(hosts);
        Self {
            description: serde_json::to_value(cluster).ok().map(Confidential),
            ssh_keypair: cluster.ssh_keypair.clone(),
            ssh_port_mapping: mapping.map(serde_json::Value::Object),
        }
    }
}

/// The config files that depend on the allocation.
#[derive(Debug, Clone, Default)]
pub struct ConfigFiles {
    /// Text of `environ.txt` (`environment::render`).
    pub environ: String,
    /// Text of `resource.txt` without a container id (`resource_text::render`).
    pub resource: String,
    /// Names of the device plugins something is allocated of.
    pub devices: Vec<String>,
    /// Host network only: the ports that the runner binds instead of its own.
    pub intrinsic_ports: Option<serde_json::Value>,
}

/// Fills a new scratch.
pub(super) fn fill(paths: &ScratchPaths, new: &NewScratch) -> Result<(), ScratchError> {
    place_skeleton(&paths.work, new)?;
    let work = Beneath::open(&paths.work).map_err(|cause| ScratchError::Read {
        path: paths.work.clone(),
        cause,
    })?;
    let write = |path: &str, content: &str, mode: u32| {
        work.write(Path::new(path), content.as_bytes(), mode, new.owner)
            .map_err(|cause| ScratchError::write(&paths.work.join(path), cause))
    };
    if let Some(script) = new
        .bootstrap_script
        .as_deref()
        .filter(|script| !script.is_empty())
    {
        write("bootstrap.sh", script, 0o644)?;
    }
    if let Some(keypair) = &new.ssh_keypair {
        work.make_directories(Path::new(".ssh"), 0o700, new.owner)
            .map_err(|cause| ScratchError::make(&paths.work.join(".ssh"), cause))?;
        write(".ssh/authorized_keys", &keypair.public_key, 0o600)?;
        write(".ssh/id_rsa", keypair.private_key.reveal(), 0o600)?;
        write("id_container", keypair.private_key.reveal(), 0o600)?;
    }
    for dotfile in &new.dotfiles {
        let (path, mode) = dotfile_place(dotfile)?;
        let mut content = dotfile.data.reveal().to_owned();
        if !content.ends_with('\n') {
            content.push('\n');
        }
        if let Some(parent) = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            // The original gives the file's own mode to every directory on the way, so that 0644
            // makes them impassable: here those it makes can be entered by who may read.
            let directory_mode = mode | 0o700 | ((mode & 0o044) >> 2);
            work.make_directories(parent, directory_mode, new.owner)
                .map_err(|cause| ScratchError::make(&paths.work.join(parent), cause))?;
        }
        work.write(&path, content.as_bytes(), mode, new.owner)
            .map_err(|cause| ScratchError::write(&paths.work.join(&path), cause))?;
    }
    write_cluster(&paths.config, &new.cluster, new.owner)?;
    let credentials = &new.docker_credentials.0;
    let empty = credentials
        .as_object()
        .is_some_and(serde_json::Map::is_empty);
    if !credentials.is_null() && !empty {
        let text = serde_json::to_string(credentials).expect("a JSON value is JSON");
        replace(&paths.config, "docker-creds.json", text.as_bytes(), 0o644)?;
    }
    Ok(())
}

/// The runner's files in a `work` that no user has seen yet.
fn place_skeleton(work: &Path, new: &NewScratch) -> Result<(), ScratchError> {
    let owned = |path: &Path, mode| {
        change_at(path, mode, new.owner).map_err(|cause| ScratchError::write(path, cause))
    };
    let copy = |from: &str, to: &Path| {
        let source = new.skeleton.join(from);
        let content = fs::read(&source).map_err(|cause| ScratchError::Skeleton {
            path: source,
            cause,
        })?;
        fs::write(to, content).map_err(|cause| ScratchError::write(to, cause))?;
        fs::set_permissions(to, fs::Permissions::from_mode(0o644))
            .map_err(|cause| ScratchError::write(to, cause))
    };
    for name in DOTFILES {
        let path = work.join(name);
        copy(name, &path)?;
        owned(&path, 0o644)?;
    }
    let jupyter = work.join(".jupyter");
    let custom = jupyter.join("custom");
    for directory in [&jupyter, &custom] {
        fs::create_dir(directory).map_err(|cause| ScratchError::make(directory, cause))?;
        owned(directory, 0o755)?;
    }
    for (name, source) in NOTEBOOK {
        copy(source, &custom.join(name))?;
    }
    owned(work, 0o755)
}

fn write_cluster(config: &Path, cluster: &ClusterFiles, owner: Owner) -> Result<(), ScratchError> {
    if let Some(description) = &cluster.description {
        let text = serde_json::to_string(&description.0).expect("a JSON value is JSON");
        // It holds the cluster's private key and nothing in the container reads it.
        replace(config, "cluster.json", text.as_bytes(), 0o600)?;
    }
    let ssh = config.join("ssh");
    if cluster.ssh_keypair.is_some() || cluster.ssh_port_mapping.is_some() {
        fs::create_dir_all(&ssh)
            .and_then(|()| fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)))
            .map_err(|cause| ScratchError::make(&ssh, cause))?;
    }
    if let Some(keypair) = &cluster.ssh_keypair {
        let keys = [
            ("id_cluster", keypair.private_key.reveal(), 0o600),
            ("id_cluster.pub", &keypair.public_key, 0o644),
        ];
        for (name, content, mode) in keys {
            replace(&ssh, name, content.as_bytes(), mode)?;
            let path = ssh.join(name);
            change_at(&path, mode, owner).map_err(|cause| ScratchError::write(&path, cause))?;
        }
    }
    if let Some(mapping) = &cluster.ssh_port_mapping {
        let text = serde_json::to_string(mapping).expect("a JSON value is JSON");
        replace(&ssh, "port-mapping.json", text.as_bytes(), 0o644)?;
    }
    Ok(())
}

pub(super) fn write_config(config: &Path, files: &ConfigFiles) -> Result<(), ScratchError> {
    for device in &files.devices {
        let plain = matches!(
            Path::new(device).components().collect::<Vec<_>>()[..],
            [Component::Normal(_)]
        );
        let path = config.join(device);
        if plain {
            fs::create_dir_all(&path).map_err(|cause| ScratchError::make(&path, cause))?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                .map_err(|cause| ScratchError::make(&path, cause))?;
        }
    }
    replace(config, "environ.txt", files.environ.as_bytes(), 0o644)?;
    replace(config, "environ_base.txt", files.environ.as_bytes(), 0o644)?;
    replace(config, "resource.txt", files.resource.as_bytes(), 0o644)?;
    replace(
        config,
        "resource_base.txt",
        files.resource.as_bytes(),
        0o644,
    )?;
    if let Some(ports) = &files.intrinsic_ports {
        let text = serde_json::to_string(ports).expect("a JSON value is JSON");
        replace(config, "intrinsic-ports.json", text.as_bytes(), 0o644)?;
    }
    Ok(())
}

pub(super) fn record_container(config: &Path, container_id: &str) -> Result<(), ScratchError> {
    let path = config.join("resource.txt");
    let text = fs::read_to_string(&path).map_err(|cause| ScratchError::Read { path, cause })?;
    replace(
        config,
        "resource.txt",
        with_container_id(&text, container_id).as_bytes(),
        0o644,
    )
}

/// Writes a file of a directory that only the agent writes, whole or not at all: the container
/// reads it at any time. Where the kernel's user has filled the file system they share, a file that
/// is there is written over: else such a kernel could not be restarted.
fn replace(directory: &Path, name: &str, content: &[u8], mode: u32) -> Result<(), ScratchError> {
    let path = directory.join(name);
    let next = directory.join(format!(".{name}.next"));
    let written = (|| {
        // Left by an agent that died here.
        let _ = fs::remove_file(&next);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&next)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        fs::rename(&next, &path)
    })();
    written.or_else(|cause| {
        let _ = fs::remove_file(&next);
        let full = ScratchError::write(&path, cause);
        match full.is_full() && write_over(&path, content).is_ok() {
            true => Ok(()),
            false => Err(full),
        }
    })
}

/// Writes over a file without needing space: only when the new content fits in its blocks.
fn write_over(path: &Path, content: &[u8]) -> io::Result<()> {
    // The smallest block of the file systems a scratch lies on.
    const BLOCK: u64 = 1024;
    let file = OpenOptions::new().write(true).open(path)?;
    let length = content.len() as u64;
    if length > file.metadata()?.len().next_multiple_of(BLOCK) {
        return Err(io::ErrorKind::StorageFull.into());
    }
    file.write_all_at(content, 0)?;
    file.set_len(length)
}

/// Checks dotfiles before anything is created: paths that would leave `/home/work` are refused
/// (the original writes other absolute paths onto the host).
///
/// # Errors
/// The first dotfile with an impossible path or mode.
pub fn validate_dotfiles(dotfiles: &[Dotfile]) -> Result<(), ScratchError> {
    dotfiles
        .iter()
        .try_for_each(|dotfile| dotfile_place(dotfile).map(drop))
}

/// Path below `work`, and mode.
fn dotfile_place(dotfile: &Dotfile) -> Result<(PathBuf, u32), ScratchError> {
    let refused = || ScratchError::DotfilePath(dotfile.path.clone());
    let path = Path::new(&dotfile.path);
    let relative = match path.is_absolute() {
        true => path.strip_prefix(WORK).map_err(|_| refused())?,
        false => path,
    };
    let mut plain = PathBuf::new();
    for part in relative.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            _ => return Err(refused()),
        }
    }
    if plain.as_os_str().is_empty() || dotfile.path.contains('\0') || dotfile.path.ends_with('/') {
        return Err(refused());
    }
    let mode = dotfile.perm.trim();
    let digits = mode.strip_prefix("0o").unwrap_or(mode);
    match u32::from_str_radix(digits, 8) {
        Ok(bits) if bits <= 0o777 && !digits.starts_with('+') => Ok((plain, bits)),
        _ => {
            let (path, mode) = (dotfile.path.clone(), dotfile.perm.clone());
            Err(ScratchError::DotfileMode { path, mode })
        }
    }
}

/// The bytes of a file that nobody but this user can have written.
pub(super) fn read_own(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.cast_signed())
        .open(path)?;
    let found = file.metadata()?;
    let own = found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o022 == 0;
    if !found.is_file() || !own {
        let why = "it is not a file of this user that nobody else may write; before an agent takes over what another user's Python agent ran, give it to this user (chown) and to nobody else (chmod go-w)";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}
