//! The manager's own client (published packages, libzmq underneath) drives a whole node.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use control::rpc::KeyPair;
use harness::images::{self, Image};
use harness::node::{Node, NodeOptions};
use harness::python;
use serde_json::{Value, json};

/// What the manager knows of an image, taken from the engine.
fn image_record(name: &str) -> Result<String> {
    let output = Command::new("docker")
        .args(["image", "inspect", name])
        .output()
        .context("docker can't be started")?;
    ensure!(
        output.status.success(),
        "docker image inspect {name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let inspected: Value = serde_json::from_slice(&output.stdout)?;
    let image = &inspected[0];
    let architecture = if image["Architecture"] == "arm64" {
        "aarch64"
    } else {
        "x86_64"
    };
    Ok(json!({ "canonical": name, "digest": image["Id"], "architecture": architecture, "labels": image["Config"]["Labels"] }).to_string())
}

#[tokio::test]
async fn the_managers_client_lives_a_kernels_life_over_null() -> Result<()> {
    let Some(python) = python::interpreter("published_client")? else {
        return Ok(());
    };
    let image = image_record(&images::image(Image::Runner)?)?;
    let node = Node::start(NodeOptions::default()).await?;
    let address = node.address().to_owned();
    let said = tokio::task::spawn_blocking(move || {
        python::check(&python, "node_peer.py", &[&address, &image])
    })
    .await??;
    ensure!(
        said.lines().filter(|line| line.starts_with("ok ")).count() >= 15,
        "too few checks ran:\n{said}"
    );
    ensure!(node.containers()?.is_empty(), "a container is left");
    Ok(())
}

#[tokio::test]
async fn the_managers_client_lives_a_kernels_life_over_curve_and_nobody_else_is_let_in()
-> Result<()> {
    let Some(python) = python::interpreter("published_client")? else {
        return Ok(());
    };
    let image = image_record(&images::image(Image::Runner)?)?;
    let keys = tempfile::tempdir()?;
    let (agent, manager) = (KeyPair::generate(), KeyPair::generate());
    let file = |name: &str| keys.path().join(name).display().to_string();
    std::fs::write(file("agent.key_secret"), agent.secret_file_text())?;
    std::fs::write(file("manager.key_secret"), manager.secret_file_text())?;
    let options = NodeOptions {
        agent: format!(
            "rpc-auth-agent-keypair = \"{}\"\nrpc-auth-manager-public-key = \"{}\"\n",
            file("agent.key_secret"),
            file("manager.key_secret")
        ),
        curve: Some((manager.clone(), agent.public)),
        ..NodeOptions::default()
    };
    let node = Node::start(options).await?;
    let (address, public, secret) = (
        node.address().to_owned(),
        agent.public.to_z85(),
        file("manager.key_secret"),
    );
    tokio::task::spawn_blocking(move || {
        python::check(
            &python,
            "node_peer.py",
            &["--refused", &address, &public, &secret],
        )?;
        python::check(
            &python,
            "node_peer.py",
            &[&address, &image, &public, &secret],
        )
    })
    .await??;
    ensure!(node.containers()?.is_empty(), "a container is left");
    Ok(())
}
