//! The life of a scratch, and what the tests of its parts share.

mod contents;
mod storage;
mod subpaths;

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
