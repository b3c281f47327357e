//! Block devices that lie on others: device mapper (LVM, LUKS), md and the like.
//!
//! In: /sys. Out: sums of what a cgroup has done at devices in which no I/O is twice. The kernel counts for a cgroup at
//! each device that its I/O comes to. Whether that below is charged to it as well depends on kind, direction and
//! kernel: Linux 6.1 charges what LVM hands on; that of dm-crypt, and of LVM through the cache, not before a fix of
//! 2026; what md writes for RAID 5 never, nor what a multipath of requests does. So the devices that lie on each other
//! are looked at as layers, and the layer with most counts. Invariants: no layer has a device above another of it, so
//! it has no I/O twice, but for copies that a mirror makes; a sum goes back only when devices come or go.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::{Budget, CachedFile, number};

/// More devices than this are not looked at.
const MOST_DEVICES: usize = 4096;
/// Deepest pile of devices told apart.
const MOST_LAYERS: usize = 16;
/// Kinds of virtual devices that lie on no other, of which a host may have many.
const LIE_ON_NONE: [&str; 4] = ["loop", "ram", "zram", "nbd"];

/// Major and minor number.
pub type Device = (u32, u32);

/// `8:16`.
pub fn device(text: &str) -> Option<Device> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Which devices lie on each other.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stacks {
    /// The layers a device is in: that of its height, and that of those on which nothing lies.
    layers_of: HashMap<Device, (usize, Option<usize>)>,
    /// Layers of each stack.
    stacks: Vec<Range<usize>>,
}

fn add<const N: usize>(sums: &mut [u64; N], counts: [u64; N]) {
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum = sum.saturating_add(count);
    }
}

impl Stacks {
    /// Of devices, and those that each of them lies on.
    fn of(holders: &[(Device, Vec<Device>)]) -> Self {
        let holders = || holders.iter().filter(|(_, below)| !below.is_empty());
        let mut heights = HashMap::new();
        let mut stacks = HashMap::new();
        for (name, (holder, below)) in holders().enumerate() {
            for device in below.iter().chain([holder]) {
                heights.entry(*device).or_insert(0);
                stacks.entry(*device).or_insert(name);
            }
        }
        for _ in 1..MOST_LAYERS {
            for (holder, below) in holders() {
                let highest = below.iter().filter_map(|it| heights.get(it)).max();
                let height = highest.map_or(0, |it| it + 1).min(MOST_LAYERS - 1);
                heights.insert(*holder, height);
            }
        }
        // A stack is called by the least name of what is in it.
        let mut changed = true;
        while std::mem::take(&mut changed) {
            for (holder, below) in holders() {
                let all = || below.iter().chain([holder]);
                let Some(least) = all().filter_map(|it| stacks.get(it)).min().copied() else {
                    continue;
                };
                for device in all() {
                    changed |= stacks.insert(*device, least) != Some(least);
                }
            }
        }
        let covered: HashSet<Device> = holders().flat_map(|(_, below)| below).copied().collect();
        let mut names: Vec<usize> = stacks.values().copied().collect();
        names.sort_unstable();
        names.dedup();
        // Layers for all heights there may be, and one of those on top.
        let first = |name: usize| names.binary_search(&name).unwrap_or(0) * (MOST_LAYERS + 1);
        let layers_of = heights.iter().filter_map(|(device, height)| {
            let first = first(*stacks.get(device)?);
            let top = (!covered.contains(device)).then_some(first + MOST_LAYERS);
            Some((*device, (first + height, top)))
        });
        Self {
            layers_of: layers_of.collect(),
            stacks: names
                .iter()
                .map(|name| first(*name)..first(*name) + MOST_LAYERS + 1)
                .collect(),
        }
    }

    /// No device lies on another.
    pub fn is_empty(&self) -> bool {
        self.stacks.is_empty()
    }

    /// Adds up what was counted at devices. What is known of no device counts.
    pub fn sum<const N: usize>(
        &self,
        counted: impl Iterator<Item = (Option<Device>, [u64; N])>,
    ) -> [u64; N] {
        let mut sums = [0; N];
        let mut layers = vec![[0; N]; self.stacks.last().map_or(0, |it| it.end)];
        for (device, counts) in counted {
            let Some((layer, top)) = device.and_then(|it| self.layers_of.get(&it)) else {
                add(&mut sums, counts);
                continue;
            };
            for place in [Some(*layer), *top].into_iter().flatten() {
                if let Some(layer) = layers.get_mut(place) {
                    add(layer, counts);
                }
            }
        }
        for stack in &self.stacks {
            let mut most = [0; N];
            for layer in layers.get(stack.clone()).unwrap_or_default() {
                for (most, count) in most.iter_mut().zip(layer) {
                    *most = (*most).max(*count);
                }
            }
            add(&mut sums, most);
        }
        sums
    }
}

