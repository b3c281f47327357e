//! Space on the node's own file systems.
//!
//! In: the mount table. Out: used and total bytes per block device. Invariants: a device that is
//! mounted at several places counts once; a mount that does not answer keeps its last numbers, is
//! asked again only once it has answered, and delays nobody.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinHandle;

/// How long a mount may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// More mounts than this are not looked at.
const LIMIT: usize = 256;
/// Kinds that hold no data of the node.
const SKIPPED: [&str; 5] = ["vfat", "lxcfs", "squashfs", "tmpfs", "iso9660"];

/// Space on one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes that cannot be used any more.
    pub used: u64,
    /// Bytes in all.
    pub total: u64,
}

type Question = JoinHandle<Option<Space>>;

/// The node's disks.
#[derive(Debug, Default)]
pub struct Disks {
    last: BTreeMap<String, Space>,
    unanswered: HashMap<String, Question>,
}

impl Disks {
    /// Asks all devices at once.
    pub async fn read(&mut self) -> Vec<(String, Space)> {
        let tables = tokio::task::spawn_blocking(|| {
            let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
            let kinds = std::fs::read_to_string("/proc/filesystems").ok()?;
            Some(devices(&mounts, &kinds))
        });
        let Ok(Ok(Some(devices))) = tokio::time::timeout(PATIENCE, tables).await else {
            return self.all();
        };
        self.ask(devices, |path| statvfs(&path)).await
    }

    async fn ask(
        &mut self,
        devices: Vec<(String, PathBuf)>,
        ask: impl Fn(PathBuf) -> Option<Space> + Clone + Send + 'static,
    ) -> Vec<(String, Space)> {
        let known: HashSet<&String> = devices.iter().map(|(device, _)| device).collect();
        self.last.retain(|device, _| known.contains(device));
        for (device, path) in devices {
            let ask = ask.clone();
            self.unanswered
                .entry(device)
                .or_insert_with(|| tokio::task::spawn_blocking(move || ask(path)));
        }
        let until = tokio::time::Instant::now() + PATIENCE;
        let mut answered = Vec::new();
        for (device, question) in &mut self.unanswered {
            // Not answered in time: it is waited for again in the next round.
            if let Ok(answer) = tokio::time::timeout_at(until, question).await {
                answered.push((device.clone(), answer.ok().flatten()));
            }
        }
        for (device, space) in answered {
            self.unanswered.remove(&device);
            if let Some(space) = space {
                self.last.insert(device, space);
            }
        }
        self.all()
    }

    fn all(&self) -> Vec<(String, Space)> {
        self.last
            .iter()
            .map(|(device, space)| (device.clone(), *space))
            .collect()
    }
}

fn statvfs(path: &Path) -> Option<Space> {
    let found = rustix::fs::statvfs(path).ok()?;
    let total = found.f_blocks.checked_mul(found.f_frsize)?;
    let available = found.f_bavail.saturating_mul(found.f_frsize);
    (total > 0).then_some(Space {
        used: total.saturating_sub(available),
        total,
    })
}

/// Each device once, with the first place it is mounted at.
fn devices(mounts: &str, kinds: &str) -> Vec<(String, PathBuf)> {
    let with_device: HashSet<&str> = kinds
        .lines()
        .filter(|line| !line.starts_with("nodev"))
        .map(str::trim)
        .chain(["zfs"])
        .filter(|kind| !SKIPPED.contains(kind))
        .collect();
    let mut seen = HashSet::new();
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, place, kind) = (words.next()?, words.next()?, words.next()?);
            let place = unescape(place);
            let wanted = with_device.contains(kind)
                && !device.is_empty()
                && device != "none"
                && !place.starts_with("/proc/docker/runtime-runc/moby/")
                && seen.insert(device);
            wanted.then(|| (unescape(device), PathBuf::from(place)))
        })
        .take(LIMIT)
        .collect()
}

/// Blanks, tabs, newlines and backslashes are octal in the mount table.
fn unescape(word: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(word.to_owned(), |text, (escaped, plain)| {
        text.replace(escaped, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: &str = "nodev\tsysfs\nnodev\ttmpfs\n\text4\n\tvfat\n\tsquashfs\n\txfs\n";

    #[test]
    fn a_device_counts_once_and_only_if_it_is_one() {
        let mounts = "proc /proc proc rw 0 0\n\
                      /dev/vda1 / ext4 rw 0 0\n\
                      /dev/vda1 /var/lib/docker/x ext4 rw 0 0\n\
                      /dev/vda2 /boot/efi vfat rw 0 0\n\
                      tank/data /tank zfs rw 0 0\n\
                      overlay /var/lib/docker/overlay2/a/merged overlay rw 0 0\n\
                      nas:/home /home nfs4 rw 0 0\n\
                      /dev/vdb /with\\040blank xfs rw 0 0\n\
                      broken\n";
        let found = devices(mounts, KINDS);
        let wanted = [
            ("/dev/vda1", "/"),
            ("tank/data", "/tank"),
            ("/dev/vdb", "/with blank"),
        ];
        assert_eq!(
            found,
            wanted.map(|(device, place)| (device.to_owned(), PathBuf::from(place)))
        );
    }

    #[tokio::test]
    async fn a_mount_that_hangs_keeps_its_numbers_and_is_not_asked_twice() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};
        let asked = Arc::new(AtomicUsize::new(0));
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let gate = Arc::new(std::sync::Mutex::new(gate));
        let ask = {
            let asked = asked.clone();
            move |path: PathBuf| {
                if path == Path::new("/slow") && asked.fetch_add(1, Ordering::SeqCst) > 0 {
                    let _ = gate.lock().unwrap().recv();
                }
                Some(Space { used: 1, total: 2 })
            }
        };
        let mounts = || {
            vec![
                ("/dev/a".to_owned(), PathBuf::from("/fast")),
                ("/dev/b".to_owned(), PathBuf::from("/slow")),
            ]
        };
        let mut disks = Disks::default();
        assert_eq!(disks.ask(mounts(), ask.clone()).await.len(), 2);
        for _ in 0..2 {
            assert_eq!(disks.ask(mounts(), ask.clone()).await.len(), 2);
            assert_eq!(asked.load(Ordering::SeqCst), 2);
        }
        drop(release);
        assert_eq!(disks.ask(mounts(), ask).await.len(), 2);
        assert!(disks.unanswered.is_empty());
    }

    #[tokio::test]
    async fn this_host_has_a_disk() {
        let mut disks = Disks::default();
        for (device, space) in disks.read().await {
            assert!(space.used <= space.total, "{device}: {space:?}");
        }
    }
}
