//! Where the bytes are: each kind, and what is left where it fails.

use super::*;

/// Defect 5 of the original: scratches stayed behind when a later step failed.
#[tokio::test]
async fn defect_5_a_missing_skeleton_leaves_nothing_of_any_kind() {
    let directory = tempfile::tempdir().unwrap();
    let kinds = match is_root() {
        true => vec![
            ScratchKind::HostDir,
            ScratchKind::Memory { size: 4 << 20 },
            ScratchKind::HostFile { size: 16 << 20 },
        ],
        false => vec![ScratchKind::HostDir],
    };
    for kind in kinds {
        let root = directory.path().join("s");
        let scratch = Scratch::new(&root, kind, LIMIT);
        let new = NewScratch {
            skeleton: directory.path().join("none"),
            ..NewScratch::default()
        };
        let told = scratch.create(kernel_id(), new).await.unwrap_err();
        assert!(
            matches!(told, ScratchError::Skeleton { .. }),
            "{kind:?}: {told:?}"
        );
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0, "{kind:?}");
    }
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("disk");
    fs::create_dir(&disk).unwrap();
    rustix::mount::mount(
        "test",
        &disk,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        c"size=64k",
    )
    .unwrap();
    let scratch = Scratch::new(&disk, ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        ..NewScratch::default()
    };
    let result = scratch.create(kernel_id(), new).await;
    let left = fs::read_dir(&disk).unwrap().count();
    rustix::mount::unmount(&disk, rustix::mount::UnmountFlags::empty()).unwrap();
    let told = result.unwrap_err();
    assert!(
        told.is_full() && told.to_string().contains("scratch disk is full"),
        "{told}"
    );
    assert_eq!(left, 0);
}

fn mounted_at(path: &Path) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let path = path.to_string_lossy();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(1) == Some(&*path))?;
    line.split(' ').nth(2).map(str::to_owned)
}

/// Defect 11 of the original: the tmpfs of a memory scratch was silently absent.
#[tokio::test]
async fn defect_11_memory_scratches_are_mounted_and_bounded() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(directory.path()).unwrap().join("s");
    let scratch =
        Scratch::new(&root, ScratchKind::Memory { size: 2 << 20 }, LIMIT).of_agent("i-own");
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new).await.unwrap();
    assert_eq!(mounted_at(&paths.root).as_deref(), Some("tmpfs"));
    let tmp = paths.tmp.unwrap();
    assert_eq!(mounted_at(&tmp).as_deref(), Some("tmpfs"));
    assert_eq!(
        fs::metadata(&tmp).unwrap().permissions().mode() & 0o7777,
        0o1777
    );
    assert!(fs::write(paths.work.join("big"), vec![0; 3 << 20]).is_err());
    // The mark outlives the memory.
    assert!(root.join(format!("{}.owner", kernel_id())).is_file());
    // A file held open does not stop the removal.
    let held = fs::File::open(paths.work.join(".bashrc")).unwrap();
    scratch.remove(kernel_id()).await.unwrap();
    assert_eq!(mounted_at(&paths.root), None);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    drop(held);
}

#[tokio::test]
async fn file_scratches_are_bounded_and_leave_no_loop_device() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(directory.path()).unwrap().join("s");
    let scratch = Scratch::new(&root, ScratchKind::HostFile { size: 16 << 20 }, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new).await.unwrap();
    assert_eq!(mounted_at(&paths.root).as_deref(), Some("ext4"));
    assert!(fs::write(paths.work.join("big"), vec![0; 20 << 20]).is_err());
    // Also by an agent that is configured otherwise now.
    Scratch::new(&root, ScratchKind::HostDir, LIMIT)
        .remove(kernel_id())
        .await
        .unwrap();
    assert_eq!(mounted_at(&paths.root), None);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}

/// Part of defect 5: a failing `mkfs` left directory and image file behind.
#[tokio::test]
async fn a_failing_tool_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("s");
    // Too small for a file system.
    let scratch = Scratch::new(&root, ScratchKind::HostFile { size: 4096 }, LIMIT);
    let told = scratch
        .create(kernel_id(), NewScratch::default())
        .await
        .unwrap_err();
    assert!(
        matches!(
            told,
            ScratchError::Tool { .. } | ScratchError::StartTool { .. }
        ),
        "{told:?}"
    );
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}
