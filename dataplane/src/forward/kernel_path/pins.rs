//! Where the kernel path's maps and links are pinned, so that they outlive the process.
//!
//! `<bpf file system>/bai-agent/<agent>-<run directory>-<network namespace>/v<layout>/`: one directory
//! per agent, and per namespace because interface numbers mean nothing in another. Out: paths and
//! the removal of what is stale. Invariant: nothing outside the agent's own directory is touched.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::pins::{Claim, HOME};

use super::attach;
use crate::causes::chain;
use crate::sys::bpf;
use crate::sys::netlink::LinkLookup;

/// Where the kernel's own tools look for pins; systemd mounts it at boot.
const FILE_SYSTEM: &str = "/sys/fs/bpf";
/// What names of filters' programs begin with.
const FILTER: &str = "filter-";
/// What names of hooks begin with.
const HOOK: &str = "hook-";

/// A step that failed.
#[derive(Debug, thiserror::Error)]
pub enum PinsError {
    /// There is no file system for pins and none can be mounted.
    #[error("no BPF file system at {FILE_SYSTEM}, and it can't be mounted")]
    Mount(#[source] io::Error),
    /// The namespace of this process can't be told.
    #[error("the network namespace can't be looked at")]
    Namespace(#[source] io::Error),
    /// A directory can't be made, or not be claimed for this agent.
    #[error("cannot make {path}", path = path.display())]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A pin or directory can't be removed.
    #[error("cannot remove {path}", path = path.display())]
    Remove {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The file system refuses names with dots, and slashes divide names.
fn plain(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' => out.push(char::from(byte)),
            other => out.push_str(&format!("_{other:02x}")),
        }
    }
    // File names end at 255 bytes; what is cut is in the digest.
    out.truncate(120);
    out
}

/// FNV-1a: the same over the years, which the standard library's does not promise.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What the directories of one agent begin with. `root` is the agent's run directory.
fn stem(agent: &str, root: &Path) -> String {
    let identity = format!("{}\0{agent}", root.display());
    format!("{}-{:016x}-", plain(agent), digest(identity.as_bytes()))
}

fn remove_tree(path: &Path) -> Result<(), PinsError> {
    match std::fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(PinsError::Remove {
            path: path.to_owned(),
            source,
        }),
    }
}

fn remove_pin(path: PathBuf) -> Result<(), PinsError> {
    match std::fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(PinsError::Remove { path, source }),
    }
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(path).into_iter().flatten();
    entries.flatten().map(|entry| entry.path()).collect()
}

/// What every version has left in the directory of an agent.
fn layouts(home: &Path) -> Vec<Pins> {
    // Not what a link leads to: the owner's is one.
    let is_directory = |path: &PathBuf| path.symlink_metadata().is_ok_and(|it| it.is_dir());
    let directories = children(home).into_iter().filter(is_directory);
    directories
        .map(|directory| Pins {
            directory,
            _claim: None,
        })
        .collect()
}

/// Which side of a container's traffic a link is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Where clients come in.
    Uplink,
    /// The host's end of a container's link.
    Container,
    /// The same, on the way into the container.
    Guard,
}

impl Side {
    fn word(self) -> &'static str {
        match self {
            Side::Uplink => "uplink",
            Side::Container => "container",
            Side::Guard => "guard",
        }
    }
}

/// The directory of one agent's pins.
#[derive(Debug, Clone)]
pub struct Pins {
    directory: PathBuf,
    /// Tells others that this agent runs.
    _claim: Option<Arc<Claim>>,
}

impl Pins {
    /// Makes the directory of this agent in this network namespace, mounting the file system if
    /// need be.
    ///
    /// # Errors
    /// The step that failed.
    pub fn open(agent: &str, root: &Path) -> Result<Self, PinsError> {
        let file_system = Path::new(FILE_SYSTEM);
        if !bpf::holds_pins(file_system) {
            bpf::mount_pins(file_system).map_err(PinsError::Mount)?;
        }
        let namespace = namespace().map_err(PinsError::Namespace)?;
        let home = Path::new(HOME).join(format!("{}{namespace}", stem(agent, root)));
        let directory = home.join(format!("v{}", ebpf::records::LAYOUT));
        let failed = |source| PinsError::Make {
            path: directory.clone(),
            source,
        };
        std::fs::create_dir_all(&directory).map_err(failed)?;
        let claim = shared::pins::claim(&home, root).map_err(failed)?;
        Ok(Self {
            directory,
            _claim: Some(Arc::new(claim)),
        })
    }

    /// Where maps are pinned by name.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where a link is pinned.
    pub fn link(&self, side: Side, index: u32) -> PathBuf {
        self.directory.join(format!("{}-{index}", side.word()))
    }

    /// Where the program of a filter is pinned. The filter itself can't be.
    pub fn filter(&self, side: Side, index: u32) -> PathBuf {
        self.directory
            .join(format!("{FILTER}{}-{index}", side.word()))
    }

    /// Where a hook at the control groups is pinned.
    pub fn hook(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{HOOK}{name}"))
    }

    /// The number of its layout.
    pub fn layout(&self) -> u16 {
        let name = self.directory.file_name().unwrap_or_default();
        let number = name
            .to_str()
            .and_then(|it| it.strip_prefix('v')?.parse().ok());
        number.unwrap_or(0)
    }

