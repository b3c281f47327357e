//! Every method of the catalogue, called by the manager's own client against a whole node and a
//! registry with credentials; and what the methods on images leave behind in the engine.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use control::docker::{Docker, DockerOptions, RegistryAuth};
use control::image::Images;
use harness::images::{self, Image};
use harness::node::{Node, NodeOptions};
use harness::registry::{PASSWORD, Registry, USER};
use harness::{kernels, python};
use serde_json::{Value as Json, json};

/// Takes names away from the engine when the test ends.
struct Untag(Vec<String>);

impl Drop for Untag {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = Command::new("docker").args(["rmi", "-f", name]).output();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_answers_the_managers_client() -> Result<()> {
    let Some(python) = python::interpreter("manager_methods")? else {
        return Ok(());
    };
    let registry = Registry::start(true)?;
    let local = images::image(Image::Runner)?;
    let repository = format!(
        "{}/stable/run-{}",
        registry.address,
        uuid::Uuid::new_v4().simple()
    );
    let canonical = format!("{repository}:1");
    let _untag = Untag(vec![canonical.clone(), format!("{repository}:customized")]);
    kernels::docker(&["tag", &local, &canonical])?;
    let found = images::inspect(&canonical, None)?;
    let docker = Docker::connect(&DockerOptions::default()).await?;
    let auth = RegistryAuth::from_parts(Some(USER), Some(PASSWORD)).context("credentials")?;
    Images::new(docker)
        .push(&canonical, Some(&auth), |_| ())
        .await?;
    kernels::docker(&["rmi", &canonical])?;

    let commits = tempfile::tempdir()?;
    let node = Node::start(NodeOptions {
        agent: format!("image-commit-path = \"{}\"", commits.path().display()),
        ..NodeOptions::default()
    })
    .await?;
    let mark = format!("bai.test.{}", uuid::Uuid::new_v4().simple());
    let settings = json!({
        "canonical": canonical,
        "digest": found["Id"],
        "architecture": std::env::consts::ARCH,
        "labels": found["Config"]["Labels"],
        "registry": registry.address,
        "username": USER,
        "password": PASSWORD,
        "mark": mark,
    })
    .to_string();
    let address = node.address().to_owned();
    let said = tokio::task::spawn_blocking(move || {
        python::check(&python, "manager_methods.py", &[&address, &settings])
    })
    .await?
    .with_context(|| format!("the agent's log:\n{}", node.log("bai-agent")))?;
    let called: BTreeSet<&str> = said
        .lines()
        .find_map(|line| line.strip_prefix("called "))
        .context("the list of calls")?
        .split(' ')
        .collect();
    let catalogue: BTreeSet<&str> = control::rpc::catalogue::METHODS
        .iter()
        .map(|method| method.name)
        .collect();
    assert_eq!(called, catalogue);
    kernels::assert_clean(&node).await?;

    // The original gives the archive the base image's name, and takes the name away with it.
    assert_eq!(images::inspect(&canonical, None)?["Id"], found["Id"]);
    only_the_archive_is_left(commits.path(), &mark)?;
    let notes = node.state().join("commits").join(node.agent_id());
    assert_eq!(
        std::fs::read_dir(notes)?.count(),
        0,
        "what has ended is not looked for"
    );
    of_the_customized_image(&format!("{repository}:customized"), &found, &mark)
}

/// The image that was made to be exported is gone; the archive brings it back, whole.
fn only_the_archive_is_left(commits: &Path, mark: &str) -> Result<()> {
    let wanted = format!("label={mark}=archive");
    let left = kernels::docker(&["images", "-aq", "--filter", &wanted])?;
    ensure!(left.is_empty(), "left in the engine: {left}");
    let directory = commits.join("user_example.com");
    let files: Vec<String> = std::fs::read_dir(&directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    assert_eq!(files, ["kept.tar.gz"]);
    let archive = directory.join("kept.tar.gz");
    let loaded = kernels::docker(&["load", "-q", "-i", &archive.display().to_string()])?;
    let id = loaded
        .strip_prefix("Loaded image ID: ")
        .with_context(|| format!("an image without a name: {loaded}"))?;
    let _untag = Untag(vec![id.to_owned()]);
    let listing = kernels::docker(&[
        "run",
        "--rm",
        "--entrypoint",
        "/bin/sh",
        id,
        "-c",
        "echo /tmp/*",
    ])?;
    ensure!(listing.contains("/tmp/kept"), "{listing}");
    Ok(())
}

/// It carries the labels asked for, and none that would make its containers this agent's.
fn of_the_customized_image(name: &str, base: &Json, mark: &str) -> Result<()> {
    let image = images::inspect(name, None)?;
    let labels = &image["Config"]["Labels"];
    assert_eq!(labels["ai.backend.customized-image.owner"], "user:1111");
    assert_eq!(
        labels["ai.backend.customized-image.name"],
        "with \"quotes\" and = signs"
    );
    assert_eq!(labels[mark], "image");
    for name in [
        "ai.backend.owner",
        "ai.backend.kernel-id",
        "ai.backend.session-id",
    ] {
        assert_eq!(labels[name], "", "{name}");
    }
    // The port that the session had opened is no service of the image.
    let services = "ai.backend.service-ports";
    assert_eq!(labels[services], base["Config"]["Labels"][services]);
    Ok(())
}
