use super::beneath::Owner;
use super::*;
use crate::kernel::request::{Confidential, Dotfile, SecretText, SshKeypair};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::SystemTime;

const LIMIT: Duration = Duration::from_secs(60);

fn kernel_id() -> Uuid {
    Uuid::parse_str("44843cf7-7964-4cd9-8c60-f8e4fdc69e3a").unwrap()
}

/// Files of the names and sizes that the published runner has.
fn skeleton(directory: &Path) -> PathBuf {
    let path = directory.join("skeleton");
    fs::create_dir(&path).unwrap();
    for (name, size) in [
        (".bashrc", 249),
        (".bash_profile", 147),
        (".zshrc", 472),
        (".vimrc", 501),
        (".tmux.conf", 3239),
        ("jupyter-custom.css", 6194),
        ("logo.svg", 4978),
        ("roboto.ttf", 114_624),
        ("roboto-italic.ttf", 120_832),
    ] {
        fs::write(path.join(name), vec![b'x'; size]).unwrap();
    }
    path
}

fn dotfile(path: &str, data: &str, perm: &str) -> Dotfile {
    Dotfile {
        path: path.to_owned(),
        data: SecretText::new(data),
        perm: perm.to_owned(),
    }
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        crate::skip::needs("owners and mounts need root");
    }
    root
}

fn listing(paths: &ScratchPaths) -> BTreeMap<String, (u32, u32, u32, u64)> {
    let mut found = BTreeMap::new();
    let mut directories = vec![paths.config.clone(), paths.work.clone()];
    let mut all = directories.clone();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                directories.push(entry.path());
            }
            all.push(entry.path());
        }
    }
    for path in all {
        let status = fs::symlink_metadata(&path).unwrap();
        let name = format!("./{}", path.strip_prefix(&paths.root).unwrap().display());
        let size = if status.is_dir() { 0 } else { status.size() };
        found.insert(
            name,
            (status.mode() & 0o7777, status.uid(), status.gid(), size),
        );
    }
    found
}

/// A captured listing without what the container, the user's own script or Docker added.
fn captured(name: &str) -> BTreeMap<String, (u32, u32, u32, u64)> {
    let vectors: serde_json::Value = serde_json::from_str(include_str!(
        "../../../../tests/vectors/runner/scratch_files.json"
    ))
    .unwrap();
    let added = [
        ".ipython",
        ".local",
        ".password",
        "DO_NOT_STORE",
        ".ssh/config",
        "kconfig.dat",
        "booted",
        "bootid",
        "./work/vf1",
    ];
    let rows = vectors["data"][name].as_array().unwrap().iter();
    rows.filter_map(|row| {
        let path = row[4].as_str().unwrap();
        if added.iter().any(|part| path.contains(part)) {
            return None;
        }
        let text = row[0].as_str().unwrap();
        let mode = text
            .bytes()
            .skip(1)
            .fold(0, |mode, c| mode << 1 | u32::from(c != b'-'));
        let number = |at: usize| u32::try_from(row[at].as_u64().unwrap()).unwrap();
        let size = if text.starts_with('d') {
            0
        } else {
            row[3].as_u64().unwrap()
        };
        Some((path.to_owned(), (mode, number(1), number(2), size)))
    })
    .collect()
}

fn config_files(environ: usize, resource: usize) -> ConfigFiles {
    ConfigFiles {
        environ: format!("A={}\n", "x".repeat(environ - 3)),
        resource: format!("B={}\n", "x".repeat(resource - 3)),
        devices: vec!["cpu".into(), "mem".into(), "../escape".into()],
        intrinsic_ports: None,
    }
}

fn cluster() -> ClusterFiles {
    ClusterFiles {
        description: Some(Confidential(
            json!({"mode": "single-node", "ssh_keypair": {"private_key": "PK"}}),
        )),
        ssh_keypair: Some(SshKeypair {
            public_key: "p".repeat(46),
            private_key: SecretText::new("k".repeat(67)),
        }),
        ssh_port_mapping: None,
    }
}

