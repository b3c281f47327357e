//! Block devices that lie on others: device mapper (LVM, LUKS), md and the like, and loop devices of files on disks.
//!
//! In: /sys and the table of mounts. Out: sums of what a cgroup has done at devices in which no I/O is twice. The kernel counts for a cgroup at
//! each device that its I/O comes to. Whether that below is charged to it as well depends on kind, direction and
//! kernel: Linux 6.1 charges what LVM hands on; that of dm-crypt, and of LVM through the cache, not before a fix of
//! 2026; what md writes for RAID 5 never, nor what a multipath of requests does; of loop devices what their files' cache does not
//! hold, from 5.14 on. So the devices that lie on each other
//! are looked at as layers, and the layer with most counts. Invariants: no layer has a device above another of it, so
//! it has no I/O twice, but for copies that a mirror makes; a sum jumps, back or ahead, only when devices come or go.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::{Budget, CachedFile, number};
use shared::procfs::unescape;

/// More devices than this are not looked at.
const MOST_DEVICES: usize = 4096;
/// Deepest pile of devices told apart.
const MOST_LAYERS: usize = 16;
/// Kinds of virtual devices that lie on no other, of which a host may have many.
const LIE_ON_NONE: [&str; 3] = ["ram", "zram", "nbd"];
/// include/uapi/linux/major.h: loop devices.
const LOOP_MAJOR: u32 = 7;

/// Major and minor number.
pub type Device = (u32, u32);

/// `8:16`.
pub fn device(text: &str) -> Option<Device> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Which devices lie on each other.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct StackedDevices {
    /// The layers a device is in: that of its height, and that of those on which nothing lies.
    layers_of: HashMap<Device, (usize, Option<usize>)>,
    /// Layers of each stack.
    stacks: Vec<Range<usize>>,
    /// Loop devices lie on others.
    loops: bool,
    /// Other devices do.
    others: bool,
}

fn add<const N: usize>(sums: &mut [u64; N], counts: [u64; N]) {
    for (sum, count) in sums.iter_mut().zip(counts) {
        *sum = sum.saturating_add(count);
    }
}

