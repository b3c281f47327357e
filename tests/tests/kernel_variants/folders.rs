//! Folders, users and private files inside a kernel.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn folders_users_and_private_files_are_as_asked_for() -> Result<()> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let node = Node::start(NodeOptions::default()).await?;
    let folder = tempfile::tempdir()?;
    std::fs::create_dir_all(folder.path().join("deep/er"))?;
    std::fs::write(folder.path().join("deep/er/file"), "sub\n")?;
    std::fs::write(folder.path().join("file"), "top\n")?;
    for directory in ["", "deep/er"] {
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(folder.path().join(directory), open)?;
    }
    // One for a group of the session's, one for root only.
    for (name, mode, group) in [("group", 0o770, 1700), ("private", 0o700, 0)] {
        let directory = folder.path().join(name);
        std::fs::create_dir(&directory)?;
        std::fs::write(directory.join("inside"), "")?;
        std::os::unix::fs::chown(&directory, Some(0), Some(group))?;
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(mode))?;
    }
    let mount = |name: &str, host: &Path, target: &str, permission: &str, sub: &str| {
        json!({"name": name, "vfid": null, "vfsubpath": sub, "host_path": host.display().to_string(),
            "kernel_path": target, "mount_perm": permission, "usage_mode": "general"})
    };
    let mut order = Order::of(Image::Runner)?;
    order.config["mounts"] = json!([
        mount("a", folder.path(), "/home/work/rw", "rw", "."),
        mount("b", folder.path(), "/home/work/ro", "ro", "."),
        mount(
            "c",
            &folder.path().join("deep/er"),
            "/mnt/sub",
            "wd",
            "deep/er"
        ),
    ]);
    order.config["environ"] = json!({"KEY_FILE": "-----BEGIN\n  two blanks\n-----END"});
    order.config["uid"] = json!(1500);
    order.config["main_gid"] = json!(1600);
    order.config["supplementary_gids"] = json!([1700, 1701]);
    order.config["bootstrap_script"] = json!("#!/bin/sh\nid -u > /home/work/booted\n");
    order.config["internal_data"] = json!({
        "dotfiles": [
            {"path": ".deep/dot", "data": "relative", "perm": "600"},
            {"path": "/home/work/.absolute", "data": "absolute\n", "perm": "755"},
        ],
        "ssh_keypair": {"public_key": "ssh-rsa AAAA given\n", "private_key": "not a real key\n"},
        "docker_credentials": {"registry": "secret"},
        "sudo_session_enabled": true,
    });
    // A folder that is not there: told before anything is made.
    let mut missing = order.clone();
    let path = folder.path().join("absent");
    missing.config["mounts"] = json!([mount("gone", &path, "/home/work/gone", "rw", ".")]);
    let failure = kernels::fail_to_create(&node, &missing).await?;
    for words in ["gone", &path.display().to_string(), "does not exist"] {
        assert!(failure.repr.contains(words), "{words}: {}", failure.repr);
    }
    kernels::assert_clean(&node).await?;
    assert!(!node.scratch(&missing.kernel.to_string()).exists());

    order.kernel = uuid::Uuid::new_v4();
    order.config["kernel_id"] = json!(order.kernel.to_string());
    let result = kernels::create(&node, &order).await?;
    let seen = output_of(&node, &order, "id -u; id -g; id -G; cat booted rw/file ro/file /mnt/sub/file .deep/dot .absolute; \
        echo new > rw/new; { echo no > ro/no; } 2>/dev/null || echo refused; echo deeper > /mnt/sub/new; \
        cat .ssh/authorized_keys .ssh/id_rsa id_container; env | grep -E '^(LOCAL_USER_ID|LOCAL_GROUP_ID)=' | sort; printf '%s\\n' \"$KEY_FILE\"").await?;
    let lines: Vec<&str> = seen.lines().collect();
    assert_eq!(lines[..2], ["1500", "1600"], "{seen}");
    let mut groups: Vec<&str> = lines[2].split(' ').collect();
    groups.sort_unstable();
    assert_eq!(groups, ["1000", "1600", "1700", "1701", "42"], "{seen}");
    assert_eq!(
        lines[3..9],
        ["1500", "top", "top", "sub", "relative", "absolute"],
        "{seen}"
    );
    assert!(seen.contains("refused"), "{seen}");
    assert!(seen.contains("ssh-rsa AAAA given\n"), "{seen}");
    assert_eq!(seen.matches("not a real key").count(), 2, "{seen}");
    assert!(
        seen.contains("LOCAL_GROUP_ID=1600\nLOCAL_USER_ID=1500\n"),
        "{seen}"
    );
    assert!(
        seen.ends_with("-----BEGIN\n  two blanks\n-----END\n"),
        "{seen}"
    );
    let listed = async |path: &str| {
        let args = vec![text(order.kernel), Value::from(path)];
        kernels::ask(&node, "list_files", args).await
    };
    let group = listed("rw/group").await?;
    let files = group["files"].as_str().unwrap_or_default();
    assert!(files.contains("inside") && group["errors"] == "", "{group}");
    let private = listed("rw/private").await?;
    let errors = private["errors"].as_str().unwrap_or_default();
    assert!(
        private["files"] == "[]" && errors.contains("Permission denied"),
        "{private}"
    );
    assert_eq!(std::fs::read_to_string(folder.path().join("new"))?, "new\n");
    assert_eq!(
        std::fs::read_to_string(folder.path().join("deep/er/new")).unwrap_or_default(),
        "deeper\n"
    );
    assert!(!folder.path().join("no").exists());
    let sudo = kernels::docker(&[
        "exec",
        container_of(&result),
        "sh",
        "-c",
        "cat /etc/sudoers.d/01-bai-work",
    ])?;
    assert!(
        sudo.contains("work ALL") && sudo.contains("NOPASSWD"),
        "{sudo}"
    );
    // Nobody starts a service in a kernel that blocks them; root is root.
    let mut root = Order::of(Image::Runner)?;
    root.config["uid"] = json!(0);
    root.config["main_gid"] = json!(0);
    root.config["internal_data"] =
        json!({"block_service_ports": true, "prevent_vfolder_mounts": true});
    root.config["mounts"] = json!([
        mount("a", folder.path(), "/home/work/a", "rw", "."),
        mount(".logs", folder.path(), "/home/work/.logs", "rw", "."),
    ]);
    kernels::create(&node, &root).await?;
    assert!(start_service(&node, &root, "web").await.is_err());
    let seen_by_root = output_of(&node, &root, "id -u; ls -d a .logs 2>/dev/null || true").await?;
    assert_eq!(seen_by_root, "0\n.logs\n");
    kernels::destroy(&node, &root).await?;
    // Owners and modes on the host.
    let scratch = node.scratch(&order.kernel.to_string());
    for (file, mode, uid) in [
        ("work/.deep/dot", 0o600, 1500),
        ("work/.absolute", 0o755, 1500),
        ("work/.ssh", 0o700, 1500),
        ("work/.ssh/authorized_keys", 0o600, 1500),
        ("work/.ssh/id_rsa", 0o600, 1500),
        ("work/id_container", 0o600, 1500),
        ("work/bootstrap.sh", 0o644, 1500),
    ] {
        let found = std::fs::metadata(scratch.join(file)).context(file)?;
        assert_eq!(
            (found.permissions().mode() & 0o777, found.uid()),
            (mode, uid),
            "{file}"
        );
    }
    let credentials: Json = serde_json::from_str(&std::fs::read_to_string(
        scratch.join("config/docker-creds.json"),
    )?)?;
    assert_eq!(credentials, json!({"registry": "secret"}));

    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await?;
    // The folder is the user's: nothing of it goes with the kernel.
    assert_eq!(std::fs::read_to_string(folder.path().join("new"))?, "new\n");
    Ok(())
}