async fn create(
    scratch: &Scratch,
    new: NewScratch,
    config: ConfigFiles,
) -> BTreeMap<String, (u32, u32, u32, u64)> {
    let paths = scratch.create(kernel_id(), new).await.unwrap();
    scratch.write_config(kernel_id(), config).await.unwrap();
    scratch
        .record_container(kernel_id(), "c".repeat(64))
        .await
        .unwrap();
    listing(&paths)
}

#[tokio::test]
async fn a_new_scratch_has_the_captured_files_modes_and_owners() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        owner: Owner {
            uid: Some(1000),
            gid: Some(1000),
        },
        skeleton: skeleton(directory.path()),
        cluster: cluster(),
        ..NewScratch::default()
    };
    let mut found = create(&scratch, new, config_files(795, 2211)).await;
    let mut expected = captured("listing");
    // The container made these two itself when no key pair was given.
    for name in [
        "./work/.ssh",
        "./work/.ssh/authorized_keys",
        "./work/id_container",
    ] {
        expected.remove(name);
    }
    // Defect 15 of the original: the private key stood in a file for all to read.
    assert_eq!(found.remove("./config/cluster.json").unwrap().0, 0o600);
    assert_eq!(expected.remove("./config/cluster.json").unwrap().0, 0o644);
    assert_eq!(found, expected);
}

#[tokio::test]
async fn all_options_give_the_captured_files_modes_and_owners() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        owner: Owner {
            uid: Some(1500),
            gid: Some(1600),
        },
        skeleton: skeleton(directory.path()),
        bootstrap_script: Some("x".repeat(53)),
        dotfiles: vec![
            dotfile(".mydot", "abc", "640"),
            dotfile("/home/work/abs.txt", "x", "644"),
        ],
        ssh_keypair: Some(SshKeypair {
            public_key: "x".repeat(65),
            private_key: SecretText::new("PRIVATE"),
        }),
        docker_credentials: Confidential(json!({"abcd": "xy"})),
        cluster: cluster(),
    };
    let mut found = create(&scratch, new, config_files(841, 2241)).await;
    let mut expected = captured("listing_full_options");
    for files in [&mut found, &mut expected] {
        files.remove("./config/cluster.json");
        // The credentials of the capture are not known; only mode and owner count.
        files.get_mut("./config/docker-creds.json").unwrap().3 = 0;
    }
    assert_eq!(found, expected);
    let work = scratch.paths(kernel_id()).work;
    assert_eq!(fs::read_to_string(work.join(".mydot")).unwrap(), "abc\n");
    assert_eq!(
        fs::read_to_string(work.join("id_container")).unwrap(),
        "PRIVATE"
    );
    scratch.remove(kernel_id()).await.unwrap();
    assert_eq!(fs::read_dir(directory.path().join("s")).unwrap().count(), 0);
}

/// Defect 7 of the original: absolute dotfile paths were written on the host.
#[tokio::test]
async fn defect_7_absolute_dotfiles_never_reach_the_host() {
    let directory = tempfile::tempdir().unwrap();
    let victim = directory.path().join("victim");
    let absolute = victim.to_string_lossy().into_owned();
    for path in [
        absolute.as_str(),
        "/etc/x",
        "/home/config/x",
        "/home/workx",
        "../x",
        "a/../../x",
        "/home/work",
        "",
        "a/",
    ] {
        let dotfiles = vec![dotfile(path, "x", "644")];
        assert!(
            matches!(
                validate_dotfiles(&dotfiles),
                Err(ScratchError::DotfilePath(_))
            ),
            "{path}"
        );
    }
    for perm in ["", "888", "1777", "-1", "rw"] {
        assert!(matches!(
            validate_dotfiles(&[dotfile("a", "x", perm)]),
            Err(ScratchError::DotfileMode { .. })
        ));
    }
    // Unchecked ones are refused by the creation, too, and nothing stays.
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        dotfiles: vec![dotfile(&absolute, "x", "644")],
        ..NewScratch::default()
    };
    assert!(scratch.create(kernel_id(), new).await.is_err());
    assert!(!victim.exists());
    assert!(scratch.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn directories_made_for_dotfiles_can_be_entered() {
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        dotfiles: vec![
            dotfile(".config/app/a.toml", "x\n", "644"),
            dotfile(".jupyter/b", "x", "600"),
        ],
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new).await.unwrap();
    let mode = |path: &str| {
        fs::metadata(paths.work.join(path))
            .unwrap()
            .permissions()
            .mode()
            & 0o7777
    };
    assert_eq!(mode(".config/app/a.toml"), 0o644);
    assert_eq!(mode(".config/app"), 0o755);
    assert_eq!(mode(".jupyter"), 0o755);
    assert_eq!(
        fs::read_to_string(paths.work.join(".config/app/a.toml")).unwrap(),
        "x\n"
    );
}