    /// A number of this directory's own, by which its filters are known.
    pub fn number(&self) -> u16 {
        let digest = digest(self.directory.as_os_str().as_encoded_bytes());
        u16::try_from(digest % 0x7fff).unwrap_or(0) + 1
    }

    /// All links and filters pinned here.
    pub fn links(&self) -> Vec<(Side, u32)> {
        let mut found = Vec::new();
        for path in children(&self.directory) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = name.strip_prefix(FILTER).unwrap_or(&name);
            for side in [Side::Uplink, Side::Container, Side::Guard] {
                let index = name
                    .strip_prefix(side.word())
                    .and_then(|rest| rest.strip_prefix('-'))
                    .and_then(|index| index.parse().ok());
                found.extend(index.map(|index| (side, index)));
            }
        }
        found
    }

    /// Takes away the pin of a filter's program. Nothing there is fine.
    ///
    /// # Errors
    /// It is there and can't be removed.
    pub fn remove_filter(&self, side: Side, index: u32) -> Result<(), PinsError> {
        remove_pin(self.filter(side, index))
    }

    /// Takes a link's pin away, which detaches it. Nothing there is fine.
    ///
    /// # Errors
    /// It is there and can't be removed.
    pub fn remove_link(&self, side: Side, index: u32) -> Result<(), PinsError> {
        remove_pin(self.link(side, index))
    }

    /// Takes a map's pin away. Nothing there is fine.
    ///
    /// # Errors
    /// It is there and can't be removed.
    pub fn remove_map(&self, name: &str) -> Result<(), PinsError> {
        remove_pin(self.directory.join(name))
    }

    /// Removes every pin of this layout: the next load starts afresh.
    ///
    /// # Errors
    /// A pin can't be removed.
    pub fn clear(&self) -> Result<(), PinsError> {
        for path in children(&self.directory) {
            std::fs::remove_file(&path).map_err(|source| PinsError::Remove { path, source })?;
        }
        Ok(())
    }

    /// Removes all of it: whatever was held is detached.
    ///
    /// # Errors
    /// The directory can't be removed.
    pub fn remove(&self) -> Result<(), PinsError> {
        remove_tree(&self.directory)
    }

    /// Removes the hooks that lead sockets, and none of those that remember which were led.
    ///
    /// # Errors
    /// A pin can't be removed.
    pub fn remove_leading_hooks(&self) -> Result<(), PinsError> {
        for name in ebpf::LEADING_HOOKS {
            remove_pin(self.hook(name))?;
        }
        Ok(())
    }

    /// Removes all hooks.
    ///
    /// # Errors
    /// A pin can't be removed.
    pub fn remove_hooks(&self) -> Result<(), PinsError> {
        let is_hook = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default();
            name.as_encoded_bytes().starts_with(HOOK.as_bytes())
        };
        for path in children(&self.directory).into_iter().filter(is_hook) {
            remove_pin(path)?;
        }
        Ok(())
    }

    /// What other versions of the program have left of this agent in this namespace.
    pub fn other_layouts(&self) -> Vec<Pins> {
        let mut others = self.directory.parent().map(layouts).unwrap_or_default();
        others.retain(|it| it.directory != self.directory);
        others
    }
}

/// What every version has left of an agent in the namespace of this process.
pub fn here(agent: &str, root: &Path) -> Vec<Pins> {
    let Ok(namespace) = namespace() else {
        return Vec::new();
    };
    layouts(&Path::new(HOME).join(format!("{}{namespace}", stem(agent, root))))
}

/// Removes what agents that are gone have left: they do not run and have no run directory to come
/// back to. A host has room for 64 programs of a kind at its sockets.
pub fn remove_abandoned(names: &LinkLookup) {
    let own_namespace = namespace().map_or_else(|_| String::new(), |it| format!("-{it}"));
    for home in shared::pins::abandoned(Path::new(HOME)) {
        let name = home.file_name().unwrap_or_default().to_string_lossy();
        // Filters of other namespaces are out of reach, and go with those.
        if name.ends_with(&own_namespace) {
            for pins in layouts(&home) {
                attach::remove_filters(&pins, names);
            }
        }
        match remove_tree(&home) {
            Ok(()) => tracing::info!(pins = %home.display(), "pins of an agent that is gone"),
            Err(err) => tracing::warn!(err = chain(&err), "pins stay"),
        }
    }
}

fn namespace() -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/self/ns/net")?.ino())
}

/// Removes all pins of an agent, of every version and namespace: whatever they held is detached.
/// Answers the directories that were there.
///
/// # Errors
/// A directory can't be removed.
pub fn detach(agent: &str, root: &Path) -> Result<Vec<PathBuf>, PinsError> {
    let home = Path::new(HOME);
    let stem = stem(agent, root);
    let mut removed = Vec::new();
    for path in children(home) {
        let own = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(&stem));
        if own {
            remove_tree(&path)?;
            removed.push(path);
        }
    }
    if !removed.is_empty() {
        // Others may have theirs in it.
        let _ = std::fs::remove_dir(home);
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fit_for_the_file_system_and_differ() {
        let root = Path::new("/run/bai-agent/i-a.b");
        let name = stem("i-a.b", root);
        assert!(name.starts_with("i-a_2eb-"), "{name}");
        assert!(!name.contains('.'));
        assert_ne!(name, stem("i-a.b", Path::new("/dev/shm/bai-agent/i-a.b")));
        assert_ne!(stem("i-a", root), stem("i-b", root));
        let long = "x".repeat(300);
        assert!(stem(&long, root).len() < 200);
    }
}