/// Knows which devices lie on each other as they come and go.
#[derive(Debug)]
pub struct StackReader {
    /// Where /sys is mounted.
    root: PathBuf,
    /// How often the kernel has told of a device.
    events: CachedFile,
    seen: Option<u64>,
    stacks: Stacks,
}

impl StackReader {
    /// By the /sys at `root`. Nothing is known before the first [`StackReader::refresh`].
    pub fn new(root: &Path, budget: &Arc<Budget>) -> Self {
        Self {
            root: root.to_owned(),
            events: CachedFile::new(root.join("kernel/uevent_seqnum"), budget),
            seen: None,
            stacks: Stacks::default(),
        }
    }

    /// Looks again, if the kernel has told of any device since; each time where it can't be asked.
    pub fn refresh(&mut self, buffer: &mut Vec<u8>) {
        // Before the devices: what comes after it is seen next time.
        let events = self.events.read_if_offered(buffer).and_then(number);
        if events.is_some() && events == self.seen {
            return;
        }
        self.seen = events;
        let stacks = Stacks::of(&holders(&self.root));
        if stacks != self.stacks {
            tracing::debug!(
                devices = stacks.layers_of.len(),
                "block devices lie on others, so `io.stat` is read where cgroups are of version 2"
            );
            self.stacks = stacks;
        }
    }

    /// As of the last look.
    pub fn stacks(&self) -> &Stacks {
        &self.stacks
    }
}

fn number_of(directory: &Path) -> Option<Device> {
    device(&std::fs::read_to_string(directory.join("dev")).ok()?)
}