/// A scratch with all that a request brings, and that request.
async fn with_everything(directory: &Path) -> (Scratch, ScratchPaths, NewScratch) {
    let scratch = Scratch::new(directory.join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory),
        bootstrap_script: Some("true".to_owned()),
        dotfiles: vec![
            dotfile(".bashrc", "export A=1\n", "644"),
            dotfile(".config/app/a.toml", "a", "640"),
        ],
        ssh_keypair: Some(SshKeypair {
            public_key: "PUBLIC".to_owned(),
            private_key: SecretText::new("PRIVATE"),
        }),
        docker_credentials: Confidential(json!({"user": "a"})),
        cluster: cluster(),
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new.clone()).await.unwrap();
    (scratch, paths, new)
}

#[tokio::test]
async fn a_restart_puts_back_what_the_request_brings() {
    let directory = tempfile::tempdir().unwrap();
    let (scratch, paths, mut new) = with_everything(directory.path()).await;
    let (work, config) = (paths.work.clone(), paths.config.clone());
    let before = listing(&paths);
    for file in [
        work.join(".bashrc"),
        work.join(".ssh/authorized_keys"),
        config.join("ssh/id_cluster"),
    ] {
        fs::write(file, "").unwrap();
    }
    // sshd would take no key out of these.
    for (path, mode) in [(".ssh", 0o777), (".ssh/authorized_keys", 0o666)] {
        fs::set_permissions(work.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    fs::remove_dir_all(work.join(".config")).unwrap();
    fs::remove_file(work.join("id_container")).unwrap();
    fs::remove_file(config.join("docker-creds.json")).unwrap();
    scratch.renew(kernel_id(), new.clone()).await.unwrap();
    assert_eq!(listing(&paths), before);
    let read = |path: &str| fs::read_to_string(paths.root.join(path)).unwrap();
    assert_eq!(read("work/.bashrc"), "export A=1\n");
    assert_eq!(read("work/.ssh/authorized_keys"), "PUBLIC");
    assert_eq!(read("work/id_container"), "PRIVATE");
    // Also where nothing else was changed.
    for (path, mode) in [(".ssh", 0o755), (".ssh/authorized_keys", 0o664)] {
        fs::set_permissions(work.join(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    scratch.renew(kernel_id(), new.clone()).await.unwrap();
    assert_eq!(listing(&paths), before);

    // A key of the user's own stays, and so do his other files; the bootstrap script has run.
    fs::write(work.join(".ssh/id_rsa"), "OWN").unwrap();
    fs::write(work.join(".vimrc"), "own").unwrap();
    fs::remove_file(work.join("bootstrap.sh")).unwrap();
    // What is as it was is not written.
    let unchanged = fs::File::open(work.join(".config/app/a.toml")).unwrap();
    unchanged.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    new.dotfiles[0] = dotfile(".bashrc", "export A=2\n", "600");
    new.docker_credentials = Confidential(json!({"user": "b"}));
    scratch.renew(kernel_id(), new).await.unwrap();
    assert_eq!(read("work/.ssh/id_rsa"), "OWN");
    assert_eq!(read("work/.vimrc"), "own");
    assert!(!work.join("bootstrap.sh").exists());
    let unchanged = fs::metadata(work.join(".config/app/a.toml")).unwrap();
    assert_eq!(unchanged.modified().unwrap(), SystemTime::UNIX_EPOCH);
    assert_eq!(read("work/.bashrc"), "export A=2\n");
    assert_eq!(read("config/docker-creds.json"), r#"{"user":"b"}"#);
}

#[tokio::test]
async fn what_a_user_put_in_the_place_of_a_file_keeps_no_restart_from_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let (scratch, paths, new) = with_everything(directory.path()).await;
    let victim = directory.path().join("victim");
    fs::write(&victim, "the host's").unwrap();
    let at = |path: &str| paths.work.join(path);
    fs::remove_file(at(".bashrc")).unwrap();
    std::os::unix::fs::symlink(&victim, at(".bashrc")).unwrap();
    fs::remove_file(at("id_container")).unwrap();
    std::os::unix::fs::symlink("../../../victim", at("id_container")).unwrap();
    fs::remove_dir_all(at(".ssh")).unwrap();
    std::os::unix::fs::symlink(directory.path(), at(".ssh")).unwrap();
    fs::write(at(".config/app/a.toml"), "").unwrap();
    fs::write(paths.config.join("ssh/id_cluster"), "").unwrap();
    scratch.renew(kernel_id(), new).await.unwrap();
    assert_eq!(fs::read_to_string(&victim).unwrap(), "the host's");
    assert!(!directory.path().join("authorized_keys").exists());
    assert!(!directory.path().join("id_rsa").exists());
    assert_eq!(fs::read_to_string(at(".config/app/a.toml")).unwrap(), "a\n");
    let key = fs::read_to_string(paths.config.join("ssh/id_cluster"));
    assert_eq!(key.unwrap(), "k".repeat(67));
}

#[tokio::test]
async fn no_other_user_of_the_host_gets_into_a_scratch() {
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let skeleton = skeleton(directory.path());
    // The engine may tell late what it needs.
    let open = Arc::new(AtomicBool::new(true));
    let scratch = scratch.open_to_engine(open.clone());
    for (needed, expected) in [(true, 0o711), (false, 0o700)] {
        open.store(needed, Ordering::Relaxed);
        let new = NewScratch {
            skeleton: skeleton.clone(),
            ..NewScratch::default()
        };
        let paths = scratch.create(kernel_id(), new).await.unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&paths.root), expected);
        // These are what containers see.
        assert_eq!((mode(&paths.config), mode(&paths.work)), (0o755, 0o755));
        scratch.remove(kernel_id()).await.unwrap();
    }
}

#[tokio::test]
async fn a_second_creation_leaves_the_first_alone() {
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new.clone()).await.unwrap();
    fs::write(paths.work.join("result"), "x").unwrap();
    assert!(matches!(
        scratch.create(kernel_id(), new).await,
        Err(ScratchError::Exists(_))
    ));
    assert!(paths.work.join("result").exists());
    assert_eq!(scratch.list().await.unwrap(), [kernel_id()]);
    assert_eq!(
        scratch
            .read_config(kernel_id(), "environ.txt")
            .await
            .unwrap(),
        None
    );
    scratch.remove(kernel_id()).await.unwrap();
    scratch.remove(kernel_id()).await.unwrap();
}

#[tokio::test]
async fn a_scratch_bears_its_agents_mark_where_no_container_sees_it() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("s");
    let scratch = Scratch::new(&root, ScratchKind::HostDir, LIMIT).of_agent("i-own");
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new.clone()).await.unwrap();
    assert_eq!(
        scratch.owner(kernel_id()).await.unwrap().as_deref(),
        Some("i-own")
    );
    let mark = root.join(format!("{}.owner", kernel_id()));
    let mode = fs::metadata(&mark).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // What another agent has made is neither taken nor removed.
    let other = Scratch::new(&root, ScratchKind::HostDir, LIMIT).of_agent("i-other");
    assert!(matches!(
        other.create(kernel_id(), new).await,
        Err(ScratchError::Exists(_))
    ));
    other.remove(kernel_id()).await.unwrap();
    assert!(paths.work.join(".bashrc").exists());
    let owned_by = async || scratch.owner(kernel_id()).await.unwrap();
    other.claim(kernel_id()).await.unwrap();
    assert_eq!(owned_by().await.as_deref(), Some("i-own"));
    // One of before there were marks, or whose mark was not written to its end, gets one.
    let unmark: [fn(&Path) -> std::io::Result<()>; 2] =
        [|mark| fs::remove_file(mark), |mark| fs::write(mark, "")];
    for unmark in unmark {
        unmark(&mark).unwrap();
        scratch.claim(kernel_id()).await.unwrap();
        assert_eq!(owned_by().await.as_deref(), Some("i-own"));
    }
    scratch.remove(kernel_id()).await.unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    // What is not there gets none.
    scratch.claim(kernel_id()).await.unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    // A mark that is empty or left alone says nobody, and is a remain like others.
    assert_eq!(scratch.owner(kernel_id()).await.unwrap(), None);
    fs::write(&mark, "").unwrap();
    assert_eq!(scratch.owner(kernel_id()).await.unwrap(), None);
    assert_eq!(scratch.list().await.unwrap(), [kernel_id()]);
    scratch.remove(kernel_id()).await.unwrap();
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
}

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

