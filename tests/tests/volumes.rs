//! Volumes with real mounts: what is mounted, noted, refused, and what is left afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use control::volumes::{MountOrder, UnmountOrder, VolumeError, VolumeOutcome, Volumes};
use futures_util::FutureExt;

/// A place for mounts; what is mounted there goes with it.
struct Place {
    directory: tempfile::TempDir,
    volumes: Volumes,
}

impl Drop for Place {
    fn drop(&mut self) {
        for point in mounted_below(self.directory.path()) {
            let _ = Command::new("umount").arg(point).output();
        }
    }
}

fn mounted_below(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| Some(PathBuf::from(line.split(' ').nth(1)?)))
        .filter(|point| point.starts_with(directory))
        .collect()
}

impl Place {
    fn new(allow: &[&str]) -> Option<Place> {
        Place::with_timeout(allow, "60s")
    }

    /// `None`, with the reason told, where this process may not mount.
    fn with_timeout(allow: &[&str], timeout: &str) -> Option<Place> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let capabilities = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .and_then(|text| u64::from_str_radix(text.trim(), 16).ok())
            .unwrap();
        // capabilities(7): CAP_SYS_ADMIN.
        if capabilities & (1 << 21) == 0 {
            harness::skip::needs("volumes: mounting needs CAP_SYS_ADMIN; run as root");
            return None;
        }
        // On the root file system: links are followed there alone.
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let place = directory.path().display().to_string();
        let rules: Vec<String> = allow
            .iter()
            .map(|rule| format!("{:?}", rule.replace("PLACE", &place)))
            .collect();
        std::fs::create_dir(directory.path().join("mnt")).unwrap();
        std::fs::write(
            directory.path().join("fstab"),
            "# kept\n/dev/sda1 / ext4 defaults 0 1\n",
        )
        .unwrap();
        let text = format!(
            "[agent]\nmount-path = \"{place}/mnt\"\ncohabiting-storage-proxy = false\n\
             [node.volumes]\ntimeout = \"{timeout}\"\nallow = [{}]\nfstab = [\"{place}/fstab\", \"{place}/absent/fstab\"]\n",
            rules.join(", ")
        );
        let file = directory.path().join("agent.toml");
        std::fs::write(&file, text).unwrap();
        let options = config::LoadOptions::of_this_process(Some(file), true);
        let config = config::load(&options).unwrap().config;
        Some(Place {
            volumes: Volumes::new(&config, None),
            directory,
        })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn point(&self, name: &str) -> PathBuf {
        self.at("mnt").join(name)
    }

    fn fstab(&self) -> String {
        std::fs::read_to_string(self.at("fstab")).unwrap()
    }

    fn order(&self, name: &str, kind: &str, location: &str, options: &str) -> MountOrder {
        MountOrder {
            dir_name: name.to_owned(),
            location: location.to_owned(),
            fs_type: kind.to_owned(),
            options: Some(options.to_owned()),
            fstab: Some(self.at("fstab")),
        }
    }

    async fn unmount(&self, name: &str) -> VolumeOutcome {
        let order = UnmountOrder {
            dir_name: name.to_owned(),
            fstab: Some(self.at("fstab")),
        };
        self.volumes.unmount(&order, &by_nobody).await
    }

    fn nothing_is_left(&self, fstab: &str) {
        assert_eq!(mounted_below(self.directory.path()), Vec::<PathBuf>::new());
        assert_eq!(std::fs::read_dir(self.at("mnt")).unwrap().count(), 0);
        assert_eq!(self.fstab(), fstab);
    }
}

fn by_nobody() -> Vec<(PathBuf, String)> {
    Vec::new()
}

fn by_a_kernel(folder: PathBuf) -> (PathBuf, String) {
    (folder, "k-1".to_owned())
}

fn well(outcome: &VolumeOutcome) {
    assert!(outcome.error.is_none(), "{outcome:?}");
}