impl StackedDevices {
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
            loops: holders().any(|((major, _), _)| *major == LOOP_MAJOR),
            others: holders().any(|((major, _), _)| *major != LOOP_MAJOR),
        }
    }

    /// Loop devices lie on others: what is done on them may count there, too.
    pub fn have_loops(&self) -> bool {
        self.loops
    }

    /// Devices that are no loop devices lie on others.
    pub fn have_others(&self) -> bool {
        self.others
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
pub struct StackedDeviceReader {
    /// Where /sys is mounted.
    root: PathBuf,
    /// The table of mounts.
    mounts: PathBuf,
    /// Where the files that loop devices are made of lie.
    files: HashMap<PathBuf, Option<Device>>,
    /// How often the kernel has told of a device.
    events: CachedFile,
    seen: Option<u64>,
    stacks: Arc<StackedDevices>,
}

impl StackedDeviceReader {
    /// By the /sys at `root` and this table of mounts. Nothing is known before the first [`StackedDeviceReader::refresh`].
    pub fn new(root: &Path, mounts: &Path, budget: &Arc<Budget>) -> Self {
        Self {
            root: root.to_owned(),
            mounts: mounts.to_owned(),
            files: HashMap::new(),
            events: CachedFile::new(root.join("kernel/uevent_seqnum"), budget),
            seen: None,
            stacks: Arc::default(),
        }
    }

    /// Looks again, if the kernel has told of any device since; each time where it can't be asked. What was known
    /// stays while the devices can't be listed.
    pub fn refresh(&mut self, buffer: &mut Vec<u8>) {
        // Before the devices: what comes after it is seen next time.
        let events = self.events.read_if_offered(buffer).and_then(number);
        if events.is_some() && events == self.seen {
            return;
        }
        // After one that fails the next looks again.
        self.seen = None;
        let Ok(holders) = self.holders() else {
            return;
        };
        self.seen = events;
        let stacks = StackedDevices::of(&holders);
        if stacks != *self.stacks {
            tracing::debug!(
                devices = stacks.layers_of.len(),
                loops = stacks.loops,
                others = stacks.others,
                "block devices lie on others, so `io.stat` is read where cgroups are of version 2"
            );
            self.stacks = Arc::new(stacks);
        }
    }

    fn holders(&mut self) -> io::Result<Holders> {
        let (mut holders, loops) = holders(&self.root)?;
        holders.extend(self.below_files(loops)?);
        Ok(holders)
    }

    /// Loop devices whose files lie on disks, with these. The table of mounts tells, for a path of a file system that
    /// hangs is not to be looked up; it is read when a file is new.
    fn below_files(&mut self, loops: Vec<(Device, PathBuf)>) -> io::Result<Holders> {
        let kept: HashSet<&PathBuf> = loops.iter().map(|(_, file)| file).collect();
        self.files.retain(|file, _| kept.contains(file));
        let is_new = |(_, file): &(Device, PathBuf)| !self.files.contains_key(file);
        if loops.iter().any(is_new) {
            let mounts = std::fs::read(&self.mounts)?;
            let mounts = mounts_of(&String::from_utf8_lossy(&mounts));
            for (_, file) in &loops {
                if !self.files.contains_key(file) {
                    let below = disk_of(file, &mounts, &self.root)?;
                    self.files.insert(file.clone(), below);
                }
            }
        }
        let below = |(device, file): (Device, PathBuf)| {
            Some((device, vec![self.files.get(&file).copied()??]))
        };
        Ok(loops.into_iter().filter_map(below).collect())
    }

    /// As of the last look; the same as long as nothing comes or goes.
    pub fn stacks(&self) -> &Arc<StackedDevices> {
        &self.stacks
    }
}

/// Nothing where something can't be read for itself; an error where nothing can be at the moment.
fn offered<T>(read: io::Result<T>) -> io::Result<Option<T>> {
    use rustix::io::Errno;
    const OF_ALL: [Errno; 3] = [Errno::MFILE, Errno::NFILE, Errno::NOMEM];
    match read {
        Ok(read) => Ok(Some(read)),
        Err(err) if Errno::from_io_error(&err).is_some_and(|it| OF_ALL.contains(&it)) => Err(err),
        Err(_) => Ok(None),
    }
}

fn number_of(directory: &Path) -> io::Result<Option<Device>> {
    let text = offered(std::fs::read_to_string(directory.join("dev")))?;
    Ok(text.and_then(|text| device(&text)))
}

/// The whole disk of a device's directory: cgroups count by these.
fn whole(directory: &Path) -> io::Result<Option<Device>> {
    match directory.join("partition").exists() {
        true => number_of(&directory.join("..")),
        false => number_of(directory),
    }
}

type Holders = Vec<(Device, Vec<Device>)>;

/// Devices, and those that each of them lies on; and loop devices with their files. What goes meanwhile, or can't be
/// read for itself, lies on nothing.
fn holders(root: &Path) -> io::Result<(Holders, Vec<(Device, PathBuf)>)> {
    let (mut holders, mut loops) = (Vec::new(), Vec::new());
    let devices = match std::fs::read_dir(root.join("devices/virtual/block")) {
        // The kernel has no such device, if this is its tree.
        Err(err) if err.kind() == io::ErrorKind::NotFound && root.join("kernel").exists() => None,
        devices => Some(devices?),
    };
    for entry in devices.into_iter().flatten().take(MOST_DEVICES) {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        let name = name.to_string_lossy();
        if LIE_ON_NONE.iter().any(|kind| name.starts_with(kind)) {
            continue;
        }
        if name.starts_with("loop") {
            // There while the device has a file.
            let file = offered(std::fs::read(path.join("loop/backing_file")))?;
            if let (Some(mut file), Some(device)) = (file, number_of(&path)?) {
                file.pop_if(|last| *last == b'\n');
                loops.push((device, OsString::from_vec(file).into()));
            }
            continue;
        }
        let slaves = offered(std::fs::read_dir(path.join("slaves")))?;
        let mut below = Vec::new();
        for slave in slaves.into_iter().flatten().take(MOST_DEVICES) {
            below.extend(whole(&slave?.path())?);
        }
        if !below.is_empty() {
            holders.extend(number_of(&path)?.map(|device| (device, below)));
        }
    }
    Ok((holders, loops))
}

/// A file system where it is mounted.
#[derive(Debug)]
struct Mount {
    place: PathBuf,
    device: Option<Device>,
    source: PathBuf,
}

/// The lines of proc(5)'s `mountinfo`.
fn mounts_of(text: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (own, kind) = line.split_once(" - ")?;
        let mut own = own.split(' ').skip(2);
        let (device, _, place) = (own.next()?, own.next()?, own.next()?);
        Some(Mount {
            place: unescape(place),
            device: self::device(device),
            source: unescape(kind.split(' ').nth(1)?),
        })
    };
    text.lines().filter_map(mount).collect()
}