#[tokio::test]
async fn partial_scratches_are_listed_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let scratch = Scratch::new(root, ScratchKind::HostDir, LIMIT);
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    fs::write(root.join(format!("{}.img", ids[0])), "x").unwrap();
    fs::create_dir(root.join(format!("{}_tmp", ids[1]))).unwrap();
    fs::create_dir_all(root.join(ids[2].to_string()).join("config/ssh")).unwrap();
    fs::create_dir(root.join("notes")).unwrap();
    fs::create_dir(root.join(ids[0].simple().to_string())).unwrap();
    let mut expected = ids.clone();
    expected.sort();
    assert_eq!(scratch.list().await.unwrap(), expected);
    for id in ids {
        scratch.remove(id).await.unwrap();
    }
    assert!(scratch.list().await.unwrap().is_empty());
    assert!(root.join("notes").exists());
}

#[tokio::test]
async fn a_creation_nobody_waits_for_is_undone() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("s");
    // The skeleton's file is a FIFO: reading it waits until the test writes.
    let skeleton = skeleton(directory.path());
    let fifo = skeleton.join(".tmux.conf");
    fs::remove_file(&fifo).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let scratch = Scratch::new(&root, ScratchKind::HostDir, Duration::from_millis(200));
    let new = NewScratch {
        skeleton,
        ..NewScratch::default()
    };
    let told = scratch.create(kernel_id(), new).await.unwrap_err();
    assert!(matches!(told, ScratchError::Timeout { .. }), "{told:?}");
    assert!(root.join(kernel_id().to_string()).exists());
    fs::write(&fifo, "late").unwrap();
    let deadline = std::time::Instant::now() + LIMIT;
    while fs::read_dir(&root).unwrap().count() > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "the late scratch stays"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn host_network_ports_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let new = NewScratch {
        skeleton: skeleton(directory.path()),
        cluster: ClusterFiles {
            ssh_port_mapping: Some(json!({"main1": ["10.0.0.1", 30010]})),
            ..cluster()
        },
        ..NewScratch::default()
    };
    let paths = scratch.create(kernel_id(), new).await.unwrap();
    let files = ConfigFiles {
        intrinsic_ports: Some(json!({"replin": 30001})),
        ..config_files(10, 10)
    };
    scratch.write_config(kernel_id(), files).await.unwrap();
    let read = |path: &str| fs::read_to_string(paths.config.join(path)).unwrap();
    assert_eq!(read("intrinsic-ports.json"), r#"{"replin":30001}"#);
    assert_eq!(
        read("ssh/port-mapping.json"),
        r#"{"main1":["10.0.0.1",30010]}"#
    );
    assert!(!directory.path().join("s/escape").exists());
    let text = scratch
        .read_config(kernel_id(), "environ.txt")
        .await
        .unwrap()
        .unwrap();
    assert!(text.starts_with("A=x"));
}

