//! Folders that are mounted from a path below them, which their users change at the worst moment.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a failed step fails the test

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use harness::fault_docker::FaultDocker;
use harness::images::{self, Image};
use harness::kernels::{self, Order, text};
use harness::node::{Node, NodeOptions};
use serde_json::{Value as Json, json};
use uuid::Uuid;

const INSIDE: &str = "/home/work/part";

/// A volume with one user's folder and another's beside it, named as a storage proxy does.
struct Volume {
    place: tempfile::TempDir,
    id: Uuid,
}

impl Volume {
    fn new() -> Result<Volume> {
        let volume = Volume {
            place: tempfile::tempdir()?,
            id: Uuid::new_v4(),
        };
        fs::create_dir_all(volume.folder().join("a/b"))?;
        let part = volume.folder().join("a/b");
        fs::write(part.join("whose"), "mine")?;
        fs::set_permissions(part, fs::Permissions::from_mode(0o777))?;
        fs::create_dir_all(volume.others().join("b"))?;
        fs::write(volume.others().join("b/whose"), "another's")?;
        fs::write(volume.others().join("whose"), "another's")?;
        Ok(volume)
    }

    fn folder(&self) -> PathBuf {
        let digits = self.id.simple().to_string();
        let (first, rest) = digits.split_at(2);
        let (second, rest) = rest.split_at(2);
        self.place.path().join(first).join(second).join(rest)
    }

    fn others(&self) -> PathBuf {
        self.place.path().join("others")
    }

    fn order(&self, below: &str) -> Result<Order> {
        let mut order = Order::of(Image::Runner)?;
        order.config["mounts"] = self.mounts(below);
        Ok(order)
    }

    fn mounts(&self, below: &str) -> Json {
        json!([{
            "name": "part",
            "vfid": self.id.to_string(),
            "vfsubpath": below,
            "host_path": self.folder().join(below),
            "kernel_path": INSIDE,
            "mount_perm": "rw",
        }])
    }
}

/// Which folders a container is labelled to hold.
fn held(container: &str) -> Result<Vec<PathBuf>> {
    let label = "{{index .Config.Labels \"ai.backend.held-folders\"}}";
    let held = kernels::docker(&["inspect", "-f", label, container])?;
    Ok(serde_json::from_str(&held)?)
}

/// What a user does: `name` becomes a link to somewhere else.
fn swap(name: &Path, target: &Path) {
    fs::rename(name, name.with_extension("away")).unwrap();
    symlink(target, name).unwrap();
}

async fn whose(node: &Node, order: &Order) -> Result<String> {
    let ran = kernels::run(node, order, "cat part/whose; echo x > part/written").await?;
    Ok(ran.output)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_swapped_before_the_engine_mounts_it_leads_nowhere_else() -> Result<()> {
    let proxy = FaultDocker::start()?;
    let node = Node::start(NodeOptions {
        engine: Some(proxy.host()),
        ..NodeOptions::default()
    })
    .await?;
    for (request, name) in [
        ("/containers/create", "a"),
        ("/containers/create", "a/b"),
        ("/start", "a"),
        ("/start", "a/b"),
    ] {
        let volume = Volume::new()?;
        let order = volume.order("a/b")?;
        let (swapped, target) = (volume.folder().join(name), volume.others());
        proxy.before(request, move || swap(&swapped, &target));
        let result = kernels::create(&node, &order).await?;
        ensure!(
            volume.folder().join(name).is_symlink(),
            "the swap at {request} took place"
        );
        let read = whose(&node, &order).await?;
        assert_eq!(read, "mine", "{name} at {request}");
        ensure!(!volume.others().join("b/written").exists());
        ensure!(!volume.others().join("written").exists());
        // The manager is told of the folder, not of how it is held.
        let told = result.to_string();
        ensure!(told.contains(volume.folder().to_str().unwrap()), "{told}");
        ensure!(!told.contains("_folders"), "{told}");
        kernels::destroy(&node, &order).await?;
        kernels::assert_clean(&node).await?;
        let written = match name {
            "a" => "a.away/b/written",
            _ => "a/b.away/written",
        };
        let written = volume.folder().join(written);
        assert_eq!(fs::read_to_string(written)?, "x\n", "the user's files stay");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_that_leads_out_is_refused_and_leaves_nothing() -> Result<()> {
    let node = Node::start(NodeOptions::default()).await?;
    let volume = Volume::new()?;
    symlink(volume.others(), volume.folder().join("absolute"))?;
    symlink("../../../others", volume.folder().join("relative"))?;
    symlink("/proc/1/root", volume.folder().join("magic"))?;
    symlink("relative/b", volume.folder().join("chain"))?;
    for below in [
        "absolute",
        "relative/b",
        "magic/etc",
        "chain",
        "../others",
        "a/../../x",
    ] {
        let failure = kernels::fail_to_create(&node, &volume.order(below)?).await?;
        ensure!(
            failure.repr.contains("leads out of it")
                || failure.repr.contains("is not an absolute path"),
            "{below}: {}",
            failure.repr
        );
        kernels::assert_clean(&node).await?;
    }
    let failure = kernels::fail_to_create(&node, &volume.order("a/gone")?).await?;
    ensure!(failure.repr.contains("does not exist"), "{}", failure.repr);
    kernels::assert_clean(&node).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_held_lasts_as_long_as_its_kernel() -> Result<()> {
    let mut node = Node::start(NodeOptions::default()).await?;
    let volume = Volume::new()?;
    // Neither what this image says is held nor the devices it asks for count.
    let image = images::derive(
        &format!("bai-test/claims:{}", volume.id.simple()),
        &images::image(Image::Runner)?,
        &[
            r#"LABEL ai.backend.held-folders=["/srv/another"]"#,
            "ENV NVIDIA_VISIBLE_DEVICES=all",
        ],
    )?;
    let mut order = Order::named(&image.name)?;
    order.config["mounts"] = volume.mounts("a/b");
    kernels::create(&node, &order).await?;
    // An agent that dies knows of it again.
    node.kill_control()?;
    swap(&volume.folder().join("a"), &volume.others());
    node.start_control().await?;
    assert_eq!(whose(&node, &order).await?, "mine");
    // The engine opens the path again for its archives.
    let single = vec![text(order.kernel), "part/whose".into()];
    let content = node.call("download_single", single).await?;
    assert_eq!(content.as_bin().map(|it| &it[..]), Some(&b"mine"[..]));
    // What watches over volumes knows where the folder really is.
    let containers = node.containers()?;
    assert_eq!(held(&containers[0])?, [volume.folder().join("a/b")]);
    kernels::destroy(&node, &order).await?;
    // A kernel that has no part of a folder holds none.
    let order = Order::named(&image.name)?;
    let result = kernels::create(&node, &order).await?;
    let container = result["container_id"].as_str().unwrap();
    ensure!(held(container)?.is_empty());
    let environment = kernels::docker(&["inspect", "-f", "{{json .Config.Env}}", container])?;
    let environment: Vec<String> = serde_json::from_str(&environment)?;
    let devices = environment
        .iter()
        .filter(|line| line.starts_with("NVIDIA_"));
    ensure!(
        devices.eq(["NVIDIA_VISIBLE_DEVICES=void"]),
        "{environment:?}"
    );
    kernels::destroy(&node, &order).await?;
    kernels::assert_clean(&node).await?;
    let mine = volume.folder().join("a.away/b/whose");
    assert_eq!(fs::read_to_string(mine)?, "mine");
    Ok(())
}
