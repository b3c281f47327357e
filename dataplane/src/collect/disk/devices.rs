//! The devices that are mounted on this node.
//!
//! In: the mount table and the kinds of file systems. Out: each device once, loop devices last. Invariant: nothing here
//! touches a file system that may hang.

use std::collections::HashSet;
use std::path::PathBuf;

use shared::procfs::unescape;

/// More devices than this are not looked at.
const LIMIT: usize = 256;
/// Kinds that hold no data of the node.
const SKIPPED: [&str; 5] = ["vfat", "lxcfs", "squashfs", "tmpfs", "iso9660"];

/// A device and where it is mounted first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// Its path, or what the file system calls it.
    pub name: String,
    /// Its first mount point.
    pub place: PathBuf,
}

impl Device {
    /// Whether a file stands for it: that of a scratch directory, or an image.
    pub(super) fn is_loop(&self) -> bool {
        self.name.starts_with("/dev/loop")
    }
}

/// Reads the tables; `None` when they can't be read.
pub(super) fn list() -> Option<Vec<Device>> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let kinds = std::fs::read_to_string("/proc/filesystems").ok()?;
    Some(devices(&mounts, &kinds))
}

fn devices(mounts: &str, kinds: &str) -> Vec<Device> {
    let with_device: HashSet<&str> = kinds
        .lines()
        .filter(|line| !line.starts_with("nodev"))
        .map(str::trim)
        .chain(["zfs"])
        .filter(|kind| !SKIPPED.contains(kind))
        .collect();
    let mut seen = HashSet::new();
    let mut found: Vec<Device> = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, place, kind) = (words.next()?, words.next()?, words.next()?);
            let wanted = with_device.contains(kind)
                && !device.is_empty()
                && device != "none"
                && !place.starts_with("/proc/docker/runtime-runc/moby/")
                && seen.insert(device);
            wanted.then(|| Device {
                name: unescape(device).to_string_lossy().into_owned(),
                place: unescape(place),
            })
        })
        .collect();
    // Where there are too many these are left out: what is on them lies on others.
    found.sort_by_key(Device::is_loop);
    found.truncate(LIMIT);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_counts_once_and_only_if_it_is_one() {
        let kinds = "nodev\tsysfs\nnodev\ttmpfs\n\text4\n\tvfat\n\tsquashfs\n\txfs\n";
        let mounts = "proc /proc proc rw 0 0\n\
                      /dev/loop3 /scratches/a ext4 rw 0 0\n\
                      /dev/vda1 / ext4 rw 0 0\n\
                      /dev/vda1 /var/lib/docker/x ext4 rw 0 0\n\
                      /dev/vda2 /boot/efi vfat rw 0 0\n\
                      tank/data /tank zfs rw 0 0\n\
                      overlay /var/lib/docker/overlay2/a/merged overlay rw 0 0\n\
                      nas:/home /home nfs4 rw 0 0\n\
                      /dev/vdb /with\\040blank xfs rw 0 0\n\
                      broken\n";
        let wanted = [
            ("/dev/vda1", "/"),
            ("tank/data", "/tank"),
            ("/dev/vdb", "/with blank"),
            ("/dev/loop3", "/scratches/a"),
        ];
        let wanted = wanted.map(|(name, place)| Device {
            name: name.to_owned(),
            place: PathBuf::from(place),
        });
        assert_eq!(devices(mounts, kinds), wanted);
    }
}
