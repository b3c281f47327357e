use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

fn write(root: &Path, path: &str, content: &str) -> io::Result<()> {
    Beneath::open(root)?.write(Path::new(path), content.as_bytes(), 0o640, Owner::default())
}

#[test]
fn files_are_written_with_mode_and_owner() {
    let root = tempfile::tempdir().unwrap();
    let beneath = Beneath::open(root.path()).unwrap();
    let owner = Owner {
        uid: Some(1500),
        gid: Some(1600),
    };
    beneath
        .make_directories(Path::new("a/b"), 0o750, owner)
        .unwrap();
    beneath
        .write(Path::new("a/b/f"), b"longer", 0o600, owner)
        .unwrap();
    beneath
        .write(Path::new("./a/b/f"), b"new", 0o640, owner)
        .unwrap();
    let file = root.path().join("a/b/f");
    assert_eq!(fs::read(&file).unwrap(), b"new");
    let status = fs::metadata(&file).unwrap();
    assert_eq!(status.permissions().mode() & 0o7777, 0o640);
    if rustix::process::geteuid().is_root() {
        assert_eq!((status.uid(), status.gid()), (1500, 1600));
        assert_eq!(fs::metadata(root.path().join("a")).unwrap().uid(), 1500);
    }
    assert_eq!(
        fs::metadata(root.path().join("a/b"))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777,
        0o750
    );
    assert!(beneath.exists(Path::new("a/b/f")).unwrap());
    assert!(!beneath.exists(Path::new("a/x")).unwrap());
}

/// Defect 13 of the original: host-side writes into `work/` raced with links made by the user.
#[test]
fn defect_13_links_out_of_the_directory_are_not_followed() {
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("work");
    fs::create_dir(&root).unwrap();
    let victim = outer.path().join("victim");
    fs::write(&victim, "kept").unwrap();
    symlink(&victim, root.join("absolute")).unwrap();
    symlink("../victim", root.join("relative")).unwrap();
    symlink(outer.path(), root.join("up")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    fs::create_dir(root.join("real")).unwrap();
    symlink("real", root.join("inside")).unwrap();
    for path in [
        "absolute",
        "relative",
        "up/victim",
        "magic/tmp/x",
        "../victim",
        "/etc/x",
        "",
        "up/new/deep",
    ] {
        assert!(write(&root, path, "lost").is_err(), "{path}");
    }
    let beneath = Beneath::open(&root).unwrap();
    for path in ["up/made", "../made", "magic/tmp/made", "relative/made"] {
        assert!(
            beneath
                .make_directories(Path::new(path), 0o755, Owner::default())
                .is_err(),
            "{path}"
        );
    }
    assert_eq!(fs::read(&victim).unwrap(), b"kept");
    assert!(!outer.path().join("made").exists());
    // A link that stays inside is the user's own business.
    write(&root, "inside/f", "x").unwrap();
    assert!(root.join("real/f").exists());
}

/// The race itself: a directory is swapped with a link while files are written through it.
#[test]
fn defect_13_a_directory_swapped_with_a_link_never_leads_out() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let outer = tempfile::tempdir().unwrap();
    let root = outer.path().join("work");
    let outside = outer.path().join("outside");
    fs::create_dir_all(root.join("d")).unwrap();
    fs::create_dir(&outside).unwrap();
    symlink(&outside, root.join("l")).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let swap = rustix::fs::RenameFlags::EXCHANGE;
                let cwd = rustix::fs::CWD;
                rustix::fs::renameat_with(cwd, root.join("d"), cwd, root.join("l"), swap).unwrap();
            }
        });
        let mut inside = 0;
        // On a busy machine a few thousand writes may all fall into one turn of the other thread.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        for index in 0.. {
            inside += usize::from(write(&root, &format!("d/{index}"), "x").is_ok());
            if index >= 3000 && (inside > 0 || std::time::Instant::now() > until) {
                break;
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(inside > 0, "no write met the directory");
    });
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn special_files_are_refused_without_waiting() {
    let root = tempfile::tempdir().unwrap();
    let fifo = root.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(write(root.path(), "fifo", "x").is_err());
    // With a reader the open succeeds; the type is looked at then.
    let _reader =
        rustix::fs::open(&fifo, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    assert!(write(root.path(), "fifo", "x").is_err());
    fs::create_dir(root.path().join("d")).unwrap();
    assert!(write(root.path(), "d", "x").is_err());
}

/// A container's root can make nodes of any device. This one has no driver: to open it would fail
/// with another error than that of a look.
#[test]
fn devices_are_not_even_opened() {
    if !rustix::process::geteuid().is_root() {
        crate::skip::needs("making devices needs root");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    for (name, kind) in [
        ("char", FileType::CharacterDevice),
        ("block", FileType::BlockDevice),
    ] {
        let path = root.path().join(name);
        let device = rustix::fs::makedev(240, 77);
        let mode = Mode::from_raw_mode(0o666);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, device).unwrap();
        symlink(name, root.path().join("link")).unwrap();
        for path in [name, "link"] {
            let err = write(root.path(), path, "x").unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidInput, "{path}: {err}");
            let beneath = Beneath::open(root.path()).unwrap();
            let err = beneath.read(Path::new(path), 1).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidInput, "{path}: {err}");
        }
        fs::remove_file(root.path().join("link")).unwrap();
    }
}

