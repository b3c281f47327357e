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
    let home = WorkDirectory::open(paths, new, IfExists::Write)?;
    if let Some(script) = new
        .bootstrap_script
        .as_deref()
        .filter(|script| !script.is_empty())
    {
        home.put(Path::new("bootstrap.sh"), script, 0o644)?;
    }
    home.parts().try_for_each(|part| home.place(part))?;
    write_cluster(&paths.config, &new.cluster, new.owner)?;
    write_credentials(&paths.config, &new.docker_credentials)
}

/// Puts back what a restart finds changed or gone of what the request brings: all but the bootstrap
/// script, as in the original. What fails does so alone, as mostly the kernel's user is why.
pub(super) fn renew(
    paths: &ScratchPaths,
    new: &NewScratch,
) -> Result<Vec<ScratchError>, ScratchError> {
    let home = WorkDirectory::open(paths, new, IfExists::Renew)?;
    let placed = home.parts().map(|part| home.place(part));
    let of_config = [
        write_cluster(&paths.config, &new.cluster, new.owner),
        write_credentials(&paths.config, &new.docker_credentials),
    ];
    Ok(placed.chain(of_config).filter_map(Result::err).collect())
}

/// What is done about a file of the request that is there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfExists {
    Write,
    /// One that is as it was stays so, as a full disk could leave nothing of it.
    Renew,
}

/// What a request brings into `work`.
enum RequestFile<'a> {
    /// A key: the name, its text, and whether one that is there may be the user's own.
    Key(&'static str, &'a str, bool),
    Dotfile(&'a Dotfile),
}

/// The kernel's `work`, whose user may have put anything there.
struct WorkDirectory<'a> {
    work: Beneath,
    path: &'a Path,
    new: &'a NewScratch,
    over: IfExists,
}

impl<'a> WorkDirectory<'a> {
    fn open(
        paths: &'a ScratchPaths,
        new: &'a NewScratch,
        over: IfExists,
    ) -> Result<Self, ScratchError> {
        let path = paths.work.as_path();
        let work = Beneath::open(path).map_err(|cause| ScratchError::Read {
            path: path.to_owned(),
            cause,
        })?;
        Ok(Self {
            work,
            path,
            new,
            over,
        })
    }

    fn parts(&self) -> impl Iterator<Item = RequestFile<'a>> + use<'a> {
        let keys = self.new.ssh_keypair.iter().flat_map(|keypair| {
            let private = keypair.private_key.reveal();
            [
                RequestFile::Key(".ssh/authorized_keys", &keypair.public_key, false),
                RequestFile::Key(".ssh/id_rsa", private, true),
                RequestFile::Key("id_container", private, false),
            ]
        });
        keys.chain(self.new.dotfiles.iter().map(RequestFile::Dotfile))
    }

    fn place(&self, part: RequestFile<'_>) -> Result<(), ScratchError> {
        match part {
            RequestFile::Key(name, text, perhaps_own) => {
                let path = Path::new(name);
                if let Some(parent) = path.parent().filter(|parent| !is_here(parent)) {
                    self.make(parent, 0o700)?;
                    // sshd takes no keys out of a directory that others may write to.
                    self.work
                        .set_directory(parent, 0o700, self.new.owner)
                        .map_err(|cause| ScratchError::write(&self.path.join(parent), cause))?;
                }
                let keep = perhaps_own && self.over == IfExists::Renew;
                let there = || self.work.exists(path);
                if keep
                    && there().map_err(|cause| ScratchError::write(&self.path.join(path), cause))?
                {
                    return Ok(());
                }
                match self.has(path, text) {
                    // Nor out of such a file.
                    true => self
                        .work
                        .set_file(path, 0o600, self.new.owner)
                        .map_err(|cause| ScratchError::write(&self.path.join(path), cause)),
                    false => self.put(path, text, 0o600),
                }
            }
            RequestFile::Dotfile(dotfile) => {
                let (path, mode) = dotfile_place(dotfile)?;
                let mut content = dotfile.data.reveal().to_owned();
                if !content.ends_with('\n') {
                    content.push('\n');
                }
                if let Some(parent) = path.parent().filter(|parent| !is_here(parent)) {
                    // The original gives the file's own mode to every directory on the way, so that
                    // 0644 makes them impassable: here those it makes can be entered by who may read.
                    self.make(parent, mode | 0o700 | ((mode & 0o044) >> 2))?;
                }
                match self.has(&path, &content) {
                    true => Ok(()),
                    false => self.put(&path, &content, mode),
                }
            }
        }
    }

    fn make(&self, path: &Path, mode: u32) -> Result<(), ScratchError> {
        self.work
            .make_directories(path, mode, self.new.owner)
            .map_err(|cause| ScratchError::make(&self.path.join(path), cause))
    }

    /// Whether nothing is to be written at a restart: it is there.
    fn has(&self, path: &Path, content: &str) -> bool {
        let content = content.as_bytes();
        let there = || self.work.read(path, content.len() as u64);
        self.over == IfExists::Renew && there().is_ok_and(|there| there == content)
    }

    fn put(&self, path: &Path, content: &str, mode: u32) -> Result<(), ScratchError> {
        self.work
            .write(path, content.as_bytes(), mode, self.new.owner)
            .map_err(|cause| ScratchError::write(&self.path.join(path), cause))
    }
}

/// Whether a relative path names the directory itself.
fn is_here(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

fn write_credentials(config: &Path, credentials: &Confidential) -> Result<(), ScratchError> {
    let credentials = &credentials.0;
    let empty = credentials
        .as_object()
        .is_some_and(serde_json::Map::is_empty);
    if credentials.is_null() || empty {
        return Ok(());
    }
    let text = serde_json::to_string(credentials).expect("a JSON value is JSON");
    replace(config, "docker-creds.json", text.as_bytes(), 0o644)
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