/// Devices, and those that each of them lies on. What can't be read lies on nothing.
fn holders(root: &Path) -> Vec<(Device, Vec<Device>)> {
    let Ok(devices) = std::fs::read_dir(root.join("devices/virtual/block")) else {
        return Vec::new();
    };
    let devices = devices.take(MOST_DEVICES).flatten().filter(|it| {
        let name = it.file_name();
        let name = name.to_string_lossy();
        !LIE_ON_NONE.iter().any(|kind| name.starts_with(kind))
    });
    devices
        .filter_map(|entry| {
            let slaves = std::fs::read_dir(entry.path().join("slaves")).ok()?;
            let below = slaves.take(MOST_DEVICES).flatten().filter_map(|slave| {
                let path = slave.path();
                // Cgroups count by whole disks.
                match path.join("partition").exists() {
                    true => number_of(&path.join("..")),
                    false => number_of(&path),
                }
            });
            let below: Vec<Device> = below.collect();
            Some((
                number_of(&entry.path()).filter(|_| !below.is_empty())?,
                below,
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const SDA: Device = (8, 0);
    const SDB: Device = (8, 16);
    const CRYPT: Device = (254, 0);
    const HOME: Device = (254, 1);
    const DATA: Device = (254, 2);
    const OTHER: Device = (259, 0);

    fn sum(stacks: &Stacks, counted: &[(Device, [u64; 2])]) -> [u64; 2] {
        stacks.sum(counted.iter().map(|(device, it)| (Some(*device), *it)))
    }

    #[test]
    fn what_passes_several_devices_counts_once() {
        // Two volumes on a disk that is encrypted, and one on another.
        let stacks = Stacks::of(&[
            (HOME, vec![CRYPT]),
            (CRYPT, vec![SDA]),
            (DATA, vec![SDB]),
            (OTHER, vec![]),
        ]);
        // All is charged on the way down; a little more was done on the disk itself.
        let passed = [(HOME, [10, 7]), (CRYPT, [10, 7]), (SDA, [11, 8])];
        assert_eq!(sum(&stacks, &passed), [11, 8]);
        // What dm-crypt writes is not charged.
        let kept = [(HOME, [10, 7]), (CRYPT, [10, 7]), (SDA, [10, 0])];
        assert_eq!(sum(&stacks, &kept), [10, 7]);
        // Other stacks and devices beside it.
        let beside = [(DATA, [100, 1]), (SDB, [100, 2]), (OTHER, [1000, 4])];
        let all: Vec<_> = kept.iter().chain(&beside).copied().collect();
        assert_eq!(sum(&stacks, &all), [1110, 13]);
        let nowhere = stacks.sum([(None, [1, 2]), (Some(SDB), [4, 8])].into_iter());
        assert_eq!(nowhere, [5, 10]);
        assert_eq!(
            sum(&Stacks::default(), &passed),
            [31, 22],
            "nothing is known"
        );
        assert_eq!(sum(&stacks, &[]), [0, 0]);
    }

    #[test]
    fn layers_go_by_height_and_what_is_on_top_counts_together() {
        // Beside a volume of the disk an encrypted one with a volume on it, all of which the disk is charged nothing for.
        let stacks = Stacks::of(&[(HOME, vec![CRYPT]), (DATA, vec![SDA]), (CRYPT, vec![SDA])]);
        let tops = [
            (HOME, [5, 0]),
            (DATA, [7, 0]),
            (CRYPT, [0, 0]),
            (SDA, [0, 0]),
        ];
        assert_eq!(sum(&stacks, &tops), [12, 0]);
        // What a partition of the encrypted one has done besides.
        let middle = [(HOME, [5, 0]), (CRYPT, [9, 0]), (SDA, [0, 0])];
        assert_eq!(sum(&stacks, &middle), [9, 0]);
        // Striped over two disks: halves.
        let striped = Stacks::of(&[(DATA, vec![SDA, SDB])]);
        let halves = [(DATA, [8, 6]), (SDA, [4, 3]), (SDB, [4, 3])];
        assert_eq!(sum(&striped, &halves), [8, 6]);
        // A mirror: each copy counts.
        let copies = [(DATA, [8, 6]), (SDA, [8, 6]), (SDB, [0, 6])];
        assert_eq!(sum(&striped, &copies), [8, 12]);
    }

    #[test]
    fn what_cannot_be_is_survived() {
        let stacks = Stacks::of(&[(SDA, vec![SDB]), (SDB, vec![SDA]), (HOME, vec![HOME])]);
        let counted = [(SDA, [1, 1]), (SDB, [2, 2]), (HOME, [4, 4])];
        assert!(sum(&stacks, &counted).iter().all(|it| (6..=7).contains(it)));
        let pile: Vec<_> = (0..100)
            .map(|at| ((253, at + 1), vec![(253, at)]))
            .collect();
        let stacks = Stacks::of(&pile);
        assert_eq!(
            sum(&stacks, &[((253, 0), [3, 3]), ((253, 1), [3, 3])]),
            [3, 3]
        );
    }

    #[test]
    fn devices_are_found_as_they_come_and_go() {
        let root = tempfile::tempdir().unwrap();
        let sys = |path: &str| root.path().join(path);
        let make = |path: &str, number: &str| {
            std::fs::create_dir_all(sys(path).join("slaves")).unwrap();
            std::fs::write(sys(path).join("dev"), number).unwrap();
        };
        std::fs::create_dir_all(sys("kernel")).unwrap();
        std::fs::write(sys("kernel/uevent_seqnum"), "7\n").unwrap();
        let mut reader = StackReader::new(root.path(), &Budget::new(10));
        let mut refreshed = |told: &str| {
            std::fs::write(sys("kernel/uevent_seqnum"), told).unwrap();
            reader.refresh(&mut Vec::new());
            reader.stacks().clone()
        };
        assert!(refreshed("7\n").is_empty(), "no block device at all");
        make("devices/virtual/block/dm-0", "254:0\n");
        make("devices/virtual/block/loop0", "7:0\n");
        make("devices/pci/block/sda", "8:0\n");
        make("devices/pci/block/sda/sda2", "8:2\n");
        std::fs::write(sys("devices/pci/block/sda/sda2/partition"), "2\n").unwrap();
        assert!(refreshed("8\n").is_empty(), "it lies on nothing yet");
        let link = sys("devices/virtual/block/dm-0/slaves/sda2");
        symlink("../../../../pci/block/sda/sda2", &link).unwrap();
        assert!(refreshed("8\n").is_empty(), "not told of");
        assert_eq!(refreshed("9\n"), Stacks::of(&[(CRYPT, vec![SDA])]));
        std::fs::remove_file(link).unwrap();
        assert!(refreshed("10\n").is_empty());
    }
}