#[tokio::test]
async fn a_volume_is_mounted_noted_and_taken_away_again() {
    let Some(place) = Place::new(&["tmpfs scratch-memory"]) else {
        return;
    };
    let before = place.fstab();
    let order = place.order("vol1", "tmpfs", "scratch-memory", "size=1m,mode=755");
    let mounted = place.volumes.mount(&order).await;
    well(&mounted);
    assert_eq!(mounted.path, place.point("vol1"));
    assert_eq!(mounted_below(place.directory.path()), [place.point("vol1")]);
    let line = format!(
        "scratch-memory {} tmpfs size=1m,mode=755 0 0\n",
        place.point("vol1").display()
    );
    assert_eq!(place.fstab(), before.clone() + &line);
    std::fs::write(place.point("vol1").join("file"), "kept").unwrap();
    // Asked for again: nothing is mounted over it and nothing noted twice.
    well(&place.volumes.mount(&order).await);
    assert_eq!(mounted_below(place.directory.path()).len(), 1);
    assert_eq!(place.fstab(), before.clone() + &line);
    assert!(place.point("vol1").join("file").exists());

    well(&place.unmount("vol1").await);
    place.nothing_is_left(&before);
    well(&place.unmount("vol1").await);
}

#[tokio::test]
async fn a_link_on_the_way_to_the_volumes_hides_none_of_them() {
    let Some(place) = Place::new(&["tmpfs scratch-memory"]) else {
        return;
    };
    let (before, data) = (place.fstab(), place.at("data"));
    std::fs::rename(place.at("mnt"), &data).unwrap();
    std::os::unix::fs::symlink("data", place.at("mnt")).unwrap();
    let order = place.order("vol1", "tmpfs", "scratch-memory", "size=1m");
    for _ in 0..2 {
        let mounted = place.volumes.mount(&order).await;
        well(&mounted);
        assert_eq!(mounted.path, place.point("vol1"));
        assert_eq!(mounted_below(place.directory.path()), [data.join("vol1")]);
    }
    let listed = place.volumes.mounted().await.unwrap();
    assert_eq!(listed, [place.point("vol1")]);
    assert!(place.fstab().contains("/mnt/vol1 tmpfs"));
    well(&place.unmount("vol1").await);
    place.nothing_is_left(&before);
}

#[tokio::test]
async fn a_volume_that_a_kernel_has_by_a_link_stays_mounted() {
    let Some(place) = Place::new(&["tmpfs scratch-memory"]) else {
        return;
    };
    let before = place.fstab();
    // A link on the way to the volumes, one to the volume itself, and one to that.
    std::fs::rename(place.at("mnt"), place.at("data")).unwrap();
    for (link, target) in [("mnt", "data"), ("vfroot", "mnt/v"), ("again", "vfroot/.")] {
        std::os::unix::fs::symlink(target, place.at(link)).unwrap();
    }
    let order = place.order("v", "tmpfs", "scratch-memory", "size=1m");
    well(&place.volumes.mount(&order).await);
    let noted = place.fstab();
    let order = UnmountOrder {
        dir_name: "v".to_owned(),
        fstab: Some(place.at("fstab")),
    };
    for folder in ["mnt/v/f", "data/v/f", "data/v", "vfroot/f", "again/f"] {
        let used = || vec![by_a_kernel(place.at(folder))];
        let refused = place.volumes.unmount(&order, &used).await;
        match refused.error {
            Some(VolumeError::InUse { kernel, .. }) => assert_eq!(kernel, "k-1"),
            other => panic!("{folder}: {other:?}"),
        }
        assert_eq!(mounted_below(place.directory.path()), [place.at("data/v")]);
        assert_eq!(place.fstab(), noted);
    }
    // What other volumes have is in nobody's way.
    let folders = ["mnt/vv/f", "vfroot2", "data", "mnt"];
    let used = || Vec::from(folders.map(|folder| by_a_kernel(place.at(folder))));
    well(&place.volumes.unmount(&order, &used).await);
    place.nothing_is_left(&before);
}