#[tokio::test]
async fn what_others_may_have_written_is_not_read_as_own() {
    let directory = tempfile::tempdir().unwrap();
    let scratch = Scratch::new(directory.path().join("s"), ScratchKind::HostDir, LIMIT);
    let config = scratch.paths(kernel_id()).config;
    let file = config.join("kconfig.dat");
    let read = async |limit| {
        let name = "kconfig.dat";
        scratch.read_own_config(kernel_id(), name, limit).await
    };
    assert!(read(8).await.unwrap().is_none());
    fs::create_dir_all(&config).unwrap();
    fs::write(&file, b"12345678").unwrap();
    let set_mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    set_mode(0o644);
    assert_eq!(read(8).await.unwrap().unwrap(), b"12345678");
    assert!(read(7).await.is_err(), "longer than the limit");
    for open in [0o646, 0o664] {
        set_mode(open);
        assert!(read(8).await.is_err(), "{open:o}");
    }
    set_mode(0o644);
    fs::rename(&file, config.join("elsewhere")).unwrap();
    std::os::unix::fs::symlink("elsewhere", &file).unwrap();
    assert!(read(8).await.is_err(), "a symlink");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert!(read(8).await.is_err(), "a directory");
}

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

fn part_of(folder: &Path, below: &str) -> Part {
    Part {
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
        match held::hold(&root, kernel_id(), 0o700, &[part_of(&folder, "part/data")]) {
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
    held::release(&root, kernel_id()).unwrap();
    assert!(
        held >= 50 && refused >= 50,
        "{held} held, {refused} refused"
    );
    assert_eq!(mounts_below(place.path()), 0);
}

#[tokio::test]
async fn work_that_hangs_keeps_one_thread_of_its_kernel() {
    let directory = tempfile::tempdir().unwrap();
    let patient = Scratch::new(directory.path(), ScratchKind::HostDir, LIMIT);
    let hasty = Scratch {
        limit: Duration::from_millis(10),
        ..patient.clone()
    };
    let inside = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (release, hung) = std::sync::mpsc::channel::<()>();
    let entered = inside.clone();
    let late = patient.paths(kernel_id()).root;
    let stuck = hasty.blocking(kernel_id(), move |_| {
        entered.fetch_add(1, Ordering::SeqCst);
        let _ = hung.recv();
        // What a creation that was given up does.
        let _ = fs::remove_dir_all(late);
        Ok(())
    });
    assert!(matches!(stuck.await, Err(ScratchError::Timeout { .. })));
    for _ in 0..5 {
        let entered = inside.clone();
        let another = hasty.blocking(kernel_id(), move |_| {
            entered.fetch_add(1, Ordering::SeqCst);
            Ok(())
        });
        assert!(matches!(another.await, Err(ScratchError::Timeout { .. })));
        let removed = hasty.remove(kernel_id()).await;
        assert!(matches!(removed, Err(ScratchError::Timeout { .. })));
    }
    assert!(inside.load(Ordering::SeqCst) <= 1);
    // That of another kernel does not wait.
    patient.remove(Uuid::new_v4()).await.unwrap();
    let root = patient.paths(kernel_id()).root;
    let made_anew = root.clone();
    let next = patient.blocking(kernel_id(), move |_| {
        fs::create_dir(&made_anew).map_err(|cause| ScratchError::make(&made_anew, cause))
    });
    let let_go = async { release.send(()).unwrap() };
    let (made, ()) = tokio::join!(next, let_go);
    made.unwrap();
    assert!(root.exists(), "the late one came first");
    assert_eq!(inside.load(Ordering::SeqCst), 1);
    patient.remove(kernel_id()).await.unwrap();
    assert!(!root.exists());
}
