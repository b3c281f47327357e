//! Lookup in an installed version: which file is mounted for which image.

use super::manifest::{Manifest, RunnerDirError};
use super::pinned_version;
use crate::kernel::distro::match_distro;
use crate::kernel::mounts::{Mount, display};
use crate::kernel::request::MountPermission;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why an installed runner can't serve an image.
#[derive(Debug, Error)]
pub enum LookupError {
    #[error(transparent)]
    Directory(#[from] RunnerDirError),
    #[error(
        "the image's base distro {distro} is not supported: the runner has no {kind} for it on {arch}; set the label ai.backend.base-distro to one of: {known}"
    )]
    Distro {
        distro: String,
        kind: &'static str,
        arch: String,
        known: String,
    },
    #[error("the installed runner lacks {0}; run `bai-agent runner verify`")]
    File(PathBuf),
}

/// A complete installed version, as plain paths. Cheap to clone and to hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunnerFiles {
    root: PathBuf,
    arch: String,
    version: String,
    environment_key: String,
    python: String,
    libbaihook: Vec<String>,
    jail: Vec<String>,
}

impl RunnerFiles {
    /// Opens the pinned version for `arch` below `runner_dir`.
    ///
    /// # Errors
    /// It is not (completely) installed; the message names the command that helps.
    pub fn open(runner_dir: &Path, arch: &str) -> Result<Self, LookupError> {
        Self::open_version(&runner_dir.join(pinned_version(arch)))
    }

    /// Opens one version's directory.
    ///
    /// # Errors
    /// It is not (completely) installed.
    pub fn open_version(root: &Path) -> Result<Self, LookupError> {
        let manifest = Manifest::read(root)?;
        let keys = |kind: &str, ending: &str| -> Vec<String> {
            let ending = format!(".{}.{ending}", manifest.arch);
            let files = manifest.files.iter();
            let names = files.filter_map(|file| file.path.strip_prefix("runner/"));
            names
                .filter_map(|name| name.strip_prefix(kind)?.strip_prefix('.'))
                .filter_map(|rest| rest.strip_suffix(&ending))
                .map(str::to_owned)
                .collect()
        };
        Ok(Self {
            root: root.to_owned(),
            libbaihook: keys("libbaihook", "so"),
            jail: keys("jail", "bin"),
            arch: manifest.arch,
            version: manifest.version,
            environment_key: manifest.environment_key,
            python: manifest.python,
        })
    }

    /// The version's directory; every mount source below it belongs to this version.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn version(&self) -> &str {
        &self.version
    }

    /// A file of `backend.ai-kernel-binary`, such as `.bashrc`.
    pub fn runner_file(&self, name: &str) -> PathBuf {
        self.root.join("runner").join(name)
    }

    /// The seccomp profile that the original applies to containers.
    pub fn seccomp_profile(&self) -> PathBuf {
        self.runner_file("default-seccomp.json")
    }

    /// What of the runner is mounted for an image of `distro`, with the sandbox's binary if
    /// `jail`. The environment is a bind mount of the version's directory; the original fills a
    /// Docker volume and trusts it ever after.
    ///
    /// # Errors
    /// The distro has no file here, or one is gone from the disk.
    pub fn mounts(&self, distro: &str, jail: bool) -> Result<Vec<Mount>, LookupError> {
        let arch = &self.arch;
        let hook = self.choose("libbaihook", &self.libbaihook, distro)?;
        let mut files = vec![
            (format!("su-exec.{arch}.bin"), "/opt/kernel/su-exec"),
            (
                format!("libbaihook.{hook}.{arch}.so"),
                "/opt/kernel/libbaihook.so",
            ),
            (
                format!("dropbearmulti.{arch}.bin"),
                "/opt/kernel/dropbearmulti",
            ),
            (format!("sftp-server.{arch}.bin"), "/opt/kernel/sftp-server"),
            (format!("tmux.{arch}.bin"), "/opt/kernel/tmux"),
            (format!("ttyd_linux.{arch}.bin"), "/opt/kernel/ttyd"),
            ("yank.sh".to_owned(), "/opt/kernel/yank.sh"),
            (format!("all-smi.{arch}.bin"), "/usr/local/bin/all-smi"),
            (
                "all-smi.1".to_owned(),
                "/usr/local/share/man/man1/all-smi.1",
            ),
        ];
        if distro.starts_with("alpine") {
            files.push(("terminfo.alpine3.8".to_owned(), "/home/work/.terminfo"));
        }
        files.extend([
            (
                "extract_dotfiles.py".to_owned(),
                "/opt/kernel/extract_dotfiles.py",
            ),
            ("entrypoint.sh".to_owned(), "/opt/kernel/entrypoint.sh"),
            ("fantompass.py".to_owned(), "/opt/kernel/fantompass.py"),
            ("hash_phrase.py".to_owned(), "/opt/kernel/hash_phrase.py"),
            ("words.json".to_owned(), "/opt/kernel/words.json"),
        ]);
        if jail {
            let key = self.choose("jail", &self.jail, distro)?;
            files.push((format!("jail.{key}.{arch}.bin"), "/opt/kernel/jail"));
        }
        let notice = "DO_NOT_STORE_PERSISTENT_FILES_HERE.md";
        files.push((
            notice.to_owned(),
            "/home/work/DO_NOT_STORE_PERSISTENT_FILES_HERE.md",
        ));
        let files = files
            .into_iter()
            .map(|(name, target)| (self.runner_file(&name), target.to_owned()));

        let keys = [self.environment_key.clone()];
        let key = self.choose("python environment", &keys, distro)?;
        let packages = format!(
            "/opt/backend.ai/lib/python{}/site-packages/ai/backend",
            self.python
        );
        let directories = [
            (
                self.root.join("krunner").join(key),
                "/opt/backend.ai".to_owned(),
            ),
            (self.root.join("kernel"), format!("{packages}/kernel")),
            (self.root.join("helpers"), format!("{packages}/helpers")),
        ];
        let mut mounts = Vec::new();
        for (source, target) in files.chain(directories) {
            if !source.exists() {
                return Err(LookupError::File(source));
            }
            mounts.push(Mount::bind(
                display(&source),
                target,
                MountPermission::ReadOnly,
            ));
        }
        Ok(mounts)
    }

    fn choose(
        &self,
        kind: &'static str,
        keys: &[String],
        distro: &str,
    ) -> Result<String, LookupError> {
        match match_distro(keys.iter().map(|key| (key.as_str(), ())), distro) {
            Some((key, ())) => Ok(key.to_owned()),
            None => Err(LookupError::Distro {
                distro: distro.to_owned(),
                kind,
                arch: self.arch.clone(),
                known: keys.join(", "),
            }),
        }
    }
}