#[test]
fn a_link_to_nothing_is_not_written_through() {
    let root = tempfile::tempdir().unwrap();
    symlink("nothing", root.path().join("link")).unwrap();
    let err = write(root.path(), "link", "x").unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::AlreadyExists);
    assert!(!root.path().join("nothing").exists());
}

#[test]
fn a_directory_of_many_names_is_emptied_in_parts() {
    let root = tempfile::tempdir().unwrap();
    let tree = root.path().join("tree");
    for part in ["", "below"] {
        let directory = tree.join(part);
        fs::create_dir_all(&directory).unwrap();
        for number in 0..2 * BATCH + 1 {
            fs::write(directory.join(format!("{number}")), "").unwrap();
        }
    }
    remove_tree(root.path(), "tree").unwrap();
    assert!(!tree.exists());
}

#[test]
fn trees_of_any_depth_and_odd_content_are_removed() {
    let root = tempfile::tempdir().unwrap();
    let kept = root.path().join("kept");
    fs::create_dir(&kept).unwrap();
    fs::write(kept.join("f"), "x").unwrap();
    let tree = root.path().join("tree");
    fs::create_dir(&tree).unwrap();
    symlink(&kept, tree.join("link")).unwrap();
    fs::create_dir(tree.join("locked")).unwrap();
    fs::write(tree.join("locked/f"), "x").unwrap();
    fs::set_permissions(tree.join("locked"), fs::Permissions::from_mode(0o000)).unwrap();
    // Deeper than PATH_MAX allows in one path.
    let mut directory =
        rustix::fs::open(&tree, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    for _ in 0..2500 {
        rustix::fs::mkdirat(&directory, "deep", Mode::from_raw_mode(0o755)).unwrap();
        directory = rustix::fs::openat(
            &directory,
            "deep",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap();
    }
    remove_tree(root.path(), "tree").unwrap();
    assert!(!tree.exists());
    assert!(kept.join("f").exists());
    remove_tree(root.path(), "tree").unwrap();
}

#[test]
fn a_mount_below_is_told_and_not_emptied() {
    if !rustix::process::geteuid().is_root() {
        crate::skip::needs("mounting needs root");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let mounted = root.path().join("tree/mounted");
    fs::create_dir_all(&mounted).unwrap();
    let source = root.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("precious"), "x").unwrap();
    rustix::mount::mount_bind(&source, &mounted).unwrap();
    let err = remove_tree(root.path(), "tree").unwrap_err();
    rustix::mount::unmount(&mounted, rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(err.to_string().contains("mount"), "{err}");
    assert!(source.join("precious").exists());
    remove_tree(root.path(), "tree").unwrap();
}