#[tokio::test]
async fn directories_and_images_are_mounted_too() {
    let Some(place) = Place::new(&["none PLACE/data*", "ext4 PLACE/disk.img"]) else {
        return;
    };
    let before = place.fstab();
    std::fs::create_dir(place.at("data")).unwrap();
    std::fs::write(place.at("data/file"), "from the host").unwrap();
    let data = place.at("data").display().to_string();
    well(
        &place
            .volumes
            .mount(&place.order("bound", "none", &data, "bind"))
            .await,
    );
    let seen = std::fs::read_to_string(place.point("bound").join("file")).unwrap();
    assert_eq!(seen, "from the host");
    well(
        &place
            .volumes
            .mount(&place.order("bound", "none", &data, "bind"))
            .await,
    );
    assert_eq!(mounted_below(place.directory.path()).len(), 1);
    // A kernel has a folder in it: it stays.
    let order = UnmountOrder {
        dir_name: "bound".to_owned(),
        fstab: None,
    };
    let used = place
        .volumes
        .unmount(&order, &|| vec![by_a_kernel(place.point("bound/user"))])
        .await;
    assert!(matches!(used.error, Some(VolumeError::InUse { .. })));
    assert_eq!(mounted_below(place.directory.path()).len(), 1);

    let image = place.at("disk.img");
    std::fs::File::create(&image)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let made = Command::new("mkfs.ext4")
        .arg("-q")
        .arg(&image)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let image = image.display().to_string();
    well(
        &place
            .volumes
            .mount(&place.order("disk", "ext4", &image, "loop,nosuid"))
            .await,
    );
    std::fs::write(place.point("disk").join("x"), "x").unwrap();
    well(&place.unmount("disk").await);
    well(&place.unmount("bound").await);
    place.nothing_is_left(&before);
    assert!(place.at("data/file").exists());
}

#[tokio::test]
async fn what_fails_leaves_nothing() {
    let Some(place) = Place::new(&["ext4 PLACE/noise", "tmpfs memory"]) else {
        return;
    };
    let before = place.fstab();
    std::fs::write(place.at("noise"), "no file system").unwrap();
    let noise = place.at("noise").display().to_string();
    let failed = place
        .volumes
        .mount(&place.order("v", "ext4", &noise, "loop"))
        .await;
    assert_eq!(failed.path, place.point("v"));
    match failed.error {
        Some(VolumeError::Refused { words, .. }) => assert!(words.contains("mount"), "{words}"),
        other => panic!("{other:?}"),
    }
    place.nothing_is_left(&before);
    // A directory that was there before stays.
    std::fs::create_dir(place.point("v")).unwrap();
    let again = place.order("v", "ext4", &noise, "loop");
    let failed = place.volumes.mount(&again).await;
    assert!(matches!(failed.error, Some(VolumeError::Refused { .. })));
    std::fs::remove_dir(place.point("v")).expect("as it was");
    // Mounted, but not to be noted: undone.
    let mut order = place.order("v", "tmpfs", "memory", "");
    order.fstab = Some(place.at("absent/fstab"));
    let failed = place.volumes.mount(&order).await;
    assert!(
        matches!(failed.error, Some(VolumeError::Fstab(_))),
        "{failed:?}"
    );
    place.nothing_is_left(&before);
}

#[tokio::test]
async fn a_volume_in_use_stays_mounted_and_noted() {
    let Some(place) = Place::new(&["tmpfs memory"]) else {
        return;
    };
    let before = place.fstab();
    well(
        &place
            .volumes
            .mount(&place.order("v", "tmpfs", "memory", ""))
            .await,
    );
    let noted = place.fstab() + "# by hand\n";
    std::fs::write(place.at("fstab"), &noted).unwrap();
    // As a process of the host that works there.
    let used = std::fs::File::create(place.point("v").join("file")).unwrap();
    let refused = place.unmount("v").await;
    assert!(
        matches!(refused.error, Some(VolumeError::Refused { .. })),
        "{refused:?}"
    );
    assert_eq!(mounted_below(place.directory.path()), [place.point("v")]);
    assert_eq!(place.fstab(), noted);
    drop(used);
    well(&place.unmount("v").await);
    place.nothing_is_left(&(before + "# by hand\n"));
}

