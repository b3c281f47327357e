//! What lies in a scratch: files, modes and owners, at first and after a restart.

use super::*;

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
