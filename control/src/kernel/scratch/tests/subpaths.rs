//! Parts of folders that are held for the engine.

use super::super::{storage, subpaths};
use super::*;

/// A folder with `part/data/mine`, and `others/secret` beside it.
fn folder_and_others(place: &Path) -> PathBuf {
    let folder = place.join("folder");
    fs::create_dir_all(folder.join("part/data")).unwrap();
    fs::write(folder.join("part/data/mine"), "mine").unwrap();
    fs::write(folder.join("part/file"), "a file").unwrap();
    fs::create_dir_all(place.join("others/data")).unwrap();
    fs::write(place.join("others/data/secret"), "secret").unwrap();
    folder
}

fn part_of(folder: &Path, below: &str) -> Subpath {
    Subpath {
        folder: folder.to_owned(),
        below: below.into(),
    }
}

fn mounts_below(place: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    points
        .filter(|point| Path::new(point).starts_with(place))
        .count()
}

#[tokio::test]
async fn what_is_held_of_a_folder_stays_what_it_was() {
    if !is_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let folder = folder_and_others(place.path());
    // A file system in the folder: it is seen, and stays where it is.
    let inner = folder.join("part/data/inner");
    fs::create_dir(&inner).unwrap();
    storage::mount_tmpfs(&inner, 1 << 20, 0o755).unwrap();
    fs::write(inner.join("deep"), "deep").unwrap();
    let root = place.path().join("scratches");
    fs::create_dir(&root).unwrap();
    let scratch = Scratch::new(root.clone(), ScratchKind::HostDir, LIMIT);
    let parts = vec![part_of(&folder, "part/data"), part_of(&folder, "part/file")];
    let before = mounts_below(place.path());
    let held = scratch.hold(kernel_id(), parts.clone()).await.unwrap();
    fs::rename(folder.join("part"), folder.join("away")).unwrap();
    std::os::unix::fs::symlink("../others", folder.join("part")).unwrap();
    assert_eq!(fs::read_to_string(held[0].join("mine")).unwrap(), "mine");
    let deep = held[0].join("inner/deep");
    assert_eq!(fs::read_to_string(deep).unwrap(), "deep");
    assert_eq!(fs::read_to_string(&held[1]).unwrap(), "a file");
    assert_eq!(scratch.list().await.unwrap(), [kernel_id()]);
    // Another try finds the link, holds nothing, and lets go of what was held.
    let err = scratch.hold(kernel_id(), parts).await.unwrap_err();
    assert!(matches!(err, ScratchError::Hold { .. }), "{err}");
    assert_eq!(mounts_below(place.path()), before);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    let away = vec![part_of(&folder, "away/data")];
    for _ in 0..2 {
        scratch.hold(kernel_id(), away.clone()).await.unwrap();
    }
    scratch.remove(kernel_id()).await.unwrap();
    assert_eq!(mounts_below(place.path()), before);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    let deep = folder.join("away/data/inner/deep");
    assert_eq!(fs::read_to_string(deep).unwrap(), "deep");
    let mine = folder.join("away/data/mine");
    assert_eq!(fs::read_to_string(mine).unwrap(), "mine");
    storage::unmount_all(&folder.join("away/data/inner")).unwrap();
}

#[test]
fn a_link_that_comes_and_goes_is_never_followed_out_of_a_folder() {
    if !is_root() {
        return;
    }
    let place = tempfile::tempdir().unwrap();
    let folder = folder_and_others(place.path());
    std::os::unix::fs::symlink("../others", folder.join("link")).unwrap();
    let root = place.path().join("scratches");
    fs::create_dir(&root).unwrap();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let swapping = std::thread::spawn({
        let (stop, folder) = (stop.clone(), folder.clone());
        move || {
            let directory = fs::File::open(folder).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let flags = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(&directory, "part", &directory, "link", flags).unwrap();
            }
        }
    });
    let (mut held, mut refused) = (0, 0);
    let deadline = std::time::Instant::now() + LIMIT;
    while (held < 50 || refused < 50) && std::time::Instant::now() < deadline {
        match subpaths::hold(&root, kernel_id(), 0o700, &[part_of(&folder, "part/data")]) {
            Ok(paths) => {
                assert!(!paths[0].join("secret").exists());
                assert!(paths[0].join("mine").exists());
                held += 1;
            }
            Err(err) => {
                assert!(matches!(err, ScratchError::Hold { .. }), "{err}");
                refused += 1;
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    swapping.join().unwrap();
    subpaths::release(&root, kernel_id()).unwrap();
    assert!(
        held >= 50 && refused >= 50,
        "{held} held, {refused} refused"
    );
    assert_eq!(mounts_below(place.path()), 0);
}