/// Until it is so; nothing else runs on this thread meanwhile.
fn wait_until(what: &str, so: impl Fn() -> bool) {
    let began = std::time::Instant::now();
    while !so() {
        assert!(began.elapsed().as_secs() < 30, "not so: {what}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[tokio::test]
async fn an_unmount_that_is_cut_short_leaves_the_line_of_what_stays_mounted() {
    let Some(place) = Place::new(&["tmpfs memory"]) else {
        return;
    };
    let before = place.fstab();
    let order = place.order("v", "tmpfs", "memory", "");
    well(&place.volumes.mount(&order).await);
    let noted = place.fstab();
    // A stop of the agent drops it where it is: when the line is just out, and a step later.
    for steps in [1, 2] {
        let mut unmount = Box::pin(place.unmount("v"));
        for _ in 0..steps {
            assert!((&mut unmount).now_or_never().is_none());
            wait_until("the line is out", || place.fstab() == before);
            // What works on the table beside this comes to its end.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        drop(unmount);
        wait_until("the line is back", || place.fstab() == noted);
        assert_eq!(mounted_below(place.directory.path()), [place.point("v")]);
    }
    well(&place.unmount("v").await);
    place.nothing_is_left(&before);
}

/// A program that mount(8) leaves a type of file system to; gone with this, or as soon as it runs.
struct Helper {
    file: PathBuf,
    fs_type: String,
}

impl Helper {
    /// `None`, with the reason told, where no such program can be added.
    fn new(script: &str) -> Option<Helper> {
        let fs_type = format!("bai-test-{}", uuid::Uuid::new_v4().simple());
        // The only place that mount(8) looks at.
        let file = Path::new("/sbin").join(format!("mount.{fs_type}"));
        let helper = Helper { file, fs_type };
        let written = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(&helper.file)
            .and_then(|mut file| {
                file.write_all(format!("#!/bin/sh\nrm -f \"$0\"\n{script}\n").as_bytes())
            });
        match written {
            Ok(()) => Some(helper),
            Err(err) => {
                harness::skip::needs(format!(
                    "volumes: a helper of mount(8) must be written to /sbin: {err}"
                ));
                None
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

#[tokio::test]
async fn a_mount_that_comes_after_the_deadline_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let gate = directory.path().join("gate");
    nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Not for ever, should this test fail; in the helper's own process group.
    let wait = format!("timeout --foreground 60 cat {}", gate.display());
    let mount = "mount -t tmpfs slow \"$2\"";
    // The server answers late; it answers, and the helper does not come back.
    for script in [format!("{wait}; {mount}"), format!("{mount}; {wait}")] {
        let Some(helper) = Helper::new(&script) else {
            return;
        };
        let rule = format!("{} slow", helper.fs_type);
        let Some(place) = Place::with_timeout(&[&rule], "1s") else {
            return;
        };
        let before = place.fstab();
        let order = place.order("v", &helper.fs_type, "slow", "");
        let late = place.volumes.mount(&order).await;
        assert!(
            matches!(late.error, Some(VolumeError::Timeout { .. })),
            "{late:?}"
        );
        assert!(!helper.file.exists(), "the helper has run");
        place.nothing_is_left(&before);
        // Nobody is left who waits for the gate, and so nobody who mounts when it opens.
        let opened = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&gate);
        let closed = opened.expect_err("nobody reads").raw_os_error();
        assert_eq!(closed, Some(libc::ENXIO));
        place.nothing_is_left(&before);
    }
}

#[tokio::test]
async fn a_mount_that_is_cut_short_is_noted_or_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let begun = directory.path().join("begun");
    let wait = format!("touch {}; sleep 60", begun.display());
    let mount = "mount -t tmpfs slow \"$2\"";
    for (script, mounted) in [
        (format!("{wait}; {mount}"), false),
        (format!("{mount}; {wait}"), true),
    ] {
        let Some(helper) = Helper::new(&script) else {
            return;
        };
        let rule = format!("{} slow", helper.fs_type);
        let Some(place) = Place::new(&[&rule]) else {
            return;
        };
        let before = place.fstab();
        let order = place.order("v", &helper.fs_type, "slow", "");
        let hangs = async {
            while !begun.exists() {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            outcome = place.volumes.mount(&order) => panic!("{outcome:?}"),
            () = hangs => {}
        }
        std::fs::remove_file(&begun).unwrap();
        if mounted {
            assert_eq!(mounted_below(place.directory.path()), [place.point("v")]);
            let line = format!(
                "slow {} {} defaults 0 0\n",
                place.point("v").display(),
                helper.fs_type
            );
            assert_eq!(place.fstab(), before.clone() + &line);
            well(&place.unmount("v").await);
        }
        place.nothing_is_left(&before);
    }
}