/// The disk that a file lies on. A file system of several volumes (btrfs) has a number of its own: the device it was
/// mounted by stands for it.
fn disk_of(file: &Path, mounts: &[Mount], root: &Path) -> io::Result<Option<Device>> {
    // Of those at one place the last is seen.
    let around = mounts.iter().filter(|it| file.starts_with(&it.place));
    let Some(mount) = around.max_by_key(|it| it.place.as_os_str().len()) else {
        return Ok(None);
    };
    let disk = |(major, minor): Device| whole(&root.join(format!("dev/block/{major}:{minor}")));
    if let Some(device) = mount.device
        && let Some(found) = disk(device)?
    {
        return Ok(Some(found));
    }
    if !mount.source.starts_with("/dev") {
        return Ok(None);
    }
    let Ok(status) = rustix::fs::stat(&mount.source) else {
        return Ok(None);
    };
    let number = status.st_rdev;
    disk((rustix::fs::major(number), rustix::fs::minor(number)))
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

    fn sum(stacks: &StackedDevices, counted: &[(Device, [u64; 2])]) -> [u64; 2] {
        stacks.sum(counted.iter().map(|(device, it)| (Some(*device), *it)))
    }

    #[test]
    fn what_passes_several_devices_counts_once() {
        // Two volumes on a disk that is encrypted, and one on another.
        let stacks = StackedDevices::of(&[
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
            sum(&StackedDevices::default(), &passed),
            [31, 22],
            "nothing is known"
        );
        assert_eq!(sum(&stacks, &[]), [0, 0]);
    }

    #[test]
    fn layers_go_by_height_and_what_is_on_top_counts_together() {
        // Beside a volume of the disk an encrypted one with a volume on it, all of which the disk is charged nothing for.
        let stacks =
            StackedDevices::of(&[(HOME, vec![CRYPT]), (DATA, vec![SDA]), (CRYPT, vec![SDA])]);
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
        let striped = StackedDevices::of(&[(DATA, vec![SDA, SDB])]);
        let halves = [(DATA, [8, 6]), (SDA, [4, 3]), (SDB, [4, 3])];
        assert_eq!(sum(&striped, &halves), [8, 6]);
        // A mirror: each copy counts.
        let copies = [(DATA, [8, 6]), (SDA, [8, 6]), (SDB, [0, 6])];
        assert_eq!(sum(&striped, &copies), [8, 12]);
    }

    #[test]
    fn what_cannot_be_is_survived() {
        let stacks = StackedDevices::of(&[(SDA, vec![SDB]), (SDB, vec![SDA]), (HOME, vec![HOME])]);
        let counted = [(SDA, [1, 1]), (SDB, [2, 2]), (HOME, [4, 4])];
        assert!(sum(&stacks, &counted).iter().all(|it| (6..=7).contains(it)));
        let pile: Vec<_> = (0..100)
            .map(|at| ((253, at + 1), vec![(253, at)]))
            .collect();
        let stacks = StackedDevices::of(&pile);
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
        let mounts = sys("mountinfo");
        let mut reader = StackedDeviceReader::new(root.path(), &mounts, &Budget::new(10));
        let mut refreshed = |told: &str| {
            std::fs::write(sys("kernel/uevent_seqnum"), told).unwrap();
            reader.refresh(&mut Vec::new());
            StackedDevices::clone(reader.stacks())
        };
        let none = StackedDevices::default();
        assert_eq!(refreshed("7\n"), none, "no block device at all");
        make("devices/virtual/block/dm-0", "254:0\n");
        make("devices/virtual/block/loop0", "7:0\n");
        make("devices/pci/block/sda", "8:0\n");
        make("devices/pci/block/sda/sda2", "8:2\n");
        std::fs::write(sys("devices/pci/block/sda/sda2/partition"), "2\n").unwrap();
        assert_eq!(refreshed("8\n"), none, "it lies on nothing yet");
        let link = sys("devices/virtual/block/dm-0/slaves/sda2");
        symlink("../../../../pci/block/sda/sda2", &link).unwrap();
        assert_eq!(refreshed("8\n"), none, "not told of");
        let stacks = refreshed("9\n");
        assert_eq!(stacks, StackedDevices::of(&[(CRYPT, vec![SDA])]));
        assert!(stacks.have_others() && !stacks.have_loops());
        std::fs::remove_file(link).unwrap();
        assert_eq!(refreshed("10\n"), none);
        // A loop device of a file on a partition, others of files in memory and of a server.
        let mounted = "22 1 254:9 / / rw - ext4 /dev/root rw\n\
                       30 22 0:25 / /dev/shm rw shared:1 - tmpfs tmpfs rw\n\
                       31 22 8:2 / /var/a\\040b rw shared:2 master:1 - xfs /dev/sda2 rw\n\
                       32 22 0:40 / /var/nas rw - nfs4 nas:/it rw\n\
                       33 22 0:41 / /var/btrfs rw - btrfs /dev/null rw\n\
                       broken\n";
        std::fs::write(&mounts, mounted).unwrap();
        std::fs::create_dir_all(sys("dev/block")).unwrap();
        symlink("../../devices/pci/block/sda/sda2", sys("dev/block/8:2")).unwrap();
        symlink("../../devices/pci/block/sda", sys("dev/block/1:3")).unwrap();
        let file = |name: &str, file: &str| {
            let path = sys("devices/virtual/block").join(name).join("loop");
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("backing_file"), format!("{file}\n")).unwrap();
        };
        for (number, path) in ["/dev/shm/x", "/var/nas/x", "/root/x", "/var/a bc"]
            .iter()
            .enumerate()
        {
            make(
                &format!("devices/virtual/block/loop{number}"),
                &format!("7:{number}\n"),
            );
            file(&format!("loop{number}"), path);
        }
        assert_eq!(refreshed("11\n"), none, "on no disk that is known");
        file("loop0", "/var/a b/images/x (deleted)");
        let stacks = refreshed("12\n");
        assert_eq!(stacks, StackedDevices::of(&[((7, 0), vec![SDA])]));
        assert!(stacks.have_loops() && !stacks.have_others());
        // By the device that it was mounted by, which here is one that every host has.
        file("loop2", "/var/btrfs/x");
        let both = [((7, 0), vec![SDA]), ((7, 2), vec![SDA])];
        assert_eq!(refreshed("13\n"), StackedDevices::of(&both));
        let counted = [((7, 0), [4, 8]), ((7, 2), [1, 0]), (SDA, [3, 9])];
        assert_eq!(sum(&stacks, &counted[..1]), [4, 8]);
        assert_eq!(sum(&StackedDevices::of(&both), &counted), [5, 9]);
        for name in ["loop0", "loop2"] {
            let directory = sys("devices/virtual/block").join(name).join("loop");
            std::fs::remove_dir_all(directory).unwrap();
        }
        assert_eq!(refreshed("14\n"), none);
    }

    #[test]
    fn what_is_known_stays_while_devices_cannot_be_listed() {
        let root = tempfile::tempdir().unwrap();
        let sys = |path: &str| root.path().join(path);
        for (path, number) in [
            ("devices/virtual/block/dm-0", "254:0"),
            ("devices/virtual/block/dm-0/slaves/sda", "8:0"),
        ] {
            std::fs::create_dir_all(sys(path)).unwrap();
            std::fs::write(sys(path).join("dev"), number).unwrap();
        }
        std::fs::create_dir_all(sys("kernel")).unwrap();
        let mut reader = StackedDeviceReader::new(root.path(), &sys("mountinfo"), &Budget::new(10));
        let mut refreshed = |told: &str| {
            std::fs::write(sys("kernel/uevent_seqnum"), told).unwrap();
            reader.refresh(&mut Vec::new());
            StackedDevices::clone(reader.stacks())
        };
        let stacks = refreshed("1\n");
        assert_eq!(stacks, StackedDevices::of(&[(CRYPT, vec![SDA])]));
        let block = sys("devices/virtual/block");
        std::fs::rename(&block, sys("kept")).unwrap();
        std::fs::write(&block, "not a directory").unwrap();
        assert_eq!(refreshed("2\n"), stacks);
        // It looks again though the kernel tells of nothing new.
        std::fs::remove_file(&block).unwrap();
        assert_eq!(refreshed("2\n"), StackedDevices::default());
    }
}
